"""The visual and audio encoders at the full width of the published models, a few layers deep,
against transformers in fp32 and bf16.  (LLaMA: tests/test_llama.py; Whisper's
decoder: tests/baselines/test_whisper.py.)  What a narrow model hides shows here: head sizes,
scales, rounding."""

import pytest
import torch
import transformers
from parity import check, randomise
from transformers.initialization import no_init_weights

from vit_qformer import VisualEncoder
from whisper_enc import WhisperEncoder

LAYERS, FRAMES = 2, 2
SIDE = 112                                 # pixels: 65 patch tokens instead of 257, less work


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """EVA ViT-g and Q-Former, 2 layers of each, as an InstructBLIP folder."""
    root = tmp_path_factory.mktemp("blip")
    config = transformers.InstructBlipConfig(
        vision_config={"num_hidden_layers": LAYERS, "image_size": SIDE},
        qformer_config={"num_hidden_layers": LAYERS, "vocab_size": 1001},
        text_config={"model_type": "llama", "vocab_size": 40, "hidden_size": 16,
                     "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        image_token_index=39)
    with no_init_weights():
        oracle = transformers.InstructBlipForConditionalGeneration(config)
    randomise(oracle).eval().save_pretrained(root)
    return oracle, root


def cosine(ours, theirs):
    """Smallest cosine of a token with its counterpart."""
    return torch.cosine_similarity(ours.float(), theirs.float(), dim=-1).min().item()


@torch.no_grad()
def test_vit_and_qformer(blip):
    oracle, root = blip
    g = torch.Generator().manual_seed(1)
    pixels = torch.randn(FRAMES, 3, SIDE, SIDE, generator=g)
    ids = torch.randint(0, 1001, (FRAMES, 9), generator=g)
    mask = torch.ones(FRAMES, 9, dtype=torch.bool)
    mask[1, 6:] = False
    image = oracle.vision_model(pixels).last_hidden_state
    assert image.shape == (FRAMES, (SIDE // 14) ** 2 + 1, 1408)
    queries = oracle.qformer(
        input_ids=ids, attention_mask=torch.cat([torch.ones(FRAMES, 32), mask.long()], 1),
        query_embeds=oracle.query_tokens.expand(FRAMES, -1, -1),
        encoder_hidden_states=image)[0][:, :32]
    ours = VisualEncoder.from_pretrained(root)
    seen = ours.encode_image(pixels)
    check("ViT-g, fp32", seen, image, 1e-4, 1e-5)
    check("Q-Former, fp32", ours.query(seen, ids, mask), queries, 1e-4, 1e-5)
    half = VisualEncoder.from_pretrained(root, dtype=torch.bfloat16)
    seen = half.encode_image(pixels)
    assert seen.dtype == torch.bfloat16 and cosine(seen, image) > 0.999
    check("ViT-g, bf16 against fp32", seen, image, 1.0, 3e-2)
    check("Q-Former, bf16 against fp32", half.query(seen, ids, mask), queries, 1.0, 3e-2)


@torch.no_grad()
def test_whisper(tmp_path):
    config = transformers.WhisperConfig(
        vocab_size=40, d_model=1280, encoder_layers=LAYERS, encoder_attention_heads=20,
        encoder_ffn_dim=5120, decoder_layers=1, decoder_attention_heads=20, decoder_ffn_dim=16,
        max_source_positions=100, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1)                            # 2 s instead of 30: less work
    with no_init_weights():
        oracle = transformers.WhisperForConditionalGeneration(config)
    randomise(oracle).eval().save_pretrained(tmp_path)
    mel = torch.randn(1, 80, 200, generator=torch.Generator().manual_seed(0))
    wanted = oracle.model.encoder(mel).last_hidden_state
    assert wanted.shape == (1, 100, 1280)
    check("Whisper large, fp32", WhisperEncoder.from_pretrained(tmp_path)(mel), wanted, 1e-4, 1e-5)
    heard = WhisperEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16)(mel)
    assert heard.dtype == torch.bfloat16 and cosine(heard, wanted) > 0.99
    check("Whisper large, bf16 against fp32", heard, wanted, 1.0, 3e-2)
