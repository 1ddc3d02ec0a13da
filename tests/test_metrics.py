"""Metrics against signals whose value is known by hand, and against museval and torchaudio."""

from __future__ import annotations

import importlib.util
import math
import re
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from bsmamba2.metrics import (
    bleed,
    csdr,
    csdr_seconds,
    mel_filters,
    onsets,
    si_sdr,
    silence_leakage,
    silent_regions,
    usdr,
)

RATE = 1000  # of the constructed signals, in hertz: a sample is a millisecond


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.1


# --- cSDR -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def museval() -> ModuleType:
    """The file of museval that computes; the package itself demands an ffmpeg program when imported."""
    package = importlib.util.find_spec("museval")
    if package is None or not package.submodule_search_locations:
        pytest.skip("museval is not installed: it is in the extra `test`")
    path = Path(package.submodule_search_locations[0]) / "metrics.py"
    spec = importlib.util.spec_from_file_location("museval_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_museval(museval: ModuleType, pairs: list[tuple[Tensor, Tensor]], rate: int) -> Tensor:
    """SDR of BSS Eval v4, (source, seconds)."""
    references, estimates = (np.stack([pair[i].T.numpy() for pair in pairs]) for i in (0, 1))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(
            museval.bss_eval(
                references, estimates, compute_permutation=False, window=rate, hop=rate, filters_len=64,
                framewise_filters=False, bsseval_sources_version=False,
            )[0]
        )  # fmt: skip


def partly_silent(signal: Tensor, *seconds: int) -> Tensor:
    signal = signal.clone()
    for second in seconds:
        signal[:, second * 2000 : (second + 1) * 2000] = 0
    return signal


S, T = noise(2, 12_500, seed=1), noise(2, 12_500, seed=2)
CASES = {
    "random": [(S, S + 0.3 * T)],
    "one channel": [(S[:1], S[:1] + 0.3 * T[:1])],
    "dual mono": [(S[:1].repeat(2, 1), (S + 0.5 * T)[:1].repeat(2, 1))],
    "reference partly silent": [(partly_silent(S, 0, 3), S + 0.3 * T)],
    "estimate partly silent": [(S, partly_silent(S + 0.3 * T, 2))],
    "channels that cancel": [(torch.stack([S[0], -S[0]]) + partly_silent(S, 0, 1), S + 0.3 * T)],
    "two sources, each silent somewhere": [
        (partly_silent(S, 0), S + 0.3 * T),
        (partly_silent(T, 4), partly_silent(T + 0.1 * S, 2)),
    ],
    "quiet": [(1e-6 * S, 1e-6 * S + 1e-4 * T)],
    "shorter than a second": [(S[:, :700], S[:, :700] + 0.3 * T[:, :700])],
    "a sample short of a second": [(S[:, :1999], S[:, :1999] + 0.3 * T[:, :1999]), (T[:, :1999], S[:, :1999])],
}


@pytest.mark.parametrize("case", CASES)
def test_csdr_is_the_sdr_of_bss_eval(case: str, museval: ModuleType) -> None:
    pairs = CASES[case]
    expected = by_museval(museval, pairs, 2000)
    for i, (reference, estimate) in enumerate(pairs):
        other_sources = [pair for j, pair in enumerate(pairs) if j != i]
        found = csdr_seconds(reference, estimate, 2000, other_sources=other_sources)
        torch.testing.assert_close(found, expected[i], rtol=0, atol=1e-9, equal_nan=True)
        median = float(np.nanmedian(expected[i]))
        assert csdr(reference, estimate, 2000, other_sources=other_sources) == pytest.approx(median, abs=1e-9)
    assert expected.isnan().any() == ("silent" in case or "cancel" in case)


@pytest.mark.slow
def test_csdr_is_that_of_bss_eval_at_full_rate(museval: ModuleType) -> None:
    pairs = [(noise(2, 3 * 44_100), noise(2, 3 * 44_100) + noise(2, 3 * 44_100, seed=1))]
    np.testing.assert_allclose(csdr_seconds(*pairs[0]), by_museval(museval, pairs, 44_100)[0], atol=1e-9)


def test_one_sample_is_no_silence() -> None:
    reference = torch.zeros(2, 44_100 * 2)
    reference[0, 44_100 + 7] = 1e-6  # between the samples that are looked at first
    assert csdr_seconds(reference, noise(2, 44_100 * 2)).isnan().tolist() == [True, False]


def test_csdr_of_nothing_to_hear_is_nan_and_of_the_truth_infinite() -> None:
    s = S[:, :4000]
    assert csdr(s, s, 2000) == math.inf
    assert math.isnan(csdr(0 * s, s, 2000))
    assert math.isnan(csdr(s, 0 * s, 2000))
    assert csdr(s[:, :1999], s[:, :1999], 2000) == math.inf  # shorter than a second: one frame
    assert math.isnan(csdr(0 * s[:, :700], s[:, :700], 2000))
    with pytest.raises(ValueError, match="other_sources"):
        csdr(s, s, 2000, other_sources=[(s[:, :-1], s[:, :-1])])


# --- ratios over the song ---------------------------------------------------------------------------------


def test_si_sdr_does_not_hear_a_level() -> None:
    s = torch.tensor([[3.0, 0, 4, 0], [0, 0, 0, 0]])
    other = torch.tensor([[0.0, 0, 0, 0], [0, 5, 0, 0]])  # of the same energy, at a right angle
    assert si_sdr(s, 0.25 * s) == math.inf
    assert si_sdr(s, -3 * s) == math.inf
    assert si_sdr(s, other) == -math.inf
    for gain in (1e-4, 1, 50):
        assert si_sdr(s, gain * (s + 0.1 * other)) == pytest.approx(20, abs=1e-5)
        assert usdr(s, gain * (s + 0.1 * other)) == pytest.approx(
            10 * math.log10(25 / (25 * ((1 - gain) ** 2 + 0.01 * gain**2))), abs=1e-5
        )
    assert math.isnan(si_sdr(0 * s, s))
    assert math.isnan(si_sdr(s, 0 * s))


def test_epsilons_of_the_training_toolbox_change_only_what_the_docstrings_say() -> None:
    def toolbox_sdr(s: Tensor, s_hat: Tensor) -> float:
        return float(10 * torch.log10((s.square().sum() + 1e-8) / ((s - s_hat).square().sum() + 1e-8)))

    def toolbox_si_sdr(s: Tensor, s_hat: Tensor) -> float:
        scaled = s * (s * s_hat + 1e-8).sum() / (s.square() + 1e-8).sum()
        return float(10 * torch.log10(scaled.square().sum() / ((scaled - s_hat).square().sum() + 1e-8) + 1e-8))

    s, other = noise(2, 20_000), noise(2, 20_000, seed=1)
    for error in (1.0, 0.1, 0.001):  # 0 to 60 dB
        assert usdr(s, s + error * other) == pytest.approx(toolbox_sdr(s, s + error * other), abs=1e-3)
        assert si_sdr(s, s + error * other) == pytest.approx(toolbox_si_sdr(s, s + error * other), abs=1e-3)
    energy = 10 * math.log10(float(s.square().sum()))
    assert usdr(s, s) == pytest.approx(energy + 70, abs=1e-3)
    assert toolbox_sdr(s, s) == pytest.approx(energy + 80, abs=1e-3)
    assert (si_sdr(s, s), toolbox_si_sdr(s, s)) == (math.inf, pytest.approx(energy + 80, abs=1e-3))
    assert math.isnan(si_sdr(0 * s, s))
    assert toolbox_si_sdr(0 * s, s) == pytest.approx(-80)
    quiet = 1e-4 * s  # -100 dBFS: there the toolbox's scale is no longer the best one
    assert si_sdr(quiet, quiet + 0.001 * 1e-4 * other) == pytest.approx(si_sdr(s, s + 0.001 * other), abs=1e-6)
    assert abs(toolbox_si_sdr(quiet, 0.5 * quiet) - toolbox_si_sdr(s, 0.5 * s)) > 10


# --- bleed and fullness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "n_fft", "bands"), [(44_100, 4096, 512), (44_100, 2048, 128), (8000, 512, 20)])
def test_mel_filters_are_slaneys(rate: int, n_fft: int, bands: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lowest of 512 bands are narrower than a bin, and empty
        expected = torchaudio.functional.melscale_fbanks(
            n_fft // 2 + 1, 0, rate / 2, bands, rate, norm="slaney", mel_scale="slaney"
        ).T
    torch.testing.assert_close(mel_filters(rate, n_fft, bands).float(), expected, rtol=2e-3, atol=2e-6)


def test_mel_filters_of_a_low_rate_are_evenly_spaced() -> None:
    filters = mel_filters(1000, 1000, 9)  # 50 Hz apart, and a bin is 1 Hz
    assert filters.argmax(1).tolist() == list(range(50, 451, 50))
    torch.testing.assert_close(filters.sum(1), torch.ones(9).double())


@pytest.mark.parametrize("decibels", [-20, -6, 3, 20])
def test_a_level_is_all_bleed_or_all_lack(decibels: float) -> None:
    s = noise(2, 20_000)
    found = bleed(s, s * 10 ** (decibels / 20))
    expected = 100 / (1 + abs(decibels))
    assert found.bleedless == pytest.approx(expected if decibels > 0 else 100, rel=1e-6)
    assert found.fullness == pytest.approx(100 if decibels > 0 else expected, rel=1e-6)


LEFT, RIGHT = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])  # the other channel is silent


@pytest.mark.parametrize(
    ("reference_gain", "estimate_gain"),
    [(1, 1), (LEFT, 1), (1, LEFT), (LEFT, LEFT), (LEFT, RIGHT), (LEFT, 1.1 * LEFT), (0, 1), (1, 0)],
)
def test_bleed_by_torchaudios_parts(reference_gain: Tensor | int, estimate_gain: Tensor | int) -> None:
    s = noise(2, 44_100) * torch.linspace(0, 1, 44_100)
    estimate = (0.8 * s + 0.05 * noise(2, 44_100, seed=1)) * estimate_gain
    s = s * reference_gain
    to_decibels = torchaudio.transforms.AmplitudeToDB(stype="magnitude", top_db=80)
    levels = []
    for signal in (s, estimate):
        spectrogram = torchaudio.functional.spectrogram(
            signal, 0, torch.hann_window(4096, dtype=torch.float64), 4096, 1024, 4096, 1.0, False, pad_mode="constant"
        )
        levels.append(to_decibels(mel_filters(44_100, 4096, 512) @ spectrogram))
    difference = levels[1] - levels[0]
    above, below = (
        float(side.mean()) if len(side) else 0 for side in (difference[difference > 0], difference[difference < 0])
    )
    found = bleed(s, estimate)
    assert found.bleedless == pytest.approx(100 / (1 + above), rel=1e-9)
    assert found.fullness == pytest.approx(100 / (1 - below), rel=1e-9)


def test_a_channel_that_is_silent_in_both_counts_by_the_two_floors() -> None:
    s = noise(2, 44_100) * LEFT
    found = bleed(s, 10 ** (0.5 / 20) * s)  # the floor of the estimate lies half a decibel higher, everywhere
    assert found.bleedless == pytest.approx(100 / 1.5, rel=1e-6)
    assert found.fullness == 100


def test_bleed_and_silence() -> None:
    s = noise(2, 20_000)
    perfect, silent, loud = bleed(s, s), bleed(s, 0 * s), bleed(0 * s, s)
    assert (perfect.bleedless, perfect.fullness) == (100, 100)
    assert silent.bleedless == 100
    assert silent.fullness < 1
    assert loud.fullness == 100
    assert loud.bleedless < 1
    assert bleed(0 * s, 0 * s) == perfect


# --- silence ----------------------------------------------------------------------------------------------


def test_silent_regions_are_found_to_the_sample() -> None:
    s = torch.full((2, 3000), 0.5)
    s[:, :300] = 0  # at the start
    s[:, 1000:1250] = 0.0009  # below the floor, just long enough
    s[:, 1500:1749] = 0  # a sample too short
    s[0, 2000:2600] = 0  # in one channel only
    s[:, 2700:] = -0.0009
    assert silent_regions(s, RATE) == [(0, 300), (1000, 1250), (2700, 3000)]
    assert silent_regions(s, RATE, min_silence=0.249) == [(0, 300), (1000, 1250), (1500, 1749), (2700, 3000)]
    assert silent_regions(s, RATE, threshold=1e-4) == [(0, 300)]
    assert silent_regions(torch.zeros(1, 400), RATE) == [(0, 400)]
    assert silent_regions(torch.ones(1, 400), RATE) == []


def test_leak_of_a_known_level() -> None:
    s = torch.zeros(2, 4000)
    s[:, 1000:2000] = 0.5
    band = torch.full((2, 4000), 0.2)  # constant: mean square 0.04, −14 dBFS
    mixture = s + band
    found = silence_leakage(s, s + 0.1 * band, mixture, RATE)
    assert found.relative == pytest.approx(-20, abs=1e-5)
    assert found.absolute == pytest.approx(20 * math.log10(0.02), abs=1e-5)
    assert found.seconds == 3
    assert silence_leakage(s, mixture, mixture, RATE).relative == pytest.approx(0, abs=1e-6)
    assert silence_leakage(s, s, mixture, RATE).relative == silence_leakage(s, s, mixture, RATE).absolute == -math.inf
    wrong_voice = s + 0.1 * band
    wrong_voice[:, 1000:2000] = 0  # what happens to the voice is no leak
    assert silence_leakage(s, wrong_voice, mixture, RATE) == found


def test_leak_counts_only_what_the_reference_lacks() -> None:
    s = torch.full((1, 1000), 0.0005)
    assert silence_leakage(s, s, s + 0.1, RATE).absolute == -math.inf
    assert silence_leakage(s, 3 * s, s + 0.1, RATE).absolute == pytest.approx(-60, abs=1e-5)


def test_leak_where_there_is_nothing_to_say() -> None:
    s = torch.zeros(1, 1000)
    nothing = silence_leakage(s + 0.5, s, s + 0.5, RATE)
    assert math.isnan(nothing.relative)
    assert math.isnan(nothing.absolute)
    assert nothing.seconds == 0
    assert math.isnan(silence_leakage(s, s, s, RATE).relative)
    assert silence_leakage(s, s + 0.1, s, RATE).relative == math.inf
    assert silence_leakage(s, s + 0.1, s, RATE).absolute == pytest.approx(-20, abs=1e-5)


def test_csdr_does_not_notice_a_leak_ten_times_as_loud_and_leak_says_twenty_decibels() -> None:
    s = noise(2, 5 * RATE)
    s[:, RATE : 3 * RATE] = 0
    gate = (s == 0).double()
    band = noise(2, 5 * RATE, seed=1)
    quiet, loud = (s + 0.3 * (1 - gate) * band + gain * gate * band for gain in (0.05, 0.5))
    assert csdr(s, quiet, RATE) == csdr(s, loud, RATE)
    one, ten = silence_leakage(s, quiet, s + band, RATE), silence_leakage(s, loud, s + band, RATE)
    assert ten.relative - one.relative == pytest.approx(20, abs=1e-9)
    assert ten.absolute - one.absolute == pytest.approx(20, abs=1e-9)
    assert one.relative == pytest.approx(20 * math.log10(0.05), abs=1e-9)
    assert usdr(s, loud) < usdr(s, quiet) - 1


# --- onsets -----------------------------------------------------------------------------------------------


def two_phrases() -> Tensor:
    s = torch.zeros(2, 4000)
    s[:, 500:1500] = 0.5
    s[:, 2500:3500] = -0.2
    return s


@pytest.mark.parametrize("late", [0, 1, 37, 150])
def test_a_late_voice_is_late_by_as_much(late: int) -> None:
    s = two_phrases()
    found = onsets(s, s.roll(late, 1), RATE)
    assert [one.time for one in found] == [0.5, 2.5]
    for one in found:
        assert one.delay == late
        assert one.error == pytest.approx(10 * math.log10(late / 200) if late else -math.inf)


def test_a_gate_that_opens_late_is_late_by_as_much() -> None:
    s = noise(2, 2000)
    s[:, :700] = 0
    estimate = s.clone()
    estimate[:, :760] = 0
    (one,) = onsets(s, estimate, RATE)
    assert one.time == 0.7
    assert one.delay == pytest.approx(60, abs=5)  # noise is not loud in its every sample
    share = float(s[:, 700:760].square().sum() / s[:, 700:900].square().sum())
    assert one.error == pytest.approx(10 * math.log10(share))


def test_a_slow_attack_is_late_by_hand() -> None:
    s = torch.zeros(1, 1000)
    s[:, 500:] = 0.4
    estimate = torch.zeros(1, 1000)
    estimate[0, 500:] = 0.4 * torch.arange(500) / 100  # reaches a quarter of 0.4 after 25 samples
    (one,) = onsets(s, estimate, RATE)
    assert one.delay == 25


def test_the_estimate_is_waited_for_a_window_long_after_the_voice() -> None:
    s = torch.full((1, 1000), 0.002)  # audible at once, and loud after 100 ms
    s[:, :300], s[:, 400:] = 0, 0.4
    estimate = torch.zeros(1, 1000)
    for late, expected in ((199, 199), (200, math.inf)):
        estimate[:, 400:] = 0
        estimate[:, 400 + late :] = 0.4
        (one,) = onsets(s, estimate, RATE)
        assert (one.time, one.delay) == (0.3, expected)


def test_a_voice_that_does_not_come() -> None:
    s = two_phrases()
    for estimate in (0 * s, 0.2 * s, s.roll(250, 1)):
        assert [one.delay for one in onsets(s, estimate, RATE)] == [math.inf, math.inf]
    assert [one.error for one in onsets(s, 0 * s, RATE)] == [0, 0]


def test_songs_without_an_onset() -> None:
    s = torch.full((1, 1000), 0.5)
    assert onsets(s, s, RATE) == []
    assert onsets(0 * s, s, RATE) == []
    s[:, 500:] = 0  # begins with the voice, and ends in silence
    assert onsets(s, s, RATE) == []


def test_a_sound_in_the_last_sample_is_an_onset() -> None:
    s = torch.zeros(1, 1000)
    s[0, -1] = 0.5
    (one,) = onsets(s, s, RATE)
    assert (one.time, one.delay, one.error) == (0.999, 0, -math.inf)


@pytest.mark.parametrize("metric", [usdr, csdr, csdr_seconds, si_sdr, bleed, onsets])
def test_other_shapes_are_refused(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="must both be"):
        metric(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="not empty"):
        metric(torch.zeros(2, 0), torch.zeros(2, 0))


# --- uSDR and cSDR ----------------------------------------------------------------------------------------


def test_usdr_of_signals_whose_value_is_known() -> None:
    s = torch.randn(2, 44_100)
    assert usdr(s, torch.zeros_like(s)) == pytest.approx(0)
    assert usdr(s, 0.9 * s) == pytest.approx(20, abs=1e-3)
    assert usdr(s, -s) == pytest.approx(-20 * math.log10(2), abs=1e-3)
    assert usdr(0 * s, 0 * s) == pytest.approx(0)
    assert usdr(0 * s, s) < -100


def test_csdr_drops_silent_seconds_and_the_tail() -> None:
    s = torch.randn(2, 44_100 * 5 + 20_000)
    estimate = s * torch.tensor([0.9, 0.5, 0.9, 0.5, 0.9]).repeat_interleave(44_100).tolist()[0]
    assert csdr(s, estimate) == pytest.approx(20, abs=1e-3)
    gains = torch.ones(s.shape[1])
    for second, gain in enumerate((0.9, 0.99, 0.5, 0.9, 0.9)):
        gains[second * 44_100 : (second + 1) * 44_100] = gain
    assert csdr(s, s * gains) == pytest.approx(20, abs=1e-3)  # the median of 20, 40, 6, 20, 20
    silent = s.clone()
    silent[:, 44_100 : 3 * 44_100] = 0
    leak = silent + 10 * (silent == 0)
    leak[:, :44_100] *= 0.9
    leak[:, 3 * 44_100 :] *= 0.9
    assert csdr(silent, leak) == pytest.approx(20, abs=1e-3)
    assert csdr(s, s) == math.inf
    assert math.isnan(csdr(0 * s, s))
    opposite = torch.stack([s[0], -s[0]])  # channels that sum to zero count as silence
    assert math.isnan(csdr(opposite, s))


def test_metrics_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 5)")):
        usdr(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="not empty"):
        csdr(torch.zeros(2, 0), torch.zeros(2, 0))
