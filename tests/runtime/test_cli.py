"""cli.py: a dataclass as the command line; and worker processes that cannot hang a run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass

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
                 "--test, --no-test end with the table (default: True)",
                 "--out STR folder (default: runs)",
                 "--keep, --no-keep keep what was computed",
                 "--views X [X ...] which (default: ('a', 'b'))",
                 "--log-every INT (default: 20)"):
        assert line in flat, line
    assert "(default: )" not in flat and "(default: None)" not in flat


@pytest.mark.parametrize("program", ["train", "eval"])
def test_every_flag_of_the_programs_is_explained(program, capsys):
    module = __import__(program)
    config = {"train": "TrainConfig", "eval": "EvalConfig"}[program]
    with pytest.raises(SystemExit):
        cli.parse(getattr(module, config), module.__doc__, ["--help"])
    options = capsys.readouterr().out.partition("options:")[2]
    comments = cli._comments(getattr(module, config))
    for name in getattr(module, config).__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in options
        assert len(comments[name]) > 8, f"--{name} is not explained"


def test_wrong_values_are_usage_errors(capsys):
    import eval as evaluation
    import train
    for config, words, message in [
            (train.TrainConfig, ["--model", "70b"],
             "unknown preset '70b'; there are tiny, 7b, 13b"),
            (train.TrainConfig, ["--variant", "x"], "unknown variant"),
            (train.TrainConfig, ["--causal", "x"], "wanted one of past, future, none"),
            (train.TrainConfig, ["--batch", "0"], "--batch 0; wanted more than 0"),
            (train.TrainConfig, ["--micro-batch", "-1"], "--micro-batch -1; wanted 0 or more"),
            (train.TrainConfig, ["--val-share", "1"], "less than 1"),
            (evaluation.EvalConfig, ["--task", "vqa,fly"], "unknown task fly; there are asr, ac"),
            (evaluation.EvalConfig, ["--views", "deaf"], "unknown views ['deaf']; there are both")]:
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
