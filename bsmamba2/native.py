"""The mixer's own kernel for CPUs: `mixer.cpp`, built when it is first wanted, used where it gave the right numbers.

    scan      the function of `bsmamba2.ssd`
    mix       convolution, scan and gate of a mixer as one: x, B and C never leave the cache
    rms_norm  of frames

It takes float32 and bfloat16, and has no gradients. It is built on this machine for this machine, in about ten seconds,
with the C++ compiler that `torch.compile` takes as well, and kept on disk for the next process.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import ssd
from .trials import BackendError, refuse, trial

SOURCE = Path(__file__).with_name("mixer.cpp")
FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared")
X86_FLAGS = ("-mprefer-vector-width=512",)  # what has no registers so wide takes two
MEND_COMPILER = "apt install g++, or name a compiler in the environment variable CXX"

LANES = 32  # features that a row of pairs in a register holds: head width and state are multiples
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
"""Largest error of a trial run, relative to float64 in the Euclidean norm; the types that there are."""


# --- building ---------------------------------------------------------------------------------------------


@functools.cache
def operators() -> Any:
    """The operators of `mixer.cpp`, built if this machine has not built them before.

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
    key = hashlib.sha256(repr((SOURCE.read_bytes(), command, torch.__version__, _processor())).encode()).hexdigest()[
        :16
    ]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or _cache() / "torch_extensions")
    library = folder / f"bsmamba2-{key}.so"
    command += [str(SOURCE), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
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
    refuse(misfits(x.device, x.dtype, p, B.shape[-1], (x, dt, A, B, C, D, initial_state)))
    A = A.float().contiguous()
    D = torch.zeros_like(A) if D is None else D.float().contiguous()
    y, state = operators().scan(
        _rows(x.flatten(2)),
        _rows(dt.float()),
        A,
        _rows(B.to(x.dtype)),
        _rows(C.to(x.dtype)),
        D,
        _flat(initial_state),
        ssd.CHUNK,
        return_state,
    )
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
    z: Tensor,
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    before: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What a mixer does between its projections, but for the gain of its norm.

        x, B, C = SiLU(conv(xBC))      y = scan(x, dt, A, B, C, D)      y · SiLU(z) / rms(y · SiLU(z))

    Args:
        z: (b, t, h·p).
        xBC: (b, t, w).
        dt, A, D: as in `scan`.
        weight, bias: of the convolution, (w, 1, taps) and (w,).
        eps: in the root of the norm.
        before: the frames before the first, (b, taps − 1, w); zeros when absent.
        initial_state: (b, h, p, n).

    Returns:
        (b, t, h·p), of the type of xBC, and with `return_state` the state after the last frame.

    Raises:
        BackendError: as `scan`.
    """
    h, w, taps = A.shape[0], xBC.shape[2], weight.shape[2]
    p, n = z.shape[2] // h, (w - z.shape[2]) // 2
    refuse(misfits(xBC.device, xBC.dtype, p, n, (z, xBC, dt, A, D, weight, bias, before, initial_state)))
    if before is None:
        before = xBC.new_zeros(len(xBC), taps - 1, w)
    y, state = operators().mix(
        _rows(z),
        _rows(xBC),
        _rows(dt.float()),
        A.float().contiguous(),
        D.float().contiguous(),
        weight[:, 0].mT.float().contiguous(),
        weight.new_zeros(w).float() if bias is None else bias.float().contiguous(),
        before.to(xBC.dtype).contiguous(),
        _flat(initial_state),
        eps,
        ssd.CHUNK,
        return_state,
    )
    return y, _unflat(state, h) if return_state else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x · rsqrt(mean x² + eps) · weight over the last axis, a multiple of 32: (..., d), (d,) → (..., d), type of x."""
    return operators().rms_norm(x.contiguous(), weight.float().contiguous(), eps)


def normalises(x: Tensor) -> bool:
    """Whether `rms_norm` takes x, and works here."""
    return x.device.type == "cpu" and x.dtype in TOLERANCE and not x.shape[-1] % LANES and fault(x.dtype) is None


def _rows(x: Tensor) -> Tensor:
    """With the features of a frame side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _flat(state: Tensor | None) -> Tensor | None:
    """(b, h, p, n) → (b, n, h·p)."""
    return None if state is None else state.float().permute(0, 3, 1, 2).flatten(2).contiguous()


def _unflat(state: Tensor, h: int) -> Tensor:
    return state.unflatten(2, (h, -1)).permute(0, 2, 3, 1)


def misfits(
    device: torch.device, dtype: torch.dtype, p: int, n: int, inputs: tuple[Tensor | None, ...] = ()
) -> list[BackendError]:
    """Why the operators do not take tensors."""
    said = []
    if device.type != "cpu":
        said.append(BackendError(f"the tensor is on {device}, the native kernel runs on a CPU", "scan='auto'"))
    if dtype not in TOLERANCE:
        said.append(BackendError(f"the native kernel does not take {dtype}", "float32, bfloat16, or scan='chunked'"))
    if p % LANES or n % LANES:
        said.append(
            BackendError(f"head_width={p} and state={n} must be multiples of {LANES}", "others, or scan='chunked'")
        )
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in inputs):
        said.append(BackendError("the native kernel has no gradients", "torch.inference_mode(), or scan='auto'"))
    return said


# --- trial run --------------------------------------------------------------------------------------------


@functools.cache
def fault(dtype: torch.dtype) -> BackendError | None:
    """What keeps the operators from working on this CPU for inputs of a type; none when they work.

    Builds them, runs each once, on 80 frames with a state before them, and compares with the loop in float64. Once for
    each type in a process. Running out of memory says nothing about the kernel, and is raised as it is.
    """
    g = torch.Generator().manual_seed(0)
    b, t, h, p, n, taps = 2, 80, 2, 32, 64, 4  # two chunks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    xBC, z, before = normal(b, t, h * p + 2 * n), normal(b, t, h * p), normal(b, taps - 1, h * p + 2 * n)
    dt, A, D = functional.softplus(normal(b, t, h) - 2), -torch.tensor([1.0, 60.0]), normal(h)  # one forgets at once
    weight, bias, first = normal(h * p + 2 * n, 1, taps), normal(h * p + 2 * n), normal(b, h, p, n)
    xBC, z, before = (part.to(dtype) for part in (xBC, z, before))

    def parts(xBC: Tensor) -> Iterator[Tensor]:
        x, B, C = xBC.split((h * p, n, n), dim=-1)
        return iter((x.unflatten(2, (h, p)), B, C))

    def expected(convolved: bool) -> list[Tensor]:
        wide = xBC.double()
        if convolved:
            padded = torch.cat((before.double(), wide), dim=1).mT
            wide = functional.silu(functional.conv1d(padded, weight.double(), bias.double(), groups=len(bias))).mT
        x, B, C = parts(wide)
        inputs = (x, dt.double(), A.double(), B, C, D.double())
        y, state = ssd.recurrent(*inputs, initial_state=first.double(), return_state=True)
        y = y.flatten(2)
        if convolved:
            y = y * functional.silu(z.double())
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return [y, state]

    def tried() -> dict[str, float]:
        x, B, C = parts(xBC)
        y, state = scan(x, dt, A, B, C, D, initial_state=first, return_state=True)
        mixed = mix(z, xBC, dt, A, D, weight, bias, eps=1e-5, before=before, initial_state=first, return_state=True)
        normed = functional.rms_norm(z.double(), (h * p,), D.double().repeat(p), 1e-5)
        found = [y.flatten(2), state, *mixed, rms_norm(z, D.repeat(p), 1e-5)]
        pairs = zip(found, [*expected(False), *expected(True), normed], strict=True)
        errors = [float((mine.double() - right).norm() / right.norm()) for mine, right in pairs]
        return dict(zip(("y", "state", "the mixer's y", "its state", "the norm"), errors, strict=True))

    build = "a newer torch or C++ compiler, and for bfloat16 a CPU with AMX; the chunked form runs meanwhile"
    return trial(
        "the native kernel", tried, torch.device("cpu"), dtype, tolerance=TOLERANCE[dtype], mends=(build, build)
    )
