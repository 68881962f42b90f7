"""The authors' released FAVOR checkpoint (a torch file of the trained parts) as one of ours.

     python -m tools.official pytorch_model_1_101.pt runs/official
     python demo.py clip.mp4 "What happens?" --model 13b --checkpoint runs/official

     their file --weights_only--> {their name: tensor} --one table--> aligner, LoRA; strict
                --from_official--> Favor in variant "official" --save_pretrained--> OUT
The frozen parts come from where the preset names them.  docs/differences.md says what the variant
means.  A checkpoint of the successor, video-SALMONN, has other parts and is refused by name.

Public: read_checkpoint, from_official."""

import argparse
import re
import sys
from pathlib import Path

import torch

import lora
from favor import PRESETS, Favor, preset
from runtime import cli, hub

# theirs -> ours, in this order.  What is trained first registered its name: video_* and llama_proj;
# older saves also hold the same parameter as joint_* or speech_*.
ALIASES = ((r"^(joint|speech)_(Qformer|query_tokens|frame_position_embedding)", r"video_\2"),
           (r"^ln_(joint|speech)\.", "ln_video."),
           (r"^llama_proj_(joint|speech)\.", "llama_proj."))
NAMES = (
    ("speech_pre_qformer_proj.", "audio_proj."),
    ("ln_video.", "qformer.joint_norm."),
    ("video_frame_position_embedding.", "qformer.positions."),
    ("video_query_tokens", "qformer.queries"),
    ("video_Qformer.bert.embeddings.LayerNorm.", "qformer.query_norm."),
    ("video_Qformer.bert.encoder.layer.", "qformer.layers."),
    (".encoder_causal_attention.", ".causal_attention."),
    (".crossattention.", ".cross_attention."),
    (".attention.", ".self_attention."),
    ("attention.self.", "attention."),
    ("attention.output.dense.", "attention.output."),
    ("attention.output.LayerNorm.", "attention.norm."),
    (".intermediate_query.dense.", ".up."),
    (".output_query.dense.", ".down."),
    (".output_query.LayerNorm.", ".norm."),
    ("llama_proj.", "llm_proj."),
)
LORA = re.compile(r"^llama_model\.base_model\.model\.(.+)\.(lora_[AB])(?:\.default)?\.weight$")
# What the file may hold besides: InstructBLIP's own projection, which nothing uses, and buffers.
EXTRAS = re.compile(r"^llm_proj\.|position_ids$|rotary_emb\.inv_freq$")
SUCCESSOR = ("beats_pre_qformer_proj.", "low_query_tokens", "low_Qformer.")


def read_checkpoint(path):
    """-> aligner {our name: tensor}, LoRA {"module.lora_A": tensor}, names that were left out.
    Raises ValueError, naming the file, for what is no FAVOR checkpoint; unknown keys are listed."""
    path = Path(path)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".pt", ".pth", ".bin"))
        if len(files) != 1:
            raise ValueError(f"{path}: {len(files)} files that end in .pt, .pth or .bin; "
                             "pass the checkpoint itself")
        path = files[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; wanted the authors' checkpoint, "
                                "e.g. pytorch_model_1_101.pt")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a torch file of tensors only ({type(error).__name__}: "
                         f"{str(error).splitlines()[0]}); download it again") from error
    while isinstance(saved, dict) and len(saved) <= 3 and (
            inner := [v for k, v in saved.items() if k in ("module", "model", "state_dict")]):
        saved = inner[0]
    if not isinstance(saved, dict) or not all(isinstance(t, torch.Tensor) for t in saved.values()):
        raise ValueError(f"{path}: holds no {{name: tensor}}; wanted the authors' checkpoint")
    saved = {name.removeprefix("module."): tensor for name, tensor in saved.items()}
    if found := [name for name in saved if name.startswith(SUCCESSOR)]:
        raise ValueError(
            f"{path}: a checkpoint of video-SALMONN, FAVOR's successor ({found[0]}, …): it hears "
            "with BEATs too and reads windows at two resolutions, which is another model; wanted "
            "one of FAVOR, whose ln_video is 1536 wide")
    return (*renamed(saved, path), sorted(name for name in saved if EXTRAS.search(name)))


def renamed(saved, path):
    """{their name: tensor} -> aligner and LoRA under our names."""
    aligner, adapters, unknown = {}, {}, []
    for theirs, tensor in saved.items():
        if EXTRAS.search(theirs):
            continue
        if match := LORA.match(theirs):
            adapters[f"{match[1]}.{match[2]}"] = tensor
            continue
        ours = theirs
        for pattern, name in ALIASES:
            ours = re.sub(pattern, name, ours)
        known = ours
        for old, new in NAMES:
            ours = ours.replace(old, new)
        if not ours.startswith(("audio_proj.", "qformer.", "llm_proj.")):
            unknown.append(theirs)
        elif ours in aligner and not torch.equal(aligner[ours], tensor):
            raise ValueError(f"{path}: {theirs} and {known} should be one parameter, but differ")
        else:
            aligner[ours] = tensor
    if unknown:
        raise ValueError(f"{path}: unknown names {', '.join(sorted(unknown)[:20])} "
                         f"({len(unknown)}); wanted those of the released FAVOR")
    if "llm_proj.weight" not in aligner or not adapters:
        raise ValueError(f"{path}: no llama_proj.weight or no LoRA among its {len(saved)} names; "
                         "wanted the released FAVOR")
    return aligner, adapters


@torch.no_grad()
def copy_all(theirs, ours, path):
    """{name: tensor} into {name: parameter}; ValueError lists what is missing, unknown, or of
    another shape."""
    wrong = [f"{name} {list(theirs[name].shape)}, wanted {list(ours[name].shape)}"
             for name in theirs.keys() & ours.keys() if theirs[name].shape != ours[name].shape]
    problems = [f"{label}: {', '.join(sorted(names)[:20])} ({len(names)})" for label, names in (
        ("missing", ours.keys() - theirs.keys()), ("unknown", theirs.keys() - ours.keys()),
        ("wrong shape", wrong),
        ("not finite", [n for n, t in theirs.items() if not hub.is_finite(t)])) if names]
    if problems:
        raise ValueError(f"{path}: does not fit this model; {'; '.join(problems)}")
    for name, tensor in theirs.items():
        ours[name].copy_(tensor)


def from_official(path, model=None, dtype=None, device=None, **changes):
    """The authors' checkpoint (a torch file, or the folder that holds only it) -> Favor in variant
    "official", in eval mode.  model: the preset, by default 7b or 13b by the width of the LLM
    projection; changes: fields of FavorConfig, such as where the frozen parts lie.
    Raises ValueError that lists what is missing, unknown or of a wrong shape."""
    aligner, adapters, _ = read_checkpoint(path)
    width = len(aligner["llm_proj.weight"])
    model = model or {4096: "7b", 5120: "13b"}.get(width)
    if model is None:
        raise ValueError(f"{path}: an LLM of width {width}; pass model= and the frozen parts")
    r = len(next(t for name, t in adapters.items() if name.endswith("lora_A")))
    config = preset(model, "official", **{"lora_r": r} | changes)
    favor = Favor.from_config(config, dtype, device)
    ours = {f"aligner.{n}": p for n, p in favor.aligner().named_parameters()} | {
        f"{name}.{part}": getattr(layer, part).weight
        for name, layer in lora.layers(favor.llm).items() for part in ("lora_A", "lora_B")}
    theirs = {f"aligner.{n}": t for n, t in aligner.items()} | adapters
    copy_all(theirs, ours, path)
    return favor.eval()


def main(argv=None):
    parser = argparse.ArgumentParser("python -m tools.official", allow_abbrev=False,
                                     description=cli.description(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("file", metavar="FILE", help="checkpoint of the authors, a torch file")
    add("out", metavar="OUT", help="new folder for the checkpoint in our layout")
    add("--model", choices=tuple(PRESETS),
        help="preset of all sizes (default: 7b or 13b, by the size of the file's tensors)")
    for part in ("whisper", "visual", "llm"):
        add(f"--{part}", metavar="SOURCE",
            help=f"folder or Hub repository of {part} (default: the preset's)")
    args = parser.parse_args(argv)
    if Path(args.out).exists():
        sys.exit(f"{parser.prog}: {args.out} exists already; name a new folder")
    sources = {name: value for name in ("whisper", "visual", "llm")
               if (value := getattr(args, name))}
    try:
        model = from_official(args.file, args.model, torch.bfloat16, **sources)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")
    name = args.model or {4096: "7b", 5120: "13b"}[model.llm.config.width]
    model.save_pretrained(args.out, train={"model": name, "variant": "official"},
                          command=f"tools.official {args.file}")
    print(f"{args.out}: answers with  python demo.py CLIP QUESTION --checkpoint {args.out}")


if __name__ == "__main__":
    main()
