"""The small files of runtime/hub.py: written atomically, read with errors that name the file.
Text in files is UTF-8, whatever the machine's language; terminals show what they can."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import FILES, IMPORTS, closure

from runtime import hub


def test_atomic_replaces_only_when_all_went_well(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    hub.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), hub.atomic(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.suffix == ".json"
        raise RuntimeError
    monkeypatch.setattr(os, "replace", None)                   # killed before the last step
    with pytest.raises(TypeError):
        hub.write_text(path, "other")
    assert hub.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_json_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json: missing"):
        hub.read_json(tmp_path / "none.json")
    for text in (b"{", b"\0\xff"):
        (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(ValueError, match="bad.json: not valid JSON"):
            hub.read_json(tmp_path / "bad.json")


def test_jsonl_without_torn_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert list(hub.read_jsonl(path)) == []
    path.write_bytes(b'{"step": 1}\n{"st\n\n3\n{"step": 2}\n{"step": \xff')
    assert list(hub.read_jsonl(path)) == [{"step": 1}, {"step": 2}]


def test_markdown_table():
    assert hub.markdown_table(["a", "b"], [[1, "x|y"], ["two\nlines", "\\|"]]) == (
        "| a | b |\n|---|---|\n| 1 | x\\|y |\n| two lines | \\| |")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000])
def test_json_that_is_nested_too_deep(tmp_path, text):
    (tmp_path / "deep.json").write_text(text + '\n{"step": 1}\n')
    with pytest.raises(ValueError, match="deep.json: not valid JSON"):
        hub.read_json(tmp_path / "deep.json")
    assert list(hub.read_jsonl(tmp_path / "deep.json")) == [{"step": 1}]


# ---- UTF-8 --------------------------------------------------------------------------------------

def modes(call):
    """The mode of a call of open(): a word such as "r" or "wb" among its arguments."""
    words = [a.value for a in (*call.args, *(k.value for k in call.keywords if k.arg == "mode"))
             if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return [word for word in words if word and not {*word} - {*"rwabxt+"}] or ["r"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_text_files_are_utf8(name):
    """Every call that reads or writes text says so, because the default is the machine's."""
    for call in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if not isinstance(call, ast.Call):
            continue
        function = call.func
        method = function.attr if isinstance(function, ast.Attribute) else ""
        owner = ast.unparse(function.value) if method else ""
        given = {keyword.arg for keyword in call.keywords}
        utf8 = any(isinstance(a, ast.Constant) and a.value in ("utf-8", "utf-8-sig")
                   for a in (*call.args, *(keyword.value for keyword in call.keywords)))
        text = (method in ("read_text", "write_text") and owner != "hub"
                or (ast.unparse(function) == "open" or method == "open" and owner not in (
                    "os", "av", "wave", "Image", "PIL.Image", "self._opener"))
                and "b" not in modes(call)[0]
                or given & {"text", "universal_newlines"} and owner == "subprocess")
        assert utf8 or not text, f"{FILES[name]}, line {call.lineno}: wanted encoding=\"utf-8\""


PRINTED = "é… 中 \N{GRINNING FACE}"


@pytest.mark.parametrize("settings", [
    {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"LANG": "POSIX"}], ids=str)
def test_a_terminal_that_is_not_utf8(settings):
    """It shows escapes for what it lacks; a print never ends a program."""
    inherited = {name: value for name, value in os.environ.items()
                 if not name.startswith(("LC_", "LANG", "PYTHON"))}
    code = f"import runtime, sys; print({PRINTED!a}); print({PRINTED!a}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(hub.__file__).parent.parent,
                          capture_output=True, env=inherited | settings)
    assert done.returncode == 0, done.stderr
    for shown in (done.stdout, done.stderr):
        assert shown.strip() in {PRINTED.encode(), *(
            PRINTED.encode(encoding, "backslashreplace") for encoding in ("ascii", "latin-1"))}


@pytest.mark.parametrize("name", [name for name, path in sorted(FILES.items())
                                  if 'if __name__ == "__main__":' in path.read_text("utf-8")])
def test_all_programs_print_so(name):
    """They import a file of runtime/, and so what makes terminals patient."""
    assert any(module.startswith("runtime") for below in (name, *IMPORTS[name])
               for module in closure(below)), name
