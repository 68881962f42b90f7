"""Whisper's text decoder; with it, the paper's baseline on asr and avsr.  Radford et al. 2022.

     audio (S,) --chunks of 30 s, encoder--> (B,P,D) --keys, values of every layer, once--> cache
     ids (B,T) --embed, positions--> (B,T,D) --blocks: x + self attention over the tokens so far,
       x + cross attention over the sound, x + mlp--> norm --embed_tokens transposed--> (B,T,vocab)
     transcribe: <|startoftranscript|><|en|><|transcribe|><|notimestamps|> --greedy, beams--> text
     more than 30 s: window after window, each from the last time stamp of the one before it

   B chunks, P positions (1500 per chunk), T tokens, D width, N beams; S samples.
   Parameter names are the Hub's after "model.decoder.", so state_dict() is the published layout.
   Public: WhisperBaseline, Whisper, WhisperDecoder, WhisperDecoderConfig, WhisperTokenizer."""

import dataclasses
import zlib
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

# Long recordings, Sec. 4.5 of Whisper's paper: a window whose text loops or is a guess is decoded
# again by sampling at the next temperature.  DIFF for long sound: one sample each, Whisper's own
# code takes the best of five.
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MOST_COMPRESSED = 2.4                 # bytes of the text / bytes after zlib: above it, it loops
LEAST_LOGPROB = -1.0                  # mean log-probability of the ids: below it, it is a guess
NO_SPEECH = 0.6                       # probability of "no speech" that makes a guess silence
FORGET = 0.5                          # above this temperature the text is no context for later ones


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
            try:
                self.bpe = Tokenizer.from_file(str(root / "tokenizer.json"))
            except Exception as error:        # the library raises nothing more specific
                raise ValueError(f"{root / 'tokenizer.json'}: not readable ({error}); download it "
                                 "again") from None
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
    first id (the end, a lone space), is_multilingual false makes the prefix an English-only one,
    max_initial_timestamp_index is the latest first time stamp, in steps of 0.02 s."""

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
        self.first_time = self.prefix[-1] + 1         # <|0.00|>; others follow, one every 0.02 s
        self.latest_start = self.first_time + settings.get("max_initial_timestamp_index", 50)
        never = settings.get("suppress_tokens") or []
        first = never + (settings.get("begin_suppress_tokens") or [])
        self.register_buffer("banned", torch.stack([               # (2,vocab): first step, others
            torch.isin(torch.arange(vocab), torch.tensor(ids, dtype=torch.long))
            for ids in (first, never)]), persistent=False)

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None):
        """Hub repo id or local folder with weights and tokenizer -> frozen, in eval mode."""
        root = hub.folder(source, ("*.json", "merges.txt"))
        config = WhisperDecoderConfig.from_folder(root)          # refuses another model by name
        tokenizer = WhisperTokenizer(root)    # before the weights: what is missing shows at once
        decoder = hub.load_module(lambda: WhisperDecoder(config), root, dtype, device,
                                  prefix=("model.decoder.", "decoder."))
        encoder = WhisperEncoder.from_pretrained(root, dtype, device)
        file = root / "generation_config.json"
        settings = checked_settings(file if file.exists() else root / "config.json")
        whisper = cls(encoder, decoder, tokenizer, settings).to(device or "cpu")
        return whisper.eval().requires_grad_(False)

    @torch.no_grad()
    def transcribe(self, audios, beams=1, max_new_tokens=None):
        """List of B waveforms (S,), 16 kHz, of any length -> list of B texts, English.
        max_new_tokens: for each window of 30 s; None: all that the positions leave room for."""
        audios, config = [checked_audio(audio) for audio in audios], self.encoder.config
        for index, audio in enumerate(audios):
            if audio.ndim != 1 or len(audio) == 0:
                raise ValueError(f"audio {index} has shape {tuple(audio.shape)}; wanted (S,), mono "
                                 "and not empty; leave out what has no sound")
        short = [i for i, audio in enumerate(audios) if len(audio) <= config.chunk_samples]
        texts = ["" if i in short else self.transcribe_long(audio, beams, max_new_tokens)
                 for i, audio in enumerate(audios)]
        for start in range(0, len(short), CHUNKS_AT_ONCE):
            owners = short[start:start + CHUNKS_AT_ONCE]
            mel = torch.cat([self._log_mel(audios[i], config.chunk_samples) for i in owners])
            ids = self.generate(self.encoder(mel), beams, max_new_tokens)      # of (B,M,2P)
            for owner, new in zip(owners, ids, strict=True):
                texts[owner] = self.tokenizer.decode(new)
        return texts

    def _log_mel(self, audio, samples):
        """(S,) padded to so many samples -> (1,M,samples/hop)."""
        config = self.encoder.config
        return log_mel_spectrogram(audio.to(self.banned.device), samples, config.n_fft, config.hop,
                                   config.n_mels, config.sample_rate)

    @torch.no_grad()
    def transcribe_long(self, audio, beams=1, max_new_tokens=None):
        """A waveform (S,) of more than 30 s -> its text, by windows of 30 s with time stamps.  Each
        starts where the last whole segment of the one before it ended, and is told the text so
        far; the loudest point of the whole recording sets the floor of its spectrogram."""
        if self.first_time >= self.decoder.config.vocab_size:
            raise ValueError("this Whisper knows no time stamps, which sound of over 30 s needs; "
                             "take a published one or shorter clips")
        config, size = self.encoder.config, self.encoder.config.chunk_samples
        frames, size = len(audio) // config.hop, size // config.hop            # of 10 ms
        mel = self._log_mel(audio, len(audio) + config.chunk_samples)[..., :frames]
        generator = torch.Generator(mel.device).manual_seed(0)
        spoken, context, seek = [], [], 0
        while seek < frames:
            window = mel[..., seek:seek + size]                                # (1,M,<=2P)
            encoded = self.encoder(F.pad(window, (0, size - window.shape[2])))
            ids, temperature = self._decode_window(encoded, context, beams, max_new_tokens,
                                                   generator)
            segments, ended = self._segments(ids)
            kept = [i for segment in segments if self._has_words(segment) for i in segment]
            seek += 2 * ended or window.shape[2]                # two frames every 0.02 s
            spoken += kept
            context = [] if temperature > FORGET else context + kept
        return self.tokenizer.decode(spoken)

    def _decode_window(self, encoded, context, beams, max_new_tokens, generator):
        """encoded (1,P,D), ids so far -> new ids with time stamps, none in silence, and the
        temperature that they were found at."""
        most, prefix = self.decoder.config.max_target_positions, self.prefix[:-1]
        if context:
            context = [self.tokenizer.ids["<|startofprev|>"], *context[-(most // 2 - 1):]]
        steps = most // 2 if max_new_tokens is None else max_new_tokens
        steps = min(steps, most - len(context) - len(prefix))
        if steps < 1 or beams < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}, beams={beams}; wanted at least 1")
        prompt, attempts = torch.tensor([context + prefix], device=encoded.device), []
        for temperature in TEMPERATURES:
            cache = self.decoder.listen(encoded)
            logits = self.decoder(prompt, cache)                               # (1,T,vocab)
            # What Whisper expects behind <|startoftranscript|> may be that nobody speaks.
            silence = logits[0, len(context)].float().softmax(-1)[self.first_time - 2]
            if beams > 1 and not temperature:
                (ids,), (score,) = self._beam_search(logits[:, -1], cache, steps, beams, times=True)
            else:
                (ids,), (score,) = self._greedy(logits[:, -1], cache, steps, True, temperature,
                                                generator)
            if score < LEAST_LOGPROB and silence > NO_SPEECH:
                return [], temperature
            text = self.tokenizer.decode(ids).encode()
            loops = len(text) > MOST_COMPRESSED * len(zlib.compress(text))
            if not loops and score >= LEAST_LOGPROB:
                return ids, temperature
            attempts.append((score, ids))
        # DIFF for long sound: if no temperature gives a sure text without repetition, the speaker
        # repeats himself, and the first sure text is taken; Whisper's own code takes the last text.
        sure = [ids for score, ids in attempts if score >= LEAST_LOGPROB]
        return sure[0] if sure else ids, temperature

    def _segments(self, ids):
        """New ids of a window -> those of each whole segment, and where the next window starts, in
        steps of 0.02 s; 0: behind this one.  A segment ends with a time stamp, and where one more
        follows, another segment starts.  What follows the last pair was cut off by the end of
        the window and is heard again, unless a time stamp ends it."""
        times = [i >= self.first_time for i in ids]
        cuts = [k for k in range(1, len(ids)) if times[k - 1] and times[k]]
        whole = not cuts or times[-2:] == [False, True]
        ended = 0 if whole else ids[cuts[-1] - 1] - self.first_time
        parts = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
        return parts if whole else parts[:-1], ended

    def _has_words(self, segment):
        """Words that take no time at all are made up: their two time stamps are the same."""
        return self.tokenizer.decode(segment) and (len(segment) < 2 or segment[0] != segment[-1])

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
            return self._greedy(logits, cache, steps)[0]
        return self._beam_search(logits, cache, steps, beams)[0]

    def _allowed(self, scores, new, times):
        """scores (R,vocab) of what may follow the new ids (R,T), -inf for what must not.  With
        `times` these are Whisper's rules for time stamps: one at the start, at most 1 s; then one
        or, unless the text ends, two equal or growing ones after each piece of text; and always one
        where all of them together are likelier than the likeliest word."""
        scores = scores.masked_fill(self.banned[min(new.shape[1], 1)], -torch.inf)
        if not times:
            return scores
        first, end = self.first_time, self.tokenizer.end_id
        scores[:, first - 1] = -torch.inf                                      # <|notimestamps|>
        for row, ids in zip(scores, new.tolist(), strict=True):
            past = [i for i in ids if i >= first]
            if not ids:
                row[:first] = row[self.latest_start + 1:] = -torch.inf
            elif ids[-1] >= first:
                paired = len(ids) == 1 or ids[-2] >= first
                row[first:] = -torch.inf if paired else row[first:]
                row[:end] = row[:end] if paired else -torch.inf
                row[first:past[-1]] = -torch.inf
            elif past:
                row[first:past[-1] + 1] = -torch.inf
        logprobs = scores.float().log_softmax(-1)                              # (R,vocab)
        likelier = logprobs[:, first:].logsumexp(-1) > logprobs[:, :first].amax(-1)
        scores[:, :first].masked_fill_(likelier[:, None], -torch.inf)
        return scores

    def _greedy(self, logits, cache, steps, times=False, temperature=0.0, generator=None):
        """-> new ids of each row and their mean log-probability; above temperature 0 sampled."""
        end, new = self.tokenizer.end_id, logits.new_empty(len(logits), 0, dtype=torch.long)
        total, lengths = 0.0, 0
        for step in range(steps):
            logits = self.decoder(new[:, -1:], cache)[:, -1] if step else logits
            scores, on = self._allowed(logits, new, times), ~(new == end).any(dim=1)
            if temperature:
                best = torch.multinomial((scores.float() / temperature).softmax(-1), 1,
                                         generator=generator)                  # (B,1)
            else:
                best = scores.argmax(-1, keepdim=True)
            if times:
                total = total + on * scores.float().log_softmax(-1).gather(1, best)[:, 0]
                lengths = lengths + on
            new = torch.cat((new, best), dim=1)
            if (new == end).any(dim=1).all():
                break
        rows = [row[:row.index(end)] if end in row else row for row in new.tolist()]
        return rows, (total / lengths).tolist() if times else None

    def _beam_search(self, logits, cache, steps, count, times=False):
        """-> ids with the best sum of log-probabilities / length of each row, and that quotient;
        llama.Beams has the rules."""
        B, vocab = logits.shape
        rows = torch.arange(B * count, device=logits.device).view(B, count)    # a chunk's N beams
        cache.reorder(rows.flatten() // count)
        logits = logits[rows.flatten() // count]                               # (B*N,vocab)
        sums = logits.new_full((B, count), -1e9, dtype=torch.float)
        sums[:, 0] = 0.0                  # all beams are the same prefix: only the first may branch
        new = rows.new_empty(B * count, 0)
        chunks = [Beams(count, 1.0, [self.tokenizer.end_id]) for _ in range(B)]
        for step in range(steps):
            scores = self._allowed(logits.float().log_softmax(-1), new, times) + sums.view(-1, 1)
            best, index = scores.view(B, -1).topk(2 * count, dim=1)            # half may be ends
            beam, token = index // vocab, index % vocab                        # (B,2*N)
            last = step + 1 == steps
            on = [chunk.step(*candidates, last) for chunk, *candidates in zip(
                chunks, best.tolist(), beam.tolist(), token.tolist(), strict=True)]
            if last or not any(chunk.open for chunk in chunks):
                break
            on = torch.tensor(on, device=index.device)                         # (B,N)
            sums, token = best.gather(1, on), token.gather(1, on).view(-1, 1)
            order = (beam.gather(1, on) + rows[:, :1]).flatten()
            cache.reorder(order)
            new = torch.cat((new[order], token), dim=1)
            logits = self.decoder(token, cache)[:, -1]
        scores, ids = zip(*(chunk.answers[0] for chunk in chunks), strict=True)
        return list(ids), list(scores)


def checked_settings(path):
    """A generation_config.json -> dict. ValueError if what Whisper reads of it is of a wrong kind.
    """
    settings = {key: value for key, value in hub.read_object(path).items() if value is not None}
    for key in ("suppress_tokens", "begin_suppress_tokens"):
        ids = settings.get(key, [])
        if not isinstance(ids, list) or any(type(i) is not int or abs(i) > 2 ** 31 for i in ids):
            raise ValueError(f"{path}: {key} is {ids!r:.80}; wanted a list of ids")
    index = settings.get("max_initial_timestamp_index", 0)
    if type(index) is not int or not 0 <= index <= hub.LARGEST_SIZE:
        raise ValueError(f"{path}: max_initial_timestamp_index is {index!r:.80}; wanted a whole "
                         "number of 0 or more")
    return settings


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
