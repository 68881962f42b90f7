"""A loop of visits to tools/page.py's page, by hand: the server's memory must not grow, and no file
may stay.  It speaks to the server as a browser does, but draws nothing itself:

     python tests/visits.py 200           (about a second a visit; needs the extra `demo`)"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent


class Visit:
    """One open tab of the page; closed at the end of `with`."""

    def __init__(self, client, config):
        self.client, self.session = client, secrets.token_hex(6)
        self.events = {}                                     # trigger: number of its event
        names = {part["id"]: part["props"].get("elem_id") or part["props"].get("value")
                 for part in config["components"]}
        for event in config["dependencies"]:
            for part, trigger in event["targets"]:
                self.events[names.get(part), trigger] = event["id"]

    def __enter__(self):
        self.gone = threading.Event()
        self.heart = threading.Thread(target=self.beat)
        self.heart.start()
        return self

    def beat(self):
        """The connection that a tab keeps; the server notices when it ends."""
        with self.client.stream("GET", f"heartbeat/{self.session}") as beats:
            connected = beats.iter_bytes()                   # closed with its last reference
            next(connected)
            self.gone.wait()

    def __exit__(self, *_):
        self.gone.set()
        self.heart.join()

    def upload(self, name, content):
        """-> the file as a component's value."""
        path, = self.client.post("upload", files={"files": (name, content)}).json()
        payload = {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}
        self.run(("video", "change"), [payload])
        return payload

    def run(self, trigger, values, data=None):
        """An event that does not wait in the queue -> its outputs."""
        answer = self.client.post("run/predict", json={
            "fn_index": self.events[trigger], "data": values, "session_hash": self.session,
            "event_data": data})
        return answer.raise_for_status().json()["data"]

    def ask(self, payload, question):
        """-> the last outputs: status, answer, comparison, picture."""
        self.client.post("queue/join", json={
            "fn_index": self.events["ask", "click"], "session_hash": self.session,
            "data": ["Video", payload, None, None, question, False, False, False, 1280],
        }).raise_for_status()
        shown = [None] * 4
        with self.client.stream("GET", "queue/data", params={"session_hash": self.session}) as told:
            for text in told.iter_lines():
                event = json.loads(text.removeprefix("data:")) if text.startswith("data:") else {}
                if event.get("msg") in ("process_generating", "process_completed"):
                    for i, value in enumerate(event["output"].get("data", [])):
                        shown[i] = patched(shown[i], value)
                if event.get("msg") == "process_completed":
                    assert event["success"], event
                    return shown


def patched(old, new):
    """A value of the stream, which may be a list of changes to the one before."""
    if not isinstance(new, list):
        return new
    for action, where, value in new:
        if where or action not in ("replace", "append"):
            raise ValueError(f"an unknown change of text: {action} {where}")
        old = value if action == "replace" else (old or "") + value
    return old


def resident(pid):
    """MiB of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def files(folder, patience=20):
    """The files below a folder, as soon as there are none, or after `patience` seconds."""
    end = time.monotonic() + patience
    while found := [str(path) for path in Path(folder).rglob("*") if path.is_file()]:
        if time.monotonic() > end:
            return found
        time.sleep(0.2)
    return []


def main(visits, port=7891):
    """Each visit uploads a clip of its own, asks, chooses a query and goes."""
    example = json.loads((ROOT / "miniature" / "demo.json").read_text())
    clip, question = (ROOT / "miniature" / example["clip"]).read_bytes(), example["question"]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([sys.executable, "demo.py", "--web", "--port", str(port)],
                                  cwd=ROOT, env=os.environ | {"TMPDIR": folder},
                                  stdout=subprocess.PIPE, text=True)
        try:
            address = server.stdout.readline().split("at ")[1].split()[0]
            print(f"{address}: {resident(server.pid):.0f} MiB before the first visit", flush=True)
            with httpx.Client(base_url=f"{address}gradio_api", timeout=60) as client:
                config = httpx.get(f"{address}config").json()
                for n in range(1, visits + 1):
                    with Visit(client, config) as visit:
                        payload = visit.upload(f"visit{n}.mp4", clip + n.to_bytes(4, "big"))
                        _, answer, _, drawn = visit.ask(payload, question)
                        assert answer == example["answer"] and "data:image/png" in drawn
                        chosen, = visit.run(("picture", "select"), [],
                                            {"query": 3, "start": 0, "width": 1280})
                        assert "data:image/png" in chosen and chosen != drawn
                    if n in (1, 10) or n % 20 == 0:
                        print(f"{n} visits: {resident(server.pid):.0f} MiB, "
                              f"{len(files(folder))} files", flush=True)
            print("files that stay after the visits:", files(folder), flush=True)
        finally:
            server.terminate()
            server.wait(60)
        print("files that stay after the end:", files(folder))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
