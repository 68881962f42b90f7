"""Answers as text: how they are normalised, and when one matches another.

   Public: canonical, normalise, plain_words, vqa_words, textvqa_words, unquoted_vqa_words;
   edit_distance, contains, word_match, leave_one_out, named_options, lenient_choice;
   without_chat, label_match."""

import re
import unicodedata

# ---------------------------------------------------------------- text that looks equal
# Compatibility characters that are another letter or look: x² is not x2, ½ is not 1/2.
OTHER_LOOK = ("<super>", "<sub>", "<fraction>", "<circle>", "<square>", "<vertical>")


class Alike(dict):
    """{code point: the text that stands for it}, filled as characters are met."""

    def __missing__(self, code):
        char = chr(code)
        kind = unicodedata.category(char)
        alike = unicodedata.normalize("NFKC", char)
        if kind == "Cf" or 0xFE00 <= code <= 0xFE0F or code == 0x34F:
            char = ""                           # zero-width, soft hyphen; variant of an emoji
        elif kind == "Cs":
            char = "\ufffd"                     # a lone surrogate cannot be written as UTF-8
        elif (alike != char and not unicodedata.decomposition(char).startswith(OTHER_LOOK)
              and (" " not in alike or alike == " ")):
            char = alike.translate(self)        # full-width letters, ligatures, spaces, ...
        self[code] = char
        return char


ALIKE = Alike({ord(char): mark for mark, chars in (
    ("'", "‘’‚‛‹›ʼ′´"), ('"', "“”„‟«»″"), ("-", "‐‑‒–−")) for char in chars})


def canonical(text):
    """One form for texts that look equal; ASCII stays as it is.  Composed accents (NFC); straight
    quotes and hyphens; plain spaces; full-width and mathematical letters, ligatures and "…" as
    their ASCII; no zero-width characters and soft hyphens.  Raised, lowered and circled digits and
    fractions stay.  Every comparison in this module and in metrics.py begins with it."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).translate(ALIKE))


# ---------------------------------------------------------------- text: plain, and as VQA does it
def normalise(text):
    """Lower case, words only: 'Red ball, blue box.' -> ['red', 'ball', 'blue', 'box'].  Single
    quotes around words go, apostrophes stay: "it's 'red'" -> ["it's", 'red']."""
    text = re.sub(r"(?<!\w)'([^']*)'(?!\w)", r"\1", canonical(text).lower())
    kept = "".join(c if c.isalnum() or c == "'" or unicodedata.category(c) in ("Mn", "Mc") else " "
                   for c in text)
    return kept.split()


def plain_words(text):
    """normalise() without any apostrophe around a word: "dogs'" -> ['dogs'].  A text without words
    ("?!") is compared as it is, so that it differs from other marks and from no answer."""
    return [word for word in (w.strip("'") for w in normalise(text)) if word] or (
        canonical(text).split())


VQA_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                       "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))
VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# The contractions that VQA's evaluation writes with an apostrophe: "dont", not "im" or "shell".
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
           "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you"}
CONTRACTED = {(word + end).replace("'", ""): word + end
              for end, words in ENDINGS.items() for word in words.split()}
CONTRACTED |= {"maam": "ma'am", "oclock": "o'clock", "yall": "y'all", "twas": "'twas",
               "somebody'd": "somebodyd", "yall'll": "y'all'll", "y'allll": "y'all'll"}
CONTRACTED |= {form: f"{word}{end}'ve"                          # "couldn'tve", "couldnt've"
               for end, words in (("n't", "could had might should would"), ("'d", "he it she "
                                  "somebody someone something there they we who you"))
               for word in words.split()
               for form in (f"{word}{end}ve", f"{word}{end}'ve".replace("'", "", 1))}


def vqa_words(text):
    """Words after the processing of VQA's evaluation (vqaEval.py of GT-Vision-Lab/VQA and LAVIS):
    lower case, no punctuation (deleted where the text has the mark beside a space or has a comma
    between digits, else a space), no articles, number words as digits, apostrophes put back.  As
    there, double quotes are punctuation and single ones are not: '"red"' -> red, "'red'" -> 'red';
    "1,000" -> 1000, "red,blue" -> red blue.  Unlike there, a text of articles and punctuation only
    stays as it is, so that it still differs from no answer."""
    text = " ".join(canonical(text).lower().split())
    kept, digits = text, re.search(r"\d,\d", text) is not None
    for mark in VQA_MARKS:
        delete = f"{mark} " in text or f" {mark}" in text or digits
        kept = kept.replace(mark, "" if delete else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)                        # the point of 3.5 stays
    words = [VQA_NUMBERS.get(word, word) for word in kept.split()]
    words = [CONTRACTED.get(word, word) for word in words if word not in ("a", "an", "the")]
    return words or plain_words(text)


def textvqa_words(text):
    """Words after the processing of TextVQA's evaluation (EvalAIAnswerProcessor of mmf): vqa_words
    after commas and question marks are deleted and 's is cut off.  "1,000" -> 1000 as in VQA's, but
    "red,blue" -> redblue and "dog's" -> dog 's."""
    text = canonical(text).lower()
    return vqa_words(re.sub("[,?]", "", text).replace("'s", " 's")) or plain_words(text)


def unquoted_vqa_words(text):
    """vqa_words without the apostrophes around a word: "'one red'" -> 1 red."""
    bare = " ".join(word.strip("'") for word in vqa_words(text)).strip()
    return vqa_words(bare) if bare else plain_words(text)     # once more: 'one and the' were hidden


# ---------------------------------------------------------------- distances and matches
def edit_distance(ours, theirs):
    """Fewest substitutions, deletions and insertions that turn one list into the other.

    The usual table has a row for each of our words and a column for each of theirs.  Myers (JACM
    1999) holds a column in two integers: bit i says whether the entry of row i is one more (`up`)
    or one less (`down`) than the entry above it.  20,000 words against 20,000 take a second."""
    if not ours:
        return len(theirs)
    places, rows = {}, (1 << len(ours)) - 1
    for i, word in enumerate(ours):
        places[word] = places.get(word, 0) | 1 << i
    up, down, distance = rows, 0, len(ours)                  # the column before their first word
    for word in theirs:
        equal = places.get(word, 0)
        same = (((equal & up) + up) ^ up) | equal            # as the entry up and to the left
        more, less = down | (~(same | up) & rows), up & same         # than the entry to the left
        distance += (more >> len(ours) - 1) - (less >> len(ours) - 1)
        more, less = more << 1 | 1, less << 1
        equal |= down
        up, down = (less | ~(equal | more)) & rows, more & equal & rows
    return distance


def contains(words, part):
    """Whether the words of `part` stand in `words` one after the other: 'cat' not in 'catalog'."""
    return bool(part) and f" {' '.join(part)} " in f" {' '.join(words)} "


OPPOSITE = {"yes": "no", "no": "yes"}


def word_match(answer, reference, words=plain_words):
    """The reference's words stand in the answer; the opposite of a yes or no does not."""
    said, wanted = words(answer), words(reference)
    opposite = OPPOSITE.get(" ".join(wanted))
    return said == wanted or contains(said, wanted) and opposite not in said


def leave_one_out(hits, n):
    """TextVQA's and VQA's official accuracy: the mean over leaving one of the n human answers out
    of min(1, hits among the others / 3); n = 10: 0.3, 0.6, 0.9, 1 for 1, 2, 3, 4 hits.  Of fewer
    than three others all must be hit."""
    if n == 1:
        return float(hits)
    need = min(3, n - 1)
    return (hits * min(1, (hits - 1) / need) + (n - hits) * min(1, hits / need)) / n


# ---------------------------------------------------------------- options of a question
# One letter in **C**, `C`, "C", $C$, \boxed{C}, <answer>C</answer>
EMPHASIS = re.compile(r"""(?:[*_`"'$]|\\\w{1,20}\{|<\w{1,20}>){1,9}\s?\(?([A-Za-z])\)?[.:]?\s?"""
                      r"""(?:[*_`"'$}]|</\w{1,20}>){1,9}""")
# What must follow a letter that marks an option: "a. red" and "A because", not "e.g.", "a red ball"
END = r"(?=$|[)\]:]|\.(?!\w))"
RIGHT = r" is (?:correct|right|the (?:\w+ )?(?:answer|option|choice))\b"
PAUSE = rf"(?:{END}|(?=[\n,;!?/=&]| (?:or|and|because|since|as)\b| [-—=&/]|{RIGHT}))"
LETTER = rf"[(\[]?\b(?:([A-Z])\b{PAUSE}|([a-z])\b{END})[)\].:]*"
MARKED = re.compile(rf"^\W*([A-Za-z])\W*$|[(\[]([A-Z])[)\]]"
                    rf"|(?:^|\w: ?|\b(?i:option|choice|answer|ans|letter|is|be|it's|choose|chose"
                    rf"|pick|select|say|that's|probably|definitely|go with|therefore|so|thus|hence)"
                    rf"\b[\s.:,=-]{{0,3}}){LETTER}")
ANOTHER = re.compile(rf"(?:,|/| ?&| or| and){{1,2}} ?{LETTER}")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
NUMBER = re.compile(rf"^(?:(?:the |my )?(?:correct |best )?(?:option|choice|answer)(?: is)?:? )?"
                    rf"(?:#|no\.? )?[(\[]?(?:(\d{{1,3}})|({'|'.join([*VQA_NUMBERS][2:])}))"
                    rf"(?:[).:\]](?!\d)|$|{RIGHT})"
                    rf"|\b(?:({'|'.join(ORDINALS)})|(\d{{1,3}})(?:st|nd|rd|th)) "
                    rf"(?:option|choice|answer)\b", re.I)


def marked_letters(answer):
    """-> the letters that mark an option, in lower case, and the text behind the one that the
    answer starts with: "(c)", "C. text", "Option C", "The answer is C because ...", "C or D"."""
    found, behind = set(), ""
    for match in MARKED.finditer(answer):
        if not match.start():
            behind = answer[match.end():].lstrip(" -—")
        while match:
            found.add(next(filter(None, match.groups())).lower())
            match = ANOTHER.match(answer, match.end())
    return found, behind


def listed_options(answer, options):
    """The options whose letter and text stand together: both in "A. red ball B. blue ball"."""
    parts = re.split(r"(?<!\w)([A-Za-z])[).:\]]+", answer)
    texts = [tuple(plain_words(text)) for text in parts[2::2]]
    own = dict(zip("abcdefghijklmnopqrstuvwxyz", options, strict=False))
    return {option for letter, text in zip(parts[1::2], texts, strict=True)
            if (option := own.get(letter.lower())) and text[:len(option)] == option}


def named_options(answer, options):
    """The options that an answer names, as tuples of words.  What comes first counts:
    1. the whole answer, or all that follows its leading letter, is an option: "B. two men";
    2. letters that mark an option (unless these letters are options themselves), and with them
       those of a list that repeats letters and texts; the A of "A: C" means the answer;
    3. options that stand in the answer, but not inside a longer one ("red" in "dark red");
    4. a number counted from 1 or an ordinal: "2.", "Option 2", "the second option".
    Negations ("not C") are not understood."""
    said, options = plain_words(answer), [tuple(plain_words(option)) for option in options]
    lines = [" ".join(line.split()) for line in canonical(answer).splitlines()]
    answer = EMPHASIS.sub(r" (\1) ", "\n".join(filter(None, lines)))
    answer = re.sub(" {2,}", " ", re.sub("[*`]", "", answer)).strip("_\"' ")
    letters, behind = marked_letters(answer)
    if re.match("A ?: ?", answer):                          # "A: Option C"; but A in "A: a red one"
        letters = marked_letters(re.sub("^A ?: ?", "", answer))[0] or letters
    for whole in (tuple(said), tuple(plain_words(behind))):
        if whole and whole in options:
            return {whole}
    marked = {option for letter, option in zip("abcdefghijklmnopqrstuvwxyz", options, strict=False)
              if letter in letters}
    if marked and not any((letter,) in options for letter in letters):
        return marked | listed_options(answer, options)
    found = [(i, -i - len(option), option) for option in {*options} - {()}
             for i in range(len(said)) if tuple(said[i:i + len(option)]) == option]
    named, reach = set(), 0
    for _, end, option in sorted(found):                   # at each word the longest option first
        if -end > reach:
            named.add(option)
        reach = max(reach, -end)
    number = NUMBER.search(answer)
    if named or not number:
        return named
    digit, word, ordinal, nth = number.groups()
    place = (ORDINALS.index(ordinal.lower()) + 1 if ordinal
             else int(digit or nth or VQA_NUMBERS[word.lower()]))
    return {*options[place - 1:place]} if place else set()


def lenient_choice(answer, options, right):
    """Whether the answer is the right option's text, or names it (named_options) and no other."""
    right = tuple(plain_words(right))
    return tuple(plain_words(answer)) == right or named_options(answer, options) == {right}


# ---------------------------------------------------------------- what a chat model adds
CHAT = re.compile(
    r"^(?:\s*(?:(?:assistant|answer|transcript(?:ion)?)\s{0,9}:"
    r"|(?:sure|certainly|okay|of course)[,.!]{0,9}\s{0,9}(?=here\b|the\b)"
    r"|(?:here is|here's|the)\s(?:the\s)?(?:transcript(?:ion)?|speech|text|speaker|audio)"
    r"(?:\s[^:]{0,40})?:))+\s*", re.I)
QUOTED = re.compile(r"""^\s*(?:"(.*)"|'(.*)'|`(.*)`)\s*$""", re.S)


def without_chat(answer):
    """'Sure, here is the transcription: "red ball"' -> 'red ball'.  Who compares takes this off an
    answer only where it comes nearer to the reference by it (metrics.wer)."""
    answer = CHAT.sub("", canonical(answer))
    quoted = QUOTED.match(answer)
    return next(part for part in quoted.groups() if part is not None) if quoted else answer


# words of a sound's class that carry no content
FILLERS = set("a an the of in on at by and or to with is are it being playing sound source".split())


def label_match(answer, label):
    """Whether all content words of a part of the class ("donkey, ass braying": two parts) are in
    the answer, without their endings, or the whole class as it is.  A quick check, not comparable
    with a judged accuracy."""
    def words(text):
        return {re.sub(r"(ing|ed|es|e|s)$", "", w) if len(w) > 3 else w
                for w in re.findall(r"[^\W_]+", canonical(text).lower()) if w not in FILLERS}
    said = words(answer)
    return contains(plain_words(answer), plain_words(label)) or any(
        part and part <= said for part in map(words, label.split(",")))
