"""Data augmentation: speed, EQ, stereo image, saturation, low-pass; and mixtures of stems from one excerpt of a song.

stems → speed → CHANGES, each with its probability → original level → one low-pass filter for all → stems

All random numbers come from one seed, so an example can be skipped without being read. We chose most changes because
they hurt a model that was trained without them. The published model has no augmentation.

Book: "Beyond the published recipe". Axes: c channel, t sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from ..data import Example, Remixer, Source

SPEED_PROB, LOW_PASS_PROB = 0.5, 0.4
SEMITONES = 4.0
"""Largest change of a stem's speed in semitones, up or down; pitch and formants change with it."""
OCTAVES = np.array([-5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.6])
"""Frequencies of the random gains of `equalise`, in octaves relative to 1 kHz."""


# --- one function per change: a stem (c, t), the sample rate, random numbers → the stem ---------------------


def equalise(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Random EQ: a curve with a standard deviation of 2.5 dB at each octave, and a random tilt of 1 dB per octave."""
    decibels = rng.normal(0, 2.5, len(OCTAVES)) + rng.normal(0, 1.0) * OCTAVES
    gains = 10 ** (np.interp(_octaves(stem.shape[-1], rate), OCTAVES, decibels) / 20)
    return torch.fft.irfft(torch.fft.rfft(stem) * torch.from_numpy(gains.astype(np.float32)), stem.shape[-1])


def flip_channels(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Swap the left and right channels."""
    return stem.flip(0)


def stereo_width(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Narrow or widen the stereo image: side signal times 0 to 1.5."""
    middle, side = stem.mean(0), (stem[0] - stem[1]) * (rng.uniform(0, 1.5) / 2)
    return torch.stack((middle + side, middle - side))


def channel_gains(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Move the stereo image: a random gain of −6 to 6 dB for each channel."""
    return stem * torch.tensor(10 ** (rng.uniform(-6, 6, (2, 1)) / 20), dtype=torch.float32)


def double_track(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Add a wide double: the mono signal, delayed by 5 to 25 ms, with opposite signs in the two channels."""
    double = stem.mean(0).roll(round(rng.uniform(0.005, 0.025) * rate)) * rng.uniform(0.2, 0.8)
    return stem + torch.stack((double, -double))


def saturate(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Saturation, as in an amplifier, tape or compressor: tanh of the stem, scaled to an RMS of −6 to 12 dB."""
    drive = 10 ** (rng.uniform(-6, 12) / 20)
    return torch.tanh(stem * (drive / _level(stem)))


def roughen(stem: Tensor, rate: int, rng: Generator) -> Tensor:
    """Vocal roughness: amplitude modulation with a depth of 10 to 60 % and a wandering rate of about 30 to 150 Hz."""
    samples = stem.shape[-1]
    points = max(2, round(samples / rate * 20))
    hertz = rng.uniform(30, 150) * 2 ** rng.normal(0, 0.3, points)
    speed = np.interp(np.linspace(0, points - 1, samples), np.arange(points), hertz)
    phase = 2 * np.pi * (np.cumsum(speed) / rate + rng.random())
    return stem * torch.from_numpy((1 + rng.uniform(0.1, 0.6) * np.sin(phase)).astype(np.float32))


def change_speed(piece: Tensor, samples: int) -> Tensor:
    """Speed change by resampling in the frequency domain: `piece` (c, t) → (c, `samples`)."""
    if piece.shape[-1] == samples:
        return piece
    # A truncated or zero-padded spectrum gives the same sound with a different number of samples.
    whole = torch.fft.rfft(piece)
    spectrum = whole.new_zeros(len(piece), samples // 2 + 1)
    bins = min(whole.shape[1], spectrum.shape[1])
    spectrum[:, :bins] = whole[:, :bins] * (samples / piece.shape[1])
    return torch.fft.irfft(spectrum, samples)


def low_pass(stem: Tensor, rate: int, cutoff: float) -> Tensor:
    """Low-pass filter, as in lossy files or old recordings; the gain falls to zero over 800 Hz around `cutoff` (Hz)."""
    hertz = torch.fft.rfftfreq(stem.shape[-1], 1 / rate)
    gains = ((cutoff + 400 - hertz) / 800).clamp(0, 1)
    return torch.fft.irfft(torch.fft.rfft(stem) * gains, stem.shape[-1])


CHANGES: dict[Callable[[Tensor, int, Generator], Tensor], float] = {
    equalise: 0.7,
    flip_channels: 0.5,
    stereo_width: 0.4,
    channel_gains: 0.3,
    double_track: 0.3,
    saturate: 0.25,
    roughen: 0.3,
}
"""Changes in order of application, and the probability of each."""
VOICE_ONLY, STEREO_ONLY = (double_track, roughen), (flip_channels, stereo_width, channel_gains, double_track)


class Augmentation:
    """Random augmentation of one example: a speed and `CHANGES` for each stem, then one low-pass filter for all.

    Args:
        seed: the same seed makes the same changes.
        stems: number of stems.
        voice: index of the stem that `double_track` and `roughen` may change.
        coherent: whether all stems come from one excerpt of one song, and therefore share one speed.
    """

    def __init__(self, seed: int, stems: int, *, voice: int = 0, coherent: bool = False) -> None:
        self._rng, self.voice = np.random.default_rng(seed), voice
        semitones = self._rng.uniform(-SEMITONES, SEMITONES, stems) * (self._rng.random(stems) < SPEED_PROB)
        self.speeds: list[float] = (2 ** ((semitones[:1].repeat(stems) if coherent else semitones) / 12)).tolist()

    def lengths(self, samples: int) -> list[int]:
        """Number of samples to read from each stem for an example of `samples`; higher for a stem that is sped up."""
        return [round(samples * speed) for speed in self.speeds]

    def __call__(self, pieces: Sequence[Tensor], samples: int, rate: int) -> list[Tensor]:
        """Apply the changes: pieces (c, t) with the lengths from `lengths` → stems (c, samples).

        Each stem is scaled back to the RMS of its piece before the low-pass filter; a silent stem stays silent.
        """
        rng, stems = copy.deepcopy(self._rng), []  # so that every call makes the same changes
        for i, piece in enumerate(pieces):
            own = np.random.default_rng(rng.integers(2**63))  # so that a silent stem does not affect the next one
            level = _level(piece)
            if not level:
                stems.append(piece.new_zeros(len(piece), samples))
                continue
            stem = change_speed(piece, samples)
            for change, prob in CHANGES.items():
                fits = (i == self.voice or change not in VOICE_ONLY) and (len(stem) == 2 or change not in STEREO_ONLY)
                if own.random() < prob and fits:
                    stem = change(stem, rate, own)
            stems.append(stem * (level / max(_level(stem), 1e-12)))
        if rng.random() < LOW_PASS_PROB:
            cutoff = rng.uniform(10_000, 20_000)
            stems = [low_pass(stem, rate, cutoff) for stem in stems]
        return stems


class AugmentedRemixer(Remixer):
    """`Remixer` with coherent mixtures and augmentation, each for a fraction of the examples.

    Takes the arguments of `Remixer` and the two below. The first target counts as the voice, so a voice among
    several targets should come first.

    Args:
        coherent_mix_prob: probability that all stems of an example come from the song and position drawn for the first
            target, so that they share key and tempo; each stem still has its own dropout and gain.
        augment_prob: probability that an example is augmented; its gains are applied afterwards.

    Differs from the published model, where both probabilities are 0.

    Raises:
        ValueError: when a stem has no salient window in any song, or one of the two probabilities is outside [0, 1].
    """

    def __init__(self, *args: Any, coherent_mix_prob: float = 0.0, augment_prob: float = 0.0, **options: Any) -> None:
        for name, prob in (("coherent_mix_prob", coherent_mix_prob), ("augment_prob", augment_prob)):
            if not 0 <= prob <= 1:
                raise ValueError(f"{name}={prob!r} must lie in [0, 1]")
        super().__init__(*args, **options)
        self.coherent_mix_prob, self.augment_prob = coherent_mix_prob, augment_prob

    def skip(self, count: int) -> None:
        """Draw `count` batches without reading them."""
        for _ in range(count * self.batch):
            self.draw_augmentation(self.draw(self.generator), self.generator)

    def draw(self, generator: torch.Generator) -> list[Source]:
        """Draw the sources of one example, one for each stem."""
        sources = super().draw(generator)
        if self.coherent_mix_prob and float(torch.rand((), generator=generator)) < self.coherent_mix_prob:
            track, start, _ = sources[self.targets[0]]
            sources = [(track, start, gain) for *_, gain in sources]
        return sources

    def draw_augmentation(self, sources: Sequence[Source], generator: torch.Generator) -> Augmentation | None:
        """Draw the augmentation of an example; None if it is not augmented."""
        if not self.augment_prob or float(torch.rand((), generator=generator)) >= self.augment_prob:
            return None
        seed = int(torch.randint(2**62, (), generator=generator))
        first, place, _ = sources[0]
        coherent = all(track is first and start == place for track, start, _ in sources)
        return Augmentation(seed, len(sources), voice=self.targets[0], coherent=coherent)

    def example(self, generator: torch.Generator) -> Example:
        """Draw one example: the mixture, its target, and the names of its sources."""
        sources = self.draw(generator)
        augmentation = self.draw_augmentation(sources, generator)
        if augmentation is None:
            return self.read(sources)
        moved, pieces = [], []
        for i, length in enumerate(augmentation.lengths(self.samples)):
            track, start, gain = sources[i]
            length = min(length, track.samples)  # longer than the track: use all of it
            start = min(start, track.samples - length)  # past the end: start earlier
            moved.append((track, start, gain))
            pieces.append(track.crop(i, start, length))
        mixture, target, names = self.mix(augmentation(pieces, self.samples, moved[0][0].sample_rate), moved)
        return mixture, target, f"{names}, changed"


def _level(stem: Tensor) -> float:
    """RMS of a stem, bit-identical for any number of threads."""
    return float(np.sqrt(np.square(stem.numpy(), dtype=np.float64).mean()))


@cache
def _octaves(samples: int, rate: int) -> np.ndarray:
    """Bin frequencies of a spectrum in octaves relative to 1 kHz, (bins,); those below 20 Hz count as 20 Hz."""
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    return np.log2(np.maximum(hertz, 20) / 1_000).astype(np.float32)
