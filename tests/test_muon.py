"""Muon, against torch's own and against what its iteration does to singular values."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import bsmamba2.training.muon
from bsmamba2.training.muon import NS_COEFFS, Muon, newton_schulz

SHAPES = [(16, 16), (8, 24), (24, 8), (1, 5), (5, 1)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=generator)


def test_in_bfloat16_it_takes_torchs_steps_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bsmamba2.training.muon, "newton_schulz", functools.partial(newton_schulz, dtype=torch.bfloat16))
    ours, theirs = matrices(), matrices()
    both = Muon(ours, lr=0.1, weight_decay=0.02), torch.optim.Muon(
        theirs, lr=0.1, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
    )  # fmt: skip
    for seed in range(3):
        for parameters, optimiser in zip((ours, theirs), both, strict=True):
            gradients(parameters, seed)
            parameters[seed].grad = None  # to be passed over
            optimiser.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    states = [optimiser.state_dict()["state"] for optimiser in both]
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(state["momentum_buffer"], states[1][key]["momentum_buffer"]) for key, state in states[0].items()
    )


def test_on_a_cpu_it_goes_nearly_where_torchs_goes() -> None:
    """Nearly: bfloat16 has eight bits."""
    ours, theirs, before = matrices(), matrices(), matrices()
    optimisers = Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn="match_rms_adamw")
    for parameters, optimiser in zip((ours, theirs), optimisers, strict=True):
        gradients(parameters, 0)
        optimiser.step()
    for one, other, old in zip(ours, theirs, before, strict=True):
        assert 0 < (one - other).norm() < 0.03 * (one - old).norm()


def test_it_goes_on_from_a_state_of_torchs() -> None:
    first = matrices()
    theirs = torch.optim.Muon(first, lr=0.1, adjust_lr_fn="match_rms_adamw")
    gradients(first, 0)
    theirs.step()
    second = copy.deepcopy(first)
    ours = Muon(second, lr=0.1)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for parameters, optimiser in ((first, theirs), (second, ours)):
        gradients(parameters, 1)
        optimiser.step()
    for key, state in theirs.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], ours.state_dict()["state"][key]["momentum_buffer"])
    assert all((one - other).abs().max() < 0.01 for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_turned_matrix_keeps_its_singular_vectors_and_its_values_go_by_the_polynomial(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = sum(factor * values ** (2 * i + 1) for i, factor in enumerate(NS_COEFFS))
    torch.testing.assert_close(newton_schulz(matrix, torch.float64), left * values @ right, rtol=0, atol=1e-10)
    turned = newton_schulz(matrix.float())
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned, (left * values @ right).float(), rtol=0, atol=1e-4)
    assert newton_schulz(matrix.to("meta")).dtype == torch.bfloat16  # as torch's, on whatever is no CPU


def test_the_singular_values_come_near_one_whatever_the_size() -> None:
    torch.manual_seed(3)
    left, _ = torch.linalg.qr(torch.randn(40, 12))
    right, _ = torch.linalg.qr(torch.randn(12, 12))
    spread = torch.logspace(-2.5, 0, 12)
    for size in (1e-6, 1.0, 1e6):
        assert spread.min() > spread.norm() / 500
        values = torch.linalg.svdvals(newton_schulz(size * (left * spread) @ right))
        assert values.min() > 0.68
        assert values.max() < 1.21
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch.zeros(4, 6))


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\), \(2, 2, 2\).*AdamW"):
        Muon([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2, 2))])


def test_a_closure_is_called_with_gradients_before_the_step() -> None:
    one = nn.Parameter(torch.ones(2, 3))

    def closure() -> torch.Tensor:
        loss = one.square().sum()
        loss.backward()
        return loss

    loss = Muon([one], lr=0.1).step(closure)
    assert loss.item() == 6
    assert one.max() < 1
