"""A model's scores beside what costs nothing and what cannot be beaten.

song → separate → uSDR; and the same for the mixture, for silence and for the best mask

Book: "Training". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .masks import oracle_mask
from .metrics import csdr, usdr
from .model import BSMamba2
from .separate import separate
from .songs import Song
from .spectrogram import istft, stft


@dataclass(frozen=True)
class Score:
    """One song's uSDR in dB, for the model and its baselines, and the model's cSDR in dB."""

    song: str
    occupancy: float
    mixture: float
    silence: float
    model: float
    oracle: float
    model_csdr: float


def oracle(song: Song, n_fft: int = 2048, hop: int = 441) -> Tensor:
    """The vocals that the best real mask in [0, 1] gives (`masks.oracle_mask`): (c, samples)."""
    mixture = stft(song.mixture, n_fft, hop)
    mask = oracle_mask(stft(song.vocals, n_fft, hop), mixture)
    return istft(mask * mixture, song.mixture.shape[-1], n_fft, hop)


def score(model: BSMamba2, song: Song, *, segment: float = 8.0, overlap: float = 0.5) -> Score:
    """Separate a song's mixture and compare the first stem with its vocals.

    The oracle has the model's own STFT. See `separate.separate` for segment and overlap.

    Raises:
        ValueError: when the song is not at the model's sample rate.
    """
    if song.sample_rate != model.config.sample_rate:
        raise ValueError(f"{song.name} is at {song.sample_rate} Hz, the model at {model.config.sample_rate} Hz")
    estimate = separate(model, song.mixture, segment=segment, overlap=overlap)[0]
    return Score(
        song=song.name,
        occupancy=song.occupancy,
        mixture=usdr(song.vocals, song.mixture),
        silence=usdr(song.vocals, torch.zeros_like(song.vocals)),
        model=usdr(song.vocals, estimate),
        oracle=usdr(song.vocals, oracle(song, model.config.n_fft, model.config.hop)),
        model_csdr=csdr(song.vocals, estimate, song.sample_rate),
    )


def mean(scores: Sequence[Score], field: str) -> float:
    """The mean of one field over songs, in its own unit."""
    return sum(getattr(one, field) for one in scores) / len(scores)
