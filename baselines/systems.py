"""The systems that the benchmark compares: FAVOR and the paper's three baselines.

     load_system("instructblip", preset("13b")) --> the model in eval mode, its checkpoint's folder
   Public: SYSTEMS, system_preset, load_system."""

import lora
from baselines.instructblip import InstructBlip
from baselines.video_llama import VideoLlama
from baselines.whisper import WhisperBaseline
from favor import SOURCES, Favor, preset
from runtime.checkpoint import find_checkpoint

SYSTEMS = {"favor": Favor, "instructblip": InstructBlip, "whisper": WhisperBaseline,
           "video-llama": VideoLlama}


def system_preset(system, model, sources):
    """The FavorConfig of a preset, with the parts that the system names for 7b, if it does so, and
    then with `sources`.  ValueError where such a system has no parts for the preset."""
    places = getattr(SYSTEMS[system], "places", {})
    if places and model != "7b" and set(SOURCES) - set(sources):
        raise ValueError(f"--system {system} has parts for --model 7b; for --model {model} pass "
                         "--visual, --video-llama and --llm")
    return preset(model, **(places if model == "7b" else {}) | sources)


def load_system(system, config, model="tiny", checkpoint="", sources=None, dtype=None, device=None,
                merge=True, compile=False, load=None):
    """Loads one of SYSTEMS for answering -> (model in eval mode, folder of its checkpoint or None).

    config: a FavorConfig, for a model without a checkpoint.  model: the preset's name, by which the
    newest checkpoint is found.  sources: {"whisper", "instructblip" or "llm": folder or Hub repo}
    of frozen parts that have moved.  merge: add LoRA into the LLM's weights.  compile:
    torch.compile for new tokens.  load: makes the parts instead of a checkpoint, such as
    tools.memory.random_part.  Raises SystemExit without a checkpoint; FileNotFoundError or
    ValueError if a part is missing or does not fit."""
    kind, folder = SYSTEMS[system], None
    if load is not None:
        built = kind.from_config(config, dtype, device, load=load).eval()
    elif system != "favor" and not checkpoint:            # a baseline needs public weights only
        built = kind.from_config(config, dtype, device)
    else:
        folder = find_checkpoint(checkpoint, model)
        built = kind.from_pretrained(folder, dtype, device, **(sources or {}))
    if merge:
        lora.merge(built, reversible=False)
    if compile and hasattr(built, "llm"):
        built.llm.compiled = True
    return built, folder
