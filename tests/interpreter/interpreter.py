"""What lets mamba-ssm's Triton kernels run on a CPU; the tests here import it before anything else.

The switches below hold for the whole process, so these tests have one of their own (`make kernels`), and
`pytest tests` leaves this folder alone. Under the interpreter each program of a grid runs as Python, one after
the other. float32 only: bfloat16 is wrong there. With BSMAMBA2_KERNELS_ON=cuda they run on a GPU instead, as the GPU
check does it (`bsmamba2.experiments.gpu_check`): not run yet.

causal-conv1d is CUDA code without an interpreter. `mamba_split_conv1d_scan_combined` calls its functions, and
gets the plain PyTorch below in their place: what is tested of the fused mixer is all but the convolution.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

if "triton" in sys.modules:
    raise RuntimeError(
        "triton is imported already: run these tests in a process of their own, pytest tests/interpreter"
    )
os.environ["TRITON_INTERPRET"] = "0" if os.environ.get("BSMAMBA2_KERNELS_ON") == "cuda" else "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"  # else kernels are timed on a GPU to choose a block size

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map_only

ON_GPU = os.environ["TRITON_INTERPRET"] == "0"
if not ON_GPU:
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(multi_processor_count=1)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, computed on `DEVICE` from tensors on the CPU; so are its results and their gradients."""

    def moved(*args: Any, **kwargs: Any) -> Any:
        inputs = tree_map_only(Tensor, lambda part: part.to(DEVICE), (args, kwargs))
        return tree_map_only(Tensor, lambda part: part.cpu(), function(*inputs[0], **inputs[1]))

    return moved if ON_GPU else function


def convolve(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """(b, w, t), (w, taps), (w,) → (b, w, t)."""
    y = functional.conv1d(functional.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))
    return functional.silu(y) if silu else y


def convolve_forward(
    x: Tensor, weight: Tensor, bias: Tensor, seq_idx: None, first: None, last: None, silu: bool
) -> Tensor:
    """In the place of `causal_conv1d_fwd_function`."""
    return convolve(x, weight, bias, silu)


def convolve_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    dy: Tensor,
    seq_idx: None,
    first: None,
    dlast: None,
    dx: Tensor,
    return_dfirst: bool,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """In the place of `causal_conv1d_bwd_function`; writes into dx as that does."""
    with torch.enable_grad():
        inputs = [part.detach().requires_grad_() for part in (x, weight, bias)]
        gradients = torch.autograd.grad(convolve(*inputs, silu), inputs, dy)
    return dx.copy_(gradients[0]), gradients[1], gradients[2], None


def no_update(*arguments: object) -> None:
    raise NotImplementedError("frame by frame is not tested here")


package = types.ModuleType("causal_conv1d")
package.__path__ = []
package.causal_conv1d_fn = no_update
functions = types.ModuleType("causal_conv1d.cpp_functions")
functions.causal_conv1d_fwd_function = convolve_forward
functions.causal_conv1d_bwd_function = convolve_backward
functions.causal_conv1d_update_function = no_update
sys.modules |= {"causal_conv1d": package, "causal_conv1d.cpp_functions": functions}

from bsmamba2.kernels import triton  # noqa: E402

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Deterministic mode", UserWarning)
    ops = triton.triton_ops()
