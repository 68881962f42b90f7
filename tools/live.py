"""Answers while a clip still plays: after each window again, from what has been seen so far.

     clip cut at t --frames, chunks of sound--> Features --windows--> (W*Q,D_llm) --LLM--> answer
                   what is the same as at the last answer is taken over; in the LLM it is the prompt
                   up to the first vector that has changed, which stays in the KV cache

The answer at time t is the one that Favor.answer gives to the clip cut at t.  Nothing is assumed
about what a later sound can change: the inputs of each part are compared with those of the last
answer.  Whisper reads chunks of 30 s, so a new second of sound changes all vectors of its own chunk
and those of no other; of the windows, the ones of finished chunks stay, and of a clip without sound
all.  Greedy answers only: beams would reorder the cache.
Public: Live, seen, window_ends, in_time, play."""

import dataclasses
import math
import sys
import time

import torch

from data import Clip, Features, Sample
from favor import without_leading_space
from llama import KVCache
from runtime.media import AUDIO_RATE, TICK

STEP = 5.0          # s between two answers where the whole clip is one window


class Unchanged:
    """Results for a list of inputs (tuples of tensors or None).  compute(inputs) makes those of the
    inputs that differ from what stood at their place at the last call; the others are kept."""

    def __init__(self, compute):
        self.compute, self.inputs, self.results = compute, [], []

    def __call__(self, inputs):
        changed = [i for i, parts in enumerate(inputs)
                   if i >= len(self.inputs) or not equal(parts, self.inputs[i])]
        new = self.compute([inputs[i] for i in changed]) if changed else []
        results = self.results[:len(inputs)] + [None] * (len(inputs) - len(self.results))
        for i, result in zip(changed, new, strict=True):
            results[i] = result
        self.inputs, self.results = inputs, results
        return results


def equal(parts, others):
    """Whether two tuples of tensors or None are the same to the bit."""
    return all(a is b or (a is not None and b is not None and torch.equal(a, b))
               for a, b in zip(parts, others, strict=True))


class Live:
    """One question about a clip that goes on.  history: earlier (question, answer) turns; mask:
    "audio", "visual" or "both" hides a modality.  ValueError for a compiled LLM."""

    def __init__(self, model, question, history=(), mask=None):
        if model.llm.compiled:
            raise ValueError("a compiled LLM keeps a cache of its own, so it cannot answer live; "
                             "leave --compile away")
        self.model, self.sample = model, Sample(question, history=tuple(history), mask=mask)
        self.pictures = Unchanged(self._see)
        self.sounds = Unchanged(self._hear)
        self.windows = Unchanged(self._read)
        self.cache, self.cached = KVCache(1, 0), None           # (L,D_llm), the prompt in the cache

    @torch.no_grad()
    def answer(self, clip, stream=None, **settings):
        """The answer to the question about a Clip as seen so far.  stream(text) receives it in
        pieces, as they are generated; settings: those of Llama.generate, num_beams excepted.
        A warning tells what did not fit the LLM's positions, as for any clip (Favor.fit)."""
        model, config = self.model, self.model.config
        settings = {"max_new_tokens": config.max_new_tokens, "eos_id": model.end_ids(),
                    "repetition_penalty": config.repetition_penalty} | settings
        sample = dataclasses.replace(self.sample, features=self.encode(clip))
        sample, _ = model.fit(sample, settings["max_new_tokens"])
        prompt = self.prompt(sample)                                              # (L,D_llm)
        first = self.first_change(prompt)
        self.cache.cut(first)
        self.cached = prompt[:first]                # all that holds if this answer is interrupted
        push, show = model.tokenizer.stream_decoder(), without_leading_space(
            stream or (lambda text: None))
        ids, = model.llm.generate(embeds=prompt[None, first:], cache=self.cache, **settings,
                                  stream=lambda row, token: show(push(token)))
        show(push())
        self.cached = prompt
        return model.tokenizer.decode(ids).strip()

    def encode(self, clip):
        """Clip -> Features, as Favor.encode gives them.  Only frames and chunks of sound that have
        changed go through the frozen encoders."""
        frames = [] if clip.frames is None else [(frame,) for frame in clip.frames]
        # With audio_seconds (official) the sound has always the same length, and is one part.
        chunk = self.model.whisper.config.chunk_samples
        sound = [] if clip.audio is None else [
            (part,) for part in ([clip.audio] if self.model.config.audio_seconds
                                 else clip.audio.split(chunk))]
        visual, audio = self.pictures(frames), self.sounds(sound)
        return Features(torch.stack(visual) if visual else None,                  # (F,V,D_v)
                        torch.cat(audio) if audio else None, clip.is_image)       # (S,D_a)

    def _see(self, frames):
        clip = Clip(torch.stack([frame for frame, in frames]))
        return self.model.encode(clip, [self.model.question_to_see(self.sample)])[0].visual

    def _hear(self, parts):
        return [features.audio for features in self.model.encode_all(
            [Clip(audio=part) for part, in parts], [""] * len(parts))]

    def prompt(self, sample):
        """An encoded sample -> embeddings (L,D_llm), as Favor.llm_inputs makes them."""
        vectors = self.windows(self.split(sample))                                # (Q,D_llm) each
        before, after, _ = self.model.text_ids(sample, bool(vectors))
        ids = torch.tensor([before + after], device=self.model.llm_proj.weight.device)
        text = self.model.llm.embed(ids)[0]                                       # (T,D_llm)
        return torch.cat([text[:len(before)], *(v.to(text) for v in vectors), text[len(before):]])

    def split(self, sample):
        """An encoded sample -> the features (visual, audio) of each window, in the LLM's order:
        with sync=False all windows of the picture come before those of the sound."""
        visual, audio = self.model.features_of(sample)
        A, windows = self.model.audio_steps, []
        for seen, heard in [(visual, audio)] if self.model.config.sync else [
                (visual, None), (None, audio)]:
            F = max(0 if seen is None else len(seen),
                    0 if heard is None else math.ceil(len(heard) / A))
            K = self.model.config.window_frames or F
            windows += [(None if seen is None else seen[i:i + K],
                         None if heard is None else heard[i * A:(i + K) * A])
                        for i in range(0, F, K or 1)]
        return windows

    def _read(self, windows):
        """The causal Q-Former and the projection: to them each window is a clip of its own."""
        return self.model.audio_visual_tokens([
            dataclasses.replace(self.sample, features=Features(*parts)) for parts in windows])[0]

    def first_change(self, prompt):
        """How many positions of the prompt (L,D_llm) can stay in the KV cache; at most L - 1,
        because the last position is computed again for the first word."""
        rope = dict(self.model.llm.config.rope_scaling).get("rope_type")
        if self.cached is None or rope == "dynamic":       # its angles depend on the length so far
            return 0
        n = min(len(self.cached), len(prompt) - 1)
        same = (self.cached[:n] == prompt[:n]).all(dim=1)
        return int(same.cumprod(0).sum())


# ---- a file at the speed at which it plays -------------------------------------------------------

def seen(clip, t, read, start=0.0, frame_times="regular"):
    """A whole Clip -> what there is of it after t seconds: read(end=start + t), without reading the
    file again where that is the beginning of the clip.  It is not under the authors' rule for the
    times of frames ("ends"), which moves the last ones; nor where a damaged picture ends before its
    sound, because its last frame is repeated for up to a second."""
    if t >= clip.seconds:
        return clip
    pictures = 0 if clip.frames is None or clip.is_image else len(clip.frames) / clip.fps
    if pictures and (frame_times != "regular" or pictures < clip.seconds - 0.01):
        return read(end=start + t)
    frames = clip.frames[:math.ceil(t * clip.fps - TICK)] if pictures else clip.frames
    n = round((start + t) * AUDIO_RATE) - round(start * AUDIO_RATE)
    return dataclasses.replace(clip, frames=frames,
                               audio=None if clip.audio is None else clip.audio[:n])


def window_ends(config, seconds):
    """The times in a clip of so many seconds after which there is an answer: the ends of windows,
    or where the whole clip is one window every 5 s; and the end."""
    step = config.window_frames / config.fps or STEP
    return [min(n * step, seconds) for n in range(1, math.ceil(seconds / step - TICK) + 1)]


def in_time(ends, clock=time.monotonic, sleep=time.sleep):
    """Times of a clip that starts to play now -> yields (t, skipped times, t on the clock), each as
    soon as it has come.  Where the one who takes them was busy, only the newest is left."""
    began, i = clock(), 0
    while i < len(ends):
        sleep(max(0.0, began + ends[i] - clock()))
        newest = max((n for n in range(i, len(ends)) if began + ends[n] <= clock()), default=i)
        yield ends[newest], ends[i:newest], began + ends[newest]
        i = newest + 1


def play(live, clip, read, start=0.0, clock=time.monotonic, sleep=time.sleep, **settings):
    """Prints the answers of a Live while `clip`, which read(end=None) has read from `start` on,
    plays: a line for each window, with the time from its end to the first token of the answer.
    Ctrl-C ends it.  Raises ValueError for a still image without sound."""
    config = live.model.config
    if not (ends := window_ends(config, clip.seconds)):
        raise ValueError("an image without sound does not go on, so there is nothing to wait for; "
                         "ask without --live, or give it sound (--audio FILE)")
    if config.beams > 1:
        print(f"[live answers are greedy; this checkpoint otherwise searches {config.beams} beams]",
              file=sys.stderr)
    try:
        for t, skipped, due in in_time(ends, clock, sleep):
            if skipped:
                print("[skipped, because the answer before took too long: "
                      f"{', '.join(f'{n:.1f}' for n in skipped)} s]")
            print(f"{t:6.1f} s  ", end="", flush=True)
            first = []                                      # the time of the first token

            def show(text, first=first):
                first[:] = first or [clock()]
                print(text, end="", flush=True)
            live.answer(seen(clip, t, read, start, config.frame_times), show, **settings)
            print(f"  [first token after {first[0] - due:.2f} s]", flush=True)
    except KeyboardInterrupt:
        print("\n[stopped]")
