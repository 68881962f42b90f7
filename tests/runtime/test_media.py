"""media.py against files encoded here: every frame carries its own number, every sound a click."""

import resource
import socket
import struct
import warnings
import zlib
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


def as_stored(frames):
    """A `resize` that keeps the size: uint8 (1,H,W,3) -> (1,3,H,W)."""
    return torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2)


def frame_pixels(path):
    """The first frame of a video in its own size, (H,W,3)."""
    return media.read_frames(path, as_stored)[0][0].permute(1, 2, 0).int().numpy()


def picture_pixels(path):
    return read_image(path, as_stored)[0].permute(1, 2, 0).int().numpy()


def colours(width, height, channels=3, seed=0):
    """Coloured noise with details of 3 pixels, uint8 (height,width,channels)."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 3 + 2, width // 3 + 2, channels), np.uint8)
    grown = torch.nn.functional.interpolate(
        torch.from_numpy(noise).permute(2, 0, 1)[None], (height, width), mode="bicubic")
    return np.ascontiguousarray(grown[0].permute(1, 2, 0).numpy())


def as_pil(path):
    """What PIL makes of a picture: turned, RGB, without alpha; (H,W,3)."""
    image, ops = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    with image.open(path) as picture:
        return np.asarray(ops.exif_transpose(picture).convert("RGB"), int)


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


def test_display_matrix(tmp_path):
    """All nine numbers of an mp4's display matrix, as ffmpeg's autorotation does: its filters are
    named behind the values.  Other angles go to the nearest right angle, where ffmpeg would rotate
    and fill the corners with black; what has no inverse turns nothing."""
    write_video(tmp_path / "a.mp4", np.repeat(colours(48, 32)[None], 2, 0), 25)
    content = (tmp_path / "a.mp4").read_bytes()
    identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = content.index(identity, content.index(b"tkhd"))
    plain = frame_pixels(tmp_path / "a.mp4")
    transposed = plain.swapaxes(0, 1)
    for (a, b, c, d), wanted in {
            (1, 0, 0, 1): plain,
            (-1, 0, 0, 1): plain[:, ::-1],                                  # hflip
            (1, 0, 0, -1): plain[::-1],                                     # vflip
            (-1, 0, 0, -1): plain[::-1, ::-1],                              # hflip, vflip
            (0, 1, 1, 0): transposed,                                       # transpose=cclock_flip
            (0, 1, -1, 0): transposed[:, ::-1],                             # transpose=clock
            (0, -1, 1, 0): transposed[::-1],                                # transpose=cclock
            (0, -1, -1, 0): transposed[::-1, ::-1],                         # transpose=clock_flip
            (0, 0.5, -2, 0): transposed[:, ::-1], (0, 0, 0, 0): plain, (-1, 0, 0, 0): plain,
            (0.9, 0.4, -0.4, 0.9): plain, (0.4, 0.9, 0.9, -0.4): transposed}.items():
        for shift, w in ((0, 1 << 30), (32, 0)):
            numbers = [round(65536 * x) for x in (a, b, 0, c, d, 0, shift, 0)]
            (tmp_path / "b.mp4").write_bytes(
                content[:at] + struct.pack(">9i", *numbers, w) + content[at + 36:])
            assert np.array_equal(frame_pixels(tmp_path / "b.mp4"), wanted), (a, b, c, d, shift)


@pytest.mark.parametrize("matrix", [8, 10, 12, 14])
def test_unknown_colour_matrix_is_taken_as_unspecified(tmp_path, matrix):
    pixels = []
    for number in (2, matrix):
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            stream.codec_context.colorspace = number
            frame = av.VideoFrame.from_ndarray(colours(48, 32), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.colorspace = number
            container.mux([*stream.encode(frame), *stream.encode(None)])
        pixels.append(frame_pixels(tmp_path / "a.mkv"))
    assert np.array_equal(*pixels)


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


@pytest.mark.parametrize("bframes, rate", [(0, 25), (3, 25), (0, 1)])
def test_program_stream_stamps_few_pictures(tmp_path, bframes, rate):
    """Small pictures share a packet of MPEG-PS, which has one time stamp.  At 1 picture per second
    the next stamp is a minute later, which is no jump of the clock."""
    path = encode(tmp_path / "a.mpg", range(100), Fraction(1, rate), bframes=bframes, format="mpeg")
    with av.open(str(path)) as container:
        container.flags &= ~media.GENPTS
        packets = list(container.demux(video=0))
        assert sum(p.pts is None for p in packets) > 90
        assert sum(len(p.decode()) for p in packets) == 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frames, times = read_frames(path, fps=rate, size=64)
        assert probe(path).seconds == pytest.approx(100 / rate, abs=1e-3)
    found = numbers(frames)
    # FFmpeg gives the picture that begins in one packet and ends in the next the stamp of the next.
    assert len(found) == 100 and sum(n != k for k, n in enumerate(found)) <= 1
    assert times == pytest.approx(np.array(found) / rate, abs=1.01 / rate)
    window, _ = read_frames(path, fps=rate, size=64, start=90 / rate, end=95 / rate)
    assert numbers(window) == list(range(90, 95))


@pytest.mark.parametrize("codec, format, names_rate", [("mpeg1video", "mpeg1video", True),
                                                       ("libx265", "hevc", False)])
def test_raw_stream_whose_length_is_guessed(tmp_path, codec, format, names_rate):
    """Of raw MPEG-1 FFmpeg guesses the length from the bit rate, and wrong stamps of B-frames; of
    HEVC that names no rate it guesses durations of 1 us."""
    path = tmp_path / "a.video"
    with av.open(str(path), "w", format=format) as container:
        video = container.add_stream(codec, rate=25, options={
            "bf": "2", "qmin": "2", "qmax": "9", "preset": "ultrafast", "x265-params":
            "vui-timing-info=0:log-level=none:pools=1:bframes=2"})
        video.width, video.height, video.pix_fmt = 2 * W, 2 * H, "yuv420p"
        for n in range(100):
            picture = numbered(n).repeat(2, 0).repeat(2, 1)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        frames, _ = read_frames(path, fps=25, size=64)
    assert numbers(frames) == list(range(100)) and probe(path).seconds == pytest.approx(4)
    assert ["names no frame rate" in str(w.message) for w in caught] == [True] * (not names_rate)


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
    for name in names:
        wanted = ops.exif_transpose(image.open(tmp_path / name)).convert("RGB")
        wanted = np.asarray(wanted.resize((224, 224), image.Resampling.BICUBIC), np.int16)
        got = read_image(tmp_path / name, resize)[0].permute(1, 2, 0).numpy()
        assert np.abs(got - wanted).mean() < (1.5 if name == "cmyk.jpg" else 0.3), name


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_orientation(tmp_path, suffix):
    """The eight EXIF orientations (of AVIF: irot and imir), also mirrored, as PIL turns them."""
    image = pytest.importorskip("PIL.Image")
    picture, shapes = image.fromarray(colours(47, 33)), set()
    for orientation in range(10):                          # 0 and 9 are not defined
        tag = image.Exif()
        tag[274], tag[271] = orientation, b"Fl\xf6te"       # Latin-1, as old cameras write it
        path = tmp_path / f"{orientation}.{suffix}"
        if suffix == "avif" and not 1 <= orientation <= 8:
            continue
        picture.save(path, exif=tag, quality=95)
        wanted, got = as_pil(path), picture_pixels(path)
        shapes.add(got.shape)
        assert got.shape == wanted.shape and np.abs(got - wanted).mean() < 0.6, orientation
    assert shapes == {(33, 47, 3), (47, 33, 3)}


SIZES = [(1, 1), (1, 2), (2, 1), (3, 3), (2, 9), (3, 8), (8, 3), (4, 4), (5, 4), (6, 6), (7, 9),
         (9, 7), (14, 6), (16, 17), (17, 16), (33, 31), (101, 67)]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_chroma_of_jpegs(tmp_path, subsampling, progressive):
    image = pytest.importorskip("PIL.Image")
    for width, height in SIZES:
        image.fromarray(colours(width, height)).save(
            tmp_path / "a.jpg", quality=95, subsampling=subsampling, progressive=progressive)
        error = np.abs(picture_pixels(tmp_path / "a.jpg") - as_pil(tmp_path / "a.jpg"))
        assert error.mean() < 0.8 and error.max() <= 3, (width, height, error.mean())


@pytest.mark.parametrize("subsampling, factors, across, down", [
    ("4:2:2", 0x12, 8, 16), ("4:2:0", 0x41, 32, 8)])
def test_chroma_of_jpegs_that_pil_does_not_write(tmp_path, subsampling, factors, across, down):
    """4:4:0 and 4:1:1: the sampling factors of another JPEG are replaced, so that its blocks come
    to lie elsewhere."""
    image = pytest.importorskip("PIL.Image")
    old_across, old_down = {"4:2:2": (16, 8), "4:2:0": (16, 16)}[subsampling]
    for columns, rows, cut in ((1, 1, 0), (1, 1, 3), (2, 3, 1), (3, 2, 2)):
        image.fromarray(colours(columns * old_across, rows * old_down)).save(
            tmp_path / "a.jpg", quality=95, subsampling=subsampling)
        content = bytearray((tmp_path / "a.jpg").read_bytes())
        header = content.index(b"\xff\xc0")
        height, width = rows * down - cut, columns * across - cut
        content[header + 5:header + 9] = struct.pack(">HH", height, width)
        content[header + 11] = factors
        (tmp_path / "b.jpg").write_bytes(content)
        wanted = as_pil(tmp_path / "b.jpg")
        assert wanted.shape == (height, width, 3)
        assert np.abs(picture_pixels(tmp_path / "b.jpg") - wanted).mean() < 0.8


@pytest.mark.parametrize("suffix, mode, options", [
    ("jpg", "L", {}), ("jpg", "CMYK", {}), ("jpg", "RGB", {"keep_rgb": True}),
    *(("png", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
    ("png", "P", {"transparency": 3}),
    *(("bmp", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("tiff", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")),
    ("tiff", "RGB", {"compression": "tiff_lzw"}), ("tiff", "1", {"compression": "group4"}),
    ("webp", "RGB", {}), ("webp", "RGBA", {}), ("webp", "RGBA", {"lossless": True}),
    ("avif", "RGB", {}), ("avif", "RGBA", {}), ("avif", "LA", {}), ("gif", "P", {}),
    ("ppm", "RGB", {}), ("tga", "RGB", {}), ("ico", "RGBA", {"sizes": [(61, 43)]})])
def test_kinds_of_pictures_are_as_pil_reads_them(tmp_path, suffix, mode, options):
    """Size 61 x 43.  Alpha is dropped, the colours behind it stay."""
    image = pytest.importorskip("PIL.Image")
    channels = {"LA": 2, "RGBA": 4, "CMYK": 4}.get(mode, 3)
    first = {"LA": "LA", "RGBA": "RGBA", "CMYK": "CMYK"}.get(mode, "RGB")
    picture = image.frombytes(first, (61, 43), colours(61, 43, channels).tobytes()).convert(mode)
    for name in (f"a.{suffix}", *(["wrong.jpg"] if suffix != "tga" else [])):  # TGA has no magic
        picture.save(tmp_path / name, suffix.replace("jpg", "jpeg"), **options)
        error = np.abs(picture_pixels(tmp_path / name) - as_pil(tmp_path / name))
        assert error.mean() < 0.6, error.mean()
        assert probe(tmp_path / name).kind == "image"


def test_sixteen_bits_become_eight(tmp_path):
    image = pytest.importorskip("PIL.Image")
    values = np.arange(60 * 40, dtype=np.uint16).reshape(40, 60) * 27
    for name in ("a.png", "a.tiff"):
        image.fromarray(values).save(tmp_path / name)
        got = picture_pixels(tmp_path / name)
        assert np.abs(got - values[..., None] / 257).max() < 1.5   # PIL's convert("RGB") clips


def test_animations_and_pictures_of_several_streams(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for mode in ("RGB", "RGBA"):
        frames = [image.new(mode, (60, 40), (40 + 60 * n, 90, 200 - 60 * n, 128)[:len(mode)])
                  for n in range(3)]
        for name in ("a.avif", "a.gif", "a.png", "a.webp"):
            frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=500)
        for name in ("a.avif", "a.gif", "a.png"):
            assert probe(tmp_path / name).kind == "video"
            got, times = media.read_frames(tmp_path / name, as_stored)
            assert times == pytest.approx([0, 0.5, 1.0])
            for n, pixels in enumerate([*got, read_image(tmp_path / name, as_stored)[0]]):
                if (mode, name) == ("RGBA", "a.gif"):      # FFmpeg shows the white ground
                    continue
                wanted = torch.tensor(frames[n % 3].getpixel((0, 0))[:3])[:, None, None]
                assert (pixels.int() - wanted).abs().max() <= 3, (name, n)
        for read in (probe, picture_pixels, frame_pixels):
            with pytest.raises(MediaError, match="a.webp: an animated WebP"):
                read(tmp_path / "a.webp")


def test_picture_of_tiles_is_refused(tmp_path):
    """Phones store a photo as a grid of tiles: two tiles of AVIF, and the item that joins them."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "tile.avif")
    tile = (tmp_path / "tile.avif").read_bytes()

    def box(kind, *parts, flags=None):
        body = (b"" if flags is None else struct.pack(">I", flags)) + b"".join(parts)
        return struct.pack(">I", 8 + len(body)) + kind + body
    start = tile.index(b"av1C") - 4
    decoder = tile[start:start + struct.unpack(">I", tile[start:start + 4])[0]]
    sizes = [box(b"ispe", struct.pack(">II", width, 64), flags=0) for width in (64, 128)]
    data = [tile[tile.index(b"mdat") + 4:]] * 2 + [struct.pack(">4BHH", 0, 0, 0, 1, 128, 64)]
    items = [box(b"infe", struct.pack(">HH4sB", n, 0, kind, 0), flags=2 << 24)
             for n, kind in ((1, b"av01"), (2, b"av01"), (3, b"grid"))]
    uses = b"".join(struct.pack(">HB", n, len(use)) + use for n, use in
                    ((1, b"\x81\x02"), (2, b"\x81\x02"), (3, b"\x03")))

    def header(place):
        at = np.cumsum([place] + [len(part) for part in data])
        where = b"".join(struct.pack(">HHHII", n + 1, 0, 1, at[n], len(data[n])) for n in range(3))
        return box(b"ftyp", b"avif\0\0\0\0avifmif1miaf") + box(
            b"meta", box(b"hdlr", bytes(4), b"pict", bytes(13), flags=0),
            box(b"pitm", struct.pack(">H", 3), flags=0),
            box(b"iloc", b"\x44\x00\x00\x03", where, flags=0),
            box(b"iinf", struct.pack(">H", 3), *items, flags=0),
            box(b"iref", box(b"dimg", struct.pack(">4H", 3, 2, 1, 2)), flags=0),
            box(b"iprp", box(b"ipco", decoder, *sizes),
                box(b"ipma", struct.pack(">I", 3), uses, flags=0)), flags=0)
    path = tmp_path / "grid.avif"
    path.write_bytes(header(len(header(0)) + 8) + box(b"mdat", *data))
    assert as_pil(path).shape == (64, 128, 3) and probe(path).kind == "image"
    with pytest.raises(MediaError, match="several parts .*convert it"):
        read_image(path, resize)


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_jpegs_are_told(tmp_path, progressive):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(colours(200, 120)).save(tmp_path / "a.jpg", progressive=progressive)
    whole = (tmp_path / "a.jpg").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = picture_pixels(tmp_path / "a.jpg")
        (tmp_path / "b.jpg").write_bytes(whole + b"behind its end" * 99)
        assert np.array_equal(picture_pixels(tmp_path / "b.jpg"), full)
    (tmp_path / "b.jpg").write_bytes(whole[:len(whole) * 3 // 4])
    with pytest.warns(UserWarning, match="b.jpg: damaged or cut off"):
        got = picture_pixels(tmp_path / "b.jpg")
    assert got.shape == full.shape and np.abs(got - full)[:16].mean() < 30


def test_ycbcr_of_tiff_uses_all_values(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = image.fromarray(colours(61, 43)).convert("YCbCr")
    picture.save(tmp_path / "a.tiff")             # which Pillow 12.3 writes, but cannot read again
    wanted = np.asarray(picture.convert("RGB"), int)
    assert np.abs(picture_pixels(tmp_path / "a.tiff") - wanted).max() <= 2


@pytest.mark.parametrize("name", ["page.txt", "page.nfo", "page.mp4", "page.sbg"])
def test_text_is_no_picture(tmp_path, name):
    """A page "404 Not Found" saved under the name of a film, or a list beside it."""
    (tmp_path / name).write_text("-SE\nbase: pink/40 100+1/80\nNOW base\n" if "sbg" in name else
                                 "<html><body>404 Not Found</body></html>\n" * 50)
    with pytest.raises(MediaError, match="not readable as media"):
        probe(tmp_path / name)


def test_jpeg_inside_a_tiff_is_refused(tmp_path):
    """FFmpeg decodes it to black."""
    image = pytest.importorskip("PIL.Image")
    image.fromarray(colours(61, 43)).save(tmp_path / "a.tiff", compression="jpeg")
    with pytest.raises(MediaError, match="a.tiff: a TIFF that holds a JPEG"):
        read_image(tmp_path / "a.tiff", resize)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp", "tga", "ppm"])
@pytest.mark.parametrize("width, height", [(16000, 9000), (60000, 60000)])
def test_huge_pictures_are_refused_by_their_header(tmp_path, suffix, width, height):
    """A kilobyte that asks for gigabytes of memory."""
    image = pytest.importorskip("PIL.Image")
    options = {"webp": {"lossless": True}, "ppm": {}, "jpg": {"progressive": True}}.get(suffix, {})
    image.fromarray(colours(40, 30)).save(tmp_path / f"a.{suffix}", **options)
    content = bytearray((tmp_path / f"a.{suffix}").read_bytes())
    if suffix == "png":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif suffix == "jpg":
        at = content.index(b"\xff\xc2")
        content[at + 5:at + 9] = struct.pack(">HH", height, width)
    elif suffix == "gif":
        at = content.index(b"\x2c\0\0\0\0")
        content[6:10] = content[at + 5:at + 9] = struct.pack("<HH", width, height)
    elif suffix == "bmp":
        content[18:26] = struct.pack("<ii", width, height)
    elif suffix == "tiff":
        first = struct.unpack("<I", content[4:8])[0] + 2
        for at in range(first, first + 24, 12):            # the tags 256 and 257 come first
            size = {256: width, 257: height}[struct.unpack("<H", content[at:at + 2])[0]]
            content[at + 2:at + 12] = struct.pack("<HII", 4, 1, size)
    elif suffix == "webp":                                 # 14 bits each
        at = content.index(b"VP8L") + 9
        content[at:at + 4] = struct.pack("<I", 16382 | 16382 << 14)
    elif suffix == "tga":
        content[12:16] = struct.pack("<HH", width, height)
    else:
        content = b"P6 %d %d 255\n" % (width, height) + bytes(3600)
    (tmp_path / f"a.{suffix}").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MediaError, match="larger than 120 million pixels"):
        read_image(tmp_path / f"a.{suffix}", resize)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000       # kB


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

    def counted(container, stream, *options):
        for item in decode(container, stream, *options):
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


# ---------------------------------------- files of several parts

def tone(hertz, seconds, rate, channels=1):
    wave = 0.5 * np.sin(np.arange(round(seconds * rate)) * 2 * np.pi * hertz / rate)
    return np.tile(wave.astype(np.float32), (channels, 1))


def pitch(audio, at):
    """Loudest frequency of the half second that starts at `at` s, in Hz."""
    part = audio[round(at * 16000):][:8000].numpy()
    return 2 * int(np.abs(np.fft.rfft(part * np.hanning(8000))).argmax())


def append(path, *parts):
    """What `cat` does."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def same_windows(path, windows):
    """A window has the samples of the full track, also beyond a joint."""
    full = read_audio(path)
    for start, end in windows:
        part = read_audio(path, start, end)
        wanted = full[round(start * 16000):round(end * 16000)]
        assert len(part) == len(wanted) and (part - wanted).abs().max() < 3e-3, (start, end)


@pytest.mark.parametrize("suffix, codec, parts", [
    ("mp3", "libmp3lame", [(44100, 1), (22050, 1)]),
    ("mp3", "libmp3lame", [(22050, 2), (48000, 1)]),
    ("aac", "aac", [(44100, 1), (22050, 2)]), ("flac", "flac", [(44100, 1), (16000, 1)]),
    ("ts", "aac", [(44100, 1), (22050, 2), (48000, 1)]), ("ts", "mp2", [(48000, 2), (32000, 1)])])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rate_and_layout_change_at_any_frame(tmp_path, suffix, codec, parts):
    """ffmpeg -ac 1 -ar 16000 gives the same tones at the same times."""
    files = [encode(tmp_path / f"{i}.{suffix}", [], audio=tone(500 + 200 * i, 2, rate, channels),
                    rate=rate, layout=("mono", "stereo")[channels - 1], audio_codec=codec,
                    format={"aac": "adts", "ts": "mpegts"}.get(suffix))
             for i, (rate, channels) in enumerate(parts)]
    path = append(tmp_path / f"all.{suffix}", *files)
    audio = read_audio(path)
    assert len(audio) / 16000 == pytest.approx(2 * len(parts), abs=0.1 * len(parts))
    for i in range(len(parts)):
        assert pitch(audio, 2 * i + 0.3) == pitch(audio, 2 * i + 1.3) == 500 + 200 * i
    assert 0.3 < audio[33600:48000].square().mean() / 0.125 < 1.3       # no gain, no silence
    same_windows(path, [(0.5, 1.5), (1.6, 2.7), (2.4, 3.3)])


def test_layout_and_format_change_in_one_stream(tmp_path):
    """16 kHz: 5.1 -> mono -> stereo, as AC-3 of a TV recording."""
    parts = [encode(tmp_path / f"{i}.ac3", [], audio=tone(500 + 200 * i, 1, 32000, channels),
                    rate=32000, layout=layout, audio_codec="ac3")
             for i, (layout, channels) in enumerate([("5.1", 6), ("mono", 1), ("stereo", 2)])]
    audio = read_audio(append(tmp_path / "all.ac3", *parts))
    assert [pitch(audio, i + 0.3) for i in range(3)] == [500, 700, 900]


def test_picture_size_changes_at_any_frame(tmp_path):
    parts = []
    for i, (h, w) in enumerate([(32, 80), (96, 160), (48, 48)]):
        parts.append(tmp_path / f"{i}.ts")
        with av.open(str(parts[-1]), "w", format="mpegts") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
            for _ in range(25):
                picture = np.full((h, w, 3), 60 * (i + 1), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    path = append(tmp_path / "all.ts", *parts)
    with pytest.warns(UserWarning, match="parts are joined"):
        frames, times = read_frames(path, size=32)
    assert times == pytest.approx(np.arange(6) / 2, abs=0.05)
    assert [round(float(f.float().mean()) / 60) for f in frames] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("later", [0, 100, 95440])
def test_clock_that_jumps(tmp_path, later):
    """`cat a.ts b.ts`: ffmpeg joins the parts and keeps picture and sound in step."""
    parts = []
    for i, start in enumerate((0, later, 0)):
        parts.append(encode(tmp_path / f"{i}.ts", np.arange(50) * 3600 + start * 90000, gop=25,
                            audio=click_track(2, 1.0, 48000), rate=48000, audio_start=start,
                            audio_codec="mp2"))
    path = append(tmp_path / "all.ts", *parts)
    with pytest.warns(UserWarning, match="all.ts: its clock jumps"):
        frames, times = read_frames(path, size=64)
        audio = read_audio(path)
        part, part_times = read_frames(path, size=64, start=4.5, end=5.5)
    assert probe(path).seconds == pytest.approx(6, abs=0.05)
    assert numbers(frames) == [0, 12, 25, 37] * 3
    assert times == pytest.approx(
        np.repeat([0, 2, 4], 4) + np.tile([0, 0.48, 1, 1.48], 3), abs=0.01)
    assert torch.equal(part, frames[9:11]) and part_times == times[9:11]
    for second in (1, 3, 5):                              # mp2 delays its sound by 10 ms
        assert onset(audio[16000 * second - 8000:]) / 16000 == pytest.approx(0.5, abs=0.025)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_windows(path, [(0.5, 1.5), (1.5, 2.5), (4.25, 5.75)])


def test_chained_ogg(tmp_path):
    parts = [encode(tmp_path / f"{i}.ogg", [], audio=click_track(2, 1.0, 48000), rate=48000,
                    audio_codec="libopus") for i in range(2)]
    path = append(tmp_path / "all.ogg", *parts)
    with pytest.warns(UserWarning, match="parts are joined"):
        audio = read_audio(path)
    assert len(audio) == pytest.approx(64000, abs=500) and probe(path).seconds == pytest.approx(
        4, abs=0.05)
    assert onset(audio) == pytest.approx(16000, abs=100)
    assert onset(audio[32000:]) == pytest.approx(16000, abs=500)


@pytest.mark.parametrize("suffix, codec, seconds", [("avi", "pcm_s16le", 6), ("mkv", "flac", 6),
                                                    ("flac", "flac", 20)])
def test_files_appended_to_each_other(tmp_path, suffix, codec, seconds):
    """Their headers count only the first, and no seek finds the second."""
    noise = np.random.default_rng(0).normal(0, 0.1, (2, seconds * 16000)).astype(np.float32)
    pts = [] if suffix == "flac" else range(25 * seconds)
    path = append(tmp_path / f"all.{suffix}", *(
        encode(tmp_path / f"{i}.{suffix}", pts, Fraction(1, 25), audio=noise[i], gop=12, bframes=0,
               audio_codec=codec) for i in range(2)))
    with pytest.warns(UserWarning, match="parts are joined"):
        clip = clip_from_path(path)
    assert len(clip.audio) == pytest.approx(2 * seconds * 16000, abs=1600)
    difference = clip.audio - torch.from_numpy(noise.ravel())[:len(clip.audio)]
    assert float(difference.abs().max()) < 1e-4                 # 16 bits
    if pts:
        whole = [*range(0, 25 * seconds, 5)] * 2
        assert numbers(read_frames(path, fps=5)[0]) == whole
        assert numbers(read_frames(path, fps=5, start=7, end=8)[0]) == whole[35:40]
    for start in (3.5, 5.5, 7.5, 1.5 * seconds):
        part = read_audio(path, start, start + 1)
        assert torch.equal(part, clip.audio[round(start * 16000):][:16000])


@pytest.mark.parametrize("suffix, codec", [("wav", "pcm_s16le"), ("aiff", "pcm_s16be"),
                                           ("m4a", "aac"), ("mp4", "aac"), ("flv", "aac")])
def test_appended_files_that_ffmpeg_does_not_read_are_told(tmp_path, suffix, codec):
    path = encode(tmp_path / f"a.{suffix}", range(25) if suffix in ("mp4", "flv") else [],
                  Fraction(1, 25), audio=click_track(1, 0.5, 44100), rate=44100, audio_codec=codec,
                  format="mp4" if suffix == "m4a" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = clip_from_path(path)
    with pytest.warns(UserWarning, match="a second file is appended"):
        two = clip_from_path(append(tmp_path / f"b.{suffix}", path, path))
    assert len(one.audio) == len(two.audio)
    third = append(tmp_path / "c.mkv", *[encode(tmp_path / "a.mkv", range(25), Fraction(1, 25),
                                                audio=click_track(1, 0.5), audio_codec="flac")] * 3)
    with pytest.warns(UserWarning, match="only the first .*% are read"):
        clip_from_path(third)


def test_real_gap_is_no_jump(tmp_path):
    """In MP4 and Matroska a hole of 20 s is one: the last picture stays, the sound is silent."""
    for suffix in ("mp4", "mkv"):
        path = encode(tmp_path / f"a.{suffix}", [*range(25), *range(525, 550)], Fraction(1, 25),
                      bframes=0)
        frames, _ = read_frames(path)
        assert numbers(frames) == [0, 12] + [24] * 40 + [25, 37]


@pytest.mark.parametrize("bframes", [0, 1, 2, 3])
@pytest.mark.parametrize("gop", [12, 250])
def test_avi_stores_no_presentation_times(tmp_path, bframes, gop):
    path = encode(tmp_path / "a.avi", range(100), Fraction(1, 25), bframes=bframes, gop=gop,
                  audio=click_track(4, 2.0), audio_codec="pcm_s16le")
    frames, times = read_frames(path, fps=5)
    assert numbers(frames) == list(range(0, 100, 5)) and times == sorted(times)
    assert numbers(read_frames(path, fps=5, start=3.2, end=3.8)[0]) == [80, 85, 90]
    assert onset(read_audio(path)) == 32000


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
@pytest.mark.parametrize("suffix, format", [("avi", "avi"), ("mpg", "mpeg")])
def test_b_frames_of_mpeg(tmp_path, codec, suffix, format):
    """In AVI FFmpeg gives the B-frames of MPEG-2 and MPEG-4 (DivX, Xvid) a time, the others none.
    In MPEG-PS it gives small B-frames of MPEG-2 times that are two frames early."""
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w", format=format) as container:
        video = container.add_stream(codec, rate=25, options={
            "bf": "2", "g": "12", "qmin": "2", "qmax": "2", "sc_threshold": "1000000000"})
        video.width, video.height, video.pix_fmt = W, H, "yuv420p"
        for n in range(100):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(n), format="rgb24")))
        container.mux(video.encode(None))
    if suffix == "mpg":
        assert probe(path).seconds == pytest.approx(4, abs=0.09)
    else:
        assert numbers(read_frames(path, fps=25)[0]) == list(range(100))
        assert numbers(read_frames(path, fps=25, start=3.2, end=3.4)[0]) == list(range(80, 85))


# ---------------------------------------- which stream, which frame

def two_tracks(path, default, kind, suffix):
    """Two tracks of one kind; the flag `default` (0 or 1) says which."""
    with av.open(str(path), "w", format=suffix) as container:
        streams = []
        if kind == "audio":
            for i in range(2):
                stream = container.add_stream("flac" if suffix == "matroska" else "aac",
                                              rate=16000, layout="mono")
                frames = sound_frames(tone(500 + 200 * i, 1, 16000), 16000, "mono", 0.0)
                streams.append((stream, [*frames, None]))
        else:
            for i in range(2):
                stream = container.add_stream("libx264", rate=25)
                stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
                pictures = [av.VideoFrame.from_ndarray(numbered(100 * i + n), format="rgb24")
                            for n in range(25)]
                streams.append((stream, [*pictures, None]))
        for i, (stream, _) in enumerate(streams):
            stream.disposition = av.stream.Disposition.default if i == default else 0
        for stream, frames in streams:
            for frame in frames:
                container.mux(stream.encode(frame))
    return path


@pytest.mark.parametrize("kind", ["audio", "video"])
@pytest.mark.parametrize("default", [0, 1])
@pytest.mark.parametrize("suffix", ["matroska", "mp4"])
def test_the_best_track_is_taken(tmp_path, kind, default, suffix):
    path = two_tracks(tmp_path / "a", default, kind, suffix)
    with av.open(str(path)) as container:
        best = container.streams.best(kind).index
    if suffix == "matroska":
        assert best == default
    if kind == "audio":
        assert pitch(read_audio(path), 0.3) == 500 + 200 * best
    else:
        assert numbers(read_frames(path)[0]) == [100 * best, 100 * best + 12]


@pytest.mark.parametrize("late", [0.007, 0.02])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_slides_stamped_late(tmp_path, late, suffix):
    """One slide per second.  Stamps are late alike (behind an Opus track), or each by itself."""
    audio = {"audio": click_track(6, 3.0, 48000), "rate": 48000, "audio_codec": "libopus"}
    path = encode(tmp_path / f"a.{suffix}", np.round((np.arange(6) + late) * 90000), **audio)
    frames, times = read_frames(path)
    assert numbers(frames)[:11] == np.arange(6).repeat(2).tolist()[:11]
    assert numbers(read_frames(path, start=3, end=5)[0]) == [3, 3, 4, 4]
    shifts = np.array([0, late, 0.003, -0.004, late, 0.001])
    path = encode(tmp_path / f"b.{suffix}", np.round((np.arange(6) + shifts) * 90000), bframes=0)
    assert numbers(read_frames(path)[0])[:11] == np.arange(6).repeat(2).tolist()[:11]


@pytest.mark.parametrize("rate", [2, 3, 5, 7, 10, 15, 24, Fraction(30000, 1001), 30, 50, 60])
def test_exact_stamps_are_not_late(tmp_path, rate):
    path = encode(tmp_path / "a.mp4", range(int(3 * rate)), 1 / Fraction(rate), bframes=0)
    clock = [float(n / Fraction(rate)) for n in range(int(3 * rate))]
    for fps in (1, 2, 3):
        frames, _ = read_frames(path, fps=fps, size=64)
        assert numbers(frames) == on_screen(clock, np.arange(len(frames)) / fps)


# ---------------------------------------- headers that lie

def wav(path, rate=16000, channels=1, mask=0, samples=4000):
    """A WAV whose header is given: the extensible format, 16 bits."""
    sound = np.repeat((tone(500, samples / 16000, 16000)[0] * 32767).astype("<i2"), channels)
    head = struct.pack("<HHIIHHHHI", 0xFFFE, channels, rate, rate * 2 * channels % 2 ** 32,
                       2 * channels, 16, 22, 16, mask)
    head += bytes.fromhex("0100000000001000800000AA00389B71")
    path.write_bytes(b"RIFF" + struct.pack("<I", 60 + sound.nbytes) + b"WAVEfmt " +
                     struct.pack("<I", len(head)) + head + b"data" +
                     struct.pack("<I", sound.nbytes) + sound.tobytes())
    return path


@pytest.mark.parametrize("channels, mask", [(1, 0), (2, 0), (3, 0), (5, 31), (7, 127), (9, 0),
                                            (10, 1023), (17, 0), (32, 0)])
def test_unknown_layouts_are_averaged(tmp_path, channels, mask):
    audio = read_audio(wav(tmp_path / "a.wav", channels=channels, mask=mask))
    assert len(audio) == 4000
    assert (audio - torch.from_numpy(tone(500, 0.25, 16000)[0])).abs().max() < 1e-3


@pytest.mark.parametrize("rate", [1, 7, 999, 800_000, 2 ** 31 - 1, 4_000_000_000])
def test_absurd_rates_are_refused(tmp_path, rate):
    with pytest.raises(MediaError, match="a.wav: "), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_audio(wav(tmp_path / "a.wav", rate))


@pytest.mark.parametrize("rate", [1000, 11025, 44099, 100_000, 192_000])
def test_rare_rates(tmp_path, rate):
    audio = read_audio(wav(tmp_path / "a.wav", rate, samples=rate))
    assert len(audio) == pytest.approx(16000, abs=30)


def test_far_stamps_cost_no_memory(tmp_path, monkeypatch):
    """Years between two packets are joined; hours are kept as far as the limits go."""
    for seconds, wanted in ((10 ** 8, 3), (20 * 3600, 120)):
        monkeypatch.setattr(media, "MOST_SECONDS", 120)
        monkeypatch.setattr(media, "MOST_FRAMES", 240)
        path = encode(tmp_path / "a.mkv", [0, 12, seconds * 25, seconds * 25 + 24],
                      Fraction(1, 25), bframes=0)
        with av.open(str(tmp_path / "b.mkv"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=16000, layout="mono")
            for frame in [*sound_frames(tone(500, 1, 16000), 16000, "mono", 0.0),
                          *sound_frames(tone(700, 2, 16000), 16000, "mono", seconds), None]:
                container.mux(stream.encode(frame))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert len(read_frames(path)[0]) <= 240
            assert len(read_audio(tmp_path / "b.mkv")) == pytest.approx(wanted * 16000, abs=16000)


def test_latin_1_tags(tmp_path):
    path = tmp_path / "a.mp3"
    encode(path, [], audio=tone(500, 1, 44100), rate=44100, audio_codec="libmp3lame")
    tag = b"TIT2" + struct.pack(">I", 7) + b"\0\0\3caf\xe9\xff\xfe"[:9]
    path.write_bytes(b"ID3\3\0\0\0\0\0" + bytes([len(tag)]) + tag + path.read_bytes())
    riff = wav(tmp_path / "b.wav")
    info = b"LIST" + struct.pack("<I", 16) + b"INFOINAM" + struct.pack("<I", 4) + b"caf\xe9"
    riff.write_bytes(riff.read_bytes() + info)
    assert pitch(read_audio(path), 0.2) == 500 and len(read_audio(riff)) == 4000


@pytest.mark.parametrize("name, text", [
    ("clip.mp4", "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                 "m=video 53999 RTP/AVP 96\na=rtpmap:96 H264/90000\n"),
    ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{file}\n#EXT-X-ENDLIST\n"),
    ("b.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:{port}/a.ts\n"),
    ("c.mp4", "ffconcat version 1.0\nfile {name}\n"),
    ("d.mp4", "ffconcat version 1.0\nfile {file}\n"),
    ("e.mpd", '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
              'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4">'
              '<Representation id="1" bandwidth="1000"><BaseURL>http://127.0.0.1:{port}/a.mp4'
              '</BaseURL></Representation></AdaptationSet></Period></MPD>')])
def test_files_open_nothing_but_themselves(tmp_path, name, text):
    encode(tmp_path / "other.ts", range(25), Fraction(1, 25))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        (tmp_path / name).write_text(text.format(file=tmp_path / "other.ts", name="other.ts",
                                                 port=server.getsockname()[1]))
        for read in (probe, read_frames, read_audio, partial(read_image, resize=resize)):
            with pytest.raises(MediaError, match=name):
                read(tmp_path / name)
        with pytest.raises(BlockingIOError):                        # nobody has called
            server.accept()
