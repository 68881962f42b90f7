"""Looks into the steps of train.py, and into one step alone."""

import torch

import train
from runtime import distributed, loader


def watch(patch, before=lambda step, model, items: None, after=lambda step, norm: norm):
    """From now on each step of train.py calls before(step, model, items) when it has its items, and
    after(step, norm), whose value becomes the norm, when it has its gradients.  Steps count from 0.
    patch(module, name, function): setattr, or a MonkeyPatch's."""
    encode, clip, at = train.encode_share, distributed.grad_norm_and_clip, {}

    def encode_share(model, items, config, device):
        at["step"] = items[0].g // config.batch
        before(at["step"], model, items)
        return encode(model, items, config, device)

    patch(train, "encode_share", encode_share)
    patch(distributed, "grad_norm_and_clip",
          lambda model, most: after(at["step"], clip(model, most)))


def train_items(samples):
    return [loader.TrainItem(k, str(k), "any", sample) for k, sample in enumerate(samples)]


def one_step(model, samples, config):
    """Gradients as the loop of train.py makes them, in one process -> {losses, norm}, Share."""
    cpu, factor = torch.device("cpu"), model.config.diversity
    share = train.encode_share(model, train_items(samples), config, cpu)
    for part in share.parts:
        losses = model([sample for _, sample, *_ in part])
        share.add(part, losses, factor).backward()
    row = share.losses(factor, cpu)
    if share.parts:
        row["grad_norm"] = distributed.grad_norm_and_clip(model, config.grad_clip)
    return row, share
