"""aveb/speech.py: questions spoken by made-up programs and by espeak-ng; pairs for avm."""

import os
import random
import shutil
import stat
import sys
from collections import Counter

import pytest

from aveb import speech
from data import Record, read_manifest, write_manifest
from runtime.media import read_audio

FAKE = """#!{python} -S
import sys, struct, wave
args = sys.argv[1:]
text = sys.stdin.read()
if "-f" in args:
    text = open(args[args.index("-f") + 1]).read()
with open({log!r}, "a") as log:
    log.write(repr((args, text)) + "\\n")
if "unspeakable" in text:
    sys.exit("cannot say that")
out = next(args[k + 1] for k, a in enumerate(args) if a in ("-w", "-o", "--output_file"))
with wave.open(out, "wb") as file:
    file.setparams((2, 2, {rate}, 0, "NONE", ""))
    file.writeframes(struct.pack("<2h", 9000, 9000) * ({rate} // 4))
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """add(name): a made-up program of that name, the only ones on PATH; says() -> its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    log = tmp_path / "calls.txt"

    def add(name, rate=22050):
        path = folder / name
        path.write_text(FAKE.format(python=sys.executable, log=str(log), rate=rate))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def says():
        return [eval(line) for line in log.read_text().splitlines()] if log.exists() else []
    return add, says


def questions(source, n):
    return [Record(f"{source}-{k}", "ocr", f"What is thing {source} {k}?", f"answer {k}",
                   image=f"/x/{k}.jpg", refs=(f"answer {k}", "other"), meta={"metrics": ["m"]})
            for k in range(n)]


def quiet(*_):
    pass


def test_isqa_records_wavs_and_their_log(programs, tmp_path):
    add, says = programs
    add("espeak-ng")
    out = tmp_path / "aveb"
    made = speech.make_isqa({"textvqa": questions("textvqa", 9), "gqa": questions("gqa", 5)},
                            out, n=6, seed=1, log=quiet)
    records = read_manifest(out / "isqa.jsonl")
    assert [r.id for r in records] == [r.id for r in made]
    assert Counter(r.meta["source"] for r in records) == {"textvqa": 6, "gqa": 5}
    for r in records:
        assert (r.task, r.prompt) == ("isqa", "Answer the question in the audio about the image.")
        number = r.meta["question_id"].rpartition("-")[2]
        assert r.image == f"/x/{number}.jpg" and r.refs == (f"answer {number}", "other")
        assert r.target == f"answer {number}" and r.meta["metrics"][0] == "isqa"
        assert r.meta["engine"] == "espeak-ng"
        assert abs(len(read_audio(r.audio)) - 4000) < 40            # 0.25 s at 16 kHz, mono
        assert any(r.meta["voice"] in args and r.meta["question_text"] in text
                   for args, text in says()), "the log names another voice than was used"
    assert len({r.meta["voice"] for r in records}) >= 4
    textvqa = [r.meta["voice"] for r in records if r.meta["source"] == "textvqa"]
    assert len(set(textvqa)) == 6                                    # one after the other


def test_isqa_does_not_depend_on_the_order_and_goes_on(programs, tmp_path):
    add, says = programs
    add("espeak-ng")
    records = questions("gqa", 12)
    random.Random(3).shuffle(records)
    a = speech.make_isqa({"gqa": questions("gqa", 12)}, tmp_path / "a", n=6, log=quiet)
    b = speech.make_isqa({"gqa": records}, tmp_path / "b", n=6, log=quiet)
    strip = [(r.id, r.meta) for r in a]
    assert strip == [(r.id, r.meta) for r in b]
    assert {r.id for r in a} != {r.id for r in speech.make_isqa(
        {"gqa": records}, tmp_path / "c", n=6, seed=1, log=quiet)}
    asked = len(says())
    wavs = sorted((tmp_path / "a" / "isqa").iterdir())
    wavs[0].unlink()                                                 # as if killed before it
    (tmp_path / "a" / "isqa.jsonl").unlink()
    again = speech.make_isqa({"gqa": records}, tmp_path / "a", n=6, log=quiet)
    assert len(says()) == asked + 1 and [(r.id, r.meta) for r in again] == strip
    assert sorted((tmp_path / "a" / "isqa").iterdir()) == wavs
    changed = [Record(r.id, r.task, r.prompt + " now", r.target, image=r.image) for r in records]
    speech.make_isqa({"gqa": changed}, tmp_path / "a", n=6, log=quiet)
    assert len(says()) == asked + 7, "a wav of another text was taken for this one"


def test_a_question_that_cannot_be_spoken_is_told(programs, tmp_path):
    add, _ = programs
    add("flite", rate=16000)
    records = questions("gqa", 4)
    records.append(Record("bad", "vqa", "unspeakable?", "a", image="/x/b.jpg"))
    said = []
    made = speech.make_isqa({"gqa": records}, tmp_path, log=said.append)
    assert len(made) == 4 and {r.meta["engine"] for r in made} == {"flite"}
    assert any("1 could not be spoken" in line and "cannot say that" in line for line in said)
    with pytest.raises(SystemExit, match="nothing could be spoken"):
        speech.make_isqa({"gqa": records[4:]}, tmp_path / "b", log=quiet)


def test_which_program(programs):
    add, _ = programs
    onnx = ("a.onnx", "b.onnx", "c.onnx:7", "d.onnx")
    with pytest.raises(SystemExit, match="apt install espeak-ng.*apt install flite"):
        speech.find_engine()
    add("flite")
    assert speech.find_engine() == ("flite", ("slt", "rms", "awb", "kal16"))
    add("espeak-ng")
    assert speech.find_engine()[0] == "espeak-ng" and len(speech.find_engine()[1]) >= 4
    add("piper")
    assert speech.find_engine()[0] == "espeak-ng"                    # no voices for piper
    assert speech.find_engine(voices=onnx) == ("piper", onnx)
    assert speech.find_engine("flite")[0] == "flite"
    with pytest.raises(SystemExit, match="at least four"):
        speech.find_engine("piper", onnx[:3])
    with pytest.raises(SystemExit, match="wanted piper, espeak-ng, flite"):
        speech.find_engine("festival")


def test_piper_is_called_with_voice_and_speaker(programs, tmp_path):
    add, says = programs
    add("piper")
    made = speech.make_isqa({"gqa": questions("gqa", 4)}, tmp_path, log=quiet,
                            voices=("a.onnx", "b.onnx", "c.onnx:7", "d.onnx"))
    calls = [args[:-1] for args, _ in says()]
    assert ["--model", "c.onnx", "--speaker", "7", "--output_file"] in calls
    assert ["--model", "a.onnx", "--output_file"] in calls
    assert [r.meta["voice"] for r in made] == ["a.onnx", "b.onnx", "c.onnx:7", "d.onnx"]


@pytest.mark.parametrize("text, said", [
    ("what does the STOP sign say?", "what does the stop sign say?"),
    ("WHAT IS ON TOP", "what is on top"), ("Who made the IBM PC?", "Who made the IBM PC?"),
    ("the  [[r]]\nword <b>", "the r word b"), ("Is this HTTP?", "Is this HTTP?"),
    ("--help me", "--help me")])
def test_text_is_made_speakable(text, said):
    assert speech.spoken(text) == said


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_espeak_speaks_with_every_voice(tmp_path):
    engine, voices = speech.find_engine("espeak-ng")
    made = speech.make_isqa({"gqa": questions("gqa", len(voices))}, tmp_path, log=quiet,
                            engine=engine)
    sounds = [read_audio(r.audio) for r in made]
    assert [r.meta["voice"] for r in made] == list(voices)
    assert all(0.7 < len(s) / 16000 < 5 for s in sounds)
    assert len({tuple(s[4000:8000].tolist()) for s in sounds}) == len(voices)   # all differ
    speech.speak(engine, voices[0], "--version and what's -w this?", tmp_path / "odd.wav")
    assert len(read_audio(tmp_path / "odd.wav")) > 16000


# ---------------------------------------- avm

def clips(n, classes=4):
    return [Record(f"vggss-{k}", "avssd", "What is the source of the sound?", f"c{k % classes}",
                   video=f"/v/{k}.mp4", meta={"label": f"Class {k % classes}"}) for k in range(n)]


def captions(images, each=3):
    return [Record(f"coco-{k}-{c}", "avm", "?", "Yes", image=f"/i/{k}.jpg",
                   audio=f"/w/{k}-{c}.wav") for k in range(images) for c in range(each)]


def test_avm_pairs(tmp_path):
    made = speech.make_avm({"vggss": clips(60), "spokencoco": captions(30)}, tmp_path, n=50,
                           log=quiet)
    assert [r.id for r in read_manifest(tmp_path / "avm.jsonl")] == [r.id for r in made]
    vggss, coco = ({r.id: r for r in found} for found in (clips(60), captions(30)))
    for source in ("vggss", "spokencoco"):
        answers = Counter(r.target for r in made if r.meta["source"] == source)
        assert answers == {"Yes": 25, "No": 25}
    for r in made:
        from_ = vggss if r.meta["source"] == "vggss" else coco
        seen, heard = from_[r.meta["seen"]], from_[r.meta["heard"]]
        assert (r.image, r.video) == (seen.image, seen.video)
        assert r.audio == (heard.audio or heard.video) and r.refs == (r.target,)
        if r.target == "Yes":
            assert seen == heard
        else:
            assert (seen.image, seen.video) != (heard.image, heard.video)
            assert seen.meta.get("label", 0) != heard.meta.get("label", 1)
    prompts = {s: {r.prompt for r in made if r.meta["source"] == s} for s in speech.AVM_PROMPTS}
    assert len(prompts["spokencoco"]) == 3 and len(prompts["vggss"]) == 1
    assert all(r.task == "avm" and r.meta["chance"] == 0.5 for r in made)


def test_avm_does_not_depend_on_the_order(tmp_path):
    records = clips(40)
    random.Random(1).shuffle(records)
    said = [[], []]
    a = speech.make_avm({"vggss": clips(40)}, tmp_path, n=30, seed=5, log=said[0].append)
    b = speech.make_avm({"vggss": records}, tmp_path, n=30, seed=5, log=said[1].append)
    assert a == b and said[0] == said[1] and "ids " in said[0][-1]
    c = speech.make_avm({"vggss": records}, tmp_path, n=30, seed=6, log=quiet)
    assert {r.id for r in a} != {r.id for r in c}


def test_avm_takes_no_pair_that_was_made_before(tmp_path):
    """Records that have another's sound already are left out."""
    records = captions(10, 1)
    records[3] = Record("coco-3-0", "avm", "?", "No", image="/i/3.jpg", audio="/w/4-0.wav")
    made = speech.avm_records("spokencoco", records, 50, 0)
    assert len(made) == 9 and not any("coco-3-0" in r.id for r in made)


@pytest.mark.parametrize("records, said", [
    (clips(6, classes=1), "no sound of another file and class"),
    ([Record("a", "avssd", "?", "x", video="/v/a.mp4")], "class in meta"),
    ([Record("a", "avssd", "?", "x", image="/v/a.jpg", meta={"label": "c"})], "a sound"),
    ([Record("a", "avssd", "?", "x", video="/v", start=1.0, meta={"label": "c"})], "cut the file")])
def test_avm_refuses_what_it_cannot_pair(records, said):
    with pytest.raises(ValueError, match=said):
        speech.avm_records("vggss", records, 50, 0)


def test_the_command(programs, tmp_path, capsys, monkeypatch):
    add, _ = programs
    add("espeak-ng")
    write_manifest(tmp_path / "gqa.jsonl", questions("gqa", 8))
    write_manifest(tmp_path / "vggss.jsonl", clips(8))
    out = str(tmp_path / "aveb")
    speech.main(["isqa", "--gqa", str(tmp_path / "gqa.jsonl"), "--out", out, "--n", "5"])
    assert "5 records, ids " in capsys.readouterr().out
    speech.main(["avm", "--vggss", str(tmp_path / "vggss.jsonl"), "--out", out])
    assert "8 pairs, 4 match" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["avm.jsonl", "isqa", "isqa.jsonl"]
    with pytest.raises(SystemExit):
        speech.main(["avm", "--out", out])
    assert "avm wants --spokencoco" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        speech.main(["avm", "--gqa", str(tmp_path / "gqa.jsonl"), "--out", out])
    assert "unrecognized arguments: --gqa" in capsys.readouterr().err
    with pytest.raises(SystemExit) as help_:
        speech.main(["--help"])
    assert help_.value.code == 0 and "python -m aveb.speech isqa" in capsys.readouterr().out
