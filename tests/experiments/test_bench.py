"""experiments/bench/: its statistics and tables; every target runs at a tiny size on the CPU and
notices when the two sides do not do the same.  Nothing here is a timing: those need a quiet
machine."""

import json
import math
import shutil
import sys
import time

import pytest
import torch
import torch.nn.functional as F

import llama
from experiments.bench import measure
from experiments.bench import media as bench_media
from experiments.bench import run as bench
from experiments.bench import steps as bench_steps
from experiments.bench import targets as bench_targets
from experiments.bench.measure import CannotRun, Line, Run, Wrong
from runtime import cli

CPU = torch.device("cpu")
RATES = {"gemm float32": 1e11, "gemm bfloat16": 2e11, "copy": 1e10, "gemv, 1 thread": 1e10}


@pytest.fixture
def run():
    return Run(CPU, "test", repeats=1, ceilings=dict(RATES))


# ---- a line -------------------------------------------------------------------------------------

def test_ratio_roofline_and_limit():
    line = Line("x", "ms", 6.0, 10.0, roofline=3.0, wanted="ratio <= 0.5")
    assert (line.ratio, line.close) == (0.6, 0.5)
    assert line.margin == pytest.approx(1.2) and line.reached is False
    rate = Line("x", "frames/s", 900.0, roofline=1200.0, wanted="close >= 0.6")
    assert rate.close == 0.75 and rate.reached is True
    assert Line("x", "frames/s", 900.0, wanted="ours >= 900").reached is True
    none = Line("x", "ms", 6.0)
    assert (none.ratio, none.close, none.margin, none.reached) == (None,) * 4
    assert Line("x", "frames", 0, wanted="ours <= 0").reached is True
    assert Line("x", "frames", 1, wanted="ours <= 0").reached is False
    with pytest.raises(ValueError, match="there is no ratio"):
        Line("x", "ms", 6.0, wanted="ratio <= 1").reached  # noqa: B018


def test_medians_and_quartiles_are_of_pairs():
    line = measure.line_of("x", [1.0, 2.0, 30.0], [2.0, 4.0, 40.0])
    assert (line.ours, line.baseline, line.ratio, line.repeats) == (2000, 4000, 0.5, 3)
    assert line.spread == (0.5, 0.625)                      # of 0.5, 0.5, 0.75
    assert measure.quartiles([3.0], [4.0]) == (0.75, 0.75)


def test_both_sides_take_turns_on_the_same_fresh_inputs(run):
    calls, made = [], []

    def make():
        made.append(object())
        return (made[-1],)

    times = measure.interleaved(run, "x", make, {
        "ours": lambda x: calls.append(("ours", x)),
        "baseline": lambda x: calls.append(("baseline", x))}, 3)
    assert {side: len(seconds) for side, seconds in times.items()} == {"ours": 3, "baseline": 3}
    assert list(run.first["x"]) == ["ours", "baseline"], "the first calls are recorded apart"
    order = [side for side, _ in calls]
    assert order == ["ours", "baseline", "baseline", "ours", "ours", "baseline", "baseline", "ours"]
    assert [x for _, x in calls] == [x for x in made for _ in range(2)] and len(made) == 4


def test_sizes_and_limits():
    quick, cuda = Run(CPU, "quick"), Run(torch.device("cuda", 0), "cuda")
    assert quick.pick(test=1, quick=2, cuda=3) == 2 and cuda.pick(test=1, full=2) == 2
    assert (quick.wants("a", "b"), cuda.wants("a", "b")) == ("a", "b")
    assert Run(torch.device("cuda", 0), "quick").wants("a", "b") == "", "not at a smaller size"
    with pytest.raises(ValueError, match="no value for size test"):
        Run(CPU, "test").pick(quick=1)
    run = Run(CPU, ceilings=dict(RATES))
    assert run.roofline_ms(2e11) == 2000 and run.roofline_ms(1e8, n_bytes=1e10) == 1000
    assert Run(CPU).roofline_ms(1e9) is None


# ---- what is measured ---------------------------------------------------------------------------

def test_peak_memory(run):
    def twice(n):
        torch.ones(n)
        return torch.ones(2 * n)
    n = 2 ** 18
    assert measure.peak_bytes(run, twice, n) == pytest.approx(8 * n, rel=1e-3)
    assert measure.peak_bytes(run, lambda: (torch.ones(n), torch.ones(n))) == 8 * n


def test_kernels_say_which_path_was_taken(run):
    q = torch.randn(1, 2, 8, 4)
    assert measure.kernels(run, F.scaled_dot_product_attention, q, q, q) == [
        "_scaled_dot_product_flash_attention_for_cpu"]
    assert "bmm" in measure.kernels(run, lambda x: x @ x.transpose(-1, -2), q)


def test_ceilings(run):
    found = measure.ceilings(run)
    assert found.keys() == RATES.keys() and all(rate > 1e6 for rate in found.values())


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("ours", [torch.ones(3), torch.zeros(2), torch.tensor([1.0, math.nan])])
def test_a_difference_raises(ours):
    with pytest.raises(Wrong, match="thing"):
        measure.check("thing", ours, torch.ones(2), 1e-3)
    assert measure.check("thing", torch.ones(2), torch.ones(2) + 1e-4, 1e-3) == pytest.approx(
        1e-4, rel=1e-2)


# ---- every target -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", list(bench.TARGETS))
def test_every_target_runs(run, name):
    start = time.perf_counter()
    lines = bench.TARGETS[name].measure(run)
    print(f"target {name}: {time.perf_counter() - start:.1f} s")
    assert lines and all(math.isfinite(line.ours) for line in lines)
    for line in lines:
        bench.cells(line)
        assert not line.wanted or line.reached is not None


def unmasked(q, k, v, per_frame):
    return F.scaled_dot_product_attention(q, k, v)


def later(read_frames):
    """A reader whose third frame is the one after it."""
    def read(path, resize):
        frames, times = read_frames(path, resize)
        return frames, [t + (i == 2) / 29.97 for i, t in enumerate(times)]
    return read


WRONG = [
    ("1", bench_targets, "block_causal_attention", lambda _: unmasked),
    ("2", bench_targets.baselines, "ViT", lambda cls: type("Other", (cls,), {
        "forward": lambda self, x: 1.1 * cls.forward(self, x)})),
    ("3", bench_targets, "log_mel_spectrogram", lambda f: lambda audio: f(audio) + 2e-4),
    ("4", bench_targets, "llm_step", lambda f: lambda llm, x, ids: f(llm, x, ids.roll(1, 1))),
    ("7", llama.Llama, "generate", lambda f: lambda *a, **k: [
        [1 + i for i in row] for row in f(*a, **k)]),
    ("5", bench_steps.Step, "__call__", lambda f: lambda self, samples: (
        f(self, samples) + (samples[0].clip is not None))),
    ("6", bench_steps.FeatureCache, "get", lambda f: lambda self, record: bench_steps.dataclasses.
     replace(kept := f(self, record), audio=kept.audio + 1e-2)),
    ("8", bench_media, "read_frames", later),
    ("8", bench_media, "read_frames", lambda f: lambda path, resize: (
        f(path, resize)[0].roll(1, 0), f(path, resize)[1])),
    ("9", bench_media, "read_audio", lambda f: lambda path: 1.4 * f(path)),
    ("10", bench_steps, "in_processes", lambda _: lambda *job: [
        {"loss": 1.0, "grad_norm": 1.0, "seconds": 1.0}] * 2),
    ("11", bench_steps.Live, "answer", lambda f: lambda *a, **k: f(*a, **k) + "?")]


@pytest.mark.parametrize(("name", "where", "what", "broken"), WRONG,
                         ids=[f"{name} {what}" for name, _, what, _ in WRONG])
def test_a_wrong_result_raises(run, monkeypatch, name, where, what, broken):
    monkeypatch.setattr(where, what, broken(getattr(where, what)))
    with pytest.raises(Wrong):
        bench.TARGETS[name].measure(run)


def test_lines_that_only_a_gpu_has(run, monkeypatch):
    """Their arithmetic; what runs is the CPU's."""
    monkeypatch.setattr(torch, "compile", lambda module: module)
    line = Line("x", "ms", 500.0, 1000.0, roofline=250.0)
    rate, share, compiled, one, batched = bench_targets.vision_on_gpu(
        run, line, torch.square, torch.square, lambda n=4: (torch.ones(n),), 4)
    assert (rate.ours, rate.roofline, share.close) == (8, 16, 0.5) and not share.reached
    assert compiled.baseline and one.baseline and batched.ours == 125.0
    rate, share = bench_targets.token_rates(run, line, 8000)
    assert (rate.ours, rate.wanted, share.reached) == (16000, "ours >= 14600", True)
    rate, share = bench_targets.decoding_rates(run, Line("x", "ms", 4.0, 20.0, roofline=3.0))
    assert (rate.ours, rate.reached, share.close) == (250, False, 0.75)
    q = torch.randn(1, 2, 8, 4)
    both = bench_targets.forward_backward(bench_targets.block_causal_attention)
    assert bench_targets.flash_only(run, lambda *x: both, [q] * 4).reached


def test_compiled_decoding_is_asked_for_and_given_back():
    llm = llama.Llama(bench_targets.TEST)
    asked = bench_targets.in_fixed_steps(llm, lambda ids: (ids, llm.compiled))
    assert asked(7) == (7, True) and not llm.compiled


def test_without_ffmpeg(run, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for target in (bench_media.pictures, bench_media.sound):
        assert "no ffmpeg on PATH" in target(run)[0].baseline_name


@pytest.mark.parametrize(("name", "library"), [("2", "transformers"), ("4", "peft")])
def test_without_baselines(run, monkeypatch, name, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CannotRun, match=rf'{library} is missing.*pip install -e "\.\[dev\]"'):
        bench.TARGETS[name].measure(run)
    outcome = bench.run_target(name, run)
    assert outcome.reached == "cannot run" and library in outcome.why and not outcome.failed


# ---- what is reported ---------------------------------------------------------------------------

def targets(**measures):
    return {name: bench.Target(f"target {name}", "cpu", "h200", f) for name, f in measures.items()}


def said_no(_):
    raise CannotRun("no such machine")


def differ(_):
    raise Wrong("attention: differs")


GOOD = Line("fast | thing", "ms", 5.0, 10.0, "other", (0.4, 0.6), 2.5, "ratio <= 0.7", 7, "remark")
BAD = Line("slow thing", "ms", 9.0, 10.0, "other", wanted="ratio <= 0.3")


def test_one_line_a_target_and_every_measurement(monkeypatch, tmp_path, capsys, run):
    monkeypatch.setattr(bench, "TARGETS", targets(a=lambda _: [GOOD], b=lambda _: [GOOD, BAD],
                                              c=said_no, d=lambda _: [Line("m", "MiB", 1234.5)]))
    monkeypatch.setattr(bench, "ceilings", lambda run: dict(RATES))
    bench.measure_all(bench.BenchConfig(out=str(tmp_path / "new"), only=tuple("abcd"), threads=1), [
        "--only", "a", "b"])
    text = (tmp_path / "new" / "bench.md").read_text()
    assert "| a | target a | cpu | yes | fast / thing (ratio <= 0.7) | 5 ms | 10 (other) " \
           "| 0.5 [0.4, 0.6] | 2.5 | 50 % |" in text
    assert "| b | target b | cpu | no (1 of 2) | slow thing (ratio <= 0.3) | 9 ms |" in text
    assert "| c | target c | cpu | cannot run | no such machine |" in text
    assert "| d | target d | cpu | no limit here | m | 1234 MiB |" in text
    assert "command: python -m experiments.bench --only a b" in text and torch.__version__ in text
    saved = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [target["reached"] for target in saved["targets"]] == [
        "yes", "no (1 of 2)", "cannot run", "no limit here"]
    assert saved["targets"][0]["lines"][0]["ratio"] == 0.5 and saved["ceilings"] == RATES
    printed = capsys.readouterr().out
    assert "NOT reached" in printed and "no such machine" in printed and "threads: 1" in printed


def test_a_wrong_target_ends_with_1_after_the_others(monkeypatch, tmp_path):
    def broken(_):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(bench, "TARGETS", targets(a=differ, b=broken, c=lambda _: [GOOD]))
    monkeypatch.setattr(bench, "ceilings", lambda run: {})
    failed = "target a: WRONG, the sides differ.*\ntarget b: error, Run"
    with pytest.raises(SystemExit, match=failed):
        bench.measure_all(bench.BenchConfig(out=str(tmp_path), only=("a", "b", "c"), threads=1), [])
    saved = json.loads((tmp_path / "bench.json").read_text())["targets"]
    assert [target["reached"] for target in saved] == ["WRONG", "error", "yes"]
    assert "the sides differ: attention" in saved[0]["why"] and "out of memory" in saved[1]["why"]


def test_the_furthest_line_speaks_for_a_target():
    near = Line("near", "ms", 6.9, 10.0, wanted="ratio <= 0.7")
    exact = Line("exact", "of 255", 1, wanted="ours <= 1")
    assert bench.Outcome("1", [GOOD, BAD, near]).headline is BAD
    assert bench.Outcome("1", [GOOD, exact, near]).headline is near, "the one that has a baseline"
    assert bench.Outcome("1", [exact]).headline is exact
    assert bench.Outcome("1").headline is None


def test_the_command_line(capsys):
    config, given = cli.parse(bench.BenchConfig, bench.__doc__, ["--only", "1", "10", "--quick"])
    assert config.names == ("1", "10") and given == {"only", "quick"}
    assert (config.run().size, config.run().repeats) == ("quick", 3)
    assert len(bench.BenchConfig().names) == 11 and bench.BenchConfig(device="cpu").run().size == (
        "full")
    for words, message in ((["--only", "12"], "there are 1, 2"),
                           (["--model", "70b"], "argument --model: invalid choice: '70b'"),
                           (["--repeats", "-1"], "0 or more")):
        with pytest.raises(SystemExit):
            cli.parse(bench.BenchConfig, bench.__doc__, words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse(bench.BenchConfig, bench.__doc__, ["--help"])
    assert "python -m experiments.bench --quick" in capsys.readouterr().out
