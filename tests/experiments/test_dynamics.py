"""Interventions on Δ: what they change, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_model import TINY
from torch import Tensor
from torch.nn import functional

from bsmamba2 import BSMamba2
from bsmamba2.experiments import dynamics
from bsmamba2.experiments.benchmark.tables import machine
from bsmamba2.experiments.silence import score
from bsmamba2.kernels import accelerate
from bsmamba2.mamba2 import Mamba2
from bsmamba2.synth import synthesise

DATA = Path(__file__).parents[2] / "book" / "data" / "trained_dynamics.json"
HEADS = 8
SUNG = torch.tensor([False, False, True, True, True, False])


@pytest.fixture
def model() -> BSMamba2:
    torch.manual_seed(0)
    return BSMamba2(dataclasses.replace(TINY, headdim=4, depth=2)).eval().requires_grad_(False)


@pytest.fixture
def mixture() -> Tensor:
    return torch.randn(2, 900, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dt() -> Tensor:
    return torch.rand(3, len(SUNG), HEADS, generator=torch.Generator().manual_seed(2)) + 0.1


def time_mixer(model: BSMamba2, layer: int = -1, direction: str = "forwards") -> Mamba2:
    return getattr(model.layers[layer].time, direction).mixer


def last_steps(model: BSMamba2, mixture: Tensor) -> Tensor:
    return dynamics.record_steps(model, mixture)[len(model.layers) - 1, "forwards"]


# --- the model as it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["plain", "auto"])
def test_its_own_steps_change_nothing_and_all_is_put_back(model: BSMamba2, mixture: Tensor, backend: str) -> None:
    accelerate(model, backend)
    mixer = time_mixer(model)
    expected, form, scan = model(mixture[None]), type(mixer), mixer.scan
    own = last_steps(model, mixture)
    with dynamics.changed_steps(mixer, lambda dt: own.clone()) as steps:
        found = model(mixture[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(steps[0], own)
    with pytest.raises(ZeroDivisionError), dynamics.changed_steps(mixer, lambda dt: dt / 0):
        raise ZeroDivisionError
    assert (type(mixer), mixer.scan) == (form, scan)
    assert torch.equal(model(mixture[None]), expected)
    with dynamics.changed_steps(mixer, lambda dt: 2 * dt):  # also in a fused block
        assert (model(mixture[None]) - expected).abs().max() > 1e-5


def test_decoding_the_last_features_is_the_model(model: BSMamba2, mixture: Tensor) -> None:
    features = dynamics.residual_stream(model, mixture)
    assert len(features) == len(model.layers) + 1
    mask, estimate = dynamics.decode(model, features[-1], mixture)
    torch.testing.assert_close(estimate, model(mixture[None])[0, 0])
    assert mask.shape == (2, TINY.bins, features[0].shape[1])
    assert mask.is_complex()
    earlier = dynamics.decode(model, features[0], mixture)[1]
    assert (earlier - estimate).abs().max() > 1e-3


def test_recorded_steps_are_those_of_the_formula_in_the_order_of_the_song(model: BSMamba2, mixture: Tensor) -> None:
    recorded = dynamics.record_steps(model, mixture)
    assert list(recorded) == [(i, way) for i in range(2) for way in ("forwards", "backwards")]
    x = dynamics.residual_stream(model, mixture)[1][0].transpose(0, 1)  # (k, t, d), into the second layer
    for way in ("forwards", "backwards"):
        direction = getattr(model.layers[1].time, way)
        projected = direction.mixer.in_proj(direction.norm(x))[..., -HEADS:]  # frame by frame: the order is no matter
        expected = functional.softplus(projected + direction.mixer.dt_bias)
        torch.testing.assert_close(recorded[1, way], expected)


# --- interventions --------------------------------------------------------------------------------------------


def test_holding_gives_the_mean_of_each_sequence_to_one_head(dt: Tensor) -> None:
    before = dt.clone()
    changed = dynamics.hold(3, SUNG)(dt)
    assert torch.equal(dt, before)
    for sequence in range(3):
        mean = (dt[sequence, 2, 3] + dt[sequence, 3, 3] + dt[sequence, 4, 3]) / 3
        torch.testing.assert_close(changed[sequence, :, 3], mean.expand(len(SUNG)))
    others = [h for h in range(HEADS) if h != 3]
    assert torch.equal(changed[..., others], dt[..., others])
    torch.testing.assert_close(dynamics.hold(3, ~SUNG)(changed), changed)  # a constant is held at itself


def test_rescaling_touches_one_head_in_the_named_frames(dt: Tensor) -> None:
    changed = dynamics.rescale(2, SUNG, 5.0)(dt) / dt
    expected = torch.ones_like(dt)
    expected[:, 2:5, 2] = 5
    torch.testing.assert_close(changed, expected)
    assert torch.equal(dynamics.rescale(2, SUNG, 1.0)(dt), dt)


def test_an_exchange_is_its_own_inverse(dt: Tensor) -> None:
    change = dynamics.exchange(1, 6)
    assert torch.equal(change(dt), dt[..., [0, 6, 2, 3, 4, 5, 1, 7]])
    assert torch.equal(change(change(dt)), dt)


def test_a_later_change_leaves_earlier_frames_as_they_were(model: BSMamba2) -> None:
    mixer, late = time_mixer(model), torch.arange(20) >= 12
    x = torch.randn(2, 20, TINY.dim)
    with dynamics.changed_steps(mixer, dynamics.rescale(1, late, 3.0)):
        changed = mixer(x)
    assert torch.equal(changed[:, :12], mixer(x)[:, :12])
    assert ((changed - mixer(x))[:, 12:].abs().amax(-1) > 1e-6).all()


def test_conditions_open_every_head_by_the_ratio_of_the_head_under_test() -> None:
    dt = torch.rand(2, len(SUNG), 1).expand(-1, -1, HEADS).clone()
    dt[..., dynamics.HEAD] = torch.where(SUNG, 0.6, 0.02)
    changes = dynamics.conditions(dt, SUNG)
    torch.testing.assert_close(changes[f"open {dynamics.HEAD + 1}"](dt)[..., dynamics.HEAD], torch.full((2, 6), 0.6))
    torch.testing.assert_close(changes["open 8"](dt)[:, ~SUNG, 7], 30 * dt[:, ~SUNG, 7])
    assert torch.equal(changes["own"](dt), dt)
    assert not changes["no state"](dt).any()
    exchanges = {name for name in changes if name.startswith("exchange")}
    assert exchanges == {f"exchange 2 {g}" for g in (1, 3, 4, 5, 6, 7, 8)} | {
        f"exchange 5 {g}" for g in (1, 3, 4, 6, 7, 8)
    }


def test_sung_frames_begin_and_end_with_the_phrases() -> None:
    song = dataclasses.replace(synthesise(0, seconds=0.5), vocal_segments=((0.1, 0.2), (0.4, 0.45)))
    sung = dynamics.sung_frames(song, 26, 882)  # 20 ms each
    assert sung.nonzero()[:, 0].tolist() == [5, 6, 7, 8, 9, 20, 21, 22]


def test_a_song_has_a_row_for_each_condition(model: BSMamba2, monkeypatch: pytest.MonkeyPatch) -> None:
    short = partial(synthesise, seconds=1.5, sample_rate=TINY.sample_rate)
    monkeypatch.setattr(dynamics, "synthesise", short)
    mixer = time_mixer(model)
    mixer.dt_bias.add_(3)  # makes the state matter enough to show in thousandths of a decibel
    mixer.out_proj.weight.mul_(10)
    names = ["own", "no state"]
    rows = dynamics.run_song(model, 7, names)
    assert [row["condition"] for row in rows] == names
    assert {row["song"] for row in rows} == {7}
    song = short(dynamics.SEED + 7, occupancy=0.5)
    estimate = model(song.mixture[None])[0, 0]
    assert rows[0].items() >= score(song, estimate).items()
    assert rows[1]["usdr"] != rows[0]["usdr"]


# --- the committed result -------------------------------------------------------------------------------------


def test_the_committed_result_has_every_condition_of_every_song() -> None:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    assert {"command", "commit", "machine"} < data.keys()
    assert {"processor", "threads", "python", "torch", "date"} < data["machine"].keys() <= machine().keys()
    rows = data["rows"]
    names = dynamics.conditions(torch.ones(1, len(SUNG), 6), SUNG)
    expected = [(song, name) for song in range(dynamics.SONGS) for name in names]
    assert list(zip(rows["song"], rows["condition"], strict=True)) == expected
    assert {len(column) for column in rows.values()} == {len(expected)}
