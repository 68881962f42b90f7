"""metrics.py against brute force, hand-made numbers and jiwer."""

import functools
import random

import numpy as np
import pytest

from aveb import metrics, paper_numbers
from aveb.tasks import METRICS
from aveb.whisper_norm import whisper_english
from miniature import scenes


def row(answer, *references, **more):
    return {"id": "1", "prompt": "", "answer": answer, "references": list(references),
            "options": [], "meta": {}, **more}


def value(name, *rows):
    return metrics.METRICS[name](list(rows)).value


def brute_force(a, b):
    """Levenshtein's recursion as it is defined."""
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1,
                   distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
    return distance(len(a), len(b))


def random_texts(n, seed=0):
    dice = random.Random(seed)
    return [[dice.choice("abc") for _ in range(dice.randrange(8))] for _ in range(n)]


def test_edit_distance():
    for a, b in zip(random_texts(200), random_texts(200, seed=1), strict=True):
        assert metrics.edit_distance(a, b) == brute_force(a, b), (a, b)


def test_normalise():
    assert metrics.normalise(" Red ball,blue  BOX. ") == ["red", "ball", "blue", "box"]
    assert metrics.normalise("it's 3 7\n1") == ["it's", "3", "7", "1"]
    assert metrics.normalise(" . ") == []


def test_word_error_rate_by_hand():
    # 1 wrong word of 3; 2 too many over 1; 2 of 2 missing; 1 too many over 2: 6 errors over 8 words
    answers = ["red blue ring", "the big ball", "", "Yes, it is"]
    references = [["red blue ball"], ["ball"], ["one two"], ["yes it"]]
    pairs = metrics.word_error_rate(answers, [r[0] for r in references])
    assert pairs.tolist() == [[1, 3], [2, 1], [2, 2], [1, 2]]
    rows = [row(a, *r) for a, r in zip(answers, references, strict=True)]
    assert value("wer_basic", *rows) == pytest.approx(100 * 6 / 8)
    # the sum over words, not the mean over utterances (1/3 + 2 + 1 + 1/2) / 4
    assert np.mean(pairs[:, 0] / pairs[:, 1]) == pytest.approx(3.8333 / 4, abs=1e-4)


# Wilson's interval, from its published tables
@pytest.mark.parametrize("right, n, low, high", [
    (8, 10, 49.02, 94.33), (0, 10, 0, 27.75), (10, 10, 72.25, 100), (50, 100, 40.38, 59.62),
    (1, 1, 20.65, 100)])
def test_interval_of_an_accuracy(right, n, low, high):
    score = metrics.METRICS["exact"]([row("yes", "yes" if k < right else "no") for k in range(n)])
    assert (score.value, score.n) == (pytest.approx(100 * right / n), n)
    assert (score.low, score.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_interval_of_an_error_rate():
    """As wide as what resampling the utterances with another generator gives."""
    dice = np.random.default_rng(0)
    words = dice.integers(1, 6, 300)
    errors = dice.binomial(words, 0.3)
    score = metrics.METRICS["wer_basic"]([
        row(" ".join(["x"] * e + ["a"] * (w - e)), " ".join(["a"] * w))
        for e, w in zip(errors, words, strict=True)])
    picks = dice.integers(0, 300, (2000, 300))
    low, high = np.percentile(100 * errors[picks].sum(1) / words[picks].sum(1), (2.5, 97.5))
    assert (score.low, score.high) == (pytest.approx(low, abs=0.5), pytest.approx(high, abs=0.5))
    assert str(score) == f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


# ---------------------------------------------------------------- metrics by name
@pytest.mark.parametrize("answer, references, right", [
    ("Red ball.", ["red ball"], True), ("red  ball", ["blue box", "Red, ball"], True),
    ("red", ["red ball"], False), ("red ball box", ["red ball"], False),
    ("ball red", ["red ball"], False),
    ("", ["red"], False), ("redball", ["red ball"], False)])
def test_exact_match(answer, references, right):
    assert value("exact", row(answer, *references)) == 100 * right


def test_both_word_error_rates_are_jiwers():
    """Bit for bit, on 250 sets of odd texts, after the same normaliser."""
    jiwer = pytest.importorskip("jiwer")
    words = ["a", "The", "it's", "Mr.", "two", "colour", "1,000", "uh", "--", "café", "", "[noise]"]
    for seed in range(250):
        dice = random.Random(seed)
        said, meant = ([" ".join(dice.choice(words) for _ in range(dice.randrange(6)))
                        for _ in range(1 + seed % 7)] for _ in range(2))
        rows = [row(a, r) for a, r in zip(said, meant, strict=True)]
        for name, normaliser in (("wer", whisper_english),
                                 ("wer_basic", metrics.normalise)):
            pairs = [(" ".join(normaliser(r)), " ".join(normaliser(metrics.without_chat(a))))
                     for a, r in zip(said, meant, strict=True)]
            pairs = [pair for pair in pairs if pair[0]]
            score = metrics.METRICS[name](rows)
            if not pairs:
                assert str(score) == "n/a (no words in the references)"
                continue
            assert score.value == 100 * jiwer.wer(*map(list, zip(*pairs, strict=True)))
            assert score.n == len(pairs) and score.better == "lower"
            left_out = f"{len(rows) - len(pairs)} empty references left out"
            assert (left_out in score.note) == (len(pairs) < len(rows))


# what the description of Whisper's normaliser promises
@pytest.mark.parametrize("text, words", [
    ("Um, he's [noise] GONE (laughs).", "he is gone"), ("Mr. Smith can't, won't!", "mister smith "
     "can not will not"), ("I'd been; she's got 1,000", "i had been she has got 1000"),
    ("the colour grey", "the color gray"), ("café naïve", "cafe naive"), ("wait 3.5 . x", "wait "
     "3.5 x"), ("twenty one", "21"), ("two hundred and five", "205"),
    ("nineteen eighty four", "1984"),
    ("ten thousand dollars", "$10000"), ("fifty percent", "50%"), ("twenty first", "21st"),
    ("three point five", "3.5"), ("one man and two", "one man and 2"), ("minus ten", "-10"),
    ("double seven", "77"), ("two thousand three hundred", "2300"), ("the twenties", "the 20s"),
    ("two and a half", "2.5"), ("travelled to the theatre", "traveled to the theater"),
    ("", ""), ("Realise, analyse; organised labour", "realize analyze organized labor")])
def test_whisper_english(text, words):
    assert " ".join(whisper_english(text)) == words


def test_wer_says_which_normaliser():
    score = metrics.METRICS["wer"]([row('Here is the transcription: "It is two."', "It's 2"),
                                    row(None, "x")])
    assert (score.value, score.n, score.missing) == (0, 1, 1)
    assert (str(score), score.unit, score.arrow) == ("0.0 [0.0, 0.0]", "%", "↓")
    assert score.note == "norm=ours, 1 answers without their chat prefix or quotes"


@pytest.mark.parametrize("answer, left", [
    ("Sure! Here is the transcript: red ball", "red ball"), ("ASSISTANT: 'red'", "red"),
    ("The speaker says: “red”", "red"), ("the text is red", "the text is red"),
    ("sure enough it fell", "sure enough it fell"), ("'tis the dogs", "'tis the dogs")])
def test_without_chat(answer, left):
    assert metrics.without_chat(answer) == left


# the definition's own examples, and what it must not do
@pytest.mark.parametrize("answer, reference, right", [
    ("It is a cat.", "cat", True), ("a catalog", "cat", False), ("Red  ball!", "red ball", True),
    ("red big ball", "red ball", False), ("Yes, it is", "yes", True), ("yes and no", "yes", False),
    ("no", "No.", True), ("nobody", "no", False), ("No, not yes", "no", False), ("", "cat", False),
    ("the 'cat'", "cat", True), ("it’s", "it's", True), ("anything", "", False),
    ("yes, no cat", "cat", True)])
def test_word_match(answer, reference, right):
    assert value("word_match", row(answer, reference)) == 100 * right
    assert value("word_match", row(answer, "zebra", reference)) == 100 * right    # any reference


TEN = ["stop"] * 3 + ["the stop"] + ["go"] * 2 + ["stop sign", "coca-cola", "unanswerable", "2"]


@pytest.mark.parametrize("answer, soft, official, equal", [
    # hits: stop 4 (article dropped); contained in a sentence; go 2; one of one; none
    ("Stop.", 100, 100, 100), ("It says stop", 100, 0, 0), ("go", 200 / 3, 60, 200 / 3),
    ("Coca Cola!", 100 / 3, 30, 100 / 3), ("two", 100 / 3, 30, 100 / 3), ("", 0, 0, 0),
    ("stop sign", 100, 30, 100 / 3), ("stops", 0, 0, 0), ("stop go", 100, 0, 0)])
def test_textvqa(answer, soft, official, equal):
    one = row(answer, *TEN)
    assert value("textvqa_soft", one) == pytest.approx(soft)
    assert value("textvqa_official", one) == pytest.approx(official)
    assert value("textvqa_equal", one) == pytest.approx(equal)


def test_leave_one_out():
    assert [round(metrics.leave_one_out(hits, 10), 6) for hits in (0, 1, 2, 3, 4, 10)] == [
        0, 0.3, 0.6, 0.9, 1, 1]


@pytest.mark.parametrize("text, words", [
    ("The RED ball.", "red ball"), ("1,000", "1000"), ("coca-cola", "coca cola"), ("ten", "10"),
    ("dont", "don't"), ("a", "a"), ("$3.50!", "$3.50"), ("none", "0"), ("well", "well"), ("", "")])
def test_vqa_words(text, words):
    assert " ".join(metrics.vqa_words(text)) == words


OPTIONS = ["dog", "two men", "on the brown dog", "7", "to eat"]


@pytest.mark.parametrize("answer, right, strict, lenient", [
    ("Two men.", "two men", True, True), ("there are two men", "two men", False, True),
    ("B", "two men", False, True), ("(b) two men", "two men", False, True),
    ("2.", "two men", False, True), ("Option B", "two men", False, True),
    ("B", "dog", False, False), ("two men eat 7", "two men", False, False),
    ("on the brown dog", "on the brown dog", True, True), ("7", "7", True, True),
    ("a dog", "dog", False, True), ("a cat", "dog", False, False), ("F", "dog", False, False),
    ("", "dog", False, False), ("99", "dog", False, False)])
def test_multiple_choice(answer, right, strict, lenient):
    one = row(answer, right, options=OPTIONS)
    assert value("choice", one) == 100 * strict
    assert value("choice_lenient", one) == 100 * lenient


def test_by_type():
    rows = [row("", "x", meta={"type": kind}) for kind in ("DL", "TN", "CW", "TP", "C", "colour")]
    groups = metrics.by_type([*rows, row("", "x")])
    assert {kind: len(part) for kind, part in groups.items()} == {"C": 2, "T": 2, "D": 1,
                                                                  "colour": 1}
    assert list(groups) == ["C", "T", "D", "colour"]


def test_judged():
    rows = [row("", "x", verdict=v, judge="gpt-x") for v in (True, True, False, None)]
    score = metrics.METRICS["judged"](rows)
    assert (score.value, score.n, score.missing) == (pytest.approx(200 / 3), 3, 1)
    assert score.note == "judge gpt-x"
    assert str(metrics.METRICS["judged"]([row("x", "x")])) == "n/a (no answers)"


def test_small_metrics():
    assert value("exact", row("Red ball.", "x", "red ball"), row("red", "red ball")) == 50
    assert value("acc_vqa", row("the red ball", "red ball"), row("red", "red ball")) == 50
    length = metrics.METRICS["answer_length"]([row("one two", "x"), row("", "x"), row(None, "x")])
    assert (str(length), length.unit, length.arrow) == ("1.0 [0.0, 2.0]", "words", "")
    assert (length.n, length.missing, length.note) == (2, 1, "")


def test_score():
    rows = [row(answer, "a", meta={"metrics": names}) for answer, names in
            (("a", ["exact", "spider"]), (None, ["exact"]), ("a", ["choice"]))]
    scores = metrics.score(rows)
    assert list(scores) == ["exact", "spider", "choice"]
    assert (scores["exact"].value, scores["exact"].n, scores["exact"].missing) == (100, 1, 1)
    assert scores["choice"].n == 1
    assert list(metrics.score([row("a", "a", task="asr")])) == ["wer_basic"]
    assert list(metrics.score([row("a", "a", task="mine")])) == ["exact"]
    with pytest.raises(ValueError, match="no metric f1; there are wer, wer_basic"):
        metrics.score([row("a", "a", meta={"metrics": ["f1"]})])
    with pytest.raises(ValueError, match="exact: 1 has no references"):
        metrics.METRICS["exact"]([row("a")])
    for name, function in metrics.METRICS.items():
        assert str(function([])) == "n/a (no answers)", name


def test_every_record_has_its_score():
    def scores_of(name, *rows):
        return list(metrics.METRICS[name]([{**r, "id": k} for k, r in enumerate(rows)])
                    .per_record.values())
    assert scores_of("exact", row("a", "a"), row("b", "a")) == [100, 0]
    assert scores_of("wer_basic", row("a x", "a b"), row("a", ""), row("", "a")) == [50, None, 100]
    assert scores_of("textvqa_soft", row("a", "a", "b", "b", "b")) == [pytest.approx(33.3333)]
    assert metrics.METRICS["exact"]([row(None, "a"), {**row("a", "a"), "id": "2"}]).per_record == {
        "2": 100}


def test_label_match():
    donkey = {"meta": {"label": "donkey, ass braying"}}
    assert value("label_match", row("An ass brays.", "It is a donkey.", **donkey)) == 100
    assert value("label_match", row("It is a horse.", "It is a donkey.", **donkey),
                 row("", "x", **donkey)) == 0


def test_spoken_questions_are_scored_as_their_source():
    """Half right by TextVQA's thirds, half by GQA's word match."""
    text = row("stop sign", *["stop"] * 2, *["go"] * 8, meta={"source": "textvqa"})
    scene = row("it is red", "red", meta={"source": "gqa"})
    assert value("isqa", text) == pytest.approx(200 / 3, abs=1e-3)
    assert value("isqa", text, scene) == pytest.approx((200 / 3 + 100) / 2, abs=1e-3)
    assert value("isqa_official", text, scene) == 0             # neither equals a human answer
    assert value("isqa_official", {**text, "answer": "stop"}, {**scene, "answer": "the red"}) == (
        pytest.approx((60 + 100) / 2))


CEILINGS = {"wer": (0, 100), "wer_basic": (0, 100), "word_match": (100, 0), "exact": (100, 0),
            "textvqa_soft": (100, 0), "textvqa_official": (100, 0), "textvqa_equal": (100, 0),
            "choice": (100, 0), "choice_lenient": (100, 0), "acc_vqa": (100, 0),
            "isqa": (100, 0), "isqa_official": (100, 0)}


@pytest.mark.parametrize("name", CEILINGS)
def test_ceiling_and_floor(name):
    texts = ["red ball", "Yes", "a", "the grey dog's", "7", "two men!"]
    rows = [row(text, *[text] * 10, options=texts) for text in texts]
    assert value(name, *rows) == CEILINGS[name][0]
    assert value(name, *({**r, "answer": ""} for r in rows)) == CEILINGS[name][1]


@pytest.mark.parametrize("task", scenes.TASKS)
def test_ceiling_and_floor_of_the_miniature(small_miniature, task):
    import data
    records = [r for r in data.read_manifest(small_miniature / "test.jsonl") if r.task == task]
    references = [list(r.refs or (r.target,)) for r in records]
    name, = metrics.default_metrics(task)
    best, worst = (value(name, *(row(a, *r) for a, r in zip(answers, references, strict=True)))
                   for answers in ([r[0] for r in references], [""] * len(references)))
    assert (best, worst) == ((0, 100) if task in metrics.ERROR_RATES else (100, 0))


def test_bootstrap():
    dice = np.random.default_rng(0)
    right = dice.random(400) < 0.3
    share, wilson = metrics.mean_score(right), metrics.wilson(right.sum(), 400)
    assert share.value == pytest.approx(wilson.value)
    assert (share.low, share.high) == (pytest.approx(wilson.low, abs=0.8),
                                       pytest.approx(wilson.high, abs=0.8))
    assert share == metrics.mean_score(right)                                     # seeded


def test_paper_numbers():
    paper = paper_numbers.PAPER
    assert paper["FAVOR 13B"]["ic"] == {"cider": 86.0, "meteor": 27.5}
    assert paper["FAVOR 13B"]["favd fine-tuned"] == {"bleu1": 44.2, "bleu4": 10.9, "meteor": 19.1}
    assert paper["no causal, div, sync"]["avm"] == {"word_match": 72.0}
    assert paper["VALOR-base"] == {"valor fine-tuned": {"meteor": 14.8, "cider": 55.7}}
    assert len(paper) == 14
    cells = {(task, name) for tasks in paper.values() for task, found in tasks.items()
             for name in found}
    assert {name for _, name in cells} <= set(metrics.METRICS)
    shown = {(task, name) for rows, _ in paper_numbers.TABLES.values() for task, name, _ in rows}
    assert shown == cells
    for task, name in cells:                      # what a task is scored by comes with its number
        assert name in METRICS[task.split()[0]], (task, name)
