"""The paper's ablations in miniature: trains and scores every system with several seeds, and draws
the tables and figures from what came out.  Paper Tables 2, 3, 5, 9, 10 and Figs 3, 4, 5.

     python -m experiments.ablate                       all systems, 5 seeds, two rounds (four of them: one)
     python -m experiments.ablate --quick               fewer systems, seeds, steps and questions: every figure
     python -m experiments.ablate --only complete future --seeds 10        some systems, more seeds
     python -m experiments.ablate --only complete no-sync --seeds 3 --rounds 3     some of them for longer
     python -m experiments.ablate --plan                prints the commands and runs nothing
     python -m experiments.figures runs/ablate          draws the figures again

     round 1: SYSTEMS x seeds --train.py, then --score--> OUT/<system>-seed<k>/scores.json
     round 2: the same trained on for as long again   --> OUT/<system>-seed<k>/to-2200/scores.json
              --all of them--> OUT/results.jsonl, a line a (system, seed, step, task, part)
              --ablate_tables.py--> OUT/results.md   --figures.py--> OUT/*.png
The same command goes on where it was killed; runs whose scores.json is there are not run again.

Why rounds: what separates early may be speed of learning only.  Round 1 is scored at half of its
steps, too; every later round doubles the steps that a run has had: from its weights, with a new
optimiser, warm-up and cosine and other draws of the data.  Its table says what that changed: where
nothing, the systems have converged.

Public: AblateConfig, resolve_config, Job, plan, run_jobs, prepare, score, collect."""


import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import miniature
import train
from aveb import metrics
from aveb import tables as reports
from aveb.answers import evaluate, views_of
from experiments import figures
from experiments.tables import (
    FPS,
    SYSTEMS,
    Results,
    claim_table,
    reproduction_table,
    tables,
)
from favor import Favor
from runtime import cli, distributed, hub
from runtime.feature_cache import keep_features
from runtime.files import write_text
from runtime.log import duration

HERE = Path(__file__).parent.parent
COMMITTED = HERE / "docs" / "ablate"              # the results that the README shows

FIGURES_ONLY = ("k1", "k2", "lambda-0.1", "lambda-1")     # drawn after round 1 only
# What is quick: every figure has its points, but hardly anything is learnt.
QUICK = {"seeds": 1, "steps": 160, "rounds": 1, "limit": 100, "out": "runs/ablate-quick", "only": (
    "complete", "no-diversity", "no-causal", "no-windows-2q", "no-sync", "k1", "lambda-10")}


@dataclass(frozen=True)
class AblateConfig:
    seeds: int = 5  # of every system: 0, 1 ...
    steps: int = 1100  # of round 1, scored at half of them, too
    rounds: int = 2  # each after the first doubles the steps: tables after 1100, 2200 ...
    out: str = "runs/ablate"  # where runs, results, tables and figures go
    only: tuple = ()  # names of systems (default: all; --plan lists them)
    jobs: int = 0  # trainings at a time (0: one a core, or one a GPU)
    limit: int = 250  # test questions a task, by lot (0: all)
    data: str = "media/miniature"  # folder with train.jsonl and test.jsonl
    flags: str = ""  # more flags for every train.py: --flags="--batch 16"
    quick: bool = False  # a quarter of an hour on two cores: what is not given is set small
    plan: bool = False  # print the commands, run nothing
    score: tuple = ()  # SYSTEM SEED ROUND: score a finished training (the program's own use)

    def __post_init__(self):
        unknown = sorted({*self.only, *self.score[:1]} - {*SYSTEMS})
        if unknown:
            raise ValueError(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
        if self.seeds < 1 or self.rounds < 1 or self.steps < 2 or self.steps % 2:
            raise ValueError(f"--seeds {self.seeds} --rounds {self.rounds} --steps {self.steps}; "
                             "wanted a seed and a round at least, and an even number of steps "
                             "(half of them are scored, too)")


def resolve_config(config, given):
    """The config with QUICK's values where the command line says nothing."""
    small = {k: v for k, v in QUICK.items() if k not in given} if config.quick else {}
    return dataclasses.replace(config, **small)


# ---------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other, one round of one run; settings: what scores.json
    in its folder must have been made with to count; after: the job that must have ended before."""
    name: str
    folder: Path
    commands: tuple
    settings: dict
    steps: int
    after: str = ""

    def finished(self):
        file = self.folder / "scores.json"
        return file.exists() and json.loads(file.read_text())["settings"] == self.settings


def steps_of(config, round):
    """Optimiser steps of a round 1, 2 ... -> those of all rounds before it, its own."""
    return (0, config.steps) if round == 1 else (2 ** (round - 2) * config.steps,) * 2


def run_folder(config, system, seed, round):
    total, first = sum(steps_of(config, round)), Path(config.out) / f"{system}-seed{seed}"
    return first if round == 1 else first / f"to-{total}"


def train_words(config, system, seed, round):
    """Words behind `train.py` of one training, all but its --out."""
    before, steps = steps_of(config, round)
    start = ["--seed", str(seed + before)]                    # draws that no earlier round has had
    if before:
        start += ["--start-from", str(run_folder(config, system, seed, round - 1) / "last")]
    return [*shlex.split(SYSTEMS[system][1]), *start, "--steps", str(steps),
            "--warmup", str(min(100, steps // 4)), "--save-every", str(steps // 2),
            "--keep", "0", "--processes", "1", "--micro-batch", "16", "--show", "0",
            "--no-tensorboard", "--no-test", "--data", config.data, *shlex.split(config.flags)]


def plan(config):
    """The jobs, round by round and seed by seed: what is stopped early has the same seeds of all
    systems."""
    jobs = []
    for round, seed, system in itertools.product(
            range(1, config.rounds + 1), range(config.seeds), config.only or SYSTEMS):
        if round > 1 and system in FIGURES_ONLY and not config.only:
            continue
        jobs.append(job_of(config, system, seed, round))
    return jobs


def job_of(config, system, seed, round):
    words = train_words(config, system, seed, round)
    folder, first = run_folder(config, system, seed, round), f"{system}-seed{seed}"
    before, steps = steps_of(config, round)
    scoring = ["--score", system, str(seed), str(round), "--steps", str(config.steps),
               "--out", config.out, "--data", config.data, "--limit", str(config.limit),
               f"--flags={config.flags}"]
    return Job(f"{first} to {before + steps} steps", folder, (
        (sys.executable, str(HERE / "train.py"), *words, "--out", str(folder)),
        (sys.executable, "-m", "experiments.ablate", *scoring)),
        {"train": words, "limit": config.limit}, steps,
        f"{first} to {before} steps" if before else "")


def environment(slot):
    """Of the job in this place: a core or a GPU of its own; it ends when this process does,
    however it ends (distributed.launch_local)."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
        map(str, range(torch.cuda.device_count())))
    own = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % len(gpus.split(","))]} if gpus else {
        "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PARENT_HOLDS_STDIN": "yes", **own}


class Running:
    """A job under way: its commands one by one, what they print in <folder>/output.txt.
    whole: it was not begun before."""

    def __init__(self, job, slot):
        self.whole = not job.folder.exists()
        self.job, self.slot, self.started = job, slot, time.time()
        self.commands, self.file = list(job.commands), job.folder / "output.txt"
        job.folder.mkdir(parents=True, exist_ok=True)
        self._next()

    def _next(self):
        command = self.commands.pop(0)
        with open(self.file, "a") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            # A session of its own: Ctrl-C reaches this program only, which then stops the jobs.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env=environment(self.slot), start_new_session=True)

    def poll(self):
        """None while it runs; 0 when all commands are done; else how the one that failed ended."""
        code = self.process.poll()
        if code == 0 and self.commands:
            self._next()
            return None
        return code

    def tail(self, lines=15):
        """The end of what was printed."""
        return "\n".join(self.file.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, seconds=60):
        """Waits for the end after SIGTERM, on which train.py saves the step under way."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_jobs(jobs, at_once, say=print, done=lambda job: None, poll=0.5, tell_every=300.0):
    """Keeps `at_once` jobs going until all are finished; done(job) after each.  A job that fails is
    told with the end of its output, those that come after it are left out, and the others go on.
    -> names of those that failed or were left out.
    Those under way are stopped when this is left by an exception."""
    waiting = [job for job in jobs if not job.finished()]
    n, before, took, failed, running = len(waiting), len(jobs) - len(waiting), [], [], []
    say(f"{len(jobs)} runs, {before} of them finished before; {at_once} at a time")
    begun = told = time.time()
    try:
        while waiting or running:
            while len(running) < at_once and (job := ready(waiting, running)):
                waiting.remove(job)
                if job.after in failed:
                    failed.append(job.name)
                    say(f"{job.name} is left out, as {job.after} failed")
                    continue
                slot = min({*range(at_once)} - {r.slot for r in running})
                running.append(Running(job, slot))
            for r in list(running):
                code = r.poll()
                if code is None:
                    continue
                running.remove(r)
                spent = time.time() - r.started
                if r.whole and not code:
                    took.append((spent, r.job.steps))
                if code:
                    failed.append(r.job.name)
                    say(f"{r.job.name} FAILED (exit status {code}), the end of {r.file}:\n"
                        f"{r.tail()}")
                else:
                    done(r.job)
                say(f"[{len(jobs) - len(waiting) - len(running)}/{len(jobs)}] {r.job.name}: "
                    f"{duration(spent)}; {remaining(took, waiting, running, at_once)}")
            if running and time.time() - told > tell_every:
                told = time.time()
                for r in running:
                    say(f"  {r.job.name}, {duration(told - r.started)}: {r.tail(1).strip()[:80]}")
            if running:
                time.sleep(poll)
    finally:
        if running:
            say(f"stopping {', '.join(r.job.name for r in running)}; the same command goes on")
        for r in running:
            r.process.terminate()
        for r in running:
            r.stop()
    if n:
        say(f"{n} runs in {duration(time.time() - begun)}"
            + (f"; FAILED: {', '.join(failed)}; the same command tries again" if failed else ""))
    return failed


def ready(waiting, running):
    """The first job that comes after none of the others; None where all do."""
    ahead = {job.name for job in waiting} | {r.job.name for r in running}
    return next((job for job in waiting if job.after not in ahead), None)


def remaining(took, waiting, running, at_once):
    """'ETA 5 h 12 min' by what a step took so far, scoring included.  took: (seconds, steps) of
    jobs from their first step to their last."""
    if not took:
        return "ETA when one has run whole" if waiting or running else "ETA 0 s"
    pace = sum(seconds for seconds, _ in took) / sum(steps for _, steps in took)
    left = sum(pace * job.steps for job in waiting)
    left += sum(max(0, pace * r.job.steps - (time.time() - r.started)) for r in running)
    return f"ETA {duration(left / at_once)}"


# ---------------------------------------------------------------- scoring one run
def prepare(config, say=print):
    """Clips and their kept features, once, on all cores; the runs find them."""
    if Path(config.data) == Path("media/miniature"):
        miniature.make(config.data)
    model = load(train_config(config, "complete", 0, 1))
    records = [r for split in ("train", "test")
               for r in data.read_manifest(data.find_manifest(config.data, split))]
    keep_features(model, records, Path(config.data) / "features", log=say)


def train_config(config, system, seed, round):
    return cli.parse(train.TrainConfig, train.__doc__, train_words(config, system, seed, round))[0]


def load(trained, checkpoint=None):
    """The model of a TrainConfig, untrained or of a checkpoint, as train.py and eval.py have it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = distributed.precision("", trained.model, device)[0]
    if checkpoint is None:
        return Favor.from_config(trained.method(), dtype, device).eval()
    return Favor.from_pretrained(checkpoint, dtype, device)


def limited(records, limit):
    """At most so many of each task (0: all), by lot, the same for every run."""
    def some(task):
        if not limit or len(task) <= limit:
            return task
        return [task[i] for i in sorted(np.random.default_rng(0).permutation(len(task))[:limit])]
    return [r for name in dict.fromkeys(r.task for r in records)
            for r in some([r for r in records if r.task == name])]


def vectors_a_clip(method, seconds=5):
    """LLM vectors of a clip with picture and sound."""
    frames = math.ceil(seconds * method.fps)
    windows = math.ceil(frames / (method.window_frames or frames))
    return windows * method.queries * (1 if method.sync else 2)


def rows_of(predictions, view):
    """A row {task, part, score, n, low, high} for each task and its parts ("": all of it)."""
    rows = []
    for task, group in reports.by_task(predictions).items():
        for part, some in (("", group), *sorted(reports.parts_of(group).items())):
            score = next(iter(metrics.score(some, view).values()))
            rows.append({"task": task, "part": part, "score": score.value, "n": score.n,
                         "low": score.low, "high": score.high})
    return rows


def score(config, system, seed, round, say=print):
    """Scores a finished training at its end, in round 1 at half of its steps, too -> its
    scores.json; at the end also the queries' cosine, of `complete` videoqa at other frame rates,
    and of round 1 of seed 0 the pictures (figures.look_inside) in OUT/inside/<system>.npz."""
    job, rows = job_of(config, system, seed, round), []
    trained = train_config(config, system, seed, round)
    view = views_of("favor", trained.mask, ("both",))[0]
    records = limited(data.read_manifest(data.find_manifest(config.data, "test")),
                      config.limit)
    read = partial(keep_features, folder=Path(config.data) / "features", workers=1, log=say)
    before, steps = steps_of(config, round)
    for step in (steps // 2, steps) if round == 1 else (steps,):
        checkpoint = job.folder / f"step-{step:06d}"
        model = load(trained, checkpoint)
        made, method = hub.read_json(checkpoint / "favor.json"), model.config
        facts = {"system": system, "seed": seed, "step": before + step,
                 "parameters": sum(p.numel() for p in model.trained_parameters()),
                 "vectors": vectors_a_clip(method), "commit": made.get("commit"),
                 "dirty": made.get("dirty")}
        store = read(model, records)
        predictions, missing = evaluate(model, records, store, (view,), log=say)
        reports.write_report(checkpoint / "predictions.jsonl", predictions, (view,), missing,
                             {"checkpoint": str(checkpoint), "view": view})
        rows += [facts | row for row in rows_of(predictions, view)]
    matrices = figures.query_cosines(model, records, store, trained.mask)
    rows += [facts | {"task": task, "part": "query cosine", "n": n, "low": None, "high": None,
                      "score": figures.off_diagonal_mean(matrix)}
             for task, (matrix, n) in matrices.items()]
    if seed == 0 and round == 1:
        figures.look_inside(model, records, store, trained.mask, matrices,
                            Path(config.out) / "inside" / f"{system}.npz")
    if system == "complete":
        rows += [facts | row for row in at_other_rates(model, records, read, say)]
    hub.write_json(job.folder / "scores.json", {"settings": job.settings, "rows": rows})


def at_other_rates(model, records, read, say=print):
    """Rows of videoqa with its frames read at other rates, the number of frames a window as trained
    (Fig. 3c).  These clips are silent: with sound another rate would also put another number of
    vectors into a frame, at positions that were never trained."""
    asked, method, rows = [r for r in records if r.task == "videoqa"], model.config, []
    for fps in FPS if asked else ():
        model.config = dataclasses.replace(method, fps=fps)
        predictions, _ = evaluate(model, asked, read(model, asked), ("both",), log=say)
        rows.append(rows_of(predictions, "both")[0] | {
            "part": f"at {fps:g} Hz", "vectors": vectors_a_clip(model.config)})
    model.config = method
    return rows


# ---------------------------------------------------------------- results, the program
def collect(out):
    """results.jsonl and results.md of all runs in `out` that are scored -> Results."""
    rows = [row for file in Path(out).glob("*-seed*/**/scores.json")
            for row in json.loads(file.read_text())["rows"]]
    results = Results(in_order(rows))
    write_text(Path(out) / "results.jsonl", jsonl(results.rows))
    write_text(Path(out) / "results.md", tables(results) + "\n")
    return results


def in_order(rows):
    """By system, seed and step; what is of the same run stays as it was."""
    order = {name: i for i, name in enumerate(SYSTEMS)}
    return sorted(rows, key=lambda row: (order[row["system"]], row["seed"], row["step"]))


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(config):
    jobs, say = plan(config), partial(print, flush=True)
    if config.plan:
        for job in jobs:
            say("\n".join(shlex.join(command) for command in job.commands))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):               # leave by way of run_jobs' finally
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    started = time.time()
    if not all(job.finished() for job in jobs):
        if lacking := figures.no_figures(config.out):             # not first after some hours
            say(lacking)
        prepare(config, say)
    failed = run_jobs(jobs, config.jobs or torch.cuda.device_count() or cli.cores(), say,
                      done=lambda job: collect(config.out))
    results = collect(config.out)
    if results.stages:
        say(claim_table(results) + "\n")
    if (COMMITTED / "results.jsonl").exists() and (
            again := reproduction_table(results, Results.read(COMMITTED))):
        say(f"Against {COMMITTED}/results.jsonl: {again}\n")
    say(f"{config.out}/results.jsonl, results.md")
    if lacking := figures.no_figures(config.out):
        say(lacking)
    else:
        figures.draw_all(config.out, say)
    say(f"{duration(time.time() - started)} in all")
    return 1 if failed else 0


if __name__ == "__main__":
    settings = resolve_config(*cli.parse(AblateConfig, __doc__))
    if settings.score:
        distributed.launch_local(1)                        # ends when the program that started it does
        system, *numbers = settings.score
        sys.exit(score(settings, system, *map(int, numbers)))
    sys.exit(main(settings))
