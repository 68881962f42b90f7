"""Scores a checkpoint on AVEB's tasks.

     python eval.py --task videoqa                   one task of the miniature
     python eval.py --task all                       the table of all eleven tasks
     python eval.py --task avm --checkpoint runs/tiny/best --data my/test.jsonl
     python eval.py --model 7b --task videoqa        the checkpoint runs/7b/best, on the same clips
     python eval.py --model 13b --system instructblip --data my/test.jsonl        a baseline
     python eval.py --model 13b --system whisper --beams 5 --data my/test.jsonl   another one
     python eval.py --model 7b --system video-llama --data my/test.jsonl          the third

Each question is answered four times: as it is, with the sound masked, with the picture masked, and
blind (both masked), always by the same trained model.  If the score of a task falls without a
modality, the task needs it.  The baselines use public weights without training.  Accuracy is exact
match of the whole answer; asr, ac and avsr are word error rates.  The predictions are written as
JSONL, with a table and a JSON report beside them."""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import lora
from aveb import judge, metrics
from aveb.answers import evaluate, find_manifests, read_manifests, views_of
from aveb.journal import PARTS, Journal, answer_settings
from aveb.tables import report_text, write_report
from aveb.tasks import TASKS
from baselines.systems import SYSTEMS, load_system, system_preset
from baselines.video_llama import VideoLlama
from favor import habits
from miniature import generate, scenes
from runtime import cli, distributed, hub
from runtime.checkpoint import (
    COMMITTED,
    disk_full,
    find_checkpoint,
    lock,
    short_hash,
    trained_preset,
    weights_hash,
)
from runtime.distributed import log
from runtime.feature_cache import cache_features
from runtime.hub import read_json
from tools import memory


@dataclass(frozen=True)
class EvalConfig:
    # -- data
    data: str = "media/miniature"  # <path> manifest (.jsonl), or folder with test.jsonl or one
                                   # TASK.jsonl per task; the miniature's clips are made if needed
    task: str = "all"  # <tasks> tasks to score: all, or some of asr, ac, ic, ocr, vqa, videoqa,
                       # avsr, avsd, isqa, avssd, avm, favd and valor with commas between them
    limit: int = 0  # <questions> questions to answer of each task, at most; 0 answers all
    cache_features: bool | None = None  # encode each clip once and store its features on disk
                                        # (default: off for 7b and 13b, else on)
    features: str = ""  # <folder> folder of the feature cache (default: features/ beside the
                        # manifest)
    # -- model
    model: Literal["tiny", "small-laptop", "small", "7b", "13b"] = "tiny"  # preset of all sizes;
                                                              # a --checkpoint records its own
    system: Literal["favor", "instructblip", "whisper", "video-llama"] = "favor"  # system to
                                               # score: FAVOR, or one of the paper's baselines
    checkpoint: str = ""  # <folder> checkpoint of train.py (default: runs/<model>/best; for tiny,
                          # if there is none, the committed one)
    whisper: str | None = None  # <source> folder or Hub repository of Whisper, such as
                                # openai/whisper-large-v2 (default: where the checkpoint says, or
                                # else the preset)
    visual: str | None = None  # <source> folder or Hub repository of the visual encoder: an
                               # InstructBLIP, SigLIP or DINOv2 (default: as for --whisper)
    llm: str | None = None  # <source> folder or Hub repository of a LLaMA, Qwen2.5 or Qwen3, or of
                            # an InstructBLIP that holds one (default: as for --whisper)
    video_llama: str | None = None  # <folder> folder with the rest of Video-LLaMA, which
                                    # tools.convert wrote (default: video-llama)
    random_init: bool = False  # use random weights of the full size, without a download, to see
                               # whether a model fits into memory and how fast it answers
    dry_run: bool = False  # print parameters and the memory of answers to --batch questions about
                           # clips of 30 s, and load nothing
    offline: bool = False  # take what the Hub's cache has and open no connection
    dtype: Literal["", "bfloat16", "float32"] = ""  # number format of the frozen weights (default:
                                                    # float32 on a CPU for tiny and the small
                                                    # presets, else bfloat16)
    merge: bool = True  # add LoRA into the LLM's own weights, so that it costs no time
    compile: bool = False  # torch.compile for each new token, on a GPU as a CUDA graph: slow to
                           # start, for long answers; beam search does not use it
    # -- method
    views: tuple[Literal["both", "audio only", "visual only", "blind"], ...] = ()  # <view> views in
                               # which each question is answered: both, "audio only", "visual only",
                               # blind (default: all four; for a baseline only both)
    mask: Literal["", "audio", "visual"] = ""  # answer each question once, without this modality
    history: Literal["gold", "none", "model"] = "gold"  # earlier turns of a dialogue that the model
                               # reads: the right answers, no turns, or its own answers
    beams: int = 0  # <beams> size of the beam search: 1 is greedy, 0 takes the checkpoint's
    greedy: bool = False  # video-llama takes the likeliest token; off: it samples, as published
    seed: int = 0  # seed with which video-llama samples its answers
    # -- judge
    judge: str = ""  # <way> way to judge avsd and avssd: url (ask a server), self (ask this model),
                     # none (only write the prompts) or file:VERDICTS (default: url with
                     # --judge-url, else nobody is asked)
    judge_url: str = ""  # <address> address of an OpenAI-compatible server; its key comes from the
                         # environment variable FAVOR_JUDGE_KEY
    judge_model: str = ""  # <name> name of the judge, by which the server knows it; it is reported
                           # beside the score
    judge_budget: int = 10_000  # <requests> requests that this run may send to the judge, at most
    # -- logging
    out: str = ""  # <file> file of the predictions (default: predictions.jsonl in the checkpoint's
                   # folder; for the committed checkpoint, in runs/tiny-committed)
    # -- distributed
    batch: int = 128  # <questions> questions that a process answers at a time
    processes: int = 0  # <n> processes to start on a CPU without torchrun; 0 starts one per core,
                        # four at most for tiny, two for the small presets and one for the others

    ALIASES = {"keep-features": "cache_features",             # the names that flags had before
               "instructblip": "visual"}

    def __post_init__(self):
        cli.check_choices(self)
        for name, least in (("limit", 0), ("beams", 0), ("batch", 1), ("processes", 0),
                            ("judge_budget", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}; wanted "
                                 f"{least} or more")
        if self.judge not in judge.WAYS and not self.judge.startswith("file:"):
            raise ValueError(f"--judge {self.judge}; wanted url, self, none or file:VERDICTS")
        if (self.random_init or self.dry_run) and (self.system == "whisper" or self.checkpoint):
            raise ValueError(f"--{'random-init' if self.random_init else 'dry-run'} goes with "
                             "neither --system whisper nor --checkpoint")
        if self.system == "video-llama":
            odd = [flag for flag, given in (
                ("--checkpoint", self.checkpoint), ("--whisper", self.whisper),
                ("--beams", self.beams > 1), ("--compile", self.compile)) if given]
        else:
            odd = [flag for flag, given in (("--video-llama", self.video_llama), (
                "--greedy", self.greedy), ("--seed", self.seed)) if given]
        if odd:
            raise ValueError(f"{', '.join(odd)} does not go with --system {self.system}")
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
        """{part: where it is}, as far as the command line names it."""
        named = {n: getattr(self, n) for n in PARTS}
        if self.system == "video-llama":                   # what hears, and what sees over time
            named["whisper"] = self.video_llama
        return {name: source for name, source in named.items() if source}


def resolve_config(config):
    """The same with the preset that its checkpoint was trained with.  SystemExit if a checkpoint is
    needed and there is none, or it is damaged, or the judge cannot be asked."""
    if config.checkpoint or config.system == "favor" and not (
            config.random_init or config.dry_run):
        find_checkpoint(config.checkpoint, config.model)
    judge.check(config)
    try:
        if config.system == "video-llama" and not (config.random_init or config.dry_run):
            VideoLlama.check_parts(system_preset(config.system, config.model, config.sources))
        return dataclasses.replace(config, model=trained_preset(config.checkpoint, config.model))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


# ---------------------------------------------------------------- questions
def find_questions(config):
    """-> (manifests, the records to answer).  Of the miniature only the clips that these questions
    need are made.  SystemExit if there is nothing to answer, or no reference to score against."""
    every = config.task == "all" and not SYSTEMS[config.system].tasks
    with distributed.main_process_first():
        manifests = make_miniature(config, every) or find_manifests(config.data, config.tasks)
    name, count, records = ", ".join(map(str, manifests)), {}, []
    for record in read_manifests(manifests, metrics.unscorable):
        if every or record.task in config.tasks:
            count[record.task] = count.get(record.task, 0) + 1
            if not config.limit or count[record.task] <= config.limit:
                records.append(record)
    if not records:
        raise SystemExit(f"{name}: no questions of task {config.task}")
    if (config.judge or config.judge_url) and not any(map(judge.is_judged, records)):
        log(f'{name}: no "judged" in the meta.metrics of these questions: the judge is not asked')
    return manifests, records


def make_miniature(config, every):
    """[its manifest], if --data is the miniature's folder; a user's own
    test.jsonl is kept, and then the answer is None."""
    folder = Path(config.data)
    foreign = (folder / "test.jsonl").exists() and not (folder / "test.made.json").exists()
    tasks = None if every else tuple(task for task in config.tasks if task in scenes.TASKS)
    if folder != Path(EvalConfig.data) or foreign or tasks == ():
        return None
    made = generate.make(folder, splits=("test",), tasks=tasks, limit=config.limit)
    return [Path(os.path.relpath(made["test"]))]


# ---------------------------------------------------------------- the run
def dry_run(config):
    """Prints what each part takes, and the memory of answers, without weights."""
    dtype, _, why = distributed.precision(config.dtype, config.model, torch.device("cpu"),
                                          habits(config.model).dtype_on_cpu)
    try:
        model = SYSTEMS[config.system].from_config(
            system_preset(config.system, config.model, config.sources), dtype, "meta",
            load=memory.random_part)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(f"--model {config.model} --system {config.system}, weights {why}")
    print(memory.table(model))
    print(f"\n{config.batch} questions about clips of 30 s at a time (--batch):")
    print(memory.memory_plan(model, memory.empty_sample(model, 30.0), config.batch))


def trained_on(model, checkpoint):
    """{data set: {task: samples}} that the checkpoint was trained on; {} for public weights as they
    are, None if it is unknown."""
    if checkpoint is None:
        return {} if model.system != "favor" else None
    return read_json(checkpoint / "favor.json").get("mixture")


def caches(config):
    """Whether the answers come from cached features, which are rounded to fp16."""
    cached = config.cache_features
    if cached is None:      # video-llama: 40 vectors serve all questions about a file
        cached = habits(config.model).cache_features or (
            config.system == "video-llama" and not config.random_init)
    return config.system != "whisper" and cached


def open_cache(config, model, manifests, records):
    """The features of all records: encoded by the main process, read by all."""
    try:
        with distributed.main_process_first():
            return cache_features(
                model, records, config.features or manifests[0].parent / "features", log=log)
    except ValueError as error:                              # no clip can be read
        raise SystemExit(str(error)) from error


def describe(config, model, checkpoint, manifest, records, views, dtype):
    """The settings of this run, as they stand in its journal and in its report."""
    return {
        "system": config.system, "model": config.model, "checkpoint": str(checkpoint),
        "weights": weights_hash(checkpoint),
        "sources": [str(getattr(model.config, name)) for name in PARTS], "dtype": dtype,
        "compiled": config.compile, "merged": config.merge, "cached features": caches(config),
        "manifest": manifest, "questions": len(records),
        "ids": short_hash(*sorted(r.id for r in records)), "views": list(views),
        "batch": config.batch, "beams": config.beams or model.config.beams,
        "repetition penalty": model.config.repetition_penalty,
        "max new tokens": model.config.max_new_tokens, "history": config.history,
        **({"decoding": model.decoding} if config.system == "video-llama" else {}),
        "task": config.task, "mixture": trained_on(model, checkpoint),
        **answer_settings(model, records)}


def output_file(config, checkpoint):
    """Where the predictions go: --out, or the checkpoint's folder, but never the committed one."""
    if config.out:
        return Path(config.out)
    if checkpoint is None:
        return Path("runs") / f"{config.model}-{config.system}" / "predictions.jsonl"
    committed = checkpoint.resolve() == COMMITTED.resolve()
    return (Path("runs/tiny-committed") if committed else checkpoint) / "predictions.jsonl"


def save_report(out, *report):
    """Writes predictions, table and report.  SystemExit when the disk is full: the answers are kept
    in the journal, so the same command continues from there."""
    try:
        write_report(out, *report)
    except OSError as error:
        if not disk_full(error):
            raise
        raise SystemExit(f"{out} could not be saved, the disk was full; make room and run the same "
                         "command again") from error


@distributed.said_once()
def main(config):
    """Writes the predictions, unless another program writes them already."""
    config = resolve_config(config)
    _, world, device = distributed.init_distributed()
    if world > 1:
        torch.set_num_threads(max(1, cli.cores() // world))
    needed = config.checkpoint or config.system == "favor" and not config.random_init
    out = output_file(config, find_checkpoint(config.checkpoint, config.model) if needed else None)
    if out.suffix in (".json", ".md", ".parts", ".lock") or any(
            path.is_dir() for path in (out, out.with_suffix(".json"), out.with_suffix(".md"))):
        raise SystemExit(f"--out {out}: wanted a file such as predictions.jsonl; the report gets "
                         "the same name with other endings")
    # A lock of its own: while train.py holds its folder, best/ can be scored.
    with lock(out.with_suffix(".lock"), log):
        run(config, out, device)


def run(config, out, device):
    """Answers the questions, scores the answers and writes both to `out`."""
    manifests, records = find_questions(config)
    dtype, _, why = distributed.precision(config.dtype, config.model, device,
                                          habits(config.model).dtype_on_cpu)
    hub.offline(config.offline)
    try:
        model, checkpoint = load_system(
            config.system, system_preset(config.system, config.model, config.sources),
            config.model, config.checkpoint, config.sources, dtype, device, merge=False,
            compile=config.compile, load=memory.random_part if config.random_init else None)
    except (OSError, ValueError) as error:         # a part is missing, refused or does not fit
        raise SystemExit(str(error)) from error
    if config.system == "video-llama":
        model.greedy, model.seed = config.greedy, config.seed
    manifest = ", ".join(map(str, manifests))
    log(f"{checkpoint or config.system} on {manifest}, {len(records)} questions, {device.type}, "
        f"weights {why}")
    views = views_of(config.system, config.mask, config.views)
    settings = describe(config, model, checkpoint, manifest, records, views, why.split()[0])
    settings["device"] = device.type
    journal = Journal(out.with_suffix(".parts"), settings)
    if config.merge:
        lora.merge(model, reversible=False)
    cache = open_cache(config, model, manifests, records) if caches(config) else None
    predictions, missing = evaluate(
        model, records, cache, views, config.batch, config.beams, config.history, journal, log)
    if distributed.rank() == 0:
        if weights_hash(checkpoint) != settings["weights"]:
            log(f"{checkpoint} holds other weights than when this began, perhaps train.py goes on: "
                f"the answers are those of the weights {settings['weights']}")
        save_report(out, predictions, views, missing, settings)          # in case the judge fails
        try:
            judge.ask(config, model, predictions, views, out, log)
        except judge.JudgeError as error:
            raise SystemExit(f"{out} is written, but not judged: {error}") from error
        save_report(out, predictions, views, missing, settings)
        print(report_text(predictions, views, missing, settings))
        print(f"predictions: {out}, report: {out.with_suffix('.json')}")
    journal.remove()
    distributed.shutdown()


if __name__ == "__main__":
    settings = cli.parse(EvalConfig, __doc__)[0]
    if settings.dry_run:
        sys.exit(dry_run(settings))
    with distributed.said_once():                        # one error, before the processes start
        settings = resolve_config(settings)
        if Path(settings.data) != Path(EvalConfig.data):
            read_manifests(find_manifests(settings.data, settings.tasks),
                           metrics.unscorable)
    distributed.launch_local(settings.processes,              # each has its own copy of the weights
                             most=habits(settings.model).processes)
    main(settings)
