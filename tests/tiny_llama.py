"""A tiny LLaMA or Qwen of transformers with random weights; configs of every RoPE scaling."""

import torch
from parity import randomise

VOCAB = 37
EOS = 2


def tiny_oracle(seed=0, kv_heads=6, family="Llama", **settings):
    """heads != layers, heads * head_dim != width, ffn and vocabulary no multiple of 8.  family:
    "Llama", "Qwen2" or "Qwen3"."""
    import transformers
    settings = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 70, "head_dim": 10,
                "num_hidden_layers": 2, "num_attention_heads": 6, "rms_norm_eps": 1e-6,
                "num_key_value_heads": kv_heads, "pad_token_id": 0,
                "attn_implementation": "eager"} | settings
    return randomise(getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**settings)), seed).eval()


def speak(oracle):
    """A sharper head, in which the end token is likely: answers of many lengths."""
    oracle.lm_head.weight.data.mul_(2)
    oracle.lm_head.weight.data[EOS] *= 4
    return oracle


def some_ids(rows=2, length=9, seed=0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def theirs(oracle, ids=None, mask=None, **settings):
    """transformers' new ids, without the end token and what follows it."""
    out = oracle.generate(ids, attention_mask=None if mask is None else mask.long(),
                          do_sample=False, eos_token_id=EOS, pad_token_id=0, **settings)
    rows = (out if ids is None else out[:, ids.shape[1]:]).tolist()
    return [row[:row.index(EOS)] if EOS in row else row for row in rows]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ROPES = {             # every type, with and without its optional fields
    "default": {"rope_type": "default"}, "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64}, "llama3, no original": LLAMA3,
    "yarn": YARN | {"original_max_position_embeddings": 8}, "yarn, no original": YARN,
    "yarn, factor null": YARN | {"original_max_position_embeddings": 8, "factor": None},
    "yarn, attention": YARN | {"attention_factor": 1.3},
    "yarn, betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn, half of mscale": YARN | {"mscale": 0.7}}
SIZES = {"tiny": {"hidden_size": 36, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "head_dim": 10, "max_position_embeddings": 16},
         "8b": {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
                "max_position_embeddings": 8192}}
