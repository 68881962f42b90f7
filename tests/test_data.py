"""data.py: manifests, the clips of their records, and what training mixes into them."""

import json
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from media_files import click_track, encode, numbered, numbers, onset

import data
from data import (
    Features,
    Mixing,
    Record,
    clip_from_path,
    drawn_mask,
    find_manifest,
    load_clip,
    load_or_skip,
    mix,
    read_manifest,
    report_skipped,
    write_manifest,
)
from runtime.media import MediaError, write_png, write_video, write_wav

# ---------------------------------------- clips

@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    frames = np.stack([numbered(n) for n in range(125)])
    write_video(folder / "av.mp4", frames, 25, click_track(5, 2.5))
    write_video(folder / "silent.mp4", frames, 25)
    write_wav(folder / "a.wav", click_track(3, 1.5))
    write_png(folder / "i.png", numbered(77))
    return folder


def ask(**fields):
    return Record(id="1", task="vqa", prompt="What?", **{k: str(v) if k in data.MEDIA else v
                                                         for k, v in fields.items()})


def test_every_combination_of_media(media):
    both = load_clip(ask(video=media / "av.mp4"))
    assert numbers(both.frames) == [0, 12, 25, 37, 50, 62, 75, 87, 100, 112]
    assert len(both.audio) == 80000 and both.seconds == 5   # AAC's padding is cut with the picture
    assert abs(onset(both.audio) - 40000) <= 160
    silent = load_clip(ask(video=media / "silent.mp4"))
    assert torch.equal(silent.frames, both.frames) and silent.audio is None
    other = load_clip(ask(video=media / "av.mp4", audio=media / "a.wav"))
    assert len(other.audio) == 48000 and abs(onset(other.audio) - 24000) <= 160
    sound = load_clip(ask(audio=media / "a.wav"))
    assert sound.frames is None and sound.seconds == 3 and not sound.is_image
    taken = load_clip(ask(audio=media / "av.mp4"))
    assert taken.frames is None and abs(onset(taken.audio) - 40000) <= 160
    spoken = load_clip(ask(image=media / "i.png", audio=media / "a.wav"))
    assert spoken.is_image and numbers(spoken.frames) == [77] and spoken.seconds == 3
    text = load_clip(ask())
    assert text.frames is None and text.audio is None and text.seconds == 0


def test_window_holds_for_picture_and_sound(media):
    clip = load_clip(ask(video=media / "av.mp4", start=1.5, end=3.0))
    assert numbers(clip.frames) == [37, 50, 62] and len(clip.audio) == 24000
    assert abs(onset(clip.audio) - 16000) <= 160
    clip = load_clip(ask(video=media / "av.mp4", start=2.0), max_seconds=1.0)
    assert len(clip.frames) == 2 and len(clip.audio) == 16000
    assert abs(onset(clip.audio) - 8000) <= 160
    assert len(load_clip(ask(audio=media / "a.wav"), max_seconds=1).audio) == 16000
    clip = load_clip(ask(video=media / "av.mp4", end=99.0), fps=1, size=64)
    assert clip.frames.shape == (5, 3, 64, 64) and len(clip.audio) == 80000 and clip.seconds == 5


def test_clip_from_path(media):
    assert clip_from_path(media / "av.mp4", start=1, end=2).frames.shape[0] == 2
    assert clip_from_path(media / "a.wav").frames is None
    clip = clip_from_path(media / "i.png", audio=media / "a.wav")
    assert clip.is_image and len(clip.audio) == 48000
    with pytest.raises(MediaError, match="pass one"):
        clip_from_path(media / "a.wav", audio=media / "a.wav")


# ---------------------------------------- hard cases

def test_errors_name_the_file_and_say_why(media, tmp_path):
    whole = (media / "av.mp4").read_bytes()
    files = {"empty.mp4": b"", "text.mp4": b"This is no video at all.\n" * 50,
             "noise.jpg": bytes(range(256)) * 9, "no_moov.mp4": whole[:len(whole) // 2],
             "header.mp4": whole[:40]}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    cases = [
        (ask(video=tmp_path / "missing.mp4"), "no such file"),
        (ask(audio=tmp_path / "missing.wav"), "no such file"),
        (ask(video=tmp_path), "not readable"),
        (ask(video=tmp_path / "empty.mp4"), "0 bytes"),
        (ask(video=tmp_path / "text.mp4"), "not readable"),
        (ask(image=tmp_path / "text.mp4"), "not readable"),
        (ask(video=tmp_path / "no_moov.mp4"), "not readable"),
        (ask(video=tmp_path / "header.mp4"), "not readable"),
        (ask(image=tmp_path / "noise.jpg"), "no picture can be decoded"),
        (ask(image=media / "av.mp4"), "under 'video'"),
        (ask(video=media / "i.png"), "under 'image'"),
        (ask(image=media / "a.wav"), "no video stream, it holds audio"),
        (ask(video=media / "a.wav"), "no video stream, it holds audio"),
        (ask(audio=media / "silent.mp4"), "no audio stream, it holds video"),
        (ask(audio=media / "i.png"), "no audio stream"),
        (ask(video=media / "av.mp4", start=7.0), "beyond its end"),
        (ask(audio=media / "a.wav", start=7.0), "beyond its end"),
        (ask(video=media / "av.mp4", start=2.0, end=1.0), "0 <= start < end")]
    skipped = []
    for record, reason in cases:
        path = record.video or record.image or record.audio
        with pytest.raises(MediaError, match=reason) as error, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_clip(record)
        assert str(error.value).startswith(path), error.value
        assert load_or_skip(record, skipped) is None
    assert load_or_skip(ask(video=media / "av.mp4"), skipped) is not None
    assert len(skipped) == len(cases)
    line = report_skipped(skipped, 500)
    assert line.startswith(f"skipped {len(cases)} of 500: 1: ") and "no such file" in line
    assert line.endswith(f"and {len(cases) - 3} more") and report_skipped([], 5) == "skipped 0 of 5"


def test_broken_packets_are_left_out(media, tmp_path):
    content = bytearray((media / "av.mp4").read_bytes())
    data_box = content.index(b"mdat")
    for i in range(data_box + 3000, data_box + 3400):
        content[i] = 0xA5
    (tmp_path / "b.mp4").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = load_clip(ask(video=tmp_path / "b.mp4"))
    assert len(clip.frames) == 10 and len(clip.audio) == 80000


def without(path, codec, copy):
    """The file with another name for a codec, which FFmpeg does not know."""
    content = path.read_bytes()
    assert codec in content
    copy.write_bytes(content.replace(codec, codec[:-1] + b"?"))
    return copy


def test_a_part_that_fails_takes_only_itself(media, tmp_path):
    """Sound that is missing in the window, an empty track, a codec that nobody knows."""
    frames = np.stack([numbered(n) for n in range(125)])
    write_video(tmp_path / "short.mp4", frames, 25, click_track(2, 1.0))
    write_video(tmp_path / "long.mp4", frames[:50], 25, click_track(5, 4.0))
    with av.open(str(tmp_path / "mute.mp4"), "w") as container, \
            av.open(str(media / "av.mp4")) as source:
        picture = container.add_stream_from_template(source.streams.video[0])
        container.add_stream("aac", rate=16000, layout="mono")                # stays empty
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = picture
                container.mux(packet)
    known = encode(tmp_path / "known.mkv", range(125), Fraction(1, 25), audio=click_track(5, 2.5))
    no_sound = [ask(video=tmp_path / "short.mp4", start=3.0, end=4.0),
                ask(video=without(known, b"A_AAC", tmp_path / "codec.mkv"), end=1.0),
                ask(video=media / "silent.mp4", audio=media / "a.wav", start=3.5, end=4.5),
                ask(video=tmp_path / "mute.mp4", end=1.0)]
    for record in no_sound:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clip = load_clip(record)
        assert len(clip.frames) == 2 and clip.audio is None, record
        told = [str(w.message) for w in caught]
        if record.video != str(tmp_path / "mute.mp4") or told:
            assert any("used without sound" in text for text in told), (record, told)
    no_picture = [ask(video=without(known, b"V_MPEG4/ISO/AVC", tmp_path / "blind.mkv"),
                      end=3.0),
                  ask(video=tmp_path / "long.mp4", start=2.5, end=4.5)]
    for record in no_picture:
        with pytest.warns(UserWarning, match="used without pictures"):
            clip = load_clip(record)
        assert clip.frames is None and len(clip.audio) == 16000 * (record.end - (record.start or 0))
    nothing = without(tmp_path / "codec.mkv", b"V_MPEG4/ISO/AVC", tmp_path / "none.mkv")
    for record in (ask(video=nothing), ask(video=tmp_path / "long.mp4", start=9.0),
                   ask(video=media / "av.mp4", audio=tmp_path / "missing.wav"),
                   ask(video=media / "av.mp4", audio=media / "silent.mp4"),
                   ask(image=media / "i.png", audio=nothing)):
        skipped = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clip = load_or_skip(record, skipped)
        if record.image:
            assert len(clip.frames) == 1 and clip.audio is None
        else:
            assert clip is None and len(skipped) == 1, record


# ---------------------------------------- manifests

def test_manifest_round_trip(tmp_path):
    records = [Record("1", "vqa", "Wie heißt er?", "Jörg", start=1.5, end=2,
                      video=str(tmp_path / "clips/a.mp4"),
                      refs=("Jörg", "er"), options=("a", "b"), history=(("q", "a"),),
                      meta={"fold": 1}),
               Record("2", "asr", "", "", audio="/elsewhere/b.wav"), Record("3", "chat", "Hi")]
    write_manifest(tmp_path / "m.jsonl", records)
    assert read_manifest(tmp_path / "m.jsonl") == records
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert rows[0]["video"] == "clips/a.mp4" and rows[1]["audio"] == "/elsewhere/b.wav"
    assert rows[2] == {"id": "3", "task": "chat", "prompt": "Hi"}
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "m.jsonl").rename(moved / "m.jsonl")
    assert read_manifest(moved / "m.jsonl")[0].video == str(moved / "clips/a.mp4")


GOOD = '{"id": "1", "task": "t", "prompt": "p"}'


@pytest.mark.parametrize("line, reason", [
    ("{", "not JSON"), ("[1]", "a list"), (b"\xff\xfe", "not UTF-8"), (GOOD, "taken by line 1"),
    ('{"id": "2", "task": "t"}', "missing.*prompt"),
    ('{"id": null, "task": "t", "prompt": "p"}', "missing.*id"),
    ('{"id": 2, "task": "t", "prompt": "p"}', "id is 2, wanted a string"),
    *((f'{{"id": "2", "task": "t", "prompt": "p", {extra}}}', reason) for extra, reason in [
        ('"vdeo": "a"', "unknown.*vdeo"), ('"start": "1"', "start is '1', wanted seconds"),
        ('"start": 2, "end": 2', "not after start"), ('"end": 0', "not after start"),
        ('"start": NaN', "start is nan"), ('"start": -1', "start is -1"),
        ('"end": true', "end is True"), ('"refs": "a"', "refs is 'a', wanted a list"),
        ('"options": [1]', "options is"), ('"history": [["q"]]', "history is"),
        ('"meta": []', "meta is"), ('"video": ""', "video is ''"),
        ('"video": ["a", "b"]', "video is"), ('"video": "a", "image": "b"', "use only one")])])
def test_manifest_errors_name_file_and_line(tmp_path, line, reason):
    path = tmp_path / "m.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(GOOD.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"m.jsonl, line 3: .*{reason}"):
        read_manifest(path)


def test_manifest_missing_or_empty(tmp_path):
    with pytest.raises(ValueError, match="nope.jsonl.*No such file"):
        read_manifest(tmp_path / "nope.jsonl")
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="m.jsonl: no records"):
        read_manifest(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="no records"):
        write_manifest(tmp_path / "m.jsonl", [])


def test_find_manifest(tmp_path):
    (tmp_path / "test.jsonl").write_text(GOOD + "\n")
    assert find_manifest(tmp_path, "test") == tmp_path / "test.jsonl"
    assert find_manifest(f"{tmp_path}/test.jsonl", "train") == tmp_path / "test.jsonl"
    with pytest.raises(ValueError, match="train.jsonl: no such manifest; name a .jsonl file or a "
                                         "folder with train.jsonl"):
        find_manifest(tmp_path, "train")
    with pytest.raises(ValueError, match="own.jsonl: no such manifest"):
        find_manifest(tmp_path / "own.jsonl", "test")
    assert [path.name for path in tmp_path.iterdir()] == ["test.jsonl"]     # nothing was made


# ---------------------------------------- mixing

def test_masks_are_drawn_at_their_rate():
    drawn = [drawn_mask(Mixing(mask_share=0.3), g) for g in range(4000)]
    assert drawn == [drawn_mask(Mixing(mask_share=0.3), g) for g in range(4000)]
    assert np.mean([mask is not None for mask in drawn]) == pytest.approx(0.3, abs=0.03)
    for mask in ("audio", "visual", "both"):
        assert np.mean([m == mask for m in drawn]) == pytest.approx(0.1, abs=0.02)
    assert not any(drawn_mask(Mixing(), g) for g in range(200))
    assert drawn != [drawn_mask(Mixing(seed=1, mask_share=0.3), g) for g in range(4000)]
    assert drawn_mask(Mixing(mask="audio"), 0) == "audio"


SEEN, HEARD = torch.zeros(2, 3, 4), torch.ones(5, 6)
SPEECH = Record("s", "asr", "Transcribe the speech.", "Red ball.", audio="a.wav")


def mixes(record, parts, n=2000, sound=HEARD, **shares):
    return [mix(Mixing(**shares), g, record, parts, lambda rng: (SPEECH, sound)) for g in range(n)]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_random_pairs(kind):
    """Half are asked both questions, a quarter each one of them; always with the other sound."""
    record = Record("v", "vqa", "What is shown?", "A cone.", **{kind: "x"})
    silent = Features(SEEN, None, kind == "image")
    made = mixes(record, silent, pair_share=0.4)
    paired = [m for m in made if m[2].audio is HEARD]
    assert len(paired) / len(made) == pytest.approx(0.4, abs=0.04)
    assert all(m == (record.prompt, record.target, silent) for m in made if m[2].audio is None)
    both = {f"In the {kind}, what is shown, and transcribe the speech.": "A cone, and red ball.",
            f"Transcribe the speech, and in the {kind}, what is shown?": "Red ball, and a cone."}
    asked = {prompt: [m for m in paired if m[0] == prompt]
             for prompt in (*both, record.prompt, SPEECH.prompt)}
    assert sum(map(len, asked.values())) == len(paired)
    for prompt, found in asked.items():
        assert len(found) / len(paired) == pytest.approx(0.25, abs=0.05), prompt
        wanted = both.get(prompt) or (record.target if prompt == record.prompt else SPEECH.target)
        assert {target for _, target, _ in found} == {wanted}
    alone = mixes(record, silent, pair_share=1.0, join_share=0.0)
    assert {m[0] for m in alone} == {record.prompt, SPEECH.prompt}


def test_matching_questions():
    record = Record("v", "avssd", "What sounds?", "A bell.", video="x")
    own = Features(SEEN, HEARD * 2)
    made = mixes(record, own, match_share=0.3, pair_share=1.0)
    matching = [m for m in made if m[0] != record.prompt]
    assert len(matching) / len(made) == pytest.approx(0.3, abs=0.03)
    assert {m[0] for m in matching} == {*data.MATCH_PROMPTS}
    for prompt, target, parts in matching:
        assert target == ("Yes" if parts.audio is own.audio else "No") and prompt != record.prompt
    assert np.mean([m[1] == "Yes" for m in matching]) == pytest.approx(0.5, abs=0.06)


def test_what_stays_as_it_is():
    """Sound alone, an image with its own sound, a dialogue, a partner that cannot be read."""
    every = {"pair_share": 1.0, "match_share": 1.0}
    silent, own = Features(SEEN, None), Features(SEEN, HEARD)
    still = Record("i", "isqa", "?", "x", image="x", audio="y")
    talk = Record("d", "avsd", "?", "x", video="x", history=(("a", "b"),))
    film = Record("v", "vqa", "?", "x", video="x")
    for record, parts in ((SPEECH, Features(None, HEARD)), (still, own), (talk, silent)):
        assert all(m == (record.prompt, record.target, parts)
                   for m in mixes(record, parts, n=20, **every))
    unread = mixes(film, silent, n=20, sound=None, **every)
    assert all(m == ("?", "x", silent) for m in unread)
