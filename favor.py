"""FAVOR: fine-grained audio-visual joint representations for an LLM.  Paper Sec. 3.

     frames (F,3,224,224) --ViT, Q-Former + question--> (F,V,768)                     frozen
     audio  (S,) 16 kHz   --Whisper encoder--> (50 Hz,1280) --Linear--> (50 Hz,768)   Linear trained
     both   --synchronise, every 0.5 s--> (F,N,1536)                                  Eq. (1)
            --windows of K frames--> (W,K*N,1536) --causal Q-Former--> (W,Q,768)      Eq. (2)
            --Linear--> (W*Q,D_llm) --[<s> USER: <Img> . </Img> question ASSISTANT:]--> LLM + LoRA
     loss = cross-entropy of the answer + lambda * diversity of the queries           Eq. (3)-(5)

Shape alphabet of the whole repository:
     B batch                       F video frames, also synchronised frames: seconds x 2
     P patch tokens per frame 257 = (224/14)^2 + 1        V visual vectors per frame 32
     S audio samples or steps      A audio steps per frame 25 = 50 Hz / 2 Hz
     M mel bins 80                 N joint vectors per frame 32 = max(V,A)
     W windows ceil(F/K)           K frames per window 10 = 5 s       Q queries per window 32
     T text tokens                 L LLM sequence T + W*Q
     D width: 1280 audio, 1408 ViT, 768 Q-Former, 1536 joint, 4096/5120 LLM
Masks are bool; True marks a real vector, or a key that may be attended to.

Public: FavorConfig, PRESETS, preset, synchronise, split_windows, block_causal_mask, CausalQFormer,
diversity_loss, prompt_ids, dialogue_ids, Favor."""

import dataclasses
import math
import re
import sys
import typing
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import lora
from data import Features, Sample, clip_from_path
from llama import Llama, LlamaConfig, Tokenizer
from runtime import fast, hub
from vit import GridEncoder
from vit_qformer import FRAMES_AT_ONCE, QFormerTokenizer, VisualEncoder
from whisper_enc import WhisperEncoder

MODALITY_MASKS = (None, "audio", "visual", "both")         # what Sample.mask hides
IGNORED = -100                                             # the label of a token that is not learnt


# ---------------------------------------------------------------- configuration
@dataclass(frozen=True)
class FavorConfig:
    """Every switch of the method.  The defaults are the 7B model as the paper describes it."""
    # the frozen parts: each a folder in the Hub's layout or a Hub repository
    whisper: str = "openai/whisper-large-v2"
    visual: str = "Salesforce/instructblip-vicuna-7b"
    llm: str = "Salesforce/instructblip-vicuna-7b"
    visual_grid: int = 0                    # DIFF: 0: `visual` is an InstructBLIP, whose Q-Former
    #                                         gives V; g: a SigLIP or a DINOv2, V = g x g cells
    prompt: str = "vicuna"                  # DIFF: or "chatml", for LLMs that were tuned on it
    variant: str = "paper"                  # "official": what the authors' released code does
    # what the paper ablates (Tables 5, 9, 10; Figs 3, 4)
    sync: bool = True                       # False: each modality through the Q-Former on its own
    window_frames: int = 10                 # K, frames per window; 0: one window for the whole clip
    causal: str = "past"                    # "past", "future" (as released) or "none"
    diversity: float = 0.01                 # lambda of Eq. (5)
    diversity_reduction: str = "mean"       # over pairs and windows; "sum" is Eq. (4) to the letter
    fps: float = 2.0                        # video frames per second
    # how clips are read (rows of the table in docs/differences.md)
    frame_times: str = "regular"            # 0, 0.5, 1.0 s ...; "ends": first and last of a second
    audio_seconds: float | None = None      # None: the true length; 30.0: always exactly 30 s
    image_frames: int = 1                   # frames that an image without sound becomes
    max_seconds: float = 300.0              # DIFF: seconds that are read at most; 0: the whole clip
    antialias: bool = True                  # shrink video frames as PIL does; False: bare bicubic
    mask_padding: bool = True               # False: mask only the frames that fill the last window,
    #                                         and only in the cross-attention (as released)
    # causal Q-Former
    queries: int = 32                       # Q
    width: int = 768
    layers: int = 2
    heads: int = 12
    causal_heads: int = 12                  # of width 1536 / 12 = 128
    ffn: int = 3072
    dropout: float = 0.1
    max_positions: int = 4096               # joint vectors in one window
    encoder_dropout: float = 0.0            # of the frozen Q-Former in training (released: 0.1)
    # how the causal Q-Former starts (experiments/start.py; DIFF: all off in the paper's presets)
    feature_norm: str = "joint"             # one LayerNorm over both halves of a joint vector;
    #                                         "halves": one each; "standard": features less their
    #                                         mean, by their deviation, as measured before step 1
    position_std: float = 1.0               # of the position embeddings at the start
    match_embeddings: bool = False          # True: clip vectors start as large as the LLM's words
    direct: int = 0                         # width of a direct path beside the queries; 0: none
    # dialogues
    learn_history: bool = False             # True: all answers of a dialogue are learnt (released)
    question_turn: str = "last"             # the frozen Q-Former reads the last question or, as
    question_tokens: int = 128              # released, the "first"; so many tokens (released: 256)
    # LoRA (Sec. 4.2: query, key, value and the feed-forward; DIFF: official uses q, k, v, o)
    lora_r: int = 32
    lora_alpha: float = 32
    lora_dropout: float = 0.1
    lora_targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    # answering
    beams: int = 1                          # Eq. (3) is an argmax: greedy
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self):
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for part in SOURCES:              # a folder keeps its meaning in another working folder
            object.__setattr__(self, part, hub.anywhere(getattr(self, part)))
        for name, allowed in (("variant", ("paper", "official")), ("prompt", ("vicuna", "chatml")),
                              ("feature_norm", ("joint", "halves", "standard")),
                              ("causal", ("past", "future", "none")),
                              ("diversity_reduction", ("mean", "sum")),
                              ("frame_times", ("regular", "ends")),
                              ("question_turn", ("last", "first"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; "
                                 f"wanted one of {', '.join(allowed)}")
        for name in ("queries", "width", "heads", "causal_heads", "ffn", "max_positions", "lora_r",
                     "lora_alpha", "fps", "beams", "repetition_penalty", "max_new_tokens",
                     "image_frames", "question_tokens", "audio_seconds"):
            if (value := getattr(self, name)) is not None and not (
                    0 < value <= LARGEST.get(name, MOST)):
                raise ValueError(f"{name}={value}; wanted more than 0"
                                 + (f", {LARGEST[name]} at most" if name in LARGEST else ""))
        for name in ("visual_grid", "direct", "position_std", "layers", "diversity", "max_seconds",
                     "dropout", "lora_dropout", "encoder_dropout"):
            if not 0 <= (value := getattr(self, name)) <= LARGEST.get(name, MOST):
                raise ValueError(f"{name}={value}; wanted 0 or more"
                                 + (f", {LARGEST[name]} at most" if name in LARGEST else ""))
        if not self.layers and not self.direct:
            raise ValueError("layers=0 and direct=0: nothing would read the clip; wanted one of "
                             "them above 0")
        if not 0 <= self.window_frames <= self.max_positions:
            raise ValueError(f"window_frames={self.window_frames}; wanted frames per window, at "
                             f"most max_positions ({self.max_positions}), or 0 for one window")

    @classmethod
    def from_saved(cls, saved, where):
        """The config of a favor.json, which may have the field names of an older version.
        ValueError names the file `where` and the fields that are unknown."""
        if not isinstance(saved.get("config"), dict):
            raise ValueError(f"{where}: no config in it; save the checkpoint again")
        values = {RENAMED.get(name, name): value for name, value in saved["config"].items()}
        known = {field.name: field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{where}: settings that are not known here: {unknown}; another "
                             f"version wrote it ({saved.get('commit', 'unknown commit')})")
        if empty := [name for name in values if values[name] is None and name != "audio_seconds"]:
            raise ValueError(f"{where}: {', '.join(empty)} is null; save the checkpoint again")
        sources = {part: hub.saved_source(values[part]) for part in SOURCES
                   if isinstance(values.get(part), str)}
        return hub.make_config(cls, values | sources, known, where, zero=known)


SOURCES = ("whisper", "visual", "llm")
LARGEST = {"beams": 1000, "max_new_tokens": 100_000, "image_frames": 10_000,    # for the memory
           "visual_grid": 64, "direct": 100_000, "queries": 100_000, "layers": 1000,
           **dict.fromkeys(("dropout", "lora_dropout", "encoder_dropout"), 1.0)}
MOST = sys.float_info.max                     # of any other field: infinity is no setting
RENAMED = {"windows": "window_frames", "instructblip": "visual"}     # old name of a field: new
OFFICIAL = {"variant": "official", "causal": "future", "mask_padding": False,
            "frame_times": "ends", "audio_seconds": 30.0, "image_frames": 60,
            "max_seconds": 60.0, "antialias": False,
            "encoder_dropout": 0.1, "beams": 5, "repetition_penalty": 1.5,
            "learn_history": True, "question_turn": "first", "question_tokens": 256,
            "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
VICUNA_13B = "Salesforce/instructblip-vicuna-13b"
MINIATURE = "miniature/weights"               # beside this file, see hub.local_source
PRESETS = {                                   # DIFF: the default model is tiny, the paper's 13b
    "tiny": FavorConfig(
        whisper=f"{MINIATURE}/whisper", visual=f"{MINIATURE}/instructblip",
        llm=f"{MINIATURE}/llama", window_frames=5, queries=10, width=128, heads=4, causal_heads=4,
        ffn=512, dropout=0.0, max_positions=1024, lora_r=16, lora_alpha=16, lora_dropout=0.0,
        max_new_tokens=24),
    "7b": FavorConfig(),
    "13b": FavorConfig(visual=VICUNA_13B, llm=VICUNA_13B),
    # Of public parts under permissive licences, for one GPU and for a laptop: docs/small.md.
    "small": FavorConfig(
        whisper="openai/whisper-small", visual="google/siglip2-base-patch16-224",
        llm="HuggingFaceTB/SmolLM2-360M-Instruct", visual_grid=7, prompt="chatml",
        max_positions=512),
    "small-laptop": FavorConfig(
        whisper="openai/whisper-base", visual="google/siglip2-base-patch16-224",
        llm="HuggingFaceTB/SmolLM2-135M-Instruct", visual_grid=5, prompt="chatml",
        max_positions=512),
}


@dataclass(frozen=True)
class Habits:
    """How a preset is trained and scored where the command line does not say."""
    lr: float = 1e-4
    cache_features: bool = False            # each clip is encoded once, its features are stored
    micro_tokens: int = 2048                # LLM positions at a time; 0: no limit
    processes: int = 1                      # on a CPU at most; each has its own copy of the weights
    threads: int = 0                        # of the processor per process; 0: all
    dtype_on_cpu: str = "bfloat16"          # of the frozen weights


SMALL = Habits(lr=3e-4, cache_features=True, processes=2, dtype_on_cpu="float32")
HABITS = {"tiny": Habits(1.5e-3, True, 0, 4, 1, "float32"), "small": SMALL, "small-laptop": SMALL}


def habits(name):
    """The Habits of a preset."""
    return HABITS.get(name, Habits())


def preset(name, variant="paper", **changes):
    """PRESETS[name] in a variant ("paper", "official"), with single fields changed.  ValueError
    lists the valid names."""
    changes = {RENAMED.get(field, field): value for field, value in changes.items()}
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    if variant not in ("paper", "official"):
        raise ValueError(f"unknown variant {variant!r}; there are paper and official")
    known = {field.name for field in dataclasses.fields(FavorConfig)}
    if set(changes) - known:
        raise ValueError(f"unknown settings {sorted(set(changes) - known)}; "
                         f"there are {sorted(known)}")
    return dataclasses.replace(
        PRESETS[name], **((OFFICIAL if variant == "official" else {}) | changes))


# type of a field of FavorConfig: its value from the text of a command line
FROM_TEXT = {bool: {"true": True, "false": False}.__getitem__, int: int, float: float, str: str,
             float | None: lambda text: None if text == "none" else float(text),
             tuple[str, ...]: lambda text: tuple(text.split(","))}


def method_settings(words):
    """["direct=512", "feature_norm=halves"] -> {field of FavorConfig: value of its type}.
    ValueError for a word that is none."""
    kinds, settings = typing.get_type_hints(FavorConfig), {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            if name in settings or not text or text.lower() == "nan":
                raise ValueError(word)
            settings[name] = FROM_TEXT[kinds[name]](text)
        except (KeyError, ValueError):
            raise ValueError(f"{word!r}; wanted FIELD=VALUE, each field of FavorConfig once and "
                             "with a value of its kind, such as direct=512, match_embeddings=true "
                             "or lora_targets=q_proj,v_proj") from None
    return settings


# ---------------------------------------------------------------- Eq. (1): synchronisation, windows
def synchronise(visual, audio, audio_steps, mask_padding=True):
    """Joins the two streams frame by frame, every 0.5 s.  Sec. 3.1, Eq. (1); no parameters.

    visual (F_v,V,D_v) and audio (S,D_a) with audio_steps = A vectors per frame; either may have
    length 0 -> joint (F,N,D_v+D_a), mask (F,N), where F = max(F_v, ceil(S/A)) and N = max(V,A).
    Vector j of frame t is [visual query j ; audio step t*A+j], zeros where one of them has ended.
    The mask is True where at least one modality is real; with mask_padding=False it is True
    everywhere (DIFF official).  DIFF from the paper's order (audio, visual): visual comes first, as
    in the released weights."""
    V, A = visual.shape[1], audio_steps
    n_frames = max(len(visual), math.ceil(len(audio) / A))
    n_joint = max(V, A)
    real = audio.new_ones(len(audio), dtype=torch.bool)
    missing = math.ceil(len(audio) / A) * A - len(audio)              # the last frame may be short
    audio = rearrange(F.pad(audio, (0, 0, 0, missing)), "(f a) d -> f a d", a=A)  # (F_a,A,D_a)
    heard = rearrange(F.pad(real, (0, missing)), "(f a) -> f a", a=A)             # (F_a,A)
    seen = visual.new_ones(visual.shape[:2], dtype=torch.bool)                    # (F_v,V)

    def fill(x):                             # zeros behind the last frame and the last vector
        widths = [0] * (2 * (x.ndim - 2)) + [0, n_joint - x.shape[1], 0, n_frames - len(x)]
        return F.pad(x, widths)

    joint = torch.cat([fill(visual), fill(audio)], dim=-1)                        # (F,N,D_v+D_a)
    mask = fill(seen) | fill(heard)                                               # (F,N)
    return joint, mask if mask_padding else torch.ones_like(mask)


def split_windows(joint, mask, window):
    """joint (F,N,D), mask (F,N) -> (W,K*N,D), (W,K*N): non-overlapping windows of K = window frames
    (0: one window of all F frames).  The last window is filled up with masked zero frames.
    Sec. 3.1."""
    K = window or max(len(joint), 1)
    missing = -len(joint) % K
    joint = F.pad(joint, (0, 0, 0, 0, 0, missing))                                # (W*K,N,D)
    mask = F.pad(mask, (0, 0, 0, missing))
    return (rearrange(joint, "(w k) n d -> w (k n) d", k=K),
            rearrange(mask, "(w k) n -> w (k n)", k=K))


def block_causal_mask(frames, per_frame, causal="past", device=None):
    """(K*N,K*N) bool, rows attend to columns: a frame sees all its own vectors and the frames
    before it ("past", Sec. 3.2 and Fig. 2) or after it ("future", DIFF official)."""
    frame = torch.arange(frames * per_frame, device=device) // per_frame          # (K*N,)
    if causal == "past":
        return frame[:, None] >= frame[None, :]
    if causal == "future":
        return frame[:, None] <= frame[None, :]
    raise ValueError(f"causal={causal!r}; a mask exists for past and future")


def block_causal_attention(q, k, v, mask=None, dropout=0.0, *, per_frame, causal="past"):
    """Softmax attention of q, k, v (W,heads,K*N,d) -> (W,heads,K*N,d) under block_causal_mask for
    frames of per_frame = N vectors.  mask (W,K*N): padded vectors are never attended to, and
    their own rows of the result are to be ignored."""
    frames = q.shape[2] // per_frame
    if q.is_cuda and q.shape[-1] + frames + 1 <= fast.LARGEST_FLASH_HEAD:
        # The same result in one flash call; other kernels read a mask of (K*N)^2 numbers.
        return fast.flash_block_causal(q, k, v, mask, dropout, per_frame=per_frame, causal=causal)
    causal_mask = block_causal_mask(frames, per_frame, causal, q.device)
    if mask is not None and not (mask.device.type == "cpu" and mask.all()):
        # A padded row attends to itself, so that no softmax is over an empty set.
        itself = torch.eye(len(causal_mask), dtype=torch.bool, device=q.device)
        causal_mask = causal_mask & mask[:, None, None] | itself
    # In five groups of frames, each with the frames that it may see: a call with the whole mask
    # would compute the scores that the mask hides, too.
    size, groups = math.ceil(frames / 5) * per_frame, []
    for first in range(0, q.shape[2], size):
        rows = slice(first, first + size)
        keys = slice(0, rows.stop) if causal == "past" else slice(first, None)
        groups.append(F.scaled_dot_product_attention(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], dropout_p=dropout,
            attn_mask=causal_mask[..., rows, keys]))                              # (W,heads,n,d)
    return torch.cat(groups, dim=2)


# ---------------------------------------------------------------- Eq. (2): the causal Q-Former
class Attention(nn.Module):
    """BERT's attention block: softmax attention, output projection, residual, LayerNorm."""

    def __init__(self, width, heads, context_width=None, dropout=0.1):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads (heads or causal_heads) do not divide a width of "
                             f"{width}; wanted a divisor of it")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width or width, width)
        self.value = nn.Linear(context_width or width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x, context=None, mask=None, attend=F.scaled_dot_product_attention):
        """x (B,n,D), context (B,m,D_c) or x itself, mask broadcast to (B,heads,n,m) -> (B,n,D).
        attend(q, k, v, mask, dropout) is the softmax attention of q, k, v (B,heads,n,d)."""
        context = x if context is None else context
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=self.heads)
                   for part in (self.query(x), self.key(context), self.value(context)))
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.output(rearrange(y, "b h n d -> b n (h d)"))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class CausalQFormerLayer(nn.Module):
    """Sec. 3.2, Fig. 2: causal attention over the window's frames, then the queries attend to each
    other, to the frames, and go through the feed-forward; each step is post-norm as in BERT."""

    def __init__(self, config, joint_width):
        super().__init__()
        self.dropout = config.dropout
        if config.causal != "none":
            self.causal_attention = Attention(joint_width, config.causal_heads,
                                              dropout=config.dropout)
        self.self_attention = Attention(config.width, config.heads, dropout=config.dropout)
        self.cross_attention = Attention(config.width, config.heads, joint_width, config.dropout)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, queries, frames, mask, causal_mask, attend):
        """queries (W,Q,D), frames (W,K*N,D_joint) -> queries (W,Q,D).  mask and causal_mask (W,K*N)
        mark the keys of the cross- and of the causal attention.  attend is the softmax attention of
        the causal one; None: there is none.  Each layer starts again from the raw features (DIFF:
        the paper says nothing of layers; the released code does the same)."""
        if attend is not None:
            frames = self.causal_attention(frames, mask=causal_mask, attend=attend)
        queries = self.self_attention(queries)
        queries = self.cross_attention(queries, frames, mask[:, None, None])
        y = self.down(F.gelu(self.up(queries)))
        return self.norm(queries + F.dropout(y, self.dropout, self.training))


class CausalQFormer(nn.Module):
    """Eq. (2): Q trained queries read each window of synchronised frames, every window alike."""

    def __init__(self, config, joint_width):
        super().__init__()
        self.config = config
        self.joint_norm = nn.LayerNorm(joint_width) if config.feature_norm != "halves" else (
            nn.ModuleList(nn.LayerNorm(joint_width // 2) for _ in range(2)))
        # One per vector; without layers nothing reads them, and DDP would wait for their gradient.
        self.positions = nn.Embedding(config.max_positions, joint_width) if config.layers else None
        if self.positions:
            self.positions.weight.data *= config.position_std      # no draw more: seeds stay
        self.queries = nn.Parameter(torch.empty(1, config.queries, config.width).normal_(std=0.02))
        self.query_norm = nn.LayerNorm(config.width, eps=1e-12)
        self.layers = nn.ModuleList(
            CausalQFormerLayer(config, joint_width) for _ in range(config.layers))
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                # 0.02 is BERT's at width 768; in a narrower model attention would start flat.
                narrow = max(1.0, 768 / module.in_features)
                nn.init.normal_(module.weight, std=0.02 * math.sqrt(narrow))
                nn.init.zeros_(module.bias)
        self.direct = DirectPath(joint_width, config.direct, config.width) if (
            config.direct) else None

    def normalise(self, windows):
        """(W,K*N,D_joint) through one LayerNorm, or with "halves" each modality through its own."""
        if isinstance(self.joint_norm, nn.LayerNorm):
            return self.joint_norm(windows)
        return torch.cat([norm(half) for norm, half in
                          zip(self.joint_norm, windows.chunk(2, dim=-1), strict=True)], dim=-1)

    def forward(self, windows, mask, per_frame):
        """windows (W,K*N,D_joint), mask (W,K*N), per_frame = N -> (W,Q,D).
        Raises ValueError when a window has more vectors than there are positions."""
        length = windows.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"a window of {length // per_frame} frames x {per_frame} vectors = {length}, but "
                f"there are {self.config.max_positions} positions; use fewer frames per window, "
                "fewer vectors per frame (--visual-grid) or a shorter clip")
        x = content = self.normalise(windows)                                     # (W,K*N,D_joint)
        if self.positions:
            x = content + self.positions(torch.arange(length, device=windows.device))
        # A window without a real vector (the dummy) attends to its zeros: no softmax is over an
        # empty set.
        mask = mask | ~mask.any(dim=1, keepdim=True)                              # (W,K*N)
        attend = None
        if self.config.causal != "none":
            attend = partial(block_causal_attention, per_frame=per_frame, causal=self.config.causal)
        # DIFF official: the zero frames that fill the last window are keys of the causal attention.
        # (With one window per clip there are none, only the batch's padding, which never is a key.)
        causal_mask = mask if self.config.mask_padding or not self.config.window_frames else None
        dropout = self.config.dropout
        queries = F.dropout(self.query_norm(self.queries), dropout, self.training)
        queries = queries.expand(len(windows), -1, -1)                            # (W,Q,D)
        for layer in self.layers:
            queries = layer(queries, x, mask, causal_mask, attend)
        return queries if self.direct is None else queries + self.direct(
            content, mask, queries.shape[1])


class DirectPath(nn.Module):
    """DIFF, off in the paper's presets: a way past the attention.  Each joint vector goes through
    an MLP, and query i of a window is given the mean over the i-th of Q parts of its vectors.  It
    hands something on from the first step, while the attention of fresh queries is still flat."""

    def __init__(self, joint_width, hidden, width):
        super().__init__()
        self.up, self.down = nn.Linear(joint_width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, content, mask, n_queries):
        """content (W,K*N,D_joint), mask (W,K*N) -> (W,Q,D).  Part i are the real vectors number
        floor(i n / Q) to ceil((i + 1) n / Q) of the window's n, in the order of time."""
        y = self.down(F.gelu(self.up(content)))                                   # (W,K*N,D)
        i = torch.arange(n_queries, device=mask.device)[:, None]                  # (Q,1)
        n, number = mask.sum(dim=1)[:, None, None], (mask.cumsum(dim=1) - 1)[:, None]
        first, end = i * n // n_queries, -(-(i + 1) * n // n_queries)             # (W,Q,1)
        part = (number >= first) & (number < end) & mask[:, None]                 # (W,Q,K*N)
        return self.norm((part / (end - first)).to(y) @ y)


class FeatureStatistics(nn.Module):
    """DIFF, off in the paper's presets: features less their mean, divided by their deviation, for
    each dimension of each modality.  Single dimensions of frozen encoders are many times as large
    as the others; a LayerNorm over all dimensions leaves these in charge."""

    def __init__(self, **widths):
        super().__init__()
        self.names = tuple(widths)
        for name, width in widths.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))

    @property
    def unmeasured(self):
        """The modalities whose mean and deviation are still 0 and 1."""
        return [n for n in self.names if bool((getattr(self, f"{n}_std") == 1).all())]

    @torch.no_grad()
    def measure(self, clips):
        """Takes mean and deviation of each modality from `clips`, which yields Features and is read
        clip by clip, so that hundreds of them need little memory.  A modality that an earlier stage
        of training has measured keeps its numbers."""
        names, sums = self.unmeasured, {}
        for clip in clips:
            for name in names:
                if (x := getattr(clip, name)) is not None:
                    x = x.reshape(-1, x.shape[-1]).double()                       # (n,D)
                    sums[name] = sums.get(name, 0) + torch.stack(
                        [torch.full_like(x[0], len(x)), x.sum(dim=0), x.square().sum(dim=0)])
        for name, (n, total, squares) in sums.items():
            mean = total / n
            std = ((squares / n - mean ** 2).clamp(min=0) * n / (n - 1).clamp(min=1)).sqrt()
            getattr(self, f"{name}_mean").copy_(mean)
            # A dimension that hardly varies must not become noise: the others' deviation bounds it.
            getattr(self, f"{name}_std").copy_(std.clamp(min=float(std.mean()) / 100 or 1.0))

    def forward(self, name, x):
        return (x - getattr(self, f"{name}_mean")) / getattr(self, f"{name}_std")


# ---------------------------------------------------------------- Eq. (4): the diversity loss
def diversity_loss(queries, reduction="mean"):
    """Eq. (4): cosine similarity of the output queries of one window, over pairs j != i.
    queries (W,Q,D) -> scalar: the "mean" over pairs and windows (DIFF: so that lambda does not
    depend on the clip's length), or the literal "sum"."""
    n = queries.shape[1]
    unit = F.normalize(queries.float(), dim=-1, eps=1e-9)                         # (W,Q,D)
    # The sum of u_i u_j over all i and j is |sum of u_i|^2; a matrix of products would be computed
    # in bf16 under autocast.
    off_diagonal = unit.sum(dim=1).square().sum() - unit.square().sum()
    if reduction == "sum":
        return off_diagonal
    return off_diagonal / max(len(queries) * n * (n - 1), 1)


# ---------------------------------------------------------------- prompt and labels
def chatml_ids(tokenizer):
    """Ids of the tokens that begin and end a turn.  ValueError for a tokenizer without them."""
    return tokenizer.special_id("<|im_start|>"), tokenizer.special_id("<|im_end|>")


def dialogue_ids(tokenizer, prompt, history=(), target=None, has_clip=True, style="vicuna"):
    """Ids before the clip's vectors, and behind them a list of (ids of a question, ids of its
    answer), one for each turn of the dialogue.

    vicuna: <s> USER: <Img> |vectors| </Img> {question}\\nASSISTANT: | {answer}</s>
    chatml: <|im_start|>user\\n<Img>|vectors|</Img>\\n{question}<|im_end|>\\n
            <|im_start|>assistant\\n|{answer}<|im_end|>
    Earlier turns of a dialogue stand between: {question}\\nASSISTANT: {answer}</s>USER: ...
    Without a clip there is no <Img> </Img>.  A target of None gives [].  The segments are encoded
    one by one, as in the released code, each with a word boundary before it.  DIFF: <s> USER: <Img>
    stands before the queries, as in the released code; Eq. (3) has the whole prompt behind them.
    ChatML (DIFF) has no system turn; its two special tokens are placed by id, so that a question
    cannot contain them, and the newline before an answer is its word boundary."""
    chatml = style == "chatml"
    if chatml:
        start, end = chatml_ids(tokenizer)

        def encode(text):       # a tokenizer that knows the two as ordinary text finds them in text
            return [i for i in tokenizer.encode(text) if i not in (start, end)]
        before = [start] + (encode("user\n<Img>") if has_clip else [])
        first, later, gap = "</Img>\n" if has_clip else "user\n", "user\n", ""
        again = [*encode("\n"), start]
        asked = [end, *again, *encode("assistant\n")]
    else:
        encode, end, gap = tokenizer.encode, tokenizer.eos_id, tokenizer.boundary
        before = [tokenizer.bos_id] + encode("USER: <Img>" if has_clip else "USER:")
        # Text alone is Vicuna's "USER: {question}".
        first, later = "</Img> " if has_clip else gap, "USER: "
    turns = []
    for i, (question, answer) in enumerate([*history, (prompt, target)]):
        opening = later if i else first
        ids = [*(again if i else []), *encode(f"{opening}{question}"), *asked] if chatml else (
            encode(f"{opening}{question}\nASSISTANT:"))
        turns.append((ids, [] if answer is None else
                      [*encode(gap + answer if answer else ""), end]))
    return before, turns


def prompt_ids(tokenizer, prompt, history=(), target=None, has_clip=True, style="vicuna"):
    """The same in three: ids before the clip's vectors, ids behind them, and the ids to learn: only
    the last answer and its </s>; a target of None gives []."""
    before, turns = dialogue_ids(tokenizer, prompt, history, target, has_clip, style)
    *earlier, (question, answer) = turns
    return before, [i for turn in earlier for part in turn for i in part] + question, answer


# ---------------------------------------------------------------- the model
class Favor(nn.Module):
    """Frozen Whisper, ViT and Q-Former; trained audio projection, causal Q-Former, LLM projection
    and LoRA on the LLM."""
    system, tasks = "favor", None          # the other systems: baselines/; None: all tasks
    needs_picture = False                  # True: records without a picture are useless to train on

    def __init__(self, config, whisper, visual, llm, tokenizer, qformer_tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.qformer_tokenizer = config, tokenizer, qformer_tokenizer
        self.whisper, self.visual, self.llm = whisper, visual, llm
        for part in (whisper, visual, llm):
            part.requires_grad_(False)
        if visual.reads_question:
            visual.qformer.set_dropout(config.encoder_dropout)
        self.audio_steps = audio_steps_per_frame(whisper.config.positions_hz, config.fps)
        if config.window_frames > self.most_frames():
            raise ValueError(f"a window of {config.window_frames} frames has more vectors than "
                             f"max_positions={config.max_positions}, which is enough for "
                             f"{self.most_frames()} frames; use fewer frames per window or a "
                             "smaller --visual-grid, or --set max_positions=N")
        audio_width, visual_width = whisper.config.width, visual.width
        self.audio_proj = nn.Linear(audio_width, visual_width)     # DIFF, left open: 1280 -> 768
        self.qformer = CausalQFormer(config, 2 * visual_width)
        self.llm_proj = nn.Linear(config.width, llm.config.width)
        if config.match_embeddings:               # of queries, whose LayerNorm gives deviation 1
            words = llm.model.embed_tokens.weight
            spread = 1.0 if words.is_meta else float(words[:10_000].float().std())
            nn.init.normal_(self.llm_proj.weight, std=spread / math.sqrt(config.width))
            nn.init.zeros_(self.llm_proj.bias)
        self.statistics = FeatureStatistics(visual=visual_width, audio=audio_width) if (
            config.feature_norm == "standard") else None
        lora.inject(llm, lora.LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout,
                                         config.lora_targets))

    # ---- making, saving, loading
    @classmethod
    def from_config(cls, config, dtype=None, device=None, load=None):
        """Frozen parts from the sources that the config names, fresh trained parts.
        load(kind, source, **settings) makes a part or a tokenizer of class `kind`; by default it
        loads the pretrained one, tools.memory.random_part gives random weights.  On the device
        "meta" the model has shapes only."""
        load = load or load_pretrained
        place = {"dtype": dtype, "device": device}
        tokenizer = load(Tokenizer, config.llm)
        if config.prompt == "chatml":
            chatml_ids(tokenizer)                  # refused before the large parts are loaded
        grid = {"grid": config.visual_grid} if config.visual_grid else {}
        qformer_tokenizer = None if grid else load(QFormerTokenizer, config.visual)
        with torch.device("meta" if device == "meta" else "cpu"):
            model = cls(config, load(WhisperEncoder, config.whisper, **place),
                        load(GridEncoder if grid else VisualEncoder, config.visual, **grid,
                             **place),
                        # InstructBLIP pads the vocabulary of 32000 to 32064
                        load(Llama, config.llm, vocab_size=tokenizer.vocab_size, **place),
                        tokenizer, qformer_tokenizer)
        return model.to(device) if device else model

    @classmethod
    def for_encoding(cls, config, dtype=None):
        """The same for a process that only encodes clips: the LLM has shapes but no numbers."""
        return cls.from_config(config, dtype, load=load_encoders)

    @classmethod
    def from_pretrained(cls, run_folder, dtype=None, device=None, **sources):
        """A folder that save_pretrained (train.py) wrote, or such a Hub repository -> model in eval
        mode.  sources: other places of whisper, visual or llm than those of the run."""
        root = hub.folder(run_folder, ("lora/*",), config="favor.json")
        if not (root / "favor.json").exists():
            raise FileNotFoundError(f"{root}: no favor.json; wanted a checkpoint of train.py such "
                                    "as runs/tiny/best (make one: python train.py)")
        saved = hub.read_object(root / "favor.json")
        if saved.get("system", "favor") != cls.system:
            raise ValueError(f"{root}: a checkpoint of --system {saved['system']}; pass that")
        sources = {RENAMED.get(part, part): source for part, source in sources.items()}
        config = dataclasses.replace(FavorConfig.from_saved(saved, root / "favor.json"), **sources)
        cls.check_saved(config, root)
        model = cls.from_config(config, dtype, device)
        model.load_trained(root)
        return model.eval()

    @staticmethod
    def check_saved(config, root):
        """ValueError if the trained parts in folder `root` are of other sizes than the config says:
        before the frozen parts are loaded, and before memory is taken for a wrong size."""
        norms = [norm.shape[-1] for norm in hub.open_tensors(        # one, or one for each half
            root, lambda name: re.fullmatch(r"qformer\.joint_norm\.(\d\.)?weight", name)).values()]
        try:
            with torch.device("meta"):
                qformer = CausalQFormer(config, sum(norms) or 2 * config.width)
        except ValueError as error:                        # heads that do not divide the width
            raise ValueError(f"{root / 'favor.json'}: {error}") from None
        hub.fitting(qformer, root, prefix="qformer.")
        adapter = lora.read(root / "lora")[0]
        ours = (config.lora_r, config.lora_alpha, set(config.lora_targets))
        if (theirs := (adapter.r, adapter.alpha, set(adapter.target_modules))) != ours:
            raise ValueError(f"{root}: r, alpha and targets of LoRA are {ours} in favor.json, but "
                             f"{theirs} in lora/adapter_config.json; both must be of one training")

    def aligner(self):
        """The trained parts outside the LLM as one module."""
        parts = {"audio_proj": self.audio_proj, "qformer": self.qformer, "llm_proj": self.llm_proj}
        return nn.ModuleDict(parts | ({"statistics": self.statistics} if self.statistics else {}))

    def save_pretrained(self, folder, **facts):
        """favor.json (config and `facts`), model.safetensors (aligner) and lora/ (as peft's)."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        if lora.layers(self.llm):
            lora.save(self.llm, root / "lora")
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.aligner().state_dict().items()}
        hub.save_tensors(root / "model.safetensors", tensors)
        hub.write_json(root / "favor.json", {"system": self.system,
                                             "config": dataclasses.asdict(self.config), **facts})

    def load_trained(self, folder):
        """Reads what save_pretrained wrote into this model.  Missing or unknown tensors are errors.
        """
        hub.load_into(self.aligner(), folder)
        if lora.layers(self.llm):
            lora.load(self.llm, Path(folder) / "lora")

    def trained_parameters(self):
        return [p for p in self.parameters() if p.requires_grad]

    def measure(self, samples):
        """With feature_norm="standard": takes mean and deviation from the clips of these samples, a
        few hundred of the training set, before the first step.  samples: any iterable."""
        if self.statistics:
            self.statistics.measure(self.encode_sample(sample).features for sample in samples)

    def train(self, mode=True):
        """Frozen encoders stay in eval mode.  DIFF official: the Q-Former's dropout stays on."""
        super().train(mode)
        self.whisper.eval()
        self.visual.eval()
        if self.visual.reads_question:
            self.visual.qformer.train(mode and self.config.encoder_dropout > 0)
        return self

    # ---- frozen encoders
    def clip_options(self):
        """How clips are to be read: options of data.load_clip."""
        config = self.config
        own = {"resample": self.visual.resample} if self.visual.resample != "bicubic" else {}
        return {"fps": config.fps, "size": self.visual.image_size, "antialias": config.antialias,
                "frame_times": config.frame_times, "max_seconds": config.max_seconds} | own

    def encode(self, clip, prompts):
        """One clip -> a Features for each prompt.  The ViT and Whisper run once: only the visual
        Q-Former reads the prompt."""
        return self.encode_all([clip] * len(prompts), prompts)

    def encode_all(self, clips, prompts):
        """Clips (None: text alone) and a prompt for each -> a Features each.  The pictures of all
        clips go through the ViT side by side, their sounds through Whisper; a clip that stands in
        the list twice is encoded once."""
        distinct = {id(clip): clip for clip in clips if clip is not None}
        with torch.inference_mode():
            audio = self._encode_sounds(distinct)
            visual = self._encode_pictures(distinct, clips, prompts)
        # Copies: what inference mode made cannot be part of a graph that runs backward.
        audio = {key: vectors.clone() for key, vectors in audio.items()}
        return [Features(visual[i].clone() if i in visual else None, audio.get(id(clip)),
                         bool(clip and clip.is_image)) for i, clip in enumerate(clips)]

    def _encode_sounds(self, distinct):
        """{key: clip} -> {key: (S,D_a)} of the clips that have sound."""
        waves = {key: clip.audio for key, clip in distinct.items() if clip.audio is not None}
        if self.config.audio_seconds:                     # DIFF official: always exactly 30 s
            samples = round(self.config.audio_seconds * self.whisper.config.sample_rate)
            waves = {key: F.pad(wave[:samples], (0, max(0, samples - len(wave))))
                     for key, wave in waves.items()}
        return dict(zip(waves, self.whisper.encode_all([*waves.values()]), strict=True))

    def _encode_pictures(self, distinct, clips, prompts):
        """{key: clip}, the list of clips and their prompts -> {place in the list: (F,V,D_v)}."""
        frames = {key: clip.frames for key, clip in distinct.items() if clip.frames is not None}
        if not frames:
            return {}
        device = self.llm_proj.weight.device
        pixels = torch.cat([self.visual.to_pixels(own.to(device))
                            for own in frames.values()])                          # (F,3,H,W)
        patches = self.visual.encode_image(pixels).split([*map(len, frames.values())])
        patches = dict(zip(frames, patches, strict=True))                         # (F,P,D_vit) each
        places = [i for i, clip in enumerate(clips) if id(clip) in patches]
        if not self.visual.reads_question:
            return {i: patches[id(clips[i])] for i in places}                     # (F,V,D_v) each
        asked = [patches[id(clips[i])] for i in places]
        counts = torch.tensor([*map(len, asked)])
        longest = min(self.config.question_tokens, self.visual.qformer.config.max_positions)
        ids, mask = (x.repeat_interleave(counts, dim=0).to(device)                # (F,T)
                     for x in self.qformer_tokenizer([prompts[i] for i in places], longest))
        vectors = self.visual.query(torch.cat(asked), ids, mask)                  # (F,V,D_v)
        return dict(zip(places, vectors.split(counts.tolist()), strict=True))

    def encode_batch(self, samples):
        """The same samples with their clips encoded, about FRAMES_AT_ONCE frames at a time, so that
        stills and short clips fill a GPU and long ones do not overflow it."""
        groups, frames = [], math.inf
        for i, sample in enumerate(samples):
            if sample.features is None:
                seen = sample.clip.frames if sample.clip else None
                n = 0 if seen is None else len(seen)
                if frames + n > FRAMES_AT_ONCE:
                    groups.append([])
                    frames = 0
                groups[-1].append(i)
                frames += n
        samples = list(samples)
        for group in groups:
            encoded = self.encode_all([samples[i].clip for i in group],
                                      [self.question_to_see(samples[i]) for i in group])
            for i, features in zip(group, encoded, strict=True):
                samples[i] = dataclasses.replace(samples[i], features=features, clip=None)
        return samples

    def question_to_see(self, sample):
        """The question of a Sample or Record that the visual Q-Former reads: the current one, or
        (DIFF official) the first question of the dialogue."""
        first = self.config.question_turn == "first" and sample.history
        return sample.history[0][0] if first else sample.prompt

    def encode_sample(self, sample):
        """The same sample with its clip encoded."""
        return self.encode_batch([sample])[0]

    def features_of(self, sample):
        """-> visual (F,V,D_v), an image repeated to the length of its sound, and audio (S,D_a);
        None where there is none."""
        if sample.mask not in MODALITY_MASKS:
            raise ValueError(f"mask={sample.mask!r}; wanted one of {MODALITY_MASKS}")
        features = self.encode_sample(sample).features
        visual, audio = features.visual, features.audio
        if features.is_image and visual is not None:       # an image lasts as long as its sound
            n = (self.config.image_frames if audio is None
                 else math.ceil(len(audio) / self.audio_steps))
            visual = visual.expand(max(n, 1), -1, -1)
        return visual, audio

    def empty_features(self, seconds):
        """visual (F,V,D_v) and audio (S,D_a) of a clip of so many seconds, on the device "meta"."""
        frames = math.ceil(seconds * self.config.fps)
        return (torch.empty(frames, self.visual.n_queries, self.visual.width, device="meta"),
                torch.empty(frames * self.audio_steps, self.whisper.config.width, device="meta"))

    # ---- Eq. (1) and (2)
    def windowed_inputs(self, sample):
        """Sample -> list of (windows (W,K*N,D), mask (W,K*N)): one entry, or with sync=False one
        per modality; empty for text alone."""
        visual, audio = self.features_of(sample)
        if visual is None and audio is None:
            return []
        like = self.audio_proj.weight
        D, V, A = like.shape[0], self.visual.n_queries, self.audio_steps
        scaled = self.statistics or (lambda name, features: features)
        visual = like.new_zeros(0, V, D) if visual is None else scaled("visual", visual.to(like))
        # The zeros of a hidden modality come after the projection, which has a bias.
        audio = like.new_zeros(0, D) if audio is None else self.audio_proj(
            scaled("audio", audio.to(like)))                                      # (S,D)
        visual = visual * float(sample.mask not in ("visual", "both"))
        audio = audio * float(sample.mask not in ("audio", "both"))
        streams = [(visual, audio)]
        if not self.config.sync:                           # ablation: nothing is joined
            streams = [pair for pair in ((visual, audio[:0]), (visual[:0], audio))
                       if len(pair[0]) or len(pair[1])]
        return [split_windows(*synchronise(*pair, A, self.config.mask_padding),
                              self.config.window_frames) for pair in streams]

    def audio_visual_tokens(self, samples):
        """Samples -> LLM vectors, one (W*Q,D_llm) per sample ((0,D_llm) for text), and the queries
        (all windows,Q,D) for the diversity loss.

        The windows of the whole batch go through the Q-Former side by side, so that a sample never
        meets another one's padding.  One dummy window of zeros is added, because every rank of a
        DDP run must touch every trained parameter at every step, whatever its batch holds
        (test_train.py, test_processes_with_different_samples)."""
        samples = self.encode_batch(samples)
        parts = [self.windowed_inputs(sample) for sample in samples]
        N = max(self.visual.n_queries, self.audio_steps)
        like = self.audio_proj(self.audio_proj.weight.new_zeros(1, self.audio_proj.in_features)) * 0
        dummy = torch.cat([like, like], dim=-1).expand(1, N, -1)
        dummy = (dummy, dummy.new_zeros(dummy.shape[:2], dtype=torch.bool))
        windows = [pair for part in parts for pair in part] + [dummy]
        longest = max(w.shape[1] for w, _ in windows)      # they differ only with window_frames=0
        if self.config.mask_padding:              # all that is read of a batch of stills is a frame
            real = [n for sample in samples for n in self.stream_frames(sample)]
            longest = min(longest, N * max([1, *real]))
        frames = torch.cat([F.pad(w, (0, 0, 0, longest - w.shape[1])) for w, _ in windows])
        mask = torch.cat([F.pad(m, (0, longest - m.shape[1])) for _, m in windows])
        queries = self.qformer(frames, mask, per_frame=N)                         # (W,Q,D)
        tokens = self.llm_proj(queries)                                           # (W,Q,D_llm)
        touched = 0 * tokens[-1].sum()
        tokens, queries = tokens[:-1], queries[:-1]
        counts = [sum(len(w) for w, _ in part) for part in parts]
        pieces = [rearrange(piece, "w q d -> (w q) d") + touched for piece in tokens.split(counts)]
        return pieces, queries

    def text_ids(self, sample, has_clip):
        """Ids before the clip's vectors, ids behind them, and the ids of the answer to learn."""
        return prompt_ids(self.tokenizer, sample.prompt, sample.history, sample.target, has_clip,
                          self.config.prompt)

    def labels(self, sample, has_clip):
        """The ids behind the clip's vectors, IGNORED in place of those that are not learnt: only
        the last answer and its </s> are, or (DIFF official) each answer of the dialogue."""
        _, after, answer = self.text_ids(sample, has_clip)
        if not self.config.learn_history:
            return [IGNORED] * len(after) + answer
        _, turns = dialogue_ids(self.tokenizer, sample.prompt, sample.history, sample.target,
                                has_clip, self.config.prompt)
        return [i for question, said in turns for i in [IGNORED] * len(question) + said]

    # ---- sizes of a sample; train.py uses them to cut its batches and to weight the parts
    def length(self, sample):
        """L: text tokens and clip vectors of a sample in the LLM."""
        windows = self.window_count(sample)
        return sum(map(len, self.text_ids(sample, windows > 0))) + windows * self.config.queries

    def answer_tokens(self, sample):
        """How many tokens of a sample are learnt: its answer and </s>."""
        return sum(label != IGNORED for label in self.labels(sample, True))

    def diversity_parts(self, sample):
        """How many terms this sample adds to the mean of Eq. (4): its windows; 1 with "sum"."""
        return 1 if self.config.diversity_reduction == "sum" else self.window_count(sample)

    def window_count(self, sample):
        """W of an encoded sample; with sync=False both modalities have their own windows."""
        return sum(math.ceil(n / (self.config.window_frames or n))
                   for n in self.stream_frames(sample) if n)

    def stream_frames(self, sample):
        """F of an encoded sample: one number, or with sync=False one for each modality."""
        visual, audio = self.features_of(sample)
        frames = [0 if visual is None else len(visual),
                  0 if audio is None else math.ceil(len(audio) / self.audio_steps)]
        return [max(frames)] if self.config.sync else frames

    # ---- samples that are longer than the LLM's positions
    def too_long(self, sample, answer=0):
        """Why a sample cannot be read even in part, or "": its question, one window of its clip and
        its target, or `answer` tokens where these are more, do not fit the LLM's positions."""
        before, after, target = self.text_ids(dataclasses.replace(sample, history=()), True)
        answer = max(len(target), answer)
        clip = self.config.queries * (1 if self.config.sync else 2)
        text, positions = len(before) + len(after), self.llm.config.positions
        return "" if text + clip + answer <= positions else (
            f"a question of {text} tokens, {clip} vectors of a clip and {answer} tokens of an "
            f"answer, but the LLM has {positions} positions; shorten the question or the answer")

    def fit(self, sample, answer=0):
        """-> the encoded sample, cut so that it fits the positions of the LLM, and what was left
        out, "" for nothing.  answer: positions to keep for one that is generated.

        The rule: the last windows of the clip are left out (DIFF: at most so many fit), then, next
        to a single window, the oldest turns of the dialogue.  With one window per clip, its last
        frames are left out that have no position in the causal Q-Former.  A warning says so.
        Raises ValueError when the question alone is too long."""
        whole = sample = self.encode_sample(sample)
        most, K = self.llm.config.positions - answer, self.config.window_frames
        kept = frames = max(self.stream_frames(sample))
        if not K and (limit := self.most_frames()) < frames:
            kept, sample = limit, self.first_frames(whole, limit)
        while K and kept > K and self.length(sample) > most:
            kept = (math.ceil(kept / K) - 1) * K
            sample = self.first_frames(whole, kept)
        while self.length(sample) > most and sample.history:
            sample = dataclasses.replace(sample, history=sample.history[1:])
        if self.length(sample) > most:
            raise ValueError(self.too_long(sample, answer))
        parts = []
        if kept < frames:
            reader = f"the LLM has {self.llm.config.positions}" if K else (
                f"the causal Q-Former has {self.config.max_positions}")
            parts.append(f"only {kept} of {frames} frames ({kept / frames:.0%}) of the clip are "
                         f"read, {reader} positions")
        if (left := len(sample.history)) < len(whole.history):
            parts.append(f"only the last {left} of {len(whole.history)} earlier turns are read, "
                         f"the LLM has {self.llm.config.positions} positions")
        if not parts:
            return sample, ""
        cut = "; ".join(parts)
        warnings.warn(f"{sample.prompt[:60]!r}: {cut}", stacklevel=2)
        return sample, cut

    def most_frames(self):
        """Frames that the causal Q-Former has positions for, in one window."""
        return self.config.max_positions // max(self.visual.n_queries, self.audio_steps)

    def first_frames(self, sample, n):
        """An encoded sample with the first n synchronised frames of its clip."""
        visual, audio = self.features_of(sample)
        features = Features(None if visual is None else visual[:n],
                            None if audio is None else audio[:n * self.audio_steps])
        return dataclasses.replace(sample, features=features)

    # ---- Eq. (3) to (5)
    def llm_inputs(self, samples, answer=0):
        """-> list of (embeddings (L,D_llm), labels of the last of them), and the queries.
        answer: positions to keep for one that is generated; see fit."""
        if not samples:
            raise ValueError("an empty batch; wanted a list of at least one Sample")
        samples = [self.fit(sample, answer)[0] for sample in self.encode_batch(samples)]
        tokens, queries = self.audio_visual_tokens(samples)
        rows = []
        for sample, vectors in zip(samples, tokens, strict=True):
            has_clip = len(vectors) > 0
            before, after, target = self.text_ids(sample, has_clip)
            ids = torch.tensor([before + after + target], device=vectors.device)
            text = self.llm.embed(ids)[0]                                         # (T,D_llm)
            rows.append((torch.cat([text[:len(before)], vectors.to(text), text[len(before):]]),
                         self.labels(sample, has_clip)))
        return rows, queries

    def forward(self, samples):
        """List of Samples with targets -> dict of losses.

        loss = ce + lambda * diversity, Eq. (5); ce is the mean over all answer tokens of the batch.
        ce and diversity are means of `tokens` and `diversity_parts` terms; train.py forms the same
        sum from them over micro-batches and ranks (train.Share), so a new loss term belongs there,
        too.  item_ce (B,) is each sample's own mean, which is the same in any batch."""
        missing = [s.prompt for s in samples if s.target is None]
        if missing:
            raise ValueError(f"no target for {missing[0]!r}; model(batch) learns answers, "
                             "model.answer() gives them")
        rows, queries = self.llm_inputs(samples)
        lengths = [len(embeds) for embeds, _ in rows]
        embeds = nn.utils.rnn.pad_sequence(
            [embeds for embeds, _ in rows], batch_first=True)                     # (B,L,D)
        mask = (torch.arange(max(lengths), device=embeds.device)
                < torch.tensor(lengths, device=embeds.device)[:, None])
        hidden = self.llm.hidden(embeds=embeds, mask=mask)                        # (B,L,D)
        # Position p predicts token p + 1; the lm_head runs only where an answer token is predicted.
        where = [(b, n - len(labels) - 1 + i, label)
                 for b, (n, (_, labels)) in enumerate(zip(lengths, rows, strict=True))
                 for i, label in enumerate(labels) if label != IGNORED]
        row, column, wanted = torch.tensor(where, device=embeds.device).T
        token_ce = F.cross_entropy(self.llm.lm_head(hidden[row, column]).float(), wanted,
                                   reduction="none")
        per_item = token_ce.new_zeros(len(rows)).index_add(0, row, token_ce)
        answer_lengths = row.bincount(minlength=len(rows))
        # Eq. (4): a mean over pairs and windows, or the literal sum of each clip
        mean = self.config.diversity_reduction == "mean"
        diversity = diversity_loss(queries, "mean" if mean else "sum") / (1 if mean else len(rows))
        ce = token_ce.mean()
        return {"loss": ce + self.config.diversity * diversity,                   # Eq. (5)
                "ce": ce, "diversity": diversity,
                "tokens": len(wanted), "diversity_parts": len(queries) if mean else len(rows),
                "item_ce": per_item / answer_lengths}

    def end_ids(self):
        """The ids that end an answer: the LLM's own, and ChatML's end of a turn."""
        own, chatml = self.llm.config.eos_id, self.config.prompt == "chatml"
        return (*(own if isinstance(own, tuple) else (own,)),
                *(chatml_ids(self.tokenizer)[1:] if chatml else ()))

    @torch.no_grad()
    def generate(self, samples, stream=None, **settings):
        """Answers of a batch of Samples -> list of str.  Eq. (3); greedy unless the config or
        `settings` (see Llama.generate) say otherwise.  stream(text) receives one answer in pieces,
        as they are generated."""
        config = self.config
        settings = {"max_new_tokens": config.max_new_tokens, "num_beams": config.beams,
                    "repetition_penalty": config.repetition_penalty,
                    "eos_id": self.end_ids()} | settings
        rows, _ = self.llm_inputs([dataclasses.replace(sample, target=None) for sample in samples],
                                  settings["max_new_tokens"])
        longest = max(len(embeds) for embeds, _ in rows)
        # padded on the left
        embeds = torch.stack([F.pad(e, (0, 0, longest - len(e), 0)) for e, _ in rows])
        mask = torch.stack([torch.arange(longest, device=e.device) >= longest - len(e)
                            for e, _ in rows])
        if stream is not None:
            if len(samples) != 1:
                raise ValueError(f"stream with {len(samples)} samples; "
                                 "only a single answer can be streamed")
            push, stream = self.tokenizer.stream_decoder(), without_leading_space(stream)
            settings |= {"stream": lambda row, token: stream(push(token))}
        ids = self.llm.generate(embeds=embeds, mask=mask, **settings)
        if stream is not None:
            stream(push())
        return [self.tokenizer.decode(row).strip() for row in ids]

    def answer(self, clip, question, history=(), mask=None, stream=None, **settings):
        """The answer to one question.  clip: a Clip, the path of any video, audio or image file, or
        None (text alone)."""
        if isinstance(clip, (str, Path)):
            clip = clip_from_path(clip, **self.clip_options())
        sample = Sample(question, clip=clip, history=tuple(history), mask=mask)
        return self.generate([sample], stream=stream, **settings)[0]


def without_leading_space(stream):
    """stream(text), for an answer whose first word starts with the space before it."""
    begun = False

    def passed_on(text):
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or text != ""
        stream(text)

    return passed_on


def audio_steps_per_frame(positions_hz, fps):
    """A = positions per second / frames per second: 50 / 2 = 25.  ValueError where that is no whole
    number: sound and picture would drift apart.  DIFF: such frame rates are refused."""
    steps = round(positions_hz / fps)
    if abs(steps * fps / positions_hz - 1) > 1e-3:
        raise ValueError(
            f"fps={fps}: {positions_hz} audio steps per second do not divide into a whole number "
            "per frame, sound and picture would drift apart; wanted "
            f"{positions_hz}/n, such as {positions_hz / max(1, steps):g}")
    return steps


def load_pretrained(kind, source, **settings):
    """A pretrained part or tokenizer of class `kind`: from a folder, the Hub, or the miniature."""
    return kind.from_pretrained(hub.local_source(source), **settings)


def load_encoders(kind, source, **settings):
    """load_pretrained, but of an LLM only the config is read."""
    if kind is not Llama:
        return load_pretrained(kind, source, **settings)
    config = LlamaConfig.from_folder(hub.folder(hub.local_source(source), tensors=()))
    with torch.device("meta"):
        return Llama(dataclasses.replace(config, vocab_size=settings["vocab_size"]))
