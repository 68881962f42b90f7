"""Renders the miniature's spoken words with espeak-ng: every word by every voice -> one small Opus
file per voice, and weights/voices/index.json with the place of each word (samples at 16 kHz).

No test speaker is heard in training, nor is one of the two test accents. Scottish test voices were
tried, but espeak's vowels differ so much there that the tiny Whisper, trained without them, misses
44 % of single clean words (received pronunciation: 14 %).

`python -m miniature voices` runs it."""

import json
import shutil
import subprocess
import tempfile
import wave
from pathlib import Path

import av
import numpy as np
import torch
import torchaudio.functional as AF

from miniature.world import RATE, VOICES, WORDS

SPLITS = {  # split: (accents, speakers); every accent speaks with every speaker's voice
    "train": (("en-us", "en-gb", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),
              ("m1", "m3", "m4", "m7", "m8", "f1", "f2", "f4")),
    "test": (("en-us", "en-gb-x-rp"), ("m2", "m5", "m6", "f3", "f5"))}


def render(word, voice, speed):
    """float32 (S,) at 16 kHz: `word` by espeak-ng, the silence around it cut off."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "word.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", str(speed), "-w", path, word], check=True)
        with wave.open(str(path)) as file:
            rate = file.getframerate()
            audio = np.frombuffer(
                file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    loud = np.flatnonzero(abs(audio) > 0.02 * abs(audio).max())
    audio = audio[max(0, loud[0] - 100):loud[-1] + 400]
    return AF.resample(torch.from_numpy(audio), rate, RATE).numpy()


def write_opus(path, audio):
    """Mono Opus at 24 kbit/s."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libopus", rate=48000, layout="mono")
        stream.bit_rate = 24000
        samples = (np.clip(audio, -1, 1) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = RATE
        resampler = av.AudioResampler(format="s16", layout="mono", rate=48000, frame_size=960)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))


def make_voices(folder=VOICES):
    """Writes all voices and their index into `folder`. SystemExit where espeak-ng is missing."""
    if not shutil.which("espeak-ng"):
        raise SystemExit("espeak-ng is not installed (apt install espeak-ng); the committed word "
                         f"bank in {folder} needs no rendering")
    folder.mkdir(parents=True, exist_ok=True)
    index, gap = {}, np.zeros(RATE // 10, np.float32)
    for split, (accents, speakers) in SPLITS.items():
        for k, voice in enumerate(f"{a}+{s}" for a in accents for s in speakers):
            pieces, words, at = [gap], {}, len(gap)
            for word in WORDS:
                audio = render(word, voice, speed=140 + 15 * (k % 3))
                words[word] = (at, at + len(audio))
                pieces += [audio, gap]
                at += len(audio) + len(gap)
            name = f"{split}-{voice}.ogg"
            write_opus(folder / name, np.concatenate(pieces))
            index[voice] = {"split": split, "file": name, "words": words}
            print(f"{name}: {len(words)} words, {at / RATE:.1f} s")
    (folder / "index.json").write_text(json.dumps(index) + "\n", "utf-8")
