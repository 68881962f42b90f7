"""The paper's Figs 3, 4 and 5 from runs of experiments/ablate.py, and where each query looks.

     python -m experiments.figures runs/ablate      draws OUT/*.png again (needs the extra `plot`)

     the end of a run's first stage --cross_attention, query_cosines--> OUT/inside/<system>.npz
     OUT/results.jsonl --> fig3.png  window size K at constant Q/K; frame rate when answering
                       --> fig4.png  lambda against scores and the queries' mean cosine
                           (both after the first stage, which all systems have)
                       --> learning.png  scores against steps, with and without each part
     OUT/inside/*.npz  --> fig5.png  cosine matrices of the queries for several lambda
                       --> attention-<system>.png  where the queries look, beside frames and sound
The colours are Okabe and Ito's, and every series also has its own marker and line style.

Public: query_cosines, off_diagonal_mean, look_inside, draw_scales, draw_lambda,
draw_learning, draw_cosines, draw_attention, draw_all, no_figures."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from aveb.answers import readable_samples
from aveb.tasks import ERROR_RATES
from experiments.tables import FPS, LAMBDAS, SYSTEMS, WINDOWS, Results, mean_interval
from tools.picture import cross_attention
from whisper_enc import SAMPLE_RATE, log_mel_spectrogram

COSINE_TASKS, COSINE_CLIPS = ("avsr", "videoqa", "avssd"), 64          # Fig. 4
BLUE, ORANGE = "#0072B2", "#D55E00"
WIDTH, DPI = 9.0, 110                                                  # inches, dots per inch
K_LABEL = "window size K, frames of 0.5 s"
LEARNING_TASKS = ("videoqa", "isqa", "avssd", "avsr", "avsd", "avm")   # Table 5's
LEARNING = {"complete": ("black", "-", "o"), "no-causal": (BLUE, "--", "s"),
            "no-windows": (ORANGE, "-.", "^"), "no-sync": ("#009E73", ":", "D"),
            "none": ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v")}


# ---------------------------------------------------------------- what a model does inside
def cosines(queries):
    """queries (W,Q,D) -> (Q,Q): cosine similarities within a window, averaged over windows."""
    unit = F.normalize(queries.float(), dim=-1, eps=1e-9)
    return (unit @ unit.transpose(1, 2)).mean(0)


def off_diagonal_mean(matrix):
    """The mean over pairs of different queries, as in Eq. (4)."""
    n = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / max(n * (n - 1), 1))


@torch.no_grad()
def query_cosines(model, records, cache, mask=None):
    """{task: (mean cosine matrix (Q,Q), clips)} over the first test clips of Fig. 4's tasks."""
    found = {}
    for task in COSINE_TASKS:
        some = [r for r in records if r.task == task][:COSINE_CLIPS]
        samples = readable_samples(model, some, cache, mask or None)[1]
        if samples:
            queries = model.audio_visual_tokens(samples)[1]                       # (windows,Q,D)
            found[task] = cosines(queries).cpu().numpy(), len(samples)
    return found


@torch.no_grad()
def look_inside(model, records, cache, mask, matrices, path):
    """Writes the data of Fig. 5 and attention-* into `path` (.npz): the matrices of query_cosines,
    and the cross-attention, frames, spectrogram, question and answer of one clip."""
    clips = [r for r in records if r.video and r.task == "avsd"] or [r for r in records if r.video]
    arrays = {f"cosine {task}": matrix.astype(np.float32) for task, (matrix, _) in matrices.items()}
    if clips:
        record = next((r for r in clips if r.meta.get("type") == "at"), clips[0])
        sample = readable_samples(model, [record], cache, mask or None)[1][0]
        streams = model.windowed_inputs(sample)
        with cross_attention(model.qformer) as looks:
            model.audio_visual_tokens([sample])
        clip = data.load_clip(record, fps=model.config.fps)
        arrays |= {
            "attention": torch.stack([look[0][:-1] for look in looks]).half().cpu().numpy(),
            "windows": [len(windows) for windows, _ in streams], "fps": model.config.fps,
            "vectors": max(model.visual.n_queries, model.audio_steps),
            "frames": F.interpolate(clip.frames.float(), 64).byte().numpy(),          # (F,3,64,64)
            "question": record.prompt, "right": record.target,
            "answer": model.generate([sample])[0]}
        if clip.audio is not None:
            arrays["mel"] = log_mel_spectrogram(clip.audio, len(clip.audio))[0].half().cpu().numpy()
            arrays["seconds"] = len(clip.audio) / SAMPLE_RATE
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **arrays)
    temporary.replace(path)


# ---------------------------------------------------------------- drawing
def no_figures(out):
    """What to install if matplotlib, an extra, is missing; "" if it is there."""
    if importlib.util.find_spec("matplotlib"):
        return ""
    return ("no figures, because matplotlib is missing: "
            f'pip install -e ".[plot]", then python -m experiments.figures {out}')


def pyplot():
    """matplotlib.pyplot with our style. It is an extra, so it is imported only here."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.grid": True,
                         "axes.titlesize": 9, "grid.color": "#DDDDDD", "grid.linewidth": 0.6})
    return plt


def curve(axis, at, by_seed, colour, style, marker, label, dots=True):
    """Draws means over seeds with 95 % intervals, and the seeds as dots if `dots` -> the line, or
    None if there is nothing to draw. at: x values; by_seed: {seed: value} for each of them."""
    there = [(x, [*values.values()]) for x, values in zip(at, by_seed, strict=True) if values]
    if not there:
        return None
    means, halves = zip(*(mean_interval(values) for _, values in there), strict=True)
    line = axis.errorbar([x for x, _ in there], means, [half or 0 for half in halves],
                         color=colour, linestyle=style, marker=marker, markersize=5, capsize=3,
                         label=label, zorder=3)
    for x, values in there if dots else ():
        axis.plot([x] * len(values), values, ".", color="black", alpha=0.4, markersize=3, zorder=4)
    return line


def score_label(task):
    return f"{task}: word error rate, %" if task in ERROR_RATES else f"{task}: right, %"


def within(axis, task):
    """Limits the axis to scores from 0 to 100 %, however wide the interval of two seeds is."""
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 0), high if task in ERROR_RATES else min(high, 100))


def draw_scales(stage):
    """Fig. 3: (a), (b) window size at a constant number of queries per frame, (c) frame rate when
    answering. stage: tables.Stage -> Figure."""
    figure, axes = pyplot().subplots(1, 3, figsize=(WIDTH, 2.9))
    for axis, task, letter in zip(axes[:2], ("asr", "videoqa"), "ab", strict=True):
        curve(axis, [*WINDOWS], [stage.by_seed(s, task) for s in WINDOWS.values()],
              BLUE, "-", "o", task)
        axis.set(xscale="log", title=f"({letter}) trained with Q = 2K queries", xlabel=K_LABEL,
                 ylabel=score_label(task))
        axis.set_xticks([*WINDOWS], map(str, WINDOWS))
        axis.set_xlim(min(WINDOWS) / 1.2, max(WINDOWS) * 1.2)
        within(axis, task)
    curve(axes[2], FPS,
          [stage.by_seed("complete", "videoqa", f"at {fps:g} Hz") for fps in FPS],
          ORANGE, "--", "s", "videoqa")
    axes[2].set(xscale="log", title="(c) trained at 2 Hz", ylabel=score_label("videoqa"),
                xlabel="frame rate when answering, Hz")
    axes[2].set_xticks(FPS, [f"{fps:g}" for fps in FPS])
    within(axes[2], "videoqa")
    for axis in axes:
        axis.minorticks_off()
    figure.tight_layout()
    return figure


def draw_lambda(stage):
    """Fig. 4: scores and the queries' mean cosine on the same task against lambda.
    stage: tables.Stage -> Figure."""
    figure, axes = pyplot().subplots(1, 3, figsize=(WIDTH, 3.2))
    places, systems = range(len(LAMBDAS)), LAMBDAS.values()
    for axis, task, letter in zip(axes, COSINE_TASKS, "abc", strict=True):
        other = axis.twinx()
        lines = [curve(axis, [x - 0.06 for x in places],
                       [stage.by_seed(s, task) for s in systems], BLUE, "-", "o", "score (left)"),
                 curve(other, [x + 0.06 for x in places],          # error bars beside each other
                       [stage.by_seed(s, task, "query cosine") for s in systems],
                       ORANGE, "--", "s", "mean cosine of the queries (right)")]
        axis.set(title=f"({letter})", ylabel=score_label(task),
                 xlabel="λ, factor of the diversity loss")
        axis.set_xticks(places, [f"{value:g}" for value in LAMBDAS])
        axis.set_xlim(-0.3, len(places) - 0.7)
        within(axis, task)
        other.set(ylim=(-0.2, 1.05),                   # the least mean of Q vectors: -1 / (Q - 1)
                  ylabel="cosine" if axis is axes[-1] else "")
        other.grid(False)
    lines = [line for line in lines if line is not None]
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.legend(handles=lines, loc="lower center", ncols=2, frameon=False)
    return figure


def draw_learning(results):
    """The tasks of Table 5 against the steps of training, with and without each part of the method:
    what is only learnt later, and what is not learnt. results: tables.Results -> Figure."""
    steps, systems = results.scored, [s for s in LEARNING if s in results.systems]
    stages = [results.at(step) for step in steps]
    figure, axes = pyplot().subplots(2, 3, figsize=(WIDTH, 5.2), sharex=True)
    for axis, task in zip(axes.flat, LEARNING_TASKS, strict=True):     # bars beside each other
        lines = [curve(axis, [step * 1.03 ** (k - (len(systems) - 1) / 2) for step in steps],
                       [stage.by_seed(system, task) for stage in stages],
                       *LEARNING[system], SYSTEMS[system][0], dots=False)
                 for k, system in enumerate(systems)]
        axis.set(xscale="log", ylabel=score_label(task))
        axis.set_xticks(steps, map(str, steps))
        axis.minorticks_off()
        within(axis, task)
    for axis in axes[-1]:
        axis.set_xlabel("steps of training")
    lines = [line for line in lines if line is not None]
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.legend(handles=lines, loc="lower center", ncols=3, frameon=False)
    return figure


def draw_cosines(matrices):
    """Fig. 5. matrices {lambda: {task: (Q,Q)}} -> Figure: a row per task, a column per lambda."""
    tasks = [t for t in COSINE_TASKS if any(t in found for found in matrices.values())]
    figure, axes = pyplot().subplots(
        len(tasks), len(matrices), squeeze=False, layout="constrained",
        figsize=(min(WIDTH, 1.2 + 1.8 * len(matrices)), 0.5 + 1.75 * len(tasks)))
    for column, (factor, found) in zip(axes.T, matrices.items(), strict=True):
        for axis, task in zip(column, tasks, strict=True):
            axis.grid(False)
            if task not in found:
                axis.set_axis_off()
                continue
            image = axis.imshow(found[task], cmap="cividis", vmin=-0.5, vmax=1)
            ticks = [0, len(found[task]) - 1]
            axis.set_xticks(ticks, [tick + 1 for tick in ticks])
            axis.set_yticks(ticks, [tick + 1 for tick in ticks])
            axis.set_title(f"λ = {factor:g}, mean {off_diagonal_mean(found[task]):.2f}", fontsize=8)
            axis.set_xlabel("query" if task == tasks[-1] else "")
            axis.set_ylabel(f"{task}\nquery" if axis is axes[tasks.index(task)][0] else "")
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8, aspect=30)
    return figure


def draw_attention(inside):
    """Where each query of a window looks -> Figure. Frames, spectrogram and attention share one
    time axis: vector j of frame t stands at the time of its audio step."""
    weights = inside["attention"].astype(np.float32).mean(2)                # (layers,W,Q,K*N)
    layers, _, queries, length = weights.shape
    n, fps, counts = int(inside["vectors"]), float(inside["fps"]), [*inside["windows"]]
    frames = inside["frames"]
    seconds, window_seconds = len(frames) / fps, length / n / fps
    names = [""] if len(counts) == 1 else ["windows of the picture", "windows of the sound"]
    panels = [(layer, k) for layer in range(layers) for k in range(len(counts))]
    figure, axes = pyplot().subplots(
        2 + len(panels), 2, sharex="col", figsize=(WIDTH, 2.6 + 1.35 * len(panels)),
        layout="constrained", gridspec_kw={
            "height_ratios": [1.0, 0.9, *[1.6] * len(panels)], "width_ratios": [60, 1]})
    for axis in axes[:, 1]:
        axis.set_axis_off()
    axes = axes[:, 0]
    for t, frame in enumerate(frames):
        axes[0].imshow(frame.transpose(1, 2, 0), extent=(t / fps, (t + 1) / fps, 0, 1),
                       aspect="auto", interpolation="nearest")
    axes[0].set(ylim=(0, 1), yticks=[], ylabel="frames")
    if "mel" in inside:
        axes[1].imshow(inside["mel"].astype(np.float32), origin="lower", aspect="auto",
                       cmap="cividis", extent=(0, float(inside["seconds"]), 0, 80))
    axes[1].set(ylabel="sound,\nmel bin")
    top = float(weights.max())
    for axis, (layer, k) in zip(axes[2:], panels, strict=True):
        own = np.split(weights[layer], np.cumsum(counts)[:-1])[k]                 # (W,Q,K*N)
        for w, look in enumerate(own):
            image = axis.imshow(
                look, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest",
                extent=(w * window_seconds, (w + 1) * window_seconds, queries + 0.5, 0.5))
            axis.axvline(w * window_seconds, color="white", linewidth=2)
        axis.set(ylabel=f"query\n(layer {layer + 1})", yticks=[1, queries],
                 ylim=(queries + 0.5, 0.5))
        axis.set_title(names[k], fontsize=8)
        for t in range(1, len(frames)):
            axis.axvline(t / fps, color="white", linewidth=0.4, alpha=0.6)
        figure.colorbar(image, ax=axis, label="attention,\nmean of heads", aspect=10, pad=0.01)
    for axis in axes:
        axis.grid(False)
        axis.set_xlim(0, seconds)
        axis.set_xticks(np.arange(0, seconds + 1e-9, 0.5))
        axis.tick_params(labelbottom=axis is axes[-1])
    axes[-1].set_xlabel(f"time, s; the {n} joint vectors of a frame stand side by side, each where "
                        "its audio step is; white: windows")
    answer = str(inside["answer"])[:40].replace("$", r"\$")          # an answer may hold any text
    axes[0].set_title(f'"{inside["question"]}"  right: {inside["right"]}; answered: {answer}')
    return figure


def draw_all(folder, log=print):
    """Draws all figures that the results in `folder` allow -> their paths."""
    folder, results, drawn = Path(folder), Results.read(folder), []
    plt = pyplot()

    def save(figure, name):
        figure.savefig(folder / name, dpi=DPI)
        plt.close(figure)
        drawn.append(folder / name)

    if results.stages:
        save(draw_scales(results.first), "fig3.png")
        save(draw_lambda(results.first), "fig4.png")
        save(draw_learning(results), "learning.png")
    inside = {path.stem: dict(np.load(path)) for path in sorted(folder.glob("inside/*.npz"))}
    matrices = {factor: {t: inside[s][f"cosine {t}"] for t in COSINE_TASKS
                         if f"cosine {t}" in inside[s]}
                for factor, s in LAMBDAS.items() if s in inside}
    if any(matrices.values()):
        save(draw_cosines(matrices), "fig5.png")
    for system, held in inside.items():
        if system in ("complete", "future", "no-sync") and "attention" in held:
            save(draw_attention(held), f"attention-{system}.png")
    log("figures: " + ", ".join(map(str, drawn)))
    return drawn


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    if lacking := no_figures(sys.argv[1]):
        sys.exit(lacking)
    draw_all(sys.argv[1])
