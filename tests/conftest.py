"""What several tests share: the reference values of the published model, and a model small enough to run at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import TINY
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.checkpoints import from_published

FIXTURE = Path(__file__).parent / "data" / "published_model_small.safetensors"


@pytest.fixture(scope="session")
def published() -> dict[str, Tensor]:
    """A small instance of the published model: weights, input, activations, output, loss."""
    return load_file(FIXTURE)


@pytest.fixture
def published_model(published: dict[str, Tensor]) -> BSMamba2:
    """Our model with the published weights, for each test its own: some change its scan, or a weight."""
    config = ModelConfig(
        dim=32, depth=2, freqs_per_bands=(2, 2, 4, 12, 13), n_fft=64, hop_length=16, stems=("first", "second")
    )
    model = BSMamba2(config).eval()
    weights = {name.removeprefix("weights."): part for name, part in published.items() if name.startswith("weights.")}
    model.load_state_dict(from_published(weights))
    return model


@pytest.fixture
def tiny() -> BSMamba2:
    """A model of some thousand parameters, always the same."""
    torch.manual_seed(0)
    return BSMamba2(TINY).eval()
