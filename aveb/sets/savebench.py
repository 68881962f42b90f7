"""SAVEBench: the test subsets that the authors published later, with their next model."""

import re
from pathlib import Path

from aveb.sets.common import OWN, SETS, Set, id_of, with_choices
from aveb.tasks import METRICS

SAVEBENCH = {"ic": "flickr30k_captions.json", "ocr": "textvqa.json",
             "vqa": "testdev_balanced_questions_with_images.json", "videoqa": "nextqa_test.json",
             "avsr": "how2_test.json", "avsd": "avsd_textformat_subset.json",
             "avssd": "testdata_formatted.json", "avm": "audiovisualmatching_combined.json"}
SOUND_CLASS = re.compile(r"(?:scene is|identified as|produced by|originates from) (.+?)\.?$")


def _save_media(files, named):
    """The authors' disk paths -> candidates, by file name alone. The wav of a video's own sound may
    be missing, the video holds it; other sound may come out of the video that it belongs to."""
    visual, sound = named if isinstance(named, list) else (named, None)
    kind = "image" if Path(visual).suffix.lower() in (".jpg", ".jpeg", ".png") else "video"
    media = {kind: [files.by_name(kind, visual)]}
    if sound:
        names = [files.by_name("audio", sound)]
        own = kind == "video" and id_of(sound) == id_of(visual)
        if own:                                    # only a sound file: the video is not one
            names = [name for name in names if Path(name).suffix.lower() in OWN["audio"]]
        if not own or files.look("audio", *names) not in ("missing", "empty"):
            media["audio"] = names
    return media


def savebench(files):
    """SAVEBench/*.json of bytedance/SALMONN: [{"image":"x.jpg" or ["v.mp4","v.wav"],"question":
    "...","answer":"..." or [...],"answer_candidates":[5]}]; dialogues: [{"image_name":[...],
    "conversation":[["question","answer"], ...]}]. Media are matched by file name alone."""
    for task in SAVEBENCH if files.split == "all" else (files.split,):
        for k, entry in enumerate(files.json(list, SAVEBENCH[task])):
            named = entry["image_name"] if task == "avsd" else entry["image"]
            first = named if isinstance(named, str) else named[0]
            name, media = f"{task}-{k:05d}", _save_media(files, named)
            shared = {"task": task, "metrics": METRICS[task], "original_id": id_of(first),
                      "source": Path(first).name, **media}
            if task == "avsd":
                turns = [tuple(turn) for turn in entry["conversation"]]
                yield from files.dialogue(name, turns, **shared)
                continue
            answers, options = entry["answer"], entry.get("answer_candidates", ())
            answers = [answers] if isinstance(answers, str) else answers
            label = SOUND_CLASS.search(answers[0]) if task == "avssd" else None
            yield from files.record(
                name, with_choices(entry["question"], options) if options else entry["question"],
                answers, options=options, text=entry.get("text"),
                full_answer=entry.get("fullanswer"), label=label[1] if label else None, **shared)


SETS.update({
    "savebench": Set(savebench, "avsd", ("all", *SAVEBENCH), "github.com/bytedance/SALMONN, branch "
                     "videosalmonn, SAVEBench/ (the authors' later subsets)"),
})
