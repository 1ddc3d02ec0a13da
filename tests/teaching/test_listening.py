"""Explorables with audio: their scores against closed forms and the metrics themselves."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from IPython.display import HTML

from bsmamba2 import metrics
from bsmamba2.bands import published_bands
from bsmamba2.synth import Song, synthesise
from bsmamba2.teaching import demos, listening

SUNG = partial(synthesise, 7, seconds=3.0, occupancy=1.0, sample_rate=8_000)


def embedded(shown: HTML) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data that an element carries for the script: common, settings."""
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', shown.data)[0])
    return data["common"], data["settings"]


def test_a_leak_moves_each_metric_as_it_should() -> None:
    song = SUNG()
    before, quiet = listening.leaking(song, 1, 0)
    after, loud = listening.leaking(song, 1, 10)
    rate = song.sample_rate
    assert torch.equal(quiet[:, :rate], loud[:, :rate])
    assert after["cSDR"] == before["cSDR"]
    assert after["silence leakage"] - before["silence leakage"] == pytest.approx(10, abs=0.01)
    assert before["silence leakage"] == pytest.approx(-20, abs=0.01)
    leak = 0.1 * (song.mixture - song.vocals)
    sung, rest = (float(part.double().square().sum()) for part in (leak[:, :rate], leak[:, rate:]))
    fall = 10 * math.log10((sung + 10 * rest) / (sung + rest))
    assert before["uSDR"] - after["uSDR"] == pytest.approx(fall, abs=0.01)


def test_the_answer_about_the_leak_is_true() -> None:
    common, settings = embedded(listening.leak())
    assert len(settings) == len(listening.SUNG) * len(listening.LEAKS)
    change = [[now - before for now, before in zip(s["values"], s["before"], strict=True)] for s in settings]
    csdr, usdr, si_sdr, leakage = (list(column) for column in zip(*change, strict=True))
    assert set(csdr) == {0}
    assert leakage == pytest.approx(list(listening.LEAKS) * len(listening.SUNG), abs=0.05)
    assert usdr == pytest.approx(si_sdr, abs=0.1)
    one, six = dict(zip(listening.LEAKS, usdr, strict=False)), dict(zip(listening.LEAKS, usdr[-6:], strict=True))
    assert one[4] < -3
    assert six[8] > -3 > six[12]
    assert common["names"] == list(listening.METRICS)
    assert len({setting["sound"] for setting in settings}) == len(settings)
    for setting, values in zip(settings, change, strict=True):
        assert f"uSDR by {values[1]:z.1f} dB".replace("-", "−")[:-5] in setting["caption"]


def test_bands_score_what_one_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    song = synthesise(7, seconds=1.0, occupancy=0.7)
    monkeypatch.setattr(listening, "excerpt", lambda: song)
    common, settings = embedded(listening.bands())
    assert common["still"]["edges"] == [round(edge) for edge in demos.band_edges(published_bands())]
    published = metrics.usdr(song.vocals, demos.oracle_band_gain(song, published_bands()))
    scores = [
        float(re.search(r"score (.*?) dB; with the published table, (.*?) dB", s["caption"])[1]) for s in settings
    ]
    assert scores[0] == min(scores) < scores[-1]
    assert f"published table, {published:.1f} dB" in settings[0]["caption"]
    assert [len(setting["edges"]) - 1 for setting in settings] == [8, 12, 16, 20, 24, 32, 40, 48, 62, 80, 96]
    assert "The one at 100 Hz is 172 Hz wide" in settings[0]["caption"]


def test_occupancy_says_what_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    song: Song = SUNG()

    def run(model: Any, share: float) -> demos.OccupancyRun:
        return demos.OccupancyRun(song, song.mixture, 3.0 + share, -2.0, -12.0 if share < 1 else math.nan)

    monkeypatch.setattr(demos, "at_occupancy", run)
    common, settings = embedded(listening.occupancy(None))
    assert (
        settings[0]["caption"] == "0% of the time is sung. Where nobody sings, the estimate is 12 dB below the mixture."
    )
    assert settings[-1]["caption"] == (
        "100% of the time is sung. The estimate has 4.0 dB uSDR, the mixture −2.0 dB, and silence 0 dB. "
    )
    assert [len(setting["parts"]) for setting in settings] == [3] * 6
    assert common["labels"] == ["Mixture", "Model output", "Ground truth"]
