"""The model is the published one: activations, output, sizes; and it behaves at the edges."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_model import TINY, relative
from torch import Tensor, nn

from bsmamba2 import BSMamba2, ModelConfig, ssd

Weights = dict[str, Tensor]


def by_frame(found: Tensor, expected: Tensor, axis: int) -> Tensor:
    """Largest error of each frame, relative to that frame's largest value; where it is zero, absolute."""
    other = [i for i in range(expected.dim()) if i != axis % expected.dim()]
    scale = expected.abs().amax(other)
    return (found - expected).abs().amax(other) / torch.where(scale == 0, 1.0, scale)


@pytest.mark.parametrize("scan", [ssd.recurrent, ssd.matrix, ssd.chunked])
def test_every_activation_is_the_published_one(published: Weights, published_model: BSMamba2, scan: ssd.Scan) -> None:
    seen: Weights = {}

    def keep(name: str):
        return lambda module, inputs, output: seen.__setitem__(name, output.detach())

    time, band = published_model.layers[0].time, published_model.layers[0].band
    hooked = {
        "band_split": (published_model.band_split, 1),
        "layers.0.time.forward_mixer": (time.forwards.mixer, 1),
        "layers.0.time": (time, 1),
        "layers.0.band": (band, 0),
        "final_norm": (published_model.final_norm, 1),
    }
    for name, (module, _) in hooked.items():
        module.register_forward_hook(keep(name))
    for module in published_model.modules():
        if hasattr(module, "scan"):
            module.scan = scan
    spectrogram = torch.view_as_complex(published["input.spectrogram"])
    with torch.inference_mode():
        output = published_model.apply_to_spectrogram(spectrogram)
    for name, (_, axis) in hooked.items():
        assert by_frame(seen[name], published[f"activations.{name}"], axis).max() < 1e-5, name
    expected = torch.view_as_complex(published["output.spectrogram"])
    assert by_frame(output, expected, -1).max() < 1e-5  # frames 5–8 are 1e-7 of the others' level
    assert not output[..., 20:24].any()


def test_the_fixture_notices_a_deliberate_error(published: Weights, published_model: BSMamba2) -> None:
    spectrogram = torch.view_as_complex(published["input.spectrogram"])
    expected = torch.view_as_complex(published["output.spectrogram"])
    mixer = published_model.layers[0].time.forwards.mixer
    with torch.inference_mode():
        mixer.dt_bias.mul_(1.01)
        found = published_model.apply_to_spectrogram(spectrogram)
    assert by_frame(found, expected, -1).max() > 1e-5


def test_size_at_the_paper_preset() -> None:
    with torch.device("meta"):
        model = BSMamba2(ModelConfig.preset("paper"))
    assert sum(p.numel() for p in model.parameters()) == 48_098_188
    assert len(model.state_dict()) == 675
    mixer = model.layers[0].time.forwards.mixer
    assert (mixer.in_proj.out_features, mixer.conv1d.out_channels, len(mixer.A_log)) == (2 * 1024 + 256 + 16, 1280, 16)


@pytest.mark.parametrize("level", [1.0, 1e-7, 0.0])
def test_gradients_are_finite_in_sound_and_silence(tiny: BSMamba2, level: float) -> None:
    audio = (torch.randn(2, 2, 1000) * level).requires_grad_()
    tiny(audio).square().sum().backward()
    assert audio.grad is not None
    for name, gradient in [("audio", audio.grad), *((name, p.grad) for name, p in tiny.named_parameters())]:
        assert gradient is not None, name
        assert gradient.isfinite().all(), name


def test_half_silent_input_has_finite_gradients(tiny: BSMamba2) -> None:
    audio = torch.randn(1, 2, 2000)
    audio[..., 700:] = 0
    audio[0, 1] = 0
    tiny(audio).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tiny.parameters())


def test_silence_in_gives_silence_out(tiny: BSMamba2) -> None:
    assert not tiny(torch.zeros(1, 2, 1000)).any()


@pytest.mark.parametrize("samples", [65, 128, 999, 1000, 1024])
def test_audio_keeps_its_length(tiny: BSMamba2, samples: int) -> None:
    assert tiny(torch.randn(2, 2, samples)).shape == (2, 1, 2, samples)


def test_examples_in_a_batch_do_not_meet(tiny: BSMamba2) -> None:
    audio = torch.randn(3, 2, 800)
    together = tiny(audio)
    alone = torch.cat([tiny(one[None]) for one in audio])
    assert relative(together.detach(), alone.detach()) < 1e-5


def test_channels_are_separated_jointly(tiny: BSMamba2) -> None:
    audio = torch.randn(1, 2, 800)
    changed = audio.clone()
    changed[:, 1] = torch.randn(800)
    assert (tiny(audio)[:, :, 0] - tiny(changed)[:, :, 0]).abs().max() > 1e-6


def test_the_sequence_layer_is_one_argument() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(16, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    model = BSMamba2(TINY, sequence_layer=Recurrent)
    assert not any("A_log" in name for name in model.state_dict())
    assert model(torch.randn(1, 2, 800)).shape == (1, 1, 2, 800)


def test_bfloat16_autocast_stays_close_and_finite(tiny: BSMamba2) -> None:
    audio = torch.randn(1, 2, 4000)
    with torch.inference_mode():
        exact = tiny(audio)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tiny(audio)
    assert rounded.dtype == torch.float32
    assert relative(rounded, exact) < 5e-2


def test_float64_model() -> None:
    model = BSMamba2(TINY).double()
    assert model(torch.randn(1, 2, 400, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 1000), "mixture"), ((1, 1, 1000), "c=2"), ((1, 2, 64), "64 samples are too few")],
)
def test_wrong_audio_is_named(tiny: BSMamba2, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny(torch.randn(shape))


def test_wrong_spectrogram_is_named(tiny: BSMamba2) -> None:
    with pytest.raises(ValueError, match="f=65"):
        tiny.apply_to_spectrogram(torch.zeros(1, 2, 64, 5, dtype=torch.complex64))
