"""The Mamba-2 mixer: (b, t, d) → (b, t, d), causal along t.

    in_proj → z, xBC, dt      xBC → causal conv, SiLU → x, B, C      scan(x, softplus(dt + bias), A, B, C, D)
    → rms(y · SiLU(z)) → out_proj

Book: "The Mamba-2 block". Source: `Mamba2` of mamba-ssm as the published model uses it.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ssd

EPS = 1e-5  # of every RMS norm in the published model


class RMSNorm(nn.Module):
    """rms(x) = x · rsqrt(mean x² + 1e-5) · weight, over the last axis, in float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return functional.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), EPS).to(x.dtype)


class Mamba2(nn.Module):
    """A Mamba-2 mixer with one B/C group and a gated RMS norm.

    Args:
        dim: d.
        state: n.
        head_width: p.
        expand: inner width h·p as a multiple of d.
        conv_width: taps of the causal convolution.
        scan: any function with the signature in `bsmamba2.ssd`.

    Raises:
        ValueError: when the heads do not fill the inner width.
    """

    def __init__(
        self,
        dim: int,
        *,
        state: int = 128,
        head_width: int = 64,
        expand: int = 4,
        conv_width: int = 4,
        scan: ssd.Scan = ssd.chunked,
    ) -> None:
        super().__init__()
        inner = expand * dim
        if inner % head_width:
            raise ValueError(f"expand * dim = {inner} is not a multiple of head_width={head_width}")
        heads = inner // head_width
        self.head_width = head_width
        self.scan = scan
        self.widths = (inner, inner + 2 * state, heads)  # z, xBC, dt
        self.inner_widths = (inner, state, state)  # x, B, C
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv1d = nn.Conv1d(inner + 2 * state, inner + 2 * state, conv_width, groups=inner + 2 * state)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        z, xBC, dt = self.in_proj(x).split(self.widths, dim=-1)
        xBC = causal_conv_silu(xBC, self.conv1d.weight, self.conv1d.bias)
        x, B, C = xBC.split(self.inner_widths, dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = functional.softplus(dt.to(wide) + self.dt_bias.to(wide))
        A = -self.A_log.to(wide).exp()
        y = self.scan(x.unflatten(-1, (-1, self.head_width)), dt, A, B, C, self.D)
        return self.out_proj(self.norm(y.flatten(-2) * functional.silu(z)))


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of a depthwise convolution that sees a frame and the taps − 1 frames before it.

        y_t = SiLU(bias + Σ_i weight_i · x_{t − taps + 1 + i}),   x = 0 before the first frame

    The same as `conv1d` on the transposed and padded tensor, which takes two to four times as long on a CPU
    (forward and backward) because it moves the channels first and back.

    Args:
        x: (b, t, w).
        weight: (w, 1, taps), as `nn.Conv1d` with w groups has it.
        bias: (w,), or none.

    Returns:
        (b, t, w), of the type of x.
    """
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return _CausalConvSiLU.apply(x, weight[:, 0].mT.to(x.dtype), bias.to(x.dtype))


class _CausalConvSiLU(torch.autograd.Function):
    """One addition in place for each tap; the backward pass computes the convolution again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, taps, bias)
        return functional.silu(_convolve(x, taps, bias), inplace=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, taps, bias = ctx.saved_tensors
        gradient = torch.ops.aten.silu_backward(gradients[0], _convolve(x, taps, bias))
        dx, dtaps = torch.zeros_like(x), torch.empty_like(taps)
        for i, (earlier, later) in enumerate(_shifts(len(taps), x.shape[1])):
            dx[:, earlier].addcmul_(gradient[:, later], taps[i])
            dtaps[i] = (gradient[:, later] * x[:, earlier]).sum((0, 1))
        return dx, dtaps, gradient.sum((0, 1))


def _convolve(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """(b, t, w), (taps, w), (w,) → (b, t, w)."""
    y = torch.addcmul(bias, x, taps[-1])
    for tap, (earlier, later) in zip(taps[:-1], _shifts(len(taps), x.shape[1]), strict=False):
        y[:, later].addcmul_(x[:, earlier], tap)
    return y


def _shifts(taps: int, frames: int) -> Iterator[tuple[slice, slice]]:
    """For each tap, the frames that it reads and the frames that it adds to."""
    for i in range(taps):
        shift = min(taps - 1 - i, frames)
        yield slice(0, frames - shift), slice(shift, frames)


def initial_dt_bias(heads: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """A bias whose softplus is log-uniform in [low, high], not below `floor`: (heads,)."""
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
