"""Pickles into safetensors: names and numbers, interrupted conversions, refused files."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from parity import randomise
from safetensors.torch import load_file

from llama import Llama, LlamaConfig
from runtime import hub
from tools import convert


def equal(ours, theirs):
    theirs = theirs.state_dict()
    return set(theirs) == set(ours.state_dict()) and all(
        torch.equal(t, theirs[n]) for n, t in ours.state_dict().items())


@pytest.fixture
def vicuna(tmp_path):
    """(LLM, folder with its two .bin files as transformers 4.31 wrote them)."""
    llm = randomise(Llama(LlamaConfig(vocab_size=20, width=8, layers=3, heads=2, kv_heads=2,
                                      ffn=12)))
    tensors = llm.state_dict() | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)}
    names, root = list(tensors), tmp_path / "bin"
    root.mkdir()
    places = {}
    for i, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{i:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, root / file)
        places |= dict.fromkeys(part, file)
    hub.write_json(root / convert.BIN_INDEX, {"metadata": {}, "weight_map": places})
    hub.write_json(root / "config.json", llm.config.to_dict())
    (root / "tokenizer.model").write_text("pieces")
    (root / "README.md").touch()
    return llm, root


def test_convert(vicuna, tmp_path, capsys):
    llm, source = vicuna
    with pytest.raises(FileNotFoundError, match="tools.convert"):
        Llama.from_pretrained(source)
    convert.main([str(source), str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "pytorch_model-00002-of-00002.bin -> model-00002-of-00002.safetensors: " in shown
    assert "--llm" in shown
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        hub.INDEX, "tokenizer.model"]
    assert equal(Llama.from_pretrained(tmp_path / "out"), llm)
    assert set(hub.open_tensors(tmp_path / "out")) == set(llm.state_dict())     # no inv_freq
    from transformers import LlamaForCausalLM
    oracle = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(oracle.model.norm.weight, llm.model.norm.weight)
    convert.main([str(source), str(tmp_path / "half"), "--dtype", "float16"])
    assert {t.dtype for t in hub.open_tensors(tmp_path / "half").values()} == {torch.float16}
    with pytest.raises(SystemExit, match="out: holds .*already; name another folder"):
        convert.main([str(source), str(tmp_path / "out")])


def test_convert_in_place_one_old_file_with_tied_tensors(tmp_path):
    llm = randomise(Llama(LlamaConfig(vocab_size=20, width=8, layers=1, heads=2, kv_heads=2, ffn=12,
                                      tie_embeddings=True)))
    torch.save(llm.state_dict(), tmp_path / hub.BIN_SINGLE, _use_new_zipfile_serialization=False)
    hub.write_json(tmp_path / "config.json", llm.config.to_dict())
    convert.convert(tmp_path, tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / hub.SINGLE)
    assert equal(Llama.from_pretrained(tmp_path), llm)
    with pytest.raises(FileExistsError, match="name another folder"):
        convert.convert(tmp_path, tmp_path)


def test_convert_cut_off_starts_again(vicuna, tmp_path):
    llm, source = vicuna
    second = source / "pytorch_model-00002-of-00002.bin"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="00002.bin: truncated or no file of torch's"):
        convert.convert(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no"):
        hub.open_tensors(tmp_path / "out")
    second.write_bytes(whole)
    (tmp_path / "out" / ".99.model-00001-of-00002.safetensors").write_text("of a killed one")
    convert.convert(source, tmp_path / "out")
    assert equal(Llama.from_pretrained(tmp_path / "out"), llm)
    assert not list((tmp_path / "out").glob(".*"))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-never-be-made",)


def test_pickles_that_are_refused(vicuna, tmp_path):
    _, source = vicuna
    second, out = source / "pytorch_model-00002-of-00002.bin", tmp_path / "out"
    page = b"<html>Sign in"
    for value, message in [
            ({"a": Malicious()}, "no plain pickle of tensors, and not run .*mkdir"),
            ({"a": torch.ones(1), "steps": 3}, r"holds steps \(1\); wanted {name: tensor}"),
            ([torch.ones(1)], "holds list; wanted"), (page, "a web page"), (b"", "empty"),
            ({"a": torch.ones(1)}, r"lacks lm_head.weight, .*download it again"),
            (None, "listed in pytorch_model.bin.index.json but missing")]:
        second.unlink()
        if isinstance(value, bytes):
            second.write_bytes(value)
        elif value is not None:
            torch.save(value, second)
        with pytest.raises((ValueError, FileNotFoundError), match=f"00002-of-00002.bin: {message}"):
            convert.convert(source, out)
    second.write_bytes(pickle.dumps({"a": Malicious()}, protocol=2))
    with pytest.raises(ValueError, match="no plain pickle of tensors, and not run"):
        convert.convert(source, out)
    assert not Path("/tmp/this-must-never-be-made").exists()
    assert not list(out.glob("*.safetensors")) and not (out / hub.INDEX).exists()
    with pytest.raises(FileNotFoundError, match="no pytorch_model.bin and no"):
        convert.convert(tmp_path / "nothing", out)


@pytest.mark.parametrize("value, dtype, message", [
    (float("nan"), None, "NaN or infinity in lm_head.weight"),
    (float("inf"), "float16", "NaN or infinity in lm_head.weight"),
    (1e6, "float16", "numbers too large for torch.float16"), (1e6, "bfloat16", "")])
def test_numbers_that_are_not_finite_are_not_converted(vicuna, tmp_path, value, dtype, message):
    _, source = vicuna
    second = source / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(second)
    tensors["lm_head.weight"][3, 4] = value
    torch.save(tensors, second)
    dtype = dtype and getattr(torch, dtype)
    if not message:                                       # bfloat16 holds a million
        convert.convert(source, tmp_path / "out", dtype)
        assert list((tmp_path / "out").glob("*.safetensors"))
        return
    with pytest.raises(ValueError, match=f"00002-of-00002.bin: .*{message}"):
        convert.convert(source, tmp_path / "out", dtype)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_pipe_under_the_name_of_weights(vicuna, tmp_path):
    second = vicuna[1] / "pytorch_model-00002-of-00002.bin"
    second.unlink()
    os.mkfifo(second)
    with pytest.raises(ValueError, match="00002.bin: a folder, pipe or device"):
        convert.convert(vicuna[1], tmp_path / "out")


def test_convert_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        convert.main(["--help"])
    shown = capsys.readouterr().out
    for part in ("BIN_FOLDER", "OUT_FOLDER", "--dtype", "hf download lmsys/vicuna-7b-v1.5"):
        assert part in shown
