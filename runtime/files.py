"""Small files: written atomically, read with errors that name the file.

     with atomic(path) as temporary: write temporary      a kill never leaves half a file at path
     write_text, write_json --> path --> read_json         read_jsonl: one dict per whole line
   Public: atomic, write_text, write_json, read_json, read_jsonl, markdown_table."""

import json
import os
import re
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path):
    """Yields a temporary Path beside `path`, with the same suffix. It takes the place of `path` when
    the block ends without an error; after an error it is deleted and `path` stays as it was.
    Its name holds the process id, so that several processes may write the same file."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:                                     # after an error, a full disk gets its room back
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes the string `text` to `path` atomically, in UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    """The JSON value in `path`. FileNotFoundError or ValueError names the file when it is missing or
    broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing; wanted a model folder in the Hub's layout") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); download or save the file again") from None


def read_jsonl(path):
    """Yields the JSON object of each line of `path`; nothing if there is no such file. Lines that a
    kill or a full disk cut off are left out."""
    if not Path(path).exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def markdown_table(header, rows):
    """Column names and rows of cells -> the lines of a Markdown table, joined by newlines. A cell's
    line breaks become spaces, and its | is escaped."""
    def line(cells):
        texts = (re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(cell).splitlines())) for cell in cells)
        return f"| {' | '.join(texts)} |"
    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])
