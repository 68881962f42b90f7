"""The scenes of the miniature: one function for each kind of clip plans what happens in it, what
is seen and heard at every half second, and what is asked about it.

     rng, split --SCENES[name]--> Scene: media (functions that draw or sound), facts, questions

A scene draws all its random numbers from `rng` in a fixed order, so a seed always gives the same
clip. Planning is cheap; a clip is drawn only when one of its `media` functions is called.

Public: Scene, SCENES, TASKS, PROMPTS, WEIGHTS, TRAIN_CLIPS, TEST_CLIPS."""

from dataclasses import dataclass

import numpy as np

from miniature.world import (
    COLOURS,
    FRAME,
    FRAMES,
    LIPS_OF,
    NOTHING,
    PLACES,
    RATE,
    SHAPES,
    SOUNDS,
    WINDOW,
    add_noise,
    background,
    choose_number,
    choose_objects,
    choose_voice,
    choose_words,
    draw,
    draw_lips,
    draw_number,
    draw_still,
    events,
    is_held_out_pair,
    place,
    say,
    speak,
    to_video,
)

TASKS = ("asr", "ac", "ic", "ocr", "vqa", "videoqa", "avsr", "avsd", "isqa", "avssd", "avm")
# How often a training question is sampled, by task or by "task-type". Tasks that have few clips or
# that are hard to learn are sampled more often.
WEIGHTS = {"asr": 1.0, "ac": 0.8, "ic": 2.5, "ocr": 0.6, "vqa": 0.8, "videoqa": 1.6, "avsr": 1.3,
           "avsd": 0.8, "isqa": 2.2, "avssd": 1.5, "avm": 1.2, "avm-video": 2.4,
           "caption": 0.6}
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


@dataclass
class Scene:
    """The plan of one clip. The parts of the model are pretrained on its facts in words. The sounds
    "yes" and "no" are the matching and the other sound of the task avm."""
    media: dict                # video, image, audio, yes, no -> the function that renders it
    facts: list                # [(words seen, words heard)], one pair per frame of 0.5 s
    questions: list            # [(task, prompt, target, extras)]; extras: fields of the record
    ask: object = None         # function -> more questions about the same clip
    stills: object = None      # function -> list of (64,64,3), one per fact: the clip at 2 Hz


def listing(words):
    """'red, blue'"""
    return ", ".join(words)


def name(pair):
    """'red ball'"""
    return f"{pair[0]} {pair[1]}"


def one_window(*frames):
    """True when all these frames lie in one window of the causal Q-Former."""
    return len({frame // WINDOW for frame in frames}) == 1


def spread(words):
    """Spoken words as facts, two frames per word."""
    return [heard for word in words for heard in ([word], [])]


def by_quarter(objects, spots):
    """A still in words: colour and shape of each quarter in reading order, NOTHING where empty."""
    at = dict(zip(spots, objects, strict=True))
    return [word for quarter in range(4) for word in at.get(quarter, (NOTHING, NOTHING))]


def speech_scene(rng, split):
    """asr: one voice speaks two to five words with a little noise."""
    words = choose_words(rng, int(rng.integers(2, 6)), split)
    return Scene({"audio": lambda: speak(rng, words, split)},
                 [([], heard) for heard in spread(words)],
                 [("asr", PROMPTS["asr"], " ".join(words), {"chance": 0.0})])


def sounds_scene(rng, split):
    """ac: two to four sound events, which the answer names in their order."""
    n = int(rng.integers(2, 5))
    names = [str(s) for s in rng.choice(SOUNDS, n)]
    frames = np.sort(rng.permutation(FRAMES)[:n]).tolist()
    facts = [([], [names[frames.index(f)]] if f in frames else []) for f in range(FRAMES)]
    return Scene({"audio": lambda: events(rng, frames, names)}, facts,
                 [("ac", PROMPTS["ac"], listing(names), {"chance": 0.0})])


def still_questions(rng, objects, places):
    """Three questions about a still with three objects: one about a colour, a shape and a place."""
    c, s, p = rng.integers(0, len(objects), 3)
    return [
        ("vqa", f"What colour is the {objects[c][1]}?", objects[c][0],
         {"chance": 1 / 8, "type": "colour"}),
        ("vqa", f"What shape is the {objects[s][0]} object?", objects[s][1],
         {"chance": 1 / 6, "type": "shape"}),
        ("vqa", f"Where is the {objects[p][1]}?", places[p],
         {"chance": 1 / 4, "type": "place"})]


def still_scene(rng, split):
    """ic and vqa: three objects stand in three quarters of a still."""
    objects = choose_objects(rng, 3, split)
    spots = np.sort(rng.permutation(4)[:3])
    caption = ("ic", PROMPTS["ic"], listing(map(name, objects)), {"chance": 0.0})

    def ask():
        return still_questions(rng, objects, [PLACES[spot] for spot in spots])

    return Scene({"image": lambda: draw_still(rng, objects, spots)},
                 [(by_quarter(objects, spots), [])], [caption, *ask()], ask,
                 lambda: [draw_still(rng, objects, spots)])


def number_scene(rng, split):
    """ocr: an image of a number with three digits."""
    digits = choose_number(rng, split)
    words = [str(digit) for digit in digits]
    return Scene({"image": lambda: draw_number(rng, digits)}, [(words, [])],
                 [("ocr", PROMPTS["ocr"], " ".join(words), {"chance": 0.001})],
                 stills=lambda: [draw_number(rng, digits)])


def parade_scene(rng, split):
    """videoqa: a silent video shows five objects one after the other, each for one to three frames.
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

    def ask():
        return [question(0), question(1)]

    return Scene({"video": lambda: to_video(stills(), rng)}, facts, [*ask(), dense], ask, stills)


def lips_scene(rng, split):
    """avsr: a mouth speaks two to four words, one per second, through loud noise (-6 to 0 dB)."""
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
    heard. The second turn asks for the colour at one sound, the third for the colour right after
    another sound. It must be another one: after the same sound, the turn before has already named
    the colour whose successor is asked, and the picture alone gave 61 % right answers."""
    shape, colours = str(rng.choice(SHAPES)), []
    while len(colours) < FRAMES:
        colour = str(rng.choice(list(COLOURS)))
        held_out = split == "train" and is_held_out_pair(colour, shape)
        if colour not in colours[-2:] and not held_out:
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
    """isqa: a spoken question asks about one of the three objects in a still."""
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
    """avssd: four objects light up twice each, one at a time, and a sound comes with one of them.
    Who only looks has four candidates left, and who only listens does not know the objects."""
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
    """avm, the half with videos: an object lights up in three frames. The matching sound is heard
    in the same three frames, the other one in three other frames."""
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
    """avm, the half with images: the speech names one of the two objects in a still, or neither."""
    objects = choose_objects(rng, 2, split)
    spots = np.sort(rng.permutation(4)[:2])
    others = [(c, s) for c in COLOURS for s in SHAPES       # held-out pairs are not heard either
              if c not in (objects[0][0], objects[1][0])
              and s not in (objects[0][1], objects[1][1])
              and not (split == "train" and is_held_out_pair(c, s))]
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
# number of clips per scene
TRAIN_CLIPS = {"speech": 768, "sounds": 320, "still": 320, "number": 512, "parade": 448,
               "lips": 512, "concert": 480, "spoken_question": 512, "lamps": 480, "flash": 224,
               "spoken_caption": 224}
TEST_CLIPS = {"speech": 500, "sounds": 500, "still": 500, "number": 500, "parade": 250,
              "lips": 500, "concert": 250, "spoken_question": 500, "lamps": 500, "flash": 125,
              "spoken_caption": 125}
