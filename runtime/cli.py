"""The command line of a program is a dataclass: each field is a flag.  Also worker processes and
the progress of long loops.

     @dataclass(frozen=True)
     class TrainConfig:
         # -- data                                   a group's title in --help: the fields below it
         data: tuple = ("media/my",)  # <manifest> files to learn from
         # -- model
         model: Literal["tiny", "7b"] = "tiny"  # preset that sets the sizes
         mask: Literal["audio", "visual"] | None = None  # modality to leave out (default: none)
         # -- optimisation
         max_norm: float = 1.0  # <norm> gradients are scaled down to at most this norm, which
                                # is the norm over all parameters together
         test: bool = True  # print the table at the end

         ALIASES = {"clip-norm": "max_norm"}       # old names of a flag, which --help does not show

         def __post_init__(self):
             cli.check_choices(self)               # the same check for TrainConfig(model="8b")

     config, given = cli.parse(TrainConfig, __doc__)

The help of a flag is the comment behind its field; comment lines below it that are indented further
continue it.  A first word in <> names the value's unit or kind; otherwise the help shows INT,
FLOAT, STR or the choices of a Literal, where "" means that the flag is not given.  Booleans become
--x and --no-x, tuples take several words, and the default is shown unless it is None, "" or ().
Fields above the first group are in the group "options".

Public: parse, description, check_choices, run_module, cores, parallel, Progress, progress."""

import argparse
import dataclasses
import inspect
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import threading
import types
import typing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

# what torchrun and distributed.launch_local set for each process
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK",
                  "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR",
                  "MASTER_PORT", "PARENT_HOLDS_STDIN")


def parse(cls, doc, argv=None):
    """Command line -> (instance of the dataclass `cls`, set of the names of the fields given).

    doc: the docstring of the program's module, which --help shows; argv: the words, by default
    those of the program.  A wrong word, and a ValueError of the dataclass itself, end the program
    as usage errors."""
    parser = _Parser(prog=_program(), description=description(doc),
                     formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)                         # --step must not mean --steps
    documentation, hints, groups = _documentation(cls), typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        group, text = documentation[field.name]
        if group and group not in groups:
            groups[group] = parser.add_argument_group(group)
        settings = _argument(hints[field.name], text, field.default) | {
            "dest": field.name, "default": argparse.SUPPRESS}
        (groups[group] if group else parser).add_argument(
            "--" + field.name.replace("_", "-"), **settings)
        for alias, name in getattr(cls, "ALIASES", {}).items():
            if name == field.name:
                parser.add_argument("--" + alias, **settings | {"help": argparse.SUPPRESS})
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return cls(**given), set(given)
    except ValueError as error:
        parser.error(str(error))


class _Parser(argparse.ArgumentParser):
    """Prints on the first process of a machine only, because all have the same command line."""

    def _print_message(self, message, file=None):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            super()._print_message(message, file)


def description(doc):
    """The part of a module's docstring that is for users: all before the line "Public: ..."."""
    return re.split(r"^Public:", doc, maxsplit=1, flags=re.MULTILINE)[0].rstrip()


def _program():
    """The command that runs this program, such as "python -m experiments.ablate"; None for a script
    such as train.py, whose file name argparse takes."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else None


def _argument(hint, text, default):
    """What argparse should know about a field of this type, with this comment and default."""
    unit, text = re.fullmatch(r"(?:<([^>]*)> *)?(.*)", text).groups()
    if default not in (None, (), ""):
        shown = default
        if isinstance(default, bool):
            shown = "on" if default else "off"
        elif isinstance(default, tuple):
            shown = shlex.join(map(str, default))
        text += f" (default: {shown})"
    text = text.strip().replace("%", "%%")
    kind, choices, several = _kind(hint)
    if kind is bool:
        return {"help": text, "action": argparse.BooleanOptionalAction}
    settings = {"help": text, "type": kind, "metavar": unit or kind.__name__.upper()}
    if choices:
        settings |= {"choices": [choice for choice in choices if choice != ""], "metavar": unit}
    return settings | ({"nargs": "+"} if several else {})


def _kind(hint):
    """A type hint -> (type of a word, its choices or (), whether there may be several words)."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):           # X | None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    several = tuple in (hint, typing.get_origin(hint))
    if several:                                                              # tuple[X, ...]
        hint = (*typing.get_args(hint), str)[0]
    choices = ()
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    return hint, choices, several


def check_choices(config):
    """Raises ValueError where a field of this dataclass has a value that its Literal lacks."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _, choices, several = _kind(hints[field.name])
        value = getattr(config, field.name)
        if not choices or value == field.default:
            continue
        for word in value if several else [value]:
            if word not in choices:
                raise ValueError(f"--{field.name.replace('_', '-')} {word}: no such choice; choose "
                                 f"from {', '.join(str(c) for c in choices if c != '')}")


def _documentation(cls):
    """{field: (title of its group or "", its comment)} from the source of the dataclass."""
    found = {field.name: ("", "") for field in dataclasses.fields(cls)}
    group = name = ""
    for line in inspect.getsource(cls).splitlines():
        if title := re.fullmatch(r" +# -- (.*)", line):
            group, name = title[1].strip(), ""
        elif field := re.match(r" {4}(\w+):", line):
            name = field[1]
            if name in found:
                found[name] = (group, line.partition("  # ")[2].strip())
        elif (more := re.fullmatch(r" {5,}# ?(.*)", line)) and name in found:
            found[name] = (group, f"{found[name][1]} {more[1].strip()}")
        else:
            name = ""
    return found


# ---------------------------------------------------------------- other programs, worker processes
def run_module(name, *words):
    """Runs `python -m name words...` of this repository as a program of its own, from any working
    folder -> its exit status.  Variables by which torchrun or launch_local told this process its
    rank are left out; -P keeps files of the working folder from taking the place of ours."""
    env = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES
           and not key.startswith("TORCHELASTIC_")}
    path = [str(Path(__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])]
    return subprocess.run([sys.executable, "-P", "-m", name, *map(str, words)], check=False,
                          env=env | {"PYTHONPATH": os.pathsep.join(path)}).returncode


def cores():
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(function, jobs, workers, start=None, args=(), chunk=8):
    """Yields function(job) in the order of the jobs, computed by `workers` new processes.

    Each process calls start(*args) first.  With 1 worker everything runs in this process, without
    start.  A worker that dies raises BrokenProcessPool here; multiprocessing.Pool would wait for it
    forever."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (start, args)) as pool:
        yield from pool.map(function, jobs, chunksize=chunk)


def _start_worker(start, args):
    def exit_with_parent():                   # otherwise the workers outlive a run that is killed
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    if start:
        start(*args)


# ---------------------------------------------------------------- progress of long loops
class Progress:
    """with Progress("answering", 90, "question") as progress: progress.add(32)

    Shows on stderr how many of `total` are done: a bar on a terminal, a line every 10 s in a log
    file.  Only the main process shows it, and only when it takes more than 5 s."""

    def __init__(self, what, total, unit):
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}s", delay=5,
                        miniters=1, disable=os.environ.get("RANK", "0") != "0",
                        mininterval=0.2 if terminal else 10, file=None if terminal else _Lines(),
                        bar_format=None if terminal else PROGRESS_LINE)

    def add(self, n=1):
        """n more are done."""
        self.bar.update(n)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def progress(items, total, what, unit):
    """Yields the items and shows how many of `total` are done."""
    with Progress(what, total, unit) as shown:
        for item in items:
            yield item
            shown.add()


PROGRESS_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} so far, {remaining} left"


class _Lines:
    """stderr for tqdm where it is a file: each state becomes a line of its own."""

    def write(self, text):
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self):
        sys.stderr.flush()
