"""Several processes, one run: each has its share of a batch or of the questions.

     torchrun --nproc_per_node 8 train.py     processes as torchrun starts them, nccl on GPUs
     python train.py                          on a CPU one a core, started by `launch_local`, gloo
The first process makes files and speaks.  Public: launch_local, places, join, leave,
precision, rank, world, main_process_first, summed, gathered."""

import atexit
import hashlib
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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from runtime import cli

# cuDNN's attention plans each new shape anew, up to a second; clips differ in length.  Here, as all
# programs import this file.
torch.backends.cuda.enable_cudnn_sdp(False)


def launch_local(wanted=0, most=4):
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


def environment_ranks():
    """(rank, world, rank on this machine) as the environment has them, before any have met."""
    return tuple(int(os.environ.get(k, d)) for k, d in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def init_distributed():
    """(rank, world, device) of this process, after all have met.  gloo on the CPU, nccl on GPUs."""
    rank, world, local = environment_ranks()
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


def shutdown(model=None):
    """All wait for all, then part.  model: the one in DDP, which is of no use afterwards."""
    if dist.is_initialized():
        dist.barrier()
        # DDP's reducer, the last to hold the group, would end it with Python's lock held, and wait
        # for gloo's threads, which may be waiting for that lock to drop their tensors.
        if isinstance(model, DistributedDataParallel):
            del model.reducer, model.logger
        dist.destroy_process_group()


@contextmanager
def main_process_first():
    """The first process does what is inside, makes files say; then the others, who find them."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def all_reduce_sum(values, device="cpu"):
    """Sums of a few numbers over all processes."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_gather_object(part):
    """Any Python value -> list of everybody's, in the order of the processes."""
    if not dist.is_initialized():
        return [part]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


# ---------------------------------------------------------------- one model over several processes
# One model over several processes, for GPUs that cannot hold a 13B LLM: PyTorch's FSDP2.
#
#      process r of n keeps the r-th n-th of the rows of every tensor of
#        each LLaMA block: frozen weights (bf16) and LoRA (fp32)     a group: whole while it runs
#        embeddings, lm_head, last norm, aligner                     a group: whole in the forward
#      and of their gradients and of Adam's two moments
#      group --all-gather--> whole --forward, later again backward--> dropped
#        gradients --reduce-scatter, averaged as DDP's are--> each process its rows
# 13B on 8 GPUs: 3.3 of 26 GB of LLM each, one block or two (0.6 GB each) and the rest (0.9 GB) whole.
# Frozen Whisper, ViT and Q-Former (3.6 GB) stay whole everywhere: how often they run depends on a
# process's own clips, and a gathering waits until all processes take part.
#
# So all processes call model(samples), model.generate and every function here equally often; where
# one has nothing left it repeats something at weight 0.  The order: `one_rank_at_a_time` load on the CPU (frozen
# parts, then load_trained) and `shard`; make the optimiser; load its state.  Plain models and DDP are
# taken as well, and checkpoints are the same files: any number of processes goes on from them,
# sharded or not (test_sharding.py).

def checkpoint_activations(model):
    """From now on LLaMA blocks and causal Q-Former layers keep only their inputs in training and
    compute the rest again in the backward pass: a third more time, a fraction of the memory."""
    for part in model.modules():
        if hasattr(part, "checkpointing"):
            part.checkpointing = True


@contextmanager
def one_rank_at_a_time():
    """One process after the other: around loading and `shard`, a machine's memory holds no more
    than one whole model."""
    for turn in range(world()):
        if turn == rank():
            yield
        if world() > 1:
            dist.barrier()


# ---------------------------------------------------------------- sharding
def shard(model, device):
    """Spreads a Favor, which may lie on the CPU, over the processes' devices, block by block; one
    process alone just takes it.  -> the same object with new parameters."""
    if world() == 1:
        return model.to(device)
    mesh = init_device_mesh(device.type, (world(),))
    replicated = {p for p in model.parameters() if not p.requires_grad} - {*model.llm.parameters()}
    for parameter in replicated:
        parameter.data = parameter.data.to(device)
    # A group may mix dtypes as long as all its trained parameters have one.  No policy of FSDP's:
    # it would cast LoRA to bf16; autocast decides, as without sharding.
    for block in model.llm.model.layers:
        fully_shard(block, mesh=mesh)
    # Embeddings are in the root's group: they run once a sample, and lm_head may be the same tensor
    # (tied).  reshard_after_forward: else validation, a forward without backward, would leave whole
    # copies where the shards belong.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    for part in model.modules():
        if isinstance(part, FSDPModule):          # a sum, then a division: gloo has no average
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "generate")
    model.generate = all_asked_the_same(model, model.generate)
    return model


def all_asked_the_same(model, generate):
    """Every process runs every token of every answer, as each needs the others' weights: a question
    more on one of them would be a wait without end."""
    def together(samples, **settings):
        samples = [model.encode_sample(sample) for sample in samples]
        asked = [(s.prompt, s.history, s.mask, model.length(s)) for s in samples]
        if any(other != asked for other in all_gather_object(asked)):
            raise ValueError("sharded processes generate together, and were asked different things;"
                             " give all of them the same samples, or load the checkpoint unsharded")
        return generate(samples, **settings)
    return together


# ---------------------------------------------------------------- one step
def accumulating(model, waits):
    """Around forward and backward of a micro-batch; waits: others follow.  DDP exchanges gradients
    only once a step.  FSDP does each time: LoRA's gradients are a hundredth of the weights that it
    gathers anyway, and to keep them whole until the last would cost memory."""
    if waits and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def grad_norm_and_clip(model, most):
    """Scales the gradients to a norm of `most` at most -> their norm before, over all shards."""
    norm = nn.utils.clip_grad_norm_([p for _, p in trained(model)], most)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


# ---------------------------------------------------------------- checkpoints
@contextmanager
def full_parameters(model):
    """Inside, the trained parameters are whole tensors on the CPU of every process, to be saved by
    save_pretrained or read by load_trained; at the end each process takes its rows of them."""
    sharded = [(part, name, p) for part in model.modules()
               for name, p in part.named_parameters(recurse=False)
               if p.requires_grad and isinstance(p, DTensor)]
    for part, name, p in sharded:
        setattr(part, name, nn.Parameter(full(p)))
    try:
        yield
    finally:
        for part, name, p in sharded:
            with torch.no_grad():
                p.copy_(rows_of(getattr(part, name), p))
            setattr(part, name, p)


def full_optimiser_state(optimiser):
    """optimiser.state_dict() as it would be without sharding."""
    state = optimiser.state_dict()
    return state | {"state": {i: {name: full(t) for name, t in of.items()}
                              for i, of in state["state"].items()}}


def load_optimiser_state(optimiser, state):
    """Takes what full_optimiser_state gave, here or in a run with other processes."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    optimiser.load_state_dict(state | {"state": {
        i: {name: rows_of(t, parameters[i]) for name, t in of.items()}
        for i, of in state["state"].items()}})


def fingerprint(model):
    """Hash of the trained parameters, to the bit; the same on all processes and however the model
    is sharded, or something went wrong."""
    found = hashlib.sha256()
    for name, p in trained(model):
        found.update(name.encode() + full(p.detach()).cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def trained(model):
    """[(name, parameter)] of what learns."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return [(name, p) for name, p in bare.named_parameters() if p.requires_grad]


def full(tensor):
    """A sharded tensor whole, on the CPU; any other as it is."""
    return tensor.detach().full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def rows_of(tensor, like):
    """This process's share of a whole tensor, laid out as the sharded parameter `like`; what does
    not belong row by row to it (Adam's step), or to a parameter that is whole, stays as it is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.detach().to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)               # all hold the same: nothing is sent
