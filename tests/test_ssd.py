"""The scan: loop, matrix and chunks are one function, in outputs, states and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import relative
from torch import Tensor

from bsmamba2 import ssd
from bsmamba2.kernels import chunked as cache_blocked

CHUNKED = pytest.mark.parametrize("chunked", [ssd.chunked, cache_blocked.chunked], ids=["plain", "cache-blocked"])
NAMES = ("y", "state", "d x", "d dt", "d A", "d B", "d C", "d D", "d initial_state")


def problem(
    t: int, h: int = 2, *, b: int = 2, p: int = 3, n: int = 4, dt: float = 0.1, decay: float = 8.0, seed: int = 0
) -> list[Tensor]:
    """Inputs x, dt, A, B, C, D, initial_state in float64 that float32 represents exactly."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    steps = torch.rand(b, t, h, generator=g) * dt
    rates = -torch.rand(h, generator=g) * decay - 1e-3
    parts = [normal(b, t, h, p), steps, rates, normal(b, t, n), normal(b, t, n), normal(h), normal(b, h, p, n)]
    return [part.double() for part in parts]


def everything(
    scan: Callable, inputs: list[Tensor], dtype: torch.dtype, *, start: bool = True, end: bool = True
) -> dict[str, Tensor]:
    """Output, state and all gradients of a random projection of both; without a first or last state if so asked."""
    inputs = [part.to(dtype, copy=True).requires_grad_() for part in inputs]
    y, state = scan(*inputs[:6], initial_state=inputs[6] if start else None, return_state=True)
    g = torch.Generator().manual_seed(9)
    results, seeds = [y, state], [torch.randn(part.shape, generator=g).to(part.dtype) for part in (y, state)]
    if not end:
        results = [scan(*inputs[:6], initial_state=inputs[6] if start else None)]
    wanted = inputs if start else inputs[:6]
    found = [y, state, *torch.autograd.grad(results, wanted, seeds[: len(results)])]
    return dict(zip(NAMES, (part.detach() for part in found), strict=False))


def decay_terms(inputs: list[Tensor], dy: Tensor, *, start: bool = True, end: bool = True) -> Tensor:
    """What every frame adds to d A, its size summed: (h,)."""
    x, dt, A, B, C, _, first = inputs
    log_decay = (dt * -A).requires_grad_()  # with x · dt held fixed
    y, state = ssd.recurrent(
        x * (dt / log_decay)[..., None],
        log_decay,
        -torch.ones_like(A),
        B,
        C,
        initial_state=first if start else None,
        return_state=True,
    )
    results, g = [y], torch.Generator().manual_seed(9)
    seeds = [torch.randn(part.shape, generator=g).to(part.dtype) for part in (y, state)]
    if end:
        results.append(state)
    (rates,) = torch.autograd.grad(results, [log_decay], seeds[: len(results)])
    return (rates * dt).abs().sum((0, 1))


def assert_same(
    scan: Callable, inputs: list[Tensor], dtype: torch.dtype = torch.float32, bound: float = 1e-5, **ends: bool
) -> None:
    """Agreement with the loop in float64. d A and d D are sums over all frames, which can cancel: for them, relative to
    the sum of the terms' sizes."""
    expected = everything(ssd.recurrent, inputs, torch.float64, **ends)
    dy = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).double()
    terms = {"d A": decay_terms(inputs, dy, **ends), "d D": (dy * inputs[0]).abs().sum((0, 1, 3))}
    for name, found in everything(scan, inputs, dtype, **ends).items():
        assert found.isfinite().all(), name
        size = terms[name].norm() / expected[name].norm() if name in terms else 1
        assert relative(found, expected[name]) < bound * max(1, size), name
    with torch.no_grad():  # another form may run where no gradient is wanted
        *parts, first = (part.to(dtype) for part in inputs)
        first = first if ends.get("start", True) else None
        y, state = scan(*parts, initial_state=first, return_state=True)
        assert relative(y, expected["y"]) < bound
        assert relative(state, expected["state"]) < bound
        if not ends.get("end", True):
            assert relative(scan(*parts, initial_state=first), expected["y"]) < bound


@CHUNKED
@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(1, 70),
    h=st.integers(1, 3),
    chunk=st.sampled_from([1, 3, 16, 64]),
    dt=st.sampled_from([1e-5, 1e-2, 1.0, 10.0]),
    decay=st.sampled_from([1e-3, 1.0, 16.0, 100.0]),
    start=st.booleans(),
    end=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_all_forms_agree(
    chunked: Callable, t: int, h: int, chunk: int, dt: float, decay: float, start: bool, end: bool, seed: int
) -> None:
    inputs = problem(t, h, dt=dt, decay=decay, seed=seed)
    assert_same(ssd.matrix, inputs, start=start, end=end)
    assert_same(partial(chunked, chunk=chunk), inputs, start=start, end=end)


@CHUNKED
def test_float64_shows_that_the_algebra_is_exact(chunked: Callable) -> None:
    assert_same(partial(chunked, chunk=16), problem(50), torch.float64, 1e-13)


@CHUNKED
def test_a_huge_step_among_small_ones_keeps_its_precision(chunked: Callable) -> None:
    # After it, float32 running sums stand at −2000 and lose the small differences: 1e-4 relative and worse.
    inputs = problem(60, dt=0.1, decay=4.0)
    inputs[1][:, 20] = 1000.0
    assert_same(chunked, inputs, bound=1e-5)


@CHUNKED
@pytest.mark.parametrize(
    ("place", "value"), [(0, math.nan), (0, math.inf), (1, math.nan), (1, math.inf), (2, math.nan)]
)
def test_what_is_no_number_comes_out_as_such(chunked: Callable, place: int, value: float) -> None:
    inputs = [part.float() for part in problem(20)[:6]]
    inputs[place].flatten()[0] = value
    assert not chunked(*inputs).isfinite().all()


@pytest.mark.parametrize("decay", [3.0, 30.0, 300.0])
def test_strong_decay_is_exact_along_many_chunks(decay: float) -> None:
    inputs = problem(150, 4, dt=1.0, decay=decay, n=6)
    for chunk in (16, 64, 150):
        assert_same(partial(ssd.chunked, chunk=chunk), inputs)


@CHUNKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bit_of_a_frame_depends_on_later_ones(chunked: Callable, dtype: torch.dtype) -> None:
    inputs = [part.to(dtype) for part in problem(64, dt=0.3, decay=10.0)[:6]]
    with torch.no_grad():
        y = chunked(*inputs)
        for frame in (20, 40, 63):
            for place, size in ((0, 10.0), (1, 1.2), (3, 10.0), (4, 10.0)):
                changed = [part.clone() for part in inputs]
                changed[place][:, frame:] *= size
                assert torch.equal(chunked(*changed)[:, :frame], y[:, :frame])


@CHUNKED
def test_a_quiet_stretch_after_a_reset_keeps_its_precision(chunked: Callable) -> None:
    # Loud, a reset, then 120 dB below: an error of what was loud would drown it.
    x, dt, A, B, C, D, _ = problem(64, dt=0.1, decay=4.0)
    x[:, 20:] *= 1e-6
    dt[:, 20] = 500.0
    found = chunked(*(part.float() for part in (x, dt, A, B, C, D)))
    expected = ssd.recurrent(x, dt, A, B, C, D)
    for frame in range(64):
        assert relative(found[:, frame], expected[:, frame]) < 1e-5, frame


@pytest.mark.parametrize("scan", [ssd.recurrent, ssd.matrix, ssd.chunked, cache_blocked.chunked])
def test_a_sequence_in_two_pieces_is_the_sequence(scan: Callable) -> None:
    x, dt, A, B, C, D, start = problem(40)
    whole, end = scan(x, dt, A, B, C, D, initial_state=start, return_state=True)
    for cut in (1, 17, 39):
        first, state = scan(
            x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, initial_state=start, return_state=True
        )
        rest = scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, initial_state=state, return_state=True)
        torch.testing.assert_close(torch.cat([first, rest[0]], 1), whole)
        torch.testing.assert_close(rest[1], end)


@pytest.mark.parametrize("scan", [ssd.matrix, ssd.chunked, cache_blocked.chunked])
def test_zeros_stay_zeros_with_finite_gradients(scan: Callable) -> None:
    inputs = [torch.zeros_like(part) if i in (0, 3, 4, 6) else part for i, part in enumerate(problem(20))]
    for name, found in everything(scan, inputs, torch.float32).items():
        assert found.isfinite().all(), name
    assert not everything(scan, inputs, torch.float32)["y"].any()


@CHUNKED
def test_strided_inputs_are_read_as_they_are(chunked: Callable) -> None:
    x, dt, A, B, C, D, start = problem(30)
    packed = torch.cat([x.flatten(2), B, C, dt], -1)  # as a mixer's projection gives them
    parts = packed.split([6, 4, 4, 2], -1)
    views = (parts[0].unflatten(-1, (2, 3)), parts[3], A, parts[1], parts[2], D)
    assert not views[0].is_contiguous()
    found = chunked(*views, initial_state=start, chunk=8)
    torch.testing.assert_close(found, ssd.recurrent(x, dt, A, B, C, D, initial_state=start))
    back = chunked(*(v.flip(1) if v.dim() > 1 else v for v in views), initial_state=start)
    torch.testing.assert_close(
        back, ssd.recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D, initial_state=start)
    )


@CHUNKED
def test_bfloat16_keeps_decay_and_state_wide(chunked: Callable) -> None:
    # 8 bits of mantissa in x, B and C; the sums behind the decays must not add to that.
    inputs = [part.to(torch.bfloat16) if i in (0, 3, 4) else part.float() for i, part in enumerate(problem(200))]
    y, state = chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
    expected, final = ssd.recurrent(
        *(part.double() for part in inputs[:6]), initial_state=inputs[6].double(), return_state=True
    )
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative(y, expected) < 2e-2
    assert relative(state, final) < 1e-2


@CHUNKED
def test_autocast_around_it_changes_nothing(chunked: Callable) -> None:
    inputs = [part.float() for part in problem(150)]
    expected = everything(chunked, inputs, torch.float32)
    without_gradients, _ = chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(chunked, inputs, torch.float32)
        quick, _ = chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
    for name in ("y", "state"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    torch.testing.assert_close(quick, without_gradients, rtol=0, atol=0)
    assert relative(quick, expected["y"]) < 1e-5


@pytest.mark.parametrize("position", range(5))
def test_a_wrong_shape_is_named(position: int) -> None:
    inputs = problem(10)[:6]
    names = ("dt", "A", "B", "C", "D")
    inputs[position + 1] = inputs[position + 1][..., :-1] if names[position] != "B" else inputs[position + 1][:, :-1]
    with pytest.raises(ValueError, match=f"^{names[position]} "):
        ssd.chunked(*inputs)


@CHUNKED
def test_wrong_arguments(chunked: Callable) -> None:
    x, dt, A, B, C, D, _ = problem(10)
    with pytest.raises(ValueError, match="chunk=0"):
        chunked(x, dt, A, B, C, D, chunk=0)
    with pytest.raises(ValueError, match=r"x .* must be \(b, t, h, p\)"):
        ssd.recurrent(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])
    with pytest.raises(ValueError, match="initial_state"):
        ssd.matrix(x, dt, A, B, C, initial_state=torch.zeros(1))
