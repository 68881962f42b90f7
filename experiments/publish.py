"""Brings runs of ablate.py into the repository: python -m experiments.publish runs/ablate

     OUT/results.jsonl --> docs/ablate/results.jsonl: a run (a system's seed, all its rounds) that
                           OUT has takes the place of the one that was there; what OUT has not stays
     OUT/inside/*.npz  --> docs/ablate/inside
     all of them --> results.md, the figures, and tables_of(results) in the README, each in the
                     place of the old one
Before that it says whether OUT's means are those that were there.  What the README says in words
about them must be read again afterwards."""

import re
import shutil
import sys
from pathlib import Path

from aveb.tasks import ERROR_RATES
from experiments import figures
from experiments import tables as ablation
from experiments.ablate import COMMITTED, in_order, jsonl

ROOT = Path(__file__).resolve().parent.parent

SIMULTANEOUS = (("avsd", ""), ("avsd", "at"), ("avsd", "after"), ("avssd", ""), ("avm", ""),
                ("avm", "video"), ("avm", "image"), ("avsr", ""), ("ic", ""), ("ocr", ""),
                ("vqa", ""), ("videoqa", ""))


def synchronisation_table(stage):
    """With and without Eq. (1), the seeds that both have, one by one."""
    def told(values):
        return f"{sum(values) / len(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"

    lines, seeds = [], []
    for task, part in SIMULTANEOUS:
        with_it, without = (stage.by_seed(s, task, part) for s in ("complete", "no-sync"))
        seeds = sorted({*with_it} & {*without})
        name = task + (f": {part}" if part else "") + " WER ↓" * (task in ERROR_RATES)
        lines.append([name, told([with_it[seed] for seed in seeds]),
                      told([without[seed] for seed in seeds]),
                      stage.against("no-sync", task, part)])
    return ablation.markdown(["task", f"with (seeds {', '.join(map(str, seeds))})", "without",
                            "difference"], lines)


def tables_of(results):
    """Those that the README shows; how synchronisation does, of the first round only."""
    return [synchronisation_table(results.first), ablation.claim_table(results),
            *map(ablation.score_table, results.stages)]


def put(text, table):
    """The text with the table in the place of the one that starts alike (its first head,
    which in those of scores has the number of steps, and a word)."""
    start = re.escape(re.match(r"\| [^|]*\| [\w-]+", table)[0])
    old = re.search(rf"^{start}.*\n(\|.*\n)*", text, re.MULTILINE)
    if old is None:
        raise SystemExit(f"README.md has no table that starts with {table.splitlines()[0][:60]!r}")
    return text[:old.start()] + table + "\n" + text[old.end():]


def merged(rows, new):
    """rows without the runs that `new` has, and new."""
    again = {(row["system"], row["seed"]) for row in new}
    return in_order([row for row in rows if (row["system"], row["seed"]) not in again] + new)


def main(out):
    before, new = ablation.Results.read(COMMITTED), ablation.Results.read(out)
    print(ablation.reproduction_table(new, before))
    results = ablation.Results(merged(before.rows, new.rows))
    (COMMITTED / "results.jsonl").write_text(jsonl(results.rows))
    (COMMITTED / "results.md").write_text(ablation.tables(results) + "\n")
    for file in (out / "inside").glob("*.npz"):
        shutil.copy(file, COMMITTED / "inside")
    figures.draw_all(COMMITTED)
    text = (ROOT / "README.md").read_text()
    for table in tables_of(results):
        text = put(text, table)
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
