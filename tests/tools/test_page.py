"""The demo page: in a real headless Chromium, as a visitor sees it, and its files and sentences."""

import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import browser
import pytest
import torch

import demo
from baselines.systems import load_system
from data import Clip
from favor import preset
from runtime.checkpoint import COMMITTED
from runtime.media import write_video
from tools import page as pages

QUESTION = "What colour is the object at the beep?"           # miniature/demo.json's


# ---------------------------------------------------------------- without a browser
@pytest.fixture
def page(tmp_path):
    made = pages.Page(None, "no model")
    made.folder = tmp_path.resolve()
    yield made
    made.worker.shutdown()


def upload(page, name, content=b"1"):
    """As gradio stores an upload: a folder with the hash of its content."""
    path = page.folder / f"hash-of-{content.hex()}" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return {"path": str(path), "orig_name": name}


def as_session(name):
    return SimpleNamespace(session_hash=name)


def test_only_files_of_the_page_are_read(page, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "secret.mp4"
    other.write_bytes(b"1")
    good = upload(page, "a.mp4")
    assert page.path_of(good) == Path(good["path"])
    assert page.path_of({"path": str(page.example)}) == page.example
    for payload, said in ((None, "There is no clip yet"), ({"path": str(other)}, "not a file of"),
                          ({"path": good["path"] + "/../../../" + "etc/passwd"}, "not a file of"),
                          ({"path": str(page.folder / "gone.mp4")}, "has been removed")):
        with pytest.raises(ValueError, match=said):
            page.path_of(payload)


def test_files_go_with_their_last_visit(page):
    """Two visits that upload the same content share a file; another upload replaces the first."""
    shared, own = upload(page, "a.mp4"), upload(page, "b.wav", b"2")
    page.uploaded("Video", shared, as_session("one"))
    page.uploaded("Video", shared, as_session("two"))
    page.uploaded("Sound", own, as_session("two"))
    page.forget("one")
    assert Path(shared["path"]).exists()
    page.uploaded("Video", None, as_session("two"))                       # its cross was clicked
    assert not Path(shared["path"]).exists() and Path(own["path"]).exists()
    page.uploaded("Video", {"path": str(page.example)}, as_session("two"))
    page.forget("two")
    assert not page.visits and not any(page.folder.iterdir()) and page.example.exists()


def test_old_visits_are_forgotten(page, monkeypatch):
    monkeypatch.setattr(pages, "MOST_VISITS", 3)
    first = upload(page, "a.mp4")
    page.uploaded("Video", first, as_session("first"))
    for name in "abc":
        page.visit(as_session(name))
    assert [*page.visits] == ["a", "b", "c"] and not Path(first["path"]).exists()


def test_a_switch_that_leaves_nothing():
    sound, picture = Clip(audio=torch.zeros(9)), Clip(frames=torch.zeros(1, 3, 2, 2))
    for clip, mask in ((sound, "audio"), (picture, "visual")):
        with pytest.raises(ValueError, match="nothing is left of it"):
            pages.check_left(clip, mask)
    for clip, mask in ((sound, "visual"), (picture, "audio"), (sound, None), (sound, "both")):
        pages.check_left(clip, mask)


def test_the_flags_of_the_command_line(monkeypatch):
    served = []
    monkeypatch.setattr(demo, "load_system", lambda *_: ("the model", COMMITTED))
    monkeypatch.setattr(pages.Page, "serve", lambda self, port: served.append((self, port)))
    demo.main(["--web", "--port", "1234", "--max-new-tokens", "5", "--checkpoint", str(COMMITTED)])
    (page, port), = served
    assert port == 1234 and page.model == "the model" and page.settings == {"max_new_tokens": 5}
    with pytest.raises(SystemExit, match="wanted a number from 1 to 65535"):
        demo.main(["--web", "--port", "0"])
    monkeypatch.setattr(pages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r'needs gradio and matplotlib: pip install -e "\.\[demo'):
        demo.main(["--web"])


def test_a_taken_port_is_said(page):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is taken"), page.serving(port):
            pass


# ---------------------------------------------------------------- in a browser
@pytest.fixture
def served():
    """The page of the committed checkpoint, for uploads up to 1 MiB -> Page, address, model."""
    for package in ("gradio", "selenium"):
        pytest.importorskip(package, reason="needs the extra dev")
    model, folder = load_system("favor", preset("tiny"), "tiny", str(COMMITTED))
    page = pages.Page(model, folder.name, most_bytes=2**20)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with page.serving(port) as address:
        yield page, address, model
    assert not page.folder.exists()


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER),
                    reason="needs Debian's packages chromium and chromium-driver")
def test_visitors(served, tmp_path):
    """One test, because the page and the browsers take seconds to start."""
    page, address, model = served
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(page.example.read_bytes())
    with browser.browser() as first, browser.browser(390, 844) as second:
        visitor, other = (browser.Visitor(driver, address) for driver in (first, second))
        asks_and_turns_switches(visitor, clip, model)
        chooses_queries(visitor)
        reads_what_is_wrong(visitor, tmp_path, page)
        both_ask_at_once(visitor, other, clip, page)
        for each in (visitor, other):
            assert not [url for url in each.requests() if not url.startswith(address)]
            assert each.driver.execute_script("return document.documentElement.scrollWidth - "
                                              "document.documentElement.clientWidth") == 0
        assert {path.name for path in files(page)} >= {"clip.mp4"}
        for each in (visitor, other):
            each.driver.get("about:blank")
        visitor.wait(lambda: not page.visits and not files(page), "the end of both visits")


def files(page):
    return [path for path in page.folder.rglob("*") if path.is_file()]


def asks_and_turns_switches(visitor, clip, model):
    """The clip is asked about, and again without its sound, which the question needs."""
    def right(mask):
        return model.answer(clip, QUESTION, mask=mask)

    visitor.upload(clip)
    assert visitor.ask(QUESTION) == right(None) == "pink"
    visitor.click("#no-sound input")
    assert visitor.answered("without sound") == right("audio") != "pink"
    compared = visitor.find("#compare").text
    assert "pink" in compared and right("audio") in compared
    visitor.click("#no-sound input")
    assert visitor.answered("picture and sound") == "pink"


def chooses_queries(visitor):
    """By its number and by its row in the picture; the picture changes, and back with all."""
    seen = [visitor.picture]
    assert seen[0].startswith("data:image/png;base64,")
    for button in (".choose button[aria-label='query 4']", "button.row[aria-label='query 9']",
                   ".choose button[aria-label='all queries']"):
        visitor.click(f"#picture {button}")
        visitor.wait(lambda: visitor.picture != seen[-1], "another picture")
        seen.append(visitor.picture)
    assert len(set(seen)) == 3 and seen[0] == seen[-1]


def reads_what_is_wrong(visitor, folder, page):
    """Sentences for a broken file, for nothing left of a clip, for no question, and too large."""
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(range(200)) * 20)
    frames = torch.zeros(10, 64, 64, 3, dtype=torch.uint8)
    write_video(folder / "silent.mp4", frames, 2.0)
    (folder / "large.mp4").write_bytes(bytes(page.most_bytes + 1))
    visitor.click("#video button[aria-label='Clear']")
    visitor.upload(folder / "broken.mp4")
    visitor.click("#ask")
    assert visitor.error().startswith("broken.mp4: not readable as media")
    visitor.click("#video button[aria-label='Clear']")
    visitor.upload(folder / "silent.mp4")
    visitor.write(" ")
    visitor.click("#ask")
    visitor.wait(lambda: "There is no question yet" in visitor.status, "a sentence")
    visitor.write(QUESTION)
    visitor.click("#no-picture input")
    visitor.click("#ask")
    visitor.wait(lambda: "has no sound, so nothing is left" in visitor.status, "a sentence")
    visitor.click("#no-picture input")
    visitor.click("#video button[aria-label='Clear']")
    visitor.wait(lambda: visitor.find("#video input[type=file]"), "a place for a file").send_keys(
        str(folder / "large.mp4"))
    visitor.wait(lambda: "exceed the maximum allowed size" in visitor.find("body").text,
                 "a sentence")


def both_ask_at_once(visitor, other, clip, page):
    """While the model is busy, the first waits for it and the other one is told its place; then
    each gets the answer to its own view of the clip."""
    gate = threading.Event()
    try:
        page.worker.submit(gate.wait)
        visitor.upload(clip)
        visitor.write(QUESTION)
        visitor.click("#ask")
        other.upload(clip)
        other.click("#no-sound input")
        other.write(QUESTION)
        visitor.wait(lambda: page.worker._work_queue.qsize(), "the first question")
        other.click("#ask")
        other.wait(lambda: "queue: " in other.find("#answer").text, "a place in the queue")
    finally:
        gate.set()
    assert other.answered("without sound") == "yellow"
    assert visitor.answered("picture and sound") == "pink"
