"""eval.py on the real benchmark's records: each task's own metrics, the paper's column, missing
clips, verdicts; and from an official folder to the table (`aveb.py prepare`, then eval.py)."""

import json

import pytest
import torch

import aveb
import data
import eval as evaluation
from favor import Favor, preset

QUIET = {"log": lambda *_: None}


@pytest.fixture(scope="module")
def checkpoint(small_parts, tmp_path_factory):
    torch.manual_seed(1)
    model = Favor.from_config(preset(
        "tiny", whisper=str(small_parts / "whisper"), llm=str(small_parts / "llama"),
        instructblip=str(small_parts / "instructblip"), max_new_tokens=5))
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder)
    return folder


def row(task, metrics, answer, references, **meta):
    return {"id": f"{task}{answer}", "task": task, "prompt": "?", "references": references,
            "both": answer, "meta": {"dataset": "x", "metrics": metrics, **meta}}


def test_table_of_the_real_benchmark():
    rows = [row("vqa", ["word_match", "exact"], "It is red.", ["red"]),
            row("vqa", ["word_match", "exact"], "blue", ["red"]),
            row("asr", ["wer"], "two dogs", ["2 dogs"]),
            row("videoqa", ["choice"], "to run", ["to run"], dataset="nextqa", type="CW"),
            row("videoqa", ["choice"], "to run", ["to eat"], dataset="nextqa", type="TN"),
            row("avsd", ["judged"], "a man", ["a man"])]
    lines = evaluation.table(rows, ("both",), {"vqa": 3}).splitlines()
    assert lines[0] == "| task | n | both | chance | FAVOR 13B, paper |"
    found = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert "| 1 | 0.0 [" in found["**asr** wer ↓"] and found["**asr** wer ↓"].endswith("| 3.3 |")
    assert "| 2 (3 missing) | 50.0 [" in found["**vqa** word_match ↑"]
    assert found["**vqa** word_match ↑"].endswith("| - | 45.2 |")
    assert "| 0.0 [" in found["**vqa** % ↑"] and found["**vqa** % ↑"].endswith("| - | - |")
    assert "| 1 | 100.0 [" in found["videoqa: type C"] and "| 0.0 [" in found["videoqa: type T"]
    assert "n/a (no answers)" in found["**avsd** judged"]


def test_verdicts(tmp_path):
    rows = [row("avsd", ["judged"], said, ["one man"]) for said in ("a man", "x")]
    (tmp_path / "v.jsonl").write_text(json.dumps({"id": rows[0]["id"], "verdict": "Yes"}) + "\n"
                                      + json.dumps({"id": rows[1]["id"], "verdict": "No"}) + "\n")
    config = evaluation.EvalConfig(judge=f"file:{tmp_path / 'v.jsonl'}", judge_model="me")
    evaluation.ask_judge(config, rows, ("both",))
    assert [r["verdicts"]["both"] for r in rows] == [True, False]
    score = evaluation.scores_of("avsd", rows, "both")["judged"]
    assert score.value == 50 and "judge me" in score.note
    with pytest.raises(ValueError, match="--judge maybe; wanted url or file:VERDICTS"):
        evaluation.EvalConfig(judge="maybe")


def test_from_an_official_folder_to_the_table(checkpoint, tmp_path, capsys):
    """LibriSpeech: prepare, check, eval; one utterance's sound is missing and counted."""
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "12" / "34"
    chapter.mkdir(parents=True)
    (chapter / "12-34.trans.txt").write_text(
        "12-34-0000 RED BALL\n12-34-0001 BLUE BOX\n12-34-0002 GONE\n")
    for n in range(2):
        data.write_wav(chapter / f"12-34-000{n}.wav", torch.randn(8000) * 0.1)
        (chapter / f"12-34-000{n}.wav").rename(chapter / f"12-34-000{n}.flac")   # by content
    manifest = tmp_path / "test.jsonl"
    aveb.main(["prepare", "librispeech", "--root", str(tmp_path / "LibriSpeech"), "--split",
               "test", "--out", str(manifest), "--workers", "1"])
    records = data.read_manifest(manifest)
    assert len(records) == 2 and records[0].target == "red ball"
    evaluation.main(evaluation.EvalConfig(
        checkpoint=str(checkpoint), data=str(manifest), task="asr", views=("both",),
        out=str(tmp_path / "out.jsonl"), keep_features=False), [])
    printed = capsys.readouterr().out
    assert "| **asr** wer ↓ | 2 | " in printed and "| 3.3 |" in printed
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["scores"]["asr"]["both"]["wer"]["n"] == 2
    assert report["settings"]["ids"]


def test_a_folder_with_a_manifest_a_task(tmp_path):
    """--data FOLDER: videoqa.jsonl, asr.jsonl ... as far as they are there and asked for."""
    for task in ("asr", "vqa"):
        data.write_manifest(tmp_path / f"{task}.jsonl", [data.Record(f"{task}-1", task, "?", "x")])
    both = evaluation.find_manifests(tmp_path, evaluation.EvalConfig().tasks)
    assert [path.name for path in both] == ["asr.jsonl", "vqa.jsonl"]
    assert [r.id for r in evaluation.read_manifests(both)] == ["asr-1", "vqa-1"]
    assert evaluation.find_manifests(tmp_path, ("vqa",)) == [tmp_path / "vqa.jsonl"]
    with pytest.raises(SystemExit, match="id 'asr-1' is in two of them"):
        evaluation.read_manifests([both[0], both[0]])
    with pytest.raises(SystemExit, match="no such manifest"):
        evaluation.find_manifests(tmp_path, ("ocr",))
