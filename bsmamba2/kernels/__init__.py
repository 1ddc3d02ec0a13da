"""Faster forms of the core's scan, mixer and bidirectional block, and `accelerate`, which installs them.

Start with `accelerate(model)`, which chooses a backend by device and self-test (`resolver.py`); `restore(model)` undoes
it. `chunked` and `blockwise` need only PyTorch; `cpu`, with `cpu_layers`, needs a C++ compiler once; `triton` needs a
CUDA device and mamba-ssm (causal-conv1d is optional). All compute the same functions as `bsmamba2.ssd` and
`bsmamba2.mamba2`; the self-tests compare the compiled kernels with them. The core does not import this package.
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
