"""`--backend`, `--dtype` and `--device` of `separate` and `evaluate`: what is installed, and what is logged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_model import TINY

from bsmamba2 import BSMamba2, save_checkpoint
from bsmamba2.cli import model_arguments
from bsmamba2.cli.main import main
from bsmamba2.kernels import Acceleration


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    soundfile.write(tmp_path / "song.wav", torch.zeros(4000, 2).numpy(), 8000)
    save_checkpoint(BSMamba2(TINY), tmp_path / "tiny.safetensors")
    files = ["--checkpoint", str(tmp_path / "tiny.safetensors"), "-o", str(tmp_path / "out")]
    return ["separate", str(tmp_path / "song.wav"), *files]


def test_auto_logs_why_no_kernel_runs(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("backend chunked: PyTorch computes the same, slower, because the C++ kernel does not run: ")


def test_plain_logs_nothing(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--backend", "plain"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_backend_that_cannot_run_is_one_line_with_the_fix(
    command: list[str], backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("it may run here")
    assert main([*command, "--backend", backend]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert ("multiples of 32" in line) if backend == "cpu" else ("GPU" in line or "CUDA" in line)
    assert "To fix this: " in line
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as stop:
        main([*command, "--backend", "fast"])
    assert stop.value.code == 2


def test_a_kernel_that_was_built_is_one_line(
    command: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(model: BSMamba2, backend: str, *, dtype: torch.dtype) -> Acceleration:
        assert (backend, dtype) == ("auto", torch.bfloat16)
        return Acceleration("cpu", "its self-test agrees", 20.7, Path("/cache"))

    monkeypatch.setattr(model_arguments, "accelerate", built)
    monkeypatch.setattr(model_arguments, "slow_dtype_warning", lambda device, dtype: "takes 13 times as long")
    assert main([*command, "--dtype", "bfloat16"]) == 0
    slow, line = capfd.readouterr().err.splitlines()
    assert slow == "--dtype bfloat16: takes 13 times as long"
    assert line.startswith("built the C++ kernel in 21 s; it is kept in /")


def test_every_backend_gives_the_same_stems(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_checkpoint(BSMamba2(replace(TINY, d_state=32, headdim=32)), tmp_path / "model.safetensors")
    soundfile.write(tmp_path / "song.wav", 0.1 * torch.randn(4000, 2).numpy(), 8000, subtype="FLOAT")
    found = {}
    for backend in ("plain", "auto"):
        files = ["--checkpoint", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / backend)]
        assert main(["separate", str(tmp_path / "song.wav"), *files, "--backend", backend]) == 0
        found[backend] = torch.from_numpy(soundfile.read(tmp_path / backend / "song.vocals.wav")[0])
    assert (found["auto"] - found["plain"]).abs().max() < 1e-5 * found["plain"].abs().max()


def test_notes_are_logged_and_options_change_what_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = BSMamba2(replace(TINY, hop_length=16, win_length=64))
    save_checkpoint(model, tmp_path / "published.ckpt", layout="published")
    weights = torch.load(tmp_path / "published.ckpt")
    torch.save({"model": weights, "ema_model": dict(weights)}, tmp_path / "m.ckpt")
    (tmp_path / "config.json").write_text('{"hop_length": 16, "win_length": 64, "sample_rate": 8000}')
    soundfile.write(tmp_path / "song.wav", torch.randn(4000, 2).mul(0.1).numpy(), 8000)
    base = ["separate", str(tmp_path / "song.wav"), "--checkpoint", "~/m.ckpt", "--backend", "plain"]
    assert main([*base, "-o", str(tmp_path / "a")]) == 0
    assumed, ema = capfd.readouterr().err.splitlines()
    path = tmp_path / "m.ckpt"
    assert assumed.startswith(f"{path}: hop_length=32, win_length=128, sample_rate=44100, stems=")
    assert "--config FILE" in assumed
    assert ema.startswith(f"{path}: EMA weights (moving averages) are loaded")
    assert main([*base, "-o", str(tmp_path / "b"), "--weights", "raw", "--config", "~/config.json"]) == 0
    given, assumed = capfd.readouterr().err.splitlines()
    assert given.startswith(f"{path}: hop_length, win_length, sample_rate from ")
    assert given.endswith("/config.json")
    assert assumed.startswith(f"{path}: stems=")
    (tmp_path / "config.json").write_text("[1]")
    assert main([*base, "-o", str(tmp_path / "c"), "--config", "~/config.json"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "config.json must hold names and values" in line
