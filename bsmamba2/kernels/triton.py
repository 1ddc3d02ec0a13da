"""Which scan runs: ours, or a fused GPU kernel where one was seen to work.

    recurrent, matrix, chunked   `bsmamba2.ssd`, on every device
    native                       `bsmamba2.kernels.cpu`, C++ on a CPU
    fused                        mamba-ssm's Triton kernels, on a CUDA device
    auto                         on a CUDA device fused, on a CPU native within `loops.compiled`, each where a trial run
                                 agreed with ours; else chunked

mamba-ssm and causal-conv1d are optional, each without the other, and imported when first needed. What
decides is where the tensor is and whether the kernel gave the right numbers there, never that an import
succeeded. Book: "The fused kernel". Source of the kernels' rules: the code of mamba-ssm 2.3.2.post1 and of
causal-conv1d. The kernels themselves were run here under Triton's interpreter, not on a GPU.
Axis letters: see `bsmamba2.config`; w is the width of a convolution.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import ssd
from . import cpu, loops
from .self_test import Backend, BackendError, refuse, trial, warn_once

Convolution = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""SiLU of a causal convolution, with the arguments of `conv_silu`."""

GPU = "cuda"  # the type of device that the kernels are for
TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHORT_CHUNK, LONG_CHUNK = 64, 256  # frames; the short one up to twice its length, bands for example
MOST_BLOCKS = 65_535  # CUDA's limit for the grid axis on which the kernels put batch × chunks
MOST_ELEMENTS = 2**31 - 1  # the kernels address with 32-bit integers

INSTALL_MAMBA = (
    "pip install einops packaging setuptools wheel && MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
    "pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)
INSTALL_CONV = "CAUSAL_CONV1D_FORCE_BUILD=TRUE pip install --no-build-isolation causal-conv1d"
HINTS = {  # word in an import error: mend
    "einops": "pip install einops",
    "triton": "a torch for Linux with CUDA, which brings Triton",
}

# Largest error of a trial run, relative to float64 in the Euclidean norm. Rounding the inputs alone gives a third of
# it: bfloat16 has 8 bits, and the kernels multiply float32 in TF32, which has 11, where a GPU can.
TOLERANCE = {torch.float32: 3e-3, torch.float16: 5e-3, torch.bfloat16: 1.2e-2}
MENDS = (
    "a build of the package and of Triton for this GPU and this torch; the chunked form runs meanwhile",
    "another version of the package or of Triton; the chunked form runs meanwhile",
)


# --- choosing a scan --------------------------------------------------------------------------------------


def slower_than_float32(device: torch.device, dtype: torch.dtype) -> float:
    """How many times longer a linear layer takes in `dtype` than in float32, measured here on a small one.

    A CPU without instructions for a narrow type computes it by a detour: one with AVX2 alone took 8 times as long in
    bfloat16 for such a layer, and 100 times for a product of two square matrices of 1,024. 0 on other devices, where
    nothing is measured.
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
    """What to say of a type that takes more than twice as long as float32 (`slower_than_float32`); else nothing."""
    longer = slower_than_float32(device, dtype)
    return f"takes {longer:.0f} times as long as float32, the default, on this processor" if longer > 2 else ""


def choose(scan: ssd.Scan | str) -> ssd.Scan:
    """The function of a name; a function is returned as it is.

    Args:
        scan: "auto", "recurrent", "matrix", "chunked", "native", "fused", or a function with `ssd`'s signature.

    Raises:
        ValueError: for another name.
        BackendError: for "fused" where mamba-ssm cannot be imported or there is no CUDA device, for "native" where
            it cannot be built.
    """
    if not isinstance(scan, str):
        return scan
    if scan not in SCANS:
        raise ValueError(f"scan={scan!r} must be one of {', '.join(map(repr, SCANS))}, or a function")
    if scan == "fused":
        refuse(_obstacles(scan_kernel))
    if scan == "native":
        cpu.operators()
    return SCANS[scan]


def auto(
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
    """The scan that suits the device of x (`scan_for`). See `bsmamba2.ssd` for shapes."""
    scan = scan_for(x.device, x.dtype)
    if scan is cpu.scan and cpu.misfits(x.device, x.dtype, x.shape[-1], B.shape[-1]):
        scan = ssd.chunked
    return scan(x, dt, A, B, C, D, initial_state=initial_state, return_state=return_state)


def scan_for(device: torch.device, dtype: torch.dtype) -> ssd.Scan:
    """What `auto` runs for x on this device and of this type: `fused`, `native.scan`, or `ssd.chunked`.

    Without a working kernel one RuntimeWarning says why, and what would mend it. On a CPU a kernel is wanted within
    `loops.compiled` only.
    """
    if device.type == GPU:
        fault, kernel, scan = scan_fault(device, dtype), "fused", fused
    elif device.type == "cpu" and loops.asked() and dtype in cpu.TOLERANCE:
        fault, kernel, scan = cpu.fault(dtype), "native", cpu.scan
    else:
        return ssd.chunked
    if fault is None:
        return scan
    warn_once(f"scan='auto' runs the chunked form instead of the {kernel} kernel: {fault}")
    return ssd.chunked


def checked(
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
    """`fused`, after its trial run on the device of x: what the name "fused" stands for.

    Raises:
        BackendError: when the kernel cannot run there, or gave other numbers than ours.
    """
    fault = scan_fault(x.device, x.dtype)
    if fault is not None:
        raise fault
    return fused(x, dt, A, B, C, D, initial_state=initial_state, return_state=return_state)


# --- the scan ---------------------------------------------------------------------------------------------


def fused(
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
    """mamba-ssm's `mamba_chunk_scan_combined` with the signature of `bsmamba2.ssd`, which has the shapes.

    dt, A, D and the states are float32; B and C take the type of x. A batch that is too large for one
    launch goes in pieces. Matrix products of float32 inputs run in TF32 on the GPUs that have it, which is
    the kernels' choice. Nothing is tried beforehand: that is `checked`.

    Raises:
        BackendError: when mamba-ssm cannot be imported, x is not on a CUDA device or of another type.
        ValueError: for shapes that do not fit.
    """
    ssd.check(x, dt, A, B, C, D, initial_state)
    refuse(_misfits(x.device, x.dtype))
    kernel = scan_kernel()
    b, t = x.shape[:2]
    chunk = SHORT_CHUNK if t <= 2 * SHORT_CHUNK else LONG_CHUNK
    A, D = A.float(), None if D is None else D.float()
    rows = _rows(x, B.shape[-1], chunk)
    outputs, states = [], []
    for start in range(0, b, rows):
        piece = slice(start, start + rows)
        y, state = kernel(
            _addressable(x[piece]),
            _addressable(dt[piece].float()),
            A,
            _addressable(B[piece].to(x.dtype))[:, :, None],  # one group
            _addressable(C[piece].to(x.dtype))[:, :, None],
            chunk,
            D=D,
            initial_states=None if initial_state is None else initial_state[piece].float(),
            return_final_states=True,
        )
        outputs.append(y)
        states.append(state)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if not return_state:
        return y
    return y, states[0] if len(states) == 1 else torch.cat(states)


def _rows(x: Tensor, n: int, chunk: int) -> int:
    """How many sequences go into one launch."""
    _, t, h, p = x.shape
    chunks = -(-t // chunk)
    largest = max(t * h * p, chunks * chunk * max(h, chunk, n), chunks * h * p * n)  # elements of one sequence
    rows = min(MOST_BLOCKS // chunks, MOST_ELEMENTS // largest)
    if rows < 1:
        raise ValueError(f"t={t} frames are too many for the fused kernel: cut the sequence and pass the state on")
    return rows


def _addressable(x: Tensor) -> Tensor:
    """x, copied if it is a view whose last element lies too far from its first."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x if span < MOST_ELEMENTS else x.contiguous()


# --- the convolution --------------------------------------------------------------------------------------


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None, *, otherwise: Convolution
) -> Tensor:
    """causal-conv1d's kernel where it works for x and the weight, else `otherwise`.

    To go without the package is a valid state, and so is a size that it does not take (`conv_silu`). When it is
    installed and its trial run fails, one RuntimeWarning says so.

    Args:
        x, weight, bias, before: as in `conv_silu`.
        otherwise: the function of the same four to run where the kernel does not.
    """
    if x.device.type != GPU or _size_misfits(weight) or not _installed("causal_conv1d"):
        return otherwise(x, weight, bias, before)
    fault = conv_fault(x.device, x.dtype)
    if fault is not None:
        warn_once(f"the convolution runs without causal-conv1d: {fault}")
        return otherwise(x, weight, bias, before)
    return conv_silu(x, weight, bias, before)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """SiLU of a causal depthwise convolution by causal-conv1d.

    The kernel takes 2 to 4 taps, a width that is a multiple of 8, and strides that are; x is copied when
    only its strides are wrong.

    Args:
        x: (t, b, w), frames first.
        weight: (w, 1, taps).
        bias: (w,), or none.
        before: the frames before the first, (taps − 1, b, w); zeros when absent.

    Returns:
        (t, b, w), of the type of x.

    Raises:
        BackendError: when causal-conv1d cannot be imported, or does not take x or the weight.
    """
    refuse(_misfits(x.device, x.dtype) + _size_misfits(weight))
    kernel = conv_kernel()
    if before is not None:
        return conv_silu(torch.cat((before, x)), weight, bias)[len(before) :]
    if x.stride(2) != 1 or x.stride(0) % 8 or x.stride(1) % 8:
        x = x.contiguous()
    bias = None if bias is None else bias.to(x.dtype)
    return kernel(x.permute(1, 2, 0), weight[:, 0].to(x.dtype), bias, activation="silu").permute(2, 0, 1)


def _size_misfits(weight: Tensor) -> list[BackendError]:
    width, _, taps = weight.shape
    if 2 <= taps <= 4 and width % 8 == 0:
        return []
    why = f"causal-conv1d takes 2 to 4 taps and a width that is a multiple of 8, not {taps} taps and width {width}"
    return [BackendError(why, "another size of the model, or the plain convolution")]


# --- packages ---------------------------------------------------------------------------------------------


@functools.cache
def triton_ops() -> ModuleType:
    """mamba-ssm's module `ops.triton.ssd_combined`.

    The package's own `__init__` imports everything, also what Mamba-2 does not need and what a build without
    CUDA does not have (`selective_scan_cuda`, `transformers`, ...). So an empty module with the package's
    path stands in its place meanwhile; a later `import mamba_ssm` is the real one.

    Raises:
        BackendError: when it is not installed, or fails to import.
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
    """mamba-ssm's `mamba_chunk_scan_combined`; BackendError where it cannot be had."""
    return triton_ops().mamba_chunk_scan_combined


def conv_kernel() -> Callable[..., Tensor]:
    """causal-conv1d's `causal_conv1d_fn`; BackendError where it cannot be had."""
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
    mend = HINTS.get(missing.partition(".")[0])
    if mend is None and ("undefined symbol" in said or "DLL load failed" in said):
        mend = f"build it against this torch: pip uninstall {package}, then {install}"
    return BackendError(f"{package} fails to import ({said})", mend or f"the version that was tried: {install}")


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return "–"


# --- what stands in the way -------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether Triton's interpreter is on, under which the kernels run on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _misfits(device: torch.device, dtype: torch.dtype) -> list[BackendError]:
    """Why the kernels do not take a tensor."""
    said = []
    if device.type != GPU and not (device.type == "cpu" and interpreted()):
        said.append(
            BackendError(f"the tensor is on {device}, the kernel runs on CUDA", "model.to('cuda'), or scan='auto'")
        )
    if dtype not in TYPES:
        said.append(BackendError(f"the kernel does not take {dtype}", "float32 or bfloat16, or scan='chunked'"))
    return said


def _obstacles(load: Callable[[], object]) -> list[BackendError]:
    """Why a kernel runs on no device of this machine: the GPU, its package."""
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


# --- trial runs -------------------------------------------------------------------------------------------


@functools.cache
def scan_fault(device: torch.device, dtype: torch.dtype) -> BackendError | None:
    """What keeps the fused scan from working on a device for inputs of a type; none when it works.

    Runs it in short chunks and in long ones, forward and backward, and compares outputs, state and gradients
    with the loop in float64 on the CPU. Once for each device and type in a process. Running out of memory
    says nothing about the kernel: that error is raised as it is, and the next call tries again.
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
        return _errors(names, functools.partial(run, fused), functools.partial(run, ssd.recurrent), cast, device)

    def tried() -> dict[str, float]:
        short, long = in_chunks_of(SHORT_CHUNK), in_chunks_of(LONG_CHUNK)
        return {name: float(torch.tensor([short[name], long[name]]).max()) for name in short}  # no number stays none

    return trial("the fused scan", tried, device, dtype, tolerance=TOLERANCE.get(dtype, 0.0), mends=MENDS)


@functools.cache
def conv_fault(device: torch.device, dtype: torch.dtype) -> BackendError | None:
    """The same for causal-conv1d, compared with `torch.nn.functional.conv1d`."""
    g = torch.Generator().manual_seed(0)
    t, b, w, taps = 20, 2, 16, 4
    inputs = [torch.randn(*shape, generator=g).to(dtype) for shape in [(t, b, w), (w, 1, taps), (w,)]]

    def reference(parts: list[Tensor]) -> tuple[Tensor, ...]:
        x, weight, bias = parts
        padded = functional.pad(x.permute(1, 2, 0), (taps - 1, 0))
        return (functional.silu(functional.conv1d(padded, weight, bias, groups=w)).permute(2, 0, 1),)

    def tried() -> dict[str, float]:
        return _errors(("y", "dx", "dweight", "dbias"), lambda parts: (conv_silu(*parts),), reference, inputs, device)

    return trial("causal-conv1d", tried, device, dtype, tolerance=TOLERANCE.get(dtype, 0.0), mends=MENDS)


def _errors(
    names: tuple[str, ...],
    run: Callable[[list[Tensor]], tuple[Tensor, ...]],
    reference: Callable[[list[Tensor]], tuple[Tensor, ...]],
    inputs: list[Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Error of each output and gradient on the device, relative to the reference in float64 on the CPU."""

    def everything(function: Callable[[list[Tensor]], tuple[Tensor, ...]], parts: list[Tensor]) -> list[Tensor]:
        parts = [part.requires_grad_() for part in parts]
        outputs = function(parts)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(part.shape, generator=g).to(part.device, part.dtype) for part in outputs]
        gradients = torch.autograd.grad(list(outputs), parts, weights)
        return [part.detach().to("cpu", torch.float64) for part in (*outputs, *gradients)]

    found = everything(run, [part.to(device, copy=True) for part in inputs])
    expected = everything(reference, [part.double() for part in inputs])
    pairs = zip(names, found, expected, strict=True)
    return {name: float((mine - right).norm() / right.norm()) for name, mine, right in pairs}


# --- what is there ----------------------------------------------------------------------------------------

SCANS: dict[str, ssd.Scan] = {
    "auto": auto,
    "recurrent": ssd.recurrent,
    "matrix": ssd.matrix,
    "chunked": ssd.chunked,
    "native": cpu.checked,
    "fused": checked,
}


def backends(device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> list[Backend]:
    """What there is on this machine, and what `auto` takes; runs the kernels once (`scan_fault`).

    Args:
        device: where x would be; the current GPU if there is one, else the CPU, when absent.
        dtype: the type of x.
    """
    if device is None:
        device = torch.device(GPU, torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    ours = f"torch {torch.__version__}"
    rows = [
        Backend("recurrent", True, ours, "runs on every device; a step for each frame"),
        Backend("matrix", True, ours, "runs on every device; memory grows with the square of the length"),
        Backend("chunked", True, ours, "runs on every device; time and memory grow with the length"),
    ]
    trouble = cpu.fault(dtype)
    rows.append(
        Backend("native", True, ours, f"agrees with the reference on cpu in {dtype}")
        if trouble is None
        else Backend("native", False, ours, trouble.why, trouble.mend)
    )
    for name, package, load, fault in (
        ("fused", "mamba-ssm", scan_kernel, scan_fault),
        ("conv", "causal-conv1d", conv_kernel, conv_fault),
    ):
        try:
            refuse(_obstacles(load))
            trouble = fault(device, dtype)
        except BackendError as error:
            trouble = error
        agrees = f"agrees with the reference on {device} in {dtype}"
        why, mend = (agrees, "") if trouble is None else (trouble.why, trouble.mend)
        rows.append(Backend(name, trouble is None, _version(package), why, mend))
    usable = {row.name for row in rows if row.usable}
    chosen = "chunked"
    if device.type == GPU:
        chosen = "fused" if "fused" in usable else chosen
    elif device.type == "cpu" and "native" in usable:
        chosen = "chunked, and native with --compile"
    return [Backend("auto", True, "–", f"takes {chosen} on {device}"), *rows]
