"""loader.py: what a process gets of each step, and what becomes of clips that cannot be read."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import data
import favor
from data import Mixing
from favor import Favor
from runtime import loader
from runtime.feature_cache import FeatureCache, cache_features
from runtime.manifests import Corpus, Order

quiet = lambda *_: None                                                          # noqa: E731


@pytest.fixture(scope="module")
def model(small_parts):
    return Favor.from_config(favor.preset(
        "tiny", whisper=str(small_parts / "whisper"), llm=str(small_parts / "llama"),
        visual=str(small_parts / "instructblip")))


@pytest.fixture
def few(small_miniature, tmp_path):
    """Manifest with three records of each of a few tasks."""
    records = data.read_manifest(small_miniature / "train.jsonl")
    chosen = [dataclasses.replace(r, meta={}) for task in ("asr", "ic", "videoqa", "avsr")
              for r in [r for r in records if r.task == task][:3]]    # without weights
    data.write_manifest(tmp_path / "few.jsonl", chosen)
    return tmp_path / "few.jsonl"


def steps_of(path, model, batch=4, rank=0, world=1, cache=None, **mixed):
    found = Corpus([(path, 1.0)], log=quiet)
    return loader.TrainSet(found, found.train, Order(found.weights, 0), Mixing(**mixed),
                        model.clip_options(), batch, rank, world, cache)


def told(drawn):
    return [(d.g, d.id, d.task, d.sample.prompt, d.sample.target, d.sample.mask) for d in drawn]


def test_processes_share_every_epoch(few, model):
    """Three epochs over two processes: each record once an epoch, whoever gets it."""
    whole = [d for step in range(9) for d in steps_of(few, model)[step]]
    shares = [[d for step in range(9) for d in steps_of(few, model, rank=rank, world=2)[step]]
              for rank in (0, 1)]
    assert sorted(told(shares[0] + shares[1])) == told(whole)
    ids = {r.id for r in data.read_manifest(few)}
    for epoch in range(3):
        assert sorted(d.id for d in whole[12 * epoch:12 * epoch + 12]) == sorted(ids)
    assert [d.id for d in whole[:12]] != [d.id for d in whole[12:24]]


def test_workers_change_nothing(few, model):
    steps = steps_of(few, model, mask_share=0.5)
    ahead = list(loader.load_ahead(steps, 1, 4, workers=2))
    here = [steps[step] for step in (1, 2, 3)]
    assert [told(d) for d in ahead] == [told(d) for d in here]
    for ours, theirs in zip(sum(ahead, []), sum(here, []), strict=True):
        for name in ("frames", "audio"):
            a, b = getattr(ours.sample.clip, name), getattr(theirs.sample.clip, name)
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


def test_cached_features_are_taken(few, model):
    cache = cache_features(model, data.read_manifest(few), log=quiet)
    for d in steps_of(few, model, cache=cache, batch=12)[0]:
        assert d.sample.clip is None and d.sample.features is not None


def test_a_broken_clip_leaves_its_place_empty(few, model, tmp_path):
    """No other sample moves; the reason stands in its place, with and without cached features."""
    records = data.read_manifest(few)
    good = [told([d])[0] for d in steps_of(few, model, batch=12)[0]]
    bad = [dataclasses.replace(r, video=str(tmp_path / "none.mp4")) if k == 6 else r
           for k, r in enumerate(records)]
    data.write_manifest(few, bad)
    cache = cache_features(model, bad, log=quiet)
    for given in (None, cache):
        drawn = steps_of(few, model, batch=12, cache=given)[0]
        lost = [d for d in drawn if d.sample is None]
        assert [d.id for d in lost] == [bad[6].id] and "no such file" in lost[0].reason
        assert [t for t in good if t[1] != bad[6].id] == told(d for d in drawn if d.sample)


def test_what_was_cut_is_reported(few, model, tmp_path):
    steps = steps_of(few, model, batch=12)
    whole = steps[0]
    assert not any(d.cut for d in whole)
    steps.clip_options = {**steps.clip_options, "max_seconds": 2.0}
    with pytest.warns(UserWarning, match="the first 2 of 5.0 s are read"):
        short = steps[0]
    longer = {d.id for d in whole if d.sample.clip.seconds > 2.5}
    assert longer and {d.id for d in short if d.cut} == longer
    assert all(d.sample.clip.seconds <= 2.5 for d in short)
    with pytest.warns(UserWarning, match="the first 2 of"):           # cached features know it, too
        steps.cache = cache_features(model, data.read_manifest(few), tmp_path / "cached", log=quiet,
                                    clip_options={"max_seconds": 2.0})
    again = FeatureCache(tmp_path / "cached", model, {"max_seconds": 2.0})
    for cache in (steps.cache, again):
        steps.cache = cache
        assert {d.id: d.cut for d in steps[0]} == {d.id: d.cut for d in short}


def test_micro_batches():
    def length(n):
        return n

    def frames(n):
        return 10 * n

    sizes = [3, 9, 1, 7, 7, 2, 30]
    assert loader.micro_batches(sizes, length, frames) == [[30, 9, 7, 7, 3, 2, 1]]
    assert loader.micro_batches(sizes, length, frames, most=3) == [[30, 9, 7], [7, 3, 2], [1]]
    parts = loader.micro_batches(sizes, length, frames, most_tokens=20)
    assert parts == [[30], [9, 7], [7, 3], [2, 1]]                # rows x the longest of them
    assert loader.micro_batches(sizes, length, frames, most_frames=100) == [
        [30], [9], [7], [7, 3], [2, 1]]
    assert loader.micro_batches([], length, frames) == []


def test_pairs_of_real_clips(few, model):
    """Without and with cached features: the same questions; a question that the cached vectors were
    not made for is read with its clip."""
    shares = {"pair_share": 0.8, "match_share": 0.8}
    fresh = steps_of(few, model, batch=36, **shares)[0]
    cache = cache_features(model, data.read_manifest(few), log=quiet)
    cached = steps_of(few, model, batch=36, cache=cache, **shares)[0]
    assert told(fresh) == told(cached)
    records = {r.id: r for r in data.read_manifest(few)}
    changed = [d for d in cached if d.sample.prompt != records[d.id].prompt]
    paired = [d for d in cached if d.task in ("ic", "videoqa") and d.sample.prompt ==
              records[d.id].prompt and d.sample.features.audio is not None]
    assert len(changed) > 5 and paired
    for ours, theirs in zip(cached, fresh, strict=True):
        assert (ours.sample.clip is None) == (ours.sample.prompt == records[ours.id].prompt)
        a, b = (model.encode_sample(d.sample).features for d in (ours, theirs))
        for name in ("visual", "audio"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            assert x is None or (x.float() - y.float()).abs().max() < 5e-3          # fp16
    assert model([d.sample for d in cached[:8]])["loss"].isfinite()


def test_default_workers(monkeypatch):
    monkeypatch.setattr(loader.cli, "cores", lambda: 8)
    assert loader.default_workers(SimpleNamespace(), 1) == 0
    assert [loader.default_workers(None, n) for n in (1, 2, 8)] == [7, 3, 1]
