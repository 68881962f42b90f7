"""`python -m aveb table`: spreadsheets as Excel, LibreOffice and people write them -> manifests.
And every command of docs/own_data.md, as it stands there."""

import csv
import io
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_readme import sh_commands

import data
import train
from aveb import __main__ as command
from aveb.spreadsheet import COLUMNS, Table, files_of, from_table, read_rows, split
from runtime import cli, distributed
from runtime.media import write_png, write_video, write_wav

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "own_data.md"
quiet = lambda *_: None                                                          # noqa: E731


def write_clip(path, seed=0, seconds=1):
    """A clip whose kind is that of the suffix: noise, 32 x 32 pixels, 4 frames per second."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = (0.1 * rng.standard_normal(16000 * seconds)).astype(np.float32)
    frames = rng.integers(0, 255, (4 * seconds, 32, 32, 3)).astype(np.uint8)
    if path.suffix == ".wav":
        write_wav(path, sound)
    elif path.suffix == ".png":
        write_png(path, frames[0])
    else:
        write_video(path, frames, 4, sound)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder of clips: Door.mp4, day 1/horn.mp4, day 2/horn.mp4, bell.wav, poster.png; and
    radio.mp4, whose content is sound only."""
    folder = tmp_path_factory.mktemp("own") / "clips"
    for k, name in enumerate(("Door.mp4", "day 1/horn.mp4", "day 2/horn.mp4", "bell.wav",
                              "poster.png", "radio.wav")):
        write_clip(folder / name, k)
    (folder / "radio.wav").rename(folder / "radio.mp4")
    return folder


def read(folder, media, text, **settings):
    """The text of a .csv file -> Table."""
    path = folder / "q.csv"
    path.write_text(text, "utf-8", newline="", **settings)
    return Table(path, [media])


# ---- the file -----------------------------------------------------------------------------------

HEADER = ["Notes", "CLIP (file)", "Question", " answer ", "Start [s]", "Options"]
ROWS = [["", "door", 'What is "heard"?', "a, horn; a bell", "0,25", ""],
        [], ["", "", "", "", "", ""],
        ["mine", "Day 2\\HORN", "Two\nlines,  and\u00a0a tab?", "Ünïcode \u4e2d", "", ""],
        ["", "poster.png", "Which?", "Red.", "", "red | dark  blue"]]
WANTED = [("Door-3", "videoqa", 'What is "heard"?', "a, horn; a bell", "Door.mp4", 0.25, ()),
          ("horn-6", "videoqa", "Two lines, and a tab?", "Ünïcode 中", "horn.mp4", None, ()),
          ("poster-7", "vqa", "Which? Choose one from: red; dark blue", "red", "poster.png", None,
           ("red", "dark blue"))]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("style", [
    {"lineterminator": "\r\n"}, {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}])
def test_a_spreadsheet_reads_the_same_however_it_was_saved(
        separator, encoding, style, tmp_path, media):
    """Separators, byte order marks, line ends, quotes, line breaks in cells, empty rows, capitals,
    decimal commas; and a row counts as the spreadsheet program shows it."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, **style).writerows([[], HEADER, *ROWS])
    path = tmp_path / "q.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    table = Table(path, [media])
    assert table.bad == [] and table.unused == ["Notes"]
    assert WANTED == [(r.id, r.task, r.prompt, r.target, Path(files_of(r)[0]).name, r.start,
                       r.options) for r in table.records]
    assert "day 2" in table.records[1].video and table.records[2].meta == {
        "metrics": ["choice"], "chance": 0.5}


@pytest.mark.parametrize(("raw", "message"), [
    (b"PK\x03\x04 and so on", r"q\.csv: a workbook .*, wanted text; save it as CSV in UTF-8: in "),
    (b"\xd0\xcf\x11\xe0\xa1", r"q\.csv: a workbook"),
    (b"clip,question,answer\na,b,c\na,b,caf\xe9\n", r"q\.csv, line 3: not UTF-8; save it as CSV"),
    (b"", r"q\.csv: no column clip or video or image or audio and no column question .*: empty;"),
    (b"Datei,Frage,answer\n", r"no column clip .* and no column question; its first row is: Datei,"
     r" Frage, answer; .*rename them"),
    (b"clip,File,question,answer\n", r"the columns 'clip' and 'File' are both the clip; rename"),
    (b'clip,question,answer\na,b,c\na,"b" c,d\n', r"q\.csv, row 3: .*; wanted quotation marks"),
    (b'clip,question,answer\na,b,c\n\na,"b,d\na,b,c\n', r"q\.csv, row 4: unexpected end of data;"),
])
def test_a_file_that_is_no_table_is_named(raw, message, tmp_path):
    (tmp_path / "q.csv").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "q.csv")


def test_a_table_that_is_not_there(tmp_path, capsys):
    words = ["table", str(tmp_path / "q.csv"), "--out", str(tmp_path / "a.jsonl")]
    assert command.main(words) == 2
    assert "q.csv: No such file or directory; wanted a spreadsheet" in capsys.readouterr().err


# ---- its rows -----------------------------------------------------------------------------------

@pytest.mark.parametrize(("row", "message"), [
    ("door,,b", "row 3, column Question: empty, wanted the question; fill it in or delete the row"),
    ("door,a,", "row 3, column answer: empty, wanted the answer"),
    (",a,b", "row 3, column CLIP: empty, wanted the name of a file"),
    ("tor,a,b", "row 3, column CLIP: no file 'tor' below "),
    (f"{'x' * 300},a,b", "row 3, column CLIP: no file 'xxx"),
    ("horn,a,b", "row 3, column CLIP: 'horn' can be day 1/horn.mp4 or day 2/horn.mp4; write more "
                 "of the path"),
    ("door,a,b,soon", "row 3, column start: 'soon', wanted seconds such as 12.5; correct it"),
    ("door,a,b,nan", "row 3: start is nan, wanted seconds from 0 to 1e9"),
    ("door,a,b,3,2", "row 3: end 2.0 is not after start 3.0"),
    ("door,a,b,,,yes|no", "row 3, column answer: 'b' is none of the options yes, no; write the "
                          "text of the right option"),
    ("door,a,b,,,b;c", "row 3, column Options: 'b;c' alone, wanted two or more with | between"),
    ("door,a,b,,,,,x,y", "row 3: 9 cells, more than the header has"),
    ("poster,a,b,,,,door", "row 3, column sound: file is missing"),
    ("bell,a,b,,,,door", "row 3, column sound: 'door' is a second audio beside the column CLIP"),
    ("door,a,b,,,,poster", "row 3, column sound: 'poster' is of the kind image; move it to a "
                           "column image or clip"),
    ("door,a,b\0", "row 3: a text holds the character NUL"),
    ("Door.mp4,What?,it", "row 3: the same clip, question and answer as in row 2; change or delete "
                          "one of the two"),
    ("bell,a,b,,,,,d1", "row 3: the id 'd1' is taken by row 2"),
])
def test_a_bad_row_is_left_out_and_named(row, message, tmp_path, media):
    if message.endswith("file is missing"):
        row, message = row.replace("door", "dor"), "row 3, column sound: no file 'dor' below"
    table = read(tmp_path, media, "CLIP,Question,answer,start,end,Options,sound,id\n"
                 f"door,What?,it,,,,,d1\n{row}\nbell.WAV,What?,it,,1\n")
    assert [record.id for record in table.records] == ["d1", "bell-4"] and table.left_out == 1
    (sentence,) = table.bad
    assert sentence.startswith(f"{tmp_path}/q.csv, {message}"), sentence


def test_rows_about_one_missing_clip_get_one_sentence(tmp_path, media):
    table = read(tmp_path, media, "clip,question,answer\n" + "".join(
        f"gone.mp4,a{k},b\n" for k in range(13)) + "door,a,b\n")
    rows = ", ".join(str(k) for k in range(2, 12))
    (sentence,) = table.bad
    assert f"rows {rows} and 3 more, column clip: no file 'gone.mp4' below {media}" in sentence
    assert table.left_out == 13 and len(table.records) == 1


def test_the_kind_of_a_clip_is_that_of_its_content(tmp_path, media):
    """A sound in a .mp4 is a sound; the sound of a video may be added to an image; the column and
    the content must agree; and a file that cannot be read is left to the check."""
    (tmp_path / "broken.avi").write_bytes(b"no video")
    table = read(tmp_path, media, "clip,video,audio,question,answer\nradio,,,a,b\npng,,,a,b\n"
                 "poster.png,,door,a,b\n,radio,,a,b\n,door,bell,a,b\nbroken.avi,,,a,b\n")
    named = [(r.id, r.task, *(p and Path(p).name for p in (r.video, r.image, r.audio)))
             for r in table.records]
    assert named == [("radio-2", "audioqa", None, None, "radio.mp4"),
                     ("poster-4", "vqa", None, "poster.png", "Door.mp4"),
                     ("Door-6", "videoqa", "Door.mp4", None, "bell.wav"),
                     ("broken-7", "videoqa", "broken.avi", None, None)]
    assert "row 5, column video: 'radio' is of the kind audio; move it" in table.bad[0]


def test_links_and_other_spellings_are_the_same_clip(tmp_path, media):
    (tmp_path / "link.mp4").symlink_to(media / "Door.mp4")
    table = read(tmp_path, media, "clip,question,answer\ndoor,a,b\nlink.mp4,b,c\nDOOR.MP4,c,d\n"
                 f"{media}/Door.mp4,d,e\n")
    assert {record.video for record in table.records} == {f"{media}/Door.mp4"}
    assert len(table.records) == 4


def test_dialogues_and_other_answers(tmp_path, media):
    """Turns are those of the same clip and name, in the order of the rows; what follows a turn that
    is left out is left out, too."""
    table = read(tmp_path, media, "Dialogue,clip,question,answer,refs,Task,id\n"
                 "1,door,q1,a1,,AVSD,\n1,bell,other,x,y | z,,own\n1,door,q2,a2,,avsd,\n"
                 "2,door,q1,a1,,,\n2,door,q2,,,,\n2,door,q3,a3,,,\n")
    assert [(r.id, r.task, r.refs, r.history, r.meta["dialogue"]) for r in table.records] == [
        ("Door-2", "avsd", (), (), "Door.mp4-1"),
        ("own", "audioqa", ("x", "y", "z"), (), "bell.wav-1"),
        ("Door-4", "avsd", (), (("q1", "a1"),), "Door.mp4-1"),
        ("Door-5", "videoqa", (), (), "Door.mp4-2")]
    assert len(table.bad) == 2 and "row 6, column answer: empty" in table.bad[0]
    assert "row 7, column Dialogue: an earlier turn of '2', row 6, is left out" in table.bad[1]


# ---- training and test --------------------------------------------------------------------------

def about(*files):
    video, audio = (*files, None)[:2]
    return data.Record(f"{files}", "videoqa", "?", "!", video=video, audio=audio)


def test_no_clip_is_on_both_sides_and_none_changes_sides():
    names = [f"{k}.mp4" for k in range(2000)]
    records = [about(name) for name in names for _ in range(2)]
    learnt, tested = split(records, 0.2, lambda path: path)
    sides = [{r.video for r in part} for part in (learnt, tested)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(names)
    assert 0.17 < len(sides[1]) / 2000 < 0.23                  # 3.4 standard deviations
    for n in (50, 700):                                        # fewer clips: each on its side
        few = split([about(name) for name in names[:n]], 0.2, lambda path: path)
        assert {r.video for r in few[1]} == sides[1] & set(names[:n])
    moved = split([about(f"/elsewhere/{n}") for n in names], 0.2, lambda path: path.split("/")[-1])
    assert {Path(r.video).name for r in moved[1]} == sides[1]


def test_records_that_share_a_file_stay_together():
    rng, records = np.random.default_rng(0), []
    for k in range(300):                                       # chains: 0-a-1-b-2 are one group
        records.append(about(f"{k}.mp4", f"{rng.integers(200)}.wav"))
    learnt, tested = split(records, 0.5, lambda path: path)
    assert learnt and tested and len(learnt) + len(tested) == 300
    assert not {f for r in learnt for f in files_of(r)} & {f for r in tested for f in files_of(r)}
    joined = [about("a", "x"), about("b", "y"), about("c", "x"), about("b", "x")]
    with pytest.raises(ValueError, match="the same clip, so none can be held out"):
        split(joined, 0.5, lambda path: path)


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_sides_get_a_clip(share):
    learnt, tested = split([about(name) for name in "abcde"], share, lambda path: path)
    assert min(len(learnt), len(tested)) == 1


# ---- the command --------------------------------------------------------------------------------

def test_the_command_writes_checks_and_says_what_is_left_out(tmp_path, media, capsys):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    table, out, test = (tmp_path / name for name in ("q.csv", "new/a.jsonl", "new/b.jsonl"))
    table.write_text("clip,question,answer,colour\ndoor,a,b,c\nbell,a,b,c\n")
    words = ["table", str(table), "--media", str(media), "--media", str(tmp_path),
             "--out", str(out), "--test", str(test), "--test-share", "0.5"]
    assert command.main(words) == 0
    printed = capsys.readouterr().out
    assert "q.csv: 2 rows, 2 of them usable, 0 left out; missing files: 0\n" in printed
    assert "columns that are not used: colour (known are clip, video" in printed
    assert f"{test}: 1 records about 1 clips" in printed and printed.count(": 0 broken") == 2
    parts = [data.read_manifest(name) for name in (out, test)]
    assert sorted(r.id for part in parts for r in part) == ["Door-2", "bell-3"]
    table.write_text(table.read_text() + "broken,a,b,\ngone,a,b,\n")
    assert command.main(words) == 1
    printed = capsys.readouterr().out
    assert "4 rows, 3 of them usable, 1 left out; missing files: 1\n  left out: " in printed
    assert "row 5, column clip: no file 'gone'" in printed and "  broken: " in printed
    table.write_text("clip,question,answer\n" + "gone,a,b\n" * 3 + "door,,\n" * 30)
    kept = out.read_bytes()
    assert command.main(words) == 2 and out.read_bytes() == kept
    printed = capsys.readouterr()
    assert "  and 11 more" in printed.out and "no row can be used" in printed.err


@pytest.mark.parametrize(("settings", "message"), [
    ({"out": "q.csv"}, r"q\.csv: wanted the name of a manifest to write, such as train\.jsonl"),
    ({"test": "./a.jsonl"}, r"two of these are the same file"),
    ({"test_share": 1.0}, r"--test-share 1\.0: wanted a share between 0 and 1"),
    ({"media": ["none"]}, r"none: no such folder; --media names a folder of clips")])
def test_flags_that_cannot_be_meant(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("q.csv").write_text("clip,question,answer\n")
    with pytest.raises(ValueError, match=message):
        from_table("q.csv", **{"out": "a.jsonl"} | settings, log=quiet)
    assert Path("q.csv").read_text() == "clip,question,answer\n"


@pytest.mark.parametrize(("options", "answer", "said"), [
    ("1|-1", "-1", "-1"), ("Ja|Ja!", "Ja!", "Ja!"), ("C|C++|C#", "c++", "C++"), ("No.|Yes.", "yes",
     "Yes."), ("Ja!|Ja?", "ja", None), ("a|a|b", "a", None)])
def test_the_option_that_is_meant(tmp_path, media, options, answer, said):
    """The text as it stands comes first, then without capitals, then without marks."""
    (tmp_path / "q.csv").write_text(f"clip,question,answer,options\ndoor,q,{answer},{options}\n")
    table = Table(tmp_path / "q.csv", [media])
    assert [record.target for record in table.records] == ([said] if said else [])
    assert bool(table.bad) == (said is None)


def test_a_dialogue_is_about_the_file_however_it_is_spelt(tmp_path, media):
    (tmp_path / "q.csv").write_text('sep=,\nclip,question,answer,dialogue\ndoor,q1,a1,d\n'
                                    'DOOR.MP4,q2,a2,d\n')
    first, second = Table(tmp_path / "q.csv", [media]).records
    assert second.history == (("q1", "a1"),) and first.id.endswith("-2")
    (tmp_path / "q.csv").write_text("clip,question,answer,dialogue\ndoor,,a1,d\nDOOR.MP4,q2,a2,d\n")
    assert Table(tmp_path / "q.csv", [media]).left_out == 2


def test_links_to_the_spreadsheet_are_not_overwritten(tmp_path, media):
    table = tmp_path / "q.csv"
    table.write_text("clip,question,answer\ndoor,a,b\nbell,a,b\n")
    (tmp_path / "l.jsonl").symlink_to(table)
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "o.jsonl")
    for out, test in (("l.jsonl", None), ("o.jsonl", "m.jsonl")):
        with pytest.raises(ValueError, match="two of these are the same file"):
            from_table(table, tmp_path / out, [media], test and tmp_path / test, log=quiet)
    assert table.read_text().startswith("clip,")


# ---- the page -----------------------------------------------------------------------------------

def run_as_program(words, monkeypatch):
    """A command of the page, in this process -> its exit status."""
    if words[:3] == ["python", "-m", "aveb"]:
        return command.main(words[3:])
    assert words[0] == "python" and words[1].endswith(".py"), words
    monkeypatch.setattr(sys, "argv", words[1:])
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """In an empty folder with the page's spreadsheet and clips of these names; the commands of the
    real sizes are only parsed, and what they train on is there."""
    text = PAGE.read_text()
    table = re.search(r"^```csv\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    for k, (name, *_) in enumerate(list(csv.reader(table.splitlines()))[1:]):
        if "." in name:
            write_clip(Path("my/clips") / name, k)
    Path("my/questions.csv").write_text(table)
    # One process: starting Python costs more than all these steps.
    monkeypatch.setattr(distributed, "launch_local", lambda *_, **__: None)
    monkeypatch.setattr(cli, "run_module", lambda name, *rest: run_as_program(
        ["python", f"{name}.py", *map(str, rest)], monkeypatch))
    threads, ran = torch.get_num_threads(), []
    try:
        for words in sh_commands(PAGE):
            if "--model" in words:
                rest = words[words.index("train.py") + 1:]
                config = cli.parse(train.TrainConfig, "", rest)[0]
                assert all(Path(name).is_file() for name, _ in config.manifests)
                ran.append(config.model)
                continue
            assert run_as_program(words, monkeypatch) == 0, words
            ran.append(words[2] if words[1] == "-m" else words[1])
    finally:
        torch.set_num_threads(threads)
    assert ran == ["aveb", "aveb", "aveb", "train.py", "small-laptop", "small", "7b", "eval.py",
                   "demo.py"]
    printed = capsys.readouterr().out
    assert "6 rows, 6 of them usable, 0 left out; missing files: 0" in printed
    learnt, tested = (data.read_manifest(f"my/{name}.jsonl") for name in ("train", "test"))
    assert len(learnt) + len(tested) == 6 and "predictions: runs/my/best/" in printed
    assert (tmp_path / "runs/my/best/favor.json").is_file()


def test_the_page_has_a_row_for_each_column():
    first = {name for line in PAGE.read_text().splitlines() if line.startswith("| `")
             for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert set(COLUMNS) <= first
