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


import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import data
import lora
import miniature
from aveb import captions, judge
from aveb.answers import HISTORIES, VIEWS, Journal, answer_all, short_hash
from aveb.tables import TASKS, report_text, write_report
from baselines.instructblip import SYSTEMS
from favor import HERE, preset
from runtime import cli, distributed, hub
from runtime.feature_cache import keep_features


@dataclass(frozen=True)
class EvalConfig:
    task: str = "all"  # or some of asr,ac,ic,ocr,vqa,videoqa,avsr,avsd,isqa,avssd,avm,favd,valor
    model: str = "tiny"  # preset: tiny, 7b, 13b (a given --checkpoint says it itself)
    system: str = "favor"  # or the paper's baselines: whisper, instructblip
    checkpoint: str = ""  # folder that train.py wrote (default: runs/<model>/best, else the committed one)
    data: str = "media/miniature"  # a manifest (.jsonl), or a folder with test.jsonl or TASK.jsonl
    views: tuple = ()  # of "both" "audio only" "visual only" "blind" (default: all that differ)
    mask: str = ""  # audio or visual: as --views "visual only" or "audio only"
    out: str = ""  # predictions (default: in <checkpoint>/; runs/tiny-committed/ for the committed one)
    batch: int = 128  # questions answered at a time
    limit: int = 0  # at most so many questions a task (0: all)
    keep_features: bool = True  # encode each clip once and keep the features beside the manifest
    beams: int = 0  # beam search with so many beams (0: what the checkpoint says)
    history: str = "gold"  # of dialogues: the right answers, none, or the model's own (model)
    judge: str = ""  # of avsd, avssd: url, self (this model), none (writes prompts), file:VERDICTS
    judge_url: str = ""  # an OpenAI-compatible server; the key comes from FAVOR_JUDGE_KEY
    judge_model: str = ""  # the judge's name there; it stands beside the score
    judge_budget: int = 10_000  # most requests of this run
    java: str = "java"  # for METEOR, SPICE and their tokeniser
    spice_jar: str = ""  # spice-1.0.jar beside lib/ with Stanford CoreNLP 3.6.0 (user's download)
    spice_java: str = ""  # SPICE wants Java 8 or 11 (default: as --java)
    processes: int = 0  # on a CPU without torchrun (0: tiny one a core, four at most; others one)
    dtype: str = ""  # bfloat16 or float32 (default: float32 for tiny on a CPU)
    merge: bool = True  # LoRA added into the LLM's own weights, which then cost what they cost bare
    compile: bool = False  # torch.compile for new tokens, on a GPU as a CUDA graph; not for beams
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
        if self.judge not in judge.WAYS and not self.judge.startswith("file:"):
            raise ValueError(f"--judge {self.judge}; wanted url, self, none or file:VERDICTS")
        if self.random_init and (self.system == "whisper" or self.checkpoint):
            raise ValueError("--random-init goes with neither --system whisper nor --checkpoint")
        preset(self.model)
        unknown = set(self.views) - set(VIEWS)
        if unknown:
            raise ValueError(f"unknown views {sorted(unknown)}; there are {', '.join(VIEWS)}")
        unknown = set(self.tasks) - set(TASKS)
        if unknown and self.task != "all":
            raise ValueError(f"unknown task {', '.join(sorted(unknown))}; "
                             f"there are {', '.join(TASKS)}, all")
        able = SYSTEMS[self.system].tasks
        if able and self.task != "all" and set(self.tasks) - set(able):
            raise ValueError(f"--system {self.system} can do {', '.join(able)}, not {self.task}")

    @property
    def tasks(self):
        if self.task == "all":
            return SYSTEMS[self.system].tasks or TASKS
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
        places.append(HERE / "miniature" / "weights" / "favor")
    for place in places:
        if (place / "favor.json").exists():
            return place
    raise SystemExit(f"no checkpoint in {' or '.join(map(str, places))} (wanted favor.json there); "
                     "make one with: python train.py"
                     + (f" --model {model}" if model != "tiny" else ""))


def resolve_config(config):
    """The same with the preset that its checkpoint was trained with.  SystemExit where there is no
    checkpoint."""
    if config.checkpoint or config.system == "favor" and not config.random_init:
        find_checkpoint(config.checkpoint, config.model)
    file = Path(config.checkpoint) / "favor.json"
    trained = hub.read_json(file).get("train", {}) if config.checkpoint and file.exists() else {}
    return dataclasses.replace(config, model=trained.get("model", config.model))


def load_model(config, dtype=None, device=None):
    """The model that the command line names, and the folder of its checkpoint (None without)."""
    kind, method = SYSTEMS[config.system], preset(config.model, **config.sources)
    checkpoint = None
    if config.random_init:
        model = kind.from_config(method, dtype, device, random_init=True).eval()
    elif config.system != "favor" and not config.checkpoint:   # public weights are all it takes
        model = kind.from_config(method, dtype, device)
    else:
        checkpoint = find_checkpoint(config.checkpoint, config.model)
        model = kind.from_pretrained(checkpoint, dtype, device, **config.sources)
    if config.merge:
        lora.merge(model, reversible=False)
    if config.compile and hasattr(model, "llm"):
        model.llm.compiled = True
    return model, checkpoint


def find_manifest(path, split):
    """A manifest file, or <folder>/<split>.jsonl; the miniature's folder is filled when empty, or
    anew when an older version of the generator filled it."""
    path = Path(path)
    manifest = path if path.suffix == ".jsonl" else path / f"{split}.jsonl"
    stamp = path / f"{split}.made.json"
    older = stamp.exists() and hub.read_json(stamp)["version"] != miniature.VERSION
    if path == Path(EvalConfig.data) and (older or not manifest.exists()):
        miniature.make(path, splits=(split,))
    if not manifest.exists():
        raise SystemExit(f"{manifest}: no such manifest; name a .jsonl file or a folder with "
                         f"{split}.jsonl (the miniature: python -m miniature make)")
    return manifest


def find_manifests(path, tasks):
    """As find_manifest, or <folder>/<task>.jsonl of those tasks that have one (aveb.py's)."""
    path = Path(path)
    found = [file for task in tasks if (file := path / f"{task}.jsonl").exists()]
    return found if found and not (path / "test.jsonl").exists() else [find_manifest(path, "test")]


def read_manifests(manifests):
    """All records; SystemExit when an id stands in two files."""
    records = [r for file in manifests for r in data.read_manifest(file)]
    twice = [key for key, n in Counter(r.id for r in records).items() if n > 1]
    if twice:
        raise SystemExit(f"{', '.join(map(str, manifests))}: id {twice[0]!r} is in two of them; "
                         "make ids unique")
    return records


def evaluate(model, records, store, views=tuple(VIEWS), batch=128, beams=0, history="gold",
             journal=None, log=print):
    """-> predictions, one dict a question with its answer in every view ("answer": in the first),
    in the records' order;
    {task: number of questions whose clip cannot be read}, which are left out.  Under torchrun each
    process answers its share, and all return everything."""
    said, skipped = answer_all(model, records, store, views, batch, beams, history, journal, log)
    if skipped:
        log(data.report_skipped(skipped, len(records)))
    if not said:
        raise SystemExit("none of the questions' clips can be read; look at the reasons above")
    predictions = [{"id": r.id, "task": r.task, "prompt": r.prompt, "answer": said[r.id][views[0]],
                    "references": list(r.refs or (r.target,)), **said[r.id], "meta": r.meta,
                    **({"options": list(r.options)} if r.options else {})}
                   for r in records if r.id in said]
    return predictions, Counter(r.task for r in records if r.id not in said)


def ask_judge(config, model, predictions, views, out, log=print):
    """row["verdicts"] = {view: True, False or None} and row["judge"] = its name, for the tasks that
    are judged (judge.py)."""
    rows = [row for row in predictions if "judged" in row["meta"].get("metrics", ())]
    way = config.judge or ("url" if config.judge_url else "")
    if not rows or not way:
        return
    if way == "none":
        path, n = judge.write_prompts(out.with_suffix(".prompts.jsonl"), rows, views)
        log(f'{n} prompts for a judge: {path}; add "verdict": "Yes" or "No" to its lines, then '
            f"--judge file:{path}")
        return
    asked = None
    if way == "url":
        asked = judge.Judge(config.judge_url, config.judge_model, budget=config.judge_budget)
    elif way == "self":
        asked = judge.OwnJudge(model, config.judge_model)
    for view in views:
        if asked:
            verdicts, name = asked.verdicts(rows, view), asked.model
            log(f"judge {name}, {view}: {asked.asked} requests, {verdicts.count(None)} of "
                f"{len(rows)} not judged {asked.stopped}".rstrip())
        else:
            path = way.removeprefix("file:")
            verdicts, name = judge.read_verdicts(path, rows, view), config.judge_model or path
        for row, verdict in zip(rows, verdicts, strict=True):
            row.setdefault("verdicts", {})[view] = verdict
            row["judge"] = name


def trained_on(model, checkpoint):
    """{data set: {task: samples}} that the checkpoint was trained on; {} for public weights as they
    are, None where it is not told."""
    if checkpoint is None:
        return {} if model.system != "favor" else None
    return hub.read_json(checkpoint / "favor.json").get("mixture")


def main(config, argv):
    config = resolve_config(config)
    rank, world, device = distributed.init_distributed()
    with distributed.main_process_first():                          # who makes the miniature if it must be
        manifests = find_manifests(config.data, config.tasks)
    manifest = ", ".join(map(str, manifests))
    every = config.task == "all" and not SYSTEMS[config.system].tasks
    records = [r for r in read_manifests(manifests) if every or r.task in config.tasks]
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
    if world > 1:
        torch.set_num_threads(max(1, cli.cores() // world))
    say = partial(print, flush=True) if rank == 0 else (lambda *_: None)
    dtype, _, why = distributed.precision(config.dtype, config.model, device)
    hub.offline(config.offline)
    captions.use(java=config.java, spice_jar=config.spice_jar, spice_java=config.spice_java)
    try:
        model, checkpoint = load_model(config, dtype, device)
    except (FileNotFoundError, ValueError) as error:      # what is missing or does not fit
        raise SystemExit(str(error)) from error
    say(f"{checkpoint or config.system} on {manifest}, {len(records)} questions, {device.type}, "
        f"weights {why}")
    views, store = views_of(config.system, config.mask, config.views), None
    if config.keep_features and config.model == "tiny" and config.system != "whisper":
        with distributed.main_process_first():
            store = keep_features(model, records, manifests[0].parent / "features", log=say)
    own = checkpoint and checkpoint.resolve() != (HERE / "miniature" / "weights" / "favor").resolve()
    folder = checkpoint if own else Path("runs") / (
        "tiny-committed" if checkpoint else f"{config.model}-{config.system}")
    out = Path(config.out or folder / "predictions.jsonl")
    settings = {
        "system": config.system, "model": config.model, "checkpoint": str(checkpoint),
        "weights": weights_hash(checkpoint), "sources": [str(s) for s in sources_of(model)],
        "dtype": why.split()[0], "merged": config.merge,
        "manifest": manifest, "questions": len(records),
        "ids": short_hash(*sorted(r.id for r in records)), "views": list(views),
        "batch": config.batch, "beams": config.beams or model.config.beams,
        "repetition penalty": model.config.repetition_penalty,
        "max new tokens": model.config.max_new_tokens, "history": config.history,
        "task": config.task, "mixture": trained_on(model, checkpoint)}
    journal = Journal(out.with_suffix(".parts"), settings)
    predictions, missing = evaluate(
        model, records, store, views, config.batch, config.beams, config.history, journal, say)
    if rank == 0:
        write_report(out, predictions, views, missing, settings)         # should the judge fail
        try:
            ask_judge(config, model, predictions, views, out)
        except judge.JudgeError as error:
            raise SystemExit(f"{out} is written, but not judged: {error}") from error
        write_report(out, predictions, views, missing, settings)
        print(report_text(predictions, views, missing, settings))
        print(f"predictions: {out}, report: {out.with_suffix('.json')}")
    journal.remove()
    distributed.shutdown()


def weights_hash(checkpoint):
    """Of the trained parts."""
    files = sorted(checkpoint.rglob("*.safetensors")) if checkpoint else []
    return short_hash(*files) if files else None


def sources_of(model):
    return [getattr(model.config, name) for name in ("whisper", "instructblip", "llm")]


if __name__ == "__main__":
    settings = resolve_config(cli.parse(EvalConfig, __doc__)[0])
    if Path(settings.data) != Path(EvalConfig.data):      # what is missing is said once, before the
        read_manifests(find_manifests(settings.data, settings.tasks))              # processes start
    distributed.launch_local(settings.processes,              # each has its own copy of the weights
                         most=4 if settings.model == "tiny" else 1)
    main(settings, sys.argv[1:])
