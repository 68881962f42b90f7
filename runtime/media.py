"""The media decoder: files that people really have -> frames and sound on one clock, and back.

     video --read_frames--> (F,3,size,size), times     the frame on screen every 1/fps s
     image --read_image---> (1,3,size,size)
     sound --read_audio---> (S,) float32, 16 kHz mono
     write_video, write_wav, write_png                  the other way, atomically
Time 0 of a file is its first picture or sound, whichever comes first, so that both stay in step.
FFmpeg (through PyAV) decodes.  This file adds what datasets need: variable frame rates, late
streams, rotation, cover art, seeks that land late, gaps in the sound, broken packets and files that
are cut off, and errors that say what to do.

Public: MediaError, Media, probe, read_frames, read_image, read_audio, write_video, write_wav,
write_png, AUDIO_RATE."""

import math
import os
import re
import warnings
import wave
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from runtime.hub import atomic

AUDIO_RATE = 16_000       # samples per second, the rate of Whisper
TICK = 1e-6               # s; times closer than this are equal (MPEG's own clock ticks at 1.1e-5)
JITTER = 0.015            # s; a smaller error of a sound's time is rounding, a lost packet is 20 ms
ATTACHED = av.stream.Disposition.attached_pic     # cover art is a "video" stream, but no video


class MediaError(ValueError):
    """A file that cannot give what was asked for; the message starts with its path."""


# ---------------------------------------- opening, decoding

@contextmanager
def _open(path):
    """The file as a PyAV container.  Every error of FFmpeg while it is open becomes a MediaError.
    FFmpeg gets an open Python file, as it would interpret names like 'concat:x' or 'a%d.jpg'."""
    try:
        if os.path.getsize(path) == 0:
            raise MediaError(f"{path}: empty (0 bytes); copy or download it again")
        with open(path, "rb") as file, av.open(file) as container:
            yield container
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file; correct the path or drop the record") from None
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: not readable as media ({error.strerror}); it is cut off, "
                         "broken or of another type; make it again or drop it") from error


def _streams(container, kind):
    return [s for s in container.streams if s.type == kind and not s.disposition & ATTACHED]


def _stream(container, kind, path):
    """The first stream of that kind.  It decodes on one thread, because the loader's worker
    processes already use all cores."""
    if not (found := _streams(container, kind)):
        has = ", ".join(f"{s.type} ({getattr(s.codec_context, 'name', 'unknown codec')})"
                        for s in container.streams) or "nothing"
        raise MediaError(f"{path}: no {kind} stream, it holds {has}; name another file or drop it")
    if found[0].codec_context is None:
        raise MediaError(f"{path}: no decoder for its {kind}; convert it (ffmpeg -i in out.mp4)")
    found[0].codec_context.thread_type, found[0].codec_context.thread_count = "NONE", 1
    return found[0]


def _origin(container):
    """The first moment of the presentation on the file's own clock: an exact fraction, seconds."""
    streams = _streams(container, "video") + _streams(container, "audio")
    return min((s.start_time * s.time_base for s in streams if s.start_time is not None),
               default=Fraction(0))


def _stream_end(container, stream):
    """The time at which the stream ends, in seconds: from its own header, otherwise from the
    container's, otherwise by reading every packet."""
    if stream.duration and stream.start_time is not None:
        return float((stream.start_time + stream.duration) * stream.time_base - _origin(container))
    header = (container.duration or 0) / av.time_base - float(_origin(container))
    if header > 0:               # in Matroska and FLV this is the time at the end, not a length
        return header
    last = total = 0.0
    for packet in container.demux(stream):
        seconds = float((packet.duration or 0) * stream.time_base)
        total += seconds
        if packet.pts is not None:
            last = max(last, float(packet.pts * stream.time_base - _origin(container)) + seconds)
    return max(last, total)


def _is_image(container):
    name, stream = container.format.name, _streams(container, "video")[0]
    if name in ("gif", "apng"):
        return stream.frames == 1
    return ("image2" in name or name.endswith("_pipe") or
            container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1"))


@dataclass(frozen=True)
class Media:
    """What a file holds.  kind: "video", "audio" or "image"; seconds: the length of the picture, or
    of the sound where there is no picture."""
    kind: str
    seconds: float
    has_audio: bool


def probe(path):
    """Path -> Media, from the content and not from the suffix; the cover art of a song is no video.
    Raises MediaError when the file cannot be read."""
    with _open(path) as container:
        has_audio = bool(_streams(container, "audio"))
        if not _streams(container, "video"):
            return Media("audio", _stream_end(container, _stream(container, "audio", path)), True)
        if not has_audio and _is_image(container):
            return Media("image", 0.0, False)
        return Media("video", _stream_end(container, _stream(container, "video", path)), has_audio)


def _timed_frames(container, stream, path, clock):
    """Yields every decoded frame as (start, seconds, frame) in presentation time.  A frame without
    a time stamp starts where the frame before it ended (raw H.264).  clock: the start of the first
    frame in seconds, None when it is unknown."""
    origin, broken, sound = float(_origin(container)), 0, stream.type == "audio"
    # Two integers, because arithmetic on Fractions would be slow.
    tick, ticks = stream.time_base.numerator, stream.time_base.denominator
    packets = container.demux(stream)
    while True:
        try:
            if (packet := next(packets, None)) is None:
                break
            decoded = packet.decode()
        except av.FFmpegError:                  # the rest of the file may still be good
            broken += 1
            if broken > 1000:
                break
            continue
        for frame in decoded:
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is not None:
                clock = stamp * tick / ticks - origin
            if sound:
                seconds = frame.samples / frame.sample_rate
            else:
                seconds = float((frame.duration or 0) * tick / ticks
                                or 1 / (stream.average_rate or 25))
            yield clock, seconds, frame
            clock = None if clock is None else clock + seconds
    if broken:
        warnings.warn(f"{path}: {broken} broken {stream.type} packets were left out", stacklevel=3)


def _decode(path, kind, start):
    """Yields (start, seconds, frame) from a frame at or shortly before `start` seconds on.

    A seek may land too late (B-frames, sparse keyframes, bad indices).  The time of the first frame
    shows this; then we seek further back, and in the end read from the beginning."""
    for back in (2, 60, None):        # seconds; decoders of AAC, MP3 and Opus need some to warm up
        if back is not None and start - back < 1:
            continue                              # the beginning is as close
        with _open(path) as container:
            stream = _stream(container, kind, path)
            if back is not None:
                ticks = (Fraction(start) - back + _origin(container)) / stream.time_base
                try:
                    container.seek(int(ticks), stream=stream)    # goes to the keyframe before it
                except av.FFmpegError:
                    continue
            frames = _timed_frames(container, stream, path, 0.0 if back is None else None)
            first = next(frames, None)
            if back is not None and (first is None or first[0] is None or first[0] > start):
                continue
            if first is not None:
                yield first
            yield from frames
            return


def _window(path, kind, start, end, declared):
    """start and end as seconds inside a stream whose header says that it ends at `declared`."""
    start, what = float(start or 0), "picture" if kind == "video" else "sound"
    if start < 0 or (end is not None and end <= start):
        raise MediaError(f"{path}: window [{start}, {end}) is empty; wanted 0 <= start < end")
    if start >= declared > 0:
        raise MediaError(f"{path}: start {start} s is beyond its end, the {what} ends at "
                         f"{declared:.3f} s; correct the times or drop the record")
    return start, min(declared or math.inf, math.inf if end is None else float(end))


def _warn_if_short(path, kind, decoded, wanted):
    if decoded < wanted - 1 and wanted < math.inf:
        warnings.warn(f"{path}: {kind} decodes up to {decoded:.2f} s of {wanted:.2f} s: it is "
                      "cut off or its header wrong; using what is there", stacklevel=3)


# ---------------------------------------- pictures

class _Shown:
    """A decoded frame.  It is turned and resized at most once, and only if it is chosen."""

    def __init__(self, time, frame, resize, reformatter):
        self.time, self.frame, self.resize, self.reformatter = time, frame, resize, reformatter

    @cached_property
    def pixels(self):
        return self.resize(_upright(self.frame, self.reformatter))[0]         # (3,size,size)


def _upright(frame, reformatter, full_chroma=False):
    """Decoded frame -> uint8 (1,H,W,3), turned as its display matrix (phones) or EXIF demands:
    `rotation` counts degrees anticlockwise, as rot90 does.  PyAV does not report mirrored EXIF
    (2, 4, 5, 7).  Grey, 16-bit, palette and CMYK pictures become RGB; alpha is dropped.  All frames
    of a file share one reformatter, because creating one costs 2 ms."""
    turns = round(frame.rotation / 90)
    if full_chroma:
        frame = frame.reformat(format=re.sub("4(20|22|11|40|10)p", "444p", frame.format.name))
    rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()                    # (H,W,3)
    return np.ascontiguousarray(np.rot90(rgb, turns))[None]


def _regular(start, end, fps):
    """Targets (time, slot, at_or_after) every 1/fps s: the frame on screen at that time."""
    count = max(1, math.ceil((end - start) * fps - TICK))
    return [(start + i / fps, i, False) for i in range(count)]


def _ends(start, end, fps):
    """The rule of the authors' released code: the first and the last frame of every second
    [a, a+1).  A last, incomplete second is moved back to [end - 1, end).  fps has no effect."""
    count = max(1, math.ceil(end - start - TICK))
    firsts = [max(start, min(start + k, end - 1)) for k in range(count)]
    return ([(a, 2 * k, True) for k, a in enumerate(firsts)] +
            [(min(a + 1, end) - 2 * TICK, 2 * k + 1, False) for k, a in enumerate(firsts)])


FRAME_TIMES = {"regular": _regular, "ends": _ends}


def read_frames(path, resize, fps=2.0, start=None, end=None, frame_times="regular"):
    """Video file -> (F,3,size,size) as `resize` made them, and the times of the F chosen frames.

    resize: uint8 (1,H,W,3) -> (1,3,size,size).  start, end: seconds of the file, None for its own.
    frame_times: "regular", one frame every 1/fps s, or "ends" (_ends).
    The frame of a target time t is the one on screen: the last with time <= t, or the first of the
    file.  One sequential pass up to the last target; a seek to each would be 7 times slower.
    Raises MediaError when no frame of the window can be read."""
    if frame_times not in FRAME_TIMES:
        raise ValueError(f"frame_times is {frame_times!r}, wanted one of {', '.join(FRAME_TIMES)}")
    if not fps > 0:
        raise ValueError(f"fps is {fps}, wanted a number above 0; 2 is the paper's")
    media = probe(path)
    if media.kind == "image":
        raise MediaError(f"{path}: no video stream, a still image; name it under 'image'")
    start, end = _window(path, "video", start, end, media.seconds if media.kind == "video" else 0)
    end = end if end < math.inf else start + 1 / fps            # only a file without any duration
    pending = deque(sorted(FRAME_TIMES[frame_times](start, end, fps)))
    chosen, shown, shown_until, reformatter = {}, None, 0.0, VideoReformatter()
    for time, seconds, frame in _decode(path, "video", start):
        new = _Shown(time, frame, resize, reformatter)
        while pending:
            target, slot, at_or_after = pending[0]
            if time < target - TICK if at_or_after else time <= target + TICK:
                break                              # a later frame may be the one for this target
            pick = new if at_or_after or shown is None else shown
            chosen[slot] = (pick.pixels, pick.time)
            pending.popleft()
        if not pending:
            break
        shown, shown_until = new, max(shown_until, time + seconds)
    if shown is None and not chosen:
        raise MediaError(f"{path}: no frame can be decoded; make it again or drop it")
    if pending:                                                # the last frame stays on screen
        _warn_if_short(path, "the picture", shown_until, end)
        truncated = shown_until < end - 1
        for target, slot, _ in pending:
            if not truncated or target < shown_until:
                chosen[slot] = (shown.pixels, shown.time)
    if not chosen:
        raise MediaError(f"{path}: start {start} s is beyond its end, the picture decodes up to "
                         f"{shown_until:.3f} s; correct the times or drop the record")
    # The last second of "ends" may overlap with the one before it.
    pixels, times = zip(*sorted((chosen[slot] for slot in sorted(chosen)),
                                key=lambda frame: frame[1]), strict=True)
    return torch.stack(pixels), list(times)


def read_image(path, resize):
    """Image file -> (1,3,size,size) as `resize` made it from uint8 (1,H,W,3); of an animation the
    first picture.  Chroma is interpolated to full resolution before the conversion to RGB: photos
    then differ from PIL's by 0.1 of 255 on average, otherwise by 1.5.
    Raises MediaError when the file is no still image that can be read."""
    with _open(path) as container:
        stream = _stream(container, "video", path)
        if container.format.name not in ("gif", "apng") and not _is_image(container):
            raise MediaError(f"{path}: a video, wanted a still image; name it under 'video'")
        if len(_streams(container, "video")) > 1:                 # HEIC files of phones
            raise MediaError(f"{path}: a picture in several parts (tiles); convert it to jpg")
        for _, _, frame in _timed_frames(container, stream, path, 0.0):
            return resize(_upright(frame, VideoReformatter(), full_chroma=True))
    raise MediaError(f"{path}: no picture can be decoded; make it again or drop it")


# ---------------------------------------- sound

class _Mono16k:
    """Decoded audio frames -> one float32 track at 16 kHz whose sample 0 is at time `start`.

    Frames are first placed on the grid of source samples (gaps become silence, overlaps are cut),
    then resampled.  The grid starts at a multiple of 10 ms (441 samples of 44.1 kHz are 160 samples
    of 16 kHz), so that a window has exactly the samples of the full track."""

    def __init__(self, rate, start, stop):
        common = math.gcd(rate, AUDIO_RATE)
        block_in, block_out = rate // common, AUDIO_RATE // common
        blocks = max(0, math.floor((start - 0.1) * common))      # 0.1 s for the filter to start
        self.rate, self.position, self.expected = rate, blocks * block_in, None
        self.skip = round(start * AUDIO_RATE) - blocks * block_out
        self.mixers, self.chunks, self.waiting, self.held = {}, [], [], 0
        self.limit = math.inf if stop == math.inf else math.ceil((stop + 0.1) * rate)
        # The resampler gets one channel of floats, so that it applies no gain.  16 kHz need none.
        self.resampler = (None if rate == AUDIO_RATE else
                          av.AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE))

    def _channels(self, frame):
        """Frame -> list of [mono] or [left, right], each float32 (S,); their mean is the sound.

        FFmpeg mixes *integers* to mono with weights 0.5 + 0.5, but floats with 0.71 + 0.71, which
        is 3 dB too loud (test_stereo_mix).  With 32 bits the result is within 1.5e-5 of Whisper's
        own 16-bit track.  AAC already decodes to floats; _flush mixes those, which is faster."""
        if frame.format.name == "fltp" and frame.layout.name in ("mono", "stereo"):
            # The buffer of a plane is longer than its samples; to_ndarray() is three times slower.
            return [[np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes]]
        # The format of a TV recording may change in the middle.
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)
        if kind not in self.mixers:
            self.mixers[kind] = av.AudioResampler(format="s32", layout="mono", rate=self.rate)
        return [[np.frombuffer(mixed.planes[0], np.int32, mixed.samples).astype(np.float32)
                 * 2.0 ** -31] for mixed in self.mixers[kind].resample(frame)]

    def add(self, time, frame):
        """Appends a decoded frame that starts at `time` seconds."""
        for channels in self._channels(frame):
            place, n = round(time * self.rate), len(channels[0])
            if self.expected is not None and abs(place - self.expected) <= JITTER * self.rate:
                place = self.expected
            self.expected = place + n
            while (gap := min(place, self.limit) - self.position) > 0:         # a minute at a time
                self._feed([np.zeros(min(gap, 60 * self.rate), np.float32)])
            if place < self.position:
                channels = [channel[self.position - place:] for channel in channels]
            self._feed(channels)
            time += n / self.rate

    def _feed(self, channels):
        n = len(channels[0])
        if n:
            self.position += n
            self.waiting.append(channels)
            self.held += n
            if self.held >= self.rate:
                self._flush()

    def _flush(self):
        """Mixes and resamples what waits.  This is done about once per second of sound, because a
        call costs more than the 1024 samples of a frame."""
        if not self.waiting:
            return
        samples = np.concatenate([channels[0] for channels in self.waiting])
        if any(len(channels) > 1 for channels in self.waiting):
            samples += np.concatenate([channels[-1] for channels in self.waiting])
            samples *= np.float32(0.5)                 # of a mono frame this is (x + x) / 2
        self.waiting, self.held = [], 0
        if self.resampler is None:
            self.chunks.append(samples)
        else:
            frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate = self.rate
            self.chunks += [f.to_ndarray()[0] for f in self.resampler.resample(frame)]

    def finish(self, samples):
        """-> float32 (S,) with at most so many samples (None: all)."""
        self._flush()
        if self.resampler is not None:
            self.chunks += [f.to_ndarray()[0] for f in self.resampler.resample(None)]  # last 1 ms
        track = np.concatenate([np.zeros(0, np.float32), *self.chunks])[self.skip:][:samples]
        return torch.from_numpy(track.clip(-1, 1))               # as 16-bit samples would be


def read_audio(path, start=None, end=None):
    """Audio or video file -> float32 (S,), 16 kHz mono, from `start` to `end` in seconds of the
    file (None: from its beginning, to its end; AAC without an edit list ends up to 64 ms later,
    with padding).  A window costs only its own length.
    Raises MediaError when no sound of the window can be read."""
    with _open(path) as container:
        stream = _stream(container, "audio", path)
        declared = _stream_end(container, stream)
    start, _ = _window(path, "audio", start, end, declared)
    stop = math.inf if end is None else float(end)      # not the header's, which MP3 estimates
    track, reached = None, 0.0
    for time, seconds, frame in _decode(path, "audio", start):
        track = track or _Mono16k(frame.sample_rate, start, stop)
        track.add(time, frame)
        reached = time + seconds
        if reached > stop + 0.05:                       # 50 ms more for the tail of the filter
            break
    if track is None:
        raise MediaError(f"{path}: no sound can be decoded; make it again or drop it")
    _warn_if_short(path, "the sound", reached, min(stop, declared))
    wave16k = track.finish(None if stop == math.inf else
                           round(stop * AUDIO_RATE) - round(start * AUDIO_RATE))
    if not len(wave16k):
        raise MediaError(f"{path}: start {start} s is beyond its end, the sound decodes up to "
                         f"{reached:.3f} s; correct the times or drop the record")
    return wave16k


# ---------------------------------------- writing

def write_video(path, frames, fps, audio=None, audio_rate=AUDIO_RATE):
    """uint8 (F,H,W,3) at `fps` [+ float32 (S,) at audio_rate] -> mp4 file, H.264 [+ AAC].
    Raises ValueError for frames of another type or of odd size."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames) \
            or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: frames are {frames.dtype} {frames.shape}; wanted uint8 "
                         "(F,H,W,3), F >= 1, even H and W (H.264 halves its chroma)")
    with atomic(path) as temporary, av.open(str(temporary), "w") as container:
        video = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                     options={"preset": "ultrafast", "crf": "18", "threads": "1"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        streams = [(video, (av.VideoFrame.from_ndarray(f, format="rgb24") for f in frames))]
        if audio is not None:
            samples = np.ascontiguousarray(audio, np.float32)[None]               # (1,S)
            sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            sound.sample_rate, sound.time_base, sound.pts = audio_rate, Fraction(1, audio_rate), 0
            streams.append((container.add_stream("aac", rate=audio_rate, layout="mono"), [sound]))
        for stream, decoded in streams:
            for frame in [*decoded, None]:                              # None flushes the encoder
                container.mux(stream.encode(frame))


def write_wav(path, audio, rate=AUDIO_RATE):
    """float32 (S,) in [-1,1] -> wav file, 16 bits, mono."""
    samples = np.clip(np.round(np.asarray(audio, np.float32) * 32768), -32768, 32767)
    with atomic(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_png(path, image):
    """uint8 (H,W,3) -> png file."""
    image = np.ascontiguousarray(image)
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = *image.shape[:2], "rgb24"
    codec.time_base = Fraction(1)
    packets = codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + codec.encode(None)
    with atomic(path) as temporary:
        temporary.write_bytes(b"".join(bytes(packet) for packet in packets))
