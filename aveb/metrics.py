"""How answers are scored: every metric of the benchmark under its name, with a 95 % interval.

     rows [{id, task, prompt, answer or view, references, options, meta}]
        --score(rows, view)--> {metric: Score | Unavailable}

   meta["metrics"] names a row's metrics.  An answer None is missing: it is counted, not scored.  A
   metric that cannot run here is Unavailable, printed as `n/a (needs Java)`.
   Public: score, by_type, default_metrics, Score, Unavailable, METRICS, word_error_rate."""

import dataclasses
import functools
import math
import re
from dataclasses import dataclass, field

import numpy as np

from aveb import captions
from aveb.tasks import ERROR_RATES
from aveb.text import (
    canonical,
    edit_distance,
    label_match,
    leave_one_out,
    lenient_choice,
    normalise,
    plain_words,
    textvqa_words,
    unquoted_vqa_words,
    vqa_words,
    without_chat,
    word_match,
)
from aveb.whisper_norm import whisper_english


# ---------------------------------------------------------------- scores and their intervals
@dataclass(frozen=True)
class Score:
    """In percent (or its unit), with a 95 % interval: Wilson's for a share of right answers, over
    records otherwise."""
    value: float
    low: float
    high: float
    n: int
    missing: int = 0                  # records without an answer, not among the n
    unit: str = "%"
    better: str = "higher"
    note: str = ""                    # how it was made: 'norm=ours'
    per_record: dict = field(default_factory=dict, repr=False, compare=False)   # id: own score

    def __str__(self):
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def arrow(self):
        return {"higher": "↑", "lower": "↓"}.get(self.better, "")


@dataclass(frozen=True)
class Unavailable:
    """A metric that cannot be computed here, and why."""
    name: str
    reason: str
    value = None

    def __str__(self):
        return f"n/a ({self.reason})"


def wilson(right, n):
    """Score of `right` of n: Wilson's interval."""
    share, z2 = right / n, 1.96 ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Score(100 * share, 100 * max(0, centre - half), 100 * min(1, centre + half), n)


@functools.lru_cache(maxsize=1)
def resamples(n, times=1000, seed=0):
    """(times, n): how often each of n records is drawn, with replacement; the same every time."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), times).astype(float)


def bootstrap(counts, measure, **kind):
    """Score of measure(sum of counts over the records), interval from 1000 resamplings of them.
    counts (n, k); measure (..., k) -> (...), a share."""
    counts = np.asarray(counts, float)
    low, high = np.percentile(measure(resamples(len(counts)) @ counts), (2.5, 97.5))
    return Score(100 * float(measure(counts.sum(0))), 100 * float(low), 100 * float(high),
                 len(counts), **kind)


def mean_score(values, **kind):
    """Score of the mean of one number per record."""
    counts = np.stack([np.asarray(values, float), np.ones(len(values))], 1)
    return bootstrap(counts, lambda sums: sums[..., 0] / sums[..., 1],
                     per_record=[round(100 * float(value), 4) for value in values], **kind)


def share_score(right):
    """Score of the share of records that are right."""
    return dataclasses.replace(wilson(sum(right), len(right)), per_record=[100 * r for r in right])


def word_error_rate(answers, references, words=normalise):
    """(errors, reference words) per record, after `words`; WER = sum of errors / sum of words."""
    pairs = [(words(a), words(r)) for a, r in zip(answers, references, strict=True)]
    return np.array([(edit_distance(a, r), len(r)) for a, r in pairs], dtype=float).reshape(-1, 2)


# ---------------------------------------------------------------- the metrics by name
METRICS = {}


def metric(name, key="answer"):
    """Registers a function of rows, dicts with "answer", "references", "options" and "meta", that
    returns a Score; rows without `key` are left out and counted as missing."""
    def register(function):
        @functools.wraps(function)
        def run(rows):
            there = [row for row in rows if row.get(key) is not None]
            if not there:
                return Unavailable(name, "no answers")
            bare = [row["id"] for row in there if key == "answer" and not row["references"]]
            if bare:
                raise ValueError(f"{name}: {bare[0]} has no references; wanted at least one")
            try:
                result = function(there)
            except captions.CannotRun as reason:
                return Unavailable(name, str(reason))
            if isinstance(result, Unavailable):
                return result
            # BLEU and METEOR have no scores of single records: they are scores of the set.
            per_record = result.per_record and dict(
                zip((row.get("id") for row in there), result.per_record, strict=True))
            return dataclasses.replace(result, missing=len(rows) - len(there),
                                       per_record=per_record)
        METRICS[name] = run
        return run
    return register


def default_metrics(task):
    """The metrics of records that name none: both word error rates or exact match."""
    return ("wer_basic", "wer") if task in ERROR_RATES else ("exact",)


def unknown_metrics(record):
    """What is wrong with the names in a record's meta["metrics"], in words; "" if nothing is."""
    names = record.meta.get("metrics") or ()
    if not isinstance(names, (list, tuple)):
        return f"meta.metrics is {names!r}, wanted a list of names"
    unknown = [name for name in names if name not in METRICS]
    return f"no metric {unknown[0]!r}; there are {', '.join(METRICS)}" if unknown else ""


def unscorable(record):
    """Why no answer to a record could be scored, or none could be right; "" if all is well."""
    if record.target is None and not record.refs:
        return "neither target nor refs to score against"
    right, chosen = (record.refs or (record.target,))[0], record.meta.get("metrics") or ()
    if record.options and {"choice", "choice_lenient"} & set(chosen) and (
            plain_words(right) not in map(plain_words, record.options)):
        return f"the right answer {right!r} is none of the options {list(record.options)}"
    return unknown_metrics(record)


def score(rows, view="answer"):
    """{metric: Score or Unavailable} of the answers in row[view]: each metric over the rows that
    name it.  ValueError if a row names a metric that does not exist."""
    rows = [{"options": [], **row, "answer": row[view],
             "verdict": row.get("verdicts", {}).get(view, row.get("verdict"))} for row in rows]
    named = [(row, row["meta"].get("metrics") or default_metrics(row["task"])) for row in rows]
    names = dict.fromkeys(name for _, wanted in named for name in wanted)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"no metric {unknown[0]}; there are {', '.join(METRICS)}")
    return {name: METRICS[name]([row for row, wanted in named if name in wanted])
            for name in names}


def by_type(rows):
    """{type: rows} by meta["type"]; NExT-QA's CW, CH, TN, TC, TP, DL, DB, DC, DO by their first
    letter: C causal, T temporal, D descriptive."""
    groups = {}
    for row in rows:
        kind = row["meta"].get("type")
        if kind is not None:
            kind = kind[0] if re.fullmatch("C[WH]?|T[NCP]?|D[LBCO]?", kind) else kind
            groups.setdefault(kind, []).append(row)
    return dict(sorted(groups.items(), key=lambda group: ("CTD".find(group[0]) % 4, group[0])))


def _error_rate(rows, words, note):
    """Corpus word error rate against the first reference.  An answer is compared as it is and
    without its chat prefix or quotes, and the smaller number of errors counts: so a word that the
    reference has is never taken from the answer, and an answer equal to it has no errors."""
    answers = [" ".join(canonical(row["answer"]).split()) for row in rows]
    references = [" ".join(canonical(row["references"][0]).split()) for row in rows]
    counts = word_error_rate(answers, references, words)
    bare = list(map(without_chat, answers))
    chatty = [i for i, answer in enumerate(answers) if bare[i] != answer]
    fewer = word_error_rate([bare[i] for i in chatty], [references[i] for i in chatty], words)
    stripped = int((fewer[:, 0] < counts[chatty, 0]).sum())
    counts[chatty] = np.minimum(counts[chatty], fewer)
    kept = counts[counts[:, 1] > 0]
    if not len(kept):
        raise captions.CannotRun("no words in the references")
    notes = [note, f"{stripped} answers without their chat prefix or quotes" if stripped else "",
             left_out(len(rows) - len(kept))]
    return bootstrap(kept, lambda sums: sums[..., 0] / sums[..., 1], better="lower",
                     note=", ".join(filter(None, notes)),
                     per_record=[100 * e / n if n else None for e, n in counts])


def left_out(n):
    return f"{n} empty references left out" if n else ""


@metric("wer")
def wer(rows):
    """Word error rate after Whisper's English normaliser, over all words of the set."""
    return _error_rate(rows, whisper_english, "norm=ours")


@metric("wer_basic")
def wer_basic(rows):
    """Word error rate in lower case, letters, digits and apostrophes only."""
    return _error_rate(rows, normalise, "norm=basic")


def caption_metric(name):
    """Registers a function of (answers, references), tokens of captions, that returns a Score.
    Records whose references have no words are left out and counted in the note."""
    def register(function):
        @functools.wraps(function)
        def run(rows):
            answers, references = captions.tokenise([row["answer"] for row in rows],
                                                    [row["references"] for row in rows])
            kept = [i for i, group in enumerate(references) if any(group)]
            if not kept:
                raise captions.CannotRun("no words in the references")
            result = function(tuple(answers[i] for i in kept), tuple(references[i] for i in kept))
            own = result.per_record and dict(zip(kept, result.per_record, strict=True))
            notes = filter(None, (result.note, left_out(len(rows) - len(kept))))
            return dataclasses.replace(
                result, note=", ".join(notes),
                per_record=own and [own.get(i) for i in range(len(rows))])
        return metric(name)(run)
    return register


def _cider(answers, references):
    if len(set(references)) < 2:
        raise captions.CannotRun("needs two records with different references: it weighs a word by "
                                 "how few records have it")
    return captions.cider_d(answers, references)


@caption_metric("cider")
def cider(answers, references):
    """CIDEr-D x 100.  Score whole sets: the weights of the words come from the set.  An answer
    equal to its only reference has 1000 if it has four words or more, 250 a word below that, and
    less where all records have its words."""
    return mean_score(_cider(answers, references), unit="x100")


def _bleu(answers, references, order):
    defined = any(len(text.split()) >= order for group in references for text in group)
    return bootstrap(captions.bleu_counts(answers, references),
                     lambda sums: captions.bleu(sums)[..., order - 1], unit="x100",
                     note="" if defined else f"not defined: no reference has {order} words")


@caption_metric("bleu1")
def bleu1(answers, references):
    """BLEU-1 x 100 of the whole set, brevity by the closest reference."""
    return _bleu(answers, references, 1)


@caption_metric("bleu4")
def bleu4(answers, references):
    """BLEU-4 x 100 of the whole set, brevity by the closest reference.  Where no reference has
    four words it is not defined: COCO's constants give about 0, and the note says so."""
    return _bleu(answers, references, 4)


@caption_metric("meteor")
def meteor(answers, references):
    """METEOR 1.5 x 100 of the whole set."""
    value, sampled = captions.meteor(answers, references, resamples)
    low, high = np.percentile(sampled, (2.5, 97.5))
    return Score(100 * value, 100 * float(low), 100 * float(high), len(answers), unit="x100")


@caption_metric("spice")
def spice(answers, references):
    """SPICE x 100, the mean over records.  A caption without an object ("running fast") has no
    parts to compare and scores 0, also against itself."""
    return mean_score(captions.spice(answers, references), unit="x100")


@caption_metric("spider")
def spider(answers, references):
    """SPIDEr x 100: the mean of SPICE (0..1) and CIDEr-D (0..10)."""
    return mean_score((captions.spice(answers, references) + _cider(answers, references)) / 2,
                      unit="x100")


def _share(name, right):
    """Registers the share of rows for which right(row) holds."""
    def function(rows):
        return share_score([right(row) for row in rows])
    function.__doc__ = right.__doc__
    return metric(name)(function)


def _any_word_match(row):
    """A reference stands in the answer as whole words; for yes and no the opposite does not."""
    return any(word_match(row["answer"], reference) for reference in row["references"])


def _exact(row):
    """The whole answer is a reference, case and punctuation apart."""
    return any(plain_words(row["answer"]) == plain_words(r) for r in row["references"])


def _vqa_equal(row):
    """Equality after the VQA evaluation's processing (vqaEval.py), as InstructBLIP's accuracy on
    GQA.  GQA's own eval.py compares the strings as they are, without any processing: on its
    answers, which are lower-case words, only articles and number words make a difference."""
    return any(vqa_words(row["answer"]) == vqa_words(r) for r in row["references"])


def _choice(row):
    """The answer is the text of the right option, the first reference."""
    return plain_words(row["answer"]) == plain_words(row["references"][0])


def _choice_lenient(row):
    """The answer names the right option only, or its letter or number."""
    return lenient_choice(row["answer"], row["options"], row["references"][0])


def _label(row):
    """The answer has all content words of the sound's class; not comparable with `judged`."""
    return label_match(row["answer"], row["meta"].get("label") or row["references"][0]) or (
        _exact(row))


_share("word_match", _any_word_match)
exact = _share("exact", _exact)
acc_vqa = _share("acc_vqa", _vqa_equal)
label = _share("label_match", _label)
choice = _share("choice", _choice)
choice_lenient = _share("choice_lenient", _choice_lenient)


def _hits(row, same):
    """How many of the human answers the answer hits, by same(answer, human answer)."""
    return sum(same(row["answer"], reference) for reference in row["references"])


def _contained(answer, reference):
    return word_match(answer, reference, unquoted_vqa_words)


def _equal(answer, reference):
    return unquoted_vqa_words(answer) == unquoted_vqa_words(reference)


def _textvqa_equal(answer, reference):
    return textvqa_words(answer) == textvqa_words(reference)


def _thirds(row, same):
    """A third for each human answer hit, 1 at most; of fewer than three all must be hit."""
    return min(1, _hits(row, same) / min(3, len(row["references"])))


def _official(row):
    return leave_one_out(_hits(row, _textvqa_equal), len(row["references"]))


@metric("textvqa_soft")
def textvqa_soft(rows):
    """The paper's: a third for each human answer hit, 1 at most; a hit is contained, after the VQA
    evaluation's processing and without quotes."""
    return mean_score([_thirds(row, _contained) for row in rows], note="hit=contained")


@metric("textvqa_official")
def textvqa_official(rows):
    """TextVQA's own (TextVQAAccuracyEvaluator of mmf): equality after its processing, in which
    "'red'" keeps its single quotes, mean over leaving one human answer out."""
    return mean_score([_official(row) for row in rows], note="hit=equal, leave-one-out")


@metric("textvqa_equal")
def textvqa_equal(rows):
    """As textvqa_soft, but a hit is equal."""
    return mean_score([_thirds(row, _equal) for row in rows], note="hit=equal")


@metric("isqa")
def isqa(rows):
    """The mean over spoken questions of both sources: textvqa_soft of TextVQA's, word_match of
    GQA's (paper Appendix B: "the same measurement")."""
    return mean_score([_thirds(row, _contained) if row["meta"].get("source") == "textvqa"
                       else float(_any_word_match(row)) for row in rows],
                      note="textvqa_soft, word_match")


@metric("isqa_official")
def isqa_official(rows):
    """As isqa, with the sets' own accuracies: textvqa_official and acc_vqa."""
    return mean_score([_official(row) if row["meta"].get("source") == "textvqa"
                       else float(_vqa_equal(row)) for row in rows],
                      note="textvqa_official, acc_vqa")


@metric("judged", key="verdict")
def judged(rows):
    """Share of answers that the judge called right; rows without a verdict are missing."""
    judges = sorted({row["judge"] for row in rows if row.get("judge")})
    result = share_score([row["verdict"] is True for row in rows])
    return dataclasses.replace(result, note=f"judge {', '.join(judges)}" if judges else "")


@metric("answer_length")
def answer_length(rows):
    """Words per answer, to read beside word_match: listing many candidates scores higher there."""
    result = mean_score([len(row["answer"].split()) / 100 for row in rows])
    return dataclasses.replace(result, unit="words", better="")
