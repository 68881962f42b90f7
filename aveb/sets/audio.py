"""Speech and sound: LibriSpeech and AudioCaps."""

from aveb.sets.common import SETS, Set, under

LIBRISPEECH = {"test": ("test-clean",), "train": ("train-clean-100", "train-clean-360")}


def librispeech(files):
    """<split>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt, a line '<id> UPPER CASE WORDS';
    <id>.flac beside it. Targets are lower-cased, as by the authors."""
    for part in LIBRISPEECH.get(files.split, (files.split,)):
        files.find(f"{part}/*/*/*.trans.txt")
        for chapter in files.all(f"{part}/*/*/*.trans.txt"):
            for line in files.lines(chapter):
                name, _, text = line.partition(" ")
                yield from files.record(name, "Transcribe the speech into text.", [text.lower()],
                                        audio=[chapter.with_name(f"{name}.flac")])


def audiocaps(files):
    """dataset/{train,val,test}.csv of version 1: audiocap_id,youtube_id,start_time,caption; a clip
    is (youtube_id, start_time), 10 s, with 5 captions in val and test.
    The sound: <youtube_id>_<start>.wav (.flac, .mp4), <youtube_id>.wav, cut to the 10 s."""
    path = files.find(f"dataset/{files.split}.csv", f"{files.split}.csv")
    clips = {}
    for row in files.rows(path, ("audiocap_id", "youtube_id", "start_time", "caption")):
        clips.setdefault((row["youtube_id"], row["start_time"]), []).append(row)
    captions = [row["caption"] for rows in clips.values() for row in rows]
    if ("dataset2.0" in path.parts or len(captions) > 49838
            or len(captions) > 20 and not any(c[:1].isupper() for c in captions)):
        raise ValueError(f"{path}: AudioCaps 2.0 (captions written anew in 2025), another set than "
                         "the paper's; take dataset/ of the same repository, version 1")
    for (youtube, start), rows in clips.items():
        stems = (f"{youtube}_{start}", youtube, f"Y{youtube}")
        names = [f"{stems[0]}.{suffix}" for suffix in ("wav", "flac", "mp4")]
        yield from files.record(
            stems[0], "Please describe the audio.", [row["caption"] for row in rows],
            audio=[c for name in (*names, *(f"{stem}.wav" for stem in stems[1:]))
                   for c in under(name, files.split, "audio")],
            audiocap_ids=[row["audiocap_id"] for row in rows])


SETS.update({
    "librispeech": Set(librispeech, "asr",
                       ("test", "train", "train-clean-100", "train-clean-5", "dev-clean",
                        "test-other", "dev-other"),
                       "openslr.org/12 (train-clean-5: /31), CC BY 4.0"),
    "audiocaps": Set(audiocaps, "ac", ("test", "train", "val"),
                     "github.com/cdjkim/audiocaps, dataset/, academic use; sound: YouTube"),
})
