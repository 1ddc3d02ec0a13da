"""Filters: the fast convolution is a convolution."""

import numpy as np

from bsmamba2.synth.filters import bandpass, convolve, pan, smooth


def test_fast_convolution_is_convolution() -> None:
    rng = np.random.default_rng(0)
    signal, kernel = rng.standard_normal((2, 11_000)), rng.standard_normal((2, 9_500)) / 100
    expected = np.stack([np.convolve(s, k)[:11_000] for s, k in zip(signal, kernel, strict=True)])
    np.testing.assert_allclose(convolve(signal.astype(np.float32), kernel), expected, atol=1e-4)
    np.testing.assert_allclose(convolve(signal.astype(np.float32), kernel, 500)[:, :-500], expected[:, 500:], atol=1e-4)


def test_panning_keeps_the_power_and_smoothing_the_mean() -> None:
    for position in (-1.0, -0.3, 0.0, 0.8, 1.0):
        assert np.isclose((pan(position) ** 2).sum(), 2)
    np.testing.assert_allclose(smooth(np.full((50, 2), 3.0), 9), 3.0, rtol=1e-6)


def test_bandpass_has_its_response() -> None:
    t = np.arange(16_000) / 16_000
    for hertz in (100, 1_000, 7_000):
        tone = np.sin(2 * np.pi * hertz * t + 1).astype(np.float32)
        gain = 1 / np.sqrt((1 + (800 / hertz) ** 4) * (1 + (hertz / 2_000) ** 4))
        filtered = bandpass(tone, 800, 2_000, 16_000)[4_000:12_000]
        assert np.isclose(np.sqrt(2 * np.mean(filtered**2)), gain, rtol=0.02)
