"""Random production (optional): effects that recordings have and clean mixes lack.

`apply_production` applies each effect to a stem (c, t) with the probability given here, multiplied by `mix_variety`.
"""

import math

import numpy as np
from numpy.random import Generator

from .filters import BLOCK, convolve, filter_spectrum, random_eq
from .song import Array

LOWPASS_VOCALS_PROB, LOW_CUT_VOCALS_PROB, DOUBLES_PROB, ECHOES_PROB = 0.7, 1.0, 0.4, 0.4
OVERDRIVE_BASS_PROB, WIDE_BASS_PROB, AMP_SIM_PROB, SATURATION_PROB, EQ_PROB = 1.0, 0.5, 0.6, 0.6, 1.0
MAX_NARROWING = 0.5  # of the side signal; 0.5 is mono
VOCALS_LEVEL = (-9, 1)  # dB, range of the change in the vocals' level
EQ_SPREAD = 4.0  # dB, standard deviation of each point of the equalisers


def apply_production(rng: Generator, lowpass_rng: Generator, stems: Array, mix_variety: float, rate: int) -> float:
    """Apply random effects to stems (s, c, t) in place, and return a change of the vocals' level in dB.

    The caller sets the levels of the stems afterwards.
    """

    def happens(probability: float) -> bool:
        return rng.random() < probability * mix_variety

    vocals, _, bass, other = stems
    lowpass_vocals(lowpass_rng, vocals, mix_variety, rate)
    if happens(OVERDRIVE_BASS_PROB) and bass.any():  # a bass amplifier, which raises the middle frequencies
        drive, slope, top = rng.uniform(0, 24), rng.uniform(0.3, 1.6), rng.uniform(400, 1_500)
        overdriven = _saturate(bass, drive)
        bass[:] = filter_spectrum(overdriven, lambda f: np.clip(f, 60, top) ** slope / (1 + (f / (4 * top)) ** 2), rate)
    if happens(AMP_SIM_PROB) and other.any():
        _amp_sim(rng, other, rate)
    if happens(WIDE_BASS_PROB) and bass.any():  # a chorus on the side signal
        level, delay = rng.uniform(0.05, 0.35), rng.uniform(4, 15)
        side = np.float32(level) * _chorus(rng, bass.mean(0), delay, rate)
        bass += np.stack((side, -side))
    if happens(LOW_CUT_VOCALS_PROB):  # below the formants
        corner, order = rng.uniform(150, 600), rng.uniform(1, 2.5)
        vocals[:] = filter_spectrum(vocals, lambda f: 1 / np.sqrt(1 + (corner / f) ** (2 * order)), rate)
    for stem in stems:
        drive = rng.uniform(-10, 12)
        if happens(SATURATION_PROB) and stem.any():
            stem[:] = _saturate(stem, drive)
        if happens(EQ_PROB):
            stem[:] = convolve(stem, random_eq(rng, rate, EQ_SPREAD)[None].repeat(2, 0), BLOCK // 2)
    for stem in stems[1:]:
        side = (stem[0] - stem[1]) * np.float32(MAX_NARROWING * mix_variety * rng.random())
        stem -= np.stack((side, -side))
    dry = vocals.mean(0)
    if happens(DOUBLES_PROB):  # a second and a third take, left and right, with delays that vary slowly
        level = rng.uniform(0.2, 0.9)
        for channel in (0, 1):
            vocals[channel] += np.float32(level) * _chorus(rng, dry, rng.uniform(10, 35), rate)
    if happens(ECHOES_PROB):  # right and left in turn
        level, lag = rng.uniform(0.1, 0.4), round(rng.uniform(0.07, 0.4) * rate)
        for i in range(1, 1 + (len(dry) - 1) // lag):
            vocals[i % 2, i * lag :] += np.float32(level**i) * dry[: len(dry) - i * lag]
    return float(rng.uniform(*VOCALS_LEVEL)) * mix_variety


def lowpass_vocals(rng: Generator, vocals: Array, mix_variety: float, rate: int) -> None:
    """Low-pass shelf: up to 18 dB less treble, as from dull microphones and de-essers."""
    corner, shelf = rng.uniform(1_500, 5_000), 10 ** (-rng.uniform(3, 18) / 20)
    if rng.random() < LOWPASS_VOCALS_PROB * mix_variety and vocals.any():
        vocals[:] = filter_spectrum(vocals, lambda f: (1 + shelf * (f / corner) ** 2) / (1 + (f / corner) ** 2), rate)


def _saturate(stem: Array, drive: float) -> Array:
    """Soft clipping: tanh of a stem that is first scaled to an RMS of `drive` dB."""
    return np.tanh(stem * np.float32(10 ** (drive / 20) / math.sqrt(float(np.mean(stem**2)))))


def _amp_sim(rng: Generator, stem: Array, rate: int) -> None:
    """Two overdriven amplifiers with cabinets, as for doubled guitars; their difference tones fill 80 to 500 Hz."""
    rms = math.sqrt(float(np.mean(stem**2)))
    drive, bias, blend = 10 ** (rng.uniform(6, 32) / 20), rng.uniform(0, 0.4), rng.uniform(0, 1)
    low, centre, gain = rng.uniform(60, 120), rng.uniform(90, 300), 10 ** (rng.uniform(0, 9) / 20)
    top = rng.uniform(2_500, 5_500)

    def cabinet(f: Array) -> Array:
        resonance = 1 + (gain - 1) * np.exp(-((np.log2(f / centre) / 0.7) ** 2))
        return resonance / np.sqrt((1 + (low / f) ** 4) * (1 + (f / top) ** 8))

    middle = stem.mean(0)
    for channel in (0, 1):
        signal = np.float32(blend) * stem[channel] + np.float32(1 - blend) * middle
        if channel:
            signal = _chorus(rng, signal, rng.uniform(3, 20), rate)
        stem[channel] = filter_spectrum(np.tanh(signal * np.float32(drive / rms) + np.float32(bias)), cabinet, rate)


def _chorus(rng: Generator, signal: Array, delay: float, rate: int) -> Array:
    """Chorus: a signal (t,) delayed by about `delay` milliseconds, modulated by a slow sine."""
    t = np.arange(len(signal))
    modulation = rng.uniform(0.5, 3) * np.sin(2 * np.pi * (rng.uniform(0.2, 0.9) * t / rate + rng.random()))
    return np.interp(t - (delay + modulation) * rate / 1_000, t, signal, left=0).astype(np.float32)
