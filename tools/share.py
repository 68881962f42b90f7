"""Shares a checkpoint: writes a model card, uploads to the Hub, merges LoRA into the LLM.

     checkpoint (favor.json, model.safetensors, lora/), predictions.json --model_card--> README.md
       --push--> the Hub's user/name, which favor.Favor.from_pretrained("user/name") opens
     checkpoint's LLM: W + alpha/r B A --merge--> a folder for any inference engine

     python -m tools.share card  runs/7b/best                        prints the card
     python -m tools.share push  runs/7b/best user/name --private
     python -m tools.share merge runs/7b/best vicuna-favor        then e.g.: vllm serve vicuna-favor

The card holds what the checkpoint records, and the scores of eval.py's report in its folder or the
one above, if that report is about the same weights. It names what is not recorded.

Public: model_card, push, merge."""

import argparse
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import load_file

import lora
from aveb import metrics
from favor import RENAMED
from llama import (
    LLM_TENSORS,
    JsonTokenizer,
    Llama,
    LlamaConfig,
    Tokenizer,
    as_tuple,
    own_head,
)
from runtime import cli, hub
from runtime.checkpoint import weights_hash
from runtime.hub import markdown_table, write_text

COMMAND = "python -m tools.share"
MARK = ("<!-- tools/share.py writes this card again at every push. Remove this line to keep your "
        "own edits. -->")
PARTS = {"whisper": "Whisper", "visual": "visual encoder", "llm": "LLM"}
REPO = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
ADAPTERS = ("lora/adapter_config.json", "lora/adapter_model.safetensors")
DTYPES = ("bfloat16", "float16", "float32")
# The prompt of favor.prompt_ids for a text without a clip (tests/tools/test_share.py).
REFUSED = "{{ raise_exception('wanted the roles user and assistant only') }}"
CHAT_TEMPLATES = {
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ 'USER: ' + m['content'] + '\\nASSISTANT:' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        f"{{% else %}}{REFUSED}{{% endif %}}{{% endfor %}}"),
    "chatml": (
        "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        f"{{% else %}}{REFUSED}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")}
SPELT = {                                  # the same for readers, without a clip
    "vicuna": "`USER: question`, new line, `ASSISTANT:`",
    "chatml": "ChatML without a system turn: `<|im_start|>user`, new line, the question, "
              "`<|im_end|>`, new line, `<|im_start|>assistant`, new line"}
# Repos whose model card says apache-2.0, among those that the presets and docs/small.md name.
APACHE = ("openai/whisper-base", "openai/whisper-small", "google/siglip2-base-patch16-224",
          "google/siglip-base-patch16-224", "facebook/dinov2-small",
          "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct",
          "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B")


def read_checkpoint(folder):
    """The folder of a checkpoint, or of a run, whose best/ is taken -> its path, the content of
    favor.json, the names of its files. FileNotFoundError or ValueError if it is no checkpoint."""
    root = Path(folder).expanduser()
    root = root if (root / "favor.json").exists() else root / "best"
    if not (root / "favor.json").exists():
        raise FileNotFoundError(f"{folder}: no favor.json, there or in best/; wanted a checkpoint "
                                "of train.py or save_pretrained, such as runs/7b/best")
    saved = hub.read_json(root / "favor.json")
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise ValueError(f"{root}/favor.json: no config in it; save the checkpoint again")
    saved["config"] = {RENAMED.get(name, name): value for name, value in saved["config"].items()}
    if saved.setdefault("system", "favor") not in ("favor", "instructblip"):
        raise ValueError(f"{root}/favor.json: system {saved['system']!r}; wanted favor or "
                         "instructblip, or the version of the code that wrote it")
    files = ["favor.json", hub.SINGLE, *(ADAPTERS if saved["config"].get("lora_targets") else ())]
    if lacking := [name for name in files if not (root / name).exists()]:
        raise FileNotFoundError(f"{root}: no {', '.join(lacking)}; save the checkpoint again")
    return root, saved, files


# ---------------------------------------------------------------- safe Markdown and YAML
def plain(text):
    """One line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def cell(text):
    """The same with Markdown's special characters escaped."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", plain(text))


def table(head, rows):
    """A Markdown table whose cells are shown as they are."""
    return markdown_table(head, [[cell(x) for x in row] for row in rows])


def front_matter(**fields):
    """YAML between lines of ---; empty fields are left out."""
    lines = {key: [plain(v) for v in value] if isinstance(value, list) else plain(value)
             for key, value in fields.items() if value}
    return f"---\n{ModelCardData(**lines).to_yaml()}\n---"


# ---------------------------------------------------------------- the card
def is_ours(source):
    """Whether a source is a part of the miniature, which comes with the code."""
    return source.startswith(("miniature/", "tiny/")) and hub.local_source(source) != source


def is_repo(source):
    """Whether a source is a repo of the Hub, which accepts only those as base models of a card."""
    return bool(REPO.fullmatch(source)) and not is_ours(source)


def licence(sources):
    """Sources of the frozen parts -> fields of the front matter, and a paragraph on the licence."""
    if all(map(is_ours, sources)):
        return {"license": "mit"}, "The frozen parts come with the code, all under the MIT licence."
    repos = [f"https://huggingface.co/{source}" for source in sources if is_repo(source)]
    if all(is_ours(source) or source in APACHE for source in sources):
        return {"license": "apache-2.0"}, (
            "The trained parts were trained with base models under the Apache License 2.0, and are "
            f"under it, too: {', '.join(repos)}. The code is under the MIT licence. The training "
            "data may have terms of its own.")
    return {"license": "other", "license_name": "terms-of-the-base-models",
            "license_link": repos[-1] if repos else ""}, (
        "The trained parts inherit the terms of the base models they were trained with: LLaMA's, "
        "Vicuna's and InstructBLIP's, where those are the base. Read them before use: "
        + (", ".join(repos) or "the base models were in local folders, so ask who made this")
        + ". The code is under the MIT licence.")


def find_report(root):
    """-> eval.py's report about these weights and "", or None and the reason why there is none."""
    why = "Not scored."
    for path in (root / "predictions.json", root.parent / "predictions.json"):
        if not path.exists():
            continue
        report = hub.read_json(path)
        settings = report.get("settings", {}) if isinstance(report, dict) else {}
        same = settings.get("weights") == weights_hash(root)
        if "checkpoint" in settings and "weights" not in settings:      # train.py's, of its best/
            same = (path.parent != root and Path(str(settings["checkpoint"])).name == root.name
                    and path.stat().st_mtime >= (root / hub.SINGLE).stat().st_mtime)
        if same:
            return report, ""
        why = "Not scored: there is a predictions.json, but of other weights."
    return None, why


def scores_text(report):
    """One line per task, view and metric (score, interval, n), then the settings of eval.py."""
    rows, settings = [], report["settings"]
    known = {True: "zero-shot", False: "trained on it", None: "unknown"}
    for task, views in report["scores"].items():
        lost, seen = report["missing"].get(task, 0), known[report.get("zero-shot", {}).get(task)]
        for view, found in views.items():
            for name, value in found.items():
                if isinstance(value, str):                          # n/a and the reason
                    rows.append((task, view, name, value, "-", "-", seen))
                    continue
                score = metrics.Score(**value)
                name = " ".join(filter(None, (name, score.unit, score.arrow, score.note)))
                rows.append((task, view, name, score, score.n, score.missing + lost, seen))
    said = [f"{name} {settings[name]}" for name in (
        "beams", "repetition penalty", "max new tokens", "history", "dtype", "questions",
        "manifest", "ids") if name in settings]
    return (table(("task", "sees", "metric", "score [95 %]", "n", "missing", "data set"),
                           rows) + "\n\nIn brackets the 95 % interval; missing: clips that could "
            "not be read and answers without a score.\n\nDecoding and questions: "
            + cell(", ".join(said) or "not recorded") + ".")


def training_text(saved):
    """The training data and the settings of the training, as far as they are recorded."""
    mixture, train = saved.get("mixture"), saved.get("train") or {}
    text = "Training data unknown: the checkpoint does not record its data sets."
    if mixture:
        text = table(("data set (own: not named)", "task", "samples"), [
            (name, task, n) for name, tasks in mixture.items() for task, n in tasks.items()])
    run = {name: train.get(name) for name in (
        "model", "data", "start_from", "batch", "lr", "mask", "seed")} | {
        name: saved.get(name) for name in ("step", "val_ce", "commit", "dirty", "command")}
    rows = [(name, value) for name, value in run.items() if value not in (None, "")]
    return text + "\n\n" + (table(("run", "value"), rows) if rows else
                            "The settings of the training are not recorded.")


def loading_text(saved, sources, repo_id):
    """How to load the checkpoint, in Python and on the command line."""
    module, kind, command = {
        "favor": ("favor", "Favor", 'demo.py clip.mp4 "What happens after the beep?"'),
        "instructblip": ("baselines.instructblip", "InstructBlip",
                         "eval.py --system instructblip --data test.jsonl")}[saved["system"]]
    local = [p for p, source in sources.items() if not is_repo(source) and not is_ours(source)]
    flags = "".join(f" --{part} FOLDER" for part in local)
    arguments = ", ".join([f'"{repo_id}"', *(f'{part}="FOLDER"' for part in local)])
    return f"""With the code of FAVOR:

```python
from {module} import {kind}
model = {kind}.from_pretrained({arguments})
print(model.answer("clip.mp4", "What happens after the beep?"))
```
```sh
hf download {repo_id} --local-dir checkpoint
python {command} --checkpoint checkpoint{flags}
```""" + "".join(f"\n\n{PARTS[part]} was in a local folder, so pass your own." for part
                 in local)


def model_card(folder, repo_id="user/name"):
    """The text of README.md for a checkpoint, with the Hub's front matter."""
    root, saved, _ = read_checkpoint(folder)
    config, favor = saved["config"], saved["system"] == "favor"
    sources = {part: str(config.get(part, "unknown")) for part in PARTS
               if favor or part != "whisper"}                # InstructBLIP takes no audio
    places = list(dict.fromkeys(sources.values()))
    (report, unscored), (terms, terms_text) = find_report(root), licence(places)
    head = front_matter(
        **terms, library_name="favor",
        pipeline_tag="video-text-to-text" if favor else "image-text-to-text",
        base_model=[place for place in places if is_repo(place)],
        datasets=[name for name in saved.get("mixture") or {}      # the Hub refuses other names
                  if name != "own" and REPO.fullmatch(name if "/" in name else f"x/{name}")],
        tags=["favor", "video", *(["audio-visual", "speech", "lora"] if favor else [])])
    what = ("[FAVOR](https://arxiv.org/abs/2310.05863), an audio-visual LLM: the trained parts "
            "(audio projection, causal Q-Former, LLM projection, LoRA)" if favor else
            "InstructBLIP, fine-tuned as a baseline of [FAVOR](https://arxiv.org/abs/2310.05863): "
            "the trained parts (Q-Former, queries, projection)")
    parts = [(PARTS[part], source if is_repo(source) or is_ours(source) else
              f"a local folder, {Path(source).name}") for part, source in sources.items()]
    names = ("sync", "window_frames", "causal", "queries", "fps", "diversity", "visual_grid",
             "prompt", "lora_r", "lora_alpha", "lora_targets") if favor else ("queries",)
    switches = [(name, ", ".join(value) if isinstance(value, list) else value)
                for name in ("variant", *names)
                for value in [config.get(name, "not recorded")]]
    return "\n\n".join([
        f"{head}\n{MARK}", f"# {cell(repo_id.split('/')[-1])}",
        f"{what}, variant {cell(config.get('variant', 'unknown'))}. The frozen parts are not "
        "included; they are loaded from their own sources.", loading_text(saved, sources, repo_id),
        "## Parts\n\n" + table(("frozen part", "base model"), parts),
        table(("switch", "value"), switches), f"## Training\n\n{training_text(saved)}",
        f"## Scores\n\n{scores_text(report) if report else unscored}",
        f"## Licence\n\n{terms_text}"]) + "\n"


# ---------------------------------------------------------------- to the Hub
def push(folder, repo_id, private=False, token=None, api=None):
    """Uploads the trained parts, favor.json and the card, and nothing else -> the Hub's answer. A
    README.md without our mark is uploaded unchanged. api: a huggingface_hub.HfApi."""
    if not REPO.fullmatch(repo_id):
        raise ValueError(f"{repo_id}: wanted the name of a repo on the Hub, user/name")
    root, _, files = read_checkpoint(folder)
    hub.open_tensors(root)                               # an error for a truncated file
    if api is None:
        import huggingface_hub
        if not (token or huggingface_hub.get_token()):
            raise PermissionError("no token for the Hub; `hf auth login`, or set HF_TOKEN, to one "
                                  "that may write: https://huggingface.co/settings/tokens")
        api = huggingface_hub.HfApi(token=token)
    card = root / "README.md"
    if not card.exists() or MARK in card.read_text("utf-8"):
        write_text(card, model_card(root, repo_id))
    try:
        # None leaves the account's default; an existing repo keeps its visibility.
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} exists and is public, so nothing was uploaded; name "
                             "another repo, or make it private in its settings")
        return api.upload_folder(repo_id=repo_id, folder_path=root,
                                 commit_message=f"{COMMAND} push",
                                 allow_patterns=[*files, "README.md"])
    except Exception as error:
        known = _known_failure(error, repo_id, card)
        if known is None:
            raise
        raise known from error


def _known_failure(error, repo_id, card):
    """A usual failure as an error of one line that names the remedy; None for any other error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return PermissionError(f"{repo_id}: the Hub refuses ({status}): this token may not write "
                               "there; `hf auth login` with one that may, or name your own user")
    if status:
        return OSError(f"{repo_id}: the Hub answers {status}: {plain(error)}")
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] \
            in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
        why = "HF_HUB_OFFLINE is set" if hub.is_offline() else type(error).__name__
        return ConnectionError(f"{repo_id}: the Hub cannot be reached ({why}); run it again where "
                               f"there is a network. The card is written: {card}")
    return None


# ---------------------------------------------------------------- the LLM alone
def merge(folder, out, dtype="bfloat16", shard_gb=5, llm=None):
    """The LLM with LoRA merged into it -> `out`, a folder in the Hub's layout with tokenizer
    and chat template, which answers text as the checkpoint does; the audio-visual parts are not in
    it.  llm: where the LLM is, if not where favor.json says.  One shard at a time is in memory,
    and `out` appears when it is whole."""
    out, (root, saved, files) = Path(out), read_checkpoint(folder)
    if dtype not in DTYPES or not shard_gb > 0:
        raise ValueError(f"dtype {dtype}, shards of {shard_gb} GB; wanted one of "
                         f"{', '.join(DTYPES)}, and more than 0")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: the folder is not empty; name another folder")
    if ADAPTERS[1] not in files:
        raise ValueError(f"{root}: --system {saved['system']} has no LoRA, so there is nothing "
                         f"to merge: its LLM is {saved['config']['llm']} as published")
    place = hub.anywhere(llm) if llm else hub.saved_source(saved["config"]["llm"])
    style = saved["config"].get("prompt", "vicuna")
    if style not in CHAT_TEMPLATES:
        raise ValueError(f"{root}/favor.json: prompt {style!r:.80}; wanted "
                         f"{' or '.join(CHAT_TEMPLATES)}")
    source = hub.folder(hub.local_source(place), hub.SMALL_FILES, LLM_TENSORS)
    tokenizer, config, shapes, read = merged_tensors(root, source, getattr(torch, dtype))
    ends = [tokenizer.special_id("<|im_end|>")] if style == "chatml" else []     # what it learnt
    ends = list(dict.fromkeys((*ends, tokenizer.eos_id, *as_tuple(config.eos_id))))
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends if len(ends) > 1 else ends[0]}
    terms, terms_text = licence([place])
    new = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)                   # left by a killed run
    new.mkdir(parents=True)
    try:
        write_shards(new, shapes, read, shard_gb * 1e9)
        hub.write_json(new / "config.json", config.to_dict() | ids | {"torch_dtype": dtype})
        hub.write_json(new / "generation_config.json", ids)
        write_tokenizer(new, source, tokenizer, CHAT_TEMPLATES[style])
        (new / "README.md").write_text(front_matter(
            **terms, library_name="transformers", pipeline_tag="text-generation",
            base_model=[place] if is_repo(place) else [], tags=["favor"]) + f"""

# {cell(out.name)}

The LLM of a FAVOR checkpoint (code of commit {cell(saved.get('commit', 'unknown'))}), LoRA merged
into it, {dtype}. **It takes text alone: the audio-visual parts are not in here** (Whisper, ViT,
Q-Formers, projections); for them load the checkpoint with `favor.Favor`. The prompt is
the chat template's: {SPELT[style]}.

{terms_text}
""", "utf-8")
        os.replace(new, out)
    except BaseException:                                    # frees the space on a full disk
        shutil.rmtree(new, ignore_errors=True)
        raise
    return out


def merged_tensors(root, source, dtype):
    """-> tokenizer, LlamaConfig, {name: tensor on the device "meta"} in the model's order, and
    read(name), which gives its numbers: W + alpha/r B A in fp32, rounded once."""
    tokenizer, config = Tokenizer.from_pretrained(source), LlamaConfig.from_folder(source)
    stored = {name.removeprefix("language_model."): tensor for name, tensor in hub.open_tensors(
        source, lambda name: name.startswith(LLM_TENSORS)
        and not name.endswith(hub.NOT_WEIGHTS)).items()}
    adapters = load_file(root / ADAPTERS[1])
    # As in Llama.from_pretrained: an lm_head of its own is not tied, the vocabulary may be padded.
    tied = config.tie_embeddings and not own_head(source)
    if tied:                                   # Qwen3's file holds the tied tensor twice
        stored.pop("lm_head.weight", None)
    if tied and f"{lora.PREFIX}lm_head.lora_A.weight" in adapters:
        stored["lm_head.weight"], tied = stored["model.embed_tokens.weight"], False
    config = replace(config, vocab_size=min(config.vocab_size, tokenizer.vocab_size),
                     tie_embeddings=tied)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    shapes = dict(model.named_parameters())
    padded = ("embed_tokens.weight", "lm_head.weight")
    found = {name: (min(t.shape[0], config.vocab_size), *t.shape[1:]) if name.endswith(padded)
             else t.shape for name, t in stored.items()}
    if odd := found.items() ^ {name: tuple(t.shape) for name, t in shapes.items()}.items():
        raise ValueError(f"{source}: missing, unknown or of a wrong shape: "
                         + ", ".join(sorted({name for name, _ in odd})[:20]))
    layers = lora.layers(lora.load(model, root / "lora"))    # strict; no numbers on "meta"

    def read(name):
        weight, module = stored[name]()[:len(shapes[name])].float(), name.removesuffix(".weight")
        if module in layers:
            a, b = (adapters[f"{lora.PREFIX}{module}.{part}.weight"].float()
                    for part in ("lora_A", "lora_B"))                            # (r,in), (out,r)
            weight.addmm_(b, a, alpha=layers[module].config.scale)               # (out,in)
        weight = weight.to(dtype)
        if not weight.isfinite().all():
            raise ValueError(f"{name}: infinite or not a number in {dtype}; take bfloat16 or "
                             "float32, or look at the checkpoint")
        return weight
    return tokenizer, config, shapes, read


def write_shards(root, shapes, read, limit):
    """model.safetensors; or shards of at most `limit` bytes, a tensor at least, and their index."""
    shards, room = [], 0
    for name, tensor in shapes.items():
        if not shards or tensor.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name], room = tensor, room - tensor.nbytes
    places = {}
    for i, tensors in enumerate(shards, 1):
        shard = hub.shard_name(i, len(shards))
        hub.save_tensors(root / shard, {name: read(name) for name in tensors})
        places |= dict.fromkeys(tensors, shard)
    if len(shards) > 1:
        hub.write_json(root / hub.INDEX, {"weight_map": places, "metadata": {
            "total_size": sum(tensor.nbytes for tensor in shapes.values())}})


def write_tokenizer(root, source, tokenizer, chat_template):
    """Writes the source's tokenizer files with our prompt as chat template in the place of theirs.
    InstructBLIP's files name </s> as the first token of a text, so of those only the pieces are
    taken. The other files that inference engines need are made from tokenizer.model."""
    names, is_json = ["tokenizer.model", "tokenizer.json"], isinstance(tokenizer, JsonTokenizer)
    inside = "text_config" in hub.read_json(source / "config.json")
    if not is_json and (inside or not (source / "tokenizer.json").exists()):
        names.remove("tokenizer.json")
        write_tokenizer_json(root / "tokenizer.json", tokenizer)
    elif not inside:
        names += ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
    for name in names:
        if (source / name).exists():
            shutil.copy(source / name, root / name)
    if not (root / "tokenizer_config.json").exists():
        piece = tokenizer.pieces.id_to_token if is_json else tokenizer.pieces.id_to_piece
        hub.write_json(root / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "bos_token": piece(tokenizer.bos_id), "eos_token": piece(tokenizer.eos_id),
            "add_bos_token": True, "add_eos_token": False})
    settings = hub.read_object(root / "tokenizer_config.json")
    if settings.pop("chat_template", None):               # older engines would prefer this one
        hub.write_json(root / "tokenizer_config.json", settings)
    (root / "chat_template.jinja").write_text(chat_template, "utf-8")


def write_tokenizer_json(path, tokenizer):
    """Writes tokenizer.json for a sentencepiece BPE; its pieces are in the order of the merges."""
    from tokenizers import AddedToken, decoders, models, normalizers, processors
    from tokenizers import Tokenizer as Pieces
    vocab = {tokenizer.pieces.id_to_piece(i): i for i in range(tokenizer.vocab_size)}
    merges = [(piece[:k], piece[k:]) for piece in vocab for k in range(1, len(piece))
              if piece[:k] in vocab and piece[k:] in vocab]
    unk, bos, eos = (tokenizer.pieces.id_to_piece(i) for i in (
        tokenizer.pieces.unk_id(), tokenizer.bos_id, tokenizer.eos_id))
    pieces = Pieces(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    pieces.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                        decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    pieces.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)])
    pieces.add_special_tokens([AddedToken(t, special=True, normalized=False)
                               for t in (unk, bos, eos)])
    pieces.save(str(path))


# ---------------------------------------------------------------- the command line
def arguments():
    """The parser of the command line."""
    formatter = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(COMMAND, description=cli.description(__doc__), **formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, short, text):
        new = commands.add_parser(name, help=short, description=text, **formatter)
        group = new.add_argument_group("model")
        group.add_argument("run", metavar="RUN",
                           help="folder of a checkpoint with favor.json, such as runs/7b/best, or "
                           "folder of a run, whose best/ is taken")
        return new, group
    new, _ = command("card", "print the model card", """\
Prints the card that push would upload. To edit it by hand, remove its comment line, too:

  python -m tools.share card runs/7b/best > README.tmp && mv README.tmp runs/7b/best/README.md""")
    new.add_argument_group("Hub").add_argument(
        "repo", metavar="user/name", nargs="?", default="user/name",
        help="name of the Hub repository in the card's example (default: %(default)s)")
    new, _ = command("push", "upload to the Hub", """\
Uploads favor.json, model.safetensors, lora/ and README.md (the card), but neither the optimiser's
state nor predictions. favor.json holds the command line and paths of this machine: read it first.

  hf auth login
  python -m tools.share push runs/7b/best user/name --private
  python -c 'import favor; favor.Favor.from_pretrained("user/name")'""")
    hub_group = new.add_argument_group("Hub")
    hub_group.add_argument("repo", metavar="user/name",
                           help="name of the Hub repository, which is created if it is missing")
    hub_group.add_argument("--private", action="store_true",
                           help="create a private repository, which only its owner sees")
    new, model = command("merge", "merge LoRA into the LLM and write it as a folder", """\
Writes the LLM with LoRA merged into it as a model in the Hub's layout, with tokenizer and our
prompt as chat template: for text alone, without the audio-visual parts.  On the CPU, one shard at
a time.

  python -m tools.share merge runs/7b/best vicuna-favor && vllm serve vicuna-favor""")
    model.add_argument("--llm", metavar="SOURCE", help="folder or Hub repository of the LLM "
                       "(default: the one in favor.json)")
    output = new.add_argument_group("output")
    output.add_argument("out", metavar="OUT", help="new or empty folder for the merged LLM")
    output.add_argument("--dtype", choices=DTYPES, default=DTYPES[0],
                        help="number format of the written weights (default: %(default)s)")
    output.add_argument("--shard-gb", type=float, default=5, metavar="GB",
                        help="size of the largest file in GB (default: 5)")
    return parser


def main(argv=None):
    """Runs one of the three commands; a failure ends the program with a message of one line."""
    args = arguments().parse_args(argv)
    try:
        if args.command == "card":
            print(model_card(args.run, args.repo), end="")
        elif args.command == "push":
            push(args.run, args.repo, args.private)
            print(f"https://huggingface.co/{args.repo}")
        else:
            out = merge(args.run, args.out, args.dtype, args.shard_gb, args.llm)
            size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            print(f"{out}: {size / 1e9:.2f} GB, for AutoModelForCausalLM and engines")
    except (OSError, ValueError) as error:
        sys.exit(f"{COMMAND}: {error}")


if __name__ == "__main__":
    main()
