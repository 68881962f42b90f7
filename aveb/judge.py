"""Accuracy of whole-sentence answers (avsd, avssd) by a judge.  Paper Sec. 4.1, Appendix B.

     python -m aveb.judge runs/7b/best/predictions.jsonl --task avsd \\
         --judge-url http://127.0.0.1:8000/v1 --judge-model NAME      any OpenAI-compatible server
     python -m aveb.judge predictions.jsonl --task avsd --judge none             writes the prompts
     python -m aveb.judge predictions.jsonl --task avsd --judge file:verdicts.jsonl  reads verdicts

The paper's judge is "ChatGPT" without a version: a score means little without its judge's name.
A server's key comes from FAVOR_JUDGE_KEY (or OPENAI_API_KEY) and from nowhere else.  Replies are
cached when they arrive: a run that was cut off goes on, and the same run again asks nothing.
verdicts.jsonl: lines {"key" or "id", "verdict": "Yes" or "No"}, with "key" as in the prompts.

Public: Judge, OwnJudge, JudgeError, prompt_of, write_prompts, read_verdicts, report."""

import argparse
import email.utils
import hashlib
import json
import os
import random
import re
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aveb.text import label_match
from runtime import cli
from runtime.cli import Progress
from runtime.hub import read_jsonl

TEMPLATES = {  # Sun et al. 2023 (arXiv 2310.05863), Appendix B, word for word
    "avsd": "Given the question “{question}”, is the answer “{answer}” equivalent to the answer "
            "“{reference}”? Answer “Yes” if they are equivalent, and “No” if they are different.",
    "avssd": "Is the sound source mentioned in answer “{reference}” the same as the sound source "
             "mentioned in answer “{answer}”? Answer “Yes” if they are the same, and “No” if they "
             "are different or one does not mention the sound source."}
WAYS = ("", "url", "self", "none")                # besides file:VERDICTS; "": nobody is asked
LONGEST = 1000            # characters of a question, reference or answer that the judge is shown
QUIET = 120.0             # s; a server that wants a longer pause ends the run, another goes on
GIVE_UP = 5               # so many prompts without an answer one after the other end the run
KEYS = "FAVOR_JUDGE_KEY or OPENAI_API_KEY"
QUOTES = dict.fromkeys(map(ord, '"`´ʹʺˮ“”„‟‘’‚‛«»‹›′″‴‵‶‷〃〝〞〟❛❜❝❞'), "'")
BRACKETS = str.maketrans("<>[]", "()()")          # no <|im_end|>, </s> or [INST] of a chat template


def clean(text):
    """One line of plain text that can stand between “ and ”: what could end the quotation, the line
    or the chat's turn is replaced.  (What it says may still impress a judge; no quoting helps.)"""
    text = unicodedata.normalize("NFKC", str(text)).translate(QUOTES).translate(BRACKETS)
    text = "".join(" " if unicodedata.category(c)[0] in "ZC" else c for c in text)
    return " ".join(text.split())[:LONGEST].strip()


def prompt_of(row, view="both"):
    """A line of eval.py's predictions -> what the judge is asked (about the first reference);
    None: no answer, so wrong."""
    answer = row.get(view, row.get("answer"))
    if (row.get("task") not in TEMPLATES or answer is None or not row.get("references")
            or not row.get("id")):
        raise ValueError(f"{row.get('id')}: wanted id, task {' or '.join(TEMPLATES)}, references "
                         f"and {view!r} or 'answer', as eval.py writes them (another --view?)")
    answer, question, reference = map(clean, (answer, row.get("prompt", ""), row["references"][0]))
    return TEMPLATES[row["task"]].format(
        question=question, answer=answer, reference=reference) if answer else None


def key_of(prompt, model=""):
    """The key of a reply in the cache; another prompt or another judge has another key."""
    return hashlib.sha256(f"{prompt}\n{model}".encode()).hexdigest()


def decided(said):
    """True or False by the first word, None when it is neither yes nor no."""
    word = re.search(r"[^\W\d_]+", said)
    return {"yes": True, "no": False}.get(word[0].lower() if word else "")


class JudgeError(RuntimeError):
    """Asking again would not help; the message says what to set."""


class _Trouble(Exception):
    """(why there is no answer this time, s that the server wants to be left alone, ask again?)"""


def _read_cache(path):
    """{key: reply} of a cache file, which is made if it is missing.  A line that a killed run left
    unfinished is ended, so that the next one starts on a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"" if file.read() == b"\n" else b"\n")
    return {row["key"]: row["said"] for row in read_jsonl(path)
            if isinstance(row.get("key"), str) and isinstance(row.get("said"), str)}


@dataclass
class Judge:
    """Asks `model` at `url`, several prompts at a time.  After verdicts(): asked (requests),
    stopped (why it ended early, or ""), odd ((id, reply) that is wrong as it is neither yes nor
    no), failures (why there is None)."""
    url: str
    model: str
    cache: str = "runs/judge.jsonl"
    budget: int = 10_000                  # most requests of this run, repeated ones included
    timeout: float = 30.0                 # s for one request
    workers: int = 4
    attempts: int = 6
    pause: float = 1.0                    # s before the second attempt, then twice as long each

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise JudgeError("--judge-url: wanted an address like http://127.0.0.1:8000/v1, "
                             f"without a key (set {KEYS} for that)")
        if not self.model:
            raise JudgeError("--judge-model: wanted the name by which the server knows the judge")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.endpoint = parts._replace(path=path + "/chat/completions").geturl()
        self._secret = os.environ.get("FAVOR_JUDGE_KEY", "").strip()
        if parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1"):
            self._secret = self._secret or os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self._secret):    # else the header's error would print it
            raise JudgeError(f"{KEYS} holds characters that no key has; set it again")
        self._replies, self._client = _read_cache(Path(self.cache)), None
        self._lock, self._halt = threading.Lock(), threading.Event()

    def verdicts(self, rows, view="both"):
        """Lines of predictions -> True, False or None (not judged, see `stopped` and `failures`)
        for each.  JudgeError if the server cannot be asked like this; what it replied is cached."""
        prompts = [prompt_of(row, view) for row in rows]
        keys = [p and key_of(p, self.model) for p in prompts]
        self._ask({k: p for k, p in zip(keys, prompts, strict=True)
                   if k and k not in self._replies})
        said = ["No" if k is None else self._replies.get(k) for k in keys]
        self.odd = [(row.get("id"), text) for row, text in zip(rows, said, strict=True)
                    if text is not None and decided(text) is None]
        return [None if text is None else bool(decided(text)) for text in said]

    def _ask(self, prompts):
        self._halt.clear()
        self.asked, self.stopped, self.failures, self._in_a_row = 0, "", [], 0
        self._quiet_until, pool = 0.0, ThreadPoolExecutor(self.workers)
        try:
            jobs = [pool.submit(self._settle, key, prompt) for key, prompt in prompts.items()]
            with Progress("judging", len(jobs), "answer") as progress:
                for job in as_completed(jobs):
                    job.result()
                    progress.add()
        finally:              # also on Ctrl-C: replies under way are waited for and cached
            self._halt.set()
            pool.shutdown(cancel_futures=True)

    def _settle(self, key, prompt):
        """Asks until there is an answer in the cache, or gives this prompt up.  Back-off: as long
        as the server says (for all workers), else 1, 2, 4 ... s, half off or on."""
        for attempt in range(self.attempts):
            while (left := self._quiet_until - time.monotonic()) > 0 and not self._halt.wait(left):
                pass
            with self._lock:
                if self.asked >= self.budget:
                    self._stop(f"the budget of {self.budget} requests is spent; run again to go on")
                if self._halt.is_set():
                    return
                self.asked += 1
            try:
                return self._cache_reply(key, prompt, self._request(prompt))
            except _Trouble as trouble:
                why, after, again = trouble.args
            except Exception:                         # JudgeError, a full disk: nobody asks on
                self._halt.set()
                raise
            if not again:
                break
            if after and after > QUIET:
                return self._stop(f"the judge wants {after:.0f} s of quiet; run again then")
            if after:
                self._quiet_until = max(self._quiet_until, time.monotonic() + after)
            elif attempt + 1 < self.attempts:
                self._halt.wait(min(60.0, self.pause * 2 ** attempt) * random.uniform(0.5, 1.5))
        with self._lock:
            self.failures.append(why)
            self._in_a_row += 1
            if self._in_a_row >= GIVE_UP:
                self._stop(f"{GIVE_UP} prompts one after the other got no answer, the last: {why}")

    def _cache_reply(self, key, prompt, said):
        """Appends the reply to the cache, as one whole line."""
        line = json.dumps({"key": key, "model": self.model, "prompt": prompt, "said": said})
        with self._lock, open(self.cache, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())
            self._replies[key], self._in_a_row = said, 0

    def _stop(self, why):
        self.stopped = self.stopped or why
        self._halt.set()

    def _request(self, prompt):
        """-> the judge's reply.  _Trouble or JudgeError, without the key in their messages."""
        from huggingface_hub import InferenceClient
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
        # Without any key the client would send the user's own Hugging Face token.
        self._client = self._client or InferenceClient(
            base_url=self.endpoint, api_key=self._secret or "none", timeout=self.timeout)
        try:
            reply = self._client.chat_completion([{"role": "user", "content": prompt}],
                                                 model=self.model, temperature=0, max_tokens=3)
            return self._without_key(reply.choices[0].message.content[:200])
        except OfflineModeIsEnabled:
            raise JudgeError("the judge is not asked, as --offline or HF_HUB_OFFLINE forbids it; "
                             "run python -m aveb.judge without it") from None
        except HfHubHTTPError as error:
            self._explain(error.response)
        except Exception as error:            # refused, timed out, cut off, or no chat completion
            raise _Trouble(self._without_key(f"{type(error).__name__}: {error}"), None, True
                           ) from None

    def _explain(self, response):
        """Raises _Trouble if another attempt or another prompt may help, otherwise JudgeError."""
        status, text = response.status_code, self._without_key(response.text)
        why = f"HTTP {status}: {' '.join(text.split())[:200]}"
        if (status in (408, 425, 429) or status >= 500) and "insufficient_quota" not in text:
            raise _Trouble(why, _retry_after(response.headers.get("Retry-After")), True) from None
        if status in (400, 413, 422):         # may be this one prompt: too long, or filtered
            raise _Trouble(why, None, False) from None
        remedy = {401: f"set {KEYS}", 403: f"set {KEYS}", 429: "look at the account's quota"}.get(
            status, "look at --judge-url (it mostly ends in /v1) and --judge-model")
        raise JudgeError(f"{self.endpoint}: {why}; {remedy}. Replies so far are cached") from None

    def _without_key(self, text):
        return text.replace(self._secret, "***") if self._secret else text


class OwnJudge:
    """Our own model as the judge: it reads the same prompt as a text question and answers greedily.
    `asked` and `stopped` are as in Judge; nothing is cached on disk."""
    stopped = ""

    def __init__(self, model, name=""):
        self.favor, self.model, self.said, self.asked = model, name or "the model itself", {}, 0

    def verdicts(self, rows, view="both"):
        """As Judge.verdicts."""
        prompts = [prompt_of(row, view) for row in rows]
        due = [prompt for prompt in dict.fromkeys(prompts) if prompt and prompt not in self.said]
        for prompt in due:
            self.said[prompt] = self.favor.answer(None, prompt, num_beams=1, max_new_tokens=3)
        self.asked = len(due)
        return [bool(prompt and decided(self.said[prompt])) for prompt in prompts]


def _retry_after(value):
    """Seconds, from seconds or a date; None when it is neither."""
    try:
        return max(0.0, float(value) if value.strip()[:1].isdigit() else
                   email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (AttributeError, TypeError, ValueError):
        return None


def read_rows(path):
    """JSONL -> list of dicts."""
    try:
        return [dict(json.loads(x)) for x in Path(path).read_text("utf-8").split("\n") if x.strip()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: wanted one JSON object a line ({error})") from None


def write_prompts(path, rows, views=("both",)):
    """What a judge would be asked about the answers, a line {"id", "key", "prompt"} each -> path,
    number of lines.  ValueError where the file holds verdicts."""
    if path.exists() and '"verdict"' in path.read_text("utf-8"):
        raise ValueError(f"{path}: holds verdicts; move it away first")
    asked = {key_of(prompt): {"id": row["id"], "key": key_of(prompt), "prompt": prompt}
             for view in views for row in rows if (prompt := prompt_of(row, view))}
    path.write_text("".join(json.dumps(line) + "\n" for line in asked.values()), "utf-8")
    return path, len(asked)


def read_verdicts(path, rows, view="both"):
    """-> True, False or None for each row. A line's key says which answer was judged; its id is
    believed only where it has no key."""
    said = {line.get("key") or line.get("id"): line.get("verdict") for line in read_rows(path)}
    keys = [p and key_of(p) for p in (prompt_of(row, view) for row in rows)]
    found = [False if key is None else said.get(key, said.get(row["id"]))
             for key, row in zip(keys, rows, strict=True)]
    return [v if v is None or v is True else bool(v and decided(str(v))) for v in found]


def report(task, judge, verdicts):
    """One line: accuracy with its 95 % interval (Wilson), how many were judged, and by whom."""
    from aveb.metrics import wilson  # needs numpy, which --help should not load
    right, n = sum(v is True for v in verdicts), sum(v is not None for v in verdicts)
    text = "no accuracy"
    if n:
        share = wilson(right, n)
        text = f"{share.value:.1f} % [{share.low:.1f}, {share.high:.1f}]"
    return f"{task}: {text}, n {n}, not judged {len(verdicts) - n}, judge: {judge}"


def ask(config, model, predictions, views, out, log=print):
    """Adds row["verdicts"] = {view: True, False or None} and row["judge"] = its name to the rows of
    the tasks that are judged by the way that config.judge names (see EvalConfig)."""
    rows = [row for row in predictions if "judged" in row["meta"].get("metrics", ())]
    way = config.judge or ("url" if config.judge_url else "")
    if not rows or not way:
        return
    if way == "none":
        path, n = write_prompts(out.with_suffix(".prompts.jsonl"), rows, views)
        log(f'{n} prompts for a judge: {path}; add "verdict": "Yes" or "No" to its lines, then '
            f"--judge file:{path}")
        return
    asked = None
    if way == "url":
        asked = Judge(config.judge_url, config.judge_model, budget=config.judge_budget)
    elif way == "self":
        asked = OwnJudge(model, config.judge_model)
    for view in views:
        if asked:
            verdicts, name = asked.verdicts(rows, view), asked.model
            log(f"judge {name}, {view}: {asked.asked} requests, {verdicts.count(None)} of "
                f"{len(rows)} not judged {asked.stopped}".rstrip())
        else:
            path = way.removeprefix("file:")
            verdicts, name = read_verdicts(path, rows, view), config.judge_model or path
        for row, verdict in zip(rows, verdicts, strict=True):
            row.setdefault("verdicts", {})[view] = verdict
            row["judge"] = name


def arguments():
    """The parser of the command line."""
    parser = argparse.ArgumentParser("python -m aveb.judge", allow_abbrev=False,
                                     description=cli.description(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("predictions", metavar="PREDICTIONS", help="predictions (.jsonl) that eval.py wrote")
    add("--task", required=True, choices=tuple(TEMPLATES), help="task whose answers are judged")
    add("--view", default="both", metavar="VIEW",
        help='view whose answers are judged: both, "audio only", "visual only" or blind (default: '
             'both)')
    add = parser.add_argument_group("judge").add_argument
    add("--judge", default="url", metavar="WAY",
        help="way to judge: url (ask a server), none (only write the prompts) or file:VERDICTS "
             "(read verdicts) (default: url)")
    add("--judge-url", default="", metavar="ADDRESS",
        help="address of an OpenAI-compatible server, mostly ending in /v1; needed for url")
    add("--judge-model", default="", metavar="NAME",
        help="name of the judge, by which the server knows it; needed for url")
    for name, unit, text in (
            ("cache", "FILE", "file in which the replies are cached"),
            ("budget", "REQUESTS", "requests that this run may send, at most"),
            ("timeout", "SECONDS", "seconds that the server has for one request"),
            ("workers", "N", "requests that are sent at the same time")):
        default = getattr(Judge, name)
        add(f"--judge-{name}", type=type(default), default=default, metavar=unit,
            help=f"{text} (default: {default})")
    return parser


def main(argv=None):
    """-> exit status: 1 when some answers are not judged."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        rows = [{"meta": {}, **r} for r in read_rows(args.predictions)
                if r.get("task") == args.task]
        if not rows:
            raise ValueError(f"{args.predictions}: no answers of task {args.task}")
        for row in rows:
            prompt_of(row, args.view)                             # says what a line lacks
        return _judged(args, rows)
    except (ValueError, OSError, JudgeError) as error:
        sys.exit(f"python -m aveb.judge: {error}")


def _judged(args, rows):
    if args.task == "avssd":
        print(report("avssd", "none, label_match (not comparable)", [label_match(
            row.get(args.view, row.get("answer")),
            row["meta"].get("label") or row["references"][0]) for row in rows]))
    if args.judge == "none":
        path, n = write_prompts(
            Path(args.predictions).with_suffix(f".{args.task}.prompts.jsonl"), rows, (args.view,))
        print(f'{n} prompts: {path}; add "verdict" to its lines, then --judge file:{path}')
        return 0
    if args.judge.startswith("file:"):
        verdicts = read_verdicts(args.judge[5:], rows, args.view)
        name = args.judge_model or args.judge
    elif args.judge == "url":
        judge = Judge(args.judge_url, args.judge_model, args.judge_cache, args.judge_budget,
                      args.judge_timeout, args.judge_workers)
        verdicts, name = judge.verdicts(rows, args.view), judge.model
        odd = [f"neither yes nor no, so wrong: {i}: {said!r}" for i, said in judge.odd]
        for line in filter(None, (f"{judge.asked} requests, {len(odd)} odd replies",
                                  judge.stopped, *judge.failures[:3], *odd[:3])):
            print(f"  {line}")
    else:
        raise ValueError(f"--judge {args.judge}: wanted url, none or file:VERDICTS")
    print(report(args.task, name, verdicts))
    return int(None in verdicts)


if __name__ == "__main__":
    sys.exit(main())
