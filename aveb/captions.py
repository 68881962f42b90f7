"""Caption metrics as the captioning literature reports them: COCO's caption evaluation, in the
package pycocoevalcap (extra `eval`).

     captions --tokenise (Penn Treebank)--> tokens --> BLEU-1..4, CIDEr-D, METEOR 1.5, SPICE

   The tokeniser, METEOR and SPICE are Java programs.  Where the package or Java is missing every
   metric raises CannotRun with the reason; no other measure is ever printed under their names.
   Captions are strings, tokens strings with one space between two of them; all scores are 0..1,
   but CIDEr-D is 0..10.
   Public: tokenise, bleu_counts, bleu, cider_d, meteor, spice, CannotRun."""

import contextlib
import functools
import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np

from aveb.text import canonical

ORDERS = 4                                     # n-grams of one to four words


class CannotRun(RuntimeError):
    """A metric needs something that is not here; the message names it: 'needs Java'."""


def package_folder():
    """The folder of pycocoevalcap.  CannotRun if the package or Java is not installed."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None:
        raise CannotRun('pip install -e ".[eval]"')
    if not shutil.which("java"):
        raise CannotRun("needs Java")
    return Path(package.submodule_search_locations[0])


def tokenise(answers, references):
    """Answers and each one's list of references -> the same as tuples of tokens: lower case,
    without punctuation.  The tokeniser runs once for all of them."""
    lines = [" ".join(canonical(caption).split()) for caption in (
        *answers, *(reference for group in references for reference in group))]
    # pycocoevalcap's wrapper loses count at an empty line, so these stay here.
    tokens = _tokens_of(tuple(dict.fromkeys(line for line in lines if line)))
    rest = iter([tokens.get(line, "") for line in lines])
    return tuple(next(rest) for _ in answers), tuple(
        tuple(next(rest) for _ in group) for group in references)


@functools.lru_cache(maxsize=8)         # several metrics and tables ask for the same captions
def _tokens_of(lines):
    """Lines that are all different and not empty -> {line: its tokens}."""
    package_folder()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    if not lines:
        return {}
    try:
        found = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    except OSError as error:
        raise CannotRun(f"the tokeniser failed: {error}") from error
    if len(found) != len(lines):
        raise CannotRun("the tokeniser's Java program failed")
    return {line: found[i][0] for i, line in enumerate(lines)}


def _by_record(answers, references):
    """Tokens -> pycocoevalcap's two dicts, references and answers by record."""
    return (dict(enumerate(map(list, references))),
            {i: [answer] for i, answer in enumerate(answers)})


def bleu_counts(answers, references):
    """Tokens -> (records, 10): matched n-grams of each order, n-grams of the answer of each order,
    its length, the length of the reference closest to it."""
    package_folder()
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
    rows = []
    for answer, group in zip(answers, references, strict=True):
        one = cook_test(answer, cook_refs(list(group)), eff="closest")
        rows.append([*one["correct"], *one["guess"], one["testlen"], one["reflen"]])
    return np.array(rows, float)


def bleu(counts):
    """Summed counts (..., 10) -> BLEU-1..4 (..., 4), by pycocoevalcap's formula, here for the many
    sums of a bootstrap at once.  The tiny constants are COCO's: they keep an order without a match
    from dividing by zero."""
    tiny, small = 1e-15, 1e-9
    precision = (counts[..., :4] + tiny) / (counts[..., 4:8] + small)
    mean = np.cumprod(precision, -1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (counts[..., 8:9] + tiny) / (counts[..., 9:] + small)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))                    # brevity penalty


@functools.lru_cache(maxsize=8)
def cider_d(answers, references):
    """Tokens -> CIDEr-D of each record.  An n-gram's weight is taken from the references of the
    records at hand, so a part of a set has other weights, and with one record all are 0."""
    package_folder()
    from pycocoevalcap.cider.cider import Cider
    return Cider().compute_score(*_by_record(answers, references))[1]


@functools.lru_cache(maxsize=8)                                # Java takes half a minute to start
def meteor(answers, references, resamples=None):
    """Tokens -> METEOR of the whole set, and of each resample.  resamples(number of records) ->
    (times, records): how often each record is in each of them.

    The score is made of statistics that are summed over the records, so a resample costs a sum
    only. Meteor.compute_score is not enough for that: we ask its Java program in the same
    protocol."""
    package_folder()
    from pycocoevalcap.meteor.meteor import Meteor
    scorer = Meteor()

    def evaluate(lines):
        """Statistics of several records -> METEOR of each, then of all together."""
        scorer.meteor_p.stdin.write(" ||| ".join(("EVAL", *lines)).encode() + b"\n")
        scorer.meteor_p.stdin.flush()
        return [float(scorer.meteor_p.stdout.readline()) for _ in (*lines, "all")]
    try:
        lines = [scorer._stat(answer, [*group])
                 for answer, group in zip(answers, references, strict=True)]
        total = evaluate(lines)[-1]
        if resamples is None:
            return total, []
        stats = np.array([[float(x) for x in line.split()] for line in lines])
        # An answer that is its reference, in one chunk, adds no chunk to the sum.
        ours, theirs, chunks, our_matches, their_matches = stats[:, [0, 1, 20, 21, 22]].T
        stats[(chunks == 1) & (our_matches == ours) & (their_matches == theirs), 20] = 0
        sums = [" ".join(f"{x:.10g}" for x in row) for row in resamples(len(lines)) @ stats]
        return total, evaluate(sums)[:-1]
    except (OSError, ValueError) as error:
        scorer.meteor_p.kill()
        with contextlib.suppress(BrokenPipeError):        # what Java has not read is lost
            scorer.meteor_p.stdin.close()
        message = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise CannotRun(f"METEOR's Java program stopped: {(message or [error])[-1]}") from error


@functools.lru_cache(maxsize=8)
def spice(answers, references):
    """Tokens -> SPICE of each record.  It needs Java 8 or 11 and Stanford CoreNLP 3.6.0, a large
    download that pycocoevalcap.spice.get_stanford_models makes."""
    folder = package_folder()
    if not list(folder.glob("spice/lib/stanford-corenlp-3.6.0*.jar")):
        raise CannotRun("SPICE not installed")        # the package would now download it unasked
    from pycocoevalcap.spice.spice import Spice
    try:
        _, scores = Spice().compute_score(*_by_record(answers, references))
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotRun("SPICE failed; it needs Java 8 or 11 and 8 GiB of memory") from error
    return np.array([score["All"]["f"] for score in scores])
