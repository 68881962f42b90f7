"""feature_cache.py: cached features are fresh ones; nothing is encoded twice, and nothing is
taken for something else, whatever is killed, full or broken."""

import dataclasses
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import run_forked

import data
import favor
import vit_qformer
import whisper_enc
from aveb.answers import readable_samples
from baselines.instructblip import InstructBlip
from favor import Favor, Features
from runtime import distributed, hub
from runtime import feature_cache as features
from runtime.feature_cache import PROBE, FeatureCache, cache_features
from runtime.media import probe, read_audio
from vit_qformer import QFormerTokenizer

quiet = lambda *_: None                                                          # noqa: E731
pytestmark = pytest.mark.filterwarnings("ignore:.*s are read:UserWarning")     # --max-seconds


@pytest.fixture
def small_model(small_parts):
    return Favor.from_config(small_config(small_parts))


def small_config(root, **changes):
    return favor.preset("tiny", whisper=str(root / "whisper"), llm=str(root / "llama"),
                        visual=str(root / "instructblip"), **changes)


def copied(records, folder):
    folder.mkdir(exist_ok=True)
    return [dataclasses.replace(r, **{kind: shutil.copy2(getattr(r, kind), folder)
                                      for kind in data.MEDIA if getattr(r, kind)})
            for r in records]


@pytest.fixture
def records(small_miniature, tmp_path):
    """Two records per task, copied into a folder of their own, and a text."""
    picked = {}
    for r in data.read_manifest(small_miniature / "train.jsonl"):
        picked.setdefault(r.task, []).append(r)
    return [*copied([r for rs in picked.values() for r in rs[:2]], tmp_path / "media"),
            data.Record("text", "mine", "say yes", "yes")]


@pytest.fixture
def encoded(monkeypatch):
    """The (clip, prompts) of each Favor.encode from now on, which still encodes; without PROBE."""
    calls, encode = [], Favor.encode
    monkeypatch.setattr(Favor, "encode", lambda self, clip, prompts: (
        prompts != [PROBE.prompt] and calls.append((clip, prompts)) or encode(self, clip, prompts)))
    return calls


def only_the_probe(encode):
    """An encode() that knows PROBE and fails for any other clip."""
    def encode_probe(self, clip, prompts):
        assert prompts == [PROBE.prompt], f"{prompts} encoded again"
        return encode(self, clip, prompts)
    return encode_probe


def same(a, b, tolerance=0.0):
    """2e-3: fp16, and other prompts in the same pass."""
    for name in ("visual", "audio"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.shape == y.shape and (x.float() - y.float()).abs().max() <= tolerance, name
    assert a.is_image == b.is_image


def clips_of(records):
    return {(r.image, r.video, r.audio, r.start, r.end) for r in records}


def lines_of(folder):
    return [json.loads(text) for path in Path(folder).rglob("*.jsonl")
            for text in path.read_text().split("\n")[:-1]]


def forked(work):
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def opened_as(monkeypatch, kind, suffix=""):
    """The files that feature_cache.py writes are of that kind, below their buffer."""
    monkeypatch.setattr(features, "open", lambda path, mode, **settings: (
        io.BufferedWriter(kind(path, mode)) if mode == "xb" and str(path).endswith(suffix)
        else open(path, mode, **settings)), raising=False)


# ---- what is kept -------------------------------------------------------------------------------

@pytest.mark.parametrize("on_disk", [True, False])
def test_cached_features_are_fresh_ones(small_model, records, tmp_path, on_disk, encoded):
    cache = cache_features(small_model, records, tmp_path / "kept" if on_disk else None, log=quiet)
    assert len(encoded) == len(clips_of(records)) < len(records)          # once a clip
    kinds = set()
    for r in records:
        clip = data.load_clip(r, **small_model.clip_options())
        fresh, kept = small_model.encode(clip, [r.prompt])[0], cache.get(r)
        same(kept, fresh, tolerance=2e-3)                                 # fp16
        assert r in cache and cache.reason(r) is None
        kinds.add((kept.visual is not None, kept.audio is not None, kept.is_image))
        other = dataclasses.replace(r, prompt="never asked")
        # without a picture no prompt changes anything
        assert (other in cache) == (cache.get(other) is not None) == (kept.visual is None)
    assert len(kinds) == 6, kinds              # film, silent film, sound, picture, both, text
    assert cache.get(records[-1]) == Features(None, None, False)          # the text
    for unknown in (dataclasses.replace(records[0], start=0.25),
                    data.Record("?", "", "", audio="?")):
        assert cache.get(unknown) is cache.reason(unknown) is None


def test_the_kept_are_used(small_model, records, tmp_path, encoded):
    """In whatever order, by ids of any name, with what another manifest adds; numbers of today's
    cache are those that the first one returned."""
    logged = []
    first = cache_features(small_model, records[2:], tmp_path / "kept", log=quiet)
    del encoded[:]
    again = cache_features(small_model, records[:1:-1], tmp_path / "kept", log=logged.append)
    assert not encoded
    assert logged == [f"feature cache: {tmp_path / 'kept'}, {len(clips_of(records[2:]))} clips"]
    for r in records[2:]:
        same(again.get(r), first.get(r))
    more = [dataclasses.replace(r, id=f"{r.id}-2", task="mine", target="x") for r in records]
    third = cache_features(small_model, more, tmp_path / "kept", log=quiet)
    assert len(encoded) == len(clips_of(records)) - len(clips_of(records[2:])) > 0
    for r in records[2:]:
        same(third.get(r), first.get(r))


def test_another_question_about_a_kept_clip(small_model, records, tmp_path, encoded):
    """Only its picture is looked at again: the sound is there."""
    film = next(r for r in records if r.task == "avssd")
    cache_features(small_model, [film], tmp_path, log=quiet)
    size = sum(f.stat().st_size for f in tmp_path.rglob("*.bin"))
    asked = [dataclasses.replace(film, prompt=p) for p in ("a b", "c d", film.prompt)]
    cache = cache_features(small_model, asked, tmp_path, log=quiet)
    (clip, prompts), = encoded[1:]
    assert clip.audio is None and prompts == ["a b", "c d"]
    for r in asked:
        same(cache.get(r), small_model.encode(data.load_clip(r, **small_model.clip_options()),
                                              [r.prompt])[0], tolerance=2e-3)
    visual, audio = cache.get(film).visual, cache.get(film).audio
    now = sum(f.stat().st_size for f in tmp_path.rglob("*.bin"))
    assert (size, now) == tuple(2 * (n * visual.numel() + audio.numel()) for n in (1, 3))
    told = lines_of(tmp_path)
    cache.put(film, cache.get(film))                                  # what is there stays as it is
    cache.put_skipped(film, "why")
    assert [line for line in lines_of(tmp_path) if "skipped" not in line] == told
    assert film in cache and film in FeatureCache(tmp_path, small_model)


def test_paths_and_moved_folders(small_model, records, tmp_path, monkeypatch, encoded):
    """A path counts as what it names, and relative to the folder of the features."""
    cache_features(small_model, records, tmp_path / "media" / "features", log=quiet)
    del encoded[:]
    monkeypatch.chdir(tmp_path)
    relative = [dataclasses.replace(r, **{k: os.path.relpath(getattr(r, k)) for k in data.MEDIA
                                          if getattr(r, k)}) for r in records]
    assert relative[0] != records[0]
    cache_features(small_model, relative, "media/features", log=quiet)
    (tmp_path / "media").rename(tmp_path / "moved")
    moved = [dataclasses.replace(r, **{k: getattr(r, k).replace("/media/", "/moved/")
                                       for k in data.MEDIA if getattr(r, k)}) for r in records]
    cache_features(small_model, moved, tmp_path / "moved" / "features", log=quiet)
    assert not encoded


def test_what_makes_features_anew(small_parts, records, tmp_path, encoded):
    for name in ("whisper", "instructblip", "llama"):
        shutil.copytree(small_parts / name, tmp_path / name)
    film = next(r for r in records if r.task == "avssd")

    def anew(record=film, options=None, dtype=None, change=quiet, **changes):
        """Whether a record is encoded, the second time not."""
        model = Favor.from_config(small_config(tmp_path, **changes), dtype)
        change(model)
        before = len(encoded)
        cache_features(model, [record], tmp_path / "kept", log=quiet, clip_options=options)
        once = len(encoded)
        cache_features(model, [record], tmp_path / "kept", log=quiet, clip_options=options)
        assert len(encoded) == once, "not kept"
        return once > before

    assert anew() and not anew()
    for field, value in (("id", "x"), ("task", "x"), ("target", "x"), ("meta", {"a": 1}),
                         ("history", (("a", "b"),)), ("start", 0.0), ("start", 0)):
        assert not anew(dataclasses.replace(film, **{field: value})), field
    for field, value in (("prompt", "x"), ("start", 0.5), ("end", 2.0), ("end", 2.5),
                         ("audio", records[0].audio)):
        assert anew(dataclasses.replace(film, **{field: value})), field
    for field, value in (("fps", 4.0), ("frame_times", "ends"), ("audio_seconds", 3.0),
                         ("antialias", False), ("max_seconds", 3.0), ("question_tokens", 64),
                         ("question_turn", "first")):
        assert anew(**{field: value}), field
    assert not anew(options={"max_seconds": 3.0})             # as the config had it
    assert anew(options={"max_seconds": 2.0}) and not anew(window_frames=2, diversity=0.5)
    assert anew(dtype=torch.bfloat16)
    # weights that no file holds (--random-init); trained parts do not count
    assert anew(change=lambda model: model.visual.query_tokens.data.fill_(0.5))
    assert not anew(change=lambda model: model.audio_proj.weight.data.fill_(0.5))
    for path in (film.video, tmp_path / "whisper" / "model.safetensors",
                 tmp_path / "whisper" / "preprocessor_config.json",
                 tmp_path / "instructblip" / "qformer_tokenizer" / "vocab.txt"):
        stat = os.stat(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))        # made again
        assert anew(), path
    vocabulary = tmp_path / "instructblip" / "qformer_tokenizer" / "vocab.txt"
    stat = os.stat(vocabulary)
    vocabulary.write_bytes(vocabulary.read_bytes() + b"more\n")
    os.utime(vocabulary, ns=(stat.st_atime_ns, stat.st_mtime_ns))             # another size alone
    assert anew()


def louder(self, clip, prompts):
    return [dataclasses.replace(f, audio=None if f.audio is None else f.audio * 1.05)
            for f in self.encode_all([clip], prompts)]


class Rectified(whisper_enc.WhisperEncoder):
    """Another encoder with the same weights."""

    def encode_all(self, sounds):
        return [vectors.relu() for vectors in super().encode_all(sounds)]


def test_the_source_of_an_encoder_and_a_repo_of_a_folders_name_count(
        small_model, tmp_path, monkeypatch):
    """What the probe is too short for, and a Hub repo, which is no folder of that name here."""
    names = {features.fingerprint(small_model, {})[0]}
    monkeypatch.setattr(small_model.whisper, "__class__", type(
        "Other", (whisper_enc.WhisperEncoder,), {"__module__": "vit_qformer"}))
    names.add(features.fingerprint(small_model, {})[0])
    monkeypatch.setattr(small_model, "config", dataclasses.replace(
        small_model.config, whisper=hub.Repo("owner/whisper")))
    names.add(features.fingerprint(small_model, {})[0])
    assert len(names) == 3
    (tmp_path / "owner" / "whisper").mkdir(parents=True)
    (tmp_path / "owner" / "whisper" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert features.fingerprint(small_model, {})[0] in names


@pytest.mark.parametrize("where, name, value", [
    (vit_qformer, "CLIP_MEAN", (0.0, 0.0, 0.0)), (vit_qformer, "CLIP_STD", (0.5, 0.5, 0.5)),
    (vit_qformer, "FRAMES_AT_ONCE", 1), (whisper_enc, "FP16_LIMIT", 1),
    (whisper_enc, "mel_filterbank", lambda n_fft, n_mels, rate: torch.eye(n_fft // 2 + 1, n_mels)),
    (data, "resize", lambda frames, size, mode: vit_qformer.resize(frames, size, mode).flip(3)),
    (data, "read_audio", lambda *at: read_audio(*at).roll(800)),
    (QFormerTokenizer, "__call__", lambda self, texts, longest: (
        torch.full((len(texts), 3), 5), torch.ones(len(texts), 3).bool())),
    (Favor, "encode", louder)])
def test_the_encoders_code_counts(small_model, records, tmp_path, monkeypatch, where, name, value):
    """What changes features changes the folder, and what does not leaves it; back is back."""
    before = FeatureCache(tmp_path, small_model)
    before.fill(records[:1], log=quiet)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, value)
        same_features = name in ("FRAMES_AT_ONCE", "FP16_LIMIT")     # the latter is for fp16 only
        assert (records[0] in FeatureCache(tmp_path, small_model)) == same_features
    assert records[0] in FeatureCache(tmp_path, small_model)


def test_another_encoder_counts(small_model, records, tmp_path):
    """In the place of one, or added under a name that only the model's encode() knows."""
    cache_features(small_model, records[:1], tmp_path, log=quiet)
    small_model.whisper.__class__ = Rectified
    assert records[0] not in cache_features(small_model, records[1:2], tmp_path, log=quiet)
    small_model.whisper.__class__ = whisper_enc.WhisperEncoder
    assert records[0] in FeatureCache(tmp_path, small_model)
    small_model.beats = torch.nn.Linear(3, 3).requires_grad_(False)
    assert records[0] not in FeatureCache(tmp_path, small_model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_count(small_parts, records, tmp_path, monkeypatch, dtype):
    """As of another device or number of threads; a millionth of noise, a hundredth in bf16."""
    model = Favor.from_config(small_config(small_parts), dtype)
    cache_features(model, records[:1], tmp_path, log=quiet)
    encode, eps = Favor.encode, 1e-6 if dtype == torch.float32 else 1e-2

    def noisy(self, clip, prompts):
        return [dataclasses.replace(f, **{part: x + eps * x.abs().mean() * torch.randn_like(x)
                                          for part in ("visual", "audio")
                                          if (x := getattr(f, part)) is not None})
                for f in encode(self, clip, prompts)]
    monkeypatch.setattr(Favor, "encode", noisy)
    assert records[0] in FeatureCache(tmp_path, model)
    eps *= 1000 if dtype == torch.float32 else 10
    assert records[0] not in FeatureCache(tmp_path, model)


def test_every_weight_counts():
    """A change of any single bit, and two values in each other's place."""
    tensors = {"a": torch.arange(70_001).half(), "b": torch.randn(3, 5).bfloat16(),
               "c": torch.tensor(True)}
    found = {features.bits_hash(tensors)}
    assert features.bits_hash({k: t.clone() for k, t in tensors.items()}) in found
    for name, at in (("a", 0), ("a", 65_537), ("a", 70_000), ("b", 14), ("c", 0)):
        changed = {**tensors, name: tensors[name].clone()}
        bits = changed[name].view(-1).view(torch.uint8)
        bits[at * tensors[name].element_size()] ^= 1
        found.add(features.bits_hash(changed))
    swapped = tensors["a"].clone()
    swapped[[8, 65_544]] = swapped[[65_544, 8]]
    found |= {features.bits_hash(tensors | {"a": swapped}),
              features.bits_hash(tensors | {"b": tensors["b"].float()}),
              features.bits_hash({"b": tensors["b"], "a": tensors["a"], "c": tensors["c"]})}
    assert len(found) == 9


def test_instructblip_keeps_a_clip_once(small_parts, records, tmp_path, monkeypatch):
    """Whatever the prompts: its Q-Former, which may learn, comes after what is kept."""
    model = InstructBlip.from_config(small_config(small_parts))
    asked = [dataclasses.replace(r, id=f"{r.id} {k}", prompt=f"what {k}")
             for r in records if r.video or r.image for k in range(3)]
    cache = cache_features(model, asked, tmp_path / "kept", log=quiet)
    clips = len(clips_of(asked))
    assert len([line for line in lines_of(tmp_path / "kept") if "seen" in line]) == clips
    for r in asked:
        clip = data.load_clip(r, **model.clip_options())
        same(cache.get(r), model.encode(clip, [r.prompt])[0], 2e-2)
    with torch.no_grad():
        model.visual.query_tokens.add_(1)                                     # as training does
    monkeypatch.setattr(InstructBlip, "encode", only_the_probe(InstructBlip.encode))
    cache_features(model, asked, tmp_path / "kept", log=quiet)
    other = Favor.from_config(small_config(small_parts))
    assert all(r not in FeatureCache(tmp_path / "kept", other) for r in asked)


def test_an_encoder_that_reads_no_question_keeps_a_clip_once(small_parts, records, tmp_path,
                                                             encoded):
    """SigLIP: three questions about a clip are one entry and one pass; another grid is another
    folder."""
    from transformers import SiglipVisionConfig, SiglipVisionModel
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=64, patch_size=16)).save_pretrained(tmp_path / "siglip")
    config = dataclasses.replace(small_config(small_parts), visual=str(tmp_path / "siglip"),
                                 visual_grid=2)
    model = Favor.from_config(config)
    asked = [dataclasses.replace(r, id=f"{r.id} {k}", prompt=f"what {k}") for r in records
             for k in range(3)]
    cache = cache_features(model, asked, tmp_path / "kept", log=quiet)
    clips = len(clips_of(asked))
    assert len(encoded) == clips and {len(prompts) for _, prompts in encoded} == {1}
    seen = [line for line in lines_of(tmp_path / "kept") if "seen" in line]
    assert len(seen) == len(clips_of([r for r in asked if r.video or r.image]))
    encoded.clear()
    other = dataclasses.replace(asked[0], prompt="never asked before")
    assert other in cache
    for r in asked:
        fresh = model.encode(data.load_clip(r, **model.clip_options()), ["something else"])[0]
        same(cache.get(r), fresh, 2e-3)
    encoded.clear()
    cache_features(Favor.from_config(config), [*asked, other], tmp_path / "kept", log=quiet)
    assert not encoded
    finer = Favor.from_config(dataclasses.replace(config, visual_grid=4))
    again = FeatureCache(tmp_path / "kept", finer)
    assert again.home != cache.home and not any(r in again for r in asked)


def test_features_made_by_other_processes(small_model, records, monkeypatch):
    alone = cache_features(small_model, records, workers=1, log=quiet)
    fork = multiprocessing.get_context("fork")                    # spawned ones: test_cli.py
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    shared = cache_features(small_model, records, workers=2, log=quiet)
    for r in records:
        same(shared.get(r), alone.get(r), tolerance=1e-3)
    small_model.bfloat16()                                        # they know the dtype
    halves = cache_features(small_model, records, workers=2, log=quiet)
    far = [(halves.get(r).audio.float() - alone.get(r).audio.float()).abs().max()
           for r in records if alone.get(r).audio is not None]
    assert 1e-3 < max(far) < 0.2
    with torch.no_grad():
        small_model.visual.query_tokens.add_(1)                   # what no file can tell them
    with pytest.raises(ValueError, match="differ from those that its config names.*workers=1"):
        cache_features(small_model, records, workers=2, log=quiet)
    cache_features(small_model, records, workers=1, log=quiet)


# ---- killed, several processes ------------------------------------------------------------------

def test_killed_at_any_moment(small_model, records, tmp_path, monkeypatch):
    """SIGKILL at random moments: what was written is whole and stays, and the next start goes on
    with what is missing."""
    started = time.time()
    whole = cache_features(small_model, records, log=quiet)
    seconds, rng, killed, kept = time.time() - started, random.Random(0), 0, 0

    def written():
        return sum(file.stat().st_size for file in (tmp_path / "kept").rglob("*.jsonl"))

    for _ in range(8):
        before = written()
        child = forked(lambda: cache_features(small_model, records, tmp_path / "kept", log=quiet))
        while child.is_alive() and written() == before:
            time.sleep(0.002)
        child.join(rng.uniform(0, 0.1) * seconds)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        cache = FeatureCache(tmp_path / "kept", small_model)
        for r in records:
            assert r not in cache or same(cache.get(r), whole.get(r), 2e-3) is None
        held = sum(r in cache for r in records)
        assert held >= kept
        kept = held
    assert killed >= 2 and kept >= 3
    cache_features(small_model, records, tmp_path / "kept", log=quiet)
    cache = FeatureCache(tmp_path / "kept", small_model)
    monkeypatch.setattr(Favor, "encode", only_the_probe(Favor.encode))
    cache.fill(records, log=quiet)
    for r in records:
        same(cache.get(r), whole.get(r), 2e-3)
    keys = [line.get("seen") or line["clip"] for line in lines_of(tmp_path / "kept")]
    assert len(keys) == len(set(keys))                            # nothing twice


@pytest.mark.parametrize("kind", [".bin", ".jsonl"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_killed_in_the_middle_of_a_write(small_model, records, tmp_path, monkeypatch, kind, share):
    """Of the third write to one of the two files a part arrives."""
    film = [r for r in records if r.video]

    class Torn(io.FileIO):
        writes = 0

        def write(self, what):
            Torn.writes += 1
            if Torn.writes < 3:
                return super().write(what)
            super().write(bytes(what)[:int(share * len(bytes(what)))])
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        opened_as(monkeypatch, Torn, kind)
        cache_features(small_model, film, tmp_path / "kept", log=quiet)

    child = forked(work)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    cache = FeatureCache(tmp_path / "kept", small_model)
    entries = [*cache.clips.values(), *cache.seen.values()]
    if kind == ".bin":                            # whether the third has come or not: no line tells
        assert sum(e[0] is not None for e in entries) == 2
    else:
        assert len(entries) == (3 if share == 1 else 2)
    cache_features(small_model, film, tmp_path / "kept", log=quiet)
    cache, whole = FeatureCache(tmp_path / "kept", small_model), cache_features(
        small_model, film, log=quiet)
    for r in film:
        same(cache.get(r), whole.get(r), 2e-3)


def test_a_pack_that_lost_its_end(small_model, records, tmp_path, encoded):
    """A crash of the machine: lines without their numbers, and lines of zeros, do not count."""
    cache_features(small_model, records, tmp_path / "kept", log=quiet)
    whole = cache_features(small_model, records, log=quiet)
    pack, = (tmp_path / "kept").rglob("*.bin")
    os.truncate(pack, pack.stat().st_size // 2)
    index = pack.with_suffix(".jsonl")
    index.write_bytes(index.read_bytes() + b"\0" * 50 + b"\n")
    del encoded[:]
    cache = cache_features(small_model, records, tmp_path / "kept", log=quiet)
    assert 0 < len(encoded) < len(clips_of(records))
    for r in records:
        same(cache.get(r), whole.get(r), 2e-3)
    for path in (tmp_path / "kept").rglob("*.bin"):
        path.unlink()                                             # an index alone is nothing
    gone = FeatureCache(tmp_path / "kept", small_model)
    assert {r.task for r in records if r in gone} == {"mine"}     # nor has the text any numbers


def test_two_processes_one_after_the_other(small_model, records, tmp_path):
    """As train.py does under torchrun: the first one fills, the other finds."""
    def work(rank):
        distributed.init_distributed()
        if rank == 1:
            Favor.encode = only_the_probe(Favor.encode)
        with distributed.main_process_first():
            cache = cache_features(small_model, records, tmp_path / "kept", log=quiet)
        assert all(r in cache for r in records)
        distributed.shutdown()

    assert run_forked(work, processes=2) == [0, 0]
    assert len([*(tmp_path / "kept").rglob("*.bin")]) == 1


def test_processes_that_write_at_the_same_time(small_model, records, tmp_path, monkeypatch):
    """Each to its own pack, a fork of a writer too; who reads meanwhile sees whole entries only."""
    whole = cache_features(small_model, records, log=quiet)
    parent = cache_features(small_model, records[:2], tmp_path / "kept", log=quiet)    # has a pack
    children = [forked(lambda part=part: parent.fill(part, log=quiet))
                for part in (records[2::2], records[3::2])]
    while any(child.is_alive() for child in children):
        cache = FeatureCache(tmp_path / "kept", small_model)
        for r in records:
            assert r not in cache or same(cache.get(r), whole.get(r), 2e-3) is None
    assert [child.exitcode for child in children] == [0, 0]
    last = dataclasses.replace(next(r for r in records if r.video), prompt="the last one")
    parent.fill([last], log=quiet)
    assert len([*(tmp_path / "kept").rglob("*.bin")]) == 3
    monkeypatch.setattr(Favor, "encode", only_the_probe(Favor.encode))
    cache = cache_features(small_model, [*records, last], tmp_path / "kept", log=quiet)
    for r in records:
        same(cache.get(r), whole.get(r), 2e-3)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_cache_goes_to_other_processes(small_model, records, tmp_path, on_disk):
    """As with a DataLoader's workers, which are spawned: without the model, and not large."""
    folder = tmp_path / "kept" if on_disk else None
    cache = cache_features(small_model, records[:-1], folder, log=lambda _: None)
    packed = pickle.dumps(cache)
    assert len(packed) < (10_000 if on_disk else 200_000)
    copy = pickle.loads(packed)
    for r in records[:-1]:
        same(copy.get(r), cache.get(r))
    copy.put(records[-1], Features())                             # to a pack of its own
    cache.fill(records, log=quiet)
    assert records[-1] in copy and copy.clip_options == cache.clip_options
    if on_disk:
        assert len([*folder.rglob("*.bin")]) == 2
        assert all(r in FeatureCache(folder, small_model) for r in records)


# ---- damaged ------------------------------------------------------------------------------------

def changed_line(number, **values):
    def change(index, pack, probe):
        lines = index.read_text().splitlines()
        lines[number] = json.dumps(json.loads(lines[number]) | values)
        index.write_text("\n".join(lines) + "\n")
    return change


def written(which, change):
    return lambda *files: files[which].write_bytes(change(files[which].read_bytes()))


@pytest.mark.parametrize("damage, file", [
    (changed_line(0, at=[-2, 50, 16], crc=1), "index"), (changed_line(1, at="much"), "index"),
    (changed_line(0, at=[0, 1.5, 16]), "index"), (changed_line(0, at=[0]), "index"),
    (changed_line(1, seen="no hex" * 6), "index"), (changed_line(0, clip=7), "index"),
    (changed_line(0, image="yes"), "index"), (changed_line(0, crc=None), "index"),
    (written(0, lambda old: b"[1, 2]\n" + old), "index"),
    (written(0, lambda old: b"\xff\0\xfe{\n" + old), "index"),
    (written(0, lambda old: old.replace(b"{", b"", 1)), "index"),
    (lambda index, pack, probe: (index.unlink(), index.mkdir()), "index"),
    (changed_line(0, at=[4, 2, 16]), "pack"), (changed_line(0, at=[0, 0, 10**15]), "pack"),
    (written(1, lambda old: b"\xff\x7e" * (len(old) // 2)), "pack"),
    (written(1, lambda old: old[:-2] + b"\1\1"), "pack"),
    (written(2, lambda old: old[:-9]), "probe"), (written(2, lambda old: b"x" * 99), "probe")])
def test_damaged_files(small_model, records, tmp_path, damage, file):
    """One line: the file, what is wrong, what to remove.  When it is removed all is made anew."""
    film = [next(r for r in records if r.task == "avssd")]
    cache = cache_features(small_model, film, tmp_path, log=quiet)
    whole = cache.get(film[0])
    pack, = cache.home.glob("*.bin")
    files = {"index": pack.with_suffix(".jsonl"), "pack": pack,
             "probe": cache.home / "probe.safetensors"}
    damage(*files.values())
    with pytest.raises(SystemExit) as stop:
        FeatureCache(tmp_path, small_model).get(film[0])
    told = str(stop.value)
    assert told.startswith(f"{files[file]}: ") and "\n" not in told
    assert "damaged" in told or "Is a directory" in told
    assert re.search("remove .*features are made anew", told)
    shutil.rmtree(cache.home)
    same(cache_features(small_model, film, tmp_path, log=quiet).get(film[0]), whole)


def test_a_pack_that_is_no_file(small_model, records, tmp_path):
    """As one that is gone: its lines do not count."""
    cache = cache_features(small_model, records[:1], tmp_path, log=quiet)
    pack, = cache.home.glob("*.bin")
    pack.unlink()
    pack.mkdir()
    assert records[0] in cache_features(small_model, records[:1], tmp_path, log=quiet)


# ---- clips that cannot be read ------------------------------------------------------------------

def test_unreadable_clips(small_model, records, tmp_path, encoded, monkeypatch):
    """Kept with their reasons, in two lines or more; tried again when the file is another one."""
    film, bad = next(r for r in records if r.video), tmp_path / "media" / "bad.mp4"
    bad.write_bytes(b"no film")
    broken = [dataclasses.replace(film, id=name, video=str(tmp_path / "media" / name))
              for name in ("bad.mp4", "missing.mp4")]
    broken.append(dataclasses.replace(broken[0], id="again", prompt="other"))
    logged = []
    cache = cache_features(small_model, [*records, *broken], tmp_path / "kept", log=logged.append)
    told = next(line for line in logged if line.startswith("skipped"))
    assert told.startswith(f"skipped 2 of {len(clips_of(records)) + 2}: bad.mp4: ")
    assert "bad.mp4: not readable" in told and "missing.mp4: no such file" in told
    assert all(r in cache for r in records)
    for r in broken:
        assert r not in cache and cache.get(r) is None and Path(r.video).name in cache.reason(r)
    # known now: no file is opened, and the samples' readers are told
    with monkeypatch.context() as patch:
        patch.setattr(features, "load_or_skip", None)
        patch.setattr(data, "load_or_skip", None)
        again = FeatureCache(tmp_path / "kept", small_model)
        assert again.fill([*records, *broken], log=quiet) == [
            (r.id, cache.reason(r)) for r in broken[:2]]
        skipped = []
        read, samples = readable_samples(small_model, [*records, *broken], again, skipped=skipped)
        assert read == records and skipped == [(r.id, cache.reason(r)) for r in broken]
    with pytest.raises(ValueError, match="none of 2 clips could be read; first reason: .*bad.mp4"):
        cache_features(small_model, broken, tmp_path / "kept", log=quiet)
    shutil.copy(film.video, bad)                                              # repaired
    shutil.copy(film.video, broken[1].video)
    del encoded[:]
    cache = cache_features(small_model, broken, tmp_path / "kept", log=quiet)
    assert len(encoded) == 2
    same(cache.get(broken[0]), cache.get(film), tolerance=0)
    # what was readable stays so, also when another question finds the clip for once unreadable
    monkeypatch.setattr(features, "load_or_skip",
                        lambda r, skipped, **_: skipped.append((r.id, "disk is away")))
    other = dataclasses.replace(broken[0], prompt="a third")
    cache = FeatureCache(tmp_path / "kept", small_model)
    assert cache.fill([*broken, other], log=quiet) == [(other.id, "disk is away")]
    for kept in (cache, FeatureCache(tmp_path / "kept", small_model)):
        assert broken[0] in kept and other not in kept and kept.reason(other) is None


def test_clips_that_are_not_there_are_read(small_model, records):
    """As after a full disk: samples come from the clip itself, read as the cache would."""
    film = next(r for r in records if r.video)
    cache = FeatureCache(None, small_model, {"max_seconds": 2.0})
    _, (sample,) = readable_samples(small_model, [film], cache)
    assert sample.features is None and len(sample.clip.frames) == 4
    cache.fill([film], log=quiet)
    _, (kept,) = readable_samples(small_model, [film], cache)
    assert kept.clip is None
    same(kept.features, small_model.encode_sample(sample).features, tolerance=2e-3)


# ---- space --------------------------------------------------------------------------------------

def test_the_space_is_told_first(small_model, records, tmp_path, monkeypatch):
    """Close to what it will be, for films, windows, sounds and pictures."""
    film = next(r for r in records if r.task == "avssd")
    one = {r.task: r for r in records}
    records += [dataclasses.replace(film, id="w", start=1.0, end=3.0, prompt="b"),
                dataclasses.replace(film, id="m", video="missing.mp4")]
    monkeypatch.setattr(features, "in_words", lambda n: f"{n / 1e3:.3f} kB")
    for name, chosen, options in (
            ("all", records, {}), ("short", records, {"max_seconds": 1.5}),
            *((task, [r], {}) for task, r in one.items())):
        logged = []
        cache_features(small_model, chosen, tmp_path / name, log=logged.append,
                       clip_options=options)
        told = re.match(rf"feature cache: {len(clips_of(chosen))} clips to encode, about (\S+) "
                        rf"kB in {tmp_path / name}, \S+ kB free", logged[0])
        took = sum(f.stat().st_size for f in (tmp_path / name).rglob("*.bin")) / 1e3
        assert float(told[1]) == pytest.approx(took, rel=0.2), name


def test_many_clips_are_not_all_opened(small_model, records, tmp_path, monkeypatch):
    """The space of 400 is that of 100 times four."""
    film, opened = next(r for r in records if r.video), []
    windows = [dataclasses.replace(film, id=str(k), start=k / 1000, end=2 + k / 1000)
               for k in range(400)]
    monkeypatch.setattr(features, "probe", lambda path: opened.append(path) or probe(path))
    monkeypatch.setattr(features, "in_words", str)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(SystemExit) as stop:
        cache_features(small_model, windows, tmp_path, log=quiet)
    need = float(re.search(r"about (\S+),", str(stop.value))[1])
    cache = FeatureCache(None, small_model)
    assert need == pytest.approx(400 * cache._bytes([windows[0]], True), rel=0.05)
    assert len(opened) == 101                                     # one of them by this test


@pytest.mark.parametrize("kind", [Favor, InstructBlip])
@pytest.mark.parametrize("audio_seconds", [None, 30.0])
def test_the_space_of_one_clip(small_parts, records, audio_seconds, kind):
    """To the byte where the film has an exact length."""
    model = kind.from_config(small_config(small_parts, audio_seconds=audio_seconds))
    cache = FeatureCache(None, model)
    for r in records:
        window = dataclasses.replace(r, end=2.0) if r.video else r
        cache.fill([window], log=quiet)
        got = cache.get(window)
        picture, sound = (0 if x is None else 2 * x.numel() for x in (got.visual, got.audio))
        assert cache._bytes([window, window], False) == 2 * picture, r
        need, step = cache._bytes([window], True), 2 * 10 * 16           # up to a whole frame more
        assert picture + sound <= need <= picture + sound + step * (sound > 0), r


def test_too_little_space(small_model, records, tmp_path, monkeypatch, encoded):
    cache = FeatureCache(tmp_path / "kept", small_model)
    need = sum(map(cache._bytes, *zip(*(([r], True) for r in records[:2]), strict=True)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(SystemExit) as stop:
        cache_features(small_model, records[:2], tmp_path / "kept", log=quiet)
    for told in (f"about {features.in_words(need)}, ", f"{features.in_words(need - 1)} free",
                 str(tmp_path / "kept"), "--features", "--no-cache-features"):
        assert told in str(stop.value)
    assert not encoded
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    cache_features(small_model, records[:2], tmp_path / "kept", log=quiet)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    cache_features(small_model, records[:2], tmp_path / "kept", log=quiet)     # needs none
    assert len(encoded) == len(clips_of(records[:2]))


def test_a_full_disk(small_model, records, tmp_path, encoded, monkeypatch):
    """One line is printed, what was kept is used, the rest goes on without."""
    class Full(io.FileIO):
        room = 9000

        def write(self, what):
            Full.room -= len(what)
            if Full.room < 0:
                super().write(bytes(what)[:len(what) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(what)

    logged, clips = [], len(clips_of(records))
    with monkeypatch.context() as patch:
        opened_as(patch, Full)
        cache = cache_features(small_model, records, tmp_path / "kept", log=logged.append)
        there = [r for r in records if r in cache]
        assert 0 < len(there) < len(records) and len(encoded) < clips      # and stops encoding
        assert [line for line in logged if "No space left" in line] == [
            f"feature cache: {cache.home}: No space left on device; nothing more is cached"]
        read, samples = readable_samples(small_model, records, cache)
        assert read == records
        assert [s.features is None for s in samples] == [r not in there for r in records]
        cache.put(records[-1], Features())
        cache.fill(records, log=quiet)                                     # no second attempt
        assert sum("No space" in line for line in logged) == 1 and records[-1] not in cache
    whole = cache_features(small_model, records, log=quiet)
    del encoded[:]
    again = cache_features(small_model, records, tmp_path / "kept", log=quiet)
    assert 0 < len(encoded) < clips                                        # there is room now
    for r in records:
        same(again.get(r), whole.get(r), 2e-3)


def test_a_folder_that_cannot_be_written(small_model, records, tmp_path):
    """A limit of the system in the middle of an entry, and a folder that is a file."""
    film = [r for r in records if r.video]
    out = tmp_path / "told"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        logged = []
        cache = cache_features(small_model, film, tmp_path / "kept", log=logged.append)
        out.write_text(json.dumps([logged, sum(r in cache for r in film)]))

    child = forked(work)
    child.join()
    logged, held = json.loads(out.read_text())
    assert any("File too large; nothing more is cached" in line for line in logged)
    assert 0 < held < len(film)
    pack, = (tmp_path / "kept").rglob("*.bin")
    assert pack.stat().st_size == 20_000                                   # torn
    cache = cache_features(small_model, film, tmp_path / "kept", log=quiet)
    whole = cache_features(small_model, film, log=quiet)
    for r in film:
        same(cache.get(r), whole.get(r), 2e-3)
    logged = []
    cache = cache_features(small_model, film, out, log=logged.append)
    assert "Not a directory; nothing more is cached" in " ".join(logged) and film[0] not in cache


def test_speed(small_model, records, tmp_path):
    """get() is for each sample of each step: far below what a training sample takes (10 ms)."""
    cache = cache_features(small_model, records, tmp_path / "kept", log=quiet)
    rounds = []
    for _ in range(20):
        started = time.perf_counter()
        for r in records:
            cache.get(r)
        rounds.append((time.perf_counter() - started) / len(records))
    print(f"get: {1e3 * min(rounds):.3f} ms")
    assert min(rounds) < 3e-4
