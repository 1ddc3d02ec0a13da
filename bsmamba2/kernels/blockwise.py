"""Layers that process their input in blocks, so that intermediate results stay in the processor's cache.

    BlockwiseMamba2   the mixer, a few frames at a time, with `chunked.chunked` as its scan
    BlockwiseBlock    the bidirectional block, a few sequences at a time

Each class computes the same function as its plain base class and has the same parameters; `accelerate` replaces the
classes of a model's modules. These layers also run on a CPU without the C++ kernel.
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
"""Number of frames that a mixer processes at once on a CPU, without gradients: one chunk of its scan."""
BLOCK = 2**20
"""Number of features (sequences × frames × d) that a layer processes at once on a CPU; half as many with gradients."""


def block_by_block(layer: Callable[[Tensor], Tensor], x: Tensor, max_sequences: int | None = None) -> Tensor:
    """Apply a layer that processes each sequence separately; on a CPU, to a few sequences at a time.

    Intermediate results then stay in the processor's cache. Those of the whole batch would be written to memory and
    read back at every operation.

    Args:
        layer: (b, length, d) → (b, length, d).
        x: (b, length, d).
        max_sequences: largest number of sequences at a time; None: derived from `BLOCK`.
    """
    b, length, d = x.shape
    if max_sequences is None:
        features, frames = (BLOCK // 2, length) if torch.is_grad_enabled() else (BLOCK, min(length, FRAMES_PER_CHUNK))
        max_sequences = max(1, features // (frames * d))
    if x.device.type != "cpu" or b <= max_sequences:
        return layer(x)
    blocks = -(-b // max_sequences)
    sizes = [(b + i) // blocks for i in range(blocks)]  # as equal as possible
    return torch.cat([layer(part) for part in x.split(sizes)])


def gate_norm_linear(x: Tensor, z: Tensor, norm: RMSNorm, linear: nn.Linear) -> Tensor:
    """Gated norm and projection, linear(norm(x · SiLU(z))): x and z (t, b, w) → (t, b, d), for a Linear without bias.

    The gain is folded into the matrix, and the root mean square, one value per row, is applied after the product.
    The normalised x · SiLU(z) is therefore never written to memory.
    """
    if x.dtype == torch.float16:  # the product before the norm can overflow it
        return linear(norm(at_least_fp32(x) * functional.silu(z)).to(x.dtype))
    gated = x * functional.silu(z)
    scale = (at_least_fp32(gated).square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = functional.linear(gated, linear.weight * norm.weight)
    return (y * scale).to(y.dtype)


def causal_conv1d_silu(x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None = None) -> Tensor:
    """`bsmamba2.mamba2.causal_conv1d_silu` with frames as first axis, computed by one in-place addition per tap.

    On a CPU, it takes a half to a quarter of the time of `conv1d`, which moves the channels first and back again.

    Args:
        x: (t, b, w).
        weight: (w, 1, taps), as in `nn.Conv1d` with w groups.
        bias: (w,), or None.
        conv_state: the frames before the first one, (taps − 1, b, w); zeros if None.

    Returns:
        (t, b, w), in the type of x.
    """
    dtype = at_least_fp32(x).dtype  # bfloat16 sums are slow and imprecise on a CPU
    taps = weight[:, 0].mT.to(dtype).contiguous()
    bias = taps.new_zeros(taps.shape[1]) if bias is None else bias.to(dtype)
    conv_state = x.new_zeros(len(taps) - 1, *x.shape[1:]) if conv_state is None else conv_state.to(x.dtype)
    return _CausalConvSiLU.apply(x, conv_state, taps, bias)


class _CausalConvSiLU(torch.autograd.Function):
    """Convolution whose backward pass needs only the inputs; the backward pass of autograd takes twice as long."""

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
    """`Mamba2`, a few frames at a time, with a convolution by shifted sums, and the norm merged into the projection."""

    convolve = staticmethod(causal_conv1d_silu)
    """The convolution to run; subclasses may override it."""
    run_scan = staticmethod(chunked)
    """The scan to run: any function with the signature in `bsmamba2.ssd`."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self._segment(x, None, False)[0]
        return block_by_block(lambda part: self._chunks(part, None, False)[0], x)

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """Same as `Mamba2.step`."""
        y, after = self._segment(x, state, True) if x.device.type != "cpu" else self._chunks(x, state, True)
        assert after is not None
        return y, after

    def _chunks(self, x: Tensor, state: MixerState | None, return_state: bool) -> tuple[Tensor, MixerState | None]:
        """Apply `_segment` to successive chunks of at most `FRAMES_PER_CHUNK` frames."""
        outputs, parts = [], x.tensor_split(-(-x.shape[1] // FRAMES_PER_CHUNK), dim=1)
        for i, part in enumerate(parts, start=1):
            y, state = self._segment(part, state, return_state or i < len(parts))
            outputs.append(y)
        return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), state

    def _segment(self, x: Tensor, state: MixerState | None, return_state: bool) -> tuple[Tensor, MixerState | None]:
        """Process a segment at once. Frames are the first axis in memory, (t, b, …), so that a tap of the convolution
        is a shift of whole rows, and the heads of all sequences form one batch for the scan."""
        conv_state, ssm_state = state or (None, None)
        conv_state = None if conv_state is None else conv_state.transpose(0, 1)
        # Under autocast, a product with a non-contiguous tensor would be split into one product per frame.
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
        """The next `conv_state`: (taps − 1, b, w) or None, (t, b, w) → (taps − 1, b, w)."""
        past = self.conv1d.kernel_size[0] - 1
        conv_state = xBC.new_zeros(past, *xBC.shape[1:]) if conv_state is None else conv_state
        new = min(past, len(xBC))
        return torch.cat((conv_state[new:], xBC[len(xBC) - new :]))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Type for matrix products with x: the autocast type if autocast is enabled and x is not float64, else x.dtype."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)
