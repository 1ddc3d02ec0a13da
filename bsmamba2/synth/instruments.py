"""Wavetable instruments: each note fades from a bright table to a dark one."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from .filters import pan
from .score import Note, to_hertz
from .song import Array


@dataclass(frozen=True)
class Instrument:
    """Timbre, amplitude envelope, and pitch behaviour of an instrument; times in seconds."""

    kind: str = "harmonic"  # or "organ", "fm", "bell", "power"
    slope: float = 1.0  # amplitude of harmonic k is k ** -slope
    even: float = 1.0  # level of the even harmonics
    pluck: float = 0.0  # position where a string is plucked, as a fraction of its length; 0: not plucked
    bright: float = 8_000.0  # cutoff in Hz when a note begins
    dark: float = 1_500.0  # cutoff in Hz afterwards
    fade: float = 0.3  # time constant from bright to dark; 0 for a steady tone
    attack: float = 0.004
    decay: float = 0.5
    sustain: float = 0.0
    release: float = 0.08
    vibrato_cents: float = 0.0
    glide: float = 0.0  # time constant of the slide from the previous note
    detune_cents: float = 0.0  # between two copies, left and right
    breath: float = 0.0  # level of noise
    body: tuple[tuple[float, float], ...] = ()  # resonances: Hz, gain in dB
    drawbars: tuple[float, ...] = ()
    drive: float = 2.0  # modulation index of "fm" and "bell", gain before the clipper of "power"
    ratio: int = 1  # frequency ratio of the modulator of "fm" and "bell"


# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "plucked": {"slope": (0.7, 1.2), "pluck": (0.1, 0.45), "bright": (4000, 12000), "dark": (700, 2500),
        "fade": (0.1, 0.5), "attack": 0.003, "decay": (0.3, 1.2), "release": (0.05, 0.2), "body": 4},
    "piano": {"slope": (0.9, 1.4), "pluck": 0.12, "bright": (3000, 8000), "dark": (800, 2000), "fade": (0.2, 0.6),
        "attack": 0.003, "decay": (0.6, 2), "release": (0.08, 0.2), "detune_cents": (0, 3), "body": 4},
    "epiano": {"kind": "fm", "drive": (0.8, 3), "ratio": [1, 1, 2, 7, 14], "bright": 12000, "dark": 6000,
        "fade": (0.15, 0.7), "decay": (0.5, 2), "sustain": (0, 0.3), "release": 0.1},
    "bell": {"kind": "bell", "drive": (0.5, 2), "ratio": [3, 4, 5, 7], "bright": 14000, "decay": (0.4, 1.5),
        "release": 0.4},
    "organ": {"kind": "organ", "bright": 9000, "fade": 0.0, "attack": 0.008, "sustain": 1.0, "release": 0.03,
        "vibrato_cents": (0, 12), "detune_cents": (0, 4)},
    "pad": {"slope": (0.9, 1.8), "even": [0.1, 1.0], "bright": (800, 5000), "fade": 0.0, "attack": (0.05, 0.4),
        "sustain": 1.0, "release": (0.15, 0.5), "detune_cents": (3, 14), "body": 4},
    "saw": {"even": [0.02, 1.0, 1.0], "bright": (3000, 14000), "dark": (600, 5000), "fade": (0.08, 0.6),
        "attack": (0.003, 0.03), "decay": (0.3, 1), "sustain": (0.3, 0.9), "detune_cents": (0, 15),
        "vibrato_cents": (0, 25)},
    "guitar": {"kind": "power", "drive": (2, 10), "bright": (3500, 6000), "dark": (3000, 5000), "fade": (0.3, 1),
        "decay": (1, 3), "sustain": (0.5, 0.9), "release": 0.06, "detune_cents": (3, 8), "body": 3},
    "solo guitar": {"slope": (0.4, 0.9), "even": 0.8, "pluck": (0.1, 0.3), "bright": (3000, 5500), "dark": (2500, 4000),
        "fade": 0.6, "attack": 0.006, "decay": (1, 3), "sustain": (0.5, 0.9), "release": 0.06,
        "vibrato_cents": (10, 50), "glide": [0.0, 0.06], "body": 4},
    "brass": {"slope": (0.6, 1.1), "bright": (1500, 3000), "dark": (3000, 7000), "fade": (0.04, 0.12),
        "attack": (0.02, 0.06), "decay": 0.4, "sustain": (0.6, 0.9), "release": 0.07, "vibrato_cents": (0, 30),
        "body": 4},
    "strings": {"slope": (0.8, 1.1), "bright": (3000, 8000), "fade": 0.0, "attack": (0.04, 0.2), "sustain": 1.0,
        "release": (0.1, 0.3), "vibrato_cents": (10, 40), "glide": [0.0, 0.08], "detune_cents": (2, 8), "breath": 0.002,
        "body": 4},
    "flute": {"slope": (1.5, 2.6), "even": (0.3, 1), "bright": 6000, "fade": 0.0, "attack": (0.03, 0.08),
        "sustain": 1.0, "vibrato_cents": (10, 40), "breath": (0.003, 0.015)},
    "sub": {"slope": (1.3, 3), "even": (0.1, 1), "bright": (300, 2000), "dark": (150, 600), "fade": (0.1, 0.5),
        "attack": 0.006, "decay": (0.5, 2), "sustain": (0.4, 0.9), "release": 0.05},
    "fingered": {"slope": (0.6, 1.1), "pluck": (0.12, 0.35), "bright": (1500, 6000), "dark": (400, 1500),
        "fade": (0.08, 0.4), "decay": (0.6, 1.8), "sustain": (0, 0.2), "release": 0.05, "body": 3},
    "synth bass": {"slope": (0.8, 1), "even": [0.02, 1.0, 1.0], "bright": (1500, 9000), "dark": (250, 1800),
        "fade": (0.05, 0.35), "attack": 0.003, "decay": (0.3, 1), "sustain": (0.3, 0.9), "release": 0.04,
        "detune_cents": (0, 6)},
    "swept bass": {"slope": (0.7, 1), "even": [0.3, 1.0], "bright": (150, 600), "dark": (2000, 8000),
        "fade": (0.2, 1.2), "attack": 0.003, "decay": 1.0, "sustain": 0.9, "release": 0.04, "detune_cents": (0, 8),
        "body": 2},
}
# fmt: on
"""Families of instruments: a tuple is a range, a list holds choices, and `body` is a number of resonances."""


def draw_instrument(rng: Generator, family: str) -> Instrument:
    """Draw an instrument of one of the `FAMILIES`."""
    drawn: dict[str, Any] = {}
    for name, value in FAMILIES[family].items():
        if isinstance(value, tuple):
            value = float(rng.uniform(*value))
        elif isinstance(value, list):
            value = value[rng.integers(len(value))]
        elif name == "body":
            centres = np.exp(rng.uniform(math.log(100), math.log(4_500), value))
            value = tuple((float(hertz), float(rng.uniform(-4, 8))) for hertz in centres)
        drawn[name] = value
    if drawn.get("kind") == "organ":
        bars = rng.random(9) ** 1.5 * (rng.random(9) < 0.7)
        bars[1] = 1
        drawn["drawbars"] = tuple(bars.tolist())
    return Instrument(**drawn)


def _wavetable(instrument: Instrument, hertz: float, cutoff: float, drive: float, phases: Array, rate: int) -> Array:
    """One band-limited period of a note, with mean power 1/2; the length is a power of two."""
    size = 1 << max(9, min(14, math.ceil(math.log2(rate / hertz * 20))))
    highest = max(1, min(int(0.45 * rate / hertz), size // 2 - 1, len(phases)))
    k = np.arange(1, highest + 1)
    x = 2 * np.pi * np.arange(size) / size
    if instrument.kind == "power":  # power chord: root, fifth and octave (harmonics 2, 3, 4) through one clipper
        string = sum(np.sin(n * i * x + phases[n * i]) / i for n in (2, 3, 4) for i in range(1, 7))
        spectrum: Array = np.fft.rfft(np.tanh(drive * 0.5 * np.asarray(string)))[1 : highest + 1]
    elif instrument.kind in ("fm", "bell"):
        spectrum = np.fft.rfft(np.sin(x + drive * np.sin(instrument.ratio * x)))[1 : highest + 1]
    else:
        if instrument.kind == "organ":
            amplitude: Array = np.zeros(max(16, highest))
            amplitude[np.array([1, 2, 3, 4, 6, 8, 10, 12, 16]) - 1] = instrument.drawbars
        else:
            amplitude = k**-instrument.slope * np.where(k % 2, 1.0, instrument.even)
            if instrument.pluck:
                amplitude *= np.abs(np.sin(np.pi * k * instrument.pluck)) + 0.05
        spectrum = amplitude[:highest] * np.exp(1j * phases[:highest])
    f = k * hertz
    response: Array = 1 / np.sqrt(1 + (f / cutoff) ** 4)
    for centre, gain in instrument.body:
        response *= 10 ** (gain / 20 * np.exp(-((np.log2(f / centre) / 0.35) ** 2)))
    padded = np.zeros(size // 2 + 1, np.complex128)
    padded[1 : highest + 1] = spectrum * response
    wave = np.fft.irfft(padded, size)
    return (wave / (np.sqrt(2 * np.mean(wave**2)) + 1e-9)).astype(np.float32)


def play_notes(
    rng: Generator, notes: list[Note], instrument: Instrument, rate: int, samples: int, spread: float = 0.0
) -> Array:
    """Play notes on one instrument, (c, t); `spread` (0 to 1) scatters pitches over the stereo image."""
    out = np.zeros((2, samples), np.float32)
    if not notes:
        return out
    longest = min(samples, math.ceil((max(n.seconds for n in notes) + instrument.release) * rate) + 1)
    t = np.arange(longest, dtype=np.float32) / np.float32(rate)
    fade = np.exp(t * np.float32(-1 / instrument.fade)) if instrument.fade else None
    sustain = np.float32(instrument.sustain)
    level = np.float32(1 - instrument.sustain) * np.exp(t * np.float32(-1 / instrument.decay)) + sustain
    attack = max(2, round(instrument.attack * rate))
    rise = np.sin(np.linspace(0, np.pi / 2, attack, dtype=np.float32))[:longest]
    level[: len(rise)] *= rise
    clock = np.arange(longest, dtype=np.float64)  # samples, modulated by the vibrato
    if instrument.vibrato_cents > 3:
        depth = math.log(2) / 1200 * instrument.vibrato_cents * np.minimum(t / 0.3, 1) ** 2
        clock += np.cumsum(depth * np.sin(np.float32(2 * np.pi * rng.uniform(4.8, 6.4)) * t), dtype=np.float64)
    phases = (rng.uniform(0, 2 * np.pi, 600) * rng.choice([0.1, 1.0])).astype(np.float32)
    copies = [(-0.5, -0.8), (0.5, 0.8)] if instrument.detune_cents > 2 else [(0.0, 0.0)]
    previous: Note | None = None
    positions: dict[float, float] = {}
    tables: dict[float, tuple[Array, Array]] = {}
    for note in notes:
        start = round(note.start * rate)
        length = min(samples - start, longest, round((note.seconds + instrument.release) * rate))
        if start < 0 or length < attack + 2:
            continue
        position = positions.setdefault(note.pitch, rng.uniform(-spread, spread))
        hertz = to_hertz(note.pitch - (12 if instrument.kind == "power" else 0))
        if note.pitch not in tables:
            tables[note.pitch] = (
                _wavetable(instrument, hertz, instrument.bright, instrument.drive, phases, rate),
                _wavetable(instrument, hertz, instrument.dark, 0.4 * instrument.drive, phases, rate),
            )
        bright, dark = tables[note.pitch]
        size = len(bright)
        envelope = level[:length] * np.float32(note.velocity)
        release = min(length, max(2, round(instrument.release * rate)))
        envelope[length - release :] *= np.linspace(1, 0, release, dtype=np.float32) ** 2
        slide: Any = 0.0
        if instrument.glide and previous and note.start - previous.start - previous.seconds < 0.05:
            offset = 2 ** ((previous.pitch - note.pitch) / 12) - 1
            slide = hertz * size * offset * instrument.glide * (1 - np.exp(-t[:length] / np.float32(instrument.glide)))
        previous = note
        for cents, side in copies:
            step = hertz * 2 ** (cents * instrument.detune_cents / 1200) * size / rate
            index = (clock[:length] * step + slide + rng.uniform(0, size)).astype(np.int64) & (size - 1)
            tone = bright[index]
            if fade is not None:
                tone = (tone - dark[index]) * fade[:length] + dark[index]
            if instrument.kind == "bell" and 2.756 * hertz < 0.45 * rate:  # an inharmonic partial
                tone += 0.4 * np.sin(np.float32(2 * np.pi * hertz * 2.756) * t[:length])
            if instrument.breath:
                tone += np.float32(8 * instrument.breath) * np.diff(rng.standard_normal(length + 1, dtype=np.float32))
            out[:, start : start + length] += pan(min(1.0, max(-1.0, position + side))) * (tone * envelope)
    return out
