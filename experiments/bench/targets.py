"""The targets 1 to 4 and 7, which time one part against a baseline: attention, ViT, Whisper, LLM
and decoding.

Each function takes a measure.Run, returns its Lines, and raises Wrong where the two sides do not
compute the same. Whole steps are in steps.py, media in media.py.

Public: attention, vision, hearing, language, decoding."""

import math
import shutil
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora
from experiments.bench import baselines
from experiments.bench.measure import (
    MIB,
    Line,
    Run,
    check,
    check_equal,
    compare,
    interleaved,
    kernels,
    line_of,
    peak_bytes,
    threads,
)
from favor import block_causal_attention, block_causal_mask
from llama import LlamaConfig
from runtime import flops
from tools.memory import VICUNA_13B
from vit_qformer import ViTConfig
from whisper_enc import WhisperConfig, log_mel_spectrogram

LLAMA = {"7b": LlamaConfig(), "13b": VICUNA_13B}
SMALL = LlamaConfig(width=1024, layers=4, heads=16, kv_heads=16, ffn=2752)   # the notes' own size
TEST = LlamaConfig(vocab_size=61, width=64, layers=2, heads=4, kv_heads=4, ffn=96)
# largest difference of numbers around 1; in bf16 the relative one
TOLERANCE = {torch.float32: (2e-5,), torch.bfloat16: (3e-2, True)}


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def path_and_difference(run, ours, inputs, far):
    return f"{', '.join(kernels(run, ours, *inputs))}; difference {far:.0e}"


def peak_line(run, what, inputs, ours, baseline, **rest):
    """Peak memory of both sides, in MiB."""
    return Line(what, "MiB", peak_bytes(run, ours, *inputs) / MIB,
                peak_bytes(run, baseline, *inputs) / MIB, **rest)


# ---------------------------------------------------------------- 1: block-causal attention
def explicit_mask(q, k, v, per_frame):
    """Attention as the authors' code computes it: all scores, an additive mask, softmax."""
    mask = block_causal_mask(q.shape[2] // per_frame, per_frame, "past", q.device)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -10000.0)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    return scores.softmax(dim=-1) @ v


def forward_backward(attend):
    """attend -> function of q, k, v and the output's gradient -> output and three gradients."""
    def both(q, k, v, gradient):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        return y, *torch.autograd.grad(y, leaves, gradient)
    return both


def block_causal_flops(batch, heads, frames, per_frame, d):
    """Forward and backward (2.5 times that) over the pairs that are seen."""
    seen = (frames + 1) / (2 * frames)
    return 3.5 * seen * batch * flops.attention(frames * per_frame, frames * per_frame, heads * d)


def attention(run: Run):
    """Target 1.  Shapes: frames, vectors per frame, batch, heads, limit of the time."""
    shapes = run.pick(
        test=((3, 4, 2, 2, ""), (5, 4, 2, 2, "")),
        quick=((10, 32, 4, 12, "ratio <= 0.70"), (20, 64, 1, 6, "ratio <= 0.42"),
               (60, 32, 1, 3, "ratio <= 0.42")),
        full=((10, 32, 4, 12, "ratio <= 0.70"), (20, 64, 4, 12, "ratio <= 0.42"),
              (60, 32, 4, 12, "ratio <= 0.42")),
        cuda=((10, 32, 48, 12, "ratio <= 0.5"), (60, 32, 8, 12, "ratio <= 0.2")))
    d = run.pick(test=8, quick=64, cuda=128)
    dtype = torch.bfloat16 if run.cuda else torch.float32
    lines, peaks = [], []
    for frames, per_frame, batch, heads, limit in shapes:
        def make(shape=(batch, heads, frames * per_frame, d)):
            return [torch.randn(shape, device=run.device, dtype=dtype) for _ in range(4)]

        ours, baseline = (
            forward_backward(lambda q, k, v, f=f, n=per_frame: f(q, k, v, per_frame=n))
                      for f in (block_causal_attention, explicit_mask))
        inputs, what = make(), f"{frames}x{per_frame}, batch {batch}, {heads} heads x {d}"
        work = block_causal_flops(batch, heads, frames, per_frame, d)
        line = compare(
            run, f"{what}: forward + backward", make, ours, baseline, baseline_name="explicit mask",
            roofline=run.roofline_ms(work, dtype), wanted=run.wants(limit, limit))
        far = max(check(f"attention {what}", *pair, *TOLERANCE[dtype])
                  for pair in zip(ours(*inputs), baseline(*inputs), strict=True))
        line.remark = path_and_difference(run, ours, inputs, far)
        lines.append(line)
        peaks.append(peak_line(run, f"{what}: peak memory", inputs, ours, baseline,
                               baseline_name="explicit mask",
                               roofline=4 * inputs[0].nbytes / MIB))   # output, three gradients
    if run.size == "full":                # the one mask weighs more where batch and heads are few
        peaks[-1].wanted = run.wants("ratio <= 0.10")
    lines += [*peaks, no_square(run, shapes, peaks)]
    return lines + ([flash_only(run, ours, inputs)] if run.cuda else [])


def no_square(run, shapes, peaks):
    """Peak memory a vector in the longest clip over that in the shortest: 1 where nothing is S^2,
    else 6 from 320 to 1920 vectors."""
    a_vector = [line.ours / (T * n * batch * heads) for line, (T, n, batch, heads, _) in
                zip(peaks, shapes, strict=True)]
    return Line("memory a vector, longest clip / shortest", "x", a_vector[-1] / a_vector[0],
                wanted=run.wants("", "ours <= 2"),
                remark="6 if a matrix of S x S were kept for each head")


def flash_only(run, ours, inputs):
    """Raises where the flash kernel would not take the call."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        ours(*inputs)
    return Line("calls that sdpa_kernel(FLASH_ATTENTION) refuses", "calls", 0, wanted="ours <= 0")


# ---------------------------------------------------------------- 2: ViT
@torch.inference_mode()
def vision(run: Run):
    """Target 2."""
    config = run.pick(test=ViTConfig(width=32, layers=2, heads=2, ffn=64, image_size=28),
                      quick=ViTConfig(layers=2), cuda=ViTConfig())
    frames, dtype = run.pick(test=2, quick=1, full=8, cuda=256), torch.bfloat16
    ours, baseline = baselines.vit_pair(config, dtype, run.device)

    def make(n=frames):
        return (torch.randn(n, 3, config.image_size, config.image_size, device=run.device,
                            dtype=dtype),)

    work = frames * flops.vit_flops(ours)
    line = compare(
        run, f"{config.layers} layers, bf16, frames: {frames}", make, ours, baseline,
        baseline_name="transformers sdpa", roofline=run.roofline_ms(work, dtype),
        wanted=run.wants("ratio <= 1.02", f"ratio <= {1 / 1.05:.3f}"))
    inputs = make(1)
    far = check("ViT", ours(*inputs), baseline(*inputs).last_hidden_state, *TOLERANCE[dtype])
    line.remark = path_and_difference(run, ours, inputs, far)
    more = vision_on_gpu(run, line, ours, baseline, make, frames) if run.full_cuda else ()
    return [line, *more]


def vision_on_gpu(run, line, ours, baseline, make, frames):
    """Frames per second, compiled, and what batching gives."""
    most = frames / line.roofline * 1e3
    rate = Line(f"{frames} frames at a time", "frames/s", frames / line.ours * 1e3, roofline=most,
                wanted="ours >= 900")
    share = Line("share of the GEMM rate", "frames/s", rate.ours, roofline=most,
                 wanted="close >= 0.6")
    compiled = compare(run, "compiled", make, torch.compile(ours), baseline, wanted=f"ratio <= "
                       f"{1 / 1.15:.3f}", baseline_name="transformers sdpa", roofline=line.roofline)
    one = compare(run, "one frame at a time", lambda: make(1), ours, baseline,
                  baseline_name="transformers")
    batched = Line("a frame of the batch / a frame alone", "ms", line.ours / frames, one.ours,
                   baseline_name="one by one", wanted=f"ratio <= {1 / 3:.3f}")
    return [rate, share, compiled, one, batched]


# ---------------------------------------------------------------- 3: Whisper
@torch.inference_mode()
def hearing(run: Run):
    """Target 3."""
    config = run.pick(test=WhisperConfig(width=32, layers=2, heads=2, ffn=64),
                      quick=WhisperConfig(layers=2, max_source_positions=250),
                      full=WhisperConfig(layers=2), cuda=WhisperConfig())
    chunks, seconds = run.pick(test=1, cuda=32), config.chunk_samples / config.sample_rate
    lines = []
    for dtype in (torch.bfloat16,) if run.cuda else (torch.float32, torch.bfloat16):
        ours, baseline = baselines.whisper_pair(config, dtype, run.device)

        def make(dtype=dtype):
            return (torch.randn(chunks, config.n_mels, 2 * config.max_source_positions,
                                device=run.device, dtype=dtype),)

        work = chunks * flops.whisper_flops(ours, seconds)
        lines.append(compare(
            run, f"encoder, {config.layers} layers, {dtype_name(dtype)}, {chunks} x {seconds:g} s",
            make, ours, baseline, baseline_name="transformers sdpa",
            roofline=run.roofline_ms(work, dtype),
            wanted=run.wants("ratio <= 1.0", "ratio <= 1.0")))
        inputs = make()
        far = check(f"Whisper {dtype_name(dtype)}", ours(*inputs),
                    baseline(*inputs).last_hidden_state,
                    *TOLERANCE[dtype])
        lines[-1].remark = path_and_difference(run, ours, inputs, far)
    if run.full_cuda:
        rate, most = (chunks / ms * 1e3 for ms in (lines[-1].ours, lines[-1].roofline))
        lines += [Line("encoder", "chunks/s", rate, roofline=most, wanted="ours >= 174",
                       remark=f"{30 * rate:.0f} times real time"),
                  Line("encoder, share of the GEMM rate", "chunks/s", rate, roofline=most,
                       wanted="close >= 0.5")]
    return [*lines, log_mel(run)]


def log_mel(run):
    extractor = baselines.needed("transformers").WhisperFeatureExtractor()
    seconds = run.pick(test=1, quick=30)

    def make():
        return (torch.randn(seconds * 16000) * 0.1,)

    def ours(audio):
        return log_mel_spectrogram(audio.to(run.device))

    def baseline(audio):
        return extractor(audio.numpy(), sampling_rate=16000, return_tensors="pt",
                         device=str(run.device)).input_features

    line = compare(run, f"log-mel of {seconds} s", make, ours, baseline,
                   baseline_name="WhisperFeatureExtractor", wanted=run.wants("ratio <= 1.0"))
    inputs = make()
    far = check("log-mel", ours(*inputs).cpu(), baseline(*inputs).cpu(), 1e-4)
    line.remark = f"difference {far:.0e}, allowed 1e-4"
    return line


# ---------------------------------------------------------------- 4: LLaMA + LoRA, a training step
def llm_step(llm, embeds, wanted):
    """embeds (B,T,D) of which the last n positions are the answer wanted (B,n) -> its mean
    cross-entropy, as Favor.forward computes it: the lm_head at the answer only."""
    n = wanted.shape[1]
    hidden = llm.hidden(embeds=embeds)[:, -n - 1:-1]                             # (B,n,D)
    return F.cross_entropy(llm.lm_head(hidden.reshape(-1, hidden.shape[-1])).float(),
                           wanted.flatten())


def llm_flops(llm, batch, tokens, answer):
    """Of a step, 4 a weight and token (flops.py), and the lm_head at the answer."""
    config, adapters = llm.config, flops.weights(llm.model.layers, named=".lora_")
    width = config.heads * config.head_dim
    linear = 4 * (flops.weights(llm.model.layers) - adapters) + 6 * adapters
    return batch * (linear * tokens + 3 * config.layers * flops.attention(tokens, tokens, width) / 2
                    + 4 * flops.weights(llm.lm_head) * answer)


def both_steps(run, ours, baseline, dtype):
    """(our step, the baseline's), functions of embeds (B,T,D), ids (B,n): forward, backward down to
    the embeddings, a step of AdamW with rate 0 -> loss, gradient of the embeddings."""
    def stepping(model, loss_of):
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0,
                                      fused=True)

        def step(embeds, wanted):
            embeds = embeds.detach().requires_grad_()
            with run.autocast(dtype):
                loss = loss_of(model, embeds, wanted)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            return loss.detach(), embeds.grad
        return step

    def baseline_loss(model, embeds, wanted):
        labels = F.pad(wanted, (embeds.shape[1] - wanted.shape[1], 0), value=-100)
        return model(inputs_embeds=embeds, labels=labels, use_cache=False).loss

    return stepping(ours, llm_step), stepping(baseline, baseline_loss)


def language(run: Run):
    """Target 4."""
    config = run.pick(test=TEST, quick=replace(SMALL, layers=2), full=SMALL,
                      cuda=LLAMA[run.model])
    batch, tokens, answer = run.pick(test=(2, 16, 4), quick=(1, 128, 20), full=(4, 256, 40),
                                     cuda=({"7b": 32, "13b": 16}[run.model], 292, 40))
    lines, both = [], (torch.float32, torch.bfloat16)
    for dtype in run.pick(test=both, quick=both[:1], full=both, cuda=both[1:]):
        pair = baselines.lora_pair(config, dtype, run.device)
        ours, baseline = both_steps(run, *pair, dtype)

        def make(dtype=dtype):
            return (0.02 * torch.randn(batch, tokens, config.width, device=run.device, dtype=dtype),
                    torch.randint(config.vocab_size, (batch, answer), device=run.device))

        inputs = make()
        what = (f"{dtype_name(dtype)}, {config.layers} layers, {batch} x {tokens} tokens, "
                f"{answer} learnt")
        work, limit = llm_flops(pair[0], batch, tokens, answer), dtype == torch.float32
        lines.append(compare(
            run, f"{what}: step", make, ours, baseline, baseline_name="transformers + peft",
            roofline=run.roofline_ms(work, dtype),
            wanted=run.wants("ratio <= 0.65" if limit else "ratio <= 0.60",
                             f"ratio <= {1 / 1.3:.3f}")))
        lines[-1].remark = same_step(f"LLM step {what}", ours(*inputs), baseline(*inputs), dtype)
        lines.append(peak_line(run, f"{what}: peak memory", inputs, ours, baseline,
                               baseline_name="transformers + peft",
                               wanted=run.wants("ratio <= 0.45")))
        if run.full_cuda:
            lines += token_rates(run, lines[-2], batch * tokens)
        del pair, ours, baseline
    return lines


def same_step(what, ours, baseline, dtype):
    """Losses to 1e-5, in bf16 0.02; gradients of the input to 1e-3, in bf16 0.2 of their size."""
    exact = dtype == torch.float32
    far = check(f"{what}: loss", ours[0], baseline[0], 1e-5 if exact else 2e-2)
    check(f"{what}: gradient of its input", ours[1], baseline[1], 1e-3 if exact else 0.2, True)
    return f"losses differ by {far:.0e}"


def token_rates(run, line, tokens):
    rate, most = (tokens / ms * 1e3 for ms in (line.ours, line.roofline))
    limit = {"7b": 14600, "13b": 7600}[run.model]
    return [Line(f"{run.model}, {tokens} tokens", "tokens/s", rate, roofline=most,
                 wanted=f"ours >= {limit}"),
            Line("share of the GEMM rate, 4 operations a weight", "tokens/s", rate, roofline=most,
                 wanted="close >= 0.5")]


# ---------------------------------------------------------------- 7: decoding
def merged_pair(config, dtype, device):
    """(ours with LoRA merged in, LlamaForCausalLM on the same merged weights)."""
    ours, baseline = baselines.llama(config, dtype, device)
    lora.inject(ours, baselines.LORA)
    for layer in lora.layers(ours).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.02)
    lora.merge(ours)                                   # in place: the baseline's weights are these
    return ours.eval(), baseline


def in_fixed_steps(llm, generate):
    """generate, but with compiled steps of fixed shape, on a GPU as one CUDA graph."""
    def compiled(*inputs):
        llm.compiled = True
        try:
            return generate(*inputs)
        finally:
            llm.compiled = False
    return compiled


@torch.no_grad()
def decoding(run: Run):
    """Target 7: greedy, batch 1; on a CPU in fp32 on one thread."""
    config = run.pick(test=TEST, quick=replace(SMALL, layers=2), full=SMALL,
                      cuda=LLAMA[run.model])
    prompt, new = run.pick(test=(5, 6), quick=(32, 16), full=(32, 48), cuda=(292, 128))
    dtype = torch.bfloat16 if run.cuda else torch.float32
    llm, hf = merged_pair(config, dtype, run.device)

    def make():
        return (torch.randint(3, config.vocab_size, (1, prompt), device=run.device),)

    def ours(ids):
        return llm.generate(ids, max_new_tokens=new, eos_id=-1)[0]

    def baseline(ids):
        return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                           do_sample=False)[0, prompt:].tolist()

    with threads(torch.get_num_threads() if run.cuda else 1):
        sides = {"ours": ours, "baseline": baseline}
        if run.cuda or run.size == "full" and shutil.which("g++"):       # a minute to compile
            sides["fixed"] = in_fixed_steps(llm, ours)
        seconds = interleaved(run, "decoding", make, sides)
        remark = same_tokens(sides, make, dtype)
    weights = flops.weights(llm.model.layers, llm.lm_head) - flops.weights(
        llm.model.layers, named=".lora_")
    roofline = run.roofline_ms(n_bytes=llm.lm_head.weight.element_size() * weights,
                         bandwidth="copy" if run.cuda else "gemv, 1 thread")
    names = {"ours": "eager", "fixed": "CUDA graph" if run.cuda else "compiled"}
    lines = [line_of(f"{config.layers} layers, {names[side]}: a token", seconds[side],
                     seconds["baseline"], 1e3 / new, baseline_name="transformers generate",
                     roofline=roofline,
                     remark=remark)
             for side in sides if side != "baseline"]
    lines[-1].wanted = run.wants(f"ratio <= {1 / 1.1:.3f}", f"ratio <= {1 / 3:.3f}")
    return lines + (decoding_rates(run, lines[-1]) if run.full_cuda else [])


def same_tokens(sides, make, dtype):
    """In fp32 all tokens must be equal; in bf16 two likely ones may change places: then the share
    that is equal is reported, and the first token must be.  -> in words."""
    (ids,) = make()
    tokens = {name: side(ids) for name, side in sides.items()}
    for name, mine in tokens.items():
        theirs = tokens["baseline"]
        n = len(theirs) if dtype == torch.float32 else 1
        check_equal(f"decoding, {name}: tokens", mine[:n], theirs[:n])
        check_equal(f"decoding, {name}: number of tokens", len(mine), len(theirs))
    equal = sum(a == b for a, b in zip(tokens["ours"], tokens["baseline"], strict=True))
    return f"{equal}/{len(tokens['baseline'])} tokens equal ({dtype_name(dtype)})"


def decoding_rates(run, line):
    limit = {"7b": 255, "13b": 130}[run.model]
    rate, most = 1e3 / line.ours, 1e3 / line.roofline
    return [Line(f"{run.model}, batch 1", "tokens/s", rate, roofline=most,
                 wanted=f"ours >= {limit}"),
            Line("share of the copy bandwidth", "tokens/s", rate, roofline=most,
                 wanted="close >= 0.8")]
