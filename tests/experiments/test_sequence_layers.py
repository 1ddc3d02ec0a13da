"""Sequence layers of one size: shapes, directions, places, and parameters counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_model import TINY
from torch import Tensor, nn

from bsmamba2 import BSMamba2, ModelConfig, save_checkpoint
from bsmamba2.checkpoints import CheckpointError
from bsmamba2.experiments import sequence_layers
from bsmamba2.experiments.silence import MODEL

CONFIGS = {"silence": MODEL, "tiny": TINY, "small": ModelConfig.preset("small"), "paper": ModelConfig()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", sequence_layers.LAYERS)
def test_layers_are_of_the_mixers_size(name: str, config: ModelConfig) -> None:
    # counted by hand from the mixer's own description, not by the module
    inner, heads = config.expand * config.dim, config.expand * config.dim // config.headdim
    wide = inner + 2 * config.d_state
    mixer = config.dim * (inner + wide + heads) + wide * (config.d_conv + 1) + 3 * heads + inner + inner * config.dim
    assert sequence_layers.parameter_budget(config) == mixer
    try:
        made = sequence_layers.make_layer(name, config)
    except ValueError:  # a width has no neighbour near enough: said, not passed over
        assert (name, config) in {("lstm", TINY)}
        return
    with torch.device("meta"):
        found = sum(part.numel() for part in made().parameters())
    assert abs(found - mixer) <= 0.01 * mixer


def test_a_budget_that_cannot_be_met_is_told() -> None:
    with pytest.raises(ValueError, match="no width brings this layer within 1%"):
        sequence_layers.make_layer("lstm", dataclasses.replace(MODEL, dim=4, headdim=1, d_state=1, expand=1))
    with pytest.raises(ValueError, match="'rnn' is not one of mamba2, lstm, attention"):
        sequence_layers.make_layer("rnn", MODEL)


@pytest.mark.parametrize("name", sequence_layers.LAYERS)
def test_shapes_gradients_and_sequences_apart(name: str) -> None:
    torch.manual_seed(0)
    layer = sequence_layers.make_layer(name, MODEL)()
    x = torch.randn(3, 7, MODEL.dim, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in layer.parameters())
    torch.testing.assert_close(layer(x[1:2]), y[1:2])  # a sequence does not see the others


@pytest.mark.parametrize(("name", "causal"), [("mamba2", True), ("lstm", True), ("attention", False)])
def test_who_sees_what_comes_later(name: str, causal: bool) -> None:
    torch.manual_seed(0)
    layer = sequence_layers.make_layer(name, MODEL)()
    x = torch.randn(1, 9, MODEL.dim)
    changed = x.clone()
    changed[:, 6] += 1
    moved = (layer(changed) - layer(x)).abs().amax(-1)[0] > 1e-6
    assert bool(moved[6:].all())
    assert bool(moved[:6].any()) is not causal


# --- attention ------------------------------------------------------------------------------------------------


def by_loops(layer: sequence_layers.Attention, x: Tensor) -> Tensor:
    """The attention of one sequence (length, d), frame by frame, with complex numbers for the rotation."""
    length, d = x.shape
    p = layer.headdim
    qkv = (x @ layer.in_proj.weight.T).reshape(length, 3, d // p, p).double()
    speed = [10_000.0 ** (-2 * i / p) for i in range(p // 2)]

    def turned(part: Tensor, place: int) -> Tensor:
        pairs = torch.complex(part[: p // 2], part[p // 2 :])
        return pairs * torch.tensor([complex(math.cos(place * s), math.sin(place * s)) for s in speed])

    rows = []
    for j in range(length):
        heads = []
        for h in range(d // p):
            q = turned(qkv[j, 0, h], j)
            products = [(q * turned(qkv[m, 1, h], m).conj()).real.sum() / math.sqrt(p) for m in range(length)]
            weights = torch.stack(products).softmax(0)
            heads.append(sum(weights[m] * qkv[m, 2, h] for m in range(length)))
        rows.append(torch.cat(heads))
    attended = torch.stack(rows).float() @ layer.out_proj.weight.T
    inside = x + attended
    inside = inside * (inside.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm.weight
    first, _, second = layer.feed_forward
    return attended + nn.functional.gelu(inside @ first.weight.T + first.bias) @ second.weight.T + second.bias


def attention() -> sequence_layers.Attention:
    torch.manual_seed(1)
    layer = sequence_layers.Attention(8, 5, headdim=4)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
        layer.in_proj.weight.mul_(4)  # so that the softmax is far from uniform
    return layer


def test_attention_is_what_its_formula_says() -> None:
    layer, x = attention(), torch.randn(6, 8)
    torch.testing.assert_close(layer(x[None])[0], by_loops(layer, x), rtol=1e-4, atol=1e-5)


def unturned(x: Tensor, offset: int = 0) -> Tensor:
    return x


def turned_alike(x: Tensor, offset: int = 0) -> Tensor:
    """A rotation that forgets the place."""
    return ROTATE(x[..., None, :], 3)[..., 0, :]


ROTATE = sequence_layers.apply_rotary


@pytest.mark.parametrize("fault", [unturned, turned_alike])
def test_without_places_attention_is_blind_to_order(
    fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, order = attention(), torch.randn(1, 6, 8), torch.tensor([3, 0, 5, 1, 4, 2])

    def blind() -> bool:
        return torch.allclose(layer(x[:, order]), layer(x)[:, order], atol=1e-5)

    assert not blind()
    with monkeypatch.context() as patch:
        patch.setattr(sequence_layers, "apply_rotary", fault)
        assert blind()
        assert not torch.allclose(layer(x)[0], by_loops(layer, x[0]), atol=1e-5)


def test_places_count_only_by_their_distance() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 16, dtype=torch.float64).unbind(0)
    here = sequence_layers.apply_rotary(q) @ sequence_layers.apply_rotary(k).T
    far = sequence_layers.apply_rotary(q, 1000) @ sequence_layers.apply_rotary(k, 1000).T
    torch.testing.assert_close(here, far, rtol=0, atol=1e-2)  # angles are float32
    same = sequence_layers.apply_rotary(q[:1].expand(5, -1)) @ sequence_layers.apply_rotary(k[:1].expand(5, -1)).T
    for distance in range(-4, 5):  # equal q and k: one value for each distance
        diagonal = same.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert float(same[0].std()) > 0.1
    torch.testing.assert_close(sequence_layers.apply_rotary(q).norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("headdim", [0, 3, 5, 16])
def test_heads_that_do_not_fit_are_refused(headdim: int) -> None:
    with pytest.raises(ValueError, match=f"headdim={headdim} must be even and divide dim=8"):
        sequence_layers.Attention(8, 4, headdim=headdim)


# --- in the model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "attention"])
def test_a_model_takes_it_and_no_checkpoint_hides_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BSMamba2(MODEL, sequence_layer=sequence_layers.make_layer(name, MODEL)).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 2, 4000)).shape == (1, 1, 2, 4000)
    with pytest.raises(CheckpointError, match="does not fit a BSMamba2"):
        save_checkpoint(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
