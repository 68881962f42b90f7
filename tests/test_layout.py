"""The house: what lies at the root, who may import whom, that nothing goes in a circle, and how
much a reader of favor.py or train.py has to open.  Imports inside functions count, too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPONENTS = {"whisper_enc", "vit_qformer", "vit", "llama", "lora"}
PROGRAMS = {"train", "eval", "demo"}
ROOMS = ("runtime", "aveb", "baselines", "miniature", "tools", "experiments")
FILES = {path.stem: path for path in ROOT.glob("*.py")} | {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS for path in (ROOT / room).rglob("*.py")}

# Who may import whom: rooms, or single files.  Each room may also import itself.
METHOD = COMPONENTS | {"favor", "data"}
MAY = {
    **dict.fromkeys(COMPONENTS, {"runtime.hub", "runtime.fast"}),
    "vit": {"runtime.hub", "vit_qformer"},                                 # its resize and its norm
    "data": {"runtime.media", "runtime.hub", "vit_qformer"},    # atomic files; resize
    "favor": COMPONENTS | {"data", "runtime.hub", "runtime.fast"},
    # The plan was that runtime imports itself only.  But manifests, loader and feature cache move
    # Records, Clips and Samples about, and these belong to the method: data.py, which needs nothing
    # of the three.
    "runtime": {"data"},
    "aveb": METHOD | {"runtime"},
    "baselines": METHOD | {"runtime"},
    "miniature": {"runtime", "data", "aveb"},
    "miniature.pretrain": METHOD | {"runtime", "aveb"},
    "miniature.sheet": {"runtime", "data", "aveb", "whisper_enc"},        # draws what Whisper hears
    "tools": METHOD | {"runtime", "aveb", "baselines", "miniature"},
    **dict.fromkeys(PROGRAMS, METHOD | set(ROOMS) - {"experiments"}),
    "experiments": METHOD | set(ROOMS) | PROGRAMS}


def imports(name):
    """Names of our files that one of our files imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {path if path in FILES else node.module for path in inner}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: a relative import"
    return {module for module in found if module in FILES} - {name}


IMPORTS = {name: imports(name) for name in FILES}


def closure(name):
    """The files that a reader of this one may have to open: itself and all that it pulls in.  The
    rooms' __init__.py do not count: they hold a docstring (runtime's also two variables)."""
    seen, todo = set(), [name]
    while todo:
        if (here := todo.pop()) not in seen:
            seen.add(here)
            todo += IMPORTS[here]
    return {module for module in seen if FILES[module].name != "__init__.py"}


def test_the_root_shows_the_method():
    assert {path.name for path in ROOT.glob("*.py")} == {
        "favor.py", "whisper_enc.py", "vit_qformer.py", "vit.py", "llama.py", "lora.py", "data.py",
        "train.py", "eval.py", "demo.py"}
    made = {"runs", "media", "build", "favor.egg-info", "__pycache__", "wandb"}    # by running it
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")} - made
    assert there - {f"{name}.py" for name in METHOD | PROGRAMS} == {
        *ROOMS, "tests", "docs", "README.md", "LICENSE", "pyproject.toml"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_stay_within_the_rules(name):
    room = name.split(".")[0]
    allowed = MAY.get(name, MAY[room]) | {room}
    wrong = {module for module in IMPORTS[name]
             if not {module, module.split(".")[0]} & allowed}
    assert not wrong, f"{name} may not import {sorted(wrong)}; allowed: {sorted(allowed)}"


def test_nothing_goes_in_a_circle():
    for name in FILES:
        below = set().union(*(closure(module) for module in IMPORTS[name]), set())
        assert name not in below, f"{name} imports itself through {sorted(IMPORTS[name])}"


def test_what_a_reader_has_to_open():
    assert len(closure("favor")) <= 10, sorted(closure("favor"))
    assert len(closure("train")) <= 21, sorted(closure("train"))


def test_rooms_open_without_work():
    """No room's __init__.py imports a file of ours, so that a file is read without the others."""
    for name, path in FILES.items():
        assert path.name != "__init__.py" or not IMPORTS[name], f"{path} imports {IMPORTS[name]}"


@pytest.mark.parametrize("name", sorted(METHOD | PROGRAMS))
def test_no_function_of_the_method_is_long(name):
    long = {node.name: node.end_lineno - node.lineno + 1
            for node in ast.walk(ast.parse(FILES[name].read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno + 1 > 60}
    assert not long, f"{name}.py: longer than 60 lines: {long}"
