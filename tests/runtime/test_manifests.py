"""manifests.py: the index equals the manifest, what is wrong is named with its line, the order is a
function of the number."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

import data
from runtime import manifests as corpus
from runtime.manifests import Corpus, Index, Order, split_weight

quiet = lambda *_: None                                                          # noqa: E731


def record(number, task="vqa", **media):
    return data.Record(f"{task}-{number}", task, "what", "red", **media)


def write(path, records):
    data.write_manifest(path, records)
    return path


@pytest.fixture(params=[corpus.CHUNK, 300], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", request.param)
    monkeypatch.setattr(corpus.cli, "cores", lambda: 1)
    return request.param


def test_index_is_the_manifest(small_miniature, tmp_path, chunk):
    path = tmp_path / "train.jsonl"
    text = (small_miniature / "train.jsonl").read_bytes().replace(b"\n", b"\n\n")
    path.write_bytes(b"\xef\xbb\xbf" + text)                              # a BOM, blank lines
    index, records = Index.of(path, quiet), data.read_manifest(path)
    assert [index.record(k) for k in range(len(index))] == records
    assert index.record(3) == records[3]                                   # in any order
    for k, r in enumerate(records):
        row = index.rows[k]
        assert row["weight"] == pytest.approx(r.meta.get("weight", 1))
        assert row["answer"] == len(r.target or "")
        assert index.groups[row["group"]] == (r.meta.get("dataset", "own"), r.task)
        assert row["media"] == bool(r.image) + 2 * bool(r.video) + 4 * bool(r.audio)
    assert index.rows.itemsize < 32                                        # bytes a row in memory


def test_index_is_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [record(k) for k in range(5)])
    first = Index.of(path, quiet)

    def scan(*_):
        raise AssertionError("read again")
    with monkeypatch.context() as m:
        m.setattr(corpus, "_scan", scan)
        again = Index.of(path, quiet)
        assert (again.rows == first.rows).all() and again.groups == first.groups
        write(path, [record(k) for k in range(6)])
        with pytest.raises(AssertionError, match="read again"):
            Index.of(path, quiet)
    assert len(Index.of(path, quiet)) == 6

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    write(path, [record(k) for k in range(7)])
    said = []
    monkeypatch.setattr(np, "savez", full)
    assert len(Index.of(path, said.append)) == 7 and "could not be written" in said[0]


@pytest.mark.parametrize("line, wrong", [
    (b'{"id": "x", "task": "a"', "not JSON"), (b'{"id": "x\xff", "task": "a"}', "not UTF-8"),
    (b'{"id": "x", "task": "a", "prompt": "?", "clip": "y"}', "unknown clip; the fields are"),
    (b'["x"]', "a list, wanted one object"),
    (b'{"id": "x", "task": "a"}', "missing prompt; the fields are"),
    (b'{"id": "x", "task": "a", "prompt": "?", "meta": {"weight": "many"}}', "weight 'many'"),
    (b'{"id": "x", "task": "a", "prompt": "?", "meta": {"weight": 1}}', "no target"),
    (b'{"id": "x", "task": "a", "prompt": "?", "target": null}', "no target"),
    (b'{"id": "x", "task": "a", "prompt": "?", "target": "\\ud800"}', "a text holds half a char"),
    (b'{"id": "vqa-3", "task": "a", "prompt": "?", "target": "x"}',
     "id 'vqa-3' is taken by line 4")])
def test_what_is_wrong_is_named_with_its_line(tmp_path, chunk, line, wrong):
    path = write(tmp_path / "a.jsonl", [record(k) for k in range(20)])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=f"a.jsonl, line 21: {wrong}"):
        Index.of(path, quiet)
    assert not list(tmp_path.glob("*.npz"))


def meta(text):
    return f'"meta": {{{text}}}'


ODD = [                                   # the rest of a line, and what is said of it
    ('"target": "a\\u0000"', "the character NUL"), ('"video": "a\\ud83d.mp4"', "half a character"),
    (meta('"note": {"a": ["b", "\\udc00"]}'), "half a character"),
    (meta('"\\u0000": 1'), "the character NUL"), ('"history": [["\\ud800", "a"]]', "half a char"),
    ('"start": 1e999', "start is inf, wanted seconds from 0 to 1e9"),
    (f'"end": 1{"0" * 400}', "end is 1000.*, wanted seconds"), ('"end": 1e308', "end is 1e"),
    ('"end": Infinity', "end is inf"), ('"start": false', "start is False"),
    (f'"start": {"9" * 5000}', "limit"), ('"end": "3"', "end is '3'"),
    *((meta(f'"weight": {value}'), f"weight {said} in meta, wanted a number from 0 to 1e6")
      for value, said in (("NaN", "nan"), ("Infinity", "inf"), ("-1", "-1"), ("1000001", "1000001"),
                          ("1e7", "10000000.0"), ("true", "True"), ('"2"', "'2'"), ("[]", r"\[\]"),
                          (f"1{'0' * 400}", "1000.*"), ("-0.001", "-0.001"))),
    (meta('"chance": 25'), "chance 25 in meta, wanted a number from 0 to 1"),
    (meta('"type": 3'), "type 3 in meta, wanted a string"),
    (meta('"label": ["dog"]'), "label .* in meta, wanted a string"),
    (meta('"metrics": "wer"'), "metrics 'wer' in meta, wanted a list of names"),
    (meta('"metrics": ["wer", 1]'), "metrics .* in meta, wanted a list of names"),
    (meta('"dialogue": 1e999'), "dialogue inf in meta"),
    (meta('"fold": NaN'), "fold in meta: a number is not finite"),
    (meta('"a": {"b": [0.5, -1e999]}'), "a in meta: a number is not finite"),
    (meta(f'"a": -1{"0" * 400}'), "larger than a float"),
    (meta(f'"a": {"[" * 19}{"]" * 19}'), "nested more than 20 deep"),
    (meta('"a": ' + '{"a": ' * 500 + "0" + "}" * 500), "nested more than 20 deep"),
    (meta(f'"a": {"[" * 100_000}'), "nested more than 20 deep"),
    *((meta(f'"{wrong}": 1'), f"'{wrong}' in meta looks like a typing error of '{right}'")
      for wrong, right in (
          ("metric", "metrics"), ("Metrics", "metrics"), ("mertics", "metrics"),
          ("wieght", "weight"), ("weigth", "weight"), ("weights", "weight"), ("WEIGHT", "weight"),
          ("wight", "weight"), ("lable", "label"), ("labels", "label"), ("tpye", "type"),
          ("typ", "type"), ("data_set", "dataset"), ("dataSet", "dataset"), ("datset", "dataset"),
          ("one-window", "one_window"), ("dialog", "dialogue"), ("scource", "source"),
          ("chanse", "chance"))),
    ('"target": "a", "target": "b"', "the key 'target' stands twice"),
    (meta('"a": {"b": 1, "c": 2, "b": 1}'), "the key 'b' stands twice"),
    ('"traget": "a"', "unknown traget"), ('"metrics": []', "unknown metrics; .*belongs in meta")]


@pytest.mark.parametrize("rest, said", ODD)
def test_odd_values_are_named_with_file_and_line(tmp_path, rest, said):
    """For training and for scoring alike."""
    good = b'{"id": "1", "task": "t", "prompt": "p: q", "target": "x"}\r\n\n'
    target = "" if '"target"' in rest else '"target": "x", '
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + f'{{"id": "2", "task": "t", "prompt": "p", {target}{rest}}}'.encode())
    for read in (data.read_manifest, Index.of):
        with pytest.raises(ValueError, match=f"a.jsonl, line 3: .*{said}"):
            read(path)


def test_what_is_not_odd(tmp_path):
    """The values at the limits, names that only resemble ours, escapes that are fine."""
    rest = [meta('"weight": 1e6, "chance": 1'), meta('"weight": null, "type": null, "x": null'),
            meta('"height": 2, "sample_weight": 9, "dialogue_id": 3, "typeId": 4, "label2": "x"'),
            meta('"labels": ["dog", "cat"], "sources": [], "types": {"structural": "verify"}'),
            meta(f'"a": {"[" * 18}{"]" * 18}'), '"prompt": "\\ud83d\\ude00 \\\\u0000 2021e8: {[("',
            '"start": -0.0, "end": 1e9', meta('"big": 1e308, "long": 123456789012345678901')]
    lines = [f'{{"task": "t", "target": "", "id": "{k}", {one}}}' if '"prompt"' in one else
             f'{{"task": "t", "target": "", "id": "{k}", "prompt": "p", {one}}}'
             for k, one in enumerate(rest)]
    path = tmp_path / "a.jsonl"
    path.write_text("\r\n".join(lines))
    records, index = data.read_manifest(path), Index.of(path, quiet)
    assert [index.record(k) for k in range(len(index))] == records and len(records) == len(rest)
    assert index.rows["weight"].tolist() == [1e6] + [1] * 7
    assert records[1].meta == {"x": None} and records[5].prompt == "😀 \\u0000 2021e8: {[("
    data.write_manifest(tmp_path / "b.jsonl", records)
    assert data.read_manifest(tmp_path / "b.jsonl") == records


@pytest.mark.parametrize("fields, said", [
    ({"prompt": "\0"}, "the character NUL"), ({"audio": "\ud800.wav"}, "half a character"),
    ({"meta": {"weight": float("nan")}}, "weight nan"), ({"meta": {"metric": []}}, "'metrics'"),
    ({"meta": {"a": {1, 2}}}, "a set is no value of JSON"), ({"start": 10 ** 400}, "start is 10"),
    ({"meta": {"a": [10 ** 400]}}, "larger than a float")])
def test_nothing_is_written_that_would_not_read_back(tmp_path, fields, said):
    odd = data.Record("x", "t", **{"prompt": "p"} | fields)
    with pytest.raises(ValueError, match=f"a.jsonl, record 'x': .*{said}"):
        data.write_manifest(tmp_path / "a.jsonl", [odd])
    assert not list(tmp_path.iterdir())


def test_the_keys_that_our_readers_write_are_no_typing_errors(small_miniature):
    ours = ("weight dataset metrics type one_window chance label source dialogue split original_id "
            "qtype question turn text image_id video_id full_answer audiocap_ids segments "
            "video_uid question_id question_text spoken_text voice engine seen heard "
            "heard_label").split()
    ours += [key for r in data.read_manifest(small_miniature / "train.jsonl") for key in r.meta]
    assert not [key for key in ours if data.misspelt(key)]


def test_weights_that_an_epoch_cannot_hold(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(k, meta={"weight": 1e6}) for k in range(3)])
    with pytest.raises(ValueError, match="weights .* above 1e6"):
        Corpus([(path, 2.0)], log=quiet)
    with pytest.raises(ValueError, match="wanted more than 0 and at most 1e6"):
        split_weight("a.jsonl:1e7")


def test_a_weight_of_zero_needs_no_target(tmp_path):
    bare = data.Record("b", "t", "p", meta={"weight": 0})
    path = write(tmp_path / "a.jsonl", [record(1), bare])
    assert Corpus([(path, 1.0)], log=quiet).train.tolist() == [0]


# ---- the saved index ----------------------------------------------------------------------------

def test_a_damaged_index_is_made_again(tmp_path):
    path = write(tmp_path / "a.jsonl", [record(k, meta={"weight": k}) for k in range(9)])
    first, file = Index.of(path, quiet), tmp_path / "a.jsonl.index.npz"
    whole, rng, said = file.read_bytes(), np.random.default_rng(0), []
    damaged = [b"", b"{}", b"PK\3\4", whole[:50], whole[:-30], whole + b"x", b"\x93NUMPY" + whole]
    for _ in range(60):
        bytes_ = np.frombuffer(whole, np.uint8).copy()
        bytes_[rng.integers(0, len(whole), rng.integers(1, 9))] = rng.integers(0, 256)
        damaged.append(bytes_.tobytes())
    np.save(file.with_suffix(".npy"), first.rows)
    damaged.append(file.with_suffix(".npy").read_bytes())
    for content in damaged:
        file.write_bytes(content)
        again = Index.of(path, said.append)
        assert (again.rows == first.rows).all() and again.content == first.content
        assert again.groups == first.groups
    assert 40 < len(said) <= len(damaged) and all(
        "a.jsonl.index.npz is damaged (" in one and "made again" in one for one in said)
    file.unlink()
    file.mkdir()                                            # what cannot be replaced is told
    assert len(Index.of(path, said.append)) == 9 and "could not be written" in said[-1]


def test_an_edit_is_seen_whatever_its_time(tmp_path):
    """Another text of the same length, with the time of the file set back."""
    path = write(tmp_path / "a.jsonl", [record(k) for k in range(5)])
    stat, first = path.stat(), Index.of(path, quiet)
    copy = tmp_path / "elsewhere" / "b.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    assert Index.of(copy, quiet).content == first.content and len(first.content) == 64
    path.write_bytes(path.read_bytes().replace(b'"red"', b'"Red"', 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_size == stat.st_size
    again = Index.of(path, quiet)
    assert again.content != first.content and again.record(0).target == "Red"


def test_a_manifest_that_changes_under_a_run(tmp_path):
    records = [record(k, video=f"/v/{k}.mp4") for k in range(5)]
    path = write(tmp_path / "a.jsonl", records)
    index = Index.of(path, quiet)
    for changed in (records[1:], [dataclasses.replace(records[0], id="longer"), *records[1:]]):
        path.write_text("")
        write(tmp_path / "b.jsonl", changed)
        path.write_bytes((tmp_path / "b.jsonl").read_bytes())
        index.file = None
        with pytest.raises(ValueError, match="a.jsonl, row 3: changed while it was in use; start"):
            index.record(2)


def test_no_manifest(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: no records"):
        Index.of(tmp_path / "empty.jsonl", quiet)
    with pytest.raises(ValueError, match="no.jsonl: No such file.*wanted a JSONL manifest"):
        Index.of(tmp_path / "no.jsonl", quiet)


def test_other_processes_check_the_same(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [record(k, meta={"weight": k % 3}) for k in range(100)])
    alone = Index.of(path, quiet)
    (tmp_path / "a.jsonl.index.npz").unlink()
    monkeypatch.setattr(corpus, "CHUNK", 2000)
    monkeypatch.setattr(corpus.cli, "cores", lambda: 2)
    assert (Index.of(path, quiet).rows == alone.rows).all()


@pytest.mark.parametrize("text, found", [
    ("a.jsonl", ("a.jsonl", 1.0)), ("a.jsonl:0.5", ("a.jsonl", 0.5)), ("/x:y/a", ("/x:y/a", 1.0)),
    ("C:/a.jsonl:2", ("C:/a.jsonl", 2.0))])
def test_weights_of_manifests(text, found):
    assert split_weight(text) == found


def test_a_weight_that_is_none():
    for text in ("a.jsonl:0", "a.jsonl:-1", "a.jsonl:inf", "a.jsonl:nan"):
        with pytest.raises(ValueError, match="wanted more than 0"):
            split_weight(text)


# ---- the split, the mixture ---------------------------------------------------------------------

def test_split_is_by_clip(tmp_path):
    kinds = (("parade", "mp4", "video"), ("still", "png", "image"), ("speech", "wav", "audio"))
    records = [record(f"{kind}-{k}-{q}", **{field: f"/x/train/{kind}_{k:05d}.{suffix}"})
               for kind, suffix, field in kinds for k in range(1500) for q in range(3)]
    path = write(tmp_path / "a.jsonl", records)
    for share in (0.02, 0.1, 0.5):
        found = Corpus([(path, 1.0)], share, log=quiet)
        kept, held_out = found.records(found.train), found.records(found.held_out)
        assert len(kept) + len(held_out) == len(records)
        assert len(held_out) / len(records) == pytest.approx(share, rel=0.25)
        clips = [{r.video or r.image or r.audio for r in part} for part in (kept, held_out)]
        assert not clips[0] & clips[1]
        for kind, *_ in kinds:                                    # of each kind its share
            part = sum(kind in r.id for r in held_out) / 4500
            assert part == pytest.approx(share, rel=0.35)
    numbers = [{Path(r.video or r.image or r.audio).stem[-5:] for r in held_out if kind in r.id}
               for kind, *_ in kinds]
    assert len(numbers[0] & numbers[1]) < 0.7 * len(numbers[0])   # not the same ones of every kind
    moved = write(tmp_path / "b.jsonl", [dataclasses.replace(r, **{
        f: getattr(r, f).replace("/x/", "/elsewhere/") for f in data.MEDIA if getattr(r, f)})
        for r in records])
    found = Corpus([(moved, 1.0)], 0.5, log=quiet)
    assert [r.id for r in found.records(found.held_out)] == [r.id for r in held_out]
    assert not len(Corpus([(path, 1.0)], 0, log=quiet).held_out)
    # an image with two sounds is one clip
    both = write(tmp_path / "c.jsonl", [record(k, image="/x/train/a.png",
                                               audio=f"/x/train/a_{k}.wav") for k in range(40)])
    found = Corpus([(both, 1.0)], 0.5, log=quiet)
    assert 0 in (len(found.train), len(found.held_out))


def test_several_manifests(tmp_path):
    long = [record(k, "caption", video=f"/v{k}.mp4", meta={"dataset": "a"}) for k in range(10)]
    long = [dataclasses.replace(r, target="x" * 99) for r in long]
    short = [dataclasses.replace(record(k, "asr", audio=f"/a{k}.wav"), target="y" * 9)
             for k in range(20)]
    paths = write(tmp_path / "a.jsonl", long), write(tmp_path / "b.jsonl", short)
    found = Corpus([(paths[0], 2.0), (paths[1], 0.5)], log=quiet)
    assert found.records(found.train) == [*long, *short]
    assert found.weights.tolist() == [2.0] * 10 + [0.5] * 20
    assert found.mixture() == {"a": {"caption": 10}, "own": {"asr": 20}}
    assert found.sound_only.tolist() == list(range(10, 30))
    tokens = Corpus([(paths[0], 1.0), (paths[1], 1.0)], proportional="tokens", log=quiet)
    drawn = [tokens.weights[:10].sum() * 100, tokens.weights[10:].sum() * 10]
    assert drawn[0] / drawn[1] == pytest.approx(10 / 20)          # of characters what of the rows
    picture = Corpus([(paths[0], 1.0), (paths[1], 1.0)], usable=lambda m: m & 3 > 0, log=quiet)
    assert picture.train.tolist() == list(range(10))


# ---- the order ----------------------------------------------------------------------------------

def test_epochs_follow_the_weights():
    weights = np.repeat([0.5, 1.6, 1.0], 200)
    counts, order = np.zeros(len(weights)), Order(weights, seed=3)
    for epoch in range(50):
        drawn = order.epoch(epoch)
        assert (drawn == Order(weights, 3).epoch(epoch)).all()
        times = np.bincount(drawn, minlength=len(weights))
        for part, weight in ((times[:200], 0.5), (times[200:400], 1.6), (times[400:], 1.0)):
            assert part.min() >= int(weight) and part.max() <= int(np.ceil(weight))
        counts += times
    assert counts.reshape(3, 200).mean(1) / 50 == pytest.approx([0.5, 1.6, 1.0], abs=0.03)
    first, second = order.epoch(0), order.epoch(1)
    assert list(first[:20]) != list(second[:20]) and list(first) != sorted(first)
    assert list(first[:20]) != list(Order(weights, 4).epoch(0)[:20])


def test_order_is_a_function_of_the_number():
    order = Order(np.repeat([1.0, 0.5], 10), seed=1)
    epochs = [order.epoch(epoch) for epoch in range(5)]
    whole = [order(g) for g in range(sum(map(len, epochs)) - 5)]
    assert whole == list(np.concatenate(epochs)[:-5])
    for epoch in epochs:                                          # none twice, none lost
        assert len({*epoch}) == len(epoch) and {*range(10)} <= {*epoch}
    # a resumed run asks for a late one first
    late = Order(np.repeat([1.0, 0.5], 10), seed=1)
    assert [late(g) for g in (50, 51, 3)] == [whole[50], whole[51], whole[3]]
    with pytest.raises(ValueError, match="no training questions"):
        Order([], seed=0)


def test_two_million_rows_in_the_middle():
    """No replay: the sample after a million and a half is found from the weights alone."""
    order = Order(np.ones(2_000_000, np.float32), seed=0)
    late = order(1_500_000), order(3_500_000)
    assert late == (order.epoch(0)[1_500_000], order.epoch(1)[1_500_000])
    assert len(order.ends) == 3                                   # epochs counted, no rows
