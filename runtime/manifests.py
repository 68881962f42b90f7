"""Manifests of any size -> records in a known order.

     train.jsonl --Index.of: every line checked once--> where each line starts, and a few numbers
     manifests with weights --Corpus--> record(row), read from its line when it is needed
                                --Order(seed)--> the row of sample number g, directly for any g
Memory holds neither media nor texts, only 29 bytes per row.  The order depends on seed and epoch
alone, so a run can continue at any sample, on any number of processes.

Public: Index, Corpus, Order, split_weight, IMAGE, VIDEO, AUDIO."""

import hashlib
import json
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np

from data import HEAVIEST, parse_line, to_record
from runtime import cli
from runtime.hub import atomic

VERSION = 2                            # of the saved index and of the checks that a line passed
NO_META = {}
CHUNK = 1 << 24                        # bytes of a manifest that a worker checks at a time
IMAGE, VIDEO, AUDIO = 1, 2, 4          # bits of ROW's field `media`
ROW = np.dtype([("offset", "<u8"), ("clip", "<u4"), ("weight", "<f4"), ("answer", "<u4"),
                ("group", "<u4"), ("media", "u1")])
# What numpy, zipfile and json raise for a damaged index.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError,
           MemoryError, zipfile.BadZipFile, zlib.error)


class Index:
    """The rows of a manifest, whose every line is fit to be learned.

    rows: array (n,) of ROW: offset of the line in bytes, hash of the clip's name, meta["weight"]
    (default 1), characters of the target, number of the group, bits of the media it names.
    groups: list of (data set, task), by number.  content: hexadecimal hash of the whole file, the
    same wherever the file lies."""

    def __init__(self, path, rows, groups, content):
        self.path, self.rows, self.groups, self.file = Path(path), rows, groups, None
        self.content = content

    def __len__(self):
        return len(self.rows)

    def __getstate__(self):                       # an open file cannot be sent to a worker
        return self.__dict__ | {"file": None}

    def record(self, k):
        """Record number k, read from the file.  Raises ValueError when the file has changed."""
        if self.file is None:
            self.file = open(self.path, "rb")
        self.file.seek(int(self.rows["offset"][k]))
        line = self.file.readline()
        try:
            values = parse_line(line, "")
            same = _facts(values) == tuple(self.rows[["clip", "answer", "media"]][k])
        except ValueError:
            same = False
        if not same:
            raise ValueError(f"{self.path}, row {k + 1}: changed while it was in use; start again")
        return to_record(values, self.path.parent)

    @classmethod
    def of(cls, path, log=print):
        """The index of a manifest.  It is saved beside the manifest, where that is possible, so
        that it is made once.  Raises ValueError that names file and line of what is wrong."""
        path = Path(path)
        try:
            stat = path.stat()
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; wanted a JSONL manifest") from None
        # An edit can keep the size and give the old time back, but not the time of the inode.
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        file = path.with_name(path.name + ".index.npz")
        if file.exists() and (saved := _load(file, stamp, log)):
            return cls(path, *saved)
        found = rows, groups, content = _scan(path, stat.st_size)
        about = {"stamp": stamp, "groups": groups, "content": content}
        try:
            with atomic(file) as temporary:
                np.savez(temporary, rows=rows, about=json.dumps(about))
        except OSError as error:                         # a read-only folder, a full disk
            log(f"{file} could not be written ({error.strerror}); the next start checks the "
                "manifest again")
        return cls(path, *found)


def _load(file, stamp, log):
    """(rows, groups, content) of a saved index; None when it is of another state of the manifest,
    or damaged, which is told: it is made again."""
    try:
        with np.load(file, allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            if about["stamp"] != stamp:
                return None
            rows, groups = found["rows"], [(str(name), str(task)) for name, task in about["groups"]]
        if rows.dtype != ROW or not len(rows) or rows["group"].max() >= len(groups):
            raise ValueError("other rows than this program writes")
        return rows, groups, str(about["content"])
    except DAMAGED as error:
        log(f"{file} is damaged ({type(error).__name__}: {error}); it is made again")


def _facts(values):
    """-> hash of the last two parts of the clip's path, which survives a move of the data;
    characters of the target; bits of the media that it names."""
    clip = values.get("video") or values.get("image") or values.get("audio") or values["id"]
    clip = clip[clip.rfind("/", 0, max(0, clip.rfind("/"))) + 1:]
    media = IMAGE * ("image" in values) + VIDEO * ("video" in values) + AUDIO * ("audio" in values)
    return zlib.crc32(clip.encode()), len(values.get("target", "")), media


def _scan_chunk(span, path):
    """Lines that start in the bytes [start, end) -> their rows, hashes of their ids, groups, hash
    of these bytes; for a wrong line None, None, (offset, what is wrong), None."""
    start, end = span
    rows, ids, groups = [], [], {}
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        before, block = file.read(1) if start else b"\n", file.read(end - start)
        lines = (block if block.endswith(b"\n") else block + file.readline()).split(b"\n")
    after = start
    for k, line in enumerate(lines):
        offset, after = after, after + len(line) + 1
        if k == 0 and before != b"\n":                   # the previous span has this line
            continue
        if offset == 0 and line.startswith(b"\xef\xbb\xbf"):
            line, offset = line[3:], 3
        if not line.strip():
            continue
        try:
            values = parse_line(line, "LINE")
        except ValueError as error:
            return None, None, (offset, str(error)), None
        meta, name = values.get("meta", NO_META), values["id"].encode()
        weight = meta.get("weight", 1.0)
        if weight and "target" not in values:
            return None, None, (offset, "LINE: no target, which is the answer to learn; add it, or "
                                        "leave the record out with the weight 0 in meta"), None
        group = groups.setdefault((meta.get("dataset", "own"), values["task"]), len(groups))
        clip, answer, media = _facts(values)
        rows.append((offset, clip, weight, answer, group, media))
        ids.append(zlib.crc32(name) << 32 | zlib.adler32(name))
    table = np.empty(len(rows), ROW)
    for name, column in zip(ROW.names, zip(*rows, strict=True), strict=bool(rows)):
        table[name] = column
    return table, np.array(ids, np.uint64), list(groups), hashlib.sha256(block).digest()


def _scan(path, size):
    """Checks every line of a manifest of `size` bytes, a large one on all cores -> rows, groups,
    hash of the content."""
    spans = [(at, min(at + CHUNK, size)) for at in range(0, size, CHUNK)]
    workers = min(cli.cores(), len(spans)) if len(spans) > 3 else 1
    checked = cli.parallel(partial(_scan_chunk, path=path), spans, workers, chunk=1)
    parts, ids, groups, content = [], [], {}, hashlib.sha256()
    for rows, names, found, digest in cli.progress(checked, len(spans), f"checking {path}",
                                                   f"{CHUNK >> 20} MiB part"):
        if rows is None:
            offset, wrong = found
            raise ValueError(wrong.replace("LINE", f"{path}, line {_line_number(path, offset)}", 1))
        numbers = np.array([groups.setdefault(group, len(groups)) for group in found], "<u4")
        if len(rows):
            rows["group"] = numbers[rows["group"]]
        parts.append(rows)
        ids.append(names)
        content.update(digest)
    rows = np.concatenate(parts) if parts else np.zeros(0, ROW)
    if not len(rows):
        raise ValueError(f"{path}: no records; wanted at least one JSON object a line")
    _refuse_duplicates(path, rows, np.concatenate(ids))
    return rows, list(groups), content.hexdigest()


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
    if not 0 < weight <= HEAVIEST:
        raise ValueError(f"--data {text}: weight {weight}; wanted more than 0 and at most 1e6")
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
        if self.weights.max() > HEAVIEST:
            raise ValueError(f"weights of records times that of their manifest reach "
                             f"{self.weights.max():g}, which is above 1e6; lower them")
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
