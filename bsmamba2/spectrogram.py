"""Audio → complex spectrogram → audio (book: "The spectrogram").

Periodic Hann window of n_fft samples, centred frames with reflected edges, not normalised; as
published. Both ways also for audio that comes in blocks ("Separating songs"). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def stft(audio: Tensor, n_fft: int = 2048, hop_length: int = 441) -> Tensor:
    """The short-time Fourier transform of the published model.

    Args:
        audio: (..., samples), real, more than n_fft // 2 samples (the edges are reflected).
        n_fft: window and transform length, in samples.
        hop_length: samples between frames.

    Returns:
        Complex (..., f, t) with f = n_fft // 2 + 1 and t = samples // hop + 1.

    Raises:
        ValueError: when the audio is too short for its edges to be reflected.
    """
    samples = audio.shape[-1]
    _check_length(samples, n_fft)
    window = torch.hann_window(n_fft, dtype=audio.dtype, device=audio.device)
    flat = audio.reshape(-1, samples)
    spectrogram = torch.stft(
        flat, n_fft, hop_length, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    return spectrogram.unflatten(0, audio.shape[:-1]) if audio.dim() > 1 else spectrogram[0]


def istft(spectrogram: Tensor, samples: int, n_fft: int = 2048, hop_length: int = 441) -> Tensor:
    """The inverse of `stft`: least-squares overlap-add.

    Args:
        spectrogram: complex (..., f, t).
        samples: length of the audio to return.
        n_fft: window and transform length, in samples.
        hop_length: samples between frames.

    Returns:
        Real (..., samples).
    """
    window = torch.hann_window(n_fft, dtype=spectrogram.real.dtype, device=spectrogram.device)
    flat = spectrogram.reshape(-1, *spectrogram.shape[-2:])
    audio = torch.istft(flat, n_fft, hop_length, window=window, center=True, length=samples)
    return audio.unflatten(0, spectrogram.shape[:-2]) if spectrogram.dim() > 2 else audio[0]


def stft_blocks(blocks: Iterable[Tensor], n_fft: int = 2048, hop_length: int = 441) -> Iterator[Tensor]:
    """`stft` of audio that arrives in blocks: the same frames, each as soon as its samples are there.

    Args:
        blocks: (..., samples), real, in order, of any length.
        n_fft: window and transform length, in samples.
        hop_length: samples between frames, at most half of n_fft.

    Yields:
        Complex (..., f, t).

    Raises:
        ValueError: as `stft`.
    """
    half = n_fft // 2
    waiting: Tensor | None = None  # from the first sample of the next frame on
    reflected = False
    for block in blocks:
        waiting = block if waiting is None else torch.cat((waiting, block), dim=-1)
        if not reflected and waiting.shape[-1] > half:
            waiting = torch.cat((waiting[..., 1 : half + 1].flip(-1), waiting), dim=-1)
            reflected = True
        frames = (
            waiting.shape[-1] - n_fft - 1
        ) // hop_length + 1  # one sample more stays than they need, for the other edge
        if reflected and frames > 0:
            yield _frames(waiting, frames, n_fft, hop_length)
            waiting = waiting[..., frames * hop_length :]
    if waiting is None:
        return
    if not reflected:
        _check_length(waiting.shape[-1], n_fft)
    waiting = torch.cat((waiting, waiting[..., -half - 1 : -1].flip(-1)), dim=-1)
    yield _frames(waiting, (waiting.shape[-1] - n_fft) // hop_length + 1, n_fft, hop_length)


def _check_length(samples: int, n_fft: int) -> None:
    if samples <= n_fft // 2:
        raise ValueError(f"{samples} samples are too few for n_fft={n_fft}: pad the audio to more than {n_fft // 2}")


def _frames(audio: Tensor, frames: int, n_fft: int, hop_length: int) -> Tensor:
    """The first `frames` frames of (..., samples), the first of them at the first sample: complex (..., f, t)."""
    audio = audio[..., : (frames - 1) * hop_length + n_fft]
    window = torch.hann_window(n_fft, dtype=audio.dtype, device=audio.device)
    flat = audio.reshape(-1, audio.shape[-1])
    spectrogram = torch.stft(flat, n_fft, hop_length, window=window, center=False, return_complex=True)
    return spectrogram.reshape(*audio.shape[:-1], *spectrogram.shape[1:])


def istft_blocks(spectra: Iterable[Tensor], n_fft: int = 2048, hop_length: int = 441) -> Iterator[Tensor]:
    """`istft` of frames that arrive in blocks: the same samples, each as soon as all frames that reach it are there.

    Args:
        spectra: complex (..., f, t), in order, of any length.
        n_fft: window and transform length, in samples.
        hop_length: samples between frames, at most half of n_fft.

    Yields:
        Real (..., samples): in all one less than hop for each frame, the most that audio of so many frames has.
    """
    shared = -(-n_fft // hop_length) - 1  # frames that reach a sample which is not complete yet
    kept: Tensor | None = None
    first, given = 0, 0  # frame of `kept`; samples yielded

    def up_to(end: int) -> Tensor:
        """The samples from `given` to `end`."""
        assert kept is not None
        return istft(kept, end - first * hop_length, n_fft, hop_length)[..., given - first * hop_length :]

    for block in spectra:
        kept = block if kept is None else torch.cat((kept, block), dim=-1)
        end = (first + kept.shape[-1]) * hop_length - n_fft // 2  # where the next frame begins
        if end > given:
            yield up_to(end)
            given = end
            drop = max(0, kept.shape[-1] - shared)
            kept, first = kept[..., drop:], first + drop
    if kept is not None:
        yield up_to((first + kept.shape[-1]) * hop_length - 1)
