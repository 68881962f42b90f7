"""What a run needs and the method does not: weights on disk, processes, logs, caches.  Knows no model.

A program imports this package before torch, which reads these two when it loads."""

import os

# Waiting threads sleep instead of spinning, without which a busy neighbour on the same cores makes
# a run many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
