"""`bsmamba2 export`: the bundled checkpoint as a file, and errors in one line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from bsmamba2 import BSMamba2, save_checkpoint
from bsmamba2.cli.main import main


def test_the_bundled_checkpoint_is_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["export", "-o", str(tmp_path / "vocals.onnx")]) == 0
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'vocals.onnx'}\n"
    about, error = printed.err.splitlines()
    assert about.startswith("bundled checkpoint: ")
    agreement = re.fullmatch(r"its masks agree with the model's to (\S+) of the largest", error)
    assert agreement is not None
    assert float(agreement[1]) < 1e-5
    assert 9.6e6 < (tmp_path / "vocals.onnx").stat().st_size < 10e6


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line_with_the_fix(
    package: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["export", "-o", str(tmp_path / "vocals.onnx")]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("the export needs onnx and onnxruntime (")
    assert package in line
    assert line.endswith("): pip install 'bsmamba2[export]'")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_line(
    tiny: BSMamba2, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    song = tmp_path / "song.wav"
    song.write_bytes(b"RIFF")
    assert main(["export", "-o", str(song)]) == 2
    assert capfd.readouterr().err == f"{song}: must end in .onnx\n"
    assert song.read_bytes() == b"RIFF"
    checkpoint, output = tmp_path / "tiny.safetensors", tmp_path / "none" / "vocals.onnx"
    arguments = ["export", "-o", str(output), "--checkpoint", str(checkpoint)]
    assert main(arguments) == 2
    assert capfd.readouterr().err == f"{checkpoint}: does not exist; name a checkpoint file\n"
    save_checkpoint(tiny, checkpoint)
    assert main(arguments) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert str(output) in line
