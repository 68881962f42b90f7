"""Trains FAVOR: audio projection, causal Q-Former, LLM projection and LoRA; all else is frozen.

     python train.py                               the tiny preset on the miniature, made first
     torchrun --nproc_per_node 2 train.py          the same loss curve with any number of processes,
                                                   but for the noise of dropout (7b, 13b)
     torchrun --nproc_per_node 8 train.py --model 7b --data asr.jsonl vqa.jsonl:0.5 --out runs/7b
     torchrun ... --model 13b --shard --recompute  for GPUs that cannot hold 13B each
     python train.py --no-sync --out runs/no-sync  an ablation: each switch of the method is a flag
     python train.py --model 13b --dry-run         the sizes and the memory it takes, no weights

A run folder holds config.json, environment.json, commands.log, log.jsonl (a row per step),
events.jsonl, skipped.jsonl (clips that cannot be read, and why), tensorboard/, loss.txt (the
curve), last/ and best/ (checkpoints that eval.py, demo.py and Favor.from_pretrained open).
A run that was stopped, killed or preempted goes on where it was: give the same command again."""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split

import dataclasses
import math
import os
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from baselines.instructblip import InstructBlip
from data import Mixing, Sample, find_manifest
from favor import Favor, habits, method_settings, preset
from runtime import checkpoint, cli, distributed, flops, hub, loader
from runtime import log as runlog
from runtime.distributed import log
from runtime.feature_cache import FeatureCache, readable_samples
from runtime.hub import write_text
from runtime.manifests import IMAGE, VIDEO, Corpus, Index, Order, split_weight
from tools import memory

SYSTEMS = {"favor": Favor, "instructblip": InstructBlip}
MINIATURE = "media/miniature"
EMPTY_STEPS = 20           # so many steps in a row without a readable clip end a run


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class TrainConfig:
    # -- data
    data: tuple = (MINIATURE,)  # <manifest> manifests to learn from; FILE:0.5 draws half of its
                                # records per epoch
    proportional: Literal["samples", "tokens"] = "samples"  # what the weights of manifests are
                                # shares of: records, or characters of their answers
    val_share: float = 0.02  # <share> share of the clips that is held out of training to choose
                             # best/
    max_seconds: float | None = None  # <seconds> read at most this much of a clip and report what
                                      # is cut; 0 reads all of it (default: 300)
    mask: Literal["", "audio", "visual"] = ""  # train and test without this modality
    mask_share: float = 0.06  # <share> share of the samples whose sound, picture or both are
                              # masked, a third each
    pair_share: float = 0.0  # <share> share of the pictures without sound that get a random sound
                             # (Sec. 4.3)
    join_share: float = 0.5  # <share> share of those pairs that are asked both questions in one
                             # prompt; the others are asked one of the two
    match_share: float = 0.0  # <share> share of the videos with sound that are asked whether sound
                              # and picture belong together
    cache_features: bool | None = None  # encode each clip once and store its features on disk
                                        # (default: off for 7b and 13b, else on)
    features: str = ""  # <folder> folder of the feature cache (default: features/ beside the first
                        # manifest)
    workers: int = -1  # <n> processes that decode clips ahead, for each training process; -1 uses
                       # all cores
    # -- model
    model: Literal["tiny", "small-laptop", "small", "7b", "13b"] = "tiny"  # preset of all sizes
    system: Literal["favor", "instructblip"] = "favor"  # system to train; instructblip is the
                                                        # paper's fine-tuned baseline without sound
    start_from: str = ""  # <folder> checkpoint whose trained parts a second stage begins with
    whisper: str | None = None  # <source> folder or Hub repository of Whisper (default: the
                                # preset's)
    visual: str | None = None  # <source> folder or Hub repository of the visual encoder: an
                               # InstructBLIP, or with --visual-grid a SigLIP or DINOv2 (default:
                               # the preset's)
    llm: str | None = None  # <source> folder or Hub repository of a LLaMA, Qwen2.5 or Qwen3, or of
                            # an InstructBLIP that holds one (default: the preset's)
    random_init: bool = False  # use random weights of the full size, without a download, to see
                               # whether a run fits and how fast it is
    offline: bool = False  # take what the Hub's cache has and open no connection
    dtype: Literal["", "bfloat16", "float32"] = ""  # number format of the frozen weights (default:
                                                    # float32 on a CPU for tiny and the small
                                                    # presets, else bfloat16)
    # -- method (default: what preset and variant say, see FavorConfig)
    variant: Literal["paper", "official"] = "paper"  # official does what the released code does
    sync: bool | None = None  # join the modalities every 0.5 s, Eq. (1)
    window_frames: int | None = None  # <frames> frames per window, K; 0 makes one window per clip
    causal: Literal["past", "future", "none"] | None = None  # frames that a frame may attend to
                                                             # in the causal Q-Former, Sec. 3.2
    diversity: float | None = None  # <factor> factor lambda of the diversity loss, Eq. (5)
    queries: int | None = None  # <n> output queries per window, Q
    fps: float | None = None  # <Hz> video frames per second
    visual_grid: int | None = None  # <cells> cells per side to which the patches of a SigLIP or
                                    # DINOv2 are averaged; 0: the visual encoder is an InstructBLIP
    prompt: Literal["vicuna", "chatml"] | None = None  # form in which the LLM is asked
    set: tuple[str, ...] = ()  # <field=value> any other field of favor.FavorConfig, such as
                               # direct=512 lora_r=64
    # -- optimisation
    steps: int = 1100  # <n> optimiser steps
    batch: int = 32  # <samples> samples per step, over all processes and micro-batches
    lr: float | None = None  # <rate> peak learning rate (default: 1.5e-3 for tiny, 3e-4 for the
                             # small ones, 1e-4 for 7b and 13b)
    lora_lr: float = 1.0  # <factor> factor on it for LoRA
    lora_from: int = 0  # <steps> LoRA stays as it is for so many steps, while the rest begins
    warmup: int = 100  # <steps> steps of linear warm-up, before a cosine down to 2 %
    weight_decay: float = 0.01  # <rate> weight decay of matrices; vectors have none
    grad_clip: float = 1.0  # <norm> scale gradients down to this norm
    seed: int = 0  # <n> seed of the weights, the order of samples and the masks
    micro_batch: int = 32  # <samples> samples that a process computes at a time; 0 takes its whole
                           # share
    micro_tokens: int | None = None  # <n> LLM positions at a time, padding included; 0 sets no
                                     # limit (default: 2048, for tiny no limit)
    micro_frames: int = 0  # <n> video frames at a time; 0 sets no limit
    recompute: bool = False  # activation checkpointing: a third more time, much less memory
    compile: bool = False  # torch.compile for the LLM's blocks: slow to start, for long runs
    max_skips: int = 0  # <steps> skip up to this many steps whose loss or gradient is not finite,
                        # then stop
    # -- logging
    out: str = ""  # <folder> folder of the run (default: runs/<model>)
    log_every: int = 20  # <steps> steps between printed lines
    val_every: int = 200  # <steps> steps between validations and checkpoints
    show: int = 3  # <questions> held-out questions whose answers are printed at each validation
    save_every: int = 0  # <steps> steps between snapshots beside last/ and best/; 0 makes none
    keep: int = 3  # <n> keep this many of the newest snapshots; 0 keeps all
    tensorboard: bool = True  # write curves for TensorBoard, where it is installed
    wandb: str = ""  # <project> send the curves to this project at Weights & Biases
    test: bool = True  # end with the table of eval.py on <data>/test.jsonl
    # -- distributed
    processes: int = 0  # <n> processes to start on a CPU without torchrun; 0 starts one per core,
                        # four at most for tiny, two for the small presets and one for the others
    threads: int = 0  # <n> processor threads per process; 0 takes one for tiny and else all
    shard: bool = False  # spread LLM and trained parts over the processes' GPUs (FSDP2)
    # -- planning
    dry_run: bool = False  # print parameters and memory for --micro-batch clips and load nothing
    clip_seconds: float = 30.0  # <seconds> length of the clips that --dry-run plans for

    ALIASES = {"keep-features": "cache_features",             # the names that flags had before
               "instructblip": "visual"}

    def __post_init__(self):
        cli.check_choices(self)
        if self.lr is None:
            object.__setattr__(self, "lr", habits(self.model).lr)
        for name in checkpoint.PLACES:     # a run goes on from another working folder, too
            if source := getattr(self, name):
                object.__setattr__(self, name, hub.anywhere(source))
        for name in ("steps", "batch", "lr", "log_every", "val_every", "clip_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted more than 0")
        shares = dict.fromkeys(("mask_share", "val_share"), 1) | dict.fromkeys(
            ("pair_share", "join_share", "match_share"), 1.001)
        counts = ("micro_batch", "warmup", "seed", "processes", "threads", "micro_tokens",
                  "micro_frames", "max_seconds", "show", "keep", "save_every", "max_skips",
                  "lora_lr", "lora_from")
        for name, limit in (shares | dict.fromkeys(counts, math.inf)).items():
            if not 0 <= (getattr(self, name) or 0) < limit:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted 0 or more" + {math.inf: "", 1: ", less than 1"}.get(
                                     limit, ", at most 1"))
        # bad weights of manifests, presets and switches fail here
        _ = self.manifests, self.method()

    def method(self):
        """The FavorConfig that this command line means."""
        names = ("whisper", "visual", "llm", "sync", "window_frames", "causal", "diversity",
                 "queries", "fps", "max_seconds", "visual_grid", "prompt")
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        others = method_settings(self.set)
        if twice := [name for name in others if name in changes or name == "variant"]:
            flag = twice[0].replace("_", "-")
            raise ValueError(f"--set {twice[0]}=... and --{flag} say the same; give the flag alone")
        return preset(self.model, self.variant, **changes, **others)

    @property
    def tokens_at_a_time(self):
        given = self.micro_tokens
        return habits(self.model).micro_tokens if given is None else given

    @property
    def manifests(self):
        """((path, weight), ...)"""
        return tuple(map(split_weight, (self.data,) if isinstance(self.data, str) else self.data))

    @property
    def mixing(self):
        return Mixing(self.seed, self.mask, self.mask_share, self.pair_share, self.join_share,
                      self.match_share)

    @property
    def on_miniature(self):
        return [Path(path) for path, _ in self.manifests] == [Path(MINIATURE)]


# What may differ when a run goes on: nothing here changes what is learnt, except that the noise of
# dropout depends on the number of processes and on how a batch is cut.  Of --data the content is
# compared (checkpoint.compare_data), not where it lies.
RESUMABLE = ("data", "out", "processes", "threads", "test", "log_every", "show", "keep",
             "save_every", "max_skips", "workers", "tensorboard", "wandb", "micro_batch",
             "micro_tokens", "micro_frames", "shard", "recompute", "compile", "cache_features",
             "features", "offline")


def dry_run(config):
    """Prints what each part takes, and the memory of a step and of an answer, without weights."""
    dtype, _, why = distributed.precision(config.dtype, config.model, torch.device("cpu"),
                                          habits(config.model).dtype_on_cpu)
    try:
        model = SYSTEMS[config.system].from_config(config.method(), dtype, "meta",
                                                   memory.random_part)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    sample = memory.empty_sample(model, config.clip_seconds)
    batch = config.micro_batch or config.batch
    print(f"--model {config.model} --system {config.system}, weights {why}")
    print(memory.table(model))
    shards = (config.processes or int(os.environ.get("WORLD_SIZE", 1))) if config.shard else 1
    print(f"\n{batch} clips of {config.clip_seconds:g} s at a time (--micro-batch)"
          + ", --recompute" * config.recompute
          + f", --shard over {shards} (--processes)" * config.shard + ":")
    print(memory.memory_plan(model, sample, batch, recompute=config.recompute, shards=shards))
    fit = max(1, (config.tokens_at_a_time or math.inf) // (model.length(sample) + memory.ANSWER))
    if fit < batch:
        print(f"\nA step computes {fit:g} of them at a time (--micro-tokens "
              f"{config.tokens_at_a_time}); --micro-batch {fit:g} plans for that")


# ---------------------------------------------------------------- data, model, what trains
@dataclass
class Run:
    """What a run holds: made by `prepare`, moved on by `train`."""
    out: Path
    device: torch.device
    autocast: object
    corpus: Corpus
    held_out: list             # records that validation asks
    model: object              # Favor; ddp: the same, wrapped where gradients are exchanged
    ddp: object
    cache: object              # FeatureCache, or None
    optimiser: object
    run_log: object
    skipped: object
    facts: dict                # of every checkpoint: settings, commit, mixture
    data: list                 # of each manifest: hash, weight, records; None on other processes
    first: int = 0             # steps done before this start
    best: float = math.inf     # lowest held-out cross-entropy
    val_ce: float | None = None
    nonfinite: int = 0         # steps left out so far
    empty: int = 0             # steps in a row without a readable clip
    unsaved: str = ""          # the last checkpoint, or loss.txt, if the disk was full for it


def read_data(config, kind):
    """The manifests as a Corpus."""
    with distributed.main_process_first():
        if config.on_miniature and distributed.rank() == 0:
            if code := cli.run_module("miniature", "make", "--out", MINIATURE):
                raise SystemExit(code)
        manifests = [(find_manifest(path, "train"), weight) for path, weight in config.manifests]
        usable = (lambda media: (media & (IMAGE | VIDEO)) > 0) if kind.needs_picture else None
        corpus = Corpus(manifests, config.val_share, config.proportional, usable, log)
    if (config.pair_share or config.match_share) and not len(corpus.sound_only):
        raise ValueError("--pair-share and --match-share take the sound of records that are sound "
                         "only; there are none in --data (add an asr or ac manifest)")
    return corpus


def build(config, kind, dtype, device, found):
    """The model: frozen parts are pretrained; trained parts are fresh, or come from --start-from or
    from the checkpoint that was found."""
    model = kind.from_config(config.method(), dtype, "cpu" if config.shard else device,
                             memory.random_part if config.random_init else None)
    if config.start_from and not found:
        model.load_trained(config.start_from)
    if found:
        with checkpoint.reading(found[0]):
            model.load_trained(found[0])
    if config.recompute:
        distributed.checkpoint_activations(model)
    if config.compile:
        for block in model.llm.model.layers:           # alike, so that one compilation serves all
            block.compile(dynamic=True)                # batches differ in length
    return distributed.shard(model, device) if config.shard else model


def open_cache(config, model, corpus):
    """The features of all records: encoded by the main process, read by all."""
    records = (corpus.record(row) for row in (*corpus.train, *corpus.held_out))
    beside = find_manifest(config.manifests[0][0], "train").parent / "features"
    with distributed.main_process_first():
        cache = FeatureCache(config.features or beside, model, log=log)
        if distributed.rank() == 0:
            # With --shard one process encodes: each worker would load the LLM, too.
            cache.fill(records, workers=1 if config.shard else None, log=log)
    return cache


def measure(model, corpus, cache):
    """With feature_norm="standard": the statistics of the features of 256 random training clips,
    of which one at a time is in memory."""
    if model.config.feature_norm == "standard" and model.statistics.unmeasured:
        some = np.random.default_rng(0).permutation(corpus.train)[:256]
        model.measure(sample for row in some
                      for sample in readable_samples(model, corpus.records([row]), cache)[1])


def make_optimiser(model, config):
    """AdamW: weight decay for matrices, none for vectors, and LoRA in a group of its own.  It comes
    first, as it did among the matrices: a state.pt of that time counts parameters in this order."""
    adapters = {id(p) for name, p in model.named_parameters() if ".lora_" in name}
    groups = {"lora": [], "matrices": [], "vectors": []}
    for p in model.trained_parameters():
        groups["lora" if id(p) in adapters else "matrices" if p.ndim >= 2 else "vectors"].append(p)
    return torch.optim.AdamW(
        [{"params": some, "name": name, "weight_decay": (name != "vectors") * config.weight_decay}
         for name, some in groups.items() if some], lr=config.lr, betas=(0.9, 0.98), fused=True)


def learning_rate(config, step, group="matrices"):
    """Linear warm-up, then a cosine down to 2 % of the peak; of LoRA --lora-lr times that, and
    nothing for the first --lora-from steps."""
    if group == "lora":
        return learning_rate(config, step) * config.lora_lr * (step >= config.lora_from)
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    progress = min(1.0, step / config.steps)
    return config.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def prepare(config, argv, out, device):
    """Data, model, feature cache, optimiser and log; restored if a stopped run continues."""
    kind = SYSTEMS[config.system]
    found = checkpoint.resume(out, dataclasses.asdict(config), RESUMABLE)
    dtype, autocast, why = distributed.precision(config.dtype, config.model, device,
                                                 habits(config.model).dtype_on_cpu)
    corpus, data = read_data(config, kind), None
    with distributed.main_process_first():
        if distributed.rank() == 0:
            data = content_of(config, corpus)
            checkpoint.compare_data(out, found, data, log)
    with distributed.one_rank_at_a_time() if config.shard else nullcontext():
        model = build(config, kind, dtype, device, found)
    # at most 400 held-out questions, of all tasks: a manifest is often sorted by task
    chosen = np.random.default_rng(0).permutation(len(corpus.held_out))[:400]
    cached = (habits(config.model).cache_features if config.cache_features is None
              else config.cache_features)
    # With dropout in the visual Q-Former no two passes are the same.
    cached = cached and not (model.config.encoder_dropout and model.visual.reads_question)
    cache = open_cache(config, model, corpus) if cached else None
    if not found:
        measure(model, corpus, cache)

    world = distributed.world()
    log(memory.table(model))
    log(f"{len(corpus.train)} training questions, {len(corpus.held_out)} held out; {config.steps} "
        f"steps of {config.batch} on {world} x {device.type}; frozen weights {why}, trained ones "
        "float32")
    if config.warmup >= config.steps:
        most = max(learning_rate(config, step) for step in range(config.steps))
        log(f"--warmup {config.warmup} does not end before the run, --steps {config.steps}: the "
            f"learning rate reaches {most:.1e} instead of --lr {config.lr:.1e}")
    optimiser, at = make_optimiser(model, config), {"step": 0, "best": math.inf, "nonfinite": 0}
    if found:
        at = found[1]
        with checkpoint.reading(found[0]):
            distributed.load_optimiser_state(optimiser, at["optimiser"])
        log(f"going on from {found[0]}, step {at['step']}")
    facts = facts_of(config, argv, out, corpus, model, at["step"])
    peak = None if dtype == torch.float32 else flops.peak_flops(device)
    main_process = distributed.rank() == 0
    run_log = runlog.RunLog(out, config.steps, at["step"], main_process, config.log_every,
                            config.tensorboard, config.wandb, peak and peak * world, log, facts)
    if found:
        run_log.log_event("resumed", folder=str(found[0]))
    ddp = model if world == 1 or config.shard else DistributedDataParallel(model)
    skipped = loader.SkippedLog(out / "skipped.jsonl", at["step"], main_process, log)
    return Run(out, device, autocast, corpus, corpus.records(corpus.held_out[chosen]), model,
               ddp, cache, optimiser, run_log, skipped, facts, data, at["step"], at["best"],
               nonfinite=at["nonfinite"])


def content_of(config, corpus):
    """[hash, weight, records] of each manifest: what a run that goes on must find again."""
    return [[checkpoint.short_hash(index.path), weight, len(index)]
            for index, (_, weight) in zip(corpus.indices, config.manifests, strict=True)]


def facts_of(config, argv, out, corpus, model, first_step):
    """Facts about the run that its folder and each of its checkpoints hold."""
    before = hub.read_json(Path(config.start_from) / "favor.json") if config.start_from else {}
    known = not before or "mixture" in before
    facts = {"train": dataclasses.asdict(config),
             "mixture": corpus.mixture(before.get("mixture")) if known else None}
    if distributed.rank() == 0:
        runlog.write_run_facts(out, {**facts, "method": dataclasses.asdict(model.config)}, argv,
                               first_step)
    return facts | {**runlog.git_facts(), "command": shlex.join(["train.py", *argv])}


# ---------------------------------------------------------------- this process's share of a batch
FILLER = (None, Sample("?", "."), 0, 0)     # lets a process without samples take part in a step


@dataclass
class Share:
    """This process's samples of one step, cut into micro-batches, and the sums of their losses.

    The loss, Eq. (5), is ce + lambda * diversity; both are means over the batch of all processes,
    over its answer tokens and over its windows.  So each micro-batch is weighted by its tokens and
    its windows, and the loss is the same however the batch is cut."""
    samples: list                # encoded
    parts: list                  # micro-batches of (task, Sample, length, frames) or [FILLER]
    tokens: float = 0            # answer tokens in the batch of all processes
    diversity_parts: float = 0   # terms of Eq. (4) in it
    ce: float = 0.0
    diversity: float = 0.0
    task_ce: dict = field(default_factory=dict)       # task -> (sum, number of samples)

    def add(self, part, losses, factor):
        """Adds the losses of one micro-batch (Favor.forward) to the sums -> its part of the batch's
        ce + factor * diversity."""
        real = float(part[0] is not FILLER)
        ce = real * losses["ce"] * losses["tokens"] / self.tokens
        diversity = real * losses["diversity"] * losses["diversity_parts"] / max(
            self.diversity_parts, 1)
        self.ce, self.diversity = self.ce + ce.item(), self.diversity + diversity.item()
        for (task, *_), own in zip(part, losses["item_ce"].tolist(), strict=True):
            if real:
                total, n = self.task_ce.get(task, (0.0, 0))
                self.task_ce[task] = (total + own, n + 1)
        return ce + factor * diversity

    def losses(self, factor, device):
        """{loss, ce, diversity} of the batch of all processes; None where nothing was readable."""
        if not self.tokens:
            return {"loss": None, "ce": None}
        ce, diversity = distributed.all_reduce_sum([self.ce, self.diversity], device)
        return {"loss": ce + factor * diversity, "ce": ce, "diversity": diversity}


def encode_share(model, items, config, device):
    """items (loader.TrainItem, some without a sample) -> Share, its clips encoded.  With --shard
    all processes run equally many micro-batches, as each needs the others' weights; under DDP each
    process runs at least one."""
    readable = [item for item in items if item.sample is not None]
    for item, sample in zip(
            readable, model.encode_batch([item.sample for item in readable]), strict=True):
        item.sample, item.reason = None, model.too_long(sample)
        if not item.reason:                       # cut here, so that the sizes below are the LLM's
            item.sample, cut = model.fit(sample)
            item.cut = "; ".join(filter(None, (item.cut, cut)))
    readable = [item for item in readable if not item.reason]
    samples = [item.sample for item in readable]
    seen = [sample.features.visual for sample in samples]
    rows = [(item.task, sample, model.length(sample), 0 if frames is None else len(frames))
            for item, sample, frames in zip(readable, samples, seen, strict=True)]
    tokens, diversity_parts = distributed.all_reduce_sum(
        [sum(map(model.answer_tokens, samples)), sum(map(model.diversity_parts, samples))], device)
    if not tokens:
        return Share(samples, [])
    parts = loader.micro_batches(rows, lambda row: row[2], lambda row: row[3],
                                 config.micro_batch, config.tokens_at_a_time, config.micro_frames)
    most = (max(distributed.all_gather_object(len(parts))) if config.shard
            else max(len(parts), 1))
    parts += [[FILLER]] * (most - len(parts))
    return Share(samples, parts, tokens, diversity_parts)


# ---------------------------------------------------------------- the loop
def train(run, config, stop):
    """The steps that are left.  stop.name: the signal that asks to end early, "" if none.
    -> the signal that ended it, or ""."""
    model, ddp, optimiser, clock = run.model, run.ddp, run.optimiser, runlog.Clock()
    rank, world, factor = distributed.rank(), distributed.world(), run.model.config.diversity
    batches = load_batches(run, config)
    ddp.train()
    for step in range(run.first, config.steps):
        done = step + 1
        with clock.waiting():
            items = next(batches)
        # Each rank and step has a seed of its own, so that dropout is the same after a stop, too.
        # With another number of processes it is other noise.
        torch.manual_seed((config.seed * config.steps + step) * world + rank)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step, group["name"])
        optimiser.zero_grad(set_to_none=True)                                            # zero

        share = encode_share(model, items, config, run.device)
        for i, part in enumerate(share.parts):
            with distributed.accumulating(ddp, waits=i + 1 < len(share.parts)):
                with run.autocast:
                    losses = ddp([sample for _, sample, *_ in part])                     # forward
                # DDP averages gradients over processes, but each process adds its own terms of the
                # batch's mean, so we scale by the world size.
                (share.add(part, losses, factor) * world).backward()                     # backward
        row = share.losses(factor, run.device)
        if share.parts:
            row["grad_norm"] = distributed.grad_norm_and_clip(ddp, config.grad_clip)     # clip
        everyone = distributed.all_gather_object({
            "ids": [item.id for item in items], "task_ce": share.task_ce, "stop": stop.name,
            "work": flops.work_of(model, share.samples) if share.parts else None,
            "notes": loader.skip_rows(items, done)})
        if check_step(run, config, row, everyone, done):
            optimiser.step()                                                             # step

        stopped = next((part["stop"] for part in everyone if part["stop"]), "")
        due = not stopped and (done % config.val_every == 0 or done == config.steps)
        if due:
            with clock.aside():
                run.val_ce = row["val_ce"] = validate(run, config)
        log_step(run, config, row, everyone, done, clock)                                # log
        with clock.aside():
            if due and config.show and (rank == 0 or config.shard):
                log_samples(model, run.held_out[:config.show], run.cache, config.mask or None)
            # With nothing held out, the batch's own loss chooses best/.
            save(run, config, done, row["ce"] if run.val_ce is None else run.val_ce,
                 due, due or stopped)
        if stopped:
            return stopped
    return ""


def load_batches(run, config):
    """Yields this process's items of each step, decoded ahead by worker processes."""
    corpus, world = run.corpus, distributed.world()
    order = Order(corpus.weights[corpus.train], config.seed)
    steps = loader.TrainSet(corpus, corpus.train, order, config.mixing, run.model.clip_options(),
                            config.batch, distributed.rank(), world, run.cache)
    workers = config.workers
    if workers < 0:
        workers = loader.default_workers(run.cache, distributed.local_world())
    return loader.load_ahead(steps, run.first, config.steps, workers)


def check_step(run, config, row, everyone, done):
    """Whether the optimiser may step.  A step without a readable clip, or without a finite loss and
    gradient, is logged, counted and left out; SystemExit when there are too many of them."""
    run.skipped.add([note for part in everyone for note in part["notes"]])
    run.empty = run.empty + 1 if row["loss"] is None else 0
    if run.empty >= min(EMPTY_STEPS, config.steps):
        raise SystemExit(f"{run.empty} steps in a row without a clip that can be read; "
                         f"{run.skipped}")
    if run.empty or math.isfinite(row["loss"] + row["grad_norm"]):
        return not run.empty
    run.nonfinite += 1
    what = f"loss {row['loss']}, gradient norm {row['grad_norm']}"
    run.run_log.log_event("nonfinite", step=done, loss=row["loss"], grad_norm=row["grad_norm"],
                     ids=sorted(name for part in everyone for name in part["ids"]))
    if run.nonfinite > config.max_skips:
        raise SystemExit(f"step {done}: {what}; the batch's ids are in {run.out}/events.jsonl, "
                         "the checkpoint before is untouched. Look at these clips, lower --lr, "
                         "or allow --max-skips")
    log(f"step {done} is left out: {what} (ids in {run.out}/events.jsonl)")
    return False


# ---------------------------------------------------------------- validate, log, save
@torch.no_grad()
def validate(run, config):
    """Mean cross-entropy per answer token on the held-out questions, of which each process has its
    share; None when there is none that can be read."""
    if not run.held_out:
        return None
    model, rank, world = run.model, distributed.rank(), distributed.world()
    model.eval()
    mine, total, count = run.held_out[rank::world], 0.0, 0
    batch = val_batch(config, world)
    for start in range(0, math.ceil(len(run.held_out) / world), batch):  # equally often everywhere
        samples = readable_samples(model, mine[start:start + batch], run.cache,
                                   config.mask or None)[1]
        with run.autocast:
            losses = model(samples or [FILLER[1]])
        if samples:
            total += losses["ce"].item() * losses["tokens"]
            count += losses["tokens"]
    model.train()
    total, count = distributed.all_reduce_sum([total, count], run.device)
    return total / count if count else None


def val_batch(config, world):
    return config.micro_batch or math.ceil(config.batch / world)


def log_samples(model, records, cache, mask):
    """A few held-out questions, the model's answers and the right ones."""
    model.eval()
    read, samples = readable_samples(model, records, cache, mask)
    if samples:
        texts = model.generate([dataclasses.replace(s, target=None) for s in samples])
        runlog.log_answers([(r.task, r.prompt, text, r.target)
                             for r, text in zip(read, texts, strict=True)], log)
    model.train()


def log_step(run, config, row, everyone, done, clock):
    """The step's row in the log."""
    work = {"llm_tokens": [], "windows": 0, "frames": 0, "audio_seconds": []}
    task_ce = {}
    for part in everyone:
        for name, value in (part["work"] or {}).items():
            work[name] = work[name] + value
        for task, (total, n) in part["task_ce"].items():
            before = task_ce.get(task, (0.0, 0))
            task_ce[task] = before[0] + total, before[1] + n
    clips, (seconds, waited) = len(work["llm_tokens"]), clock.lap()
    row = {"step": done, **row, "cosine": mean_cosine(run.model.config, row, clips,
                                                      work["windows"]),
           "lr": learning_rate(config, done - 1),
           "task_ce": {task: total / n for task, (total, n) in sorted(task_ce.items())},
           "skipped": sum("reason" in note for part in everyone for note in part["notes"])}
    operations = run.run_log.main_process and flops.step_flops(
        run.model, **work, encoded=run.cache is not None)
    run.run_log.log_step({name: value for name, value in row.items() if value is not None}, clips,
                     sum(work["llm_tokens"]), operations, waited, seconds)
    if row.get("val_ce") is not None:
        run.run_log.log_event("validation", ce=row["val_ce"])


def mean_cosine(config, row, clips, windows):
    """Between two queries of a window; the mean diversity loss, Eq. (4), is just that."""
    if not row.get("diversity") or config.diversity_reduction == "mean":
        return row.get("diversity")
    pairs = config.queries * (config.queries - 1)
    return row["diversity"] * clips / (max(windows, 1) * pairs)


def save(run, config, done, score, validated, last):
    """best/ after a validation with a score lower than all before, last/ when due, and snapshots.
    All processes call it: sharded parts are gathered."""
    folders, best_before = [], run.best
    if validated and score is not None and score < run.best:
        run.best = score
        folders.append("best")
    folders += ["last"] * bool(last)
    if config.save_every and done % config.save_every == 0:
        folders.append(f"step-{done:06d}")
    if not folders:
        return
    state = {"step": done, "best": run.best, "nonfinite": run.nonfinite,
             "config": dataclasses.asdict(config), "data": run.data,
             "optimiser": distributed.full_optimiser_state(run.optimiser) if last else None}
    with distributed.full_parameters(run.model):
        for folder in folders if distributed.rank() == 0 else ():
            facts = {**run.facts, "step": done, "val_ce": run.val_ce}
            if checkpoint.save_unless_full(run.out / folder, run.model, facts,
                                      state if folder == "last" else None, log):
                run.run_log.log_event("checkpoint", folder=folder)
                run.unsaved = ""
                continue
            run.unsaved = folder
            if folder == "best":                       # a later one may be worse, but is there
                run.best = state["best"] = best_before
        if distributed.rank() == 0:
            checkpoint.prune(run.out, config.keep)


def save_curve(run):
    """Prints the loss curve and writes it to loss.txt."""
    log(curve := runlog.draw_curve(run.run_log.rows))
    try:
        write_text(run.out / "loss.txt", curve + "\n")
    except OSError as error:
        if not checkpoint.disk_full(error):
            raise
        run.unsaved = run.unsaved or "loss.txt"


# ---------------------------------------------------------------- the program
@distributed.said_once()
def main(config, argv):
    """One process of the run, from the first step that is left to the last."""
    # Checked before the processes meet: one that still joins when the first one ends would fail
    # with a reset connection.
    if config.batch < (world := distributed.environment_ranks()[1]):
        raise SystemExit(
            f"--batch {config.batch} for {world} processes; wanted at least a sample for each")
    rank, world, device = distributed.init_distributed()
    torch.set_num_threads(
        config.threads or habits(config.model).threads or max(1, cli.cores() // world))
    torch.manual_seed(config.seed)
    hub.offline(config.offline)
    out = Path(config.out or f"runs/{config.model}")
    with checkpoint.lock(out / "train.lock", log):
        learn(config, argv, out, device)
        if rank == 0 and config.test:
            test(config, out, world)


def learn(config, argv, out, device):
    """Trains, and leaves best/ in `out`; all processes disconnect."""
    started = time.time()
    try:
        run = prepare(config, argv, out, device)
    except (OSError, ValueError) as error:         # what is missing, refused or does not fit
        raise SystemExit(str(error)) from error
    with checkpoint.StopSignal() as stop, loader.worker_errors():
        stopped = train(run, config, stop)
    run.run_log.close()
    if stopped:
        log(f"{stopped}: saved step {run.run_log.at} in {out}/last; the same command goes on "
            "there")
        distributed.shutdown(run.ddp)
        sys.exit(128 + signal.Signals[stopped])
    if run.skipped.rows:
        log(str(run.skipped))
    if distributed.rank() == 0:
        save_curve(run)
    if not run.unsaved:
        log(f"{out}/best: answers with  python demo.py CLIP QUESTION --checkpoint "
            f"{out}/best   ({runlog.duration(time.time() - started)} of training)")
    distributed.shutdown(run.ddp)                      # after this each process is its own main one
    if run.unsaved:
        raise SystemExit(f"{out}/{run.unsaved} could not be saved, the disk was full; make "
                         "room and run the same command again")


def test(config, out, world):
    """The table of eval.py on <data>/test.jsonl with best/, by a program of its own: training needs
    nothing of the benchmark."""
    torch.cuda.empty_cache()                           # eval.py needs the memory that training held
    manifest = find_manifest(config.manifests[0][0], "train").parent / "test.jsonl"
    if not manifest.exists():
        return
    words = ["--checkpoint", out / "best", "--data", manifest, "--system", config.system,
             "--batch", 4 * val_batch(config, world), "--no-merge", "--processes", world,
             "--out", out / "predictions.jsonl"]
    words += ["--mask", config.mask] * bool(config.mask)
    words += ["--dtype", config.dtype] * bool(config.dtype)
    words += ["--features", config.features] * bool(config.features)
    words += ["--no-cache-features"] * (config.cache_features is False)
    if config.random_init:
        return print("no table: a checkpoint of random weights cannot be opened again")
    if config.shard:
        return print("for the table: python eval.py", shlex.join(map(str, words)))
    if code := cli.run_module("eval", *words):
        sys.exit(code)


if __name__ == "__main__":
    settings, _ = cli.parse(TrainConfig, __doc__)
    if settings.dry_run:
        sys.exit(dry_run(settings))
    with distributed.said_once():        # what is missing is said before processes start
        try:
            if settings.start_from:
                checkpoint.find_checkpoint(settings.start_from)
            for path, _ in () if settings.on_miniature else settings.manifests:
                Index.of(find_manifest(path, "train"))
            runlog.check_wandb(settings.wandb)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(str(error))
    distributed.launch_local(settings.processes,      # each has its own copy of the weights
                             most=min(habits(settings.model).processes, settings.batch))
    main(settings, sys.argv[1:])
