"""Changes to the stems of a training example: what one singer, desk or file does otherwise than another.

stems → speed → spectrum → sides → drive (the target: roughness) → the level it had → all: a low-pass filter → stems

All of it is drawn from one seed, so an example can be skipped without being read (`data.Remixer.draw`). Linear filters
work on the spectrum of the whole piece, which therefore counts as one period of a signal without end.

Most kinds of change were chosen for what they did to a model that had not learned with them (chapter "Training").

Book: "Training". Axes: c channel, t sample, f bin of a whole piece's spectrum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

SEMITONES = 4.0
"""How far a stem is sped up or slowed down at most, pitch and formants with it."""
OCTAVES = np.array([-5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.6])
"""Where the random spectrum has its points, in octaves about 1 kHz."""


class Augmentation:
    """What happens to one example, drawn from `seed`.

    Each stem by itself: half of the time another speed, up to four semitones, with which pitch and formants move; 7 in
    10 another spectrum; sides exchanged, narrowed, widened, or one louder than the other; 1 in 4 driven into
    saturation, as far as 12 dB over its root mean square. The target alone: 3 in 10 a wide double, 3 in 10 a gain that
    trembles about 30 to 150 times a second, as a rough voice has. All stems together: 4 in 10 a low-pass filter
    between 10 and 20 kHz, as lossy files have.

    Args:
        seed: the same seed makes the same change.
        stems: how many there are, the target first.
        together: the stems are of one song and place, so one speed holds for all.
    """

    def __init__(self, seed: int, stems: int, *, together: bool = False) -> None:
        self._rng = np.random.default_rng(seed)
        drawn = self._rng.uniform(-SEMITONES, SEMITONES, stems) * (self._rng.random(stems) < 0.5)
        self.speeds: list[float] = (2 ** ((drawn[:1].repeat(stems) if together else drawn) / 12)).tolist()

    def lengths(self, samples: int) -> list[int]:
        """How many samples of each stem must be read for `samples` of the example: more of one that is sped up."""
        return [round(samples * speed) for speed in self.speeds]

    def __call__(self, pieces: Sequence[Tensor], samples: int, rate: int) -> list[Tensor]:
        """The stems of the example, each (c, samples), from pieces (c, t), whose length tells their speed.

        A stem keeps its root mean square, but for what the low-pass filter takes; a silent one stays silent. Only
        stems of two channels have sides.
        """
        rng, changed = copy.deepcopy(self._rng), []  # the next call does the same
        for number, piece in enumerate(pieces):
            own = np.random.default_rng(rng.integers(2**63))  # so that a silent stem changes nothing for the next one
            level = _level(piece)
            if not level:
                changed.append(piece.new_zeros(piece.shape[0], samples))
                continue
            target = number == 0
            stem = _respectrum(own, piece.clone(), samples, rate, target=target)
            if own.random() < 0.25:  # an amplifier, a tape, a compressor
                drive = 10 ** (own.uniform(-6, 12) / 20)
                stem = torch.tanh(stem * (drive / _level(stem)))
            if target and own.random() < 0.3:
                stem = stem * _roughness(own, samples, rate)
            changed.append(stem * (level / max(_level(stem), 1e-12)))
        if rng.random() < 0.4:  # as lossy files have, or old recordings
            cut = rng.uniform(10_000, 20_000)
            hertz = torch.fft.rfftfreq(samples, 1 / rate)
            passes = ((cut + 400 - hertz) / 800).clamp(0, 1)
            changed = [torch.fft.irfft(torch.fft.rfft(stem) * passes, samples) for stem in changed]
        return changed


def _level(stem: Tensor) -> float:
    """Root mean square, the same to the last bit with any number of threads."""
    return float(np.sqrt(np.square(stem.numpy(), dtype=np.float64).mean()))


@cache
def _octaves(samples: int, rate: int) -> np.ndarray:
    """Octaves about 1 kHz of a spectrum's bins, (f,); the lowest ones at 20 Hz."""
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    return np.log2(np.maximum(hertz, 20) / 1_000).astype(np.float32)


def _respectrum(rng: Generator, piece: Tensor, samples: int, rate: int, *, target: bool) -> Tensor:
    """A piece (c, t) as `samples` of another speed, spectrum and place between the sides."""
    read = torch.fft.rfft(piece)
    # A spectrum that is cut, or filled up with zeros, is the same sound in another number of samples.
    spectrum = read.new_zeros(piece.shape[0], samples // 2 + 1)
    bins = min(read.shape[1], spectrum.shape[1])
    spectrum[:, :bins] = read[:, :bins] * (samples / piece.shape[1])
    if rng.random() < 0.7:
        decibels = rng.normal(0, 2.5, len(OCTAVES)) + rng.normal(0, 1.0) * OCTAVES
        gains = 10 ** (np.interp(_octaves(samples, rate), OCTAVES, decibels) / 20)
        spectrum *= torch.from_numpy(gains.astype(np.float32))
    if len(spectrum) == 2:
        if rng.random() < 0.5:
            spectrum = spectrum.flip(0)
        if rng.random() < 0.4:
            middle, side = spectrum.sum(0) / 2, (spectrum[0] - spectrum[1]) * (rng.uniform(0, 1.5) / 2)
            spectrum = torch.stack((middle + side, middle - side))
        if rng.random() < 0.3:
            spectrum = spectrum * torch.tensor(10 ** (rng.uniform(-6, 6, (2, 1)) / 20), dtype=torch.float32)
        if target and rng.random() < 0.3:  # a double at the sides, late by 5 to 25 ms
            # A delay of n samples turns bin f by -2π f n / samples.
            late = torch.arange(samples // 2 + 1) * (-2 * np.pi * round(rng.uniform(0.005, 0.025) * rate) / samples)
            double = spectrum.mean(0) * torch.polar(torch.full_like(late, rng.uniform(0.2, 0.8)), late)
            spectrum = spectrum + torch.stack((double, -double))
    return torch.fft.irfft(spectrum, samples)


def _roughness(rng: Generator, samples: int, rate: int) -> Tensor:
    """A gain about 1 (t,) that trembles some 30 to 150 times a second, now faster and now slower."""
    points = max(2, round(samples / rate * 20))
    hertz = rng.uniform(30, 150) * 2 ** rng.normal(0, 0.3, points)
    speed = np.interp(np.linspace(0, points - 1, samples), np.arange(points), hertz)
    phase = 2 * np.pi * (np.cumsum(speed) / rate + rng.random())
    return torch.from_numpy((1 + rng.uniform(0.1, 0.6) * np.sin(phase)).astype(np.float32))
