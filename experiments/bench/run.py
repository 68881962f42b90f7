"""Measures FAVOR against its goals: our time, a peer's on the same work, the ratio, the floor that
this machine sets, and how close we are.

     python -m experiments.bench                        all goals, on the GPU if there is one; minutes
     python -m experiments.bench --quick                a minute on two cores: 2 layers, fewer repeats
     python -m experiments.bench --only 1 4 7           some of them
     python -m experiments.bench --model 13b            on a GPU: the larger LLM
     python -m experiments.bench --only questions       readings that a first GPU run should bring, no limits

     goal --ours and peer in turn, fresh inputs--> medians --limit of this device--> yes or no
                                                        --> OUT/bench.md, OUT/bench.json
Peers are transformers and peft modules on the same weights (pip install -e ".[dev]"), ffmpeg, and
attention with an explicit mask.  Each timing stands beside a check that both sides give the same;
where they do not, the goal is WRONG and the program ends with 1.  Ratios are ours / peer: below 1
is faster.  On a CPU frozen parts have 2 layers of their real width; on a GPU they are whole, with
random weights.  Timings want a quiet machine.

Public: BenchConfig, GOALS, run_goal, markdown."""


import gc
import json
import shlex
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.bench import goals as bench_goals
from experiments.bench import media as bench_media
from experiments.bench import questions as bench_questions
from experiments.bench import steps as bench_steps
from experiments.bench.measure import CannotRun, Line, Run, Wrong, ceilings
from runtime import cli
from runtime import log as runlog
from runtime.files import write_text


# ---------------------------------------------------------------- goals
@dataclass(frozen=True)
class Goal:
    """What is wanted, in words, on a CPU and on an H200; the function that measures it."""
    text: str
    cpu: str
    h200: str
    measure: object


GOALS = {
    "1": Goal("block-causal attention, forward and backward, against the authors' explicit mask",
              "<= 0.70x at 10x32, <= 0.42x at 20x64 and 60x32; peak <= 0.10x at 60x32",
              "<= 0.5x at S=320, <= 0.2x at S=1920; flash only; nothing of S x S",
              bench_goals.attention),
    "2": Goal("ViT-g, bf16, forward, against transformers' sdpa", "<= 1.02x, 8 frames",
              ">= 900 frames/s and >= 60 % of the GEMM rate at 256 frames; >= 1.05x faster, "
              "compiled 1.15x; batched >= 3x one by one", bench_goals.vision),
    "3": Goal("Whisper's encoder and log-mel against transformers'",
              "<= 1.0x; log-mel within 1e-4 and <= its time",
              ">= 174 chunks/s and >= 50 % of the GEMM rate at batch 32", bench_goals.hearing),
    "4": Goal("LLaMA + LoRA training step against transformers + peft, the same loss",
              "<= 0.65x fp32, <= 0.60x bf16; peak <= 0.45x",
              ">= 50 % of the GEMM rate, >= 14.6k tokens/s (13b: 7.6k); >= 1.3x faster",
              bench_goals.language),
    "5": Goal("whole audio-visual step against the sum of its parts timed alone",
              "tiny: <= 1.10x", ">= 45 % MFU, <= 1.10x; no step of a ragged length > 2x the median",
              bench_steps.av_step),
    "6": Goal("step on kept features against one that encodes, the same loss to the bit",
              "tiny: <= 0.30x", ">= 4x faster (13b: 2.7x)", bench_steps.cached),
    "7": Goal("batch-1 decoding, LoRA merged, against transformers' generate, the same tokens",
              ">= 1.10x faster on one thread",
              ">= 80 % of the bandwidth, >= 255 tokens/s (13b: 130); >= 3x faster",
              bench_goals.decoding),
    "8": Goal("2-fps picture reader against decoding alone (ffmpeg -f null)",
              "<= 1.10x; no wrong frame; >= 5x faster than a seek for each; within 1 of PIL",
              "also: 16 workers >= 150 times real time", bench_media.pictures),
    "9": Goal("reader of 16 kHz mono sound, within 1e-4 of ffmpeg's",
              ">= 500 times real time on one core", "the same", bench_media.sound),
    "10": Goal("memory and several processes", "gradients only on LoRA, causal Q-Former, "
               "projections; loss of 2 ranks = 1 rank to 1e-6",
               "13b, 32 clips of 30 s: <= 115 GiB; 2 GPUs >= 1.9x", bench_steps.memory_and_ranks),
    "questions": Goal("what a first GPU run should answer", "no limits", "no limits",
                      bench_questions.questions),
}


@dataclass(frozen=True)
class BenchConfig:
    only: tuple = ()  # goals to run: 1 to 10, questions (default: 1 to 10)
    quick: bool = False  # a minute on two cores: smaller batches, fewer repeats; the lines say so
    repeats: int = 0  # of each timing, both sides in turn (0: 7; --quick 3)
    threads: int = 0  # processor threads (0: all cores); goals 7 to 9 take one
    model: str = "7b"  # or 13b: the size on a GPU
    device: str = ""  # cpu or cuda (default: cuda where there is one)
    out: str = "runs/bench"  # folder of bench.md and bench.json
    seed: int = 0  # of random inputs and weights

    def __post_init__(self):
        unknown = sorted({*self.only} - {*GOALS})
        if unknown:
            raise ValueError(f"--only {unknown[0]}; there are {', '.join(GOALS)}")
        for name, wanted in (("model", ("7b", "13b")), ("device", ("", "cpu", "cuda"))):
            if getattr(self, name) not in wanted:
                raise ValueError(f"--{name} {getattr(self, name)}; "
                                 f"wanted {' or '.join(filter(None, wanted))}")
        if min(self.repeats, self.threads) < 0:
            raise ValueError("--repeats and --threads: wanted 0 or more")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")

    @property
    def names(self):
        return self.only or tuple(name for name in GOALS if name != "questions")

    def run(self):
        """Where and how large everything runs."""
        kind = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        size = "quick" if self.quick else "cuda" if kind == "cuda" else "full"
        device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
        return Run(device, size, self.repeats or (3 if self.quick else 7), self.model)


# ---------------------------------------------------------------- one goal
@dataclass
class Outcome:
    """What became of a goal; why: it could not run, or is wrong."""
    name: str
    lines: list = field(default_factory=list)
    why: str = ""
    failed: str = ""                     # WRONG: the sides differ; error: it broke off
    seconds: float = 0.0

    @property
    def reached(self):
        """yes, no, or what else to say."""
        limits = [line.reached for line in self.lines if line.wanted]
        if self.why:
            return self.failed or "cannot run"
        return "no limit here" if not limits else "yes" if all(limits) else (
            f"no ({sum(limits)} of {len(limits)})")

    @property
    def headline(self):
        """The line that is furthest from its limit, where all are reached the furthest that has a
        peer; without limits the first."""
        limited = [line for line in self.lines if line.wanted]
        missed = [line for line in limited if not line.reached]
        compared = [line for line in limited if line.peer is not None]
        choice = missed or compared or limited
        return max(choice, key=lambda line: line.margin) if choice else (
            self.lines[0] if self.lines else None)


def run_goal(name, run, goal=None):
    """Outcome of one goal.  What cannot run, and what is wrong, is told and does not end the rest.
    """
    start = time.perf_counter()
    try:
        outcome = Outcome(name, (goal or GOALS[name]).measure(run))
    except CannotRun as reason:
        outcome = Outcome(name, why=str(reason))
    except Wrong as reason:
        outcome = Outcome(name, why=f"the sides differ: {reason}", failed="WRONG")
    except Exception as error:                     # no memory, say: the other goals still count
        traceback.print_exc()
        outcome = Outcome(name, why=f"{type(error).__name__}: {error}", failed="error")
    outcome.seconds = time.perf_counter() - start
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()
    return outcome


# ---------------------------------------------------------------- what is told
def number(x):
    """Three digits; an empty cell for None."""
    return "" if x is None else f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def cells(line: Line):
    """ours, peer, ratio, floor, close of a Line, as text."""
    spread = f" [{number(line.spread[0])}, {number(line.spread[1])}]" if line.spread else ""
    peer = f"{number(line.peer)} ({line.peer_name})" if line.peer is not None else ""
    return [f"{number(line.ours)} {line.unit}".strip(), peer,
            f"{number(line.ratio)}{spread}" if line.ratio is not None else "", number(line.floor),
            f"{100 * line.close:.0f} %" if line.close else ""]


def headline(outcome):
    """One line for a goal: reached, and its line that is furthest from its limit."""
    line = outcome.headline
    if line is None:
        return [outcome.reached, outcome.why or "nothing was measured", *[""] * 5]
    return [outcome.reached, line.what + (f" ({line.wanted})" if line.wanted else ""),
            *cells(line)]


def row(words):
    return "| " + " | ".join(str(word).replace("|", "/") for word in words) + " |"


def markdown(outcomes, run, facts):
    """The report: one line a goal, then every measurement, then first calls."""
    lines = ["# Benchmark", "", *(f"- {name}: {value}" for name, value in facts.items()), "",
             "Ratio: ours / peer, medians, with the quartiles of the paired repeats. Floor: what "
             "the ceilings allow at best. For each goal the measurement that misses its limit by "
             "most, or else comes closest to it.", "",
             row(["#", "goal", "wanted", "reached", "measurement", "ours", "peer", "ratio", "floor",
                  "of the floor"]), row(["---"] * 10)]
    for outcome in outcomes:
        goal = GOALS[outcome.name]
        lines.append(row([outcome.name, goal.text, goal.h200 if run.cuda else goal.cpu,
                          *headline(outcome)]))
    lines += ["", row(["#", "measurement", "ours", "peer", "ratio", "floor", "of the floor",
                       "wanted", "reached", "repeats", "note"]), row(["---"] * 11)]
    for outcome in outcomes:
        for line in outcome.lines:
            reached = {None: "", True: "yes", False: "no"}[line.reached]
            lines.append(row([outcome.name, line.what, *cells(line), line.wanted, reached,
                              line.repeats, line.note]))
    if run.cuda and run.first:
        lines += ["", row(["first calls", "s"]), row(["---"] * 2)]
        lines += [row([what, ", ".join(f"{side} {s:.3g}" for side, s in sides.items())])
                  for what, sides in run.first.items()]
    return "\n".join(lines)


def facts_of(run, config, argv):
    """What a reader must know of machine, code and command."""
    here = runlog.environment()
    device = torch.cuda.get_device_name(run.device) if run.cuda else here["cpu"]
    kept = {name: f"{rate / 1e9:.0f} {'GFLOP/s' if 'gemm' in name else 'GB/s'}"
            for name, rate in run.ceilings.items()}
    return {"device": device, "torch": torch.__version__, "threads": torch.get_num_threads(),
            "peers": ", ".join(f"{name} {runlog.version(name) or 'missing'}"
                               for name in ("transformers", "peft", "av")),
            "commit": here["commit"] + (" and changes" if here["dirty"] else ""),
            "command": shlex.join(["python", "-m", "experiments.bench", *argv]),
            "size": f"{run.size}, {run.repeats} repeats" + (f", {run.model}" if run.cuda else ""),
            "ceilings": ", ".join(f"{name} {rate}" for name, rate in kept.items())}


def write(out, outcomes, run, facts):
    """bench.md and bench.json; after each goal, so that a kill loses none that is done."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "bench.md", markdown(outcomes, run, facts) + "\n")
    goals = [{"goal": o.name, "text": GOALS[o.name].text, "reached": o.reached, "why": o.why,
              "seconds": o.seconds, "wanted": GOALS[o.name].h200 if run.cuda
              else GOALS[o.name].cpu, "lines": [line.to_dict() for line in o.lines]}
             for o in outcomes]
    write_text(out / "bench.json", json.dumps(
        {"facts": facts, "ceilings": run.ceilings, "first_calls_s": run.first, "goals": goals},
        indent=1) + "\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    measure_all(cli.parse(BenchConfig, __doc__, argv)[0], argv)


def measure_all(config, argv):
    torch.set_num_threads(config.threads or cli.cores())
    run, out, outcomes, start = config.run(), Path(config.out), [], time.time()
    run.ceilings = ceilings(run)
    facts = facts_of(run, config, argv)
    for name, value in facts.items():
        print(f"{name}: {value}", flush=True)
    for name in config.names:
        torch.manual_seed(config.seed)
        outcomes.append(outcome := run_goal(name, run))
        print(f"\n{name}  {GOALS[name].text}: {' | '.join(filter(None, headline(outcome)))}"
              f"  ({outcome.seconds:.0f} s)", flush=True)
        for line in outcome.lines:
            reached = {None: "", True: "reached", False: "NOT reached"}[line.reached]
            said = [line.what, *cells(line), f"{line.wanted} {reached}".strip(), line.note]
            print("     " + " | ".join(filter(None, said)), flush=True)
        write(out, outcomes, run, facts)
    print(f"\n{runlog.duration(time.time() - start)}; {out}/bench.md, {out}/bench.json")
    if failed := [f"goal {o.name}: {o.failed}, {o.why}" for o in outcomes if o.failed]:
        sys.exit("\n".join(failed))
