"""Accuracy of whole-sentence answers (avsd, avssd) by a judge.  Paper Sec. 4.1, Appendix B.

     python -m aveb.judge runs/7b/best/predictions.jsonl --task avsd \\
         --judge-url http://127.0.0.1:8000/v1 --judge-model NAME      any OpenAI-compatible server
     python -m aveb.judge predictions.jsonl --task avsd --judge none             writes the prompts
     python -m aveb.judge predictions.jsonl --task avsd --judge file:verdicts.jsonl  reads verdicts

The paper's judge is "ChatGPT" without a version: a score means little without its judge's name.
A server's key comes from FAVOR_JUDGE_KEY (or OPENAI_API_KEY) and from nowhere else.  It travels
over https, or to a server on this machine, which is reached without a proxy.  Replies are cached
when they arrive: a run that was cut off goes on, and the same run again asks nothing.
verdicts.jsonl: lines {"key" or "id", "verdict": "Yes" or "No"}, with "key" as in the prompts.

Public: Judge, OwnJudge, JudgeError, check, is_judged, ask, prompt_of, write_prompts, read_verdicts,
report."""

import argparse
import base64
import email.utils
import hashlib
import html
import http.client
import ipaddress
import json
import os
import random
import re
import sys
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aveb.text import label_match
from runtime import cli
from runtime.cli import Progress
from runtime.hub import is_offline, read_jsonl

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
LONGEST_REPLY = 1 << 20   # bytes of a reply that are read
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


class JudgeError(ValueError):
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


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Sends the prompt again to the address that a server names, but not the key."""

    def redirect_request(self, request, file, code, message, headers, url):
        if urlsplit(url).scheme in ("http", "https"):
            return urllib.request.Request(url, request.data, HEADERS)


HEADERS = {"Content-Type": "application/json", "User-Agent": "favor"}


def is_loopback(host):
    """Whether a host's name means this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def within(seconds, function, *args):
    """function(*args), or TimeoutError after so many seconds.  Sockets only limit the pause between
    two bytes, and a slow server sends one now and then; so a thread of its own waits for it, and is
    left behind."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)               # raised by result()
    threading.Thread(target=run, daemon=True).start()
    return outcome.result(seconds)


def _masks(secret):
    """Regular expression for a key as it is, and as JSON, an address, HTML or base64 write it."""
    def ways(c):
        code = f"{ord(c):02x}"
        return "|".join((
            re.escape(c), rf"\\{{1,4}}(?:{re.escape(c)}|u00{code}|x{code})", f"%(?:25)*{code}",
            f"&(?:amp;)*(?:#0*{ord(c)}|#x0*{code}|{re.escape(html.escape(c)[1:-1])});"))
    found = ["".join(f"(?:{ways(c)})" for c in secret), secret.encode().hex()]
    for shift in range(3):                             # where the key stands in what was encoded
        code = base64.b64encode(b" " * shift + secret.encode()).decode()
        whole = code[(0, 2, 3)[shift]:(shift + len(secret)) * 8 // 6]
        if len(whole) > 5:
            found += [re.escape(whole), re.escape(whole.translate(str.maketrans("+/", "-_")))]
    return re.compile("|".join(found), re.IGNORECASE)


@dataclass
class Judge:
    """Asks `model` at `url`, several prompts at a time.  After verdicts(): asked (requests),
    stopped (why it ended early, or ""), odd ((id, reply) that is wrong as it is neither yes nor
    no), failures (why there is None)."""
    url: str
    model: str
    cache: str = "runs/judge.jsonl"
    budget: int = 10_000                  # most requests of this run, repeated ones included
    timeout: float = 30.0                 # s for one request, from its start to the whole reply
    workers: int = 4
    attempts: int = 6
    pause: float = 1.0                    # s before the second attempt, then twice as long each

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            wrong = (parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
                     or "@" in parts.netloc or not re.fullmatch("[!-~]+", self.url))
        except ValueError:                        # a port that is no number, half an IPv6 address
            wrong = True
        if wrong:
            raise JudgeError("--judge-url: wanted an address like http://127.0.0.1:8000/v1, "
                             f"without a key (set {KEYS} for that)")
        if not self.model:
            raise JudgeError("--judge-model: wanted the name by which the server knows the judge")
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        self.endpoint = parts._replace(path=path + "/chat/completions").geturl()
        self._secret = os.environ.get("FAVOR_JUDGE_KEY", "").strip()
        self.local = is_loopback(parts.hostname)
        if self._secret and parts.scheme == "http" and not self.local:
            raise JudgeError(
                "--judge-url: FAVOR_JUDGE_KEY would be readable on its way over http; use https, "
                f"or a tunnel (ssh -N -L 8000:localhost:{parts.port or 80} {parts.hostname}) and "
                "http://127.0.0.1:8000/v1, or unset the key")
        if parts.scheme == "https" or self.local:
            self._secret = self._secret or os.environ.get("OPENAI_API_KEY", "").strip()
        if not re.fullmatch("[!-~]*", self._secret):    # else the header's error would print it
            raise JudgeError(f"{KEYS} holds characters that no key has; set it again")
        self._masks = _masks(self._secret) if self._secret else None
        self._opener = urllib.request.build_opener(
            _Redirect, urllib.request.ProxyHandler({} if self.local else None))
        self._replies = _read_cache(Path(self.cache))
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
        self.refuse_offline(is_offline())
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}],
                "temperature": 0, "max_tokens": 3}
        request = urllib.request.Request(self.endpoint, json.dumps(body).encode(), HEADERS)
        request.add_unredirected_header("Authorization", f"Bearer {self._secret or 'none'}")
        try:
            status, headers, text = within(self.timeout, self._fetch, request)
            if status < 300:
                return self._without_key(json.loads(text)["choices"][0]["message"]["content"])[:200]
        except TimeoutError:
            raise _Trouble(f"no whole reply in {self.timeout:g} s", None, True) from None
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError,
                RecursionError) as error:         # refused, cut off, or no chat completion
            raise _Trouble(self._without_key(f"{type(error).__name__}: {error}"), None, True
                           ) from None
        self._explain(status, headers, self._without_key(text))

    def _fetch(self, request):
        """-> status, headers and text of the reply."""
        deadline, raw = time.monotonic() + self.timeout, b""
        try:
            response = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error                              # which is a reply, too
        with response:
            while (part := response.read1(LONGEST_REPLY)) and len(raw) < LONGEST_REPLY:
                raw += part
                if time.monotonic() > deadline:           # nobody waits any more
                    break
            return response.status, response.headers, raw.decode("utf-8", errors="replace")

    def refuse_offline(self, offline):
        """JudgeError if the server is another machine and no connection may be opened."""
        if offline and not self.local:
            raise JudgeError("the judge is not asked, as --offline or HF_HUB_OFFLINE forbids it; "
                             "run python -m aveb.judge without it, or ask a server on this machine")

    def _explain(self, status, headers, text):
        """Raises _Trouble if another attempt or another prompt may help, otherwise JudgeError."""
        why = f"HTTP {status}: {' '.join(text.split())[:200]}"
        if (status in (408, 425, 429) or status >= 500) and "insufficient_quota" not in text:
            raise _Trouble(why, _retry_after(headers.get("Retry-After")), True)
        if status in (400, 413, 422):         # may be this one prompt: too long, or filtered
            raise _Trouble(why, None, False)
        remedy = {401: f"set {KEYS}", 403: f"set {KEYS}", 429: "look at the account's quota"}.get(
            status, "look at --judge-url (it mostly ends in /v1) and --judge-model")
        raise JudgeError(f"{self.endpoint}: {why}; {remedy}. Replies so far are cached")

    def _without_key(self, text):
        if not isinstance(text, str):
            raise TypeError(f"the reply holds a {type(text).__name__}, wanted a text")
        return self._masks.sub("***", text) if self._masks else text


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
    number of lines.  JudgeError where the file holds verdicts."""
    if path.exists() and b'"verdict"' in path.read_bytes():
        raise JudgeError(f"{path}: holds verdicts; move it away first")
    asked = {key_of(prompt): {"id": row["id"], "key": key_of(prompt), "prompt": prompt}
             for view in views for row in rows if (prompt := prompt_of(row, view))}
    path.write_text("".join(json.dumps(line) + "\n" for line in asked.values()), "utf-8")
    return path, len(asked)


def _verdicts(path):
    """{key or id: verdict} of a file.  JudgeError if there is none, or two of them differ."""
    said = {}
    try:
        for line in read_rows(path):
            name, verdict = line.get("key") or line.get("id"), line.get("verdict")
            if said.setdefault(name, verdict) != verdict:
                raise ValueError(f"{path}: two verdicts for {name!r}, {said[name]!r} and "
                                 f"{verdict!r}; leave one")
    except (OSError, ValueError, TypeError) as error:          # TypeError: a key that is a list
        raise JudgeError(f"--judge file: {error}") from None
    if not any(verdict is not None for verdict in said.values()):
        raise JudgeError(f'{path}: no line has a verdict; add "verdict": "Yes" or "No" to them')
    return said


def read_verdicts(path, rows, view="both"):
    """-> True, False or None for each row. A line's key says which answer was judged; its id is
    believed only where it has no key."""
    said = _verdicts(path)
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


def _way(config):
    return config.judge or ("url" if config.judge_url else "")


def check(config):
    """Looks at the judge of an EvalConfig before anything is answered.  SystemExit if it could not
    be asked: a wrong address, no file of verdicts, a cache that cannot be written."""
    try:
        if _way(config) == "url":
            Judge(config.judge_url, config.judge_model).refuse_offline(config.offline)
        elif _way(config).startswith("file:"):
            _verdicts(_way(config).removeprefix("file:"))
    except (JudgeError, OSError) as error:
        raise SystemExit(f"the judge cannot be asked: {error}") from error


def is_judged(record):
    """Whether a judge is to be asked about the answer to a record."""
    return "judged" in record.meta.get("metrics", ())


def ask(config, model, predictions, views, out, log=print):
    """Adds row["verdicts"] = {view: True, False or None} and row["judge"] = its name to the rows of
    the tasks that are judged by the way that config.judge names (see EvalConfig)."""
    rows = [row for row in predictions if "judged" in row["meta"].get("metrics", ())]
    way = _way(config)
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
    except (ValueError, OSError) as error:
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
