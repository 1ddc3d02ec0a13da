"""The configuration of a model small enough to run at once, and the error that tests compare tensors by."""

from __future__ import annotations

from torch import Tensor

from bsmamba2 import ModelConfig

TINY = ModelConfig(
    dim=16,
    depth=1,
    freqs_per_bands=(4, 8, 21, 32),
    n_fft=128,
    hop_length=32,
    sample_rate=8000,
    d_state=8,
    headdim=8,
    expand=2,
)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest expected value (or to 1e-7, where float32 has underflowed)."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-7))
