"""Of a video decodes only what is looked at: at 30 pictures per second two of them.

     packets --Plan.stamps-----> stand-ins in order of time, among which the reader chooses
     packets --Plan.pictures---> the pictures that were chosen, stand-ins for the others

     in order of decoding   I0 P4 B2 b1 b3 P8 B6 b5 b7 | I9 ...      nothing refers to a b
     chosen                 I0          b3             | I9
     decoded                I0 P4 B2 -- b3 -- -- -- -- | I9

Packets tell when their pictures are shown, so the reader can choose before anything is decoded.
Then the decoder gets no picture that was not chosen and to which no other refers, and none behind
the last choice of a group, if the next keyframe starts anew.  H.264, HEVC and MPEG-4 mark pictures
to which no other refers; of VP9 and AV1 only the rest of a group is left out.  The reader sees all
times, as if every picture were decoded, and gets the same pictures to the bit.  Where packets and
decoder disagree, Unexpected is raised; then every picture must be decoded.  Damage is neither seen
nor does it harm where nothing is decoded.

Public: Plan, Skipped, Unexpected."""

import heapq
import math
from dataclasses import dataclass
from functools import wraps
from itertools import chain

import av

CONTAINERS = ("mov,mp4", "matroska")          # those that store when each picture is shown
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
LENGTH_SIZE = {"h264": 4, "hevc": 21}         # where a header says how long lengths of units are
REORDERED = 32                                # packets; H.264 and HEVC reorder at most 16


class Unexpected(Exception):
    """Every picture of the file must be decoded."""


@dataclass(frozen=True, order=True)
class Skipped:
    """A stand-in for a picture that was not decoded."""
    pts: int
    duration: int
    dts: None = None


def told(source):
    """The generator `source`, of which an error of FFmpeg is an Unexpected."""
    @wraps(source)
    def wrapped(*args):
        try:
            yield from source(*args)
        except (av.FFmpegError, IndexError) as error:        # IndexError: as in media._decoded
            raise Unexpected from error
    return wrapped


class Plan:
    """Which pictures of a file are decoded.  A picture is known by its pts."""

    @told
    def stamps(self, packets, stream, path):
        """In place of the decoder: packets -> (stand-in, 0) of every picture, in order of time."""
        codec = stream.codec_context
        self.codec, self.reorders = codec.codec.canonical_name, codec.has_b_frames
        if not stream.container.format.name.startswith(CONTAINERS) or self.codec not in CODECS:
            raise Unexpected
        place, extra = LENGTH_SIZE.get(self.codec), codec.extradata or b""
        if place and not (extra[:1] == b"\1" and len(extra) > place and extra[place] & 3 == 3):
            raise Unexpected
        self.groups = []          # pts in order of decoding, a list from each keyframe on
        self.wanted = set()       # those that must be decoded
        self.leading = set()      # those that refer to what is before the first packet
        self.rest = set()         # others that the decoder need not see
        self.spare = {}           # those to which no other of their sub-layer refers, and that
        self.resets = set()       # keyframes behind which nothing refers to what is before them
        self.layer = 0            # the highest sub-layer, to which no other one refers
        self.waiting, self.last = [], -math.inf
        for packet in filled(packets):
            if packet.pts is None or packet.is_corrupt or packet.has_sidedata("new_extradata") or (
                    not self.groups and not packet.is_keyframe):
                raise Unexpected
            if packet.is_keyframe:
                self.groups.append([])
            elif len(self.groups) == 1 and packet.pts < self.groups[0][0]:
                self.leading.add(packet.pts)
                continue
            self.groups[-1].append(packet.pts)
            referred, layer, resets = references(packet, self.codec)
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
            raise Unexpected
        self.wanted |= chosen
        for group, following in zip(self.groups, self.groups[1:], strict=False):
            if following[0] in self.resets and max(group) < following[0] == min(following):
                last = max((i for i, stamp in enumerate(group) if stamp in self.wanted), default=-1)
                self.rest.update(group[last + 1:])

    @told
    def pictures(self, packets, stream, path):
        """In place of the decoder: packets -> (picture or stand-in, 0), in order of time."""
        codec, jumped, self.given = stream.codec_context, False, set()
        codec.options |= {"err_detect": "explode"}               # an error, where it would guess
        self.waiting, self.last = [], -math.inf
        for packet in filled(packets):
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
                raise Unexpected
            yield from self.stand_ins(frame.pts)
            if not self.waiting or self.pop().pts != frame.pts:
                raise Unexpected
            yield frame, 0

    def stand_ins(self, until):
        while self.waiting and self.waiting[0].pts < until:
            if self.waiting[0].pts in self.given:            # the decoder made nothing of it
                raise Unexpected
            yield self.pop(), 0

    def push(self, packet):
        if packet.pts < self.last:
            raise Unexpected
        heapq.heappush(self.waiting, Skipped(packet.pts, packet.duration or 0))

    def pop(self):
        stand_in = heapq.heappop(self.waiting)
        self.last = stand_in.pts
        return stand_in


def references(packet, codec):
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


def filled(packets):
    """Without the empty packets that mark the end of a stream."""
    return (packet for packet in packets if packet.size)
