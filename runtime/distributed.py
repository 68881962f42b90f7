"""Several processes, one run: each has its share of a batch, or of the questions.

     torchrun --nproc_per_node 8 train.py     torchrun starts the processes; nccl on GPUs
     python train.py                          on a CPU `launch_local` starts one per core; gloo
The main process (rank 0) writes files and prints.  The second half of this file spreads one model
over the GPUs of several processes (PyTorch's FSDP2).

Public: launch_local, environment_ranks, init_distributed, shutdown, precision, rank, world,
local_world, log, said_once, main_process_first, one_rank_at_a_time, all_reduce_sum,
all_gather_object;
checkpoint_activations, shard, accumulating, grad_norm_and_clip, full_parameters,
full_optimiser_state, load_optimiser_state, fingerprint."""

import atexit
import hashlib
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  imported later, its functions would keep the group alive
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from runtime import cli

# cuDNN's attention spends up to a second on each new shape, and clips differ in length.  This line
# stands here because all programs import this file.
torch.backends.cuda.enable_cudnn_sdp(False)

LOOPBACK = {"linux": "lo", "darwin": "lo0"}      # the network interface that only this machine sees
listening = None           # launch_local's socket, at which the main process waits for the others


def launch_local(wanted=0, most=4):
    """Starts this command line `wanted` - 1 more times, as torchrun would, so that a run on a CPU
    uses its cores.  wanted 0: one process per core, at most `most`.  Starts nothing on a machine
    with GPUs or under torchrun.  The other processes end when this one does, however it ends.  Call
    it first in a program's __main__."""
    if "PARENT_HOLDS_STDIN" in os.environ:
        def end_with_parent():
            os.read(0, 1)                            # returns when the parent has ended
            os._exit(1)
        threading.Thread(target=end_with_parent, daemon=True).start()
        return
    wanted = wanted or min(cli.cores(), most)
    if "WORLD_SIZE" in os.environ or torch.cuda.is_available() or wanted == 1:
        return
    # PyTorch would listen on all of the machine's addresses, so that anyone could join.
    global listening
    listening = socket.create_server(("127.0.0.1", 0), backlog=wanted)
    os.environ |= {"WORLD_SIZE": str(wanted), "RANK": "0", "LOCAL_RANK": "0",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening.getsockname()[1])}
    if sys.platform in LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK[sys.platform]
    for rank in map(str, range(1, wanted)):
        subprocess.Popen([sys.executable, *sys.orig_argv[1:]], stdin=subprocess.PIPE, env={
            **os.environ, "RANK": rank, "LOCAL_RANK": rank, "PARENT_HOLDS_STDIN": "yes"})


def environment_ranks():
    """-> rank, world, rank on this machine: from the environment, before init_distributed."""
    return tuple(int(os.environ.get(k, d)) for k, d in
                 (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def init_distributed():
    """Connects all processes, with gloo on CPUs or nccl on GPUs -> rank, world, device."""
    rank, world, local = environment_ranks()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    if rank > 0:                                     # only the main process shows downloads
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if world > 1:
        # The timeout is long, because all wait while the main process makes clips and features.
        # When a process dies, torchrun or gloo ends the others at once.
        if listening:
            store = dist.TCPStore(*listening.getsockname(), world, is_master=True,
                                  wait_for_workers=False, master_listen_fd=listening.detach())
        else:
            store, rank, world = next(dist.rendezvous("env://"))
        # The prefix hides what an earlier start left in torchrun's store (--max-restarts): the
        # addresses there belong to processes that have ended.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(hours=24))
        if not cuda:
            atexit.register(_destroy_group)
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def precision(name, model, device, on_cpu="bfloat16"):
    """-> dtype of the frozen weights, autocast context for training, the reason as text.
    name: "bfloat16", "float32", or "": bfloat16 on a GPU, on a CPU what the preset `model` says."""
    reason = "asked for" if name else f"{device.type}, {model}"
    name = name or ("bfloat16" if device.type == "cuda" else on_cpu)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    autocast = (torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext())
    return dtype, autocast, f"{name} ({reason})"


def rank():
    """Number of this process, from 0; 0 is the main process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world():
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def log(*words):
    """Prints, on the main process only."""
    if rank() == 0:
        print(*words, flush=True)


def _destroy_group():
    """Runs at the end of a program that did not call shutdown, as after an error.  If gloo's
    threads freed their last tensors while Python itself ends, the process would abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shutdown(model=None):
    """Waits for all processes, then disconnects.  model: the one in DDP, unusable afterwards."""
    if dist.is_initialized():
        dist.barrier()
        # DDP's reducer would be the last to hold the group.  It would end it while it holds
        # Python's lock, and wait for gloo's threads, which may need that lock to free tensors.
        if isinstance(model, DistributedDataParallel):
            del model.reducer, model.logger
        dist.destroy_process_group()


@contextmanager
def said_once():
    """In the block, a sentence that ends the program (SystemExit) is printed by the first process
    of a machine.  The others, which have met the same error, end silently."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.code, str) and environment_ranks()[2] > 0:
            raise SystemExit(1) from None
        raise


@contextmanager
def main_process_first():
    """The main process runs the block first, to make files for example; then the others run it.  If
    it fails there, they end."""
    if rank() > 0:
        _wait_for(False)
    failed = True
    try:
        yield
        failed = False
    finally:
        if rank() == 0:
            _wait_for(failed)


def _wait_for(failed):
    """Waits for all processes.  SystemExit when another one has failed; that one says why."""
    if any(all_gather_object(failed)) and not failed:
        raise SystemExit(1)


def all_reduce_sum(values, device="cpu"):
    """List of numbers -> list of their sums over all processes."""
    if not dist.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def all_gather_object(part):
    """Any Python value -> list of the values of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return [part]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


# ---------------------------------------------------------------- one model over several GPUs
# FSDP2, for GPUs that cannot hold a 13B LLM.  Each of n processes keeps 1/n of the rows of every
# tensor of the LLM, of LoRA and of the aligner, and of their gradients and Adam's moments.  A LLaMA
# block is gathered whole just before it runs, forward and backward, and dropped afterwards; 13B on
# 8 GPUs is 3.3 of 26 GB each, plus one or two whole blocks of 0.6 GB and 0.9 GB of the rest.
# Frozen Whisper, ViT and Q-Former (3.6 GB) stay whole everywhere, because how often they run
# depends on a process's own clips, and gathering waits for all processes.
#
# So every process must call model(samples), model.generate and the functions below equally often; a
# process without samples repeats one with weight 0.  The order is: one_rank_at_a_time() around
# loading on the CPU and shard(); make the optimiser; load its state.  All functions also take plain
# and DDP models.  Checkpoints do not depend on sharding or on the number of processes
# (tests/runtime/test_distributed.py).

def checkpoint_activations(model):
    """From now on the LLM's blocks and the causal Q-Former's layers store only their inputs in
    training, and compute the rest again in the backward pass: a third more time, a fraction of the
    memory."""
    aligner = getattr(model, "qformer", None)                    # InstructBLIP has none
    for layer in (*model.llm.model.layers, *getattr(aligner, "layers", ())):
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(layer, forward, *args):
    """The layer's own forward(*args), recomputed in the backward pass.  But a KVCache, the last
    argument of an LLM's block, must not be written twice."""
    if layer.training and torch.is_grad_enabled() and not hasattr(args[-1], "extend"):
        return checkpoint(forward, *args, use_reentrant=False)
    return forward(*args)


@contextmanager
def one_rank_at_a_time():
    """One process after the other runs the block.  Around loading and `shard`, so that the memory
    of a machine holds at most one whole model."""
    for turn in range(world()):
        failed = turn == rank()
        try:
            if turn == rank():
                yield
                failed = False
        finally:
            _wait_for(failed)


def shard(model, device):
    """Spreads a Favor, which may lie on the CPU, over the devices of all processes, block by block.
    With one process the model just moves to `device`.  -> the same object, with new parameters."""
    if world() == 1:
        return model.to(device)
    # imported here, because it takes as long as a third of torch, and few runs are sharded
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (world(),))
    replicated = {p for p in model.parameters() if not p.requires_grad} - {*model.llm.parameters()}
    for parameter in replicated:
        parameter.data = parameter.data.to(device)
    # A group may mix dtypes if its trained parameters share one.  We set no mixed-precision policy,
    # which would cast LoRA to bf16; autocast decides, as without sharding.
    for block in model.llm.model.layers:
        fully_shard(block, mesh=mesh)
    # Embeddings belong to the root's group, because lm_head may be the same tensor.  Without
    # reshard_after_forward, validation (a forward without backward) would leave whole copies.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    for part in model.modules():
        if isinstance(part, FSDPModule):          # gloo cannot average: sum, then divide
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "generate")
    model.generate = _same_samples(model, model.generate)
    return model


def _same_samples(model, generate):
    """generate() that checks that all processes got the same samples.  Each token of each answer
    needs the weights of all processes, so one question more on one of them would wait forever."""
    def checked(samples, **settings):
        samples = [model.encode_sample(sample) for sample in samples]
        asked = [(s.prompt, s.history, s.mask, model.length(s)) for s in samples]
        if any(other != asked for other in all_gather_object(asked)):
            raise ValueError("sharded processes generate together, but got different samples; "
                             "give all of them the same samples, or load the checkpoint unsharded")
        return generate(samples, **settings)
    return checked


def accumulating(model, waits):
    """Context for forward and backward of a micro-batch; waits: further ones follow in this step.
    DDP exchanges gradients only after the last.  FSDP does so each time: LoRA's gradients are a
    hundredth of the weights that it gathers anyway, and to hold them whole would cost memory."""
    if waits and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def grad_norm_and_clip(model, most):
    """Scales the gradients so that their norm is at most `most` -> the norm before that."""
    norm = nn.utils.clip_grad_norm_([p for _, p in _trained(model)], most)
    return _full(norm).item()


@contextmanager
def full_parameters(model):
    """In the block the trained parameters are whole tensors on the CPU of every process, for
    save_pretrained or load_trained; afterwards each process has its rows of them again."""
    sharded = [(part, name, p) for part in model.modules()
               for name, p in part.named_parameters(recurse=False)
               if p.requires_grad and _sharded(p)]
    for part, name, p in sharded:
        setattr(part, name, nn.Parameter(_full(p)))
    try:
        yield
    finally:
        for part, name, p in sharded:
            with torch.no_grad():
                p.copy_(_rows_of(getattr(part, name), p))
            setattr(part, name, p)


def full_optimiser_state(optimiser):
    """optimiser.state_dict() as it would be without sharding."""
    state = optimiser.state_dict()
    return state | {"state": {i: {name: _full(t) for name, t in of.items()}
                              for i, of in state["state"].items()}}


def load_optimiser_state(optimiser, state):
    """Loads the result of full_optimiser_state, also that of a run with other processes.  Raises
    ValueError when it is not the state of AdamW with these parameters."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    moments, groups = state.get("state"), optimiser.state_dict()["param_groups"]
    if not isinstance(moments, dict) or moments.keys() - {*range(len(parameters))}:
        raise ValueError(f"the optimiser's state is not one of {len(parameters)} parameters")
    for i, of in moments.items():
        shape = tuple(parameters[i].shape)
        for name, wanted in (("exp_avg", shape), ("exp_avg_sq", shape), ("step", ())):
            t = of.get(name) if isinstance(of, dict) else None
            if not isinstance(t, torch.Tensor) or t.shape != wanted or not t.isfinite().all():
                raise ValueError(f"the optimiser's {name} of parameter {i} is not {wanted} finite "
                                 f"numbers, but {t if t is None else tuple(t.shape)}")
    optimiser.load_state_dict({"param_groups": groups, "state": {      # settings: this run's own
        i: {name: _rows_of(t, parameters[i]) for name, t in of.items()}
        for i, of in moments.items()}})


def fingerprint(model):
    """Hash of all bits of the trained parameters.  It must be the same on all processes, sharded or
    not."""
    found = hashlib.sha256()
    for name, p in _trained(model):
        found.update(name.encode() + _full(p.detach()).cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _trained(model):
    """[(name, parameter)] of the trained parameters."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return [(name, p) for name, p in bare.named_parameters() if p.requires_grad]


def _sharded(tensor):
    """Whether this is a DTensor: the share of one process."""
    return hasattr(tensor, "full_tensor")


def _full(tensor):
    """A sharded tensor gathered whole on the CPU; any other tensor unchanged."""
    return tensor.detach().full_tensor().cpu() if _sharded(tensor) else tensor


def _rows_of(tensor, like):
    """This process's share of a whole tensor, laid out as the sharded parameter `like`.  A tensor
    of another shape (Adam's step) or of a parameter that is not sharded stays unchanged."""
    if not _sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.detach().to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None)           # all have the same: nothing is sent
