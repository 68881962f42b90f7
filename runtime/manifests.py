"""Manifests of any size -> records in a known order.

     train.jsonl --Index.of: every line checked once--> where each line starts, and a few numbers
     manifests with weights --Corpus--> record(row), read from its line when it is needed
                                --Order(seed)--> the row of sample number g, directly for any g
Memory holds neither media nor texts, only 27 bytes per row.  The order depends on seed and epoch
alone, so a run can continue at any sample, on any number of processes.

Public: Index, Corpus, Order, split_weight, IMAGE, VIDEO, AUDIO."""

import json
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from data import parse_line, to_record
from runtime import cli
from runtime.hub import atomic

VERSION = 1
CHUNK = 1 << 24                        # bytes of a manifest that a worker checks at a time
IMAGE, VIDEO, AUDIO = 1, 2, 4          # bits of ROW's field `media`
ROW = np.dtype([("offset", "<u8"), ("clip", "<u4"), ("weight", "<f4"), ("answer", "<u4"),
                ("group", "<u2"), ("media", "u1")])


class Index:
    """The rows of a manifest.

    rows: array (n,) of ROW: offset of the line in bytes, hash of the clip's name, meta["weight"]
    (default 1), characters of the target, number of the group, bits of the media it names.
    groups: list of (data set, task), by number."""

    def __init__(self, path, rows, groups):
        self.path, self.rows, self.groups, self.file = Path(path), rows, groups, None

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):                       # an open file cannot be sent to a worker
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
        """The index of a manifest.  It is saved beside the manifest, where that is possible, so
        that it is made once.  Raises ValueError that names file and line of what is wrong."""
        path = Path(path)
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; wanted a JSONL manifest") from None
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
        file = path.with_name(path.name + ".index.npz")
        if file.exists():
            with np.load(file, allow_pickle=False) as found:
                about = json.loads(str(found["about"]))
                if about["stamp"] == stamp:
                    return cls(path, found["rows"], [tuple(g) for g in about["groups"]])
        rows, groups = _scan(path, stat.st_size)
        try:
            with atomic(file) as temporary:
                np.savez(temporary, rows=rows, about=json.dumps({"stamp": stamp, "groups": groups}))
        except OSError as error:                         # a read-only folder, a full disk
            log(f"{file} could not be written ({error.strerror}); the next start checks the "
                "manifest again")
        return cls(path, rows, groups)


def clip_hash(values):
    """Hash of the last two parts of the clip's path, so that it survives a move of the data."""
    name = values.get("video") or values.get("image") or values.get("audio") or values["id"]
    return zlib.crc32("/".join(name.rsplit("/", 2)[-2:]).encode())


def _scan_chunk(span, path):
    """Lines that start in the bytes [start, end) -> their rows, hashes of their ids, groups; for a
    wrong line None, None, (offset, what is wrong)."""
    start, end = span
    rows, ids, groups = [], [], {}
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start and file.read(1) != b"\n":              # the previous span has this line
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


def _scan(path, size):
    """Checks every line of a manifest of `size` bytes, a large one on all cores -> rows, groups."""
    spans = [(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]
    workers = min(cli.cores(), len(spans)) if len(spans) > 3 else 1
    checked = cli.parallel(partial(_scan_chunk, path=path), spans, workers, chunk=1)
    parts, ids, groups = [], [], {}
    for rows, names, found in cli.progress(checked, len(spans), f"checking {path}",
                                       f"{CHUNK >> 20} MiB part"):
        if rows is None:
            offset, wrong = found
            raise ValueError(wrong.replace("LINE", f"{path}, line {_line_number(path, offset)}", 1))
        numbers = np.array([groups.setdefault(group, len(groups)) for group in found], "<u2")
        if len(rows):
            rows["group"] = numbers[rows["group"]]
        parts.append(rows)
        ids.append(names)
    rows = np.concatenate(parts) if parts else np.zeros(0, ROW)
    if not len(rows):
        raise ValueError(f"{path}: no records; wanted at least one JSON object a line")
    _refuse_duplicates(path, rows, np.concatenate(ids))
    return rows, list(groups)


def _line_number(path, offset):
    with open(path, "rb") as file:
        return 1 + file.read(offset).count(b"\n")


def _refuse_duplicates(path, rows, ids):
    """Raises ValueError for two equal ids.  Only for equal hashes the ids themselves are read."""
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
    """'train.jsonl:0.5' -> ('train.jsonl', 0.5); the weight is 1 when it is not given."""
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
    """The rows of several manifests, one manifest after the other.

    manifests: [(path, weight)]; val_share: share of all clips to hold out; usable: media bits ->
    bool, which rows a model can take.
    train, held_out: numbers of the rows to learn, and of those whose clips are held out.  They are
    the same in every run, and no clip is in both.  weights: how often an epoch draws each row: its
    manifest's weight times its own meta["weight"].  proportional "tokens": a manifest's share
    counts characters of the answers instead of rows, so that long answers (captions) do not
    outweigh short ones."""

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
        self.sound_only = self.train[self.media[self.train] == AUDIO]     # partners of pictures

    def record(self, row):
        """Row number -> Record, read from its manifest."""
        k = int(np.searchsorted(self.ends, row, side="right"))
        return self.indices[k].record(row - (self.ends[k - 1] if k else 0))

    def records(self, rows):
        """Row numbers -> list of Record."""
        return [self.record(row) for row in rows]

    def mixture(self, before=None):
        """{data set: {task: number of rows to learn}}, added to those of `before`."""
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
    """order(g): position in `weights` of sample number g of a run.  Each epoch is shuffled and
    holds each row as often as its weight says; a fraction is drawn at random in each epoch."""

    def __init__(self, weights, seed):
        if not len(weights):
            raise ValueError(
                "no training questions; lower --val-share, or look at what was skipped")
        self.weights, self.seed, self.ends = np.asarray(weights), seed, [0]
        self.last = None, None                      # the newest epoch: its number, its positions

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
        if self.last[0] != epoch:
            rng, times = self._times(epoch)
            self.last = epoch, rng.permutation(
                np.repeat(np.arange(len(times), dtype=np.int32), times))
        return self.last[1]
