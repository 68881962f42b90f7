"""What training does to a record before the model sees it.  Paper Sec. 4.3; the probabilities are
not published, the forms follow the authors' later loader.

     record, its clip --mask--> without sound or picture, for the blind columns of the tables
                      --pair--> a picture without sound gets a random one: both are asked about, or
                                one, and the other one distracts
                      --match-> "do picture and sound belong together?", half of the time another's
Every draw depends on (seed, number of the sample) only: the same in any run and process.

Public: Mixing, drawn_mask, mix, MATCH_PROMPTS."""

import dataclasses
from dataclasses import dataclass

import numpy as np

MATCH_PROMPTS = ("Is the audio compatible with the video?",
                 "Are the audio and the video from the same source?",
                 "Is the audio related to the video?")


@dataclass(frozen=True)
class Mixing:
    """mask: what every sample lacks ("audio", "visual").  Shares, 0 to 1: mask_share of all samples
    lack the sound, the picture or both (a third each); pair_share of the pictures without sound get
    a random one, join_share of those with both questions; match_share of the videos with sound
    become matching questions."""
    seed: int = 0
    mask: str = ""
    mask_share: float = 0.0
    pair_share: float = 0.0
    join_share: float = 0.5
    match_share: float = 0.0


def drawn_mask(mixing, g):
    """What sample number g lacks: mixing.mask, else mostly nothing (None)."""
    if mixing.mask:
        return mixing.mask
    rng = np.random.default_rng([mixing.seed, 7, g])
    return (str(rng.choice(["audio", "visual", "both"])) if rng.random() < mixing.mask_share
            else None)


def joined(first, second):
    """'What is shown?', 'Describe the sound.' -> 'What is shown, and describe the sound.'"""
    return f"{first.rstrip(' .?!')}, and {second[:1].lower()}{second[1:]}"


def mix(mixing, g, record, parts, find_sound):
    """-> prompt, target, parts of sample number g.

    parts: a Clip or Features (audio None: no sound).  find_sound(rng) -> (record, vectors or
    samples) of a record that is sound only, (None, None) where it cannot be read: then nothing
    changes, and the reason is told when that record's own turn comes."""
    seen = parts.frames if hasattr(parts, "frames") else parts.visual
    unchanged = record.prompt, record.target, parts
    rng = np.random.default_rng([mixing.seed, 11, g])
    if seen is None or record.history:
        return unchanged
    if parts.audio is None and rng.random() < mixing.pair_share:
        other, sound = find_sound(rng)
        if sound is None:
            return unchanged
        parts = dataclasses.replace(parts, audio=sound)
        if rng.random() < mixing.join_share:
            where = "image" if record.image else "video"
            asked = [(f"In the {where}, {record.prompt[:1].lower()}{record.prompt[1:]}",
                      record.target), (other.prompt, other.target)]
            (one, a), (two, b) = asked if rng.random() < 0.5 else asked[::-1]
            return joined(one, two), joined(a, b), parts
        if rng.random() < 0.5:
            return other.prompt, other.target, parts               # the picture distracts
        return record.prompt, record.target, parts                 # the sound distracts
    if parts.audio is not None and record.video and rng.random() < mixing.match_share:
        prompt = MATCH_PROMPTS[int(rng.integers(len(MATCH_PROMPTS)))]
        if rng.random() < 0.5:
            return prompt, "Yes", parts
        other, sound = find_sound(rng)
        if sound is None:
            return unchanged
        return prompt, "No", dataclasses.replace(parts, audio=sound)
    return unchanged
