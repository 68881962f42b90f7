"""InstructBLIP, the paper's visual baseline, from the same parts as FAVOR.  Paper Sec. 4.2, Tables
2 and 3.

     an image, or 5 frames of a video (F,3,224,224) --ViT--> (F,P,D_vit)
        --Q-Former, which reads the prompt--> (F,V,D) --language_projection--> (F*V,D_llm)
        --[vectors | </s> prompt]--> Vicuna --> answer

   It works with public weights alone and offers the methods of Favor that eval.py and train.py
   call.  It can also be fine-tuned (the row "fine-tuned" of Table 2): Q-Former, queries and
   projection learn, as in InstructBLIP's own instruction tuning, while ViT and LLM stay frozen.
   Public: InstructBlip."""

import dataclasses

import torch
from einops import rearrange
from torch import nn

from data import Features
from favor import Favor, load_encoders, load_pretrained
from llama import Llama, Tokenizer
from runtime import hub
from vit_qformer import QFormerTokenizer, VisualEncoder, to_pixels

FRAMES = 5                       # equally spaced frames per video: 5 x 32 = 160 vectors (Sec. 4.2)


class InstructBlip(Favor):
    """ViT, instruction-reading Q-Former, language_projection and Vicuna: no sound, no windows."""
    system = "instructblip"
    needs_picture = True                   # the image and video data (Sec. 4.2)
    tasks = ("ic", "ocr", "vqa", "videoqa", "avsd", "avssd")

    def __init__(self, config, visual, projection, llm, tokenizer, qformer_tokenizer):
        nn.Module.__init__(self)
        # One "window" per frame, of as many vectors as the Q-Former has queries; no diversity loss.
        self.config = dataclasses.replace(config, queries=visual.n_queries, diversity=0.0,
                                          encoder_dropout=0.0, lora_targets=(), window_frames=1,
                                          sync=True, learn_history=False, prompt="vicuna",
                                          feature_norm="joint")
        self.tokenizer, self.qformer_tokenizer = tokenizer, qformer_tokenizer
        self.visual, self.language_projection, self.llm = visual, projection, llm
        self.requires_grad_(False)
        # The text half of the last layer's feed-forward reaches no query: it cannot learn.
        last = visual.qformer.encoder.layer[-1]
        unused = {id(p) for part in (last.intermediate, last.output) for p in part.parameters()}
        for p in self.aligner().parameters():
            p.requires_grad_(id(p) not in unused)
        self.aligner().float()                        # trained parts are fp32, as FAVOR's
        visual.qformer.set_dropout(config.dropout)

    @classmethod
    def from_config(cls, config, dtype=None, device=None, load=None):
        """Makes ViT, Q-Former and projection from config.visual and the LLM from config.llm.
        load(kind, source, dtype=, device=, ...) makes one part or tokenizer; by default the
        pretrained one, otherwise (random weights) the projection is random as well."""
        load = load or load_pretrained
        if config.visual_grid:
            raise ValueError(f"--system instructblip needs the Q-Former of an InstructBLIP, which "
                             f"{config.visual} has not; pass --model 7b, or --visual with an "
                             "InstructBLIP and --visual-grid 0")
        tokenizer = load(Tokenizer, config.llm)
        qformer_tokenizer = load(QFormerTokenizer, config.visual)
        visual = load(VisualEncoder, config.visual, dtype=dtype, device=device)
        llm = load(Llama, config.llm, dtype=dtype, device=device, vocab_size=tokenizer.vocab_size)
        with torch.device("meta" if device == "meta" else "cpu"):
            projection = nn.Linear(visual.width, llm.config.width)
            if load in (load_pretrained, load_encoders):
                root = hub.folder(hub.local_source(config.visual), (),
                                  ("language_projection.",))
                hub.load_into(projection, root, prefix="language_projection.")
            model = cls(config, visual, projection, llm, tokenizer, qformer_tokenizer)
        return (model.to(device) if device else model).eval()

    @staticmethod
    def check_saved(config, root):
        """Nothing to check: the trained parts are of InstructBLIP's sizes, not of the config's."""

    def aligner(self):
        """What is fine-tuned, under the Hub's names."""
        parts = nn.Module()
        parts.qformer, parts.query_tokens = self.visual.qformer, self.visual.query_tokens
        parts.language_projection = self.language_projection
        return parts

    def train(self, mode=True):
        """Only the Q-Former has dropout."""
        nn.Module.train(self, False)
        self.training = mode
        self.visual.qformer.train(mode)
        return self

    @torch.no_grad()
    def encode_all(self, clips, prompts):
        """Clips -> one Features each: the ViT's (F,P,D_vit) of an image or of FRAMES frames.  The
        Q-Former comes later, as it may be trained.  Sound is ignored."""
        device, found = self.language_projection.weight.device, {}
        for clip in clips:
            if clip is not None and clip.frames is not None and id(clip) not in found:
                frames = clip.frames
                if not clip.is_image:
                    frames = frames[torch.linspace(0, len(frames) - 1, FRAMES).round().long()]
                found[id(clip)] = to_pixels(frames.to(device), self.visual.image_size)
        if found:
            images = self.visual.encode_image(torch.cat([*found.values()])).split(
                [*map(len, found.values())])                                      # (F,P,D_vit) each
            found = dict(zip(found, images, strict=True))
        return [Features(found.get(id(clip)), None, bool(clip and clip.is_image))
                for clip in clips]

    def features_of(self, sample):
        return self.encode_sample(sample).features.visual, None

    def empty_features(self, seconds):
        """Those of a video, on the device "meta"."""
        vit = self.visual.vit.config
        return torch.empty(FRAMES, vit.n_patches + 1, vit.width, device="meta"), None

    def text_ids(self, sample, has_clip):
        """Ids of [vectors | </s> prompt | answer </s>]: InstructBLIP's first token is </s>, and it
        has no template.  Earlier turns of a dialogue stand before the question."""
        turns = [f"{question} {answer}" for question, answer in sample.history]
        prompt = self.tokenizer.encode(" ".join([*turns, sample.prompt]))
        answer = [] if sample.target is None else [
            *self.tokenizer.encode(self.tokenizer.boundary + sample.target if sample.target else
                                   ""), self.tokenizer.eos_id]
        return [], [self.tokenizer.eos_id, *prompt], answer

    def audio_visual_tokens(self, samples):
        """Samples -> LLM vectors, one (F*V,D_llm) per sample ((0,D_llm) for text), and the queries.
        A dummy frame of zeros goes along, so that every rank of a DDP run gives every trained
        parameter a gradient.  A masked picture becomes vectors of zeros."""
        images = [self.features_of(sample)[0] for sample in samples]
        counts = [0 if image is None else len(image) for image in images]
        patches, width = self.visual.vit.config.n_patches + 1, self.visual.vit.config.width
        like = self.language_projection.weight
        frames = torch.cat([*(image.to(like) for image in images if image is not None),
                            like.new_zeros(1, patches, width)])                  # (F,P,D_vit)
        ids, mask = self.qformer_tokenizer([sample.prompt for sample in samples])
        owner = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)] + [0])
        queries = self.visual.query(frames, ids[owner].to(like.device),
                                    mask[owner].to(like.device))                 # (F,V,D)
        tokens = self.language_projection(queries)                               # (F,V,D_llm)
        touched = 0 * tokens[-1].sum()
        pieces = [rearrange(piece, "f v d -> (f v) d") * float(s.mask not in ("visual", "both"))
                  + touched for s, piece in zip(samples, tokens[:-1].split(counts), strict=True)]
        return pieces, queries[:-1]
