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

from bsmamba2.training.distributed import (
    all_gather_object,
    balance,
    broadcast_object,
    rank,
    together,
    total,
    world_size,
)

PROGRAM = Path(two_processes.__file__)


def under_torchrun(folder: Path, batch: int) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder.parent),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(PROGRAM), str(folder), str(batch)]
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
    assert [line["number"] for line in logs[1]] == [1, 2, 3, 4]
    assert logs[1][-1]["usdr"] == pytest.approx(logs[0][-1]["usdr"], abs=1e-3)
    # Gradients are exchanged with the last of the accumulated batches alone: as often as there are steps.
    assert (one["exchanges"], two["exchanges"]) == (0, 4)
    # The songs of a recipe are the same in all, though each process made a part; their files are gone.
    (alone,), both = (report["shared"] for report in reports)
    assert [one["songs"] for one in alone] == [one["songs"] for one in both[0]] == [one["songs"] for one in both[1]]
    assert [[one["made"] for one in process] for process in (alone, *both)] == [[5, 1], [3, 1], [2, 0]]
    assert not list(tmp_path.glob("bsmamba2-*"))
    # What is not finite is told by the files of the process that had them, in all processes alike.
    for report in reports:
        (told,) = set(report["trouble"])
        assert told.count("song") == told.count("heard by the last") > 0
    # Muon's matrices are turned once each, shared out; weights and momenta are those of one process, whole in each.
    for report in reports:
        for process in report["muon"]:
            assert (process["same"], process["same momenta"], process["gradients"]) == (True, True, True)
            assert process["weights"] == reports[0]["muon"][0]["weights"]
    (whole,), halves = (report["muon"] for report in reports)
    assert whole["mine"] == [whole["matrices"]] * 3
    assert [sum(both) for both in zip(*(half["mine"] for half in halves), strict=True)] == [whole["matrices"]] * 3
    assert min(min(half["mine"]) for half in halves) > 0
    # And stopped on the way, they end with the same bits.
    for report in reports:
        assert report["rest"]["steps"] == report["whole"]["steps"][2:]
        assert report["rest"]["weights"] == report["whole"]["weights"]


def test_jobs_are_dealt_out_evenly() -> None:
    costs = torch.rand(50, generator=torch.Generator().manual_seed(1)).tolist()
    for hands in (1, 2, 7):
        parts = balance(costs, hands)
        assert sorted(job for part in parts for job in part) == list(range(50))  # each once
        loads = [sum(costs[i] for i in part) for part in parts]
        assert max(loads) - min(loads) <= max(costs)
    assert balance([1.0, 5.0], 3) == [[1], [0], []]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together("cpu") as device:
        assert device.type == "cpu"
        assert (world_size(), rank(), all_gather_object(3), broadcast_object(4)) == (1, 0, [3], 4)
        assert total(torch.tensor(5.0)) == 5
    for name, message in (
        ("cuda", r"device='cuda'.*GPU 0, but 0 can be used"),
        ("cuda:7", r"device='cuda:7'.*GPU 7, but 0 can be used"),
        ("gpu", r"device='gpu' must be auto, cpu, cuda or mps"),
    ):
        with pytest.raises(ValueError, match=message), together(name):
            pass
