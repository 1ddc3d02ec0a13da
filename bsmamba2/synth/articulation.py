"""Articulation: melody, vowels and consonants of the sung phrases, frame by frame."""

import numpy as np
from numpy.random import Generator

from .filters import smooth, smooth_noise
from .score import Note, Score
from .song import Array, Intervals

# Formants of an adult man in Hz: a i u e o schwa ae, then w j r l.
VOWELS = np.array([
    [730, 1090, 2440, 3400, 4300], [270, 2290, 3010, 3600, 4400], [300, 870, 2240, 3300, 4200],
    [530, 1840, 2480, 3500, 4300], [570, 840, 2410, 3300, 4200], [500, 1400, 2450, 3450, 4300],
    [660, 1720, 2410, 3450, 4300],
])  # fmt: skip
GLIDES = np.array([
    [300, 700, 2200, 3200, 4200], [290, 2200, 2900, 3500, 4300], [360, 1200, 1650, 3100, 4200],
    [350, 1050, 2700, 3400, 4200],
])  # fmt: skip
SCHWA, NASAL = VOWELS[5], np.array([260.0, 1150.0, 2200.0, 3200.0, 4200.0])
NOISES = ((5_200, 14_000), (2_300, 7_500), (1_200, 14_000), (400, 1_800), (3_400, 10_000), (1_400, 3_200))
"""Noise bands in Hz: fricatives s, sh, f, then the bursts of p, t, k."""
FRICATIVE_LEVELS, FINAL_LEVELS, BURST_LEVELS = (0.22, 0.3, 0.1), (0.18, 0.25, 0.1), (0.35, 0.4, 0.35)
CONSONANTS = {
    "none": (0.16, 0.0, 1.0, 1.0), "fricative": (0.18, 0.14, 0.5, 1.0), "stop": (0.2, 0.09, 0.4, 0.0),
    "voiced stop": (0.14, 0.05, 1.0, 0.2), "nasal": (0.14, 0.1, 0.6, 0.45), "glide": (0.12, 0.08, 0.6, 0.7),
    "h": (0.06, 0.07, 1.0, 0.1),
}  # fmt: skip
"""Initial consonants: probability, longest duration in s, shortest as a fraction of the longest, voicing level."""
INTERVALS = {-4: 0.03, -3: 0.05, -2: 0.13, -1: 0.2, 0: 0.2, 1: 0.19, 2: 0.12, 3: 0.05, 4: 0.03}
"""Steps of a melody in scale degrees, with their probabilities."""
DIPHTHONG_PROB, FINAL_FRICATIVE_PROB = 0.2, 0.35


class Singer:
    """Range, timbre and habits of a singer, drawn at random: a low, a high or, less often, a very high voice."""

    def __init__(self, rng: Generator) -> None:
        kind = rng.choice(3, p=[0.45, 0.47, 0.08])
        self.low = (rng.uniform(43, 52), rng.uniform(53, 60), rng.uniform(58, 63))[kind]  # lowest pitch
        tracts = (rng.uniform(0.94, 1.06), rng.uniform(1.1, 1.22), rng.uniform(1.24, 1.38))
        self.formant_scale = tracts[kind]  # relative to an adult man
        self.high = self.low + rng.uniform(12, 19)  # highest pitch
        self.bandwidths = (np.array([70, 90, 130, 190, 280]) * rng.uniform(0.7, 1.5, 5)).astype(np.float32)  # Hz
        self.tilt = rng.uniform(0.7, 1.4)  # exponent with which the formants' level falls with frequency
        self.ring = rng.uniform(-5, 5)  # level of the third and fourth formant, dB
        self.breath = 10 ** rng.uniform(-2.0, -0.9)  # level of the aspiration noise relative to the voice
        self.vibrato_rate = rng.uniform(5.0, 6.5)  # Hz
        self.vibrato_cents = rng.uniform(20, 60) * (rng.random() < 0.75)
        self.vibrato_delay = rng.uniform(0.12, 0.4)  # seconds
        self.portamento = rng.uniform(0.04, 0.2)  # seconds
        self.jitter_cents = rng.uniform(2, 8)
        self.drift_cents = rng.uniform(5, 40)  # slow variation of the pitch
        self.bend_prob = rng.uniform(0.1, 0.6)  # per note
        self.consonant_level = 10 ** rng.uniform(-0.15, 0.45)
        self.syllable = rng.uniform(1.6, 4.5)  # mean duration in sixteenths


class Controls:
    """Control signals of the voice, one value per STFT frame, (k,) unless noted."""

    def __init__(self, frames: int) -> None:
        self.pitch = np.full(frames, np.nan)  # MIDI number
        self.voicing = np.zeros(frames)  # level of the glottal source
        self.breath = np.zeros(frames)  # level of the aspiration noise
        self.noise = np.zeros((frames, len(NOISES)))  # (k, noise), levels of `NOISES`
        self.formants = np.tile(SCHWA.astype(float), (frames, 1))  # (k, 5), Hz
        self.vibrato = np.zeros(frames)  # depth, 0 to 1


def articulate(rng: Generator, singer: Singer, score: Score, phrases: Intervals, frame: float, frames: int) -> Controls:
    """Render notes, vowels and consonants of all phrases to control signals with frames of `frame` seconds."""
    track = Controls(frames)
    for start, end in phrases:
        if end < score.seconds and end - start > 0.3:
            end -= 0.05  # the last note dies away within the phrase
        notes = _draw_melody(rng, singer, score, start, end)
        arc = rng.uniform(0.0, 0.35)
        for note in notes:
            through = (note.start - start) / (end - start)
            level = note.velocity * (1 - arc * (2 * through - 1) ** 2)
            _sing_note(rng, singer, track, note, level, note is notes[-1], frame)
    known = np.flatnonzero(~np.isnan(track.pitch))
    pitch = np.interp(np.arange(frames), known, track.pitch[known]) if len(known) else np.full(frames, 60.0)
    jitter = smooth_noise(rng, frames, 3) * np.float32(singer.jitter_cents / 100)
    drift = smooth_noise(rng, frames, 0.25 / frame) * np.float32(singer.drift_cents / 100)
    shimmer = 1 + 0.06 * rng.standard_normal(frames)
    track.pitch = smooth(pitch, singer.portamento / frame) + jitter + drift
    track.voicing = smooth(track.voicing * shimmer, 0.03 / frame)
    track.breath = smooth(track.breath, 0.03 / frame)
    track.noise = smooth(track.noise, 0.02 / frame)
    track.formants = smooth(track.formants, 0.06 / frame) * np.float32(singer.formant_scale)
    track.vibrato = smooth(track.vibrato, 0.25 / frame)
    return track


def _draw_melody(rng: Generator, singer: Singer, score: Score, start: float, end: float) -> list[Note]:
    """Notes without gaps from `start` to `end`: a random walk over the scale; long notes prefer chord tones."""
    notes = []
    degrees = [i for i in range(80) if singer.low <= score.degree(i) <= singer.high]
    position = degrees[int(rng.integers(len(degrees)))]
    time = start
    while time < end - 1e-6:
        length = max(1, rng.poisson(singer.syllable)) * score.step
        if end - time - length < 1.2 * score.step:
            length = end - time
        position += int(rng.choice(list(INTERVALS), p=list(INTERVALS.values())))
        position = min(max(position, degrees[0]), degrees[-1])
        if length >= 3 * score.step:
            chord = score.chord(int(time / score.step))
            nearby = [i for i in degrees if abs(i - position) <= 1 and score.degree(i) % 12 in chord]
            position = nearby[0] if nearby else position
        notes.append(Note(time, length, score.degree(position), rng.uniform(0.6, 1.0)))
        time += length
    return notes


def _sing_note(
    rng: Generator, singer: Singer, track: Controls, note: Note, level: float, is_last: bool, frame: float
) -> None:
    """Write one syllable into `track`: a consonant, a vowel, and a final fricative for some last notes."""
    times = (note.start, note.start + note.seconds, note.start + singer.vibrato_delay)
    a, b, onset = (min(len(track.pitch), max(0, round(time / frame))) for time in times)
    if b <= a:
        return
    vowel = VOWELS[rng.integers(len(VOWELS))] * rng.uniform(0.94, 1.06, 5)
    track.pitch[a:b], track.voicing[a:b], track.formants[a:b] = note.pitch, level, vowel
    track.breath[a:b] = level * singer.breath
    if rng.random() < DIPHTHONG_PROB:
        track.formants[(a + b) // 2 : b] = VOWELS[rng.integers(len(VOWELS))]
    if rng.random() < singer.bend_prob:
        _bend(rng, track.pitch[a:b])
    track.vibrato[onset:b] = 1.0
    kind = list(CONSONANTS)[rng.choice(len(CONSONANTS), p=[row[0] for row in CONSONANTS.values()])]
    loudness = singer.consonant_level * rng.uniform(0.5, 1.2)
    if kind != "none":
        _write_consonant(rng, kind, track, a, min(0.5 * note.seconds, 0.2), loudness, frame)
    if is_last and note.seconds > 0.25 and rng.random() < FINAL_FRICATIVE_PROB:
        c = b - max(1, round(rng.uniform(0.06, 0.12) / frame))
        track.voicing[c:b] *= 0.1
        sound = int(rng.integers(3))
        track.noise[c:b, sound] = loudness * FINAL_LEVELS[sound]


def _bend(rng: Generator, pitch: Array) -> None:
    """Bend the pitch of a note (k,) in place: a scoop into it, a fall out of it, or an arc."""
    size, part = rng.uniform(0.5, 3.0), max(1, round(rng.uniform(0.15, 0.4) * len(pitch)))
    shape = rng.integers(3)
    if shape == 0:
        pitch[:part] -= np.linspace(size, 0, part)
    elif shape == 1:
        pitch[len(pitch) - part :] -= np.linspace(0, 1.5 * size, part)
    else:
        pitch += 0.5 * size * np.sin(np.linspace(0, np.pi, len(pitch))) * rng.choice([-1, 1])


def _write_consonant(
    rng: Generator, kind: str, track: Controls, a: int, room: float, loudness: float, frame: float
) -> None:
    """Write a consonant into `track` from frame `a` on, at most `room` seconds long."""
    _, longest, shortest, voicing = CONSONANTS[kind]
    share = rng.uniform(shortest, 1.0) if shortest < 1 else 1.0
    c = a + max(2 if kind == "stop" else 1, round(share * min(room, longest) / frame))
    if kind == "fricative":
        voicing = rng.choice([0.0, 0.4])
        sound = int(rng.integers(3))
        track.noise[a:c, sound] = loudness * FRICATIVE_LEVELS[sound]
    elif kind == "stop":  # a closure, a burst, aspiration
        burst, sound = max(a, c - 2), int(rng.integers(3))
        track.breath[a:burst] = 0.0
        track.noise[burst:c, 3 + sound] = loudness * BURST_LEVELS[sound]
        track.breath[c : c + round(0.03 / frame)] += 0.3 * loudness
    elif kind in ("voiced stop", "glide"):
        track.formants[a:c] = GLIDES[rng.integers(len(GLIDES))]
        if kind == "voiced stop":
            track.noise[max(a, c - 1) : c, 3 + rng.integers(3)] = 0.12 * loudness
    elif kind == "nasal":
        track.formants[a:c] = NASAL
    else:  # h
        track.breath[a:c] += 0.25 * loudness
    track.voicing[a:c] *= voicing
