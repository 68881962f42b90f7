"""train.py, eval.py, demo.py and the feature cache end to end, on a miniature of a few clips and
parts of random weights: runs, two processes = one, resume = no stop, cached features = fresh."""

import contextlib
import copy
import dataclasses
import json
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import steps
import torch

import data
import demo
import eval as evaluation
import favor
import lora
import train
from aveb import answers, tables
from aveb.tasks import VIEWS
from baselines.systems import load_system
from favor import Favor
from miniature import scenes
from runtime import checkpoint as checkpoints
from runtime import cli, distributed, loader
from runtime import feature_cache as features
from runtime import manifests as corpus

ROOT = Path(train.__file__).parent
quiet = lambda *_: None                                                          # noqa: E731


# ---- running ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def command(small_parts, small_miniature):
    """command(out, **flags) -> words of a train.py command line: 6 small steps, or as flags say."""
    def command(out, *words, **flags):
        flags = {"data": small_miniature, "out": out, "steps": 6, "batch": 8, "val_every": 2,
                 "log_every": 2,
                 "warmup": 2, "processes": 1, "workers": 0, "val_share": 0.1, **{
                     name: small_parts / folder for name, folder in
                     (("whisper", "whisper"), ("visual", "instructblip"),
                      ("llm", "llama"))}} | flags
        named = [part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", str(v))]
        return [*named, *(words or ["--no-test"])]
    return command


def run(words):
    """train.py in this process."""
    train.main(cli.parse(train.TrainConfig, train.__doc__, words)[0], words)


def run_forked(work, processes=1, seconds=600):
    """work(rank) in forked processes that know each other as under torchrun -> their exit codes.  A
    process that hangs is killed and fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(rank):
        if processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "GLOO_SOCKET_IFNAME": "lo"}
        try:
            work(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=start, args=(rank,)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
        child.join()
    assert not hung, f"{len(hung)} of {processes} processes hung"
    return [child.exitcode for child in children]


def wait_for(condition, seconds=600):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.003)


def program(*words, cwd=None, seconds=600):
    """A program of ours in a process of its own."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True,
                          text=True, timeout=seconds)


def forked(*words):
    """What program() gives, by a forked process, which need not import PyTorch again.  words: a
    Python file or -m and a module, and what follows."""
    with tempfile.TemporaryDirectory() as folder:
        def work(rank):
            for handle in (1, 2):
                os.dup2(os.open(f"{folder}/{handle}", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                        handle)
            sys.stdout, sys.stderr = (open(handle, "w", buffering=1, closefd=False)
                                      for handle in (1, 2))
            sys.argv = [*map(str, words[words[0] == "-m":])]
            sys.orig_argv = [sys.executable, *map(str, words)]
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                if words[0] == "-m":
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as leaving:
                if isinstance(leaving.code, str):
                    print(leaving.code, file=sys.stderr)
                os._exit(leaving.code if isinstance(leaving.code, int) else bool(leaving.code))
        code, = run_forked(work)
        return SimpleNamespace(returncode=code, **{
            name: Path(folder, handle).read_text() for name, handle in
            (("stdout", "1"), ("stderr", "2"))})


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out, *names):
    return [[row[name] for name in names or ("loss", "ce", "diversity", "grad_norm")]
            for row in log_of(out)]


def weights(folder):
    """{name: tensor} of the trained parts of a checkpoint."""
    from safetensors.torch import load_file
    return {**load_file(folder / "model.safetensors"),
            **load_file(folder / "lora" / "adapter_model.safetensors")}


@pytest.fixture(scope="session")
def finished(command, tmp_path_factory):
    """(run folder, what was printed) of train.py, with the table at its end."""
    out = tmp_path_factory.mktemp("runs") / "full"
    done = forked(ROOT / "train.py", *command(out, "--test"))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


@pytest.fixture(scope="session")
def unbroken(finished):
    """Its folder."""
    return finished[0]


def test_a_run(finished, small_parts):
    out, printed = finished
    rows = log_of(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {*rows[0]} == {"step", "loss", "ce", "diversity", "cosine", "lr", "grad_norm", "task_ce",
                          "skipped", "clips_per_s", "tokens_per_s", "tflops", "memory_gib",
                          "wait_share", "eta_s"}
    assert {*rows[0]["task_ce"]} <= {*scenes.TASKS, "caption"} and rows[0]["skipped"] == 0
    assert rows[0]["cosine"] == rows[0]["diversity"]
    assert ["val_ce" in row for row in rows] == [False, True] * 3
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + 0.01 * row["diversity"], abs=1e-6)
    lowest = min((row["val_ce"], row["step"]) for row in rows if "val_ce" in row)
    for name, step in (("best", lowest[1]), ("last", 6)):
        model = Favor.from_pretrained(out / name)
        facts = json.loads((out / name / "favor.json").read_text())
        assert not model.training and facts["step"] == step
        assert facts["train"]["steps"] == 6 and "--steps 6" in facts["command"]
        assert sum(facts["mixture"]["own"].values()) == 83 and facts["commit"]
        assert len(facts["commit"]) == 40
        assert isinstance(model.answer(None, "yes"), str)
    assert (out / "last" / "state.pt").exists() and not (out / "best" / "state.pt").exists()
    assert not [path.name for path in out.iterdir() if path.suffix in (".new", ".old", ".tmp")]
    config = json.loads((out / "config.json").read_text())
    assert config["method"]["whisper"] == str(small_parts / "whisper")
    assert config["train"]["batch"] == 8
    assert "step 2/6: loss" in printed and "ETA" in printed and "| causal Q-Former | " in printed
    assert "cross-entropy, steps 1-6" in (out / "loss.txt").read_text()
    table = (out / "predictions.md").read_text()
    assert table in printed
    for task in scenes.TASKS:
        assert f"| **{task}** " in table
    answered = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(answered) == 36 and {*VIEWS} < {*answered[0]}


def test_flags_reach_the_method(command, tmp_path):
    run(command(tmp_path, "--no-test", "--no-sync", steps=1, window_frames=2, queries=3,
                causal="none", diversity=0.5))
    model = Favor.from_pretrained(tmp_path / "last")
    config = model.config
    assert (config.variant, config.sync, config.window_frames, config.causal, config.diversity) == (
        "paper", False, 2, "none", 0.5)
    assert model.qformer.queries.shape[1] == 3
    row = log_of(tmp_path)[0]
    assert row["loss"] == pytest.approx(row["ce"] + 0.5 * row["diversity"], abs=1e-6)


def test_a_second_stage_begins_where_the_first_ended(command, unbroken, tmp_path):
    run(command(tmp_path, steps=1, lr=1e-9, start_from=unbroken / "best"))
    ours, before = weights(tmp_path / "last"), weights(unbroken / "best")
    assert all(torch.allclose(ours[name], before[name], atol=1e-6) for name in before)


def test_training_learns(command, small_miniature, tmp_path):
    """The committed parts load, and in 20 steps on a few clips the loss falls."""
    there = {flag: ROOT / "miniature" / "weights" / name for flag, name in
             (("whisper", "whisper"), ("visual", "instructblip"), ("llm", "llama"))
             if (ROOT / "miniature" / "weights" / name / "model.safetensors").exists()}
    assert there, ("miniature/weights/ holds no pretrained parts; make them: "
                   "python -m miniature pretrain")
    data.write_manifest(tmp_path / "train.jsonl",
                        data.read_manifest(small_miniature / "train.jsonl")[::5])
    run(command(tmp_path / "run", data=tmp_path / "train.jsonl", steps=20, batch=8, val_every=20,
                val_share=0, warmup=3, mask_share=0, **there))
    ce = [row["ce"] for row in log_of(tmp_path / "run")]
    print(f"cross-entropy {np.mean(ce[:3]):.2f} -> {np.mean(ce[-8:]):.2f}")
    assert np.mean(ce[-8:]) < 0.7 * np.mean(ce[:3])


def test_compiled_blocks_learn_the_same(command, tmp_path, monkeypatch):
    """--compile, as dynamo sees it, without the C++ compiler behind it: the same losses."""
    settings, real = [], torch.nn.Module.compile

    def compile_eagerly(module, **given):
        settings.append((type(module).__name__, given))
        real(module, backend="eager", **given)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    for word in ("--no-compile", "--compile"):
        run(command(tmp_path / word, "--no-test", word, steps=2, batch=4))
    assert settings and all(one == ("Block", {"dynamic": True}) for one in settings)
    plain, compiled = (np.array(losses(tmp_path / word)) for word in ("--no-compile", "--compile"))
    assert np.abs(plain - compiled)[:, :3].max() < 1e-6
    torch._dynamo.reset()


# ---- two processes = one ------------------------------------------------------------------------

def two_processes(words):
    assert run_forked(lambda rank: run(words), processes=2) == [0, 0]


@pytest.mark.parametrize("batch, micro_batch", [(8, 0), (9, 2)])     # 5 samples in 3 parts, 4 in 2
def test_two_processes_are_one(command, tmp_path, batch, micro_batch):
    flags = {"steps": 4, "batch": batch, "mask_share": 0.5}
    run(command(tmp_path / "one", **flags))
    two_processes(command(tmp_path / "two", micro_batch=micro_batch, **flags))
    one, two = (np.array(losses(tmp_path / name, "loss", "ce", "diversity"))
                for name in ("one", "two"))
    print(f"largest difference of a loss: {abs(one - two).max():.1e}")
    assert abs(one - two).max() < 1e-5
    held_out = [[row["val_ce"] for row in log_of(tmp_path / name) if "val_ce" in row]
                for name in ("one", "two")]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    # the gradients' norm is the same too: nothing was scaled by the number of processes
    norms = np.array([losses(tmp_path / name, "grad_norm") for name in ("one", "two")])
    assert np.allclose(norms[0], norms[1], rtol=1e-3)


def test_the_processes_share_the_batch(command, tmp_path, monkeypatch):
    out = {}

    def note(step, model, items):
        share = [f"{i.sample.prompt} {i.sample.target} {i.sample.mask}" for i in items]
        (tmp_path / f"{out['name']} {step} {os.getpid()}").write_text(json.dumps(share))

    steps.watch(monkeypatch.setattr, before=note)
    for out["name"], go in (("one", run), ("two", two_processes)):
        go(command(tmp_path / out["name"], steps=2, batch=9))
    for step in (0, 1):
        one, two = ([json.loads(path.read_text()) for path in tmp_path.glob(f"{name} {step} *")]
                    for name in ("one", "two"))
        assert sorted(map(len, two)) == [4, 5] and sorted(sum(two, [])) == sorted(*one)


def test_accumulation_changes_nothing(command, tmp_path, unbroken):
    run(command(tmp_path, micro_batch=3))
    assert np.allclose(losses(tmp_path, "loss", "ce", "diversity"),
                       losses(unbroken, "loss", "ce", "diversity"),
                       atol=1e-5)


@pytest.fixture(scope="module")
def one_sided(small_miniature, tmp_path_factory):
    """A manifest whose rows 0, 2, 4 ... (process 0) and 1, 3, 5 ... (process 1) are, step by step
    of 4 samples: text / image, sound / video, image / text, text / text, sound / both."""
    records = data.read_manifest(small_miniature / "train.jsonl")
    by_kind = {"text": [data.Record("t", "ic", f"say {w}", w) for w in ("red", "blue", "the cone")]}
    for kind, task in (("image", "vqa"), ("sound", "asr"), ("video", "videoqa"), ("both", "isqa")):
        by_kind[kind] = [r for r in records if r.task == task]
    rows = []
    for pair in (("text", "image"), ("sound", "video"), ("image", "text"), ("text", "text"),
                 ("sound", "both")):
        for kind in pair * 2:
            rows.append(dataclasses.replace(
                by_kind[kind][len(rows) % 3], id=f"row {len(rows)}", meta={}))
    path = tmp_path_factory.mktemp("one-sided") / "train.jsonl"
    data.write_manifest(path, rows)
    return path


@pytest.mark.parametrize("words", [["--no-test"], ["--no-test", "--no-sync"]],
                         ids=["sync", "no sync"])
def test_processes_with_different_samples(command, one_sided, tmp_path, words, monkeypatch):
    monkeypatch.setattr(corpus.Order, "epoch", lambda self, epoch: np.arange(len(self.weights)))
    flags = {"data": one_sided, "steps": 5, "batch": 4, "val_share": 0, "mask_share": 0}
    two_processes(command(tmp_path / "two", *words, **flags))    # one makes the features, both read
    run(command(tmp_path / "one", *words, **flags))
    one, two = (np.array(losses(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 5 and np.allclose(one, two, atol=1e-5, rtol=1e-3)
    ours, theirs = (weights(tmp_path / name / "last") for name in ("one", "two"))
    far = {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}
    assert max(far.values()) < 1e-3, max(far, key=far.get)


def listening(pid):
    """The addresses, as /proc writes them, at which a process waits for connections."""
    mine = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):                        # closed meanwhile
            mine.add(os.readlink(handle))
    rows = [line.split() for kind in ("tcp", "tcp6") if (table := Path(f"/proc/{pid}/net/{kind}")
                                                         ).exists()
            for line in table.read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_process_a_core(command, unbroken, tmp_path):
    """train.py starts the others itself, reachable from this machine only; they learn what one
    does, and end with it, also when it is killed, here before its last step."""
    out, script = tmp_path / "two", tmp_path / "waiting.py"
    script.write_text(f"""
import runpy, sys, time
sys.path[:0] = [{str(ROOT)!r}]
from runtime import distributed

def clip(model, most, real=distributed.grad_norm_and_clip, calls=[]):
    calls.append(most)
    while len(calls) == 6:
        time.sleep(1)
    return real(model, most)

distributed.grad_norm_and_clip = clip
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")

    def alive():                               # processes with this run's folder in their command
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):                # ended meanwhile
                found += [int(path.parent.name)] * (str(out) in path.read_text())
        return found

    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen([sys.executable, script, *map(str, command(out, processes=2))],
                               stdout=said)
    try:
        wait_for(lambda: (out / "log.jsonl").exists() and len(log_of(out)) == 5
                 or run.poll() is not None)
        assert len(alive()) == 2
        assert np.allclose(losses(out, "loss"), losses(unbroken, "loss")[:5], atol=1e-5)
        said = (tmp_path / "said").read_text()
        assert said.count("step 4/6") == 1 and "on 2 x cpu" in said          # one speaks
        hosts = [host for pid in alive() for host in listening(pid)]
        assert len(hosts) >= 2 and {*hosts} <= {"0100007F", "0" * 24 + "01000000"}, hosts
        run.kill()
        run.wait()
        wait_for(lambda: not alive())
    finally:
        for pid in alive():
            os.kill(pid, signal.SIGKILL)


def test_no_more_processes_than_samples(command, tmp_path):
    done = forked(ROOT / "train.py", *command(tmp_path, processes=0, batch=1, steps=1))
    assert done.returncode == 0 and "on 1 x cpu" in done.stdout, done.stderr[-3000:]


def test_when_one_process_dies_the_other_ends(command, tmp_path):
    def work(rank):
        def break_it(step, model, items):
            if rank == 1 and step == 1:
                raise RuntimeError("broken on purpose")
        steps.watch(setattr, before=break_it)
        run(command(tmp_path))
    assert run_forked(work, processes=2) == [1, 1]
    assert len(log_of(tmp_path)) == 1


def test_too_small_a_batch(command, tmp_path):
    def work(rank):
        with pytest.raises(SystemExit, match="--batch 1 for 2 processes" if rank == 0 else "^1$"):
            run(command(tmp_path, batch=1))
    assert run_forked(work, processes=2) == [0, 0]


@pytest.mark.parametrize("wrong, said", [
    ({"llm": "/nowhere/llama"}, "/nowhere/llama"), ({"data": "/nowhere.jsonl"}, "/nowhere.jsonl"),
    ({"pair_share": 0.5}, "--pair-share and --match-share take"), ({"batch": 1}, "--batch 1 for 2"),
    ({"start_from": "/nowhere/best"}, "/nowhere/best")], ids=str)
def test_an_error_at_the_start_is_said_once(command, unbroken, tmp_path, capfd, wrong, said):
    """By one of the processes, in one line; all of them end."""
    def work(rank):
        if "pair_share" in wrong:                                # as if no record were sound alone
            corpus.Corpus.sound_only = property(lambda self: (), lambda self, rows: None)
        sys.argv[1:] = [*map(str, command(tmp_path / "run", **wrong))]
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as leaving:
            print(leaving.code if isinstance(leaving.code, str) else "", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
    assert run_forked(work, processes=2) == [1, 1]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and said in lines[0], lines


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_among_others(capfd, failing):
    """In blocks that processes run one after the other the rest ends, too, silently."""
    def work(rank):
        distributed.init_distributed()
        try:
            with (distributed.main_process_first() if failing == 0
                  else distributed.one_rank_at_a_time()):
                if rank == failing:
                    raise ValueError("broken on purpose")
        except (SystemExit, ValueError) as error:
            os.write(2, f"{type(error).__name__} {error}\n".encode())
            os._exit(1)
    assert run_forked(work, processes=2) == [1, 1]
    assert sorted(capfd.readouterr().err.splitlines()) == ["SystemExit 1",
                                                           "ValueError broken on purpose"]


@pytest.mark.parametrize("words", [["--step", "3"], ["--batch", "-1"], ["--model", "8b"]])
def test_a_wrong_flag_is_said_once(monkeypatch, capsys, words):
    """By the first process of a machine; all have the same words."""
    for rank in ("0", "1", "3"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            cli.parse(train.TrainConfig, train.__doc__, words)
        assert bool(capsys.readouterr().err) == (rank == "0")


def test_nothing_held_out(command, tmp_path, capsys):
    """No held-out loss is printed, logged or written; best/ is chosen by the batch's own."""
    run(command(tmp_path, val_share=0, steps=4))
    said = capsys.readouterr().out
    assert "held-out ce" not in said and " 0 held out" in said
    assert not any("val_ce" in row for row in log_of(tmp_path))
    assert json.loads((tmp_path / "best" / "favor.json").read_text())["val_ce"] is None
    assert '"validation"' not in (tmp_path / "events.jsonl").read_text()
    best = min((row["ce"], row["step"]) for row in log_of(tmp_path) if row["step"] % 2 == 0)
    assert json.loads((tmp_path / "best" / "favor.json").read_text())["step"] == best[1]


def test_held_out_clips_that_cannot_be_read_are_no_perfect_score(command, tmp_path, monkeypatch,
                                                                 capsys):
    read = train.readable_samples
    monkeypatch.setattr(train, "readable_samples",
                        lambda model, records, *rest: read(model, [], *rest))
    run(command(tmp_path, steps=2))
    assert "held-out ce" not in capsys.readouterr().out and (tmp_path / "best").exists()


@pytest.mark.parametrize("warmup, told", [(1, False), (2, True), (100, True)])
def test_a_warm_up_longer_than_the_run_is_told(command, tmp_path, capsys, warmup, told):
    run(command(tmp_path, warmup=warmup, steps=2))
    said = [line for line in capsys.readouterr().out.splitlines() if "--warmup" in line]
    assert len(said) == told
    if told:                                      # the highest rate that a step had
        highest = max(row["lr"] for row in log_of(tmp_path))
        assert f"--warmup {warmup}" in said[0] and f"reaches {highest:.1e} instead of" in said[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_number_of_processes_changes_the_noise_of_dropout_only(command, tmp_path, monkeypatch,
                                                                   dropout):
    """As docs/training.md says: 7b and 13b have dropout, tiny has none."""
    assert [favor.preset(name).lora_dropout > 0 for name in ("tiny", "7b", "13b")] == [
        False, True, True]
    noisy = dataclasses.replace(favor.PRESETS["tiny"], dropout=dropout, lora_dropout=dropout)
    monkeypatch.setitem(favor.PRESETS, "tiny", noisy)
    run(command(tmp_path / "one", steps=2))
    assert run_forked(lambda rank: run(command(tmp_path / "two", steps=2)), processes=2) == [0, 0]
    one, two = (np.array(losses(tmp_path / name, "ce")) for name in ("one", "two"))
    assert np.allclose(one, two, atol=1e-5) == (dropout == 0)
    assert abs(one - two).max() < 0.5                             # but it is the same run


# ---- resume = no stop ---------------------------------------------------------------------------

def killed_at(step):
    """Makes the process kill itself in the middle of that step (counted from 0)."""
    def kill(now, norm):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return norm
    steps.watch(setattr, after=kill)


def test_resume_is_no_stop(command, tmp_path, monkeypatch):
    """Killed in the fourth and again in the last step, with dropout on: the log and the weights are
    those of the unbroken run, digit by digit."""
    wild = dataclasses.replace(favor.PRESETS["tiny"], dropout=0.2, lora_dropout=0.2)
    monkeypatch.setitem(favor.PRESETS, "tiny", wild)
    run(command(tmp_path / "whole"))
    out = tmp_path / "stopped"
    for step, complete in ((3, 3), (5, 5)):
        def work(rank, step=step):
            killed_at(step)
            run(command(out))
        assert run_forked(work) == [-signal.SIGKILL]
        assert len(log_of(out)) == complete
        with open(out / "log.jsonl", "a") as file:              # a kill in the middle of a line
            file.write('{"step": 99, "lo')
    run(command(out))
    assert losses(out) == losses(tmp_path / "whole")
    assert [row["step"] for row in log_of(out)] == [1, 2, 3, 4, 5, 6]
    assert [json.loads(line)["event"] for line in open(out / "events.jsonl")].count("resumed") == 2
    for name in ("best", "last"):
        ours, theirs = weights(out / name), weights(tmp_path / "whole" / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_run_of_an_older_version_goes_on(command, unbroken, tmp_path):
    """Its state.pt says "instructblip", has no settings that came later, and has LoRA among the
    matrices: what follows is digit by digit what an unbroken run does."""
    out = tmp_path / "stopped"

    def work(rank):
        killed_at(3)
        run(command(out))
    assert run_forked(work) == [-signal.SIGKILL]
    state = torch.load(out / "last" / "state.pt", weights_only=True)
    config, optimiser = state["config"], state["optimiser"]
    config["instructblip"] = config.pop("visual")
    for name in ("visual_grid", "prompt", "set", "lora_lr", "lora_from"):
        del config[name]
    lora_group, matrices, vectors = optimiser["param_groups"]
    matrices["params"] = lora_group["params"] + matrices["params"]
    optimiser["param_groups"] = [matrices, vectors]
    assert all(group.pop("name") for group in optimiser["param_groups"])
    torch.save(state, out / "last" / "state.pt")
    with pytest.raises(SystemExit, match=r"other settings.*'visual': "):
        run(command(out, visual=tmp_path))
    run([word.replace("--visual", "--instructblip") for word in map(str, command(out))])
    assert losses(out) == losses(unbroken)
    assert "resumed" in (out / "events.jsonl").read_text()


def test_the_order_of_the_optimisers_state_is_that_of_two_groups(small_model):
    """Matrices with LoRA's, then vectors, each as the model lists them: as an older version did."""
    trained = small_model.trained_parameters()
    before = [p for p in trained if p.ndim >= 2] + [p for p in trained if p.ndim < 2]
    now = [p for group in train.make_optimiser(small_model, train.TrainConfig()).param_groups
           for p in group["params"]]
    assert len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def test_a_checkpoint_that_says_instructblip_opens(unbroken, small_parts, tmp_path, capsys):
    """An old favor.json, and the flag of that name in all three programs."""
    shutil.copytree(unbroken / "best", tmp_path / "best")
    facts = json.loads((tmp_path / "best" / "favor.json").read_text())
    for settings in (facts["config"], facts["train"]):
        settings["instructblip"] = settings.pop("visual")
    for name in ("visual_grid", "prompt", "feature_norm", "position_std", "match_embeddings",
                 "direct"):
        del facts["config"][name]
    (tmp_path / "best" / "favor.json").write_text(json.dumps(facts))
    old, new = Favor.from_pretrained(tmp_path / "best"), Favor.from_pretrained(unbroken / "best")
    assert old.config == new.config
    shutil.copytree(small_parts / "instructblip", tmp_path / "moved")
    words = ["--instructblip", str(tmp_path / "moved")]
    for kind in (train.TrainConfig, evaluation.EvalConfig):
        assert cli.parse(kind, "", words)[0].visual == str(tmp_path / "moved")
    moved = Favor.from_pretrained(tmp_path / "best", instructblip=str(tmp_path / "moved"))
    assert moved.config.visual == str(tmp_path / "moved")
    demo.main(["--checkpoint", str(tmp_path / "best"), *words, "--offline", str(
        ROOT / "miniature" / "demo.mp4"), "What is seen?"])
    assert capsys.readouterr().out.strip()


def test_a_finished_run_is_not_run_again(unbroken, command, capsys):
    before = (unbroken / "log.jsonl").read_text()
    run(command(unbroken))
    assert (unbroken / "log.jsonl").read_text() == before
    assert "step 6" in capsys.readouterr().out


def test_other_settings_are_refused(unbroken, command):
    with pytest.raises(SystemExit,
                       match=r"other settings.*'lr': \(0.0015, 0.002\).*choose another --out"):
        run(command(unbroken, lr=0.002))
    run(command(unbroken, log_every=1))                         # what changes no number may change


@pytest.fixture
def small_model(small_parts):
    config = favor.preset("tiny", whisper=str(small_parts / "whisper"),
                          llm=str(small_parts / "llama"),
                          visual=str(small_parts / "instructblip"))
    return Favor.from_config(config)


def saved_step(folder):
    """Step of a whole checkpoint: state, aligner and adapters, which must open."""
    assert Favor.from_pretrained(folder)
    return torch.load(folder / "state.pt", weights_only=True)["step"]


@pytest.mark.parametrize("moment",
                         ["aligner", "adapters", "state", "first rename", "second rename"])
def test_a_kill_while_saving_leaves_a_whole_checkpoint(small_model, tmp_path, monkeypatch, moment):
    def killed(*_, **__):
        raise KeyboardInterrupt

    def half_written(_, path, **__):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    def half_written_as(name):
        save = favor.hub.save_tensors

        def save_tensors(path, tensors):
            return half_written(None, path) if Path(path).name.startswith(name) else save(
                path, tensors)
        return save_tensors

    real = Path.rename
    breaks = {
        "aligner": lambda m: m.setattr(favor.hub, "save_tensors", half_written_as("model")),
        "adapters": lambda m: m.setattr(favor.hub, "save_tensors", half_written_as("adapter")),
        "state": lambda m: m.setattr(torch, "save", half_written),
        "first rename": lambda m: m.setattr(Path, "rename", killed),
        "second rename": lambda m: m.setattr(
            Path, "rename", lambda self, to: killed() if self.suffix == ".new" else real(self, to))}
    assert checkpoints.latest(tmp_path) is None
    checkpoints.save(tmp_path / "last", small_model, {}, {"step": 1})
    # the second time perhaps without last/
    for _ in range(2):
        with monkeypatch.context() as broken, contextlib.suppress(KeyboardInterrupt):
            breaks[moment](broken)
            checkpoints.save(tmp_path / "last", small_model, {}, {"step": 2})
        assert saved_step(checkpoints.latest(tmp_path)) == 1
    checkpoints.save(tmp_path / "last", small_model, {}, {"step": 3})
    assert checkpoints.latest(tmp_path) == tmp_path / "last"
    assert saved_step(tmp_path / "last") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


# ---- a step -------------------------------------------------------------------------------------

@pytest.mark.parametrize("limits", [
    {"micro_batch": 0}, {"micro_batch": 1}, {"micro_batch": 4},
    {"micro_batch": 0, "micro_tokens": 100}, {"micro_batch": 3, "micro_frames": 12}])
def test_the_loss_of_a_step_is_the_batch_mean(small_model, small_miniature, limits):
    """Over answer tokens, not over samples or parts, and whatever the size of the parts."""
    records = data.read_manifest(small_miniature / "train.jsonl")[::9]
    cache = features.cache_features(small_model, records, log=quiet)
    _, samples = answers.readable_samples(small_model, records, cache)
    with torch.no_grad():
        wanted = small_model(samples)
    config = train.TrainConfig(warmup=0, steps=10, **limits)
    optimiser = train.make_optimiser(small_model, config)
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    row, share = steps.one_step(small_model, [*samples, None], config)        # None: not readable
    assert [row[name] for name in ("loss", "ce", "diversity")] == pytest.approx(
        [wanted[name].item() for name in ("loss", "ce", "diversity")], abs=1e-5)
    total, n = share.task_ce["any"]
    assert n == len(samples) and total / n == pytest.approx(
        wanted["item_ce"].mean().item(), abs=1e-4)
    assert row["grad_norm"] > 0 and len(share.samples) == len(samples)
    optimiser.step()
    moved = [name for name, p in small_model.named_parameters() if not torch.equal(p, before[name])]
    assert {"lora_B", "audio_proj"} <= {part for name in moved for part in name.split(".")}
    learn = {name for name, p in small_model.named_parameters() if p.requires_grad}
    assert {*moved} <= learn


def test_a_step_without_a_readable_clip(small_model):
    row, share = steps.one_step(small_model, [None, None], train.TrainConfig())
    assert row == {"loss": None, "ce": None} and not share.parts


def test_a_broken_step_stops_the_run(command, tmp_path, monkeypatch, capsys):
    """A loss that is not a number: its ids are written down; it ends, or --max-skips leaves the
    step out and the weights as they were."""
    steps.watch(monkeypatch.setattr,
                after=lambda step, norm: math.nan if step in (1, 3) else norm)
    with pytest.raises(SystemExit, match="step 2: loss .*, gradient norm nan; the batch's ids"):
        run(command(tmp_path / "ends"))
    events = [json.loads(line) for line in open(tmp_path / "ends" / "events.jsonl")]
    assert events[0]["event"] == "nonfinite" and len(events[0]["ids"]) == 8
    assert not (tmp_path / "ends" / "last").exists()
    capsys.readouterr()
    run(command(tmp_path / "goes", max_skips=2, val_every=1, save_every=1, keep=0))
    assert capsys.readouterr().out.count("is left out") == 2
    made = [weights(tmp_path / "goes" / f"step-{n:06d}") for n in range(1, 7)]
    same = [all(torch.equal(a[k], b[k]) for k in a)
            for a, b in zip(made, made[1:], strict=False)]
    assert same == [True, False, True, False, False]
    with pytest.raises(SystemExit, match="step 4: "):
        run(command(tmp_path / "few", max_skips=1))


def test_learning_rate():
    config = train.TrainConfig(steps=1000, warmup=100, lr=1.0)
    rates = [train.learning_rate(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, abs=1e-6) and max(rates) == pytest.approx(1, abs=0.03)
    assert rates[49] == pytest.approx(0.5, abs=0.01) and rates[:95] == sorted(rates[:95])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert rates[500] == pytest.approx(0.51, abs=0.01)
    assert train.learning_rate(train.TrainConfig(steps=10, warmup=0, lr=1.0), 0) == pytest.approx(1)


def test_the_fused_optimiser_takes_the_same_steps(small_model):
    """As PyTorch's plain AdamW of the same settings, over five steps of random gradients."""
    config, results = train.TrainConfig(), []
    for fused in (True, False):
        model = copy.deepcopy(small_model).requires_grad_(True)
        optimiser = train.make_optimiser(model, config)
        assert optimiser.defaults["fused"]
        for group in optimiser.param_groups:
            group["fused"] = fused
        torch.manual_seed(0)
        for _ in range(5):
            for p in model.trained_parameters():
                p.grad = torch.randn_like(p)
            optimiser.step()
        results.append([p.detach().clone() for p in model.trained_parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-6


def test_weight_decay_is_for_matrices(small_model):
    optimiser = train.make_optimiser(small_model, train.TrainConfig(weight_decay=0.3))
    groups = {group["name"]: group for group in optimiser.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "lora": 0.3, "matrices": 0.3, "vectors": 0}
    assert {p.ndim for p in groups["vectors"]["params"]} == {1}
    for name in ("lora", "matrices"):
        assert min(p.ndim for p in groups[name]["params"]) == 2
    adapters = {p for n, p in small_model.named_parameters() if "lora_" in n}
    assert adapters == {*groups["lora"]["params"]}
    count = sum(len(group["params"]) for group in groups.values())
    assert count == len([p for p in small_model.parameters() if p.requires_grad])


def test_lora_has_a_rate_of_its_own():
    config = train.TrainConfig(steps=100, warmup=10, lr=1.0, lora_lr=0.25, lora_from=20)
    for step in range(100):
        rate = train.learning_rate(config, step)
        assert rate == train.learning_rate(config, step, "vectors") > 0
        assert train.learning_rate(config, step, "lora") == (0.25 * rate if step >= 20 else 0)
    assert train.learning_rate(train.TrainConfig(), 7, "lora") == train.learning_rate(
        train.TrainConfig(), 7)


def test_lora_waits_while_the_rest_begins(command, tmp_path, monkeypatch):
    """--lora-from 2: two steps leave its bits as they were, the third moves it."""
    kept = []

    def note(step, model, items):
        kept.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    steps.watch(monkeypatch.setattr, before=note)
    run(command(tmp_path, steps=4, lora_from=2, lora_lr=0.5))
    moved = [{n for n in a if not torch.equal(a[n], b[n])}
             for a, b in zip(kept, kept[1:], strict=False)]
    adapters = {n for n in kept[0] if "lora_" in n}
    assert [len(names & adapters) > 0 for names in moved] == [False, False, True]
    assert all(len(names - adapters) > 10 for names in moved)


# ---- --set --------------------------------------------------------------------------------------

def test_set_takes_any_field_by_its_type(small_parts):
    config = cli.parse(train.TrainConfig, train.__doc__, [
        "--set", "direct=16", "audio_seconds=none", "match_embeddings=true", "antialias=false",
        "lora_targets=q_proj,v_proj", "position_std=1e-2", "causal=none", "fps=2.5"])[0]
    method = config.method()
    assert (method.direct, method.audio_seconds, method.match_embeddings, method.antialias) == (
        16, None, True, False)
    assert (method.lora_targets, method.position_std, method.causal, method.fps) == (
        ("q_proj", "v_proj"), 0.01, "none", 2.5)
    thirty = train.TrainConfig(set=("audio_seconds=30",)).method().audio_seconds
    assert thirty == 30.0 and type(thirty) is float


@pytest.mark.parametrize("words, said", [
    (["wings=2"], "'wings=2'; wanted FIELD=VALUE"), (["direct"], "'direct'; wanted FIELD=VALUE"),
    (["direct=wide"], "'direct=wide'"), (["direct=1.5"], "'direct=1.5'"),
    (["queries=true"], "'queries=true'"), (["sync=1"], "'sync=1'"), (["fps=none"], "'fps=none'"),
    (["diversity=nan"], "'diversity=nan'"), (["lora_targets="], "'lora_targets='"),
    (["direct=2", "direct=3"], "'direct=3'; wanted FIELD=VALUE, each field of FavorConfig once"),
    (["instructblip=here"], "'instructblip=here'"), (["feature_norm=all"], "feature_norm='all'; "
                                                     "wanted one of joint, halves, standard"),
    (["direct=-1"], "direct=-1; wanted 0 or more"), (["layers=0"], "layers=0 and direct=0"),
    (["variant=official"], "--set variant=... and --variant say the same; give the flag alone"),
    (["fps=2", "--fps", "2"], "--set fps=... and --fps say the same"),
    (["visual_grid=2", "--visual-grid", "3"], "and --visual-grid say the same")], ids=str)
def test_a_wrong_setting_is_a_usage_error(capsys, words, said):
    with pytest.raises(SystemExit) as error:
        cli.parse(train.TrainConfig, train.__doc__, ["--set", *words])
    assert error.value.code == 2 and said in capsys.readouterr().err


# ---- other parts, one modality -------------------------------------------------------------------

@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    """A LLaMA-3 in small: grouped-query attention, scaled rope, tied head, two ends, tokenizer.json
    of byte-level BPE; saved by transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM
    root = tmp_path_factory.mktemp("llama3")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.add_special_tokens([AddedToken(name, special=True) for name in (
        "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")])
    pieces.save(str(root / "tokenizer.json"))
    LlamaForCausalLM(LlamaConfig(
        vocab_size=259, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, tie_word_embeddings=True,
        bos_token_id=256, eos_token_id=[257, 258], rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64})
    ).save_pretrained(root)
    return root


def test_another_llm(command, llama3, tmp_path):
    """--llm: any LLaMA takes the place of Vicuna, in training and answering."""
    run(command(tmp_path, "--no-test", steps=2, llm=llama3))
    model = Favor.from_pretrained(tmp_path / "last")
    assert model.llm.config.kv_heads == 2 and model.llm_proj.out_features == 48
    assert model.tokenizer.bos_id == 256 and isinstance(model.answer(None, "Hello?"), str)


@pytest.fixture(scope="module")
def small_preset(small_parts, small_miniature, llama3, tmp_path_factory):
    """Flags of --model small-laptop with parts of hardly any width: a SigLIP as transformers saves
    it, an LLM with the tokens of ChatML, and an aligner of one narrow layer without dropout."""
    records = data.read_manifest(small_miniature / "train.jsonl")[::6]
    from tokenizers import AddedToken, Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=64, patch_size=16)).save_pretrained(root / "siglip")
    (root / "llm").mkdir()
    pieces = Tokenizer.from_file(str(llama3 / "tokenizer.json"))
    pieces.add_special_tokens([AddedToken(name, special=True)
                               for name in ("<|im_start|>", "<|im_end|>")])
    pieces.save(str(root / "llm" / "tokenizer.json"))
    LlamaForCausalLM(LlamaConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, tie_word_embeddings=True, bos_token_id=256,
        eos_token_id=257)).save_pretrained(root / "llm")
    data.write_manifest(root / "train.jsonl", records)
    return {"model": "small-laptop", "data": root / "train.jsonl", "features": root / "kept",
            "whisper": small_parts / "whisper", "visual": root / "siglip", "llm": root / "llm",
            "visual_grid": 2, "queries": 4}, [
                "--no-test", "--set", "width=16", "layers=1", "heads=2", "causal_heads=2", "ffn=24",
                "dropout=0", "lora_dropout=0", "lora_r=2", "max_new_tokens=4",
                "feature_norm=standard", "direct=8", "match_embeddings=true"]


def test_the_small_preset_trains_keeps_and_answers(command, small_preset, small_miniature, tmp_path,
                                                   capsys):
    """Two processes as one, features kept by the preset's habit; a saved model answers as the
    one in memory does and with the same statistics."""
    flags, words = small_preset
    flags = flags | {"steps": 2, "warmup": 1}
    two_processes(command(tmp_path / "two", *words, **flags))
    kept = [*flags["features"].rglob("*.bin")]
    assert kept and losses(tmp_path / "two")[0][0] > 1
    run(command(tmp_path / "one", *words, **flags))
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=1e-5, rtol=1e-3)
    assert [*flags["features"].rglob("*.bin")] == kept               # nothing was encoded again
    ours, theirs = (weights(tmp_path / name / "last") for name in ("one", "two"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert ours["statistics.visual_std"].ne(1).any() and ours["statistics.audio_mean"].any()
    model = Favor.from_pretrained(tmp_path / "two" / "last")
    assert model.config.prompt == "chatml" and model.visual.n_queries == 4
    assert type(model.visual).__name__ == "GridEncoder" and model.qformer_tokenizer is None
    record = next(r for r in data.read_manifest(small_miniature / "test.jsonl") if r.video)
    clip, asked = data.load_clip(record, **model.clip_options()), "What is seen?"
    answer = model.answer(clip, asked)
    demo.main(["--checkpoint", str(tmp_path / "two" / "last"), "--no-merge", record.video, asked])
    assert answer.strip() in capsys.readouterr().out
    model.save_pretrained(tmp_path / "again")
    again = Favor.from_pretrained(tmp_path / "again")
    sample = data.Sample(asked, "red", clip=clip)
    with torch.no_grad():
        assert torch.equal(again([sample])["item_ce"], model([sample])["item_ce"])


def test_a_second_stage_keeps_the_statistics_of_the_first(command, small_preset, tmp_path):
    """What a first stage of silent clips could not measure is measured in the second one."""
    flags, words = small_preset
    command = command(tmp_path / "run", *words, start_from=tmp_path / "start", **flags | {
        "steps": 1, "warmup": 0})
    model = Favor.from_config(cli.parse(train.TrainConfig, "", map(str, command))[0].method())
    model.statistics.visual_mean.fill_(0.5)
    model.statistics.visual_std.fill_(2)
    model.save_pretrained(tmp_path / "start")
    run(command)
    after = weights(tmp_path / "run" / "last")
    assert after["statistics.visual_mean"].eq(0.5).all() and after["statistics.visual_std"].eq(
        2).all()
    assert after["statistics.audio_mean"].ne(0).all() and after["statistics.audio_std"].ne(1).all()


@pytest.mark.parametrize("changes", [{}, {"sync": False}, {"window_frames": 0},
                                     {"variant": "official"}], ids=str)
def test_the_small_preset_with_the_papers_switches(small_preset, changes):
    """They go with an encoder that reads no question; --variant official, too, whose dropout of the
    visual Q-Former has nothing to act on."""
    flags, (_, _, *settings) = small_preset
    settings = [word for word in settings if not word.startswith("max_new")]
    config = train.TrainConfig(**{name: str(value) if isinstance(value, Path) else value
                                  for name, value in flags.items()}, **changes,
                               set=tuple(settings))
    model = Favor.from_config(config.method()).train()
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=generator)
    sound = torch.randn(40000, generator=generator) / 10
    clips = [data.Clip(frames, sound), data.Clip(frames[:1], is_image=True), data.Clip(None, sound)]
    samples = [data.Sample("what", "red", clip=clip) for clip in clips]
    model.measure(samples)
    out = model(samples)
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained_parameters())
    alone = [model([sample])["item_ce"].item() for sample in samples]
    assert out["item_ce"].tolist() == pytest.approx(alone, abs=1e-5)


def test_parts_that_do_not_go_together_are_refused(command, small_preset, small_parts, tmp_path):
    flags, words = small_preset
    for changes, said in (
            ({"visual_grid": 0}, "a SigLIP or DINOv2 goes with --visual and --visual-grid"),
            ({"visual": small_parts / "instructblip"}, "'instructblip'; wanted 'siglip'"),
            ({"llm": small_parts / "llama"}, r"no token <\|im_start\|>, which prompt=chatml needs"),
            ({"visual_grid": 5}, "visual_grid is 5; wanted 1 to 4"),
            ({"system": "instructblip"}, "--system instructblip needs the Q-Former")):
        with pytest.raises(SystemExit, match=said):
            run(command(tmp_path / "run", *words, **flags | changes))


@pytest.mark.parametrize(("mask", "view"), [("audio", "visual only"), ("visual", "audio only")])
def test_one_modality_alone(command, small_miniature, tmp_path, monkeypatch, mask, view):
    """--mask: not one sample of training or validation, and no question of the test, has it."""
    masks = set()
    windowed_inputs = Favor.windowed_inputs

    def spy(model, sample):
        masks.add(sample.mask)
        return windowed_inputs(model, sample)
    monkeypatch.setattr(Favor, "windowed_inputs", spy)
    run(command(tmp_path / "run", "--test", "--mask", mask, steps=2))
    assert masks == {mask}
    table = (tmp_path / "run" / "predictions.md").read_text()
    assert f"| task | n | missing | {view} | chance |" in table
    masks.clear()
    evaluation.main(evaluation.EvalConfig(
        checkpoint=str(tmp_path / "run" / "best"), data=str(small_miniature), mask=mask,
        task="avm", out=str(tmp_path / "said.jsonl")))
    assert masks == {mask}


# ---- broken clips --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def broken_manifest(small_miniature, tmp_path_factory):
    """Folder with train.jsonl and test.jsonl in which one clip in four is cut off or missing."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "bad.mp4").write_bytes(b"no film")
    for split in ("train", "test"):
        records = [r for r in data.read_manifest(small_miniature / f"{split}.jsonl")
                   if r.task in ("asr", "vqa", "avsr", "avssd")]
        bad = [r for k, r in enumerate(records) if k % 4 == 1]
        bad = [data.Record(r.id, r.task, r.prompt, r.target, meta=r.meta, refs=r.refs,
                           video=str(folder / ("bad.mp4" if k % 2 else "missing.mp4")))
               for k, r in enumerate(bad)]
        data.write_manifest(folder / f"{split}.jsonl",
                            [r for k, r in enumerate(records) if k % 4 != 1] + bad)
    return folder


# ---- without cached features --------------------------------------------------------------------

def test_training_without_cached_features(command, unbroken, tmp_path):
    run(command(tmp_path, "--no-test", "--no-cache-features", steps=6))
    ours, kept = (np.array(losses(folder, "loss", "ce")) for folder in (tmp_path, unbroken))
    assert abs(ours - kept).max() < 5e-3                          # fp16 on disk


@pytest.mark.parametrize("keep", ["--cache-features", "--no-cache-features"])
def test_a_run_goes_on_past_broken_clips(command, broken_manifest, tmp_path, capsys, keep):
    run(command(tmp_path, keep, "--test", data=broken_manifest, steps=4))
    assert len(log_of(tmp_path)) == 4
    printed = capsys.readouterr().out
    assert "bad.mp4: not readable" in printed or "missing.mp4: no such file" in printed
    lost = [json.loads(line) for line in open(tmp_path / "skipped.jsonl")]
    rows = data.read_manifest(broken_manifest / "train.jsonl")
    bad = {r.id for r in rows if "broken" in (r.video or "")}
    assert lost and {line["id"] for line in lost} <= bad
    assert sum(row["skipped"] for row in log_of(tmp_path)) == len(lost)
    assert f"skipped {len(lost)} samples of " in printed
    answered = [json.loads(line)
                for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    tested = data.read_manifest(broken_manifest / "test.jsonl")
    assert {row["id"] for row in answered} == {r.id for r in tested
                                               if "broken" not in (r.video or "")}


def test_nothing_readable_is_an_error(command, broken_manifest, tmp_path, capsys):
    records = [r for r in data.read_manifest(broken_manifest / "train.jsonl")
               if "broken" in (r.video or "")]
    data.write_manifest(tmp_path / "train.jsonl", records)
    with pytest.raises(SystemExit, match="steps in a row without a clip that can be read"):
        run(command(tmp_path / "run", "--no-test", "--no-cache-features", data=tmp_path,
                    val_share=0))
    with pytest.raises(SystemExit, match="nowhere.*no such manifest"):
        run(command(tmp_path / "other", data=tmp_path / "nowhere"))


# ---- eval.py ------------------------------------------------------------------------------------

def test_eval_one_task(finished, small_miniature, tmp_path):
    out, _ = finished
    done = forked(ROOT / "eval.py", "--task", "videoqa", "--checkpoint", out / "best", "--data",
                   small_miniature,
                   "--out", tmp_path / "answers.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    records = [r for r in data.read_manifest(small_miniature / "test.jsonl") if r.task == "videoqa"]
    assert [row["id"] for row in rows] == [r.id for r in records]
    for row, r in zip(rows, records, strict=True):
        assert {*row} == {"id", "task", "prompt", "answer", "references", "meta", "options",
                          "scores",
                          *VIEWS}
        assert (row["references"], row["prompt"], row["meta"]) == ([r.target], r.prompt, r.meta)
    head = "| task | n | missing | both | audio only | visual only | blind | chance |"
    assert head in done.stdout
    assert "| **videoqa** % ↑ | 4 | 0 | " in done.stdout and "| 25.0 |" in done.stdout
    assert "**asr**" not in done.stdout
    # the same answers one by one, and as train.py gave them
    model = Favor.from_pretrained(out / "best")
    assert rows[0]["both"] == model.answer(records[0].video, records[0].prompt)
    trained = {row["id"]: row
               for row in map(json.loads, (out / "predictions.jsonl").read_text().splitlines())}
    assert all(row == trained[row["id"]] for row in rows)


def evaluate(*words):
    evaluation.main(cli.parse(evaluation.EvalConfig, "", [*map(str, words)])[0])


def test_views(small_model, small_miniature):
    """Each answer is what the model says with that modality masked, also where the clip has none of
    it and the answer is taken over from another view."""
    records = data.read_manifest(small_miniature / "test.jsonl")
    records = [*{r.task: r for r in records}.values()]                            # one of each task
    cache = features.cache_features(small_model, records, log=quiet)
    torch.manual_seed(0)                     # an untrained model says the same in every view
    for parameter in small_model.trained_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    small_model.eval()
    rows, _ = answers.evaluate(small_model, records, cache, batch=5, log=quiet)
    assert [row["id"] for row in rows] == [r.id for r in records]
    differ = 0
    for view, mask in VIEWS.items():
        _, samples = answers.readable_samples(small_model, records, cache, mask)
        said = [small_model.generate([sample])[0] for sample in samples]
        assert [row[view] for row in rows] == said
        differ += sum(row[view] != row["both"] for row in rows)
    assert differ > len(rows) / 2


def test_what_is_longer_than_the_llm_in_a_step_and_in_eval(small_model):
    """A long clip is learnt in part and counted as cut, a long question is left out and counted."""
    model, (visual, audio) = small_model.train(), small_model.empty_features(60)
    long = data.Features(torch.randn(visual.shape), torch.randn(audio.shape))
    model.llm.config = dataclasses.replace(model.llm.config, max_positions=220)
    samples = [data.Sample("what is seen?", "red", features=long), data.Sample("why?", "it is"),
               data.Sample("what is seen? " * 90, "red", features=long)]
    with pytest.warns(UserWarning, match="are read, the LLM has 220 positions"):
        cut, _ = model.fit(samples[0])
    assert 150 < model.length(cut) <= 220 < model.length(samples[0])
    wanted, _ = steps.one_step(model, [cut, samples[1]], train.TrainConfig())
    model.zero_grad()
    items = steps.train_items(samples)
    share = train.encode_share(model, items, train.TrainConfig(), torch.device("cpu"))
    for part in share.parts:
        losses = model([sample for _, sample, *_ in part])
        share.add(part, losses, model.config.diversity)
    assert share.losses(model.config.diversity, torch.device("cpu")) == pytest.approx(
        {name: wanted[name] for name in ("loss", "ce", "diversity")}, abs=1e-6)
    rows = loader.skip_rows(items, 3)
    assert [(row["id"], *set(row) - {"step", "id"}) for row in rows] == [("2", "reason"),
                                                                         ("0", "cut")]
    assert "the LLM has 220 positions; shorten" in rows[0]["reason"] and "only" in rows[1]["cut"]
    records = [data.Record(str(i), "vqa", sample.prompt, "red") for i, sample in enumerate(samples)]
    rows, skipped = answers.evaluate(model, records, None, views=("both",), log=quiet)
    assert [row["id"] for row in rows] == ["0", "1"] and skipped == {"vqa": 1}


def test_eval_without_cached_features_and_with_views(finished, small_miniature, tmp_path, capsys):
    words = ["--task", "avm,isqa", "--checkpoint", finished[0] / "best", "--data", small_miniature,
             "--limit", 3,
             "--batch", 2, "--out", tmp_path / "a.jsonl"]
    evaluate(*words, "--no-cache-features", "--views", "both", "blind")
    fresh = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sorted(row["task"] for row in fresh) == ["avm"] * 3 + ["isqa"] * 2
    assert "| task | n | missing | both | blind | chance |" in capsys.readouterr().out
    evaluate(*words)
    kept = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["both"] for row in kept] == [row["both"] for row in fresh]


def test_eval_leaves_broken_clips_out(finished, broken_manifest, tmp_path, capsys):
    for keep in ("--cache-features", "--no-cache-features"):
        evaluate("--checkpoint", finished[0] / "best", "--data", broken_manifest, keep, "--out",
                 tmp_path / keep)
        printed = capsys.readouterr().out
        assert "skipped" in printed and ".mp4" in printed
        rows = (tmp_path / keep).read_text().splitlines()
        assert 0 < len(rows) < len(data.read_manifest(broken_manifest / "test.jsonl"))


def test_eval_errors(finished, small_miniature, tmp_path):
    with pytest.raises(SystemExit,
                       match="no checkpoint in .*nowhere.*make one with: python train.py"):
        evaluate("--checkpoint", tmp_path / "nowhere")
    with pytest.raises(SystemExit, match="no questions of task ocr"):
        data.write_manifest(tmp_path / "test.jsonl", [r for r in data.read_manifest(
            small_miniature / "test.jsonl") if r.task == "asr"])
        evaluate("--task", "ocr", "--checkpoint", finished[0] / "best", "--data", tmp_path)
    with pytest.raises(SystemExit, match="neither target nor refs"):
        data.write_manifest(tmp_path / "test.jsonl", [data.Record("x", "asr", "what")])
        evaluate("--checkpoint", finished[0] / "best", "--data", tmp_path)


def test_eval_merges_unless_told_not_to(finished):
    """LoRA is added in by default, for good; with and without it the answers are the same."""
    out, answers = finished[0], []
    for merge in (True, False):
        assert evaluation.EvalConfig().merge
        model, _ = load_system("favor", None, checkpoint=str(out / "best"), merge=merge)
        layers = list(lora.layers(model).values())
        assert layers and all(layer.merged == merge for layer in layers)
        assert all(layer.unmerged_weight is None for layer in layers)
        answers.append(model.answer(None, "yes"))
    assert answers[0] == answers[1]


def test_which_checkpoint(tmp_path, monkeypatch):
    """The last own run, else the committed one, else what to do."""
    monkeypatch.chdir(tmp_path)
    committed = tmp_path / "repo" / "miniature" / "weights" / "favor"
    monkeypatch.setattr(checkpoints, "COMMITTED", committed)
    with pytest.raises(SystemExit, match="python train.py"):
        checkpoints.find_checkpoint("")
    for folder in (committed, Path("runs/tiny/best")):
        folder.mkdir(parents=True)
        (folder / "favor.json").write_text("{}")
        assert checkpoints.find_checkpoint("") == folder


def test_table():
    """Scores and chance by hand; a kind a line; across and within windows apart."""
    def row(task, answer, reference, **meta):
        return {"id": task, "task": task, "references": [reference], "both": answer, "blind": "x",
                "meta": meta}
    rows = [row("videoqa", "red", "red", chance=0.25, type="after", one_window=True),
            row("videoqa", "Red.", "red", chance=0.25, type="before", one_window=False),
            row("videoqa", "blue", "red", chance=0.25, type="before", one_window=False),
            row("asr", "a b", "a c"), row("mine", "yes", "yes")]
    lines = tables.table(rows, ("both", "blind")).splitlines()
    assert lines[0] == "| task | n | missing | both | blind | chance |"
    for line, name in zip(lines[2:4], ("wer_basic", "wer"), strict=True):    # no meta.metrics: both
        assert line.startswith(f"| **asr** {name} ↓ | 1 | 0 | 50.0 [")
        assert line.endswith("| 100.0 [100.0, 100.0] | - |")
    assert lines[4] == ("| **videoqa** % ↑ | 3 | 0 | 66.7 [20.8, 93.9] | 0.0 [0.0, 56.2] | 25.0 |")
    assert lines[5].startswith("| **mine** % ↑ | 1 | 0 | 100.0 [")
    parts = {line.split("|")[1].strip(): line for line in lines[6:]}
    assert {*parts} == {f"videoqa: {k}"
                        for k in ("after", "before", "within one window", "across windows")}
    assert "| 2 | 0 | 50.0 [" in parts["videoqa: across windows"]
    assert "| 1 | 0 | 100.0 [" in parts["videoqa: after"]


# ---- demo.py ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def media(small_miniature):
    """A file of each kind."""
    records = {r.task: r for r in data.read_manifest(small_miniature / "test.jsonl")}
    return SimpleNamespace(mp4=records["avssd"].video, silent=records["videoqa"].video,
                           wav=records["asr"].audio,
                           png=records["isqa"].image, question=records["isqa"].audio)


def test_demo_answers_about_any_file(finished, media, capsys):
    checkpoint = ["--checkpoint", str(finished[0] / "best")]
    model = Favor.from_pretrained(finished[0] / "best")
    for words, told in [([media.mp4], "10 frames, 5.00 s of sound"),
                        ([media.silent], "10 frames, no sound"),
                        ([media.wav], "0 frames, "), ([media.png], "an image, no sound"),
                        ([media.png, "--audio", media.question], "an image, "),
                        ([media.mp4, "--start", "1", "--end", "3"], "4 frames, 2.00 s of sound")]:
        demo.main([words[0], "What is it?", *words[1:], *checkpoint])
        printed = capsys.readouterr()
        assert told in printed.err and printed.out.endswith("\n")
        if len(words) == 1:
            # streamed = whole
            assert printed.out.strip() == model.answer(words[0], "What is it?")
    demo.main([media.mp4, "What is it?", "--beams", "3", "--mask", "audio", *checkpoint])
    assert capsys.readouterr().out.strip() == model.answer(media.mp4, "What is it?", mask="audio",
                                                           num_beams=3)


def test_demo_without_a_clip(capsys):
    """The committed clip and checkpoint: right with both modalities, wrong without either."""
    demo.main(["--checkpoint", str(checkpoints.COMMITTED)])
    printed = capsys.readouterr().out
    said = dict(line.split(None, 1) if line.startswith(("clip", "question")) else
                (line[:20].strip(), line[20:].strip()) for line in printed.splitlines() if line)
    assert said["picture and sound"] == said["right answer"]
    assert said["right answer"] not in (said["without the sound"], said["without the picture"])
    assert "python train.py" in printed


def test_demo_errors(finished, media, tmp_path):
    checkpoint = ["--checkpoint", finished[0] / "best"]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(media.mp4).read_bytes()[:3000])
    for words, message in [([str(broken)], "broken.mp4: not readable as media"),
                           (["no.mp4"], "no.mp4: no such file"),
                           ([media.mp4, "--start", "9"], "start 9.0 s is beyond its end"),
                           ([str(tmp_path)], "wanted a video, sound or image file and not a fol"),
                           ([media.png, "--audio", "no.wav"], "--audio no.wav: no such file"),
                           ([media.mp4, "--start", "3", "--end", "2"], "--start 3 --end 2: want"),
                           ([media.mp4, "--start", "nan"], "--start nan --end inf: wanted seconds"),
                           ([media.mp4, "--end", "-1"], "--start 0 --end -1: wanted seconds"),
                           ([media.mp4, "--beams", "-1"], "--beams -1 --max-new-tokens 0: wanted"),
                           ([media.mp4, "--max-new-tokens", "-1"], "--max-new-tokens -1: wanted 1"),
                           ([media.silent, "--mask", "visual"], "no sound, so --mask visual lea"),
                           ([media.wav, "--mask", "audio"], "no picture, so --mask audio leaves"),
                           ([media.wav, "--audio", media.wav], "sound too")]:
        # a text: exit status 1, no traceback
        with pytest.raises(SystemExit, match=message) as error:
            demo.main([words[0], "What?", *words[1:], *map(str, checkpoint)])
        assert isinstance(error.value.code, str)
    with pytest.raises(SystemExit, match="no checkpoint in"):
        demo.main([media.mp4, "What?", "--checkpoint", str(tmp_path)])
    (tmp_path / "favor.json").write_text("{")
    with pytest.raises(SystemExit, match="favor.json: not valid JSON"):
        demo.main([media.mp4, "What?", "--checkpoint", str(tmp_path)])
    with pytest.raises(SystemExit, match="the question is not text in UTF-8"):
        demo.main([media.mp4, "What \udcff?", *map(str, checkpoint)])
    for question in ("", " \n"):
        with pytest.raises(SystemExit):                               # a usage error
            demo.main([media.mp4, question, *map(str, checkpoint)])
