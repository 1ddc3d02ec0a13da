"""Speed: faster forms of the core's scan, mixer and bidirectional block, and the one call that installs them.

Begin with `accelerate(model)`: it chooses by device and self-test (`resolver.py`), and `restore(model)` undoes it.
`chunked` and `blockwise` need PyTorch only; `cpu`, with `cpu_layers`, needs a C++ compiler once; `triton` needs a CUDA
device and mamba-ssm (causal-conv1d optional). All compute the function of `bsmamba2.ssd` and `bsmamba2.mamba2`, and
each self-test compares them with it. Nothing here is imported by the core.
"""

from .resolver import (
    BACKENDS,
    Acceleration,
    Backend,
    accelerate,
    backends,
    resolve_backend,
    restore,
    slow_dtype_warning,
)
from .self_test import BackendError, is_out_of_memory

__all__ = [
    "BACKENDS",
    "Acceleration",
    "Backend",
    "BackendError",
    "accelerate",
    "backends",
    "is_out_of_memory",
    "resolve_backend",
    "restore",
    "slow_dtype_warning",
]
