"""Whisper's text decoder; with it, the paper's baseline on asr and avsr.  Radford et al. 2022.

     audio (S,) --chunks of 30 s, encoder--> (B,P,D) --keys, values of every layer, once--> cache
     ids (B,T) --embed, positions--> (B,T,D) --blocks: x + self attention over the tokens so far,
       x + cross attention over the sound, x + mlp--> norm --embed_tokens transposed--> (B,T,vocab)
     transcribe: <|startoftranscript|><|en|><|transcribe|><|notimestamps|> --greedy, beams--> text

   B chunks, P positions (1500 per chunk), T tokens, D width, N beams; S samples.
   Parameter names are the Hub's after "model.decoder.", so state_dict() is the published layout.
   Public: WhisperBaseline, Whisper, WhisperDecoder, WhisperDecoderConfig, WhisperTokenizer."""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from data import Features
from favor import load_pretrained
from llama import Beams
from runtime import hub
from whisper_enc import Norm, SelfAttention, WhisperEncoder, checked_audio, log_mel_spectrogram

CHUNKS_AT_ONCE = 8                    # 8 x 30 s, each with all its beams: bounds the memory
ENGLISH_ONLY_VOCAB = 51864            # whisper-*.en: its tokenizer may know <|en|>, unused


@dataclass(frozen=True)
class WhisperDecoderConfig:
    """Defaults are large-v2's."""
    vocab_size: int = 51865
    width: int = 1280
    layers: int = 32
    heads: int = 20
    ffn: int = 5120
    max_target_positions: int = 448   # prefix and text of one chunk

    @classmethod
    def from_folder(cls, root):
        model = hub.model_config(root, "whisper")
        if not model.get("tie_word_embeddings", True):
            raise ValueError(f"{root}: tie_word_embeddings is false; only an output head that is "
                             "embed_tokens (all published Whispers) is built here")
        theirs = {"vocab_size": "vocab_size", "width": "d_model", "layers": "decoder_layers",
                  "heads": "decoder_attention_heads", "ffn": "decoder_ffn_dim",
                  "max_target_positions": "max_target_positions"}
        return hub.make_config(cls, model, theirs, root / "config.json")


# ---- decoder ------------------------------------------------------------------------------------

class Cache:
    """Keys and values, (B,H,P,d) of the sound and (B*N,H,T,d) of the tokens so far, by layer."""

    def __init__(self, cross):
        self.cross, self.tokens, self.length = cross, [None] * len(cross), 0

    def append(self, layer, k, v):
        """k, v (B*N,H,T,d) of the newest tokens -> those of all."""
        if self.tokens[layer] is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self.tokens[layer], (k, v), strict=True))
        self.tokens[layer] = k, v
        return k, v

    def reorder(self, rows):
        """Row i becomes what row rows[i] was. The sound stays: all N beams of a chunk hear it."""
        self.tokens = [(k[rows], v[rows]) for k, v in self.tokens]


class Attention(SelfAttention):
    """The encoder's projections; here keys and values may be older than x, or another's."""

    def keys_values(self, x):
        return [rearrange(proj(x), "b t (h d) -> b h t d", h=self.heads)
                for proj in (self.k_proj, self.v_proj)]

    def forward(self, x, k, v, mask=None):
        # Where k has fewer rows than x, the N beams of a chunk stand in a row as its queries.
        q = rearrange(self.q_proj(x), "(b n) t (h d) -> b h (n t) d", b=len(k), h=self.heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(rearrange(y, "b h (n t) d -> (b n) t (h d)", t=x.shape[1]))


class Block(nn.Module):
    """Pre-norm transformer block; without the encoder's FP16 clamp, as Hugging Face's."""
    def __init__(self, config):
        super().__init__()
        self.self_attn_layer_norm = Norm(config.width)
        self.self_attn = Attention(config.width, config.heads)
        self.encoder_attn_layer_norm = Norm(config.width)
        self.encoder_attn = Attention(config.width, config.heads)
        self.final_layer_norm = Norm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)

    def forward(self, x, mask, cache, index):
        y = self.self_attn_layer_norm(x)
        x = x + self.self_attn(y, *cache.append(index, *self.self_attn.keys_values(y)), mask)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *cache.cross[index])
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperDecoder(nn.Module):
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or WhisperDecoderConfig()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.max_target_positions, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.layer_norm = Norm(config.width)

    def listen(self, encoded):
        """The encoder's (B,P,D) -> the Cache with which decoding starts."""
        return Cache([layer.encoder_attn.keys_values(encoded) for layer in self.layers])

    def forward(self, ids, cache):
        """ids (B,T) that follow those in the cache -> logits (B,T,vocab); the cache grows by T."""
        T, end = ids.shape[1], cache.length + ids.shape[1]
        if end > self.config.max_target_positions:
            raise ValueError(f"{end} tokens, prefix included; this Whisper has positions for "
                             f"{self.config.max_target_positions}")
        x = self.embed_tokens(ids) + self.embed_positions.weight[cache.length:end]
        # A token sees itself and the past: row t of the mask (T,past+T) has past + t + 1 True.
        mask = None if T == 1 else x.new_ones(T, end).bool().tril(cache.length)
        for index, layer in enumerate(self.layers):
            x = layer(x, mask, cache, index)
        cache.length = end
        return F.linear(self.layer_norm(x), self.embed_tokens.weight)          # the tied head


# ---- text ---------------------------------------------------------------------------------------

class WhisperTokenizer:
    """Byte-level BPE from tokenizer.json, or from vocab.json + merges.txt + added_tokens.json."""

    def __init__(self, root):
        parts = [root / name for name in ("vocab.json", "merges.txt")]
        if (root / "tokenizer.json").exists():
            hub.read_json(root / "tokenizer.json")           # its error names the file
            self.bpe = Tokenizer.from_file(str(root / "tokenizer.json"))
        elif all(path.exists() for path in (*parts, root / "added_tokens.json")):
            vocab, merges = models.BPE.read_file(*map(str, parts))
            added = hub.read_json(root / "added_tokens.json")
            # Into the vocabulary: what is only added later gets the next free id, not the file's.
            self.bpe = Tokenizer(models.BPE(vocab | added, merges))
            self.bpe.add_special_tokens(list(added))
            self.bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            self.bpe.decoder = decoders.ByteLevel()
        else:
            raise FileNotFoundError(f"{root}: no tokenizer; wanted tokenizer.json, or vocab.json, "
                                    "merges.txt and added_tokens.json, from the model's Hub repo")
        self.ids = self.bpe.get_vocab()                      # token -> id, special ones too
        names = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
        if missing := [name for name in names if name not in self.ids]:
            raise ValueError(f"{root}: the tokenizer has no {', '.join(missing)}; wanted a "
                             "Whisper's files")
        self.end_id = self.ids["<|endoftext|>"]

    def decode(self, ids):
        """Text of `ids`. Languages, tasks and timestamps all stand from <|endoftext|> on."""
        return self.bpe.decode([i for i in ids if i < self.end_id]).strip()


# ---- speech -> text -----------------------------------------------------------------------------

class Whisper(nn.Module):
    """Encoder, decoder and tokenizer. settings, as in the Hub's generation_config.json:
    suppress_tokens are never produced (special ids, "[", "♪"), begin_suppress_tokens not as the
    first id (the end, a lone space), is_multilingual false makes the prefix an English-only one."""

    def __init__(self, encoder, decoder, tokenizer, settings):
        super().__init__()
        self.encoder, self.decoder, self.tokenizer = encoder, decoder, tokenizer
        vocab, task = decoder.config.vocab_size, ["<|en|>", "<|transcribe|>"]
        if not settings.get("is_multilingual", vocab != ENGLISH_ONLY_VOCAB) \
                or not all(token in tokenizer.ids for token in task):
            task = []
        names = ["<|startoftranscript|>", *task, "<|notimestamps|>"]
        self.prefix = [tokenizer.ids[name] for name in names]
        if max(self.prefix) >= vocab:
            raise ValueError(f"the tokenizer's {names} are {self.prefix}, but the decoder knows "
                             f"{vocab} ids; take both from one model")
        never = settings.get("suppress_tokens") or []
        first = never + (settings.get("begin_suppress_tokens") or [])
        self.register_buffer("banned", torch.stack([               # (2,vocab): first step, others
            torch.isin(torch.arange(vocab), torch.tensor(ids, dtype=torch.long))
            for ids in (first, never)]), persistent=False)

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None):
        """Hub repo id or local folder with weights and tokenizer -> frozen, in eval mode."""
        root = hub.folder(source, ("*.json", "merges.txt"))
        tokenizer = WhisperTokenizer(root)    # before the weights: what is missing shows at once
        config = WhisperDecoderConfig.from_folder(root)
        decoder = hub.load_module(lambda: WhisperDecoder(config), root, dtype, device,
                                  prefix=("model.decoder.", "decoder."))
        encoder = WhisperEncoder.from_pretrained(root, dtype, device)
        file = root / "generation_config.json"
        settings = hub.read_json(file if file.exists() else root / "config.json")
        whisper = cls(encoder, decoder, tokenizer, settings).to(device or "cpu")
        return whisper.eval().requires_grad_(False)

    @torch.no_grad()
    def transcribe(self, audios, beams=1, max_new_tokens=None):
        """List of B waveforms (S,), 16 kHz, of any length -> list of B texts, English. What is
        longer than 30 s is cut into chunks of 30 s, and their texts are joined with a space.
        max_new_tokens: for each chunk; None: as many as there are positions (444)."""
        audios, config = [checked_audio(audio) for audio in audios], self.encoder.config
        for index, audio in enumerate(audios):
            if audio.ndim != 1 or len(audio) == 0:
                raise ValueError(f"audio {index} has shape {tuple(audio.shape)}; wanted (S,), mono "
                                 "and not empty; leave out what has no sound")
        chunks = [(index, chunk) for index, audio in enumerate(audios)
                  for chunk in audio.split(config.chunk_samples)]
        texts = [[] for _ in audios]
        for start in range(0, len(chunks), CHUNKS_AT_ONCE):
            owners, parts = zip(*chunks[start:start + CHUNKS_AT_ONCE], strict=True)
            mel = torch.cat([log_mel_spectrogram(
                part.to(self.banned.device), config.chunk_samples, config.n_fft, config.hop,
                config.n_mels, config.sample_rate) for part in parts])         # (B,M,2P)
            ids = self.generate(self.encoder(mel), beams, max_new_tokens)
            for owner, new in zip(owners, ids, strict=True):
                texts[owner].append(self.tokenizer.decode(new))
        return [" ".join(filter(None, parts)) for parts in texts]

    @torch.no_grad()
    def generate(self, encoded, beams=1, max_new_tokens=None):
        """The encoder's (B,P,D) -> B lists of new ids, without prefix and <|endoftext|>."""
        room = self.decoder.config.max_target_positions - len(self.prefix)
        steps = room if max_new_tokens is None else max_new_tokens
        if not 1 <= steps <= room or beams < 1:
            raise ValueError(f"max_new_tokens={steps}, beams={beams}; wanted 1 to {room} (what the "
                             "prefix leaves of the positions) and at least 1")
        prefix = torch.tensor(self.prefix, device=encoded.device).expand(len(encoded), -1)
        cache = self.decoder.listen(encoded)
        logits = self.decoder(prefix, cache)[:, -1]                            # (B,vocab)
        if beams == 1:
            return self._greedy(logits, cache, steps)
        return self._beam_search(logits, cache, steps, beams)

    def _greedy(self, logits, cache, steps):
        end, new = self.tokenizer.end_id, logits.new_empty(len(logits), 0, dtype=torch.long)
        for step in range(steps):
            logits = self.decoder(new[:, -1:], cache)[:, -1] if step else logits
            best = logits.masked_fill(self.banned[min(step, 1)], -torch.inf).argmax(-1)
            new = torch.cat((new, best[:, None]), dim=1)
            if (new == end).any(dim=1).all():
                break
        return [row[:row.index(end)] if end in row else row for row in new.tolist()]

    def _beam_search(self, logits, cache, steps, count):
        """The best sum of log-probabilities / length; llama.Beams has the rules."""
        B, vocab = logits.shape
        rows = torch.arange(B * count, device=logits.device).view(B, count)    # a chunk's N beams
        cache.reorder(rows.flatten() // count)
        logits = logits[rows.flatten() // count]                               # (B*N,vocab)
        sums = logits.new_full((B, count), -1e9, dtype=torch.float)
        sums[:, 0] = 0.0                  # all beams are the same prefix: only the first may branch
        chunks = [Beams(count, 1.0, [self.tokenizer.end_id]) for _ in range(B)]
        for step in range(steps):
            scores = logits.float().log_softmax(-1) + sums.view(-1, 1)
            scores = scores.masked_fill(self.banned[min(step, 1)], -torch.inf)
            best, index = scores.view(B, -1).topk(2 * count, dim=1)            # half may be ends
            beam, token = index // vocab, index % vocab                        # (B,2*N)
            last = step + 1 == steps
            on = [chunk.step(*candidates, last) for chunk, *candidates in zip(
                chunks, best.tolist(), beam.tolist(), token.tolist(), strict=True)]
            if last or not any(chunk.open for chunk in chunks):
                break
            on = torch.tensor(on, device=index.device)                         # (B,N)
            sums, token = best.gather(1, on), token.gather(1, on).view(-1, 1)
            cache.reorder((beam.gather(1, on) + rows[:, :1]).flatten())
            logits = self.decoder(token, cache)[:, -1]
        return [chunk.answers[0][1] for chunk in chunks]


class WhisperBaseline(nn.Module):
    """The paper's speech baseline (Sec. 4.2, Tables 2 and 3): Whisper with its own decoder and
    public weights.  It transcribes the sound of a clip, whatever the question."""
    system = "whisper"
    tasks = ("asr", "avsr")

    def __init__(self, config, whisper):
        super().__init__()
        self.config, self.whisper = config, whisper

    @classmethod
    def from_config(cls, config, dtype=None, device=None, load=None):
        load = load or load_pretrained
        return cls(config, load(Whisper, config.whisper, dtype=dtype, device=device))

    def clip_options(self):
        return {"sound_only": True}

    def encode_sample(self, sample):
        return dataclasses.replace(sample, features=Features(
            audio=sample.clip.audio if sample.clip else sample.features.audio), clip=None)

    def encode_batch(self, samples):
        return [*map(self.encode_sample, samples)]

    def generate(self, samples, num_beams=1):
        """A transcript of each Sample; "" where there is no sound or it is masked."""
        heard = [None if s.mask in ("audio", "both") else self.encode_sample(s).features.audio
                 for s in samples]
        texts = iter(self.whisper.transcribe(
            [audio for audio in heard if audio is not None], beams=num_beams))
        return ["" if audio is None else next(texts) for audio in heard]
