"""Mixing: levels of the vocals, and exact silence between phrases."""

import math

import numpy as np
import torch
from song_measures import RATE, decibels, default_songs

from bsmamba2.synth import synthesise
from bsmamba2.synth.mixing import TAIL_SECONDS


def test_vocals_are_about_as_loud_as_the_accompaniment_while_sung() -> None:
    levels = []
    for song in default_songs():
        vocal_segments = torch.zeros(song.stems.shape[-1], dtype=torch.bool)
        for start, end in song.vocal_segments:
            vocal_segments[round(start * RATE) : round(end * RATE)] = True
        accompaniment = song.stems[1:].sum(dim=0)
        ratio = song.vocals[:, vocal_segments].square().mean() / accompaniment[:, vocal_segments].square().mean()
        levels.append(decibels(float(ratio)))
    assert -2.5 < np.mean(levels) < 2.5
    assert 1 < np.std(levels) < 4.5
    assert min(levels) > -6.5  # a quieter voice teaches silence, see the chapter on training
    assert max(levels) < 6.5


def test_occupancy_zero_is_exact_silence() -> None:
    song = synthesise(4, occupancy=0.0)
    assert not song.vocals.any()
    assert song.vocal_segments == ()
    assert song.occupancy == 0.0
    assert song.mixture.any()


def test_silence_between_phrases_is_exact() -> None:
    for song in default_songs():
        silent = torch.ones(song.stems.shape[-1], dtype=torch.bool)
        for start, end in song.vocal_segments:
            silent[max(0, math.floor(start * RATE)) : math.ceil((end + TAIL_SECONDS) * RATE) + 1] = False
        assert silent.float().mean() > 0.1
        assert not song.vocals[:, silent].any()
