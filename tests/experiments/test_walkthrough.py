"""docs/walkthrough.md says what the code does: every output it shows, its pictures, its links."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "walkthrough.md"


@pytest.fixture(scope="module")
def drawing():
    """experiments/draw_walkthrough.py, which runs the page to draw what it computes."""
    return runpy.run_path(str(ROOT / "experiments" / "draw_walkthrough.py"))


@pytest.fixture(scope="module")
def run(drawing):
    """Results of doctest and the page's variables."""
    return drawing["run_page"]()


def test_every_output_of_the_page_is_what_comes_out(run):
    results, _ = run
    assert results.attempted >= 30 and results.failed == 0, "the differences stand above"


def test_what_the_page_links_and_shows_is_there():
    links = re.findall(r"\]\(([^)#\s]+)", PAGE.read_text())
    missing = [x for x in links if not x.startswith("http") and not (PAGE.parent / x).exists()]
    assert not missing, f"the page links to {missing}"
    assert len([link for link in links if link.endswith(".png")]) == 3


def test_its_pictures_can_be_drawn(drawing, run, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    drawn = drawing["draw"](tmp_path, run[1])
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text())
    assert sorted(path.name for path in drawn) == sorted(shown)
    for path in drawn:
        assert 5_000 < path.stat().st_size < 150_000, path
