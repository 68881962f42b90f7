"""Checkpoints that survive: whole or absent, whatever happens while they are written.

     RUN/last/          where to continue: trained parts, optimiser, step, every --val-every steps
     RUN/best/          trained parts with the lowest held-out loss so far
     RUN/step-000500/   snapshots (--save-every), of which the newest stay (--keep)
A checkpoint is written beside the old one, flushed to the disk and swapped in by renaming.  So a
kill at any moment leaves a whole one, and a full disk leaves the one before.  An exact resume needs
little: random seeds follow from --seed, rank and step, and the position in the data from the step.

Public: save, save_unless_full, disk_full, latest, load_state, resume, prune, find_checkpoint,
trained_preset, weights_hash, short_hash, reading, compare_data, lock, StopSignal."""

import errno
import fcntl
import hashlib
import os
import pickle
import shlex
import shutil
import signal
import socket
import struct
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from runtime import distributed
from runtime.hub import anywhere, check_file, read_object

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "miniature" / "weights" / "favor"       # the tiny checkpoint in this repository

# What state.pt must hold; and what torch.load raises for a file that is something else or cut.
STATE = {"step": int, "best": float, "nonfinite": int, "config": dict, "optimiser": dict}
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
           OverflowError, EOFError, pickle.UnpicklingError, struct.error)

# Fields of TrainConfig that name a folder, or a repo on the Hub.
PLACES = ("whisper", "visual", "llm", "start_from")

# Fields of TrainConfig that were renamed: name in an old state.pt -> name now.
RENAMED = {"windows": "window_frames", "clip": "grad_clip", "keep_features": "cache_features",
           "instructblip": "visual"}


# ---------------------------------------------------------------- writing

def save(folder, model, facts, state=None):
    """Replaces `folder` by a new checkpoint: model.save_pretrained(**facts), and state.pt if
    `state` is given.  Raises OSError when it cannot be written; then the old one is unchanged."""
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        model.save_pretrained(new, **facts)
        if state is not None:
            torch.save(state, new / "state.pt")
        for path in (*new.rglob("*"), new):
            _sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)             # frees its space on a full disk
        raise
    if folder.exists():                                    # otherwise .old is the only whole one
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path):
    """Flushes a file or folder to the disk, in case the machine loses its power next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_unless_full(folder, model, facts, state=None, log=print):
    """save() -> True, or False when the disk is full; that is logged, and the older checkpoint
    stays.  Other errors are raised."""
    try:
        save(folder, model, facts, state)
        return True
    except (OSError, RuntimeError, SafetensorError) as error:
        if not disk_full(error):
            raise
        older = latest(Path(folder).parent)
        log(f"{folder} was NOT saved, the disk is full ({error}); "
            + (f"{older} is the last checkpoint. " if older else "there is no checkpoint yet. ")
            + "Make room: the next one is tried as planned")
        return False


def disk_full(error):
    """Whether an exception means that the disk is full.  OSError has a number for that, safetensors
    only a text, and torch.save neither."""
    return (getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or any(words in str(error) for words in (
                "No space left", "quota exceeded", "PytorchStreamWriter failed writing")))


# ---------------------------------------------------------------- reading
def latest(run):
    """RUN/last, or RUN/last.old after a kill between the two renames; None in a new run."""
    run = Path(run)
    return next((f for f in (run / "last", run / "last.old") if (f / "state.pt").exists()), None)


def load_state(folder):
    """The dict in state.pt: tensors and plain values only, so that no pickled code runs.  Raises
    ValueError that names the file and what is wrong with it."""
    file = Path(folder) / "state.pt"
    check_file(file)
    try:
        with warnings.catch_warnings():                    # of other versions of pickle
            warnings.simplefilter("ignore")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (*DAMAGED, OSError) as error:
        reason = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):      # torch advises to run what is in it
            reason = "a pickle of something else"
        raise ValueError(f"{file} is damaged or no state of a run ({reason})") from error
    for name, kind in STATE.items():
        value = state.get(name) if isinstance(state, dict) else None
        if type(value) is not kind or name == "step" and value < 0 or value != value:    # NaN
            raise ValueError(f"{file} is damaged or no state of a run ({name!r} is missing or no "
                             f"{kind.__name__})")
    steps = state["config"].get("steps")
    if isinstance(steps, int) and state["step"] > steps:
        raise ValueError(f"{file} is damaged or no state of a run (step {state['step']} of "
                         f"{steps})")
    return state


def resume(run, settings, resumable):
    """-> folder and state of the checkpoint from which a run continues; None in a new run.

    settings: dict of the current settings; those named in `resumable` may have changed.  Settings
    of an older version are compared under their new names.  SystemExit when others differ,
    ValueError when state.pt is damaged."""
    folder = latest(run)
    if not folder:
        return None
    with reading(folder):
        state = load_state(folder)
    if "data" not in state:                                # of an older version: see compare_data
        resumable = {*resumable} - {"data"}
    then = {RENAMED.get(name, name): value for name, value in state["config"].items()}
    then |= {name: anywhere(then[name]) for name in PLACES if then.get(name)}
    different = {name: (then[name], settings[name]) for name in then
                 if name in settings and name not in resumable and then[name] != settings[name]}
    if different.keys() == {"steps"}:
        raise SystemExit(
            f"{run} holds a run of {then['steps']} --steps, now {settings['steps']} are asked for. "
            "The learning rate follows from their number, so a run keeps it; to learn further, "
            f"begin another run: --start-from {folder} --out ANOTHER_FOLDER")
    if different:
        raise SystemExit(f"{run} holds a run with other settings, (then, now): {different}; "
                         "choose another --out or remove the folder")
    return folder, state


@contextmanager
def reading(folder):
    """Adds to an error about a file of the checkpoint that a run continues from what to remove."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; {folder} cannot be continued: remove it, and the same command "
                         "begins the run anew") from error


def compare_data(run, found, now, log=print):
    """SystemExit when the manifests are not those that a run has learnt from so far.

    found: from resume(); now: [hash of its content, weight, records] of each manifest.  Where they
    lie does not matter.  An older version saved no such list, which is logged."""
    if not found:
        return
    if (then := found[1].get("data")) is None:
        log(f"{found[0]} is of a version that kept no hash of its manifests: whether the data is "
            "still the same cannot be compared")
    elif then != now:
        raise SystemExit(f"{run} holds a run on other data; then and now, [hash, weight, records] "
                         f"of each manifest of --data: {then}, {now}. Bring back the data, or "
                         "begin another run: --start-from CHECKPOINT --out ANOTHER_FOLDER")


def prune(run, keep):
    """Removes all snapshots RUN/step-* except the newest `keep` (0: removes none)."""
    snapshots = sorted(path for path in Path(run).glob("step-*")
                       if path.name.removeprefix("step-").isdigit())
    for path in snapshots[:-keep] if keep else ():
        shutil.rmtree(path)


def find_checkpoint(path, model="tiny"):
    """Folder of a checkpoint: `path` if given, else runs/<model>/best, else for the tiny model the
    committed one.  Raises SystemExit when there is none."""
    places = [Path(path)] if path else [Path(f"runs/{model}/best")]
    if model == "tiny" and not path:
        places.append(COMMITTED)
    for place in places:
        if (place / "favor.json").exists():
            return place
    raise SystemExit(f"no checkpoint in {' or '.join(map(str, places))} (wanted favor.json there); "
                     "make one with: python train.py"
                     + (f" --model {model}" if model != "tiny" else ""))


def trained_preset(path, otherwise):
    """The preset that the checkpoint in folder `path` was trained with; `otherwise` when there is
    no path or the checkpoint does not say.  SystemExit when its favor.json cannot be read."""
    file = Path(path) / "favor.json"
    try:
        trained = read_object(file).get("train") if path and file.exists() else None
    except ValueError as error:
        raise SystemExit(str(error)) from error
    name = trained.get("model") if isinstance(trained, dict) else None
    return name if isinstance(name, str) else otherwise


def weights_hash(checkpoint):
    """Short hash of the trained weights in a checkpoint folder; None without folder or weights."""
    files = sorted(Path(checkpoint).rglob("*.safetensors")) if checkpoint else []
    return short_hash(*files) if files else None


def short_hash(*things):
    """Hash of 12 hex digits of strings and of the contents of files (Path)."""
    whole = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Path):
            with thing.open("rb") as file:                 # may be larger than the memory
                while part := file.read(1 << 24):
                    whole.update(part)
        else:
            whole.update(str(thing).encode())
        whole.update(b"\0")
    return whole.hexdigest()[:12]


# ---------------------------------------------------------------- one run in a folder
@contextmanager
def lock(file, log=print):
    """While the block runs, no other program can hold the lock `file`, which says who does.  The
    main process takes it; the lock ends with that process, however it ends.  SystemExit, on all
    processes, when another program holds it or its folder cannot be written."""
    file, handle, refusal = Path(file), None, ""
    if distributed.rank() == 0:
        handle, refusal = _take_lock(file, log)
    if refusal := distributed.all_gather_object(refusal)[0]:
        raise SystemExit(refusal if distributed.rank() == 0 else 1)     # it is printed once
    try:
        yield
    finally:
        if handle is not None:
            if _is_open_as(handle, file):          # the folder may have been replaced meanwhile
                file.unlink()
            os.close(handle)


def _take_lock(file, log):
    """-> the open lock file and "", or None and why it cannot be had.

    A POSIX lock belongs to this process alone: those that it forks or starts do not hold it.  It is
    gone as soon as this process opens and closes the file once more."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if refusal := _lock_handle(handle, file, log):
                os.close(handle)
                return None, refusal
            if _is_open_as(handle, file):          # its last holder may have removed the file
                break
            os.close(handle)
        os.truncate(handle, 0)
        os.write(handle, (f"process {os.getpid()} on {socket.gethostname()} since "
                          f"{time.strftime('%Y-%m-%d %H:%M:%S')}: "
                          f"{shlex.join(sys.orig_argv)}").encode(errors="replace"))
        return handle, ""
    except OSError as error:
        reason = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a file is in the place of a folder"
        return None, f"{file.parent} cannot be written: {reason}; choose another --out"


def _lock_handle(handle, file, log):
    """Locks the open file -> "", or who holds it."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):     # which of the two depends on the system
        holder = os.read(handle, 10_000).decode(errors="replace") or "another process"
        return (f"{file.parent} is in use by {holder}; wait until it ends, or choose another "
                f"--out ({file.name} holds the lock)")
    except OSError as error:
        log(f"{file.parent} lies on a file system without locks ({error.strerror}): a second run "
            "in this folder would not be noticed")
    return ""


def _is_open_as(handle, file):
    """Whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


# ---------------------------------------------------------------- stopping
class StopSignal:
    """In `with StopSignal() as stop:` the first SIGTERM or SIGINT sets stop.name, so that the run
    can save and end after its current step.  A second one acts at once.  A signal that is ignored,
    as a script's & and nohup have it, stays ignored."""

    def __enter__(self):
        self.name = ""
        self.before = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)
                       if signal.getsignal(s) not in (signal.SIG_IGN, None)}
        return self

    def _stop(self, number, _):
        self.name = signal.Signals(number).name
        self.__exit__()                                    # restores the handlers for the next one

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
