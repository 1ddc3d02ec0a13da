"""The synthesised songs and the real excerpt, measured from the audio rather than from what a song says."""

import importlib.util
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from bsmamba2.synth import songs
from bsmamba2.synth.songs import STEMS, TAIL_SECONDS, Song, synthesise

RATE = 44_100
SEEDS = range(8)


@pytest.fixture(scope="module")
def made() -> list[Song]:
    return [synthesise(seed) for seed in SEEDS]


def decibels(power: float) -> float:
    return 10 * math.log10(power + 1e-20)


def sung_share(song: Song) -> float:
    """Share of 20 ms blocks that sound: within 30 dB of the vocals' mean, with gaps of up to 60 ms closed."""
    block = round(0.02 * song.sample_rate)
    vocals = song.vocals.numpy()
    blocks = vocals.shape[1] // block
    power = (vocals[:, : blocks * block] ** 2).mean(axis=0).reshape(blocks, block).mean(axis=1)
    loud = power > power[power > 0].mean() * 1e-3
    places = np.flatnonzero(loud)
    for a, b in pairwise(places):
        if b - a <= 4:
            loud[a:b] = True
    return float(loud.mean())


def band_share(sound: torch.Tensor, low: float, high: float) -> float:
    """Share of the power of (2, samples) that lies between two frequencies in Hz."""
    power = torch.fft.rfft(sound.double()).abs().square().sum(dim=0)
    hertz = torch.fft.rfftfreq(sound.shape[-1], 1 / RATE)
    return float(power[(hertz >= low) & (hertz < high)].sum() / power.sum())


def pitches(sound: np.ndarray, low: float = 70.0, high: float = 900.0) -> np.ndarray:
    """Fundamental frequencies in Hz of the periodic 46 ms frames of (samples,), by autocorrelation."""
    size = 2_048
    frames = np.lib.stride_tricks.sliding_window_view(sound, size)[:: size // 2]
    frames = frames[(frames**2).mean(axis=1) > 0.1 * (sound**2).mean()]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(size), 2 * size)) ** 2
    correlation = np.fft.irfft(spectrum)[:, :size]
    correlation /= correlation[:, :1]
    lags = slice(int(RATE / high), int(RATE / low))
    best = correlation[:, lags].argmax(axis=1) + lags.start
    return RATE / best[correlation[:, lags].max(axis=1) > 0.5]


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


def test_occupancy_keeps_the_band() -> None:
    quiet, loud = synthesise(5, occupancy=0.0), synthesise(5, occupancy=0.8)
    for name in STEMS[1:]:
        a, b = quiet.stem(name).flatten(), loud.stem(name).flatten()
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9999, name


def test_shapes_and_levels(made: list[Song]) -> None:
    for song in made:
        assert song.stems.shape == (4, 2, 6 * RATE)
        assert song.stems.dtype == torch.float32
        assert torch.isfinite(song.stems).all()
        assert 0.49 < song.mixture.abs().max() < 0.96
        assert song.stems.mean(dim=-1).abs().max() < 2e-3  # no offset
        assert song.seconds == 6.0


def test_mixture_is_the_sum_and_stems_have_names(made: list[Song]) -> None:
    song = made[0]
    total = song.stem("vocals") + song.stem("drums") + song.stem("bass") + song.stem("other")
    torch.testing.assert_close(song.mixture, total, atol=1e-6, rtol=0)
    assert torch.equal(song.vocals, song.stems[0])
    assert torch.equal(song.stem("bass"), song.stems[2])
    with pytest.raises(ValueError, match="guitar"):
        song.stem("guitar")


def test_vocals_are_about_as_loud_as_the_band_while_sung(made: list[Song]) -> None:
    levels = []
    for song in made:
        vocal_segments = torch.zeros(song.stems.shape[-1], dtype=torch.bool)
        for start, end in song.vocal_segments:
            vocal_segments[round(start * RATE) : round(end * RATE)] = True
        band = song.stems[1:].sum(dim=0)
        ratio = song.vocals[:, vocal_segments].square().mean() / band[:, vocal_segments].square().mean()
        levels.append(decibels(float(ratio)))
    assert -2.5 < np.mean(levels) < 2.5
    assert 1 < np.std(levels) < 4.5
    assert min(levels) > -6.5  # a quieter voice teaches silence, see the chapter on training
    assert max(levels) < 6.5


def test_most_songs_have_a_whole_band() -> None:
    absent = np.array(
        [[not stem.any() for stem in synthesise(s, seconds=0.6, sample_rate=16_000).stems] for s in range(60)]
    )
    assert not absent[:, 0].any()
    assert 0 < absent[:, 1:].any(axis=1).sum() < 20
    assert absent.sum(axis=1).max() < 3


def test_occupancy_zero_is_exact_silence() -> None:
    song = synthesise(4, occupancy=0.0)
    assert not song.vocals.any()
    assert song.vocal_segments == ()
    assert song.occupancy == 0.0
    assert song.mixture.any()


@pytest.mark.parametrize("occupancy", [0.15, 0.5, 0.8, 0.95, 1.0])
def test_occupancy_is_heard(occupancy: float) -> None:
    made = [synthesise(seed, occupancy=occupancy, sample_rate=16_000) for seed in SEEDS]
    errors = [sung_share(song) - occupancy for song in made]
    assert max(map(abs, errors)) <= 0.05
    assert abs(np.mean(errors)) < 0.03
    for song in made:
        assert song.occupancy == pytest.approx(occupancy, abs=1e-3)


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


def test_silence_between_phrases_is_exact(made: list[Song]) -> None:
    for song in made:
        silent = torch.ones(song.stems.shape[-1], dtype=torch.bool)
        for start, end in song.vocal_segments:
            silent[max(0, math.floor(start * RATE)) : math.ceil((end + TAIL_SECONDS) * RATE) + 1] = False
        assert silent.float().mean() > 0.1
        assert not song.vocals[:, silent].any()


def test_voices_are_periodic_within_a_singers_range() -> None:
    centres = []
    for seed in SEEDS:
        voice = synthesise(seed, seconds=4.0, occupancy=1.0).vocals.mean(dim=0).numpy()
        found = pitches(voice)
        assert len(found) > 0.4 * 4 * RATE / 1_024, seed  # most frames have a pitch
        centre = float(np.median(found))
        assert 75 < centre < 700, seed
        assert np.log2(np.percentile(found, 90) / np.percentile(found, 10)) > 1 / 12, seed  # a melody, not a drone
        centres.append(centre)
    assert min(centres) < 200 < max(centres)  # low voices and high ones


def test_voices_have_formants_that_move() -> None:
    """Third-octave levels between 300 and 3,400 Hz stand in peaks and valleys, and change with the vowel."""
    for seed in (0, 3, 8):
        voice = synthesise(seed, occupancy=1.0).vocals.mean(dim=0)
        power = torch.stft(voice, 2_048, 1_024, window=torch.hann_window(2_048), return_complex=True).abs().square()
        edges = [round(300 * 2 ** (i / 3) * 2_048 / RATE) for i in range(11)]
        bands = torch.stack([power[a:b].sum(dim=0) for a, b in pairwise(edges)])
        levels = 10 * torch.log10(bands[:, bands.sum(dim=0) > 0.1 * bands.sum(dim=0).mean()] + 1e-9)
        assert (levels.max(dim=0).values - levels.min(dim=0).values).median() > 12
        assert levels.std(dim=1).median() > 3


def test_stems_live_where_they_should(made: list[Song]) -> None:
    def median(name: str, low: float, high: float) -> float:
        return float(np.median([band_share(s.stem(name), low, high) for s in made if s.stem(name).any()]))

    assert median("bass", 30, 400) > 0.8
    assert median("vocals", 150, 5_000) > 0.85
    assert median("vocals", 5_000, 16_000) > 0.001  # air and consonants
    assert median("other", 150, 5_000) > 0.8
    assert median("drums", 30, 200) > 0.2
    assert median("drums", 5_000, 16_000) > 0.01
    assert median("drums", 5_000, 16_000) > 3 * median("other", 5_000, 16_000)


def test_pitched_instruments_overlap_the_voices(made: list[Song]) -> None:
    """Harmony alone must not tell the vocals: the other stem has pitches in the voices' range."""
    overlapping = [band_share(song.stem("other"), 200, 2_000) > 0.3 for song in made]
    assert np.mean(overlapping) > 0.7


def test_one_shots_of_cymbals_are_high() -> None:
    hat = songs._cymbal(np.random.default_rng(0), RATE, 0.04, 7_000, 0.5)
    assert band_share(torch.from_numpy(hat)[None], 5_000, 22_050) > 0.9
    kick = songs._kick(np.random.default_rng(0), RATE)
    assert band_share(torch.from_numpy(kick)[None], 20, 250) > 0.8


def test_fast_convolution_is_convolution() -> None:
    rng = np.random.default_rng(0)
    signal, kernel = rng.standard_normal((2, 11_000)), rng.standard_normal((2, 9_500)) / 100
    expected = np.stack([np.convolve(s, k)[:11_000] for s, k in zip(signal, kernel, strict=True)])
    np.testing.assert_allclose(songs._convolve(signal.astype(np.float32), kernel), expected, atol=1e-4)


def test_songs_are_a_growing_list() -> None:
    few, more = songs.songs(3, seed=1, seconds=1.0), songs.songs(5, seed=1, seconds=1.0)
    assert [song.name for song in few] == [song.name for song in more[:3]]
    assert torch.equal(few[2].stems, more[2].stems)
    assert len({song.name for song in more}) == 5
    assert songs.songs(0) == []
    many = songs.songs(60, seed=2, seconds=0.5, sample_rate=8_000)
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
        songs.songs(-1)
    with pytest.raises(ValueError, match="seed is -2"):
        songs.songs(1, seed=-2)


@pytest.fixture(scope="module")
def falcon() -> Song:
    if importlib.util.find_spec("stempeg") is None:
        pytest.skip("the stempeg package is not installed")
    return songs.excerpt()


def test_excerpt_is_the_clip(falcon: Song) -> None:
    assert falcon.stems.shape[:2] == (4, 2)
    assert falcon.sample_rate == RATE
    assert falcon.seconds == pytest.approx(6.08, abs=0.02)
    assert torch.isfinite(falcon.stems).all()
    assert falcon.licence == "CC BY-NC-SA 3.0"
    assert "Easton Ellises" in falcon.source
    torch.testing.assert_close(falcon.mixture, falcon.stems.sum(dim=0))


def test_excerpt_streams_are_in_our_order(falcon: Song) -> None:
    """Each stem is what its name says: bass and drums lie low, drums reach high, vocals rest."""
    low = [band_share(falcon.stem(name), 20, 160) for name in STEMS]
    assert low[STEMS.index("bass")] > 0.2
    assert low[STEMS.index("drums")] > 0.2
    assert low[STEMS.index("vocals")] < 0.05
    assert low[STEMS.index("other")] < 0.1
    high = [band_share(falcon.stem(name), 5_000, 16_000) for name in STEMS]
    assert high[STEMS.index("drums")] > 5 * high[STEMS.index("bass")]
    assert high[STEMS.index("vocals")] > 2 * high[STEMS.index("other")]


def test_excerpt_rests_from_two_to_four_seconds(falcon: Song) -> None:
    power = falcon.vocals.square().mean(dim=0)
    rest = power[round(2.1 * RATE) : round(3.8 * RATE)].mean()
    vocal_segments = torch.cat([power[: 2 * RATE], power[4 * RATE :]]).mean()
    assert 14 < decibels(float(vocal_segments / rest)) < 26
    assert len(falcon.vocal_segments) == 2
    assert falcon.vocal_segments[0][1] == pytest.approx(2.0, abs=0.2)
    assert falcon.vocal_segments[1][0] == pytest.approx(3.9, abs=0.2)
    assert 0.6 < falcon.occupancy < 0.75


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(songs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps stempeg"):
        songs.excerpt()


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
        songs._dull(np.random.default_rng(seed), voice, 1.0, RATE)
        lost.append(treble(sound) - treble(voice))
        voice = sound.copy()
        songs._dull(np.random.default_rng(seed), voice, 0.0, RATE)
        assert np.array_equal(voice, sound)
    assert 18 <= sum(one > 2 for one in lost) <= 38  # seven in ten
    assert max(lost) < 18.5
    assert sum(abs(one) < 0.01 for one in lost) >= 2


def test_a_song_says_how_to_make_it_again() -> None:
    (song,) = songs.songs(1, seed=4, seconds=0.5, mix_variety=1.0, sample_rate=8_000)
    again = eval(song.source, {"synthesise": songs.synthesise})  # plain numbers, whichever NumPy printed them
    assert torch.equal(again.stems, song.stems)


def test_a_share_of_the_songs_is_the_same_songs() -> None:
    options = {"seed": 3, "seconds": 1.0, "sample_rate": 8_000}
    whole = songs.songs(5, **options)  # type: ignore[arg-type]
    shares = [songs.songs(5, first=first, every=2, **options) for first in (0, 1)]  # type: ignore[arg-type]
    assert [song.name for song in shares[0]] == [song.name for song in whole[0::2]]
    assert [song.name for song in shares[1]] == [song.name for song in whole[1::2]]
    assert torch.equal(shares[1][1].stems, whole[3].stems)


@pytest.mark.parametrize("mix_variety", [-0.1, 1.1, math.nan])
def test_variety_out_of_range_is_refused(mix_variety: float) -> None:
    with pytest.raises(ValueError, match="mix_variety"):
        synthesise(0, mix_variety=mix_variety)
