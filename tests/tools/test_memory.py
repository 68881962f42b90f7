"""Full size without weights: counts, the memory plan, and --random-init."""

import dataclasses
import re
import shutil
import time

import pytest
import torch

import data
import demo
import favor
import train
from baselines.systems import SYSTEMS
from favor import Favor, preset
from llama import Llama
from runtime import hub
from tools import memory as sizes


def counts(text):
    """{part: (parameters, trained)} of a printed table."""
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \|", text, re.MULTILINE)
    return {name.strip("*"): tuple(int(n.replace(",", "")) for n in numbers)
            for name, *numbers in rows}


@pytest.mark.parametrize(("name", "llm", "lora", "projection", "hub"), [
    ("7b", 6_738_415_616, 71_565_312, 3_149_824, 7_913_726_720),
    ("13b", 13_015_864_320, 112_066_560, 3_937_280, 14_192_093_952)])
def test_dry_run_counts_what_is_published(name, llm, lora, projection, hub, capsys):
    """Parameters to the last one; InstructBLIP's parts and 64 made-up rows are the Hub's count."""
    started = time.time()
    train.dry_run(train.TrainConfig(model=name, clip_seconds=10, micro_batch=2))
    assert time.time() - started < 30
    text = capsys.readouterr().out
    found = counts(text)
    assert found["Whisper encoder"] == (636_784_640, 0)
    assert found["ViT"] == (985_952_256, 0) and found["visual Q-Former"] == (185_684_736, 0)
    assert found["LLM"] == (llm, 0) and found["LoRA"] == (lora, lora)
    assert found["causal Q-Former"] == (46_476_288,) * 2          # 40,157,184 + positions, queries
    assert found["audio projection"] == (983_808,) * 2
    assert found["LLM projection"] == (projection,) * 2
    width = {"7b": 4096, "13b": 5120}[name]
    assert (found["ViT"][0] + found["visual Q-Former"][0] + llm + projection
            + 2 * 64 * width) == hub
    assert "2 clips of 10 s" in text and "bfloat16" in text and "micro-tokens" not in text


@pytest.mark.parametrize(("name", "whisper", "llm", "lora"), [
    ("small", 88_154_112, 361_821_120, 15_400_960),
    ("small-laptop", 20_590_592, 134_515_008, 8_663_040)])
def test_dry_run_of_the_small_presets(name, whisper, llm, lora, capsys):
    """The Hub's counts of whole files, SigLIP 2's without its pooling head (7,087,104)."""
    train.dry_run(train.TrainConfig(model=name, clip_seconds=10, micro_batch=2))
    text = capsys.readouterr().out
    found = counts(text)
    assert found["Whisper encoder"] == (whisper, 0) and found["LLM"] == (llm, 0)
    assert found["ViT"] == (92_884_224 - 7_087_104, 0) and "visual Q-Former" not in found
    assert found["LoRA"] == (lora, lora)
    assert found["causal Q-Former"] == (46_476_288 - (4096 - 512) * 1536,) * 2
    assert "| ViT, 64 frames at a time |" in text and "float32" in text
    train.dry_run(train.TrainConfig(model=name, clip_seconds=30))       # 6 windows of 32, and text
    assert re.search(r"7 of them at a time \(--micro-tokens 2048\)", capsys.readouterr().out)


@pytest.mark.parametrize("source, n", [
    ("google/siglip-base-patch16-224", 85_797_120), ("facebook/dinov2-small", 22_056_576 - 384)])
def test_other_visual_encoders(source, n):
    """DINOv2 without the token of its masked training."""
    visual = sizes.random_part(sizes.GridEncoder, source, device="meta", grid=7)
    assert sum(p.numel() for p in visual.parameters()) == n and visual.n_queries == 49
    assert {p.device.type for p in visual.parameters()} == {"meta"}


def test_official_lora_is_the_papers_share(capsys):
    """0.4 % of the LLM (Sec. 4.2)."""
    train.dry_run(train.TrainConfig(model="13b", variant="official", micro_batch=1))
    found = counts(capsys.readouterr().out)
    assert found["LoRA"][0] == 52_428_800
    assert found["LoRA"][0] / found["LLM"][0] == pytest.approx(0.004, abs=1e-4)


def test_dry_run_of_the_baseline(capsys):
    train.dry_run(train.TrainConfig(model="7b", system="instructblip", micro_batch=1))
    found = counts(capsys.readouterr().out)
    assert found["language projection"] == (3_149_824,) * 2 and "Whisper encoder" not in found


def planned(model, seconds, batch, **how):
    text = sizes.memory_plan(model, sizes.empty_sample(model, seconds), batch, **how)
    return {name: float(step) for name, step in re.findall(
        r"^\| \**(.+?)\** \| ([\d.]+)", text, re.MULTILINE)}


def test_plan_is_what_autograd_keeps():
    """LLM and aligner of the plan against the tensors that a real step keeps, in fp32; wide enough
    that what a small LoRA adds does not count."""
    config = dataclasses.replace(preset("tiny"), lora_r=1, lora_alpha=1)
    model = Favor.from_config(config, load=sizes.random_part).train()
    clip = favor.Features(*(torch.randn(x.shape) for x in model.empty_features(10)))
    sample = favor.Sample("What happens after the beep?", "x " * 30, features=clip)
    real = sizes.kept_by_autograd(model, lambda: model([sample] * 4)["loss"])
    plan = planned(Favor.from_config(config, device="meta", load=sizes.random_part), 10, 4)
    parts = [plan[name] for name in plan if name.startswith(("LLM", "aligner", "logits"))]
    print(f"plan {sum(parts):.3f} GiB, kept {real / sizes.GIB:.3f} GiB")
    assert sum(parts) * sizes.GIB == pytest.approx(real, rel=0.2)


def test_plan_grows_with_clip_and_batch():
    model = Favor.from_config(preset("7b"), torch.bfloat16, "meta", load=sizes.random_part)
    short, long, many = planned(model, 10, 1), planned(model, 120, 1), planned(model, 10, 8)
    assert short["weights"] == long["weights"] == pytest.approx(16.37, abs=0.05)
    assert short["all"] < long["all"] and short["all"] < many["all"]
    assert many["aligner"] == pytest.approx(8 * short["aligner"], rel=0.1)


def test_plan_with_recompute_and_shards(capsys):
    """Of 32 layers one is held whole, of the others their inputs; of 8 shards each device has one,
    of what is spread, and Whisper, ViT and Q-Former whole."""
    model = Favor.from_config(preset("7b"), torch.bfloat16, "meta", load=sizes.random_part)
    plain, again = planned(model, 30, 8), planned(model, 30, 8, recompute=True)
    llm = next(name for name in plain if name.startswith("LLM"))
    length = int(re.search(r"\d+", llm)[0])
    inputs = 8 * length * 32 * 4096 * 2 / sizes.GIB
    assert again[llm] == pytest.approx(plain[llm] / 32 + inputs, rel=0.01)
    assert {name for name in plain if plain[name] != again[name]} == {llm, "all"}
    shards = planned(model, 30, 8, shards=8)
    frozen = sum(p.numel() * p.element_size() for part in (model.whisper, model.visual)
                 for p in part.parameters()) / sizes.GIB
    assert 8 * (shards["weights, 1 of 8 shards"] - frozen) == pytest.approx(
        plain["weights"] - frozen, abs=0.1)             # three digits are printed
    assert shards["all"] < plain["all"] - 7
    train.dry_run(train.TrainConfig(model="7b", micro_batch=2, shard=True, processes=4,
                                    recompute=True))
    printed = capsys.readouterr().out
    assert "--recompute, --shard over 4 (--processes):" in printed
    assert "weights, 1 of 4 shards" in printed


# ---- --random-init ------------------------------------------------------------------------------

def test_random_part_fills_everything_and_is_frozen():
    part = sizes.random_part(Llama, "miniature/weights/llama", torch.bfloat16)
    for name, p in part.named_parameters():
        assert p.dtype == torch.bfloat16 and not p.requires_grad and p.isfinite().all()
        assert (p == 1).all() if "norm" in name else 0.015 < p.float().std() < 0.025, name


def test_repo_of_unknown_size_is_named():
    with pytest.raises(ValueError, match="someone/model: its sizes are not known.*instructblip-vi"):
        sizes.random_part(Llama, "someone/model")


def test_a_folder_with_nothing_but_its_sizes(tmp_path):
    """--random-init --llm FOLDER: config.json is enough, the miniature's tokenizer stands in."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 900, "hidden_size": 32, "intermediate_size": 40, '
        '"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}')
    model = Favor.from_config(preset("tiny", llm=str(tmp_path)), load=sizes.random_part)
    assert model.llm.config.kv_heads == 2 and model.llm.config.vocab_size == 900
    assert model.llm_proj.out_features == 32 and isinstance(model.eval().answer(None, "?"), str)


def small_folders(root):
    """Folders with nothing but a small SigLIP's and a small SmolLM2's sizes."""
    for name, config in (
            ("siglip", {"model_type": "siglip", "vision_config": {
                "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 16, "image_size": 64, "patch_size": 8}}),
            ("llm", {"model_type": "llama", "vocab_size": 900, "hidden_size": 32,
                     "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "tie_word_embeddings": True})):
        (root / name).mkdir()
        hub.write_json(root / name / "config.json", config)
    return {"visual": str(root / "siglip"), "llm": str(root / "llm")}


def test_the_stand_in_speaks_chatml(tmp_path):
    """--random-init of a small preset: ids of ChatML's tokens that are in the vocabulary and end an
    answer.  A tokenizer of one's own without them is refused as ever."""
    small = preset("tiny", visual_grid=3, prompt="chatml", **small_folders(tmp_path))
    model = Favor.from_config(small, load=sizes.random_part).eval()
    before, after, _ = model.text_ids(favor.Sample("What?"), True)
    assert before[0] == 1 and after.count(2) == 1 and model.end_ids() == (2, 2)
    assert max(before + after) < model.tokenizer.vocab_size < 900
    clip = data.Clip(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.zeros(16000))
    with torch.no_grad():
        assert len(model.generate([favor.Sample("What?", clip=clip)], max_new_tokens=5)) == 1
        model.llm.lm_head.weight.zero_()
        said = []
        model.llm.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(
            torch.tensor(2), 900).float())
        assert model.answer(clip, "What?", stream=said.append) == "" and "".join(said) == ""
    shutil.copy(hub.local_source(preset("tiny").llm) / "tokenizer.model", tmp_path / "llm")
    with pytest.raises(ValueError, match="tokenizer has no token <.im_.*>, which prompt=chatml"):
        Favor.from_config(small, load=sizes.random_part)


@pytest.mark.parametrize("system", ["favor", "instructblip"])
def test_random_models_answer(system):
    kind = SYSTEMS[system]
    model = kind.from_config(preset("tiny", max_new_tokens=4), torch.bfloat16,
                             load=sizes.random_part)
    clip = data.Clip(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(16000))
    assert isinstance(model.eval().answer(clip, "What?"), str)
    assert next(model.llm.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.trained_parameters())


def test_demo_with_random_weights(tmp_path, capsys):
    from runtime.media import write_wav
    write_wav(tmp_path / "a.wav", torch.zeros(8000))
    demo.main([str(tmp_path / "a.wav"), "What?", "--random-init", "--max-new-tokens", "3"])
    assert "random weights: 0 frames, 0.50 s of sound" in capsys.readouterr().err


def test_training_with_random_weights(small_miniature, tmp_path):
    train.main(train.TrainConfig(data=str(small_miniature), out=str(tmp_path / "run"), steps=2,
                                 batch=2, random_init=True, test=False, val_share=0.0,
                                 dtype="bfloat16", cache_features=False, workers=0), [])
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
