"""The benchmark measures time and memory, and skips what is too large or too slow."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from bsmamba2.experiments.benchmark import measuring as benchmark
from bsmamba2.experiments.benchmark.measuring import Trial
from bsmamba2.experiments.benchmark.settings import BACKWARD, FORWARD, Case, Measurement, Settings, Skipped

SMALL = Settings(lengths=(0.25,), dtypes=("float32",), repeats=2, preset="small", sequences=2, baselines=(), limit=60.0)


@pytest.mark.parametrize(("took", "runs", "times"), [(500.0, 0, 1), (5.0, 3, 2)])
def test_a_long_separation_is_timed_once(monkeypatch: pytest.MonkeyPatch, took: float, runs: int, times: int) -> None:
    done = []
    monkeypatch.setitem(benchmark.GEMM_SIZE, "cpu", 64)
    monkeypatch.setattr(benchmark, "trial", lambda case, settings: Trial(1, 2, took))
    monkeypatch.setattr(benchmark, "prepare", lambda case, settings: lambda: (done.append(1), time.sleep(1.1))[0])
    settings = dataclasses.replace(SMALL, repeats=2)
    (row,) = benchmark.measure([Case("separation", "", 3600.0, "float32", FORWARD, "carried")], settings)
    assert isinstance(row, Measurement)
    assert (len(done), len(row.times), len(row.gemm_peaks), row.memory) == (runs, times, times, 2)
    assert (row.times == (took,)) == (took > benchmark.LONG)


def test_what_failed_at_one_length_is_not_tried_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(cases: Any, settings: Settings) -> Any:
        for case in cases:
            tried.append((case.seconds, case.candidate))
            if case.candidate == "matrix" and case.seconds >= 2:
                yield Skipped(**vars(case), reason="more than 1 s")

    monkeypatch.setattr(benchmark, "measure", measure)
    settings = Settings(lengths=(1, 2, 4, 8), parts=("scan",), dtypes=("float32",), modes=(FORWARD,))
    found = list(benchmark.run(settings))
    assert (8.0, "chunked") in tried
    assert (4.0, "matrix") not in tried
    assert [(one.seconds, one.reason) for one in found] == [
        (2.0, "more than 1 s"), (4.0, "at 2 s: more than 1 s"), (8.0, "at 2 s: more than 1 s")
    ]  # fmt: skip


@pytest.mark.slow
def test_a_trial_finds_memory_and_stops_what_is_too_large_or_too_slow() -> None:
    case = Case("scan", "", 8.0, "float32", FORWARD, "matrix")
    ballast = torch.ones(50_000_000)  # in this process, and so no business of the trial's
    found = benchmark.trial(case, SMALL)
    del ballast
    assert isinstance(found, Trial)
    scores = 2 * 4 * 401**2 * 8  # sequences, heads, frames twice, in float64
    assert scores < found.memory - found.memory_before < 10 * scores
    assert found.memory_before < 1e9
    small = dataclasses.replace(SMALL, memory=scores / 4e9)
    # Told by the allocator, or, when not even a thread fits, by the end of the process.
    assert str(benchmark.trial(case, small)).startswith(
        ("more than 0.00", "its process ended with code 1: more memory")
    )
    loop = Case("scan", "", 30.0, "float32", BACKWARD, "recurrent")
    started = time.monotonic()
    assert benchmark.trial(loop, dataclasses.replace(SMALL, limit=0.05)) == "more than 0.05 s"
    assert time.monotonic() - started < 20
