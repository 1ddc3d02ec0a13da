"""The ONNX file against the model: masks in ONNX Runtime, planted faults, and the book's program without PyTorch."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_model import TINY, relative
from torch import Tensor, nn

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.checkpoints import onnx_export
from bsmamba2.checkpoints.onnx_export import export_onnx, onnx_bytes
from bsmamba2.kernels import accelerate

onnxruntime = pytest.importorskip("onnxruntime")
PAGE = Path(__file__).parents[2] / "book" / "use_it.md"


def noise(config: ModelConfig, frames: int) -> Tensor:
    """A spectrogram, complex (1, c, f, t), different in every channel, bin and frame."""
    shape = 1, config.channels, config.bins, frames
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(frames))


def masks_of(content: bytes, spectrogram: Tensor) -> Tensor:
    """Masks that ONNX Runtime computes, complex (1, stem, c, f, t)."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (masks,) = session.run(None, {"spectrogram": torch.view_as_real(spectrogram)[0].numpy()})
    return torch.view_as_complex(torch.from_numpy(masks))[None]


@torch.inference_mode()
def error_of(model: BSMamba2, spectrogram: Tensor) -> float:
    return relative(
        torch.view_as_real(masks_of(onnx_bytes(model), spectrogram)), torch.view_as_real(model.masks(spectrogram))
    )


@pytest.mark.parametrize("frames", [1, 63, 64, 65, 128, 200])
def test_two_stems_at_any_length(model: BSMamba2, frames: int) -> None:
    assert error_of(model, noise(model.config, frames)) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, freqs_per_bands=(65,)),  # a single part to cut
        replace(TINY, freqs_per_bands=(1,) * 63 + (2,), channels=1),
        replace(TINY, freqs_per_bands=(1,) * 65 + (64,), n_fft=256),  # more bands than frames in a chunk
        replace(TINY, d_conv=1, depth=2),
    ],
)
def test_other_sizes(config: ModelConfig) -> None:
    torch.manual_seed(1)
    assert error_of(BSMamba2(config), noise(config, 70)) < 1e-5


def test_near_silence_and_large_steps(tiny: BSMamba2) -> None:
    quiet = noise(TINY, 70) * 1e-9
    quiet[..., 10:20] = 0
    assert error_of(tiny, quiet) < 1e-5
    for name, parameter in tiny.named_parameters():
        if name.endswith("in_proj.weight"):  # steps Δ from 0 to thousands: float32 sums of Δ·A give an error of 5e-4
            parameter.data[-TINY.heads :] *= 1000
    assert error_of(tiny, noise(TINY, 130)) < 2e-5


def test_an_accelerated_model_gives_the_same_file(tiny: BSMamba2) -> None:
    before = onnx_bytes(tiny)
    accelerate(tiny)
    assert onnx_bytes(tiny) == before


def test_the_file_holds_the_configuration_and_halves_what_float16_holds(tiny: BSMamba2, tmp_path: Path) -> None:
    assert export_onnx(tiny, tmp_path / "full.onnx") < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "full.onnx")
    config = json.loads(session.get_modelmeta().custom_metadata_map["config"])
    assert ModelConfig.from_mapping(config) == TINY
    assert [value.name for value in session.get_inputs() + session.get_outputs()] == ["spectrogram", "masks"]
    for parameter in tiny.parameters():
        parameter.data = parameter.half().float()
    assert export_onnx(tiny, tmp_path / "half.onnx") < 1e-5
    parameters = sum(parameter.numel() for parameter in tiny.parameters())
    saved = (tmp_path / "full.onnx").stat().st_size - (tmp_path / "half.onnx").stat().st_size
    assert saved > 1.5 * parameters


SCAN = onnx_export._scan


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("EPS", 1e-3),
        ("_silu", lambda g, x: g.Sigmoid(x)),
        ("_unit_norm", lambda g, x, norm: g.Mul(x, norm.gain)),
        ("_scan", lambda g, xBC, dt, mixer, chunk: SCAN(g, xBC, g.Add(dt, 1e-2), mixer, chunk)),
    ],
)
def test_a_file_that_differs_is_not_written(
    name: str, fault: object, tiny: BSMamba2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, name, fault)
    with pytest.raises(ValueError, match=r"model\.onnx: not written, the exported masks differ from the model's by \d"):
        export_onnx(tiny, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_masks_that_are_nan_are_not_written(tiny: BSMamba2, tmp_path: Path) -> None:
    nn.init.constant_(tiny.final_norm.gain, torch.nan)
    with pytest.raises(ValueError, match="differ from the model's by nan"):
        export_onnx(tiny, tmp_path / "model.onnx")


def test_other_layers_are_named(tmp_path: Path) -> None:
    model = BSMamba2(TINY, sequence_layer=nn.Identity)
    with pytest.raises(ValueError, match="only a model with Mamba-2 layers can be exported, not with Identity"):
        export_onnx(model, tmp_path / "model.onnx")


def test_the_program_in_the_book_separates_as_the_model_does(
    tiny: BSMamba2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export_onnx(tiny, Path("vocals.onnx"))
    mixture = torch.randn(2, 3001, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    soundfile.write("song.wav", mixture.T.numpy(), TINY.sample_rate, subtype="DOUBLE")
    (program,) = re.findall("```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(program, {})
    vocals, rate = soundfile.read("vocals.wav")
    with torch.inference_mode():
        expected = tiny(mixture.float()[None])[0, 0]
    assert rate == TINY.sample_rate
    assert relative(torch.from_numpy(vocals.T), expected) < 1e-4
