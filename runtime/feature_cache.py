"""Kept features: what the frozen encoders make of every clip and question, computed once.

     records --grouped by clip--> decode, ViT, Whisper once; Q-Former once a prompt --> fp16 on disk
     Record --media files' size and time, window--> key of the clip --prompt--> key of what is seen
     FOLDER/<hash of the encoders and of how clips are read>/<time>-<rank>.bin     the numbers
                                                            /<time>-<rank>.jsonl   a line an entry:
       {"clip": KEY, "image": false, "picture": true, "at": [offset, S, D_a]}      its sound, if any
       {"seen": KEY, "at": [offset, F, V, D_v]}     {"clip": KEY, "skipped": why}  not readable
Nothing is ever rewritten: each process that writes has a pack (the two files) of its own, and the
numbers are there before the line that tells of them.  So a run may be killed at any moment (at most
8 clips a worker are lost), and the next one goes on with what is missing; manifests that share
clips share their features.
Size: a 0.5 s frame takes V*D_v + A*D_a numbers, 5 kB in the tiny preset, 113 kB at full size.

Public: FeatureCache, keep_features."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import Features, MediaError, load_or_skip, probe, report_skipped
from runtime import cli, distributed, hub


def fingerprint(model, reading):
    """Hash of all that features depend on apart from the clip: system, reading rules, the encoders'
    files by size and time, and some of their weights' values (random ones, another dtype)."""
    parts = [model.system, sorted(reading.items()), model.config.audio_seconds]
    for source in (model.config.whisper, model.config.instructblip):
        root = Path(hub.local_source(source))
        files = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns]
                 for f in sorted(root.rglob("*")) if f.is_file()]
        parts.append(files or source)                          # from the Hub: its name
    whole = hashlib.sha256(json.dumps(parts).encode())
    for p in frozen_weights(model):
        few = p.detach().flatten()[::max(1, p.numel() // 16)].float().cpu().numpy()
        whole.update(f"{p.dtype} {[*p.shape]}".encode() + few.tobytes())
    return whole.hexdigest()[:16]


def frozen_weights(model):
    """Of the encoders.  InstructBLIP's Q-Former, which learns, is none of them."""
    parts = [getattr(model, name, None) for name in ("whisper", "visual")]
    return [p for part in parts if part is not None for p in part.parameters()
            if not p.requires_grad]


class FeatureCache:
    """get(record) -> Features.  folder None: in memory only."""

    def __init__(self, folder, model, reading=None, log=print):
        self.model, self.log, self.full = model, log, False
        self.reading = {**model.clip_options(), **(reading or {})}   # options of data.load_clip
        self.by_prompt = model.system == "favor"      # InstructBLIP keeps what its ViT has seen
        # where: (pack, offset, *shape), in memory the numbers themselves
        self.clips = {}      # key -> (where its sound is or None, is_image, has a picture); or why
        self.seen = {}       # key -> where                                   it cannot be read
        self.cuts = {}       # key -> what max_seconds left out of the clip
        self.stamps, self.packs, self.files, self.writing = {}, [], {}, None
        self.folder = None if folder is None else Path(os.path.abspath(folder))
        if self.folder:
            self.home = self.folder / fingerprint(model, self.reading)
            for path in sorted(self.home.glob("*.jsonl")):
                self._read_index(path)

    def __getstate__(self):
        """For a DataLoader's workers: they read (and have packs of their own), but fill nothing."""
        return {**vars(self), "model": None, "log": print, "files": {}, "writing": None}

    # ---- keys
    def _stamp(self, path):
        """Path, size and time of a media file, as it was when this cache first met it.  The path is
        relative to the folder, which may move together with the clips."""
        if path not in self.stamps:
            name = os.path.relpath(path, self.folder) if self.folder else os.path.abspath(path)
            stat = os.stat(path) if os.path.exists(path) else None
            self.stamps[path] = digest(name, stat and (stat.st_size, stat.st_mtime_ns)).hex()
        return self.stamps[path]

    def _keys(self, record):
        """16 bytes that stand for the clip, 16 that stand for clip and prompt."""
        files = [path and self._stamp(path) for path in (record.image, record.video, record.audio)]
        clip = digest(*files, float(record.start or 0), record.end and float(record.end))
        return clip, digest(clip.hex(), record.prompt if self.by_prompt else None)

    def _has(self, clip, seen):
        held = self.clips.get(clip)
        return isinstance(held, tuple) and (not held[2] or seen in self.seen)

    # ---- what is there
    def __contains__(self, record):
        return self._has(*self._keys(record))

    def get(self, record):
        """Features; None when they are not there, be it that the clip cannot be read (`reason`)."""
        clip, seen = self._keys(record)
        if not self._has(clip, seen):
            return None
        sound, is_image, picture = self.clips[clip]
        return Features(self._read(self.seen[seen]) if picture else None,            # (F,V,D_v)
                        None if sound is None else self._read(sound), is_image)      # (S,D_a)

    def sound(self, record):
        """(S,D_a) of a clip, whatever the prompt; None when not there or silent."""
        held = self.clips.get(self._keys(record)[0])
        return self._read(held[0]) if isinstance(held, tuple) and held[0] is not None else None

    def reason(self, record):
        """Why a clip cannot be read; None when it can, or was not tried yet."""
        held = self.clips.get(self._keys(record)[0])
        return held if isinstance(held, str) else None

    def cut(self, record):
        """What max_seconds left out of a clip, in words; "" where nothing."""
        return self.cuts.get(self._keys(record)[0], "")

    def _read(self, where):
        """Only this entry.  Not memory-mapped: a file that another process makes longer, or that is
        cut off, is no danger, and the page cache serves all processes as well."""
        if isinstance(where, np.ndarray):
            return torch.from_numpy(where)
        pack, offset, *shape = where
        if pack not in self.files:
            self.files[pack] = open(self.packs[pack], "rb", buffering=0)
        numbers = np.empty(shape, np.float16)
        if os.preadv(self.files[pack].fileno(), [numbers], offset) != numbers.nbytes:
            raise OSError(f"{self.packs[pack]}: shorter than it was; remove it and its .jsonl")
        return torch.from_numpy(numbers)

    # ---- packs
    def _read_index(self, path):
        """What a kill or a full disk tore off does not count: a line that is none, nor one that
        tells of more numbers than there are."""
        lines = path.read_bytes().split(b"\n")
        pack = path.with_suffix(".bin")
        size = pack.stat().st_size if pack.exists() else 0         # asked after the lines were read
        self.packs.append(pack)
        for text in lines:
            with contextlib.suppress(ValueError):                  # torn, or empty: the last
                line = json.loads(text)
                offset, *shape = line.get("at") or (0, 0)
                if offset + 2 * math.prod(shape) <= size:
                    where = (len(self.packs) - 1, offset, *shape) if line.get("at") else None
                    self._enter(line, where)

    def _enter(self, line, where):
        if "seen" in line:
            self.seen[bytes.fromhex(line["seen"])] = where
        elif "skipped" in line:               # once it could be read: so it can
            self.clips.setdefault(bytes.fromhex(line["clip"]), line["skipped"])
        else:
            self.clips[bytes.fromhex(line["clip"])] = (where, line["image"], line["picture"])
            if line.get("cut"):
                self.cuts[bytes.fromhex(line["clip"])] = line["cut"]

    def _keep(self, line, numbers=None):
        """An entry to the pack and its index.  Once one cannot be written (the disk is full), no
        more are kept: the caller goes on with what is there."""
        if self.full:
            return
        try:
            self._enter(line, self._append(line, numbers) if self.folder else numbers)
        except OSError as error:
            self.full = True
            self.log(f"features: {self.home}: {error.strerror}; going on without keeping more")

    def _append(self, line, numbers):
        if self.writing is None or self.writing[0] != os.getpid():         # a fork has its own pack
            self.home.mkdir(parents=True, exist_ok=True)
            path = self.home / f"{time.time_ns()}-{distributed.rank()}.bin"
            self.writing = (os.getpid(), len(self.packs), open(path, "xb"),
                            open(path.with_suffix(".jsonl"), "xb"))
            self.packs.append(path)
        _, pack, data, index = self.writing
        where = None
        if numbers is not None:
            where = (pack, data.tell(), *numbers.shape)
            line = line | {"at": where[1:]}
            data.write(np.ascontiguousarray(numbers).data)
            data.flush()
        index.write(json.dumps(line).encode() + b"\n")
        index.flush()
        return where

    def put(self, record, features, cut=""):
        """Keeps what model.encode made of a record's clip and prompt; cut: what was left out."""
        clip, seen = self._keys(record)
        if not isinstance(self.clips.get(clip), tuple):
            self._keep({"clip": clip.hex(), "image": features.is_image,
                        "picture": features.visual is not None, **({"cut": cut} if cut else {})},
                       half(features.audio))
        if features.visual is not None and seen not in self.seen:
            self._keep({"seen": seen.hex()}, half(features.visual))

    def put_skipped(self, record, reason):
        """Keeps why a clip cannot be read: it is not tried again until its file changes."""
        self._keep({"clip": self._keys(record)[0].hex(), "skipped": reason})

    # ---- filling
    def fill(self, records, workers=None, log=print):
        """Encodes what is missing.  -> (id, reason) of each clip that cannot be read.  On the CPU
        all cores encode; a GPU, or a few clips, need this process only."""
        jobs, skipped, met, started = {}, {}, set(), time.time()
        for record in records:
            clip, seen = self._keys(record)
            met.add(clip)
            if isinstance(self.clips.get(clip), str):
                skipped.setdefault(clip, (record.id, self.clips[clip]))
            elif not self._has(clip, seen):
                jobs.setdefault(clip, {}).setdefault(seen, record)   # one record a prompt
        # A clip that is there with another prompt has its sound already.
        jobs = [] if self.full else [
            ([*rows.values()], clip not in self.clips) for clip, rows in jobs.items()]
        if jobs:
            self._check_space(jobs, log)
        for done, ((rows, _), made) in enumerate(self._encoded(jobs, workers), 1):
            by_prompt, heard, is_image, why, cut = made
            if why:
                self.put_skipped(rows[0], why)
                skipped[self._keys(rows[0])[0]] = (rows[0].id, why)
            for record, picture in zip(rows, by_prompt, strict=not why):
                self.put(record, Features(picture, heard, is_image), cut)
            if done % 1000 == 0 or done == len(jobs):
                seconds = time.time() - started
                log(f"encoding clips: {done}/{len(jobs)}, {seconds:.0f} s, "
                    f"ETA {seconds / done * (len(jobs) - done):.0f} s")
            if self.full:
                break
        skipped = [*skipped.values()]
        if skipped:
            log(report_skipped(skipped, len(met)))
        if met and len(skipped) == len(met):
            raise ValueError(
                f"none of {len(met)} clips could be read; first reason: {skipped[0][1]}")
        held = sum(isinstance(self.clips.get(clip), tuple) for clip in met)
        log(f"features: {self.folder or 'in memory'}, {held} clips")
        return skipped

    def _encoded(self, jobs, workers):
        """Each job and what _encode makes of it."""
        model, reading, start = self.model, self.reading, ()
        if workers is None:
            on_cpu = next(model.visual.parameters()).device.type == "cpu"
            workers = cli.cores() if on_cpu and len(jobs) > 200 else 1
        encode = partial(_encode, worker=(model, reading, True))
        if workers > 1:
            encode, start = _encode, (type(model), model.config, frozen_weights(model)[0].dtype,
                                      reading, fingerprint(model, reading))
        with contextlib.closing(cli.parallel(encode, jobs, workers, _start_worker, start)) as made:
            yield from zip(jobs, made, strict=True)

    def _check_space(self, jobs, log):
        """Tells what the features of the missing clips will take; SystemExit when it is not there.
        100 clips are asked for their length, the others taken to be like them."""
        some = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))[:100]]
        need = sum(self._bytes(*job) for job in some) / len(some) * len(jobs)
        told = f"features: {len(jobs)} clips to encode, about {in_words(need)}"
        if not self.folder:
            return log(f"{told} in memory")
        there = next(p for p in (self.home, *self.home.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if need > free:
            raise SystemExit(
                f"{told}, but {self.folder} has {in_words(free)} free; name a --features folder on "
                "a larger disk, or keep none: --no-keep-features")
        log(f"{told} in {self.folder}, {in_words(free)} free")

    def _bytes(self, rows, with_sound):
        """Of one job's features; 0 for a clip that cannot be read."""
        record, config, need = rows[0], self.model.config, 0
        start, limit = record.start or 0, self.reading["max_seconds"] or math.inf
        stop = min(math.inf if record.end is None else record.end, start + limit)
        try:
            film, heard = (path and probe(path) for path in (record.video, record.audio))
        except MediaError:
            return 0
        if film and film.has_audio:
            heard = heard or film
        seconds = [max(0, min(m.seconds, stop) - start) if m else 0 for m in (film, heard)]
        if film or record.image:
            picture = self.model.empty_features(seconds[0] or 1 / config.fps)[0]     # (F,V,D_v)
            need += 2 * (picture if film else picture[:1]).numel() * len(rows)
        if heard and with_sound:
            sound = self.model.empty_features(config.audio_seconds or seconds[1])[1]   # (S,D_a)
            need += 0 if sound is None else 2 * sound.numel()
        return need


def digest(*parts):
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def half(x):
    return None if x is None else torch.as_tensor(x).detach().half().cpu().numpy()


def in_words(n):
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


_worker = None


def _start_worker(system, config, dtype, reading, mark):
    global _worker
    torch.set_num_threads(1)                                # as many processes as cores
    model = system.from_config(config, dtype)
    _worker = (model, reading, fingerprint(model, reading) == mark)


def _encode(job, worker=None):
    """Records of one clip, one a prompt; whether its sound is wanted -> visual (F,V,D_v) of each,
    audio (S,D_a), is_image, why it cannot be read or None, what was cut."""
    (rows, with_sound), skipped = job, []
    model, reading, same = worker or _worker
    if not same:
        raise ValueError("the model's encoders are not those that its config names (random "
                         "weights?), so other processes cannot make its features; workers=1 can")
    clip = load_or_skip(rows[0], skipped, **reading)
    if clip is None:
        return (), None, False, skipped[0][1], ""
    if not with_sound:
        clip.audio = None
    features = model.encode(clip, [record.prompt for record in rows])
    return ([half(f.visual) for f in features], half(features[0].audio), clip.is_image, None,
            clip.cut)


def keep_features(model, records, folder=None, workers=None, log=print, reading=None):
    """A FeatureCache that holds the features of all records whose clips can be read."""
    cache = FeatureCache(folder, model, reading, log)
    cache.fill(records, workers, log)
    return cache
