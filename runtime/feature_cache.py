"""Feature cache: the output of the frozen encoders for every clip and question, computed once.

     records --grouped by clip--> decode; ViT and Whisper once; Q-Former once per prompt --> fp16
     Record --size and time of its files, start, end--> key of the clip --prompt--> key of both
     FOLDER/<fingerprint of encoders and clip options>/probe.safetensors    what the encoders do
                                                      /<time>-<rank>.bin       the numbers
                                                      /<time>-<rank>.jsonl     a line per entry:
       {"clip": KEY, "image": false, "picture": true, "at": [offset, S, D_a], "crc": n}  its sound
       (and "times": [seconds, ...] of its frames, for a system whose prompt tells them)
       {"seen": KEY, "at": [offset, F, V, D_v], "crc": n}    {"clip": KEY, "skipped": why}
Nothing is ever rewritten: each process that writes has a pack (the two files) of its own, and the
numbers are on disk before the line that names them.  So a run may be killed at any moment (at most
8 clips per worker are lost), and the next one continues with what is missing.  Manifests that share
clips share their features.
Size: a frame of 0.5 s takes V*D_v + A*D_a numbers: 3.8 kB in the tiny preset, 113 kB at full size.

Public: FeatureCache, cache_features, readable_samples; bits_hash, source_hash."""

import ast
import contextlib
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import time
import zlib
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from data import Clip, Features, Record, Sample, load_clip, load_or_skip, report_skipped
from runtime import cli, distributed, hub, media
from runtime.log import in_words
from runtime.media import MediaError, probe

# ---------------------------------------------------------------- what features depend on
# A small film with sound, which comes with the code, and a question about it.
PROBE = Record("probe", "", "What is seen and heard?", start=0.5, end=1.5,
               video=str(hub.REPOSITORY / "miniature" / "demo.mp4"))


def fingerprint(model, clip_options):
    """-> name, probe: all that features depend on apart from the clip.  The name is a hash of the
    system, the options of data.load_clip, which question is read and how much of it, the code that
    decodes and encodes (one short film does not show what it does with odd files and long sounds),
    size and time of the encoders' files, and all frozen weights.  The probe, {part: tensor}, shows
    what the encoders' code does with PROBE; see same_probe."""
    config = model.config
    encoders = [part for name, part in model.named_children()
                if name in ("whisper", "visual", "branches")]
    files = [type(part).__module__ for part in encoders]
    files += sorted({type(inner).__module__ for part in encoders for inner in part.modules()
                     if type(part).__module__.startswith("baselines.")
                     and not type(inner).__module__.startswith("torch.")})  # of parts of parts
    code = source_hash(media, load_clip, *(sys.modules[name] for name in files))
    parts = [model.system, sorted(clip_options.items()), config.audio_seconds,
             config.question_turn, config.question_tokens, code, bits_hash(frozen_weights(model))]
    for source in (config.whisper, config.visual):
        root = hub.local_folder(source)
        found = [[str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns]
                 for f in sorted(root.rglob("*")) if f.is_file()] if root else []
        parts.append(found or source)                  # the name of a repo on the Hub
    return digest(parts).hex(), probe_features(model, clip_options)


def probe_features(model, clip_options):
    """{part: fp32 tensor} of PROBE and, as a still image, of its first frame."""
    clip = load_clip(PROBE, **clip_options | {"max_seconds": None})
    still = Clip(None if clip.frames is None else clip.frames[:1], is_image=True)
    found = {}
    for name, shown in (("film", clip), ("still", still)):
        features = model.encode(shown, [PROBE.prompt])[0]
        found |= {f"{name} {part}": vectors.detach().float().cpu().contiguous()
                  for part, vectors in vars(features).items() if torch.is_tensor(vectors)}
    return found


def same_probe(one, other, dtype):
    """Whether the features of two probes differ by no more than rounding does on another device or
    with another number of threads.  A part may differ by this share of its mean absolute value:
    in fp32 we measured 5e-7; sixteen bits round by 0.4 % in each of many layers."""
    share = 1e-4 if dtype == torch.float32 else 2e-2
    return one.keys() == other.keys() and all(
        x.shape == other[part].shape
        and (x - other[part]).abs().mean() <= share * other[part].abs().mean()
        for part, x in one.items())


def frozen_weights(model):
    """{name: frozen parameter} of the encoders, without InstructBLIP's Q-Former, which learns."""
    return {name: p for name, p in model.named_parameters()
            if not p.requires_grad and not name.startswith("llm.")}


def dtype_of(model):
    """The number format of the frozen encoders."""
    return next(iter(frozen_weights(model).values())).dtype


def bits_hash(tensors):
    """{name: tensor} -> hash of all their bits, 32 hex digits, wherever they lie.  Each 8 bytes are
    multiplied by an odd number of their own and summed modulo 2^64: 1.5 GB/s on a core, and no
    single change of 8 bytes goes unnoticed."""
    odd = torch.randint(-2**62, 2**62, (2**16,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    sums, factors = [], {}
    for tensor in tensors.values():
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        words = torch.nn.functional.pad(data, (0, -len(data) % 8)).view(torch.int64)
        factor = factors.setdefault(words.device, odd.to(words.device))
        parts = [(part * factor[:len(part)]).sum() for part in words.split(len(odd))]
        sums.append(torch.stack(parts).tolist())
    return digest([[name, str(tensor.dtype), [*tensor.shape], of] for (name, tensor), of in zip(
        tensors.items(), sums, strict=True)]).hex()


@lru_cache
def source_hash(*things):
    """Hash of the code of modules or functions, 32 hex digits; comments do not count."""
    return digest([ast.unparse(ast.parse(inspect.getsource(thing))) for thing in things]).hex()


class FeatureCache:
    """Features of records, in a folder or, with folder None, in memory.

    clip_options: options of data.load_clip that differ from the model's; log: prints a line."""

    def __init__(self, folder, model, clip_options=None, log=print):
        self.model, self.log, self.full = model, log, False
        self.clip_options = {**model.clip_options(), **(clip_options or {})}
        # InstructBLIP as a baseline caches the ViT's output only; some encoders read no question.
        self.by_prompt = model.system == "favor" and model.visual.reads_question
        self.first_turn = model.config.question_turn == "first"      # see Favor.question_to_see
        # A place is (pack, offset, *shape), or in memory the array itself.
        self.clips = {}      # key -> (place of its sound or None, is_image, has a picture), or
        #                             the reason why it cannot be read
        self.seen = {}       # key of clip and prompt -> place of its visual features
        self.cuts = {}       # key -> what max_seconds left out of the clip
        self.times = {}      # key -> seconds of the frames, where the system wants to know them
        self.stamps, self.packs, self.files, self.writing = {}, [], {}, None
        self.folder = None if folder is None else Path(os.path.abspath(folder))
        if self.folder:
            name, self.probe = fingerprint(model, self.clip_options)
            self.home = self._find_home(name)
            for path in sorted(self.home.glob("*.jsonl")):
                self._read_index(path)

    def __getstate__(self):
        """For the workers of a DataLoader, which read but do not encode."""
        return {**vars(self), "model": None, "log": print, "files": {}, "writing": None,
                "probe": None}

    def _find_home(self, name):
        """The folder of this fingerprint: of those with this name the one with this probe."""
        for path in sorted(self.folder.glob(f"{name}-*/probe.safetensors")):
            try:
                there = load_file(path)
            except (SafetensorError, OSError) as error:
                raise SystemExit(f"{path}: damaged ({error}); remove the folder {path.parent}, "
                                 "and its features are made anew") from None
            if same_probe(self.probe, there, dtype_of(self.model)):
                return path.parent
        return self.folder / f"{name}-{bits_hash(self.probe)[:8]}"

    # ---- keys
    def _stamp(self, path):
        """Hash of path, size and time of a media file, as it was when this cache first met it.  The
        path is relative to the folder, so that both may move together."""
        if path not in self.stamps:
            name = os.path.relpath(path, self.folder) if self.folder else os.path.abspath(path)
            stat = os.stat(path) if os.path.exists(path) else None
            self.stamps[path] = digest(name, stat and (stat.st_size, stat.st_mtime_ns)).hex()
        return self.stamps[path]

    def _keys(self, record):
        """-> key of the clip and key of clip and prompt, 16 bytes each."""
        files = [path and self._stamp(path) for path in (record.image, record.video, record.audio)]
        clip = digest(*files, float(record.start or 0), record.end and float(record.end))
        prompt = record.history[0][0] if self.first_turn and record.history else record.prompt
        return clip, digest(clip.hex(), prompt if self.by_prompt else None)

    def _has(self, clip, seen):
        entry = self.clips.get(clip)
        return isinstance(entry, tuple) and (not entry[2] or seen in self.seen)

    # ---- reading
    def __contains__(self, record):
        return self._has(*self._keys(record))

    def get(self, record):
        """Record -> Features, or None if they are not cached, also if the clip is not readable."""
        clip, seen = self._keys(record)
        if not self._has(clip, seen):
            return None
        sound, is_image, picture = self.clips[clip]
        return Features(self._read(self.seen[seen]) if picture else None,            # (F,V,D_v)
                        None if sound is None else self._read(sound), is_image,      # (S,D_a)
                        self.times.get(clip, ()))

    def reason(self, record):
        """Why a clip cannot be read; None when it can, or was not tried yet."""
        entry = self.clips.get(self._keys(record)[0])
        return entry if isinstance(entry, str) else None

    def cut(self, record):
        """Text that says what max_seconds left out of a clip; "" for nothing."""
        return self.cuts.get(self._keys(record)[0], "")

    def _read(self, place):
        """Reads one entry.  Packs are not memory-mapped, so that a file that grows or that is cut
        off does no harm; all processes share the page cache anyway."""
        if isinstance(place, np.ndarray):
            return torch.from_numpy(place)
        pack, offset, crc, *shape = place
        path = self.packs[pack]
        if pack not in self.files:
            self.files[pack] = open(path, "rb", buffering=0)
        numbers = np.empty(shape, np.float16)
        read = os.preadv(self.files[pack].fileno(), [numbers], offset)
        if read != numbers.nbytes or checksum(numbers) != crc:
            raise SystemExit(f"{path}: damaged, the numbers from byte {offset} on are not those "
                             f"that were written; remove it and {path.with_suffix('.jsonl').name}, "
                             "and its features are made anew")
        return torch.from_numpy(numbers)

    # ---- packs
    def _read_index(self, path):
        """Enters the lines of a pack, except those that a kill or a full disk cut off: broken JSON
        at the end, and lines whose numbers are not all in the pack."""
        pack = path.with_suffix(".bin")
        self.packs.append(pack)
        try:
            lines = hub.grown_lines(path)
            size = pack.stat().st_size if pack.is_file() else 0    # taken after reading the lines
            for number, line in lines:
                if not well_formed(line):
                    raise ValueError(f"{path}: line {number} is damaged")
                offset, *shape = line.get("at") or (0, 0)
                if offset + 2 * math.prod(shape) <= size:
                    place = ((len(self.packs) - 1, offset, line["crc"], *shape)
                             if line.get("at") else None)
                    self._enter(line, place)
        except ValueError as error:
            raise SystemExit(f"{error}; remove {path} and {pack.name}, and their features are made "
                             "anew") from None

    def _enter(self, line, place):
        if "seen" in line:
            self.seen[bytes.fromhex(line["seen"])] = place
        elif "skipped" in line:               # a clip that was read once counts as readable
            self.clips.setdefault(bytes.fromhex(line["clip"]), line["skipped"])
        else:
            self.clips[bytes.fromhex(line["clip"])] = (place, line["image"], line["picture"])
            if line.get("cut"):
                self.cuts[bytes.fromhex(line["clip"])] = line["cut"]
            if line.get("times"):
                self.times[bytes.fromhex(line["clip"])] = tuple(line["times"])

    def _write(self, line, numbers=None):
        """Appends an entry to the pack and its index.  When that fails (the disk is full), nothing
        more is cached, and the caller continues with what is there."""
        if self.full:
            return
        try:
            self._enter(line, self._append(line, numbers) if self.folder else numbers)
        except OSError as error:
            self.full = True
            self.log(f"feature cache: {self.home}: {error.strerror}; nothing more is cached")

    def _append(self, line, numbers):
        if self.writing is None or self.writing[0] != os.getpid():     # a fork needs its own pack
            self.home.mkdir(parents=True, exist_ok=True)
            if self.probe and not (self.home / "probe.safetensors").exists():
                with hub.atomic(self.home / "probe.safetensors") as temporary:
                    temporary.write_bytes(save(self.probe))
            path = self.home / f"{time.time_ns()}-{distributed.rank()}.bin"
            self.writing = (os.getpid(), len(self.packs), open(path, "xb"),
                            open(path.with_suffix(".jsonl"), "xb"))
            self.packs.append(path)
        _, pack, data, index = self.writing
        place = None
        if numbers is not None:
            numbers = np.ascontiguousarray(numbers)
            place = (pack, data.tell(), checksum(numbers), *numbers.shape)
            line = line | {"at": [place[1], *numbers.shape], "crc": place[2]}
            data.write(numbers.data)
            data.flush()
        index.write(json.dumps(line).encode() + b"\n")
        index.flush()
        return place

    def put(self, record, features, cut=""):
        """Caches the Features of a record; cut: what max_seconds left out of its clip."""
        clip, seen = self._keys(record)
        if not isinstance(self.clips.get(clip), tuple):
            self._write({"clip": clip.hex(), "image": features.is_image,
                         "picture": features.visual is not None, **({"cut": cut} if cut else {}),
                         **({"times": features.times} if features.times else {})},
                        half(features.audio))
        if features.visual is not None and seen not in self.seen:
            self._write({"seen": seen.hex()}, half(features.visual))

    def put_skipped(self, record, reason):
        """Caches why a clip cannot be read; it is not tried again until its file changes."""
        self._write({"clip": self._keys(record)[0].hex(), "skipped": reason})

    # ---- filling
    def fill(self, records, workers=None, log=print):
        """Encodes what is missing -> list of (id, reason) of the clips that cannot be read.

        workers: processes; None means all cores on the CPU, and this process alone for a GPU or for
        a few clips.  Raises ValueError when no clip can be read, and SystemExit when the disk has
        not enough space."""
        jobs, skipped, met = {}, {}, set()
        for record in records:
            clip, seen = self._keys(record)
            met.add(clip)
            if isinstance(self.clips.get(clip), str):
                skipped.setdefault(clip, (record.id, self.clips[clip]))
            elif not self._has(clip, seen):
                jobs.setdefault(clip, {}).setdefault(seen, record)   # one record per prompt
        # A clip that is cached with another prompt has its sound already.
        jobs = [] if self.full else [
            ([*rows.values()], clip not in self.clips) for clip, rows in jobs.items()]
        if jobs:
            self._check_space(jobs, log)
        for (rows, _), made in cli.progress(
                self._encoded(jobs, workers), len(jobs), "encoding clips", "clip"):
            by_prompt, audio, is_image, why, cut, times = made
            if why:
                self.put_skipped(rows[0], why)
                skipped[self._keys(rows[0])[0]] = (rows[0].id, why)
            for record, visual in zip(rows, by_prompt, strict=not why):
                self.put(record, Features(visual, audio, is_image, times), cut)
            if self.full:
                break
        skipped = [*skipped.values()]
        if skipped:
            log(report_skipped(skipped, len(met)))
        if met and len(skipped) == len(met):
            raise ValueError(
                f"none of {len(met)} clips could be read; first reason: {skipped[0][1]}")
        cached = sum(isinstance(self.clips.get(clip), tuple) for clip in met)
        log(f"feature cache: {self.folder or 'in memory'}, {cached} clips")
        return skipped

    def _encoded(self, jobs, workers):
        """Yields each job with the result of _encode."""
        model, options, start = self.model, self.clip_options, ()
        if workers is None:
            on_cpu = next(model.parameters()).device.type == "cpu"
            workers = cli.cores() if on_cpu and len(jobs) > 200 else 1
        encode = partial(_encode, worker=(model, options, True))
        if workers > 1:
            encode, start = _encode, (type(model), model.config, dtype_of(model), options,
                                      fingerprint(model, options))
        with contextlib.closing(cli.parallel(encode, jobs, workers, _start_worker, start)) as made:
            yield from zip(jobs, made, strict=True)

    def _check_space(self, jobs, log):
        """Logs the space that the features of the missing clips will take, estimated from 100 of
        them; SystemExit when the disk has less."""
        some = [jobs[i] for i in np.random.default_rng(0).permutation(len(jobs))[:100]]
        need = sum(self._bytes(*job) for job in some) / len(some) * len(jobs)
        text = f"feature cache: {len(jobs)} clips to encode, about {in_words(need)}"
        if not self.folder:
            return log(f"{text} in memory")
        there = next(p for p in (self.home, *self.home.parents) if p.exists())
        free = shutil.disk_usage(there).free
        if need > free:
            raise SystemExit(
                f"{text}, but {self.folder} has {in_words(free)} free; name a --features folder on "
                "a larger disk, or cache nothing: --no-cache-features")
        log(f"{text} in {self.folder}, {in_words(free)} free")

    def _bytes(self, rows, with_sound):
        """Bytes of the features of one job; 0 for a clip that cannot be read."""
        record, config, need = rows[0], self.model.config, 0
        start, limit = record.start or 0, self.clip_options["max_seconds"] or math.inf
        stop = min(math.inf if record.end is None else record.end, start + limit)
        try:
            film, sound = (path and probe(path) for path in (record.video, record.audio))
        except MediaError:
            return 0
        if film and film.has_audio:
            sound = sound or film
        seconds = [max(0, min(m.seconds, stop) - start) if m else 0 for m in (film, sound)]
        if film or record.image:
            visual = self.model.empty_features(seconds[0] or 1 / config.fps)[0]        # (F,V,D_v)
            need += 2 * (visual if film else visual[:1]).numel() * len(rows)
        if sound and with_sound:
            audio = self.model.empty_features(config.audio_seconds or seconds[1])[1]   # (S,D_a)
            need += 0 if audio is None else 2 * audio.numel()
        return need


def digest(*parts):
    """16 bytes that stand for some JSON values."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


def checksum(numbers):
    """CRC of an array's shape and of its bytes."""
    return zlib.crc32(numbers.data, zlib.crc32(str(numbers.shape).encode()))


def well_formed(line):
    """Whether a line of an index has the fields and types that a FeatureCache writes."""
    def whole(*numbers):
        return all(type(n) is int and n >= 0 for n in numbers)
    key = line.get("seen", line.get("clip"))
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{32}", key):
        return False
    if "skipped" in line:
        return isinstance(line["skipped"], str)
    at, crc, cut, times = (line.get(name, empty) for name, empty in (
        ("at", None), ("crc", None), ("cut", ""), ("times", [])))
    if at is None and "seen" in line or at is not None and not (
            isinstance(at, list) and len(at) == (4 if "seen" in line else 3) and whole(crc, *at)):
        return False
    return "seen" in line or (
        isinstance(cut, str) and isinstance(times, list) and {*map(type, times)} <= {float}
        and all(isinstance(line.get(name), bool) for name in ("image", "picture")))


def half(x):
    """Tensor or None -> fp16 array or None."""
    return None if x is None else torch.as_tensor(x).detach().half().cpu().numpy()


_worker = None


def _start_worker(system, config, dtype, clip_options, expected):
    global _worker
    torch.set_num_threads(1)                                # there are as many processes as cores
    model = system.for_encoding(config, dtype)
    name, probe = fingerprint(model, clip_options)
    same = name == expected[0] and same_probe(probe, expected[1], dtype)
    _worker = (model, clip_options, same)


def _encode(job, worker=None):
    """(records of one clip with different prompts, whether its sound is wanted) -> visual (F,V,D_v)
    of each, audio (S,D_a), is_image, why the clip cannot be read or None, what was cut, times."""
    (rows, with_sound), skipped = job, []
    model, clip_options, same = worker or _worker
    if not same:
        raise ValueError("the model's encoders differ from those that its config names (random "
                         "weights?), so other processes cannot make its features; use workers=1")
    clip = load_or_skip(rows[0], skipped, **clip_options)
    if clip is None:
        return (), None, False, skipped[0][1], "", ()
    if not with_sound:
        clip.audio = None
    features = model.encode(clip, [model.question_to_see(record) for record in rows])
    return ([half(f.visual) for f in features], half(features[0].audio), clip.is_image, None,
            clip.cut, features[0].times)


def cache_features(model, records, folder=None, workers=None, log=print, clip_options=None):
    """-> a FeatureCache with the features of all records whose clips can be read; see fill."""
    cache = FeatureCache(folder, model, clip_options, log)
    cache.fill(records, workers, log)
    return cache


def readable_samples(model, records, cache, mask=None, skipped=None):
    """Records -> those whose clip can be read, and their Samples: with cached features, or without
    them (cache None, a disk that was full) with decoded clips.  (id, reason) of the other records
    joins the list `skipped`."""
    skipped, read, samples = [] if skipped is None else skipped, [], []
    clip_options = model.clip_options() if cache is None else cache.clip_options
    for record in records:
        features, clip = cache.get(record) if cache is not None else None, None
        if features is None and cache is not None and (why := cache.reason(record)):
            skipped.append((record.id, why))
        elif features is None:
            clip = load_or_skip(record, skipped, **clip_options)
        if features is None and clip is None:
            continue
        sample = Sample(record.prompt, record.target, clip, features, record.history, mask)
        # Whisper reads no question, so its baseline has no such method.
        if hasattr(model, "too_long") and (
                why := model.too_long(sample, model.config.max_new_tokens)):
            skipped.append((record.id, why))
            continue
        read.append(record)
        samples.append(sample)
    return read, samples
