"""metrics.py against brute force, hand-made numbers and jiwer."""

import functools
import random

import numpy as np
import pytest

import metrics


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


@pytest.mark.parametrize("answer, references, right", [
    ("Red ball.", ["red ball"], True), ("red  ball", ["blue box", "Red, ball"], True),
    ("red", ["red ball"], False), ("red ball box", ["red ball"], False),
    ("ball red", ["red ball"], False),
    ("", ["red"], False), ("redball", ["red ball"], False)])
def test_exact_match(answer, references, right):
    assert metrics.exact_match(answer, references) is right


def test_word_error_rate_by_hand():
    # 1 wrong word of 3; 2 too many over 1; 2 of 2 missing; 1 too many over 2: 6 errors over 8 words
    answers = ["red blue ring", "the big ball", "", "Yes, it is"]
    references = [["red blue ball"], ["ball"], ["one two"], ["yes it"]]
    pairs = metrics.word_error_rate(answers, [r[0] for r in references])
    assert pairs.tolist() == [[1, 3], [2, 1], [2, 2], [1, 2]]
    for task in metrics.ERROR_RATES:
        assert metrics.score(task, answers, references).value == pytest.approx(100 * 6 / 8)
    # the sum over words, not the mean over utterances (1/3 + 2 + 1 + 1/2) / 4
    assert np.mean(pairs[:, 0] / pairs[:, 1]) == pytest.approx(3.8333 / 4, abs=1e-4)


def test_word_error_rate_is_jiwers():
    jiwer = pytest.importorskip("jiwer")
    texts = [" ".join(words) for words in random_texts(300, seed=2)]
    answers, references = texts[:150], [text or "a" for text in texts[150:]]
    ours = metrics.score("asr", answers, [[r] for r in references])
    assert ours.value == pytest.approx(100 * jiwer.wer(references, answers), abs=1e-9)


# Wilson's interval, from its published tables
@pytest.mark.parametrize("right, n, low, high", [
    (8, 10, 49.02, 94.33), (0, 10, 0, 27.75), (10, 10, 72.25, 100), (50, 100, 40.38, 59.62),
    (1, 1, 20.65, 100)])
def test_interval_of_an_accuracy(right, n, low, high):
    score = metrics.score("vqa", ["yes"] * n, [["yes"]] * right + [["no"]] * (n - right))
    assert (score.value, score.n) == (pytest.approx(100 * right / n), n)
    assert (score.low, score.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_interval_of_an_error_rate():
    score = metrics.score("asr", ["a b", "a x"], [["a b"], ["a b"]])
    # errors - rate * words = -0.5 and 0.5, deviation 0.7071; * sqrt(2) / 4 words * 1.96 = 0.49
    assert (score.value, score.low, score.high) == (25, 0, pytest.approx(74))
    # as wide as what resampling the utterances gives
    dice = np.random.default_rng(0)
    words = dice.integers(1, 6, 300)
    errors = dice.binomial(words, 0.3)
    answers = [" ".join(["x"] * e + ["a"] * (w - e)) for e, w in zip(errors, words, strict=True)]
    score = metrics.score("asr", answers, [[" ".join(["a"] * w)] for w in words])
    picks = dice.integers(0, 300, (2000, 300))
    low, high = np.percentile(100 * errors[picks].sum(1) / words[picks].sum(1), (2.5, 97.5))
    assert (score.low, score.high) == (pytest.approx(low, abs=0.5), pytest.approx(high, abs=0.5))
    assert str(score) == f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def test_nothing_to_score():
    with pytest.raises(ValueError, match="vqa: nothing to score"):
        metrics.score("vqa", [], [])
    with pytest.raises(ValueError):
        metrics.score("vqa", ["yes"], [])
