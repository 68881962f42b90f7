"""AVEB in miniature: the benchmark's eleven tasks on generated clips, written as real .mp4, .wav
and .png files with a JSONL manifest, and read back through data.py like anybody's data.

     world:    coloured shapes, drawn digits, lips, sound events, spoken words
     make:     scene -> frames (F,64,64,3) at 8 Hz + audio (S,) at 16 kHz -> files + questions
     pretrain: the tiny Whisper, InstructBLIP and LLaMA of FAVOR (in miniature_pretrain.py)

Time runs in frames of 0.5 s, FAVOR's video rate.  Everything that happens, happens inside one
frame.  Held out for testing: ten espeak voices, word orders, pairs of colour and shape, numbers
(see `_held_out_*`).

   python -m miniature make       train and test clips into media/miniature (2-3 minutes on 2 cores)
   python -m miniature sheet      a picture of one clip of each task, with its questions
   python -m miniature voices     render the word bank again (needs espeak-ng)
   python -m miniature pretrain   train the three frozen parts again (about an hour on 2 cores)

Public: make, COLOURS, SHAPES, SOUNDS, WORDS, TASKS, TRAIN_CLIPS, TEST_CLIPS."""

import argparse
import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import cli

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

# How often a training question is drawn, by task or "task-type": what is short of clips, or hard,
# more often.
WEIGHTS = {"asr": 1.0, "ac": 0.8, "ic": 2.5, "ocr": 0.6, "vqa": 0.8, "videoqa": 1.6, "avsr": 1.3,
           "avsd": 0.8, "isqa": 2.2, "avssd": 1.5, "avm": 1.2, "avm-video": 2.4,
           "caption": 0.6}
TASKS = ("asr", "ac", "ic", "ocr", "vqa", "videoqa", "avsr", "avsd", "isqa", "avssd", "avm")
PROMPTS = {
    "asr": "Transcribe the speech into text.",
    "ac": "Please describe the audio.",
    "ic": "Describe this image in one short sentence.",
    "ocr": "What number is written in the image?",
    "avsr": "Transcribe the speech into text, paying attention to both audio and video.",
    "isqa": "Answer the question in the audio about the image.",
    "avssd": "What is the source of the sound?",
    "avm-video": "Is the audio compatible with the video?",
    "avm-image": "Is the audio describing the image?",
    "video": "Describe the video in detail.",
    "both": "Describe what is seen and heard in detail.",
}


# ---------------------------------------------------------------- what is held out for testing
def _held_out_pair(colour, shape):
    """One in six pairs of colour and shape is seen only in the test scenes."""
    return (list(COLOURS).index(colour) + SHAPES.index(shape)) % 6 == 0


def _held_out_order(first, second):
    """One in six ordered pairs of spoken words is heard only in the test clips."""
    return (WORDS.index(first) * 5 + WORDS.index(second)) % 6 == 0


def _held_out_number(digits):
    """One in five numbers is read only in the test images."""
    return sum(d * w for d, w in zip(digits, (1, 3, 7), strict=True)) % 5 == 0


def choose_objects(rng, n, split):
    """n (colour, shape) pairs, colours and shapes all different; in the test split one pair at
    least is held out, in training none."""
    while True:
        pairs = list(zip(rng.permutation(list(COLOURS))[:n].tolist(),
                         rng.permutation(SHAPES)[:n].tolist(), strict=True))
        held_out = sum(_held_out_pair(*pair) for pair in pairs)
        if (held_out == 0) == (split == "train"):
            return pairs


def choose_words(rng, n, split):
    """n different spoken words; test sentences hold a held-out order, training ones none."""
    while True:
        words = rng.permutation(WORDS)[:n].tolist()
        held_out = any(_held_out_order(a, b) for a, b in zip(words, words[1:], strict=False))
        if n == 1 or held_out == (split == "test"):
            return words


def choose_number(rng, split):
    """Three digits as a list of ints."""
    while True:
        digits = rng.integers(0, 10, 3).tolist()
        if _held_out_number(digits) == (split == "test"):
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
    tone = lambda hertz: np.sin(2 * np.pi * pitch * hertz * t)             # noqa: E731
    noise = rng.standard_normal(len(t)).astype(np.float32)
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
    index = json.loads((VOICES / "index.json").read_text())
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


# ---------------------------------------------------------------- scenes: media, facts, questions
@dataclass
class Scene:
    """One clip before it is drawn.  `media` maps video / image / audio / yes / no to functions that
    render them; `facts` says for every frame what is seen and what is heard, in words (the parts of
    the model are pretrained on these); a question is (task, prompt, target, extras), and extras
    become fields of its record."""
    media: dict
    facts: list                       # [(words seen, words heard)] by frame of 0.5 s
    questions: list
    ask: object = None                # function -> other questions about the same clip
    stills: object = None             # function -> list of (64,64,3), one a fact: what 2 Hz shows


def listing(words):
    return ", ".join(words)


def name(pair):
    return f"{pair[0]} {pair[1]}"


def one_window(*frames):
    """True when all these frames lie in one window of the causal Q-Former."""
    return len({frame // WINDOW for frame in frames}) == 1


def spread(words):
    """Spoken words as facts: two frames a word."""
    return [heard for word in words for heard in ([word], [])]


def by_quarter(objects, spots):
    """A still in words: colour and shape of each quarter in reading order, NOTHING where empty."""
    at = dict(zip(spots, objects, strict=True))
    return [word for quarter in range(4) for word in at.get(quarter, (NOTHING, NOTHING))]


def speech_scene(rng, split):
    """asr: two to five words, a voice, a little noise."""
    words = choose_words(rng, int(rng.integers(2, 6)), split)
    return Scene({"audio": lambda: speak(rng, words, split)},
                 [([], heard) for heard in spread(words)],
                 [("asr", PROMPTS["asr"], " ".join(words), {"chance": 0.0})])


def sounds_scene(rng, split):
    """ac: two to four events, named in their order."""
    n = int(rng.integers(2, 5))
    names = [str(s) for s in rng.choice(SOUNDS, n)]
    frames = np.sort(rng.permutation(FRAMES)[:n]).tolist()
    facts = [([], [names[frames.index(f)]] if f in frames else []) for f in range(FRAMES)]
    return Scene({"audio": lambda: events(rng, frames, names)}, facts,
                 [("ac", PROMPTS["ac"], listing(names), {"chance": 0.0})])


def still_questions(rng, objects, places):
    """One question of each kind about a still with three objects: which colour, shape, place."""
    c, s, p = rng.integers(0, len(objects), 3)
    return [
        ("vqa", f"What colour is the {objects[c][1]}?", objects[c][0],
         {"chance": 1 / 8, "type": "colour"}),
        ("vqa", f"What shape is the {objects[s][0]} object?", objects[s][1],
         {"chance": 1 / 6, "type": "shape"}),
        ("vqa", f"Where is the {objects[p][1]}?", places[p],
         {"chance": 1 / 4, "type": "place"})]


def still_scene(rng, split):
    """ic and vqa: three objects in the quarters of a still."""
    objects = choose_objects(rng, 3, split)
    spots = np.sort(rng.permutation(4)[:3])
    caption = ("ic", PROMPTS["ic"], listing(map(name, objects)), {"chance": 0.0})

    def ask():
        return still_questions(rng, objects, [PLACES[spot] for spot in spots])

    return Scene({"image": lambda: draw_still(rng, objects, spots)},
                 [(by_quarter(objects, spots), [])], [caption, *ask()], ask,
                 lambda: [draw_still(rng, objects, spots)])


def number_scene(rng, split):
    """ocr: three digits."""
    digits = choose_number(rng, split)
    words = [str(digit) for digit in digits]
    return Scene({"image": lambda: draw_number(rng, digits)}, [(words, [])],
                 [("ocr", PROMPTS["ocr"], " ".join(words), {"chance": 0.001})],
                 stills=lambda: [draw_number(rng, digits)])


def parade_scene(rng, split):
    """videoqa: five objects, one after the other, one to three frames each; silent.
    A cut at the window boundary is made likely, so that enough questions go across it."""
    objects = choose_objects(rng, 5, split)
    while True:
        cuts = np.sort(rng.permutation(np.arange(1, FRAMES))[:4])
        lengths = np.diff([0, *cuts, FRAMES])
        if lengths.max() <= 3 and (WINDOW in cuts or rng.random() < 0.5):
            break

    def stills():
        out = []
        for pair, length in zip(objects, lengths, strict=True):
            x, y, radius = rng.uniform(20, 44), rng.uniform(20, 44), rng.uniform(10, 15)
            for _ in range(length):
                out.append(background())
                draw(out[-1], pair, x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), radius)
        return out

    starts = [0, *cuts.tolist(), FRAMES]

    def question(attribute):                              # for the colour (0) or for the shape (1)
        step = int(rng.choice((-1, 1)))
        event = int(rng.integers(0, 4)) if step == 1 else int(rng.integers(1, 5))
        options = [o[attribute] for k, o in enumerate(objects) if k != event]
        options = rng.permutation(options).tolist()
        boundary = starts[max(event, event + step)]       # first frame of the later of the two
        asked, thing = (("colour", objects[event][1]), ("shape", objects[event][0]))[attribute]
        when = "after" if step == 1 else "before"
        return ("videoqa", f"What {asked} comes right {when} the {thing} object? "
                           f"Choose one from: {listing(options)}.",
                objects[event + step][attribute],
                {"chance": 1 / 4, "options": options, "type": when,
                 "one_window": one_window(boundary - 1, boundary)})

    dense = ("caption", PROMPTS["video"], listing(map(name, objects)), {})
    facts = [(list(pair), []) for pair, length in zip(objects, lengths, strict=True)
             for _ in range(length)]
    ask = lambda: [question(0), question(1)]                                     # noqa: E731
    return Scene({"video": lambda: to_video(stills(), rng)}, facts, [*ask(), dense], ask, stills)


def lips_scene(rng, split):
    """avsr: a mouth speaks two to four words, one a second, through loud noise (-6 to 0 dB)."""
    words = choose_words(rng, int(rng.integers(2, 5)), split)

    def stills():
        return [draw_lips(rng, LIPS_OF[word], background()) for word in words for _ in range(2)]

    def audio():
        voice = choose_voice(rng, split)
        pieces = [(2 * k * FRAME + int(rng.uniform(0.02, 0.2) * RATE),
                   say(rng, word, split, voice)) for k, word in enumerate(words)]
        noisy = add_noise(rng, place(2 * len(words) * FRAME, pieces), rng.uniform(-6, 0))
        return noisy / max(1.0, abs(noisy).max())

    facts = [([LIPS_OF[word]], heard) for word in words for heard in ([word], [])]
    return Scene({"video": lambda: to_video(stills()), "audio": audio}, facts,
                 [("avsr", PROMPTS["avsr"], " ".join(words), {"chance": 0.0})], stills=stills)


def concert_scene(rng, split):
    """avsd, a dialogue in turns: an object changes colour in every frame while three sounds are
    heard.  Only what was on screen at the sound answers the second turn, only the frame after
    another sound the third.  (Were that the same sound, the turn before would name the colour whose
    successor is asked, and the picture alone would do: 61 % right.)"""
    shape, colours = str(rng.choice(SHAPES)), []
    while len(colours) < FRAMES:
        colour = str(rng.choice(list(COLOURS)))
        if colour not in colours[-2:] and not (split == "train" and _held_out_pair(colour, shape)):
            colours.append(colour)
    names = rng.permutation(SOUNDS)[:3].tolist()
    frames = np.sort(rng.permutation(FRAMES - 1)[:3]).tolist()
    heard = {frame: [sound_] for frame, sound_ in zip(frames, names, strict=True)}

    def stills():
        x, y, out = rng.uniform(20, 44), rng.uniform(20, 44), []
        for colour in colours:
            out.append(background())
            draw(out[-1], (colour, shape), x, y, 14)
        return out

    first = ("Which sounds are heard?", listing(names))
    both = listing(f"{sound_} {colours[frame]}"
                   for sound_, frame in zip(names, frames, strict=True))

    def ask():
        k = int(rng.integers(0, 3))
        at = (f"What colour is the object at the {names[k]}?", colours[frames[k]])
        other = (k + 1) % 3
        after = (f"And what colour is it right after the {names[other]}?",
                 colours[frames[other] + 1])
        return [("avsd", *at, {"history": (first,), "chance": 1 / 8, "type": "at"}),
                ("avsd", *after, {"history": (first, at),
                                  "chance": 1 / 8, "type": "after",
                                  "one_window": one_window(frames[other], frames[other] + 1)})]

    questions = [*ask(), ("caption", *first, {}), ("caption", PROMPTS["both"], both, {})]
    facts = [([colour, shape], heard.get(frame, [])) for frame, colour in enumerate(colours)]
    return Scene({"video": lambda: to_video(stills(), rng),
                  "audio": lambda: events(rng, frames, names)}, facts, questions, ask, stills)


def spoken_question_scene(rng, split):
    """isqa: a still with three objects and a spoken question about one of them."""
    objects = choose_objects(rng, 3, split)
    spots = np.sort(rng.permutation(4)[:3])
    colour, shape = objects[int(rng.integers(0, 3))]
    if rng.random() < 0.5:
        words, answer, chance = ["what", "colour", "is", "the", shape], colour, 1 / 8
    else:
        words, answer, chance = ["what", "shape", "is", colour], shape, 1 / 6
    caption = by_quarter(objects, spots)
    return Scene(
        {"image": lambda: draw_still(rng, objects, spots),
         "audio": lambda: speak(rng, words, split, gap=(0.03, 0.1))},
        [(caption, [word]) for word in words],
        [("isqa", PROMPTS["isqa"], answer, {"chance": chance, "type": words[1]}),
         ("caption", PROMPTS["asr"], " ".join(words), {}),
         ("caption", PROMPTS["ic"], listing(map(name, objects)), {})],
        stills=lambda: [draw_still(rng, objects, spots)])


def lamps_scene(rng, split):
    """avssd: four objects light up twice each, one at a time; the sound comes with one of them, so
    looking alone leaves four, listening alone all of them."""
    objects = choose_objects(rng, 4, split)
    source = int(rng.integers(0, 4))
    lit = rng.permutation([0, 0, 1, 1, 2, 2, 3, 3, -1, -1]).tolist()    # which one is lit, by frame
    frames = [frame for frame, now in enumerate(lit) if now == source]
    noise = str(rng.choice(SOUNDS))

    def stills():
        spots = [(16 + 32 * (q % 2), 16 + 32 * (q // 2)) for q in rng.permutation(4)]
        out = []
        for now in lit:
            out.append(background())
            for k, (pair, (x, y)) in enumerate(zip(objects, spots, strict=True)):
                draw(out[-1], pair, x, y, 9, lit=k == now)
        return out

    facts = [([*objects[now], "lit"] if now >= 0 else ["dark"], [noise] if now == source else [])
             for now in lit]
    dense = listing(objects[now][0] for now in lit if now >= 0)
    return Scene({"video": lambda: to_video(stills(), rng, shake=1),
                  "audio": lambda: events(rng, frames, [noise] * 2)}, facts,
                 [("avssd", PROMPTS["avssd"], name(objects[source]), {"chance": 1 / 48}),
                  ("caption", "Which objects light up?", dense, {})], stills=stills)


def flash_scene(rng, split):
    """avm, video half: an object lights up in three frames.  The matching sound comes in the same
    three, the other one in three others."""
    pair = choose_objects(rng, 1, split)[0]
    order = rng.permutation(FRAMES)
    when = {"yes": np.sort(order[:3]), "no": np.sort(order[3:6])}
    kind = [str(rng.choice(SOUNDS))] * 3

    def stills():
        x, y, out = rng.uniform(24, 40), rng.uniform(24, 40), []
        for frame in range(FRAMES):
            out.append(background())
            draw(out[-1], pair, x, y, 11, lit=frame in when["yes"])
        return out

    facts = [([*pair, "lit" if frame in when["yes"] else "dark"],
              {answer: kind[:1] if frame in when[answer] else [] for answer in when})
             for frame in range(FRAMES)]
    return Scene({"video": lambda: to_video(stills(), rng, shake=1),
                  "yes": lambda: events(rng, when["yes"], kind),
                  "no": lambda: events(rng, when["no"], kind)}, facts,
                 [("avm", PROMPTS["avm-video"], answer,
                   {"audio": answer, "chance": 1 / 2, "type": "video"})
                  for answer in ("yes", "no")], stills=stills)


def spoken_caption_scene(rng, split):
    """avm, image half: two objects in a still; the speech names one of them, or neither."""
    objects = choose_objects(rng, 2, split)
    spots = np.sort(rng.permutation(4)[:2])
    others = [(c, s) for c in COLOURS for s in SHAPES           # a held-out pair is not even heard
              if c not in (objects[0][0], objects[1][0])
              and s not in (objects[0][1], objects[1][1])
              and not (split == "train" and _held_out_pair(c, s))]
    said = {"yes": objects[int(rng.integers(0, 2))], "no": others[int(rng.integers(len(others)))]}
    caption = by_quarter(objects, spots)
    return Scene({"image": lambda: draw_still(rng, objects, spots),
                  "yes": lambda: speak(rng, said["yes"], split),
                  "no": lambda: speak(rng, said["no"], split)},
                 [(caption, {answer: [said[answer][k]] for answer in said}) for k in (0, 1)],
                 [("avm", PROMPTS["avm-image"], answer,
                   {"audio": answer, "chance": 1 / 2, "type": "image"})
                  for answer in ("yes", "no")],
                 stills=lambda: [draw_still(rng, objects, spots)] * 2)


SCENES = {"speech": speech_scene, "sounds": sounds_scene, "still": still_scene,
          "number": number_scene, "parade": parade_scene, "lips": lips_scene,
          "concert": concert_scene, "spoken_question": spoken_question_scene,
          "lamps": lamps_scene, "flash": flash_scene, "spoken_caption": spoken_caption_scene}
TRAIN_CLIPS = {"speech": 768, "sounds": 320, "still": 320, "number": 512, "parade": 448,
               "lips": 512, "concert": 480, "spoken_question": 512, "lamps": 480, "flash": 224,
               "spoken_caption": 224}
TEST_CLIPS = {"speech": 500, "sounds": 500, "still": 500, "number": 500, "parade": 250,
              "lips": 500, "concert": 250, "spoken_question": 500, "lamps": 500, "flash": 125,
              "spoken_caption": 125}


# ---------------------------------------------------------------- making the files
def _make_one(job):
    """(folder, split, scene, index, seed) -> records.  Each clip has its own random stream, so the
    number of workers changes nothing."""
    from data import Record
    from runtime.media import write_png, write_video, write_wav
    folder, split, scene, index, seed = job
    rng = np.random.default_rng(
        [seed, ("train", "test").index(split), list(SCENES).index(scene), index])
    plan = SCENES[scene](rng, split)
    media = {kind: render() for kind, render in plan.media.items()}
    stem, files = folder / split / f"{scene}_{index:05d}", {}
    if "video" in media:
        files["video"] = stem.with_suffix(".mp4")
        write_video(files["video"], media["video"], VIDEO_FPS, media.get("audio"))
    elif "image" in media:
        files["image"] = stem.with_suffix(".png")
        write_png(files["image"], media["image"])
    if "audio" in media and "video" not in media:
        files["audio"] = stem.with_suffix(".wav")
        write_wav(files["audio"], media["audio"])
    for answer in ("yes", "no"):
        if answer in media:
            files[answer] = stem.with_name(f"{stem.name}_{answer}.wav")
            write_wav(files[answer], media[answer])
    path = lambda kind: str(files[kind]) if kind in files else None              # noqa: E731
    records = []
    for k, (task, prompt, target, extras) in enumerate(plan.questions):
        if task == "caption" and split == "test":
            continue                                     # dense captions only help the training
        meta = {key: extras[key] for key in ("chance", "type", "one_window") if key in extras}
        if split == "train":
            meta["weight"] = WEIGHTS.get(f"{task}-{extras.get('type')}", WEIGHTS[task])
        records.append(Record(
            id=f"{split}-{scene}-{index:05d}-{k}", task=task, prompt=prompt,
            target=target, refs=(target,),
            image=path("image"), video=path("video"), audio=path(extras.get("audio", "audio")),
            options=tuple(extras.get("options", ())), history=extras.get("history", ()),
            meta=meta))
    return records


VERSION = 6           # of what is drawn and asked: older clips are made anew


def make(folder, seed=0, scale=1.0, workers=None, splits=("train", "test"), counts=None, log=print):
    """Writes the clips and <split>.jsonl into `folder`; a split whose manifest is there and was
    made with the same settings is kept.  scale multiplies the number of training clips; counts
    {split: {scene: clips}} replaces TRAIN_CLIPS and TEST_CLIPS.  Same seed, same clips."""
    from data import write_manifest
    folder = Path(folder).resolve()
    counts = counts or {"test": TEST_CLIPS, "train": {
        scene: max(1, round(n * scale)) for scene, n in TRAIN_CLIPS.items()}}
    workers = workers or cli.cores()
    for split in splits:
        settings = {"seed": seed, "clips": counts[split], "version": VERSION}
        stamp = folder / f"{split}.made.json"
        if stamp.exists() and json.loads(stamp.read_text()) == settings:
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        jobs = [(folder, split, scene, index, seed)
                for scene, n in counts[split].items() for index in range(n)]
        started, records = time.time(), []
        for done, made in enumerate(cli.parallel(_make_one, jobs, workers), 1):
            records += made
            if done % 500 == 0 or done == len(jobs):
                seconds = time.time() - started
                log(f"making {split} clips: {done}/{len(jobs)}, {seconds:.0f} s, "
                    f"ETA {seconds / done * (len(jobs) - done):.0f} s")
        write_manifest(folder / f"{split}.jsonl", records)
        stamp.write_text(json.dumps(settings))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "sheet", "voices", "pretrain"))
    parser.add_argument("parts", nargs="*",
                        help="pretrain: llama, whisper, instructblip, projection (default: all)")
    parser.add_argument("--out", default="media/miniature", help="folder of the clips (make)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same clips")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="times the usual number of training clips")
    args = parser.parse_args()
    if args.command == "make":
        make(args.out, args.seed, args.scale)
    elif args.command == "sheet":
        from miniature.sheet import draw_sheet
        draw_sheet(HERE.parent / "docs" / "miniature.png")
    elif args.command == "voices":
        from miniature.voices import make_voices
        make_voices()
    else:
        from miniature.pretrain import pretrain
        pretrain(args.parts)
