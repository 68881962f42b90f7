"""Every question answered once: in batches of like length, over processes, through kills.

     records --sorted, cut into batches that never change--> batch k belongs to process k mod world
       --model.generate, once a view--> a line of the journal --all processes--> {id: {view: text}}
The journal is written as answers are made; a run that was killed answers only the batches that it
does not hold.  A batch holds the same questions however many processes there are and however often
the run was killed, so its answers are the same to the bit.

Public: VIEWS, HISTORIES, Journal, answer_all, readable_samples."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch

from runtime import distributed
from runtime.feature_cache import readable_samples

# view: what is masked
VIEWS = {"both": None, "audio only": "visual", "visual only": "audio", "blind": "both"}
HISTORIES = ("gold", "none", "model")


class Journal:
    """Lines {"id", "prompt", "answers": {view: text}, "references"} or {"id", "skipped": why} in a
    folder, as they are made; every start of every process has a file of its own, whose first line
    says under which settings.
    folder None: nothing is kept.  SystemExit when the folder is of other settings."""

    def __init__(self, folder, settings=None):
        self.folder, self.lines, self.file = folder and Path(folder), {}, None
        if not self.folder:
            return
        for path in sorted(self.folder.glob("*.jsonl")):
            self._read(path, settings)
        distributed.all_gather_object(None)                       # all have read before anyone writes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = open(self.folder / f"{time.time_ns()}-{distributed.rank()}.jsonl", "w")
        self._write([{"settings": settings}])

    def _read(self, path, settings):
        # A last line without its end was torn off by a kill.
        lines = [json.loads(text) for text in path.read_text().split("\n")[:-1]]
        then = lines[0]["settings"] if lines else settings
        if then != settings:
            different = {k: (then.get(k), settings.get(k)) for k in {*then, *settings}
                         if then.get(k) != settings.get(k)}
            raise SystemExit(f"{self.folder} holds answers of a run with other settings, (then, "
                             f"now): {different}; choose another --out or remove the folder")
        self.lines |= {line["id"]: line for line in lines[1:]}

    def _write(self, lines):
        self.file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file.flush()

    def add(self, lines):
        self.lines |= {line["id"]: line for line in lines}
        if self.file:
            self._write(lines)

    def holds(self, records):
        return all(r.id in self.lines for r in records)

    def remove(self):
        """When what it held has its final place."""
        if self.file:
            self.file.close()
            distributed.all_gather_object(None)
            if distributed.rank() == 0:
                shutil.rmtree(self.folder)


def same_view(sample, view, views):
    """The first of `views` in which the model gets the same as in `view`: without its picture, a
    clip that has none is as it was."""
    features, clip = sample.features, sample.clip
    held = {"audio": getattr(features or clip, "audio", None) is not None,
            "visual": (getattr(clip, "frames", None) if features is None else features.visual)
            is not None}

    def left(view):
        return [there and VIEWS[view] not in (name, "both") for name, there in held.items()]
    return next(other for other in views if left(other) == left(view))


def clip_key(r):
    return tuple(map(str, (r.video, r.image, r.audio, r.start, r.end)))


def batches_of(records, size, history):
    """Records of like length together; turns of a dialogue that the model leads itself stand beside
    each other."""
    order = sorted(records, key=lambda r: (
        r.task, r.history != (), clip_key(r) if history == "model" else (), len(r.prompt), r.id))
    return [order[i:i + size] for i in range(0, len(order), size)]


def generate(model, records, samples, history, settings):
    """Answers of Samples, after earlier turns as they are ("gold"), without, or with the model's
    own answers to them ("model"), which are asked for first, turn by turn."""
    if history == "none":
        samples = [dataclasses.replace(s, history=()) for s in samples]
    elif history == "model":
        said = [() for _ in samples]
        for turn in range(max((len(s.history) for s in samples), default=0)):
            asked = {}                    # the same clip and questions so far: asked once
            for i, (r, s) in enumerate(zip(records, samples, strict=True)):
                if len(s.history) > turn:
                    asked.setdefault((clip_key(r), said[i], s.history[turn][0]), []).append(i)
            texts = model.generate([
                dataclasses.replace(samples[who[0]], prompt=question, history=turns)
                for (_, turns, question), who in asked.items()], **settings)
            for ((_, turns, question), who), text in zip(asked.items(), texts, strict=True):
                for i in who:
                    said[i] = (*turns, (question, text))
        samples = [dataclasses.replace(s, history=turns)
                   for s, turns in zip(samples, said, strict=True)]
    return model.generate(samples, **settings)


@torch.no_grad()
def answer_all(model, records, store, views=tuple(VIEWS), batch=128, beams=0, history="gold",
               journal=None, log=print):
    """-> {id: {view: answer}} of all records whose clips can be read, and [(id, reason)] of the
    others, on every process."""
    was_training, world, started = model.training, distributed.world(), time.time()
    model.eval()
    journal = journal or Journal(None)
    settings = {"num_beams": beams} if beams else {}
    parts = batches_of(records, batch, history)[distributed.rank()::world]
    due = [part for part in parts if not journal.holds(part)]
    log(f"answering {len(records)} questions, each {len(views)} times: {', '.join(views)}"
        + (f"; {sum(map(len, parts)) - sum(map(len, due))} are there" if due != parts else ""))
    for done, part in enumerate(due, 1):
        journal.add(answer_batch(model, part, store, views, history, settings))
        if done % 5 == 0 or done == len(due):
            seconds = time.time() - started
            log(f"  {sum(map(len, due[:done])) * world}/{sum(map(len, due)) * world}, "
                f"{seconds:.0f} s, ETA {seconds / done * (len(due) - done):.0f} s")
    model.train(was_training)
    wanted = {r.id for r in records}
    lines = {key: line for held in distributed.all_gather_object(journal.lines)
             for key, line in held.items() if key in wanted}
    answers = {key: line["answers"] for key, line in lines.items() if "answers" in line}
    return answers, [(k, line["skipped"]) for k, line in sorted(lines.items()) if "skipped" in line]


def answer_batch(model, part, store, views, history, settings):
    """The journal's lines of one batch."""
    skipped = []
    # Kept features know the record's own question only, not those of the turns before it.
    read, samples = readable_samples(
        model, part, None if history == "model" else store, skipped=skipped)
    if history != "model":
        samples = model.encode_batch(samples)                                 # once for all views
    answers = {r.id: {} for r in read}
    for view in views:
        same = [same_view(sample, view, views) for sample in samples]
        fresh = [(r, dataclasses.replace(s, mask=VIEWS[view]))
                 for r, s, twin in zip(read, samples, same, strict=True) if twin == view]
        if fresh:
            for r, text in zip([r for r, _ in fresh], generate(
                    model, *zip(*fresh, strict=True), history, settings), strict=True):
                answers[r.id][view] = text
        for r, twin in zip(read, same, strict=True):
            answers[r.id][view] = answers[r.id][twin]
    return [{"id": r.id, "prompt": r.prompt, "answers": answers[r.id],
             "references": list(r.refs or (r.target,))} for r in read] + [
        {"id": key, "skipped": why} for key, why in skipped]
