"""Synthesised songs: reproducible, different, and full of everything a song has."""

import math

import numpy as np
import pytest
import torch
from song_measures import RATE, band_share, decibels, default_songs

from bsmamba2.synth import STEMS, synthesise, synthesise_songs


def test_same_arguments_give_the_same_bits() -> None:
    first, second = synthesise(7, occupancy=0.5), synthesise(7, occupancy=0.5)
    assert torch.equal(first.stems, second.stems)
    assert first.vocal_segments == second.vocal_segments


def test_seeds_differ_in_every_stem() -> None:
    first, second = synthesise(0), synthesise(3)
    for name in STEMS:
        assert first.stem(name).any()
        assert second.stem(name).any()
        assert not torch.allclose(first.stem(name), second.stem(name), atol=1e-3), name


def test_global_random_state_is_left_alone() -> None:
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    first = synthesise(2, seconds=1.0)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = synthesise(2, seconds=1.0)
    assert torch.equal(first.stems, second.stems)
    assert torch.equal(before, torch.get_rng_state())


def test_occupancy_keeps_the_accompaniment() -> None:
    quiet, loud = synthesise(5, occupancy=0.0), synthesise(5, occupancy=0.8)
    for name in STEMS[1:]:
        a, b = quiet.stem(name).flatten(), loud.stem(name).flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9999, name


def test_shapes_and_levels() -> None:
    for song in default_songs():
        assert song.stems.shape == (4, 2, 6 * RATE)
        assert song.stems.dtype == torch.float32
        assert torch.isfinite(song.stems).all()
        assert 0.49 < song.mixture.abs().max() < 0.96
        assert song.stems.mean(dim=-1).abs().max() < 2e-3  # no offset
        assert song.seconds == 6.0


def test_most_songs_have_every_stem() -> None:
    absent = np.array(
        [[not stem.any() for stem in synthesise(s, seconds=0.6, sample_rate=16_000).stems] for s in range(60)]
    )
    assert not absent[:, 0].any()
    assert 0 < absent[:, 1:].any(axis=1).sum() < 20
    assert absent.sum(axis=1).max() < 3


def test_stems_live_where_they_should() -> None:
    def median(name: str, low: float, high: float) -> float:
        return float(np.median([band_share(s.stem(name), low, high) for s in default_songs() if s.stem(name).any()]))

    assert median("bass", 30, 400) > 0.8
    assert median("vocals", 150, 5_000) > 0.85
    assert median("vocals", 5_000, 16_000) > 0.001  # air and consonants
    assert median("other", 150, 5_000) > 0.8
    assert median("drums", 30, 200) > 0.2
    assert median("drums", 5_000, 16_000) > 0.01
    assert median("drums", 5_000, 16_000) > 3 * median("other", 5_000, 16_000)


def test_songs_are_a_growing_list() -> None:
    few, more = synthesise_songs(3, seed=1, seconds=1.0), synthesise_songs(5, seed=1, seconds=1.0)
    assert [song.name for song in few] == [song.name for song in more[:3]]
    assert torch.equal(few[2].stems, more[2].stems)
    assert len({song.name for song in more}) == 5
    assert synthesise_songs(0) == []
    many = synthesise_songs(60, seed=2, seconds=0.5, sample_rate=8_000)
    shares = np.array([song.occupancy for song in many])
    assert (shares == 0).sum() >= 2
    assert (shares > 0.99).sum() >= 2
    assert 0.4 < np.mean(shares) < 0.8


def test_other_lengths_and_rates() -> None:
    song = synthesise(1, seconds=2.345, sample_rate=16_000)
    assert song.stems.shape == (4, 2, round(2.345 * 16_000))
    assert song.sample_rate == 16_000
    assert torch.isfinite(song.stems).all()
    for seed in range(8):
        short = synthesise(seed, seconds=0.5, occupancy=(0.1, 0.5, 0.9, 1.0)[seed % 4], sample_rate=8_000)
        assert torch.isfinite(short.stems).all()
        assert short.vocals.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": 0.49}, "at least 0.5"),
        ({"seconds": math.inf}, "seconds is inf"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"occupancy": -0.01}, "occupancy is -0.01"),
        ({"occupancy": 1.01}, "between 0 and 1"),
        ({"occupancy": math.nan}, "occupancy is nan"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"sample_rate": -44_100}, "at least 8000"),
        ({"sample_rate": 44_100.0}, "sample_rate is 44100.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesise(**{"seed": 0, **arguments})  # type: ignore[arg-type]


def test_bad_counts_are_named() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        synthesise_songs(-1)
    with pytest.raises(ValueError, match="seed is -2"):
        synthesise_songs(1, seed=-2)


def test_a_song_says_how_to_make_it_again() -> None:
    (song,) = synthesise_songs(1, seed=4, seconds=0.5, mix_variety=1.0, sample_rate=8_000)
    again = eval(song.source, {"synthesise": synthesise})  # plain numbers, whichever NumPy printed them
    assert torch.equal(again.stems, song.stems)


def test_a_share_of_the_songs_is_the_same_songs() -> None:
    options = {"seed": 3, "seconds": 1.0, "sample_rate": 8_000}
    whole = synthesise_songs(5, **options)  # type: ignore[arg-type]
    shares = [synthesise_songs(5, first=first, every=2, **options) for first in (0, 1)]  # type: ignore[arg-type]
    assert [song.name for song in shares[0]] == [song.name for song in whole[0::2]]
    assert [song.name for song in shares[1]] == [song.name for song in whole[1::2]]
    assert torch.equal(shares[1][1].stems, whole[3].stems)


def test_songs_are_those_that_checkpoints_were_trained_on() -> None:
    """Levels of the stems in dB and sung phrases, which no change of the code may move."""
    frozen = {
        3: (
            [-23.572, -27.38, -22.081, -22.437],
            [-22.886, -24.886, -19.588, -19.944],
            [0.3183, 1.2614, 1.7505, 2.6073],
        ),
        11: ([-27.846, -200.0, -28.197, -30.225], [-22.45, -200.0, -22.795, -24.823], [0.639, 2.439]),
    }
    for seed, (levels, varied, phrases) in frozen.items():
        for mix_variety, expected in ((0.0, levels), (1.0, varied)):
            song = synthesise(seed, seconds=3.0, mix_variety=mix_variety, sample_rate=16_000)
            assert [decibels(float(stem.square().mean())) for stem in song.stems] == pytest.approx(expected, abs=0.01)
            assert [round(time, 4) for phrase in song.vocal_segments for time in phrase] == phrases
