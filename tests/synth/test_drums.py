"""Drums: the spectra of one-shots."""

import numpy as np
import torch
from song_measures import RATE, band_share

from bsmamba2.synth import drums


def test_one_shots_of_cymbals_are_high() -> None:
    hat = drums._cymbal(np.random.default_rng(0), RATE, 0.04, 7_000, 0.5)
    assert band_share(torch.from_numpy(hat)[None], 5_000, 22_050) > 0.9
    kick = drums._kick(np.random.default_rng(0), RATE)
    assert band_share(torch.from_numpy(kick)[None], 20, 250) > 0.8
