"""torch.distributed: without torchrun, everything is the identity."""

from __future__ import annotations

import pytest
import torch

from bsmamba2.training.distributed import (
    all_gather_object,
    all_reduce,
    broadcast_object,
    init_distributed,
    rank,
    world_size,
)


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed("cpu") as device:
        assert device.type == "cpu"
        assert (world_size(), rank(), all_gather_object(3), broadcast_object(4)) == (1, 0, [3], 4)
        assert all_reduce(torch.tensor(5.0)) == 5
    for name, message in (
        ("cuda", r"device='cuda'.*GPU 0, but 0 can be used"),
        ("cuda:7", r"device='cuda:7'.*GPU 7, but 0 can be used"),
        ("gpu", r"device='gpu' must be auto, cpu, cuda or mps"),
    ):
        with pytest.raises(ValueError, match=message), init_distributed(name):
            pass
