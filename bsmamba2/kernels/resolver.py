"""Choose the fastest verified kernels for a model and install them.

    plain     the core: `bsmamba2.ssd.chunked` and the `forward` of each module
    chunked   the layers of `blockwise` with the scan of `chunked`: PyTorch, arranged for caches; every device
    cpu       the layers of `cpu_layers` with the C++ kernel of `cpu`; needs a C++ compiler once
    triton    the mixer of `triton` with mamba-ssm's scan and causal-conv1d's convolution; a CUDA device

`accelerate` replaces the classes of a model's modules by subclasses that compute the same function. Weights, names and
gradients do not change, so copies and checkpoints keep working. Book: "Choosing a backend, and trusting it".
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from .. import ssd
from ..dual_path import BidirectionalBlock
from ..mamba2 import Mamba2
from . import cpu, extension, triton
from .blockwise import BlockwiseBlock, BlockwiseMamba2
from .cpu_layers import CpuBlock, CpuMamba2
from .self_test import BackendError, raise_unsupported

BACKENDS = ("auto", "plain", "cpu", "triton")
"""Backend names for `accelerate`, which also accepts "chunked"."""

_CLASSES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "plain": {},
    "chunked": {Mamba2: BlockwiseMamba2, BidirectionalBlock: BlockwiseBlock},
    "cpu": {Mamba2: CpuMamba2, BidirectionalBlock: CpuBlock},
    "triton": {Mamba2: triton.TritonMamba2},
}
_PLAIN = {fast: plain for classes in _CLASSES.values() for plain, fast in classes.items()}


@dataclass(frozen=True)
class Acceleration:
    """Result of `accelerate`.

    Attributes:
        backend: the installed backend: "plain", "chunked", "cpu" or "triton".
        reason: why this backend was chosen, in one sentence.
        build_seconds: build time of the C++ kernel; None if it was not built just now.
        kept_in: cache folder of the C++ kernel for the next run; None if it is not cached.
    """

    backend: str
    reason: str
    build_seconds: float | None = None
    kept_in: Path | None = None

    def __str__(self) -> str:
        built = "" if self.build_seconds is None else f"; built in {self.build_seconds:.0f} s"
        return f"backend {self.backend}: {self.reason}{built}{', kept for the next run' * bool(built and self.kept_in)}"


def accelerate(model: nn.Module, backend: str = "auto", *, dtype: torch.dtype = torch.float32) -> Acceleration:
    """Install the fastest kernels that pass their self-test for a model, on the device of its weights.

    Mixers with a custom scan (not from `bsmamba2.ssd`) and subclasses of the core's modules are left unchanged. Inputs
    that a kernel does not support, for example of a different type, are computed by the chunked form. Call `accelerate`
    again after moving a model to a different device.

    Args:
        model: a `BSMamba2` or any of its layers; changed in place.
        backend: "auto", or the name of a backend that must run; "plain" removes installed kernels.
        dtype: type in which the model will compute (under autocast), used by the self-test.

    Raises:
        BackendError: if the named backend cannot run here. `auto` falls back to the chunked form instead.
        ValueError: for an unknown name.
    """
    built_before = extension.build_seconds
    chosen, reason = resolve_backend(model, backend, dtype)
    restore(model)
    for module in model.modules():
        fast = _CLASSES[chosen].get(type(module))
        if fast is not None and (not isinstance(module, Mamba2) or module.scan in ssd.SCANS.values()):
            module.__class__ = fast
    return Acceleration(chosen, reason, extension.build_seconds if built_before is None else None, extension.kept_in)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: give the modules their plain classes again."""
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))


def resolve_backend(model: nn.Module, backend: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend that `accelerate` would install, and the reason; same arguments and errors."""
    if backend not in (*BACKENDS, "chunked"):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if backend in ("plain", "chunked"):
        return backend, "as asked for"
    mixers = [part for part in model.modules() if isinstance(part, Mamba2) and part.scan in ssd.SCANS.values()]
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    wanted = backend if backend != "auto" else "triton" if device.type == triton.GPU else "cpu"
    if not mixers:
        reason, fix = "the model has no Mamba-2 mixer for a kernel to replace", "a model with one, or backend='plain'"
        error: BackendError | None = BackendError(reason, fix)
    else:
        error = _error(wanted, device, dtype, mixers[0].headdim, mixers[0].conv_sizes[1])
    if error is None:
        return wanted, f"its self-test agrees with the reference on {device} in {dtype}"
    if backend != "auto":
        raise error
    title = {"cpu": "the C++ kernel", "triton": "the fused kernel"}[wanted]
    return "chunked", f"PyTorch computes the same, slower, because {title} does not run: {error}"


def _error(backend: str, device: torch.device, dtype: torch.dtype, p: int, n: int) -> BackendError | None:
    """Why a backend, or causal-conv1d, cannot run on a device for a type, headdim p and d_state n; None if it can."""
    try:
        if backend == "cpu":
            raise_unsupported(cpu.unsupported_reasons(device, dtype, p, n))
            return cpu.self_test_error(dtype)
        raise_unsupported(
            triton.missing_requirements(triton.scan_kernel if backend == "triton" else triton.conv_kernel)
        )
        return (triton.self_test_error if backend == "triton" else triton.conv_self_test_error)(device, dtype)
    except BackendError as error:
        return error


# --- types that are slow ----------------------------------------------------------------------------------


def slowdown(device: torch.device, dtype: torch.dtype) -> float:
    """Slowdown of a small linear layer in `dtype`: its time divided by its time in float32, measured on this CPU.

    A CPU without instructions for a low-precision type may take 8 to 100 times as long. For float32 and on other
    devices, nothing is measured and the result is 0.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return 0.0
    times = {}
    for kind in (torch.float32, dtype):
        x, weight = torch.ones(2048, 256, dtype=kind), torch.ones(512, 256, dtype=kind)
        rounds = []
        for _ in range(4):  # the first one starts threads and is not counted
            started = time.perf_counter()
            functional.linear(x, weight)
            rounds.append(time.perf_counter() - started)
        times[kind] = min(rounds[1:])
    return times[dtype] / times[torch.float32]


def slow_dtype_warning(device: torch.device, dtype: torch.dtype) -> str:
    """Warning for a type that takes more than twice as long as float32 (`slowdown`); otherwise an empty string."""
    times = slowdown(device, dtype)
    return f"takes {times:.0f} times as long as float32, the default, on this processor" if times > 2 else ""


# --- the table of `bsmamba2 backends` ---------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One row of `backends`.

    Attributes:
        name: name of the backend, or of the convolution package for the `triton` backend.
        usable: whether it can run on the requested device.
        version: package and version, or a dash.
        reason: why it is usable, or not.
        fix: the change that would make it usable; empty if it is usable.
    """

    name: str
    usable: bool
    version: str
    reason: str
    fix: str = ""


def backends(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[Backend]:
    """List the backends of this machine and the choice of `auto`, after each self-test has run once.

    Args:
        device: device of the model; None: the current GPU if there is one, else the CPU.
        dtype: type in which the model would compute.
    """
    if device is None:
        has_gpu = torch.cuda.is_available()
        device = torch.device(triton.GPU, torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    rows = list(_rows(device, dtype))
    usable = {row.name for row in rows if row.usable}
    wanted = "triton" if device.type == triton.GPU else "cpu" if device.type == "cpu" else "chunked"
    chosen = wanted if wanted in usable else "chunked"
    return [Backend("auto", True, "–", f"takes {chosen} on {device}"), *rows]


def _rows(device: torch.device, dtype: torch.dtype) -> Iterator[Backend]:
    torch_version = f"torch {torch.__version__}"
    yield Backend("plain", True, torch_version, "runs on every device, as the book builds it")
    yield Backend("chunked", True, torch_version, "runs on every device, arranged for caches")
    for name, package in (("cpu", "torch"), ("triton", "mamba-ssm"), ("causal-conv1d", "causal-conv1d")):
        place = torch.device("cpu") if name == "cpu" else device
        error = _error(name, place, dtype, cpu.WIDTH_MULTIPLE, cpu.WIDTH_MULTIPLE)
        reason, fix = (error.reason, error.fix) if error else (f"agrees with the reference on {place} in {dtype}", "")
        yield Backend(name, error is None, _version(package), reason, fix)


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return "–"
