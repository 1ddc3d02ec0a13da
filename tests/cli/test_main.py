"""The entry point: signals, closed streams, `~`, warnings in one line."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from audio_files import found_in, wave
from tiny_model import TINY
from torch import Tensor

from bsmamba2 import BSMamba2, save_checkpoint
from bsmamba2.audio.writer import StemWriter
from bsmamba2.cli import backends, console
from bsmamba2.cli.main import main
from bsmamba2.config import PRESETS


@pytest.fixture
def arguments(tiny: BSMamba2, tmp_path: Path) -> list[str]:
    """To separate two songs into the folder `out`."""
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    songs = [str(wave(tmp_path / f"{name}.wav", frames=9_000)) for name in ("a", "b")]
    options = ["--segment", "0.5", "--backend", "plain"]
    return [
        "separate",
        *songs,
        "--checkpoint",
        str(tmp_path / "model.safetensors"),
        "-o",
        str(tmp_path / "out"),
        *options,
    ]


RESULTS = [f"{name}.{stem}.wav" for name in "ab" for stem in ("instrumental", "vocals")]
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_like_control_c_and_a_second_one_changes_nothing(
    number: int,
    arguments: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]

    def forward(self: BSMamba2, mixture: Tensor) -> Tensor:
        assert list((tmp_path / "out").glob(".bsmamba2-*.part"))
        os.kill(os.getpid(), number)
        time.sleep(5)  # the handler runs between two instructions of Python
        raise AssertionError("not stopped")

    real = StemWriter._discard

    def discard(self: StemWriter) -> None:
        os.kill(os.getpid(), number)
        real(self)

    monkeypatch.setattr(BSMamba2, "forward", forward)
    monkeypatch.setattr(StemWriter, "_discard", discard)
    assert main(arguments) == 130
    assert capfd.readouterr().err == "stopped\n"
    assert found_in(tmp_path / "out") == []
    assert [signal.getsignal(one) for one in SIGNALS] == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_under_nohup_a_closed_terminal_changes_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = BSMamba2.forward

    def forward(self: BSMamba2, mixture: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGHUP)
        return real(self, mixture)

    monkeypatch.setattr(BSMamba2, "forward", forward)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main(arguments) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found_in(tmp_path / "out") == RESULTS


@pytest.mark.parametrize("closed", ["stderr", "stdout", "stdin"])
def test_a_closed_stream_stops_nothing(
    closed: str,
    arguments: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, closed, None)
    assert main(["separate", str(tmp_path / "missing.wav"), *arguments[1:]]) == 1
    getattr(sys, closed).close()
    said = capfd.readouterr()
    assert found_in(tmp_path / "out") == RESULTS
    assert len(said.out.splitlines()) == (0 if closed == "stdout" else 4)
    assert ("missing.wav: does not exist" in said.err) == (closed != "stderr")


@contextmanager
def closed_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Standard output is a pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


def test_a_closed_pipe_stops_no_song_and_is_no_error(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closed_pipe(monkeypatch):
        assert main(arguments) == 0
    assert capfd.readouterr().err == ""
    assert found_in(tmp_path / "out") == RESULTS


def test_other_commands_end_at_a_closed_pipe_as_other_programs_do(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(_: object) -> int:
        for _number in range(10_000):
            print("a line of a table")
        raise AssertionError("it is read by nobody")

    monkeypatch.setattr(backends, "run", run)
    with closed_pipe(monkeypatch):
        assert main(["backends"]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(
    arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/full").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(arguments) == 1
        monkeypatch.undo()
    assert capfd.readouterr().err == "standard output: No space left on device\n"
    assert found_in(tmp_path / "out") == RESULTS
    assert main([*arguments, "--overwrite"]) == 0  # the next call begins without the fault


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("buffering", [-1, 1], ids=["block", "line"])
@pytest.mark.parametrize(
    "arguments", [["backends"], ["cost", "--preset", "small", "--seconds", "0.3"], ["--help"], ["train", "--help"]]
)
def test_every_command_fails_when_its_output_is_lost(
    arguments: list[str], buffering: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "small", dataclasses.asdict(TINY))
    with Path("/dev/full").open("w", buffering=buffering) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        try:
            code: object = main(arguments)
        except SystemExit as end:
            code = end.code
    assert code == 1
    assert capfd.readouterr().err == "standard output: No space left on device\n"


def test_a_tilde_is_the_home_folder(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert (
        main(["separate", "~/a.wav", "--output=~/home out", "--checkpoint=~/model.safetensors", *arguments[-4:]]) == 0
    )
    assert found_in(tmp_path / "home out") == RESULTS[:2]
    monkeypatch.delenv("HOME")
    unknown = Path("~nobody-of-this-name/a.wav")
    assert main(["separate", str(unknown), *arguments[3:]]) == 1


def test_a_warning_is_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        print(warnings.formatwarning(UserWarning("of two\nlines"), UserWarning, "file.py", 1), end="")
        return 0

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(backends, "run", run)
    assert main(["backends"]) == 0
    assert capfd.readouterr().out == "of two\\nlines\n"


@pytest.mark.parametrize("error", [ValueError(), OSError(), OSError("no number"), OSError(13, None)])
def test_no_error_says_none_or_nothing(error: Exception) -> None:
    text = console.describe_error(error, Path("song.wav"))
    assert "None" not in text
    assert text.removeprefix("song.wav: ")
