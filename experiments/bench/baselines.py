"""The baselines of the benchmark: modules of transformers and peft with the same weights as ours.

     sizes --> transformers' module with random weights --its tensors, shared--> ours
Both sides share the storage of their weights, so the weights are equal and take the memory of one
model. These libraries serve as references in tests and benchmarks only.

Public: needed, vit_pair, whisper_pair, llama, lora_pair, LORA."""

import importlib
from contextlib import contextmanager

import torch
from torch import nn

import lora
from experiments.bench.measure import CannotRun
from llama import Llama
from vit_qformer import ViT
from whisper_enc import WhisperEncoder

# As in the released adapters, but without dropout, or the two sides could not be compared.
LORA = lora.LoraConfig(32, 32, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj"))


def needed(name):
    """A library of the extra `dev`, or CannotRun."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise CannotRun(f'{name} is missing ({error}): pip install -e ".[dev]"') from None


@contextmanager
def made_in(dtype, device):
    """Modules that are built inside have this dtype and device. A later .to(bfloat16) would also
    round LLaMA's rotary frequencies."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def sharing(cls, config, baseline):
    """Our module on the baseline's tensors, frozen, in eval mode; every name must match."""
    with torch.device("meta"):
        ours = cls(config)
    ours.load_state_dict(baseline.state_dict(), assign=True)
    return ours.eval().requires_grad_(False)


def vit_pair(config, dtype, device, attention="sdpa"):
    """(ours, InstructBlipVisionModel)."""
    hf = needed("transformers")
    with made_in(dtype, device):
        baseline = hf.InstructBlipVisionModel(hf.InstructBlipVisionConfig(
            hidden_size=config.width, intermediate_size=config.ffn, hidden_act="gelu",
            num_hidden_layers=config.layers, num_attention_heads=config.heads,
            image_size=config.image_size, patch_size=config.patch_size,
            layer_norm_eps=config.eps, attn_implementation=attention))
    return sharing(ViT, config, baseline), baseline.eval().requires_grad_(False)


def whisper_pair(config, dtype, device, attention="sdpa"):
    """(ours, transformers' WhisperEncoder)."""
    hf = needed("transformers")
    with made_in(dtype, device):
        baseline = needed("transformers.models.whisper.modeling_whisper").WhisperEncoder(
            hf.WhisperConfig(
                d_model=config.width, encoder_layers=config.layers, num_mel_bins=config.n_mels,
                encoder_attention_heads=config.heads, encoder_ffn_dim=config.ffn,
                max_source_positions=config.max_source_positions, attn_implementation=attention))
    return sharing(WhisperEncoder, config, baseline), baseline.eval().requires_grad_(False)


def llama(config, dtype, device, attention="sdpa"):
    """(ours, LlamaForCausalLM), which never ends an answer on its own."""
    hf = needed("transformers")
    settings = config.to_dict() | {"attn_implementation": attention, "pad_token_id": 0}
    for name in ("architectures", "model_type", "rope_scaling", "rope_theta"):
        settings.pop(name)
    with made_in(dtype, device):
        baseline = hf.LlamaForCausalLM(hf.LlamaConfig(**settings))
    baseline.generation_config.eos_token_id = None
    return sharing(Llama, config, baseline), baseline.eval().requires_grad_(False)


def lora_pair(config, dtype, device, settings=LORA):
    """(ours with LoRA, peft's model), both in training mode, their adapters equal and not zero."""
    peft = needed("peft")
    ours, base = llama(config, dtype, device)
    baseline = peft.get_peft_model(base, peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules), task_type="CAUSAL_LM"))
    lora.inject(ours, settings)
    theirs = {name.replace(".default.", "."): p for name, p in baseline.named_parameters()}
    with torch.no_grad():
        for name, mine in lora.adapter_tensors(ours).items():
            nn.init.normal_(theirs[name], std=0.02)
            mine.copy_(theirs[name])
    return ours.train(), baseline.train()
