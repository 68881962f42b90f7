"""loader.py and mixing.py: what a process gets of each step, what becomes of clips that cannot be
read, and what random pairs, joined questions and matching questions look like."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import favor
from favor import Favor, Features
from runtime import loader, mixing
from runtime.feature_cache import FeatureCache, keep_features
from runtime.manifests import Corpus, Order
from runtime.mixing import Mixing, drawn_mask, mix

quiet = lambda *_: None                                                          # noqa: E731


@pytest.fixture(scope="module")
def model(small_parts):
    return Favor.from_config(favor.preset(
        "tiny", whisper=str(small_parts / "whisper"), llm=str(small_parts / "llama"),
        instructblip=str(small_parts / "instructblip")))


@pytest.fixture
def few(small_miniature, tmp_path):
    """Manifest with three records of each of a few tasks."""
    records = data.read_manifest(small_miniature / "train.jsonl")
    kept = [dataclasses.replace(r, meta={}) for task in ("asr", "ic", "videoqa", "avsr")
            for r in [r for r in records if r.task == task][:3]]      # without weights
    data.write_manifest(tmp_path / "few.jsonl", kept)
    return tmp_path / "few.jsonl"


def steps_of(path, model, batch=4, rank=0, world=1, store=None, **mixed):
    found = Corpus([(path, 1.0)], log=quiet)
    return loader.TrainSet(found, found.train, Order(found.weights, 0), Mixing(**mixed),
                        model.clip_options(), batch, rank, world, store)


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


def test_kept_features_are_taken(few, model):
    store = keep_features(model, data.read_manifest(few), log=quiet)
    for d in steps_of(few, model, store=store, batch=12)[0]:
        assert d.sample.clip is None and d.sample.features is not None


def test_a_broken_clip_leaves_its_place_empty(few, model, tmp_path):
    """No other sample moves; the reason stands in its place, with and without kept features."""
    records = data.read_manifest(few)
    good = [told([d])[0] for d in steps_of(few, model, batch=12)[0]]
    bad = [dataclasses.replace(r, video=str(tmp_path / "none.mp4")) if k == 6 else r
           for k, r in enumerate(records)]
    data.write_manifest(few, bad)
    store = keep_features(model, bad, log=quiet)
    for kept in (None, store):
        drawn = steps_of(few, model, batch=12, store=kept)[0]
        lost = [d for d in drawn if d.sample is None]
        assert [d.id for d in lost] == [bad[6].id] and "no such file" in lost[0].reason
        assert [t for t in good if t[1] != bad[6].id] == told(d for d in drawn if d.sample)


def test_what_was_cut_is_told(few, model, tmp_path):
    steps = steps_of(few, model, batch=12)
    whole = steps[0]
    assert not any(d.cut for d in whole)
    steps.reading = {**steps.reading, "max_seconds": 2.0}
    with pytest.warns(UserWarning, match="the first 2 of 5.0 s are read"):
        short = steps[0]
    longer = {d.id for d in whole if d.sample.clip.seconds > 2.5}
    assert longer and {d.id for d in short if d.cut} == longer
    assert all(d.sample.clip.seconds <= 2.5 for d in short)
    with pytest.warns(UserWarning, match="the first 2 of"):           # kept features know it, too
        steps.store = keep_features(model, data.read_manifest(few), tmp_path / "kept", log=quiet,
                                    reading={"max_seconds": 2.0})
    again = FeatureCache(tmp_path / "kept", model, {"max_seconds": 2.0})
    for store in (steps.store, again):
        steps.store = store
        assert {d.id: d.cut for d in steps[0]} == {d.id: d.cut for d in short}


def test_micro_batches():
    length, frames = lambda n: n, lambda n: n * 10                               # noqa: E731
    sizes = [3, 9, 1, 7, 7, 2, 30]
    assert loader.micro_batches(sizes, length, frames) == [[30, 9, 7, 7, 3, 2, 1]]
    assert loader.micro_batches(sizes, length, frames, most=3) == [[30, 9, 7], [7, 3, 2], [1]]
    parts = loader.micro_batches(sizes, length, frames, most_tokens=20)
    assert parts == [[30], [9, 7], [7, 3], [2, 1]]                # rows x the longest of them
    assert loader.micro_batches(sizes, length, frames, most_frames=100) == [
        [30], [9], [7], [7, 3], [2, 1]]
    assert loader.micro_batches([], length, frames) == []


# ---- mixing -------------------------------------------------------------------------------------

def test_masks_are_drawn_at_their_rate():
    drawn = [drawn_mask(Mixing(mask_share=0.3), g) for g in range(4000)]
    assert drawn == [drawn_mask(Mixing(mask_share=0.3), g) for g in range(4000)]
    assert np.mean([mask is not None for mask in drawn]) == pytest.approx(0.3, abs=0.03)
    for mask in ("audio", "visual", "both"):
        assert np.mean([m == mask for m in drawn]) == pytest.approx(0.1, abs=0.02)
    assert not any(drawn_mask(Mixing(), g) for g in range(200))
    assert drawn != [drawn_mask(Mixing(seed=1, mask_share=0.3), g) for g in range(4000)]
    assert drawn_mask(Mixing(mask="audio"), 0) == "audio"


SEEN, HEARD = torch.zeros(2, 3, 4), torch.ones(5, 6)
SPEECH = data.Record("s", "asr", "Transcribe the speech.", "Red ball.", audio="a.wav")


def mixes(record, parts, n=2000, sound=HEARD, **shares):
    return [mix(Mixing(**shares), g, record, parts, lambda rng: (SPEECH, sound)) for g in range(n)]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_random_pairs(kind):
    """Half are asked both questions, a quarter each one of them; always with the other sound."""
    record = data.Record("v", "vqa", "What is shown?", "A cone.", **{kind: "x"})
    silent = Features(SEEN, None, kind == "image")
    made = mixes(record, silent, pair_share=0.4)
    paired = [m for m in made if m[2].audio is HEARD]
    assert len(paired) / len(made) == pytest.approx(0.4, abs=0.04)
    assert all(m == (record.prompt, record.target, silent) for m in made if m[2].audio is None)
    both = {f"In the {kind}, what is shown, and transcribe the speech.": "A cone, and red ball.",
            f"Transcribe the speech, and in the {kind}, what is shown?": "Red ball, and a cone."}
    asked = {prompt: [m for m in paired if m[0] == prompt]
             for prompt in (*both, record.prompt, SPEECH.prompt)}
    assert sum(map(len, asked.values())) == len(paired)
    for prompt, found in asked.items():
        assert len(found) / len(paired) == pytest.approx(0.25, abs=0.05), prompt
        wanted = both.get(prompt) or (record.target if prompt == record.prompt else SPEECH.target)
        assert {target for _, target, _ in found} == {wanted}
    alone = mixes(record, silent, pair_share=1.0, join_share=0.0)
    assert {m[0] for m in alone} == {record.prompt, SPEECH.prompt}


def test_matching_questions():
    record = data.Record("v", "avssd", "What sounds?", "A bell.", video="x")
    own = Features(SEEN, HEARD * 2)
    made = mixes(record, own, match_share=0.3, pair_share=1.0)
    matching = [m for m in made if m[0] != record.prompt]
    assert len(matching) / len(made) == pytest.approx(0.3, abs=0.03)
    assert {m[0] for m in matching} == {*mixing.MATCH_PROMPTS}
    for prompt, target, parts in matching:
        assert target == ("Yes" if parts.audio is own.audio else "No") and prompt != record.prompt
    assert np.mean([m[1] == "Yes" for m in matching]) == pytest.approx(0.5, abs=0.06)


def test_what_stays_as_it_is():
    """Sound alone, an image with its own sound, a dialogue, a partner that cannot be read."""
    every = {"pair_share": 1.0, "match_share": 1.0}
    silent, own = Features(SEEN, None), Features(SEEN, HEARD)
    still = data.Record("i", "isqa", "?", "x", image="x", audio="y")
    talk = data.Record("d", "avsd", "?", "x", video="x", history=(("a", "b"),))
    film = data.Record("v", "vqa", "?", "x", video="x")
    for record, parts in ((SPEECH, Features(None, HEARD)), (still, own), (talk, silent)):
        assert all(m == (record.prompt, record.target, parts)
                   for m in mixes(record, parts, n=20, **every))
    unread = mixes(film, silent, n=20, sound=None, **every)
    assert all(m == ("?", "x", silent) for m in unread)


def test_pairs_of_real_clips(few, model):
    """Without and with kept features: the same questions; a question that the kept vectors were not
    made for is read with its clip."""
    shares = {"pair_share": 0.8, "match_share": 0.8}
    fresh = steps_of(few, model, batch=36, **shares)[0]
    store = keep_features(model, data.read_manifest(few), log=quiet)
    kept = steps_of(few, model, batch=36, store=store, **shares)[0]
    assert told(fresh) == told(kept)
    records = {r.id: r for r in data.read_manifest(few)}
    changed = [d for d in kept if d.sample.prompt != records[d.id].prompt]
    paired = [d for d in kept if d.task in ("ic", "videoqa") and d.sample.prompt ==
              records[d.id].prompt and d.sample.features.audio is not None]
    assert len(changed) > 5 and paired
    for ours, theirs in zip(kept, fresh, strict=True):
        assert (ours.sample.clip is None) == (ours.sample.prompt == records[ours.id].prompt)
        a, b = (model.encode_sample(d.sample).features for d in (ours, theirs))
        for name in ("visual", "audio"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None)
            assert x is None or (x.float() - y.float()).abs().max() < 5e-3          # fp16
    assert model([d.sample for d in kept[:8]])["loss"].isfinite()


def test_default_workers(monkeypatch):
    monkeypatch.setattr(loader.cli, "cores", lambda: 8)
    assert loader.default_workers(SimpleNamespace(), 1) == 0
    assert [loader.default_workers(None, n) for n in (1, 2, 8)] == [7, 3, 1]
