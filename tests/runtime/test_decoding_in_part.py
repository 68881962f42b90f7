"""The reader that leaves pictures out, against the same reader with every picture decoded."""

import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from runtime import media

W, H = 128, 96          # x265 writes beyond its memory where pictures are much smaller
SIMPLE = Fraction(1, 25)
X264 = {"preset": "ultrafast"}


def write(path, codec="libx264", frames=100, stamps=None, base=SIMPLE, format=None, **options):
    """A picture that moves a little from frame to frame, so that no two frames are alike."""
    world = np.random.default_rng(0).integers(0, 256, (H + 8, W + 400, 3), dtype=np.uint8)
    options = {name.replace("_", "-"): str(value) for name, value in options.items()}
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options={"threads": "1"} | options)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.codec_context.time_base = base
        for n, stamp in enumerate(range(frames) if stamps is None else stamps):
            part = np.ascontiguousarray(world[n % 8:][:H, 3 * n % 400:][:, :W])
            frame = av.VideoFrame.from_ndarray(part, format="rgb24")
            frame.pts, frame.time_base = stamp, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def raw(rgb):
    return torch.from_numpy(rgb).permute(0, 3, 1, 2)                       # all of the picture


class Reader:
    """Reads a file with and without leaving pictures out, and counts what was decoded."""

    def __init__(self, monkeypatch):
        self.pictures, self.complete, plan = 0, 0, media._Plan
        monkeypatch.setattr(media, "_Plan", lambda: self.counted(plan()))
        decoded = media._decoded

        def all_of_them(*given):
            self.complete += 1
            yield from decoded(*given)
        monkeypatch.setattr(media, "_decoded", all_of_them)
        monkeypatch.setattr(media._decode, "__defaults__", (all_of_them,))
        monkeypatch.setattr(media._timed_frames, "__defaults__", (all_of_them,))
        self.allowed = True

    def counted(self, plan):
        stamps, pictures = plan.stamps, plan.pictures

        def allowed(*given):
            if not self.allowed:
                raise media._Unexpected
            yield from stamps(*given)

        def counting(*given):
            for frame, delay in pictures(*given):
                self.pictures += not isinstance(frame, media._Skipped)
                yield frame, delay
        plan.stamps, plan.pictures = allowed, counting
        return plan

    def read(self, path, allowed, **options):
        self.allowed, self.pictures, self.complete = allowed, 0, 0
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            frames, times = media.read_frames(str(path), raw, **options)
        return frames, times, sorted(str(warning.message) for warning in told)

    def same(self, path, **options):
        """Asserts that both ways give the same; -> pictures decoded (None: all), and the times."""
        wanted = self.read(path, False, **options)
        assert self.complete and not self.pictures
        found = self.read(path, True, **options)
        assert found[1:] == wanted[1:] and torch.equal(found[0], wanted[0])
        return (None if self.complete else self.pictures), wanted[1]


@pytest.fixture
def reader(monkeypatch):
    return Reader(monkeypatch)


WINDOWS = ({}, {"fps": 7}, {"frame_times": "ends"}, {"start": 1.9}, {"start": 1.3, "end": 2.9},
           {"fps": 0.2})
X265 = "log-level=none:keyint={}:bframes=4:open-gop={}:b-pyramid=1:temporal-layers={}"
# kind: the most pictures that may be decoded of 100 for 8 targets
KINDS = {
    "closed": ("mp4", "libx264", X264 | {"g": 12, "bf": 3}, 35),
    "long": ("mkv", "libx264", X264 | {"g": 250, "bf": 3}, 60),
    "pyramid": ("mov", "libx264", {"preset": "veryfast", "g": 30, "bf": 5, "b_adapt": 0,
                                   "x264_params": "b-pyramid=normal:ref=4:scenecut=0"}, 60),
    "without B": ("mp4", "libx264", X264 | {"g": 25, "bf": 0}, 95),
    "open": ("mp4", "libx264", X264 | {"g": 12, "bf": 3, "x264_params": "open-gop=1"}, 60),
    "refresh": ("mkv", "libx264", X264 | {"g": 20, "bf": 2, "x264_params": "intra-refresh=1"}, 80),
    "intra": ("mp4", "libx264", X264 | {"g": 1, "bf": 0}, 12),
    "HEVC": ("mp4", "libx265", {"preset": "ultrafast", "x265_params": X265.format(20, 0, 0)}, 45),
    "HEVC, open": ("mkv", "libx265", {"preset": "ultrafast",
                                      "x265_params": X265.format(20, 1, 0)}, 60),
    "HEVC, layers": ("mov", "libx265", {"preset": "ultrafast",
                                        "x265_params": X265.format(30, 0, 3)}, 60),
    "VP9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu_used": 8, "g": 20}, 95),
    "AV1": ("mp4", "libsvtav1", {"preset": 12, "g": 20}, 95),
    "MPEG-4": ("mp4", "mpeg4", {"g": 12, "bf": 2}, 55)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_frames_of_every_kind(tmp_path, reader, kind):
    suffix, codec, options, most = KINDS[kind]
    path = write(tmp_path / f"clip.{suffix}", codec, **options)
    for window in WINDOWS:
        decoded, times = reader.same(path, **window)
        assert decoded is not None and decoded >= len(set(times))
        if not window:
            assert decoded <= most


@pytest.mark.parametrize("bframes", [0, 3])
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("times", ["variable", "slides", "late"])
def test_the_same_frames_at_any_times(tmp_path, reader, times, suffix, bframes):
    steps = np.random.default_rng(1).integers(5, 90, 99) if times == "variable" else np.tile(
        [40, 40, 1500] if times == "slides" else [40], 99)[:99]
    stamps = np.cumsum([900 if times == "late" else 0, *steps])
    path = write(tmp_path / f"clip.{suffix}", stamps=stamps.tolist(), base=Fraction(1, 1000),
                 g=30, bf=bframes, **X264)
    for window in WINDOWS:
        assert reader.same(path, **window)[0] is not None


def remux(source, target, change=lambda packet, number: True):
    """Copies packets; change(packet, number) may move their stamps, or leave them out."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.dts is not None and change(packet, number):
                packet.stream = stream
                new.mux(packet)
    return target


def test_stamps_of_decoding_are_not_those_of_the_pictures(tmp_path, reader):
    """As a program writes them that does not know of B-frames."""
    def forget(packet, number):
        packet.pts = packet.dts
        return True
    path = write(tmp_path / "a.mp4", g=30, bf=1, b_adapt=0, **X264)
    path = remux(path, tmp_path / "b.mkv", forget)
    for window in WINDOWS:
        assert reader.same(path, **window)[0] is None


def test_a_file_that_is_cut_out_of_another(tmp_path, reader):
    """Its first pictures refer to what is no longer there."""
    path = write(tmp_path / "a.mkv", "libx265", preset="ultrafast",
                 x265_params=X265.format(20, 1, 0))
    path = remux(path, tmp_path / "b.mkv", lambda packet, number: number >= 20)
    for window in ({}, {"fps": 7}, {"start": 0.02}, {"start": 1.3, "end": 2.9}):
        reader.same(path, **window)


def test_hidden_beginning(tmp_path, reader):
    """ffmpeg -ss -c copy: an edit list hides what is decoded for the sake of what is shown."""
    path = write(tmp_path / "a.mp4", g=50, bf=3, **X264)
    found = reader.same(hide(path, 0.6))
    assert found[0] is not None and found[0] < 70


def hide(path, seconds):
    """Lets the edit list of an mp4 start so many seconds later."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 16
    scale = int.from_bytes(content[content.index(b"mdhd") + 16:][:4], "big")
    start = int.from_bytes(content[at:at + 4], "big") + round(seconds * scale)
    content[at:at + 4] = start.to_bytes(4, "big")
    path.write_bytes(content)
    return path


def test_interlaced_and_other_containers_are_decoded_whole(tmp_path, reader):
    path = write(tmp_path / "a.mp4", g=12, bf=2, x264_params="tff=1", **X264)
    assert reader.same(path)[0] is None
    for suffix in ("avi", "ts"):
        path = write(tmp_path / f"a.{suffix}", "mpeg4", g=12, bf=2)
        assert reader.same(path)[0] is None


@pytest.mark.parametrize("where", [0.3, 0.5, 0.7, 0.9])
def test_damage(tmp_path, reader, where):
    """Each picture is the one that full decoding gives, or, where that is worse, the undamaged."""
    path = write(tmp_path / "a.mp4", g=25, bf=2, **X264)
    whole = reader.read(path, True)
    content = bytearray(path.read_bytes())
    begin, end = content.index(b"mdat"), content.index(b"moov")
    for offset in range(40):
        content[int(begin + where * (end - begin)) + offset] ^= 0x55
    path.write_bytes(content)
    wanted, found = reader.read(path, False), reader.read(path, True)
    assert found[1] == wanted[1] == whole[1] and (not found[2] or found[2] == wanted[2])
    for ours, theirs, undamaged in zip(found[0], wanted[0], whole[0], strict=True):
        assert torch.equal(ours, theirs) or torch.equal(ours, undamaged)
    path.write_bytes(content[:len(content) // 2])
    with pytest.raises(media.MediaError):
        media.read_frames(str(path), raw)


def test_a_decoder_that_drops_pictures_is_noticed(tmp_path, monkeypatch, request):
    path = write(tmp_path / "a.mp4", g=25, bf=2, **X264)
    plain = media._Plan.in_order

    def losing(plan, frames):
        yield from plain(plan, [frame for frame in frames if frame.pts not in plan.wanted])
    monkeypatch.setattr(media._Plan, "in_order", losing)
    assert request.getfixturevalue("reader").same(path)[0] is None
