"""Kept features: what the frozen encoders make of every clip and question, computed once.

     records --grouped by clip--> decode, ViT, Whisper once; Q-Former once a prompt --> fp16 on disk
Training then never touches a frame: the encoders cost several times what the trained parts do.
Size: a 0.5 s frame takes V*D_v + A*D_a numbers, 5 kB in the tiny preset, 113 kB at full size.

Public: FeatureStore, keep_features."""

import hashlib
import json
import os
import time
from functools import partial
from pathlib import Path

import torch

import cli
from data import load_or_skip, report_skipped
from favor import Features, local_source


class FeatureStore:
    """store[record.id] -> Features.  All clips' vectors lie behind each other in two tensors."""

    def __init__(self, visual, audio, spans, skipped):
        self.visual, self.audio, self.spans, self.skipped = visual, audio, spans, skipped

    def __contains__(self, record_id):
        return record_id in self.spans

    def __getitem__(self, record_id):
        v0, v1, a0, a1, is_image = self.spans[record_id]
        return Features(self.visual[v0:v1] if v1 > v0 else None,                     # (F,V,D_v)
                        self.audio[a0:a1] if a1 > a0 else None, bool(is_image))      # (S,D_a)

    def save(self, path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temporary = f"{path}.{os.getpid()}.tmp"
        torch.save({"visual": self.visual, "audio": self.audio, "ids": list(self.spans),
                    "spans": torch.tensor(list(self.spans.values())).reshape(-1, 5),
                    "skipped": [list(pair) for pair in self.skipped]}, temporary)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path):
        """Memory-mapped: only what a batch asks for is read."""
        kept = torch.load(path, weights_only=True, mmap=True)
        spans = dict(zip(kept["ids"], map(tuple, kept["spans"].tolist()), strict=True))
        return cls(kept["visual"], kept["audio"], spans, [tuple(pair) for pair in kept["skipped"]])


def fingerprint(config, records, system="favor"):
    """Hash of all that the features depend on: records, media files, reading rules, encoders.  A
    file counts by its size and time, so clips or weights made again are encoded again."""
    def stamp(path):
        stat = Path(path).stat() if Path(path).exists() else None
        return [str(path), *((stat.st_size, stat.st_mtime_ns) if stat else ())]
    parts = [system, config.fps, config.frame_times, config.audio_seconds, config.antialias,
             config.max_seconds]
    for source in (config.whisper, config.instructblip):
        root = Path(local_source(source))
        parts += [source, *(stamp(f) for f in sorted(root.rglob("*")) if f.is_file())]
    media = sorted({path for r in records for path in (r.image, r.video, r.audio) if path})
    parts += [stamp(path) for path in media]
    parts += sorted(([r.id, r.prompt, r.image, r.video, r.audio, r.start, r.end] for r in records),
                    key=lambda part: part[0])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


_worker_model = None


def _start_worker(system, config):
    global _worker_model
    torch.set_num_threads(1)                               # as many processes as cores
    _worker_model = system.from_config(config)


def _encode(job, model=None):
    """Records of one clip -> (visual by prompt {prompt: (F,V,D)}, audio, is_image, skipped)."""
    model, skipped = model or _worker_model, []
    prompts = list(dict.fromkeys(record.prompt for record in job))
    clip = load_or_skip(job[0], skipped, **model.reading())
    if clip is None:
        return {}, None, False, skipped
    features = model.encode(clip, prompts)
    half = lambda x: None if x is None else x.half().cpu().numpy()               # noqa: E731
    return ({p: half(f.visual) for p, f in zip(prompts, features, strict=True)},
            half(features[0].audio), clip.is_image, skipped)


def keep_features(model, records, folder=None, workers=None, log=print):
    """Features of all records, from `folder` when they were kept there before, else computed (and
    kept there).  On the CPU all cores encode; a GPU, or a few clips, need this process only."""
    path = None
    if folder:
        path = Path(folder) / f"{fingerprint(model.config, records, model.system)}.pt"
    clips = {}
    for record in records:
        clips.setdefault((record.image, record.video, record.audio, record.start, record.end),
                         []).append(record)
    jobs, started = list(clips.values()), time.time()
    if path and path.exists():
        store = FeatureStore.load(path)
        log(f"features: {path}")
        if store.skipped:
            log(report_skipped(store.skipped, len(jobs)))
        return store
    visual, audio, spans, skipped, v_end, a_end = [], [], {}, [], 0, 0
    if workers is None:
        on_cpu = next(model.visual.parameters()).device.type == "cpu"
        workers = cli.cores() if on_cpu and len(jobs) > 200 else 1
    encode = _encode if workers > 1 else partial(_encode, model=model)
    encoded = cli.parallel(encode, jobs, workers, _start_worker,
                           (type(model), model.config))
    for done, (job, (by_prompt, heard, is_image, missed)) in enumerate(
            zip(jobs, encoded, strict=True), 1):
        skipped += missed
        a0 = a_end
        if heard is not None:
            audio.append(torch.from_numpy(heard))
            a_end += len(heard)
        where = {}
        for prompt, seen in by_prompt.items():
            v0 = v_end
            if seen is not None:
                visual.append(torch.from_numpy(seen))
                v_end += len(seen)
            where[prompt] = (v0, v_end)
        spans |= {r.id: (*where[r.prompt], a0, a_end, int(is_image))
                  for r in job if r.prompt in where}
        if done % 1000 == 0 or done == len(jobs):
            seconds = time.time() - started
            log(f"encoding clips: {done}/{len(jobs)}, {seconds:.0f} s, "
                f"ETA {seconds / done * (len(jobs) - done):.0f} s")
    if skipped:
        log(report_skipped(skipped, len(jobs)))
    if not spans:
        raise ValueError(f"none of {len(jobs)} clips could be read; first reason: {skipped[0][1]}")
    empty = torch.empty(0, dtype=torch.float16)
    store = FeatureStore(torch.cat(visual) if visual else empty,
                         torch.cat(audio) if audio else empty, spans, skipped)
    if path:
        store.save(path)
        log(f"features: {path}, {path.stat().st_size / 1e6:.0f} MB")
    return store
