"""python -m aveb: see prepare.py."""

import sys

from aveb.prepare import main

if __name__ == "__main__":
    sys.exit(main())
