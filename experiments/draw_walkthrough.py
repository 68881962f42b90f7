"""Draws the pictures of docs/walkthrough.md into docs/ (needs the extra `plot`).

     python -m experiments.draw_walkthrough

The page is run first, as its test runs it, and the pictures show the page's own variables, so text
and pictures cannot differ.

     page["clip"] --figures.look_inside, draw_attention--> walkthrough_attention.png
     page["joint"], block_causal_mask --draw_masks-->      walkthrough_masks.png
     page["queries"] --draw_windows-->                     walkthrough_cosines.png

Public: run_page, draw."""

import contextlib
import doctest
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import data
from experiments import figures
from miniature.world import VIDEO_FPS
from runtime.media import write_video

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "walkthrough.md"


def run_page():
    """Runs the page as a doctest -> (number of failed lines, number of lines), its variables. Every
    difference is printed."""
    test = doctest.DocTestParser().get_doctest(PAGE.read_text("utf-8"), {}, PAGE.name, str(PAGE), 0)
    with contextlib.chdir(DOCS.parent):                        # the presets' paths start there
        results = doctest.DocTestRunner(verbose=False).run(test, clear_globs=False)
    return results, test.globs


def draw_clip(page):
    """Frames, spectrogram and, below them, the cross-attention of the queries -> Figure."""
    with tempfile.TemporaryDirectory() as folder:
        path, inside = Path(folder) / "clip.mp4", Path(folder) / "inside.npz"
        write_video(path, page["video"], VIDEO_FPS, page["audio"])
        record = data.Record("walkthrough", "avsd", page["question"], "pink", video=str(path))
        figures.look_inside(page["model"], [record], None, None, {}, inside)
        held = dict(np.load(inside))
        # Columns of 20 ms, as single ones of 10 ms are mostly noise, which PNG cannot compress.
        held["mel"] = held["mel"].reshape(80, -1, 2).mean(axis=2)
        return figures.draw_attention(held)


def draw_masks(page):
    """Left: the audio step in each joint vector, found by the smallest distance; right: the mask of
    one window -> Figure."""
    joint, sound, width = page["joint"].detach(), page["sound"].detach(), page["visual"].shape[-1]
    F, N, _ = joint.shape
    step = torch.cdist(joint[..., width:].flatten(0, 1), sound).argmin(dim=1).reshape(F, N).numpy()
    K = page["model"].config.window_frames
    mask = page["block_causal_mask"](K, N, page["model"].config.causal).numpy()
    figure, (left, right) = figures.pyplot().subplots(
        1, 2, figsize=(figures.WIDTH, 4.3), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    image = left.imshow(step / N / page["model"].config.fps, cmap="cividis", aspect="auto")
    for t in range(F):
        for j in range(N):
            left.text(j, t, int(step[t, j]), ha="center", va="center", fontsize=8,
                      color="black" if step[t, j] > F * N / 2 else "white")
    left.axhline(K - 0.5, color="white", linewidth=3)
    left.set(title="Eq. (1): the audio step in each joint vector; white line: windows",
             xlabel="vector j of the frame", ylabel="frame t", xticks=range(N), yticks=range(F))
    figure.colorbar(image, ax=left, label="time of the audio step, s")
    right.imshow(mask, cmap="cividis", interpolation="nearest")
    for k in range(1, K):
        right.axhline(k * N - 0.5, color="white", linewidth=0.6, alpha=0.6)
        right.axvline(k * N - 0.5, color="white", linewidth=0.6, alpha=0.6)
    ticks = [k * N + (N - 1) / 2 for k in range(K)]
    right.set(title=f"the mask of a window, {K * N} x {K * N}; yellow: attends",
              xlabel="frame that is looked at", ylabel="frame that looks")
    right.set_xticks(ticks, map(str, range(K)))
    right.set_yticks(ticks, map(str, range(K)))
    for axis in (left, right):
        axis.grid(False)
        axis.tick_params(length=0)
    return figure


def draw_windows(page):
    """The cosines of all pairs of output queries, one matrix per window -> Figure."""
    matrices = [figures.cosines(queries[None]).numpy() for queries in page["queries"].detach()]
    figure, axes = figures.pyplot().subplots(
        1, len(matrices), figsize=(figures.WIDTH * 0.8, 3.3), layout="constrained")
    for w, (axis, matrix) in enumerate(zip(axes, matrices, strict=True)):
        image = axis.imshow(matrix, cmap="cividis", vmin=-0.5, vmax=1)
        mean, ticks = figures.off_diagonal_mean(matrix), range(len(matrix))
        axis.set(title=f"window {w + 1}, mean of the pairs {mean:.2f}", xlabel="query",
                 ylabel="query")
        axis.set_xticks(ticks, [tick + 1 for tick in ticks])
        axis.set_yticks(ticks, [tick + 1 for tick in ticks])
        axis.grid(False)
    figure.colorbar(image, ax=axes, label="cosine similarity")
    return figure


def draw(folder, page):
    """Draws all pictures of the page into `folder` -> their paths."""
    drawn = []
    for name, make in (("attention", draw_clip), ("masks", draw_masks), ("cosines", draw_windows)):
        figure = make(page)
        drawn.append(Path(folder) / f"walkthrough_{name}.png")
        figure.savefig(drawn[-1], dpi=100, pil_kwargs={"optimize": True})       # 900 pixels wide
        figures.pyplot().close(figure)
    return drawn


if __name__ == "__main__":
    (failed, attempted), page = run_page()
    if failed:
        sys.exit(f"{failed} of {attempted} lines of {PAGE.name} differ; correct the page first")
    print(*draw(DOCS, page), sep="\n")
