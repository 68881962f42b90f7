"""Official downloads of AVEB's sets -> manifests for train.py and eval.py; nothing is fetched.

     annotation files --prepare--> <set>-<split>.jsonl --check--> which clips cannot be decoded
     manifest --subset--> n questions, the same ones for the same seed

   An interrupted check continues where it stopped.  A subset depends on the seed and the ids
   alone: the same hash of ids means the same questions.
   Public: prepare, check, subset, ids_hash."""

import hashlib
import json
import os
import time
import warnings
from pathlib import Path

import torch

import data
from aveb import metrics
from aveb.sets.registry import Files
from runtime import cli
from runtime.cli import Progress
from runtime.hub import read_jsonl, write_text
from runtime.media import MediaError

SHOWN = 10                  # samples, and broken files, that a check prints


# ---------------------------------------- subsets

def ids_hash(records):
    """12 hexadecimal digits that identify these questions, in whatever order."""
    return hashlib.sha256("\n".join(sorted(r.id for r in records)).encode()).hexdigest()[:12]


def subset(records, n=None, seed=0, hours=None):
    """n questions, or `hours` of time windows, sampled by a hash of seed and id, in the order they
    had.  A dialogue counts as one question and stays whole.  If clips are missing, the same others
    are sampled.  ValueError if `hours` is asked of records without time windows."""
    firsts, chosen, seconds = {}, set(), 0.0
    for record in records:
        firsts.setdefault(_unit(record), record)
    for unit in sorted(firsts, key=lambda u: hashlib.sha256(f"{seed}:{u}".encode()).digest()):
        if n is not None and len(chosen) >= n or hours is not None and seconds >= hours * 3600:
            break
        chosen.add(unit)
        if hours is not None:
            if (first := firsts[unit]).end is None:
                raise ValueError(f"{first.id} has no window of time; hours are summed over windows,"
                                 " sample a number of questions instead")
            seconds += first.end - (first.start or 0)
    return [record for record in records if _unit(record) in chosen]


def _unit(record):
    """What is sampled as one: a question, or the dialogue that it belongs to."""
    if "dialogue" in record.meta:
        return f"{record.meta.get('dataset')}-{record.meta['dialogue']}"
    return record.id


# ---------------------------------------- prepare

def prepare(name, root, split=None, media=(), out=None, sample=None, hours=None, seed=0, log=print,
            **options):
    """Official files -> path of the manifest (default: <set>-<split>.jsonl here).  sample, hours,
    seed: as in subset; options: those of the set's reader."""
    files, records, reported = Files(name, root, split, media), [], time.time()
    out = Path(out or f"{name}-{files.split}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)          # before the long reading
    if out.is_dir():
        raise ValueError(f"{out}: a folder; wanted the name of the manifest to write")
    for record in files.records(**options):
        records.append(record)
        if time.time() - reported > 10:
            reported = time.time()
            log(f"reading {files.annotation.name}: {len(records)} records")
    log(f"{name} {files.split}: {len(records)} records; media files: {files.count('found')} found, "
        f"{files.count('missing')} missing, {files.count('empty')} empty")
    if files.doubles:
        log(f"{len(files.doubles)} clips are there as several files; the first of each is taken, "
            f"as in {files.doubles[0]}")
    if files.dropped:
        log(f"left out: {files.report_dropped()}")
    if sample or hours:
        records = subset(records, sample, seed, hours)
        log(f"sampled with seed {seed}: {len(records)} records")
    data.write_manifest(out, records)
    log(f"{out}: {len(records)} records, ids {ids_hash(records)}")
    return out


# ---------------------------------------- check

def clip_key(record):
    """Changes with the files and the window of a clip; questions about the same clip share it."""
    parts = [record.start, record.end]
    for path in filter(None, (record.image, record.video, record.audio)):
        try:
            found = os.stat(path)
            parts += [os.path.abspath(path), found.st_size, found.st_mtime_ns]
        except OSError:
            parts += [os.path.abspath(path), None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def check_clip(record):
    """Decodes all of a clip -> {"seconds", "picture", "sound", "warnings"} or {"error"}."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            clip = data.load_clip(record, size=32)
        except MediaError as error:
            return {"error": str(error)}
        except Exception as error:            # one odd file must not end the check of 100 000
            return {"error": f"{record.id}: {type(error).__name__}: {error}"}
    return {"seconds": round(clip.seconds, 3), "picture": clip.frames is not None,
            "sound": clip.audio is not None, "warnings": [str(w.message) for w in caught]}


def check(manifest, workers=None, log=print):
    """Decodes every clip of a manifest on all cores -> number of clips that cannot be read.
    Results are written to <manifest>.check.jsonl while they come, so only new or changed files are
    read."""
    records = data.read_manifest(manifest, metrics.unknown_metrics)
    results_file = Path(f"{manifest}.check.jsonl")
    keys = {record.id: clip_key(record) for record in records}
    clips = {keys[record.id]: record for record in reversed(records)}          # the first of each
    results = {key: row for row in read_jsonl(results_file)
               if isinstance(key := row.pop("clip", ""), str) and key in clips and _whole(row)}
    todo = [key for key in dict.fromkeys(keys.values()) if key not in results]
    workers = min(workers or cli.cores(), 1 + len(todo) // 16)   # a worker takes seconds to start
    if results:
        log(f"{len(results)} of {len(clips)} clips were checked before ({results_file})")
    write_text(results_file, "".join(_line(key, row) for key, row in results.items()))
    jobs = cli.parallel(check_clip, [clips[key] for key in todo], workers,
                        torch.set_num_threads, (1,))
    with (results_file.open("a", encoding="utf-8") as file,
          Progress("checking", len(todo), "clip") as progress):
        for key, row in zip(todo, jobs, strict=True):
            results[key] = row
            file.write(_line(key, row))
            file.flush()
            progress.add()
    report(manifest, records, keys, results, log)
    return sum("error" in row for row in results.values())


def _whole(row):
    """Whether a line of the results is as check_clip made it; else its clip is read again."""
    return isinstance(row.get("error"), str) or (
        {"picture", "sound"} <= row.keys() and isinstance(row.get("warnings"), list)
        and isinstance(row.get("seconds"), (int, float)))


def _line(key, row):
    return json.dumps({"clip": key, **row}) + "\n"


def report(manifest, records, keys, results, log=print):
    """Prints what a check found: totals, broken files and why, durations, ten samples."""
    broken = [row["error"] for row in results.values() if "error" in row]
    good = [row for row in results.values() if "error" not in row]
    lost = sum("error" in results[keys[r.id]] for r in records)
    odd = [text for row in good for text in row["warnings"]]
    log(f"{manifest}: {len(records)} records about {len(results)} clips, ids {ids_hash(records)}: "
        f"{len(broken)} broken ({lost} records)")
    if bare := sum(record.target is None for record in records):
        log(f"{bare} records have no target: train.py would refuse them")
    for reason in broken[:SHOWN]:
        log(f"  broken: {reason}")
    if len(broken) > SHOWN:
        log(f"  and {len(broken) - SHOWN} more")
    if odd:
        log(f"{len(odd)} warnings, the first: {odd[0]}")
    seconds = sorted(row["seconds"] for row in good if row["seconds"])
    if seconds:
        log(f"durations: {sum(seconds) / 3600:.2f} h in all, {seconds[0]:.1f} s shortest, "
            f"{seconds[len(seconds) // 2]:.1f} s median, {seconds[-1]:.1f} s longest, "
            f"{sum(s > 30 for s in seconds)} above 30 s")
    silent = sum(not row["sound"] for row in good if row["seconds"])
    log(f"{sum(row['picture'] for row in good)} clips with a picture, "
        f"{sum(row['sound'] for row in good)} with sound, {silent} videos are silent")
    for record in sorted(subset(records, SHOWN), key=lambda r: r.id)[:SHOWN]:
        names = " + ".join(Path(p).name for p in (record.image, record.video, record.audio) if p)
        window = "" if record.end is None else f" {record.start or 0:g}-{record.end:g} s"
        row = results[keys[record.id]]
        length = "broken" if "error" in row else f"{row['seconds']:.1f} s"
        log(f"  {record.id} [{record.task}] {names}{window} ({length}): "
            f"{_short(record.prompt)!r} -> {_short(record.target or '')!r}")


def _short(text, width=70):
    return text if len(text) <= width else text[:width - 3] + "..."
