"""cli.py: a dataclass as the command line; and worker processes that cannot hang a run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Literal

import pytest

from runtime import cli


@dataclass(frozen=True)
class Config:
    task: str = "all"  # what to do
    out: str = ""  # folder (default: runs)
    steps: int = 7  # optimiser steps, 100 % of them
    lr: float = 1e-3  # peak
    test: bool = True  # end with the table
    keep: bool | None = None  # keep what was computed
    sync: str | None = None  # where from
    views: tuple = ("a", "b")  # which
    log_every: int = 20

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}; wanted more than 0")


def parse(*words):
    return cli.parse(Config, "What it does.\n\n   python it.py", list(words))


def test_defaults_and_values():
    assert parse() == (Config(), set())
    config, given = parse("--steps", "3", "--lr", "2e-4", "--task", "x", "--log-every", "5",
                          "--sync", "y")
    assert config == Config(steps=3, lr=2e-4, task="x", log_every=5, sync="y")
    assert given == {"steps", "lr", "task", "log_every", "sync"}
    assert isinstance(config.steps, int) and isinstance(config.lr, float)


def test_booleans():
    assert parse("--no-test", "--keep")[0] == Config(test=False, keep=True)
    assert parse("--test", "--no-keep")[0] == Config(test=True, keep=False)
    with pytest.raises(SystemExit):
        # the classic trap: a word that would mean True
        parse("--test", "False")


def test_tuples():
    assert parse("--views", "audio only", "both")[0].views == ("audio only", "both")


@pytest.mark.parametrize("words", [
    ["--nope"], ["--step", "3"], ["--steps", "many"], ["--steps", "1.5"], ["extra"], ["--lr"],
    ["--views"]])
def test_wrong_lines_fail(words, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*words)
    assert error.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_value_error_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--steps", "0")
    assert error.value.code == 2
    assert "error: --steps 0; wanted more than 0" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    shown = capsys.readouterr().out
    assert error.value.code == 0
    assert "What it does.\n\n   python it.py" in shown                 # the docstring as it stands
    flat = " ".join(shown.split())
    for line in ("--steps INT optimiser steps, 100 % of them (default: 7)",
                 "--lr FLOAT peak (default: 0.001)",
                 "--test, --no-test end with the table (default: on)",
                 "--out STR folder (default: runs)",
                 "--keep, --no-keep keep what was computed",
                 "--views STR [STR ...] which (default: a b)",
                 "--log-every INT (default: 20)"):
        assert line in flat, line
    assert "(default: )" not in flat and "(default: None)" not in flat


# ---- groups, choices, units ---------------------------------------------------------------------

@dataclass(frozen=True)
class Grouped:
    seed: int = 0  # of the random numbers
    # -- data
    data: tuple = ("media/my clips", "b")  # <manifest> files to learn from; 50 %
    sets: tuple[Literal["asr", "ac"], ...] = ()  # tasks to keep
    sizes: tuple[float, ...] = (0.5,)  # <seconds> of the clips,
                                       # the longest first
    # a comment that is no help text
    # -- the method
    sync: bool = False  # join the modalities
    mask: Literal["", "audio", "visual"] = ""  # what is left out
    causal: Literal["past", "none"] | None = None  # what a frame sees
    beams: Literal[1, 5] = 1  # <beams> kept

    ALIASES = {"join-all": "sync"}

    def __post_init__(self):
        cli.check_choices(self)


def grouped(*words):
    return cli.parse(Grouped, "", list(words))


def test_literals_are_choices(capsys):
    config, given = grouped("--mask", "audio", "--causal", "none", "--beams", "5", "--sets", "ac",
                            "asr", "--sizes", "1", "2.5", "--join-all")
    assert config == Grouped(sets=("ac", "asr"), sizes=(1.0, 2.5), sync=True, mask="audio",
                             causal="none", beams=5)
    assert given == {"mask", "causal", "beams", "sets", "sizes", "sync"}
    for words, listed in ((["--mask", "sound"], "'audio', 'visual'"),
                          (["--causal", "future"], "'past', 'none'"), (["--beams", "2"], "1, 5"),
                          (["--sets", "asr", "vqa"], "'asr', 'ac'")):
        with pytest.raises(SystemExit) as error:
            grouped(*words)
        assert error.value.code == 2
        shown = capsys.readouterr().err
        assert f"argument {words[0]}: invalid choice: " in shown and f"from {listed})" in shown


def test_literals_are_checked_without_a_command_line():
    assert Grouped(mask="visual", causal="past", sets=("ac",)).beams == 1
    for changes, message in (({"mask": "sound"}, "--mask sound: no such choice; choose from audio, "
                                                 "visual"),
                             ({"sets": ("ac", "vqa")}, "--sets vqa: .* choose from asr, ac"),
                             ({"beams": 2}, "--beams 2: .* choose from 1, 5"),
                             ({"causal": ""}, "--causal : .* choose from past, none")):
        with pytest.raises(ValueError, match=message):
            Grouped(**changes)


def test_help_has_groups_choices_and_units(capsys):
    with pytest.raises(SystemExit):
        grouped("--help")
    options, data, method = capsys.readouterr().out.partition("options:")[2].replace(
        "the method:", "data:").split("data:\n")
    flat = [" ".join(part.split()) for part in (options, data, method)]
    assert flat == [
        "-h, --help show this help message and exit --seed INT of the random numbers (default: 0)",
        "--data manifest [manifest ...] files to learn from; 50 % (default: 'media/my clips' b) "
        "--sets {asr,ac} [{asr,ac} ...] tasks to keep "
        "--sizes seconds [seconds ...] of the clips, the longest first (default: 0.5)",
        "--sync, --no-sync join the modalities (default: off) "
        "--mask {audio,visual} what is left out --causal {past,none} what a frame sees "
        "--beams beams kept (default: 1)"]


def test_an_old_name_of_a_flag_works_but_is_not_shown(capsys):
    assert grouped("--join-all") == grouped("--sync") == (Grouped(sync=True), {"sync"})
    assert grouped("--no-join-all") == (Grouped(), {"sync"})
    with pytest.raises(SystemExit):
        grouped("--help")
    shown = capsys.readouterr().out
    assert "--sync" in shown and "join-all" not in shown


def test_the_old_name_of_the_feature_cache_still_works():
    import eval as evaluation
    import train
    for config in (train.TrainConfig, evaluation.EvalConfig):
        assert cli.parse(config, "", ["--no-keep-features"])[0].cache_features is False
        assert cli.parse(config, "", ["--keep-features"])[0].cache_features is True


def test_help_ends_before_the_names_for_programmers(capsys):
    doc = "Trains.\n\n   python it.py\n\nPublic: Public, parse.\nAnd more."
    assert cli.description(doc) == "Trains.\n\n   python it.py"
    assert cli.description("In Public: as it is.") == "In Public: as it is."
    with pytest.raises(SystemExit):
        cli.parse(Config, doc, ["--help"])
    shown = capsys.readouterr().out
    assert "python it.py\n\noptions:" in shown and "Public" not in shown


@pytest.mark.parametrize("module, program", [
    ("experiments.ablate", "python -m experiments.ablate"),
    ("experiments.bench.__main__", "python -m experiments.bench"),
    (None, "it.py")])
def test_usage_names_the_command_that_was_run(module, program, monkeypatch, capsys):
    spec = module and ModuleSpec(module, loader=None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["/somewhere/it.py", "--steps", "0"])
    with pytest.raises(SystemExit):
        cli.parse(Config, "")
    shown = capsys.readouterr().err
    assert shown.startswith(f"usage: {program} [-h]") and f"\n{program}: error: --steps 0" in shown


@pytest.mark.parametrize("program", ["train", "eval"])
def test_every_flag_of_the_programs_is_explained(program, capsys):
    module = __import__(program)
    config = {"train": "TrainConfig", "eval": "EvalConfig"}[program]
    with pytest.raises(SystemExit):
        cli.parse(getattr(module, config), module.__doc__, ["--help"])
    options = capsys.readouterr().out.partition("options:")[2]
    comments = {name: text for name, (_, text) in
                cli._documentation(getattr(module, config)).items()}
    for name in getattr(module, config).__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in options
        assert len(comments[name]) > 8, f"--{name} is not explained"


def test_wrong_values_are_usage_errors(capsys):
    import eval as evaluation
    import train
    for config, words, message in [
            (train.TrainConfig, ["--model", "70b"],
             "invalid choice: '70b' (choose from"),
            (train.TrainConfig, ["--variant", "x"], "invalid choice: 'x'"),
            (train.TrainConfig, ["--causal", "x"], "invalid choice: 'x' (choose from"),
            (train.TrainConfig, ["--batch", "0"], "--batch 0; wanted more than 0"),
            (train.TrainConfig, ["--micro-batch", "-1"], "--micro-batch -1; wanted 0 or more"),
            (train.TrainConfig, ["--val-share", "1"], "less than 1"),
            (evaluation.EvalConfig, ["--task", "vqa,fly"], "unknown task fly; there are asr, ac"),
            (evaluation.EvalConfig, ["--views", "deaf"], "invalid choice: 'deaf'")]:
        with pytest.raises(SystemExit) as error:
            cli.parse(config, "", words)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert train.TrainConfig(sync=False, window_frames=3, queries=4).method().window_frames == 3


# ---- workers ------------------------------------------------------------------------------------

def square(n):
    return n * n


def start_of_worker(path):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")


def die_at_nine(n):
    if n == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


def test_workers_keep_the_order(tmp_path):
    assert list(cli.parallel(square, range(5), 1)) == [0, 1, 4, 9, 16]
    started = tmp_path / "pids"
    squares = list(cli.parallel(square, range(40), 2, start_of_worker, (started,)))
    assert squares == [n * n for n in range(40)]
    pids = set(started.read_text().split())
    assert len(pids) == 2 and str(os.getpid()) not in pids


def test_a_dying_worker_ends_the_run():
    from concurrent.futures.process import BrokenProcessPool
    with pytest.raises(BrokenProcessPool):            # multiprocessing.Pool waits for ever here
        list(cli.parallel(die_at_nine, range(40), 2))


def test_a_killed_run_leaves_no_workers(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(f"""
        import sys, os, time
        sys.path.insert(0, {os.path.dirname(os.path.dirname(cli.__file__))!r})
        from runtime import cli
        def work(n):
            print(os.getpid(), flush=True)
            time.sleep(60)
        if __name__ == "__main__":
            list(cli.parallel(work, range(2), 2))
    """))
    run = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    worker = int(run.stdout.readline())
    run.kill()
    run.wait()
    for _ in range(100):
        try:
            os.kill(worker, 0)
            with open(f"/proc/{worker}/stat") as file:     # dead, but not yet reaped
                if ") Z " in file.read():
                    return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("a worker outlived its killed run")


# ---- progress -----------------------------------------------------------------------------------

def test_progress_counts_items_in_lines(monkeypatch, capsys):
    """stderr is a file here: a line per state.  A loop of less than 5 s shows nothing."""
    assert list(cli.progress(iter("abc"), 3, "reading", "clip")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
    real = cli.tqdm
    monkeypatch.setattr(cli, "tqdm", lambda **settings: real(
        **settings | {"delay": 0, "mininterval": 0}))
    for _ in cli.progress(iter("abc"), 3, "reading", "clip"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines[:4]] == [
        f"reading: {n} of 3 clips" for n in range(4)]
    assert "left" in lines[0]
    monkeypatch.setenv("RANK", "1")
    assert list(cli.progress("ab", 2, "reading", "clip")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_program_of_its_own(tmp_path, monkeypatch, capfd):
    """Found from any folder, whatever lies there, and without the rank of this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.run_module("miniature", "--help") == 0
    assert "python -m miniature" in capfd.readouterr().out
    assert cli.run_module("miniature", "fly") == 2
