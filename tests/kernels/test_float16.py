"""Float16 agrees with float32 to the type's precision, whichever backend runs and however large the activations are."""

from __future__ import annotations

import pytest
import torch
from tiny_model import relative
from torch import Tensor

from bsmamba2 import BSMamba2, load_checkpoint
from bsmamba2.checkpoints import bundled_checkpoint
from bsmamba2.kernels import accelerate
from bsmamba2.mamba2 import Mamba2
from bsmamba2.synth import excerpt

BACKENDS = pytest.mark.parametrize("backend", ["plain", "chunked", "auto"])  # auto: the C++ kernel, where it is built


@pytest.fixture(scope="module")
def trained() -> BSMamba2:
    return load_checkpoint(bundled_checkpoint())


@pytest.fixture(scope="module")
def song() -> Tensor:
    return excerpt().mixture[None, :, 44_100:88_200]


def in_both(model: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        expected = model(x)
        with torch.autocast("cpu", torch.float16):
            return model(x).float(), expected


@BACKENDS
@pytest.mark.parametrize("gain", [1e-4, 1.0, 30.0])
def test_the_bundled_checkpoint(trained: BSMamba2, song: Tensor, backend: str, gain: float) -> None:
    accelerate(trained, backend)
    found, expected = in_both(trained, gain * song)
    assert relative(found, expected) < 3e-3


@BACKENDS
@pytest.mark.parametrize("silence", [True, False])
def test_silence_and_noise(trained: BSMamba2, backend: str, silence: bool) -> None:
    accelerate(trained, backend)
    x = torch.zeros(1, 2, 22_050) if silence else 0.05 * torch.randn(1, 2, 22_050)
    found, expected = in_both(trained, x)
    assert found.isfinite().all()
    assert silence or relative(found, expected) < 1e-2


@BACKENDS
@pytest.mark.parametrize("gradients", [False, True])
def test_a_mixer_whose_gate_and_input_are_large(backend: str, gradients: bool) -> None:
    """y and z stay below 65,504, their product does not."""
    torch.manual_seed(0)
    mixer = Mamba2(32, d_state=32, headdim=32)
    inner, x = mixer.proj_sizes[0], torch.randn(2, 200, 32)
    with torch.no_grad():
        mixer.in_proj.weight[: 2 * inner] *= 2000  # z and x
        y = mixer.scan(*mixer.scan_inputs(*mixer.in_proj(x).split(mixer.proj_sizes, dim=-1)[1:]))
        z = mixer.in_proj(x)[..., :inner]
    assert max(y.abs().max(), z.abs().max()) < 65_504 < (y.flatten(2) * z).abs().max()
    accelerate(mixer, backend)
    found, expected = in_both(mixer, x)
    assert relative(found, expected) < 5e-3
    if gradients:
        with torch.autocast("cpu", torch.float16):
            graded = mixer(x)
        assert relative(graded.float().detach(), expected) < 5e-3


@BACKENDS
def test_a_mixer_of_float16_weights(backend: str) -> None:
    torch.manual_seed(0)
    mixer, x = Mamba2(32, d_state=32, headdim=32), torch.randn(2, 200, 32)
    with torch.inference_mode():
        expected = mixer(x)
    accelerate(mixer, backend)
    with torch.inference_mode():
        assert relative(mixer.half()(x.half()).float(), expected) < 5e-3
