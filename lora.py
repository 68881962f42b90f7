"""LoRA: low-rank updates of chosen linear layers, the only weights of the LLM that are trained.
   Paper Sec. 4.2; Hu et al. 2021.

     x (B,L,in) --W (out,in), frozen--------------------------------------------> + --> y (B,L,out)
          |                                                                       |
          '--dropout--> A (r,in) --> (B,L,r) --times alpha/r--> B (out,r) --------'

   Files are peft's: adapter_config.json + adapter_model.safetensors with names like
   base_model.model.<module>.lora_A.weight, so that peft reads what we write, and we what it writes.
   Public: LoraConfig, LoraLinear, inject, layers, merge, unmerge, save, load."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from runtime import hub
from runtime.fast import stacked_down

PREFIX = "base_model.model."              # what peft puts before a module's own name
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "bias",
        "init_lora_weights"}
# Settings of an adapter_config.json that change nothing in the formula above: where an adapter
# comes from, how it began, how it is held, and numbers that act only with a setting below.
HARMLESS = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
            "peft_version", "runtime_config", "eva_config", "corda_config", "loftq_config",
            "lora_ga_config", "layers_pattern", "megatron_core", "qalora_group_size"}
# Beginnings that leave the base model's weights as they are. The others move a part of them into
# the adapter, so that it does not fit the weights as published.
BEGINNINGS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
# Settings that ask for another formula: refused unless they are unset.
UNSUPPORTED = {
    "use_rslora": "it scales by alpha / sqrt(r)", "use_dora": "it learns the length of W's columns",
    "use_qalora": "it pools the input", "use_bdlora": "its A and B are block-diagonal",
    "lora_bias": "its B has a bias", "fan_in_fan_out": "its W is transposed",
    "rank_pattern": "some layers have another r", "alpha_pattern": "some layers have another alpha",
    "layers_to_transform": "only some layers are adapted",
    "layer_replication": "layers are repeated",
    "modules_to_save": "whole modules are replaced", "exclude_modules": "some modules are left out",
    "target_parameters": "parameters outside linear layers are adapted",
    "trainable_token_indices": "rows of the embeddings are replaced",
    "ensure_weight_tying": "tied layers share an adapter",
    "alora_invocation_tokens": "it acts only behind certain tokens",
    "arrow_config": "the input chooses among adapters",
    "kasa_config": "it changes the base's weights", "velora_config": "its gradients are others",
    "monteclora_config": "its weights are drawn anew",
    "megatron_config": "it belongs to Megatron's layers"}


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
    the rest of `model` and returns it. An lm_head that is tied to the embeddings gets a weight of
    its own. ValueError lists the linear layers if none is named so."""
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
    users = Counter(id(parameter) for module in model.modules()
                    for parameter in module._parameters.values())
    for name, base in found.items():
        if users[id(base.weight)] > 1:     # tied to another layer, which a merge would change, too
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
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
    """peft's adapter_config.json -> LoraConfig. ValueError where it asks for another formula, or
    holds a setting that is not known here and not unset (null, false or empty)."""
    theirs = hub.read_object(path)
    odd = {key: UNSUPPORTED.get(key, "not known here, it may change what is computed")
           for key, value in theirs.items() if key not in HARMLESS | READ and not (
               value is None or value is False or value in ("", [], {}))}
    start, kind = theirs.get("init_lora_weights"), theirs.get("peft_type", "LORA")
    if (start.lower() if isinstance(start, str) else start) not in BEGINNINGS:
        odd["init_lora_weights"] = "it has moved a part of the base's weights into the adapter"
    if kind != "LORA":
        odd["peft_type"] = "another method"
    if theirs.get("bias", "none") != "none":
        odd["bias"] = "it trains biases"
    targets = theirs.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(
            isinstance(name, str) and name for name in targets):
        odd["target_modules"] = "wanted a list of the names of linear layers"
    if odd:
        texts = [f"{key} {theirs.get(key)!r:.80} ({why})" for key, why in odd.items()]
        raise ValueError(f"{path}: unsupported {', '.join(texts)}; wanted plain LoRA, W + alpha/r "
                         "B A in all layers of these names; train or export it so")
    if lacking := [key for key in ("r", "lora_alpha") if theirs.get(key) is None]:
        raise ValueError(f"{path}: no {', '.join(lacking)}; save the adapter again")
    return hub.make_config(LoraConfig, {"lora_dropout": 0.0} | theirs, {
        "r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}, path, zero=("dropout",),
        target_modules=tuple(sorted(targets)))


def read(folder):
    """A peft folder -> its LoraConfig and {name: Stored}; no numbers are read yet."""
    folder = Path(folder)
    config, path = read_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; convert adapter_model.bin to safetensors once")
    theirs = hub.stored_tensors(path)
    if odd := [f"{name} {list(t.shape)}" for name, t in theirs.items()
               if ".lora_A." in name and t.shape[:1] != (config.r,)]:
        raise ValueError(f"{path}: r is {config.r} in adapter_config.json, but there are "
                         f"{hub.listed(odd, 3)}; both files must be of one adapter")
    return config, theirs


@torch.no_grad()
def load(model, folder):
    """Reads a peft folder into `model`; adapters are injected first if there are none. Raises
    ValueError that lists what is missing, unknown or of another shape."""
    path, (config, theirs) = Path(folder) / "adapter_model.safetensors", read(folder)
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
    problems = [f"{label}: {hub.listed(names, 8)}" for label, names in [
        ("missing", wanted.keys() - theirs), ("unknown", theirs.keys() - wanted),
        ("wrong shape", [n for n in wanted.keys() & theirs if wanted[n].shape != theirs[n].shape]),
        ("wrong dtype", [n for n, t in theirs.items()
                         if not hub.same_kind(t.dtype, torch.float32)])] if names]
    if problems:
        raise ValueError(f"{path}: adapters do not fit {type(model).__name__}; "
                         + "; ".join(problems))
    for name, parameter in wanted.items():
        hub.fill(parameter, theirs[name])
    return model
