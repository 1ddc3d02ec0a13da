"""Fused GPU kernels: mamba-ssm's Triton scan and causal-conv1d's convolution, each used if its self-test passes.

Both packages are optional, independently of each other, and imported at first use. A kernel runs if the tensor is on a
suitable device and the kernel gave correct numbers there; a successful import is not enough. The limits of the kernels
are taken from the code of mamba-ssm 2.3.2.post1 and of causal-conv1d. The Triton kernels were run under Triton's
interpreter and compiled for GPUs (`tests/gpu`), but not run on a GPU. Book: "The fused kernel". Axis letters: see
`bsmamba2.config`; w is the width of a convolution.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ssd
from . import blockwise
from .chunked import chunked
from .self_test import BackendError, raise_unsupported, relative_errors, self_test, warn_once

GPU = "cuda"  # device type of the kernels
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT_CHUNK, FULL_CHUNK = 64, 256  # frames; the short one for sequences up to twice its length, such as bands
MAX_BLOCKS = 65_535  # CUDA's limit for the grid axis on which the kernels put batch × chunks
MAX_ELEMENTS = 2**31 - 1  # the kernels address with 32-bit integers
OLDEST = (8, 0)  # compute capability; on the previous one, Triton compiles a hundred binaries, two minutes each

INSTALL_MAMBA = (
    "pip install einops packaging setuptools wheel && MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)
INSTALL_CONV = "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation causal-conv1d"
HINTS = {  # missing module → how to fix it
    "einops": "pip install einops",
    "triton": "a torch for Linux with CUDA, which brings Triton",
}

# Tolerance of the self-tests: error relative to float64, in the Euclidean norm. Rounding the inputs causes a third of
# it, because bfloat16 has 8 significand bits, and the kernels multiply float32 in TF32, with 11, on GPUs that have it.
TOLERANCE = {torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 1.2e-2}
FIXES = (
    "a build of the package and of Triton for this GPU and this torch; the chunked form runs meanwhile",
    "another version of the package or of Triton; the chunked form runs meanwhile",
)


# --- the scan ---------------------------------------------------------------------------------------------


def scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """The scan by mamba-ssm's `mamba_chunk_scan_combined`, with the signature and shapes of `bsmamba2.ssd`.

    dt, A, D and the states are converted to float32, B and C to the type of x. A batch that is too large for one
    launch is split. The kernels compute matrix products of float32 inputs in TF32 on GPUs that support it. This
    function does not run the self-test.

    Raises:
        BackendError: if mamba-ssm cannot be imported, or does not support the device or type of x.
        ValueError: if shapes do not match, or the sequence is too long.
    """
    ssd.check(x, dt, A, B, C, D, initial_state)
    raise_unsupported(_unsupported_reasons(x.device, x.dtype) + _too_old(x.device))
    kernel = scan_kernel()
    b, t = x.shape[:2]
    chunk = SHORT_CHUNK if t <= 2 * SHORT_CHUNK else FULL_CHUNK
    A, D = A.float(), None if D is None else D.float()
    rows = _max_batch(x, B.shape[-1], chunk)
    parts = []
    for start in range(0, b, rows):
        piece = slice(start, start + rows)
        result = kernel(
            _addressable(x[piece]),
            _addressable(dt[piece].float()),
            A,
            _addressable(B[piece].to(x.dtype))[:, :, None],  # one group
            _addressable(C[piece].to(x.dtype))[:, :, None],
            chunk,
            D=D,
            initial_states=None if initial_state is None else initial_state[piece].float(),
            return_final_states=return_state,  # unneeded states would cost the backward pass a gradient of zeros
        )
        parts.append(result if return_state else (result,))
    joined = [values[0] if len(values) == 1 else torch.cat(values) for values in zip(*parts, strict=True)]
    return tuple(joined) if return_state else joined[0]


def _max_batch(x: Tensor, n: int, chunk: int) -> int:
    """Largest number of sequences in one launch."""
    _, t, h, p = x.shape
    chunks = -(-t // chunk)
    largest = max(t * h * p, chunks * chunk * max(h, chunk, n), chunks * h * p * n)  # elements of one sequence
    rows = min(MAX_BLOCKS // chunks, MAX_ELEMENTS // largest)
    if rows < 1:
        raise ValueError(f"t={t} frames are too many for the fused kernel: cut the sequence and pass the state on")
    return rows


def _addressable(x: Tensor) -> Tensor:
    """Return x, or a copy if x is a view with its last element too far from its first for a 32-bit offset."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if span < MAX_ELEMENTS else x.contiguous()


def auto_scan(x: Tensor, *inputs: Any, **options: Any) -> Any:
    """Fused scan if its self-test passes for the device and type of x, else the chunked form; warns once on failure."""
    if x.device.type == GPU:
        if (error := self_test_error(x.device, x.dtype)) is None:
            return scan(x, *inputs, **options)
        warn_once(f"the chunked form runs instead of the fused kernel: {error}")
    return chunked(x, *inputs, **options)


# --- the convolution --------------------------------------------------------------------------------------


def auto_conv(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None = None) -> Tensor:
    """Causal convolution by causal-conv1d's kernel if it works for x and the weight, else by plain PyTorch.

    If the package is not installed or does not support the size, there is no warning. If it is installed and its
    self-test fails, one RuntimeWarning is issued. Arguments and result: as for `causal_conv1d_silu`.
    """
    if x.device.type == GPU and not _unsupported_sizes(weight) and _installed("causal_conv1d"):
        error = conv_self_test_error(x.device, x.dtype)
        if error is None:
            return causal_conv1d_silu(x, weight, bias, conv_state)
        warn_once(f"the convolution runs without causal-conv1d: {error}")
    return blockwise.causal_conv1d_silu(x, weight, bias, conv_state)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None = None) -> Tensor:
    """SiLU of a causal depthwise convolution by causal-conv1d.

    The kernel supports 2 to 4 taps, and a width and strides that are multiples of 8; x is copied if only its strides
    are unsuitable.

    Args:
        x: (t, b, w), frames first.
        weight: (w, 1, taps).
        bias: (w,), or None.
        conv_state: the frames before the first one, (taps − 1, b, w); zeros if None.

    Returns:
        (t, b, w), in the type of x.

    Raises:
        BackendError: if causal-conv1d cannot be imported, or does not support x or the weight.
    """
    raise_unsupported(_unsupported_reasons(x.device, x.dtype) + _unsupported_sizes(weight))
    kernel = conv_kernel()
    if conv_state is not None:
        return causal_conv1d_silu(torch.cat((conv_state, x)), weight, bias)[len(conv_state) :]
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    return kernel(x.permute(1, 2, 0), weight[:, 0].to(x.dtype), bias, activation="silu").permute(2, 0, 1)


def _unsupported_sizes(weight: Tensor) -> list[BackendError]:
    width, _, taps = weight.shape
    if 2 <= taps <= 4 and width % 8 == 0:
        return []
    why = f"causal-conv1d takes 2 to 4 taps and a width that is a multiple of 8, not {taps} taps and width {width}"
    return [BackendError(why, "another size of the model, or the plain convolution")]


class TritonMamba2(blockwise.BlockwiseMamba2):
    """`Mamba2` with the fused scan and convolution on a CUDA device."""

    convolve = staticmethod(auto_conv)
    run_scan = staticmethod(auto_scan)


# --- packages ---------------------------------------------------------------------------------------------


@functools.cache
def triton_ops() -> ModuleType:
    """mamba-ssm's module `ops.triton.ssd_combined`.

    The package's own `__init__` also imports modules that Mamba-2 does not need and a build without CUDA does not
    have (`selective_scan_cuda`, `transformers`, ...). During this import, an empty module with the package's path
    therefore replaces the package; a later `import mamba_ssm` imports the real one.

    Raises:
        BackendError: if it is not installed, or fails to import.
    """
    package = "mamba_ssm"
    shell = None
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            raise BackendError("mamba-ssm is not installed", INSTALL_MAMBA)
        shell = ModuleType(package)
        shell.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = shell
    try:
        return importlib.import_module(f"{package}.ops.triton.ssd_combined")
    except Exception as error:
        raise _import_fault("mamba-ssm", error, INSTALL_MAMBA) from error
    finally:
        if shell is not None:
            del sys.modules[package]


def scan_kernel() -> Callable[..., Any]:
    """Import mamba-ssm's `mamba_chunk_scan_combined`; raises BackendError if this fails."""
    return triton_ops().mamba_chunk_scan_combined


def conv_kernel() -> Callable[..., Tensor]:
    """Import causal-conv1d's `causal_conv1d_fn`; raises BackendError if this fails."""
    if not _installed("causal_conv1d"):
        raise BackendError("causal-conv1d is not installed", INSTALL_CONV)
    try:
        return importlib.import_module("causal_conv1d").causal_conv1d_fn
    except Exception as error:
        raise _import_fault("causal-conv1d", error, INSTALL_CONV) from error


def _installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def _import_fault(package: str, error: Exception, install: str) -> BackendError:
    said = f"{type(error).__name__}: {error}"
    missing = (getattr(error, "name", None) or "") if isinstance(error, ModuleNotFoundError) else ""
    fix = HINTS.get(missing.partition(".")[0])
    if fix is None and ("undefined symbol" in said or "DLL load failed" in said):
        fix = f"build it against this torch: pip uninstall {package}, then {install}"
    return BackendError(f"{package} fails to import ({said})", fix or f"the version that was tried: {install}")


# --- requirements -------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether Triton's interpreter is on; it runs the kernels on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _unsupported_reasons(device: torch.device, dtype: torch.dtype) -> list[BackendError]:
    """Reasons why the kernels do not support a device and type; empty if they do."""
    said = []
    if device.type != GPU and not (device.type == "cpu" and interpreted()):
        said.append(
            BackendError(f"the tensor is on {device}, the kernel runs on CUDA", "model.to('cuda'), or backend='auto'")
        )
    if dtype not in TYPES:
        said.append(BackendError(f"the kernel does not take {dtype}", "float32 or bfloat16, or backend='plain'"))
    return said


def _too_old(device: torch.device) -> list[BackendError]:
    """Reason why a GPU is too old for the fused scan; empty if it is not."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST:
        return []
    found, oldest = (".".join(map(str, of)) for of in (torch.cuda.get_device_capability(device), OLDEST))
    why = f"{device} has compute capability {found}, the fused scan needs {oldest}"
    return [BackendError(why, "a GPU of the RTX 30 series, an A100, or a later one; the chunked form runs meanwhile")]


def missing_requirements(load: Callable[[], object]) -> list[BackendError]:
    """Reasons why a kernel cannot run on any device of this machine: no usable GPU, or no package."""
    said = []
    if not torch.cuda.is_available() and not interpreted():
        built = torch.version.cuda
        said.append(
            BackendError(f"torch {torch.__version__} is built without CUDA", "a torch with CUDA, and an NVIDIA GPU")
            if built is None
            else BackendError(
                f"torch {torch.__version__} sees no GPU",
                f"an NVIDIA GPU with a driver for CUDA {built} (see nvidia-smi)",
            )
        )
    try:
        load()
    except BackendError as error:
        said.append(error)
    return said


# --- self-tests -------------------------------------------------------------------------------------------


@functools.cache
def self_test_error(device: torch.device, dtype: torch.dtype) -> BackendError | None:
    """Self-test of the fused scan on a device for one input type: the fault, or None if it works.

    It runs the scan with short and with long chunks, forward and backward, and compares outputs, state and gradients
    with the recurrence in float64 on the CPU. The result is cached for each device and type. An out-of-memory error
    is raised unchanged, because it does not mean that the kernel is faulty, and the next call tries again.
    """
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def run(scan: ssd.Scan, parts: list[Tensor]) -> tuple[Tensor, ...]:
        return scan(*parts[:6], initial_state=parts[6], return_state=True)

    def in_chunks_of(chunk: int) -> dict[str, float]:
        b, t, h, p, n = 1, chunk + chunk // 4, 2, 64, 128  # the published widths; two chunks, the second not full
        dt = functional.softplus(normal(b, t, h) - 3)  # around 0.05
        inputs = [normal(b, t, h, p), dt, -torch.rand(h, generator=g) * 8 - 1, normal(b, t, n), normal(b, t, n)]
        inputs += [normal(h), normal(b, h, p, n)]
        narrow = {0, 3, 4}  # x, B, C
        cast = [part.to(dtype if i in narrow else torch.float32) for i, part in enumerate(inputs)]
        names = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "d initial state")
        return relative_errors(names, functools.partial(run, scan), functools.partial(run, ssd.recurrent), cast, device)

    def tried() -> dict[str, float]:
        short, long = in_chunks_of(SHORT_CHUNK), in_chunks_of(FULL_CHUNK)
        return {name: float(torch.tensor([short[name], long[name]]).max()) for name in short}  # NaN stays NaN

    return self_test("the fused scan", tried, device, dtype, tolerance=TOLERANCE.get(dtype, 0.0), fixes=FIXES)


@functools.cache
def conv_self_test_error(device: torch.device, dtype: torch.dtype) -> BackendError | None:
    """Self-test of causal-conv1d, as in `self_test_error`; the reference is `torch.nn.functional.conv1d`."""
    g = torch.Generator().manual_seed(0)
    t, b, w, taps = 20, 2, 16, 4
    inputs = [torch.randn(*shape, generator=g).to(dtype) for shape in [(t, b, w), (w, 1, taps), (w,)]]

    def reference(parts: list[Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias = parts
        padded = functional.pad(x.permute(1, 2, 0), (taps - 1, 0))
        return (functional.silu(functional.conv1d(padded, weight, bias, groups=w)).permute(2, 0, 1),)

    def tried() -> dict[str, float]:
        return relative_errors(
            ("y", "dx", "dweight", "dbias"), lambda parts: (causal_conv1d_silu(*parts),), reference, inputs, device
        )

    return self_test("causal-conv1d", tried, device, dtype, tolerance=TOLERANCE.get(dtype, 0.0), fixes=FIXES)
