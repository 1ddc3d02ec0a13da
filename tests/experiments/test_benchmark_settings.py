"""Settings are checked; a measurement pairs each run with what was timed around it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from benchmark_results import measurement

from bsmamba2.experiments.benchmark.settings import Settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": ()}, "lengths=()"),
        ({"lengths": (0.0,)}, "lengths=(0.0,)"),
        ({"parts": ("scan", "scans")}, "'scans' is not one of scan, convolution"),
        ({"parts": ()}, "parts is empty"),
        ({"backends": ("fast",)}, "'fast' is not one of plain"),
        ({"dtypes": ("float64",)}, "'float64'"),
        ({"modes": ("backward",)}, "'backward'"),
        ({"baselines": ("jax",)}, "'jax'"),
        ({"preset": "huge"}, "preset='huge'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"repeats": 0}, "repeats=0"),
        ({"limit": 0.0}, "limit=0.0"),
        ({"memory": float("nan")}, "memory=nan"),
    ],
)
def test_a_bad_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device='cuda': there is no such device"):
        Settings(device="cuda")


def test_runs_are_paired_with_what_stood_beside_them() -> None:
    # A machine that slows down threefold meanwhile: neither the share of the peak nor the quotient may see it.
    ours = measurement(times=(1.0, 2.0, 3.0), gemm_peaks=(100.0, 50.0, 100 / 3))
    theirs = measurement(times=(2.0, 4.0, 6.0), gemm_peaks=(100.0, 50.0, 100 / 3))
    assert ours.fraction == pytest.approx(0.5)
    assert theirs.ratio_to(ours) == pytest.approx(2)
    assert ours.median == 2
    assert ours.quartiles == (1.5, 2.5)
    assert measurement(times=(3.0,)).quartiles == (3.0, 3.0)
