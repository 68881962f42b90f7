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

HERE = Path(__file__).parent


def main(argv=None):
    """Runs one subcommand. What only one of them needs is imported only there."""
    formatter = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m miniature", description=__doc__, **formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the clips and their manifests")
    make.add_argument("--out", default="media/miniature", help="folder (default: %(default)s)")
    make.add_argument("--seed", type=int, default=0, help="the same seed gives the same clips")
    make.add_argument("--scale", type=float, default=1.0,
                      help="factor on the number of training clips (default: 1)")
    make.add_argument("--split", choices=("train", "test"), nargs="+", default=("train", "test"),
                      help="which splits to make (default: both)")
    make.add_argument("--tasks", nargs="+", help="only the clips of these tasks, such as avsd avm")
    make.add_argument("--limit", type=int, default=0,
                      help="only the clips of the first LIMIT questions of each task (0: all)")
    pretrain = commands.add_parser("pretrain", help="train the frozen parts again")
    pretrain.add_argument("parts", nargs="*",
                          help="llama, whisper, instructblip, projection (default: all)")
    commands.add_parser("sheet", help="draw docs/miniature.png")
    commands.add_parser("voices", help="render weights/voices")
    commands.add_parser("demo", help="write miniature/demo.mp4 and demo.json")
    args = parser.parse_args(argv)
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
