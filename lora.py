"""LoRA: low-rank updates of chosen linear layers, the only weights of the LLM that are trained.
   Paper Sec. 4.2; Hu et al. 2021.

     x (B,L,in) --W (out,in), frozen--------------------------------------------> + --> y (B,L,out)
          |                                                                       |
          '--dropout--> A (r,in) --> (B,L,r) --times alpha/r--> B (out,r) --------'

   Files are peft's: adapter_config.json + adapter_model.safetensors with names like
   base_model.model.<module>.lora_A.weight, so that peft reads what we write, and we what it writes.
   Public: LoraConfig, LoraLinear, inject, layers, merge, unmerge, save, load."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from runtime import hub
from runtime.fast import stacked_down

PREFIX = "base_model.model."              # what peft puts before a module's own name
# Settings of an adapter_config.json that would change the formula above: refused unless unset.
UNSUPPORTED = ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out",
               "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication",
               "modules_to_save", "exclude_modules", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class LoraConfig:
    """Defaults: the layers of the authors' released code."""
    r: int = 32
    alpha: float = 32
    dropout: float = 0.1          # before A
    target_modules: tuple = ("q_proj", "k_proj", "v_proj", "o_proj")     # ends of module names

    @property
    def scale(self):
        """alpha / r, the factor of an update."""
        return self.alpha / self.r


class LoraLinear(nn.Module):
    """A frozen nn.Linear and its adapter. `weight` keeps its name, so that the base model's tensors
    are found where they were. The adapter stays fp32 even over a bf16 base, because its updates are
    too small for bf16; it is computed in fp32, or in autocast's dtype where autocast is on."""

    def __init__(self, base, config):
        super().__init__()
        self.weight, self.bias, self.config = base.weight, base.bias, config
        out, inner = base.weight.shape
        place = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(inner, config.r, **place)                      # (r,in)
        self.lora_B = nn.Linear(config.r, out, **place)                        # (out,r)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)        # a fresh adapter changes nothing
        self.merged, self.unmerged_weight = False, None     # the original W, on the CPU

    def forward(self, x, inner=None):
        """x (...,in) -> (...,out). inner (...,r): alpha/r * A dropout(x), if the caller has it:
        layers that read the same x share it (runtime/fast.py: apply_all)."""
        y = F.linear(x, self.weight, self.bias)
        if self.merged:
            if self.training:
                raise RuntimeError("a merged adapter cannot train; call lora.unmerge(model) first, "
                                   "or model.eval()")
            return y
        if inner is None:                  # scale * lora_A(F.dropout(x, dropout, self.training))
            inner = stacked_down(x, [self])[0]
        return y + self.lora_B(inner).to(y.dtype)


def layers(model):
    """{module name: LoraLinear} of a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def inject(model, config):
    """Replaces every nn.Linear whose name ends as in config.target_modules by a LoraLinear, freezes
    the rest of `model` and returns it. ValueError lists the linear layers if none is named so."""
    if layers(model):
        raise ValueError(f"{type(model).__name__} already holds {len(layers(model))} adapters; "
                         "inject once, or build the model anew")
    endings = tuple(f".{target}" for target in config.target_modules)
    found = {name: m for name, m in model.named_modules()
             if isinstance(m, nn.Linear) and f".{name}".endswith(endings)}
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


@torch.no_grad()
def merge(model, reversible=True):
    """W += alpha/r * B A in every adapted layer, so that inference costs what it cost without
    adapters; these stay in place. Layers that are merged already stay as they are. reversible: a
    copy of each W goes to the CPU for unmerge(), because subtracting the update would leave a
    rounding error: 1 % of the update and more in bf16."""
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
    """Writes the adapters, merged or not, as a peft folder, atomically. base_model: a name of the
    LLM that they belong to."""
    found = list(layers(model).values())
    if not found:
        raise ValueError(f"{type(model).__name__} holds no adapters; call lora.inject first")
    config, folder = found[0].config, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous()
               for name, tensor in adapter_tensors(model).items()}
    hub.save_tensors(folder / "adapter_model.safetensors", tensors)
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
    """Reads a peft folder into `model`; adapters are injected first if there are none. Raises
    ValueError that lists what is missing, unknown or of another shape."""
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
