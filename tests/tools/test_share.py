"""Model cards, pushing (the Hub is a recorder, or a cache in its layout) and the merged LLM, which
transformers reads: its logits are the oracle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from parity import check, randomise
from safetensors.torch import load_file

import demo
import eval
import lora
import train
from aveb import tables
from baselines.instructblip import InstructBlip
from favor import Favor, preset, prompt_ids
from llama import Llama, LlamaConfig, Tokenizer
from runtime import hub
from runtime.checkpoint import weights_hash
from tools import share

ROOT = Path(share.__file__).parent.parent
FACTS = {"train": {"model": "tiny", "lr": 1e-3, "start_from": "", "seed": 0}, "commit": "abc123",
         "dirty": True,
         "command": "train.py --lr 1e-3", "step": 7, "val_ce": 0.5,
         "mixture": {"librispeech": {"asr": 5}, "gqa": {"vqa": 7, "isqa": 2}, "own": {"avm": 1}}}
HOSTILE = ["a|b", "line\nbreak\n---\nlicense: mit", "<script>x</script>", "back\\", '"quoted": [',
           "# head", "🎈", "`tick`", "\x00\x85\u2028", "../up"]


def sources(parts, **others):
    return {"whisper": str(parts / "whisper"), "visual": str(parts / "instructblip"),
            "llm": str(parts / "llama"), **others}


def build(parts, kind=Favor, **others):
    """A tiny model whose LoRA counts."""
    model = kind.from_config(preset("tiny", **sources(parts, **others), lora_alpha=24.0,
                                    max_new_tokens=5))
    for layer in lora.layers(model.llm).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def saved(small_parts, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("run")
    build(small_parts).save_pretrained(folder, **FACTS)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A run's folder as train.py leaves it, which tests may change."""
    shutil.copytree(saved, tmp_path / "run" / "best")
    (tmp_path / "run" / "best" / "state.pt").write_text("optimiser")
    (tmp_path / "run" / "best" / "model.safetensors.tmp").write_text("half")
    return tmp_path / "run"


def change(folder, **facts):
    """favor.json with other facts; None takes one out."""
    old = hub.read_json(folder / "favor.json")
    hub.write_json(folder / "favor.json", {
        k: v for k, v in (old | facts).items() if v is not None})


def head_of(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:card.index("\n---\n")])


def rows_of(text):
    """The cells of every table line, as a reader of Markdown finds them."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.replace(r"\\", "\0"))[1:-1]]
            for line in text.splitlines() if line.startswith("|")]


# ---- the card -----------------------------------------------------------------------------------

def test_card_says_what_the_checkpoint_says(run):
    change(run / "best", config=hub.read_json(run / "best" / "favor.json")["config"] | {
        "whisper": "openai/whisper-large-v2", "visual": "Salesforce/instructblip-vicuna-7b",
        "llm": "Salesforce/instructblip-vicuna-7b", "variant": "official", "window_frames": 10})
    card = share.model_card(run, "me/ears")
    assert head_of(card) == {
        "license": "other", "license_name": "terms-of-the-base-models",
        "license_link": "https://huggingface.co/Salesforce/instructblip-vicuna-7b",
        "library_name": "favor", "pipeline_tag": "video-text-to-text",
        "base_model": ["openai/whisper-large-v2", "Salesforce/instructblip-vicuna-7b"],
        "datasets": ["librispeech", "gqa"],
        "tags": ["favor", "video", "audio-visual", "speech", "lora"]}
    rows = rows_of(card)
    for row in (["Whisper", "openai/whisper-large-v2"], ["variant", "official"],
                ["window_frames", "10"],
                ["librispeech", "asr", "5"], ["gqa", "vqa", "7"], ["gqa", "isqa", "2"],
                ["own", "avm", "1"], ["commit", "abc123"], ["command", "train.py --lr 1e-3"],
                ["seed", "0"], ["dirty", "True"], ["step", "7"], ["val_ce", "0.5"]):
        assert row in rows
    assert not any(row[0] == "start_from" for row in rows)
    assert 'from favor import Favor\nmodel = Favor.from_pretrained("me/ears")' in card
    assert "# ears\n" in card
    assert "hf download me/ears --local-dir checkpoint" in card
    assert "--checkpoint checkpoint\n" in card and "FOLDER" not in card
    assert "Not scored." in card and "inherit the terms" in card and share.MARK in card
    assert "code is under the MIT licence" in card


def test_card_says_what_is_missing(run):
    change(run / "best", mixture=None, train=None, commit=None, dirty=None, command=None, step=None,
           val_ce=None, system=None)
    card = share.model_card(run / "best")
    for text in ("Training data unknown", "settings of the training are not recorded",
                 "Not scored."):
        assert text in card
    assert "datasets" not in head_of(card) and "base_model" not in head_of(card)   # local folders
    rows = rows_of(card)
    assert ["LLM", "a local folder, llama"] in rows
    assert str(run.parent.parent) not in card                        # no paths of this machine
    assert 'from_pretrained("user/name", whisper="FOLDER", visual="FOLDER", llm="FOLDER")' \
        in card and "--whisper FOLDER --visual FOLDER --llm FOLDER" in card
    change(run / "best", config={"variant": "paper"})
    assert ["window_frames", "not recorded"] in rows_of(share.model_card(run))


def test_the_committed_checkpoint_is_ours():
    card = share.model_card(ROOT / "miniature" / "weights" / "favor")
    assert head_of(card)["license"] == "mit" and "base_model" not in head_of(card)
    assert ["LLM", "miniature/weights/llama"] in rows_of(card) and "inherit" not in card


SMALL = {"whisper": "openai/whisper-small", "visual": "google/siglip2-base-patch16-224",
         "llm": "HuggingFaceTB/SmolLM2-360M-Instruct"}


def test_card_of_the_small_parts(run):
    """Apache-2.0 where all parts are, not LLaMA's terms; one part of other terms changes that."""
    config = hub.read_json(run / "best" / "favor.json")["config"]
    change(run / "best", config=config | SMALL | {"visual_grid": 7, "prompt": "chatml"})
    card = share.model_card(run, "me/ears")
    assert head_of(card)["license"] == "apache-2.0" and "license_name" not in head_of(card)
    assert head_of(card)["base_model"] == [*SMALL.values()]
    for name in ("LLaMA", "Vicuna", "InstructBLIP"):
        assert name not in card
    for source in SMALL.values():
        assert f"https://huggingface.co/{source}" in card
    assert ["prompt", "chatml"] in rows_of(card) and ["visual_grid", "7"] in rows_of(card)
    assert "FOLDER" not in card
    for part, other in (("whisper", "someone/whisper"), ("llm", "lmsys/vicuna-7b-v1.5"),
                        ("visual", "/my/folder")):
        change(run / "best", config=config | SMALL | {part: other})
        assert head_of(share.model_card(run))["license"] == "other"


def test_hostile_text_breaks_neither_table_nor_yaml(run):
    config = hub.read_json(run / "best" / "favor.json")["config"]
    change(run / "best", mixture={name: {name: 1} for name in HOSTILE}, commit=HOSTILE[1],
           command=HOSTILE[0], train={"data": HOSTILE[3]},
           config=config | {"variant": HOSTILE[1], "llm": "x/y\nlicense: mit",
                            "lora_targets": HOSTILE[:2]})
    card = share.model_card(run)
    head = head_of(card)
    assert head["license"] == "other" and "datasets" not in head and "base_model" not in head
    assert not re.search(r"^license: mit", card, re.M) and card.count("\n---\n") == 1
    assert not re.search(r"(?<!\\)<(?!!--)", card) and "\x00" not in card and "\u2028" not in card
    rows = rows_of(card)
    assert [r"a\|b"] * 2 + ["1"] in rows and ["data", "back\0"] in rows
    first = rows.index(["data set (own: not named)", "task", "samples"])
    assert all(len(row) == 3 for row in rows[first:first + 2 + len(HOSTILE)])
    # what is put there would come out of it
    told = share.front_matter(a=HOSTILE[4], b=[HOSTILE[6], HOSTILE[3]], c="", d=[])
    assert yaml.safe_load(told.strip("-")) == {"a": HOSTILE[4], "b": [HOSTILE[6], HOSTILE[3]]}


# ---- scores -------------------------------------------------------------------------------------

def write_report(path, **settings):
    rows = [{"id": str(i), "task": task, "prompt": "?", "references": ["red"], "both": said,
             "meta": {"dataset": "x", "metrics": metrics}}
            for i, (task, said, metrics) in enumerate([
                ("vqa", "red", ["word_match"]), ("vqa", "blue", ["word_match"]),
                ("asr", "red", ["wer"]), ("avsd", "red", ["judged"])])]
    tables.write_report(path.with_suffix(".jsonl"), rows, ("both",), {"vqa": 3},
                        {"mixture": FACTS["mixture"], **settings})


def test_scores_of_these_weights(run):
    best = run / "best"
    write_report(best / "predictions.json", weights=weights_hash(best), beams=5,
                 manifest="m|n.jsonl", questions=4, ids="12ab", history="gold", dtype="float32")
    card = share.model_card(run)
    rows = rows_of(card)
    assert ["vqa", "both", "word_match % ↑", r"50.0 \[9.5, 90.5\]", "2", "3", "trained on it"
            ] in rows                                                     # gqa is in the mixture
    assert any(row[:2] == ["asr", "both"] and row[2].startswith("wer % ↓ ")      # and its note
               and row[6] == "trained on it" for row in rows)
    assert ["avsd", "both", "judged", "n/a (no answers)", "-", "-", "zero-shot"] in rows
    assert (r"beams 5, history gold, dtype float32, questions 4, manifest m\|n.jsonl, ids 12ab."
            in card)
    assert "Not scored" not in card
    shutil.move(best / "predictions.json", run / "predictions.json")      # beside it counts too
    assert share.model_card(run) == card
    with open(best / "lora" / "adapter_model.safetensors", "ab") as file:
        file.write(b" ")
    assert "Not scored: there is a predictions.json, but of other weights" in share.model_card(run)


def test_scores_that_train_py_wrote(run):
    """Of best/, in the folder above, without a hash of the weights."""
    os.utime(run / "best" / hub.SINGLE, (1, 1))
    write_report(run / "predictions.json", checkpoint="runs/x/best")
    assert "| vqa | both |" in share.model_card(run)
    assert "Decoding and questions: not recorded." in share.model_card(run)
    shutil.copytree(run / "best", run / "last")
    assert "Not scored: there is" in share.model_card(run / "last")
    os.utime(run / "best" / hub.SINGLE)                        # trained on since
    os.utime(run / "predictions.json", (2, 2))
    assert "Not scored: there is" in share.model_card(run)


def test_a_predictions_file_that_is_no_report(run):
    (run / "predictions.json").write_text("[]")
    assert "Not scored: there is" in share.model_card(run)
    (run / "predictions.json").write_text("{")
    with pytest.raises(ValueError, match="predictions.json: not valid JSON"):
        share.model_card(run)


# ---- to the Hub ---------------------------------------------------------------------------------

class Recorder:
    """An HfApi; what is uploaded appears in the Hub's cache, in its own layout."""
    public = False

    def __init__(self, cache=None, fails=None):
        self.cache, self.fails, self.calls, self.files = cache, fails, [], []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        if self.fails:
            raise self.fails

    def model_info(self, repo_id):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        assert commit_message == "python -m tools.share push"
        self.calls.append(("upload_folder", repo_id))
        found = sorted(path.relative_to(folder_path).as_posix()
                       for path in Path(folder_path).rglob("*") if path.is_file())
        self.files = list(filter_repo_objects(found, allow_patterns=allow_patterns))
        if self.cache:
            root, commit = self.cache / f"models--{repo_id.replace('/', '--')}", "0" * 40
            for name in self.files:
                copy = root / "snapshots" / commit / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder_path) / name, copy)
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / "main").write_text(commit)
        return "done"


UPLOADED = ["README.md", "favor.json", "lora/adapter_config.json",
            "lora/adapter_model.safetensors", "model.safetensors"]


@pytest.fixture
def api(tmp_path, monkeypatch):
    """The Recorder that share.push finds, and its cache as the Hub's."""
    recorder = Recorder(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_mine")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: recorder)
    return recorder


def test_push_uploads_the_trained_parts_and_the_card(run, api):
    (run / "best" / "predictions.jsonl").write_text("{}")
    assert share.push(run, "me/ears", api=api) == "done"
    assert api.calls == [("create_repo", "me/ears", None, True), ("upload_folder", "me/ears")]
    assert api.files == UPLOADED
    card = run / "best" / "README.md"
    assert card.read_text() == share.model_card(run, "me/ears")
    change(run / "best", commit="later")
    share.push(run, "me/ears", private=True, api=api)
    assert api.calls[2] == ("create_repo", "me/ears", True, True) and "later" in card.read_text()
    card.write_text(own := card.read_text().replace(share.MARK, "") + "by hand")
    change(run / "best", commit="latest")
    share.push(run, "me/ears", api=api)
    assert card.read_text() == own and "README.md" in api.files


def answer(status):
    return SimpleNamespace(status_code=status, headers={}, request=None)


@pytest.mark.parametrize("failure, kind, message", [
    (errors.HfHubHTTPError("no", response=answer(403)), PermissionError,
     r"me/ears: the Hub refuses \(403\).*hf auth login"),
    (errors.HfHubHTTPError("bad\ncard", response=answer(400)), OSError,
     "me/ears: the Hub answers 400: .*bad card"),
    (ConnectionError("reset"), ConnectionError,
     "me/ears: the Hub cannot be reached .*where there is a network. The card is written: .*READ"),
    (RuntimeError("a bug"), RuntimeError, "^a bug$")])
def test_what_went_wrong_is_told_apart(run, failure, kind, message):
    with pytest.raises(kind, match=message) as error:
        share.push(run, "me/ears", api=Recorder(fails=failure))
    assert type(error.value) is kind


def test_what_is_not_uploaded(run, monkeypatch, tmp_path):
    api = Recorder()
    for name in ("ears", "me/ea rs", "a/b/c", "/me", "me/"):
        with pytest.raises(ValueError, match="wanted the name of a repo on the Hub, user/name"):
            share.push(run, name, api=api)
    with pytest.raises(FileNotFoundError, match="no favor.json, there or in best/; wanted a check"):
        share.push(tmp_path, "me/ears", api=api)
    api.public = True
    with pytest.raises(ValueError, match="exists and is public, so nothing was uploaded"):
        share.push(run, "me/ears", private=True, api=api)
    assert [call[0] for call in api.calls] == ["create_repo"]
    weights = run / "best" / hub.SINGLE
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="model.safetensors: truncated or damaged"):
        share.push(run, "me/ears", api=api)
    (run / "best" / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no lora/adapter_model.safetensors; save"):
        share.push(run, "me/ears", api=api)
    for text, message in (("[]", "no config in it"), ('{"config": 3}', "no config in it"),
                          ('{"config": {}, "system": "x"}', "system 'x'; wanted favor or instr")):
        (run / "best" / "favor.json").write_text(text)
        with pytest.raises(ValueError, match=f"favor.json: {message}"):
            share.push(run, "me/ears", api=api)
    assert len(api.calls) == 1


def test_the_real_library_without_token_and_network(run, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SystemExit, match="^python -m tools.share: no token for the Hub; `hf auth"):
        share.main(["push", str(run), "me/ears"])
    assert not (run / "best" / "README.md").exists()
    with pytest.raises(ConnectionError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        share.push(run, "me/ears", token="hf_x")


@torch.no_grad()
def test_from_pretrained_opens_what_was_pushed(run, api, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    share.push(run, "me/ears")
    ours, again = Favor.from_pretrained(run / "best"), Favor.from_pretrained("me/ears")
    assert again.config == ours.config and not again.training
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
    # a folder of that name counts for more
    for parameter in ours.trained_parameters():
        parameter.fill_(0.25)
    ours.save_pretrained("me/ears")
    assert (Favor.from_pretrained("me/ears").llm_proj.weight == 0.25).all()
    for absent, message in [("me/eyes", "me/eyes: not in the cache .*favor.json"),
                            ("runs/none/best", r"no such folder; wanted .*\(favor.json \+ model"),
                            ("me", "no favor.json; wanted a checkpoint of train.py")]:
        with pytest.raises(FileNotFoundError, match=message):
            Favor.from_pretrained(absent)


def test_a_repo_that_is_no_checkpoint_is_told_before_its_weights_come(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo, allow_patterns, local_files_only):
        asked.extend(allow_patterns)
        return str(tmp_path)

    def hf_hub_download(repo, name, local_files_only):
        raise errors.RemoteEntryNotFoundError("404", response=answer(404))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(FileNotFoundError, match="has no favor.json, it is no checkpoint of ours"):
        Favor.from_pretrained("openai/whisper-large-v2")
    assert "favor.json" in asked and "lora/*" in asked and hub.SINGLE not in asked


def test_the_token_is_written_nowhere(saved, api, tmp_path):
    """And what save_pretrained recorded beside the config is on the card."""
    folder = tmp_path / "new"
    Favor.from_pretrained(saved).save_pretrained(
        folder, mixture={"gqa": {"vqa": 3}}, commit="c0ffee")
    assert share.push(folder, "me/ears", private=True, token="hf_secret") == "done"
    assert api.files == UPLOADED and api.calls[0] == ("create_repo", "me/ears", True, True)
    assert not any("hf_secret" in path.read_text() for path in (
        folder / "favor.json", folder / "README.md"))
    assert ["gqa", "vqa", "3"] in rows_of((folder / "README.md").read_text())


def test_the_instructblip_baseline(small_parts, api, tmp_path):
    model = build(small_parts, InstructBlip)
    model.save_pretrained(tmp_path / "run", **FACTS)
    card = share.model_card(tmp_path / "run", "me/blip")
    assert head_of(card)["pipeline_tag"] == "image-text-to-text"
    assert head_of(card)["tags"] == ["favor", "video"]
    assert "Whisper" not in card and "InstructBLIP, fine-tuned as a baseline" in card
    assert 'import InstructBlip\nmodel = InstructBlip.from_pretrained("me/blip", ' in card
    assert "eval.py --system instructblip" in card and "demo.py" not in card
    with pytest.raises(ValueError, match="--system instructblip has no LoRA, so there is nothing"):
        share.merge(tmp_path / "run", tmp_path / "out")
    share.push(tmp_path / "run", "me/blip")
    assert api.files == ["README.md", "favor.json", "model.safetensors"]
    again = InstructBlip.from_pretrained("me/blip")
    assert torch.equal(again.language_projection.weight, model.language_projection.weight)
    with pytest.raises(ValueError, match="a checkpoint of --system instructblip; pass that"):
        Favor.from_pretrained("me/blip")


# ---- the merged LLM -----------------------------------------------------------------------------

def inside_instructblip(parts, folder):
    """The same LLM in an InstructBLIP's file, its vocabulary padded, and tokenizer files as
    published: they call </s> the first token and add one behind the LLM's."""
    llm = Llama.from_pretrained(parts / "llama")
    hub.save_folder(folder, {
        f"language_model.{n}": torch.cat([t, torch.ones(3, 32)]) if len(t) == 400 else t
        for n, t in llm.state_dict().items()} | {"qformer.x": torch.ones(2)}, {
        "text_config": llm.config.to_dict() | {"vocab_size": 403, "bos_token_id": 0}})
    shutil.copy(parts / "llama" / "tokenizer.model", folder)
    (folder / "tokenizer.json").write_text("{}")
    hub.write_json(folder / "tokenizer_config.json", {"bos_token": "</s>", "pad_token": "[PAD]"})
    hub.write_json(folder / "added_tokens.json", {"[PAD]": 400})


def like_llama3(folder):
    """Grouped-query attention, llama3's rope, tied embeddings, two end tokens, tokenizer.json."""
    from tokenizers import Tokenizer as Pieces
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    pieces = Pieces(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(["what colour is the ball"] * 3, trainers.BpeTrainer(
        vocab_size=290, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    pieces.add_special_tokens(["<|begin|>", "<|end|>", "<|turn|>"])
    bos = pieces.token_to_id("<|begin|>")
    pieces.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", bos)])
    folder.mkdir()
    Llama(LlamaConfig(
        vocab_size=bos + 3, width=32, layers=2, heads=4, kv_heads=2, ffn=48, rope_theta=5e5,
        rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        eps=1e-5, max_positions=64, tie_embeddings=True, bos_id=bos, eos_id=bos + 1,
    )).save_pretrained(folder)
    pieces.save(str(folder / "tokenizer.json"))
    hub.write_json(folder / "generation_config.json", {"eos_token_id": [bos + 1, bos + 2]})
    hub.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
        "eos_token": "<|turn|>"})


def like_smollm2(folder, family="llama"):
    """Byte-level BPE whose first ids are ChatML's, grouped-query attention, tied embeddings, a chat
    template that adds a system turn; or a Qwen3, whose file holds the tied tensor twice."""
    from tokenizers import Tokenizer as Pieces
    from tokenizers import decoders, models, pre_tokenizers, trainers
    pieces = Pieces(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(["user\nwhat colour is the ball\nassistant\nred"] * 3,
                               trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=[
            "<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    folder.mkdir()
    qwen = family == "qwen3"
    llm = randomise(Llama(LlamaConfig(
        vocab_size=pieces.get_vocab_size(), width=32, layers=2, heads=4, kv_heads=2, ffn=48,
        max_positions=512, tie_embeddings=True, rope_theta=1e5, qk_norm=qwen,
        head_dim=16 if qwen else None)))
    llm.save_pretrained(folder)
    if qwen:
        tensors = {name: stored() for name, stored in hub.open_tensors(folder).items()}
        hub.save_tensors(folder / hub.SINGLE, tensors | {
            "lm_head.weight": tensors["model.embed_tokens.weight"]})
        hub.write_json(folder / "generation_config.json", {"eos_token_id": [2, 0]})
    pieces.save(str(folder / "tokenizer.json"))
    hub.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": False,
        "chat_template": "<|im_start|>system\nYou are SmolLM<|im_end|>\n"})


def checkpoint_of(case, parts, tmp_path):
    """A checkpoint over one kind of LLM -> its folder."""
    llm = tmp_path / "llm"
    if case.startswith("instructblip"):
        llm.mkdir()
        inside_instructblip(parts, llm)
        if case.endswith("tokenizer.json"):
            share.write_tokenizer_json(llm / "tokenizer.json", Tokenizer.from_pretrained(llm))
            (llm / "tokenizer.model").unlink()
    elif case.startswith("llama 3"):
        like_llama3(llm)
    elif case in CHATML:
        like_smollm2(llm, CHATML[case])
    else:
        shutil.copytree(parts / "llama", llm)
    targets = ("q_proj", "down_proj", *(["lm_head"] if case == "llama 3, LoRA on its head" else []))
    style = {"prompt": "chatml"} if case in CHATML else {}
    build(parts, llm=str(llm), lora_targets=targets, **style).save_pretrained(
        tmp_path / "run", commit="c1")
    return tmp_path / "run"


CHATML = {"smollm2": "llama", "qwen 3": "qwen3"}
CASES = ["llama", "instructblip", "instructblip, tokenizer.json", "llama 3",
         "llama 3, LoRA on its head", *CHATML]


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_merged_is_ours_in_transformers(case, small_parts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run = checkpoint_of(case, small_parts, tmp_path)
    out = share.merge(run, tmp_path / "out", "float32", shard_gb=2e-5 if "3" in case else 5)
    ours, oracle = Favor.from_pretrained(run), AutoModelForCausalLM.from_pretrained(out).eval()
    assert oracle.dtype == torch.float32 and (out / hub.INDEX).exists() == ("3" in case)
    vocab = ours.tokenizer.vocab_size
    ids = torch.randint(3, vocab, (2, 30), generator=torch.Generator().manual_seed(0))
    logits = ours.llm(ids)
    check(f"merged, {case}", oracle(ids).logits, logits, 1e-5, 2e-6)
    base = Llama.from_pretrained(tmp_path / "llm", vocab_size=vocab)
    assert (base(ids) - logits).abs().max() > 0.05                    # LoRA counts
    again = Llama.from_pretrained(out)                                # we read it too
    check(f"merged, read by us, {case}", again(ids), logits, 1e-5, 2e-6)
    assert oracle.config.tie_word_embeddings == (case == "llama 3" or case in CHATML)

    # text -> the same ids, alone and as a dialogue
    theirs = AutoTokenizer.from_pretrained(out)
    for text in ("what colour is the ball?", "a  b\nc", " 🎈 naïve", ""):
        first = [] if case in CHATML else [ours.tokenizer.bos_id]     # which ChatML brings itself
        assert theirs(text).input_ids == [*first, *ours.tokenizer.encode(text)]
        assert theirs.decode(ours.tokenizer.encode(text)) == ours.tokenizer.decode(
            ours.tokenizer.encode(text))
    assert len(theirs) <= vocab and theirs.eos_token_id == ours.tokenizer.eos_id
    turns = [("what is red", "the ball"), ("who", "a dog")]
    messages = [{"role": role, "content": text} for turn in turns
                for role, text in zip(("user", "assistant"), turn, strict=True)]
    got = theirs.apply_chat_template([*messages, {"role": "user", "content": "where is it?"}],
                                     return_dict=False, add_generation_prompt=True)
    before, after, _ = prompt_ids(ours.tokenizer, "where is it?", turns, has_clip=False,
                                  style=ours.config.prompt)
    assert got == before + after
    spelt = "<|im_start|>" if case in CHATML else "USER: question"
    assert spelt in (out / "README.md").read_text()
    assert "chat_template" not in hub.read_json(out / "tokenizer_config.json")
    with pytest.raises(Exception, match="wanted the roles user and assistant only"):
        theirs.apply_chat_template([{"role": "system", "content": "be kind"}])

    # and the same answer, which ends where ours does
    prompt = torch.tensor([got])
    said = oracle.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1]:].tolist()
    ends = oracle.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert set(ends) == {*(ours.llm.config.eos_id if "3" in case else [2])}
    mine = ours.llm.generate(prompt, max_new_tokens=8)[0]
    assert [i for i in said if i not in ends] == mine


def siglip(folder, size=64):
    """A SigLIP with its text model, and its image processor's settings."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 16}
    model = transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=sizes | {"image_size": size, "patch_size": 8},
        text_config=sizes | {"vocab_size": 30}))
    randomise(model).save_pretrained(folder)
    transformers.SiglipImageProcessorPil(size={"height": size, "width": size}, resample=2
                                         ).save_pretrained(folder)


def test_small_from_training_to_the_hub(small_parts, small_miniature, api, tmp_path, monkeypatch,
                                        capsys):
    """A run of --model small-laptop with tiny parts: scored, asked, pushed, opened, merged."""
    siglip(tmp_path / "siglip")
    like_smollm2(tmp_path / "smollm2")
    parts = {"whisper": str(small_parts / "whisper"), "visual": str(tmp_path / "siglip"),
             "llm": str(tmp_path / "smollm2")}
    for split in ("train", "test"):
        of_task = {row["task"]: row for row in map(json.loads, open(
            small_miniature / f"{split}.jsonl"))}
        rows = [{key: str(small_miniature / value) if key in ("video", "image", "audio") else value
                 for key, value in of_task[task].items()} for task in ("asr", "avsd", "vqa")]
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    train.main(train.TrainConfig(
        model="small-laptop", data=str(tmp_path / "train.jsonl"), out=str(tmp_path / "run"),
        steps=1, batch=2, test=False, val_share=0.0, tensorboard=False, workers=0, threads=1,
        **parts, set=("width=48", "ffn=32", "queries=4", "max_new_tokens=4")), [])
    best = tmp_path / "run" / "best"
    eval.main(eval.EvalConfig(checkpoint=str(best), data=str(tmp_path / "test.jsonl")))
    report = hub.read_json(best / "predictions.json")
    assert report["settings"]["weights"] == weights_hash(best)
    assert set(report["scores"]) == {"asr", "avsd", "vqa"}
    demo.main([rows[1]["video"], "What is seen?", "--checkpoint", str(best)])
    assert re.search(r"best: \d+ frames, .* s of sound", capsys.readouterr().err)
    monkeypatch.chdir(tmp_path)
    share.push(tmp_path / "run", "me/small")
    again = Favor.from_pretrained("me/small")
    assert api.files == UPLOADED and again.visual.n_queries == 25
    assert again.config.prompt == "chatml" and again.end_ids() == (2, 2)
    card = (best / "README.md").read_text()
    assert "| avsd | both |" in card and "--whisper FOLDER --visual FOLDER --llm FOLDER" in card
    out = share.merge("run", "merged", "float32")
    ids = torch.randint(3, 259, (1, 9))
    check("merged", Llama.from_pretrained(out)(ids), again.llm(ids), 1e-5, 2e-6)


def test_what_is_in_the_folder(run, small_parts, tmp_path):
    out = share.merge(run, tmp_path / "out", "bfloat16", shard_gb=3e-5)
    config = hub.read_json(out / "config.json")
    assert {key: config[key] for key in (
        "architectures", "model_type", "num_key_value_heads", "rope_theta", "rms_norm_eps",
        "vocab_size", "bos_token_id", "eos_token_id", "torch_dtype", "tie_word_embeddings")} == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 2,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "vocab_size": Tokenizer.from_pretrained(small_parts / "llama").vocab_size,
        "eos_token_id": 2, "tie_word_embeddings": False}
    tensors, index = hub.open_tensors(out), hub.read_json(out / hub.INDEX)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert index["metadata"]["total_size"] == sum(t().nbytes for t in tensors.values())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:                       # no larger than asked for, but a tensor at least
        sizes = [t().nbytes for t in tensors.values() if t.path == shard]
        assert sum(sizes) <= 3e4 or len(sizes) == 1
    card = (out / "README.md").read_text()
    assert head_of(card)["pipeline_tag"] == "text-generation" and "abc123" in card
    assert "the audio-visual parts are not in here" in card and "inherit the terms" in card


def test_bfloat16_is_rounded_once(run, small_parts, tmp_path):
    share.merge(run, tmp_path / "whole", "float32")
    share.merge(run, tmp_path / "half", "bfloat16")
    whole, half = hub.open_tensors(tmp_path / "whole"), hub.open_tensors(tmp_path / "half")
    assert all(torch.equal(tensor().bfloat16(), half[name]()) for name, tensor in whole.items())


def test_one_shard_at_a_time(run, tmp_path, monkeypatch):
    made, most, inner = [], [], share.merged_tensors

    def watched(*args):
        *rest, read = inner(*args)

        def counting(name):
            most.append(sum(ref() is not None for ref in made))
            tensor = read(name)
            made.append(weakref.ref(tensor))
            return tensor
        return *rest, counting
    monkeypatch.setattr(share, "merged_tensors", watched)
    share.merge(run, tmp_path / "out", "float32", shard_gb=1e-5)
    shards = Counter(hub.read_json(tmp_path / "out" / hub.INDEX)["weight_map"].values())
    assert len(made) == 21 and len(shards) > 4
    assert max(most) < max(shards.values())         # the other tensors of its shard


def test_merge_refuses(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="out: the folder is not empty; name another"):
        share.merge(run, out)
    with pytest.raises(FileExistsError, match="is not empty"):
        share.merge(run, out / "mine.txt")
    (out / "mine.txt").unlink()
    assert share.merge(run, out) == out and (out / "config.json").exists()      # empty is no harm
    for wrong in ({"dtype": "int8"}, {"shard_gb": 0}):
        with pytest.raises(ValueError, match="wanted one of bfloat16, float16, float32"):
            share.merge(run, tmp_path / "no", **wrong)
    with pytest.raises(FileNotFoundError, match="no/where"):
        share.merge(run, tmp_path / "no", llm=tmp_path / "no/where")
    other = tmp_path / "other"
    Llama(LlamaConfig(vocab_size=400, width=16, layers=2, heads=2, kv_heads=2, ffn=48)
          ).save_pretrained(other)
    shutil.copy(Path(hub.read_json(run / "best" / "favor.json")["config"]["llm"])
                / "tokenizer.model", other)
    with pytest.raises(ValueError, match="adapters do not fit Llama; wrong shape"):
        share.merge(run, tmp_path / "no", llm=other)
    tensors = {name: t() for name, t in hub.open_tensors(other).items()}
    hub.save_folder(other, {n: t for n, t in tensors.items() if n != "model.norm.weight"} | {
        "model.wing": torch.ones(1)}, hub.read_json(other / "config.json"))
    with pytest.raises(ValueError, match="wrong shape: model.norm.weight, model.wing"):
        share.merge(run, tmp_path / "no", llm=other)
    assert not (tmp_path / "no").exists() and not (tmp_path / "no.tmp").exists()


def test_an_error_leaves_nothing_behind(run, tmp_path):
    """float16 ends at 65504."""
    path = run / "best" / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    last = [name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name]
    tensors[last[0]] = tensors[last[0]] * 1e7
    hub.save_tensors(path, tensors)
    with pytest.raises(ValueError, match=r"down_proj.weight: infinite .* torch.float16; take bf"):
        share.merge(run, tmp_path / "out", "float16", shard_gb=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    share.merge(run, tmp_path / "out", "bfloat16")


def test_a_kill_leaves_no_half_folder(run, tmp_path):
    """Killed when the weights are there and the tokenizer is not; then the same again."""
    code = ("import os, signal, sys\nfrom tools import share\n"
            "share.write_tokenizer = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "share.main(['merge', *sys.argv[1:]])")
    done = subprocess.run([sys.executable, "-c", code, run, tmp_path / "out"], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    assert (tmp_path / "out.tmp" / hub.SINGLE).exists()
    (tmp_path / "out.tmp" / "rest").touch()
    share.merge(run, tmp_path / "out")
    assert not (tmp_path / "out.tmp").exists() and not (tmp_path / "out" / "rest").exists()
    assert Llama.from_pretrained(tmp_path / "out")


# ---- the command line ---------------------------------------------------------------------------

def test_commands(run, api, tmp_path, capsys):
    share.main(["card", str(run)])
    assert capsys.readouterr().out == share.model_card(run)
    share.main(["card", str(run / "best"), "me/ears"])
    assert capsys.readouterr().out == share.model_card(run, "me/ears")
    share.main(["push", str(run), "me/ears", "--private"])
    assert api.calls[0] == ("create_repo", "me/ears", True, True)
    assert "https://huggingface.co/me/ears" in capsys.readouterr().out
    llm = hub.read_json(run / "best" / "favor.json")["config"]["llm"]
    change(run / "best", config=hub.read_json(run / "best" / "favor.json")["config"] | {
        "llm": str(tmp_path / "moved")})
    share.main(["merge", str(run), str(tmp_path / "out"), "--dtype", "float16", "--llm", llm])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float16"
    assert str(tmp_path / "out") in capsys.readouterr().out
    for command, message in [
            (["card", str(tmp_path)], "no favor.json"), (["push", str(run), "ears"], "user/name"),
            (["merge", str(run), str(tmp_path / "out"), "--llm", llm], "is not empty"),
            (["merge", str(run), str(tmp_path / "new")], "moved: no such folder")]:
        with pytest.raises(SystemExit, match=f"^python -m tools.share: .*{message}") as error:
            share.main(command)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("command, parts", [
    ([], ("python -m tools.share merge", "model card", "push", "card")),
    (["card"], ("RUN", "> README.tmp")), (["push"], ("user/name", "--private", "hf auth login")),
    (["merge"], ("OUT", "--dtype", "--shard-gb", "--llm", "without the audio-visual parts"))])
def test_help_teaches(command, parts, capsys):
    with pytest.raises(SystemExit, match="0"):
        share.main([*command, "--help"])
    shown = capsys.readouterr().out
    assert all(part in shown for part in parts)
