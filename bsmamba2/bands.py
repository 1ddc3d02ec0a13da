"""Split a spectrogram into bands and map every band to the same number of features.

(b c f t) complex  →  (b t (f c 2)) real  →  K slices  →  unit norm, Linear  →  (b t k d)

Book: "Bands". Source: section "Band split" of the published implementation of arXiv:2508.14556.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def published_bands() -> tuple[int, ...]:
    """Number of bins in each of the 62 published bands, low to high; they sum to 1,025."""
    return (2,) * 24 + (4,) * 12 + (12,) * 8 + (24,) * 8 + (48,) * 8 + (128, 129)


def generate_bands(count: int, bins: int = 1025, *, min_bins: int = 2, width_ratio: float = 100.0) -> tuple[int, ...]:
    """Generate a band table with `count` bands, narrow at low frequencies and wide at high frequencies.

    The edges follow a mel-like scale, linear below a knee and logarithmic above it. Edge i is at

        edge_i = bins · (exp(u·i/count) − 1) / (exp(u) − 1),    u = ln(width_ratio),

    rounded to a whole bin, but at least `min_bins` bins above the previous edge; the last edge is `bins`.
    The widest band is then about `width_ratio` times as wide as the first band would be without this lower limit.

    Args:
        count: number of bands.
        bins: number of frequency bins to cover.
        min_bins: smallest number of bins in a band.
        width_ratio: width of the highest band relative to the lowest, above 1.

    Returns:
        Number of bins in each band, low to high; they sum to `bins`.

    Raises:
        ValueError: if the bands do not fit into the bins, or `width_ratio` is not above 1.
    """
    if count < 1 or min_bins < 1 or count * min_bins > bins:
        raise ValueError(f"{count} bands of at least {min_bins} bins do not fit into {bins} bins")
    if not width_ratio > 1:
        raise ValueError(f"width_ratio={width_ratio!r} must be above 1")
    edges = [0]
    for i in range(1, count):
        edge = round(bins * math.expm1(math.log(width_ratio) * i / count) / (width_ratio - 1))
        room = bins - min_bins * (count - i)
        edges.append(min(max(edge, edges[-1] + min_bins), room))
    edges.append(bins)
    return tuple(high - low for low, high in itertools.pairwise(edges))


def interleave(spectrogram: Tensor) -> Tensor:
    """Interleave a spectrogram into real features per frame, frequency-major, so that a band is a contiguous slice.

    Args:
        spectrogram: complex (b, c, f, t).

    Returns:
        Real (b, t, f·c·2): the real and the imaginary part of each channel of each bin.
    """
    return torch.view_as_real(spectrogram).permute(0, 3, 2, 1, 4).flatten(2)


def deinterleave(features: Tensor, channels: int) -> Tensor:
    """Inverse of `interleave`.

    Args:
        features: real (b, t, f·c·2).
        channels: number of channels, c.

    Returns:
        Complex (b, c, f, t).
    """
    parts = features.unflatten(-1, (-1, channels, 2)).permute(0, 3, 2, 1, 4)  # (b, c, f, t, 2)
    return torch.view_as_complex(parts.contiguous())


class UnitNorm(nn.Module):
    """Scale a vector to length sqrt(dim), then multiply each feature by a learned gain.

        unit_norm(x) = x / max(‖x‖₂, 1e-12) · sqrt(dim) · gain

    An RMS norm with its epsilon inside the root lets near-silence fade out. This norm instead scales a frame
    at −180 dB to the same length as a loud one. Exact zeros stay zero.

    Args:
        dim: length of the last axis.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) → (..., dim)."""
        return nn.functional.normalize(x, dim=-1, eps=1e-12) * self.gain * x.shape[-1] ** 0.5


class BandSplit(nn.Module):
    """Band split: map a spectrogram to one feature vector per band and frame.

    Band k covers `bands[k]` bins, that is, 2·bins·c real numbers. Each band has its own `UnitNorm` and `Linear`,
    which map these numbers to d features.

    Args:
        bands: number of bins in each band, low to high.
        channels: number of channels, c.
        dim: number of features, d.
    """

    def __init__(self, bands: Sequence[int], channels: int, dim: int) -> None:
        super().__init__()
        self.widths = [2 * channels * bins for bins in bands]
        self.bands = nn.ModuleList(nn.Sequential() for _ in bands)
        for band, width in zip(self.bands, self.widths, strict=True):
            band.add_module("norm", UnitNorm(width))
            band.add_module("linear", nn.Linear(width, dim))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Complex (b, c, f, t) → real (b, t, k, d)."""
        slices = interleave(spectrogram).split(self.widths, dim=-1)
        return torch.stack([band(part) for band, part in zip(self.bands, slices, strict=True)], dim=2)
