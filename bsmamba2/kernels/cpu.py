"""The mixer's own kernel for CPUs: C++, in `cpp`, built when first wanted, used where it gave the right numbers.

    scan      the function of `bsmamba2.ssd`
    mix       convolution, scan and gate of a mixer as one: x, B and C never leave the cache
    rms_norm  of frames, without gradients

It takes float32 and bfloat16. The first two have gradients, for which nothing is kept but their inputs. It is built on
this machine for this machine, in about twenty seconds, with the C++ compiler that `torch.compile` takes as well, and
kept on disk for the next process.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ssd
from .self_test import BackendError, refuse, trial

SOURCES = Path(__file__).with_name("cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
X86_FLAGS = ("-mprefer-vector-width=512",)  # what has no registers so wide takes two
MEND_COMPILER = "apt install g++, or name a compiler in the environment variable CXX"

WIDTH_MULTIPLE = 32  # features that a row of pairs in a register holds: head width and state are multiples
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
"""Largest error of a trial run, relative to float64 in the Euclidean norm; the types that there are."""


# --- building ---------------------------------------------------------------------------------------------


@functools.cache
def operators() -> Any:
    """The operators of `cpp/mixer.cpp`, built if this machine has not built them before.

    Raises:
        BackendError: without a compiler, where it fails, or on another system than Linux.
    """
    if sys.platform != "linux":
        raise BackendError(f"it is built on Linux only so far, not on {sys.platform}", "Linux, or scan='chunked'")
    root = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *FLAGS, *(X86_FLAGS if platform.machine() == "x86_64" else ())]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += ["-isystem", str(root / "include")]
    # What the result depends on, the processor included: a home may be shared by machines that differ.
    sources = [path.read_bytes() for path in sorted(SOURCES.glob("*"))]
    key = hashlib.sha256(repr((sources, command, torch.__version__, _processor())).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _cache() / "torch_extensions")
    library = folder / f"bsmamba2-{key}.so"
    command += [str(SOURCES / "mixer.cpp"), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    if not library.exists():
        _build(command, library)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BackendError(f"{library} cannot be loaded ({error})", "remove the file: it is built again") from error
    return torch.ops.bsmamba2


def _build(command: list[str], library: Path) -> None:
    """Under another name first: what a killed process leaves behind is never loaded, and two may build at once."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise BackendError(f"{command[0]} fails to build it ({said.strip()})", "g++ 11 or clang 14, or newer")
            made.replace(library)
    except FileNotFoundError as error:
        raise BackendError(f"there is no C++ compiler {command[0]!r}", MEND_COMPILER) from error
    except OSError as error:
        raise BackendError(
            f"{library.parent} cannot be written ({error.strerror})", "another folder in TORCH_EXTENSIONS_DIR"
        ) from error


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _processor() -> str:
    """What `-march=native` looks at."""
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
    """The scan, with the signature of `bsmamba2.ssd`, which has the shapes. Nothing is tried before: that is `checked`.

    Raises:
        BackendError: where it cannot be built, or for a tensor that it does not take.
        ValueError: for shapes that do not fit.
    """
    ssd.check(x, dt, A, B, C, D, initial_state)
    _, _, h, p = x.shape
    refuse(misfits(x.device, x.dtype, p, B.shape[-1]))
    A = A.float().contiguous()
    D = torch.zeros_like(A) if D is None else D.float().contiguous()
    B, C = (_rows(part.to(x.dtype)) for part in (B, C))
    inputs = (_rows(x.flatten(2)), _rows(dt.float()), A, B, C, D, _flat(initial_state))
    y, state = _Scan.apply(*inputs, return_state)
    y = y.unflatten(2, (h, p))
    return (y, _unflat(state, h)) if return_state else y


def checked(x: Tensor, *inputs: Any, **options: Any) -> Any:
    """`scan`, after its trial run: what the name "native" stands for.

    Raises:
        BackendError: when it cannot run here, or gave other numbers than ours.
    """
    require(x.dtype)
    return scan(x, *inputs, **options)


def require(dtype: torch.dtype) -> None:
    """BackendError when the trial run for a type failed."""
    wrong = fault(dtype) if dtype in TOLERANCE else None
    if wrong is not None:
        raise wrong


def mix(
    projected: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    before: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    backwards: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a mixer does between its projections, but for the gain of its norm.

        x, B, C = SiLU(conv(xBC))      y = scan(x, softplus(dt + dt_bias), A, B, C, D)
        y · SiLU(z) / rms(y · SiLU(z))

    Args:
        projected: z, xBC and dt side by side, (b, t, h·p + w + h).
        dt_bias, A, D: (h,).
        weight, bias: of the convolution, (w, 1, taps) and (w,).
        eps: in the root of the norm.
        before: xBC of the frames before the first, (b, taps − 1, w); zeros when absent.
        initial_state: (b, h, p, n).
        backwards: read the frames from the last to the first: "before" and "after" then look the other way.
        out: where to put the first result, without gradients.

    Returns:
        (b, t, h·p), of the type of `projected`, and with `return_state` the state after the last frame.

    Raises:
        BackendError, ValueError: as `scan`.
    """
    (b, t, _), h, (w, _, taps) = projected.shape, A.shape[0], weight.shape
    inner = projected.shape[2] - w - h
    p, n = inner // h, (w - inner) // 2
    refuse(misfits(projected.device, projected.dtype, p, n))
    if inner != h * p or w != inner + 2 * n:
        raise ValueError(f"projected {tuple(projected.shape)} does not hold z, xBC of {w} and dt of {h} side by side")
    ssd.check_beside(
        "projected",
        projected,
        dt_bias=(dt_bias, (h,)),
        D=(D, (h,)),
        bias=(bias, (w,)),
        before=(before, (b, taps - 1, w)),
        initial_state=(initial_state, (b, h, p, n)),
        out=(out, (b, t, inner)),
    )
    if out is not None and (out.stride(2) != 1 or out.dtype != projected.dtype):
        raise ValueError(f"out must be {projected.dtype} with the features of a frame side by side")
    if before is None:
        before = projected.new_zeros(b, taps - 1, w)
    inputs = (
        _rows(projected),
        dt_bias.float(),
        A.float().contiguous(),
        D.float().contiguous(),
        weight[:, 0].mT.float().contiguous(),
        weight.new_zeros(w).float() if bias is None else bias.float().contiguous(),
        before.to(projected.dtype).contiguous(),
        _flat(initial_state),
        eps,
        backwards,
        return_state,
    )
    y, state = _Mix.apply(*inputs) if out is None else _Mix.run(*inputs, y=out)
    return y, None if state is None else _unflat(state, h)


class _Scan(torch.autograd.Function):
    """The operator `scan` with its gradients: x and y (b, t, h·p), states (b, n, h·p)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, keep = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        y, state = operators().scan(*tensors, ssd.CHUNK, keep)
        return y, state if keep else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, state = ctx.saved_tensors
        dy, dlast = _gradients(x, *gradients)
        dx, ddt, dA, dB, dC, dD, dstate = operators().scan_backward(dy, dlast, x, dt, A, B, C, D, state, ssd.CHUNK)
        return dx, ddt, dA.sum(0), dB, dC, dD.sum(0), None if state is None else dstate, None


class _Mix(torch.autograd.Function):
    """The operator `mix`, after softplus, with its gradients; those of all that was projected in one tensor."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, ctx.eps, ctx.backwards, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _Mix.run(*inputs)

    @staticmethod
    def run(*inputs: Any, y: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        projected, dt_bias, A, D, taps, bias, before, state, eps, backwards, keep = inputs
        z, xBC, dt = _Mix.parts(projected, dt_bias, taps)
        y = z.new_empty(z.shape) if y is None else y
        dt = functional.softplus(dt)
        state = operators().mix(z, xBC, dt, A, D, taps, bias, before, state, eps, ssd.CHUNK, backwards, keep, y)
        return y, state if keep else None

    @staticmethod
    def parts(projected: Tensor, dt_bias: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xBC, and the argument of softplus."""
        w, h = taps.shape[1], len(dt_bias)
        z, xBC, dt = projected.split((projected.shape[2] - w - h, w, h), dim=-1)
        return z, xBC, dt.float() + dt_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        projected, dt_bias, A, D, taps, bias, before, state = ctx.saved_tensors
        z, xBC, dt = _Mix.parts(projected, dt_bias, taps)
        dy, dlast = _gradients(z, *gradients)
        dprojected = torch.empty_like(projected)
        dz, dxBC, last = dprojected.split((z.shape[2], xBC.shape[2], len(A)), dim=-1)
        options = (ctx.eps, ssd.CHUNK, ctx.backwards)
        ddt, dA, dD, dtaps, dbias, dbefore, dstate = operators().mix_backward(
            dy, dlast, z, xBC, functional.softplus(dt), A, D, taps, bias, before, state, *options, dz, dxBC
        )
        ddt *= dt.sigmoid()
        last.copy_(ddt)
        of_model = (each.sum(0) for each in (dA, dD, dtaps, dbias))
        return dprojected, ddt.sum((0, 1)), *of_model, dbefore, None if state is None else dstate, None, None, None


def _gradients(y: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """By y, zeros where nothing asks for it, and by the last state if something does."""
    return torch.zeros_like(y) if dy is None else _rows(dy), None if dlast is None else dlast.contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x · rsqrt(mean x² + eps) · weight over the last axis, a multiple of 32: (..., d), (d,) → (..., d), type of x."""
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    return operators().rms_norm(x.contiguous(), weight.float().contiguous(), eps)


def normalises(x: Tensor) -> bool:
    """Whether `rms_norm` takes x, and works here."""
    return (
        x.device.type == "cpu" and x.dtype in TOLERANCE and not x.shape[-1] % WIDTH_MULTIPLE and fault(x.dtype) is None
    )


def _rows(x: Tensor) -> Tensor:
    """With the features of a frame side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(state: Tensor | None) -> Tensor | None:
    """(b, h, p, n) → (b, n, h·p)."""
    return None if state is None else state.float().permute(0, 3, 1, 2).flatten(2).contiguous()


def _unflat(state: Tensor, h: int) -> Tensor:
    return state.unflatten(2, (h, -1)).permute(0, 2, 3, 1)


def misfits(device: torch.device, dtype: torch.dtype, p: int, n: int) -> list[BackendError]:
    """Why the operators do not take tensors."""
    said = []
    if device.type != "cpu":
        said.append(BackendError(f"the tensor is on {device}, the native kernel runs on a CPU", "scan='auto'"))
    if dtype not in TOLERANCE:
        said.append(BackendError(f"the native kernel does not take {dtype}", "float32, bfloat16, or scan='chunked'"))
    if p % WIDTH_MULTIPLE or n % WIDTH_MULTIPLE:
        said.append(
            BackendError(
                f"headdim={p} and state={n} must be multiples of {WIDTH_MULTIPLE}", "others, or scan='chunked'"
            )
        )
    return said


# --- trial run --------------------------------------------------------------------------------------------


@functools.cache
def fault(dtype: torch.dtype) -> BackendError | None:
    """What keeps the operators from working on this CPU for inputs of a type; none when they work.

    Builds them, runs each once with its gradients, the mixer also from the last frame to the first, and compares with
    the loop in float64. Once for each type in a process. Too little memory says nothing about the kernel: it is raised.
    """
    build = "a newer torch or C++ compiler, and for bfloat16 a CPU with AMX; the chunked form runs meanwhile"
    return trial(
        "the native kernel",
        functools.partial(_errors, dtype),
        torch.device("cpu"),
        dtype,
        tolerance=TOLERANCE[dtype],
        mends=(build, build),
    )


def _errors(dtype: torch.dtype) -> dict[str, float]:
    """Of all that comes out of the operators, on 80 frames with a state before them, and of its gradients."""
    g = torch.Generator().manual_seed(0)
    b, t, h, p, n, taps = 2, 80, 2, 32, 64, 4  # two chunks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    w = h * p + 2 * n
    inputs = {
        "what is projected": normal(b, t, h * p + w + h).to(dtype),
        "dt_bias": torch.full((h,), -2.0),
        "A": -torch.tensor([1.0, 60.0]),  # one forgets at once
        "D": normal(h),
        "the weight": normal(w, 1, taps),
        "the bias": normal(w),
        "what is before": normal(b, taps - 1, w).to(dtype),
        "the first state": normal(b, h, p, n),
    }
    of_y, of_state = (b, t, h * p), (b, h, p, n)
    weights = [normal(*shape) for shape in (of_y, of_state, of_y, of_state, of_y)]  # of what comes out, in a sum

    def separate(projected: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = projected.split((h * p, w, h), dim=-1)
        return z, xBC, functional.softplus(dt.to(dt_bias.dtype) + dt_bias)

    def scanned(run: ssd.Scan, xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        x, B, C = xBC.split((h * p, n, n), dim=-1)
        y, state = run(x.unflatten(2, (h, p)), dt, A, B, C, D, initial_state=first, return_state=True)
        return y.flatten(2), state

    def loop(*inputs: Tensor) -> tuple[Tensor, ...]:
        projected, dt_bias, A, D, weight, bias, before, first = inputs
        z, xBC, dt = separate(projected, dt_bias)
        padded = torch.cat((before, xBC), dim=1).mT
        convolved = functional.silu(functional.conv1d(padded, weight, bias, groups=w)).mT
        y, state = scanned(ssd.recurrent, convolved, dt, A, D, first)
        y = y * functional.silu(z)
        mixed = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return *scanned(ssd.recurrent, xBC, dt, A, D, first), mixed, state, mixed

    def kernel(*inputs: Tensor) -> tuple[Tensor, ...]:
        projected, dt_bias, A, D, _, _, before, first = inputs
        _, xBC, dt = separate(projected, dt_bias)
        mixed, state = mix(*inputs[:6], eps=1e-5, before=before, initial_state=first, return_state=True)
        assert state is not None
        turned = mix(projected.flip(1), *inputs[1:6], eps=1e-5, before=before, initial_state=first, backwards=True)[0]
        return *scanned(scan, xBC, dt, A, D, first), mixed, state, turned.flip(1)

    def there_and_back(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
        leaves = [part.requires_grad_() for part in inputs]
        found = run(*leaves)
        total = torch.stack([(part * weight).sum().double() for part, weight in zip(found, weights, strict=True)]).sum()
        return [part.detach() for part in (*found, *torch.autograd.grad(total, leaves))]

    found = there_and_back(kernel, [part.clone() for part in inputs.values()])
    right = there_and_back(loop, [part.double() for part in inputs.values()])
    z, gain = inputs["what is projected"][..., : h * p], inputs["D"].repeat(p)
    found.append(rms_norm(z, gain, 1e-5))
    right.append(functional.rms_norm(z.double(), (h * p,), gain.double(), 1e-5))
    names = (
        "y",
        "state",
        "the mixer's y",
        "its state",
        "y read backwards",
        *(f"the gradient of {each}" for each in inputs),
        "the norm",
    )
    pairs = zip(found, right, strict=True)
    return dict(zip(names, (float((a.double() - b).norm() / b.norm()) for a, b in pairs), strict=True))
