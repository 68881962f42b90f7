"""ablate.py, tables.py, page.py and figures.py of experiments/: the plan, the scheduler, statistics
by hand, tables, the page, figures of made-up results, and the attention of a hook against the one
that the layer used."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange

from experiments import ablate, figures, page, publish
from experiments import tables as ablation
from experiments.ablate import AblateConfig, Job
from experiments.tables import Difference, Results
from favor import CausalQFormer, Favor, preset
from miniature import scenes
from runtime import cli, hub
from runtime import log as runlog

quiet = lambda *_: None                                                          # noqa: E731


# ---------------------------------------------------------------- statistics
def test_students_quantile():
    for df, wanted in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (100, 1.9840)):
        assert ablation.t_quantile(df) == pytest.approx(wanted, abs=2e-3 if df == 1 else 2e-4)


def test_mean_and_interval():
    mean, half = ablation.mean_interval([1, 2, 3])           # sd 1: 4.3027 / sqrt(3)
    assert mean == 2 and half == pytest.approx(2.4841, abs=1e-3)
    assert ablation.mean_interval([7.5]) == (7.5, None)


def test_sign_flips():
    assert ablation.sign_flip([1, 2, 3]) == 2 / 8               # only +++ and --- are as far
    assert ablation.sign_flip([1, 2, -0.5]) == 4 / 8            # 3.5 and 2.5 of 3.5, 2.5, 1.5, 0.5
    assert ablation.sign_flip([3, -1]) == 1
    assert ablation.sign_flip([0, 0, 0]) == 1
    assert ablation.sign_flip([0.1] * 5) == 2 / 32              # equal sums, whatever the rounding


def test_differences_are_paired_by_seed():
    found = ablation.paired({0: 60.0, 1: 71, 3: 5}, {1: 70.0, 0: 58, 2: 90})
    assert found.mean == 1.5 and found.n == 2                       # of 2 and 1; 3 and 2 stay out
    assert found.half == pytest.approx(12.7062 * 0.7071 / 2 ** 0.5, abs=1e-2)
    assert ablation.paired({0: 1.0}, {1: 1.0}) is None
    # what all seeds share does not widen it: unpaired, these two would be nowhere near significant
    base = {k: 10.0 * k for k in range(5)}
    assert ablation.paired({k: v + 1 + 0.01 * k for k, v in base.items()}, base).significant


@pytest.mark.parametrize("mean, half, less_is_better, wanted", [
    (-5, 2, False, "same sign and significant"), (-5, 6, False, "same sign"),
    (5, 6, False, "not reproduced"), (5, 2, False, "opposite and significant"),
    (5, 2, True, "same sign and significant"), (5, 6, True, "same sign"),
    (-5, 6, True, "not reproduced"), (-5, 2, True, "opposite and significant"),
    (0, 1, False, "not reproduced"), (0.04, 0.01, True, "not reproduced"),
    (-0.06, 1, False, "same sign"), (-5, None, False, "same sign"),
    (5, None, False, "not reproduced")])
def test_verdicts(mean, half, less_is_better, wanted):
    assert ablation.verdict(Difference(mean, half, 0.5, 5), less_is_better) == wanted


# ---------------------------------------------------------------- the plan
def test_the_quick_plan():
    config = ablate.resolve_config(*cli.parse(AblateConfig, "", ["--quick"]))
    jobs = ablate.plan(config)
    assert [job.name for job in jobs] == [f"{s}-seed0 to 160 steps" for s in ablate.QUICK["only"]]
    systems = {*ablate.QUICK["only"]}               # every figure has two points at least
    assert len(systems & {*ablation.WINDOWS.values()}) >= 2
    assert len(systems & {*ablation.LAMBDAS.values()}) >= 2
    train, score = jobs[4].commands
    assert train[1].endswith("/train.py") and train[2] == "--no-sync"
    assert train[train.index("--steps") + 1] == "160" and "--no-test" in train
    assert score[3:7] == ("--score", "no-sync", "0", "1")
    assert score[score.index("--limit") + 1] == "100"


def test_what_is_given_beats_quick():
    config = ablate.resolve_config(*cli.parse(
        AblateConfig, "", ["--quick", "--seeds", "2", "--only", "future"]))
    assert [job.folder.name for job in ablate.plan(config)] == ["future-seed0", "future-seed1"]
    assert config.steps == ablate.QUICK["steps"]


def test_the_full_plan_goes_stage_by_stage_and_every_flag_is_one_of_train():
    """Five seeds of every system, two stages except of those that only figures show."""
    jobs = ablate.plan(AblateConfig())
    first = 5 * len(ablation.SYSTEMS)
    assert len(jobs) == len({job.folder for job in jobs}) == len({job.name for job in jobs})
    assert len(jobs) == first + 5 * (len(ablation.SYSTEMS) - len(ablate.FIGURES_ONLY))
    assert [job.steps for job in jobs] == [1100] * len(jobs)
    assert not any(job.after for job in jobs[:first])
    assert {job.after for job in jobs[first:]} == {
        job.name for job in jobs if job.name.endswith("to 1100 steps")
        and job.folder.name.rpartition("-seed")[0] not in ablate.FIGURES_ONLY}
    assert all("seed0" in job.name for job in jobs[:len(ablation.SYSTEMS)])
    methods = {s: ablate.train_config(AblateConfig(), s, 0, 1) for s in ablation.SYSTEMS}
    complete, none = methods["complete"].method(), methods["none"].method()
    assert complete == preset("tiny")
    assert (none.causal, none.diversity, none.sync) == ("none", 0, False)
    assert methods["audio-only"].mask == "visual" and methods["visual-only"].mask == "audio"
    for k, system in ablation.WINDOWS.items():        # N/K constant: the same number of LLM vectors
        method = methods[system].method()
        assert (method.window_frames or 10) == k and method.queries == 2 * k
        assert ablate.vectors_per_clip(method) == 20
    for factor, system in ablation.LAMBDAS.items():
        assert methods[system].method().diversity == factor
    assert ablate.vectors_per_clip(methods["no-windows"].method()) == 10
    assert ablate.vectors_per_clip(methods["no-sync"].method()) == 40
    assert all(m.save_every * 2 == m.steps for m in methods.values())


def test_the_claims_name_what_is_measured():
    for system, tasks in ablation.CLAIMS:
        assert system in ablation.SYSTEMS and {*tasks} <= {*scenes.TASKS}
        for task in tasks if system in ablation.PAPER_ROWS else ():
            assert ablation.PAPER[ablation.PAPER_ROWS[system]][task]


def test_every_stage_starts_where_the_one_before_ended(tmp_path):
    """As long as all stages before it, from their weights, with samples of its own."""
    config = AblateConfig(out=str(tmp_path), steps=4, stages=3, only=("no-sync",), seeds=2)
    jobs = [job for job in ablate.plan(config) if "seed1" in job.name]
    first = tmp_path / "no-sync-seed1"
    assert [(job.folder, job.steps) for job in jobs] == [
        (first, 4), (first / "to-8", 4), (first / "to-16", 8)]
    assert [job.name for job in jobs] == [f"no-sync-seed1 to {n} steps" for n in (4, 8, 16)]
    assert [job.after for job in jobs] == ["", jobs[0].name, jobs[1].name]
    trained = [ablate.train_config(config, "no-sync", 1, stage) for stage in (1, 2, 3)]
    assert [t.start_from for t in trained] == ["", f"{first}/last", f"{first}/to-8/last"]
    assert [t.steps for t in trained] == [4, 4, 8] and not any(t.sync for t in trained)
    assert [t.seed for t in trained] == [1, 5, 9]
    for stage, job in enumerate(jobs, 1):            # the command names what it is to score
        again = ablate.resolve_config(*cli.parse(AblateConfig, "", list(job.commands[1][3:])))
        assert again.score == ("no-sync", "1", str(stage))
        assert ablate.job_of(again, "no-sync", 1, stage) == job
    # more stages, later: those that are finished count
    assert ablate.plan(dataclasses.replace(config, stages=1)) == ablate.plan(config)[:2]


@pytest.mark.parametrize("wrong", [{"only": ("completely",)}, {"steps": 3}, {"seeds": 0},
                                   {"stages": 0}])
def test_what_cannot_be_is_refused(wrong):
    message = ("unknown system 'completely'; there are complete, no-div" if "only" in wrong
               else "wanted at least one seed and one stage, and an even")
    with pytest.raises(ValueError, match=message):
        AblateConfig(**wrong)


# ---------------------------------------------------------------- the scheduler
FINISH = "import json; json.dump({'settings': {}}, open('scores.json', 'w'))"


def fake(folder, name, *bodies, finish=True, after=""):
    """A job of Python programs that run in its folder; the last one marks it as finished."""
    own = folder / name
    start = f"import os, sys, time; os.chdir({str(own)!r})\n"
    bodies = [*bodies, FINISH] if finish else bodies
    return Job(name, own, tuple((sys.executable, "-I", "-S", "-c", start + body)
                                for body in bodies), {}, 10, after)


def noting(text):
    return f"open('../order', 'a').write({text!r} + chr(10))\n"


def test_jobs_run_in_order(tmp_path):
    jobs, logged, finished = [fake(tmp_path, n, noting(n)) for n in "bca"], [], []
    assert ablate.run_jobs(
        jobs, 1, logged.append, lambda job: finished.append(job.name), 0.02) == []
    assert (tmp_path / "order").read_text().split() == finished == [*"bca"]
    assert logged[0] == "3 runs, 0 of them finished before; 1 at a time"
    assert logged[1].startswith("[1/3] b: ") and logged[3].startswith("[3/3] a: ")
    assert logged[3].endswith("; ETA 0 s") and len(logged) == 5


def test_two_at_a_time_never_three(tmp_path):
    """The first two wait for each other; all of them record when they begin and end."""
    meet = ("open('here', 'w')\nuntil = time.time() + 60\n"
            "while not os.path.exists('../{}/here') and time.time() < until:\n"
            "    time.sleep(0.01)\n")
    bodies = {n: noting(f"+{n}") + (meet.format("ba"["ab".index(n)]) if n in "ab" else "")
              + noting(f"-{n}") for n in "abcdef"}
    assert ablate.run_jobs([fake(tmp_path, *item) for item in bodies.items()], 2, quiet,
                           poll=0.02) == []
    lines = (tmp_path / "order").read_text().split()
    assert np.cumsum([1 if line[0] == "+" else -1 for line in lines]).max() == 2
    assert sorted(lines[:2]) == ["+a", "+b"] and len(lines) == 12


def test_what_runs_is_told_now_and_then(tmp_path):
    logged = []
    job = fake(tmp_path, "a", "print('step 5/10', flush=True); time.sleep(0.5)")
    ablate.run_jobs([job], 1, logged.append, poll=0.05, log_every=0.0)
    assert any(line.startswith("  a, ") and line.endswith(": step 5/10") for line in logged)


def test_the_time_left():
    """6 s per step so far: 10 steps, a stage of 20, and 30 s that are left of 10."""
    waiting = [SimpleNamespace(steps=10), SimpleNamespace(steps=20)]
    running = SimpleNamespace(started=time.time() - 30, job=SimpleNamespace(steps=10))
    took = [(50, 10), (70, 10)]
    assert ablate.remaining(took, waiting, [running], 2) == "ETA 1 min 45 s"  # (180 + 30) / 2
    assert ablate.remaining([], [], [], 2) == "ETA 0 s"


def test_the_pace_is_that_of_whole_runs(tmp_path):
    """One that goes on where it was stopped, or fails, is no measure of how long a run takes."""
    jobs, logged = [fake(tmp_path, "begun"), fake(tmp_path, "broken", "1 / 0"),
                  fake(tmp_path, "whole", "time.sleep(1)"), fake(tmp_path, "last")], []
    jobs[0].folder.mkdir()
    assert ablate.run_jobs(jobs, 1, logged.append, poll=0.02) == ["broken"]
    ends = [line.rsplit("; ", 1)[1] for line in logged if line.startswith("[")]
    assert ends[:2] == ["ETA after the first complete run"] * 2
    assert ends[2] not in (ends[1], "ETA 0 s") and ends[3] == "ETA 0 s"


def test_a_job_waits_for_the_one_it_comes_after(tmp_path):
    """Also where there is room for it; where that one fails it is left out, and reported."""
    jobs = [fake(tmp_path, "a", "time.sleep(0.5)\n" + noting("a")),
            fake(tmp_path, "b", noting("b"), after="a"),
            fake(tmp_path, "bad", "sys.exit(3)"), fake(tmp_path, "c", noting("c"), after="bad"),
            fake(tmp_path, "d", noting("d"), after="c")]
    logged = []
    assert ablate.run_jobs(jobs, 4, logged.append, poll=0.02) == ["bad", "c", "d"]
    assert (tmp_path / "order").read_text().split() == ["a", "b"]
    assert "c is left out, as bad failed" in logged and "d is left out, as c failed" in logged
    assert logged[-1].endswith("FAILED: bad, c, d; the same command tries again")
    mended = [*jobs[:2], fake(tmp_path, "bad", noting("bad")), *jobs[3:]]
    assert ablate.run_jobs(mended, 4, quiet, poll=0.02) == []
    assert (tmp_path / "order").read_text().split() == ["a", "b", "bad", "c", "d"]


def test_a_job_that_fails_is_told_and_the_others_go_on(tmp_path):
    jobs = [fake(tmp_path, "good", "print('fine')"),
            fake(tmp_path, "bad", "print('one'); print('two'); sys.exit(3)", noting("not reached")),
            fake(tmp_path, "late", "time.sleep(0.1)")]
    logged = []
    assert ablate.run_jobs(jobs, 1, logged.append, poll=0.02) == ["bad"]
    failure = next(line for line in logged if "FAILED (exit status 3)" in line)
    assert failure.startswith("bad FAILED") and failure.endswith("one\ntwo")
    assert [job.finished() for job in jobs] == [True, False, True]
    assert not (tmp_path / "order").exists()                # its next command was not started
    assert "FAILED: bad" in logged[-1]
    again = []                                              # the same command tries it again, alone
    assert ablate.run_jobs(jobs, 1, again.append, poll=0.02) == ["bad"]
    assert again[0].startswith("3 runs, 2 of them finished before")


def test_what_was_stopped_goes_on(tmp_path):
    """Ctrl-C after the first of two: the second is ended, and only it runs the next time."""
    jobs = [fake(tmp_path, "a", noting("a") + "while not os.path.exists('../b/pid'):\n"
                 "    time.sleep(0.01)"),
            fake(tmp_path, "b", noting("b") + "open('id', 'w').write(str(os.getpid()))\n"
                 "os.rename('id', 'pid'); time.sleep(60)")]

    def interrupt(_):
        raise KeyboardInterrupt
    started, logged = time.time(), []
    with pytest.raises(KeyboardInterrupt):
        ablate.run_jobs(jobs, 2, logged.append, interrupt, poll=0.02)
    assert time.time() - started < 30
    assert logged[-1] == "stopping b; the same command continues"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "b" / "pid").read_text()), 0)
    assert [job.finished() for job in jobs] == [True, False]
    shorter = fake(tmp_path, "b", noting("b"))
    assert ablate.run_jobs([jobs[0], shorter], 2, quiet, poll=0.02) == []
    assert sorted((tmp_path / "order").read_text().split()) == ["a", "b", "b"]


def test_other_settings_are_another_run(tmp_path):
    job = fake(tmp_path, "a", "pass")
    ablate.run_jobs([job], 1, quiet, poll=0.02)
    assert job.finished()
    assert not dataclasses.replace(job, settings={"limit": 5}).finished()


def test_a_job_ends_with_us_and_has_its_own_device(tmp_path, monkeypatch):
    running = ablate.Running(fake(tmp_path, "a", "os.read(0, 1)", finish=False), 0)
    time.sleep(0.1)
    assert running.poll() is None
    running.process.stdin.close()                     # as when this process is killed
    assert running.process.wait(20) == 0
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    own = ablate.environment(1)
    assert own["PARENT_HOLDS_STDIN"] and own["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [ablate.environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert ablate.environment(1)["CUDA_VISIBLE_DEVICES"] == "5"


def test_the_program_ends_with_1_and_what_there_is(tmp_path, monkeypatch, capsys):
    rows = made_up({("complete", "avm", ""): [50]})
    scores = {"settings": {}, "rows": rows}
    write = f"import json; json.dump({scores!r}, open('scores.json', 'w'))"
    jobs = [fake(tmp_path, "complete-seed0", write, finish=False),
            fake(tmp_path, "future-seed0", "sys.exit(7)")]
    monkeypatch.setattr(ablate, "plan", lambda config: jobs)
    monkeypatch.setattr(ablate, "prepare", lambda config, log: log("prepared"))
    monkeypatch.setattr(ablate.signal, "signal", quiet)          # pytest's own stay

    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda name: None)
    assert ablate.main(AblateConfig(out=str(tmp_path), jobs=2)) == 1
    printed = capsys.readouterr().out
    assert "prepared" in printed and "FAILED (exit status 7)" in printed
    advice = f'pip install -e ".[plot]", then python -m experiments.figures {tmp_path}'
    before, after = printed.split("prepared")
    assert advice in before and advice in after and not list(tmp_path.glob("*.png"))
    assert Results.read(tmp_path).first.by_seed("complete", "avm") == {0: 50}
    assert "| complete | 1 |" in (tmp_path / "results.md").read_text()
    jobs.pop()                                                    # the rest is finished: no error,
    assert ablate.main(AblateConfig(out=str(tmp_path))) == 0      # nothing to prepare
    assert "prepared" not in capsys.readouterr().out
    ablate.main(AblateConfig(plan=True))
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{sys.executable} -I -S -c ")


# ---------------------------------------------------------------- made-up results
def made_up(scores, steps=4):
    """{(system, task, part): [score of each seed]} -> rows; at half of the steps 10 less."""
    return [{"system": system, "task": task, "part": part, "seed": seed, "n": 100, "low": None,
             "high": None, "score": value - 10 * (step < steps), "step": step,
             "parameters": 1234567, "vectors": 20, "commit": "abcdef0123", "dirty": False}
            for (system, task, part), values in scores.items()
            for seed, value in enumerate(values) for step in (steps // 2, steps)]


SOME = {("complete", "videoqa", ""): [60, 62, 64], ("no-causal", "videoqa", ""): [50, 51, 55],
        ("complete", "isqa", ""): [30, 32, 31], ("no-causal", "isqa", ""): [31, 32, 30],
        ("complete", "avsr", ""): [20, 21, 22], ("no-windows", "avsr", ""): [30, 31.5, 32.5],
        ("future", "videoqa", ""): [60, 62, 65], ("complete", "videoqa", "after"): [70, 70, 70],
        ("future", "videoqa", "after"): [71, 72, 73]}


def test_the_tables():
    stage = Results(made_up(SOME)).first
    lines = ablation.score_table(stage).splitlines()
    assert lines[0].startswith("| system, 4 steps | seeds | trained parameters | LLM vectors, 5 s")
    assert lines[2] == ("| complete | 3 | 1,234,567 | 20 | - | - | - | - | - | 62.0 ± 5.0 "
                        "| 21.0 ± 2.5 | - | 31.0 ± 2.5 | - | - |")
    assert "| 52.0 ± 5.0 |" in ablation.score_table(stage.half).splitlines()[2]
    lines = {line.split(" | ")[0][2:]: line for line in
             ablation.difference_table(stage).splitlines()[2:]}
    assert "| -10.0 ± 2.5* |" in lines["without causal encoder"]               # 10, 11, 9
    assert "complete" not in lines and "| +10.3 ± 0.7* |" in lines["without sliding windows"]


def test_what_still_rises():
    rows = made_up(SOME)
    for row in rows:
        if row["system"] == "no-causal" and row["step"] == 2:
            row["score"] += 10 + row["seed"] - 1                # no more than noise to the end
    lines = {line.split(" | ")[0][2:]: line for line in
             ablation.gain_table(Results(rows).first).splitlines()}
    assert lines["steps 4 minus 2"].startswith("| steps 4 minus 2 | asr ↓ | ac ↓ |")
    assert "| +10.0 ± 0.0* |" in lines["complete"]
    assert "| +0.0 ± 2.5 |" in lines["without causal encoder"]


def test_the_claims():
    """A column a stage: means, the difference paired by seed, its p, the verdict."""
    some = SOME | {("lambda-10", "avm", ""): [1]}
    rows = made_up(some)
    rows += [row | {"step": 8, "score": row["score"] + 4 * (row["system"] == "no-causal")}
             for row in rows if row["step"] == 4 and row["system"] != "lambda-10"]
    head, _, *lines = ablation.claim_table(Results(rows)).splitlines()
    assert head == "| paper: worse | task | paper: complete → without | 4 steps | 8 steps |"
    lines = {tuple(line.split(" | ")[:2]): line[:-2].split(" | ") for line in lines}
    assert len(lines) == sum(len(tasks) for system, tasks in ablation.CLAIMS
                             if system in ("no-causal", "no-windows", "lambda-10"))
    assert lines["| without causal encoder", "videoqa ↑"][2:] == [
        "49.3 → 42.8",
        "62.0 → 52.0: -10.0 ± 2.5* (p 0.250, 3 seeds), **same sign and significant**",
        "62.0 → 56.0: -6.0 ± 2.5* (p 0.250, 3 seeds), **same sign and significant**"]
    assert [cell.split(", ")[-1] for cell in lines["| without causal encoder", "isqa ↑"][3:]] == [
        "**not reproduced**", "**opposite and significant**"]
    assert lines["| without sliding windows", "avsr ↓"][-1].endswith(
        ", **same sign and significant**")
    assert lines["| without sliding windows", "avsr ↓"][2] == "8.1 → 8.5"
    assert lines["| without causal encoder", "avssd ↑"][3:] == ["not run", "not run"]
    assert lines["| lambda 10", "avsr ↓"][2] == "figure only"


def test_past_and_future_with_the_parts():
    lines = ablation.mask_table(Results(made_up(SOME)).first).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| videoqa ↑", "| videoqa ↑, after"]
    assert "| +0.3 ± 1.4 | 1.000 (3) |" in lines[0] and "| +2.0 ± 2.5 |" in lines[1]


def test_results_are_collected_in_order(tmp_path):
    """All rounds of all runs in one file."""
    for name in ("future-seed0", "complete-seed1", "complete-seed0/to-8", "complete-seed0"):
        system, seed = name.split("/")[0].split("-seed")
        rows = [row for row in made_up({(system, "avm", ""): [50, 60]}) if row["seed"] == int(seed)]
        if "to-8" in name:
            rows = [rows[1] | {"step": 8, "score": 70}]
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "scores.json").write_text(json.dumps({"settings": {}, "rows": rows}))
    results = ablate.collect(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["system"], row["seed"], row["step"]) for row in rows] == [
        ("complete", 0, 2), ("complete", 0, 4), ("complete", 0, 8), ("complete", 1, 2),
        ("complete", 1, 4), ("future", 0, 2), ("future", 0, 4)]
    assert results.rows == rows == Results.read(tmp_path).rows
    assert results.scored == [2, 4, 8] and [stage.step for stage in results.stages] == [4, 8]
    assert results.first.by_seed("complete", "avm") == {0: 50, 1: 60}
    assert results.first.half.by_seed("complete", "avm") == {0: 40, 1: 50}
    assert results.at(8).by_seed("complete", "avm") == {0: 70} and results.at(8).half.step == 4
    assert results.at(8).systems == ["complete"] and results.systems == ["complete", "future"]
    text = (tmp_path / "results.md").read_text()
    assert "55.0 ± 63.5" in text and "Commits: abcdef0." in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## The paper's claims", "## 2 steps", "## 4 steps", "## 8 steps"]


def test_what_is_measured_again_is_held_against_what_was_there():
    avm, asr = ("complete", "avm", ""), ("complete", "asr", "")
    earlier = Results(made_up({avm: [50, 51, 52], asr: [10, 11, 12], ("k1", "avm", ""): [20, 21]}))
    again = Results(made_up({avm: [51, 52, 53], asr: [14] * 3, ("future", "avm", ""): [50, 51]}))
    text, *table = ablation.reproduction_table(again, earlier).splitlines()
    assert text.startswith("2 of 4 means lie inside the earlier 95 % intervals; 4 of 4 differences")
    assert table[1].startswith("| here minus earlier | asr ↓ |")
    assert [line.split(" | ")[0] for line in table[3:]] == ["| complete, 2 steps",
                                                           "| complete, 4 steps"]
    assert "| +3.0 ± 2.5* | - |" in table[4] and "| +1.0 ± 0.0* |" in table[4]
    for other in ({("k1", "avm", ""): [1, 2]}, {avm: [50]}):          # another system, one seed
        assert ablation.reproduction_table(again, Results(made_up(other))) == ""


def test_a_run_that_is_published_again_takes_the_place_of_the_first():
    """With all of its rounds: one run's numbers are never of two trainings."""
    before = made_up({("complete", "avm", ""): [50, 51], ("k1", "avm", ""): [20]})
    before += [before[1] | {"step": 8}]
    new = made_up({("complete", "avm", ""): [70]})
    rows = publish.merged(before, new)
    assert [(row["system"], row["seed"], row["step"], row["score"]) for row in rows] == [
        ("complete", 0, 2, 60), ("complete", 0, 4, 70), ("complete", 1, 2, 41),
        ("complete", 1, 4, 51), ("k1", 0, 2, 10), ("k1", 0, 4, 20)]


def test_the_committed_pages_are_what_the_program_writes():
    """docs/ablate/results.jsonl --> results.md and docs/ablations.md, to the letter."""
    results = Results.read(ablate.COMMITTED)
    assert (ablate.COMMITTED / "results.md").read_text() == ablation.tables(results) + "\n"
    text = publish.PAGE.read_text()
    assert text == page.page(results)
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 5 and all((publish.PAGE.parent / link).exists() for link in links)
    assert results.first.step == AblateConfig.steps and not any(
        row["dirty"] for row in results.rows)


def test_the_page_follows_the_results():
    """Other results give other tables and other numbers in the sentences."""
    rows = Results.read(ablate.COMMITTED).rows
    other = page.page(Results([row | {"score": row["score"] + 1.5} if row["system"] == "no-sync"
                               and row["step"] == 1100 else row for row in rows]))
    text = publish.PAGE.read_text()
    for old, new in (("falls from 65.1 to 20.9 %", "falls from 65.1 to 22.4 %"),
                     ("| avsd | 65.1 (56.0, 54.0, 78.0, 58.4, 79.2) | 20.9 (",
                      "| avsd | 65.1 (56.0, 54.0, 78.0, 58.4, 79.2) | 22.4 ("),
                     ("+32.2 ± 19.9* after 1100", "+33.7 ± 19.9* after 1100")):
        assert old in " ".join(text.split()) and new in " ".join(other.split())


def test_the_counts_of_verdicts():
    """Every claim of the paper has one verdict at every stage."""
    results = Results.read(ablate.COMMITTED)
    head, _, *lines = page.verdict_table(results).splitlines()
    verdicts = [cell.strip() for cell in head.split("|")[2:-1]]
    assert len(lines) == len(results.stages) == 3
    for stage, line in zip(results.stages, lines, strict=True):
        found = [ablation.verdict(stage.against(system, task), task in ablation.ERROR_RATES)
                 for system, tasks in ablation.CLAIMS for task in tasks]
        shown = [int(re.match(r" (\d+)", cell)[1]) for cell in line.split("|")[2:-1]]
        assert shown == [found.count(verdict) for verdict in verdicts] and sum(shown) == len(found)


def test_the_words_for_significant_differences():
    """no-causal: videoqa 10 ± 2.5 worse, isqa level; no-windows: avsr worse."""
    stage = Results(made_up(SOME)).first
    assert page.significant(stage, "no-causal") == ["videoqa"]
    assert page.significant(stage, "no-windows") == ["avsr"]
    assert page.significant(stage, "no-windows", worse=False) == []
    assert page.mask_differences(stage) == ([], 2)
    assert page.span(stage, "complete", "videoqa") == "60 to 64"
    assert page.span(stage, "complete", "videoqa", "after") == "70"
    assert page.listed([]) == "none" and page.listed("abc") == "a, b and c"


# ---------------------------------------------------------------- figures
def sweeps():
    scores = {}
    for systems in (ablation.WINDOWS.values(), ablation.LAMBDAS.values()):
        for i, system in enumerate(systems):
            for task in ("asr", "avsr", "videoqa", "avssd"):
                scores[system, task, ""] = [20 + 7 * i, 24 + 6 * i, 30 + 4 * i]
                scores[system, task, "query cosine"] = [0.5 - 0.12 * i, 0.45 - 0.1 * i]
    for i, fps in enumerate(ablation.FPS):
        scores["complete", "videoqa", f"at {fps:g} Hz"] = [50 + 5 * i, 52 + 5 * i, 51 + 4 * i]
    return scores


def held(streams=1, seed=0):
    """As figures.look_inside writes it: 10 frames of 10 vectors, 10 queries."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(50, 0.1), (2, 2 * streams, 4, 10))
    return {"attention": weights.astype(np.float16), "windows": [2] * streams, "fps": 2.0,
            "vectors": 10, "frames": rng.integers(0, 255, (10, 3, 64, 64)).astype(np.uint8),
            "question": "What colour?", "right": "red", "seconds": 5.0,
            "answer": "blue" if streams == 1 else "$x_{ $" * 20,          # no formula for a title
            "mel": rng.random((80, 500)).astype(np.float16),
            **{f"cosine {task}": np.full((10, 10), 0.25) for task in figures.COSINE_TASKS}}


def test_scales_and_lambda_show_every_point_with_its_units():
    pytest.importorskip("matplotlib")
    results = Results(made_up(sweeps())).first
    axes = figures.draw_scales(results).axes
    assert [a.get_xlabel() for a in axes] == ["window size K, frames of 0.5 s"] * 2 + [
        "frame rate when answering, Hz"]
    assert [a.get_ylabel() for a in axes] == ["asr: word error rate, %", "videoqa: right, %",
                                              "videoqa: right, %"]
    drawn = [a.containers[0].lines[0] for a in axes]
    assert [*drawn[0].get_xdata()] == [1, 2, 5, 10] and [*drawn[2].get_xdata()] == [*ablation.FPS]
    wanted = [np.mean([*results.by_seed(s, "asr").values()]) for s in ablation.WINDOWS.values()]
    assert np.allclose(drawn[0].get_ydata(), wanted)
    bars = axes[0].containers[0].lines[2][0].get_segments()             # 95 % over the seeds
    half = ablation.mean_interval([*results.by_seed("k1", "asr").values()])[1]
    assert bars[0][1, 1] - bars[0][0, 1] == pytest.approx(2 * half)
    figure = figures.draw_lambda(results)
    left, right = figure.axes[:3], figure.axes[3:]
    assert [t.get_text() for t in left[0].get_xticklabels()] == ["0", "0.01", "0.1", "1", "10"]
    assert [a.get_ylabel() for a in left] == ["avsr: word error rate, %", "videoqa: right, %",
                                              "avssd: right, %"]
    assert right[2].get_ylabel() == "cosine"
    lines = left[0].containers[0].lines[0], right[0].containers[0].lines[0]
    for kind in ("get_color", "get_marker", "get_linestyle"):           # without colour, too
        assert getattr(lines[0], kind)() != getattr(lines[1], kind)()
    assert len(figure.legends[0].get_texts()) == 2


def test_learning_has_a_line_a_system_and_a_point_a_stage():
    pytest.importorskip("matplotlib")
    scores = {(s, task, ""): [50 + 3 * k, 51 + 2 * k] for task in figures.LEARNING_TASKS
              for k, s in enumerate(("complete", "no-sync", "future"))}
    rows = made_up(scores, 8)
    rows += [row | {"step": 2, "score": 30} for row in rows[::2]]
    figure = figures.draw_learning(Results(rows))
    assert len(figure.axes) == len(figures.LEARNING_TASKS)
    assert [t.get_text() for t in figure.axes[-1].get_xticklabels()] == ["2", "4", "8"]
    assert [figure.axes[k].get_ylabel() for k in (0, 3)] == ["videoqa: right, %",
                                                             "avsr: word error rate, %"]
    for axis in figure.axes:
        lines = [c.lines[0] for c in axis.containers]
        assert len(lines) == 2                                     # the future is no part removed
        assert [*lines[0].get_ydata()] == [30, 40.5, 50.5]
        for kind in ("get_color", "get_marker", "get_linestyle"):
            assert getattr(lines[0], kind)() != getattr(lines[1], kind)()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [
        "complete", "without synchronisation"]


def test_no_axis_shows_more_than_100_percent():
    pytest.importorskip("matplotlib")
    scores = {key: [5, 95] for key in sweeps() if key[2] != "query cosine"}      # two seeds
    for draw in (figures.draw_scales, figures.draw_lambda):
        for axis in draw(Results(made_up(scores)).first).axes[:3]:
            low, high = axis.get_ylim()
            assert low == 0 and (high == 100 or "error rate" in axis.get_ylabel())


@pytest.mark.parametrize("streams", [1, 2])
def test_attention_stands_at_its_time(streams):
    pytest.importorskip("matplotlib")
    axes = [a for a in figures.draw_attention(held(streams)).axes if a.images]
    panels = [a for a in axes if a.get_ylabel().startswith("query")]
    assert len(panels) == 2 * streams
    assert len(axes[0].images) == 10 and axes[0].images[3].get_extent() == [1.5, 2.0, 0, 1]
    assert [image.get_extent()[:2] for image in panels[0].images] == [[0, 2.5], [2.5, 5]]
    mean = held(streams)["attention"].astype(np.float32).mean(2)
    assert mean.shape == (2, 2 * streams, 10, 50)
    last = panels[-1].images[-1].get_array()
    assert np.allclose(last, mean[1, -1], atol=1e-3)
    assert panels[-1].get_xlabel().startswith("time, s;")
    title = axes[0].get_title()
    assert title.startswith('"What colour?"  right: red; answered: ') and len(title) < 100
    assert title.endswith("blue") if streams == 1 else "\\$x_{ \\$" in title
    axes[0].figure.canvas.draw()                                  # nor does it stumble over one


def test_all_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread
    lines = "".join(json.dumps(row) + "\n" for row in made_up(sweeps()))
    (tmp_path / "results.jsonl").write_text(lines)
    (tmp_path / "inside").mkdir()
    for system in {*ablation.LAMBDAS.values()}:
        np.savez(tmp_path / "inside" / f"{system}.npz", **held())
    drawn = figures.draw_all(tmp_path, quiet)
    assert [path.name for path in drawn] == ["fig3.png", "fig4.png", "learning.png",
                                             "fig5.png", "attention-complete.png"]
    for path in drawn:
        pixels = imread(path)
        assert 600 <= pixels.shape[1] <= 1000 and pixels.shape[0] >= 250
        assert pixels[..., :3].std() > 0.05                             # not an empty sheet


# ---------------------------------------------------------------- what a model does inside
def test_the_hook_shows_what_the_layer_used():
    torch.manual_seed(1)
    config = preset("tiny", queries=3, width=32, ffn=16, window_frames=2)
    qformer = CausalQFormer(config, 16).eval()
    with torch.no_grad():
        for p in qformer.parameters():
            p.normal_(std=0.5)
        windows, mask = torch.randn(3, 2 * 4, 16), torch.ones(3, 8, dtype=torch.bool)
        mask[1, 5:], mask[2] = False, False
        used = []
        hooks = [layer.cross_attention.register_forward_hook(
            lambda m, inputs, out: used.append((m, inputs, out))) for layer in qformer.layers]
        with figures.cross_attention(qformer) as looks:
            out = qformer(windows, mask, per_frame=4)
        for hook in hooks:
            hook.remove()
        assert torch.equal(out, qformer(windows, mask, per_frame=4))    # and changes nothing
        assert [len(look) for look in looks] == [1, 1]                  # nor stays behind
        for (layer, (x, context, _), result), look in zip(used, looks, strict=True):
            weights = look[0]
            assert weights.shape == (3, 4, 3, 8)
            assert torch.allclose(weights.sum(-1), torch.ones(3, 4, 3))
            assert (weights[1, ..., 5:] == 0).all() and (weights[2] > 0).all()
            assert weights.std() > 0.05                                 # far from uniform
            value = rearrange(layer.value(context), "w n (h d) -> w h n d", h=layer.heads)
            y = rearrange(weights @ value, "w h n d -> w n (h d)")
            again = layer.norm(x + layer.output(y))
            difference = (again - result).abs().max().item()
            print(f"largest difference {difference:.1e}")
            assert difference < 2e-5


def test_cosines_are_equation_four():
    from favor import diversity_loss
    queries = torch.randn(5, 4, 8)
    matrix = figures.cosines(queries).numpy()
    assert np.allclose(np.diag(matrix), 1, atol=1e-6)
    assert figures.off_diagonal_mean(matrix) == pytest.approx(diversity_loss(queries).item(),
                                                              abs=1e-6)


def test_the_program_from_clips_to_figures(small_parts, small_miniature, tmp_path):
    """Two stages of one system, killed in the second; the same command goes on and leaves all that
    the tables and figures need.  Random parts, so nothing is learnt."""
    flags = " ".join(f"--{name} {small_parts / folder}" for name, folder in (
        ("whisper", "whisper"), ("visual", "instructblip"), ("llm", "llama")))
    command = [sys.executable, "-m", "experiments.ablate", "--only", "complete", "--seeds", "1",
               "--steps", "2", "--limit", "1", "--jobs", "2", "--data", small_miniature,
               "--out", tmp_path, f"--flags={flags} --batch 4 --micro-batch 4"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    logged, second = [], tmp_path / "complete-seed0" / "to-4" / "output.txt"
    for line in first.stdout:
        logged.append(line)
        if line.startswith("[1/2] complete-seed0 to 2 steps: "):
            until = time.time() + 60                 # more than its command: train.py is under way
            while time.time() < until and not (
                    second.exists() and len(second.read_text().splitlines()) > 1):
                time.sleep(0.02)
            first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM, "".join(logged)
    assert "stopping complete-seed0 to 4 steps; the same command continues" in logged[-1]
    assert Results.read(tmp_path).scored == [1, 2]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, 1 of them finished before; 2 at a time" in done.stdout
    assert "[2/2] complete-seed0 to 4 steps: " in done.stdout and "ETA 0 s" in done.stdout

    results = Results.read(tmp_path)
    assert results.scored == [1, 2, 4] and [stage.step for stage in results.stages] == [2, 4]
    ends = {(row["task"], row["part"]): row for row in results.first.rows}
    assert {task for task, part in ends if part == ""} == {*scenes.TASKS}
    assert {part for task, part in ends if task == "videoqa"} >= {
        "", "query cosine", "at 0.5 Hz", "at 1 Hz", "at 2 Hz", "at 4 Hz"}
    row, config = ends["videoqa", ""], AblateConfig(out=str(tmp_path), steps=2, flags=flags)
    model = Favor.from_pretrained(tmp_path / "complete-seed0" / "last")
    assert (row["n"], row["vectors"], row["commit"]) == (1, 20, runlog.git_facts()["commit"])
    assert row["parameters"] == sum(
        p.numel() for p in Favor.from_config(
            ablate.train_config(config, "complete", 0, 1).method()).trained_parameters())
    assert ends["videoqa", "at 2 Hz"]["score"] == row["score"]
    assert ends["videoqa", "at 4 Hz"]["vectors"] == 40       # 20 frames, 4 windows
    assert all(-1 <= ends[task, "query cosine"]["score"] <= 1 for task in figures.COSINE_TASKS)
    assert {row["step"] for row in results.rows if row["part"] != "query cosine"} == {1, 2, 4}
    inside = np.load(tmp_path / "inside" / "complete.npz")
    layers, windows, heads, queries, length = inside["attention"].shape
    assert (layers, windows, heads, queries, length) == (2, 2, 4, 10, 50)
    assert np.allclose(inside["attention"].astype(np.float32).sum(-1), 1, atol=5e-3)
    assert inside["frames"].shape == (10, 3, 64, 64) and inside["mel"].shape[0] == 80
    assert inside["cosine avsr"].shape == (10, 10)

    # the second stage began with the weights of the first, and has moved on
    longer = Favor.from_pretrained(tmp_path / "complete-seed0" / "to-4" / "last")
    trained = hub.read_json(tmp_path / "complete-seed0" / "to-4" / "config.json")["train"]
    assert trained["start_from"] == str(tmp_path / "complete-seed0" / "last")
    moved = [(a - b).abs().max().item() for a, b in zip(
        model.trained_parameters(), longer.trained_parameters(), strict=True)]
    assert 0 < max(moved) < 0.02                             # 2 steps, learning rate below 1.5e-3
