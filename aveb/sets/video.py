"""Videos: questions, dialogues and descriptions."""

import re

from aveb.sets.common import SETS, Set, id_of, text_of, under, with_choices


def msvdqa(files):
    """{train,val,test}_qa.json: [{"id":0,"video_id":12,"question":"what is a man doing?","answer":
    "cook"}]; youtube_mapping.txt, lines '<name> vid12'; YouTubeClips/<name>.avi, all silent."""
    names = {}
    for mapping in files.all("youtube_mapping.txt")[:1]:
        names = {line.split()[1]: line.split()[0] for line in files.lines(mapping)}
    for entry in files.json(list, f"{files.split}_qa.json"):
        number, question = entry["video_id"], text_of(entry["question"]).lower()
        stems = [names.get(f"vid{number}"), f"vid{number}", f"video{number}"]
        yield from files.record(
            entry["id"], question and f"In the video, {question}", [entry["answer"]],
            video=[c for stem in filter(None, stems) for suffix in ("avi", "mp4")
                   for c in under(f"{stem}.{suffix}", "YouTubeClips")], video_id=number)


NEXTQA_TYPES = {"C": "causal", "T": "temporal", "D": "descriptive"}


def nextqa(files):
    """{train,val,test}.csv: video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4,
    answer is the number of the option; map_vid_vidorID.json {"2400000001":"0101/2400000001"};
    NExTVideo/0101/2400000001.mp4. Options are in the prompt of tests, not of training."""
    places = files.optional_json("map_vid_vidorID.json")
    letters = ("a0", "a1", "a2", "a3", "a4")
    path = files.find(f"nextqa/{files.split}.csv", f"{files.split}.csv")
    for row in files.rows(path, ("video", "question", "answer", "qid", "type", *letters)):
        options, video = [row[letter] for letter in letters], row["video"]
        right = [options[int(row["answer"])]] if row["answer"] in tuple("01234") else []
        asked, place = row["question"], f"{places.get(video, video)}.mp4"
        yield from files.record(
            f"{video}_{row['qid']}",
            asked if files.split == "train" else with_choices(asked, options), right,
            options=options, question=asked, type=NEXTQA_TYPES.get(row["type"][:1]),
            qtype=row["type"].replace("TP", "TN"),
            video=[*under(place, "NExTVideo", "videos"), f"{video}.mp4"])


def videochat(files):
    """videochat_instruct_11k.json: [{"video":"012345/1012345678.mp4","QA":[{"q":"Describe the clip
    in detail.","a":"..."}]}]; WebVid's <video>. Re-releases have an instruction "i" before q."""
    for entry in files.json(list, "videochat_instruct_11k.json"):
        turns = [(" ".join(filter(None, (turn.get("i"), turn["q"]))), turn["a"])
                 for turn in entry["QA"]]
        yield from files.dialogue(files.unique(id_of(entry["video"])), turns,
                                  original_id=entry["video"],
                                  video=under(entry["video"], "WebVid", "videos"))


AVSD = {"val": "avsd_val.json", "train": "avsd_train.json", "dstc7-val": "val_set4DSTC7-AVSD.json",
        "dstc7-train": "train_set4DSTC7-AVSD.json", "dstc7-test": "test_set4DSTC7-AVSD.json"}


def avsd(files):
    """avsd_{train,val}.json of CVPR'19: {"AB1CD":{"data":[{"question":"Is he alone?","answer":
    "Yes."}, ...]}} (version 0.1: "data":{"<dialogue>":[...]}); or DSTC7's *_set4DSTC7-AVSD.json:
    {"dialogs":[{"image_id":"AB1CD","dialog":[{"question":"...","answer":"..."}]}]}.
    Charades_v1_480/AB1CD.mp4."""
    values, dialogues = files.json(dict, AVSD[files.split]), []
    if files.split.startswith("dstc7"):
        dialogues = [(d["image_id"], d["image_id"], d["dialog"]) for d in values["dialogs"]]
    else:
        for video, entry in values.items():
            if isinstance(entry["data"], dict):
                dialogues += [(f"{video}-{key}", video, turns)
                              for key, turns in entry["data"].items()]
            else:
                dialogues.append((video, video, entry["data"]))
    for name, video, turns in dialogues:
        pairs = [(t["question"], text_of(t["answer"]).replace("__UNDISCLOSED__", ""))
                 for t in turns]
        yield from files.dialogue(files.unique(name), pairs, original_id=video,
                                  video=under(f"{video}.mp4", "Charades_v1_480"))


def _narrations(video):
    """Sorted (seconds, text) of all passes; two annotators may write the same."""
    passes = [video] if "narrations" in video else [
        video[key] for key in sorted(video) if key.startswith("narration_pass")]
    narrated = {}
    for part in passes:
        for line in part.get("narrations") or []:
            text, time = line.get("narration_text", line.get("text")), line.get(
                "timestamp_sec", line.get("time"))
            if text and isinstance(time, (int, float)):
                narrated.setdefault((text, int(time)), (float(time), text))
    return sorted(narrated.values())


def narration(text):
    """'#C C opens a box #unsure' -> 'The camera wearer opens a box.'"""
    text = re.sub(r"#\s*(c|o|unsure|summary)\b", " ", text, flags=re.IGNORECASE)
    for letter, person in (("C", "the camera wearer"), ("O", "another person")):
        text = re.sub(rf"(?<![\w-]){letter}(?![\w-])", person, text)
    text = " ".join(text.split()).strip(" .,")
    return text and f"{text[0].upper()}{text[1:]}."


def ego4d(files, window=30.0):
    """narration.json: {"<uid>":{"narration_pass_1":{"narrations":[{"timestamp_sec":3.3,
    "narration_text":"#C C opens a box"}]}}}; or all_narrations_redacted.json: {"videos":{"<uid>":
    {"narrations":[{"text":"#C C ...","time":3.3}]}}}; ego4d.json (optional) for the durations;
    full_scale/<uid>.mp4. Sentences are joined in windows of at most `window` s, from 1 s before the
    first to 1 s after the last; the paper had ChatGPT refine them, here they stay as written."""
    seconds = {video["video_uid"]: video.get("duration_sec")
               for video in files.optional_json("ego4d.json").get("videos", [])}
    values = files.json(dict, "narration.json", "all_narrations_redacted.json")
    for uid, video in values.get("videos", values).items():
        length, groups = seconds.get(uid) or float("inf"), []
        for time, text in _narrations(video):
            if time >= length:
                files.drop("narration after the end of its video", f"{uid}, {time} of {length} s")
            elif narration(text):
                if not groups or time - groups[-1][0][0] > window - 2:
                    groups.append([])
                groups[-1].append((time, narration(text)))
        for group in groups:
            start, end = max(0.0, group[0][0] - 1), min(group[-1][0] + 1, length)
            if len(group) < 2:
                files.drop("window with a single narration", f"{uid}, {start} s")
                continue
            yield from files.record(
                f"{uid}_{start:.2f}_{end:.2f}", "Describe the video in detail.",
                [" ".join(text for _, text in group)], start=round(start, 3), end=round(end, 3),
                video=under(f"{uid}.mp4", "full_scale", "v2/full_scale", "v1/full_scale"),
                video_uid=uid, original_id=uid)


SETS.update({
    "msvdqa": Set(msvdqa, "videoqa", ("train", "val", "test"), "github.com/xudejing/video-question-"
                  "answering; videos: MSVD's YouTubeClips.tar, research", metrics=("word_match",)),
    "nextqa": Set(nextqa, "videoqa", ("test", "val", "train"),
                  "github.com/doc-doc/NExT-QA, dataset/nextqa, MIT; videos: NExTVideo.zip"),
    "videochat": Set(videochat, "caption", ("train",), "github.com/OpenGVLab/InternVideo, "
                     "Data/instruction_data, no stated licence; videos: WebVid-10M (withdrawn)"),
    "avsd": Set(avsd, "avsd", tuple(AVSD), "video-dialog.com (avsd_*.json) or DSTC7; videos: "
                "AI2's Charades_v1_480.zip, non-commercial"),
    "ego4d": Set(ego4d, "caption", ("train",), "ego4d-data.org, signed licence, the ego4d client",
                 options=("window",)),
})
