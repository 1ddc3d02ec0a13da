"""The real excerpt: its streams, and where it is sung."""

import importlib.util

import numpy as np
import pytest
import torch
from song_measures import RATE, band_share, decibels

from bsmamba2.synth import STEMS, Song, excerpt, real_excerpt


@pytest.fixture(scope="module")
def falcon() -> Song:
    if importlib.util.find_spec("stempeg") is None:
        pytest.skip("the stempeg package is not installed")
    return excerpt()


def test_excerpt_is_the_clip(falcon: Song) -> None:
    assert falcon.stems.shape[:2] == (4, 2)
    assert falcon.sample_rate == RATE
    assert falcon.seconds == pytest.approx(6.08, abs=0.02)
    assert torch.isfinite(falcon.stems).all()
    assert falcon.licence == "CC BY-NC-SA 3.0"
    assert "Easton Ellises" in falcon.source
    torch.testing.assert_close(falcon.mixture, falcon.stems.sum(dim=0))


def test_excerpt_streams_are_in_our_order(falcon: Song) -> None:
    """Each stem is what its name says: bass and drums lie low, drums reach high, vocals rest."""
    low = [band_share(falcon.stem(name), 20, 160) for name in STEMS]
    assert low[STEMS.index("bass")] > 0.2
    assert low[STEMS.index("drums")] > 0.2
    assert low[STEMS.index("vocals")] < 0.05
    assert low[STEMS.index("other")] < 0.1
    high = [band_share(falcon.stem(name), 5_000, 16_000) for name in STEMS]
    assert high[STEMS.index("drums")] > 5 * high[STEMS.index("bass")]
    assert high[STEMS.index("vocals")] > 2 * high[STEMS.index("other")]


def test_excerpt_rests_from_two_to_four_seconds(falcon: Song) -> None:
    power = falcon.vocals.square().mean(dim=0)
    rest = power[round(2.1 * RATE) : round(3.8 * RATE)].mean()
    vocal_segments = torch.cat([power[: 2 * RATE], power[4 * RATE :]]).mean()
    assert 14 < decibels(float(vocal_segments / rest)) < 26
    assert len(falcon.vocal_segments) == 2
    assert falcon.vocal_segments[0][1] == pytest.approx(2.0, abs=0.2)
    assert falcon.vocal_segments[1][0] == pytest.approx(3.9, abs=0.2)
    assert 0.6 < falcon.occupancy < 0.75


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_excerpt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps stempeg"):
        excerpt()


def test_excerpt_segments_are_where_its_vocals_are_loud(falcon: Song) -> None:
    """Blocks of 20 ms less than 12 dB below the mean; gaps under 0.2 s are closed."""
    power = falcon.vocals.numpy() ** 2
    power = power[:, : power.shape[1] // 882 * 882].mean(0).reshape(-1, 882).mean(1)
    spans: list[tuple[float, float]] = []
    for i in np.flatnonzero(power > power.mean() * 10**-1.2):
        start, end = i / 50, (i + 1) / 50
        if spans and start - spans[-1][1] < 0.2:
            start, _ = spans.pop()
        spans.append((start, end))
    assert falcon.vocal_segments == tuple(span for span in spans if span[1] - span[0] >= 0.1)
