"""Scores a checkpoint on AVEB's tasks.

     python eval.py --task videoqa                   one task of the miniature
     python eval.py --task all                       the table of all eleven
     python eval.py --task avm --checkpoint runs/tiny/best --data my/test.jsonl
     python eval.py --model 7b --task videoqa        the checkpoint runs/7b/best, on the same clips
     python eval.py --model 13b --system instructblip --data my/test.jsonl      a baseline: public
     python eval.py --model 13b --system whisper --beams 5 --data my/test.jsonl   weights, untrained

Each question is answered four times: as it is, with the sound masked, with the picture masked, and
blind (both masked, the same trained model): a task needs what it falls without.  Accuracy is exact
match of the whole answer; asr, ac and avsr are word error rates.  Predictions are kept as JSONL."""

import cli

cli.quiet_threads()

import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

import data  # noqa: E402
import hub  # noqa: E402
import metrics  # noqa: E402
import miniature  # noqa: E402
import processes  # noqa: E402
from answers import HISTORIES, VIEWS, Journal, answer_all, short_hash  # noqa: E402
from baselines import SYSTEMS  # noqa: E402
from favor import HERE, preset  # noqa: E402
from features import keep_features  # noqa: E402


@dataclass(frozen=True)
class EvalConfig:
    task: str = "all"  # all, or some of asr,ac,ic,ocr,vqa,videoqa,avsr,avsd,isqa,avssd,avm
    model: str = "tiny"  # preset: tiny, 7b, 13b (a given --checkpoint says it itself)
    system: str = "favor"  # or the paper's baselines: whisper, instructblip
    checkpoint: str = ""  # folder that train.py wrote (default: runs/<model>/best, else tiny/favor)
    data: str = "media/miniature"  # a manifest (.jsonl), or a folder with test.jsonl
    views: tuple = ()  # of "both" "audio only" "visual only" "blind" (default: all that differ)
    mask: str = ""  # audio or visual: as --views "visual only" or "audio only"
    out: str = ""  # predictions (default: in <checkpoint>/; runs/tiny-committed/ for tiny/favor)
    batch: int = 128  # questions answered at a time
    limit: int = 0  # at most so many questions a task (0: all)
    keep_features: bool = True  # encode each clip once and keep the features beside the manifest
    beams: int = 0  # beam search with so many beams (0: what the checkpoint says)
    history: str = "gold"  # of dialogues: the right answers, none, or the model's own (model)
    processes: int = 0  # on a CPU without torchrun (0: tiny one a core, four at most; others one)
    dtype: str = ""  # bfloat16 or float32 (default: float32 for tiny on a CPU)
    random_init: bool = False  # full size, random weights, no download: does it fit, how fast
    offline: bool = False  # take what the Hub's cache has, ask no network
    # frozen parts: folders in the Hub's layout, or Hub repos (default: the checkpoint's, preset's)
    whisper: str | None = None  # e.g. openai/whisper-large-v2
    instructblip: str | None = None  # ViT and Q-Former, e.g. Salesforce/instructblip-vicuna-7b
    llm: str | None = None  # a LLaMA, or an InstructBLIP that holds one

    def __post_init__(self):
        for name, wanted in (("system", tuple(SYSTEMS)), ("mask", ("", "audio", "visual")),
                             ("dtype", ("", "bfloat16", "float32")), ("history", HISTORIES)):
            if getattr(self, name) not in wanted:
                raise ValueError(f"--{name} {getattr(self, name)}; "
                                 f"wanted {' or '.join(filter(None, wanted))}")
        if self.random_init and (self.system == "whisper" or self.checkpoint):
            raise ValueError("--random-init goes with neither --system whisper nor --checkpoint")
        preset(self.model)
        unknown = set(self.views) - set(VIEWS)
        if unknown:
            raise ValueError(f"unknown views {sorted(unknown)}; there are {', '.join(VIEWS)}")
        unknown = set(self.tasks) - set(miniature.TASKS)
        if unknown and self.task != "all":
            raise ValueError(f"unknown task {', '.join(sorted(unknown))}; "
                             f"there are {', '.join(miniature.TASKS)}, all")
        able = SYSTEMS[self.system].tasks
        if able and self.task != "all" and set(self.tasks) - set(able):
            raise ValueError(f"--system {self.system} can do {', '.join(able)}, not {self.task}")

    @property
    def tasks(self):
        if self.task == "all":
            return SYSTEMS[self.system].tasks or miniature.TASKS
        return tuple(self.task.split(","))

    @property
    def sources(self):
        """Where frozen parts are, as far as the command line says."""
        named = {n: getattr(self, n) for n in ("whisper", "instructblip", "llm")}
        return {name: source for name, source in named.items() if source}


def views_of(system, mask="", chosen=()):
    """The ways each question is answered: the chosen ones, or the one that `mask` means, or all
    four (a baseline has but one modality)."""
    if mask:
        return tuple(view for view, masked in VIEWS.items() if masked == mask)
    return tuple(chosen) or (tuple(VIEWS) if system == "favor" else ("both",))


def find_checkpoint(path, model="tiny"):
    """The given folder, else the last own run, else the committed one."""
    places = [Path(path)] if path else [Path(f"runs/{model}/best")]
    if model == "tiny" and not path:
        places.append(HERE / "tiny" / "favor")
    for place in places:
        if (place / "favor.json").exists():
            return place
    raise SystemExit(f"no checkpoint in {' or '.join(map(str, places))} (wanted favor.json there); "
                     "make one with: python train.py"
                     + (f" --model {model}" if model != "tiny" else ""))


def settled(config):
    """The same with the preset that its checkpoint was trained with."""
    file = Path(config.checkpoint) / "favor.json"
    trained = hub.read_json(file).get("train", {}) if config.checkpoint and file.exists() else {}
    return dataclasses.replace(config, model=trained.get("model", config.model))


def load_model(config, dtype=None, device=None):
    """The model that the command line names, and the folder of its checkpoint (None without)."""
    kind, method = SYSTEMS[config.system], preset(config.model, **config.sources)
    if config.random_init:
        return kind.from_config(method, dtype, device, random_init=True).eval(), None
    if config.system != "favor" and not config.checkpoint:     # public weights are all it takes
        return kind.from_config(method, dtype, device), None
    checkpoint = find_checkpoint(config.checkpoint, config.model)
    return kind.from_pretrained(checkpoint, dtype, device, **config.sources), checkpoint


def find_manifest(path, split):
    """A manifest file, or <folder>/<split>.jsonl; the miniature's folder is filled when empty."""
    path = Path(path)
    manifest = path if path.suffix == ".jsonl" else path / f"{split}.jsonl"
    if path == Path(EvalConfig.data) and not manifest.exists():
        miniature.make(path, splits=(split,))
    if not manifest.exists():
        raise SystemExit(f"{manifest}: no such manifest; name a .jsonl file or a folder with "
                         f"{split}.jsonl (the miniature: python miniature.py make)")
    return manifest


def evaluate(model, records, store, views=tuple(VIEWS), batch=128, beams=0, history="gold",
             journal=None, log=print):
    """-> predictions, one dict a question with its answer in every view, in the records' order;
    scores {task: {view: Score}}.  Questions about clips that cannot be read are left out and
    counted.  Under torchrun each process answers its share, and all return everything."""
    said, skipped = answer_all(model, records, store, views, batch, beams, history, journal, log)
    if skipped:
        log(data.report_skipped(skipped, len(records)))
    if not said:
        raise SystemExit("none of the questions' clips can be read; look at the reasons above")
    predictions = [{"id": r.id, "task": r.task, "prompt": r.prompt,
                    "references": list(r.refs or (r.target,)), **said[r.id], "meta": r.meta}
                   for r in records if r.id in said]
    scores = {task: {view: score_of(task, rows, view) for view in views}
              for task, rows in by_task(predictions).items()}
    return predictions, scores


def by_task(predictions):
    groups = {}
    for row in predictions:
        groups.setdefault(row["task"], []).append(row)
    order = {task: i for i, task in enumerate(miniature.TASKS)}
    return dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))


def score_of(task, rows, view):
    return metrics.score(task, [row[view] for row in rows], [row["references"] for row in rows])


def table(predictions, views):
    """Markdown: a line a task, with chance and the 95 % interval, then the parts scored apart."""
    lines = ["| task | n | " + " | ".join(views) + " | chance |", "|---" * (len(views) + 3) + "|"]

    def line(label, task, rows):
        chances = [row["meta"].get("chance") for row in rows]
        accuracy = task not in metrics.ERROR_RATES
        chance = (f"{100 * sum(chances) / len(rows):.1f}" if accuracy and None not in chances
                  else "-")
        cells = [str(score_of(task, rows, view)) if i == 0
                 else f"{score_of(task, rows, view).value:.1f}" for i, view in enumerate(views)]
        return f"| {label} | {len(rows)} | " + " | ".join(cells) + f" | {chance} |"

    tasks = by_task(predictions)
    for task, rows in tasks.items():
        unit = "WER % ↓" if task in metrics.ERROR_RATES else "% ↑"
        lines.append(line(f"**{task}** {unit}", task, rows))
    for task, rows in tasks.items():
        kinds = {}
        for row in rows:
            for key, name in (("type", ""), ("one_window", None)):
                if key in row["meta"]:
                    value = row["meta"][key]
                    where = {True: "within one window", False: "across windows"}.get(value, value)
                    kinds.setdefault(where if name is None else value, []).append(row)
        lines += [line(f"{task}: {kind}", task, part) for kind, part in sorted(kinds.items())]
    return "\n".join(lines)


def main(config, argv):
    config = settled(config)
    manifest = find_manifest(config.data, "test")
    every = config.task == "all" and not SYSTEMS[config.system].tasks
    records = [r for r in data.read_manifest(manifest) if every or r.task in config.tasks]
    if config.limit:
        seen = {}
        records = [r for r in records if seen.setdefault(r.task, []).append(r)
                   or len(seen[r.task]) <= config.limit]
    if not records:
        raise SystemExit(f"{manifest}: no questions of task {config.task}")
    unanswered = [r.id for r in records if r.target is None and not r.refs]
    if unanswered:
        raise SystemExit(
            f"{manifest}: {unanswered[0]} has neither target nor refs to score against")
    rank, world, device = processes.join()
    if world > 1:
        torch.set_num_threads(max(1, cli.cores() // world))
    say = partial(print, flush=True) if rank == 0 else (lambda *_: None)
    dtype, _, why = processes.precision(config.dtype, config.model, device)
    hub.offline(config.offline)
    try:
        model, checkpoint = load_model(config, dtype, device)
    except (FileNotFoundError, ValueError) as error:      # what is missing or does not fit
        raise SystemExit(str(error)) from error
    say(f"{checkpoint or config.system} on {manifest}, {len(records)} questions, {device.type}, "
        f"weights {why}")
    views, store = views_of(config.system, config.mask, config.views), None
    if config.keep_features and config.model == "tiny" and config.system != "whisper":
        with processes.chief_first():
            store = keep_features(model, records, manifest.parent / "features", log=say)
    own = checkpoint and checkpoint.resolve() != (HERE / "tiny" / "favor").resolve()
    folder = checkpoint if own else Path("runs") / (
        "tiny-committed" if checkpoint else f"{config.model}-{config.system}")
    out = Path(config.out or folder / "predictions.jsonl")
    settings = {
        "system": config.system, "model": config.model, "checkpoint": str(checkpoint),
        "weights": weights_hash(checkpoint), "sources": [str(s) for s in sources_of(model)],
        "dtype": why.split()[0], "manifest": str(manifest), "questions": len(records),
        "ids": short_hash(*sorted(r.id for r in records)), "views": list(views),
        "batch": config.batch, "beams": config.beams or model.config.beams,
        "repetition penalty": model.config.repetition_penalty,
        "max new tokens": model.config.max_new_tokens, "history": config.history}
    journal = Journal(out.with_suffix(".parts"), settings)
    predictions, scores = evaluate(
        model, records, store, views, config.batch, config.beams, config.history, journal, say)
    if rank == 0:
        write_report(out, predictions, scores, views, settings)
        print(table(predictions, views))
        print(f"predictions: {out}, report: {out.with_suffix('.json')}")
    journal.remove()
    processes.leave()


def weights_hash(checkpoint):
    """Of the trained parts."""
    files = sorted(checkpoint.rglob("*.safetensors")) if checkpoint else []
    return short_hash(*files) if files else None


def sources_of(model):
    return [getattr(model.config, name) for name in ("whisper", "instructblip", "llm")]


def write_report(out, predictions, scores, views, settings):
    """predictions.jsonl, and beside it .md (the table) and .json (scores, settings, hashes)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(row) + "\n" for row in predictions))
    write_text(out.with_suffix(".md"), table(predictions, views) + "\n")
    hub.write_json(out.with_suffix(".json"), {
        "settings": settings, "answered": len(predictions),
        "scores": {task: {view: dataclasses.asdict(score) for view, score in by_view.items()}
                   for task, by_view in scores.items()}})


def write_text(path, text):
    """Atomically: a kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    settings = settled(cli.parse(EvalConfig, __doc__)[0])
    if settings.checkpoint or settings.system == "favor" and not settings.random_init:
        find_checkpoint(settings.checkpoint, settings.model)    # what is missing is said before the
    data.read_manifest(find_manifest(settings.data, "test"))    # processes start, not once by each
    processes.one_a_core(settings.processes,          # each has its own copy of the weights
                         most=4 if settings.model == "tiny" else 1)
    main(settings, sys.argv[1:])
