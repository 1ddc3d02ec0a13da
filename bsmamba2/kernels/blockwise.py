"""Layers that work block by block, so that intermediate results stay in the processor's cache.

    BlockwiseMamba2   the mixer, some frames at a time, with `chunked.chunked` for its scan
    BlockwiseBlock    the bidirectional block, a few sequences at a time

Each computes the same function as the plain class that it derives from, and has the same parameters; `accelerate`
exchanges the classes of a model's modules. It runs on a CPU without the C++ kernel.
Book: "The fused kernel". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..dual_path import BidirectionalBlock
from ..mamba2 import EPS, Mamba2, MixerState, RMSNorm, at_least_fp32
from .chunked import chunked

FRAMES_PER_CHUNK = 128
"""Frames that a mixer takes at once on a CPU, without gradients: one chunk of its scan."""
BLOCK = 2**20
"""Features, d for each frame of each sequence, that a layer reads at once on a CPU; half of it with gradients."""


def block_by_block(layer: Callable[[Tensor], Tensor], x: Tensor, max_sequences: int | None = None) -> Tensor:
    """Apply a layer that reads each sequence separately; on a CPU, apply it to a few sequences at a time.

    Intermediate results then stay in the processor's cache, where the whole batch would go through memory at every
    operation.

    Args:
        layer: (b, length, d) → (b, length, d).
        x: (b, length, d).
        max_sequences: at a time; by `BLOCK` when absent.
    """
    b, length, d = x.shape
    if max_sequences is None:
        features, frames = (BLOCK // 2, length) if torch.is_grad_enabled() else (BLOCK, min(length, FRAMES_PER_CHUNK))
        max_sequences = max(1, features // (frames * d))
    if x.device.type != "cpu" or b <= max_sequences:
        return layer(x)
    blocks = -(-b // max_sequences)
    sizes = [(b + i) // blocks for i in range(blocks)]  # as equal as can be
    return torch.cat([layer(part) for part in x.split(sizes)])


def gate_norm_linear(x: Tensor, z: Tensor, norm: RMSNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x · SiLU(z))), (t, b, w) twice → (t, b, d), for a Linear without bias.

    The gain goes into the matrix and the root mean square, one value per row, out of the product: the wide product
    x · SiLU(z) is written and read once each.
    """
    if x.dtype == torch.float16:  # it could not hold the product before the norm
        return linear(norm(at_least_fp32(x) * functional.silu(z)).to(x.dtype))
    gated = x * functional.silu(z)
    scale = (at_least_fp32(gated).square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = functional.linear(gated, linear.weight * norm.weight)
    return (y * scale).to(y.dtype)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None = None) -> Tensor:
    """`bsmamba2.mamba2.causal_conv1d_silu` with the frames first, as one addition in place for each tap.

    It takes a half to a quarter of the time of `conv1d` on a CPU, which moves the channels first and back.

    Args:
        x: (t, b, w).
        weight: (w, 1, taps), as `nn.Conv1d` with w groups has it.
        bias: (w,), or none.
        conv_state: the frames before the first, (taps − 1, b, w); zeros when absent.

    Returns:
        (t, b, w), of the type of x.
    """
    dtype = at_least_fp32(x).dtype  # bfloat16 sums are slow on a CPU, and coarse
    taps = weight[:, 0].mT.to(dtype).contiguous()
    bias = taps.new_zeros(taps.shape[1]) if bias is None else bias.to(dtype)
    conv_state = x.new_zeros(len(taps) - 1, *x.shape[1:]) if conv_state is None else conv_state.to(x.dtype)
    return _CausalConvSiLU.apply(x, conv_state, taps, bias)


class _CausalConvSiLU(torch.autograd.Function):
    """The convolution with a backward pass that keeps only its inputs; autograd's takes twice as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, conv_state: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, conv_state, taps, bias)
        return functional.silu(_convolve(torch.cat((conv_state, x)), taps, bias), inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, conv_state, taps, bias = ctx.saved_tensors
        frames = torch.cat((conv_state, x)).to(taps.dtype)
        dy = torch.ops.aten.silu_backward(gradients[0].to(taps.dtype), _convolve(frames, taps, bias))
        dframes, dtaps = torch.zeros_like(frames), torch.empty_like(taps)
        for i, tap in enumerate(taps):
            dframes[i : i + len(x)].addcmul_(dy, tap)
            dtaps[i] = (dy * frames[i : i + len(x)]).sum((0, 1))
        return dframes[len(conv_state) :], dframes[: len(conv_state)], dtaps, dy.sum((0, 1))


def _convolve(frames: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """(t + taps − 1, b, w), (taps, w), (w,) → (t, b, w)."""
    t = len(frames) - len(taps) + 1
    y = torch.addcmul(bias, frames[:t], taps[0])
    for i in range(1, len(taps)):
        y.addcmul_(frames[i : i + t], taps[i])
    return y


class BlockwiseBlock(BidirectionalBlock):
    """`BidirectionalBlock`, a few sequences at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        return block_by_block(super().forward, x)

    def step(self, x: Tensor, state: MixerState | None, frames: int) -> tuple[Tensor, MixerState]:
        """`BidirectionalBlock.step`, a few sequences at a time."""
        size = max(1, BLOCK // (FRAMES_PER_CHUNK * x.shape[-1])) if x.device.type == "cpu" else len(x)
        step = super().step
        if len(x) <= size:
            return step(x, state, frames)
        states: list[MixerState | None] = [None] * -(-len(x) // size)
        if state is not None:
            states = [MixerState(*parts) for parts in zip(*(part.split(size) for part in state), strict=True)]
        steps = [step(part, before, frames) for part, before in zip(x.split(size), states, strict=True)]
        after = MixerState(*(torch.cat(parts) for parts in zip(*(after for _, after in steps), strict=True)))
        return torch.cat([y for y, _ in steps]), after


class BlockwiseMamba2(Mamba2):
    """`Mamba2`, some frames at a time: its convolution as shifted sums, its gate and norm in the last product."""

    convolve = staticmethod(causal_conv1d_silu)
    """The convolution that runs; a subclass has its own."""
    run_scan = staticmethod(chunked)
    """The scan that runs: any function with the signature in `bsmamba2.ssd`."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self._segment(x, None, False)[0]
        return block_by_block(lambda part: self._chunks(part, None, False)[0], x)

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """As `Mamba2.step`."""
        y, after = self._segment(x, state, True) if x.device.type != "cpu" else self._chunks(x, state, True)
        assert after is not None
        return y, after

    def _chunks(self, x: Tensor, state: MixerState | None, return_state: bool) -> tuple[Tensor, MixerState | None]:
        """`_segment` of `FRAMES_PER_CHUNK` frames after the others."""
        outputs, parts = [], x.tensor_split(-(-x.shape[1] // FRAMES_PER_CHUNK), dim=1)
        for i, part in enumerate(parts, start=1):
            y, state = self._segment(part, state, return_state or i < len(parts))
            outputs.append(y)
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), state

    def _segment(self, x: Tensor, state: MixerState | None, return_state: bool) -> tuple[Tensor, MixerState | None]:
        """A segment in one piece. The frames come first in memory, (t, b, …): a tap of the convolution is then a shift
        of whole rows, and the heads of all sequences form one batch for the scan."""
        conv_state, ssm_state = state or (None, None)
        conv_state = None if conv_state is None else conv_state.transpose(0, 1)
        # Autocast would split a product with a tensor that is not contiguous into one for each frame.
        z, xBC, dt = self.in_proj(x.transpose(0, 1).contiguous()).split(self.proj_sizes, dim=-1)
        convolved = self.convolve(xBC, self.conv1d.weight, self.conv1d.bias, conv_state)
        inputs = self.scan_inputs(convolved.transpose(0, 1), dt.transpose(0, 1))
        y = self.run_scan(*inputs, initial_state=ssm_state, return_state=return_state)
        after = None
        if return_state:
            y, ssm_state = y
            after = MixerState(self.last_frames(conv_state, xBC).transpose(0, 1), ssm_state)
        y = y.flatten(-2).transpose(0, 1)
        return gate_norm_linear(y, z, self.norm, self.out_proj).transpose(0, 1), after

    def last_frames(self, conv_state: Tensor | None, xBC: Tensor) -> Tensor:
        """The next `conv_state`: (taps − 1, b, w) or none, (t, b, w) → (taps − 1, b, w)."""
        past = self.conv1d.kernel_size[0] - 1
        conv_state = xBC.new_zeros(past, *xBC.shape[1:]) if conv_state is None else conv_state
        new = min(past, len(xBC))
        return torch.cat((conv_state[new:], xBC[len(xBC) - new :]))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The type in which matrices multiply x: its own, or that of autocast, which leaves float64 alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)
