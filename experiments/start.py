"""What makes a fresh causal Q-Former start: one switch at a time, on speech and on stills.

     python -m experiments.start --whisper W --visual V --llm L     every switch, on both tasks
     python -m experiments.start ... --switches paper direct --seeds 0 1      some of them
     python -m experiments.start --table                            the table of what is there

W, V and L are folders in the Hub's layout, such as whisper-base, dinov2-small and SmolLM2-135M.
The clips are the miniature's: spoken words, of which the test clips have other voices, and stills
with one to three coloured shapes.  Each run is `train.py --model small-laptop` and `eval.py`; it
leaves one line in results.jsonl, and a run whose line is there is not made again.

Public: SWITCHES, StartConfig, commands, measure, table."""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from aveb.metrics import wilson
from miniature import generate
from runtime import cli, hub

TASKS = {"speech": ("asr",), "stills": ("ic", "vqa")}
AT = (30, 50, 70, 100, 150, 200, 300, 400)               # steps whose loss the table shows
# The paper's values of the fields that switches change, and of train.py's flags for stages.
PAPER = {"feature_norm": "joint", "position_std": 1.0, "match_embeddings": False, "direct": 0,
         "layers": 2, "queries": 32}
INPUTS = {"feature_norm": "standard", "position_std": 0.1, "match_embeddings": True}
SWITCHES = {
    "paper": {},
    "halves": {"feature_norm": "halves"},
    "standard": {"feature_norm": "standard"},
    "positions": {"position_std": 0.1},
    "scale": {"match_embeddings": True},
    "direct": {"direct": 512},
    "direct alone": {"direct": 512, "layers": 0},
    "queries": {"queries": 64},
    "aligner faster": {"--lr": 2e-3, "--lora-lr": 0.25},
    "LoRA later": {"--lora-from": 40},
    "inputs": INPUTS,
    "inputs, direct": INPUTS | {"direct": 512},
    "inputs, direct, queries": INPUTS | {"direct": 512, "queries": 64}}


@dataclass(frozen=True)
class StartConfig:
    # -- data
    data: str = "media/small"  # <folder> folder of the clips, which are made if needed
    features: str = ""  # <folder> folder of the feature cache (default: features/ in --data)
    clips: int = 320  # <questions> questions of each task to learn from
    questions: int = 60  # <questions> questions of each task to answer afterwards
    tasks: tuple[str, ...] = tuple(TASKS)  # <task> what is learnt: speech, stills
    # -- model
    whisper: str = ""  # <folder> Whisper
    visual: str = ""  # <folder> a SigLIP or DINOv2
    llm: str = ""  # <folder> the LLM
    switches: tuple[str, ...] = tuple(SWITCHES)  # <name> which of the switches
    seeds: tuple[int, ...] = (0,)  # <n> seeds of weights and order
    # -- optimisation
    steps: int = 100  # <n> optimiser steps
    batch: int = 16  # <samples> samples per step
    lr: float = 5e-4  # <rate> peak learning rate
    # -- logging
    out: str = "runs/start"  # <folder> folder of the runs and of results.jsonl
    table: bool = False  # print the table of what is there and train nothing

    def __post_init__(self):
        for given, known in ((self.tasks, TASKS), (self.switches, SWITCHES)):
            if unknown := set(given) - set(known):
                raise ValueError(f"{', '.join(sorted(unknown))}: unknown; there are "
                                 f"{', '.join(known)}")
        missing = [f"--{name}" for name in ("whisper", "visual", "llm") if not getattr(self, name)]
        if missing and not self.table:
            raise ValueError(f"{', '.join(missing)} missing; name a folder for each")


def commands(config, task, switch, seed, manifests):
    """-> the words of train.py and of eval.py for one run, and its folder."""
    name = f"{task}-{switch}-{config.steps}x{config.batch}-{config.clips}-{seed}"
    out = Path(config.out) / name.replace(", ", "+").replace(" ", "-")
    words = ["--model", "small-laptop", "--data", manifests["train"], "--out", out, "--no-test",
             "--steps", config.steps, "--batch", config.batch, "--lr", config.lr, "--warmup",
             config.steps // 10, "--val-every", config.steps, "--show", 0, "--seed", seed]
    for part in ("whisper", "visual", "llm"):
        words += [f"--{part}", getattr(config, part)]
    cache = ["--features", config.features or Path(config.data) / "features"]
    settings = PAPER | SWITCHES[switch]
    words += ["--set", *(f"{field}={value}".lower() for field, value in settings.items()
                         if not field.startswith("-"))]
    return ([*words, *cache, *(word for flag, value in settings.items() if flag.startswith("-")
                       for word in (flag, value))],
            [*cache, "--checkpoint", out / "best", "--data", manifests["test"],
             "--views", "both", "blind", "--out", out / "predictions.jsonl"], out)


def exact(rows, view):
    """How many answers are their reference, but for capitals and the spaces around."""
    return sum(row[view].strip().lower() == row["references"][0].lower() for row in rows)


def measure(folder, config, task, switch, seed):
    """The line of results.jsonl of one run: the mean loss of the nine steps around some of them,
    and how many of the answers are exact, with the clip and blind."""
    ce = {row["step"]: row["ce"] for row in lines(folder / "log.jsonl")}
    near = {at: [ce[step] for step in range(at - 4, at + 5) if step in ce] for at in AT
            if at <= config.steps}
    answers = lines(folder / "predictions.jsonl")
    return {"task": task, "switch": switch, "seed": seed, "steps": config.steps,
            "batch": config.batch, "clips": config.clips, "lr": config.lr,
            "loss": {at: sum(some) / len(some) for at, some in near.items()},
            "n": {kind: sum(row["task"] == kind for row in answers) for kind in TASKS[task]},
            "exact": {view: {kind: exact([row for row in answers if row["task"] == kind], view)
                             for kind in TASKS[task]} for view in ("both", "blind")}}


def make_clips(config, task):
    """The clips of a task -> {"train": manifest, "test": manifest}."""
    return {split: generate.make(config.data, splits=(split,), tasks=TASKS[task], limit=n,
                                 scale=max(1, config.clips / 500))[split]
            for split, n in (("train", config.clips), ("test", config.questions))}


def run_all(config):
    """Makes the runs that are missing.  SystemExit with the code of a program that failed."""
    results = Path(config.out) / "results.jsonl"
    for task in config.tasks:
        manifests = make_clips(config, task)
        for seed in config.seeds:
            for switch in config.switches:
                train, evaluate, folder = commands(config, task, switch, seed, manifests)
                if any(row["folder"] == folder.name for row in lines(results)):
                    continue
                for program, words in (("train", train), ("eval", evaluate)):
                    if code := cli.run_module(program, *words):
                        sys.exit(code)
                row = {"folder": folder.name, **measure(folder, config, task, switch, seed)}
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(table(lines(results)), flush=True)


def lines(path):
    """The rows of a JSONL file; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if (
        path.exists()) else []


def table(rows):
    """Markdown: a line for each run, in the order of tasks and switches."""
    order = [*SWITCHES]
    rows = sorted(rows, key=lambda r: (r["task"], r["steps"], r["clips"], order.index(r["switch"]),
                                       r["seed"]))
    steps = sorted({int(at) for row in rows for at in row["loss"]})
    cells = []
    for row in rows:
        loss = [f"{row['loss'][str(at)]:.2f}" if str(at) in row["loss"] else "" for at in steps]
        right = ["; ".join(f"{kind} {count(row['exact'][view][kind], n)}"
                           for kind, n in row["n"].items()) for view in ("both", "blind")]
        cells.append([row["task"], row["switch"], str(row["seed"]),
                      f"{row['clips']}, {row['steps']} x {row['batch']}", *loss, *right])
    return hub.markdown_table(["task", "switch", "seed", "clips, steps x batch",
                               *(f"ce {at}" for at in steps), "exact", "blind"], cells)


def count(right, n):
    """'12 of 60 (12 to 32 %)', with the interval of 95 %."""
    score = wilson(right, n)
    return f"{right} of {n} ({score.low:.0f} to {score.high:.0f} %)"


def main(config):
    if not config.table:
        run_all(config)
    print(table(lines(Path(config.out) / "results.jsonl")))


if __name__ == "__main__":
    main(cli.parse(StartConfig, __doc__)[0])
