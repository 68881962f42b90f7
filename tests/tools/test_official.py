"""The authors' checkpoint: every key has its place, and our variant "official" computes what their
code does.  Their forward pass stands here once more, written with their names from a description
of the released code, and transformers' LLaMA with merged LoRA behind it."""

import math

import pytest
import torch
import torch.nn.functional as F
from parity import check, randomise
from torch import nn

import favor
from data import Clip
from favor import Features, Sample
from runtime import hub
from tools import official
from vit_qformer import QFormerConfig, VisualEncoder, ViTConfig

WIDTH, QUERIES, LAYERS, HEADS, FFN, LLM, R = 128, 10, 2, 4, 512, 32, 4
VISUAL, JOINT, AUDIO, V, A, K = 16, 32, 16, 12, 10, 5


def norm(generator, *shape):
    return 1 + 0.1 * torch.randn(*shape, generator=generator)


def their_checkpoint(seed=0):
    """{their key: random tensor}, with the shapes that the tiny parts ask for."""
    g = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, inside, outside, std=0.2):
        state[f"{name}.weight"] = std * torch.randn(outside, inside, generator=g)
        state[f"{name}.bias"] = 0.2 * torch.randn(outside, generator=g)

    def layer_norm(name, width):
        state[f"{name}.weight"] = norm(g, width)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=g)

    linear("speech_pre_qformer_proj", AUDIO, VISUAL)
    layer_norm("ln_video", JOINT)
    state["video_frame_position_embedding.weight"] = torch.randn(1024, JOINT, generator=g)
    state["video_query_tokens"] = torch.randn(1, QUERIES, WIDTH, generator=g)
    layer_norm("video_Qformer.bert.embeddings.LayerNorm", WIDTH)
    for n in range(LAYERS):
        q = f"video_Qformer.bert.encoder.layer.{n}."
        for block, inside, outside in (("attention", WIDTH, WIDTH),
                                       ("crossattention", JOINT, WIDTH),
                                       ("encoder_causal_attention", JOINT, JOINT)):
            linear(f"{q}{block}.self.query", outside, outside)
            linear(f"{q}{block}.self.key", inside, outside)
            linear(f"{q}{block}.self.value", inside, outside)
            linear(f"{q}{block}.output.dense", outside, outside)
            layer_norm(f"{q}{block}.output.LayerNorm", outside)
        linear(f"{q}intermediate_query.dense", WIDTH, FFN)
        linear(f"{q}output_query.dense", FFN, WIDTH, 0.1)
        layer_norm(f"{q}output_query.LayerNorm", WIDTH)
    linear("llama_proj", WIDTH, LLM)
    for n in range(2):
        for part in "qkvo":
            name = f"llama_model.base_model.model.model.layers.{n}.self_attn.{part}_proj"
            state[f"{name}.lora_A.default.weight"] = 0.2 * torch.randn(R, LLM, generator=g)
            state[f"{name}.lora_B.default.weight"] = 0.2 * torch.randn(LLM, R, generator=g)
    return state


@pytest.fixture(scope="module")
def parts(small_parts, tmp_path_factory):
    """{"whisper", "instructblip", "llm"}: as small_parts, with V >= A queries as at full size."""
    from miniature import pretrain
    root = tmp_path_factory.mktemp("official_parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "TINY", root)
        (root / "llama").symlink_to(small_parts / "llama")
        (root / "instructblip").mkdir()
        (root / "instructblip" / "qformer_tokenizer").symlink_to(
            small_parts / "instructblip" / "qformer_tokenizer")
        vocabulary = len(pretrain.qformer_vocabulary())
        pretrain.save_instructblip(randomise(VisualEncoder(
            ViTConfig(width=16, layers=1, heads=2, ffn=32, image_size=64, patch_size=16),
            QFormerConfig(width=VISUAL, layers=2, heads=2, ffn=32, vocab_size=vocabulary,
                          max_positions=128, encoder_width=16), V)), nn.Linear(VISUAL, LLM))
    return {"whisper": str(small_parts / "whisper"), "llm": str(root / "llama"),
            "visual": str(root / "instructblip")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "pytorch_model_1_101.pt"
    torch.save(their_checkpoint(), path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint, parts):
    return official.from_official(checkpoint, model="tiny", **parts)


# ---- their forward pass -------------------------------------------------------------------------

def bert_attention(w, name, x, context, bias, heads):
    """Scores plus bias, softmax, dense, residual, LayerNorm with eps 1e-12."""
    def head(part, y):
        y = F.linear(y, w[f"{name}.self.{part}.weight"], w[f"{name}.self.{part}.bias"])
        return y.view(len(y), -1, heads, y.shape[-1] // heads).transpose(1, 2)
    q, k, v = head("query", x), head("key", context), head("value", context)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    y = ((scores + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = F.linear(y, w[f"{name}.output.dense.weight"], w[f"{name}.output.dense.bias"])
    return layer_norm(w, f"{name}.output.LayerNorm", x + y, 1e-12)


def layer_norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def their_joint(w, visual, audio):
    """visual (T_v,V,D), audio (1500-like,D_a) -> (T,V,2D), windows (W,K*V,2D) and their mask."""
    audio = F.linear(audio, w["speech_pre_qformer_proj.weight"], w["speech_pre_qformer_proj.bias"])
    audio = audio.view(-1, A, VISUAL)
    T = max(len(visual), len(audio))
    visual = torch.cat([visual, torch.zeros(T - len(visual), V, VISUAL)])
    audio = torch.cat([audio, torch.zeros(T - len(audio), A, VISUAL)])
    audio = torch.cat([audio, torch.zeros(T, V - A, VISUAL)], dim=1)
    joint = torch.cat([visual, audio], dim=-1)
    rows, mask = joint.flatten(0, 1), torch.ones(T * V)
    missing = -T % K * V
    rows = torch.cat([rows, torch.zeros(missing, JOINT)])
    mask = torch.cat([mask, torch.zeros(missing)])
    return joint, rows.view(-1, K * V, JOINT), mask.view(-1, K * V)


def their_queries(w, windows, mask):
    """The causal Q-Former as released: (W,Q,D)."""
    lowest = torch.finfo(torch.float32).min
    x = layer_norm(w, "ln_video", windows, 1e-5)
    x = x + w["video_frame_position_embedding.weight"][:windows.shape[1]]
    triangle = torch.kron(torch.triu(torch.ones(K, K)), torch.ones(V, V))
    queries = layer_norm(w, "video_Qformer.bert.embeddings.LayerNorm",
                         w["video_query_tokens"].expand(len(x), -1, -1), 1e-12)
    for n in range(LAYERS):
        q = f"video_Qformer.bert.encoder.layer.{n}."
        frames = bert_attention(w, f"{q}encoder_causal_attention", x, x, (1 - triangle) * lowest,
                                HEADS)
        queries = bert_attention(w, f"{q}attention", queries, queries, 0.0, HEADS)
        queries = bert_attention(w, f"{q}crossattention", queries, frames,
                                 ((1 - mask) * lowest)[:, None, None], HEADS)
        y = F.gelu(F.linear(queries, w[f"{q}intermediate_query.dense.weight"],
                            w[f"{q}intermediate_query.dense.bias"]))
        y = F.linear(y, w[f"{q}output_query.dense.weight"], w[f"{q}output_query.dense.bias"])
        queries = layer_norm(w, f"{q}output_query.LayerNorm", queries + y, 1e-12)
    return queries


def their_llm(w, folder):
    """transformers' LLaMA with alpha / r B A added to q, k, v and o."""
    from transformers import LlamaForCausalLM
    llm = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scale = favor.preset("tiny", "official").lora_alpha / R
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            key = f"llama_model.base_model.model.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.default.weight" in w:
                parameter += scale * (w[f"{key}.lora_B.default.weight"]
                                      @ w[f"{key}.lora_A.default.weight"])
    return llm


@torch.no_grad()
@pytest.mark.parametrize("frames", [7, 60, 63])
def test_forward(model, parts, frames):
    """Joint tensor, queries of every window, LLM input and logits, with a last window that is not
    full and pictures that end before or after the 30 s of sound."""
    w, g = their_checkpoint(), torch.Generator().manual_seed(1)
    visual = torch.randn(frames, V, VISUAL, generator=g)
    audio = torch.randn(600, AUDIO, generator=g)                     # always 30 s: 60 frames
    sample = Sample("What is heard?", features=Features(visual, audio))
    joint, windows, mask = their_joint(w, visual, audio)
    ours, our_mask = favor.synchronise(visual, model.audio_proj(audio), A, mask_padding=False)
    check("joint tensor", ours, joint)
    assert our_mask.all()
    queries = their_queries(w, windows, mask)
    tokens, our_queries = model.audio_visual_tokens([sample])
    check("queries of every window", our_queries, queries, max_abs=1e-4, rel_rms=1e-5)
    vectors = F.linear(queries, w["llama_proj.weight"], w["llama_proj.bias"]).flatten(0, 1)
    llm, encode = their_llm(w, parts["llm"]), model.tokenizer.encode
    text = [torch.tensor([ids]) for ids in (
        [1, *encode("USER: <Img>")], encode("</Img> What is heard?\nASSISTANT:"))]
    embedded = [llm.get_input_embeddings()(ids)[0] for ids in text]
    wanted = torch.cat([embedded[0], vectors, embedded[1]])
    rows, _ = model.llm_inputs([sample])
    check("LLM input embeddings", rows[0][0], wanted, max_abs=1e-4, rel_rms=1e-5)
    check("logits", model.llm(embeds=rows[0][0][None]),
          llm(inputs_embeds=wanted[None]).logits, max_abs=1e-4, rel_rms=1e-5)


DIALOGUES = [
    ("and then?", "it stops", ()),
    ("is anybody there?", "a dog", (("what is seen?", "a red ball"),)),
    ("what colour is it?", "red", (("who speaks?", "nobody"), ("why?", ""), ("so?", "yes it is")))]


@torch.no_grad()
def test_loss_of_dialogues(model, parts):
    """Every answer with its </s> is a label, all else -100; the mean over the labels of the batch,
    by transformers, plus 0.01 times the mean cosine between two queries of a window."""
    w, g, encode = their_checkpoint(), torch.Generator().manual_seed(2), model.tokenizer.encode
    llm, samples, logits, labels, queries = their_llm(w, parts["llm"]), [], [], [], []
    for frames, (prompt, target, history) in zip((7, 60, 63), DIALOGUES, strict=True):
        visual = torch.randn(frames, V, VISUAL, generator=g)
        audio = torch.randn(600, AUDIO, generator=g)
        samples.append(Sample(prompt, target, features=Features(visual, audio), history=history))
        queries.append(their_queries(w, *their_joint(w, visual, audio)[1:]))
        vectors = F.linear(queries[-1], w["llama_proj.weight"], w["llama_proj.bias"])
        ids, wanted, opening = [], [], "</Img> "
        for question, answer in [*history, (prompt, target)]:
            human, gpt = encode(f"{opening}{question}\nASSISTANT:"), [*encode(answer), 2]
            ids, wanted = ids + human + gpt, wanted + [-100] * len(human) + gpt
            opening = "USER: "
        embed = llm.get_input_embeddings()
        start = [1, *encode("USER: <Img>")]
        x = torch.cat([embed(torch.tensor(start)), vectors.flatten(0, 1),
                       embed(torch.tensor(ids))])[None]
        logits.append(llm(inputs_embeds=x).logits[0, :-1])
        labels.append(torch.tensor([-100] * (x.shape[1] - len(ids)) + wanted)[1:])
    ce = F.cross_entropy(torch.cat(logits), torch.cat(labels))
    unit = F.normalize(torch.cat(queries), dim=-1)
    cosines = unit @ unit.mT - torch.eye(QUERIES)
    diversity = cosines.sum() / (len(unit) * QUERIES * (QUERIES - 1))
    ours = model(samples)
    print(f"{ours['loss'] - ce - 0.01 * diversity:.1e} apart, of {ours['loss']:.3f}")
    assert ours["tokens"] == (torch.cat(labels) != -100).sum() == sum(
        map(model.answer_tokens, samples))
    for name, wanted in (("ce", ce), ("diversity", diversity), ("loss", ce + 0.01 * diversity)):
        assert ours[name].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_the_first_question_is_seen_up_to_256_tokens(model, monkeypatch):
    """The visual Q-Former reads the first question of a dialogue, here as much of its end as the
    small one has positions for; the paper's variant the current one, up to 128 tokens."""
    read, real = [], model.qformer_tokenizer

    def spy(texts, max_length):
        ids, mask = real(texts, max_length)
        read.append((texts, max_length))
        return ids, mask
    monkeypatch.setattr(model, "qformer_tokenizer", spy)
    clip = Clip(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    sample = Sample("and then?", clip=clip, history=(("what is seen?", "a ball"), ("so?", "yes")))
    model.encode_batch([sample, Sample("why? " * 300, clip=clip)])
    assert model.config.question_tokens == 256
    positions = model.visual.qformer.config.max_positions
    assert read == [(["what is seen?", "why? " * 300], min(256, positions))]
    monkeypatch.setattr(model, "config", favor.preset("tiny"))
    model.encode_batch([sample])
    assert read[-1] == (["and then?"], 128)


def test_it_is_official(model):
    assert (model.config.variant, model.config.causal, model.config.lora_r) == (
        "official", "future", R)
    assert model.config.beams == 5 and not model.training


# ---- keys ---------------------------------------------------------------------------------------

def test_every_tensor_arrives(model):
    """Every trained parameter is one of theirs, to the bit."""
    theirs = {t.double().sum().item() for t in their_checkpoint().values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.double().sum().item() in theirs, name


def saved(tmp_path, change):
    state = their_checkpoint()
    change(state)
    torch.save(state, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_known_extras_and_aliases(tmp_path, parts, model):
    def change(state):
        state["llm_proj.weight"] = torch.zeros(3, 3)
        state["video_Qformer.bert.embeddings.position_ids"] = torch.arange(9)[None]
        state["llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = (
            torch.zeros(8))
        for old, new in (("ln_video.weight", "ln_joint.weight"),
                         ("llama_proj.weight", "llama_proj_speech.weight"),
                         ("llama_proj.bias", "llama_proj_joint.bias"),
                         ("video_query_tokens", "joint_query_tokens")):
            state[new] = state[old].clone()
        state["llama_proj_joint.weight"] = state.pop("llama_proj.weight")
        state["speech_Qformer.bert.embeddings.LayerNorm.bias"] = state.pop(
            "video_Qformer.bert.embeddings.LayerNorm.bias")
    other = official.from_official(saved(tmp_path, change), model="tiny", **parts)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("ln_video.bias"), "missing: aligner.qformer.joint_norm.bias"),
    (lambda s: s.pop("llama_model.base_model.model.model.layers.1.self_attn.o_proj.lora_B.default"
                     ".weight"), "missing: model.layers.1.self_attn.o_proj.lora_B"),
    (lambda s: s.update(surprise=torch.zeros(1)), "unknown names surprise"),
    (lambda s: s.update({"ln_video.bias": torch.zeros(5)}),
     r"wrong shape: aligner.qformer.joint_norm.bias \[5\], wanted \[32\]"),
    (lambda s: s.update({"ln_joint.bias": torch.ones(JOINT)}), "should be one parameter"),
    (lambda s: s.update({"llama_proj_joint.bias": torch.ones(LLM)}), "should be one parameter"),
    (lambda s: s.update({"beats_pre_qformer_proj.weight": torch.zeros(8, 8)}), "video-SALMONN"),
    (lambda s: s.update({"low_query_tokens": torch.zeros(1, 3, 8)}), "video-SALMONN"),
    (lambda s: s.clear(), "no llama_proj.weight or no LoRA"),
])
def test_what_does_not_fit_is_named(tmp_path, parts, change, message):
    with pytest.raises(ValueError, match=message):
        official.from_official(saved(tmp_path, change), model="tiny", **parts)


def test_no_code_runs(tmp_path, parts):
    """A pickle that would call something is refused, not run."""
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trapped"), "w"))
    torch.save({"ln_video.weight": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt: not a torch file of tensors only"):
        official.from_official(tmp_path / "bad.pt", model="tiny", **parts)
    assert not (tmp_path / "trapped").exists()
    (tmp_path / "half.pt").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="half.pt: not a torch file"):
        official.from_official(tmp_path / "half.pt", model="tiny", **parts)
    with pytest.raises(FileNotFoundError, match="nowhere.pt: no such file"):
        official.from_official(tmp_path / "nowhere.pt")


def test_folder_and_half_precision(tmp_path, parts, model):
    """A folder with the one file; released in fp16, computed in the model's dtype."""
    state = {name: tensor.half() for name, tensor in their_checkpoint().items()}
    torch.save({"module": state}, tmp_path / "pytorch_model.pt")
    other = official.from_official(tmp_path, model="tiny", **parts)
    for a, b in zip(model.trained_parameters(), other.trained_parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.allclose(a, b, atol=2e-3)


def test_it_saves_and_loads_as_ours(model, tmp_path):
    model.save_pretrained(tmp_path / "run")
    assert hub.read_json(tmp_path / "run" / "favor.json")["config"]["variant"] == "official"
    again = favor.Favor.from_pretrained(tmp_path / "run")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
