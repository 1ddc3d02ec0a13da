"""`bsmamba2 train`: a flag for each parameter, what it prints, and its exit codes. Its jobs: `tests/training`."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bsmamba2.cli.main import main
from bsmamba2.training import loader
from bsmamba2.training.job import JobConfig

SMALL = ["train", "--preset", "small", "--dim", "16", "--depth", "1", "--songs", "2", "--val-songs", "2"]
SMALL += ["--seconds-per-song", "1.5", "--segment", "0.5", "--batch", "1", "--steps", "1", "--validation-windows", "1"]


def test_every_parameter_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for field in dataclasses.fields(JobConfig):
        assert f"--{field.name.replace('_', '-')}" in said


def test_the_backend_and_the_end_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--backend", "plain", "--output-dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr()
    assert "backend plain: as asked for" in said.err.splitlines()
    assert said.out.startswith("1 steps done, best ")
    assert said.out.endswith(f"uSDR at step 1: {tmp_path / 'run'}\n")


def test_what_cannot_run_is_a_wrong_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--steps", "0"]) == 2
    assert "steps=0" in capsys.readouterr().err
    arguments = [*SMALL, "--device", "cpu", "--backend", "triton", "--output-dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    assert "To fix this: " in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_worker_that_is_killed_is_told_in_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(dataset: Any, numbers: list[int]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(loader._IndexedDataset, "__getitem__", killed)
    assert main([*SMALL, "--backend", "plain", "--workers", "1", "--output-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    *_, worker, state, fix = said.splitlines()
    assert worker.startswith("DataLoader worker")
    assert state == "stopped after step 0; last good state: none: the run did not get that far"
    assert "fewer --workers" in fix


def test_a_second_interrupt_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(JobConfig, "windows", interrupted)
    assert main([*SMALL, "--output-dir", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err.splitlines() == ["stopped at once"]
