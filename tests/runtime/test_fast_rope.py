"""RoPE scalings against transformers: angles, odd configs, scaled logits and answers."""

import copy
import json

import pytest
import torch
from parity import check
from tiny_llama import LLAMA3, ROPES, SIZES, YARN, some_ids, theirs, tiny_oracle

from llama import KVCache, Llama, LlamaConfig, rotary_angles


def config_json(rope, style, theta=5e5, **settings):
    """A config.json of one of the two styles; "oldest" says type instead of rope_type."""
    if style == "new":
        return settings | {"rope_parameters": rope | {"rope_theta": theta}}
    if style == "oldest":
        rope = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    return settings | {"rope_theta": theta, "rope_scaling": rope}


def same_angles(what, config, positions):
    """Ours and the oracle's cos and sin at `positions` (1,T), from one config.json."""
    from transformers import LlamaConfig as HubConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    oracle = LlamaRotaryEmbedding(HubConfig(**copy.deepcopy(config)))
    wanted = oracle(torch.zeros(1), positions)
    ours = LlamaConfig.from_dict(config)
    assert LlamaConfig.from_dict(ours.to_dict()) == ours == LlamaConfig.from_dict(config)
    assert hash(ours) == hash(LlamaConfig.from_dict(json.loads(json.dumps(ours.to_dict()))))
    for name, got, want in zip(("cos", "sin"), rotary_angles(ours, positions), wanted, strict=True):
        # Angles up to 1e4 are known to 1e-3 in fp32; these differ by the rounding of a frequency.
        check(f"{name}, {what}", got[:, 0], want.chunk(2, dim=-1)[0],
              2e-7 * max(10, positions.max()), 1e-4)
    return ours


@pytest.mark.parametrize("style", ["old", "oldest", "new"])
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_angles(rope, style):
    config = config_json(ROPES[rope], style, **SIZES["tiny"])
    ours = same_angles(f"{rope}, {style}", config, torch.arange(40)[None])
    same_angles(f"{rope}, short", config, torch.arange(9)[None])
    at = torch.tensor([[0, 1, 100, 1000, 8191, 10000]])
    same_angles(f"{rope} at 8b's size", config_json(ROPES[rope], style, **SIZES["8b"]), at)
    plain = LlamaConfig.from_dict(config_json({}, style, **SIZES["tiny"]))
    changed = any((a - b).abs().max() > 0.05 for a, b in zip(
        *(rotary_angles(c, torch.arange(40)[None]) for c in (ours, plain)), strict=True))
    assert changed == (rope != "default")


def test_rope_fields_in_odd_places():
    """What transformers makes of them: the original length beside rope_scaling counts for more than
    the one inside, rope_scaling for more than rope_parameters, and strange fields for nothing."""
    tiny, positions = SIZES["tiny"], torch.arange(40)[None]
    outside = {"original_max_position_embeddings": 32}
    for rope in (LLAMA3, LLAMA3 | {"original_max_position_embeddings": 64}, YARN):
        for style in ("old", "new"):
            ours = same_angles("outside", config_json(rope, style, **tiny | outside), positions)
            assert dict(ours.rope_scaling)["original_max_position_embeddings"] == 32
    both = config_json({"type": "linear", "factor": 2.0}, "old", **tiny) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    assert dict(same_angles("both styles", both, positions).rope_scaling)["factor"] == 2.0
    strange = config_json(YARN | {"finetuned": True, "type": "linear"}, "old", **tiny)
    assert dict(same_angles("strange fields", strange, positions).rope_scaling) == YARN | {
        "original_max_position_embeddings": 16}
    no_theta = {"rope_scaling": {"type": "linear", "factor": 2.0}} | tiny
    assert same_angles("no theta", no_theta, positions).rope_theta == 10000.0


@pytest.mark.parametrize("rope, missing", [
    ({"type": "linear"}, "factor"), ({"rope_type": "dynamic", "factor": None}, "factor"), (
        {"rope_type": "yarn"}, "factor"),
    ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor, high_freq_factor")])
def test_rope_fields_that_must_be_there(rope, missing):
    with pytest.raises(ValueError, match=f"rope_type='.*' without {missing}; add it"):
        LlamaConfig.from_dict({"rope_scaling": rope})
    with pytest.raises(ValueError, match=f"without {missing}; add it"):
        LlamaConfig(rope_scaling=rope)


@torch.no_grad()
@pytest.mark.parametrize("rope", [r for r in ROPES if r not in (
    "yarn, no original", "yarn, factor null", "llama3, no original", "yarn, half of mscale")])
def test_scaled_logits_and_answers(rope, tmp_path):
    """Grouped-query attention, odd sizes, texts of more than twice the trained length."""
    from transformers import LlamaForCausalLM
    oracle = tiny_oracle(intermediate_size=53, num_hidden_layers=3, **SIZES["tiny"],
                         rope_parameters=ROPES[rope] | {"rope_theta": 100.0})
    oracle.lm_head.weight.data.mul_(3)
    oracle.save_pretrained(tmp_path / "theirs")
    ours, ids = Llama.from_pretrained(tmp_path / "theirs"), some_ids(2, 40)
    logits = ours(ids)
    check(f"logits, {rope}", logits, oracle(ids).logits)
    ours.save_pretrained(tmp_path / "ours")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    check(f"saved by us, {rope}", again(ids).logits, logits)

    answer = {"max_new_tokens": 25, "min_new_tokens": 25}
    assert ours.generate(ids[:, :7], **answer) == theirs(oracle, ids[:, :7], **answer)

    cache = KVCache(2, 40)
    cached = torch.cat([ours(part, cache=cache) for part in ids.split([11, 20, 1, 8], 1)], dim=1)
    if rope == "dynamic":           # keys keep the angles that they were rotated with
        check("cached, dynamic, the first part", cached[:, :11], ours(ids[:, :11]))
        assert (cached - logits).abs().max() > 1e-3
    else:
        check(f"cached, {rope}", cached, logits)

    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, :13] = False            # also a dynamic row does not ask how long the others are
    check(f"padded, {rope}", ours(ids, mask=mask)[:1, 13:], ours(ids[:1, 13:]))
    half = Llama.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)(ids)
    check(f"bf16, {rope}", half, logits, 1.0, 2e-2)
