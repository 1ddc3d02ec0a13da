"""A larger model that begins as a smaller one: the same function, and all that is new can learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import TINY, relative
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, mamba2, save_checkpoint
from bsmamba2.checkpoints import Checkpoint, read_checkpoint
from bsmamba2.train import TrainConfig, Trainer
from bsmamba2.training.growth import begin_with

LARGER = {
    "layers": {"layers": 3},
    "features": {"dim": 32, "mask_expand": 2},
    "masks": {"mask_expand": 5},
    "all": {"layers": 2, "dim": 24, "mask_expand": 3},
}


@pytest.fixture
def small(tmp_path: Path) -> Checkpoint:
    """A checkpoint that has left its initial weights."""
    torch.manual_seed(0)
    model = BSMamba2(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_checkpoint(model, tmp_path / "small.safetensors")
    return read_checkpoint(tmp_path / "small.safetensors")


def grown(small: Checkpoint, larger: dict[str, int]) -> BSMamba2:
    torch.manual_seed(1)
    model = BSMamba2(dataclasses.replace(TINY, **larger))
    begin_with(model, small)
    return model


@pytest.mark.parametrize("larger", LARGER.values(), ids=LARGER)
def test_it_begins_as_the_same_function(
    small: Checkpoint, larger: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = torch.randn(2, 2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    models = [model.double().eval() for model in (small.model(), grown(small, larger))]
    for epsilon, bound in ((mamba2.EPS, 1e-2), (1e-12, 1e-6)):  # which has a larger share in a norm with more zeros
        monkeypatch.setattr(mamba2, "EPS", epsilon)
        with torch.no_grad():
            wanted, found = (model(mixture) for model in models)
        assert relative(found, wanted) < bound


@pytest.mark.parametrize("larger", LARGER.values(), ids=LARGER)
def test_all_that_is_new_learns(small: Checkpoint, larger: dict[str, int]) -> None:
    model = grown(small, larger)
    before = {name: part.clone() for name, part in model.state_dict().items()}

    def batches() -> list[tuple[Tensor, Tensor]]:
        g = torch.Generator().manual_seed(3)
        return [(torch.randn(2, 2, 4000, generator=g), torch.randn(2, 2, 4000, generator=g)) for _ in range(3)]

    config = TrainConfig(steps=3, lr=1e-3, weight_decay=0.0, loss_hop=441)
    list(Trainer(model, config).run(batches()))
    for name, part in model.state_dict().items():
        # The imaginary parts of the first bin and the last are always zero: of the four bins of a band, one eighth.
        assert (part != before[name]).double().mean() > 0.86, name


@pytest.mark.parametrize(
    "other",
    [{"dim": 8}, {"layers": 1, "dim": 32, "mask_expand": 1}, {"state": 16}, {"headdim": 16}, {"hop_length": 16}],
)
def test_what_is_smaller_or_differs_is_refused_and_nothing_changes(small: Checkpoint, other: dict[str, int]) -> None:
    config = ModelConfig(**{**dataclasses.asdict(TINY), **other})
    torch.manual_seed(1)
    model = BSMamba2(config)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(ValueError, match="is another size"):
        begin_with(model, small)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
