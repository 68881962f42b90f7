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

from favor import Favor, preset
from llama import Llama, LlamaConfig, Tokenizer
from runtime import hub
from vit import GridEncoder
from vit import ViTConfig as GridConfig
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


@pytest.mark.parametrize("name", ["small", "small-laptop"])
def test_the_small_presets_parts_are_told_with_their_sizes(remote, name, monkeypatch):
    """Sizes as the Hub counts them; also where a part's tokenizer alone is wanted, which comes
    first."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config, gb = preset(name), {"small": ("0.97", "0.72"), "small-laptop": ("0.29", "0.27")}[name]
    for load, source, size in (
            (WhisperEncoder.from_pretrained, config.whisper, rf"model.safetensors \({gb[0]} GB\)"),
            (Llama.from_pretrained, config.llm, rf"model.safetensors \({gb[1]} GB\)"),
            (Favor.from_config, config.llm, f"tokenizer.model.*; model.safetensors: {gb[1]} GB"),
            (GridEncoder.from_pretrained, config.visual, "config.json.*; model.safe.*: 1.50 GB")):
        with pytest.raises(FileNotFoundError, match=f"^{source}: .*{size}.*--offline"):
            load(config if load == Favor.from_config else source)


def test_a_grid_encoder_fetches_what_it_reads(remote, instructblip):
    """Of SigLIP's repo the config, the processor and the weights, not the tokenizer of its text
    model; of another model's repo nothing but the config."""
    repo = remote.root / "owner" / "eye"
    vit = randomise(GridEncoder(GridConfig(width=8, layers=1, heads=2, ffn=12, image_size=32,
                                           trained_size=32), 2))
    named = {"patch_embedding.": "embeddings.patch_embedding.", "layers.": "encoder.layers.",
             "position_embedding": "embeddings.position_embedding.weight",
             "norm.": "post_layernorm."}
    tensors = {}
    for ours, tensor in vit.state_dict().items():
        start = next(start for start in named if ours.startswith(start))
        theirs = "vision_model." + ours.replace(start, named[start], 1)
        for old, new in ((".norm", ".layer_norm"), (".fc", ".mlp.fc")):
            theirs = theirs.replace(old, new)
        for part in ("q", "k", "v", "out"):
            theirs = theirs.replace(f".{part}_proj", f".self_attn.{part}_proj")
        tensors[theirs] = tensor
    hub.save_folder(repo, tensors | {"vision_model.head.probe": torch.zeros(2),
                                     "text_model.x": torch.zeros(2)}, {
        "model_type": "siglip", "vision_config": {
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 12, "image_size": 32}})
    for name in ("preprocessor_config.json", "tokenizer.json", "special_tokens_map.json"):
        hub.write_json(repo / name, {})
    assert equal(GridEncoder.from_pretrained("owner/eye", grid=2), vit)
    assert sorted(remote.fetched) == ["config.json", hub.SINGLE, "preprocessor_config.json"]
    published(remote, instructblip)
    remote.fetched.clear()
    with pytest.raises(ValueError, match="model_type is 'instructblip'.*--visual-grid 0"):
        GridEncoder.from_pretrained("owner/blip")
    assert remote.fetched == ["config.json"]


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


# ---- numbers that are none ----------------------------------------------------------------------

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    module = nn.ParameterDict({n: nn.Parameter(torch.zeros(3, 5)) for n in "abc"})
    tensors = {n: torch.ones(3, 5, dtype=dtype) for n in "abc"}
    tensors["b"][2, 4] = value
    hub.save_folder(tmp_path, tensors, {})
    with pytest.raises(ValueError, match=f"{hub.SINGLE}: b holds NaN or infinity"):
        hub.load_into(module, tmp_path)


@pytest.mark.parametrize("dtype, value, fits", [
    (torch.float16, 1e6, False), (torch.float16, -7e4, False), (torch.float16, 6e4, True),
    (torch.bfloat16, 1e6, True), (torch.bfloat16, 3.4e38, False), (torch.float32, 1e6, True)])
def test_weights_that_a_dtype_cannot_hold(tmp_path, dtype, value, fits):
    hub.save_folder(tmp_path, {"a": torch.tensor([1, value])}, {})
    module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, dtype=dtype))})
    if fits:
        assert hub.load_into(module, tmp_path).a[1].isfinite()
    else:
        with pytest.raises(ValueError, match=f"a holds numbers too large for {dtype}"):
            hub.load_into(module, tmp_path)


@pytest.mark.parametrize("place", [0, hub.BLOCK - 1, hub.BLOCK, -1])
def test_the_check_for_finite_numbers_sees_all_of_a_large_tensor(tmp_path, place):
    """Numbers whose sum overflows are finite; one that is not is found wherever it stands."""
    numbers = torch.full((2 * hub.BLOCK + 5,), 3e38)
    module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, hub.BLOCK + 2))})
    hub.save_folder(tmp_path, {"a": numbers[1:].view(2, -1)}, {})
    assert torch.equal(hub.load_into(module, tmp_path).a.flatten(), numbers[1:])
    numbers[1:][place] = float("nan")
    hub.save_folder(tmp_path, {"a": numbers[1:].view(2, -1)}, {})
    with pytest.raises(ValueError, match=f"{hub.SINGLE}: a holds NaN"):
        hub.load_into(module, tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool,
                                   torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_weights_of_another_kind_of_number_are_named(tmp_path, dtype):
    hub.save_folder(tmp_path, {"a": torch.ones(3).to(dtype)}, {})
    with pytest.raises(ValueError, match=f"wrong dtype: a {dtype}, wanted torch.float32"):
        hub.load_into(nn.ParameterDict({"a": nn.Parameter(torch.zeros(3))}), tmp_path)


def test_rows_that_are_not_read_may_hold_anything(tmp_path):
    padded = torch.cat([torch.ones(2, 3), torch.full((1, 3), float("nan"))])
    hub.save_folder(tmp_path, {"rows": padded, "other": padded}, {})
    module = nn.ParameterDict({"rows": nn.Parameter(torch.zeros(2, 3))})
    assert (hub.load_into(module, tmp_path, rows={"rows": 2}, only=("rows",)).rows == 1).all()


# ---- sources ------------------------------------------------------------------------------------

def test_a_source_means_the_same_in_every_folder(tmp_path, monkeypatch):
    """What the user names is a folder where there is one; what a checkpoint names is not."""
    for name in ("real/x", "owner/blip", "tiny/llama"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("real/x", "./real/x", "real/../real/x", str(tmp_path / "real" / "x")):
        assert hub.anywhere(name) == str(tmp_path / "real" / "x")
    assert hub.anywhere("tiny/llama") == str(tmp_path / "tiny" / "llama")
    assert hub.anywhere("owner/other") == "owner/other"
    ours = "miniature/weights/llama"
    assert hub.anywhere(ours) == hub.saved_source(ours) == ours
    assert hub.local_source(ours) == hub.local_source("tiny/llama") == hub.REPOSITORY / ours
    saved = hub.saved_source("owner/blip")
    assert hub.anywhere(saved) == saved and isinstance(hub.anywhere(saved), hub.Repo)
    assert isinstance(hub.local_source(saved), hub.Repo) and hub.local_folder(saved) is None
    assert hub.local_folder("tiny/llama") == hub.REPOSITORY / ours
    assert hub.local_folder("./real/x") == Path("real/x") and hub.local_folder("owner/no") is None
    for path in (str(tmp_path), "./real/x", "~/x", "a/b/c"):
        assert hub.saved_source(path) == path and not isinstance(hub.saved_source(path), hub.Repo)
    (tmp_path / "real/model.gguf").touch()
    for name in ("real/model.gguf", str(tmp_path / "real/model.gguf")):
        with pytest.raises(FileNotFoundError, match="model.gguf: no folder; wanted the folder"):
            hub.folder(name)


def test_a_checkpoints_repo_is_no_folder_of_that_name(remote, instructblip, tmp_path, monkeypatch):
    published(remote, instructblip)
    (tmp_path / "owner/blip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.folder("owner/blip") == Path("owner/blip")               # on the command line
    found = hub.folder(hub.saved_source("owner/blip"), (), LLM)         # in a favor.json
    assert found == remote.cache / "owner/blip/main"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "owner/other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"does not mean the folder .*\./owner/other"):
        hub.folder(hub.saved_source("owner/other"))


# ---- configs and files that are not what they should be -----------------------------------------

@pytest.mark.parametrize("text, message", [
    ("", "not valid JSON"), ("{", "not valid JSON"), ("[" * 200_000, "not valid JSON"),
    ("\ufeff{}", "not valid JSON"), (b'{"\xe9": 1}', "not valid JSON"),
    ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice in one object"),
    ("1" * 5000, "not valid JSON"),
    ("[1]", "holds a list; wanted a JSON object"), ("null", "holds a NoneType")])
def test_json_that_is_none(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as error:
        hub.read_object(path)
    assert len(str(error.value).splitlines()) == 1


def test_json_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "LARGEST_JSON", 10)
    (tmp_path / "config.json").write_text('{"a": "long"}')
    with pytest.raises(ValueError, match="config.json: .*13 bytes; wanted 10 at most"):
        hub.read_object(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["config.json", hub.SINGLE, hub.INDEX])
@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_pipes_and_folders_in_the_place_of_files(tmp_path, name, what):
    hub.save_folder(tmp_path, {"a": torch.ones(2)}, {})
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if what == "pipe" else (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name}: a folder, pipe or device; wanted a file"):
        hub.model_config(tmp_path, "llama")
        hub.open_tensors(tmp_path)


def test_links_are_files(tmp_path):
    hub.save_folder(tmp_path / "there", {"a": torch.ones(2)}, {"model_type": "llama"})
    (tmp_path / "here").mkdir()
    for name in ("config.json", hub.SINGLE):
        (tmp_path / "here" / name).symlink_to(tmp_path / "there" / name)
    assert hub.model_config(tmp_path / "here", "llama") == {"model_type": "llama"}
    assert hub.open_tensors(tmp_path / "here")["a"]().tolist() == [1, 1]


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", 5, None,
                                   "a\\b", "x" * 5000, ["x"]])
def test_an_index_names_files_beside_it(tmp_path, shard):
    save_shards(tmp_path, {"one.safetensors": {"a": torch.ones(2)}}, b=shard)
    with pytest.raises(ValueError, match=f"{hub.INDEX}: places b in .*beside it"):
        hub.open_tensors(tmp_path)


@pytest.mark.parametrize("file, whose", [
    ("model.bin", "CTranslate2"), ("llama.Q4_K_M.gguf", "GGUF"), ("model.onnx", "ONNX"),
    ("adapter_config.json", "an adapter"), ("flax_model.msgpack", "Flax")])
@pytest.mark.parametrize("config", [None, {"lang_ids": [1]}])
def test_folders_of_other_programs_are_named(tmp_path, file, whose, config):
    (tmp_path / file).write_bytes(b"GGUF")
    if config is not None:
        hub.write_json(tmp_path / "config.json", config)
    for load in (Llama.from_pretrained, VisualEncoder.from_pretrained,
                 WhisperEncoder.from_pretrained):
        with pytest.raises(ValueError, match=f"no model.safetensors, but {file} .{whose}"):
            load(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=f"but {file} .{whose}"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip", "gpt2", 5, None])
def test_models_of_another_type_are_named(tmp_path, kind):
    hub.save_folder(tmp_path, {"a": torch.ones(2)}, {"model_type": kind})
    for load in (Llama, VisualEncoder, WhisperEncoder, Tokenizer, QFormerTokenizer):
        with pytest.raises(ValueError, match=f"config.json: model_type is {kind!r}; wanted "):
            load.from_pretrained(tmp_path)


def test_a_gguf_file_under_the_name_of_safetensors(tmp_path):
    (tmp_path / hub.SINGLE).write_bytes(b"GGUF\3\0\0\0" + bytes(90))
    with pytest.raises(ValueError, match="a GGUF file"):
        hub.open_tensors(tmp_path)


def test_sizes_are_compared_before_memory_is_taken(tmp_path):
    """2^24 x 2^24 numbers in fp32 are 1 PB."""
    hub.save_folder(tmp_path, {"weight": torch.ones(2, 2)}, {})
    with pytest.raises(ValueError, match="wrong shape: weight"):
        hub.load_module(lambda: nn.Linear(2 ** 24, 2 ** 24, bias=False), tmp_path)
