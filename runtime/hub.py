"""Files on disk.  Weights: a Hub repo id or a local folder in the Hub's layout -> tensors in our
modules.

     folder(source) -- config.json, tokenizers, the needed shards --> load_module(make, folder)
     save_folder(folder, tensors, config) -- config.json and model.safetensors
     small files: written atomically, read with errors that name the file

A source holds config.json beside model.safetensors, or shards with model.safetensors.index.json.
Import is strict both ways: a tensor we miss and a tensor we do not know are errors that name them,
and so are numbers that are not finite. Files come from strangers: nothing in them is run, and sizes
are checked before memory is taken.
Public: folder, Repo, anywhere, saved_source, local_source, local_folder, offline, is_offline,
stored_tensors, open_tensors, fill, load_into, load_module, save_tensors, save_folder; model_config,
processor, make_config; atomic, write_text, write_json, check_file, read_json, unique_keys,
read_object, read_jsonl, grown_lines, markdown_table."""

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_origin

from safetensors import SafetensorError, safe_open

REPOSITORY = Path(__file__).parent.parent
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
CONVERT = "python -m tools.convert"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
SMALL_FILES = ("*.json", "tokenizer.model", "qformer_tokenizer/*")
# Buffers that old exporters wrote and that every loader recomputes.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "position_ids", "proj_out.weight")
# What to do with a model where another one is wanted: model_type, the rest of the error.
GRID = ("a SigLIP or DINOv2 goes with --visual and --visual-grid, the cells per side to which its "
        "patches are averaged, such as --visual-grid 7")
INSTEAD = dict.fromkeys(("siglip", "siglip_vision_model", "dinov2", "dinov2_with_registers"),
                        GRID) | {"instructblip": "an InstructBLIP goes with --visual-grid 0"}
# What other programs' models consist of: pattern of a file name, whose it is.
FOREIGN = (("*.gguf", "GGUF, llama.cpp's"), ("model.bin", "CTranslate2's"), ("*.onnx", "ONNX"),
           ("adapter_config.json", "an adapter's, not a model's"), ("*.msgpack", "Flax's"),
           ("*.h5", "TensorFlow's"), ("consolidated.*", "Meta's original"))
LARGEST_JSON = 32 * 2 ** 20       # bytes; read into Python it takes up to 20 times as much
LARGEST_SIZE = 2 ** 24            # of any width or count in a config
MOST_LAYERS = 256                 # as each costs time before its weights can be missed
BLOCK = 2 ** 17                   # numbers that stay in a core's cache from a copy to its check
# Bytes of each shard, counted from names, shapes and dtype: errors report a download's size.
PUBLISHED = {
    "openai/whisper-tiny": (151_061_672,),
    "openai/whisper-base": (290_403_936,),
    "openai/whisper-small": (966_995_080,),
    "google/siglip2-base-patch16-224": (1_500_800_904,),     # its text model, unread, is 1.13 GB
    "facebook/dinov2-small": (88_249_960,),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (269_060_552,),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (723_674_912,),
    "openai/whisper-large-v2": (6_173_370_152,),
    "Salesforce/instructblip-vicuna-7b": (
        4_950_754_976, 4_980_963_584, 4_957_878_440, 937_994_232),
    "Salesforce/instructblip-vicuna-13b": (
        4_934_087_952, 4_933_723_144, 4_970_423_232, 4_970_423_232, 4_933_702_464, 3_641_975_144)}


# ---- from the Hub -------------------------------------------------------------------------------

def offline(on=True):
    """--offline: this process and those that it starts use only what is in the Hub's cache. With
    on=False nothing changes: the environment variable HF_HUB_OFFLINE decides."""
    if on:
        os.environ["HF_HUB_OFFLINE"] = "1"


def is_offline():
    """Whether HF_HUB_OFFLINE forbids downloads."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def folder(source, files=SMALL_FILES, tensors=("",), config="config.json"):
    """Local folder or Hub repo id `source` -> Path of a folder: the local one as it is, or the
    repo's in the Hub's cache (HF_HOME). What the cache lacks is downloaded, with a progress bar:
    `config`, `files` (patterns; those without a match are left out), and the shards that hold
    tensors whose names start with one of `tensors` (() = no weights). A broken connection is
    resumed; after a kill the finished files are still there.
    Raises OSErrors that name what is missing, its size, the reason, and the remedy."""
    path, repo = Path(source).expanduser(), source if isinstance(source, Repo) else str(source)
    if not isinstance(source, Repo) and path.exists():
        if path.is_dir():
            return path
        raise FileNotFoundError(f"{source}: no folder; wanted the folder that holds {config} and "
                                "model.safetensors")
    if path.is_absolute() or repo.startswith(".") or repo.count("/") != 1:
        raise FileNotFoundError(
            f"{source}: no such folder; wanted a folder in the Hub's layout ({config} + "
            "model.safetensors) or a Hub repo id such as openai/whisper-large-v2")
    small, shards = [config, *files, *([INDEX] if tensors else [])], []
    root = _fetch(repo, small)
    if not (root / config).exists():      # for a single file the Hub's error states the reason
        root = _fetch(repo, [config], alone=True).parent
    if tensors:
        places = weight_map(root / INDEX) if (root / INDEX).exists() else {"": SINGLE}
        shards = sorted({shard for name, shard in places.items() if name.startswith(tuple(tensors))}
                        or set(places.values()))                        # names unknown to us
        root = _fetch(repo, small + shards)
    for name in shards:
        if not (root / name).exists():
            root = _fetch(repo, [name], alone=True).parent
    return root


class Repo(str):
    """The id of a Hub repo that a checkpoint names. It never means a folder, even if the working
    folder happens to hold one of that name."""


def anywhere(source):
    """What a user calls a part -> a name of it that holds in every working folder. What exists here
    becomes an absolute path. Parts of the miniature, which are named relative to this repository,
    and Hub repos keep their names."""
    if isinstance(source, Repo) or _ours(source):
        return source
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else str(source)


def saved_source(source):
    """The name of a part in a favor.json -> the same, as a Repo where it is owner/name: in another
    working folder than that of the training a folder of this name is another one."""
    likely = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return Repo(source) if likely and not _ours(source) else source


def local_source(source):
    """A part of the miniature, named relative to this repository, -> its path, so that it is found
    from any working folder; tiny/ is the old name of miniature/weights/. Other sources are returned
    as they are."""
    return _ours(re.sub(r"^tiny/", "miniature/weights/", str(source))) or source


def local_folder(source):
    """The folder that a part is read from; None for a repo on the Hub."""
    source = local_source(source)
    path = Path(source).expanduser()
    return path if path.is_dir() and not isinstance(source, Repo) else None


def _ours(source):
    """Path of a part of the miniature in this repository; None for all other sources."""
    path = REPOSITORY / str(source)
    return path if str(source).startswith("miniature/weights/") and path.is_dir() else None


def _fetch(repo, wanted, alone=False):
    """Downloads the files `wanted` -> the repo's folder in the cache; alone: the path of the only
    one."""
    import huggingface_hub as hub  # imported here, because the miniature never needs the Hub
    try:
        if alone:
            return Path(hub.hf_hub_download(repo, *wanted, local_files_only=is_offline()))
        return Path(hub.snapshot_download(
            repo, allow_patterns=wanted, local_files_only=is_offline()))
    except Exception as error:
        known = _known_failure(error, repo, wanted)
        if known is None:
            raise
        if isinstance(repo, Repo) and isinstance(known, FileNotFoundError) and Path(repo).exists():
            known = FileNotFoundError(f"{known}. The checkpoint does not mean the folder "
                                      f"{Path(repo).resolve()}; to take it, name it: ./{repo}")
        raise known from error


def _absent(repo, wanted):
    """The files of `wanted` that are not in the cache, with sizes, for an error message."""
    from huggingface_hub import try_to_load_from_cache
    sizes = PUBLISHED.get(repo, ())
    sizes = {shard_name(i, len(sizes)): size for i, size in enumerate(sizes, 1)}
    paths = {name: try_to_load_from_cache(repo, name) for name in {*wanted, *sizes, SINGLE, INDEX}}
    total = sum(sizes.values())
    if isinstance(paths[INDEX], str):
        total = (read_json(paths[INDEX]).get("metadata") or {}).get("total_size", total)
    elif INDEX in wanted and SINGLE not in wanted:      # without an index the shards are unknown
        wanted = [*wanted, *(sizes or [SINGLE])]
    texts = [name + (f" ({sizes[name] / 1e9:.2f} GB)" if name in sizes else
                     " (size unknown)" if name.endswith(".safetensors") else "")
             for name in wanted if name != INDEX and not isinstance(paths[name], str)]
    what = "all its shards" if len(sizes) != 1 else SINGLE
    said = not total or what == SINGLE and (SINGLE in wanted or isinstance(paths[SINGLE], str))
    return ", ".join(texts) + ("" if said else f"; {what}: {total / 1e9:.2f} GB")


def _known_failure(error, repo, wanted):
    """The error to raise instead of `error`, for the usual failures of a download; else None."""
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
            "another disk, and run again: finished files stay"))
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
            f"download {repo} --local-dir BIN`, `{CONVERT} BIN OUT`, and pass OUT")
    cut_off = type(error).__module__.split(".")[0] in (      # errors in the middle of a download
        "httpx", "httpx2", "httpcore", "requests", "urllib3")
    if not (local or cut_off or status or isinstance(error, (ConnectionError, TimeoutError))):
        return None
    why = ("--offline or HF_HUB_OFFLINE forbids to fetch it" if is_offline() else
           f"the Hub answers {status}" if status else
           "there is no network, or the connection broke "
           f"({type(error.__cause__ or error).__name__})")
    return FileNotFoundError(
        f"{repo}: not in the cache {cache}: {absent}; {why}, and there is no local folder of that "
        "name. Run (again) where there is a network, finished files stay; or `hf download "
        f"{repo}` there and copy the cache; or pass a local folder")


# ---- reading ------------------------------------------------------------------------------------

def shard_name(i, n):
    """File name of the i-th (from 1) of n shards."""
    return f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else SINGLE


def weight_map(path):
    """{tensor name: shard} of an index file; ValueError if it has none."""
    index = read_json(path)
    places = isinstance(index, dict) and index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{path}: no weight_map in it; wanted {{tensor name: shard}}; download or "
                         "save the file again")
    for name, shard in places.items():
        if not isinstance(shard, str) or not re.fullmatch(r"(?!\.+$)[\w.+ -]{1,200}", shard):
            raise ValueError(f"{path}: places {name} in {shard!r:.80}; wanted the name of a file "
                             "that lies beside it")
    return places


def what_instead(path, pickles=True):
    """A message for what often lies under the name of a weights file instead of weights; or "".
    pickles: a pickle is wrong, too."""
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
                f"its folder: {CONVERT} FOLDER OUT")
    if start.startswith(b"GGUF"):
        return "a GGUF file of llama.cpp's; take the model's safetensors"
    return ""


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, not read yet; calling it reads it. The file is opened anew
    each time: the library maps it into memory, and pages that were read would count as ours, and
    stay, until the file is closed."""
    path: Path
    name: str
    dtype: object                               # a torch.dtype
    shape: tuple

    def __call__(self):
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def stored_tensors(path):
    """{tensor name: Stored} of one safetensors file, in the file's order; no numbers are read yet.
    ValueError states what is wrong with the file."""
    check_file(path)
    try:
        with safe_open(path, framework="pt") as file:        # checks every offset and size
            views = {name: file.get_tensor(name) for name in file.offset_keys()}
            return {name: Stored(path, name, t.dtype, tuple(t.shape)) for name, t in views.items()}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except (SafetensorError, AttributeError, RuntimeError) as error:     # the last two: torch's
        what = (what_instead(path)
                or f"truncated or damaged ({error}); delete it and download it again")
        raise ValueError(f"{path}: {what}") from None


def listed(names, at_most=20):
    """'a, b, … (34)' for an error message."""
    names = sorted(names)
    return ", ".join(names[:at_most]) + (" …" if len(names) > at_most else "") + f" ({len(names)})"


def _layout(root):
    """{tensor name: shard} of a folder; not all shards need be there."""
    if (root / INDEX).exists():
        return weight_map(root / INDEX)
    if (root / SINGLE).exists():
        return dict.fromkeys(stored_tensors(root / SINGLE), SINGLE)
    if any(root.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{root}: .bin files only, no {SINGLE}; convert them once: "
                                f"{CONVERT} {root} {root}-safetensors")
    raise FileNotFoundError(f"{root}: no {SINGLE} and no {INDEX}{foreign(root)}; download or save "
                            "it again")


def foreign(root):
    """', but model.bin (CTranslate2's)': files of another program's model in a folder; or ""."""
    found = [f"{path.name} ({whose})" for pattern, whose in FOREIGN
             for path in sorted(root.glob(pattern))[:1]]
    return f", but {', '.join(found)}" if found else ""


def open_tensors(root, wanted=lambda name: True):
    """{tensor name: Stored} of the names for which wanted(name) is true. Only the shards that hold
    them are opened (or need be there), and no numbers are read yet."""
    root, tensors = Path(root), {}
    layout = {name: shard for name, shard in _layout(root).items() if wanted(name)}
    for shard in sorted(set(layout.values())):
        if not (root / shard).exists():
            raise FileNotFoundError(
                f"{root / shard}: listed in {INDEX} but missing; download it again")
        stored = stored_tensors(root / shard)
        lost = [name for name, place in layout.items() if place == shard and name not in stored]
        if lost:
            raise ValueError(f"{root / shard}: lacks {listed(lost)} that {INDEX} places there; "
                             "shards and index must be of one model: download both again")
        twice = [name for name in stored if name in tensors]
        if twice:
            raise ValueError(f"{root / shard}: {listed(twice)} also in another shard; shards and "
                             "index must be of one model: download both again")
        tensors |= {name: tensor for name, tensor in stored.items() if wanted(name)}
    return tensors


def load_module(make, root, dtype=None, device=None, **options):
    """make() -> a module with the weights of folder `root`, in eval mode. It is built on the device
    "meta", so that no time and memory goes to weights that are replaced, or do not fit.
    dtype None: fp32; device None: CPU; options: see load_into."""
    import torch  # not above, because some programs read small files only and start without it
    with torch.device("meta"):
        module = make()
    fitting(module, root, **options)
    module = module.to(dtype or torch.float32).to_empty(device=device or "cpu")
    if hasattr(module, "tie_weights"):           # to_empty made two tensors of one
        module.tie_weights()
    return load_into(module, root, **options).eval()


def load_into(module, root, **options):
    """Copies the tensors of folder `root` into `module`, one at a time, in the module's dtype and
    on its device. The host needs memory for the largest tensor beside the module, not more
    (test_hub.py).

    prefix: str, or a tuple of which the first that occurs in the file counts ("" matches all);
            only names that start with it are read.
    rename: (theirs, ours) substring pairs, applied in order after the prefix is cut.
    rows:   {our name: n} reads only the first n rows (of padded vocabularies).
    only:   prefixes of the names to read, without cutting them; the rest of the file is ignored.
    Raises ValueError that lists missing tensors, unknown tensors, wrong shapes and dtypes, or names
    a tensor that holds NaN or infinity."""
    targets = module.state_dict(keep_vars=True)       # parameters and the buffers that are saved
    for ours, stored in fitting(module, root, **options).items():
        fill(targets[ours], stored)
    return module


def fitting(module, root, prefix="", rename=(), rows=None, only=("",)):
    """{our name: Stored} of what load_into copies; no numbers are read yet."""
    root, layout = Path(root), _layout(Path(root))
    prefixes = (prefix,) if isinstance(prefix, str) else prefix
    prefix = next((p for p in prefixes if any(n.startswith(p) for n in layout)), prefixes[0])
    tensors = open_tensors(root, lambda name: name.startswith(prefix) and name.startswith(
        tuple(only)) and not name.endswith(NOT_WEIGHTS))
    found, problems = _match(module.state_dict(keep_vars=True), tensors, prefix, rename, rows or {})
    if problems:
        raise ValueError(f"{root}: weights do not fit {type(module).__name__}; "
                         + "; ".join(problems))
    return found


def fill(target, stored):
    """Copies a Stored, or its first rows, into the tensor `target`. ValueError names it if there
    are NaN or infinity in it, or numbers that become infinite in the target's dtype."""
    import torch
    value = stored()
    value = value[:len(target)] if value.shape != target.shape else value
    size, good = BLOCK if target.device.type == "cpu" else max(1, target.numel()), True
    with torch.no_grad():
        for ours, theirs in zip(target.view(-1).split(size), value.view(-1).split(size),
                                strict=True):
            ours.copy_(theirs.to(target.device))  # there in the file's dtype, then in ours
            good = is_finite(ours) and good
    if not good:
        what = (f"numbers too large for {target.dtype}; load it in another dtype"
                if is_finite(value) else "NaN or infinity; download or save it again")
        raise ValueError(f"{stored.path}: {stored.name} holds {what}")


def is_finite(tensor):
    """Whether all numbers of a tensor are finite, without a copy."""
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    tensor = tensor.detach()                    # the sum is the quicker one, but may overflow
    return math.isfinite(tensor.sum()) or all(map(math.isfinite, tensor.aminmax()))


def _match(targets, tensors, prefix, rename, rows):
    """targets {our name: parameter}, tensors {name in the file: Stored} -> {our name: Stored}, and
    a list of what does not fit. The other arguments are load_into's."""
    found, unknown, wrong_shape, wrong_dtype = {}, [], [], []
    for theirs, tensor in tensors.items():
        ours, shape = theirs[len(prefix):], tensor.shape
        for old, new in rename:
            ours = ours.replace(old, new)
        if ours not in targets or ours in found:
            unknown.append(theirs)
            continue
        target = targets[ours]
        found[ours] = tensor
        if ours in rows and shape:
            shape = (min(shape[0], rows[ours]), *shape[1:])
        if shape != target.shape:
            wrong_shape.append(f"{theirs} {list(shape)}, wanted {list(target.shape)}")
        if not same_kind(tensor.dtype, target.dtype):
            wrong_dtype.append(f"{theirs} {tensor.dtype}, wanted {target.dtype}")
    tied = {id(targets[name]) for name in found}      # two names of one tensor: one is enough
    missing = [name for name, target in targets.items() if id(target) not in tied]
    return found, [f"{label}: {listed(names)}" for label, names in [
        ("missing", missing), ("unknown", unknown), ("wrong shape", wrong_shape),
        ("wrong dtype", wrong_dtype)] if names]


def same_kind(dtype, wanted):
    """Whether numbers of `dtype` mean the same in `wanted`: floats from floats, whole numbers from
    whole numbers. Floats of 8 bits and fewer mean nothing without their scales."""
    if wanted.is_floating_point:
        return dtype.is_floating_point and dtype.itemsize > 1
    return not dtype.is_floating_point and not dtype.is_complex


# ---- writing ------------------------------------------------------------------------------------

def save_tensors(path, tensors):
    """Writes {name: tensor} as the safetensors file `path`, atomically. Tensors that share memory
    are written once under each name."""
    from safetensors.torch import save_file
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with atomic(path) as temporary:
        save_file(separate, temporary, metadata={"format": "pt"})


def save_folder(root, tensors, config):
    """Writes model.safetensors and config.json into `root`, each atomically."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    save_tensors(root / SINGLE, tensors)
    (root / INDEX).unlink(missing_ok=True)       # of older shards: it would be read instead
    write_json(root / "config.json", config)


# ---- configs ------------------------------------------------------------------------------------

def model_config(root, kind, inside=None):
    """config.json of the model folder `root`, a dict. ValueError if its model_type is not `kind`
    (or one of a tuple), or if it names none and the folder holds another program's model. A config
    with the key `inside` may be of any type: the caller checks the part that stands there."""
    root, known = Path(root), Path(root) / "config.json"
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = " or ".join(map(repr, kinds))
    config = read_object(known) if known.exists() else {}
    if "model_type" not in config and not any(root.glob("*.safetensors*")) and foreign(root):
        raise ValueError(f"{root}: no {SINGLE}{foreign(root)}; wanted a model in the Hub's layout "
                         f"whose model_type is {wanted}")
    check_file(known)
    got = config.get("model_type", kinds[0])
    if got not in kinds and inside not in config:
        instead = INSTEAD.get(got if isinstance(got, str) else "", "pass another model's folder")
        raise ValueError(f"{known}: model_type is {got!r:.80}; wanted {wanted}; {instead}")
    return config


def processor(root, part, keys, plain=lambda key, value: value):
    """Settings of a model's input: those of `keys` that preprocessor_config.json names, or
    processor_config.json in its object `part`, where transformers 5 writes them. -> {key: value}
    and {key: path of its file}. plain(key, value) gives what several ways to write a value mean.
    ValueError where the two files contradict each other."""
    settings, places = {}, {}
    for name in PROCESSOR_FILES:
        path = Path(root) / name
        if not path.exists():
            continue
        found = read_object(path)
        found = found if name.startswith("pre") else found.get(part) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {part} is {found!r:.80}; wanted a JSON object {{...}}")
        for key in keys:
            if found.get(key) is None:
                continue
            value = plain(key, found[key])
            if key in settings and settings[key] != value:
                raise ValueError(f"{path}: {key} {value!r:.80}, but {places[key]} has "
                                 f"{settings[key]!r:.80}; remove the one that the model was not "
                                 "trained with")
            settings[key], places[key] = value, path
    return settings, places


def make_config(kind, found, names, where, zero=(), **ready):
    """The dataclass `kind` from the JSON object `found` of the file `where`. names: {field: key in
    the file}; a key that is absent or null leaves the field's default. Numbers must be finite and
    above 0; those of the fields in `zero` may be 0. ready: further fields, checked by the caller.
    ValueError names the file and the key."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {found!r:.80}; wanted a JSON object {{...}}")
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    values = {ours: found[key] for ours, key in names.items() if found.get(key) is not None}
    for name, value in values.items():
        least, most = 1 - (name in zero), MOST_LAYERS if name == "layers" else LARGEST_SIZE
        if wanted := _unlike(value, types[name], least, most):
            raise ValueError(f"{where}: {names[name]} is {value!r:.80}; wanted {wanted}")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return kind(**values, **ready)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _unlike(value, kind, least, most):
    """"" if a JSON value is of the type `kind` of a dataclass's field, otherwise what is wanted."""
    parts = [part for part in get_args(kind) if part not in (type(None), Ellipsis)]
    if get_origin(kind) is tuple:
        fits = isinstance(value, list) and not any(
            _unlike(item, parts[0], 0, most) for item in value)
        wanted = f"a list of {parts[0].__name__}"
    elif parts:                                            # one of several types
        wanted = [_unlike(value, part, least, most) for part in parts]
        fits, wanted = "" in wanted, " or ".join(wanted)
    elif kind is int:
        fits, wanted = type(value) is int and least <= value <= most, (
            f"a whole number from {least} to {most}")
    elif kind is float:
        fits = type(value) in (int, float) and least * 1e-30 <= value < 1e30
        wanted = "a number above 0" if least else "a number of 0 or more"
    else:
        fits, wanted = isinstance(value, kind), f"a {kind.__name__}"
    return "" if fits else wanted


# ---- small files --------------------------------------------------------------------------------

@contextmanager
def atomic(path):
    """Yields a temporary Path beside `path`, with the same suffix. It takes the place of `path`
    when the block ends without an error; after an error it is deleted and `path` stays as it was.
    Its name holds the process id, so that several processes may write the same file."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:                                     # after an error, a full disk gets its room back
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Writes the string `text` to `path` atomically, in UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes `value` to `path` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def check_file(path):
    """FileNotFoundError if there is no such file, ValueError if it is a folder, a pipe, or another
    thing from which nobody can read a file: opening a pipe would wait for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path}: a folder, pipe or device; wanted a file")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: missing; wanted a model folder in the Hub's layout")


def read_json(path):
    """The JSON value in `path`. FileNotFoundError or ValueError names the file if it is missing or
    broken. A key that stands twice in one object is an error, because readers disagree on it."""
    check_file(path)
    try:
        if (size := os.stat(path).st_size) > LARGEST_JSON:
            raise ValueError(f"{size} bytes; wanted {LARGEST_JSON} at most")
        return json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}); download or save the file again") from None


def unique_keys(pairs):
    """(key, value) pairs of an JSON object -> dict. ValueError for a key that is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return values


def read_object(path):
    """read_json of a file that holds an object -> dict."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; wanted a JSON object {{...}}")
    return value


def read_jsonl(path):
    """Yields the JSON object of each line of `path`; nothing if there is no such file. Lines that a
    kill or a full disk cut off are left out."""
    if not Path(path).is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def grown_lines(path):
    """The JSON objects of a file that grows line by line -> list of (line number, dict).  Lines at
    its end that a kill or a full disk cut off are left out.  ValueError says what else is wrong
    with the file."""
    check_file(path)
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    rows, broken = [], 0
    for number, text in enumerate(lines, start=1):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):             # also bytes that are no text
            broken = broken or number
            continue
        if broken or not isinstance(row, dict):
            raise ValueError(f"{path}: line {broken or number} is damaged")
        rows.append((number, row))
    return rows


def markdown_table(header, rows):
    """Column names and rows of cells -> the lines of a Markdown table, joined by newlines. A cell's
    line breaks become spaces, and its | is escaped."""
    def line(cells):
        texts = (re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(cell).splitlines())) for cell in cells)
        return f"| {' | '.join(texts)} |"
    return "\n".join([line(header), "|---" * len(header) + "|", *map(line, rows)])
