"""python -m miniature: see world.py."""

import sys

from miniature.world import main

if __name__ == "__main__":
    sys.exit(main())
