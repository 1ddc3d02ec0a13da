"""STFT and inverse STFT: audio → complex spectrogram → audio (book: "The spectrogram").

As published: periodic Hann window (of n_fft samples unless a shorter one is requested), centred frames with reflected
edges, no normalisation. `bsmamba2.audio.streaming` computes both transforms for audio that arrives in blocks.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def analysis_window(n_fft: int, win_length: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Periodic Hann window of `win_length` samples (None: n_fft), zero-padded on both sides to (n_fft,)."""
    length = win_length or n_fft
    left = (n_fft - length) // 2  # the same padding as in torch.stft
    return nn.functional.pad(torch.hann_window(length, dtype=dtype, device=device), (left, n_fft - length - left))


def stft(audio: Tensor, n_fft: int = 2048, hop_length: int = 441, win_length: int | None = None) -> Tensor:
    """Short-time Fourier transform (STFT) of the published model.

    Args:
        audio: real (..., samples), more than n_fft // 2 samples (because the edges are reflected).
        n_fft: transform length, in samples.
        hop_length: samples between frames.
        win_length: window length, in samples, at most n_fft; None: n_fft.

    Returns:
        Complex (..., f, t) with f = n_fft // 2 + 1 and t = samples // hop + 1.

    Raises:
        ValueError: if the audio is too short to reflect its edges.
    """
    samples = audio.shape[-1]
    check_length(samples, n_fft)
    window = analysis_window(n_fft, win_length, audio.dtype, audio.device)
    flat = audio.reshape(-1, samples)
    spectrogram = torch.stft(
        flat, n_fft, hop_length, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    return spectrogram.unflatten(0, audio.shape[:-1]) if audio.dim() > 1 else spectrogram[0]


def istft(
    spectrogram: Tensor, samples: int, n_fft: int = 2048, hop_length: int = 441, win_length: int | None = None
) -> Tensor:
    """Inverse short-time Fourier transform: least-squares overlap-add, the inverse of `stft`.

    Args:
        spectrogram: complex (..., f, t).
        samples: length of the audio to return.
        n_fft: transform length, in samples.
        hop_length: samples between frames.
        win_length: window length, in samples, at most n_fft; None: n_fft.

    Returns:
        Real (..., samples).
    """
    window = analysis_window(n_fft, win_length, spectrogram.real.dtype, spectrogram.device)
    flat = spectrogram.reshape(-1, *spectrogram.shape[-2:])
    audio = torch.istft(flat, n_fft, hop_length, window=window, center=True, length=samples)
    return audio.unflatten(0, spectrogram.shape[:-2]) if spectrogram.dim() > 2 else audio[0]


def check_length(samples: int, n_fft: int) -> None:
    """Raise ValueError if there are too few samples to reflect at the edges."""
    if samples <= n_fft // 2:
        raise ValueError(f"{samples} samples are too few for n_fft={n_fft}: pad the audio to more than {n_fft // 2}")
