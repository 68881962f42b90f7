"""Visual encoders without a Q-Former: frames -> a grid of vectors per frame, for any question.
   SigLIP (Zhai et al. 2023), SigLIP 2 (Tschannen et al. 2025), DINOv2 (Oquab et al. 2024; with
   registers, Darcet et al. 2024); FAVOR keeps them frozen.

     frames uint8 (F,H,W,3) --resize, mean and deviation of the model--> (F,3,224,224)
       --ViT--> (F,P,D)                     P = (224/16)^2 = 196 for SigLIP, (224/14)^2 for DINOv2
       --mean over the cells of a g x g grid--> (F,V,D)                 V = g^2 = 49, 25, ...

   Both are one pre-norm transformer: `ViTConfig` says what differs. Names in the file become ours
   by the table RENAME. DIFF: nothing is cropped, the picture is resized to a square as it is for
   InstructBLIP; DINOv2's own processor takes the middle of one of 256 x n.
   Public: GridEncoder, ViTConfig, DINOV2, read_config."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from runtime import hub
from vit_qformer import FRAMES_AT_ONCE, Norm, check_heads, plain, resize, same

RESAMPLE = {2: "bilinear", 3: "bicubic"}                   # PIL's numbers in the Hub's files


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and kind of a tower. Defaults: SigLIP 2 base, patch16-224."""
    kind: str = "siglip"                      # or "dinov2"
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    image_size: int = 224                     # of the frames that it gets
    patch_size: int = 16
    trained_size: int = 224                   # side of the pictures that its positions are for
    registers: int = 0                        # extra tokens of DINOv2 that hold no patch
    qkv_bias: bool = True
    eps: float = 1e-6
    mean: tuple = (0.5, 0.5, 0.5)             # R, G, B of values in [0, 1]
    std: tuple = (0.5, 0.5, 0.5)
    resample: str = "bilinear"

    def __post_init__(self):
        check_heads(self)
        if self.patch_size > min(self.image_size, self.trained_size):
            raise ValueError(f"patch_size {self.patch_size} exceeds the image_size "
                             f"{min(self.image_size, self.trained_size)}")

    @property
    def side(self):
        """Patches per side of a frame: 224 / 16 = 14."""
        return self.image_size // self.patch_size

    @property
    def trained_side(self):
        return self.trained_size // self.patch_size

    @property
    def n_patches(self):
        """Without CLS and registers: 14^2 = 196."""
        return self.side ** 2

    @property
    def first_patch(self):
        """Tokens before the patches: DINOv2's CLS and registers."""
        return 0 if self.kind == "siglip" else 1 + self.registers


KINDS = {"siglip": "siglip", "siglip_vision_model": "siglip", "dinov2": "dinov2",
         "dinov2_with_registers": "dinov2"}                # model_type of the Hub: ours
SIZES = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
         "trained_size": "image_size", "patch_size": "patch_size", "eps": "layer_norm_eps"}
DINOV2 = {"kind": "dinov2", "patch_size": 14, "resample": "bicubic",      # of all its sizes;
          "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}    # ImageNet's colours

# Substrings of a name in the file: of ours; applied in this order.
RENAME = {
    "siglip": (("embeddings.", ""), ("encoder.layers.", "layers."), ("self_attn.", ""),
               ("layer_norm", "norm"), ("mlp.", ""), ("post_layernorm", "norm"),
               ("position_embedding.weight", "position_embedding")),
    "dinov2": (("embeddings.", ""), ("patch_projection", "patch_embedding"),
               ("position_embeddings", "position_embedding"), ("encoder.layer.", "layers."),
               ("attention.attention.query", "q_proj"), ("attention.attention.key", "k_proj"),
               ("attention.attention.value", "v_proj"), ("attention.output.dense", "out_proj"),
               ("layer_scale1.lambda1", "scale1"), ("layer_scale2.lambda1", "scale2"),
               ("mlp.", ""), ("layernorm", "norm"))}
READ = {"siglip": ("embeddings.", "encoder.", "post_layernorm."),     # without its pooling head
        "dinov2": ("embeddings.cls", "embeddings.p", "embeddings.reg", "encoder.", "layernorm.")}


def read_config(root):
    """config.json and the image processor's settings of a folder -> ViTConfig. What config.json
    leaves out is that of the base models. ValueError names what is not built here."""
    path = root / "config.json"
    config = hub.model_config(root, tuple(KINDS))
    if (name := config.get("model_type")) is None:         # two families: not to be guessed
        raise ValueError(f"{path}: no model_type; wanted {', '.join(KINDS)}")
    kind, given = KINDS[name], config
    if name == "siglip":                                   # a text model may stand beside it
        given = {} if config.get("vision_config") is None else config["vision_config"]
    if not isinstance(given, dict):
        raise ValueError(f"{path}: vision_config is {given!r:.80}; wanted an object {{...}}")
    act = "gelu_pytorch_tanh" if kind == "siglip" else "gelu"
    for key, wanted in (("hidden_act", act), ("use_swiglu_ffn", False), ("num_channels", 3),
                        ("apply_layernorm", True), ("mlp_ratio", 4)):
        if given.get(key, wanted) != wanted:
            raise ValueError(f"{path}: {key} is {given[key]!r:.80}; only {wanted!r} is built here")
    names, ready = {"ffn": "intermediate_size", "image_size": "image_size"}, {}
    if kind == "dinov2":
        width, ready = given.get("hidden_size", ViTConfig.width), dict(DINOV2)
        given = {"patch_size": ready.pop("patch_size"), "num_register_tokens": 4} | given | {
            "ffn": 4 * width if type(width) is int else width}
        names = {"ffn": "ffn", "qkv_bias": "qkv_bias"} | (
            {"registers": "num_register_tokens"} if name == "dinov2_with_registers" else {})
    made = hub.make_config(ViTConfig, given, SIZES | names, path, zero=("registers",))
    return replace(made, **ready | read_processor(root, kind, made.image_size))


def read_processor(root, kind, size):
    """The settings of the image processor in a folder, where there are some -> {field of ViTConfig:
    value}. ValueError if it does something else than to_pixels(), DINOv2's crop aside."""
    built = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
             "do_pad": False}
    square = {"height": size, "width": size}
    built |= ({"image_processor_type": "SiglipImageProcessor", "size": square,
               "do_center_crop": False} if kind == "siglip" else
              {"image_processor_type": "BitImageProcessor", "crop_size": square})
    wanted = built | {"resample": "2 (bilinear) or 3 (bicubic)", **dict.fromkeys(
        ("image_mean", "image_std"), "three numbers from 0 to 1, of red, green and blue,")}
    settings, places = hub.processor(root, "image_processor", wanted, lambda key, value: plain(
        key.removeprefix("crop_"), value))
    for key, value in settings.items():
        good = (same(value, built[key]) if key in built else value in (*RESAMPLE,)
                if key == "resample" else are_colours(value, least=(key == "image_std") * 1e-6))
        if not good:
            raise ValueError(f"{places[key]}: {key} is {value!r:.80}; only {wanted[key]} is built "
                             "here")
    found = {ours: tuple(settings[theirs]) for ours, theirs in
             (("mean", "image_mean"), ("std", "image_std")) if theirs in settings}
    # Where there is a file, its silence means what the published code takes then.
    return found | ({"resample": RESAMPLE[settings.get("resample", 3)]} if places else {})


def are_colours(value, least):
    """Whether a JSON value is a list of three numbers from `least` to 1."""
    return isinstance(value, list) and len(value) == 3 and all(
        type(v) in (int, float) and least <= v <= 1 for v in value)


# ---- the transformer ----------------------------------------------------------------------------

class Block(nn.Module):
    """Pre-norm transformer block. DINOv2 scales both branches by learnt factors."""
    def __init__(self, config):
        super().__init__()
        self.heads, width, bias = config.heads, config.width, config.qkv_bias
        self.norm1, self.norm2 = Norm(width, config.eps), Norm(width, config.eps)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, config.ffn), nn.Linear(config.ffn, width)
        self.gelu = partial(F.gelu, approximate="tanh" if config.kind == "siglip" else "none")
        self.scale1 = self.scale2 = 1.0
        if config.kind == "dinov2":
            self.scale1, self.scale2 = (nn.Parameter(torch.ones(width)) for _ in range(2))

    def forward(self, x):
        """(F,P,D) -> (F,P,D): every token attends to every other one."""
        y = self.norm1(x)
        q, k, v = (rearrange(part(y), "f p (h d) -> f h p d", h=self.heads)
                   for part in (self.q_proj, self.k_proj, self.v_proj))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "f h p d -> f p (h d)")
        x = x + self.scale1 * self.out_proj(y)
        return x + self.scale2 * self.fc2(self.gelu(self.fc1(self.norm2(x))))


class GridEncoder(nn.Module):
    """A frozen ViT whose map of patches is averaged to `grid` x `grid` vectors per frame. It offers
    what VisualEncoder offers, but does not read the question: query() returns what it is given."""
    reads_question = False               # so the features of a clip serve all its questions

    def __init__(self, config=None, grid=7):
        super().__init__()
        config = config or ViTConfig()
        if not 1 <= grid <= config.side:
            raise ValueError(f"visual_grid is {grid}; wanted 1 to {config.side}, the patches per "
                             "side of a frame")
        self.config, self.grid = config, grid
        self.image_size, self.n_queries, self.width = config.image_size, grid ** 2, config.width
        self.resample = config.resample                    # how its frames are made smaller
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, size, stride=size)
        # Learnt for the pictures of its own training: (P,D), DINOv2's with CLS and a batch axis.
        tokens = config.trained_side ** 2
        self.position_embedding = nn.Parameter(torch.randn(
            (tokens, config.width) if config.kind == "siglip" else
            (1, tokens + 1, config.width)) * 0.02)
        if config.kind == "dinov2":
            self.cls_token = nn.Parameter(torch.randn(1, 1, config.width) * 0.02)
        if config.registers:
            self.register_tokens = nn.Parameter(
                torch.randn(1, config.registers, config.width) * 0.02)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.width, config.eps)

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None, grid=7):
        """A SigLIP or DINOv2 on the Hub or in a local folder -> frozen encoder in eval mode. Of a
        SigLIP with a text model only the visual part is read: of SigLIP 2 base 0.34 GB of a file of
        1.50 GB, which is downloaded whole. The config comes first, so that a repo of another model
        is refused before its weights are downloaded."""
        config = read_config(hub.folder(source, hub.PROCESSOR_FILES, tensors=()))
        prefix = ("vision_model.", "") if config.kind == "siglip" else ("dinov2.", "")
        only = [start + name for start in prefix for name in READ[config.kind]]
        root = hub.folder(source, hub.PROCESSOR_FILES, only)
        encoder = hub.load_module(lambda: cls(config, grid), root, dtype, device, prefix=prefix,
                                  only=only, rename=RENAME[config.kind])
        return encoder.requires_grad_(False)

    def positions(self):
        """The position embeddings, resampled in fp32 if the frames are of another size than the
        pictures of its training -> (1,P,D), CLS among them; bicubic as in the published code, and
        with antialiasing where there are registers."""
        own, config = self.position_embedding, self.config
        own = own.reshape(1, -1, config.width)                                  # (1,P,D)
        if config.side == config.trained_side:
            return own
        first = own.shape[1] - config.trained_side ** 2                         # CLS or nothing
        grid = rearrange(own[:, first:].float(), "f (h w) d -> f d h w", h=config.trained_side)
        grid = F.interpolate(grid, (config.side, config.side), mode="bicubic",
                             antialias=config.registers > 0)
        grid = rearrange(grid, "f d h w -> f (h w) d").to(own.dtype)
        return torch.cat((own[:, :first], grid), dim=1)

    def patches(self, pixels):
        """(F,3,H,W) from to_pixels() -> all patches after the last norm (F,P,D), row by row."""
        x = self.patch_embedding(pixels.to(self.norm.weight))                   # dtype of weights
        x = rearrange(x, "f d h w -> f (h w) d")
        if self.config.kind == "dinov2":
            x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = x + self.positions()
        if self.config.registers:                                  # behind CLS, without position
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)[:, self.config.first_patch:]

    def encode_image(self, pixels):
        """(F,3,H,W) from to_pixels() -> (F,V,D), the same for every question."""
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels are {tuple(pixels.shape)}; wanted (F,3,{size},{size}) from "
                             "to_pixels()")
        parts = []
        for part in pixels.split(FRAMES_AT_ONCE):
            grid = rearrange(self.patches(part), "f (h w) d -> f d h w", h=self.config.side)
            grid = F.adaptive_avg_pool2d(grid, self.grid)                       # (F,D,g,g)
            parts.append(rearrange(grid, "f d h w -> f (h w) d"))               # (F,V,D)
        return torch.cat(parts)

    def query(self, image_features, text_ids=None, text_mask=None):
        """(F,V,D) -> the same, whatever the question is."""
        return image_features

    # ---- frames -> pixels
    def resize(self, frames, size=None):
        """uint8 (F,H,W,3) -> uint8 (F,3,size,size) with antialiasing, as PIL to 1 of 255."""
        return resize(frames, size or self.image_size, self.config.resample)

    def to_pixels(self, frames):
        """uint8 (F,3,H,W), or floats of that range, -> float32 (F,3,size,size) with the mean and
        deviation of the model's own training."""
        if not frames.is_floating_point():
            frames = self.resize(frames.permute(0, 2, 3, 1)).float()
        mean, std = (frames.new_tensor(v)[:, None, None]
                     for v in (self.config.mean, self.config.std))              # (3,1,1)
        return (frames / 255 - mean) / std
