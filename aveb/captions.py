"""Caption metrics as the captioning literature reports them (COCO caption evaluation):

     captions --tokenise--> tokens --> BLEU-1..4, CIDEr-D          plain Python, always there
                                   --> METEOR 1.5, SPICE           their authors' jars, need Java

The jars are those of pycocoevalcap (extra `eval`) or the ones that `use` names.  Without Java the
tokeniser is our regular expressions (`tok=regex`) and METEOR and SPICE raise CannotRun with the
reason: no other measure is ever printed under their names.

Public: tokenise, bleu_counts, bleu, cider_d, meteor, spice, use, CannotRun."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np

ORDERS = 4                                     # n-grams of one to four words


class CannotRun(RuntimeError):
    """A metric that needs what is not here; the message says what: 'needs Java'."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """Where Java and the jars are.  Empty: `java` on the PATH, the jars inside pycocoevalcap."""
    java: str = "java"
    ptb_jar: str = ""
    meteor_jar: str = ""
    spice_jar: str = ""             # beside its folder lib/ with Stanford CoreNLP 3.6.0
    spice_java: str = ""            # SPICE wants Java 8 or 11; empty: `java`
    spice_memory: str = "8G"


TOOLS = Tools()


def use(**changes):
    """use(java=..., spice_jar=..., spice_java=...): for all that is scored from here on."""
    global TOOLS
    TOOLS = dataclasses.replace(TOOLS, **changes)
    return TOOLS


def _java(name):
    program = shutil.which(name)
    if not program:
        raise CannotRun("needs Java")
    return program


def _jar(own, inside):
    """The jar that `use` named, else pycocoevalcap's."""
    package = None if own else importlib.util.find_spec("pycocoevalcap")
    if not own and package is None:
        raise CannotRun("needs pycocoevalcap")
    path = Path(own).resolve() if own else Path(package.submodule_search_locations[0]) / inside
    if not path.exists():
        raise CannotRun(f"no {path}")
    return path


# ---------------------------------------------------------------- tokens
# COCO's evaluation drops these tokens of the Penn Treebank tokeniser.  Its brackets survive, as
# "-lrb-" (the tokeniser has lower-cased them, the list has not).
PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ; -LRB- -RRB- -LCB- -RCB-".split())
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-",
            "£": "#", "€": "$"}
QUOTES = str.maketrans({"’": "'", "‘": "`", "“": '"', "”": '"', "…": "...", "–": "--", "—": "--"})
ABBREVIATIONS = ("mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|gen|col|lt|capt|sgt|rev|gov|sen|rep|inc|co|corp"
                 r"|jan|feb|aug|sept|oct|nov|dec|no(?=\.\s*\d)|[a-z](?=\.)")
TOKEN = re.compile(
    rf"(?<![^\W_])(?:{ABBREVIATIONS})\.(?!\w)"     # mr.; no. 7; an initial
    r"|(?:[a-z]\.){2,}|ph\.d\."                    # u.s., p.m.
    r"|https?://\S+|[\w.]+@[\w.]+\w|@\w+"
    r"|(?<!\w)'\d0s|'n'|(?<![\w'])-\d[\d.,]*\b"    # '90s, rock 'n' roll, -5
    r"|\d+(?:[.,:]\d+)+|\d+[^\W_]*(?:[-/]\w+)*"    # 3.5, 1,000, 10:30; 2nd, 2x4, 3-year-old, 1/2
    r"|n't\b|'(?:s|d|m|ll|re|ve|t)\b|\.\.\.|[!?]{2,}|--+|\*\*+|at&t|r&b"
    r"|[^\W\d_]+?(?=n't\b)"                        # do n't
    r"|[^\W_]+(?:[-/_.][^\W_]+|'(?!(?:s|d|m|ll|re|ve|t|n)\b)[^\W_]+)*"
    r"|[^\w\s]|_+")
JOINED = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"),
          "wanna": ("wan", "na"), "gimme": ("gim", "me"), "lemme": ("lem", "me")}


def regex_tokens(caption):
    """Lower-case tokens without punctuation, nearly those of the Penn Treebank tokeniser (compared
    in tests/test_captions.py)."""
    tokens = []
    for token in TOKEN.findall(caption.lower().translate(QUOTES)):
        tokens += JOINED.get(token, (BRACKETS.get(token, token),))
    return [token for token in tokens if token not in PUNCTUATION and token != '"']


def ptb_tokens(captions):
    """The Penn Treebank tokeniser of Stanford's jar, as COCO's evaluation calls it."""
    java, jar = _java(TOOLS.java), _jar(TOOLS.ptb_jar, "tokenizer/stanford-corenlp-3.4.1.jar")
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer",
               "-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input="\n".join(captions), capture_output=True, text=True,
                          encoding="utf-8")
    lines = done.stdout.removesuffix("\n").split("\n")
    if done.returncode or len(lines) != len(captions):
        raise CannotRun(f"the tokeniser's jar failed: {_last_line(done.stderr)}")
    return [[t for t in line.split() if t not in PUNCTUATION] for line in lines]


def tokenise(captions):
    """Captions (list of str) -> list of lists of tokens, and which tokeniser: 'ptb' or 'regex'."""
    lines = [" ".join(caption.split()) for caption in captions]     # a newline would shift the rest
    tokens, kind = _tokenise(tuple(dict.fromkeys(line for line in lines if line)), TOOLS)
    return [tokens.get(line, []) for line in lines], kind


@functools.lru_cache(maxsize=8)                # the same references for several metrics and answers
def _tokenise(lines, tools):
    """Different, not empty lines -> {line: tokens}, kind."""
    try:
        return dict(zip(lines, ptb_tokens(lines) if lines else (), strict=True)), "ptb"
    except CannotRun:
        return {line: regex_tokens(line) for line in lines}, "regex"


def tokenised(answers, references):
    """Answers, their lists of references -> the same as tokens, kind; one call of the tokeniser."""
    tokens, kind = tokenise([*answers, *(r for refs in references for r in refs)])
    rest = iter(tokens[len(answers):])
    return tokens[:len(answers)], [[next(rest) for _ in refs] for refs in references], kind


def ngrams(tokens):
    """How often each run of one to four tokens occurs."""
    return Counter(tuple(tokens[i:i + n]) for n in range(1, ORDERS + 1)
                   for i in range(len(tokens) - n + 1))


# ---------------------------------------------------------------- BLEU
def bleu_counts(answers, references):
    """Tokens -> (items, 10): matched n-grams of each order, n-grams of the answer of each order,
    its length, the length of the reference closest to it (the shorter of two).  A match counts as
    often as the reference that has it most often (Papineni et al. 2002)."""
    rows = []
    for answer, refs in zip(answers, references, strict=True):
        most = functools.reduce(lambda a, b: a | b, map(ngrams, refs))
        matched = [0] * ORDERS
        for gram, count in ngrams(answer).items():
            matched[len(gram) - 1] += min(count, most[gram])
        said = [max(0, len(answer) - n) for n in range(ORDERS)]
        closest = min((abs(len(ref) - len(answer)), len(ref)) for ref in refs)[1]
        rows.append([*matched, *said, len(answer), closest])
    return np.array(rows, float)


def bleu(counts):
    """Summed counts (..., 10) -> BLEU-1..4 (..., 4) in 0..1.  The tiny constants, COCO's, keep an
    order without a match from dividing by zero."""
    tiny, small = 1e-15, 1e-9
    precision = (counts[..., :4] + tiny) / (counts[..., 4:8] + small)
    mean = np.cumprod(precision, -1) ** (1 / np.arange(1, ORDERS + 1))
    ratio = (counts[..., 8:9] + tiny) / (counts[..., 9:] + small)
    return mean * np.exp(np.minimum(0, 1 - 1 / ratio))                    # brevity penalty


# ---------------------------------------------------------------- CIDEr-D
def cider_d(answers, references, sigma=6.0):
    """Tokens -> CIDEr-D of each item, 0..10 (Vedantam et al. 2015).  An n-gram weighs its count
    times log(items / items that have it in a reference); the cosine clips an answer's weights at
    the reference's; lengths, in bigrams, are compared by a Gaussian.  Mean over orders and
    references.  The weights come from the items at hand: a part of a set has other ones, and with
    one item all are 0."""
    refs = [[ngrams(tokens) for tokens in group] for group in references]
    items_with = Counter(gram for group in refs for gram in set().union(*group))
    log_items = math.log(len(refs))

    def weighed(counts):
        """-> weights of each order, their norms, length."""
        weights = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (log_items - math.log(items_with[gram] or 1))
        norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    def similarity(answer, ref):
        total = 0.0
        for ours, theirs, a, b in zip(answer[0], ref[0], answer[1], ref[1], strict=True):
            if a and b:
                total += sum(min(w, theirs[gram]) * theirs[gram]
                             for gram, w in ours.items() if gram in theirs) / (a * b)
        return total / ORDERS * math.exp(-(answer[2] - ref[2]) ** 2 / (2 * sigma ** 2))

    scores = []
    for tokens, group in zip(answers, refs, strict=True):
        answer = weighed(ngrams(tokens))
        scores.append(10 * sum(similarity(answer, weighed(ref)) for ref in group) / len(group))
    return np.array(scores)


# ---------------------------------------------------------------- METEOR and SPICE, in Java
def _last_line(text):
    return (text.strip().splitlines() or ["no message"])[-1][:200]


@contextmanager
def _conversation(command, name):
    """ask(line, n) -> n lines of a process that answers line by line; it never outlives this."""
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=errors, text=True, encoding="utf-8")

        def ask(line, n=1):
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                said = [process.stdout.readline() for _ in range(n)]
            except OSError:
                said = [""]
            if not all(said):
                process.wait(10)
                errors.seek(0)
                raise CannotRun(f"{name}'s jar stopped: {_last_line(errors.read())}")
            return [line.strip() for line in said]
        try:
            yield ask
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            try:
                process.stdin.close()
            except OSError:                    # it left before it had read everything
                pass


def _kept(jar):
    """Remembers what a jar said: tables and reports ask for the same answers again, and Java takes
    half a minute to start."""
    said = {}

    @functools.wraps(jar)
    def run(answers, references, *more):
        key = TOOLS, hashlib.sha256(json.dumps([answers, references]).encode()).digest(), len(more)
        if key not in said:
            said[key] = jar(answers, references, *more)
        return said[key]
    return run


@_kept
def meteor(answers, references, resamples=()):
    """Tokens -> METEOR 1.5 in 0..1 and that of each resample (how often each item is in it).  The
    jar aligns each answer with each of its references and keeps the best; the score is made of the
    statistics summed over the items (Denkowski and Lavie 2014): a resample costs a sum only."""
    java, jar = _java(TOOLS.java), _jar(TOOLS.meteor_jar, "meteor/meteor-1.5.jar")
    command = [java, "-Duser.language=en", "-Duser.country=US",     # decimal points
               "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio",
               "-l", "en", "-norm"]
    with _conversation(command, "METEOR") as ask:
        lines = []
        for answer, refs in zip(answers, references, strict=True):
            parts = [" ".join(tokens).replace("|||", "") for tokens in (*refs, answer)]
            lines += ask(" ||| ".join(("SCORE", *parts)))
        total = float(ask(" ||| ".join(("EVAL", *lines)), len(lines) + 1)[-1])
        if not len(resamples):
            return total, []
        counts = np.array([[float(x) for x in line.split()] for line in lines])
        # an answer that is its reference, in one chunk, adds no chunk to the sum
        said, meant, chunks, matched, met = counts[:, [0, 1, 20, 21, 22]].T
        counts[(chunks == 1) & (matched == said) & (met == meant), 20] = 0
        sums = [" ".join(f"{x:.10g}" for x in row) for row in resamples @ counts]
        scores = ask(" ||| ".join(("EVAL", *sums)), len(sums) + 1)[:-1]
    return total, [float(score) for score in scores]


SPICE_FAILURES = {"NoClassDefFoundError": "CoreNLP 3.6.0 is missing",
                  "InaccessibleObjectException": "it wants Java 8 or 11",
                  "OutOfMemoryError": "too little memory"}


@_kept
def spice(answers, references):
    """Tokens -> SPICE of each item, 0..1: F1 of the scene graphs' tuples (Anderson et al. 2016).
    The jar parses with Stanford CoreNLP 3.6.0, to be put into lib/ beside it (a large download
    from nlp.stanford.edu), on Java 8 or 11."""
    java = _java(TOOLS.spice_java or TOOLS.java)
    jar = _jar(TOOLS.spice_jar, "spice/spice-1.0.jar")
    if not list(jar.parent.glob("lib/stanford-corenlp-3.6.0*.jar")):
        raise CannotRun("SPICE not installed")
    items = [{"image_id": i, "test": " ".join(answer), "refs": [" ".join(ref) for ref in refs]}
             for i, (answer, refs) in enumerate(zip(answers, references, strict=True))]
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder) / "in.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(items))
        command = [java, f"-Xmx{TOOLS.spice_memory}", "-jar", str(jar), str(asked),
                   "-out", str(told), "-subset", "-silent"]
        done = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True)
        if done.returncode or not told.exists():
            why = next((why for name, why in SPICE_FAILURES.items() if name in done.stderr),
                       _last_line(done.stderr))
            raise CannotRun(f"SPICE's jar failed: {why}")
        scores = {item["image_id"]: item["scores"]["All"]["f"]
                  for item in json.loads(told.read_text())}
    return np.array([scores[i] for i in range(len(items))], float)
