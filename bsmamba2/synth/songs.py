"""Songs with known stems: a seeded synthesiser, and one real excerpt.

A reader has a laptop and no data set, so the book makes its own songs.  One call of `synthesise` runs

    seed -> score -> vocals, drums, bass, other -> finish (EQ, room) -> levels -> Song

- *score*: tempo, key, scale, chords, and the phrases that are sung (`_Score`);
- *vocals*: a source-filter singer.  A glottal pulse train follows the melody; in the STFT domain it is
  multiplied by an envelope of five gliding formants, and noise shaped as breath, fricatives and bursts is
  added (`_sing`);
- *bass* and *other*: notes read from wavetables, each note fading from a bright to a dark table (`_play`);
- *drums*: one-shots built from swept sines and filtered noise, placed on a pattern (`_drum`);
- *recorded instruments*: with a sound font, some of these parts are played by it instead (`_Recorded`);
- *finish*: a smooth random EQ and one room per song; the vocals are then gated to exact silence between
  phrases (`_mix`).  With `mix_variety`, saturation, width, doubles, echoes and a softer voice come between (`_produce`).

The mixture of a song IS the sum of its stems.

Axes: s stem, c channel (2), t sample; inside the singer k STFT frame, f STFT bin.
Times are in seconds, frequencies in Hz, pitches in MIDI numbers (69 = 440 Hz), levels in dB.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from .soundfont import DRUMS, SoundFont

STEMS = ("vocals", "drums", "bass", "other")
SAMPLE_RATE = 44_100
TAIL_SECONDS = 0.12
"""The longest that the room rings after a sung phrase; then the vocals are exactly zero."""

Array = NDArray[Any]  # float32 wherever it holds sound
Intervals = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Song:
    """Four stems of one song.

    `stems` is (s=4, c=2, t) float32 in the order of `STEMS`; `vocal_segments` holds the sung regions as (start, end) in
    seconds, ordered and apart; `licence` and `source` say what may be done with the audio and where it is
    from.
    """

    name: str
    stems: torch.Tensor
    sample_rate: int
    vocal_segments: Intervals
    licence: str
    source: str

    @property
    def mixture(self) -> torch.Tensor:
        """The sum of the stems, (c=2, t)."""
        return self.stems.sum(dim=0)

    @property
    def vocals(self) -> torch.Tensor:
        """The vocals, (c=2, t)."""
        return self.stem("vocals")

    def stem(self, name: str) -> torch.Tensor:
        """One stem by name, (c=2, t).  Raises ValueError for a name that is not in `STEMS`."""
        if name not in STEMS:
            raise ValueError(f"no stem is called {name!r}; the stems are {', '.join(STEMS)}")
        return self.stems[STEMS.index(name)]

    @property
    def samples(self) -> int:
        """Duration in samples."""
        return self.stems.shape[-1]

    def read(self, stem: int, start: int, samples: int) -> torch.Tensor:
        """A piece of one stem, by its number in `STEMS`: (c=2, samples)."""
        return self.stems[stem, :, start : start + samples]

    def label(self, stem: int) -> str:
        """What to call a stem in a message, by its number in `STEMS`."""
        return f"{self.name}/{STEMS[stem]}"

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.stems.shape[-1] / self.sample_rate

    @property
    def occupancy(self) -> float:
        """Share of the song's time that lies in `vocal_segments`, 0 to 1; the room's tail is not counted."""
        return sum(end - start for start, end in self.vocal_segments) / self.seconds


def synthesise(
    seed: int,
    *,
    seconds: float = 6.0,
    occupancy: float = 0.6,
    mix_variety: float = 0.0,
    sample_rate: int = SAMPLE_RATE,
    soundfont: str | Path = "",
) -> Song:
    """Make a song; the same arguments give the same bits.

    `occupancy` is the share of time covered by sung phrases, from the first consonant to the end of the last
    note, with the rests between phrases left out and the closures of consonants within a phrase counted.  The
    room rings on for `TAIL_SECONDS`, but for half the rest at most; elsewhere the vocals are exactly zero.
    0 gives no vocals at all, 1 gives singing throughout.  Another occupancy keeps the seed's band.

    `mix_variety` is how far the mix may go from a clean one with a loud voice, 0 to 1 (`_produce`, `_dull`).

    `soundfont` is the file of a General MIDI sound font, whose recorded instruments take over most parts of the band;
    without one all is synthesised. The voice always is. With one, the same bits come only from the same file and the
    same FluidSynth.

    Raises ValueError for a negative seed, fewer than 0.5 seconds, an occupancy or variety outside [0, 1], or a
    sample rate below 8,000 Hz; and what `soundfont.SoundFont` raises.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed is {seed!r}; give an integer of at least 0")
    if not (math.isfinite(seconds) and seconds >= 0.5):
        raise ValueError(f"seconds is {seconds!r}; give a finite duration of at least 0.5")
    if not 0.0 <= occupancy <= 1.0:
        raise ValueError(f"occupancy is {occupancy!r}; give a share between 0 and 1")
    if not 0.0 <= mix_variety <= 1.0:
        raise ValueError(f"variety is {mix_variety!r}; give a number between 0 and 1")
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, (int, np.integer)) or sample_rate < 8_000:
        raise ValueError(f"sample_rate is {sample_rate!r}; give an integer of at least 8000 (Hz)")

    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(int(seed)).spawn(10)]
    score_rng, phrase_rng, vocal_rng, drum_rng, bass_rng, other_rng, mix_rng, production_rng, *later = streams
    recorded_rng, dull_rng = later
    rate = int(sample_rate)
    recorded = _Recorded(recorded_rng, _open(str(soundfont)), rate) if soundfont else None
    samples = round(seconds * rate)
    score = _draw_score(score_rng, samples / rate)
    phrases = _draw_phrases(phrase_rng, samples / rate, occupancy, score)
    stems = {
        "vocals": _sing(vocal_rng, score, phrases, rate, samples),
        "drums": _drum(drum_rng, score, rate, samples, recorded),
        "bass": _bass(bass_rng, score, rate, samples, recorded),
        "other": _accompany(other_rng, score, rate, samples, recorded),
    }
    told = f", soundfont={Path(soundfont).name!r}" if soundfont else ""

    def produce(out: Array) -> float:
        _dull(dull_rng, out[0], mix_variety, rate)
        return _produce(production_rng, out, mix_variety, rate)

    mixed = _mix(mix_rng, stems, phrases, score, rate, produce)
    return Song(
        name=f"synthetic-{int(seed)}",
        stems=torch.from_numpy(mixed),
        sample_rate=rate,
        vocal_segments=phrases,
        licence="CC0-1.0" + (f", but for the recordings of {Path(soundfont).name}" if soundfont else ""),
        source=f"synthesise({int(seed)}, {seconds=}, {occupancy=}, {mix_variety=}, sample_rate={rate}{told})",
    )


def songs(
    count: int,
    *,
    seed: int = 0,
    seconds: float = 6.0,
    mix_variety: float = 0.0,
    sample_rate: int = SAMPLE_RATE,
    soundfont: str | Path = "",
    soundfont_share: float = 1.0,
    clean_share: float = 0.0,
    first: int = 0,
    every: int = 1,
) -> list[Song]:
    """Make `count` different songs, with the occupancy and, up to `mix_variety`, the variety drawn per song.

    One song in ten has no vocals, one in ten is sung throughout, the others lie between 0.3 and 0.9.  A sound font
    plays in each with probability `soundfont_share`.  With probability `clean_share` a song has neither variety nor
    sound font.  Song i depends on `seed` and i alone, so a longer list begins with the shorter one.  A 6 s song takes
    8.5 MB.  Of the `count` songs only number `first` and every `every`-th
    after it are made, where many share the work.

    Raises ValueError for a count or seed below 0 or a share outside [0, 1], and as `synthesise` does.
    """
    if count < 0:
        raise ValueError(f"count is {count!r}; give an integer of at least 0")
    if seed < 0:
        raise ValueError(f"seed is {seed!r}; give an integer of at least 0")
    for name, share in (("soundfont_share", soundfont_share), ("clean_share", clean_share)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is {share!r}; give a number between 0 and 1")
    made = []
    for i in range(first, count, every):
        sequence = np.random.SeedSequence([seed, i])
        kind, share, varied, recorded, clean = np.random.default_rng(sequence).random(5).tolist()
        plain = clean < clean_share
        occupancy = 0.0 if kind < 0.1 else 1.0 if kind > 0.9 else round(0.3 + 0.6 * share, 3)
        song_seed = int(sequence.generate_state(2)[1])
        made.append(
            synthesise(
                song_seed,
                seconds=seconds,
                occupancy=occupancy,
                mix_variety=0.0 if plain else round(varied * mix_variety, 3),
                sample_rate=sample_rate,
                soundfont=soundfont if recorded < soundfont_share and not plain else "",
            )
        )
    return made


# ---------------------------------------------------------------------------------------------------- score


@dataclass(frozen=True)
class _Note:
    start: float  # seconds
    seconds: float
    pitch: float  # MIDI number
    velocity: float  # 0 to 1


@dataclass(frozen=True)
class _Score:
    step: float  # seconds of a sixteenth note
    swing: float  # delay of every second sixteenth, as a share of a step
    seconds: float
    root: int  # pitch class of the key
    scale: tuple[int, ...]  # seven pitch classes above the root
    chords: tuple[tuple[int, ...], ...]  # per bar: pitch classes, the root first

    def time(self, step: int) -> float:
        """Start of a sixteenth, in seconds."""
        return (step + (self.swing if step % 2 else 0.0)) * self.step

    @property
    def steps(self) -> int:
        """Number of sixteenths that begin within the song."""
        return math.ceil(self.seconds / self.step)

    def chord(self, step: int) -> tuple[int, ...]:
        """Pitch classes that sound at a sixteenth."""
        return self.chords[(step // 16) % len(self.chords)]

    def degree(self, index: int) -> int:
        """MIDI pitch of a scale degree; degree 0 is the key's root in the lowest octave."""
        return self.root + 12 * (index // 7) + self.scale[index % 7]


MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
DORIAN, MIXOLYDIAN = (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 5, 7, 9, 10)
PROGRESSIONS = (
    (0, 4, 5, 3), (5, 3, 0, 4), (0, 3, 4, 3), (0, 5, 3, 4), (1, 4, 0, 0), (0, 6, 3, 0),
    (0, 2, 3, 4), (0, 0, 3, 4), (3, 4, 5, 5), (0, 5, 1, 4), (0, 6, 5, 4), (0, 3, 0, 4),
)  # fmt: skip


def _draw_score(rng: Generator, seconds: float) -> _Score:
    scale = (MAJOR, MAJOR, MINOR, MINOR, DORIAN, MIXOLYDIAN)[rng.integers(6)]
    progression = np.roll(PROGRESSIONS[rng.integers(len(PROGRESSIONS))], rng.integers(4)).tolist()
    size = rng.choice([3, 4, 5], p=[0.6, 0.3, 0.1])  # triads, sevenths, ninths
    root = int(rng.integers(12))
    chords = []
    for degree in progression:
        chords.append(tuple((root + scale[(degree + 2 * i) % 7]) % 12 for i in range(size)))
    swing = rng.uniform(0.1, 0.33) if rng.random() < 0.25 else 0.0
    return _Score(60 / rng.uniform(72, 165) / 4, swing, seconds, root, scale, tuple(chords))


def _draw_phrases(rng: Generator, seconds: float, occupancy: float, score: _Score) -> Intervals:
    """Cut `occupancy * seconds` of singing into phrases and spread them; starts lean to the sixteenths."""
    vocal_segments = occupancy * seconds
    rest = seconds - vocal_segments
    if vocal_segments < 0.02:
        return ()
    if rest < 0.02:
        return ((0.0, seconds),)
    shortest_rest = 0.25
    count = max(1, round(vocal_segments / rng.uniform(0.8, 2.6)), math.ceil(vocal_segments / 4.0))
    count = min(count, 1 + int(rest / shortest_rest), max(1, int(vocal_segments / 0.4)))
    shares = rng.uniform(0.5, 1.5, count)
    lengths = shares / shares.sum() * vocal_segments
    inner = min(shortest_rest, rest / count) if count > 1 else 0.0
    weights = rng.gamma(1.0, size=count + 1)
    weights[[0, -1]] *= rng.random(2) < 0.7  # a song often begins or ends while someone sings
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


# --------------------------------------------------------------------------------------------------- singer

VOWELS = np.array(
    [  # an adult man's formants in Hz, a i u e o schwa ae
        [730, 1090, 2440, 3400, 4300], [270, 2290, 3010, 3600, 4400], [300, 870, 2240, 3300, 4200],
        [530, 1840, 2480, 3500, 4300], [570, 840, 2410, 3300, 4200], [500, 1400, 2450, 3450, 4300],
        [660, 1720, 2410, 3450, 4300],
    ]
)  # fmt: skip
NASAL = np.array([260.0, 1150.0, 2200.0, 3200.0, 4200.0])
GLIDES = np.array(
    [  # w j r l
        [300, 700, 2200, 3200, 4200], [290, 2200, 2900, 3500, 4300], [360, 1200, 1650, 3100, 4200],
        [350, 1050, 2700, 3400, 4200],
    ]
)  # fmt: skip
SYLLABLES = {
    "none": 0.16,
    "hiss": 0.18,
    "stop": 0.2,
    "voiced stop": 0.14,
    "nasal": 0.14,
    "glide": 0.12,
    "h": 0.06,
}
STEPS = {-4: 0.03, -3: 0.05, -2: 0.13, -1: 0.2, 0: 0.2, 1: 0.19, 2: 0.12, 3: 0.05, 4: 0.03}
"""How syllables begin, and how far a melody moves in scale degrees, with their probabilities."""
NOISES = ((5_200, 14_000), (2_300, 7_500), (1_200, 14_000), (400, 1_800), (3_400, 10_000), (1_400, 3_200))
"""Noise bands in Hz: s, sh, f, and the bursts of p, t, k."""


@dataclass(frozen=True)
class _Singer:
    low: float  # lowest and highest pitch
    high: float
    formant_scale: float  # vocal tract relative to an adult man's
    bandwidths: Array  # of the five formants, Hz
    tilt: float  # fall of the formants' level per octave, in powers
    ring: float  # level of the third and fourth formant, dB
    breath: float  # level of the aspiration noise beside the voice
    vibrato_rate: float  # Hz
    vibrato_cents: float
    vibrato_delay: float  # seconds
    glide: float  # seconds of portamento
    jitter_cents: float
    drift_cents: float  # slow wandering about the note
    bend: float  # how often a note is bent into, out of, or through
    consonant_level: float
    talkative: float  # mean syllable in sixteenths


def _draw_singer(rng: Generator) -> _Singer:
    kind = rng.choice(3, p=[0.45, 0.47, 0.08])
    low = (rng.uniform(43, 52), rng.uniform(53, 60), rng.uniform(58, 63))[kind]
    scale = (rng.uniform(0.94, 1.06), rng.uniform(1.1, 1.22), rng.uniform(1.24, 1.38))[kind]
    return _Singer(
        low=low,
        high=low + rng.uniform(12, 19),
        formant_scale=scale,
        bandwidths=(np.array([70, 90, 130, 190, 280]) * rng.uniform(0.7, 1.5, 5)).astype(np.float32),
        tilt=rng.uniform(0.7, 1.4),
        ring=rng.uniform(-5, 5),
        breath=10 ** rng.uniform(-2.0, -0.9),
        vibrato_rate=rng.uniform(5.0, 6.5),
        vibrato_cents=rng.uniform(20, 60) * (rng.random() < 0.75),
        vibrato_delay=rng.uniform(0.12, 0.4),
        glide=rng.uniform(0.04, 0.2),
        jitter_cents=rng.uniform(2, 8),
        drift_cents=rng.uniform(5, 40),
        bend=rng.uniform(0.1, 0.6),
        consonant_level=10 ** rng.uniform(-0.15, 0.45),
        talkative=rng.uniform(1.6, 4.5),
    )


@dataclass
class _Voice:
    """What the singer does in each STFT frame; arrays are (k,) unless noted."""

    pitch: Array  # MIDI number
    voiced: Array  # level of the glottal source
    breath: Array  # level of aspiration
    hiss: Array  # (k, noise) levels of the noise bands
    formants: Array  # (k, 5) Hz
    vibrato: Array  # 0 to 1


def _draw_melody(rng: Generator, singer: _Singer, score: _Score, start: float, end: float) -> list[_Note]:
    """Notes without gaps between `start` and `end`: a walk over the scale that leans to chord tones."""
    notes = []
    degrees = [i for i in range(80) if singer.low <= score.degree(i) <= singer.high]
    position = degrees[int(rng.integers(len(degrees)))]
    time = start
    while time < end - 1e-6:
        length = max(1, rng.poisson(singer.talkative)) * score.step
        if end - time - length < 1.2 * score.step:
            length = end - time
        position += int(rng.choice(list(STEPS), p=list(STEPS.values())))
        position = min(max(position, degrees[0]), degrees[-1])
        if length >= 3 * score.step:
            chord = score.chord(int(time / score.step))
            nearby = [p for p in degrees if abs(p - position) <= 1 and score.degree(p) % 12 in chord]
            position = nearby[0] if nearby else position
        notes.append(_Note(time, length, score.degree(position), rng.uniform(0.6, 1.0)))
        time += length
    return notes


def _smooth(values: Array, frames: float) -> Array:
    """Average along axis 0 with a Hann kernel about `frames` wide."""
    width = max(1, round(frames))
    kernel = np.hanning(width + 2)[1:-1]
    kernel /= kernel.sum()
    columns = values.reshape(len(values), -1)
    padded = np.pad(columns, ((width // 2, width - 1 - width // 2), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=0)
    return (windows @ kernel).reshape(values.shape).astype(np.float32)


def _wander(rng: Generator, count: int, width: float) -> Array:
    """Slow noise of unit variance, (count,), that changes over about `width` values."""
    noise = _smooth(rng.standard_normal(count).astype(np.float32), width)
    return noise / (noise.std() + np.float32(1e-6))


def _articulate(
    rng: Generator, singer: _Singer, score: _Score, phrases: Intervals, frame: float, frames: int
) -> _Voice:
    """Write notes, vowels and consonants of all phrases into frames of `frame` seconds."""
    pitch, voiced, breath = np.full(frames, np.nan), np.zeros(frames), np.zeros(frames)
    hiss, formants, vibrato = np.zeros((frames, len(NOISES))), np.zeros((frames, 5)), np.zeros(frames)
    formants[:] = VOWELS[5]

    def at(seconds: float) -> int:
        return min(frames, max(0, round(seconds / frame)))

    for start, end in phrases:
        if end < score.seconds and end - start > 0.3:
            end -= 0.05  # the last note dies away within the phrase
        notes = _draw_melody(rng, singer, score, start, end)
        arc = rng.uniform(0.0, 0.35)
        for index, note in enumerate(notes):
            a, b = at(note.start), at(note.start + note.seconds)
            if b <= a:
                continue
            through = (note.start - start) / (end - start)
            level = note.velocity * (1 - arc * (2 * through - 1) ** 2)
            vowel = VOWELS[rng.integers(len(VOWELS))] * rng.uniform(0.94, 1.06, 5)
            pitch[a:b], voiced[a:b], formants[a:b] = note.pitch, level, vowel
            breath[a:b] = level * singer.breath
            if rng.random() < 0.2:  # a diphthong
                formants[(a + b) // 2 : b] = VOWELS[rng.integers(len(VOWELS))]
            if rng.random() < singer.bend:  # a scoop into the note, a fall out of it, or a turn within
                size, part = rng.uniform(0.5, 3.0), max(1, round(rng.uniform(0.15, 0.4) * (b - a)))
                shape = rng.integers(3)
                if shape == 0:
                    pitch[a : a + part] -= np.linspace(size, 0, part)
                elif shape == 1:
                    pitch[b - part : b] -= np.linspace(0, 1.5 * size, part)
                else:
                    pitch[a:b] += 0.5 * size * np.sin(np.linspace(0, np.pi, b - a)) * rng.choice([-1, 1])
            onset = at(note.start + singer.vibrato_delay)
            if onset < b:
                vibrato[onset:b] = 1.0
            room = min(0.5 * note.seconds, 0.2)
            kind = rng.choice(list(SYLLABLES), p=list(SYLLABLES.values()))
            loud = singer.consonant_level * rng.uniform(0.5, 1.2)
            if kind == "hiss":
                c = a + max(1, round(rng.uniform(0.5, 1.0) * min(room, 0.14) / frame))
                voiced[a:c] *= rng.choice([0.0, 0.4])
                which = int(rng.integers(3))
                hiss[a:c, which] = loud * (0.22, 0.3, 0.1)[which]
            elif kind == "stop":
                c = a + max(2, round(rng.uniform(0.4, 1.0) * min(room, 0.09) / frame))
                burst = max(a, c - 2)
                voiced[a:c] = 0.0
                breath[a:burst] = 0.0
                which = int(rng.integers(3))
                hiss[burst:c, 3 + which] = loud * (0.35, 0.4, 0.35)[which]
                breath[c : c + round(0.03 / frame)] += 0.3 * loud
            elif kind == "voiced stop":
                c = a + max(1, round(min(room, 0.05) / frame))
                voiced[a:c] *= 0.2
                formants[a:c] = GLIDES[rng.integers(len(GLIDES))]
                hiss[max(a, c - 1) : c, 3 + rng.integers(3)] = 0.12 * loud
            elif kind == "nasal":
                c = a + max(1, round(rng.uniform(0.6, 1.0) * min(room, 0.1) / frame))
                voiced[a:c] *= 0.45
                formants[a:c] = NASAL
            elif kind == "glide":
                c = a + max(1, round(rng.uniform(0.6, 1.0) * min(room, 0.08) / frame))
                voiced[a:c] *= 0.7
                formants[a:c] = GLIDES[rng.integers(len(GLIDES))]
            elif kind == "h":
                c = a + max(1, round(min(room, 0.07) / frame))
                voiced[a:c] *= 0.1
                breath[a:c] += 0.25 * loud
            if index == len(notes) - 1 and note.seconds > 0.25 and rng.random() < 0.35:  # a closing s, sh or f
                c = b - max(1, round(rng.uniform(0.06, 0.12) / frame))
                voiced[c:b] *= 0.1
                which = int(rng.integers(3))
                hiss[c:b, which] = loud * (0.18, 0.25, 0.1)[which]
    known = np.flatnonzero(~np.isnan(pitch))
    pitch = np.interp(np.arange(frames), known, pitch[known]) if len(known) else np.full(frames, 60.0)
    jitter = _wander(rng, frames, 3) * np.float32(singer.jitter_cents / 100)
    drift = _wander(rng, frames, 0.25 / frame) * np.float32(singer.drift_cents / 100)
    shimmer = 1 + 0.06 * rng.standard_normal(frames)
    return _Voice(
        pitch=_smooth(pitch.astype(np.float32), singer.glide / frame) + jitter + drift,
        voiced=_smooth((voiced * shimmer).astype(np.float32), 0.03 / frame),
        breath=_smooth(breath.astype(np.float32), 0.03 / frame),
        hiss=_smooth(hiss.astype(np.float32), 0.02 / frame),
        formants=_smooth(formants.astype(np.float32), 0.06 / frame) * np.float32(singer.formant_scale),
        vibrato=_smooth(vibrato.astype(np.float32), 0.25 / frame),
    )


def _ramp(values: Array, hop_length: int, samples: int) -> Array:
    """Linear interpolation of one value a hop to (samples,)."""
    steps = np.arange(hop_length, dtype=np.float32) / hop_length
    slopes = np.diff(values, append=values[-1:])
    return (values[:, None] + slopes[:, None] * steps).reshape(-1)[:samples]


def _pulses(hertz: Array, rate: int) -> Array:
    """A pulse train with harmonics up to 0.45 of the sample rate, (t,); a table per half octave."""
    size = 8_192
    levels = np.clip(np.ceil(2 * np.log2(hertz / 60.0)), 0, 12).astype(np.int32)
    tables = np.zeros((levels.max() + 1, size), np.float32)
    for level in range(levels.min(), levels.max() + 1):
        highest = max(1, int(0.45 * rate / (60.0 * 2 ** (level / 2))))
        harmonics = np.arange(1, min(highest, size // 2 - 1) + 1)
        spectrum = np.zeros(size // 2 + 1, np.complex64)
        spectrum[1 : len(harmonics) + 1] = np.exp(0.25j * np.sqrt(harmonics)) * np.sqrt(60.0 * 2 ** (level / 2) / 220.0)
        tables[level] = np.fft.irfft(spectrum, size).astype(np.float32) * size
    phase = np.cumsum(hertz, dtype=np.float64) / rate
    index = (phase * size).astype(np.int64) & (size - 1)
    return tables.reshape(-1)[index + levels.astype(np.int64) * size]


def _noise_bands(frequencies: Array) -> Array:
    """Spectra of the consonants' noises, (noise, f)."""
    bands = []
    for low, high in NOISES:
        rise = 1 / (1 + (low / np.maximum(frequencies, 1)) ** 6)
        bands.append(np.sqrt(rise / (1 + (frequencies / high) ** 6)) * math.sqrt(6_000 / (high - low)))
    return np.array(bands, np.float32)


def _formant_envelope(voice: _Voice, singer: _Singer, frequencies: Array, active: Array) -> Array:
    """Magnitude of the vocal tract in the active frames, (k, f): five resonances side by side."""
    formants = voice.formants[active].copy()
    hertz = 440 * 2 ** ((voice.pitch[active] - 69) / 12)
    formants[:, 0] = np.maximum(formants[:, 0], 0.95 * hertz)  # a singer opens the mouth on high notes
    formants[:, 1] = np.maximum(formants[:, 1], 1.25 * formants[:, 0])
    effort = np.clip(voice.voiced[active], 0.2, 1.2)
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
    power /= np.sqrt(power.mean(axis=1, keepdims=True))  # the compressor of a studio: half of the level in dB
    return np.sqrt(power, out=power)


def _frames(signal: Array, size: int, hop_length: int, active: Array) -> Array:
    """STFT of the active frames with a square-root Hann window, (k, f)."""
    window = np.sqrt(np.hanning(size + 1)[:-1]).astype(np.float32)
    padded = np.pad(signal, (size // 2, size))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop_length][active]
    return np.fft.rfft(windows * window)


def _overlap_add(spectra: Array, size: int, hop_length: int, active: Array, samples: int) -> Array:
    window = (np.sqrt(np.hanning(size + 1)[:-1]) / 2).astype(np.float32)
    pieces = (np.fft.irfft(spectra, size).astype(np.float32) * window).reshape(
        len(active), size // hop_length, hop_length
    )
    out = np.zeros((samples // hop_length + 2 * size // hop_length, hop_length), np.float32)
    for j in range(size // hop_length):
        out[active + j] += pieces[:, j]
    return out.reshape(-1)[size // 2 : size // 2 + samples]


def _sing(rng: Generator, score: _Score, phrases: Intervals, rate: int, samples: int) -> Array:
    """Sing the phrases, (c, t); neither gated nor levelled yet."""
    if not phrases:
        return np.zeros((2, samples), np.float32)
    singer = _draw_singer(rng)
    hop_length = 2 ** max(4, round(math.log2(0.0058 * rate)))
    size, frames, frame = 4 * hop_length, samples // hop_length + 1, hop_length / rate
    voice = _articulate(rng, singer, score, phrases, frame, frames)
    active = np.flatnonzero(_smooth((voice.voiced + voice.breath + voice.hiss.sum(1)).astype(np.float32), 4) > 1e-5)
    frequencies = np.fft.rfftfreq(size, 1 / rate).astype(np.float32)
    envelope = _formant_envelope(voice, singer, frequencies, active)
    below_voice = 1 / (1 + (60.0 / np.maximum(frequencies, 1.0)) ** 3)

    noise = _frames(rng.standard_normal(samples, dtype=np.float32), size, hop_length, active)
    air = (envelope * (0.3 + np.minimum(frequencies / 4_000, 1.5)) + 0.05) * voice.breath[active, None]
    noise *= (air + voice.hiss[active] @ _noise_bands(frequencies)) * below_voice
    # Takes: the lead in the middle; sometimes doubles at the sides, or a harmony a third or a sixth above.
    takes = [(0.0, 1.0, 0.0)]
    extra = rng.random()
    if extra < 0.12:
        level = rng.uniform(0.15, 0.4)
        takes += [(0.0, level, -rng.uniform(0.4, 1)), (0.0, level, rng.uniform(0.4, 1))][: rng.integers(1, 3)]
    elif extra < 0.24:
        takes += [(float(rng.choice([3.5, 7.0, 12.0, -12.0])), rng.uniform(0.15, 0.4), rng.uniform(-0.6, 0.6))]
    out = np.zeros((2, samples), np.float32)
    for number, (interval, level, pan) in enumerate(takes):
        newton_schulz = singer.vibrato_rate * rng.uniform(0.95, 1.05) * frame * np.arange(frames) + rng.random()
        wave = np.sin(2 * np.pi * newton_schulz)
        pitch = voice.pitch + voice.vibrato * wave * singer.vibrato_cents / 100 + interval
        if interval:
            pitch = _to_scale(pitch, score) if abs(interval) < 12 else pitch
        if number:
            pitch = pitch + _wander(rng, frames, 0.2 / frame) * np.float32(rng.uniform(0.05, 0.2))
        hertz = _ramp((440 * 2 ** ((pitch - 69) / 12)).astype(np.float32), hop_length, samples)
        shaped = _frames(_pulses(hertz, rate), size, hop_length, active)
        shaped *= envelope * (voice.voiced[active, None] * below_voice * np.float32(0.12))
        take = _overlap_add(shaped if number else shaped + noise, size, hop_length, active, samples)
        if number:
            take = np.roll(take, round(rng.uniform(0.005, 0.03) * rate))
        out += _pan(pan) * (level * take)
    return out


def _to_scale(pitch: Array, score: _Score) -> Array:
    """Move a pitch curve by whole steps until its notes fall into the key, as a harmony singer does."""
    allowed = np.array([score.degree(i) for i in range(-7, 84)])
    wanted = _smooth(pitch.astype(np.float32), 9)
    nearest = allowed[np.abs(wanted[:, None] - allowed).argmin(1)]
    return pitch + _smooth((nearest - np.round(wanted)).astype(np.float32), 9)


def _pan(position: float) -> Array:
    """Constant-power gains (c, 1) for a position from -1 (left) to 1 (right)."""
    angle = (position + 1) * math.pi / 4
    return np.array([[math.cos(angle)], [math.sin(angle)]], np.float32) * np.float32(math.sqrt(2))


# ---------------------------------------------------------------------------------------------------- notes


@dataclass(frozen=True)
class _Instrument:
    """A timbre: harmonics at two brightnesses, an amplitude envelope, and how notes move."""

    kind: str = "harmonic"  # or "organ", "fm", "bell", "power"
    slope: float = 1.0  # amplitude of harmonic k is k ** -slope
    even: float = 1.0  # level of the even harmonics
    pluck: float = 0.0  # where a string is plucked, as a share of its length; 0 for not plucked
    bright: float = 8_000.0  # cutoff in Hz when a note begins
    dark: float = 1_500.0  # cutoff it falls to
    fade: float = 0.3  # seconds of that fall; 0 for a steady tone
    attack: float = 0.004
    decay: float = 0.5
    sustain: float = 0.0
    release: float = 0.08
    vibrato_cents: float = 0.0
    glide: float = 0.0  # seconds to slide from the note before
    detune_cents: float = 0.0  # between two copies, left and right
    breath: float = 0.0
    body: tuple[tuple[float, float], ...] = ()  # resonances: Hz, gain in dB
    drawbars: tuple[float, ...] = ()
    drive: float = 2.0  # modulation index of "fm" and "bell", gain before the clipper of "power"
    ratio: int = 1  # of the modulator of "fm" and "bell"


# A pair is a range to draw from evenly, a list holds choices, anything else is meant as it stands.
# fmt: off
FAMILIES: dict[str, dict[str, Any]] = {
    "plucked": {
        "slope": (0.7, 1.2), "pluck": (0.1, 0.45), "bright": (4000.0, 12000.0), "dark": (700, 2500),
        "fade": (0.1, 0.5), "attack": 0.003, "decay": (0.3, 1.2), "release": (0.05, 0.2), "body": 4,
    },
    "piano": {
        "slope": (0.9, 1.4), "pluck": 0.12, "bright": (3000.0, 8000.0), "dark": (800, 2000.0),
        "fade": (0.2, 0.6), "attack": 0.003, "decay": (0.6, 2), "release": (0.08, 0.2),
        "detune_cents": (0, 3), "body": 4,
    },
    "epiano": {
        "kind": "fm", "drive": (0.8, 3), "ratio": [1, 1, 2, 7, 14], "bright": 12000.0, "dark": 6000.0,
        "fade": (0.15, 0.7), "decay": (0.5, 2), "sustain": (0, 0.3), "release": 0.1,
    },
    "bell": {
        "kind": "bell", "drive": (0.5, 2), "ratio": [3, 4, 5, 7], "bright": 14000.0, "decay": (0.4, 1.5),
        "release": 0.4,
    },
    "organ": {
        "kind": "organ", "bright": 9000.0, "fade": 0.0, "attack": 0.008, "sustain": 1.0, "release": 0.03,
        "vibrato_cents": (0, 12), "detune_cents": (0, 4),
    },
    "pad": {
        "slope": (0.9, 1.8), "even": [0.1, 1.0], "bright": (800, 5000.0), "fade": 0.0,
        "attack": (0.05, 0.4), "sustain": 1.0, "release": (0.15, 0.5), "detune_cents": (3, 14), "body": 4,
    },
    "saw": {
        "even": [0.02, 1.0, 1.0], "bright": (3000.0, 14000.0), "dark": (600, 5000.0), "fade": (0.08, 0.6),
        "attack": (0.003, 0.03), "decay": (0.3, 1), "sustain": (0.3, 0.9), "detune_cents": (0, 15),
        "vibrato_cents": (0, 25),
    },
    "guitar": {
        "kind": "power", "drive": (2, 10), "bright": (3500, 6000.0), "dark": (3000.0, 5000.0),
        "fade": (0.3, 1), "decay": (1, 3), "sustain": (0.5, 0.9), "release": 0.06, "detune_cents": (3, 8),
        "body": 3,
    },
    "solo guitar": {
        "slope": (0.4, 0.9), "even": 0.8, "pluck": (0.1, 0.3), "bright": (3000.0, 5500),
        "dark": (2500, 4000.0), "fade": 0.6, "attack": 0.006, "decay": (1, 3), "sustain": (0.5, 0.9),
        "release": 0.06, "vibrato_cents": (10, 50), "glide": [0.0, 0.06], "body": 4,
    },
    "brass": {
        "slope": (0.6, 1.1), "bright": (1500, 3000.0), "dark": (3000.0, 7000.0), "fade": (0.04, 0.12),
        "attack": (0.02, 0.06), "decay": 0.4, "sustain": (0.6, 0.9), "release": 0.07,
        "vibrato_cents": (0, 30), "body": 4,
    },
    "strings": {
        "slope": (0.8, 1.1), "bright": (3000.0, 8000.0), "fade": 0.0, "attack": (0.04, 0.2), "sustain": 1.0,
        "release": (0.1, 0.3), "vibrato_cents": (10, 40), "glide": [0.0, 0.08], "detune_cents": (2, 8),
        "breath": 0.002, "body": 4,
    },
    "flute": {
        "slope": (1.5, 2.6), "even": (0.3, 1), "bright": 6000.0, "fade": 0.0, "attack": (0.03, 0.08),
        "sustain": 1.0, "vibrato_cents": (10, 40), "breath": (0.003, 0.015),
    },
    "sub": {
        "slope": (1.3, 3), "even": (0.1, 1), "bright": (300, 2000.0), "dark": (150, 600),
        "fade": (0.1, 0.5), "attack": 0.006, "decay": (0.5, 2), "sustain": (0.4, 0.9), "release": 0.05,
    },
    "fingered": {
        "slope": (0.6, 1.1), "pluck": (0.12, 0.35), "bright": (1500, 6000.0), "dark": (400, 1500),
        "fade": (0.08, 0.4), "decay": (0.6, 1.8), "sustain": (0, 0.2), "release": 0.05, "body": 3,
    },
    "synth bass": {
        "slope": (0.8, 1), "even": [0.02, 1.0, 1.0], "bright": (1500, 9000.0), "dark": (250, 1800),
        "fade": (0.05, 0.35), "attack": 0.003, "decay": (0.3, 1), "sustain": (0.3, 0.9), "release": 0.04,
        "detune_cents": (0, 6),
    },
    "swept bass": {
        "slope": (0.7, 1), "even": [0.3, 1.0], "bright": (150, 600), "dark": (2000.0, 8000.0),
        "fade": (0.2, 1.2), "attack": 0.003, "decay": 1.0, "sustain": 0.9, "release": 0.04,
        "detune_cents": (0, 8), "body": 2,
    },
}
# fmt: on


def _draw_instrument(rng: Generator, family: str) -> _Instrument:
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
    return _Instrument(**drawn)


def _hertz(pitch: float) -> float:
    return 440.0 * 2.0 ** ((pitch - 69.0) / 12.0)


def _table(instrument: _Instrument, hertz: float, cutoff: float, drive: float, phases: Array, rate: int) -> Array:
    """One period of a note, band-limited, mean power 1/2; a power of two long."""
    size = 1 << max(9, min(14, math.ceil(math.log2(rate / hertz * 20))))
    highest = max(1, min(int(0.45 * rate / hertz), size // 2 - 1, len(phases)))
    k = np.arange(1, highest + 1)
    spectrum: Array
    amplitude: Array
    if instrument.kind == "power":  # root, fifth and octave through one clipper, over the octave below
        x = 2 * np.pi * np.arange(size) / size
        string = sum(np.sin(n * i * x + phases[n * i]) / i for n in (2, 3, 4) for i in range(1, 7))
        wave = np.tanh(drive * 0.5 * np.asarray(string))
        spectrum = np.fft.rfft(wave)[1 : highest + 1]
    elif instrument.kind in ("fm", "bell"):
        x = 2 * np.pi * np.arange(size) / size
        spectrum = np.fft.rfft(np.sin(x + drive * np.sin(instrument.ratio * x)))[1 : highest + 1]
    elif instrument.kind == "organ":
        amplitude = np.zeros(highest)
        for bar, harmonic in zip(instrument.drawbars, (1, 2, 3, 4, 6, 8, 10, 12, 16), strict=True):
            if harmonic <= highest:
                amplitude[harmonic - 1] = bar
        spectrum = amplitude * np.exp(1j * phases[:highest])
    else:
        amplitude = k**-instrument.slope * np.where(k % 2, 1.0, instrument.even)
        if instrument.pluck:
            amplitude *= np.abs(np.sin(np.pi * k * instrument.pluck)) + 0.05
        spectrum = amplitude * np.exp(1j * phases[:highest])
    f = k * hertz
    response: Array = 1 / np.sqrt(1 + (f / cutoff) ** 4)
    for centre, gain in instrument.body:
        response *= 10 ** (gain / 20 * np.exp(-((np.log2(f / centre) / 0.35) ** 2)))
    full = np.zeros(size // 2 + 1, np.complex128)
    full[1 : highest + 1] = spectrum * response
    wave = np.fft.irfft(full, size)
    return (wave / (np.sqrt(2 * np.mean(wave**2)) + 1e-9)).astype(np.float32)


def _play(
    rng: Generator, notes: list[_Note], instrument: _Instrument, rate: int, samples: int, spread: float = 0.0
) -> Array:
    """Play notes on one instrument, (c, t); `spread` (0 to 1) scatters pitches over the stereo image."""
    out = np.zeros((2, samples), np.float32)
    if not notes:
        return out
    longest = min(samples, math.ceil((max(n.seconds for n in notes) + instrument.release) * rate) + 1)
    t = np.arange(longest, dtype=np.float32) / np.float32(rate)
    fall = np.exp(t * np.float32(-1 / instrument.fade)) if instrument.fade else None
    level = np.float32(1 - instrument.sustain) * np.exp(t * np.float32(-1 / instrument.decay)) + np.float32(
        instrument.sustain
    )
    attack = max(2, round(instrument.attack * rate))
    rise = np.sin(np.linspace(0, np.pi / 2, attack, dtype=np.float32))[:longest]
    level[: len(rise)] *= rise
    clock = np.arange(longest, dtype=np.float64)  # samples, bent by the vibrato
    if instrument.vibrato_cents > 3:
        bend = math.log(2) / 1200 * instrument.vibrato_cents * np.minimum(t / 0.3, 1) ** 2
        clock += np.cumsum(bend * np.sin(np.float32(2 * np.pi * rng.uniform(4.8, 6.4)) * t), dtype=np.float64)
    phases = (rng.uniform(0, 2 * np.pi, 600) * rng.choice([0.1, 1.0])).astype(np.float32)
    copies = [(-0.5, -0.8), (0.5, 0.8)] if instrument.detune_cents > 2 else [(0.0, 0.0)]
    before: _Note | None = None
    places: dict[float, float] = {}
    tables: dict[float, tuple[Array, Array]] = {}
    for note in notes:
        start = round(note.start * rate)
        length = min(samples - start, longest, round((note.seconds + instrument.release) * rate))
        if start < 0 or length < attack + 2:
            continue
        place = places.setdefault(note.pitch, rng.uniform(-spread, spread))
        hertz = _hertz(note.pitch - (12 if instrument.kind == "power" else 0))
        if note.pitch not in tables:
            tables[note.pitch] = (
                _table(instrument, hertz, instrument.bright, instrument.drive, phases, rate),
                _table(instrument, hertz, instrument.dark, 0.4 * instrument.drive, phases, rate),
            )
        bright, dark = tables[note.pitch]
        size = len(bright)
        envelope = level[:length] * np.float32(note.velocity)
        release = min(length, max(2, round(instrument.release * rate)))
        envelope[length - release :] *= np.linspace(1, 0, release, dtype=np.float32) ** 2
        slide: Any = 0.0
        if instrument.glide and before and note.start - before.start - before.seconds < 0.05:
            offset = 2 ** ((before.pitch - note.pitch) / 12) - 1
            slide = hertz * size * offset * instrument.glide * (1 - np.exp(-t[:length] / np.float32(instrument.glide)))
        before = note
        for cents, side in copies:
            step = hertz * 2 ** (cents * instrument.detune_cents / 1200) * size / rate
            index = (clock[:length] * step + slide + rng.uniform(0, size)).astype(np.int64) & (size - 1)
            tone = bright[index]
            if fall is not None:
                low = dark[index]
                tone -= low
                tone *= fall[:length]
                tone += low
            if instrument.kind == "bell" and 2.756 * hertz < 0.45 * rate:  # an inharmonic partial
                tone += 0.4 * np.sin(np.float32(2 * np.pi * hertz * 2.756) * t[:length])
            if instrument.breath:
                tone += np.float32(8 * instrument.breath) * np.diff(rng.standard_normal(length + 1, dtype=np.float32))
            tone *= envelope
            left, right = _pan(min(1.0, max(-1.0, place + side)))[:, 0]
            out[0, start : start + length] += left * tone
            out[1, start : start + length] += right * tone
    return out


# ------------------------------------------------------------------------------------------------- recorded

PROGRAMS = {  # of General MIDI, from 0. Choirs and what sounds like one are left out: they are voices.
    "plucked": (24, 25, 26, 27, 28, 45, 46, 15, 105, 107), "piano": (0, 1, 2, 3, 6), "epiano": (4, 5, 7),
    "bell": (8, 9, 10, 11, 12, 13), "organ": (16, 17, 18, 19, 20, 21), "pad": (48, 49, 50, 51, 88, 89, 90, 95),
    "saw": (62, 63, 80, 81, 84, 90), "guitar": (29, 29, 30, 30, 27), "solo guitar": (25, 26, 27, 29, 30),
    "brass": (56, 57, 59, 60, 61, 64, 65, 66), "strings": (40, 41, 42, 44, 48, 49, 110),
    "flute": (68, 69, 71, 72, 73, 74, 75, 22), "bass": (32, 33, 33, 34, 34, 35, 36, 37, 38, 39),
}  # fmt: skip
KITS = (0, 0, 8, 8, 16, 16, 24, 25, 32, 40)
KIT = {  # keys of the drums in a kit
    "kick": (35, 36), "snare": (38, 38, 40, 37, 39), "closed": (42, 42, 44, 51, 59, 46), "opened": (46, 46, 51, 53),
    "shaker": (54, 69, 70, 82), "tom": (41, 43, 45, 47, 48, 50), "crash": (49, 57, 55, 52),
}  # fmt: skip


@cache
def _open(path: str) -> SoundFont:
    """A sound font, looked into once."""
    return SoundFont(path)


class _Recorded:
    """Chooses which parts of a song a sound font plays, and with what."""

    share = 0.7
    """How often a part is given to it."""

    def __init__(self, rng: Generator, font: SoundFont, rate: int) -> None:
        self.rng, self.font, self.rate = rng, font, rate

    def play(self, family: str, notes: list[_Note], samples: int) -> Array | None:
        """The notes on a recorded instrument of a family, (c, t); none where the part is left to the wavetables."""
        known = [n for n in PROGRAMS[family] if (0, n) in self.font.presets]
        if self.rng.random() > self.share or not known:
            return None
        if family == "guitar":  # power chords, as `_table` has them
            shifts = (-12, -5, 0)
            notes = [_Note(n.start, n.seconds, n.pitch + shift, n.velocity) for n in notes for shift in shifts]
        sound = self.font.play(notes, int(self.rng.choice(known)), samples, self.rate)
        return sound if np.abs(sound).max() > 1e-3 else None  # a font need not have every note

    def kit(self) -> dict[str, Array]:
        """One-shots of a drum kit, each (t,) and at most 1; none where the drums are left to the synthesiser.

        A kit need not have every drum: what it lacks is left out.
        """
        known = [n for n in KITS if (DRUMS, n) in self.font.presets]
        if self.rng.random() > self.share or not known:
            return {}
        program, seconds = int(self.rng.choice(known)), 1.6
        hits = [
            _Note(2 * i * seconds, seconds, int(self.rng.choice(keys)), self.rng.uniform(0.6, 1.0))
            for i, keys in enumerate(KIT.values())
        ]
        length = round(seconds * self.rate)
        fade = np.linspace(1, 0, length // 10, dtype=np.float32)
        sound = self.font.play(hits, program, 2 * len(KIT) * length, self.rate, bank=DRUMS).mean(0)
        shots = {}
        for i, name in enumerate(KIT):
            shot = sound[2 * i * length :][:length]
            shot[-len(fade) :] *= fade
            places = np.arange(0, length - 1, self.rng.uniform(0.85, 1.2))  # tuned a little up or down
            shot = np.interp(places, np.arange(length), shot).astype(np.float32)
            peak = np.abs(shot).max()
            if peak > 1e-3:
                shots[name] = shot / peak
        return shots


# ---------------------------------------------------------------------------------------------- bass, other


def _bass(rng: Generator, score: _Score, rate: int, samples: int, recorded: _Recorded | None) -> Array:
    """A bass line on the roots of the chords, (c, t)."""
    if rng.random() < 0.06:
        return np.zeros((2, samples), np.float32)
    instrument = _draw_instrument(rng, rng.choice(["sub", "fingered", "fingered", "synth bass", "swept bass"]))
    style = rng.choice(["eighths", "syncopated", "long", "octaves", "walking", "offbeat"])
    rhythm = {
        "eighths": list(range(0, 16, 2)), "octaves": list(range(0, 16, 2)),
        "long": [0, 8] if rng.random() < 0.5 else [0],
        "walking": [0, 4, 8, 12], "offbeat": [2, 6, 10, 14],
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
        notes.append(_Note(score.time(step), length, pitch, rng.uniform(0.75, 1.0)))
    line = recorded.play("bass", notes, samples) if recorded else None
    if line is None:
        line = _play(rng, notes, instrument, rate, samples)
    else:
        line /= np.sqrt(2 * np.mean(line**2))  # as loud as a wavetable
    if rng.random() < 0.4:  # an overdriven amplifier
        drive = np.float32(rng.uniform(1, 4))
        line = np.tanh(drive * line) / drive
    return line


def _voicing(chord: tuple[int, ...], low: int) -> list[int]:
    """The chord's pitches in close position above `low`."""
    return sorted(low + (p - low) % 12 for p in chord)


def _accompany(rng: Generator, score: _Score, rate: int, samples: int, recorded: _Recorded | None) -> Array:
    """Two or three layers: chords that hold or are struck, an arpeggio, a solo line; (c, t)."""
    choice = ["struck", "struck", "struck", "arpeggio", "arpeggio", "solo"]  # a lead beside the voice is the exception
    layers = ["chords", *rng.choice(choice, rng.integers(1, 3), replace=False).tolist()]
    if rng.random() < 0.25:
        layers[0] = "struck"
    families = {
        "chords": ["pad", "pad", "organ", "strings", "strings", "epiano", "guitar", "saw", "brass"],
        "struck": ["plucked", "plucked", "piano", "piano", "epiano", "guitar", "organ", "saw", "brass"],
        "arpeggio": ["plucked", "saw", "bell", "epiano", "piano"],
        "solo": ["flute", "strings", "brass", "saw", "solo guitar", "solo guitar", "bell"],
    }
    out = np.zeros((2, samples), np.float32)
    for layer in layers:
        family = str(rng.choice(families[layer]))
        instrument = _draw_instrument(rng, family)
        notes = {"chords": _held, "struck": _struck, "arpeggio": _arpeggio, "solo": _solo}[layer](rng, score)
        if family == "guitar":  # power chords: one note carries its fifth
            lowest: dict[float, _Note] = {}
            for note in notes:
                lowest.setdefault(note.start, note)
            notes = [_Note(n.start, n.seconds, 40 + (n.pitch - 40) % 12, n.velocity) for n in lowest.values()]
        spread = rng.uniform(0, 0.8) if layer != "solo" else 0.0
        sound = recorded.play(family, notes, samples) if recorded else None
        if sound is None:
            sound = _play(rng, notes, instrument, rate, samples, spread=spread)
        power = np.sqrt(np.mean(sound**2)) + 1e-9
        gain = 10 ** (rng.normal(-1 if layer == "solo" else 0, 2.5) / 20) / power
        balance = _pan(rng.uniform(-0.85, 0.85))  # instruments stand aside, the voice in the middle
        out += sound * (np.float32(gain) * balance)
    return out


def _held(rng: Generator, score: _Score) -> list[_Note]:
    low, length = int(rng.integers(48, 62)), int(rng.choice([8, 16]))
    notes = []
    for step in range(0, score.steps, length):
        for pitch in _voicing(score.chord(step), low):
            notes.append(_Note(score.time(step), length * score.step * 0.98, pitch, rng.uniform(0.7, 1)))
    return notes


def _struck(rng: Generator, score: _Score) -> list[_Note]:
    low = int(rng.integers(46, 64))
    pattern = np.arange(0, 16, rng.choice([2, 4]))
    if rng.random() < 0.6:
        pattern = np.sort(rng.choice(16, rng.integers(3, 9), replace=False))
    strum, length = rng.uniform(0, 0.012), rng.uniform(1, 4)
    notes = []
    for bar in range(0, score.steps, 16):
        for s in pattern:
            step = bar + int(s)
            velocity = rng.uniform(0.55, 1)
            for i, pitch in enumerate(_voicing(score.chord(step), low)):
                notes.append(_Note(score.time(step) + i * strum, length * score.step, pitch, velocity))
    return notes


def _arpeggio(rng: Generator, score: _Score) -> list[_Note]:
    low, every = int(rng.integers(55, 76)), int(rng.choice([1, 2, 2]))
    order = rng.permutation(6)
    notes = []
    for i, step in enumerate(range(0, score.steps, every)):
        voicing = _voicing(score.chord(step), low)
        ladder = voicing + [p + 12 for p in voicing]
        pitch = ladder[order[i % 6] % len(ladder)]
        notes.append(_Note(score.time(step), every * score.step * 1.2, pitch, rng.uniform(0.6, 1)))
    return notes


def _solo(rng: Generator, score: _Score) -> list[_Note]:
    """A melody in the range of voices, with rests."""
    degree = 7 * int(rng.integers(4, 6)) + int(rng.integers(7))
    step, notes = int(rng.integers(0, 8)), []
    while step < score.steps:
        length = int(rng.choice([1, 2, 3, 4, 6, 8]))
        degree = min(max(degree + int(rng.integers(-3, 4)), 26), 44)
        if rng.random() < 0.85:
            notes.append(_Note(score.time(step), length * score.step, score.degree(degree), rng.uniform(0.7, 1)))
        step += length
    return notes


# ---------------------------------------------------------------------------------------------------- drums


def _filter(signal: Array, gain: Callable[[Array], Array], rate: int) -> Array:
    """Multiply the spectrum of (..., t) with a gain that is a function of the frequency in Hz (from 1 on)."""
    samples = signal.shape[-1]
    length = _fast_length(samples)
    response = gain(np.maximum(np.fft.rfftfreq(length, 1 / rate), 1.0)).astype(np.float32)
    return np.fft.irfft(np.fft.rfft(signal, length) * response, length)[..., :samples].astype(np.float32)


def _band(signal: Array, low: float, high: float, rate: int) -> Array:
    """Keep `low` to `high` Hz of (..., t), 12 dB an octave outside."""
    return _filter(signal, lambda f: 1 / np.sqrt((1 + (low / f) ** 4) * (1 + (f / high) ** 4)), rate)


def _kick(rng: Generator, rate: int) -> Array:
    t = np.arange(int(0.45 * rate)) / rate
    low, sweep, speed = rng.uniform(42, 62), rng.uniform(80, 350), rng.uniform(0.008, 0.04)
    phase = 2 * np.pi * (low * t - sweep * speed * np.exp(-t / speed))
    tone = np.sin(phase) * np.exp(-t / rng.uniform(0.07, 0.22))
    click = _band(rng.standard_normal(len(t), dtype=np.float32), 1_500, 7_000, rate) * np.exp(-t / 0.004)
    return np.tanh(rng.uniform(1, 2.5) * (tone + rng.uniform(0.1, 0.8) * click)).astype(np.float32)


def _snare(rng: Generator, rate: int) -> Array:
    t = np.arange(int(0.4 * rate)) / rate
    body = rng.uniform(150, 260)
    phase = 2 * np.pi * body * t
    tone = (np.sin(phase + 2 * np.exp(-t / 0.02)) + 0.6 * np.sin(1.6 * phase)) * np.exp(-t / rng.uniform(0.03, 0.1))
    noise = rng.standard_normal(len(t), dtype=np.float32)
    rattle = _band(noise, rng.uniform(700, 2_500), rng.uniform(7_000, 15_000), rate) * np.exp(
        -t / rng.uniform(0.05, 0.16)
    )
    return (rng.uniform(0.3, 1) * tone + rng.uniform(0.6, 1.2) * rattle).astype(np.float32)


def _clap(rng: Generator, rate: int) -> Array:
    t = np.arange(int(0.3 * rate)) / rate
    envelope = np.exp(-t / rng.uniform(0.05, 0.12)) * 0.7
    for delay in np.cumsum(rng.uniform(0.006, 0.014, 3)):
        envelope += np.where(t >= delay, np.exp(-np.maximum(t - delay, 0) / 0.006), 0)
    noise = rng.standard_normal(len(t), dtype=np.float32)
    return (_band(noise, rng.uniform(700, 1_200), rng.uniform(2_500, 9_000), rate) * envelope).astype(np.float32)


def _cymbal(rng: Generator, rate: int, decay: float, low: float, metal: float) -> Array:
    """Hi-hat, shaker or crash: noise and a cluster of squares above `low` Hz."""
    t = np.arange(int(min(5 * decay + 0.02, 1.6) * rate)) / rate
    sound = rng.standard_normal(len(t), dtype=np.float32)
    if metal:
        base = rng.uniform(300, 560)
        cluster = sum(np.sign(((base * r * t) % 1.0) - 0.5) for r in (1.0, 1.34, 1.93, 2.32, 2.62, 3.81))
        sound = sound + metal * np.asarray(cluster, np.float32)
    envelope = np.exp(-t / decay) * np.minimum(t / 0.001, 1)
    steep = _band(sound.astype(np.float32), low, rng.uniform(9_000, 15_000), rate) * envelope
    return steep.astype(np.float32)


def _tom(rng: Generator, rate: int, hertz: float) -> Array:
    t = np.arange(int(0.4 * rate)) / rate
    return (np.sin(2 * np.pi * hertz * (t - 0.02 * np.exp(-t / 0.04))) * np.exp(-t / 0.13)).astype(np.float32)


def _drum(rng: Generator, score: _Score, rate: int, samples: int, recorded: _Recorded | None) -> Array:
    """A drum kit on a pattern with variations and fills, (c, t)."""
    out = np.zeros((2, samples), np.float32)
    if rng.random() < 0.06:
        return out

    def hit(sound: Array, step: int, velocity: float, pan: float) -> None:
        start = max(0, round((score.time(step) + human * rng.standard_normal()) * rate))
        length = min(len(sound), samples - start)
        if length > 0:
            out[:, start : start + length] += _pan(pan) * (np.float32(velocity) * sound[:length])

    human = rng.uniform(0, 0.004)
    style = rng.choice(["rock", "house", "hip hop", "half time", "broken"], p=[0.35, 0.2, 0.2, 0.1, 0.15])
    kicks = {
        "rock": {0, 8},
        "house": {0, 4, 8, 12},
        "hip hop": {0, 7, 10},
        "half time": {0, 6},
        "broken": {0, 3, 10},
    }[style]
    snares = {"half time": {8}}.get(style, {4, 12})
    every = int(rng.choice([1, 2, 2, 2, 4]))
    kick = _kick(rng, rate)
    snare = _clap(rng, rate) if rng.random() < 0.3 else _snare(rng, rate)
    hat_low = rng.uniform(5_500, 8_500)
    closed = _cymbal(rng, rate, rng.uniform(0.02, 0.05), hat_low, rng.choice([0, 0.5]))
    opened = _cymbal(rng, rate, rng.uniform(0.12, 0.3), hat_low, rng.choice([0, 0.5]))
    hat_level, hat_pan = 10 ** (rng.uniform(-16, -6) / 20), rng.uniform(-0.5, 0.5)
    shaker = _cymbal(rng, rate, 0.04, rng.uniform(4_000, 6_500), 0) if rng.random() < 0.25 else None
    offbeat = style == "house" or rng.random() < 0.2
    kit = recorded.kit() if recorded else {}
    if kit:
        kick, snare = kit.get("kick", kick), kit.get("snare", snare)
        closed, opened = kit.get("closed", closed), kit.get("opened", opened)
        shaker = shaker if shaker is None else kit.get("shaker", shaker)
        hat_level *= 10 ** (rng.uniform(0, 9) / 20)  # cymbals may drown all that hisses in a voice
    for bar in range(0, score.steps, 16):
        ghosts = set(rng.choice(16, 2, replace=False).tolist()) if rng.random() < 0.5 else set()
        fill = rng.random() < 0.2
        tom = _tom(rng, rate, rng.uniform(80, 200)) if fill else kick
        if fill:
            tom = kit.get("tom", tom)
        if rng.random() < (0.4 if kit else 0.15):
            crash = kit["crash"] if "crash" in kit else _cymbal(rng, rate, rng.uniform(0.4, 0.8), 3_000, 0.4)
            hit(crash, bar, rng.uniform(0.2, 0.4), rng.uniform(-0.6, 0.6))
        for s in range(16):
            step = bar + s
            if step >= score.steps:
                break
            if fill and s >= 12:
                hit(tom if s % 2 else snare, step, rng.uniform(0.5, 0.9), (s - 13.5) / 3)
                continue
            if s in kicks or (s in ghosts and rng.random() < 0.5):
                hit(kick, step, rng.uniform(0.85, 1.0), 0.0)
            if s in snares:
                hit(snare, step, rng.uniform(0.7, 0.95), 0.0)
            elif s in ghosts and rng.random() < 0.3:
                hit(snare, step, rng.uniform(0.1, 0.25), 0.0)
            if offbeat and s % 4 == 2:
                hit(opened, step, hat_level * rng.uniform(0.8, 1), hat_pan)
            elif s % every == 0:
                hit(closed, step, hat_level * (1.0 if s % 4 == 0 else rng.uniform(0.5, 0.9)), hat_pan)
            if shaker is not None:
                hit(shaker, step, 0.15 * rng.uniform(0.4, 1), -hat_pan)
    return out


# ------------------------------------------------------------------------------------------------------ mix


def _fast_length(samples: int) -> int:
    """The least length of at least `samples` that is quick to transform."""
    return min(m << max(0, math.ceil(math.log2(samples / m))) for m in (1, 3, 5, 9, 15))


BLOCK = 4_096
"""Samples in a block of the fast convolution."""


def _convolve(signal: Array, kernel: Array) -> Array:
    """Convolution of (c, t) with (c, taps), cut to (c, t), in blocks that are transformed once."""
    channels, samples = signal.shape
    blocks, parts = -(-samples // BLOCK), -(-kernel.shape[1] // BLOCK)
    padded = np.zeros((channels, (blocks + 1) * BLOCK), np.float32)
    padded[:, BLOCK : BLOCK + samples] = signal
    pairs = np.lib.stride_tricks.sliding_window_view(padded, 2 * BLOCK, axis=1)[:, ::BLOCK]  # overlap-save
    spectra = np.fft.rfft(pairs)
    taps = np.zeros((kernel.shape[0], parts * BLOCK), np.float32)
    taps[:, : kernel.shape[1]] = kernel
    filters = np.fft.rfft(taps.reshape(-1, parts, BLOCK), 2 * BLOCK)
    total = spectra * filters[:, :1]
    for p in range(1, min(parts, blocks)):
        total[:, p:] += spectra[:, : blocks - p] * filters[:, p : p + 1]
    return np.fft.irfft(total, 2 * BLOCK)[..., BLOCK:].reshape(channels, -1)[:, :samples].astype(np.float32)


def _equaliser(rng: Generator, rate: int, spread: float = 1.8) -> Array:
    """A smooth random filter, (taps,) with its middle at BLOCK / 2; it takes out rumble and offset.

    `spread` is the standard deviation in dB of each of its points.
    """
    points = np.array([-7.0, -5.0, -4.3, -3, -2, -1, 0, 1, 2, 3, 4, 4.6])  # octaves about 1 kHz
    decibels = rng.normal(0, spread, len(points)) + rng.normal(0, 0.8) * points
    decibels[:2] = (-60, -9)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(BLOCK, 1 / rate), 1) / 1_000)
    response = 10 ** (np.interp(octaves, points, decibels) / 20)
    response[0] = 0
    taps = np.roll(np.fft.irfft(response), BLOCK // 2) * np.hanning(BLOCK + 1)[:-1]
    return (taps - taps.mean()).astype(np.float32)


def _room(rng: Generator, rate: int) -> Array:
    """Impulse response (c, taps) of a room of unit energy: a few echoes, then noise that dies away."""
    decay = rng.uniform(0.06, 0.25)
    samples = int(3.5 * decay * rate)
    t = np.arange(samples, dtype=np.float32) / rate
    impulse = rng.standard_normal((2, samples), dtype=np.float32) * (np.exp(-t / np.float32(decay)) * (1 - t / t[-1]))
    impulse[:, : int(rng.uniform(0.002, 0.03) * rate)] = 0
    for _ in range(4):
        impulse[rng.integers(2), rng.integers(samples // 4)] += rng.normal(0, 6)
    impulse = _band(impulse, 200, rng.uniform(2_500, 9_000), rate)
    return impulse / np.sqrt((impulse**2).sum() / 2)


def _finish(stem: Array, equaliser: Array, room: Array, wet: float) -> Array:
    """Filter a stem (c, t) and put it into the room at the level `wet` beside the direct sound."""
    length = _fast_length(len(equaliser) + room.shape[1])
    spectrum = np.fft.rfft(equaliser, length) * (1 + np.float32(wet) * np.fft.rfft(room, length))
    kernel = np.fft.irfft(spectrum, length)[:, : len(equaliser) + (room.shape[1] if wet else 0)].astype(np.float32)
    return _convolve_centred(stem, kernel, len(equaliser) // 2)


def _convolve_centred(signal: Array, kernel: Array, middle: int) -> Array:
    """`_convolve` with a kernel whose time zero is at `middle`: what comes out is not late."""
    return _convolve(np.pad(signal, ((0, 0), (0, middle))), kernel)[:, middle:]


def _gate(phrases: Intervals, rate: int, samples: int) -> Array:
    """1 within the phrases, 0 elsewhere, with 5 ms of fade in and the tail's fade out, (t,)."""
    gate = np.zeros(samples, np.float32)
    for i, (start, end) in enumerate(phrases):
        a, b = round(start * rate), min(samples, round(end * rate))
        gate[a:b] = 1
        if a > 0:
            rise = min(b - a, round(0.005 * rate))
            gate[a : a + rise] = np.linspace(0, 1, rise)
        rest = phrases[i + 1][0] - end if i + 1 < len(phrases) else TAIL_SECONDS * 2
        fade = round(min(TAIL_SECONDS, rest / 2) * rate)
        gate[b : b + fade] = (np.cos(np.linspace(0, np.pi / 2, fade)) ** 4)[: samples - b]
    return gate


def _sway(rng: Generator, signal: Array, delay: float, rate: int) -> Array:
    """A signal (t,) late by about `delay` milliseconds, more and less by turns, as a second take or a chorus is."""
    places = np.arange(len(signal))
    sway = rng.uniform(0.5, 3) * np.sin(2 * np.pi * (rng.uniform(0.2, 0.9) * places / rate + rng.random()))
    return np.interp(places - (delay + sway) * rate / 1_000, places, signal, left=0).astype(np.float32)


def _amplify(rng: Generator, stem: Array, rate: int) -> Array:
    """A stem (c, t) through two driven amplifiers, one a channel, played twice as rhythm guitars are.

    Clipping makes chords that hold: their difference tones fill 80 to 500 Hz, where voices and basses are.
    """
    out = np.empty_like(stem)
    root = math.sqrt(float(np.mean(stem**2)))
    drive, bias, blend = 10 ** (rng.uniform(6, 32) / 20), rng.uniform(0, 0.4), rng.uniform(0, 1)
    low, thump, gain = rng.uniform(60, 120), rng.uniform(90, 300), 10 ** (rng.uniform(0, 9) / 20)
    top = rng.uniform(2_500, 5_500)

    def cabinet(hertz: Array) -> Array:
        resonance = 1 + (gain - 1) * np.exp(-((np.log2(hertz / thump) / 0.7) ** 2))
        return resonance / np.sqrt((1 + (low / hertz) ** 4) * (1 + (hertz / top) ** 8))

    middle = stem.mean(0)
    for channel in (0, 1):
        string = np.float32(blend) * stem[channel] + np.float32(1 - blend) * middle
        if channel:
            string = _sway(rng, string, rng.uniform(3, 20), rate)
        driven = np.tanh(string * np.float32(drive / root) + np.float32(bias))
        out[channel] = _filter(driven, cabinet, rate)
    return out


def _dull(rng: Generator, voice: Array, mix_variety: float, rate: int) -> None:
    """Take up to 18 dB of the treble from a voice (c, t) in place, by chance in proportion to `mix_variety`.

    Singers differ in how much they hiss, and de-essers and soft microphones take more of it.
    """
    corner, depth = rng.uniform(1_500, 5_000), 10 ** (-rng.uniform(3, 18) / 20)
    if rng.random() < 0.7 * mix_variety and voice.any():
        voice[:] = _filter(voice, lambda hertz: (1 + depth * (hertz / corner) ** 2) / (1 + (hertz / corner) ** 2), rate)


def _produce(rng: Generator, stems: Array, mix_variety: float, rate: int) -> float:
    """Change stems (s, c, t) in place as recordings do, and draw how many dB the voice moves beside the band.

    The bass growls, driven and with its middle raised; the band plays through two amplifiers, left and right, and the
    bass is wide; the voice is cut below its formants; stems are driven into saturation and filtered; the band moves
    from the sides to the middle; the voice gets doubles at the sides whose delay sways, and echoes; and it sinks by up
    to 9 dB. All of it by chance, in proportion to `mix_variety`. Levels are set afterwards.
    """
    if not mix_variety:
        return 0.0
    bass = stems[STEMS.index("bass")]
    power = float(np.mean(bass**2))
    if rng.random() < mix_variety and power:
        drive = 10 ** (rng.uniform(0, 24) / 20)
        steep, top = rng.uniform(0.3, 1.6), rng.uniform(400, 1_500)
        driven = np.tanh(bass * np.float32(drive / math.sqrt(power)))
        bass[:] = _filter(driven, lambda hertz: np.clip(hertz, 60, top) ** steep / (1 + (hertz / (4 * top)) ** 2), rate)
    other = stems[STEMS.index("other")]
    if rng.random() < 0.6 * mix_variety and other.any():
        other[:] = _amplify(rng, other, rate)
    if rng.random() < 0.5 * mix_variety and bass.any():
        level, delay = rng.uniform(0.05, 0.35), rng.uniform(4, 15)
        wide = np.float32(level) * _sway(rng, bass.mean(0), delay, rate)
        bass += np.stack((wide, -wide))
    if rng.random() < mix_variety:
        corner, order = rng.uniform(150, 600), rng.uniform(1, 2.5)
        stems[0][:] = _filter(stems[0], lambda hertz: 1 / np.sqrt(1 + (corner / hertz) ** (2 * order)), rate)
    for stem in stems:
        power = float(np.mean(stem**2))
        drive = 10 ** (rng.uniform(-10, 12) / 20)
        if rng.random() < 0.6 * mix_variety and power:
            stem[:] = np.tanh(stem * np.float32(drive / math.sqrt(power)))
        if rng.random() < mix_variety:
            taps = _equaliser(rng, rate, spread=4.0)
            stem[:] = _convolve_centred(stem, taps[None].repeat(2, 0), BLOCK // 2)
    for stem in stems[1:]:
        narrow = (stem[0] - stem[1]) * np.float32(0.5 * mix_variety * rng.random())
        stem -= np.stack((narrow, -narrow))
    voice, dry = stems[0], stems[0].copy()
    samples = voice.shape[1]
    if rng.random() < 0.4 * mix_variety:
        level = rng.uniform(0.2, 0.9)
        for side in (0, 1):
            voice[side] += np.float32(level) * _sway(rng, dry.mean(0), rng.uniform(10, 35), rate)
    if rng.random() < 0.4 * mix_variety:
        level, delay = rng.uniform(0.1, 0.4), round(rng.uniform(0.07, 0.4) * rate)
        for i in range(1, 1 + (samples - 1) // delay):
            voice[i % 2, i * delay :] += np.float32(level**i) * dry.mean(0)[: samples - i * delay]
    return float(rng.uniform(-9, 1)) * mix_variety


def _mix(
    rng: Generator,
    stems: dict[str, Array],
    phrases: Intervals,
    score: _Score,
    rate: int,
    produce: Callable[[Array], float],
) -> Array:
    """Filter, place in a room, produce, gate and level the stems, (s, c, t)."""
    samples = stems["drums"].shape[1]
    room = _room(rng, rate)
    out = np.zeros((len(STEMS), 2, samples), np.float32)
    levels = {}
    for s, name in enumerate(STEMS):
        equaliser = _equaliser(rng, rate)
        most = {"vocals": 0.25 * (rng.random() < 0.7), "drums": 0.3, "bass": 0.0, "other": 0.5}[name]
        wet = most * rng.random()
        levels[name] = rng.normal({"vocals": 0, "drums": 0, "bass": -1, "other": 0.5}[name], 2.5)
        if stems[name].any():
            out[s] = _finish(stems[name], equaliser, room, wet)
    sinks = produce(out)
    late = rng.random() < 0.1
    if late:  # one stem of the band enters half a bar or a bar late
        entry = min(samples, round(min(score.time(int(rng.choice([8, 16]))), score.seconds / 2) * rate))
        out[1 + rng.integers(3), :, :entry] = 0
    for s, name in enumerate(STEMS[1:], start=1):
        power = math.sqrt(float(np.mean(out[s] ** 2)))
        if power > 0:
            out[s] *= 10 ** (float(levels[name]) / 20) / power
    if phrases:
        out[0] *= _gate(phrases, rate, samples)
        vocal_segments = np.zeros(samples, bool)
        for start, end in phrases:
            vocal_segments[round(start * rate) : round(end * rate)] = True
        band = out[1:].sum(axis=0)
        reference = float(np.mean(band[:, vocal_segments] ** 2)) or float(np.mean(band**2)) or 1.0
        wanted = min(6.0, max(-6.0, float(levels["vocals"]))) + sinks
        out[0] *= math.sqrt(reference * 10 ** (wanted / 10) / (float(np.mean(out[0][:, vocal_segments] ** 2)) + 1e-20))
    peak = float(np.abs(out.sum(axis=0)).max())
    return out * np.float32(rng.uniform(0.5, 0.95) / (peak or 1.0))


# -------------------------------------------------------------------------------------------------- excerpt


def excerpt() -> Song:
    """The real excerpt that the stempeg package carries: 6.08 s of "Falcon 69" by The Easton Ellises.

    The mixture is the sum of the stems; the file's own mixture stream differs from it.  `vocal_segments` is measured:
    20 ms blocks of the vocals that are less than 12 dB under their overall level, with gaps under 0.2 s
    closed and regions under 0.1 s dropped.  Samples may pass 1.  stempeg's README states the licence.

    Raises ImportError where the stempeg package or PyAV is missing.  stempeg is looked up, not imported:
    importing it demands an ffmpeg program.
    """
    spec = importlib.util.find_spec("stempeg")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the real excerpt is a file of the stempeg package, which is missing: "
            "pip install --no-deps stempeg, or the extra bsmamba2[book]"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("data/*Falcon 69.stem.mp4"))
    if not found:
        raise ImportError("this stempeg package has no Falcon 69 excerpt: pip install --no-deps stempeg==0.2.6")
    order = ("mixture", "drums", "bass", "other", "vocals")  # of the file's streams
    stems = torch.stack([_decode(found[0], order.index(name)) for name in STEMS])
    return Song(
        name="falcon-69",
        stems=stems,
        sample_rate=SAMPLE_RATE,
        vocal_segments=_measure_sung(stems[0].numpy(), SAMPLE_RATE),
        licence="CC BY-NC-SA 3.0",
        source='"Falcon 69" by The Easton Ellises, excerpt carried by the stempeg package on PyPI',
    )


def _decode(path: Path, stream: int) -> torch.Tensor:
    """One audio stream of a file, (c=2, t) float32."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading the real excerpt takes PyAV: pip install av, or bsmamba2[book]") from error
    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SAMPLE_RATE)
        pieces = [
            out.to_ndarray()
            for frame in container.decode(container.streams.audio[stream])
            for out in resampler.resample(frame)
        ]
    return torch.from_numpy(np.concatenate(pieces, axis=1).astype(np.float32))


def _measure_sung(vocals: Array, rate: int, below: float = 12.0, shortest: float = 0.1) -> Intervals:
    """Regions of (c, t) whose 20 ms blocks are less than `below` dB under the overall level, in seconds."""
    block = round(0.02 * rate)
    blocks = vocals.shape[1] // block
    power = (vocals[:, : blocks * block] ** 2).mean(axis=0).reshape(blocks, block).mean(axis=1)
    loud = np.flatnonzero(power > power.mean() * 10 ** (-below / 10))
    spans: list[tuple[float, float]] = []
    for i in loud:
        start, end = float(i * block / rate), float((i + 1) * block / rate)
        if spans and start - spans[-1][1] < 2 * shortest:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return tuple((start, end) for start, end in spans if end - start >= shortest)
