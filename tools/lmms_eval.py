"""Runs a checkpoint on the tasks of lmms-eval, the harness by which others compare their models:

     lmms-eval --model favor --model_args checkpoint=runs/7b/best --tasks worldsense --batch_size 8

     doc_to_visual(document): PIL images, paths, {"array", "sampling_rate"} --read_media--> Clip
     Clip + context --Favor.generate, with the task's gen_kwargs--> answer

--model_args: checkpoint=FOLDER (default: runs/tiny/best, or the committed one), dtype=float32 or
bfloat16, max_new_tokens=N (tasks get no more; default: what the checkpoint says), and whisper=,
visual= or llm=SOURCE for a part that has moved.

Public: FavorLmms, manifest, settings_of, read_media."""

import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from baselines.systems import load_system
from data import Clip, Sample, clip_from_path, report_skipped
from favor import SOURCES, habits, preset
from runtime import distributed
from runtime.checkpoint import trained_preset
from runtime.cli import Progress
from runtime.media import MediaError, write_wav

try:
    from lmms_eval.api.model import lmms
except ModuleNotFoundError as error:
    raise ImportError(f"{error}; tools.lmms_eval is run by lmms-eval, which is to be installed "
                      "beside FAVOR (docs/benchmark.md): lmms-eval --model favor") from error

KNOWN = {"max_new_tokens", "until", "num_beams", "do_sample", "temperature", "top_p",
         "repetition_penalty"}                             # of a task's gen_kwargs


def manifest():
    """What our entry point "lmms_eval.models" gives to lmms-eval's registry, which is itself half
    imported then."""
    from lmms_eval.models.registry_v2 import ModelManifest
    return ModelManifest("favor", simple_class_path="tools.lmms_eval.FavorLmms")


def settings_of(gen_kwargs, most):
    """A task's gen_kwargs -> settings of Favor.generate.  Tasks ask for up to 49152 new tokens; as
    the clip cannot have the LLM's positions that are kept for them, these are `most` at most."""
    settings = {name: gen_kwargs[name] for name in ("num_beams", "repetition_penalty")
                if gen_kwargs.get(name)}
    settings["max_new_tokens"] = min(gen_kwargs.get("max_new_tokens") or most, most)
    sample = gen_kwargs.get("do_sample")                   # False: temperature has no effect
    temperature = gen_kwargs.get("temperature", 1.0 if sample else 0.0)
    if temperature and sample is not False:
        settings = {"num_beams": 1} | settings | {
            "temperature": temperature, "top_p": gen_kwargs.get("top_p") or 1.0}
    return settings


def read_one(medium, options):
    """One PIL image, path, or sound as datasets has it -> Clip."""
    with tempfile.TemporaryDirectory() as folder:          # resized and resampled as files are
        file = medium if isinstance(medium, (str, os.PathLike)) else Path(folder) / "file"
        if hasattr(medium, "convert"):                     # a PIL image
            medium.convert("RGB").save(file, "PNG", compress_level=0)
        elif isinstance(medium, dict) and "array" in medium or hasattr(medium, "get_all_samples"):
            wave = np.asarray(medium["array"])             # (S,), (channels,S) or (S,channels)
            wave = wave if wave.ndim == 1 else wave.mean(axis=int(np.argmin(wave.shape)))
            write_wav(file, wave, int(medium["sampling_rate"]))
        elif file is not medium:
            raise MediaError(f"a {type(medium).__name__} from doc_to_visual; wanted PIL images, "
                             'paths, or sounds as {"array", "sampling_rate"}')
        return clip_from_path(file, **options)


def read_media(media, options):
    """What a doc_to_visual returned -> one Clip, or None when there is nothing.  Several images
    become the frames of a silent video; a sound replaces that of a video.  options: those of
    data.load_clip.  Raises MediaError for what cannot be read, or is more than one clip."""
    media = media if isinstance(media, (list, tuple)) else [media]
    clips = [read_one(medium, options) for medium in media if medium is not None]
    shown = [clip for clip in clips if clip.frames is not None]
    heard = [clip for clip in clips if clip.frames is None]
    if len(heard) > 1 or len(shown) > 1 and not all(clip.is_image for clip in shown):
        raise MediaError(f"{len(shown)} pictures or videos and {len(heard)} sounds in one document;"
                         " FAVOR reads one video or some images, and one sound")
    return Clip(torch.cat([clip.frames for clip in shown]) if shown else None,
                (heard or shown)[0].audio, len(shown) == 1 and shown[0].is_image,
                options["fps"]) if clips else None


class FavorLmms(lmms):
    """A checkpoint as lmms-eval wants a model.  Raises ValueError for arguments that are wrong."""

    def __init__(self, checkpoint="", batch_size=1, device=None, dtype="", max_new_tokens=0,
                 **sources):
        super().__init__()
        if unknown := set(sources) - set(SOURCES):
            raise ValueError(f"unknown arguments {sorted(unknown)}; there are checkpoint, "
                             f"batch_size, device, dtype, max_new_tokens, {', '.join(SOURCES)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size {batch_size!r}; wanted a number of questions, at least 1")
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.device, self.batch_size = torch.device(device or own), int(batch_size)
        name = trained_preset(checkpoint, "tiny")
        dtype = distributed.precision(dtype, name, self.device, habits(name).dtype_on_cpu)[0]
        self.model, folder = load_system("favor", preset(name), name, checkpoint, sources, dtype,
                                         self.device)
        self.most = max_new_tokens or self.model.config.max_new_tokens
        distributed.log(f"favor: {folder} on {self.device}, answers of {self.most} tokens at most")

    def generate_until(self, requests):
        """-> the answers, in the order of the requests.  A document that cannot be read gets the
        answer "", which the task counts as wrong; the log says how many there were, and why."""
        answers, skipped, groups = [""] * len(requests), [], {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        if ignored := {name for request in requests for name in request.args[1]} - KNOWN:
            distributed.log(f"favor: {', '.join(sorted(ignored))} in gen_kwargs: without effect")
        with Progress("answering", len(requests), "question") as progress:
            for part in (group[k:k + self.batch_size] for group in groups.values()
                         for k in range(0, len(group), self.batch_size)):
                gen_kwargs = requests[part[0]].args[1]
                settings = settings_of(gen_kwargs, self.most)
                samples = {i: sample for i in part
                           if (sample := self.sample(requests[i], settings, skipped))}
                until = gen_kwargs.get("until") or []
                until = [end for end in ([until] if isinstance(until, str) else until) if end]
                given = samples and self.model.generate([*samples.values()], **settings)
                for i, answer in zip(samples, given, strict=True):
                    answers[i] = min((answer.split(end)[0] for end in until), key=len,
                                     default=answer).strip()
                progress.add(len(part))
        if skipped:
            distributed.log("favor: " + report_skipped(skipped, len(requests)))
        return answers

    def sample(self, request, settings, skipped):
        """A request -> its Sample, or None; then (document, reason) joins the list `skipped`."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        media = doc_to_visual(self.task_dict[task][split][doc_id])
        try:
            sample = Sample(context, clip=read_media(media, self.model.clip_options()))
            why = self.model.too_long(sample, settings["max_new_tokens"])
        except MediaError as error:
            why = str(error)
        if why:
            skipped.append((f"{task} {doc_id}", why))
        return None if why else sample

    def loglikelihood(self, requests):
        """Refused: lmms-eval documents a log-probability here, but ranks it as a loss."""
        raise NotImplementedError(
            "favor answers tasks of the type generate_until alone; of the numbers that other types "
            "need lmms-eval 0.7.3 takes the smallest for the best, and rounds are not supported")

    generate_until_multi_round = loglikelihood
