"""The adapter to lmms-eval: what its tasks hand over becomes the clip that we would read ourselves,
and the answers are those of model.answer.  lmms-eval is no dependency: a stand-in has the names and
signatures of its version 0.7.3, with which docs/benchmark.md's run was made."""

import abc
import dataclasses
import importlib
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import clip_from_path
from runtime.checkpoint import COMMITTED
from runtime.media import read_audio, write_png, write_wav

ROOT = Path(__file__).parent.parent.parent
CLIP, QUESTION = ROOT / "miniature" / "demo.mp4", "What colour is the object at the beep?"
GREEDY = {"max_new_tokens": 1024, "temperature": 0, "do_sample": False, "num_beams": 1}


class Lmms(abc.ABC):                                       # lmms_eval/api/model.py: class lmms
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclasses.dataclass(frozen=True)
class ModelManifest:                                       # lmms_eval/models/registry_v2.py
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def adapter():
    """tools.lmms_eval, imported beside the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("", ".api", ".api.model", ".models", ".models.registry_v2"):
            patch.setitem(sys.modules, f"lmms_eval{name}", types.ModuleType(f"lmms_eval{name}"))
        sys.modules["lmms_eval.api.model"].lmms = Lmms
        sys.modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
        patch.delitem(sys.modules, "tools.lmms_eval", raising=False)
        yield importlib.import_module("tools.lmms_eval")
        sys.modules.pop("tools.lmms_eval")


@pytest.fixture(scope="module")
def lm(adapter):
    """As lmms-eval makes it: --model_args and --batch_size as keywords."""
    return adapter.FavorLmms(checkpoint=str(COMMITTED), batch_size="2")


@pytest.fixture(scope="module")
def model(lm):
    return lm.model


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
    """A still and a sound at 44.1 kHz, made of the committed clip."""
    folder = tmp_path_factory.mktemp("media")
    clip = clip_from_path(CLIP, **model.clip_options())
    write_png(folder / "still.png", clip.frames[4].permute(1, 2, 0).repeat(2, 3, 1).numpy())
    write_wav(folder / "sound.wav", clip.audio, 44_100)
    (folder / "broken.mp4").write_bytes(CLIP.read_bytes()[:500])
    return folder


def answers(lm, *documents):
    """generate_until for (context, gen_kwargs, what doc_to_visual returns), as lmms-eval calls it:
    the request knows the number of its document and looks the document up."""
    lm.task_dict = {"ours": {"test": [{"media": media} for _, _, media in documents]}}
    return lm.generate_until([types.SimpleNamespace(args=(
        context, gen_kwargs, lambda doc: doc["media"], i, "ours", "test"))
        for i, (context, gen_kwargs, _) in enumerate(documents)])


def sound_of(path):
    """As datasets decodes a 16-bit WAV file."""
    import wave
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        return {"array": samples.astype(np.float32) / 32768, "sampling_rate": file.getframerate()}


def test_answers_are_those_of_the_model(lm, model, files, capsys):
    """Video, image and sound, as paths and as objects, alone and together, and text alone; batches
    of two, and two sorts of gen_kwargs in turns."""
    still, wav = files / "still.png", files / "sound.wav"
    options = model.clip_options()
    spoken = "Transcribe the speech into text."
    expected = [
        (QUESTION, [str(CLIP)], clip_from_path(CLIP, **options)),
        (QUESTION, [str(CLIP), str(wav)], clip_from_path(CLIP, audio=wav, **options)),
        (QUESTION, [Image.open(still)], clip_from_path(still, **options)),
        (QUESTION, [sound_of(wav), Image.open(still)], clip_from_path(still, audio=wav, **options)),
        (spoken, [sound_of(wav)], clip_from_path(wav, **options)),
        (spoken, [wav], clip_from_path(wav, **options)),
        (QUESTION, None, None), (QUESTION, [], None)]
    kwargs = [GREEDY, GREEDY | {"until": ["\n\n"], "top_k": 5}]
    given = answers(lm, *((question, kwargs[i % 2], media)
                          for i, (question, media, _) in enumerate(expected)))
    assert given == [model.answer(clip, question) for question, _, clip in expected]
    assert given[0] == "pink" and len(set(given)) >= 4                # they depend on the clip
    shown = capsys.readouterr().out
    assert "top_k in gen_kwargs: without effect" in shown and "skipped" not in shown


class AudioDecoder:                                        # of datasets 4 and later
    def __init__(self, sound):
        self.sound = sound

    def __getitem__(self, key):
        return self.sound[key]

    def get_all_samples(self): ...


def test_clips_are_those_of_files(adapter, model, files):
    options = model.clip_options()
    still, wav = files / "still.png", files / "sound.wav"
    picture = adapter.read_media([Image.open(still).convert("RGBA")], options)
    assert picture.is_image and picture.audio is None
    assert torch.equal(picture.frames, clip_from_path(still, **options).frames)
    mono = sound_of(wav)
    left, right = mono["array"] * 0.5, mono["array"] * 1.5
    for array in (mono["array"], np.stack([left, right]), np.stack([left, right], axis=1)):
        sound = adapter.read_media([mono | {"array": array}], options)
        assert sound.frames is None and (sound.audio - read_audio(wav)).abs().max() < 1e-4
    both = adapter.read_media([Image.open(still), str(still), None, AudioDecoder(mono)], options)
    assert both.frames.shape[0] == 2 and not both.is_image and both.fps == model.config.fps
    assert torch.equal(both.audio, read_audio(wav))


def test_gen_kwargs(adapter, lm, model):
    """Beams, temperature, lengths and ends of an answer come from the task."""
    prompt = "Transcribe the speech into text."
    whole = model.answer(CLIP, prompt)
    assert len(whole.split()) > 1
    given = answers(lm, *((prompt, GREEDY | more, [str(CLIP)]) for more in (
        {"until": whole[1]}, {"until": ["", "@", whole.split()[1]]}, {"max_new_tokens": 1},
        {"num_beams": 3}, {"until": None})))
    assert given == [whole[0], whole.split()[0], model.answer(CLIP, prompt, max_new_tokens=1),
                     model.answer(CLIP, prompt, num_beams=3), whole]
    torch.manual_seed(3)
    sampled = answers(lm, (prompt, {"temperature": 5.0, "top_p": 0.9}, [str(CLIP)]))
    torch.manual_seed(3)
    assert sampled == [model.answer(CLIP, prompt, temperature=5.0, top_p=0.9)] != [whole]
    for gen_kwargs, settings in (
            (GREEDY, {"max_new_tokens": 24, "num_beams": 1}),
            ({"until": ["\n\n"], "do_sample": False}, {"max_new_tokens": 24}),      # the default
            ({"temperature": 0.2, "do_sample": False, "top_p": 0}, {"max_new_tokens": 24}),
            ({"do_sample": True, "max_new_tokens": 8}, {
                "max_new_tokens": 8, "num_beams": 1, "temperature": 1.0, "top_p": 1.0})):
        assert adapter.settings_of(gen_kwargs, 24) == settings


def test_what_cannot_be_read_is_skipped_and_counted(lm, files, capsys):
    long = "colour " * 3000
    given = answers(lm, *((question, GREEDY, media) for question, media in (
        (QUESTION, [str(files / "broken.mp4")]), (QUESTION, [str(CLIP)]),
        (QUESTION, [str(files / "absent.mp4")]), (QUESTION, [str(CLIP), str(CLIP)]),
        (QUESTION, [{"bytes": b""}]), (long, [str(CLIP)]))))
    assert given == ["", "pink", "", "", "", ""]
    shown = capsys.readouterr().out
    assert "skipped 5 of 6: ours 0: " in shown and "no such file" in shown
    assert "2 pictures or videos and 0 sounds in one document" in shown
    with pytest.raises(NotImplementedError, match="of the type generate_until alone"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="rounds are not supported"):
        lm.generate_until_multi_round([])


def test_arguments(adapter):
    with pytest.raises(ValueError, match=r"unknown arguments \['pretrained'\]; there are check"):
        adapter.FavorLmms(pretrained="x")
    with pytest.raises(ValueError, match="batch_size 'auto'; wanted a number"):
        adapter.FavorLmms(checkpoint=str(COMMITTED), batch_size="auto")
    with pytest.raises(SystemExit, match="no checkpoint in nowhere"):
        adapter.FavorLmms(checkpoint="nowhere")


def test_lmms_eval_finds_it(adapter):
    """By the entry point, as its registry resolves one: a manifest, or what returns it."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points["lmms_eval.models"]["favor"].partition(":")
    manifest = getattr(importlib.import_module(module), name)()
    assert manifest.model_id == "favor" and manifest.chat_class_path is None
    module, _, name = manifest.simple_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Lmms) and found.is_simple


@pytest.mark.parametrize("missing, told", [
    ("lmms_eval", "lmms-eval, which is to be installed beside FAVOR"),
    ("loguru", "^No module named 'loguru'; tools.lmms_eval is run by")])
def test_without_lmms_eval(missing, told, monkeypatch):
    class Finder:
        def find_spec(name, *_):
            if name.startswith("lmms_eval"):
                raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    for name in [name for name in sys.modules if name.startswith("lmms_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "tools.lmms_eval", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ImportError, match=told):
        importlib.import_module("tools.lmms_eval")
