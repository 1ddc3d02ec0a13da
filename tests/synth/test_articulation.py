"""Articulation: melodies without gaps, within the singer's range, and consonants of every kind."""

from itertools import pairwise

import numpy as np
import pytest

from bsmamba2.synth import articulation
from bsmamba2.synth.articulation import CONSONANTS, INTERVALS, NOISES, Singer, articulate
from bsmamba2.synth.score import draw_score


def test_probabilities_sum_to_one() -> None:
    assert sum(row[0] for row in CONSONANTS.values()) == pytest.approx(1)
    assert sum(INTERVALS.values()) == pytest.approx(1)


def test_melodies_have_no_gaps_and_stay_in_the_singers_range() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        score, singer = draw_score(rng, 8.0), Singer(rng)
        notes = articulation._draw_melody(rng, singer, score, 1.0, 7.0)
        assert notes[0].start == 1.0
        assert notes[-1].start + notes[-1].seconds == pytest.approx(7.0)
        assert all(a.start + a.seconds == pytest.approx(b.start) for a, b in pairwise(notes))
        assert all(singer.low <= note.pitch <= singer.high for note in notes)


def test_controls_are_silent_outside_the_phrases() -> None:
    rng = np.random.default_rng(0)
    score, singer = draw_score(rng, 20.0), Singer(rng)
    track = articulate(rng, singer, score, ((5.0, 15.0),), 0.01, 2_000)
    assert track.noise.shape == (2_000, len(NOISES))
    assert track.formants.shape == (2_000, 5)
    assert np.isfinite(track.pitch).all()
    for level in (track.voicing, track.breath, track.noise):
        assert level[550:1450].any()
        assert not level[:490].any()
        assert not level[1510:].any()
    assert track.noise.any(0).all()  # every consonant's noise in ten seconds
