"""metrics.py against brute force, hand-made numbers and jiwer."""

import functools
import random
import unicodedata

import numpy as np
import pytest

from aveb import metrics, paper_numbers, text
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
    # an answer that never ends: 100,000 insertions
    assert metrics.edit_distance(["a", "b"] * 50_001, ["a", "b"]) == 100_000


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
    ("", ""), ("Realise, analyse; organised labour", "realize analyze organized labor"),
    ("he's done", "he is done"), ("yodelling jewellery", "yodeling jewelry"), ("1,2,3", "12 3"),
    ("minus percent 10", "-percent 10"), ("and a half", ""), ("5 per cent", "5%"),
    ("per cent", "per cent"), ("Only carpet is seen..", "only carpet is seen")])
def test_whisper_english(text, words):
    assert " ".join(whisper_english(text)) == words


# the values of all assertions of openai's tests/test_normalizer.py
OPENAI = """
two = 2; thirty one = 31; five twenty four = 524; nineteen ninety nine = 1999
twenty nineteen = 2019; two point five million = 2500000; four point two billions = 4200000000s
200 thousand = 200000; 200 thousand dollars = $200000; $20 million = $20000000
€52.4 million = €52400000; £77 thousands = £77000s; two double o eight = 2008
three thousand twenty nine = 3029; forty three thousand two hundred sixty = 43260
forty three thousand two hundred and sixty = 43260; nineteen fifties = 1950s; thirty first = 31st
thirty three thousand and three hundred and thirty third = 33333rd; three billion = 3000000000
millions = 1000000s; july third twenty twenty = july 3rd 2020
august twenty sixth twenty twenty one = august 26th 2021; 3 14 = 3 14; 3.14 = 3.14
3 point 2 = 3.2; 3 point 14 = 3.14; fourteen point 4 = 14.4; two point two five dollars = $2.25
two hundred million dollars = $200000000; $20.1 million = $20100000; ninety percent = 90%
seventy six per cent = 76%; double oh seven = 007; double zero seven = 007; nine one one = 911
nine double one = 911; one triple oh one = 10001; two thousandth = 2000th
thirty two thousandth = 32000th; minus 500 = -500; positive twenty thousand = +20000
two dollars and seventy cents = $2.70; 3 cents = ¢3; $0.36 = ¢36
three euros and sixty five cents = €3.65; three and a half million = 3500000
forty eight and a half dollars = $48.5; b747 = b 747; 10 th = 10th; 10th = 10th
mobilisation = mobilization; cancelation = cancellation; Let's = let us; he's like = he is like
she's been like = she has been like; 10km = 10 km; 10mm = 10 mm; RC232 = rc 232
Mr. Park visited Assoc. Prof. Kim Jr. = mister park visited associate professor kim junior"""


def test_whispers_own_assertions():
    pairs = [pair.split(" = ") for pair in OPENAI.replace(chr(10), "; ").split("; ")[1:]]
    assert len(pairs) == 60
    assert [(said, " ".join(whisper_english(said))) for said, _ in pairs] == [
        (said, words) for said, words in pairs]


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_transformers_numbers(seed):
    """Random words of numbers, signs, money and symbols, as transformers' EnglishTextNormalizer
    reads them, which has openai's rules.  (It raises on a few; ours never does.)"""
    theirs = pytest.importorskip(
        "transformers.models.whisper.english_normalizer").EnglishTextNormalizer({})
    words = ("oh zero one two five nine ten twelve nineteen twenty ninety hundred thousand million "
             "first third sixes twentieth tens thousandth pounds cents dollar minus plus positive "
             "and point double triple percent per cent a half dog it's 5 10 2.5 300 1,000 $20 £5 "
             "3% 007 1.0 -5 +3 .5 1.2.3 st th 0 0.5 and-a-half b747 10th ½ café ten, uh -").split()
    dice, compared = random.Random(seed), 0
    for _ in range(400):
        said = " ".join(dice.choice(words) for _ in range(dice.randrange(1, 3 + 3 * seed)))
        ours = whisper_english(said)
        try:
            wanted = theirs(said).split()
        except AssertionError:
            continue
        assert ours == wanted, said
        compared += 1
    assert compared > 300


def test_wer_says_which_normaliser():
    score = metrics.METRICS["wer"]([row('Here is the transcription: "It is two."', "It's 2"),
                                    row(None, "x")])
    assert (score.value, score.n, score.missing) == (0, 1, 1)
    assert (str(score), score.unit, score.arrow) == ("0.0 [0.0, 0.0]", "%", "↓")
    assert score.note == "norm=ours, 1 answers without their chat prefix or quotes"


# references that begin with what a chat model adds, or that are nearly nothing
TRICKY = """of course the whole thing is red|The answer: a ball|answer: red|the text: stop
okay the ball|sure here we go|so okay the ball|transcription: one two|Here's the text: go
'tis the dogs|'tis the dogs'|"red ball"|“red” and “blue”|‘red’|it’s|a|the|an a the|no|none|yes
yes and no|No, not yes|7|1,000|-5|minus 500|3.5|1,2,3|?!|...|'|""|`|👍|[noise]|(laughs)|uh um
playing sound|the sound of it|dogs'|rock 'n' roll|हिन्दी|日本|ｒｅｄ|½|x²|A|C or D|(c)|B. two men
option 2|ass, donkey|dont|it 's|$0.36|m.p.h.|one two three four five|11111""".replace("\n", "|")
TRICKY = [*TRICKY.split("|"), "cafe\u0301", "two\nlines", "a\u00a0b", "re\u00add", "\ud800x"]


@pytest.mark.parametrize("name", [n for n in metrics.METRICS if n not in (
    "judged", "answer_length", "meteor", "spice", "spider", "cider", "bleu1", "bleu4")])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_perfect_answers_score_perfectly(name, n):
    """Whatever the reference; one without words is left out of an error rate, and counted."""
    rows = [row(t, *[t] * n, options=TRICKY, meta={"source": s}, id=f"{t} {s}")
            for t in TRICKY for s in ("textvqa", "gqa")]
    score = metrics.METRICS[name](rows)
    best = 0 if name.startswith("wer") else 100
    wrong = {k: v for k, v in score.per_record.items() if v not in (best, None)}
    assert not wrong and score.value == pytest.approx(best)
    assert score.n == len(rows) or f"{len(rows) - score.n} empty references left out" in score.note


def test_a_perfect_transcript_keeps_its_first_words():
    """The chat prefix goes only where the answer is nearer to the reference without it."""
    def errors(answer, reference):
        return value("wer_basic", row(answer, reference)) * len(reference.split()) / 100
    whole = "of course the whole thing is made of wood"
    assert errors(whole, whole) == 0
    assert errors("Of course, the whole thing", "the whole thing") == 0
    assert errors("okay the ball is", "so okay the ball is") == pytest.approx(1)
    assert errors("Answer: the red ball", "the red ball") == 0
    assert errors("Answer: the red ball", "answer the red ball") == 0
    assert errors('"red ball"', "red ball") == errors("red ball", '"red ball"') == 0


@pytest.mark.parametrize("ours, theirs", [
    ("café", "cafe\u0301"), ("Å", "\u212b"), ("한글", unicodedata.normalize("NFD", "한글")),
    ("İ", "I\u0307"), ("it's", "it’s"), ("it's", "it´s"), ('"red"', "“red”"), ("'red'", "‘red’"),
    ("red ball", "red\u00a0ball"), ("red ball", "red\u2009ball"), ("red", "r\u00aded"),
    ("red ball", "\ufeffred ball\u200b"), ("red", "ｒｅｄ"), ("find", "ﬁnd"), ("red", "𝐫𝐞𝐝"),
    ("so...", "so…"), ("T-shirt", "T\u2011shirt"), ("10-20", "10–20"), ("co-op 5", "co\u2010op 5")])
def test_texts_that_look_equal(ours, theirs):
    """One form for the answer, the references, the options and the label."""
    assert text.canonical(ours) == text.canonical(theirs) and text.canonical(ours).isprintable()
    for a, b in ((ours, theirs), (theirs, ours)):
        for name in ("wer", "wer_basic", "exact", "word_match", "acc_vqa", "choice",
                     "label_match", "choice_lenient", "textvqa_official", "textvqa_soft"):
            assert value(name, row(a, b, options=["x", a, b], meta={"label": b})) == (
                0 if name.startswith("wer") else 100), name


def test_texts_that_look_different():
    assert text.canonical("x² ½ ①") == "x² ½ ①" and text.canonical("don't «a»") == "don't \"a\""
    assert value("exact", row("x2", "x²")) == value("exact", row("👎", "👍")) == 0
    assert value("exact", row("", "?!")) == value("word_match", row("", "👍")) == 0
    assert value("wer_basic", row("'red' it's", "red it's")) == 0
    assert value("wer_basic", row("the dogs", "the dogs'")) == 50
    assert value("wer", row("it's\ngot\nred", "it's got red")) == 0
    for quoted in ("'one penny'", "'the' 'one penny'", "\"'One penny.'\""):
        assert value("textvqa_soft", row(quoted, *["one penny"] * 10)) == 100
        assert value("textvqa_equal", row(quoted, *["one penny"] * 10)) == 100
    assert text.canonical("a\ud800b").encode() == "a\ufffdb".encode()
    for form in map(text.canonical, [*TRICKY, "ŉ’’ ＇ ﷺ ㎏ Ⅳ ﬃ"]):
        assert text.canonical(form) == form


@pytest.mark.parametrize("part", [
    " ", "\n", "'", '"', "*", "(", "<", "[", "1", "a", "one ", "C or ", "answer: ", "is ", "red ",
    "million ", ". ", "A. red ", "\\text{", "and a half "])
def test_an_answer_that_never_ends(part):
    """In linear time, or this test takes minutes."""
    answer = part * (60_000 // len(part))
    one = row(answer, "dark red", options=["red", "dark red"], meta={"label": "red"})
    for name in ("wer", "wer_basic", "choice_lenient", "label_match", "textvqa_official"):
        assert value(name, one) >= 0


@pytest.mark.parametrize("answer, left", [
    ("Sure! Here is the transcript: red ball", "red ball"), ("ASSISTANT: 'red'", "red"),
    ("The speaker says: “red”", "red"), ("the text is red", "the text is red"),
    ("'I don't, it's red'", "I don't, it's red"),
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


# worked by hand from the rules of vqaEval.py (VQA) and EvalAIAnswerProcessor (TextVQA)
@pytest.mark.parametrize("text, vqa, textvqa", [
    ("'red'", "'red'", "'red'"), ('"red"', "red", "red"), ("`red`", "red", "red"),
    ('say "no" now', "say no now", "say no now"), ("red,blue", "red blue", "redblue"),
    ("red, blue", "red blue", "red blue"), ("1,000", "1000", "1000"),
    ("1,000-2", "10002", "1000 2"), ("dog's", "dog's", "dog 's"), ("what?", "what", "what"),
    ("a/b", "b", "b"), ("no. 5", "no 5", "no 5"),
    ("3.5 m.", "3.5 m", "3.5 m"), ("time: 5", "time: 5", "time: 5"), ("im", "im", "im"),
    ("couldnt've", "couldn't've", "couldn't've"), ("somebody'd", "somebodyd", "somebodyd"),
    ("Coca-Cola", "coca cola", "coca cola"), ("one - two", "1 2", "1 2"), ("x?y", "x y", "xy")])
def test_official_processing(text, vqa, textvqa):
    assert " ".join(metrics.vqa_words(text)) == vqa
    assert " ".join(metrics.textvqa_words(text)) == textvqa
    assert value("acc_vqa", row(text, vqa)) == value("textvqa_official", row(text, textvqa)) == 100


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


LONGER = ["dog", "two men", "dark red", "red", "to eat"]


NAMED = {2: r"""The answer is C|**C**|[C]|(c)|C)|c.|Option C|C. text|C: text|Answer: C|**Answer:** C
**Answer: C**|\boxed{C}|$\boxed{\text{C}}$|<answer>C</answer>|"C"|'C'|`C`|Ｃ|（Ｃ）|I would choose C
I'd go with option C.|The correct answer is (C).|The best option is: **C**|choice (c)|C is correct
answer is option c.|The answer is C because the dog is red|C, because of the dog|C - dark red
{C}|> C|Correct: C|Ans. C|C .|\(C\)|C dark red|A: dark red|dark red|It is dark red.|**dark red**
A: C|A: Option C|A: The answer is (C).|That's C.|Probably (C)
the third option|The 3rd choice|3.|(3)|#3|Option 3|option three|Option 3 is correct""",
         3: """red|'red'|“red”|`red`|A red ball|I think it is red|the answer is a red ball
vitamin C is red""", 0: "A dog|The answer is a dog|e.g. the dog", 1: "i.e. two men|B two men",
         None: """C or D|C and D|C, D|C/D|(C) or (D)|The answer is C or D|Both A and C
A. dog B. two men C. dark red D. red|(c) dark red (d) red
dark red or red|F|(z)|Option 9|I am sure|U.S. soldiers|it is a thing||A cat|?|0.
None of the above"""}
NAMED = [(answer, place) for place, answers in NAMED.items()
         for answer in answers.replace("\n", "|").split("|")]
NAMED += [("Answer:\nC", 2), ("C\nThe dog.", 2), ("C\u200b.", 2), ("D.\nThe dog is red.", 3)]


@pytest.mark.parametrize("answer, place", NAMED)
def test_ways_to_name_an_option(answer, place):
    """The longest option wins; a letter counts where it marks an option, not as an article."""
    right = [i for i, option in enumerate(LONGER)
             if value("choice_lenient", row(answer, option, options=LONGER))]
    assert right == ([] if place is None else [place])


def test_options_that_are_letters():
    """There a letter is the option's text."""
    one = row("The answer is B", "B", options=["B", "A"])
    assert value("choice_lenient", one) == value("choice_lenient", {**one, "answer": "B."}) == 100
    assert value("choice_lenient", {**one, "answer": "A"}) == 0
    assert value("choice_lenient", row("B", "y", options=["x", "y", "z"])) == 100
    assert value("choice_lenient", row("B", "red", options=["", "red"])) == 100


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
    assert list(metrics.score([row("a", "a", task="asr")])) == ["wer_basic", "wer"]
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
    filler = {"meta": {"label": "playing sound"}}                 # a label without content words
    assert value("label_match", row("It is a playing sound.", "x", **filler)) == 100
    assert value("label_match", row("It is a sound.", "x", **filler)) == 0


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
    for name in metrics.default_metrics(task):
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
