"""Floating-point operations of a training step, and the peak of known GPUs, for MFU.

A matrix of N weights costs 2N operations per position, a multiplication and an addition per weight:
    forward                    y = W x         2N
    gradient of the input      dx = W' dy      2N      if something before it learns
    gradient of the weights    dW = dy x'      2N      if the matrix itself is trained
So what learns costs 6N, the frozen LLM behind the aligner 4N and the frozen encoders 2N.  Attention
of n queries over m keys costs 2 products of 2 n m width forward, and twice that backward.  Masked
pairs count, as in PaLM's MFU (Chowdhery et al. 2022, Appendix B).  Padding, recomputation, norms,
means, softmax, the optimiser, the lm_head and the question in the visual Q-Former do not count.

torch.utils.flop_counter finds the same numbers (tests/runtime/test_log.py), but it intercepts every
operation: a step of the tiny preset took 0.53 s instead of 0.17 s on one core.

     encoded samples --work_of--> tokens, windows, frames --step_flops--> operations
     operations / seconds / peak_flops(device) = MFU, the share of the GPU's published peak

Public: work_of, step_flops, flops_by_part, peak_flops."""

import math
import re

import torch


def attention(queries, keys, width):
    """Forward operations of all heads together; `width` is the sum of their widths."""
    return 2 * (2 * queries * keys * width)


def weights(*modules, named=""):
    """Number of weights in the matrices and convolutions whose names contain `named`, without norms
    and biases.  The modules that are passed contain no embeddings."""
    return sum(p.numel() for module in modules for name, p in module.named_parameters()
               if p.ndim >= 2 and named in name)


def work_of(model, samples):
    """Encoded Samples (model.encode_sample) -> the arguments of step_flops, as a dict."""
    features = [sample.features for sample in samples]
    return {"llm_tokens": [model.length(sample) for sample in samples],
            "windows": sum(model.window_count(sample) for sample in samples),
            "frames": sum(len(f.visual) for f in features if f.visual is not None),
            "audio_seconds": [len(f.audio) / model.whisper.config.positions_hz
                              for f in features if f.audio is not None]}


def step_flops(model, llm_tokens, windows, frames, audio_seconds, encoded):
    """Operations of one training step, forward and backward, of a Favor or an InstructBlip of any
    size, also on the device "meta".  llm_tokens: L of each sample; windows, frames: of all samples
    together; audio_seconds: of each clip with sound; encoded: whether the features were cached, so
    that ViT, Q-Former and Whisper did not run."""
    return sum(flops_by_part(model, llm_tokens, windows, frames, audio_seconds, encoded).values())


def flops_by_part(model, llm_tokens, windows, frames, audio_seconds, encoded):
    """{part: operations}; see step_flops."""
    llm, tokens = model.llm, sum(llm_tokens)
    adapters = weights(llm.model.layers, named=".lora_")
    width = llm.config.heads * llm.config.head_dim
    parts = {
        "LLM": 4 * (weights(llm.model.layers) - adapters) * tokens,
        "LLM attention": 3 * llm.config.layers * sum(attention(L, L, width) for L in llm_tokens),
        "LoRA": 6 * adapters * tokens}
    if not encoded:
        parts["ViT"] = frames * vit_flops(getattr(model.visual, "vit", model.visual))
    if model.system == "instructblip":                  # here the visual Q-Former learns
        parts["visual Q-Former"] = 3 * frames * visual_qformer_flops(model.visual)
        parts["language projection"] = (
            6 * weights(model.language_projection) * frames * model.visual.n_queries)
        return parts
    if not encoded and model.visual.reads_question:
        parts["visual Q-Former"] = frames * visual_qformer_flops(model.visual)
    if not encoded:
        parts["Whisper"] = sum(whisper_flops(model.whisper, seconds) for seconds in audio_seconds)
    steps = sum(audio_seconds) * model.whisper.config.positions_hz
    K = model.config.window_frames                  # frames per window; 0: one window per clip
    if not K and windows:
        K = max(frames, steps / model.audio_steps) / windows
    parts["audio projection"] = 6 * weights(model.audio_proj) * steps
    parts["causal Q-Former"] = 3 * windows * causal_qformer_flops(model, K)
    parts["LLM projection"] = 6 * weights(model.llm_proj) * windows * model.config.queries
    return parts


def causal_qformer_flops(model, K):
    """Forward operations of one window of K frames.  Of another aligner in its place the matrices
    are counted, each at every joint vector."""
    Q, N, total = model.config.queries, max(model.visual.n_queries, model.audio_steps), 0
    if not hasattr(model.qformer, "layers"):
        return 2 * weights(model.qformer) * K * N
    for layer in model.qformer.layers:
        cross, D = layer.cross_attention, model.config.width
        of_frames = weights(cross.key, cross.value)           # applied to K*N joint vectors
        of_queries = weights(layer.self_attention, cross, layer.up, layer.down) - of_frames
        total += attention(Q, Q, D) + attention(Q, K * N, D)
        if model.config.causal != "none":
            of_frames += weights(layer.causal_attention)
            total += attention(K * N, K * N, layer.causal_attention.query.out_features)
        total += 2 * of_frames * K * N + 2 * of_queries * Q
    direct = getattr(model.qformer, "direct", None)
    return total + (2 * weights(direct) * K * N if direct else 0)


def vit_flops(vit):
    """Forward operations of one frame in InstructBLIP's ViT or in a GridEncoder: P tokens, which
    are the patches, CLS and registers."""
    config = vit.config
    P = config.n_patches + getattr(config, "first_patch", 1)           # InstructBLIP's: CLS alone
    return (2 * weights(vit, named="patch_embedding") * config.n_patches
            + 2 * weights(vit, named="layers.") * P + config.layers * attention(P, P, config.width))


def visual_qformer_flops(visual):
    """Forward operations of V queries over one frame of P patches."""
    V, P, total = visual.n_queries, visual.vit.config.n_patches + 1, 0
    for layer in visual.qformer.encoder.layer:
        of_queries = weights(layer.attention, layer.intermediate_query, layer.output_query)
        total += attention(V, V, visual.width)
        if layer.crossattention is not None:
            of_patches = weights(layer.crossattention.attention.key,
                                 layer.crossattention.attention.value)
            of_queries += weights(layer.crossattention) - of_patches
            total += 2 * of_patches * P + attention(V, P, visual.width)
        total += 2 * of_queries * V
    return total


def whisper_flops(whisper, seconds):
    """Forward operations of one clip, which is padded to whole chunks of 30 s."""
    config, P = whisper.config, whisper.config.max_source_positions
    chunks = max(1, math.ceil(round(seconds * config.positions_hz) / P))
    convolutions = 2 * weights(whisper.conv1) * 2 * P + 2 * weights(whisper.conv2) * P
    return chunks * (convolutions + 2 * weights(whisper.layers) * P
                     + config.layers * attention(P, P, config.width))


# FLOP/s for dense bf16 matrices in NVIDIA's data sheets ("with sparsity" is twice that); GeForce
# with fp32 accumulation; V100 and T4, which lack bf16, in fp16.  The first matching pattern counts.
PEAKS = ((r"\bB200\b", 2250e12), (r"\b(H100|H200)\b.* NVL", 835e12),
         (r"\b(H100|H800)\b.* PCIe", 756e12), (r"\b(H100|H200|GH200|H800)\b", 989e12),
         (r"\bH20\b", 148e12), (r"\b(A100|A800)\b", 312e12), (r"\bA30\b", 165e12),
         (r"\bA40\b", 150e12), (r"\bA10\b", 125e12), (r"\bL40S\b", 362e12), (r"\bL40\b", 181e12),
         (r"\bL4\b", 121e12), (r"\bRTX 6000 Ada\b", 364e12), (r"\bRTX A6000\b", 155e12),
         (r"\bRTX 4090$", 165e12), (r"\bRTX 3090$", 71e12),     # no 4090 D, no laptop's
         (r"\bV100-SXM2", 125e12), (r"\bV100-PCIE", 112e12), (r"\bT4\b", 65e12))


def peak_flops(device):
    """Published FLOP/s of one GPU (a torch.device, or its name); None for a CPU, for a GPU that is
    not in the table and for a slice of a GPU (MIG)."""
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    return None if " MIG " in device else next(
        (peak for name, peak in PEAKS if re.search(name, device)), None)
