"""A run that is left alone: killed at random moments, a full disk, broken clips, ranks that see
different modalities.  The resumed run's losses are those of the unbroken one, digit by digit."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import steps
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from test_train import (  # noqa: F401
    command,
    log_of,
    losses,
    one_sided,
    program,
    run,
    run_forked,
    wait_for,
    weights,
)
from torch.nn.parallel import DistributedDataParallel

import data
import demo
import eval as evaluation
import train
from favor import Favor
from runtime import checkpoint as checkpoints
from runtime import distributed
from runtime import manifests as corpus

ROOT = Path(train.__file__).parent


def start(words, most=None):
    """train.py in a forked process whose exit status is the program's.  After `most` steps it waits
    for a signal, so that on a loaded machine it does not end before a test sends one."""
    def wait(step, model, items):
        first.append(step)
        while step - first[0] == most and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            time.sleep(0.003)

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)     # it may have come in ignored
        steps.watch(setattr, before=wait)
        try:
            run(words)
        except SystemExit as leaving:
            os._exit(leaving.code if isinstance(leaving.code, int) else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    first, child = [], multiprocessing.get_context("fork").Process(target=work)
    child.start()
    return child


def steps_done(out):
    path = Path(out) / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def after_steps(child, out, more):
    """Waits until a run has begun (the log is cut back to the checkpoint, or grows) and has done
    some more steps, or has ended."""
    before = steps_done(out)
    wait_for(lambda: steps_done(out) != before or not child.is_alive())
    aim = steps_done(out) + more
    wait_for(lambda: steps_done(out) >= aim or not child.is_alive())


def test_killed_at_eight_random_moments(command, tmp_path):  # noqa: F811
    """SIGKILL loses what came after the last checkpoint and does it again; SIGTERM and SIGINT save
    and leave with the step under way.  At each moment there is a checkpoint that opens."""
    flags = {"steps": 30, "batch": 3, "val_every": 4, "log_every": 20, "show": 0, "save_every": 6}
    run(command(tmp_path / "whole", **flags))
    out, dice, codes = tmp_path / "stopped", random.Random(1), Counter()
    for k in range(8):
        number = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[k % 4]
        more = dice.randrange(1, 6)
        child = start(command(out, **flags), most=more + 1)
        after_steps(child, out, more)
        time.sleep(dice.random() * 0.05)
        if child.is_alive():
            os.kill(child.pid, number)
        child.join(600)
        codes[child.exitcode] += 1
        found = checkpoints.latest(out)
        if number != signal.SIGKILL:
            assert child.exitcode in (128 + number, 0) and found
        if found:
            assert checkpoints.load_state(found)["step"] <= steps_done(out)
            assert all(t.isfinite().all() for t in weights(found).values())
    assert codes[-signal.SIGKILL] > 2 and codes[128 + signal.SIGTERM], codes
    run(command(out, **flags))
    assert losses(out) == losses(tmp_path / "whole")
    assert [row["step"] for row in log_of(out)] == list(range(1, 31))
    for name in ("last", "best"):
        ours, theirs = weights(out / name), weights(tmp_path / "whole" / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    left = sorted(path.name for path in out.glob("step-*"))
    assert left == ["step-000018", "step-000024", "step-000030"]          # --keep 3


@pytest.mark.parametrize("moment", ["state", "first rename", "second rename"])
def test_killed_while_a_checkpoint_is_written(command, tmp_path, moment):  # noqa: F811
    flags = {"steps": 6, "val_every": 2, "show": 0}
    run(command(tmp_path / "whole", **flags))
    out = tmp_path / "stopped"

    def work(_):
        calls, save, rename = Counter(), torch.save, Path.rename

        def killing_save(state, path):
            calls["state"] += 1
            if moment == "state" and calls["state"] == 2:
                Path(path).write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, path)

        def killing_rename(self, to):
            if self.name.startswith("last"):
                calls["rename"] += 1         # 1: last.new; then last -> last.old, last.new -> last
                if calls["rename"] == {"first rename": 2, "second rename": 3}.get(moment):
                    os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, to)
        torch.save, Path.rename = killing_save, killing_rename
        run(command(out, **flags))
    assert run_forked(work) == [-signal.SIGKILL]
    assert checkpoints.load_state(checkpoints.latest(out))["step"] == 2
    run(command(out, **flags))
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_of_two_ranks(command, tmp_path, number):  # noqa: F811
    """Killed: the other one ends, too.  Asked to stop: both save and leave.  Then the same."""
    flags = {"steps": 8, "val_every": 2, "show": 0}
    assert run_forked(lambda rank: run(command(tmp_path / "whole", **flags)), 2) == [0, 0]
    out = tmp_path / "stopped"

    def work(rank):
        def signal_it(step, norm):
            if rank == 1 and step == 4:
                os.kill(os.getpid(), number)
            return norm
        steps.watch(setattr, after=signal_it)
        try:
            run(command(out, **flags))
        except SystemExit as leaving:
            os._exit(leaving.code)
    codes = run_forked(work, processes=2)
    if number == signal.SIGKILL:
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None)
        assert checkpoints.load_state(out / "last")["step"] == 4
    else:
        assert codes == [143, 143] and checkpoints.load_state(out / "last")["step"] == 5
    assert run_forked(lambda rank: run(command(out, **flags)), 2) == [0, 0]
    assert losses(out) == losses(tmp_path / "whole")


def test_two_ranks_part(tmp_path):
    """Many times, each as at the end of a run: gloo's threads drop their last tensors, for which
    they need Python's lock, while the model goes that was in DDP."""
    def meet_and_part(rank, k):
        store = dist.FileStore(str(tmp_path / f"store{k}"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        model = DistributedDataParallel(torch.nn.Linear(64, 64))
        for _ in range(3):
            model(torch.ones(4, 64)).sum().backward()
            distributed.all_gather_object(rank)
        distributed.shutdown(model)

    assert run_forked(lambda rank: [meet_and_part(rank, k) for k in range(40)], 2) == [0, 0]


@pytest.mark.parametrize("end, code", [("distributed.shutdown(model)", 0),
                                       ("sys.exit('no clip')", 1)])
def test_no_thread_outlives_the_group(tmp_path, end, code):
    """One of gloo's that wants Python's lock while Python ends aborts the process."""
    script = tmp_path / "script.py"
    script.write_text(f"""if True:
        import atexit, os, sys
        os.environ["CUDA_VISIBLE_DEVICES"] = ""              # gloo, also where there are GPUs
        sys.path.insert(0, {str(ROOT)!r})
        import torch
        from pathlib import Path
        from runtime import distributed
        from torch.nn.parallel import DistributedDataParallel

        def threads():
            return [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]

        def look():                             # runs after all that is registered later
            left = [name for name in threads() if "gloo" in name]
            Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(f"{{len(left)}} left")

        def work():
            distributed.init_distributed()
            model = DistributedDataParallel(torch.nn.Linear(8, 8))
            model(torch.ones(1, 8)).sum().backward()
            assert any("gloo" in name for name in threads())
            {end}

        atexit.register(look)
        distributed.launch_local(2)
        work()
    """)
    done = program(script)
    assert done.returncode == code, done.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0 left"] * 2


def test_torchrun_restarts(command, tmp_path):  # noqa: F811
    """train.py under torchrun with --max-restarts: a rank that dies takes all down, and all go on
    from the last checkpoint, with the losses of one process."""
    flags = {"steps": 8, "val_every": 2, "show": 0}
    run(command(tmp_path / "whole", **flags))
    script = tmp_path / "dying.py"
    script.write_text(f"""
import os, runpy, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from runtime import distributed

def clip(model, most, real=distributed.grad_norm_and_clip, calls=[]):
    calls.append(most)
    if len(calls) == 6 and os.environ["RANK"] == os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, most)

distributed.grad_norm_and_clip = clip
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    done = program("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
                   "--max-restarts", 1, script, *command(tmp_path / "run", **flags))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from" in done.stdout
    assert done.stdout.count("step 8/8") == done.stdout.count("answers with") == 1  # one speaks
    assert np.allclose(losses(tmp_path / "run", "loss"), losses(tmp_path / "whole", "loss"),
                       atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for workers in /proc")
def test_a_worker_that_dies_ends_the_run(command, tmp_path):  # noqa: F811
    words = [str(word) for word in command(tmp_path / "stopped", "--no-test", "--no-cache-features",
                                           workers=1, steps=10, batch=2, val_every=2, show=0)]
    child = subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: steps_done(tmp_path / "stopped") > 2 or child.poll() is not None)

    def workers():
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == child.pid and b"spawn_main" in (path / "cmdline").read_bytes():
                    found.append(int(path.name))
        return found
    child.send_signal(signal.SIGSTOP)                            # so that it cannot end meanwhile
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    child.send_signal(signal.SIGCONT)
    said, _ = child.communicate(timeout=600)
    assert child.returncode not in (0, None) and "a worker that decodes clips died" in said, said
    words[words.index("--workers") + 1] = "0"                    # who decodes changes nothing
    run(words)
    words[words.index(str(tmp_path / "stopped"))] = str(tmp_path / "whole")
    run(words)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_full_disk_keeps_the_older_checkpoint(command, tmp_path, monkeypatch, capsys):  # noqa: F811
    """It is said, the run goes on, and the next checkpoint is written as soon as there is room."""
    save, calls = torch.save, []

    def full(state, path):
        calls.append(state["step"])
        if state["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, path)
    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        run(command(tmp_path, steps=6, val_every=2, show=0))
    said = capsys.readouterr().out
    assert "last was NOT saved, the disk is full" in said and f"{tmp_path}/last is the last" in said
    assert calls == [2, 4, 6] and checkpoints.load_state(tmp_path / "last")["step"] == 6
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("error, full", [
    (OSError(28, "No space left on device"), True), (OSError(122, "Disk quota exceeded"), True),
    (SafetensorError("I/O error: No space left on device (os error 28)"), True),
    (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
    (PermissionError(13, "Permission denied"), False), (RuntimeError("cannot write: a bug"), False),
    (SafetensorError("Error while serializing: invalid shape"), False)])
def test_what_is_a_full_disk(tmp_path, error, full):
    class Model:
        def save_pretrained(self, folder, **_):
            raise error
    if full:
        said = []
        assert not checkpoints.save_unless_full(tmp_path / "last", Model(), {}, log=said.append)
        assert "the disk is full" in said[0] and "there is no checkpoint yet" in said[0]
    else:
        with pytest.raises(type(error)):
            checkpoints.save_unless_full(tmp_path / "last", Model(), {})


def test_a_run_whose_end_could_not_be_saved_says_so(command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoints, "save_unless_full", lambda *_: False)
    with pytest.raises(SystemExit, match="last could not be saved, the disk was full; make room"):
        run(command(tmp_path, "--test", steps=2, val_every=2, show=0))


def test_a_disk_that_is_full_at_the_end_is_said(command, small_miniature, tmp_path,  # noqa: F811
                                                monkeypatch):
    """For the curve of train.py, and for the predictions of eval.py."""
    write = Path.write_text

    def full(path, text, *rest, **named):
        if path.name.endswith(("loss.txt", "predictions.jsonl")):
            raise OSError(28, "No space left on device", str(path))
        return write(path, text, *rest, **named)
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test"):
        data.write_manifest(folder / f"{name}.jsonl",
                            data.read_manifest(small_miniature / f"{name}.jsonl")[::9])
    words = command(tmp_path, "--test", data=folder, steps=2, val_every=2, show=0)
    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit, match="loss.txt could not be saved, the disk was full"):
            run(words)
        asked = evaluation.EvalConfig(checkpoint=str(tmp_path / "best"), data=words[1], limit=1,
                                      out=str(tmp_path / "asked" / "predictions.jsonl"))
        with pytest.raises(SystemExit, match="predictions.jsonl could not be saved, the disk was "):
            evaluation.main(asked)
    run(words)                                                    # there is room now
    assert (tmp_path / "loss.txt").exists() and (tmp_path / "predictions.jsonl").exists()


def test_a_best_that_was_not_saved_is_not_the_best(command, tmp_path, monkeypatch):  # noqa: F811
    """The disk is full for the first best/: a later, here worse, one takes its place."""
    scores, whole, refused = iter([1.0, 2.0, 3.0]), checkpoints.save_unless_full, []

    def save_unless_full(folder, *rest):
        if folder.name == "best" and not refused:
            refused.append(folder)
            return False
        return whole(folder, *rest)
    monkeypatch.setattr(checkpoints, "save_unless_full", save_unless_full)
    monkeypatch.setattr(train, "validate", lambda *_: next(scores))
    run(command(tmp_path, steps=6, val_every=2, show=0))
    facts = json.loads((tmp_path / "best" / "favor.json").read_text())
    assert (facts["step"], facts["val_ce"]) == (4, 2.0)
    assert checkpoints.load_state(tmp_path / "last")["best"] == 2.0


def test_an_old_run_is_compared_under_the_new_names(tmp_path):
    """state.pt of a version that called window_frames windows, and grad_clip clip."""
    (tmp_path / "last").mkdir()
    old = {"windows": 4, "clip": 1.0, "lr": 0.1, "gone": 3, "steps": 9, "data": "a.jsonl"}
    state = {"step": 5, "best": 1.0, "nonfinite": 0, "config": old, "optimiser": {}}
    torch.save(state, tmp_path / "last" / "state.pt")
    now = {"window_frames": 4, "grad_clip": 1.0, "lr": 0.1, "new": 1, "steps": 9, "data": "a.jsonl"}
    folder, state = checkpoints.resume(tmp_path, now, ())
    assert folder == tmp_path / "last" and state["step"] == 5
    for changes, shown in (({"window_frames": 5}, r"\{'window_frames': \(4, 5\)\}"),
                           ({"grad_clip": 2.0}, r"\{'grad_clip': \(1.0, 2.0\)\}")):
        with pytest.raises(SystemExit, match=f"other settings, .*{shown}; choose another --out"):
            checkpoints.resume(tmp_path, now | changes, ("lr",))
    assert checkpoints.resume(tmp_path, now | {"lr": 9}, ("lr",)) is not None
    for more in (8, 100):
        with pytest.raises(SystemExit, match=f"9 --steps, now {more} .*--start-from .*last --out"):
            checkpoints.resume(tmp_path, now | {"steps": more}, ())
    # It holds no hash of its data, so the path alone is compared, and that is said.
    with pytest.raises(SystemExit, match="other settings"):
        checkpoints.resume(tmp_path, now | {"data": "b.jsonl"}, ("data",))
    found, said = checkpoints.resume(tmp_path, now, ("data",)), []
    checkpoints.compare_data(tmp_path, found, [["12ab", 1.0, 3]], said.append)
    assert len(said) == 1 and "cannot be compared" in said[0]


@pytest.fixture(scope="session")
def two_steps(command, tmp_path_factory):  # noqa: F811
    """Folder of a run of two steps, and its flags."""
    out, flags = tmp_path_factory.mktemp("runs") / "two", {"steps": 2, "show": 0}
    run(command(out, **flags))
    return out, flags


def test_a_run_goes_on_with_its_own_data_only(command, small_miniature, two_steps,  # noqa: F811
                                              tmp_path, capsys):
    out, flags = shutil.copytree(two_steps[0], tmp_path / "run"), two_steps[1]
    whole = (small_miniature / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    for path in small_miniature.iterdir():
        if path.is_dir():                          # the clips lie beside the changed manifests
            (tmp_path / "data" / path.name).symlink_to(path)
    first = json.loads(whole[0])
    for lines in (whole[:-50], whole[1:], whole[::-1], whole + [whole[0].replace(
            first["id"], "one more")], [json.dumps(first | {"target": "other"}) + "\n",
                                        *whole[1:]]):
        (tmp_path / "data" / "train.jsonl").write_text("".join(lines))
        with pytest.raises(SystemExit, match=f"other data; .*{len(whole)}.*{len(lines)}.*--start"):
            run(command(out, **flags, data=tmp_path / "data"))
    (tmp_path / "data" / "train.jsonl").write_text("".join(whole))
    with pytest.raises(SystemExit, match="on other data"):
        run(command(out, **flags, data=f"{tmp_path / 'data' / 'train.jsonl'}:0.5"))
    with pytest.raises(SystemExit, match="of 2 --steps, now 4 are asked for.*--start-from"):
        run(command(out, **flags | {"steps": 4}))
    capsys.readouterr()
    run(command(out, **flags, data=os.path.relpath(tmp_path / "data")))     # the same elsewhere
    assert "going on from" in capsys.readouterr().out


def test_a_part_by_relative_path_is_the_same_from_another_folder(tmp_path, monkeypatch):
    """What --llm and --start-from mean is compared, also with a state that holds the text alone."""
    for name in ("parts/llama", "first"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    then = dataclasses.asdict(train.TrainConfig(llm="parts/llama", start_from="first"))
    assert then["llm"] == str(tmp_path / "parts" / "llama")
    monkeypatch.chdir(tmp_path / "parts")
    assert then == dataclasses.asdict(train.TrainConfig(llm="./llama", start_from="../first"))
    assert train.TrainConfig(llm="owner/llama", start_from="").llm == "owner/llama"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last").mkdir()
    torch.save({"step": 1, "best": 0.5, "nonfinite": 0, "optimiser": {}, "data": [],
                "config": then | {"llm": "./parts/llama", "start_from": ""}},
               tmp_path / "last" / "state.pt")
    assert checkpoints.resume(tmp_path, then | {"start_from": ""}, ())
    with pytest.raises(SystemExit, match="other settings.*'llm'"):
        checkpoints.resume(tmp_path, then | {"start_from": "", "llm": "owner/llama"}, ())


@pytest.mark.parametrize("program", [train, evaluation, demo])
def test_a_gated_repo_is_one_sentence(tmp_path, monkeypatch, program):
    def refused(*_, **__):
        raise PermissionError("owner/llm: the Hub refuses config.json (gated); accept the terms")
    monkeypatch.setattr(train, "prepare", refused)
    monkeypatch.setattr(evaluation, "load_system", refused)
    monkeypatch.setattr(evaluation, "find_questions", lambda config: ([tmp_path], []))
    monkeypatch.setattr(demo, "load_system", refused)
    with pytest.raises(SystemExit, match="^owner/llm: the Hub refuses.*accept the terms$"):
        if program is train:
            train.learn(train.TrainConfig(), [], tmp_path, torch.device("cpu"))
        elif program is evaluation:
            evaluation.run(evaluation.EvalConfig(), tmp_path / "p.jsonl", torch.device("cpu"))
        else:
            demo.main([])


def change_state(change):
    def damage(last):
        state = torch.load(last / "state.pt", weights_only=True)
        torch.save(change(state) or state, last / "state.pt")
    return damage


def of_optimiser(name, value):
    return change_state(lambda state: state["optimiser"]["state"][1].update({name: value}))


@pytest.mark.parametrize("damage, said", [
    (lambda last: (last / "state.pt").write_bytes(b""), "state.pt is damaged"),
    (lambda last: (last / "state.pt").write_bytes(b"PK\3\4" + b"te" * 99), "state.pt is damaged"),
    (lambda last: (last / "state.pt").write_text("a text\n" * 9), "state.pt is damaged"),
    (lambda last: (last / "state.pt").write_bytes((last / "state.pt").read_bytes()[:5000]),
     "state.pt is damaged"),
    (lambda last: (last / "state.pt").write_bytes(pickle.dumps(Path("/"))), "of something else"),
    (change_state(lambda state: [1, 2]), "state.pt is damaged or no state of a run .'step'"),
    (change_state(lambda state: {"model": {}}), "'step' is missing"),
    (change_state(lambda state: state.update(step=-1)), "'step' is missing or no int"),
    (change_state(lambda state: state.update(step=True)), "'step' is missing or no int"),
    (change_state(lambda state: state.update(step=99)), "state.pt is damaged .*step 99 of 2"),
    (lambda last: ((last / "state.pt").unlink(), os.mkfifo(last / "state.pt")), "state.pt: .*pipe"),
    (change_state(lambda state: state.update(optimiser=None)), "'optimiser' is missing or no dict"),
    (change_state(lambda state: state["optimiser"].clear()), "the optimiser's state is not one of"),
    (change_state(lambda state: state["optimiser"]["state"].update({999: {}})), "not one of"),
    (of_optimiser("exp_avg", torch.zeros(3)), "exp_avg of parameter 1 is not .* but .3,."),
    (of_optimiser("exp_avg_sq", None), "exp_avg_sq of parameter 1 is not .* but None"),
    (of_optimiser("step", torch.tensor(math.nan)), "step of parameter 1 is not .* finite"),
    (lambda last: shutil.rmtree(last / "lora"), "lora"),
    (lambda last: (last / "model.safetensors").unlink(), "model.safetensors")])
def test_a_damaged_checkpoint_is_one_line(command, two_steps, tmp_path, damage, said):  # noqa: F811
    """The file, what is wrong, what to remove."""
    out, flags = shutil.copytree(two_steps[0], tmp_path / "run"), two_steps[1]
    damage(out / "last")
    with pytest.raises(SystemExit, match=said) as stopped:
        run(command(out, **flags))
    assert "\n" not in stopped.value.code
    assert f"{out}/last cannot be continued: remove it" in stopped.value.code


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_mutated_states(tmp_path, zipped):
    """300 files of which bytes are changed, missing or too many: read, or one kind of error."""
    optimiser = {"state": {0: {"exp_avg": torch.ones(3, 2), "step": torch.tensor(1.0)}}}
    torch.save({"step": 1, "best": 0.5, "nonfinite": 0, "optimiser": optimiser, "config": {"a": 1}},
               tmp_path / "state.pt", _use_new_zipfile_serialization=zipped)
    whole, dice, seen = (tmp_path / "state.pt").read_bytes(), random.Random(0), Counter()
    for _ in range(300):
        changed, at = bytearray(whole), dice.randrange(len(whole))
        for _ in range(dice.choice((1, 1, 3, 30))):
            changed[dice.randrange(len(whole))] = dice.randrange(256)
        changed[at:at + dice.choice((0, 0, 9, 9999))] = dice.randbytes(dice.choice((0, 9)))
        (tmp_path / "state.pt").write_bytes(changed)
        try:
            seen[type(checkpoints.load_state(tmp_path))] += 1
        except ValueError as error:
            assert "state.pt is damaged" in str(error) and "\n" not in str(error)
            seen[ValueError] += 1
    print(seen)


@pytest.mark.parametrize("text", [
    b"", b'\xff\0[\n[1]\n{"step": "a"}\n', b'{"step": 1, "ce": [2]}\n', b"[" * 100_000])
def test_damaged_logs_end_no_run(command, two_steps, tmp_path, text):  # noqa: F811
    out, flags = shutil.copytree(two_steps[0], tmp_path / "run"), two_steps[1]
    for name in ("log.jsonl", "events.jsonl", "skipped.jsonl", "config.json", "environment.json",
                 "commands.log", "loss.txt"):
        (out / name).write_bytes(text)
    run(command(out, **flags))
    for name, key in (("config.json", "train"), ("environment.json", "hostname")):
        facts = json.loads((out / name).read_text())
        assert "step" in facts or facts[key]                # what can be read is not written anew


# ---- one run in a folder ------------------------------------------------------------------------

@contextlib.contextmanager
def other_process(work):
    """work() in a forked process, which has done it when the block begins and is killed after."""
    done, child = multiprocessing.get_context("fork").Event(), None

    def hold():
        with work():
            done.set()
            time.sleep(3600)
    child = multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    try:
        wait_for(lambda: done.is_set() or not child.is_alive())
        assert done.is_set()
        yield child
    finally:
        child.kill()
        child.join()


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    file, said = tmp_path / "new" / "run" / "train.lock", []

    def with_a_child():                       # a process that outlives its parent must not hold it
        @contextlib.contextmanager
        def hold():
            with checkpoints.lock(file):
                if (child := os.fork()) == 0:
                    time.sleep(3600)
                (tmp_path / "child").write_text(str(child))
                yield
        return hold()
    with other_process(with_a_child) as holder:
        with pytest.raises(SystemExit, match=f"by process {holder.pid} on .* since 2.*: .*python"):
            with checkpoints.lock(file, said.append):
                pass
        with checkpoints.lock(file.with_name("predictions.lock")):           # another one
            pass
    try:
        with checkpoints.lock(file, said.append):
            parent = os.getpid()

            def other(rank):
                with pytest.raises(SystemExit, match=f"in use by process {parent} on"):
                    with checkpoints.lock(file):
                        pass
            assert run_forked(other) == [0]
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert not file.exists() and not said


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(checkpoints.fcntl, "lockf", lockf)
    said = []
    with checkpoints.lock(tmp_path / "train.lock", said.append):
        assert len(said) == 1 and "without locks (No locks available)" in said[0]
    assert not (tmp_path / "train.lock").exists()


def test_the_second_run_in_a_folder_stops(command, two_steps, tmp_path):  # noqa: F811
    """Training and scoring, one process or two; but a folder that is learnt in can be scored."""
    out, flags = shutil.copytree(two_steps[0], tmp_path / "run"), two_steps[1]
    words = command(out, **flags)
    asked = evaluation.EvalConfig(checkpoint=str(out / "best"), data=words[1], limit=1, task="asr",
                                  cache_features=False, views=("blind",))

    def second(rank):
        with pytest.raises(SystemExit, match="in use by process" if rank == 0 else "^1$"):
            run(words)
    before = (out / "log.jsonl").read_bytes()
    with other_process(lambda: checkpoints.lock(out / "train.lock")):
        with pytest.raises(SystemExit, match="in use by process"):
            run(words)
        assert run_forked(second, processes=2) == [0, 0]
        evaluation.main(asked)
    assert (out / "log.jsonl").read_bytes() == before
    with other_process(lambda: checkpoints.lock(out / "best" / "predictions.lock")):
        with pytest.raises(SystemExit, match="in use by process"):
            evaluation.main(asked)


@pytest.mark.parametrize("place, reason", [
    ("file", "a file is in the place"), ("file/below", "a file is in the place"),
    ("/proc/nowhere", "No such file|Permission"), ("closed/run", "Permission")])
def test_a_folder_that_cannot_be_written_is_told_first(command, tmp_path, monkeypatch,  # noqa: F811
                                                       place, reason):
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    if place == "closed/run" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    out = tmp_path / place
    monkeypatch.setattr(train, "preset", None)                             # nothing is loaded
    monkeypatch.setattr(evaluation, "system_preset", None)
    monkeypatch.setattr(train, "prepare", None)
    words = command(out)
    config = evaluation.EvalConfig(out=str(out / "predictions.jsonl"), task="asr")
    with pytest.raises(SystemExit, match=f"{out} cannot be written: ({reason})"):
        train.main(SimpleNamespace(batch=1, threads=1, seed=0, offline=False, out=out), words)
    with pytest.raises(SystemExit, match=f"{out} cannot be written: ({reason})"):
        evaluation.main(config)


@pytest.mark.parametrize("name", ["", "a.json", "b.md", "c.parts"])
def test_an_output_that_the_report_would_take(tmp_path, name):
    with pytest.raises(SystemExit, match="wanted a file such as predictions.jsonl"):
        evaluation.main(evaluation.EvalConfig(out=str(tmp_path / name), task="asr"))


# ---- signals ------------------------------------------------------------------------------------

@pytest.fixture
def interrupt(monkeypatch):
    """SIGINT as in a terminal; the suite may have been started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("ignored, other", [(signal.SIGINT, signal.SIGTERM),
                                            (signal.SIGTERM, signal.SIGINT)])
def test_an_ignored_signal_stays_ignored(interrupt, ignored, other):
    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        with checkpoints.StopSignal() as stop:
            os.kill(os.getpid(), ignored)
            assert stop.name == "" and signal.getsignal(ignored) == signal.SIG_IGN
            os.kill(os.getpid(), other)
            wait_for(lambda: stop.name)
            assert stop.name == other.name
        assert signal.getsignal(ignored) == signal.SIG_IGN
    finally:
        signal.signal(ignored, before)


def test_stop_signal_and_the_second_one(interrupt):
    with checkpoints.StopSignal() as stop:
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: stop.name)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):                    # the second one acts at once
            os.kill(os.getpid(), signal.SIGINT)
            wait_for(lambda: False)


# ---- several processes --------------------------------------------------------------------------

def test_disjoint_modalities_for_40_steps(command, one_sided, tmp_path, monkeypatch):  # noqa: F811
    """Two processes, of which one sees sound where the other sees pictures or bare text: neither
    waits for ever, and their parameters stay equal to the bit."""
    monkeypatch.setattr(corpus.Order, "epoch", lambda self, epoch: np.arange(len(self.weights)))
    flags = {"data": one_sided, "steps": 40, "batch": 4, "val_share": 0, "mask_share": 0,
             "val_every": 40, "log_every": 40, "show": 0}                # eight times all pairs

    def work(rank):
        held = {}
        steps.watch(setattr, before=lambda step, model, items: held.update(model=model))
        real = distributed.shutdown

        def leave(model):
            (tmp_path / f"rank{rank}").write_text(distributed.fingerprint(held["model"]))
            real(model)
        distributed.shutdown = leave
        run(command(tmp_path / "run", **flags))
    assert run_forked(work, processes=2) == [0, 0]
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    rows = log_of(tmp_path / "run")
    assert len(rows) == 40 and rows[35]["ce"] < rows[0]["ce"]                # the same samples


def test_one_is_two_is_accumulated_is_sharded(command, tmp_path):  # noqa: F811
    """Over 12 steps, within what floats differ by when they are summed in another order."""
    flags = {"steps": 12, "batch": 4, "val_every": 12, "log_every": 12, "show": 0}
    run(command(tmp_path / "one", **flags))
    run(command(tmp_path / "accumulated", micro_batch=1, **flags))
    run(command(tmp_path / "recomputed", "--no-test", "--recompute", **flags))
    for name, word in (("two", "--no-shard"), ("sharded", "--shard")):
        words = command(tmp_path / name, "--no-test", word, **flags)
        assert run_forked(lambda rank, words=words: run(words), 2) == [0, 0]
    one = np.array(losses(tmp_path / "one", "ce"))
    for name in ("accumulated", "recomputed", "two", "sharded"):
        far = abs(np.array(losses(tmp_path / name, "ce")) - one).max()
        print(f"{name}: largest difference of a loss {far:.1e}")
        assert far < 1e-3 * one.max(), name
        assert weights(tmp_path / name / "last").keys() == weights(tmp_path / "one/last").keys()


# ---- broken clips -------------------------------------------------------------------------------

def test_five_percent_broken(command, small_miniature, tmp_path, capsys):  # noqa: F811
    """Trains through; the count and the reasons are exact, also after a stop in the middle."""
    good = next(r for r in data.read_manifest(small_miniature / "train.jsonl") if r.video)
    film = Path(good.video).read_bytes()
    at = film.index(b"mvhd") + 4                     # version, times, then scale and duration
    absurd = film[:at + 16] + b"\x7f\xff\xff\xff" + film[at + 20:]
    made = {"cut.mp4": film[:len(film) // 3], "zero.mp4": b"", "text.mp4": b"a text\n" * 99,
            "bare.wav": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0", "absurd.mp4": absurd}
    for name, content in made.items():
        (tmp_path / name).write_bytes(content)
    reasons = {"cut.mp4": "not readable as media", "zero.mp4": r"empty \(0 bytes\)",
               "text.mp4": "not readable as media", "bare.wav": "not readable|no audio",
               "missing.mp4": "no such file"}
    rows = [dataclasses.replace(good, id=f"good {k}", meta={}) for k in range(94)]
    rows += [data.Record(name, "vqa", "What?", "red", **{
        "audio" if name.endswith("wav") else "video": str(tmp_path / name)})
        for name in (*reasons, "absurd.mp4")]
    data.write_manifest(tmp_path / "train.jsonl", rows)
    flags = {"data": tmp_path / "train.jsonl", "steps": 25, "batch": 8, "val_share": 0, "show": 0,
             "val_every": 5}                                     # two epochs of 100
    for keep in ("--cache-features", "--no-cache-features"):
        out = tmp_path / keep
        words = command(out, "--no-test", keep, **flags)
        child = start(words)
        wait_for(lambda out=out, child=child: steps_done(out) >= 8 or not child.is_alive())
        child.kill()
        child.join()
        run(words)
        lost = [json.loads(line) for line in open(out / "skipped.jsonl")]
        assert Counter(line["id"] for line in lost) == dict.fromkeys(reasons, 2)
        for line in lost:
            assert re.search(reasons[line["id"]], line["reason"]), line
        rows = log_of(out)
        assert sum(row["skipped"] for row in rows) == len(lost) == 10
        assert "skipped 10 samples of 5 clips that cannot be read" in capsys.readouterr().out
        assert Favor.from_pretrained(out / "best")
