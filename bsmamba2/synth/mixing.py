"""Mixing: equaliser and room for each stem, a gate for the vocals, and levels."""

import math

import numpy as np
from numpy.random import Generator

from .filters import bandpass, convolve, fast_length, random_eq
from .score import Score
from .song import STEMS, Array, Intervals

TAIL_SECONDS = 0.12
"""Longest reverberation after a sung phrase, in seconds; after it the vocals are exactly zero."""
WET_VOCALS_PROB, MAX_WET = 0.7, {"vocals": 0.25, "drums": 0.3, "bass": 0.0, "other": 0.5}
"""Probability that the vocals have reverberation; its highest level per stem, relative to the direct sound."""
MEAN_LEVEL, LEVEL_STD, MAX_VOCALS_LEVEL = {"vocals": 0, "drums": 0, "bass": -1, "other": 0.5}, 2.5, 6.0
"""Levels in dB: vocals relative to the accompaniment during phrases, other stems relative to an RMS of 1."""
LATE_ENTRY_PROB = 0.1
"""Probability that one stem of the accompaniment is silent for the first half bar or bar."""


def equalise_and_reverberate(rng: Generator, dry: dict[str, Array], rate: int) -> tuple[Array, dict[str, float]]:
    """Apply a random equaliser and the song's room to each stem, (s, c, t), and draw the stems' levels in dB."""
    room = _room(rng, rate)
    stems = np.zeros((len(STEMS), *dry["drums"].shape), np.float32)
    levels = {}
    for s, name in enumerate(STEMS):
        equaliser = random_eq(rng, rate)
        is_wet = rng.random() < WET_VOCALS_PROB or name != "vocals"
        wet = MAX_WET[name] * is_wet * rng.random()
        levels[name] = rng.normal(MEAN_LEVEL[name], LEVEL_STD)
        if dry[name].any():
            length = fast_length(len(equaliser) + room.shape[1])
            spectrum = np.fft.rfft(equaliser, length) * (1 + np.float32(wet) * np.fft.rfft(room, length))
            taps = len(equaliser) + (room.shape[1] if wet else 0)
            kernel = np.fft.irfft(spectrum, length)[:, :taps].astype(np.float32)
            stems[s] = convolve(dry[name], kernel, len(equaliser) // 2)
    return stems, levels


def set_levels(
    rng: Generator, stems: Array, levels: dict[str, float], offset: float, phrases: Intervals, score: Score, rate: int
) -> Array:
    """Gate the vocals, and set the levels of stems (s, c, t) and of the mix; `offset` raises the vocals, in dB."""
    samples = stems.shape[-1]
    if rng.random() < LATE_ENTRY_PROB:
        entry = min(samples, round(min(score.time(int(rng.choice([8, 16]))), score.seconds / 2) * rate))
        stems[1 + rng.integers(3), :, :entry] = 0
    for s, name in enumerate(STEMS[1:], start=1):
        rms = math.sqrt(float(np.mean(stems[s] ** 2)))
        if rms > 0:
            stems[s] *= 10 ** (levels[name] / 20) / rms
    if phrases:
        stems[0] *= _gate(phrases, rate, samples)
        sung = np.zeros(samples, bool)
        for start, end in phrases:
            sung[round(start * rate) : round(end * rate)] = True
        accompaniment = stems[1:].sum(axis=0)
        reference = float(np.mean(accompaniment[:, sung] ** 2)) or float(np.mean(accompaniment**2)) or 1.0
        level = min(MAX_VOCALS_LEVEL, max(-MAX_VOCALS_LEVEL, levels["vocals"])) + offset
        stems[0] *= math.sqrt(reference * 10 ** (level / 10) / (float(np.mean(stems[0][:, sung] ** 2)) + 1e-20))
    peak = float(np.abs(stems.sum(axis=0)).max())
    return stems * np.float32(rng.uniform(0.5, 0.95) / (peak or 1.0))


def _room(rng: Generator, rate: int) -> Array:
    """Impulse response of a room, (c, taps), with unit mean energy: four echoes, and noise with exponential decay."""
    decay = rng.uniform(0.06, 0.25)
    samples = int(3.5 * decay * rate)
    t = np.arange(samples, dtype=np.float32) / rate
    impulse = rng.standard_normal((2, samples), dtype=np.float32) * (np.exp(-t / np.float32(decay)) * (1 - t / t[-1]))
    impulse[:, : int(rng.uniform(0.002, 0.03) * rate)] = 0
    for _ in range(4):
        impulse[rng.integers(2), rng.integers(samples // 4)] += rng.normal(0, 6)
    impulse = bandpass(impulse, 200, rng.uniform(2_500, 9_000), rate)
    return impulse / np.sqrt((impulse**2).sum() / 2)


def _gate(phrases: Intervals, rate: int, samples: int) -> Array:
    """Gate (t,): 1 within the phrases, 0 elsewhere, with a 5 ms fade-in and a fade-out over the tail."""
    gate = np.zeros(samples, np.float32)
    for i, (start, end) in enumerate(phrases):
        a, b = round(start * rate), min(samples, round(end * rate))
        gate[a:b] = 1
        if a > 0:
            rise = min(b - a, round(0.005 * rate))
            gate[a : a + rise] = np.linspace(0, 1, rise)
        rest = phrases[i + 1][0] - end if i + 1 < len(phrases) else TAIL_SECONDS * 2
        fade = round(min(TAIL_SECONDS, rest / 2) * rate)
        gate[b : b + fade] = (np.cos(np.linspace(0, np.pi / 2, fade)) ** 4)[: samples - b]
    return gate
