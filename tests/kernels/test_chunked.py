"""The cache-blocked chunked scan: outputs, states and gradients of the recurrence, at any decay."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from test_ssd import assert_same, problem
from tiny_model import relative

from bsmamba2 import ssd
from bsmamba2.kernels import chunked


@pytest.mark.parametrize("octaves", [0.5, 2.0, 3.7, 40.0, 1000.0])
def test_any_decay_in_a_frame_beside_a_head_that_hardly_forgets(octaves: float) -> None:
    x, dt, A, B, C, D, start = problem(64, decay=1.0)
    A = torch.tensor([-octaves, -1e-3]).double() * math.log(2)
    inputs = [x, torch.ones_like(dt), A, B, C, D, start]
    assert_same(chunked.chunked, inputs)


def test_a_head_that_keeps_nothing_is_as_in_the_loop() -> None:
    inputs = [part.float() for part in problem(20)[:6]]
    inputs[2][0] = -math.inf
    torch.testing.assert_close(chunked.chunked(*inputs), ssd.recurrent(*inputs))


def test_levels_cost_only_the_heads_that_forget() -> None:
    steps = torch.tensor([40.0, 1e-3, 3.0, 3.0]).double().expand(64, 1, 4)  # 2560, 0, 192, 192 octaves
    found = list(chunked._split_by_decay(-steps.cumsum(0), torch.ones(64, 1, 4)))
    kinds = [(number, heads.start, heads.stop) for number, heads, *_ in found]
    assert kinds == [(0, 0, 4), (1, 0, 1), (1, 2, 4), *[(number, 0, 1) for number in range(2, 22)]]
    assert all(part.isfinite().all() for _, _, *parts in found for part in parts)


@pytest.mark.parametrize("decay", [3.0, 30.0, 300.0])
def test_levels_are_exact_along_many_chunks(decay: float) -> None:
    inputs = problem(150, 4, dt=1.0, decay=decay, n=6)
    for chunk in (16, 64, 150):
        assert_same(partial(chunked.chunked, chunk=chunk), inputs)


def test_without_levels_the_factors_would_leave_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(64, dt=1.0, decay=20.0)[:6]
    expected = ssd.recurrent(*inputs)
    inputs = [part.float() for part in inputs]
    with torch.no_grad():
        assert relative(chunked.chunked(*inputs), expected) < 1e-5
        monkeypatch.setattr(chunked, "SPAN", 1e6)
        assert not relative(chunked.chunked(*inputs), expected) < 1e-5


@pytest.mark.parametrize("needing", range(7))
def test_the_plain_form_runs_where_any_input_requires_a_gradient(monkeypatch: pytest.MonkeyPatch, needing: int) -> None:
    lengths: list[int] = []
    plain = ssd.chunked
    monkeypatch.setattr(ssd, "chunked", lambda *i, chunk, **o: (lengths.append(chunk), plain(*i, chunk=chunk, **o))[1])
    inputs = [part.float() for part in problem(20)]
    inputs[needing].requires_grad_()
    y, _ = chunked.chunked(*inputs[:6], initial_state=inputs[6], return_state=True)
    (found,) = torch.autograd.grad(y.sum(), inputs[needing])
    (expected,) = torch.autograd.grad(ssd.recurrent(*inputs[:6], initial_state=inputs[6]).sum(), inputs[needing])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert lengths == [ssd.CHUNK] * 2  # forwards, and once more for the backward pass
    with torch.no_grad():
        chunked.chunked(*inputs[:6])
    chunked.chunked(*(part.detach() for part in inputs[:6]))
    assert len(lengths) == 2


def test_a_gradient_keeps_the_inputs_only() -> None:
    inputs = [part.float().requires_grad_() for part in problem(640, 4, p=16, n=16)[:6]]
    kept: dict[int, int] = {}

    def keep(part: torch.Tensor) -> torch.Tensor:
        kept[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        return part

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
        chunked.chunked(*inputs)
    assert sum(kept.values()) <= sum(part.untyped_storage().nbytes() for part in inputs)


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
