"""Weights on disk: a Hub repo id or a local folder in the Hub's layout -> tensors in our modules.

A source holds config.json beside model.safetensors, or shards with model.safetensors.index.json.
Import is strict both ways: a tensor we miss and a tensor we do not know are errors that name them.
Public: folder, read_json, open_tensors, load_into, save_folder, write_json."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Buffers that old exporters wrote and that every loader recomputes.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "position_ids", "proj_out.weight")


def folder(source):
    """A local folder as it is, else the snapshot of the Hub repo `source` (safetensors, json and
    tokenizer files only; HF_HOME and HF_HUB_OFFLINE are respected).
    Raises FileNotFoundError with what to do when neither exists."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    looks_like_path = (path.is_absolute() or str(source).startswith(".")
                       or str(source).count("/") != 1)
    if looks_like_path:
        raise FileNotFoundError(
            f"{source}: no such folder; wanted a folder in the Hub's layout (config.json + "
            "model.safetensors) or a Hub repo id such as openai/whisper-large-v2")
    from huggingface_hub import snapshot_download  # only now: the miniature never needs the Hub
    try:
        return Path(snapshot_download(str(source), allow_patterns=[
            "*.json", "*.safetensors", "tokenizer.model", "qformer_tokenizer/*"]))
    except Exception as error:
        raise FileNotFoundError(
            f"{source}: neither a local folder nor reachable on the Hub "
            f"({type(error).__name__}: {error}); download it once where there is a network, "
            "or pass a local folder") from error


def read_json(path):
    """The JSON object in `path`; ValueError names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing; wanted a model folder in the Hub's layout") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); download or save the file again") from None


def open_tensors(root):
    """{tensor name: zero-argument reader} of the safetensors in `root`; nothing is read yet."""
    root = Path(root)
    index = root / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(read_json(index)["weight_map"].values()))
    elif (root / "model.safetensors").exists():
        shards = ["model.safetensors"]
    else:
        raise FileNotFoundError(
            f"{root}: no model.safetensors and no model.safetensors.index.json; .bin files must be "
            "converted to safetensors once")
    readers = {}
    for shard in shards:
        if not (root / shard).exists():
            raise FileNotFoundError(
                f"{root / shard}: listed in {index.name} but missing; download it again")
        try:
            file = safe_open(root / shard, framework="pt")
        except Exception as error:
            raise ValueError(f"{root / shard}: not readable as safetensors ({error}); "
                             "download or save the file again") from None
        for name in file.keys():
            readers[name] = lambda file=file, name=name: file.get_tensor(name)
    return readers


def load_into(module, root, prefix="", rename=(), rows=None, only=("",)):
    """Copies the tensors of folder `root` whose names start with `prefix` into `module`, one at a
    time, in the module's dtype and on its device.

    prefix: str, or a tuple of which the first that occurs in the file counts ("" matches all).
    rename: (theirs, ours) substring pairs, applied in order after the prefix is cut.
    rows:   {our name: n} keeps the first n rows (vocabularies that were padded).
    only:   prefixes of the names to read, without cutting them; the rest of the file is ignored.
    Raises ValueError that lists missing tensors, unknown tensors and wrong shapes."""
    readers = open_tensors(root)
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    prefix = next((p for p in prefixes if any(n.startswith(p) for n in readers)), prefixes[0])
    wanted = dict(module.named_parameters()) | {
        n: b for n, b in module.named_buffers() if n in module.state_dict()}
    unknown, wrong = [], []
    for theirs, read in readers.items():
        if not theirs.startswith(prefix) or not theirs.startswith(tuple(only)) \
                or theirs.endswith(NOT_WEIGHTS):
            continue
        ours = theirs[len(prefix):]
        for old, new in rename:
            ours = ours.replace(old, new)
        if ours not in wanted:
            unknown.append(theirs)
            continue
        target, tensor = wanted.pop(ours), read()
        if rows and ours in rows:
            tensor = tensor[:rows[ours]]
        if tensor.shape != target.shape:
            wrong.append(f"{theirs} {list(tensor.shape)}, wanted {list(target.shape)}")
            continue
        with torch.no_grad():
            target.copy_(tensor)
    problems = [f"{label}: {', '.join(sorted(names)[:8])}{' …' if len(names) > 8 else ''} "
                f"({len(names)})"
                for label, names in [("missing", list(wanted)), ("unknown", unknown),
                                     ("wrong shape", wrong)] if names]
    if problems:
        raise ValueError(f"{root}: weights do not fit {type(module).__name__}; "
                         + "; ".join(problems))
    return module


def save_folder(root, tensors, config):
    """Writes model.safetensors and config.json into `root`, each to a temporary name first, so that
    a kill or a full disk never leaves half a file under the final name."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()},
              root / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(root / "model.safetensors.tmp", root / "model.safetensors")
    write_json(root / "config.json", config)


def write_json(path, value):
    """`value` as indented JSON, written atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
