"""Songs of any length, in and out of files."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY
from torch import Tensor, nn

from bsmamba2 import BSMamba2, save_checkpoint
from bsmamba2.__main__ import main
from bsmamba2.audio import AudioError, convert, read, write
from bsmamba2.separate import separate
from bsmamba2.spectrogram import istft, stft


class Identity(nn.Module):
    """Gives back what it gets, as one stem, and remembers how long its segments were."""

    config = TINY

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def forward(self, mixture: Tensor) -> Tensor:
        self.lengths.append(mixture.shape[-1])
        return mixture[:, None]


# --- spectrogram ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_fft", "hop"), [(2048, 441), (2048, 882), (128, 32), (512, 256)])
@pytest.mark.parametrize("samples", [1500, 4097, 5000])
def test_round_trip(n_fft: int, hop: int, samples: int) -> None:
    audio = torch.randn(3, 2, samples, dtype=torch.float64)
    spectrogram = stft(audio, n_fft, hop)
    assert spectrogram.shape == (3, 2, n_fft // 2 + 1, samples // hop + 1)
    torch.testing.assert_close(istft(spectrogram, samples, n_fft, hop), audio, rtol=0, atol=1e-9)


def test_a_frame_is_the_windowed_transform() -> None:
    audio = torch.randn(1000, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.fft.rfft(audio[320 - 64 : 320 + 64] * window)
    torch.testing.assert_close(stft(audio, 128, 32)[:, 10], expected)


# --- whole songs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("samples", [1, 50, 799, 800, 801, 5000, 8123])
def test_an_identity_gives_its_input_back(overlap: float, samples: int) -> None:
    mixture = torch.randn(2, samples)
    model = Identity()
    found = separate(model, mixture, segment=0.1, overlap=overlap)  # type: ignore[arg-type]
    assert found.shape == (1, 2, samples)
    torch.testing.assert_close(found[0], mixture, rtol=0, atol=1e-6 if overlap else 0)
    assert set(model.lengths) == {800}


def test_no_segment_is_spent_on_nothing() -> None:
    for samples, expected in ((800, 1), (801, 2), (1600, 2), (4000, 5)):
        model = Identity()
        separate(model, torch.randn(2, samples), segment=0.1, overlap=0)  # type: ignore[arg-type]
        assert len(model.lengths) == expected


@pytest.mark.parametrize(
    ("mixture", "options", "message"),
    [
        (torch.zeros(1, 100), {}, "c=2"),
        (torch.zeros(2, 0), {}, "not empty"),
        (torch.full((2, 100), math.nan), {}, "NaN"),
        (torch.full((2, 100), math.inf), {}, "infinite"),
        (torch.zeros(2, 100), {"overlap": 1.0}, "overlap=1.0"),
        (torch.zeros(2, 100), {"segment": 0.001}, "segment=0.001"),
    ],
)
def test_wrong_arguments_are_named(mixture: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        separate(Identity(), mixture, **options)  # type: ignore[arg-type]


def test_separation_leaves_no_gradient(tiny: BSMamba2) -> None:
    assert not separate(tiny, torch.randn(2, 1000), segment=0.1).requires_grad


# --- files ------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny: BSMamba2, tmp_path: Path) -> Path:
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("rate", "channels"), [(8000, 2), (8000, 1), (44_100, 2), (11_025, 1)])
def test_command_keeps_rate_length_and_channels(checkpoint: Path, tmp_path: Path, rate: int, channels: int) -> None:
    song = tmp_path / "a song – Lied.wav"
    samples = np.random.default_rng(0).normal(0, 0.1, (rate + 37, channels)).astype("float32")
    soundfile.write(song, samples, rate, subtype="FLOAT")
    output = tmp_path / "out"
    assert main(["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.5"]) == 0
    vocals, found_rate = soundfile.read(output / "a song – Lied.vocals.wav", always_2d=True)
    rest, _ = soundfile.read(output / "a song – Lied.rest.wav", always_2d=True)
    assert (vocals.shape, found_rate) == (samples.shape, rate)
    np.testing.assert_allclose(vocals + rest, samples, atol=1e-6)
    assert len(list(output.iterdir())) == 2


def test_a_bad_song_does_not_stop_the_others(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, np.zeros((4000, 2)), 8000)
    bad.write_text("not audio")
    code = main(["separate", str(bad), str(good), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 1
    assert "bad.wav" in said.err
    assert "Traceback" not in said.err
    assert (tmp_path / "out" / "good.vocals.wav").exists()
    assert not list((tmp_path / "out").glob("*bad*"))


def test_a_bad_checkpoint_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.ckpt").write_text("no weights")
    assert main(["separate", "song.wav", "--checkpoint", str(tmp_path / "x.ckpt"), "-o", str(tmp_path)]) == 2
    assert "x.ckpt" in capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="does not exist"):
        read(tmp_path / "missing.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 2)), 8000)
    with pytest.raises(AudioError, match="no samples"):
        read(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.full((10, 2), np.nan), 8000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        read(tmp_path / "nan.wav")
    with pytest.raises(AudioError, match="3 channels"):
        convert(torch.zeros(3, 10), 8000, 8000, 2)


def test_write_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="cannot be written"):
        write(tmp_path / "no such folder" / "x.wav", torch.zeros(2, 10), 8000)
    write(tmp_path / "loud.wav", torch.full((2, 10), 3.0), 8000)
    assert soundfile.read(tmp_path / "loud.wav")[0].max() == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["loud.wav"]
