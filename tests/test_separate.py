"""Overlap-add of a song in memory."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch
from stand_in_models import Broken, Counting, Identity
from torch import Tensor, nn

from bsmamba2 import BSMamba2
from bsmamba2.separate import separate, stagger_step


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
        (Broken(), torch.ones(2, 100), {}, "another checkpoint"),
        (Broken(), torch.ones(2, 100), {"dtype": torch.bfloat16}, "float32"),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, mixture: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        separate(model, mixture, **options)  # type: ignore[arg-type]


def test_separation_leaves_no_gradient(tiny: BSMamba2) -> None:
    assert not separate(tiny, torch.randn(2, 1000), segment=0.1).requires_grad
