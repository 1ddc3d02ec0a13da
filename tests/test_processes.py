"""Two processes under torchrun train as one does with the doubled batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bsmamba2.processes import from_first, gather, rank, together, total, world

PROGRAM = Path(__file__).with_name("two_processes.py")


def train(folder: Path, processes: int, batch: int, stop_after: int = 4) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROGRAM.parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(PROGRAM), str(folder), str(batch), str(stop_after)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_doubled_batch_and_resume_bit_for_bit(tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", 1, batch=2), train(tmp_path / "two", 2, batch=1)
    assert (one["world"], two["world"]) == (1, 2)
    # Sharded: together the same examples, none twice.
    first, second = two["names"]
    assert first != second
    assert [name for pair in zip(first, second, strict=True) for name in pair] == one["names"][0]
    # The same gradients, of the last step's two accumulated batches, and so the same losses and weights.
    gradients = [torch.load(tmp_path / name / "gradients.pt", weights_only=True) for name in ("one", "two")]
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)
    for alone, shared in zip(one["steps"], two["steps"], strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)
    assert two["weights"][0] == two["weights"][1]
    # One writer, the same validation.
    logs = [
        [json.loads(line) for line in (tmp_path / n / "steps.jsonl").read_text().splitlines()] for n in ("one", "two")
    ]
    assert [line["number"] for line in logs[1]] == [1, 2, 3, 4]
    assert logs[1][-1]["usdr"] == pytest.approx(logs[0][-1]["usdr"], abs=1e-3)
    # Gradients are exchanged with the last of the accumulated batches alone: as often as there are steps.
    assert two["exchanges"] == 4
    # And stopped on the way, they end with the same bits.
    train(tmp_path / "halves", 2, batch=1, stop_after=2)
    rest = train(tmp_path / "halves", 2, batch=1)
    assert rest["steps"] == two["steps"][2:]
    assert rest["weights"] == two["weights"]


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together("cpu") as device:
        assert device.type == "cpu"
        assert (world(), rank(), gather(3), from_first(4)) == (1, 0, [3], 4)
        assert total(torch.tensor(5.0)) == 5
    with pytest.raises(ValueError, match=r"device='cuda'.*0 can be used"), together("cuda"):
        pass
