"""media.py against files encoded here: every frame carries its own number, every sound a click."""

import struct
import warnings
from collections import Counter
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest
import torch
from media_files import (
    H,
    W,
    click_track,
    encode,
    numbered,
    numbers,
    on_screen,
    onset,
    sound_frames,
)

from data import Record, clip_from_path, load_clip, write_manifest
from runtime import media
from runtime.media import (
    MediaError,
    probe,
    read_audio,
    read_image,
    write_png,
    write_video,
    write_wav,
)
from vit_qformer import resize


def read_frames(path, size=224, **options):
    return media.read_frames(path, partial(resize, size=size), **options)


# ---------------------------------------- frame times

@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), Fraction(24000, 1001), 12, 60])
def test_frame_times_constant_rate(tmp_path, rate):
    count, base = 65, 1 / Fraction(rate)
    path = encode(tmp_path / "a.mp4", range(count), base)           # three B-frames, one keyframe
    frames, times = read_frames(path)
    targets = np.arange(0, count * float(base) - 1e-6, 0.5)
    expected = on_screen([float(n * base) for n in range(count)], targets)
    assert frames.dtype == torch.uint8 and frames.shape == (len(targets), 3, 224, 224)
    assert numbers(frames) == expected
    assert times == pytest.approx([float(n * base) for n in expected], abs=1e-6)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frame_times_variable_rate(tmp_path, suffix):
    steps = np.random.default_rng(0).choice([0.02, 0.04, 0.3, 0.9], 40)
    seconds = np.concatenate([[0], np.cumsum(steps)])
    path = encode(tmp_path / f"a.{suffix}", np.round(seconds * 90000).astype(int), gop=12)
    for fps in (1.0, 2.0, 7.0):
        frames, times = read_frames(path, fps=fps, size=64)
        targets = np.arange(len(frames)) / fps
        assert numbers(frames) == on_screen(seconds, targets)
        assert abs(len(frames) / fps - seconds[-1]) < 0.5 + 1 / fps
        assert all(t <= target + 1e-3 for t, target in zip(times, targets, strict=True))


@pytest.mark.parametrize("suffix, offset", [("ts", 0), ("ts", 100), ("mp4", 5), ("mkv", 5)])
def test_time_zero_is_the_first_frame(tmp_path, suffix, offset):
    path = encode(tmp_path / f"a.{suffix}", np.arange(50) * 3600 + offset * 90000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, times = read_frames(path, size=64)
    assert probe(path).seconds == pytest.approx(2, abs=0.05)
    assert numbers(frames) == [0, 12, 25, 37] and times == pytest.approx([0, 0.48, 1.0, 1.48])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("video_start, audio_start", [(0.6, 0.0), (0.0, 0.6)])
def test_late_stream_stays_synchronous(tmp_path, suffix, video_start, audio_start):
    path = encode(tmp_path / f"a.{suffix}", np.arange(50) * 3600 + round(video_start * 90000),
                  audio=click_track(2, 1.0), audio_start=audio_start)
    frames, _ = read_frames(path, size=64)
    clock = [video_start + n / 25 for n in range(50)]
    if suffix == "ts":                  # no edit list there: 64 ms of AAC priming are presented
        clock = [t + (0.064 if video_start == 0.6 else 0) for t in clock]
    assert numbers(frames) == on_screen(clock, np.arange(len(frames)) / 2)
    priming = 0.064 if suffix == "ts" and audio_start == 0 else 0
    assert abs(onset(read_audio(path)) / 16000 - (1.0 + audio_start + priming)) <= 0.01


def test_rotation(tmp_path):
    """A phone's display matrix: the picture comes out as ffmpeg and every player turn it."""
    path = tmp_path / "a.mp4"
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:16] = 255                                               # white on top
    write_video(path, np.repeat(np.rot90(upright)[None], 5, 0), 25)  # lies on its left side
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)
    content = path.read_bytes()
    tkhd = content.index(b"tkhd")
    at = content.index(identity, tkhd)
    path.write_bytes(content[:at] + clockwise + content[at + 36:])
    frame = read_frames(path, size=48)[0][0, 1].float()
    assert frame[:12].mean() > 240 and frame[20:].mean() < 15


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("gop", [25, 1000])
def test_window_equals_slice_of_full_read(tmp_path, suffix, gop):
    path = encode(tmp_path / f"a.{suffix}", range(600), Fraction(1, 25), gop=gop)
    frames, times = read_frames(path, size=32)
    for start, end in [(0, 3), (4.5, 7.0), (17.5, 21.0), (22, None)]:
        part, part_times = read_frames(path, size=32, start=start, end=end)
        window = slice(int(start * 2), None if end is None else int(end * 2))
        assert torch.equal(part, frames[window]) and part_times == times[window]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_window_of_slow_video_with_reordering(tmp_path, suffix):
    """A frame each 3 s, three B-frames: a keyframe is stored 9 s early, so that seeks land late."""
    path = encode(tmp_path / f"a.{suffix}", np.arange(60) * 3, Fraction(1), gop=6)
    full = numbers(read_frames(path, size=64)[0])
    for start in range(5, 170, 11):
        part, _ = read_frames(path, size=64, start=start, end=start + 4)
        assert numbers(part) == full[2 * start:2 * start + 8], start


def test_raw_stream_without_time_stamps(tmp_path):
    path = encode(tmp_path / "a.h264", range(150), Fraction(1, 25), bframes=0, format="h264")
    assert probe(path).seconds == pytest.approx(6.0)
    assert numbers(read_frames(path)[0]) == on_screen(np.arange(150) / 25, np.arange(12) / 2)
    assert numbers(read_frames(path, start=5)[0]) == [125, 137]


def test_edit_list_hides_the_beginning(tmp_path):
    """`ffmpeg -ss 0.8 -c copy` keeps the earlier frames in the file but hides them."""
    encode(tmp_path / "a.mp4", range(50), Fraction(1, 25), gop=50)
    with av.open(str(tmp_path / "a.mp4")) as source, \
            av.open(str(tmp_path / "b.mp4"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts = (t - 20 * 512 for t in (packet.pts, packet.dts))
                packet.stream = stream
                copy.mux(packet)
    frames, _ = read_frames(tmp_path / "b.mp4")
    assert numbers(frames) == [20, 32, 45]


def test_ends_rule(tmp_path):
    """First and last frame of each second; the last 0.4 s are moved back to a full second.
    The frames come in the order of their times."""
    path = encode(tmp_path / "a.mp4", range(60), Fraction(1, 25))
    frames, times = read_frames(path, frame_times="ends")
    assert numbers(frames) == [0, 24, 25, 35, 49, 59]
    assert times == pytest.approx([0, 0.96, 1.0, 1.4, 1.96, 2.36])
    short = encode(tmp_path / "b.mp4", range(10), Fraction(1, 25))
    assert numbers(read_frames(short, frame_times="ends")[0]) == [0, 9]
    assert numbers(read_frames(path, frame_times="ends", start=1)[0]) == [25, 35, 49, 59]
    with pytest.raises(ValueError, match="regular, ends"):
        read_frames(path, frame_times="first")


def test_frame_shown_twice_is_converted_once(tmp_path):
    path, calls = encode(tmp_path / "a.mp4", range(5), Fraction(2)), []
    frames, times = media.read_frames(               # a frame each 2 s, the last one short
        path, lambda x: calls.append(1) or torch.zeros(1, 3, 224, 224))
    assert len(frames) == 17 and len(set(times)) == len(calls) == 5


def test_one_frame_video(tmp_path):
    path = encode(tmp_path / "a.mp4", range(5, 6), Fraction(1, 25))
    assert probe(path).kind == "video" and numbers(read_frames(path)[0]) == [0]
    assert clip_from_path(path).frames.shape == (1, 3, 224, 224)


# ---------------------------------------- sound

SOUND = [("wav", "pcm_s16le", 16000), ("wav", "pcm_s16le", 44100), ("flac", "flac", 48000),
         ("flac", "flac", 22050), ("m4a", "aac", 44100), ("mp4", "aac", 16000),
         ("mkv", "flac", 8000), ("mp3", "libmp3lame", 44100), ("webm", "libopus", 48000),
         ("ogg", "libopus", 48000)]


@pytest.mark.parametrize("suffix, codec, rate", SOUND)
def test_click_position_and_length(tmp_path, suffix, codec, rate):
    sound = click_track(4, 2.5, rate)
    path = encode(tmp_path / f"a.{suffix}", [], audio=sound, rate=rate, audio_codec=codec)
    audio = read_audio(path)
    assert audio.dtype == torch.float32 and abs(onset(audio) - 40000) <= 160
    assert audio.abs().max() == pytest.approx(0.8, abs=0.25)
    padded = codec in ("aac", "libmp3lame")           # their last block is padded
    assert -160 <= len(audio) - 64000 <= (1200 if padded else 160)
    assert probe(path).kind == "audio" and probe(path).seconds == pytest.approx(4, abs=0.08)


@pytest.mark.parametrize("suffix, codec, rate", SOUND)
def test_sound_window_equals_slice(tmp_path, suffix, codec, rate):
    noise = np.random.default_rng(1).normal(0, 0.1, 9 * rate).astype(np.float32)
    full = read_audio(encode(tmp_path / f"a.{suffix}", [], audio=noise, rate=rate,
                             audio_codec=codec))
    for start, end in [(0, 2), (3.3, 4.0), (6.12345, 8.5), (7.0, None)]:
        part, first = read_audio(tmp_path / f"a.{suffix}", start, end), round(start * 16000)
        wanted = full[first:None if end is None else round(end * 16000)]
        # Matroska stamps whole milliseconds: Opus there may sit up to 1 ms = 16 samples off.
        slack = 16 if suffix == "webm" else 0
        assert abs(len(part) - len(wanted)) <= slack
        n = min(len(part), len(wanted)) - 2 * slack
        errors = [(part[slack:slack + n] - wanted[slack + shift:slack + shift + n]).abs().max()
                  for shift in range(-slack, slack + 1)]
        assert min(errors) <= (0.02 if slack else 1e-3), (start, end)


def test_stereo_mix(tmp_path):
    """Mono is the mean of the channels: the float mixer of FFmpeg would give 1.41 times that."""
    tone = 0.5 * np.sin(np.arange(32000) * 2 * np.pi * 440 / 16000).astype(np.float32)
    for codec in ("pcm_s16le", "flac", "pcm_f32le"):
        both = encode(tmp_path / "b.mkv", [], audio=np.stack([tone, tone]), layout="stereo",
                      audio_codec=codec)
        assert (read_audio(both) - torch.from_numpy(tone)).abs().max() < 1e-4
        left = encode(tmp_path / "l.mkv", [], audio=np.stack([tone, 0 * tone]), layout="stereo",
                      audio_codec=codec)
        assert (read_audio(left) - torch.from_numpy(tone) / 2).abs().max() < 1e-4


def test_gap_in_the_sound_is_silence(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("flac", rate=16000, layout="mono")
        tone = np.full((1, 16000), 0.5, np.float32)
        frames = [*sound_frames(tone, 16000, "mono", 0.0), *sound_frames(tone, 16000, "mono", 3.0)]
        for frame in [*frames, None]:
            container.mux(stream.encode(frame))
    loud = (read_audio(tmp_path / "a.mp4").abs() > 0.25).nonzero().flatten()
    assert abs(len(loud) - 32000) < 160 and abs(int(loud[-1]) - 64000) <= 160
    assert not ((loud > 16160) & (loud < 47840)).any()


def test_rounded_time_stamps_leave_no_clicks(tmp_path):
    """Matroska stamps 1024/44100 s = 23.22 ms as 23 or 24: a tone must come out without a seam."""
    tone = 0.5 * np.sin(np.arange(3 * 44100) * 2 * np.pi * 440 / 44100).astype(np.float32)
    for name in ("a.mkv", "a.mp4"):
        encode(tmp_path / name, [], audio=tone, rate=44100)
    audio = read_audio(tmp_path / "a.mkv")[1600:46400]
    assert audio.diff().abs().max() < 1.1 * 0.5 * 2 * np.pi * 440 / 16000
    assert (audio - read_audio(tmp_path / "a.mp4")[1600:46400]).abs().max() < 0.1      # < 1 ms off


def test_loud_sound_stays_within_one(tmp_path):
    square = np.sign(np.random.default_rng(0).normal(size=44100)).astype(np.float32)
    path = encode(tmp_path / "a.wav", [], audio=square, rate=44100, audio_codec="pcm_s16le")
    assert read_audio(path).abs().max() == 1               # resampling alone overshoots by half


def test_wav_round_trip(tmp_path):
    audio = torch.rand(5000) * 2 - 1
    write_wav(tmp_path / "a.wav", audio)
    assert (read_audio(tmp_path / "a.wav") - audio).abs().max() <= 0.51 / 32768
    write_wav(tmp_path / "loud.wav", audio * 3)
    assert read_audio(tmp_path / "loud.wav").abs().max() <= 1


# ---------------------------------------- images

@pytest.mark.parametrize("suffix, codec, pixels", [
    *(("png", "png", p) for p in ("rgb24", "gray", "gray16be", "rgba", "rgb48be", "ya8")),
    ("jpg", "mjpeg", "yuvj420p"), ("bmp", "bmp", "bgr24"), ("tiff", "tiff", "rgb24"),
    ("gif", "gif", "rgb8"), ("webp", "libwebp", "yuv420p")])
def test_image_types(tmp_path, suffix, codec, pixels):
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = W, H, pixels
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(numbered(421), format="rgb24").reformat(format=pixels)
    path = tmp_path / f"a.{suffix}"
    if suffix == "gif":                                    # the one type with a container
        with av.open(str(path), "w") as container:
            stream = container.add_stream("gif", rate=10)
            stream.width, stream.height, stream.pix_fmt = W, H, pixels
            container.mux([*stream.encode(frame), *stream.encode(None)])
    else:
        packets = encoder.encode(frame) + encoder.encode(None)
        path.write_bytes(b"".join(bytes(packet) for packet in packets))
    clip = clip_from_path(path)
    assert probe(path).kind == "image" and clip.is_image
    assert clip.audio is None and clip.seconds == 0
    assert clip.frames.shape == (1, 3, 224, 224) and numbers(clip.frames) == [421]
    assert (clip.frames[0, 0].int() - clip.frames[0, 2]).abs().max() <= 48         # grey


def test_image_as_pil_reads_it(tmp_path):
    image = pytest.importorskip("PIL.Image")
    ops = pytest.importorskip("PIL.ImageOps")
    colours = np.random.default_rng(0).integers(0, 255, (6, 9, 3), np.uint8)
    picture = image.fromarray(colours).resize((300, 200), image.Resampling.BICUBIC)
    names = {"plain.jpg": picture, "cmyk.jpg": picture.convert("CMYK"),
             "palette.png": picture.quantize(64)}
    for name, converted in names.items():
        converted.save(tmp_path / name, quality=92)
    for turn in (3, 6, 8):
        tag = image.Exif()
        tag[274] = turn                                    # the camera was held sideways
        picture.save(tmp_path / (name := f"exif{turn}.jpg"), exif=tag, quality=92)
        names[name] = picture
    for name in names:
        wanted = ops.exif_transpose(image.open(tmp_path / name)).convert("RGB")
        wanted = np.asarray(wanted.resize((224, 224), image.Resampling.BICUBIC), np.int16)
        got = read_image(tmp_path / name, resize)[0].permute(1, 2, 0).numpy()
        assert np.abs(got - wanted).mean() < (1.5 if name == "cmyk.jpg" else 0.3), name


def test_png_round_trip_and_odd_names(tmp_path, monkeypatch):
    """Names that FFmpeg would take for a number pattern, a protocol or another type."""
    monkeypatch.chdir(tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
    for name in ("a%03d.png", "concat:a.png", "png with no suffix", "wrong.mp4"):
        write_png(name, picture)
        assert np.array_equal(read_image(name, resize)[0].permute(1, 2, 0).numpy(), picture)


def test_cover_art_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.mp3"), "w") as container:
        sound = container.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = W, H, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(numbered(3), format="rgb24")))
        for frame in [*sound_frames(click_track(2, 1, 44100)[None], 44100, "mono", 0.0), None]:
            container.mux(sound.encode(frame))
    clip = clip_from_path(tmp_path / "song.mp3")
    assert clip.frames is None and abs(onset(clip.audio) - 16000) <= 160
    with pytest.raises(MediaError, match="no video stream, it holds audio"):
        read_frames(tmp_path / "song.mp3")


# ---------------------------------------- hard cases

def test_cut_off_file_gives_what_is_there(tmp_path):
    path = encode(tmp_path / "a.mp4", range(500), Fraction(1, 25), gop=25, bframes=0, options={
        "movflags": "faststart"}, audio=np.random.default_rng(0).normal(0, 0.1, 320000))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) * 6 // 10])
    with pytest.warns(UserWarning, match="a.mp4.*decodes up to"):
        frames, times = read_frames(path, size=64)
    assert 10 < len(frames) < 36
    assert numbers(frames) == on_screen(np.arange(500) / 25, np.arange(len(frames)) / 2)
    with pytest.warns(UserWarning, match="a.mp4.*decodes up to"):
        assert 6 < len(read_audio(path)) / 16000 < 18
    with warnings.catch_warnings():                        # what was not asked for is not missed
        warnings.simplefilter("error")
        assert len(read_frames(path, end=3)[0]) == 6
    with pytest.warns(UserWarning), pytest.raises(MediaError, match="beyond its end"):
        read_frames(path, start=19)


def test_three_hours_cost_no_more_than_the_window(tmp_path, monkeypatch):
    """A 5 s window 10 minutes before the end decodes seconds, not hours, and converts 10 frames."""
    hours = 3 * 3600
    path = encode(tmp_path / "long.mkv", np.arange(hours // 4) * 4, Fraction(1), bframes=0, gop=20)
    sound = tmp_path / "long.mp4"
    with av.open(str(sound), "w") as container:            # one packet of silence, again and again
        stream = container.add_stream("aac", rate=8000, layout="mono")
        packets = []
        for frame in sound_frames(np.zeros((1, 8000), np.float32), 8000, "mono", 0):
            packets += stream.encode(frame)
        silence = bytes(packets[-1])
        for i in range(hours * 8000 // 1024):
            packet = av.Packet(silence)
            packet.stream, packet.time_base = stream, Fraction(1, 8000)
            packet.pts = packet.dts = i * 1024
            packet.duration = 1024
            container.mux(packet)
    counts, decode = Counter(), media._timed_frames

    def counted(container, stream, path, clock):
        for item in decode(container, stream, path, clock):
            counts[stream.type] += 1
            yield item
    monkeypatch.setattr(media, "_timed_frames", counted)
    start = hours - 600.0
    frames, times = read_frames(path, size=32, start=start, end=start + 5)
    assert len(frames) == 10 and set(times) == {start, start + 4}
    assert counts["video"] < 60                            # of 2700
    assert len(read_audio(sound, start, start + 5)) == 80000
    assert counts["audio"] < 100                           # of 84375
    clip = load_clip(Record("1", "vqa", "What?", video=str(path), audio=str(sound), start=start),
                     max_seconds=5)
    assert len(clip.frames) == 10 and len(clip.audio) == 80000


def test_writing_is_atomic(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with pytest.raises(ValueError, match="even H and W"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 31, 32, 3), np.uint8), 25)
    with pytest.raises(ValueError):
        write_manifest(tmp_path / "a.mp4", [Record("1", "vqa", "What?")] * 2)
    assert (tmp_path / "a.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
