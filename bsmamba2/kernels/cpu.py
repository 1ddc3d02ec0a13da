"""C++ kernel of the mixer for CPUs (sources in `cpp`), built at first use; it runs if its self-test passes.

    scan             the function of `bsmamba2.ssd`
    conv_scan_gate   convolution, scan and gate of a mixer fused: x, B and C never leave the cache
    rms_norm         RMS norm of frames, without gradients

It supports float32 and bfloat16. The first two operators have gradients and keep only their inputs for the backward
pass. `extension` builds the kernel on this machine with a C++ compiler, and caches it for later processes.

Book: "Appendix: the CPU kernel". Axis letters: see `bsmamba2.config`; w is the width of the convolution, h·p + 2n.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import ssd
from ..mamba2 import EPS, causal_conv1d_silu
from .extension import load_extension
from .self_test import BackendError, raise_unsupported, relative_errors, self_test

WIDTH_MULTIPLE = 32
"""Headdim and d_state must be multiples of this number of features, which fills two rows of registers."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}
"""Tolerance of the self-test for each supported type: error relative to float64, in the Euclidean norm."""


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
    """The scan in C++, with the signature and shapes of `bsmamba2.ssd`. It does not run the self-test.

    Raises:
        BackendError: if the kernel cannot be built, or does not support the tensor.
        ValueError: if shapes do not match.
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
    """Fused convolution, scan and gate of a mixer: everything between its projections except the gain of its norm.

        x, B, C = SiLU(conv(xBC))      y = scan(x, softplus(dt + dt_bias), A, B, C, D)
        y · SiLU(z) / rms(y · SiLU(z))

    Args:
        projected: z, xBC and dt concatenated, (b, t, h·p + w + h).
        dt_bias, A, D: (h,).
        weight, bias: parameters of the convolution, (w, 1, taps) and (w,).
        conv_state: xBC of the frames before the first one, (b, taps − 1, w); zeros if None.
        initial_state: (b, h, p, n); zeros if None.
        return_state: whether to return the last state.
        backwards: read the frames from last to first; "first" and "last" then refer to the reading order.
        out: buffer for the first result, which then has no gradients.

    Returns:
        (b, t, h·p), in the type of `projected`, and the state after the last frame, or None without `return_state`.

    Raises:
        BackendError, ValueError: as for `scan`.
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
    """The operator `conv_scan_gate` after softplus, with its gradients; the gradient of `projected` is one tensor."""

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
        """Split into z, xBC and dt + dt_bias, the argument of softplus."""
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
    """Gradients of y and of the last state; if nothing depends on them, zeros for y and None for the state."""
    return torch.zeros_like(y) if dy is None else _rows(dy), None if dlast is None else dlast.contiguous()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm, x · rsqrt(mean x² + eps) · weight over the last axis: (..., d), (d,) → (..., d); d is a multiple of 32.

    It has no gradients. x is float32 or bfloat16, and the result has the type of x.
    """
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    return load_extension().rms_norm(x.contiguous(), weight.float().contiguous(), eps)


def _rows(x: Tensor) -> Tensor:
    """Make the features of each frame in x contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pack_state(state: Tensor | None) -> Tensor | None:
    """(b, h, p, n) → (b, n, h·p)."""
    return None if state is None else state.float().permute(0, 3, 1, 2).flatten(2).contiguous()


def _unpack_state(state: Tensor, h: int) -> Tensor:
    return state.unflatten(2, (h, -1)).permute(0, 2, 3, 1)


def unsupported_reasons(device: torch.device, dtype: torch.dtype, p: int, n: int) -> list[BackendError]:
    """Reasons why the operators do not accept tensors of a device, type and size; empty if they do."""
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
    """Self-test of the operators on this CPU for one input type: the fault, or None if they work.

    It builds the operators, runs each one, with its gradients if any, and compares the results with the recurrence in
    float64. The mixer also runs from the last frame to the first. The result is cached for each type. An out-of-memory
    error is raised unchanged.
    """
    fix = "a newer torch or C++ compiler, and for bfloat16 a CPU with AMX; the chunked form runs meanwhile"
    errors = functools.partial(_errors, dtype)
    return self_test("the C++ kernel", errors, torch.device("cpu"), dtype, tolerance=TOLERANCE[dtype], fixes=(fix, fix))


def _errors(dtype: torch.dtype) -> dict[str, float]:
    """Errors of all outputs and gradients of the operators, on 80 frames that start from a given state."""
    g = torch.Generator().manual_seed(2)  # with seed 0, the terms of the gradient of A cancel
    b, t, h, p, n, taps = 2, 80, 2, 32, 64, 4  # two chunks

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    w = h * p + 2 * n
    inputs = {
        "projected": normal(b, t, h * p + w + h).to(dtype),
        "dt_bias": torch.full((h,), -2.0),
        "A": -torch.tensor([1.0, 60.0]),  # the second head forgets at once
        "D": normal(h),
        "weight": normal(w, 1, taps),
        "bias": normal(w),
        "conv_state": normal(b, taps - 1, w).to(dtype),
        "initial_state": normal(b, h, p, n),
    }

    def split(projected: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xBC, dt = projected.split((h * p, w, h), dim=-1)
        return z, xBC, functional.softplus(dt.to(dt_bias.dtype) + dt_bias)

    def scanned(run: ssd.Scan, xBC: Tensor, dt: Tensor, A: Tensor, D: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        x, B, C = xBC.split((h * p, n, n), dim=-1)
        y, state = run(x.unflatten(2, (h, p)), dt, A, B, C, D, initial_state=first, return_state=True)
        return y.flatten(2), state

    def reference(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        projected, dt_bias, A, D, weight, bias, conv_state, first = inputs
        z, xBC, dt = split(projected, dt_bias)
        convolved = causal_conv1d_silu(xBC, weight, bias, conv_state)
        y, state = scanned(ssd.recurrent, convolved, dt, A, D, first)
        y = y * functional.silu(z)
        gated = y / (y.square().mean(-1, keepdim=True) + EPS).sqrt()
        return *scanned(ssd.recurrent, xBC, dt, A, D, first), gated, state, gated

    def kernel(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        projected, dt_bias, A, D, _, _, conv_state, first = inputs
        _, xBC, dt = split(projected, dt_bias)
        states: dict[str, Any] = {"conv_state": conv_state, "initial_state": first}
        gated, state = conv_scan_gate(*inputs[:6], **states, return_state=True)
        assert state is not None
        backwards, _ = conv_scan_gate(projected.flip(1), *inputs[1:6], **states, backwards=True)
        return *scanned(scan, xBC, dt, A, D, first), gated, state, backwards.flip(1)

    outputs = ("y", "state", "the mixer's y", "its state", "y read backwards")
    names = (*outputs, *(f"the gradient of {name}" for name in inputs))
    errors = relative_errors(names, kernel, reference, list(inputs.values()), torch.device("cpu"))
    z, gain = inputs["projected"].detach()[..., : h * p], inputs["D"].detach().repeat(p)
    expected = functional.rms_norm(z.double(), (h * p,), gain.double(), EPS)
    return errors | {"the norm": float((rms_norm(z, gain, EPS).double() - expected).norm() / expected.norm())}
