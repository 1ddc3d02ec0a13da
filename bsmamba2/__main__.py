"""Entry point of `python -m bsmamba2 COMMAND`, equivalent to the console script `bsmamba2`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
