"""vit.py against transformers' SigLIP and DINOv2 on tiny random weights, its pictures against their
processors, its names against the published files' names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from parity import check, randomise
from PIL import Image

from favor import Favor, preset
from runtime import hub
from tools.memory import random_part
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


def test_settings_of_the_image_processor(tmp_path):
    """In either of its files, as transformers 5 writes the second one; a silent file means what
    transformers takes then, and DINOv2's crop is left out."""
    siglip().save_pretrained(tmp_path)
    assert read_config(tmp_path).resample == "bilinear"                   # SigLIP 2's, without one
    own = {"image_processor_type": "SiglipImageProcessorFast", "do_resize": True, "resample": 3,
           "size": {"height": 64, "width": 64}, "rescale_factor": 0.00392156862745098,
           "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 0.5, 0.25]}
    first, second = (tmp_path / f"{name}_config.json" for name in ("preprocessor", "processor"))
    hub.write_json(second, {"image_processor": own})
    read = read_config(tmp_path)
    assert (read.resample, read.mean, read.std) == ("bicubic", (0.1, 0.2, 0.3), (1, 0.5, 0.25))
    hub.write_json(first, {"image_mean": [0.1, 0.2, 0.3]})
    assert read_config(tmp_path) == read
    hub.write_json(first, {"resample": 2})
    with pytest.raises(ValueError, match="processor_config.json: resample 3, but .*prepro.* has 2"):
        read_config(tmp_path)
    second.unlink()
    hub.write_json(first, {})
    assert read_config(tmp_path).resample == "bilinear"                   # nothing is in it
    hub.write_json(first, {"do_resize": True})
    assert read_config(tmp_path).resample == "bicubic"
    dinov2().save_pretrained(tmp_path)
    transformers.BitImageProcessorPil(size={"shortest_edge": 256}, crop_size=224, resample=3
                                      ).save_pretrained(tmp_path)
    read = read_config(tmp_path)
    assert (read.image_size, read.resample) == (224, "bicubic")
    assert read.mean == pytest.approx(hub.read_json(first)["image_mean"])


@pytest.mark.parametrize("key, value", [
    ("do_resize", False), ("rescale_factor", 1 / 127.5), ("do_normalize", False),
    ("size", {"height": 32, "width": 32}), ("do_center_crop", True), ("resample", 0),
    ("resample", [2]), ("image_mean", [0.5, 0.5]), ("image_std", [0.5, 0, 0.5]),
    ("image_mean", [123.6, 116.3, 103.5]), ("image_std", "0.5"), ("do_pad", True),
    ("image_processor_type", "Siglip2ImageProcessor")])
def test_processors_that_are_not_built_are_named(key, value, tmp_path):
    hub.write_json(tmp_path / "config.json", {
        "model_type": "siglip_vision_model", "image_size": 64, "patch_size": 8})
    hub.write_json(tmp_path / "preprocessor_config.json", {key: value})
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: {key} is .*; only .* is bu"):
        read_config(tmp_path)


def test_the_other_kind_of_encoder_is_told_from_visual_grid(tmp_path, small_parts):
    """Both ways, with and without random weights; by a folder and by the name of a repo."""
    siglip().save_pretrained(tmp_path)
    other = str(small_parts / "instructblip")
    for load in (None, random_part):
        with pytest.raises(ValueError, match="'siglip_vision_model'; wanted 'instr.*--visual-grid"):
            Favor.from_config(preset("tiny", visual=str(tmp_path)), load=load)
        with pytest.raises(ValueError, match="'instructblip'; wanted 'siglip'.*--visual-grid 0"):
            Favor.from_config(preset("tiny", visual=other, visual_grid=2), load=load)
    for name, source, word in (("7b", "google/siglip2-base-patch16-224", "--visual-grid 7"),
                               ("small", "Salesforce/instructblip-vicuna-7b", "--visual-grid 0")):
        with pytest.raises(ValueError, match=f"{source}: its sizes are not known.*{word}"):
            Favor.from_config(preset(name, visual=source), None, "meta", load=random_part)


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
                         ({"mlp_ratio": 3}, "mlp_ratio is 3"),
                         ({"hidden_size": 50}, "width 50, 4 heads"),
                         ({"num_hidden_layers": 0}, "num_hidden_layers is 0; wanted a whole"),
                         ({"hidden_size": 2 ** 40}, "hidden_size is 1099511627776; wanted"),
                         ({"image_size": 7}, "patch_size 14 exceeds the image_size 7"),
                         ({"model_type": None}, "model_type is None"),
                         ({"model_type": "clip"}, "model_type is 'clip'")):
        config = {"model_type": "dinov2", **SIZES, **change}
        hub.write_json(tmp_path / "config.json", config)
        with pytest.raises(ValueError, match=word):
            read_config(tmp_path)
    hub.write_json(tmp_path / "config.json", SIZES)
    with pytest.raises(ValueError, match="no model_type; wanted siglip"):
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
