"""AVEB's official annotation files -> Records with the paper's prompts.  Sec. 4.1, Table 6.
     annotation file --SETS[name].read--> Record, Record, ...   media are looked for, never fetched
   One generator a set. It gets a Files, which knows where to look, and its docstring shows what the
   official files look like (rows are made up). What is absent or unusable is left out and counted;
   only an annotation file that is missing or has another shape is an error.
   Public: SETS, Set, Files, METRICS."""

import csv
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data import Record

# What a task is scored by (metrics.py), the paper's headline first.
METRICS = {
    "asr": ("wer", "wer_basic"), "ac": ("spider", "spice", "cider", "meteor"),
    "ic": ("cider", "meteor", "bleu4"),
    "ocr": ("textvqa_soft", "textvqa_equal", "textvqa_official", "answer_length"),
    "vqa": ("word_match", "acc_vqa", "answer_length"), "videoqa": ("choice", "choice_lenient"),
    "avsr": ("wer", "wer_basic"), "avsd": ("judged",), "isqa": ("isqa", "isqa_official"),
    "avssd": ("judged", "label_match"), "avm": ("word_match",),
    "favd": ("bleu1", "bleu4", "meteor"), "valor": ("meteor", "cider"),
    "caption": ("cider", "meteor")}


# ---------------------------------------- where files are, and what was found

def _size(path):
    """Bytes of a plain file; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):                 # ValueError: a name with a NUL
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _under(name, *folders):
    """Candidates: `name` in each of the folders, and without one."""
    return [*(f"{folder}/{name}" for folder in folders), name]


class Files:
    """One reading of one set: opens annotation files, looks for media in the `media` folders and
    `root`, and counts: paths {candidates: path, "missing" or "empty"}, dropped {reason: n},
    examples {reason: the first one}."""

    def __init__(self, name, root, split=None, media=()):
        if name not in SETS:
            raise ValueError(f"unknown set {name!r}; there are {', '.join(SETS)}")
        self.name, self.set = name, SETS[name]
        self.split = split or self.set.splits[0]
        if self.split not in self.set.splits:
            raise ValueError(f"{name} has no split {split!r}; there are "
                             f"{', '.join(self.set.splits)}")
        self.root = Path(os.path.abspath(root))
        self.folders = [*(Path(os.path.abspath(folder)) for folder in media), self.root]
        for folder in self.folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder}: no such folder")
        self.annotation, self.names = self.root, Counter()
        self.paths, self.dropped, self.examples, self.ids = {}, Counter(), {}, set()

    def records(self, **options):
        """The records, in the order of the annotation file."""
        written = 0
        try:
            for record in self.set.read(self, **options):
                written += 1
                yield record
        except (KeyError, TypeError, IndexError, AttributeError, csv.Error) as error:
            raise ValueError(f"{self.annotation}, after record {written}: not as expected "
                             f"({type(error).__name__}: {error}); {self._wanted()}") from error
        if not written and self.dropped:
            raise ValueError(f"{self.annotation}: nothing usable for {self.name} {self.split}, "
                             f"{self.report_dropped()}. Media were looked for below "
                             f"{', '.join(map(str, self.folders))} (--media names other folders); "
                             "test files without answers cannot be scored")
        if not written:
            raise ValueError(f"{self.annotation}: no entries for {self.name} {self.split}; "
                             f"{self._wanted()}")

    def _wanted(self):
        shape = " ".join((self.set.read.__doc__ or "").split())
        return f"wanted the official file: {shape} Get it from {self.set.source}"

    # ---- annotation files

    def all(self, *patterns):
        """Files that match the first pattern with any, in the root or two folders further down."""
        for pattern in patterns:
            for deeper in ("", "*/", "*/*/"):
                if hits := sorted(self.root.glob(deeper + pattern)):
                    return hits
        return []

    def find(self, *names):
        """The first of the named annotation files."""
        if not (hits := self.all(*names)):
            raise FileNotFoundError(f"{self.root}: no {' or '.join(names)} there or two folders "
                                    f"further down; get it from {self.set.source}")
        self.annotation = hits[0]
        return hits[0]

    def json(self, kind, *names):
        """The parsed file, a `kind` (dict or list)."""
        path = self.find(*names)
        if not _size(path):
            raise ValueError(f"{path}: empty (0 bytes); {self._wanted()}")
        try:
            values = json.loads(path.read_bytes())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); {self._wanted()}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); cut off? {self._wanted()}") from None
        if not isinstance(values, kind):
            raise ValueError(f"{path}: holds a {type(values).__name__}, another project's version; "
                             f"{self._wanted()}")
        return values

    def optional_json(self, name):
        """The parsed file, or {} where it is not there."""
        return self.json(dict, name) if self.all(name) else {}

    def lines(self, path):
        """Each filled line as text; one that is not UTF-8 is left out and counted."""
        self.annotation, raw = path, path.read_bytes()
        if not raw.strip():
            self.drop("annotation file that is empty", path)
        for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            try:
                if text := line.decode("utf-8").rstrip("\r"):
                    yield text
            except UnicodeDecodeError:
                self.drop("line that is not UTF-8", f"{path}, line {number}")

    def rows(self, path, wanted, header=None):
        """csv rows as dicts that hold at least the wanted columns."""
        reader = csv.reader(line + "\n" for line in self.lines(path))
        header = header or next(reader, [])
        if absent := set(wanted) - set(header):
            raise ValueError(f"{path}: no column {', '.join(sorted(absent))}, its header is "
                             f"{','.join(header) or 'empty'}; {self._wanted()}")
        for row in reader:
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            else:
                self.drop(f"row without {len(header)} columns", f"{path}, line {reader.line_num}")

    # ---- media

    def look(self, *candidates):
        """The first candidate that is there, not counted; "empty" or "missing" where none is."""
        empty = False
        for name in candidates:
            for folder in self.folders:
                if size := _size(folder / name):
                    return str(folder / name)
                empty |= size == 0
        return "empty" if empty else "missing"

    @cached_property
    def _by_name(self):
        index = {}
        for top in self.folders:
            for folder, _, names in os.walk(top):
                for name in names:
                    index.setdefault(name, []).append(os.path.join(folder, name))
        return index

    def by_name(self, path):
        """The file of the same name wherever it lies below our folders, of several the one that
        agrees most with the end of `path`; `path`'s name where there is none."""
        parts = Path(path).parts[::-1]

        def agreement(found):
            return len(os.path.commonprefix([Path(found).parts[::-1], parts]))
        return max(sorted(self._by_name.get(parts[0], [])), key=agreement, default=parts[0])

    # ---- records

    def drop(self, reason, example):
        self.dropped[reason] += 1
        self.examples.setdefault(reason, str(example))

    def unique(self, name):
        """x, x.2, x.3 ... where a set gives several entries the same id."""
        self.names[name] += 1
        return name if self.names[name] == 1 else f"{name}.{self.names[name]}"

    def record(self, name, prompt, refs, target=None, task=None, metrics=None, image=(), video=(),
               audio=(), start=None, end=None, options=(), history=(), **meta):
        """One Record, or none: then the reason is counted. Media are lists of candidates; what is
        in `meta` and not None is kept there. name: the official id, made unique by our prefix."""
        refs = tuple(ref.strip() for ref in refs if ref.strip())
        media = {kind: tuple(map(str, names)) for kind, names in
                 (("image", image), ("video", video), ("audio", audio)) if names}
        for names in media.values():
            if names not in self.paths:                           # each file is looked for once
                self.paths[names] = self.look(*names)
        unusable = [n for n in media.values() if self.paths[n] in ("missing", "empty")]
        identity = f"{self.name}-{name}"
        if not refs or not prompt.strip():
            self.drop("record without an answer" if not refs else "record without a question", name)
        elif identity in self.ids:
            self.drop("record with an id that was there before", name)
        elif start is not None and not 0 <= start < end:
            self.drop("record with times that make no window", f"{name}, {start} to {end}")
        elif unusable:
            self.drop(f"record whose media file is {self.paths[unusable[0]]}", unusable[0][0])
        else:
            self.ids.add(identity)
            task = task or self.set.task
            about = {"dataset": self.name, "split": self.split, "original_id": str(name),
                     "metrics": list(metrics or self.set.metrics or METRICS[task]), **meta}
            yield Record(identity, task, prompt, refs[0] if target is None else target, refs=refs,
                         start=start, end=end, history=tuple(history),
                         options=tuple(option.strip() for option in options),
                         meta={key: value for key, value in about.items() if value is not None},
                         **{kind: self.paths[names] for kind, names in media.items()})

    def dialogue(self, name, turns, **rest):
        """One record a turn, with the (question, answer) turns before it as its history."""
        rest = {"original_id": name, **rest}
        for k, (question, answer) in enumerate(turns):
            yield from self.record(f"{name}-{k}", question, [answer], history=turns[:k],
                                   dialogue=name, turn=k, **rest)

    def count(self, state):
        """Media files that are "found", "missing" or "empty"."""
        states = [p if p in ("missing", "empty") else "found" for p in self.paths.values()]
        return states.count(state)

    def report_dropped(self):
        return "; ".join(f"{n} x {reason} (first: {self.examples[reason]})"
                         for reason, n in self.dropped.items())


# ---------------------------------------- speech and sound

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
                   for c in _under(name, files.split, "audio")],
            audiocap_ids=[row["audiocap_id"] for row in rows])


# ---------------------------------------- images

def llava(files):
    """llava_instruct_150k.json: [{"id":"000000000042","image":"000000000042.jpg","conversations":[
    {"from":"human","value":"<image>\\nWhat is shown?"},{"from":"gpt","value":"A cup."}, ...]}].
    COCO images: train2017/<image> or train2014/COCO_train2014_<image>."""
    for entry in files.json(list, "llava_instruct_150k.json"):
        said, image = entry["conversations"], entry["image"]
        name = files.unique(entry["id"])          # an image has up to three conversations
        if not said or [turn["from"] for turn in said] != ["human", "gpt"] * (len(said) // 2):
            files.drop("dialogue whose turns do not alternate", name)
            continue
        texts = [turn["value"].replace("<image>", "").strip() for turn in said]
        yield from files.dialogue(
            name, list(zip(texts[::2], texts[1::2], strict=True)), original_id=entry["id"],
            image=[*_under(image, "train2017"), f"train2014/COCO_train2014_{image}",
                   f"COCO_train2014_{image}"])


OCRVQA = {"train": 1, "val": 2, "test": 3}


def ocrvqa(files):
    """dataset.json: {"0123456789":{"imageURL":"http://x/y.jpg","questions":["Who wrote this?"],
    "answers":["A. Nobody"],"title":"T","split":1}}; images/<key>.jpg (or .gif, .png)."""
    for key, book in files.json(dict, "dataset.json").items():
        if book["split"] != OCRVQA[files.split]:
            continue
        if len(book["questions"]) != len(book["answers"]):
            files.drop("book with unequal numbers of questions and answers", key)
            continue
        suffixes = dict.fromkeys((os.path.splitext(book["imageURL"])[1], ".jpg", ".png", ".gif"))
        images = [c for suffix in suffixes for c in _under(key + suffix, "images")]
        for k, (asked, answer) in enumerate(zip(book["questions"], book["answers"], strict=True)):
            yield from files.record(f"{key}-{k}", asked, [answer], image=images, original_id=key)


def textvqa(files):
    """TextVQA_0.5.1_val.json: {"data":[{"question_id":1,"image_id":"0a1b","question":"what does the
    sign say?","answers":["stop", ... 10]}]}; images train_images/<image_id>.jpg, also for val.
    The test file has no answers."""
    folder = "test_images" if files.split == "test" else "train_images"
    for entry in files.json(dict, f"TextVQA_0.5.1_{files.split}.json")["data"]:
        answers = entry.get("answers", [])
        most = Counter(a.strip() for a in answers).most_common(1)
        yield from files.record(entry["question_id"], entry["question"], answers,
                                target=most[0][0] if most else "", image_id=entry["image_id"],
                                image=_under(f"{entry['image_id']}.jpg", folder))


def flickr30k(files):
    """dataset_flickr30k.json (Karpathy): {"images":[{"filename":"1000.jpg","split":"test",
    "sentences":[{"raw":"A cat."}]}]}; or flickr30k_test.json: [{"image":"flickr30k-images/1.jpg",
    "caption":[5 texts]}]; or results_20130124.token, lines '1000.jpg#0<TAB>A cat .' (split: all).
    flickr30k-images/<filename>."""
    path, captions = files.find("dataset_flickr30k.json", f"flickr30k_{files.split}.json",
                                "results_20130124.token"), {}
    if path.suffix == ".token":
        if files.split != "all":
            raise ValueError(f"{path}: does not say which images are {files.split}; take "
                             "dataset_flickr30k.json (Karpathy's split), or --split all")
        for line in files.lines(path):
            name, _, text = line.partition("\t")
            captions.setdefault(name.partition("#")[0], []).append(text)
    elif path.name == "dataset_flickr30k.json":
        for entry in files.json(dict, path.name)["images"]:
            if files.split in (entry["split"], "all"):
                captions[entry["filename"]] = [s["raw"] for s in entry["sentences"]]
    else:
        for entry in files.json(list, path.name):
            texts = entry["caption"]
            captions[Path(entry["image"]).name] = [texts] if isinstance(texts, str) else texts
    for name, texts in captions.items():
        yield from files.record(Path(name).stem, "Describe this image in one short sentence.",
                                texts, image=_under(name, "flickr30k-images", "Images"))


def gqa(files):
    """testdev_balanced_questions.json, by question id: {"20001":{"imageId":"n12345","question":
    "Is it raining?","answer":"no","fullAnswer":"No, it is dry.","types":{"structural":"verify"}}};
    images/<imageId>.jpg."""
    for key, entry in files.json(dict, f"{files.split}_questions.json").items():
        yield from files.record(key, entry["question"], [entry.get("answer", "")],
                                image=_under(f"{entry['imageId']}.jpg", "images"),
                                type=entry.get("types", {}).get("structural"),
                                full_answer=entry.get("fullAnswer"), image_id=entry["imageId"])


def textcaps(files):
    """TextCaps_0.1_train.json: {"data":[{"image_id":"0a1b","caption_str":"A sign that says stop.",
    "caption_id":7}]}, one entry a caption; train_images/<image_id>.jpg."""
    folder = "test_images" if files.split == "test" else "train_images"
    for entry in files.json(dict, f"TextCaps_0.1_{files.split}.json")["data"]:
        yield from files.record(entry.get("caption_id", entry["image_id"]), "Describe the image.",
                                [entry.get("caption_str") or ""], image_id=entry["image_id"],
                                image=_under(f"{entry['image_id']}.jpg", folder))


# ---------------------------------------- video questions

def msvdqa(files):
    """{train,val,test}_qa.json: [{"id":0,"video_id":12,"question":"what is a man doing?","answer":
    "cook"}]; youtube_mapping.txt, lines '<name> vid12'; YouTubeClips/<name>.avi, all silent."""
    names = {}
    for mapping in files.all("youtube_mapping.txt")[:1]:
        names = {line.split()[1]: line.split()[0] for line in files.lines(mapping)}
    for entry in files.json(list, f"{files.split}_qa.json"):
        number, question = entry["video_id"], entry["question"]
        stems = [names.get(f"vid{number}"), f"vid{number}", f"video{number}"]
        yield from files.record(
            entry["id"], f"In the video, {question.lower()}", [entry["answer"]],
            video=[c for stem in filter(None, stems) for suffix in ("avi", "mp4")
                   for c in _under(f"{stem}.{suffix}", "YouTubeClips")], video_id=number)


NEXTQA_TYPES = {"C": "causal", "T": "temporal", "D": "descriptive"}


def with_choices(question, options):
    """Multiple choice in the prompt, as in Table 6."""
    choices = "; ".join(option.strip() for option in options)
    return f"{question.rstrip(' ?')}? Choose one from: {choices}"


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
            video=[*_under(place, "NExTVideo", "videos"), f"{video}.mp4"])


def videochat(files):
    """videochat_instruct_11k.json: [{"video":"012345/1012345678.mp4","QA":[{"q":"Describe the clip
    in detail.","a":"..."}]}]; WebVid's <video>. Re-releases have an instruction "i" before q."""
    for entry in files.json(list, "videochat_instruct_11k.json"):
        turns = [(" ".join(filter(None, (turn.get("i"), turn["q"]))), turn["a"])
                 for turn in entry["QA"]]
        yield from files.dialogue(files.unique(Path(entry["video"]).stem), turns,
                                  original_id=entry["video"],
                                  video=_under(entry["video"], "WebVid", "videos"))


AVSD = {"val": "avsd_val.json", "train": "avsd_train.json", "dstc7-val": "val_set4DSTC7-AVSD.json",
        "dstc7-train": "train_set4DSTC7-AVSD.json", "dstc7-test": "test_set4DSTC7-AVSD.json"}


def avsd(files):
    """avsd_{train,val}.json of CVPR'19: {"AB1CD":{"data":[{"question":"Is he alone?","answer":
    "Yes."}, ...]}} (version 0.1: "data":{"<dialogue>":[...]}); or DSTC7's *_set4DSTC7-AVSD.json:
    {"dialogs":[{"image_id":"AB1CD","dialog":[{"question":"...","answer":"..."}]}]}.
    Charades_v1_480/AB1CD.mp4."""
    values, told = files.json(dict, AVSD[files.split]), []
    if files.split.startswith("dstc7"):
        told = [(d["image_id"], d["image_id"], d["dialog"]) for d in values["dialogs"]]
    else:
        for video, entry in values.items():
            if isinstance(entry["data"], dict):
                told += [(f"{video}-{key}", video, turns) for key, turns in entry["data"].items()]
            else:
                told.append((video, video, entry["data"]))
    for name, video, turns in told:
        said = [(t["question"], (t["answer"] or "").replace("__UNDISCLOSED__", "")) for t in turns]
        yield from files.dialogue(files.unique(name), said, original_id=video,
                                  video=_under(f"{video}.mp4", "Charades_v1_480"))


# ---------------------------------------- long videos, cut by times

def _narrations(video):
    """Sorted (seconds, text) of all passes; two annotators may write the same."""
    passes = [video] if "narrations" in video else [
        video[key] for key in sorted(video) if key.startswith("narration_pass")]
    told = {}
    for part in passes:
        for line in part.get("narrations") or []:
            text, time = line.get("narration_text", line.get("text")), line.get(
                "timestamp_sec", line.get("time"))
            if text and time is not None:
                told.setdefault((text, int(time)), (float(time), text))
    return sorted(told.values())


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
                video=_under(f"{uid}.mp4", "full_scale", "v2/full_scale", "v1/full_scale"),
                video_uid=uid, original_id=uid)


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
    said, videos = dict(line.partition(" ")[::2] for line in files.lines(texts)), {}
    for line in files.lines(segments):
        fields = re.fullmatch(r"(\S+)\s+(\S+)\s+(\d+\.?\d*)\s+(\d+\.?\d*)\s*", line)
        if not fields:
            files.drop("line that is no segment", line[:60])
        elif not said.get(fields[1]):
            files.drop("segment without text", fields[1])
        else:
            videos.setdefault(fields[2], []).append(fields.group(1, 3, 4))
    for youtube, parts in videos.items():
        for clip in _joined(parts) if merge else [[part] for part in parts]:
            start, end = clip[0][1], clip[-1][2]
            cut = f"{youtube}_{start}_{end}"
            whole = files.look(f"{cut}.mp4", f"videos/{cut}.mp4") in ("missing", "empty")
            yield from files.record(
                cut if merge else clip[0][0],
                "Transcribe the speech into text, paying attention to both audio and video.",
                [" ".join(said[name] for name, _, _ in clip)],
                video=_under(f"{youtube if whole else cut}.mp4", "videos"),
                start=float(start) if whole else None, end=float(end) if whole else None,
                segments=[name for name, _, _ in clip])


# ---------------------------------------- sound and picture

SOURCE = "What is the source of the sound?"


def vggss(files):
    """vggss.json: [{"file":"abcdefghijk_000030","class":"playing cello","bbox":[...]}];
    <file>.mp4 of VGGSound, 10 s. In the order of the ids: the authors' test clips are a prefix."""
    for entry in sorted(files.json(list, "vggss.json"), key=lambda entry: entry["file"]):
        yield from files.record(entry["file"], SOURCE, [entry["class"]], label=entry["class"],
                                video=_under(f"{entry['file']}.mp4", "video", "videos"))


def vggsound(files):
    """vggsound.csv without a header: abcdefghijk,30,"bird chirping, tweeting",train; or test.csv:
    abcdefghijk_000030.mp4,"label"; <youtube id>_<start, six digits>.mp4, 10 s."""
    path = files.find("vggsound.csv", *(["test.csv"] if files.split == "test" else []))
    header = ("youtube", "start", "label", "split") if path.name == "vggsound.csv" else (
        "file", "label")
    for row in files.rows(path, (), header):
        if row.get("split", files.split) != files.split:
            continue
        if "file" not in row and not row["start"].isdigit():
            files.drop("row whose start is no whole second", row["start"])
            continue
        name = row["file"].removesuffix(".mp4") if "file" in row else (
            f"{row['youtube']}_{int(row['start']):06d}")
        yield from files.record(name, SOURCE, [row["label"]], label=row["label"],
                                video=_under(f"{name}.mp4", "video", "videos"))


def spokencoco(files):
    """SpokenCOCO_{train,val}.json: {"data":[{"image":"val2014/COCO_val2014_000000000042.jpg",
    "captions":[{"text":"a cup on a table","uttid":"m1-H_42_1","wav":"wavs/val/0/m1-H_42_1.wav"}]
    }]}; images below the COCO folder. All match: aveb_speech.py avm makes the other half."""
    for entry in files.json(dict, f"SpokenCOCO_{files.split}.json")["data"]:
        for caption in entry["captions"]:
            yield from files.record(
                caption["uttid"], "Is the audio describing the image?", ["Yes"],
                text=caption["text"], image=_under(entry["image"], "coco"),
                audio=_under(caption["wav"], "SpokenCOCO"))


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
        clip = Path(key).stem
        sound = files.look(f"audios/{files.split}/{clip}.mp3")
        yield from files.record(
            key, "Describe the video and the audio in detail.", texts,
            video=[c for name in (f"{files.split}/{clip}.mp4", f"{clip}.mp4")
                   for c in _under(name, "videos")],
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
            video=[c for stem in _valor_names(name) for c in _under(f"{stem}.mp4", "videos")])


# ---------------------------------------- the authors' own later subsets

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
    media = {kind: [files.by_name(visual)]}
    if sound:
        names = [files.by_name(sound)]
        own = kind == "video" and Path(sound).stem == Path(visual).stem
        if kind == "video" and not own:
            names.append(files.by_name(str(Path(sound).with_suffix(".mp4"))))
        if not own or files.look(*names) not in ("missing", "empty"):
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
            shared = {"task": task, "metrics": METRICS[task], "original_id": Path(first).stem,
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


# ---------------------------------------- the table

@dataclass(frozen=True)
class Set:
    """splits: the paper's comes first. source: where, on which terms. options: of its reader."""
    read: Callable
    task: str
    splits: tuple
    source: str
    metrics: tuple = ()               # where they are not METRICS[task]
    options: tuple = ()

    @property
    def scored_by(self):
        return self.metrics or METRICS[self.task]


SETS = {
    "librispeech": Set(librispeech, "asr",
                       ("test", "train", "dev-clean", "test-other", "dev-other"),
                       "openslr.org/12, CC BY 4.0"),
    "audiocaps": Set(audiocaps, "ac", ("test", "train", "val"),
                     "github.com/cdjkim/audiocaps, dataset/, academic use; sound: YouTube"),
    "llava": Set(llava, "vqa", ("train",), "huggingface.co/datasets/liuhaotian/LLaVA-Instruct-"
                 "150K, CC BY-NC 4.0 and OpenAI's terms; images: COCO"),
    "ocrvqa": Set(ocrvqa, "ocr", ("train", "val", "test"), "ocr-vqa.github.io, no explicit licence",
                  metrics=("word_match",)),
    "textvqa": Set(textvqa, "ocr", ("val", "train", "test"),
                   "textvqa.org, CC BY 4.0; images: OpenImages, train_val_images.zip"),
    "flickr30k": Set(flickr30k, "ic", ("test", "val", "train", "all"),
                     "Karpathy's caption_datasets.zip; images by UIUC's form, non-commercial"),
    "gqa": Set(gqa, "vqa", ("testdev_balanced", "val_balanced", "train_balanced", "test_balanced"),
               "cs.stanford.edu/people/dorarad/gqa, questions1.2.zip, images.zip, CC BY 4.0"),
    "textcaps": Set(textcaps, "ic", ("train", "val", "test"),
                    "textvqa.org/textcaps, CC BY 4.0; TextVQA's images"),
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
    "savebench": Set(savebench, "avsd", ("all", *SAVEBENCH), "github.com/bytedance/SALMONN, branch "
                     "videosalmonn, SAVEBench/ (the authors' later subsets)"),
}
