"""Tests run offline, on the CPU, one thread (two spin against each other on small operations)."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_miniature(tmp_path_factory):
    """Folder of a miniature with 4 training and 2 test clips a scene, made once: real files."""
    from miniature import generate, scenes
    folder = tmp_path_factory.mktemp("miniature")
    counts = {split: dict.fromkeys(scenes.SCENES, n) for split, n in (("train", 4), ("test", 2))}
    generate.make(folder, workers=1, counts=counts)
    return folder.resolve()


@pytest.fixture(scope="session")
def small_parts(tmp_path_factory):
    """Folder with whisper/, instructblip/ and llama/ in the Hub's layout: random weights, hardly
    any width, sizes of frame and chunk as in miniature/weights/."""
    import io

    import sentencepiece
    from torch import nn

    from llama import Llama, LlamaConfig
    from miniature import pretrain, scenes, world
    from vit_qformer import QFormerConfig, VisualEncoder, ViTConfig
    from whisper_enc import WhisperConfig, WhisperEncoder
    root = tmp_path_factory.mktemp("parts")
    (root / "llama").mkdir()
    (root / "instructblip" / "qformer_tokenizer").mkdir(parents=True)
    words = " ".join([*world.WORDS, *world.COLOURS, *world.SHAPES, *world.SOUNDS,
                      *scenes.PROMPTS.values()])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, "USER: <Img> </Img> ASSISTANT:"] * 20), model_writer=model,
        model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True, unk_id=0,
        bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    (root / "llama" / "tokenizer.model").write_bytes(model.getvalue())
    vocabulary = pretrain.qformer_vocabulary()
    (root / "instructblip" / "qformer_tokenizer" / "vocab.txt").write_text(
        "\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "TINY", root)
        Llama(LlamaConfig(vocab_size=400, width=32, layers=2, heads=2, kv_heads=2, ffn=48)
              ).save_pretrained(root / "llama", dtype=torch.float16)
        pretrain.save_whisper(WhisperEncoder(WhisperConfig(
            width=16, layers=1, heads=2, ffn=32, max_source_positions=100, n_fft=512, hop=400)))
        encoder = VisualEncoder(
            ViTConfig(width=16, layers=1, heads=2, ffn=32, image_size=64, patch_size=16),
            QFormerConfig(width=16, layers=2, heads=2, ffn=32, vocab_size=len(vocabulary),
                          max_positions=128, encoder_width=16), 4)
        pretrain.save_instructblip(encoder, nn.Linear(16, 32))
    return root


@pytest.fixture(scope="module")
def checkpoint(small_parts, tmp_path_factory):
    """A run folder with an untrained model."""
    from favor import Favor, preset
    torch.manual_seed(1)
    model = Favor.from_config(preset(
        "tiny", whisper=str(small_parts / "whisper"), llm=str(small_parts / "llama"),
        visual=str(small_parts / "instructblip"), max_new_tokens=5))
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder)
    return folder
