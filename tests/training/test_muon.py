"""Muon, against torch's own and against what its iteration does to singular values."""

from __future__ import annotations

import copy
import functools
import io
import math
from itertools import islice

import pytest
import torch
from torch import Tensor, nn

import bsmamba2.training.muon
from bsmamba2 import BSMamba2
from bsmamba2.train import TrainConfig, Trainer
from bsmamba2.training.muon import NS_COEFFS, Muon, muon_and_adamw, newton_schulz

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
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_the_polynomials_values(
    shape: tuple[int, int],
) -> None:
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


def clips(count: int) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    targets = torch.randn(2 * count, 1, 2, 3000, generator=g)
    return [(target + noise, target) for target, noise in zip(targets[::2], targets[1::2], strict=True)]


def test_muon_takes_the_weights_of_linears_and_adamw_all_else(tiny: BSMamba2) -> None:
    adamw, muon = muon_and_adamw(tiny, TrainConfig(steps=1))
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    taken = [
        [names[id(one)] for group in optimiser.param_groups for one in group["params"]] for optimiser in (adamw, muon)
    ]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())  # each once
    linears = {f"{name}.weight" for name, module in tiny.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(taken[1]) == linears
    assert any("in_proj" in name for name in linears)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.01, 0.0]
    assert {name.split(".")[-1] for name in taken[0]} >= {"A_log", "D", "dt_bias", "bias"}


def test_a_step_of_muon_turns_a_matrix_and_its_size_is_that_of_adamw(tiny: BSMamba2) -> None:
    """From rest the step is the gradient with all its singular values made one, whatever the gradient's size."""
    before = copy.deepcopy(tiny.state_dict())
    config = TrainConfig(steps=1, lr=1e-2, weight_decay=0.0)
    trainer = Trainer(tiny, config, optimisers=muon_and_adamw(tiny, config))
    next(iter(trainer.run(clips(1))))
    for name in ("layers.0.time.forwards.mixer.in_proj.weight", "layers.0.band.merge.weight"):
        step = (tiny.state_dict()[name] - before[name]) / 1e-2
        values = torch.linalg.svdvals(step / (0.2 * math.sqrt(max(step.shape))))
        assert values.min() > 0.5, name  # five iterations of Newton and Schulz bring them into this range
        assert values.max() < 1.3, name
        assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.3), name
    step = (tiny.state_dict()["layers.0.time.forwards.mixer.D"] - before["layers.0.time.forwards.mixer.D"]) / 1e-2
    torch.testing.assert_close(step.abs(), torch.ones_like(step), rtol=1e-3, atol=0)  # AdamW's first step


def test_a_trainer_with_muon_resumes_with_the_same_bits(tiny: BSMamba2) -> None:
    config = TrainConfig(steps=5, lr=1e-2, schedule="wsd")

    def trainer() -> Trainer:
        model = copy.deepcopy(tiny)
        return Trainer(model, config, optimisers=muon_and_adamw(model, config))

    whole, half, resumed = trainer(), trainer(), trainer()
    losses = [step.loss for step in whole.run(clips(5))]
    stopped = [step.loss for step in islice(half.run(clips(5)), 2)]
    buffer = io.BytesIO()
    torch.save(half.state(), buffer)
    buffer.seek(0)
    resumed.load_state(torch.load(buffer, weights_only=True))
    assert stopped + [step.loss for step in resumed.run(clips(5))] == losses
    for name, part in whole.model.state_dict().items():
        assert torch.equal(part, resumed.model.state_dict()[name]), name
