"""The paper's baselines as systems: InstructBLIP and Whisper with its decoder, through eval.py and
train.py, and InstructBLIP's answers against transformers' from file to text."""

import dataclasses
import json

import pytest
import torch
from parity import check, randomise

import data
import eval as evaluation
import favor
import train
from baselines import whisper
from baselines.instructblip import InstructBlip
from baselines.whisper import WhisperBaseline
from data import Clip
from favor import Sample
from vit_qformer import to_pixels

OURS = ("whisper", "visual", "llm")


@pytest.fixture(scope="module")
def folder(small_parts, tmp_path_factory):
    """An InstructBLIP as on the Hub: transformers' own, every parameter random, one folder with the
    LLM and both tokenizers."""
    import sentencepiece
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
    pieces = sentencepiece.SentencePieceProcessor(
        str(small_parts / "llama" / "tokenizer.model")).vocab_size()
    words = len((small_parts / "instructblip" / "qformer_tokenizer" / "vocab.txt")
                .read_text().splitlines())
    root = tmp_path_factory.mktemp("instructblip")
    oracle = randomise(InstructBlipForConditionalGeneration(InstructBlipConfig(
        vision_config={"hidden_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "intermediate_size": 50, "image_size": 28, "patch_size": 14},
        qformer_config={"hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3,
                        "intermediate_size": 52, "encoder_hidden_size": 44, "vocab_size": words,
                        "cross_attention_frequency": 2},
        text_config={"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 70,
                     "vocab_size": pieces + 8, "pad_token_id": 0, "bos_token_id": 0,
                     "eos_token_id": 1},            # wrong ids, as published
        num_query_tokens=5, image_token_index=pieces + 1))).eval()
    oracle.save_pretrained(root)
    (root / "tokenizer.model").symlink_to(small_parts / "llama" / "tokenizer.model")
    (root / "qformer_tokenizer").symlink_to(small_parts / "instructblip" / "qformer_tokenizer")
    return root, oracle


@pytest.fixture(scope="module")
def config(folder):
    root = str(folder[0])
    return favor.preset("tiny", visual=root, llm=root, max_new_tokens=6)


@pytest.fixture(scope="module")
def model(config):
    return InstructBlip.from_config(config)


def video(frames=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Clip(torch.randint(0, 256, (frames, 3, 28, 28), dtype=torch.uint8, generator=generator))


def image(seed=3):
    return dataclasses.replace(video(1, seed), is_image=True)


# ---- InstructBLIP -------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5])
def test_as_transformers(model, folder, frames):
    """Pixels to logits and greedy ids; five frames give five times the queries, one after the
    other, before </s> and the prompt."""
    root, oracle = folder
    clip = image() if frames == 1 else video(5)
    question = "What colour is the ball?"
    rows, _ = model.llm_inputs([Sample(question, clip=clip)])
    ids, mask = model.qformer_tokenizer([question])
    projected = torch.cat([oracle.language_projection(oracle.qformer(
        input_ids=ids, attention_mask=torch.cat([torch.ones(1, 5), mask.long()], 1),
        query_embeds=oracle.query_tokens, encoder_hidden_states=oracle.vision_model(
            to_pixels(clip.frames[i:i + 1], 28)).last_hidden_state)[0][:, :5])
        for i in range(frames)], dim=1)                                        # (1,5*F,D)
    text = torch.tensor([[2, *model.tokenizer.encode(question)]])               # </s>, not <s>
    wanted = torch.cat([projected, oracle.get_input_embeddings()(text)], dim=1)
    check(f"LLM input, {frames} frames", rows[0][0][None], wanted, max_abs=1e-5, rel_rms=5e-6)
    pieces = model.tokenizer.vocab_size                # made-up rows of the vocabulary left out
    logits = oracle.language_model(inputs_embeds=wanted).logits[..., :pieces]
    check(f"logits, {frames} frames", model.llm(embeds=rows[0][0][None]), logits,
          max_abs=1e-5, rel_rms=5e-6)


def test_five_equally_spaced_frames(model):
    seen = model.encode(video(9), ["?"])[0].visual
    every = torch.cat([model.encode(dataclasses.replace(
        image(), frames=video(9).frames[i:i + 1]), ["?"])[0].visual for i in (0, 2, 4, 6, 8)])
    assert torch.allclose(seen, every, atol=1e-5)
    assert len(model.encode(video(1), ["?"])[0].visual) == 5        # a short one has some twice
    assert len(model.encode(image(), ["?"])[0].visual) == 1


def test_prompt_is_its_own(model):
    sample = Sample("What?", "red ball", history=(("Where?", "left"),))
    before, after, answer = model.text_ids(sample, has_clip=True)
    encode = model.tokenizer.encode
    assert before == [] and after == [2, *encode("Where? left What?")]
    assert answer == [*encode("red ball"), 2]


@torch.no_grad()
def test_a_batch_is_its_singles_and_sound_changes_nothing(model):
    samples = [Sample("What colour?", "red", clip=video(7)), Sample("Where is it?", "left",
               clip=image()), Sample("Hello?", "yes"), Sample("What colour?", "red", clip=video(4),
                                                              mask="visual")]
    together = model(samples)["item_ce"]
    alone = torch.cat([model([sample])["item_ce"] for sample in samples])
    assert torch.allclose(together, alone, atol=1e-5)
    heard = dataclasses.replace(samples[0], clip=dataclasses.replace(
        samples[0].clip, audio=torch.randn(16000)))
    assert torch.equal(model([heard])["item_ce"], model([samples[0]])["item_ce"])
    assert not torch.isclose(model([dataclasses.replace(samples[0], mask="visual")])["ce"],
                             model([samples[0]])["ce"])
    said = model.generate([dataclasses.replace(s, target=None) for s in samples])
    assert said == [model.generate([dataclasses.replace(s, target=None)])[0] for s in samples]


def test_what_learns(model):
    """Q-Former, queries and projection, each with a gradient; ViT and LLM are frozen."""
    model.train()
    model([Sample("What colour?", "red", clip=video())])["loss"].backward()
    learning = {n.split(".")[0] + "." + n.split(".")[1]
                for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {"visual.qformer", "visual.query_tokens", "language_projection.weight",
                        "language_projection.bias"}
    assert all(p.grad is not None for p in model.trained_parameters())
    model.zero_grad()
    model([Sample("Hello?", "yes")])["loss"].backward()             # no picture: still all of them
    assert all(p.grad is not None for p in model.trained_parameters())
    model.zero_grad()
    model.eval()


def test_it_learns_and_is_kept(config, tmp_path):
    model = InstructBlip.from_config(config).train()
    batch = [Sample("What?", "red", clip=video(5, 1)), Sample("What?", "blue", clip=image(2))]
    optimiser = torch.optim.Adam(model.trained_parameters(), lr=3e-3)
    first = model(batch)["loss"].item()
    for _ in range(40):
        loss = model(batch)["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < first - 0.5                 # a random LLM can be told no more than that
    model.eval().save_pretrained(tmp_path)
    assert not (tmp_path / "lora").exists()
    again = InstructBlip.from_pretrained(tmp_path)
    assert torch.equal(again(batch)["item_ce"], model(batch)["item_ce"])
    with pytest.raises(ValueError, match="a checkpoint of --system instructblip"):
        favor.Favor.from_pretrained(tmp_path)


# ---- through train.py and eval.py ---------------------------------------------------------------

def test_train_and_eval(folder, small_parts, small_miniature, tmp_path, capfd):
    """train.py --system instructblip, then eval.py with its checkpoint and with public weights."""
    root = str(folder[0])
    parts = {"visual": root, "llm": root, "whisper": str(small_parts / "whisper")}
    out = tmp_path / "run"
    train.main(train.TrainConfig(
        system="instructblip", data=str(small_miniature), out=str(out), steps=2, batch=4,
        val_share=0.0, val_every=2, log_every=1, **parts), [])
    printed = capfd.readouterr().out                # also what eval.py prints, its own program
    assert "language projection" in printed and "| **vqa**" in printed and "avsr" not in printed
    saved = json.loads((out / "best" / "favor.json").read_text())
    assert saved["system"] == "instructblip"
    for checkpoint in (str(out / "best"), ""):
        evaluation.main(evaluation.EvalConfig(
            system="instructblip", checkpoint=checkpoint, task="vqa,avsd",
            data=str(small_miniature), out=str(tmp_path / "said.jsonl"), **parts))
        rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
        assert {row["task"] for row in rows} == {"vqa", "avsd"} and "both" in rows[0]


def test_two_processes_learn_what_one_does(folder, small_miniature, tmp_path):
    """DDP: every rank touches every trained parameter, also where a batch has no picture."""
    import subprocess
    import sys

    from conftest import ROOT
    root, losses = str(folder[0]), []
    for n in (1, 2):
        out = tmp_path / str(n)
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--system", "instructblip",
                        "--data", str(small_miniature), "--out", str(out), "--steps", "2",
                        "--batch", "4", "--val-share", "0", "--no-test", "--processes", str(n),
                        "--visual", root, "--llm", root, "--no-cache-features",
                        "--workers", "0"],
                       check=True, capture_output=True)
        losses.append([json.loads(line)["loss"]
                       for line in (out / "log.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_tasks_that_a_system_cannot_do(folder):
    with pytest.raises(ValueError, match="--system whisper can do asr, avsr, not vqa"):
        evaluation.EvalConfig(system="whisper", task="vqa")
    with pytest.raises(ValueError, match="--system whispers: no such choice; choose from favor"):
        evaluation.EvalConfig(system="whispers")
    with pytest.raises(ValueError, match="--random-init goes with neither"):
        evaluation.EvalConfig(system="whisper", random_init=True)
    assert evaluation.EvalConfig(system="whisper").tasks == ("asr", "avsr")


# ---- Whisper ------------------------------------------------------------------------------------

class Listener:
    """Stands in for baselines.whisper.Whisper, which test_whisper.py is about."""

    def __init__(self):
        self.beams = []

    def transcribe(self, audios, beams=1):
        self.beams.append(beams)
        return [f"{len(audio)} samples" for audio in audios]


def test_whisper_hears_sound_only(small_miniature, tmp_path, monkeypatch):
    listener = Listener()
    monkeypatch.setattr(whisper.Whisper, "from_pretrained",
                        classmethod(lambda cls, source, dtype=None, device=None: Ear(listener)))
    monkeypatch.setattr(data, "read_frames", lambda *_, **__: pytest.fail("a picture was read"))
    evaluation.main(evaluation.EvalConfig(
        system="whisper", beams=5, data=str(small_miniature), out=str(tmp_path / "said.jsonl")))
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"asr", "avsr"} and set(listener.beams) == {5}
    for row in rows:
        record = next(r for r in data.read_manifest(small_miniature / "test.jsonl")
                      if r.id == row["id"])
        heard = data.load_clip(record, sound_only=True)
        assert heard.frames is None and row["both"] == f"{len(heard.audio)} samples"


class Ear(torch.nn.Module):
    def __init__(self, listener):
        super().__init__()
        self.transcribe = listener.transcribe


def test_whisper_says_nothing_where_nothing_is_heard():
    model = WhisperBaseline(favor.preset("tiny"), Ear(Listener()))
    sound = Clip(audio=torch.zeros(800))
    said = model.generate([Sample("?", clip=sound), Sample("?", clip=Clip()),
                           Sample("?", clip=sound, mask="audio"),
                           Sample("?", clip=sound, mask="visual")])
    assert said == ["800 samples", "", "", "800 samples"]
