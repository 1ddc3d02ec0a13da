"""The cache-blocked chunked scan: outputs, states and hand-written gradients of the recurrence, at any decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ssd import assert_same, everything, problem

from bsmamba2 import ssd
from bsmamba2.kernels import chunked


@settings(max_examples=60, deadline=None)
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
    t: int, h: int, chunk: int, dt: float, decay: float, start: bool, end: bool, seed: int
) -> None:
    inputs = problem(t, h, dt=dt, decay=decay, seed=seed)
    assert_same(partial(chunked.chunked, chunk=chunk), inputs, start=start, end=end)


def test_float64_shows_that_the_algebra_is_exact() -> None:
    assert_same(partial(chunked.chunked, chunk=16), problem(50), torch.float64, 1e-13)


def test_a_huge_step_among_small_ones_keeps_its_precision() -> None:
    # After it, float32 running sums stand at −2000 and lose the small differences: 1e-4 relative and worse.
    inputs = problem(60, dt=0.1, decay=4.0)
    inputs[1][:, 20] = 1000.0
    assert_same(chunked.chunked, inputs, bound=1e-5)


@pytest.mark.parametrize("octaves", [0.5, 2.0, 3.7, 40.0, 1000.0])
def test_rows_are_cut_where_factors_would_leave_the_range_of_a_float(octaves: float) -> None:
    # One head decays by so much in each frame, the other hardly: the blocks serve both.
    steps = torch.tensor([octaves, 1e-3]).double().expand(64, 1, 2)
    sums = -steps.cumsum(0)
    blocks = chunked._blocks(sums)
    assert [first for first, _ in blocks] == [0, *(end for _, end in blocks[:-1])]
    assert blocks[-1][1] == 64
    assert all((end - first - 1) * octaves <= chunked.SPAN for first, end in blocks)
    shortest = 1 if octaves > chunked.JUMP else chunked.SPAN / octaves - 1
    assert all(end - first >= shortest for first, end in blocks[:-1])

    x, dt, A, B, C, D, _ = problem(64, decay=1.0)
    A = torch.tensor([-octaves, -1e-3]).double() * torch.tensor(2.0).log()
    assert_same(chunked.chunked, [x, torch.ones_like(dt), A, B, C, D, problem(64)[6]])


@pytest.mark.parametrize(
    ("place", "value"), [(0, math.nan), (0, math.inf), (1, math.nan), (1, math.inf), (2, math.nan)]
)
def test_what_is_no_number_comes_out_as_such(place: int, value: float) -> None:
    inputs = [part.float() for part in problem(20)[:6]]
    inputs[place].flatten()[0] = value
    assert not chunked.chunked(*inputs).isfinite().all()


def test_a_head_that_keeps_nothing_is_as_in_the_loop() -> None:
    inputs = [part.float() for part in problem(20)[:6]]
    inputs[2][0] = -math.inf
    torch.testing.assert_close(chunked.chunked(*inputs), ssd.recurrent(*inputs))


def test_split_by_decay_cost_only_the_heads_that_forget() -> None:
    steps = torch.tensor([40.0, 1e-3, 3.0, 3.0]).double().expand(64, 1, 4)  # 2560, 0, 192, 192 octaves
    found = list(chunked._split_by_decay(-steps.cumsum(0), torch.ones(64, 1, 4)))
    kinds = [(number, heads.start, heads.stop) for number, heads, *_ in found]
    assert kinds == [(0, 0, 4), (1, 0, 1), (1, 2, 4), *[(number, 0, 1) for number in range(2, 22)]]
    assert all(part.isfinite().all() for _, _, *parts in found for part in parts)


@pytest.mark.parametrize("decay", [3.0, 30.0, 300.0])
def test_split_by_decay_are_exact_along_many_chunks(decay: float) -> None:
    inputs = problem(150, 4, dt=1.0, decay=decay, n=6)
    for chunk in (16, 64, 150):
        assert_same(partial(chunked.chunked, chunk=chunk), inputs)


def test_without_split_by_decay_the_factors_would_leave_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(64, dt=1.0, decay=20.0)[:6]
    expected = ssd.recurrent(*inputs)
    inputs = [part.float() for part in inputs]
    with torch.no_grad():
        assert relative(chunked.chunked(*inputs), expected) < 1e-5
        monkeypatch.setattr(chunked, "SPAN", 1e6)
        assert not relative(chunked.chunked(*inputs), expected) < 1e-5


def test_without_blocks_the_factors_would_leave_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(64, dt=1.0, decay=20.0)
    assert_same(chunked.chunked, inputs)
    monkeypatch.setattr(chunked, "_blocks", lambda sums: [(0, len(sums))])
    with pytest.raises(AssertionError):
        assert_same(chunked.chunked, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bit_of_a_frame_depends_on_later_ones(dtype: torch.dtype) -> None:
    inputs = [part.to(dtype) for part in problem(64, dt=0.3, decay=10.0)[:6]]
    with torch.no_grad():
        y = chunked.chunked(*inputs)
        for frame in (20, 40, 63):
            for place, size in ((0, 10.0), (1, 1.2), (3, 10.0), (4, 10.0)):
                changed = [part.clone() for part in inputs]
                changed[place][:, frame:] *= size
                assert torch.equal(chunked.chunked(*changed)[:, :frame], y[:, :frame])


def test_a_quiet_stretch_after_a_reset_keeps_its_precision() -> None:
    # Loud, a reset, then 120 dB below: an error of what was loud would drown it.
    x, dt, A, B, C, D, _ = problem(64, dt=0.1, decay=4.0)
    x[:, 20:] *= 1e-6
    dt[:, 20] = 500.0
    found = chunked.chunked(*(part.float() for part in (x, dt, A, B, C, D)))
    expected = ssd.recurrent(x, dt, A, B, C, D)
    for frame in range(64):
        assert relative(found[:, frame], expected[:, frame]) < 1e-5, frame


@pytest.mark.parametrize("scan", [chunked.chunked])
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


@pytest.mark.parametrize("scan", [chunked.chunked])
def test_zeros_stay_zeros_with_finite_gradients(scan: Callable) -> None:
    inputs = [torch.zeros_like(part) if i in (0, 3, 4, 6) else part for i, part in enumerate(problem(20))]
    for name, found in everything(scan, inputs, torch.float32).items():
        assert found.isfinite().all(), name
    assert not everything(scan, inputs, torch.float32)["y"].any()


def test_strided_inputs_are_read_as_they_are() -> None:
    x, dt, A, B, C, D, start = problem(30)
    packed = torch.cat([x.flatten(2), B, C, dt], -1)  # as a mixer's projection gives them
    parts = packed.split([6, 4, 4, 2], -1)
    views = (parts[0].unflatten(-1, (2, 3)), parts[3], A, parts[1], parts[2], D)
    assert not views[0].is_contiguous()
    found = chunked.chunked(*views, initial_state=start, chunk=8)
    torch.testing.assert_close(found, ssd.recurrent(x, dt, A, B, C, D, initial_state=start))
    back = chunked.chunked(*(v.flip(1) if v.dim() > 1 else v for v in views), initial_state=start)
    torch.testing.assert_close(
        back, ssd.recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1), D, initial_state=start)
    )


def test_bfloat16_keeps_decay_and_state_wide() -> None:
    # 8 bits of mantissa in x, B and C; the sums behind the decays must not add to that.
    inputs = [part.to(torch.bfloat16) if i in (0, 3, 4) else part.float() for i, part in enumerate(problem(200))]
    y, state = chunked.chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
    expected, final = ssd.recurrent(
        *(part.double() for part in inputs[:6]), initial_state=inputs[6].double(), return_state=True
    )
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative(y, expected) < 2e-2
    assert relative(state, final) < 1e-2


def test_autocast_around_it_changes_nothing() -> None:
    inputs = [part.float() for part in problem(150)]
    expected = everything(chunked.chunked, inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = chunked.chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
        with torch.no_grad():
            quick, _ = chunked.chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
    torch.testing.assert_close(y, expected["y"], rtol=0, atol=0)
    torch.testing.assert_close(state, expected["state"], rtol=0, atol=0)
    assert relative(quick, expected["y"]) < 1e-5


def test_wrong_arguments() -> None:
    x, dt, A, B, C, D, _ = problem(10)
    with pytest.raises(ValueError, match="chunk=0"):
        chunked.chunked(x, dt, A, B, C, D, chunk=0)
    with pytest.raises(ValueError, match=r"x .* must be \(b, t, h, p\)"):
        ssd.recurrent(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0])
    with pytest.raises(ValueError, match="initial_state"):
        ssd.matrix(x, dt, A, B, C, initial_state=torch.zeros(1))


@pytest.mark.parametrize("decay", [0.1, 8.0, 300.0])
def test_float16_agrees_to_its_precision(decay: float) -> None:
    # Decay factors reach 2⁶⁰, far beyond the largest float16.
    parts = problem(200, 4, dt=1.0, decay=decay)
    inputs = [part.half() if i in (0, 3, 4) else part.float() for i, part in enumerate(parts)]
    expected = ssd.recurrent(*(part.double() for part in inputs[:6]))
    for scan in (chunked.chunked, ssd.chunked):
        with torch.no_grad():
            found = scan(*inputs[:6])
        assert found.dtype == torch.float16
        assert relative(found, expected) < 2e-3
