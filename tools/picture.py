"""Where the queries of the causal Q-Former look when a question is answered, as a picture.

     model, sample, clip --look_inside--> Inside: thumbnails, spectrogram, weights per query
     Inside, a query or all --draw--> a figure: frames, spectrogram, windows, weights --> out.png
The weights are the softmax of the cross-attention, averaged over its heads and layers; those of one
window sum to 1.  A joint vector holds what is seen and what is heard at the same moment, so a
weight belongs to both.  Drawing needs the extra `plot` or `demo`.

Public: cross_attention, Inside, Stream, look_inside, draw, save, missing."""

import importlib.util
import math
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from whisper_enc import SAMPLE_RATE, log_mel_spectrogram

FORMATS = (".png", ".pdf", ".svg", ".jpg")
SHOWN = 30.0                                # seconds of a clip in one picture; more are illegible
THUMBNAIL = 96                              # pixels
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"         # Okabe and Ito's
MOST_LINES = 20                             # of a title or a note, which may hold any text


# ---------------------------------------------------------------- what a model does inside
@contextmanager
def cross_attention(qformer):
    """with cross_attention(model.qformer) as looks: model(...)
    looks has one list per layer, with one tensor (W,heads,Q,K*N) per forward: the softmax that the
    layer used. The last of the W windows is the dummy window.

    PyTorch's fused attention does not return its weights, so a hook computes them again from the
    layer's inputs and projections (test_the_hook_shows_what_the_layer_used)."""
    looks = [[] for _ in qformer.layers]

    def record_weights(layer, inputs, _, into):
        x, context, mask = inputs
        q, k = (rearrange(part, "w n (h d) -> w h n d", h=layer.heads)
                for part in (layer.query(x), layer.key(context)))
        scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5           # (W,h,Q,K*N)
        into.append(scores.masked_fill(~mask, float("-inf")).softmax(-1).detach())

    hooks = [layer.cross_attention.register_forward_hook(partial(record_weights, into=into))
             for layer, into in zip(qformer.layers, looks, strict=True)]
    try:
        yield looks
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Stream:
    """The windows that one row of synchronised frames was cut into: one stream per clip, or with
    sync=False one for the picture and one for the sound."""
    seen: bool                      # its vectors hold visual queries
    heard: bool                     # its vectors hold audio steps
    weights: np.ndarray             # float32 (Q,F,N); of each window of K frames they sum to 1


@dataclass
class Inside:
    """What a model read of one clip and where it looked."""
    streams: list[Stream]
    frames: np.ndarray | None       # uint8 (F,h,w,3), as the model sees them, only smaller
    mel: np.ndarray | None          # (M,T) log-mel, 100 per second
    fps: float
    window: int                     # K, frames per window; 0: one window
    visual: int                     # V, vectors of a frame that hold a visual query
    steps: int                      # A, vectors of a frame that hold an audio step
    heard: int                      # S, audio steps of the clip
    grid: int = 0                   # g: visual query j is cell j of g x g; 0: queries have no place
    still: bool = False
    hidden: str = ""                # "audio", "visual" or "both": replaced by zeros
    notes: list[str] = field(default_factory=list)

    @property
    def queries(self):
        """Q, or 0 for a model without cross-attention."""
        return self.streams[0].weights.shape[0] if self.streams else 0

    @property
    def seconds(self):
        """Length of the synchronised frames."""
        counts = [stream.weights.shape[1] for stream in self.streams]
        return max(counts, default=0) / self.fps


@torch.no_grad()
def look_inside(model, sample, clip, answer=None):
    """Reads an encoded Sample of the Clip as an answer to it does -> Inside.
    answer: tokens that the answer may have, which the LLM keeps positions for (default: those of
    the config); the rest of a long clip is not read, and not shown."""
    config = model.config
    sample, cut = model.fit(sample, config.max_new_tokens if answer is None else answer)
    counts = [n for n in model.stream_frames(sample) if n]
    visual, audio = model.features_of(sample)
    V, A = model.visual.n_queries, model.audio_steps
    N = max(V, A)
    with cross_attention(model.qformer) as looks:
        model.audio_visual_tokens([sample])
    K = config.window_frames or max(counts, default=1)
    windows = [math.ceil(n / K) for n in counts]
    if looks:
        weights = torch.stack([look[0][:-1] for look in looks]).mean((0, 2))      # (W,Q,K*N)
    else:                                            # layers=0: only the direct path reads the clip
        weights = torch.zeros(sum(windows), 0, K * N)
    weights = F.pad(weights, (0, K * N - weights.shape[-1])).cpu()    # of a short clip: less than K
    kinds = [(visual is not None, audio is not None)]
    if not config.sync:
        kinds = [kind for kind, there in (((True, False), visual is not None),
                                          ((False, True), audio is not None)) if there]
    streams = [Stream(*kind, rearrange(own, "w q (k n) -> q (w k) n", n=N)[:, :n].numpy())
               for kind, own, n in zip(kinds, weights.split(windows), counts, strict=True)]
    notes = [f"{cut[0].upper()}{cut[1:]}."] if cut else []
    if config.direct:
        notes.append("This model also has a direct path past the attention, which is not shown.")
    frames = None if visual is None else thumbnails(clip.frames[:len(visual)])
    if clip.is_image and frames is not None:                  # an image lasts as long as its sound
        frames = np.repeat(frames[:1], len(visual), axis=0)
    mel = None
    if audio is not None:
        read = math.ceil(len(audio) / A) * SAMPLE_RATE / config.fps
        wave = clip.audio[:round(read)]
        mel = log_mel_spectrogram(wave, max(len(wave), 480))[0]           # it needs 400 samples
        mel = mel[:, :math.ceil(len(wave) / 160)].half().cpu().numpy()
    return Inside(streams, frames, mel, config.fps, config.window_frames, V, A,
                  0 if audio is None else len(audio), config.visual_grid,
                  clip.is_image and audio is None, sample.mask or "", notes)


def thumbnails(frames):
    """(F,3,H,W) of 0 to 255 -> uint8 (F,h,w,3)."""
    small = F.interpolate(frames.float(), THUMBNAIL, mode="area") if (
        frames.shape[-1] > THUMBNAIL) else frames.float()
    return rearrange(small.clamp(0, 255).byte(), "f c h w -> f h w c").cpu().numpy()


# ---------------------------------------------------------------- what is looked at
def chosen(stream, query):
    """Weights (F,N) of one query (from 0), or their mean over all queries (None)."""
    return stream.weights.mean(0) if query is None else stream.weights[query]


def over_frames(inside, query=None):
    """Share of its window's weight that each frame of the picture has -> (F,); all vectors of the
    frame count that hold a visual query.  None without a picture or without attention."""
    for stream in inside.streams:
        if stream.seen and inside.frames is not None and inside.queries:
            return chosen(stream, query)[:len(inside.frames), :inside.visual].sum(1)
    return None


def over_sound(inside, query=None):
    """Share of its window's weight that each audio step has -> (S,); None without sound or
    without attention."""
    for stream in inside.streams:
        if stream.heard and inside.queries:
            return chosen(stream, query)[:, :inside.steps].reshape(-1)[:inside.heard]
    return None


def meaning(inside, query=None):
    """What the picture shows, in whole sentences -> list of str."""
    if not inside.queries:
        return ["This model has no cross-attention to show."]
    which = (f"query {query + 1}" if query is not None else
             f"the mean of the {inside.queries} queries")
    told = [f"Shown is the cross-attention of {which} of each window, averaged over heads and "
            "layers; the weights of one window sum to 100 %."]
    kinds = {(stream.seen, stream.heard) for stream in inside.streams}
    if kinds == {(True, True)}:
        told.append("A joint vector holds what is seen and what is heard at the same moment "
                    "(visual query j, audio step t·A + j), so attention to it is attention to "
                    "both.")
    elif len(kinds) == 2:
        told.append("This model does not synchronise: picture and sound have windows of their own, "
                    "and each sums to 100 % by itself.")
    else:
        there, gone = (("picture", "sound") if inside.frames is not None else ("sound", "picture"))
        told.append(f"The clip has no {gone}, so all weight lies on the {there}.")
    hidden = {"audio": "The sound is", "visual": "The picture is",
              "both": "Picture and sound are"}.get(inside.hidden)
    if hidden:
        told.append(f"{hidden} hidden: the model reads zeros there, but its vectors stay.")
    return told


# ---------------------------------------------------------------- drawing
def missing():
    """What to install if matplotlib, an extra, is missing; "" if it is there."""
    return "" if importlib.util.find_spec("matplotlib") else (
        'a picture needs matplotlib: pip install -e ".[plot]"')


class Sheet:
    """A matplotlib figure that rows are added to from top to bottom, in inches: so rows keep their
    height, whatever there is to show.  It is no pyplot figure, which would stay in memory."""

    def __init__(self, width, left, right):
        self.width, self.left, self.right = width, left, right
        self.rows, self.texts, self.y = [], [], 0.08

    @property
    def inner(self):
        """Inches between the margins."""
        return self.width - self.left - self.right

    def row(self, height, gap=0.08):
        """Reserves a row -> its place: (distance from the top, height)."""
        place = (self.y, height)
        self.y += height + gap
        return place

    def text(self, words, size, **style):
        """Reserves the lines of a text that is broken to the width of the sheet."""
        if words:
            words = "".join(c if c.isprintable() else " " for c in words)
            room = int((self.width - 0.2) * 72 / size / 0.53)            # mean width of a character
            lines = textwrap.wrap(words, room, break_long_words=True)[:MOST_LINES]
            self.texts.append((self.y, "\n".join(lines).replace("$", r"\$"), size, style))
            self.y += len(lines) * size * 1.35 / 72 + 0.04

    def figure(self):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(self.width, self.y + 0.05), facecolor="white")
        for y, words, size, style in self.texts:
            figure.text(0.1 / self.width, 1 - y / figure.get_figheight(), words, va="top",
                        fontsize=size, linespacing=1.25, **style)
        return figure

    def axes(self, figure, place, limits, label):
        """An empty axis on a reserved row with `limits` in x."""
        y, height = place
        whole = figure.get_figheight()
        axis = figure.add_axes((self.left / self.width, 1 - (y + height) / whole,
                                self.inner / self.width, height / whole))
        axis.set(xlim=limits, yticks=[])
        axis.set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        axis.yaxis.set_label_coords(-0.09 / self.inner, 0.5)
        axis.tick_params(labelsize=7, length=2, labelbottom=False, bottom=False)
        for side in axis.spines.values():
            side.set_visible(False)
        return axis


def draw(inside, query=None, start=0.0, width=10.0, title=""):
    """-> a matplotlib Figure.  query: from 0, or None for the mean of all; start: second from which
    at most SHOWN are shown; width: inches, below 6 with fewer frames and shorter labels; title:
    a sentence above.  figure.query_fields lists (left, top, width, height) of each field of
    queries, as shares of the figure from its top left corner."""
    narrow = width < 6
    sheet = Sheet(width, 0.62 if narrow else 0.95, 0.1 if narrow else 0.15)
    first, end = part_shown(inside, start)
    limits = (first, end)
    sheet.text(title, 10 if not narrow else 9, weight="bold")
    per_second = sheet.inner / (end - first)
    frame = per_second / inside.fps                                         # inches per frame
    step = math.ceil((0.45 if narrow else 0.55) / frame)              # every step-th frame is drawn
    side = min(step * frame, 1.6 if inside.still else 0.95)
    rows = {}
    if inside.frames is not None:
        rows["frames"] = sheet.row(side, 0.04)
        rows["over frames"] = sheet.row(0.36 if inside.queries and not inside.still else 0)
    if inside.mel is not None:
        rows["mel"] = sheet.row(0.6, 0.04)
        rows["over sound"] = sheet.row(0.36 if inside.queries else 0)
    rows["windows"] = sheet.row(0.26, 0.02)
    tall = min(max(0.085 * inside.queries, 0.9), 2.4)
    fields = [sheet.row(tall, 0.1) for _ in inside.streams] if inside.queries else []
    sheet.row(0.15, 0.05)                                                      # for the seconds
    for words in [*meaning(inside, query), *part_words(inside, first, end), *inside.notes]:
        sheet.text(words, 7.5 if narrow else 8, color="#444444")
    figure = sheet.figure()
    last, figure.query_fields, bars = None, [], "looked at" * bool(inside.queries and not narrow)
    if inside.frames is not None:
        label = "still" if inside.still else (
            "frames" if step == 1 else f"every\n{ordinal(step)}\nframe")
        last = draw_frames(inside, query, sheet.axes(figure, rows["frames"], limits, label), step,
                           side / per_second)
        if not inside.still:                             # whose one frame has all the weight
            draw_weights(inside, over_frames(inside, query), inside.fps, "visual",
                         sheet.axes(figure, rows["over frames"], limits, bars))
    if inside.mel is not None:
        last = draw_sound(inside, sheet.axes(figure, rows["mel"], limits, "sound"))
        draw_weights(inside, over_sound(inside, query), inside.fps * inside.steps, "audio",
                     sheet.axes(figure, rows["over sound"], limits, bars))
    draw_windows(inside, sheet.axes(figure, rows["windows"], limits, "windows"))
    for place, stream in zip(fields, inside.streams if fields else (), strict=True):
        last = sheet.axes(figure, place, limits, field_label(inside, stream))
        draw_queries(inside, stream, query, last)
        tall, top = figure.get_figheight(), place[0]
        figure.query_fields.append((sheet.left / width, top / tall, sheet.inner / width,
                                    place[1] / tall))
    if last is not None:
        seconds_below(inside, last, narrow)
    return figure


def part_shown(inside, start):
    """Which seconds of a clip are shown, whole windows where possible -> (first, end)."""
    total = max(inside.seconds, 1 / inside.fps)
    if total <= SHOWN * 1.1:
        return 0.0, total
    step = inside.window / inside.fps if 0 < inside.window / inside.fps <= SHOWN else SHOWN
    first = min(max(start, 0.0), total - 1 / inside.fps) // step * step
    return first, min(first + max(SHOWN // step, 1) * step, total)


def part_words(inside, first, end):
    total = inside.seconds
    return [f"This is the part from second {first:g} to {end:g} of {total:g}."] if (
        first > 0 or end < total - 1e-6) else []


def visible(limits, start, end):
    return end > limits[0] + 1e-9 and start < limits[1] - 1e-9


def draw_frames(inside, query, axis, step, slot):
    """Every step-th frame, `slot` seconds wide.  Where visual queries are cells of a grid, the
    cells that are looked at are orange."""
    limits = axis.get_xlim()
    axis.set_ylim(0, 1)
    hidden = inside.hidden in ("visual", "both")
    cells = None
    if inside.grid:
        stream = next(stream for stream in inside.streams if stream.seen)
        cells = chosen(stream, query)[:len(inside.frames), :inside.visual] if (
            stream.weights.size) else None
    at = round(limits[0] * inside.fps)
    top = 0.0 if cells is None else float(
        cells[at:round(limits[1] * inside.fps)].max(initial=0)) or 1.0
    for t in range(at, len(inside.frames), step):
        left = t / inside.fps
        if left + 0.5 * slot > limits[1] and t > at:                     # it would be cut in half
            break
        box = (left, left + slot * 0.97, 0, 1)
        axis.imshow(inside.frames[t], extent=box, aspect="auto", interpolation="bilinear",
                    alpha=0.25 if hidden else 1.0)
        if cells is not None:
            heat = np.zeros((inside.grid, inside.grid, 4))
            heat[..., :3] = (0.835, 0.369, 0.0)                                    # ORANGE
            heat[..., 3] = 0.6 * cells[t].reshape(inside.grid, inside.grid) / top
            axis.imshow(heat, extent=box, aspect="auto", interpolation="nearest")
    axis.set_xlim(limits)
    axis.set_ylim(0, 1)
    if hidden:
        hidden_label(axis)
    return axis


def draw_sound(inside, axis):
    limits = axis.get_xlim()
    low, high = (round(s * 100) for s in limits)
    part = inside.mel[:, low:high].astype(np.float32)
    hidden = inside.hidden in ("audio", "both")
    if part.size:
        axis.imshow(part, origin="lower", aspect="auto", cmap="cividis",
                    extent=(low / 100, low / 100 + part.shape[1] / 100, 0, len(part)),
                    alpha=0.25 if hidden else 1.0)
    axis.set(xlim=limits, ylim=(0, len(inside.mel)))
    if hidden:
        hidden_label(axis)
    return axis


def ordinal(n):
    """2 -> '2nd'"""
    ending = {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{'th' if n % 100 in (11, 12, 13) else ending}"


def hidden_label(axis):
    axis.text(0.5, 0.5, "hidden: the model reads zeros", transform=axis.transAxes, ha="center",
              va="center", fontsize=9, color="#222222",
              bbox={"facecolor": "white", "edgecolor": GREY, "boxstyle": "round", "alpha": 0.9})


def draw_weights(inside, weights, per_second, modality, axis):
    """Bars below the frames or the spectrogram: where the chosen queries look."""
    if weights is None:
        return
    limits = axis.get_xlim()
    low, high = (round(second * per_second) for second in limits)
    values = 100 * weights[low:high]
    if len(values):
        axis.stairs(values, low / per_second + np.arange(len(values) + 1) / per_second, fill=True,
                    color=GREY if inside.hidden in (modality, "both") else BLUE)
    top = float(values.max(initial=0)) or 1.0
    axis.set(xlim=limits, ylim=(0, top * 1.05), yticks=[top])
    axis.set_yticklabels([f"{top:.0f} %" if top >= 10 else f"{top:.2g} %"])
    axis.yaxis.set_label_coords(-0.012, 0.35)
    axis.axhline(0, color=GREY, linewidth=0.8)
    window_lines(inside, axis)


def draw_windows(inside, axis):
    """A bracket for each window, with its number."""
    limits = axis.get_xlim()
    total = max(inside.seconds, 1 / inside.fps)
    length = inside.window / inside.fps or total
    axis.set_ylim(0, 1)
    if inside.still:
        length = total
    gap = 0.004 * (limits[1] - limits[0])
    wide = length / (limits[1] - limits[0])
    for w in range(math.ceil(total / length - 1e-9)):
        left, right = w * length, min((w + 1) * length, total)
        if visible(limits, left, right):
            left, right = left + gap, right - gap
            axis.plot([left, left, right, right], [1, 0.72, 0.72, 1], color="#333333",
                      linewidth=1.1, clip_on=False, solid_joinstyle="miter")
            axis.text((max(left, limits[0]) + min(right, limits[1])) / 2, 0.58,
                      f"window {w + 1}" if wide > 0.13 else f"{w + 1}", ha="center", va="top",
                      fontsize=7.5)
    axis.set(xlim=limits, ylim=(0, 1))


def window_lines(inside, axis):
    """Where one window ends and the next one begins."""
    limits, length = axis.get_xlim(), inside.window / inside.fps
    for w in range(1, math.ceil(inside.seconds / length - 1e-9) if length else 1):
        if limits[0] < w * length < limits[1]:
            axis.axvline(w * length, color="#333333", linewidth=0.8, linestyle=(0, (3, 2)))


def field_label(inside, stream):
    if len(inside.streams) == 1:
        return "queries"
    return "queries\nof the\npicture" if stream.seen else "queries\nof the\nsound"


def draw_queries(inside, stream, query, axis):
    """A row for each query, a column for each frame: its share of the window's weight.  Of a single
    frame each vector has a column."""
    limits = axis.get_xlim()
    queries, n, _ = stream.weights.shape
    low, high = (round(second * inside.fps) for second in limits)
    part = stream.weights[:, low:high]
    part = part.sum(2) if n > 1 else part[:, 0]                                   # (Q,columns)
    if part.size:
        end = min(high, n) / inside.fps
        axis.imshow(part, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0,
                    vmax=float(part.max()) or 1.0, extent=(low / inside.fps, end, queries, 0))
    window_lines(inside, axis)
    if query is not None:
        axis.plot([*limits, *limits[::-1], limits[0]],
                  [query, query, query + 1, query + 1, query], color=ORANGE, linewidth=1.8,
                  clip_on=False)
    ticks = sorted({0, queries - 1} | ({query} if query is not None else set()))
    axis.set(xlim=limits, ylim=(queries, 0))
    axis.set_yticks([tick + 0.5 for tick in ticks], [str(tick + 1) for tick in ticks])
    for label, tick in zip(axis.get_yticklabels(), ticks, strict=True):
        if tick == query:
            label.set(color=ORANGE, weight="bold")


def seconds_below(inside, axis, narrow):
    """Ticks of seconds below the last row; a still has none."""
    if inside.still:
        axis.set_xlabel("the vectors of the still, side by side", fontsize=8)
        return
    first, end = axis.get_xlim()
    wanted = (end - first) / (5 if narrow else 10)
    step = next((s for s in (0.5, 1, 2, 5, 10, 30, 60) if s >= wanted), 300)
    ticks = np.arange(math.ceil(first / step - 1e-9) * step, end + 1e-9, step)
    axis.tick_params(labelbottom=True, bottom=True)
    axis.set_xticks(ticks, [f"{tick:g}" + " s" * (k == len(ticks) - 1)
                            for k, tick in enumerate(ticks)])


def save(figure, path, dpi=150):
    """Writes a figure in the format of the file's ending."""
    figure.savefig(path, dpi=dpi)
