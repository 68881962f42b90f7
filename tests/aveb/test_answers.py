"""answers.py: nothing is asked twice or lost, whatever is killed and however many processes there
are; dialogues with right, no or own earlier answers."""

import dataclasses
import json
import multiprocessing
import signal
import time

import pytest
from test_train import run_forked

import data
import eval as evaluation
from aveb import answers
from aveb.answers import Journal, answer_all
from aveb.tasks import HISTORIES
from favor import Favor, preset


@pytest.fixture
def records(small_miniature):
    return data.read_manifest(small_miniature / "test.jsonl")


def test_killed_and_two_processes_give_the_same(checkpoint, small_miniature, tmp_path):
    """SIGKILL in the middle, twice; the report of the third start is that of an unbroken run, and
    no question stands twice in the journal.  Two processes: the same again."""
    def run(name):
        evaluation.main(evaluation.EvalConfig(
            checkpoint=str(checkpoint), data=str(small_miniature), out=str(tmp_path / name),
            batch=2, cache_features=False, views=("both", "blind"), task="vqa,videoqa,avsd"))

    def lines():
        return [json.loads(text) for path in parts.glob("*.jsonl")
                for text in path.read_text().split("\n")[:-1]]

    parts = tmp_path / "a.parts"
    for at_least in (2, 6):
        child = multiprocessing.get_context("fork").Process(target=run, args=("a.jsonl",))
        child.start()
        deadline = time.time() + 60
        while sum("id" in line for line in lines()) < at_least and time.time() < deadline:
            time.sleep(0.002)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    newest = max(parts.glob("*.jsonl"))
    newest.write_text(newest.read_text() + '{"id": "torn')
    kept = [line["id"] for line in lines() if "id" in line]
    assert len(set(kept)) == len(kept) and 6 <= len(kept) < 14
    run("a.jsonl")
    assert not parts.exists()
    run("b.jsonl")
    assert run_forked(lambda rank: run("c.jsonl"), processes=2) == [0, 0]
    for suffix in (".jsonl", ".json", ".md"):
        ours = (tmp_path / f"a{suffix}").read_bytes()
        assert ours == (tmp_path / f"b{suffix}").read_bytes(), suffix
        assert ours == (tmp_path / f"c{suffix}").read_bytes(), suffix
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["answered"] == 14 and report["settings"]["weights"]
    assert report["scores"]["videoqa"]["both"]["exact"]["n"] == 4


def test_other_settings_are_not_mixed(tmp_path):
    journal = Journal(tmp_path / "x.parts", {"beams": 1, "views": ["both"]})
    journal.add([{"id": "a", "answers": {"both": "yes"}}])
    assert Journal(tmp_path / "x.parts", {"beams": 1, "views": ["both"]}).lines.keys() == {"a"}
    with pytest.raises(SystemExit, match="other settings: beams: 1 -> 5"):
        Journal(tmp_path / "x.parts", {"beams": 5, "views": ["both"]})
    journal.remove()
    assert not (tmp_path / "x.parts").exists()


def test_unreadable_clips_are_kept_as_skipped(checkpoint, records, tmp_path):
    """Not tried again after a stop, and told at the end."""
    video = next(r for r in records if r.video)
    broken = dataclasses.replace(video, video=str(tmp_path / "no.mp4"))
    model, journal = Favor.from_pretrained(checkpoint), Journal(tmp_path / "p", {})
    said, skipped = answer_all(model, [broken, records[0]], None, ("both",), journal=journal,
                               log=lambda *_: None)
    assert said.keys() == {records[0].id} and skipped[0][0] == broken.id
    assert "no such file" in skipped[0][1]
    again = Journal(tmp_path / "p", {})
    assert again.holds([broken, records[0]])
    assert answer_all(None_model(), [broken, records[0]], None, ("both",), journal=again,
                      log=lambda *_: None) == (said, skipped)


class None_model:
    """Would fail if it were asked anything."""
    training = False

    def eval(self):
        return self

    train = lambda self, mode: self                                              # noqa: E731


class Parrot(None_model):
    """Answers with the question and how many turns came before; remembers what it was asked."""
    config = preset("tiny")

    def __init__(self):
        self.asked = []

    def clip_options(self):
        return {"sound_only": True}

    def encode_batch(self, samples):
        return samples

    def generate(self, samples):
        self.asked += [(s.prompt, s.history) for s in samples]
        return [f"{s.prompt.split()[0]}/{len(s.history)}" for s in samples]


@pytest.mark.parametrize("history", HISTORIES)
def test_history(records, history):
    """avsd: the turns before are right, gone, or what the model itself said, asked once a clip."""
    talks = [r for r in records if r.task == "avsd"]
    parrot = Parrot()
    said, _ = answer_all(parrot, talks, None, ("both",), history=history, log=lambda *_: None)
    for r in talks:
        turns = {"gold": r.history, "none": (), "model": tuple(
            (q, f"{q.split()[0]}/{n}") for n, (q, _) in enumerate(r.history))}[history]
        assert (r.prompt, turns) in parrot.asked
        assert said[r.id]["both"] == f"{r.prompt.split()[0]}/{len(turns)}"
    first = [turns for prompt, turns in parrot.asked if prompt == "Which sounds are heard?"]
    assert len(first) == (len({answers.clip_key(r) for r in talks}) if history == "model" else 0)


def test_own_answers_with_a_real_model(checkpoint, records):
    """--history model, with a picture: the earlier turns' questions go through the Q-Former too."""
    talks = [r for r in records if r.task == "avsd"][:2]
    model = Favor.from_pretrained(checkpoint)
    said, _ = answer_all(model, talks, None, ("both",), history="model", log=lambda *_: None)
    for r in talks:
        turns = ()
        for question, _ in r.history:
            clip = data.load_clip(r, **model.clip_options())
            turns = (*turns, (question, model.answer(clip, question, turns)))
        assert said[r.id]["both"] == model.answer(
            data.load_clip(r, **model.clip_options()), r.prompt, turns)


def test_unknown_history():
    with pytest.raises(ValueError, match="--history silver: no such choice; choose from gold, no"):
        evaluation.EvalConfig(history="silver")
