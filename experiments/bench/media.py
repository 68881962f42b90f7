"""The targets 8 and 9 about files: the 2-fps picture reader, and the reader of 16 kHz sound.

     moving noise, 720p, GOP 250, 3 B-frames, AAC 48 kHz stereo --PyAV--> clip.mp4
       --media.read_frames--> (F,3,224,224), times     against ffmpeg that only decodes
       --data.read_audio--> (S,)                      against ffmpeg -ac 1 -ar 16000
The baseline is ffmpeg's command line on one thread, as a loader worker has one. Where ffmpeg is
missing, it is a plain PyAV loop, which the lines mention.  torchcodec and decord are measured, too,
where Python finds them.

Public: pictures, sound, write_clip."""

import bisect
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from experiments.bench.measure import (
    Line,
    Run,
    check,
    check_equal,
    compare,
    interleaved,
    line_of,
    threads,
)
from runtime import cli
from runtime.media import AUDIO_RATE, TICK, read_audio, read_frames
from vit_qformer import resize

GOP = 250
FPS = Fraction(30000, 1001)
KINDS = [(codec, gop, bframes) for codec in ("libx264", "libx265") for gop in (12, 250)
         for bframes in (3, 0)]


# ---------------------------------------------------------------- a clip
def write_clip(path, seconds, width=1280, height=720, seed=0, codec="libx264", gop=GOP, bframes=3):
    """H.264 or HEVC at 29.97 fps, a keyframe every 250, 3 B-frames, about 3 Mb/s at 720p, and a
    stereo AAC track whose sides differ."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 40, 3), dtype=np.uint8)
    world = coarse.repeat(16, axis=0).repeat(16, axis=1)                 # blocks that move past
    noise = rng.integers(0, 8, (height + 16, width + 16, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        options = {"preset": "veryfast", "g": str(gop), "bf": str(bframes), "sc_threshold": "0",
                   "b": "3200k"}
        if codec == "libx265":
            options |= {"preset": "ultrafast", "x265-params": "log-level=none"}
        video = container.add_stream(codec, rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=48000, layout="stereo")
        for i in range(round(seconds * FPS)):
            x, y, z = 2 * i % 500, i % 16, 7 * i % 16
            frame = world[y:y + height, x:x + width] // 2 + noise[z:z + height, y:y + width]
            for packet in video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for stream, frame in [(video, None), (sound, tone(rng, seconds)), (sound, None)]:
            container.mux(stream.encode(frame))


def tone(rng, seconds):
    """48 kHz stereo: a chord on the left, another and noise on the right."""
    t = np.arange(round(48000 * seconds)) / 48000
    left, right = (0.2 * np.sin(2 * np.pi * a * t) + 0.1 * np.sin(2 * np.pi * b * t)
                   for a, b in ((440, 1234), (330, 3210)))
    right = right + 0.02 * rng.standard_normal(len(t))
    frame = av.AudioFrame.from_ndarray(np.stack([left, right]).astype(np.float32), format="fltp",
                                       layout="stereo")
    frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), 0
    return frame


@contextmanager
def clip_of(seconds, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, seconds, **options)
        yield str(path)


# ---------------------------------------------------------------- baselines
def ffmpeg(*words):
    """Runs ffmpeg on one thread -> its standard output."""
    return subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", *words],
                          check=True, capture_output=True).stdout


def plain_decoding(path, kind="video"):
    """Every frame of a stream by PyAV on one thread, nothing else -> their times (s)."""
    with av.open(path) as container:
        stream = next(s for s in container.streams if s.type == kind)
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        return [frame.time for frame in container.decode(stream)]


def decoder(path):
    """(a function that only decodes the pictures, its name)."""
    if shutil.which("ffmpeg"):
        return (lambda: ffmpeg("-i", path, "-an", "-vsync", "passthrough", "-f", "null", "-"),
                "ffmpeg -f null")
    return lambda: plain_decoding(path), "PyAV decoding (no ffmpeg on PATH)"


def seek_each(path, moments):
    """A seek for each moment (s), then decoding up to it -> times of the frames on screen then."""
    shown = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        for moment in moments:
            container.seek(int(moment / stream.time_base), stream=stream)
            last = None
            for frame in container.decode(stream):
                if float(frame.pts * stream.time_base) > moment + TICK and last is not None:
                    break
                last = frame
            shown.append(float(last.pts * stream.time_base))
            last.to_ndarray(format="rgb24")
    return shown


# ---------------------------------------------------------------- 8: pictures
def pictures(run: Run):
    """Target 8."""
    seconds = run.pick(test=3, quick=4, full=20)
    size = run.pick(test={"width": 128, "height": 96}, quick={})
    with clip_of(seconds, **size) as path, threads(1):
        wrong = wrong_frames(path)
        if wrong.ours:
            check_equal("frames that are not on screen at their time", wrong.ours, 0)
        decode, name = decoder(path)
        line = compare(run, f"{seconds} s of video: all frames at 2 fps", tuple,
                       lambda: read_frames(path, resize), decode, baseline_name=name,
                       wanted=run.wants("ratio <= 1.10"),
                       remark="one thread each; the baseline only decodes: it is the roofline")
        line.roofline = line.baseline
        lines = [line, wrong, pixels_of(run, path), seeking(run, path, seconds)]
        for codec, gop, bframes in run.pick(test=KINDS[:1], quick=KINDS[:2], full=KINDS):
            lines += decoded_in_part(run, seconds, codec, gop, bframes, size)
        return lines + ([fed(run, path, seconds)] if run.size in ("full", "cuda") else [])


def processor_seconds(function):
    """user + sys of one call and of the processes that it started."""
    before = sum(os.times()[:4])
    function()
    return sum(os.times()[:4]) - before


def peers(path, moments):
    """{name: function that reads the frames at the moments on one thread and resizes them} of the
    other readers that are installed here."""
    def torchcodec():
        reader = decoders.VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="exact")
        return resize(reader.get_frames_played_at(moments).data.permute(0, 2, 3, 1).contiguous())

    def decord():
        reader = decord_package.VideoReader(path, num_threads=1)
        ends = [reader.get_frame_timestamp(i)[1] for i in range(len(reader))]
        numbers = [min(bisect.bisect_right(ends, t + TICK), len(ends) - 1) for t in moments]
        return resize(torch.from_numpy(reader.get_batch(numbers).asnumpy()))

    found = {}
    with suppress(ImportError):
        from torchcodec import decoders
        found["torchcodec"] = torchcodec
    with suppress(ImportError):
        import decord as decord_package
        found["decord"] = decord
    return found


def decoded_in_part(run, seconds, codec, gop, bframes, size):
    """The reader against those that decode every frame, by processor time, in turn.  Its frames
    must be those of a plain loop over all frames, to the bit."""
    what = (f"{'H.264' if codec == 'libx264' else 'HEVC'}, a keyframe every {gop}, "
            f"{bframes} B-frames")
    wanted = run.wants("ratio <= 1.05" if not bframes else
                       "ratio <= 0.5" if gop < 100 else "ratio <= 0.65")
    with clip_of(seconds, codec=codec, gop=gop, bframes=bframes, **size) as path:
        frames, times = read_frames(path, resize)
        unequal = len(times)
        with av.open(path) as container:
            origin = min(s.start_time * s.time_base for s in container.streams)
            index = {round(t / TICK): i for i, t in enumerate(times)}
            for frame in container.decode(video=0):
                i = index.get(round(float(frame.pts * frame.time_base - origin) / TICK))
                if i is not None:
                    pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))[None]  # (1,H,W,3)
                    unequal -= times.count(times[i]) * torch.equal(resize(pixels)[0], frames[i])
        if unequal:
            check_equal(f"{what}: frames that differ from full decoding", unequal, 0)
        decode, name = decoder(path)
        sides = {"ours": lambda: read_frames(path, resize), name: decode} | peers(path, times)
        spent = {side: [] for side in sides}
        for repeat in range(-1, run.pick(test=1, quick=3, full=5)):            # -1 warms up
            for side in list(sides)[::1 if repeat % 2 else -1]:
                taken = processor_seconds(sides[side])
                if repeat >= 0:
                    spent[side].append(max(taken, 0.01))                       # the clock's tick
    return [line_of(what, spent["ours"], spent[side], baseline_name=side,
                    wanted=wanted if side != "decord" else "",
                    remark=f"processor time, {seconds} s; {len(times)} frames equal to the bit")
            for side in spent if side != "ours"]


def wrong_frames(path):
    """By the rule itself: of all frames in order of time, the last with time <= moment."""
    stamps = sorted(plain_decoding(path))
    with av.open(path) as container:
        origin = float(min(s.start_time * s.time_base for s in container.streams))
    stamps = [stamp - origin for stamp in stamps]
    _, times = read_frames(path, resize)
    wanted = [stamps[max(0, bisect.bisect_right(stamps, i / 2 + TICK) - 1)]
              for i in range(len(times))]
    wrong = sum(abs(a - b) > TICK for a, b in zip(times, wanted, strict=True))
    if len(times) < 2 * stamps[-1] - 1:
        wrong += round(2 * stamps[-1]) - len(times)
    return Line("wrong frames", "frames", wrong, wanted="ours <= 0",
                remark=f"{len(times)} moments; rule: the last with time <= moment")


def pixels_of(run, path):
    """Largest difference from PIL's bicubic, of 255, on some of the frames."""
    frames, times = read_frames(path, resize)
    try:
        from PIL import Image
    except ImportError:
        return Line("pixels against PIL bicubic", "of 255", 0,
                    remark='not compared, pillow is missing: pip install -e ".[dev]"')
    worst = 0
    with av.open(path) as container:
        origin = min(s.start_time * s.time_base for s in container.streams)
        index = {round(t / TICK): i for i, t in enumerate(times)}
        for frame in container.decode(video=0):
            i = index.get(round(float(frame.pts * frame.time_base - origin) / TICK))
            if i is None or i % run.pick(test=3, quick=4, full=2):
                continue
            small = Image.fromarray(frame.to_ndarray(format="rgb24")).resize((224, 224),
                                                                            Image.BICUBIC)
            wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1)               # (3,224,224)
            worst = max(worst, check("pixels against PIL", frames[i], wanted, 2))
    return Line("pixels against PIL bicubic", "of 255", worst, wanted="ours <= 1")


def seeking(run, path, seconds):
    """Against a seek for each moment; of these only some, and their time times that."""
    every = run.pick(test=2, quick=8, full=8)
    moments = [i / 2 for i in range(2 * seconds)]
    some = moments[every // 2::every]
    _, times = read_frames(path, resize)
    found = seek_each(path, some)
    check("frames found by seeking", torch.tensor(found),
          torch.tensor([times[moments.index(t)] for t in some]), 2 * TICK + 0.05)
    spent = interleaved(run, "seek each", tuple, {"ours": lambda: read_frames(path, resize),
                                                  "baseline": lambda: seek_each(path, some)},
                        run.pick(test=1, full=3))
    baseline = [s * len(moments) / len(some) for s in spent["baseline"]]
    return line_of(f"one pass, against a seek for each frame, GOP {GOP}", spent["ours"], baseline,
                   baseline_name="seek each", wanted=run.wants("ratio <= 0.2", "ratio <= 0.2"),
                   remark=f"{len(some)} of {len(moments)} frames sought, times "
                        f"{len(moments) / len(some):.3g}")


def fed(run, path, seconds):
    """Clip seconds per second that all cores decode side by side, process start aside."""
    workers = min(16, cli.cores())
    jobs = [path] * (4 * workers)
    start = None
    for _ in cli.parallel(partial(read_frames, resize=resize), jobs, workers, chunk=1):
        if start is None:
            start, done = time.perf_counter(), 0
            continue
        done += 1
    rate = done * seconds / (time.perf_counter() - start)
    wanted = run.wants("", "ours >= 150") if workers == 16 else ""
    return Line(f"{workers} workers", "x real time", rate, wanted=wanted)


# ---------------------------------------------------------------- 9: sound
def in_process_ffmpeg(path):
    """What `ffmpeg -ac 1 -ar 16000 -f s16le` writes, by the same libraries, where there is none on
    PATH -> bytes."""
    resampler = av.AudioResampler("s16", "mono", AUDIO_RATE)
    with av.open(path) as container:
        frames = [made for frame in container.decode(audio=0) for made in resampler.resample(frame)]
    return b"".join(made.to_ndarray().tobytes() for made in [*frames, *resampler.resample(None)])


def sound(run: Run):
    """Target 9."""
    seconds = run.pick(test=4, quick=30, full=60)
    with clip_of(seconds, width=64, height=48) as path, threads(1):
        track = read_audio(path)
        words = ("-i", path, "-vn", "-ac", "1", "-ar", str(AUDIO_RATE), "-f", "s16le", "-")
        has = shutil.which("ffmpeg") is not None
        baseline = (lambda: ffmpeg(*words)) if has else (lambda: in_process_ffmpeg(path))
        theirs = torch.from_numpy(np.frombuffer(baseline(), np.int16) / 32768.0).float()
        n = min(len(track), len(theirs))
        if abs(len(track) - len(theirs)) > 0.1 * AUDIO_RATE:
            check_equal("audio samples", len(track), len(theirs))
        far = check("audio against ffmpeg", track[:n], theirs[:n], 1e-4)
        remark = f"difference {far:.0e}, allowed 1e-4; lengths {len(track)}, {len(theirs)}"
        name = "ffmpeg -ac 1 -ar 16000" if has else "its libraries in PyAV (no ffmpeg on PATH)"
        spent = interleaved(run, "sound", tuple, {
            "ours": lambda: read_audio(path), "baseline": baseline,
            "roofline": lambda: plain_decoding(path, "audio")})
    line = line_of(f"{seconds} s of 48 kHz stereo AAC", spent["ours"], spent["baseline"],
                   baseline_name=name, remark=remark)
    line.roofline = line_of("", spent["roofline"], spent["roofline"]).ours
    rate = Line("a core", "x real time", seconds / line.ours * 1e3,
                roofline=seconds / line.roofline * 1e3,
                wanted=run.wants("ours >= 500", "ours >= 500"),
                remark="roofline: decoding alone")
    return [line, rate]
