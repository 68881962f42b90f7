"""Fast paths against the plain formula that each of them replaces."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_llama import some_ids, speak, tiny_oracle

from llama import Llama
from runtime import fast


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Several (oracle, ours) that generate."""
    pairs = []
    for seed in range(6):
        root = tmp_path_factory.mktemp(f"speaker{seed}")
        oracle = speak(tiny_oracle(seed))
        oracle.save_pretrained(root)
        pairs.append((oracle, Llama.from_pretrained(root)))
    return pairs


def test_swiglu_keeps_two_tensors():
    """Its value and gradients are autograd's to the bit, with one wide tensor fewer until then."""
    def step(function, dtype):
        random = torch.Generator().manual_seed(0)
        gate, up = (torch.randn(3, 5, 7, generator=random, dtype=dtype).requires_grad_()
                    for _ in range(2))
        kept = []

        def keep(tensor):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = function(gate, up)
        return y, *torch.autograd.grad(y.square().sum(), (gate, up)), len(kept)

    for dtype in (torch.float32, torch.bfloat16):
        *ours, kept = step(fast.swiglu, dtype)
        *plain, kept_plain = step(lambda gate, up: torch.nn.functional.silu(gate) * up, dtype)
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert (kept, kept_plain) == (2, 3)


@pytest.mark.parametrize("settings", [
    {}, {"repetition_penalty": 1.5}, {"min_new_tokens": 4},
    {"temperature": 1.0, "top_p": 0.8}, {"num_beams": 3}],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()) or "greedy")
def test_steps_of_fixed_shape_say_the_same(speakers, settings, monkeypatch):
    """What `compiled` compiles, as it is: a cache that is longer than needed, left padding, one
    shape for all steps; the second answer uses the stores of the first."""
    shapes = []
    for seed, (_, ours) in enumerate(speakers):
        ids, mask = some_ids(3, 7, seed), torch.ones(3, 7, dtype=torch.bool)
        mask[0, :3], ids[0, :3] = False, 0
        embeds = ours.embed(ids)

        def answers(ours=ours, embeds=embeds, mask=mask):
            own = {"generator": torch.Generator().manual_seed(1)} if "top_p" in settings else {}
            return ours.generate(embeds=embeds, mask=mask, max_new_tokens=12, **settings, **own)
        wanted = answers()

        def step(token, position, mask, cache, ours=ours):
            shapes.append((*token.shape, *mask.shape))
            return fast.fixed_step(ours, token, position, mask, cache)
        monkeypatch.setattr(ours, "compiled", True)
        monkeypatch.setitem(ours.__dict__, "step", step)
        monkeypatch.delitem(ours.__dict__, "steps", raising=False)
        assert answers() == wanted
        steps = ours.__dict__.get("steps")
        assert answers() == wanted and ours.__dict__.get("steps") is steps
    assert set(shapes) == (set() if "num_beams" in settings else {(3, 1, 3, 128)})


COMPILE = """
import torch, llama
torch.manual_seed(0)
model = llama.Llama(llama.LlamaConfig(vocab_size=60, width=32, layers=2, heads=4, kv_heads=2,
                                      ffn=48, eos_id=2)).eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.4)
ids = torch.randint(3, 60, (2, 5))
wanted = model.generate(ids, max_new_tokens=9)
model.compiled, seen = True, []
def backend(graph, inputs):
    seen.append(graph)
    return graph.forward
plain_compile = torch.compile
torch.compile = lambda step, dynamic: plain_compile(step, backend=backend, fullgraph=True,
                                                    dynamic=dynamic)
assert model.generate(ids, max_new_tokens=9) == wanted
assert model.generate(ids.flip(0), max_new_tokens=9) == wanted[::-1]
assert len(seen) == 1, f"{len(seen)} compilations"
"""


def test_a_step_is_one_graph_compiled_once():
    """As dynamo sees it, without the C++ compiler behind it.  In a process of its own: dynamo
    starts autograd's threads, after which other tests could not fork."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True,
                          cwd=Path(fast.__file__).parent.parent, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
