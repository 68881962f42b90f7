"""Brings runs of ablate.py into the repository: python docs/publish_ablation.py runs/ablate

     OUT/results.jsonl --> docs/<name of OUT>, with results.md;
     of runs/ablate also inside/*.npz, with the figures drawn anew
     all docs/ablate*/results.jsonl --> docs/ablate/learning.png
     tables_of(results) --> README.md, each in the place of the old one
What the README says in words about them must be read again afterwards."""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ablate_tables as ablation  # noqa: E402
import figures  # noqa: E402
from ablate import AblateConfig  # noqa: E402
from metrics import ERROR_RATES  # noqa: E402

SIMULTANEOUS = (("avsd", ""), ("avsd", "at"), ("avsd", "after"), ("avssd", ""), ("avm", ""),
                ("avm", "video"), ("avm", "image"), ("avsr", ""), ("ic", ""), ("ocr", ""),
                ("vqa", ""), ("videoqa", ""))


def synchronisation_table(results):
    """With and without Eq. (1), the seeds that both have, one by one."""
    def told(values):
        return f"{sum(values) / len(values):.1f} ({', '.join(f'{v:.1f}' for v in values)})"

    lines, seeds = [], []
    for task, part in SIMULTANEOUS:
        with_it, without = (results.by_seed(s, task, part) for s in ("complete", "no-sync"))
        seeds = sorted({*with_it} & {*without})
        name = task + (f": {part}" if part else "") + " WER ↓" * (task in ERROR_RATES)
        lines.append([name, told([with_it[seed] for seed in seeds]),
                      told([without[seed] for seed in seeds]),
                      results.against("no-sync", task, part)])
    return ablation.markdown(["task", f"with (seeds {', '.join(map(str, seeds))})", "without",
                            "difference"], lines)


def tables_of(results):
    """Those that the README shows; how synchronisation does, of the first results only."""
    shown = [ablation.claim_table(results), ablation.score_table(results)]
    first = results.steps == AblateConfig.steps
    return shown + [synchronisation_table(results)] * first


def put(text, table):
    """The text with the table in the place of the one that starts alike (its first head, which
    says how many steps, and a word)."""
    start = re.escape(re.match(r"\| [^|]*\| [\w-]+", table)[0])
    old = re.search(rf"^{start}.*\n(\|.*\n)*", text, re.MULTILINE)
    if old is None:
        raise SystemExit(f"README.md has no table that starts with {table.splitlines()[0][:60]!r}")
    return text[:old.start()] + table + "\n" + text[old.end():]


def main(out):
    folder = ROOT / "docs" / out.name
    folder.mkdir(exist_ok=True)
    shutil.copy(out / "results.jsonl", folder)
    results = ablation.Results.read(folder)
    (folder / "results.md").write_text(ablation.tables(results) + "\n")
    if out.name == "ablate":
        (folder / "inside").mkdir(exist_ok=True)
        for file in (out / "inside").glob("*.npz"):
            shutil.copy(file, folder / "inside")
        figures.draw_all(folder)
    stages = [ablation.Results.read(path) for path in sorted((ROOT / "docs").glob("ablate*"))]
    learning = figures.draw_learning(ablation.Results([row for r in stages for row in r.rows]))
    learning.savefig(ROOT / "docs" / "ablate" / "learning.png", dpi=figures.DPI)
    text = (ROOT / "README.md").read_text()
    for table in tables_of(results):
        text = put(text, table)
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
