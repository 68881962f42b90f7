"""Trains FAVOR: audio projection, causal Q-Former, LLM projection and LoRA, all else frozen.

     python train.py                               the tiny preset on the miniature, made first
     torchrun --nproc_per_node 2 train.py          the same loss curve, however many processes
     torchrun --nproc_per_node 8 train.py --model 7b --data asr.jsonl vqa.jsonl:0.5 --out runs/7b
     torchrun ... --model 13b --shard --recompute  for GPUs that cannot hold 13B each
     python train.py --no-sync --out runs/no-sync  an ablation: each switch of the method is a flag
     python train.py --model 13b --dry-run         the sizes and the memory it takes, no weights

A run folder holds config.json, environment.json, commands.log, log.jsonl (a row a step),
events.jsonl, skipped.jsonl (clips that could not be read, and why), tensorboard/, loss.txt (the
curve), last/ and best/ (checkpoints that eval.py, demo.py and Favor.from_pretrained open).
A run that was stopped, killed or preempted goes on where it was: the same command again."""


import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

import data
import miniature
from aveb import tables
from aveb.answers import evaluate, readable_samples, views_of
from baselines import SYSTEMS
from favor import Sample, preset
from runtime import checkpoint as checkpoints
from runtime import cli, distributed, flops, hub, loader
from runtime import log as runlog
from runtime.feature_cache import FeatureCache
from runtime.files import write_text
from runtime.manifests import IMAGE, VIDEO, Corpus, Index, Order, split_weight
from runtime.mixing import Mixing
from tools import memory as sizes

NOTHING_READ = 20                   # so many steps in a row without a readable clip end a run


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class TrainConfig:
    model: str = "tiny"  # preset: tiny, 7b, 13b
    system: str = "favor"  # or instructblip: the paper's fine-tuned baseline, without sound
    variant: str = "paper"  # paper, or official (what the authors' released code does)
    data: tuple = ("media/miniature",)  # manifests; FILE:0.5 draws half of its rows an epoch
    proportional: str = "samples"  # or tokens: a set's weighted share is of the answers' characters
    out: str = ""  # run folder (default: runs/<model>)
    start_from: str = ""  # checkpoint whose trained parts to begin with (a second stage)
    steps: int = 1100  # optimiser steps
    batch: int = 32  # samples a step, over all processes and accumulation
    micro_batch: int = 32  # samples at a time and process (0: all of its share)
    micro_tokens: int | None = None  # LLM positions at a time (0: any; default: 2048, tiny any)
    micro_frames: int = 0  # video frames at a time (0: any number)
    lr: float = 1.5e-3  # peak learning rate (7b, 13b: try 1e-4)
    warmup: int = 100  # steps of linear warm-up, then a cosine down to 2 %
    weight_decay: float = 0.01  # on matrices
    grad_clip: float = 1.0  # largest gradient norm
    mask: str = ""  # audio or visual: train and test without it (the single-modality rows)
    mask_share: float = 0.06  # of samples have the sound, the picture or both masked (a third each)
    pair_share: float = 0.0  # of pictures without sound get a random one (Sec. 4.3)
    join_share: float = 0.5  # of those are asked both questions, the others one of them
    match_share: float = 0.0  # of videos with sound become "do they belong together?"
    val_share: float = 0.02  # of clips held out of training, to choose best/
    log_every: int = 20  # steps between log lines
    val_every: int = 200  # steps between validations and checkpoints
    show: int = 3  # held-out questions whose answers are shown then
    save_every: int = 0  # steps between snapshots that are kept beside last and best (0: none)
    keep: int = 3  # newest of these snapshots stay (0: all)
    max_skips: int = 0  # steps whose loss or gradient is not finite are left out, then it ends
    seed: int = 0  # of weights, order and masks
    processes: int = 0  # on a CPU without torchrun (0: tiny one a core, four at most; others one)
    threads: int = 0  # processor threads a process (0: tiny one, more would wait; others all)
    dtype: str = ""  # of frozen weights: bfloat16 or float32 (default: float32 for tiny on a CPU)
    keep_features: bool | None = None  # encode each clip once, keep that (default: tiny only)
    features: str = ""  # folder of kept features (default: features/ beside the first manifest)
    workers: int = -1  # processes that decode clips ahead, each process its own (-1: all cores)
    shard: bool = False  # spread LLM and trained parts over the processes' GPUs (FSDP2)
    recompute: bool = False  # activation checkpointing: a third more time, much less memory
    compile: bool = False  # torch.compile for each block of the LLM: slow to start, for long runs
    tensorboard: bool = True  # where it is installed
    wandb: str = ""  # project at Weights & Biases
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
    window_frames: int | None = None  # frames a window, 0 = one window a clip
    causal: str | None = None  # past, future or none
    diversity: float | None = None  # lambda of Eq. (5)
    queries: int | None = None  # output queries a window
    fps: float | None = None  # video frames a second
    max_seconds: float | None = None  # of a clip are read, what is cut is counted (0: all)

    ALIASES = {"checkpoint": "recompute"}       # as activation checkpointing is called elsewhere

    def __post_init__(self):
        for name, wanted in (("system", ("favor", "instructblip")),
                             ("mask", ("", "audio", "visual")),
                             ("dtype", ("", "bfloat16", "float32")),
                             ("proportional", ("samples", "tokens"))):
            if getattr(self, name) not in wanted:
                raise ValueError(f"--{name} {getattr(self, name)}; "
                                 f"wanted {' or '.join(filter(None, wanted))}")
        for name in ("steps", "batch", "lr", "log_every", "val_every", "clip_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted more than 0")
        for name, limit in (("micro_batch", math.inf), ("warmup", math.inf), ("seed", math.inf),
                            ("processes", math.inf), ("threads", math.inf),
                            ("tokens_at_a_time", math.inf), ("micro_frames", math.inf),
                            ("max_seconds", math.inf), ("show", math.inf), ("keep", math.inf),
                            ("save_every", math.inf), ("max_skips", math.inf),
                            ("mask_share", 1), ("val_share", 1), ("pair_share", 1.001),
                            ("join_share", 1.001), ("match_share", 1.001)):
            if not 0 <= (getattr(self, name) or 0) < limit:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted 0 or more" + {math.inf: "", 1: ", less than 1"}.get(
                                     limit, ", at most 1"))
        # a weight that is none, unknown presets and switches fail here
        _ = self.manifests, self.method()

    def method(self):
        """The FavorConfig that this command line means."""
        names = ("whisper", "instructblip", "llm", "sync", "window_frames", "causal", "diversity",
                 "queries", "fps", "max_seconds")
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return preset(self.model, self.variant, **changes)

    @property
    def tokens_at_a_time(self):
        given = self.micro_tokens
        return given if given is not None else 0 if self.model == "tiny" else 2048

    @property
    def manifests(self):
        """((path, weight), ...)"""
        return tuple(map(split_weight, (self.data,) if isinstance(self.data, str) else self.data))

    @property
    def mixing(self):
        return Mixing(self.seed, self.mask, self.mask_share, self.pair_share, self.join_share,
                      self.match_share)


# ---------------------------------------------------------------- schedule, optimiser
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
                             lr=config.lr, betas=(0.9, 0.98), fused=True)


# ---------------------------------------------------------------- one step, one validation
NOTHING = (None, Sample("?", "."), 0, 0)        # keeps a process in step that has no sample left


def train_step(model, drawn, config, device, autocast):
    """Forward and backward over this process's share of a batch, the same as if one process had
    seen the whole batch at once.  drawn: loader.TrainItem, some without a sample.
    -> {loss, ce, diversity, grad_norm: of the whole batch; task_ce {task: (sum, n)}, work: of this
    process}; only loss None when no process has a sample.  Gradients are there, clipped."""
    bare, world = getattr(model, "module", model), distributed.world()
    there = [d for d in drawn if d.sample is not None]
    samples = bare.encode_batch([d.sample for d in there])
    seen = [sample.features.visual for sample in samples]
    items = [(d.task, sample, bare.length(sample), 0 if frames is None else len(frames))
             for d, sample, frames in zip(there, samples, seen, strict=True)]
    tokens, pieces = distributed.all_reduce_sum([sum(map(bare.answer_tokens, samples)),
                                       sum(map(bare.diversity_parts, samples))], device)
    if not tokens:
        return {"loss": None}
    parts = loader.micro_batches(items, lambda item: item[2], lambda item: item[3],
                                 config.micro_batch, config.tokens_at_a_time, config.micro_frames)
    # Sharded processes take part in each other's forwards, DDP's in the last backward.
    most = max(distributed.all_gather_object(len(parts))) if config.shard else max(len(parts), 1)
    parts += [[NOTHING]] * (most - len(parts))
    ce, diversity, task_ce = 0.0, 0.0, {}
    for i, part in enumerate(parts):
        with distributed.accumulating(model, waits=i + 1 < len(parts)):
            with autocast:
                losses = model([sample for _, sample, _, _ in part])
            counts = float(part[0] is not NOTHING)
            part_ce = counts * losses["ce"] * losses["tokens"] / tokens
            part_diversity = counts * losses["diversity"] * losses["diversity_parts"] / max(
                pieces, 1)
            # DDP averages over processes; the sum over them is wanted.
            ((part_ce + bare.config.diversity * part_diversity) * world).backward()
        ce, diversity = ce + part_ce.item(), diversity + part_diversity.item()
        for (task, *_), own in zip(part, losses["item_ce"].tolist(), strict=True):
            if counts:
                total, n = task_ce.get(task, (0.0, 0))
                task_ce[task] = (total + own, n + 1)
    ce, diversity = distributed.all_reduce_sum([ce, diversity], device)
    return {"loss": ce + bare.config.diversity * diversity, "ce": ce, "diversity": diversity,
            "grad_norm": distributed.grad_norm_and_clip(model, config.grad_clip), "task_ce": task_ce,
            "work": flops.work_of(bare, samples)}


@torch.no_grad()
def validate(model, records, store, batch, device, autocast, mask=None):
    """Mean cross-entropy a token on the held-out questions, of which each process has its share."""
    model.eval()
    mine, total, count = records[distributed.rank()::distributed.world()], 0.0, 0
    for start in range(0, math.ceil(len(records) / distributed.world()), batch):   # all equally often
        samples = readable_samples(model, mine[start:start + batch], store, mask)[1]
        with autocast:
            losses = model(samples or [NOTHING[1]])
        if samples:
            total += losses["ce"].item() * losses["tokens"]
            count += losses["tokens"]
    model.train()
    total, count = distributed.all_reduce_sum([total, count], device)
    return total / max(count, 1)


def log_samples(model, records, store, mask, say):
    """A few held-out questions, the model's answers and the right ones."""
    model.eval()
    read, samples = readable_samples(model, records, store, mask)
    if samples:
        texts = model.generate([dataclasses.replace(s, target=None) for s in samples])
        runlog.show_answers([(r.task, r.prompt, text, r.target)
                             for r, text in zip(read, texts, strict=True)], say)
    model.train()


# ---------------------------------------------------------------- the plan
def dry_run(config):
    """Prints what each part takes, and the memory of a step and of an answer, without weights."""
    dtype, _, why = distributed.precision(config.dtype, config.model, torch.device("cpu"))
    model = SYSTEMS[config.system].from_config(config.method(), dtype, "meta", load=sizes.random_part)
    sample = sizes.empty_sample(model, config.clip_seconds)
    batch = config.micro_batch or config.batch
    print(f"--model {config.model} --system {config.system}, weights {why}")
    print(sizes.table(model))
    shards = (config.processes or int(os.environ.get("WORLD_SIZE", 1))) if config.shard else 1
    print(f"\n{batch} clips of {config.clip_seconds:g} s at a time (--micro-batch)"
          + ", --recompute" * config.recompute
          + f", --shard over {shards} (--processes)" * config.shard + ":")
    print(sizes.memory_plan(model, sample, batch, recompute=config.recompute, shards=shards))


# ---------------------------------------------------------------- the run
RESUMABLE = ("out", "processes", "threads", "test", "log_every", "show", "keep", "save_every",
        "max_skips", "workers", "tensorboard", "wandb", "micro_batch", "micro_tokens",
        "micro_frames", "shard", "recompute", "compile", "keep_features", "features", "offline")


def read_data(config, kind, say):
    """The manifests as a Corpus."""
    if [Path(path) for path, _ in config.manifests] == [Path(TrainConfig.data[0])]:
        with distributed.main_process_first():
            miniature.make(config.manifests[0][0])
    manifests = [(data.find_manifest(path, "train"), weight)
                 for path, weight in config.manifests]
    usable = (lambda media: (media & (IMAGE | VIDEO)) > 0) if kind.needs_picture else None
    with distributed.main_process_first():
        corpus = Corpus(manifests, config.val_share, config.proportional, usable, say)
    if (config.pair_share or config.match_share) and not len(corpus.sound_only):
        raise ValueError("--pair-share and --match-share take the sound of records that are sound "
                         "only; there are none in --data (add an asr or ac manifest)")
    return corpus


def build(config, kind, dtype, device, found):
    """The model: frozen parts as they were pretrained; the trained ones fresh, of --start-from, or
    of the checkpoint that was found."""
    model = kind.from_config(config.method(), dtype, "cpu" if config.shard else device,
                             **({"load": sizes.random_part} if config.random_init else {}))
    if config.start_from and not found:
        model.load_trained(config.start_from)
    if found:
        model.load_trained(found[0])
    if config.recompute:
        distributed.checkpoint_activations(model)
    if config.compile:
        for block in model.llm.model.layers:           # alike, so that one compilation serves all
            block.compile(dynamic=True)                # batches differ in length
    return distributed.shard(model, device) if config.shard else model


@dataclass
class Run:
    """What a run holds: made by `prepare`, moved on by `main`."""
    out: Path
    say: object
    corpus: Corpus
    held_out: list
    model: object              # Favor; ddp: the same, wrapped where gradients are exchanged
    ddp: object
    store: object              # kept features, or None
    optimiser: object
    log: object
    skipped: object
    facts: dict                # of every checkpoint: settings, commit, mixture
    first: int = 0             # steps done before this start
    best: float = math.inf     # lowest held-out ce
    val_ce: float | None = None
    nonfinite: int = 0         # steps left out so far
    empty: int = 0             # steps in a row without a readable clip
    unsaved: str = ""          # the last checkpoint, or the table, if the disk was full for it


def prepare(config, argv, device, dtype, why, say):
    """Data, model, kept features, optimiser and log, as they were where a stopped run goes on."""
    out, kind = Path(config.out or f"runs/{config.model}"), SYSTEMS[config.system]
    out.mkdir(parents=True, exist_ok=True)
    found = checkpoints.resume(out, dataclasses.asdict(config), RESUMABLE)
    try:
        corpus = read_data(config, kind, say)
        with distributed.one_rank_at_a_time() if config.shard else nullcontext():
            model = build(config, kind, dtype, device, found)
    except (FileNotFoundError, ValueError) as error:         # what is missing or does not fit
        raise SystemExit(str(error)) from error
    # at most 400 held-out questions, of all tasks: a manifest is often sorted by task
    chosen = np.random.default_rng(0).permutation(len(corpus.held_out))[:400]
    keep = config.keep_features if config.keep_features is not None else config.model == "tiny"
    keep = keep and not model.config.encoder_dropout       # with dropout no two passes are the same
    rows = (corpus.record(row) for row in (*corpus.train, *corpus.held_out))
    store = features_of(config, model, rows, say) if keep else None

    say(sizes.table(model))
    world, main_process = distributed.world(), distributed.rank() == 0
    say(f"{len(corpus.train)} training questions, {len(corpus.held_out)} held out; {config.steps} "
        f"steps of {config.batch} on {world} x {device.type}; frozen weights {why}, trained ones "
        "float32")
    optimiser, at = make_optimiser(model, config), {"step": 0, "best": math.inf, "nonfinite": 0}
    if found:
        at = found[1]
        distributed.load_optimiser_state(optimiser, at["optimiser"])
        say(f"going on from {found[0]}, step {at['step']}")
    before = hub.read_json(Path(config.start_from) / "favor.json") if config.start_from else {}
    known = not before or "mixture" in before
    facts = {"train": dataclasses.asdict(config),
             "mixture": corpus.mixture(before.get("mixture")) if known else None}
    if main_process:
        runlog.write_run_facts(out, {**facts, "method": dataclasses.asdict(model.config)}, argv,
                               at["step"])
    facts |= {**runlog.git_facts(), "command": shlex.join(["train.py", *argv])}
    peak = None if dtype == torch.float32 else flops.peak_flops(device)
    log = runlog.RunLog(out, config.steps, at["step"], main_process, config.log_every, config.tensorboard,
                        config.wandb, peak and peak * world, say, facts)
    if found:
        log.note("resumed", folder=str(found[0]))
    return Run(out, say, corpus, corpus.records(corpus.held_out[chosen]), model,
               model if world == 1 or config.shard else DistributedDataParallel(model), store,
               optimiser, log, loader.Skipped(out / "skipped.jsonl", at["step"], main_process, say), facts,
               at["step"], at["best"], nonfinite=at["nonfinite"])


def features_of(config, model, records, say):
    """Kept features of the records, made by the first process, read by all."""
    beside = data.find_manifest(config.manifests[0][0], "train").parent / "features"
    with distributed.main_process_first():
        store = FeatureCache(config.features or beside, model, log=say)
        if distributed.rank() == 0:
            # each worker would load the LLM, too, which sharding was to avoid
            store.fill(records, workers=1 if config.shard else None, log=say)
    return store


def main(config, argv):
    # Before they meet: one still joining when the first ends would fail with a reset connection.
    if config.batch < (world := distributed.environment_ranks()[1]):
        raise SystemExit(
            f"--batch {config.batch} for {world} processes; wanted a sample for each at least")
    rank, world, device = distributed.init_distributed()
    say, started = partial(print, flush=True) if rank == 0 else (lambda *_: None), time.time()
    torch.set_num_threads(
        config.threads or (1 if config.model == "tiny" else max(1, cli.cores() // world)))
    torch.manual_seed(config.seed)
    dtype, autocast, why = distributed.precision(config.dtype, config.model, device)
    hub.offline(config.offline)
    run = prepare(config, argv, device, dtype, why, say)
    corpus, model, log = run.corpus, run.model, run.log
    steps = loader.TrainSet(
        corpus, corpus.train, Order(corpus.weights[corpus.train], config.seed), config.mixing,
        model.clip_options(), config.batch, rank, world, run.store)
    ahead = loader.load_ahead(steps, run.first, config.steps, config.workers if config.workers >= 0
                              else loader.default_workers(run.store, distributed.local_world()))
    run.ddp.train()
    clock = runlog.Clock()
    with checkpoints.StopSignal() as stop, loader.worker_errors():
        for step in range(run.first, config.steps):
            done = step + 1
            with clock.waiting():
                drawn = next(ahead)
            # the same dropout also after a stop: each rank's and step's own seed
            torch.manual_seed((config.seed * config.steps + step) * world + rank)
            for group in run.optimiser.param_groups:
                group["lr"] = learning_rate(config, step)
            row = train_step(run.ddp, drawn, config, device, autocast)
            everyone = distributed.all_gather_object({
                "ids": [d.id for d in drawn], "task_ce": row.pop("task_ce", {}), "stop": stop.name,
                "work": row.pop("work", None), "notes": loader.notes_of(drawn, done)})
            update(run, config, row, everyone, done)

            # what is told, validated and saved
            stopped = next((part["stop"] for part in everyone if part["stop"]), "")
            due = done % config.val_every == 0 or done == config.steps
            if due and not stopped:
                with clock.aside():
                    run.val_ce = row["val_ce"] = row["ce"] if not run.held_out else validate(
                        model, run.held_out, run.store, val_batch(config, world), device, autocast,
                        config.mask or None)
            tell(run, config, row, everyone, done, clock)
            with clock.aside():
                if due and not stopped and config.show and (rank == 0 or config.shard):
                    log_samples(model, run.held_out[:config.show], run.store,
                                  config.mask or None, say)
                save(run, config, done, "val_ce" in row, due or stopped)
            if stopped:
                log.close()
                say(f"{stopped}: saved step {done} in {run.out}/last; the same command goes on "
                    "there")
                distributed.shutdown(run.ddp)
                sys.exit(128 + signal.Signals[stopped])

    # end: the curve and the table
    log.close()
    if run.skipped.lines:
        say(str(run.skipped))
    if rank == 0:
        say(curve := runlog.draw_curve(log.rows))
        write_or_note(run, write_text, "loss.txt", curve + "\n")
    if config.test:
        test(run, config)
    if run.unsaved:
        distributed.shutdown(run.ddp)
        raise SystemExit(f"{run.out}/{run.unsaved} could not be saved, the disk was full; make "
                         "room and run the same command again")
    say(f"{run.out}/best: answers with  python demo.py CLIP QUESTION --checkpoint {run.out}/best   "
        f"({runlog.duration(time.time() - started)} in all)")
    distributed.shutdown(run.ddp)


def update(run, config, row, everyone, done):
    """The optimiser's step, unless there is nothing finite to learn."""
    run.skipped.add([note for part in everyone for note in part["notes"]])
    run.empty = run.empty + 1 if row["loss"] is None else 0
    if run.empty >= min(NOTHING_READ, config.steps):
        raise SystemExit(f"{run.empty} steps in a row without a clip that can be read; "
                         f"{run.skipped}")
    if run.empty:
        row |= {"ce": None}
    elif math.isfinite(row["loss"] + row["grad_norm"]):
        run.optimiser.step()
    else:
        run.nonfinite += 1
        what = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
        run.log.note("nonfinite", step=done, loss=row["loss"], grad_norm=row["grad_norm"],
                     ids=sorted(name for part in everyone for name in part["ids"]))
        if run.nonfinite > config.max_skips:
            raise SystemExit(f"step {done}: {what}; the batch's ids are in {run.out}/events.jsonl, "
                             "the checkpoint before is untouched. Look at these clips, lower --lr, "
                             "or allow --max-skips")
        run.say(f"step {done} is left out: {what} (ids in {run.out}/events.jsonl)")
    run.optimiser.zero_grad(set_to_none=True)


def tell(run, config, row, everyone, done, clock):
    """The step's row in the log."""
    work = {"llm_tokens": [], "windows": 0, "frames": 0, "audio_seconds": []}
    for part in everyone:
        for name, value in (part["work"] or {}).items():
            work[name] = work[name] + value
    clips, (seconds, waited) = len(work["llm_tokens"]), clock.lap()
    cosine = mean_cosine(run.model.config, row, clips, work["windows"])
    row = {"step": done, **row, "cosine": cosine,
           "lr": learning_rate(config, done - 1), "task_ce": mean_by_task(everyone),
           "skipped": sum("reason" in note for part in everyone for note in part["notes"])}
    operations = run.log.main_process and flops.step_flops(
        run.model, **work, encoded=run.store is not None)
    run.log.step({name: value for name, value in row.items() if value is not None}, clips,
                 sum(work["llm_tokens"]), operations, waited, seconds)
    if "val_ce" in row:
        run.log.note("validation", ce=row["val_ce"])


def save(run, config, done, validated, last):
    """best/ after a validation that was better than all before, last/ when due, and snapshots.  On
    all processes: sharded parts are gathered."""
    folders, best_before = [], run.best
    if validated and run.val_ce is not None and run.val_ce < run.best:
        run.best = run.val_ce
        folders.append("best")
    folders += ["last"] * bool(last)
    if config.save_every and done % config.save_every == 0:
        folders.append(f"step-{done:06d}")
    if not folders:
        return
    state = {"step": done, "best": run.best, "nonfinite": run.nonfinite,
             "config": dataclasses.asdict(config),
             "optimiser": distributed.full_optimiser_state(run.optimiser) if last else None}
    with distributed.full_parameters(run.model):
        for folder in folders if distributed.rank() == 0 else ():
            facts = {**run.facts, "step": done, "val_ce": run.val_ce}
            if checkpoints.save_or_say(run.out / folder, run.model, facts,
                                       state if folder == "last" else None, run.say):
                run.log.note("checkpoint", folder=folder)
                run.unsaved = ""
                continue
            run.unsaved = folder
            if folder == "best":                       # a later one may be worse, but is there
                run.best = state["best"] = best_before
        if distributed.rank() == 0:
            checkpoints.prune(run.out, config.keep)


def mean_by_task(everyone):
    """{task: mean cross-entropy of its samples in this batch}."""
    sums = {}
    for part in everyone:
        for task, (total, n) in part["task_ce"].items():
            before = sums.get(task, (0.0, 0))
            sums[task] = before[0] + total, before[1] + n
    return {task: total / n for task, (total, n) in sorted(sums.items())}


def mean_cosine(config, row, clips, windows):
    """Between two queries of a window; the mean diversity loss, Eq. (4), is just that."""
    if not row.get("diversity") or config.diversity_reduction == "mean":
        return row.get("diversity")
    pairs = config.queries * (config.queries - 1)
    return row["diversity"] * clips / (max(windows, 1) * pairs)


def val_batch(config, world):
    return config.micro_batch or math.ceil(config.batch / world)


def test(run, config):
    """The table of eval.py on <data>/test.jsonl, with best/."""
    manifest = data.find_manifest(config.manifests[0][0], "train").parent / "test.jsonl"
    if not manifest.exists():
        return
    if config.shard:
        run.say(f"for the table: python eval.py --checkpoint {run.out}/best --data {manifest}")
        return
    distributed.all_gather_object(None)                                 # best/ is written, or not
    if not (run.out / "best" / "favor.json").exists():
        return run.say(f"no table: {run.out}/best could not be saved")
    model = run.model
    model.load_trained(run.out / "best")
    tested = [r for r in data.read_manifest(manifest)
              if not model.tasks or r.task in model.tasks]
    store = features_of(config, model, tested, run.say) if run.store is not None else None
    views = views_of(config.system, config.mask)
    predictions, missing = evaluate(
        model, tested, store, views, 4 * val_batch(config, distributed.world()), log=run.say)
    if distributed.rank() == 0:
        facts = {"checkpoint": str(run.out / "best"), "mixture": run.facts["mixture"],
                 "weights": checkpoints.weights_hash(run.out / "best")}
        if write_or_note(run, tables.write_report, "predictions.jsonl", predictions, views,
                         missing, facts):
            run.say((run.out / "predictions.md").read_text())


def write_or_note(run, write, name, *what):
    """write(file, *what) in the run's folder -> whether a full disk let it; else run.unsaved."""
    try:
        write(run.out / name, *what)
    except OSError as error:
        if not checkpoints.disk_full(error):
            raise
        run.unsaved = run.unsaved or name
        return False
    return True


if __name__ == "__main__":
    settings, _ = cli.parse(TrainConfig, __doc__)
    if settings.dry_run:
        sys.exit(dry_run(settings))
    if settings.start_from:                         # what is missing is said before the processes
        checkpoints.find_checkpoint(settings.start_from)                # start, not once by each
    try:
        for path, _ in settings.manifests:
            if Path(path) != Path(TrainConfig.data[0]):
                Index.of(data.find_manifest(path, "train"))
        runlog.check_wandb(settings.wandb)
    except ValueError as error:
        sys.exit(str(error))
    distributed.launch_local(settings.processes,          # each has its own copy of the weights
                         most=min(4, settings.batch) if settings.model == "tiny" else 1)
    main(settings, sys.argv[1:])
