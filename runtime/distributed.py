"""Several processes, one run: each has its share of a batch or of the questions.

     torchrun --nproc_per_node 8 train.py     processes as torchrun starts them, nccl on GPUs
     python train.py                          on a CPU one a core, started by `one_a_core`, gloo
The first process makes files and speaks.  Public: one_a_core, places, join, leave,
precision, rank, world, chief_first, summed, gathered."""

import atexit
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  here: imported later, its functions keep the group alive
from torch.nn.parallel import DistributedDataParallel

from runtime import cli

# cuDNN's attention plans each new shape anew, up to a second; clips differ in length.  Here, as all
# programs import this file.
torch.backends.cuda.enable_cudnn_sdp(False)


def one_a_core(wanted=0, most=4):
    """Call first in a program's __main__: on a CPU starts this same command line `wanted` - 1 more
    times (0: a process a core, `most` at most), as torchrun would; they end when this process does,
    however it ends."""
    if "PARENT_HOLDS_STDIN" in os.environ:
        def end_with_parent():
            os.read(0, 1)                            # returns when the parent is gone
            os._exit(1)
        threading.Thread(target=end_with_parent, daemon=True).start()
        return
    wanted = wanted or min(cli.cores(), most)
    if "WORLD_SIZE" in os.environ or torch.cuda.is_available() or wanted == 1:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(wanted), "RANK": "0", "LOCAL_RANK": "0",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")    # whatever the machine's name means
    for rank in map(str, range(1, wanted)):
        subprocess.Popen([sys.executable, *sys.orig_argv[1:]], stdin=subprocess.PIPE, env={
            **os.environ, "RANK": rank, "LOCAL_RANK": rank, "PARENT_HOLDS_STDIN": "yes"})


def places():
    """(rank, world, rank on this machine) as the environment has them, before any have met."""
    return tuple(int(os.environ.get(k, d)) for k, d in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def join():
    """(rank, world, device) of this process, after all have met.  gloo on the CPU, nccl on GPUs."""
    rank, world, local = places()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if rank > 0:                                     # all wait for one download, one shows it
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if world > 1:
        # Long: all wait while the first process makes clips and features.  When a process dies,
        # the others end at once: torchrun and gloo both see to that.
        store, rank, world = next(dist.rendezvous("env://"))
        # What an earlier start left in torchrun's store (--max-restarts) leads to dead processes.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(hours=24))
        if not cuda:
            atexit.register(_part)
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def precision(name, model, device):
    """(dtype of the frozen weights, autocast for training, the reason in words).  name: a dtype's,
    or "" for bfloat16 on a GPU and for the large models, float32 else."""
    reason = "asked for" if name else f"{device.type}, {model}"
    name = name or ("bfloat16" if device.type == "cuda" or model != "tiny" else "float32")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    autocast = (torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext())
    return dtype, autocast, f"{name} ({reason})"


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world():
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def _part():
    """At the end of a program that did not leave, as after an error.  Gloo's threads may still have
    tensors to drop; in Python's last moments that aborts the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(model=None):
    """All wait for all, then part.  model: the one in DDP, which is of no use afterwards."""
    if dist.is_initialized():
        dist.barrier()
        # DDP's reducer, the last to hold the group, would end it with Python's lock held, and wait
        # for gloo's threads, which may be waiting for that lock to drop their tensors.
        if isinstance(model, DistributedDataParallel):
            del model.reducer, model.logger
        dist.destroy_process_group()


@contextmanager
def chief_first():
    """The first process does what is inside, makes files say; then the others, who find them."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def summed(values, device="cpu"):
    """Sums of a few numbers over all processes."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gathered(part):
    """Any Python value -> list of everybody's, in the order of the processes."""
    if not dist.is_initialized():
        return [part]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts
