"""baselines/whisper.py against transformers' Whisper on random weights, and its own promises."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from parity import check, randomise
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from baselines import whisper
from baselines.whisper import Whisper, WhisperDecoder, WhisperDecoderConfig, WhisperTokenizer
from runtime import hub
from whisper_enc import WhisperEncoder

TEXT = 300                            # ids below this one are text, as 50257 in the real vocabulary
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
           "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nocaptions|>",
           "<|notimestamps|>"]
END, START, EN, TRANSCRIBE, START_OF_PREV, NO_TIMES = (TEXT + SPECIAL.index(name) for name in (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|startofprev|>",
    "<|notimestamps|>"))
VOCAB = TEXT + len(SPECIAL) + 11      # and timestamps, which the real added_tokens.json lacks too
# Other numbers of heads and layers than in the encoder; 50 positions are chunks of 1 s.
TINY = {"vocab_size": VOCAB, "d_model": 40, "encoder_layers": 1, "encoder_attention_heads": 5,
        "encoder_ffn_dim": 24, "decoder_layers": 3, "decoder_attention_heads": 4,
        "decoder_ffn_dim": 72, "max_source_positions": 50, "max_target_positions": 30,
        "pad_token_id": END, "bos_token_id": END, "eos_token_id": END,
        "decoder_start_token_id": START, "attn_implementation": "eager"}
GENERATION = {"suppress_tokens": [*range(20, 90), START, NO_TIMES],
              "begin_suppress_tokens": [END, *range(100, 250)], "is_multilingual": True,
              "lang_to_id": {"<|en|>": EN}, "task_to_id": {"transcribe": TRANSCRIBE},
              "no_timestamps_token_id": NO_TIMES, "max_length": 30, "return_timestamps": False}


def write_tokenizer(root, special=SPECIAL):
    """A small byte-level BPE in both layouts; tokenizer.json made as transformers makes it, by
    adding the special tokens behind the vocabulary. There is an empty token, as in the real one."""
    words = ["what happens after the beep", " a red circle, a grey lamp", " naïve café 日本語"] * 9
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=TEXT - 1, initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False))
    assert bpe.get_vocab_size() == TEXT - 1
    bpe.model.save(str(root))
    vocab = json.loads((root / "vocab.json").read_text()) | {"": TEXT - 1}
    (root / "vocab.json").write_text(json.dumps(vocab))
    merges = [tuple(line.split()) for line in (root / "merges.txt").read_text().splitlines()[1:]]
    bpe.model = models.BPE(vocab, merges)
    bpe.add_special_tokens(special)
    bpe.save(str(root / "tokenizer.json"))
    (root / "added_tokens.json").write_text(json.dumps(
        {name: TEXT + i for i, name in sorted(enumerate(special), key=lambda pair: pair[1])}))


def tiny_oracle(root, seed=0, speak=False, **changes):
    """Random everywhere; its files and the tokenizer's in `root`."""
    oracle = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**TINY | changes))
    randomise(oracle, seed).eval()
    if speak:
        sharpen(oracle.model)
    for key, value in GENERATION.items():
        setattr(oracle.generation_config, key, value)
    oracle.save_pretrained(root)
    write_tokenizer(root)
    return oracle


@torch.no_grad()
def sharpen(model):
    """So that the answer depends on the sound and on the place, and ends sooner or later."""
    for part, factor in [(model.encoder.conv1, 10), (model.encoder.conv2, 4),
                         (model.decoder.embed_tokens, 6), (model.decoder.embed_positions, 40)]:
        part.weight *= factor
    for name, parameter in model.decoder.layers.named_parameters():
        if parameter.ndim == 2:
            parameter *= 6 if "q_proj" in name or "k_proj" in name else 4
    # The head has no bias; the last norm has, and an end token that lies along it is likelier.
    bias = model.decoder.layer_norm.bias
    model.decoder.embed_tokens.weight[END] += bias / bias.square().sum()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The oracle, ours and the folder."""
    root = tmp_path_factory.mktemp("plain")
    return SimpleNamespace(oracle=tiny_oracle(root), root=root, ours=Whisper.from_pretrained(root))


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Several that speak."""
    roots = [tmp_path_factory.mktemp("speaker") for _ in range(5)]
    return [SimpleNamespace(oracle=tiny_oracle(root, seed, speak=True), root=root,
                            ours=Whisper.from_pretrained(root)) for seed, root in enumerate(roots)]


@pytest.fixture
def tiny(speakers):
    return speakers[3]


def some_ids(rows=3, length=11, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def some_audio(*lengths, seed=0):
    """Chords that swell, and a little noise."""
    generator, audios = torch.Generator().manual_seed(seed), []
    for n in lengths:
        seconds, hertz = torch.arange(n) / 16000, torch.rand(3, 1, generator=generator) * 6000
        chord = (2 * torch.pi * hertz * seconds).sin().sum(0) * (seconds % 1)
        audios.append(0.2 * chord + 0.01 * torch.randn(n, generator=generator))
    return audios


def theirs(oracle, audios, prefix=(START, EN, TRANSCRIBE, NO_TIMES), **settings):
    """transformers' new ids, cut at the end token. One call: else it would go on after a timestamp,
    which only random weights produce here."""
    extractor = transformers.WhisperFeatureExtractor(chunk_length=1)
    mel = extractor([a.numpy() for a in audios], sampling_rate=16000,
                    return_tensors="pt").input_features
    task = {"language": "en", "task": "transcribe"} if EN in prefix else {}
    rows = oracle.generate(mel, force_unique_generate_call=True, **task, **settings).tolist()
    assert all(row[:len(prefix)] == list(prefix) for row in rows)
    rows = [row[len(prefix):] for row in rows]
    return [row[:row.index(END)] if END in row else row for row in rows]


def ours(whisper, audios, **settings):
    return whisper.generate(torch.stack([whisper.encoder.encode(torch.nn.functional.pad(
        audio, (0, 16000 - len(audio)))) for audio in audios]), **settings)


# ---- decoder ------------------------------------------------------------------------------------

def outputs_of(modules):
    seen = []
    for module in modules:
        module.register_forward_hook(
            lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    return seen


@torch.no_grad()
def test_decoder_stage_by_stage(plain):
    encoded, ids = torch.randn(3, 50, 40), some_ids()
    a, b = plain.ours.decoder, plain.oracle.model.decoder
    stages = ["embedding", *(f"block {i}" for i in range(3)), "final norm"]
    mine, wanted = (outputs_of([d.embed_tokens, *d.layers, d.layer_norm]) for d in (a, b))
    logits = a(ids, a.listen(encoded))
    reference = plain.oracle(decoder_input_ids=ids, encoder_outputs=(encoded,)).logits
    assert len(mine) == len(wanted) == len(stages)
    for stage, x, y in zip(stages, mine, wanted, strict=True):
        check(f"Whisper decoder {stage}", x, y)
    check("Whisper decoder logits", logits, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(plain, dtype):
    decoder = Whisper.from_pretrained(plain.root, dtype=dtype).decoder
    encoded, ids = torch.randn(3, 50, 40), some_ids()
    logits = decoder(ids, decoder.listen(encoded.to(dtype)))
    assert logits.dtype == dtype
    reference = plain.oracle(decoder_input_ids=ids, encoder_outputs=(encoded,)).logits
    check(f"Whisper decoder {dtype}", logits, reference, max_abs=1e9, rel_rms=2e-2)


@pytest.mark.parametrize("steps", [(1,) * 11, (4, 1, 1, 5), (10, 1)])
@torch.no_grad()
def test_cache_equals_no_cache(plain, steps):
    decoder, ids, encoded = plain.ours.decoder, some_ids(), torch.randn(3, 50, 40)
    cache = decoder.listen(encoded)
    parts = [decoder(part, cache) for part in ids.split(steps, dim=1)]
    check(f"cache in steps {steps}", torch.cat(parts, 1), decoder(ids, decoder.listen(encoded)))


@torch.no_grad()
def test_beams_share_the_sound_of_their_chunk(plain):
    """Two chunks of three beams, reordered on the way, against six chunks from the start."""
    decoder, ids, encoded = plain.ours.decoder, some_ids(6, 9), torch.randn(2, 50, 40)
    rows = torch.tensor([2, 2, 0, 3, 5, 4])
    cache = decoder.listen(encoded)
    decoder(ids[:, :4], cache)
    cache.reorder(rows)
    after = decoder(ids[:, 4:], cache)
    whole = torch.cat((ids[rows, :4], ids[:, 4:]), dim=1)
    alone = decoder(whole, decoder.listen(encoded.repeat_interleave(3, dim=0)))
    check("beams of one chunk", after, alone[:, 4:])


@torch.no_grad()
def test_the_future_cannot_change_the_past(plain):
    decoder, ids, encoded = plain.ours.decoder, some_ids(), torch.randn(3, 50, 40)
    before, ids[:, 7:] = decoder(ids, decoder.listen(encoded)), 5
    after = decoder(ids, decoder.listen(encoded))
    check("the past", after[:, :7], before[:, :7], max_abs=1e-6)
    assert not torch.allclose(after[:, 7:], before[:, 7:])


def test_more_tokens_than_positions(plain):
    decoder = plain.ours.decoder
    with pytest.raises(ValueError, match="31 tokens.* has positions for 30"):
        decoder(some_ids(1, 31), decoder.listen(torch.randn(1, 50, 40)))


@torch.no_grad()
def test_full_width():
    """Width, heads and vocabulary of large-v2."""
    sizes = {"vocab_size": 51865, "d_model": 1280, "decoder_layers": 2,
             "decoder_attention_heads": 20, "decoder_ffn_dim": 5120, "max_target_positions": 8}
    config = transformers.WhisperConfig(**sizes, attn_implementation="eager")
    with torch.device("meta"):
        oracle = transformers.models.whisper.modeling_whisper.WhisperDecoder(config)
        decoder = WhisperDecoder(WhisperDecoderConfig(layers=2, max_target_positions=8))
    oracle = randomise(oracle.to_empty(device="cpu")).eval()
    decoder = decoder.to_empty(device="cpu")
    decoder.load_state_dict(oracle.state_dict())
    ids, encoded = torch.randint(51865, (2, 8)), torch.randn(2, 100, 1280)
    reference = oracle(ids, encoder_hidden_states=encoded).last_hidden_state
    reference = reference @ oracle.embed_tokens.weight.T
    logits = decoder(ids, decoder.listen(encoded))
    check("full width, fp32", logits, reference, max_abs=1e-3, rel_rms=1e-5)
    del oracle, logits
    decoder = decoder.bfloat16()
    logits = decoder(ids, decoder.listen(encoded.bfloat16()))
    check("full width, bf16", logits, reference, max_abs=1e9, rel_rms=3e-2)


def test_large_v2_names_and_shapes():
    """The published large-v2 holds 1259 tensors, 487 of them the encoder's."""
    with torch.device("meta"):
        encoder, decoder = WhisperEncoder(), WhisperDecoder()
    shapes = {name: list(p.shape) for name, p in decoder.named_parameters()}
    assert len(shapes) + len(list(encoder.parameters())) == 1259
    assert sum(p.numel() for m in (encoder, decoder) for p in m.parameters()) == 1_543_304_960
    assert shapes["layers.31.encoder_attn.k_proj.weight"] == [1280, 1280]
    assert shapes["embed_positions.weight"] == [448, 1280]
    assert "layers.31.encoder_attn.k_proj.bias" not in shapes and "proj_out.weight" not in shapes


# ---- generation ---------------------------------------------------------------------------------

@pytest.mark.parametrize("beams", [1, 5])
def test_generates_what_transformers_generates(speakers, beams):
    lengths, distinct, changed = set(), set(), 0
    for seed, pair in enumerate(speakers):
        audios = some_audio(16000, 9000, 12345, 16000, seed=seed)
        new = ours(pair.ours, audios, beams=beams, max_new_tokens=14)
        assert new == theirs(pair.oracle, audios, num_beams=beams, max_new_tokens=14)
        lengths |= {len(row) for row in new}
        distinct |= {tuple(row) for row in new}
        banned, pair.ours.banned = pair.ours.banned, torch.zeros_like(pair.ours.banned)
        changed += ours(pair.ours, audios, beams=beams, max_new_tokens=14) != new
        pair.ours.banned = banned
    print(f"{beams} beams: lengths {sorted(lengths)}, {len(distinct)} answers of 20 differ, "
          f"suppressing ids changed {changed} of 5 batches")
    assert len(lengths) >= 5 and min(lengths) < 5 and max(lengths) == 14
    assert len(distinct) >= 12 and changed >= 4


@pytest.mark.parametrize("beams", [1, 5])
def test_every_position_is_used_by_default(speakers, beams):
    audios = some_audio(16000, 8000)
    for pair in speakers[:2]:
        new = ours(pair.ours, audios, beams=beams)
        assert new == theirs(pair.oracle, audios, num_beams=beams)
        assert new == ours(pair.ours, audios, beams=beams, max_new_tokens=26)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 27}, {"max_new_tokens": 0}, {"beams": 0}])
def test_generate_errors(tiny, settings):
    with pytest.raises(ValueError, match="wanted 1 to 26 .* at least 1"):
        tiny.ours.transcribe(some_audio(100), **settings)


def test_generates_in_bf16(tiny):
    whisper = Whisper.from_pretrained(tiny.root, dtype=torch.bfloat16)
    texts = whisper.transcribe(some_audio(16000, 20000), beams=2, max_new_tokens=5)
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts)


def test_suppressed_ids_come_from_config_where_there_is_no_generation_config(tiny, tmp_path):
    root = shutil.copytree(tiny.root, tmp_path / "old")
    (root / "generation_config.json").unlink()
    config = hub.read_json(root / "config.json")
    names = ["suppress_tokens", "begin_suppress_tokens"]
    hub.write_json(root / "config.json", config | dict.fromkeys(names))
    assert not Whisper.from_pretrained(root).banned.any()
    hub.write_json(root / "config.json", config | {name: GENERATION[name] for name in names})
    assert torch.equal(Whisper.from_pretrained(root).banned, tiny.ours.banned)
    assert tiny.ours.banned.sum(1).tolist() == [72 + 151, 72]


def test_prefix(tiny, tmp_path):
    """English-only: no such tokens, or the file says so, or the published size does."""
    assert tiny.ours.prefix == [START, EN, TRANSCRIBE, NO_TIMES]
    parts, tokenizer = (tiny.ours.encoder, tiny.ours.decoder), tiny.ours.tokenizer
    assert Whisper(*parts, tokenizer, {"is_multilingual": False}).prefix == [START, NO_TIMES]
    with torch.device("meta"):
        large = WhisperDecoder(WhisperDecoderConfig(vocab_size=51864, layers=0))
    assert Whisper(parts[0], large, tokenizer, {}).prefix == [START, NO_TIMES]
    write_tokenizer(tmp_path, ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"])
    assert Whisper(*parts, WhisperTokenizer(tmp_path), {}).prefix == [TEXT + 1, TEXT + 2]
    with torch.device("meta"):
        small = WhisperDecoder(WhisperDecoderConfig(vocab_size=300, layers=0))
    with pytest.raises(ValueError, match="decoder knows 300 ids; take both from one model"):
        Whisper(parts[0], small, tokenizer, {})


def test_english_only_is_transformers(tiny, tmp_path):
    root = shutil.copytree(tiny.root, tmp_path / "en")
    settings = {"decoder_start_token_id": START, "no_timestamps_token_id": NO_TIMES,
                "is_multilingual": False, "max_length": 30, "eos_token_id": END,
                "pad_token_id": END, "return_timestamps": False}
    hub.write_json(root / "generation_config.json", settings)
    oracle = transformers.WhisperForConditionalGeneration.from_pretrained(root)
    whisper, audios = Whisper.from_pretrained(root), some_audio(16000, 9000)
    assert whisper.prefix == [START, NO_TIMES]
    assert ours(whisper, audios, max_new_tokens=9) == theirs(
        oracle, audios, whisper.prefix, max_new_tokens=9)


# ---- audio -> text ------------------------------------------------------------------------------

@pytest.mark.parametrize("beams", [1, 5])
def test_a_batch_equals_its_singles(tiny, beams, monkeypatch):
    """Nine short ones, more than run at once, and two long ones."""
    monkeypatch.setattr(whisper, "TEMPERATURES", (0.0, 0.2))
    audios = some_audio(16000, 300, 24000, 16001, 7000, 9000, 333, 5000, 16000, 8000, 12000)
    settings = {"beams": beams, "max_new_tokens": 8}
    batch = tiny.ours.transcribe(audios, **settings)
    assert batch == [tiny.ours.transcribe([audio], **settings)[0] for audio in audios]
    assert batch == tiny.ours.transcribe([audio.numpy() for audio in audios], **settings)
    assert len(set(batch)) > 3


def test_chunks_are_batched_in_bounded_groups(tiny):
    """A batch of 128 questions must not become one batch of 128 chunks, times the beams."""
    heard = outputs_of([tiny.ours.encoder.conv1])
    tiny.ours.transcribe(some_audio(*[16000] * 12), max_new_tokens=1)
    assert [len(x) for x in heard] == [8, 4]


# ---- more than 30 s (here 1 s) ------------------------------------------------------------------

@pytest.fixture(scope="module")
def long_speakers(tmp_path_factory):
    """Three that speak, with the 51 time stamps of a window of 1 s."""
    pairs = []
    for seed in (1, 2, 4):
        root = tmp_path_factory.mktemp("long")
        oracle = tiny_oracle(root, seed, speak=True, vocab_size=VOCAB + 40, max_target_positions=60)
        for name, value in (("prev_sot_token_id", START_OF_PREV), ("max_length", 60),
                            ("max_initial_timestamp_index", 20)):
            setattr(oracle.generation_config, name, value)
        oracle.generation_config.save_pretrained(root)
        pairs.append(SimpleNamespace(oracle=oracle, ours=Whisper.from_pretrained(root)))
    return pairs


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("told_before", [False, True])
def test_windows_of_long_audio_are_transformers(long_speakers, monkeypatch, beams, told_before):
    """The ids with time stamps of every window, without and with the text so far as context."""
    monkeypatch.setattr(whisper, "TEMPERATURES", (0.0,))          # transformers' default
    monkeypatch.setattr(whisper, "LEAST_LOGPROB", -torch.inf)
    monkeypatch.setattr(whisper, "FORGET", 0.5 if told_before else -1)
    windows = 0
    for seed, pair in enumerate(long_speakers):
        # It ends in silence: there transformers' spectrogram mirrors the sound, openai's does not.
        audio = torch.cat([*some_audio(16000, 16000, 8000, seed=seed), torch.zeros(960)])
        mel = transformers.WhisperFeatureExtractor(chunk_length=1)(
            audio.numpy(), sampling_rate=16000, return_tensors="pt", truncation=False,
            padding="longest").input_features
        wanted = [segment["tokens"].tolist() for segment in pair.oracle.generate(
            mel, return_timestamps=True, language="en", task="transcribe", temperature=0.0,
            condition_on_prev_tokens=told_before, num_beams=beams, max_new_tokens=14,
            return_segments=True)["segments"][0]]
        first = pair.ours.first_time            # the last one of a pair begins the next segment
        wanted = [ids[:-1] if len(ids) > 2 and ids[-2] >= first else ids for ids in wanted]
        got, real = [], pair.ours._segments

        def segments(ids, got=got, real=real):
            nonlocal windows
            windows += 1
            parts, ended = real(ids)
            got += parts
            return parts, ended
        monkeypatch.setattr(pair.ours, "_segments", segments)
        monkeypatch.setattr(pair.ours, "_has_words", lambda segment: True)
        pair.ours.transcribe([audio], beams=beams, max_new_tokens=14)
        assert got == wanted
    assert windows > 3 * 3


T0 = VOCAB - 11                                                   # <|0.00|>, of 0.02 s each


@pytest.mark.parametrize("ids, segments, ended", [
    ([T0, 1, 2, T0 + 9], [[T0, 1, 2, T0 + 9]], 0),                # one segment, then silence
    ([T0, 1, T0 + 4, T0 + 4, 2, T0 + 9], [[T0, 1, T0 + 4], [T0 + 4, 2, T0 + 9]], 0),
    ([T0, 1, T0 + 4, T0 + 6, 2, 3], [[T0, 1, T0 + 4]], 4),        # cut off: heard again
    ([T0, 1, T0 + 4, T0 + 4], [[T0, 1, T0 + 4]], 4),
    ([T0, 1, T0 + 4, T0 + 4, 2, T0 + 7, T0 + 8], [[T0, 1, T0 + 4], [T0 + 4, 2, T0 + 7]], 7),
    ([T0, 1, 2], [[T0, 1, 2]], 0), ([T0], [[T0]], 0), ([], [[]], 0)])
def test_segments_of_a_window(tiny, ids, segments, ended):
    assert tiny.ours.first_time == T0
    assert tiny.ours._segments(ids) == (segments, ended)


def scripted(tiny, monkeypatch, script, silence=0.0):
    """Decodes by a script {temperature: (text, score)} -> (temperatures, contexts) that it asks."""
    asked, encode = [], tiny.ours.tokenizer.bpe.encode

    def greedy(logits, cache, steps, times, temperature, generator):
        asked.append((temperature, cache.length - 3))
        text, score = script[min(script, key=lambda t: abs(t - temperature))]
        return [[T0, *encode(text).ids, T0 + 10]], [score]
    real = tiny.ours.decoder.forward

    def quiet(ids, cache):
        logits = torch.full_like(real(ids, cache), -99.0)
        logits[..., tiny.ours.first_time - 2] = 99.0 * (2 * silence - 1)
        return logits
    monkeypatch.setattr(tiny.ours, "_greedy", greedy)
    monkeypatch.setattr(tiny.ours.decoder, "forward", quiet)
    return asked


LOOP = " a red circle" * 30


@pytest.mark.parametrize("script, silence, temperatures, text", [
    ({0: (" a red lamp", -0.3)}, 0, [0.0], "a red lamp"),
    ({0: (" a red lamp", -0.3)}, 1, [0.0], "a red lamp"),             # a sure text is no silence
    ({0: (" a red lamp", -1.3)}, 1, [0.0], ""),
    ({0: (" a red lamp", -1.3), 0.4: (" a grey lamp", -0.9)}, 0, [0.0, 0.2, 0.4], "a grey lamp"),
    ({0: (LOOP, -0.1), 0.2: (" a grey lamp", -0.9)}, 0, [0.0, 0.2], "a grey lamp"),
    ({0: (" a red lamp", -1.3), 1: (" café", -1.1)}, 0, whisper.TEMPERATURES, "café"),
    ({0: (LOOP, -0.1), 1: (LOOP + " café", -0.3)}, 0, whisper.TEMPERATURES, LOOP.strip()),
    ({0: (LOOP, -0.1), 1: (" grey noise", -4.9)}, 0, whisper.TEMPERATURES, LOOP.strip())])
def test_what_is_decoded_again(tiny, monkeypatch, script, silence, temperatures, text):
    asked = scripted(tiny, monkeypatch, script, silence)
    said = tiny.ours.transcribe([torch.zeros(16001)])                 # 1 window and 1 frame less
    assert said == [text]
    assert [temperature for temperature, _ in asked] == [*temperatures]


def test_text_found_above_the_temperature_is_no_context(tiny, monkeypatch):
    for script, context in (({0: (" a", -0.3)}, 1 + 3), ({0: (" a", -3), 0.4: (" a", -0.3)}, 1 + 3),
                            ({0: (" a", -3), 0.8: (" a", -0.3)}, 0)):
        asked = scripted(tiny, monkeypatch, script)
        assert tiny.ours.transcribe([torch.zeros(32000)]) == ["a a"]
        assert (asked[0][1], asked[-1][1]) == (0, context)      # <|startofprev|> and three ids
        monkeypatch.undo()


def test_sampling_is_the_same_each_time_and_beside_others(tiny, monkeypatch):
    monkeypatch.setattr(whisper, "LEAST_LOGPROB", 0.0)                 # everything is a guess
    monkeypatch.setattr(whisper, "TEMPERATURES", (0.0, 0.8))
    long, short = some_audio(24000, 16000)
    alone = tiny.ours.transcribe([long], max_new_tokens=8)
    assert alone[0] and alone == tiny.ours.transcribe([long], max_new_tokens=8)
    both = tiny.ours.transcribe([short, long, short], max_new_tokens=8)
    assert both == [*tiny.ours.transcribe([short], max_new_tokens=8), *alone, both[0]]


@pytest.mark.parametrize("audios, message", [
    ([torch.zeros(9), torch.zeros(0)], r"audio 1 has shape \(0,\).*not empty"),
    ([torch.zeros(2, 9)], r"audio 0 has shape \(2, 9\); wanted \(S,\), mono"),
    (torch.zeros(9), r"audio 0 has shape \(\)"),
    ([torch.tensor([0.0, float("nan")])], "NaN")])
def test_audio_errors(tiny, audios, message):
    with pytest.raises(ValueError, match=message):
        tiny.ours.transcribe(audios)


def test_no_audio_no_text(tiny):
    assert tiny.ours.transcribe([]) == []


# ---- files --------------------------------------------------------------------------------------

def test_frozen_and_in_eval_mode(tiny):
    assert not any(module.training for module in tiny.ours.modules())
    assert not any(p.requires_grad for p in tiny.ours.parameters())
    assert set(tiny.ours.state_dict()) == {n.removeprefix("model.") for n in (
        tiny.oracle.state_dict()) if n != "proj_out.weight"}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_every_usual_prefix_loads(tiny, tmp_path, prefix):
    """WhisperForConditionalGeneration (with its tied head spelt out) and WhisperModel."""
    root = shutil.copytree(tiny.root, tmp_path / "copy")
    tensors = {prefix + name: tensor for name, tensor in tiny.ours.state_dict().items()}
    head = {"proj_out.weight": tiny.ours.decoder.embed_tokens.weight.clone()} if prefix else {}
    hub.save_folder(root, tensors | head, hub.read_json(root / "config.json"))
    audios, again = some_audio(16000, 9000), Whisper.from_pretrained(root)
    assert ours(again, audios, max_new_tokens=5) == ours(tiny.ours, audios, max_new_tokens=5)


def test_weights_that_do_not_fit_are_named(tiny, tmp_path):
    root = shutil.copytree(tiny.root, tmp_path / "copy")
    config = hub.read_json(root / "config.json")
    tensors = {"model." + name: tensor for name, tensor in tiny.ours.state_dict().items()}
    broken = dict(tensors)
    del broken["model.decoder.layers.1.encoder_attn.v_proj.bias"]
    broken["model.decoder.layers.1.encoder_attn.k_proj.bias"] = torch.zeros(40)
    broken["model.decoder.embed_positions.weight"] = torch.zeros(29, 40)
    hub.save_folder(root, broken, config)
    with pytest.raises(ValueError) as error:
        Whisper.from_pretrained(root)
    for part in ["do not fit WhisperDecoder", "missing: layers.1.encoder_attn.v_proj.bias (1)",
                 "unknown: model.decoder.layers.1.encoder_attn.k_proj.bias (1)",
                 "model.decoder.embed_positions.weight [29, 40], wanted [30, 40]"]:
        assert part in str(error.value)
    hub.save_folder(root, {n: t for n, t in tensors.items() if ".encoder." in n}, config)
    with pytest.raises(ValueError, match="missing: embed_positions.weight, embed_tokens.weight"):
        Whisper.from_pretrained(root)
    hub.save_folder(root, tensors, config | {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match="tie_word_embeddings is false"):
        Whisper.from_pretrained(root)


def test_config_defaults_are_large_v2s(tiny, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert WhisperDecoderConfig.from_folder(tmp_path) == WhisperDecoderConfig()
    assert tiny.ours.decoder.config == WhisperDecoderConfig(
        vocab_size=VOCAB, width=40, layers=3, heads=4, ffn=72, max_target_positions=30)


# ---- tokenizer ----------------------------------------------------------------------------------

def test_both_layouts_of_the_tokenizer_agree(tmp_path):
    write_tokenizer(tmp_path)
    whole = WhisperTokenizer(tmp_path)
    reference = transformers.WhisperTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    parts = WhisperTokenizer(tmp_path)
    ids = [*some_ids(8, 30).tolist(), list(range(VOCAB)), [], [NO_TIMES]]
    for text in [" what happens after the beep?", "Naïve café, 日本語 🙂",
                 "<|en|> a lamp<|endoftext|>"]:
        ids.append(whole.bpe.encode(text).ids)
        assert ids[-1] == parts.bpe.encode(text).ids
    assert [EN in row for row in ids[-3:]] == [False, False, True]
    for row in ids:
        assert whole.decode(row) == parts.decode(row)
        assert whole.decode(row) == reference.decode(row, skip_special_tokens=True).strip()
    assert whole.decode(ids[-1]) == "a lamp" and whole.decode(ids[-2]) == "Naïve café, 日本語 🙂"
    for name in SPECIAL:
        assert whole.ids[name] == parts.ids[name] == TEXT + SPECIAL.index(name)


def test_timestamps_are_no_text(tmp_path):
    """Newer files of the Hub list them, and not as special tokens."""
    write_tokenizer(tmp_path)
    bpe = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bpe.add_tokens(["<|0.00|>", "<|0.02|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = WhisperTokenizer(tmp_path)
    ids = tokenizer.bpe.encode("<|notimestamps|><|0.00|> a lamp<|0.02|><|endoftext|>").ids
    assert TEXT + len(SPECIAL) in ids and "<|0.00|>" in tokenizer.bpe.decode(ids)
    assert tokenizer.decode(ids) == "a lamp"


def test_either_layout_loads(tiny, tmp_path):
    root, audios = shutil.copytree(tiny.root, tmp_path / "copy"), some_audio(16000, 9000)
    wanted = tiny.ours.transcribe(audios)
    (root / "tokenizer.json").unlink()
    assert Whisper.from_pretrained(root).transcribe(audios) == wanted
    shutil.copy(tiny.root / "tokenizer.json", root)
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (root / name).unlink()
    assert Whisper.from_pretrained(root).transcribe(audios) == wanted


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "added_tokens.json"])
def test_missing_tokenizer(tiny, tmp_path, missing):
    root = shutil.copytree(tiny.root, tmp_path / "copy")
    (root / "tokenizer.json").unlink()
    (root / missing).unlink()
    with pytest.raises(FileNotFoundError) as error:
        Whisper.from_pretrained(root)
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
        assert name in str(error.value)


def test_tokenizer_of_another_model_or_broken(tmp_path):
    write_tokenizer(tmp_path, ["<|endoftext|>"])
    with pytest.raises(ValueError, match=r"no <\|startoftranscript\|>, <\|notimestamps\|>; wanted"):
        WhisperTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not valid JSON"):
        WhisperTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not readable"):
        WhisperTokenizer(tmp_path)


@pytest.mark.parametrize("files, message", [
    ({"config.json": '{"model_type": "dinov2"}'}, "model_type is 'dinov2'; wanted 'whisper'"),
    ({"config.json": "{}", "model.bin": "x", "tokenizer.json": "{}"}, r"model.bin \(CTranslate2")])
def test_folders_of_other_models(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Whisper.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"suppress_tokens": ["a"]}, "suppress_tokens is"), ({"begin_suppress_tokens": 3}, "is 3"),
    ({"suppress_tokens": [10 ** 30]}, "suppress_tokens is"),
    ({"max_initial_timestamp_index": "x"}, "timestamp_index is 'x'"), (None, "holds a list")])
def test_settings_of_a_wrong_kind(tmp_path, change, message):
    hub.write_json(tmp_path / "g.json", [] if change is None else change)
    with pytest.raises(ValueError, match=f"g.json: .*{message}"):
        whisper.checked_settings(tmp_path / "g.json")
    hub.write_json(tmp_path / "g.json", {"suppress_tokens": None, "x": 1})
    assert whisper.checked_settings(tmp_path / "g.json") == {"x": 1}
