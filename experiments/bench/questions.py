"""Measurements that a first run on a GPU should bring: our side alone, without limits and without
transformers. `python -m experiments.bench --only questions` runs them.

     1  which kernels do masked, unmasked and one-hot attention take, at S = 320 and 1920
     2  what does cuDNN's attention cost on 20 lengths that it has not met
     3  ViT frames per second, 1, 16, 64, 256 at a time
     4  tokens per second of a LLaMA + LoRA step of 2k, 8k, 16k tokens
     5  decoding with and without a CUDA graph

Public: questions."""

import statistics
from functools import partial

import torch
import torch.nn.functional as F

import lora
from experiments.bench.baselines import LORA
from experiments.bench.measure import Line, Run, interleaved, kernels, seconds_of
from experiments.bench.targets import (
    LLAMA,
    TEST,
    both_steps,
    forward_backward,
    in_fixed_steps,
    llm_flops,
)
from favor import block_causal_mask
from llama import Llama
from runtime import flops
from runtime.fast import flash_block_causal
from tools import memory as sizes
from vit_qformer import ViT, ViTConfig

DTYPE = torch.bfloat16


def questions(run: Run):
    return [*which_kernels(run), *new_lengths(run), *frames_at_a_time(run), *tokens_at_a_time(run),
            *decoding_alone(run)]


def alone(run, what, make, side, repeats=None):
    """Median seconds of one side."""
    return statistics.median(interleaved(run, what, make, {"ours": side}, repeats)["ours"])


def random_module(run, cls, config):
    """Ours with random weights in bf16, frozen."""
    with torch.device("meta"):
        module = cls(config)
    module = module.to(DTYPE).to_empty(device=run.device)
    return sizes.fill(module).eval().requires_grad_(False)


def which_kernels(run):
    """1: forward and backward of each way to compute block-causal attention, and without a mask."""
    order = getattr(torch._C, "_get_sdp_priority_order", lambda: "unknown")()
    lines = [Line("SDPA backends that torch knows, in their order", "backends", len(order),
                  remark=f"{order} (0 math, 1 flash, 2 efficient, 3 cuDNN)")]
    heads, d, n = run.pick(test=(2, 8, 4), quick=(12, 128, 32))
    for frames, batch in run.pick(test=((3, 2),), quick=((10, 2), (60, 1)), cuda=((10, 48),
                                                                                 (60, 8))):
        mask = block_causal_mask(frames, n, "past", run.device)

        def make(shape=(batch, heads, frames * n, d)):
            return [torch.randn(shape, device=run.device, dtype=DTYPE) for _ in range(4)]

        ways = {"masked": partial(F.scaled_dot_product_attention, attn_mask=mask),
                "unmasked": F.scaled_dot_product_attention,
                "one-hot": partial(flash_block_causal, per_frame=n)}
        ways = {name: forward_backward(way) for name, way in ways.items()}
        seconds = interleaved(run, f"kernels, {frames} frames", make, ways)
        medians = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        lines += [Line(f"S = {frames * n}, batch {batch}, {heads} x {d}: {name}", "ms", ms,
                       medians["unmasked"], "unmasked", repeats=run.repeats,
                       remark=", ".join(kernels(run, ways[name], *make())))
                  for name, ms in medians.items()]
    return lines


def new_lengths(run):
    """2: causal attention of 20 random lengths, met for the first time and once more."""
    lines, before = [], torch.backends.cuda.cudnn_sdp_enabled()
    attend = forward_backward(partial(F.scaled_dot_product_attention, is_causal=True))
    heads, d, longest = run.pick(test=(2, 8, 32), quick=(8, 64, 256), cuda=(32, 128, 1024))
    try:
        for on in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(on)
            lengths = torch.randperm(longest)[:20].add(8).tolist()
            inputs = [[torch.randn(4, heads, n, d, device=run.device, dtype=DTYPE)
                       for _ in range(4)] for n in lengths]
            new, again = (sum(seconds_of(run, attend, x) for x in inputs) for _ in range(2))
            lines.append(Line(f"20 new lengths, cuDNN {'allowed' if on else 'off'}", "ms",
                              new * 1e3, again * 1e3, "the same lengths again",
                              remark=", ".join(kernels(run, attend, *inputs[0]))))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    return lines


@torch.inference_mode()
def frames_at_a_time(run):
    """3."""
    config = run.pick(test=ViTConfig(width=32, layers=1, heads=2, ffn=64, image_size=28),
                      quick=ViTConfig(layers=1), cuda=ViTConfig())
    vit, lines = random_module(run, ViT, config), []
    for n in run.pick(test=(1, 2), quick=(1, 16), cuda=(1, 16, 64, 256)):
        def make(shape=(n, 3, config.image_size, config.image_size)):
            return (torch.randn(shape, device=run.device, dtype=DTYPE),)

        seconds = alone(run, f"ViT, {n} frames", make, vit)
        roofline = run.roofline_ms(n * flops.vit_flops(vit), DTYPE)
        lines.append(Line(f"ViT, {config.layers} layers, {n} at a time", "frames/s", n / seconds,
                          roofline=roofline and n / roofline * 1e3, repeats=run.repeats))
    return lines


def tokens_at_a_time(run):
    """4: forward, backward down to the input, AdamW on the adapters."""
    config = run.pick(test=TEST, quick=TEST, cuda=LLAMA[run.model])
    length, answer = run.pick(test=(16, 4), cuda=(292, 40))
    llm = lora.inject(random_module(run, Llama, config), LORA).train()
    step, lines = both_steps(run, llm, llm, DTYPE)[0], []
    for tokens in run.pick(test=(32, 64), cuda=(2048, 8192, 16384)):
        batch = max(1, tokens // length)

        def make(batch=batch):
            return (0.02 * torch.randn(batch, length, config.width, device=run.device, dtype=DTYPE),
                    torch.randint(config.vocab_size, (batch, answer), device=run.device))

        try:
            seconds = alone(run, f"LLM step, {tokens} tokens", make, step)
        except torch.OutOfMemoryError as error:
            lines.append(Line(f"LLaMA + LoRA step, {batch} x {length} tokens", "tokens/s", 0,
                              remark=f"no memory: {str(error)[:80]}"))
            continue
        roofline = run.roofline_ms(llm_flops(llm, batch, length, answer), DTYPE)
        lines.append(Line(f"LLaMA + LoRA step, {batch} x {length} tokens", "tokens/s",
                          batch * length / seconds, repeats=run.repeats,
                          roofline=roofline and batch * length / roofline * 1e3))
    return lines


@torch.no_grad()
def decoding_alone(run):
    """5: greedy, batch 1."""
    config = run.pick(test=TEST, quick=TEST, cuda=LLAMA[run.model])
    llm, new = random_module(run, Llama, config), run.pick(test=4, cuda=128)

    def eager(ids):
        return llm.generate(ids, max_new_tokens=new, eos_id=-1)

    def make():
        return (torch.randint(3, config.vocab_size, (1, run.pick(test=5, cuda=292)),
                              device=run.device),)

    n_bytes = 2 * flops.weights(llm.model.layers, llm.lm_head)
    roofline, lines = run.roofline_ms(n_bytes=n_bytes), []
    ways = {"eager": eager} | ({"CUDA graph": in_fixed_steps(llm, eager)} if run.cuda else {})
    for name, way in ways.items():
        seconds = alone(run, f"decoding, {name}", make, way)
        lines.append(Line(f"decoding, {name}", "tokens/s", new / seconds, repeats=run.repeats,
                          roofline=roofline and 1e3 / roofline))
    return lines
