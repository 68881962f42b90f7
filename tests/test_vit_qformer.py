"""vit_qformer.py against transformers' InstructBLIP on tiny random weights, against BertTokenizer
and against PIL; and its own promises."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from parity import check, randomise
from PIL import Image

import vit_qformer
from runtime import hub
from vit_qformer import (
    CLIP_MEAN,
    CLIP_STD,
    QFormerConfig,
    QFormerTokenizer,
    VisualEncoder,
    ViTConfig,
    normalise,
    preprocess,
    resize,
)

# heads != layers, three widths, odd vocabulary; 42/14 = 3 -> 9 patches + CLS; 7 queries.
V, WORDS = 7, 61
TINY = {
    "vision_config": {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3,
                      "num_attention_heads": 4, "image_size": 42, "patch_size": 14},
    "qformer_config": {"vocab_size": WORDS, "hidden_size": 30, "num_hidden_layers": 4,
                       "num_attention_heads": 5, "intermediate_size": 44,
                       "max_position_embeddings": 40},
    "text_config": {"model_type": "llama", "vocab_size": 67, "hidden_size": 32,
                    "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
    "num_query_tokens": V, "image_token_index": 66, "attn_implementation": "eager"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The oracle, our encoder from its folder (a whole InstructBLIP), and the folder."""
    root = tmp_path_factory.mktemp("instructblip")
    config = transformers.InstructBlipConfig(**TINY)
    oracle = randomise(transformers.InstructBlipForConditionalGeneration(config)).eval()
    oracle.save_pretrained(root)
    return SimpleNamespace(oracle=oracle, root=root, ours=VisualEncoder.from_pretrained(root))


def oracle_query(tiny, image, ids=None, mask=None):
    """The oracle's Q-Former on image features (F,P,D) and text (F,T) -> (F,V,D)."""
    queries, all_mask = tiny.oracle.query_tokens.expand(len(image), -1, -1), None
    if ids is not None:
        mask = torch.ones_like(ids) if mask is None else mask.long()
        all_mask = torch.cat((torch.ones(len(image), V, dtype=torch.long), mask), dim=1)
    return tiny.oracle.qformer(input_ids=ids, attention_mask=all_mask, query_embeds=queries,
                               encoder_hidden_states=image)[0][:, :V]


def outputs_of(modules):
    """A list that fills with the outputs of `modules` in the order in which they run."""
    seen = []
    for module in modules:
        module.register_forward_hook(
            lambda m, i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    return seen


# ---- ViT and Q-Former ---------------------------------------------------------------------------

def test_vit_stage_by_stage(tiny):
    pixels, hf, ours = torch.randn(3, 3, 42, 42), tiny.oracle.vision_model, tiny.ours.vit
    stages = ["embeddings", *(f"block {i}" for i in range(3)), "final norm"]
    seen = outputs_of([ours.embeddings, *ours.encoder.layers, ours.post_layernorm])
    wanted = outputs_of([hf.embeddings, *hf.encoder.layers])
    final = hf(pixels).last_hidden_state
    out = tiny.ours.encode_image(pixels)
    for stage, a, b in zip(stages, seen, [*wanted, final], strict=True):
        check(f"ViT {stage}", a, b)
    check("encode_image", out, final)


def test_qformer_stage_by_stage(tiny):
    """Query half and text half of every layer; the text half of the last one cannot matter."""
    image, ids = torch.randn(3, 10, 48), torch.randint(0, WORDS, (3, 9))
    hf, ours = tiny.oracle.qformer, tiny.ours.qformer
    seen = outputs_of([ours.embeddings, *ours.encoder.layer])
    wanted = outputs_of([hf.embeddings, *hf.encoder.layer])
    tiny.ours.query(image, ids)
    oracle_query(tiny, image, ids)
    for i, (a, b) in enumerate(zip(seen, wanted, strict=True)):
        check(f"Q-Former stage {i} queries", a[:, :V], b[:, :V])
        check(f"Q-Former stage {i} text", a[:, V:], b[:, V:])


def test_query_without_text(tiny):
    image = torch.randn(3, 10, 48)
    check("Q-Former without text", tiny.ours.query(image), oracle_query(tiny, image))


@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_query_with_text(tiny, n_tokens):
    image, ids = torch.randn(3, 10, 48), torch.randint(0, WORDS, (3, n_tokens))
    check(f"Q-Former, {n_tokens} tokens", tiny.ours.query(image, ids),
          oracle_query(tiny, image, ids))


def test_query_with_padded_text(tiny):
    image, ids = torch.randn(3, 10, 48), torch.randint(0, WORDS, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    out = tiny.ours.query(image, ids, mask)
    check("Q-Former with padding", out, oracle_query(tiny, image, ids, mask))

    junk = torch.where(mask, ids, (ids + 1) % WORDS)
    assert torch.equal(tiny.ours.query(image, junk, mask), out)
    check("padding cut off", tiny.ours.query(image[1:2], ids[1:2, :4]), out[1:2])

    changed = ids.clone()
    changed[1, 3] = (ids[1, 3] + 1) % WORDS                     # the last unmasked token of frame 1
    moved = (tiny.ours.query(image, changed, mask) - out).abs().amax((1, 2))
    assert moved[1] > 1e-3 and moved[0] == moved[2] == 0


def test_one_text_for_all_frames(tiny):
    pixels, ids = torch.randn(3, 3, 42, 42), torch.randint(0, WORDS, (6,))
    mask = torch.tensor([True] * 5 + [False])
    out = tiny.ours(pixels, ids, mask)
    assert out.shape == (3, V, 30)
    for text, shown in [(ids[None], mask[None]), (ids.expand(3, -1), mask.expand(3, -1))]:
        assert torch.equal(tiny.ours(pixels, text, shown), out)
    image = tiny.oracle.vision_model(pixels).last_hidden_state
    check("frames and text", out, oracle_query(tiny, image, ids.expand(3, -1), mask.expand(3, -1)))


@pytest.mark.parametrize("at_once", [2, 5])
def test_chunks_of_frames_change_nothing(tiny, monkeypatch, at_once):
    pixels, ids = torch.randn(5, 3, 42, 42), torch.randint(0, WORDS, (5, 6))
    mask = torch.arange(6) < torch.tensor([[6], [2], [3], [1], [4]])
    whole = tiny.ours(pixels, ids, mask)
    monkeypatch.setattr(vit_qformer, "FRAMES_AT_ONCE", at_once)
    batches = outputs_of([tiny.ours.vit, tiny.ours.qformer])
    check(f"{at_once} frames at once", tiny.ours(pixels, ids, mask), whole)
    assert max(len(x) for x in batches) == at_once
    assert tiny.ours(pixels[:0], ids[:1]).shape == (0, V, 30)


def test_bf16(tiny):
    pixels, ids = torch.randn(3, 3, 42, 42), torch.randint(0, WORDS, (3, 9))
    ours = VisualEncoder.from_pretrained(tiny.root, dtype=torch.bfloat16)
    image, loose = tiny.ours.encode_image(pixels), {"max_abs": 1e9, "rel_rms": 2e-2}
    assert ours(pixels, ids).dtype == torch.bfloat16
    check("ViT bf16", ours.encode_image(pixels), image, **loose)
    check("Q-Former bf16", ours.query(image, ids), tiny.ours.query(image, ids), **loose)


def test_bad_shapes_are_refused(tiny):
    image, ids = torch.randn(3, 10, 48), torch.randint(0, WORDS, (3, 9))
    with pytest.raises(ValueError, match=r"wanted \(F,3,42,42\)"):
        tiny.ours.encode_image(torch.randn(1, 3, 28, 28))
    for bad_ids in (ids[:2], torch.zeros(41, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"\(3,T\) with T <= 40"):
            tiny.ours.query(image, bad_ids)
    for bad_mask in (torch.ones_like(ids), torch.ones(1, 9, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"wanted bool \(3, 9\)"):
            tiny.ours.query(image, ids, bad_mask)
    with pytest.raises(ValueError, match="text_mask without text_ids"):
        tiny.ours.query(image, text_mask=torch.ones(9, dtype=torch.bool))
    with pytest.raises(ValueError, match="encoder_width=48"):
        VisualEncoder(ViTConfig(width=48, layers=1), QFormerConfig(layers=1))


# ---- files --------------------------------------------------------------------------------------

def test_pruned_config_takes_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({
        "vision_config": {"model_type": "instructblip_vision_model"},
        "qformer_config": {"model_type": "instructblip_qformer", "vocab_size": 30523}}))
    assert vit_qformer.read_config(tmp_path) == (ViTConfig(), QFormerConfig(), 32)
    assert ViTConfig().n_patches == 256
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_size": 48}}')
    vit, qformer, _ = vit_qformer.read_config(tmp_path)
    assert vit.width == qformer.encoder_width == 48


@pytest.mark.parametrize("change", [
    {"image_mean": [0.5, 0.5, 0.5]}, {"image_std": [1, 1, 1]}, {"image_mean": 0.5},
    {"size": {"height": 384, "width": 384}}, {"size": {"shortest_edge": 42}}, {"size": 384},
    {"resample": 2}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}, {"do_resize": False},
    {"do_normalize": False}, {"do_center_crop": True}, {"do_pad": True},
    {"image_processor_type": "CLIPImageProcessor"}])
def test_image_processors_that_are_not_built_are_named(tiny, tmp_path, change):
    """transformers' defaults pass where the size is vision_config's; one change is refused, in
    either file, and so are two files that contradict each other."""
    shutil.copy(tiny.root / "config.json", tmp_path)
    good = transformers.BlipImageProcessor(size={"height": 42, "width": 42}).to_dict()
    good |= {"image_processor_type": "BlipImageProcessorFast"}
    hub.write_json(tmp_path / "preprocessor_config.json", good)
    inside = {"image_processor": good, "num_query_tokens": V}
    hub.write_json(tmp_path / "processor_config.json", inside)
    assert vit_qformer.read_config(tmp_path)[0].image_size == 42
    hub.write_json(tmp_path / "processor_config.json", {"image_processor": good | change})
    with pytest.raises(ValueError, match=rf"/processor_config.json: {list(change)[0]} "):
        vit_qformer.read_config(tmp_path)
    hub.write_json(tmp_path / "processor_config.json", {"num_query_tokens": V + 1})
    with pytest.raises(ValueError, match="processor_config.json: num_query_tokens is another"):
        vit_qformer.read_config(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    hub.write_json(tmp_path / "preprocessor_config.json", good | change)
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: {list(change)[0]} is"):
        vit_qformer.read_config(tmp_path)


@pytest.mark.parametrize("change", [
    {"size": 42}, {"image_processor_type": "BlipImageProcessorFast"}, {"do_pad": None},
    {"image_processor_type": "BlipImageProcessorPil"}, {"rescale_factor": 0.003921568859368563}])
def test_versions_of_transformers_that_write_the_same_differently(tiny, tmp_path, change):
    """The published file, and beside it that of a processor which another version saved there."""
    shutil.copy(tiny.root / "config.json", tmp_path)
    good = transformers.BlipImageProcessor(size={"height": 42, "width": 42}).to_dict()
    hub.write_json(tmp_path / "preprocessor_config.json", good | change)
    hub.write_json(tmp_path / "processor_config.json",
                   {"image_processor": good, "num_query_tokens": None})
    assert vit_qformer.read_config(tmp_path)[0].image_size == 42


@pytest.mark.parametrize("part, key, value", [
    ("vision_config", "num_hidden_layers", 10 ** 6), ("vision_config", "hidden_size", "48"),
    ("vision_config", "num_attention_heads", 0), ("vision_config", "num_attention_heads", 5),
    ("vision_config", "patch_size", 100), ("vision_config", "layer_norm_eps", float("nan")),
    ("qformer_config", "num_hidden_layers", -1), ("qformer_config", "vocab_size", 2.5),
    ("qformer_config", "encoder_hidden_size", 64), ("qformer_config", "hidden_size", [30]),
    ("qformer_config", "cross_attention_frequency", 0), (None, "num_query_tokens", True),
    (None, "num_query_tokens", 10 ** 9), (None, "vision_config", 0), (None, "qformer_config", [])])
def test_absurd_configs_are_named(tiny, tmp_path, part, key, value):
    config = hub.read_json(tiny.root / "config.json")
    (config[part] if part else config)[key] = value
    hub.write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json.*({key}|of them|patch_size)"):
        vit_qformer.read_config(tmp_path)


def test_published_names_and_shapes():
    """The full-size encoder (on the meta device: no memory) against the Hub's list of tensors."""
    with torch.device("meta"):
        encoder = VisualEncoder()
    shapes = {n: list(p.shape) for n, p in encoder.named_parameters()}
    assert len(shapes) == 39 * 12 + 6 + 4 + 12 * 22 + 6 * 10 + 1
    assert shapes["query_tokens"] == [1, 32, 768]
    assert shapes["vit.embeddings.position_embedding"] == [1, 257, 1408]
    assert shapes["vit.encoder.layers.38.self_attn.qkv.bias"] == [4224]
    assert shapes["vit.encoder.layers.0.mlp.fc1.weight"] == [6144, 1408]
    assert shapes["qformer.embeddings.word_embeddings.weight"] == [30523, 768]
    assert shapes["qformer.encoder.layer.10.crossattention.attention.key.weight"] == [768, 1408]
    assert "qformer.encoder.layer.1.crossattention.attention.key.weight" not in shapes
    assert shapes["qformer.encoder.layer.11.output_query.LayerNorm.weight"] == [768]


def test_sharded_folder(tiny, tmp_path):
    tiny.oracle.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    ours, pixels = VisualEncoder.from_pretrained(tmp_path), torch.randn(1, 3, 42, 42)
    assert torch.equal(ours(pixels), tiny.ours(pixels))
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        VisualEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("query_tokens"), r"missing: query_tokens \(1\)"),
    (lambda t: t.pop("qformer.encoder.layer.2.output.dense.bias"),
     r"missing: qformer.encoder.layer.2.output.dense.bias"),
    (lambda t: t.update({"vision_model.encoder.layers.3.mlp.fc1.bias": torch.zeros(56)}),
     r"unknown: vision_model.encoder.layers.3.mlp.fc1.bias"),
    (lambda t: t.update({"query_tokens": torch.zeros(1, 8, 30)}),
     r"wrong shape: query_tokens \[1, 8, 30\], wanted \[1, 7, 30\]")])
def test_weights_that_do_not_fit_are_named(tiny, tmp_path, change, message):
    tensors = {n: p.clone() for n, p in tiny.oracle.named_parameters()}
    change(tensors)
    hub.save_folder(tmp_path, tensors, hub.read_json(tiny.root / "config.json"))
    with pytest.raises(ValueError, match=message):
        VisualEncoder.from_pretrained(tmp_path)


def test_state_dict_is_the_published_layout(tiny, tmp_path):
    tensors = {n.replace("vit.", "vision_model.", 1) if n.startswith("vit.") else n: t
               for n, t in tiny.ours.state_dict().items()}
    hub.save_folder(tmp_path, tensors, hub.read_json(tiny.root / "config.json"))
    pixels = torch.randn(1, 3, 42, 42)
    assert torch.equal(VisualEncoder.from_pretrained(tmp_path)(pixels), tiny.ours(pixels))


# ---- tokenizer ----------------------------------------------------------------------------------

PIECES = ("[PAD] [UNK] [CLS] [SEP] [MASK] what is are the dog dogs ##s ##ing bark un ##known cafe "
          "a ? ! , . ' 中 文 1 ##2 [DEC]").split()
TEXTS = ["What is the dog barking?", "Dogs, dogs!  CAFÉ 12", "中文 unknowns", "", "the [SEP] dog",
         "zebra a\tdog's\x00 bark", "x" * 120]


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "qformer_tokenizer").mkdir()
    (tmp_path / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(PIECES) + "\n", "utf-8")
    return tmp_path


def test_tokenizer_is_bert(vocabulary):
    ours = QFormerTokenizer.from_pretrained(vocabulary)
    bert = transformers.BertTokenizer(str(vocabulary / "qformer_tokenizer" / "vocab.txt"))
    theirs = bert(TEXTS, padding=True, return_tensors="pt")
    ids, mask = ours(TEXTS)
    assert torch.equal(ids, theirs.input_ids) and ids.dtype == torch.long
    assert torch.equal(mask, theirs.attention_mask.bool()) and mask.dtype == torch.bool
    assert [PIECES[i] for i in ids[0]][:9] == "[CLS] what is the dog bark ##ing ? [SEP]".split()


@pytest.mark.parametrize("name, text, message", [
    ("vocab.txt", b"[PAD]\n\xe9", "not UTF-8"), ("vocab.txt", b"", "no .PAD"),
    ("tokenizer.json", b"{", "not readable"), ("tokenizer.json", b"[1]", "not readable")])
def test_damaged_vocabularies_are_named(tmp_path, name, text, message):
    (tmp_path / "qformer_tokenizer").mkdir()
    (tmp_path / "qformer_tokenizer" / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        QFormerTokenizer.from_pretrained(tmp_path)


def test_tokenizer_json_says_the_same(vocabulary):
    by_vocabulary = QFormerTokenizer.from_pretrained(vocabulary)
    root = vocabulary / "qformer_tokenizer"
    transformers.BertTokenizer(str(root / "vocab.txt")).save_pretrained(root)
    (root / "vocab.txt").unlink()
    by_json = QFormerTokenizer.from_pretrained(vocabulary)
    for a, b in zip(by_json(TEXTS), by_vocabulary(TEXTS), strict=True):
        assert torch.equal(a, b)


def test_too_long_a_text_loses_its_beginning(vocabulary):
    tokenizer = QFormerTokenizer.from_pretrained(vocabulary)
    ids, mask = tokenizer(["is the dog a cafe ?", "what"], max_length=5)
    assert [[PIECES[i] for i in row] for row in ids] == [
        "[CLS] a cafe ? [SEP]".split(), "[CLS] what [SEP] [PAD] [PAD]".split()]
    assert mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert tokenizer(["dog " * 500])[0].shape == (1, 128)
    assert tokenizer(["is the dog a cafe ?"])[0].shape == (1, 8)      # no memory of max_length=5


def test_tokenizer_errors(vocabulary):
    with pytest.raises(ValueError, match="wanted a list"):
        QFormerTokenizer.from_pretrained(vocabulary)("one text")
    (vocabulary / "qformer_tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(ValueError, match=r"no \[CLS\], \[SEP\], \[MASK\]"):
        QFormerTokenizer.from_pretrained(vocabulary)
    shutil.rmtree(vocabulary / "qformer_tokenizer")
    with pytest.raises(FileNotFoundError, match="neither vocab.txt nor tokenizer.json"):
        QFormerTokenizer.from_pretrained(vocabulary)


# ---- images -------------------------------------------------------------------------------------

def picture(height, width, n_frames=2):
    """Smooth waves, hard edges and a little noise, (F,H,W,3)."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9 + f) * np.cos(y / (7 + f)) for f in range(3 * n_frames)])
    frames = 127 + 100 * waves.reshape(n_frames, 3, height, width).transpose(0, 2, 3, 1)
    frames[:, height // 3:height // 2, width // 4:width // 2] = 255
    frames += np.random.default_rng(0).normal(0, 5, frames.shape)
    return frames.clip(0, 255).astype("uint8")


def pil_bicubic(frame, size=224):
    """Width first, then height. Pillow 13 turned the order round for tall pictures, which moves
    values by up to 14/255; InstructBLIP was trained with the older order, and torch has it too."""
    wide = Image.fromarray(frame).resize((size, frame.shape[0]), Image.BICUBIC)
    return np.array(wide.resize((size, size), Image.BICUBIC))


@pytest.mark.parametrize("height, width", [
    (480, 640), (225, 223), (720, 300), (90, 160), (31, 500)])
def test_resize_is_pils(height, width):
    frames = picture(height, width)
    ours = resize(frames)
    theirs = torch.from_numpy(np.stack([pil_bicubic(frame) for frame in frames]))
    assert ours.shape == (2, 3, 224, 224) and ours.dtype == torch.uint8 and ours.is_contiguous()
    difference = (ours.int() - theirs.permute(0, 3, 1, 2).int()).abs()
    print(f"resize {height}x{width}: largest difference {difference.max()}/255, "
          f"{100 * (difference > 0).float().mean():.2f} % differ")
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.01


def test_right_size_passes_unchanged():
    frames = picture(224, 224)
    assert torch.equal(resize(frames), torch.from_numpy(frames).permute(0, 3, 1, 2))


def test_preprocess_is_blips():
    """Exact where nothing is resized, else apart by what test_resize_is_pils measures."""
    frames = picture(224, 224)
    processor = transformers.BlipImageProcessorPil(size={"height": 224, "width": 224},
                                                   image_mean=CLIP_MEAN, image_std=CLIP_STD)
    theirs = processor([Image.fromarray(f) for f in frames], return_tensors="pt").pixel_values
    check("preprocess 224", preprocess(frames), theirs, max_abs=1e-6)
    frames = picture(200, 300)                         # not tall: see pil_bicubic
    theirs = processor([Image.fromarray(f) for f in frames], return_tensors="pt").pixel_values
    check("preprocess 200x300", preprocess(frames), theirs, max_abs=2 / 255 / 0.26, rel_rms=2e-3)


def test_preprocess_without_antialias_is_plain_bicubic():
    """The authors' path for video frames: floats, no prefilter, no clamp, CLIP's statistics."""
    frames = picture(300, 200)
    x = torch.nn.functional.interpolate(torch.from_numpy(frames).permute(0, 3, 1, 2).float(),
                                        size=(224, 224), mode="bicubic", align_corners=False)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    theirs = (x / 255 - mean) / std
    check("preprocess without antialias", preprocess(frames, antialias=False), theirs, max_abs=1e-6)
    assert x.max() > 255                                        # the overshoot that is kept


def test_frames_may_be_tensors_flipped_or_read_only():
    frames = picture(60, 80)
    wanted = resize(frames)
    assert torch.equal(resize(torch.from_numpy(frames)), wanted)
    assert torch.equal(resize(frames[..., ::-1]), wanted.flip(1))
    frames.flags.writeable = False
    assert torch.equal(resize(frames), wanted)


@pytest.mark.parametrize("frames", [
    np.zeros((1, 8, 8, 3), "float32"), np.zeros((8, 8, 3), "uint8"),
    np.zeros((1, 3, 8, 8), "uint8")])
def test_bad_frames_are_refused(frames):
    for antialias in (True, False):
        with pytest.raises(ValueError, match=r"wanted uint8 \(F,H,W,3\)"):
            preprocess(frames, antialias=antialias)


def test_bad_pixels_are_refused():
    for pixels in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"wanted uint8 \(F,3,H,W\)"):
            normalise(pixels)
