"""The number of a step -> this process's share of its batch, decoded ahead by worker processes.

     step --Order--> rows --Corpus--> records --decode, or cached features--> mix --> TrainItems
     samples --micro_batches--> parts of similar length, each of bounded memory
Sample g of the run belongs to process g mod world.  A clip that cannot be read leaves its place
empty, with the reason in its TrainItem.  No other sample moves, so none is lost or seen twice.

Public: TrainItem, TrainSet, load_ahead, worker_errors, default_workers, micro_batches, skip_rows,
SkippedLog."""

import dataclasses
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import data
from data import Sample
from runtime import cli
from runtime.log import JsonLines, rows_until


@dataclass
class TrainItem:
    """Sample number g of the run, or the reason why there is none.  cut: what max_seconds or
    the LLM's positions left out of its clip."""
    g: int
    id: str
    task: str
    sample: Sample | None = None
    reason: str = ""
    cut: str = ""


class TrainSet(Dataset):
    """train_set[k]: list of the TrainItems of step k that belong to process `rank` of `world`.

    rows: row numbers of `corpus` to learn; order: manifests.Order over them; mixing: data.Mixing;
    clip_options: those of data.load_clip; batch: samples per step, over all processes; cache: a
    FeatureCache, or None to decode each clip."""

    def __init__(self, corpus, rows, order, mixing, clip_options, batch, rank=0, world=1,
                 cache=None):
        self.corpus, self.rows, self.order, self.mixing = corpus, rows, order, mixing
        self.clip_options, self.cache = clip_options, cache
        self.batch, self.rank, self.world = batch, rank, world

    def __getitem__(self, step):
        first, end = step * self.batch + self.rank, (step + 1) * self.batch
        train_items = [self.load(g) for g in range(first, end, self.world)]
        if get_worker_info() is None:
            return train_items
        return [_convert(train_item, torch.Tensor.numpy) for train_item in train_items]

    def load(self, g):
        """TrainItem number g."""
        record = self.corpus.record(int(self.rows[self.order(g)]))
        train_item, features, clip = TrainItem(g, record.id, record.task), None, None
        if self.cache is not None:
            if reason := self.cache.reason(record):
                train_item.reason = reason
                return train_item
            features = self.cache.get(record)
        if features is not None:
            train_item.cut = self.cache.cut(record)
            prompt, target, features = data.mix(self.mixing, g, record, features, self.cached_sound)
            if prompt != record.prompt and features.visual is not None:
                features = None      # the visual Q-Former has to read the new question: decode
        if features is None:
            clip, train_item.reason, train_item.cut = self.decode(record)
            if clip is None:
                return train_item
            prompt, target, clip = data.mix(self.mixing, g, record, clip, self.decoded_sound)
        train_item.sample = Sample(prompt, target, clip, features, record.history,
                                   data.drawn_mask(self.mixing, g))
        return train_item

    def decode(self, record):
        """-> Clip or None, the reason why there is none, what max_seconds left out."""
        skipped = []
        clip = data.load_or_skip(record, skipped, **self.clip_options)
        return clip, "".join(reason for _, reason in skipped), clip.cut if clip else ""

    def sound_record(self, rng):
        pool = self.corpus.sound_only
        return self.corpus.record(int(pool[int(rng.integers(len(pool)))]))

    def cached_sound(self, rng):
        """A random record that is sound only, and its audio features; see data.mix."""
        record = self.sound_record(rng)
        features = self.cache.get(record)
        return record, None if features is None else features.audio

    def decoded_sound(self, rng):
        """A random record that is sound only, and its decoded sound; see data.mix."""
        record = self.sound_record(rng)
        return record, getattr(self.decode(record)[0], "audio", None)


def _convert(train_item, convert):
    """Converts the tensors of a TrainItem's clip to numpy arrays, or back.  Arrays travel from a
    worker by value.  Tensors would need shared memory, which is small in containers and leaves
    files behind when a run is killed."""
    clip = train_item.sample and train_item.sample.clip
    if not clip:
        return train_item
    parts = {name: convert(value) for name in ("frames", "audio")
             if (value := getattr(clip, name)) is not None}
    sample = dataclasses.replace(train_item.sample, clip=dataclasses.replace(clip, **parts))
    return dataclasses.replace(train_item, sample=sample)


def _start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # the main process handles Ctrl-C
    torch.set_num_threads(1)


def _unchanged(batch):
    return batch


def load_ahead(train_set, first, last, workers=0):
    """Yields train_set[first], ... train_set[last - 1].  With workers, each decodes two steps
    ahead."""
    if not workers:
        for step in range(first, last):
            yield train_set[step]
        return
    loader = DataLoader(train_set, batch_size=None, sampler=range(first, last), num_workers=workers,
                        prefetch_factor=2, collate_fn=_unchanged, worker_init_fn=_start_worker,
                        multiprocessing_context="spawn")
    for train_items in loader:
        yield [_convert(train_item, torch.from_numpy) for train_item in train_items]


@contextmanager
def worker_errors():
    """Raises SystemExit with advice when a worker dies.  It must enclose the whole loop, because
    PyTorch's SIGCHLD handler raises wherever the program happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"a worker that decodes clips died ({error}); it probably ran out of "
                         "memory: try fewer --workers. The same command continues from the last "
                         "checkpoint") from error


def default_workers(cache, processes_here):
    """0 with a feature cache; otherwise this machine's cores, shared by its processes."""
    return 0 if cache is not None else max(1, cli.cores() // max(1, processes_here) - 1)


def micro_batches(samples, length, frames, most=0, most_tokens=0, most_frames=0):
    """Samples -> list of parts of similar length, so that there is little padding.

    length(sample), frames(sample): its LLM positions and its video frames.  A part has at most
    `most` samples, `most_tokens` LLM positions with padding and `most_frames` frames (0: no limit).
    A sample that is above a limit alone becomes a part of its own."""
    parts, frames_here = [], 0
    for sample in sorted(samples, key=length, reverse=True):
        n = len(parts[-1]) + 1 if parts else 0
        if (not parts or most and n > most
                or most_tokens and n * length(parts[-1][0]) > most_tokens
                or most_frames and frames_here + frames(sample) > most_frames):
            parts.append([])
            frames_here = 0
        parts[-1].append(sample)
        frames_here += frames(sample)
    return parts


# ---------------------------------------------------------------- skipped.jsonl
def skip_rows(train_items, step):
    """TrainItems of a step -> rows of skipped.jsonl, for the clips that could not be read and for
    those that were cut."""
    return [{"step": step, "id": train_item.id, "reason": train_item.reason}
            for train_item in train_items if train_item.sample is None] + [
        {"step": step, "id": train_item.id, "cut": train_item.cut}
        for train_item in train_items if train_item.sample is not None and train_item.cut]


class SkippedLog:
    """skipped.jsonl: a row {"step", "id", "reason"} for each sample that could not be read, and
    {"step", "id", "cut"} for each that was cut.  Rows of an earlier start after step
    `first_step` are removed, because those steps run again.  str(): a summary for the log."""

    def __init__(self, path, first_step, main_process, log=print):
        self.path, self.rows = Path(path), [row for row in rows_until(path, first_step)
                                            if isinstance(row.get("id"), str)]
        self.file = JsonLines(self.path, log, first_step) if main_process else None

    def add(self, rows):
        self.rows += rows
        for row in rows if self.file else ():
            self.file.write(row)

    def __str__(self):
        lost = [row for row in self.rows if "reason" in row]
        clips = {row["id"]: row["reason"] for row in lost}
        cut = {row["id"] for row in self.rows if "cut" in row}
        examples = "; ".join(f"{name}: {why}" for name, why in [*clips.items()][:3])
        text = f"skipped {len(lost)} samples of {len(clips)} clips that cannot be read"
        text += f": {examples}" if clips else ""
        if cut:
            text += f"; {len(cut)} clips were cut (--max-seconds or the LLM's positions)"
        return text + (f" (all: {self.path})" if self.rows else "")
