"""`bsmamba2 cost` against PyTorch's trackers: a few small cells here, and all that the book's file of results has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.runtime_estimator import RuntimeEstimator
from tracked_cost import DTYPES, compare, tracked

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.experiments.cost import GPUS, training_cost
from bsmamba2.kernels import triton

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")

# The published widths, fewer bands, so that the test is quick.
PAPER = ModelConfig.preset("paper", depth=2, freqs_per_bands=(85,) * 11 + (90,))
SMALL = ModelConfig.preset("small", depth=1, freqs_per_bands=(85,) * 11 + (90,))
STORED: dict[str, Any] = {"dtype": "bfloat16", "gradient_checkpointing": False}
COST_MODEL = "operator-level-cost-model"
RESULTS = Path(__file__).parents[2] / "book/data/cost.json"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["stored", "recomputed"])
def test_memory_with_the_fused_scan(dtype: str, gradient_checkpointing: bool) -> None:
    cell: dict[str, Any] = {
        "seconds": 4.0,
        "batch": 2,
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
    }
    row = compare(PAPER, backend="triton", **cell)
    assert row["estimated"] == pytest.approx(row["tracked"], rel=0.10)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["stored", "recomputed"])
def test_operations_are_equal(gradient_checkpointing: bool) -> None:
    kind: dict[str, Any] = {"dtype": "float32", "gradient_checkpointing": gradient_checkpointing}
    row = compare(SMALL, backend="chunked", seconds=1.5, batch=2, **kind)
    assert row["estimated_flops"] == row["tracked_flops"]


@pytest.mark.parametrize(("gpu", "theirs"), [("A100 80 GB", "NVIDIA A100"), ("H100 80 GB", "NVIDIA H100")])
def test_a_step_takes_longer_than_its_lower_bound(gpu: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's `RuntimeEstimator` adds up the roofline of each operation by itself, which no fusion shortens."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    estimator = RuntimeEstimator(theirs)
    tracked(SMALL, backend="chunked", seconds=1.5, batch=2, observer=estimator(COST_MODEL), **STORED)
    bound = training_cost(SMALL, seconds=1.5, batch=2, **STORED).lower_bound(GPUS[gpu].bfloat16, GPUS[gpu].bandwidth)
    assert 0 < bound < 1e-3 * estimator.total_runtime


def test_a_tensor_kept_by_mistake_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan that keeps one more copy of its output in every layer."""
    cell: dict[str, Any] = {"seconds": 1.5, "batch": 2, "dtype": "bfloat16", "gradient_checkpointing": False}
    peak, _ = tracked(SMALL, backend="triton", **cell)
    scan, kept = triton.scan, []

    def leaking(*inputs: Any, **options: Any) -> Any:
        y = scan(*inputs, **options)
        kept.append(y.detach().clone())
        return y

    monkeypatch.setattr(triton, "scan", leaking)
    more, _ = tracked(SMALL, backend="triton", **cell)
    leaked = sum(y.untyped_storage().nbytes() for y in kept)
    assert 1e6 < more["Total"] - peak["Total"] == pytest.approx(leaked, rel=1e-3)
    # The weights, each rounded up to the 512 bytes that CUDA gives out.
    sizes = [4 * weight.numel() for weight in BSMamba2(SMALL).parameters()]
    assert peak["PARAM"] == sum(-(-size // 512) * 512 for size in sizes)


@pytest.mark.skipif(not RESULTS.exists(), reason="tracked_cost.py has not been run")
def test_the_results_in_the_book() -> None:
    """With the fused scan memory is within 10 % in every cell, and operations are equal."""
    for row in json.loads(RESULTS.read_text())["rows"]:
        if row["backend"] == "triton":
            assert row["estimated"] == pytest.approx(row["tracked"], rel=0.10), row
        else:
            assert row["estimated_flops"] == row["tracked_flops"], row
