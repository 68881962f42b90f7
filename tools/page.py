"""A page in the browser to try a checkpoint: python demo.py --web (needs the extra `demo`).

     the visitor's clip and question --Model.answer, on one thread--> status, pieces of the answer
                                     --picture.draw--> what the queries look at, as a PNG in HTML
Gradio serves it, on this computer only: nothing is uploaded, no share link, no fonts or scripts of
other hosts.  One question is answered at a time, in the order of asking.  The files of a visit lie
in a private temporary folder, and go when its browser tab is closed.

Public: Page, missing."""

import base64
import contextlib
import gc
import html
import importlib.util
import io
import json
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from data import Clip, Sample, clip_from_path
from tools import live, picture

EXAMPLE = Path(__file__).parent.parent / "miniature" / "demo.json"
MOST_BYTES = 200 * 2**20                    # of an upload
MOST_VISITS = 50                            # whose last clip and picture are kept in memory
FORGET = (600, 6 * 3600)                    # s; each 10 min, files older than 6 h are removed, too
MOST_WAITING = 20                           # visitors; the next one is asked to come back
SUGGESTIONS = ("Describe what is seen and heard in detail.", "What is the source of the sound?",
               "Transcribe the speech into text.")
MASKS = {(False, False): None, (True, False): "audio", (False, True): "visual",
         (True, True): "both"}              # (without sound, without picture): Sample.mask
VIEWS = {None: "picture and sound", "audio": "without sound", "visual": "without picture",
         "both": "without both"}
NARROW = 700                                # pixels of a window in which the picture is drawn small
PORT = 7860
# How all events of the page are handled: values as the browser sends them, for Page checks them.
RAW = {"preprocess": False, "queue": False, "show_progress": "hidden", "api_visibility": "private"}
CSS = """
.gradio-container {--layout-gap: 10px; --block-padding: 8px 12px}
.gradio-container > main {max-width: 1180px !important; margin: 0 auto !important;
  padding: 10px 16px 24px !important}
.note {color: #666; font-size: .85em; margin: 0}
#head h1 {font-size: 1.4rem; margin: 0; display: inline} #head span {color: #555; margin-left: 10px}
#video .source-selection, #still .source-selection {position: absolute; bottom: 0; left: 0;
  right: 0; height: 36px; background: #fff; z-index: 2}
#video video {object-fit: contain; padding-bottom: 36px}
.chips {gap: 6px !important; flex-wrap: wrap}
.chips button {flex: 0 1 auto; min-width: 0 !important; font-weight: 400; white-space: normal;
  background: #F1F4F8; border: 1px solid #DDE2E8}
#status {min-height: 1.5em} #status p {margin: 0}
#status .error, #picture .error {color: #B3261E; font-weight: 600}
#compare div {display: grid; grid-template-columns: max-content 1fr; gap: 1px 14px}
#compare span {color: #666}
#picture .choose {display: flex; flex-wrap: wrap; gap: 4px; align-items: center; margin: 0 0 6px}
#picture .choose button {margin: 0; font: inherit; font-size: .88em; line-height: 1.3;
  min-width: 2.2em; padding: 3px 8px; cursor: pointer; border: 1px solid #C8CCD2;
  border-radius: 6px; background: #fff; color: #222}
#picture .choose button.chosen {background: #0072B2; border-color: #0072B2; color: #fff}
#picture .html-container {padding: 0}
#picture .drawn {position: relative} #picture img {width: 100%; display: block; margin: 0}
#picture button.row {position: absolute; padding: 0; border: 0; background: transparent;
  cursor: pointer}
#picture button.row:hover {background: rgba(213, 94, 0, .25)}
footer {display: none !important}
@media (max-width: 640px) {.gradio-container > main {padding: 4px 0 20px !important}}
"""
CLICK = """element.addEventListener('click', event => {
  const button = event.target.closest('button[data-query]');
  if (button) trigger('select', {query: Number(button.dataset.query),
                                 start: Number(button.dataset.start), width: window.innerWidth});
});"""


# The clip starts to play where the live answers start.
PLAY = """watch('value', () => {
  const video = document.querySelector('#video video');
  const playing = !!element.querySelector('.playing');
  if (video && playing && !element.dataset.playing) {video.currentTime = 0; video.play()}
  element.dataset.playing = playing ? '1' : '';
});"""


def missing():
    """What to install if gradio or matplotlib, an extra, is missing; "" if both are there."""
    lacking = [name for name in ("gradio", "matplotlib") if not importlib.util.find_spec(name)]
    return f'the page needs {" and ".join(lacking)}: pip install -e ".[demo]"' if lacking else ""


@dataclass
class Visit:
    """What is kept of one open tab."""
    files: dict = field(default_factory=dict)          # name of a tab of the page: uploaded file
    read: tuple | None = None                          # path and question of the sample below
    sample: Sample | None = None                       # encoded
    clip: Clip | None = None
    notes: list = field(default_factory=list)          # what of it could not be read
    inside: picture.Inside | None = None
    answers: dict = field(default_factory=dict)        # mask: answer to the same question
    asked: bool = False                                # whether there was a question yet


class Stopped(Exception):
    """Raised inside a generation that nobody waits for any more."""


@dataclass
class Job:
    """One question on its way to the model's thread, and what comes back."""
    payload: dict                                      # the file, as the browser names it
    question: str
    mask: str | None
    live: bool
    events: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)    # (kind, value)
    stopped: threading.Event = field(default_factory=threading.Event)

    def stream(self, text):
        """Passes a piece of the answer on."""
        if self.stopped.is_set():
            raise Stopped
        self.events.put(("text", text))


class Page:
    """The page of one model.  settings: those of Favor.generate.  most_bytes: of an upload."""

    def __init__(self, model, name, settings=None, most_bytes=MOST_BYTES):
        self.model, self.name, self.settings = model, name, settings or {}
        self.most_bytes = most_bytes
        self.visits = {}                                # session of the browser tab: Visit
        self.folder = None
        # One thread for the model: answers cannot mix, and PyTorch keeps one pool of threads.
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.working = None                             # the Job that the model works on
        self.drawing = threading.Lock()
        example = json.loads(EXAMPLE.read_text("utf-8"))
        self.example = EXAMPLE.parent / example["clip"]
        self.questions = (example["question"], *SUGGESTIONS)

    # ---- visits and their files
    def visit(self, request):
        """The Visit of a request; the oldest ones are forgotten, as each holds a clip."""
        key = request.session_hash
        found = self.visits[key] = self.visits.pop(key, None) or Visit()
        while len(self.visits) > MOST_VISITS:
            self.forget(next(iter(self.visits)))
        return found

    def forget(self, key):
        """Ends a visit: what it holds in memory and on disk goes."""
        visit = self.visits.pop(key, None)
        for path in visit.files.values() if visit else ():
            self.remove(path)

    def remove(self, path):
        """Removes an upload and its folder, unless another visit shares it: gradio names folders by
        the hash of their content."""
        folder = Path(path).parent
        kept = {Path(p).parent for visit in self.visits.values() for p in visit.files.values()}
        if folder not in kept and folder.parent == self.folder:
            shutil.rmtree(folder, ignore_errors=True)

    def uploaded(self, kind, payload, request):
        """A tab of the page holds another file: the one before is removed."""
        visit, path = self.visit(request), (payload or {}).get("path")
        old = visit.files.pop(kind, None)
        if path and Path(path).resolve().is_relative_to(self.folder):
            visit.files[kind] = path
        if old and old != path:
            self.remove(old)

    def path_of(self, payload):
        """The file of a component's raw value.  ValueError for what was not uploaded here, as a
        browser may send any path."""
        path = Path((payload or {}).get("path") or "").resolve()
        if not payload:
            raise ValueError("There is no clip yet: upload or record one, or take the example.")
        if path != self.example and not path.is_relative_to(self.folder):
            raise ValueError(f"{path.name}: not a file of this visit; upload it again.")
        if not path.is_file():
            raise ValueError(f"{path.name}: it has been removed; upload it again.")
        return path

    # ---- answering
    def ask(self, kind, video, sound, still, question, no_sound, no_picture, as_it_plays, width,
            request):
        """The events of one question -> yields the page's status, answer, comparison and picture,
        all as HTML but the answer."""
        payload = {"Video": video, "Sound": sound, "Picture": still}[kind] or {}
        visit, job = self.visit(request), Job(payload, (question or "").strip(), MASKS[
            bool(no_sound), bool(no_picture)], bool(as_it_plays))
        visit.asked = True
        self.worker.submit(self.work, visit, job)
        answer, status = "", ""
        try:
            while True:
                try:
                    what, value = job.events.get(timeout=1)
                except queue.Empty:             # gradio notices here that nobody waits any more
                    yield status, answer, "", ""
                    continue
                if what == "error":
                    yield line(value, "error"), "", "", ""
                    return
                if what == "done":
                    yield line("Drawing where the queries look …"), answer, "", ""
                    yield value, answer, compared(visit.answers), self.draw(visit, width=width)
                    return
                if what == "status":
                    status = line(value, "playing" if value.startswith("Live") else "")
                else:
                    answer += value
                    if not job.events.empty():              # all pieces that are there at once
                        continue
                yield status, answer, "", ""
        finally:
            job.stopped.set()

    def work(self, visit, job):
        """Answers on the model's thread; what happens goes into the queue of the job."""
        self.working = job
        try:
            if not job.stopped.is_set():
                self.answer(visit, job)
        except Stopped:
            pass                                             # the visitor has gone
        except (OSError, ValueError) as error:               # a MediaError is a ValueError
            path = job.payload.get("path") or "no path"
            job.events.put(("error", str(error).replace(
                path, job.payload.get("orig_name") or "the clip")))
        except Exception as error:  # the page lives on; the terminal shows the whole of it
            traceback.print_exc()
            job.events.put(("error", f"The model failed ({type(error).__name__}); the terminal "
                                     "that started this page says more."))

    def answer(self, visit, job):
        """Reads, encodes and answers, and says which of them it does."""
        path, started = self.path_of(job.payload), time.monotonic()
        if not job.question:
            raise ValueError("There is no question yet: write one, or take a suggestion.")
        if visit.read != (path, job.question):
            visit.read, visit.sample, visit.answers = None, None, {}
            job.events.put(("status", "Reading the clip …"))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")              # also for a file that is read again
                visit.clip = clip_from_path(path, **self.model.clip_options())
            visit.notes = [str(warning.message).replace(str(path), "The clip")
                           for warning in caught]
        clip = visit.clip
        check_left(clip, job.mask)
        if job.live and clip.seconds:
            sample, said = self.answer_live(visit, job, path)
        else:
            sample, said = self.answer_once(visit, job, path)
        visit.read, visit.sample = (path, job.question), replace(sample, mask=None)
        visit.answers[job.mask] = said
        visit.inside = picture.look_inside(self.model, sample, clip,
                                           self.settings.get("max_new_tokens"))
        job.events.put(("done", line(
            f"Answered in {time.monotonic() - started:.1f} s, {VIEWS[job.mask]}: "
            f"{contents(clip)}.", notes=visit.notes)))

    def answer_once(self, visit, job, path):
        """-> the encoded sample, the answer.  A clip that was read for the same question is not
        encoded again, as the switches change nothing before the encoders."""
        sample = visit.sample
        if sample is None:
            job.events.put(("status", f"Encoding {contents(visit.clip)} …"))
            sample = self.model.encode_sample(Sample(job.question, clip=visit.clip))
        sample = replace(sample, mask=job.mask)
        job.events.put(("status", "Answering …"))
        beams = (self.settings.get("num_beams") or self.model.config.beams) > 1
        said, = self.model.generate([sample], stream=None if beams else job.stream,
                                    **self.settings)
        if beams:                                            # which cannot be streamed
            job.stream(said)
        return sample, said

    def answer_live(self, visit, job, path):
        """Answers after each window while the clip plays -> the encoded sample, the last answer."""
        config, clip = self.model.config, visit.clip
        settings = {name: value for name, value in self.settings.items() if name != "num_beams"}
        answering = live.Live(self.model, job.question, mask=job.mask)
        job.events.put(("status", "Live: the clip plays, and is asked about after each window …"))
        read, said = partial(clip_from_path, path, **self.model.clip_options()), ""
        for t, _, due in live.in_time(live.window_ends(config, clip.seconds),
                                      sleep=job.stopped.wait):
            job.stream(f"{t:.1f} s: ")
            said = answering.answer(live.seen(clip, t, read, 0.0, config.frame_times), job.stream,
                                    **settings)
            job.stream(f"  (after {time.monotonic() - due:.1f} s)\n")
        features = answering.encode(clip)                    # kept from the last answer
        return replace(answering.sample, features=features), said

    # ---- the picture
    def draw(self, visit, query=-1, start=0.0, width=0):
        """HTML of the picture, with a button for each query and over each row of queries.
        query: from 0; -1: all."""
        inside, narrow = visit.inside, 0 < (width or 0) < NARROW
        if inside is None:
            return line("This visit's picture is no longer there; ask again.", "error")
        query = query if 0 <= query < inside.queries else -1
        png = io.BytesIO()
        with self.drawing:
            figure = picture.draw(inside, None if query < 0 else query, start,
                                  3.7 if narrow else 11.0)
            picture.save(figure, png, 220 if narrow else 110)
            first, end = picture.part_shown(inside, start)
            fields = figure.query_fields
            del figure                   # its parts refer to each other: some 10 MB until collected
            gc.collect()

        def button(to, text, kind, at=first, style="", label=""):
            return (f'<button type="button" class="{kind}" data-query="{to}" data-start="{at:g}" '
                    f'style="{style}" aria-label="{label or text}">{text if not style else ""}'
                    "</button>")

        choices = [button(q, "all" if q < 0 else q + 1, "chosen" if q == query else "",
                          label="all queries" if q < 0 else f"query {q + 1}")
                   for q in range(-1, inside.queries)]
        if first > 0:
            choices.append(button(query, "← earlier", "", first - (end - first)))
        if end < inside.seconds - 1e-6:
            choices.append(button(query, "later →", "", end))
        rows = [button(q, "", "row", style=f"left:{left:.3%};width:{wide:.3%};height:"
                       f"{tall / inside.queries:.3%};top:{top + tall * q / inside.queries:.3%}",
                       label=f"query {q + 1}")
                for left, top, wide, tall in fields for q in range(inside.queries)]
        source = base64.b64encode(png.getvalue()).decode()
        return (f'<div class="choose"><span>Where it looks: query</span>{"".join(choices)}</div>'
                f'<div class="drawn"><img alt="frames, sound and attention" '
                f'src="data:image/png;base64,{source}">{"".join(rows)}</div>')

    # ---- gradio
    def blocks(self):
        """The page as gradio Blocks."""
        import gradio as gr
        with gr.Blocks(title="FAVOR", analytics_enabled=False, delete_cache=FORGET) as blocks:
            gr.HTML("<h1>FAVOR</h1><span>Ask about a clip: what is seen, what is heard, and when. "
                    "Everything stays on this computer.</span>", elem_id="head")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    tabs, kind, *files, example = self.clip_column(gr)
                with gr.Column(scale=6, min_width=320):
                    question, *switches, ask, stop, answer, status, compare = (
                        self.question_column(gr))
            drawn = gr.HTML(elem_id="picture", js_on_load=CLICK)
            width = gr.Number(visible=False)                      # of the window, from the browser
            inputs = [kind, *files, question, *switches, width]
            event = RAW | {
                "inputs": inputs, "outputs": [status, answer, compare, drawn],
                "js": "(...all) => [...all.slice(0, -1), window.innerWidth]", "queue": True,
                "concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal",
                "show_progress_on": answer}

            def asked(a, b, c, d, e, f, g, h, i, request: gr.Request):  # a name for each input
                yield from self.ask(a, b, c, d, e, f, g, h, i, request)

            def switched(a, b, c, d, e, f, g, h, i, request: gr.Request):
                if not self.visit(request).asked:            # before the first question
                    yield "", "", "", ""
                else:
                    yield from self.ask(a, b, c, d, e, f, g, h, i, request)

            def chosen(data: gr.EventData, request: gr.Request):
                return self.draw(self.visit(request), data.query, data.start, data.width)

            def gone(request: gr.Request):
                self.forget(request.session_hash)

            running = [gr.on([ask.click, question.submit], asked, **event),
                       gr.on([switch.input for switch in switches[:2]], switched, **event)]
            stop.click(None, None, None, cancels=running)
            drawn.select(chosen, None, drawn, **RAW)
            example.click(lambda: (gr.Tabs(selected="Video"), "Video", str(self.example),
                                   self.questions[0]), None, [tabs, kind, files[0], question],
                          **RAW)
            blocks.unload(gone)
        return blocks.queue(max_size=MOST_WAITING)

    def clip_column(self, gr):
        """Tabs of a video, a sound and a still -> the tabs, the name of the open one, the files'
        components, the button of the example."""
        kind = gr.Textbox("Video", visible=False)
        with gr.Tabs(selected="Video") as tabs:
            parts = {}
            with gr.Tab("Video", id="Video") as parts["Video"]:
                video = gr.Video(sources=["upload", "webcam"], include_audio=True, height=286,
                                 show_label=False, elem_id="video", buttons=[],
                                 webcam_options=gr.WebcamOptions(mirror=False))
            with gr.Tab("Sound", id="Sound") as parts["Sound"]:
                sound = gr.Audio(sources=["upload", "microphone"], type="filepath",
                                 show_label=False, elem_id="sound", buttons=[])
            with gr.Tab("Picture", id="Picture") as parts["Picture"]:
                still = gr.Image(sources=["upload", "webcam"], type="filepath", image_mode=None,
                                 height=286, show_label=False, elem_id="still", buttons=[],
                                 webcam_options=gr.WebcamOptions(mirror=False))
        example = gr.Button("Take the example: a beep, and an object that changes colour",
                            size="sm", elem_id="example")
        most = self.model.config.max_seconds
        longer = f" Of a longer clip the first {most:g} s are read." if most else ""
        gr.HTML(f'<p class="note">Files up to {self.most_bytes / 2**20:g} MB.{longer} Model: '
                f"{html.escape(self.name)}.</p>")
        files = (video, sound, still)
        for (name, tab), component in zip(parts.items(), files, strict=True):
            def uploaded(payload, request: gr.Request, name=name):
                self.uploaded(name, payload, request)

            tab.select(lambda name=name: name, None, kind, **RAW)
            component.change(uploaded, component, None, **RAW)
        return tabs, kind, *files, example

    def question_column(self, gr):
        """-> the components of the question, its three switches and its answer."""
        question = gr.Textbox(label="Question", lines=1, max_length=2000, elem_id="question",
                              placeholder="What happens after the beep?")
        with gr.Row(elem_classes="chips"):
            for words in self.questions:
                gr.Button(words, size="sm", min_width=120).click(
                    lambda words=words: words, None, question, **RAW)
        with gr.Row():
            switches = [gr.Checkbox(label=label, elem_id=name, min_width=130) for label, name in (
                ("without sound", "no-sound"), ("without picture", "no-picture"),
                ("live, as it plays", "live"))]
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=4, min_width=130)
            stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=70)
        answer = gr.Textbox(label="Answer", lines=1, max_lines=8, interactive=False,
                            elem_id="answer", buttons=["copy"])
        return (question, *switches, ask, stop, answer,
                gr.HTML(elem_id="status", js_on_load=PLAY), gr.HTML(elem_id="compare"))

    # ---- serving
    @contextlib.contextmanager
    def serving(self, port=PORT):
        """Inside, the page is served -> its address.  Afterwards its folder is gone.
        Raises OSError if the port is taken."""
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise OSError(f"port {port} is taken by another program; pass --port N")
        # Gradio reads its settings from the environment, some of them when it is imported.
        with tempfile.TemporaryDirectory(prefix="favor-page-") as folder:
            self.folder = Path(folder).resolve()
            os.environ |= {"GRADIO_TEMP_DIR": str(self.folder), "GRADIO_ANALYTICS_ENABLED": "False"}
            import gradio as gr
            from gradio.themes.utils.fonts import Font
            gr.set_static_paths([self.example])              # served from where it lies, no copy
            theme = gr.themes.Default(primary_hue="blue", font=[Font("system-ui"),
                                                                Font("sans-serif")],
                                      font_mono=[Font("monospace")])
            blocks = self.blocks()
            try:
                _, address, _ = blocks.launch(
                    server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True,
                    share=False, max_file_size=self.most_bytes, ssr_mode=False, show_error=True,
                    enable_monitoring=False, run_history=False, pwa=False, footer_links=[],
                    state_session_capacity=MOST_VISITS, theme=theme, css=CSS)
                gc.freeze()        # what lives as long as the page need not be looked through again
                yield address
            finally:
                gc.unfreeze()
                if self.working:                        # or the program would wait for its answer
                    self.working.stopped.set()
                blocks.close(verbose=False)

    def serve(self, port=PORT):
        """Serves the page until Ctrl-C, SIGTERM or the end of the terminal."""
        for name in (signal.SIGTERM, signal.SIGHUP):               # so that the folder is removed
            signal.signal(name, lambda *_: sys.exit(0))
        with self.serving(port) as address:
            print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()


# ---------------------------------------------------------------- words
def contents(clip):
    """'10 frames, 5.00 s of sound'"""
    frames = 0 if clip.frames is None else len(clip.frames)
    shown = "an image" if clip.is_image else f"{frames} frames"
    sound = "no sound" if clip.audio is None else f"{len(clip.audio) / 16000:.2f} s of sound"
    return f"{shown}, {sound}"


def check_left(clip, mask):
    """ValueError if a switch hides all that the clip has."""
    if mask == "visual" and clip.audio is None:
        raise ValueError("The clip has no sound, so nothing is left of it without its picture: "
                         "turn “without picture” off.")
    if mask == "audio" and clip.frames is None:
        raise ValueError("The clip has no picture, so nothing is left of it without its sound: "
                         "turn “without sound” off.")


def line(words, kind="", notes=()):
    """HTML of a sentence for the visitor; kind: "" or "error"."""
    told = "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
    return f'<p class="{kind}">{html.escape(words)}</p>{told}'


def compared(answers):
    """HTML of the answers to the same question, if there are two: what sound and picture are worth.
    answers: {mask: answer}."""
    rows = "".join(f"<span>{view}</span><b>{html.escape(answers[mask])}</b>"
                   for mask, view in VIEWS.items() if mask in answers)
    return f"<div>{rows}</div>" if len(answers) > 1 else ""
