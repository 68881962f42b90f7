"""How answers are scored: word error rate, exact match, and 95 % intervals.

Public: normalise, edit_distance, word_error_rate, exact_match, Score, score."""

import math
from dataclasses import dataclass

import numpy as np

ERROR_RATES = ("asr", "ac", "avsr")       # scored by WER (less is better), the others by accuracy


def normalise(text):
    """Lower case, words only: 'Red ball, blue box.' -> ['red', 'ball', 'blue', 'box']."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return kept.split()


def edit_distance(ours, theirs):
    """Fewest substitutions, deletions and insertions that turn one list into the other."""
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def word_error_rate(answers, references):
    """(errors, reference words) per item, after normalise(); WER = sum of errors / sum of words."""
    pairs = [(normalise(a), normalise(r)) for a, r in zip(answers, references, strict=True)]
    return np.array([(edit_distance(a, r), len(r)) for a, r in pairs], dtype=float).reshape(-1, 2)


def exact_match(answer, references):
    """True when the whole normalised answer is one of the references."""
    return any(normalise(answer) == normalise(reference) for reference in references)


@dataclass(frozen=True)
class Score:
    """In percent, with a 95 % interval: Wilson's for accuracy, over utterances for error rates."""
    value: float
    low: float
    high: float
    n: int

    def __str__(self):
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


def score(task, answers, references):
    """answers: list of str; references: list of lists of str -> Score.
    Raises ValueError on an empty list."""
    n = len(answers)
    if not n:
        raise ValueError(f"{task}: nothing to score; wanted at least one answer")
    if task in ERROR_RATES:
        errors, words = word_error_rate(answers, [r[0] for r in references]).T
        rate = errors.sum() / max(words.sum(), 1)
        spread = (np.std(errors - rate * words, ddof=min(1, n - 1)) * math.sqrt(n)
                  / max(words.sum(), 1))
        return Score(100 * rate, 100 * max(0, rate - 1.96 * spread),
                     100 * (rate + 1.96 * spread), n)
    right = np.mean([exact_match(a, r) for a, r in zip(answers, references, strict=True)])
    z2 = 1.96 ** 2
    centre = (right + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(right * (1 - right) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Score(100 * right, 100 * max(0, centre - half), 100 * min(1, centre + half), n)
