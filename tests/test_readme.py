"""What the README says stays true: links, equation lines, commands, departures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#\s]+)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert len(links) > 10 and not missing, f"the README links to {missing}"


def test_each_equation_link_points_at_its_line():
    rows = re.findall(r"\| (\(\d\)) .*?\]\((\w+\.py)#L(\d+)\)", README)
    assert {number for number, _, _ in rows} == {"(1)", "(2)", "(3)", "(4)", "(5)"}
    for number, file, line in rows:
        lines = (ROOT / file).read_text().splitlines()
        near = "\n".join(lines[int(line) - 1:int(line) + 6])
        assert f"Eq. {number}" in near, (
            f"{file}:{line} does not show Eq. {number}; it shows\n{near}")


def test_every_departure_in_the_code_has_its_row():
    """Each DIFF names a subject that the README's table of departures has a row for."""
    subjects = {"lora": "LoRA", "order": "order of the joint", "future": "causal mask",
                "layer": "causal attention", "key": "padded positions", "kept": "padded positions",
                "mean": "diversity loss", "projection": "audio width", "1280": "audio width",
                "dropout": "frozen Q-Former", "30 s": "length of audio",
                "at most": "length of clips"}
    found = [line for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-su-z]*/*.py")]
             for line in path.read_text().splitlines() if "DIFF" in line]
    assert len(found) >= 8
    table = README[README.index("departures"):]
    for line in found:
        rows = {row for word, row in subjects.items() if word in line.lower() or word in line}
        assert rows and any(row in table for row in rows), (
            f"no row of the README covers: {line.strip()}")


def test_ci_runs_the_readme_command():
    line = next(line for line in README.splitlines() if line.endswith("python -m pytest"))
    assert line.startswith("python3 -m venv .venv && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m1 'python -m pytest$' README.md" in script


@pytest.mark.parametrize("command", ["train.py", "eval.py", "demo.py", "-m miniature", "-m aveb",
                                     "-m aveb.speech", "-m aveb.judge", "-m tools.share",
                                     "-m experiments.ablate", "-m experiments.bench"])
def test_the_commands_explain_themselves(command):
    done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "python " in done.stdout, done.stderr


HELP = """
import contextlib, runpy, sys                       # in one process: torch is imported once
for words in sys.argv[1:]:
    sys.argv = words.split()
    program = sys.argv[0]
    with contextlib.suppress(SystemExit):
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


def test_the_flags_in_the_readme_exist():
    """Every --flag that the README mentions is one of our scripts'."""
    commands = [f"{s} --help" for s in (
        "train.py", "eval.py", "demo.py", "aveb.judge", "miniature", "experiments.ablate",
        "experiments.bench", "aveb prepare", "aveb.speech isqa")]
    known = subprocess.run([sys.executable, "-c", HELP, *commands], cwd=ROOT, check=True,
                           capture_output=True, text=True, timeout=120).stdout
    assert known.count("usage: ") == len(commands)
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {
            "--nproc_per_node", "--nproc", "--max-restarts"}:
        assert flag in known, f"the README mentions {flag}, which no script knows"
