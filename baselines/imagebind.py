"""ImageBind's audio part: sound -> eight pieces of a spectrogram -> a vector each.
Girdhar et al. 2023 (ImageBind) Sec. 3; Gong et al. 2021 (AST) for the patches.

     wave (channels,S) --16 kHz, 8 pieces of 2 s, Kaldi's filter bank--> (8,1,128,204)
       --patches of 16 x 16, every 10--> (8,228,768) --CLS, positions--> (8,229,768)
       --12 blocks--> CLS --norm, Linear--> (8,1024) --length 1, times 20--> (8,1024)

   C counts pieces of sound, S samples.  Nothing here is trained.
   Public: sound_clips, SoundEncoder."""

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from einops import rearrange
from torch import nn

from runtime.media import AUDIO_RATE
from vit_qformer import Norm

CLIPS = 8                            # of a file, whatever its length
MEL, FRAME, HOP, FFT = 128, 400, 160, 512          # Kaldi's: 25 ms every 10 ms at 16 kHz
STEPS = 204                          # 2 s give (32000 - 400) / 160 + 1 = 198, filled with zeros
MEL_MEAN, MEL_STD = -4.268, 9.138
PATCH, STRIDE = 16, 10               # 12 x 19 patches of 128 x 204, which overlap


# ---- sound -> pieces of a spectrogram -----------------------------------------------------------

def mel_filters():
    """(256,128): triangles of height 1, evenly spaced from 20 to 8000 Hz on the scale 1127 ln(1 +
    f/700); the bin at the Nyquist rate is left out.  In fp32 as in torchaudio, for parity."""
    low, high = (1127 * math.log(1 + hertz / 700) for hertz in (20, AUDIO_RATE / 2))
    edges = low + torch.arange(MEL + 2) * ((high - low) / (MEL + 1))
    bins = 1127 * torch.log(1 + torch.arange(FFT // 2) * (AUDIO_RATE / FFT) / 700)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def log_mel(wave):
    """(S,) at 16 kHz, at least 400 samples -> (1,128,204), normalised: Kaldi's filter bank."""
    frames = wave.unfold(0, FRAME, HOP)                                                 # (T,400)
    frames = frames - frames.mean(dim=1, keepdim=True)
    before = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)
    frames = (frames - 0.97 * before) * torch.hann_window(FRAME, periodic=False)
    power = torch.fft.rfft(frames, FFT).abs().square()[:, :-1]                          # (T,256)
    mel = (power @ mel_filters()).clamp(min=torch.finfo(torch.float32).eps).log()[:STEPS]
    mel = F.pad(mel, (0, 0, 0, STEPS - len(mel)))          # zeros, before they are normalised
    return ((mel - MEL_MEAN) / MEL_STD).T[None]


def sound_clips(wave, rate=AUDIO_RATE):
    """(channels,S) floats in [-1,1] -> (8,1,128,204): pieces of 2 s that start at k/8 of what is
    left of the length without 2 s, so that those of a short sound overlap.  The first channel is
    heard.  The mean over all channels is subtracted in place: where pieces overlap, the later one
    has a step in it, and so it is in the authors' code.  ValueError below 25 ms."""
    wave, size = AF.resample(wave.float(), rate, AUDIO_RATE).clone(), 2 * AUDIO_RATE
    if wave.shape[1] < FRAME:
        raise ValueError(f"a sound of {wave.shape[1]} samples; wanted {FRAME} (25 ms) or more")
    # The fraction of a *rounded* number of seconds: of 9.01 s the second piece starts at 14019.
    spare, found = max(Fraction(wave.shape[1] / AUDIO_RATE) - 2, 0), []
    for k in range(CLIPS):
        start = int(spare * k / CLIPS * AUDIO_RATE)
        piece = wave[:, start:start + size]
        piece -= piece.mean()
        found.append(log_mel(piece[0]))
    return torch.stack(found)


# ---- pieces of a spectrogram -> vectors ----------------------------------------------------------

class SoundAttention(nn.Module):
    """All tokens attend to each other and to one learnt key, which stands behind them."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * 0.02)   # rows: q, k, v
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.bias_k, self.bias_v = (nn.Parameter(torch.randn(1, 1, width) * 0.02) for _ in "kv")
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        """(C,T,D) -> (C,T,D)."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        k, v = (torch.cat((part, bias.expand(len(x), -1, -1)), dim=1)                # (C,T+1,D)
                for part, bias in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (rearrange(part, "c t (h d) -> c h t d", h=self.heads) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(y, "c h t d -> c t (h d)"))


class SoundBlock(nn.Module):
    """Pre-norm transformer block."""
    def __init__(self, width, heads, ffn):
        super().__init__()
        self.norm_1, self.norm_2 = Norm(width, 1e-6), Norm(width, 1e-6)
        self.attn = SoundAttention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ffn), "fc2": nn.Linear(ffn, width)})

    def forward(self, x):
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm_2(x))))


class SoundEncoder(nn.Module):
    """Pieces of a spectrogram -> one vector each, of length 20."""
    def __init__(self, width=768, layers=12, heads=12, ffn=3072, out=1024):
        super().__init__()
        tokens = math.prod((n - PATCH) // STRIDE + 1 for n in (MEL, STEPS))            # 12 * 19
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.stem = nn.ModuleDict({"proj": nn.Conv2d(1, width, PATCH, STRIDE, bias=False),
                                   "norm_layer": Norm(width, 1e-5)})
        self.pos_embed = nn.Parameter(torch.randn(1, tokens + 1, width) * 0.02)
        self.blocks = nn.ModuleList(SoundBlock(width, heads, ffn) for _ in range(layers))
        self.head_norm = Norm(width, 1e-6)
        self.head = nn.Linear(width, out, bias=False)
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(20)))

    def forward(self, mel):
        """(C,1,128,204) -> (C,D)."""
        x = self.stem.proj(mel.to(self.cls_token))
        x = self.stem.norm_layer(rearrange(x, "c d mel time -> c (mel time) d"))
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = F.normalize(self.head(self.head_norm(x)[:, 0]), dim=-1)
        return x * self.log_logit_scale.exp().clamp(max=100)
