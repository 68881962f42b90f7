"""tools/picture.py: the weights that it shows are those of the model, at the right place in time,
for every kind of model and clip; the files are drawn."""

import io
import struct
import sys

import numpy as np
import pytest
import torch

import demo
from data import Clip, Sample
from favor import Favor, preset
from tools import picture


@pytest.fixture(scope="module")
def make(small_parts):
    """make(**settings) -> a Favor of random weights with windows of 3 frames."""
    def make(**settings):
        torch.manual_seed(1)
        return Favor.from_config(preset(
            "tiny", whisper=str(small_parts / "whisper"), llm=str(small_parts / "llama"),
            visual=str(small_parts / "instructblip"),
            **{"window_frames": 3, "queries": 4, **settings})).eval()
    return make


def clip_of(frames=7, seconds=3.5, image=False, size=64):
    torch.manual_seed(2)
    pixels = torch.randint(256, (frames, 3, size, size), dtype=torch.uint8) if frames else None
    return Clip(pixels, torch.randn(round(16000 * seconds)) * 0.1 if seconds else None, image)


def inside_of(model, clip, mask=None):
    return picture.look_inside(model, model.encode_sample(Sample("What?", clip=clip, mask=mask)),
                               clip)


CASES = {"both": ({}, {}), "sound only": ({}, {"frames": 0}), "picture only": ({}, {"seconds": 0}),
         "a still": ({}, {"frames": 1, "seconds": 0, "image": True}),
         "a still with sound": ({}, {"frames": 1, "image": True}),
         "longer sound": ({}, {"seconds": 4.7}), "longer picture": ({}, {"seconds": 1.2}),
         "not synchronised": ({"sync": False}, {}), "one window": ({"window_frames": 0}, {}),
         "not synchronised, sound only": ({"sync": False}, {"frames": 0}),
         "no attention": ({"layers": 0, "direct": 8}, {}), "shorter than a window": (
             {"window_frames": 10}, {}), "official": ({"variant": "official"}, {})}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model_and_clip_can_be_drawn(make, case):
    settings, kind = CASES[case]
    clip = clip_of(**kind)
    inside = inside_of(make(**settings), clip)
    assert (inside.frames is not None, inside.mel is not None) == (
        clip.frames is not None, clip.audio is not None)
    K = inside.window
    for stream in inside.streams:
        n = stream.weights.shape[1]
        for start in range(0, n, K or n) if inside.queries else ():
            window = stream.weights[:, start:start + (K or n)]
            np.testing.assert_allclose(window.sum((1, 2)), 1, atol=1e-5)
    figure = picture.draw(inside, inside.queries - 1 if inside.queries else None, width=4,
                          title="What? $5")
    assert len(figure.query_fields) == (len(inside.streams) if inside.queries else 0)
    picture.save(figure, io.BytesIO(), 40)
    words = " ".join(picture.meaning(inside))
    assert ("attention to both" in words) == (case in (
        "both", "a still with sound", "longer sound", "longer picture", "one window",
        "shorter than a window", "official"))


def test_the_weights_are_the_models(make):
    """The mean over layers and heads of the attention that is computed from the layers' own query
    and key projections, window by window."""
    model, clip = make(), clip_of()
    sample = model.encode_sample(Sample("What?", clip=clip))
    seen = []
    hooks = [layer.cross_attention.register_forward_hook(lambda layer, inputs, _: seen.append(
        (layer, *inputs))) for layer in model.qformer.layers]
    model.audio_visual_tokens([sample])
    for hook in hooks:
        hook.remove()
    N, wanted = max(model.visual.n_queries, model.audio_steps), 0
    for layer, x, context, mask in seen:
        d = x.shape[-1] // layer.heads
        for h in range(layer.heads):
            part = slice(h * d, (h + 1) * d)
            scores = layer.query(x)[..., part] @ layer.key(context)[..., part].mT / d ** 0.5
            weights = scores.masked_fill(~mask[:, 0], -1e9).exp()
            wanted = wanted + weights / weights.sum(-1, keepdim=True) / layer.heads / len(seen)
    stream, = inside_of(model, clip).streams
    for t in range(7):                                    # frame t is frame t % 3 of window t // 3
        found = torch.from_numpy(stream.weights[:, t])
        torch.testing.assert_close(found, wanted[t // 3, :, t % 3 * N:(t % 3 + 1) * N].detach(),
                                   atol=1e-5, rtol=1e-4)


def made_up(look, hidden="", grid=0, seconds=6.0):
    """An Inside of two windows of 6 frames; look(weights (Q,F,N)) sets what is looked at."""
    frames = round(seconds * 2)
    weights = np.zeros((4, frames, 5), np.float32)
    look(weights)
    return picture.Inside([picture.Stream(True, True, weights)],
                          np.zeros((frames, 8, 8, 3), np.uint8),
                          np.zeros((80, round(seconds * 100)), np.float16), 2.0, 6, 4, 5,
                          frames * 5, grid, False, hidden)


def pixels_of(figure):
    """(H,W,3) of 0 to 255, 100 per inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_what_is_looked_at_lights_up_at_its_time():
    """Query 3 looks at vector 2 of frame 8, in the second window: at 4 s, and at audio step 42 of
    10 per second, 4.2 s; the mean over the 4 queries is a quarter of it."""
    def look(weights):
        weights[2, 8, 2] = 1.0
        weights[2, 1, 4] = 1.0             # the first window: vector 4 holds an audio step only

    inside = made_up(look)
    assert np.flatnonzero(picture.over_frames(inside, 2)).tolist() == [8]
    assert np.flatnonzero(picture.over_sound(inside, 2)).tolist() == [9, 42]
    assert picture.over_sound(inside)[42] == pytest.approx(0.25)
    assert not picture.over_frames(inside, 0).any() and not picture.over_sound(inside, 0).any()
    figure = picture.draw(inside, 2)
    left, right = 0.95 / 10, 1 - 0.15 / 10                              # the margins of the rows
    blue = (np.abs(pixels_of(figure) - [0, 0x72, 0xB2]).max(2) < 12).any(0)          # columns
    seconds = (np.flatnonzero(blue) / len(blue) - left) / (right - left) * 6
    inner = seconds[(seconds > 0) & (seconds < 6)]
    bars = [(round(float(part[0]), 1), round(float(part[-1]), 1)) for part in np.split(
        inner, np.flatnonzero(np.diff(inner) > 0.06) + 1)]
    assert bars == [(0.9, 1.0), (4.0, 4.5)]


def test_the_cells_of_a_grid_light_up_on_their_frame():
    """With visual_grid=2, vector 1 of a frame is its upper right cell."""
    inside = made_up(lambda weights: weights.__setitem__((0, 0, 1), 1.0), grid=2)
    figure = picture.draw(inside, 0)
    pixels = pixels_of(figure)
    orange = np.argwhere((pixels[..., 0] > 120) & (pixels[..., 2] < 30)
                         & (pixels[..., 1] < 100))                     # on a black frame
    rows = figure.axes[0].get_window_extent()
    top = pixels.shape[0] - rows.y1
    y, x = orange[orange[:, 0] < top + rows.height].mean(0)
    wide = rows.width * 0.5 / 6                                        # a frame takes half a second
    assert top < y < top + rows.height / 2 and rows.x0 + wide * 0.4 < x < rows.x0 + wide


def test_of_a_long_clip_a_part_is_shown():
    """Whole windows, at most about 30 s of them, and a sentence says which."""
    inside = made_up(lambda weights: weights.fill(1 / 30), seconds=300.0)
    assert picture.part_shown(inside, 0.0) == (0.0, 30.0)
    assert picture.part_shown(inside, 31.0) == (30.0, 60.0)
    assert picture.part_shown(inside, 1e9) == (297.0, 300.0)
    figure = picture.draw(inside, None, 31.0)
    assert figure.axes[0].get_xlim() == (30.0, 60.0)
    assert any("from second 30 to 60 of 300" in text.get_text() for text in figure.texts)
    assert picture.part_shown(made_up(lambda weights: None), 2.0) == (0.0, 6.0)


def test_hidden_modalities_are_said(make):
    inside = inside_of(make(), clip_of(), mask="audio")
    assert "sound is hidden: the model reads zeros" in " ".join(picture.meaning(inside))
    figure = picture.draw(inside)
    shown = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert shown.count("hidden: the model reads zeros") == 1


def test_a_clip_that_does_not_fit_is_shown_as_far_as_it_is_read(make):
    model = make(window_frames=1)
    clip = clip_of(frames=90, seconds=45.0)
    model.llm.config = type(model.llm.config)(**{**vars(model.llm.config), "max_positions": 128})
    with pytest.warns(UserWarning, match="frames"):
        inside = inside_of(model, clip)
    n = inside.streams[0].weights.shape[1]
    assert 1 < n < 90 and len(inside.frames) == n and inside.mel.shape[1] == n * 50
    assert "frames" in inside.notes[0]


def size_of(png):
    """Width and height that the header of a PNG tells."""
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">2I", content[16:24])


def test_the_command_draws_files_that_differ_by_query(checkpoint, small_miniature, tmp_path,
                                                      capsys, monkeypatch):
    """demo.py --picture, and the same picture for one query."""
    clip = str(next(small_miniature.rglob("*.mp4")))
    words = [clip, "What?", "--checkpoint", str(checkpoint)]
    demo.main([*words, "--picture", str(tmp_path / "all.png")])
    assert "where the queries look" in capsys.readouterr().err
    width, height = size_of(tmp_path / "all.png")
    assert width == 1500 and 500 < height < 1200
    inside = made_up(lambda weights: weights[2].fill(1 / 30))
    for query in range(3):
        picture.save(picture.draw(inside, query), tmp_path / f"{query}.png", 50)
    contents = {path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(contents) == 4
    for wrong, said in (("out.gif", "wanted a name that ends in .png"),
                        ("no/such/out.png", "there is no such folder")):
        with pytest.raises(SystemExit, match=said):
            demo.main([*words, "--picture", str(tmp_path / wrong)])
    with pytest.raises(SystemExit):
        demo.main(["--picture", "out.png"])                               # of what?
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'needs matplotlib: pip install -e "\.\[plot\]"'):
        demo.main([*words, "--picture", "out.png"])


def test_drawing_keeps_nothing():
    """Figures are not pyplot's, which would hold each one until it is closed."""
    def held():                                          # by other tests, too
        pyplot = sys.modules.get("matplotlib.pyplot")
        return pyplot.get_fignums() if pyplot else []
    before = held()
    picture.draw(made_up(lambda weights: None))
    assert held() == before
