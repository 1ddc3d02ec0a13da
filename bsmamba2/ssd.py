"""The scan of Mamba-2 (state-space duality, SSD), three ways that are the same function.

For every head, with a scalar decay a_t = exp(dt_t · A):

    h_t = a_t · h_{t−1} + dt_t · x_t B_tᵀ        (p × n)
    y_t = h_t C_t + D · x_t                       (p)

`recurrent` runs it as written, `matrix` as one masked matrix product, `chunked` as products inside
chunks and a short recurrence between them. Source: T. Dao and A. Gu, "Transformers are SSMs",
arXiv:2405.21060. Book: "The scan". Axis letters: see `bsmamba2.config`.

All take `(x, dt, A, B, C, D=None, *, initial_state=None, return_state=False)`:

    x              (b, t, h, p)   input
    dt             (b, t, h)      step, already positive
    A              (h,)           negative, one per head
    B, C           (b, t, n)      input and output projections, shared by the heads
    D              (h,)           skip
    initial_state  (b, h, p, n)   state before the first frame; zero when absent

and return y (b, t, h, p), with `return_state` also the state after the last frame (b, h, p, n).
Decay and state are computed in float32 or wider, whatever the type of x; y has the type of x, the
state the wider one. Shapes that do not fit raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Scan = Callable[..., Any]
"""Any function with the signature above: the seam through which kernels enter the model."""


def recurrent(
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
    """The definition, frame by frame: t steps, memory for one state. See the module for shapes."""
    state = _first_state(x, dt, A, B, C, D, initial_state)
    wide = state.dtype
    y = x.new_empty(x.shape, dtype=wide)
    for i in range(x.shape[1]):
        decay = torch.exp(dt[:, i].to(wide) * A.to(wide))  # (b, h)
        update = torch.einsum("bhp,bn->bhpn", x[:, i].to(wide) * dt[:, i, :, None], B[:, i].to(wide))
        state = decay[:, :, None, None] * state + update
        y[:, i] = torch.einsum("bhpn,bn->bhp", state, C[:, i].to(wide))
    return _result(y, x, D, state, return_state)


def matrix(
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
    """The same as one product y = (L ∘ C Bᵀ)(dt · x): t × t memory per head. See the module for shapes.

    L_ij = exp(Σ_{j<τ≤i} dt_τ A) below and on the diagonal, zero above (`decay_matrix`).
    """
    state = _first_state(x, dt, A, B, C, D, initial_state)
    wide = state.dtype
    clock = _clock(dt, A)  # (b, h, t)
    weighted = (x * dt[..., None]).to(wide).transpose(1, 2)  # (b, h, t, p)
    scores = (C.to(wide) @ B.to(wide).mT)[:, None] * decay_matrix(clock).to(wide)  # (b, h, t, t)
    from_start = clock.exp().to(wide)[..., None] * (C.to(wide)[:, None] @ state.mT)  # (b, h, t, p)
    y = (scores @ weighted + from_start).transpose(1, 2)
    to_end = (clock[..., -1:] - clock).exp().to(wide)  # (b, h, t)
    added = (to_end[..., None] * weighted).mT @ B.to(wide)[:, None]  # (b, h, p, n)
    state = clock[..., -1].exp().to(wide)[..., None, None] * state + added
    return _result(y, x, D, state, return_state)


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
    chunk: int = 32,
) -> Any:
    """The matrix form inside chunks, the recurrence between them: time and memory linear in t.

    Any length works: the last chunk is filled up with frames of dt = 0, which leave the state alone.
    The backward pass computes the scores again instead of keeping them. See the module for shapes.

    Args:
        chunk: most frames in a chunk; the scores take chunk × chunk numbers per head and chunk.

    Raises:
        ValueError: for a chunk below 1, or shapes that do not fit.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be at least 1 frame")
    state = _first_state(x, dt, A, B, C, D, initial_state)
    t = x.shape[1]
    q = -(-t // -(-t // chunk))  # chunks of one length, as few as before
    padding = -t % q
    filled = [functional.pad(part, (0, 0, 0, padding)) if padding else part for part in (x.flatten(2), dt, B, C)]
    x_filled, dt, B, C = filled
    y, state = _Chunked.apply(
        x_filled.unflatten(2, x.shape[2:]), dt.to(state.dtype), A, B.to(x.dtype), C.to(x.dtype), state, q
    )
    return _result(y[:, :t], x, D, state, return_state)


class _Chunked(torch.autograd.Function):
    """`chunked` for whole chunks and no skip, with a backward pass that keeps only its inputs.

    Letters: m counts chunks, i and j frames in one chunk, S_m is the state before chunk m, r_i the sum
    of dt·A up to frame i of a chunk, R that up to its end. With G = C Bᵀ, shared by the heads,

        y_i = Σ_{j≤i} e^{r_i − r_j} G_ij u_j + e^{r_i} S_m C_i,    u_j = dt_j x_j
        S_{m+1} = e^R S_m + Σ_j e^{R − r_j} u_j B_jᵀ
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, q: int
    ) -> tuple[Tensor, Tensor]:
        ctx.q = q
        ctx.save_for_backward(x, dt, A, B, C, state)
        part = _Chunks(x, dt, A, B, C, q)
        scores = part.scores()
        starts, state = part.states(state)
        inside = (scores @ part.u.transpose(2, 3)).transpose(2, 3)  # (b, m, q, h, p)
        before = (part.C @ starts.to(x.dtype).flatten(2, 3).mT).view_as(part.x)
        y = inside * part.row + before * part.from_start
        return y.to(x.dtype).flatten(1, 2), state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, state = ctx.saved_tensors
        dy, dstate = gradients
        part = _Chunks(x, dt, A, B, C, ctx.q)
        narrow = x.dtype
        dy = dy.unflatten(1, (-1, ctx.q))  # (b, m, q, h, p)
        decays = part.decays()  # (b, m, h, q, q)
        lower = (part.C @ part.B.mT).tril()  # G, (b, m, q, q)
        starts, _ = part.states(state)

        # Between chunks, backwards: `after` is the gradient of the state at a chunk's end.
        dy_from_start = (dy * part.from_start).to(narrow).flatten(3)  # (b, m, q, h·p)
        to_starts = (dy_from_start.mT @ part.C).view_as(starts).to(dstate.dtype)
        after = torch.empty_like(starts)
        for m in reversed(range(starts.shape[1])):
            after[:, m] = dstate
            dstate = part.kept[:, m] * dstate + to_starts[:, m]

        # Inputs: what a frame gave inside its chunk, and to the states after it.
        dy_row = (dy * part.row).to(narrow).transpose(2, 3)  # (b, m, h, q, p)
        u = part.u.transpose(2, 3)
        inside = ((decays * lower[:, :, None]).mT @ dy_row).transpose(2, 3) * part.column
        outside = (part.B @ after.to(narrow).flatten(2, 3).mT).view_as(part.x) * part.to_end
        du = inside + outside
        products = (dy_row @ u.mT) * decays  # (b, m, h, q, q)
        dG = products.sum(2).tril()
        weighted = (part.x * (part.dt * part.to_end)).to(narrow).flatten(3)  # u e^{R − r}
        dB = dG.mT @ part.C + weighted @ after.to(narrow).flatten(2, 3)
        dC = dG @ part.B + dy_from_start @ starts.to(narrow).flatten(2, 3)

        # Decays: dt_k A multiplies every path from a frame j < k to a frame i ≥ k. Sums of those paths alone:
        # row sums minus column sums would be the same number, and lose it to cancellation.
        paths = products.mul_(lower[:, :, None])
        until = paths @ paths.new_ones(ctx.q, ctx.q).triu(1)  # Σ_{j<k} paths_ij, (b, m, h, q, q)
        crossing = until.tril_().sum(-2).double().transpose(2, 3)  # (b, m, q, h)
        arrived = (dy_from_start * (part.C @ starts.to(narrow).flatten(2, 3).mT)).unflatten(-1, x.shape[2:]).sum(-1)
        departed = (part.x * part.dt * outside).sum(-1)  # (b, m, q, h)
        passing = (part.kept * starts * after).sum((-2, -1))  # (b, m, h)
        rates = crossing + arrived.double().flip(2).cumsum(2).flip(2)
        rates = rates + (departed.double().cumsum(2) - departed) + passing[:, :, None]
        rates = rates.flatten(1, 2)  # (b, t, h), float64

        du = du.flatten(1, 2)
        ddt = ((x * du).sum(-1) + rates * A.double()).to(dt.dtype)
        dA = (rates * dt.double()).sum((0, 1)).to(A.dtype)
        dx = (du * dt[..., None]).to(narrow)
        return dx, ddt, dA, dB.flatten(1, 2).to(narrow), dC.flatten(1, 2).to(narrow), dstate, None


class _Chunks:
    """A sequence cut into chunks, and the decays between its frames. Axes (b, m, q, ...), see `_Chunked`.

    Sums of dt·A are taken in float64 and then split, r = high + low, both of the state's type: the
    difference of two `high` is exact to that type's relative precision, and e^{low} goes into rows and
    columns. One float32 alone loses up to 1e-3 where the sums are large.
    """

    def __init__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, q: int) -> None:
        self.x = x.unflatten(1, (-1, q))  # (b, m, q, h, p)
        self.B, self.C = B.unflatten(1, (-1, q)), C.unflatten(1, (-1, q))  # (b, m, q, n)
        dt = dt.unflatten(1, (-1, q))  # (b, m, q, h)
        sums = (dt.double() * A.double()).cumsum(2)
        high = sums.to(dt.dtype)
        low = (sums - high).to(dt.dtype)
        self.high = high.transpose(2, 3)  # (b, m, h, q)
        self.dt = dt[..., None]
        self.row = low.exp()[..., None]
        self.column = (-low).exp()[..., None]
        self.from_start = sums.exp().to(dt.dtype)[..., None]
        self.to_end = (sums[:, :, -1:] - sums).exp().to(dt.dtype)[..., None]
        self.kept = self.from_start[:, :, -1, :, :, None]  # (b, m, h, 1, 1)
        self.u = (self.x * (self.dt * self.column)).to(x.dtype)  # u_j e^{−low_j}

    def decays(self) -> Tensor:
        """e^{high_i − high_j}, (b, m, h, q, q); 1 above the diagonal, for a lower triangle to mask."""
        return (self.high[..., :, None] - self.high[..., None, :]).clamp_(max=0).exp_().to(self.x.dtype)

    def scores(self) -> Tensor:
        """e^{high_i − high_j} G_ij, zero above the diagonal: (b, m, h, q, q)."""
        return self.decays().mul_((self.C @ self.B.mT).tril()[:, :, None])

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states before every chunk (b, m, h, p, n), and the one after the last (b, h, p, n)."""
        weighted = (self.x * (self.dt * self.to_end)).to(self.x.dtype).flatten(3)  # (b, m, q, h·p)
        added = (weighted.mT @ self.B).unflatten(2, self.x.shape[3:])  # (b, m, h, p, n)
        starts = torch.empty(added.shape, dtype=state.dtype, device=state.device)
        for m in range(added.shape[1]):
            starts[:, m] = state
            state = self.kept[:, m] * state + added[:, m]
        return starts, state


def decay_matrix(clock: Tensor) -> Tensor:
    """L_ij = exp(clock_i − clock_j) for i ≥ j, zero above the diagonal.

    Args:
        clock: running sums of dt · A, (..., t).

    Returns:
        (..., t, t), of the type of `clock`.
    """
    t = clock.shape[-1]
    later = torch.ones(t, t, dtype=torch.bool, device=clock.device).triu(1)
    return (clock[..., :, None] - clock[..., None, :]).masked_fill(later, -torch.inf).exp()


def _clock(dt: Tensor, A: Tensor) -> Tensor:
    """Running sums of dt · A over frames, (b, t, h) → (b, h, t), in float64.

    Differences of float32 sums lose up to 1e-3 where dt · A is large; these tensors are small.
    """
    return (dt.double() * A.double()).cumsum(1).transpose(1, 2)


def _first_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> Tensor:
    """Check the shapes and return the state before the first frame, (b, h, p, n), float32 or wider."""
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x {tuple(x.shape)} must be (b, t, h, p) with at least one frame")
    b, t, h, p = x.shape
    n = B.shape[-1]
    expected = {"dt": (dt, (b, t, h)), "A": (A, (h,)), "B": (B, (b, t, n)), "C": (C, (b, t, n))}
    if D is not None:
        expected["D"] = (D, (h,))
    if initial_state is not None:
        expected["initial_state"] = (initial_state, (b, h, p, n))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must be {shape} to go with x {tuple(x.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        return x.new_zeros((b, h, p, n), dtype=wide)
    return initial_state.to(wide)


def _result(y: Tensor, x: Tensor, D: Tensor | None, state: Tensor, return_state: bool) -> Any:
    if D is not None:
        y = y + D.to(state.dtype)[:, None] * x
    y = y.to(x.dtype)
    return (y, state) if return_state else y
