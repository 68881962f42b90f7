"""favor.py on tiny random parts: Eq. (1) to (5) by hand, who may influence whom, what is learnt.

     A = 10 audio steps, V = 12 visual vectors per frame, so N = 12
     K = 2 frames per window, Q = 3 queries
Every number that a test compares with is made here by loops or by hand, never by favor.py."""

import copy
import dataclasses
import io
import itertools
import json
import math
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from parity import check, randomise
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import favor
import lora
from data import Clip, clip_from_path
from favor import (
    OFFICIAL,
    PRESETS,
    CausalQFormer,
    Favor,
    FavorConfig,
    Features,
    FeatureStatistics,
    Sample,
    block_causal_attention,
    block_causal_mask,
    diversity_loss,
    preset,
    prompt_ids,
    split_windows,
    synchronise,
)
from llama import Llama, LlamaConfig, Tokenizer
from runtime import hub
from runtime.fast import flash_block_causal
from runtime.media import write_wav
from vit_qformer import QFormerConfig, QFormerTokenizer, VisualEncoder, ViTConfig
from whisper_enc import WhisperConfig, WhisperEncoder

A, V, K, Q = 10, 12, 2, 3
N = max(A, V)
RATE = 16000
WHISPER = WhisperConfig(n_mels=80, width=20, layers=1, heads=2, ffn=32, max_source_positions=50,
                        n_fft=512, hop=400)    # 16000 / (2 * 400) = 20 per second; chunks of 2.5 s
VIT = ViTConfig(width=16, layers=1, heads=2, ffn=24, image_size=28, patch_size=14)
CONFIG = FavorConfig(
    window_frames=K, queries=Q, width=20, layers=2, heads=2, causal_heads=4, ffn=28,
    max_positions=8 * N,    lora_r=4, lora_alpha=4, max_new_tokens=8)
SHORT_OFFICIAL = OFFICIAL | {"audio_seconds": 3.0, "image_frames": 6}    # 3 s instead of 30 s
VARIANTS = {
    "paper": {}, "no sync": {"sync": False}, "one window": {"window_frames": 0},
    "causal none": {"causal": "none"}, "causal future": {"causal": "future"},
    "official": SHORT_OFFICIAL, "official, one window": SHORT_OFFICIAL | {"window_frames": 0},
    "official, no sync": SHORT_OFFICIAL | {"sync": False},
    "another start": {"feature_norm": "halves", "position_std": 0.1, "direct": 12},
    "direct path alone": {"feature_norm": "standard", "layers": 0, "direct": 12}}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)

WORDS = ("what who is are you it seen said here next comes and now colour the a red blue green car "
         "dog cat yes no one two three so").split()
TEXT = [f"USER: <Img> </Img> what is {a}\nASSISTANT: the {b} {c}" for a in WORDS for b in WORDS[-9:]
        for c in WORDS[-4:]]


# ---- tiny parts ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Folder with a sentencepiece model and a WordPiece vocabulary, both of a few words."""
    root, model = tmp_path_factory.mktemp("words"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    (root / "tokenizer.model").write_bytes(model.getvalue())
    (root / "qformer_tokenizer").mkdir()
    (root / "qformer_tokenizer" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return root


@pytest.fixture(scope="module")
def tokenizer(words):
    return Tokenizer.from_pretrained(words)


@pytest.fixture(scope="module")
def build(words, tokenizer):
    """build(seed, **changes of CONFIG) -> Favor in eval mode, every parameter random."""
    def build(seed=0, tokenizer=tokenizer, **changes):
        qformer = QFormerConfig(width=24, layers=2, heads=3, ffn=32, vocab_size=5 + len(WORDS),
                                max_positions=40, encoder_width=VIT.width)
        llm = LlamaConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=4,
                          ffn=40)
        model = Favor(dataclasses.replace(CONFIG, **changes), WhisperEncoder(WHISPER),
                      VisualEncoder(VIT, qformer, V), Llama(llm), tokenizer,
                      QFormerTokenizer.from_pretrained(words))
        randomise(model, seed)
        model.llm.lm_head.weight.data *= 10        # a random LLM that is sure of what it says
        return model.eval()
    return build


def clip(frames=0, seconds=0.0, image=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (frames, 3, 28, 28), dtype=torch.uint8, generator=generator)
    sound = 0.1 * torch.randn(round(seconds * RATE), generator=generator)
    return Clip(pictures if frames else None, sound if seconds else None, image)


def mixed():
    """One sample of every kind, of different lengths (at 2 frames per second)."""
    return [Sample("what is seen", "red car", clip(5, 2.3, seed=1)),
            Sample("what comes next", "the blue one", clip(3, seed=2)),              # silent video
            Sample("what is said here", "one two three", clip(seconds=1.7, seed=3)),
            Sample("what colour is it", "green", clip(1, image=True, seed=4)),
            Sample("is it so", "yes it is", clip(1, 1.1, image=True, seed=5)),
            Sample("who are you", "a dog"),                                          # text alone
            Sample("and now", "two", clip(2, 3.2, seed=6), history=(("what is it", "a cat"),))]


def features(frames=0, steps=0, is_image=False, seed=0):
    """Random Features of the tiny model's widths."""
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(frames, V, 24, generator=generator)
    audio = torch.randn(steps, WHISPER.width, generator=generator)
    return Features(visual if frames else None, audio if steps else None, is_image)


@torch.no_grad()
def losses(model, samples):
    return model(samples)["item_ce"]


# ---- Eq. (1) ------------------------------------------------------------------------------------

def by_hand(visual, audio, steps):
    """Eq. (1) vector by vector -> joint (F,N,D_v+D_a), mask (F,N)."""
    frames, n = max(len(visual), -(-len(audio) // steps)), max(visual.shape[1], steps)
    D_v, D_a = visual.shape[2], audio.shape[1]
    joint, mask = torch.zeros(frames, n, D_v + D_a), torch.zeros(frames, n, dtype=torch.bool)
    for t in range(frames):
        for j in range(n):
            if t < len(visual) and j < visual.shape[1]:
                joint[t, j, :D_v], mask[t, j] = visual[t, j], True
            if j < steps and t * steps + j < len(audio):
                joint[t, j, D_v:], mask[t, j] = audio[t * steps + j], True
    return joint, mask


@pytest.mark.parametrize("frames, vectors, samples, steps", [
    (3, 4, 6, 2), (2, 2, 15, 4),           # V > A; V < A with a short last frame
    (5, 4, 5, 2), (1, 3, 9, 3),            # the video is longer; the sound is longer
    (3, 4, 0, 2), (0, 4, 7, 2), (0, 2, 9, 4), (2, 1, 1, 1)])
def test_synchronise_is_eq_1(frames, vectors, samples, steps):
    visual, audio = torch.randn(frames, vectors, 5), torch.randn(samples, 3)
    joint, mask = synchronise(visual, audio, steps)
    wanted, wanted_mask = by_hand(visual, audio, steps)
    assert torch.equal(joint, wanted) and torch.equal(mask, wanted_mask)
    joint, mask = synchronise(visual, audio, steps, mask_padding=False)           # as released
    assert torch.equal(joint, wanted) and mask.all() and mask.shape == wanted_mask.shape


def test_synchronise_in_numbers():
    visual = torch.tensor([[[1.], [2.], [3.]]])                       # one frame of V = 3
    audio = torch.tensor([[10.], [20.], [30.]])                       # A = 2: one frame and a half
    joint, mask = synchronise(visual, audio, 2)
    assert joint.tolist() == [[[1, 10], [2, 20], [3, 0]], [[0, 30], [0, 0], [0, 0]]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]


# ---- windows and masks --------------------------------------------------------------------------

@pytest.mark.parametrize("frames, window, count", [
    (1, 4, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3), (7, 1, 7), (7, 0, 1), (1, 0, 1), (0, 4, 0),
    (0, 0, 0)])
def test_split_windows_keeps_order_and_masks_the_filling(frames, window, count):
    joint, mask = torch.randn(frames, 3, 2), torch.rand(frames, 3) < 0.7
    windows, window_mask = split_windows(joint, mask, window)
    K = window or max(frames, 1)
    assert windows.shape == (count, K * 3, 2) and window_mask.shape == (count, K * 3)
    for t in range(count * K):
        here = slice(t % K * 3, (t % K + 1) * 3)
        if t < frames:
            assert torch.equal(windows[t // K, here], joint[t])
            assert torch.equal(window_mask[t // K, here], mask[t])
        else:
            assert not windows[t // K, here].any() and not window_mask[t // K, here].any()


def test_causal_mask_is_fig_2_and_future_its_mirror():
    frames, n = 4, 3
    past = block_causal_mask(frames, n, "past")
    for row in range(frames * n):
        for column in range(frames * n):
            assert past[row, column] == (column // n <= row // n)     # its own frame in full, too
    assert torch.equal(block_causal_mask(frames, n, "future"), past.T) and past.dtype == torch.bool
    with pytest.raises(ValueError, match="past and future"):
        block_causal_mask(frames, n, "none")


def softmax_attention(q, k, v, mask, causal, per_frame):
    """In float64 by the boolean mask -> (W,heads,K*N,d), the reference of both ways."""
    seen = block_causal_mask(q.shape[2] // per_frame, per_frame, causal) & mask[:, None, None]
    scores = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num() @ v.double()


@pytest.mark.parametrize("attend", [block_causal_attention, flash_block_causal])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", ["past", "future"])
@pytest.mark.parametrize("frames, n, d", [(1, 3, 8), (4, 5, 16), (10, 8, 128)])
@pytest.mark.parametrize("dtype, max_abs, rel_rms", [
    (torch.float64, 1e-10, 1e-12), (torch.float32, 2e-4, 5e-6)], ids=["float64", "float32"])
def test_block_causal_attention_is_the_masked_softmax(
        attend, causal, padding, frames, n, d, dtype, max_abs, rel_rms):
    """Outputs and gradients of the unmasked rows, of both ways, against float64; large scores, too.
    In float64 by torch's fused kernel; in float32 by its plain one, as what the fused one rounds
    there depends on the CPU (dk of 33 by 2.5e-4 on one with AVX2 only, whatever the mask)."""
    inputs = [(scale * torch.randn(2, 3, frames * n, d)).to(dtype) for scale in (8, 1, 1)]
    mask = torch.ones(2, frames * n, dtype=torch.bool)
    if padding:
        mask[0, n - 1::n] = False                         # a vector of every frame
        mask[1, (frames + 1) // 2 * n:] = False           # the filling of a last window
    got, wanted = [], []
    for function, results in ((partial(attend, per_frame=n, causal=causal), got),
                              (partial(softmax_attention, per_frame=n, causal=causal), wanted)):
        qkv = [x.clone().requires_grad_() for x in inputs]
        with sdpa_kernel(SDPBackend.MATH) if dtype == torch.float32 else nullcontext():
            out = function(*qkv, mask)
        out = out * mask[:, None, :, None]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        results += [out, *(x.grad for x in qkv)]
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, wanted, strict=True):
        check(f"{attend.__name__} {causal} {name}", a.double(), b.double(), max_abs, rel_rms)


def test_on_the_flash_path_there_is_no_mask(monkeypatch):
    """One call, no attn_mask, nothing of (K*N)^2 in size, also in bf16; d = 128 becomes 144."""
    calls, real = [], F.scaled_dot_product_attention

    def seen(q, k, v, attn_mask=None, **settings):
        calls.append((attn_mask, q.shape, settings))
        return real(q, k, v, attn_mask, **settings)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    S, largest = 60 * 32, 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **kwargs or {})
            for x in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out
    q, k, v = torch.randn(3, 1, 1, S, 64, dtype=torch.bfloat16)
    with Largest():
        flash = flash_block_causal(q, k, v, per_frame=32)
    assert largest <= 8 * S * 128 < S * S and len(calls) == 1
    assert calls[0][0] is None and calls[0][1] == (1, 1, S, 128)        # 64 + 60 + 1 -> 128
    wanted = softmax_attention(q, k, v, torch.ones(1, S, dtype=torch.bool), "past", 32)
    check("bf16", flash.double(), wanted, 2e-2, 2e-2)


@pytest.mark.parametrize("changes",
                         [{}, {"causal": "future"}, {"window_frames": 0}, SHORT_OFFICIAL],
                         ids=["paper", "future", "one window", "official"])
def test_losses_are_the_same_on_either_path(changes, build, monkeypatch):
    model, results = build(**changes), []
    for attend in (block_causal_attention, flash_block_causal):
        monkeypatch.setattr(favor, "block_causal_attention", attend)
        model.zero_grad()
        out = model(mixed())
        out["loss"].backward()
        results.append((out["loss"].item(), model.qformer.positions.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    check("gradient", results[1][1], results[0][1], 1e-5, 5e-6)


# ---- frozen encoders ----------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, SHORT_OFFICIAL], ids=["paper", "official"])
def test_clips_encoded_side_by_side_are_the_same(changes, build):
    """All clips of a batch go through ViT and Whisper together: features and losses of one by one.
    What comes out can learn, though the encoders run in inference mode."""
    model, samples = build(**changes), mixed()
    together, alone = model.encode_batch(samples), [model.encode_batch([s])[0] for s in samples]
    for a, b in zip(together, alone, strict=True):
        assert a.clip is None and a.features.is_image == b.features.is_image
        for name in ("visual", "audio"):
            x, y = getattr(a.features, name), getattr(b.features, name)
            assert (x is None) == (y is None)
            if x is not None:
                assert not x.is_inference()
                check(name, x, y)
    out = model(together)
    out["loss"].backward()
    assert out["loss"].item() == pytest.approx(model(alone)["loss"].item(), abs=1e-6)
    assert out["loss"].item() == pytest.approx(model(samples)["loss"].item(), abs=1e-6)


def test_each_clip_is_encoded_once(build, monkeypatch):
    """An image once, however long its sound; a clip that is asked twice once; about FRAMES_AT_ONCE
    frames at a time, a longer clip alone."""
    model, seen = build(), []
    real = model.visual.encode_image

    def counted(pixels):
        seen.append(len(pixels))
        return real(pixels)
    monkeypatch.setattr(model.visual, "encode_image", counted)
    spoken = clip(1, 3.0, image=True)
    model.encode_batch([Sample("what is said here", "a", spoken), Sample("is it so", "b", spoken),
                   Sample("what is seen", "c", clip(5))])
    assert seen == [1 + 5]
    seen.clear()
    monkeypatch.setattr(favor, "FRAMES_AT_ONCE", 8)
    model.encode_batch([Sample("is it so", "a", clip(n, seed=n)) for n in (3, 4, 2, 9, 1)])
    assert seen == [3 + 4, 2, 9, 1]


# ---- Eq. (2): the causal Q-Former ---------------------------------------------------------------

def causal_qformer(seed=0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return randomise(CausalQFormer(config, joint_width=48), seed).eval()


def naive_norm(weights, name, x, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def naive_linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def naive_attention(weights, name, heads, x, context, mask):
    """x (n,D), context (m,D_c), mask (n,m): one head and one row at a time, -1e9 where masked."""
    q, k, v = (naive_linear(weights, f"{name}.{part}", y)
               for part, y in (("query", x), ("key", context), ("value", context)))
    d, mixture = q.shape[1] // heads, torch.zeros_like(q)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        for row in range(len(q)):
            scores = (k[:, own] * q[row, own]).sum(1) / math.sqrt(d)
            scores = scores + torch.where(mask[row], 0.0, -1e9)
            weight = (scores - scores.max()).exp()
            mixture[row, own] = (weight / weight.sum()) @ v[:, own]
    x = x + naive_linear(weights, f"{name}.output", mixture)
    return naive_norm(weights, f"{name}.norm", x, 1e-12)


def naive_qformer(config, weights, window, mask, per_frame):
    """Eq. (2) for one window (K*N,D), mask (K*N,) -> (Q,D), from the state_dict alone."""
    length = len(window)
    frames = naive_norm(weights, "joint_norm", window, 1e-5) + weights["positions.weight"][:length]
    causal = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            before = j // per_frame - i // per_frame
            allowed = before <= 0 if config.causal == "past" else before >= 0
            causal[i, j] = allowed and (bool(mask[j]) or i == j or not config.mask_padding)
    queries = naive_norm(weights, "query_norm", weights["queries"][0], 1e-12)
    everything = torch.ones(Q, Q, dtype=torch.bool)
    for i in range(config.layers):
        layer = f"layers.{i}"
        seen = frames if config.causal == "none" else naive_attention(
            weights, f"{layer}.causal_attention", config.causal_heads, frames, frames, causal)
        queries = naive_attention(
            weights, f"{layer}.self_attention", config.heads, queries, queries, everything)
        queries = naive_attention(
            weights, f"{layer}.cross_attention", config.heads, queries, seen, mask.expand(Q, -1))
        inner = naive_linear(weights, f"{layer}.up", queries)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        queries = queries + naive_linear(weights, f"{layer}.down", inner)
        queries = naive_norm(weights, f"{layer}.norm", queries, 1e-12)
    return queries


@torch.no_grad()
@pytest.mark.parametrize("mask_padding", [True, False], ids=["masked", "as released"])
@pytest.mark.parametrize("padding", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("causal", ["past", "future", "none"])
def test_causal_qformer_equals_a_naive_one(causal, padding, mask_padding):
    model = causal_qformer(causal=causal, mask_padding=mask_padding)
    windows, mask = torch.randn(2, 3 * 4, 48), torch.ones(2, 3 * 4, dtype=torch.bool)
    if padding:
        mask[1, 8:] = False                        # the filling of a last window
        if mask_padding:
            mask[0, [2, 3, 7, 11]] = False         # vectors of real frames that no modality reaches
    wanted = torch.stack([naive_qformer(model.config, model.state_dict(), *pair, per_frame=4)
                          for pair in zip(windows, mask, strict=True)])
    check(f"causal Q-Former, {causal}", model(windows, mask, per_frame=4), wanted, 1e-5, 2e-6)


@torch.no_grad()
def test_past_future_and_none_differ_with_the_same_weights():
    windows, mask = torch.randn(2, 12, 48), torch.ones(2, 12, dtype=torch.bool)
    weights, out = causal_qformer().state_dict(), []
    for causal in ("past", "future", "none"):
        model = causal_qformer(causal=causal)
        model.load_state_dict(weights, strict=causal != "none")
        out.append(model(windows, mask, 4))
    assert min((a - b).abs().max() for a, b in itertools.combinations(out, 2)) > 1e-3


def test_without_causal_attention_there_are_no_parameters_for_it():
    with_it, without = causal_qformer(), causal_qformer(causal="none")
    extra = with_it.state_dict().keys() - without.state_dict().keys()
    assert len(extra) == 2 * 10 and all(".causal_attention." in name for name in extra)
    assert not without.state_dict().keys() - with_it.state_dict().keys()


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_parameters_are_as_many_as_in_the_authors_13b():
    """Q-Former (query norm and layers), aligner, aligner + LoRA: the released 13B's numbers."""
    llm = LlamaConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)
    with torch.device("meta"):
        model = Favor(preset("13b", "official"), WhisperEncoder(), VisualEncoder(), Llama(llm),
                      tokenizer=None, qformer_tokenizer=None)
    aligner, qformer = model.aligner(), model.qformer
    assert count(qformer.layers, qformer.query_norm) == 40_157_184
    assert count(aligner) == 51_397_376
    assert sum(p.numel() for p in model.trained_parameters()) == 51_397_376 + 52_428_800
    shapes = {name: tuple(p.shape) for name, p in aligner.named_parameters()}
    assert shapes["audio_proj.weight"] == (768, 1280) and shapes["llm_proj.weight"] == (5120, 768)
    assert shapes["qformer.positions.weight"] == (4096, 1536)
    assert shapes["qformer.queries"] == (1, 32, 768)
    assert model.audio_steps == 25
    layer = qformer.layers[0]
    assert layer.causal_attention.heads == 12 and layer.causal_attention.query.out_features == 1536


# ---- who may influence whom ---------------------------------------------------------------------

# ---- how the causal Q-Former starts -------------------------------------------------------------

def naive_direct(weights, content, mask, n_queries):
    """The direct path of one window: content (K*N,D), mask (K*N,) -> (Q,D), vector by vector."""
    real, rows = [x for x, there in zip(content, mask, strict=True) if there], []
    for i in range(n_queries):
        first, end = math.floor(i * len(real) / n_queries), math.ceil(
            (i + 1) * len(real) / n_queries)
        inner = [naive_linear(weights, "direct.up", x) for x in real[first:end]]
        outer = [naive_linear(weights, "direct.down", x * 0.5 * (1 + torch.erf(x / math.sqrt(2))))
                 for x in inner]
        rows.append(sum(outer) / len(outer))
    return naive_norm(weights, "direct.norm", torch.stack(rows), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layers", [2, 0])
@pytest.mark.parametrize("queries", [3, 5, 13])
def test_the_direct_path_is_a_mean_over_parts_of_a_window(layers, queries):
    """Of ragged windows, of fewer vectors than queries, and of one without a real vector, whose
    zeros are read instead; it is added to what the layers give."""
    model = causal_qformer(layers=layers, direct=7, queries=queries)
    windows, mask = torch.randn(5, 12, 48), torch.zeros(5, 12, dtype=torch.bool)
    for row, real in enumerate((range(12), [1, 2, 5, 7, 11], [4, 9], [3], [])):
        mask[row, list(real)] = True
    windows[4] = 0
    weights, plain = model.state_dict(), copy.deepcopy(model)
    plain.direct = None
    content = naive_norm(weights, "joint_norm", windows, 1e-5)
    seen = mask.clone()
    seen[4] = True
    wanted = plain(windows, mask, 4) + torch.stack(
        [naive_direct(weights, *pair, queries) for pair in zip(content, seen, strict=True)])
    check("direct path", model(windows, mask, 4), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(windows, mask, 4)
    assert half.dtype == torch.float32 and (half - wanted).abs().max() < 0.1
    if not layers:
        alone = naive_norm(weights, "query_norm", weights["queries"], 1e-12)
        check("queries alone", plain(windows, mask, 4), alone.expand(5, -1, -1))
        assert "positions.weight" not in weights             # nothing would read them


@torch.no_grad()
def test_halves_are_two_norms():
    model, windows = causal_qformer(feature_norm="halves"), 3 + 5 * torch.randn(2, 12, 48)
    wanted = torch.cat([F.layer_norm(half, (24,), norm.weight, norm.bias, 1e-5)
                        for half, norm in zip(windows.split(24, dim=2), model.joint_norm,
                                              strict=True)], dim=2)
    check("halves", model.normalise(windows), wanted)
    louder = torch.cat([windows[..., :24] * 100, windows[..., 24:]], dim=2)
    assert torch.equal(model.normalise(louder)[..., 24:], wanted[..., 24:])
    joint = causal_qformer()
    assert (joint.normalise(louder) - joint.normalise(windows))[..., 24:].abs().max() > 0.1


def test_a_seed_gives_the_weights_that_it_always_gave():
    """The switches draw no number where they are off, and position_std only scales."""
    model = {std: (torch.manual_seed(1), CausalQFormer(
        dataclasses.replace(CONFIG, position_std=std), 48))[1] for std in (1.0, 0.25)}
    torch.manual_seed(1)
    positions = nn.Embedding(CONFIG.max_positions, 48).weight
    queries = torch.empty(1, Q, CONFIG.width).normal_(std=0.02)
    for std, one in model.items():
        assert torch.equal(one.positions.weight, positions * std)
        assert torch.equal(one.queries, queries)


@torch.no_grad()
def test_statistics_are_those_of_the_features(build):
    """Mean and deviation as numpy's, over all vectors of all clips; zeros of a hidden or missing
    modality stay zeros."""
    model, samples = build(feature_norm="standard"), mixed()
    raw = features(3, 27)
    model.measure(iter(samples))
    encoded = [sample.features for sample in model.encode_batch(samples)]
    for name in ("visual", "audio"):
        flat = torch.cat([x.flatten(0, -2) for f in encoded if (x := getattr(f, name)) is not None])
        flat = flat.double().numpy()
        mean, std = (getattr(model.statistics, f"{name}_{what}").numpy()
                     for what in ("mean", "std"))
        np.testing.assert_allclose(mean, flat.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(std, np.maximum(
            flat.std(axis=0, ddof=1), flat.std(axis=0, ddof=1).mean() / 100), rtol=1e-5)
    s = model.statistics
    joint, _ = joint_of(model, Sample("", features=raw))
    assert torch.equal(joint[:3, :, :24], (raw.visual - s.visual_mean) / s.visual_std)
    torch.testing.assert_close(joint.flatten(0, 1)[:A, 24:],
                               model.audio_proj((raw.audio[:A] - s.audio_mean) / s.audio_std))
    for mask, zero in (("visual", slice(24)), ("audio", slice(24, None)), ("both", slice(None))):
        assert not joint_of(model, Sample("", features=raw, mask=mask))[0][..., zero].any()
    assert not joint_of(model, Sample("", features=features(steps=9)))[0][..., :24].any()
    assert not joint_of(model, Sample("", features=features(3)))[0][..., 24:].any()


@torch.no_grad()
def test_statistics_at_their_limits():
    """A dimension that never varies stays bounded; a later stage measures only what no earlier one
    did; fp16 and bf16 features are summed in fp64."""
    torch.manual_seed(0)
    statistics = FeatureStatistics(visual=6, audio=4)
    x = torch.randn(5000, 6) * torch.tensor([1, 1, 1, 300, 1e-9, 0.0]) + torch.tensor(
        [0, 5, -2, 1000, 7, 3.0])
    statistics.measure([Features(x[:2000].half()), Features(x[2000:].half())])
    y = statistics("visual", x)
    assert y[:, :4].mean(0).abs().max() < 0.01 and (y[:, :4].std(0) - 1).abs().max() < 0.01
    assert y.isfinite().all() and y[:, 4:].abs().max() < 0.02
    assert statistics.unmeasured == ["audio"] and torch.equal(statistics("audio", x[:, :4]),
                                                              x[:, :4])
    statistics.measure([Features(x + 9, x[:, :4].bfloat16())])
    assert torch.equal(statistics("visual", x), y) and statistics.unmeasured == []
    assert (statistics("audio", x[:, :4]).std(0) - 1).abs().max() < 0.01
    for constant in ([Features(torch.full((3, 2, 6), 2.5))], [Features(torch.zeros(1, 1, 6))], []):
        still = FeatureStatistics(visual=6)
        still.measure(constant)
        assert still("visual", x).isfinite().all()


def favor_of(parts, **changes):
    """A Favor of tiny parts with the trained parts as they start."""
    return Favor.from_config(preset("tiny", whisper=str(parts / "whisper"),
                                    llm=str(parts / "llama"), visual=str(parts / "instructblip"),
                                    max_new_tokens=5, **changes)).eval()


@torch.no_grad()
def test_clip_vectors_start_as_large_as_words(small_parts):
    torch.manual_seed(3)
    model = favor_of(small_parts, match_embeddings=True)
    words = model.llm.model.embed_tokens.weight.std().item()
    vectors = model.llm_proj(torch.randn(2000, model.config.width))
    assert vectors.std().item() == pytest.approx(words, rel=0.05)
    plain = favor_of(small_parts)
    assert plain.llm_proj(torch.randn(2000, 128)).std().item() > 3 * words


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    {"feature_norm": "halves", "position_std": 0.02, "match_embeddings": True},
    {"feature_norm": "standard"}, {"direct": 8, "layers": 0}], ids=str)
def test_every_start_survives_saving(small_parts, tmp_path, changes):
    """Bit-equal, though the joint vectors are not twice as wide as the Q-Former."""
    def clips(seed):
        noise = torch.Generator().manual_seed(seed)
        return [Sample("what is seen", "red", features=Features(
            2 + 3 * torch.randn(7, 4, 16, generator=noise), torch.randn(60, 16, generator=noise)))]
    model = favor_of(small_parts, **changes)
    model.measure(clips(0))
    model.save_pretrained(tmp_path)
    again = Favor.from_pretrained(tmp_path)
    assert dataclasses.asdict(again.config).items() >= changes.items()
    assert torch.equal(losses(again, clips(1)), losses(model, clips(1)))
    assert again.generate(clips(1)) == model.generate(clips(1))
    if changes == {"feature_norm": "standard"}:
        assert again.statistics.unmeasured == []
        plain = favor_of(small_parts)
        with pytest.raises(ValueError, match=r"statistics\."):
            plain.load_trained(tmp_path)


def test_a_layer_or_a_direct_path_must_read_the_clip():
    with pytest.raises(ValueError, match="layers=0 and direct=0: nothing would read the clip"):
        preset("tiny", layers=0)


def encoded_frames(model, windows, mask, per_frame):
    """What each layer's causal attention makes of the frames: a list of (W,K*N,D)."""
    seen = []
    hooks = [layer.causal_attention.register_forward_hook(lambda m, i, out: seen.append(out))
             for layer in model.layers]
    model(windows, mask, per_frame)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("causal", ["past", "future"])
def test_the_future_cannot_change_the_past(causal):
    """Later frames change: with "past" no earlier frame's encoding moves by one bit, in any layer.
    With "future" it is the other way round."""
    model, n = causal_qformer(causal=causal), 4
    windows, mask = torch.randn(1, 5 * n, 48), torch.ones(1, 5 * n, dtype=torch.bool)
    for cut in range(1, 5):
        changed = windows.clone()
        hit = slice(cut * n, None) if causal == "past" else slice(None, cut * n)
        changed[:, hit] += torch.randn_like(changed[:, hit])
        before = encoded_frames(model, windows, mask, n)
        after = encoded_frames(model, changed, mask, n)
        for a, b in zip(before, after, strict=True):
            moved = (a != b).any(-1)[0].view(5, n)
            early, late = moved[:cut], moved[cut:]
            free, bound = (early, late) if causal == "past" else (late, early)
            assert not free.any() and bound.all()


@pytest.mark.parametrize("causal", ["past", "future"])
def test_gradients_are_block_triangular(causal):
    """Frame t's encoding has a gradient to frame s exactly where the mask of Fig. 2 allows it."""
    model, n = causal_qformer(causal=causal), 4
    windows = torch.randn(1, 5 * n, 48, requires_grad=True)
    out = encoded_frames(model, windows, torch.ones(1, 5 * n, dtype=torch.bool), n)[-1]
    for t in range(5):
        energy = out[0, t * n:(t + 1) * n].square().sum()
        grad, = torch.autograd.grad(energy, windows, retain_graph=True)
        reached = grad[0].view(5, -1).abs().sum(1) > 0
        assert reached.tolist() == [s <= t if causal == "past" else s >= t for s in range(5)]


@torch.no_grad()
@pytest.mark.parametrize("causal", ["past", "future", "none"])
def test_a_window_cannot_see_another(build, causal):
    model, clip = build(causal=causal), features(6, 55)               # 3 windows of 2 frames
    before = model.audio_visual_tokens([Sample("", features=clip)])[1]
    clip.visual[2:4] += 1
    clip.audio[2 * A:4 * A] += 1
    after = model.audio_visual_tokens([Sample("", features=clip)])[1]
    assert before.shape == (3, Q, 20)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert (before[1] - after[1]).abs().max() > 1e-3


@every_variant
def test_batch_mates_and_padding_change_nothing(build, changes):
    """Loss and gradient of every kind of sample are the same alone and in a mixed batch."""
    model = build(diversity=0.0, **changes)
    samples = [model.encode_sample(sample) for sample in mixed()]
    alone = torch.cat([losses(model, [sample]) for sample in samples])
    together, backwards = losses(model, samples), losses(model, samples[::-1]).flip(0)
    print(f"largest difference {(alone - together).abs().max():.1e}")
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(backwards, alone, atol=1e-5, rtol=0)
    assert alone.std() > 0.1

    def gradients(batch):
        out = model(batch)
        return torch.autograd.grad(out["ce"] * out["tokens"], model.trained_parameters())
    whole = gradients(samples)
    parts = [sum(grads) for grads in zip(*(gradients([sample]) for sample in samples), strict=True)]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * max(1.0, b.abs().max().item()), rtol=0)


@every_variant
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_same_alone_and_in_a_batch(build, changes, beams):
    model, samples = build(**changes), mixed()
    settings = {"num_beams": beams, "max_new_tokens": 5, "repetition_penalty": 1.3}
    alone = [model.generate([sample], **settings)[0] for sample in samples]
    assert model.generate(samples, **settings) == alone
    assert len(set(alone)) > 3                                   # the clips do change the answers


@torch.no_grad()
@every_variant
def test_an_absent_modality_has_no_influence(build, changes):
    """A silent clip does not hear the audio projection's bias, sound alone does not see a frame."""
    model = build(**changes)
    silent = Sample("what is seen", "red", clip(3, seed=2))
    dark = Sample("what is said", "red", clip(seconds=1.4, seed=3))
    both = Sample("what is it", "red", clip(3, 1.4, seed=3))
    before = [losses(model, [s]) for s in (silent, dark, both)]
    deaf, blind = copy.deepcopy(model), copy.deepcopy(model)
    deaf.audio_proj.bias += 1
    deaf.whisper.layer_norm.bias += 1
    blind.visual.query_tokens += 1
    blind.visual.vit.post_layernorm.bias += 1
    assert torch.equal(losses(deaf, [silent]), before[0])
    assert torch.equal(losses(blind, [dark]), before[1])
    assert not torch.equal(losses(deaf, [dark]), before[1])
    assert not torch.equal(losses(blind, [silent]), before[0])
    for changed in (deaf, blind):
        assert not torch.equal(losses(changed, [both]), before[2])


def test_the_question_reaches_the_visual_qformer_and_the_vit_runs_once(build):
    model, calls = build(), []
    model.visual.vit.register_forward_hook(lambda m, i, out: calls.append(len(out)))
    video, prompts = clip(3, 1.0), ["what is seen", "who is it and what is said here"]
    several = model.encode(video, prompts)
    assert calls == [3]
    for prompt, one in zip(prompts, several, strict=True):
        alone, = model.encode(video, [prompt])
        torch.testing.assert_close(one.visual, alone.visual, atol=1e-6, rtol=0)
        assert torch.equal(one.audio, alone.audio)
    assert (several[0].visual - several[1].visual).abs().max() > 1e-3


def test_long_audio_goes_on_in_the_right_frame(build):
    """7 s are three chunks of Whisper's, 2.5 s each here; the second fills frames 5 to 9."""
    model, long = build(), clip(seconds=7.0)
    joint, mask = joint_of(model, Sample("", clip=long))
    assert joint.shape == (14, N, 48) and mask[:, :A].all()
    chunk = model.audio_proj(model.whisper.encode(long.audio[40000:80000]))             # (50,24)
    heard = joint[5:10, :A, 24:].reshape(50, 24)
    torch.testing.assert_close(heard, chunk, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_synchronisation_each_modality_goes_alone(build):
    """The visual windows, then the audio windows, each as of a clip that has nothing else."""
    model, both = build(sync=False), features(3, 55)
    alone = [model.audio_visual_tokens([Sample("", features=f)])[0][0]
             for f in (Features(visual=both.visual), Features(audio=both.audio))]
    assert [len(tokens) for tokens in alone] == [2 * Q, 3 * Q]
    together = model.audio_visual_tokens([Sample("", features=both)])[0][0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    with_sync = build().audio_visual_tokens([Sample("", features=both)])[0][0]
    assert len(with_sync) == 3 * Q and (with_sync - alone[1]).abs().max() > 1e-3


# ---- images, masks ------------------------------------------------------------------------------

def joint_of(model, sample):
    """All windows behind each other: (F,N,D), (F,N), the last one's filling included."""
    (windows, mask), = model.windowed_inputs(sample)
    return windows.reshape(-1, N, windows.shape[-1]), mask.reshape(-1, N)


def test_an_image_lasts_as_long_as_its_sound(build):
    model, image, sound = build(window_frames=0), features(1, is_image=True), features(steps=34)
    alone, _ = joint_of(model, Sample("", features=image))
    assert alone.shape == (1, N, 48)
    joint, _ = joint_of(model, Sample("", features=Features(image.visual, sound.audio, True)))
    assert len(joint) == math.ceil(34 / A)
    assert torch.equal(joint[:, :, :24], image.visual.expand(4, -1, -1))
    video, _ = joint_of(model, Sample("", features=Features(image.visual, sound.audio, False)))
    assert len(video) == 4 and not video[1:, :, :24].any()       # one frame of a video is one frame


@torch.no_grad()
def test_masks_are_zeros_behind_the_projection(build):
    model, both, other = build(), features(3, 27), features(3, 27, seed=1)
    whole, joint_mask = joint_of(model, Sample("", features=both))

    def loss(visual, audio, mask=None):
        return losses(model, [Sample("what", "red", features=Features(visual, audio), mask=mask)])
    unmasked = loss(both.visual, both.audio)
    for mask, seen, heard in (("audio", 1, 0), ("visual", 0, 1), ("both", 0, 0)):
        joint, same_mask = joint_of(model, Sample("", features=both, mask=mask))
        wanted = whole * torch.tensor([seen, heard]).repeat_interleave(24)
        assert torch.equal(joint, wanted) and torch.equal(same_mask, joint_mask)
        masked = loss(both.visual, both.audio, mask)
        assert torch.equal(masked, loss(both.visual if seen else other.visual,
                                        both.audio if heard else other.audio, mask))
        assert not torch.equal(masked, unmasked)
    deaf = loss(both.visual, both.audio, "audio")
    model.audio_proj.weight.zero_()
    model.audio_proj.bias.zero_()
    assert torch.equal(loss(both.visual, both.audio), deaf)
    with pytest.raises(ValueError, match="'sound'.*audio.*visual.*both"):
        loss(both.visual, both.audio, "sound")


# ---- variant official ---------------------------------------------------------------------------

@torch.no_grad()
def test_official_audio_has_always_the_same_length(build):
    """3 s here = 6 frames: what is longer is cut, what is shorter ends in silence that is heard."""
    model = build(**SHORT_OFFICIAL)
    for seconds in (0.3, 3.0, 4.2):
        sound = clip(seconds=seconds).audio
        joint, mask = joint_of(model, Sample("", clip=Clip(audio=sound)))
        assert joint.shape[0] == 6 and mask.all()
        three = torch.cat([sound, torch.zeros(3 * RATE)])[:3 * RATE]
        wanted = model.audio_proj(model.whisper.encode(three))
        torch.testing.assert_close(joint[:, :A, 24:].reshape(60, 24), wanted, atol=1e-6, rtol=0)


def test_official_image_is_a_video_of_copies(build):
    model, image = build(**SHORT_OFFICIAL), features(1, is_image=True)
    alone, _ = joint_of(model, Sample("", features=image))
    assert alone.shape[0] == 6 and torch.equal(alone[..., :24], image.visual.expand(6, -1, -1))
    assert not alone[..., 24:].any()
    copies = Features(image.visual.expand(6, -1, -1))
    assert torch.equal(alone, joint_of(model, Sample("", features=copies))[0])


@torch.no_grad()
def test_official_filling_leaks_through_the_future_mask_only(build):
    """3 frames in windows of 2: the last window's zero frame is a key of the causal attention."""
    def queries(causal, mask_padding):
        model = build(causal=causal, mask_padding=mask_padding)
        return model.audio_visual_tokens([Sample("", features=features(3))])[1]
    leaky, clean = queries("future", False), queries("future", True)
    assert torch.equal(leaky[0], clean[0]) and (leaky[1] - clean[1]).abs().max() > 1e-3
    assert torch.equal(queries("past", False), queries("past", True))     # the past has no filling
    assert torch.equal(queries("none", False), queries("none", True))     # no query looks at it


@torch.no_grad()
def test_official_dropout_of_the_frozen_qformer(build, monkeypatch):
    still, official, video = build(), build(encoder_dropout=0.1), clip(2)
    def seen(model):
        return model.encode(video, ["what is seen"])[0].visual
    wanted = seen(still)
    assert torch.equal(wanted, seen(official)) and torch.equal(wanted, seen(still.train()))
    official.train()
    assert not torch.equal(seen(official), seen(official))
    for module in (*official.whisper.modules(), *official.visual.vit.modules()):
        assert not module.training
    assert torch.equal(wanted, seen(official.eval()))
    # With everything dropped only the biases of the norms are left: no frame, question or query.
    chances, attention = [], F.scaled_dot_product_attention
    def spy(*args, dropout_p=0.0, **settings):
        chances.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **settings)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    out = seen(build(encoder_dropout=1.0).train())
    assert torch.equal(out, out[:1, :1].expand_as(out))
    assert chances == [0.0, 1.0, 1.0, 1.0]           # the ViT; the Q-Former's self, cross, self


# ---- Eq. (4) ------------------------------------------------------------------------------------

def test_diversity_is_eq_4():
    queries = torch.randn(3, 5, 7)
    total = sum(F.cosine_similarity(w[i], w[j], dim=0) for w in queries
                for i in range(5) for j in range(5) if i != j)
    assert diversity_loss(queries, "sum").item() == pytest.approx(total.item(), abs=1e-4)
    assert diversity_loss(queries).item() == pytest.approx(total.item() / (3 * 5 * 4), abs=1e-6)
    alike, orthogonal = torch.randn(2, 1, 7).expand(-1, 5, -1), 3 * torch.eye(7)[None, :5]
    assert diversity_loss(alike).item() == pytest.approx(1)
    assert diversity_loss(alike, "sum").item() == pytest.approx(2 * 5 * 4)
    assert diversity_loss(orthogonal).item() == pytest.approx(0, abs=1e-7)
    assert diversity_loss(queries[:0]).item() == 0                    # a batch of text alone
    with torch.autocast("cpu", torch.bfloat16):                       # stays fp32
        assert torch.equal(diversity_loss(queries, "sum"), diversity_loss(queries.float(), "sum"))
        assert diversity_loss(queries).item() == pytest.approx(total.item() / (3 * 5 * 4), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sync", [True, False])
def test_loss_is_ce_plus_lambda_diversity(build, reduction, sync):
    """Eq. (5), over the clips' own windows: the dummy window and text alone have no part in it."""
    model, samples = build(diversity=0.5, diversity_reduction=reduction, sync=sync), mixed()
    out = model(samples)
    queries = [model.audio_visual_tokens([sample])[1] for sample in samples]
    total = sum(diversity_loss(q, "sum") for q in queries)
    windows = [len(q) for q in queries]
    # ceil(frames / 2); frames are 5, 3, ceil(34/10), 1, ceil(22/10), none and ceil(64/10)
    assert windows == ([3, 2, 2, 1, 2, 0, 4] if sync else [3 + 3, 2, 2, 1, 2 + 2, 0, 1 + 4])
    parts = sum(windows) if reduction == "mean" else len(samples)
    wanted = total / (parts * Q * (Q - 1)) if reduction == "mean" else total / parts
    torch.testing.assert_close(out["diversity"], wanted)
    torch.testing.assert_close(out["loss"], out["ce"] + 0.5 * wanted)
    assert out["diversity_parts"] == parts and abs(wanted) > 1e-3


# ---- prompt and labels --------------------------------------------------------------------------

def test_prompt_in_exact_segments(tokenizer):
    ids, bos, eos = tokenizer.encode, 1, 2
    assert prompt_ids(tokenizer, "what is it", target="a car") == (
        [bos, *ids("USER: <Img>")], ids("</Img> what is it\nASSISTANT:"), [*ids("a car"), eos])
    before, after, answer = prompt_ids(tokenizer, "what is it", has_clip=False)
    assert before + after == [bos, *ids("USER: what is it\nASSISTANT:")] and answer == []
    before, after, answer = prompt_ids(tokenizer, "so", [("who", "a dog"), ("and", "no")], "yes")
    assert before == [bos, *ids("USER: <Img>")] and answer == [*ids("yes"), eos]
    assert after == [*ids("</Img> who\nASSISTANT:"), *ids("a dog"), eos,
                     *ids("USER: and\nASSISTANT:"), *ids("no"), eos, *ids("USER: so\nASSISTANT:")]
    assert prompt_ids(tokenizer, "what", target="")[2] == [eos]


@torch.no_grad()
def test_only_the_answer_and_its_end_are_learnt(build):
    """ce from all logits of a sequence that is built here piece by piece, labels -100 elsewhere."""
    model, samples = build(), mixed()
    out, learnt, wanted = model(samples), 0, []
    for sample in samples:
        vectors = model.audio_visual_tokens([sample])[0][0]                        # (W*Q,D_llm)
        before, after, answer = prompt_ids(model.tokenizer, sample.prompt, sample.history,
                                           sample.target, has_clip=sample.clip is not None)
        embeds = torch.cat([model.llm.embed(torch.tensor(before)), vectors,
                            model.llm.embed(torch.tensor(after + answer))])[None]
        labels = torch.tensor([-100] * (len(before) + len(vectors) + len(after)) + answer)
        logits = model.llm(embeds=embeds)[0]
        wanted.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
        learnt += len(answer)
        assert answer[-1] == 2 and model.answer_tokens(sample) == len(answer)
    counts = [len(model.tokenizer.encode(s.target)) + 1 for s in samples]
    torch.testing.assert_close(out["item_ce"], torch.stack(wanted) / torch.tensor(counts),
                               atol=1e-5, rtol=0)
    torch.testing.assert_close(out["ce"], sum(wanted) / learnt)
    assert out["tokens"] == learnt == sum(counts)


def test_no_prompt_token_can_become_a_label(build):
    """The lm_head sees as many positions as the answers have tokens, however long the history."""
    model, seen = build(), []
    model.llm.lm_head.register_forward_hook(lambda m, i, out: seen.append(len(out)))
    for history in ((), (("what is it", "a red car"), ("who", "the dog and the cat"))):
        model([Sample("what is said", "one two", clip(2), history=history),
               Sample("who is it", "no")])
    one_two, no = (len(model.tokenizer.encode(text)) + 1 for text in ("one two", "no"))
    assert seen == [one_two + no] * 2


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """A sentencepiece tokenizer with the two tokens of ChatML."""
    path = tmp_path_factory.mktemp("chatml") / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT), model_writer=file, model_type="bpe", vocab_size=340,
            byte_fallback=True, control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False)
    return Tokenizer(path)


@torch.no_grad()
def test_chatml_learns_the_answer_and_the_end_of_the_turn(build, chatml):
    """Also of each answer of a dialogue, as released; lengths are those of the LLM's input."""
    start, end = (chatml.special_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    dialogue = Sample("and now", "two", clip(2), history=(("what is it", "a cat"),))
    for learnt, answers in ((False, ["two"]), (True, ["a cat", "two"])):
        model = build(tokenizer=chatml, prompt="chatml", learn_history=learnt)
        (embeds, labels), = model.llm_inputs([dialogue])[0]
        assert len(embeds) == model.length(model.encode_sample(dialogue))
        assert [i for i in labels if i != -100] == [
            i for text in answers for i in [*chatml.encode(text), end]]
        assert labels[-1] == end and labels.count(start) == 0
        assert model(mixed())["tokens"] == sum(map(model.answer_tokens, mixed()))
    before, after, _ = model.text_ids(dialogue, True)
    assert (before.count(start), after.count(start), after.count(end)) == (1, 3, 3)


def test_an_answer_in_chatml_ends_with_its_turn(build, chatml, monkeypatch):
    """At <|im_end|>, which config.json does not name, and at the LLM's own end; streamed, too."""
    end, seen = chatml.special_id("<|im_end|>"), []
    script = [*chatml.encode("red car"), end, *chatml.encode("dog")]

    def says(hidden):                          # in place of the lm_head: the script, then </s>
        seen.append(1)
        wanted = script[len(seen) - 1] if len(seen) <= len(script) else 2
        return F.one_hot(torch.tensor(wanted), chatml.vocab_size).float().expand(
            *hidden.shape[:-1], -1)
    for prompt, answer in (("chatml", "red car"), ("vicuna", "red car dog")):
        model = build(tokenizer=chatml, prompt=prompt, max_new_tokens=12)
        assert model.llm.config.eos_id == 2 and end not in (1, 2)
        monkeypatch.setattr(model.llm.lm_head, "forward", says)
        parts = []
        seen.clear()
        assert model.answer(clip(2), "what", stream=parts.append) == answer == "".join(parts)
        seen.clear()
        assert model.generate([Sample("what", clip=clip(2))] * 2) == [answer] * 2
    del script[2:]
    seen.clear()
    model = build(tokenizer=chatml, prompt="chatml", max_new_tokens=12)
    monkeypatch.setattr(model.llm.lm_head, "forward", says)
    assert model.answer(clip(2), "what") == chatml.decode(script)                 # ended by </s>


@torch.no_grad()
def test_counts_before_the_forward_are_those_of_the_forward(build):
    for changes in (*VARIANTS.values(), {"diversity_reduction": "sum"}):
        model = build(**changes)
        samples = [model.encode_sample(sample) for sample in mixed()]
        out, rows = model(samples), model.llm_inputs(samples)[0]
        assert out["tokens"] == sum(map(model.answer_tokens, samples))
        assert out["diversity_parts"] == sum(map(model.diversity_parts, samples))
        assert [len(embeds) for embeds, _ in rows] == list(map(model.length, samples))


# ---- longer than the LLM's positions ------------------------------------------------------------

def first_frames(sample, n):
    """By hand: the first n frames of 0.5 s of a video, of the copies of an image, and of sound."""
    visual, audio = sample.features.visual, sample.features.audio
    if sample.features.is_image:
        visual = visual.expand(n, -1, -1)
    return dataclasses.replace(sample, features=Features(
        None if visual is None else visual[:n], None if audio is None else audio[:n * A]))


def with_positions(model, n):
    model.llm.config = dataclasses.replace(model.llm.config, max_positions=n)
    return model


# Windows are of K = 2 frames and Q = 3 vectors; without synchronisation each modality has its own.
@torch.no_grad()
@pytest.mark.parametrize("changes, frames, steps, image, room, kept", [
    ({}, 21, 137, False, 5 * Q, 10), ({}, 0, 137, False, 5 * Q + 2, 10),
    ({}, 21, 0, False, Q, 2), ({}, 1, 137, True, 4 * Q, 8), ({}, 21, 300, False, 29, 18),
    ({"sync": False}, 21, 137, False, 8 * Q, 8), ({"sync": False}, 5, 137, False, 8 * Q, 10),
    ({"causal": "future", "mask_padding": False}, 21, 137, False, 5 * Q, 10)])
def test_a_clip_longer_than_the_llm_loses_its_last_windows(
        build, changes, frames, steps, image, room, kept):
    """What is left is the clip that ends there; told once, with the sizes that train.py uses."""
    model = build(**changes)
    sample = Sample("what is seen", "red car", features=features(frames, steps, image),
                    history=(("who", "a dog"),))
    text = sum(map(len, model.text_ids(sample, True)))
    wanted = first_frames(sample, kept)
    before, said = model([wanted]), model.generate([wanted], max_new_tokens=5)
    with_positions(model, text + room)
    with pytest.warns(UserWarning, match=f"'what is seen': only {kept} of {{}} frames .* clip are "
                      f"read, the LLM has {text + room} positions".format(
                          max(0 if image else frames, math.ceil(steps / A)))) as told:
        after = model([sample, Sample("is it so", "no")])
    assert len(told) == 1
    assert after["item_ce"][0] == pytest.approx(before["item_ce"].item(), abs=1e-6)
    with pytest.warns(UserWarning, match=f"only {kept} of"):
        fitted, cut = model.fit(sample)
    assert f"{kept} of" in cut and model.length(fitted) <= text + room
    assert model.window_count(fitted) == model.window_count(wanted)
    assert model.diversity_parts(fitted) == before["diversity_parts"]
    answer = len(model.text_ids(sample, True)[2])
    with_positions(model, text - answer + 5 + room)         # an answer of 5 tokens needs its room
    with pytest.warns(UserWarning, match=f"only {kept} of"):
        assert model.generate([sample], max_new_tokens=5) == said


@torch.no_grad()
def test_what_fits_is_not_touched(build, recwarn):
    model = build()
    for sample in map(model.encode_sample, mixed()):
        before, said = model([sample]), model.generate([sample], max_new_tokens=4)
        length = model.length(sample)
        with_positions(model, length)
        assert model.fit(sample) == (sample, "") and model([sample])["ce"] == before["ce"]
        with_positions(model, length - len(model.text_ids(sample, True)[2]) + 4)
        assert model.generate([sample], max_new_tokens=4) == said
        with_positions(model, 2048)
    assert not recwarn.list


@torch.no_grad()
def test_one_window_per_clip_is_cut_to_the_positions_of_the_causal_qformer(build):
    model = build(window_frames=0)                         # 96 positions of 12 vectors a frame
    sample = Sample("what", "red", features=features(30, 200))
    with pytest.warns(UserWarning, match="8 of 30 frames .*causal Q-Former has 96 positions"):
        loss = model([sample])["ce"]
    assert loss == pytest.approx(model([first_frames(sample, 8)])["ce"].item(), abs=1e-6)


@torch.no_grad()
def test_a_dialogue_longer_than_the_llm_loses_its_oldest_turns(build):
    model, turns = build(), (("what is it", "a red car"), ("who", "the dog"), ("and now", "a cat"))
    sample = Sample("is it so", "yes", features=features(9), history=turns)
    short = dataclasses.replace(first_frames(sample, 2), history=turns[2:])
    loss = model([short])["ce"]
    with_positions(model, model.length(short) + 2)
    with pytest.warns(UserWarning,
                      match="only 2 of 9 frames .*; only the last 1 of 3 earlier turns"):
        assert model([sample])["ce"] == pytest.approx(loss.item(), abs=1e-6)
    with_positions(model, model.length(short) - 8)
    text = dataclasses.replace(sample, prompt="what is it " * 9, history=())
    for run in (model, partial(model.generate, max_new_tokens=5)):
        with pytest.raises(ValueError, match=r"a question of \d+ tokens, 3 vectors of a clip and "
                                             r"\d tokens.* the LLM has \d+ positions"):
            run([text])


@pytest.mark.parametrize("scaling, positions", [
    (None, 1000), ({"rope_type": "linear", "factor": 4.0}, 4000),
    ({"rope_type": "dynamic", "factor": 2.0}, 2000),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
      "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 1000)])
def test_positions_of_a_scaled_llm(scaling, positions):
    assert LlamaConfig(max_positions=1000, rope_scaling=scaling).positions == positions


# ---- learning -----------------------------------------------------------------------------------

LESSON = [Sample("what is it", "red car", clip(3, 1.5, seed=1)),
          Sample("what is it", "the blue dog", clip(3, seed=2)),
          Sample("what is it", "one two three", clip(seconds=1.2, seed=3)),
          Sample("what is it", "yes", clip(1, image=True, seed=4)),
          Sample("what is it", "green cat no")]
TARGETS = [sample.target for sample in LESSON]


@pytest.fixture(scope="module")
def trained(build):
    """(model, its frozen tensors before training, ce before and after 120 steps on one batch)."""
    torch.manual_seed(0)
    model = build(dropout=0.0, lora_dropout=0.0, queries=4)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    samples = [model.encode_sample(sample) for sample in LESSON]
    optimiser = torch.optim.AdamW(model.trained_parameters(), lr=5e-3, weight_decay=0.0)
    ces = []
    for _ in range(120):
        out = model.train()(samples)
        optimiser.zero_grad()
        out["loss"].backward()
        nn.utils.clip_grad_norm_(model.trained_parameters(), 1.0)
        optimiser.step()
        ces.append(out["ce"].item())
    return model.eval(), frozen, ces


def test_one_batch_overfits_and_is_answered(trained):
    model, _, ces = trained
    print(f"ce {ces[0]:.2f} -> {ces[-1]:.4f}")
    assert ces[0] > 3 and ces[-1] < 0.02
    assert [model.answer(sample.clip, sample.prompt) for sample in LESSON] == TARGETS


def test_the_frozen_parts_stay_frozen(trained):
    model, frozen, _ = trained
    now = dict(model.named_parameters())
    for name, tensor in frozen.items():
        assert torch.equal(now[name], tensor) and now[name].grad is None, name
    trains = {name for name, parameter in now.items() if parameter.requires_grad}
    assert trains == now.keys() - frozen.keys()
    aligner = ("audio_proj.", "qformer.", "llm_proj.")
    assert all(name.startswith(aligner) or ".lora_" in name for name in trains)
    assert sum(".lora_" in n for n in trains) == 2 * 2 * 6       # A and B, two layers, six matrices


def test_a_streamed_answer_is_the_answer(trained):
    model, _, _ = trained
    for sample in LESSON:
        parts = []
        answer = model.answer(sample.clip, sample.prompt, stream=parts.append)
        assert "".join(parts) == answer == sample.target
        assert len([part for part in parts if part]) >= len(answer.split())
    with pytest.raises(ValueError, match="2 samples"):
        model.generate([Sample("what"), Sample("who")], stream=print)


def test_the_space_before_the_first_word_is_not_streamed():
    """Byte-level BPE answers " red": the boundary after "ASSISTANT:" is no part of the answer."""
    parts = []
    stream = favor.without_leading_space(parts.append)
    for text in ("", " ", "\n", " red", "", " car", " "):
        stream(text)
    assert "".join(parts) == "red car " and parts[3] == "red"


def test_the_config_says_how_answers_are_searched(build):
    official = build(beams=3, repetition_penalty=1.5, max_new_tokens=4)
    asked = {"num_beams": 3, "repetition_penalty": 1.5, "max_new_tokens": 4}
    wanted = build().generate(mixed(), **asked)
    assert official.generate(mixed()) == wanted
    for name, other in (("num_beams", 1), ("repetition_penalty", 1.0), ("max_new_tokens", 2)):
        assert official.generate(mixed(), **{name: other}) != wanted


def test_a_file_is_read_as_the_config_says(build, monkeypatch, tmp_path):
    model, sound, options = build(fps=4.0, frame_times="regular"), clip(seconds=1.0).audio, []
    write_wav(tmp_path / "a.wav", sound)

    def spy(path, **settings):
        options.append(settings)
        return clip_from_path(path, **settings)
    monkeypatch.setattr(favor, "clip_from_path", spy)
    answer = model.answer(tmp_path / "a.wav", "what is said")
    assert answer == model.answer(str(tmp_path / "a.wav"), "what is said")
    assert answer == model.answer(clip_from_path(tmp_path / "a.wav"), "what is said") != ""
    assert options == [{"fps": 4.0, "size": 28, "frame_times": "regular", "max_seconds": 300.0,
                        "antialias": True}] * 2


@pytest.mark.parametrize("which", [0, 1, 2, 3, 5], ids=["both", "silent", "sound", "image", "text"])
@pytest.mark.parametrize("changes", [
    {}, {"sync": False}, {"window_frames": 0}, SHORT_OFFICIAL, VARIANTS["another start"],
    VARIANTS["direct path alone"]], ids=["paper", "no sync", "one window", "official",
                                         "another start", "direct path alone"])
def test_every_trained_parameter_has_a_gradient_whatever_the_batch_holds(build, which, changes):
    """Or else the ranks of a DDP run wait for each other."""
    model = build(**changes).train()
    model([mixed()[which]])["loss"].backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and all(p.grad.isfinite().all() for p in model.trained_parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    reached = model.qformer.queries.grad.abs().sum() > 0
    assert reached == (which != 5)                       # text alone: there, but exactly zero


# ---- keeping and loading ------------------------------------------------------------------------

def test_what_was_learnt_survives_saving(trained, build, tmp_path):
    model, _, _ = trained
    model.save_pretrained(tmp_path / "run", step=120, commit="abc")
    saved = json.loads((tmp_path / "run" / "favor.json").read_text())
    assert FavorConfig(**saved["config"]) == model.config and saved["step"] == 120
    assert not list((tmp_path / "run").rglob("*.tmp"))
    other = build(dropout=0.0, lora_dropout=0.0, queries=4)           # the same frozen parts
    assert losses(other, LESSON).mean() > 1
    other.load_trained(tmp_path / "run")
    assert torch.equal(losses(other, LESSON), losses(model, LESSON))
    assert other.generate(LESSON) == TARGETS
    with pytest.raises(ValueError, match=r"qformer\.queries"):
        build(queries=5).load_trained(tmp_path / "run")


def hub_folder(model, words, root):
    """A Whisper and an InstructBLIP with its LLM: `model`'s frozen parts in the Hub's layout."""
    whisper, visual, llm = model.whisper, model.visual, model.llm
    vit, qformer = visual.vit.config, visual.qformer.config
    hub.save_folder(
        root / "whisper", {f"model.encoder.{n}": t for n, t in whisper.state_dict().items()},
        {"num_mel_bins": 80, "d_model": 20, "encoder_layers": 1, "encoder_attention_heads": 2,
         "encoder_ffn_dim": 32, "max_source_positions": 50})
    hub.write_json(root / "whisper" / "preprocessor_config.json", {"hop_length": 400, "n_fft": 512})
    tensors = {n.replace("vit.", "vision_model.", 1): t for n, t in visual.state_dict().items()}
    tensors |= {f"language_model.{n}": t for n, t in llm.state_dict().items() if "lora" not in n}
    hub.save_folder(root / "instructblip", tensors, {
        "num_query_tokens": V, "text_config": llm.config.to_dict(),
        "vision_config": {
            "hidden_size": vit.width, "num_hidden_layers": vit.layers, "image_size": 28,
            "num_attention_heads": vit.heads, "intermediate_size": vit.ffn, "patch_size": 14},
        "qformer_config": {
            "hidden_size": qformer.width, "num_hidden_layers": qformer.layers,
            "num_attention_heads": qformer.heads, "intermediate_size": qformer.ffn,
            "vocab_size": qformer.vocab_size, "max_position_embeddings": 40}})
    (root / "instructblip" / "qformer_tokenizer").mkdir()
    for name in ("tokenizer.model", "qformer_tokenizer/vocab.txt"):
        (root / "instructblip" / name).write_bytes((words / name).read_bytes())
    blip = str(root / "instructblip")
    return {"whisper": str(root / "whisper"), "visual": blip, "llm": blip}


@torch.no_grad()
def test_from_pretrained_is_the_same_model_also_over_bf16(trained, words, tmp_path):
    model = copy.deepcopy(trained[0])
    model.config = dataclasses.replace(model.config, **hub_folder(model, words, tmp_path))
    model.save_pretrained(tmp_path / "run")
    again = Favor.from_pretrained(tmp_path / "run")
    assert not again.training and again.config == model.config
    assert torch.equal(losses(again, LESSON), losses(model, LESSON))
    assert again.generate(LESSON) == TARGETS

    half = Favor.from_pretrained(tmp_path / "run", dtype=torch.bfloat16)
    for parameter in half.parameters():                  # frozen parts bf16, trained ones fp32
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    for autocast in (False, True):
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = half.train()(LESSON)
        out["loss"].backward()
        assert {out[k].dtype for k in ("loss", "ce", "diversity", "item_ce")} == {torch.float32}
        assert {p.grad.dtype for p in half.trained_parameters()} == {torch.float32}
        difference = (out["item_ce"] - losses(model, LESSON)).abs().max()
        print(f"bf16, autocast {autocast}: largest difference of ce {difference:.4f}")
        assert difference < 0.05
        half.eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert half.generate(LESSON) == TARGETS


def test_errors_say_what_was_wanted(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="favor.json"):
        Favor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'70b'.*tiny, 7b, 13b"):
        preset("70b")
    with pytest.raises(ValueError, match="'offical'.*paper and official"):
        preset("7b", "offical")
    with pytest.raises(ValueError, match=r"\['window'\].*window_frames"):
        preset("7b", window=5)
    for field, bad, message in (
            ("causal", "yes", "'yes'.*past, future, none"),
            ("window_frames", -1, "window_frames=-1"),
            ("diversity_reduction", "max", "mean, sum"), ("frame_times", "x", "regular, ends"),
            ("queries", 0, "queries=0"), ("fps", 0, "fps=0"), ("variant", "x", "paper, official")):
        with pytest.raises(ValueError, match=message):
            FavorConfig(**{field: bad})
    with pytest.raises(ValueError, match="a window of 9 frames .*max_positions=96.*for 8 frames"):
        build(window_frames=9)
    model = build()
    with pytest.raises(ValueError, match="9 frames x 12 vectors = 108.*96 positions.*fewer frames"):
        model.qformer(torch.zeros(1, 108, 2 * model.visual.width), torch.ones(1, 108) > 0, 12)
    with pytest.raises(ValueError, match="no target for 'who is it'"):
        model([Sample("what", "red"), Sample("who is it")])
    for run in (model, model.generate):
        with pytest.raises(ValueError, match="empty batch"):
            run([])
    with pytest.raises(ValueError, match=r"fps=3\.0.*drift.*2\.85714"):       # 20 / 3 = 6.67 steps
        build(fps=3.0)
    assert (build(fps=4.0).audio_steps, build(fps=20 / 7).audio_steps) == (5, 7)


def test_a_checkpoint_of_another_version_says_so(tmp_path):
    (tmp_path / "favor.json").write_text('{"config": {"wings": 2}, "commit": "abc"}')
    with pytest.raises(ValueError, match=r"not known here: \['wings'\].*abc"):
        Favor.from_pretrained(tmp_path)


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of a checkpoint, which a test may damage; its frozen parts stay where they are."""
    shutil.copytree(checkpoint, tmp_path / "best")
    return tmp_path / "best"


@pytest.mark.parametrize("file, change, message", [
    ("favor.json", {"layers": 10 ** 6}, "layers is 1000000; wanted a whole number from 0 to 256"),
    ("favor.json", {"layers": 3}, "weights do not fit CausalQFormer"),
    ("favor.json", {"width": 10 ** 6}, r"\[128\], wanted \[1000000\]"),
    ("favor.json", {"width": 4096}, "weights do not fit CausalQFormer"),
    ("favor.json", {"max_positions": 2 ** 24}, "weights do not fit CausalQFormer"),
    ("favor.json", {"heads": 3}, "do not divide"), ("favor.json", {"heads": 0}, "heads=0"),
    ("favor.json", {"fps": float("nan")}, "fps is nan"), ("favor.json", {"fps": None}, "is null"),
    ("favor.json", {"beams": 10 ** 6}, "beams=1"), ("favor.json", {"causal": 5}, "causal is 5"),
    ("favor.json", {"window_frames": 10 ** 6}, "window_frames=1"),
    ("favor.json", {"lora_targets": "q_proj"}, "lora_targets is 'q_proj'; wanted a list"),
    ("favor.json", {"lora_alpha": 64}, "64.*in favor.json, but .*16.* in lora/adapter_config"),
    ("favor.json", {"lora_r": 10 ** 6}, "1000000.*in favor.json, but"),
    ("favor.json", {"lora_targets": ["q_proj"]}, "in favor.json, but .*adapter_config"),
    ("favor.json", {"sync": "yes"}, "sync is 'yes'"), ("favor.json", {"llm": 5}, "llm is 5"),
    ("lora/adapter_config.json", {"r": 10 ** 6}, "r is 1000000 in adapter_config.json"),
    ("lora/adapter_config.json", {"use_dora": True}, "unsupported use_dora")])
def test_damaged_settings_of_a_checkpoint_are_named(copied, file, change, message):
    """Before a frozen part is loaded, in one line that names the checkpoint."""
    config = json.loads((copied / file).read_text())
    (config["config"] if "config" in config else config).update(change)
    (copied / file).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{copied}.*{message}") as error:
        Favor.from_pretrained(copied)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("file", ["favor.json", "model.safetensors", "lora/adapter_config.json",
                                  "lora/adapter_model.safetensors"])
@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\x00" * 99, None])
def test_damaged_files_of_a_checkpoint_are_named(copied, file, text):
    (copied / file).unlink()
    (copied / file).write_bytes(text) if text is not None else (copied / file).mkdir()
    with pytest.raises(ValueError, match=f"{copied / file}: ") as error:
        Favor.from_pretrained(copied)
    assert len(str(error.value).splitlines()) == 1


def test_a_checkpoint_finds_its_parts_from_any_folder(small_parts, tmp_path, monkeypatch):
    """Trained with --llm real/x: favor.json holds what resolves from anywhere.  A Hub repo in it is
    not looked for in the working folder, and a folder named as a flag is not taken for a repo."""
    (tmp_path / "here/real").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    for part in ("whisper", "instructblip", "llama"):
        shutil.copytree(small_parts / part, tmp_path / "here/real" / part)
    monkeypatch.chdir(tmp_path / "here")
    model = Favor.from_config(preset("tiny", whisper="real/whisper", llm="./real/llama",
                                     visual="real/instructblip", max_new_tokens=5))
    model.save_pretrained("run")
    saved = json.loads(Path("run/favor.json").read_text())["config"]
    assert saved["whisper"] == str(tmp_path / "here/real/whisper")
    assert saved["llm"] == str(tmp_path / "here/real/llama")
    run = Path("run").resolve()
    monkeypatch.chdir(tmp_path / "there")
    again = Favor.from_pretrained(run)
    assert torch.equal(again.llm_proj.weight, model.llm_proj.weight)
    again.save_pretrained("again")
    assert json.loads(Path("again/favor.json").read_text())["config"] == saved

    hub.write_json(run / "favor.json", {"config": saved | {"llm": "real/llama"}})
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError, match="real/llama: not in .*does not mean the folder"):
        Favor.from_pretrained(run)                     # the name of a repo, whatever lies here
    Favor.from_pretrained(run, llm="real/llama")       # --llm real/llama: the folder that is here
    assert preset("tiny").llm == FavorConfig(llm="miniature/weights/llama").llm == (
        "miniature/weights/llama"), "the code's own parts keep their names"
    assert FavorConfig().llm == "Salesforce/instructblip-vicuna-7b"


# ---- presets ------------------------------------------------------------------------------------

def fields(config, *names):
    return tuple(getattr(config, name) for name in names)


@pytest.mark.parametrize("name", ["7b", "13b"])
def test_presets_hold_the_papers_numbers(name):
    config, vicuna = preset(name), f"Salesforce/instructblip-vicuna-{name}"
    assert fields(config, "whisper", "visual", "llm") == (
        "openai/whisper-large-v2", vicuna, vicuna)
    assert fields(config, "fps", "window_frames", "queries", "layers", "width", "heads",
                  "causal_heads", "ffn") == (2.0, 10, 32, 2, 768, 12, 12, 3072)
    assert fields(config, "causal", "sync", "mask_padding", "frame_times", "audio_seconds",
                  "image_frames") == ("past", True, True, "regular", None, 1)
    assert fields(config, "diversity", "diversity_reduction", "encoder_dropout", "lora_r", "beams",
                  "repetition_penalty") == (0.01, "mean", 0.0, 32, 1, 1.0)
    assert set(config.lora_targets) == {"q_proj", "k_proj", "v_proj",
                                        "gate_proj", "up_proj", "down_proj"}
    official = preset(name, "official")
    assert fields(official, "variant", "causal", "mask_padding", "frame_times", "audio_seconds",
                  "image_frames") == ("official", "future", False, "ends", 30.0, 60)
    assert fields(official, "encoder_dropout", "beams", "repetition_penalty", "lora_targets") == (
        0.1, 5, 1.5, ("q_proj", "k_proj", "v_proj", "o_proj"))
    same = {f.name for f in dataclasses.fields(FavorConfig)} - OFFICIAL.keys()
    assert fields(official, *same) == fields(config, *same)
    assert preset(name, "official", causal="past").causal == "past"         # single changes win


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_config_survives_json(name, variant):
    config = preset(name, variant, diversity=0.125, diversity_reduction="sum")
    again = FavorConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and isinstance(again.lora_targets, tuple) and again.diversity == 0.125
    assert lora.LoraConfig(target_modules=again.lora_targets).target_modules == config.lora_targets


@pytest.mark.parametrize(("field", "value"), [
    ("dropout", 2.0), ("lora_dropout", -1.0), ("lora_alpha", -3.0), ("audio_seconds", 0.0),
    ("question_tokens", 0), ("position_std", math.inf), ("diversity", math.nan),
    ("max_seconds", -5.0), ("queries", 10 ** 8), ("layers", 10 ** 6)])
def test_values_that_cannot_be_meant(field, value):
    with pytest.raises(ValueError, match=f"^{field}="):
        preset("tiny", **{field: value})


def test_a_window_that_has_no_positions():
    with pytest.raises(ValueError, match="max_positions=30, which is enough for 3 frames"):
        Favor.from_config(preset("tiny", max_positions=30))
