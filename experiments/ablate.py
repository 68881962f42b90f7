"""The paper's ablations in miniature: trains and scores every system with several seeds, then draws
tables and figures from the results. Paper Tables 2, 3, 5, 9, 10 and Figs 3, 4, 5.

     python -m experiments.ablate             all systems, 5 seeds, two stages (four systems: one)
     python -m experiments.ablate --quick     few systems, one seed, few steps; draws every figure
     python -m experiments.ablate --only complete future --seeds 10       some systems, more seeds
     python -m experiments.ablate --only complete no-sync --seeds 3 --stages 3    trained for longer
     python -m experiments.ablate --plan      prints the commands and runs nothing
     python -m experiments.figures runs/ablate       draws the figures again

     stage 1: SYSTEMS x seeds --train.py, then --score--> OUT/<system>-seed<k>/scores.json
     stage 2: the same trained on for as long again   --> OUT/<system>-seed<k>/to-2200/scores.json
              --all of them--> OUT/results.jsonl, one line per (system, seed, step, task, part)
              --experiments/tables.py--> OUT/results.md   --experiments/figures.py--> OUT/*.png
After an interruption the same command continues; runs that have their scores.json are not repeated.

Why there are stages: an early difference may only be one in the speed of learning. Stage 1 is also
scored at half of its steps. Each later stage doubles the steps that a run has had: it starts from
the run's weights, with a new optimiser, warm-up and cosine decay, and with other samples of the
data. Where its table shows no change, the systems have converged.

Public: AblateConfig, resolve_config, Job, plan, run_jobs, prepare, score, collect."""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split


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
from favor import Favor, habits
from miniature import generate
from runtime import cli, distributed, hub
from runtime.feature_cache import cache_features
from runtime.log import duration

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "docs" / "ablate"              # the results that docs/ablations.md shows

FIGURES_ONLY = ("k1", "k2", "lambda-0.1", "lambda-1")     # only figures show these: stage 1 only
# --quick: every figure has its points, but hardly anything is learnt.
QUICK = {"seeds": 1, "steps": 160, "stages": 1, "limit": 100, "out": "runs/ablate-quick", "only": (
    "complete", "no-diversity", "no-causal", "no-windows-2q", "no-sync", "k1", "lambda-10")}


@dataclass(frozen=True)
class AblateConfig:
    # -- data
    data: str = "media/miniature"  # <folder> folder with train.jsonl and test.jsonl
    limit: int = 250  # <questions> test questions that are sampled of each task; 0 takes all
    # -- method
    only: tuple = ()  # <system> names of the systems to train; --plan lists them (default: all)
    seeds: int = 5  # <n> seeds of each system: 0, 1 and so on
    # -- optimisation
    steps: int = 1100  # <n> optimiser steps of stage 1, which is also scored at half of them
    stages: int = 2  # <n> stages; each after the first doubles the steps: 1100, 2200, 4400
    flags: str = ""  # <flags> more flags for each train.py, such as --flags="--batch 16"
    quick: bool = False  # small values for all flags that are not given: minutes on two cores
    # -- logging
    out: str = "runs/ablate"  # <folder> folder of the runs, results, tables and figures
    plan: bool = False  # print the commands and run nothing
    # -- distributed
    jobs: int = 0  # <n> trainings at a time; 0 runs one per GPU, or without GPUs one per core
    # -- for the program itself
    score: tuple = ()  # <word> system, seed and stage of a finished training that is to be scored

    def __post_init__(self):
        unknown = sorted({*self.only, *self.score[:1]} - {*SYSTEMS})
        if unknown:
            raise ValueError(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
        if self.seeds < 1 or self.stages < 1 or self.steps < 2 or self.steps % 2:
            raise ValueError(f"--seeds {self.seeds} --stages {self.stages} --steps {self.steps}; "
                             "wanted at least one seed and one stage, and an even number of steps "
                             "(the run is also scored at half of them)")


def resolve_config(config, given):
    """The config with QUICK's values for the fields that the command line does not give."""
    small = {k: v for k, v in QUICK.items() if k not in given} if config.quick else {}
    return dataclasses.replace(config, **small)


# ---------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Job:
    """One stage of one run: commands that run one after the other."""
    name: str
    folder: Path
    commands: tuple
    settings: dict       # scores.json in the folder counts only if it was made with these
    steps: int
    after: str = ""      # name of the job that must have ended before

    def finished(self):
        """Whether its scores are there."""
        file = self.folder / "scores.json"
        return file.exists() and hub.read_json(file)["settings"] == self.settings


def steps_of(config, stage):
    """Optimiser steps of a stage 1, 2 ... -> those of all stages before it, its own."""
    return (0, config.steps) if stage == 1 else (2 ** (stage - 2) * config.steps,) * 2


def run_folder(config, system, seed, stage):
    """The folder of one stage of one run."""
    total, first = sum(steps_of(config, stage)), Path(config.out) / f"{system}-seed{seed}"
    return first if stage == 1 else first / f"to-{total}"


def train_words(config, system, seed, stage):
    """The arguments of `train.py` for one training, except --out."""
    before, steps = steps_of(config, stage)
    start = ["--seed", str(seed + before)]        # samples that no earlier stage has had
    if before:
        start += ["--start-from", str(run_folder(config, system, seed, stage - 1) / "last")]
    return [*shlex.split(SYSTEMS[system][1]), *start, "--steps", str(steps),
            "--warmup", str(min(100, steps // 4)), "--save-every", str(steps // 2),
            "--keep", "0", "--processes", "1", "--micro-batch", "16", "--show", "0",
            "--no-tensorboard", "--no-test", "--data", config.data, *shlex.split(config.flags)]


def plan(config):
    """The jobs, stage by stage and seed by seed, so that an interrupted run has the same seeds of
    all systems."""
    jobs = []
    for stage, seed, system in itertools.product(
            range(1, config.stages + 1), range(config.seeds), config.only or SYSTEMS):
        if stage > 1 and system in FIGURES_ONLY and not config.only:
            continue
        jobs.append(job_of(config, system, seed, stage))
    return jobs


def job_of(config, system, seed, stage):
    """The Job of one stage of one run."""
    words = train_words(config, system, seed, stage)
    folder, first = run_folder(config, system, seed, stage), f"{system}-seed{seed}"
    before, steps = steps_of(config, stage)
    scoring = ["--score", system, str(seed), str(stage), "--steps", str(config.steps),
               "--out", config.out, "--data", config.data, "--limit", str(config.limit),
               f"--flags={config.flags}"]
    return Job(f"{first} to {before + steps} steps", folder, (
        (sys.executable, str(ROOT / "train.py"), *words, "--out", str(folder)),
        (sys.executable, "-m", "experiments.ablate", *scoring)),
        {"train": words, "limit": config.limit}, steps,
        f"{first} to {before} steps" if before else "")


def environment(slot):
    """Environment variables of the job in this slot, which gets a core or a GPU of its own. The job
    ends when this process ends, in whatever way (distributed.launch_local)."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
        map(str, range(torch.cuda.device_count())))
    own = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % len(gpus.split(","))]} if gpus else {
        "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PARENT_HOLDS_STDIN": "yes", "PYTHONPATH": path, **own}


class Running:
    """A job under way. Its commands run one by one and print into <folder>/output.txt.
    whole: whether the job starts from its beginning."""

    def __init__(self, job, slot):
        self.whole = not job.folder.exists()
        self.job, self.slot, self.started = job, slot, time.time()
        self.commands, self.file = list(job.commands), job.folder / "output.txt"
        job.folder.mkdir(parents=True, exist_ok=True)
        self._next()

    def _next(self):
        command = self.commands.pop(0)
        with open(self.file, "a", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(command)}\n")
            output.flush()
            # In a session of its own, so that Ctrl-C reaches this program, which stops the jobs.
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                env=environment(self.slot), start_new_session=True)

    def poll(self):
        """None while it runs, 0 when all is done, else the exit status of the failed command."""
        code = self.process.poll()
        if code == 0 and self.commands:
            self._next()
            return None
        return code

    def tail(self, lines=15):
        """The last lines of its output."""
        return "\n".join(self.file.read_text("utf-8", errors="replace").splitlines()[-lines:])

    def stop(self, seconds=60):
        """Waits for the end after SIGTERM, on which train.py saves its state; then kills it."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_jobs(jobs, at_once, log=print, done=lambda job: None, poll=0.5, log_every=300.0):
    """Keeps `at_once` jobs running until all are finished and calls done(job) after each. A job
    that fails is logged with the end of its output; the jobs that come after it are left out, and
    the others go on. -> names of the jobs that failed or were left out.
    An exception stops all running jobs."""
    waiting = [job for job in jobs if not job.finished()]
    n, before, took, failed, running = len(waiting), len(jobs) - len(waiting), [], [], []
    log(f"{len(jobs)} runs, {before} of them finished before; {at_once} at a time")
    begun = logged = time.time()
    try:
        while waiting or running:
            while len(running) < at_once and (job := ready(waiting, running)):
                waiting.remove(job)
                if job.after in failed:
                    failed.append(job.name)
                    log(f"{job.name} is left out, as {job.after} failed")
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
                    log(f"{r.job.name} FAILED (exit status {code}), the end of {r.file}:\n"
                        f"{r.tail()}")
                else:
                    done(r.job)
                log(f"[{len(jobs) - len(waiting) - len(running)}/{len(jobs)}] {r.job.name}: "
                    f"{duration(spent)}; {remaining(took, waiting, running, at_once)}")
            if running and time.time() - logged > log_every:
                logged = time.time()
                for r in running:
                    log(f"  {r.job.name}, {duration(logged - r.started)}: "
                        f"{r.tail(1).strip()[:80]}")
            if running:
                time.sleep(poll)
    finally:
        if running:
            log(f"stopping {', '.join(r.job.name for r in running)}; the same command continues")
        for r in running:
            r.process.terminate()
        for r in running:
            r.stop()
    if n:
        log(f"{n} runs in {duration(time.time() - begun)}"
            + (f"; FAILED: {', '.join(failed)}; the same command tries again" if failed else ""))
    return failed


def ready(waiting, running):
    """The first job that need not wait for any other; None if all must."""
    ahead = {job.name for job in waiting} | {r.job.name for r in running}
    return next((job for job in waiting if job.after not in ahead), None)


def remaining(took, waiting, running, at_once):
    """'ETA 5 h 12 min', from the mean time per step so far, scoring included. took: (seconds,
    steps) of the jobs that ran here from their first step to their last."""
    if not took:
        return "ETA after the first complete run" if waiting or running else "ETA 0 s"
    pace = sum(seconds for seconds, _ in took) / sum(steps for _, steps in took)
    left = sum(pace * job.steps for job in waiting)
    left += sum(max(0, pace * r.job.steps - (time.time() - r.started)) for r in running)
    return f"ETA {duration(left / at_once)}"


# ---------------------------------------------------------------- scoring one run
def prepare(config, log=print):
    """Makes the clips and caches their features once, on all cores, for all runs."""
    if Path(config.data) == Path(train.MINIATURE):
        generate.make(config.data)
    model = load(train_config(config, "complete", 0, 1))
    records = [r for split in ("train", "test")
               for r in data.read_manifest(data.find_manifest(config.data, split))]
    cache_features(model, records, Path(config.data) / "features", log=log)


def train_config(config, system, seed, stage):
    """The TrainConfig of one stage of one run."""
    return cli.parse(train.TrainConfig, train.__doc__, train_words(config, system, seed, stage))[0]


def load(trained, checkpoint=None):
    """The model of a TrainConfig, untrained or from a checkpoint, with the dtype of train.py."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = distributed.precision("", trained.model, device,
                                  habits(trained.model).dtype_on_cpu)[0]
    if checkpoint is None:
        return Favor.from_config(trained.method(), dtype, device).eval()
    return Favor.from_pretrained(checkpoint, dtype, device)


def limited(records, limit):
    """At most `limit` records per task (0: all), sampled, the same ones for every run."""
    def some(task):
        if not limit or len(task) <= limit:
            return task
        return [task[i] for i in sorted(np.random.default_rng(0).permutation(len(task))[:limit])]
    return [r for name in dict.fromkeys(r.task for r in records)
            for r in some([r for r in records if r.task == name])]


def vectors_per_clip(method, seconds=5):
    """Number of LLM vectors of a clip with picture and sound."""
    frames = math.ceil(seconds * method.fps)
    windows = math.ceil(frames / (method.window_frames or frames))
    return windows * method.queries * (1 if method.sync else 2)


def rows_of(predictions, view):
    """One row {task, part, score, n, low, high} per task and part of it ("": the whole task)."""
    rows = []
    for task, group in reports.by_task(predictions).items():
        for part, some in (("", group), *sorted(reports.parts_of(group).items())):
            score = next(iter(metrics.score(some, view).values()))
            rows.append({"task": task, "part": part, "score": score.value, "n": score.n,
                         "low": score.low, "high": score.high})
    return rows


def score(config, system, seed, stage, log=print):
    """Scores a finished training at its end, in stage 1 also at half of its steps -> scores.json.
    At the end it also measures the queries' cosine and, for `complete`, videoqa at other rates.
    Stage 1 of seed 0 writes OUT/inside/<system>.npz for the figures (figures.look_inside)."""
    job, rows = job_of(config, system, seed, stage), []
    trained = train_config(config, system, seed, stage)
    view = views_of("favor", trained.mask, ("both",))[0]
    records = limited(data.read_manifest(data.find_manifest(config.data, "test")),
                      config.limit)
    read = partial(cache_features, folder=Path(config.data) / "features", workers=1, log=log)
    before, steps = steps_of(config, stage)
    for step in (steps // 2, steps) if stage == 1 else (steps,):
        checkpoint = job.folder / f"step-{step:06d}"
        model = load(trained, checkpoint)
        made, method = hub.read_json(checkpoint / "favor.json"), model.config
        facts = {"system": system, "seed": seed, "step": before + step,
                 "parameters": sum(p.numel() for p in model.trained_parameters()),
                 "vectors": vectors_per_clip(method), "commit": made.get("commit"),
                 "dirty": made.get("dirty")}
        cache = read(model, records)
        predictions, missing = evaluate(model, records, cache, (view,), log=log)
        reports.write_report(checkpoint / "predictions.jsonl", predictions, (view,), missing,
                             {"checkpoint": str(checkpoint), "view": view})
        rows += [facts | row for row in rows_of(predictions, view)]
    matrices = figures.query_cosines(model, records, cache, trained.mask)
    rows += [facts | {"task": task, "part": "query cosine", "n": n, "low": None, "high": None,
                      "score": figures.off_diagonal_mean(matrix)}
             for task, (matrix, n) in matrices.items()]
    if seed == 0 and stage == 1:
        figures.look_inside(model, records, cache, trained.mask, matrices,
                            Path(config.out) / "inside" / f"{system}.npz")
    if system == "complete":
        rows += [facts | row for row in at_other_rates(model, records, read, log)]
    hub.write_json(job.folder / "scores.json", {"settings": job.settings, "rows": rows})


def at_other_rates(model, records, read, log=print):
    """Rows of videoqa with its frames read at other rates, with as many frames per window as in
    training (Fig. 3c). These clips are silent; with sound, another rate would also put another
    number of vectors into a frame, at positions that were never trained."""
    asked, method, rows = [r for r in records if r.task == "videoqa"], model.config, []
    for fps in FPS if asked else ():
        model.config = dataclasses.replace(method, fps=fps)
        predictions, _ = evaluate(model, asked, read(model, asked), ("both",), log=log)
        rows.append(rows_of(predictions, "both")[0] | {
            "part": f"at {fps:g} Hz", "vectors": vectors_per_clip(model.config)})
    model.config = method
    return rows


# ---------------------------------------------------------------- results, the program
def collect(out):
    """Writes results.jsonl and results.md of all scored runs in `out` -> Results."""
    rows = [row for file in Path(out).glob("*-seed*/**/scores.json")
            for row in hub.read_json(file)["rows"]]
    results = Results(in_order(rows))
    hub.write_text(Path(out) / "results.jsonl", jsonl(results.rows))
    hub.write_text(Path(out) / "results.md", tables(results) + "\n")
    return results


def in_order(rows):
    """The rows sorted by system, seed and step; rows of the same run keep their order."""
    order = {name: i for i, name in enumerate(SYSTEMS)}
    return sorted(rows, key=lambda row: (order[row["system"]], row["seed"], row["step"]))


def jsonl(rows):
    """One JSON line per row."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main(config):
    """Runs the plan -> the program's exit status."""
    jobs, log = plan(config), partial(print, flush=True)
    if config.plan:
        for job in jobs:
            log("\n".join(shlex.join(command) for command in job.commands))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):               # ends run_jobs through its finally
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda got, _: sys.exit(128 + got))
    started = time.time()
    if not all(job.finished() for job in jobs):
        if lacking := figures.no_figures(config.out):             # not only after some hours
            log(lacking)
        prepare(config, log)
    failed = run_jobs(jobs, config.jobs or torch.cuda.device_count() or cli.cores(), log,
                      done=lambda job: collect(config.out))
    results = collect(config.out)
    if results.stages:
        log(claim_table(results) + "\n")
    if (COMMITTED / "results.jsonl").exists() and (
            again := reproduction_table(results, Results.read(COMMITTED))):
        log(f"Against {COMMITTED}/results.jsonl: {again}\n")
    log(f"{config.out}/results.jsonl, results.md")
    if lacking := figures.no_figures(config.out):
        log(lacking)
    else:
        figures.draw_all(config.out, log)
    log(f"{duration(time.time() - started)} in all")
    return 1 if failed else 0


if __name__ == "__main__":
    settings = resolve_config(*cli.parse(AblateConfig, __doc__))
    if settings.score:
        distributed.launch_local(1)                        # ends with the program that started it
        system, *numbers = settings.score
        sys.exit(score(settings, system, *map(int, numbers)))
    sys.exit(main(settings))
