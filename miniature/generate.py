"""Writes the clips of the miniature as files, with a manifest of the questions about them.

     SCENES[name](rng, split) --make_clip--> <folder>/<split>/<name>_00007.mp4, .png or .wav
                              --make-->      <folder>/<split>.jsonl, one record per question
     <split>.made.json    the settings that <split>.jsonl was made with
     <split>.clips.json   how many clips of each scene are there, whole set or not
     <split>-<tasks>-<limit>.jsonl   the manifest of a part (tasks=, limit=)

Each clip has a random stream of its own, so neither the number of workers nor the other clips
change it: a part that was made first and the whole set made later give the very same files.

Public: make, demo, VERSION."""

from pathlib import Path

import numpy as np

from aveb.tasks import ERROR_RATES
from miniature.scenes import SCENES, TASKS, TEST_CLIPS, TRAIN_CLIPS, WEIGHTS
from miniature.world import VIDEO_FPS
from runtime import cli
from runtime.hub import read_json, write_json

VERSION = 6           # of what is drawn and asked; clips of another version are made again
DEMO = ("concert", 5)                    # scene and index of the test clip that demo.py asks about


def plan_clip(split, scene, index, seed):
    """The Scene of one clip; nothing is drawn yet."""
    stream = [seed, ("train", "test").index(split), list(SCENES).index(scene), index]
    return SCENES[scene](np.random.default_rng(stream), split)


def make_clip(job):
    """Draws the media of one clip and writes them. job: (folder, split, scene, index, seed)."""
    from runtime.media import write_png, write_video, write_wav
    folder, split, scene, index, seed = job
    media = {kind: render() for kind, render in plan_clip(split, scene, index, seed).media.items()}
    paths = media_paths(folder, split, scene, index, media)
    if "video" in media:
        write_video(paths["video"], media["video"], VIDEO_FPS, media.get("audio"))
    if "image" in media:
        write_png(paths["image"], media["image"])
    for kind in paths.keys() & {"audio", "yes", "no"}:
        write_wav(paths[kind], media[kind])


def media_paths(folder, split, scene, index, kinds):
    """{kind of media: path of its file}. The sound of a video is part of the video's file."""
    stem = folder / split / f"{scene}_{index:05d}"
    paths = {"video": stem.with_suffix(".mp4"), "image": stem.with_suffix(".png"),
             "audio": stem.with_suffix(".wav"), "yes": stem.with_name(f"{stem.name}_yes.wav"),
             "no": stem.with_name(f"{stem.name}_no.wav")}
    return {kind: path for kind, path in paths.items()
            if kind in kinds and not (kind == "audio" and "video" in kinds)}


def records_of(job):
    """The records of one clip. job: (folder, split, scene, index, seed)."""
    from data import Record
    folder, split, scene, index, seed = job
    plan, records = plan_clip(split, scene, index, seed), []
    paths = media_paths(folder, split, scene, index, plan.media)

    def path(kind):
        return str(paths[kind]) if kind in paths else None
    for k, (task, prompt, target, extras) in enumerate(plan.questions):
        if task == "caption" and split == "test":
            continue                                     # dense captions only help the training
        meta = {key: extras[key] for key in ("chance", "type", "one_window") if key in extras}
        if split == "train":
            meta["weight"] = WEIGHTS.get(f"{task}-{extras.get('type')}", WEIGHTS[task])
        elif task in ERROR_RATES:
            meta["metrics"] = ["wer_basic"]              # its answers are normalised words
        records.append(Record(
            id=f"{split}-{scene}-{index:05d}-{k}", task=task, prompt=prompt,
            target=target, refs=(target,),
            image=path("image"), video=path("video"), audio=path(extras.get("audio", "audio")),
            options=tuple(extras.get("options", ())), history=extras.get("history", ()),
            meta=meta))
    return records


def make(folder, seed=0, scale=1.0, workers=None, splits=("train", "test"), counts=None,
         tasks=None, limit=0):
    """Writes clips and a manifest for each split -> {split: path of the manifest}.

    Without tasks and limit that is the whole set in <split>.jsonl. With them it is the part that
    the first `limit` questions (0: all) of each of `tasks` (None: all eleven) need, in a manifest
    of its own, unless the whole set is there already; the questions are the first ones of each
    task in the whole manifest. Clips that are there with the same seed and VERSION stay.

    scale multiplies the number of training clips; counts {split: {scene: clips}} replaces
    TRAIN_CLIPS and TEST_CLIPS; workers: processes (default: one per core).
    Raises ValueError for an unknown task."""
    if unknown := sorted(set(tasks or ()) - set(TASKS)):
        raise ValueError(f"unknown task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    folder = Path(folder).resolve()
    counts = counts or {"test": TEST_CLIPS, "train": {
        scene: max(1, round(n * scale)) for scene, n in TRAIN_CLIPS.items()}}
    return {split: _make_split(folder, split, seed, counts[split], tasks, limit,
                               workers or cli.cores()) for split in splits}


def _make_split(folder, split, seed, counts, tasks, limit, workers):
    """One split of `make` -> the path of its manifest."""
    from data import write_manifest
    settings = {"seed": seed, "clips": counts, "version": VERSION}
    whole, stamp = folder / f"{split}.jsonl", folder / f"{split}.made.json"
    if stamp.exists() and read_json(stamp) == settings:
        return whole
    there = _clips_there(folder, split, seed)
    if there is None:                    # another seed or version: its manifest is true no more
        for file in (stamp, whole, *folder.glob(f"{split}-*.jsonl")):
            file.unlink(missing_ok=True)
        there = {}
    jobs = [(folder, split, scene, index, seed)
            for scene, n in counts.items() for index in range(n)]
    jobs, records, manifest = *_part(jobs, tasks, limit), whole
    if tasks or limit:
        manifest = folder / f"{split}-{'+'.join(tasks or ['all'])}-{limit or 'all'}.jsonl"
    missing = [job for job in jobs if job[3] >= there.get(job[2], 0)]
    (folder / split).mkdir(parents=True, exist_ok=True)
    for _ in cli.progress(cli.parallel(make_clip, missing, workers), len(missing),
                          f"making {split} clips", "clip"):
        pass
    for _, _, scene, index, _ in jobs:
        there[scene] = max(there.get(scene, 0), index + 1)
    write_json(folder / f"{split}.clips.json", {"seed": seed, "clips": there, "version": VERSION})
    write_manifest(manifest, records)
    if manifest == whole:
        write_json(stamp, settings)
    return manifest


def _clips_there(folder, split, seed):
    """{scene: number of clips in the folder}, {} if none are; None if they are of another seed or
    version. Those of a scene are always its first ones."""
    for file in (folder / f"{split}.clips.json", folder / f"{split}.made.json"):
        if file.exists():
            found = read_json(file)
            same = (found["seed"], found["version"]) == (seed, VERSION)
            return dict(found["clips"]) if same else None
    return {}


def _part(jobs, tasks, limit):
    """The jobs and records that the first `limit` questions of each task need (None and 0: all)."""
    needed, records, taken = [], [], dict.fromkeys(tasks or TASKS, 0)
    everything = not tasks and not limit
    for job in jobs:
        if limit and all(n >= limit for n in taken.values()):
            break
        wanted = []
        for record in records_of(job):
            if everything or record.task in taken and not 0 < limit <= taken[record.task]:
                taken[record.task] = taken.get(record.task, 0) + 1
                wanted.append(record)
        if wanted:
            needed.append(job)
            records += wanted
    return needed, records


def demo(folder):
    """Writes demo.mp4 and demo.json {clip, question, answer} into `folder` -> both paths. It is a
    test clip of avsd; the question asks what is seen at a sound."""
    from runtime.media import write_video
    folder, plan = Path(folder), plan_clip("test", *DEMO, seed=0)
    media = {kind: render() for kind, render in plan.media.items()}
    clip, facts = folder / "demo.mp4", folder / "demo.json"
    write_video(clip, media["video"], VIDEO_FPS, media["audio"])
    _, question, answer, _ = plan.questions[0]
    write_json(facts, {"clip": clip.name, "question": question, "answer": answer})
    return clip, facts
