"""Candidates do the same job, with the operations that torch counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bsmamba2.experiments.benchmark import candidates
from bsmamba2.experiments.benchmark.settings import BACKWARD, BASELINES, FORWARD, STREAM_MODES, Case, Settings

SMALL = Settings(lengths=(0.25,), dtypes=("float32",), repeats=2, preset="small", sequences=2, baselines=(), limit=60.0)


@pytest.mark.parametrize("mode", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("part", "axis"), [("scan", ""), ("mixer", "time"), ("mixer", "band")])
def test_operations_are_those_that_torch_counts(
    part: str, axis: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsmamba2.kernels.chunked.SPAN", 1e9)  # one level: how many there are depends on the data
    case = Case(part, axis, 6.0, "float32", mode, "chunked")
    job = candidates.prepare(case, SMALL)
    with FlopCounterMode(display=False) as counter:
        job()
    assert candidates.flops(case, SMALL) == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_step_is_two_batches_forward_and_backward() -> None:
    settings = dataclasses.replace(SMALL, parts=("scan", "step"), backends=("recurrent", "auto"), batch=3)
    found = [
        (cases[0].part, cases[0].mode, [case.candidate for case in cases]) for cases in candidates.groups(settings)
    ]
    assert found == [
        ("scan", FORWARD, ["recurrent"]), ("scan", BACKWARD, ["recurrent"]), ("step", BACKWARD, ["recurrent", "auto"])
    ]  # fmt: skip
    step = Case("step", "", 0.25, "float32", BACKWARD, "auto")
    model = candidates.flops(dataclasses.replace(step, part="model"), settings)
    assert model is not None
    assert candidates.flops(step, settings) == pytest.approx(2 * 3 * model)
    assert candidates.units(step, settings) == 6


@pytest.mark.parametrize("way", STREAM_MODES)
def test_a_song_is_separated_whole_in_every_way(way: str) -> None:
    # The job itself asserts that as many samples come out as went in; 10.5 s are two pieces and two segments.
    tiny = dataclasses.replace(SMALL, lengths=(10.5,), parts=("separation",))
    case = Case("separation", "", 10.5, "float32", FORWARD, way)
    assert [one.candidate for one in next(candidates.groups(tiny))] == list(STREAM_MODES)
    assert candidates.prepare(case, tiny)() is None


def test_what_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASELINES, "no_such_baseline", ("pip install no-such-baseline", "nothing"))
    reason = candidates.unsupported_reason(Case("model", "", 1.0, "float32", FORWARD, "no_such_baseline"), SMALL)
    assert reason == "not installed: pip install no-such-baseline"


@pytest.mark.slow
def test_candidates_of_a_group_agree() -> None:
    for group in candidates.groups(SMALL):
        if group[0].part in ("scan", "convolution", "mixer"):
            jobs = [candidates.prepare(case, SMALL) for case in group if not candidates.unsupported_reason(case, SMALL)]
            first, *others = [job() for job in jobs]
            for other in others:
                torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
