"""Resampling: against torchaudio's filter, tones, any cut into blocks, and the length."""

from __future__ import annotations

import math

import pytest
import torch
import torchaudio

from bsmamba2.audio.resample import resample, resample_blocks

RATES = [
    (48_000, 44_100),
    (44_100, 48_000),
    (8000, 44_100),
    (44_100, 8000),
    (96_000, 44_100),
    (384_000, 44_100),
    (3, 2),
]


@pytest.mark.parametrize(("rate", "new_rate"), RATES)
@pytest.mark.parametrize("samples", [1, 2, 999, 20_000, 30_001])
def test_length_is_rounded_up_and_axes_stay(rate: int, new_rate: int, samples: int) -> None:
    audio = torch.randn(2, 3, samples, generator=torch.Generator().manual_seed(0))
    resampled = resample(audio, rate, new_rate)
    assert resampled.shape == (2, 3, -(-samples * new_rate // rate))
    for i in range(2):
        for j in range(3):
            assert torch.equal(resampled[i, j], resample(audio[i, j], rate, new_rate))


@pytest.mark.parametrize(("rate", "new_rate"), RATES[:5])
def test_it_is_near_another_very_good_filter(rate: int, new_rate: int) -> None:
    """Noise below 0.8 of the lower Nyquist frequency, where both are flat."""
    spectrum = torch.fft.rfft(torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double())
    spectrum[round(0.4 * min(rate, new_rate) * 20_000 / rate) :] = 0
    audio = torch.fft.irfft(spectrum).float()
    expected = torchaudio.functional.resample(
        audio.double(), rate, new_rate, 64, 0.9475937167399596, "sinc_interp_kaiser", 14.769656459379492
    )
    found = resample(audio, rate, new_rate).double()
    middle = slice(new_rate // 40, -new_rate // 40)
    assert (found - expected)[middle].abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("rate", "new_rate"), [(48_000, 44_100), (11_025, 44_100), (44_101, 8000), (383_999, 44_100)])
@pytest.mark.parametrize("size", [1, 333, 5000])
def test_pieces_are_the_whole_bit_for_bit(rate: int, new_rate: int, size: int) -> None:
    audio = torch.randn(2, 3001 if size == 1 else 30_001, generator=torch.Generator().manual_seed(0))
    pieces = list(resample_blocks(audio.split(size, -1), rate, new_rate))
    assert torch.equal(torch.cat(pieces, -1), resample(audio, rate, new_rate))


def test_what_the_lower_rate_cannot_hold_is_gone_and_the_rest_untouched() -> None:
    time = torch.arange(48_000, dtype=torch.float64) / 48_000
    low, high = (torch.sin(2 * math.pi * hertz * time).float()[None] for hertz in (3_000, 5_000))
    middle = slice(800, -800)
    expected = torch.sin(2 * math.pi * 3_000 * torch.arange(8_000, dtype=torch.float64) / 8_000).float()[None]
    torch.testing.assert_close(resample(low, 48_000, 8_000)[:, middle], expected[:, middle], rtol=0, atol=1e-5)
    assert resample(high, 48_000, 8_000)[:, middle].abs().max() < 1e-5  # −100 dB


def test_one_rate_is_left_alone_and_bad_ones_are_named() -> None:
    audio = torch.randn(2, 10)
    assert torch.equal(resample(audio, 8000, 8000), audio)
    assert not resample(torch.zeros(2, 5000), 8000, 44_100).any()
    with pytest.raises(ValueError, match="rate=0"):
        resample(audio, 0, 8000)
