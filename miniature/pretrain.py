"""Pretrains the three frozen parts of the miniature, as the paper starts from pretrained parts.
Each is saved in the Hub's folder layout with the Hub's tensor names (fp16). Only training voices
and training scenes are used, so what the test clips hold out stays unseen here, too.

     llama         reads a clip described in words, answers questions about it  -> weights/llama
     whisper       names the word or sound that is heard at every 50 ms         -> weights/whisper
     instructblip  reads one still and an instruction, gives the answer or the caption: query i
                   gives word i through a head that is thrown away         -> weights/instructblip
     projection    the same through the frozen LLaMA's lm_head             -> weights/instructblip

`python -m miniature pretrain [llama whisper instructblip projection]` runs them in this order.
Under torchrun the processes share each batch. weights/README.md has what each run printed."""

import io
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from aveb.text import edit_distance
from favor import prompt_ids
from llama import Llama, LlamaConfig, Tokenizer
from miniature import world
from miniature.scenes import PROMPTS, SCENES
from runtime import hub
from vit_qformer import QFormerConfig, QFormerTokenizer, VisualEncoder, ViTConfig, preprocess
from whisper_enc import WhisperConfig, WhisperEncoder, log_mel_spectrogram

TINY = Path(__file__).parent / "weights"
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))                       # torchrun sets these two
RANK = int(os.environ.get("RANK", 0))
NOTHING = world.NOTHING                        # also the word of a query that has no word to give


def barrier():
    """Waits until all processes have come here."""
    if WORLD_SIZE > 1:
        dist.barrier()


def train_loop(name, steps, parameters, batch_loss, lr, log_every=200):
    """AdamW with warm-up and cosine decay. batch_loss(step) -> loss, {name: number to print}."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.time()
    for step in range(steps):
        scale = min(1, (step + 1) / 100) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
        loss, numbers = batch_loss(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if WORLD_SIZE > 1:                            # each process had its share of the batch
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= WORLD_SIZE
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if RANK == 0 and ((step + 1) % log_every == 0 or step + 1 == steps):
            seconds = time.time() - started
            shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
            print(f"{name} {step + 1}/{steps}: loss {loss.item():.3f}, {shown}, {seconds:.0f} s, "
                  f"ETA {seconds / (step + 1) * (steps - step - 1):.0f} s", flush=True)


def read_out(labels, silence=0):
    """Frame-wise labels (T,) -> the words: repeats are merged, silence is dropped."""
    out, last = [], silence
    for label in labels:
        if label not in (last, silence):
            out.append(label)
        last = label
    return out


# ---------------------------------------------------------------- whisper: words and sounds
HEARD = ("silence", *world.WORDS, *world.SOUNDS)
WHISPER = WhisperConfig(width=96, layers=3, heads=4, ffn=384,
                        max_source_positions=100, n_fft=512, hop=400)


def listening_clip(rng, split):
    """5 s of words or sounds, quiet or noisy -> audio (80000,), labels (100,), one every 50 ms."""
    total, at, pieces = WHISPER.chunk_samples, int(rng.uniform(0, 0.8) * world.RATE), []
    labels = np.zeros(WHISPER.max_source_positions, np.int64)
    speech, voice = rng.random() < 0.65, world.choose_voice(rng, split)
    slow = rng.random() < 0.4
    while True:
        word = str(rng.choice(world.WORDS if speech else world.SOUNDS))
        audio = world.say(rng, word, split, voice) if speech else world.sound(rng, word)
        if at + len(audio) > total:
            break
        pieces.append((at, audio))
        first, last = round(at / 800), round((at + len(audio)) / 800)     # 800 samples = 50 ms
        labels[first:max(last, first + 1)] = HEARD.index(word)
        gap = rng.uniform(0.2, 1.2) if slow else rng.uniform(0.02, 0.25)
        at += len(audio) + int(gap * world.RATE)
    audio = world.place(total, pieces)
    if speech:
        decibels = rng.uniform(-6, 3) if rng.random() < 0.3 else rng.uniform(10, 40)
        audio = world.add_noise(rng, audio, decibels)
    else:
        audio = audio + 0.003 * rng.standard_normal(total).astype(np.float32)
    return audio / max(1.0, abs(audio).max()), labels


def mel_of(audio):
    return log_mel_spectrogram(audio, WHISPER.chunk_samples, WHISPER.n_fft, WHISPER.hop,
                               WHISPER.n_mels)


def other_voices(mel):
    """Log-mel (B,M,T) -> the same as if other people had spoken: the frequency axis is stretched by
    up to 14 % (a longer or shorter vocal tract) and tilted, and up to twelve neighbouring bands are
    silenced."""
    B, M, T = mel.shape
    band = torch.arange(M) * torch.empty(B, 1).uniform_(0.87, 1.15)                      # (B,M)
    low = band.long().clamp(max=M - 1)
    part = (band - low).clamp(0, 1)[..., None]

    def rows(index):
        return mel.gather(1, index[..., None].expand(-1, -1, T))

    mel = (1 - part) * rows(low) + part * rows((low + 1).clamp(max=M - 1))
    mel = mel + torch.empty(B, 1, 1).uniform_(-0.4, 0.4) * torch.linspace(-1, 1, M)[:, None]
    first, count = torch.randint(0, M, (B, 1)), torch.randint(0, 13, (B, 1))
    silenced = (torch.arange(M) >= first) & (torch.arange(M) < first + count)            # (B,M)
    return torch.where(silenced[..., None], mel.amin(dim=(1, 2), keepdim=True), mel)


def pretrain_whisper(steps=3000, varied_steps=1500, batch=32, seed=1):
    """Trains `steps` steps on the voices as they are, then `varied_steps` steps with other_voices.
    Without the second part the test voices are understood much worse."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, RANK])
    encoder, head = WhisperEncoder(WHISPER), nn.Linear(WHISPER.width, len(HEARD))
    encoder.embed_positions.requires_grad_(False)                    # Whisper's are fixed sinusoids

    def batch_of(split, n):
        clips = [listening_clip(rng, split) for _ in range(n)]
        return (mel_of(torch.from_numpy(np.stack([c[0] for c in clips]))),
                torch.from_numpy(np.stack([c[1] for c in clips])))

    def loss_of(change):
        def loss(step):
            mel, labels = batch_of("train", batch // WORLD_SIZE)
            logits = head(encoder(change(mel)))                                      # (B,P,classes)
            right = (logits.argmax(-1) == labels)[labels > 0].float().mean()
            return (F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
                    {"frames right": right.item()})
        return loss

    parameters = [p for m in (encoder, head) for p in m.parameters() if p.requires_grad]
    train_loop("whisper", steps, parameters, loss_of(lambda mel: mel), lr=2e-3)
    train_loop("whisper, varied", varied_steps, parameters, loss_of(other_voices), lr=1e-3)
    if RANK > 0:
        return
    save_whisper(encoder)
    encoder.eval()
    with torch.no_grad():                                          # the score of this part alone
        for split in ("train", "test"):
            right = total = errors = spoken = 0
            for _ in range(8):
                mel, labels = batch_of(split, 64)
                said = head(encoder(mel)).argmax(-1)
                right += (said == labels)[labels > 0].sum().item()
                total += (labels > 0).sum().item()
                for ours, theirs in zip(said.tolist(), labels.tolist(), strict=True):
                    ours, theirs = read_out(ours), read_out(theirs)
                    errors, spoken = errors + edit_distance(ours, theirs), spoken + len(theirs)
            print(f"whisper alone, {split} voices: {100 * right / total:.1f} % of the sounding "
                  f"50 ms frames right, word error rate {100 * errors / spoken:.1f} %", flush=True)


def save_whisper(encoder):
    c = encoder.config
    hub.save_folder(
        TINY / "whisper",
        {f"model.encoder.{n}": t.half() for n, t in encoder.state_dict().items()},
        {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper",
         "num_mel_bins": c.n_mels, "d_model": c.width, "encoder_layers": c.layers,
         "encoder_attention_heads": c.heads, "encoder_ffn_dim": c.ffn,
         "activation_function": "gelu", "max_source_positions": c.max_source_positions,
         "torch_dtype": "float16"})
    hub.write_json(TINY / "whisper" / "preprocessor_config.json", {
        "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": c.n_mels,
        "sampling_rate": c.sample_rate, "hop_length": c.hop, "n_fft": c.n_fft,
        "chunk_length": c.chunk_samples // c.sample_rate, "n_samples": c.chunk_samples,
        "nb_max_frames": 2 * c.max_source_positions, "padding_side": "right",
        "padding_value": 0.0})


# ---------------------------------------------------------------- llama: the miniature's language
LLAMA = {"width": 128, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 352, "max_positions": 1024}
CONTENT_NOISE = 0.5    # a clip's vectors will lie near words rather than on them: train for that


def told_in_words(rng, scene, question):
    """A scene's facts as words that stand in for the clip's vectors: frame by frame what is seen,
    then what is heard, for every frame or for changes only -> groups of one word each."""
    task, _, target, extras = question
    if task == "vqa" and (extras["type"] == "place" or rng.random() < 0.5):
        return [[word] for word in target.split()]        # the Q-Former has answered already
    every, words, last = rng.random() < 0.5, [], None
    for seen, heard in frames_of(scene, extras):
        seen = [word for word in seen if word != NOTHING]
        shown = seen if every and len(seen) <= 3 or seen != last else []
        words += shown + heard or ([NOTHING] if every else [])
        last = seen
    return [[word] for word in words]


def told_in_vectors(rng, scene, question):
    """As told_in_words, but what belongs together (a frame with its sound, a quarter of a still) is
    one group and becomes one vector. This is nearer to what the causal Q-Former will give."""
    if rng.random() < 0.3:
        return told_in_words(rng, scene, question)
    every, groups, last = rng.random() < 0.6, [], None
    for seen, heard in frames_of(scene, question[3]):
        if len(seen) == 8:                                 # a still: told once, then what is heard
            quarters = [[seen[i]] if seen[i] == NOTHING else seen[i:i + 2] for i in (0, 2, 4, 6)]
            groups += (quarters if seen != last else []) + ([heard] if heard else [])
        elif seen and seen[0].isdigit():                   # a sum of digits has no order
            groups += [[digit] for digit in seen]
        elif every or seen != last or heard:
            groups.append(seen + heard or [NOTHING])
        last = seen
    return groups


def frames_of(scene, extras):
    """Yields (words seen, words heard) per frame, with the sound that the question is about."""
    for seen, heard in scene.facts:
        heard = heard[extras["audio"]] if isinstance(heard, dict) else heard
        yield seen, heard


def recall(rng, n, turns=8, scenes=("still", "parade", "concert"), steps=(-1, -1, 0, 1), where=0.5):
    """n samples (groups of words, turns), turns = ((question, answer), ...). The questions are
    look-ups rather than sentences, such as "colour ball", "shape before red" or "where ball". Other
    answers are built on look-ups, and they take a fifth of the tokens; a model that starts with
    sentences hardly learns them. steps: what is asked of a video, 1 "after", -1 "before"; where:
    the share of questions about places, of a still that is described by quarters."""
    out = []
    while len(out) < n:
        scene = SCENES[str(rng.choice(scenes))](rng, "train")
        told = told_in_vectors(rng, scene, scene.questions[0])
        things, last = [], None
        for seen, heard in frames_of(scene, {}):           # a still's quarters, a video's changes
            things += ([seen[i:i + 2] for i in (0, 2, 4, 6)] if len(seen) == 8
                       else [seen + heard] if seen != last else [])
            last = seen
        words = [word for thing in things for word in thing]
        keys = [(k, word) for k, thing in enumerate(things) for word in thing
                if words.count(word) == 1 and word != NOTHING]
        asked = []
        while len(asked) < turns:
            k, key = keys[int(rng.integers(len(keys)))]
            if [NOTHING] in told and rng.random() < where:  # told by quarters
                asked.append((f"where {key}", world.PLACES[k]))
                continue
            step = 0 if len(scene.facts) == 1 else int(rng.choice(steps))
            kind = int(rng.integers(0, 2))                 # of the answer: colour or shape
            if not 0 <= k + step < len(things) or things[k + step][kind] == key:
                continue
            when = {0: "", 1: "after ", -1: "before "}[step]
            asked.append((f"{('colour', 'shape')[kind]} {when}{key}", things[k + step][kind]))
        out.append((told, tuple(asked)))
    return out


def language(rng, n, tell=told_in_words):
    """n samples (groups of words, turns) with one question each, from all scenes."""
    out = []
    while len(out) < n:
        scene = SCENES[str(rng.choice(list(SCENES)))](rng, "train")
        out += [(tell(rng, scene, question),
                 (*question[3].get("history", ()), (question[1], question[2])))
                for question in scene.questions]
    return out[:n]


TALKED_ABOUT = {"parade": 3, "concert": 3, "spoken_question": 2}       # others: 0.5


def dialogues(rng, n, tell=told_in_words):
    """n samples as language(), with many questions about each clip, mostly about scenes whose
    answers must be looked up (what came after what). Asked one by one, they are hardly learnt."""
    scenes, out = list(SCENES), []
    weights = np.array([TALKED_ABOUT.get(scene, 0.5) for scene in scenes])
    while len(out) < n:
        scene = SCENES[str(rng.choice(scenes, p=weights / weights.sum()))](rng, "train")
        first = scene.questions[int(rng.integers(len(scene.questions)))]
        first = scene.questions[0] if first[0] == "vqa" else first
        told = tell(rng, scene, first)
        turns = [*first[3].get("history", ()), (first[1], first[2])]
        if scene.ask:                              # empty quarters told: one can say where
            turns += [(q[1], q[2]) for _ in range(2) for q in scene.ask()
                      if q[3].get("type") != "place" or [NOTHING] in told]
        if rng.random() < 0.6:                             # without the options
            turns = [(question.split(" Choose")[0], answer) for question, answer in turns]
        out.append((told, tuple(turns)))
    return out


def train_tokenizer(rng):
    """Byte-pair sentencepiece model in which every word of the miniature is one piece."""
    lines = [text for told, turns in language(rng, 20000) for question, answer in turns
             for text in ("USER: <Img>", " ".join(word for group in told for word in group),
                          f"</Img> {question}\nASSISTANT:", answer)]
    lines += [*world.COLOURS, *world.SHAPES, *world.SOUNDS, *world.WORDS, *world.LIPS,
              *world.PLACES, NOTHING, "lit", "dark", "hello", "yes", "no"] * 200
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=640,
        byte_fallback=True, split_digits=True, character_coverage=1.0,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        required_chars="abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!'-:;")
    (TINY / "llama").mkdir(parents=True, exist_ok=True)
    (TINY / "llama" / "tokenizer.model").write_bytes(model.getvalue())


def text_and_labels(tokenizer, n_clip, turns):
    """-> ids before the clip's n_clip vectors, ids after them, labels of the whole row: -100 at
    every place that is neither an answer nor its </s>."""
    labels = []
    for k, (question, target) in enumerate(turns):
        before, after, answer = prompt_ids(tokenizer, question, turns[:k], target)
        asked = len(before) + n_clip + len(after)
        labels += [-100] * (asked - len(labels)) + answer
    return before, after + answer, labels


def terse_and_labels(tokenizer, n_clip, turns):
    """As text_and_labels, for recall's turns: only <s>, question, answer and </s>."""
    after, labels = [], [-100] * (1 + n_clip)
    for question, target in turns:
        question, answer = tokenizer.encode(question), [*tokenizer.encode(target), tokenizer.eos_id]
        after += question + answer
        labels += [-100] * len(question) + answer
    return [tokenizer.bos_id], after, labels


def embed_rows(llm, tokenizer, rows):
    """rows of (ids before, groups of words, ids after) -> embeddings (B,T,D), and a mask (B,T) that
    is True at the groups. The vector of a group is the sum of its words' embeddings."""
    lengths = [(len(before), len(told), len(after)) for before, told, after in rows]
    B, T = len(rows), max(map(sum, lengths))
    groups = [[*([i] for i in before), *(tokenizer.encode(" ".join(words)) for words in told),
               *([i] for i in after)] for before, told, after in rows]
    ids = [(b * T + t, i) for b, row in enumerate(groups) for t, group in enumerate(row)
           for i in group]
    where, ids = torch.tensor(ids).T
    first, clip, _ = torch.tensor(lengths).T[..., None]                                  # (B,1)
    t = torch.arange(T)
    x = torch.zeros(B * T, llm.config.width).index_add(0, where, llm.embed(ids))
    return x.unflatten(0, (B, T)), (t >= first) & (t < first + clip)


def telling_loss(llm, tokenizer, rng, kinds, part=32):
    """-> function step -> (loss of the answers, numbers to print).
    kinds: (function that makes samples, prompt template, samples per step), ...;
    part: samples per forward pass."""
    def loss(step):
        rows = []
        for samples, template, n in kinds:
            for told, turns in samples(rng, n // WORLD_SIZE):
                before, after, labels = template(tokenizer, len(told), turns)
                rows.append((before, told, after, torch.tensor(labels)))
        rows.sort(key=lambda row: len(row[3]))         # parts of like length: little padding
        total = count = correct = words = 0
        for i in range(0, len(rows), part):
            *texts, labels = zip(*rows[i:i + part], strict=True)
            embeds, told = embed_rows(llm, tokenizer, list(zip(*texts, strict=True)))
            noise = CONTENT_NOISE * torch.rand(len(labels), 1) * embeds.detach().std() * told
            embeds = embeds + noise[..., None] * torch.randn_like(embeds)
            labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            asked = labels[:, 1:] >= 0                 # padding comes after every answer
            logits = llm.lm_head(llm.hidden(embeds=embeds)[:, :-1][asked])
            wanted = labels[:, 1:][asked]
            total = total + F.cross_entropy(logits, wanted, reduction="sum")
            word = wanted != tokenizer.eos_id
            count, words = count + len(wanted), words + word.sum()
            correct += (logits.argmax(-1) == wanted)[word].sum()
        return total / count, {"words right": (correct / words).item()}
    return loss


# (samples, template, samples per step) of each stage.
RECALL = ((recall, terse_and_labels, 96),)
LANGUAGE = ((recall, terse_and_labels, 16),
            (partial(language, tell=told_in_vectors), text_and_labels, 32),
            (partial(dialogues, tell=told_in_vectors), text_and_labels, 32))
# What these stages still miss: "before", and places.
HARD_RECALL = ((partial(recall, scenes=("parade",), steps=(-1,)), terse_and_labels, 48),
               (partial(recall, scenes=("still",), where=1.0), terse_and_labels, 16),
               *LANGUAGE[:1], (*LANGUAGE[2][:2], 16))
LLAMA_STAGES = (("look-ups", 1000, RECALL, 1.5e-3), ("language", 3000, LANGUAGE, 1.5e-3),
                ("hard look-ups", 700, HARD_RECALL, 1.5e-3),
                ("language again", 800, LANGUAGE, 1e-3))


def pretrain_llama(seed=2, stages=LLAMA_STAGES):
    """Trains on look-ups, then on questions and dialogues. The clips are described in words, and in
    vectors that are the sum of a few words' embeddings."""
    torch.manual_seed(seed)
    if RANK == 0:
        train_tokenizer(np.random.default_rng(seed))
    barrier()
    tokenizer, rng = Tokenizer.from_pretrained(TINY / "llama"), np.random.default_rng([seed, RANK])
    llm = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, **LLAMA))
    # LLaMA's own 0.02 is for wide matrices: at width 128 attention would start flat and stay so.
    for name, parameter in llm.named_parameters():
        if parameter.ndim == 2:
            adds = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = parameter.shape[1] ** -0.5 / (math.sqrt(2 * llm.config.layers) if adds else 1)
            nn.init.normal_(parameter, std=0.3 if "embed" in name else std)
    print(f"llama: {sum(p.numel() for p in llm.parameters()) / 1e6:.2f} M parameters, "
          f"{tokenizer.vocab_size} pieces", flush=True)

    llm.train().requires_grad_(True)
    for name, steps, kinds, lr in stages:
        train_loop(f"llama, {name}", steps, list(llm.parameters()),
                   telling_loss(llm, tokenizer, rng, kinds), lr=lr)
    if RANK == 0:
        llm.eval().save_pretrained(TINY / "llama", dtype=torch.float16)
        llama_alone(llm, tokenizer, rng)


@torch.no_grad()
def llama_alone(llm, tokenizer, rng, n=600):
    """Prints how many whole answers are right for clips described in words and in vectors."""
    for tell in (told_in_words, told_in_vectors):
        tally = {}
        for _ in range(n):
            scene = SCENES[str(rng.choice(list(SCENES)))](rng, "train")
            question = scene.questions[int(rng.integers(len(scene.questions)))]
            told = tell(rng, scene, question)
            turns = (*question[3].get("history", ()), (question[1], question[2]))
            before, after, _ = prompt_ids(tokenizer, question[1], turns[:-1])
            embeds, _ = embed_rows(llm, tokenizer, [(before, told, after)])
            said = llm.generate(embeds=embeds, max_new_tokens=24)[0]
            kind = f"{question[0]} {question[3].get('type', '')}".strip()
            tally.setdefault(kind, []).append(tokenizer.decode(said).strip() == question[2])
        print(f"llama alone, {tell.__name__}, whole answers right: " + "; ".join(
            f"{kind} {100 * np.mean(v):.0f} % ({len(v)})" for kind, v in sorted(tally.items())),
            flush=True)


# ---------------------------------------------------------------- instructblip: stills, questions
VIT = ViTConfig(width=96, layers=3, heads=4, ffn=384, image_size=32, patch_size=8)
CAPTION, ANSWER = 8, 2                            # queries for what is there, and for the answer


def qformer_vocabulary():
    """WordPiece entries: special tokens, whole words, and letters so that any text has ids."""
    prompts = " ".join([
        *PROMPTS.values(), "What colour shape comes right after before the object "
        "at and is it that Choose one from Where Which sounds are heard objects light up"])
    words = set("".join(c if c.isalpha() else " " for c in prompts.lower()).split())
    words |= {*world.COLOURS, *world.SHAPES, *world.SOUNDS, *world.WORDS, *world.LIPS,
              "top", "left", "right", "bottom", "lit", "dark", NOTHING}
    letters = [chr(c) for c in range(97, 123)] + [str(d) for d in range(10)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'-:;()", *letters,
            *("##" + c for c in letters), *sorted(words - set(letters)), "[DEC]"]


LOOKED_AT = {"still": 12, "number": 10, "spoken_question": 3, "spoken_caption": 2, "parade": 1,
             "lips": 1, "concert": 1, "lamps": 1, "flash": 1}       # relative frequencies


def strange_colours(rng, image):
    """The picture with its channels mixed at random, which gives colours that have no name."""
    mix = rng.uniform(-0.3, 1, (3, 3))
    return np.clip(image @ (mix / mix.sum(axis=0)).clip(-1, 2), 0, 255).astype(np.uint8)


def looking_samples(rng, split, n, strange=0.0):
    """n samples (image (64,64,3), instruction, words of the 10 queries). The words are the caption
    of the picture, then the answer if the picture alone gives it. A share `strange` of the pictures
    has strange colours, and None for the words that would then be wrong. So the model must tell
    shapes apart by their form; otherwise it misses pairs of colour and shape it was never shown."""
    weights = np.array(list(LOOKED_AT.values())) / sum(LOOKED_AT.values())
    out = []
    while len(out) < n:
        scene = SCENES[str(rng.choice(list(LOOKED_AT), p=weights))](rng, split)
        pictures = scene.stills()
        for k in rng.permutation(len(pictures))[:5]:
            question = scene.questions[int(rng.integers(len(scene.questions)))]
            caption = (scene.facts[k][0] + [NOTHING] * CAPTION)[:CAPTION]
            answer = question[2].split() if question[0] == "vqa" else []
            words = caption + (answer + [NOTHING] * ANSWER)[:ANSWER]
            shift = tuple(rng.integers(-2, 3, 2)) if len(pictures) > 1 else (0, 0)
            image = np.roll(pictures[k], shift, (0, 1))
            if rng.random() < strange:
                image = strange_colours(rng, image)
                words = [None if word in world.COLOURS or i >= CAPTION else word
                         for i, word in enumerate(words)]
            out.append((image, question[1], words))
    return out[:n]


SAYABLE = (NOTHING, *world.COLOURS, *world.SHAPES, *world.LIPS, *"0123456789",
           "top", "bottom", "left", "right", "lit", "dark")


def say_loss(logits, wanted):
    """Cross-entropy of logits (F,V,words) -> loss, numbers to print. NOTHING, by far the most
    frequent word, has less weight, and -1 has none."""
    weight = 0.15 * (wanted == 0) + (wanted > 0)
    ce = F.cross_entropy(logits.flatten(0, 1), wanted.flatten().clamp(min=0), reduction="none")
    right = (logits.argmax(-1) == wanted)
    numbers = {"caption words": right[:, :CAPTION][wanted[:, :CAPTION] > 0].float().mean().item()}
    if wanted.shape[1] > CAPTION:
        numbers["answer words"] = right[:, CAPTION:][wanted[:, CAPTION:] > 0].float().mean().item()
    return (ce * weight.flatten()).sum() / weight.sum(), numbers


def looking_batch(rng, tokenizer, split, n, strange=0.0):
    """n looking_samples -> pixels, ids, mask, wanted (n,10), the samples. wanted: the index of each
    query's word in SAYABLE, -1 for None."""
    samples = looking_samples(rng, split, n, strange)
    pixels = preprocess(np.stack([s[0] for s in samples]), VIT.image_size)
    pixels = pixels + 0.05 * torch.randn_like(pixels)                # 3 of 255: as a codec might
    return pixels, *tokenizer([s[1] for s in samples]), torch.tensor(
        [[-1 if w is None else SAYABLE.index(w) for w in s[2]] for s in samples]), samples


def saying_loss(rng, tokenizer, encoder, read_out, batch=64):
    """-> function step -> (loss, numbers to print): query i gives word i through `read_out`."""
    def loss(step):
        pixels, ids, mask, wanted, _ = looking_batch(
            rng, tokenizer, "train", batch // WORLD_SIZE, strange=0.3)
        return say_loss(read_out(encoder(pixels, ids, mask)), wanted)                 # (F,V,words)
    return loss


def pretrain_instructblip(vit_steps=1500, steps=2500, joint_steps=2000, batch=64, seed=3):
    """Trains in three stages: the ViT alone (captions from all its tokens), the Q-Former on the
    frozen ViT, then both together."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, RANK])
    folder, vocabulary = TINY / "instructblip", qformer_vocabulary()
    if RANK == 0:
        (folder / "qformer_tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "qformer_tokenizer" / "vocab.txt").write_text(
            "\n".join(vocabulary) + "\n", "utf-8")
    barrier()
    tokenizer = QFormerTokenizer.from_pretrained(folder)
    qformer = QFormerConfig(width=96, layers=4, heads=4, ffn=384, vocab_size=len(vocabulary),
                            max_positions=128, encoder_width=VIT.width)
    encoder, head = (VisualEncoder(VIT, qformer, CAPTION + ANSWER),
                     nn.Linear(qformer.width, len(SAYABLE)))
    initialise(encoder)
    flat_head = nn.Linear((VIT.n_patches + 1) * VIT.width, CAPTION * len(SAYABLE))

    def vit_loss(step):
        pixels, _, _, wanted, _ = looking_batch(rng, tokenizer, "train", batch // WORLD_SIZE, 0.3)
        logits = flat_head(encoder.encode_image(pixels).flatten(1)).unflatten(1, (CAPTION, -1))
        return say_loss(logits, wanted[:, :CAPTION])

    train_loop("vit", vit_steps, [*encoder.vit.parameters(), *flat_head.parameters()], vit_loss,
               lr=2e-3)
    encoder.vit.requires_grad_(False)
    parameters = [p for m in (encoder.qformer, head)
                  for p in m.parameters()] + [encoder.query_tokens]
    loss = saying_loss(rng, tokenizer, encoder, head, batch)
    train_loop("qformer", steps, parameters, loss, lr=1.5e-3)
    encoder.vit.requires_grad_(True)
    train_loop("vit and qformer", joint_steps, [*encoder.vit.parameters(), *parameters], loss,
               lr=1e-3)
    if RANK == 0:
        save_instructblip(encoder)


def pretrain_projection(steps=400, seed=4):
    """InstructBLIP's language_projection: each query gives its word through the frozen LLaMA."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, RANK])
    encoder = VisualEncoder.from_pretrained(TINY / "instructblip").requires_grad_(False)
    tokenizer = QFormerTokenizer.from_pretrained(TINY / "instructblip")
    llm = Llama.from_pretrained(TINY / "llama").requires_grad_(False)
    words = [Tokenizer.from_pretrained(TINY / "llama").encode(word)[-1] for word in SAYABLE]
    projection = nn.Linear(encoder.qformer.config.width, llm.config.width)

    def say(queries):
        return llm.lm_head(projection(queries))[..., words]

    train_loop("language_projection", steps, list(projection.parameters()),
               saying_loss(rng, tokenizer, encoder, say), lr=5e-3)
    if RANK > 0:
        return
    save_instructblip(encoder, projection)
    with torch.no_grad():                                          # the score of this part alone
        for split in ("train", "test"):
            tally = {}
            for _ in range(20):
                pixels, ids, mask, wanted, samples = looking_batch(rng, tokenizer, split, 100)
                right = say(encoder(pixels, ids, mask)).argmax(-1) == wanted
                for (_, prompt, words_), ok in zip(samples, right, strict=True):
                    task = next((k for k, v in PROMPTS.items() if v == prompt),
                                prompt.split(" the ")[0])
                    answers = words_[CAPTION] != NOTHING
                    tally.setdefault(task, []).append(
                        (ok[CAPTION:] if answers else ok[:CAPTION]).all().item())
            print(f"instructblip alone, {split} scenes, all words right: " + "; ".join(
                f"{task} {100 * np.mean(v):.1f} % ({len(v)})"
                for task, v in sorted(tally.items())), flush=True)


def initialise(encoder):
    """Matrices ~ N(0, 1/fan-in); embeddings are large enough to tell positions apart."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim >= 2 and "patch" not in name:
            embedding = any(word in name for word in ("embedding", "query_tokens"))
            nn.init.normal_(parameter, std=0.5 if embedding else parameter.shape[-1] ** -0.5)


def save_instructblip(encoder, projection=None):
    vit, q = encoder.vit.config, encoder.qformer.config
    tensors = {n.replace("vit.", "vision_model.", 1) if n.startswith("vit.") else n: t
               for n, t in encoder.state_dict().items()}
    if projection is not None:
        tensors |= {f"language_projection.{n}": t for n, t in projection.state_dict().items()}
    tensors = {n: t.half() for n, t in tensors.items()}
    hub.save_folder(TINY / "instructblip", tensors, {
        "architectures": ["InstructBlipForConditionalGeneration"], "model_type": "instructblip",
        "num_query_tokens": encoder.n_queries, "torch_dtype": "float16",
        "vision_config": {"hidden_size": vit.width, "intermediate_size": vit.ffn,
                          "num_hidden_layers": vit.layers, "num_attention_heads": vit.heads,
                          "image_size": vit.image_size, "patch_size": vit.patch_size,
                          "hidden_act": "gelu", "layer_norm_eps": vit.eps, "qkv_bias": True},
        "qformer_config": {"hidden_size": q.width, "num_hidden_layers": q.layers,
                           "num_attention_heads": q.heads, "intermediate_size": q.ffn,
                           "vocab_size": q.vocab_size, "max_position_embeddings": q.max_positions,
                           "cross_attention_frequency": q.cross_attention_frequency,
                           "encoder_hidden_size": q.encoder_width, "hidden_act": "gelu",
                           "layer_norm_eps": q.eps},
        "text_config": json.loads((TINY / "llama" / "config.json").read_text("utf-8"))})


PARTS = {"llama": pretrain_llama, "whisper": pretrain_whisper,
         "instructblip": pretrain_instructblip, "projection": pretrain_projection}


def pretrain(parts=()):
    """Trains the named parts (all of them by default) and overwrites their folders in weights/."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    if WORLD_SIZE > 1:
        dist.init_process_group("gloo")
    for part in parts or PARTS:
        PARTS[part]()
        barrier()                                     # the first process has written it
