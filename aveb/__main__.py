"""Spreadsheets, and official downloads of AVEB's sets -> manifests for train.py and eval.py.

     python -m aveb table my/questions.csv --media my/clips --out my/train.jsonl       your own data
     python -m aveb list                                       the sets, their splits and sources
     python -m aveb prepare librispeech --root /data/LibriSpeech             its test-clean split
     python -m aveb prepare nextqa --root /data/nextqa --media /data/NExTVideo --split train
     python -m aveb prepare gqa --root /data/gqa --sample 1000 --seed 0      a thousand of them
     python -m aveb check nextqa-train.jsonl                   decode every clip of a manifest
     python -m aveb subset gqa-testdev_balanced.jsonl --n 1000 --seed 0

table reads a spreadsheet saved as .csv, writes a manifest and checks it (docs/own_data.md).
prepare reads the official annotation files below --root, looks for each clip there and in --media,
reports how many it found, writes <set>-<split>.jsonl and checks it; nothing is fetched.  A check
that was cut off goes on where it stopped; the exit status is 1 if files cannot be decoded, or if
rows of the spreadsheet were left out.  A subset depends on the seed and the ids alone: the same
hash of ids means the same questions."""

import runtime  # noqa: F401  before torch: it sets how threads wait

# isort: split


import argparse
import sys
from pathlib import Path

import data
from aveb.prepare import check, ids_hash, prepare, subset
from aveb.sets.registry import SETS
from aveb.spreadsheet import COLUMNS, from_table


def list_sets(log=print):
    for name, one in SETS.items():
        log(f"{name:12} {one.task:8} {', '.join(one.splits)}\n{'':12} scored by "
            f"{', '.join(one.scored_by)}; from {one.source}")


def arguments():
    parser = argparse.ArgumentParser("python -m aveb", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text):
        new = commands.add_parser(name, help=text, allow_abbrev=False,
                                  description=text[0].upper() + text[1:] + ".")
        return new, new.add_argument_group("data")
    table_command, add = command("table", "turn a spreadsheet of questions into manifests")
    _add_table(add.add_argument)
    command("list", "print each set's task, splits, metrics and source")
    prepare_command, add = command("prepare", "turn an official download into a manifest")
    _add_prepare(add.add_argument)
    check_command, add = command("check", "decode all clips of a manifest and list the broken ones")
    add.add_argument("manifest", metavar="MANIFEST", help="manifest (.jsonl) to check")
    _, add = command("subset", "sample a part of a manifest")
    add.add_argument("manifest", metavar="MANIFEST", help="manifest (.jsonl) to sample from")
    add.add_argument("--n", type=int, required=True, metavar="QUESTIONS",
                     help="number of questions to sample, or of whole dialogues")
    add.add_argument("--seed", type=int, default=0, metavar="N",
                     help="seed of the sample; the same seed samples the same questions "
                     "(default: 0)")
    add.add_argument("--out", metavar="FILE",
                     help="manifest to write (default: <manifest>-<QUESTIONS>-<N>.jsonl)")
    for parent in (table_command, prepare_command, check_command):
        parent.add_argument_group("distributed").add_argument(
            "--workers", type=int, metavar="N",
            help="processes that decode clips (default: one per core)")
    return parser


def _add_table(add):
    """The flags of `table`."""
    add("table", metavar="TABLE", help="spreadsheet saved as .csv or .tsv; its first row names the "
        f"columns: {', '.join(COLUMNS)}")
    add("--media", action="append", default=[], metavar="FOLDER",
        help="folder of the clips, which may lie in folders below it; may be given several times "
        "(default: the spreadsheet's folder)")
    add("--out", required=True, metavar="FILE", help="manifest to write")
    add("--test", metavar="FILE",
        help="second manifest, for the questions about a part of the clips; none of these clips is "
        "in the first one (default: all questions are in --out)")
    add("--test-share", type=float, default=0.2, metavar="SHARE",
        help="share of the clips that --test gets (default: 0.2)")
    add("--check", action=argparse.BooleanOptionalAction, default=True,
        help="decode every clip afterwards and list the broken ones (default: on)")


def _add_prepare(add):
    """The flags of `prepare`."""
    add("set", choices=SETS, metavar="SET", help=f"data set to prepare: {', '.join(SETS)}")
    add("--root", required=True, metavar="FOLDER",
        help="folder of the annotation files, and mostly of the media")
    add("--media", action="append", default=[], metavar="FOLDER",
        help="another folder with media; may be given several times")
    add("--split", metavar="SPLIT",
        help="split to prepare, one of those that `list` prints (default: the one that the paper "
        "scores, or trains on)")
    add("--out", metavar="FILE", help="manifest to write (default: <set>-<split>.jsonl)")
    add("--sample", type=int, metavar="QUESTIONS",
        help="number of questions to sample, or of whole dialogues (default: all)")
    add("--hours", type=float, metavar="HOURS",
        help="hours of clips to sample; the paper takes 600 of ego4d (default: all)")
    add("--seed", type=int, default=0, metavar="N",
        help="seed of the sample; the same seed samples the same questions (default: 0)")
    add("--merge", action=argparse.BooleanOptionalAction,
        help="join sentences to clips of about 20 s, as the authors did; how2 only (default: on)")
    add("--window", type=float, metavar="SECONDS",
        help="length of the longest clip in seconds; ego4d only (default: 30)")
    add("--check", action=argparse.BooleanOptionalAction, default=True,
        help="decode every clip afterwards and list the broken ones (default: on)")


def options_of(args, parser):
    """The given options of the set's reader; the program ends if it has no such option."""
    options = {"merge": args.merge, "window": args.window}
    options = {key: value for key, value in options.items() if value is not None}
    if unknown := sorted(set(options) - set(SETS[args.set].options)):
        parser.error(f"--{unknown[0]} means nothing to {args.set}")
    return options


def write_subset(args):
    records = subset(data.read_manifest(args.manifest), args.n, args.seed)
    path = Path(args.manifest)
    out = args.out or path.with_name(f"{path.stem}-{args.n}-{args.seed}.jsonl")
    data.write_manifest(out, records)
    print(f"{out}: {len(records)} records, ids {ids_hash(records)}")


def main(argv=None):
    """-> exit status: 1 if clips cannot be decoded or rows of a spreadsheet were left out, 2 if
    files are missing or unusable."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        if args.command == "list":
            list_sets()
        elif args.command == "subset":
            write_subset(args)
        elif args.command == "check":
            return int(check(args.manifest, args.workers) > 0)
        elif args.command == "table":
            manifests, left_out = from_table(args.table, args.out, args.media, args.test,
                                             args.test_share)
            broken = [args.check and check(name, args.workers) for name in manifests]
            return int(left_out + sum(broken) > 0)
        else:
            manifest = prepare(args.set, args.root, args.split, args.media, args.out, args.sample,
                               args.hours, args.seed, **options_of(args, parser))
            return int(args.check and check(manifest, args.workers) > 0)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
