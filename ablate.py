"""The paper's ablations in miniature: trains and scores every system with several seeds, and draws
the tables and figures from what came out.  Paper Tables 2, 3, 5, 9, 10 and Figs 3, 4, 5.

     python ablate.py                       all systems, 5 seeds (3 of four of them); hours
     python ablate.py --quick               fewer systems, seeds, steps and questions: every figure
     python ablate.py --only complete future --seeds 10        some systems, more seeds
     python ablate.py --double runs/ablate  trains finished runs on, as long again
     python ablate.py --plan                prints the commands and runs nothing
     python figures.py runs/ablate          draws the figures again

     SYSTEMS x seeds --train.py, then --score, one after the other--> OUT/<system>-seed<k>/
       scores.json --all runs--> OUT/results.jsonl, a line a (system, seed, task, part, step)
                   --ablate_tables.py--> OUT/results.md   --figures.py--> OUT/*.png
The same command goes on where it was killed; runs whose scores.json is there are not run again.
Each run is scored at half of its steps, too: what separates early may be speed of learning only.
--double goes further that way: the weights of a finished run, a new optimiser, warm-up and cosine,
other draws of the data, as many steps as the run has had, scored into OUT of its own, where the
earlier end is "half".  It can be repeated, until doubling changes nothing any more.

Public: AblateConfig, settled, Job, plan, run_jobs, prepare, score, collect."""

import cli

cli.quiet_threads()

import dataclasses  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import figures  # noqa: E402
import hub  # noqa: E402
import miniature  # noqa: E402
import processes  # noqa: E402
import tables as reports  # noqa: E402
import train  # noqa: E402
from ablate_tables import FPS, SYSTEMS, Results, claim_table, tables  # noqa: E402
from favor import Favor  # noqa: E402
from features import keep_features  # noqa: E402
from runlog import duration  # noqa: E402

HERE = Path(__file__).parent

# drawn only in figures, where so many seeds are enough
FIGURES_ONLY = {"k1": 3, "k2": 3, "lambda-0.1": 3, "lambda-1": 3}
# What is quick: every figure has its points, but hardly anything is learnt.
QUICK = {"seeds": 1, "steps": 160, "limit": 100, "out": "runs/ablate-quick", "only": (
    "complete", "no-diversity", "no-causal", "no-windows-2q", "no-sync", "k1", "lambda-10")}


@dataclass(frozen=True)
class AblateConfig:
    seeds: int = 5  # of every system: 0, 1 ...
    steps: int = 1100  # of every training; scored at half of them, too
    out: str = "runs/ablate"  # where runs, results, tables and figures go
    only: tuple = ()  # names of systems (default: all; --plan lists them)
    jobs: int = 0  # trainings at a time (0: one a core, or one a GPU)
    limit: int = 250  # test questions a task, by lot (0: all)
    data: str = "media/miniature"  # folder with train.jsonl and test.jsonl
    flags: str = ""  # more flags for every train.py: --flags="--batch 16"
    quick: bool = False  # a quarter of an hour on two cores: what is not given is set small
    double: str = ""  # OUT of finished runs: train them as long again (OUT-<steps>, or --out)
    plan: bool = False  # print the commands, run nothing
    score: tuple = ()  # SYSTEM SEED: score one finished training (used by the program itself)

    def __post_init__(self):
        unknown = sorted({*self.only, *self.score[:1]} - {*SYSTEMS})
        if unknown:
            raise ValueError(f"unknown system {unknown[0]!r}; there are {', '.join(SYSTEMS)}")
        if self.seeds < 1 or self.steps < 2 or self.steps % 2:
            raise ValueError(f"--seeds {self.seeds} --steps {self.steps}; wanted a seed at least, "
                             "and an even number of steps (half of them are scored, too)")


def settled(config, given):
    """The config with QUICK's values where the command line says nothing, and as many steps as the
    runs to double have had.  Raises ValueError where there are none or --steps says otherwise."""
    small = {k: v for k, v in QUICK.items() if k not in given} if config.quick else {}
    if config.double:
        file = Path(config.double) / "results.jsonl"
        if not file.exists():
            raise ValueError(f"--double {config.double}: no {file}; wanted the folder of runs that "
                             "are scored (--out of an earlier ablate.py)")
        small["steps"] = Results.read(config.double).steps
        if "steps" in given and config.steps != small["steps"]:
            raise ValueError(f"--double {config.double} --steps {config.steps}; those runs have "
                             f"had {small['steps']}, and are trained as long again: leave --steps "
                             "out")
        if "out" in given and Path(config.out) == Path(config.double):
            raise ValueError(f"--double {config.double} --out {config.out}; wanted another folder")
        if "out" not in given:
            base = config.double.rstrip("/").removesuffix(f"-{small['steps']}")
            small["out"] = f"{base}-{2 * small['steps']}"
    return dataclasses.replace(config, **small)


# ---------------------------------------------------------------- the runs
@dataclass(frozen=True)
class Job:
    """Commands that are run one after the other in OUT/<system>-seed<k>/; settings: what
    scores.json must have been made with to count."""
    name: str
    folder: Path
    commands: tuple
    settings: dict

    def finished(self):
        file = self.folder / "scores.json"
        return file.exists() and json.loads(file.read_text())["settings"] == self.settings


def train_words(config, system, seed):
    """Words behind `train.py` of one training, all but its --out."""
    start = ["--seed", str(seed)]
    if config.double:                              # a seed that no earlier stage has drawn with
        start = ["--start-from", f"{config.double}/{system}-seed{seed}/last",
                 "--seed", str(seed + config.steps)]
    return [*shlex.split(SYSTEMS[system][1]), *start, "--steps", str(config.steps),
            "--warmup", str(min(100, config.steps // 4)), "--save-every", str(config.steps // 2),
            "--keep", "0", "--processes", "1", "--micro-batch", "16", "--show", "0",
            "--no-tensorboard", "--no-test", "--data", config.data, *shlex.split(config.flags)]


def plan(config):
    """The jobs, seed by seed: what is stopped early has the same seeds of all systems.  With
    --double those whose earlier run is finished."""
    jobs = []
    for seed, system in itertools.product(range(config.seeds), config.only or SYSTEMS):
        if not config.only and seed >= FIGURES_ONLY.get(system, config.seeds):
            continue
        words, name = train_words(config, system, seed), f"{system}-seed{seed}"
        folder = Path(config.out) / name
        if config.double and not (Path(config.double) / name / "scores.json").exists():
            continue
        scoring = ["--score", system, str(seed), "--steps", str(config.steps), "--out", config.out,
                   "--data", config.data, "--limit", str(config.limit), f"--flags={config.flags}",
                   *(["--double", config.double] if config.double else [])]
        jobs.append(Job(name, folder, (
            (sys.executable, str(HERE / "train.py"), *words, "--out", str(folder)),
            (sys.executable, str(HERE / "ablate.py"), *scoring)),
            {"train": words, "limit": config.limit}))
    return jobs


def environment(slot):
    """Of the job in this place: a core or a GPU of its own; it ends when this process does,
    however it ends (processes.one_a_core)."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
        map(str, range(torch.cuda.device_count())))
    own = {"CUDA_VISIBLE_DEVICES": gpus.split(",")[slot % len(gpus.split(","))]} if gpus else {
        "OMP_NUM_THREADS": "1"}
    return {**os.environ, "PARENT_HOLDS_STDIN": "yes", **own}


class Running:
    """A job under way: its commands one by one, what they print in <folder>/output.txt."""

    def __init__(self, job, slot):
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
    told with the end of its output, and the others go on.  -> names of the failed ones.
    Those under way are stopped when this is left by an exception."""
    waiting = [job for job in jobs if not job.finished()]
    n, before, took, failed, running = len(waiting), len(jobs) - len(waiting), [], [], []
    say(f"{len(jobs)} runs, {before} of them finished before; {at_once} at a time")
    begun = told = time.time()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                slot = min({*range(at_once)} - {r.slot for r in running})
                running.append(Running(waiting.pop(0), slot))
            for r in list(running):
                code = r.poll()
                if code is None:
                    continue
                running.remove(r)
                took.append(time.time() - r.started)
                if code:
                    failed.append(r.job.name)
                    say(f"{r.job.name} FAILED (exit status {code}), the end of {r.file}:\n"
                        f"{r.tail()}")
                else:
                    done(r.job)
                say(f"[{before + len(took)}/{len(jobs)}] {r.job.name}: {duration(took[-1])}; "
                    f"{remaining(took, len(waiting), running, at_once)}")
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


def remaining(took, waiting, running, at_once):
    """'ETA 5 h 12 min' by the mean of what runs took so far."""
    mean = sum(took) / len(took)
    left = waiting * mean + sum(max(0, mean - (time.time() - r.started)) for r in running)
    return f"ETA {duration(left / at_once)}"


# ---------------------------------------------------------------- scoring one run
def prepare(config, say=print):
    """Clips and their kept features, once, on all cores; the runs find them."""
    if Path(config.data) == Path(evaluation.EvalConfig.data):
        miniature.make(config.data, log=say)
    model = load(train_config(config, "complete", 0))
    records = [r for split in ("train", "test")
               for r in data.read_manifest(evaluation.find_manifest(config.data, split))]
    keep_features(model, records, Path(config.data) / "features", log=say)


def train_config(config, system, seed):
    return cli.parse(train.TrainConfig, train.__doc__, train_words(config, system, seed))[0]


def load(trained, checkpoint=None):
    """The model of a TrainConfig, untrained or of a checkpoint, as train.py and eval.py have it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = processes.precision("", trained.model, device)[0]
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
    windows = math.ceil(frames / (method.windows or frames))
    return windows * method.queries * (1 if method.sync else 2)


def rows_of(predictions, view):
    """A row {task, part, score, n, low, high} for each task and its parts ("": all of it)."""
    rows = []
    for task, group in reports.by_task(predictions).items():
        for part, some in (("", group), *sorted(reports.parts_of(group).items())):
            score = next(iter(reports.scores_of(some, view).values()))
            rows.append({"task": task, "part": part, "score": score.value, "n": score.n,
                         "low": score.low, "high": score.high})
    return rows


def score(config, system, seed, say=print):
    """Scores OUT/<system>-seed<k> at half of its steps and at the end -> its scores.json; of the
    last checkpoint also the queries' cosine, of `complete` videoqa at other frame rates, and of
    seed 0 the pictures (figures.look_inside) in OUT/inside/<system>.npz.  With --double only at the
    end: half is where the earlier run ended, and `collect` has it from there."""
    job = next(j for j in plan(dataclasses.replace(config, only=(system,), seeds=seed + 1))
               if j.name == f"{system}-seed{seed}")
    trained, rows = train_config(config, system, seed), []
    view = evaluation.views_of("favor", trained.mask, ("both",))[0]
    records = limited(data.read_manifest(evaluation.find_manifest(config.data, "test")),
                      config.limit)
    read = partial(keep_features, folder=Path(config.data) / "features", workers=1, log=say)
    before, total, scored = 0, config.steps, (config.steps // 2, config.steps)
    if config.double:
        before, total, scored = config.steps, 2 * config.steps, (config.steps,)
    for step in scored:
        checkpoint = job.folder / f"step-{step:06d}"
        model = load(trained, checkpoint)
        made, method = hub.read_json(checkpoint / "favor.json"), model.config
        facts = {"system": system, "seed": seed, "step": before + step, "steps": total,
                 "parameters": sum(p.numel() for p in model.trained_parameters()),
                 "vectors": vectors_a_clip(method), "commit": made.get("commit"),
                 "dirty": made.get("dirty")}
        store = read(model, records)
        predictions, missing = evaluation.evaluate(model, records, store, (view,), log=say)
        reports.write_report(checkpoint / "predictions.jsonl", predictions, (view,), missing,
                             {"checkpoint": str(checkpoint), "view": view})
        rows += [facts | row for row in rows_of(predictions, view)]
    matrices = figures.query_cosines(model, records, store, trained.mask)
    rows += [facts | {"task": task, "part": "query cosine", "n": n, "low": None, "high": None,
                      "score": figures.off_diagonal_mean(matrix)}
             for task, (matrix, n) in matrices.items()]
    if seed == 0:
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
        predictions, _ = evaluation.evaluate(model, asked, read(model, asked), ("both",), log=say)
        rows.append(rows_of(predictions, "both")[0] | {
            "part": f"at {fps:g} Hz", "vectors": vectors_a_clip(model.config)})
    model.config = method
    return rows


# ---------------------------------------------------------------- results, the program
def collect(out, double=""):
    """results.jsonl and results.md of all runs in `out` that are scored -> Results.  double: where
    their earlier stages are, whose rows go before theirs."""
    rows = [row for file in Path(out).glob("*-seed*/scores.json")
            for row in json.loads(file.read_text())["rows"]]
    if double:
        total = {(row["system"], row["seed"]): row["steps"] for row in rows}
        rows += [row | {"steps": total[run]} for row in Results.read(double).rows
                 if (run := (row["system"], row["seed"])) in total]
    order = {name: i for i, name in enumerate(SYSTEMS)}
    rows.sort(key=lambda row: (order[row["system"]], row["seed"], row["step"]))
    reports.write_text(Path(out) / "results.jsonl",
                       "".join(json.dumps(row) + "\n" for row in rows))
    results = Results(rows)
    reports.write_text(Path(out) / "results.md", tables(results) + "\n")
    return results


def main(config):
    jobs, say = plan(config), partial(print, flush=True)
    if not jobs:
        raise SystemExit(f"--double {config.double}: no finished run of these systems and seeds")
    if config.plan:
        for job in jobs:
            say("\n".join(shlex.join(command) for command in job.commands))
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):               # leave by way of run_jobs' finally
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    started = time.time()
    if not all(job.finished() for job in jobs):
        prepare(config, say)
    failed = run_jobs(jobs, config.jobs or torch.cuda.device_count() or cli.cores(), say,
                      done=lambda job: collect(config.out, config.double))
    results = collect(config.out, config.double)
    say(f"{claim_table(results)}\n{config.out}/results.jsonl, results.md")
    try:
        figures.draw_all(config.out, say)
    except ImportError as error:
        say(f'no figures ({error}): pip install -e ".[plot]", then python figures.py {config.out}')
    say(f"{duration(time.time() - started)} in all")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        settings = settled(*cli.parse(AblateConfig, __doc__))
    except ValueError as error:
        sys.exit(str(error))
    if settings.score:
        processes.one_a_core(1)                        # ends when the program that started it does
        sys.exit(score(settings, settings.score[0], int(settings.score[1])))
    sys.exit(main(settings))
