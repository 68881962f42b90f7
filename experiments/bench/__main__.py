"""python -m experiments.bench: see run.py."""

import sys

from experiments.bench.run import main

if __name__ == "__main__":
    sys.exit(main())
