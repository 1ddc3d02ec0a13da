"""Accompaniment: pitched instruments in the range of voices."""

import numpy as np
from song_measures import band_share, default_songs


def test_pitched_instruments_overlap_the_voices() -> None:
    """Harmony alone must not tell the vocals: the other stem has pitches in the voices' range."""
    overlapping = [band_share(song.stem("other"), 200, 2_000) > 0.3 for song in default_songs()]
    assert np.mean(overlapping) > 0.7
