"""Signal processing of the synthesiser: smoothing, filters, convolution, panning."""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from .song import Array

BLOCK = 4_096
"""Samples per block of the fast convolution."""


def smooth(values: Array, width: float) -> Array:
    """Moving average along axis 0 with a Hann kernel of about `width` values."""
    taps = max(1, round(width))
    kernel = np.hanning(taps + 2)[1:-1]
    kernel /= kernel.sum()
    columns = values.reshape(len(values), -1).astype(np.float32)
    padded = np.pad(columns, ((taps // 2, taps - 1 - taps // 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps, axis=0)
    return (windows @ kernel).reshape(values.shape).astype(np.float32)


def smooth_noise(rng: Generator, count: int, width: float) -> Array:
    """Low-pass noise of unit variance, (count,), that changes over about `width` values."""
    noise = smooth(rng.standard_normal(count), width)
    return noise / (noise.std() + np.float32(1e-6))


def pan(position: float) -> Array:
    """Constant-power stereo gains (c, 1) for a position from -1 (left) to 1 (right)."""
    angle = (position + 1) * math.pi / 4
    return np.array([[math.cos(angle)], [math.sin(angle)]], np.float32) * np.float32(math.sqrt(2))


def fast_length(samples: int) -> int:
    """Smallest length of at least `samples` for which the FFT is fast."""
    return min(m << max(0, math.ceil(math.log2(samples / m))) for m in (1, 3, 5, 9, 15))


def filter_spectrum(signal: Array, gain: Callable[[Array], Array], rate: int) -> Array:
    """Zero-phase filter of (..., t): multiply the spectrum by `gain`, a function of frequency in Hz (at least 1)."""
    samples = signal.shape[-1]
    length = fast_length(samples)
    response = gain(np.maximum(np.fft.rfftfreq(length, 1 / rate), 1.0)).astype(np.float32)
    return np.fft.irfft(np.fft.rfft(signal, length) * response, length)[..., :samples].astype(np.float32)


def bandpass(signal: Array, low: float, high: float, rate: int) -> Array:
    """Band-pass filter of (..., t) from `low` to `high` Hz, 12 dB per octave outside."""
    return filter_spectrum(signal, lambda f: 1 / np.sqrt((1 + (low / f) ** 4) * (1 + (f / high) ** 4)), rate)


def convolve(signal: Array, kernel: Array, middle: int = 0) -> Array:
    """Block convolution of (c, t) with (c, taps), cut to (c, t); tap `middle` of the kernel is at time 0."""
    signal = np.pad(signal, ((0, 0), (0, middle)))
    channels, samples = signal.shape
    blocks, parts = -(-samples // BLOCK), -(-kernel.shape[1] // BLOCK)
    padded = np.zeros((channels, (blocks + 1) * BLOCK), np.float32)
    padded[:, BLOCK : BLOCK + samples] = signal
    pairs = np.lib.stride_tricks.sliding_window_view(padded, 2 * BLOCK, axis=1)[:, ::BLOCK]  # overlap-save
    spectra = np.fft.rfft(pairs)
    taps = np.zeros((kernel.shape[0], parts * BLOCK), np.float32)
    taps[:, : kernel.shape[1]] = kernel
    responses = np.fft.rfft(taps.reshape(-1, parts, BLOCK), 2 * BLOCK)
    total = spectra * responses[:, :1]
    for p in range(1, min(parts, blocks)):
        total[:, p:] += spectra[:, : blocks - p] * responses[:, p : p + 1]
    out = np.fft.irfft(total, 2 * BLOCK)[..., BLOCK:].reshape(channels, -1)
    return out[:, middle:samples].astype(np.float32)


def random_eq(rng: Generator, rate: int, spread: float = 1.8) -> Array:
    """Random equaliser: an impulse response (taps=BLOCK,) with time 0 in the middle; it also removes rumble and offset.

    `spread` is the standard deviation in dB of each point of its frequency response.
    """
    points = np.array([-7.0, -5.0, -4.3, -3, -2, -1, 0, 1, 2, 3, 4, 4.6])  # octaves relative to 1 kHz
    decibels = rng.normal(0, spread, len(points)) + rng.normal(0, 0.8) * points
    decibels[:2] = (-60, -9)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(BLOCK, 1 / rate), 1) / 1_000)
    response = 10 ** (np.interp(octaves, points, decibels) / 20)
    response[0] = 0
    taps = np.roll(np.fft.irfft(response), BLOCK // 2) * np.hanning(BLOCK + 1)[:-1]
    return (taps - taps.mean()).astype(np.float32)
