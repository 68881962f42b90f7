"""Damages files at random and opens them as the programs do: by hand, or a few by test_fuzz.py.

     python tests/fuzz.py --media 2000 --checkpoints 200        about a minute

Media: small files of every format in FORMATS, mutated, then data.load_or_skip.  Checkpoints: the
committed tiny one with one mutated file (weights, config, tokenizer), then load_system and one
answer.  Each process opens files until one ends badly:
     traceback   an error that is not the sentence which the programs print (EXPECTED)
     crash       the process is gone
     hang        no result after LIMIT_S seconds
     memory      the process needs more than LIMIT_MB MiB
The files that end badly are kept in --keep."""

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT_S, LIMIT_MB = 60, 2048
EXPECTED = (FileNotFoundError, ValueError, SystemExit)      # what eval.py prints as one line

# suffix -> (video codec, sound codec, pixel format); pictures by PIL: suffix -> its options
FORMATS = {"mp4": ("libx264", "aac", "yuv420p"), "mov": ("mpeg4", "aac", "yuv420p"),
           "mkv": ("libx264", "libopus", "yuv420p"), "webm": ("libvpx", "libopus", "yuv420p"),
           "avi": ("mpeg4", "libmp3lame", "yuv420p"), "ts": ("libx264", "aac", "yuv420p"),
           "flv": ("libx264", "aac", "yuv420p"), "mpg": ("mpeg2video", "mp2", "yuv420p"),
           "mp3": (None, "libmp3lame", None), "wav": (None, "pcm_s16le", None),
           "flac": (None, "flac", None), "ogg": (None, "flac", None),
           "m4a": (None, "aac", None), "opus": (None, "libopus", None),
           "aiff": (None, "pcm_s16be", None)}
PICTURES = {"jpg": {}, "png": {}, "webp": {}, "bmp": {}, "tiff": {}, "avif": {},
            "gif": {"animated": True}, "apng": {"animated": True}}


# ---------------------------------------------------------------- whole files
def make_media(folder):
    """One small file of every format -> list of paths."""
    import av
    import numpy as np
    from media_files import picture_frames, sound_frames
    from PIL import Image
    rng, paths = np.random.default_rng(0), []
    for suffix, (picture, sound, pixels) in FORMATS.items():
        path = folder / f"clip.{suffix}"
        rate = 48000 if sound in ("libopus", "mp2") else 44100
        with av.open(str(path), "w") as container:
            streams = []
            if picture:
                video = container.add_stream(picture, rate=25, options={"threads": "1", "g": "12"})
                video.width, video.height, video.pix_fmt = 80, 32, pixels
                video.codec_context.time_base = Fraction(1, 25)
                streams.append((video, picture_frames(range(50), Fraction(1, 25))))
            audio = container.add_stream(sound, rate=rate, layout="stereo")
            noise = rng.uniform(-0.5, 0.5, (2, 2 * rate)).astype(np.float32)
            streams.append((audio, sound_frames(noise, rate, "stereo", 0)))
            for stream, frames in streams:
                for frame in [*frames, None]:
                    container.mux(stream.encode(frame))
        paths.append(path)
    pixels = rng.integers(0, 256, (3, 45, 63, 3), np.uint8)
    for suffix, options in PICTURES.items():
        first, *rest = [Image.fromarray(p).resize((90, 64)) for p in pixels]
        path = folder / f"picture.{suffix}"
        first.save(path, **({"save_all": True, "append_images": rest}
                            if options.get("animated") else {}),
                   **({"format": "PNG"} if suffix == "apng" else {}))
        paths.append(path)
    return paths


# ---------------------------------------------------------------- damage
def damage_bytes(data, rng):
    """bytes -> the same with one to four random changes, half of them near the beginning."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(max(1, min(len(data), rng.choice((512, len(data))))))
        size = rng.choice((1, 2, 4, 8, 100, 1000))
        kind = rng.choice(("flip", "fill", "cut", "delete", "repeat", "noise", "swap"))
        if kind == "flip" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "fill":
            data[at:at + size] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) * size
        elif kind == "cut":
            del data[max(at, 16):]
        elif kind == "delete":
            del data[at:at + size]
        elif kind == "repeat":
            data[at:at] = data[at:at + size]
        elif kind == "noise":
            data[at:at + size] = rng.randbytes(size)
        else:
            other = rng.randrange(max(1, len(data)))
            data[at:at + size], data[other:other + size] = (
                data[other:other + size], data[at:at + size])
    return bytes(data)


STRANGE = (None, True, -1, 0, 10 ** 6, 10 ** 400, 0.5, float("nan"), float("inf"), "", "x", [], {},
           [1, 2], {"a": 1}, "\ud800", "../..", "/dev/null")


def damage_json(text, rng):
    """JSON text -> the same with a value replaced, a key removed or added; now and then no JSON."""
    if rng.random() < 0.15:
        return rng.choice((b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, text[:-9]))
    value = json.loads(text)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            place = place[key]
            continue
        break
    change = rng.choice(("replace", "replace", "replace", "remove", "add"))
    if change == "remove":
        del place[key]
    elif change == "add" and isinstance(place, dict):
        place[rng.choice(("unknown", "rope_scaling", "quantization_config", "auto_map"))] = (
            rng.choice(STRANGE))
    else:
        place[key] = rng.choice(STRANGE)
    return json.dumps(value).encode()


def damaged_media(paths, n, folder, rng):
    for i in range(n):
        path = paths[i % len(paths)]
        new = folder / f"{i:05}{path.suffix}"
        new.write_bytes(damage_bytes(path.read_bytes(), rng))
        yield "media", new


def damaged_checkpoints(n, folder, rng):
    """Copies of the committed parts, which link to the whole files and hold one damaged one."""
    weights = ROOT / "miniature" / "weights"
    parts = ("favor", "whisper", "instructblip", "llama")
    files = [path.relative_to(weights) for part in parts for path in (weights / part).rglob("*")
             if path.is_file()]
    for i in range(n):
        new, name = folder / f"{i:05}", files[i % len(files)]
        for part in parts:
            shutil.copytree(weights / part, new / part, copy_function=link)
        data = (new / name).read_bytes()
        (new / name).unlink()
        (new / name).write_bytes(damage_json(data, rng) if name.suffix == ".json"
                                 else damage_bytes(data, rng))
        yield "checkpoint", new


def link(source, target):
    Path(target).symlink_to(source)


# ---------------------------------------------------------------- opening
def open_media(path):
    """-> "read" or "skipped", as a training run would."""
    from data import Record, load_or_skip
    skipped = []
    kind = ("image" if path.suffix[1:] in PICTURES else
            "video" if FORMATS[path.suffix[1:]][0] else "audio")
    record = Record(path.name, "videoqa", "?", "x", **{kind: str(path)})
    clip = load_or_skip(record, skipped, size=28, max_seconds=300.0)
    if clip is None:
        reason = skipped[0][1]
        assert reason.startswith(str(path)) and "\n" not in reason, f"the reason is {reason!r}"
        return "skipped"
    if clip.audio is not None:
        assert clip.audio.isfinite().all() and clip.audio.abs().max() <= 1
    return "read"


def open_checkpoint(folder):
    """-> "read" or "refused", as demo.py would."""
    import torch

    from baselines.systems import load_system
    from data import Clip
    from favor import preset
    sources = {part: str(folder / part) for part in ("whisper", "visual", "llm")}
    sources |= {"visual": str(folder / "instructblip"), "llm": str(folder / "llama")}
    try:
        model, _ = load_system("favor", preset("tiny"), checkpoint=str(folder / "favor"),
                               sources=sources)
    except EXPECTED as error:
        text = str(error)
        assert text.count("\n") == 0 and (str(folder) in text), f"the message is {text!r}"
        return "refused"
    clip = Clip(audio=torch.zeros(16000))
    model.answer(clip, "What is heard?", max_new_tokens=2)
    return "read"


def work(connection):
    """A process that opens what it is sent and sends back the result."""
    import torch
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while (job := connection.recv()) is not None:
        kind, path = job
        try:
            result, text = (open_media if kind == "media" else open_checkpoint)(path), ""
        except BaseException:
            result, text = "traceback", traceback.format_exc()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        connection.send((result, text, peak))


class Worker:
    """A process of `work`, started anew after a bad end."""

    def __init__(self):
        self.process = None

    def open(self, job):
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=work, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.connection.send(job)
        try:
            result = (self.connection.recv() if self.connection.poll(LIMIT_S)
                      else ("hang", f"nothing for {LIMIT_S} s", 0))
        except EOFError:
            result = ("crash", "the process is gone", 0)
        if result[2] > LIMIT_MB:
            result = ("memory", f"{result[2]} MiB", result[2])
        if result[0] in ("hang", "crash", "memory"):
            self.process.kill()
            self.process = None
        return result

    def close(self):
        if self.process is not None:
            self.connection.send(None)
            self.process.join()


BAD = ("traceback", "crash", "hang", "memory")


def run(media, checkpoints, seed=0, keep="", log=print):
    """Opens so many damaged files -> ({kind: Counter of results}, [(path, result, text)] of those
    that ended badly, peak MiB)."""
    rng, counts, bad, peak = random.Random(seed), {}, [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "whole").mkdir()
        whole = make_media(folder / "whole")
        worker = Worker()
        for job in [("media", path) for path in whole]:             # a whole file is read
            result = worker.open(job)
            assert result[0] == "read", (job, result)
        jobs = [*damaged_media(whole, media, folder, rng),
                *damaged_checkpoints(checkpoints, folder, rng)]
        started = time.time()
        for done, (kind, path) in enumerate(jobs, 1):
            result, text, size = worker.open((kind, path))
            counts.setdefault(kind, Counter())[result] += 1
            peak = max(peak, size)
            if result in BAD:
                bad.append((path.name, result, text))
                log(f"{path.name}: {result}: {text}")
                if keep:
                    Path(keep).mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if path.is_dir() else shutil.copy)(
                        path, Path(keep) / path.name)
            if done % 200 == 0:
                log(f"{done} of {len(jobs)}, {time.time() - started:.0f} s, {len(bad)} bad")
        worker.close()
    return counts, bad, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--media", type=int, default=2000, help="mutated media files")
    parser.add_argument("--checkpoints", type=int, default=200, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the damage")
    parser.add_argument("--keep", default="", metavar="FOLDER", help="for files that end badly")
    args = parser.parse_args()
    counts, bad, peak = run(args.media, args.checkpoints, args.seed, args.keep)
    for kind, results in counts.items():
        print(f"{kind}: {results.total()}, "
              + ", ".join(f"{n} {result}" for result, n in results.most_common()))
    print(f"formats: {len(FORMATS) + len(PICTURES)}; most memory: {peak} MiB; bad: {len(bad)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
