"""Two processes under torchrun train as one does with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes

PROGRAM = Path(two_processes.__file__)


def under_torchrun(folder: Path, batch: int) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder.parent),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, str(PROGRAM), str(folder), str(batch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_doubled_batch_and_resume_bit_for_bit(tmp_path: Path) -> None:
    two_processes.main(tmp_path / "one", batch=2)
    under_torchrun(tmp_path / "two", batch=1)
    folders = [tmp_path / name / "whole" for name in ("one", "two")]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert [report["world_size"] for report in reports] == [1, 2]
    one, two = (report["whole"] for report in reports)
    # Sharded: together the same examples, none twice.
    first, second = two["names"]
    assert first != second
    assert [name for pair in zip(first, second, strict=True) for name in pair] == one["names"][0]
    # The same gradients, of the last step's two accumulated batches, and so the same losses and weights.
    gradients = [torch.load(folder / "gradients.pt", weights_only=True) for folder in folders]
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)
    for alone, shared in zip(one["steps"], two["steps"], strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)
    assert two["weights"][0] == two["weights"][1]
    # One writer, the same validation.
    logs = [[json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()] for folder in folders]
    assert [line["step"] for line in logs[1]] == [1, 2, 3, 4]
    assert logs[1][-1]["usdr"] == pytest.approx(logs[0][-1]["usdr"], abs=1e-3)
    # Gradients are exchanged with the last of the accumulated batches alone: as often as there are steps.
    assert (one["exchanges"], two["exchanges"]) == (0, 4)
    # The songs of a job are the same in all, though each process made a part; their files are gone.
    (alone,), both = (report["shared"] for report in reports)
    assert [one["songs"] for one in alone] == [one["songs"] for one in both[0]] == [one["songs"] for one in both[1]]
    assert [[one["made"] for one in process] for process in (alone, *both)] == [[5, 1], [3, 1], [2, 0]]
    assert not list(tmp_path.glob("bsmamba2-*"))
    # What is not finite is told by the files of the process that had them, in all processes alike.
    for report in reports:
        (told,) = set(report["trouble"])
        assert told.count("song") == told.count("heard by the last") > 0
    # Muon's steps need no exchange: every process computes all of them, and ends with the same weights.
    for alone, shared in zip(reports[0]["muon"]["steps"], reports[1]["muon"]["steps"], strict=True):
        assert shared == pytest.approx(alone, rel=1e-3)
    assert reports[1]["muon"]["weights"][0] == reports[1]["muon"]["weights"][1]
    # And stopped on the way, they end with the same bits.
    for report in reports:
        assert report["rest"]["steps"] == report["whole"]["steps"][2:]
        assert report["rest"]["weights"] == report["whole"]["weights"]
