"""The world of the miniature: what its clips show and sound like.

     colour, shape --draw-->              pixels, uint8 (64,64,3)
     digits, lips  --draw_*-->            pixels, uint8 (64,64,3)
     stills at 2 Hz --to_video-->         frames, uint8 (F,64,64,3) at 8 Hz
     sound event   --sound, events-->     audio, float32 (S,) at 16 kHz
     words         --say, speak-->        audio by one of 50 recorded espeak voices

Time runs in frames of 0.5 s, which is FAVOR's video rate. Every event lies inside one frame.
One part of everything is held out for the test clips: ten voices, word orders, pairs of colour and
shape, and numbers (see is_held_out_*).

Public: COLOURS, SHAPES, SOUNDS, WORDS, LIPS, the choose_*, draw_* and sound functions below."""

import functools
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
VOICES = HERE / "weights" / "voices"
RATE, VIDEO_FPS, SIZE = 16000, 8, 64         # audio Hz, stored frames per second, pixels
FRAME = RATE // 2                            # audio samples in one 0.5 s frame
FRAMES = 10                                  # frames of a video clip: 5 s = two windows of 5
WINDOW = 5                                   # frames of a window in the tiny preset

COLOURS = {"red": (225, 30, 30), "green": (30, 190, 40), "blue": (40, 70, 250),
           "yellow": (240, 225, 40), "white": (245, 245, 245), "pink": (250, 90, 200),
           "orange": (250, 135, 15), "cyan": (40, 215, 230)}
SHAPES = ("ball", "box", "cone", "star", "ring", "cross")
SOUNDS = ("beep", "bell", "buzz", "knock", "whistle", "hiss", "chirp", "drum")
NOTHING = "nothing"                          # the word for an empty place
PLACES = ("top left", "top right", "bottom left", "bottom right")
# What is spoken, in groups that look alike on the lips: the ear must tell "red", "right" and "ring"
# apart, the eye "red" from "blue".
LIPS = {"flat": ("red", "ring", "cross"), "shut": ("blue", "ball", "big"),
        "wide": ("green", "cyan", "yes"), "round": ("orange", "cone", "shape"),
        "teeth": ("yellow", "star", "is"), "pout": ("white", "what", "one"),
        "tongue": ("the", "and", "small"), "open": ("pink", "box", "colour")}
WORDS = tuple(word for group in LIPS.values() for word in group)
LIPS_OF = {word: lips for lips, group in LIPS.items() for word in group}


# ---------------------------------------------------------------- what is held out for testing
def is_held_out_pair(colour, shape):
    """One in six pairs of colour and shape is seen only in the test scenes."""
    return (list(COLOURS).index(colour) + SHAPES.index(shape)) % 6 == 0


def is_held_out_order(first, second):
    """One in six ordered pairs of spoken words is heard only in the test clips."""
    return (WORDS.index(first) * 5 + WORDS.index(second)) % 6 == 0


def is_held_out_number(digits):
    """One in five numbers is read only in the test images."""
    return sum(d * w for d, w in zip(digits, (1, 3, 7), strict=True)) % 5 == 0


def choose_objects(rng, n, split):
    """n (colour, shape) pairs, colours and shapes all different; in the test split one pair at
    least is held out, in training none."""
    while True:
        pairs = list(zip(rng.permutation(list(COLOURS))[:n].tolist(),
                         rng.permutation(SHAPES)[:n].tolist(), strict=True))
        held_out = sum(is_held_out_pair(*pair) for pair in pairs)
        if (held_out == 0) == (split == "train"):
            return pairs


def choose_words(rng, n, split):
    """n different spoken words; test sentences hold a held-out order, training ones none."""
    while True:
        words = rng.permutation(WORDS)[:n].tolist()
        held_out = any(is_held_out_order(a, b) for a, b in zip(words, words[1:], strict=False))
        if n == 1 or held_out == (split == "test"):
            return words


def choose_number(rng, split):
    """Three digits as a list of ints."""
    while True:
        digits = rng.integers(0, 10, 3).tolist()
        if is_held_out_number(digits) == (split == "test"):
            return digits


# ---------------------------------------------------------------- drawing
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
FONT = ("01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
        "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
        "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
        "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
        "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100")
GLYPHS = [np.array([[int(bit) for bit in row] for row in glyph.split()], bool) for glyph in FONT]


def _inside(shape, x, y, radius):
    """Boolean (64,64): the pixels of `shape` centred at (x, y)."""
    dx, dy = (_X - x) / radius, (_Y - y) / radius
    if shape == "ball":
        return dx ** 2 + dy ** 2 < 1
    if shape == "box":
        return np.maximum(abs(dx), abs(dy)) < 0.85
    if shape == "cone":                                                    # a triangle, tip up
        return (dy < 0.85) & (abs(dx) < (dy + 1) * 0.52)
    if shape == "ring":
        return abs(dx ** 2 + dy ** 2 - 0.7) < 0.36
    if shape == "cross":
        return (np.minimum(abs(dx), abs(dy)) < 0.3) & (np.maximum(abs(dx), abs(dy)) < 1)
    angle = np.arctan2(dx, -dy)                                            # star: five points
    return np.hypot(dx, dy) < 0.68 + 0.38 * np.cos(5 * angle)


def background(grey=35):
    """uint8 (64,64,3): a dark grey."""
    return np.full((SIZE, SIZE, 3), grey, np.uint8)


def draw(image, pair, x, y, radius, lit=False):
    """Draws a (colour, shape) object into `image`; a lit one stands in a bright square frame."""
    if lit:
        edge = np.maximum(abs(_X - x), abs(_Y - y))
        image[(edge < radius + 5) & (edge > radius + 1.5)] = 235
    image[_inside(pair[1], x, y, radius)] = COLOURS[pair[0]]


def draw_number(rng, digits):
    """uint8 (64,64,3): three digits, 3 pixels a dot, about the middle of the picture."""
    image, ink = background(rng.integers(15, 60)), COLOURS[rng.choice(list(COLOURS))]
    x, y = rng.integers(0, SIZE - 54 + 1), rng.integers(14, 30)
    for k, digit in enumerate(digits):
        glyph = np.kron(GLYPHS[digit], np.ones((3, 3), bool))                          # (21,15)
        image[y:y + 21, x + 18 * k:x + 18 * k + 15][glyph] = ink
    return image


def draw_still(rng, objects, spots):
    """uint8 (64,64,3) with the objects in the given quarters (0-3, in reading order)."""
    image = background(rng.integers(15, 60))
    for pair, spot in zip(objects, spots, strict=True):
        x, y = 16 + 32 * (spot % 2), 16 + 32 * (spot // 2)
        draw(image, pair, x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), rng.uniform(9, 13))
    return image


def draw_lips(rng, lips, image):
    """A mouth into `image`: width, height and teeth or tongue tell the eight classes apart."""
    width, height, extra = {
        "flat": (24, 4, None), "shut": (20, 0, None), "wide": (27, 10, None),
        "round": (11, 12, None), "teeth": (22, 12, (240, 240, 240)), "pout": (7, 6, None),
        "tongue": (20, 12, (250, 60, 60)), "open": (17, 22, None)}[lips]
    x, y = 32 + rng.uniform(-3, 3), 32 + rng.uniform(-3, 3)
    outer = ((_X - x) / (width + 4)) ** 2 + ((_Y - y) / (height + 4)) ** 2 < 1
    image[outer] = (190, 90, 90)
    if height:
        inner = ((_X - x) / width) ** 2 + ((_Y - y) / height) ** 2 < 1
        image[inner] = (40, 10, 10)
        if extra:
            image[inner & ((_Y < y - 1) if lips == "teeth" else (_Y > y + 1))] = extra
    return image


def to_video(stills, rng=None, shake=2):
    """Frames at 2 Hz, list of (64,64,3) -> (F,64,64,3) at 8 Hz; the picture drifts a little."""
    video = np.repeat(np.stack(stills), VIDEO_FPS // 2, axis=0)
    if rng is not None:
        drift = np.clip(np.cumsum(rng.integers(-1, 2, (len(video), 2)), axis=0), -shake, shake)
        video = np.stack([np.roll(f, tuple(d), (0, 1)) for f, d in zip(video, drift, strict=True)])
    return video


# ---------------------------------------------------------------- sound
def sound(rng, name):
    """float32 (S,): one event of 0.2-0.35 s, pitch and loudness vary."""
    t = np.arange(int(rng.uniform(0.2, 0.35) * RATE), dtype=np.float32) / RATE
    seconds, pitch = t[-1], rng.uniform(0.93, 1.07)
    noise = rng.standard_normal(len(t)).astype(np.float32)

    def tone(hertz):
        return np.sin(2 * np.pi * pitch * hertz * t)

    wave = {
        "beep": lambda: tone(1000),
        "bell": lambda: (tone(620) + 0.7 * tone(1711) + 0.5 * tone(3350)) * np.exp(-9 * t),
        "buzz": lambda: np.sign(tone(120)) * 0.8,
        "knock": lambda: noise * (np.exp(-70 * t) + np.exp(-70 * abs(t - 0.12)) * (t > 0.12)),
        "whistle": lambda: np.sin(2 * np.pi * pitch * (2000 * t + 500 * t * t / seconds)),
        "hiss": lambda: np.diff(noise, prepend=0) * 0.6,
        "chirp": lambda: np.sin(2 * np.pi * pitch * (500 + 12000 * (t % 0.07)) * (t % 0.07)),
        "drum": lambda: (tone(85) + 0.25 * noise) * np.exp(-12 * t),
    }[name]()
    fade = np.minimum(1, np.minimum(t, seconds - t) / 0.005)
    return (wave * fade * rng.uniform(0.25, 0.6)).astype(np.float32)


@functools.cache
def voices(split):
    """{voice: its entry in the committed bank's index}; test voices are never heard in training."""
    index = json.loads((VOICES / "index.json").read_text("utf-8"))
    return {voice: entry for voice, entry in sorted(index.items()) if entry["split"] == split}


@functools.cache
def voice_words(split, voice):
    """{word: float32 (S,)} of one voice."""
    from runtime.media import read_audio
    entry = voices(split)[voice]
    audio = read_audio(VOICES / entry["file"]).numpy()
    return {word: audio[a:b] for word, (a, b) in entry["words"].items()}


def say(rng, word, split, voice):
    """float32 (S,): `word` by `voice`, at a random pace (+-8 %) and loudness."""
    audio = voice_words(split, voice)[word]
    pace = rng.uniform(0.92, 1.08)
    audio = np.interp(np.arange(0, len(audio) - 1, pace), np.arange(len(audio)), audio)
    return (audio * rng.uniform(0.6, 1.0) / (abs(audio).max() + 1e-6) * 0.5).astype(np.float32)


def choose_voice(rng, split):
    return str(rng.choice(list(voices(split))))


def place(total, pieces):
    """float32 (total,): the (start sample, audio) pieces added up."""
    out = np.zeros(total, np.float32)
    for start, audio in pieces:
        end = min(total, start + len(audio))
        out[start:end] += audio[:end - start]
    return out


def add_noise(rng, audio, decibels):
    """Adds white noise at a signal-to-noise ratio over the sounding part."""
    signal = np.sqrt(np.mean(audio[abs(audio) > 0.01] ** 2) + 1e-9)
    return audio + (signal * 10 ** (-decibels / 20)
                    * rng.standard_normal(len(audio))).astype(np.float32)


def speak(rng, words, split, gap=(0.06, 0.2)):
    """Words in a row -> audio (S,), whole frames long, at least 2 s."""
    voice, at, pieces = choose_voice(rng, split), int(rng.uniform(0.05, 0.4) * RATE), []
    for word in words:
        audio = say(rng, word, split, voice)
        pieces.append((at, audio))
        at += len(audio) + int(rng.uniform(*gap) * RATE)
    total = max(4, -(-at // FRAME)) * FRAME
    return add_noise(rng, place(total, pieces), rng.uniform(20, 40))


def events(rng, at_frames, names):
    """5 s of audio with sound `names[i]` inside frame `at_frames[i]`, over a faint hum of noise."""
    pieces = []
    for frame, name in zip(at_frames, names, strict=True):
        audio = sound(rng, name)
        pieces.append((frame * FRAME + int(rng.uniform(0.02, 0.14) * RATE), audio))
    return (place(FRAMES * FRAME, pieces)
            + 0.003 * rng.standard_normal(FRAMES * FRAME).astype(np.float32))
