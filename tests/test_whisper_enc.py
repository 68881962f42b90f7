"""whisper_enc.py against transformers' Whisper on tiny random weights, and its own promises."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from parity import check, randomise

import whisper_enc
from runtime import hub
from whisper_enc import WhisperConfig, WhisperEncoder, log_mel_spectrogram, resample

# heads != layers and odd widths; 50 positions are chunks of 50 * 2 * 160 = 16000 samples = 1 s.
TINY = {"vocab_size": 97, "d_model": 40, "encoder_layers": 3, "encoder_attention_heads": 5,
        "encoder_ffn_dim": 72, "decoder_layers": 1, "decoder_attention_heads": 5,
        "decoder_ffn_dim": 16, "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1, "attn_implementation": "eager"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The oracle, our encoder from its folder, and the folder."""
    root = tmp_path_factory.mktemp("whisper")
    config = transformers.WhisperConfig(**TINY)
    oracle = randomise(transformers.WhisperForConditionalGeneration(config)).eval()
    oracle.save_pretrained(root)
    return SimpleNamespace(oracle=oracle, hf=oracle.model.encoder, root=root,
                           ours=WhisperEncoder.from_pretrained(root))


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32") * 0.1


def outputs_of(modules):
    """A list that fills with the outputs of `modules` in the order in which they run."""
    seen = []
    for module in modules:
        module.register_forward_hook(
            lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    return seen


# ---- log-mel ------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_samples", [1, 16000, 70001, 480000, 500001])
def test_log_mel_is_the_feature_extractors(n_samples):
    extractor, audio = transformers.WhisperFeatureExtractor(), noise(2, n_samples)
    audio[1] *= 1e-3                      # a quiet item: its floor must not come from the loud one
    ours = log_mel_spectrogram(audio)
    assert ours.shape == (2, 80, 3000) and ours.dtype == torch.float32
    theirs = extractor(list(audio), sampling_rate=16000, return_tensors="pt").input_features
    check(f"log-mel of {n_samples} samples", ours, theirs)
    padded = np.pad(audio[1], (0, 480000))[:480000]
    in_numpy = extractor._np_extract_fbank_features(padded[None], "cpu")
    check("log-mel, float64 numpy path", ours[1:], torch.tensor(in_numpy))


def test_log_mel_of_silence_and_of_nothing():
    for audio in (torch.zeros(16000), torch.zeros(0), np.zeros((2, 5))):
        assert (log_mel_spectrogram(audio) == -1.5).all()
    assert log_mel_spectrogram(torch.zeros(7)).shape == (1, 80, 3000)


def test_padding_and_company_change_nothing():
    audio = torch.from_numpy(noise(2, 50000))
    both = log_mel_spectrogram(audio)
    assert torch.equal(both[:1], log_mel_spectrogram(audio[0]))
    padded = torch.nn.functional.pad(audio, (0, 1234))
    assert torch.equal(both, log_mel_spectrogram(padded))


@pytest.mark.parametrize("audio, message", [
    (torch.zeros(1, 1, 8), r"\(1, 1, 8\); wanted \(S,\) or \(B,S\)"),
    (torch.tensor(0.5), "wanted"),
    (torch.zeros(8, dtype=torch.int16), "int16.*divide by 32768"),
    (torch.tensor([0.0, float("nan")]), "NaN")])
def test_bad_audio_is_refused(audio, message):
    with pytest.raises(ValueError, match=message):
        log_mel_spectrogram(audio)


def test_resample():
    seconds = torch.arange(44100) / 44100
    ours = resample(torch.sin(2 * torch.pi * 440 * seconds), 44100)
    wanted = torch.sin(2 * torch.pi * 440 * torch.arange(16000) / 16000)
    assert ours.shape == (16000,) and (ours - wanted)[100:-100].abs().max() < 1e-2
    audio = torch.randn(100)
    assert torch.equal(resample(audio, 16000), audio)
    assert resample(torch.zeros(0), 44100).shape == (0,)


# ---- encoder ------------------------------------------------------------------------------------

def test_encoder_stage_by_stage(tiny):
    mel = torch.randn(3, 80, 100)
    stages = ["conv1", "conv2", *(f"block {i}" for i in range(3)), "final norm"]
    ours = outputs_of([tiny.ours.conv1, tiny.ours.conv2, *tiny.ours.layers, tiny.ours.layer_norm])
    theirs = outputs_of([tiny.hf.conv1, tiny.hf.conv2, *tiny.hf.layers, tiny.hf.layer_norm])
    out, wanted = tiny.ours(mel), tiny.hf(mel).last_hidden_state
    assert len(ours) == len(theirs) == len(stages)
    for stage, a, b in zip(stages, ours, theirs, strict=True):
        check(f"Whisper {stage}", a, b)
    check("Whisper output", out, wanted)


def test_bf16(tiny):
    mel = torch.randn(2, 80, 100)
    ours = WhisperEncoder.from_pretrained(tiny.root, dtype=torch.bfloat16)(mel)
    assert ours.dtype == torch.bfloat16
    check("Whisper bf16", ours, tiny.hf(mel).last_hidden_state, max_abs=1e9, rel_rms=2e-2)


def test_fp16_stays_finite(tiny):
    encoder = WhisperEncoder.from_pretrained(tiny.root, dtype=torch.float16)
    encoder.layers[0].fc2.bias.fill_(60000.0)
    encoder.layers[1].fc2.bias.fill_(60000.0)          # 60000 + 60000 would be infinite in fp16
    assert encoder(torch.randn(1, 80, 100)).isfinite().all()


def test_positions_are_the_fixed_table():
    config = transformers.WhisperConfig(**TINY)
    table = transformers.WhisperModel(config).encoder.embed_positions.weight
    check("sinusoids", whisper_enc.sinusoids(50, 40), table, max_abs=1e-6)
    ours = WhisperEncoder(WhisperConfig(width=40, layers=1, heads=5, max_source_positions=50))
    check("initial positions", ours.embed_positions.weight, table, max_abs=1e-6)


def test_shorter_mels_run_and_longer_ones_are_refused(tiny):
    assert tiny.ours(torch.randn(2, 80, 31)).shape == (2, 16, 40)
    for shape in [(1, 80, 101), (1, 79, 100), (80, 100), (1, 80, 0)]:
        with pytest.raises(ValueError, match="wanted"):
            tiny.ours(torch.randn(shape))


@pytest.mark.parametrize("n_samples", [1, 320, 321, 15999, 16000, 16001, 25000, 16000 * 9 + 7])
def test_audio_of_any_length_is_encoded_in_chunks(tiny, n_samples):
    """Each second here (30 s in large-v2) as if alone, cut to ceil(n_samples / 320) vectors."""
    audio = noise(n_samples)
    ours = tiny.ours.encode(audio)
    assert ours.shape == (-(-n_samples // 320), 40)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    chunks = [audio[i:i + 16000] for i in range(0, n_samples, 16000)]
    mel = extractor(chunks, sampling_rate=16000, return_tensors="pt").input_features
    theirs = tiny.hf(mel).last_hidden_state.flatten(0, 1)[:len(ours)]
    check(f"{n_samples} samples in {len(chunks)} chunks", ours, theirs)


def test_encode_nothing_and_stereo(tiny):
    assert tiny.ours.encode(torch.zeros(0)).shape == (0, 40)
    with pytest.raises(ValueError, match="mono"):
        tiny.ours.encode(torch.zeros(2, 100))


def test_chunks_are_batched_in_bounded_groups(tiny):
    """An hour must not become one batch of 120 chunks."""
    convolved = outputs_of([tiny.ours.conv1])
    tiny.ours.encode(noise(16000 * 19))
    assert [len(x) for x in convolved] == [8, 8, 3]


# ---- files --------------------------------------------------------------------------------------

def test_config_and_its_defaults(tiny, tmp_path):
    large = WhisperConfig()
    assert (large.chunk_samples, large.positions_hz) == (480000, 50)
    (tmp_path / "config.json").write_text("{}")
    assert WhisperConfig.from_folder(tmp_path) == large
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"hop_length": 80, "n_fft": 200, "sampling_rate": 16000, "feature_size": 80}))
    assert WhisperConfig.from_folder(tmp_path) == dataclasses.replace(large, hop=80, n_fft=200)
    (tmp_path / "preprocessor_config.json").write_text('{"feature_size": 128}')
    with pytest.raises(ValueError, match="feature_size 128.*num_mel_bins 80"):
        WhisperConfig.from_folder(tmp_path)


def extractor(root, **settings):
    """The WhisperProcessor's files of transformers 5: all in processor_config.json."""
    theirs = transformers.WhisperFeatureExtractor(chunk_length=1, **settings)
    hub.write_json(root / "processor_config.json", {
        "processor_class": "WhisperProcessor", "feature_extractor": theirs.to_dict()})
    return theirs


def test_settings_in_processor_config(tiny, tmp_path):
    """Read where transformers 5 writes them: the mel of another hop and window is its extractor's.
    """
    hub.write_json(tmp_path / "config.json", hub.read_json(tiny.root / "config.json") | {
        "max_source_positions": 20})
    theirs, audio = extractor(tmp_path, hop_length=400, n_fft=512), noise(16000)
    config = WhisperConfig.from_folder(tmp_path)
    assert (config.hop, config.n_fft, config.chunk_samples) == (400, 512, 16000)
    mel = log_mel_spectrogram(torch.from_numpy(audio), config.chunk_samples, config.n_fft,
                              config.hop)
    wanted = theirs(audio, sampling_rate=16000, return_tensors="pt").input_features
    check("log-mel, hop 400", mel, wanted)
    same = theirs.to_dict()
    hub.write_json(tmp_path / "preprocessor_config.json", same)
    assert WhisperConfig.from_folder(tmp_path) == config
    hub.write_json(tmp_path / "preprocessor_config.json", same | {"hop_length": 160})
    with pytest.raises(ValueError, match=r"\bprocessor_config.json: hop_length 400, but .*"
                                         r"preprocessor_config.json has 160"):
        WhisperConfig.from_folder(tmp_path)


@pytest.mark.parametrize("change", [
    {"sampling_rate": 8000}, {"padding_side": "left"}, {"padding_value": 1.0}, {"dither": 0.1},
    {"feature_extractor_type": "SeamlessM4TFeatureExtractor"}, {"feature_size": 128},
    {"chunk_length": 30}, {"n_samples": 480000}, {"nb_max_frames": 3000}, {"hop_length": 0},
    {"n_fft": "400"}, {"chunk_length": float("nan")}])
def test_settings_that_are_not_built_are_named(tiny, tmp_path, change):
    config = hub.read_json(tiny.root / "config.json")
    settings = transformers.WhisperFeatureExtractor(chunk_length=1).to_dict() | change
    for file, value in (("preprocessor_config.json", settings),
                        ("processor_config.json", {"feature_extractor": settings})):
        folder = tmp_path / file
        folder.mkdir()
        hub.write_json(folder / "config.json", config)
        hub.write_json(folder / file, value)
        with pytest.raises(ValueError, match=rf"/{file}: {list(change)[0]}\b"):
            WhisperConfig.from_folder(folder)


@pytest.mark.parametrize("key, value", [
    ("encoder_layers", 10 ** 6), ("d_model", 0), ("d_model", -40), ("encoder_attention_heads", 0),
    ("encoder_attention_heads", 7), ("d_model", "40"), ("encoder_layers", 2.5), ("d_model", True),
    ("num_mel_bins", float("nan")), ("encoder_ffn_dim", [1]), ("max_source_positions", 2 ** 40),
    ("activation_function", "relu")])
def test_absurd_configs_are_named(tiny, tmp_path, key, value):
    tensors = {"model.encoder." + n: t for n, t in tiny.ours.state_dict().items()}
    hub.save_folder(tmp_path, tensors, hub.read_json(tiny.root / "config.json") | {key: value})
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        WhisperEncoder.from_pretrained(tmp_path)
    assert key in str(error.value) or "heads; wanted" in str(error.value)


@pytest.mark.parametrize("prefix", ["model.encoder.", "encoder.", ""])
def test_every_usual_prefix_loads(tiny, tmp_path, prefix):
    """WhisperForConditionalGeneration, WhisperModel, and the encoder alone: our own state_dict."""
    hub.save_folder(tmp_path, {prefix + n: t for n, t in tiny.ours.state_dict().items()},
                    hub.read_json(tiny.root / "config.json"))
    mel = torch.randn(1, 80, 100)
    encoder = WhisperEncoder.from_pretrained(tmp_path)
    assert torch.equal(encoder(mel), tiny.ours(mel))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_weights_that_do_not_fit_are_named(tiny, tmp_path):
    tensors = {"model.encoder." + n: t for n, t in tiny.ours.state_dict().items()}
    config = hub.read_json(tiny.root / "config.json")
    del tensors["model.encoder.layers.1.fc1.bias"]
    tensors["model.encoder.layers.1.self_attn.k_proj.bias"] = torch.zeros(40)
    tensors["model.encoder.conv1.weight"] = torch.zeros(40, 81, 3)
    hub.save_folder(tmp_path, tensors, config)
    with pytest.raises(ValueError) as error:
        WhisperEncoder.from_pretrained(tmp_path)
    for part in ["missing: layers.1.fc1.bias", "unknown: model.encoder.layers.1.self_attn.k_proj",
                 "wrong shape: model.encoder.conv1.weight [40, 81, 3], wanted [40, 80, 3]"]:
        assert part in str(error.value)
