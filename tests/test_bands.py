"""Band tables, the order of features, and the unit norm."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_model import TINY

from bsmamba2 import BSMamba2
from bsmamba2.bands import deinterleave, generate_bands, interleave, published_bands


def test_published_bands() -> None:
    bands = published_bands()
    assert (len(bands), sum(bands), bands[0], bands[-2:]) == (62, 1025, 2, (128, 129))


@pytest.mark.parametrize("count", [1, 2, 31, 48, 62, 200, 512])
def test_generated_bands_fill_the_spectrum_and_widen(count: int) -> None:
    bands = generate_bands(count)
    assert (len(bands), sum(bands)) == (count, 1025)
    assert min(bands) >= 2
    assert all(low <= high + 1 for low, high in pairwise(bands))  # but for rounding


@pytest.mark.parametrize(("arguments", "message"), [((600,), "600 bands"), ((0,), "0 bands")])
def test_bands_that_do_not_fit(arguments: tuple[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_bands(*arguments)


def test_feature_order_is_frequency_then_channel_then_part() -> None:
    spectrogram = torch.randn(1, 2, 3, 1, dtype=torch.complex64)
    features = interleave(spectrogram)[0, 0]
    expected = [
        part
        for f in range(3)
        for c in range(2)
        for part in (spectrogram[0, c, f, 0].real, spectrogram[0, c, f, 0].imag)
    ]
    assert torch.equal(features, torch.stack(expected))
    assert torch.equal(deinterleave(interleave(spectrogram), 2), spectrogram)


def test_unit_norm_lifts_near_silence_and_keeps_silence() -> None:
    norm = BSMamba2(TINY).band_split.bands[0].norm
    x = torch.randn(16)
    torch.testing.assert_close(norm(x * 1e-9), norm(x))
    assert not norm(torch.zeros(16)).any()
    assert norm(x).norm().item() == pytest.approx(4.0)
