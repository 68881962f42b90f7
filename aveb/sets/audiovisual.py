"""Sound and picture together: speech, sources of sound, matching pairs, captions."""

import json
import re

from aveb.sets.common import SETS, Set, id_of, under


def _joined(segments):
    """The authors' test clips (their 531 are all among them): sorted by start, the next sentence is
    appended while the pause is at most 2 s and what is there lasts at most 20 s."""
    clips = []
    for segment in sorted(segments, key=lambda s: float(s[1])):
        if clips:
            begin, end = float(clips[-1][0][1]), float(clips[-1][-1][2])
            if round(float(segment[1]) - end, 3) <= 2 and round(end - begin, 3) <= 20:
                clips[-1].append(segment)
                continue
        clips.append([segment])
    return clips


def how2(files, merge=True):
    """{train,val,dev5}/segments, lines '<id> <youtube id> 16.84 24.81', and text.id.en, lines '<id>
    Cased, punctuated text.' (which install.sh of reproduce/300h cuts out of the subtitles; its
    pickled offsets.bin.bz2 is not read). <youtube id>.mp4, or cut: <youtube id>_16.84_24.81.mp4."""
    split = "dev5" if files.split == "test" else files.split
    segments = files.find(f"{split}/segments")
    texts = segments.with_name("text.id.en")
    if not texts.exists():
        raise FileNotFoundError(f"{texts}: not there; install.sh of srvk/how2-dataset, "
                                "reproduce/300h, makes it from the subtitles (offsets.bin.bz2 is a "
                                "pickle, which is never read here)")
    text_of, videos = dict(line.partition(" ")[::2] for line in files.lines(texts)), {}
    for line in files.lines(segments):
        fields = re.fullmatch(r"(\S+)\s+(\S+)\s+(\d+\.?\d*)\s+(\d+\.?\d*)\s*", line)
        if not fields:
            files.drop("line that is no segment", line[:60])
        elif not text_of.get(fields[1]):
            files.drop("segment without text", fields[1])
        else:
            videos.setdefault(fields[2], []).append(fields.group(1, 3, 4))
    for youtube, parts in videos.items():
        for clip in _joined(parts) if merge else [[part] for part in parts]:
            start, end = clip[0][1], clip[-1][2]
            cut = f"{youtube}_{start}_{end}"
            whole = files.look("video", f"{cut}.mp4", f"videos/{cut}.mp4") in ("missing", "empty")
            yield from files.record(
                cut if merge else clip[0][0],
                "Transcribe the speech into text, paying attention to both audio and video.",
                [" ".join(text_of[name] for name, _, _ in clip)],
                video=under(f"{youtube if whole else cut}.mp4", "videos"),
                start=float(start) if whole else None, end=float(end) if whole else None,
                segments=[name for name, _, _ in clip])


SOURCE = "What is the source of the sound?"


def vggss(files):
    """vggss.json: [{"file":"abcdefghijk_000030","class":"playing cello","bbox":[...]}];
    <file>.mp4 of VGGSound, 10 s. In the order of the ids: the authors' test clips are a prefix."""
    for entry in sorted(files.json(list, "vggss.json"), key=lambda entry: entry["file"]):
        yield from files.record(entry["file"], SOURCE, [entry["class"]], label=entry["class"],
                                video=under(f"{entry['file']}.mp4", "video", "videos"))


def vggsound(files):
    """vggsound.csv without a header: abcdefghijk,30,"bird chirping, tweeting",train; or test.csv:
    abcdefghijk_000030.mp4,"label"; <youtube id>_<start, six digits>.mp4, 10 s."""
    path = files.find("vggsound.csv", *(["test.csv"] if files.split == "test" else []))
    header = ("youtube", "start", "label", "split") if path.name == "vggsound.csv" else (
        "file", "label")
    for row in files.rows(path, (), header):
        if row.get("split", files.split) != files.split:
            continue
        if "file" not in row and not row["start"].isdecimal():
            files.drop("row whose start is no whole second", row["start"])
            continue
        name = id_of(row["file"]) if "file" in row else (
            f"{row['youtube']}_{int(row['start']):06d}")
        yield from files.record(name, SOURCE, [row["label"]], label=row["label"],
                                video=under(f"{name}.mp4", "video", "videos"))


def spokencoco(files):
    """SpokenCOCO_{train,val}.json: {"data":[{"image":"val2014/COCO_val2014_000000000042.jpg",
    "captions":[{"text":"a cup on a table","uttid":"m1-H_42_1","wav":"wavs/val/0/m1-H_42_1.wav"}]
    }]}; images below the COCO folder. All match;
    `python -m aveb.speech avm` makes the other half."""
    for entry in files.json(dict, f"SpokenCOCO_{files.split}.json")["data"]:
        for caption in entry["captions"]:
            yield from files.record(
                caption["uttid"], "Is the audio describing the image?", ["Yes"],
                text=caption["text"], image=under(entry["image"], "coco"),
                audio=under(caption["wav"], "SpokenCOCO"))


def favdbench(files):
    """metadata/{train,val,test}.caption.tsv, lines 'test/<clip>.mp4<TAB>[{"caption":"..."}]'; or
    *.caption_coco_format.json: {"annotations":[{"image_id":"test/<clip>.mp4","caption":"..."}]};
    videos/<split>/<clip>.mp4; audios/<split>/<clip>.mp3 is used where it is there."""
    path, captions = files.find(f"{files.split}.caption.tsv",
                                f"{files.split}.caption_coco_format.json"), {}
    if path.suffix == ".tsv":
        for line in files.lines(path):
            key, _, values = line.partition("\t")
            try:
                captions[key] = [entry["caption"] for entry in json.loads(values)]
            except (json.JSONDecodeError, KeyError, TypeError):
                files.drop("line that is not <key><TAB>[{\"caption\": ...}]", line[:60])
    else:
        for entry in files.json(dict, path.name)["annotations"]:
            captions.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    for key, texts in captions.items():
        clip = id_of(key)
        sound = files.look("audio", f"audios/{files.split}/{clip}.mp3")
        yield from files.record(
            key, "Describe the video and the audio in detail.", texts,
            video=[c for name in (f"{files.split}/{clip}.mp4", f"{clip}.mp4")
                   for c in under(name, "videos")],
            audio=() if sound in ("missing", "empty") else [sound])


def _valor_names(name):
    """File names that downloaders give <youtube id>_30.000_40.000."""
    if not (parts := re.fullmatch(r"(.+)_(\d+\.?\d*)_(\d+\.?\d*)", name)):
        return [name]
    youtube, start, end = parts[1], float(parts[2]), float(parts[3])
    return [name, f"{youtube}_{start:.1f}_{end:.1f}", f"{youtube}_{start:g}_{end:g}", youtube]


def valor(files):
    """desc_{train,val,test}.json: [{"video_id":"abcdefghijk_30.000_40.000","desc":"With a bang,"}];
    or {train,val,test}_id.json: [ids] with txt_mapper_en.json: {id: [desc]}. Clips of 10 s:
    <video_id>.mp4, or with shorter times, or <youtube id>.mp4."""
    path, captions = files.find(f"desc_{files.split}.json", f"{files.split}_id.json"), {}
    values = files.json(list, path.name)
    if path.name.startswith("desc_"):
        for entry in values:
            captions.setdefault(entry["video_id"], entry["desc"])
    else:
        mapper = files.json(dict, "txt_mapper_en.json")
        captions = {name: mapper.get(name, "") for name in values}
    for name, texts in captions.items():
        yield from files.record(
            name, "Describe the video in one sentence, including what is heard.",
            [texts] if isinstance(texts, str) else texts,
            video=[c for stem in _valor_names(name) for c in under(f"{stem}.mp4", "videos")])


SETS.update({
    "how2": Set(how2, "avsr", ("test", "train", "val", "dev5"), "github.com/srvk/how2-dataset, "
                "reproduce/300h, CC BY-SA 4.0; videos: YouTube", options=("merge",)),
    "vggss": Set(vggss, "avssd", ("test",), "github.com/hche11/Localizing-Visual-Sounds-the-"
                 "Hard-Way, metadata/; clips: VGGSound"),
    "vggsound": Set(vggsound, "avssd", ("test", "train"),
                    "robots.ox.ac.uk/~vgg/data/vggsound, CC BY 4.0; clips: YouTube"),
    "spokencoco": Set(spokencoco, "avm", ("val", "train"), "data.csail.mit.edu/placesaudio, "
                      "SpokenCOCO.tar.gz; images: COCO 2014"),
    "favdbench": Set(favdbench, "favd", ("test", "train", "val"), "github.com/OpenNLPLab/"
                     "FAVDBench, metadata.zip, Apache 2.0; videos by a form"),
    "valor": Set(valor, "valor", ("test", "train", "val"), "casia-iva-group.github.io/projects/"
                 "VALOR, VALOR-32K-annotations.zip, MIT; clips: AudioSet"),
})
