"""From a step's number to this process's share of its batch, decoded ahead by worker processes.

     step --Order--> rows --Corpus--> records --decode, or kept features--> mix --> list of TrainItem
     samples --micro_batches--> parts of like length, each of bounded memory
Sample g of the run belongs to process g mod world.  A clip that cannot be read leaves its place
empty and its reason in TrainItem: no other sample moves, so none is lost or seen twice.

Public: TrainItem, TrainSet, load_ahead, worker_errors, default_workers, micro_batches, notes_of, Skipped."""

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
from runtime import log as runlog
from runtime import mixing as mixes


@dataclass
class TrainItem:
    """Sample number g of the run, or why there is none; cut: what --max-seconds left out."""
    g: int
    id: str
    task: str
    sample: Sample | None = None
    reason: str = ""
    cut: str = ""


class TrainSet(Dataset):
    """steps[k]: this process's share of the batch of step k, a list of TrainItem.

    rows: those to learn; reading: options of data.load_clip; store: a FeatureCache or None."""

    def __init__(self, corpus, rows, order, mixing, reading, batch, rank=0, world=1, store=None):
        self.corpus, self.rows, self.order, self.mixing = corpus, rows, order, mixing
        self.reading, self.batch, self.rank, self.world = reading, batch, rank, world
        self.store = store

    def __getitem__(self, step):
        drawn = [self.draw(g) for g in range(step * self.batch + self.rank,
                                             (step + 1) * self.batch, self.world)]
        return [as_numpy(d) for d in drawn] if get_worker_info() else drawn

    def draw(self, g):
        record = self.corpus.record(int(self.rows[self.order(g)]))
        drawn = TrainItem(g, record.id, record.task)
        if self.store is not None and self.store.reason(record):
            drawn.reason = self.store.reason(record)
            return drawn
        kept = self.store.get(record) if self.store is not None else None
        if kept is not None:
            drawn.cut = self.store.cut(record)
            prompt, target, kept = mixes.mix(self.mixing, g, record, kept, self.kept_sound)
            if prompt != record.prompt and kept.visual is not None:
                kept = None                  # the Q-Former has to read this question: from the clip
        if kept is None:
            clip, drawn.reason, drawn.cut = self.decode(record)
            if clip is None:
                return drawn
            prompt, target, clip = mixes.mix(self.mixing, g, record, clip, self.decoded_sound)
        drawn.sample = Sample(prompt, target, clip if kept is None else None, kept, record.history,
                              mixes.drawn_mask(self.mixing, g))
        return drawn

    def decode(self, record):
        """-> Clip or None, the reason, what was cut."""
        skipped = []
        clip = data.load_or_skip(record, skipped, **self.reading)
        return clip, "".join(reason for _, reason in skipped), clip.cut if clip else ""

    def sound_record(self, rng):
        pool = self.corpus.sound_only
        return self.corpus.record(int(pool[int(rng.integers(len(pool)))]))

    def kept_sound(self, rng):
        """A record that is sound only, and its vectors."""
        record = self.sound_record(rng)
        found = self.store.get(record)
        return record, None if found is None else found.audio

    def decoded_sound(self, rng):
        """A record that is sound only, and its samples."""
        record = self.sound_record(rng)
        return record, getattr(data.load_or_skip(record, [], **self.reading), "audio", None)


def as_numpy(drawn):
    """Tensors -> arrays, which travel from a worker by value: shared memory is small in containers
    and leaves files behind when a run is killed."""
    clip = drawn.sample and drawn.sample.clip
    return drawn if not clip else dataclasses.replace(drawn, sample=dataclasses.replace(
        drawn.sample, clip=_converted(clip, torch.Tensor.numpy)))


def as_tensors(drawn):
    clip = drawn.sample and drawn.sample.clip
    return drawn if not clip else dataclasses.replace(drawn, sample=dataclasses.replace(
        drawn.sample, clip=_converted(clip, torch.from_numpy)))


def _converted(clip, convert):
    return dataclasses.replace(clip, **{name: convert(value) for name in ("frames", "audio")
                                        if (value := getattr(clip, name)) is not None})


def _start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C is the run's business
    torch.set_num_threads(1)


def _as_it_is(batch):
    return batch


def load_ahead(steps, first, last, workers=0):
    """Yields steps[first], ... steps[last - 1]; with workers, decoded two steps ahead by each."""
    if not workers:
        for step in range(first, last):
            yield steps[step]
        return
    loader = DataLoader(steps, batch_size=None, sampler=range(first, last), num_workers=workers,
                        prefetch_factor=2, collate_fn=_as_it_is, worker_init_fn=_start_worker,
                        multiprocessing_context="spawn")
    for drawn in loader:
        yield [as_tensors(d) for d in drawn]


@contextmanager
def worker_errors():
    """SystemExit where a worker dies.  PyTorch's handler of SIGCHLD raises wherever the program is,
    so this belongs around the whole loop."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(f"a worker that decodes clips died ({error}); out of memory, mostly: try "
                         "fewer --workers. The same command goes on from the last checkpoint"
                         ) from error


def notes_of(drawn, step):
    """Lines of skipped.jsonl."""
    return [{"step": step, "id": d.id, "reason": d.reason} for d in drawn if d.sample is None] + [
        {"step": step, "id": d.id, "cut": d.cut} for d in drawn if d.sample is not None and d.cut]


class Skipped:
    """skipped.jsonl: a line for each sample that could not be read, {"step", "id", "reason"}, or
    that --max-seconds cut, {"step", "id", "cut"}; lines of steps after `first` are done again."""

    def __init__(self, path, first, main_process, say=print):
        self.path, self.lines = Path(path), list(runlog.read_rows(path, first))
        self.file = runlog.JsonLines(self.path, say, first) if main_process else None

    def add(self, rows):
        self.lines += rows
        for row in rows if self.file else ():
            self.file.write(row)

    def __str__(self):
        lost = [row for row in self.lines if "reason" in row]
        clips = {row["id"]: row["reason"] for row in lost}
        cut = {row["id"] for row in self.lines if "cut" in row}
        shown = "; ".join(f"{name}: {why}" for name, why in [*clips.items()][:3])
        text = (f"skipped {len(lost)} samples of {len(clips)} clips that cannot be read"
                + (f": {shown}" if clips else ""))
        return text + (f"; --max-seconds cut {len(cut)} clips" if cut else "") + (
            f" (all: {self.path})" if self.lines else "")


def default_workers(store, processes_here):
    """0 where features are kept; else the cores, shared by this machine's processes."""
    return 0 if store is not None else max(1, cli.cores() // max(1, processes_here) - 1)


def micro_batches(samples, length, frames, most=0, most_tokens=0, most_frames=0):
    """Samples -> parts of like length, so that little is padding and a part's memory is bounded:
    at most `most` samples, `most_tokens` LLM positions with the padding and `most_frames` frames
    (0: no limit; a single sample above a limit is a part of its own)."""
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
