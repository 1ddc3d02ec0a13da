"""The benchmark measures what it says: time, memory, operations, and what it leaves out."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bsmamba2 import ssd
from bsmamba2.experiments import benchmark
from bsmamba2.experiments.benchmark import BACKWARD, FORWARD, Case, Row, Settings, Skipped, Trial

SMALL = Settings(lengths=(0.25,), dtypes=("float32",), repeats=2, preset="small", sequences=2, peers=(), limit=60.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": ()}, "lengths=()"),
        ({"lengths": (0.0,)}, "lengths=(0.0,)"),
        ({"parts": ("scan", "scans")}, "'scans' is not one of scan, convolution"),
        ({"parts": ()}, "parts is empty"),
        ({"backends": ("fast",)}, "'fast' is not one of chunked"),
        ({"dtypes": ("float64",)}, "'float64'"),
        ({"modes": ("backward",)}, "'backward'"),
        ({"peers": ("jax",)}, "'jax'"),
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


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("part", "axis"), [("scan", ""), ("mixer", "time"), ("mixer", "band")])
def test_operations_are_those_that_torch_counts(
    part: str, axis: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssd, "SPAN", 1e9)  # one level: how many there are depends on the data
    case = Case(part, axis, 6.0, "float32", mode, "chunked")
    job = benchmark.prepare(case, SMALL)
    with FlopCounterMode(display=False) as counter:
        job()
    assert benchmark.operations(case, SMALL) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("way", benchmark.STREAM_MODES)
def test_a_song_is_separated_whole_in_every_way(way: str) -> None:
    # The job itself asserts that as many samples come out as went in; 10.5 s are two pieces and two segments.
    tiny = dataclasses.replace(SMALL, lengths=(10.5,), parts=("separation",))
    case = Case("separation", "", 10.5, "float32", FORWARD, way)
    assert [one.candidate for one in next(benchmark.groups(tiny))] == list(benchmark.STREAM_MODES)
    assert benchmark.prepare(case, tiny)() is None


def row(**fields: Any) -> Row:
    values: dict[str, Any] = {
        "part": "model", "axis": "", "seconds": 8.0, "dtype": "float32", "mode": BACKWARD, "candidate": "chunked",
        "times": (1.0, 2.0, 4.0), "peaks": (100.0, 50.0, 20.0), "flops": 50.0, "units": 800.0, "memory": 5, "before": 3,
        "difference": 0.0,
    }  # fmt: skip
    return Row(**{**values, **fields})


def test_runs_are_paired_with_what_stood_beside_them() -> None:
    # A machine that slows down threefold meanwhile: neither the share of the peak nor the quotient may see it.
    ours = row(times=(1.0, 2.0, 3.0), peaks=(100.0, 50.0, 100 / 3))
    theirs = row(times=(2.0, 4.0, 6.0), peaks=(100.0, 50.0, 100 / 3))
    assert ours.fraction == pytest.approx(0.5)
    assert theirs.against(ours) == pytest.approx(2)
    assert ours.median == 2
    assert ours.quartiles == (1.5, 2.5)
    assert row(times=(3.0,)).quartiles == (3.0, 3.0)


def test_what_the_notebook_wrote_is_read_again(tmp_path: Path) -> None:
    one = row(times=(1.0, 2.0), peaks=(3.0, 4.0))
    written = {**dataclasses.asdict(one), "median": one.median, "fraction": one.fraction}
    (tmp_path / "benchmark.json").write_text(json.dumps({"machine": {"cores": 2}, "rows": [written]}))
    assert benchmark.load(tmp_path / "benchmark.json") == ([one], {"cores": 2})
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="was not written by"):
        benchmark.load(tmp_path / "other.json")


def test_growth_is_against_a_quarter_of_the_length() -> None:
    rows = [
        row(),
        row(seconds=32.0, times=(9.0,) * 3, memory=23),
        row(seconds=16.0),
        row(seconds=2.0, dtype="bfloat16"),
    ]
    (line,) = benchmark.growth_table(rows)
    assert line["lengths"] == "32 s against 8 s"
    assert line["time"] == pytest.approx(4.5)
    assert line["memory"] == pytest.approx(10)
    compiled = [dataclasses.replace(one, candidate="chunked, compiled") for one in rows]  # has run before "before"
    (line,) = benchmark.growth_table(compiled)
    assert line["time"] == pytest.approx(4.5)
    assert line["memory"] is None


def test_reading_is_held_against_the_step_of_that_length() -> None:
    reading = row(part="loading", mode=FORWARD, units=1.0, times=(0.1,) * 3, flops=None)
    (line,) = benchmark.loading_table([row(), row(seconds=4.0, times=(0.5,) * 3), reading])
    assert line["read a second"] == pytest.approx(10)
    assert line["taken a second"] == "0.500"
    assert line["keeps up"] == "20 times over"


def test_the_claim_stands_beside_the_nearest_pair() -> None:
    rows = [
        row(part="scan", candidate="recurrent", times=(30.0,) * 3),
        row(part="scan"),
        row(part="scan", seconds=32.0),
    ]
    lines = {line["part"]: line for line in benchmark.claim_table(rows)}
    assert lines["selective scan"]["claimed factor"] == 8
    assert lines["selective scan"]["factor"] == pytest.approx(15)
    assert lines["selective scan"]["measured here"] == "recurrent → chunked, 8 s"
    assert lines["one step"]["factor"] is None
    *parts, whole = benchmark.CLAIM
    assert [sum(each) for each in list(zip(*parts, strict=True))[1:]] == list(whole[1:])


def test_what_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.BASELINES, "no_such_peer", ("pip install no-such-peer", "nothing"))
    why = benchmark.obstacle(Case("model", "", 1.0, "float32", FORWARD, "no_such_peer"), SMALL)
    assert why == "not installed: pip install no-such-peer"


@pytest.mark.parametrize(("took", "runs", "times"), [(500.0, 0, 1), (5.0, 3, 2)])
def test_a_long_separation_is_timed_once(monkeypatch: pytest.MonkeyPatch, took: float, runs: int, times: int) -> None:
    done = []
    monkeypatch.setattr(benchmark, "trial", lambda case, settings: Trial(1, 2, took))
    monkeypatch.setattr(benchmark, "prepare", lambda case, settings: lambda: (done.append(1), time.sleep(1.1))[0])
    settings = benchmark.dataclasses.replace(SMALL, repeats=2)
    (row,) = benchmark.measure([Case("separation", "", 3600.0, "float32", FORWARD, "carried")], settings)
    assert isinstance(row, benchmark.Row)
    assert (len(done), len(row.times), len(row.peaks), row.memory) == (runs, times, times, 2)
    assert (row.times == (took,)) == (took > benchmark.LONG)


def test_what_failed_at_one_length_is_not_tried_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def measure(cases: Any, settings: Settings) -> Any:
        for case in cases:
            tried.append((case.seconds, case.candidate))
            if case.candidate == "matrix" and case.seconds >= 2:
                yield Skipped(**vars(case), why="more than 1 s")

    monkeypatch.setattr(benchmark, "measure", measure)
    settings = Settings(lengths=(1, 2, 4, 8), parts=("scan",), dtypes=("float32",), modes=(FORWARD,))
    found = list(benchmark.run(settings))
    assert (8.0, "chunked") in tried
    assert (4.0, "matrix") not in tried
    assert [(one.seconds, one.why) for one in found] == [
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
    assert scores < found.memory - found.before < 10 * scores
    assert found.before < 1e9
    small = benchmark.dataclasses.replace(SMALL, memory=scores / 4e9)
    # Told by the allocator, or, when not even a thread fits, by the end of the process.
    assert str(benchmark.trial(case, small)).startswith(
        ("more than 0.00", "its process ended with code 1: more memory")
    )
    loop = Case("scan", "", 30.0, "float32", BACKWARD, "recurrent")
    started = time.monotonic()
    assert benchmark.trial(loop, benchmark.dataclasses.replace(SMALL, limit=0.05)) == "more than 0.05 s"
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_contestants_of_a_group_agree() -> None:
    for group in benchmark.groups(SMALL):
        if group[0].part in ("scan", "convolution", "mixer"):
            jobs = [benchmark.prepare(case, SMALL) for case in group if not benchmark.obstacle(case, SMALL)]
            first, *others = [job() for job in jobs]
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
