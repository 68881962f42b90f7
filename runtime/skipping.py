"""Of a video decodes only what is looked at: at 30 pictures per second two of them.

     packets --Plan.stamps-----> stand-ins in order of time, among which the reader chooses
     packets --Plan.pictures---> the pictures that were chosen, stand-ins for the others

     in order of decoding   I0 P4 B2 b1 b3 P8 B6 b5 b7 | I9 ...      nothing refers to a b
     chosen                 I0          b3             | I9
     decoded                I0 P4 B2 -- b3 -- -- -- -- | I9

Packets tell when their pictures are shown, so the reader can choose before anything is decoded.
Then the decoder leaves out a picture that was not chosen and to which no other refers (skip_frame).
Behind the last choice of a group the rest is left out, too, if the next keyframe starts anew.  The
reader sees all times, as if every picture were decoded, and gets the same pictures to the bit.
Where packets and decoder disagree, Unexpected is raised; then every picture must be decoded.
Damage is seen only where something is decoded.

Public: Plan, Skipped, Unexpected."""

import heapq
import math
from dataclasses import dataclass
from functools import wraps

import av

CONTAINERS = ("mov,mp4", "matroska")          # those that store when each picture is shown
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
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
        self.groups = []          # pts in order of decoding, a list from each keyframe on
        self.wanted = set()       # those that must be decoded
        self.leading = set()      # those that refer to what is before the first packet
        self.rest = set()         # others that the decoder need not see
        self.layer = 0            # the highest sub-layer of HEVC: no other one refers to it
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
            self.layer = max(self.layer, self.layer_of(packet))
            if packet.is_discard:                        # decoded for those after it, never shown
                self.wanted.add(packet.pts)
            else:
                self.push(packet)
            if len(self.waiting) > REORDERED:
                yield self.pop(), 0
        self.groups.append([math.inf])
        while self.waiting:
            yield self.pop(), 0

    def choose(self, chosen):
        """chosen: the pts of the pictures that the reader looks at."""
        stamps, opened = sum(self.groups, []), [
            min(following) < following[0] for following in self.groups[1:]]
        if len(set(stamps)) < len(stamps) or (self.leading and stamps[0] in chosen) or (
                self.reorders and stamps == sorted(stamps)):     # they tell the order of decoding
            raise Unexpected
        self.wanted |= chosen
        if self.codec == "h264" and any(opened):                 # its keyframes do not reset all
            return
        for group, following, is_open in zip(self.groups, self.groups[1:], opened, strict=False):
            if not is_open and max(group) < following[0]:
                last = max((i for i, stamp in enumerate(group) if stamp in self.wanted), default=-1)
                self.rest.update(group[last + 1:])

    @told
    def pictures(self, packets, stream, path):
        """In place of the decoder: packets -> (picture or stand-in, 0), in order of time."""
        codec, jumped = stream.codec_context, False
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
            spare = packet.pts not in self.wanted and self.layer_of(packet) == self.layer and (
                self.codec != "av1")                     # which cannot change it on the way
            codec.skip_frame = "NONREF" if spare else "DEFAULT"
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
            if self.waiting[0].pts in self.wanted:
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

    def layer_of(self, packet):
        """The temporal sub-layer of a packet of HEVC, by its first unit; of others 0."""
        return memoryview(packet)[5] & 7 if self.codec == "hevc" and packet.size > 5 else 0


def filled(packets):
    """Without the empty packets that mark the end of a stream."""
    return (packet for packet in packets if packet.size)
