"""What a run needs and the method does not: weights on disk, processes, logs, caches.

These files know no model.  A program imports this package before torch, which reads the two
variables below when it loads."""

import os
import sys

# Waiting threads should sleep.  If they spin, another busy process on the same cores makes a run
# many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A terminal that is not UTF-8 shows escapes for what it lacks; a print never ends a program.
for stream in (sys.stdout, sys.stderr):
    if getattr(stream, "errors", None) in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")
