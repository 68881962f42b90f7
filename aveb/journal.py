"""The journal of a run of eval.py: the answers so far, and all that they depend on.

     model, records --answer_settings--> {"parameters": hash, "records": hash, "method": {...}, ...}
     settings --Journal--> the lines of an earlier start, if its settings were the same
   Answers of two models, of two sets of questions or of two ways to decode are never mixed: a
   journal of other settings is refused, and the message says what has changed.
   Public: Journal, answer_settings, differences."""

import dataclasses
import json
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

from data import MEDIA
from favor import SOURCES
from runtime import distributed, hub
from runtime.checkpoint import short_hash
from runtime.feature_cache import bits_hash

PARTS = SOURCES                          # fields of FavorConfig that name a place
PART_FILES = ("*.json", "*.txt", "tokenizer.model", "qformer_tokenizer/*")
# The code that makes an answer; the other files count, show or start.
ANSWERING = ("favor.py", "whisper_enc.py", "vit.py", "vit_qformer.py", "llama.py", "lora.py",
             "data.py", "aveb/answers.py", "baselines/*.py", "runtime/*.py")
# What has changed, where a setting is only a hash.
CHANGED = {
    "weights": "the checkpoint has been trained on or replaced",
    "parameters": "the weights of the model's parts are others",
    "part files": "a tokenizer or a config of the model's parts is another",
    "records": "the questions, their references, histories or other fields are others",
    "media": "media files have another size or time",
    "ids": "these are other questions",
    "code": "the code that makes the answers is another"}
IMPLIED = {"records": "ids", "media": "ids", "parameters": "weights"}    # not told beside these
FREE = ("manifest", "checkpoint", "sources", "mixture")      # places: what lies there is compared


# ---------------------------------------------------------------- what answers depend on
def answer_settings(model, records):
    """{name: value or hash} of all that changes an answer and that the command line does not say.
    To be called before LoRA is merged, which rounds differently on another device."""
    config = dataclasses.asdict(model.config)
    method = {name: value for name, value in config.items() if name not in PARTS}
    roots = filter(None, (hub.local_folder(config[part]) for part in PARTS))
    files = [file for root in roots for pattern in PART_FILES
             for file in sorted(root.glob(pattern)) if file.is_file()]
    code = [file for pattern in ANSWERING for file in sorted(hub.REPOSITORY.glob(pattern))]
    fields, media = [], []
    for record in sorted(records, key=lambda r: r.id):
        fields.append({name: value for name, value in vars(record).items() if name not in MEDIA})
        for path in filter(None, (getattr(record, kind) for kind in MEDIA)):
            stat = os.stat(path) if os.path.exists(path) else None
            media.append((record.id, os.path.basename(path),
                          stat and (stat.st_size, stat.st_mtime_ns)))
    return {"method": method, "parameters": bits_hash(model.state_dict()),
            "part files": short_hash(*(part for file in files for part in (file.name, file))),
            "records": short_hash(json.dumps(fields, sort_keys=True)),
            "media": short_hash(json.dumps(media)), "code": short_hash(*code)}


def differences(then, now):
    """Two dicts of settings -> 'beams: 1 -> 5; the code that makes the answers is another', or ""
    if the same answers come from them."""
    then, now = ({name: value for name, value in {**settings.get("method", {}), **settings}.items()
                  if name not in (*FREE, "method")} for settings in (then, now))
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(CHANGED.get(name, f"{name}: {then.get(name, 'not recorded')} -> "
                                       f"{now.get(name, 'not recorded')}")
                     for name in changed if IMPLIED.get(name) not in changed)


# ---------------------------------------------------------------- on disk
class Journal:
    """Lines {"id", "prompt", "answers": {view: text}, "references"} or {"id", "skipped": reason} in
    a folder, written while they are made.  Every start of every process has a file of its own,
    whose first line holds the settings.  folder None: nothing is written.  SystemExit, on all
    processes, if the folder holds answers of other settings or a damaged file, or if the processes
    have different settings; media files may have other times on another machine."""

    def __init__(self, folder, settings=None):
        self.folder, self.lines, self.file = folder and Path(folder), {}, None
        if not self.folder:
            return
        self.settings = json.loads(json.dumps(settings))         # tuples are lists, as in the file
        main = distributed.all_gather_object(self.settings)[0]
        refusal = differences(main, self.settings | {"media": main.get("media")})
        if refusal:
            refusal = f"process {distributed.rank()} has other settings than process 0: {refusal}"
        self.settings = main
        try:
            for path in sorted(self.folder.glob("*.jsonl")) if not refusal else ():
                self._read(path)
        except ValueError as error:
            refusal = str(error)
        # All have read before anyone writes.  One process says why none goes on.
        if refusal := next(filter(None, distributed.all_gather_object(refusal)), ""):
            raise SystemExit(refusal if distributed.rank() == 0 else 1)
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / f"{time.time_ns()}-{distributed.rank()}.jsonl", "w",
                             encoding="utf-8")
        self._write([{"settings": self.settings}])

    def _read(self, path):
        """Enters the lines of an earlier start; ValueError if they must not be used."""
        remove = "remove this file, and its questions are answered anew"
        try:
            rows = hub.grown_lines(path)           # without a last line that a kill cut off
        except ValueError as error:
            raise ValueError(f"{error}; {remove}") from None
        if not rows or len(rows) == 1 and "settings" in rows[0][1]:        # nothing was answered
            return
        then = rows.pop(0)[1].get("settings")
        if not isinstance(then, dict) or not isinstance(then.get("method", {}), dict):
            raise ValueError(f"{path}: line 1 is damaged, it should hold the settings; {remove}")
        if changes := differences(then, self.settings):
            raise ValueError(
                f"{self.folder} holds answers of a run with other settings: {changes}. Choose "
                "another --out, or remove the folder to answer all questions anew")
        for number, line in rows:
            if not is_answer(line, then.get("views")):
                raise ValueError(f"{path}: line {number} is damaged, it should hold an id and an "
                                 f"answer in each view; {remove}")
            self.lines[line["id"]] = line

    @contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise SystemExit(f"{self.folder} cannot be written: {error.strerror}; make room or "
                             "choose another --out; the same command continues with what is "
                             "there") from error

    def _write(self, lines):
        with self._writing():
            self.file.write("".join(json.dumps(line) + "\n" for line in lines))
            self.file.flush()

    def add(self, lines):
        self.lines |= {line["id"]: line for line in lines}
        if self.file:
            self._write(lines)

    def holds(self, records):
        return all(r.id in self.lines for r in records)

    def remove(self):
        """Deletes the folder, when the answers stand in the report."""
        if self.file:
            self.file.close()
            distributed.all_gather_object(None)
            if distributed.rank() == 0:
                # train.py may have put a new best/ in the place of the one around it
                shutil.rmtree(self.folder, ignore_errors=True)


def is_answer(line, views=None):
    """Whether a line of a journal has what a Journal writes, in all views."""
    answers = line.get("answers", {})
    return isinstance(line.get("id"), str) and (
        isinstance(line.get("skipped"), str) or bool(answers) and isinstance(answers, dict)
        and {*answers} == {*(views or answers)}
        and all(isinstance(text, str) for text in answers.values()))
