"""The Mamba-2 mixer: its initial values, its convolution, and a sequence in segments."""

from __future__ import annotations

import pytest
import torch
from tiny_model import relative
from torch import nn
from torch.nn import functional

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.mamba2 import Mamba2, causal_conv1d_silu


def test_initial_values() -> None:
    torch.manual_seed(0)
    mixer = BSMamba2(ModelConfig(depth=1)).layers[0].time.forwards.mixer
    steps = nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 < steps.min() < steps.max() < 1e-1 * 1.001
    assert 1 <= mixer.A_log.exp().min() < mixer.A_log.exp().max() <= 16
    assert mixer.D.eq(1).all()
    assert mixer.norm.weight.eq(1).all()


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_sequence_in_segments_is_the_sequence(taps: int, cut: int) -> None:
    mixer, x = Mamba2(16, d_state=8, headdim=8, d_conv=taps), torch.randn(2, 70, 16)
    with torch.no_grad():
        whole = mixer(x)
        first, state = mixer.step(x[:, :cut])
        second, _ = mixer.step(x[:, cut:], state)
    assert state.conv_state.shape == (2, taps - 1, mixer.proj_sizes[1])
    assert state.ssm_state.shape == (2, mixer.proj_sizes[2], 8, 8)
    assert relative(torch.cat((first, second), dim=1), whole) < 1e-5


def test_the_convolution_is_its_definition_and_continues() -> None:
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 1, 4), torch.randn(5)
    past = torch.randn(2, 3, 5)
    padded = torch.cat((past, x), dim=1)
    expected = functional.silu(sum(weight[:, 0, i] * padded[:, i : i + 9] for i in range(4)) + bias)
    assert relative(causal_conv1d_silu(x, weight, bias, past), expected) < 1e-6
    from_silence = causal_conv1d_silu(x, weight, bias)
    assert relative(from_silence, causal_conv1d_silu(x, weight, bias, torch.zeros(2, 3, 5))) < 1e-6


@pytest.mark.parametrize("decay", [1.0, 16.0])
def test_float16_agrees_to_its_precision(decay: float) -> None:
    torch.manual_seed(0)
    mixer, x = Mamba2(16, d_state=8, headdim=8), torch.randn(2, 150, 16)
    with torch.no_grad():
        mixer.dt_bias.fill_(0.0)
        mixer.A_log.fill_(torch.tensor(decay).log())
        expected = mixer(x)
        with torch.autocast("cpu", torch.float16):
            found = mixer(x)
    assert relative(found, expected) < 5e-3
