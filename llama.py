"""LLaMA decoder (Vicuna, LLaMA-2, LLaMA-3, SmolLM2; Qwen2.5 and Qwen3 by two fields), generation,
   tokenizer.  Paper Sec. 3.1, the LLM.

     ids (B,T) --embed--> (B,T,D) --layers: x + attn(norm(x)), x + mlp(norm(x))--> norm
         --> hidden (B,T,D) --lm_head--> logits (B,T,vocab)
     generate: prompt (B,T) or (B,T,D) --greedy, top-p or beams--> B lists of new ids
     Tokenizer: text <-> ids, from tokenizer.model (sentencepiece) or tokenizer.json

   embeds (B,T,D) may take the place of ids: that is how sound and video enter. Masks are bool,
   True = attend. In this file H counts heads, d is the width of a head. Module and tensor names are
   the Hub's (model.layers.N.self_attn.q_proj.weight), so that its files and peft's adapters fit
   without a rename table.
   Public: LlamaConfig, Llama, KVCache, Tokenizer, JsonTokenizer."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from runtime import fast, hub

LLM_TENSORS = ("language_model.", "model.", "lm_head.")     # in an InstructBLIP's or a LLaMA's file


# ---- configuration ------------------------------------------------------------------------------

HUB_NAMES = {                 # field of LlamaConfig: field of a Hub config.json
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "ffn": "intermediate_size", "eps": "rms_norm_eps", "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings", "bos_id": "bos_token_id", "eos_id": "eos_token_id"}
FAMILIES = {                  # model_type: its fields that differ from LLaMA's
    "llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


@dataclass(frozen=True)
class LlamaConfig:
    """Defaults: LLaMA-1 7B = Vicuna v1.1, the LLM in InstructBLIP. v1.5 has eps 1e-5 and 4096
    positions."""
    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32            # fewer than heads: grouped-query attention
    ffn: int = 11008
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()      # or config.json's dict, which becomes sorted pairs: hashable
    max_positions: int = 2048     # what it was trained on; see also `positions`
    tie_embeddings: bool = False
    bos_id: int = 1
    eos_id: int | tuple[int, ...] = 2
    head_dim: int | None = None   # None: width / heads
    qkv_bias: bool = False        # Qwen2.5: q, k and v have biases
    qk_norm: bool = False         # Qwen3: each head's q and k go through an RMSNorm, then rotate

    def __post_init__(self):
        if self.head_dim is None:
            if self.width % self.heads:
                raise ValueError(f"width {self.width}, {self.heads} heads; wanted a multiple of "
                                 "them, or head_dim")
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim "
                             f"{self.head_dim}; wanted heads = n * kv_heads and an even head_dim")
        object.__setattr__(self, "rope_scaling",
                           fast.checked_scaling(self.rope_scaling, self.max_positions))

    @property
    def positions(self):
        """How long a text may be: max_positions, or what rope_scaling makes of them."""
        rope = dict(self.rope_scaling)
        original = rope.get("original_max_position_embeddings", self.max_positions)
        return max(self.max_positions, int(original * rope.get("factor", 1)))

    @classmethod
    def from_folder(cls, root):
        """From config.json. The generation_config.json beside a LLaMA's adds its end tokens: chat
        models of LLaMA-3 may name the end of a turn only there."""
        hf = hub.model_config(root, tuple(FAMILIES), "text_config")
        more = root / "generation_config.json"
        if "text_config" not in hf and more.exists():
            both = hf.get("eos_token_id"), hub.read_object(more).get("eos_token_id")
            ends = [i for ids in both if ids is not None for i in as_tuple(ids)]
            hf["eos_token_id"] = [i for n, i in enumerate(ends) if i not in ends[:n]] or None
        return cls.from_dict(hf, root / "config.json")

    @classmethod
    def from_dict(cls, hf, where="config.json"):
        """From a Hub config.json, the file `where`, old style (rope_theta and rope_scaling) or new
        (rope_parameters), a LLaMA's own or the text_config inside an InstructBLIP's. Fields that it
        leaves out are LLaMA-1 7B's. Raises ValueError for a model that is none of FAMILIES, and for
        a number that is none or too large."""
        inside = "text_config" in hf
        hf = hf.get("text_config", hf)
        scaling = isinstance(hf, dict) and (hf.get("rope_scaling") or hf.get("rope_parameters"))
        if not isinstance(hf, dict) or not isinstance(scaling or {}, dict):
            raise ValueError(f"{where}: text_config or rope_scaling is {scaling or hf!r:.80}; "
                             "wanted an object {...}")
        scaling = dict(scaling or {})
        theta = first(scaling.pop("rope_theta", None), hf.get("rope_theta"), cls.rope_theta)
        original = "original_max_position_embeddings"
        if hf.get(original):                  # the one beside rope_scaling wins over the one inside
            scaling[original] = hf[original]
        rotated = first(scaling.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), 1)
        family = hf.get("model_type", "llama")
        unsupported = [] if family in FAMILIES else [
            f"model_type={family!r} (wanted {', '.join(FAMILIES)})"]
        unsupported += [f"{key}={got!r} (wanted {wanted!r})" for key, got, wanted in [
            ("use_sliding_window", hf.get("use_sliding_window") or False, False),
            ("partial_rotary_factor", rotated, 1),
            ("hidden_act", hf.get("hidden_act", "silu"), "silu"),
            ("attention_bias", hf.get("attention_bias", False), False),
            ("mlp_bias", hf.get("mlp_bias", False), False)] if got != wanted]
        if unsupported:
            raise ValueError(f"{where}: unsupported {', '.join(unsupported)}; use a plain LLaMA, "
                             "Qwen2.5 or Qwen3")
        names = dict(HUB_NAMES)
        if inside:                # InstructBLIP's text_config has had wrong ones (0 and 1)
            del names["bos_id"], names["eos_id"]
        ends = [] if hf.get("eos_token_id") is None else as_tuple(hf["eos_token_id"])
        given = hf | {"eos_token_id": list(ends) if len(ends) > 1 else (*ends, None)[0],
                      "rope_theta": theta, "num_key_value_heads": first(
                          hf.get("num_key_value_heads"), hf.get("num_attention_heads"), cls.heads)}
        return hub.make_config(cls, given, names | {"rope_theta": "rope_theta"}, where,
                               zero=("bos_id", "eos_id"), rope_scaling=scaling,
                               **FAMILIES[family])

    def to_dict(self):
        """As a Hub config.json, which any library reads."""
        family, title = (("qwen2", "Qwen2") if self.qkv_bias else
                         ("qwen3", "Qwen3") if self.qk_norm else ("llama", "Llama"))
        return {theirs: getattr(self, name) for name, theirs in HUB_NAMES.items()} | {
            "architectures": [f"{title}ForCausalLM"], "model_type": family, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False,
            "rope_theta": self.rope_theta, "rope_scaling": dict(self.rope_scaling) or None}


def first(*values):
    """The first of `values` that is not None."""
    return next(value for value in values if value is not None)


def own_head(root):
    """Whether the folder has an lm_head that differs from the embeddings. Then they are not tied,
    whatever config.json says; so in transformers. Qwen3's file holds the tied tensor twice."""
    head, embeddings = ([*hub.open_tensors(root, lambda name, end=end: name.endswith(end)).values()]
                        for end in ("lm_head.weight", "embed_tokens.weight"))
    return bool(head) and not (embeddings and head[0].shape == embeddings[0].shape
                               and torch.equal(head[0](), embeddings[0]()))


def as_tuple(ids):
    """One id or several -> a tuple."""
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


# ---- the decoder --------------------------------------------------------------------------------

class KVCache:
    """Keys and values of the positions so far, and which of these are padding. A layer allocates
    max_length positions once, at its first write, in the dtype and on the device of its keys."""

    def __init__(self, batch, max_length):
        self.batch, self.max_length, self.length = batch, max_length, 0
        self.mask = None                      # (B,max_length) bool, False = padding
        self.layers = {}                      # index of a layer -> [k, v], (B,H,max_length,d) each

    def extend(self, mask):
        """Makes room for new positions with `mask` (B,T); returns the mask (B,past+T) of all."""
        end = self.length + mask.shape[1]
        if mask.shape[0] != self.batch or end > self.max_length:
            raise ValueError(f"KVCache of {self.batch} rows, {self.max_length} positions, got "
                             f"{mask.shape[0]} rows up to position {end}; make a larger one")
        if self.mask is None:
            self.mask = mask.new_zeros(self.batch, self.max_length)
        self.mask[:, self.length:end] = mask
        self.length = end
        return self.mask[:, :end]

    def update(self, layer, k, v):
        """Writes k, v (B,H,T,d) of the newest T positions; returns those of all, (B,H,past+T,d)."""
        B, H, T, d = k.shape
        if layer not in self.layers:
            self.layers[layer] = [k.new_zeros(B, H, self.max_length, d) for _ in range(2)]
        for held, new in zip(self.layers[layer], (k, v), strict=True):
            held[:, :, self.length - T:self.length] = new
        return [held[:, :, :self.length] for held in self.layers[layer]]

    def cut(self, length):
        """Forgets the positions from `length` on; the next ones are written in their place."""
        if not 0 <= length <= self.length:
            raise ValueError(f"KVCache of {self.length} positions cut to {length}; wanted at most "
                             "those that it holds")
        self.length = length

    def grow(self, max_length):
        """Makes room for max_length positions in all; those that it holds stay."""
        more, self.max_length = max_length - self.max_length, max(max_length, self.max_length)
        if more > 0 and self.mask is not None:
            self.mask = F.pad(self.mask, (0, more))
            for layer, pair in self.layers.items():   # layer by layer: only one is held twice
                self.layers[layer] = [F.pad(held, (0, 0, 0, more)) for held in pair]

    def reorder(self, beam_index):
        """Row i becomes what row beam_index[i] was; there may be more or fewer rows than before."""
        self.batch, self.mask = len(beam_index), self.mask[beam_index]
        for layer, pair in self.layers.items():       # layer by layer: only one is held twice
            self.layers[layer] = [held[beam_index] for held in pair]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):         # torch computes the mean in fp32, on a GPU in one kernel
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def rotary_angles(config, positions):
    """positions (B,T) -> cos, sin (B,1,T,d/2) of the angle position * theta^(-2i/d) of pair i.
    Always fp32, and no buffer: that would be cast to bf16 with the weights."""
    d = config.head_dim
    theta = fast.scaled_theta(config, positions)                # rope_theta, unless config scales
    two_i = torch.arange(0, d, 2, device=positions.device, dtype=torch.float32)         # (d/2,)
    inverse = 1 / theta ** (two_i / d)                          # theta^(-2i/d), rad per position
    inverse, factor = fast.scaled_frequencies(config, inverse)  # inverse and 1, unless it scales
    angles = positions[:, None, :, None].float() * inverse[..., None, None, :]        # (B,1,T,d/2)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x, cos, sin):
    """Rotary embedding of x (B,H,T,d). Pairs are (i, i + d/2), the Hub's layout, not (2i, 2i+1)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; kv_heads < heads: grouped queries."""

    def __init__(self, config, index):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.grouped = config.kv_heads != config.heads
        inner, inner_kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.width, inner_kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.width, inner_kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.width, bias=False)
        if config.qk_norm:                                                    # over d, per head
            self.q_norm = RMSNorm(config.head_dim, config.eps)
            self.k_norm = RMSNorm(config.head_dim, config.eps)

    def forward(self, x, cos, sin, mask, cache):
        """x (B,T,D), mask (B,1,T,past+T) bool or None: plain causal -> (B,T,D)."""
        q, k, v = (rearrange(part, "b t (h d) -> b h t d", d=self.head_dim)
                   for part in fast.apply_all(x, self.q_proj, self.k_proj, self.v_proj))
        # fast.apply_all(x, f, g) is [f(x), g(x)], with the work that LoRA adapters share done once
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        # Without a mask a single new token may attend to the whole past.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped,
                                           is_causal=mask is None and q.shape[2] > 1)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    """SwiGLU: down_proj(silu(gate_proj(x)) * up_proj(x))."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x):
        gate, up = fast.apply_all(x, self.gate_proj, self.up_proj)          # (B,T,ffn) each
        # silu(gate) * up, without storing silu(gate) for the backward pass
        return self.down_proj(fast.swiglu(gate, up))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything under the Hub's `model.` prefix; Llama.run_layers runs it."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)


class Llama(nn.Module):
    """The whole LLM: embeddings, decoder, lm_head, generation."""
    compiled = False              # decode by compiled steps of fixed shape (not with beams)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:       # what adds to the residual starts smaller, as in GPT-2
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * config.layers) if adds else 0.02
                nn.init.normal_(parameter, std=std)
        self.tie_weights()

    def tie_weights(self):
        """One tensor for lm_head and embed_tokens, where the config asks for it."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None, vocab_size=None):
        """Folder or Hub repo of a LLaMA, or of an InstructBLIP (its language_model), in eval mode.
        dtype None: fp32. vocab_size: only the first so many rows of embed_tokens and lm_head are
        read: InstructBLIP pads 32000 to 32064, and 64 made-up classes would be in the softmax."""
        root = hub.folder(source, ("generation_config.json",), LLM_TENSORS)
        config = LlamaConfig.from_folder(root)
        config = replace(config, tie_embeddings=config.tie_embeddings and not own_head(root))
        rows = None
        if vocab_size is not None:
            vocab_size = min(vocab_size, config.vocab_size)
            config = replace(config, vocab_size=vocab_size)
            rows = {"model.embed_tokens.weight": vocab_size, "lm_head.weight": vocab_size}
        return hub.load_module(lambda: cls(config), root, dtype, device,
                               prefix=("language_model.", ""), rows=rows)

    def save_pretrained(self, folder, dtype=None):
        """config.json + model.safetensors in the Hub's layout, which from_pretrained reads back.
        LoRA adapters are left out: merge them first, or save them with lora.save."""
        tensors = {name: tensor.to(dtype or tensor.dtype)
                   for name, tensor in self.named_parameters() if ".lora_" not in name}
        tied = self.lm_head.weight is self.model.embed_tokens.weight      # lora.inject unties them
        hub.save_folder(folder, tensors, replace(self.config, tie_embeddings=tied).to_dict())

    def embed(self, ids):
        """ids (B,T) -> (B,T,D)."""
        return self.model.embed_tokens(ids)

    def hidden(self, ids=None, *, embeds=None, mask=None, cache=None):
        """ids (B,T) or embeds (B,T,D) -> hidden states after the last norm (B,T,D).
        mask (B,T) bool, False = padding, None = no padding; with a cache it is the mask of the new
        positions. Padding on the left or right changes no other row (test_llama.py)."""
        if (ids is None) == (embeds is None):
            raise ValueError("got both or none of ids (B,T) and embeds (B,T,D); pass exactly one")
        x = self.embed(ids) if embeds is None else embeds
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(f"mask {mask.dtype} {list(mask.shape)}; wanted torch.bool "
                             f"{list(x.shape[:2])}, False = padding")
        if cache is not None:
            mask = cache.extend(mask)                                          # (B,past+T)
        T = x.shape[1]
        # A token's position counts the tokens before it, so padding on the left shifts nothing.
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -T:]              # (B,T)
        return self.run_layers(x, positions, causal_mask(mask, T), cache)

    def run_layers(self, x, positions, mask, cache):
        """x (B,T,D), positions (B,T), mask (B,1,T,past+T) bool or None: plain causal -> (B,T,D)."""
        cos, sin = rotary_angles(self.config, positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.model.norm(x)

    def forward(self, ids=None, *, embeds=None, mask=None, cache=None, last_only=False):
        """-> logits (B,T,vocab), or (B,1,vocab) of the last position only."""
        x = self.hidden(ids, embeds=embeds, mask=mask, cache=cache)
        return self.lm_head(x[:, -1:] if last_only else x)

    @torch.no_grad()
    def generate(self, ids=None, *, embeds=None, mask=None, max_new_tokens=64, num_beams=1,
                 temperature=0.0, top_p=1.0, repetition_penalty=1.0, length_penalty=1.0,
                 eos_id=None, generator=None, stream=None, min_new_tokens=0, cache=None):
        """Prompts ids (B,T) or embeds (B,T,D), padded on the left by mask -> B lists of new ids,
        without the end token.

        temperature 0: the likeliest token; above 0: sampled, from the top_p nucleus, with the
        torch.Generator `generator`.  num_beams > 1: beam search, best sum of log-probabilities /
        length**length_penalty.  repetition_penalty: ids seen before (also those of a prompt that
        came as ids) get their positive logits divided, their negative ones multiplied by it.
        stream(row, id) is called for each new id at once.  eos_id: one or several end tokens,
        None: the config's.  cache: a KVCache that holds what stands before the prompt; the prompt
        and the answer are added to it.  Raises ValueError for settings that do not go together."""
        prompt = ids if embeds is None else embeds
        fixed = self.compiled and num_beams == 1
        check_generation(prompt, mask, max_new_tokens, num_beams, temperature, stream,
                         cache is not None and (fixed or num_beams > 1))
        eos = list(as_tuple(self.config.eos_id if eos_id is None else eos_id))
        B, T = prompt.shape[:2]
        cache = KVCache(B, 0) if cache is None else cache
        longest = cache.length + T + max_new_tokens
        if fixed:                             # few sizes, as each is compiled once
            longest += -longest % fast.CACHE_MULTIPLE
        cache.grow(longest)
        logits = self(ids, embeds=embeds, mask=mask, cache=cache, last_only=True)[:, -1]
        seen = torch.zeros_like(logits, dtype=torch.bool)                      # (B,vocab)
        if ids is not None:
            for row in range(B):
                seen[row, ids[row] if mask is None else ids[row][mask[row]]] = True

        def adjust(scores, seen, step):
            if repetition_penalty != 1:
                scores = torch.where(seen & (scores > 0), scores / repetition_penalty,
                                     torch.where(seen, scores * repetition_penalty, scores))
            if step < min_new_tokens:
                scores[:, eos] = -torch.inf
            return scores

        if num_beams > 1:
            return self._beam_search(logits, cache, seen, adjust, max_new_tokens, num_beams,
                                     length_penalty, eos)
        pick = partial(pick_token, temperature=temperature, top_p=top_p, generator=generator)

        def next_logits(token):               # (B,1) -> (B,vocab)
            return self(token, cache=cache, last_only=True)[:, -1]
        if fixed:
            next_logits = fast.fixed_steps(self, cache)              # the same, compiled
        return self._sample(logits, next_logits, seen, adjust, max_new_tokens, pick, eos, stream)

    def _sample(self, logits, next_logits, seen, adjust, max_new_tokens, pick, eos, stream):
        """One token after another for all rows, until all have ended."""
        new, finished = [[] for _ in logits], [False for _ in logits]
        for step in range(max_new_tokens):
            token = pick(adjust(logits.float(), seen, step))                   # (B,1)
            seen.scatter_(1, token, True)
            for row, token_id in enumerate(token[:, 0].tolist()):
                finished[row] |= token_id in eos
                if not finished[row]:
                    new[row].append(token_id)
                    if stream:
                        stream(row, token_id)
            if all(finished) or step + 1 == max_new_tokens:
                break
            logits = next_logits(token)
        return new

    def _beam_search(self, logits, cache, seen, adjust, max_new_tokens, count, length_penalty,
                     eos):
        """The beams of all prompts are one batch (B*count); Beams decides for each prompt."""
        B, vocab = logits.shape
        repeat = torch.arange(B, device=logits.device).repeat_interleave(count)
        cache.reorder(repeat)
        logits, seen = logits[repeat], seen[repeat]                            # (B*count,vocab)
        sums = logits.new_full((B, count), -1e9, dtype=torch.float)
        sums[:, 0] = 0.0                  # all beams are equal at first, so only one may branch
        prompts = [Beams(count, length_penalty, eos) for _ in range(B)]
        for step in range(max_new_tokens):
            scores = adjust(logits.float().log_softmax(-1), seen, step) + sums.view(-1, 1)
            # Each beam may end in one of len(eos) ways; so many candidates leave `count` to go on.
            best, index = scores.view(B, -1).topk(count * max(2, 1 + len(eos)), dim=1)
            beam, token = index // vocab, index % vocab                 # (B,candidates)
            last = step + 1 == max_new_tokens
            on = [beams.step(*candidates, last) for beams, *candidates in zip(
                prompts, best.tolist(), beam.tolist(), token.tolist(), strict=True)]
            if last or not any(beams.open for beams in prompts):
                break
            on = torch.tensor(on, device=index.device)                         # (B,count)
            sums, token = best.gather(1, on), token.gather(1, on).view(-1, 1)
            rows = (beam.gather(1, on) + repeat.view(B, count) * count).view(-1)
            cache.reorder(rows)
            seen = seen[rows].scatter_(1, token, True)
            logits = self(token, cache=cache, last_only=True)[:, -1]
        return [beams.answers[0][1] for beams in prompts]


class Beams:
    """The beam search of one prompt, on the host: the ids of its running beams, and the best
    finished answers so far as (score, ids), by the rules of Hugging Face's early_stopping=False
    (test_llama.py)."""

    def __init__(self, count, length_penalty, eos):
        self.count, self.length_penalty, self.eos = count, length_penalty, eos
        self.running, self.answers, self.open = [[]] * count, [], True

    def step(self, sums, beams, tokens, last):
        """Lists over the candidates, best first: sums of log-probabilities, the beams that they
        continue, their new ids -> the places of the `count` best unfinished ones, the next running
        beams. A candidate among the first `count` that ends is an answer. `open` becomes False
        when no running beam can beat the worst of `count` answers any more."""
        scale = (len(self.running[0]) + 1) ** self.length_penalty
        ends = [last or token in self.eos for token in tokens]
        on = [place for place, end in enumerate(ends) if not end][:self.count]
        if self.open:
            for place in range(self.count):
                if ends[place]:
                    tail = [] if tokens[place] in self.eos else [tokens[place]]
                    self.answers.append((sums[place] / scale, self.running[beams[place]] + tail))
            self.answers = sorted(self.answers, key=lambda answer: -answer[0])[:self.count]
        if not last:
            self.running = [self.running[beams[place]] + [tokens[place]] for place in on]
            reach = sums[on[0]] / scale
            self.open &= len(self.answers) < self.count or reach > self.answers[-1][0]
        return on


def causal_mask(mask, T):
    """mask (B,past+T) bool, False = padding -> (B,1,T,past+T), True = attend, for the newest T
    queries; or None where plain causal attention does the same: there is no past (or one query) and
    padding only on the right, which no token before it attends to."""
    L = mask.shape[1]
    plain = (mask[:, :-1] >= mask[:, 1:]).all() if T == L else T == 1 and mask.all()
    if plain:
        return None
    query = torch.arange(L - T, L, device=mask.device)[:, None]                # (T,1)
    key = torch.arange(L, device=mask.device)[None]                            # (1,L)
    attend = (key <= query) & mask[:, None, None, :]
    return attend | (key == query)        # a padding query sees itself, or its softmax would be NaN


def check_generation(prompt, mask, max_new_tokens, num_beams, temperature, stream, other_cache):
    """Raises ValueError for arguments of Llama.generate that do not go together.  other_cache: a
    cache is given that beams would reorder, or that compiled steps would take for their own."""
    padded_end = mask is not None and not mask[:, -1].all()
    for bad, why in [
            (prompt is None, "no prompt; pass ids (B,T) or embeds (B,T,D)"),
            (max_new_tokens < 1 or num_beams < 1 or temperature < 0,
             f"max_new_tokens={max_new_tokens}, num_beams={num_beams}, temperature="
             f"{temperature}; wanted at least 1, 1 and 0"),
            (num_beams > 1 and (stream or temperature > 0), "stream and temperature do not go "
             "with num_beams > 1, which revises its past tokens; use num_beams=1"),
            (other_cache, "a cache of what stands before the prompt does not go with num_beams > 1 "
             "or compiled steps; use num_beams=1 without --compile"),
            (padded_end, "the last position of a prompt is padding, but generation continues "
             "from there; pad prompts on the left")]:
        if bad:
            raise ValueError(f"generate: {why}")


def pick_token(scores, temperature, top_p, generator):
    """scores (B,vocab) -> ids (B,1): the best, or one sampled from the fewest that reach top_p."""
    if temperature == 0:
        return scores.argmax(dim=-1, keepdim=True)
    p, order = (scores / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(dim=-1) - p > top_p, 0.0)      # likelier ones are enough already
    return order.gather(1, torch.multinomial(p, 1, generator=generator))


# ---- text <-> ids -------------------------------------------------------------------------------

def no_token(token):
    """What to say of a special token that a tokenizer lacks."""
    return (f"the LLM's tokenizer has no token {token}, which prompt=chatml needs; pass an LLM "
            "that was tuned on ChatML, or prompt=vicuna")


class Tokenizer:
    """LLaMA's sentencepiece model. It gives ids of the text alone: nothing adds <s> or </s>."""
    boundary = ""      # what a segment of a prompt needs before it so that it starts a new word

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor  # imported here: ids alone need none
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: missing; wanted LLaMA's sentencepiece model, which "
                                    "lies beside config.json in the Hub's repos")
        try:
            self.pieces = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model ({error}); if it is Meta's "
                             "original LLaMA-3 file, put tokenizer.json there instead") from None
        self.bos_id, self.eos_id = self.pieces.bos_id(), self.pieces.eos_id()
        self.vocab_size = self.pieces.vocab_size()

    @staticmethod
    def from_pretrained(source):
        """From tokenizer.model of a folder or Hub repo, or from its tokenizer.json."""
        root = hub.folder(source, ("tokenizer.model", "*.json"), tensors=())
        for name, kind in (("tokenizer.model", Tokenizer), ("tokenizer.json", JsonTokenizer)):
            if (root / name).is_file():
                return kind(root / name)
        if (root / "config.json").exists():
            hub.model_config(root, tuple(FAMILIES), "text_config")    # refuses others by name
        raise FileNotFoundError(f"{root}: neither tokenizer.model nor tokenizer.json"
                                f"{hub.foreign(root)}; copy one of them there from the LLM's repo")

    def encode(self, text):
        """Ids of `text`. Each call starts with a word boundary, even in mid-sentence, because the
        LLM was trained on prompts whose segments were encoded one by one.
        "</s>" in the text is spelt out and not id 2: append eos_id yourself."""
        return self.pieces.encode(text)

    def special_id(self, token):
        """Id of a special token such as "<|im_start|>". ValueError if there is none."""
        found = self.pieces.piece_to_id(token)
        if found == self.pieces.unk_id():
            raise ValueError(no_token(token))
        return found

    def decode(self, ids):
        """Text of `ids`, without control ids (<s>, </s>, padding) and without ids beyond the
        vocabulary, which an LLM with random weights generates."""
        return self.pieces.decode([i for i in map(int, ids) if i < self.vocab_size
                                   and not self.pieces.is_control(i)])

    def stream_decoder(self):
        """-> a function push(id) that returns the text which this id completes, or "" as long as a
        character is incomplete (rare ones are spelt in bytes). push() at the end returns the rest.
        """
        ids, shown = [], 0

        def push(token_id=None):
            nonlocal shown
            ids.extend([] if token_id is None else [token_id])
            text = self.decode(ids)       # of all ids, as spaces and bytes need their neighbours
            if token_id is not None and text.endswith("\N{REPLACEMENT CHARACTER}"):
                return ""
            new, shown = text[shown:], len(text)
            return new

        return push


class JsonTokenizer(Tokenizer):
    """The same from a tokenizer.json: LLaMA-2's, or byte-level BPE (LLaMA-3, SmolLM2), where the
    boundary before a word is a space of the text and nothing adds it. The ids that begin and end
    a text come from config.json and generation_config.json."""

    def __init__(self, path):
        from tokenizers import Tokenizer as Pieces
        root = Path(path).parent
        try:
            self.pieces = Pieces.from_file(str(path))
        except Exception as error:        # the library raises nothing more specific
            raise ValueError(f"{path}: not readable as a tokenizer.json ({error}); "
                             "download it again") from None
        self.pieces.no_truncation()       # some files come with a length
        self.pieces.no_padding()
        self.pieces.encode_special_tokens = True      # "<|eot_id|>" inside a text is spelt out
        self.vocab_size = 1 + max(self.pieces.get_vocab().values())
        first = self.pieces.encode("a", add_special_tokens=False).tokens[0]
        self.boundary = "" if first.startswith(("▁", "Ġ")) else " "
        config = LlamaConfig.from_folder(root)
        ends = as_tuple(config.eos_id)
        if wrong := {config.bos_id, *ends} - self.pieces.get_added_tokens_decoder().keys():
            raise ValueError(
                f"{path}: bos_token_id or eos_token_id {sorted(wrong)} is ordinary text there; "
                "correct config.json (or generation_config.json)")
        self.bos_id, self.eos_id = config.bos_id, ends[0]
        if (root / "tokenizer_config.json").exists():          # names the usual one of several ends
            usual = hub.read_json(root / "tokenizer_config.json").get("eos_token")
            usual = usual["content"] if isinstance(usual, dict) else usual
            usual_id = self.pieces.token_to_id(usual) if usual else None
            self.eos_id = usual_id if usual_id in ends else self.eos_id

    def encode(self, text):
        """Ids of `text`; special tokens inside it are spelt out."""
        return self.pieces.encode(text, add_special_tokens=False).ids

    def special_id(self, token):
        """Id of a special token such as "<|im_start|>". ValueError if there is none."""
        if (found := self.pieces.token_to_id(token)) is None:
            raise ValueError(no_token(token))
        return found

    def decode(self, ids):
        """Text of `ids`, without special tokens."""
        return self.pieces.decode([int(i) for i in ids], skip_special_tokens=True)
