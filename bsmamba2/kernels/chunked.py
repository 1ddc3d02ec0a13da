"""The chunked scan arranged for caches: the function of `bsmamba2.ssd.chunked`.

One chunk after the other, so that intermediate results stay in the processor's cache, and one product for all heads,
where the plain form has a matrix for each. It runs on a CPU without a C++ compiler, and for input that the kernels do
not take. Where a gradient is wanted, the plain form runs. Book: "Choosing the chunk". Axis letters: see
`bsmamba2.config`.
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
"""Most frames in a chunk without gradients: the scores of a longer chunk cost less than writing the state again."""
SPAN = 120.0
"""Most octaves that the decays of a level may span: factors from 2⁻⁶⁰ to 2⁶⁰, with as much to spare in float32."""
FAR = 50.0
"""Octaves of decay beyond which a frame counts as forgotten: twice the precision of float32. Its factor would soon be a
denormal number, and a product with those takes a hundred times as long on some processors."""


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
    """The scan, chunk by chunk; `bsmamba2.ssd` has the shapes. Fastest when frames are the outermost axis in memory.

    Any length works; a sequence of one chunk takes no state at all unless one is given or asked for. Float16 is
    computed in float32, because the decay factors pass the largest float16. Where an input requires a gradient,
    `ssd.chunked` runs instead; it keeps only its inputs, and runs again in the backward pass.

    Args:
        chunk: most frames in a chunk; when absent 128, and 64 where a gradient is wanted.

    Raises:
        ValueError: for a chunk below 1, or shapes that do not fit.
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
    q = -(-t // -(-t // chunk))  # chunks of one length, as few as possible
    with torch.autocast(x.device.type, enabled=False):  # products are of the type of x, whatever surrounds them
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
    """`chunked` with the frames first: y (t, b, h, p), and with `keep` the last state (b, n, h, p).

    i and j are frames of a chunk, r_i is the sum of dt·A up to frame i, R that up to the end, S the state before the
    chunk. With G = C Bᵀ, shared by the heads,

        y_i = Σ_{j<i} e^{r_i − r_j} G_ij dt_j x_j + (G_ii dt_i + D) x_i + e^{r_i} S C_i
        S ← e^R S + Σ_j e^{R − r_j} dt_j x_j B_jᵀ

    The decay is a product, e^{r_i − r_j} = e^{r_i − m} · e^{m − r_j}, whatever m. So no head needs a matrix of its own:
    x is scaled by the second factor, one product with the lower triangle of G serves all heads, and one more the state;
    the rows are scaled by the first. The factors may leave the range of a float, where their product does not. So where
    a head's decays span more than `SPAN` octaves, its rows are divided into levels of that size, each with an m of its
    own (`_split_by_decay`), and every level but the first takes a product more, of such heads only. From two levels
    back, a factor of 2⁻¹²⁰ is left: the state, too, is read by the first level only.

    Sums of dt·A are in float64, so that differences of large ones keep their precision, and in octaves, because
    PyTorch's exp2 is three times as fast on a CPU as its exp.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    narrow = None if state is None else state.to(x.dtype).flatten(2)  # (b, n, h·p)
    octaves = (dt.double() * (A.double() * math.log2(math.e))).clamp(min=-SPAN)  # of a step: more is nothing left
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
            if number == 0 and narrow is not None:  # S C_i in the scale of the first level
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
    """The levels of a chunk's rows: where dt·A summed up to a row is between −k·SPAN and −(k + 1)·SPAN octaves.

    Args:
        sums: of dt·A in octaves, falling, (q, b, h), float64.
        dt: (q, b, h).

    Yields:
        For each level k and each run of neighbouring heads in which it occurs: k; the h' heads; and with m in the
        middle of the level e^{m − r_j} dt_j of all frames up to it, zero beyond, (q, b, h'); e^{r_i − m} of its rows,
        zero of others, (q, b, h'); and e^{R − m} where it is the last, else zero, (b, h'). First of all comes level 0,
        in all heads at once.
    """
    if isinstance(sums, FakeTensor):  # it has a shape alone
        deepest = [0] * sums.shape[-1]
    else:  # a sum that is NaN lies in the first, and goes through
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
    """The places of neighbouring trues."""
    start = 0
    for true, run in itertools.groupby(wanted):
        end = start + sum(1 for _ in run)
        if true:
            yield slice(start, end)
        start = end
