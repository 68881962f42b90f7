"""Pretrains the three frozen parts of the miniature, as the paper starts from pretrained parts,
each saved in the Hub's folder layout with the Hub's tensor names (fp16).  Training voices and
training scenes only: what miniature.py holds out stays unseen here too.

     llama         reads a clip told in words, answers questions about it      -> tiny/llama
     whisper       says at every 50 ms which word or sound is heard            -> tiny/whisper
     instructblip  one still + instruction -> the answer or the caption, query i saying word i
                   through language_projection and the frozen LLaMA's lm_head  -> tiny/instructblip

Run by `python miniature.py pretrain [llama whisper instructblip]`, in this order.
What each run printed stands in tiny/README.md."""

import io
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn

import hub
import miniature as world
from favor import prompt_ids
from llama import Llama, LlamaConfig, Tokenizer
from vit_qformer import QFormerConfig, QFormerTokenizer, VisualEncoder, ViTConfig, preprocess
from whisper_enc import WhisperConfig, WhisperEncoder, log_mel_spectrogram

TINY = Path(__file__).parent / "tiny"
NOTHING = world.NOTHING                         # also the word for a query with no more to say


def train_loop(name, steps, parameters, batch_loss, lr, log_every=200):
    """AdamW with warm-up and cosine decay over `batch_loss(step) -> (loss, dict of numbers)`."""
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
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        if (step + 1) % log_every == 0 or step + 1 == steps:
            seconds = time.time() - started
            shown = ", ".join(f"{k} {v:.3f}" for k, v in numbers.items())
            print(f"{name} {step + 1}/{steps}: loss {loss.item():.3f}, {shown}, {seconds:.0f} s, "
                  f"ETA {seconds / (step + 1) * (steps - step - 1):.0f} s", flush=True)


def read_out(labels, silence=0):
    """Frame-wise labels (T,) -> what was said: repeats merged, silence dropped."""
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
    """(B,M,T) -> as if spoken by others: the frequency axis stretched by up to 14 % (a longer or
    shorter vocal tract), tilted, and up to twelve neighbouring bands silenced."""
    B, M, T = mel.shape
    band = torch.arange(M) * torch.empty(B, 1).uniform_(0.87, 1.15)                      # (B,M)
    low = band.long().clamp(max=M - 1)
    part = (band - low).clamp(0, 1)[..., None]
    rows = lambda index: mel.gather(1, index[..., None].expand(-1, -1, T))               # noqa: E731
    mel = (1 - part) * rows(low) + part * rows((low + 1).clamp(max=M - 1))
    mel = mel + torch.empty(B, 1, 1).uniform_(-0.4, 0.4) * torch.linspace(-1, 1, M)[:, None]
    first, count = torch.randint(0, M, (B, 1)), torch.randint(0, 13, (B, 1))
    silenced = (torch.arange(M) >= first) & (torch.arange(M) < first + count)            # (B,M)
    return torch.where(silenced[..., None], mel.amin(dim=(1, 2), keepdim=True), mel)


def pretrain_whisper(steps=3000, varied_steps=1500, batch=32, seed=1):
    """First the voices as they are, then `varied_steps` with other_voices, without which the test
    voices are understood much worse."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, head = WhisperEncoder(WHISPER), nn.Linear(WHISPER.width, len(HEARD))
    encoder.embed_positions.requires_grad_(False)                    # Whisper's are fixed sinusoids

    def batch_of(split, n):
        clips = [listening_clip(rng, split) for _ in range(n)]
        return (mel_of(torch.from_numpy(np.stack([c[0] for c in clips]))),
                torch.from_numpy(np.stack([c[1] for c in clips])))

    def loss_of(change):
        def loss(step):
            mel, labels = batch_of("train", batch)
            logits = head(encoder(change(mel)))                                      # (B,P,classes)
            right = (logits.argmax(-1) == labels)[labels > 0].float().mean()
            return (F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
                    {"frames right": right.item()})
        return loss

    parameters = [p for m in (encoder, head) for p in m.parameters() if p.requires_grad]
    train_loop("whisper", steps, parameters, loss_of(lambda mel: mel), lr=2e-3)
    train_loop("whisper, varied", varied_steps, parameters, loss_of(other_voices), lr=1e-3)
    save_whisper(encoder)
    encoder.eval()
    with torch.no_grad():                                              # how good it is alone
        for split in ("train", "test"):
            right = total = errors = spoken = 0
            for _ in range(8):
                mel, labels = batch_of(split, 64)
                said = head(encoder(mel)).argmax(-1)
                right += (said == labels)[labels > 0].sum().item()
                total += (labels > 0).sum().item()
                for ours, theirs in zip(said.tolist(), labels.tolist(), strict=True):
                    from metrics import edit_distance
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
CONTENT_NOISE = 0.5        # clips will speak in vectors near words, not in words: train for that


def told_in_words(rng, scene, question):
    """A scene's facts as words that stand in for the clip's vectors, each a group of one: frame by
    frame what is seen, then what is heard; every frame, or changes only."""
    task, _, target, extras = question
    if task == "vqa" and (extras["type"] == "place" or rng.random() < 0.7):
        return [[word] for word in target.split()]        # the Q-Former has answered already
    every, words, last = rng.random() < 0.5, [], None
    for seen, heard in frames_of(scene, extras):
        shown = seen if every and len(seen) <= 3 or seen != last else []
        words += shown + heard or ([NOTHING] if every else [])
        last = seen
    return [[word] for word in words]


def told_in_vectors(rng, scene, question):
    """As told_in_words, but what belongs together is one group and becomes one vector: a frame with
    its sound, an object of a still.  This is nearer to what the causal Q-Former will say."""
    if rng.random() < 0.3:
        return told_in_words(rng, scene, question)
    every, groups, last = rng.random() < 0.6, [], None
    for seen, heard in frames_of(scene, question[3]):
        if len(seen) > 3:                                  # a still: told once, then what is heard
            pairs = [seen[i:i + 2] for i in range(0, len(seen), 2)]
            groups += (pairs if seen != last else []) + ([heard] if heard else [])
        elif every or seen != last or heard:
            groups.append(seen + heard or [NOTHING])
        last = seen
    return groups


def frames_of(scene, extras):
    """[(words seen, words heard)] of the clip with the sound that the question is about."""
    for seen, heard in scene.facts:
        heard = heard[extras["audio"]] if isinstance(heard, dict) else heard
        yield [word for word in seen if word != NOTHING], heard


def language(rng, n):
    """n samples (groups of words, turns), turns = ((question, answer), ...), from all scenes."""
    out = []
    while len(out) < n:
        scene = world.SCENES[str(rng.choice(list(world.SCENES)))](rng, "train")
        out += [(told_in_words(rng, scene, question),
                 (*question[3].get("history", ()), (question[1], question[2])))
                for question in scene.questions]
    return out[:n]


TALKED_ABOUT = {"parade": 3, "concert": 3, "spoken_question": 2}       # others: 0.5


def dialogues(rng, n, tell=told_in_words):
    """n samples as language(), with many questions about each clip, mostly about those scenes whose
    answers must be looked up (what came after what): one by one they are hardly learnt."""
    scenes, out = list(world.SCENES), []
    weights = np.array([TALKED_ABOUT.get(scene, 0.5) for scene in scenes])
    while len(out) < n:
        scene = world.SCENES[str(rng.choice(scenes, p=weights / weights.sum()))](rng, "train")
        first = scene.questions[int(rng.integers(len(scene.questions)))]
        first = scene.questions[0] if first[0] == "vqa" else first
        turns = [*first[3].get("history", ()), (first[1], first[2])]
        if scene.ask:
            turns += [(q[1], q[2]) for _ in range(2) for q in scene.ask()
                      if q[3].get("type") != "place"]
        if rng.random() < 0.6:                             # without the options
            turns = [(question.split(" Choose")[0], answer) for question, answer in turns]
        out.append((tell(rng, scene, first), tuple(turns)))
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
    return Tokenizer.from_pretrained(TINY / "llama")


def text_and_labels(tokenizer, n_clip, turns):
    """-> ids before the clip's n_clip vectors, ids after them, labels of the whole row (-100 where
    no answer or its </s> is to be said)."""
    labels = []
    for k, (question, target) in enumerate(turns):
        before, after, answer = prompt_ids(tokenizer, question, turns[:k], target)
        asked = len(before) + n_clip + len(after)
        labels += [-100] * (asked - len(labels)) + answer
    return before, after + answer, labels


def pretrain_llama(steps=4000, dialogue_steps=1000, vector_steps=600, seed=2):
    """Single questions, then dialogues, about clips told in words; then clips told in vectors, each
    the sum of a few words' embeddings."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer(rng)
    llm = Llama(LlamaConfig(vocab_size=tokenizer.vocab_size, **LLAMA))
    print(f"llama: {sum(p.numel() for p in llm.parameters()) / 1e6:.2f} M parameters, "
          f"{tokenizer.vocab_size} pieces", flush=True)

    def embed(ids):
        return llm.embed(torch.tensor([ids]))[0]                                         # (T,D)

    def clip_vectors(told):
        return torch.stack([sum(embed(tokenizer.encode(word)).sum(0) for word in group)
                            for group in told])                                          # (T,D)

    def loss_of(samples, batch, noise=CONTENT_NOISE):
        def loss(step):
            rows, labels = [], []
            for told, turns in samples(rng, batch):
                before, after, wanted = text_and_labels(tokenizer, len(told), turns)
                clip = clip_vectors(told)
                clip = clip + rng.uniform(0, noise) * clip.detach().std() * torch.randn_like(clip)
                rows.append(torch.cat([embed(before), clip, embed(after)]))
                labels.append(torch.tensor(wanted))
            embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)                   # (B,T,D)
            labels = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            keep = torch.arange(embeds.shape[1]) < torch.tensor([[len(row)] for row in rows])
            asked = labels[:, 1:] >= 0
            hidden = llm.hidden(embeds=embeds, mask=keep)[:, :-1]
            logits, wanted = llm.lm_head(hidden[asked]), labels[:, 1:][asked]
            right = (logits.argmax(-1) == wanted)[wanted != tokenizer.eos_id]
            return F.cross_entropy(logits, wanted), {"tokens right": right.float().mean().item()}
        return loss

    llm.train().requires_grad_(True)
    parameters = list(llm.parameters())
    train_loop("llama", steps, parameters, loss_of(language, 48), lr=1.5e-3)
    train_loop("llama, dialogues", dialogue_steps, parameters, loss_of(dialogues, 32), lr=1.5e-3)
    train_loop("llama, frames as vectors", vector_steps, parameters,
               loss_of(partial(dialogues, tell=told_in_vectors), 32), lr=1.2e-3)
    llm.eval()
    llm.save_pretrained(TINY / "llama", dtype=torch.float16)
    llama_alone(llm, tokenizer, rng)


@torch.no_grad()
def llama_alone(llm, tokenizer, rng, n=600):
    """Prints how many whole answers are right when clips are told in words and in vectors."""
    for tell in (told_in_words, told_in_vectors):
        tally = {}
        for _ in range(n):
            scene = world.SCENES[str(rng.choice(list(world.SCENES)))](rng, "train")
            question = scene.questions[int(rng.integers(len(scene.questions)))]
            told = tell(rng, scene, question)
            turns = (*question[3].get("history", ()), (question[1], question[2]))
            before, after, _ = prompt_ids(tokenizer, question[1], turns[:-1])
            embed = lambda ids: llm.embed(torch.tensor([ids]))[0]                # noqa: E731
            clip = torch.stack([sum(embed(tokenizer.encode(w)).sum(0) for w in g) for g in told])
            said = llm.generate(embeds=torch.cat([embed(before), clip, embed(after)])[None],
                                max_new_tokens=24)[0]
            kind = f"{question[0]} {question[3].get('type', '')}".strip()
            tally.setdefault(kind, []).append(tokenizer.decode(said).strip() == question[2])
        print(f"llama alone, {tell.__name__}, whole answers right: " + "; ".join(
            f"{kind} {100 * np.mean(v):.0f} % ({len(v)})" for kind, v in sorted(tally.items())),
            flush=True)


# ---------------------------------------------------------------- instructblip: stills, questions
VIT = ViTConfig(width=96, layers=3, heads=4, ffn=384, image_size=32, patch_size=8)
CAPTION, ANSWER = 8, 2                            # queries that say what is there, and the answer


def qformer_vocabulary():
    """WordPiece entries: the specials, whole words, and letters so that any text has ids."""
    prompts = " ".join([
        *world.PROMPTS.values(), "What colour shape comes right after before the object "
        "at and is it that Choose one from Where Which sounds are heard objects light up"])
    words = set("".join(c if c.isalpha() else " " for c in prompts.lower()).split())
    words |= {*world.COLOURS, *world.SHAPES, *world.SOUNDS, *world.WORDS, *world.LIPS,
              "top", "left", "right", "bottom", "lit", "dark", NOTHING}
    letters = [chr(c) for c in range(97, 123)] + [str(d) for d in range(10)]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?!'-:;()", *letters,
            *("##" + c for c in letters), *sorted(words - set(letters)), "[DEC]"]


LOOKED_AT = {"still": 12, "number": 10, "spoken_question": 3, "spoken_caption": 2, "parade": 1,
             "lips": 1, "concert": 1, "lamps": 1, "flash": 1}       # how often, against each other


def strange_colours(rng, image):
    """The picture with its channels mixed at random: shapes in colours that have no name."""
    mix = rng.uniform(-0.3, 1, (3, 3))
    return np.clip(image @ (mix / mix.sum(axis=0)).clip(-1, 2), 0, 255).astype(np.uint8)


def looking_samples(rng, split, n, strange=0.0):
    """n (image (64,64,3), instruction, words for the 10 queries): the caption of the picture, and
    behind it the answer where the picture alone gives it.  A share `strange` of the pictures has
    strange colours and None for words that would then be wrong: shapes have to be told apart by
    their form, or pairs of colour and shape that were never shown are not recognised."""
    weights = np.array(list(LOOKED_AT.values())) / sum(LOOKED_AT.values())
    out = []
    while len(out) < n:
        scene = world.SCENES[str(rng.choice(list(LOOKED_AT), p=weights))](rng, split)
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
    """Cross-entropy of (F,V,words), in which NOTHING, most of what there is to say, weighs less and
    -1 is not asked for."""
    weight = 0.15 * (wanted == 0) + (wanted > 0)
    ce = F.cross_entropy(logits.flatten(0, 1), wanted.flatten().clamp(min=0), reduction="none")
    right = (logits.argmax(-1) == wanted)
    numbers = {"caption words": right[:, :CAPTION][wanted[:, :CAPTION] > 0].float().mean().item()}
    if wanted.shape[1] > CAPTION:
        numbers["answer words"] = right[:, CAPTION:][wanted[:, CAPTION:] > 0].float().mean().item()
    return (ce * weight.flatten()).sum() / weight.sum(), numbers


def pretrain_instructblip(vit_steps=1500, steps=2500, joint_steps=2000, batch=64, seed=3):
    """In four stages: the ViT alone (captions, read from all its tokens), the Q-Former on the
    frozen ViT (query i says word i), both together, the projection to the frozen LLaMA."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    folder = TINY / "instructblip"
    (folder / "qformer_tokenizer").mkdir(parents=True, exist_ok=True)
    vocabulary = qformer_vocabulary()
    (folder / "qformer_tokenizer" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = QFormerTokenizer.from_pretrained(folder)
    qformer = QFormerConfig(width=96, layers=4, heads=4, ffn=384, vocab_size=len(vocabulary),
                            max_positions=128, encoder_width=VIT.width)
    encoder, head = (VisualEncoder(VIT, qformer, CAPTION + ANSWER),
                     nn.Linear(qformer.width, len(SAYABLE)))
    initialise(encoder)
    flat_head = nn.Linear((VIT.n_patches + 1) * VIT.width, CAPTION * len(SAYABLE))

    def batch_of(split, n, strange=0.0):
        samples = looking_samples(rng, split, n, strange)
        pixels = preprocess(np.stack([s[0] for s in samples]), VIT.image_size)
        pixels = pixels + 0.05 * torch.randn_like(pixels)            # 3 of 255: what a codec may do
        return pixels, *tokenizer([s[1] for s in samples]), torch.tensor(
            [[-1 if w is None else SAYABLE.index(w) for w in s[2]] for s in samples]), samples

    def vit_loss(step):
        pixels, _, _, wanted, _ = batch_of("train", batch, strange=0.3)
        logits = flat_head(encoder.encode_image(pixels).flatten(1)).unflatten(1, (CAPTION, -1))
        return say_loss(logits, wanted[:, :CAPTION])

    def qformer_loss(read_out):
        def loss(step):
            pixels, ids, mask, wanted, _ = batch_of("train", batch, strange=0.3)
            return say_loss(read_out(encoder(pixels, ids, mask)), wanted)             # (F,V,words)
        return loss

    train_loop("vit", vit_steps, [*encoder.vit.parameters(), *flat_head.parameters()], vit_loss,
               lr=2e-3)
    encoder.vit.requires_grad_(False)
    parameters = [p for m in (encoder.qformer, head)
                  for p in m.parameters()] + [encoder.query_tokens]
    train_loop("qformer", steps, parameters, qformer_loss(head), lr=1.5e-3)
    encoder.vit.requires_grad_(True)
    train_loop("vit and qformer", joint_steps, [*encoder.vit.parameters(), *parameters],
               qformer_loss(head), lr=1e-3)
    encoder.eval().requires_grad_(False)
    llm = Llama.from_pretrained(TINY / "llama").requires_grad_(False)
    words = [Tokenizer.from_pretrained(TINY / "llama").encode(word)[-1] for word in SAYABLE]
    projection = nn.Linear(qformer.width, llm.config.width)

    def say(queries):
        return llm.lm_head(projection(queries))[..., words]

    train_loop("language_projection", 400, list(projection.parameters()), qformer_loss(say),
               lr=5e-3)
    save_instructblip(encoder, projection)
    with torch.no_grad():                                              # how good it is alone
        for split in ("train", "test"):
            tally = {}
            for _ in range(20):
                pixels, ids, mask, wanted, samples = batch_of(split, 100)
                right = say(encoder(pixels, ids, mask)).argmax(-1) == wanted
                for (_, prompt, words_), ok in zip(samples, right, strict=True):
                    task = next((k for k, v in world.PROMPTS.items() if v == prompt),
                                prompt.split(" the ")[0])
                    answers = words_[CAPTION] != NOTHING
                    tally.setdefault(task, []).append(
                        (ok[CAPTION:] if answers else ok[:CAPTION]).all().item())
            print(f"instructblip alone, {split} scenes, all words right: " + "; ".join(
                f"{task} {100 * np.mean(v):.1f} % ({len(v)})"
                for task, v in sorted(tally.items())), flush=True)


def initialise(encoder):
    """N(0, 1/fan-in) matrices, embeddings of a size that positions can be told apart by."""
    for name, parameter in encoder.named_parameters():
        if parameter.ndim >= 2 and "patch" not in name:
            embedding = any(word in name for word in ("embedding", "query_tokens"))
            nn.init.normal_(parameter, std=0.5 if embedding else parameter.shape[-1] ** -0.5)


def save_instructblip(encoder, projection):
    vit, q = encoder.vit.config, encoder.qformer.config
    tensors = {n.replace("vit.", "vision_model.", 1) if n.startswith("vit.") else n: t
               for n, t in encoder.state_dict().items()}
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
        "text_config": json.loads((TINY / "llama" / "config.json").read_text())})


PARTS = {"llama": pretrain_llama, "whisper": pretrain_whisper,
         "instructblip": pretrain_instructblip}


def pretrain(parts=()):
    """Trains the named parts (all of them by default) and overwrites their folders in tiny/."""
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise SystemExit(f"unknown parts {sorted(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for part in parts or PARTS:
        PARTS[part]()
