"""Weights on disk: which files of a repo are fetched, what is said when they cannot be, the memory
that reading takes, and the errors of files that are not what they should be.  The Hub is a local
folder here, from which huggingface_hub's functions, replaced, copy."""

import errno
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from parity import randomise
from safetensors.torch import load_file, save_file
from torch import nn

from llama import Llama, LlamaConfig
from runtime import hub
from vit_qformer import QFormerConfig, QFormerTokenizer, VisualEncoder, ViTConfig
from whisper_enc import WhisperConfig, WhisperEncoder

ROOT = Path(hub.__file__).parent.parent
LLM = ("language_model.", "model.", "lm_head.")


def save_shards(root, shards, config=None, **index_changes):
    """{shard: {name: tensor}} written by the safetensors library, and the index."""
    root.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        save_file(tensors, root / shard, metadata={"format": "pt"})
    places = {name: shard for shard, tensors in shards.items() for name in tensors} | index_changes
    size = sum(t.nbytes for tensors in shards.values() for t in tensors.values())
    hub.write_json(root / hub.INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    hub.write_json(root / "config.json", config or {})


def in_shards(tensors, n):
    """The tensors in their order -> {shard: tensors}, n of about one size."""
    names = list(tensors)
    return {hub.shard_name(i + 1, n): {name: tensors[name].contiguous() for name in part}
            for i in range(n) for part in [names[i * len(names) // n:(i + 1) * len(names) // n]]}


# ---- models with the published names ------------------------------------------------------------

def tiny_instructblip():
    """(encoder, LLM, {published name: tensor}, config.json): layers as many as published."""
    encoder = randomise(VisualEncoder(
        ViTConfig(width=8, heads=2, ffn=12, image_size=28),
        QFormerConfig(width=8, heads=2, ffn=12, vocab_size=11, max_positions=16, encoder_width=8),
        4))
    llm = randomise(Llama(LlamaConfig(vocab_size=20, width=8, heads=2, kv_heads=2, ffn=12)))
    tensors = {name.replace("vit.", "vision_model.", 1) if name.startswith("vit.") else name: t
               for name, t in encoder.state_dict().items()}
    tensors |= {"language_projection.weight": torch.zeros(8, 8),
                "language_projection.bias": torch.zeros(8)}
    tensors |= {f"language_model.{name}": torch.cat([t, torch.ones(3, 8)]) if len(t) == 20 else t
                for name, t in llm.state_dict().items()}           # 3 rows of padding
    vit, qformer, text = encoder.vit, encoder.qformer.config, llm.config
    config = {
        "model_type": "instructblip", "num_query_tokens": 4,
        "vision_config": {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12,
                          "image_size": 28, "num_hidden_layers": len(vit.encoder.layers)},
        "qformer_config": {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12,
                           "vocab_size": 11, "max_position_embeddings": 16,
                           "encoder_hidden_size": 8, "num_hidden_layers": qformer.layers},
        "text_config": text.to_dict() | {"vocab_size": 23}}
    return encoder, llm, tensors, config


@pytest.fixture(scope="module")
def instructblip():
    return tiny_instructblip()


def equal(ours, theirs):
    theirs = theirs.state_dict()
    return set(theirs) == set(ours.state_dict()) and all(
        torch.equal(t, theirs[n]) for n, t in ours.state_dict().items())


def test_published_instructblip_names(instructblip, tmp_path):
    encoder, llm, tensors, config = instructblip
    assert len(tensors) == 1096                     # as in Salesforce/instructblip-vicuna-7b
    # transformers 4.30 also wrote this buffer of each layer
    tensors = tensors | {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq":
                         torch.zeros(2) for i in range(llm.config.layers)}
    save_shards(tmp_path, in_shards(tensors, 4), config)
    assert equal(VisualEncoder.from_pretrained(tmp_path), encoder)
    assert equal(Llama.from_pretrained(tmp_path, vocab_size=20), llm)
    save_shards(tmp_path, in_shards(tensors | {"qformer.extra": torch.zeros(1)}, 4), config)
    with pytest.raises(ValueError, match=r"unknown: qformer.extra \(1\)"):
        VisualEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("head", ["model.", ""])
def test_published_whisper_names(tmp_path, head):
    """With the decoder beside the encoder, of which large-v2 has 32 layers each."""
    encoder = randomise(WhisperEncoder(WhisperConfig(width=8, heads=2, ffn=12)))
    tensors = {f"{head}encoder.{name}": t for name, t in encoder.state_dict().items()}
    decoder = ["embed_tokens.weight", "embed_positions.weight", "layer_norm.weight",
               "layer_norm.bias"]
    for i in range(encoder.config.layers):
        decoder += [f"layers.{i}.{part}.{name}" for part in ("self_attn", "encoder_attn")
                    for name in ("k_proj.weight", "v_proj.weight", "v_proj.bias", "q_proj.weight",
                                 "q_proj.bias", "out_proj.weight", "out_proj.bias")]
        decoder += [f"layers.{i}.{part}.{kind}" for kind in ("weight", "bias") for part in (
            "self_attn_layer_norm", "encoder_attn_layer_norm", "fc1", "fc2", "final_layer_norm")]
    tensors |= {f"{head}decoder.{name}": torch.zeros(2) for name in decoder}
    assert len(tensors) == 1259                     # as in openai/whisper-large-v2
    hub.save_folder(tmp_path, tensors | {"proj_out.weight": torch.zeros(2)}, {
        "d_model": 8, "encoder_attention_heads": 2, "encoder_ffn_dim": 12, "encoder_layers": 32})
    assert equal(WhisperEncoder.from_pretrained(tmp_path), encoder)


def test_only_shards_with_wanted_tensors_are_opened(instructblip, tmp_path):
    encoder, _, tensors, config = instructblip
    shards = in_shards(tensors, 6)
    save_shards(tmp_path, shards, config)
    for shard, held in shards.items():
        if all(name.startswith("language_") for name in held):
            (tmp_path / shard).unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) == 5
    assert equal(VisualEncoder.from_pretrained(tmp_path), encoder)
    with pytest.raises(FileNotFoundError, match="model-00006-of-00006.*download it again"):
        Llama.from_pretrained(tmp_path)


# ---- from the Hub -------------------------------------------------------------------------------

@pytest.fixture
def remote(tmp_path, monkeypatch):
    """remote.root/<owner>/<name>: the repos; remote.fetched: what was copied, in order.
    remote.fails: the exception that the network raises."""
    state = SimpleNamespace(root=tmp_path / "remote", cache=tmp_path / "cache", fetched=[],
                            fails=None)

    def snapshot_download(repo, allow_patterns, local_files_only):
        here, there = state.cache / repo / "main", state.root / repo
        if local_files_only or isinstance(state.fails, errors.LocalEntryNotFoundError):
            if not here.is_dir():
                raise errors.LocalEntryNotFoundError("nothing in the cache")
            return str(here)                       # partial, as older versions of the library do
        if state.fails:
            raise state.fails
        for file in sorted(f for f in there.rglob("*") if f.is_file()):
            name = file.relative_to(there).as_posix()
            copy = here / name
            if any(fnmatch(name, p) for p in allow_patterns) and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
                state.fetched.append(name)
        return str(here)

    def hf_hub_download(repo, name, local_files_only):
        if local_files_only or state.fails:
            raise errors.LocalEntryNotFoundError("not in the cache")
        raise errors.RemoteEntryNotFoundError("404", response=answer(404))

    def try_to_load_from_cache(repo, name):
        path = state.cache / repo / "main" / name
        return str(path) if path.exists() else None

    for function in (snapshot_download, hf_hub_download, try_to_load_from_cache):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(state.cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    return state


def answer(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


def published(remote, instructblip, repo="owner/blip"):
    """The repo with four shards and files that nobody here needs -> its folder."""
    _, _, tensors, config = instructblip
    save_shards(remote.root / repo, in_shards(tensors, 4), config)
    (remote.root / repo / "qformer_tokenizer").mkdir()
    for name in ("README.md", "pytorch_model.bin", "tokenizer.model", "qformer_tokenizer/vocab.txt",
                 "generation_config.json"):
        (remote.root / repo / name).write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    return remote.root / repo


def test_each_part_fetches_its_files_once(remote, instructblip):
    published(remote, instructblip)
    QFormerTokenizer.from_pretrained("owner/blip")
    assert remote.fetched == ["config.json", "qformer_tokenizer/vocab.txt"]
    remote.fetched.clear()
    VisualEncoder.from_pretrained("owner/blip")
    shards = [hub.shard_name(i, 4) for i in (1, 2, 3, 4)]
    assert remote.fetched == [hub.INDEX, *shards[:3]]
    remote.fetched.clear()
    assert equal(Llama.from_pretrained(hub.folder(
        "owner/blip", ("tokenizer.model", "tokenizer.json"), LLM), vocab_size=20), instructblip[1])
    assert remote.fetched == ["tokenizer.model", shards[3]]
    remote.fetched.clear()
    hub.folder("owner/blip", (), LLM)
    assert remote.fetched == []


def test_whisper_takes_the_single_file(remote):
    encoder = WhisperEncoder(WhisperConfig(width=8, layers=1, heads=2, ffn=12))
    repo = remote.root / "owner" / "ear"
    hub.save_folder(repo, {f"model.encoder.{n}": t for n, t in encoder.state_dict().items()}, {
        "d_model": 8, "encoder_attention_heads": 2, "encoder_ffn_dim": 12, "encoder_layers": 1})
    for name in ("tokenizer.json", "flax_model.msgpack", "tf_model.h5"):
        (repo / name).touch()
    assert equal(WhisperEncoder.from_pretrained("owner/ear"), encoder)
    assert remote.fetched == ["config.json", hub.SINGLE]       # and no preprocessor_config.json


def test_absent_with_size_and_what_to_do(remote, instructblip):
    """Offline, and without a network; nothing, or not all, in the cache."""
    down = errors.LocalEntryNotFoundError("no connection")
    remote.fails = down
    with pytest.raises(FileNotFoundError) as error:
        WhisperEncoder.from_pretrained("openai/whisper-large-v2")
    for part in ("openai/whisper-large-v2", "config.json", "model.safetensors (6.17 GB)",
                 str(remote.cache), "no network", "hf download openai/whisper-large-v2",
                 "local folder"):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"00001-of-00006.*\(4.93 GB\).*28.38 GB"):
        VisualEncoder.from_pretrained("Salesforce/instructblip-vicuna-13b")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors \(size unknown\)"):
        VisualEncoder.from_pretrained("owner/blip")
    remote.fails = None
    published(remote, instructblip)
    VisualEncoder.from_pretrained("owner/blip")
    for offline in (False, True):
        remote.fails = None if offline else down
        if offline:
            hub.offline(False)
            assert not hub.is_offline()
            hub.offline()
        VisualEncoder.from_pretrained("owner/blip")            # from the cache
        with pytest.raises(FileNotFoundError) as error:
            hub.folder("owner/blip", (), LLM)
        text = str(error.value)
        assert "model-00004-of-00004.safetensors (size unknown); all its shards: 0.00 GB" in text
        assert "00001" not in text and ("--offline" in text) == offline


@pytest.mark.parametrize("failure, kind, message", [
    (errors.GatedRepoError("gated", response=answer(403)), PermissionError,
     "owner/blip: .*403.*accept the terms.*hf auth login"),
    (errors.HfHubHTTPError("401", response=answer(401)), PermissionError, "401.*hf auth login"),
    (errors.RepositoryNotFoundError("404", response=answer(404)), FileNotFoundError,
     "owner/blip: no such folder here and no such repo"),
    (errors.HfHubHTTPError("503", response=answer(503)), FileNotFoundError, "Hub answers 503"),
    (ConnectionError("reset"), FileNotFoundError, r"no network.*\(ConnectionError\)"),
    (OSError(errno.ENOSPC, "No space left on device"), OSError,
     r"disk is full.*safetensors \(size unknown\).*GB free.*HF_HOME"),
    (RuntimeError("a bug"), RuntimeError, "^a bug$")])
def test_what_went_wrong_is_told_apart(remote, failure, kind, message):
    remote.fails = failure
    with pytest.raises(kind, match=message) as error:
        hub.folder("owner/blip")
    assert type(error.value) is kind


def test_repos_without_weights_or_with_odd_names(remote):
    repo = remote.root / "lmsys" / "vicuna"
    repo.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        (repo / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=(
            "has no model.safetensors;.*hf download lmsys/vicuna.*tools.convert")):
        hub.folder("lmsys/vicuna")
    for source in ("/nowhere", "./nowhere/x", "nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such folder; wanted a folder in the Hub's"):
            hub.folder(source)
    assert hub.folder(repo) == repo


def test_the_real_library_offline(tmp_path, monkeypatch, instructblip):
    """Its own cache layout and exceptions; conftest.py sets HF_HUB_OFFLINE."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--offline.*forbids"):
        hub.folder("owner/blip")
    with pytest.raises(FileNotFoundError, match="no such repo"):
        hub.folder("own er/blip")
    commit = "0" * 40
    root = tmp_path / "models--owner--blip"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    encoder, _, tensors, config = instructblip
    save_shards(root / "snapshots" / commit, in_shards(tensors, 4), config)
    (root / "snapshots" / commit / hub.shard_name(4, 4)).unlink()
    assert equal(VisualEncoder.from_pretrained("owner/blip"), encoder)
    with pytest.raises(FileNotFoundError, match=r"cache .*: model-00004-of-00004.*--offline"):
        hub.folder("owner/blip", (), LLM)


# ---- reading ------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from runtime import hub
from torch import nn
def kB(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if field in line)
torch.set_num_threads(1)
for dtype in (torch.bfloat16, torch.float32):
    shapes = eval(sys.argv[2])
    module = nn.ParameterDict({n: nn.Parameter(torch.ones(s, dtype=dtype)) for n, s in shapes})
    open("/proc/self/clear_refs", "w").write("5")              # forget the peak so far
    before = kB("VmRSS")
    hub.load_into(module, sys.argv[1])
    print((kB("VmHWM") - before) / 1024)
    assert all((p == 2).all() for p in module.values())
    del module
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="wants Linux's /proc")
def test_memory_above_the_model_is_one_tensor(tmp_path):
    """Three shards of 48 MB in fp16, tensors of at most 16 MB, also smaller ones in between."""
    shapes = [(f"p{i}", (n, 1024, 1024)) for i, n in enumerate([7, 1, 3, 5, 8] * 3)]
    tensors = {name: torch.full(shape, 2, dtype=torch.float16) for name, shape in shapes}
    save_shards(tmp_path, in_shards(tensors, 3))
    peaks = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), repr(shapes)], text=True,
                           cwd=ROOT, capture_output=True, check=True).stdout.split()
    print("MB above the model, bf16 and fp32:", *peaks)
    assert len(peaks) == 2 and all(float(peak) < 24 for peak in peaks)


def test_every_dtype_and_shape_arrives(tmp_path):
    module = nn.Module()
    module.scalar, module.empty = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(0, 3))
    module.cut = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
    module.rows = nn.Parameter(torch.zeros(2, 3))
    module.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    module.register_buffer("passing", torch.zeros(3), persistent=False)
    tensors = {"scalar": torch.tensor(1.5, dtype=torch.float64), "empty": torch.zeros(0, 3),
               "cut": torch.randn(3, 5), "rows": torch.randn(4, 3).half(),
               "count": torch.tensor([1, 2, 3], dtype=torch.int8)}
    hub.save_folder(tmp_path, tensors, {})
    stored = load_file(tmp_path / hub.SINGLE)             # the library reads what we wrote
    assert all(torch.equal(stored[n], t) and stored[n].dtype == t.dtype for n, t in tensors.items())
    hub.load_into(module, tmp_path, rows={"rows": 2})
    assert module.scalar == 1.5 and module.count.tolist() == [1, 2, 3]
    assert torch.equal(module.cut, tensors["cut"].bfloat16())
    assert torch.equal(module.rows, tensors["rows"][:2].float())
    read = {name: read() for name, read in hub.open_tensors(tmp_path).items()}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    hub.save_folder(tmp_path, tensors | {"count": torch.ones(3)}, {})
    with pytest.raises(ValueError, match="wrong dtype: count torch.float32, wanted torch.int64"):
        hub.load_into(module, tmp_path, rows={"rows": 2})


def test_tied_names_may_be_there_once_or_twice(tmp_path):
    module = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    module.b.weight = module.a.weight
    for names in (["a.weight"], ["b.weight"], ["a.weight", "b.weight"]):
        hub.save_folder(tmp_path, dict.fromkeys(names, torch.randn(3, 3)), {})
        hub.load_into(module, tmp_path)
        assert torch.equal(module.a.weight, hub.open_tensors(tmp_path)[names[0]]())


def test_long_lists_are_cut_and_nothing_is_copied(tmp_path):
    module = nn.ParameterDict({f"p{i:02}": nn.Parameter(torch.zeros(1)) for i in range(34)})
    hub.save_folder(tmp_path, {f"q{i}": torch.ones(1) for i in range(3)} | {"p33": torch.ones(1)},
                    {})
    with pytest.raises(ValueError) as error:
        hub.load_into(module, tmp_path)
    assert "p19 … (33); unknown: q0, q1, q2 (3)" in str(error.value)
    assert "p20" not in str(error.value) and module.p33 == 0


def broken(case, root):
    """A folder with one safetensors file of 80 bytes of numbers, damaged in one way."""
    path = root / hub.SINGLE
    hub.save_folder(root, {"a": torch.ones(20)}, {})
    whole = path.read_bytes()
    torch.save({"a": torch.ones(20)}, path, _use_new_zipfile_serialization=case != "old pickle")
    path.write_bytes({
        "truncated": whole[:-5], "only a header": whole[:30], "empty": b"", "longer": whole + b"x",
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4f\nsize 9\n",
        "page": b"<!DOCTYPE html><html><body>Sign in</body></html>", "noise": b"\1" * 90,
    }.get(case) or path.read_bytes() * ("pickle" in case))


@pytest.mark.parametrize("case, message", [
    ("truncated", "truncated or damaged.*download it again"),
    ("only a header", "truncated or damaged"), ("longer", "truncated or damaged"),
    ("empty", r"empty \(0 bytes\).*download it again"), ("noise", "truncated or damaged"),
    ("pointer", "a git-lfs pointer.*git lfs pull"), ("page", "a web page.*download it again"),
    ("pickle", r"a pickle under the name of safetensors.*pytorch_model.bin.*tools.convert"),
    ("old pickle", "a pickle under the name of safetensors")])
def test_what_is_no_safetensors_file_is_named(tmp_path, case, message):
    broken(case, tmp_path)
    with pytest.raises(ValueError, match=f"{hub.SINGLE}: {message}"):
        hub.load_into(nn.ParameterDict({"a": nn.Parameter(torch.ones(20))}), tmp_path)


def test_index_and_shards_that_do_not_fit(tmp_path):
    shards = {"one.safetensors": {"a": torch.ones(1)}, "two.safetensors": {"b": torch.ones(1)}}
    save_shards(tmp_path, shards, c="two.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors: lacks c \(1\) that model.*index.json"):
        hub.open_tensors(tmp_path)
    assert list(hub.open_tensors(tmp_path, lambda name: name == "a")) == ["a"]
    shards["two.safetensors"]["a"] = torch.ones(1)
    save_shards(tmp_path, shards, a="one.safetensors")
    with pytest.raises(ValueError, match=r"two.safetensors: a \(1\) also in another shard"):
        hub.open_tensors(tmp_path)
    for text, message in (("{}", "no weight_map"), ("[]", "no weight_map"), ("{", "not valid JSON"),
                          ("\0\xff", "not valid JSON")):
        (tmp_path / hub.INDEX).write_text(text, "latin-1")
        with pytest.raises(ValueError, match=f"{hub.INDEX}: {message}"):
            hub.open_tensors(tmp_path)
    (tmp_path / hub.INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no model.*index.json"):
        hub.open_tensors(tmp_path)
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(FileNotFoundError, match=f"python -m tools.convert {tmp_path} "):
        hub.open_tensors(tmp_path)


def test_saving_replaces_shards_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    save_shards(tmp_path, {"one.safetensors": {"a": torch.ones(1)}})
    hub.save_folder(tmp_path, {"a": torch.zeros(1)}, {})
    assert hub.open_tensors(tmp_path)["a"]() == 0
    monkeypatch.setattr(os, "replace", None)                   # killed before the last step
    with pytest.raises(TypeError):
        hub.save_folder(tmp_path, {"a": torch.ones(1)}, {})
    assert hub.open_tensors(tmp_path)["a"]() == 0
    with pytest.raises(KeyError, match="complex128"):
        hub.save_folder(tmp_path / "new", {"a": torch.ones(1), "b": torch.ones(1).cdouble()}, {})
    assert not list((tmp_path / "new").iterdir())
