"""Vicuna-7B v0 as Video-LLaMA asks it: the prompt to the space, sampling, and its folder.

     turns, what there is to hear and see --prompt_pieces--> texts, between which the vectors stand
     embeddings (L,D) of each question --generate--> ids of its answer, sampled or greedy

   Public: prompt_pieces, frame_sentence, generate, pick, check_llm, WANTED_LLM."""

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from llama import KVCache, LlamaConfig
from runtime import hub

TOP_K, TOP_P = 50, 0.9
WANTED_LLM = (
    "wanted Vicuna-7B v0 in a folder: LLaMA-1 7B with lmsys/vicuna-7b-delta-v0 added to it by "
    "fastchat.model.apply_delta of FastChat 0.1.10; the sum may not be published, so make it "
    "yourself (docs/benchmark.md) and pass the folder with --llm. Vicuna v1.1, which InstructBLIP "
    "contains, is the wrong one: it was tuned to end a turn with </s>, v0 with ###, and "
    "Video-LLaMA's files were trained for v0")


SYSTEM = ("You are able to understand the visual content that the user provides. Follow the "
          "instructions carefully and explain your answers in detail.")        # images only
# before the first turn, behind a question, before a later turn; llama_2: the release on LLaMA-2
TURNS = {"vicuna": ("{}###Human: ", "###Assistant:", "###Human: "),
         "llama_2": ("[INST] <<SYS>>\n{}\n<</SYS>>\n\n", " [/INST]", " </s><s>[INST] ")}
MEDIA = {"both": ("Close your eyes, open your ears and you imagine only based on the sound that: ",
                  "." + " " * 17 + "Close your ears, open your eyes and you see that <Video>",
                  "</Video>." + " " * 18 + "Now answer my question based on what you have just "
                  "seen and heard. "),
         "video": ("<Video>", "</Video> "), "image": ("<Image>", "</Image>  "), "text": ("",)}


def frame_sentence(times):
    """Seconds of the frames -> what a prompt without sound says of them."""
    times = ", ".join(str(round(time, 1)) for time in times)
    return f"The video contains {times.count(',') + 1} frames sampled at {times} seconds.  "


def prompt_pieces(turns, kind, sentence="", style="vicuna"):
    """Turns of a dialogue, (question, answer) each, the last answer None -> the texts between which
    the vectors stand: kind "both" has three (sound, then video), "video" and "image" two, "text"
    one.  sentence: see frame_sentence.  Every space counts; the long gaps come from the
    indentation of a string in the authors' code."""
    opening, asked, again = TURNS[style]
    *before, last = MEDIA[kind]
    (question, said), *later = turns
    text = f"{last}{sentence}{question}{asked}"
    for question, answer in later:
        text, said = f"{text} {said}{again}{question}{asked}", answer
    pieces = [*before, text]
    return [opening.format(SYSTEM if kind == "image" else "") + pieces[0], *pieces[1:]]


def generate(llm, rows, steps, ended, dice=None):
    """rows: embeddings (L,D) of each prompt -> B lists of new ids, `steps` at most.  ended(ids):
    whether an answer ends with its last id.  dice: a generator for each row, None: greedy."""
    longest = max(map(len, rows))                                        # padded on the left
    embeds = torch.stack([F.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest, device=row.device) >= longest - len(row)
                        for row in rows])
    cache, new, going = KVCache(len(rows), longest + steps), [[] for _ in rows], {*range(len(rows))}
    logits = llm(embeds=embeds, mask=mask, cache=cache, last_only=True)[:, -1].float()
    for step in range(steps):
        token = logits.argmax(-1, keepdim=True) if dice is None else (            # (B,1)
            pick(logits, torch.cat([torch.rand(1, generator=generator) for generator in dice])))
        for row in [*going]:
            new[row].append(int(token[row]))
            if ended(new[row]):
                going.remove(row)
        if not going or step + 1 == steps:
            break
        logits = llm(token, cache=cache, last_only=True)[:, -1].float()
    return new


def pick(scores, dice):
    """scores (B,vocab), dice (B,) from 0 to 1 -> ids (B,1): of the TOP_K likeliest the fewest that
    together reach TOP_P, each as often as it is likely."""
    best, order = scores.topk(min(TOP_K, scores.shape[-1]), dim=-1)
    p = best.softmax(dim=-1)                                                          # (B,K)
    p = p.masked_fill(p.cumsum(dim=-1) - p >= TOP_P, 0.0).cumsum(dim=-1)
    place = (p <= dice.to(p)[:, None] * p[:, -1:]).sum(dim=-1, keepdim=True)
    return order.gather(1, place.clamp(max=p.shape[-1] - 1))


def check_llm(source):
    """FileNotFoundError or ValueError, with what is wanted, if `source` cannot be Vicuna v0; a
    warning if its vocabulary is another one."""
    source = hub.local_source(source)
    if not isinstance(source, hub.Repo) and not Path(source).expanduser().is_dir() and (
            str(source).count("/") != 1):
        raise FileNotFoundError(f"{source}: no such folder; {WANTED_LLM}")
    root = hub.folder(source, tensors=())
    if hub.read_object(root / "config.json").get("model_type", "llama") == "instructblip":
        raise ValueError(f"{root}: an InstructBLIP; {WANTED_LLM}")
    config = LlamaConfig.from_folder(root)
    if hub.local_folder(source):                 # .bin files only, or a shard that is missing
        hub.open_tensors(root)
    if config.width == 4096 and (config.vocab_size, config.eps) != (32001, 1e-6):
        warnings.warn(f"{root}: {config.vocab_size} rows of embeddings and eps {config.eps:g}, but "
                      "a merged Vicuna v0 has 32001 and 1e-06, so this may be a later one; "
                      f"{WANTED_LLM}. Report its scores as those of another LLM", stacklevel=2)
