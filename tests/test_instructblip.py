"""InstructBLIP end to end from our parts against transformers' (tiny, every parameter random):
     pixels --VisualEncoder--> queries (B,V,768) --language_projection--> (B,V,D)
       ++ embedded prompt (B,T,D) --Llama--> logits (B,V+T,vocab)
   FAVOR takes three of its parts, so this is the proof that they are read right together."""

import pytest
import torch
from parity import check, randomise
from torch import nn

from llama import Llama
from runtime import hub
from vit_qformer import VisualEncoder

QUERIES, VOCAB, IMAGE = 5, 43, 42            # the image token is the last id, as in the oracle


@pytest.fixture(scope="module")
def oracle():
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
    # Widths all different, heads != layers, vocabularies no multiple of 8.
    return randomise(InstructBlipForConditionalGeneration(InstructBlipConfig(
        vision_config={"hidden_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
                       "intermediate_size": 50, "image_size": 28, "patch_size": 14},
        qformer_config={"hidden_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3,
                        "intermediate_size": 52, "encoder_hidden_size": 44, "vocab_size": 31,
                        "cross_attention_frequency": 2},
        text_config={"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 70,
                     "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        num_query_tokens=QUERIES, image_token_index=IMAGE))).eval()


@pytest.fixture(scope="module")
def parts(oracle, tmp_path_factory):
    """Our (encoder, projection, llm) of the oracle's folder."""
    root = tmp_path_factory.mktemp("instructblip")
    oracle.save_pretrained(root)
    weights = {name: read() for name, read in hub.open_tensors(root).items()
               if name.startswith("language_projection.")}
    projection = nn.Linear(36, 48)
    projection.load_state_dict({n.rpartition(".")[2]: t for n, t in weights.items()})
    return VisualEncoder.from_pretrained(root), projection, Llama.from_pretrained(root)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(1, 31, (2, 7), generator=generator)
    question_mask = torch.ones(2, 7, dtype=torch.bool)
    question[1, 5:], question_mask[1, 5:] = 0, False
    prompt = torch.randint(3, IMAGE, (2, 6), generator=generator)
    prompt[:, 0] = 2                         # InstructBLIP's first token is </s>, not <s>
    return torch.randn(2, 3, 28, 28, generator=generator), question, question_mask, prompt


def embedded(parts, batch):
    """(B,V+T,D): the projected queries before the prompt."""
    encoder, projection, llm = parts
    pixels, question, question_mask, prompt = batch
    queries = projection(encoder(pixels, question, question_mask))             # (B,V,D)
    return torch.cat([queries, llm.embed(prompt)], dim=1)


def oracle_inputs(batch):
    """transformers 5 scatters the queries into image tokens, which stand before the prompt."""
    pixels, question, question_mask, prompt = batch
    ids = torch.cat([torch.full((2, QUERIES), IMAGE), prompt], dim=1)
    return {"pixel_values": pixels, "qformer_input_ids": question,
            "qformer_attention_mask": question_mask.long(), "input_ids": ids,
            "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def test_logits(oracle, parts, batch):
    wanted = oracle(**oracle_inputs(batch))
    encoder, projection, llm = parts
    queries = encoder(*batch[:3])
    check("queries", queries, wanted.qformer_outputs.last_hidden_state[:, :QUERIES])
    check("projected", projection(queries), oracle.language_projection(
        wanted.qformer_outputs.last_hidden_state[:, :QUERIES]))
    check("logits", llm(embeds=embedded(parts, batch)), wanted.logits)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_answers(oracle, parts, batch, settings):
    ours = parts[2].generate(embeds=embedded(parts, batch), max_new_tokens=8, eos_id=2, **settings)
    out = oracle.generate(**oracle_inputs(batch), max_new_tokens=8, do_sample=False,
                          eos_token_id=2, pad_token_id=0, **settings)
    theirs = [row[QUERIES + 6:] for row in out.tolist()]     # after image tokens and prompt
    assert ours == [row[:row.index(2)] if 2 in row else row for row in theirs]


@torch.no_grad()
def test_the_question_and_the_picture_matter(parts, batch):
    pixels, question, question_mask, prompt = batch
    llm = parts[2]
    logits = llm(embeds=embedded(parts, batch))
    asked = question.clone()
    asked[:, 2] = (asked[:, 2] + 1) % 31
    for other in [(pixels.flip(0), question, question_mask, prompt),
                  (pixels, asked, question_mask, prompt)]:
        assert (llm(embeds=embedded(parts, other)) - logits).abs().max() > 1e-4
