"""answers.py: nothing is asked twice or lost, whatever is killed and however many processes there
are; dialogues with right, no or own earlier answers."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
from test_train import run_forked

import data
import eval as evaluation
from aveb import answers
from aveb import journal as journals
from aveb.answers import answer_all
from aveb.journal import Journal
from aveb.tasks import HISTORIES
from favor import Favor, preset
from runtime import distributed


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
    Journal(tmp_path / "x.parts", {"beams": 3})                     # it has answered nothing
    journal = Journal(tmp_path / "x.parts", {"beams": 1, "views": ["both"]})
    journal.add([{"id": "a", "answers": {"both": "yes"}}])
    assert Journal(tmp_path / "x.parts", {"beams": 1, "views": ["both"]}).lines.keys() == {"a"}
    with pytest.raises(SystemExit, match="other settings: beams: 1 -> 5"):
        Journal(tmp_path / "x.parts", {"beams": 5, "views": ["both"]})
    journal.remove()
    assert not (tmp_path / "x.parts").exists()


@pytest.fixture(scope="module")
def stopped(checkpoint, small_parts, small_miniature, tmp_path_factory):
    """-> a folder with parts, a checkpoint, clips, a manifest and the journal of a run that was
    killed, and a function that runs the same command again, with some settings changed."""
    root = tmp_path_factory.mktemp("stopped")
    for name in ("whisper", "instructblip", "llama"):
        shutil.copytree(small_parts / name, root / name)
    shutil.copytree(checkpoint, root / "run")
    edit_json(root / "run" / "favor.json", lambda saved: saved["config"].update(
        whisper=str(root / "whisper"), visual=str(root / "instructblip"),
        llm=str(root / "llama")))
    records = [r for r in data.read_manifest(small_miniature / "test.jsonl")
               if r.task in ("vqa", "avsd")]
    (root / "clips").mkdir()
    data.write_manifest(root / "test.jsonl", [dataclasses.replace(r, **{
        kind: shutil.copy2(getattr(r, kind), root / "clips") for kind in data.MEDIA
        if getattr(r, kind)}) for r in records])

    def run(**changes):
        evaluation.main(evaluation.EvalConfig(**{
            "checkpoint": str(root / "run"), "data": str(root / "test.jsonl"), "batch": 2,
            "out": str(root / "said.jsonl"), "cache_features": False, "views": ("both",),
            "task": "vqa,avsd"} | changes))
    answer_batch = answers.answer_batch
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        batches = iter(range(2))

        def killed(*of):
            if next(batches) == 1:
                raise KeyboardInterrupt
            return answer_batch(*of)
        patch.setattr(answers, "answer_batch", killed)
        run()
    return root, run


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_line(path, **values):
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(first) | values) + "\n" + rest)


def edit_weights(folder, number=-1):
    """One value of the last tensor becomes another; size and time of the file stay."""
    path = folder / "model.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[number] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def later(path):
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def alpha(root, *files):
    for name in files:
        edit_json(root / "run" / name, lambda saved: saved.get("config", saved).update(
            lora_alpha=64))


QUESTIONS = "the questions, their references, histories or other fields are others"
PARTS = "the weights of the model's parts are others"
FILES = "a tokenizer or a config of the model's parts is another"


@pytest.mark.parametrize("told, change", [
    ("window_frames: 5 -> 0", lambda root: edit_json(
        root / "run/favor.json", lambda saved: saved["config"].update(window_frames=0))),
    ("causal: past -> future; diversity: 0.01 -> 1", lambda root: edit_json(
        root / "run/favor.json", lambda saved: saved["config"].update(
            causal="future", diversity=1))),
    ("lora_alpha: 16 -> 64", lambda root: alpha(root, "favor.json", "lora/adapter_config.json")),
    ("the checkpoint has been trained on or replaced", lambda root: edit_weights(root / "run")),
    (PARTS, lambda root: edit_weights(root / "llama")),
    (PARTS, lambda root: edit_weights(root / "instructblip", -400)),
    (FILES, lambda root: (root / "instructblip/qformer_tokenizer/vocab.txt").write_text("\n".join(
        sorted((root / "instructblip/qformer_tokenizer/vocab.txt").read_text().split())))),
    (FILES, lambda root: edit_json(root / "llama/config.json",
                                   lambda config: config.update(rms_norm_eps=1e-3))),
    (QUESTIONS, lambda root: edit_line(root / "test.jsonl", prompt="What else?")),
    (QUESTIONS, lambda root: edit_line(root / "test.jsonl", target="nothing")),
    (QUESTIONS, lambda root: edit_line(root / "test.jsonl", history=[["Who?", "a man"]])),
    (QUESTIONS, lambda root: edit_line(root / "test.jsonl", end=1.5)),
    ("these are other questions", lambda root: edit_line(root / "test.jsonl", id="x")),
    ("media files have another size or time", lambda root: later(
        next((root / "clips").iterdir()))),
    ("media files have another size or time", lambda root: next((root / "clips").iterdir()).unlink(
        ))])
def test_what_changed_is_told(stopped, told, change):
    """Whatever else changes an answer than the command line: nothing is answered or mixed."""
    root, run = stopped
    before = {path: (path.read_bytes(), path.stat()) for path in root.rglob("*") if path.is_file()}
    change(root)
    try:
        with pytest.raises(SystemExit) as stop:
            run()
        assert str(stop.value) == (
            f"{root}/said.parts holds answers of a run with other settings: {told}. Choose another "
            "--out, or remove the folder to answer all questions anew")
    finally:
        for path, (content, stat) in before.items():
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("told, changes", [
    ("batch: 2 -> 3", {"batch": 3}), ("beams: 1 -> 2", {"beams": 2}),
    ("history: gold -> none", {"history": "none"}), ("merged: True -> False", {"merge": False}),
    ("cached features: False -> True", {"cache_features": True}),
    (r"views: \['both'\] -> \['blind'\]", {"views": ("blind",)}),
    ("dtype: float32 -> bfloat16; parameters?", {"dtype": "bfloat16"}),
    ("questions: 10 -> 4; these are other", {"limit": 2})])
def test_other_flags_are_told(stopped, told, changes):
    told = told.replace("parameters?", "the weights of the model's parts are others")
    with pytest.raises(SystemExit, match=f"with other settings: {told}"):
        stopped[1](**changes)


def test_other_code_is_told(stopped, monkeypatch):
    monkeypatch.setattr(journals, "ANSWERING", ("favor.py", "eval.py"))
    with pytest.raises(SystemExit, match="settings: the code that makes the answers is another. C"):
        stopped[1]()


@pytest.mark.parametrize("damage, told", [
    (lambda lines: [lines[0], b'{"id": 5, "answers": {"both": "x"}}'], "line 2 is damaged"),
    (lambda lines: [*lines, b'["a"]'], "line 4 is damaged"),
    (lambda lines: [*lines, b'{"id": "a"}'], "line 4 is damaged"),
    (lambda lines: [*lines, b'{"id": "a", "answers": {"blind": "x"}}'], "line 4 is damaged"),
    (lambda lines: [*lines, b'{"id": "a", "answers": {"both": 3}}'], "line 4 is damaged"),
    (lambda lines: [*lines, b'{"id": "a", "answers": "both"}'], "line 4 is damaged"),
    (lambda lines: [lines[0], b"\xff\xfe\0{" + lines[1][:9], *lines[1:]], "line 2 is damaged"),
    (lambda lines: lines[1:], "line 1 is damaged"),
    (lambda lines: [b'{"settings": []}', *lines], "line 1 is damaged"),
    (lambda lines: [b'{"settings": {"method": 0}}', *lines], "line 1 is damaged"),
    (lambda lines: [b"[" * 100_000, *lines], "line 1 is damaged")])
def test_a_damaged_journal_is_told(tmp_path, damage, told):
    """The file, the line and what to remove."""
    settings = {"views": ["both"], "method": {"fps": 2.0}}
    journal = Journal(tmp_path, settings)
    journal.add([{"id": key, "answers": {"both": "x"}} for key in ("b", "c")])
    path, = tmp_path.iterdir()
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(SystemExit) as stop:
        Journal(tmp_path, settings)
    assert str(stop.value).startswith(f"{path}: {told}") and "\n" not in str(stop.value)
    assert str(stop.value).endswith("; remove this file, and its questions are answered anew")


def test_the_same_at_another_place_goes_on(stopped, tmp_path, capsys):
    """Another path to the same checkpoint, parts, manifest and clips is no change, nor is a line
    that a kill cut off.  The last test with `stopped`: it ends that run."""
    root, run = stopped
    moved = root.rename(tmp_path / "moved")
    edit_json(moved / "run" / "favor.json", lambda saved: saved["config"].update(
        whisper=str(moved / "whisper"), visual=str(moved / "instructblip"),
        llm=str(moved / "llama"))
    )
    path = next((moved / "said.parts").iterdir())
    path.write_bytes(path.read_bytes() + b'{"id": "torn\n\0\0\0')
    run(checkpoint=str(moved / "run"), data=str(moved / "test.jsonl"),
        out=str(moved / "said.jsonl"))
    assert "answering 10 questions, each 1 times: both; 2 are answered already" in (
        capsys.readouterr().out)
    assert not (moved / "said.parts").exists() and (moved / "said.jsonl").exists()


def test_processes_with_different_settings(tmp_path):
    """As with another checkpoint on a second machine: all stop, one says why.  Media files may have
    other times there."""
    def run(rank):
        distributed.init_distributed()
        Journal(tmp_path / "a", {"weights": "x", "media": rank}).remove()
        with pytest.raises(SystemExit) as stop:
            Journal(tmp_path / "b", {"weights": rank})
        assert stop.value.code == 1 if rank else (
            "process 1 has other settings than process 0: the checkpoint" in stop.value.code)
        distributed.shutdown()
    assert run_forked(run, processes=2) == [0, 0]
    assert not (tmp_path / "b").exists()


def test_a_journal_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="file cannot be written: File exists; make"):
        Journal(tmp_path / "file", {})
    taken = Journal(tmp_path / "best" / "parts", {})         # train.py swaps in a new best/
    (tmp_path / "best").rename(tmp_path / "best.old")
    taken.add([{"id": "a", "answers": {"both": "x"}}])
    taken.remove()
    journal = Journal(tmp_path / "parts", {})
    monkeypatch.setattr(journal, "file", open("/dev/full", "w"))
    with pytest.raises(SystemExit, match="parts cannot be written: No space left on device; make"):
        journal.add([{"id": "a", "answers": {"both": "x"}}])


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


@pytest.mark.parametrize("wrong", [{"limit": -1}, {"batch": 0}, {"beams": -2}, {"processes": -1}])
def test_numbers_that_cannot_be_meant(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"--{name} {value}; wanted . or more"):
        evaluation.EvalConfig(**wrong)


def test_a_damaged_checkpoint_or_no_clip_ends_with_a_sentence(checkpoint, tmp_path):
    gone = data.Record("a", "vqa", "?", "x", video="no.mp4")
    data.write_manifest(tmp_path / "test.jsonl", [gone])
    settings = {"data": str(tmp_path / "test.jsonl"), "task": "vqa", "views": ("both",),
                "out": str(tmp_path / "said.jsonl")}
    for cached in (True, False):
        with pytest.raises(SystemExit, match="no.mp4: no such file|none of the questions' clips"):
            evaluation.main(evaluation.EvalConfig(
                checkpoint=str(checkpoint), cache_features=cached, **settings))
        shutil.rmtree(tmp_path / "said.parts")
    shutil.copytree(checkpoint, tmp_path / "run")
    (tmp_path / "run" / "favor.json").write_text("[")
    with pytest.raises(SystemExit, match="favor.json: not valid JSON"):
        evaluation.main(evaluation.EvalConfig(checkpoint=str(tmp_path / "run"), **settings))


def test_unknown_history():
    with pytest.raises(ValueError, match="--history silver: no such choice; choose from gold, no"):
        evaluation.EvalConfig(history="silver")


def test_an_earlier_question_that_is_too_long(checkpoint, records):
    """--history model asks it, which leaves out its dialogue alone."""
    talks = [r for r in records if r.task == "avsd"][:2]
    talks[0] = dataclasses.replace(talks[0], history=(("why " * 3000, "so"),))
    said, skipped = answer_all(Favor.from_pretrained(checkpoint), talks, None, ("both",),
                               history="model", log=lambda *_: None)
    assert {*said} == {talks[1].id} and skipped[0][0] == talks[0].id
    assert "the LLM has" in skipped[0][1]
