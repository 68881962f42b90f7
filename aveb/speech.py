"""The two AVEB tasks that have no data set of their own: isqa and avm.  Paper Sec. 4.1.

     python -m aveb.speech isqa --textvqa textvqa-val.jsonl --gqa gqa-testdev_balanced.jsonl \\
         --out aveb                                              spoken by espeak-ng, or flite
     python -m aveb.speech isqa --gqa gqa-testdev_balanced.jsonl --out aveb \\
         --voice lessac.onnx amy.onnx ryan.onnx libritts.onnx:7  spoken by piper with these voices
     python -m aveb.speech avm --vggss vggss-test.jsonl --spokencoco spokencoco-val.jsonl --out aveb

isqa: image + question --text to speech--> image + wav (16 kHz, mono) in <out>/isqa/, isqa.jsonl.
     The same --n and --seed as in python -m aveb subset speak the very questions of ocr and vqa.
     The paper used a commercial system: the protocol is the same, the numbers are not comparable.
avm:  half of the pictures keep their own sound ("Yes"), half get one from the same data set ("No"),
     never of the same record, file or class; avm.jsonl.

The manifests are those of python -m aveb prepare; a run that was cut off goes on with the wavs that
are missing.
Public: make_isqa, make_avm, find_engine, ENGINES."""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aveb.prepare import ids_hash, subset
from aveb.tasks import METRICS
from data import Record, read_manifest, write_manifest
from runtime import cli
from runtime.cli import Progress
from runtime.media import read_audio, write_wav

ISQA_PROMPT = "Answer the question in the audio about the image."
AVM_PROMPTS = {  # those of the authors' later release
    "spokencoco": ("Is the audio related to the image?", "Is the audio describing the image?",
                   "Are the audio and the image about the same thing?"),
    "vggss": ("Is the audio compatible with the video?",)}
SPEAKING_SECONDS = 120            # a question takes a second, piper first loads its voice


def chance(seed, *names):
    """A number from 0 to 1, always the same for the same seed and names."""
    digest = hashlib.sha256("\n".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2 ** 64


def drawn(records, n, seed):
    """The records of prepare.subset, sorted by id."""
    return sorted(subset(records, n, seed), key=lambda r: r.id)


# ---------------------------------------- text to speech

@dataclass(frozen=True)
class Engine:
    """A program.  command(voice, text file, wav file) -> its arguments; the text is on its standard
    input, too, so that no question is ever taken for an option."""
    voices: tuple
    command: object
    remedy: str


def _piper(voice, text, wav):
    model, speaker = voice.rsplit(":", 1) if ".onnx:" in voice else (voice, "")
    return ["piper", "--model", model, *(["--speaker", speaker] * bool(speaker)),
            "--output_file", wav]


ENGINES = {
    "piper": Engine((), _piper, "pip install piper-tts, and name four or more downloaded voices: "
                    "--voice a.onnx b.onnx:3 (3: its speaker) ..."),
    "espeak-ng": Engine(
        ("en-us", "en-us+f2", "en-gb-x-rp+m5", "en-gb-x-rp+f4", "en-gb-scotland+m1", "en-us+f5",
         "en-us+m3", "en-029+m2"),                     # en-gb+f2, +f4, +m7 ... sound all the same
        lambda voice, text, wav: ["espeak-ng", "-v", voice, "-s", "155", "--stdin", "-w", wav],
        "apt install espeak-ng"),
    "flite": Engine(
        ("slt", "rms", "awb", "kal16"),
        lambda voice, text, wav: ["flite", "-voice", voice, "-f", text, "-o", wav],
        "apt install flite")}


def find_engine(name="", voices=()):
    """-> (name, voices): the given engine, or the first that is installed: piper when there are
    voices for it (.onnx), espeak-ng, flite.  SystemExit names what to install."""
    if name and name not in ENGINES:
        raise SystemExit(f"--engine {name}; wanted {', '.join(ENGINES)}")
    wanted = [name] if name else ["piper"] if ".onnx" in "".join(voices) else ["espeak-ng", "flite"]
    if not (found := next((n for n in wanted if shutil.which(n)), "")):
        ways = "; or ".join(ENGINES[n].remedy for n in ([name] if name else ENGINES))
        raise SystemExit(f"no text to speech: {' and '.join(wanted)} not found on PATH; {ways}")
    voices = tuple(voices) or ENGINES[found].voices
    if len(set(voices)) < 4:
        raise SystemExit(f"{found}: {len(set(voices))} voices; the questions want at least four "
                         f"different ones: --voice ... ({ENGINES[found].remedy})")
    return found, voices


def spoken(text):
    """The question as it is to be read out: one line, no brackets (espeak-ng takes [[ ]] for
    phonemes), long words in capitals in small letters (else they would be spelt)."""
    text = " ".join(re.sub(r"[][<>{}|\\^~*_#]", " ", text).split())
    return re.sub(r"\b[A-Z]*[AEIOUY][A-Z]*\b", lambda m: m[0].lower() if len(m[0]) > 3 or
                  text.isupper() else m[0], text)


def speak(engine, voice, text, path):
    """Writes `text` as 16 kHz mono wav, in one piece. ValueError with the program's own words."""
    with tempfile.TemporaryDirectory() as folder:
        written, spoken = Path(folder) / "text.txt", Path(folder) / "speech.wav"
        written.write_text(text + "\n", encoding="utf-8")
        command = ENGINES[engine].command(voice, str(written), str(spoken))
        try:
            done = subprocess.run(command, input=(text + "\n").encode(), capture_output=True,
                                  timeout=SPEAKING_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"{engine} with voice {voice}: {error}") from None
        if done.returncode or not spoken.exists():
            reason = done.stderr.decode(errors="replace").strip().split("\n")[-1]
            raise ValueError(f"{engine} with voice {voice} failed ({done.returncode}): {reason}")
        audio = read_audio(spoken)
        if not audio.abs().max() > 0.01:
            raise ValueError(f"{engine} with voice {voice} is silent; leave it out (--voice)")
        write_wav(path, audio)


# ---------------------------------------- isqa

def isqa_record(source, record, k, engine, voices, folder):
    """Question k of a source -> its isqa record, whose wav may still be to make.  The wav's name
    holds the text and how it is spoken, so that a finished one is never taken for another."""
    if not record.image or not record.prompt.strip() or record.target is None and not record.refs:
        raise ValueError(f"{record.id}: has no image, question or answer; wanted all three")
    voice, text = voices[k % len(voices)], spoken(record.prompt)
    name = hashlib.sha256("\n".join((engine, voice, text)).encode()).hexdigest()[:16]
    return Record(f"isqa-{source}-{record.id}", "isqa", ISQA_PROMPT, record.target,
                  image=record.image, audio=str(folder / f"{source}-{name}.wav"), refs=record.refs,
                  meta=record.meta | {"metrics": list(METRICS["isqa"]), "type": source,
                                      "source": source, "question_id": record.id,
                                      "question_text": record.prompt, "spoken_text": text,
                                      "voice": voice, "engine": engine})


def make_isqa(sources, out, n=1000, seed=0, engine="", voices=(), log=print):
    """sources {"textvqa" or "gqa": records} -> the records of <out>/isqa.jsonl, n per source.
    Questions that could not be spoken are left out and reported."""
    engine, voices = find_engine(engine, voices)
    folder = Path(out) / "isqa"
    folder.mkdir(parents=True, exist_ok=True)
    records = [isqa_record(source, r, k, engine, voices, folder) for source, found in
               sources.items() for k, r in enumerate(drawn(found, n, seed))]
    texts = {r.audio: (r.meta["voice"], r.meta["spoken_text"]) for r in records}
    todo = [path for path in texts if not Path(path).exists()]
    log(f"isqa: {len(records)} questions by {engine}, {len(voices)} voices; "
        f"{len(texts) - len(todo)} of {len(texts)} wavs are there")
    failed = _speak_all(engine, {path: texts[path] for path in todo})
    records = [r for r in records if r.audio not in failed]
    if failed:
        log(f"{len(failed)} could not be spoken, the first: {next(iter(failed.values()))}")
    if not records:
        raise SystemExit("isqa: nothing could be spoken; the reason stands above")
    return _written(Path(out) / "isqa.jsonl", records, log)


def _speak_all(engine, texts):
    """{wav: (voice, text)} -> {wav: why it could not be made}, on all cores."""
    failed = {}

    def one(path):
        try:
            speak(engine, *texts[path], path)
        except ValueError as error:
            failed[path] = str(error)

    pool = ThreadPoolExecutor(cli.cores())      # each waits for its program
    try:
        with Progress("speaking", len(texts), "question") as progress:
            for _ in pool.map(one, texts):
                progress.add()
    finally:                                          # Ctrl-C: not the whole queue first
        pool.shutdown(cancel_futures=True)
    return failed


def _written(path, records, log):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, records)
    log(f"{path}: {len(records)} records, ids {ids_hash(records)}")
    return records


# ---------------------------------------- avm

@dataclass(frozen=True)
class Pair:
    """What a record shows and sounds like, and of which class it is ("" where it has none)."""
    record: Record
    seen: str
    heard: str
    label: str

    def clashes(self, other):
        """Whether the other's sound could be right here, too."""
        return (self.record.id == other.record.id or self.seen == other.seen or
                self.heard == other.heard or (self.label != "" and self.label == other.label))


def _pair(source, record):
    seen, heard = record.video or record.image, record.audio or record.video
    label = record.meta.get("label") or ""
    if not seen or not heard or source == "vggss" and not label:
        raise ValueError(f"{record.id}: {source} wants a picture, a sound"
                         + (' and the class in meta["label"]' if source == "vggss" else ""))
    if record.start is not None or record.end is not None:
        raise ValueError(f"{record.id}: has start or end, which would cut the other clip's sound, "
                         "too; cut the file itself and drop them")
    return Pair(record, seen, heard, " ".join(str(label).lower().split()))


def avm_records(source, records, n, seed):
    """-> n records of task avm, half of them with their own sound."""
    own = [r for r in records if r.task != "avm" or r.target != "No"]   # paired before
    pairs = [_pair(source, record) for record in drawn(own, n, seed)]
    by_chance = sorted(pairs, key=lambda p: chance(seed, "match", p.record.id))
    matching = {p.record.id for p in by_chance[:len(pairs) // 2]}
    made = []
    for pair in pairs:
        name, match = pair.record.id, pair.record.id in matching
        others = [pair] if match else [other for other in pairs if not pair.clashes(other)]
        if not others:
            raise ValueError(f"{name}: {source} has no sound of another file and class; "
                             "wanted more records (--n, a larger manifest)")
        other = min(others, key=lambda p: chance(seed, "sound", name, p.record.id))
        prompts, answer = AVM_PROMPTS[source], "Yes" if match else "No"
        made.append(Record(
            f"avm-{source}-{name}+{other.record.id}", "avm",
            prompts[int(chance(seed, "prompt", name) * len(prompts))], answer,
            image=pair.record.image, video=pair.record.video, audio=other.heard, refs=(answer,),
            meta={"type": "video" if pair.record.video else "image", "source": source,
                  "chance": 0.5, "metrics": list(METRICS["avm"]), "seen": name,
                  "heard": other.record.id, "label": pair.label, "heard_label": other.label}))
    return made


def make_avm(sources, out, n=500, seed=0, log=print):
    """sources {"vggss" or "spokencoco": records} -> the records of <out>/avm.jsonl, n per
    source."""
    records = [r for source, all_ in sources.items() for r in avm_records(source, all_, n, seed)]
    yes = sum(r.target == "Yes" for r in records)
    log(f"avm: {len(records)} pairs, {yes} match, {len(records) - yes} do not")
    return _written(Path(out) / "avm.jsonl", records, log)


def arguments():
    """The parser of the command line."""
    formatter = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("python -m aveb.speech", **formatter,
                                     description=cli.description(__doc__))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, sources, n, text in (
            ("isqa", ("textvqa", "gqa"), 1000, "speak the questions about pictures"),
            ("avm", tuple(AVM_PROMPTS), 500, "pair pictures with their own and with other sounds")):
        new = commands.add_parser(command, help=text, **formatter,
                                  description=f"{text[0].upper()}{text[1:]}.")
        add = new.add_argument_group("data").add_argument
        for name in sources:
            add(f"--{name}", metavar="FILE", help=f"manifest (.jsonl) of {name}; at "
                f"least one of --{sources[0]} and --{sources[1]} is needed")
        add("--out", required=True, metavar="FOLDER", help="folder of the new manifest"
            + " and the wav files" * (command == "isqa"))
        add("--n", type=int, default=n, metavar="RECORDS",
            help="number of records to sample from each of these manifests (default: %(default)s)")
        add("--seed", type=int, default=0, metavar="N",
            help="seed of the sample; the same seed gives the same records (default: 0)")
        if command == "isqa":
            add = new.add_argument_group("speech").add_argument
            add("--engine", default="", choices=tuple(ENGINES),
                help="program that speaks (default: piper for .onnx voices, else espeak-ng or "
                "flite, whichever is installed)")
            add("--voice", nargs="+", default=(), metavar="VOICE",
                help="voices of that program, four or more; those of piper are .onnx files "
                "(default: voices of espeak-ng or flite)")
    return parser


def main(argv=None):
    """Runs one of the two commands; ends the program if its data or engine is missing."""
    parser = arguments()
    args = parser.parse_args(argv)
    names = ("textvqa", "gqa") if args.command == "isqa" else tuple(AVM_PROMPTS)
    try:
        sources = {n: read_manifest(getattr(args, n)) for n in names if getattr(args, n)}
        if not sources:
            parser.error(f"{args.command} wants --{names[0]}, --{names[1]}, or both")
        if args.command == "isqa":
            make_isqa(sources, args.out, args.n, args.seed, args.engine, args.voice)
        else:
            make_avm(sources, args.out, args.n, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
