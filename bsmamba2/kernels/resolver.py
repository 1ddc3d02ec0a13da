"""Choose the fastest verified kernels for a model, once, and put them in.

    plain     the core: `bsmamba2.ssd.chunked` and the `forward` of each module
    chunked   the layers of `blockwise` with the scan of `chunked`: PyTorch, arranged for caches; every device
    cpu       the layers of `cpu_layers` with the C++ kernel of `cpu`; needs a C++ compiler once
    triton    the mixer of `triton` with mamba-ssm's scan and causal-conv1d's convolution; a CUDA device

`accelerate` exchanges the classes of a model's modules for subclasses that compute the same; weights, names and
gradients stay, so copies and checkpoints do too. Book: "Choosing a backend, and trusting it".
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
"""Names of `accelerate`; it takes "chunked" as well."""

_CLASSES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "plain": {},
    "chunked": {Mamba2: BlockwiseMamba2, BidirectionalBlock: BlockwiseBlock},
    "cpu": {Mamba2: CpuMamba2, BidirectionalBlock: CpuBlock},
    "triton": {Mamba2: triton.TritonMamba2},
}
_PLAIN = {fast: plain for classes in _CLASSES.values() for plain, fast in classes.items()}


@dataclass(frozen=True)
class Acceleration:
    """The result of `accelerate`.

    Attributes:
        backend: that was put in: "plain", "chunked", "cpu" or "triton".
        reason: why, in one sentence.
        build_seconds: how long the C++ kernel took to build; none when it was not built just now.
        kept_in: the folder that keeps it for the next run; none when it is not kept.
    """

    backend: str
    reason: str
    build_seconds: float | None = None
    kept_in: Path | None = None

    def __str__(self) -> str:
        built = "" if self.build_seconds is None else f"; built in {self.build_seconds:.0f} s"
        return f"backend {self.backend}: {self.reason}{built}{', kept for the next run' * bool(built and self.kept_in)}"


def accelerate(model: nn.Module, backend: str = "auto", *, dtype: torch.dtype = torch.float32) -> Acceleration:
    """Put in the fastest kernels that work for a model on the device of its weights, after their self-test.

    A mixer with a scan of its own (not one of `bsmamba2.ssd`) and a subclass of a module stay as they are. Input that a
    kernel does not take (another type, say) goes through the chunked form. Call it again after moving a model to
    another device.

    Args:
        model: a `BSMamba2` or any of its layers; changed in place.
        backend: "auto", or the name of one that must run; "plain" undoes what was put in.
        dtype: that the model will compute in (under autocast), for the self-test.

    Raises:
        BackendError: when the named backend cannot run here. `auto` falls back to the chunked form instead.
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
    """Undo `accelerate`: the modules have their plain classes again."""
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))


def resolve_backend(model: nn.Module, backend: str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The backend that `accelerate` takes, and why; arguments and errors are the same."""
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
    """Why a backend, or causal-conv1d, does not run on a device in a type for heads of p and states of n; or none."""
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
    """Time of a small linear layer in `dtype`, divided by its time in float32, measured on this device.

    A CPU without instructions for a narrow type may take 8 to 100 times as long. 0 on other devices, where nothing is
    measured.
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
    """The warning for a type that takes more than twice as long as float32 (`slowdown`); else an empty string."""
    times = slowdown(device, dtype)
    return f"takes {times:.0f} times as long as float32, the default, on this processor" if times > 2 else ""


# --- the table of `bsmamba2 backends` ---------------------------------------------------------------------


@dataclass(frozen=True)
class Backend:
    """One row of `backends`.

    Attributes:
        name: of the backend, or of the convolution that goes with it.
        usable: on the device that was asked about.
        version: package and version, or a dash.
        reason: why it is usable, or not.
        fix: the change that would make it usable; empty when it is.
    """

    name: str
    usable: bool
    version: str
    reason: str
    fix: str = ""


def backends(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[Backend]:
    """The backends of this machine, and the one that `auto` takes; runs each self-test once.

    Args:
        device: where the model would be; the current GPU if there is one, else the CPU, when absent.
        dtype: that it would compute in.
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
