"""A tiny model, and the weights of the published model's fixture."""

import pytest
import torch
from checkpoint_files import TWO_STEMS, published_weights
from torch import Tensor

from bsmamba2 import BSMamba2


@pytest.fixture
def published() -> dict[str, Tensor]:
    return published_weights()


@pytest.fixture
def model() -> BSMamba2:
    torch.manual_seed(0)
    return BSMamba2(TWO_STEMS)
