"""Media files encoded for tests: every frame carries its own number, every sound a click."""

from fractions import Fraction

import av
import numpy as np
import torch

H, W = 32, 80                                        # 2 x 5 blocks of 16 pixels: a 10-bit number


def numbered(n):
    """Frame n: ten black or white blocks, which survive H.264, colour conversion and resizing."""
    bits = np.array([(n >> b) & 1 for b in range(10)], np.uint8).reshape(2, 5) * 255
    return np.repeat(bits.repeat(16, 0).repeat(16, 1)[..., None], 3, axis=2)           # (H,W,3)


def numbers(frames):
    """uint8 (F,3,S,S) -> the number drawn into each frame."""
    side = frames.shape[-1]
    rows, columns = [side // 4, 3 * side // 4], [int((c + 0.5) * side / 5) for c in range(5)]
    bits = (frames[:, 1][:, rows][:, :, columns] > 127).reshape(len(frames), 10)       # (F,2,5)
    return (bits.long() << torch.arange(10)).sum(1).tolist()


def click_track(seconds, at, rate=16000):
    """Silence with 1 ms of full tone at `at` s; the onset is what the reader must place."""
    audio = np.zeros(round(seconds * rate), np.float32)
    audio[round(at * rate):][:rate // 200] = 0.8
    return audio


def onset(audio):
    """First sample above a quarter of full scale (AAC smears a little before the click)."""
    return int((audio.abs() > 0.25).nonzero()[0])


def encode(path, pts, base=Fraction(1, 90000), audio=None, rate=16000, audio_start=0.0,
           layout="mono", audio_codec="aac", gop=250, bframes=3, format=None, options=None, fps=25):
    """Frames 0, 1, ... at presentation times `pts` (ticks of `base`; none: sound only), and `audio`
    ((S,) or (channels,S)) from `audio_start` s on."""
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        streams = []
        if len(pts):
            video = container.add_stream("libx264", rate=fps, options={
                "preset": "veryfast", "crf": "20", "threads": "1", "g": str(gop),
                "bf": str(bframes), "b-adapt": "0", "sc_threshold": "0"})
            video.width, video.height, video.pix_fmt = W, H, "yuv420p"
            video.codec_context.time_base = base
            streams.append((video, picture_frames(pts, base)))
        if audio is not None:
            # Without noise substitution, which AAC decoders fill in at random.
            sound = container.add_stream(audio_codec, rate=rate, layout=layout,
                                         options={"aac_pns": "0"} if audio_codec == "aac" else {})
            streams.append((sound, sound_frames(np.atleast_2d(audio), rate, layout, audio_start)))
        for stream, frames in streams:
            for frame in frames:
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def picture_frames(pts, base):
    for n, ticks in enumerate(pts):
        frame = av.VideoFrame.from_ndarray(numbered(n), format="rgb24")
        frame.pts, frame.time_base = int(ticks), base
        yield frame


def sound_frames(audio, rate, layout, start):
    for i in range(0, audio.shape[1], 1024):
        chunk = np.ascontiguousarray(audio[:, i:i + 1024], np.float32)
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(start * rate) + i
        yield frame


def on_screen(times, targets):
    """The rule, written the slow way: number of the last frame with time <= target, else 0."""
    return [max((n for n, t in enumerate(times) if t <= target + 1e-6), default=0)
            for target in targets]
