"""vit.py against transformers' SigLIP and DINOv2 on tiny random weights, its pictures against their
processors, its names against the published files' names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import check, randomise
from PIL import Image

from vit import GridEncoder, ViTConfig, read_config

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def siglip(image_size=64):
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(
        **SIZES, intermediate_size=56, image_size=image_size, patch_size=8))


def siglip_with_text():
    vision = siglip().config.to_dict()
    return transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=vision, text_config={
            "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
            "intermediate_size": 8, "vocab_size": 30}))


def dinov2(**more):
    return transformers.Dinov2Model(transformers.Dinov2Config(
        **SIZES, image_size=126, patch_size=14, **more))


def dinov2_with_registers(**more):
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(
        **SIZES, image_size=126, patch_size=14, num_register_tokens=3, **more))


MODELS = {"siglip": siglip, "siglip, whole": siglip_with_text, "dinov2": dinov2,
          "dinov2, own size": lambda: transformers.Dinov2Model(transformers.Dinov2Config(
              **SIZES, image_size=224, patch_size=14)),
          "dinov2, no bias": lambda: dinov2(qkv_bias=False),
          "registers": dinov2_with_registers}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_patches_and_grid(name, tmp_path):
    oracle = randomise(MODELS[name]()).eval()
    oracle.save_pretrained(tmp_path)
    ours = GridEncoder.from_pretrained(tmp_path, grid=5)
    size = ours.image_size
    assert size == (64 if "siglip" in name else 224)
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    part = getattr(oracle, "vision_model", oracle)
    wanted = part(pixel_values=pixels).last_hidden_state[:, -ours.config.side ** 2:]
    check(f"{name}, patches", ours.patches(pixels), wanted)
    side = ours.config.side
    cells = [range(i * side // 5, -(-(i + 1) * side // 5)) for i in range(5)]
    grid = wanted.unflatten(1, (side, side))
    means = torch.stack([grid[:, rows.start:rows.stop, columns.start:columns.stop].mean((1, 2))
                         for rows in cells for columns in cells], dim=1)
    check(f"{name}, grid", ours.encode_image(pixels), means)
    assert ours.query(means, torch.zeros(4)) is means and ours.reads_question is False


@pytest.mark.parametrize("resample", (2, 3))
@pytest.mark.parametrize("shape", ((360, 640), (97, 131), (224, 224), (30, 20)))
def test_pictures_as_the_processor(resample, shape, tmp_path):
    processor = transformers.SiglipImageProcessorPil(
        size={"height": 64, "width": 64}, resample=resample, image_mean=[0.5, 0.4, 0.3],
        image_std=[0.5, 0.25, 0.2])
    siglip().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.resample == {2: "bilinear", 3: "bicubic"}[resample]
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    wanted = processor(Image.fromarray(frame), return_tensors="pt").pixel_values
    ours = GridEncoder(config, 4).to_pixels(torch.from_numpy(frame).permute(2, 0, 1)[None])
    check(f"pixels {shape}", ours, wanted, max_abs=2.5 / 255 / 0.2, rel_rms=5e-3)


def test_names_and_shapes_of_the_published_files():
    with torch.device("meta"):
        large = GridEncoder(ViTConfig(kind="dinov2", width=384, heads=6, ffn=1536, patch_size=14,
                                      trained_size=518))
        ours = GridEncoder()
    assert sum(p.numel() for p in ours.parameters()) == 92_884_224 - 7_087_104   # without its head
    assert sum(p.numel() for p in large.parameters()) == 22_056_576 - 384        # no mask token


def test_what_is_not_built_is_named(tmp_path):
    for change, word in (({"hidden_act": "relu"}, "hidden_act is 'relu'"),
                         ({"use_swiglu_ffn": True}, "use_swiglu_ffn is True"),
                         ({"model_type": "clip"}, "model_type is 'clip'")):
        config = {"model_type": "dinov2", **SIZES, **change}
        (tmp_path / "config.json").write_text(__import__("json").dumps(config))
        with pytest.raises(ValueError, match=word):
            read_config(tmp_path)
    with pytest.raises(ValueError, match="visual_grid is 17; wanted 1 to 14"):
        GridEncoder(ViTConfig(layers=1), 17)


@torch.no_grad()
def test_frames_in_parts_are_the_same():
    encoder = randomise(GridEncoder(ViTConfig(width=24, layers=1, heads=2, ffn=8, image_size=32,
                                              trained_size=32, patch_size=16), 2)).eval()
    pixels = torch.randn(130, 3, 32, 32)
    whole = F.adaptive_avg_pool2d(encoder.patches(pixels).transpose(1, 2).unflatten(2, (2, 2)), 2)
    torch.testing.assert_close(encoder.encode_image(pixels),
                               whole.flatten(2).transpose(1, 2), atol=1e-6, rtol=1e-5)
