"""Media files and manifests -> what the model takes.  Paper Sec. 4.1: 2 frames/s, 16 kHz.
     manifest.jsonl --read_manifest--> Record --load_clip--> Clip(frames (F,3,224,224), audio (S,))
   Time 0 of a file is its first picture or sound, whichever comes first, so both stay synchronous.
   Public: Record, read_manifest, write_manifest, parse_line, to_record; Clip, Features, Sample, load_clip,
   clip_from_path, load_or_skip, report_skipped; probe, read_frames, read_image, read_audio,
   MediaError; write_video, write_wav, write_png."""

import json
import math
import os
import re
import warnings
import wave
from collections import deque
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from vit_qformer import resize, resize_plain

AUDIO_RATE = 16_000       # samples/s, what Whisper hears
TICK = 1e-6               # s; two times nearer than this are one (MPEG's own clock ticks at 1.1e-5)
JITTER = 0.015            # s; sound stamped this far off is rounding, a lost packet is 20 ms
ATTACHED = av.stream.Disposition.attached_pic     # cover art: a "video" stream that is no video


class MediaError(ValueError):
    """A file that cannot give what was asked; the message starts with its path."""


# ---------------------------------------- records

@dataclass(frozen=True)
class Record:
    """One question about one clip. Times are seconds of the source file; None = from its start, to
    its end. Sound of a video comes from the video file unless `audio` names another one."""
    id: str
    task: str
    prompt: str
    target: str | None = None
    image: str | None = None
    video: str | None = None
    audio: str | None = None
    start: float | None = None
    end: float | None = None
    refs: tuple = ()                  # all right answers, for scoring
    options: tuple = ()               # multiple choice
    history: tuple = ()               # (question, answer) turns before this one
    meta: dict = field(default_factory=dict)


MEDIA = ("image", "video", "audio")
NEEDED = tuple(f.name for f in fields(Record)
               if f.default is MISSING and f.default_factory is MISSING)


def _text(x):
    return isinstance(x, str) and x != ""


def _any_text(x):
    return isinstance(x, str)


def _time(x):           # bool is an int and NaN is JSON to Python: neither is a time
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 <= x < math.inf


def _texts(x):
    return isinstance(x, (list, tuple)) and all(map(_any_text, x))


def _turns(x):
    return isinstance(x, (list, tuple)) and all(_texts(t) and len(t) == 2 for t in x)


WANTED = {  # field: (whether a value fits, what is wanted in words)
    **dict.fromkeys(("id", "task"), (_text, "a string")),
    **dict.fromkeys(("prompt", "target"), (_any_text, "a string")),
    **dict.fromkeys(MEDIA, (_text, "a string")),
    **dict.fromkeys(("start", "end"), (_time, "seconds >= 0")),
    **dict.fromkeys(("refs", "options"), (_texts, "a list of strings")),
    "history": (_turns, "a list of [question, answer]"),
    "meta": (lambda x: isinstance(x, dict), "an object")}


def check_values(values, where):
    """A line of a manifest, parsed: dict without the fields that are null.  ValueError names
    `where`."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a {type(values).__name__}, wanted one object a line")
    if None in values.values():
        values = {name: value for name, value in values.items() if value is not None}
    missing = [name for name in NEEDED if name not in values]
    if missing or not values.keys() <= WANTED.keys():
        raise ValueError(f"{where}: missing {missing}, unknown {sorted(set(values) - set(WANTED))};"
                         f" the fields are {', '.join(WANTED)} (anything else belongs into meta)")
    for name, value in values.items():
        fits, wanted = WANTED[name]
        if not fits(value):
            raise ValueError(f"{where}: {name} is {value!r}, wanted {wanted}; correct it")
    if "end" in values and values["end"] <= values.get("start", 0):
        raise ValueError(f"{where}: end {values['end']} is not after start "
                         f"{values.get('start', 0)}; wanted seconds of the source file; correct it")
    if "image" in values and "video" in values:
        raise ValueError(f"{where}: has an image and a video; keep one of the two")
    return values


def parse_line(line, where):
    """Bytes of one line -> checked dict.  ValueError names `where`."""
    try:
        return check_values(json.loads(line.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}); wanted one object a line") from None


def to_record(values, folder):
    """Checked dict -> Record.  Relative media paths are taken from `folder`; absolute ones stay."""
    values = dict(values)
    for name in values.keys() & {"refs", "options"}:
        values[name] = tuple(values[name])
    if "history" in values:
        values["history"] = tuple(tuple(turn) for turn in values["history"])
    for name in values.keys() & set(MEDIA):
        values[name] = str(Path(folder) / values[name])
    return Record(**values)


def read_manifest(path):
    """JSONL -> list[Record], all checked before anything runs; a ValueError names file and line."""
    try:
        lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; wanted a JSONL manifest") from None
    records, first_line = [], {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        record = to_record(parse_line(line, where), Path(path).parent)
        if record.id in first_line:
            raise ValueError(f"{where}: id {record.id!r} is taken by line {first_line[record.id]}; "
                             "make ids unique")
        first_line[record.id] = number
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no records; wanted at least one JSON object a line")
    return records


def find_manifest(path, split):
    """A manifest file, or <folder>/<split>.jsonl.  ValueError if it does not exist."""
    path = Path(path)
    manifest = path if path.suffix == ".jsonl" else path / f"{split}.jsonl"
    if not manifest.exists():
        raise ValueError(f"{manifest}: no such manifest; name a .jsonl file or a folder with "
                         f"{split}.jsonl (the miniature: python -m miniature make)")
    return manifest


def write_manifest(path, records):
    """Atomically; fields at their default are left out, media below the manifest's folder become
    relative to it, so that the folder can move. What would not read back is refused."""
    folder, lines, seen = Path(os.path.abspath(path)).parent, [], set()
    for record in records:
        where = f"{path}, record {record.id!r}"
        check_values(vars(record), where)
        if record.id in seen:
            raise ValueError(f"{where}: this id is written twice; make ids unique")
        seen.add(record.id)
        values = {n: v for n, v in vars(record).items() if v is not None and v != () and v != {}}
        for name in values.keys() & set(MEDIA):
            media = Path(os.path.abspath(values[name]))
            inside = media.is_relative_to(folder)
            values[name] = str(media.relative_to(folder) if inside else media)
        lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
    if not lines:
        raise ValueError(f"{path}: no records to write; an empty manifest would not read back")
    with _atomic(path) as temporary:
        Path(temporary).write_text("".join(lines), encoding="utf-8")


# ---------------------------------------- opening, decoding

@contextmanager
def _open(path):
    """The file as a PyAV container; whatever FFmpeg says while it is open becomes a MediaError.
    A Python file is handed over, not its name: 'concat:x', 'a%d.jpg' or a URL stay plain names."""
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
    """The first stream of that kind, on one thread: loader workers, not threads, fill the cores."""
    if not (found := _streams(container, kind)):
        has = ", ".join(f"{s.type} ({getattr(s.codec_context, 'name', 'unknown codec')})"
                        for s in container.streams) or "nothing"
        raise MediaError(f"{path}: no {kind} stream, it holds {has}; name another file or drop it")
    if found[0].codec_context is None:
        raise MediaError(f"{path}: no decoder for its {kind}; convert it (ffmpeg -i in out.mp4)")
    found[0].codec_context.thread_type, found[0].codec_context.thread_count = "NONE", 1
    return found[0]


def _origin(container):
    """The presentation's first moment on the file's own clock, in seconds: an exact fraction."""
    streams = _streams(container, "video") + _streams(container, "audio")
    return min((s.start_time * s.time_base for s in streams if s.start_time is not None),
               default=Fraction(0))


def _stream_end(container, stream):
    """Where the stream ends, by its header, else the container's, else by reading every packet."""
    if stream.duration and stream.start_time is not None:
        return float((stream.start_time + stream.duration) * stream.time_base - _origin(container))
    header = (container.duration or 0) / av.time_base - float(_origin(container))
    if header > 0:                        # Matroska and FLV: the time at the end, not a length
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
    """kind: "video", "audio" or "image"; seconds: of the picture, or of the sound without one."""
    kind: str
    seconds: float
    has_audio: bool


def probe(path):
    """Decides by content, not by suffix; cover art of a song is no video."""
    with _open(path) as container:
        has_audio = bool(_streams(container, "audio"))
        if not _streams(container, "video"):
            return Media("audio", _stream_end(container, _stream(container, "audio", path)), True)
        if not has_audio and _is_image(container):
            return Media("image", 0.0, False)
        return Media("video", _stream_end(container, _stream(container, "video", path)), has_audio)


def _timed_frames(container, stream, path, clock):
    """Every decoded frame as (start, seconds, frame) in presentation time. A frame without a stamp
    starts where the one before ended (raw H.264); clock: the first one's start, None = unknown."""
    origin, broken, sound = float(_origin(container)), 0, stream.type == "audio"
    tick, ticks = stream.time_base.numerator, stream.time_base.denominator    # Fractions are slow
    packets = container.demux(stream)
    while True:
        try:
            if (packet := next(packets, None)) is None:
                break
            decoded = packet.decode()
        except av.FFmpegError:            # one broken packet does not end a film
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
    """(start, seconds, frame) of every frame from one at or before `start` on, near it if the file
    can seek. A seek may land late (B-frames, sparse keyframes, bad indices), which shows in the
    first frame's time: then from further back, at last from the beginning."""
    for back in (2, 60, None):                # seconds; 2 also warms up AAC, MP3 and Opus decoders
        if back is not None and start - back < 1:
            continue                          # the beginning is as near
        with _open(path) as container:
            stream = _stream(container, kind, path)
            if back is not None:
                ticks = (Fraction(start) - back + _origin(container)) / stream.time_base
                try:
                    container.seek(int(ticks), stream=stream)      # to the keyframe before
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
    """start and end as seconds inside the stream that ends at `declared`."""
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
                      "cut off or its header wrong; going on with what is there", stacklevel=3)


# ---------------------------------------- pictures

class _Shown:
    """A decoded frame; turned and resized at most once, and only if some target needs it."""
    def __init__(self, time, frame, shrink, reformatter):
        self.time, self.frame, self.shrink, self.reformatter = time, frame, shrink, reformatter

    @cached_property
    def pixels(self):
        return self.shrink(_upright(self.frame, self.reformatter))[0]         # (3,size,size)


def _upright(frame, reformatter, full_chroma=False):
    """uint8 (1,H,W,3), turned as its display matrix (phones) or EXIF says: `rotation` is in degrees
    anticlockwise, and so is rot90. PyAV does not tell mirrored EXIF (2, 4, 5, 7) apart. Grey,
    16 bits, palette, CMYK become RGB; alpha is dropped, the colour below it shows.  One reformatter
    for all frames of a file: a frame's own would be set up anew each time, 2 ms."""
    turns = round(frame.rotation / 90)
    if full_chroma:
        frame = frame.reformat(format=re.sub("4(20|22|11|40|10)p", "444p", frame.format.name))
    rgb = reformatter.reformat(frame, format="rgb24").to_ndarray()                    # (H,W,3)
    return np.ascontiguousarray(np.rot90(rgb, turns))[None]


def _regular(start, end, fps):
    """A frame every 1/fps s: (time, slot, at_or_after); what is on screen at that time."""
    count = max(1, math.ceil((end - start) * fps - TICK))
    return [(start + i / fps, i, False) for i in range(count)]


def _ends(start, end, fps):
    """The released code's rule: first and last frame of every second [a, a+1); a last part
    of a second is moved back to [end - 1, end). fps has no say."""
    count = max(1, math.ceil(end - start - TICK))
    firsts = [max(start, min(start + k, end - 1)) for k in range(count)]
    return ([(a, 2 * k, True) for k, a in enumerate(firsts)] +
            [(min(a + 1, end) - 2 * TICK, 2 * k + 1, False) for k, a in enumerate(firsts)])


FRAME_TIMES = {"regular": _regular, "ends": _ends}


def read_frames(path, fps=2.0, size=224, start=None, end=None, frame_times="regular",
                antialias=True):
    """-> uint8 (F,3,size,size), and the times of the F decoded frames. antialias=False: floats of
    the same range, resized as the released code does (vit_qformer.resize_plain).
    The frame of target t is the one on screen: the last with time <= t, or the file's first one.
    One sequential pass that ends with the last target; seeking to each is 7 times slower."""
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
    shrink = partial(resize if antialias else resize_plain, size=size)
    for time, seconds, frame in _decode(path, "video", start):
        new = _Shown(time, frame, shrink, reformatter)
        while pending:
            target, slot, at_or_after = pending[0]
            if time < target - TICK if at_or_after else time <= target + TICK:
                break                                             # only a later frame can tell
            pick = new if at_or_after or shown is None else shown
            chosen[slot] = (pick.pixels, pick.time)
            pending.popleft()
        if not pending:
            break
        shown, shown_until = new, max(shown_until, time + seconds)
    if shown is None and not chosen:
        raise MediaError(f"{path}: no frame can be decoded; make it again or drop it")
    if pending:                                                   # the last frame stays on screen
        _warn_if_short(path, "the picture", shown_until, end)
        truncated = shown_until < end - 1
        for target, slot, _ in pending:
            if not truncated or target < shown_until:
                chosen[slot] = (shown.pixels, shown.time)
    if not chosen:
        raise MediaError(f"{path}: start {start} s is beyond its end, the picture decodes up to "
                         f"{shown_until:.3f} s; correct the times or drop the record")
    pixels, times = zip(*(chosen[slot] for slot in sorted(chosen)), strict=True)
    return torch.stack(pixels), list(times)


def read_image(path, size=224):
    """-> uint8 (1,3,size,size); the first picture of an animation. Chroma is brought to full
    width before colours are mixed: 0.1 of 255 from PIL on a photo, else 1.5 (as for videos)."""
    with _open(path) as container:
        stream = _stream(container, "video", path)
        if container.format.name not in ("gif", "apng") and not _is_image(container):
            raise MediaError(f"{path}: a video, wanted a still image; name it under 'video'")
        if len(_streams(container, "video")) > 1:                 # HEIC of phones
            raise MediaError(f"{path}: a picture in several parts (tiles); convert it to jpg")
        for _, _, frame in _timed_frames(container, stream, path, 0.0):
            return resize(_upright(frame, VideoReformatter(), full_chroma=True), size)
    raise MediaError(f"{path}: no picture can be decoded; make it again or drop it")


# ---------------------------------------- sound

class _Mono16k:
    """Decoded audio frames -> one float32 track at 16 kHz whose sample 0 is time `start`.

    Frames go to their place on the grid of source samples (gaps are silence, overlaps are cut), and
    only then through the resampler. The grid starts at a whole number of 10 ms (441 samples of
    44.1 kHz = 160 of 16 kHz), so a window has the very samples that the full track has."""

    def __init__(self, rate, start, stop):
        common = math.gcd(rate, AUDIO_RATE)
        block_in, block_out = rate // common, AUDIO_RATE // common
        blocks = max(0, math.floor((start - 0.1) * common))       # 0.1 s: the filter's own start
        self.rate, self.position, self.expected = rate, blocks * block_in, None
        self.skip = round(start * AUDIO_RATE) - blocks * block_out
        self.mixers, self.chunks, self.waiting, self.held = {}, [], [], 0
        self.limit = math.inf if stop == math.inf else math.ceil((stop + 0.1) * rate)
        # Floats, one channel to one channel: no gain here.  16 kHz stay what they are.
        self.resampler = (None if rate == AUDIO_RATE else
                          av.AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE))

    def _channels(self, frame):
        """-> a list of (S,) float32 or of pairs of them, left and right, whose mean is the sound.
        Mixing to mono as *integers* weighs stereo 0.5 + 0.5; as floats it is 0.71 + 0.71, 3 dB too
        loud (test_stereo_mix). 32 bits: Whisper's own 16-bit track to 1.5e-5.  AAC's own floats in
        stereo or mono are mixed in _flush, which is faster."""
        if frame.format.name == "fltp" and frame.layout.name in ("mono", "stereo"):
            # a plane's buffer is longer than its samples; to_ndarray() takes three times as long
            return [[np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes]]
        kind = (frame.format.name, frame.layout.name, frame.sample_rate)  # may change midway (TV)
        if kind not in self.mixers:
            self.mixers[kind] = av.AudioResampler(format="s32", layout="mono", rate=self.rate)
        return [[np.frombuffer(mixed.planes[0], np.int32, mixed.samples).astype(np.float32)
                 * 2.0 ** -31] for mixed in self.mixers[kind].resample(frame)]

    def add(self, time, frame):
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
        """What waits is mixed and resampled, about a second at a time: a call costs more than a
        frame's 1024 samples."""
        if not self.waiting:
            return
        samples = np.concatenate([channels[0] for channels in self.waiting])
        if any(len(channels) > 1 for channels in self.waiting):
            samples += np.concatenate([channels[-1] for channels in self.waiting])
            samples *= np.float32(0.5)                           # one channel: (x + x) / 2
        self.waiting, self.held = [], 0
        if self.resampler is None:
            self.chunks.append(samples)
        else:
            frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
            frame.sample_rate = self.rate
            self.chunks += [f.to_ndarray()[0] for f in self.resampler.resample(frame)]

    def finish(self, samples):
        self._flush()
        if self.resampler is not None:
            self.chunks += [f.to_ndarray()[0] for f in self.resampler.resample(None)]  # last 1 ms
        track = np.concatenate([np.zeros(0, np.float32), *self.chunks])[self.skip:][:samples]
        return torch.from_numpy(track.clip(-1, 1))                # as 16 bits would


def read_audio(path, start=None, end=None):
    """-> float32 (S,), 16 kHz mono, sample 0 at `start`; ends at `end` or where the sound ends (AAC
    without an edit list: up to 64 ms of padding later). A window costs its own length only."""
    with _open(path) as container:
        stream = _stream(container, "audio", path)
        declared = _stream_end(container, stream)
    start, _ = _window(path, "audio", start, end, declared)
    stop = math.inf if end is None else float(end)                # MP3 headers are estimates
    track, reached = None, 0.0
    for time, seconds, frame in _decode(path, "audio", start):
        track = track or _Mono16k(frame.sample_rate, start, stop)
        track.add(time, frame)
        reached = time + seconds
        if reached > stop + 0.05:                                 # 50 ms more: the filter's tail
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


# ---------------------------------------- clips

@dataclass
class Clip:
    """What one question is about. A text-only record has neither frames nor sound."""
    frames: torch.Tensor | None = None        # uint8 (F,3,224,224), or floats; an image is F = 1
    audio: torch.Tensor | None = None         # float32 (S,), 16 kHz
    is_image: bool = False
    fps: float = 2.0
    cut: str = ""                             # what max_seconds left out, in words

    @property
    def seconds(self):
        """The longer of picture and sound; an image has no length of its own."""
        picture = 0 if self.frames is None or self.is_image else len(self.frames) / self.fps
        return max(picture, 0 if self.audio is None else len(self.audio) / AUDIO_RATE)


@dataclass
class Features:
    """What the frozen encoders make of one clip and one question; either part may be None."""
    visual: torch.Tensor | None = None       # (F,V,D_v)
    audio: torch.Tensor | None = None        # (S,D_a)
    is_image: bool = False


@dataclass
class Sample:
    """One row of a batch: a question about a clip (or about its kept features), and the answer.
    mask: "audio", "visual" or "both" fills that modality with zeros (Tables 2 and 3)."""
    prompt: str
    target: str | None = None
    clip: Clip | None = None
    features: Features | None = None
    history: tuple = ()
    mask: str | None = None


def load_clip(record, fps=2.0, size=224, frame_times="regular", max_seconds=None, antialias=True,
              sound_only=False):
    """Record -> Clip. start, end and max_seconds hold for the video, its sound and an audio file.
    A video's own sound is cut where its picture ends; a silent video gives audio None.
    sound_only: pictures stay unread, for models that do not look."""
    start, end = record.start or 0.0, record.end
    if max_seconds:
        end = min(math.inf if end is None else end, start + max_seconds)
    clip = Clip(is_image=record.image is not None, fps=2.0 if frame_times == "ends" else fps)
    if record.image is not None and record.video is not None:
        raise ValueError(f"record {record.id!r} has an image and a video; keep one of the two")
    if record.image is not None and not sound_only:
        clip.frames = read_image(record.image, size)
    if record.video is not None:
        media = probe(record.video)
        if not sound_only:
            clip.frames, _ = read_frames(record.video, fps, size, start, end, frame_times,
                                         antialias)
        if media.has_audio and record.audio is None:
            ends = [seconds for seconds in (media.seconds, end) if seconds]
            clip.audio = read_audio(record.video, start, min(ends, default=None))
    if record.audio is not None:
        clip.audio = read_audio(record.audio, start, end)
    clip.cut = _cut(record, clip, max_seconds)
    if clip.cut:
        warnings.warn(f"{record.video or record.audio}: {clip.cut}", stacklevel=2)
    return clip


def _cut(record, clip, most):
    """'the first 300 of 10800.0 s are read', where max_seconds cut a clip."""
    path, start = record.video or record.audio, record.start or 0.0
    if not most or not path or clip.seconds < most - 0.5:
        return ""
    ends = [end for end in (probe(path).seconds, record.end) if end]
    left = min(ends, default=0.0) - start
    return f"the first {most:g} of {left:.1f} s are read" if left > most + 0.5 else ""


def clip_from_path(path, audio=None, start=None, end=None, **options):
    """Any video, sound or image file, told apart by content -> Clip; `audio` names other sound for
    a video or an image. options: load_clip's."""
    kind = probe(path).kind
    if kind == "audio" and audio is not None:
        raise MediaError(f"{path}: sound only, and audio={audio} is sound too; pass one of them")
    media = {"audio": audio, kind: str(path)}
    return load_clip(Record(str(path), "", "", start=start, end=end, **media), **options)


def load_or_skip(record, skipped, **options):
    """load_clip, or None for a file that cannot be read: then (id, reason) joins the list `skipped`
    (a DataLoader worker has its own copy of that list: return it with the batch)."""
    try:
        return load_clip(record, **options)
    except MediaError as error:
        skipped.append((record.id, str(error)))


def report_skipped(skipped, total):
    """One line for the log: how many of how many, and the first three reasons."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"skipped {len(skipped)} of {total}" + (f": {reasons}{more}" if skipped else "")


# ---------------------------------------- writing

@contextmanager
def _atomic(path):
    """A temporary name beside `path`, same suffix, that takes its place only when all went well."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield str(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_video(path, frames, fps, audio=None, audio_rate=AUDIO_RATE):
    """uint8 (F,H,W,3) [+ float32 (S,)] -> H.264 [+ AAC] mp4."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames) \
            or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: frames are {frames.dtype} {frames.shape}; wanted uint8 "
                         "(F,H,W,3), F >= 1, even H and W (H.264 halves its chroma)")
    with _atomic(path) as temporary, av.open(temporary, "w") as container:
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
            for frame in [*decoded, None]:                                        # None: flush
                container.mux(stream.encode(frame))


def write_wav(path, audio, rate=AUDIO_RATE):
    """float32 (S,) in [-1,1] -> 16-bit mono wav."""
    samples = np.clip(np.round(np.asarray(audio, np.float32) * 32768), -32768, 32767)
    with _atomic(path) as temporary, wave.open(temporary, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_png(path, image):
    """uint8 (H,W,3) -> png."""
    image = np.ascontiguousarray(image)
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = *image.shape[:2], "rgb24"
    codec.time_base = Fraction(1)
    packets = codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + codec.encode(None)
    with _atomic(path) as temporary:
        Path(temporary).write_bytes(b"".join(bytes(packet) for packet in packets))
