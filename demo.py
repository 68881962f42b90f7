"""Answers a question about any video, sound or image file.

     python demo.py                                       a first look: a small clip that is here
     python demo.py clip.mp4 "What happens after the beep?"
     python demo.py photo.jpg "What colour is the ball?" --audio question.wav
     python demo.py clip.mp4 "Describe the video in detail." --start 10 --end 40
     python demo.py clip.mp4 "What happens?" --live       again after each window, as it plays
     python demo.py clip.mp4 "Which sounds are heard?" --checkpoint runs/7b/best
     python demo.py clip.mp4 "Hello?" --model 7b --random-init      does the full size run here?
     python demo.py clip.mp4 "Who speaks?" --picture out.png        and where the queries look
     python demo.py --web                                 the same as a page in the browser"""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch

from baselines.systems import load_system
from data import Sample, clip_from_path
from favor import PRESETS, SOURCES, habits, preset
from runtime import distributed, hub
from runtime.checkpoint import trained_preset
from runtime.log import in_words, peak_memory
from runtime.media import probe
from tools import live, memory, page, picture
from tools.page import contents

EXAMPLE = Path(__file__).parent / "miniature" / "demo.json"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    clip = parser.add_argument_group("clip and question")
    clip.add_argument("clip", nargs="?", help="a video, sound or image file")
    clip.add_argument("question", nargs="?", help="the question about it, in one sentence")
    clip.add_argument("--audio", metavar="FILE",
                      help="sound to go with an image, or in place of a video's own")
    clip.add_argument("--start", type=float, metavar="S", help="second of the file to start at")
    clip.add_argument("--end", type=float, metavar="S", help="second of the file to stop at")
    clip.add_argument("--mask", choices=("audio", "visual", "both"),
                      help="answer without this modality")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="tiny", choices=tuple(PRESETS),
                       help="preset of all sizes (default: tiny)")
    model.add_argument("--checkpoint", default="", metavar="FOLDER",
                       help="checkpoint of train.py (default: runs/<model>/best; for tiny, if "
                            "there is none, the committed one)")
    for part in SOURCES:
        old = ["--instructblip"] * (part == "visual")              # the name that it had before
        model.add_argument(f"--{part}", *old, metavar="SOURCE", help="folder or Hub repository of "
                           f"{part} (default: where the checkpoint says)")
    model.add_argument("--dtype", default="", choices=("bfloat16", "float32"),
                       help="of frozen weights (default: float32 for tiny and the small presets on "
                            "a CPU, else bfloat16)")
    model.add_argument("--merge", action=argparse.BooleanOptionalAction, default=True,
                       help="add LoRA into the LLM's own weights, so that it costs nothing "
                            "(default: on)")
    model.add_argument("--compile", action="store_true", help="torch.compile for each new token, "
                       "on a GPU as a CUDA graph: slow to start, for long answers")
    model.add_argument("--random-init", action="store_true",
                       help="full size with random weights: nothing to download, nonsense to read")
    model.add_argument("--offline", action="store_true",
                       help="take what the Hub's cache has and open no connection")
    answer = parser.add_argument_group("answer")
    answer.add_argument("--beams", type=int, default=0, metavar="N",
                        help="beam search with N beams instead of streaming (default: what the "
                             "checkpoint says)")
    answer.add_argument("--max-new-tokens", type=int, default=0, metavar="N",
                        help="end the answer after N tokens (default: what the checkpoint says)")
    answer.add_argument("--live", action="store_true", help="read the clip at the speed at which "
                        "it plays and answer again after each window, from what has been "
                        "seen so far; greedily; Ctrl-C ends it")
    answer.add_argument("--picture", metavar="FILE",
                        help="also draw where the queries look over frames and sound (.png, .pdf)")
    web = parser.add_argument_group("page in the browser")
    web.add_argument("--web", action="store_true",
                     help="serve a page that asks for clips and questions, on this computer only")
    web.add_argument("--port", type=int, default=page.PORT, metavar="N",
                     help=f"port of the page (default: {page.PORT})")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    if args.clip and not (args.question or "").strip():
        parser.error(f"no question about {args.clip}; give one: demo.py {args.clip} \"What is "
                     "seen?\"")
    if args.web and args.clip or args.picture and not args.clip:
        parser.error("--web asks for clip and question on the page" if args.web else
                     "--picture shows one clip and question; give both")
    if args.random_init and args.checkpoint:
        parser.error("--random-init does not go with --checkpoint")
    if wrong := wrong_values(args):                       # before anything is loaded
        sys.exit(wrong)
    hub.offline(args.offline)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sources = {part: source for part in SOURCES if (source := getattr(args, part))}
    try:
        name = args.model if args.random_init else trained_preset(args.checkpoint, args.model)
        model, folder = load_system(
            "favor", preset(args.model, **sources), args.model, args.checkpoint, sources,
            distributed.precision(args.dtype, name, device, habits(name).dtype_on_cpu)[0],
            device, args.merge, args.compile,
            memory.random_part if args.random_init else None)
        name = folder or "random weights"
        if args.web:
            page.Page(model, str(relative(name)), answer_settings(args)).serve(args.port)
        elif args.clip:
            answer(args, model, name, device)
        else:
            first_look(model, name)
    except (OSError, ValueError) as error:                  # a MediaError is a ValueError
        sys.exit(str(error))


def wrong_values(args):
    """What cannot be meant in these arguments, in a sentence; "" if there is nothing."""
    for flag, path in (("", args.clip), ("--audio ", args.audio)):
        if path and not Path(path).is_file():
            return (f"{flag}{path}: no such file; wanted a video, sound or image file"
                    + (" and not a folder" if Path(path).is_dir() else ""))
    if args.live and (not args.clip or args.beams or args.compile or args.picture):
        return ("--live answers greedily about one clip, without compiled steps; wanted a clip and "
                "a question, and neither --beams nor --compile nor --picture")
    try:
        (args.question or "").encode()
    except UnicodeEncodeError:                              # bytes of a shell that are no UTF-8
        return "the question is not text in UTF-8; set the terminal's encoding to UTF-8"
    start, end = args.start or 0.0, math.inf if args.end is None else args.end
    if not 0 <= start < end or math.isinf(start):
        return (f"--start {start:g} --end {end:g}: wanted seconds of the file, the end after the "
                "start")
    if args.beams < 0 or args.max_new_tokens < 0:
        return (f"--beams {args.beams} --max-new-tokens {args.max_new_tokens}: wanted 1 or more, "
                "or 0 for what the checkpoint says")
    if args.picture and not args.picture.lower().endswith(picture.FORMATS):
        return f"--picture {args.picture}: wanted a name that ends in {', '.join(picture.FORMATS)}"
    if args.picture and not Path(args.picture).absolute().parent.is_dir():
        return f"--picture {args.picture}: there is no such folder"
    if not 0 < args.port < 65536:
        return f"--port {args.port}: wanted a number from 1 to 65535"
    return args.web and page.missing() or args.picture and picture.missing() or ""


def answer_settings(args):
    """The settings of Favor.generate that the command line gives."""
    given = {"max_new_tokens": args.max_new_tokens, "num_beams": args.beams}
    return {name: value for name, value in given.items() if value}


def answer(args, model, name, device):
    """Reads the clip and prints the answer, as it is generated unless beams are searched."""
    read = partial(clip_from_path, args.clip, args.audio, args.start, **model.clip_options())
    clip = read(end=args.end)
    left = {"visual": clip.audio, "audio": clip.frames}.get(args.mask, True)
    if left is None:
        missing = "sound" if args.mask == "visual" else "picture"
        raise ValueError(f"{args.clip} has no {missing}, so --mask {args.mask} leaves nothing of "
                         "it; --mask both asks for an answer without the clip")
    print(f"[{name}: {contents(clip)}]", file=sys.stderr)
    settings, started = answer_settings(args), time.time()
    if args.live:
        live.play(live.Live(model, args.question, mask=args.mask), clip, read, args.start or 0.0,
                  **settings)
    else:
        sample = model.encode_sample(Sample(args.question, clip=clip, mask=args.mask))
        beams = (args.beams or model.config.beams) > 1                 # which cannot be streamed
        text, = model.generate([sample], **settings, stream=None if beams else (
            lambda text: print(text, end="", flush=True)))
        print(text if beams else "")
    if args.picture:
        inside = picture.look_inside(model, sample, clip, args.max_new_tokens or None)
        picture.save(picture.draw(inside, title=f"{args.question} → {text}"), args.picture)
        print(f"[where the queries look: {args.picture}]", file=sys.stderr)
    if args.random_init:
        peak = in_words(peak_memory(device))
        print(f"[{time.time() - started:.1f} s, peak memory {peak}]", file=sys.stderr)


def relative(path):
    """A path below the working folder without that folder; others as they are."""
    inside = Path(path).is_relative_to(Path.cwd())
    return Path(path).relative_to(Path.cwd()) if inside else path


def first_look(model, name):
    """A question about the clip that comes with the code, with and without each modality."""
    example = json.loads(EXAMPLE.read_text("utf-8"))
    path = EXAMPLE.parent / example["clip"]
    clip = clip_from_path(path, **model.clip_options())
    print(f"clip                 {relative(path)} ({probe(path).seconds:g} s: {contents(clip)})\n"
          f"question             {example['question']}\n"
          f"right answer         {example['answer']}\n")
    for view, mask in (("picture and sound", None), ("without the sound", "audio"),
                       ("without the picture", "visual")):
        print(f"{view:<20} {model.answer(clip, example['question'], mask=mask)}", flush=True)
    print(f"\nThe answers are those of {relative(name)}.  Next:\n"
          '  python demo.py YOUR_CLIP "your question"           any video, sound or image file\n'
          "  python eval.py --task videoqa --limit 20           scores one task\n"
          "  python train.py                                    trains such a model, in minutes")


if __name__ == "__main__":
    main()
