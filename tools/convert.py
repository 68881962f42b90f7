"""Makes safetensors of a model that is published as .bin files (pickles), such as Vicuna 7B v1.5:

     hf download lmsys/vicuna-7b-v1.5 --local-dir vicuna-bin       13.5 GB
     python -m tools.convert vicuna-bin vicuna                     as much again for the copy
     python train.py --model 7b --llm vicuna ...

Models are read from safetensors alone. The command runs once, needs no GPU, holds one shard in
memory at a time, and executes nothing that is in a pickle.

Public: convert, main."""

import argparse
import pickle
import shutil
import sys
import time
import zipfile
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import torch

from runtime import cli, hub
from runtime.hub import atomic, write_json

BIN_INDEX = "pytorch_model.bin.index.json"
NOT_WEIGHTS = "rotary_emb.inv_freq"              # a buffer that old exporters wrote
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "qformer_tokenizer/*")


def unpickle(path):
    """{name: tensor} of a .bin file, memory-mapped; nothing in it is executed. Raises ValueError
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
    odd = type(tensors).__name__ if not isinstance(tensors, dict) else hub.listed(
        str(name) for name, t in tensors.items() if not isinstance(t, torch.Tensor))
    if not isinstance(tensors, dict) or not odd.endswith("(0)"):
        raise ValueError(f"{path}: holds {odd}; wanted {{name: tensor}} and nothing else")
    return {name: t for name, t in tensors.items() if not name.endswith(NOT_WEIGHTS)}


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
                                "folder with a published model's .bin files")
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
        help=f"folder with {hub.BIN_SINGLE}, or with its parts and {BIN_INDEX}")
    add("out", metavar="OUT_FOLDER", type=Path,
        help="folder for the safetensors, config.json and tokenizer files; it must not hold "
             "safetensors yet")
    add("--dtype", choices=("float16", "bfloat16", "float32"),
        help="number format of the written weights (default: that of the .bin files)")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out, args.dtype and getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        sys.exit(f"{hub.CONVERT}: {error}")
    print(f"done; pass it as a local folder: --llm {args.out}")


if __name__ == "__main__":
    main()
