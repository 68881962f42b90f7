"""Answers a question about any video, sound or image file.

     python demo.py clip.mp4 "What happens after the beep?"
     python demo.py photo.jpg "What colour is the ball?" --audio question.wav
     python demo.py clip.mp4 "Describe the video in detail." --start 10 --end 40
     python demo.py clip.mp4 "Which sounds are heard?" --checkpoint runs/7b/best
     python demo.py clip.mp4 "Hello?" --model 7b --random-init      does the full size run here?"""


import argparse
import sys
import time
from pathlib import Path

import torch

from baselines import load_system
from data import clip_from_path
from favor import preset
from runtime import distributed, hub
from runtime.checkpoint import find_checkpoint
from tools import memory as sizes


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", help="a video, sound or image file")
    parser.add_argument("question")
    parser.add_argument("--audio", help="sound to go with an image or instead of a video's own")
    parser.add_argument("--start", type=float, help="seconds: look at a part of the file only")
    parser.add_argument("--end", type=float, help="seconds")
    parser.add_argument("--model", default="tiny", help="preset: tiny, 7b, 13b")
    parser.add_argument("--checkpoint", default="",
                        help="default: runs/<model>/best, for tiny else the committed one")
    parser.add_argument("--whisper", help="where Whisper is, if not where the checkpoint says")
    parser.add_argument("--instructblip", help="the same for InstructBLIP's ViT and Q-Former")
    parser.add_argument("--llm", help="the same for the LLM")
    parser.add_argument("--dtype", default="", choices=("bfloat16", "float32"),
                        help="default: float32 for tiny on a CPU, else bfloat16")
    parser.add_argument("--merge", action=argparse.BooleanOptionalAction, default=True,
                        help="LoRA added into the LLM's own weights (default: yes)")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile for each new token, on a GPU as a CUDA graph: slow to "
                             "start, for long answers")
    parser.add_argument("--random-init", action="store_true",
                        help="full size with random weights: nothing to download, nonsense to read")
    parser.add_argument("--offline", action="store_true", help="do not ask the Hub")
    parser.add_argument("--mask", choices=("audio", "visual", "both"),
                        help="answer without this modality")
    parser.add_argument("--beams", type=int, default=0, help="beam search instead of streaming")
    parser.add_argument("--max-new-tokens", type=int, default=0, help="end the answer after these")
    args = parser.parse_args(argv)
    if args.checkpoint:
        find_checkpoint(args.checkpoint)
        args.model = hub.read_json(Path(args.checkpoint) / "favor.json").get("train", {}).get(
            "model", args.model)
    sources = {name: getattr(args, name) for name in ("whisper", "instructblip", "llm")
               if getattr(args, name)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hub.offline(args.offline)
    dtype = distributed.precision(args.dtype, args.model, device)[0]
    try:
        model, checkpoint = load_system(
            "favor", preset(args.model, **sources), args.model, args.checkpoint, sources, dtype,
            device, args.merge, args.compile, sizes.random_part if args.random_init else None)
        clip = clip_from_path(args.clip, args.audio, args.start, args.end, **model.clip_options())
    except (FileNotFoundError, ValueError) as error:        # a MediaError is a ValueError
        sys.exit(str(error))
    frames = 0 if clip.frames is None else len(clip.frames)
    sound = "no sound" if clip.audio is None else f"{len(clip.audio) / 16000:.2f} s of sound"
    picture = "an image" if clip.is_image else f"{frames} frames"
    print(f"[{checkpoint or 'random weights'}: {picture}, {sound}]", file=sys.stderr)
    settings = {"max_new_tokens": args.max_new_tokens} if args.max_new_tokens else {}
    started = time.time()
    if args.beams or model.config.beams > 1:
        print(model.answer(clip, args.question, mask=args.mask,
                           num_beams=args.beams or model.config.beams, **settings))
    else:
        model.answer(clip, args.question, mask=args.mask, **settings,
                     stream=lambda text: print(text, end="", flush=True))
        print()
    if args.random_init:
        peak = sizes.in_words(sizes.peak_memory(device))
        print(f"[{time.time() - started:.1f} s, peak memory {peak}]", file=sys.stderr)


if __name__ == "__main__":
    main()
