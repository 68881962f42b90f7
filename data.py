"""Manifests and media files -> what the model takes.  Paper Sec. 4.1: 2 frames/s, 16 kHz; Sec. 4.3.

     manifest.jsonl --read_manifest--> Record      one question about one clip; a line of JSON
     Record --load_clip--> Clip                    frames (F,3,224,224), sound (S,), decoded
     Record + Clip --mix--> prompt, target, Clip   training only: pairs and matching questions
     prompt + Clip -------> Sample                 one row of a batch
   The decoder itself is runtime/media.py.

   Public: Record, read_manifest, write_manifest, check_record, parse_line, to_record,
   find_manifest, HEAVIEST; Clip, Features, Sample, load_clip, clip_from_path, load_or_skip,
   report_skipped; Mixing, drawn_mask, mix."""

import dataclasses
import json
import math
import os
import re
import reprlib
import sys
import warnings
from dataclasses import MISSING, dataclass, field, fields
from difflib import SequenceMatcher
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from runtime.hub import unique_keys, write_text
from runtime.media import AUDIO_RATE, MediaError, probe, read_audio, read_frames, read_image
from vit_qformer import resize, resize_plain

# ---------------------------------------- records

@dataclass(frozen=True)
class Record:
    """One question about one clip: a line of a manifest.  image, video and audio are paths; the
    sound of a video comes from the video file unless `audio` names another one.  start and end are
    seconds of the source file; None means from its beginning and to its end."""
    id: str
    task: str
    prompt: str
    target: str | None = None
    image: str | None = None
    video: str | None = None
    audio: str | None = None
    start: float | None = None
    end: float | None = None
    refs: tuple = ()                  # all right answers, for scoring
    options: tuple = ()               # multiple choice
    history: tuple = ()               # (question, answer) turns before this one
    meta: dict = field(default_factory=dict)


MEDIA = ("image", "video", "audio")
NEEDED = {f.name for f in fields(Record)
          if f.default is MISSING and f.default_factory is MISSING}
LATEST = 1e9                          # seconds, about 31 years: more is a mistake
ROUNDED = 0.0015                      # seconds by which files that count milliseconds are inexact
HEAVIEST = 1e6                        # largest weight of a record or a manifest
LARGEST = sys.float_info.max
DEEPEST = 20                          # lists and objects inside each other


def _text(x):
    return isinstance(x, str) and x != ""


def _any_text(x):
    return isinstance(x, str)


def _number(x, most):       # Python counts True as an int, and its JSON reader accepts NaN
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x <= most


def _any_plain(x):
    return isinstance(x, (str, int, float)) and not _unfit(x)


def _texts(x):
    return isinstance(x, (list, tuple)) and {*map(type, x)} <= {str}


def _turns(x):
    return isinstance(x, (list, tuple)) and all(_texts(t) and len(t) == 2 for t in x)


WANTED = {  # field: (whether a value fits, what an error says is wanted)
    **dict.fromkeys(("id", "task"), (_text, "a string")),
    **dict.fromkeys(("prompt", "target"), (_any_text, "a string")),
    **dict.fromkeys(MEDIA, (_text, "a string")),
    **dict.fromkeys(("start", "end"), (partial(_number, most=LATEST), "seconds from 0 to 1e9")),
    **dict.fromkeys(("refs", "options"), (_texts, "a list of strings")),
    "history": (_turns, "a list of [question, answer]"),
    "meta": (lambda x: isinstance(x, dict), "an object")}

META = {  # the same for the keys of meta that a program reads; others may hold anything
    "weight": (partial(_number, most=HEAVIEST), "a number from 0 to 1e6"),
    "chance": (partial(_number, most=1), "a number from 0 to 1"),
    "metrics": (_texts, "a list of names"),
    **dict.fromkeys(("dataset", "type", "label", "source"), (_any_text, "a string")),
    **dict.fromkeys(("dialogue", "one_window"), (_any_plain, "a text, a number, true or false"))}
# Those that are texts are checked at once, without a call: a manifest may have millions of lines.
TEXTS = {name for name, (_, wanted) in WANTED.items() if wanted == "a string"}
META_TEXTS = {name for name, (_, wanted) in META.items() if wanted == "a string"}


@lru_cache(maxsize=10_000)
def misspelt(key):
    """The key of META for which `key` is probably a typing error: 'metric' -> 'metrics'; or "".
    Compounds of such a key (sample_weight, dialogue_id) are names of their own, and so is a key
    like "labels" with a list, which none of META's but "metrics" takes (_check_meta)."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+|[0-9]+", str(key))
    letters = "".join(words).lower()
    if key in META or len(words) > 1 and META.keys() & {word.lower() for word in words}:
        return ""
    for name in META:
        right = name.replace("_", "")
        if sorted(letters) == sorted(right) or letters[:1] == right[:1] and (
                SequenceMatcher(None, letters, right).ratio() > 0.8):
            return name
    return ""


def check_values(values, where):
    """Parsed line of a manifest -> the same dict without fields that are null.  Raises a ValueError
    that starts with `where` and says which value is wrong."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a {type(values).__name__}, wanted one object per line")
    if None in values.values():
        values = {name: value for name, value in values.items() if value is not None}
    if not NEEDED <= values.keys() <= WANTED.keys():
        missing = [name for name in WANTED if name in NEEDED - values.keys()]
        wrong = [f"{label} {', '.join(names)}" for label, names in (
            ("missing", missing), ("unknown", sorted(set(values) - set(WANTED)))) if names]
        raise ValueError(f"{where}: {' and '.join(wrong)}; the fields are {', '.join(WANTED)} "
                         "(anything else belongs in meta)")
    for name, value in values.items():
        if value.__class__ is str and value and name in TEXTS:
            continue
        fits, wanted = WANTED[name]
        if not fits(value):
            raise ValueError(f"{where}: {name} is {reprlib.repr(value)}, wanted {wanted}; "
                             "correct it")
    if "end" in values and values["end"] <= values.get("start", 0):
        raise ValueError(f"{where}: end {values['end']} is not after start "
                         f"{values.get('start', 0)}; wanted seconds of the source file; correct it")
    if "image" in values and "video" in values:
        raise ValueError(f"{where}: has an image and a video; use only one of the two")
    if "meta" in values and (meta := _check_meta(values["meta"], where)) is not values["meta"]:
        return values | {"meta": meta}
    return values


def _check_meta(meta, where):
    """The same without the keys of META that are null."""
    nulls = False
    for key, value in meta.items():
        if value.__class__ is str and key in META_TEXTS:
            continue
        if key in META:
            fits, wanted = META[key]
            nulls |= value is None
            if value is not None and not fits(value):
                raise ValueError(f"{where}: {key} {reprlib.repr(value)} in meta, wanted {wanted}; "
                                 "correct it")
        elif (name := misspelt(key)) and (name == "metrics" or not isinstance(value, (list, dict))):
            raise ValueError(f"{where}: {key!r} in meta looks like a typing error of {name!r}; "
                             "correct it, or give the key a name that is less like it")
        elif value.__class__ is not str and (wrong := _unfit(value, depth=2)):
            raise ValueError(f"{where}: {key} in meta: {wrong}; correct it")
    return {k: v for k, v in meta.items() if v is not None or k not in META} if nulls else meta


def _unfit(value, depth=0):
    """What a manifest may not hold, in words; "" if nothing in `value` is of that kind.  depth: how
    many lists and objects `value` is in."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "a text holds half a character (a lone surrogate), which no file can hold"
        return "a text holds the character NUL" if "\0" in value else ""
    if isinstance(value, (int, float)):
        return "" if abs(value) <= LARGEST else "a number is not finite, or larger than a float"
    if isinstance(value, (dict, list, tuple)):
        if depth == DEEPEST:
            return f"lists and objects are nested more than {DEEPEST} deep"
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            if wrong := _unfit(part, depth + 1):
                return wrong
        return ""
    return "" if value is None else f"a {type(value).__name__} is no value of JSON"


JSON = json.JSONDecoder(object_pairs_hook=unique_keys)


def check_record(record, where):
    """Raises a ValueError that starts with `where` for what read_manifest would refuse."""
    if wrong := _unfit(check_values(vars(record), where)):
        raise ValueError(f"{where}: {wrong}; correct it")


def parse_line(line, where):
    """Bytes of one line -> checked dict.  Raises a ValueError that starts with `where`."""
    try:
        text = line.strip().decode("utf-8")
        values, end = JSON.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        # Only an escape can make a NUL or half a character: UTF-8 and JSON forbid them otherwise.
        wrong = b"\\u" in line and _unfit(values)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); wanted one object per line") from None
    except RecursionError:
        wrong = f"lists and objects are nested more than {DEEPEST} deep"
    except ValueError as error:                          # of unique_keys, or of int()
        wrong = error
    if wrong:
        raise ValueError(f"{where}: {wrong}; correct it")
    return check_values(values, where)


def to_record(values, folder):
    """Checked dict -> Record.  Media paths are relative to `folder`, unless they are absolute."""
    values = dict(values)
    for name in values.keys() & {"refs", "options"}:
        values[name] = tuple(values[name])
    if "history" in values:
        values["history"] = tuple(tuple(turn) for turn in values["history"])
    for name in values.keys() & set(MEDIA):
        values[name] = str(Path(folder) / values[name])
    return Record(**values)


def read_manifest(path, check=lambda record: ""):
    """JSONL file -> list of Record.  All lines are checked; a ValueError names file and line.
    check(record) may say in words what else is wrong with one."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; wanted a JSONL manifest") from None
    records, first_line = [], {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        record = to_record(parse_line(line, where), Path(path).parent)
        if record.id in first_line:
            raise ValueError(f"{where}: id {record.id!r} is taken by line {first_line[record.id]}; "
                             "make ids unique")
        if wrong := check(record):
            raise ValueError(f"{where}: {record.id}: {wrong}")
        first_line[record.id] = number
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no records; wanted at least one JSON object a line")
    return records


def write_manifest(path, records):
    """list of Record -> JSONL file, written atomically.  Fields at their default are left out.
    Paths below the manifest's folder become relative to it, so that the folder can be moved.
    Raises ValueError for what read_manifest would refuse."""
    folder, lines, seen = Path(os.path.abspath(path)).parent, [], set()
    for record in records:
        where = f"{path}, record {record.id!r}"
        check_record(record, where)
        if record.id in seen:
            raise ValueError(f"{where}: this id is written twice; make ids unique")
        seen.add(record.id)
        values = {n: v for n, v in vars(record).items() if v is not None and v != () and v != {}}
        for name in values.keys() & set(MEDIA):
            media = Path(os.path.abspath(values[name]))
            inside = media.is_relative_to(folder)
            values[name] = str(media.relative_to(folder) if inside else media)
        lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    if not lines:
        raise ValueError(f"{path}: no records to write; an empty manifest would not read back")
    write_text(path, "".join(lines))


def find_manifest(path, split):
    """Path of a manifest: `path` itself when it is a .jsonl file, otherwise <path>/<split>.jsonl.
    Raises ValueError when there is no such file."""
    path = Path(path)
    manifest = path if path.suffix == ".jsonl" else path / f"{split}.jsonl"
    if not manifest.is_file():
        raise ValueError(
            f"{manifest}: no such manifest; name a .jsonl file or a folder with {split}.jsonl "
            "(python -m miniature make --out FOLDER makes the miniature)")
    return manifest


# ---------------------------------------- clips

@dataclass
class Clip:
    """The decoded media of one record.  A record without media has neither frames nor sound."""
    frames: torch.Tensor | None = None        # uint8 (F,3,224,224), or floats; an image is F = 1
    audio: torch.Tensor | None = None         # float32 (S,), 16 kHz
    is_image: bool = False
    fps: float = 2.0
    cut: str = ""                             # describes what max_seconds left out
    times: tuple = ()                         # seconds of the frames, from the clip's start

    @property
    def seconds(self):
        """Length of picture or sound, whichever is longer; an image has no length of its own."""
        picture = 0 if self.frames is None or self.is_image else len(self.frames) / self.fps
        return max(picture, 0 if self.audio is None else len(self.audio) / AUDIO_RATE)


@dataclass
class Features:
    """Output of the frozen encoders for one clip and one question; either part may be None."""
    visual: torch.Tensor | None = None       # (F,V,D_v)
    audio: torch.Tensor | None = None        # (S,D_a)
    is_image: bool = False
    times: tuple = ()                        # seconds of the frames, for a prompt that tells them


@dataclass
class Sample:
    """One row of a batch: a question about a clip (or about its cached features) and the answer.
    history: (question, answer) turns before it.  mask: "audio", "visual" or "both" replaces that
    modality by zeros (Tables 2 and 3)."""
    prompt: str
    target: str | None = None
    clip: Clip | None = None
    features: Features | None = None
    history: tuple = ()
    mask: str | None = None


def load_clip(record, fps=2.0, size=224, frame_times="regular", max_seconds=None, antialias=True,
              resample="bicubic", sound_only=False, n_frames=0):
    """Record -> Clip.  start, end and max_seconds apply to the video, to its sound and to an audio
    file.  The sound of a video is cut where its picture ends; a silent video gives audio None.
    fps: video frames per second; frame_times: "regular", or "ends" as in the authors' code; size:
    pixels; antialias=False resizes video frames as the authors' code does; resample: "bicubic", or
    "bilinear" as some visual encoders were trained; sound_only: pictures are not read, for models
    that cannot see; n_frames: instead of fps, so many frames at equal distances.  If only the
    picture of a video or only the sound cannot be read, the clip has the other one, and a warning
    says why.
    Raises MediaError for a file that cannot be read, and when nothing of the clip can."""
    start, end = record.start or 0.0, record.end
    if max_seconds:
        end = min(math.inf if end is None else end, start + max_seconds)
    clip = Clip(is_image=record.image is not None, fps=2.0 if frame_times == "ends" else fps)
    if record.image is not None and record.video is not None:
        raise ValueError(f"record {record.id!r} has an image and a video; use only one of the two")
    if record.image is not None and not sound_only:
        clip.frames = read_image(record.image, partial(resize, size=size, mode=resample))
    failed, late = [], 0.0
    media = None if record.video is None else probe(record.video)
    if n_frames and media and media.seconds > start:
        last = media.seconds if end is None else min(end, media.seconds)
        fps = clip.fps = n_frames / (last - start)
        late = min(ROUNDED, (last - start) / 64)
    if media and not sound_only:
        shrink = (partial(resize, size=size, mode=resample) if antialias
                  else partial(resize_plain, size=size))
        try:
            clip.frames, times = read_frames(record.video, shrink, fps, start + late, end,
                                             frame_times)
            clip.times = tuple(max(0.0, time - start) for time in times)
        except MediaError as error:
            if media.kind != "video":                                  # the record names it wrongly
                raise
            failed.append(error)
    source = record.audio or (record.video if media and media.has_audio else None)
    if source:
        if record.audio is None and not failed:                        # until the picture ends
            end = min((seconds for seconds in (media.seconds, end) if seconds), default=None)
        try:
            clip.audio = read_audio(source, start, end)
        except MediaError as error:
            if not probe(source).has_audio:                            # the record names it wrongly
                raise
            failed.append(error)
    if failed and clip.frames is None and clip.audio is None:
        raise failed[0]
    for error in failed:
        warnings.warn(f"{error}; used without {'sound' if clip.audio is None else 'pictures'}",
                      stacklevel=2)
    clip.cut = _cut(record, clip, max_seconds)
    if clip.cut:
        warnings.warn(f"{record.video or record.audio}: {clip.cut}", stacklevel=2)
    return clip


def _cut(record, clip, most):
    """'the first 300 of 10800.0 s are read' when max_seconds (`most`) cut the clip, else ''."""
    path, start = record.video or record.audio, record.start or 0.0
    if not most or not path or clip.seconds < most - 0.5:
        return ""
    ends = [end for end in (probe(path).seconds, record.end) if end]
    left = min(ends, default=0.0) - start
    return f"the first {most:g} of {left:.1f} s are read" if left > most + 0.5 else ""


def clip_from_path(path, audio=None, start=None, end=None, **options):
    """Path of a video, sound or image file -> Clip; the content decides which of them it is.
    audio: path of other sound for a video or an image; options: those of load_clip.
    Raises MediaError for a file that cannot be read."""
    kind = probe(path).kind
    if kind == "audio" and audio is not None:
        raise MediaError(f"{path}: sound only, and audio={audio} is sound too; pass one of them")
    media = {"audio": audio, kind: str(path)}
    return load_clip(Record(str(path), "", "", start=start, end=end, **media), **options)


def load_or_skip(record, skipped, **options):
    """load_clip, or None for a file that cannot be read; then (id, reason) is appended to the list
    `skipped`."""
    try:
        return load_clip(record, **options)
    except MediaError as error:
        skipped.append((record.id, str(error)))


def report_skipped(skipped, total):
    """A line for the log: how many of `total` were skipped, and the first three reasons."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"skipped {len(skipped)} of {total}" + (f": {reasons}{more}" if skipped else "")


# ---------------------------------------- mixing: Sec. 4.3

# The paper names these forms, but not their probabilities; the authors' later loader has the same
# forms.  Every random choice depends only on the seed and on the number of the sample, so that it
# is the same in any run and in any process.

MATCH_PROMPTS = ("Is the audio compatible with the video?",
                 "Are the audio and the video from the same source?",
                 "Is the audio related to the video?")


@dataclass(frozen=True)
class Mixing:
    """What training changes in a sample.  mask: what all samples lack ("audio", "visual" or "")."""
    seed: int = 0
    mask: str = ""
    mask_share: float = 0.0     # share of samples without sound, picture or both, a third each
    pair_share: float = 0.0     # share of pictures without sound that get another's
    join_share: float = 0.5     # share of those asked both questions; the others are asked one
    match_share: float = 0.0    # share of videos with sound asked whether the two match


def drawn_mask(mixing, g):
    """What sample number g lacks: mixing.mask; else "audio", "visual", "both" or mostly None."""
    if mixing.mask:
        return mixing.mask
    rng = np.random.default_rng([mixing.seed, 7, g])
    return (str(rng.choice(["audio", "visual", "both"])) if rng.random() < mixing.mask_share
            else None)


def joined(first, second):
    """'What is shown?', 'Describe the sound.' -> 'What is shown, and describe the sound.'"""
    return f"{first.rstrip(' .?!')}, and {second[:1].lower()}{second[1:]}"


def mix(mixing, g, record, parts, find_sound):
    """Sample number g of a run -> its prompt, target and parts (a Clip or Features).

    find_sound(rng) -> (record, sound) of a random record that is sound only; sound is of the kind
    that `parts` holds, or None when that record cannot be read.  Then the sample stays unchanged;
    the reason is reported when that record itself is drawn."""
    picture = parts.frames if isinstance(parts, Clip) else parts.visual
    unchanged = record.prompt, record.target, parts
    rng = np.random.default_rng([mixing.seed, 11, g])
    if picture is None or record.history:
        return unchanged
    if parts.audio is None and rng.random() < mixing.pair_share:
        other, sound = find_sound(rng)
        if sound is None:
            return unchanged
        parts = dataclasses.replace(parts, audio=sound)
        if rng.random() < mixing.join_share:
            where = "image" if record.image else "video"
            asked = [(f"In the {where}, {record.prompt[:1].lower()}{record.prompt[1:]}",
                      record.target), (other.prompt, other.target)]
            (one, a), (two, b) = asked if rng.random() < 0.5 else asked[::-1]
            return joined(one, two), joined(a, b), parts
        if rng.random() < 0.5:
            return other.prompt, other.target, parts               # the picture distracts
        return record.prompt, record.target, parts                 # the sound distracts
    if parts.audio is not None and record.video and rng.random() < mixing.match_share:
        prompt = MATCH_PROMPTS[int(rng.integers(len(MATCH_PROMPTS)))]
        if rng.random() < 0.5:
            return prompt, "Yes", parts
        other, sound = find_sound(rng)
        if sound is None:
            return unchanged
        return prompt, "No", dataclasses.replace(parts, audio=sound)
    return unchanged
