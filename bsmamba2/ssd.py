"""The scan of Mamba-2 (state-space duality, SSD) in three forms that compute the same function.

For every head, with a scalar decay a_t = exp(dt_t · A):

    H_t = a_t · H_{t−1} + dt_t · x_t B_tᵀ        (p × n)
    y_t = H_t C_t + D · x_t                       (p)

`recurrent` runs this recurrence as written, `matrix` runs one masked matrix product, and `chunked` runs products inside
chunks and a short recurrence between them.

Source: T. Dao and A. Gu, "Transformers are SSMs", arXiv:2405.21060. Book: "The scan".
Axis letters: see `bsmamba2.config`; q is the length of a chunk, and l counts the chunks.

All take `(x, dt, A, B, C, D=None, *, initial_state=None, return_state=False)`:

    x              (b, t, h, p)   input
    dt             (b, t, h)      step, already positive
    A              (h,)           negative, one per head
    B, C           (b, t, n)      input and output projections, shared by the heads
    D              (h,)           skip
    initial_state  (b, h, p, n)   state before the first frame; zero if None

and return y (b, t, h, p), and with `return_state` also the state after the last frame (b, h, p, n).
Decay, products and state are computed in float32 or wider for every type of x; y has the type of x, and the
state keeps the wider type. Mismatched shapes raise ValueError. Faster forms of the same function are in
`bsmamba2.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
"""Largest number of frames in a chunk of `chunked`."""
Scan = Callable[..., Any]
"""Any function with the signature above; pass one to a model to replace its scan."""


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
    """Recurrent form of the scan, frame by frame: t steps, memory for one state. For shapes, see `bsmamba2.ssd`."""
    wide = check(x, dt, A, B, C, D, initial_state)
    state = _first_state(x, B, initial_state)
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
    """Matrix form of the scan, y = (L ∘ C Bᵀ)(dt · x): t × t memory per head. For shapes, see `bsmamba2.ssd`.

    L_ij = exp(Σ_{j<τ≤i} dt_τ A) on and below the diagonal, zero above it (`decay_matrix`).
    """
    wide = check(x, dt, A, B, C, D, initial_state)
    state = _first_state(x, B, initial_state)
    cumsum_dtA = (dt.double() * A.double()).cumsum(1).transpose(1, 2)  # (b, h, t)
    inputs = (x * dt[..., None]).to(wide).transpose(1, 2)  # (b, h, t, p)
    scores = (C.to(wide) @ B.to(wide).mT)[:, None] * decay_matrix(cumsum_dtA).to(wide)  # (b, h, t, t)
    from_start = cumsum_dtA.exp().to(wide)[..., None] * (C.to(wide)[:, None] @ state.mT)  # (b, h, t, p)
    y = (scores @ inputs + from_start).transpose(1, 2)
    to_end = (cumsum_dtA[..., -1:] - cumsum_dtA).exp().to(wide)  # (b, h, t)
    added = (to_end[..., None] * inputs).mT @ B.to(wide)[:, None]  # (b, h, p, n)
    state = cumsum_dtA[..., -1].exp().to(wide)[..., None, None] * state + added
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
    chunk: int = CHUNK,
) -> Any:
    """Chunked form of the scan: the matrix form inside chunks, the recurrence between them.

    Time and memory are linear in t. Any length works.

    Args:
        chunk: largest number of frames in a chunk. For the other arguments, see `bsmamba2.ssd`.

    Raises:
        ValueError: if `chunk` is below 1, or shapes do not match.
    """
    wide = check(x, dt, A, B, C, D, initial_state)
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be at least 1 frame")
    t = x.shape[1]
    q = -(-t // -(-t // chunk))  # chunks of equal length, as few as possible

    def cut(part: Tensor) -> Tensor:
        """(b, t, …) → (b, l, q, …). Frames appended to fill the last chunk have dt = 0, so they change nothing."""
        filled = functional.pad(part, (0, 0) * (part.dim() - 2) + (0, -t % q))
        return filled.unflatten(1, (-1, q))

    with torch.autocast(x.device.type, enabled=False):
        inputs = cut(x.to(wide) * dt.to(wide)[..., None]).transpose(2, 3)  # (b, l, h, q, p)
        B, C = cut(B.to(wide))[:, :, None], cut(C.to(wide))[:, :, None]  # (b, l, 1, q, n)
        # Float64, because differences of float32 sums lose up to 1e-3 if dt · A is large. These tensors are small.
        cumsum_dtA = cut(dt.double() * A.double()).cumsum(2).transpose(2, 3)  # (b, l, h, q)

        # 1. Frames of the same chunk: the matrix form.
        y = (C @ B.mT * decay_matrix(cumsum_dtA, wide)) @ inputs  # (b, l, h, q, p)

        # 2. The state that each chunk adds, decayed to its end.
        to_end = (cumsum_dtA[..., -1:] - cumsum_dtA).exp().to(wide)[..., None]  # (b, l, h, q, 1)
        added = (to_end * inputs).mT @ B  # (b, l, h, p, n)

        # 3. The recurrence, chunk by chunk: the state before each chunk.
        across = cumsum_dtA[..., -1].exp().to(wide)[..., None, None]  # (b, l, h, 1, 1)
        states = [_first_state(x, B, initial_state)]
        for i in range(added.shape[1]):
            states.append(across[:, i] * states[-1] + added[:, i])
        before = torch.stack(states[:-1], dim=1)  # (b, l, h, p, n)

        # 4. The contribution of the state before a chunk to its frames.
        y = y + cumsum_dtA.exp().to(wide)[..., None] * (C @ before.mT)
        y = y.transpose(2, 3).flatten(1, 2)[:, :t]  # (b, t, h, p)
    return _result(y, x, D, states[-1], return_state)


SCANS: dict[str, Scan] = {"recurrent": recurrent, "matrix": matrix, "chunked": chunked}
"""The three scans by name."""


def resolve_scan(scan: Scan | str) -> Scan:
    """Look up a scan by name; a function is returned unchanged. Raises ValueError for an unknown name."""
    if isinstance(scan, str):
        if scan not in SCANS:
            raise ValueError(f"scan={scan!r} must be one of {', '.join(map(repr, SCANS))}, or a function")
        return SCANS[scan]
    return scan


def decay_matrix(cumsum_dtA: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Decay between any two frames: L_ij = exp(r_i − r_j) for i ≥ j, zero above the diagonal.

    Args:
        cumsum_dtA: r, cumulative sums of dt · A over frames, (..., t).
        dtype: type in which the differences are exponentiated; None: the type of `cumsum_dtA`.

    Returns:
        (..., t, t), of type `dtype`.
    """
    t = cumsum_dtA.shape[-1]
    later = torch.ones(t, t, dtype=torch.bool, device=cumsum_dtA.device).triu(1)
    differences = (cumsum_dtA[..., :, None] - cumsum_dtA[..., None, :]).to(dtype or cumsum_dtA.dtype)
    return differences.masked_fill(later, -torch.inf).exp()


def check(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None
) -> torch.dtype:
    """Check the arguments of a scan and return the type of decay and state, float32 or wider.

    Raises:
        ValueError: names the first argument whose shape or device does not match.
    """
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"x {tuple(x.shape)} must be (b, t, h, p) with at least one frame")
    (b, t, h, p), n = x.shape, B.shape[-1]
    of_frames, first = {"dt": (dt, (b, t, h)), "B": (B, (b, t, n)), "C": (C, (b, t, n))}, (initial_state, (b, h, p, n))
    check_shapes("x", x, A=(A, (h,)), **of_frames, D=(D, (h,)), initial_state=first)
    return torch.promote_types(x.dtype, torch.float32)


def check_shapes(name: str, x: Tensor, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Check that arguments have the expected shapes and are on the device of x; None passes.

    Raises:
        ValueError: names the first argument with a wrong shape or device.
    """
    for other, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{other} {tuple(tensor.shape)} must be {shape} to go with {name} {tuple(x.shape)}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{other} is on {tensor.device} and {name} on {x.device}")


def _first_state(x: Tensor, B: Tensor, initial_state: Tensor | None) -> Tensor:
    """State before the first frame, (b, h, p, n), float32 or wider."""
    if initial_state is None:
        initial_state = x.new_zeros((len(x), *x.shape[2:], B.shape[-1]))
    return initial_state.to(torch.promote_types(x.dtype, torch.float32))


def _result(y: Tensor, x: Tensor, D: Tensor | None, state: Tensor, return_state: bool) -> Any:
    if D is not None:
        y = y + D.to(state.dtype)[:, None] * x
    y = y.to(x.dtype)
    return (y, state) if return_state else y
