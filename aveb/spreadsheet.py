"""A spreadsheet of questions and a folder of clips -> manifests for train.py and eval.py.

     questions.csv --read_rows--> rows of named cells --Table.record--> a Record per row
     Records --split--> training and test, which share no file

   A row with a mistake, or whose clip is missing, is left out, and a sentence names file, row and
   column.  Rows are counted as the spreadsheet program shows them: the header is row 1.
   Public: from_table, COLUMNS."""

import csv
import hashlib
import io
import os
import re
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import data
from aveb import metrics
from aveb.prepare import ids_hash
from aveb.sets.common import ANY_SUFFIX, OWN, id_of, with_choices
from runtime.cli import progress
from runtime.media import MediaError, probe

COLUMNS = {  # column: the names it may have in the header, in capitals or not
    "clip": ("clip", "file", "filename", "file name", "path"),
    "video": ("video",), "image": ("image", "picture"), "audio": ("audio", "sound"),
    "question": ("question", "prompt"), "answer": ("answer", "target"),
    "refs": ("refs", "other answers"), "options": ("options", "choices"), "task": ("task",),
    "start": ("start",), "end": ("end",), "dialogue": ("dialogue", "dialog"), "id": ("id",)}
BY_NAME = {name: column for column, names in COLUMNS.items() for name in names}
CLIPS = ("clip", "video", "image", "audio")
TASKS = {"video": "videoqa", "image": "vqa", "audio": "audioqa"}      # of rows that name none
SHOWN = 20                  # sentences about bad rows that are printed
SAVE = ('save it as CSV in UTF-8: in Excel with "Save As" and the type "CSV UTF-8 (Comma '
        'delimited)", in LibreOffice with "Save As", "Text CSV" and the character set "UTF-8"')


# ---------------------------------------- the spreadsheet

def read_rows(path):
    """Path of a .csv or .tsv file -> ({column: its name in the header}, names in the header that
    are not used, [(number, cells)]), without empty rows.  cells is {each of COLUMNS: text, "" where
    nothing is} or, of a row that is too long, the number of its cells.  ValueError names the file,
    and the row where it cannot be read."""
    text = re.sub(r'\A"?sep=."?[ \t]*(\r\n|\r|\n)', "", _text(path))     # Excel's own line
    separator = max(",;\t", key=lambda mark: _known_columns(text, mark))      # the first of equals
    rows, number = [], 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True,
                        skipinitialspace=True)
    try:
        for number, cells in enumerate(reader, start=1):
            if any(map(str.strip, cells)):
                rows.append((number, cells))
    except csv.Error as error:
        raise ValueError(f"{path}, row {number + 1}: {error}; wanted quotation marks around a cell "
                         "that holds one, and each one inside it doubled, as a spreadsheet program "
                         "saves them") from None
    header = rows[0][1] if rows else []
    names = _columns(path, header)
    places = {column: header.index(name) for column, name in names.items()}
    unused = [name for name in header if name.strip() and name not in names.values()]

    def cells_of(cells):
        if any(map(str.strip, cells[len(header):])):
            return len(cells)
        cells = [*cells, *[""] * len(header)]                # a row may end with its last full cell
        return {column: cells[places[column]].strip() if column in places else ""
                for column in COLUMNS}
    return names, unused, [(number, cells_of(cells)) for number, cells in rows[1:]]


def _text(path):
    """The text of a file in UTF-8 or, with its mark at the beginning, UTF-16."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; wanted a spreadsheet saved as .csv") from None
    if raw.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):        # .xlsx and .ods; .xls
        raise ValueError(f"{path}: a workbook (.xlsx, .xls or .ods), wanted text; {SAVE}")
    utf16 = raw.startswith((b"\xff\xfe", b"\xfe\xff"))       # Excel's "Unicode Text"
    try:
        return raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not {error.encoding.upper()}; {SAVE}") from None


def _column(name):
    """'Clip (file)' -> 'clip'; None for a name that is no column of ours."""
    return BY_NAME.get(" ".join(re.findall(r"[^\W_]+", re.sub(r"[(\[].*", "", name).casefold())))


def _known_columns(text, separator):
    """Columns of ours in the header, if `separator` stands between its cells."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        header = next((cells for cells in reader if any(map(str.strip, cells))), ())
        return sum(_column(name) is not None for name in header)
    except csv.Error:
        return 0


def _columns(path, header):
    """{column: its name in the header}.  ValueError if one is missing or stands there twice."""
    names = {}
    for name in header:
        if (column := _column(name)) in names:
            raise ValueError(f"{path}: the columns {names[column]!r} and {name!r} are both the "
                             f"{column}; rename or delete one of them")
        if column:
            names[column] = name
    missing = [" or ".join(group) for group in (CLIPS, ("question",), ("answer",))
               if not names.keys() & set(group)]
    if missing:
        found = ", ".join(filter(None, map(str.strip, header))) or "empty"
        raise ValueError(f"{path}: no column {' and no column '.join(missing)}; its first row is: "
                         f"{found}; wanted the names of the columns there, separated by commas, "
                         "semicolons or tabs; rename them")
    return names


# ---------------------------------------- its rows

def _one_line(text):
    """The text with single spaces in place of line breaks and longer gaps."""
    return " ".join(text.split())


def _list(text):
    """'red | dark  blue' -> ('red', 'dark blue'); a line break in the cell separates, too."""
    return tuple(filter(None, map(_one_line, re.split(r"[|\r\n]", text))))


def _plain(name):
    """A name of a file as it is compared: without case, accents in one form."""
    return unicodedata.normalize("NFC", name).casefold()


class Table:
    """One reading of a spreadsheet.  records: the usable rows; left_out: how many others there are;
    bad: a sentence for each of these, but one for all rows of a missing clip; missing: {(column,
    clip): their numbers}."""

    def __init__(self, path, media=()):
        self.path = Path(path)
        self.names, self.unused, rows = read_rows(path)
        self.folders = [Path(os.path.abspath(folder)) for folder in media or [self.path.parent]]
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"{folder}: no such folder; --media names a folder of clips")
        self.records, self.bad, self.missing, self.left_out = [], [], defaultdict(list), 0
        self.files, self.kinds, self.taken, self.turns, self.gaps = {}, {}, {}, {}, {}
        for number, cells in progress(rows, len(rows), "reading", "row"):
            try:
                record = self.record(number, cells)
                data.check_record(record, f"{self.path}, row {number}")
                self.records.append(self._new(number, record))
            except ValueError as error:
                self.left_out += 1
                if cells.__class__ is dict and cells["dialogue"]:
                    self.gaps.setdefault(self.dialogue(cells), number)
                if str(error):
                    self.bad.append(str(error))
        for (column, name), numbers in self.missing.items():
            where = f"row{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:10]))}" + (
                f" and {len(numbers) - 10} more" * (len(numbers) > 10))
            self.bad.append(
                f"{self.path}, {where}, column {self.names[column]}: no file {name!r} below "
                f"{', '.join(map(str, media or [self.path.parent]))}; correct the name or --media")

    def record(self, number, cells):
        """A row -> Record.  ValueError says what is wrong with it; "" for a missing clip."""
        if cells.__class__ is not dict:
            raise ValueError(f"{self.path}, row {number}: {cells} cells, more than the header has; "
                             "put quotation marks around a cell that holds a separator")

        def wrong(column, what):
            raise ValueError(f"{self.path}, row {number}, column {self.names[column]}: {what}")
        question, answer = _one_line(cells["question"]), _one_line(cells["answer"])
        for column, text in (("question", question), ("answer", answer)):
            if not text:
                wrong(column, f"empty, wanted the {column}; fill it in or delete the row")
        media, meta, history = self._media(number, cells, wrong), {}, ()
        options, refs = _list(cells["options"]), _list(cells["refs"])
        if cells["options"]:
            answer = self._choice(answer, options, wrong)
            question = with_choices(question, options)
            meta = {"metrics": ["choice"], "chance": round(1 / len(options), 4)}
        times = {}
        for column in ("start", "end"):
            try:                                            # 3,5 as well as 3.5
                times[column] = float(cells[column].replace(",", ".")) if cells[column] else None
            except ValueError:
                wrong(column, f"{cells[column]!r}, wanted seconds such as 12.5; correct it")
        first = media.get("video") or media.get("image") or media["audio"]
        if dialogue := cells["dialogue"]:
            key = self.dialogue(cells)
            if key in self.gaps:
                wrong("dialogue", f"an earlier turn of {dialogue!r}, row {self.gaps[key]}, is left "
                      "out, and the later turns with it; correct that row")
            history = self.turns.get(key, ())
            self.turns[key] = (*history, (question, answer))
            meta["dialogue"] = f"{self.name_of(first)}-{dialogue}"
        task = _one_line(cells["task"]).lower() or TASKS[next(k for k in TASKS if k in media)]
        return data.Record(_one_line(cells["id"]) or f"{id_of(first)}-{number}", task, question,
                           answer, refs=(answer, *refs) if refs else (), options=options,
                           history=history, meta=meta, **media, **times)

    def _new(self, number, record):
        """The record.  ValueError if its id, or the same question with its answer, was there."""
        same = (record.image, record.video, record.audio, record.start, record.end, record.prompt,
                record.target, record.history, record.meta.get("dialogue"))
        for key, what in ((record.id, f"the id {record.id!r} is taken by"),
                          (same, "the same clip, question and answer as in")):
            if key in self.taken:
                raise ValueError(f"{self.path}, row {number}: {what} row {self.taken[key]}; change "
                                 "or delete one of the two")
        self.taken |= {record.id: number, same: number}
        return record

    def _choice(self, answer, options, wrong):
        """The option that is the answer."""
        if len(options) < 2:
            wrong("options", f"{options[0] if options else '|'!r} alone, wanted two or more with | "
                  "between them; correct it")
        if len(set(options)) < len(options):
            wrong("options", f"{', '.join(options)}: one of them stands there twice; delete it")
        for same in (str, str.casefold, metrics.plain_words):        # exactly, else more loosely
            found = [option for option in options if same(option) == same(answer)]
            if len(found) == 1:
                return found[0]
            if found:
                wrong("answer", f"{answer!r} can be {' or '.join(found)}; write it as it stands "
                      "among the options")
        wrong("answer", f"{answer!r} is none of the options {', '.join(options)}; write the text "
              "of the right option, not its letter or number")

    def dialogue(self, cells):
        """Identifies a dialogue: its files, however the cells spell them, and its name, which may
        return with another clip."""
        def unknown(column, what):
            raise ValueError(what)

        def file(column, name):
            try:
                return self.find(column, name, unknown) or _plain(name)
            except ValueError:                              # that row is left out
                return _plain(name)
        return (*sorted(file(column, cells[column]) for column in CLIPS if cells[column]),
                cells["dialogue"])

    # ---- clips

    def _media(self, number, cells, wrong):
        """{"video", "image", "audio": path} of a row."""
        media, absent = {}, False
        for column in CLIPS:
            if not (name := cells[column]):
                continue
            if not (path := self.find(column, name, wrong)):
                self.missing[column, name].append(number)
                absent = True
                continue
            kind = self.kind(path)
            if column == "audio" and kind == "video":        # the sound of a video
                kind = "audio"
            if column not in ("clip", kind):
                wrong(column, f"{name!r} is of the kind {kind}; move it to a column {kind} or clip")
            if kind in media:
                wrong(column, f"{name!r} is a second {kind} beside the column "
                      f"{self.names['clip']}; delete one of the two")
            media[kind] = path
        if absent:
            raise ValueError                                # told once for all rows of this clip
        if not media:
            wrong(next(column for column in CLIPS if column in self.names),
                  "empty, wanted the name of a file; fill it in or delete the row")
        return media

    def find(self, column, name, wrong):
        """The file that a cell names, "" if there is none: the path as it stands, from a folder of
        --media or from the spreadsheet's; else the only file below --media with this name, which
        may lack its suffix, its folders and its capitals."""
        for folder in (*self.folders, self.path.parent):
            if os.path.isfile(path := os.path.abspath(folder / name)):
                return self._same(path)
        *above, last = [part for part in re.split(r"[/\\]", _plain(name)) if part not in ("", ".")
                        ] or [""]
        found = [path for path in self._by_name.get(last, ())
                 if not above or _plain(path).split(os.sep)[-1 - len(above):-1] == above]
        fitting = [path for path in found
                   if os.path.splitext(path)[1].lower() in OWN.get(column, ANY_SUFFIX)]
        found = list(dict.fromkeys(map(self._same, fitting or found)))
        if len(found) > 1:
            wrong(column, f"{name!r} can be {' or '.join(map(self.name_of, found))}; write more of "
                  "the path, and the suffix")
        return found[0] if found else ""

    @cached_property
    def _by_name(self):
        """{name of a clip's file, with and without its suffix: the paths below --media}"""
        index = defaultdict(list)
        for top in self.folders:
            for folder, below, names in os.walk(top):
                below.sort()
                for name in sorted(names):
                    if os.path.splitext(name)[1].lower() in ANY_SUFFIX:
                        for key in {_plain(name), _plain(id_of(name))}:
                            index[key].append(os.path.join(folder, name))
        return index

    def _same(self, path):
        """The path by which this file was found first: a file system may ignore case, and links are
        the same clip."""
        found = os.stat(path)
        return self.files.setdefault((found.st_dev, found.st_ino), path)

    def kind(self, path):
        """"video", "image" or "audio", by the content; by the suffix for a file that cannot be
        read, which the check reports."""
        if path not in self.kinds:
            try:
                self.kinds[path] = probe(path).kind
            except MediaError:
                suffix = os.path.splitext(path)[1].lower()
                self.kinds[path] = next((k for k in OWN if suffix in OWN[k]), "video")
        return self.kinds[path]

    def name_of(self, path):
        """The path without the folder of --media, so that it does not tell where the clips lie."""
        inside = [folder for folder in self.folders if Path(path).is_relative_to(folder)]
        return Path(path).relative_to(inside[0]).as_posix() if inside else Path(path).name


# ---------------------------------------- training and test

def files_of(record):
    return [path for path in (record.video, record.image, record.audio) if path]


def split(records, share, name_of):
    """list of Record -> (those for training, those for the test).  Records that share a file stay
    together.  A hash of the name decides alone, so a clip stays where it is when others are added;
    at least one clip is on each side.  name_of(path): the name that is hashed."""
    above = {}                                             # each file leads to one of its group

    def group(path):
        while above.setdefault(path, path) != path:
            above[path] = path = above[above[path]]
        return path
    for record in records:
        first, *_ = files = files_of(record)
        for file in files:
            above[group(file)] = group(first)
    names = {}
    for path in above:
        names.setdefault(group(path), []).append(_plain(name_of(path)))
    drawn = {top: int(hashlib.sha256(min(some).encode()).hexdigest()[:13], 16) / 16 ** 13
             for top, some in names.items()}
    if len(drawn) < 2:
        raise ValueError("all records are about the same clip, so none can be held out for the "
                         "test; add another clip, or leave out --test")
    order = sorted(drawn, key=drawn.get)
    most = min(max(sum(number < share for number in drawn.values()), 1), len(order) - 1)
    test = set(order[:most])
    return ([r for r in records if group(files_of(r)[0]) not in test],
            [r for r in records if group(files_of(r)[0]) in test])


def from_table(path, out, media=(), test=None, test_share=0.2, log=print):
    """Spreadsheet -> (paths of the manifests that were written, number of rows left out).  media:
    folders of the clips (default: the spreadsheet's); test: manifest for about `test_share` of the
    clips.  ValueError if nothing can be written."""
    wanted = [Path(name) for name in (out, test) if name]
    for name in wanted:
        if name.suffix != ".jsonl" or name.is_dir():
            raise ValueError(f"{name}: wanted the name of a manifest to write, such as train.jsonl")
    places = [os.path.realpath(name) for name in (path, *wanted)]         # a link is its file
    if len(set(places)) < len(places):
        raise ValueError(f"{path}, {', '.join(map(str, wanted))}: two of these are the same file; "
                         "the spreadsheet, --out and --test need names of their own")
    if not 0 < test_share < 1:
        raise ValueError(f"--test-share {test_share}: wanted a share between 0 and 1, such as 0.2")
    table = Table(path, media)
    log(f"{path}: {len(table.records) + table.left_out} rows, {len(table.records)} of them usable, "
        f"{table.left_out} left out; missing files: {len(table.missing)}")
    for sentence in table.bad[:SHOWN]:
        log(f"  left out: {sentence}")
    if len(table.bad) > SHOWN:
        log(f"  and {len(table.bad) - SHOWN} more")
    if table.unused:
        log(f"columns that are not used: {', '.join(table.unused)} (known are "
            f"{', '.join(COLUMNS)})")
    if not table.records:
        raise ValueError(f"{path}: no row can be used, so nothing is written; wanted at least one "
                         "question with its answer and its clip")
    parts = split(table.records, test_share, table.name_of) if test else [table.records]
    for name, records in zip(wanted, parts, strict=True):
        name.parent.mkdir(parents=True, exist_ok=True)
        data.write_manifest(name, records)
        clips = {file for record in records for file in files_of(record)}
        log(f"{name}: {len(records)} records about {len(clips)} files, ids {ids_hash(records)}")
    return wanted, table.left_out
