"""Mask estimator (features → complex mask) and oracle mask.

(b t k d)  →  per band: Linear, tanh, Linear, GLU  →  (b t (f c 2))  →  complex mask (b c f t)

Book: "Masks". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .bands import deinterleave


class MaskEstimator(nn.Module):
    """Mask estimator of one stem; the mask is complex and unbounded, so it can amplify and rotate as well as mute.

    Args:
        bands: number of bins in each band, low to high.
        channels: number of channels, c.
        dim: number of features, d.
        expand: hidden width as a multiple of d.
    """

    def __init__(self, bands: Sequence[int], channels: int, dim: int, expand: int = 4) -> None:
        super().__init__()
        self.channels = channels
        self.bands = nn.ModuleList(nn.Sequential() for _ in bands)
        for band, bins in zip(self.bands, bands, strict=True):
            band.add_module("expand", nn.Linear(dim, expand * dim))
            band.add_module("tanh", nn.Tanh())
            band.add_module("project", nn.Linear(expand * dim, 2 * (2 * bins * channels)))
            band.add_module("gate", nn.GLU(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, t, k, d) → complex mask (b, c, f, t), float32 or wider."""
        features = [band(x[:, :, k]) for k, band in enumerate(self.bands)]
        mask = torch.cat(features, dim=-1)
        return deinterleave(mask.to(torch.promote_types(mask.dtype, torch.float32)), self.channels)


def oracle_mask(target: Tensor, mixture: Tensor) -> Tensor:
    """Oracle mask: the best real gain in [0, 1] for each bin, used as an upper reference.

        m = clip(Re(S · conj(X)) / |X|², 0, 1)

    minimises |m·X − S|² among real numbers from 0 to 1. (An unbounded complex mask, m = S / X, would be perfect
    and therefore not a useful bound.)

    Args:
        target: complex spectrogram S, any shape.
        mixture: complex spectrogram X; its shape must broadcast with that of S.

    Returns:
        Real mask; zero wherever the mixture is exactly zero.
    """
    power = mixture.abs().square()
    best = (target * mixture.conj()).real / power.clamp(min=torch.finfo(power.dtype).tiny)
    return best.clamp(0, 1)
