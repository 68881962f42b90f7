"""What the readers of all data sets share: `Files`, which looks for a set's files and counts what
it finds, and `SETS`, the table that the other modules of this folder fill.

   A reader is a generator: it gets a Files and yields Records.  Its docstring shows what the
   official files look like (rows are made up); errors print it.  What is absent or unusable is left
   out and counted; only an annotation file that is missing or has another shape is an error.
   Public: SETS, Set, Files, under, with_choices."""

import csv
import json
import math
import os
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aveb.tasks import METRICS
from data import Record, check_record
from runtime.hub import unique_keys

SETS = {}                         # {name: Set}

# Downloaders choose containers as they like, so a clip is found by its id and any of these
# suffixes, in capitals or not.  The name in the annotations comes first, then the order here.
SUFFIXES = {kind: tuple(f".{suffix}" for suffix in suffixes.split()) for kind, suffixes in {
    "image": "jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif ppm",
    "video": "mp4 mkv webm avi mov m4v mpg mpeg mpe ts mts m2ts flv f4v wmv asf 3gp 3g2 ogv ogm "
             "vob mxf divx",
    "audio": "wav flac mp3 m4a opus ogg oga aac wma aif aiff aifc ac3 amr mka m4b weba mp2 au caf "
             "w64 wv"}.items()}
OWN = dict(SUFFIXES)
SUFFIXES["audio"] += SUFFIXES["video"]             # a clip is also a file of its sound
ANY_SUFFIX = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}


@dataclass(frozen=True)
class Set:
    """A data set.  splits: the paper's comes first.  source: where it is and its terms of use.
    metrics: what scores it, where that is not METRICS[task].  options: those of its reader."""
    read: Callable
    task: str
    splits: tuple
    source: str
    metrics: tuple = ()               # where they are not METRICS[task]
    options: tuple = ()

    @property
    def scored_by(self):
        return self.metrics or METRICS[self.task]


def _size(path):
    """Bytes of a plain file; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):                 # ValueError: a name with a NUL
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def id_of(name):
    """'v_ab.c.MP4' -> 'v_ab.c': the file's name without its folder and without the suffix of a
    clip, if it has one; accents in one form."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    return unicodedata.normalize("NFC", stem if suffix.lower() in ANY_SUFFIX else stem + suffix)


def text_of(value):
    """A text as it is, a number as a text; "" for anything else that stands where a text should."""
    if isinstance(value, str):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if number and math.isfinite(value) else ""


def rank(kind, path):
    """The place of a file's suffix among those of a kind, after them no suffix; -1: not a clip of
    this kind, such as a thumbnail, subtitles or a download that has not ended."""
    name = os.path.basename(path)
    suffix = "" if id_of(name) == unicodedata.normalize("NFC", name) else (
        os.path.splitext(name)[1].lower())
    order = (*SUFFIXES[kind], "")
    return order.index(suffix) if suffix in order else -1


def under(name, *folders):
    """Candidates: `name` in each of the folders, and without one."""
    return [*(f"{folder}/{name}" for folder in folders), name]


class Files:
    """One reading of one set: opens annotation files, looks for media in the `media` folders and
    `root`, and counts: paths {candidates: path, "missing" or "empty"}, dropped {reason: n},
    examples {reason: the first one}, doubles ["file, not: other files of this clip"]."""

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
        self.listed, self.doubles = {}, []

    def records(self, **options):
        """The records, in the order of the annotation file."""
        written = 0
        try:
            for record in self.set.read(self, **options):
                written += 1
                yield record
        except (LookupError, TypeError, AttributeError, ArithmeticError, csv.Error) as error:
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
            values = json.loads(raw := path.read_bytes(), object_pairs_hook=unique_keys,
                                parse_constant=lambda _: None)           # NaN: nothing is there
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); {self._wanted()}") from None
        except json.JSONDecodeError as error:
            why = "a web page?" if raw.lstrip()[:1] == b"<" else "cut off?"
            raise ValueError(f"{path}: not JSON ({error}); {why} {self._wanted()}") from None
        except (ValueError, RecursionError) as error:      # a key twice, endless digits or brackets
            raise ValueError(f"{path}: {error}; {self._wanted()}") from None
        if not isinstance(values, kind):
            raise ValueError(f"{path}: holds a {type(values).__name__}, another project's version; "
                             f"{self._wanted()}")
        return values

    def optional_json(self, name):
        """The parsed file, or {} where it is not there."""
        return self.json(dict, name) if self.all(name) else {}

    def lines(self, path, blank=False):
        """Each filled line as text; one that is not UTF-8 is left out and counted.  blank: "" for
        these and for empty lines, so that lines can be numbered."""
        self.annotation, raw = path, path.read_bytes()
        if not raw.strip():
            self.drop("annotation file that is empty", path)
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError(f"{path}: UTF-16; save it as UTF-8. {self._wanted()}")
        for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            try:
                text = line.decode("utf-8").rstrip("\r")
            except UnicodeDecodeError:
                self.drop("line that is not UTF-8", f"{path}, line {number}")
                text = ""
            if text or blank:
                yield text

    def rows(self, path, wanted, header=None):
        """csv rows as dicts that hold at least the wanted columns."""
        reader = csv.reader(line + "\n" for line in self.lines(path, blank=True))
        header = header or next(filter(None, reader), [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: a column stands twice in its header {','.join(header)}; "
                             f"{self._wanted()}")
        if absent := set(wanted) - set(header):
            raise ValueError(f"{path}: no column {', '.join(sorted(absent))}, its header is "
                             f"{','.join(header) or 'empty'}; {self._wanted()}")
        for row in filter(None, reader):
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            else:
                self.drop(f"row without {len(header)} columns", f"{path}, line {reader.line_num}")

    # ---- media

    def look(self, kind, *candidates):
        """The file of an image, video or audio (`kind`), not counted; "empty" or "missing" where
        none is.  The first candidate that is there; else the first whose id a file in the same
        folder has, with another suffix of this kind or with none."""
        paths = [folder / name for name in candidates for folder in self.folders]
        alike = [other for path in dict.fromkeys((path.parent, id_of(path)) for path in paths)
                 for other in self._alike(kind, *path)]
        empty = False
        for path in dict.fromkeys((*paths, *alike)):
            if size := _size(path):
                if others := [other.name for other in alike if other.parent == path.parent and
                              other != path and other.suffix.lower() in OWN[kind]]:
                    self.doubles.append(f"{path}, not: {', '.join(others)}")
                return str(path)
            empty |= size == 0
        return "empty" if empty else "missing"

    def _alike(self, kind, folder, name):
        """The files of a folder that have this id, in the order of SUFFIXES."""
        if folder not in self.listed:
            self.listed[folder] = found = defaultdict(list)
            try:
                for file in sorted(os.listdir(folder)):
                    found[id_of(file)].append(folder / file)
            except (OSError, ValueError):              # no such folder; a name with a NUL
                pass
        return sorted((path for path in self.listed[folder].get(name, ()) if rank(kind, path) >= 0),
                      key=lambda path: rank(kind, path))

    @cached_property
    def _by_id(self):
        index = defaultdict(list)
        for top in self.folders:
            for folder, _, names in os.walk(top):
                for name in names:
                    index[id_of(name)].append(os.path.join(folder, name))
        return index

    def by_name(self, kind, path):
        """The file with the id of `path` wherever it lies below our folders; `path`'s name where
        there is none.  Of several, those that are not empty come first, then those with the same
        suffix, then the one that agrees most with the folders of `path`."""
        parts = Path(path).parts[::-1]

        def order(found):
            return (not _size(found), os.path.basename(found) != parts[0],
                    -len(os.path.commonprefix([Path(found).parts[:-1][::-1], parts[1:]])),
                    rank(kind, found), found)
        files = [found for found in self._by_id.get(id_of(path), ()) if rank(kind, found) >= 0]
        return min(files, key=order, default=parts[0])

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
        refs, prompt = tuple(filter(None, (text_of(ref).strip() for ref in refs))), text_of(prompt)
        media = {kind: (kind, *map(str, names)) for kind, names in
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
            self.drop(f"record whose media file is {self.paths[unusable[0]]}", unusable[0][1])
        else:
            task = task or self.set.task
            about = {"dataset": self.name, "split": self.split, "original_id": str(name),
                     "metrics": list(metrics or self.set.metrics or METRICS[task]), **meta}
            made = Record(identity, task, prompt, refs[0] if target is None else target, refs=refs,
                          start=start, end=end, history=tuple(history),
                          options=tuple(text_of(option).strip() for option in options),
                          meta={key: value for key, value in about.items() if value is not None},
                          **{kind: self.paths[names] for kind, names in media.items()})
            try:
                check_record(made, name)
            except ValueError as error:
                return self.drop("record that no manifest can hold", error)
            self.ids.add(identity)
            yield made

    def dialogue(self, name, turns, **rest):
        """One record a turn, with the (question, answer) turns before it as its history."""
        rest = {"original_id": name, **rest}
        turns = [(text_of(question), text_of(answer)) for question, answer in turns]
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


def with_choices(question, options):
    """Multiple choice in the prompt, as in Table 6."""
    choices = "; ".join(text_of(option).strip() for option in options)
    return f"{text_of(question).rstrip(' ?')}? Choose one from: {choices}"
