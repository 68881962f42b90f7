"""tools/live.py: the answer at time t is that to the clip cut at t, whatever the clip and the
settings, and what has not changed is not computed again; the clip cut at t is what the reader of
files gives; the clock."""

import dataclasses
import math
import re
import time
import warnings
from functools import partial

import pytest
import torch

import demo
import lora
from data import Clip, clip_from_path
from favor import OFFICIAL, Favor, audio_steps_per_frame, preset
from miniature import generate
from runtime.checkpoint import COMMITTED
from runtime.media import write_png, write_video, write_wav
from tools import live
from tools.live import Live, in_time, seen, window_ends

SCENES = ("concert", "lips", "parade", "lamps", "concert", "parade")      # with sound and without


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Records of six clips of the miniature; real files."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "test").mkdir()
    jobs = [(folder, "test", scene, n // 4, 0) for n, scene in enumerate(SCENES)]
    for job in jobs:
        generate.make_clip(job)
    return [generate.records_of(job)[0] for job in jobs]


@pytest.fixture(scope="module")
def trained():
    model = Favor.from_pretrained(COMMITTED)
    lora.merge(model, reversible=False)
    return model


@pytest.fixture(scope="module")
def untrained(small_parts):
    torch.manual_seed(1)
    parts = {"whisper": "whisper", "llm": "llama", "visual": "instructblip"}
    model = Favor.from_config(preset("tiny", max_new_tokens=3, **{
        name: str(small_parts / part) for name, part in parts.items()})).eval()
    model.llm.lm_head.weight.data *= 50            # sure of what it says
    return model, model.config, model.llm.config


@pytest.fixture
def build(untrained):
    """build(**settings that change no weight) -> an untrained Favor.  Windows of 2.5 s, chunks of
    sound of 5 s."""
    model, config, llm = untrained

    def build(**changes):
        model.config = model.qformer.config = dataclasses.replace(config, **changes)
        model.audio_steps = audio_steps_per_frame(20, model.config.fps)
        model.llm.config, model.llm.compiled = llm, False
        return model
    return build


def made(frames=0, seconds=0.0, image=False, fps=2.0):
    """A clip of noise."""
    return Clip(torch.randint(0, 256, (frames, 3, 64, 64), dtype=torch.uint8) if frames else None,
                0.1 * torch.randn(round(seconds * 16000)) if seconds else None, image, fps)


class Spy:
    """What a model's LLM gives while an answer is generated, and what its parts are given."""

    def __init__(self, model):
        self.model, self.logits, self.positions, self.frames, self.chunks = model, [], [], 0, 0

    def __enter__(self):
        def read(part, args, kwargs, out):
            embeds = kwargs.get("embeds")
            self.positions.append(1 if embeds is None else embeds.shape[1])
            self.logits.append(out[0, -1])
        hooks = [self.model.llm.register_forward_hook(read, with_kwargs=True),
                 self.model.whisper.register_forward_hook(
                     lambda part, args, out: setattr(self, "chunks", self.chunks + len(out))),
                 self.model.visual.vit.register_forward_hook(
                     lambda part, args, out: setattr(self, "frames", self.frames + len(out)))]
        self.hooks = hooks
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def check(answers, clip, stream=None):
    """The live answer about this clip against that of Favor.answer: text, ids, logits.  -> the Spy
    of the live answer."""
    model, sample = answers.model, answers.sample
    with Spy(model) as ours:
        ours.text = answers.answer(clip, stream)
    with Spy(model) as theirs:
        wanted = model.answer(clip, sample.prompt, sample.history, sample.mask, num_beams=1)
    assert ours.text == wanted
    logits, others = torch.stack(ours.logits), torch.stack(theirs.logits)
    assert torch.equal(logits.argmax(-1), others.argmax(-1))
    torch.testing.assert_close(logits, others, atol=1e-4, rtol=1e-4)
    ours.others = theirs
    return ours


def parts(clip, model):
    """The clip at the end of each window: what is cut off of whole tensors."""
    return [dataclasses.replace(
        clip, frames=clip.frames if clip.frames is None or clip.is_image
        else clip.frames[:math.ceil(t * clip.fps)],
        audio=None if clip.audio is None else clip.audio[:round(t * 16000)])
        for t in window_ends(model.config, clip.seconds)]


# ---- the answer at time t ------------------------------------------------------------------------

def test_each_answer_is_that_to_the_cut_clip(trained, files):
    """Six clips of the miniature, joined in pairs of 10 s: two chunks of sound, four windows."""
    clips, said = [clip_from_path(r.video, **trained.clip_options()) for r in files], set()
    for record, first, second in zip(files[::2], clips[::2], clips[1::2], strict=True):
        whole = Clip(torch.cat([first.frames, second.frames]),
                     None if first.audio is None or second.audio is None
                     else torch.cat([first.audio, second.audio]))
        answers = Live(trained, record.prompt)
        said |= {check(answers, clip).text for clip in parts(whole, trained)}
    assert len(said) > 3                                   # they change while a clip goes on


@pytest.mark.parametrize("frames, seconds, image, changes", [
    (16, 7.87, False, {}), (16, 0, False, {}), (0, 7.87, False, {}), (6, 7.87, False, {}),
    (16, 5.2, False, {}), (1, 7.87, True, {}),
    (16, 7.87, False, {"window_frames": 3}),               # 1.5 s, of which 5 s are no multiple
    (16, 7.87, False, {"window_frames": 0}),
    (31, 7.87, False, {"window_frames": 7, "fps": 4.0}), (12, 7.87, False, {"sync": False}),
    (12, 7.87, False, {"sync": False, "window_frames": 0}),
    (16, 7.87, False, OFFICIAL), (1, 7.87, True, OFFICIAL)])
def test_it_is_for_every_kind_of_clip_and_every_setting(build, frames, seconds, image, changes):
    model = build(**changes | {"max_new_tokens": 3})
    clip = made(frames, seconds, image, model.config.fps)
    answers = Live(model, "what is seen", history=(("who is it", "a dog"),))
    for part in parts(clip, model):
        check(answers, part)


@pytest.mark.parametrize("mask", ["audio", "visual", "both"])
def test_it_is_without_a_modality(build, mask):
    answers = Live(build(), "what is seen", mask=mask)
    for part in parts(made(15, 7.5), answers.model):
        check(answers, part)


def with_positions(model, n, **rope):
    model.llm.config = dataclasses.replace(model.llm.config, max_positions=n, **rope)


def test_it_is_when_the_llm_is_full(build):
    """Favor.fit leaves out the last windows, and says so as it does for the cut clip."""
    model = build()
    answers = Live(model, "what is seen", history=(("who is it", "a dog"),))
    text = sum(map(len, model.text_ids(answers.sample, True)))
    with_positions(model, text + 2 * model.config.queries + 3)             # 3: the answer's tokens
    told = []
    for part in parts(made(25, 12.37), model):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            check(answers, part)
        told.append([str(warning.message) for warning in warned])
    assert told[:2] == [[], []]
    for n, (ours, theirs) in enumerate(told[2:], start=3):
        assert ours == theirs and f"only 10 of {min(5 * n, 25)} frames" in ours


def test_it_is_where_angles_depend_on_the_length(build):
    """RoPE of the type "dynamic": keys in a cache would keep the angles of a shorter clip."""
    model = build()
    with_positions(model, 40, rope_scaling=(("factor", 4.0), ("rope_type", "dynamic")))
    answers = Live(model, "what is seen")
    for part in parts(made(15), model):
        check(answers, part)


def test_it_is_whatever_changes(build):
    """Not only what comes later: a frame or a sound of the past, a shorter clip, another kind; and
    after an answer that was interrupted at its first word."""
    model, clip = build(), made(14, 7.0)
    answers = Live(model, "what is seen")
    frames, audio = clip.frames.clone(), clip.audio.clone()
    frames[7], audio[:800] = 255 - frames[7], 0.0
    for other in (clip, dataclasses.replace(clip, frames=frames), made(9, 4.0),
                  dataclasses.replace(clip, audio=audio), made(3), Clip(), made(0, 9.0),
                  made(1, 3.0, image=True), clip):
        check(answers, other)

    def stop(text):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        answers.answer(made(14, 7.0), stop)
    check(answers, clip)


def test_what_has_not_changed_is_not_computed_again(build):
    """Windows of 2.5 s, chunks of 5 s: the ViT sees each frame once, Whisper each finished chunk;
    the LLM keeps the windows of finished chunks, and without sound all."""
    model = build()
    text = len(model.text_ids(Live(model, "what is seen").sample, True)[1])
    Q, before = model.config.queries, len(model.text_ids(Live(model, "?").sample, True)[0])
    for clip, chunks, windows in [(made(25, 12.5), [1, 1, 1, 1, 1], [1, 2, 1, 2, 1]),
                                  (made(25), [0] * 5, [1] * 5)]:
        answers, spied = Live(model, "what is seen"), []
        for part in parts(clip, model):
            spied.append(check(answers, part))
        assert [spy.frames for spy in spied] == [5] * 5
        assert [spy.chunks for spy in spied] == chunks
        assert [spy.positions[0] for spy in spied] == [
            n * Q + text + before * (i == 0) for i, n in enumerate(windows)]
        assert [spy.others.positions[0] for spy in spied] == [
            before + (i + 1) * Q + text for i in range(5)]
        again = check(answers, clip)
        assert (again.frames, again.chunks, again.positions[0]) == (0, 0, 1)


def test_a_compiled_llm_and_beams_are_refused(build):
    model = build()
    with pytest.raises(ValueError, match="a cache of what stands before.*num_beams=1"):
        Live(model, "what").answer(made(3), num_beams=2)
    model.llm.compiled = True
    with pytest.raises(ValueError, match="compiled.*leave --compile away"):
        Live(model, "what")


# ---- the clip at time t --------------------------------------------------------------------------

def test_the_clip_so_far_is_what_the_reader_gives(files, tmp_path):
    """Of videos with and without sound, of a sound, an image with sound, from a later start, with a
    sound longer than the picture, of a picture that ends early, and by the authors' rule."""
    videos = {record.id.split("-")[1]: record.video for record in files}
    sound, image, early = tmp_path / "a.wav", tmp_path / "a.png", tmp_path / "early.mkv"
    write_wav(sound, made(seconds=7.3).audio)
    write_png(image, made(1).frames[0].permute(1, 2, 0).numpy())
    write_video(early, made(8).frames.permute(0, 2, 3, 1).numpy(), 2.0, made(seconds=10).audio)
    for path, audio, start, frame_times in [
            (videos["concert"], None, None, "regular"), (videos["parade"], None, None, "regular"),
            (videos["concert"], None, 1.3, "regular"), (sound, None, None, "regular"),
            (image, sound, 0.7, "regular"), (videos["parade"], sound, None, "regular"),
            (early, None, None, "regular"), (videos["concert"], None, 0.5, "ends")]:
        read = partial(clip_from_path, path, audio, start, size=32, frame_times=frame_times)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = read()
            for t in (0.4, 2.5, 4.6, 6.4):
                if t < whole.seconds:
                    got = seen(whole, t, read, start or 0.0, frame_times)
                    wanted = read(end=(start or 0.0) + t)
                    for ours, theirs in ((got.frames, wanted.frames), (got.audio, wanted.audio)):
                        assert (ours is None) == (theirs is None), (path, t)
                        assert ours is None or torch.equal(ours, theirs), (path, t)
                    assert got.is_image == wanted.is_image
        assert seen(whole, whole.seconds, read) is whole


def test_windows_end_where_the_model_reads_them():
    config = preset("tiny")                                                        # 2.5 s
    assert window_ends(config, 7.6) == [2.5, 5.0, 7.5, 7.6]
    assert window_ends(config, 5.0) == [2.5, 5.0] and window_ends(config, 1.0) == [1.0]
    assert window_ends(dataclasses.replace(config, window_frames=0), 12.0) == [5.0, 10.0, 12.0]
    assert window_ends(config, 0.0) == []


# ---- the clock -----------------------------------------------------------------------------------

class Clock:
    """A clock that only moves when somebody sleeps or works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds


def test_windows_come_in_time_and_the_newest_one_is_answered():
    clock, got = Clock(), []
    work = iter([0.5, 6.0, 3.0, 0.0])                # seconds
    for t, skipped, due in in_time([2.5, 5.0, 7.5, 10.0, 12.5, 13.0], clock, clock.sleep):
        got.append((t, skipped, due - 100, clock() - 100))
        clock.sleep(next(work))
    assert got == [(2.5, [], 2.5, 2.5), (5.0, [], 5.0, 5.0),             # busy until 11.0
                   (10.0, [7.5], 10.0, 11.0),                            # busy until 14.0
                   (13.0, [12.5], 13.0, 14.0)]


def test_each_window_has_its_line(build, capsys):
    """Answers of 4 s each, to windows of 2.5 s."""
    model, clip, clock = build(beams=5), made(25, 12.5), Clock()
    answers = Live(model, "what is seen")
    said = [model.answer(seen(clip, t, None), "what is seen", num_beams=1)
            for t in (2.5, 5.0, 10.0, 12.5)]
    inner = answers.answer

    def slow(clip, stream, **settings):
        clock.sleep(1.0)
        inner(clip, stream, **settings)
        clock.sleep(3.0)
    answers.answer = slow
    live.play(answers, clip, None, clock=clock, sleep=clock.sleep, max_new_tokens=3)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        f"   2.5 s  {said[0]}  [first token after 1.00 s]",
        f"   5.0 s  {said[1]}  [first token after 2.50 s]",            # it began 1.5 s late
        "[skipped, because the answer before took too long: 7.5 s]",
        f"  10.0 s  {said[2]}  [first token after 1.50 s]",
        f"  12.5 s  {said[3]}  [first token after 3.00 s]"]
    assert "live answers are greedy; this checkpoint otherwise searches 5 beams" in printed.err


def test_an_image_and_the_end_by_ctrl_c(build, capsys):
    answers = Live(build(), "what is seen")
    with pytest.raises(ValueError, match="an image without sound does not go on.*without --live"):
        live.play(answers, made(1, image=True), None)

    def stop(seconds):
        raise KeyboardInterrupt
    live.play(answers, made(3), None, sleep=stop)
    assert capsys.readouterr().out == "\n[stopped]\n"


def test_demo_live(trained, files, capsys, monkeypatch):
    """In real time, from the command line."""
    monkeypatch.setattr(demo, "load_system", lambda *_: (trained, COMMITTED))
    words = [files[0].video, files[0].prompt, "--checkpoint", str(COMMITTED)]
    began = time.monotonic()
    demo.main([*words, "--live", "--end", "0.6", "--start", "0.1"])
    assert time.monotonic() - began > 0.5
    line, = capsys.readouterr().out.splitlines()
    clip = clip_from_path(files[0].video, start=0.1, end=0.6, **trained.clip_options())
    said = re.fullmatch(r"   0\.5 s  (.*)  \[first token after \d+\.\d\d s\]", line)[1]
    assert said == trained.answer(clip, files[0].prompt)
    for wrong in (["--beams", "2"], ["--compile"]):
        with pytest.raises(SystemExit, match="neither --beams nor --compile"):
            demo.main([*words, "--live", *wrong])
    with pytest.raises(SystemExit, match="wanted a clip and a question"):
        demo.main(["--live"])
