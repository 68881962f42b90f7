"""One model over several processes, for GPUs that cannot hold a 13B LLM: PyTorch's FSDP2.

     process r of n keeps the r-th n-th of the rows of every tensor of
       each LLaMA block: frozen weights (bf16) and LoRA (fp32)     a group: whole while it runs
       embeddings, lm_head, last norm, aligner                     a group: whole in the forward
     and of their gradients and of Adam's two moments
     group --all-gather--> whole --forward, later again backward--> dropped
       gradients --reduce-scatter, averaged as DDP's are--> each process its rows
13B on 8 GPUs: 3.3 of 26 GB of LLM each, one block or two (0.6 GB each) and the rest (0.9 GB) whole.
Frozen Whisper, ViT and Q-Former (3.6 GB) stay whole everywhere: how often they run depends on a
process's own clips, and a gathering waits until all processes take part.

So all processes call model(samples), model.generate and every function here equally often; where
one has nothing left it repeats something at weight 0.  The order: `in_turn` load on the CPU (frozen
parts, then load_trained) and `shard`; make the optimiser; load its state.  Plain models and DDP are
taken as well, and checkpoints are the same files: any number of processes goes on from them,
sharded or not (test_sharding.py).

Public: checkpoint_activations, in_turn, shard, accumulating, grad_norm_and_clip, whole,
full_optimiser_state, load_optimiser_state, fingerprint."""

import hashlib
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from runtime import distributed as processes


def checkpoint_activations(model):
    """From now on LLaMA blocks and causal Q-Former layers keep only their inputs in training and
    compute the rest again in the backward pass: a third more time, a fraction of the memory."""
    for part in model.modules():
        if hasattr(part, "checkpointing"):
            part.checkpointing = True


@contextmanager
def in_turn():
    """One process after the other: around loading and `shard`, a machine's memory holds no more
    than one whole model."""
    for rank in range(processes.world()):
        if rank == processes.rank():
            yield
        if processes.world() > 1:
            dist.barrier()


# ---------------------------------------------------------------- sharding
def shard(model, device):
    """Spreads a Favor, which may lie on the CPU, over the processes' devices, block by block; one
    process alone just takes it.  -> the same object with new parameters."""
    if processes.world() == 1:
        return model.to(device)
    mesh = init_device_mesh(device.type, (processes.world(),))
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
        samples = [model.with_features(sample) for sample in samples]
        asked = [(s.prompt, s.history, s.mask, model.length(s)) for s in samples]
        if any(other != asked for other in processes.gathered(asked)):
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
def whole(model):
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
