"""Two directions and two axes: nothing is scrambled, and everything is reached."""

from __future__ import annotations

import torch

from bsmamba2 import BSMamba2


def test_time_and_bands_are_not_scrambled(tiny: BSMamba2) -> None:
    """A model whose band axis does nothing must treat each band by itself (a missing transpose mixes them)."""
    layer = tiny.layers[0]
    with torch.no_grad():
        for parameter in layer.band.parameters():
            parameter.zero_()
    x = torch.randn(1, 20, 4, 16)
    changed = x.clone()
    changed[:, :, 2] += 1
    difference = (layer(x) - layer(changed)).abs().amax((0, 1, 3))
    assert difference[2] > 1e-3
    assert not difference[[0, 1, 3]].any()


def test_both_directions_and_both_axes_are_heard(tiny: BSMamba2) -> None:
    x = torch.randn(1, 20, 4, 16)
    changed = x.clone()
    changed[0, 10, 2] += 1
    heard = (tiny.layers[0](x) - tiny.layers[0](changed)).abs().amax(-1)[0]  # (t, k)
    assert (heard > 0).all()


def test_directions_have_their_own_weights(tiny: BSMamba2) -> None:
    block = tiny.layers[0].time
    assert not torch.equal(block.forwards.mixer.in_proj.weight, block.backwards.mixer.in_proj.weight)
