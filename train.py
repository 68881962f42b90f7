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

import cli

cli.quiet_threads()

import dataclasses  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import checkpoints  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import hub  # noqa: E402
import loader  # noqa: E402
import miniature  # noqa: E402
import processes  # noqa: E402
import runlog  # noqa: E402
import sharding  # noqa: E402
import sizes  # noqa: E402
import tables  # noqa: E402
from answers import readable_samples  # noqa: E402
from baselines import SYSTEMS  # noqa: E402
from corpus import IMAGE, VIDEO, Corpus, Index, Order, split_weight  # noqa: E402
from favor import Sample, preset  # noqa: E402
from features import FeatureCache  # noqa: E402
from mixing import Mixing  # noqa: E402

NOTHING_READ = 20                   # so many steps in a row without a readable clip end a run


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class TrainConfig:
    model: str = "tiny"  # preset: tiny, 7b, 13b
    system: str = "favor"  # or instructblip: the paper's fine-tuned baseline, without sound
    variant: str = "paper"  # paper, or official (what the authors' released code does)
    # manifests (.jsonl, or folders with train.jsonl), each with a weight: asr.jsonl vqa.jsonl:0.5
    data: tuple = ("media/miniature",)  # draws each row of the second in every other epoch
    proportional: str = "samples"  # or tokens: a set's weighted share is of the answers' characters
    out: str = ""  # run folder (default: runs/<model>)
    start_from: str = ""  # checkpoint whose trained parts to begin with (a second stage)
    steps: int = 1100  # optimiser steps
    batch: int = 32  # samples a step, over all processes and accumulation
    micro_batch: int = 32  # samples at a time and process (0: all of its share)
    micro_tokens: int = 0  # LLM positions at a time, padding included: bounds the memory (0: any)
    micro_frames: int = 0  # video frames at a time (0: any number)
    lr: float = 1.5e-3  # peak learning rate (7b, 13b: try 1e-4)
    warmup: int = 100  # steps of linear warm-up, then a cosine down to 2 %
    weight_decay: float = 0.01  # on matrices
    clip: float = 1.0  # largest gradient norm
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
    windows: int | None = None  # frames a window, 0 = one window a clip
    causal: str | None = None  # past, future or none
    diversity: float | None = None  # lambda of Eq. (5)
    queries: int | None = None  # output queries a window
    fps: float | None = None  # video frames a second
    max_seconds: float | None = None  # of a clip are read, what is cut is counted (0: all)

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
                            ("micro_tokens", math.inf), ("micro_frames", math.inf),
                            ("show", math.inf), ("keep", math.inf),
                            ("save_every", math.inf), ("max_skips", math.inf),
                            ("mask_share", 1), ("val_share", 1), ("pair_share", 1.001),
                            ("join_share", 1.001), ("match_share", 1.001)):
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; "
                                 "wanted 0 or more" + ("" if limit == math.inf else ", at most 1"))
        # a weight that is none, unknown presets and switches fail here
        _ = self.manifests, self.method()

    def method(self):
        """The FavorConfig that this command line means."""
        names = ("whisper", "instructblip", "llm", "sync", "windows", "causal", "diversity",
                 "queries", "fps", "max_seconds")
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return preset(self.model, self.variant, **changes)

    @property
    def manifests(self):
        """((path, weight), ...)"""
        return tuple(map(split_weight, self.data))

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
                             lr=config.lr, betas=(0.9, 0.98))


# ---------------------------------------------------------------- one step, one validation
NOTHING = (None, Sample("?", "."), 0, 0)        # keeps a process in step that has no sample left


def train_step(model, drawn, config, optimiser, step, device, autocast):
    """Forward and backward over this process's share of a batch, the same as if one process had
    seen the whole batch at once.  drawn: loader.Drawn, some without a sample.
    -> {loss, ce, diversity, cosine, grad_norm: of the whole batch; task_ce: {task: (sum, n)}, work:
    of this process}; loss None when no process has a sample.  The optimiser has not stepped."""
    bare, world = getattr(model, "module", model), processes.world()
    items = []
    for d in drawn:
        if d.sample is not None:
            sample = bare.with_features(d.sample)
            seen = sample.features.visual
            items.append((d.task, sample, bare.length(sample), 0 if seen is None else len(seen)))
    samples = [sample for _, sample, _, _ in items]
    tokens, pieces = processes.summed([sum(map(bare.answer_tokens, samples)),
                                       sum(map(bare.diversity_parts, samples))], device)
    if not tokens:
        return {"loss": None}
    parts = loader.micro_batches(items, lambda item: item[2], lambda item: item[3],
                                 config.micro_batch, config.micro_tokens, config.micro_frames)
    # Sharded processes take part in each other's forwards, DDP's in the last backward.
    most = max(processes.gathered(len(parts))) if config.shard else max(len(parts), 1)
    parts += [[NOTHING]] * (most - len(parts))
    ce, diversity, task_ce = 0.0, 0.0, {}
    for i, part in enumerate(parts):
        with sharding.accumulating(model, waits=i + 1 < len(parts)):
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
    ce, diversity = processes.summed([ce, diversity], device)
    return {"loss": ce + bare.config.diversity * diversity, "ce": ce, "diversity": diversity,
            "grad_norm": sharding.grad_norm_and_clip(model, config.clip), "task_ce": task_ce,
            "work": runlog.work_of(bare, samples)}


@torch.no_grad()
def validate(model, records, store, batch, device, autocast, mask=None):
    """Mean cross-entropy a token on the held-out questions, of which each process has its share."""
    model.eval()
    mine, total, count = records[processes.rank()::processes.world()], 0.0, 0
    for start in range(0, math.ceil(len(records) / processes.world()), batch):   # all equally often
        samples = readable_samples(model, mine[start:start + batch], store, mask)[1]
        with autocast:
            losses = model(samples or [NOTHING[1]])
        if samples:
            total += losses["ce"].item() * losses["tokens"]
            count += losses["tokens"]
    model.train()
    total, count = processes.summed([total, count], device)
    return total / max(count, 1)


def answers_shown(model, records, store, mask, say):
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
    dtype, _, why = processes.precision(config.dtype, config.model, torch.device("cpu"))
    model = SYSTEMS[config.system].from_config(config.method(), dtype, "meta", random_init=True)
    sample = sizes.empty_sample(model, config.clip_seconds)
    batch = config.micro_batch or config.batch
    print(f"--model {config.model} --system {config.system}, weights {why}")
    print(sizes.table(model))
    print(f"\n{batch} clips of {config.clip_seconds:g} s at a time (--micro-batch):")
    print(sizes.memory_plan(model, sample, batch))


# ---------------------------------------------------------------- the run
FREE = ("out", "processes", "threads", "test", "log_every", "show", "keep", "save_every",
        "max_skips", "workers", "tensorboard", "wandb", "micro_batch", "micro_tokens",
        "micro_frames", "shard", "recompute", "keep_features", "features", "offline")


def read_data(config, kind, say):
    """The manifests as a Corpus."""
    if [Path(path) for path, _ in config.manifests] == [Path(TrainConfig.data[0])]:
        with processes.chief_first():
            miniature.make(config.manifests[0][0], log=say)
    manifests = [(evaluation.find_manifest(path, "train"), weight)
                 for path, weight in config.manifests]
    usable = (lambda media: (media & (IMAGE | VIDEO)) > 0) if kind.needs_picture else None
    with processes.chief_first():
        corpus = Corpus(manifests, config.val_share, config.proportional, usable, say)
    if (config.pair_share or config.match_share) and not len(corpus.sound_only):
        raise ValueError("--pair-share and --match-share take the sound of records that are sound "
                         "only; there are none in --data (add an asr or ac manifest)")
    return corpus


def build(config, kind, dtype, device, found):
    """The model: frozen parts as they were pretrained; the trained ones fresh, of --start-from, or
    of the checkpoint that was found."""
    model = kind.from_config(config.method(), dtype, "cpu" if config.shard else device,
                             random_init=config.random_init)
    if config.start_from and not found:
        model.load_trained(config.start_from)
    if found:
        model.load_trained(found[0])
    if config.recompute:
        sharding.checkpoint_activations(model)
    return sharding.shard(model, device) if config.shard else model


def resume(config, out):
    """(folder, state) of the checkpoint to go on from, or None.  SystemExit when it is of other
    settings."""
    folder = checkpoints.latest(out)
    if not folder:
        return None
    state = checkpoints.load_state(folder)
    same = {k: v for k, v in state["config"].items() if k not in FREE}
    now = {k: v for k, v in dataclasses.asdict(config).items() if k in same}
    if same != now:
        different = {k: (same[k], now[k]) for k in same if same[k] != now[k]}
        raise SystemExit(f"{out} holds a run with other settings, (then, now): {different}; "
                         "choose another --out or remove the folder")
    return folder, state


def mixture_of(corpus, start_from=""):
    """{data set: {task: samples}} of the corpus and of the checkpoint that training began with
    (None when that does not tell)."""
    mixture = (hub.read_json(Path(start_from) / "favor.json").get("mixture") if start_from else {})
    if mixture is None:
        return None
    for name, tasks in corpus.mixture().items():
        before = mixture.setdefault(name, {})
        mixture[name] = {task: before.get(task, 0) + tasks.get(task, 0)
                         for task in {**before, **tasks}}
    return mixture


class Skipped:
    """skipped.jsonl: a line for each sample that could not be read, {"step", "id", "reason"}, or
    that --max-seconds cut, {"step", "id", "cut"}.  Lines of steps that are done again go first."""

    def __init__(self, path, first, chief):
        self.path, self.chief, self.lines = Path(path), chief, []
        if chief and self.path.exists():
            self.lines = list(runlog.read_rows(self.path, first))
            tables.write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.lines))

    def add(self, rows):
        self.lines += rows
        if rows and self.chief:
            with open(self.path, "a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))

    def __str__(self):
        lost = [row for row in self.lines if "reason" in row]
        clips = {row["id"]: row["reason"] for row in lost}
        cut = {row["id"] for row in self.lines if "cut" in row}
        shown = "; ".join(f"{name}: {why}" for name, why in [*clips.items()][:3])
        text = (f"skipped {len(lost)} samples of {len(clips)} clips that cannot be read"
                + (f": {shown}" if clips else ""))
        return text + (f"; --max-seconds cut {len(cut)} clips" if cut else "") + (
            f" (all: {self.path})" if self.lines else "")


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
    out, kind, started = Path(config.out or f"runs/{config.model}"), SYSTEMS[config.system], (
        time.time())
    out.mkdir(parents=True, exist_ok=True)
    found = resume(config, out)
    try:
        corpus = read_data(config, kind, say)
        with sharding.in_turn() if config.shard else nullcontext():
            model = build(config, kind, dtype, device, found)
    except (FileNotFoundError, ValueError) as error:         # what is missing or does not fit
        raise SystemExit(str(error)) from error
    # at most 400 held-out questions, of all tasks: a manifest is often sorted by task
    chosen = np.random.default_rng(0).permutation(len(corpus.held_out))[:400]
    held_out = corpus.records(corpus.held_out[chosen])

    # features: of all clips, once
    keep = config.keep_features if config.keep_features is not None else config.model == "tiny"
    keep = keep and not model.config.encoder_dropout       # with dropout no two passes are the same
    store = None
    if keep:
        manifest = evaluation.find_manifest(config.manifests[0][0], "train")
        with processes.chief_first():
            store = FeatureCache(config.features or manifest.parent / "features", model, log=say)
            if chief:
                store.fill((corpus.record(row) for row in (*corpus.train, *corpus.held_out)),
                           log=say)
    order = Order(corpus.weights[corpus.train], config.seed)
    say(sizes.table(model))
    say(f"{len(corpus.train)} training questions, {len(corpus.held_out)} held out; {config.steps} "
        f"steps of {config.batch} on {world} x {device.type}; frozen weights {why}, trained ones "
        "float32")

    # where a stopped run goes on
    first, best, nonfinite = 0, math.inf, 0
    optimiser = make_optimiser(model, config)
    if found:
        sharding.load_optimiser_state(optimiser, found[1]["optimiser"])
        first, best, nonfinite = (found[1][name] for name in ("step", "best", "nonfinite"))
        say(f"going on from {found[0]}, step {first}")
    mixture = mixture_of(corpus, config.start_from)
    facts = {"train": dataclasses.asdict(config), "mixture": mixture}
    if chief:
        facts = runlog.write_run_facts(
            out, {**facts, "method": dataclasses.asdict(model.config)}, argv, first)
        facts.pop("method")
    peak = runlog.peak_flops(device)
    log = runlog.RunLog(out, config.steps, first, chief, config.log_every, config.tensorboard,
                        config.wandb, peak and peak * world, say, facts)
    skipped = Skipped(out / "skipped.jsonl", first, chief)
    if found:
        log.note("resumed", folder=str(found[0]))
    ddp = model if world == 1 or config.shard else DistributedDataParallel(model)
    steps = loader.Steps(corpus, corpus.train, order, config.mixing, model.reading(),
                         config.batch, rank, world, store)
    workers = (config.workers if config.workers >= 0 else
               loader.default_workers(store, processes.local_world()))
    ahead = loader.load_ahead(steps, first, config.steps, workers)

    def save(folder, done, state=None):
        """On all processes: sharded parts are gathered."""
        with sharding.whole(model):
            state = state and {**state, "optimiser": sharding.full_optimiser_state(optimiser)}
            progress = {**facts, "step": done, "val_ce": val_ce}
            if chief and checkpoints.save_or_say(out / folder, model, progress, state, say):
                log.note("checkpoint", folder=folder)

    # loop
    ddp.train()
    clock, val_ce, empty = runlog.Clock(), None, 0
    with checkpoints.StopSignal() as stop:
        for step in range(first, config.steps):
            with clock.waiting():
                drawn = next(ahead)
            # the same dropout also after a stop: each rank's and step's own seed
            torch.manual_seed((config.seed * config.steps + step) * world + rank)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, step)
            row = train_step(ddp, drawn, config, optimiser, step, device, autocast)
            done, all_ranks = step + 1, processes.gathered({
                "ids": [d.id for d in drawn], "stop": stop.name, "task_ce": row.pop("task_ce", {}),
                "work": row.pop("work", None), "notes": notes_of(drawn, step + 1)})
            skipped.add([note for part in all_ranks for note in part["notes"]])

            # the update, unless there is nothing finite to learn
            empty = empty + 1 if row["loss"] is None else 0
            if empty >= min(NOTHING_READ, config.steps):
                raise SystemExit(f"{empty} steps in a row without a clip that can be read; "
                                 f"{skipped}")
            broken = not empty and not math.isfinite(row["loss"] + row["grad_norm"])
            if broken:
                nonfinite += 1
                ids = sorted(name for part in all_ranks for name in part["ids"])
                log.note("nonfinite", loss=row["loss"], grad_norm=row["grad_norm"], ids=ids)
                if nonfinite > config.max_skips:
                    raise SystemExit(
                        f"step {done}: loss {row['loss']}, gradient norm {row['grad_norm']}; the "
                        f"batch's ids are in {out}/events.jsonl, the checkpoint before is "
                        "untouched. Look at these clips, lower --lr, or allow --max-skips")
                say(f"step {done} is left out: loss {row['loss']}, gradient norm "
                    f"{row['grad_norm']} (ids in {out}/events.jsonl)")
            elif not empty:
                optimiser.step()
            optimiser.zero_grad(set_to_none=True)

            # what is told, validated and saved
            stopped = next((part["stop"] for part in all_ranks if part["stop"]), "")
            work = total_work(all_ranks)
            row = {"step": done, **row, "cosine": mean_cosine(model.config, row, work),
                   "lr": learning_rate(config, step), "task_ce": mean_by_task(all_ranks),
                   "skipped": sum("reason" in note for part in all_ranks
                                  for note in part["notes"])}
            if (due := done % config.val_every == 0 or done == config.steps) and not stopped:
                with clock.aside():
                    val_ce = row["val_ce"] = row.get("ce") if not held_out else validate(
                        model, held_out, store, val_batch(config, world), device, autocast,
                        config.mask or None)
            seconds, waited = clock.lap()
            log.step({k: v for k, v in row.items() if v is not None}, work["clips"],
                     sum(work["llm_tokens"]),
                     runlog.step_flops(model, work["llm_tokens"], work["windows"], work["frames"],
                                       work["audio_seconds"], encoded=store is not None),
                     waited, seconds)
            with clock.aside():
                if "val_ce" in row:
                    log.note("validation", ce=val_ce)
                    if config.show and (chief or config.shard):
                        answers_shown(model, held_out[:config.show], store,
                                      config.mask or None, say)
                    if val_ce is not None and val_ce < best:
                        best = val_ce
                        save("best", done)
                if due or stopped:
                    save("last", done, {"step": done, "best": best, "nonfinite": nonfinite,
                                        "config": dataclasses.asdict(config)})
                if config.save_every and done % config.save_every == 0:
                    save(f"step-{done:06d}", done)
                    if chief:
                        checkpoints.prune(out, config.keep)
            if stopped:
                log.close()
                say(f"{stopped}: saved step {done} in {out}/last; the same command goes on there")
                processes.leave()
                sys.exit(128 + signal.Signals[stopped])

    # end: the curve and the table
    log.close()
    if skipped.lines:
        say(str(skipped))
    if chief:
        curve = runlog.draw_curve(log.rows)
        tables.write_text(out / "loss.txt", curve + "\n")
        say(curve)
    if config.test:
        test(config, model, out, store, mixture, say)
    say(f"{out}/best: answers with  python demo.py CLIP QUESTION --checkpoint {out}/best   "
        f"({runlog.duration(time.time() - started)} in all)")
    processes.leave()


def notes_of(drawn, step):
    """Lines of skipped.jsonl."""
    return [{"step": step, "id": d.id, "reason": d.reason} for d in drawn if d.sample is None] + [
        {"step": step, "id": d.id, "cut": d.cut} for d in drawn if d.sample is not None and d.cut]


def mean_by_task(all_ranks):
    """{task: mean cross-entropy of its samples in this batch}."""
    sums = {}
    for part in all_ranks:
        for task, (total, n) in part["task_ce"].items():
            before = sums.get(task, (0.0, 0))
            sums[task] = before[0] + total, before[1] + n
    return {task: total / n for task, (total, n) in sorted(sums.items())}


def total_work(all_ranks):
    """runlog.work_of of all processes together, and the number of clips."""
    work = {"llm_tokens": [], "windows": 0, "frames": 0, "audio_seconds": []}
    for part in all_ranks:
        for name, value in (part["work"] or {}).items():
            work[name] = work[name] + value
    return {**work, "clips": len(work["llm_tokens"])}


def mean_cosine(config, row, work):
    """Between two queries of a window; the mean diversity loss, Eq. (4), is just that."""
    if not row.get("diversity") or config.diversity_reduction == "mean":
        return row.get("diversity")
    pairs = config.queries * (config.queries - 1)
    return row["diversity"] * work["clips"] / (max(work["windows"], 1) * pairs)


def val_batch(config, world):
    return config.micro_batch or math.ceil(config.batch / world)


def test(config, model, out, store, mixture, say):
    """The table of eval.py on <data>/test.jsonl, with best/."""
    manifest = evaluation.find_manifest(config.manifests[0][0], "train").parent / "test.jsonl"
    if not manifest.exists():
        return
    if config.shard:
        say(f"for the table: python eval.py --checkpoint {out}/best --data {manifest}")
        return
    processes.gathered(None)                                 # best/ is written
    model.load_trained(out / "best")
    tested = [r for r in data.read_manifest(manifest)
              if not model.tasks or r.task in model.tasks]
    if store is not None:
        with processes.chief_first():
            store = FeatureCache(config.features or manifest.parent / "features", model, log=say)
            if processes.rank() == 0:
                store.fill(tested, log=say)
    views = evaluation.views_of(config.system, config.mask)
    predictions, missing = evaluation.evaluate(
        model, tested, store, views, 4 * val_batch(config, processes.world()), log=say)
    if processes.rank() == 0:
        tables.write_report(out / "predictions.jsonl", predictions, views, missing,
                            {"checkpoint": str(out / "best"), "mixture": mixture,
                             "weights": evaluation.weights_hash(out / "best")})
        say((out / "predictions.md").read_text())


if __name__ == "__main__":
    settings, _ = cli.parse(TrainConfig, __doc__)
    if settings.dry_run:
        sys.exit(dry_run(settings))
    if settings.start_from:                         # what is missing is said before the processes
        evaluation.find_checkpoint(settings.start_from)                # start, not once by each
    try:
        for path, _ in settings.manifests:
            if Path(path) != Path(TrainConfig.data[0]):
                Index.of(evaluation.find_manifest(path, "train"))
        runlog.check_wandb(settings.wandb)
    except ValueError as error:
        sys.exit(str(error))
    processes.one_a_core(settings.processes,          # each has its own copy of the weights
                         most=min(4, settings.batch) if settings.model == "tiny" else 1)
    main(settings, sys.argv[1:])
