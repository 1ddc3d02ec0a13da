"""The mixer's own kernel for CPUs: C++, in `cpp`, built when first wanted, used where its self-test passes.

    scan             the function of `bsmamba2.ssd`
    conv_scan_gate   convolution, scan and gate of a mixer fused: x, B and C never leave the cache
    rms_norm         of frames, without gradients

It takes float32 and bfloat16. The first two have gradients, for which only their inputs are kept. It is built on this
machine for this machine with a C++ compiler, and kept on disk for the next process (`load_extension`).

Book: "The fused kernel". Axis letters: see `bsmamba2.config`; w is the width of the convolution, h·p + 2n.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ssd
from ..mamba2 import EPS
from .self_test import BackendError, raise_unsupported, self_test

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
X86_FLAGS = ("-mprefer-vector-width=512",)  # a processor without registers so wide uses two
FIX_COMPILER = "apt install g++, or name a compiler in the environment variable CXX"
BUILD_TIMEOUT = 600  # seconds

WIDTH_MULTIPLE = 32
"""Headdim and d_state must be multiples of it: the features that two rows of registers hold."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
"""Largest error of a self-test, relative to float64 in the Euclidean norm, for each type that the kernel takes."""

build_seconds: float | None = None
"""How long the extension took to build in this process; none when it was not built, or found on disk."""


# --- building ---------------------------------------------------------------------------------------------


@functools.cache
def load_extension() -> Any:
    """Load the operators of `cpp/mixer.cpp`, built first if this machine has not built them before.

    Raises:
        BackendError: without a compiler, where it fails, or on another system than Linux.
    """
    if sys.platform != "linux":
        raise BackendError(f"it is built on Linux only so far, not on {sys.platform}", "Linux")
    root = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *FLAGS, *(X86_FLAGS if platform.machine() == "x86_64" else ())]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += ["-isystem", str(root / "include")]
    # All that the result depends on, the processor included: a home may be shared by machines that differ.
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*"))]
    key = hashlib.sha256(repr((sources, command, torch.__version__, _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / f"bsmamba2-{key}.so"
    command += [str(SOURCES / "mixer.cpp"), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    if not library.exists():
        _build(command, library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BackendError(f"{library} cannot be loaded ({error})", "remove the file: it is built again") from error
    return torch.ops.bsmamba2


def cache_folder() -> Path:
    """The folder in which the extension is kept between runs: TORCH_EXTENSIONS_DIR, or one in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(home) / "torch_extensions")


def _build(command: list[str], library: Path) -> None:
    """Build under a temporary name: a half-written file is never loaded, and two processes may build at once."""
    global build_seconds
    started = time.perf_counter()
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=BUILD_TIMEOUT)
            if done.returncode:
                line = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise BackendError(f"{command[0]} fails to build it ({line.strip()})", "g++ 11 or clang 14, or newer")
            made.replace(library)
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{command[0]} takes more than {BUILD_TIMEOUT} s to build it", FIX_COMPILER) from error
    except FileNotFoundError as error:
        raise BackendError(f"there is no C++ compiler {command[0]!r}", FIX_COMPILER) from error
    except OSError as error:
        raise BackendError(
            f"{library.parent} cannot be written ({error.strerror})", "another folder in TORCH_EXTENSIONS_DIR"
        ) from error
    build_seconds = time.perf_counter() - started


def _processor() -> str:
    """The properties of the processor that `-march=native` reads."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


# --- the operators ----------------------------------------------------------------------------------------


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
    """The scan, with the signature of `bsmamba2.ssd`, which has the shapes. Not self-tested: see `verified_scan`.

    Raises:
        BackendError: where it cannot be built, or for a tensor that it does not take.
        ValueError: for shapes that do not fit.
    """
    ssd.check(x, dt, A, B, C, D, initial_state)
    _, _, h, p = x.shape
    raise_unsupported(unsupported_reasons(x.device, x.dtype, p, B.shape[-1]))
    A = A.float().contiguous()
    D = torch.zeros_like(A) if D is None else D.float().contiguous()
    B, C = (_rows(part.to(x.dtype)) for part in (B, C))
    inputs = (_rows(x.flatten(2)), _rows(dt.float()), A, B, C, D, _pack_state(initial_state))
    y, state = _Scan.apply(*inputs, return_state)
    y = y.unflatten(2, (h, p))
    return (y, _unpack_state(state, h)) if return_state else y


def verified_scan(x: Tensor, *inputs: Any, **options: Any) -> Any:
    """`scan`, after its self-test.

    Raises:
        BackendError: when it cannot run here, or its self-test fails.
    """
    if x.dtype in TOLERANCE and (error := self_test_error(x.dtype)) is not None:
        raise error
    return scan(x, *inputs, **options)


def conv_scan_gate(
    projected: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backwards: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolution, scan and gate of a mixer, fused: all between its projections, but for the gain of its norm.

        x, B, C = SiLU(conv(xBC))      y = scan(x, softplus(dt + dt_bias), A, B, C, D)
        y · SiLU(z) / rms(y · SiLU(z))

    Args:
        projected: z, xBC and dt concatenated, (b, t, h·p + w + h).
        dt_bias, A, D: (h,).
        weight, bias: of the convolution, (w, 1, taps) and (w,).
        conv_state: xBC of the frames before the first, (b, taps − 1, w); zeros when absent.
        initial_state: (b, h, p, n).
        backwards: read the frames from the last to the first; states then belong to the other ends.
        out: where to put the first result, without gradients.

    Returns:
        (b, t, h·p), of the type of `projected`, and with `return_state` the state after the last frame.

    Raises:
        BackendError, ValueError: as `scan`.
    """
    (b, t, _), h, (w, _, taps) = projected.shape, A.shape[0], weight.shape
    inner = projected.shape[2] - w - h
    p, n = inner // h, (w - inner) // 2
    raise_unsupported(unsupported_reasons(projected.device, projected.dtype, p, n))
    if inner != h * p or w != inner + 2 * n:
        raise ValueError(f"projected {tuple(projected.shape)} does not hold z, xBC of {w} and dt of {h} features")
    ssd.check_shapes(
        "projected",
        projected,
        dt_bias=(dt_bias, (h,)),
        D=(D, (h,)),
        bias=(bias, (w,)),
        conv_state=(conv_state, (b, taps - 1, w)),
        initial_state=(initial_state, (b, h, p, n)),
        out=(out, (b, t, inner)),
    )
    if out is not None and (out.stride(2) != 1 or out.dtype != projected.dtype):
        raise ValueError(f"out must be {projected.dtype} with the features of a frame contiguous")
    if conv_state is None:
        conv_state = projected.new_zeros(b, taps - 1, w)
    inputs = (
        _rows(projected),
        dt_bias.float(),
        A.float().contiguous(),
        D.float().contiguous(),
        weight[:, 0].mT.float().contiguous(),
        weight.new_zeros(w).float() if bias is None else bias.float().contiguous(),
        conv_state.to(projected.dtype).contiguous(),
        _pack_state(initial_state),
        backwards,
        return_state,
    )
    y, state = _ConvScanGate.apply(*inputs) if out is None else _ConvScanGate.run(*inputs, y=out)
    return y, None if state is None else _unpack_state(state, h)


class _Scan(torch.autograd.Function):
    """The operator `scan` with its gradients: x and y (b, t, h·p), states (b, n, h·p)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, return_state = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        y, state = load_extension().scan(*tensors, ssd.CHUNK, return_state)
        return y, state if return_state else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, state = ctx.saved_tensors
        dy, dlast = _gradients(x, *gradients)
        dx, ddt, dA, dB, dC, dD, dstate = load_extension().scan_backward(dy, dlast, x, dt, A, B, C, D, state, ssd.CHUNK)
        return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), None if state is None else dstate, None


class _ConvScanGate(torch.autograd.Function):
    """The operator `conv_scan_gate`, after softplus, with its gradients; those of `projected` in one tensor."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, ctx.backwards, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _ConvScanGate.run(*inputs)

    @staticmethod
    def run(*inputs: Any, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        projected, dt_bias, A, D, taps, bias, conv_state, state, backwards, return_state = inputs
        z, xBC, dt = _ConvScanGate.parts(projected, dt_bias, taps)
        y = z.new_empty(z.shape) if y is None else y
        options = (EPS, ssd.CHUNK, backwards, return_state, y)
        dt = functional.softplus(dt)
        state = load_extension().conv_scan_gate(z, xBC, dt, A, D, taps, bias, conv_state, state, *options)
        return y, state if return_state else None

    @staticmethod
    def parts(projected: Tensor, dt_bias: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xBC, and the argument of softplus."""
        w, h = taps.shape[1], len(dt_bias)
        z, xBC, dt = projected.split((projected.shape[2] - w - h, w, h), dim=-1)
        return z, xBC, dt.float() + dt_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        projected, dt_bias, A, D, taps, bias, conv_state, state = ctx.saved_tensors
        z, xBC, dt = _ConvScanGate.parts(projected, dt_bias, taps)
        dy, dlast = _gradients(z, *gradients)
        dprojected = torch.empty_like(projected)
        dz, dxBC, last = dprojected.split((z.shape[2], xBC.shape[2], len(A)), dim=-1)
        options = (EPS, ssd.CHUNK, ctx.backwards)
        ddt, dA, dD, dtaps, dbias, dconv_state, dstate = load_extension().conv_scan_gate_backward(
            dy, dlast, z, xBC, functional.softplus(dt), A, D, taps, bias, conv_state, state, *options, dz, dxBC
        )
        ddt *= dt.sigmoid()
        last.copy_(ddt)
        parameters = (part.sum(0) for part in (dA, dD, dtaps, dbias))
        return dprojected, ddt.sum((0, 1)), *parameters, dconv_state, None if state is None else dstate, None, None


def _gradients(y: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradient of y, zeros where nothing depends on it, and that of the last state if something does."""
    return torch.zeros_like(y) if dy is None else _rows(dy), None if dlast is None else dlast.contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm, x · rsqrt(mean x² + eps) · weight over the last axis, a multiple of 32: (..., d), (d,) → (..., d).

    It has no gradients. x is float32 or bfloat16, and so is the result.
    """
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    return load_extension().rms_norm(x.contiguous(), weight.float().contiguous(), eps)


def _rows(x: Tensor) -> Tensor:
    """x with the features of a frame contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pack_state(state: Tensor | None) -> Tensor | None:
    """(b, h, p, n) → (b, n, h·p)."""
    return None if state is None else state.float().permute(0, 3, 1, 2).flatten(2).contiguous()


def _unpack_state(state: Tensor, h: int) -> Tensor:
    return state.unflatten(2, (h, -1)).permute(0, 2, 3, 1)


def unsupported_reasons(device: torch.device, dtype: torch.dtype, p: int, n: int) -> list[BackendError]:
    """Why the operators do not take tensors of a device, type and size; empty when they do."""
    reasons = []
    if device.type != "cpu":
        reasons.append(BackendError(f"the tensor is on {device}, the C++ kernel runs on a CPU", "backend='auto'"))
    if dtype not in TOLERANCE:
        reasons.append(BackendError(f"the C++ kernel does not take {dtype}", "float32, bfloat16, or backend='plain'"))
    if p % WIDTH_MULTIPLE or n % WIDTH_MULTIPLE:
        reason = f"headdim={p} and d_state={n} must be multiples of {WIDTH_MULTIPLE} for the C++ kernel"
        reasons.append(BackendError(reason, "other sizes, or backend='plain'"))
    return reasons


# --- self-test --------------------------------------------------------------------------------------------


@functools.cache
def self_test_error(dtype: torch.dtype) -> BackendError | None:
    """The fault that keeps the operators from working on this CPU for inputs of a type; none when they work.

    Builds them, runs each once with its gradients, the mixer also from the last frame to the first, and compares with
    the recurrence in float64. Once for each type in a process. Too little memory is raised.
    """
    fix = "a newer torch or C++ compiler, and for bfloat16 a CPU with AMX; the chunked form runs meanwhile"
    errors = functools.partial(_errors, dtype)
    return self_test("the C++ kernel", errors, torch.device("cpu"), dtype, tolerance=TOLERANCE[dtype], fixes=(fix, fix))


def _errors(dtype: torch.dtype) -> dict[str, float]:
    """Errors of every output of the operators, on 80 frames that follow a state, and of its gradients."""
    g = torch.Generator().manual_seed(0)
    b, t, h, p, n, taps = 2, 80, 2, 32, 64, 4  # two chunks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    w = h * p + 2 * n
    inputs = {
        "projected": normal(b, t, h * p + w + h).to(dtype),
        "dt_bias": torch.full((h,), -2.0),
        "A": -torch.tensor([1.0, 60.0]),  # one forgets at once
        "D": normal(h),
        "weight": normal(w, 1, taps),
        "bias": normal(w),
        "conv_state": normal(b, taps - 1, w).to(dtype),
        "initial_state": normal(b, h, p, n),
    }
    y_shape, state_shape = (b, t, h * p), (b, h, p, n)
    weights = [normal(*shape) for shape in (y_shape, state_shape, y_shape, state_shape, y_shape)]  # of a sum of outputs

    def split(projected: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = projected.split((h * p, w, h), dim=-1)
        return z, xBC, functional.softplus(dt.to(dt_bias.dtype) + dt_bias)

    def scanned(run: ssd.Scan, xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        x, B, C = xBC.split((h * p, n, n), dim=-1)
        y, state = run(x.unflatten(2, (h, p)), dt, A, B, C, D, initial_state=first, return_state=True)
        return y.flatten(2), state

    def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
        projected, dt_bias, A, D, weight, bias, conv_state, first = inputs
        z, xBC, dt = split(projected, dt_bias)
        padded = torch.cat((conv_state, xBC), dim=1).mT
        convolved = functional.silu(functional.conv1d(padded, weight, bias, groups=w)).mT
        y, state = scanned(ssd.recurrent, convolved, dt, A, D, first)
        y = y * functional.silu(z)
        gated = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt()
        return *scanned(ssd.recurrent, xBC, dt, A, D, first), gated, state, gated

    def kernel(*inputs: Tensor) -> tuple[Tensor, ...]:
        projected, dt_bias, A, D, _, _, conv_state, first = inputs
        _, xBC, dt = split(projected, dt_bias)
        states: dict[str, Any] = {"conv_state": conv_state, "initial_state": first}
        gated, state = conv_scan_gate(*inputs[:6], **states, return_state=True)
        assert state is not None
        backwards, _ = conv_scan_gate(projected.flip(1), *inputs[1:6], **states, backwards=True)
        return *scanned(scan, xBC, dt, A, D, first), gated, state, backwards.flip(1)

    def outputs_and_gradients(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
        leaves = [part.requires_grad_() for part in inputs]
        found = run(*leaves)
        total = torch.stack([(part * weight).sum().double() for part, weight in zip(found, weights, strict=True)]).sum()
        return [part.detach() for part in (*found, *torch.autograd.grad(total, leaves))]

    found = outputs_and_gradients(kernel, [part.clone() for part in inputs.values()])
    expected = outputs_and_gradients(reference, [part.double() for part in inputs.values()])
    z, gain = inputs["projected"][..., : h * p], inputs["D"].repeat(p)
    found.append(rms_norm(z, gain, EPS))
    expected.append(functional.rms_norm(z.double(), (h * p,), gain.double(), EPS))
    outputs = ("y", "state", "the mixer's y", "its state", "y read backwards")
    names = (*outputs, *(f"the gradient of {name}" for name in inputs), "the norm")
    pairs = zip(found, expected, strict=True)
    return dict(zip(names, (float((a.double() - b).norm() / b.norm()) for a, b in pairs), strict=True))
