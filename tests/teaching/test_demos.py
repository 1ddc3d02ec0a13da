"""Demos: the numbers behind the sliders, against counts, closed forms and planted bad settings."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from bsmamba2 import metrics
from bsmamba2.bands import generate_bands, published_bands
from bsmamba2.evaluation.evaluate import oracle_vocals
from bsmamba2.synth import synthesise
from bsmamba2.teaching import demos, labs

SONG = partial(synthesise, 7, seconds=1.5, occupancy=0.7)


# --- bands ------------------------------------------------------------------------------------------------


def test_band_edges_span_the_spectrum() -> None:
    edges = demos.band_edges(published_bands())
    assert len(edges) == 63
    assert edges[0] == 0
    assert edges[1] == pytest.approx(2 * 44_100 / 2048)
    assert edges[-1] == pytest.approx(
        22_050 + 44_100 / 2048
    )  # bin 1024 lies at 22,050 Hz, and its band reaches past it


@pytest.mark.parametrize(("hertz", "bins"), [(0, 2), (100, 2), (1_000, 2), (1_100, 4), (10_000, 48), (22_050, 129)])
def test_band_width_at_a_frequency(hertz: float, bins: int) -> None:
    assert demos.band_width_at(published_bands(), hertz) == pytest.approx(bins * 44_100 / 2048)


@pytest.mark.parametrize("hertz", [-1, 30_000])
def test_no_band_covers_such_a_frequency(hertz: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in the bands"):
        demos.band_width_at(published_bands(), hertz)


def test_narrower_bands_lose_less_and_the_oracle_loses_least() -> None:
    song = SONG()
    scores = [
        metrics.usdr(song.vocals, demos.oracle_band_gain(song, generate_bands(count))) for count in (1, 8, 48, 300)
    ]
    assert scores == sorted(scores)
    assert scores[0] > 0
    assert metrics.usdr(song.vocals, oracle_vocals(song)) > scores[-1]


def test_oracle_band_gain_is_the_best_gain() -> None:
    """A song whose vocals are half of everything: every gain is 1/2."""
    song = SONG()
    stems = torch.stack([song.vocals, song.vocals, torch.zeros_like(song.vocals), torch.zeros_like(song.vocals)])
    half = type(song)(song.name, stems, song.sample_rate, song.vocal_segments, song.licence, song.source)
    torch.testing.assert_close(demos.oracle_band_gain(half, generate_bands(5)), song.vocals, rtol=1e-4, atol=1e-5)


# --- chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [8, 24, 96])
def test_counted_work_is_that_of_the_formula(chunk: int) -> None:
    b, t, h, p, n = 2, 96, 4, 8, 16
    (run,) = demos.chunk_runs([chunk], demos.scan_inputs(b, t, heads=h, headdim=p, d_state=n), rounds=1)
    assert run.scores == b * 2 * t * chunk * (n + h * p)
    assert run.states == b * 2 * (t - chunk) * 2 * n * h * p  # the first chunk reads none, the last makes none
    assert run.levels == 0
    assert run.seconds > 0


def test_repeated_products_of_fast_heads_are_counted_apart() -> None:
    """Decays beyond 2⁻¹²⁰ in a chunk repeat products; the work on states does not change by that."""
    x, dt, A, B, C = demos.scan_inputs(1, 96, heads=4, headdim=8, d_state=16)
    slow, fast = (demos.chunk_runs([48], (x, dt, rates, B, C), rounds=1)[0] for rates in (A, 100 * A))
    assert slow.levels == 0 < fast.levels
    assert (slow.scores, slow.states) == (fast.scores, fast.states)


def test_runs_come_in_the_order_asked_for_and_are_reproducible_but_for_time() -> None:
    inputs = demos.scan_inputs(1, 60, heads=2, headdim=4, d_state=8)
    first, again = demos.chunk_runs([30, 7], inputs, rounds=1), demos.chunk_runs([30, 7], inputs, rounds=2)
    assert [run.chunk for run in first] == [30, 7]
    assert [(run.scores, run.states, run.memory) for run in first] == [
        (run.scores, run.states, run.memory) for run in again
    ]


@pytest.mark.parametrize(("chunks", "rounds", "message"), [([0], 1, "chunk=0"), ([8], 0, "rounds=0")])
def test_bad_runs(chunks: list[int], rounds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demos.chunk_runs(chunks, demos.scan_inputs(1, 16), rounds=rounds)


def test_peak_memory_counts_what_lives_together() -> None:
    given = torch.ones(1000)
    with demos.peak_memory() as most:
        for _ in range(5):
            one = given * 2  # 4,000 bytes; the one before dies when this is stored
        view = one[:10].view(2, 5)  # shares the storage
        given.mul_(2)  # no new storage
        del one, view
    assert most() == 8000


# --- Δ and the decay --------------------------------------------------------------------------------------


def test_the_state_fades_as_the_closed_form() -> None:
    trace = demos.note_and_pause(0.1, 0.01, -3.0)
    assert trace.state[:4].eq(0).all()
    assert float(trace.state[4]) == pytest.approx(1)
    sound, rest = 11 + 16, 32  # frames of either between frame 4 and the last, which is frame 63
    assert float(trace.state[63]) == pytest.approx(math.exp(-3 * (0.1 * sound + 0.01 * rest)), rel=1e-4)
    assert float(trace.weights[63]) == 1
    assert float(trace.weights[4]) == pytest.approx(float(trace.state[63]), rel=1e-4)  # written 1 at frame 4


def test_the_state_is_linear_in_what_is_written() -> None:
    dt = torch.rand(20, generator=torch.Generator().manual_seed(0)) + 0.01
    one, other = torch.arange(20.0), torch.ones(20)
    summed = demos.state_trace(one + other, dt, -1).state
    torch.testing.assert_close(summed, demos.state_trace(one, dt, -1).state + demos.state_trace(other, dt, -1).state)


@pytest.mark.parametrize(
    ("written", "dt", "A", "message"),
    [
        (torch.ones(3), torch.ones(4), -1.0, r"must both be \(t,\)"),
        (torch.ones(1, 3), torch.ones(1, 3), -1.0, r"must both be \(t,\)"),
        (torch.ones(3), torch.tensor([1.0, 0.0, 1.0]), -1.0, "least: 0.0"),
        (torch.ones(3), torch.ones(3), 0.0, "A=0.0"),
    ],
)
def test_bad_state_trace(written: torch.Tensor, dt: torch.Tensor, A: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demos.state_trace(written, dt, A)


# --- occupancy --------------------------------------------------------------------------------------------


def test_occupancy_follows_the_slider() -> None:
    torch.manual_seed(0)
    model = labs.ablated_model()
    none, some, all_ = (demos.at_occupancy(model, share, seconds=2.0) for share in (0.0, 0.5, 1.0))
    assert [result.song.occupancy for result in (none, all_)] == [0, 1]
    assert some.song.occupancy == pytest.approx(0.5, abs=0.05)
    assert none.song.vocals.abs().max() == 0
    assert math.isfinite(none.leakage)
    assert math.isnan(all_.leakage)
    assert all_.mixture_usdr > some.mixture_usdr
    assert some.usdr == metrics.usdr(some.song.vocals, some.estimate)
