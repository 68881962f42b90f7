"""LoRA: low-rank updates of chosen linear layers, the only weights of the LLM that are trained.
     y = W x + alpha/r * B A dropout(x)      x (B,L,in), W (out,in) frozen, A (r,in), B (out,r)
   Files are peft's: adapter_config.json + adapter_model.safetensors, names
   base_model.model.<module>.lora_A.weight, so that either side reads what the other wrote.
   Public: LoraConfig, inject, apply_all, merge, unmerge, save, load."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from runtime import hub

PREFIX = "base_model.model."              # what peft puts before a module's own name
# Settings of an adapter_config.json that would change the formula above: refused unless unset.
UNSUPPORTED = ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out",
               "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication",
               "modules_to_save", "exclude_modules", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class LoraConfig:
    r: int = 32
    alpha: float = 32
    dropout: float = 0.1
    target_modules: tuple = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def scale(self):
        return self.alpha / self.r


class LoraLinear(nn.Module):
    """A frozen nn.Linear and its adapter. `weight` keeps its name, so that the base model's tensors
    are found where they were. The adapter stays fp32 also over a bf16 base (its updates are too
    small for bf16) and is computed in fp32, or in autocast's dtype where that is on."""

    def __init__(self, base, config):
        super().__init__()
        self.weight, self.bias, self.config = base.weight, base.bias, config
        out, inner = base.weight.shape
        place = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(inner, config.r, **place)                      # (r,in)
        self.lora_B = nn.Linear(config.r, out, **place)                        # (out,r)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)        # a fresh adapter changes nothing
        self.merged, self.unmerged_weight = False, None     # the original, on the CPU

    def forward(self, x, inner=None):
        """x (...,in) -> (...,out); inner (...,r): what `down` made of x, if that is known."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            if self.training:
                raise RuntimeError("a merged adapter cannot train; call lora.unmerge(model) first, "
                                   "or model.eval()")
            return y
        return y + self.lora_B(down(x, [self])[0] if inner is None else inner).to(y.dtype)


def down(x, adapters):
    """alpha/r * A dropout(x) of adapters that read the same x (...,in) -> a list of (...,r): one
    dropout (peft draws one for each) and one product with all A stacked, as reading x is what takes
    the time here."""
    A, config = torch.cat([layer.lora_A.weight for layer in adapters]), adapters[0].config
    if not torch.is_autocast_enabled(x.device.type):       # which casts to its own dtype
        x = x.to(A.dtype)
    inner = F.linear(F.dropout(x, config.dropout, adapters[0].training), A)
    return (config.scale * inner).split(config.r, dim=-1)                    # scaled where r wide


def apply_all(x, *linears):
    """[linear(x) for linear in linears], with what their adapters share done once."""
    adapted = [m for m in linears if isinstance(m, LoraLinear) and not m.merged]
    inner = dict(zip(adapted, down(x, adapted), strict=True)) if adapted else {}
    return [m(x, inner[m]) if m in inner else m(x) for m in linears]


def layers(model):
    """{module name: LoraLinear} of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def inject(model, config):
    """Replaces every nn.Linear named as in config.target_modules by a LoraLinear, freezes all the
    rest of `model` and returns it."""
    if layers(model):
        raise ValueError(f"{type(model).__name__} already holds {len(layers(model))} adapters; "
                         "inject once, or build the model anew")
    found = {name: m for name, m in model.named_modules()
             if isinstance(m, nn.Linear) and f".{name}".endswith(target_endings(config))}
    absent = [target for target in config.target_modules
              if not any(f".{name}".endswith(f".{target}") for name in found)]
    if absent or not found:
        linears = {name.rpartition(".")[2] for name, m in model.named_modules()
                   if isinstance(m, nn.Linear)}
        raise ValueError(f"{type(model).__name__} has no nn.Linear named {absent}; "
                         f"choose target_modules among {sorted(linears)}")
    model.requires_grad_(False)
    for name, base in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, LoraLinear(base, config).train(base.training))
    return model


def target_endings(config):
    return tuple(f".{target}" for target in config.target_modules)


@torch.no_grad()
def merge(model, reversible=True):
    """W += alpha/r * B A, so that inference costs what it cost without adapters; they stay there.
    Does nothing where merged already. reversible: a copy of W goes to the CPU, as much again as the
    layers have; subtracting would leave rounding behind, 1 % of the update and more in bf16."""
    for layer in layers(model).values():
        if not layer.merged:
            if reversible:
                layer.unmerged_weight = layer.weight.detach().to("cpu", copy=True)
            update = layer.config.scale * (layer.lora_B.weight @ layer.lora_A.weight)  # (out,in)
            layer.weight.copy_(layer.weight + update)              # sum in fp32, rounded once
            layer.merged = True
    return model


@torch.no_grad()
def unmerge(model):
    """Gives every merged W back its original values, to the bit."""
    for name, layer in layers(model).items():
        if layer.merged:
            if layer.unmerged_weight is None:
                raise RuntimeError(f"{name} was merged without a copy of its weights; load the "
                                   "model again, or merge(model, reversible=True)")
            layer.weight.copy_(layer.unmerged_weight)
            layer.merged, layer.unmerged_weight = False, None
    return model


def adapter_tensors(model):
    """{name in peft's file: parameter} of all adapters."""
    return {f"{PREFIX}{name}.{part}.weight": getattr(layer, part).weight
            for name, layer in layers(model).items() for part in ("lora_A", "lora_B")}


def save(model, folder, base_model=None):
    """Writes the adapters, merged or not, as a peft folder. base_model: the LLM they belong to."""
    found = list(layers(model).values())
    if not found:
        raise ValueError(f"{type(model).__name__} holds no adapters; call lora.inject first")
    config, folder = found[0].config, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous()
               for name, tensor in adapter_tensors(model).items()}
    # To a temporary name first: a kill never leaves half a file under the final one.
    save_file(tensors, folder / "adapter_model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(folder / "adapter_model.safetensors.tmp", folder / "adapter_model.safetensors")
    hub.write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True})


def read_config(path):
    """peft's adapter_config.json -> LoraConfig; ValueError where it asks for another formula."""
    theirs = hub.read_json(path)
    odd = {key: theirs[key] for key in UNSUPPORTED if theirs.get(key)}
    odd |= {key: theirs[key] for key, wanted in [("peft_type", "LORA"), ("bias", "none")]
            if theirs.get(key, wanted) != wanted}
    if not isinstance(theirs.get("target_modules"), list):
        odd["target_modules"] = theirs.get("target_modules")
    if odd:
        raise ValueError(f"{path}: unsupported {odd}; wanted plain LoRA: peft_type LORA, no bias, "
                         "target_modules a list of names, extensions off; train or export it so")
    return LoraConfig(theirs["r"], theirs["lora_alpha"], theirs.get("lora_dropout", 0.0),
                      tuple(sorted(theirs["target_modules"])))


@torch.no_grad()
def load(model, folder):
    """Reads a peft folder into `model`, injecting its adapters first if there are none."""
    folder = Path(folder)
    config, path = read_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; convert adapter_model.bin to safetensors once")
    theirs = load_file(path)
    if not layers(model):
        inject(model, config)
    for name, layer in layers(model).items():
        ours = layer.config
        if (ours.r, ours.alpha) != (config.r, config.alpha):
            raise ValueError(f"{folder}: r {config.r}, alpha {config.alpha}, but {name} was made "
                             f"with r {ours.r}, alpha {ours.alpha}; inject with the file's")
        if layer.merged:
            raise ValueError(f"{folder}: {name} is merged; call lora.unmerge(model) before loading")
    wanted = adapter_tensors(model)
    problems = [f"{label}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''} ({len(names)})"
                for label, names in [
                    ("missing", sorted(wanted.keys() - theirs)),
                    ("unknown", sorted(theirs.keys() - wanted)),
                    ("wrong shape", sorted(n for n in wanted.keys() & theirs
                                           if wanted[n].shape != theirs[n].shape))] if names]
    if problems:
        raise ValueError(f"{path}: adapters do not fit {type(model).__name__}; "
                         + "; ".join(problems))
    for name, parameter in wanted.items():
        parameter.copy_(theirs[name])
    return model
