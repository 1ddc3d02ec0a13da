"""Mix variety: how far a varied mix lies from a clean one."""

import math

import numpy as np
import pytest
import torch
from song_measures import RATE, SEEDS, decibels

from bsmamba2.synth import Song, synthesise
from bsmamba2.synth.mix_variety import lowpass_vocals
from bsmamba2.synth.mixing import TAIL_SECONDS


def test_variety_changes_the_mix_and_not_what_is_played() -> None:
    plain, varied = synthesise(5), synthesise(5, mix_variety=1.0)
    assert plain.vocal_segments == varied.vocal_segments
    assert torch.equal(plain.stems, synthesise(5, mix_variety=0.0).stems)
    assert not torch.allclose(plain.vocals, varied.vocals, atol=1e-3)
    silent = torch.ones(plain.samples, dtype=torch.bool)
    for start, end in plain.vocal_segments:
        silent[round(start * RATE) : round((end + TAIL_SECONDS) * RATE)] = False
    assert silent.any()
    assert not varied.vocals[:, silent].any()  # nothing rings into the rests


def test_varied_voices_are_softer_than_plain_ones() -> None:
    def level(song: Song) -> float:
        return decibels(float(song.vocals.square().mean() / song.stems[1:].sum(0).square().mean()))

    lower = [level(synthesise(seed)) - level(synthesise(seed, mix_variety=1.0)) for seed in SEEDS]
    assert 2 < np.mean(lower) < 6  # drawn from -1 to 9 dB
    assert max(lower) < 10


def test_varied_basses_growl_and_varied_voices_are_cut_below() -> None:
    def share(signal: torch.Tensor, low: float, high: float) -> float:
        """Of the energy, between two frequencies, in dB."""
        power = torch.fft.rfft(signal).abs().square().sum(0)
        hertz = torch.fft.rfftfreq(signal.shape[-1], 1 / RATE)
        return decibels(float(power[(hertz >= low) & (hertz < high)].sum() / power.sum()))

    pairs = [(synthesise(seed), synthesise(seed, mix_variety=1.0)) for seed in range(12)]
    basses = [(a.stem("bass"), b.stem("bass")) for a, b in pairs if a.stem("bass").any() and b.stem("bass").any()]
    assert np.mean([share(b, 300, 1_500) - share(a, 300, 1_500) for a, b in basses]) > 2
    assert np.mean([share(b.vocals, 80, 250) - share(a.vocals, 80, 250) for a, b in pairs]) < -2


def test_some_varied_voices_are_dull_and_clean_ones_as_they_were() -> None:
    sound = np.random.default_rng(0).standard_normal((2, RATE), dtype=np.float32)

    def treble(voice: np.ndarray) -> float:
        power = np.abs(np.fft.rfft(voice)) ** 2
        hertz = np.fft.rfftfreq(voice.shape[-1], 1 / RATE)
        return decibels(float(power[:, hertz > 8_000].mean() / power[:, hertz < 500].mean()))

    lost = []
    for seed in range(40):
        voice = sound.copy()
        lowpass_vocals(np.random.default_rng(seed), voice, 1.0, RATE)
        lost.append(treble(sound) - treble(voice))
        voice = sound.copy()
        lowpass_vocals(np.random.default_rng(seed), voice, 0.0, RATE)
        assert np.array_equal(voice, sound)
    assert 18 <= sum(one > 2 for one in lost) <= 38  # seven in ten
    assert max(lost) < 18.5
    assert sum(abs(one) < 0.01 for one in lost) >= 2


@pytest.mark.parametrize("mix_variety", [-0.1, 1.1, math.nan])
def test_variety_out_of_range_is_refused(mix_variety: float) -> None:
    with pytest.raises(ValueError, match="mix_variety"):
        synthesise(0, mix_variety=mix_variety)
