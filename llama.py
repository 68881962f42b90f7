"""LLaMA decoder (Vicuna 7B/13B): embeddings -> next-token logits, with a KV cache.  Paper Sec. 3.1, the LLM.
     ids (B,T) --embed--> (B,T,D) --layers x [x + attn(norm(x)); x + mlp(norm(x))]--> norm --> (B,T,D)
         --lm_head--> logits (B,T,vocab)
   embeds (B,T,D) may take the place of ids: that is how sound and video enter.  mask (B,T), True = keep.
   Module and tensor names are the Hub's (model.layers.N.self_attn.q_proj.weight), so that its files
   and peft's adapters fit without a rename table.
   Public: LlamaConfig, Llama, KVCache."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import hub


@dataclass(frozen=True)
class LlamaConfig:
    """The defaults are LLaMA-1 7B = Vicuna v1.1, the LLM inside InstructBLIP. v1.5: eps 1e-5, 4096."""
    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32            # fewer than heads: grouped-query attention
    ffn: int = 11008
    eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048     # what it was trained on; nothing here depends on it
    tie_embeddings: bool = False
    bos_id: int = 1
    eos_id: int | tuple = 2
    head_dim: int | None = None   # None: width / heads

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim {self.head_dim}: "
                             "wanted heads a multiple of kv_heads and an even head_dim")

    @classmethod
    def from_dict(cls, hf):
        """From a Hub config.json, old style (rope_theta) or new (rope_parameters), LLaMA's own or the
        text_config inside an InstructBLIP's; what it leaves out is LLaMA-1 7B's."""
        inside = "text_config" in hf
        hf = hf.get("text_config", hf)
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        odd = [f"{key}={got!r} (wanted {want!r})" for key, got, want in [
            ("model_type", hf.get("model_type", "llama"), "llama"),
            ("rope_type", kind, "default"),
            ("hidden_act", hf.get("hidden_act", "silu"), "silu"),
            ("attention_bias", hf.get("attention_bias", False), False),
            ("mlp_bias", hf.get("mlp_bias", False), False)] if got != want]
        if odd:
            raise ValueError(f"config.json: unsupported {', '.join(odd)}; use a plain LLaMA checkpoint")
        theirs = {"vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
                  "heads": "num_attention_heads", "ffn": "intermediate_size", "eps": "rms_norm_eps",
                  "max_positions": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings",
                  "rope_theta": "rope_theta", "head_dim": "head_dim"}
        if not inside:            # InstructBLIP's text_config says 0 and 1, which were never right
            theirs |= {"bos_id": "bos_token_id", "eos_id": "eos_token_id"}
        ours = {name: hf[key] for name, key in theirs.items() if hf.get(key) is not None}
        ours["rope_theta"] = rope.get("rope_theta", ours.get("rope_theta", cls.rope_theta))
        ours["kv_heads"] = hf.get("num_key_value_heads") or ours.get("heads", cls.heads)
        if isinstance(ours.get("eos_id"), list):
            ours["eos_id"] = tuple(ours["eos_id"])
        return cls(**ours)

    def to_dict(self):
        """The same as a Hub config.json that any library reads."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "vocab_size": self.vocab_size, "hidden_size": self.width,
                "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
                "head_dim": self.head_dim, "rms_norm_eps": self.eps, "rope_theta": self.rope_theta,
                "rope_scaling": None, "max_position_embeddings": self.max_positions,
                "tie_word_embeddings": self.tie_embeddings, "attention_bias": False,
                "mlp_bias": False, "bos_token_id": self.bos_id,
                "eos_token_id": list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id}


class KVCache:
    """Keys and values of the positions so far, allocated once, and which of them are padding."""

    def __init__(self, config, batch, max_length, dtype=None, device=None):
        shape = (batch, config.kv_heads, max_length, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device)
                                   for _ in range(config.layers)] for _ in range(2))
        self.mask = torch.zeros(batch, max_length, dtype=torch.bool, device=device)  # True = keep
        self.length = 0

    def extend(self, mask):
        """Makes room for new positions with `mask` (B,T); returns the mask of all so far (B,past+T)."""
        end = self.length + mask.shape[1]
        if mask.shape[0] != len(self.mask) or end > self.mask.shape[1]:
            raise ValueError(f"cache for {len(self.mask)} rows of {self.mask.shape[1]} positions, got "
                             f"{mask.shape[0]} rows up to {end}; make a larger KVCache")
        self.mask[:, self.length:end] = mask
        self.length = end
        return self.mask[:, :end]

    def update(self, layer, k, v):
        """Writes k, v (B,H_kv,T,d) of the newest T positions; returns all so far (B,H_kv,past+T,d)."""
        new = slice(self.length - k.shape[2], self.length)
        self.keys[layer][:, :, new], self.values[layer][:, :, new] = k, v
        return self.keys[layer][:, :, :self.length], self.values[layer][:, :, :self.length]

    def reorder(self, rows):
        """Row i becomes what row rows[i] was: after a beam-search step."""
        self.mask = self.mask[rows]
        for tensor in self.keys + self.values:
            tensor[:, :, :self.length] = tensor[rows, :, :self.length]


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        x32 = x.float()           # mean square in fp32; the weight multiplies after the cast back
        return self.weight * (x32 * (x32.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)


def rotary_angles(config, positions):
    """positions (B,T) -> cos, sin (B,1,T,d/2) in fp32. Computed, never loaded, so no buffer to cast."""
    index = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * config.rope_theta ** (-index / config.head_dim)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary embedding of x (B,H,T,d): pairs are (i, i + d/2), the Hub's layout, not (2i, 2i + 1)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        self.grouped = config.kv_heads != config.heads
        inner, inner_kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.width, inner, bias=False)
        self.k_proj = nn.Linear(config.width, inner_kv, bias=False)
        self.v_proj = nn.Linear(config.width, inner_kv, bias=False)
        self.o_proj = nn.Linear(inner, config.width, bias=False)

    def forward(self, x, cos, sin, keep, cache):
        q, k, v = (rearrange(proj(x), "b t (h d) -> b h t d", d=self.head_dim)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.index, k, v)
        # keep None: plain causal, which needs no mask; one new token may see the whole past.
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=self.grouped,
                                           is_causal=keep is None and q.shape[2] > 1)
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.width, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))    # SwiGLU


class Block(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, keep, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, keep, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything under the Hub's `model.` prefix; Llama.hidden runs it."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:       # what adds to the residual starts small, as in GPT-2
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if adds else 0.02)
        self._tie()

    def _tie(self):
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None, vocab_size=None):
        """Folder or Hub repo of a LLaMA, or of an InstructBLIP (its language_model), in eval mode.
        dtype None: fp32.  vocab_size keeps the first rows of embed_tokens and lm_head: InstructBLIP
        pads 32000 to 32064, and 64 made-up classes would take part in the softmax."""
        root = hub.folder(source)
        config = LlamaConfig.from_dict(hub.read_json(root / "config.json"))
        rows = None
        if vocab_size is not None:
            if vocab_size > config.vocab_size:
                raise ValueError(f"{root}: vocabulary of {config.vocab_size}, cannot keep {vocab_size}; "
                                 "pass a smaller vocab_size or none")
            config = replace(config, vocab_size=vocab_size)
            rows = {"model.embed_tokens.weight": vocab_size, "lm_head.weight": vocab_size}
        with torch.device("meta"):        # no memory and no initialisation that is thrown away
            model = cls(config)
        model = model.to(dtype or torch.float32).to_empty(device=device or "cpu")
        model._tie()                      # to_empty made two tensors of one
        return hub.load_into(model, root, prefix=("language_model.", ""), rows=rows).eval()

    def save_pretrained(self, folder, dtype=None):
        """config.json + model.safetensors in the Hub's layout, which from_pretrained reads back."""
        tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in self.named_parameters()}
        hub.save_folder(folder, tensors, self.config.to_dict())

    def embed(self, ids):
        """ids (B,T) -> (B,T,D)."""
        return self.model.embed_tokens(ids)

    def hidden(self, ids=None, *, embeds=None, mask=None, cache=None):
        """ids (B,T) or embeds (B,T,D) -> hidden states after the last norm (B,T,D).
        mask (B,T) bool, True = keep, None = all; with a cache it is the mask of the new positions.
        Left or right padding does not change the kept rows (test_llama.py)."""
        if (ids is None) == (embeds is None):
            raise ValueError("got both or none of ids (B,T) and embeds (B,T,D); pass exactly one")
        x = self.embed(ids) if embeds is None else embeds
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(f"mask {mask.dtype} {list(mask.shape)}; wanted torch.bool "
                             f"{list(x.shape[:2])}, True = keep")
        if cache is not None:
            mask = cache.extend(mask)                                          # (B,past+T)
        T = x.shape[1]
        # A kept token's position counts the kept tokens before it, so left padding shifts nothing.
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -T:]              # (B,T)
        cos, sin = rotary_angles(self.config, positions)
        keep = attention_mask(mask, T)
        for layer in self.model.layers:
            x = layer(x, cos, sin, keep, cache)
        return self.model.norm(x)

    def forward(self, ids=None, *, embeds=None, mask=None, cache=None, last_only=False):
        """-> logits (B,T,vocab), or (B,1,vocab) of the last position only."""
        x = self.hidden(ids, embeds=embeds, mask=mask, cache=cache)
        return self.lm_head(x[:, -1:] if last_only else x)


def attention_mask(mask, T):
    """mask (B,past+T) -> (B,1,T,past+T) bool for the newest T queries, or None where plain causal
    attention does: no past (or one query), and padding only on the right, which no kept token sees."""
    L = mask.shape[1]
    plain = (mask[:, :-1] >= mask[:, 1:]).all() if T == L else T == 1 and mask.all()
    if plain:
        return None
    query = torch.arange(L - T, L, device=mask.device)[:, None]                # (T,1)
    key = torch.arange(L, device=mask.device)[None]                            # (1,L)
    keep = (key <= query) & mask[:, None, None, :]
    return keep | (key == query)          # a padding query sees itself, or its softmax would be NaN
