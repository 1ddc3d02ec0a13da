"""Training losses: the published values, gradients, and which answer each loss prefers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bsmamba2.losses import WINDOWS, bsmamba2_loss, snr_loss, spectral_loss
from bsmamba2.metrics import usdr


def test_loss_is_the_published_one(published: dict[str, Tensor]) -> None:
    estimate, target = published["loss.prediction"], published["loss.target"]
    terms = torch.stack([spectral_loss(estimate - target, window) for window in WINDOWS])
    torch.testing.assert_close(terms, published["loss.spectral_by_window"], rtol=1e-5, atol=0)
    torch.testing.assert_close(10 * (estimate - target).abs().mean(), published["loss.time"], rtol=1e-5, atol=0)
    torch.testing.assert_close(bsmamba2_loss(estimate, target), published["loss.total"], rtol=1e-5, atol=0)


def test_loss_hears_phase_and_is_float32() -> None:
    s = torch.randn(2, 8000)
    assert bsmamba2_loss(-s, s) > 1.9 * bsmamba2_loss(torch.zeros_like(s), s)  # loudness alone would say 0
    assert bsmamba2_loss(s.bfloat16(), s.bfloat16()).dtype == torch.float32
    assert bsmamba2_loss(s, s) == 0
    with pytest.raises(ValueError, match="one shape"):
        bsmamba2_loss(s, s[:1])
    with pytest.raises(ValueError, match="2048 samples are too few"):
        bsmamba2_loss(s[:, :2048], s[:, :2048])


def test_loss_gradient_is_finite_where_the_estimate_is_perfect() -> None:
    s = torch.zeros(1, 5000, requires_grad=True)
    bsmamba2_loss(s, torch.zeros(1, 5000)).backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_snr_loss_is_the_error_below_the_mixture_song_by_song() -> None:
    target, band = torch.randn(3, 2, 5000), torch.randn(3, 2, 5000)
    target[1] *= 0.01  # a quiet example counts as much as a loud one
    band[1] *= 0.01
    estimate, mixture = target + torch.tensor([0.5, 0.1, 0.02])[:, None, None] * band, target + band
    error = np.square((estimate - target).double().numpy()).sum((1, 2))
    whole = np.square(mixture.double().numpy()).sum((1, 2))
    wanted = np.mean(10 * np.log10((error + 1e-7) / (whole + 1e-7)))
    assert snr_loss(estimate, target, mixture, max_snr_db=200).item() == pytest.approx(wanted, abs=1e-4)
    with_threshold = np.mean(10 * np.log10((error + 1e-3 * whole + 1e-7) / (whole + 1e-7)))
    assert snr_loss(estimate, target, mixture).item() == pytest.approx(with_threshold, abs=1e-4)
    # From one estimate to another it changes as the mean of the scores does.
    gain = snr_loss(mixture, target, mixture, max_snr_db=200) - snr_loss(estimate, target, mixture, max_snr_db=200)
    gains = [usdr(s, ours) - usdr(s, x) for s, ours, x in zip(target, estimate, mixture, strict=True)]
    assert gain.item() == pytest.approx(np.mean(gains), abs=1e-3)
    assert snr_loss(target, target, mixture).item() == pytest.approx(-30, abs=0.01)
    assert snr_loss(estimate.bfloat16(), target, mixture).dtype == torch.float32


def test_snr_loss_has_a_gradient_in_silence() -> None:
    mixture = torch.randn(1, 2, 5000)
    for x, estimate in ((mixture, torch.zeros_like(mixture)), (mixture, 0.1 * mixture), (0 * mixture, 0 * mixture)):
        estimate.requires_grad_()
        snr_loss(estimate, torch.zeros_like(x), x).backward()
        assert estimate.grad is not None
        assert estimate.grad.isfinite().all()
        assert bool(estimate.grad.any()) == bool(estimate.detach().any())  # silence is the answer there
    one, two = torch.zeros(1, 2, 4), torch.zeros(2, 2, 4)
    for signals, told in (
        ((two, one, one), "one shape"),
        ((one, one, two), "one shape"),
        ((one[0],) * 3, r"\(b, c, s"),
    ):
        with pytest.raises(ValueError, match=told):
            snr_loss(*signals)


@pytest.mark.parametrize(("vocal_segments", "likelier"), [(7, 1.0), (3, 0.0)])
def test_one_loss_takes_the_likelier_of_two_answers_and_the_other_their_mean(
    vocal_segments: int, likelier: float
) -> None:
    """In some of ten stretches there is a voice, in the others a band that sounds the same, and nothing tells which."""
    mixture = torch.randn(1, 2, 10, 8192)
    target = mixture.clone()
    target[:, :, vocal_segments:] = 0
    mixture, target = mixture.flatten(2), target.flatten(2)
    gains = torch.linspace(0, 1, 11)
    costs = torch.tensor(
        [(bsmamba2_loss(g * mixture, target, hop_length=441), snr_loss(g * mixture, target, mixture)) for g in gains]
    )
    best = gains[costs.argmin(0)]
    assert best[0].item() == pytest.approx(likelier)
    assert best[1].item() == pytest.approx(vocal_segments / 10)


@pytest.mark.parametrize("window", [4096, 512])
@pytest.mark.parametrize("hop_length", [147, 441])
@pytest.mark.parametrize("samples", [2049, 4410, 5003])
def test_spectral_loss_and_gradient_are_those_of_torchs_stft(samples: int, hop_length: int, window: int) -> None:
    signal = torch.randn(3, samples, dtype=torch.float64, requires_grad=True)
    n_fft = max(window, 2048)
    hann = torch.hann_window(window, dtype=torch.float64)
    wanted = torch.stft(signal, n_fft, hop_length, window, hann, pad_mode="reflect", return_complex=True).abs().mean()
    loss = spectral_loss(signal, window, hop_length)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(3 * one, signal)[0] for one in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * theirs.abs().max())
