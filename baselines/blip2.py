"""BLIP-2's image encoder (Li et al. 2023): Video-LLaMA keeps all of it below the LLM.

     pixels (F,3,224,224) --ViT, last norm--> (F,257,1408) --Q-Former without text--> (F,32,768)

   Public: Blip2Encoder, BLIP2."""

import dataclasses

from runtime import hub
from vit_qformer import OUR_TENSORS, QFormerConfig, VisualEncoder, ViTConfig, read_config

BLIP2 = "Salesforce/blip2-flan-t5-xxl"


class Blip2Encoder(VisualEncoder):
    """ViT, last norm and image Q-Former of BLIP-2's pretraining with FlanT5-XXL, without text."""
    published = {BLIP2: (ViTConfig(), QFormerConfig(), 32)}

    def __init__(self, vit=None, qformer=None, n_queries=32):
        qformer = dataclasses.replace(qformer or QFormerConfig(), vocab_size=0)
        super().__init__(vit, qformer, n_queries)
        self.vit.post_layernorm.eps = 1e-5                # the ViT's other norms have 1e-6

    @classmethod
    def from_pretrained(cls, source, dtype=None, device=None):
        """A BLIP-2 on the Hub or in a local folder -> frozen encoder in eval mode.  ValueError for
        a model whose Q-Former is another one."""
        cls.sizes(hub.folder(source, hub.PROCESSOR_FILES, tensors=()))    # before the download
        root = hub.folder(source, hub.PROCESSOR_FILES, OUR_TENSORS)
        encoder = hub.load_module(
            lambda: cls(*cls.sizes(root)), root, dtype, device, only=OUR_TENSORS,
            rename=(("vision_model.", "vit."), ("qformer.layer", "qformer.embeddings.layer")))
        return encoder.requires_grad_(False)

    @staticmethod
    def sizes(root):
        """config.json -> (ViTConfig, QFormerConfig, n_queries).  In a model of the published size
        the LLM must be FlanT5-XXL."""
        path = root / "config.json"
        config = hub.read_object(path) if path.exists() else {}
        kind, text = config.get("model_type", "blip-2"), config.get("text_config") or {}
        sizes = read_config(root, "blip-2") if kind == "blip-2" else None
        llm = isinstance(text, dict) and (text.get("model_type", "t5"), text.get("d_model", 4096))
        if sizes is None or sizes[0].width == 1408 and llm != ("t5", 4096):
            what = f"text_config has {llm}" if sizes else f"model_type is {kind!r:.80}"
            raise ValueError(f"{path}: {what}; Video-LLaMA's image Q-Former is that of {BLIP2}, "
                             f"others were trained apart from it; pass --visual {BLIP2}")
        return sizes
