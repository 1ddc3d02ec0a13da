"""`bsmamba2 backends`: a table of all, and how to install the missing ones."""

from __future__ import annotations

import pytest
import torch

from bsmamba2.cli import backends as command
from bsmamba2.cli.main import main
from bsmamba2.kernels import Backend, backends


def test_the_command_prints_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backends"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["backend", "usable", "version", "reason"]
    rows = [line for line in lines if not line.startswith(" ")]
    assert [line.split()[0] for line in rows] == [row.name for row in backends()]
    assert [line.split()[0] for line in rows] == ["auto", "plain", "chunked", "cpu", "triton", "causal-conv1d"]
    column = header.index("usable")
    usable = {line.split()[0]: line[column:].split()[0] for line in rows}
    assert {usable[name] for name in ("auto", "plain", "chunked")} == {"yes"}
    assert f"takes {backends()[0].reason.split()[1]} on " in rows[0]
    if not torch.cuda.is_available():
        assert usable["triton"] == usable["causal-conv1d"] == "no"
        assert all(lines[lines.index(row) + 1].startswith("  to use it: ") for row in rows[-2:])


def test_the_fix_stands_below_its_backend(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = [Backend("auto", True, "–", "takes plain"), Backend("cpu", False, "–", "no compiler", "install g++")]
    monkeypatch.setattr(command, "backends", lambda: table)
    assert main(["backends"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "backend  usable  version  reason",
        "auto     yes     –        takes plain",
        "cpu      no      –        no compiler",
        "  to use it: install g++",
    ]
