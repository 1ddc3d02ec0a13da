"""Scores: chords and scale, and the phrases that are sung."""

from itertools import pairwise

import numpy as np
from song_measures import SEEDS

from bsmamba2.synth import synthesise
from bsmamba2.synth.score import MIN_REST, draw_phrases, draw_score, to_hertz


def test_phrases_have_a_singers_lengths_and_places() -> None:
    made = [synthesise(seed, seconds=12.0, occupancy=0.6, sample_rate=8_000) for seed in SEEDS]
    lengths = [end - start for song in made for start, end in song.vocal_segments]
    assert min(lengths) > 0.3
    assert max(lengths) < 5.0
    assert len({len(song.vocal_segments) for song in made}) > 2
    starts = [song.vocal_segments[0][0] for song in made]
    assert np.std(starts) > 0.2
    for song in made:
        assert all(0 <= start < end <= 12.0 for start, end in song.vocal_segments)
        rests = [b[0] - a[1] for a, b in pairwise(song.vocal_segments)]
        assert min(rests, default=1.0) > 0.1


def test_scores_keep_to_their_key_and_phrases_to_their_rests() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        score = draw_score(rng, 20.0)
        key = {(score.root + degree) % 12 for degree in score.scale}
        assert all(set(chord) <= key for chord in score.chords)
        assert {score.degree(i) % 12 for i in range(14)} == key
        times = [score.time(step) for step in range(score.steps)]
        assert times == sorted(times)
        phrases = draw_phrases(rng, 0.5, score)
        assert all(b[0] - a[1] > MIN_REST - 1e-9 for a, b in pairwise(phrases))
    assert to_hertz(69) == 440
    assert to_hertz(57) == 220
