"""distributed.py: a model sharded over two processes with gloo: one process = two sharded, to the
checkpoints' files; how much each holds; what recomputing activations changes (nothing).

Ten steps of four samples; process 0 meets sound and text, process 1 pictures and text, one of them
text alone in most steps: nobody may wait for a branch that the other does not take."""

import copy
from types import SimpleNamespace

import pytest
import torch
from parity import randomise
from safetensors.torch import load_file
from test_train import run_forked
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import favor
import train
from baselines.systems import SYSTEMS
from favor import Features, Sample
from llama import Block, KVCache
from runtime import distributed

CPU = torch.device("cpu")
STEPS, HALF = 10, 8                         # a checkpoint is written at HALF


# ---- the same training in every process ---------------------------------------------------------

@pytest.fixture(scope="module")
def build(small_parts):
    """build(dtype, **fields of FavorConfig) -> a model in training mode, every parameter random."""
    def build(dtype=None, system="favor", **changes):
        config = favor.preset("tiny", whisper=str(small_parts / "whisper"),
                              llm=str(small_parts / "llama"), max_new_tokens=4,
                              visual=str(small_parts / "instructblip"), **changes)
        model = randomise(SYSTEMS[system].from_config(config, dtype)).train()
        model.llm.lm_head.weight.data *= 10        # a random LLM that is sure of what it says
        return model
    return build


def batch_of(step):
    """Four samples: the first and third are process 0's."""
    def sample(i, kind):
        generator = torch.Generator().manual_seed(10 * step + i)
        frames, steps = (2 + i, 0) if kind == "pictures" else (0, 30 + 5 * i)
        features = None if kind == "text" else Features(
            torch.randn(frames, 4, 16, generator=generator) if frames else None,
            torch.randn(steps, 16, generator=generator) if steps else None)
        return Sample(f"say {step}", ["red", "blue cone", "the cube", "green"][i], None,
                      features or Features())
    kinds = [("sound", "pictures"), ("sound", "text"), ("text", "pictures")][step % 3]
    return [sample(i, kinds[i % 2]) for i in range(4)]


def questions():
    return [batch_of(step)[1] for step in range(4)]


def optimiser_of(model):
    """eps: a gradient that is zero but for rounding (a key's bias) must not become a step."""
    bare = getattr(model, "module", model)
    optimiser = train.make_optimiser(bare, train.TrainConfig(lr=1e-2))
    for group in optimiser.param_groups:
        group["eps"] = 1e-4
    return optimiser


def steps_of(model, optimiser, first=0, last=STEPS, micro=4, autocast=False, batches=batch_of):
    """What train_step does -> [(loss, gradient norm)] of the whole batch, the same everywhere."""
    bare = getattr(model, "module", model)
    rank, world, rows = distributed.rank(), distributed.world(), []
    for step in range(first, last):
        torch.manual_seed(step)
        batch = batches(step)
        tokens = sum(bare.answer_tokens(s) for s in batch)
        pieces = max(1, sum(bare.diversity_parts(s) for s in batch))
        mine, total = batch[rank::world], 0
        parts = [mine[i:i + micro] for i in range(0, len(mine), micro)]
        for i, part in enumerate(parts):
            with distributed.accumulating(model, waits=i + 1 < len(parts)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    losses = model(part)
                loss = (losses["ce"] * losses["tokens"] / tokens
                        + losses["diversity"] * losses["diversity_parts"] / pieces)
                (loss * world).backward()
            total += loss.item()
        norm = distributed.grad_norm_and_clip(model, 0.5)
        optimiser.step()
        optimiser.zero_grad()
        rows.append((distributed.all_reduce_sum([total])[0], norm))
    return torch.tensor(rows)


def weights_of(model):
    return {name: p.detach().clone() for name, p in distributed._trained(model)}


def two_processes(work, folder):
    """What work() gave in each of two processes."""
    def whole(rank):
        distributed.init_distributed()
        torch.save(work(), folder / f"{rank}.pt")
        distributed.shutdown()
    assert run_forked(whole, processes=2) == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def far(ours, theirs, what):
    """The largest difference of two tensors or dictionaries, printed."""
    if isinstance(ours, torch.Tensor):
        ours, theirs = {"": ours}, {"": theirs}
    assert ours.keys() == theirs.keys()
    worst = max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)
    print(f"{what}: largest difference {worst:.1e}")
    return worst


def saved(model, optimiser, folder):
    """A checkpoint as train.py writes it."""
    state = distributed.full_optimiser_state(optimiser)
    with distributed.full_parameters(model):
        if distributed.rank() == 0:
            model.save_pretrained(folder)
            torch.save(state, folder / "state.pt")


def loaded(model, folder, shard):
    """-> model, optimiser as they were when saved."""
    model.load_trained(folder)
    model = distributed.shard(model, CPU) if shard else model
    optimiser = optimiser_of(model)
    distributed.load_optimiser_state(optimiser, torch.load(folder / "state.pt", weights_only=True))
    return model, optimiser


@pytest.fixture(scope="module")
def one(build, tmp_path_factory):
    """One process, nothing sharded; its checkpoint at HALF."""
    folder, model = tmp_path_factory.mktemp("one"), build()
    optimiser, before = optimiser_of(model), weights_of(model)
    rows = steps_of(model, optimiser, last=HALF)
    saved(model, optimiser, folder)
    rows = torch.cat([rows, steps_of(model, optimiser, HALF)])
    moved = far(weights_of(model), before, "ten steps")
    assert moved > 0.02 and (rows[:, 1] > 0.5).any()           # it learns, and clipping clips
    return SimpleNamespace(rows=rows, weights=weights_of(model), folder=folder, model=model.eval())


@pytest.fixture(scope="module")
def two(build, tmp_path_factory):
    """The same in two processes, sharded; what each has to say."""
    folder = tmp_path_factory.mktemp("two")

    def work():
        with distributed.one_rank_at_a_time():
            model = distributed.shard(build(), CPU)
        blocks, at_once = model.llm.model.layers, set()
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: at_once.add(
                sum(not isinstance(b.mlp.down_proj.weight, DTensor) for b in blocks)))
        said = [model.eval().generate(questions())]
        optimiser = optimiser_of(model.train())
        rows = steps_of(model, optimiser, last=HALF)
        saved(model, optimiser, folder)
        prints = [distributed.fingerprint(model)]
        rows = torch.cat([rows, steps_of(model, optimiser, HALF)])
        with distributed.full_parameters(model):
            weights = weights_of(model)
        said.append(model.eval().generate(questions()))
        try:
            model.generate(questions()[:1 + distributed.rank()])
            refused = "not refused"
        except ValueError as error:
            refused = str(error)
        held = {name: (type(p).__name__, p.to_local().numel() if isinstance(p, DTensor) else
                       p.numel(), p.numel()) for name, p in model.named_parameters()}
        moments = sum(t.to_local().numel() for of in optimiser.state.values()
                      for t in of.values() if isinstance(t, DTensor))
        with distributed.full_parameters(model):
            model.load_trained(folder)
        prints.append(distributed.fingerprint(model))
        return {"rows": rows, "weights": weights, "held": held, "moments": moments,
                "at_once": at_once, "prints": prints, "said": said, "refused": refused}
    return SimpleNamespace(folder=folder, ranks=two_processes(work, folder))


# ---- one process = two sharded ------------------------------------------------------------------

def test_two_sharded_are_one(one, two):
    for rank in two.ranks:
        assert far(rank["rows"], one.rows, "losses and gradient norms") < 1e-5
        assert far(rank["weights"], one.weights, "parameters") < 1e-5


def test_each_holds_half(two):
    """Of every LLM weight, LoRA, aligner and Adam's moments, also after a forward that no backward
    followed; the frozen encoders are whole."""
    for rank in two.ranks:
        assert rank["at_once"] == {1}                          # block that is whole while one runs
        kinds = {part: {kind for name, (kind, *_) in rank["held"].items() if name.startswith(part)}
                 for part in ("llm.", "qformer.", "audio_proj.", "whisper.", "visual.")}
        assert kinds["llm."] == kinds["qformer."] == kinds["audio_proj."] == {"DTensor"}
        assert kinds["whisper."] == kinds["visual."] == {"Parameter"}
    for part in ("llm.model.layers", "llm.lm_head", "llm.model.embed", "qformer", "llm_proj"):
        sums = [[sum(row[i] for name, row in rank["held"].items() if name.startswith(part))
                 for rank in two.ranks] for i in (1, 2)]
        (ours, theirs), (both, _) = sums
        assert ours + theirs == both and abs(ours - theirs) < 0.05 * both, part
    learnt = sum(t.numel() for t in two.ranks[0]["weights"].values())
    assert sum(rank["moments"] for rank in two.ranks) == 2 * learnt


def test_the_checkpoint_is_the_same_files(one, two):
    ours, theirs = ({str(p.relative_to(part.folder)): p for p in part.folder.rglob("*")
                     if p.is_file() and p.name not in ("0.pt", "1.pt")} for part in (one, two))
    assert ours.keys() == theirs.keys() and len(ours) == 5
    for name in ours:
        if name.endswith(".safetensors"):
            assert far(load_file(ours[name]), load_file(theirs[name]), name) < 1e-5
        elif name.endswith(".json"):
            assert ours[name].read_text() == theirs[name].read_text()
    states = [torch.load(files["state.pt"], weights_only=True) for files in (ours, theirs)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    moments = [{(i, name): t for i, of in state["state"].items() for name, t in of.items()}
               for state in states]
    assert {type(t) for t in moments[1].values()} == {torch.Tensor}
    assert far(*moments, "Adam's state") < 1e-7


def test_an_unsharded_run_goes_on(build, one, two):
    rows = steps_of(*loaded(build(), two.folder, shard=False), first=HALF)
    assert far(rows, one.rows[HALF:], "losses after") < 1e-5


def test_a_sharded_run_goes_on(build, one, two, tmp_path):
    """From one process's checkpoint, and from its own as if it had not stopped."""
    def work():
        found = []
        for folder in (one.folder, two.folder):
            model, optimiser = loaded(build(), folder, shard=True)
            rows = steps_of(model, optimiser, first=HALF)
            with distributed.full_parameters(model):
                found.append((rows, weights_of(model)))
        return found
    for found, unbroken in zip(two_processes(work, tmp_path), two.ranks, strict=True):
        (rows, weights), (own_rows, own_weights) = found
        assert far(rows, one.rows[HALF:], "losses after") < 1e-5
        assert far(weights, one.weights, "parameters") < 1e-5
        assert torch.equal(own_rows, unbroken["rows"][HALF:])
        assert all(torch.equal(own_weights[n], t) for n, t in unbroken["weights"].items())


def test_answers(build, one, two):
    """Before and after training, given the same questions; others are refused."""
    said = [model.generate(questions()) for model in (build().eval(), one.model)]
    assert len({*said[0]}) > 1 and said[0] != said[1]
    for rank in two.ranks:
        assert rank["said"] == said and "give all of them the same samples" in rank["refused"]


def test_fingerprint(build, two, tmp_path):
    model = build()
    model.load_trained(two.folder)
    [wanted] = {found for rank in two.ranks for found in rank["prints"]}
    assert distributed.fingerprint(model) == wanted               # unsharded, and read in `whole`

    def work():
        ddp = DistributedDataParallel(build())
        prints = [distributed.fingerprint(ddp)]
        if distributed.rank() == 1:
            ddp.module.llm_proj.bias.data[0] += 1e-6
        return prints + [distributed.fingerprint(ddp)]
    zero, one = two_processes(work, tmp_path)
    assert zero[0] == zero[1] == one[0] != one[1]


def test_accumulation(build, one, tmp_path):
    """Two micro-batches of one sample in each process, recomputing activations."""
    def work():
        found = []
        for kind in ("DDP", "sharded"):
            model = build()
            distributed.checkpoint_activations(model)
            model = (DistributedDataParallel(model) if kind == "DDP"
                     else distributed.shard(model, CPU))
            found.append(steps_of(model, optimiser_of(model), last=2, micro=1))
        return found
    for found in two_processes(work, tmp_path):
        for rows in found:
            assert far(rows, one.rows[:2], "losses") < 1e-5


def test_mixed_dtypes(build, tmp_path):
    """Frozen bf16 and trained fp32 in one block, under autocast, recomputing; lm_head tied."""
    def tied():
        model = build(torch.bfloat16)
        model.llm.lm_head.weight = model.llm.model.embed_tokens.weight
        return model
    model = tied()
    rows = steps_of(model, optimiser_of(model), last=3, autocast=True)

    def work():
        model = tied()
        distributed.checkpoint_activations(model)
        model = distributed.shard(model, CPU)
        found = steps_of(model, optimiser_of(model), last=3, autocast=True)
        assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
        return found, {(p.requires_grad, p.dtype, p.to_local().dtype)
                       for p in model.llm.parameters()}
    for found, dtypes in two_processes(work, tmp_path):
        assert far(found, rows, "losses in bf16") < 2e-2
        assert dtypes == {(False, *[torch.bfloat16] * 2), (True, *[torch.float32] * 2)}


def test_instructblip(build, tmp_path):
    """No LoRA, a Q-Former that learns: the fine-tuned baseline is sharded too."""
    def batches(step):
        generator = torch.Generator().manual_seed(step)
        return [Sample("say", ["red", "blue"][i], None, Features(
            torch.randn(1 + i, 17, 16, generator=generator) if i != step else None))
            for i in range(2)]
    model = build(system="instructblip")
    rows = steps_of(model, optimiser_of(model), last=3, batches=batches)

    def work():
        model = distributed.shard(build(system="instructblip"), CPU)
        return steps_of(model, optimiser_of(model), last=3, batches=batches)
    for found in two_processes(work, tmp_path):
        assert far(found, rows, "losses of InstructBLIP") < 1e-5


# ---- recomputing activations --------------------------------------------------------------------

def test_recomputing_changes_nothing(build):
    """Gradients to the bit, dropout included; blocks and layers do run twice, but not where nothing
    is learnt or a cache is in use."""
    model, counts = build(dropout=0.1, lora_dropout=0.1), {}
    for part in model.modules():
        if isinstance(part, Block | favor.CausalQFormerLayer):
            def counted(*args, part=part, forward=part.forward):
                counts[type(part)] = counts.get(type(part), 0) + 1
                return forward(*args)
            part.forward = counted

    def gradients():
        counts.clear()
        model.zero_grad()
        torch.manual_seed(1)
        losses = model(batch_of(0))
        losses["loss"].backward()
        return {name: p.grad.clone() for name, p in distributed._trained(model)}, copy.copy(counts)

    kept, once = gradients()
    distributed.checkpoint_activations(model)
    again, twice = gradients()
    assert once == {Block: 2, favor.CausalQFormerLayer: 2}
    assert twice == {kind: 2 * n for kind, n in once.items()}
    assert all(torch.equal(again[name], gradient) for name, gradient in kept.items())
    torch.manual_seed(2)
    other = model(batch_of(0))["loss"]                          # dropout does something
    torch.manual_seed(1)
    assert other != model(batch_of(0))["loss"]
    with torch.no_grad():
        counts.clear()
        model(batch_of(0))
        assert counts == once
    counts.clear()
    model.llm.hidden(torch.ones(1, 3, dtype=torch.long), cache=KVCache(1, 3)).sum().backward()
    assert counts == {Block: 2}                                 # a cache must not be written twice


def test_one_process_alone(build):
    model = build()
    assert distributed.shard(model, CPU) is model
    assert not any(isinstance(p, DTensor) for p in model.parameters())


def test_in_turn(tmp_path):
    def work():
        for word in ("first", "second"):
            with distributed.one_rank_at_a_time(), open(tmp_path / "order", "a") as file:
                file.write(f"{word} {distributed.rank()}\n")
    two_processes(work, tmp_path)
    assert (tmp_path / "order").read_text().split("\n")[:-1] == [
        "first 0", "first 1", "second 0", "second 1"]
