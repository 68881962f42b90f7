"""The command line is the dataclass: one flag a field, its comment as help.  And the cores in use.

Public: parse, cores, parallel."""

import argparse
import dataclasses
import inspect
import multiprocessing
import os
import re
import threading
import typing
from concurrent.futures import ProcessPoolExecutor


def cores():
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parallel(function, jobs, workers, start=None, args=(), chunk=8):
    """Yields function(job) in the order of the jobs, from `workers` fresh processes, each of which
    calls start(*args) first; 1 worker: in this process, without start.
    A worker that dies ends all with an error; multiprocessing.Pool would wait for it for ever."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (start, args)) as pool:
        yield from pool.map(function, jobs, chunksize=chunk)


def _start_worker(start, args):
    def leave_with_parent():                      # else a killed run leaves its workers behind
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    if start:
        start(*args)


def _comments(cls):
    """{field: the comment behind it} from the dataclass's source."""
    return dict(re.findall(r"^ +(\w+):[^#\n]*# ?(.*)$", inspect.getsource(cls), re.MULTILINE))


def parse(cls, doc, argv=None):
    """Command line -> (instance of dataclass `cls`, the set of fields that were given).
    Booleans are --x / --no-x, tuples are repeated words; unknown flags fail.  cls.ALIASES {other
    name: field}, where there are any."""
    parser = argparse.ArgumentParser(description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)         # --step must not mean --steps
    comments, kinds = _comments(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        options = [k for k in typing.get_args(kinds[field.name]) if k is not type(None)]
        kind = options[0] if options and kinds[field.name] is not tuple else kinds[field.name]
        shown = comments.get(field.name, "").replace("%", "%%")
        shown += f" (default: {field.default})" if field.default not in (None, (), "") else ""
        settings = {"help": shown, "default": argparse.SUPPRESS}
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            settings |= {"nargs": "+", "metavar": "X"}
        else:
            settings |= {"type": kind, "metavar": kind.__name__.upper()}
        aliases = [a for a, name in getattr(cls, "ALIASES", {}).items() if name == field.name]
        parser.add_argument(*("--" + name.replace("_", "-") for name in (field.name, *aliases)),
                            dest=field.name, **settings)
    given = vars(parser.parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    try:
        return cls(**given), set(given)
    except ValueError as error:
        parser.error(str(error))
