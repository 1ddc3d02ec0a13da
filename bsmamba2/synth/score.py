"""Score of a song: tempo, key, chords, notes and sung phrases."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from .song import Intervals

MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
DORIAN, MIXOLYDIAN = (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 5, 7, 9, 10)
PROGRESSIONS = (  # scale degrees of the chords' roots, from 0
    (0, 4, 5, 3), (5, 3, 0, 4), (0, 3, 4, 3), (0, 5, 3, 4), (1, 4, 0, 0), (0, 6, 3, 0),
    (0, 2, 3, 4), (0, 0, 3, 4), (3, 4, 5, 5), (0, 5, 1, 4), (0, 6, 5, 4), (0, 3, 0, 4),
)  # fmt: skip
SWING_PROB = 0.25
MIN_REST, MAX_PHRASE = 0.25, 4.0  # seconds; MAX_PHRASE limits the mean length of the phrases


@dataclass(frozen=True)
class Note:
    """A note to play: `start` and `seconds` in seconds, `pitch` as a MIDI number, `velocity` from 0 to 1."""

    start: float
    seconds: float
    pitch: float
    velocity: float = 1.0


@dataclass(frozen=True)
class Score:
    """Tempo, key and chords of a song in 4/4; time is counted in sixteenths."""

    step: float  # duration of a sixteenth, in seconds
    swing: float  # delay of every second sixteenth, as a fraction of a step
    seconds: float  # duration of the song
    root: int  # pitch class of the key
    scale: tuple[int, ...]  # seven pitch classes above the root
    chords: tuple[tuple[int, ...], ...]  # pitch classes for each bar, root first; the sequence repeats

    def time(self, step: int) -> float:
        """Start of a sixteenth, in seconds."""
        return (step + (self.swing if step % 2 else 0.0)) * self.step

    @property
    def steps(self) -> int:
        """Number of sixteenths that begin within the song."""
        return math.ceil(self.seconds / self.step)

    def chord(self, step: int) -> tuple[int, ...]:
        """Pitch classes of the chord at a sixteenth."""
        return self.chords[(step // 16) % len(self.chords)]

    def degree(self, index: int) -> int:
        """MIDI pitch of a scale degree; degree 0 is the key's root in the lowest octave."""
        return self.root + 12 * (index // 7) + self.scale[index % 7]


def to_hertz(pitch: Any) -> Any:
    """Frequency in Hz of a MIDI pitch, a number or an array."""
    return 440 * 2 ** ((pitch - 69) / 12)


def draw_score(rng: Generator, seconds: float) -> Score:
    """Draw a random score for a song that lasts `seconds`."""
    scale = (MAJOR, MAJOR, MINOR, MINOR, DORIAN, MIXOLYDIAN)[rng.integers(6)]
    progression = np.roll(PROGRESSIONS[rng.integers(len(PROGRESSIONS))], rng.integers(4)).tolist()
    size = rng.choice([3, 4, 5], p=[0.6, 0.3, 0.1])  # triads, sevenths, ninths
    root = int(rng.integers(12))
    chords = [tuple((root + scale[(degree + 2 * i) % 7]) % 12 for i in range(size)) for degree in progression]
    swing = rng.uniform(0.1, 0.33) if rng.random() < SWING_PROB else 0.0
    return Score(60 / rng.uniform(72, 165) / 4, swing, seconds, root, scale, tuple(chords))


def draw_phrases(rng: Generator, occupancy: float, score: Score) -> Intervals:
    """Draw sung phrases that cover a fraction `occupancy` of the song, (start, end) in seconds.

    Phrases are spread with random rests between them; most starts are snapped to the nearest sixteenth.
    """
    seconds = score.seconds
    sung = occupancy * seconds
    rest = seconds - sung
    if sung < 0.02:
        return ()
    if rest < 0.02:
        return ((0.0, seconds),)
    count = max(1, round(sung / rng.uniform(0.8, 2.6)), math.ceil(sung / MAX_PHRASE))
    count = min(count, 1 + int(rest / MIN_REST), max(1, int(sung / 0.4)))
    shares = rng.uniform(0.5, 1.5, count)
    lengths = shares / shares.sum() * sung
    inner = min(MIN_REST, rest / count) if count > 1 else 0.0
    weights = rng.gamma(1.0, size=count + 1)
    weights[[0, -1]] *= rng.random(2) < 0.7  # otherwise the song begins or ends within a phrase
    if weights.sum() == 0.0:
        weights[rng.integers(2) * count] = 1.0
    gaps = weights / weights.sum() * (rest - inner * (count - 1))
    phrases: list[tuple[float, float]] = []
    position = 0.0
    for i, length in enumerate(lengths):
        position += float(gaps[i]) + (inner if i else 0.0)
        latest = seconds - float(lengths[i:].sum()) - inner * (count - 1 - i)
        earliest = phrases[-1][1] + inner if phrases else 0.0
        snapped = round(position / score.step) * score.step if rng.random() < 0.8 else position
        start = max(earliest, min(snapped, latest))
        phrases.append((start, min(seconds, start + float(length))))
        position += float(length)
    return tuple(phrases)
