"""Training losses: the published loss, L1 of the waveform and of complex STFTs at several resolutions,

    L = 10 · mean|ŝ − s| + Σ_w mean|STFT_w(ŝ) − STFT_w(s)|

and an SNR loss, the error's energy relative to the mixture's in dB, which optimises nearly the same quantity as uSDR.

Book: "Training". Source: the published implementation of arXiv:2508.14556; for `snr_loss`, see its docstring.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

WINDOWS = (4096, 2048, 1024, 512, 256)
"""Window lengths of the published loss, in samples."""


def bsmamba2_loss(
    estimate: Tensor,
    target: Tensor,
    *,
    windows: Sequence[int] = WINDOWS,
    hop_length: int = 147,
    time_weight: float = 10.0,
) -> Tensor:
    """Published training loss: L1 of the waveform plus multi-resolution complex STFT loss (`spectral_loss`).

    Args:
        estimate: ŝ, (..., samples); must be longer than half the longest window.
        target: s, of the same shape.
        windows: STFT window lengths, in samples. (2048, 1024, 512) is an earlier, cheaper choice.
        hop_length: samples between frames.
        time_weight: weight of the waveform term.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or the signals are too short for the longest window.
    """
    difference = _difference(estimate, target)
    spectral = sum(spectral_loss(difference, window, hop_length) for window in windows)
    return time_weight * difference.abs().mean() + spectral


def snr_loss(estimate: Tensor, target: Tensor, mixture: Tensor, *, max_snr_db: float = 30.0) -> Tensor:
    """SNR loss with a soft threshold: the error's energy relative to the mixture's, in dB.

        L = 10 log₁₀ (Σ(ŝ − s)² + τ Σx² + ε) − 10 log₁₀ (Σx² + ε)        τ = 10^(−max_snr_db/10), ε = 1e-7

    The sums run over the channels and samples of an example, and L is averaged over examples, much as uSDR is averaged
    over songs. Without τ, L is the negative SNR plus a constant per example. Silent targets use the same formula.

    Differs from the published model, whose loss is `bsmamba2_loss`. The soft threshold follows Wisdom et al.
    (arXiv:2011.00803), who set it relative to the target, and relative to the mixture only if the target is silent.

    Args:
        estimate: ŝ, (b, c, samples).
        target: s, of the same shape.
        mixture: x, of the same shape.
        max_snr_db: soft threshold, in dB below the mixture. An error at this level gets half the gradient it would
            get without τ.

    Returns:
        Scalar, float32 or wider.

    Raises:
        ValueError: if the shapes differ, or do not have three axes.
    """
    if target.dim() != 3:
        raise ValueError(f"target {tuple(target.shape)} must be (b, c, samples)")
    if mixture.shape != target.shape:
        raise ValueError(f"mixture {tuple(mixture.shape)} and target {tuple(target.shape)} must have one shape")
    difference = _difference(estimate, target)
    error = difference.square().flatten(1).sum(1)
    whole = mixture.to(difference.dtype).square().flatten(1).sum(1)
    return 10 * (torch.log10(error + 10 ** (-max_snr_db / 10) * whole + 1e-7) - torch.log10(whole + 1e-7)).mean()


def spectral_loss(difference: Tensor, window: int, hop_length: int = 147) -> Tensor:
    """Complex STFT loss at one resolution, mean|STFT_w(ŝ − s)|; the difference is complex, so phase errors count.

    Because the STFT is linear, the transform of the difference is the difference of the transforms.
    The window is a periodic Hann window, zero-padded to n_fft = max(w, 2048); frames are centred, edges reflected.

    Args:
        difference: ŝ − s, (..., samples).
        window: w, in samples.
        hop_length: samples between frames.

    Raises:
        ValueError: if the signal is too short to reflect its edges.
    """
    if difference.shape[-1] <= max(window, 2048) // 2:
        least = max(window, 2048) // 2 + 1
        raise ValueError(f"{difference.shape[-1]} samples are too few for window={window}: give at least {least}")
    signals = difference.reshape(-1, difference.shape[-1])
    mean: Tensor = _MeanModulus.apply(signals, window, hop_length)
    return mean


class _MeanModulus(torch.autograd.Function):
    """Mean modulus of the STFT of signals (s, samples), and its gradient; each takes one FFT, and no spectrum is kept.

    The gradient of |Z| is Z / |Z|, or zero if Z = 0; the inverse transform takes it back to the signal.
    """

    @staticmethod
    def forward(ctx: Any, signals: Tensor, window: int, hop_length: int) -> Tensor:
        # On a CPU, process one signal at a time, so that its spectrum stays in cache.
        parts = signals.split(1) if signals.device.type == "cpu" else (signals,)
        needs_grad = ctx.needs_input_grad[0]
        means, gradients = zip(*(_mean_modulus(part, window, hop_length, needs_grad) for part in parts), strict=True)
        if needs_grad:
            ctx.save_for_backward(torch.cat(gradients) / len(parts))
        return torch.stack(means).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None


def _mean_modulus(signals: Tensor, window: int, hop_length: int, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Mean of |STFT| over signals (s, samples), frames and bins; if needed, also its gradient, (s, samples)."""
    samples, n_fft = signals.shape[-1], max(window, 2048)
    edge, frames = n_fft // 2, samples // hop_length + 1
    hann = torch.hann_window(window, dtype=signals.dtype, device=signals.device)
    padded = functional.pad(signals, (edge, edge), mode="reflect")
    # The STFT centres the window in n_fft samples. Here the window comes first, which changes phases but not moduli.
    first = (n_fft - window) // 2
    cut = padded[:, first:].unfold(-1, window, hop_length)[:, :frames] * hann
    spectrum = torch.fft.rfft(cut, n_fft)
    modulus = spectrum.abs()
    mean = modulus.mean()
    if not needs_grad:
        return mean, None
    spectrum *= modulus.clamp_(min=torch.finfo(modulus.dtype).tiny).reciprocal_()  # a division takes five times as long
    spectrum[..., 1:-1] *= 0.5  # `irfft` counts every bin twice, except the first and last
    back = torch.fft.irfft(spectrum, n_fft, norm="forward")[..., :window] * (hann / modulus.numel())

    # Overlap-add, hop by hop: the i-th block of `hop_length` samples in a frame starts i hops after the frame.
    stretches = -(-window // hop_length)
    back = functional.pad(back, (0, stretches * hop_length - window)).unflatten(-1, (stretches, hop_length))
    added = back.new_zeros(len(signals), frames + stretches - 1, hop_length)
    for i in range(stretches):
        added[:, i : i + frames] += back[:, :, i]
    whole = functional.pad(added.flatten(1), (first, max(0, samples + 2 * edge - first - added[0].numel())))

    gradient = whole[:, edge : edge + samples].clone()
    gradient[:, 1 : edge + 1] += whole[:, :edge].flip(-1)  # add the gradient of the reflected edges
    gradient[:, -edge - 1 : -1] += whole[:, edge + samples : samples + 2 * edge].flip(-1)
    return mean, gradient


def _difference(estimate: Tensor, target: Tensor) -> Tensor:
    if estimate.shape != target.shape:
        raise ValueError(f"estimate {tuple(estimate.shape)} and target {tuple(target.shape)} must have one shape")
    wide = torch.promote_types(torch.promote_types(estimate.dtype, target.dtype), torch.float32)
    return estimate.to(wide) - target.to(wide)
