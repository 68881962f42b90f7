"""The miniature: the questions' answers worked out again from what is seen and heard, what is held
out, how the answers are spread, and the files as data.py reads them."""

import collections
import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

import data
from miniature import generate, scenes, world
from runtime.media import write_video

COLOURS, SHAPES = list(world.COLOURS), list(world.SHAPES)


def scenes_of(kind, split, n=200, seed=0):
    """n scenes of one kind, nothing of them drawn."""
    for index in range(n):
        yield scenes.SCENES[kind](np.random.default_rng([seed, index]), split)


def of_task(kind, split, task, n=200):
    """(scene, prompt, target, extras) of every question of one task."""
    for scene in scenes_of(kind, split, n):
        for name, prompt, target, extras in scene.questions:
            if name == task:
                yield scene, prompt, target, extras


def pairs_in(words):
    """The colours with a shape right behind them."""
    return [(a, b) for a, b in zip(words, words[1:], strict=False) if a in COLOURS and b in SHAPES]


def all_texts(scene):
    """Everything that is seen, said, asked or answered, as lists of words."""
    for seen, heard in scene.facts:
        yield seen
        assert isinstance(heard, list | dict)
    for answer in ("yes", "no") if scene.facts and isinstance(scene.facts[0][1], dict) else ():
        yield [word for _, heard in scene.facts for word in heard[answer]]
    for _, prompt, target, extras in scene.questions:
        for text in (prompt, target, *(t for turn in extras.get("history", ()) for t in turn)):
            yield re.findall(r"\w+", text)


def shown(scene):
    """What each frame shows, as (colour, shape)."""
    return [tuple(seen[:2]) for seen, _ in scene.facts]


# ---- the answers, from the facts ----------------------------------------------------------------

def test_videoqa_asks_for_a_neighbour():
    across = []
    for scene, prompt, target, extras in of_task("parade", "test", "videoqa"):
        objects = list(dict.fromkeys(shown(scene)))
        asked, when, thing = re.match(r"What (\w+) comes right (\w+) the (\w+) object",
                                      prompt).groups()
        event = next(k for k, pair in enumerate(objects) if thing in pair)
        other = event + (1 if when == "after" else -1)
        attribute = ("colour", "shape").index(asked)
        assert target == objects[other][attribute]
        listed = re.search(r"Choose one from: (.*)\.$", prompt).group(1).split(", ")
        assert listed == extras["options"] and listed.count(target) == 1
        assert sorted(listed) == sorted(o[attribute] for k, o in enumerate(objects) if k != event)
        # the cut between the two, and the windows of the frames on its sides
        cut = shown(scene).index(objects[max(event, other)])
        same_window = (cut - 1) // world.WINDOW == cut // world.WINDOW
        assert extras["one_window"] == same_window and extras["type"] == when
        across.append(not same_window)
        assert len(scene.facts) == world.FRAMES and len(objects) == 5
    # enough of both kinds to score them apart
    assert 0.1 < np.mean(across) < 0.6


def test_avsd_asks_what_is_seen_at_a_sound():
    across = []
    for scene, prompt, target, extras in of_task("concert", "test", "avsd"):
        heard = {h[0]: frame for frame, (_, h) in enumerate(scene.facts) if h}
        colours = [colour for colour, _ in shown(scene)]
        assert all(a != b for a, b in zip(colours, colours[1:], strict=False))
        assert extras["history"][0] == ("Which sounds are heard?", ", ".join(heard))
        frame = heard[re.search(r"(?:at|after) the (\w+)\?", prompt).group(1)]
        if extras["type"] == "after":
            before, told = extras["history"][1]
            frame_before = heard[re.search(r"at the (\w+)\?", before).group(1)]
            assert told == colours[frame_before] and target == colours[frame + 1]
            assert frame_before != frame                # what was told is no help
            assert extras["one_window"] == ((frame + 1) % world.WINDOW != 0)
            across.append(not extras["one_window"])
        else:
            assert target == colours[frame]
    assert np.mean(across) > 0.05


def test_avssd_asks_for_the_lamp_that_sounds():
    for scene, _, target, _ in of_task("lamps", "test", "avssd"):
        lit = [" ".join(seen[:2]) for seen, _ in scene.facts if "lit" in seen]
        times = collections.Counter(lit)
        assert sorted(times.values()) == [2] * 4             # looking alone leaves four
        sounding = [" ".join(seen[:2]) for seen, heard in scene.facts if heard]
        assert sounding == [target] * 2
        assert len({heard[0] for _, heard in scene.facts if heard}) == 1


def test_avm_pairs_every_picture_with_both_sounds():
    for kind in ("flash", "spoken_caption"):
        for scene in scenes_of(kind, "test"):
            answers = [(target, extras["audio"]) for task, _, target, extras in scene.questions]
            assert answers == [("yes", "yes"), ("no", "no")]
            heard = {k: [bool(h[k]) for _, h in scene.facts] for k in ("yes", "no")}
            if kind == "flash":
                lit = ["lit" in seen for seen, _ in scene.facts]
                assert heard["yes"] == lit and sum(lit) == sum(heard["no"]) == 3
                assert not any(a and b for a, b in zip(lit, heard["no"], strict=True))
            else:
                said = {k: tuple(h[k][0] for _, h in scene.facts) for k in ("yes", "no")}
                there = pairs_in(scene.facts[0][0])
                assert said["yes"] in there
                assert not {*said["no"]} & {word for pair in there for word in pair}


def test_questions_about_stills():
    for scene, prompt, target, extras in of_task("still", "test", "vqa"):
        there = pairs_in(scene.facts[0][0])
        thing = re.search(r"the (\w+)", prompt).group(1)
        pair = next(pair for pair in there if thing in pair)
        if extras["type"] == "place":
            assert target in world.PLACES
        else:
            assert target == pair[("colour", "shape").index(extras["type"])] != thing
    for scene, _, target, extras in of_task("spoken_question", "test", "isqa"):
        question = [word for _, heard in scene.facts for word in heard]
        pair = next(p for p in pairs_in(scene.facts[0][0]) if question[-1] in p)
        assert question[1] == extras["type"] and {target, question[-1]} == {*pair}


def test_the_places_are_where_the_objects_are_drawn():
    for scene in scenes_of("still", "test", 20):
        image = scene.media["image"]().astype(int)
        for _, prompt, place, extras in scene.questions:
            if extras.get("type") == "place":
                shape = re.search(r"the (\w+)", prompt).group(1)
                colour = next(c for c, s in pairs_in(scene.facts[0][0]) if s == shape)
                where = np.argwhere(abs(image - world.COLOURS[colour]).max(2) < 5).mean(0)   # y, x
                top, left = where < world.SIZE / 2
                assert place == f"{'top' if top else 'bottom'} {'left' if left else 'right'}"


# ---- what is held out ---------------------------------------------------------------------------

def test_no_held_out_pair_in_training():
    seen = set()
    for kind in scenes.SCENES.keys() - {"speech", "lips"}:        # those are words in any order
        for scene in scenes_of(kind, "train", 300):
            for words in all_texts(scene):
                seen |= set(pairs_in(words))
    held_out = {(c, s) for c in COLOURS for s in SHAPES if world.is_held_out_pair(c, s)}
    assert len(held_out) == 8 == len(COLOURS) * len(SHAPES) / 6
    assert {c for c, _ in held_out} == {*COLOURS} and {s for _, s in held_out} == {*SHAPES}
    assert seen == {(c, s) for c in COLOURS for s in SHAPES} - held_out


@pytest.mark.parametrize("kind",
                         ["still", "parade", "spoken_question", "lamps", "flash", "spoken_caption"])
def test_every_test_scene_has_a_held_out_pair(kind):
    for scene in scenes_of(kind, "test", 100):
        pairs = {pair for words in all_texts(scene) for pair in pairs_in(words)}
        assert any(world.is_held_out_pair(*pair) for pair in pairs)


@pytest.mark.parametrize("kind, task", [("speech", "asr"), ("lips", "avsr")])
def test_word_orders(kind, task):
    for split in ("train", "test"):
        for _, _, target, _ in of_task(kind, split, task, 500):
            words = target.split()
            orders = [world.is_held_out_order(a, b) for a, b in zip(words, words[1:], strict=False)]
            assert any(orders) == (split == "test"), (split, target)
            assert len({*words}) == len(words) >= 2
    share = np.mean([world.is_held_out_order(a, b) for a in world.WORDS for b in world.WORDS
                     if a != b])
    assert 0.1 < share < 0.25


def test_numbers():
    split_of = collections.defaultdict(set)
    for split in ("train", "test"):
        for _, _, target, _ in of_task("number", split, "ocr", 1500):
            assert re.fullmatch(r"\d \d \d", target)
            split_of[target].add(split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert len(split_of) > 600


def test_voices(monkeypatch):
    index = json.loads((world.VOICES / "index.json").read_text())
    assert {*world.voices("train")} | {*world.voices("test")} == {*index}
    assert not {*world.voices("train")} & {*world.voices("test")}
    assert len(world.voices("train")) >= 30 and len(world.voices("test")) >= 10
    # a voice is known by how long its words are: no test voice is a training voice's other name
    lengths = {split: [tuple(b - a for a, b in entry["words"].values())
                       for entry in world.voices(split).values()] for split in ("train", "test")}
    assert not {*lengths["train"]} & {*lengths["test"]}
    assert len({*lengths["test"]}) == len(lengths["test"])
    asked = []
    monkeypatch.setattr(world, "voice_words", lambda split, voice: asked.append((split, voice)) or
                        dict.fromkeys(world.WORDS, np.ones(1000, np.float32)))
    for split in ("train", "test"):
        asked.clear()
        for kind in ("speech", "lips", "spoken_question", "spoken_caption"):
            for scene in scenes_of(kind, split, 20):
                [render() for what, render in scene.media.items() if what not in ("video", "image")]
        assert {s for s, _ in asked} == {split} and {v for _, v in asked} <= {*world.voices(split)}
        assert len({v for _, v in asked}) > 5


# ---- how the answers are spread -----------------------------------------------------------------

def majority(answers):
    """Share of the commonest answer, and how many answers there are."""
    return max(collections.Counter(answers).values()) / len(answers), len({*answers})


@pytest.mark.parametrize("kind, task, type_, chance", [
    ("still", "vqa", "colour", 1 / 8), ("still", "vqa", "shape", 1 / 6),
    ("still", "vqa", "place", 1 / 4),
    ("spoken_question", "isqa", "colour", 1 / 8), ("spoken_question", "isqa", "shape", 1 / 6),
    ("concert", "avsd", "at", 1 / 8), ("concert", "avsd", "after", 1 / 8),
    ("lamps", "avssd", None, 1 / 48), ("flash", "avm", "video", 1 / 2),
    ("spoken_caption", "avm", "image", 1 / 2),
    ("number", "ocr", None, 0.001), ("still", "ic", None, 0), ("speech", "asr", None, 0),
    ("lips", "avsr", None, 0),
    ("sounds", "ac", None, 0)])
def test_no_answer_is_likely_beforehand(kind, task, type_, chance):
    found = [(t, e) for _, _, t, e in of_task(kind, "test", task, 1000) if e.get("type") == type_]
    share, _ = majority([target for target, _ in found])
    assert {extras["chance"] for _, extras in found} == {chance}
    # of the largest of a few counts
    spread = 5 * np.sqrt(max(chance, 0.01) / len(found))
    # a held-out pair is in every test scene
    assert share < chance + spread + (0.03 if task == "avssd" else 0)


def test_the_right_option_stands_anywhere():
    places, answers = [], collections.defaultdict(list)
    for _, prompt, target, extras in of_task("parade", "test", "videoqa", 800):
        places.append(extras["options"].index(target))
        answers[prompt.split()[1]].append(target)
        assert extras["chance"] == 1 / len(extras["options"]) == 1 / 4
    assert all(abs(np.mean(np.array(places) == k) - 1 / 4) < 0.05 for k in range(4))
    assert majority(answers["colour"])[0] < 0.2 and majority(answers["shape"])[0] < 0.25


def test_the_test_split_is_large_enough():
    count = collections.Counter()
    for kind in scenes.SCENES:
        for task, *_ in next(scenes_of(kind, "test", 1)).questions:
            count[task] += scenes.TEST_CLIPS[kind]
    assert all(count[task] >= 500 for task in scenes.TASKS)


# ---- the files ----------------------------------------------------------------------------------

def records_of(folder, split):
    return data.read_manifest(folder / f"{split}.jsonl")


def test_manifests(small_miniature):
    for split, n in (("train", 4), ("test", 2)):
        records = records_of(small_miniature, split)
        tasks = collections.Counter(r.task for r in records)
        assert {*tasks} == {*scenes.TASKS} | ({"caption"} if split == "train" else set())
        assert tasks["avm"] == 4 * n and tasks["asr"] == n and tasks["vqa"] == 3 * n
        for record in records:
            assert record.refs == (record.target,)
            assert record.task == "caption" or 0 <= record.meta["chance"] <= 0.5
        # avm: every video or image once with yes and once with no, with another sound
        by_picture = collections.defaultdict(list)
        for record in records:
            if record.task == "avm":
                by_picture[record.video or record.image].append(record)
        assert len(by_picture) == 2 * n
        for both in by_picture.values():
            assert {r.target for r in both} == {"no", "yes"} and len(both) == 2
            assert both[0].audio != both[1].audio
    # relative names: the folder may be moved
    text = (small_miniature / "train.jsonl").read_text()
    assert str(small_miniature) not in text and '"video": "train/' in text


def test_files_decode_to_the_right_length(small_miniature):
    kinds, records = collections.Counter(), records_of(small_miniature, "test")
    for record in {(r.video, r.image, r.audio): r for r in records}.values():
        clip = data.load_clip(record, size=64)
        suffixes = {s for s in (".mp4", ".png", ".wav") if any(
            str(path).endswith(s) for path in (record.video, record.image, record.audio))}
        kinds[record.id.split("-")[1], *sorted(suffixes)] += 1
        if record.video:
            frames = 2 * len(record.target.split()) if record.task == "avsr" else world.FRAMES
            assert len(clip.frames) == frames and clip.frames.shape[2:] == (64, 64)
            if record.id.split("-")[1] == "parade":
                assert clip.audio is None                     # a silent video
            else:
                assert len(clip.audio) == frames * world.FRAME
        if record.image:
            assert clip.is_image and len(clip.frames) == 1
        if record.video is None and record.audio:
            assert len(clip.audio) >= 4 * world.FRAME and len(clip.audio) % world.FRAME == 0
        if clip.audio is not None:
            assert 0.01 < clip.audio.abs().max() <= 1
    assert {kind[0]: kind[1:] for kind in kinds} == {
        "speech": (".wav",), "sounds": (".wav",), "still": (".png",), "number": (".png",),
        "parade": (".mp4",), "lips": (".mp4",), "concert": (".mp4",),
        "spoken_question": (".png", ".wav"),
        "lamps": (".mp4",), "flash": (".mp4", ".wav"), "spoken_caption": (".png", ".wav")}


def test_what_is_seen_and_heard_is_synchronous(tmp_path):
    """Colour on screen and sound of every half second, after H.264 and AAC, are the facts."""
    for index, scene in enumerate(scenes_of("concert", "test", 4)):
        path = tmp_path / f"{index}.mp4"
        write_video(path, scene.media["video"](), world.VIDEO_FPS, scene.media["audio"]())
        clip = data.load_clip(data.Record("x", "t", "p", video=str(path)), size=64)
        for frame, ((colour, _), heard) in enumerate(scene.facts):
            picture = clip.frames[frame].permute(1, 2, 0).numpy().astype(int)
            near = {c: (abs(picture - rgb).max(2) < 40).sum() for c, rgb in world.COLOURS.items()}
            assert max(near, key=near.get) == colour, (frame, near)
            sound = clip.audio[frame * world.FRAME:(frame + 1) * world.FRAME].numpy()
            assert (np.sqrt(np.mean(sound ** 2)) > 0.015) == bool(heard), frame


def test_lips_fit_the_words():
    classes = set()
    for scene in scenes_of("lips", "test", 30):
        words = scene.questions[0][2].split()
        assert [seen[0] for seen, _ in scene.facts] == [world.LIPS_OF[w] for w in words
                                                        for _ in (0, 1)]
        assert [heard[0] for _, heard in scene.facts if heard] == words
        classes |= {world.LIPS_OF[w] for w in words}
    assert classes == {*world.LIPS} and len({*world.WORDS}) == 24
    drawn = {lips: world.draw_lips(np.random.default_rng(0), lips, world.background()).tobytes()
             for lips in world.LIPS}
    assert len({*drawn.values()}) == len(world.LIPS)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_seed_same_files(small_miniature, tmp_path):
    one_each = {"train": dict.fromkeys(scenes.SCENES, 1)}
    quiet = {"splits": ("train",), "counts": one_each}
    two, other = tmp_path / "two", tmp_path / "other"
    generate.make(two, workers=2, **quiet)                                   # other processes
    ours, first = hashes(two / "train"), hashes(small_miniature / "train")
    assert len(ours) == 5 + 4 + 7                                             # mp4, png, wav
    assert ours == {name: first[name] for name in ours}
    lines = (small_miniature / "train.jsonl").read_text().splitlines()
    assert {*(two / "train.jsonl").read_text().splitlines()} <= {*lines}
    some = {"train": {"speech": 1, "number": 1, "parade": 1, "spoken_caption": 1}}
    generate.make(other, seed=1, workers=1, **quiet | {"counts": some})
    assert all(value != ours[name] for name, value in hashes(other / "train").items())


@pytest.fixture
def made(monkeypatch):
    """(split, scene, index) of the clips that are drawn, as long as one worker draws them."""
    drawn, inner = [], generate.make_clip
    monkeypatch.setattr(generate, "make_clip", lambda job: drawn.append(job[1:4]) or inner(job))
    return drawn


def test_made_clips_stay(tmp_path, made):
    counts = {"train": {"sounds": 2}, "test": {"sounds": 1}}
    quiet = {"workers": 1}
    for seed, wanted in ((0, 3), (0, 0), (1, 3)):
        made.clear()
        paths = generate.make(tmp_path, seed=seed, counts=counts, **quiet)
        assert len(made) == wanted, made
        assert paths == {s: tmp_path.resolve() / f"{s}.jsonl" for s in ("train", "test")}
    made.clear()
    generate.make(tmp_path, seed=1, counts=counts | {"train": {"sounds": 3}}, **quiet)
    assert made == [("train", "sounds", 2)]
    assert len(records_of(tmp_path, "train")) == 3
    generate.make(tmp_path, seed=1, counts=counts, **quiet)          # fewer again
    assert len(records_of(tmp_path, "train")) == 2


def test_a_part_makes_only_the_clips_it_needs(tmp_path, small_miniature, made):
    """Its questions are the first ones of each task in the whole manifest. The whole set that is
    made later is the very same."""
    whole = records_of(small_miniature, "test")

    def first(records, tasks, limit):
        taken = collections.Counter()
        return [r.id for r in records if r.task in tasks
                and (taken.update([r.task]) or taken[r.task] <= limit)]
    counts = {"test": dict.fromkeys(scenes.SCENES, 2)}
    quiet = {"workers": 1, "splits": ("test",), "counts": counts}
    path = generate.make(tmp_path, tasks=("avsd", "avm"), limit=3, **quiet)["test"]
    assert made == [("test", "concert", 0), ("test", "concert", 1), ("test", "flash", 0),
                    ("test", "flash", 1)]
    assert [r.id for r in data.read_manifest(path)] == first(whole, ("avsd", "avm"), 3)
    assert not (tmp_path / "test.jsonl").exists()
    made.clear()
    path = generate.make(tmp_path, limit=1, **quiet)["test"]          # one of every task
    assert [r.id for r in data.read_manifest(path)] == first(whole, scenes.TASKS, 1)
    assert len(made) == len({scene for _, scene, _ in made}) == 8      # not those made before
    made.clear()
    assert generate.make(tmp_path, **quiet)["test"].name == "test.jsonl"
    assert len(made) == 2 * len(scenes.SCENES) - 4 - 8
    assert hashes(tmp_path / "test") == hashes(small_miniature / "test")
    assert (tmp_path / "test.jsonl").read_text() == (small_miniature / "test.jsonl").read_text()
    made.clear()                                     # the whole set is there: no part any more
    assert generate.make(tmp_path, tasks=("avsd",), limit=1, **quiet)["test"].name == "test.jsonl"
    assert not made
    generate.make(tmp_path, seed=1, tasks=("ocr",), limit=1, **quiet)
    assert made == [("test", "number", 0)] and not (tmp_path / "test.jsonl").exists()
    with pytest.raises(ValueError, match="unknown task avd; there are asr, ac"):
        generate.make(tmp_path, tasks=("avd",))


def test_the_committed_demo_is_a_test_clip_that_needs_both_modalities(tmp_path):
    """demo.mp4 is what `python -m miniature demo` writes, and the committed checkpoint answers its
    question right, but neither without the sound nor without the picture."""
    from favor import Favor
    for new in generate.demo(tmp_path):
        assert new.read_bytes() == (world.HERE / new.name).read_bytes()
    facts = json.loads((world.HERE / "demo.json").read_text())
    clip = world.HERE / facts["clip"]
    assert clip.stat().st_size < 100_000
    model = Favor.from_pretrained(world.HERE / "weights" / "favor").eval()
    answers = {mask: model.answer(clip, facts["question"], mask=mask)
               for mask in (None, "audio", "visual")}
    assert answers[None] == facts["answer"]
    assert facts["answer"] not in (answers["audio"], answers["visual"])


def test_importing_the_miniature_loads_no_torch():
    code = "import sys, miniature.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=world.HERE.parent).returncode == 0


# ---- the language -------------------------------------------------------------------------------

def test_every_word_of_an_answer_is_one_piece():
    if not (world.HERE / "weights" / "llama" / "tokenizer.model").exists():
        pytest.skip("miniature/weights/llama is not there yet")
    from llama import Tokenizer
    tokenizer = Tokenizer.from_pretrained(world.HERE / "weights" / "llama")
    words = set()
    for kind in scenes.SCENES:
        for scene in scenes_of(kind, "train", 100):
            words |= {word for _, _, target, _ in scene.questions
                      for word in re.findall(r"\w+", target)}
    assert len(words) > 40
    spelt = {w: len(tokenizer.encode(w)) for w in words
             if len(tokenizer.encode(w)) != 1 + w.isdigit()}
    assert not spelt
    assert tokenizer.decode(tokenizer.encode("red ball, blue box")) == "red ball, blue box"
    prompts = {question[1] for kind in scenes.SCENES for scene in scenes_of(kind, "test", 20)
               for question in scene.questions}
    unknown = [p for p in prompts if tokenizer.decode(tokenizer.encode(p)) != p]
    assert not unknown
