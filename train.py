"""Trains FAVOR: audio projection, causal Q-Former, LLM projection and LoRA, all else frozen.

     python train.py                               the tiny preset on the miniature, made first
     torchrun --nproc_per_node 2 train.py          the same loss curve, however many processes
     torchrun --nproc_per_node 8 train.py --model 7b --data train.jsonl --out runs/7b
     python train.py --no-sync --out runs/no-sync  an ablation: each switch of the method is a flag
     python train.py --model 13b --dry-run         the sizes and the memory it takes, no weights

A run folder holds config.json, log.jsonl, loss.txt (the curve), last/ and best/ (checkpoints that
eval.py, demo.py and Favor.from_pretrained open; last/ has state.pt to go on from).  A run that was
stopped goes on where it was: the same command again."""

import cli

cli.quiet_threads()

import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import shutil  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import zlib  # noqa: E402
from collections import Counter  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import hub  # noqa: E402
import miniature  # noqa: E402
import processes  # noqa: E402
import sizes  # noqa: E402
import tables  # noqa: E402
from answers import readable_samples  # noqa: E402
from baselines import SYSTEMS  # noqa: E402
from favor import preset  # noqa: E402
from features import keep_features  # noqa: E402


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class TrainConfig:
    model: str = "tiny"  # preset: tiny, 7b, 13b
    system: str = "favor"  # or instructblip: the paper's fine-tuned baseline, without sound
    variant: str = "paper"  # paper, or official (what the authors' released code does)
    data: str = "media/miniature"  # a manifest (.jsonl), or a folder with train.jsonl
    out: str = ""  # run folder (default: runs/<model>)
    start_from: str = ""  # checkpoint whose trained parts to begin with (a second stage)
    steps: int = 1100  # optimiser steps
    batch: int = 32  # samples a step, over all processes and accumulation
    micro_batch: int = 32  # samples at a time and process (0: all of its share)
    lr: float = 1.5e-3  # peak learning rate (7b, 13b: try 1e-4)
    warmup: int = 100  # steps of linear warm-up, then a cosine down to 2 %
    weight_decay: float = 0.01  # on matrices
    clip: float = 1.0  # largest gradient norm
    mask: str = ""  # audio or visual: train and test without it (the single-modality rows)
    mask_share: float = 0.06  # of samples have the sound, the picture or both masked (a third each)
    val_share: float = 0.02  # of clips held out of training, to choose best/
    log_every: int = 20  # steps between log lines
    val_every: int = 200  # steps between validations and checkpoints
    seed: int = 0  # of weights, order and masks
    processes: int = 0  # on a CPU without torchrun (0: tiny one a core, four at most; others one)
    threads: int = 0  # processor threads a process (0: tiny one, more would wait; others all)
    dtype: str = ""  # of frozen weights: bfloat16 or float32 (default: float32 for tiny on a CPU)
    keep_features: bool | None = None  # encode each clip once, keep that (default: tiny only)
    test: bool = True  # end with the table of eval.py on <data>/test.jsonl
    dry_run: bool = False  # print parameters and memory for --micro-batch clips, load nothing
    clip_seconds: float = 30.0  # of a clip in the plan of --dry-run
    random_init: bool = False  # full size, random weights, no download: does it fit, how fast
    offline: bool = False  # take what the Hub's cache has, ask no network
    # frozen parts: folders in the Hub's layout, or Hub repos (default: the preset's)
    whisper: str | None = None  # e.g. openai/whisper-large-v2
    instructblip: str | None = None  # ViT and Q-Former, e.g. Salesforce/instructblip-vicuna-7b
    llm: str | None = None  # a LLaMA, or an InstructBLIP that holds one
    # switches of the method, see FavorConfig (default: what preset and variant say)
    sync: bool | None = None  # join the modalities every 0.5 s, Eq. (1)
    windows: int | None = None  # frames a window, 0 = one window a clip
    causal: str | None = None  # past, future or none
    diversity: float | None = None  # lambda of Eq. (5)
    queries: int | None = None  # output queries a window
    fps: float | None = None  # video frames a second

    def __post_init__(self):
        for name, wanted in (("system", ("favor", "instructblip")),
                             ("mask", ("", "audio", "visual")),
                             ("dtype", ("", "bfloat16", "float32"))):
            if getattr(self, name) not in wanted:
                raise ValueError(f"--{name} {getattr(self, name)}; "
                                 f"wanted {' or '.join(filter(None, wanted))}")
        for name in ("steps", "batch", "lr", "log_every", "val_every", "clip_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted more than 0")
        for name, limit in (("micro_batch", math.inf), ("warmup", math.inf), ("seed", math.inf),
                            ("processes", math.inf), ("threads", math.inf),
                            ("mask_share", 1), ("val_share", 1)):
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted 0 or more" + (", less than 1" if limit == 1 else ""))
        self.method()                                     # unknown presets and switches fail here

    def method(self):
        """The FavorConfig that this command line means."""
        names = ("whisper", "instructblip", "llm", "sync", "windows", "causal", "diversity",
                 "queries", "fps")
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return preset(self.model, self.variant, **changes)


# ---------------------------------------------------------------- the data's order
def split_records(records, share):
    """(train, validation) by clip, so that no clip is on both sides; the same for every run, also
    where the data lies in another folder (the last two parts of the path count)."""
    def held_out(record):
        name = "/".join(Path(record.video or record.image or record.audio or record.id).parts[-2:])
        return zlib.crc32(name.encode()) < share * 2 ** 32
    kept = [r for r in records if not held_out(r)]
    return kept, [r for r in records if held_out(r)]


def epoch_order(records, seed, epoch):
    """Indices of one epoch: each record as often as its meta's "weight" says (default 1, fractions
    by lot), shuffled.  A function of seed and epoch alone: a resumed run needs only its step."""
    rng = np.random.default_rng([seed, epoch])
    weights = np.array([r.meta.get("weight", 1.0) for r in records])
    times = np.floor(weights + rng.random(len(records))).astype(int)
    return rng.permutation(np.repeat(np.arange(len(records)), times))


class Order:
    """Global sample number g -> record index, the same for any number of processes."""

    def __init__(self, records, seed):
        if not records:
            raise ValueError(
                "no training questions; lower --val-share, or look at what was skipped")
        self.records, self.seed, self.ends, self.epochs = records, seed, [0], {}

    def __call__(self, g):
        while g >= self.ends[-1]:
            epoch = len(self.ends) - 1
            self.ends.append(self.ends[-1] + len(self._epoch(epoch)))
        epoch = int(np.searchsorted(self.ends, g, side="right")) - 1
        return self._epoch(epoch)[g - self.ends[epoch]]

    def _epoch(self, epoch):
        if epoch not in self.epochs:
            self.epochs = {epoch: epoch_order(self.records, self.seed, epoch)}
        return self.epochs[epoch]


def drawn_mask(config, g):
    """Which modality sample g has masked: --mask, else mostly none."""
    if config.mask:
        return config.mask
    rng = np.random.default_rng([config.seed, 7, g])
    return (str(rng.choice(["audio", "visual", "both"])) if rng.random() < config.mask_share
            else None)


# ---------------------------------------------------------------- what a run writes down
def git_commit():
    done = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"],
                          capture_output=True, text=True)
    return done.stdout.strip() or "not a git checkout"


def draw_curve(rows, height=10, width=72):
    """Text picture of the training loss over the steps, log scale."""
    losses = np.array([row["ce"] for row in rows])
    cells = np.array([np.log(part.mean())
                      for part in np.array_split(losses, min(width, len(losses)))])
    low, high = cells.min(), max(cells.max(), cells.min() + 1e-9)
    levels = np.round((cells - low) / (high - low) * (height - 1)).astype(int)
    lines = []
    for level in range(height - 1, -1, -1):
        label = (f"{math.exp(low + (high - low) * level / (height - 1)):7.3f}" if level % 3 == 0
                 else " " * 7)
        lines.append(f"{label} |" + "".join("*" if at == level else " " for at in levels))
    lines.append(" " * 8 + f"+{'-' * len(levels)}  cross-entropy, "
                 f"steps {rows[0]['step']}-{rows[-1]['step']}")
    return "\n".join(lines)


# ---------------------------------------------------------------- schedule, checkpoints
def learning_rate(config, step):
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    progress = min(1.0, step / config.steps)
    return config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimiser(model, config):
    matrices = [p for p in model.trained_parameters() if p.ndim >= 2]
    vectors = [p for p in model.trained_parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                              {"params": vectors, "weight_decay": 0.0}],
                             lr=config.lr, betas=(0.9, 0.98))


def save_checkpoint(folder, model, facts, state=None):
    """Writes beside the old folder and swaps, so that a kill at any moment leaves a whole one
    (last/, or last.old/ for the instant between the two renames: see latest_checkpoint)."""
    new, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, **facts)
    if state is not None:
        torch.save(state, new / "state.pt")
    if folder.exists():                                      # else .old is the only whole one
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(out):
    """last/, or its predecessor when a kill came between the renames; None in a fresh folder."""
    return next((f for f in (out / "last", out / "last.old") if (f / "state.pt").exists()), None)


def mixture_of(records, start_from=""):
    """{data set: {task: samples}} of the records and of the checkpoint that training began with
    (None when that does not tell)."""
    mixture = (hub.read_json(Path(start_from) / "favor.json").get("mixture") if start_from else {})
    if mixture is None:
        return None
    for (name, task), n in Counter((r.meta.get("dataset", "own"), r.task) for r in records).items():
        tasks = mixture.setdefault(name, {})
        tasks[task] = tasks.get(task, 0) + n
    return mixture


# ---------------------------------------------------------------- one step, one validation
def train_step(model, samples, config, optimiser, step, world, device, autocast):
    """Forward and backward over this process's share of a batch -> (loss, ce, diversity, grad
    norm), the same as if one process had seen the whole batch at once."""
    bare = model.module if world > 1 else model
    samples = [bare.with_features(sample) for sample in samples]
    samples.sort(key=bare.length)                    # micro-batches of like length: little padding
    size = config.micro_batch or len(samples)
    parts = [samples[i:i + size] for i in range(0, len(samples), size)]
    tokens = sum(bare.answer_tokens(s) for s in samples)
    pieces = sum(bare.diversity_parts(s) for s in samples)
    tokens, pieces = processes.summed([tokens, pieces], device)
    totals = [0.0, 0.0]
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(config, step)
    for i, part in enumerate(parts):
        waits = world > 1 and i + 1 < len(parts)             # gradients are exchanged once a step
        with model.no_sync() if waits else nullcontext():
            with autocast:
                losses = model(part)
            ce = losses["ce"] * losses["tokens"] / tokens
            diversity = losses["diversity"] * losses["diversity_parts"] / max(pieces, 1)
            # DDP averages over processes; the sum over them is wanted.
            ((ce + bare.config.diversity * diversity) * world).backward()
        totals[0] += ce.item()
        totals[1] += diversity.item()
    norm = torch.nn.utils.clip_grad_norm_(bare.trained_parameters(), config.clip).item()
    ce, diversity = processes.summed(totals, device)
    loss = ce + bare.config.diversity * diversity
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise RuntimeError(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower --lr, or "
                           "look at this batch's clips (the last checkpoint is untouched)")
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return loss, ce, diversity, norm


@torch.no_grad()
def validate(model, records, store, batch, device, autocast, mask=None):
    """Mean cross-entropy a token on the held-out questions, of which each process has its share."""
    model.eval()
    total = count = 0
    for start in range(0, len(records), batch):
        samples = readable_samples(model, records[start:start + batch], store, mask)[1]
        if not samples:
            continue
        with autocast:
            losses = model(samples)
        total, count = total + losses["ce"].item() * losses["tokens"], count + losses["tokens"]
    model.train()
    total, count = processes.summed([total, count], device)
    return total / max(count, 1)


# ---------------------------------------------------------------- the plan
def dry_run(config):
    """Prints what each part takes, and the memory of a step and of an answer, without weights."""
    dtype, _, why = processes.precision(config.dtype, config.model, torch.device("cpu"))
    model = SYSTEMS[config.system].from_config(config.method(), dtype, "meta", random_init=True)
    sample = sizes.empty_sample(model, config.clip_seconds)
    batch = config.micro_batch or config.batch
    print(f"--model {config.model} --system {config.system}, weights {why}")
    print(sizes.table(model))
    print(f"\n{batch} clips of {config.clip_seconds:g} s at a time (--micro-batch):")
    print(sizes.memory_plan(model, sample, batch))


# ---------------------------------------------------------------- the run
def main(config, argv):
    rank, world, device = processes.join()
    chief = rank == 0
    say = partial(print, flush=True) if chief else (lambda *_: None)
    if config.batch < world:
        raise SystemExit(
            f"--batch {config.batch} for {world} processes; wanted a sample for each at least")
    torch.set_num_threads(
        config.threads or (1 if config.model == "tiny" else max(1, cli.cores() // world)))
    torch.manual_seed(config.seed)
    dtype, autocast, why = processes.precision(config.dtype, config.model, device)
    hub.offline(config.offline)
    out = Path(config.out or f"runs/{config.model}")
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()

    # data
    if Path(config.data) == Path(TrainConfig.data):
        with processes.chief_first():
            miniature.make(config.data, log=say)
    manifest = evaluation.find_manifest(config.data, "train")
    records, held_out = split_records(data.read_manifest(manifest), config.val_share)

    # model: frozen parts as they were pretrained, fresh aligner and LoRA
    try:
        model = SYSTEMS[config.system].from_config(
            config.method(), dtype, device, random_init=config.random_init)
        if config.start_from:
            model.load_trained(config.start_from)
    except (FileNotFoundError, ValueError) as error:         # what is missing or does not fit
        raise SystemExit(str(error)) from error
    records, held_out = ([r for r in part if model.can_use(r)] for part in (records, held_out))
    keep = config.keep_features if config.keep_features is not None else config.model == "tiny"
    keep = keep and not model.config.encoder_dropout       # with dropout no two passes are the same
    store = None
    if keep:
        with processes.chief_first():
            store = keep_features(model, records + held_out, manifest.parent / "features", log=say)
        records, held_out = ([r for r in part if r.id in store] for part in (records, held_out))
    say(sizes.table(model))
    say(f"{len(records)} training questions, {len(held_out)} held out; {config.steps} steps of "
        f"{config.batch} on {world} x {device.type}; frozen weights {why}, trained ones float32")

    # optimiser, and where a stopped run goes on
    optimiser, first, best, rows = make_optimiser(model, config), 0, math.inf, []
    mixture = mixture_of(records, config.start_from)
    facts = {"train": dataclasses.asdict(config), "commit": git_commit(),
             "command": " ".join(["train.py", *argv]), "mixture": mixture}
    resumed = latest_checkpoint(out)
    if resumed:
        state = torch.load(resumed / "state.pt", map_location="cpu", weights_only=True)
        same = {k: v for k, v in state["config"].items()
                if k not in ("out", "processes", "threads", "test", "log_every")}
        now = {k: v for k, v in dataclasses.asdict(config).items() if k in same}
        if same != now:
            different = {k: (same[k], now[k]) for k in same if same[k] != now[k]}
            raise SystemExit(f"{out} holds a run with other settings, (then, now): {different}; "
                             "choose another --out or remove the folder")
        model.load_trained(resumed)
        optimiser.load_state_dict(state["optimiser"])
        first, best = state["step"], state["best"]
        # A row a step; what comes after the checkpoint's, perhaps torn in mid-line, is done again.
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()[:first]]
        started -= rows[-1]["seconds"] if rows else 0
        say(f"going on from {resumed}, step {first}")
    if chief:
        hub.write_json(out / "config.json", {**facts, "method": dataclasses.asdict(model.config)})
        tables.write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    ddp = DistributedDataParallel(model) if world > 1 else model
    order = Order(records, config.seed)
    # at most 400, of all tasks: a manifest is often sorted by task
    chosen = [held_out[i] for i in np.random.default_rng(0).permutation(len(held_out))[:400]]
    val_batch, unreadable = config.micro_batch or math.ceil(config.batch / world), []

    def sample_of(g):
        """Sample number g of the run; in the place of an unreadable clip, the next record."""
        for k in range(100):
            record = records[(order(g) + k) % len(records)]
            found = readable_samples(
                model, [record], store, drawn_mask(config, g), unreadable)[1]
            if found:
                return found[0]
            print(f"process {rank}, {len(unreadable)} times skipped: {unreadable[-1][1]}",
                  flush=True)
        raise SystemExit("100 clips in a row cannot be read; look at the reasons above")

    def samples_of(step):
        """This process's share of the batch of `step`."""
        return [sample_of(g)
                for g in range(step * config.batch + rank, (step + 1) * config.batch, world)]

    # loop
    ddp.train()
    loop_started = time.time()
    for step in range(first, config.steps):
        # the same dropout also after a stop
        torch.manual_seed((config.seed * config.steps + step) * world + rank)
        loss, ce, diversity, norm = train_step(
            ddp, samples_of(step), config, optimiser, step, world, device, autocast)
        done = step + 1
        row = {"step": done, "loss": loss, "ce": ce, "diversity": diversity,
               "lr": learning_rate(config, step), "grad_norm": norm,
               "seconds": round(time.time() - started, 1)}
        if done % config.val_every == 0 or done == config.steps:
            row["val_ce"] = ce if not chosen else validate(
                model, chosen[rank::world], store, val_batch, device, autocast,
                config.mask or None)
        rows.append(row)
        if chief:
            with open(out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if done % config.log_every == 0 or done == config.steps:
                seconds = time.time() - loop_started
                rate = (done - first) / seconds
                say(f"step {done}/{config.steps}: loss {loss:.4f}, ce {ce:.4f}, "
                    f"query cosine {diversity:+.3f}, lr {row['lr']:.1e}, grad {norm:.2f}, "
                    f"{rate * config.batch:.0f} samples/s, ETA {(config.steps - done) / rate:.0f} s"
                    + (f", held-out ce {row['val_ce']:.4f}" if "val_ce" in row else ""))
        if chief and "val_ce" in row:
            better = row["val_ce"] < best
            best = min(best, row["val_ce"])
            progress = {**facts, "step": done, "val_ce": row["val_ce"]}
            if better:
                save_checkpoint(out / "best", model, progress)
            save_checkpoint(out / "last", model, progress, {
                "step": done, "best": best, "optimiser": optimiser.state_dict(),
                "config": dataclasses.asdict(config)})

    # end: the curve and the table
    if chief:
        curve = draw_curve(rows) if rows else "no steps"
        tables.write_text(out / "loss.txt", curve + "\n")
        say(curve)
    if config.test and (manifest.parent / "test.jsonl").exists():
        tested = data.read_manifest(manifest.parent / "test.jsonl")
        tested = [r for r in tested if not model.tasks or r.task in model.tasks]
        processes.gathered(None)                             # best/ is written
        model.load_trained(out / "best")
        if keep:
            with processes.chief_first():
                store = keep_features(model, tested, manifest.parent / "features", log=say)
        views = evaluation.views_of(config.system, config.mask)
        predictions, missing = evaluation.evaluate(
            model, tested, store, views, 4 * val_batch, log=say)
        if chief:
            tables.write_report(out / "predictions.jsonl", predictions, views, missing,
                                {"checkpoint": str(out / "best"), "mixture": mixture})
            say((out / "predictions.md").read_text())
    say(f"{out}/best: answers with  python demo.py CLIP QUESTION --checkpoint {out}/best   "
        f"({time.time() - started:.0f} s in all)")
    processes.leave()


if __name__ == "__main__":
    settings, _ = cli.parse(TrainConfig, __doc__)
    if settings.dry_run:
        sys.exit(dry_run(settings))
    if settings.start_from:                         # what is missing is said before the processes
        evaluation.find_checkpoint(settings.start_from)                # start, not once by each
    data.read_manifest(evaluation.find_manifest(settings.data, "train"))
    processes.one_a_core(settings.processes,          # each has its own copy of the weights
                         most=min(4, settings.batch) if settings.model == "tiny" else 1)
    main(settings, sys.argv[1:])
