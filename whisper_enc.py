"""Whisper's audio encoder: a 16 kHz waveform -> 50 vectors per second.
   Radford et al. 2022 (Whisper) Sec. 2.2; frozen in FAVOR, Sec. 3.1.

     audio (S,) --chunks of 30 s--> (B,480000) --log-mel--> (B,M,3000)
       --conv, conv stride 2--> (B,1500,D) --+ positions, blocks, norm--> (B,1500,D)
       --concatenate, cut to the true length--> (ceil(S/320),D)           D = 1280 for large-v2

   B chunks, M mel bins, D width; in this file S counts samples, P encoder positions (1500 per
   chunk), h heads. Parameter names are the Hub's after "model.encoder.", so state_dict() is the
   published layout.
   Public: WhisperConfig, WhisperEncoder, log_mel_spectrogram, resample, SAMPLE_RATE."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from einops import rearrange
from torch import nn

from runtime import hub

SAMPLE_RATE = 16000                   # Hz
CHUNKS_AT_ONCE = 8                    # 8 * 30 s = 4 min: bounds the memory of encode()
SPECTRUM = ("n_fft", "hop_length", "feature_size", "n_samples", "chunk_length", "nb_max_frames")
# Settings of transformers' WhisperFeatureExtractor with the values that encode() stands for.
PREPARATION = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": SAMPLE_RATE,
               "padding_side": "right", "padding_value": 0.0, "dither": 0.0, "do_normalize": False}
FP16_LIMIT = 65504 - 1000             # fp16 ends at 65504; Whisper's residual stream can get there


@dataclass(frozen=True)
class WhisperConfig:
    """The encoder and its spectrogram; defaults are large-v2's."""
    n_mels: int = 80
    width: int = 1280
    layers: int = 32
    heads: int = 20
    ffn: int = 5120
    max_source_positions: int = 1500
    sample_rate: int = SAMPLE_RATE
    n_fft: int = 400                  # 400 / 16000 Hz = 25 ms
    hop: int = 160                    # 160 / 16000 Hz = 10 ms

    @property
    def chunk_samples(self):
        """Samples per chunk: 1500 * 2 * 160 = 480000 = 30 s."""
        return self.max_source_positions * 2 * self.hop

    @property
    def positions_hz(self):
        """Encoder positions per second: 16000 / (2 * 160) = 50."""
        return self.sample_rate // (2 * self.hop)

    def __post_init__(self):
        if self.width % self.heads or self.width % 2:
            raise ValueError(f"width {self.width}, {self.heads} heads; wanted a width that is even "
                             "and a multiple of the heads")

    @classmethod
    def from_folder(cls, root):
        """From config.json and, where there is one, preprocessor_config.json or
        processor_config.json. ValueError for settings that are not built here."""
        model = hub.model_config(root, "whisper")
        audio, places = hub.processor(root, "feature_extractor", (*SPECTRUM, *PREPARATION))
        for key, wanted in PREPARATION.items():
            if audio.get(key, wanted) != wanted:
                raise ValueError(f"{places[key]}: {key} is {audio[key]!r:.80}; only {wanted!r} "
                                 "(all published Whispers) is built here")
        if model.get("activation_function", "gelu") != "gelu":
            raise ValueError(f"{root}: activation_function {model['activation_function']!r:.80}; "
                             "only 'gelu' (all published Whispers) is built here")
        where = " + ".join(map(str, (root / "config.json", *dict.fromkeys(places.values()))))
        config = hub.make_config(cls, model | audio, {
            "n_mels": "num_mel_bins", "width": "d_model", "layers": "encoder_layers",
            "heads": "encoder_attention_heads", "ffn": "encoder_ffn_dim",
            "max_source_positions": "max_source_positions", "n_fft": "n_fft", "hop": "hop_length"},
            where)
        # What follows from these settings may also stand there, and must agree.
        samples = config.chunk_samples
        for key, wanted in (("feature_size", config.n_mels), ("n_samples", samples),
                            ("chunk_length", samples / SAMPLE_RATE),
                            ("nb_max_frames", samples // config.hop)):
            if audio.get(key, wanted) != wanted:
                raise ValueError(
                    f"{places[key]}: {key} {audio[key]!r:.80}, but {wanted:g} follows from "
                    f"config.json's num_mel_bins {config.n_mels} and max_source_positions "
                    f"{config.max_source_positions} and hop_length {config.hop}; all files must be "
                    "of one model")
        return config


# ---- waveform -> log-mel ------------------------------------------------------------------------

def resample(audio, rate):
    """(...,S) at `rate` Hz -> (...,S * 16000 / rate) at 16 kHz."""
    audio = checked_audio(audio)
    return audio if rate == SAMPLE_RATE or audio.shape[-1] == 0 else AF.resample(
        audio, int(rate), SAMPLE_RATE)


def checked_audio(audio):
    """Any float array -> float32 tensor without NaN or infinity."""
    audio = torch.as_tensor(audio)
    if not audio.is_floating_point():
        raise ValueError(f"audio is {audio.dtype}; wanted floats in [-1, 1] "
                         "(int16 samples: divide by 32768)")
    if not torch.isfinite(audio).all():
        raise ValueError("audio holds NaN or infinite samples; one of them would spoil its whole "
                         "30 s chunk; decode the file again or drop it")
    return audio.float()


@cache
def mel_filterbank(n_fft, n_mels, sample_rate):
    """(n_fft/2+1,M): Slaney's scale and area norm; HTK's would be off by up to 1.5 in log-mel. It
    stays on the CPU, because a cached CUDA tensor would tie the whole process to one device."""
    return AF.melscale_fbanks(n_fft // 2 + 1, 0.0, sample_rate / 2, n_mels, sample_rate,
                              norm="slaney", mel_scale="slaney")


def log_mel_spectrogram(audio, chunk_samples=480000, n_fft=400, hop=160, n_mels=80,
                        sample_rate=SAMPLE_RATE):
    """Floats (S,) or (B,S) -> float32 (B,M,chunk_samples/hop); (S,) gives B = 1.

    Each row is padded with zeros or cut to chunk_samples before the transform. The padding is not
    masked, because Whisper was trained on silence. No sound at all gives -1.5 everywhere."""
    audio = checked_audio(audio)
    if audio.ndim not in (1, 2):
        raise ValueError(f"audio has shape {tuple(audio.shape)}; wanted (S,) or (B,S), mono")
    audio = torch.atleast_2d(audio)[:, :chunk_samples]                 # (S,) -> (B,S)
    audio = F.pad(audio, (0, chunk_samples - audio.shape[1]))          # (B,S) -> (B,chunk_samples)
    window = torch.hann_window(n_fft, device=audio.device)             # periodic
    spectrum = torch.stft(audio, n_fft, hop, window=window, return_complex=True)[..., :-1]
    power = spectrum.real.square() + spectrum.imag.square()            # (B,n_fft/2+1,3000)
    filters = mel_filterbank(n_fft, n_mels, sample_rate).to(audio.device)
    log_mel = (filters.T @ power).clamp_min(1e-10).log10()             # (B,M,3000)
    # The floor is 80 dB below the loudest point of the same row; other rows do not move it.
    log_mel = torch.maximum(log_mel, log_mel.amax((1, 2), keepdim=True) - 8)
    return (log_mel + 4) / 4


# ---- log-mel -> vectors -------------------------------------------------------------------------

class Norm(nn.LayerNorm):
    """LayerNorm, which sums in fp32 whatever it is given; autocast would also return fp32."""
    def forward(self, x):
        return super().forward(x).to(x.dtype)


class SelfAttention(nn.Module):
    """Every position attends to every other one: nothing is masked, not even padding."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)    # a bias would cancel in the softmax
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (rearrange(proj(x), "b p (h d) -> b h p d", h=self.heads)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(x, "b h p d -> b p (h d)"))


class Block(nn.Module):
    """Pre-norm transformer block."""
    def __init__(self, config):
        super().__init__()
        self.self_attn_layer_norm = Norm(config.width)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.final_layer_norm = Norm(config.width)
        self.fc1 = nn.Linear(config.width, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.width)

    def forward(self, x):
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x.clamp(-FP16_LIMIT, FP16_LIMIT) if x.dtype == torch.float16 else x


def sinusoids(positions, width):
    """(P,D): sines in the first half, cosines in the second (not interleaved)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * (-math.log(10000) / (half - 1)))   # (D/2,)
    angles = torch.arange(positions)[:, None] * frequencies                         # (P,D/2)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class WhisperEncoder(nn.Module):
    """Two convolutions, fixed positions, transformer blocks, a last norm."""
    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or WhisperConfig()
        self.conv1 = nn.Conv1d(config.n_mels, config.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.layer_norm = Norm(config.width)
        with torch.no_grad():             # the fixed table; published files hold the same numbers
            self.embed_positions.weight.copy_(
                sinusoids(config.max_source_positions, config.width))

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None):
        """Hub repo id or local folder -> frozen encoder in eval mode; a decoder is left unread."""
        root = hub.folder(source, files=hub.PROCESSOR_FILES,
                          tensors=("model.encoder.", "encoder."))
        config = WhisperConfig.from_folder(root)
        encoder = hub.load_module(lambda: cls(config), root, dtype, device,
                                  prefix=("model.encoder.", "encoder.", ""))
        return encoder.requires_grad_(False)

    def forward(self, mel):
        """(B,M,2P) -> (B,P,D) for any P up to max_source_positions."""
        limit = 2 * self.config.max_source_positions
        if mel.ndim != 3 or mel.shape[1] != self.config.n_mels or not 0 < mel.shape[2] <= limit:
            raise ValueError(f"mel has shape {tuple(mel.shape)}; wanted (B,{self.config.n_mels},n) "
                             f"with 1 <= n <= {limit} (split longer audio, as encode() does)")
        x = F.gelu(self.conv1(mel.to(self.conv1.weight)))    # (B,M,2P) -> (B,D,2P), weights' dtype
        x = F.gelu(self.conv2(x)).transpose(1, 2)            # (B,D,2P) -> (B,P,D)
        x = x + self.embed_positions.weight[:x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)

    def encode(self, audio):
        """(S,) at 16 kHz, any length -> (ceil(S/320),D): 50 vectors per second of sound."""
        return self.encode_all([audio])[0]

    def encode_all(self, audios):
        """encode() for a list, all chunks in one batch -> list of (ceil(S/320),D)."""
        config, chunks = self.config, []
        for audio in map(checked_audio, audios):
            if audio.ndim != 1:
                raise ValueError(f"audio has shape {tuple(audio.shape)}; wanted (S,), mono")
            n = max(1, math.ceil(len(audio) / config.chunk_samples))
            audio = F.pad(audio, (0, n * config.chunk_samples - len(audio)))
            chunks.append(audio.view(n, config.chunk_samples))                 # (B,chunk_samples)
        if not chunks:
            return []
        encoded = torch.cat([
            self(log_mel_spectrogram(part.to(self.conv1.weight.device), config.chunk_samples,
                                     config.n_fft, config.hop, config.n_mels, config.sample_rate))
            for part in torch.cat(chunks).split(CHUNKS_AT_ONCE)])              # (B,P,D)
        return [rearrange(own, "b p d -> (b p) d")[:math.ceil(len(audio) / (2 * config.hop))]
                for own, audio in zip(encoded.split([*map(len, chunks)]), audios, strict=True)]
