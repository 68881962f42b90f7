"""The small files of runtime/hub.py: written atomically, read with errors that name the file."""

import os

import pytest

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
