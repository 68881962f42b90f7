"""The targets 5, 6, 10 and 11 about the whole model: a training step against the sum of its parts,
cached features, memory and several processes; live answers.

     clips from memory --the step of train.py, AdamW--> loss
On a CPU the tiny preset runs with its committed parts, on a GPU 7b or 13b with random weights.
Public: av_step, cached, memory_and_ranks, live_answers."""

import copy
import dataclasses
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from torch.nn.parallel import DistributedDataParallel

import train
from data import Clip, Record, Sample, load_clip
from experiments.bench.measure import (
    Line,
    Run,
    check,
    check_equal,
    interleaved,
    line_of,
    seconds_of,
)
from experiments.bench.media import clip_of
from experiments.bench.targets import llm_step
from favor import Favor, habits, preset
from runtime import distributed, flops
from runtime.feature_cache import FeatureCache
from runtime.loader import TrainItem
from runtime.log import GIB
from tools.live import Live, seen
from tools.memory import random_part
from vit_qformer import to_pixels

QUESTION = "What happens after the beep?"
ANSWER = "a red circle " * 10
GAP = 1.1                     # a whole step over the sum of its parts, at most


class Step:
    """A training step of train.py on Samples.  The optimiser's rate is 0: it does all its work, and
    every step sees the same weights."""

    def __init__(self, device, name="tiny"):
        torch.manual_seed(0)
        self.device, self.name = device, name
        self.dtype, self.autocast, _ = distributed.precision("", name, device,
                                                                 habits(name).dtype_on_cpu)
        self.config = train.TrainConfig(model=name, micro_batch=0, micro_tokens=0)
        self.model = Favor.from_config(preset(name), self.dtype, device,
                                       load=None if name == "tiny" else random_part).train()
        self.optimiser = train.make_optimiser(self.model, self.config)
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        self.ddp = (self.model if distributed.world() == 1 else DistributedDataParallel(self.model))

    def samples(self, count, seconds):
        """`count` random clips in memory, with a question and an answer; seconds: of all, or a list
        of each one's."""
        lengths = seconds if isinstance(seconds, list) else [seconds] * count
        return [Sample(QUESTION, ANSWER, random_clip(self.model, s)) for s in lengths]

    def gradients(self, samples):
        """What the loop of train.py does between zero_grad and step -> {loss, ce, ...}."""
        torch.manual_seed(0)                                # the same dropout
        items = [TrainItem(g, str(g), "videoqa", sample) for g, sample in enumerate(samples)]
        share = train.encode_share(self.model, items, self.config, self.device)
        factor = self.model.config.diversity
        for i, part in enumerate(share.parts):
            with distributed.accumulating(self.ddp, waits=i + 1 < len(share.parts)):
                with self.autocast:
                    losses = self.ddp([sample for _, sample, *_ in part])
                (share.add(part, losses, factor) * distributed.world()).backward()
        norm = distributed.grad_norm_and_clip(self.ddp, self.config.grad_clip)
        return share.losses(factor, self.device) | {"grad_norm": norm}

    def update(self):
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def __call__(self, samples):
        row = self.gradients(samples)
        self.update()
        return row["loss"]

    def flops(self, samples, encoded=False):
        """Of a step; samples are encoded."""
        return flops.step_flops(self.model, **flops.work_of(self.model, samples), encoded=encoded)


def random_clip(model, seconds):
    """Noise to see and to hear."""
    size, rate = model.visual.image_size, model.whisper.config.sample_rate
    return Clip(torch.randint(256, (round(seconds * model.config.fps), 3, size, size),
                              dtype=torch.uint8), 0.1 * torch.randn(round(seconds * rate)))


# ---------------------------------------------------------------- 5: the step and its parts
def parts_alone(step):
    """{part: function of `materials`}, each what the step does there, on its own."""
    model = step.model

    # Side by side, as Favor.encode_all does it: one by one they would take longer than in the step.
    def vit(m):
        with torch.inference_mode():
            frames = torch.cat([sample.clip.frames for sample in m["samples"]])
            model.visual.encode_image(to_pixels(frames.to(step.device), model.visual.image_size))

    def qformer(m):
        ids, mask = (x.to(step.device) for x in model.qformer_tokenizer([QUESTION]))
        with torch.inference_mode():
            n = len(m["images"])
            model.visual.query(m["images"], ids.expand(n, -1), mask.expand(n, -1))

    def whisper(m):
        with torch.inference_mode():
            model.whisper.encode_all([sample.clip.audio for sample in m["samples"]])

    def aligner(m):
        with step.autocast:
            tokens, queries = model.audio_visual_tokens(m["encoded"])
            total = torch.cat(tokens).float().sum() + queries.float().sum()
        total.backward()

    def llm(m):
        embeds = m["embeds"].detach().requires_grad_()
        with step.autocast:
            loss = llm_step(model.llm, embeds, m["wanted"])
        loss.backward()

    def optimiser(m):
        for p in model.trained_parameters():
            p.grad = torch.zeros_like(p)
        distributed.grad_norm_and_clip(model, step.config.grad_clip)
        step.update()

    return {"ViT": vit, "Q-Former": qformer, "Whisper": whisper, "aligner": aligner,
            "LLM": llm, "optimiser": optimiser}


def materials(step, count, seconds):
    """What the whole step and its parts take."""
    model, samples = step.model, step.samples(count, seconds)
    encoded = [model.encode_sample(s) for s in samples]
    with torch.no_grad():
        images = model.visual.encode_image(to_pixels(torch.cat(
            [s.clip.frames for s in samples]).to(step.device), model.visual.image_size))
    shape = (count, model.length(encoded[0]), model.llm.config.width)
    wanted = torch.randint(3, model.llm.config.vocab_size, (count, model.answer_tokens(samples[0])))
    return {"samples": samples, "encoded": encoded, "images": images, "wanted": wanted.to(
        step.device), "embeds": 0.02 * torch.randn(shape, device=step.device, dtype=step.dtype)}


def av_step(run: Run):
    """Target 5."""
    step = Step(run.device, run.pick(test="tiny", cuda=run.model))
    count, seconds = run.pick(test=(2, 2.0), quick=(2, 5.0), full=(16, 5.0), cuda=(16, 30.0))
    parts = parts_alone(step)
    sides = {"whole": lambda m: step(m["samples"])} | parts
    times = interleaved(run, "AV step", lambda: (materials(step, count, seconds),), sides)
    some = materials(step, count, seconds)
    far = check("AV step: loss from clips and from their features", step(some["samples"]),
                step(some["encoded"]), 1e-5 if step.dtype == torch.float32 else 1e-2)
    alone = [sum(repeat) for repeat in zip(*(times[part] for part in parts), strict=True)]
    shares = ", ".join(f"{part} {statistics.median(times[part]) * 1e3:.3g}" for part in parts)
    line = line_of(
        f"{step.name}, {count} clips of {seconds:g} s: step", times["whole"], alone,
        baseline_name="sum of its parts", wanted=run.wants(f"ratio <= {GAP}", f"ratio <= {GAP}"),
        roofline=run.roofline_ms(step.flops(some["encoded"]), step.dtype),
        remark=f"ms alone: {shares}; losses differ by {far:.0e}")
    lines = [line]
    if run.full_cuda:
        most = count / line.roofline * 1e3
        lines.append(Line("MFU, of the measured GEMM rate", "clips/s", count / line.ours * 1e3,
                          roofline=most, wanted="close >= 0.45"))
    if run.cuda or run.size == "test":                      # a CPU has no plans to make
        lines.append(ragged(run, step, count, seconds))
    return lines


def ragged(run, step, count, seconds):
    """Clips of random lengths, new ones at each step: does a new shape cost a plan?"""
    def draw():
        lengths = [seconds * (2 + torch.rand(()).item()) / 3 for _ in range(count)]
        return (step.samples(count, lengths),)

    for _ in range(3):
        step(*draw())
    times = [seconds_of(run, step, draw()) for _ in range(run.pick(test=3, quick=7, cuda=20))]
    return Line("slowest step of ragged lengths / median", "ms", max(times) * 1e3,
                statistics.median(times) * 1e3, baseline_name="median step", repeats=len(times),
                wanted=run.wants("", "ratio <= 2"))


# ---------------------------------------------------------------- 6: cached features
def cached(run: Run):
    """Target 6: a step on features read from the cache on disk, against one that encodes its clips.
    Both start from clips in memory: what decoding would add to the second is left out."""
    step = Step(run.device, run.pick(test="tiny", cuda=run.model))
    count, seconds = run.pick(test=(2, 2.0), quick=(2, 5.0), full=(16, 5.0), cuda=(16, 30.0))
    with tempfile.TemporaryDirectory() as folder:
        cache, made = FeatureCache(folder, step.model, log=lambda *_: None), []

        def make():
            samples, records = step.samples(count, seconds), []
            for sample in samples:
                record = Record(str(len(made)), "videoqa", QUESTION, ANSWER,
                                video=f"{folder}/{len(made)}.mp4")
                cache.put(record, step.model.encode_sample(sample).features)
                made.append(record)
                records.append(record)
            return samples, records

        def from_cache(records):
            return [Sample(r.prompt, r.target, features=cache.get(r)) for r in records]

        times = interleaved(run, "cached step", make, {
            "cached": lambda _, records: step(from_cache(records)),
            "fresh": lambda samples, _: step(samples)})
        samples, records = make()
        rounded = [in_half(step.model.encode_sample(sample)) for sample in samples]
        from_disk, fresh = step(from_cache(records)), step(samples)
        check_equal("loss from the cache, against its features from memory", from_disk,
                    step(rounded))
        far = check("loss from the cache", from_disk, fresh, 1e-2)
        encoded = from_cache(records)
        least = step.flops(encoded, encoded=True) / step.flops(encoded)
        limit = {"7b": f"ratio <= {1 / 4}", "13b": f"ratio <= {1 / 2.7:.3f}"}[run.model]
        line = line_of(
            f"{step.name}, {count} clips of {seconds:g} s: cached step", times["cached"],
            times["fresh"], baseline_name="uncached step", wanted=run.wants("ratio <= 0.30", limit),
            roofline=run.roofline_ms(step.flops(encoded, encoded=True), step.dtype),
            remark=f"loss equal bit for bit to fresh features in the cache's fp16; {far:.0e} from "
                 f"those in {str(step.dtype).removeprefix('torch.')}; ratio of the operations "
                 f"{least:.2f}")
        if run.size == "quick":
            return [line]
        return [line, from_files(run, step, count, seconds, lambda: step(from_cache(records)))]


def from_files(run, step, count, seconds, cached_step):
    """The same against a step that decodes its clips, too, 720p, one after the other."""
    with clip_of(seconds, **run.pick(test={"width": 64, "height": 48}, quick={})) as path:
        def fresh():
            clips = [load_clip(Record(str(i), "videoqa", QUESTION, ANSWER, video=path),
                               **step.model.clip_options()) for i in range(count)]
            return step([Sample(QUESTION, ANSWER, clip) for clip in clips])

        times = interleaved(run, "step from files", tuple, {"cached": cached_step, "fresh": fresh},
                            min(3, run.repeats))
    return line_of(f"{step.name}, {count} clips of {seconds:g} s, 720p files: cached step",
                   times["cached"], times["fresh"], baseline_name="decodes and encodes")


def in_half(sample):
    """Its features in fp16, as a FeatureCache holds them."""
    features = sample.features
    return dataclasses.replace(sample, features=dataclasses.replace(
        features, visual=features.visual.half(), audio=features.audio.half()))


# ---------------------------------------------------------------- 10: memory, processes
def memory_and_ranks(run: Run):
    """Target 10."""
    step, count = Step(torch.device("cpu")), run.pick(test=2, quick=4, full=8)
    lines = [gradients_outside(run, step, count), *two_ranks(run, step, count)]
    return lines + (on_gpus(run) if run.full_cuda else [])


def gradients_outside(run, step, count):
    """How many parameters outside the trained parts get a gradient; all inside must have one."""
    step.gradients(step.samples(count, 2.0))
    trained = ("audio_proj.", "qformer.", "llm_proj.")
    inside = {n for n, _ in step.model.named_parameters()
              if n.startswith(trained) or ".lora_" in n}
    found = {n for n, p in step.model.named_parameters() if p.grad is not None}
    step.update()
    check_equal("trained parameters without a gradient", sorted(inside - found), [])
    return Line("gradients outside LoRA, causal Q-Former, projections", "tensors",
                len(found - inside), wanted=run.wants("ours <= 0", "ours <= 0"),
                remark=f"{len(found)} tensors have one")


def two_ranks(run, step, count):
    """Loss and gradient norm of one batch in two processes with gloo against one process."""
    torch.manual_seed(1)
    samples = step.samples(count, 2.0)
    alone = copy.copy(step.gradients(samples))
    step.update()
    ranks = in_processes(2, "cpu", "tiny", count, 2.0, 1)
    check("gradient norm, two ranks", ranks[0]["grad_norm"] / alone["grad_norm"], 1.0, 1e-4)
    check_equal("losses of the two ranks", ranks[0]["loss"], ranks[1]["loss"])
    far = abs(ranks[0]["loss"] / alone["loss"] - 1)
    check("loss, two ranks", far, 0.0, 1e-4)
    return [Line("loss of 2 ranks / loss of 1, away from 1", "", far,
                 wanted=run.wants("ours <= 1e-6", "ours <= 1e-6"),
                 remark=f"loss {alone['loss']:.4f}, gloo, {count} clips")]


def in_processes(world, kind, name, count, seconds, steps):
    """rank_step() of each of `world` fresh processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [(rank, world, port, kind, name, count, seconds, steps) for rank in range(world)]
    # a fork of a process that has used a GPU cannot; where there is none it starts at once
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    with ProcessPoolExecutor(world, context) as pool:
        return list(pool.map(rank_step, jobs))


def rank_step(job):
    """In a process of its own: its share of `count` clips, `steps` times -> loss and gradient norm
    of the whole batch, median seconds of a step."""
    rank, world, port, kind, name, count, seconds, steps = job
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if kind == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        torch.set_num_threads(1)
    _, _, device = distributed.init_distributed()
    step, times = Step(device, name), []
    torch.manual_seed(1)
    mine = step.samples(count, seconds)[rank::world]
    for _ in range(steps):
        start = time.perf_counter()
        row = step.gradients(mine)                           # ends with numbers on the CPU
        step.update()
        times.append(time.perf_counter() - start)
    distributed.shutdown(step.ddp)
    return {"loss": row["loss"], "grad_norm": float(row["grad_norm"]),
            "seconds": statistics.median(times)}


def on_gpus(run):
    """The largest step that should fit on one H200, and what a second GPU adds."""
    step = Step(run.device, "13b")
    samples = step.samples(32, 30.0)
    torch.cuda.reset_peak_memory_stats(run.device)
    step(samples)
    peak = torch.cuda.max_memory_allocated(run.device) / GIB
    del step, samples
    torch.cuda.empty_cache()
    lines = [Line("13b, 32 clips of 30 s, no checkpointing: peak", "GiB", peak,
                  wanted="ours <= 115", remark="calculated: 102")]
    if torch.cuda.device_count() < 2:
        return [*lines, Line("GPUs here; 2 would be needed for the scaling", "GPUs", 1)]
    one = in_processes(1, "cuda", run.model, 16, 30.0, 7)[0]["seconds"]
    two = in_processes(2, "cuda", run.model, 32, 30.0, 7)[0]["seconds"]
    return [*lines, Line("2 GPUs over 1, clips per second", "x", 2 * one / two,
                         wanted="ours >= 1.9")]


# ---------------------------------------------------------------- 11: live answers
def live_answers(run: Run):
    """First token of the answer after the last window of a clip: live, where the windows before it
    were answered, too, against an answer to the clip as it is then."""
    model = Step(run.device, run.pick(test="tiny", cuda=run.model)).model.eval()
    lines = []
    for seconds in run.pick(test=(10.0,), quick=(30.0,), full=(10.0, 30.0, 60.0)):
        whole = random_clip(model, seconds)
        window = model.config.window_frames / model.config.fps

        def before(whole=whole, t=seconds - window):
            live = Live(model, QUESTION)
            live.answer(seen(whole, t, None), max_new_tokens=1)
            return (live,)

        sides = {"live": lambda live, whole=whole: live.answer(whole, max_new_tokens=1),
                 "anew": lambda live, whole=whole: model.answer(
                     whole, QUESTION, max_new_tokens=1, num_beams=1)}
        times = interleaved(run, f"live at {seconds:g} s", before, sides)
        check_equal("the live answer", *(side(*before()) for side in sides.values()))
        lines.append(line_of(f"first token of the answer at {seconds:g} s", times["live"],
                             times["anew"], baseline_name="the clip anew",
                             wanted="ratio <= 1.0"))
    return lines
