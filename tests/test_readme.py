"""What the README and the pages in docs/ say stays true: links, equation lines, commands, flags,
sizes, differences from the paper, and the results that the README repeats."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "miniature" / "weights" / "README.md",
         *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("aveb", "baselines", "experiments", "miniature", "runtime", "tools")
CODE = [*ROOT.glob("*.py"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


def links(text):
    """The targets of all links of a page, without those to the web."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]


def rows(text):
    """The cells of every table row of a page."""
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")]
            for line in text.splitlines() if line.startswith("| ")]


def anchor(heading):
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip("# ").lower()).replace(" ", "-")


# ---------------------------------------------------------------- pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in links(page.read_text()):
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page} links to {link}, which does not exist"
        if fragment and target.suffix == ".md":
            headings = re.findall(r"^#+ .*", target.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_a_placeholder_that_was_never_filled_in(page):
    assert not re.findall(r"<!--\s*[A-Z][A-Z_]+\b", page.read_text())


def test_the_readme_is_a_front_page_that_leads_to_every_page():
    text = README.read_text()
    assert len(text.splitlines()) <= 182 and len(text.split()) <= 2050
    linked = {link.partition("#")[0] for link in links(text)}
    pages = {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert len(pages) >= 8 and pages <= linked, f"the README does not link {pages - linked}"


def test_each_equation_link_points_at_its_line():
    found = re.findall(r"\| (\(\d\)) .*?\]\((\w+\.py)#L(\d+)\)", README.read_text())
    assert {number for number, _, _ in found} == {"(1)", "(2)", "(3)", "(4)", "(5)"}
    for number, file, line in found:
        lines = (ROOT / file).read_text().splitlines()
        near = "\n".join(lines[int(line) - 1:int(line) + 6])
        assert f"Eq. {number}" in near, (
            f"{file}:{line} does not show Eq. {number}; it shows\n{near}")


def test_the_lines_of_code_that_the_readme_states():
    """Within a tenth, of each file of the core and of all nine together."""
    total = 0
    for cells in rows(README.read_text()):
        names = re.findall(r"\[(\w+\.py)\]", cells[0])
        if names and cells[1].isdigit():
            lines = sum(len((ROOT / name).read_text().splitlines()) for name in names)
            total += lines
            assert abs(int(cells[1]) - lines) <= 0.1 * lines, (
                f"the README says that {', '.join(names)} has {cells[1]} lines; it is {lines}")
    core = sum(len(path.read_text().splitlines()) for path in ROOT.glob("*.py"))
    assert total == core, "the README's table does not list every Python file at the root"
    stated = re.search(r"about ([\d,]+)\s+lines", README.read_text())
    assert stated, "the README does not state the lines of the core"
    assert abs(int(stated[1].replace(",", "")) - core) <= 0.1 * core, f"the core has {core} lines"


def test_every_field_of_a_record_has_its_row():
    """In the README and in docs/own_data.md; and the README's manifest line can be read."""
    from data import WANTED, parse_line

    for page in (README, ROOT / "docs" / "own_data.md"):
        named = {name for cells in rows(page.read_text())
                 for name in re.findall(r"`(\w+)", cells[0])}
        assert set(WANTED) <= named, f"{page} does not describe {set(WANTED) - named}"
        examples = re.findall(r"^\{.*\}$", page.read_text(), re.MULTILINE)
        assert examples
        for example in examples:
            parse_line(example.encode(), page)
    whole = json.loads(re.search(r"^\{.*\}$", README.read_text(), re.MULTILINE)[0])
    assert set(WANTED) - {"image", "audio"} <= set(whole)


# ---------------------------------------------------------------- differences from the paper
def test_every_difference_in_the_code_has_its_row():
    """Each DIFF names a subject that has a row in the table of docs/differences.md."""
    subjects = {"lora": "LoRA", "order": "order of the joint", "future": "causal mask",
                "layer": "causal attention", "key": "padded positions", "kept": "padded positions",
                "mean": "diversity loss", "projection": "audio width", "1280": "audio width",
                "dropout": "frozen Q-Former", "30 s": "length of audio",
                "at most": "length of clips", "first question": "question in later turns",
                "each answer": "answers learnt", "<Img>": "prompt before the queries",
                "frame rates": "frame rates", "default model": "default model",
                "long sound": "long sound",
                "orientation": "orientation of pictures", "visual`": "visual encoder without",
                "cropped": "pictures for SigLIP", "chatml": "prompt in ChatML",
                "presets": "start of the causal Q-Former",
                "video-llama's frames": "frames of Video-LLaMA",
                "video-llama's sound": "sound of Video-LLaMA",
                "video-llama's answers": "answers of Video-LLaMA",
                "video-llama's images": "images with sound in Video-LLaMA"}
    found = [(path.name, line) for path in CODE
             for line in path.read_text().splitlines() if "DIFF" in line]
    assert len(found) >= 8
    table = [cells[0] for cells in rows((ROOT / "docs" / "differences.md").read_text())
             if len(cells) >= 3]
    for file, line in found:
        wanted = {row for word, row in subjects.items() if word in line.lower() or word in line}
        assert wanted and any(first.startswith(row) for row in wanted for first in table), (
            f"no row of docs/differences.md covers {file}: {line.strip()}")


# ---------------------------------------------------------------- results
def test_the_synchronisation_table_is_that_of_the_committed_results():
    """The means over five seeds after 1100 steps, with and without Eq. (1)."""
    scores = {}
    for line in (ROOT / "docs" / "ablate" / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] == 1100 and row["part"] == "" and row["system"] in ("complete", "no-sync"):
            scores.setdefault((row["task"], row["system"]), []).append(row["score"])
    shown = {cells[0].partition(":")[0]: cells for cells in rows(README.read_text())
             if len(cells) == 4 and " ± " in cells[3]}
    assert set(shown) == {"avsd", "avssd", "avm", "avsr", "isqa"}
    for task, cells in shown.items():
        both = [scores[task, system] for system in ("complete", "no-sync")]
        assert [len(values) for values in both] == [5, 5]
        with_it, without = map(mean, both)
        stated = [float(cells[1]), float(cells[2]), float(cells[3].split(" ± ")[0])]
        assert stated == pytest.approx([with_it, without, without - with_it], abs=0.06)


def test_the_main_results_of_the_readme_are_those_of_the_results_page():
    page = rows((ROOT / "docs" / "results.md").read_text())
    table = [cells for cells in rows(README.read_text()) if len(cells) == 12]
    tasks = [cell.removesuffix(" ↓") for cell in table[0][1:]]
    assert len(tasks) == 11 and len(table) == 3
    for k, (_, *scores) in enumerate(table[1:]):
        for task, score in zip(tasks, scores, strict=True):
            found = [cells[3].split()[0] for cells in page if cells[0].startswith(f"**{task}**")]
            assert len(found) == 2 and found[k] == score, f"{task}: {score}, {found}"


# ---------------------------------------------------------------- commands
def test_ci_runs_the_readme_command():
    line = next(line for line in README.read_text().splitlines()
                if line.endswith("python -m pytest"))
    assert line.startswith("python3 -m venv .venv && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert "grep -m1 'python -m pytest$' README.md" in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_names_a_program(page):
    text = page.read_text()
    for name in set(re.findall(r"python -m ([\w.]+)", text)) - {"venv", "pytest", "doctest"}:
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (
            f"{page}: there is no module {name}")
    for name in re.findall(r"(?:python|torchrun)(?: --\S+(?: \d+)?)* (\w+\.py)", text):
        assert (ROOT / name).exists(), f"{page}: there is no {name}"


def sh_commands(page):
    """The words of each command in a page's sh blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_recipe_of_the_small_presets_can_be_given_as_it_is_written():
    """Each command of docs/small.md passes its program's own parser; prepare knows set and split;
    what is trained on and scored is what commands before it wrote; the parts are the presets'."""
    import aveb.__main__
    import aveb.speech
    import demo
    import eval as evaluation
    import tools.share
    import train
    from aveb.sets.registry import SETS
    from data import parse_line
    from favor import PRESETS
    from runtime import cli

    page = ROOT / "docs" / "small.md"
    parsers = {"aveb": aveb.__main__.arguments, "aveb.speech": aveb.speech.arguments,
               "tools.share": tools.share.arguments, "demo.py": demo.arguments}
    configs = {"train.py": train.TrainConfig, "eval.py": evaluation.EvalConfig}
    written, trained, asked = set(), set(), set()
    for words in sh_commands(page):
        program = next(k for k, word in enumerate(words) if word in {*parsers, *configs})
        name, rest = words[program], words[program + 1:]
        if name in parsers:
            given = parsers[name]().parse_args(rest)
        else:
            given = cli.parse(configs[name], "", rest)[0]
        if name == "aveb":
            assert given.split in (None, *SETS[given.set].splits), words
            assert Path(given.out).stem == SETS[given.set].task, words
            written.add(given.out)
        elif name == "aveb.speech":
            assert given.vggss in written, words
            written.add(f"{given.out}/avm.jsonl")
        elif name == "train.py":
            if not given.dry_run:
                assert written >= {file for file, _ in given.manifests}, words
                trained |= {given.model, f"{given.out}/best"}
        elif name == "eval.py":
            scored = {Path(file).stem for file in written if Path(file).parent == Path(given.data)}
            assert len(scored) >= 4 and scored <= {*given.tasks}, words
            asked |= {given.checkpoint or given.model}
        elif name == "demo.py":
            asked |= {given.checkpoint or given.model}
        else:
            assert given.run in trained, words
    assert trained >= {"small", "small-laptop", *asked} and len(asked) == 2

    text = page.read_text()
    for preset in ("small", "small-laptop"):
        for part in ("whisper", "visual", "llm"):
            assert getattr(PRESETS[preset], part) in text
        grid = PRESETS[preset].visual_grid
        assert f"| {grid ** 2}: " in text and f"averaged to {grid} x {grid}" in text
    for example in re.findall(r"^\{.*\}$", text, re.MULTILINE):
        parse_line(example.encode(), page)


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


def helps(commands):
    """What `command --help` prints, for each of the commands."""
    done = subprocess.run([sys.executable, "-c", HELP, *commands], cwd=ROOT, check=True,
                          capture_output=True, text=True, timeout=120).stdout
    return [f"usage: {text}" for text in re.split("^usage: ", done, flags=re.M)[1:]]


def test_the_commands_explain_themselves():
    commands = ["train.py", "eval.py", "demo.py", "miniature", "aveb", "aveb.speech", "aveb.judge",
                "tools.share", "experiments.ablate", "experiments.bench", "experiments.publish",
                "tools.convert", "tools.official"]
    told = helps([f"{command} --help" for command in commands])
    assert len(told) == len(commands)
    for command, text in zip(commands, told, strict=True):
        program = command if command.endswith(".py") else f"python -m {command}"
        assert text.startswith(f"usage: {program} [-h]") and "python " in text, text
        assert "Public:" not in text


def test_the_flags_on_the_pages_exist():
    """Every --flag that a page mentions belongs to one of our programs."""
    commands = [f"{s} --help" for s in (
        "train.py", "eval.py", "demo.py", "aveb.judge", "miniature make", "experiments.ablate",
        "experiments.bench", "aveb prepare", "aveb subset", "aveb table",
        "aveb.speech isqa", "aveb.speech avm", "tools.share push")]
    told = helps(commands)
    assert len(told) == len(commands)
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "".join(told)))
    for page in PAGES:
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text())) - {
                "--nproc", "--max-restarts",                        # torchrun's
                "--no-deps", "--include"}:                          # pip's and lmms-eval's
            assert flag in known, f"{page} mentions {flag}, which no program knows"
