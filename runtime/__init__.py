"""What a run needs and the method does not: weights on disk, processes, logs, caches.

These files know no model.  A program imports this package before torch, which reads the two
variables below when it loads."""

import os

# Waiting threads should sleep.  If they spin, another busy process on the same cores makes a run
# many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
