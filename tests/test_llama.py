"""llama.py against transformers' LlamaForCausalLM (tiny and at full width, every parameter random)
and itself: padding, cache and batch change nothing.  Its tokenizers: test_tokenizers.py; scaled
RoPE and compiled decoding: tests/runtime/test_fast_rope.py, test_fast.py."""

import copy
import json
import sys

import pytest
import torch
from parity import check
from tiny_llama import EOS, LLAMA3, VOCAB, some_ids, speak, theirs, tiny_oracle

from llama import KVCache, Llama, LlamaConfig
from runtime import hub


@pytest.fixture(scope="module", params=[(6, "Llama"), (2, "Llama"), (2, "Qwen2"), (2, "Qwen3")],
                ids=["multi-head", "grouped-query", "Qwen2.5", "Qwen3"])
def pair(request, tmp_path_factory):
    """(the oracle, ours from its folder)."""
    kv_heads, family = request.param
    oracle, root = tiny_oracle(kv_heads=kv_heads, family=family), tmp_path_factory.mktemp("llama")
    oracle.save_pretrained(root)
    return oracle, Llama.from_pretrained(root)


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Several (oracle, ours) that generate."""
    pairs = []
    for seed in range(6):
        root = tmp_path_factory.mktemp(f"speaker{seed}")
        oracle = speak(tiny_oracle(seed, family=("Llama", "Qwen2", "Qwen3")[seed % 3]))
        oracle.save_pretrained(root)
        pairs.append((oracle, Llama.from_pretrained(root)))
    return pairs


@pytest.fixture
def model(speakers):
    return speakers[0][1]


# ---- forward ------------------------------------------------------------------------------------

@torch.no_grad()
def test_logits_of_ids_and_embeds(pair):
    oracle, ours = pair
    ids = some_ids()
    wanted = oracle(ids, output_hidden_states=True)
    check("embeddings", ours.embed(ids), wanted.hidden_states[0], 0, 0)
    check("hidden", ours.hidden(ids), wanted.hidden_states[-1])
    check("logits of ids", ours(ids), wanted.logits)
    check("logits of embeds", ours(embeds=ours.embed(ids)), wanted.logits)
    check("last only", ours(ids, last_only=True), wanted.logits[:, -1:])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(pair, side):
    oracle, ours = pair
    ids, mask = some_ids(), torch.ones(2, 9, dtype=torch.bool)
    if side != "right":
        mask[0, :3] = False
    if side != "left":
        mask[0, -2:] = False
    got, wanted = ours(ids, mask=mask), oracle(ids[:1, mask[0]]).logits
    check(f"{side} padding, kept rows", got[:1, mask[0]], wanted)
    check(f"{side} padding, the other row", got[1:], oracle(ids[1:]).logits)
    junk = torch.where(mask, ids, 3)
    assert torch.equal(ours(junk, mask=mask)[mask], got[mask])
    assert got.isfinite().all()


def test_padding_gives_no_nan_gradient(pair):
    ours = copy.deepcopy(pair[1])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    ours(some_ids(), mask=mask)[mask].logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


@torch.no_grad()
@pytest.mark.parametrize("steps", [[6, 1, 1, 1], [6, 3], [1] * 9])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_cache_equals_no_cache(pair, steps, side):
    oracle, ours = pair
    ids, mask = some_ids(), torch.ones(2, 9, dtype=torch.bool)
    if side == "left":
        mask[0, :2] = False
    if side == "right":               # a hole between a shorter prompt and its answer
        mask[0, 4:6] = False
    cache = KVCache(2, 9)
    logits = torch.cat([ours(i, mask=m, cache=cache) for i, m in
                        zip(ids.split(steps, 1), mask.split(steps, 1), strict=True)], dim=1)
    check(f"cached {steps}, {side}", logits[:1, mask[0]], oracle(ids[:1, mask[0]]).logits)
    check(f"cached {steps}, {side}, other row", logits[1:], oracle(ids[1:]).logits)
    with pytest.raises(ValueError, match="2 rows, 9 positions.*position 10; make a larger"):
        ours(ids[:, :1], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left"])
def test_a_cache_is_cut_back_and_grows(pair, side):
    """What was behind the cut has no influence, and neither has the room."""
    oracle, ours = pair
    ids, mask, cache = some_ids(), torch.ones(2, 9, dtype=torch.bool), KVCache(2, 0)
    if side == "left":
        mask[0, :2] = False
    cache.grow(8)
    ours(torch.cat([ids[:, :5], some_ids(length=3, seed=1)], dim=1), cache=cache,
         mask=torch.cat([mask[:, :5], mask[:, -3:]], dim=1))
    cache.cut(5)
    cache.grow(9)
    cache.grow(2)                                          # it never shrinks
    got = ours(ids[:, 5:], cache=cache)
    check(f"cut, {side}", got[:1], oracle(ids[:1, mask[0]]).logits[:, -4:])
    check(f"cut, {side}, other row", got[1:], oracle(ids[1:]).logits[:, -4:])
    for length in (10, -1):
        with pytest.raises(ValueError, match=f"9 positions cut to {length}; wanted at most"):
            cache.cut(length)


def test_generation_behind_a_cache(speakers):
    """The ids are those of the whole prompt, greedy and sampled, again and again with one cache."""
    for seed, (_, ours) in enumerate(speakers[:3]):        # of each family
        ids, cache = some_ids(length=9, seed=seed), KVCache(2, 0)
        for first, settings in [(0, {}), (4, {"max_new_tokens": 20}), (8, {"max_new_tokens": 3}),
                                (6, {"temperature": 1.0, "top_p": 0.9})]:
            settings = {"max_new_tokens": 12} | settings
            cache.cut(first)
            got, wanted = (ours.generate(embeds=ours.embed(ids)[:, start:], **settings, **more,
                                         generator=torch.Generator().manual_seed(seed))
                           for start, more in ((first, {"cache": cache}), (0, {})))
            assert got == wanted
    with pytest.raises(ValueError, match="a cache of what stands before.*use num_beams=1"):
        ours.generate(ids, num_beams=2, cache=cache)
    compiled = copy.copy(ours)
    compiled.compiled = True
    with pytest.raises(ValueError, match="or compiled steps; use num_beams=1 without --compile"):
        compiled.generate(ids, cache=cache)


@torch.no_grad()
def test_reordered_cache(pair):
    ours, ids, cache = pair[1], some_ids(), KVCache(2, 5)
    ours(ids[:, :4], cache=cache)
    cache.reorder(torch.tensor([1, 1, 0]))
    got = ours(ids[[1, 1, 0], 4:5], cache=cache)
    check("reordered", got, ours(ids[[1, 1, 0], :5])[:, -1:])


@torch.no_grad()
def test_the_future_cannot_change_the_past(pair):
    ours, ids = pair[1], some_ids()
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % VOCAB
    assert torch.equal(ours(ids)[:, :5], ours(changed)[:, :5])
    assert not torch.equal(ours(ids)[:, 5:], ours(changed)[:, 5:])


@torch.no_grad()
def test_bf16(pair, tmp_path):
    oracle, ours = pair
    ours.save_pretrained(tmp_path, dtype=torch.bfloat16)
    half = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    ids = some_ids(8, 20)
    logits = half(ids)
    assert logits.dtype == torch.bfloat16
    check("bf16 against fp32", logits, oracle(ids).logits, 1.0, 2e-2)


def test_mask_and_input_errors(pair):
    ours, ids = pair[1], some_ids()
    with pytest.raises(ValueError, match="wanted torch.bool"):
        ours(ids, mask=torch.ones(2, 9))
    with pytest.raises(ValueError, match=r"\[2, 8\]; wanted torch.bool \[2, 9\]"):
        ours(ids, mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="exactly one"):
        ours()
    with pytest.raises(ValueError, match="exactly one"):
        ours(ids, embeds=ours.embed(ids))


# ---- folders and configs ------------------------------------------------------------------------

@torch.no_grad()
def test_save_pretrained_is_read_by_transformers(pair, tmp_path):
    from transformers import AutoModelForCausalLM
    oracle, ours = pair
    ours.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path), some_ids()
    check("saved by us, read by transformers", again.eval()(ids).logits, oracle(ids).logits)
    assert Llama.from_pretrained(tmp_path).config == ours.config


def test_config_styles(tmp_path):
    old = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5e5, "torch_dtype": "float16",
           "rope_scaling": None, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    config = LlamaConfig.from_dict(old)
    assert config == LlamaConfig(width=64, heads=4, kv_heads=4, rope_theta=5e5, eps=1e-5,
                                 max_positions=4096, head_dim=16)
    new = old | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del new["rope_theta"]
    assert LlamaConfig.from_dict(new) == config
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert LlamaConfig.from_dict({}) == LlamaConfig()
    instructblip = {"text_config": old | {"bos_token_id": 0, "eos_token_id": 1}}
    assert LlamaConfig.from_dict(instructblip) == config
    several = LlamaConfig.from_dict({"eos_token_id": [2, 5]})
    assert several.eos_id == (2, 5) and LlamaConfig.from_dict(several.to_dict()) == several
    assert LlamaConfig.from_dict({"eos_token_id": [2]}) == LlamaConfig()


@pytest.mark.parametrize("wrong", [
    {"rope_type='longrope' .wanted default, linear, dynamic, yarn, llama3.": {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}},
    {"rope_type='su' ": {"rope_scaling": {"type": "su", "factor": 2.0}}},
    {"partial_rotary_factor=0.5 ": {"partial_rotary_factor": 0.5}},
    {"partial_rotary_factor=0.5 ": {"rope_parameters": {"partial_rotary_factor": 0.5}}},
    {"hidden_act=": {"hidden_act": "gelu"}}, {"attention_bias=": {"attention_bias": True}},
    {"mlp_bias=": {"mlp_bias": True}}, {"model_type='opt'": {"model_type": "opt"}},
    {"model_type='mistral' .wanted llama, qwen2, qwen3.": {"model_type": "mistral"}},
    {"use_sliding_window=True": {"model_type": "qwen2", "use_sliding_window": True}}])
def test_unsupported_config(wrong):
    (named, config), = wrong.items()
    with pytest.raises(ValueError, match=f"unsupported {named}"):
        LlamaConfig.from_dict(config)


@pytest.mark.parametrize("key, value", [
    ("num_hidden_layers", 10 ** 6), ("num_hidden_layers", 0), ("hidden_size", -48),
    ("hidden_size", "48"), ("hidden_size", 48.0), ("hidden_size", True), ("vocab_size", [37]),
    ("num_attention_heads", 0), ("num_attention_heads", 7), ("num_key_value_heads", 4),
    ("num_key_value_heads", 0), ("rope_theta", 0), ("partial_rotary_factor", 0),
    ("head_dim", 3), ("rms_norm_eps", float("nan")), ("rms_norm_eps", -1), ("rope_theta", "x"),
    ("rope_theta", float("inf")), ("rope_scaling", [1]), ("rope_scaling", 2.0),
    ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}), ("rope_scaling", {"rope_type": [1]}),
    ("rope_scaling", LLAMA3 | {"low_freq_factor": 4.0}), ("tie_word_embeddings", "no"),
    ("eos_token_id", "</s>"), ("eos_token_id", [2, "x"]), ("bos_token_id", -1),
    ("intermediate_size", 2 ** 40), ("max_position_embeddings", {}), ("text_config", 5)])
def test_absurd_configs_are_named(tmp_path, key, value):
    config = tiny_config() | {key: value}
    hub.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: ") as error:
        LlamaConfig.from_folder(tmp_path)
    assert any(word in str(error.value) for word in (
        key, "heads", "head_dim", "factor", "rope_type")), error.value


def tiny_config():
    return {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6,
            "num_hidden_layers": 2, "intermediate_size": 70, "vocab_size": 37}


@torch.no_grad()
def test_other_rope_theta_and_eps(tmp_path):
    oracle = tiny_oracle(rope_theta=100.0, rms_norm_eps=1e-2)
    oracle.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.rope_theta == 100.0 and ours.config.eps == 1e-2
    check("theta 100, eps 1e-2", ours(some_ids()), oracle(some_ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_tied_embeddings(tmp_path, family):
    oracle = tiny_oracle(tie_word_embeddings=True, family=family)
    oracle.save_pretrained(tmp_path / "theirs")
    ours = Llama.from_pretrained(tmp_path / "theirs")
    check("tied", ours(some_ids()), oracle(some_ids()).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.save_pretrained(tmp_path / "ours")
    again = Llama.from_pretrained(tmp_path / "ours")
    check("tied, saved", again(some_ids()), ours(some_ids()), 0, 0)

    tensors = {name: tensor.clone() for name, tensor in oracle.state_dict().items()}
    for head in (1, 3):               # the file holds the lm_head as well, the same or its own
        tensors["lm_head.weight"] *= head
        hub.save_folder(tmp_path / "both", tensors, oracle.config.to_dict())
        both = Llama.from_pretrained(tmp_path / "both")
        assert both.config.tie_embeddings == (head == 1)           # Qwen3 0.6B's file holds both
        check("tied, saved twice", both(some_ids()), head * ours(some_ids()))
    theirs = type(oracle).from_pretrained(tmp_path / "both").eval()
    check("tied, but another lm_head", both(some_ids()), theirs(some_ids()).logits)


def test_end_tokens_of_generation_config(tmp_path):
    """LLaMA-3's chat models: a text ends with one id, a turn with another one, named elsewhere."""
    for here, there, wanted in [(2, [5, 2], (2, 5)), ([2, 5], 7, (2, 5, 7)), (2, 2, 2),
                                (None, [7], 7), (5, None, 5), (None, None, 2)]:
        hub.write_json(tmp_path / "config.json", {"eos_token_id": here})
        hub.write_json(tmp_path / "generation_config.json", {"eos_token_id": there})
        assert LlamaConfig.from_folder(tmp_path).eos_id == wanted
    hub.write_json(tmp_path / "config.json", {"text_config": {"eos_token_id": 1}})
    hub.write_json(tmp_path / "generation_config.json", {"eos_token_id": 7})
    assert LlamaConfig.from_folder(tmp_path).eos_id == 2         # an InstructBLIP's say nothing


@torch.no_grad()
def test_padded_vocabulary_inside_instructblip(tmp_path):
    """The Hub's InstructBLIP holds language_model.* with 64 made-up rows after the 32000."""
    oracle = tiny_oracle()
    tensors = {f"language_model.{name}": tensor for name, tensor in oracle.state_dict().items()}
    hub.save_folder(tmp_path, tensors | {"query_tokens": torch.zeros(1)},
                    {"model_type": "instructblip", "text_config": oracle.config.to_dict()})
    check("all rows", Llama.from_pretrained(tmp_path)(some_ids()), oracle(some_ids()).logits)
    ours, ids = Llama.from_pretrained(tmp_path, vocab_size=33), some_ids() % 33
    assert ours.config.vocab_size == 33 and ours.config.eos_id == EOS
    check("first rows", ours(ids), oracle(ids).logits[..., :33])
    assert Llama.from_pretrained(tmp_path, vocab_size=99).config.vocab_size == 37    # has no more


def test_missing_unknown_and_wrong_tensors(tmp_path):
    oracle = tiny_oracle()
    tensors, config = dict(oracle.state_dict()), oracle.config.to_dict()
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)
    hub.save_folder(tmp_path, tensors | {
        "model.extra.weight": torch.zeros(3), "lm_head.weight": torch.zeros(5, 48),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, config)
    with pytest.raises(ValueError, match=(
            rf"missing: .*{name}.*unknown: model.extra.weight \(1\).*"
            r"wrong shape: lm_head.weight \[5, 48\], wanted \[37, 48\]")):
        Llama.from_pretrained(tmp_path)
    hub.save_folder(tmp_path, tensors | {name: whole}, config)
    assert not Llama.from_pretrained(tmp_path).training


# ---- full width ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wide_weights():
    """One layer of Vicuna 7B's size, all cut from one row of random numbers, each elsewhere."""
    with torch.device("meta"):
        shapes = list(Llama(LlamaConfig(vocab_size=VOCAB, layers=1)).named_parameters())
    row = torch.empty(4096 * 11008 + 10 ** 5).uniform_(
        -0.03, 0.03, generator=torch.Generator().manual_seed(0))
    weights = {name: row[997 * i:997 * i + p.numel()].view(p.shape)
               for i, (name, p) in enumerate(shapes)}
    return {name: w + 1 if "norm" in name else w for name, w in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("kv_heads, rope", [(32, None), (8, LLAMA3)], ids=["vicuna", "llama-3"])
def test_full_width(wide_weights, kv_heads, rope):
    """One layer, 4096 wide, 32 heads, in fp32 and bf16; grouped: the first of the keys' rows."""
    from transformers import LlamaConfig as HubConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    weights = {name: w[:kv_heads * 128] if "k_proj" in name or "v_proj" in name else w
               for name, w in wide_weights.items()}
    config = HubConfig(vocab_size=VOCAB, num_hidden_layers=1, num_key_value_heads=kv_heads,
                       rope_scaling=rope, max_position_embeddings=8, attn_implementation="eager")
    with torch.device("meta"):                        # both models share the weights' memory
        oracle, ours = LlamaForCausalLM(config), Llama(LlamaConfig.from_dict(config.to_dict()))
    oracle.model.rotary_emb = LlamaRotaryEmbedding(config)
    oracle.load_state_dict(weights, assign=True)
    ours.load_state_dict(weights, assign=True)
    ids, mask = some_ids(2, 13), torch.ones(2, 13, dtype=torch.bool)
    mask[0, :3] = False
    wanted = oracle.eval()(ids).logits
    check("full width, fp32", ours(ids), wanted, 1e-4, 1e-5)
    cache = KVCache(2, 13)
    got = [ours(ids[:, :11], mask=mask[:, :11], cache=cache), ours(ids[:, 11:], cache=cache)]
    got = torch.cat(got, dim=1)
    check("full width, cached, padded", got[:1, 3:], oracle(ids[:1, 3:]).logits, 1e-4, 1e-5)
    check("full width, cached", got[1:], wanted[1:], 1e-4, 1e-5)
    answer = {"max_new_tokens": 3, "min_new_tokens": 3}
    assert ours.generate(ids[:, :6], **answer) == theirs(oracle, ids[:, :6], **answer)
    check("full width, bf16", ours.bfloat16()(ids), wanted, torch.inf, 2e-2)


# ---- generation ---------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [
    {}, {"repetition_penalty": 1.5}, {"min_new_tokens": 4}, {"num_beams": 3},
    {"num_beams": 3, "repetition_penalty": 1.5}, {"num_beams": 4, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0}, {"num_beams": 3, "min_new_tokens": 4}],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()) or "greedy")
def test_generates_what_transformers_generates(speakers, settings):
    lengths = set()
    for seed, (oracle, ours) in enumerate(speakers):
        ids, mask = some_ids(3, 7, seed), torch.ones(3, 7, dtype=torch.bool)
        settings = {"max_new_tokens": 12, **settings}
        # transformers takes left padding off the *new* ids when it penalises a prompt of embeds, so
        # embeds are compared without padding.
        embeds = ours.embed(ids)
        assert ours.generate(embeds=embeds, **settings) == theirs(
            oracle, inputs_embeds=embeds, mask=mask, **settings)
        mask[0, :3], ids[0, :3] = False, 0
        new = ours.generate(ids, mask=mask, **settings)
        assert new == theirs(oracle, ids, mask, **settings)
        lengths |= {len(row) for row in new}
    assert len(lengths) >= 3 or "repetition_penalty" in settings, f"only lengths {lengths}"


@pytest.mark.parametrize("settings", [
    {}, {"num_beams": 3}, {"num_beams": 3, "repetition_penalty": 1.5}])
def test_a_batch_equals_its_singles(model, settings):
    ids, mask = some_ids(3, 7), torch.ones(3, 7, dtype=torch.bool)
    mask[0, :4], mask[1, :2] = False, False
    batch = model.generate(ids, mask=mask, **settings)
    singles = [model.generate(ids[r:r + 1, mask[r]], **settings)[0] for r in range(3)]
    assert batch == singles


def test_one_beam_is_greedy(model, monkeypatch):
    ids = some_ids(3, 7)
    greedy = model.generate(ids, max_new_tokens=10)
    assert model.generate(ids, max_new_tokens=10, num_beams=1) == greedy
    search = model._beam_search
    monkeypatch.setattr(model, "_beam_search", lambda *a: search(*a[:5], 1, *a[6:]))
    assert model.generate(ids, max_new_tokens=10, num_beams=2) == greedy     # in truth with one


def test_sampling(model):
    ids = some_ids(2, 7)

    def sample(seed=0, **settings):
        return model.generate(ids, max_new_tokens=12, temperature=1.0,
                              generator=torch.Generator().manual_seed(seed), **settings)
    greedy = model.generate(ids, max_new_tokens=12)
    assert sample(top_p=1e-6) == sample(top_p=0.0) == greedy
    assert sample() == sample() and len({str(sample(seed)) for seed in range(5)}) > 1
    assert model.generate(ids, max_new_tokens=12, temperature=1e-6) == greedy


def test_sampling_follows_the_nucleus(model):
    """One token, drawn 3000 times, against the probabilities of the oracle's top-p warper."""
    from transformers import TopPLogitsWarper
    ids, draws = some_ids(1, 7), 3000
    logits = model(ids)[:, -1] / 1.3
    wanted = TopPLogitsWarper(0.8)(None, logits).softmax(-1)[0]
    drawn = model.generate(ids.expand(draws, -1), max_new_tokens=1, temperature=1.3, top_p=0.8,
                           eos_id=(), generator=torch.Generator().manual_seed(0))
    seen = torch.bincount(torch.tensor(drawn)[:, 0], minlength=VOCAB) / draws
    assert not seen[wanted == 0].any() and (wanted > 0).sum() < VOCAB
    assert (seen - wanted).abs().max() < 0.03


def test_stops_at_the_end_token(model):
    ids = some_ids(1, 7)
    free = model.generate(ids, max_new_tokens=8, eos_id=())[0]
    assert len(free) == 8
    end = free[3]
    before = free[:free.index(end)]
    assert model.generate(ids, max_new_tokens=8, eos_id=end)[0] == before
    assert model.generate(ids, max_new_tokens=8, eos_id=(VOCAB - 1, end))[0] == before
    other = some_ids(1, 7, seed=5)
    batch = model.generate(torch.cat([ids, other]), max_new_tokens=8, eos_id=end)
    assert batch == [before, model.generate(other, max_new_tokens=8, eos_id=end)[0]]


def test_stream(model):
    ids, calls = some_ids(3, 7), []
    new = model.generate(ids, max_new_tokens=12, stream=lambda *call: calls.append(call))
    assert [[t for r, t in calls if r == row] for row in range(3)] == new
    steps = [sum(r == row for r, _ in calls[:i]) for i, (row, _) in enumerate(calls)]
    assert steps == sorted(steps), "one token of every row before the next of any"


def test_generate_errors(model):
    ids, mask = some_ids(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, -1] = False
    for settings, message in [
            ({"ids": ids, "num_beams": 2, "stream": print}, "num_beams > 1.*use num_beams=1"),
            ({"ids": ids, "num_beams": 2, "temperature": 1.0}, "num_beams > 1"),
            ({"ids": ids, "mask": mask}, "pad prompts on the left"),
            ({"ids": ids, "max_new_tokens": 0}, "max_new_tokens=0.*wanted at least 1"),
            ({"ids": ids, "temperature": -1.0}, "temperature=-1.0"), ({}, "no prompt")]:
        with pytest.raises(ValueError, match=message):
            model.generate(**settings)


def test_generate_leaves_no_graph_and_runs_under_autocast(model):
    ids = some_ids()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate(ids, max_new_tokens=4, eos_id=())[0]) == 4
    assert all(p.grad is None for p in model.parameters())


def test_needs_neither_transformers_nor_peft():
    source = open(sys.modules["llama"].__file__).read() + open(hub.__file__).read()
    assert "import transformers" not in source and "from transformers" not in source


def test_vicuna_7b_names_and_shapes():
    """The published Vicuna 7B holds 291 tensors; ours has the same names and shapes."""
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert len(shapes) == 291 and sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert shapes["model.layers.31.mlp.down_proj.weight"] == [4096, 11008]
    assert json.dumps(LlamaConfig().to_dict())
