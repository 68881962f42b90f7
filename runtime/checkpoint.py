"""Checkpoints that survive: whole or not there, whatever happens while they are written.

     RUN/last/   where to go on: trained parts, optimiser, position     every --val-every steps
     RUN/best/   lowest held-out loss so far: trained parts
     RUN/step-000500/   kept snapshots (--save-every), the older ones pruned (--keep)
Written beside the old one, fsynced, then swapped by renaming: a kill at any moment leaves a whole
one, a full disk the one before.  What a run needs to go on exactly is small: the seeds of every
rank and step follow from --seed, the data's position from the step.

Public: save, save_or_say, latest, load_state, resume, prune, StopSignal."""

import errno
import hashlib
import os
import shutil
import signal
from pathlib import Path

import torch
from safetensors import SafetensorError

COMMITTED = Path(__file__).parent.parent / "miniature" / "weights" / "favor"


def save(folder, model, facts, state=None):
    """Favor.save_pretrained, and state.pt where `state` is given, in the place of `folder`.
    OSError when it cannot be written; then the old one is as it was."""
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
        shutil.rmtree(new, ignore_errors=True)             # its space may be what others need
        raise
    if folder.exists():                                    # else .old is the only whole one
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path):
    """Onto the disk, also if the machine loses its power next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_or_say(folder, model, facts, state=None, say=print):
    """save() -> whether saved: a full disk is told, and the run goes on with the older one."""
    try:
        save(folder, model, facts, state)
        return True
    except (OSError, RuntimeError, SafetensorError) as error:
        if not disk_full(error):
            raise
        older = latest(Path(folder).parent)
        say(f"{folder} was NOT saved, the disk is full ({error}); "
            + (f"{older} is the last checkpoint. " if older else "there is no checkpoint yet. ")
            + "Make room: the next one is tried as planned")
        return False


def disk_full(error):
    """OSError with its number; safetensors has it in words only, torch.save none at all."""
    return (getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or any(words in str(error) for words in (
                "No space left", "quota exceeded", "PytorchStreamWriter failed writing")))


def latest(run):
    """last/, or its predecessor when a kill came between the two renames; None in a fresh run."""
    run = Path(run)
    return next((f for f in (run / "last", run / "last.old") if (f / "state.pt").exists()), None)


def load_state(folder):
    """state.pt; tensors and plain values only, no pickled code runs."""
    return torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)


def resume(run, settings, free):
    """(folder, state) of the checkpoint that a run goes on from, None in a fresh run.  SystemExit
    where it is of other settings (a dict) than now; `free` ones may differ."""
    folder = latest(run)
    if not folder:
        return None
    state = load_state(folder)
    then = {k: v for k, v in state["config"].items() if k not in free}
    different = {k: (then[k], settings[k]) for k in {*then} & {*settings}
                 if then[k] != settings[k]}
    if different:
        raise SystemExit(f"{run} holds a run with other settings, (then, now): {different}; "
                         "choose another --out or remove the folder")
    return folder, state


def prune(run, keep):
    """Removes all snapshots RUN/step-* but the newest `keep` (0: none is removed)."""
    snapshots = sorted(path for path in Path(run).glob("step-*")
                       if path.name.removeprefix("step-").isdigit())
    for path in snapshots[:-keep] if keep else ():
        shutil.rmtree(path)


class StopSignal:
    """Inside `with StopSignal() as stop:` the first SIGTERM or SIGINT sets stop.name, and the run
    saves and leaves at its next step; a second one acts at once."""

    def __enter__(self):
        self.name = ""
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, _):
        self.name = signal.Signals(number).name
        self.__exit__()                                    # the next one is not waited for

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def find_checkpoint(path, model="tiny"):
    """The given folder, else the last own run, else the committed one.  SystemExit if there is no
    checkpoint."""
    places = [Path(path)] if path else [Path(f"runs/{model}/best")]
    if model == "tiny" and not path:
        places.append(COMMITTED)
    for place in places:
        if (place / "favor.json").exists():
            return place
    raise SystemExit(f"no checkpoint in {' or '.join(map(str, places))} (wanted favor.json there); "
                     "make one with: python train.py"
                     + (f" --model {model}" if model != "tiny" else ""))


def weights_hash(checkpoint):
    """Short hash of the trained weights of a checkpoint folder; None without a folder or weights."""
    files = sorted(Path(checkpoint).rglob("*.safetensors")) if checkpoint else []
    return short_hash(*files) if files else None


def short_hash(*things):
    """Hash of 12 hex digits of strings and of the contents of files (Path)."""
    whole = hashlib.sha256()
    for thing in things:
        whole.update(thing.read_bytes() if isinstance(thing, Path) else str(thing).encode())
        whole.update(b"\0")
    return whole.hexdigest()[:12]
