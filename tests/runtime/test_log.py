"""The log of a run: files, lines, rates, FLOP arithmetic, back ends, facts.  No clock but ours."""

import errno
import io
import json
import math
import subprocess
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import favor
from baselines.instructblip import InstructBlip
from favor import Favor, Features, Sample, preset
from llama import Llama, LlamaConfig
from runtime import flops
from runtime import log as runlog
from runtime.log import Clock, RunLog
from tools.memory import random_part
from vit import GridEncoder
from vit import ViTConfig as GridConfig
from vit_qformer import ViT, ViTConfig

ROOT = runlog.Path(runlog.__file__).parent.parent


class Time:
    """A clock that goes only when told to."""
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def goes(self, seconds):
        self.seconds += seconds


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    monkeypatch.setattr(runlog, "peak_memory", lambda device: 17.4 * runlog.GIB)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def quiet_log(out, total_steps, **settings):
    """A RunLog without TensorBoard, and the list of what it says."""
    said = []
    return RunLog(out, total_steps, **{"tensorboard": False, "log": said.append} | settings), said


def row(step, **values):
    return {"step": step, "loss": 1.0 / step, "ce": 0.5 / step, **values}


# ---------------------------------------------------------------- log.jsonl
def test_a_row_a_step_is_there_at_once(tmp_path):
    log, _ = quiet_log(tmp_path / "new" / "run", 9)
    for step in (1, 2):
        log.log_step(row(step, cosine=torch.tensor(0.25), task_ce={"asr": 0.5}))
        written = lines_of(log.out / "log.jsonl")               # not closed yet
        assert [r["step"] for r in written] == [*range(1, step + 1)]
    assert written[1]["loss"] == 0.5 and written[1]["cosine"] == 0.25
    assert written[1]["task_ce"] == {"asr": 0.5} and log.last == written[1]
    log.close()


def test_numbers_that_are_none_become_null(tmp_path):
    log, said = quiet_log(tmp_path, 1)
    log.log_step(row(1, grad_norm=float("nan"), skipped=True))
    text = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in text and json.loads(text)["grad_norm"] is None
    assert "grad nan" in said[0] and "1 skipped" in said[0]


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', '{"step": 3, "lo{"step": 6, "ce": 1}\n', "\n",
                                  "[7]\n", '"\xff'])
def test_resume_cuts_later_and_torn_rows(torn, tmp_path):
    rows = [row(step) for step in (1, 2, 3, 4, 5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + torn)
    log, _ = quiet_log(tmp_path, 6, first_step=3)
    assert lines_of(tmp_path / "log.jsonl") == rows[:3] and log.last == rows[2]
    assert log.rows == [{"step": r["step"], "ce": r["ce"]} for r in rows[:3]]
    log.log_step(row(4, seconds=5))
    assert [r["step"] for r in lines_of(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    assert log.rows[-1] == {"step": 4, "ce": 0.125} and log.last["seconds"] == 5
    assert not list(tmp_path.glob(".*"))


def test_a_torn_row_in_the_middle_costs_only_itself(tmp_path):
    """What a full disk may have left."""
    text = '{"step": 1, "ce": 1}\n{"step": 2, "c\n{"step": 3, "ce": 3}'
    (tmp_path / "log.jsonl").write_text(text)
    log, _ = quiet_log(tmp_path, 9, first_step=3)
    log.log_step(row(4))
    assert [r["step"] for r in lines_of(tmp_path / "log.jsonl")] == [1, 3, 4]


def test_a_fresh_start_forgets_the_old_rows(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "ce": 1}\n')
    log, _ = quiet_log(tmp_path, 9)
    assert log.rows == [] and log.last is None and (tmp_path / "log.jsonl").read_text() == ""


def test_the_rewriting_is_atomic(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "ce": 1}\n{"step": 2, "ce": 1}\n')

    def killed(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(runlog.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        quiet_log(tmp_path, 9, first_step=1)
    assert len(lines_of(tmp_path / "log.jsonl")) == 2


def test_only_the_main_process_writes(tmp_path):
    (tmp_path / "log.jsonl").write_text("as it was")
    log, said = quiet_log(tmp_path, 2, main_process=False, tensorboard=True)
    for step in (1, 2):
        assert log.log_step(row(step), clips=4, seconds=1) == row(step)
    log.log_event("checkpoint", path="last")
    log.close()
    assert log.rows == [] and said == [] and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    assert (tmp_path / "log.jsonl").read_text() == "as it was"


def test_events(tmp_path):
    log, _ = quiet_log(tmp_path, 9, first_step=4)
    log.log_event("resumed", path=tmp_path)
    log.log_step(row(5))
    log.log_event("validation", val_ce=torch.tensor(0.5), tasks={"asr": float("inf")})
    again, _ = quiet_log(tmp_path, 9, first_step=0)             # events are history: never cut
    again.log_event("skipped", step=1)                          # of a step that is not logged yet
    first, second, third = lines_of(tmp_path / "events.jsonl")
    assert first["event"] == "resumed" and first["step"] == 4 and first["path"] == str(tmp_path)
    assert runlog.re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", first["time"])
    assert second["step"] == 5 and second["val_ce"] == 0.5 and second["tasks"] == {"asr": None}
    assert third["event"] == "skipped" and third["step"] == 1


# ---------------------------------------------------------------- the line and its rates
def test_one_line_every_log_every_with_all_items(tmp_path):
    time = Time()
    log, said = quiet_log(tmp_path, 5, log_every=2, peak=1e12, now=time)
    for step in range(1, 6):
        time.goes(2)
        log.log_step({"step": step, "loss": 1.23456, "ce": 1.2, "diversity": 0.5, "cosine": 0.012,
                  "lr": 1.5e-3, "grad_norm": 0.83, "seconds": 2 * step,
                  "task_ce": {"asr": 1.0 + step, "vqa": 0.5} if step != 2 else {"ocr": 0.25}},
                 clips=204, tokens=18200, flops=0.82e12, waited_s=0.02, seconds=2)
    assert said == [
        "step 2/5: loss 1.2346, ce 1.2000, diversity 0.5000, query cosine +0.012, lr 1.5e-03, "
        "grad 0.83, 102 clips/s, 9.1k tokens/s, MFU 41 %, 17.4 GiB, waiting 1 %, ETA 6 s "
        "| asr 2.00 vqa 0.50 ocr 0.25",
        "step 4/5: loss 1.2346, ce 1.2000, diversity 0.5000, query cosine +0.012, lr 1.5e-03, "
        "grad 0.83, 102 clips/s, 9.1k tokens/s, MFU 41 %, 17.4 GiB, waiting 1 %, ETA 2 s "
        "| asr 4.50 vqa 0.50",
        "step 5/5: loss 1.2346, ce 1.2000, diversity 0.5000, query cosine +0.012, lr 1.5e-03, "
        "grad 0.83, 102 clips/s, 9.1k tokens/s, MFU 41 %, 17.4 GiB, waiting 1 %, ETA 0 s "
        "| asr 6.00 vqa 0.50"]
    written = lines_of(tmp_path / "log.jsonl")
    assert {*written[0]} == {
        "step", "loss", "ce", "diversity", "cosine", "lr", "grad_norm", "seconds", "task_ce",
        "clips_per_s", "tokens_per_s", "mfu", "memory_gib", "wait_share", "eta_s"}
    assert written[1] | {"task_ce": 0} == {
        "step": 2, "loss": 1.23456, "ce": 1.2, "diversity": 0.5, "cosine": 0.012, "lr": 1.5e-3,
        "grad_norm": 0.83, "seconds": 4, "task_ce": 0, "clips_per_s": 102, "tokens_per_s": 9100,
        "mfu": 0.41, "memory_gib": 17.4, "wait_share": 0.01, "eta_s": 6}


def test_many_tasks_stay_on_the_line(tmp_path):
    log, said = quiet_log(tmp_path, 1)
    log.log_step(row(1, val_ce=0.25, task_ce={f"t{i}": i for i in range(8)}))
    assert said[0].endswith(
        "| t7 7.00 t6 6.00 t5 5.00 t4 4.00 t3 3.00 t2 2.00 and 2 better")
    assert "held-out ce 0.2500" in said[0] and "\n" not in said[0]


def test_rates_are_of_the_steps_since_the_last_line(tmp_path):
    log, _ = quiet_log(tmp_path, 10, log_every=2, now=(time := Time()))
    rates = []
    for step, seconds in ((1, 1), (2, 3), (3, 10)):
        time.goes(seconds)
        rates.append(log.log_step(row(step), clips=8, tokens=100, waited_s=0.5, seconds=seconds))
    assert [r["clips_per_s"] for r in rates] == [8, 4, 0.8]        # 8 / 1, 16 / 4, 8 / 10
    assert [r["tokens_per_s"] for r in rates] == [100, 50, 10]
    assert [r["wait_share"] for r in rates] == [0.5, 0.25, 0.05]
    assert [r["eta_s"] for r in rates] == [9, 16, 70]              # 9 * 1, 8 * 2, 7 * 10
    assert "mfu" not in rates[0] and "tflops" not in rates[0]      # no operations were told


def test_eta_counts_what_comes_between_steps(tmp_path):
    """Two steps of 3 s with a validation of 10 s between them, on a run that goes on at 100."""
    log, _ = quiet_log(tmp_path, 110, first_step=100, now=(time := Time()))
    time.goes(500)                                                 # loading is no step
    for step in (101, 102):
        time.goes(3)
        last = log.log_step(row(step), clips=6, seconds=3)
        time.goes(10)
    assert last["clips_per_s"] == 2
    assert last["eta_s"] == 8 * (3 + 10 / 2)


def test_flops_without_a_known_peak(tmp_path):
    log, said = quiet_log(tmp_path, 1)
    assert log.log_step(row(1), flops=3e12, seconds=2)["tflops"] == 1.5
    assert "1.5 TFLOP/s" in said[0] and "MFU" not in said[0]


def test_clock():
    clock = Clock(time := Time())
    time.goes(1)
    with clock.waiting():
        time.goes(2)
    with clock.aside():                                            # a validation
        time.goes(50)
    with clock.waiting():
        time.goes(1)
    time.goes(1)
    assert clock.lap() == (5, 3)
    with pytest.raises(ValueError), clock.waiting():
        time.goes(3)
        raise ValueError
    assert clock.lap() == (3, 3)


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (44.6, "45 s"), (59.7, "1 min 0 s"), (725, "12 min 5 s"), (3599.6, "1 h 0 min"),
    (3 * 3600 + 12 * 60 + 40, "3 h 12 min"), (2 * 86400 + 3 * 3600, "2 d 3 h"), (-1, "0 s"),
    (float("inf"), "?")])
def test_duration(seconds, text):
    assert runlog.duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (0.345, "0.34"), (9.97, "10"), (102.4, "102"), (999.6, "1.0k"), (9123, "9.1k"),
    (1.25e6, "1.2M")])
def test_short(number, text):
    assert runlog.short(number) == text


# ---------------------------------------------------------------- operations
def llm_parts(model, llm_tokens):
    return flops.flops_by_part(model, llm_tokens, 0, 0, [], True)


@pytest.fixture(scope="module")
def seven_b():
    return Favor.from_config(preset("7b"), torch.bfloat16, "meta", load=random_part)


def test_another_aligner_is_counted_by_its_matrices(small_parts):
    """README: any class with forward(windows, mask, per_frame) may take the Q-Former's place."""
    model = Favor.from_config(preset("tiny", whisper=str(small_parts / "whisper"),
                                     llm=str(small_parts / "llama"),
                                     visual=str(small_parts / "instructblip")))
    model.qformer = torch.nn.Linear(32, 128)
    joint_vectors = model.config.window_frames * max(model.visual.n_queries, model.audio_steps)
    parts = flops.flops_by_part(model, [50], 3, 15, [], True)
    assert parts["causal Q-Former"] == 3 * 3 * 2 * 32 * 128 * joint_vectors


def test_7b_costs_what_is_known(seven_b):
    """32 layers of 4 * 4096^2 + 3 * 4096 * 11008 weights, 4 operations each a token; LoRA r 32 on
    q, k, v (in 4096, out 4096), gate, up (4096, 11008) and down (11008, 4096), 6 each."""
    parts = llm_parts(seven_b, [700, 300])
    blocks = 32 * (4 * 4096 ** 2 + 3 * 4096 * 11008)
    assert blocks == 6_476_005_376
    assert parts["LLM"] == 4 * blocks * 1000
    assert parts["LLM attention"] == 32 * 12 * 4096 * (700 ** 2 + 300 ** 2)
    lora = 32 * 32 * (3 * (4096 + 4096) + 3 * (4096 + 11008))
    assert lora == 71_565_312 and parts["LoRA"] == 6 * lora * 1000
    assert parts["causal Q-Former"] == parts["audio projection"] == 0


def test_encoders_cost_what_is_known(seven_b):
    """EVA ViT-g/14 of 40 layers, with its head of 1408 x 1024: 534.06 GFLOP per picture (open_clip,
    docs/model_profile.csv).  Whisper large, by hand; nothing where features were cached."""
    with torch.device("meta"):
        vit = ViT(ViTConfig(layers=40))
    assert flops.vit_flops(vit) / 1e9 == pytest.approx(534.06, rel=2e-4)
    whisper = 32 * (2 * 1500 * (4 * 1280 ** 2 + 2 * 1280 * 5120) + 4 * 1500 ** 2 * 1280)
    whisper += 2 * 3 * (3000 * 80 * 1280 + 1500 * 1280 ** 2)
    ran = flops.flops_by_part(seven_b, [700], 7, 60, [30.0, 31.0], False)
    cached = flops.flops_by_part(seven_b, [700], 7, 60, [30.0, 31.0], True)
    assert ran["Whisper"] == 3 * whisper                           # 1 + 2 chunks
    assert ran["ViT"] == 60 * flops.vit_flops(seven_b.visual.vit)
    assert {*ran} - {*cached} == {"Whisper", "ViT", "visual Q-Former"}
    assert all(ran[part] == n for part, n in cached.items())
    assert flops.step_flops(seven_b, [700], 7, 60, [30.0, 31.0], False) == sum(ran.values())


def test_causal_qformer_by_hand(seven_b):
    """A window of 10 frames x 32 joint vectors of 1536, 32 queries of 768, 2 layers."""
    n, Q, D = 320, 32, 768
    causal = 2 * n * 4 * 1536 ** 2 + 4 * n * n * 1536
    itself = 2 * Q * 4 * D ** 2 + 4 * Q * Q * D
    across = 2 * Q * 2 * D ** 2 + 2 * n * 2 * 1536 * D + 4 * Q * n * D
    forward = 2 * (causal + itself + across + 2 * Q * 2 * D * 3072)
    parts = flops.flops_by_part(seven_b, [100], 6, 60, [30.0], True)
    assert parts["causal Q-Former"] == 3 * 6 * forward
    assert parts["LLM projection"] == 6 * 6 * 32 * 768 * 4096
    assert parts["audio projection"] == 6 * 1500 * 1280 * 768


def test_mfu_by_hand(tmp_path, small_favor):
    """A small LLM alone: 2 layers, width 32, ffn 48, no LoRA: text of 10 tokens in 1 ms."""
    with torch.device("meta"):
        small_favor.llm = Llama(LlamaConfig(400, 32, 2, 2, 2, 48))
    ran = flops.step_flops(small_favor, [10], 0, 0, [], True)
    assert ran == 4 * 2 * (4 * 32 * 32 + 3 * 32 * 48) * 10 + 2 * 12 * 32 * 10 ** 2
    assert ran == 773_120
    log, said = quiet_log(tmp_path, 1, peak=2e9)
    assert log.log_step(row(1), flops=ran, seconds=0.001)["mfu"] == 0.3866
    assert "MFU 39 %" in said[0]


@pytest.mark.parametrize("name", ["tiny", "13b"])
def test_other_sizes(name):
    model = Favor.from_config(preset(name), None, "meta", load=random_part)
    parts = flops.flops_by_part(model, [100], 4, 20, [10.0], False)
    assert parts["LLM"] == 4 * 100 * sum(
        p.numel() for n, p in model.llm.model.layers.named_parameters()
        if p.ndim == 2 and "lora" not in n)
    assert min(parts.values()) > 0
    if name == "13b":
        assert parts["LLM"] == 4 * 100 * 40 * (4 * 5120 ** 2 + 3 * 5120 * 13824)


@pytest.fixture
def small_favor(small_parts):
    config = preset("tiny", whisper=str(small_parts / "whisper"), llm=str(small_parts / "llama"),
                    visual=str(small_parts / "instructblip"))
    return Favor.from_config(config).train()


def counted(function):
    """What PyTorch counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [{}, {"causal": "none"}, {"sync": False}, {"window_frames": 0},
                                     {"direct": 24}])
def test_a_step_against_pytorchs_counter(changes, small_favor):
    """To the last operation, but for what is named: the lm_head at the answer's tokens (frozen: 4N)
    and the dummy window are left out, the audio projection's 6N are 4N: its input learns nothing;
    of the masked pairs, which count, a CPU computes a part.
    """
    model = small_favor
    model = Favor(favor.dataclasses.replace(model.config, **changes), model.whisper, model.visual,
                  Llama(model.llm.config), model.tokenizer, model.qformer_tokenizer).train()
    clip = Features(*(torch.randn(x.shape) for x in model.empty_features(10)))
    sample = Sample("What happens after the beep?", "red square", features=clip)
    work = flops.work_of(model, [sample])
    assert work == {"llm_tokens": [model.length(sample)], "frames": 20, "audio_seconds": [10.0],
                    "windows": {"sync": 8, "window_frames": 1}.get(next(iter(changes), ""), 4)}
    parts = flops.flops_by_part(model, **work, encoded=True)
    found = counted(lambda: model([sample])["loss"].backward())
    head = 4 * model.llm.lm_head.weight.numel() * model.answer_tokens(sample)
    steps, projection = len(clip.audio), model.audio_proj.weight.numel()
    expected = sum(parts.values()) + head - 2 * steps * projection + 4 * projection
    if "window_frames" in changes:        # the dummy is as long as the only window
        dummy = 1
    else:
        dummy = 1 / work["windows"]
    expected += dummy * (parts["causal Q-Former"] + parts["LLM projection"])
    K = model.config.window_frames or work["frames"]
    N, group = max(model.visual.n_queries, model.audio_steps), math.ceil(K / 5)
    masked = K * K - sum(min(group, K - first) * min(first + group, K)
                         for first in range(0, K, group))      # pairs of frames, never computed
    if model.config.causal != "none":
        width = model.qformer.layers[0].causal_attention.query.out_features
        expected -= 3 * (work["windows"] + 1) * len(model.qformer.layers) * flops.attention(
            N, N, width) * masked
    print(f"counted {found:,}, expected {expected:,.0f}, of it ours {sum(parts.values()):,}")
    if "direct" in changes:       # a mean over vectors, forward and backward, dummy window included
        Q, vectors = model.config.queries, model.config.window_frames * max(
            model.visual.n_queries, model.audio_steps)
        expected += 4 * (work["windows"] + 1) * Q * vectors * model.config.width
    assert found == expected


def test_encoders_against_pytorchs_counter(small_favor):
    """The questions' tokens in the visual Q-Former aside, to the last operation."""
    model, visual = small_favor.eval(), small_favor.visual
    work = [[], 0, 3, [5.0, 6.0], False]                          # chunks of 5 s: 1 + 2
    parts = flops.flops_by_part(model, *work)
    with torch.no_grad():
        pixels = torch.randn(3, 3, visual.image_size, visual.image_size)
        assert counted(lambda: visual.encode_image(pixels)) == parts["ViT"]
        image = visual.encode_image(pixels)
        assert counted(lambda: visual.query(image)) == parts["visual Q-Former"]
        config = model.whisper.config
        mel = torch.randn(3, config.n_mels, 2 * config.max_source_positions)
        assert counted(lambda: model.whisper(mel)) == parts["Whisper"]


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_a_grid_encoder_against_pytorchs_counter(kind, small_favor):
    """To the last operation, CLS and registers among them; there is no visual Q-Former."""
    config = GridConfig(kind, width=16, layers=2, heads=2, ffn=24, image_size=32, patch_size=8,
                        trained_size=48, registers=3 * (kind == "dinov2"))
    small_favor.visual = GridEncoder(config, 2).eval()
    parts = flops.flops_by_part(small_favor, [], 0, 5, [], False)
    assert "visual Q-Former" not in parts and parts["Whisper"] == 0
    with torch.no_grad():
        found = counted(lambda: small_favor.visual.encode_image(torch.randn(5, 3, 32, 32)))
    P = 16 + (4 if kind == "dinov2" else 0)
    by_hand = 2 * 16 * 16 * 3 * 64 + 2 * (2 * P * (4 * 16 ** 2 + 2 * 16 * 24) + 4 * P * P * 16)
    assert found == parts["ViT"] == 5 * by_hand


def test_the_baseline_has_its_own_parts(small_parts):
    """Its visual Q-Former learns, features (the ViT's) cached or not, and it hears nothing."""
    config = preset("tiny", llm=str(small_parts / "llama"),
                    visual=str(small_parts / "instructblip"))
    model = InstructBlip.from_config(config).train()
    image = Features(torch.randn(1, 17, 16), None, True)
    work = flops.work_of(model, [Sample("What is it?", "red", features=image)])
    assert work["windows"] == work["frames"] == 1 and work["audio_seconds"] == []
    cached = flops.flops_by_part(model, **work, encoded=True)
    ran = flops.flops_by_part(model, **work, encoded=False)
    assert {*ran} - {*cached} == {"ViT"} and "Whisper" not in ran
    assert cached["visual Q-Former"] == 3 * flops.visual_qformer_flops(model.visual)
    assert cached["language projection"] == 6 * 16 * 32 * 4


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H20", 148e12), ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B200", 2250e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12),
    ("NVIDIA L4", 121e12), ("NVIDIA A40", 150e12), ("NVIDIA A10", 125e12), ("NVIDIA A10G", None),
    ("NVIDIA RTX A6000", 155e12), ("NVIDIA RTX 6000 Ada Generation", 364e12),
    ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090", 71e12), ("Tesla V100-SXM2-32GB", 125e12),
    ("Tesla V100-PCIE-16GB", 112e12), ("Tesla T4", 65e12), ("Some GPU", None),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None), (torch.device("cpu"), None)])
def test_peaks(name, peak):
    assert flops.peak_flops(name) == peak


# ---------------------------------------------------------------- a full disk
class FullDisk:
    """Files of log.py can be written until the disk is full; then half of a line can."""

    def __init__(self, monkeypatch):
        disk = self
        disk.full = False

        class File(io.TextIOWrapper):
            def write(self, text):
                super().write(text[:len(text) // 2] if disk.full else text)
                if disk.full:
                    self.flush()
                    raise OSError(errno.ENOSPC, "No space left on device")

            def writelines(self, lines):
                for line in lines:
                    self.write(line)

        def open_(path, mode="r", **settings):
            if mode == "r":
                return open(path, **settings)
            return File(open(path, mode + "b"))
        monkeypatch.setattr(runlog, "open", open_, raising=False)


def test_a_full_disk_stops_no_training(tmp_path, monkeypatch):
    disk = FullDisk(monkeypatch)
    log, said = quiet_log(tmp_path, 8, log_every=2)
    for step in range(1, 9):
        disk.full = step in (3, 4, 5)
        log.log_step(row(step), clips=1, seconds=1)
        log.log_event("noted", number=step)
    log.close()
    assert [line.split(":")[0] for line in said if line.startswith("step")] == [
        f"step {n}/8" for n in (2, 4, 6, 8)]
    lost = [line for line in said if not line.startswith("step")]
    assert [line.split(" cannot")[0] for line in lost] == [
        str(tmp_path / name) for name in ("log.jsonl", "events.jsonl")]        # once each
    assert "No space left on device" in lost[0] and "\n" not in lost[0]
    # tried again with each printed line, and then without the torn row
    assert [r["step"] for r in lines_of(tmp_path / "log.jsonl")] == [1, 2, 6, 7, 8]
    assert [r["number"] for r in lines_of(tmp_path / "events.jsonl")] == [1, 2, 6, 7, 8]
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_at_the_start(tmp_path, monkeypatch):
    before = "".join(json.dumps(row(step)) + "\n" for step in range(1, 6))
    (tmp_path / "log.jsonl").write_text(before)
    disk = FullDisk(monkeypatch)
    disk.full = True
    log, said = quiet_log(tmp_path, 8, first_step=3, log_every=2)
    log.log_step(row(4))
    assert (tmp_path / "log.jsonl").read_text() == before and log.last["step"] == 4
    assert not list(tmp_path.glob(".*"))                    # what there is of it takes no room
    disk.full = False
    log.log_step(row(5))                                           # no printed line: not tried
    log.log_step(row(6))
    assert [r["step"] for r in lines_of(tmp_path / "log.jsonl")] == [1, 2, 3, 6]
    assert len([line for line in said if "log.jsonl cannot be written" in line]) == 1


def test_a_full_disk_under_stdout(tmp_path):
    def say(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    log = RunLog(tmp_path, 1, tensorboard=False, log=say)
    log.log_step(row(1))
    assert len(lines_of(tmp_path / "log.jsonl")) == 1


# ---------------------------------------------------------------- back ends
def fake_package(name, text, tmp_path, monkeypatch):
    """A package of one file that is found before a real one."""
    place = tmp_path / f"with_{name}"
    place.mkdir()
    (place / f"{name}.py").write_text(text)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(place)


@pytest.fixture
def no_package(monkeypatch):
    real = runlog.importlib.util.find_spec
    monkeypatch.setattr(runlog.importlib.util, "find_spec", lambda name: None if name in (
        "tensorboard", "wandb") else real(name))


class FakeWriter:
    """SummaryWriter; fails at step `breaks`."""
    breaks = None

    def __init__(self, folder, **settings):
        self.settings, self.points, self.closed = (folder, settings), [], False
        FakeWriter.latest = self

    def add_scalar(self, name, value, step):
        if step == self.breaks:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.points.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def fake_tensorboard(tmp_path, monkeypatch):
    fake_package("tensorboard", "", tmp_path, monkeypatch)
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = type("Writer", (FakeWriter,), {})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return module.SummaryWriter


def test_tensorboard_gets_all_numbers(tmp_path, fake_tensorboard):
    log, said = quiet_log(tmp_path, 12, first_step=10, tensorboard=True)
    writer = FakeWriter.latest
    assert writer.settings == (str(tmp_path / "tensorboard"), {"purge_step": 11, "flush_secs": 30})
    log.log_step(row(11, task_ce={"asr": 0.5}, grad_norm=float("nan"), note="text"), clips=3,
                 seconds=1)
    points = {name: (value, step) for name, value, step in writer.points}
    assert points["ce"] == (0.5 / 11, 11) and points["task/asr"] == (0.5, 11)
    assert points["clips_per_s"] == (3, 11)
    assert {*points} == {"loss", "ce", "task/asr", "clips_per_s", "tokens_per_s", "memory_gib",
                         "wait_share", "eta_s"}
    log.log_event("validation", val_ce=0.25, tasks={"asr": 0.75}, path="best")
    assert writer.points[-2:] == [("validation/val_ce", 0.25, 11),
                                  ("validation/tasks/asr", 0.75, 11)]
    log.close()
    assert writer.closed and said == []


def test_a_tensorboard_that_fails_is_switched_off(tmp_path, fake_tensorboard):
    fake_tensorboard.breaks = 2
    log, said = quiet_log(tmp_path, 4, log_every=9, tensorboard=True)
    for step in (1, 2, 3):
        log.log_step(row(step))
    log.close()
    assert said == ["TensorBoard failed (OSError: [Errno 28] No space left on device); it is "
                    "switched off, the run continues"]
    assert {step for _, _, step in FakeWriter.latest.points} == {1}
    assert len(lines_of(tmp_path / "log.jsonl")) == 3


def test_a_tensorboard_that_cannot_start(tmp_path, fake_tensorboard, monkeypatch):
    def broken(*_, **__):
        raise TypeError("Descriptors cannot be created\ndirectly")        # protobuf's favourite
    monkeypatch.setattr(sys.modules["torch.utils.tensorboard"], "SummaryWriter", broken)
    log, said = quiet_log(tmp_path, 4, tensorboard=True)
    log.log_step(row(1))
    assert said == ["TensorBoard failed (TypeError: Descriptors cannot be created directly); it is "
                    "switched off, the run continues"]


def test_without_tensorboard_one_line(tmp_path, no_package):
    log, said = quiet_log(tmp_path, 4, log_every=9, tensorboard=True)
    log.log_step(row(1))
    assert said == ["TensorBoard is not installed: pip install tensorboard"]
    assert not (tmp_path / "tensorboard").exists()


def test_a_real_tensorboard(tmp_path):
    """Written, killed, gone on from step 2: what TensorBoard shows is each step once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log, said = quiet_log(tmp_path, 4, log_every=9, tensorboard=True)
    for step in (1, 2, 3):
        log.log_step(row(step, task_ce={"asr": 10.0 * step}))
    log.close()
    log, _ = quiet_log(tmp_path, 4, log_every=9, tensorboard=True, first_step=2)
    for step in (3, 4):
        log.log_step(row(step, task_ce={"asr": 100.0 * step}))
    log.close()
    assert said == []
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("task/asr")] == [
        (1, 10), (2, 20), (3, 300), (4, 400)]
    assert [e.value for e in shown.Scalars("ce")] == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125])


WANDB = """
runs, breaks = [], ""
class Run:
    def __init__(self, settings):
        self.settings, self.logged, self.metrics, self.finished = settings, [], [], False
    def define_metric(self, *words, **settings):
        self.metrics.append((words, settings))
    def log(self, numbers):
        if breaks == "log":
            raise ConnectionError("no network")
        self.logged.append(numbers)
    def finish(self):
        self.finished = True
def init(**settings):
    if breaks == "init":
        raise ConnectionError("no network")
    runs.append(Run(settings))
    return runs[-1]
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    fake_package("wandb", WANDB, tmp_path, monkeypatch)
    import wandb
    yield wandb
    sys.modules.pop("wandb", None)


def test_wandb_is_one_run_however_often_it_stops(tmp_path, fake_wandb):
    out = tmp_path / "run"
    for first in (0, 2, 0):
        log, said = quiet_log(out, 9, first_step=first, wandb="favor", config={"lr": 1})
        log.log_step(row(first + 1, task_ce={"asr": 2}), clips=1, seconds=1)
        log.log_event("validation", val_ce=0.5)
        log.close()
        assert said == []
    first, resumed, fresh = fake_wandb.runs
    ids = [run.settings.pop("id") for run in fake_wandb.runs]
    assert ids[0] == ids[1] != ids[2] and (out / "wandb-id").read_text() == ids[2]
    assert resumed.settings == {"project": "favor", "resume": "allow", "name": "run",
                                "dir": str(out), "config": {"lr": 1}}
    assert resumed.metrics == [(("step",), {}), (("*",), {"step_metric": "step"})]
    numbers, event = resumed.logged
    assert numbers["step"] == 3 and numbers["task/asr"] == 2 and numbers["clips_per_s"] == 1
    assert event == {"step": 3, "validation/val_ce": 0.5} and resumed.finished


@pytest.mark.parametrize("where", ["init", "log"])
def test_wandb_without_network_is_switched_off(where, tmp_path, fake_wandb):
    fake_wandb.breaks = where
    log, said = quiet_log(tmp_path, 9, wandb="favor")
    for step in (1, 2):
        log.log_step(row(step))
    log.close()
    assert said == ["wandb failed (ConnectionError: no network); it is switched off, the run "
                    "continues"]
    assert len(lines_of(tmp_path / "log.jsonl")) == 2


def test_wandb_is_only_there_when_named(tmp_path, fake_wandb):
    quiet_log(tmp_path, 9)
    assert fake_wandb.runs == [] and not (tmp_path / "wandb-id").exists()


@pytest.mark.parametrize("main_process", [True, False])
def test_wandb_that_is_not_installed(main_process, tmp_path, no_package):
    """Said by every process: none waits for one that has left."""
    with pytest.raises(ValueError, match="--wandb favor: not installed; pip install wandb"):
        quiet_log(tmp_path / "run", 9, wandb="favor", main_process=main_process)
    runlog.check_wandb("")


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """An older run's wandb/ beside train.py."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    assert not runlog.installed("wandb")
    (tmp_path / "wandb" / "__init__.py").touch()
    runlog.importlib.invalidate_caches()
    assert runlog.installed("wandb")


def test_back_ends_are_imported_late():
    code = ("import sys, runtime.log; "
            "print([m for m in ('tensorboard', 'wandb') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------- where and what is run
def git(folder, *words):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words],
                   check=True, capture_output=True)


def test_git_facts(tmp_path):
    (tmp_path / "file").write_text("a")
    git(tmp_path, "init")
    assert runlog.git_facts(tmp_path)["commit"] == "not a git checkout"     # nothing tracked yet
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "a")
    clean = runlog.git_facts(tmp_path)
    assert runlog.re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["dirty"] is False
    (tmp_path / "runs").write_text("untracked: no change of the code")
    assert runlog.git_facts(tmp_path) == clean
    (tmp_path / "file").write_text("b")
    assert runlog.git_facts(tmp_path) == clean | {"dirty": True}
    installed = tmp_path / ".venv" / "site-packages"            # in that project, but not of it
    installed.mkdir(parents=True)
    (installed / "log.py").touch()
    assert runlog.git_facts(installed) == {"commit": "not a git checkout", "dirty": None}


@pytest.mark.parametrize("why", ["no checkout", "no git", "slow"])
def test_git_facts_never_fail(why, tmp_path, monkeypatch):
    if why == "no git":
        monkeypatch.setenv("PATH", str(tmp_path))
    if why == "slow":
        def late(*words, **settings):
            raise subprocess.TimeoutExpired(words, settings["timeout"])
        monkeypatch.setattr(runlog.subprocess, "run", late)
    folder = tmp_path if why == "no checkout" else ROOT
    assert runlog.git_facts(folder) == {"commit": "not a git checkout", "dirty": None}


def test_environment(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    facts = runlog.environment()
    assert json.loads(json.dumps(facts)) == facts and "secret" not in json.dumps(facts)
    assert facts["packages"]["torch"] == torch.__version__ and facts["packages"]["av"]
    assert facts["world"] == 1 and facts["variables"]["SLURM_JOB_ID"] == "77"
    assert facts["ram_gib"] > 0 and facts["cores"] > 0 and facts["cpu"] and facts["hostname"]
    assert len(facts["gpus"]) == torch.cuda.device_count() and "dirty" in facts


def test_run_facts(tmp_path, monkeypatch):
    machine = {"hostname": "a", "commit": "c" * 40, "dirty": False, "world": 8}
    monkeypatch.setattr(runlog, "environment", lambda: machine)
    out = tmp_path / "run"
    facts = runlog.write_run_facts(
        out, {"train": {"lr": 1}, "method": {"fps": 2.0}}, ["--out", "a run"])
    assert facts == {"train": {"lr": 1}, "method": {"fps": 2.0}, "commit": "c" * 40,
                     "dirty": False, "command": "train.py --out 'a run'"}
    assert json.loads((out / "config.json").read_text()) == facts
    assert json.loads((out / "environment.json").read_text()) == machine
    monkeypatch.setattr(runlog, "environment", lambda: machine | {"hostname": "b"})
    now = runlog.write_run_facts(out, {"train": {"lr": 1}}, ["--threads", "2"], first_step=40)
    assert now["command"] == "train.py --threads 2"
    assert json.loads((out / "config.json").read_text()) == facts          # the first start's
    assert json.loads((out / "environment.json").read_text()) == machine
    first, second = (out / "commands.log").read_text().splitlines()
    assert first.endswith(" from step 0: train.py --out 'a run'")
    assert second.endswith(' from step 40: train.py --threads 2  # now {"hostname": "b"}')
    assert runlog.re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} from", second)
    runlog.write_run_facts(out, {"train": {"lr": 2}}, [])       # begun again: its own config
    assert json.loads((out / "config.json").read_text())["train"] == {"lr": 2}
    assert len((out / "commands.log").read_text().splitlines()) == 3


# ---------------------------------------------------------------- words and pictures
def test_draw_curve():
    rows = [{"step": step, "ce": 10 ** (2 - step / 50)} for step in range(1, 101)]
    curve = runlog.draw_curve(rows, height=4, width=10).splitlines()
    stars = [[i for i, line in enumerate(curve[:4]) if line[9 + x] == "*"] for x in range(10)]
    assert stars == [[0], [0], [1], [1], [1], [2], [2], [2], [3], [3]]     # log scale: a line down
    cells = [sum(r["ce"] for r in rows[i:i + 10]) / 10 for i in (0, 90)]     # 78.3 and 1.2
    assert [float(curve[i].split("|")[0]) for i in (0, 3)] == pytest.approx(cells, abs=1e-3)
    assert curve[4] == "        +----------  cross-entropy, steps 1-100"


def test_draw_curve_of_odd_rows():
    rows = [{"step": 1, "ce": 1.0}, {"step": 2, "ce": None}, {"step": 3}, {"step": 4, "ce": 0.0},
            {"step": 5, "ce": float("nan")}]
    curve = runlog.draw_curve(rows)
    assert curve.count("*") == 2 and "steps 1-4" in curve       # a loss of 0 has its place
    assert runlog.draw_curve([]) == runlog.draw_curve(rows[1:3]) == "no steps"


def test_log_answers():
    said = []
    runlog.log_answers([("asr", "What is\nsaid?", "a " * 50, "b"),
                         ("vqa", "Which?", "", ["red", "a red one"])], said.append)
    assert said == [f"  asr: What is said? -> {('a ' * 50)[:59]}… | wanted: b",
                    "  vqa: Which? -> (nothing) | wanted: red / a red one"]
