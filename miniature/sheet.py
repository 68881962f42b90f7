"""Draws docs/miniature.png: one test clip of each task as the model gets it (frames at 2 Hz, log-mel
of the sound) with its questions. `python -m miniature sheet` runs it; it needs the extra `plot`."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from data import load_clip, read_manifest
from miniature.generate import make
from miniature.scenes import TASKS
from miniature.world import SIZE
from whisper_enc import log_mel_spectrogram

SECONDS = 5


def strip(clip):
    """uint8 (64, 10*66, 3): the frames of a video side by side, or one image."""
    canvas = np.full((SIZE, 10 * (SIZE + 2), 3), 255, np.uint8)
    for i, frame in enumerate(
            [] if clip.frames is None else clip.frames.permute(0, 2, 3, 1).numpy()):
        canvas[:, i * (SIZE + 2):i * (SIZE + 2) + SIZE] = frame
    return canvas


def draw_sheet(path, folder="media/miniature"):
    """Writes one row per task into `path` (PNG). Missing test clips are made in `folder` first."""
    plt.switch_backend("Agg")                              # draws into files; needs no display
    make(folder, splits=("test",))
    records = read_manifest(Path(folder) / "test.jsonl")
    figure, axes = plt.subplots(len(TASKS), 3, figsize=(15, 1.22 * len(TASKS)),
                                gridspec_kw={"width_ratios": [5.2, 2.6, 4.4]})
    for row, task in zip(axes, TASKS, strict=True):
        first = next(r for r in records if r.task == task)
        same = [r for r in records if (r.task, r.video, r.image, r.audio) == (
            task, first.video, first.image, first.audio)]
        clip = load_clip(first, size=SIZE)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
        row[0].imshow(strip(clip))
        row[0].set_ylabel(task, rotation=0, ha="right", va="center", fontsize=12, fontweight="bold")
        if clip.audio is not None:
            mel = log_mel_spectrogram(clip.audio, SECONDS * 16000)[0]
            seconds = len(clip.audio) / 16000
            row[1].imshow(mel[:, :round(seconds * 100)], origin="lower", aspect="auto",
                          cmap="magma", extent=(0, seconds, 0, 80))
            row[1].set_xlim(0, SECONDS)
        lines = []
        for record in same[-2:]:
            turns = [f"{q} {a}." for q, a in record.history]
            lines.append(f"{' '.join([*turns, record.prompt])}  -> {record.target}")
        text = "\n".join("\n".join(textwrap.wrap(line, 66)) for line in lines)
        row[2].text(0, 0.5, text, va="center", fontsize=8.5, transform=row[2].transAxes)
    axes[0][0].set_title("frames at 2 Hz (0, 0.5, 1.0 s ...)", fontsize=10)
    axes[0][1].set_title("log-mel, 0-5 s", fontsize=10)
    axes[0][2].set_title("question -> answer", fontsize=10)
    figure.tight_layout(h_pad=0.2, w_pad=0.4)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    print(path)
