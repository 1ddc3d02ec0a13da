"""How good a separation is, and what it does where nobody sings.

| function | unit | best | asks |
|---|---|---|---|
| `csdr`, `usdr`, `si_sdr` | dB | +inf | how much of the song's voice is right |
| `bleed` | 0 to 100 | 100 | what is heard too much (bleedless) or too little (fullness), on a scale of hearing |
| `leak` | dB, dBFS | −inf | what is left of the band where the voice is silent |
| `onsets` | ms, dB | 0, −inf | how late the voice comes back after silence, and how wrong |

Signals are (c, samples): s the target of one song, ŝ its estimate, m the mixture; full scale is 1. Sums run over all
samples and channels named, in float64. Book: "Measuring". Sources: `usdr` as in the Music Demixing Challenge 2021
(arXiv:2108.13559); `csdr` after the SDR of BSS Eval v4 (Stöter, Liutkus and Ito, arXiv:1804.06267); `si_sdr` from Le
Roux, Wisdom, Erdogan and Hershey (arXiv:1811.02508); `bleed` as in the training toolbox
ZFTurbo/Music-Source-Separation-Training; `leak` and `onsets` are this project's own. Axis letters: see
`bsmamba2.config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FLOOR = 1e-3
"""Below this modulus (−60 dBFS) a sample is silent; the floor of the published choice of training windows too."""
SHORTEST = 0.25
"""Seconds that silence must last to be a region."""


def usdr(reference: Tensor, estimate: Tensor) -> float:
    """Energy of the reference over energy of the error, over the whole song.

        uSDR = 10 · log10((Σ s² + 1e-7) / (Σ (s − ŝ)² + 1e-7))

    Silence as an estimate scores 0 dB. When the reference is silent, 0 dB is the best there is.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.

    Returns:
        Decibels.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    signal, error = _energies(reference, estimate)
    return float(10 * torch.log10((signal.sum() + 1e-7) / (error.sum() + 1e-7)))


def csdr(
    reference: Tensor,
    estimate: Tensor,
    sample_rate: int = 44_100,
    *,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> float:
    """The median of `csdr_seconds`, dropped seconds left out.

    Returns:
        Decibels; NaN when no second is left, for a silent reference and for a silent estimate among others.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    ratios = csdr_seconds(reference, estimate, sample_rate, beside=beside)
    heard = ratios[~ratios.isnan()]
    return _median(heard) if len(heard) else math.nan


def csdr_seconds(
    reference: Tensor,
    estimate: Tensor,
    sample_rate: int = 44_100,
    *,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> Tensor:
    """The energy ratio of every whole second; the tail shorter than a second is dropped.

        SDR_i = 10 · log10(Σ s² / Σ (s − ŝ)²)   over second i

    A second is dropped (NaN) in which the channels of the reference, or those of the estimate, sum to zero in
    every sample: so a silent second counts neither for nor against. An exact second is +inf.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.
        sample_rate: samples in a second.
        beside: pairs like (s, ŝ) of the other sources that are evaluated together with this one. They do not enter the
            ratios; but a second in which one of them is silent is dropped for all.

    Returns:
        Decibels, (seconds,), float64.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    for pair in ((reference, estimate), *beside):
        _check(*pair)
        if pair[0].shape != reference.shape:
            raise ValueError(f"beside: {tuple(pair[0].shape)} must have the reference's {tuple(reference.shape)}")
    signals, estimates, *others = (
        _by_second(part, sample_rate) for pair in ((reference, estimate), *beside) for part in pair
    )
    energies = []  # of signal and error, second by second: what is computed of one stays in the processor's cache
    for s, found in zip(signals.unbind(1), estimates.unbind(1), strict=True):
        wide = s.double().flatten()
        error = wide - found.double().flatten()
        energies.append(torch.stack((wide @ wide, error @ error)))
    signal, noise = torch.stack(energies).T if energies else torch.empty(2, 0, dtype=torch.float64)
    ratios = 10 * torch.log10(signal / noise)
    for part in (signals, estimates, *others):
        ratios[_silent(part)] = math.nan
    return ratios


def _silent(seconds: Tensor) -> Tensor:
    """Where the channels sum to zero in every sample: (c, seconds, samples) → (seconds,). A few tell of most."""
    silent = ~(seconds[..., ::101].double().sum(0) != 0).any(-1)
    silent[silent.clone()] = ~(seconds[:, silent].double().sum(0) != 0).any(-1)
    return silent


def si_sdr(reference: Tensor, estimate: Tensor) -> float:
    """Energy of the reference, scaled to fit best, over energy of what is left; the estimate's level does not matter.

        SI-SDR = 10 · log10(Σ (α s)² / Σ (α s − ŝ)²)      α = Σ ŝ s / Σ s²

    One α for all channels; no mean is taken off.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.

    Returns:
        Decibels: +inf for s times any factor, −inf for an estimate with nothing of s in it (or beyond ±250,
        where numbers are rounded); NaN when the reference or the estimate is silent: no scale is best then.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    _check(reference, estimate)
    s, found = reference.double().flatten(), estimate.double().flatten()
    scaled = (found @ s) / (s @ s) * s
    rest = scaled - found
    return float(10 * torch.log10((scaled @ scaled) / (rest @ rest))) if found.any() else math.nan


# --- bleed and fullness -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bleed:
    """What `bleed` returns: two numbers from 0 to 100, 100 the best."""

    bleedless: float
    fullness: float


def bleed(
    reference: Tensor,
    estimate: Tensor,
    sample_rate: int = 44_100,
    *,
    n_fft: int = 4096,
    hop_length: int = 1024,
    bands: int = 512,
) -> Bleed:
    """How much the estimate has too much and too little of, on mel bands in dB.

        L(x) = max(20 · log10 max(|STFT x| · mel, 1e-10), max − 80)      d = L(ŝ) − L(s)
        bleedless = 100 / (1 + mean of the d above 0)      fullness = 100 / (1 + |mean of the d below 0|)

    max is over the whole signal, each its own; no d on a side counts as a mean of 0. Channels are kept apart
    and averaged over with all else. Periodic Hann window, centred, zeros at the edges.
    Differs from the published model: its evaluation has n_fft 2048 and hop 441, and passes estimate and reference
    swapped, so that its two figures change places.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.
        sample_rate: in hertz.
        n_fft: window and transform, in samples.
        hop_length: samples between frames.
        bands: mel bands from 0 Hz to half the sample rate.

    Returns:
        Both; 100 for a perfect estimate. Silence is a level like another, −200 dB: two silent signals give 100 and
        100; a silent estimate of a voice has a fullness below 1 and a bleedless of 100.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    _check(reference, estimate)
    mel = mel_filters(sample_rate, n_fft, bands)
    window = torch.hann_window(n_fft, dtype=torch.float64)

    def level(signal: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(signal.cpu().double(), (n_fft // 2, n_fft // 2))
        frames = padded.unfold(-1, n_fft, hop_length)  # (c, t, n_fft), a view: a few at a time become memory
        parts = [torch.fft.rfft(part * window).abs() @ mel.T for part in frames.split(512, dim=1)]
        decibels = 20 * torch.log10(torch.cat(parts, dim=1).clamp(min=1e-10))  # (c, t, bands)
        return decibels.clamp(min=float(decibels.max()) - 80)

    difference = level(estimate) - level(reference)
    above, below = difference[difference > 0], difference[difference < 0]
    return Bleed(
        bleedless=100 / (1 + (float(above.mean()) if len(above) else 0.0)),
        fullness=100 / (1 - (float(below.mean()) if len(below) else 0.0)),
    )


@lru_cache(maxsize=4)
def mel_filters(sample_rate: int, n_fft: int, bands: int) -> Tensor:
    """Triangles on Slaney's mel scale, each of area 1 over hertz: (bands, f) float64.

        mel(hz) = 3 · hz / 200                           below 1000 Hz
                  15 + 27 · ln(hz / 1000) / ln 6.4       from there on

    `bands + 2` points lie evenly on this scale from 0 Hz to half the sample rate; triangle i rises from point i to
    point i + 1 and falls to point i + 2.
    """
    step = math.log(6.4) / 27
    top = sample_rate / 2
    highest = 15 + math.log(top / 1000) / step if top > 1000 else 0.015 * top
    points = torch.linspace(0, highest, bands + 2, dtype=torch.float64)
    hertz = torch.where(points < 15, points / 0.015, 1000 * torch.exp(step * (points - 15)))
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
    return triangles * 2 / (high - low)


# --- silence ----------------------------------------------------------------------------------------------


def silent_regions(
    reference: Tensor, sample_rate: int = 44_100, *, floor: float = FLOOR, shortest: float = SHORTEST
) -> list[tuple[int, int]]:
    """Where the reference is silent: every sample of every channel below `floor`, for at least `shortest`.

    Args:
        reference: s, (c, samples).
        sample_rate: in hertz.
        floor: modulus that counts as sound, full scale 1.
        shortest: length of the shortest region, in seconds.

    Returns:
        (first sample, first sample after it) of each region, in order; they do not touch.
    """
    quiet = torch.nn.functional.pad((reference.abs() < floor).all(0).cpu().int(), (1, 1))
    edges = quiet.diff()
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [(a, b) for a, b in zip(starts, ends, strict=True) if b - a >= shortest * sample_rate]


@dataclass(frozen=True)
class Leak:
    """What `leak` returns.

    Attributes:
        relative: dB, relative to the mixture in the same places.
        absolute: dBFS, the mean square against 1.
        seconds: length of all silent regions together.
    """

    relative: float
    absolute: float
    seconds: float


def leak(
    reference: Tensor,
    estimate: Tensor,
    mixture: Tensor,
    sample_rate: int = 44_100,
    *,
    floor: float = FLOOR,
    shortest: float = SHORTEST,
) -> Leak:
    """What the estimate lets through where the reference is silent, R = `silent_regions`; cSDR cannot hear it.

        relative = 10 · log10(Σ_R (ŝ − s)² / Σ_R m²)      absolute = 10 · log10(mean_R (ŝ − s)²)

    The error is ŝ less what little the reference has there, so that a perfect estimate leaks nothing. The mixture
    handed back leaks 0 dB, where the reference is exactly zero. A sine of full scale has −3 dBFS.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.
        mixture: m, of the same shape.
        sample_rate: in hertz.
        floor: see `silent_regions`.
        shortest: see `silent_regions`, in seconds.

    Returns:
        −inf dB for an estimate that is exact there. Without a silent region both levels are NaN and the seconds 0.
        Where the mixture is silent too, the relative level is +inf, or NaN when nothing leaks.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    _, error = _energies(reference, estimate)
    loud, _ = _energies(mixture, reference)
    regions = silent_regions(reference, sample_rate, floor=floor, shortest=shortest)
    if not regions:
        return Leak(math.nan, math.nan, 0.0)
    leaked = torch.cat([error[:, start:end] for start, end in regions], dim=-1)
    there = torch.cat([loud[:, start:end] for start, end in regions], dim=-1)
    return Leak(
        relative=float(10 * torch.log10(leaked.sum() / there.sum())),
        absolute=float(10 * torch.log10(leaked.mean())),
        seconds=leaked.shape[-1] / sample_rate,
    )


@dataclass(frozen=True)
class Onset:
    """One return of the voice after silence.

    Attributes:
        time: in seconds from the start of the song.
        delay: how much later the estimate has it, in milliseconds; +inf when it does not come.
        error: dB, energy of the error relative to the voice; 0 for a silent estimate, lower is better.
    """

    time: float
    delay: float
    error: float


def onsets(
    reference: Tensor,
    estimate: Tensor,
    sample_rate: int = 44_100,
    *,
    floor: float = FLOOR,
    shortest: float = SHORTEST,
    window: float = 0.2,
) -> list[Onset]:
    """How late and how wrong the estimate is where the voice comes back: at n₀, the end of a silent region.

        t(x) = least n ≥ 0 with |x(n₀ + n)| ≥ ¼ · max |s(n₀ … n₀ + w)|      delay = t(ŝ) − t(s)
        error = 10 · log10(Σ (s − ŝ)² / Σ s²)   over n₀ … n₀ + w

    |x(n)| is the largest of the channels; w is the window, and the estimate is waited for that long after t(s). An
    estimate that is the voice d late has a delay of d; one that fades in slowly, or 12 dB too low, has a longer
    one. The delay does not ask whether what comes is the voice: the error does. A song that begins with the
    voice has no onset there.

    Args:
        reference: s, (c, samples).
        estimate: ŝ, of the same shape.
        sample_rate: in hertz.
        floor: see `silent_regions`.
        shortest: see `silent_regions`, in seconds.
        window: w, in seconds.

    Returns:
        The onsets in order; none for a silent reference and for one that is never silent.

    Raises:
        ValueError: when the shapes differ or hold no samples.
    """
    signal, error = _energies(reference, estimate)
    voice, found = reference.abs().amax(0).double().cpu(), estimate.abs().amax(0).double().cpu()
    samples, width = len(voice), max(1, round(window * sample_rate))
    result = []
    for _, start in silent_regions(reference, sample_rate, floor=floor, shortest=shortest):
        if start == samples:
            continue
        end = min(start + width, samples)
        threshold = float(voice[start:end].max()) / 4
        here = int((voice[start:end] >= threshold).nonzero()[0, 0])
        there = (found[start : start + here + width] >= threshold).nonzero()
        result.append(
            Onset(
                time=start / sample_rate,
                delay=1000 * (int(there[0, 0]) - here) / sample_rate if len(there) else math.inf,
                error=float(10 * torch.log10(error[:, start:end].sum() / signal[:, start:end].sum())),
            )
        )
    return result


# --- sums -------------------------------------------------------------------------------------------------


def _by_second(values: Tensor, sample_rate: int) -> Tensor:
    """(c, samples) → (c, seconds, samples of a second), the tail dropped."""
    seconds = values.shape[-1] // sample_rate
    return values[:, : seconds * sample_rate].unflatten(-1, (seconds, sample_rate))


def _median(values: Tensor) -> float:
    """The mean of the two middle values, infinite ones allowed."""
    ordered = values.sort().values
    middle = ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1]
    return float(middle.mean())


def _energies(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of the reference and of the error, (c, samples) each, in float64."""
    _check(reference, estimate)
    reference, estimate = reference.double(), estimate.double()
    return reference.square(), (reference - estimate).square()


def _check(reference: Tensor, estimate: Tensor) -> None:
    if reference.shape != estimate.shape or reference.dim() != 2 or not reference.numel():
        raise ValueError(
            f"reference {tuple(reference.shape)} and estimate {tuple(estimate.shape)} must both be (c, samples), "
            f"not empty"
        )
