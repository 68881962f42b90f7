"""Merges finished runs of experiments/ablate.py into docs/.

     python -m experiments.publish runs/ablate     merges these runs into docs/, writes the page
     python -m experiments.publish                 writes the page and results.md again

     OUT/results.jsonl --> docs/ablate/results.jsonl: a run of OUT (a system's seed, all its stages)
                           replaces the one that was there; other runs stay
     OUT/inside/*.npz  --> docs/ablate/inside
     all results       --> docs/ablate/results.md, the figures, docs/ablations.md (page.py)
It first prints whether OUT's means agree with those that were there. The conclusions on the page
must be read again afterwards; its numbers are always those of the results."""

import argparse
import shutil
from pathlib import Path

from experiments import figures, tables
from experiments.ablate import COMMITTED, in_order, jsonl
from experiments.page import page
from experiments.tables import Results
from runtime.hub import write_text

PAGE = COMMITTED.parent / "ablations.md"


def merged(rows, new):
    """`rows` without the runs that `new` has, and `new`."""
    again = {(row["system"], row["seed"]) for row in new}
    return in_order([row for row in rows if (row["system"], row["seed"]) not in again] + new)


def take_over(out):
    """Merges the results and figures of the folder `out` into docs/ablate."""
    before, new = Results.read(COMMITTED), Results.read(out)
    print(tables.reproduction_table(new, before))
    write_text(COMMITTED / "results.jsonl", jsonl(merged(before.rows, new.rows)))
    for file in (out / "inside").glob("*.npz"):
        shutil.copy(file, COMMITTED / "inside")
    figures.draw_all(COMMITTED)


def write_pages():
    """Writes docs/ablate/results.md and docs/ablations.md from docs/ablate/results.jsonl."""
    results = Results.read(COMMITTED)
    write_text(COMMITTED / "results.md", tables.tables(results) + "\n")
    write_text(PAGE, page(results))


def main(argv=None):
    """Takes over the folder that the command line names, if it names one, and writes the pages."""
    parser = argparse.ArgumentParser("python -m experiments.publish", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument_group("data").add_argument(
        "out", metavar="OUT", nargs="?", type=Path,
        help="folder of finished runs to take over, such as runs/ablate (default: none, only the "
        "pages are written again)")
    out = parser.parse_args(argv).out
    if out:
        take_over(out)
    write_pages()
    print(PAGE)


if __name__ == "__main__":
    main()
