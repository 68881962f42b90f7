"""aveb/captions.py: pycocoevalcap's numbers in our intervals, hand-made ones, and a fake Java."""

import importlib.util
import math
import os
import random
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

from aveb import captions, metrics

pytest.importorskip("pycocoevalcap")
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs Java")

WORDS = "a dog red ball runs the on grass two men".split()
ODD = ["", ".", "'s", "n't", "--", "(", "café", "U.S.", "a a a a", "日本", "the-the", "3.5", "''"]


def rows_of(answers, references):
    return [{"id": str(i), "prompt": "", "answer": a, "references": list(r), "options": [],
             "meta": {}} for i, (a, r) in enumerate(zip(answers, references, strict=True))]


def caption_set(seed):
    """1-7 records of 1-5 references; long, short, empty, repeated and odd captions."""
    dice = random.Random(seed)

    def caption(least=0):
        words = [dice.choice(WORDS) for _ in range(dice.choice((least, 1, 3, 6, 12, 30)))]
        if dice.random() < 0.3:
            words.insert(0, dice.choice(ODD))
        return " ".join(words)
    answers, references = [], []
    for _ in range(dice.randrange(1, 8)):
        refs = [caption(1) for _ in range(dice.randrange(1, 6))]
        answers.append(dice.choice((caption(), caption(), refs[0], refs[-1] + " too", "")))
        references.append(refs)
    return answers, references


def natural_captions(n, seed=0):
    """Captions as people type them: hyphens, possessives, contractions, abbreviations, numbers."""
    dice = random.Random(seed)
    who = ["A man", "Two men", "The woman's dog", "A T-shirt-clad boy", "Mr. Jones", "An old lady",
           "A black-and-white cat", "3 kids", "Someone", "The St. Bernard", "A U.S. soldier",
           "A group of people (about 10)", "Children", "A 2nd player", "A rock'n'roll band"]
    does = ["is riding a bike", "doesn't move", "can't stop laughing", "cannot see the ball",
            "runs; another follows", "speaks, then coughs", "holds a sign: \"STOP\"", "we're told,"
            " sings", "they've left", "is gonna jump", "waits at 10:30 a.m.", "eats fish & chips",
            "plays R&B music", "pays $5.50", "is 50% wet", "who's smiling - waves", "isn't there",
            "says 'hello'", "he'll fall", "I'm fine", "looks left/right", "hums... softly"]
    where = ["in the park.", "on the street", "near the dogs' house!", "by a ‘shop’", "at No. 7",
             "while it’s raining", "in front of a mid-1990s car", "with 1,000 others -- outside",
             "on a #9 bus", "in the '90s", "as a horn blares, loudly.", "at a café", "[inside]"]
    return [" ".join((dice.choice(who), dice.choice(does), dice.choice(where))) for _ in range(n)]


# ---------------------------------------------------------------- against pycocoevalcap
def test_bleu_is_pycocoevalcaps():
    """Our formula on the summed counts, which a bootstrap needs."""
    from pycocoevalcap.bleu.bleu import Bleu
    worst = 0.0
    for seed in range(250):
        answers, references = caption_set(seed)
        theirs = Bleu(4).compute_score(dict(enumerate(references)), {
            i: [answer] for i, answer in enumerate(answers)}, verbose=0)[0]
        ours = captions.bleu(captions.bleu_counts(answers, references).sum(0))
        worst = max(worst, 100 * np.abs(ours - theirs).max())
    print(f"largest difference in points: {worst:.1e}")
    assert worst < 1e-8


@needs_java
def test_tokens():
    """Each caption gets its own tokens, whatever stands in the others: empty ones, line breaks."""
    texts = [*natural_captions(300), *(a for s in range(40) for a in caption_set(s)[0])]
    ours, (refs, none) = captions.tokenise([*texts, "two\nlines", "", "a\u2028b"], [texts, []])
    assert ours[-3:] == ("two lines", "", "a b") and refs == ours[:-3] and none == ()
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    filled = [i for i, text in enumerate(texts) if text]         # it loses count at empty lines
    want = PTBTokenizer().tokenize({i: [{"caption": texts[i]}] for i in filled})
    assert [ours[i] for i in filled] == [want[i][0] for i in filled]
    assert captions.tokenise(["A man's dog (wet), can't.", " . "], [])[0] == (
        "a man 's dog -lrb- wet -rrb- ca n't", "")


# ---------------------------------------------------------------- by hand
def test_bleu_by_hand():
    answers, references = ["the the cat"], [["the cat", "a cat sat here"]]
    counts = captions.bleu_counts(answers, references)
    # "the" counts once, "cat" once; "the cat" of 2; closest length: 2 and 4 tie, the shorter
    assert counts.tolist() == [[2, 1, 0, 0, 3, 2, 1, 0, 3, 2]]
    one, two = captions.bleu(counts[0])[:2]
    assert (one, two) == (pytest.approx(2 / 3), pytest.approx(math.sqrt(2 / 3 * 1 / 2)))
    short = captions.bleu(captions.bleu_counts(["a"], [["a b c"]])[0])
    assert short[0] == pytest.approx(math.exp(1 - 3))                     # brevity penalty


def test_cider_by_hand():
    # "a" is in both records: no weight. "b" and "c" weigh log 2; bigrams likewise.
    refs = (("a b",), ("a c",))
    one, none = captions.cider_d(("a b", "b"), refs)
    assert one == pytest.approx(10 * (1 + 1) / 4) and none == 0     # orders 1 and 2 of 4
    # too long by one bigram: exp(-1 / (2 * 36)); "b" twice is clipped at once: cosine 1 / 2 * ...
    longer = captions.cider_d(("a b b", ""), refs)[0]
    bigram = 1 / math.sqrt(1)                # ("b","b") is in no reference: weighs log 2 too
    cosine = (1 / 2, bigram / math.sqrt(2))
    assert longer == pytest.approx(10 * sum(cosine) / 4 * math.exp(-1 / 72))
    assert captions.cider_d(("a b",), (("a b",),)).tolist() == [0]      # one record: log 1


@needs_java
def test_ceiling_and_floor():
    texts = [f"a {w} dog runs over {v} grass" for w in WORDS for v in ("wet", "dry")]
    references = [[t, t] for t in texts]
    ceiling = {"cider": 1000, "bleu1": 100, "bleu4": 100}
    for name, best in ceiling.items():
        score = metrics.METRICS[name](rows_of(texts, references))
        assert (score.value, score.n, score.missing) == (pytest.approx(best, rel=1e-6), 20, 0)
        assert metrics.METRICS[name](rows_of([""] * 20, references)).value == pytest.approx(0)


@needs_java
def test_captions_that_cannot_be_compared():
    """Left out and counted, or said: never silently 0."""
    texts = ["a red dog runs", "two men sit here", "...", "cafe\u0301 “red” it’s"]
    perfect = rows_of(texts, [[t] for t in texts])
    for name, best in (("bleu1", 100), ("bleu4", 100), ("cider", 1000)):
        score = metrics.METRICS[name](perfect)
        assert (score.value, score.n) == (pytest.approx(best), 3), name
        assert score.note == "1 empty references left out"
        assert score.per_record == {} or [*score.per_record.values()][2] is None
    nothing = rows_of(["a"], [["..."]])
    assert str(metrics.METRICS["bleu1"](nothing)) == "n/a (no words in the references)"
    one = metrics.METRICS["cider"](rows_of(["a dog", "a dog"], [["a dog"]] * 2))
    assert str(one).startswith("n/a (needs two records with different references")
    short = metrics.METRICS["bleu4"](rows_of(["a dog"], [["a dog"]]))
    assert short.note == "not defined: no reference has 4 words" and short.value < 1
    looks = metrics.METRICS["bleu1"](
        rows_of(["caf\u00e9 it's \ud800"], [["cafe\u0301 it’s \ufffd"]]))
    assert looks.value == pytest.approx(100)


@needs_java
def test_intervals_hold_the_value():
    answers, references = zip(*((f"a {w} dog", [f"a {v} dog", "two men"])
                                for w in WORDS for v in WORDS), strict=True)
    for name in ("cider", "bleu1", "bleu4"):
        score = metrics.METRICS[name](rows_of(answers, references))
        assert score.low < score.value < score.high, name
        assert score == metrics.METRICS[name](rows_of(answers, references))         # seeded


# ---------------------------------------------------------------- Java
FAKE_JAVA = f"""#!{sys.executable}
import json, sys
args = sys.argv[1:]
if "edu.stanford.nlp.process.PTBTokenizer" in args:
    print(open(args[-1]).read().lower())
elif "-stdio" in args:                       # METEOR: words in common, words in the answer
    for line in sys.stdin:
        kind, *parts = [part.strip() for part in line.split("|||")]
        if "die" in parts:
            sys.exit("java.lang.Error: dead")
        if kind == "SCORE":
            answer = parts[-1].split()
            best = max(len(set(answer) & set(ref.split())) for ref in parts[:-1])
            print(len(answer), *[0] * 20, best, 0, flush=True)
        else:
            stats = [tuple(map(float, part.split())) for part in parts]
            for row in [*stats, tuple(map(sum, zip(*stats)))]:
                print(row[21] / max(1, row[0]), flush=True)
elif "-out" in args:                         # SPICE: 1 for a caption equal to a reference
    asked = args[args.index("-cache") - 1]
    if any("die" in item["test"] for item in json.load(open(asked))):
        sys.exit("Exception in thread main java.lang.NoClassDefFoundError: x")
    json.dump([{{"image_id": item["image_id"], "scores": {{"All": {{
        "f": float(item["test"] in item["refs"])}}}}}} for item in json.load(open(asked))],
        open(args[args.index("-out") + 1], "w"))
"""


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """A `java` on the PATH, and pycocoevalcap's folder as if CoreNLP were there."""
    java = tmp_path / "java"
    java.write_text(FAKE_JAVA)
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    (tmp_path / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").touch()
    found = captions.package_folder
    monkeypatch.setattr(captions, "package_folder", lambda: found() and tmp_path)
    import pycocoevalcap.spice.spice as theirs
    monkeypatch.setattr(theirs, "get_stanford_models", lambda: None)
    forget()
    yield tmp_path
    forget()


def forget():
    """What Java said is remembered; the next test has another Java."""
    for function in (captions._tokens_of, captions.meteor, captions.spice):
        function.cache_clear()


def test_meteor_and_spice_talk_to_java(fake_java, monkeypatch):
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or
                        started[-1])
    rows = rows_of(["a dog", "red ball here now", ""], [["a dog"], ["red cat", "a ball"], ["b"]])
    meteor = metrics.METRICS["meteor"](rows)
    assert meteor.value == pytest.approx(100 * (2 + 1) / (2 + 4))      # of sums, not a mean
    assert meteor.low <= meteor.value <= meteor.high
    n = len(started)
    assert metrics.METRICS["meteor"](rows) == meteor and len(started) == n       # remembered
    monkeypatch.setattr(subprocess, "Popen", start)
    assert metrics.METRICS["spice"](rows).value == pytest.approx(100 / 3)
    cider = metrics.METRICS["cider"](rows).value
    assert metrics.METRICS["spider"](rows).value == pytest.approx((100 / 3 + cider) / 2)
    dying = metrics.METRICS["meteor"](rows_of(["die"], [["a"]]))
    assert str(dying) == "n/a (METEOR's Java program stopped: java.lang.Error: dead)"
    dying = metrics.METRICS["spider"](rows_of(["die"], [["a"]]))
    assert str(dying) == "n/a (SPICE failed; it needs Java 8 or 11 and 8 GiB of memory)"


def test_what_cannot_run_says_so(fake_java):
    rows = rows_of(["a dog"], [["a dog"]])
    (fake_java / "spice" / "lib" / "stanford-corenlp-3.6.0.jar").unlink()
    assert str(metrics.METRICS["spider"](rows)) == "n/a (SPICE not installed)"
    (fake_java / "java").write_text(f"#!{sys.executable}\n")
    rows.append({**rows[0], "answer": "a cat"})
    forget()
    assert str(metrics.METRICS["cider"](rows)) == "n/a (the tokeniser's Java program failed)"
    (fake_java / "java").unlink()
    for name in ("meteor", "spice", "spider", "cider", "bleu1", "bleu4"):
        cannot = metrics.METRICS[name](rows)
        assert str(cannot) == "n/a (needs Java)" and cannot.value is None


def test_without_pycocoevalcap(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "pycocoevalcap" else find(name))
    forget()
    for name in ("meteor", "cider"):
        assert str(metrics.METRICS[name](rows_of(["a dog"], [["a dog"]]))) == (
            'n/a (pip install -e ".[eval]")')


def meteor_set():
    texts = natural_captions(60, seed=3)
    return [t.replace("dog", "puppy").replace("riding", "rides") for t in texts[:20]], [
        texts[i::20][:1 + i % 3] for i in range(20)]


@needs_java
@pytest.mark.skipif("FAVOR_SLOW" not in os.environ, reason="15-30 s; FAVOR_SLOW=1 runs it")
def test_meteor_is_pycocoevalcaps():
    """The real jar, which takes most of the time to load its paraphrases."""
    rows = rows_of(*meteor_set())
    rows[3]["answer"] = ""
    score = metrics.METRICS["meteor"](rows)
    # pycocoevalcap's Meteor 1.2 on the same captions, tokenised by its PTBTokenizer
    assert score.value == pytest.approx(65.74175171700956, abs=1e-9)
    assert score.low < score.value < score.high
