"""Weights on disk: a Hub repo id or a local folder in the Hub's layout -> tensors in our modules.

     folder(source) -- config.json, tokenizers, the shards that are needed --> load_into(module)
     python -m runtime.hub convert FOLDER OUT     makes safetensors of .bin files (Vicuna's), once

A source holds config.json beside model.safetensors, or shards with model.safetensors.index.json.
A safetensors file is an 8-byte n, n bytes of JSON {name: dtype, shape, place}, then the numbers. We
read them tensor by tensor into one buffer: the pages of a memory-mapped file would count as ours,
and the host would hold the model twice.
Import is strict both ways: a tensor we miss and a tensor we do not know are errors that name them.
Public: folder, offline, read_json, open_tensors, load_into, save_folder, write_json, convert."""

import argparse
import errno
import json
import os
import pickle
import re
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SMALL_FILES = ("*.json", "tokenizer.model", "qformer_tokenizer/*")
# Buffers that old exporters wrote and that every loader recomputes.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "position_ids", "proj_out.weight")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
# Bytes of each shard, counted from names, shapes and dtype: to say what a download would take.
PUBLISHED = {
    "openai/whisper-tiny": (151_061_672,),
    "openai/whisper-large-v2": (6_173_370_152,),
    "Salesforce/instructblip-vicuna-7b": (
        4_950_754_976, 4_980_963_584, 4_957_878_440, 937_994_232),
    "Salesforce/instructblip-vicuna-13b": (
        4_934_087_952, 4_933_723_144, 4_970_423_232, 4_970_423_232, 4_933_702_464, 3_641_975_144)}


REPOSITORY = Path(__file__).parent.parent


# ---- from the Hub -------------------------------------------------------------------------------

def offline(on=True):
    """--offline: this process and those it starts take what is in the Hub's cache, or fail. Without
    `on` nothing changes: HF_HUB_OFFLINE in the environment says."""
    if on:
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_offline():
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def folder(source, files=SMALL_FILES, tensors=("",), config="config.json"):
    """A local folder as it is, else the Hub repo `source` as a folder of the Hub's cache (HF_HOME).
    What is not there yet is downloaded, with a progress bar: `config`, `files` (patterns; those
    the repo lacks are left out), and the shards that hold tensors whose names start with one of
    `tensors` (() = no weights). A connection that breaks is taken up again where it broke; a run
    that was killed keeps its finished files.
    Raises OSErrors that say what is absent, its size, why, and what to do."""
    path, repo = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.is_absolute() or repo.startswith(".") or repo.count("/") != 1:
        raise FileNotFoundError(
            f"{source}: no such folder; wanted a folder in the Hub's layout ({config} + "
            "model.safetensors) or a Hub repo id such as openai/whisper-large-v2")
    small, shards = [config, *files, *([INDEX] if tensors else [])], []
    root = _fetch(repo, small)
    if not (root / config).exists():            # asked for on its own, the Hub says why it is not
        root = _fetch(repo, [config], alone=True).parent
    if tensors:
        places = _weight_map(root / INDEX) if (root / INDEX).exists() else {"": SINGLE}
        shards = sorted({shard for name, shard in places.items() if name.startswith(tuple(tensors))}
                        or set(places.values()))               # a layout of which we know nothing
        root = _fetch(repo, small + shards)
    for name in shards:
        if not (root / name).exists():
            root = _fetch(repo, [name], alone=True).parent
    return root


def local_source(source):
    """The miniature's parts are named relative to this repository, so that they are found from any
    folder; tiny/ is their old place.  Everything else stays as it is."""
    name = re.sub(r"^tiny/", "miniature/weights/", str(source))
    return REPOSITORY / name if (REPOSITORY / name).is_dir() else source


def _fetch(repo, wanted, alone=False):
    """The repo's folder in the cache with the files `wanted`; the path of the one that is alone."""
    import huggingface_hub as hub  # only now: the miniature never needs the Hub
    try:
        if alone:
            return Path(hub.hf_hub_download(repo, *wanted, local_files_only=is_offline()))
        return Path(hub.snapshot_download(
            repo, allow_patterns=wanted, local_files_only=is_offline()))
    except Exception as error:
        known = _known_failure(error, repo, wanted)
        if known is None:
            raise
        raise known from error


def _absent(repo, wanted):
    """Those of `wanted` that are not in the cache, with sizes, for an error message."""
    from huggingface_hub import try_to_load_from_cache
    sizes = PUBLISHED.get(repo, ())
    sizes = {_shard_name(i, len(sizes)): size for i, size in enumerate(sizes, 1)}
    paths = {name: try_to_load_from_cache(repo, name) for name in {*wanted, *sizes, SINGLE, INDEX}}
    total = sum(sizes.values())
    if isinstance(paths[INDEX], str):
        total = (read_json(paths[INDEX]).get("metadata") or {}).get("total_size", total)
    elif INDEX in wanted and SINGLE not in wanted:      # which shards there are, nobody knows yet
        wanted = [*wanted, *(sizes or [SINGLE])]
    texts = [name + (f" ({sizes[name] / 1e9:.2f} GB)" if name in sizes else
                     " (size unknown)" if name.endswith(".safetensors") else "")
             for name in wanted if name != INDEX and not isinstance(paths[name], str)]
    together = f"; all its shards: {total / 1e9:.2f} GB" if total and len(sizes) != 1 else ""
    return ", ".join(texts) + together


def _known_failure(error, repo, wanted):
    """The error to raise for what usually goes wrong on the way; None: it is something else."""
    from huggingface_hub import constants, errors
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)) and (
            not isinstance(error, errors.GatedRepoError)):
        return FileNotFoundError(f"{repo}: no such folder here and no such repo on the Hub (or a "
                                 "private one: `hf auth login`); check the spelling")
    absent, cache = _absent(repo, wanted), constants.HF_HUB_CACHE
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        there = next(p for p in (Path(cache), *Path(cache).absolute().parents) if p.exists())
        return OSError(errno.ENOSPC, (
            f"{repo}: the disk is full; still to come: {absent}; {cache} has "
            f"{shutil.disk_usage(there).free / 1e9:.2f} GB free; make room or set HF_HOME to "
            "another disk, and run again: finished files are kept"))
    if isinstance(error, errors.GatedRepoError) or status in (401, 403):
        return PermissionError(
            f"{repo}: the Hub refuses {absent} ({status or 'gated'}); accept the terms on "
            f"https://huggingface.co/{repo}, then `hf auth login`, or set HF_TOKEN")
    local = isinstance(error, errors.LocalEntryNotFoundError)
    if isinstance(error, errors.EntryNotFoundError) and not local and "favor.json" in wanted:
        return FileNotFoundError(f"{repo}: the repo has no favor.json, it is no checkpoint of ours")
    if isinstance(error, errors.EntryNotFoundError) and not local:
        return FileNotFoundError(
            f"{repo}: the repo has no {', '.join(wanted)}; where it has pytorch_model*.bin: `hf "
            f"download {repo} --local-dir BIN`, `python -m runtime.hub convert BIN OUT`, and pass OUT")
    cut_off = type(error).__module__.split(".")[0] in (      # in mid-download they come as they are
        "httpx", "httpx2", "httpcore", "requests", "urllib3")
    if not (local or cut_off or status or isinstance(error, (ConnectionError, TimeoutError))):
        return None
    why = ("--offline or HF_HUB_OFFLINE forbids to fetch it" if is_offline() else
           f"the Hub answers {status}" if status else
           f"there is no network, or it broke off ({type(error.__cause__ or error).__name__})")
    return FileNotFoundError(
        f"{repo}: not in the cache {cache}: {absent}; {why}, and there is no local folder of that "
        "name. Run (again) where there is a network, finished files are kept; or `hf download "
        f"{repo}` there and copy the cache; or pass a local folder")


# ---- reading ------------------------------------------------------------------------------------

def read_json(path):
    """The JSON object in `path`; ValueError names the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: missing; wanted a model folder in the Hub's layout") from None
    except ValueError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); download or save the file again") from None


def _weight_map(path):
    """{tensor name: shard} of an index file."""
    index = read_json(path)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"{path}: no weight_map in it; wanted {{tensor name: shard}}; download or "
                         "save the file again")
    return index["weight_map"]


def _disguise(path, pickles=True):
    """What lies under the name of a weights file instead of weights; "" for none of these."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return "empty (0 bytes); delete it and download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the weights; run `git lfs pull` in its folder"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not the weights (a login or an error?); download it again"
    if pickles and start.startswith((b"PK\x03\x04", b"\x80")):
        return (f"a pickle under the name of safetensors; rename it to {BIN_SINGLE} and convert "
                "its folder: python -m runtime.hub convert FOLDER OUT")
    return ""


@dataclass(frozen=True)
class Stored:
    """One tensor in a safetensors file. Calling it reads it, into `buffer` (bytes) if given."""
    path: Path
    dtype: torch.dtype                          # the file's code where torch has none
    shape: tuple
    start: int                                  # bytes from the beginning of the file
    size: int                                   # bytes

    def __call__(self, buffer=None):
        if buffer is None:
            buffer = torch.empty(self.size, dtype=torch.uint8, device="cpu")
        with open(self.path, "rb") as file:
            file.seek(self.start)
            if file.readinto(buffer[:self.size].numpy()) != self.size:
                raise ValueError(f"{self.path}: became shorter while it was read; run again")
        return buffer[:self.size].view(self.dtype).reshape(self.shape)


def _header(path):
    """{tensor name: Stored} of one safetensors file; ValueError says what is wrong with it."""
    try:
        with safe_open(path, framework="pt"):    # checks every place and size; reads no numbers
            pass
    except SafetensorError as error:
        what = _disguise(path) or f"truncated or damaged ({error}); delete it and download it again"
        raise ValueError(f"{path}: {what}") from None
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(n_header))
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        tensors[name] = Stored(path, DTYPES.get(entry["dtype"], entry["dtype"]),
                               tuple(entry["shape"]), 8 + n_header + start, end - start)
    return tensors


def _listed(names, at_most=20):
    """'a, b, … (34)' for an error message."""
    names = sorted(names)
    return ", ".join(names[:at_most]) + (" …" if len(names) > at_most else "") + f" ({len(names)})"


def _layout(root):
    """{tensor name: shard} of a folder, of which not all shards need be there."""
    if (root / INDEX).exists():
        return _weight_map(root / INDEX)
    if (root / SINGLE).exists():
        return dict.fromkeys(_header(root / SINGLE), SINGLE)
    if any(root.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{root}: .bin files only, no {SINGLE}; convert them once: "
                                f"python -m runtime.hub convert {root} {root}-safetensors")
    raise FileNotFoundError(f"{root}: no {SINGLE} and no {INDEX}; download or save it again")


def open_tensors(root, wanted=lambda name: True):
    """{tensor name: Stored} of the names that wanted(name) keeps. Only the shards that hold such
    are opened (or need be there), and nothing but their headers is read yet."""
    root, tensors = Path(root), {}
    layout = {name: shard for name, shard in _layout(root).items() if wanted(name)}
    for shard in sorted(set(layout.values())):
        if not (root / shard).exists():
            raise FileNotFoundError(
                f"{root / shard}: listed in {INDEX} but missing; download it again")
        held = _header(root / shard)
        lost = [name for name, place in layout.items() if place == shard and name not in held]
        if lost:
            raise ValueError(f"{root / shard}: lacks {_listed(lost)} that {INDEX} places there; "
                             "shards and index must be of one model: download both again")
        twice = [name for name in held if name in tensors]
        if twice:
            raise ValueError(f"{root / shard}: {_listed(twice)} also in another shard; shards and "
                             "index must be of one model: download both again")
        tensors |= {name: tensor for name, tensor in held.items() if wanted(name)}
    return tensors


def load_into(module, root, prefix="", rename=(), rows=None, only=("",)):
    """Copies the tensors of folder `root` whose names start with `prefix` into `module`, one at a
    time, in the module's dtype and on its device. The host needs no more than the largest tensor
    on top of the module (test_hub.py).

    prefix: str, or a tuple of which the first that occurs in the file counts ("" matches all).
    rename: (theirs, ours) substring pairs, applied in order after the prefix is cut.
    rows:   {our name: n} keeps the first n rows (vocabularies that were padded).
    only:   prefixes of the names to read, without cutting them; the rest of the file is ignored.
    Raises ValueError that lists missing tensors, unknown tensors and wrong shapes."""
    root, layout = Path(root), _layout(Path(root))
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    prefix = next((p for p in prefixes if any(n.startswith(p) for n in layout)), prefixes[0])
    tensors = open_tensors(root, lambda name: name.startswith(prefix) and name.startswith(
        tuple(only)) and not name.endswith(NOT_WEIGHTS))
    wanted = module.state_dict(keep_vars=True)        # parameters and the buffers that are saved
    found, unknown, wrong_shape, wrong_dtype = {}, [], [], []
    for theirs, tensor in tensors.items():
        ours, shape = theirs[len(prefix):], tensor.shape
        for old, new in rename:
            ours = ours.replace(old, new)
        if ours not in wanted or ours in found:
            unknown.append(theirs)
            continue
        target = wanted[ours]
        found[ours] = tensor
        if rows and ours in rows and shape:
            shape = (min(shape[0], rows[ours]), *shape[1:])
        if shape != target.shape:
            wrong_shape.append(f"{theirs} {list(shape)}, wanted {list(target.shape)}")
        if getattr(tensor.dtype, "is_floating_point", None) != target.dtype.is_floating_point:
            wrong_dtype.append(f"{theirs} {tensor.dtype}, wanted {target.dtype}")
    tied = {id(wanted[name]) for name in found}       # two names of one tensor: one is enough
    missing = [name for name, target in wanted.items() if id(target) not in tied]
    problems = [f"{label}: {_listed(names)}" for label, names in [
        ("missing", missing), ("unknown", unknown), ("wrong shape", wrong_shape),
        ("wrong dtype", wrong_dtype)] if names]
    if problems:
        raise ValueError(f"{root}: weights do not fit {type(module).__name__}; "
                         + "; ".join(problems))
    # One buffer for all: blocks of many sizes, freed in turn, would leave holes in the heap.
    buffer = torch.empty(max((t.size for t in found.values()), default=0), dtype=torch.uint8,
                         device="cpu")
    with torch.no_grad():
        for ours, tensor in sorted(found.items(), key=lambda kv: (kv[1].path, kv[1].start)):
            target, value = wanted[ours], tensor(buffer)
            value = value[:len(target)] if value.shape != target.shape else value      # `rows`
            target.copy_(value.to(target.device))     # there in the file's dtype, then in ours
    return module


# ---- writing ------------------------------------------------------------------------------------

def save_folder(root, tensors, config):
    """Writes model.safetensors and config.json into `root`, each to a temporary name first, so that
    a kill or a full disk never leaves half a file under the final name."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    os.replace(_write(root / SINGLE, tensors), root / SINGLE)
    (root / INDEX).unlink(missing_ok=True)       # of shards from before: it would be read instead
    write_json(root / "config.json", config)


def write_json(path, value):
    """`value` as indented JSON, written atomically."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def _write(path, tensors, dtype=None, read=None):
    """Writes the safetensors file `path`.tmp, one tensor at a time -> that path.
    dtype: what floating tensors become; None: they stay as they are.  read(name): gives the numbers
    of tensors that have only a shape and a dtype (device "meta")."""
    codes, header, end = {dtype: code for code, dtype in DTYPES.items()}, {}, 0
    kinds = {n: dtype if dtype and t.is_floating_point() else t.dtype for n, t in tensors.items()}
    order = sorted(tensors, key=lambda n: (-kinds[n].itemsize, n))    # keeps every one aligned
    for name in order:
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        header[name] = {"dtype": codes[kinds[name]], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                tensor = read(name) if read else tensors[name]
                tensor = tensor.detach().to("cpu", kinds[name]).contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy())
    except BaseException:                        # a full disk should get its room back
        temporary.unlink(missing_ok=True)
        raise
    return temporary


# ---- .bin -> safetensors ------------------------------------------------------------------------

def _shard_name(i, n):
    return f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else SINGLE


def _unpickle(path):
    """{name: tensor} of a .bin file, memory-mapped; nothing in it is executed."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: listed in {BIN_INDEX} but missing; download it again")
    if what := _disguise(path, pickles=False):
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
    odd = type(tensors).__name__ if not isinstance(tensors, dict) else _listed(
        str(name) for name, t in tensors.items() if not isinstance(t, torch.Tensor))
    if not isinstance(tensors, dict) or not odd.endswith("(0)"):
        raise ValueError(f"{path}: holds {odd}; wanted {{name: tensor}} and nothing else")
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def convert(source, out, dtype=None, log=print):
    """pytorch_model*.bin of `source` -> safetensors in `out`, one shard in memory at a time. The
    names are temporary until all is there, so that one cut off is started again as it was."""
    source, out = Path(source), Path(out)
    places = _weight_map(source / BIN_INDEX) if (source / BIN_INDEX).exists() else {}
    parts = sorted(set(places.values())) or [BIN_SINGLE]
    if not places and not (source / BIN_SINGLE).exists():
        raise FileNotFoundError(f"{source}: no {BIN_SINGLE} and no {BIN_INDEX}; wanted a folder "
                                "with a published model's .bin files")
    there = [path.name for path in (*out.glob("*.safetensors"), *out.glob(INDEX))]
    if there:
        raise FileExistsError(f"{out}: holds {_listed(there)} already; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    placed, ready, total = {}, {}, 0
    for i, part in enumerate(parts, 1):
        name, began, tensors = _shard_name(i, len(parts)), time.time(), _unpickle(source / part)
        lost = [n for n, place in places.items() if place == part and n not in tensors
                and not n.endswith("rotary_emb.inv_freq")]
        twice = [n for n in tensors if n in placed]
        if lost or twice:
            raise ValueError(f"{source / part}: " + (f"lacks {_listed(lost)}" if lost else
                             f"{_listed(twice)} also in another file") + "; download it again")
        ready[name] = _write(out / name, tensors, dtype)
        size = ready[name].stat().st_size
        total, placed = total + size, placed | dict.fromkeys(tensors, name)
        log(f"{part} -> {name}: {len(tensors)} tensors, {size / 1e9:.2f} GB, "
            f"{time.time() - began:.0f} s")
        del tensors                              # else two shards in memory
    for pattern in ("*.json", "*.txt", "*.model", "*.jinja", "qformer_tokenizer/*"):
        for file in source.glob(pattern):
            copy = out / file.relative_to(source)
            if file.name != BIN_INDEX and copy.resolve() != file.resolve():
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(file, copy)
    for name, temporary in ready.items():
        os.replace(temporary, out / name)
    if len(parts) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description="Weights on disk.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "convert", formatter_class=argparse.RawDescriptionHelpFormatter,
        help=".bin files -> safetensors",
        description="""\
Makes safetensors of a model that is published as .bin files (pickles), which this repo does not
read as they are. Once, without a GPU, one shard in memory at a time; nothing in a pickle is run.
For example Vicuna 7B v1.5 (13.5 GB, and as much again for the copy):

  hf download lmsys/vicuna-7b-v1.5 --local-dir vicuna-bin
  python -m runtime.hub convert vicuna-bin vicuna
  python train.py --model 7b --llm vicuna ...""")
    command.add_argument("source", metavar="SOURCE_FOLDER",
                         help=f"with {BIN_SINGLE}, or its parts and {BIN_INDEX}")
    command.add_argument("out", metavar="OUT_FOLDER", help="gets the safetensors, config.json and "
                         "tokenizer files; must not hold safetensors yet")
    command.add_argument("--dtype", choices=("float16", "bfloat16", "float32"),
                         help="default: as stored")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.out, args.dtype and getattr(torch, args.dtype))
    except (OSError, ValueError) as error:
        sys.exit(f"hub.py: {error}")
    print(f"done; pass it as a local folder: --llm {args.out}")


if __name__ == "__main__":
    main()
