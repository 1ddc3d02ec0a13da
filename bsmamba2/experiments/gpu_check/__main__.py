"""`python -m bsmamba2.experiments.gpu_check`."""

import sys

from .runner import main

if __name__ == "__main__":  # processes that PyTorch starts import this file again
    sys.exit(main())
