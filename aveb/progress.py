"""How far a long loop is: a tqdm bar on a terminal, else a line every ten seconds.

   Public: Progress."""

import sys
import time

from tqdm import tqdm

EVERY = 10                      # seconds between lines where stderr is no terminal


class Progress:
    """with Progress("answering", 90, "question") as progress: progress.add(32).

    log: prints a line where stderr is no terminal; shown: False on all processes but the first."""

    def __init__(self, what, total, unit, log=print, shown=True):
        self.what, self.total, self.log, self.shown, self.done = what, total, log, shown, 0
        self.started = self.reported = time.time()
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}s", leave=False,
                        disable=not (shown and sys.stderr.isatty()))

    def add(self, n=1):
        """n more are done."""
        self.done += n
        self.bar.update(n)
        now = time.time()
        if self.bar.disable and self.shown and now - self.reported > EVERY:
            self.reported, seconds = now, now - self.started
            self.log(f"  {self.what} {self.done}/{self.total}, {seconds:.0f} s, "
                     f"ETA {seconds / self.done * (self.total - self.done):.0f} s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
