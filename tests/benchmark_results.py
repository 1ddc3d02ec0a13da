"""A made-up measurement of the benchmark, for the tests of its settings and tables."""

from __future__ import annotations

from typing import Any

from bsmamba2.experiments.benchmark.settings import BACKWARD, Measurement


def measurement(**fields: Any) -> Measurement:
    values: dict[str, Any] = {
        "part": "model", "axis": "", "seconds": 8.0, "dtype": "float32", "mode": BACKWARD, "candidate": "chunked",
        "times": (1.0, 2.0, 4.0), "gemm_peaks": (100.0, 50.0, 20.0), "flops": 50.0, "units": 800.0, "memory": 5,
        "memory_before": 3, "difference": 0.0,
    }  # fmt: skip
    return Measurement(**{**values, **fields})
