"""captions.py against pycocoevalcap where it is installed, hand-made numbers, and a fake jar."""

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

HAS_JARS = shutil.which("java") and importlib.util.find_spec("pycocoevalcap")
needs_jars = pytest.mark.skipif(not HAS_JARS, reason="needs Java and pycocoevalcap")

WORDS = "a dog red ball runs the on grass two men".split()
ODD = ["", ".", "'s", "n't", "--", "(", "café", "U.S.", "a a a a", "日本", "the-the", "3.5", "''"]


@pytest.fixture(autouse=True)
def tools():
    """Every test starts with the tools as they are by default."""
    before = captions.TOOLS
    yield
    captions.use(**vars(before))


def rows_of(answers, references):
    return [{"id": str(i), "prompt": "", "answer": a, "references": list(r), "options": [],
             "meta": {}} for i, (a, r) in enumerate(zip(answers, references, strict=True))]


def caption_set(seed):
    """1-7 items of 1-5 references; long, short, empty, repeated and odd captions."""
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
def theirs(answers, references):
    """pycocoevalcap on captions that are tokens already -> CIDEr-D of each item, BLEU-1..4."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    said = {i: [" ".join(tokens)] for i, tokens in enumerate(answers)}
    refs = {i: [" ".join(tokens) for tokens in group] for i, group in enumerate(references)}
    return Cider().compute_score(refs, said)[1], Bleu(4).compute_score(refs, said, verbose=0)[0]


def test_cider_and_bleu_are_pycocoevalcaps():
    pytest.importorskip("pycocoevalcap")
    worst = [0.0, 0.0]
    for seed in range(250):
        answers, references = caption_set(seed)
        answers = [captions.regex_tokens(a) for a in answers]
        references = [[captions.regex_tokens(r) for r in refs] for refs in references]
        cider, bleu = theirs(answers, references)
        ours = captions.cider_d(answers, references)
        counts = captions.bleu_counts(answers, references).sum(0)
        worst[0] = max(worst[0], 100 * np.abs(ours - cider).max())
        worst[1] = max(worst[1], 100 * np.abs(captions.bleu(counts) - bleu).max())
    print(f"largest difference in points: CIDEr-D {worst[0]:.1e}, BLEU {worst[1]:.1e}")
    assert max(worst) < 1e-8


@needs_jars
def test_tokens_of_the_jar():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    texts = [*natural_captions(300), *(a for s in range(40) for a in caption_set(s)[0])]
    ours, kind = captions.tokenise([*texts, "two\nlines", "", "a\u2028b"])
    assert kind == "ptb" and len(ours) == len(texts) + 3
    assert ours[-3:] == [["two", "lines"], [], ["a", "b"]]
    texts = [text for text in texts if text]          # their wrapper loses count on empty lines
    want = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert [" ".join(tokens) for tokens in captions.tokenise(texts)[0]] == [
        want[i][0] for i in range(len(texts))]
    close = [captions.regex_tokens(text) == tokens
             for text, tokens in zip(texts[:300], ours[:300], strict=True)]
    print(f"regular expressions agree on {sum(close)} of 300 captions")
    assert sum(close) >= 297


@needs_jars
def test_scores_hardly_depend_on_the_tokeniser():
    texts = natural_captions(1500, seed=1)
    dice = random.Random(0)
    rows = rows_of([" ".join(dice.sample(t.split(), len(t.split()))) if i % 3 else t
                    for i, t in enumerate(texts[:300])],
                   [texts[i::300] for i in range(300)])
    ptb = {name: metrics.METRICS[name](rows) for name in ("cider", "bleu1", "bleu4")}
    captions.use(java="no-such-java")
    for name, score in ptb.items():
        regex = metrics.METRICS[name](rows)
        assert (score.note, regex.note) == ("tok=ptb", "tok=regex")
        print(f"{name}: {score.value:.3f} ptb, {regex.value:.3f} regex")
        assert regex.value == pytest.approx(score.value, abs=0.05)


# ---------------------------------------------------------------- by hand
def test_bleu_by_hand():
    answers, references = [["the", "the", "cat"]], [[["the", "cat"], ["a", "cat", "sat", "here"]]]
    counts = captions.bleu_counts(answers, references)
    # "the" counts once, "cat" once; "the cat" of 2; closest length: 2 and 4 tie, the shorter
    assert counts.tolist() == [[2, 1, 0, 0, 3, 2, 1, 0, 3, 2]]
    one, two = captions.bleu(counts[0])[:2]
    assert (one, two) == (pytest.approx(2 / 3), pytest.approx(math.sqrt(2 / 3 * 1 / 2)))
    short = captions.bleu(captions.bleu_counts([["a"]], [[["a", "b", "c"]]])[0])
    assert short[0] == pytest.approx(math.exp(1 - 3))                     # brevity penalty


def test_cider_by_hand():
    # "a" is in both items: no weight. "b" and "c" weigh log 2; bigrams likewise.
    refs = [[["a", "b"]], [["a", "c"]]]
    one, none = captions.cider_d([["a", "b"], ["b"]], refs)
    assert one == pytest.approx(10 * (1 + 1) / 4) and none == 0     # orders 1 and 2 of 4
    # too long by one bigram: exp(-1 / (2 * 36)); "b" twice is clipped at once: cosine 1 / 2 * ...
    longer = captions.cider_d([["a", "b", "b"], []], refs)[0]
    bigram = 1 / math.sqrt(1)                # ("b","b") is in no reference: weighs log 2 too
    cosine = (1 / 2, bigram / math.sqrt(2))
    assert longer == pytest.approx(10 * sum(cosine) / 4 * math.exp(-1 / 72))
    assert captions.cider_d([["a", "b"]], [[["a", "b"]]]).tolist() == [0]      # one item: log 1


@pytest.mark.parametrize("caption, tokens", [
    ("A man's dog, running.", "a man 's dog running"), ("don't can't", "do n't ca n't"),
    ("a T-shirt & 3.5 \"cups\"", "a t-shirt & 3.5 cups"), ("they’re (here)", "they 're -lrb- here "
     "-rrb-"), ("cannot — stop…", "can not stop"), ("", ""), (" . ", "")])
def test_regex_tokens(caption, tokens):
    assert captions.regex_tokens(caption) == tokens.split()


def test_ceiling_and_floor():
    texts = [f"a {w} dog runs over {v} grass" for w in WORDS for v in ("wet", "dry")]
    references = [[t, t] for t in texts]
    ceiling = {"cider": 1000, "bleu1": 100, "bleu4": 100}
    for name, best in ceiling.items():
        score = metrics.METRICS[name](rows_of(texts, references))
        assert (score.value, score.n, score.missing) == (pytest.approx(best, rel=1e-6), 20, 0)
        assert metrics.METRICS[name](rows_of([""] * 20, references)).value == pytest.approx(0)


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
if "-stdio" in args:                       # METEOR: words in common, words said
    for line in sys.stdin:
        kind, *parts = [part.strip() for part in line.split("|||")]
        if "die" in parts:
            sys.exit("java.lang.Error: dead")
        if kind == "SCORE":
            said = parts[-1].split()
            best = max(len(set(said) & set(ref.split())) for ref in parts[:-1])
            print(len(said), *[0] * 20, best, 0, flush=True)
        else:
            stats = [tuple(map(float, part.split())) for part in parts]
            for row in [*stats, tuple(map(sum, zip(*stats)))]:
                print(row[21] / max(1, row[0]), flush=True)
elif "-out" in args:                       # SPICE: 1 for a caption equal to a reference
    if any("die" in item["test"] for item in json.load(open(args[-5]))):
        sys.exit("Exception in thread main java.lang.NoClassDefFoundError: x")
    json.dump([{{"image_id": item["image_id"], "scores": {{"All": {{
        "f": float(item["test"] in item["refs"])}}}}}} for item in json.load(open(args[-5]))],
        open(args[args.index("-out") + 1], "w"))
else:
    sys.exit("no tokeniser here")
"""


@pytest.fixture
def fake_java(tmp_path):
    java = tmp_path / "java"
    java.write_text(FAKE_JAVA)
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "lib").mkdir()
    for name in ("meteor.jar", "spice.jar", "lib/stanford-corenlp-3.6.0.jar"):
        (tmp_path / name).touch()
    captions.use(java=str(java), meteor_jar=str(tmp_path / "meteor.jar"),
                 spice_jar=str(tmp_path / "spice.jar"))
    return tmp_path


def test_meteor_and_spice_talk_to_their_jars(fake_java, monkeypatch):
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or
                        started[-1])
    rows = rows_of(["a dog", "red ball here now", ""], [["a dog"], ["red cat", "a ball"], ["b"]])
    meteor = metrics.METRICS["meteor"](rows)
    assert meteor.value == pytest.approx(100 * (2 + 1) / (2 + 4))      # of sums, not a mean
    assert meteor.low <= meteor.value <= meteor.high and meteor.note == "tok=regex"
    assert metrics.METRICS["spice"](rows).value == pytest.approx(100 / 3)
    cider = metrics.METRICS["cider"](rows).value
    assert metrics.METRICS["spider"](rows).value == pytest.approx((100 / 3 + cider) / 2)
    dying = metrics.METRICS["meteor"](rows_of(["die"], [["a"]]))
    assert str(dying) == "n/a (METEOR's jar stopped: java.lang.Error: dead)"
    dying = metrics.METRICS["spider"](rows_of(["die"], [["a"]]))
    assert str(dying) == "n/a (SPICE's jar failed: CoreNLP 3.6.0 is missing)"
    assert started and all(process.poll() is not None for process in started)


def test_what_cannot_run_says_so(fake_java, tmp_path):
    rows = rows_of(["a dog"], [["a dog"]])
    (fake_java / "lib" / "stanford-corenlp-3.6.0.jar").unlink()
    assert str(metrics.METRICS["spider"](rows)) == "n/a (SPICE not installed)"
    captions.use(meteor_jar="nowhere.jar")
    assert str(metrics.METRICS["meteor"](rows)).startswith("n/a (no /")
    captions.use(java="no-such-java")
    for name in ("meteor", "spice", "spider"):
        cannot = metrics.METRICS[name](rows)
        assert str(cannot) == "n/a (needs Java)" and cannot.value is None


def test_without_pycocoevalcap(monkeypatch, fake_java):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name: None if name == "pycocoevalcap" else find(name))
    captions.use(meteor_jar="", spice_jar="")
    rows = rows_of(["a dog"], [["a dog"]])
    assert str(metrics.METRICS["meteor"](rows)) == "n/a (needs pycocoevalcap)"
    assert metrics.METRICS["cider"](rows).note == "tok=regex"


def meteor_set():
    texts = natural_captions(60, seed=3)
    return [t.replace("dog", "puppy").replace("riding", "rides") for t in texts[:20]], [
        texts[i::20][:1 + i % 3] for i in range(20)]


@needs_jars
@pytest.mark.skipif("FAVOR_SLOW" not in os.environ, reason="15-30 s; FAVOR_SLOW=1 runs it")
def test_meteor_is_pycocoevalcaps():
    """The real jar, which takes most of the time to load its paraphrases."""
    rows = rows_of(*meteor_set())
    rows[3]["answer"] = ""
    score = metrics.METRICS["meteor"](rows)
    # pycocoevalcap's Meteor 1.2 on the same captions, tokenised by its PTBTokenizer
    assert score.value == pytest.approx(65.74175171700956, abs=1e-9) and score.note == "tok=ptb"
    assert score.low < score.value < score.high
