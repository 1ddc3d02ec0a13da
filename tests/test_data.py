"""Training examples: salient windows, remixing, and the validation score."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_model import TINY

from bsmamba2 import BSMamba2
from bsmamba2.data import Batch, Remixer, Validation, find_windows, salient_windows
from bsmamba2.metrics import usdr
from bsmamba2.synth import Song, synthesise_songs


@pytest.fixture(scope="module")
def pool() -> list[Song]:
    return synthesise_songs(3, seed=5, seconds=2.0, sample_rate=8000)


def test_salient_windows_by_hand() -> None:
    stem = torch.zeros(2, 1000)
    stem[:, 400:700] = torch.randn(2, 300)
    assert salient_windows(stem, 200) == [400, 500]  # of 0, 100, …, 800: more than half of the chunks sound
    assert salient_windows(stem * 1e-5, 200) == []
    stem[1] = 0  # one channel only
    assert salient_windows(stem, 200) == []
    assert salient_windows(torch.randn(2, 150), 200) == []
    with pytest.raises(ValueError, match="5 samples"):
        salient_windows(stem, 5)


def test_half_of_the_chunks_is_not_enough() -> None:
    for loud, expected in ((5, []), (6, [0])):
        stem = torch.zeros(1, 100)
        stem[:, : loud * 10] = 0.5
        assert salient_windows(stem, 100, quantile=0.0) == expected


def test_batches_repeat_with_their_seed(pool: list[Song]) -> None:
    def draw(seed: int) -> list[Batch]:
        return list(islice(Remixer(pool, 8000, 2, seed=seed), 3))

    for one, two in zip(draw(1), draw(1), strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert not torch.equal(draw(1)[0][0], draw(2)[0][0])


def test_the_target_stands_in_the_mixture_with_its_gain(pool: list[Song]) -> None:
    lonely = [dataclasses.replace(song, stems=song.stems[:1]) for song in pool]
    for mixture, target, _ in islice(Remixer(lonely, 8000, 4), 5):
        assert torch.equal(mixture, target)


def test_stems_are_absent_as_often_as_asked_and_gains_are_independent() -> None:
    stems = torch.randn(4, 2, 1000, generator=torch.Generator().manual_seed(0))
    one = Song("noise", stems, 8000, (), "", "")  # as long as a window, so that only the gains are left to draw
    gains = []
    for mixture, target, _ in islice(Remixer([one], 1000, 8, stem_dropout=0.1), 250):
        found = torch.linalg.lstsq(stems.flatten(1).T, mixture.flatten(1).T).solution.T  # (8, stem)
        torch.testing.assert_close(found[:, 0, None, None] * stems[0], target, rtol=0, atol=1e-4)
        gains.append(found)
    drawn = torch.cat(gains)
    sounding = drawn.abs() > 1e-3
    for stem in range(4):
        assert sounding[:, stem].float().mean().item() == pytest.approx(0.9, abs=0.03)
        assert 0.499 < drawn[sounding[:, stem], stem].min() < 0.51
        assert 1.49 < drawn[:, stem].max() < 1.501
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 0.1


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_examples_say_where_they_are_from_and_skipping_draws_the_same(pool: list[Song]) -> None:
    batches = list(islice(Remixer(pool, 8000, 2, seed=4), 6))
    skipped = Remixer(pool, 8000, 2, seed=4)
    skipped.skip(5)
    assert equal(next(iter(skipped)), batches[5])
    by_label = {song.label(stem): (song, stem) for song in pool for stem in range(4)}
    checked = 0
    for _, targets, names in batches:
        for target, name in zip(targets, names, strict=True):
            label, _, place = name.split(" + ")[0].partition(" at ")
            song, stem = by_label[label]
            if stem == 0:
                start = round(float(place.removesuffix(" s")) * 8000)
                source = song.stems[0, :, start : start + 8000]
                gain = (target * source).sum() / source.square().sum()
                torch.testing.assert_close(target, source * gain)
                checked += 1
    assert checked > 6


def test_validation_is_the_mean_over_windows_where_the_target_is_heard(tiny: BSMamba2, pool: list[Song]) -> None:
    by_stem = find_windows(pool, 8000)
    windows, expected = by_stem[0], []
    for song, start in windows:
        with torch.inference_mode():
            estimate = tiny(song.mixture[None, :, start : start + 8000])[0, 0]
        expected.append(usdr(song.vocals[:, start : start + 8000], estimate))
    assert Validation(by_stem, 8000)(tiny) == {"usdr": pytest.approx(sum(expected) / len(expected), abs=1e-4)}
    few = Validation(by_stem, 8000, count=2).windows
    assert few == [windows[0], windows[len(windows) // 2]]
    with pytest.raises(ValueError, match="no song for validation"):
        Validation([], 8000)


def test_several_targets_are_stems_of_the_same_mixture_in_the_order_asked_for(pool: list[Song]) -> None:
    one = islice(Remixer(pool, 8000, 2, seed=3), 10)
    several = islice(Remixer(pool, 8000, 2, seed=3, targets=(2, 0)), 10)
    rest = islice(Remixer(pool, 8000, 2, seed=3, targets=(1, 3)), 10)
    for (mixture, vocals, names), (same, targets, named), (_, others, _) in zip(one, several, rest, strict=True):
        assert torch.equal(mixture, same)
        assert names == named
        assert targets.shape == (2, 2, 2, 8000)  # (b, stem, c, samples)
        assert torch.equal(targets[:, 1], vocals)
        torch.testing.assert_close(targets.sum(1) + others.sum(1), mixture)


def test_a_validation_scores_each_target_where_it_is_heard(pool: list[Song]) -> None:
    """The drums rest in half of the windows: those are not scored for them, but for the vocals."""
    torch.manual_seed(0)
    model = BSMamba2(dataclasses.replace(TINY, stems=("drums", "vocals"))).eval()
    by_stem = find_windows(pool, 8000)
    windows = [by_stem[0], by_stem[1][::2]]
    assert 0 < len(set(windows[0]) & set(windows[1])) < len(windows[0])
    expected = {}
    for output, (name, stem) in enumerate((("drums", 1), ("vocals", 0))):
        scores = []
        for song, start in windows[stem]:
            with torch.inference_mode():
                estimate = model(song.mixture[None, :, start : start + 8000])[0, output]
            scores.append(usdr(song.stems[stem, :, start : start + 8000], estimate))
        expected[f"usdr_{name}"] = sum(scores) / len(scores)
    expected["usdr"] = sum(expected.values()) / 2
    validation = Validation(windows, 8000, targets=(1, 0))
    assert validation(model) == pytest.approx(expected, abs=1e-4)
    assert len(validation.windows) == len(set(windows[0]) | set(windows[1]))  # a window of both is separated once
    with pytest.raises(ValueError, match="window in which stem 1 is heard"):
        Validation([windows[0], []], 8000, targets=(0, 1))


def test_a_stem_that_is_never_heard_is_named(pool: list[Song]) -> None:
    mute = [dataclasses.replace(song, stems=song.stems * torch.tensor([1.0, 1, 0, 1])[:, None, None]) for song in pool]
    with pytest.raises(ValueError, match="stem 2 is never heard"):
        Remixer(mute, 8000, 1)
    with pytest.raises(ValueError, match="no song"):
        Remixer([], 8000, 1)
