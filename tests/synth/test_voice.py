"""The singing voice: pitches, formants, and the share of time that is sung."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from song_measures import RATE, SEEDS

from bsmamba2.synth import Song, synthesise


def sung_share(song: Song) -> float:
    """Share of 20 ms blocks that sound: within 30 dB of the vocals' mean, with gaps of up to 60 ms closed."""
    block = round(0.02 * song.sample_rate)
    vocals = song.vocals.numpy()
    blocks = vocals.shape[1] // block
    power = (vocals[:, : blocks * block] ** 2).mean(axis=0).reshape(blocks, block).mean(axis=1)
    loud = power > power[power > 0].mean() * 1e-3
    places = np.flatnonzero(loud)
    for a, b in pairwise(places):
        if b - a <= 4:
            loud[a:b] = True
    return float(loud.mean())


def pitches(sound: np.ndarray, low: float = 70.0, high: float = 900.0) -> np.ndarray:
    """Fundamental frequencies in Hz of the periodic 46 ms frames of (samples,), by autocorrelation."""
    size = 2_048
    frames = np.lib.stride_tricks.sliding_window_view(sound, size)[:: size // 2]
    frames = frames[(frames**2).mean(axis=1) > 0.1 * (sound**2).mean()]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(size), 2 * size)) ** 2
    correlation = np.fft.irfft(spectrum)[:, :size]
    correlation /= correlation[:, :1]
    lags = slice(int(RATE / high), int(RATE / low))
    best = correlation[:, lags].argmax(axis=1) + lags.start
    return RATE / best[correlation[:, lags].max(axis=1) > 0.5]


@pytest.mark.parametrize("occupancy", [0.15, 0.5, 0.8, 0.95, 1.0])
def test_occupancy_is_heard(occupancy: float) -> None:
    made = [synthesise(seed, occupancy=occupancy, sample_rate=16_000) for seed in SEEDS]
    errors = [sung_share(song) - occupancy for song in made]
    assert max(map(abs, errors)) <= 0.05
    assert abs(np.mean(errors)) < 0.03
    for song in made:
        assert song.occupancy == pytest.approx(occupancy, abs=1e-3)


def test_voices_are_periodic_within_a_singers_range() -> None:
    centres = []
    for seed in SEEDS:
        voice = synthesise(seed, seconds=4.0, occupancy=1.0).vocals.mean(dim=0).numpy()
        found = pitches(voice)
        assert len(found) > 0.4 * 4 * RATE / 1_024, seed  # most frames have a pitch
        centre = float(np.median(found))
        assert 75 < centre < 700, seed
        assert np.log2(np.percentile(found, 90) / np.percentile(found, 10)) > 1 / 12, seed  # a melody, not a drone
        centres.append(centre)
    assert min(centres) < 200 < max(centres)  # low voices and high ones


def test_voices_have_formants_that_move() -> None:
    """Third-octave levels between 300 and 3,400 Hz stand in peaks and valleys, and change with the vowel."""
    for seed in (0, 3, 8):
        voice = synthesise(seed, occupancy=1.0).vocals.mean(dim=0)
        power = torch.stft(voice, 2_048, 1_024, window=torch.hann_window(2_048), return_complex=True).abs().square()
        edges = [round(300 * 2 ** (i / 3) * 2_048 / RATE) for i in range(11)]
        bands = torch.stack([power[a:b].sum(dim=0) for a, b in pairwise(edges)])
        levels = 10 * torch.log10(bands[:, bands.sum(dim=0) > 0.1 * bands.sum(dim=0).mean()] + 1e-9)
        assert (levels.max(dim=0).values - levels.min(dim=0).values).median() > 12
        assert levels.std(dim=1).median() > 3
