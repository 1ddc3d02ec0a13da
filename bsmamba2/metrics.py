"""Metrics for separated vocals, both where the voice sounds and where it is silent.

| function | unit | best | measures |
|---|---|---|---|
| `csdr`, `usdr`, `si_sdr` | dB | +inf | signal-to-distortion ratio: energy of the voice relative to the error |
| `bleed` | 0 to 100 | 100 | excess level (bleedless) and missing level (fullness), on mel bands |
| `silence_leakage` | dB, dBFS | −inf | how much accompaniment is left where the voice is silent |
| `onsets` | ms, dB | 0, −inf | delay and error of the voice as it returns after silence |

Signals are (c, samples): s is the reference of one song, ŝ its estimate, m the mixture; full scale is 1. Sums run over
all samples and channels, in float64. Every metric raises `ValueError` if the shapes differ or there are no samples.

Book: "Measuring". Sources: `usdr` as in the Music Demixing Challenge 2021 (arXiv:2108.13559); `csdr` follows the SDR of
BSS Eval v4 (Stöter, Liutkus and Ito, arXiv:1804.06267); `si_sdr` from Le Roux, Wisdom, Erdogan and Hershey
(arXiv:1811.02508); `bleed` as in the training toolbox ZFTurbo/Music-Source-Separation-Training; `silence_leakage` and
`onsets` are this project's own. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SILENCE_THRESHOLD = 1e-3
"""A sample with a modulus below this (−60 dBFS) is silent; training windows are chosen with the same threshold."""
MIN_SILENCE_S = 0.25
"""Shortest silence, in seconds, that counts as a silent region."""
MEL_N_FFT, MEL_HOP, N_MELS = 4096, 1024, 512
"""Window and hop of `bleed` in samples, and its number of mel bands from 0 Hz to half the sample rate."""

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Pairs (reference, estimate), each signal (c, samples)."""


def usdr(reference: Tensor, estimate: Tensor) -> float:
    """Utterance-level SDR (uSDR) in dB: energy of the reference relative to that of the error, over the song.

        uSDR = 10 · log10((Σ s² + 1e-7) / (Σ (s − ŝ)² + 1e-7))

    A silent estimate scores 0 dB. If the reference is silent, 0 dB is the best possible score. The published model's
    evaluation also uses 1e-7. `sdr` of the training toolbox uses 1e-8, which changes a score only if one of the sums
    is about 1e-7 or less, that is, if the reference or the error is nearly silent.
    """
    signal, error = _energies(reference, estimate)
    return float(10 * torch.log10((signal.sum() + 1e-7) / (error.sum() + 1e-7)))


def csdr(reference: Tensor, estimate: Tensor, sample_rate: int = 44_100, *, other_sources: Pairs = ()) -> float:
    """Chunk-level SDR (cSDR) in dB: the median of `csdr_seconds`, without the dropped seconds.

    NaN if no second is left, for example for a silent reference or a silent estimate (museval raises an error then).
    """
    ratios = csdr_seconds(reference, estimate, sample_rate, other_sources=other_sources).tolist()
    return statistics.median([ratio for ratio in ratios if not math.isnan(ratio)] or [math.nan])


def csdr_seconds(
    reference: Tensor, estimate: Tensor, sample_rate: int = 44_100, *, other_sources: Pairs = ()
) -> Tensor:
    """SDR of every whole second, as in BSS Eval v4; a tail shorter than a second is dropped.

        SDR_i = 10 · log10(Σ s² / Σ (s − ŝ)²)   over second i

    A second is dropped (NaN) if the channels of the reference, or those of the estimate, sum to zero in every sample,
    so silent seconds do not affect the score. A perfect estimate of a second scores +inf. As in museval, a signal
    shorter than a second is one frame, and the ratios have no epsilon. `other_sources` are pairs (s, ŝ) of sources
    evaluated together with this one. They do not enter the ratios, but a second is dropped for all sources if any of
    them is silent. Returns decibels, (seconds,), float64.
    """
    pairs = ((reference, estimate), *other_sources)
    for pair in pairs:
        _check(*pair)
        if pair[0].shape != reference.shape:
            raise ValueError(f"other_sources: {tuple(pair[0].shape)} must have the shape {tuple(reference.shape)}")
    samples = reference.shape[-1]
    frame = min(sample_rate, samples)
    ratios = []
    for start in range(0, samples - frame + 1, frame):
        seconds = [signal[:, start : start + frame].double() for pair in pairs for signal in pair]
        s, s_hat = seconds[:2]
        ratio = 10 * torch.log10(s.square().sum() / (s - s_hat).square().sum())
        silent = not all(second.sum(0).any() for second in seconds)
        ratios.append(math.nan if silent else float(ratio))
    return torch.tensor(ratios, dtype=torch.float64)


def si_sdr(reference: Tensor, estimate: Tensor) -> float:
    """Scale-invariant SDR (SI-SDR) in dB: the reference is scaled to best fit the estimate, so levels do not matter.

        SI-SDR = 10 · log10(Σ (α s)² / Σ (α s − ŝ)²)      α = Σ ŝ s / Σ s²

    All channels share one α, and the mean is not subtracted. The score is +inf for a scaled copy of s and −inf for an
    estimate orthogonal to s (or, because of rounding, beyond ±250 dB). It is NaN if the reference or the estimate is
    silent, because no scale is best. Differs from the training toolbox, which adds 1e-8 to every sample's product in
    both sums of α, to the energy of the error and to the ratio. The toolbox therefore returns about −80 dB for a silent
    reference and at most 10 · log10(Σ s² · 1e8) for an exact estimate, and its α is biased below about −60 dBFS.
    """
    _check(reference, estimate)
    s, s_hat = reference.double().flatten(), estimate.double().flatten()
    scaled = (s_hat @ s) / (s @ s) * s
    error = scaled - s_hat
    return float(10 * torch.log10((scaled @ scaled) / (error @ error))) if s_hat.any() else math.nan


@dataclass(frozen=True)
class Bleed:
    """Bleedless and fullness, each from 0 to 100; 100 is best."""

    bleedless: float
    fullness: float


def bleed(reference: Tensor, estimate: Tensor, sample_rate: int = 44_100) -> Bleed:
    """Bleedless and fullness: how little the estimate adds and how little it lacks, on mel bands in dB.

        L(x) = max(20 · log10 max(|STFT x| · mel, 1e-10), max − 80)      d = L(ŝ) − L(s)
        bleedless = 100 / (1 + mean of the d above 0)      fullness = 100 / (1 + |mean of the d below 0|)

    For each signal, max is its maximum over all channels, frames and mel bands. Each mean runs over the same axes and
    is 0 if no d has its sign. The window is a periodic Hann window; frames are centred and edges zero-padded. Both
    scores are 100 for a perfect estimate. Silence has a level of −200 dB, so two silent signals score 100 and 100, and
    a silent estimate of a voice has a fullness below 1 and a bleedless of 100. A channel that is silent in both signals
    has the floor, max − 80, as its level. If the two floors differ, the difference counts as too loud or too quiet, as
    in the training toolbox.
    Differs from the published model: its evaluation uses n_fft 2048 and hop 441 and swaps estimate and reference, so
    its two scores are exchanged.
    """
    _check(reference, estimate)
    mel = mel_filters(sample_rate, MEL_N_FFT, N_MELS)
    window = torch.hann_window(MEL_N_FFT, dtype=torch.float64)

    def level(signal: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(signal.cpu().double(), (MEL_N_FFT // 2, MEL_N_FFT // 2))
        frames = padded.unfold(-1, MEL_N_FFT, MEL_HOP).split(512, dim=1)  # (c, t, n_fft), a view, not a whole copy
        magnitudes = torch.cat([torch.fft.rfft(part * window).abs() @ mel.T for part in frames], dim=1)
        decibels = 20 * torch.log10(magnitudes.clamp(min=1e-10))  # (c, t, mel band)
        return decibels.clamp(min=float(decibels.max()) - 80)

    difference = level(estimate) - level(reference)
    sides = difference[difference > 0], difference[difference < 0]
    above, below = (float(side.mean()) if len(side) else 0.0 for side in sides)
    return Bleed(bleedless=100 / (1 + above), fullness=100 / (1 - below))


@lru_cache(maxsize=4)
def mel_filters(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Mel filter bank: triangles on Slaney's scale, each with area 1 in hertz, (n_mels, f) float64.

        mel(hz) = 3 · hz / 200                           below 1000 Hz
                  15 + 27 · ln(hz / 1000) / ln 6.4       from there on

    `n_mels + 2` points are evenly spaced on this scale from 0 Hz to half the sample rate. Triangle i rises from point i
    to point i + 1 and falls to point i + 2.
    """
    step = math.log(6.4) / 27
    top = sample_rate / 2
    highest = 15 + math.log(top / 1000) / step if top > 1000 else 0.015 * top
    points = torch.linspace(0, highest, n_mels + 2, dtype=torch.float64)
    hertz = torch.where(points < 15, points / 0.015, 1000 * torch.exp(step * (points - 15)))
    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * sample_rate / n_fft
    low, middle, high = hertz[:-2, None], hertz[1:-1, None], hertz[2:, None]
    triangles = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
    return triangles * 2 / (high - low)


def silent_regions(
    reference: Tensor, sample_rate: int = 44_100, *,
    threshold: float = SILENCE_THRESHOLD, min_silence: float = MIN_SILENCE_S,
) -> list[tuple[int, int]]:  # fmt: skip
    """Silent regions of a signal (c, samples): all channels stay below the threshold for `min_silence` seconds or more.

    The threshold is a modulus, with full scale 1. Returns (start, end) of each region in samples, in order; the sample
    at `end` is the first one after the region.
    """
    quiet = torch.nn.functional.pad((reference.abs() < threshold).all(0).cpu().int(), (1, 1))
    edges = quiet.diff()
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [(a, b) for a, b in zip(starts, ends, strict=True) if b - a >= min_silence * sample_rate]


@dataclass(frozen=True)
class SilenceLeakage:
    """Level of the error in the silent regions of the reference."""

    relative: float  # dB, relative to the mixture in the same regions
    absolute: float  # dBFS, mean square relative to 1
    seconds: float  # total length of all silent regions


def silence_leakage(reference: Tensor, estimate: Tensor, mixture: Tensor, sample_rate: int = 44_100) -> SilenceLeakage:
    """Leakage into the silent regions R of the reference (`silent_regions`); cSDR drops silent seconds.

        relative = 10 · log10(Σ_R (ŝ − s)² / Σ_R m²)      absolute = 10 · log10(mean_R (ŝ − s)²)

    The error is ŝ minus the reference, which is nearly silent in R, so a perfect estimate leaks nothing (−inf dB). If
    the reference is exactly zero in R, the unprocessed mixture leaks 0 dB. A full-scale sine has −3 dBFS. Without a
    silent region, both levels are NaN and the seconds are 0. If the mixture is silent in R as well, the relative level
    is +inf, or NaN if nothing leaks.
    """
    _, error = _energies(reference, estimate)
    mixed, _ = _energies(mixture, reference)
    regions = silent_regions(reference, sample_rate)
    if not regions:
        return SilenceLeakage(math.nan, math.nan, 0.0)
    error, mixed = (torch.cat([part[:, start:end] for start, end in regions], dim=-1) for part in (error, mixed))
    return SilenceLeakage(
        relative=float(10 * torch.log10(error.sum() / mixed.sum())),
        absolute=float(10 * torch.log10(error.mean())),
        seconds=error.shape[-1] / sample_rate,
    )


@dataclass(frozen=True)
class Onset:
    """One onset of the voice after silence."""

    time: float  # in seconds from the start of the song
    delay: float  # how late the onset is in the estimate, in milliseconds; +inf if it is missing
    error: float  # dB, energy of the error relative to the voice; lower is better, 0 for a silent estimate


def onsets(reference: Tensor, estimate: Tensor, sample_rate: int = 44_100, *, window: float = 0.2) -> list[Onset]:
    """Onset delay and error: how late and how wrong the estimate is at n₀, the end of a silent region.

        t(x) = least n ≥ 0 with |x(n₀ + n)| ≥ ¼ · max |s(n₀ … n₀ + w)|      delay = t(ŝ) − t(s)
        error = 10 · log10(Σ (s − ŝ)² / Σ s²)   over n₀ … n₀ + w

    |x(n)| is the maximum over the channels; w is the window in seconds, and the search ends w after t(s). If the
    estimate is the voice delayed by d, the delay is d; if the estimate fades in slowly, or is 12 dB too low, the delay
    is longer. The delay does not show whether the sound is the voice, but the error does. A song that begins with the
    voice has no onset there. A reference that is silent throughout, or never silent, has no onsets.
    """
    signal, error = _energies(reference, estimate)
    voice, estimated = (x.abs().amax(0).double().cpu() for x in (reference, estimate))
    width = max(1, round(window * sample_rate))
    result = []
    for _, start in silent_regions(reference, sample_rate):
        if start == len(voice):
            continue
        end = start + width
        level = float(voice[start:end].max()) / 4
        due = int((voice[start:end] >= level).nonzero()[0, 0])
        loud = (estimated[start : end + due] >= level).nonzero()
        delay = 1000 * (int(loud[0, 0]) - due) / sample_rate if len(loud) else math.inf
        ratio = error[:, start:end].sum() / signal[:, start:end].sum()
        result.append(Onset(time=start / sample_rate, delay=delay, error=float(10 * torch.log10(ratio))))
    return result


def _energies(reference: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """Squared reference and squared error, (c, samples) each, in float64."""
    _check(reference, estimate)
    reference, estimate = reference.double(), estimate.double()
    return reference.square(), (reference - estimate).square()


def _check(reference: Tensor, estimate: Tensor) -> None:
    if reference.shape != estimate.shape or reference.dim() != 2 or not reference.numel():
        raise ValueError(
            f"reference {tuple(reference.shape)} and estimate {tuple(estimate.shape)} "
            "must both be (c, samples), not empty"
        )
