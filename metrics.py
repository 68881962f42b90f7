"""How answers are scored: text normalisation, word error rate, accuracies, 95 % intervals, and
every metric of the benchmark under its name (captions: captions.py).

     rows [{id, prompt, answer, references, options, meta}] --METRICS[name]--> Score | Unavailable

An answer None is missing: counted, not scored.  A metric that cannot run here returns
Unavailable, printed as `n/a (needs Java)`.

Public: METRICS, measure, by_type, Score, Unavailable; normalise, whisper_english, vqa_words,
edit_distance, word_error_rate, exact_match, score, ERROR_RATES."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

import captions

ERROR_RATES = ("asr", "ac", "avsr")       # scored by WER (less is better), the others by accuracy


# ---------------------------------------------------------------- text: plain, and as VQA does it
def normalise(text):
    """Lower case, words only: 'Red ball, blue box.' -> ['red', 'ball', 'blue', 'box']."""
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower().replace("’", "'"))
    return kept.split()


def plain_words(text):
    """normalise() without the apostrophes around a word: "'red'" -> ['red']."""
    return [word for word in (w.strip("'") for w in normalise(text)) if word]


VQA_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                       "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))
VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
NEGATED = ("ai are ca could did do does had has have is might must need should wo would was were"
           ).split()
CONTRACTED = {"im": "i'm", "ive": "i've", "lets": "let's", "maam": "ma'am", "oclock": "o'clock",
              "yall": "y'all", **{f"{word}nt": f"{word}n't" for word in NEGATED},
              **{f"{who}{end}": f"{who}'{end}"
                 for who in ("he", "she", "that", "there", "what", "where", "who", "how")
                 for end in ("s", "d", "ll") if f"{who}{end}" not in ("shed", "shell", "hell")},
              **{f"{who}{end}": f"{who}'{end}"
                 for who in ("you", "they", "we", "could", "should", "would", "might")
                 for end in ("re", "ve", "ll") if f"{who}{end}" not in ("were", "well")}}


def vqa_words(text):
    """Words after the processing of the VQA and TextVQA evaluation (EvalAI): lower case, no
    punctuation (deleted where the text has the mark beside a space or between digits, else a
    space), no articles, number words as digits, apostrophes put back.  A text of articles and
    punctuation only stays as it is, so that it can still be told from silence."""
    text = " ".join(text.lower().replace("’", "'").split())
    kept, digits = text, re.search(r"\d,\d", text) is not None
    for mark in VQA_MARKS:
        delete = f"{mark} " in text or f" {mark}" in text or digits
        kept = kept.replace(mark, "" if delete else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)                        # the point of 3.5 stays
    words = [VQA_NUMBERS.get(word, word) for word in kept.split()]
    words = [CONTRACTED.get(word, word) for word in words if word not in ("a", "an", "the")]
    words = [word for word in (w.strip("'") for w in words) if word]
    return words or plain_words(text)


# ---------------------------------------------------------------- text: Whisper's English
# After Radford et al. 2022, Appendix C, whose twelve steps whisper_english() follows; the tables
# are ours and shorter (two thirds of its 1739 British forms).  tests/test_metrics.py measures how
# often it agrees with the original.
FILLERS = re.compile(r"\b(hmm|mm|mhm|mmm|uh|um)\b")
INFORMAL = {
    r"won't": "will not", r"can't": "can not", r"let's": "let us", r"ain't": "aint",
    r"y'all": "you all", r"wanna": "want to", r"gotta": "got to", r"gonna": "going to",
    r"i'ma": "i am going to", r"imma": "i am going to", r"woulda": "would have",
    r"coulda": "could have", r"shoulda": "should have", r"ma'am": "madam",
    r"mr": "mister", r"mrs": "missus", r"st": "saint", r"dr": "doctor", r"prof": "professor",
    r"capt": "captain", r"gov": "governor", r"ald": "alderman", r"gen": "general",
    r"sen": "senator", r"rep": "representative", r"pres": "president", r"rev": "reverend",
    r"hon": "honorable", r"asst": "assistant", r"assoc": "associate", r"lt": "lieutenant",
    r"col": "colonel", r"jr": "junior", r"sr": "senior", r"esq": "esquire"}
INFORMAL_WORD = re.compile(r"\b(" + "|".join(sorted(INFORMAL, key=len, reverse=True)) + r")\b")
ENDINGS = ((r"'d(?= (?:been|gone|done)\b)", " had"), (r"'s(?= (?:been|gone|done|got)\b)", " has"),
           (r"n't\b", " not"), (r"'re\b", " are"), (r"'s\b", " is"), (r"'d\b", " would"),
           (r"'ll\b", " will"), (r"'t\b", " not"), (r"'ve\b", " have"), (r"'m\b", " am"))
LETTERS = str.maketrans({"œ": "oe", "ø": "o", "æ": "ae", "ß": "ss", "đ": "d", "ð": "d", "þ": "th",
                         "ł": "l"})

# "ninth" and "zeros" stay words, as in Whisper's
DIGITS = {word: i for i, word in enumerate(
    ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
     "fifteen sixteen seventeen eighteen nineteen").split())}
DIGITS |= {"o": 0, "oh": 0}
TENS = {word: 10 * i for i, word in enumerate(
    "twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
POWERS = {"hundred": 100} | {word: 1000 ** i for i, word in enumerate(
    "thousand million billion trillion quadrillion quintillion".split(), 1)}
ORDINALS = {"first": (1, "st"), "second": (2, "nd"), "third": (3, "rd"), "fifth": (5, "th"),
            "eighth": (8, "th"), "twelfth": (12, "th"), "zeroth": (0, "th"),
            **{f"{w}th": (DIGITS[w], "th") for w in DIGITS
               if w not in ("zero", "o", "oh", "one", "two", "three", "five", "eight", "nine",
                            "twelve")}}
PLURALS = {"sixes": (6, "s"),
           **{f"{w}s": (n, "s") for w, n in DIGITS.items() if n and w != "six"}}
ENDED = {**ORDINALS, **PLURALS}                                # number words with an ending
TENS_ENDED = {**{w[:-1] + "ieth": (n, "th") for w, n in TENS.items()},
              **{w[:-1] + "ies": (n, "s") for w, n in TENS.items()}}
POWERS_ENDED = {**{f"{w}th": (n, "th") for w, n in POWERS.items()},
                **{f"{w}s": (n, "s") for w, n in POWERS.items()}}
SIGNS = {"minus": "-", "negative": "-", "plus": "+", "positive": "+"}
UNITS = {"pound": "£", "pounds": "£", "euro": "€", "euros": "€", "dollar": "$", "dollars": "$",
         "cent": "¢", "cents": "¢"}
NUMBER_WORDS = {*DIGITS, *TENS, *POWERS, *ENDED, *TENS_ENDED, *POWERS_ENDED}
NUMERAL = re.compile(r"[-+£€$¢]?\d+(\.\d+)?$")


class SpokenNumbers:
    """Words -> words with the numbers among them written in digits: 'nineteen eighty four' ->
    '1984', 'two hundred and five' -> '205', 'twenty dollars' -> '$20'."""

    def __init__(self, words):
        self.words, self.out, self.number, self.sign = words, [], None, ""

    def flush(self, *more, ending="", unit=""):
        """Ends the number at hand, if any; `more` words follow it."""
        if self.number is not None:
            self.out.append(f"{unit or self.sign}{self.number}{ending}")
        self.number, self.sign = None, ""
        self.out += more

    def append(self, digits):
        """'nineteen' 'eighty' -> '1980': said one after the other, not a sum."""
        self.number = f"{'' if self.number is None else self.number}{digits}"

    def below_twenty(self, value, before):
        number = self.number
        if number is None:
            self.number = value
        elif isinstance(number, str) or before in DIGITS:
            if before in TENS and value < 10:                          # 'nineteen eighty' 'four'
                self.number = number[:-1]
            self.append(value)
        elif number % (10 if value < 10 else 100) == 0:
            self.number += value
        else:
            self.append(value)

    def tens(self, value):
        if self.number is None:
            self.number = value
        elif isinstance(self.number, str) or self.number % 100:
            self.append(value)
        else:
            self.number += value

    def power(self, value):
        number = self.number
        if number is None:
            self.number = value
        elif isinstance(number, str) or number == 0:
            decimal = re.fullmatch(r"\d*\.?\d+", str(number))     # "three point five million"
            times = Fraction(number) * value if decimal else Fraction(1, 2)
            if times.denominator > 1:
                self.flush()
            self.number = int(times) if times.denominator == 1 else value
        else:                                     # 'two thousand' 'three' 'hundred': 2000 + 3 * 100
            self.number = number // 1000 * 1000 + number % 1000 * value

    def numeral(self, word):
        if isinstance(self.number, str) and self.number.endswith("."):
            self.append(word)
            return
        self.flush()
        if word[0] in "-+£€$¢":
            self.sign, word = word[0], word[1:]
        whole = Fraction(word).denominator == 1                                        # 2.0
        self.number = int(Fraction(word)) if whole else word

    def special(self, word, before, after):
        """Words that are part of a number only in company."""
        can_follow = after in NUMBER_WORDS or bool(NUMERAL.match(after))
        if word in UNITS and self.number is not None:
            self.flush(unit=UNITS[word])
        elif word == "percent" and self.number is not None:
            self.flush(ending="%")
        elif word == "and" and can_follow and before in POWERS:
            pass
        elif word in SIGNS and can_follow:
            self.flush()
            self.sign = SIGNS[word]
        elif word == "point" and (after in DIGITS or after in TENS or NUMERAL.match(after)):
            self.append(".")
        elif word in ("double", "triple") and after in DIGITS:
            self.append(str(DIGITS[after]) * (2 if word == "double" else 3))
        else:
            self.flush(word)

    def read(self):
        words = ["", *self.words, ""]
        for before, word, after in zip(words, words[1:], words[2:], strict=False):
            if word in DIGITS and before in ("double", "triple"):
                continue
            if NUMERAL.match(word):
                self.numeral(word)
            elif DIGITS.get(word) == 0:
                self.append(0)
            elif word in DIGITS:
                self.below_twenty(DIGITS[word], before)
            elif word in TENS:
                self.tens(TENS[word])
            elif word in POWERS:
                self.power(POWERS[word])
            elif word in ENDED:
                self.below_twenty(ENDED[word][0], before)
                self.flush(ending=ENDED[word][1])
            elif word in TENS_ENDED:
                self.tens(TENS_ENDED[word][0])
                self.flush(ending=TENS_ENDED[word][1])
            elif word in POWERS_ENDED:
                self.power(POWERS_ENDED[word][0])
                self.flush(ending=POWERS_ENDED[word][1])
            elif word:
                self.special(word, before, after)
        self.flush()
        return self.out


def numbers_in_digits(text):
    text = re.sub(r"\b(\d+|" + "|".join({*DIGITS, *TENS, *POWERS}) + r") and a half\b",
                  r"\1 point five", re.sub(r"\bper cent\b", "percent", text))
    text = re.sub(r"(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ", text)
    text = re.sub(r"(?<=\d)\s+(?=(?:st|nd|rd|th|s)\b)", "", text)
    text = " ".join(SpokenNumbers(text.split()).read())
    text = re.sub(r"([€£$]\d+) (?:and )?¢(\d{1,2})\b", lambda m: f"{m[1]}.{int(m[2]):02d}", text)
    text = re.sub(r"[€£$]0\.(\d{1,2})\b", lambda m: f"¢{int(m[1])}", text)
    return re.sub(r"\b1(s?)\b", r"one\1", text)


# British -> American.  Stems, with the endings that follow them.
OUR = ("ard arm behavi misbehavi cand clam col discol demean endeav fav disfav ferv flav harb hon "
       "dishon hum lab neighb od parl ranc rum sav savi splend succ tum val vap vig")
RE = ("calib cent fib kilomet centimet millimet lit lust meag met nit och sab scept somb spect "
      "theat")
ISE = "al|an|ar|at|en|er|et|ic|il|im|in|it|ol|on|or"           # realise; not promise, exercise
ISE_STEMS = ("apolog econom emphas energ epitom eulog hypothes jeopard ostrac oxid philosoph "
             "plagiar random recogn subsid standard sympath synchron synthes terror util vandal "
             "victim")
YSE = "anal catal paral"
DOUBLED_L = ("cancel channel chisel counsel dial duel equal fuel funnel grovel initial jewel label "
             "level libel marvel model panel pedal quarrel ravel unravel revel rival shovel "
             "shrivel signal snivel spiral swivel total trammel travel tunnel")
SPELLING_RULES = tuple((re.compile(r"\b(" + stems.replace(" ", "|") + ")" + pattern), new)
                       for stems, pattern, new in (
    (OUR, r"our(?=s?\b|ed|ing|er|abl|ful|less|ite|it|hood|ly|y|ist|al|some)", r"\1or"),
    ("glam rig", r"our\b", r"\1or"), (RE, r"re(s?)\b", r"\1er\2"), (RE, r"red\b", r"\1ered"),
    (ISE_STEMS, r"is(?=e|ing|ation|able)", r"\1iz"),
    (rf"(?!treat)\w{{2,}}(?:{ISE})", r"is(?=e[drs]?\b|ers\b|ing)", r"\1iz"),
    (YSE, r"ys(?=ed?\b|ing|er\b|ers\b|es\b)", r"\1yz"),
    (r"(?!improv)\w+", r"is(?=ations?\b)", r"\1iz"),
    (DOUBLED_L, r"l(?=ed\b|ing|er|ous|or)", r"\1"),
    ("cata dia ana mono epi pro", r"logue(s?)\b", r"\1log\2"),
    ("def off pret", r"ence(s?|less)\b", r"\1ense\2"), ("licen", r"ce(?=s?\b)", r"\1se"),
    ("skil wil", r"ful(?=ly\b|ness\b|\b)", r"\1lful"),
    ("fulfil enrol instal appal instil distil enthral", r"(?=s\b|ments?\b|\b)", r"\1l"),
    ("m sm", r"oul(?=d|t)", r"\1ol")))
SPELLING_WORDS = dict(pair.split(":") for pair in (
    "grey:gray greys:grays greyish:grayish plough:plow ploughs:plows ploughed:plowed "
    "ploughing:plowing cheque:check cheques:checks tyre:tire tyres:tires moustache:mustache "
    "moustaches:mustaches jewellery:jewelry sceptic:skeptic sceptics:skeptics sceptical:skeptical "
    "scepticism:skepticism pyjamas:pajamas sulphur:sulfur aluminium:aluminum aeroplane:airplane "
    "aeroplanes:airplanes draught:draft draughts:drafts gaol:jail cosy:cozy programme:program "
    "programmes:programs judgement:judgment ageing:aging anaemia:anemia anaesthetic:anesthetic "
    "archaeology:archeology artefact:artifact artefacts:artifacts axe:ax behove:behoove "
    "chilli:chili diarrhoea:diarrhea encyclopaedia:encyclopedia foetus:fetus "
    "gynaecology:gynecology haemorrhage:hemorrhage manoeuvres:maneuvers manoeuvre:maneuver "
    "manoeuvred:maneuvered manoeuvring:maneuvering mediaeval:medieval omelette:omelet "
    "orthopaedic:orthopedic paediatric:pediatric practise:practice practised:practiced "
    "practising:practicing storey:story storeys:stories waggon:wagon waggons:wagons "
    "woollen:woolen woolly:wooly yoghurt:yogurt leukaemia:leukemia oestrogen:estrogen "
    "phoney:phony likeable:likable cypher:cipher").split())


def american(text):
    for pattern, replacement in SPELLING_RULES:
        text = pattern.sub(replacement, text)
    return " ".join(SPELLING_WORDS.get(word, word) for word in text.split())


def whisper_english(text):
    """Our own normaliser after the description of Whisper's (Radford et al. 2022, Appendix C)."""
    text = text.lower()
    text = re.sub(r"[<\[][^>\]]*[>\]]", "", text)                       # 1: in brackets
    text = re.sub(r"\(([^)]+?)\)", "", text)                            # 2: in parentheses
    text = FILLERS.sub("", text)                                        # 3
    text = re.sub(r"\s+'", "'", text)                                   # 4
    text = INFORMAL_WORD.sub(lambda match: INFORMAL[match[0]] + " ", text)      # 5
    for ending, full in ENDINGS:
        text = re.sub(ending, full, text)
    text = re.sub(r"(?<=\d),(?=\d)", "", text)                          # 6
    text = re.sub(r"\.(?!\d)", " ", text)                               # 7
    decomposed = unicodedata.normalize("NFKD", text.translate(LETTERS))
    text = "".join(c if c in ".%$¢€£" else "" if unicodedata.category(c) == "Mn"
                   else " " if unicodedata.category(c)[0] in "MSP" else c
                   for c in decomposed)                                 # 8
    text = american(numbers_in_digits(text))                            # 9, 10
    text = re.sub(r"[.$¢€£](?!\d)", " ", text)                          # 11
    text = re.sub(r"(?<!\d)%", " ", text)
    return text.split()                                                 # 12


@functools.cache
def whisper_normaliser():
    """text -> words, and its name: the package whisper-normalizer where it is installed, else
    ours."""
    if importlib.util.find_spec("whisper_normalizer") is None:
        return whisper_english, "norm=ours"
    from whisper_normalizer.english import EnglishTextNormalizer
    original = EnglishTextNormalizer()
    version = importlib.metadata.version("whisper-normalizer")
    return (lambda text: original(text).split()), f"norm=whisper-normalizer {version}"


# ---------------------------------------------------------------- distances and matches
def edit_distance(ours, theirs):
    """Fewest substitutions, deletions and insertions that turn one list into the other."""
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def word_error_rate(answers, references, words=normalise):
    """(errors, reference words) per item, after `words`; WER = sum of errors / sum of words."""
    pairs = [(words(a), words(r)) for a, r in zip(answers, references, strict=True)]
    return np.array([(edit_distance(a, r), len(r)) for a, r in pairs], dtype=float).reshape(-1, 2)


def exact_match(answer, references):
    """True when the whole normalised answer is one of the references."""
    return any(normalise(answer) == normalise(reference) for reference in references)


def contains(words, part):
    """Whether the words of `part` stand in `words` one after the other: 'cat' not in 'catalog'."""
    return bool(part) and any(words[i:i + len(part)] == part
                              for i in range(len(words) - len(part) + 1))


OPPOSITE = {"yes": "no", "no": "yes"}


def word_match(answer, reference, words=plain_words):
    """The reference's words stand in the answer; the opposite of a yes or no does not."""
    said, wanted = words(answer), words(reference)
    opposite = OPPOSITE.get(" ".join(wanted))
    return contains(said, wanted) and opposite not in said


def leave_one_out(hits, n):
    """TextVQA's and VQA's official accuracy: the mean over leaving one of the n human answers out
    of min(1, hits among the others / 3); n = 10: 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 hits."""
    if n == 1:
        return float(hits)
    return (hits * min(1, (hits - 1) / 3) + (n - hits) * min(1, hits / 3)) / n


LEADING = re.compile(r"^(?:(?:option|answer)(?: is)?:? )?\(?([a-z]|\d+)(?:[).:](?!\d)|$)", re.I)


def lenient_choice(answer, options, right):
    """The right option's text; or it is the only option that the answer contains; or the answer
    starts with its letter or number (counted from 1) and contains no option."""
    if plain_words(answer) == plain_words(right):
        return True
    said = plain_words(answer)
    named = [option for option in options if contains(said, plain_words(option))]
    mark = LEADING.match(" ".join(answer.split()))
    if not named and mark:
        letter = mark[1].lower()
        at = int(letter) - 1 if letter.isdigit() else ord(letter) - ord("a")
        named = [options[at]] if 0 <= at < len(options) else []
    return len(named) == 1 and plain_words(named[0]) == plain_words(right)


CHAT = re.compile(
    r"^\s*(?:(?:assistant|answer|transcript(?:ion)?)\s*:"
    r"|(?:sure|certainly|okay|of course)[,.!]*\s*(?=here\b|the\b)"
    r"|(?:here is|here's|the)\s(?:the\s)?(?:transcript(?:ion)?|speech|text|speaker|audio)"
    r"(?:\s[^:]{0,40})?:)\s*", re.I)
QUOTED = re.compile(r"""^\s*(?:"(.*)"|“(.*)”|'([^']*)')\s*$""", re.S)


def without_chat(answer):
    """'Sure, here is the transcription: "red ball"' -> 'red ball'."""
    while (shorter := CHAT.sub("", answer)) != answer:
        answer = shorter
    quoted = QUOTED.match(answer)
    return next(part for part in quoted.groups() if part is not None) if quoted else answer


# ---------------------------------------------------------------- scores and their intervals
@dataclass(frozen=True)
class Score:
    """In percent (or its unit), with a 95 % interval: Wilson's for a share of right answers, over
    items otherwise."""
    value: float
    low: float
    high: float
    n: int
    missing: int = 0                  # items without an answer, not among the n
    unit: str = "%"
    better: str = "higher"
    note: str = ""                    # how it was made: 'tok=regex'

    def __str__(self):
        return f"{self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"

    @property
    def arrow(self):
        return {"higher": "↑", "lower": "↓"}.get(self.better, "")

    def in_full(self):
        """'14.4 % ↓ [12.7, 16.0], n 500, missing 3; norm=ours'."""
        words = [f"{self.value:.1f}", self.unit, self.arrow, f"[{self.low:.1f}, {self.high:.1f}],",
                 f"n {self.n}, missing {self.missing}" + (f"; {self.note}" if self.note else "")]
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Unavailable:
    """A metric that cannot be computed here, and why."""
    name: str
    reason: str
    value = None

    def __str__(self):
        return f"n/a ({self.reason})"

    in_full = __str__


def wilson(right, n):
    """Score of `right` of n: Wilson's interval."""
    share, z2 = right / n, 1.96 ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Score(100 * share, 100 * max(0, centre - half), 100 * min(1, centre + half), n)


@functools.lru_cache(maxsize=1)
def resamples(n, times=1000, seed=0):
    """(times, n): how often each of n items is drawn, with replacement; the same every time."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), times).astype(float)


def bootstrap(counts, measure, **kind):
    """Score of measure(sum of counts over the items), interval from 1000 resamplings of the items.
    counts (n, k); measure (..., k) -> (...), a share."""
    counts = np.asarray(counts, float)
    low, high = np.percentile(measure(resamples(len(counts)) @ counts), (2.5, 97.5))
    return Score(100 * float(measure(counts.sum(0))), 100 * float(low), 100 * float(high),
                 len(counts), **kind)


def mean_score(values, **kind):
    """Score of the mean of one number an item."""
    counts = np.stack([np.asarray(values, float), np.ones(len(values))], 1)
    return bootstrap(counts, lambda sums: sums[..., 0] / sums[..., 1], **kind)


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
                     100 * (rate + 1.96 * spread), n, better="lower")
    return wilson(sum(exact_match(a, r) for a, r in zip(answers, references, strict=True)), n)


# ---------------------------------------------------------------- the metrics by name
METRICS = {}


def metric(name, key="answer"):
    """Registers a function of answered rows; `key` is what a missing row lacks."""
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
            return dataclasses.replace(result, missing=len(rows) - len(there))
        METRICS[name] = run
        return run
    return register


def measure(names, rows):
    """{name: Score or Unavailable}."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"no metric {unknown[0]}; there are {', '.join(METRICS)}")
    return {name: METRICS[name](rows) for name in names}


def by_type(rows):
    """{type: rows} by meta["type"]; NExT-QA's CW, CH, TN, TC, TP, DL, DB, DC, DO by their first
    letter: C causal, T temporal, D descriptive."""
    groups = {}
    for row in rows:
        kind = row["meta"].get("type")
        if kind is not None:
            kind = kind[0] if re.fullmatch("C[WH]?|T[NCP]?|D[LBCO]?", kind) else kind
            groups.setdefault(kind, []).append(row)
    return dict(sorted(groups.items(), key=lambda item: ("CTD".find(item[0]) % 4, item[0])))


def _error_rate(rows, words, note):
    """Corpus word error rate against the first reference."""
    answers = [without_chat(row["answer"]) for row in rows]
    stripped = sum(a != row["answer"] for a, row in zip(answers, rows, strict=True))
    counts = word_error_rate(answers, [row["references"][0] for row in rows], words)
    kept = counts[counts[:, 1] > 0]
    if not len(kept):
        raise captions.CannotRun("no words in the references")
    notes = [note, f"{stripped} answers without their chat prefix or quotes" if stripped else "",
             f"{len(rows) - len(kept)} empty references left out" if len(kept) < len(rows) else ""]
    return bootstrap(kept, lambda sums: sums[..., 0] / sums[..., 1], better="lower",
                     note=", ".join(filter(None, notes)))


@metric("wer")
def wer(rows):
    """Word error rate after Whisper's English normaliser, over all words of the set."""
    return _error_rate(rows, *whisper_normaliser())


@metric("wer_basic")
def wer_basic(rows):
    """Word error rate in lower case, letters, digits and apostrophes only."""
    return _error_rate(rows, normalise, "norm=basic")


def _tokens(rows):
    """-> tokens of the answers, of the references, note."""
    answers, references, kind = captions.tokenised(
        [row["answer"] for row in rows], [row["references"] for row in rows])
    return answers, references, f"tok={kind}"


@metric("cider")
def cider(rows):
    """CIDEr-D x 100.  Score whole sets: the weights of the words come from the set."""
    answers, references, note = _tokens(rows)
    return mean_score(captions.cider_d(answers, references), unit="x100", note=note)


def _bleu(rows, order):
    answers, references, note = _tokens(rows)
    counts = captions.bleu_counts(answers, references)
    return bootstrap(counts, lambda sums: captions.bleu(sums)[..., order - 1], unit="x100",
                     note=note)


@metric("bleu1")
def bleu1(rows):
    """BLEU-1 x 100 of the whole set, brevity by the closest reference."""
    return _bleu(rows, 1)


@metric("bleu4")
def bleu4(rows):
    """BLEU-4 x 100 of the whole set, brevity by the closest reference."""
    return _bleu(rows, 4)


@metric("meteor")
def meteor(rows):
    """METEOR 1.5 x 100 of the whole set, by its authors' jar."""
    answers, references, note = _tokens(rows)
    value, sampled = captions.meteor(answers, references, resamples(len(rows)))
    low, high = np.percentile(sampled, (2.5, 97.5))
    return Score(100 * value, 100 * float(low), 100 * float(high), len(rows), unit="x100",
                 note=note)


@metric("spice")
def spice(rows):
    """SPICE x 100, the mean over items, by its authors' jar."""
    answers, references, note = _tokens(rows)
    return mean_score(captions.spice(answers, references), unit="x100", note=note)


@metric("spider")
def spider(rows):
    """SPIDEr x 100: the mean of SPICE (0..1) and CIDEr-D (0..10)."""
    answers, references, note = _tokens(rows)
    both = captions.spice(answers, references), captions.cider_d(answers, references)
    return mean_score(sum(both) / 2, unit="x100", note=note)


def _share(name, right):
    """Registers the share of rows for which right(row) holds."""
    def function(rows):
        return wilson(sum(map(right, rows)), len(rows))
    function.__doc__ = right.__doc__
    return metric(name)(function)


def _any_word_match(row):
    """A reference stands in the answer as whole words; for yes and no the opposite does not."""
    return any(word_match(row["answer"], reference) for reference in row["references"])


def _exact(row):
    """The whole answer is a reference, case and punctuation apart."""
    return any(plain_words(row["answer"]) == plain_words(r) for r in row["references"])


def _vqa_equal(row):
    """Equality after the VQA evaluation's processing: InstructBLIP's accuracy on GQA."""
    return any(vqa_words(row["answer"]) == vqa_words(r) for r in row["references"])


def _choice(row):
    """The answer is the text of the right option, the first reference."""
    return plain_words(row["answer"]) == plain_words(row["references"][0])


def _choice_lenient(row):
    """The answer names the right option only, or its letter or number."""
    return lenient_choice(row["answer"], row["options"], row["references"][0])


word_match_accuracy = _share("word_match", _any_word_match)
exact = _share("exact", _exact)
acc_vqa = _share("acc_vqa", _vqa_equal)
choice = _share("choice", _choice)
choice_lenient = _share("choice_lenient", _choice_lenient)


def _hits(row, contained):
    """How many of the human answers the answer hits, after the VQA evaluation's processing."""
    if contained:
        return sum(word_match(row["answer"], r, vqa_words) for r in row["references"])
    said = vqa_words(row["answer"])
    return sum(bool(said) and vqa_words(r) == said for r in row["references"])


@metric("textvqa_soft")
def textvqa_soft(rows):
    """The paper's: a third for each human answer hit, 1 at most; a hit is contained."""
    return mean_score([min(1, _hits(row, True) / 3) for row in rows], note="hit=contained")


@metric("textvqa_official")
def textvqa_official(rows):
    """TextVQA's own: equality, mean over leaving one human answer out."""
    return mean_score([leave_one_out(_hits(row, False), len(row["references"])) for row in rows],
                      note="hit=equal, leave-one-out")


@metric("textvqa_equal")
def textvqa_equal(rows):
    """As textvqa_soft, but a hit is equal."""
    return mean_score([min(1, _hits(row, False) / 3) for row in rows], note="hit=equal")


@metric("judged", key="verdict")
def judged(rows):
    """Share of answers that the judge called right; rows without a verdict are missing."""
    judges = sorted({row["judge"] for row in rows if row.get("judge")})
    result = wilson(sum(row["verdict"] is True for row in rows), len(rows))
    return dataclasses.replace(result, note=f"judge {', '.join(judges)}" if judges else "")


@metric("answer_length")
def answer_length(rows):
    """Words an answer, to read beside word_match: who enumerates candidates is right more often."""
    result = mean_score([len(row["answer"].split()) / 100 for row in rows])
    return dataclasses.replace(result, unit="words", better="")
