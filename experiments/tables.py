"""Tables of the results of experiments/ablate.py: systems, statistics, the paper's claims.

     OUT/results.jsonl --Results--> a Stage for each number of steps that was scored
                       --Stage.by_seed, .against--> means, differences with 95 % t-intervals and p
                       --tables--> Markdown, with a verdict on each claim of the paper
     results of two runs --reproduction_table--> does the second give what the first gave?
Every mean is over seeds. Differences to `complete` are paired by seed: runs with the same seed
share the order of the data and, where the shapes are equal, the initial weights.

Public: SYSTEMS, WINDOWS, LAMBDAS, FPS, CLAIMS, mean_interval, paired, verdict, Results, Stage,
score_table, difference_table, gain_table, claim_table, mask_table, tables,
reproduction_table."""

import functools
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aveb.paper_numbers import PAPER
from aveb.tasks import ERROR_RATES
from miniature import scenes
from runtime.hub import markdown_table

# name: (its name in the tables, its flags of train.py). The tiny preset has K = 5 and 10 queries.
SYSTEMS = {
    "complete": ("complete", ""),
    "no-diversity": ("without diversity loss", "--diversity 0"),
    "no-causal": ("without causal encoder", "--causal none"),
    "no-windows": ("without sliding windows", "--window-frames 0"),
    "no-windows-2q": ("without sliding windows, twice the queries",
                      "--window-frames 0 --queries 20"),
    "no-sync": ("without synchronisation", "--no-sync"),
    "none": ("without causal encoder, diversity loss, synchronisation",
             "--causal none --diversity 0 --no-sync"),
    "future": ("causal mask turned to the future", "--causal future"),
    "audio-only": ("audio only, trained and tested so", "--mask visual"),
    "visual-only": ("visual only, trained and tested so", "--mask audio"),
    "k1": ("windows of 1 frame, 2 queries", "--window-frames 1 --queries 2"),
    "k2": ("windows of 2 frames, 4 queries", "--window-frames 2 --queries 4"),
    "lambda-0.1": ("lambda 0.1", "--diversity 0.1"),
    "lambda-1": ("lambda 1", "--diversity 1"),
    "lambda-10": ("lambda 10", "--diversity 10"),
}
WINDOWS = {1: "k1", 2: "k2", 5: "complete", 10: "no-windows-2q"}     # Fig. 3a, b; clips: 10 frames
LAMBDAS = {0: "no-diversity", 0.01: "complete", 0.1: "lambda-0.1", 1: "lambda-1",
           10: "lambda-10"}                                                  # Figs 4, 5
FPS = (0.5, 1.0, 2.0, 4.0)                                                   # Fig. 3c
# The paper's rows (aveb/paper_numbers.py), and the tasks that it reports to get worse.
PAPER_ROWS = {"complete": "FAVOR 13B", "no-diversity": "no diversity loss",
              "no-causal": "no causal encoder", "no-windows": "no sliding window",
              "no-sync": "no synchronisation", "none": "no causal, div, sync"}
CLAIMS = (("no-causal", ("videoqa", "isqa", "avssd")), ("no-windows", ("videoqa", "avsr")),
          ("no-sync", ("isqa", "avm")),
          ("none", ("videoqa", "avsr", "avsd", "isqa", "avssd", "avm")),     # Table 5
          ("lambda-10", ("avsr", "videoqa", "avssd")))                       # Fig. 4


# ---------------------------------------------------------------- statistics over seeds
@functools.cache
def t_quantile(df):
    """Student's 97.5 % point; with t = sqrt(df) tan(a) the density is cos(a)^(df-1) da."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    middle = (angle[1:] + angle[:-1]) / 2
    area = np.concatenate([[0.0], np.cumsum(np.cos(middle) ** (df - 1))])
    return math.sqrt(df) * math.tan(np.interp(0.95 * area[-1], area, angle))


def mean_interval(values):
    """-> mean, half of the width of its 95 % t-interval (None for a single value)."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(
        t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def sign_flip(differences):
    """Exact two-sided p-value: the share of all 2^n ways to flip the signs that give a sum as far
    from zero. It cannot be below 2 / 2^n, which is 0.0625 for five seeds and 0.031 for six."""
    differences = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    sums = abs(signs @ differences)
    return float((sums >= abs(differences.sum()) - 1e-9 * (1 + sums.max())).mean())


@dataclass(frozen=True)
class Difference:
    """A system's score minus that of the complete system, over the seeds that both have."""
    mean: float
    half: float | None           # of the 95 % t-interval of the paired differences
    p: float
    n: int                       # seeds

    @property
    def significant(self):
        return self.half is not None and abs(self.mean) > self.half

    def __str__(self):
        mean = f"{round(self.mean, 1) + 0:+.1f}"                              # + 0: no -0.0
        if self.half is None:
            return mean
        return f"{mean} ± {self.half:.1f}" + ("*" if self.significant else "")


def paired(ours, theirs):
    """{seed: score} twice -> Difference; None without a common seed."""
    seeds = sorted({*ours} & {*theirs})
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    return Difference(*mean_interval(differences), sign_flip(differences), len(seeds))


def verdict(difference, less_is_better):
    """The verdict on "the task gets worse without it", by the paired 95 % t-interval. A difference
    that the tables show as 0.0 has no sign."""
    worse = round(difference.mean if less_is_better else -difference.mean, 1)
    if worse > 0:
        return "same sign and significant" if difference.significant else "same sign"
    return "opposite and significant" if worse and difference.significant else "not reproduced"


class Results:
    """The rows of results.jsonl. scored: the numbers of steps that have scores; stages: a Stage for
    each of them whose half has scores, too."""

    def __init__(self, rows):
        self.rows = rows
        self.scored = sorted({row["step"] for row in rows})
        self.stages = [self.at(step) for step in self.scored if step / 2 in self.scored]
        self.systems = [s for s in SYSTEMS if any(row["system"] == s for row in rows)]

    @classmethod
    def read(cls, folder):
        """The Results of <folder>/results.jsonl; FileNotFoundError if it is not there."""
        lines = (Path(folder) / "results.jsonl").read_text("utf-8").splitlines()
        return cls([json.loads(line) for line in lines])

    @property
    def first(self):
        """The end of the first stage of training."""
        return self.stages[0]

    def at(self, step):
        """What was measured after `step` steps."""
        return Stage(self, step)


class Stage:
    """What the systems score after `step` steps. half: the same after half of them."""

    def __init__(self, results, step):
        self.results, self.step, self.scores = results, step, {}
        self.rows = [row for row in results.rows if row["step"] == step]
        for row in self.rows:
            key = row["system"], row["task"], row["part"]
            self.scores.setdefault(key, {})[row["seed"]] = row["score"]
        self.systems = [s for s in SYSTEMS if any(row["system"] == s for row in self.rows)]

    @property
    def half(self):
        return self.results.at(self.step // 2)

    def by_seed(self, system, task, part=""):
        """{seed: score}; {} if nothing was measured."""
        return self.scores.get((system, task, part), {})

    def fact(self, system, name):
        """A field that all rows of a system share, such as parameters or vectors."""
        return next(row[name] for row in self.rows if row["system"] == system)

    def against(self, system, task, part="", base="complete"):
        """The Difference to another system; None without a common seed."""
        return paired(self.by_seed(system, task, part), self.by_seed(base, task, part))


# ---------------------------------------------------------------- results -> Markdown
def with_half(values):
    """{seed: score} -> '67.8 ± 2.1'; '-' if there is no seed."""
    if not values:
        return "-"
    mean, half = mean_interval([*values.values()])
    return f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}")


def arrow(task):
    """'avsr ↓'"""
    return f"{task} {'↓' if task in ERROR_RATES else '↑'}"


def score_table(stage):
    """One line per system, one column per task: mean and 95 % interval over seeds."""
    lines = [[SYSTEMS[s][0], max(len(stage.by_seed(s, task)) for task in scenes.TASKS),
              f"{stage.fact(s, 'parameters'):,}", stage.fact(s, "vectors"),
              *(with_half(stage.by_seed(s, task)) for task in scenes.TASKS)]
             for s in stage.systems]
    return markdown_table([f"system, {stage.step} steps", "seeds", "trained parameters",
                     "LLM vectors, 5 s", *map(arrow, scenes.TASKS)], lines)


def difference_table(stage):
    """The same minus the complete system, paired by seed."""
    return markdown_table(
        [f"minus complete, {stage.step} steps", *map(arrow, scenes.TASKS)],
        [[SYSTEMS[s][0], *(stage.against(s, task) or "-" for task in scenes.TASKS)]
         for s in stage.systems if s != "complete"])


def gain_table(stage):
    """Scores at the end minus those at half of the steps, paired by seed: what still changes has
    not converged."""
    half = stage.half
    return markdown_table(
        [f"steps {stage.step} minus {half.step}", *map(arrow, scenes.TASKS)],
        [[SYSTEMS[s][0], *(paired(stage.by_seed(s, task), half.by_seed(s, task)) or "-"
                           for task in scenes.TASKS)] for s in stage.systems])


def claim_table(results):
    """One line per claim of the paper whose system was run: what gets worse, the paper's numbers,
    ours at every stage (paired by seed), and the verdict."""
    def cell(stage, system, task):
        difference = stage.against(system, task)
        if difference is None:                                 # no seed in common with complete
            return "not run"
        means = (f"{mean_interval([*stage.by_seed(s, task).values()])[0]:.1f}"
                 for s in ("complete", system))
        return (f"{' → '.join(means)}: {difference} (p {difference.p:.3f}, {difference.n} seeds), "
                f"**{verdict(difference, task in ERROR_RATES)}**")

    lines = []
    for system, task in ((s, t) for s, tasks in CLAIMS for t in tasks if s in results.systems):
        theirs = "figure only"
        if system in PAPER_ROWS:
            theirs = " → ".join(str(next(iter(PAPER[PAPER_ROWS[s]][task].values())))
                                for s in ("complete", system))
        lines.append([SYSTEMS[system][0], arrow(task), theirs,
                      *(cell(stage, system, task) for stage in results.stages)])
    return markdown_table(["paper: worse", "task", "paper: complete → without",
                     *(f"{stage.step} steps" for stage in results.stages)], lines)


def mask_table(stage):
    """The future-looking minus the past-looking mask, for all tasks and their parts."""
    found = dict.fromkeys((t, p) for s, t, p in stage.scores if s == "future")
    lines, half = [], stage.half
    for task, part in sorted(found, key=lambda key: (scenes.TASKS.index(key[0]), key[1])):
        difference = stage.against("future", task, part)
        if difference and part != "query cosine":
            lines.append([arrow(task) + (f", {part}" if part else ""),
                          with_half(stage.by_seed("complete", task, part)),
                          with_half(stage.by_seed("future", task, part)), difference,
                          f"{difference.p:.3f} ({difference.n})",
                          half.against("future", task, part) or "-"])
    return markdown_table([f"task, {stage.step} steps", "past", "future", "future minus past",
                     "p (seeds)", f"at {half.step} steps"], lines)


def tables(results):
    """All tables as Markdown, the content of results.md."""
    commits = ", ".join(sorted({f"{str(row['commit'])[:7]}{' + changes' * bool(row['dirty'])}"
                                for row in results.rows})) or "-"
    parts = [f"Commits: {commits}. Means over seeds ± half of the 95 % t-interval; "
             "↓ word error rate %, ↑ % right. Differences are paired by seed. A * marks an "
             "interval that excludes zero (without a correction for multiple tests); the verdicts "
             "depend on it. p: exact, over all flips of the differences' signs, at least "
             "2 / 2^seeds."]
    if results.stages:
        half = results.first.half
        parts += ["## The paper's claims", claim_table(results),
                  f"## {half.step} steps", score_table(half), difference_table(half)]
    for stage in results.stages:
        parts += [f"## {stage.step} steps",
                  "### All systems", score_table(stage),
                  "### Differences", difference_table(stage),
                  f"### What steps {stage.step // 2 + 1} to {stage.step} changed",
                  gain_table(stage)]
        if "future" in stage.systems:
            parts += [f"### Past or future: the causal mask after {stage.step} steps",
                      mask_table(stage)]
    return "\n\n".join(parts)


def reproduction_table(results, earlier):
    """Whether `results` agree with `earlier` ones -> Markdown: how many of the new means lie inside
    the earlier 95 % intervals, and the differences, paired by seed, for all steps, systems and
    seeds (at least two) that both have. "" if there are none."""
    lines, inside, apart, n = [], 0, 0, 0
    for now in map(results.at, sorted({*results.scored} & {*earlier.scored})):
        before = earlier.at(now.step)
        for system in (s for s in now.systems if s in before.systems):
            cells = []
            for task in scenes.TASKS:
                ours, theirs = now.by_seed(system, task), before.by_seed(system, task)
                difference = paired(ours, theirs)
                if difference is None or difference.half is None:
                    cells.append("-")
                    continue
                mean, half = mean_interval([*theirs.values()])
                n, apart = n + 1, apart + difference.significant
                inside += abs(np.mean([*ours.values()]) - mean) <= half
                cells.append(difference)
            lines.append([f"{SYSTEMS[system][0]}, {now.step} steps", *cells])
    if not n:
        return ""
    return (f"{inside} of {n} means lie inside the earlier 95 % intervals; {apart} of {n} "
            "differences, paired by seed, exclude zero (5 % would by chance).\n\n"
            + markdown_table(["here minus earlier", *map(arrow, scenes.TASKS)], lines))
