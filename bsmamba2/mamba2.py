"""The Mamba-2 mixer: (b, t, d) → (b, t, d), causal along t.

    in_proj → z, xBC, dt
    xBC → causal convolution, SiLU → x, B, C
    y = scan(x, softplus(dt + dt_bias), A, B, C, D)
    out_proj(rms_norm(y · SiLU(z)))

`forward` reads a whole sequence; `step` reads one segment of it and returns the state for the next segment.
`bsmamba2.kernels.accelerate` replaces the class by a faster one. Book: "The Mamba-2 block".
Source: `Mamba2` of mamba-ssm, as used by the published model.
Axis letters: see `bsmamba2.config`; w is the width of the convolution, h·p + 2n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ssd

EPS = 1e-5
"""Epsilon added to the mean square in every RMS norm, as published."""


class MixerState(NamedTuple):
    """Recurrent state of a mixer between two segments of a sequence.

    Attributes:
        conv_state: the last taps − 1 input frames of the convolution, (b, taps − 1, w).
        ssm_state: the state of the scan, (b, h, p, n), float32 or wider.
    """

    conv_state: Tensor
    ssm_state: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm, x · rsqrt(mean x² + 1e-5) · weight, over the last axis, in float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        wide = at_least_fp32(x)
        return functional.rms_norm(wide, (x.shape[-1],), self.weight.to(wide.dtype), EPS).to(x.dtype)


class Mamba2(nn.Module):
    """A Mamba-2 mixer with one B/C group and a gated RMS norm.

    Args:
        dim: d.
        d_state: n.
        headdim: p.
        expand: inner width h·p as a multiple of d.
        d_conv: number of taps of the causal convolution.
        scan: any function with the signature in `bsmamba2.ssd`.

    Raises:
        ValueError: if the inner width is not a multiple of headdim.
    """

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 128,
        headdim: int = 64,
        expand: int = 4,
        d_conv: int = 4,
        scan: ssd.Scan = ssd.chunked,
    ) -> None:
        super().__init__()
        inner = expand * dim
        if inner % headdim:
            raise ValueError(f"expand * dim = {inner} is not a multiple of headdim={headdim}")
        heads, width = inner // headdim, inner + 2 * d_state
        self.headdim = headdim
        self.scan = scan
        self.proj_sizes = (inner, width, heads)  # z, xBC, dt
        self.conv_sizes = (inner, d_state, d_state)  # x, B, C
        self.in_proj = nn.Linear(dim, sum(self.proj_sizes), bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        z, xBC, dt = self.in_proj(x).split(self.proj_sizes, dim=-1)  # (b, t, h·p), (b, t, w), (b, t, h)
        xBC = causal_conv1d_silu(xBC, self.conv1d.weight, self.conv1d.bias)
        y = self.scan(*self.scan_inputs(xBC, dt))  # (b, t, h, p)
        return self.out_proj(self.gated_norm(y, z))

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """`forward` of a segment, continuing from a state.

        Args:
            x: (b, t, d).
            state: state after the previous segment; None at the start of the sequence.

        Returns:
            (b, t, d), and the state after the segment.
        """
        z, xBC, dt = self.in_proj(x).split(self.proj_sizes, dim=-1)
        past = self.conv1d.kernel_size[0] - 1
        conv_state, ssm_state = state or (xBC.new_zeros(len(x), past, xBC.shape[-1]), None)
        convolved = causal_conv1d_silu(xBC, self.conv1d.weight, self.conv1d.bias, conv_state)
        y, ssm_state = self.scan(*self.scan_inputs(convolved, dt), initial_state=ssm_state, return_state=True)
        frames = torch.cat((conv_state, xBC), dim=1)
        return self.out_proj(self.gated_norm(y, z)), MixerState(frames[:, frames.shape[1] - past :], ssm_state)

    def gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """Gated norm, rms_norm(y · SiLU(z)): (b, t, h, p), (b, t, h·p) → (b, t, h·p).

        It is computed in float32 or wider, because the product can overflow float16.
        """
        return self.norm(at_least_fp32(y.flatten(2)) * functional.silu(z)).to(z.dtype)

    def scan_inputs(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, ...]:
        """Arguments x, dt, A, B, C, D of the scan, from xBC (b, t, w) after the convolution and dt (b, t, h)."""
        x, B, C = xBC.split(self.conv_sizes, dim=-1)
        dt = functional.softplus(at_least_fp32(dt) + self.dt_bias)
        return x.unflatten(-1, (-1, self.headdim)), dt, -at_least_fp32(self.A_log).exp(), B, C, self.D


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None = None) -> Tensor:
    """SiLU of a causal depthwise convolution, which reads a frame and the previous taps − 1 frames.

        y_t = SiLU(bias + Σ_i weight_i · x_{t − taps + 1 + i})

    Args:
        x: (b, t, w).
        weight: (w, 1, taps), as in `nn.Conv1d` with w groups.
        bias: (w,), or None.
        conv_state: the frames before the first one, (b, taps − 1, w); zeros if None.

    Returns:
        (b, t, w).
    """
    width, _, taps = weight.shape
    if conv_state is None:
        conv_state = x.new_zeros(x.shape[0], taps - 1, width)
    x = torch.cat((conv_state.to(x.dtype), x), dim=1)
    return functional.silu(functional.conv1d(x.mT, weight, bias, groups=width)).mT


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert x to float32, unless its type is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def initial_dt_bias(heads: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """Random bias whose softplus is log-uniform in [low, high], but at least `floor`: (heads,)."""
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
