"""Source-filter singing voice: a glottal pulse train and noise, shaped by five moving formants in the STFT domain."""

import math

import numpy as np
from numpy.random import Generator

from .articulation import NOISES, Controls, Singer, articulate
from .filters import pan, smooth, smooth_noise
from .score import Score, to_hertz
from .song import Array, Intervals

DOUBLES_PROB, HARMONY_PROB = 0.12, 0.12
HARMONIES = (3.5, 7.0, 12.0, -12.0)
"""Intervals of a second voice in semitones: a third, a fifth, and octaves; the first two follow the scale."""


def sing(rng: Generator, score: Score, phrases: Intervals, rate: int, samples: int) -> Array:
    """Synthesise the vocals, (c, t), before gate and levels: a lead, and sometimes doubles or a harmony."""
    if not phrases:
        return np.zeros((2, samples), np.float32)
    singer = Singer(rng)
    hop_length = 2 ** max(4, round(math.log2(0.0058 * rate)))
    size, frames, frame = 4 * hop_length, samples // hop_length + 1, hop_length / rate
    track = articulate(rng, singer, score, phrases, frame, frames)
    active = np.flatnonzero(smooth(track.voicing + track.breath + track.noise.sum(1), 4) > 1e-5)
    frequencies = np.fft.rfftfreq(size, 1 / rate).astype(np.float32)
    envelope = _formant_envelope(track, singer, frequencies, active)
    highpass = 1 / (1 + (60.0 / np.maximum(frequencies, 1.0)) ** 3)
    noise = _stft(rng.standard_normal(samples, dtype=np.float32), size, hop_length, active)
    aspiration = (envelope * (0.3 + np.minimum(frequencies / 4_000, 1.5)) + 0.05) * track.breath[active, None]
    noise *= (aspiration + track.noise[active] @ _noise_bands(frequencies)) * highpass

    takes = [(0.0, 1.0, 0.0)]  # interval in semitones, level, position
    extra = rng.random()
    if extra < DOUBLES_PROB:
        level = rng.uniform(0.15, 0.4)
        takes += [(0.0, level, -rng.uniform(0.4, 1)), (0.0, level, rng.uniform(0.4, 1))][: rng.integers(1, 3)]
    elif extra < DOUBLES_PROB + HARMONY_PROB:
        takes += [(float(rng.choice(HARMONIES)), rng.uniform(0.15, 0.4), rng.uniform(-0.6, 0.6))]
    out = np.zeros((2, samples), np.float32)
    for number, (interval, level, position) in enumerate(takes):
        cycles = singer.vibrato_rate * rng.uniform(0.95, 1.05) * frame * np.arange(frames) + rng.random()
        vibrato = track.vibrato * np.sin(2 * np.pi * cycles) * singer.vibrato_cents / 100
        pitch = track.pitch + vibrato + interval
        if interval and abs(interval) < 12:
            pitch = _snap_to_scale(pitch, score)
        if number:
            pitch = pitch + smooth_noise(rng, frames, 0.2 / frame) * np.float32(rng.uniform(0.05, 0.2))
        hertz = to_hertz(pitch).astype(np.float32)  # one value per hop; then interpolated linearly, (samples,)
        slopes = np.diff(hertz, append=hertz[-1:])[:, None] * (np.arange(hop_length, dtype=np.float32) / hop_length)
        hertz = (hertz[:, None] + slopes).reshape(-1)[:samples]
        spectra = _stft(_pulse_train(hertz, rate), size, hop_length, active)
        spectra *= envelope * (track.voicing[active, None] * highpass * np.float32(0.12))
        take = _istft(spectra if number else spectra + noise, size, hop_length, active, samples)
        if number:
            take = np.roll(take, round(rng.uniform(0.005, 0.03) * rate))
        out += pan(position) * (level * take)
    return out


def _formant_envelope(track: Controls, singer: Singer, frequencies: Array, active: Array) -> Array:
    """Magnitude response of the vocal tract in the active frames, (k, f): five resonances in parallel."""
    formants = track.formants[active].copy()
    formants[:, 0] = np.maximum(formants[:, 0], 0.95 * to_hertz(track.pitch[active]))  # the mouth opens on high notes
    formants[:, 1] = np.maximum(formants[:, 1], 1.25 * formants[:, 0])
    effort = np.clip(track.voicing[active], 0.2, 1.2)
    gains = (formants / 500) ** -(singer.tilt + 0.5 * (1 - effort))[:, None]
    gains[:, 2:4] *= 10 ** (singer.ring / 20)
    power = np.zeros((len(active), len(frequencies)), np.float32)
    power += (0.02 / (1 + (frequencies / 3_000) ** 2)) ** 2
    for i, bandwidth in enumerate(singer.bandwidths):
        distance = frequencies - formants[:, i : i + 1]
        distance *= 2 / bandwidth
        distance *= distance
        distance += 1
        np.divide(gains[:, i : i + 1] ** 2, distance, out=distance)
        power += distance
    power /= np.sqrt(power.mean(axis=1, keepdims=True))  # compression by 2:1
    return np.sqrt(power, out=power)


def _noise_bands(frequencies: Array) -> Array:
    """Magnitude spectra of the consonant noises, (noise, f)."""
    spectra = []
    for low, high in NOISES:
        rise = 1 / (1 + (low / np.maximum(frequencies, 1)) ** 6)
        spectra.append(np.sqrt(rise / (1 + (frequencies / high) ** 6)) * math.sqrt(6_000 / (high - low)))
    return np.array(spectra, np.float32)


def _snap_to_scale(pitch: Array, score: Score) -> Array:
    """Shift a pitch curve by whole semitones so that its notes are in the scale."""
    allowed = np.array([score.degree(i) for i in range(-7, 84)])
    wanted = smooth(pitch, 9)
    nearest = allowed[np.abs(wanted[:, None] - allowed).argmin(1)]
    return pitch + smooth(nearest - np.round(wanted), 9)


def _pulse_train(hertz: Array, rate: int) -> Array:
    """Band-limited pulse train, (t,), with harmonics up to 0.45 of the sample rate; one wavetable per half octave."""
    size = 8_192
    levels = np.clip(np.ceil(2 * np.log2(hertz / 60.0)), 0, 12).astype(np.int32)
    tables = np.zeros((levels.max() + 1, size), np.float32)
    for level in range(levels.min(), levels.max() + 1):
        top = 60.0 * 2 ** (level / 2)
        harmonics = np.arange(1, min(max(1, int(0.45 * rate / top)), size // 2 - 1) + 1)
        spectrum = np.zeros(size // 2 + 1, np.complex64)
        spectrum[1 : len(harmonics) + 1] = np.exp(0.25j * np.sqrt(harmonics)) * np.sqrt(top / 220.0)
        tables[level] = np.fft.irfft(spectrum, size).astype(np.float32) * size
    phase = np.cumsum(hertz, dtype=np.float64) / rate
    index = (phase * size).astype(np.int64) & (size - 1)
    return tables.reshape(-1)[index + levels.astype(np.int64) * size]


def _stft(signal: Array, size: int, hop_length: int, active: Array) -> Array:
    """STFT of the active frames with a square-root Hann window, (k, f)."""
    window = np.sqrt(np.hanning(size + 1)[:-1]).astype(np.float32)
    padded = np.pad(signal, (size // 2, size))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop_length][active]
    return np.fft.rfft(windows * window)


def _istft(spectra: Array, size: int, hop_length: int, active: Array, samples: int) -> Array:
    """Inverse of `_stft`, (samples,): overlap-add with the same window; inactive frames are zero."""
    window = (np.sqrt(np.hanning(size + 1)[:-1]) / 2).astype(np.float32)
    hops = size // hop_length
    pieces = (np.fft.irfft(spectra, size).astype(np.float32) * window).reshape(len(active), hops, hop_length)
    out = np.zeros((samples // hop_length + 2 * hops, hop_length), np.float32)
    for j in range(hops):
        out[active + j] += pieces[:, j]
    return out.reshape(-1)[size // 2 : size // 2 + samples]
