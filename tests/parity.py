"""Helpers of the parity tests: random weights everywhere, and the largest difference printed."""

import torch


@torch.no_grad()
def randomise(module, seed=0):
    """Every parameter random: 1 + 0.1 N for norm weights, 0.5 N for query tokens, 0.05 N for the
    rest.  With the usual initialisation (zero biases, unit norms, zero queries) a port that swaps
    biases, drops a norm or forgets the queries would still pass."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = "norm" in name.lower() and name.endswith("weight")
        scale = 0.1 if is_norm_weight else 0.5 if "query_tokens" in name else 0.05
        parameter.copy_(scale * noise + (1.0 if is_norm_weight else 0.0))
    return module


def check(what, ours, theirs, max_abs=1e-5, rel_rms=2e-6):
    """Asserts both tolerances and prints the differences (seen with pytest -rP or -s)."""
    assert ours.shape == theirs.shape, (
        f"{what}: shape {tuple(ours.shape)}, wanted {tuple(theirs.shape)}")
    difference = (ours.double() - theirs.double())
    worst = difference.abs().max().item()
    relative = (difference.pow(2).mean()
                / theirs.double().pow(2).mean().clamp_min(1e-30)).sqrt().item()
    print(f"parity {what}: largest difference {worst:.1e} (allowed {max_abs:.0e}), "
          f"relative rms {relative:.1e} (allowed {rel_rms:.0e})")
    assert worst <= max_abs, f"{what}: largest difference {worst:.2e}, allowed {max_abs:.0e}"
    assert relative <= rel_rms, f"{what}: relative rms {relative:.2e}, allowed {rel_rms:.0e}"
