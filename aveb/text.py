"""Answers as text: how they are normalised, and when one matches another.

   Public: normalise, plain_words, vqa_words, without_chat; edit_distance, contains, word_match,
   label_match, lenient_choice, leave_one_out."""

import re


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
    punctuation only stays as it is, so that it still differs from no answer."""
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


# ---------------------------------------------------------------- distances and matches
def edit_distance(ours, theirs):
    """Fewest substitutions, deletions and insertions that turn one list into the other."""
    row = list(range(len(theirs) + 1))
    for i, a in enumerate(ours, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(theirs, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


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


# words of a sound's class that carry no content
FILLERS = set("a an the of in on at by and or to with is are it being playing sound source".split())


def label_match(answer, label):
    """Whether all content words of a part of the class ("donkey, ass braying": two parts) are in
    the answer, without their endings.  A quick check, not comparable with a judged accuracy."""
    def words(text):
        return {re.sub(r"(ing|ed|es|e|s)$", "", w) if len(w) > 3 else w
                for w in re.findall(r"[^\W_]+", text.lower()) if w not in FILLERS}
    return any(part and part <= words(answer) for part in map(words, label.split(",")))
