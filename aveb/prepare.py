"""Official downloads of AVEB's sets -> manifests for train.py and eval.py; nothing is fetched.

     python -m aveb list                                       the sets, their splits and sources
     python -m aveb prepare librispeech --root /data/LibriSpeech             its test-clean split
     python -m aveb prepare nextqa --root /data/nextqa --media /data/NExTVideo --split train
     python -m aveb prepare gqa --root /data/gqa --sample 1000 --seed 0      a thousand of them
     python -m aveb check nextqa-train.jsonl                   decode every clip of a manifest
     python -m aveb subset gqa-testdev_balanced.jsonl --n 1000 --seed 0

prepare reads the official annotation files below --root, looks for each clip there and in --media,
says how many it found, writes <set>-<split>.jsonl and checks it.  A check that was cut off goes on
where it stopped; it ends with status 1 if files do not decode.  Subsets hang on the seed and the
ids alone: the same hash of ids, the same questions.

Public: prepare, check, subset, ids_hash."""


import argparse
import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

import data
from aveb.sets import SETS, Files
from runtime import cli
from runtime.media import MediaError

SHOWN = 10                  # samples, and broken files, that a check prints


# ---------------------------------------- subsets

def ids_hash(records):
    """12 hexadecimal digits that say which questions these are, in whatever order."""
    return hashlib.sha256("\n".join(sorted(r.id for r in records)).encode()).hexdigest()[:12]


def subset(records, n=None, seed=0, hours=None):
    """n questions, or so many hours of windows, drawn by a hash of seed and id, in the order they
    had; a dialogue counts as one and stays whole.  Where clips are missing, all others that were
    drawn stay drawn."""
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
                                 " draw a number of questions instead")
            seconds += first.end - (first.start or 0)
    return [record for record in records if _unit(record) in chosen]


def _unit(record):
    """What is drawn as one: a question, or the dialogue that it belongs to."""
    if "dialogue" in record.meta:
        return f"{record.meta.get('dataset')}-{record.meta['dialogue']}"
    return record.id


# ---------------------------------------- prepare

def prepare(name, root, split=None, media=(), out=None, sample=None, hours=None, seed=0, log=print,
            **options):
    """Official files -> manifest `out`, whose path is returned; options are those of the reader."""
    files, records, shown = Files(name, root, split, media), [], time.time()
    for record in files.records(**options):
        records.append(record)
        if time.time() - shown > 10:
            shown = time.time()
            log(f"reading {files.annotation.name}: {len(records)} records")
    log(f"{name} {files.split}: {len(records)} records; media files: {files.count('found')} found, "
        f"{files.count('missing')} missing, {files.count('empty')} empty")
    if files.dropped:
        log(f"left out: {files.report_dropped()}")
    if sample or hours:
        records = subset(records, sample, seed, hours)
        log(f"drawn with seed {seed}: {len(records)} records")
    out = Path(out or f"{name}-{files.split}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
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


def _known(progress):
    """{key: result} of the check before; the line at which it was killed may be half."""
    known = {}
    for line in progress.read_text().splitlines() if progress.exists() else ():
        try:
            row = json.loads(line)
            known[row.pop("clip")] = row
        except (ValueError, KeyError, AttributeError):
            continue
    return known


class Bar:
    """One line that is drawn over on a terminal; else a line every ten seconds."""

    def __init__(self, what, total, log):
        self.what, self.total, self.log = what, total, log
        self.started = self.shown = time.time()

    def show(self, done):
        now, terminal = time.time(), sys.stdout.isatty() and self.log is print
        if done < self.total and now - self.shown < (0.2 if terminal else 10):
            return
        self.shown, seconds = now, now - self.started
        full = 30 * done // self.total
        text = (f"{self.what} [{'#' * full}{'.' * (30 - full)}] {done}/{self.total}, "
                f"{seconds:.0f} s, ETA {seconds / done * (self.total - done):.0f} s")
        if terminal:
            print(f"\r{text}", end="" if done < self.total else "\n", flush=True)
        elif done < self.total or seconds > 10:
            self.log(text)


def check(manifest, workers=None, log=print):
    """Decodes every clip of a manifest on all cores -> number of clips that cannot be read.
    Results are kept in <manifest>.check.jsonl as they come: only new or changed files are read."""
    records, progress = data.read_manifest(manifest), Path(f"{manifest}.check.jsonl")
    keys = {record.id: clip_key(record) for record in records}
    clips = {keys[record.id]: record for record in reversed(records)}          # the first of each
    results = {key: row for key, row in _known(progress).items() if key in clips}
    todo = [key for key in dict.fromkeys(keys.values()) if key not in results]
    workers = min(workers or cli.cores(), 1 + len(todo) // 16)   # a worker takes seconds to start
    if results:
        log(f"{len(results)} of {len(clips)} clips were checked before ({progress})")
    progress.write_text("".join(_line(key, row) for key, row in results.items()))
    bar = Bar("checking", len(todo), log)
    jobs = cli.parallel(check_clip, [clips[key] for key in todo], workers,
                        torch.set_num_threads, (1,))
    with progress.open("a") as file:
        for done, (key, row) in enumerate(zip(todo, jobs, strict=True), 1):
            results[key] = row
            file.write(_line(key, row))
            file.flush()
            bar.show(done)
    report(records, keys, results, log)
    return sum("error" in row for row in results.values())


def _line(key, row):
    return json.dumps({"clip": key, **row}) + "\n"


def report(records, keys, results, log=print):
    """Prints what a check found: totals, broken files and why, durations, ten samples."""
    broken = [row["error"] for row in results.values() if "error" in row]
    good = [row for row in results.values() if "error" not in row]
    lost = sum("error" in results[keys[r.id]] for r in records)
    odd = [text for row in good for text in row["warnings"]]
    log(f"{len(records)} records about {len(results)} clips, ids {ids_hash(records)}: "
        f"{len(broken)} broken ({lost} records)")
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


# ---------------------------------------- command line

def list_sets(log=print):
    for name, one in SETS.items():
        log(f"{name:12} {one.task:8} {', '.join(one.splits)}\n{'':12} scored by "
            f"{', '.join(one.scored_by)}; from {one.source}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the sets: task, splits, metrics, source")
    one = commands.add_parser("prepare", help="an official download -> a manifest",
                              allow_abbrev=False)
    one.add_argument("set", choices=SETS, metavar="SET", help=", ".join(SETS))
    one.add_argument("--root", required=True, help="folder of the annotation files (and media)")
    one.add_argument("--media", action="append", default=[], metavar="DIR",
                     help="another folder with media; may be given several times")
    one.add_argument("--split", help="see list (default: what the paper scores, or trains on)")
    one.add_argument("--out", help="manifest (default: <set>-<split>.jsonl)")
    one.add_argument("--sample", type=int, metavar="N", help="draw N questions, or whole dialogues")
    one.add_argument("--hours", type=float, help="draw so many hours of windows (ego4d: 600)")
    one.add_argument("--seed", type=int, default=0, help="of --sample and --hours")
    one.add_argument("--merge", action=argparse.BooleanOptionalAction,
                     help="how2: join sentences to clips of about 20 s, as the authors did")
    one.add_argument("--window", type=float, help="ego4d: longest window in seconds (default 30)")
    one.add_argument("--check", action=argparse.BooleanOptionalAction, default=True,
                     help="decode every clip afterwards")
    two = commands.add_parser("check", help="decode every clip of a manifest", allow_abbrev=False)
    two.add_argument("manifest")
    three = commands.add_parser("subset", help="a drawn part of a manifest", allow_abbrev=False)
    three.add_argument("manifest")
    three.add_argument("--n", type=int, required=True, help="questions, or whole dialogues")
    three.add_argument("--seed", type=int, default=0, help="same seed, same questions (default 0)")
    three.add_argument("--out", help="manifest (default: <manifest>-<n>-<seed>.jsonl)")
    for command in (one, two):
        command.add_argument("--workers", type=int, help="processes (default: one a core)")
    return parser


def main(argv=None):
    """-> exit status."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            list_sets()
            return 0
        if args.command == "subset":
            records = subset(data.read_manifest(args.manifest), args.n, args.seed)
            path = Path(args.manifest)
            out = args.out or path.with_name(f"{path.stem}-{args.n}-{args.seed}.jsonl")
            data.write_manifest(out, records)
            print(f"{out}: {len(records)} records, ids {ids_hash(records)}")
            return 0
        manifest = getattr(args, "manifest", None)
        if args.command == "prepare":
            options = {"merge": args.merge, "window": args.window}
            options = {key: value for key, value in options.items() if value is not None}
            if unknown := sorted(set(options) - set(SETS[args.set].options)):
                parser.error(f"--{unknown[0]} means nothing to {args.set}")
            manifest = prepare(args.set, args.root, args.split, args.media, args.out, args.sample,
                               args.hours, args.seed, **options)
            if not args.check:
                return 0
        return 1 if check(manifest, args.workers) else 0
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
