"""Full-size models without their weights: for benchmarks, and to see whether a job fits a machine.

     random_part    the published sizes (or those of a local config.json), random weights
     table          parameters, trained parameters, bytes and dtype of each part
     memory_plan    GiB of a training step and of answering, by clip length and batch
On the device "meta" a model has shapes only: `python train.py --model 13b --dry-run` takes seconds.

Public: PUBLISHED, random_part, table, memory_plan, empty_sample, peak_memory."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import lora
from data import Features, Sample
from llama import Llama, LlamaConfig, Tokenizer
from runtime import hub
from runtime.log import GIB, in_words, peak_memory  # noqa: F401
from vit import DINOV2, GridEncoder
from vit import ViTConfig as GridConfig
from vit import read_config as read_grid_config
from vit_qformer import (
    FRAMES_AT_ONCE,
    QFormerConfig,
    QFormerTokenizer,
    VisualEncoder,
    ViTConfig,
    read_config,
)
from whisper_enc import WhisperConfig, WhisperEncoder

VICUNA_13B = LlamaConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)
SMOLLM2 = LlamaConfig(vocab_size=49152, width=960, layers=32, heads=15, kv_heads=5, ffn=2560,
                      eps=1e-5, rope_theta=1e5, max_positions=8192, tie_embeddings=True)
INSTRUCTBLIP = (ViTConfig(), QFormerConfig(), 32)
# (class, repo) -> what its constructor takes
PUBLISHED = {
    (WhisperEncoder, "openai/whisper-base"): (
        WhisperConfig(width=512, layers=6, heads=8, ffn=2048),),
    (WhisperEncoder, "openai/whisper-small"): (
        WhisperConfig(width=768, layers=12, heads=12, ffn=3072),),
    (WhisperEncoder, "openai/whisper-large-v2"): (WhisperConfig(),),
    (GridEncoder, "google/siglip2-base-patch16-224"): (GridConfig(),),
    (GridEncoder, "google/siglip-base-patch16-224"): (GridConfig(resample="bicubic"),),
    (GridEncoder, "facebook/dinov2-small"): (
        GridConfig(width=384, heads=6, ffn=1536, trained_size=518, **DINOV2),),
    (Llama, "vicuna-7b-v0"): (LlamaConfig(),),
    (VisualEncoder, "Salesforce/instructblip-vicuna-7b"): INSTRUCTBLIP,
    (VisualEncoder, "Salesforce/instructblip-vicuna-13b"): INSTRUCTBLIP,
    (Llama, "Salesforce/instructblip-vicuna-7b"): (LlamaConfig(),),
    (Llama, "Salesforce/instructblip-vicuna-13b"): (VICUNA_13B,),
    (Llama, "HuggingFaceTB/SmolLM2-360M-Instruct"): (SMOLLM2,),
    (Llama, "HuggingFaceTB/SmolLM2-135M-Instruct"): (
        replace(SMOLLM2, width=576, layers=30, heads=9, kv_heads=3, ffn=1536, head_dim=None),),
}
ANSWER = 40         # tokens of an answer that is planned for
FROM_FOLDER = {
    WhisperEncoder: lambda root: (WhisperConfig.from_folder(root),),
    VisualEncoder: read_config,
    GridEncoder: lambda root: (read_grid_config(root),),
    Llama: lambda root: (LlamaConfig.from_folder(root),),
}
# class of a tokenizer -> the files that a folder must have, the miniature's in its place
STAND_INS = {Tokenizer: ("tokenizer.*", "miniature/weights/llama"),
             QFormerTokenizer: ("qformer_tokenizer", "miniature/weights/instructblip")}


class StandIn(Tokenizer):
    """The miniature's tokenizer in the place of any LLM's. Its <s> and </s>, the ids 1 and 2, stand
    for ChatML's tokens, as these have the same ids in SmolLM2."""

    def special_id(self, token):
        own = {"<|im_start|>": self.bos_id, "<|im_end|>": self.eos_id}
        return own[token] if token in own else super().special_id(token)


# ---------------------------------------------------------------- random weights
def random_part(cls, source, dtype=None, device=None, vocab_size=None, **more):
    """A frozen `cls` of the size of `source`, in eval mode: matrices N(0, 0.02), norms 1, biases 0.
    A tokenizer is the source's own where that is a folder with one, else the miniature's, whose ids
    fit into any vocabulary.  To be passed as `load` to Favor.from_config.  more: what the
    constructor takes beside sizes, the grid of a GridEncoder.  Parts of a baseline know their own
    sizes: cls.published, cls.sizes(folder).
    Raises ValueError for a repository whose sizes are not known here."""
    root = Path(hub.local_source(source)).expanduser()
    if cls in STAND_INS:
        files, stand_in = STAND_INS[cls]
        if any(root.glob(files)):
            return cls.from_pretrained(root)
        stand_in = hub.local_source(stand_in)
        return StandIn(stand_in / "tokenizer.model") if cls is Tokenizer else (
            cls.from_pretrained(stand_in))
    published = getattr(cls, "published", {}) | {
        repo: settings for (kind, repo), settings in PUBLISHED.items() if kind is cls}
    if root.is_dir():
        settings = FROM_FOLDER[cls](root) if cls in FROM_FOLDER else cls.sizes(root)
    elif str(source) in published:
        settings = published[str(source)]
    else:
        known = sorted(published)
        instead = [hub.INSTEAD[name] for kind, name in (
            (GridEncoder, "siglip"), (VisualEncoder, "instructblip"))
            if (kind, str(source)) in PUBLISHED]             # the other kind of visual encoder
        raise ValueError(f"{source}: its sizes are not known here; for --random-init pass a local "
                         "folder with its config.json, or one of "
                         + "; ".join([", ".join(known), *instead]))
    with torch.device("meta"):                        # one copy, at once in the right dtype
        part = cls(*settings, **more)
    part = part.to(dtype or torch.float32).to_empty(device=device or "cpu")
    if part.__class__ is Llama:
        part.tie_weights()
    return fill(part).eval().requires_grad_(False)


@torch.no_grad()
def fill(module):
    """Through one small buffer: in bf16 the generator is three times slower, and a copy of the
    largest matrix in fp32 would be half a GiB."""
    noise = torch.empty(2 ** 22)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            continue
        if "norm" in name.lower() and name.endswith("weight") or ".scale" in name:
            parameter.fill_(1)                           # .scale1: DINOv2's factors of a branch
        elif parameter.ndim < 2:
            parameter.zero_()
        else:
            for part in parameter.view(-1).split(len(noise)):
                part.copy_(noise.normal_(std=0.02)[:len(part)])
    return module


# ---------------------------------------------------------------- what there is
def size(parameters):
    """Bytes of some parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def table(model):
    """Markdown: parameters, trained parameters, bytes and dtype of each part."""
    parts = parts_of(model)
    parts["**all**"] = [p for parameters in parts.values() for p in parameters]
    return hub.markdown_table(("part", "parameters", "trained", "bytes", "dtype"),
                              [row(name, parameters) for name, parameters in parts.items()])


def row(name, parameters):
    """The cells of a line of the table."""
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return (name, f"{sum(p.numel() for p in parameters):,}", f"{trained:,}",
            in_words(size(parameters)), ", ".join(dtypes))


def parts_of(model):
    """{what it is: its parameters}, each parameter once."""
    parts = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            part = "LoRA"
        elif name.startswith("branches.audio_encoder."):
            part = "ImageBind's audio trunk"
        elif name.startswith("visual."):
            grid = not model.visual.reads_question       # a ViT and nothing else
            part = "ViT" if grid or name.startswith("visual.vit.") else "visual Q-Former"
        else:
            first = name.split(".")[0]
            part = {"whisper": "Whisper encoder", "audio_proj": "audio projection",
                    "qformer": "causal Q-Former", "llm_proj": "LLM projection", "llm": "LLM",
                    "language_projection": "language projection", "branches": "branches"}[first]
        parts.setdefault(part, []).append(parameter)
    return parts


# ---------------------------------------------------------------- what it takes
def empty_sample(model, seconds, question="What happens after the beep?"):
    """A Sample about a clip of so many seconds, encoded, on the device "meta"."""
    return Sample(question, features=Features(*model.empty_features(seconds)))


def memory_plan(model, sample, batch, answer=ANSWER, recompute=False, shards=1):
    """Markdown, in GiB on one device: a training step and an answer, for `batch` times `sample`,
    whose features may be on "meta" as the model may.  What autograd keeps is measured: of the
    aligner at its own size, of the LLM on a small one (`llm_bytes`) and scaled.  recompute: blocks
    of the LLM keep their input, one at a time the rest; shards: over so many devices
    (runtime/distributed.py).  Allocator, kernels and the exchange of gradients come on top.  Of a
    model of which nothing learns, only answering is shown."""
    llm, vit = model.llm.config, getattr(model.visual, "vit", model.visual).config
    length = model.length(sample) + answer
    wide = next(model.llm.parameters()).element_size()
    trained = sum(p.numel() for p in model.trained_parameters())
    inputs = batch * length * llm.layers * llm.width * wide if recompute else 0
    llm_kept = inputs + batch * length * (1 if recompute else llm.layers) * llm_bytes(
        model.config, wide) * (8 * llm.width + 3 * llm.ffn)
    aligner_kept = batch * kept_by_autograd(
        model, lambda: model.train().audio_visual_tokens([sample])) if trained else 0
    logits = batch * answer * llm.vocab_size * (wide + 8)            # and twice in fp32: softmax
    cache = 2 * batch * max(1, model.config.beams) * llm.layers * llm.kv_heads * llm.head_dim * (
        length + model.config.max_new_tokens) * wide
    frames = getattr(model, "frames_at_once", FRAMES_AT_ONCE)
    pictures = frames * (vit.n_patches + 1) * (4 * vit.width + vit.ffn) * wide
    weights = size(model.parameters())
    spread = {p for p in model.parameters() if p.requires_grad} | {*model.llm.parameters()}
    blocks = size(model.llm.model.layers.parameters())               # two are whole at a time
    whole = size(spread) - blocks + 2 * blocks // llm.layers if shards > 1 else 0
    weights -= size(spread) * (shards - 1) // shards
    rows = [("weights" if shards == 1 else f"weights, 1 of {shards} shards", weights, weights),
            *[("of the other shards, what is whole at a time", whole, whole)] * (shards > 1),
            ("gradients and Adam's two moments, fp32", 12 * trained // shards, 0),
            (f"LLM, {length} tokens", llm_kept, cache),
            ("aligner", aligner_kept, 0), ("logits of the answer", logits, 0),
            (f"ViT, {frames} frames at a time", pictures, pictures)]
    rows.append(("**all**", *(sum(row[i] for row in rows) for i in (1, 2))))
    rows = [(name, f"{a / GIB:.3g}", f"{b / GIB:.3g}") for name, a, b in rows]
    if not trained:
        return hub.markdown_table(("GiB", "answering"), [
            (name, b) for name, _, b in rows if b != "0"])
    return hub.markdown_table(("GiB", "training step", "answering"), rows)


def llm_bytes(config, wide, width=256, ffn=688, tokens=64):
    """Bytes that autograd keeps per token and layer, over (8 width + 3 ffn): the second layer of a
    small LLaMA with the same kind of LoRA, in 2-byte (autocast) or 4-byte floats."""
    totals = []
    for layers in (1, 2):
        llm = Llama(LlamaConfig(8, width, layers, heads=4, kv_heads=4, ffn=ffn))
        llm = llm.to(torch.bfloat16 if wide == 2 else torch.float32).requires_grad_(False).train()
        if config.lora_targets:
            lora.inject(llm, lora.LoraConfig(1, 1, config.lora_dropout, config.lora_targets))
        x = torch.randn(1, tokens, width, dtype=next(llm.parameters()).dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16) if wide == 2 else nullcontext():
            totals.append(kept_by_autograd(llm, lambda x=x, m=llm: m.hidden(embeds=x)))
    return (totals[1] - totals[0]) / tokens / (8 * width + 3 * ffn)


def kept_by_autograd(module, forward):
    """Bytes of all tensors, parameters of `module` aside, that `forward` keeps for its backward."""
    weights, storages = {p.untyped_storage()._cdata for p in module.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()               # views share one; held, or ids come again
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    del result
    return sum(storage.nbytes() for storage in storages.values())
