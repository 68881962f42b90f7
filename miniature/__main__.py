"""Generates the miniature benchmark and what belongs to it.

     python -m miniature make        writes the clips into media/miniature (2-3 minutes on 2 cores)
     python -m miniature pretrain    trains the three frozen parts again (about an hour on 2 cores)
     python -m miniature sheet       draws one clip of each task with its questions (extra `plot`)
     python -m miniature voices      renders the spoken words again (needs espeak-ng)
     python -m miniature demo        writes the clip again that demo.py asks about

`make` writes nothing anew that is there already."""

import argparse
import sys
from pathlib import Path

from miniature.scenes import TASKS

HERE = Path(__file__).parent


def arguments():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m miniature", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        return commands.add_parser(name, help=text, allow_abbrev=False,
                                   description=text[0].upper() + text[1:] + ".")
    add = command("make", "write the clips and their manifests").add_argument_group(
        "data").add_argument
    add("--out", default="media/miniature", metavar="FOLDER",
        help="folder of the clips and manifests (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N",
        help="seed of the clips; the same seed gives the same clips (default: 0)")
    add("--scale", type=float, default=1.0, metavar="FACTOR",
        help="factor on the number of training clips (default: 1)")
    add("--split", choices=("train", "test"), nargs="+", default=("train", "test"),
        help="splits to make (default: both)")
    add("--tasks", choices=TASKS, nargs="+", metavar="TASK",
        help=f"tasks whose clips are made, some of {', '.join(TASKS)} (default: all)")
    add("--limit", type=int, default=0, metavar="QUESTIONS",
        help="questions of each task, from the first on, whose clips are made; 0 makes the clips "
        "of all (default: 0)")
    command("pretrain", "train the frozen parts again").add_argument_group("model").add_argument(
        "parts", nargs="*", metavar="PART",
        help="parts to train, some of llama, whisper, instructblip and projection; they are "
        "trained in the order given (default: all four)")
    command("sheet", "draw docs/miniature.png, one clip of each task with its questions")
    command("voices", "render the spoken words in miniature/weights/voices")
    command("demo", "write the clip that demo.py asks about, miniature/demo.mp4 and demo.json")
    return parser


def main(argv=None):
    """Runs one subcommand. What only one of them needs is imported only there."""
    args = arguments().parse_args(argv)
    if args.command == "make":
        from miniature.generate import make
        made = make(args.out, args.seed, args.scale, splits=args.split, tasks=args.tasks,
                    limit=args.limit)
        print(*made.values(), sep="\n")
    elif args.command == "pretrain":
        from miniature.pretrain import pretrain
        pretrain(args.parts)
    elif args.command == "sheet":
        from miniature.sheet import draw_sheet
        draw_sheet(HERE.parent / "docs" / "miniature.png")
    elif args.command == "voices":
        from miniature.voices import make_voices
        make_voices()
    else:
        from miniature.generate import demo
        print(*demo(HERE), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
