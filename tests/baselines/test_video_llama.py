"""Video-LLaMA against the authors' own modules (video_llama.npz: their arrays, with small random
weights), torchaudio's filter bank, transformers' BLIP-2 and samplers; its files, and the
miniature's tasks."""

import dataclasses
import json
import os
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import encode, numbers
from parity import check, randomise
from torch import nn

import eval as evaluation
import favor
from baselines.blip2 import Blip2Encoder
from baselines.imagebind import sound_clips
from baselines.systems import load_system, system_preset
from baselines.vicuna import TOP_K, TOP_P, frame_sentence, generate, pick, prompt_pieces
from baselines.video_llama import RENAME, Branches, BranchesConfig, VideoLlama, choose_frames
from data import Clip, Record, Sample, load_clip
from llama import Llama, LlamaConfig
from runtime import feature_cache, hub
from tools import convert, memory

# The authors' small modules: 3 heads of 8 in the audio trunk, 4 of 12 in the Q-Formers.
PROBE = BranchesConfig(56, 48, 48, 2, 4, 96, 6, 24, 2, 3, 96, 40)
TINY = BranchesConfig(32, 36, 32, 2, 1, 48, 5, 24, 1, 1, 32, 20)       # heads as convert sets them
EXTRAS = {"video_Qformer.bert.embeddings.position_ids": torch.arange(4)[None],
          "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}


@pytest.fixture(scope="module")
def probe():
    with np.load(Path(__file__).parent / "video_llama.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def branches(probe):
    """Branches with the authors' weights."""
    ours, given = Branches(PROBE).eval().requires_grad_(False), {}
    for name, tensor in probe.items():
        if name.startswith("w/"):
            for theirs, mine in RENAME:
                name = name.replace(theirs, mine)
            given[name[2:]] = tensor
    ours.load_state_dict(given)
    return ours


# ---- parity -------------------------------------------------------------------------------------

@pytest.mark.parametrize("frames", [1, 3, 8])
def test_video_branch(branches, probe, frames):
    seen = {}
    hook = branches.video_qformer.encoder.layer[0].register_forward_hook(
        lambda module, args, out: seen.update(layer=out))
    image = probe[f"video{frames}/image"].view(2, frames, 5, 48)
    out = branches.watch(image)
    hook.remove()
    check("video Q-Former, first layer", seen["layer"], probe[f"video{frames}/layer0"])
    check("video branch", out, probe[f"video{frames}/out"], rel_rms=5e-6)


def test_audio_trunk(branches, probe):
    heard = branches.audio_encoder(probe["sound/in"])
    check("ImageBind's audio trunk", heard, probe["sound/out"], rel_rms=5e-6)
    assert heard.norm().item() == pytest.approx(20, abs=1e-3)


def test_audio_branch_on_the_trunks_vectors(branches, probe, monkeypatch):
    heard = probe["audio/heard"]
    monkeypatch.setattr(branches.audio_encoder, "forward", lambda mel: heard)
    out = branches.listen(torch.zeros(2, 8, 1, 128, 204))
    check("audio branch", out, probe["audio/out"], rel_rms=5e-6)


def test_pieces_of_sound_have_positions(branches, probe):
    mel = probe["sound/in"].expand(8, -1, -1, -1)[None]
    heard = branches.audio_encoder(mel[0]) + branches.audio_position_embedding.weight
    wanted = branches.audio_llama_proj(branches.audio_qformer(
        branches.audio_query_tokens, heard[None]))
    assert torch.allclose(branches.listen(mel), wanted, atol=1e-6)
    assert not torch.allclose(heard[0], heard[1], atol=0.1)            # positions tell them apart
    with pytest.raises(ValueError, match="9 pieces of sound; wanted 8 at most"):
        branches.listen(probe["sound/in"].expand(9, -1, -1, -1)[None])
    with pytest.raises(ValueError, match="33 frames; wanted 32 at most"):
        branches.watch(torch.zeros(1, 33, 5, 48))


def theirs(sound, rate):
    """The authors' loop around torchaudio's resampling and Kaldi's filter bank."""
    from torchaudio import compliance, functional
    sound, found = functional.resample(sound.clone(), rate, 16000), []
    spare = max(Fraction(sound.size(1) / 16000) - 2, 0)
    for k in range(8):
        clip = sound[:, int(spare * k / 8 * 16000):int((spare * k / 8 + 2) * 16000)]
        clip -= clip.mean()
        mel = compliance.kaldi.fbank(
            clip, htk_compat=True, sample_frequency=16000, use_energy=False, dither=0.0,
            window_type="hanning", num_mel_bins=128, frame_length=25, frame_shift=10).T
        found.append((torch.nn.functional.pad(mel, (0, 204 - mel.size(1))) + 4.268) / 9.138)
    return torch.stack(found)[:, None]


@pytest.mark.parametrize("name, channels, samples, rate", [
    ("long", 1, 325920, 16000), ("short", 1, 20800, 16000), ("overlap", 2, 144160, 16000),
    ("resampled", 1, 220500, 44100)])
def test_sound_as_theirs(name, channels, samples, rate):
    """The four cases in which the authors' own arrays were checked, too; loud and soft, off centre,
    and not changed by reading it."""
    sound = torch.randn(channels, samples) * torch.linspace(0, 0.2, samples) + 0.02
    before = sound.clone()
    clips = sound_clips(sound, rate)
    assert clips.shape == (8, 1, 128, 204) and torch.equal(sound, before)
    check(name, clips, theirs(sound, rate), max_abs=1e-5)


def test_silence_and_short_sounds():
    clips = sound_clips(torch.zeros(1, 16000))
    assert clips[0, 0, 0, 0].item() == pytest.approx(-1.2776, abs=1e-4)
    assert clips[0, 0, 5, -1].item() == pytest.approx(0.4671, abs=1e-4)      # filled up
    assert sound_clips(torch.zeros(1, 400)).isfinite().all()
    with pytest.raises(ValueError, match="399 samples; wanted 400"):
        sound_clips(torch.zeros(1, 399))


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    """(folder of transformers' own tiny BLIP-2, every parameter random, and that model)."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration
    oracle = randomise(Blip2ForConditionalGeneration(Blip2Config(
        vision_config={"hidden_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
                       "intermediate_size": 50, "image_size": 28, "patch_size": 14},
        qformer_config={"hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3,
                        "intermediate_size": 52, "encoder_hidden_size": 44,
                        "cross_attention_frequency": 2, "vocab_size": 31},
        text_config={"model_type": "t5", "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 16,
                     "num_layers": 1, "vocab_size": 31}, num_query_tokens=5))).eval()
    root = tmp_path_factory.mktemp("blip2")
    oracle.save_pretrained(root)
    return root, oracle


@torch.no_grad()
def test_image_qformer_as_transformers(blip2):
    root, oracle = blip2
    ours, pixels = Blip2Encoder.from_pretrained(root), torch.randn(3, 3, 28, 28)
    oracle.vision_model.post_layernorm.eps = 1e-5                   # of ln_vision in LAVIS
    image = oracle.vision_model(pixels).last_hidden_state
    check("ViT and ln_vision", ours.encode_image(pixels), image)
    check("image Q-Former", ours(pixels), oracle.qformer(
        query_embeds=oracle.query_tokens.expand(3, -1, -1), encoder_hidden_states=image
    ).last_hidden_state, rel_rms=5e-6)
    assert not any("word" in name or "intermediate." in name for name, _ in ours.named_parameters())


# ---- prompts ------------------------------------------------------------------------------------

SOUND_AND_VIDEO = (
    "Close your eyes, open your ears and you imagine only based on the sound that: <ImageHere>."
    "                 Close your ears, open your eyes and you see that <Video><ImageHere></Video>."
    "                  Now answer my question based on what you have just seen and heard. "
    "What happens?")
VIDEO = ("<Video><ImageHere></Video> The video contains 8 frames sampled at 0.0, 1.2, 2.5, 3.8, "
         "5.0, 6.2, 7.5, 8.8 seconds.  What happens?")
IMAGE = ("You are able to understand the visual content that the user provides. Follow the "
         "instructions carefully and explain your answers in detail.###Human: "
         "<Image><ImageHere></Image>  What happens?")


@pytest.mark.parametrize("kind, style, first", [
    ("both", "vicuna", f"###Human: {SOUND_AND_VIDEO}###Assistant:"),
    ("video", "vicuna", f"###Human: {VIDEO}###Assistant:"),
    ("image", "vicuna", f"{IMAGE}###Assistant:"),
    ("text", "vicuna", "###Human: What happens?###Assistant:"),
    ("both", "llama_2", f"[INST] <<SYS>>\n\n<</SYS>>\n\n{SOUND_AND_VIDEO} [/INST]")])
def test_prompts_to_the_space(kind, style, first):
    said = frame_sentence([k * 1.25 for k in range(8)]) if kind == "video" else ""
    turns = [("What happens?", "A dog barks."), ("And then?", None)]
    again = (" A dog barks. </s><s>[INST] And then? [/INST]" if style == "llama_2" else
             " A dog barks.###Human: And then?###Assistant:")
    for n, wanted in ((1, first), (2, first + again)):
        pieces = prompt_pieces(turns[:n - 1] + [(turns[n - 1][0], None)], kind, said, style)
        assert "<ImageHere>".join(pieces) == wanted


# ---- frames -------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 30, 250])
def test_frames_of_a_file_are_theirs(tmp_path, count):
    """Frame floor(k N / 8) of the file, and its time; a sound that goes on does not count."""
    path = encode(tmp_path / "v.mp4", [k * 3600 for k in range(count)],              # 25 per second
                  audio=np.zeros(16000 * 12, np.float32))
    clip = load_clip(Record("a", "", "", video=str(path)), n_frames=8)
    chosen, times = choose_frames(clip)
    n = min(8, count)
    wanted = np.arange(0, count, count / n).astype(int).tolist()
    assert numbers(clip.frames[chosen]) == wanted
    assert times == pytest.approx([place / 25 for place in wanted], abs=1e-6)


@pytest.mark.parametrize("name, fps", [("v.mp4", 30), ("v.mkv", 30), ("v.mkv", 60)])
@pytest.mark.parametrize("count", [8, 20, 33])
def test_frames_of_files_that_count_milliseconds(tmp_path, name, fps, count):
    """Times or length are rounded there: a frame that starts at k/8 of the length is still seen."""
    path = encode(tmp_path / name, [k * 90000 // fps for k in range(count)], fps=fps)
    clip = load_clip(Record("a", "", "", video=str(path)), n_frames=8)
    assert numbers(clip.frames[choose_frames(clip)[0]]) == [k * count // 8 for k in range(8)]


def test_frames_of_a_part_of_a_file(tmp_path):
    path = encode(tmp_path / "v.mp4", [k * 3600 for k in range(250)])
    clip = load_clip(Record("a", "", "", video=str(path), start=2.0, end=6.0), n_frames=8)
    chosen, times = choose_frames(clip)
    assert numbers(clip.frames[chosen]) == [50 + k * 100 // 8 for k in range(8)]
    assert times == pytest.approx([(k * 100 // 8) / 25 for k in range(8)], abs=1e-6)
    assert clip.seconds == pytest.approx(4.0)


# ---- files --------------------------------------------------------------------------------------

def released(config, seed=0):
    """{"vl", "al", "imagebind": {released name: random tensor}} with the sizes of a config."""
    generator, files = torch.Generator().manual_seed(seed), {"vl": {}, "al": {}, "imagebind": {}}
    for name, shape in convert.released_shapes(config).items():
        tensor = torch.randn(shape, generator=generator) * 0.2
        if name.endswith("log_logit_scale"):
            tensor = torch.tensor(3.0)
        if name.startswith("audio_encoder."):
            files["imagebind"][name.removeprefix("audio_encoder.")] = tensor
        else:
            files["al" if name.startswith("audio_") else "vl"][name] = tensor
    return files


def write(root, files, **more):
    """The three files as their authors saved them: nested beside an optimizer, or flat."""
    root.mkdir(exist_ok=True)
    rest = {"optimizer": {"state": {0: {"step": 3}}}, "config": {"run": {"lr": 1e-5}}, "epoch": 2}
    names = {"vl": "finetune-vicuna7b-v2.pth", "al": "finetune_vicuna7b_audiobranch.pth"}
    for kind, name in names.items():
        torch.save({"model": files[kind] | EXTRAS | more.get(kind, {})} | rest, root / name)
    torch.save(files["imagebind"] | {"modality_trunks.vision.blocks.0.norm_1.weight": torch.ones(3)}
               | more.get("imagebind", {}), root / "imagebind_huge.pth")
    return root


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """(folder that tools.convert made of the three files, their tensors)."""
    root = tmp_path_factory.mktemp("files")
    files = released(TINY)
    convert.main([str(write(root / "pth", files)), str(root / "video-llama")])
    return root / "video-llama", files


def test_converted_files_are_read_strictly(converted, tmp_path):
    root, files = converted
    ours = Branches.from_pretrained(root)
    assert ours.config == TINY and not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(ours.llama_proj.weight, files["vl"]["llama_proj.weight"])
    assert torch.equal(ours.audio_qformer.encoder.layer[1].crossattention.attention.key.weight,
                       files["al"]["audio_Qformer.bert.encoder.layer.1.crossattention.self."
                                   "key.weight"])
    assert torch.equal(ours.audio_encoder.head.weight,
                       files["imagebind"]["modality_heads.audio.2.weight"])
    stored = {name: tensor() for name, tensor in hub.open_tensors(root).items()}
    assert set(stored) == set(convert.released_shapes(TINY))
    name = "video_Qformer.bert.encoder.layer.0.output_query.dense.bias"
    for change, message in [({name: None}, "missing: video_qformer.*output_query.dense.bias"),
                            ({name: torch.ones(3)}, "wrong shape: video_Qformer"),
                            ({"one.more": torch.ones(3)}, "unknown: one.more")]:
        tensors = {n: t for n, t in (stored | change).items() if t is not None}
        hub.save_folder(tmp_path / "odd", tensors, hub.read_json(root / "config.json"))
        with pytest.raises(ValueError, match=message):
            Branches.from_pretrained(tmp_path / "odd")


def test_released_names_and_shapes():
    """58, 58 and 177 tensors of so many values, as were counted in the authors' classes."""
    shapes, count, values = convert.released_shapes(BranchesConfig()), {}, {}
    for name, shape in shapes.items():
        kind = ("imagebind" if name.startswith("audio_encoder.") else name.split("_")[0])
        kind = "video" if kind == "llama" else kind
        count[kind] = count.get(kind, 0) + 1
        values[kind] = values.get(kind, 0) + int(np.prod(shape))
    assert count == {"video": 58, "audio": 58, "imagebind": 177}
    assert values == {"video": 22_104_064, "audio": 22_855_680, "imagebind": 86_235_649}
    trunk = "audio_encoder.modality_trunks.audio.blocks.11"
    assert shapes.items() >= {
        "video_frame_position_embedding.weight": (32, 768), "llama_proj.weight": (4096, 768),
        "video_Qformer.bert.embeddings.LayerNorm.weight": (768,),
        "audio_Qformer.bert.encoder.layer.1.crossattention.self.key.weight": (768, 1024),
        "audio_encoder.modality_preprocessors.audio.pos_embedding_helper.pos_embed": (1, 229, 768),
        f"{trunk}.attn.in_proj_weight": (2304, 768), f"{trunk}.attn.bias_k": (1, 1, 768),
        "audio_encoder.modality_heads.audio.2.weight": (1024, 768),
        "audio_encoder.modality_postprocessors.audio.1.log_logit_scale": ()}.items()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-never-be-made",)


@pytest.mark.parametrize("kind, name, tensor, message", [
    ("vl", "llama_proj.bias", None, "finetune-vicuna7b-v2.pth: .*missing: llama_proj.bias"),
    ("al", "audio_query_tokens", torch.ones(1, 7, 32), "audiobranch.pth: .*wrong shape: audio_q"),
    ("al", "one.more", torch.ones(1), r"audiobranch.pth: .*unknown: one.more \(1\)"),
    ("vl", "video_frame_position_embedding.weight", torch.ones(31, 36), "31, 36], wanted .32, 3"),
    ("imagebind", "modality_heads.audio.2.weight", None, "imagebind_huge.pth: .*missing: audio_"),
    ("imagebind", "modality_trunks.audio.blocks.0.attn.bias_k", torch.ones(24), "wrong shape"),
    ("vl", "llama_proj.weight", torch.full((32, 32), float("nan")), "NaN or infinity in llama_"),
    ("vl", "llama_proj.bias", torch.ones(32, dtype=torch.int64), "whole numbers in llama_proj.b"),
    pytest.param("vl", "llama_proj.bias", torch.ones(32).to_sparse(),
                 r"v2.pth: holds llama_proj.bias \(1\); wanted .*none sparse",
                 marks=pytest.mark.filterwarnings("ignore:Sparse")),
    ("imagebind", 7, torch.ones(3), r"imagebind_huge.pth: holds 7 \(1\); wanted"),
    ("al", "video_Qformer.bert.embeddings.LayerNorm.bias", torch.ones(32),
     "audiobranch.pth: is not Video-LLaMA's audio branch as released: unknown: video_Qformer"),
    ("al", "odd", Malicious(), "audiobranch.pth: no plain pickle of tensors, and not run"),
    ("imagebind", "odd", 3, r"imagebind_huge.pth: holds odd \(1\)")])
def test_torch_files_that_are_refused(tmp_path, kind, name, tensor, message):
    files = released(TINY)
    files[kind][name] = tensor
    if tensor is None:
        del files[kind][name]
    with pytest.raises((SystemExit, ValueError), match=message):
        convert.main([str(write(tmp_path / "pth", files)), str(tmp_path / "out")])
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not Path("/tmp/this-must-never-be-made").exists()


def test_torch_files_that_do_not_belong_together(tmp_path, capsys):
    root, files = tmp_path / "pth", released(TINY)
    other = released(dataclasses.replace(TINY, llm_width=40))
    with pytest.raises(SystemExit, match=r"audio_llama_proj.weight \[40, 32\], wanted \[32, 32\]"):
        convert.main([str(write(root, files | {"al": other["al"]})), str(tmp_path / "out")])
    write(root, files)
    whole = (root / "imagebind_huge.pth").read_bytes()
    (root / "imagebind_huge.pth").write_bytes(whole[:-2000])
    with pytest.raises(SystemExit, match="imagebind_huge.pth: truncated or no file of torch's"):
        convert.main([str(root), str(tmp_path / "out")])
    (root / "imagebind_huge.pth").unlink()
    with pytest.raises(SystemExit, match="no .pth file of ImageBind; wanted finetune"):
        convert.main([str(root), str(tmp_path / "out")])
    torch.save({"model": {"llama_proj.weight": torch.ones(3)}}, root / "minigpt4.pth")
    with pytest.raises(SystemExit, match="minigpt4.pth: holds llama_proj.weight .1.; none of them"):
        convert.main([str(root), str(tmp_path / "out")])
    (root / "minigpt4.pth").unlink()
    (root / "finetune-vicuna7b-v2.pth").rename(root / "pretrain_vicuna7b-v2.pth")
    with pytest.raises(SystemExit, match="pretrained only; wanted its finetune file"):
        convert.main([str(root), str(tmp_path / "out")])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_in_two_files_is_taken_from_the_one_loaded_last(tmp_path, capsys):
    files = released(TINY)
    twice = {"video_query_tokens": torch.full((1, 5, 32), 7.0), "video_frame_position_embedding."
             "weight": files["vl"]["video_frame_position_embedding.weight"]}
    convert.main([str(write(tmp_path / "pth", files, al=twice)), str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert shown.count("58 tensors; left out: llama_model.model.layers.0.self_attn.rotary_emb."
                       "inv_freq, video_Qformer.bert.embeddings.position_ids (2)") == 1
    assert "video_query_tokens is in two files, with other values; this file's count" in shown
    assert "video_frame_position_embedding.weight is in two files, with the same values" in shown
    assert Branches.from_pretrained(tmp_path / "out").video_query_tokens.mean() == 7


# ---- the model ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sources(blip2, converted, small_parts):
    return {"visual": str(blip2[0]), "video_llama": str(converted[0]),
            "llm": str(small_parts / "llama")}


@pytest.fixture(scope="module")
def model(sources):
    config = system_preset("video-llama", "tiny", {
        "visual": sources["visual"], "whisper": sources["video_llama"], "llm": sources["llm"]})
    return VideoLlama.from_config(dataclasses.replace(config, max_new_tokens=8))


def film(frames=9, seconds=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Clip(torch.randint(0, 256, (frames, 3, 28, 28), dtype=torch.uint8, generator=generator),
                torch.randn(round(16000 * seconds), generator=generator) * 0.1 if seconds else None,
                fps=frames / 3)


@torch.no_grad()
def test_the_llm_reads_sound_then_video_between_pieces_that_are_encoded_one_by_one(model):
    sample = model.encode_sample(Sample("What happens?", clip=film()))
    row, features = model.llm_input(sample, 8), sample.features
    texts = prompt_pieces([("What happens?", None)], "both")
    ids = [[1, *model.tokenizer.encode(texts[0])], *map(model.tokenizer.encode, texts[1:])]
    text = [model.llm.embed(torch.tensor(part)) for part in ids]
    wanted = torch.cat([text[0], features.audio, text[1], features.visual[0], text[2]])
    assert torch.equal(row, wanted) and model.length(sample) == len(wanted)
    assert features.audio.shape == (8, 32) and features.visual.shape == (1, 5, 32)


@torch.no_grad()
def test_what_is_missing(model):
    """Silent video, image, sound alone, image with sound, text, and sounds of no length."""
    def read(clip, **more):
        sample = model.encode_sample(Sample("What?", clip=clip, **more))
        ids, vectors = model.pieces_of(sample)
        return model.tokenizer.decode([i for part in ids for i in part]), vectors
    text, vectors = read(film(seconds=0))
    assert "contains8framessampledat0.0," in text.replace(" ", "") and len(vectors) == 1
    text, vectors = read(film(seconds=0.02))                     # 320 samples make no spectrogram
    assert "sampled" in text and len(vectors) == 1
    image = dataclasses.replace(film(1, 0), is_image=True)
    text, vectors = read(image)
    assert "Youareabletounderstand" in text.replace(" ", "") and len(vectors) == 1
    for clip in (dataclasses.replace(film(), frames=None), dataclasses.replace(
            film(), is_image=True)):
        text, (sound, picture) = read(clip)
        assert "Closeyoureyes" in text.replace(" ", "") and sound.abs().min() > 0
        assert (picture == 0).all() == (clip.frames is None)
    assert read(None)[1] == [] and read(Clip())[1] == []
    for mask, silent, dark in (("audio", 1, 0), ("visual", 0, 1), ("both", 1, 1)):
        _, (sound, picture) = read(film(), mask=mask)
        assert ((sound == 0).all(), (picture == 0).all()) == (silent, dark)
    with pytest.raises(ValueError, match="mask='sound'; wanted"):
        read(film(), mask="sound")


@torch.no_grad()
def test_a_batch_is_its_singles_and_a_seed_repeats(model):
    samples = [Sample("What happens in the film?", clip=film()), Sample("What?", clip=film(5, 0)),
               Sample("Hello?"), Sample("And then?", clip=film(), history=(("What?", "A dog."),))]
    model.greedy = True
    greedy = model.generate(samples)
    assert greedy == [model.generate([sample])[0] for sample in samples]
    row = model.llm_input(model.encode_sample(samples[0]), 8)
    ids = generate(model.llm, [row], 8, lambda ids: False)[0]
    assert ids == model.llm.generate(embeds=row[None], max_new_tokens=8, eos_id=-1)[0]
    model.greedy, model.seed, told = False, 0, set()
    for seed in (0, 1, 2):
        model.seed = seed
        said = model.generate(samples)
        assert said == [model.generate([sample])[0] for sample in reversed(samples)][::-1]
        told.add(tuple(said))
    model.seed = 0
    assert len(told | {tuple(greedy)}) == 4
    with pytest.raises(ValueError, match="num_beams=3; wanted"):
        model.generate(samples, num_beams=3)


def test_an_answer_ends_before_the_next_turn(model):
    """At ###, however it is spelt, or at </s>."""
    encode = model.tokenizer.encode
    for text in ("A dog.###", "A dog.\n###Human:", "A dog. ### Human", "###Assistant: A dog.###"):
        ids, read = encode(text), []
        for i in ids:
            read.append(i)
            if model.ended(read):
                break
        assert "###" in model.tokenizer.decode(read)
    assert model.text_of(encode("A dog. ### Human: what")) == "A dog."
    assert model.text_of(encode("Assistant: A dog.###")) == "A dog."
    assert model.text_of([*encode("A dog."), 2]) == "A dog." and model.ended([5, 2])


def test_sampling_is_that_of_transformers():
    """Each id as often as top-k 50, then top-p 0.9 of transformers let it be drawn."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    scores = torch.randn(3, 400, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[0.3], [2.0], [9.0]])
    warped = TopPLogitsWarper(TOP_P)(None, TopKLogitsWarper(TOP_K)(None, scores))
    wanted, count = warped.softmax(-1), torch.zeros(3, 400)
    for step in range(4000):
        token = pick(scores, torch.full((3,), (step + 0.5) / 4000))
        count.scatter_add_(1, token, torch.ones(3, 1))
    assert (count / 4000 - wanted).abs().max() < 5e-4
    assert (count > 0).sum(-1).tolist()[2] == (wanted[2] > 0).sum() < 10


@torch.no_grad()
def test_a_long_prompt_loses_its_front(model):
    sample = model.encode_sample(Sample("what " * 3000, clip=film()))
    with pytest.warns(UserWarning, match="are cut off, sound and picture first"):
        row = model.llm_input(sample, 8)
    assert len(row) == 2000 - 8
    whole = model.llm.embed(torch.tensor(model.pieces_of(sample)[0][-1]))
    assert torch.equal(row[-50:], whole[-50:])
    with pytest.raises(ValueError, match="an answer of 2000 tokens; wanted less than 2000"):
        model.llm_input(sample, 2000)


# ---- parts that are wrong -----------------------------------------------------------------------

def test_parts_that_are_wrong(sources, small_parts, tmp_path):
    def load(**changed):
        parts = {"visual": sources["visual"], "whisper": sources["video_llama"],
                 "llm": sources["llm"]} | changed
        return VideoLlama.from_config(system_preset("video-llama", "tiny", parts))

    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; wanted Vicuna-7B v0.*#"):
        load(llm="nowhere")
    with pytest.raises(ValueError, match="an InstructBLIP; wanted Vicuna-7B v0"):
        load(llm=str(small_parts / "instructblip"))
    for folder in ("nowhere", sources["llm"]):
        with pytest.raises(FileNotFoundError, match=f"{folder}: no folder .*tools.convert PTH"):
            load(whisper=folder)
    with pytest.raises(ValueError, match="model_type is 'instructblip'; .*blip2-flan-t5-xxl"):
        load(visual=str(small_parts / "instructblip"))
    config = hub.read_json(Path(sources["visual"]) / "config.json")
    config["vision_config"] = {}                                      # the published size
    for text, fits in (({"model_type": "opt"}, False), ({"model_type": "t5", "d_model": 2048},
                       False), ({"model_type": "t5", "d_model": 4096}, True)):
        config["text_config"], config["qformer_config"] = text, {}
        hub.write_json(tmp_path / "config.json", config)
        if fits:
            assert Blip2Encoder.sizes(tmp_path)[0].width == 1408
        else:
            with pytest.raises(ValueError, match="text_config has .*blip2-flan-t5-xxl"):
                Blip2Encoder.sizes(tmp_path)
    for name, part, message in (("llm", small_parts / "llama", ".bin files only, .*tools.convert"),
                                ("whisper", Path(sources["video_llama"]), "no model.safetensors")):
        folder = tmp_path / f"{name}-without-weights"               # told before anything is read
        folder.mkdir()
        for file in (file for file in part.iterdir() if file.name != "model.safetensors"):
            (folder / file.name).symlink_to(file)
        if name == "llm":
            (folder / "pytorch_model.bin").touch()
        with pytest.raises(FileNotFoundError, match=f"{name}-without-weights: {message}"):
            load(visual="nowhere", **{name: str(folder)})
    llm = Llama.from_pretrained(small_parts / "llama")
    for name, change in (("delta", lambda: llm.model.norm.weight.data.mul_(0.01)),
                         ("wide", lambda: None)):
        change()
        folder = tmp_path / name
        if name == "wide":
            Llama(LlamaConfig(vocab_size=400, width=40, layers=1, heads=2, kv_heads=2, ffn=48)
                  ).save_pretrained(folder)
        else:
            llm.save_pretrained(folder)
        (folder / "tokenizer.model").symlink_to(small_parts / "llama" / "tokenizer.model")
    with pytest.raises(ValueError, match="a delta that has not been added to LLaMA; wanted Vicuna"):
        load(llm=str(tmp_path / "delta"))
    with pytest.raises(ValueError, match="embeddings of the LLM are 40 wide, .* made for 32"):
        load(llm=str(tmp_path / "wide"))


def test_ids_are_forced_and_rows_cut_as_third_parties_publish_vicuna(sources, tmp_path):
    """bos 0, eos 1, pad -1, and a row of embeddings behind the tokenizer's last id."""
    llm = randomise(Llama(LlamaConfig(vocab_size=401, width=32, layers=1, heads=2, kv_heads=2,
                                      ffn=48)))
    llm.save_pretrained(tmp_path)
    config = hub.read_json(tmp_path / "config.json")
    hub.write_json(tmp_path / "config.json", config | {
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1})
    (tmp_path / "tokenizer.model").symlink_to(Path(sources["llm"]) / "tokenizer.model")
    model, folder = load_system("video-llama", system_preset("video-llama", "tiny", {
        "visual": sources["visual"], "whisper": sources["video_llama"], "llm": str(tmp_path)}))
    assert (model.bos, model.eos, model.llm.config.vocab_size, folder) == (1, 2, 400, None)
    assert torch.equal(model.llm.lm_head.weight, llm.lm_head.weight[:400])


def test_a_later_vicuna_is_named():
    from baselines.vicuna import check_llm
    with warnings.catch_warnings(record=True) as told, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        for rows, eps in ((32001, 1e-6), (32000, 1e-5)):
            patch.setattr(LlamaConfig, "from_folder", classmethod(
                lambda cls, root, rows=rows, eps=eps: cls(vocab_size=rows, eps=eps)))
            check_llm("miniature/weights/llama")
    assert len(told) == 1 and "32000 rows of embeddings and eps 1e-05, but" in str(told[0].message)


# ---- through eval.py ----------------------------------------------------------------------------

def test_the_miniatures_tasks_from_files_to_a_table(sources, small_miniature, tmp_path, capfd):
    """All tasks that the miniature has, cached and not, sampled twice with one seed, and greedy."""
    said = {}
    for name, more in (("cached", {}), ("fresh", {"cache_features": False}), ("other", {"seed": 1}),
                       ("greedy", {"greedy": True}), ("again", {})):
        out = tmp_path / f"{name}.jsonl"
        evaluation.main(evaluation.EvalConfig(
            system="video-llama", data=str(small_miniature), out=str(out),
            features=str(tmp_path / "features"), **sources, **more))
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        said[name] = [row["both"] for row in rows]
    assert {row["task"] for row in rows} == {"ic", "ocr", "vqa", "videoqa", "avsd", "avssd", "avm"}
    assert said["cached"] == said["again"] and said["cached"] != said["other"]
    assert said["greedy"] not in (said["cached"], said["other"])
    same = sum(a == b for a, b in zip(said["cached"], said["fresh"], strict=True))
    assert same > 0.5 * len(rows)                 # the cache rounds to fp16, which is in the dice
    shown = capfd.readouterr().out
    assert "| **avssd**" in shown and "| **vqa**" in shown and "asr" not in shown
    report = json.loads((tmp_path / "greedy.json").read_text())["settings"]
    assert report["system"] == "video-llama" and report["decoding"] == "greedy"
    assert report["mixture"] == {} and report["cached features"] is True
    index = next((tmp_path / "features").rglob("*.jsonl")).read_text()
    assert '"times": [0.0, ' in index             # for the prompt of a silent video


def test_cached_vectors_depend_on_the_code_of_every_part(model, monkeypatch):
    """Also on that of the filter bank and of the ViT, which lie in files of their own."""
    read = []
    monkeypatch.setattr(feature_cache, "source_hash", lambda *things: read.extend(things) or "")
    feature_cache.fingerprint(model, model.clip_options())
    assert {thing.__name__ for thing in read} >= {
        "baselines.video_llama", "baselines.imagebind", "baselines.blip2", "vit_qformer"}


def test_the_papers_column_stands_beside_ours(sources, small_miniature, tmp_path, capfd):
    from data import read_manifest, write_manifest
    records = [dataclasses.replace(r, meta={"dataset": "gqa", "metrics": ["word_match"]})
               for r in read_manifest(small_miniature / "test.jsonl") if r.task == "vqa"][:2]
    write_manifest(tmp_path / "vqa.jsonl", records)
    evaluation.main(evaluation.EvalConfig(
        system="video-llama", task="vqa", data=str(tmp_path), out=str(tmp_path / "said.jsonl"),
        **sources))
    table = next(line for line in capfd.readouterr().out.splitlines() if "Video-LLaMA 7B" in line)
    assert table.endswith("| ours |")


def test_flags(capsys):
    settings = evaluation.EvalConfig
    assert settings(system="video-llama", model="7b").tasks == VideoLlama.tasks
    for wrong, message in [
            ({"task": "asr"}, "--system video-llama can do ic,"), ({"beams": 5}, "--beams does"),
            ({"compile": True}, "--compile does not go with --system video-llama"),
            ({"checkpoint": "runs/7b/best"}, "--checkpoint does not go")]:
        with pytest.raises(ValueError, match=message):
            settings(system="video-llama", **wrong)
    with pytest.raises(ValueError, match="--greedy does not go with --system favor"):
        settings(greedy=True)
    with pytest.raises(SystemExit, match="for --model tiny pass --visual, --video-llama and --llm"):
        evaluation.resolve_config(settings(system="video-llama"))
    with pytest.raises(SystemExit, match="vicuna-7b-v0: no such folder; wanted Vicuna-7B v0"):
        evaluation.resolve_config(settings(system="video-llama", model="7b"))
    evaluation.dry_run(settings(system="video-llama", model="7b", dry_run=True, batch=1))
    shown = capsys.readouterr().out
    assert "| ImageBind's audio trunk | 86,235,649 |" in shown and "| weights | 14.8 |" in shown
    assert "training step" not in shown
    evaluation.dry_run(settings(dry_run=True))
    assert "| answering |" in capsys.readouterr().out.replace("training step | ", "")


def test_random_weights_of_the_sizes_of_folders(sources, small_miniature, tmp_path):
    model, _ = load_system("video-llama", system_preset("video-llama", "tiny", {
        "visual": sources["visual"], "whisper": sources["video_llama"], "llm": sources["llm"]}),
        load=memory.random_part, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    said = model.generate([Sample("What?", clip=film())], max_new_tokens=3)
    assert len(said) == 1 and isinstance(said[0], str)
    with pytest.raises(ValueError, match="vicuna: its sizes are not known here"):
        memory.random_part(Llama, "vicuna")
    assert isinstance(model.branches.llama_proj, nn.Linear) and favor.preset("7b").beams == 1
