"""Each set as a tiny hand-made folder in the official layout: prepare -> check -> eval or train.

The rows are made up, their shapes and their traps are those of the official files: missing and
empty clips, ids that begin with '-', times past the end, test files without answers, dialogues,
lines that are not UTF-8."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import data
import eval as evaluation
import favor
import train
from aveb import __main__ as command
from aveb import captions, metrics, tables
from aveb import prepare as aveb
from aveb.answers import evaluate
from aveb.sets.registry import SETS, Files
from aveb.sets.savebench import SAVEBENCH
from aveb.sets.video import narration
from favor import Favor
from runtime.media import write_png, write_video, write_wav

HERE = None                                      # a media file belongs here
EMPTY = b""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """{suffix: a real file}; data.py looks at the content, so a .jpg may hold a png."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    sound = (0.1 * rng.standard_normal(32000)).astype(np.float32)                     # 2 s
    frames = rng.integers(0, 255, (8, 64, 64, 3)).astype(np.uint8)
    write_wav(folder / "a.wav", sound)
    write_png(folder / "a.png", frames[0])
    write_video(folder / "a.mp4", frames, 4, sound)
    write_video(folder / "silent.mp4", frames, 4)
    kinds = {"a.wav": (".wav", ".flac", ".mp3"), "a.png": (".png", ".jpg", ".gif"),
             "a.mp4": (".mp4",), "silent.mp4": (".avi",)}
    return {suffix: folder / name for name, suffixes in kinds.items() for suffix in suffixes}


def lay_out(folder, clips, files):
    """files {path: HERE, bytes, text, or what becomes JSON}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is HERE:
            shutil.copy(clips[path.suffix], path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def parts(small_parts):
    return {"whisper": str(small_parts / "whisper"), "llm": str(small_parts / "llama"),
            "visual": str(small_parts / "instructblip")}


@pytest.fixture(scope="module")
def small_model(parts):
    return Favor.from_config(favor.preset("tiny", **parts)).eval()


# ---- the nineteen sets, and SAVEBench -----------------------------------------------------------

def question(image, answers=("stop",) * 10, k=1):
    return {"question_id": k, "image_id": image, "question": "what does it say?",
            "answers": list(answers)}


def turns(*texts):
    return [{"from": who, "value": text}
            for who, text in zip(("human", "gpt") * 9, texts, strict=False)]


def said(n, last="yes , one ."):
    return [{"question": f"q{k} ?", "answer": "no ." if k + 1 < n else last} for k in range(n)]


NEXT = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
OPTIONS = "to eat,to sleep,to sing,he fell,he ran"
SAVE = {"question": "What is it?", "answer": "a cat"}

@dataclass
class Case:
    """What lies in the folder, and what is to be found there."""
    files: dict
    records: int
    media: tuple                                 # files found, missing, empty
    out: list                                    # reasons of what is left out
    first: tuple                                 # of the first: id, prompt, references, media
    split: str | None = None
    broken: int = 0                              # clips that the check complains about


CASES = {
    "librispeech": Case(files={
        "LibriSpeech/test-clean/61/70/61-70.trans.txt":
            b"61-70-0000 IT'S ONE\n61-70-0001 GONE\n61-70-0002 BAD \xe9\n61-70-0003\n"
            b"61-70-0004 NO BYTES\n",
        "LibriSpeech/test-clean/61/71/61-71.trans.txt": EMPTY,
        "LibriSpeech/test-clean/61/70/61-70-0000.flac": HERE,
        "LibriSpeech/test-clean/61/70/61-70-0003.flac": HERE,
        "LibriSpeech/test-clean/61/70/61-70-0004.flac": EMPTY},
        records=1, media=(2, 1, 1), out=["file is missing", "file is empty", "not UTF-8",
                                         "without an answer", "annotation file that is empty"],
        first=("librispeech-61-70-0000", "Transcribe the speech into text.", ("it's one",),
               ["61-70-0000.flac"])),
    "audiocaps": Case(files={
        "dataset/test.csv": "audiocap_id,youtube_id,start_time,caption\n"
            '1,-B3_dEfGhI0,40,"A dog barks, then a bell"\n2,-B3_dEfGhI0,40,Barking\n'
            "3,gone0000000,0,Rain\n4,short\n",
        "audio/-B3_dEfGhI0_40.wav": HERE},
        records=1, media=(1, 1, 0), out=["file is missing", "row without 4 columns"],
        first=("audiocaps--B3_dEfGhI0_40", "Please describe the audio.",
               ("A dog barks, then a bell", "Barking"), ["-B3_dEfGhI0_40.wav"])),
    "llava": Case(files={
        "llava_instruct_150k.json": [
            {"id": "42", "image": "42.jpg",
             "conversations": turns("<image>\nWhat is it?", "A cup.", "Where?", "Here.")},
            {"id": "42", "image": "42.jpg", "conversations": turns("Who?\n<image>", "Nobody.")},
            {"id": "43", "image": "42.jpg", "conversations": turns("Who?", "I.", "cut off")},
            {"id": "44", "image": "44.jpg", "conversations": turns("Who?", "I.")}],
        "train2014/COCO_train2014_42.jpg": HERE},
        records=3, media=(1, 1, 0), out=["do not alternate", "file is missing"],
        first=("llava-42-0", "What is it?", ("A cup.",), ["COCO_train2014_42.jpg"])),
    "ocrvqa": Case(files={
        "dataset.json": {
            "0123": {"imageURL": "http://x/y.gif", "questions": ["Who wrote this?", "Is it old?"],
                     "answers": ["A. Nobody", "Yes"], "split": 1},
            "0124": {"imageURL": "http://x/y.jpg", "questions": ["?"], "answers": ["no"],
                     "split": 3},
            "0125": {"imageURL": "http://x/y.jpg", "questions": ["Who?"], "answers": ["I"],
                     "split": 1},
            "0126": {"imageURL": "http://x/y.jpg", "questions": ["Who?"], "answers": [],
                     "split": 1}},
        "images/0123.jpg": HERE, "images/0125.jpg": EMPTY},
        records=2, media=(1, 0, 1), out=["file is empty", "unequal numbers"],
        first=("ocrvqa-0123-0", "Who wrote this?", ("A. Nobody",), ["0123.jpg"])),
    "textvqa": Case(files={
        "TextVQA_0.5.1_val.json": {"data": [
            question("0a", ["halt", *["stop "] * 9], 34602), question("gone", k=2),
            question("0a", [""] * 10, 3)]},
        "train_images/0a.jpg": HERE},
        records=1, media=(1, 1, 0), out=["file is missing", "without an answer"],
        first=("textvqa-34602", "what does it say?", ("halt", *["stop"] * 9), ["0a.jpg"])),
    "flickr30k": Case(files={
        "dataset_flickr30k.json": {"images": [
            {"filename": "10.jpg", "split": "test", "sentences": [{"raw": "A cat."}] * 5},
            {"filename": "11.jpg", "split": "train", "sentences": [{"raw": "A dog."}]},
            {"filename": "12.jpg", "split": "test", "sentences": [{"raw": "A cow."}]}]},
        "Images/10.jpg": HERE},
        records=1, media=(1, 1, 0), out=["file is missing"],
        first=("flickr30k-10", "Describe this image in one short sentence.", ("A cat.",) * 5,
               ["10.jpg"])),
    "gqa": Case(files={
        "questions1.2/testdev_balanced_questions.json": {
            "20001": {"imageId": "n1", "question": "Is it raining?", "answer": "no",
                      "fullAnswer": "No, it is dry.", "types": {"structural": "verify"}},
            "20002": {"imageId": "n2", "question": "Who?", "answer": "a man"}},
        "images/n1.jpg": HERE},
        records=1, media=(1, 1, 0), out=["file is missing"],
        first=("gqa-20001", "Is it raining?", ("no",), ["n1.jpg"])),
    "textcaps": Case(files={
        "TextCaps_0.1_train.json": {"data": [
            {"image_id": "0a", "caption_str": "A sign.", "caption_id": 7},
            {"image_id": "0a", "caption_str": "Red.", "caption_id": 8},
            {"image_id": "gone", "caption_str": "Red.", "caption_id": 9}]},
        "train_images/0a.jpg": HERE},
        records=2, media=(1, 1, 0), out=["file is missing"],
        first=("textcaps-7", "Describe the image.", ("A sign.",), ["0a.jpg"])),
    "msvdqa": Case(files={
        "train_qa.json": [
            {"id": 0, "video_id": 12, "question": "What is a man doing?", "answer": "cook"},
            {"id": 1, "video_id": 13, "question": "who is it?", "answer": "man"},
            {"id": 2, "video_id": 14, "question": "who is it?", "answer": "man"}],
        "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid12\n",
        "YouTubeClips/-4wsuPCjDBc_5_15.avi": HERE, "video13.mp4": HERE},
        records=2, media=(2, 1, 0), out=["file is missing"],
        first=("msvdqa-0", "In the video, what is a man doing?", ("cook",),
               ["-4wsuPCjDBc_5_15.avi"])),
    "nextqa": Case(files={
        "nextqa/test.csv": f"{NEXT}0240,7,3,2,why did he run,2,8,CW,{OPTIONS}\n"
                           f"0241,7,3,2,why did he run,2,8,TP,{OPTIONS}\n"
                           f"0240,7,3,2,where is it,-1,9,DL,{OPTIONS}\n",
        "nextqa/map_vid_vidorID.json": {"0240": "0101/0240", "0241": "0101/0241"},
        "NExTVideo/0101/0240.mp4": HERE},
        records=1, media=(1, 1, 0), out=["file is missing", "without an answer"],
        first=("nextqa-0240_8", "why did he run? Choose one from: " + OPTIONS.replace(",", "; "),
               ("to sing",), ["0240.mp4"])),
    "videochat": Case(files={
        "videochat_instruct_11k.json": [
            {"video": "01/10.mp4", "QA": [{"q": "Describe it.", "a": "A cat."},
                                          {"i": "Be brief.", "q": "Why?", "a": "So."}]},
            {"video": "01/11.mp4", "QA": [{"q": "Describe it.", "a": "A cat."}]}],
        "WebVid/01/10.mp4": HERE},
        records=2, media=(1, 1, 0), out=["file is missing"],
        first=("videochat-10-0", "Describe it.", ("A cat.",), ["10.mp4"])),
    "avsd": Case(files={
        "avsd_val.json": {
            "AB1CD": {"data": said(3), "summary": "never shown", "caption": "never shown"},
            "EF2GH": {"data": {"77": said(2)}, "split": "val"}, "GONE1": {"data": said(10)}},
        "Charades_v1_480/AB1CD.mp4": HERE, "Charades_v1_480/EF2GH.mp4": HERE},
        records=5, media=(2, 1, 0), out=["file is missing"],
        first=("avsd-AB1CD-0", "q0 ?", ("no .",), ["AB1CD.mp4"])),
    "avsd dstc7": Case(split="dstc7-test", files={
        "test_set4DSTC7-AVSD.json": {"dialogs": [
            {"image_id": "AB1CD", "summary": "never shown",
             "dialog": said(3, "__UNDISCLOSED__")}]},
        "Charades_v1_480/AB1CD.mp4": HERE},
        records=2, media=(1, 0, 0), out=["without an answer"],
        first=("avsd-AB1CD-0", "q0 ?", ("no .",), ["AB1CD.mp4"])),
    "ego4d": Case(files={
        "v2/annotations/narration.json": {
            "aa-bb": {"status": "complete", "narration_pass_1": {"narrations": [
                {"timestamp_sec": 1.2, "narration_text": "#C C's hand takes the box #unsure"},
                {"timestamp_sec": 0.3, "narration_text": "#C C opens a box"}]},
                "narration_pass_2": {"narrations": [
                    {"timestamp_sec": 0.4, "narration_text": "#C C opens a box"},
                    {"timestamp_sec": 77.0, "narration_text": "#O O leaves"}]}},
            "cc-dd": {"status": "redacted"},
            "ee-ff": {"narration_pass_1": {"narrations": [
                {"timestamp_sec": 1, "narration_text": "#C C sits"}]}}},
        "v2/ego4d.json": {"videos": [{"video_uid": "aa-bb", "duration_sec": 2.0}]},
        "v2/full_scale/aa-bb.mp4": HERE},
        records=1, media=(1, 0, 0), out=["after the end of its video", "single narration"],
        first=("ego4d-aa-bb_0.00_2.00", "Describe the video in detail.",
               ("The camera wearer opens a box. The camera wearer's hand takes the box.",),
               ["aa-bb.mp4"])),
    "how2": Case(files={
        "dev5/segments": "-bcdefghijk_10 -bcdefghijk 0.90 1.5\n-bcdefghijk_2 -bcdefghijk 0.10 0.8\n"
                         "-bcdefghijk_3 -bcdefghijk 90.0 91.0\n"
                         "-bcdefghijk_4 -bcdefghijk 95.0 96.0\n"
                         "abcdefghijk_0 abcdefghijk 0.5 1.25\nlmnopqrstuv_0 lmnopqrstuv 0.5 1.0\n"
                         "lmnopqrstuv_1 lmnopqrstuv 9.0 9.0\nabcdefghijk_9 no times\n",
        "dev5/text.id.en": b"-bcdefghijk_2 Hi!\n-bcdefghijk_10 It's me.\n-bcdefghijk_3 Late.\n"
                           b"abcdefghijk_0 Cut.\nlmnopqrstuv_0 Gone.\nlmnopqrstuv_1 Never.\n"
                           b"-bcdefghijk_4 Bad \xff.\n",
        "dev5/offsets.bin.bz2": b"a pickle that nobody opens",
        "videos/-bcdefghijk.mp4": HERE, "videos/abcdefghijk_0.5_1.25.mp4": HERE},
        records=3, media=(2, 1, 0), broken=1,
        out=["file is missing", "make no window", "not UTF-8", "is no segment", "without text"],
        first=("how2--bcdefghijk_0.10_1.5", "Transcribe the speech into text, paying attention to "
               "both audio and video.", ("Hi! It's me.",), ["-bcdefghijk.mp4"])),
    "vggss": Case(files={
        "vggss.json": [{"file": "bbbbbbbbbbb_000030", "class": "rain", "bbox": [[0, 0, 1, 1]]},
                       {"file": "-aaaaaaaaaa_000000", "class": "donkey, ass braying"}],
        "video/-aaaaaaaaaa_000000.mp4": HERE},
        records=1, media=(1, 1, 0), out=["file is missing"],
        first=("vggss--aaaaaaaaaa_000000", "What is the source of the sound?",
               ("donkey, ass braying",), ["-aaaaaaaaaa_000000.mp4"])),
    "vggsound": Case(files={
        "vggsound.csv": '-aaaaaaaaaa,30,"bird chirping, tweeting",test\nbbbbbbbbbbb,1,rain,train\n'
                        "ccccccccccc,x,rain,test\nddddddddddd,2,rain,test\n",
        "-aaaaaaaaaa_000030.mp4": HERE},
        records=1, media=(1, 1, 0), out=["file is missing", "no whole second"],
        first=("vggsound--aaaaaaaaaa_000030", "What is the source of the sound?",
               ("bird chirping, tweeting",), ["-aaaaaaaaaa_000030.mp4"])),
    "spokencoco": Case(files={
        "SpokenCOCO/SpokenCOCO_val.json": {"data": [
            {"image": "val2014/C_42.jpg", "captions": [
                {"text": "a cup", "speaker": "m1", "uttid": "m1-H_42_1",
                 "wav": "wavs/val/0/m1-H_42_1.wav"},
                {"text": "cup", "speaker": "m1", "uttid": "m1-H_42_2",
                 "wav": "wavs/val/0/m1-H_42_2.wav"}]}]},
        "SpokenCOCO/wavs/val/0/m1-H_42_1.wav": HERE, "coco/val2014/C_42.jpg": HERE},
        records=1, media=(2, 1, 0), out=["file is missing"],
        first=("spokencoco-m1-H_42_1", "Is the audio describing the image?", ("Yes",),
               ["C_42.jpg", "m1-H_42_1.wav"])),
    "favdbench": Case(files={
        "metadata/test.caption.tsv": 'test/-a.mp4\t[{"caption": "a cat . it meows ."}]\n'
                                     'test/b.mp4\t[{"caption": "a dog ."}]\ntest/c.mp4\tcut of',
        "videos/test/-a.mp4": HERE, "audios/test/-a.mp3": HERE},
        records=1, media=(2, 1, 0), out=["file is missing", "line that is not"],
        first=("favdbench-test/-a.mp4", "Describe the video and the audio in detail.",
               ("a cat . it meows .",), ["-a.mp4", "-a.mp3"])),
    "valor": Case(files={
        "desc_test.json": [{"video_id": "-bcdefghijk_30.000_40.000", "desc": "With a bang."},
                           {"video_id": "-bcdefghijk_30.000_40.000", "desc": "Again."},
                           {"video_id": "a_000_0000_0.000_10.000", "desc": "A cat."},
                           {"video_id": "odd", "desc": "A cat."}],
        "-bcdefghijk_30_40.mp4": HERE, "videos/a_000_0000_0.0_10.0.mp4": HERE},
        records=2, media=(2, 1, 0), out=["file is missing"],
        first=("valor--bcdefghijk_30.000_40.000",
               "Describe the video in one sentence, including what is heard.", ("With a bang.",),
               ["-bcdefghijk_30_40.mp4"])),
    "savebench": Case(files={
        "SAVEBench/flickr30k_captions.json": [
            {**SAVE, "image": "disk/Images/1.jpg", "answer": ["A cat", "Cat"]}],
        "SAVEBench/textvqa.json": [{**SAVE, "image": "0a.jpg", "dataset": "textvqa",
                                    "answer": ["stop"] * 10}],
        "SAVEBench/testdev_balanced_questions_with_images.json": [
            {**SAVE, "image": "n1.jpg", "fullanswer": "It is a cat."}],
        "SAVEBench/nextqa_test.json": [{**SAVE, "image": "1101/25.mp4", "answer": "he ran",
                                        "answer_candidates": OPTIONS.split(",")}],
        "SAVEBench/how2_test.json": [{**SAVE, "image": ["-f_3.3_4.mp4", "-f_3.3_4.wav"]}],
        "SAVEBench/avsd_textformat_subset.json": [
            {"image_name": ["Charades/Y4.mp4", "audios/Y4.wav"],
             "conversation": [["Who?", "A man."], ["Why?", "So."]]}],
        "SAVEBench/testdata_formatted.json": [
            {**SAVE, "image": ["x/y/a_000030.mp4", "x/y/a_000030.wav"], "answer":
             "In this image, the given audio might originates from playing double bass."}],
        "SAVEBench/audiovisualmatching_combined.json": [
            {**SAVE, "image": ["x/a_000030.mp4", "x/-b_000001.wav"], "answer": "No", "text": "t"},
            {**SAVE, "image": ["x/a_000030.mp4", "x/gone_000001.wav"], "answer": "No"},
            {**SAVE, "image": ["val2014/C_4.jpg", "wavs/m1_4_1.wav"], "answer": "Yes"}],
        **dict.fromkeys(("flickr/Images/1.jpg", "t/0a.jpg", "g/n1.jpg", "n/1101/25.mp4",
                         "h/-f_3.3_4.mp4", "h/-f_3.3_4.wav", "c/Y4.mp4", "v/a_000030.mp4",
                         "v/-b_000001.mp4", "c/C_4.jpg", "s/m1_4_1.wav"))},
        records=10, media=(11, 1, 0), out=["file is missing"],
        first=("savebench-ic-00000", "What is it?", ("A cat", "Cat"), ["1.jpg"])),
}


OTHER_SUFFIXES = {                               # of the official ones
    ".mp4": (".MKV", ".webm"), ".avi": (".mp4", ".MOV"), ".jpg": (".JPEG", ".webp"),
    ".wav": (".opus", ".M4A"), ".flac": (".FLAC", ".ogg"), ".mp3": (".m4a", ".OPUS")}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_clips_are_found_by_their_id(case, which, tmp_path, clips):
    """Whatever their suffix, and never what only looks like them."""
    name, about = case.split()[0], CASES[case]
    others = {path: Path(path).with_suffix(OTHER_SUFFIXES[Path(path).suffix][which])
              for path, content in about.files.items() if content is HERE}
    files = {path: content for path, content in about.files.items() if content is not HERE}
    beside = {f"{other.with_suffix('')}{tail}": b"x" for other in others.values() for tail in (
        f"{other.suffix}.part", ".mp4.tmp", ".json", ".srt", "0.mp4", ".en.vtt", "-1.png",
        ".temp.mkv", ".f137.webm")}
    found = {}
    for kind, media in (("official", others), ("other", others.values())):
        there = files | beside | dict.fromkeys(map(str, media), b"x")
        root = lay_out(tmp_path / kind, clips, there)
        found[kind] = list(Files(name, root, about.split).records())
    assert len(found["official"]) == about.records
    for one, other in zip(found["official"], found["other"], strict=True):
        for field in data.MEDIA:
            before, after = getattr(one, field), getattr(other, field)
            assert (before and Path(before).stem) == (after and Path(after).stem)
            assert not before or Path(after).suffix in OTHER_SUFFIXES[Path(before).suffix]
        assert replace(one, image=None, video=None, audio=None) == replace(
            other, image=None, video=None, audio=None)
    lay_out(tmp_path / "none", clips, files | beside)
    with pytest.raises(ValueError, match="media file is"):
        list(Files(name, tmp_path / "none", about.split).records())


def test_which_of_several_files_is_the_clip(tmp_path, clips):
    """The official name, then the order of SUFFIXES, then no suffix; empty files never.  Ids with
    dots are whole, and accents may be stored in two ways."""
    entry = {"class": "rain", "bbox": []}
    names = ("v_abc.def", "v_abc", "v.1_30.000", "both", "cut", "plain", "caf\u00e9", "thumb")
    root = lay_out(tmp_path / "root", clips, {
        "vggss.json": [{"file": name, **entry} for name in names],
        "v_abc.def.mkv": b"x", "video/v_abc.MP4": b"x", "v_abc.ghi.mp4": b"x",
        "v.1_30.000.WebM": b"x", "both.webm": b"xx", "both.mkv": b"x", "both.mp4": EMPTY,
        "cut.mp4.part": b"x", "cut.mkv": EMPTY, "plain": b"x", "cafe\u0301.mov": b"x",
        "thumb.jpg": b"x", "thumb.wav": b"x"})
    lines, out = [], tmp_path / "out.jsonl"
    aveb.prepare("vggss", root, out=out, log=lines.append)
    assert {r.id.removeprefix("vggss-"): str(Path(r.video).relative_to(root))
            for r in data.read_manifest(out)} == {
        "v_abc.def": "v_abc.def.mkv", "v_abc": "video/v_abc.MP4", "v.1_30.000": "v.1_30.000.WebM",
        "both": "both.mkv", "plain": "plain", "caf\u00e9": "cafe\u0301.mov"}
    printed = "\n".join(lines)
    assert "6 found, 1 missing, 1 empty" in printed
    assert "1 clips are there as several files" in printed and "both.mkv, not: " in printed


def test_all_sets_are_here():
    assert len(SETS) == 20 and {name.split()[0] for name in CASES} == set(SETS)


def no_java():
    raise captions.CannotRun("needs Java")


@pytest.mark.parametrize("case", CASES)
def test_prepare_check_eval(case, tmp_path, clips, small_model, monkeypatch):
    name, about, lines = case.split()[0], CASES[case], []
    root = lay_out(tmp_path / "root", clips, about.files)
    manifest = aveb.prepare(name, root, about.split, out=tmp_path / "out.jsonl",
                            log=lines.append)
    printed = "\n".join(lines)
    found, missing, empty = about.media
    assert (f"{about.records} records; media files: {found} found, {missing} missing, "
            f"{empty} empty") in printed
    left_out = next(line for line in lines if line.startswith("left out")).split("; ")
    assert len(left_out) == len(about.out), left_out
    for reason in about.out:
        assert reason in printed, reason

    records = data.read_manifest(manifest)
    first, (identity, prompt, refs, files) = records[0], about.first
    assert (first.id, first.prompt, first.refs) == (identity, prompt, refs)
    media = [path for path in (first.image, first.video, first.audio) if path]
    assert [path.rpartition("/")[2] for path in media] == files
    assert all(r.meta["dataset"] == name and r.meta["metrics"] and "original_id" in r.meta
               and "never shown" not in str(r) for r in records)
    assert f"ids {aveb.ids_hash(records)}" in printed

    broken = about.broken
    assert aveb.check(manifest, workers=1, log=lines.append) == broken
    assert any(f": {broken} broken" in line for line in lines)
    rows, lost = evaluate(small_model, records, None, ("both",), log=lines.append)
    assert len(rows) == len(records) - broken == len(records) - lost.total()
    monkeypatch.setattr(captions, "package_folder", no_java)   # it takes half a minute to load
    for part in tables.by_task(rows).values():
        scores = metrics.score(part, "both")
        assert set(scores) == set(part[0]["meta"]["metrics"])
    assert tables.table(rows, ("both",), lost).count("\n") >= len(scores)


def records_of(tmp_path, clips, case):
    root = lay_out(tmp_path / case, clips, CASES[case].files)
    return list(Files(case.split()[0], root, CASES[case].split).records())


def test_training_sets_train(tmp_path, clips, parts, capsys):
    """train.py on what prepare wrote, all training sets in one manifest."""
    names = ("librispeech", "audiocaps", "llava", "ocrvqa", "textcaps", "msvdqa", "videochat",
             "ego4d", "how2", "avsd", "spokencoco")
    records = [r for name in names for r in records_of(tmp_path, clips, name)]
    data.write_manifest(tmp_path / "train.jsonl", records)
    train.main(train.TrainConfig(
        data=str(tmp_path / "train.jsonl"), out=str(tmp_path / "run"), steps=2, batch=4,
        val_share=0.0, val_every=2, log_every=1, test=False, cache_features=False, workers=0,
        **parts), [])
    assert (tmp_path / "run" / "last" / "favor.json").exists()


def test_what_a_record_keeps(tmp_path, clips):
    llava = records_of(tmp_path, clips, "llava")
    assert [r.id for r in llava] == ["llava-42-0", "llava-42-1", "llava-42.2-0"]
    assert llava[1].history == (("What is it?", "A cup."),) and llava[2].prompt == "Who?"
    assert llava[1].meta | {"dialogue": "42", "turn": 1, "original_id": "42"} == llava[1].meta
    assert llava[2].meta["original_id"] == "42"
    next_one, = records_of(tmp_path, clips, "nextqa")
    assert next_one.options == tuple(OPTIONS.split(",")) and next_one.meta["type"] == "causal"
    text, = records_of(tmp_path, clips, "textvqa")
    assert text.target == "stop" and text.meta["metrics"][0] == "textvqa_soft"
    gqa, = records_of(tmp_path, clips, "gqa")
    assert gqa.meta["type"] == "verify" and gqa.meta["full_answer"] == "No, it is dry."
    assert records_of(tmp_path, clips, "vggss")[0].meta["label"] == "donkey, ass braying"
    assert records_of(tmp_path, clips, "videochat")[1].prompt == "Be brief. Why?"
    assert records_of(tmp_path, clips, "avsd")[-1].id == "avsd-EF2GH-77-1"
    ego, = records_of(tmp_path, clips, "ego4d")
    assert (ego.start, ego.end) == (0, 2)
    how2 = records_of(tmp_path, clips, "how2")
    assert [(r.start, r.end) for r in how2] == [(0.1, 1.5), (90, 91), (None, None)]


def test_savebench(tmp_path, clips):
    """Sound out of the video where the wav is not there; other sound is named."""
    found = {r.id.removeprefix("savebench-"): r for r in records_of(tmp_path, clips, "savebench")}
    assert {r.task for r in found.values()} == set(SAVEBENCH)
    assert found["avsr-00000"].audio.endswith("-f_3.3_4.wav")
    assert found["avsd-00000-1"].audio is None
    assert found["avsd-00000-1"].meta["original_id"] == "Y4"
    assert found["avsd-00000-1"].history == (("Who?", "A man."),)
    assert found["avssd-00000"].meta["label"] == "playing double bass"
    assert found["avm-00000"].audio.endswith("-b_000001.mp4") and "avm-00001" not in found
    assert found["avm-00002"].image and found["avm-00002"].audio.endswith("m1_4_1.wav")
    assert "Choose one from" in found["videoqa-00000"].prompt
    alone = Files("savebench", tmp_path / "savebench", "vqa").records()
    assert [r.id for r in alone] == ["savebench-vqa-00000"]


def test_media_in_another_folder(tmp_path, clips):
    root = lay_out(tmp_path / "a", clips, {
        "test.csv": f"{NEXT}0240,7,3,2,why,2,8,CW,{OPTIONS}\n"})
    other = lay_out(tmp_path / "b", clips, {"0240.mp4": HERE})
    record, = Files("nextqa", root, media=[other]).records()
    assert record.video == str(other / "0240.mp4")


def test_other_layouts(tmp_path, clips):
    """LAVIS's and the token file of Flickr30k, VALOR's ids, FAVDBench's COCO file, Ego4D's v2,
    VGGSound's test.csv, NExT-QA for training."""
    def first(name, split, files):
        root = lay_out(tmp_path / f"{name}{len(list(tmp_path.iterdir()))}", clips, files)
        return next(Files(name, root, split).records())
    flickr = first("flickr30k", "test", {"flickr30k_test.json": [
        {"image": "flickr30k-images/1.jpg", "caption": ["A.", "B."]}],
        "flickr30k-images/1.jpg": HERE})
    assert flickr.refs == ("A.", "B.")
    token = {"results_20130124.token": "1.jpg#0\tA cat .\n1.jpg#1\tA dog .\n", "1.jpg": HERE}
    assert first("flickr30k", "all", token).refs == ("A cat .", "A dog .")
    with pytest.raises(ValueError, match="does not name the images of test"):
        first("flickr30k", "test", token)
    valor = first("valor", "train", {"train_id.json": ["x_1.000_2.000"], "x.mp4": HERE,
                                     "txt_mapper_en.json": {"x_1.000_2.000": ["A cat."]}})
    assert valor.refs == ("A cat.",)
    favd = first("favdbench", "val", {"val.caption_coco_format.json": {
        "annotations": [{"image_id": "val/a.mp4", "caption": "a cat", "id": 0}]}, "a.mp4": HERE})
    assert favd.refs == ("a cat",) and favd.audio is None
    ego = first("ego4d", "train", {"all_narrations_redacted.json": {"videos": {"u": {
        "narrations": [{"text": "#C C sits", "time": 5.0}, {"text": "#O O sits", "time": 9}]}}},
        "full_scale/u.mp4": HERE})
    assert (ego.start, ego.end) == (4, 10)
    assert ego.target == "The camera wearer sits. Another person sits."
    sound = first("vggsound", "test", {"test.csv": 'a_000030.mp4,"a, b"\n', "a_000030.mp4": HERE})
    assert sound.target == "a, b"
    asked = first("nextqa", "train", {"train.csv": f"{NEXT}1,7,3,2,why,2,8,CW,{OPTIONS}\n",
                                      "1.mp4": HERE})
    assert asked.prompt == "why" and asked.target == "to sing"


# ---- windows ------------------------------------------------------------------------------------

def test_how2_merge_rule(tmp_path, clips):
    """The next sentence joins while the pause is <= 2 s and what is there lasts <= 20 s."""
    times = [("0.0", "20.0"), ("22.0", "23.0"), ("24.5", "25.0"), ("27.1", "27.9")]
    files = {"train/segments": "".join(f"v_{k} v {a} {b}\n" for k, (a, b) in enumerate(times)),
             "train/text.id.en": "".join(f"v_{k} T{k}.\n" for k in range(len(times))),
             "v.mp4": HERE}
    root = lay_out(tmp_path, clips, files)
    merged = list(Files("how2", root, "train").records())
    assert [r.target for r in merged] == ["T0. T1.", "T2.", "T3."]
    assert merged[0].meta["segments"] == ["v_0", "v_1"] and merged[0].id == "how2-v_0.0_23.0"
    raw = list(Files("how2", root, "train").records(merge=False))
    assert [r.id for r in raw] == ["how2-v_0", "how2-v_1", "how2-v_2", "how2-v_3"]


def test_ego4d_windows(tmp_path, clips):
    lines = [{"timestamp_sec": t, "narration_text": f"#C C lifts {t}"} for t in range(0, 100, 10)]
    root = lay_out(tmp_path, clips, {"narration.json": {"u": {
        "narration_pass_1": {"narrations": lines[::-1]}}}, "u.mp4": HERE})
    long = list(Files("ego4d", root).records())
    assert [(r.start, r.end) for r in long] == [(0, 21), (29, 51), (59, 81)]
    assert all(r.end - r.start <= 30 for r in long) and long[0].target.count("lifts") == 3
    assert len(list(Files("ego4d", root).records(window=12.0))) == 5


def test_narration():
    assert narration("#C C opens a box #unsure") == "The camera wearer opens a box."
    assert narration("#c  C gives O the C-clamp") == (
        "The camera wearer gives another person the C-clamp.")
    assert narration("#Summary C's dog cleans.") == "The camera wearer's dog cleans."
    assert narration("#unsure") == ""


# ---- what is wrong is said ----------------------------------------------------------------------

ROW = f"0240,7,3,2,why,2,8,CW,{OPTIONS}\n"


@pytest.mark.parametrize(("name", "split", "files", "message"), [
    ("gqa", None, {}, "no testdev_balanced_questions.json there .* get it from cs.stanford.edu"),
    ("gqa", None, {"testdev_balanced_questions.json": EMPTY}, r"empty \(0 bytes\)"),
    ("gqa", None, {"testdev_balanced_questions.json": '{"1": {"ima'}, "not JSON .* cut off"),
    ("gqa", None, {"testdev_balanced_questions.json": b'{"1": "\xff"}'}, "not UTF-8"),
    ("gqa", None, {"testdev_balanced_questions.json": [{"image": "n1.jpg"}]},
     "holds a list, another project's version; wanted the official file"),
    ("gqa", None, {"testdev_balanced_questions.json": {"1": {"question": "Who?"}}},
     "after record 0: not as expected .KeyError: 'imageId'.; wanted the official file"),
    ("gqa", None, {"testdev_balanced_questions.json": {}}, "no entries for gqa"),
    ("gqa", "test_balanced", {"test_balanced_questions.json": {
        "1": {"imageId": "n1", "question": "Who?"}}, "n1.jpg": HERE}, "test files without answers"),
    ("gqa", "test", {}, "gqa has no split 'test'; there are testdev_balanced"),
    ("gqb", None, {}, "unknown set 'gqb'; there are librispeech"),
    ("textvqa", "test", {"TextVQA_0.5.1_test.json": {"data": [{
        "question_id": 1, "image_id": "a", "question": "what?"}]}, "test_images/a.jpg": HERE},
     "test files without answers cannot be scored"),
    ("textcaps", "test", {"TextCaps_0.1_test.json": {"data": [{"image_id": "a"}]}},
     "test files without answers cannot be scored"),
    ("nextqa", None, {"test.csv": (NEXT + ROW).replace("answer,", "").replace("2,8", "8")},
     "no column answer, its header is video,"),
    ("nextqa", None, {"test.csv": EMPTY}, "its header is empty"),
    ("nextqa", None, {"test.csv": NEXT + ROW},
     "1 x record whose media file is missing .*NExTVideo/0240.mp4.* looked for below .*--media"),
    ("audiocaps", None, {"dataset2.0/test.csv":
                         "audiocap_id,youtube_id,start_time,caption\n1,a,0,a dog\n"},
     "AudioCaps 2.0"),
    ("how2", None, {"dev5/segments": "v_0 v 0.0 1.0\n", "dev5/offsets.bin.bz2": EMPTY},
     "text.id.en: not there; .*a pickle, which is never read"),
    ("librispeech", None, {"train-clean-100/1/2/1-2.trans.txt": "1-2-0 A\n"},
     "no test-clean/.*openslr.org/12"),
    ("ocrvqa", None, {"dataset.json": [{"sample_id": 1}]}, "holds a list"),
    ("avsd", None, {"avsd_val.json": {"AB1CD": {"data": [{"question": "Who?"}]}}}, "KeyError"),
    ("gqa", None, {"testdev_balanced_questions.json": "<!DOCTYPE html><html>"}, "a web page"),
    ("gqa", None, {"testdev_balanced_questions.json": '{"1": {}, "1": {}}'},
     "balanced_questions.json: the key '1' stands twice in one object"),
    ("gqa", None, {"testdev_balanced_questions.json": "[" * 9999}, "recursion"),
    ("gqa", None, {"testdev_balanced_questions.json": '{"1": ' + "9" * 9999}, "limit"),
    ("nextqa", None, {"test.csv": "<html>\n</html>\n"}, "no column .*its header is <html>"),
    ("nextqa", None, {"test.csv": (NEXT + ROW).encode("utf-16")}, "test.csv: UTF-16; save it as"),
    ("nextqa", None, {"test.csv": (NEXT + ROW).replace("a1", "a0")}, "a column stands twice"),
    ("audiocaps", None, {"test.csv": "audiocap_id;youtube_id;start_time;caption\n1;a;0;Dog\n"},
     "no column .*its header is audiocap_id;"),
    ("ego4d", None, {"narration.json": {"u": {"narration_pass_1": {"narrations": [
        {"timestamp_sec": 1e999, "narration_text": "#C C sits"}]}}}}, "not as expected|no entries"),
])
def test_wrong_files(tmp_path, clips, name, split, files, message):
    lay_out(tmp_path, clips, files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        aveb.prepare(name, tmp_path, split, out=tmp_path / "out.jsonl", log=lambda _: None)
    assert not (tmp_path / "out.jsonl").exists()


def test_odd_rows_take_only_themselves(tmp_path, clips):
    """A BOM, empty lines, short rows, numbers and nothing instead of texts, what no file can hold;
    the reasons name the first of them, with its line."""
    def prepared(name, files, split=None):
        root, lines = lay_out(tmp_path / f"{len(list(tmp_path.iterdir()))}", clips, files), []
        out = aveb.prepare(name, root, split, out=root / "out.jsonl", log=lines.append)
        return data.read_manifest(out), "\n".join(lines)
    rows = f"{ROW}0240,too,short\n\n{ROW.replace(',8,', ',9,')}{ROW}0240,7,3,2,\xe9,2\n"
    records, printed = prepared("nextqa", {
        "test.csv": b"\xef\xbb\xbf" + (NEXT + "\n" + rows).encode("latin-1"), "0240.mkv": b"x"})
    assert [r.id for r in records] == ["nextqa-0240_8", "nextqa-0240_9"]
    assert "row without 13 columns (first: " in printed and "test.csv, line 4)" in printed
    assert "line that is not UTF-8 (first: " in printed and "test.csv, line 8)" in printed
    assert "1 x record with an id that was there before (first: 0240_8)" in printed
    text = json.dumps({"data": [
        question("0a", ["4", 4, None, 4.5], 1), {**question("0a", k=2), "question": None},
        {**question("0a", k=3), "question": 77}, question("0a", ["a\0b"], 4),
        question("0a", ["\ud800"], 5), question("0a", ["NAN"], 6)]}).replace('"NAN"', "NaN")
    records, printed = prepared("textvqa", {
        "TextVQA_0.5.1_val.json": b"\xef\xbb\xbf" + text.encode(), "0a.png": b"x"})
    assert [(r.prompt, r.refs[:3]) for r in records] == [
        ("what does it say?", ("4", "4", "4.5")), ("77", ("stop",) * 3)]
    assert "2 x record that no manifest can hold (first: 4: a text holds the char" in printed
    assert "1 x record without a question (first: 2)" in printed
    assert "1 x record without an answer (first: 6)" in printed


def test_a_folder_in_the_place_of_the_manifest(tmp_path, clips, capsys):
    with pytest.raises(ValueError, match="a folder; wanted the name of the manifest"):
        aveb.prepare("gqa", tmp_path, out=tmp_path)
    assert command.main(["check", str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_wrong_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Files("gqa", tmp_path / "nowhere")


# ---- check --------------------------------------------------------------------------------------

@pytest.fixture
def manifest(tmp_path, clips):
    """Twenty clips, three questions about the first; clip 7 is cut off, clip 8 starts too late."""
    files = [tmp_path / f"{k}.wav" for k in range(20)]
    for path in files:
        shutil.copy(clips[".wav"], path)
    files[7].write_bytes(files[7].read_bytes()[:20])
    records = [data.Record(f"r{k}", "asr", "What?", "this", audio=str(path),
                           start=50 if k == 8 else None, end=60 if k == 8 else None)
               for k, path in enumerate([*files, files[0], files[0]])]
    data.write_manifest(tmp_path / "m.jsonl", records)
    return tmp_path / "m.jsonl"


def counted(monkeypatch):
    read, load = [], data.load_clip
    monkeypatch.setattr(data, "load_clip", lambda r, **o: (read.append(r.id), load(r, **o))[1])
    return read


def test_check_resumes(manifest, monkeypatch):
    read, lines = counted(monkeypatch), []
    assert aveb.check(manifest, 1, lines.append) == 2
    assert len(read) == 20                                  # a clip is read once
    printed = "\n".join(lines)
    assert "22 records about 20 clips" in printed and ": 2 broken (2 records)" in printed
    assert "7.wav" in printed and "start 50" in printed and "2.0 s median" in printed
    assert sum(line.startswith("  r") for line in lines) == 10

    progress = manifest.with_name("m.jsonl.check.jsonl")
    kept = progress.read_text()
    odd = ['{"clip": ["x"]}', '{"clip": "x", "seconds": null}', kept.split('"seconds"')[0] + "}"]
    progress.write_text("\n".join([*odd, kept[:len(kept) // 2]]))    # killed while it wrote a line
    read.clear()
    assert aveb.check(manifest, 1, lines.append) == 2
    assert 8 <= len(read) <= 12
    assert sorted(progress.read_text().splitlines()) == sorted(kept.splitlines())

    read.clear()
    shutil.copy(manifest.with_name("0.wav"), manifest.with_name("7.wav"))
    assert aveb.check(manifest, 1, lines.append) == 1 and read == ["r7"]


@pytest.mark.parametrize("named, wrong", [
    (["exact", "nonsense"], "r: no metric 'nonsense'; there are .*exact"),
    ("exact", "metrics 'exact' in meta, wanted a list"), (["choice", 3], "metrics .*wanted a list"),
    ([], ""), (None, "")])
def test_names_of_metrics_are_checked_before_clips_are(tmp_path, named, wrong):
    record = {"id": "r", "task": "vqa", "prompt": "?", "target": "yes", "image": "none.png",
              "meta": {"metrics": named}}
    (tmp_path / "m.jsonl").write_text(f"\n{json.dumps(record)}\n")
    if not wrong:
        assert aveb.check(tmp_path / "m.jsonl", 1, lambda *_: None) == 1   # no such picture
        return
    with pytest.raises(ValueError, match=f"m.jsonl, line 2: {wrong}"):
        aveb.check(tmp_path / "m.jsonl", 1, lambda *_: None)
    with pytest.raises(SystemExit, match=f"m.jsonl, line 2: {wrong}"):
        evaluation.find_questions(evaluation.EvalConfig(data=str(tmp_path / "m.jsonl")))


CHOICE = {"options": ["to eat", "To sing!"], "meta": {"metrics": ["choice", "choice_lenient"]}}


@pytest.mark.parametrize("fields, wrong", [
    ({}, "neither target nor refs to score against"), ({"refs": []}, "neither target nor refs"),
    ({"target": "B", **CHOICE}, "the right answer 'B' is none of the options"),
    ({"target": "to eat", "refs": ["to sleep"], **CHOICE}, "'to sleep' is none of the options"),
    ({"target": "to sing", **CHOICE}, ""), ({"target": "B", "options": ["to eat"]}, "")])
def test_what_cannot_be_scored_is_named_with_its_line(tmp_path, fields, wrong):
    """Also where the record is of a task that is not asked for."""
    good = {"id": "a", "task": "vqa", "prompt": "?", "target": "yes"}
    rows = [good, {"id": "b", "task": "videoqa", "prompt": "?", **fields}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    config = evaluation.EvalConfig(data=str(tmp_path / "m.jsonl"), task="vqa")
    if not wrong:
        assert [r.id for r in evaluation.find_questions(config)[1]] == ["a"]
        return
    with pytest.raises(SystemExit, match=f"m.jsonl, line 3: b: .*{wrong}"):
        evaluation.find_questions(config)


def test_check_on_two_cores(manifest, capsys):
    lines = []
    assert aveb.check(manifest, 2, lines.append) == 2
    assert command.main(["check", str(manifest)]) == 1
    assert "20 of 20 clips were checked before" in capsys.readouterr().out


def test_a_check_outlives_one_odd_file(manifest, monkeypatch):
    def explode(record, **_):
        raise IndexError("odd")
    monkeypatch.setattr(data, "load_clip", explode)
    lines = []
    assert aveb.check(manifest, 1, lines.append) == 20
    assert "IndexError: odd" in "\n".join(lines) and "  and 10 more" in lines


# ---- subsets ------------------------------------------------------------------------------------

def questions(n, **rest):
    return [data.Record(f"x-{k}", "vqa", "Who?", "I", **rest) for k in range(n)]


def test_subset_hangs_on_ids_alone():
    records = questions(100)
    drawn = aveb.subset(records, 10, seed=3)
    again = aveb.subset(records[::-1], 10, seed=3)
    assert len(drawn) == 10 and {r.id for r in drawn} == {r.id for r in again}
    assert aveb.ids_hash(drawn) == aveb.ids_hash(again) and len(aveb.ids_hash(drawn)) == 12
    assert aveb.ids_hash(drawn) != aveb.ids_hash(aveb.subset(records, 10, seed=4))
    assert [r.id for r in drawn] == [r.id for r in records if r in drawn]     # the order stays
    fewer = aveb.subset([r for r in records if r.id != drawn[0].id], 10, seed=3)
    assert len({r.id for r in fewer} & {r.id for r in drawn}) == 9            # a missing clip
    assert len(aveb.subset(records, 1000)) == 100


def test_subset_keeps_dialogues_and_hours():
    records = [data.Record(f"x-{d}-{k}", "avsd", "?", "!", meta={"dialogue": f"{d}", "turn": k})
               for d in range(20) for k in range(1 + d % 3)]
    drawn = aveb.subset(records, 5, seed=0)
    whole = {r.meta["dialogue"] for r in drawn}
    assert len(whole) == 5
    assert drawn == [r for r in records if r.meta["dialogue"] in whole]
    windows = questions(100, video="v.mp4", start=10.0, end=46.0)
    assert len(aveb.subset(windows, hours=0.1)) == 10
    with pytest.raises(ValueError, match="has no window of time"):
        aveb.subset(questions(3), hours=1)


# ---- command line -------------------------------------------------------------------------------

def test_command_line(tmp_path, clips, monkeypatch, capsys):
    root = lay_out(tmp_path / "root", clips, {
        "testdev_balanced_questions.json": {str(k): {
            "imageId": "n1", "question": "Who?", "answer": "I"} for k in range(9)},
        "images/n1.jpg": HERE})
    monkeypatch.chdir(tmp_path)
    assert command.main(["prepare", "gqa", "--root", str(root), "--sample", "4"]) == 0
    printed = capsys.readouterr().out
    assert "gqa-testdev_balanced.jsonl: 4 records, ids " in printed
    assert "4 records about 1 clips" in printed and ": 0 broken" in printed
    assert command.main(["subset", "gqa-testdev_balanced.jsonl", "--n", "2"]) == 0
    assert "gqa-testdev_balanced-2-0.jsonl: 2 records" in capsys.readouterr().out
    (root / "images" / "n1.jpg").write_bytes(b"no picture")
    assert command.main(["prepare", "gqa", "--root", str(root)]) == 1
    printed = capsys.readouterr().out
    assert ": 1 broken (9 records)" in printed and "  broken: " in printed and "n1.jpg" in printed
    assert command.main(["prepare", "gqa", "--root", str(root), "--no-check"]) == 0
    assert command.main(["prepare", "vggss", "--root", str(root)]) == 2
    assert "python -m aveb: error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["prepare", "gqa", "--root", str(root), "--no-merge"])
    assert "--merge means nothing to gqa" in capsys.readouterr().err


def test_list_and_help_teach(capsys):
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in SETS) and "openslr.org/12" in printed
    for words, wanted in ((["--help"], "nothing is fetched"),
                          (["prepare", "--help"], "may be given several times")):
        with pytest.raises(SystemExit) as error:
            command.main(words)
        assert error.value.code == 0 and wanted in capsys.readouterr().out
