"""Manifests of any size -> records in a known order.

     train.jsonl --Index.of, once, every line checked--> where each line starts, and a few numbers
     manifests with weights --Corpus--> record(row), one line read at a time
                                 --Order(seed)--> the row of sample number g, for any g at once
No media and no texts are held in memory: 27 bytes a row.  The order is a function of seed and epoch
alone, so a run goes on in the middle without replaying, on any number of processes.

Public: Index, Corpus, Order, split_weight."""

import json
import os
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from data import parse_line, to_record
from runtime import cli

VERSION = 1
CHUNK = 1 << 24                        # bytes of a manifest that one worker checks at a time
IMAGE, VIDEO, AUDIO = 1, 2, 4          # bits of `media`
ROW = np.dtype([("offset", "<u8"), ("clip", "<u4"), ("weight", "<f4"), ("answer", "<u4"),
                ("group", "<u2"), ("media", "u1")])


class Index:
    """rows (n,) of ROW: offset of the line, hash of the clip's name, meta["weight"] (default 1),
    characters of the target, number of the group, which media.  groups: (data set, task) by
    number."""

    def __init__(self, path, rows, groups):
        self.path, self.rows, self.groups, self.file = Path(path), rows, groups, None

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):                              # a file does not travel to a worker
        return self.__dict__ | {"file": None}

    def record(self, k):
        """Record number k, read from the file."""
        if self.file is None:
            self.file = open(self.path, "rb")
        self.file.seek(int(self.rows["offset"][k]))
        return to_record(parse_line(self.file.readline(), f"{self.path}, row {k + 1}"),
                         self.path.parent)

    @classmethod
    def of(cls, path, log=print):
        """The index of a manifest; kept beside it (where that can be written), so that it is made
        once.  ValueError names file and line of what is wrong."""
        path = Path(path)
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; wanted a JSONL manifest") from None
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
        kept = path.with_name(path.name + ".index.npz")
        if kept.exists():
            with np.load(kept, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                if about["stamp"] == stamp:
                    return cls(path, found["rows"], [tuple(g) for g in about["groups"]])
        rows, groups = _scan(path, stat.st_size, log)
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp.npz")
        try:
            np.savez(temporary, rows=rows, about=json.dumps({"stamp": stamp, "groups": groups}))
            os.replace(temporary, kept)
        except OSError as error:                         # a read-only folder, a full disk
            log(f"{kept} could not be written ({error.strerror}): the next start checks again")
            temporary.unlink(missing_ok=True)
        return cls(path, rows, groups)


def clip_hash(values):
    """Of the last two parts of the clip's path: the same where the data lies in another folder."""
    name = values.get("video") or values.get("image") or values.get("audio") or values["id"]
    return zlib.crc32("/".join(name.rsplit("/", 2)[-2:]).encode())


def _scan_chunk(span, path):
    """Lines that start in [start, end) -> their rows, hashes of their ids, groups.  Of a wrong line
    (offset, what is wrong)."""
    start, end = span
    rows, ids, groups = [], [], {}
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start and file.read(1) != b"\n":              # the line before ends here
            file.readline()
        while (offset := file.tell()) < end and (line := file.readline()):
            if offset == 0 and line.startswith(b"\xef\xbb\xbf"):
                line, offset = line[3:], 3
            if not line.strip():
                continue
            try:
                values = parse_line(line, "LINE")
            except ValueError as error:
                return None, None, (offset, str(error))
            meta, name = values.get("meta", {}), values["id"].encode()
            group = groups.setdefault((str(meta.get("dataset", "own")), values["task"]),
                                      len(groups))
            media = sum(bit for name, bit in (("image", IMAGE), ("video", VIDEO), ("audio", AUDIO))
                        if name in values)
            if not isinstance(weight := meta.get("weight", 1.0), (int, float)) or not weight >= 0:
                return None, None, (offset, f"LINE: weight {weight!r} in meta, wanted a number")
            rows.append((offset, clip_hash(values), weight,
                         len(values.get("target", "")), group, media))
            ids.append(zlib.crc32(name) << 32 | zlib.adler32(name))
    return np.array(rows, ROW), np.array(ids, np.uint64), list(groups)


def _scan(path, size, log):
    """Every line checked, on all cores where it is worth it -> rows, groups."""
    spans = [(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]
    workers = min(cli.cores(), len(spans)) if len(spans) > 3 else 1
    parts, ids, groups, started = [], [], {}, time.time()
    for done, (rows, names, found) in enumerate(
            cli.parallel(partial(_scan_chunk, path=path), spans, workers, chunk=1), 1):
        if rows is None:
            offset, wrong = found
            raise ValueError(wrong.replace("LINE", f"{path}, line {_line_number(path, offset)}", 1))
        there = np.array([groups.setdefault(group, len(groups)) for group in found], "<u2")
        if len(rows):
            rows["group"] = there[rows["group"]]
        parts.append(rows)
        ids.append(names)
        if len(spans) > 3 and (done % 4 == 0 or done == len(spans)):
            log(f"checking {path}: {100 * done // len(spans)} %, {sum(map(len, parts))} rows, "
                f"{time.time() - started:.0f} s")
    rows = np.concatenate(parts) if parts else np.zeros(0, ROW)
    if not len(rows):
        raise ValueError(f"{path}: no records; wanted at least one JSON object a line")
    _refuse_twice(path, rows, np.concatenate(ids))
    return rows, list(groups)


def _line_number(path, offset):
    with open(path, "rb") as file:
        return 1 + file.read(offset).count(b"\n")


def _refuse_twice(path, rows, ids):
    """Equal ids; equal hashes are looked up."""
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    with open(path, "rb") as file:
        def name(k):
            file.seek(int(rows["offset"][k]))
            return json.loads(file.readline())["id"]
        for k in same:
            first, second = sorted((order[k], order[k + 1]))
            if name(first) == name(second):
                lines = [_line_number(path, int(rows["offset"][n])) for n in (first, second)]
                raise ValueError(f"{path}, line {lines[1]}: id {name(first)!r} is taken by line "
                                 f"{lines[0]}; make ids unique")


# ---------------------------------------------------------------- several manifests
def split_weight(text):
    """'train.jsonl:0.5' -> ('train.jsonl', 0.5); without a weight 1."""
    path, colon, weight = text.rpartition(":")
    try:
        weight = float(weight) if colon else None
    except ValueError:
        weight = None
    if weight is None:
        return text, 1.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"--data {text}: weight {weight}; wanted more than 0")
    return path, weight


class Corpus:
    """The rows of several manifests behind each other.

    train, held_out: numbers of the rows to learn and of those of the clips held out (a share of all
    clips, the same in every run: no clip is on both sides).  weights: how often a row is drawn in
    an epoch: its manifest's weight times its own meta["weight"].  proportional "tokens": a manifest
    is drawn so that its share of the *answers' characters* is what its share of the rows would be;
    else sets of long answers (captions) outweigh those of short ones."""

    def __init__(self, manifests, val_share=0.0, proportional="samples", usable=None, log=print):
        self.indices = [Index.of(path, log) for path, _ in manifests]
        self.ends = np.cumsum([len(index) for index in self.indices])
        rows = {name: np.concatenate([index.rows[name] for index in self.indices])
                for name in ("clip", "weight", "answer", "media")}
        factors = np.array([weight for _, weight in manifests], np.float32)
        if proportional == "tokens":
            means = np.array([index.rows["answer"].mean() + 1 for index in self.indices])
            factors = factors * rows["answer"].mean() / means
        self.media = rows["media"]
        self.weights = rows["weight"] * np.repeat(factors, [len(i) for i in self.indices])
        good = self.weights > 0
        if usable is not None:
            good &= usable(self.media)
        held_out = rows["clip"] < val_share * 2 ** 32
        self.train = np.flatnonzero(good & ~held_out).astype(np.int32)
        self.held_out = np.flatnonzero(good & held_out).astype(np.int32)
        self.sound_only = self.train[self.media[self.train] == AUDIO]       # to pair pictures with

    def record(self, row):
        """Record of a row, read from its manifest."""
        k = int(np.searchsorted(self.ends, row, side="right"))
        return self.indices[k].record(row - (self.ends[k - 1] if k else 0))

    def records(self, rows):
        return [self.record(row) for row in rows]

    def mixture(self, before=None):
        """{data set: {task: rows to learn}}, added to what was learnt `before`."""
        found, offset = {name: dict(tasks) for name, tasks in (before or {}).items()}, 0
        for index in self.indices:
            mine = self.train[(self.train >= offset) & (self.train < offset + len(index))] - offset
            for number, n in Counter(index.rows["group"][mine].tolist()).items():
                name, task = index.groups[number]
                tasks = found.setdefault(name, {})
                tasks[task] = tasks.get(task, 0) + n
            offset += len(index)
        return found


class Order:
    """Sample number g of a run -> position in `weights`.  Each epoch holds each row as often as its
    weight says (fractions by lot), shuffled."""

    def __init__(self, weights, seed):
        if not len(weights):
            raise ValueError(
                "no training questions; lower --val-share, or look at what was skipped")
        self.weights, self.seed, self.ends, self.kept = np.asarray(weights), seed, [0], (None, None)

    def __call__(self, g):
        while g >= self.ends[-1]:
            times = self._times(len(self.ends) - 1)[1]
            if not times.any() and len(self.ends) > 1000:
                raise ValueError("the weights of --data are so small that epochs are empty")
            self.ends.append(self.ends[-1] + int(times.sum()))
        epoch = int(np.searchsorted(self.ends, g, side="right")) - 1
        return self.epoch(epoch)[g - self.ends[epoch]]

    def _times(self, epoch):
        rng = np.random.default_rng([self.seed, epoch])
        return rng, np.floor(self.weights + rng.random(len(self.weights))).astype(np.int32)

    def epoch(self, epoch):
        """The positions of one epoch, in order."""
        if self.kept[0] != epoch:
            rng, times = self._times(epoch)
            self.kept = epoch, rng.permutation(
                np.repeat(np.arange(len(times), dtype=np.int32), times))
        return self.kept[1]

    def epoch_of(self, g):
        """Which epoch sample g is in."""
        self(g)
        return int(np.searchsorted(self.ends, g, side="right")) - 1
