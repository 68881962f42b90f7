"""Measures FAVOR against its targets: our time, a baseline's time for the same work, their ratio,
the roofline (the best that this machine allows) and how close we are to it.

     python -m experiments.bench                    all targets, on the GPU if there is one; minutes
     python -m experiments.bench --quick            a minute on two cores: 2 layers, fewer repeats
     python -m experiments.bench --only 1 4 7       some of them
     python -m experiments.bench --model 13b        on a GPU: the larger LLM
     python -m experiments.bench --only questions   what a first GPU run should bring; no limits

     target --ours and baseline in turn, fresh inputs--> medians --limit of this device--> yes or no
                                                         --> OUT/bench.md, OUT/bench.json
The baselines are transformers and peft modules on the same weights (pip install -e ".[dev]"),
ffmpeg, and attention with an explicit mask. Each timing stands beside a check that both sides
compute the same; where they do not, the target is WRONG and the program ends with status 1. Ratios
are ours / baseline, so below 1 is faster. On a CPU the frozen parts have 2 layers of their real
width; on a GPU they are whole, with random weights. Timings need a quiet machine.

Public: BenchConfig, TARGETS, run_target, markdown."""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split


import gc
import json
import shlex
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from experiments.bench import media as bench_media
from experiments.bench import questions as bench_questions
from experiments.bench import steps as bench_steps
from experiments.bench import targets as bench_targets
from experiments.bench.measure import CannotRun, Line, Run, Wrong, ceilings
from runtime import cli
from runtime import log as runlog
from runtime.hub import write_text


# ---------------------------------------------------------------- targets
@dataclass(frozen=True)
class Target:
    """What is wanted on a CPU and on an H200, and the function that measures it."""
    text: str
    cpu: str
    h200: str
    measure: object


TARGETS = {
    "1": Target("block-causal attention, forward and backward, against the authors' explicit mask",
              "<= 0.70x at 10x32, <= 0.42x at 20x64 and 60x32; peak <= 0.10x at 60x32",
              "<= 0.5x at S=320, <= 0.2x at S=1920; flash only; nothing of S x S",
              bench_targets.attention),
    "2": Target("ViT-g, bf16, forward, against transformers' sdpa", "<= 1.02x, 8 frames",
              ">= 900 frames/s and >= 60 % of the GEMM rate at 256 frames; >= 1.05x faster, "
              "compiled 1.15x; batched >= 3x one by one", bench_targets.vision),
    "3": Target("Whisper's encoder and log-mel against transformers'",
              "<= 1.0x; log-mel within 1e-4 and <= its time",
              ">= 174 chunks/s and >= 50 % of the GEMM rate at batch 32", bench_targets.hearing),
    "4": Target("LLaMA + LoRA training step against transformers + peft, the same loss",
              "<= 0.65x fp32, <= 0.60x bf16; peak <= 0.45x",
              ">= 50 % of the GEMM rate, >= 14.6k tokens/s (13b: 7.6k); >= 1.3x faster",
              bench_targets.language),
    "5": Target("whole audio-visual step against the sum of its parts timed alone",
              "tiny: <= 1.10x", ">= 45 % MFU, <= 1.10x; no step of a ragged length > 2x the median",
              bench_steps.av_step),
    "6": Target("step on cached features against one that encodes, the same loss to the bit",
              "tiny: <= 0.30x", ">= 4x faster (13b: 2.7x)", bench_steps.cached),
    "7": Target("batch-1 decoding, LoRA merged, against transformers' generate, the same tokens",
              ">= 1.10x faster on one thread",
              ">= 80 % of the bandwidth, >= 255 tokens/s (13b: 130); >= 3x faster",
              bench_targets.decoding),
    "8": Target("2-fps picture reader against decoding alone (ffmpeg -f null)",
              "<= 1.10x; no wrong frame; >= 5x faster than a seek for each; within 1 of PIL",
              "also: 16 workers >= 150 times real time", bench_media.pictures),
    "9": Target("reader of 16 kHz mono sound, within 1e-4 of ffmpeg's",
              ">= 500 times real time on one core", "the same", bench_media.sound),
    "10": Target("memory and several processes", "gradients only on LoRA, causal Q-Former, "
               "projections; loss of 2 ranks = 1 rank to 1e-6",
               "13b, 32 clips of 30 s: <= 115 GiB; 2 GPUs >= 1.9x", bench_steps.memory_and_ranks),
    "11": Target("live answers: first token after a window, against an answer to the clip anew",
               "<= 1.0x, the same answer", "the same", bench_steps.live_answers),
    "questions": Target("what a first GPU run should answer", "no limits", "no limits",
                      bench_questions.questions),
}


@dataclass(frozen=True)
class BenchConfig:
    # -- method
    only: tuple = ()  # <target> targets to run, from 1 to 11 and questions (default: 1 to 11)
    quick: bool = False  # smaller batches and fewer repeats: a minute on two cores
    repeats: int = 0  # <n> repeats of each timing, both sides in turn; 0 makes 7, with --quick 3
    seed: int = 0  # <n> seed of random inputs and weights
    # -- model
    model: Literal["7b", "13b"] = "7b"  # size of the model on a GPU
    device: Literal["", "cpu", "cuda"] = ""  # device of all measurements (default: cuda where there
                                             # is one, else cpu)
    # -- logging
    out: str = "runs/bench"  # <folder> folder of bench.md and bench.json
    # -- distributed
    threads: int = 0  # <n> processor threads; 0 takes one per core; targets 7 to 9 take one

    def __post_init__(self):
        cli.check_choices(self)
        unknown = sorted({*self.only} - {*TARGETS})
        if unknown:
            raise ValueError(f"--only {unknown[0]}; there are {', '.join(TARGETS)}")
        if min(self.repeats, self.threads) < 0:
            raise ValueError("--repeats and --threads: wanted 0 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")

    @property
    def names(self):
        return self.only or tuple(name for name in TARGETS if name != "questions")

    def run(self):
        """Where and how large everything runs."""
        kind = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        size = "quick" if self.quick else "cuda" if kind == "cuda" else "full"
        device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        return Run(device, size, self.repeats or (3 if self.quick else 7), self.model)


# ---------------------------------------------------------------- one target
@dataclass
class Outcome:
    """The result of a target. why: the reason if it could not run or is wrong."""
    name: str
    lines: list = field(default_factory=list)
    why: str = ""
    failed: str = ""                     # WRONG: the sides differ; error: an exception
    seconds: float = 0.0

    @property
    def reached(self):
        """yes, no, or why it is neither."""
        limits = [line.reached for line in self.lines if line.wanted]
        if self.why:
            return self.failed or "cannot run"
        return "no limit here" if not limits else "yes" if all(limits) else (
            f"no ({sum(limits)} of {len(limits)})")

    @property
    def headline(self):
        """The line that is furthest from its limit, where all are reached the furthest that has a
        baseline; without limits the first."""
        limited = [line for line in self.lines if line.wanted]
        missed = [line for line in limited if not line.reached]
        compared = [line for line in limited if line.baseline is not None]
        choice = missed or compared or limited
        return max(choice, key=lambda line: line.margin) if choice else (
            self.lines[0] if self.lines else None)


def run_target(name, run, target=None):
    """The Outcome of one target. One that cannot run or is wrong does not end the others."""
    start = time.perf_counter()
    try:
        outcome = Outcome(name, (target or TARGETS[name]).measure(run))
    except CannotRun as reason:
        outcome = Outcome(name, why=str(reason))
    except Wrong as reason:
        outcome = Outcome(name, why=f"the sides differ: {reason}", failed="WRONG")
    except Exception as error:           # such as out of memory: the other targets still count
        traceback.print_exc()
        outcome = Outcome(name, why=f"{type(error).__name__}: {error}", failed="error")
    outcome.seconds = time.perf_counter() - start
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
    return outcome


# ---------------------------------------------------------------- the report
def number(x):
    """Three digits; an empty cell for None."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def cells(line: Line):
    """ours, baseline, ratio, roofline, close of a Line, as text."""
    spread = f" [{number(line.spread[0])}, {number(line.spread[1])}]" if line.spread else ""
    baseline = "" if line.baseline is None else f"{number(line.baseline)} ({line.baseline_name})"
    return [f"{number(line.ours)} {line.unit}".strip(), baseline,
            f"{number(line.ratio)}{spread}" if line.ratio is not None else "",
            number(line.roofline), f"{100 * line.close:.0f} %" if line.close else ""]


def headline(outcome):
    """One line for a target: reached, and its line that is furthest from its limit."""
    line = outcome.headline
    if line is None:
        return [outcome.reached, outcome.why or "nothing was measured", *[""] * 5]
    return [outcome.reached, line.what + (f" ({line.wanted})" if line.wanted else ""),
            *cells(line)]


def row(words):
    return "| " + " | ".join(str(word).replace("|", "/") for word in words) + " |"


def markdown(outcomes, run, facts):
    """The report: one line per target, then every measurement, then first calls."""
    lines = ["# Benchmark", "", *(f"- {name}: {value}" for name, value in facts.items()), "",
             "Ratio: ours / baseline, medians, with the quartiles of the paired repeats. Roofline: "
             "the best that the ceilings allow. For each target the measurement that misses its "
             "limit by most, or else comes closest to it.", "",
             row(["#", "target", "wanted", "reached", "measurement", "ours", "baseline", "ratio",
                  "roofline", "of the roofline"]), row(["---"] * 10)]
    for outcome in outcomes:
        target = TARGETS[outcome.name]
        lines.append(row([outcome.name, target.text, target.h200 if run.cuda else target.cpu,
                          *headline(outcome)]))
    lines += ["", row(["#", "measurement", "ours", "baseline", "ratio", "roofline",
                       "of the roofline", "wanted", "reached", "repeats", "remark"]),
              row(["---"] * 11)]
    for outcome in outcomes:
        for line in outcome.lines:
            reached = {None: "", True: "yes", False: "no"}[line.reached]
            lines.append(row([outcome.name, line.what, *cells(line), line.wanted, reached,
                              line.repeats, line.remark]))
    if run.cuda and run.first:
        lines += ["", row(["first calls", "s"]), row(["---"] * 2)]
        lines += [row([what, ", ".join(f"{side} {s:.3g}" for side, s in sides.items())])
                  for what, sides in run.first.items()]
    return "\n".join(lines)


def facts_of(run, argv):
    """{name: value}: the machine, the code and the command."""
    here = runlog.environment()
    device = torch.cuda.get_device_name(run.device) if run.cuda else here["cpu"]
    rates = {name: f"{rate / 1e9:.0f} {'GFLOP/s' if 'gemm' in name else 'GB/s'}"
            for name, rate in run.ceilings.items()}
    return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "baselines": ", ".join(f"{name} {runlog.version(name) or 'missing'}"
                               for name in ("transformers", "peft", "av")),
            "commit": here["commit"] + (" and changes" if here["dirty"] else ""),
            "command": shlex.join(["python", "-m", "experiments.bench", *argv]),
            "size": f"{run.size}, {run.repeats} repeats" + (f", {run.model}" if run.cuda else ""),
            "ceilings": ", ".join(f"{name} {rate}" for name, rate in rates.items())}


def write(out, outcomes, run, facts):
    """Writes bench.md and bench.json. It runs after each target, so a kill loses no result."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "bench.md", markdown(outcomes, run, facts) + "\n")
    targets = [{"target": o.name, "text": TARGETS[o.name].text, "reached": o.reached, "why": o.why,
              "seconds": o.seconds, "wanted": TARGETS[o.name].h200 if run.cuda
              else TARGETS[o.name].cpu, "lines": [line.to_dict() for line in o.lines]}
             for o in outcomes]
    write_text(out / "bench.json", json.dumps(
        {"facts": facts, "ceilings": run.ceilings, "first_calls_s": run.first, "targets": targets},
        indent=1) + "\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    measure_all(cli.parse(BenchConfig, __doc__, argv)[0], argv)


def measure_all(config, argv):
    torch.set_num_threads(config.threads or cli.cores())
    run, out, outcomes, start = config.run(), Path(config.out), [], time.time()
    run.ceilings = ceilings(run)
    facts = facts_of(run, argv)
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)
    for name in config.names:
        torch.manual_seed(config.seed)
        outcomes.append(outcome := run_target(name, run))
        print(f"\n{name}  {TARGETS[name].text}: {' | '.join(filter(None, headline(outcome)))}"
              f"  ({outcome.seconds:.0f} s)", flush=True)
        for line in outcome.lines:
            reached = {None: "", True: "reached", False: "NOT reached"}[line.reached]
            words = [line.what, *cells(line), f"{line.wanted} {reached}".strip(), line.remark]
            print("     " + " | ".join(filter(None, words)), flush=True)
        write(out, outcomes, run, facts)
    print(f"\n{runlog.duration(time.time() - start)}; {out}/bench.md, {out}/bench.json")
    if failed := [f"target {o.name}: {o.failed}, {o.why}" for o in outcomes if o.failed]:
        sys.exit("\n".join(failed))
