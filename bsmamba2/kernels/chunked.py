"""The chunked scan arranged for caches, with a backward pass written by hand: the function of `bsmamba2.ssd.chunked`.

One chunk after the other, so that what is computed stays in the processor's cache; one product serves all heads, where
the plain form has a matrix for each; the backward pass keeps only the inputs. It is what runs on a CPU without a C++
compiler, and where the kernels do not take the input. Book: "Choosing the chunk". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import ssd

INFERENCE_CHUNK = 128
"""Most frames in a chunk without gradients: the scores of a longer chunk cost less than writing the state again."""
SPAN = 120.0
"""Most octaves that the decays of a level or a block may span: factors from 2⁻⁶⁰ to 2⁶⁰, with as much to spare in
float32."""
FAR = 50.0
"""Octaves of decay beyond which a frame counts as forgotten: twice the precision of float32. Its factor would soon be a
denormal number, and a product with those takes a hundred times as long on some processors."""
JUMP = 16.0
"""Most octaves that one step inside a block may take. Steps beyond are rare, and their gradients would be rounding."""


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
    """The scan, chunk by chunk; `bsmamba2.ssd` has the shapes. Fastest when the frames lie outermost in memory.

    Any length works; a sequence of one chunk takes no state at all unless one is given or asked for. Float16 is
    computed in float32, because the decay factors pass the largest float16.

    Args:
        chunk: most frames in a chunk; when absent 64, and 128 without gradients.

    Raises:
        ValueError: for a chunk below 1, or shapes that do not fit.
    """
    if chunk is None:
        chunk = ssd.CHUNK if torch.is_grad_enabled() else INFERENCE_CHUNK
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be at least 1 frame")
    wide = ssd.check(x, dt, A, B, C, D, initial_state)
    dtype, x = x.dtype, x.float() if x.dtype == torch.float16 else x
    t = x.shape[1]
    q = -(-t // -(-t // chunk))  # chunks of one length, as few as possible
    inputs: Any = (
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
    with torch.autocast(x.device.type, enabled=False):  # products are of the type of x, whatever surrounds them
        y, state = _Chunked.apply(*inputs) if torch.is_grad_enabled() else _chunk_by_chunk(*inputs)
    y = y.transpose(0, 1).to(dtype)
    return y if state is None else (y, state.permute(0, 2, 3, 1))


class _Chunked(torch.autograd.Function):
    """`chunked` with the frames first, (t, b, ...), and a backward pass that keeps only its inputs.

    One chunk after the other, all its heads and sequences at once. i and j are frames of a chunk, r_i is the sum of
    dt·A up to frame i, R that up to the end, S the state before the chunk. With G = C Bᵀ, shared by the heads,

        y_i = Σ_{j<i} e^{r_i − r_j} G_ij dt_j x_j + (G_ii dt_i + D) x_i + e^{r_i} S C_i
        S ← e^R S + Σ_j e^{R − r_j} dt_j x_j B_jᵀ

    The decay is a product, e^{r_i − r_j} = e^{r_i − m} · e^{m − r_j}, whatever m. So no head needs a matrix of its own:
    x is weighed with the second factor, one product with the lower triangle of G mixes the frames of all heads, and the
    rows are weighed with the first. Written so, the factors may leave the range of a float, where their product does
    not. So rows are taken in blocks whose decays span at most `SPAN`, each with an m in the middle, `_blocks`. All
    frames before a block have factors below 1, and what is lost when those underflow is beyond the row's precision.
    Forwards, where less is asked, each head's rows are divided by themselves, `_split_by_decay`.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, ctx.q, _ = inputs
        ctx.save_for_backward(*tensors)
        return _chunk_by_chunk(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, first = ctx.saved_tensors
        dy, dstate = gradients
        assert dy is not None
        parts = list(_chunks(x, dt, A, B, C, ctx.q))
        states = [first]  # S before each chunk; none stands for zero
        for part in parts[:-1]:
            states.append(part.step(states[-1]))

        results = []
        for part, state, dy_now in zip(reversed(parts), reversed(states), reversed(dy.split(ctx.q)), strict=True):
            # A frame and itself. No decay is in this, which is why it stands apart: in d r it would only cancel.
            both = (part.x * dy_now).sum(-1, dtype=dt.dtype)  # (q, b, h)
            dx = dy_now * part.same(D)
            dD = both.double().sum((0, 1))
            ddt = (both * part.diagonal).double()

            # A frame and those before it. dt_k A multiplies every path from a frame j < k to a frame i ≥ k, and `rates`
            # sums those. Where both lie in one block, as all paths to i ≥ k less those from j ≥ k: a difference, but a
            # step so large (`JUMP`) that its rounding would count stands first in its block, where no path passes.
            dG = torch.zeros_like(part.G)
            rates = torch.zeros_like(part.sums)  # of dt·A, (q, b, h)
            for rows, until, decay, into, out in part.blocks():
                weighed, G, dy_rows, first_row = part.weigh(into), part.G[:, rows, until], dy_now[rows], rows.start
                dfound = (dy_rows * out.to(x.dtype)).flatten(2).transpose(0, 1)
                dG[:, rows, until] = dfound @ weighed.mT
                dweighed = part.by_head(G.mT @ dfound)
                dx[until].addcmul_(dweighed, into)
                dfactor = (dweighed * part.x[until]).sum(-1, dtype=dt.dtype).double() * decay
                ddt[until] += dfactor
                leaving = dfactor * part.dt[until]
                inside = _head_dot(dy_rows, part.by_head(G[:, :, first_row:] @ weighed[:, first_row:]), out)
                rates[rows][1:] += _reverse_cumsum(inside - leaving[first_row:])[1:]
                if first_row:
                    before = part.by_head(G[:, :, :first_row] @ weighed[:, :first_row])
                    rates[rows] += _reverse_cumsum(_head_dot(dy_rows, before, out))
                    rates[:first_row] += leaving[:first_row].cumsum(0) - leaving[:first_row]
            dG.tril_(-1).diagonal(dim1=1, dim2=2).add_((both * part.dt).sum(-1).mT)
            dB = dG.mT @ part.C  # (b, q, n)
            dC = dG @ part.B

            # Through the state: from its start, and to its end.
            if state is not None:
                early = (dy_now * part.from_start).to(x.dtype).flatten(2).transpose(0, 1)  # (b, q, h·p)
                dC += early @ state.to(x.dtype).flatten(2).mT
                rates += _reverse_cumsum(_head_dot(dy_now, part.read(state), part.from_start))
            if dstate is not None:
                dB += part.weigh(part.weight) @ dstate.to(x.dtype).flatten(2).mT
                outside = part.by_head(part.B @ dstate.to(x.dtype).flatten(2))
                dx.addcmul_(outside, part.weight)
                departed = (part.x * outside).sum(-1).double() * part.to_end
                ddt += departed
                departed *= part.dt
                rates += departed.cumsum(0) - departed
            if state is not None:
                added = (part.C.mT @ early).view(state.shape).to(state.dtype)
                if dstate is None:
                    dstate = added
                else:
                    rates += part.kept[:, 0, :, 0] * (state * dstate).sum((1, 3))
                    dstate = torch.addcmul(added, dstate, part.kept)

            ddt += rates * A
            dA = (rates * part.dt).sum((0, 1))
            results.append((dx, ddt, dA, dB.transpose(0, 1), dC.transpose(0, 1), dD))

        dxs, ddts, dAs, dBs, dCs, dDs = zip(*reversed(results), strict=True)
        return (
            _cat(dxs).to(x.dtype),
            _cat(ddts).to(dt.dtype),
            sum(dAs).to(A.dtype),
            _cat(dBs),
            _cat(dCs),
            sum(dDs).to(D.dtype),
            dstate if first is not None else None,
            None,
            None,
        )


def _chunk_by_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None, q: int, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """y (t, b, h, p), and with `keep` the last state (b, n, h, p). See `_Chunked`.

    One product with the lower triangle of G serves all heads, and one more the state. The decays of most heads span
    less than `SPAN` octaves in a chunk; where a head's span more, its rows are divided into levels of `SPAN` octaves,
    and every level but the first takes a product of its own, of such heads alone. What is two levels behind has
    decayed by 2⁻¹²⁰: the state, too, is read by the first level only.
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
            weighed = _scale_inputs(some, into).flatten(2)  # (b, q, h·p)
            if number == 0 and narrow is not None:  # S C_i in the scale of the first level
                found = reader @ narrow
                torch.baddbmm(found, G, weighed, beta=2.0 ** (-SPAN / 2), out=found)
            else:
                found = G @ weighed
            found = found.unflatten(-1, some.shape[2:])
            if number == 0:
                _combine(y_now, some, found, same, out)
            else:
                y_now[:, :, heads].addcmul_(found.transpose(0, 1), out[..., None].to(y.dtype))
            if not following:
                continue
            added = (kernel.mT @ weighed).unflatten(-1, some.shape[2:])  # (b, n, h, p)
            if number == 0:
                kept = None if state is None else sums[-1].exp2().to(dt.dtype)  # e^R
                state = _update_state(state, added, kept, to_end)
            else:
                assert state is not None
                state[:, :, heads].addcmul_(added, to_end[:, None, :, None])
        if state is not None and i * q < len(x):
            narrow = state.to(x.dtype).flatten(2)
    return y, state if keep else None


def _split_by_decay(sums: Tensor, dt: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """The levels of a chunk's rows: where dt·A summed up to a row lies between −k·SPAN and −(k + 1)·SPAN octaves.

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


def _scale_inputs(x: Tensor, weights: Tensor) -> Tensor:
    """x (j, b, h, p) times weights (j, b, h), with the sequences first: (b, j, h, p)."""
    return (x * weights.to(x.dtype)[..., None]).transpose(0, 1).contiguous()


def _combine(y: Tensor, x: Tensor, found: Tensor, same: Tensor, out: Tensor) -> None:
    """y ← same · x + out · found: (q, b, h, p), but found (b, q, h, p); weights (q, b, h)."""
    y.copy_(torch.addcmul(x * same[..., None], found.transpose(0, 1), out[..., None]))


def _update_state(state: Tensor | None, added: Tensor, kept: Tensor | None, share: Tensor) -> Tensor:
    """state · kept + added · share, (b, n, h, p) with weights (b, h)."""
    after = added * share[:, None, :, None]
    if state is not None and kept is not None:
        after = torch.addcmul(after, state, kept[:, None, :, None])
    return after


class _Chunk:
    """One chunk, (q, b, ...). Letters: see `_Chunked`.

    Sums of dt·A come in float64, so that differences of large ones keep their precision, and in octaves, log2 e times
    as large, because PyTorch's exp2 is three times as fast on a CPU as its exp.
    """

    def __init__(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, sums: Tensor) -> None:
        self.x, self.dt, self.sums = x, dt, sums
        self.B, self.C = B.transpose(0, 1), C.transpose(0, 1)  # (b, q, n)
        self.G = self.C @ self.B.mT  # (b, q, q)
        self.diagonal = self.G.diagonal(dim1=1, dim2=2).mT[..., None].to(dt.dtype, copy=True)  # (q, b, 1)
        self.G.tril_(-1)
        self.to_end = (sums[-1] - sums).exp2()  # e^{R − r_j}, (q, b, h), float64
        self.weight = (dt * self.to_end).to(dt.dtype)[..., None]  # of a frame in the next state, (q, b, h, 1)
        self.from_start = sums.exp2().to(dt.dtype)[..., None]  # e^{r_i}, (q, b, h, 1)
        self.kept = self.from_start[-1][:, None]  # e^R, (b, 1, h, 1)

    def same(self, D: Tensor) -> Tensor:
        """G_ii dt_i + D, (q, b, h, 1)."""
        return torch.addcmul(D, self.diagonal, self.dt)[..., None]

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """For each block of rows: the rows; all frames until its end; for these e^{m − r_j}, (j, b, h) in float64, and
        that times dt_j, (j, b, h, 1); for the rows e^{r_i − m}, (i, b, h, 1)."""
        for first, end in _blocks(self.sums):
            # Not the true middle: what comes out of a frame would depend on later ones, if only in its last bit.
            middle = self.sums[first] - SPAN / 2
            octaves = middle - self.sums[:end]
            decay = octaves.masked_fill_(octaves < -SPAN / 2 - FAR, -torch.inf).exp2()
            into = (decay * self.dt[:end]).to(self.dt.dtype)[..., None]
            out = (self.sums[first:end] - middle).exp2().to(self.dt.dtype)[..., None]
            yield slice(first, end), slice(end), decay, into, out

    def weigh(self, weights: Tensor) -> Tensor:
        """x times the weights (j, b, h, 1) of its first frames, (b, j, h·p)."""
        return (self.x[: len(weights)] * weights.to(self.x.dtype)).flatten(2).transpose(0, 1)

    def by_head(self, x: Tensor) -> Tensor:
        """(b, j, h·p) → (j, b, h, p), a view."""
        return x.transpose(0, 1).unflatten(2, self.x.shape[2:])

    def read(self, state: Tensor) -> Tensor:
        """S C_i: (b, n, h, p) → (q, b, h, p)."""
        return self.by_head(self.C @ state.to(self.x.dtype).flatten(2))

    def step(self, state: Tensor | None) -> Tensor:
        """The state after the chunk from that before it, (b, n, h, p); none stands for zero."""
        added = (self.B.mT @ self.weigh(self.weight)).unflatten(2, self.x.shape[2:]).to(self.dt.dtype)
        return added if state is None else torch.addcmul(added, state, self.kept)


def _blocks(sums: Tensor) -> list[tuple[int, int]]:
    """Cut the rows of a chunk where their decays pass `SPAN` or `JUMP`: first row and end of each block.

    Args:
        sums: of dt·A in octaves, falling, (q, b, h).
    """
    if isinstance(sums, FakeTensor):  # it has a shape alone
        return [(0, len(sums))]
    jumps = (sums[:-1] - sums[1:]).flatten(1).amax(1) > JUMP  # (q − 1)
    starts = [0]
    while starts[-1] < len(sums):
        fits = (sums[starts[-1]] - sums[starts[-1] :]).flatten(1).amax(1) <= SPAN
        fits[0] = True  # also where it is NaN: what is not a number goes through, and does not stop here
        fits[1:] &= ~jumps[starts[-1] :]
        starts.append(starts[-1] + int(fits.cumprod(0).sum()))
    return list(itertools.pairwise(starts))


def _head_dot(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Σ_p a · b times a weight: (i, b, h, p) twice, (i, b, h, 1) → (i, b, h), float64."""
    return (a * b).sum(-1, dtype=weight.dtype).double() * weight[..., 0]


def _cat(parts: tuple[Tensor, ...]) -> Tensor:
    """The chunks one after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _reverse_cumsum(x: Tensor) -> Tensor:
    """Sums over a frame and all after it, (i, ...)."""
    return x.flip(0).cumsum(0).flip(0)


def _chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int) -> Iterator[_Chunk]:
    """Cut (t, b, ...) into chunks of q frames, the last one perhaps shorter."""
    steps = dt.double() * (A.double() * math.log2(math.e))
    for x_now, dt_now, B_now, C_now, step in zip(*(part.split(q) for part in (x, dt, B, C, steps)), strict=True):
        yield _Chunk(x_now, dt_now, B_now, C_now, step.cumsum(0))
