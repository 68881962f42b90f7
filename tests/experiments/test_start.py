"""experiments/start.py: its commands are ones that train.py and eval.py take, and its table says
what is in the logs and predictions of the runs."""

import json

import pytest

import eval
import train
from experiments import start
from favor import FavorConfig
from runtime import cli

PARTS = {"whisper": "a/whisper", "visual": "a/visual", "llm": "a/llm"}


@pytest.mark.parametrize("switch", start.SWITCHES)
def test_each_switch_is_a_command_line(switch, tmp_path):
    config = start.StartConfig(out=str(tmp_path), seeds=(3,), **PARTS)
    words, scored, folder = start.commands(config, "speech", switch, 3,
                                           {"train": "some/train.jsonl", "test": "some/test.jsonl"})
    trained, _ = cli.parse(train.TrainConfig, train.__doc__, [*map(str, words)])
    assert (trained.seed, trained.steps, trained.batch) == (3, config.steps, config.batch)
    method = trained.method()
    fields = {**{name: getattr(method, name) for name in start.PAPER}, "--lr": trained.lr,
              "--lora-lr": trained.lora_lr, "--lora-from": trained.lora_from}
    paper = start.PAPER | {"--lr": config.lr, "--lora-lr": 1, "--lora-from": 0}
    assert {name: value for name, value in fields.items() if value != paper[name]} == (
        start.SWITCHES[switch])
    assert all(getattr(FavorConfig(), name) == value for name, value in start.PAPER.items())
    asked, _ = cli.parse(eval.EvalConfig, eval.__doc__, [*map(str, scored)])
    assert asked.checkpoint == str(folder / "best") and asked.views == ("both", "blind")


def test_a_line_of_results(tmp_path):
    config = start.StartConfig(steps=50, questions=4, clips=8, **PARTS)
    (tmp_path / "log.jsonl").write_text("".join(
        json.dumps({"step": step, "ce": 100 - step}) + "\n" for step in range(1, 51)))
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(
        {"task": task, "references": [wanted], "both": both, "blind": blind}) + "\n"
        for task, wanted, both, blind in [
            ("ic", "red box", "Red box ", "blue box"), ("ic", "red box", "red ball", "red box"),
            ("vqa", "red", "red", "box"), ("vqa", "box", "box.", "ball")]))
    row = start.measure(tmp_path, config, "stills", "paper", 0)
    assert row["loss"] == {30: 70.0, 50: 52.0}                   # of steps 26 to 34 and 46 to 50
    assert row["n"] == {"ic": 2, "vqa": 2}
    assert row["exact"] == {"both": {"ic": 1, "vqa": 1}, "blind": {"ic": 1, "vqa": 0}}
    table = start.table([json.loads(json.dumps(row))])
    assert ("| ic 1 of 2 (9 to 91 %); vqa 1 of 2 (9 to 91 %) "
            "| ic 1 of 2 (9 to 91 %); vqa 0 of 2 (0 to 66 %) |") in table
    assert "| 70.00 | 52.00 |" in table


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch, capsys):
    config = start.StartConfig(out=str(tmp_path), tasks=("speech",), switches=("paper", "direct"),
                               **PARTS)
    started = []

    def run(program, *words):
        started.append(program)
        return 0
    monkeypatch.setattr(start, "make_clips", lambda *_: {"train": "x", "test": "y"})
    monkeypatch.setattr(start.cli, "run_module", run)
    monkeypatch.setattr(start, "measure", lambda folder, config, task, switch, seed: {
        "task": task, "switch": switch, "seed": seed, "steps": 1, "batch": 1, "clips": 1,
        "loss": {}, "n": {"asr": 1}, "exact": {"both": {"asr": 1}, "blind": {"asr": 0}}})
    start.run_all(config)
    assert started == ["train", "eval"] * 2
    start.run_all(config)
    assert started == ["train", "eval"] * 2
    monkeypatch.setattr(start.cli, "run_module", lambda *_: 3)
    with pytest.raises(SystemExit, match="3"):
        start.run_all(start.StartConfig(out=str(tmp_path), tasks=("speech",),
                                        switches=("halves",), **PARTS))


def test_unknown_names_and_missing_parts():
    with pytest.raises(ValueError, match="fast: unknown; there are paper, halves"):
        start.StartConfig(switches=("fast",), **PARTS)
    with pytest.raises(ValueError, match="--visual, --llm missing; name a folder for each"):
        start.StartConfig(whisper="x")
