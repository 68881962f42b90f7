"""The media decoder: files that people really have -> frames and sound on one clock, and back.

     video --read_frames--> (F,3,size,size), times     the frame on screen every 1/fps s
     image --read_image---> (1,3,size,size)
     sound --read_audio---> (S,) float32, 16 kHz mono
     write_video, write_wav, write_png                  the other way, atomically
Time 0 of a file is its first picture or sound, whichever comes first, so that both stay in step.
FFmpeg (through PyAV) decodes.  This file adds what datasets need: variable frame rates, late
streams, rotation, cover art, seeks that land late, gaps in the sound, clocks that jump, broken
packets and files that are cut off, and errors that say what to do.  FFmpeg may open nothing but the
file itself.  Whatever a header claims, a call returns at most 3 hours of sound and 7200 frames
(1 hour at 2 per second), and reads pictures of at most 120 million pixels.

Public: MediaError, Media, probe, read_frames, read_image, read_audio, write_video, write_wav,
write_png, AUDIO_RATE."""

import heapq
import math
import mmap
import os
import re
import struct
import warnings
import wave
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, wraps
from itertools import chain

import av
import numpy as np
import torch
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import VideoReformatter

from runtime.hub import atomic

AUDIO_RATE = 16_000       # samples per second, the rate of Whisper
TICK = 1e-6               # s; times closer than this are equal (MPEG's own clock ticks at 1.1e-5)
JITTER = 0.015            # s; a smaller error of a sound's time is rounding, a lost packet is 20 ms
LATE = 0.026              # s; a picture may be stamped so much late: 25 ms is the delay of MP3
SLIDE = 0.4               # s; what is shown for longer is a slide
MOST_FRAMES = 7200        # per call; 1.1 GB of 224 x 224 pixels
MOST_SECONDS = 3 * 3600   # of sound per call; 0.7 GB
SAMPLE_RATES = (1000, 768_000)                    # samples per second that a source may have
JUMP, BACK = 10.0, 0.1    # s; ffmpeg's rule for a clock that jumps forward or back
LOST_STAMP = 30 * 3600.0  # s; in formats with one clock, ffmpeg ignores stamps so far away
TS_DISCONT = 0x200        # FFmpeg's flag of formats whose clock may jump: MPEG-TS and -PS, Ogg
GENERIC_INDEX = 0x100     # and of those that it indexes itself: mostly raw sound without a clock
NO_STAMPS = 0x80          # and of those that store no time stamps: raw video, raw sound
GENPTS = 0x1              # FFmpeg's flag to guess missing time stamps
ATTACHED = av.stream.Disposition.attached_pic     # cover art is a "video" stream, but no video
# Playlists, and what makes a picture or a sound of any text.
FORMATS = ",".join(sorted(av.formats_available - {"concat", "dash", "hls", "imf", "rtsp", "sdp",
                                                  "sbg", "tty"}))
DEFAULT = av.stream.Disposition.default
PICTURE_PIXELS = 120_000_000                      # 12000 x 10000; reading one takes at most 2 GB
VIDEO_PIXELS = 36_000_000                         # 8192 x 4352, of which H.264 keeps up to 17
COLOUR_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)        # numbers of ITU-T H.273 that FFmpeg converts
ONLY_THE_FIRST = ("wav", "aiff", "mov", "flv")    # formats of which FFmpeg reads one file only
STAMPING = ("mov,mp4", "matroska")                # those that store when each picture is shown
SKIPPED_IN = ("h264", "hevc", "vp9", "av1", "mpeg4")      # codecs that are decoded in part
LENGTH_SIZE = {"h264": 4, "hevc": 21}         # where a header says how long lengths of units are
REORDERED = 32                                # packets; H.264 and HEVC reorder at most 16
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"          # the parts of Matroska
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof", b"styp", b"sidx", b"mfra",
         b"uuid", b"meta", b"emsg", b"prft", b"pdin")                   # and those of MP4
HEIF = ("avif", "avis", "heic", "heix", "hevc", "hevx", "mif1", "msf1")        # brands of files


class MediaError(ValueError):
    """A file that cannot give what was asked for; the message starts with its path."""


# ---------------------------------------- opening, decoding

@contextmanager
def _errors(path):
    """Inside, every error of FFmpeg, and of arithmetic on the numbers of a file, becomes a
    MediaError."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file; correct the path or drop the record") from None
    except (av.FFmpegError, OSError) as error:
        raise MediaError(f"{path}: not readable as media ({error.strerror}); it is cut off, "
                         "broken or of another type; make it again or drop it") from error
    except (ValueError, ArithmeticError, MemoryError, IndexError) as error:  # of PyAV and NumPy
        raise MediaError(f"{path}: not readable as media ({type(error).__name__}: {error}); "
                         "convert it (ffmpeg -i in out.mp4) or drop it") from error


@contextmanager
def _open(path):
    """The file as a PyAV container.  FFmpeg gets an open Python file, as it would interpret names
    like 'concat:x' or 'a%d.jpg'.  It gets no protocol and no format of playlists, so that the file
    cannot make it open other files or URLs.
    PyAV asks FFmpeg to guess missing time stamps, but for B-frames in AVI it guesses wrong."""
    with _errors(path):
        if os.path.getsize(path) == 0:
            raise MediaError(f"{path}: empty (0 bytes); copy or download it again")
        options = {"max_pixels": str(PICTURE_PIXELS), "protocol_whitelist": "none",
                   "format_whitelist": FORMATS}
        with open(path, "rb") as file, \
                av.open(file, options=options, metadata_errors="replace") as container:
            container.flags &= ~GENPTS
            yield container


def _streams(container, kind):
    found = [s for s in container.streams if s.type == kind and not s.disposition & ATTACHED]
    if kind == "video" and container.metadata.get("major_brand") in HEIF:
        # Alpha, depth and thumbnails are streams, too.  An animation has its first picture besides,
        # but only tracks have a length.  Tiles of a larger picture remain: none is the default.
        found = ([s for s in found if s.duration][:1] or
                 [s for s in found if s.disposition & DEFAULT] or found)
    return found


def _best(container, kind):
    """FFmpeg's choice among the streams of that kind, or None: the default one, then the one with
    more frames and bits.  Should it choose cover art, the first default or the first is taken."""
    found, best = _streams(container, kind), container.streams.best(kind)
    if best in found or not found:
        return best if found else None
    return next((s for s in found if s.disposition & DEFAULT), found[0])


def _stream(container, kind, path):
    """The stream of that kind to read.  It decodes on one thread, because the loader's worker
    processes already use all cores."""
    if (stream := _best(container, kind)) is None:
        has = ", ".join(f"{s.type} ({getattr(s.codec_context, 'name', 'unknown codec')})"
                        for s in container.streams) or "nothing"
        raise MediaError(f"{path}: no {kind} stream, it holds {has}; name another file or drop it")
    if stream.codec_context is None:
        raise MediaError(f"{path}: no decoder for its {kind}; convert it (ffmpeg -i in out.mp4)")
    stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
    if kind == "video":
        stream.codec_context.options = {"max_pixels": str(
            PICTURE_PIXELS if _is_image(container) else VIDEO_PIXELS)}
    return stream


def _origin(container, stream):
    """Time 0 of a stream on the file's own clock: an exact fraction, seconds.  It is the first
    moment of picture or sound.  A picture that starts up to 26 ms after the sound counts as
    starting with it; otherwise each slide of a WebM would be late by the delay of its Opus track
    (test_slides_stamped_late)."""
    starts = {s.index: s.start_time * s.time_base
              for s in (_best(container, "video"), _best(container, "audio"))
              if s is not None and s.start_time is not None}
    first = min(starts.values(), default=Fraction(0))
    own = starts.get(stream.index, first)
    return own if stream.type == "video" and own - first <= LATE else first


def _stream_end(container, stream, path):
    """The time at which the stream ends, in seconds: from its own header, otherwise from the
    container's, otherwise by reading every packet.  Where every packet has been read for the
    clock's sake, that counts: headers do not know of jumps, and FFmpeg guesses the end of MPEG."""
    origin = float(_origin(container, stream))
    _, ends = _joints(container, path)
    if ends:
        return ends.get(stream.index, origin) - origin
    if stream.duration and stream.start_time is not None:
        return float((stream.start_time + stream.duration) * stream.time_base) - origin
    raw = stream.type == "video" and container.format.flags & NO_STAMPS
    if raw:                      # its "header" is a guess from the bit rate
        _warn_if_no_rate(stream, path)
    header = (container.duration or 0) / av.time_base - origin
    if header > 0 and not raw:   # in Matroska and FLV this is the time at the end, not a length
        return header
    last = total = 0.0
    for packet in container.demux(stream):
        seconds = float((packet.duration or 0) * stream.time_base)
        if raw and packet.size and seconds < 0.001:            # unknown; 25 is FFmpeg's choice
            seconds = 1 / 25
        total += seconds
        stamp = packet.pts if packet.pts is not None else packet.dts
        if stamp is not None:
            last = max(last, float(stamp * stream.time_base) - origin + seconds)
    return max(last, total)


def _joined_packets(container):
    """Yields (packet, shift) of picture and sound.  Where the clock jumps, as in `cat a.ts b.ts`,
    shift (s) changes and the packets' stamps are moved by it, so that the parts follow each other.

    The rule is ffmpeg's: a packet more than 10 s away from the end of the last one of its stream,
    or more than 0.1 s before that one, moves the clock of all streams alike, which stay in step."""
    shift, started, ended, latest = 0.0, {}, {}, None
    streams = [s for s in (_best(container, "video"), _best(container, "audio")) if s is not None]
    bases = {s.index: float(s.time_base) for s in streams}         # seconds per tick
    for packet in container.demux(streams):
        key, dts = packet.stream.index, packet.dts
        base = bases[key]
        if dts is not None:
            time = dts * base + shift
            wanted = ended.get(key, latest)
            if wanted is not None and (abs(time - wanted) > JUMP or
                                       (key in started and time + BACK < started[key])):
                shift, time = shift + wanted - time, wanted
            seconds = (packet.duration or 0) * base
            if seconds < 0.001 and key in started:               # unknown: as the packet before it
                seconds = time - started[key]
            started[key], latest, ended[key] = time, time, time + max(seconds, 0.0)
        elif key in ended:                                   # it follows the packet before it
            ended[key] += (packet.duration or 0) * base
        if shift:
            ticks = round(shift / base)
            if packet.pts is not None:
                packet.pts += ticks
            if packet.dts is not None:
                packet.dts += ticks
        yield packet, shift


def _joints(container, path):
    """-> how often the clock of the file jumps, and where each stream then ends: {index: seconds on
    the file's own clock}.  In the formats where that may happen, and where a second file is
    appended to the first, this reads every packet, once per process and file."""
    format, appended = container.format, _appended(*_state(path))
    if format.name.startswith(ONLY_THE_FIRST) or not (appended or format.flags & TS_DISCONT):
        return 0, {}
    return _read_joints(*_state(path), appended)


def _state(path):
    state = os.stat(path)
    return str(path), state.st_size, state.st_mtime_ns


@lru_cache(maxsize=4096)
def _appended(path, size, changed):
    """Whether a second file follows inside this one, as in `cat a.avi b.avi`.  The header counts
    only the first one, and FFmpeg cannot seek in the second."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head.startswith((b"fLaC", b"FLV")):     # these do not tell where they end
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(head, 8) > 0
        at, seen = 0, set()
        for _ in range(20_000):
            file.seek(at)
            name, length = _part(file.read(16))
            if name in seen or not 8 <= length <= size - at:
                return name in seen
            seen |= {name} & {b"AVI ", b"WAVE", b"AIFF", b"moov", EBML}
            at += length
    return False


def _part(head):
    """First 16 bytes of a part of an AVI, WAV, AIFF, MP4 or Matroska file -> its name, length."""
    if head[:4] in (b"RIFF", b"FORM"):
        length = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        return head[8:12], 8 + length + length % 2
    if head[:4] in (EBML, SEGMENT) and head[4:5] > b"\0":
        n = 9 - head[4].bit_length()               # the length is a number of n bytes
        length = int.from_bytes(head[4:4 + n], "big") & ((1 << 7 * n) - 1)
        return head[:4], 4 + n + length
    long = head[:4] == b"\0\0\0\1"
    length = int.from_bytes(head[8:16] if long else head[:4], "big")
    return head[4:8], length if head[4:8] in BOXES else 0


@lru_cache(maxsize=4096)
def _read_joints(path, size, changed, appended):
    joints, shift, ends, read = int(appended), 0.0, {}, 0
    # A packet without a time stamp (MPEG-PS stamps few) is decoded when the one before it ends, and
    # shown at most `delay` ticks later.
    decoded, delay, unstamped = {}, {}, set()
    with _open(path) as container:
        try:
            for packet, moved in _joined_packets(container):
                if moved != shift:
                    joints, shift = joints + 1, moved
                read = max(read, (packet.pos or 0) + packet.size)
                stream, pts, dts = packet.stream, packet.pts, packet.dts
                key, duration = stream.index, packet.duration or 0
                if None not in (pts, dts):
                    delay.setdefault(key, pts - dts)
                if dts is None and key not in decoded:
                    dts = int(_origin(container, stream) / stream.time_base)
                decoded[key] = (decoded[key] if dts is None else dts) + duration
                if pts is not None:
                    ends[key] = max(ends.get(key, -math.inf), pts + duration)
                elif packet.size:                    # the last packet is empty, without any stamp
                    unstamped.add(key)
        except (av.FFmpegError, IndexError):  # the file breaks off; what came before is known
            pass
        for key in unstamped:
            ends[key] = max(ends.get(key, -math.inf), decoded[key] + delay.get(key, 0))
            _warn_if_no_rate(container.streams[key], path)
        if appended and read < 0.9 * size:        # of three Matroska files it finds two
            warnings.warn(f"{path}: several files in one, of which only the first "
                          f"{read / size:.0%} are read; take them apart or join them (ffmpeg -f "
                          "concat)", stacklevel=2)
        return joints, {key: float(end * container.streams[key].time_base)
                        for key, end in ends.items()}


def _is_image(container):
    name, stream = container.format.name, _streams(container, "video")[0]
    if name == "webp_pipe":
        with open(container.name, "rb") as file:
            head = file.read(21)
        if head[12:16] == b"VP8X" and head[20] & 2:
            raise MediaError(f"{container.name}: an animated WebP, which FFmpeg cannot decode; "
                             "convert it to a gif or mp4 (Pillow can), or drop it")
    if name in ("gif", "apng"):
        return stream.frames == 1
    return (name == "ico" or "image2" in name or name.endswith("_pipe") or
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
            stream = _best(container, "audio") or _stream(container, "audio", path)
            return Media("audio", _stream_end(container, stream, path), True)
        if not has_audio and _is_image(container):
            return Media("image", 0.0, False)
        return Media("video", _stream_end(container, _best(container, "video"), path), has_audio)


def _decoded(packets, stream, path):
    """Yields every decoded frame, and by how many ticks the decoder has held it back: AVI numbers
    packets, not pictures.  The pts that FFmpeg gives the B-frames of MPEG-4 are such numbers, too.
    0 where the file has real time stamps."""
    first_dts = before = delay = None
    broken = 0
    while True:
        try:
            if (packet := next(packets, None)) is None:
                break
            if first_dts is None and packet.is_keyframe:
                first_dts = packet.dts
            elif delay is None and None not in (first_dts, before, packet.dts, packet.pts):
                first_dts += packet.dts - before     # a B-frame lost by a seek: no picture follows
            before = packet.dts
            decoded = packet.decode()
        # The rest of the file may still be good.  PyAV raises an IndexError at the end of a file in
        # which a stream turns up that its header does not name.
        except (av.FFmpegError, IndexError):
            broken += 1
            if broken > 1000:
                break
            continue
        for frame in decoded:
            if delay is None:
                held = frame.pts is None and None not in (frame.dts, first_dts)
                delay = frame.dts - first_dts if held else 0
            yield frame, delay
    if broken:
        warnings.warn(f"{path}: {broken} broken {stream.type} packets were left out", stacklevel=4)


# ---------------------------------------- decoding in part
# At 30 pictures per second two of them are looked at.  Packets tell when their pictures are shown,
# so _read_frames first chooses among stand-ins in order of time (_Plan.stamps), before anything is
# decoded, and then among the pictures that it wants and stand-ins for the others (_Plan.pictures):
#
#     in order of decoding   I0 P4 B2 b1 b3 P8 B6 b5 b7 | I9 ...      nothing refers to a b
#     chosen                 I0          b3             | I9
#     decoded                I0 P4 B2 -- b3 -- -- -- -- | I9
#
# The decoder gets no picture that was not chosen and to which no other refers, and none behind the
# last choice of a group, if the next keyframe starts anew.  H.264, HEVC and MPEG-4 mark pictures to
# which no other refers; of VP9 and AV1 only the rest of a group is left out.  All times are seen as
# if every picture were decoded, and the pictures are the same to the bit.  Where packets and the
# decoder disagree, _Unexpected is raised; then every picture is decoded.  Damage is neither seen
# where nothing is decoded, nor does it harm there.

class _Unexpected(Exception):
    """Every picture of the file must be decoded."""


@dataclass(frozen=True, order=True)
class _Skipped:
    """A stand-in for a picture that was not decoded."""
    pts: int
    duration: int
    dts: None = None


def _told(source):
    """The generator `source`, of which an error of FFmpeg is an _Unexpected."""
    @wraps(source)
    def wrapped(*args):
        try:
            yield from source(*args)
        except (av.FFmpegError, IndexError) as error:        # IndexError: as in _decoded
            raise _Unexpected from error
    return wrapped


class _Plan:
    """Which pictures of a file are decoded.  A picture is known by its pts."""

    @_told
    def stamps(self, packets, stream, path):
        """In place of the decoder: packets -> (stand-in, 0) of every picture, in order of time."""
        codec = stream.codec_context
        self.codec, self.reorders = codec.codec.canonical_name, codec.has_b_frames
        if not stream.container.format.name.startswith(STAMPING) or self.codec not in SKIPPED_IN:
            raise _Unexpected
        place, extra = LENGTH_SIZE.get(self.codec), codec.extradata or b""
        if place and not (extra[:1] == b"\1" and len(extra) > place and extra[place] & 3 == 3):
            raise _Unexpected
        self.groups = []          # pts in order of decoding, a list from each keyframe on
        self.wanted = set()       # those that must be decoded
        self.leading = set()      # those that refer to what is before the first packet
        self.rest = set()         # others that the decoder need not see
        self.spare = {}           # {those to which no other of their sub-layer refers: sub-layer}
        self.resets = set()       # keyframes behind which nothing refers to what is before them
        self.layer = 0            # the highest sub-layer, to which no other one refers
        self.waiting, self.last = [], -math.inf
        for packet in _filled(packets):
            if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata") or (
                    not self.groups and not packet.is_keyframe):
                raise _Unexpected
            if packet.is_keyframe:
                self.groups.append([])
            elif len(self.groups) == 1 and packet.pts < self.groups[0][0]:
                self.leading.add(packet.pts)
                continue
            self.groups[-1].append(packet.pts)
            referred, layer, resets = _references(packet, self.codec)
            self.layer = max(self.layer, layer)
            if resets:
                self.resets.add(packet.pts)
            if not referred:
                self.spare[packet.pts] = layer
            if not packet.is_discard:                    # decoded for those after it, never shown
                self.push(packet)
            if len(self.waiting) > REORDERED:
                yield self.pop(), 0
        self.groups.append([math.inf])
        while self.waiting:
            yield self.pop(), 0

    def choose(self, chosen):
        """chosen: the pts of the pictures that the reader looks at."""
        stamps = [*chain.from_iterable(self.groups)]
        if len(set(stamps)) < len(stamps) or (self.leading and stamps[0] in chosen) or (
                self.reorders and stamps == sorted(stamps)):     # they tell the order of decoding
            raise _Unexpected
        self.wanted |= chosen
        for group, following in zip(self.groups, self.groups[1:], strict=False):
            if following[0] in self.resets and max(group) < following[0] == min(following):
                last = max((i for i, stamp in enumerate(group) if stamp in self.wanted), default=-1)
                self.rest.update(group[last + 1:])

    @_told
    def pictures(self, packets, stream, path):
        """In place of the decoder: packets -> (picture or stand-in, 0), in order of time."""
        codec, jumped, self.given = stream.codec_context, False, set()
        codec.options |= {"err_detect": "explode"}               # an error, where it would guess
        self.waiting, self.last = [], -math.inf
        for packet in _filled(packets):
            if packet.pts in self.leading:
                continue
            if not packet.is_discard:
                self.push(packet)
            if packet.pts in self.rest:
                jumped = True
                continue
            if jumped:
                yield from self.in_order(codec.decode(None))
                codec.flush_buffers()
                jumped = False
            if packet.pts in self.wanted or self.spare.get(packet.pts) != self.layer:
                self.given.add(packet.pts)
                yield from self.in_order(packet.decode())
        yield from self.in_order(codec.decode(None))
        yield from self.stand_ins(math.inf)

    def in_order(self, frames):
        for frame in frames:
            if frame.pts is None or frame.is_corrupt or frame.interlaced_frame:
                raise _Unexpected
            yield from self.stand_ins(frame.pts)
            if not self.waiting or self.pop().pts != frame.pts:
                raise _Unexpected
            yield frame, 0

    def stand_ins(self, until):
        while self.waiting and self.waiting[0].pts < until:
            if self.waiting[0].pts in self.given:            # the decoder made nothing of it
                raise _Unexpected
            yield self.pop(), 0

    def push(self, packet):
        if packet.pts < self.last:
            raise _Unexpected
        heapq.heappush(self.waiting, _Skipped(packet.pts, packet.duration or 0))

    def pop(self):
        stand_in = heapq.heappop(self.waiting)
        self.last = stand_in.pts
        return stand_in


def _references(packet, codec):
    """Packet -> whether other pictures of its sub-layer may refer to its own, the sub-layer, and
    whether it is a keyframe that resets the decoder."""
    content, at, units, key = bytes(packet), 0, [], packet.is_keyframe
    while codec in LENGTH_SIZE and at + 5 < len(content):
        units.append(content[at + 4:at + 6])                       # their headers
        at += 4 + int.from_bytes(content[at:at + 4], "big")
    if codec == "h264":
        pictures = [first for first, _ in units if 1 <= first & 31 <= 5]
        referred, layer = any(first & 96 for first in pictures), 0
        key &= any(first & 31 == 5 for first in pictures)
    elif codec == "hevc":
        pictures = [(first >> 1, second & 7) for first, second in units if first >> 1 < 32]
        referred = any(kind > 14 or kind % 2 for kind, _ in pictures)
        layer = max((layer for _, layer in pictures), default=0)
    else:
        kind = content.find(b"\0\0\1\xb6") + 4                   # behind it 2 stands for a B-frame
        pictures, layer = [kind], 0
        referred = codec != "mpeg4" or not 3 < kind < len(content) or content[kind] >> 6 != 2
    return referred or not pictures, layer, key


def _filled(packets):
    """Without the empty packets that mark the end of a stream."""
    return (packet for packet in packets if packet.size)


def _timed_frames(container, stream, path, clock, source=_decoded):
    """Yields every frame of `source` as (start, seconds, frame) in order of time.  A frame without
    a time stamp starts where the frame before it ended (raw H.264).  Times do not go backwards.
    clock: the start of the first frame in seconds, None when it is unknown.

    Where the rate of the sound changes, FFmpeg still counts the stamps of AAC and FLAC at the old
    one.  From there on the samples are counted here; the stamps of containers still tell gaps."""
    origin, sound = float(_origin(container, stream)), stream.type == "audio"
    raw = not sound and container.format.flags & NO_STAMPS        # its stamps are FFmpeg's guesses
    # Two integers, because arithmetic on Fractions would be slow.
    tick, ticks = stream.time_base.numerator, stream.time_base.denominator
    joined = _joints(container, path)[0] > 0
    packets = ((packet for packet, _ in _joined_packets(container)
                if packet.stream.index == stream.index) if joined else container.demux(stream))
    last, last_pts, last_dts, bad_pts, bad_dts = None, -math.inf, -math.inf, 0, 0
    rate, drift, changed = None, math.inf if container.format.flags & GENERIC_INDEX else 0.5, False
    for frame, delay in source(packets, stream, path):
        pts, dts = frame.pts, frame.dts
        # As ffmpeg does: stamps of decoding, where those of presentation are worse or missing.
        if pts is not None:
            bad_pts += pts <= last_pts
            last_pts = pts
        if dts is not None:
            bad_dts += dts <= last_dts
            last_dts = dts
        use_dts = pts is None or (dts is not None and (delay > 0 or bad_pts > bad_dts))
        stamp = None if raw else dts if use_dts else pts
        if sound and frame.sample_rate != rate:
            changed, rate = rate is not None, frame.sample_rate
            if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
                raise MediaError(f"{path}: {rate} samples of sound per second, wanted "
                                 f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[1]}; its header is "
                                 "wrong; make it again or drop it")
        if stamp is not None:
            time = (stamp - delay if use_dts else stamp) * tick / ticks - origin
            if changed and last is not None and abs(time - clock) < drift:
                time = clock
            if last is not None and (time < last - BACK or time > clock + LOST_STAMP):
                if source is not _decoded:
                    raise _Unexpected
                if not joined:
                    joined = True
                    _warn_joined(path)
                origin, time = origin + time - clock, clock
            clock = time if last is None or sound else max(time, last)
        if sound:
            seconds = frame.samples / rate
        else:
            seconds = (frame.duration or 0) * tick / ticks
            if seconds < 0.001:                                            # unknown
                seconds = 1 / float(stream.average_rate or 25)
        yield clock, seconds, frame
        last = clock
        clock = None if clock is None else clock + seconds


def _warn_if_no_rate(stream, path):
    if stream.type == "video" and not getattr(stream.codec_context, "framerate", None):
        warnings.warn(f"{path}: it has pictures without a time stamp and names no frame rate, so "
                      "that times and length are guessed; make it again as mp4", stacklevel=1)


def _warn_joined(path):
    warnings.warn(f"{path}: its clock jumps or starts again, as that of files that were appended "
                  "to each other; the parts are joined", stacklevel=1)      # once per file


def _decode(path, kind, start, source=_decoded):
    """Yields (start, seconds, frame) from a frame at or shortly before `start` seconds on.
    source: what turns packets into frames, _decoded or a method of _Plan.

    A seek may land too late (B-frames, sparse keyframes, bad indices).  The time of the first frame
    shows this; then we seek further back, and in the end read from the beginning.  No seek is
    possible by a clock that jumps."""
    for back in (2, 60, None):        # seconds; decoders of AAC, MP3 and Opus need some to warm up
        if back is not None and start - back < 1:
            continue                              # the beginning is as close
        with _open(path) as container:
            stream = _stream(container, kind, path)
            if source is not _decoded and (_joints(container, path)[0] or _appended(*_state(path))):
                raise _Unexpected
            if _joints(container, path)[0]:
                if back is not None:
                    continue
                _warn_joined(path)
            elif container.format.name.startswith(ONLY_THE_FIRST) and _appended(*_state(path)):
                warnings.warn(f"{path}: a second file is appended to it, which is not read; take "
                              "them apart or join them (ffmpeg -f concat)", stacklevel=1)
            if back is not None:
                ticks = (Fraction(start) - back + _origin(container, stream)) / stream.time_base
                try:
                    container.seek(int(ticks), stream=stream)    # goes to the keyframe before it
                except av.FFmpegError:
                    continue
            rate = stream.codec_context.sample_rate if kind == "audio" else None
            frames = _timed_frames(container, stream, path, 0.0 if back is None else None, source)
            first = next(frames, None)
            if back is not None and (first is None or first[0] is None or first[0] > start or
                                     (rate and first[2].sample_rate != rate)):
                continue                          # where the rate has changed, stamps may be wrong
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
                      "cut off or its header wrong; using what is there", stacklevel=4)


def _warn_too_long(path, what, seconds, most):
    warnings.warn(f"{path}: {what} of {seconds:.0f} s are asked for, only {most:.0f} s are read; "
                  "give a window (start, end)", stacklevel=5)


# ---------------------------------------- pictures

class _Shown:
    """A decoded frame.  `take` turns it into what is kept of it, at most once."""

    def __init__(self, time, frame, take):
        self.time, self.frame, self.take = time, frame, take

    @cached_property
    def kept(self):
        return self.take(self.frame)


def _upright(frame, reformatter, full_chroma=False):
    """Decoded frame -> uint8 (1,H,W,3), turned and mirrored as its display matrix (phones, AVIF) or
    its EXIF orientation demands.  Grey, 16-bit, palette and CMYK pictures become RGB; alpha is
    dropped; the shape of the pixels is not applied, so that an anamorphic picture stays squeezed.
    A colour matrix that FFmpeg cannot convert is taken as unspecified.  All frames of a file share
    one reformatter, because creating one costs 2 ms."""
    if frame.colorspace not in COLOUR_MATRICES:
        frame.colorspace = 2                                                    # unspecified
    if frame.color_range not in (1, 2):
        frame.color_range = 0
    (a, b, _, c, d), (height, width) = _display_matrix(frame)[:5], (frame.height, frame.width)
    frame = reformatter.reformat(_with_full_chroma(frame) if full_chroma else frame, format="rgb24")
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(-1, frame.planes[0].line_size)
    rgb = rows[:height, :3 * width].reshape(height, width, 3)
    # The matrix moves (x, y) to (a x + c y, b x + d y), y downwards.  Angles between are rounded to
    # the nearest right angle, where ffmpeg would rotate and add black corners.
    if a * d == b * c:                                    # it would leave a line or a point
        a, b, c, d = 1, 0, 0, 1
    if abs(b) + abs(c) > abs(a) + abs(d):
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    rgb = rgb[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]
    return np.ascontiguousarray(rgb)[None]


def _display_matrix(frame):
    """-> the nine integers of the frame's display matrix; the identity where it has none.
    DIFF picture orientation: the authors read pixels as they are stored (test_orientation)."""
    try:
        sides = SideDataContainer(frame)      # frame.side_data keeps the frame alive in a circle
    except ValueError:        # PyAV 18 does not know the newest types: 31 is EXIF, 29 a 3-D view
        graph = av.filter.Graph()
        graph.threads = 1                                           # 0.1 ms; with threads 2 ms
        chain = [graph.add_buffer(width=frame.width, height=frame.height,
                                  format=frame.format.name, time_base=Fraction(1)),
                 *(graph.add("sidedata", f"mode=delete:type={kind}") for kind in range(28, 34)),
                 graph.add("buffersink")]
        graph.link_nodes(*chain).configure()
        graph.push(frame)
        sides = SideDataContainer(graph.pull())
    matrix = sides.get("DISPLAYMATRIX")
    return (1, 0, 0, 0, 1, 0, 0, 0, 1) if matrix is None else struct.unpack("=9i", bytes(matrix))


def _with_full_chroma(frame):
    """Frame with subsampled chroma -> 4:4:4, by the rules of libjpeg-turbo: bilinear; of 4:1:1
    and of JPEGs at most 4 pixels wide repeated.  FFmpeg repeats at odd and tiny sizes, unless such
    a picture is padded.  The result may be larger than the frame, right and below."""
    found = re.search("4(20|22|11|40|10)p", frame.format.name)
    if not found:
        return frame
    full = frame.format.name.replace(found[0], "444p")
    across, down = {"20": (2, 2), "22": (2, 1), "11": (4, 1), "40": (1, 2), "10": (4, 4)}[found[1]]
    jpeg = frame.format.name.startswith("yuvj")
    repeat = jpeg and (across == 4 or (across == 2 and frame.width <= 4))
    # Multiples of the subsampling, and at least 8.
    width, height = (max(8, -(-n // step) * step) for n, step in ((frame.width, across),
                                                                 (frame.height, down)))
    if (width, height) != (frame.width, frame.height):
        frame = _padded(frame, width, height)
    return frame.reformat(format=full, interpolation="POINT" if repeat else "BILINEAR")


def _padded(frame, width, height):
    """Planar frame -> one of that larger size whose last column and row are repeated."""
    padded = av.VideoFrame(width, height, frame.format.name)
    padded.colorspace, padded.color_range = frame.colorspace, frame.color_range
    kind = np.uint8 if frame.format.components[0].bits <= 8 else np.uint16
    for source, target in zip(frame.planes, padded.planes, strict=True):
        old, new = (np.frombuffer(plane, kind).reshape(-1, plane.line_size // kind().itemsize)
                    for plane in (source, target))
        h, w = source.height, source.width
        new[:h, :w] = old[:h, :w]
        new[:h, w:target.width] = new[:h, w - 1:w]
        new[h:target.height] = new[h - 1]
    return padded


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
    file.  A frame that follows a slide may start up to 25 ms after its target, because stamps are
    that inexact; where frames follow each other faster, the one before is as good.
    One sequential pass up to the last target; a seek to each would be 7 times slower.
    Raises MediaError when no frame of the window can be read."""
    if frame_times not in FRAME_TIMES:
        raise ValueError(f"frame_times is {frame_times!r}, wanted one of {', '.join(FRAME_TIMES)}")
    if not fps > 0:
        raise ValueError(f"fps is {fps}, wanted a number above 0; 2 is the paper's")
    with _errors(path):
        return _read_frames(path, resize, fps, start, end, frame_times)


def _read_frames(path, resize, fps, start, end, frame_times):
    media = probe(path)
    if media.kind == "image":
        raise MediaError(f"{path}: no video stream, a still image; name it under 'image'")
    start, end = _window(path, "video", start, end, media.seconds if media.kind == "video" else 0)
    end = end if end < math.inf else start + 1 / fps            # only a file without any duration
    most = MOST_FRAMES / (fps if frame_times == "regular" else 2)
    if end - start > most:
        _warn_too_long(path, "pictures", end - start, most)
        end = start + most
    targets = sorted(FRAME_TIMES[frame_times](start, end, fps))
    late = min(LATE, LATE * 2 / fps) if frame_times == "regular" else TICK
    reformatter, plan = VideoReformatter(), _Plan()

    def pixels(frame):
        if isinstance(frame, _Skipped):
            raise _Unexpected
        return resize(_upright(frame, reformatter))[0]                        # (3,size,size)

    try:
        stand_ins, last, _, pending = _choose(
            _decode(path, "video", start, plan.stamps), targets, late, lambda frame: frame.pts)
        plan.choose({stamp for stamp, _ in stand_ins.values()} |
                    ({last.kept} if last and pending else set()))
        chosen, shown, shown_until, pending = _choose(
            _decode(path, "video", start, plan.pictures), targets, late, pixels)
    except _Unexpected:
        chosen, shown, shown_until, pending = _choose(
            _decode(path, "video", start), targets, late, pixels)
    if shown is None:
        raise MediaError(f"{path}: no frame can be decoded; it is broken, or larger than "
                         f"{VIDEO_PIXELS / 1e6:.0f} million pixels; make it again or drop it")
    if pending:                                                # the last frame stays on screen
        _warn_if_short(path, "the picture", shown_until, end)
        truncated = shown_until < end - 1
        for target, slot, _ in pending:
            if not truncated or target < shown_until:
                chosen[slot] = (shown.kept, shown.time)
    if not chosen:
        raise MediaError(f"{path}: start {start} s is beyond its end, the picture decodes up to "
                         f"{shown_until:.3f} s; correct the times or drop the record")
    # The last second of "ends" may overlap with the one before it.
    frames, times = zip(*sorted((chosen[slot] for slot in sorted(chosen)),
                                key=lambda frame: frame[1]), strict=True)
    return torch.stack(frames), list(times)


def _choose(decoded, targets, late, take):
    """decoded: (start, seconds, frame) in order of time.  -> {slot: (what `take` keeps, time)} of
    the frames on screen at the targets, the last _Shown, its end, and the targets behind it."""
    pending, chosen, shown, shown_until = deque(targets), {}, None, 0.0
    for time, seconds, frame in decoded:
        new = _Shown(time, frame, take)
        # The start of a frame that follows a slide may be stamped late.
        early = time - (late if shown is not None and time - shown.time >= SLIDE else TICK)
        while pending:
            target, slot, at_or_after = pending[0]
            if time < target - TICK if at_or_after else early <= target:
                break                              # a later frame may be the one for this target
            pick = new if at_or_after or shown is None else shown
            chosen[slot] = (pick.kept, pick.time)
            pending.popleft()
        shown, shown_until = new, max(shown_until, time + seconds)
        if not pending:
            break
    return chosen, shown, shown_until, pending


def read_image(path, resize):
    """Image file -> (1,3,size,size) as `resize` made it from uint8 (1,H,W,3); of an animation the
    first picture.  Chroma is interpolated to full resolution before the conversion to RGB: photos
    then differ from PIL's by 0.1 of 255 on average, otherwise by 1.5; CMYK by 1, and by 5 if its
    colours are subsampled.  Transparent pixels show the colour that the file stores for them, those
    of a GIF white.  A damaged JPEG gives what can be decoded, and a warning.
    Raises MediaError when the file is no still image that can be read, or one of more than 120
    million pixels."""
    with _errors(path):
        pixels = _upright(_first_picture(path), VideoReformatter(), full_chroma=True)
    return resize(pixels)


def _first_picture(path):
    """Image file -> its first frame.  The decoder's memory is free again when this returns."""
    for strict in (True, False):
        with _open(path) as container:
            stream = _stream(container, "video", path)
            animation = (container.format.name in ("gif", "apng") or
                         container.metadata.get("major_brand") in ("avis", "msf1"))
            if not animation and not _is_image(container):
                raise MediaError(f"{path}: a video, wanted a still image; name it under 'video'")
            if len(_streams(container, "video")) > 1:             # HEIC files of phones, icons
                raise MediaError(f"{path}: a picture in several parts (tiles, sizes); convert it "
                                 "to jpg")
            if strict and stream.codec_context.name == "mjpeg":   # else its damage is concealed
                stream.codec_context.options |= {"err_detect": "explode"}
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    if strict:
                        break
                    continue
                if not frames:
                    continue
                if stream.codec_context.name == "tiff" and _compression(bytes(packet)) in (6, 7):
                    raise MediaError(f"{path}: a TIFF that holds a JPEG, which FFmpeg cannot "
                                     "decode; convert it to jpg or png")
                if stream.codec_context.name == "tiff":
                    frames[0].color_range = 2         # YCbCr of TIFF uses all 256 values
                if not strict:
                    warnings.warn(f"{path}: damaged or cut off; using what can be decoded",
                                  stacklevel=3)
                return frames[0]
    raise MediaError(f"{path}: no picture can be decoded; it is broken, or larger than "
                     f"{PICTURE_PIXELS / 1e6:.0f} million pixels; make it again or drop it")


def _compression(tiff):
    """Content of a TIFF file -> the number of its compression (tag 259), 1 where it has none."""
    order = "little" if tiff[:2] == b"II" else "big"
    at = int.from_bytes(tiff[4:8], order)
    tags = tiff[at + 2:at + 2 + 12 * int.from_bytes(tiff[at:at + 2], order)]
    return next((int.from_bytes(tags[n + 8:n + 10], order) for n in range(0, len(tags), 12)
                 if int.from_bytes(tags[n:n + 2], order) == 259), 1)


# ---------------------------------------- sound

class _Mono16k:
    """Decoded audio frames -> one float32 track at 16 kHz whose sample 0 is at time `start`.

    Frames are first placed on the grid of source samples (gaps become silence, overlaps are cut),
    then resampled.  The grid starts at a multiple of 10 ms (441 samples of 44.1 kHz are 160 samples
    of 16 kHz), so that a window has exactly the samples of the full track.  All frames have one
    rate; their layout and format may change."""

    def __init__(self, rate, start, stop):
        common = math.gcd(rate, AUDIO_RATE)
        block_in, block_out = rate // common, AUDIO_RATE // common
        blocks = max(0, math.floor((start - 0.1) * common))      # 0.1 s for the filter to start
        self.rate, self.position, self.expected = rate, blocks * block_in, None
        self.skip = round(start * AUDIO_RATE) - blocks * block_out
        self.mixers, self.chunks, self.waiting, self.held = {}, [], [], 0
        self.limit = math.ceil((stop + 0.1) * rate)
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
        kind = (frame.format.name, frame.layout.name)
        if kind in self.mixers:
            mixed = self.mixers[kind].resample(frame)
        else:
            try:
                self.mixers[kind] = av.AudioResampler(format="s32", layout="mono", rate=self.rate)
                mixed = self.mixers[kind].resample(frame)
            except av.FFmpegError:        # it does not know where these channels stand: their mean
                self.mixers[kind] = av.AudioResampler(format="s32", layout=frame.layout,
                                                      rate=self.rate)
                mixed = self.mixers[kind].resample(frame)
        return [[self._mean(np.frombuffer(part.planes[0], np.int32, part.samples * channels)
                            .astype(np.float32) * 2.0 ** -31, channels)]
                for part in mixed for channels in [part.layout.nb_channels]]

    @staticmethod
    def _mean(samples, channels):
        return samples if channels == 1 else samples.reshape(-1, channels).mean(1)

    def add(self, time, frame):
        """Appends a decoded frame that starts at `time` seconds."""
        for channels in self._channels(frame):
            place, n = round(time * self.rate), len(channels[0])
            if self.expected is not None and abs(place - self.expected) <= JITTER * self.rate:
                place = self.expected
            self.expected = place + n
            if (gap := min(place, self.limit) - self.position) > 0:
                self._feed([np.zeros(gap, np.float32)])
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

    def finish(self):
        """-> float32 (S,)"""
        self._flush()
        if self.resampler is not None:
            self.chunks += [f.to_ndarray()[0] for f in self.resampler.resample(None)]  # last 1 ms
        track = np.concatenate([np.zeros(0, np.float32), *self.chunks])[self.skip:]
        return track.clip(-1, 1, out=track)                      # as 16-bit samples would be


def read_audio(path, start=None, end=None):
    """Audio or video file -> float32 (S,), 16 kHz mono, from `start` to `end` in seconds of the
    file (None: from its beginning, to its end; AAC without an edit list ends up to 64 ms later,
    with padding).  A window costs only its own length.
    Raises MediaError when no sound of the window can be read."""
    with _errors(path):
        return _read_audio(path, start, end)


def _read_audio(path, start, end):
    with _open(path) as container:
        stream = _stream(container, "audio", path)
        declared = _stream_end(container, stream, path)
        estimated = container.format.flags & GENERIC_INDEX
    start, _ = _window(path, "audio", start, end, 0 if estimated else declared)
    stop = start + MOST_SECONDS                         # not the header's end, which MP3 estimates
    stop = stop if end is None else min(stop, float(end))
    # A track for each part of the sound that has its own rate, or that follows a minute of silence.
    parts, track, first, reached = [], None, 0, start          # first: its place in the result
    for time, seconds, frame in _decode(path, "audio", start):
        if track is None or frame.sample_rate != track.rate or time > reached + 60:
            begin = start
            if track is not None or time > reached + 60:
                begin = max(start, time)
                parts += [] if track is None else [(first, track.finish())]
            first = round(begin * AUDIO_RATE) - round(start * AUDIO_RATE)
            track = _Mono16k(frame.sample_rate, begin, stop)
        track.add(time, frame)
        reached = time + seconds
        if reached > stop + 0.05:                       # 50 ms more for the tail of the filter
            break
    if track is None:
        raise MediaError(f"{path}: no sound can be decoded; make it again or drop it")
    if reached > stop and (end is None or end > stop):
        _warn_too_long(path, "sound", (end or declared) - start, MOST_SECONDS)
    _warn_if_short(path, "the sound", reached, min(stop, declared))
    parts.append((first, track.finish()))
    wanted = round(stop * AUDIO_RATE) - round(start * AUDIO_RATE)
    wave16k = parts[0][1][:wanted]
    if len(parts) > 1 or first:                         # what lies between them is silence
        wave16k = np.zeros(min(wanted, first + len(parts[-1][1])), np.float32)
        for (place, part), (until, _) in zip(parts, [*parts[1:], (wanted, None)], strict=True):
            room = wave16k[place:until]
            room[:len(part)] = part[:len(room)]
    if not len(wave16k):
        raise MediaError(f"{path}: start {start} s is beyond its end, the sound decodes up to "
                         f"{reached:.3f} s; correct the times or drop the record")
    return torch.from_numpy(wave16k)


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
