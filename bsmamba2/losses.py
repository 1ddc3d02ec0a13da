"""The training loss: how far apart two signals are, sample by sample and spectrum by spectrum.

    L = 10 · mean|ŝ − s| + Σ_w mean|STFT_w(ŝ) − STFT_w(s)|

Book: "Training". Source: the published implementation of arXiv:2508.14556.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOWS = (4096, 2048, 1024, 512, 256)
"""Window lengths of the published loss, in samples."""


def bsmamba2_loss(
    estimate: Tensor, target: Tensor, *, windows: Sequence[int] = WINDOWS, hop: int = 147, time_weight: float = 10.0
) -> Tensor:
    """The published loss: the mean modulus of the difference, and `spectral_loss` for every window, summed.

    Args:
        estimate: ŝ, (..., samples); longer than half the longest window.
        target: s, of the same shape.
        windows: STFT windows, in samples. (2048, 1024, 512) is the earlier, cheaper form.
        hop: samples between frames.
        time_weight: factor of the sample-by-sample term.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: when the shapes differ, or the signals are too short for the longest window.
    """
    difference = _difference(estimate, target)
    spectral = sum(spectral_loss(difference, window, hop) for window in windows)
    return time_weight * difference.abs().mean() + spectral


def spectral_loss(difference: Tensor, window: int, hop: int = 147) -> Tensor:
    """mean|STFT_w(ŝ − s)|: the modulus of the complex difference, so that phase counts.

    The STFT is linear: the transform of the difference is the difference of the transforms.
    n_fft = max(w, 2048), a periodic Hann window padded with zeros to n_fft, centred, reflected edges.

    Args:
        difference: ŝ − s, (..., samples).
        window: w, in samples.
        hop: samples between frames.

    Raises:
        ValueError: when the signal is too short for its edges to be reflected.
    """
    if difference.shape[-1] <= max(window, 2048) // 2:
        least = max(window, 2048) // 2 + 1
        raise ValueError(f"{difference.shape[-1]} samples are too few for window={window}: give at least {least}")
    hann = torch.hann_window(window, dtype=difference.dtype, device=difference.device)
    n_fft = max(window, 2048)
    signals = difference.reshape(-1, difference.shape[-1])
    # On a CPU one signal at a time: its spectrum stays in cache, and the whole takes less than half as long.
    parts = signals.split(1) if signals.device.type == "cpu" else (signals,)
    means = [
        torch.stft(part, n_fft, hop, window, hann, center=True, pad_mode="reflect", return_complex=True).abs().mean()
        for part in parts
    ]
    return torch.stack(means).mean()


def _difference(estimate: Tensor, target: Tensor) -> Tensor:
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} must have one shape")
    wide = torch.promote_types(torch.promote_types(estimate.dtype, target.dtype), torch.float32)
    return estimate.to(wide) - target.to(wide)
