"""The log of a training run: what it reports, how fast it is, and where it ran.

     a step's row --RunLog.log_step--> log.jsonl, a printed line every few steps, TensorBoard, wandb
     an event (validation, checkpoint) --RunLog.log_event--> events.jsonl and the same back ends
     operations of a step (flops.py) / seconds / peak of the GPUs --> MFU
     machine, code and command --write_run_facts--> config.json, environment.json, commands.log
Logging never ends a run: a back end that fails is switched off, and a full disk only loses rows.
Either prints one line.

Public: RunLog, Clock, JsonLines, rows_until, write_run_facts, environment, git_facts, check_wandb,
draw_curve, log_answers, progress, duration, peak_memory, in_words, GIB."""

import importlib.util
import json
import math
import os
import platform
import re
import resource
import shlex
import socket
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from runtime import cli, distributed
from runtime.hub import atomic, read_json, read_jsonl, write_json

GIB = 2 ** 30
PACKAGES = ("torchaudio", "av", "numpy", "safetensors", "tokenizers")
VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT",
             "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "LOCAL_WORLD_SIZE",
             "CUDA_VISIBLE_DEVICES")


# ---------------------------------------------------------------- machine, code and command
def git_facts(folder=Path(__file__).parent.parent):
    """{"commit": hash, "dirty": bool} of a folder; {"commit": "not a git checkout", "dirty": None}
    when git does not know it."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True,
                              encoding="utf-8", timeout=30, check=True)
        return done.stdout.strip()
    try:
        # An installed copy may lie in the .venv of another project, whose commit is not ours.
        git("ls-files", "--error-unmatch", ".")
        return {"commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "not a git checkout", "dirty": None}


def environment():
    """What may change a result or a speed: machine, versions, processes, code.  A dict for JSON."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "hostname": socket.gethostname(), "platform": platform.platform(),
        "python": platform.python_version(), "cpu": cpu_name(), "cores": cli.cores(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / GIB, 1)}
                 for gpu in gpus],
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if gpus else None,
        "packages": {name: version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "world": distributed.world(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **git_facts()}


def version(package):
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name():
    with suppress(OSError):                                     # Linux only
        about = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        found = re.search(r"^model name\s*: (.*)$", about, re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def write_run_facts(out, facts, argv, first_step=0):
    """Writes config.json (`facts`: "train", "method", "mixture", ...; with commit and command) and
    environment.json at the start of a run; a run that continues (first_step > 0) keeps both, unless
    they are damaged.  Every start appends a line to commands.log, with what differs from
    environment.json.
    Returns the facts that each checkpoint should carry, too."""
    out, now, command = Path(out), environment(), shlex.join(["train.py", *argv])
    out.mkdir(parents=True, exist_ok=True)
    facts = {**facts, "commit": now["commit"], "dirty": now["dirty"], "command": command}
    for name, value in (("config.json", facts), ("environment.json", now)):
        try:
            kept = first_step and isinstance(read_json(out / name), dict)
        except (FileNotFoundError, ValueError):
            kept = False
        if not kept:
            write_json(out / name, value)
    then = read_json(out / "environment.json")
    changed = {key: value for key, value in now.items() if value != then.get(key)}
    with open(out / "commands.log", "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{timestamp()} from step {first_step}: {command}"
                   + (f"  # now {json.dumps(changed)}" if changed else "") + "\n")
    return facts


def timestamp():
    """Now, as 2025-01-31T23:59:59+0100."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# ---------------------------------------------------------------- time, memory, text
def peak_memory(device):
    """Largest number of bytes that this process has used: on its GPU, otherwise of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_words(n_bytes):
    """1.25 GiB, 12.00 MiB."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes > GIB / 10 else f"{n_bytes / 2 ** 20:.2f} MiB"


class Clock:
    """Measures the seconds of each step, and how many of them it waited for its batch:

         with clock.waiting(): batch = next(loader)
         with clock.aside(): validate()                     # counts for no step
         seconds, waited = clock.lap()"""

    def __init__(self, now=time.perf_counter):
        self.now, self.begun, self.waited = now, now(), 0.0

    @contextmanager
    def waiting(self):
        began = self.now()
        try:
            yield
        finally:
            self.waited += self.now() - began

    @contextmanager
    def aside(self):
        began = self.now()
        try:
            yield
        finally:
            self.begun += self.now() - began

    def lap(self):
        """-> seconds since the last lap, and how many of them were spent waiting."""
        end = self.now()
        lap = end - self.begun, self.waited
        self.begun, self.waited = end, 0.0
        return lap


def duration(seconds):
    """45 s, 12 min 5 s, 3 h 12 min, 2 d 3 h."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    for unit, name, smaller, its_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"),
                                          (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{seconds // unit} {name} {seconds % unit // smaller} {its_name}"
    return f"{seconds} s"


def short(number):
    """0.35, 102, 9.1k, 1.2M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"


def one_line(text, width=60):
    """Text without line breaks, shortened to `width` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[:width - 1] + "…"


def log_answers(rows, log=print):
    """Prints a line for each (task, prompt, answer, reference or list of references)."""
    for task, prompt, answer, reference in rows:
        if isinstance(reference, (list, tuple)):
            reference = " / ".join(map(str, reference))
        log(f"  {task}: {one_line(prompt)} -> {one_line(answer) or '(nothing)'} "
            f"| wanted: {one_line(reference)}")


def draw_curve(rows, height=10, width=72):
    """Rows with "step" and "ce" -> a text plot of the loss over the steps on a logarithmic scale.
    Rows without a finite loss are left out."""
    points = [(row["step"], row["ce"]) for row in rows
              if row.get("ce") is not None and math.isfinite(row["ce"])]
    if not points:
        return "no steps"
    losses = np.array([ce for _, ce in points])
    cells = np.array([np.log(max(part.mean(), 1e-9))
                      for part in np.array_split(losses, min(width, len(losses)))])
    low, high = cells.min(), max(cells.max(), cells.min() + 1e-9)
    levels = np.round((cells - low) / (high - low) * (height - 1)).astype(int)
    lines = []
    for level in range(height - 1, -1, -1):
        label = (f"{math.exp(low + (high - low) * level / (height - 1)):7.3f}" if level % 3 == 0
                 else " " * 7)
        lines.append(f"{label} |" + "".join("*" if at == level else " " for at in levels))
    lines.append(" " * 8 + f"+{'-' * len(levels)}  cross-entropy, "
                 f"steps {points[0][0]}-{points[-1][0]}")
    return "\n".join(lines)


# ---------------------------------------------------------------- log.jsonl, events.jsonl
def rows_until(path, last_step=None):
    """Yields the rows of a JSONL file whose "step" is at most `last_step` (None: all rows).  Lines
    that a kill or a full disk cut off, or that are damaged, are left out."""
    for row in read_jsonl(path):
        step = row.get("step")
        if last_step is None or isinstance(step, int | float) and step <= last_step:
            yield row


class JsonLines:
    """A file to which rows are appended; each is on disk at once.

    Opening rewrites the file atomically, without lines that were cut off and, unless last_step is
    None, without rows after that step.  An OSError (a full disk) is reported once and costs rows.
    write() opens the file again unless try_again is False."""

    def __init__(self, path, log, last_step=None):
        self.path, self.log, self.last_step = path, log, last_step
        self.file, self.failed = None, False
        self._report_errors(self._open)

    def _open(self):
        with atomic(self.path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows_until(self.path, self.last_step))
        self.file = open(self.path, "a", encoding="utf-8")

    def write(self, row, try_again=True):
        def append():
            if self.file is None:
                self._open()
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            if self.last_step is not None:
                self.last_step = row["step"]
        if self.file is not None or try_again:
            self._report_errors(append)

    def _report_errors(self, action):
        try:
            action()
        except OSError as error:
            self.close()
            if not self.failed:
                self.log(f"{self.path} cannot be written ({error.strerror or error}); rows are "
                         "lost until it can, the run continues")
            self.failed = True

    def close(self):
        if self.file is not None:
            with suppress(OSError):                # rows that could not be flushed are lost already
                self.file.close()
            self.file = None


def plain(value):
    """A row as plain values for JSON: tensors and numpy numbers become Python's, NaN and infinity
    become None."""
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def scalars(row, prefix=""):
    """The numbers of a plain row as {name: float}; {"task_ce": {"asr": 1}} gives task/asr."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= scalars(value, f"{prefix}{name.removesuffix('_ce')}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[prefix + name] = float(value)
    return found


# ---------------------------------------------------------------- back ends
def installed(package):
    """Whether a package can be imported.  A plain folder of that name, such as an older run's
    wandb/, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def check_wandb(project):
    """Raises ValueError when a project is named but wandb is not installed."""
    if project and not installed("wandb"):
        raise ValueError(f"--wandb {project}: not installed; pip install wandb, or leave the flag")


class TensorBoard:
    """The run's numbers for `tensorboard --logdir runs`."""

    def __init__(self, out, first_step):
        from torch.utils.tensorboard import SummaryWriter
        # Hides steps after the last checkpoint of a run that was killed, because they run again.
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1,
                                    flush_secs=30)

    def write(self, numbers, step):
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """One wandb run per run folder, however often it is stopped; the file wandb-id holds its id."""

    def __init__(self, out, project, first_step, config):
        import wandb
        file = out / "wandb-id"
        if not first_step or not file.exists():
            file.write_text(uuid.uuid4().hex[:8], "utf-8")
        self.run = wandb.init(project=project, id=file.read_text("utf-8"), resume="allow",
                              name=out.name, dir=str(out), config=config)
        # wandb's own step cannot go back, but ours does when a run continues from a checkpoint.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, numbers, step):
        self.run.log({"step": step, **numbers})

    def close(self):
        self.run.finish()


# ---------------------------------------------------------------- the log of a run
# What the printed line shows of a row, in this order.
LINE = (("loss", "loss {:.4f}".format), ("ce", "ce {:.4f}".format),
        ("diversity", "diversity {:.4f}".format), ("cosine", "query cosine {:+.3f}".format),
        ("lr", "lr {:.1e}".format), ("grad_norm", "grad {:.2f}".format),
        ("clips_per_s", lambda n: f"{short(n)} clips/s"),
        ("tokens_per_s", lambda n: f"{short(n)} tokens/s"),
        ("mfu", lambda share: f"MFU {short(100 * share)} %"),
        ("tflops", lambda n: f"{short(n)} TFLOP/s"), ("memory_gib", "{:.1f} GiB".format),
        ("wait_share", lambda share: f"waiting {100 * share:.0f} %"),
        ("eta_s", lambda s: f"ETA {duration(s)}"), ("val_ce", "held-out ce {:.4f}".format))
TASKS_SHOWN = 6


class RunLog:
    """Writes a row per step to out/log.jsonl and events to out/events.jsonl, prints a line every
    log_every steps, and feeds TensorBoard and wandb.  On other processes than the main one all
    methods do nothing.

    first_step: number of steps already done; later rows of an earlier start are removed.  wandb:
    the project's name; config: settings that wandb shows.  peak: FLOP/s of all devices together
    (peak_flops * world); None reports FLOP/s instead of MFU.  log: prints a line; now: the clock.
    Attribute last: the newest row, also of an earlier start, or None.
    Raises ValueError, on every process, when wandb is named but not installed."""

    def __init__(self, out, total_steps, first_step=0, main_process=True, log_every=20,
                 tensorboard=True, wandb="", peak=None, log=print, config=None,
                 now=time.monotonic):
        check_wandb(wandb)
        self.out, self.total_steps, self.main_process, self.log_every = (
            Path(out), total_steps, main_process, log_every)
        self.first_step = self.at = first_step
        self.peak, self.now, self.last = peak, now, None
        self.back_ends, self.begun, self.in_steps = {}, None, 0.0
        self._new_window()

        def safe_log(text):
            with suppress(OSError):            # stdout may be a file on the same full disk
                log(text)
        self.log = safe_log
        if not main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        for row in rows_until(self.out / "log.jsonl", first_step):
            self.last = row
        self.steps = JsonLines(self.out / "log.jsonl", self.log, first_step)
        self.events = JsonLines(self.out / "events.jsonl", self.log)
        if tensorboard and not installed("tensorboard"):
            self.log("TensorBoard is not installed: pip install tensorboard")
        elif tensorboard:
            self._start("TensorBoard", TensorBoard, self.out, first_step)
        if wandb:
            self._start("wandb", WeightsAndBiases, self.out, wandb, first_step, config)

    @property
    def rows(self):
        """[{"step", "ce"}] of all steps so far, read from the file, for draw_curve."""
        return [{"step": row["step"], "ce": ce if isinstance(ce := row.get("ce"), float) else None}
                for row in rows_until(self.out / "log.jsonl", self.at)] if self.main_process else []

    # ---- a step
    def log_step(self, row, clips=0, tokens=0, flops=0, waited_s=0.0, seconds=0.0):
        """row: {"step": number of steps done, "loss", "ce", ..., "task_ce": {task: ce}, "skipped"}.
        clips, tokens (LLM positions), flops: of this step, summed over all processes.  It took
        `seconds`, waited_s of them waiting for its batch.
        -> the row with rates, which are means over the steps since the last printed line."""
        if not self.main_process:
            return row
        self.at = row["step"]
        if self.begun is None:
            self.begun = self.now() - seconds
        self.in_steps += seconds
        sums = self.window
        for name, value in (("steps", 1), ("clips", clips), ("tokens", tokens), ("flops", flops),
                            ("waited", waited_s), ("seconds", seconds),
                            ("skipped", row.get("skipped") or 0)):
            sums[name] += value
        for task, ce in (row.get("task_ce") or {}).items():
            self.window_tasks.setdefault(task, []).append(float(ce))
        row = {**row, **self._rates()}
        due = self.at % self.log_every == 0 or self.at == self.total_steps
        self.last = written = plain(row)
        self.steps.write(written, try_again=due)
        self._send(scalars(written))
        if due:
            self.log(self._line(row))
            self._new_window()
        return row

    def _new_window(self):
        self.window = dict.fromkeys(
            ("steps", "clips", "tokens", "flops", "waited", "seconds", "skipped"), 0)
        self.window_tasks = {}

    def _rates(self):
        sums = self.window
        seconds = max(sums["seconds"], 1e-9)
        rates = {"clips_per_s": sums["clips"] / seconds, "tokens_per_s": sums["tokens"] / seconds}
        if sums["flops"] and self.peak:
            rates["mfu"] = sums["flops"] / seconds / self.peak
        elif sums["flops"]:
            rates["tflops"] = sums["flops"] / seconds / 1e12
        device = "cuda" if torch.cuda.is_initialized() else "cpu"
        rates["memory_gib"] = peak_memory(torch.device(device)) / GIB
        rates["wait_share"] = sums["waited"] / seconds
        # Each remaining step takes as long as now, plus the mean time between steps (validation).
        between = max(0.0, self.now() - self.begun - self.in_steps)
        rates["eta_s"] = (self.total_steps - self.at) * (
            sums["seconds"] / sums["steps"] + between / max(1, self.at - self.first_step))
        return {name: float(f"{rate:.4g}") for name, rate in rates.items()}

    def _line(self, row):
        parts = [form(row[name]) for name, form in LINE if row.get(name) is not None]
        if self.window["skipped"]:
            parts.append(f"{self.window['skipped']:.0f} skipped")
        tasks = sorted(((sum(ces) / len(ces), task) for task, ces in self.window_tasks.items()),
                       reverse=True)                            # the worst first
        shown = " ".join(f"{task} {ce:.2f}" for ce, task in tasks[:TASKS_SHOWN])
        more = f" and {len(tasks) - TASKS_SHOWN} better" if len(tasks) > TASKS_SHOWN else ""
        return (f"step {self.at}/{self.total_steps}: {', '.join(parts)}"
                + (f" | {shown}{more}" if shown else ""))

    # ---- events, back ends
    def log_event(self, kind, **facts):
        """Logs an event (validation, checkpoint, nonfinite step, resumed) with its time and step.
        The numbers among its facts go to the back ends as kind/name.  Pass step= for a step that
        log_step has not logged yet."""
        if self.main_process:
            facts = plain(facts)
            self.events.write({"time": timestamp(), "step": self.at, "event": kind, **facts})
            self._send(scalars(facts, f"{kind}/"))

    def close(self):
        if self.main_process:
            for name, back_end in [*self.back_ends.items()]:
                self._unless_broken(name, back_end.close)
            self.back_ends = {}
            self.steps.close()
            self.events.close()

    def _start(self, name, back_end, *settings):
        def start():
            self.back_ends[name] = back_end(*settings)
        self._unless_broken(name, start)

    def _send(self, numbers):
        for name, back_end in [*self.back_ends.items()] if numbers else ():
            self._unless_broken(name, back_end.write, numbers, self.at)

    def _unless_broken(self, name, action, *settings):
        try:
            action(*settings)
        except Exception as error:             # no error of a back end may end the run
            self.back_ends.pop(name, None)     # we do not close it, which could hang
            self.log(f"{name} failed ({type(error).__name__}: {one_line(error, 120)}); "
                     "it is switched off, the run continues")
