"""InstructBLIP's visual encoder: video frames and a question -> 32 vectors per frame.
   Dai et al. 2023 (InstructBLIP) Sec. 2.3, Li et al. 2023 (BLIP-2) Sec. 3.1; FAVOR keeps it frozen.

     frames uint8 (F,H,W,3) --preprocess--> (F,3,224,224)
       --ViT--> (F,P,1408)                                    P = (224/14)^2 + 1 = 257, with CLS
       --Q-Former: V queries next to the T text tokens, cross-attention to the ViT--> (F,V,768)

   The Q-Former reads the question, the ViT does not: encode_image() serves every question about the
   same frames, query() is the cheap half. Parameter names are the Hub's (`vit` is its
   `vision_model`), so the published weights load without a rename table. Masks are bool, True =
   attend; H and W are pixels, and h counts heads.
   Public: VisualEncoder, ViTConfig, QFormerConfig, QFormerTokenizer, resize, normalise,
   preprocess, to_pixels."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import nn

from runtime import hub

FRAMES_AT_ONCE = 64                 # bounds the memory: 64 frames / 2 per second = 32 s of video
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)         # R, G, B of values in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OUR_TENSORS = ("vision_model.", "qformer.", "query_tokens")   # what we read of an InstructBLIP
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class ViTConfig:
    """Defaults: EVA ViT-g/14 without its 40th layer."""
    width: int = 1408
    layers: int = 39
    heads: int = 16
    ffn: int = 6144                                     # int(1408 * 4.3637), EVA's ratio
    image_size: int = 224
    patch_size: int = 14
    eps: float = 1e-6

    def __post_init__(self):
        check_heads(self)
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size {self.patch_size} exceeds image_size {self.image_size}")

    @property
    def n_patches(self):
        """Without CLS: (224 / 14)^2 = 256."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class QFormerConfig:
    """Defaults: BERT-base with cross-attention to the ViT in every second layer."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    vocab_size: int = 30523                             # 30522 of bert-base-uncased + [DEC]; 0: no
    #                                                     text tensors, as in BLIP-2
    max_positions: int = 512                            # of the text; queries have no position
    cross_attention_frequency: int = 2                  # layers 0, 2, 4, ...
    encoder_width: int = 1408
    eps: float = 1e-12

    def __post_init__(self):
        check_heads(self)


def check_heads(config):
    """ValueError unless the heads share the width evenly."""
    if config.width % config.heads:
        raise ValueError(f"width {config.width}, {config.heads} heads; wanted a multiple of them")


def read_config(root, kind="instructblip"):
    """config.json of an InstructBLIP (kind "blip-2": of a BLIP-2) -> (ViTConfig, QFormerConfig,
    n_queries). The Hub's is abridged (its vision_config is one line), so absent fields take the
    defaults above. ValueError for what is not built here, also in the settings of its image
    processor."""
    path = root / "config.json"
    config = hub.model_config(root, kind)
    vision, qformer = ({} if config.get(name) is None else config[name]
                       for name in ("vision_config", "qformer_config"))
    for name, part in (("vision_config", vision), ("qformer_config", qformer)):
        if not isinstance(part, dict) or part.get("hidden_act", "gelu") != "gelu":
            raise ValueError(f"{path}: {name} is {part!r:.80}; wanted an object {{...}} whose "
                             "hidden_act is 'gelu' (all published InstructBLIPs)")
    shared = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
              "ffn": "intermediate_size", "eps": "layer_norm_eps"}     # ours: the Hub's
    vit = hub.make_config(ViTConfig, vision, shared | {
        "image_size": "image_size", "patch_size": "patch_size"}, f"{path}: vision_config")
    qformer = {"encoder_hidden_size": vit.width} | qformer
    qformer = hub.make_config(QFormerConfig, qformer, shared | {
        "vocab_size": "vocab_size", "max_positions": "max_position_embeddings",
        "cross_attention_frequency": "cross_attention_frequency",
        "encoder_width": "encoder_hidden_size"}, f"{path}: qformer_config")
    if qformer.encoder_width != vit.width:
        raise ValueError(f"{path}: qformer_config's encoder_hidden_size {qformer.encoder_width} is "
                         f"not vision_config's hidden_size {vit.width}")
    queries = config.get("num_query_tokens", 32)
    if type(queries) is not int or not 0 < queries <= hub.LARGEST_SIZE:
        raise ValueError(f"{path}: num_query_tokens is {queries!r:.80}; wanted a whole number from "
                         f"1 to {hub.LARGEST_SIZE}")
    other = root / "processor_config.json"
    if other.exists() and hub.read_object(other).get("num_query_tokens") not in (None, queries):
        raise ValueError(f"{other}: num_query_tokens is another one than {queries} in {path}; both "
                         "files must be of one model")
    check_processor(root, vit.image_size)
    return vit, qformer, queries


def check_processor(root, size):
    """ValueError if InstructBLIP's image processor, where its settings are in the folder, does
    something else than preprocess(frames, size)."""
    built = {"do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
             "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
             "do_center_crop": False, "do_pad": False, "size": {"height": size, "width": size}}
    settings, places = hub.processor(root, "image_processor", (*built, "image_processor_type"),
                                     plain)
    kind = settings.pop("image_processor_type", "BlipImageProcessor")
    odd = [key for key, value in settings.items() if not same(value, built[key])]
    if kind != "BlipImageProcessor":
        raise ValueError(f"{places['image_processor_type']}: image_processor_type is {kind!r:.80}; "
                         "wanted BlipImageProcessor")
    if odd:
        raise ValueError(f"{places[odd[0]]}: {odd[0]} is {settings[odd[0]]!r:.80}; only "
                         f"{built[odd[0]]} is built here: frames are resized to {size} x {size} of "
                         "vision_config's image_size, normalised with CLIP's mean and deviation")


def plain(key, value):
    """A setting of an image processor, as several versions of transformers write it -> one form."""
    if key == "size" and isinstance(value, int):
        return {"height": value, "width": value}
    if key == "image_processor_type":                                # also ...Fast and ...Pil
        return str(value).removesuffix("Fast").removesuffix("Pil")
    return round(value, 7) if isinstance(value, float) else value


def same(value, wanted):
    """Whether a JSON value is `wanted`, numbers to 1e-6."""
    if isinstance(wanted, tuple):
        return isinstance(value, list) and len(value) == len(wanted) and all(
            map(same, value, wanted))
    if isinstance(wanted, float):
        return isinstance(value, float | int) and abs(value - wanted) < 1e-6
    return value == wanted


class Norm(nn.LayerNorm):
    """LayerNorm, which sums in fp32 whatever it is given; autocast would also return fp32."""
    def forward(self, x):
        return super().forward(x).to(x.dtype)


# ---- EVA ViT: pixels -> patch tokens ------------------------------------------------------------

class PatchEmbedding(nn.Module):
    """One vector per patch of 14 x 14 pixels, CLS in front, learnt positions."""
    def __init__(self, config):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        self.position_embedding = nn.Parameter(
            torch.randn(1, config.n_patches + 1, config.width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, pixels):
        """(F,3,H,W) -> (F,P,D), CLS first, then patches row by row."""
        patches = rearrange(self.patch_embedding(pixels), "f d h w -> f (h w) d")
        cls = self.class_embedding.expand(len(pixels), -1, -1)               # (1,1,D) -> (F,1,D)
        return torch.cat((cls, patches), dim=1) + self.position_embedding


class ViTAttention(nn.Module):
    """Every patch attends to every other one."""
    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)     # rows: all q, all k, all v
        self.projection = nn.Linear(config.width, config.width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "f p (three h d) -> three f h p d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.projection(rearrange(x, "f h p d -> f p (h d)"))


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = Norm(config.width, config.eps)
        self.self_attn = ViTAttention(config)
        self.layer_norm2 = Norm(config.width, config.eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(config.width, config.ffn),
                                  "fc2": nn.Linear(config.ffn, config.width)})

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x))))


class ViT(nn.Module):
    """No pooling: all P tokens, CLS among them, go on to the Q-Former."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbedding(config)
        self.encoder = nn.ModuleDict({
            "layers": nn.ModuleList(ViTBlock(config) for _ in range(config.layers))})
        self.post_layernorm = Norm(config.width, config.eps)

    def forward(self, pixels):
        """(F,3,224,224) -> (F,P,D)."""
        x = self.embeddings(pixels.to(self.post_layernorm.weight))           # dtype of the weights
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


# ---- Q-Former: queries and text look at the patch tokens ----------------------------------------

class TextEmbedding(nn.Module):
    """The queries and, behind them, BERT's word and position embeddings of the text."""
    def __init__(self, config):
        super().__init__()
        if config.vocab_size:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
            self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.layernorm = Norm(config.width, config.eps)          # the only lower-case one
        self.dropout = nn.Dropout(0.0)

    def forward(self, queries, text_ids=None):
        """(F,V,D) and ids (F,T) -> (F,V+T,D). Positions count from 0 at the first text token."""
        if text_ids is None:
            return self.dropout(self.layernorm(queries))
        text = self.word_embeddings(text_ids) + self.position_embeddings.weight[:text_ids.shape[1]]
        return self.dropout(self.layernorm(torch.cat((queries, text), dim=1)))


class QFormerAttention(nn.Module):
    """Attention, residual, norm (post-norm, as in BERT); `context` may have another width."""
    def __init__(self, config, context_width):
        super().__init__()
        self.heads = config.heads
        self.attention = nn.ModuleDict({"query": nn.Linear(config.width, config.width),
                                        "key": nn.Linear(context_width, config.width),
                                        "value": nn.Linear(context_width, config.width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.width, config.width),
                                     "LayerNorm": Norm(config.width, config.eps)})
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, context, mask=None):
        """x (F,T,D), context (F,C,D'), mask (F,1,1,C) bool, True = attend -> (F,T,D)."""
        q = rearrange(self.attention.query(x), "f t (h d) -> f h t d", h=self.heads)
        k = rearrange(self.attention.key(context), "f c (h d) -> f h c d", h=self.heads)
        v = rearrange(self.attention.value(context), "f c (h d) -> f h c d", h=self.heads)
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
        y = self.output.dense(rearrange(y, "f h t d -> f t (h d)"))
        return self.output.LayerNorm(self.dropout(y) + x)


def feed_forward(x, up, down, dropout):
    """Feed-forward, residual, norm: one pair of modules for the queries, another for the text."""
    return down.LayerNorm(dropout(down.dense(F.gelu(up.dense(x)))) + x)


class QFormerLayer(nn.Module):
    """Queries and text attend to each other; then only the queries look at the image."""
    def __init__(self, config, has_cross_attention):
        super().__init__()
        def up():
            return nn.ModuleDict({"dense": nn.Linear(config.width, config.ffn)})
        def down():
            return nn.ModuleDict({"dense": nn.Linear(config.ffn, config.width),
                                  "LayerNorm": Norm(config.width, config.eps)})
        self.attention = QFormerAttention(config, config.width)
        self.crossattention = (
            QFormerAttention(config, config.encoder_width) if has_cross_attention else None)
        if config.vocab_size:
            self.intermediate, self.output = up(), down()                    # text
        self.intermediate_query, self.output_query = up(), down()            # queries
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, image, n_queries, mask=None):
        """x (F,V+T,D), image (F,P,D_vit), mask (F,1,1,V+T) bool -> (F,V+T,D)."""
        x = self.attention(x, x, mask)
        queries, text = x[:, :n_queries], x[:, n_queries:]                   # (F,V,D), (F,T,D)
        if self.crossattention is not None:
            queries = self.crossattention(queries, image)
        queries = feed_forward(queries, self.intermediate_query, self.output_query, self.dropout)
        if text.shape[1]:
            text = feed_forward(text, self.intermediate, self.output, self.dropout)
        return torch.cat((queries, text), dim=1)


class QFormer(nn.Module):
    """BERT whose queries read the question and the image and become the image's vectors."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbedding(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(
            QFormerLayer(config, has_cross_attention=i % config.cross_attention_frequency == 0)
            for i in range(config.layers))})

    def set_dropout(self, p):
        """Sets BERT's dropout, of embeddings, attention weights and outputs. It is 0 unless set and
        acts only in train() mode. Published models were trained with 0.1; a frozen one needs none.
        """
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    def forward(self, queries, image, text_ids=None, text_mask=None):
        """queries (F,V,D), image (F,P,D_vit), text_ids (F,T), text_mask (F,T) bool -> (F,V,D)."""
        n_queries, mask = queries.shape[1], None
        x = self.embeddings(queries, text_ids)                               # (F,V+T,D)
        if text_mask is not None:
            mask = F.pad(text_mask, (n_queries, 0), value=True)[:, None, None]   # (F,1,1,V+T)
        for layer in self.encoder.layer:
            x = layer(x, image, n_queries, mask)
        return x[:, :n_queries]


# ---- both ---------------------------------------------------------------------------------------

class VisualEncoder(nn.Module):
    """ViT, Q-Former and the Q-Former's learnt queries."""
    reads_question, resample = True, "bicubic"
    def __init__(self, vit=None, qformer=None, n_queries=32):
        super().__init__()
        vit, qformer = vit or ViTConfig(), qformer or QFormerConfig()
        if qformer.encoder_width != vit.width:
            raise ValueError(f"the Q-Former wants image features of width {qformer.encoder_width}, "
                             f"the ViT makes {vit.width}; set encoder_width={vit.width}")
        self.image_size, self.n_queries, self.width = vit.image_size, n_queries, qformer.width
        self.vit = ViT(vit)
        self.qformer = QFormer(qformer)
        self.query_tokens = nn.Parameter(torch.randn(1, n_queries, qformer.width) * 0.02)

    def to_pixels(self, frames):
        """A Clip's frames (F,3,H,W) -> float32 (F,3,size,size) for encode_image."""
        return to_pixels(frames, self.image_size)

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None):
        """An InstructBLIP on the Hub or in a local folder -> frozen encoder in eval mode. Its
        language model and its projection stay unread."""
        root = hub.folder(source, files=hub.PROCESSOR_FILES, tensors=OUR_TENSORS)
        encoder = hub.load_module(lambda: cls(*read_config(root)), root, dtype, device,
                                  only=OUR_TENSORS, rename=(("vision_model.", "vit."),))
        return encoder.requires_grad_(False)

    def encode_image(self, pixels):
        """(F,3,H,W) from preprocess() -> (F,P,D_vit), the same for every question."""
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels are {tuple(pixels.shape)}; wanted (F,3,{size},{size}): "
                             f"preprocess(frames, {size})")
        return torch.cat([self.vit(part) for part in pixels.split(FRAMES_AT_ONCE)])

    def query(self, image_features, text_ids=None, text_mask=None):
        """image_features (F,P,D_vit), text_ids (T,), (1,T) or (F,T) -> (F,V,D).
        text_mask: bool in the shape of text_ids, False = padding; None: no padding."""
        n_frames = len(image_features)
        text_ids, text_mask = self._text_per_frame(n_frames, text_ids, text_mask)
        parts = []
        for start in range(0, max(n_frames, 1), FRAMES_AT_ONCE):     # once also for 0 frames
            rows = slice(start, start + FRAMES_AT_ONCE)
            image = image_features[rows].to(self.query_tokens)
            parts.append(self.qformer(
                self.query_tokens.expand(len(image), -1, -1), image,         # (1,V,D) -> (F,V,D)
                None if text_ids is None else text_ids[rows],
                None if text_mask is None else text_mask[rows]))
        return torch.cat(parts)

    def forward(self, pixels, text_ids=None, text_mask=None):
        """(F,3,H,W) and optional text -> (F,V,D)."""
        return self.query(self.encode_image(pixels), text_ids, text_mask)

    def _text_per_frame(self, n_frames, text_ids, text_mask):
        """Checks text and mask and gives each frame a row: (T,), (1,T) or (F,T) -> (F,T)."""
        if text_ids is None:
            if text_mask is not None:
                raise ValueError("text_mask without text_ids; pass both or neither")
            return None, None
        text_ids = torch.atleast_2d(text_ids)
        limit = self.qformer.config.max_positions
        if text_ids.shape[0] not in (1, n_frames) or text_ids.shape[1] > limit:
            raise ValueError(f"text_ids have shape {tuple(text_ids.shape)}; wanted (T,), (1,T) or "
                             f"({n_frames},T) with T <= {limit}")
        if text_mask is not None:
            text_mask = torch.atleast_2d(text_mask)
            if text_mask.dtype != torch.bool or text_mask.shape != text_ids.shape:
                raise ValueError(f"text_mask is {text_mask.dtype} {tuple(text_mask.shape)}; wanted "
                                 f"bool {tuple(text_ids.shape)}, False = padding")
            text_mask = text_mask.expand(n_frames, -1)
        return text_ids.expand(n_frames, -1), text_mask


# ---- text -> ids --------------------------------------------------------------------------------

class QFormerTokenizer:
    """BERT's WordPiece, lower case and without accents: [CLS] what is this ? [SEP]."""
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.pad_id = tokenizer.token_to_id("[PAD]")

    @classmethod
    def from_pretrained(cls, source):
        """From <source>/qformer_tokenizer/vocab.txt, else from the tokenizer.json beside it."""
        root = hub.folder(source, ("qformer_tokenizer/*",), tensors=()) / "qformer_tokenizer"
        if (root / "vocab.txt").is_file():
            try:
                pieces = (root / "vocab.txt").read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{root / 'vocab.txt'}: not UTF-8 ({error}); download it again"
                                 ) from None
            if missing := [piece for piece in SPECIAL if piece not in pieces]:
                raise ValueError(f"{root / 'vocab.txt'}: no {', '.join(missing)}; wanted the "
                                 "vocabulary of bert-base-uncased")
            return cls(BertWordPieceTokenizer(str(root / "vocab.txt")))
        if (root / "tokenizer.json").is_file():
            try:
                return cls(Tokenizer.from_file(str(root / "tokenizer.json")))
            except Exception as error:        # the library raises nothing more specific
                raise ValueError(f"{root / 'tokenizer.json'}: not readable ({error}); download it "
                                 "again") from None
        if (root.parent / "config.json").exists():
            hub.model_config(root.parent, "instructblip")            # refuses another model by name
        raise FileNotFoundError(f"{root}: neither vocab.txt nor tokenizer.json"
                                f"{hub.foreign(root.parent)}; copy the folder qformer_tokenizer of "
                                "the InstructBLIP repo")

    def __call__(self, texts, max_length=128):
        """List of B texts -> ids (B,T) long, mask (B,T) bool, padded on the right; T <= max_length
        (at least 2). A longer text loses its beginning, because the question is at its end, but it
        keeps [CLS] and [SEP]."""
        if isinstance(texts, str):
            raise ValueError("texts is one str; wanted a list of str")
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        rows = [row if len(row) <= max_length else row[:1] + row[1 - max_length:] for row in rows]
        ids = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row), True
        return ids, mask


# ---- frames -> pixels ---------------------------------------------------------------------------

def checked_frames(frames):
    """uint8 (F,H,W,3), numpy or torch -> uint8 tensor (F,3,H,W)."""
    if isinstance(frames, np.ndarray):       # torch.from_numpy refuses flipped and read-only arrays
        frames = torch.from_numpy(np.require(frames, requirements=["C", "W"]))
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}; "
                         "wanted uint8 (F,H,W,3), RGB")
    return rearrange(frames, "f h w c -> f c h w")


def resize(frames, size=224, mode="bicubic"):
    """uint8 (F,H,W,3) -> uint8 (F,3,size,size), with antialiasing: PIL's values to 1-2 of 255.
    The aspect ratio changes and nothing is cropped, as in InstructBLIP. mode: or "bilinear"."""
    x = checked_frames(frames)
    if x.shape[2:] != (size, size):
        # torch has this uint8 kernel only on the CPU; floats would round differently.
        x = F.interpolate(x.cpu(), (size, size), mode=mode, antialias=True).to(x.device)
    return x.contiguous()


def standardise(x):
    """Floats (F,3,H,W), 0 to 255 -> mean 0 and standard deviation 1 per colour on CLIP's images."""
    mean, std = (x.new_tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))   # (3,1,1)
    return (x / 255 - mean) / std


def normalise(pixels):
    """uint8 (F,3,H,W) -> float32 (F,3,H,W)."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels are {pixels.dtype} {tuple(pixels.shape)}; "
                         "wanted uint8 (F,3,H,W), as resize() returns them")
    return standardise(pixels.float())


def resize_plain(frames, size=224):
    """uint8 (F,H,W,3) -> float (F,3,size,size), 0 to 255 and a little beyond: bicubic on floats
    without antialiasing and without clipping. Up to 13 of 255 away from PIL when shrinking."""
    return F.interpolate(checked_frames(frames).float(), (size, size), mode="bicubic",
                         align_corners=False)


def preprocess(frames, size=224, antialias=True):
    """uint8 (F,H,W,3) -> float32 (F,3,size,size), the input of encode_image().
    antialias=False is how the authors' released code treats video frames, but not still images."""
    return normalise(resize(frames, size)) if antialias else standardise(resize_plain(frames, size))


def to_pixels(frames, size=224):
    """A Clip's frames (F,3,H,W), uint8 or floats of that range -> float32 (F,3,size,size)."""
    if frames.is_floating_point():                             # already through resize_plain
        return standardise(frames)
    return preprocess(frames.permute(0, 2, 3, 1), size)
