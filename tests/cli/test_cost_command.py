"""`bsmamba2 cost`: the numbers, and a question that cannot be answered."""

from __future__ import annotations

import dataclasses

import pytest
from tiny_model import TINY

from bsmamba2.cli.main import main
from bsmamba2.config import PRESETS


def test_the_command_answers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", dataclasses.asdict(TINY))
    arguments = ["cost", "--preset", "small", "--batch", "4", "--seconds", "0.3", "--precision", "bfloat16"]
    arguments += ["--gradient-checkpointing"]
    assert main([*arguments, "--peak-tflops", "10", "--bandwidth", "500"]) == 0
    said = capsys.readouterr().out
    for part in ("parameters", "GFLOP", "activations", "0.", "at the device's peaks"):
        assert part in said
    for gpu in ("RTX 3090", "RTX 4090", "A100 40 GB", "A100 80 GB", "H100 80 GB"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"{gpu}:")]
        assert "fits: yes; a batch takes more than" in line
        assert "not measured" in line
    assert main(["cost", "--preset", "small", "--seconds", "0.01"]) == 2
    assert "2048 samples" in capsys.readouterr().err
