"""lora.py against peft over transformers' LlamaForCausalLM (tiny, all random, lora_B too):
same outputs, same gradients, and each side opens what the other saved."""

import copy
import dataclasses
import json

import pytest
import torch
from parity import check, randomise
from safetensors.torch import load_file, save_file

import lora
from llama import Llama
from lora import LoraConfig
from runtime import fast

OURS = LoraConfig(r=4, alpha=6, dropout=0.0)
VOCAB = 37


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny base model."""
    from transformers import LlamaConfig, LlamaForCausalLM
    root = tmp_path_factory.mktemp("base")
    randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=70, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2))).save_pretrained(root)
    return root


@pytest.fixture
def oracle(base):
    """peft's model with random adapters."""
    import peft
    from transformers import LlamaForCausalLM
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), peft.LoraConfig(
        r=4, lora_alpha=6, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    adapters = torch.nn.ParameterDict({n.replace(".", "/"): p for n, p in model.named_parameters()
                                       if "lora_" in n})
    randomise(adapters)
    return model.eval()


@pytest.fixture
def model(base):
    """Ours, with random adapters."""
    return shaken(lora.inject(Llama.from_pretrained(base), OURS))


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora.adapter_tensors(model).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def some_ids():
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def test_reads_what_peft_saved(base, oracle, tmp_path):
    oracle.save_pretrained(tmp_path)
    ours = lora.load(Llama.from_pretrained(base), tmp_path)
    logits, wanted = ours(some_ids()), oracle(some_ids()).logits
    check("logits with peft's adapters", logits, wanted)
    plain = Llama.from_pretrained(base)(some_ids())
    assert (plain - wanted).abs().max() > 1e-2, "the adapters must matter here"
    logits.logsumexp(-1).sum().backward()
    wanted.logsumexp(-1).sum().backward()
    theirs = {name.replace(".default.", "."): p.grad for name, p in oracle.named_parameters()}
    for name, parameter in lora.adapter_tensors(ours).items():
        check(f"gradient of {name}", parameter.grad, theirs[name], 1e-3, 1e-5)


@torch.no_grad()
def test_peft_reads_what_we_saved(base, model, tmp_path):
    import peft
    from transformers import LlamaForCausalLM
    lora.save(model, tmp_path, base_model="lmsys/vicuna-7b-v1.5")
    theirs = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path)
    check("our adapters in peft", model(some_ids()), theirs.eval()(some_ids()).logits)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.2.self_attn.o_proj.lora_B.weight" in names
    assert len(names) == 3 * 4 * 2 and {t.dtype for t in names.values()} == {torch.float32}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "lmsys/vicuna-7b-v1.5" and config["lora_alpha"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"], "no temporary file stays"


@torch.no_grad()
def test_save_and_load(base, model, tmp_path):
    lora.save(model, tmp_path)
    fresh = lora.load(Llama.from_pretrained(base), tmp_path)
    assert torch.equal(fresh(some_ids()), model(some_ids()))
    injected = lora.load(lora.inject(Llama.from_pretrained(base), OURS), tmp_path)
    assert torch.equal(injected(some_ids()), model(some_ids()))


def test_a_fresh_adapter_is_the_base_and_trains_alone(base):
    plain = Llama.from_pretrained(base)
    model = lora.inject(copy.deepcopy(plain), LoraConfig(r=4))
    assert torch.equal(model(some_ids()), plain(some_ids()))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name.removeprefix(lora.PREFIX) for name in lora.adapter_tensors(model)}
    assert len(trained) == 3 * 4 * 2
    spread = model.model.layers[0].self_attn.q_proj.lora_A.weight.abs().max()
    assert 0.9 < spread * 48 ** 0.5 <= 1.0        # kaiming uniform, a = sqrt(5): 1 / sqrt(in)
    model(some_ids()).logsumexp(-1).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


@torch.no_grad()
def test_merge_and_unmerge(base, model, tmp_path):
    wanted, weight = model(some_ids()), model.model.layers[0].self_attn.q_proj.weight.clone()
    lora.merge(model)
    once = model.model.layers[0].self_attn.q_proj.weight.clone()
    assert torch.equal(lora.merge(model).model.layers[0].self_attn.q_proj.weight, once)
    assert not torch.equal(once, weight)
    check("merged", model(some_ids()), wanted)
    model.save_pretrained(tmp_path / "plain")     # merged in, adapters left out: an ordinary LLaMA
    check("merged, saved", Llama.from_pretrained(tmp_path / "plain")(some_ids()), wanted)
    lora.save(model, tmp_path / "adapters")       # the adapters are still there to save
    again = lora.load(Llama.from_pretrained(base), tmp_path / "adapters")
    assert torch.equal(again(some_ids()), wanted)
    with pytest.raises(ValueError, match="is merged; call lora.unmerge"):
        lora.load(model, tmp_path / "adapters")
    lora.unmerge(lora.unmerge(model))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)
    assert torch.equal(model(some_ids()), wanted)


@torch.no_grad()
def test_merged_for_good_there_is_no_second_copy(model):
    wanted = model(some_ids())
    layers = lora.layers(lora.merge(model, reversible=False)).values()
    assert all(layer.merged and layer.unmerged_weight is None for layer in layers)
    check("merged", model(some_ids()), wanted)
    with pytest.raises(RuntimeError, match="q_proj was merged without a copy"):
        lora.unmerge(model)


def test_adapters_of_one_input_share_its_dropout(model):
    """What they get is the same as one by one, also where one of them is merged or has no adapter;
    with dropout all of them miss the same numbers."""
    attention = model.model.layers[0].self_attn
    bare = torch.nn.Linear(48, 7)
    linears, x = [attention.q_proj, attention.k_proj, bare], torch.randn(2, 5, 48)
    alone = [linear(x) for linear in linears]
    for got, wanted in zip(fast.apply_all(x, *linears), alone, strict=True):
        check("together", got, wanted)
    lora.merge(attention.k_proj)
    for got, wanted in zip(fast.apply_all(x, *linears), alone, strict=True):
        check("one merged", got, wanted)
    lora.unmerge(attention.k_proj)
    twins = [attention.q_proj, attention.q_proj]
    twins[0].config = dataclasses.replace(OURS, dropout=0.5)
    model.train()
    inner = fast.stacked_down(torch.ones(1, 48), twins)
    assert torch.equal(inner[0], inner[1])
    assert not torch.allclose(inner[0], fast.stacked_down(torch.ones(1, 48), twins)[0])


def test_a_merged_adapter_does_not_train_silently(model):
    with pytest.raises(RuntimeError, match="lora.unmerge"):
        lora.merge(model).train()(some_ids())


@torch.no_grad()
def test_bf16_base(base, model):
    wanted = model(some_ids())
    half = shaken(lora.inject(Llama.from_pretrained(base, dtype=torch.bfloat16), OURS))
    layer = half.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.weight.dtype == torch.float32
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    update = x.float() @ layer.lora_A.weight.T @ layer.lora_B.weight.T * 1.5      # alpha/r = 6/4
    exact = torch.nn.functional.linear(x, layer.weight) + update.bfloat16()
    assert torch.equal(layer(x), exact), "the update is computed in fp32, rounded once"
    check("bf16 base", half(some_ids()), wanted, 1.0, 2e-2)
    before = layer.weight.clone()
    lora.merge(half)
    check("bf16 base, merged", half(some_ids()), wanted, 1.0, 2e-2)
    assert torch.equal(lora.unmerge(half).model.layers[0].self_attn.q_proj.weight, before)


def test_autocast_trains_fp32_adapters(model):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(some_ids())
    logits.float().logsumexp(-1).sum().backward()
    for name, parameter in lora.adapter_tensors(model).items():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_dropout_only_in_training(base):
    model = shaken(lora.inject(Llama.from_pretrained(base), LoraConfig(r=4, alpha=6, dropout=0.5)))
    same = shaken(lora.inject(Llama.from_pretrained(base), OURS))
    assert torch.equal(model(some_ids()), same(some_ids())), "eval: no dropout"
    model.train(), same.train()
    assert torch.equal(same(some_ids()), same(some_ids()))
    assert not torch.equal(model(some_ids()), model(some_ids()))
    layer, x = model.model.layers[0].self_attn.q_proj, torch.ones(200, 48)
    base_part = torch.nn.functional.linear(x, layer.weight)
    mean = (layer(x) - base_part).mean(0)
    wanted = same.model.layers[0].self_attn.q_proj(x)[0] - base_part[0]
    assert (mean - wanted).norm() < 0.25 * wanted.norm(), "scaled by 1 / (1 - p), base untouched"


def test_inject_keeps_train_mode_and_dotted_targets(base):
    model = Llama.from_pretrained(base).train()
    lora.inject(model, LoraConfig(r=2, target_modules=("self_attn.q_proj", "down_proj")))
    assert all(layer.training for layer in lora.layers(model).values())
    assert {name.rpartition(".")[2] for name in lora.layers(model)} == {"q_proj", "down_proj"}


def test_inject_errors(base):
    model = Llama.from_pretrained(base)
    with pytest.raises(ValueError, match=r"\['query'\]; choose target_modules among \['down_proj'.*"
                                         r"'v_proj'\]"):
        lora.inject(model, LoraConfig(target_modules=("q_proj", "query")))
    assert not lora.layers(model) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="holds no adapters"):
        lora.save(model, "/nowhere")
    lora.inject(model, OURS)
    with pytest.raises(ValueError, match="already holds 12 adapters"):
        lora.inject(model, OURS)


@pytest.mark.parametrize("change, reason", [
    ({"use_rslora": True}, "sqrt"), ({"use_dora": True}, "length"), ({"bias": "all"}, "biases"),
    ({"bias": "lora_only"}, "biases"), ({"rank_pattern": {"q_proj": 8}}, "another r"),
    ({"alpha_pattern": {"q_proj": 8}}, "another alpha"), ({"peft_type": "IA3"}, "another method"),
    ({"modules_to_save": ["lm_head"]}, "replaced"), ({"lora_bias": True}, "bias"),
    ({"target_modules": "all-linear"}, "list of"), ({"target_modules": ".*q_proj"}, "list of"),
    ({"target_modules": []}, "list of"), ({"target_modules": [1]}, "list of"),
    ({"init_lora_weights": "pissa"}, "base's weights"), ({"init_lora_weights": "olora"}, "base's"),
    ({"init_lora_weights": "pissa_niter_4"}, "base's"), ({"init_lora_weights": "corda"}, "base's"),
    ({"init_lora_weights": "loftq"}, "base's"), ({"init_lora_weights": "lora_ga"}, "base's"),
    ({"init_lora_weights": "OLoRA"}, "base's"), ({"init_lora_weights": ["x"]}, "base's"),
    ({"alora_invocation_tokens": [5, 6]}, "behind certain tokens"),
    ({"layers_to_transform": 0}, "some layers"), ({"layer_replication": [[0, 2]]}, "repeated"),
    ({"exclude_modules": "x"}, "left out"), ({"target_parameters": ["x"]}, "outside linear"),
    ({"trainable_token_indices": [1]}, "embeddings"), ({"ensure_weight_tying": True}, "tied"),
    ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"), ({"kasa_config": {"beta": 1.0}}, "changes"),
    ({"megatron_config": {"a": 1}}, "Megatron"), ({"fan_in_fan_out": True}, "transposed"),
    ({"use_new_trick": True}, "not known"), ({"new_gain": 0.5}, "not known"),
    ({"new_gain": 0}, "not known"), ({"new_config": {"k": None}}, "not known")])
def test_unsupported_adapter_configs(base, model, tmp_path, change, reason):
    lora.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=(
            rf"adapter_config.json: unsupported .*{list(change)[0]} .*{reason}")):
        lora.load(lora.inject(Llama.from_pretrained(base), OURS), tmp_path)


def test_every_setting_of_pefts_is_judged():
    """A field of the installed peft that is neither read, known to be harmless, nor refused would
    only be refused as unknown."""
    import peft
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert not theirs - lora.HARMLESS - lora.READ - lora.UNSUPPORTED.keys()
    assert not lora.HARMLESS & lora.UNSUPPORTED.keys()


@pytest.mark.parametrize("change, message", [
    ({"r": 0}, "r is 0"), ({"r": "4"}, "r is '4'"), ({"r": None}, "no r"), ({"r": 1e9}, "r is 1"),
    ({"lora_alpha": None}, "no lora_alpha"), ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"), ({"r": 5}, r"r is 5 .*\[4, 48\]")])
def test_adapter_configs_with_absurd_numbers(base, model, tmp_path, change, message):
    lora.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        lora.load(Llama.from_pretrained(base), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("settings", [
    {"init_lora_weights": False}, {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"loftq_config": {"loftq_bits": 8}, "layers_pattern": "layers", "qalora_group_size": 8,
     "inference_mode": True, "revision": "main", "megatron_core": "other"},
    {"lora_alpha": 2.5, "target_modules": ["self_attn.q_proj", "down_proj"]}],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in list(s.items())[:1]))
def test_harmless_settings_compute_what_peft_computes(base, tmp_path, settings):
    import peft
    from transformers import LlamaForCausalLM
    config = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["v_proj"]}
    pattern = settings.pop("layers_pattern", None)       # peft wants layers_to_transform beside it
    oracle = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base),
                                 peft.LoraConfig(**config | settings)).eval()
    randomise(torch.nn.ParameterDict({n.replace(".", "/"): p for n, p in oracle.named_parameters()
                                      if "lora_" in n}))
    oracle.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers_pattern": pattern}))
    ours = lora.load(Llama.from_pretrained(base), tmp_path)
    plain = Llama.from_pretrained(base)(some_ids())
    wanted = oracle(some_ids()).logits
    check("logits", ours(some_ids()), wanted)
    assert (plain - wanted).abs().max() > 1e-2


@torch.no_grad()
def test_lm_head_of_a_tied_llama(tmp_path):
    """The head is untied, so that a merge leaves the embeddings as they are: as in peft, whose
    merge_and_unload clones the tied weight, and as before the merge."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM
    base = randomise(LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=70, num_hidden_layers=2,
        num_attention_heads=6, tie_word_embeddings=True)))
    base.save_pretrained(tmp_path / "base")
    oracle = peft.get_peft_model(base, peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])).eval()
    randomise(torch.nn.ParameterDict({n.replace(".", "/"): p for n, p in oracle.named_parameters()
                                      if "lora_" in n}))
    oracle.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    wanted = oracle(some_ids()).logits
    ours = lora.load(Llama.from_pretrained(tmp_path / "base"), tmp_path / "lora")
    embeddings = ours.model.embed_tokens.weight.clone()
    check("tied, adapted", ours(some_ids()), wanted)
    check("tied, merged", lora.merge(ours)(some_ids()), wanted)
    assert torch.equal(ours.model.embed_tokens.weight, embeddings)
    ours.save_pretrained(tmp_path / "merged")
    assert not json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"]
    check("saved", Llama.from_pretrained(tmp_path / "merged")(some_ids()), wanted)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    check("saved, in transformers", theirs(some_ids()).logits, wanted)
    check("unmerged", lora.unmerge(ours)(some_ids()), wanted)
    with pytest.raises(ValueError, match=r"no nn.Linear named \['embed_tokens'\]"):
        lora.inject(Llama.from_pretrained(tmp_path / "base"),
                    LoraConfig(r=4, target_modules=("embed_tokens", "lm_head")))


@pytest.mark.parametrize("value, message", [
    (float("nan"), "holds NaN or infinity"), (float("-inf"), "holds NaN or infinity"),
    (torch.int32, "wrong dtype: .*lora_A"), (torch.float8_e4m3fn, "wrong dtype: .*lora_A"),
    (torch.bool, "wrong dtype: .*lora_A")])
def test_adapters_of_unusable_numbers(base, model, tmp_path, value, message):
    lora.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    if isinstance(value, float):
        tensors[name][1, 2] = value
    else:
        tensors[name] = tensors[name].to(value)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"adapter_model.safetensors: .*{message}"):
        lora.load(Llama.from_pretrained(base), tmp_path)


def test_load_is_strict_both_ways(base, model, tmp_path):
    lora.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    first, second, *_ = sorted(tensors)
    tensors["base_model.model.extra.lora_A.weight"] = tensors.pop(first)
    tensors[second] = torch.zeros(2, 2)
    save_file(tensors, path)
    target = Llama.from_pretrained(base)
    with pytest.raises(ValueError, match=rf"missing: {first} \(1\); unknown: .*extra.lora_A.weight "
                                         rf"\(1\); wrong shape: {second} \(1\)"):
        lora.load(target, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors: missing"):
        lora.load(target, tmp_path)


def test_load_refuses_another_scale(base, model, tmp_path):
    lora.save(model, tmp_path)
    other = lora.inject(Llama.from_pretrained(base), LoraConfig(r=4, alpha=8))
    with pytest.raises(ValueError, match="alpha 6, but .*alpha 8"):
        lora.load(other, tmp_path)
