"""Video-LLaMA 7B, the paper's audio-visual baseline, with the weights that its authors released.
Zhang et al. 2023 (Video-LLaMA); FAVOR's paper Sec. 4.2, Tables 2, 3 and 4.

     8 frames (F,3,224,224) --ViT, image Q-Former without text--> (F,V,768) + position of the frame
        --> (F*V,768) --video Q-Former--> (32,768) --llama_proj--> (32,D_llm)
     8 pieces of 2 s of the sound (C,1,128,204) --ImageBind's audio trunk--> (C,1024), length 20
        + position of the piece --audio Q-Former--> (8,768) --audio_llama_proj--> (8,D_llm)
     [<s> text | 8 sound vectors | text | 32 video vectors | question] --> Vicuna v0 --> answer

   What FAVOR does differently: here every clip becomes 40 vectors, however long it is; sound and
   picture never meet before the LLM; nobody has taught the model to understand speech.  Nothing
   but the LLM reads the question, so the 40 vectors of a file serve all its questions.  C counts
   pieces of sound; the other letters are favor.py's.  Tensor names are the released
   ones, translated by RENAME.
   Beside it: blip2.py (the image Q-Former), imagebind.py (the sound), vicuna.py (prompt, sampling).
   Public: VideoLlama, Branches, BranchesConfig."""

import dataclasses
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import nn

from baselines import vicuna
from baselines.blip2 import BLIP2, Blip2Encoder
from baselines.imagebind import CLIPS, FRAME, SoundEncoder, sound_clips
from data import Features
from favor import MODALITY_MASKS, Favor, load_encoders, load_pretrained
from llama import Llama, Tokenizer
from runtime import hub
from vit_qformer import QFormer, QFormerConfig, to_pixels

FRAMES = 8                           # of a video, whatever its length
FRAME_POSITIONS = 32                 # rows of the table, of which 8 are used
POSITIONS = 2000                     # of prompt and answer; the front of a longer one is cut off
NEW_TOKENS = 256                     # as FAVOR's authors; Video-LLaMA's demo: 300
RENAME = (                           # substrings of the released names, and ours; both ways unique
    ("_Qformer.bert.", "_qformer."), (".attention.self.", ".attention.attention."),
    ("crossattention.self.", "crossattention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
    ("modality_preprocessors.audio.cls_token", "cls_token"),
    ("modality_preprocessors.audio.rgbt_stem.", "stem."),
    ("modality_preprocessors.audio.pos_embedding_helper.pos_embed", "pos_embed"),
    ("modality_trunks.audio.blocks.", "blocks."),
    ("modality_heads.audio.0.", "head_norm."), ("modality_heads.audio.2.", "head."),
    ("modality_postprocessors.audio.1.log_logit_scale", "log_logit_scale"))


# ---- the two branches ---------------------------------------------------------------------------

@dataclass(frozen=True)
class BranchesConfig:
    """Sizes of the two branches behind the image Q-Former.  Defaults: the released 7B."""
    llm_width: int = 4096
    image_width: int = 768               # of the image Q-Former's vectors
    width: int = 768                     # of the video and of the audio Q-Former
    layers: int = 2
    heads: int = 12
    ffn: int = 3072
    queries: int = 32                    # of the video Q-Former; the audio one has 8
    sound_width: int = 768               # of ImageBind's audio trunk
    sound_layers: int = 12
    sound_heads: int = 12
    sound_ffn: int = 3072
    sound_out: int = 1024

    def __post_init__(self):
        for width, heads in ((self.width, self.heads), (self.sound_width, self.sound_heads)):
            if width % heads:
                raise ValueError(f"width {width}, {heads} heads; wanted a multiple of them")

    def qformer(self, encoder_width):
        """The QFormerConfig of a branch: no text, cross-attention in every layer."""
        return QFormerConfig(self.width, self.layers, self.heads, self.ffn, vocab_size=0,
                             cross_attention_frequency=1, encoder_width=encoder_width)


class Branches(nn.Module):
    """What Video-LLaMA adds to BLIP-2 and to the LLM, with ImageBind's audio part."""
    published = {"video-llama": (BranchesConfig(),)}

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or BranchesConfig()
        width = config.width
        self.video_query_tokens = nn.Parameter(torch.randn(1, config.queries, width) * 0.02)
        self.video_frame_position_embedding = nn.Embedding(FRAME_POSITIONS, config.image_width)
        self.video_qformer = QFormer(config.qformer(config.image_width))
        self.llama_proj = nn.Linear(width, config.llm_width)
        self.audio_encoder = SoundEncoder(config.sound_width, config.sound_layers,
                                          config.sound_heads, config.sound_ffn, config.sound_out)
        self.audio_query_tokens = nn.Parameter(torch.randn(1, CLIPS, width) * 0.02)
        self.audio_position_embedding = nn.Embedding(CLIPS, config.sound_out)
        self.audio_qformer = QFormer(config.qformer(config.sound_out))
        self.audio_llama_proj = nn.Linear(width, config.llm_width)

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None):
        """The folder that `python -m tools.convert` wrote -> frozen branches in eval mode."""
        root = Path(source).expanduser()
        branches = hub.load_module(lambda: cls(*cls.sizes(root)), root, dtype, device,
                                   rename=RENAME)
        return branches.requires_grad_(False)

    @staticmethod
    def sizes(root):
        """config.json of the folder -> (BranchesConfig,)."""
        path = root / "config.json"
        found = hub.read_object(path) if path.exists() else {}
        if found.get("model_type") != "video-llama":
            raise FileNotFoundError(
                f"{root}: no folder that {hub.CONVERT} made of Video-LLaMA's files; put "
                "finetune-vicuna7b-v2.pth and finetune_vicuna7b_audiobranch.pth of DAMO-NLP-SG/"
                "Video-LLaMA-Series and ImageBind's imagebind_huge.pth into a folder PTH, run "
                f"`{hub.CONVERT} PTH video-llama`, and pass --video-llama video-llama")
        names = {field.name: field.name for field in dataclasses.fields(BranchesConfig)}
        return (hub.make_config(BranchesConfig, found, names, path),)

    def watch(self, frames):
        """The image Q-Former's vectors (B,F,V,D) -> (B,32,D_llm).  One position per frame."""
        if frames.shape[1] > FRAME_POSITIONS:
            raise ValueError(f"{frames.shape[1]} frames; wanted {FRAME_POSITIONS} at most, there "
                             "are no more positions")
        positions = self.video_frame_position_embedding.weight[:frames.shape[1], None]  # (F,1,D)
        frames = rearrange(frames + positions, "b f v d -> b (f v) d")
        queries = self.video_query_tokens.expand(len(frames), -1, -1)
        return self.llama_proj(self.video_qformer(queries, frames))

    def listen(self, mel):
        """(B,C,1,128,204) -> (B,8,D_llm)."""
        if mel.shape[1] > CLIPS:
            raise ValueError(f"{mel.shape[1]} pieces of sound; wanted {CLIPS} at most, there are "
                             "no more positions")
        heard = rearrange(self.audio_encoder(mel.flatten(0, 1)), "(b c) d -> b c d", b=len(mel))
        heard = heard + self.audio_position_embedding.weight[:mel.shape[1]]
        queries = self.audio_query_tokens.expand(len(heard), -1, -1)
        return self.audio_llama_proj(self.audio_qformer(queries, heard))


# ---- the model ----------------------------------------------------------------------------------

class VideoLlama(Favor):
    """ViT and image Q-Former of BLIP-2, the two branches, Vicuna v0: nothing is trained here."""
    system = "video-llama"
    tasks = ("ic", "ocr", "vqa", "videoqa", "avsd", "avssd", "avm", "favd", "valor")
    places = {"visual": BLIP2, "whisper": "video-llama", "llm": "vicuna-7b-v0",
              "max_new_tokens": NEW_TOKENS}      # of the preset 7b; whisper: what hears, Branches
    frames_at_once = FRAMES
    greedy, seed = False, 0                      # DIFF, Video-LLaMA's answers: theirs have no seed

    def __init__(self, config, visual, branches, llm, tokenizer):
        nn.Module.__init__(self)
        self.config = dataclasses.replace(config, queries=branches.config.queries, lora_targets=(),
                                          beams=1, repetition_penalty=1.0)
        for got, wanted, what in (
                (visual.width, branches.config.image_width, "vectors of the image Q-Former"),
                (llm.config.width, branches.config.llm_width, "embeddings of the LLM")):
            if got != wanted:
                raise ValueError(f"the {what} are {got} wide, Video-LLaMA's files were made for "
                                 f"{wanted}; pass parts that belong together: {BLIP2}, and the "
                                 "files of the LLM's own size (vicuna7b for 7B)")
        self.tokenizer, self.visual, self.branches, self.llm = tokenizer, visual, branches, llm
        # Not those of config.json: merged models are published with 0 and 1 there.
        try:
            self.bos, self.eos = map(tokenizer.special_id, ("<s>", "</s>"))
        except ValueError:
            raise ValueError(f"{config.llm}: its tokenizer has no <s> or </s>; {vicuna.WANTED_LLM}"
                             ) from None
        self.requires_grad_(False)

    @classmethod
    def from_config(cls, config, dtype=None, device=None, load=None):
        """Makes the parts from config.visual, config.whisper (the converted branches) and
        config.llm, one after another; see Favor.from_config."""
        load, place = load or load_pretrained, {"dtype": dtype, "device": device}
        if load in (load_pretrained, load_encoders):
            cls.check_parts(config)
        tokenizer = load(Tokenizer, config.llm)
        visual = load(Blip2Encoder, config.visual, **place)
        branches = load(Branches, config.whisper, **place)
        llm = load(Llama, config.llm, vocab_size=tokenizer.vocab_size, **place)
        norm = llm.model.norm.weight
        if not norm.is_meta and norm.float().abs().mean() < 0.1:
            raise ValueError(f"{config.llm}: its last norm is almost 0, as in a delta that has not "
                             f"been added to LLaMA; {vicuna.WANTED_LLM}")
        model = cls(config, visual, branches, llm, tokenizer)
        return (model.to(device) if device else model).eval()

    @staticmethod
    def check_parts(config):
        """Raises before the large files are read, or a clip is made, if a part cannot be right."""
        vicuna.check_llm(config.llm)
        root = Path(config.whisper).expanduser()
        Branches.sizes(root)
        hub.open_tensors(root)

    @property
    def decoding(self):
        """How answers are chosen, as it stands in the report."""
        return "greedy" if self.greedy else (
            f"sampled, top k {vicuna.TOP_K}, top p {vicuna.TOP_P}, seed {self.seed}")

    def train(self, mode=True):
        return nn.Module.train(self, False)

    # ---- a file -> 40 vectors
    def clip_options(self):
        return {"size": self.visual.image_size, "n_frames": FRAMES, "max_seconds": 0}

    @torch.no_grad()
    def encode_all(self, clips, prompts):
        """Clips (None: text alone) -> a Features each: the LLM's vectors (1,32,D) and (8,D).  Each
        clip is encoded on its own, so that no other one changes the last digit."""
        made = {id(clip): self.encode_clip(clip) for clip in clips if clip is not None}
        return [made.get(id(clip)) or Features() for clip in clips]

    def encode_clip(self, clip):
        """Clip -> Features.  DIFF, Video-LLaMA's sound: the decoder's mono mix, which all systems
        hear; the authors hear the first channel.  A sound below 25 ms counts as none."""
        device, visual, audio, times = self.llm.lm_head.weight.device, None, None, ()
        if clip.frames is not None:
            chosen, times = choose_frames(clip)
            pixels = to_pixels(clip.frames[chosen].to(device), self.visual.image_size)
            visual = self.branches.watch(self.visual(pixels)[None])                  # (1,32,D)
        if clip.audio is not None and len(clip.audio) >= FRAME:
            mel = sound_clips(clip.audio.cpu()[None]).to(device)
            audio = self.branches.listen(mel[None])[0]                               # (8,D)
        return Features(visual, audio, clip.is_image, times)

    def empty_features(self, seconds):
        """Those of a video with sound, on the device "meta"."""
        config = self.branches.config
        return (torch.empty(1, config.queries, config.llm_width, device="meta"),
                torch.empty(CLIPS, config.llm_width, device="meta"))

    # ---- 40 vectors and a question -> the LLM's input
    def pieces_of(self, sample):
        """An encoded Sample -> ids of each piece of the prompt, and the vectors between them.

        A modality that is masked, and the picture of a sound alone, are vectors of zeros, as in
        FAVOR's evaluation of sounds.  DIFF, Video-LLaMA's images, left open: one with sound takes
        the prompt of a video with sound."""
        if sample.mask not in MODALITY_MASKS:
            raise ValueError(f"mask={sample.mask!r}; wanted one of {MODALITY_MASKS}")
        features, config = sample.features, self.branches.config
        like, sentence = self.branches.llama_proj.weight, ""
        picture = like.new_zeros(config.queries, config.llm_width)
        if features.visual is not None and sample.mask not in ("visual", "both"):
            picture = features.visual[0].to(like)                                    # (32,D)
        if features.audio is not None:
            sound = features.audio.to(like) * float(sample.mask not in ("audio", "both"))
            kind, vectors = "both", [sound, picture]
        elif features.visual is None:
            kind, vectors = "text", []
        else:
            kind, vectors = "image" if features.is_image else "video", [picture]
            sentence = vicuna.frame_sentence(features.times) if kind == "video" else ""
        turns = [*sample.history, (sample.prompt, None)]
        pieces = vicuna.prompt_pieces(turns, kind, sentence)
        ids = [self.tokenizer.encode(piece) for piece in pieces]
        return [[self.bos, *ids[0]], *ids[1:]], vectors

    def length(self, sample):
        """L: text tokens and vectors of a sample in the LLM."""
        return sum(map(len, (part for parts in self.pieces_of(sample) for part in parts)))

    def too_long(self, sample, answer=0):
        """Nothing is: the front of a long prompt is cut off."""
        return ""

    def llm_input(self, sample, answer):
        """Sample -> (L,D), of which the front is cut off where it leaves no room for the answer."""
        ids, vectors = self.pieces_of(self.encode_sample(sample))
        texts = [self.llm.embed(torch.tensor(part, device=self.llm.lm_head.weight.device))
                 for part in ids]                                                    # (T,D) each
        row = [texts[0]]
        for vector, text in zip(vectors, texts[1:], strict=True):
            row += [vector.to(text), text]
        row, most = torch.cat(row), min(POSITIONS, self.llm.config.positions) - answer
        if most < 1:
            raise ValueError(f"an answer of {answer} tokens; wanted less than {most + answer}")
        if len(row) > most:
            warnings.warn(f"{sample.prompt[:60]!r}: of {len(row)} positions the first "
                          f"{len(row) - most} are cut off, sound and picture first", stacklevel=3)
        return row[-most:]

    # ---- the answer
    @torch.no_grad()
    def generate(self, samples, num_beams=1, max_new_tokens=None, stream=None):
        """Answers of a batch of Samples -> list of str."""
        if num_beams != 1 or not samples or stream:
            raise ValueError(f"{len(samples)} samples, num_beams={num_beams}; wanted at least one "
                             "sample, one beam and no stream: Video-LLaMA samples, or is greedy")
        answer = self.config.max_new_tokens if max_new_tokens is None else max_new_tokens
        samples = self.encode_batch(samples)
        rows = [self.llm_input(sample, answer) for sample in samples]
        dice = None if self.greedy else [
            torch.Generator().manual_seed(self.seed_of(sample)) for sample in samples]
        answers = vicuna.generate(self.llm, rows, answer, self.ended, dice)
        return [self.text_of(ids) for ids in answers]

    def ended(self, ids):
        """Whether an answer ends with its last id: </s>, or ###, which has several spellings."""
        return ids[-1] == self.eos or "###" in self.tokenizer.decode(ids[-4:])

    def text_of(self, ids):
        """Ids of an answer -> its text, without </s>: DIFF, Video-LLaMA's answers keep it in the
        authors' code, where an exact match then fails."""
        return self.tokenizer.decode(ids).split("###")[0].split("Assistant:")[-1].strip()

    def seed_of(self, sample):
        """A number for the dice of one question: the same in any batch, process and order."""
        state = hashlib.blake2b(repr((self.seed, sample.prompt, sample.history, sample.mask)
                                     ).encode(), digest_size=8)
        for part in (sample.features.visual, sample.features.audio):
            state.update(b"" if part is None else part.detach().half().cpu().numpy().tobytes())
        return int.from_bytes(state.digest()) >> 1


def choose_frames(clip):
    """Clip -> places and seconds of its frames: number floor(k N / 8) of the N that differ in time,
    or all of them if they are fewer.  DIFF, Video-LLaMA's frames are found by time, at k/8 of the
    length; with a constant frame rate these are the authors'."""
    times = clip.times or [place / clip.fps for place in range(len(clip.frames))]
    distinct = [place for place, time in enumerate(times) if not place or time != times[place - 1]]
    n = min(FRAMES, len(distinct))
    chosen = [distinct[k * len(distinct) // n] for k in range(n)]
    return chosen, tuple(float(times[place]) for place in chosen)
