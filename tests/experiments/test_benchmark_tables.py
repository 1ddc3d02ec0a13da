"""Tables of measurements, and the file that holds them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from benchmark_results import measurement

from bsmamba2.experiments.benchmark import tables as benchmark
from bsmamba2.experiments.benchmark.settings import FORWARD


def test_what_the_notebook_wrote_is_read_again(tmp_path: Path) -> None:
    one = measurement(times=(1.0, 2.0), gemm_peaks=(3.0, 4.0))
    written = {**dataclasses.asdict(one), "median": one.median, "fraction": one.fraction}
    (tmp_path / "benchmark.json").write_text(json.dumps({"machine": {"cores": 2}, "rows": [written]}))
    assert benchmark.load(tmp_path / "benchmark.json") == ([one], {"cores": 2})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by"):
        benchmark.load(tmp_path / "other.json")


def test_growth_is_against_a_quarter_of_the_length() -> None:
    rows = [
        measurement(),
        measurement(seconds=32.0, times=(9.0,) * 3, memory=23),
        measurement(seconds=16.0),
        measurement(seconds=2.0, dtype="bfloat16"),
    ]
    (line,) = benchmark.growth_table(rows)
    assert line["lengths"] == "32 s against 8 s"
    assert line["time"] == pytest.approx(4.5)
    assert line["memory"] == pytest.approx(10)


def test_reading_is_held_against_the_step_of_that_length() -> None:
    reading = measurement(part="loading", mode=FORWARD, units=1.0, times=(0.1,) * 3, flops=None)
    (line,) = benchmark.loading_table([measurement(), measurement(seconds=4.0, times=(0.5,) * 3), reading])
    assert line["read per second"] == pytest.approx(10)
    assert line["used per second"] == "0.500"
    assert line["keeps up"] == "20 times over"
