"""Overlap-add of a song in memory."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch
from stand_in_models import Broken, Counting, Identity
from torch import Tensor, nn

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.separate import separate, stagger_step, tta_views


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", [1, 50, 799, 800, 801, 5000, 8123])
def test_an_identity_gives_its_input_back_bit_for_bit(overlap: float, samples: int) -> None:
    torch.manual_seed(samples)
    mixture = torch.randn(2, samples) * torch.logspace(-38, 3, samples)
    model = Identity()
    found = separate(model, mixture, segment=0.1, overlap=overlap)  # type: ignore[arg-type]
    assert found.shape == (1, 2, samples)
    assert torch.equal(found[0], mixture)
    assert set(model.shapes) == {(1, 2, 800)}


def test_no_segment_is_spent_on_nothing() -> None:
    for overlap, samples, expected in (
        (0, 800, 1), (0, 801, 2), (0, 1600, 2), (0, 4000, 5),
        (0.5, 400, 1), (0.5, 800, 1), (0.5, 801, 2), (0.5, 1200, 2), (0.5, 1201, 3),
    ):  # fmt: skip
        model = Identity()
        separate(model, torch.randn(2, samples), segment=0.1, overlap=overlap)  # type: ignore[arg-type]
        assert len(model.shapes) == expected


def test_each_segment_begins_a_step_after_the_one_before() -> None:
    """Against the definition: every segment cut out by hand, weighted, summed, divided."""
    torch.manual_seed(0)
    mixture, length, step = torch.randn(2, 3001), 800, 624  # three quarters of 800, and on to 19 hops and a half
    weight = torch.minimum(torch.arange(1.0, 801), torch.arange(800.0, 0, -1)).double()
    top, bottom = torch.zeros(2, 4000).double(), torch.zeros(4000).double()
    for number, start in enumerate(range(0, 2497, step), start=1):
        top[:, start : start + length] += number * weight
        bottom[start : start + length] += weight
    found = separate(Counting(), mixture, segment=0.1, overlap=0.25)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), (top / bottom)[:, :3001], rtol=1e-6, atol=0)


@pytest.mark.parametrize("hop_length", [32, 441, 882])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75, 0.9])
def test_segments_over_one_sample_have_their_frames_between_each_others(overlap: float, hop_length: int) -> None:
    length = 20 * hop_length + 7
    wanted = round(length * (1 - overlap))
    step = stagger_step(wanted, length, hop_length)
    assert wanted <= step < wanted + hop_length
    count = max(2, round(length / wanted))
    places = sorted({i * step % hop_length for i in range(count)})  # of the frames, within a hop
    assert len(places) == count
    gaps = [later - place for place, later in pairwise([*places, places[0] + hop_length])]
    assert max(gaps) - min(gaps) <= count  # a hop need not be a multiple
    assert stagger_step(length - 2, length, hop_length) == length - 2  # no room to move


def test_overlap_leaves_no_seam() -> None:
    """Segments that disagree by 1: a click at overlap 0, else a slope: 1/176 where 176 samples overlap, or 2/400."""
    mixture = torch.zeros(2, 8000)
    largest = {
        overlap: float(separate(Counting(), mixture, segment=0.1, overlap=overlap).diff().abs().max())  # type: ignore[arg-type]
        for overlap in (0.0, 0.25, 0.5)
    }
    assert largest[0.0] == 1
    assert largest[0.25] < 1 / 175
    assert largest[0.5] < 1 / 200


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_the_batch_changes_nothing_but_the_last_bits(tiny: BSMamba2, overlap: float) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 5000)
    one = separate(tiny, mixture, segment=0.1, overlap=overlap)
    model = Identity()
    for batch in (2, 3, 64):
        many = separate(tiny, mixture, segment=0.1, overlap=overlap, batch=batch)
        assert (many - one).abs().max() <= 2e-6 * one.abs().max()
        same = separate(model, mixture, segment=0.1, overlap=overlap, batch=batch)  # type: ignore[arg-type]
        assert torch.equal(same[0], mixture)
    assert {shape[0] for shape in model.shapes} > {2, 3}


def test_silence_gives_silence(tiny: BSMamba2) -> None:
    assert not separate(tiny, torch.zeros(2, 5000), segment=0.1).any()


def test_a_narrower_type_is_close(tiny: BSMamba2) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 2000)
    wide = separate(tiny, mixture, segment=0.1)
    narrow = separate(tiny, mixture, segment=0.1, dtype=torch.bfloat16)
    assert narrow.dtype == torch.float32
    assert 0 < float((narrow - wide).norm() / wide.norm()) < 0.05


def test_progress_counts_every_sample() -> None:
    told: list[tuple[int, int]] = []
    separate(Identity(), torch.zeros(2, 2345), segment=0.1, progress=lambda *done: told.append(done))  # type: ignore[arg-type]
    assert sum(done for done, _ in told) == 2345
    assert {whole for _, whole in told} == {2345}


@pytest.mark.parametrize(
    ("model", "mixture", "options", "message"),
    [
        (Identity(), torch.zeros(1, 100), {}, "c=2"),
        (Identity(), torch.zeros(2, 0), {}, "not empty"),
        (Identity(), torch.full((2, 100), math.nan), {}, "NaN"),
        (Identity(), torch.full((2, 100), math.inf), {}, "infinite"),
        (Identity(), torch.zeros(2, 100), {"overlap": 1.0}, "overlap=1.0"),
        (Identity(), torch.zeros(2, 100), {"overlap": math.nan}, "overlap=nan"),
        (Identity(), torch.zeros(2, 100), {"segment": 0.001}, "segment=0.001"),
        (Identity(), torch.zeros(2, 100), {"segment": math.inf}, "segment=inf"),
        (Identity(), torch.zeros(2, 100), {"batch": 0}, "batch=0"),
        (Identity(), torch.zeros(2, 100), {"shifts": 0}, "shifts=0"),
        (Identity(), torch.zeros(2, 100), {"shifts": 101}, "shifts=101"),
        (Broken(), torch.ones(2, 100), {}, "another checkpoint"),
        (Broken(), torch.ones(2, 100), {"dtype": torch.bfloat16}, "float32"),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, mixture: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        separate(model, mixture, **options)  # type: ignore[arg-type]


def test_separation_leaves_no_gradient(tiny: BSMamba2) -> None:
    assert not separate(tiny, torch.randn(2, 1000), segment=0.1).requires_grad


@pytest.mark.parametrize("options", [{"shifts": 3}, {"tta": True}, {"shifts": 2, "tta": True}], ids=str)
def test_an_average_of_identities_is_the_input_bit_for_bit(options: dict) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 5001) * torch.logspace(-38, 3, 5001)
    model, told = Identity(), []
    found = separate(model, mixture, segment=0.1, progress=lambda *done: told.append(done), **options)  # type: ignore[arg-type]
    assert torch.equal(found[0], mixture)
    passes = options.get("shifts", 1) * (3 if "tta" in options else 1)
    assert {whole for _, whole in told} == {passes * max(whole // passes for _, whole in told)}
    assert sum(done for done, _ in told) == told[0][1]


def test_the_average_is_that_of_passes_made_by_hand(tiny: BSMamba2) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 9000) * torch.tensor([[1.0], [0.3]])
    plain = separate(tiny, mixture, segment=0.5)
    swapped = separate(tiny, mixture.flip(0), segment=0.5).flip(1)
    inverted = -separate(tiny, -mixture, segment=0.5)
    found = separate(tiny, mixture, segment=0.5, tta=True)
    torch.testing.assert_close(found, (plain + swapped + inverted) / 3, rtol=0, atol=1e-6)
    assert not torch.equal(swapped, plain)
    delays = [view.delay for view in tta_views(tiny.config, 2, False)]
    assert delays[0] == 0
    assert 0 <= delays[1] - 2000 < 32  # about half of half a second, and half a hop between the frames
    assert delays[1] % 32 == 16
    both = [
        separate(tiny, nn.functional.pad(mixture, (delay, delays[1] - delay)), segment=0.5)[..., delay : delay + 9000]
        for delay in delays
    ]
    found = separate(tiny, mixture, segment=0.5, shifts=2)
    torch.testing.assert_close(found, (both[0] + both[1]) / 2, rtol=0, atol=1e-6)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(found, separate(tiny, mixture, segment=0.5, shifts=2))
    assert torch.equal(plain, separate(tiny, mixture, segment=0.5, shifts=1, tta=False))


@pytest.mark.parametrize("shifts", [1, 2, 3, 5, 10])
def test_shifts_are_spread_over_half_a_second_and_over_a_hop(shifts: int) -> None:
    config = ModelConfig()
    delays = [view.delay for view in tta_views(config, shifts, False)]
    assert len(delays) == shifts
    assert delays[-1] <= 22_050
    assert delays[-1] >= 22_050 * (shifts - 1) / shifts - 1
    places = sorted(delay % config.hop_length for delay in delays)
    assert max(later - place for place, later in pairwise([*places, config.hop_length])) <= 441 / shifts + shifts
