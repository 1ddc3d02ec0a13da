"""Accompaniment: a bass line, and two or three layers of chords, arpeggios and solos."""

import numpy as np
from numpy.random import Generator

from .filters import pan
from .instruments import draw_instrument, play_notes
from .score import Note, Score
from .song import Array
from .soundfont import Recorded

NO_BASS_PROB, BASS_AMP_PROB = 0.06, 0.4
LAYER_FAMILIES = {
    "pads": ["pad", "pad", "organ", "strings", "strings", "epiano", "guitar", "saw", "brass"],
    "comping": ["plucked", "plucked", "piano", "piano", "epiano", "guitar", "organ", "saw", "brass"],
    "arpeggio": ["plucked", "saw", "bell", "epiano", "piano"],
    "solo": ["flute", "strings", "brass", "saw", "solo guitar", "solo guitar", "bell"],
}


def play_bass(rng: Generator, score: Score, rate: int, samples: int, recorded: Recorded | None) -> Array:
    """Play a bass line on the roots of the chords, (c, t)."""
    if rng.random() < NO_BASS_PROB:
        return np.zeros((2, samples), np.float32)
    instrument = draw_instrument(rng, rng.choice(["sub", "fingered", "fingered", "synth bass", "swept bass"]))
    style = rng.choice(["eighths", "syncopated", "long", "octaves", "walking", "offbeat"])
    rhythm = {
        "eighths": list(range(0, 16, 2)), "octaves": list(range(0, 16, 2)), "walking": [0, 4, 8, 12],
        "long": [0, 8] if rng.random() < 0.5 else [0], "offbeat": [2, 6, 10, 14],
        "syncopated": sorted({0} | set(rng.choice(16, rng.integers(3, 7), replace=False).tolist())),
    }[style]  # fmt: skip
    floor = int(rng.integers(26, 32))
    notes = []
    onsets = [bar + s for bar in range(0, score.steps, 16) for s in rhythm]
    for i, step in enumerate(onsets):
        if step >= score.steps:
            break
        chord = score.chord(step)
        pitch = floor + (chord[0] - floor) % 12
        if style == "octaves" and i % 2:
            pitch += 12
        elif style == "walking" and step % 16:
            pitch = floor + (int(rng.choice(chord)) - floor) % 12
        elif rng.random() < 0.12:
            pitch += int(rng.choice([7, 12]))
        until = onsets[i + 1] if i + 1 < len(onsets) else step + 4
        length = (until - step) * score.step * (rng.uniform(0.5, 0.7) if style == "offbeat" else rng.uniform(0.8, 1.0))
        notes.append(Note(score.time(step), length, pitch, rng.uniform(0.75, 1.0)))
    line = recorded.play("bass", notes, samples) if recorded else None
    if line is None:
        line = play_notes(rng, notes, instrument, rate, samples)
    else:
        line /= np.sqrt(2 * np.mean(line**2))  # same level as the wavetables
    if rng.random() < BASS_AMP_PROB:
        drive = np.float32(rng.uniform(1, 4))
        line = np.tanh(drive * line) / drive
    return line


def play_accompaniment(rng: Generator, score: Score, rate: int, samples: int, recorded: Recorded | None) -> Array:
    """Play two or three layers, such as pads, comping chords, arpeggios and a solo, (c, t)."""
    choice = ["comping", "comping", "comping", "arpeggio", "arpeggio", "solo"]
    layers = ["pads", *rng.choice(choice, rng.integers(1, 3), replace=False).tolist()]
    if rng.random() < 0.25:
        layers[0] = "comping"
    out = np.zeros((2, samples), np.float32)
    for layer in layers:
        family = str(rng.choice(LAYER_FAMILIES[layer]))
        instrument = draw_instrument(rng, family)
        notes = {"pads": _pads, "comping": _comping, "arpeggio": _arpeggio, "solo": _solo}[layer](rng, score)
        if family == "guitar":  # power chords: the instrument adds fifth and octave to one note
            lowest: dict[float, Note] = {}
            for note in notes:
                lowest.setdefault(note.start, note)
            notes = [Note(n.start, n.seconds, 40 + (n.pitch - 40) % 12, n.velocity) for n in lowest.values()]
        spread = rng.uniform(0, 0.8) if layer != "solo" else 0.0
        sound = recorded.play(family, notes, samples) if recorded else None
        if sound is None:
            sound = play_notes(rng, notes, instrument, rate, samples, spread=spread)
        gain = 10 ** (rng.normal(-1 if layer == "solo" else 0, 2.5) / 20) / (np.sqrt(np.mean(sound**2)) + 1e-9)
        out += sound * (np.float32(gain) * pan(rng.uniform(-0.85, 0.85)))
    return out


def _voicing(chord: tuple[int, ...], low: int) -> list[int]:
    """Pitches of a chord in close position above `low`."""
    return sorted(low + (p - low) % 12 for p in chord)


def _pads(rng: Generator, score: Score) -> list[Note]:
    """Sustained chords of half a bar or one bar."""
    low, length = int(rng.integers(48, 62)), int(rng.choice([8, 16]))
    seconds = length * score.step * 0.98
    return [
        Note(score.time(step), seconds, pitch, rng.uniform(0.7, 1))
        for step in range(0, score.steps, length)
        for pitch in _voicing(score.chord(step), low)
    ]


def _comping(rng: Generator, score: Score) -> list[Note]:
    """Short chords in a rhythm that repeats every bar."""
    low = int(rng.integers(46, 64))
    pattern = np.arange(0, 16, rng.choice([2, 4]))
    if rng.random() < 0.6:
        pattern = np.sort(rng.choice(16, rng.integers(3, 9), replace=False))
    strum, length = rng.uniform(0, 0.012), rng.uniform(1, 4)
    notes = []
    for step in (bar + int(s) for bar in range(0, score.steps, 16) for s in pattern):
        velocity = rng.uniform(0.55, 1)
        for i, pitch in enumerate(_voicing(score.chord(step), low)):
            notes.append(Note(score.time(step) + i * strum, length * score.step, pitch, velocity))
    return notes


def _arpeggio(rng: Generator, score: Score) -> list[Note]:
    """Broken chords over two octaves."""
    low, every = int(rng.integers(55, 76)), int(rng.choice([1, 2, 2]))
    order = rng.permutation(6)
    notes = []
    for i, step in enumerate(range(0, score.steps, every)):
        voicing = _voicing(score.chord(step), low)
        ladder = voicing + [p + 12 for p in voicing]
        pitch = ladder[order[i % 6] % len(ladder)]
        notes.append(Note(score.time(step), every * score.step * 1.2, pitch, rng.uniform(0.6, 1)))
    return notes


def _solo(rng: Generator, score: Score) -> list[Note]:
    """Melody in the vocal range, with rests."""
    degree = 7 * int(rng.integers(4, 6)) + int(rng.integers(7))
    step, notes = int(rng.integers(0, 8)), []
    while step < score.steps:
        length = int(rng.choice([1, 2, 3, 4, 6, 8]))
        degree = min(max(degree + int(rng.integers(-3, 4)), 26), 44)
        if rng.random() < 0.85:
            notes.append(Note(score.time(step), length * score.step, score.degree(degree), rng.uniform(0.7, 1)))
        step += length
    return notes
