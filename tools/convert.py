"""Makes safetensors of a model that is published as .bin files (pickles), such as Vicuna 7B v1.5:

     hf download lmsys/vicuna-7b-v1.5 --local-dir vicuna-bin       13.5 GB
     python -m tools.convert vicuna-bin vicuna                     as much again for the copy
     python train.py --model 7b --llm vicuna ...

or one folder of Video-LLaMA's two released files and ImageBind's:

     ls pth     finetune-vicuna7b-v2.pth finetune_vicuna7b_audiobranch.pth imagebind_huge.pth
     python -m tools.convert pth video-llama
     python eval.py --model 7b --system video-llama --video-llama video-llama ...

Models are read from safetensors alone. The command runs once, needs no GPU, holds one shard in
memory at a time, and executes nothing that is in a pickle.

Public: convert, convert_video_llama, main."""

import argparse
import dataclasses
import pickle
import re
import shutil
import sys
import time
import zipfile
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch

from baselines.video_llama import RENAME, Branches, BranchesConfig
from runtime import cli, hub
from runtime.hub import atomic, write_json

BIN_INDEX = "pytorch_model.bin.index.json"
NOT_WEIGHTS = "rotary_emb.inv_freq"              # a buffer that old exporters wrote
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "qformer_tokenizer/*")


# Video-LLaMA: what begins the names of each file's tensors, and which of them are only there.
VIDEO, AUDIO, SOUND = "Video-LLaMA's video branch", "Video-LLaMA's audio branch", "ImageBind"
OWNED = {VIDEO: ("video_", "llama_proj."), AUDIO: ("audio_Qformer.", "audio_query_tokens",
         "audio_position_embedding.", "audio_llama_proj."), SOUND: ("audio_encoder.",)}
TOLD_BY = {AUDIO: "audio_Qformer.", VIDEO: "video_Qformer.", SOUND: "modality_trunks.audio."}
# Buffers of the whole model that lie in both files, and ImageBind's other modalities.
LEFT_OUT = re.compile(
    r".*\.position_ids|llama_model\..*rotary_emb\.inv_freq|audio_encoder\.modality_("
    r"preprocessors\.text\.mask|postprocessors\.(depth|thermal|imu)\.1\.log_logit_scale)|"
    r"modality_\w+\.(vision|text|depth|thermal|imu)\..*")
# What the audio branch's file may hold beside its own; as it is loaded last, its values count.
BOTH = ("video_query_tokens", "video_frame_position_embedding.weight",
        "audio_encoder.modality_postprocessors.audio.1.log_logit_scale")


def unpickle(path, inside=False):
    """{name: tensor} of a .bin file, memory-mapped; nothing in it is executed. inside: the dict may
    also lie under the key "model", beside an optimizer, which is left out. Raises ValueError
    for whatever is no plain dict of tensors."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: listed in {BIN_INDEX} but missing; download it again")
    hub.check_file(path)
    if what := hub.what_instead(path, pickles=False):
        raise ValueError(f"{path}: {what}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipfile.is_zipfile(path))           # before torch 1.6: no zip
    except pickle.UnpicklingError as error:      # without torch's advice to switch the check off
        lines = str(error).splitlines()
        reason = next((line for line in lines if "nsupported" in line), lines[0])
        raise ValueError(f"{path}: no plain pickle of tensors, and not run ({reason}); get the "
                         "weights from their publisher, as safetensors if there are") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: truncated or no file of torch's ({str(error).splitlines()[0]}); "
                         "download it again") from None
    if inside and isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]
    odd = type(tensors).__name__ if not isinstance(tensors, dict) else hub.listed(
        str(name) for name, t in tensors.items() if not (
            isinstance(name, str) and isinstance(t, torch.Tensor) and t.layout == torch.strided))
    if not isinstance(tensors, dict) or not odd.endswith("(0)"):
        raise ValueError(f"{path}: holds {odd}; wanted {{name: tensor}}, none sparse, and nothing "
                         "else")
    return {name: t for name, t in tensors.items() if inside or not name.endswith(NOT_WEIGHTS)}


def convert(source, out, dtype=None, log=print):
    """Writes the pytorch_model*.bin files of folder `source` as safetensors into `out`, beside its
    configs and tokenizers. dtype: of floating tensors, None = as stored. Shards get their final
    names when all are written, so a conversion that was interrupted can simply be repeated.
    Raises FileExistsError if `out` holds safetensors already."""
    source, out = Path(source), Path(out)
    places = hub.weight_map(source / BIN_INDEX) if (source / BIN_INDEX).exists() else {}
    parts = sorted(set(places.values())) or [hub.BIN_SINGLE]
    if not places and not (source / hub.BIN_SINGLE).exists():
        raise FileNotFoundError(f"{source}: no {hub.BIN_SINGLE} and no {BIN_INDEX}; wanted a "
                                "folder with a published model's .bin files, or with "
                                "Video-LLaMA's and ImageBind's .pth files")
    existing = [*out.glob("*.safetensors"), *out.glob(hub.INDEX)]
    if finished := [path.name for path in existing if not path.name.startswith(".")]:
        raise FileExistsError(f"{out}: holds {hub.listed(finished)} already; name another folder")
    for temporary in existing:                   # of a conversion that was killed
        temporary.unlink()
    out.mkdir(parents=True, exist_ok=True)
    placed, total = {}, 0
    with ExitStack() as shards:                  # at its end the temporary names become final
        for i, part in enumerate(parts, 1):
            name, start, tensors = hub.shard_name(i, len(parts)), time.time(), unpickle(
                source / part)
            check_shard(source / part, tensors, places, placed)
            placed |= dict.fromkeys(tensors, name)
            temporary = shards.enter_context(atomic(out / name))
            tensors = {n: t.to(dtype) if dtype and t.is_floating_point() else t
                       for n, t in tensors.items()}
            if spoilt := [n for n, t in tensors.items() if not hub.is_finite(t)]:
                raise ValueError(f"{source / part}: NaN or infinity in {hub.listed(spoilt)}, or "
                                 f"numbers too large for {dtype}; get the weights again")
            hub.save_tensors(temporary, tensors)
            total += (size := temporary.stat().st_size)
            log(f"{part} -> {name}: {len(tensors)} tensors, {size / 1e9:.2f} GB, "
                f"{time.time() - start:.0f} s")
            del tensors                          # else two shards are in memory
        copy_small_files(source, out)
    if len(parts) > 1:
        write_json(out / hub.INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return out


def check_shard(path, tensors, places, placed):
    """Raises ValueError if the .bin file at `path` lacks tensors that the index `places` there, or
    holds tensors that an earlier file `placed` already."""
    lost = [n for n, place in places.items() if place == path.name and n not in tensors
            and not n.endswith(NOT_WEIGHTS)]
    twice = [n for n in tensors if n in placed]
    if lost or twice:
        raise ValueError(f"{path}: " + (f"lacks {hub.listed(lost)}" if lost else
                         f"{hub.listed(twice)} also in another file") + "; download it again")


def convert_video_llama(source, out, dtype=None, log=print):
    """The three torch files in folder `source`, recognised by their tensors -> `out` with
    model.safetensors, under the released names, and config.json. ValueError names what is missing,
    unknown or of another shape than was released, and files that do not belong together."""
    source, out, parts = Path(source), Path(out), {}
    if existing := [path.name for path in out.glob("*.safetensors") if path.name[0] != "."]:
        raise FileExistsError(f"{out}: holds {hub.listed(existing)} already; name another folder")
    for path in sorted(source.glob("*.pth")):
        every = unpickle(path, inside=True)
        tensors = {name: t for name, t in every.items() if not LEFT_OUT.fullmatch(name)}
        kind = next((kind for kind, start in TOLD_BY.items()
                     if any(name.startswith(start) for name in tensors)), None)
        if kind is None or kind in parts or path.name.startswith("pretrain"):
            raise ValueError(f"{path}: " + (
                f"holds {hub.listed(tensors)}; none of them is Video-LLaMA's or ImageBind's"
                if kind is None else "pretrained only; wanted its finetune file" if
                path.name.startswith("pretrain") else f"{kind}, as {parts[kind][0].name}; keep one"
            ) + "; move it out of the folder")
        parts[kind] = path, {("audio_encoder." if kind == SOUND else "") + name: tensor
                             for name, tensor in tensors.items()}
        log(f"{path.name}: {kind}, {len(tensors)} tensors; left out: "
            + hub.listed((name for name in every if name not in tensors), 3))
    if lost := [kind for kind in TOLD_BY if kind not in parts]:
        raise FileNotFoundError(f"{source}: no .pth file of {' or of '.join(lost)}; wanted "
                                "finetune-vicuna7b-v2.pth, finetune_vicuna7b_audiobranch.pth and "
                                "imagebind_huge.pth")
    found = join_parts(parts, log)
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    config = sizes_of(shapes)
    check_parts(parts, shapes, released_shapes(config))
    whole = [name for name, t in found.items() if not t.is_floating_point()]
    found = {name: t.to(dtype) if dtype else t for name, t in found.items()}
    spoilt = [name for name, t in found.items() if not hub.is_finite(t)]
    for names, what in ((whole, "whole numbers"), (spoilt, "NaN or infinity" + (
            f", or numbers too large for {dtype}," if dtype else ""))):
        if names:
            raise ValueError(f"{source}: {what} in {hub.listed(names)}; get the weights again")
    hub.save_folder(out, found, {"model_type": "video-llama"} | dataclasses.asdict(config))
    return out


def join_parts(parts, log):
    """{kind: (path, {name: tensor})} -> the tensors of all. What two files hold is taken from the
    audio branch's, which the authors load last; a line of the log says where they differ."""
    found = {}
    for kind in (SOUND, VIDEO, AUDIO):
        path, tensors = parts[kind]
        for name, tensor in tensors.items():
            if name in found and name in BOTH:
                same = found[name].shape == tensor.shape and torch.equal(found[name], tensor)
                log(f"{path.name}: {name} is in two files, "
                    + ("with the same values" if same else "with other values; this file's count"))
            found[name] = tensor
    return found


def check_parts(parts, shapes, wanted):
    """ValueError names file and tensors unless `shapes` are the `wanted` ones."""
    for kind, (path, tensors) in parts.items():
        own = [name for name in wanted if name.startswith(OWNED[kind])]
        problems = [(label, hub.listed(names)) for label, names in (
            ("missing", [name for name in own if name not in tensors]),
            ("unknown", [name for name in tensors if name not in own and not (
                kind == AUDIO and name in BOTH)]),
            ("wrong shape", [f"{name} {[*shapes[name]]}, wanted {[*wanted[name]]}"
                             for name in tensors if name in wanted
                             and tuple(tensors[name].shape) != wanted[name]])) if names]
        if problems:
            raise ValueError(f"{path}: is not {kind} as released: " + "; ".join(
                f"{label}: {names}" for label, names in problems) + "; get the files again, both "
                "of one LLM")


def released_shapes(config):
    """{released name: shape} of all that Branches(config) reads."""
    with torch.device("meta"):
        tensors, found = Branches(config).state_dict(), {}
    for name, tensor in tensors.items():
        for theirs, ours in RENAME:
            name = name.replace(ours, theirs)
        found[name] = tuple(tensor.shape)
    return found


def sizes_of(shapes):
    """{released name: shape} -> BranchesConfig: the released sizes of the 7B or the 13B, or, where
    all widths are below those (a test's), the sizes that the tensors have, with heads of 64."""
    def size(name, axis):
        return shapes[name][axis] if len(shapes.get(name, ())) > axis else 0

    def layers(start):
        return len({name[len(start):].split(".")[0] for name in shapes if name.startswith(start)})
    video, trunk = ("video_Qformer.bert.encoder.layer.",
                    "audio_encoder.modality_trunks.audio.blocks.")
    llm, width = size("llama_proj.weight", 0), size("video_query_tokens", 2)
    sound = size(f"{trunk}0.attn.in_proj_weight", 1)
    if not (0 < width < 768 and 0 < sound < 768 and llm):
        return BranchesConfig(llm_width=llm if llm in (4096, 5120) else 4096)
    return BranchesConfig(
        llm, size(f"{video}0.crossattention.self.key.weight", 1), width, layers(video),
        max(1, width // 64), size(f"{video}0.output_query.dense.weight", 1),
        size("video_query_tokens", 1), sound, layers(trunk), max(1, sound // 64),
        size(f"{trunk}0.mlp.fc1.weight", 0), size("audio_position_embedding.weight", 1))


def copy_small_files(source, out):
    """Copies configs and tokenizers, but not the .bin files' index."""
    for file in chain.from_iterable(map(source.glob, COPIED)):
        copy = out / file.relative_to(source)
        if file.name != BIN_INDEX and copy.resolve() != file.resolve():
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(file, copy)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(prog=hub.CONVERT, description=cli.description(__doc__),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("source", metavar="BIN_FOLDER", type=Path,
        help=f"folder with {hub.BIN_SINGLE}, or with its parts and {BIN_INDEX}, or with "
             "Video-LLaMA's and ImageBind's .pth files")
    add("out", metavar="OUT_FOLDER", type=Path,
        help="folder for the safetensors, config.json and tokenizer files; it must not hold "
             "safetensors yet")
    add("--dtype", choices=("float16", "bfloat16", "float32"),
        help="number format of the written weights (default: that of the .bin files)")
    args = parser.parse_args(argv)
    video_llama = any(args.source.glob("*.pth")) and not any(
        args.source.glob("pytorch_model*.bin*"))
    try:
        (convert_video_llama if video_llama else convert)(
            args.source, args.out, args.dtype and getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        sys.exit(f"{hub.CONVERT}: {error}")
    print("done; pass it as a local folder: "
          f"{'--system video-llama --video-llama' if video_llama else '--llm'} {args.out}")


if __name__ == "__main__":
    main()
