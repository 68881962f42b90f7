"""eval.py on the real benchmark's records: each task's own metrics, the paper's column, missing
clips, verdicts; and from an official folder to the table: `python -m aveb prepare`, eval.py."""

import importlib.util
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from test_train import run_forked

import data
import eval as evaluation
from aveb import __main__ as command
from aveb import judge as judging
from aveb import metrics, tables
from aveb.answers import find_manifests, read_manifests
from favor import Favor
from runtime.media import write_wav

QUIET = {"log": lambda *_: None}


def row(task, metrics, answer, references, **meta):
    return {"id": f"{task}{answer}", "task": task, "prompt": "?", "references": references,
            "both": answer, "meta": {"dataset": "x", "metrics": metrics, **meta}}


def real_rows():
    return [row("vqa", ["word_match", "acc_vqa"], "It is red.", ["red"]),
            row("vqa", ["word_match", "acc_vqa"], "blue", ["red"]),
            row("asr", ["wer", "wer_basic"], "two dogs", ["2 dogs"]),
            row("videoqa", ["choice"], "to run", ["to run"], dataset="nextqa", type="CW"),
            row("videoqa", ["choice"], "to hop", ["to eat"], dataset="nextqa", type="TN"),
            row("videoqa", ["word_match"], "he cooks", ["cooks"], dataset="msvdqa"),
            row("avsd", ["judged"], "a man", ["a man"])]


def test_table_of_the_real_benchmark():
    lines = tables.table(real_rows(), ("both",), {"vqa": 3}).splitlines()
    assert lines[0] == "| task | n | missing | both | chance |"
    found = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert found["**asr** wer ↓"] == "| **asr** wer ↓ | 1 | 0 | 0.0 [0.0, 0.0] | - |"
    assert found["**asr** wer_basic ↓"].startswith("| **asr** wer_basic ↓ | 1 | 0 | 50.0 [")
    assert "| 2 | 3 | 50.0 [" in found["**vqa** word_match ↑"]
    assert "| 2 | 3 | 0.0 [" in found["**vqa** acc_vqa ↑"]
    # each metric over the records that name it
    assert "| 2 | 0 | 50.0 [" in found["**videoqa** choice ↑"]
    assert "| 1 | 0 | 100.0 [" in found["**videoqa** word_match ↑"]
    assert "| 1 | 0 | 100.0 [" in found["videoqa: type C, choice"]
    assert "| 1 | 0 | 0.0 [" in found["videoqa: type T, choice"]
    assert found["**avsd** judged"] == "| **avsd** judged | 0 | 1 | n/a (no answers) | - |"


def test_the_papers_tables():
    """Whole, with our columns at the end; marks from what the model was trained on."""
    rows = [*real_rows(), row("favd", ["bleu1"], "a dog", ["a dog"])]
    mixture = {"librispeech": {"asr": 5}, "favdbench": {"favd": 7}}
    text = tables.paper_tables(rows, ("both", "blind"), {"asr": 2}, mixture)
    titles = [line for line in text.splitlines() if line.startswith("Table")]
    assert titles == ["Table 2: single-modal tasks", "Table 3: audio-visual tasks",
                      "Table 4: audio-visual captions"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in text.splitlines() if line.startswith("|")}
    head = cells["task (paper's mark)"]
    assert len(cells) == 1 + 1 + 7 + 5 + 10 and head[-2:] == ["FAVOR 13B", "ours"]
    asr = cells["asr wer ↓"]
    assert asr[:3] == ["1", "2", "2.9"] and asr[-2:] == ["3.3", "0.0 [0.0, 0.0], trained on it"]
    assert cells["vqa word_match ↑, zero-shot"][-2:] == ["45.2", "50.0 [9.5, 90.5], zero-shot"]
    assert cells["ic cider ↑, zero-shot"][-2:] == ["86.0", "-"]
    assert cells["avsd judged ↑"][-2:] == ["54.5", "n/a (no answers)"]
    # trained on FAVDBench: our figure stands beside the fine-tuned ones
    assert cells["favd bleu1 ↑, zero-shot"][-2:] == ["28.2", "-"]
    ours = "100.0 [100.0, 100.0], trained on it"
    if not importlib.util.find_spec("pycocoevalcap"):
        ours = 'n/a (pip install -e ".[eval]")'
    elif not shutil.which("java"):
        ours = "n/a (needs Java)"
    assert cells["favd fine-tuned bleu1 ↑"][-2:] == ["44.2", ours]
    deaf = [{**rows[2], "audio only": "2 dogs"}]
    some = tables.paper_tables(deaf, ("both", "audio only"), whole=False).splitlines()
    assert len(some) == 5 and some[2].endswith("| FAVOR 13B | ours | ours, audio only |")
    assert some[4].count("trained on: unknown") == 2


@pytest.mark.parametrize("task, mixture, unseen", [
    ("asr", {"librispeech": {"asr": 1}}, False), ("asr", {"how2": {"avsr": 1}}, True),
    ("isqa", {"textvqa": {"ocr": 1}}, True), ("isqa", {"own": {"isqa": 1}}, False),
    ("avssd", {"vggsound": {"avssd": 1}}, False), ("avm", {"spokencoco": {"avm": 1}}, False),
    ("vqa", {}, True), ("vqa", None, None)])
def test_zero_shot(task, mixture, unseen):
    assert tables.zero_shot(task, mixture) is unseen


def test_verdicts(tmp_path):
    rows = [row("avsd", ["judged"], said, ["one man"]) for said in ("a man", "x")]
    (tmp_path / "v.jsonl").write_text(json.dumps({"id": rows[0]["id"], "verdict": "Yes"}) + "\n"
                                      + json.dumps({"id": rows[1]["id"], "verdict": "No"}) + "\n")
    config = evaluation.EvalConfig(judge=f"file:{tmp_path / 'v.jsonl'}", judge_model="me")
    judging.ask(config, None, rows, ("both",), tmp_path / "out.jsonl")
    assert [r["verdicts"]["both"] for r in rows] == [True, False]
    score = metrics.score(rows, "both")["judged"]
    assert score.value == 50 and "judge me" in score.note
    with pytest.raises(ValueError, match="--judge maybe; wanted url, self, none or file:"):
        evaluation.EvalConfig(judge="maybe")


def test_prompts_for_later_and_the_model_as_judge(checkpoint, tmp_path, capsys):
    rows = [row("avsd", ["judged"], said, ["one man"]) for said in ("a man", "")]
    for r in rows:
        r["blind"] = "nobody"
    none = evaluation.EvalConfig(judge="none")
    judging.ask(none, None, rows, ("both", "blind"), tmp_path / "out.jsonl")
    path = tmp_path / "out.prompts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # an empty answer is wrong, unasked; both rows are blind alike
    assert "2 prompts" in capsys.readouterr().out and len(lines) == 2
    assert all("verdicts" not in r for r in rows) and {"id", "key", "prompt"} == {*lines[0]}
    path.write_text("".join(json.dumps({**line, "verdict": "Yes"}) + "\n" for line in lines))
    with pytest.raises(ValueError, match="holds verdicts"):
        judging.ask(none, None, rows, ("both",), tmp_path / "out.jsonl")
    judging.ask(evaluation.EvalConfig(judge=f"file:{path}"), None, rows, ("both",),
                         tmp_path / "out.jsonl")
    assert [r["verdicts"]["both"] for r in rows] == [True, False]

    class Agrees:
        asked = []

        def answer(self, clip, prompt, **settings):
            self.asked.append((clip, prompt))
            return "Yes." if "one man" in prompt and "nobody" not in prompt else "I am not sure"
    own = evaluation.EvalConfig(judge="self", judge_model="7b")
    judging.ask(own, Agrees(), rows, ("both", "blind"), tmp_path / "out.jsonl")
    assert [r["verdicts"] for r in rows] == [{"both": True, "blind": False},
                                             {"both": False, "blind": False}]
    assert len(Agrees.asked) == 2 and rows[0]["judge"] == "7b"           # nothing twice
    judging.ask(own, Favor.from_pretrained(checkpoint), rows, ("both",),
                         tmp_path / "out.jsonl")                          # a real model can read it
    assert rows[0]["verdicts"]["both"] in (True, False)


def test_from_an_official_folder_to_the_table(checkpoint, tmp_path, capsys):
    """LibriSpeech: prepare, check, eval; one utterance's sound is missing and counted."""
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "12" / "34"
    chapter.mkdir(parents=True)
    (chapter / "12-34.trans.txt").write_text(
        "12-34-0000 RED BALL\n12-34-0001 BLUE BOX\n12-34-0002 GONE\n")
    for n in range(2):
        write_wav(chapter / f"12-34-000{n}.wav", torch.randn(8000) * 0.1)
        (chapter / f"12-34-000{n}.wav").rename(chapter / f"12-34-000{n}.flac")   # by content
    manifest = tmp_path / "test.jsonl"
    command.main(["prepare", "librispeech", "--root", str(tmp_path / "LibriSpeech"), "--split",
               "test", "--out", str(manifest), "--workers", "1"])
    records = data.read_manifest(manifest)
    assert len(records) == 2 and records[0].target == "red ball"
    evaluation.main(evaluation.EvalConfig(
        checkpoint=str(checkpoint), data=str(manifest), task="asr", views=("both",),
        out=str(tmp_path / "out.jsonl"), cache_features=False))
    printed = capsys.readouterr().out
    assert "| **asr** wer ↓ | 2 | 0 | " in printed and "| **asr** wer_basic ↓ | 2 |" in printed
    assert "Table 2: single-modal tasks" in printed and "| 3.3 |" in printed
    assert "Table 4" not in printed                       # --task all prints them whole
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["scores"]["asr"]["both"]["wer"]["n"] == 2
    assert report["settings"]["ids"] and report["zero-shot"] == {"asr": None}
    answered = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(isinstance(r["scores"]["wer"]["both"], float) for r in answered)


def test_a_folder_with_a_manifest_a_task(tmp_path):
    """--data FOLDER: videoqa.jsonl, asr.jsonl ... as far as they are there and asked for."""
    for task in ("asr", "vqa"):
        data.write_manifest(tmp_path / f"{task}.jsonl", [data.Record(f"{task}-1", task, "?", "x")])
    both = find_manifests(tmp_path, evaluation.EvalConfig().tasks)
    assert [path.name for path in both] == ["asr.jsonl", "vqa.jsonl"]
    assert [r.id for r in read_manifests(both)] == ["asr-1", "vqa-1"]
    assert find_manifests(tmp_path, ("vqa",)) == [tmp_path / "vqa.jsonl"]
    with pytest.raises(SystemExit, match="id 'asr-1' is in two of them"):
        read_manifests([both[0], both[0]])
    with pytest.raises(SystemExit, match="no such manifest"):
        find_manifests(tmp_path, ("ocr",))


def found_after(folder, text):
    """Puts a manifest into the folder -> the text of the one that eval.py then reads."""
    (folder / "test.jsonl").write_text(text)
    config = evaluation.EvalConfig()
    return (evaluation.make_miniature(config, True) or [folder / "test.jsonl"])[0].read_text()


def test_an_older_miniature_is_made_anew(tmp_path, monkeypatch):
    """Its questions would be another benchmark's; a manifest that someone put there stays."""
    monkeypatch.chdir(tmp_path)
    make = evaluation.generate.make
    monkeypatch.setattr(evaluation.generate, "make", lambda folder, **settings: make(
        folder, counts={"test": {"still": 1}}, workers=1, **settings))
    folder = Path(evaluation.EvalConfig.data)
    (manifest,), stamp = evaluation.make_miniature(evaluation.EvalConfig(), True), (
        folder / "test.made.json")
    made = manifest.read_text()
    assert found_after(folder, "of this version") == "of this version"
    for file in (stamp, folder / "test.clips.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 1}))
    assert found_after(folder, "of an older one") == made
    stamp.unlink()
    assert found_after(folder, "someone's own") == "someone's own"


def test_only_the_clips_of_the_questions_are_made(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    evaluation.main(evaluation.EvalConfig(task="ocr", limit=2, checkpoint=str(checkpoint),
                                          views=("both",), out="said.jsonl"))
    files = [path.name for path in Path(evaluation.EvalConfig.data, "test").iterdir()]
    answered = [json.loads(line) for line in Path("said.jsonl").read_text().splitlines()]
    assert [row["task"] for row in answered] == ["ocr"] * 2 and 1 <= len(files) <= 2
    assert "| **ocr** % ↑ | 2 | 0 | " in capsys.readouterr().out


def test_under_torchrun_the_first_process_makes_the_clips(tmp_path, monkeypatch):
    """The second one waits, finds them, and both go on to what is wrong with the question."""
    monkeypatch.chdir(tmp_path)
    manifest = Path(evaluation.EvalConfig.data) / "test-ocr-all.jsonl"

    def make(folder, **_):
        if not manifest.exists():
            time.sleep(0.3)
            folder.mkdir(parents=True)                       # an error if another made it, too
            manifest.write_text('{"id": "a", "task": "vqa", "prompt": "?", "target": "b", '
                                '"image": "a.png"}\n')
        return {"test": manifest}
    monkeypatch.setattr(evaluation.generate, "make", make)

    def run(rank):
        with pytest.raises(SystemExit, match="^1$" if rank else "no questions of task ocr"):
            evaluation.main(evaluation.EvalConfig(task="ocr"))
    assert run_forked(run, processes=2) == [0, 0]
