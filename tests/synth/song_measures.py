"""Measures of synthesised songs that several tests use, taken from the audio only."""

import math
from functools import cache

import torch

from bsmamba2.synth import Song, synthesise

RATE = 44_100
SEEDS = range(8)


@cache
def default_songs() -> list[Song]:
    """One song of each of the `SEEDS`."""
    return [synthesise(seed) for seed in SEEDS]


def decibels(power: float) -> float:
    return 10 * math.log10(power + 1e-20)


def band_share(sound: torch.Tensor, low: float, high: float) -> float:
    """Share of the power of (2, samples) that lies between two frequencies in Hz."""
    power = torch.fft.rfft(sound.double()).abs().square().sum(dim=0)
    hertz = torch.fft.rfftfreq(sound.shape[-1], 1 / RATE)
    return float(power[(hertz >= low) & (hertz < high)].sum() / power.sum())
