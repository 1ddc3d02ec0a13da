"""STFT and inverse: round trip, and one frame against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from bsmamba2.spectrogram import analysis_window, istft, stft


@pytest.mark.parametrize(("n_fft", "hop_length"), [(2048, 441), (2048, 882), (128, 32), (512, 256)])
@pytest.mark.parametrize("samples", [1500, 4097, 5000])
def test_round_trip(n_fft: int, hop_length: int, samples: int) -> None:
    audio = torch.randn(3, 2, samples, dtype=torch.float64)
    spectrogram = stft(audio, n_fft, hop_length)
    assert spectrogram.shape == (3, 2, n_fft // 2 + 1, samples // hop_length + 1)
    torch.testing.assert_close(istft(spectrogram, samples, n_fft, hop_length), audio, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("n_fft", "hop_length", "win_length"), [(4096, 441, 2048), (4096, 1024, 2048), (64, 9, 37), (64, 16, 64)]
)
def test_a_shorter_window_is_pytorchs_and_inverts_exactly(n_fft: int, hop_length: int, win_length: int) -> None:
    audio = torch.randn(2, 9001, dtype=torch.float64)
    hann = torch.hann_window(win_length, dtype=torch.float64)
    lengths = (n_fft, hop_length, win_length)
    expected = torch.stft(audio, *lengths, hann, pad_mode="reflect", return_complex=True)
    spectrogram = stft(audio, *lengths)
    torch.testing.assert_close(spectrogram, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(istft(spectrogram, 9001, *lengths), audio, rtol=0, atol=1e-9)
    window = analysis_window(n_fft, win_length, torch.float64, audio.device)
    assert window.shape == (n_fft,)
    assert torch.equal(window[window > 0], hann[hann > 0])
    assert (win_length == n_fft) == torch.equal(spectrogram, stft(audio, n_fft, hop_length))


def test_a_frame_is_the_windowed_transform() -> None:
    audio = torch.randn(1000, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.fft.rfft(audio[320 - 64 : 320 + 64] * window)
    torch.testing.assert_close(stft(audio, 128, 32)[:, 10], expected)
