"""Answers every question once: in batches of similar length, on all processes, despite kills.

     records --sorted, cut into batches that never change--> batch k belongs to process k mod world
       --model.generate, once per view--> a line of the journal --all processes--> predictions

   The journal (aveb/journal.py) is written while answers are made; a run that was killed answers
   only the batches that the journal lacks.  A batch holds the same questions however many processes
   there are and however often the run was killed, so its answers are the same to the bit.
   Public: evaluate, views_of, find_manifests, read_manifests, answer_all."""

import dataclasses
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import torch

import data
from aveb.journal import Journal
from aveb.tasks import VIEWS
from runtime import distributed
from runtime.cli import Progress
from runtime.feature_cache import readable_samples


# ---------------------------------------------------------------- questions
def views_of(system, mask="", chosen=()):
    """The views in which each question is answered: the one that `mask` means, or the chosen ones,
    or all four (only "both" for a baseline, which has but one modality)."""
    if mask:
        return tuple(view for view, masked in VIEWS.items() if masked == mask)
    return tuple(chosen) or (tuple(VIEWS) if system == "favor" else ("both",))


def find_manifests(path, tasks):
    """The manifests that --data means: a .jsonl file, <folder>/test.jsonl, or <folder>/<task>.jsonl
    of those tasks that have one.  SystemExit if there is none of these."""
    path = Path(path)
    found = [file for task in tasks if (file := path / f"{task}.jsonl").exists()]
    if found and not (path / "test.jsonl").exists():
        return found
    try:
        return [data.find_manifest(path, "test")]
    except ValueError as error:
        raise SystemExit(str(error)) from error


def read_manifests(manifests, check=lambda record: ""):
    """All records.  SystemExit names file and line of one that is wrong, or of which check(record)
    says so, and the id that two manifests hold."""
    try:
        records = [r for file in manifests for r in data.read_manifest(file, check)]
    except ValueError as error:
        raise SystemExit(str(error)) from error
    twice = [key for key, n in Counter(r.id for r in records).items() if n > 1]
    if twice:
        raise SystemExit(f"{', '.join(map(str, manifests))}: id {twice[0]!r} is in two of them; "
                         "make ids unique")
    return records


def evaluate(model, records, cache, views=tuple(VIEWS), batch=128, beams=0, history="gold",
             journal=None, log=print):
    """-> (predictions, {task: number of questions whose clip cannot be read}).

    A prediction is a dict with a question, its references and its answer in every view ("answer":
    in the first); they are in the records' order.  cache: a FeatureCache or None; history: one of
    HISTORIES.  Under torchrun each process answers its share, and all return everything."""
    answers, skipped = answer_all(model, records, cache, views, batch, beams, history, journal, log)
    if skipped:
        log(data.report_skipped(skipped, len(records)))
    if not answers:
        raise SystemExit("none of the questions' clips can be read; look at the reasons above")
    predictions = [{"id": r.id, "task": r.task, "prompt": r.prompt,
                    "answer": answers[r.id][views[0]], "references": list(r.refs or (r.target,)),
                    **answers[r.id], "meta": r.meta,
                    **({"options": list(r.options)} if r.options else {})}
                   for r in records if r.id in answers]
    return predictions, Counter(r.task for r in records if r.id not in answers)


# ---------------------------------------------------------------- answering
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
    """Batches of `size` records of like length; the turns of a dialogue that the model leads itself
    stand beside each other."""
    order = sorted(records, key=lambda r: (
        r.task, r.history != (), clip_key(r) if history == "model" else (), len(r.prompt), r.id))
    return [order[i:i + size] for i in range(0, len(order), size)]


def generate(model, records, samples, history, settings):
    """Answers of Samples, after earlier turns as they are ("gold"), without, or with the model's
    own answers to them ("model"), which are asked for first, turn by turn."""
    if history == "none":
        samples = [dataclasses.replace(s, history=()) for s in samples]
    elif history == "model":
        turns_of = [() for _ in samples]
        for turn in range(max((len(s.history) for s in samples), default=0)):
            asked = {}                    # the same clip and questions so far: asked once
            for i, (r, s) in enumerate(zip(records, samples, strict=True)):
                if len(s.history) > turn:
                    asked.setdefault((clip_key(r), turns_of[i], s.history[turn][0]), []).append(i)
            texts = model.generate([
                dataclasses.replace(samples[who[0]], prompt=question, history=turns)
                for (_, turns, question), who in asked.items()], **settings)
            for ((_, turns, question), who), text in zip(asked.items(), texts, strict=True):
                for i in who:
                    turns_of[i] = (*turns, (question, text))
        samples = [dataclasses.replace(s, history=turns)
                   for s, turns in zip(samples, turns_of, strict=True)]
    return model.generate(samples, **settings)


@torch.no_grad()
def answer_all(model, records, cache, views=tuple(VIEWS), batch=128, beams=0, history="gold",
               journal=None, log=print):
    """-> {id: {view: answer}} of all records whose clips can be read, and [(id, reason)] of the
    others, on every process."""
    was_training, world, rank = model.training, distributed.world(), distributed.rank()
    model.eval()
    journal = journal or Journal(None)
    settings = {"num_beams": beams} if beams else {}
    batches = batches_of(records, batch, history)
    due = [[part for part in batches[r::world] if not journal.holds(part)] for r in range(world)]
    # The processes work side by side: while this one answers a batch, each other one does, too.
    side_by_side = [sum(map(len, parts)) for parts in zip_longest(*due, fillvalue=())]
    total = sum(side_by_side)
    log(f"answering {len(records)} questions, each {len(views)} times: {', '.join(views)}"
        + (f"; {len(records) - total} are answered already" if total < len(records) else ""))
    with Progress("answering", total, "question") as progress:
        for part, n in zip(due[rank], side_by_side, strict=False):
            journal.add(answer_batch(model, part, cache, views, history, settings))
            progress.add(n)
    model.train(was_training)
    wanted = {r.id for r in records}
    lines = {key: line for held in distributed.all_gather_object(journal.lines)
             for key, line in held.items() if key in wanted}
    answers = {key: line["answers"] for key, line in lines.items() if "answers" in line}
    return answers, [(k, line["skipped"]) for k, line in sorted(lines.items()) if "skipped" in line]


def too_long(model, sample, question):
    """Why this question, without turns before it, cannot be asked about a Sample's clip, or ""."""
    return model.too_long(dataclasses.replace(sample, prompt=question, target=None),
                          model.config.max_new_tokens)


def answer_batch(model, part, cache, views, history, settings):
    """The journal's lines of one batch."""
    skipped = []
    # Cached features know the record's own question only, not those of the turns before it.
    read, samples = readable_samples(
        model, part, None if history == "model" else cache, skipped=skipped)
    if history == "model" and hasattr(model, "too_long"):        # asks the earlier questions, too
        reasons = [next(filter(None, (too_long(model, s, asked) for asked, _ in s.history)), "")
                   for s in samples]
        skipped += [(r.id, why) for r, why in zip(read, reasons, strict=True) if why]
        read, samples = ([x for x, why in zip(xs, reasons, strict=True) if not why]
                         for xs in (read, samples))
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
