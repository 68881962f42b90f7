"""Answers a question about any video, sound or image file.

     python demo.py clip.mp4 "What happens after the beep?"
     python demo.py photo.jpg "What colour is the ball?" --audio question.wav
     python demo.py clip.mp4 "Describe the video in detail." --start 10 --end 40
     python demo.py clip.mp4 "Which sounds are heard?" --checkpoint runs/7b/best"""

import cli

cli.quiet_threads()

import argparse  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402

from data import MediaError, clip_from_path  # noqa: E402
from eval import find_checkpoint  # noqa: E402
from favor import Favor  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", help="a video, sound or image file")
    parser.add_argument("question")
    parser.add_argument("--audio", help="sound to go with an image or instead of a video's own")
    parser.add_argument("--start", type=float, help="seconds: look at a part of the file only")
    parser.add_argument("--end", type=float, help="seconds")
    parser.add_argument("--checkpoint", default="",
                        help="default: runs/tiny/best, else the committed tiny/favor")
    parser.add_argument("--mask", choices=("audio", "visual", "both"),
                        help="answer without this modality")
    parser.add_argument("--beams", type=int, default=0, help="beam search instead of streaming")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = find_checkpoint(args.checkpoint)
    model = Favor.from_pretrained(checkpoint, torch.bfloat16 if device == "cuda" else None, device)
    try:
        clip = clip_from_path(args.clip, args.audio, args.start, args.end, fps=model.config.fps,
                              size=model.visual.image_size, frame_times=model.config.frame_times)
    except MediaError as error:
        sys.exit(str(error))
    frames = 0 if clip.frames is None else len(clip.frames)
    sound = "no sound" if clip.audio is None else f"{len(clip.audio) / 16000:.2f} s of sound"
    print(f"[{checkpoint}: {'an image' if clip.is_image else f'{frames} frames'}, {sound}]",
          file=sys.stderr)
    if args.beams or model.config.beams > 1:
        print(model.answer(clip, args.question, mask=args.mask,
                           num_beams=args.beams or model.config.beams))
        return
    model.answer(clip, args.question, mask=args.mask,
                 stream=lambda text: print(text, end="", flush=True))
    print()


if __name__ == "__main__":
    main()
