"""How good a separation is, in decibels.

Signals are (c, samples), one song's target and its estimate. Book: "Training".
Sources: `usdr` as in the Music Demixing Challenge 2021 (arXiv:2108.13559); `csdr` after the SDR of
BSS Eval v4 (Stöter, Liutkus and Ito, arXiv:1804.06267). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def usdr(reference: Tensor, estimate: Tensor) -> float:
    """Energy of the reference over energy of the error, over the whole song.

        uSDR = 10 · log10((Σ s² + 1e-7) / (Σ (s − ŝ)² + 1e-7))

    Silence as an estimate scores 0 dB. When the reference is silent, 0 dB is the best there is.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.

    Returns:
        Decibels.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    signal, error = _energies(reference, estimate)
    return float(10 * torch.log10((signal.sum() + 1e-7) / (error.sum() + 1e-7)))


def csdr(reference: Tensor, estimate: Tensor, sample_rate: int = 44_100) -> float:
    """Median over whole seconds of the energy ratio, silent seconds dropped.

        SDR_i = 10 · log10(Σ s² / Σ (s − ŝ)²)   over second i

    A second in which the channels of the reference, or those of the estimate, sum to zero everywhere
    is dropped, and so is the tail shorter than a second. An exact second counts +inf.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.
        sample_rate: samples in a second.

    Returns:
        Decibels; NaN when no second is left.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    signal, error = _energies(reference, estimate)
    seconds = reference.shape[-1] // sample_rate
    whole = seconds * sample_rate
    by_second = [part[:, :whole].reshape(part.shape[0], seconds, sample_rate) for part in (reference, estimate)]
    heard = torch.stack([(part.double().sum(0) != 0).any(-1) for part in by_second]).all(0)
    signal, error = (part[:, :whole].reshape(-1, seconds, sample_rate).sum((0, 2)) for part in (signal, error))
    ratios = 10 * torch.log10(signal[heard] / error[heard])
    if not len(ratios):
        return float("nan")
    return _median(ratios)


def _median(values: Tensor) -> float:
    """The mean of the two middle values, infinite ones allowed."""
    ordered = values.sort().values
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return float(middle.mean())


def _energies(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the reference and of the error, (c, samples) each, in float64."""
    if reference.shape != estimate.shape or reference.dim() != 2 or not reference.numel():
        raise ValueError(
            f"reference {tuple(reference.shape)} and estimate {tuple(estimate.shape)} must both be (c, samples), "
            f"not empty"
        )
    reference, estimate = reference.double(), estimate.double()
    return reference.square(), (reference - estimate).square()
