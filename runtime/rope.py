"""RoPE scalings: how a LLaMA reads longer texts than its rotary embedding was trained on.

     config.json's rope_scaling --checked_scaling--> sorted pairs, () for the plain embedding
     theta --scaled_theta--> theta       theta^(-2i/d) (d/2,) --scaled_frequencies--> (d/2,), factor
   linear: every angle divided by factor.  dynamic: a larger theta for longer texts.  llama3, yarn:
   pairs that turn often within the original length keep their frequency, slow ones are divided by
   factor, with a ramp in between.  The numbers are transformers' (tests/test_llama.py).
   Public: checked_scaling, scaled_theta, scaled_frequencies."""

import math

import torch

# rope_type -> the fields that config.json must have for it
REQUIRED = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
OPTIONAL = ("original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim",
            "beta_fast", "beta_slow", "truncate")


def checked_scaling(fields, max_positions):
    """config.json's rope_scaling (a dict, its pairs or None) -> sorted pairs; () for "default".
    The old key "type" becomes "rope_type", and what transformers infers is filled in.
    Raises ValueError for an unknown type and for a missing field."""
    fields = {key: value for key, value in dict(fields or ()).items() if value is not None}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in REQUIRED:
        raise ValueError(f"config.json: unsupported rope_type={kind!r} "
                         f"(wanted {', '.join(REQUIRED)}); use another LLaMA")
    if kind == "default":
        return ()
    pairs = {key: fields[key] for key in REQUIRED[kind] + OPTIONAL if key in fields}
    if kind in ("llama3", "yarn"):
        original = pairs.setdefault("original_max_position_embeddings", max_positions)
        if kind == "yarn" and max_positions != original:
            pairs.setdefault("factor", max_positions / original)
    if missing := [key for key in REQUIRED[kind] if key not in pairs]:
        raise ValueError(f"config.json: rope_type={kind!r} without {', '.join(missing)}; "
                         "add it to rope_scaling (rope_parameters)")
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
