"""The chunked scan arranged for caches; it computes the same function as `bsmamba2.ssd.chunked`.

It processes one chunk at a time, so that intermediate results stay in the processor's cache, and uses one product for
all heads, whereas the plain form needs a matrix per head. It runs on CPUs without a C++ compiler, and for inputs that
the kernels do not support. If a gradient is required, the plain form runs.

Book: "Choosing the chunk". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from .. import ssd

INFERENCE_CHUNK = 128
"""Largest chunk without gradients, in frames. Scores of a longer chunk cost less than writing the state again."""
SPAN = 120.0
"""Largest span of the decays of a level, in octaves: factors from 2⁻⁶⁰ to 2⁶⁰, about half of float32's range."""
FAR = 50.0
"""Decay, in octaves, after which a frame counts as forgotten: twice the precision of float32. Its factor is set to
zero, because it would soon be denormal, and products with denormal numbers take a hundred times as long on some
processors."""


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk: int | None = None,
) -> Any:
    """Chunked scan, one chunk at a time; for shapes, see `bsmamba2.ssd`.

    It is fastest if frames are the outermost axis in memory. Any length works; a sequence of one chunk needs no state
    unless one is passed in or requested. Float16 inputs are computed in float32, because the decay factors can exceed
    the range of float16. If an input requires a gradient, `ssd.chunked` runs instead; only its inputs are kept, and it
    runs again in the backward pass.

    Args:
        chunk: largest number of frames in a chunk; None: 128, or 64 if a gradient is required.

    Raises:
        ValueError: if `chunk` is below 1, or shapes do not match.
    """
    inputs = (x, dt, A, B, C, D, initial_state)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs):

        def plain(*inputs: Any) -> Any:
            options: dict[str, Any] = {"return_state": return_state, "chunk": ssd.CHUNK if chunk is None else chunk}
            return ssd.chunked(*inputs[:6], initial_state=inputs[6], **options)

        return checkpoint(plain, *inputs, use_reentrant=False, preserve_rng_state=False)
    chunk = INFERENCE_CHUNK if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be at least 1 frame")
    wide = ssd.check(x, dt, A, B, C, D, initial_state)
    dtype, x = x.dtype, x.float() if x.dtype == torch.float16 else x
    t = x.shape[1]
    q = -(-t // -(-t // chunk))  # chunks of equal length, as few as possible
    with torch.autocast(x.device.type, enabled=False):  # products use the type of x, even under autocast
        y, state = _chunk_by_chunk(
            x.transpose(0, 1),
            dt.to(wide).transpose(0, 1),
            A.to(wide),
            B.to(x.dtype).transpose(0, 1),
            C.to(x.dtype).transpose(0, 1),
            A.new_zeros(A.shape, dtype=wide) if D is None else D.to(wide),
            None if initial_state is None else initial_state.to(wide).permute(0, 3, 1, 2),
            q,
            return_state,
        )
    y = y.transpose(0, 1).to(dtype)
    return y if state is None else (y, state.permute(0, 2, 3, 1))


def _chunk_by_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None, q: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`chunked` with frames as first axis: y (t, b, h, p), and with `keep` the last state (b, n, h, p).

    i and j are frames of a chunk, r_i is the sum of dt·A up to frame i, R the sum up to the end of the chunk, S the
    state before the chunk. With G = C Bᵀ, shared by the heads,

        y_i = Σ_{j<i} e^{r_i − r_j} G_ij dt_j x_j + (G_ii dt_i + D) x_i + e^{r_i} S C_i
        S ← e^R S + Σ_j e^{R − r_j} dt_j x_j B_jᵀ

    For any m, the decay is a product, e^{r_i − r_j} = e^{r_i − m} · e^{m − r_j}. So no head needs its own matrix: x is
    scaled by the second factor, one product with the lower triangle of G serves all heads, another one updates the
    state, and the output rows are scaled by the first factor. The factors may leave the range of a float although their
    product does not. If a head's decays span more than `SPAN` octaves, its rows are therefore divided into levels of
    that size, each with its own m (`_split_by_decay`). Every level after the first needs one more product, but only for
    these heads. Frames two levels back are neglected, because their factor is at most 2⁻¹²⁰; for the same reason, only
    the first level reads the state.

    Sums of dt·A are in float64, so that differences of large sums keep their precision, and in octaves, because
    PyTorch's exp2 is three times as fast as its exp on a CPU.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    narrow = None if state is None else state.to(x.dtype).flatten(2)  # (b, n, h·p)
    octaves = (dt.double() * (A.double() * math.log2(math.e))).clamp(min=-SPAN)  # per step; more leaves nothing
    parts = zip(*(part.split(q) for part in (x, dt, B, C, octaves, y)), strict=True)
    for i, (x_now, dt_now, B_now, C_now, steps, y_now) in enumerate(parts, start=1):
        sums = steps.cumsum(0)  # r_i, (q, b, h), float64
        kernel, reader = B_now.transpose(0, 1).contiguous(), C_now.transpose(0, 1).contiguous()  # (b, q, n)
        G = reader @ kernel.mT  # (b, q, q)
        diagonal = G.diagonal(dim1=1, dim2=2).mT[..., None].to(dt.dtype, copy=True)  # (q, b, 1)
        same = torch.addcmul(D, diagonal, dt_now)  # G_ii dt_i + D, (q, b, h)
        G.tril_(-1)
        following = keep or i * q < len(x)
        for number, heads, into, out, to_end in _split_by_decay(sums, dt_now):
            some = x_now[:, :, heads]
            weighed = (some * into.to(x.dtype)[..., None]).transpose(0, 1).contiguous().flatten(2)  # (b, q, h·p)
            if number == 0 and narrow is not None:  # S C_i, scaled as in the first level
                found = reader @ narrow
                torch.baddbmm(found, G, weighed, beta=2.0 ** (-SPAN / 2), out=found)
            else:
                found = G @ weighed
            found = found.unflatten(-1, some.shape[2:]).transpose(0, 1)  # (q, b, h, p)
            if number == 0:
                y_now.copy_(torch.addcmul(some * same[..., None], found, out[..., None]))
            else:
                y_now[:, :, heads].addcmul_(found, out[..., None].to(y.dtype))
            if not following:
                continue
            added = (kernel.mT @ weighed).unflatten(-1, some.shape[2:]) * to_end[:, None, :, None]  # (b, n, h, p)
            if number == 0:
                kept = sums[-1].exp2().to(dt.dtype)[:, None, :, None]  # e^R
                state = added if state is None else torch.addcmul(added, state, kept)
            else:
                assert state is not None
                state[:, :, heads] += added
        if state is not None and i * q < len(x):
            narrow = state.to(x.dtype).flatten(2)
    return y, state if keep else None


def _split_by_decay(sums: Tensor, dt: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Split the rows of a chunk into levels; in level k, dt·A sums to between −k·SPAN and −(k + 1)·SPAN octaves.

    Args:
        sums: cumulative sums of dt·A in octaves, decreasing, (q, b, h), float64.
        dt: (q, b, h).

    Yields:
        For each level k and each run of adjacent heads that reach it: k; the h' heads; and, with m in the middle of the
        level, e^{m − r_j} dt_j for frames up to the level, zero for later ones, (q, b, h'); e^{r_i − m} for rows of the
        level, zero for others, (q, b, h'); and e^{R − m} if the level is the last one, else zero, (b, h'). Level 0
        comes first, for all heads together.
    """
    if isinstance(sums, FakeTensor):  # it has only a shape
        deepest = [0] * sums.shape[-1]
    else:  # a NaN sum belongs to level 0 and propagates
        deepest = (sums[-1].nan_to_num() / -SPAN).amax(0).clamp(min=0).floor().int().tolist()
    for number in range(max(deepest) + 1):
        for heads in _runs([last >= number for last in deepest]):
            some = sums[..., heads]
            clock = some + (number + 0.5) * SPAN
            into, out, to_end = -clock, clock, clock[-1]
            if max(deepest[heads]):
                level = (some / -SPAN).nan_to_num().floor()
                into = into.masked_fill((level > number) | (into < -SPAN / 2 - FAR), -torch.inf)
                out = out.masked_fill(level != number, -torch.inf)
                to_end = to_end.masked_fill(level[-1] != number, -torch.inf)
            into = into.exp2() * dt[..., heads]
            yield number, heads, into.to(dt.dtype), out.exp2().to(dt.dtype), to_end.exp2().to(dt.dtype)


def _runs(wanted: list[bool]) -> Iterator[slice]:
    """Slices of adjacent true values."""
    start = 0
    for true, run in itertools.groupby(wanted):
        end = start + sum(1 for _ in run)
        if true:
            yield slice(start, end)
        start = end
