"""The Mamba-2 mixer: (b, t, d) → (b, t, d), causal along t.

    in_proj → z, xBC, dt      xBC → causal conv, SiLU → x, B, C      scan(x, softplus(dt + bias), A, B, C, D)
    → rms(y · SiLU(z)) → out_proj

Book: "The Mamba-2 block". Source: `Mamba2` of mamba-ssm as the published model uses it.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ssd
from .kernels import cpu, loops, triton
from .kernels.loops import loop

EPS = 1e-5  # of every RMS norm in the published model
PIECE = 128
"""Frames that a mixer takes at once on a CPU, without gradients: one chunk of its scan."""

BLOCK = 2**20
"""Features, d for each frame of each sequence, that a layer reads at once on a CPU; half of it with gradients."""

NATIVE_BLOCK = 15 * 2**20
"""Of what the first projection gives, as many numbers as the native kernel reads at once, without gradients."""

Memory = tuple[Tensor, Tensor]
"""What a mixer must know of the past: the last frames that entered its convolution, (taps − 1, b, w), and the state of
its scan, (b, h, p, n)."""


class RMSNorm(nn.Module):
    """rms(x) = x · rsqrt(mean x² + 1e-5) · weight, over the last axis, in float32 or wider."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        return rms_norm(x, self.weight)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """The same as a function: (..., dim), a weight (dim,) or none → (..., dim)."""
    if loops.wanted() and cpu.normalises(x):
        return cpu.rms_norm(x, weight, EPS)
    return _rms_norm(x, weight)


@loop
def _rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    wide = x.to(_wide(x))
    return functional.rms_norm(wide, (x.shape[-1],), None if weight is None else weight.to(wide.dtype), EPS).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    """The type of what must not be rounded to that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrices are multiplied with x: its own, or that of autocast, which leaves float64 as it is."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def block_by_block(layer: Callable[[Tensor], Tensor], x: Tensor, most: int | None = None) -> Tensor:
    """layer(x) for a layer that reads each sequence by itself, on a CPU a few sequences at a time.

    What the layer computes in between then stays in the processor's cache, where the whole batch would go through
    memory at every operation.

    Args:
        layer: (b, length, d) → (b, length, d).
        x: (b, length, d).
        most: sequences at a time; by `BLOCK` when absent.
    """
    b, length, d = x.shape
    if most is None:
        features, frames = (BLOCK // 2, length) if torch.is_grad_enabled() else (BLOCK, min(length, PIECE))
        most = max(1, features // (frames * d))
    if x.device.type != "cpu" or b <= most:
        return layer(x)
    blocks = -(-b // most)
    sizes = [(b + i) // blocks for i in range(blocks)]  # as equal as can be
    return torch.cat([layer(part) for part in x.split(sizes)])


def gate_norm_linear(x: Tensor, z: Tensor, norm: RMSNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x · SiLU(z))), (t, b, w) twice → (t, b, d), for a Linear without bias.

    The gain goes into the matrix and the root mean square, one number a row, out of the product: the wide product
    x · SiLU(z) is written and read once each.
    """
    if torch.is_grad_enabled():
        gated = x * functional.silu(z)
        length = torch.linalg.vector_norm(gated, dim=-1, keepdim=True, dtype=_wide(x))
        scale = (length.square() / x.shape[-1] + EPS).rsqrt()
    else:
        gated, scale = _gate(x, z)
    return _scale(functional.linear(gated, linear.weight * norm.weight), scale)


@loop
def _scale(x: Tensor, scale: Tensor) -> Tensor:
    return (x * scale).to(x.dtype)


@loop
def _gate(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """y = x · SiLU(z) and 1 / rms(y) over the last axis, float32 or wider: (t, b, w) twice → (t, b, w), (t, b, 1)."""
    y = x * functional.silu(z)
    return y, (y.to(_wide(x)).square().mean(-1, keepdim=True) + EPS).rsqrt()


class Room:
    """Where the native kernel finds what is projected and puts what it makes of it, one block of sequences at a time.

    The C library gives large buffers back after each use, and the system clears them when they are asked for again: a
    quarter of the time of a model. With gradients, which need what was projected, each block has its own.

    Args:
        x: all sequences, (b, length, d).
        mixer: that reads them.
        dtype: of the products.

    Attributes:
        most: sequences in a block.
    """

    def __init__(self, x: Tensor, mixer: Mamba2, dtype: torch.dtype) -> None:
        self.most = max(1, NATIVE_BLOCK // (x.shape[1] * sum(mixer.widths)))
        frames = min(self.most, len(x)) * x.shape[1]
        self.projected = x.new_empty(frames, sum(mixer.widths), dtype=dtype)
        self.mixed = x.new_empty(frames, mixer.widths[0], dtype=dtype)


class Mamba2(nn.Module):
    """A Mamba-2 mixer with one B/C group and a gated RMS norm.

    Args:
        dim: d.
        d_state: n.
        headdim: p.
        expand: inner width h·p as a multiple of d.
        d_conv: taps of the causal convolution.
        scan: any function with the signature in `bsmamba2.ssd`.

    Raises:
        ValueError: when the heads do not fill the inner width.
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
        heads = inner // headdim
        self.headdim = headdim
        self.past = d_conv - 1
        self.scan = scan
        self.widths = (inner, inner + 2 * d_state, heads)  # z, xBC, dt
        self.inner_widths = (inner, d_state, d_state)  # x, B, C
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv1d = nn.Conv1d(inner + 2 * d_state, inner + 2 * d_state, d_conv, groups=inner + 2 * d_state)
        self.dt_bias = nn.Parameter(initial_dt_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.step(x)[0]
        if self.kernel(x):
            return self.native_forward(x)
        return block_by_block(self.in_pieces, x)

    def native_forward(self, x: Tensor) -> Tensor:
        """`forward` with the native kernel, without gradients."""
        dtype = matmul_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            into, out, room = self.in_proj.weight.to(dtype), self.output().to(dtype), Room(x, self, dtype)

            def read(x: Tensor) -> Tensor:
                return functional.linear(self.project_and_mix(x.to(dtype), into, room), out)

            return block_by_block(read, x, room.most)

    def in_pieces(self, x: Tensor) -> Tensor:
        """`forward`, some frames after the others, so that what lies between the projections stays in cache."""
        if x.shape[1] <= PIECE:
            return self.step(x)[0]
        pieces, memory, parts = [], None, x.tensor_split(-(-x.shape[1] // PIECE), dim=1)
        for i, piece in enumerate(parts, start=1):
            y, memory = self.step(piece, memory, keep=i < len(parts))
            pieces.append(y)
        return torch.cat(pieces, dim=1)

    def step(self, x: Tensor, memory: Memory | None = None, *, keep: bool = False) -> tuple[Tensor, Memory | None]:
        """A piece of a sequence, exactly as if it came with what was before it.

        Args:
            x: (b, t, d).
            memory: of the piece before; none at the start of a sequence.
            keep: whether a piece will follow.

        Returns:
            (b, t, d), and with `keep` the memory after it.
        """
        if self.kernel(x):
            return self.native_step(x, memory, keep)
        before, state = (None, None) if memory is None else memory
        # The frames come first in memory: (t, b, ...). A tap of the convolution is then a shift of whole rows, and the
        # heads of all sequences one batch for the scan.
        # Of what does not lie in order, autocast would make a product for each frame, and a copy of the weight.
        z, xBC, dt = self.in_proj(x.transpose(0, 1).contiguous()).split(self.widths, dim=-1)
        if keep:
            after = self.last_frames(before, xBC)
        xBC = triton.convolution(xBC, self.conv1d.weight, self.conv1d.bias, before, otherwise=causal_conv_silu)
        u, B, C = (part.transpose(0, 1) for part in xBC.split(self.inner_widths, dim=-1))
        wide = _wide(dt)
        dt = functional.softplus(dt.to(wide) + self.dt_bias.to(wide)).transpose(0, 1)
        A = -self.A_log.to(wide).exp()
        u = u.unflatten(-1, (-1, self.headdim))
        y = self.scan(u, dt, A, B, C, self.D, initial_state=state, return_state=keep)
        if keep:
            y, state = y
            memory = (after, state)
        y = y.flatten(-2).transpose(0, 1)
        y = gate_norm_linear(y, z, self.norm, self.out_proj).transpose(0, 1)
        return y, memory if keep else None

    def last_frames(self, before: Tensor | None, xBC: Tensor) -> Tensor:
        """Of what enters the convolution, the last frames: (taps − 1, b, w) or none, (t, b, w) → (taps − 1, b, w)."""
        before = xBC.new_zeros(self.past, *xBC.shape[1:]) if before is None else before
        new = min(self.past, len(xBC))
        return torch.cat((before[new:], xBC[len(xBC) - new :]))

    def kernel(self, x: Tensor) -> bool:
        """Whether the native kernel does what lies between the projections of x, instead of the steps one by one."""
        if self.scan is cpu.checked:
            cpu.require(matmul_dtype(x))
            return True
        if self.scan is not triton.auto or x.device.type != "cpu":
            return False
        dtype = matmul_dtype(x)
        fits = not cpu.misfits(x.device, dtype, self.headdim, self.inner_widths[1])
        return fits and triton.scan_for(x.device, dtype) is cpu.scan

    def native_step(self, x: Tensor, memory: Memory | None, keep: bool) -> tuple[Tensor, Memory | None]:
        """`step` with the native kernel."""
        before, state = (None, None) if memory is None else memory
        projected = self.in_proj(x)
        first = None if before is None else before.transpose(0, 1)
        y, last = self.mix(projected, before=first, initial_state=state, return_state=keep)
        y = functional.linear(y, self.output())
        if last is None:
            return y, None
        xBC = projected.split(self.widths, dim=-1)[1]
        return y, (self.last_frames(before, xBC.transpose(0, 1)), last)

    def output(self) -> Tensor:
        """The matrix that follows `mix`, (d, h·p): the gain of the norm, then the last projection."""
        return self.out_proj.weight * self.norm.weight

    def mix(self, projected: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """`native.mix` of what `in_proj` gives, with the numbers of this mixer; `options` are that function's."""
        decay = -self.A_log.exp()
        conv = self.conv1d
        return cpu.mix(projected, self.dt_bias, decay, self.D, conv.weight, conv.bias, eps=EPS, **options)

    def project_and_mix(self, x: Tensor, matrix: Tensor, room: Room | None, *, backwards: bool = False) -> Tensor:
        """`mix` of `matrix` x: (b, t, d), (·, d) → (b, t, h·p), in the room if there is one."""
        if room is None:
            return self.mix(functional.linear(x, matrix), backwards=backwards)[0]
        frames = x.shape[0] * x.shape[1]
        torch.mm(x.flatten(0, 1), matrix.mT, out=room.projected[:frames])
        projected, y = (each[:frames].unflatten(0, x.shape[:2]) for each in (room.projected, room.mixed))
        self.mix(projected, backwards=backwards, out=y)
        return y


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """SiLU of a depthwise convolution that sees a frame and the taps − 1 frames before it.

        y_t = SiLU(bias + Σ_i weight_i · x_{t − taps + 1 + i})

    The same as `conv1d` on the transposed and padded tensor, which takes two to four times as long on a CPU
    (forward and backward) because it moves the channels first and back.

    Args:
        x: (t, b, w), frames first.
        weight: (w, 1, taps), as `nn.Conv1d` with w groups has it.
        bias: (w,), or none.
        before: the frames before the first, (taps − 1, b, w); zeros when absent.

    Returns:
        (t, b, w), of the type of x.
    """
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    wide, past = _wide(x), weight.shape[-1] - 1  # bfloat16 sums are slow on a CPU, and coarse
    taps, bias = weight[:, 0].mT.to(wide).contiguous(), bias.to(wide)
    if not torch.is_grad_enabled():
        y = torch.empty_like(x)
        before = x.new_zeros((past, *x.shape[1:])) if before is None else before.to(x.dtype)
        _convolve_into(y[:past], torch.cat((before, x[:past])), taps, bias)
        if len(x) > past:
            _convolve_into(y[past:], x, taps, bias)
        return y
    narrow, x = x.dtype, x.to(wide)
    if before is not None:
        return _CausalConvSiLU.apply(torch.cat((before.to(wide), x)), taps, bias)[len(before) :].to(narrow)
    return _CausalConvSiLU.apply(x, taps, bias).to(narrow)


@loop
def _convolve_into(y: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> None:
    """y ← SiLU of the convolution of x where all taps have a frame: (t, b, w), (t + taps − 1, b, w), (taps, w)."""
    total = torch.addcmul(bias, x[: len(y)], taps[0])
    for i in range(1, len(taps)):
        total = total.addcmul_(x[i : i + len(y)], taps[i])
    y.copy_(functional.silu(total))


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
        dx, dtaps = gradient * taps[-1], [(gradient * x).sum((0, 1))]
        for i, (earlier, later) in enumerate(_shifts(len(taps) - 1, len(x))):
            dx[earlier].addcmul_(gradient[later], taps[i])
            dtaps.insert(i, (gradient[later] * x[earlier]).sum((0, 1)))
        return dx, torch.stack(dtaps), gradient.sum((0, 1))


def _convolve(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """(t, b, w), (taps, w), (w,) → (t, b, w); before the first frame there are zeros."""
    past, frames = len(taps) - 1, len(x)
    y = torch.addcmul(bias, x, taps[past])
    for i, (earlier, later) in enumerate(_shifts(past, frames)):
        y[later].addcmul_(x[earlier], taps[i])
    return y


def _shifts(past: int, frames: int) -> Iterator[tuple[slice, slice]]:
    """For each tap but the last, the frames that it reads and the frames that it adds to."""
    for i in range(past):
        shift = min(past - i, frames)
        yield slice(0, frames - shift), slice(shift, frames)


def initial_dt_bias(heads: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """A bias whose softplus is log-uniform in [low, high], not below `floor`: (heads,)."""
    dt = torch.empty(heads).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))
