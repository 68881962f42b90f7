"""What the readers of all data sets share: `Files`, which looks for a set's files and counts what
it finds, and `SETS`, the table that the other modules of this folder fill.

   A reader is a generator: it gets a Files and yields Records.  Its docstring shows what the
   official files look like (rows are made up); errors print it.  What is absent or unusable is left
   out and counted; only an annotation file that is missing or has another shape is an error.
   Public: SETS, Set, Files, under, with_choices."""

import csv
import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from aveb.tasks import METRICS
from data import Record

SETS = {}                         # {name: Set}


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


def under(name, *folders):
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


def with_choices(question, options):
    """Multiple choice in the prompt, as in Table 6."""
    choices = "; ".join(option.strip() for option in options)
    return f"{question.rstrip(' ?')}? Choose one from: {choices}"
