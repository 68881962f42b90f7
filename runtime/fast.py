"""Faster replacements for plain formulas of the components, which import each where they use it.

     swiglu               silu(gate) * up, with one wide tensor less to store for the backward pass
     apply_all            [linear(x) for linear in linears], where LoRA reads x only once
     flash_block_causal   softmax attention under a block-causal mask, by a kernel without masks
     fixed_steps          decoding by steps of fixed shape: compiled, on a GPU one CUDA graph
     scaled_theta, scaled_frequencies      RoPE for texts longer than a LLaMA was trained on

   The first four compute what a plain line says, faster or in less memory. Nothing here is needed
   to understand the method. This file knows no model: what it computes with are its arguments.
   Public: the above, stacked_down, FixedSteps, fixed_step, checked_scaling."""

import math

import torch
import torch.nn.functional as F

MASK_BIAS = 3e4           # M of flash_block_causal: large, and representable in fp16 and bf16
LARGEST_FLASH_HEAD = 256  # columns of q and k that the flash kernel takes
CACHE_MULTIPLE = 128      # caches of compiled decoding hold a multiple of this many positions


# ---- SwiGLU -------------------------------------------------------------------------------------

class SwiGLU(torch.autograd.Function):
    """silu(gate) * up. The backward pass computes silu(gate) again instead of storing it: one of
    the three widest tensors that a layer would hold until then (bench target 4)."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def swiglu(gate, up):
    """silu(gate) * up, each (B,T,ffn); value and gradients are autograd's to the bit."""
    return SwiGLU.apply(gate, up)


# ---- LoRA ---------------------------------------------------------------------------------------

def stacked_down(x, adapters):
    """[scale * A dropout(x) for each adapter] of LoraLinears that read the same x (...,in) -> a
    list of (...,r). The adapters share one dropout (peft draws one for each) and one product with
    all A stacked, because reading x takes most of the time."""
    A, config = torch.cat([layer.lora_A.weight for layer in adapters]), adapters[0].config
    if not torch.is_autocast_enabled(x.device.type):       # autocast casts to its own dtype
        x = x.to(A.dtype)
    inner = F.linear(F.dropout(x, config.dropout, adapters[0].training), A)   # (...,adapters*r)
    return (config.scale * inner).split(config.r, dim=-1)         # scaled where the tensor is small


def apply_all(x, *linears):
    """[linear(x) for linear in linears], with the A of all unmerged LoraLinears applied at once."""
    adapted = [m for m in linears if hasattr(m, "lora_A") and not m.merged]
    inner = dict(zip(adapted, stacked_down(x, adapted), strict=True)) if adapted else {}
    return [m(x, inner[m]) if m in inner else m(x) for m in linears]


# ---- block-causal attention ---------------------------------------------------------------------

def flash_block_causal(q, k, v, mask=None, dropout=0.0, *, per_frame, causal="past"):
    """Softmax attention of q, k, v (W,heads,K*N,d) -> (W,heads,K*N,d) in which each frame of
    per_frame = N vectors attends to itself and the frames before it ("past") or after it
    ("future"). mask (W,K*N) bool: False marks padding, which is no key; the rows of padding in the
    output are to be ignored.

    The same as a call with the mask, but the flash kernel takes none. Each frame gets a column of
    its own behind the d columns of q and k: a key has 1 in its frame's column, a query -M in those
    of the frames that it must not attend to, so that

         q' . k' = q . k - M [the query must not attend to the key's frame]

    and exp of it is exactly 0. One more column is -M in every query and 1 in the keys that are
    padding. v is filled up with zeros, which come out as zeros and are cut off."""
    d, frames = q.shape[-1], q.shape[2] // per_frame
    frame = torch.arange(frames, device=q.device)
    hidden = frame[:, None] < frame if causal == "past" else frame[:, None] > frame
    hidden = hidden.repeat_interleave(per_frame, dim=0)                           # (K*N,frames)
    own = torch.eye(frames, device=q.device).repeat_interleave(per_frame, dim=0)  # (K*N,frames)
    padding = own.new_zeros(len(q), len(own), 1) if mask is None else ~mask[..., None]
    own = torch.cat([own.expand(len(q), -1, -1), padding], dim=-1)             # (W,K*N,frames+1)
    hidden = F.pad(hidden, (0, 1), value=True).expand(len(q), -1, -1)
    width = -(d + frames + 1) % 8                                 # kernels want a multiple of 8

    def widened(x, columns):
        columns = F.pad(columns, (0, width)).to(x)[:, None].expand(-1, x.shape[1], -1, -1)
        return torch.cat([x, columns], dim=-1)

    out = F.scaled_dot_product_attention(
        widened(q, -MASK_BIAS * hidden), widened(k, own), F.pad(v, (0, frames + 1 + width)),
        dropout_p=dropout, scale=d ** -0.5)
    return out[..., :d]


# ---- decoding by steps of fixed shape -----------------------------------------------------------

def fixed_step(llm, token, position, mask, cache):
    """token, position (B,1), mask (B,max_length) bool -> logits (B,vocab). What
    llm(token, cache=cache)[:, -1] computes, but over the whole cache: its shapes never change."""
    x = llm.run_layers(llm.embed(token), position, mask[:, None, None], cache)          # (B,1,D)
    return llm.lm_head(x)[:, -1]


def fixed_steps(llm, cache):
    """The FixedSteps that `llm` answered with last, if they fit this filled KVCache, or new ones.
    They stay on `llm`, so that a later answer finds them compiled."""
    if "step" not in vars(llm):
        torch._dynamo.config.recompile_limit = 64        # one compilation per batch size and length

        def step(token, position, mask, steps):
            return fixed_step(llm, token, position, mask, steps)
        llm.step = torch.compile(step, dynamic=False)
    if "steps" not in vars(llm) or not llm.steps.restart(llm, cache):
        llm.steps = FixedSteps(llm, cache, llm.step)
    return llm.steps


class FixedSteps:
    """steps(token (B,1)) -> logits (B,vocab): decodes one position after another with shapes that
    never change, over all positions of a KVCache; the mask hides those not written yet. Therefore
    a step can be compiled, and on a GPU captured as one CUDA graph: launching a few hundred small
    kernels takes longer than running them. The ids are the same as without (test_fast.py)."""

    def __init__(self, llm, cache, step):
        self.layers, self.mask, self.step = cache.layers, cache.mask, step
        self.at = torch.tensor([cache.length], device=cache.mask.device)       # where to write next
        self.position = cache.mask.sum(dim=1, keepdim=True)                    # (B,1)
        self.token = torch.zeros_like(self.position)
        self.weights = [p.data_ptr() for p in llm.parameters()]
        self.graph = self.logits = None

    def restart(self, llm, cache):
        """Copies the start of another answer from `cache`, so that a captured graph serves it, too.
        Returns False if its sizes or the addresses of the weights are not the same."""
        if cache.mask.shape != self.mask.shape or self.weights != [
                p.data_ptr() for p in llm.parameters()]:
            return False
        for layer, pair in cache.layers.items():
            for held, new in zip(self.layers[layer], pair, strict=True):
                held.copy_(new)
        self.mask.copy_(cache.mask)
        self.at.fill_(cache.length)
        self.position.copy_(cache.mask.sum(dim=1, keepdim=True))
        return True

    def update(self, layer, k, v):
        """KVCache.update where the position is a tensor -> keys and values of all positions."""
        for held, new in zip(self.layers[layer], (k, v), strict=True):
            held.index_copy_(2, self.at, new)
        return self.layers[layer]

    def __call__(self, token):
        self.token.copy_(token)
        self.mask.index_fill_(1, self.at, True)
        if token.is_cuda and self.graph is None:
            self._capture()
        if self.graph is None:
            self.logits = self.step(self.token, self.position, self.mask, self)
        else:
            self.graph.replay()
        self.at += 1
        self.position += 1
        return self.logits

    def _capture(self):
        """Captures the graph after three warm-up runs, because compiling and choosing kernels must
        not be part of it. Each run writes the same position again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(self.token, self.position, self.mask, self)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.step(self.token, self.position, self.mask, self)


# ---- RoPE scalings: longer texts than a LLaMA was trained on ------------------------------------
#
# linear: every angle divided by factor.  dynamic: a larger theta for longer texts.  llama3, yarn:
# pairs that turn often within the original length keep their frequency, slow ones are divided by
# factor, with a ramp in between.  The numbers are transformers' (tests/runtime/test_fast_rope.py).

# rope_type -> the fields that config.json must have for it
ROPE_REQUIRED = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
                 "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
ROPE_OPTIONAL = ("original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim",
                 "beta_fast", "beta_slow", "truncate")


def checked_scaling(fields, max_positions):
    """config.json's rope_scaling (a dict, its pairs or None) -> sorted pairs; () for "default".
    The old key "type" becomes "rope_type", and what transformers infers is filled in.
    Raises ValueError for an unknown type and for a missing field."""
    fields = {key: value for key, value in dict(fields or ()).items() if value is not None}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_REQUIRED:
        raise ValueError(f"config.json: unsupported rope_type={kind!r} "
                         f"(wanted {', '.join(ROPE_REQUIRED)}); use another LLaMA")
    if kind == "default":
        return ()
    pairs = {key: fields[key] for key in ROPE_REQUIRED[kind] + ROPE_OPTIONAL if key in fields}
    for key, value in pairs.items():
        if not isinstance(value, int | float) or not 0 <= value < 1e30 or (
                value == 0 and ("factor" in key or "original" in key)):
            raise ValueError(f"config.json: rope_scaling's {key} is {value!r:.80}; wanted a number "
                             "above 0")
    if kind in ("llama3", "yarn"):
        original = pairs.setdefault("original_max_position_embeddings", max_positions)
        if kind == "yarn" and max_positions != original:
            pairs.setdefault("factor", max_positions / original)
    if missing := [key for key in ROPE_REQUIRED[kind] if key not in pairs]:
        raise ValueError(f"config.json: rope_type={kind!r} without {', '.join(missing)}; "
                         "add it to rope_scaling (rope_parameters)")
    if kind == "llama3" and pairs["low_freq_factor"] >= pairs["high_freq_factor"]:
        raise ValueError(f"config.json: low_freq_factor {pairs['low_freq_factor']} is not below "
                         f"high_freq_factor {pairs['high_freq_factor']}; correct rope_scaling")
    return tuple(sorted((pairs | {"rope_type": kind}).items()))


def scaled_theta(config, positions):
    """theta for positions (B,T): config.rope_theta, except for "dynamic", where it grows with the
    length that each row has by now: (B,1). In transformers the longest row decides for all rows.
    Keys in a cache stay rotated with the theta of their time, as in transformers, so beyond
    max_positions a cached "dynamic" LLaMA computes something else than an uncached one."""
    rope, d = dict(config.rope_scaling), config.head_dim
    if rope.get("rope_type") != "dynamic":
        return config.rope_theta
    grown = (positions.amax(dim=1, keepdim=True) + 1) / config.max_positions             # (B,1)
    return config.rope_theta * (1 + rope["factor"] * (grown.clamp_min(1) - 1)) ** (d / (d - 2))


def scaled_frequencies(config, inverse):
    """inverse (d/2,), theta^(-2i/d) in radians per position -> the same after scaling, and the
    factor that cos and sin are multiplied by."""
    rope = dict(config.rope_scaling)
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind in ("default", "dynamic"):
        return inverse, 1.0
    if kind == "linear":
        return inverse / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] / (2 * math.pi / inverse)
        unscaled, attention = ((turns - low) / (high - low)).clamp(0, 1), 1.0
    else:
        unscaled, attention = yarn(rope, config.head_dim, config.rope_theta, inverse.device)
    return (1 - unscaled) * inverse / factor + unscaled * inverse, attention


def yarn(rope, d, theta, device):
    """YaRN (arXiv 2309.00071): the share of each frequency that stays unscaled (d/2,), and the
    factor of cos and sin. The ramp runs from the pair that turns beta_fast times within the
    original length to the pair that turns beta_slow times."""
    original = rope["original_max_position_embeddings"]

    def pair(turns):                      # theta^(-2 pair/d) * original = 2 pi turns
        return d * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    first, last = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    pairs = torch.arange(d // 2, device=device, dtype=torch.float32)                     # (d/2,)
    ramp = (pairs - first) / (last - first or 0.001)

    def grown(scale):
        return 0.1 * scale * math.log(max(rope["factor"], 1)) + 1
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    inferred = grown(scales[0]) / grown(scales[1]) if all(scales) else grown(1)
    return 1 - ramp.clamp(0, 1), rope.get("attention_factor", inferred)
