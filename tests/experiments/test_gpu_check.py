"""The GPU check, part by part at toy size on a CPU, and with parts that fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bsmamba2 import train
from bsmamba2.config import PRESETS, generate_bands
from bsmamba2.experiments import gpu_check
from bsmamba2.experiments.benchmark import measuring
from bsmamba2.experiments.gpu_check import Check, Row

CPU = torch.device("cpu")
SIZES = {"dim": 16, "depth": 1, "freqs_per_bands": generate_bands(8), "d_state": 8, "headdim": 8}
MISSING = ("soundfile", "av", "soxr", "yaml", "tqdm", "mamba_ssm", "causal_conv1d", "pytest")


@pytest.fixture(autouse=True, scope="module")
def toy_size() -> Iterator[None]:
    """A smaller model than the preset, and smaller matrix products around each run: both take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measuring.GEMM_SIZE, "cpu", 128)
        patch.setitem(PRESETS, "small", {**PRESETS["small"], **SIZES})
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the whole command, as somebody without a GPU would try it, with the smaller sizes."""
    folder = tmp_path_factory.mktemp("whole")
    program = f"""\
import sys
from bsmamba2.config import PRESETS
from bsmamba2.experiments import gpu_check
from bsmamba2.experiments.benchmark import measuring

measuring.GEMM_SIZE["cpu"] = 128
PRESETS["small"] |= {SIZES}
sys.exit(gpu_check.main(["--device", "cpu", "--tiny", "-o", {str(folder)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.json")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture
def check() -> Check:
    return Check(CPU, tiny=True, deadline=time.monotonic() + 1200)


def planted(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Other parts in the place of the check's own, of at most two seconds each."""
    monkeypatch.setattr(gpu_check, "PARTS", {name: (function, 2.0) for name, function in functions.items()})


def raising(error: BaseException) -> Any:
    def part(check: Check) -> Iterator[Row]:
        yield {"name": "before", "value": 1}
        raise error

    return part


def working(check: Check) -> Iterator[Row]:
    yield {"name": "fine", "value": 2}


def endless(check: Check) -> Iterator[Row]:
    yield {"name": "one", "value": 1}
    while True:
        time.sleep(0.01)


def run(check: Check, folder: Path) -> dict[str, Any]:
    check.tiny = False  # which takes as long as it needs
    path = gpu_check.run(check, folder, tuple(gpu_check.PARTS))
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == gpu_check.report(content)
    return content


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (ValueError("a | b\nsecond line"), "failed", "ValueError: a | b"),
        (torch.OutOfMemoryError("tried to allocate 20 GiB"), "out of memory", "out of memory (OutOfMemoryError: tried"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory", "out of memory (RuntimeError"),
        (gpu_check.SkipPart("soundfile is not installed"), "skipped", "soundfile is not installed"),
        (subprocess.TimeoutExpired("pytest", 60), "cut short", "after 2 s"),
    ],
)
def test_a_part_that_fails_is_recorded_and_the_next_goes_on(
    error: Exception, state: str, reason: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, bad=raising(error), good=working)
    content = run(check, tmp_path)
    bad, good = content["parts"].values()
    assert (bad["state"], bad["rows"]) == (state, [{"name": "before", "value": 1}])
    assert bad["reason"].startswith(reason)
    assert (good["state"], good["rows"]) == ("done", [{"name": "fine", "value": 2}])


def test_a_part_is_cut_short_and_keeps_its_rows(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, slow=endless, good=working)
    monkeypatch.setitem(gpu_check.PARTS, "slow", (endless, 0.2))
    slow, good = run(check, tmp_path)["parts"].values()
    assert (slow["state"], slow["rows"], good["state"]) == ("cut short", [{"name": "one", "value": 1}], "done")


def test_parts_for_which_no_time_is_left_say_so(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, good=working)
    content = json.loads(gpu_check.run(check, tmp_path, ["good"], total=0.5).read_text())
    assert content["parts"]["good"] == {"state": "skipped", "reason": "no time was left", "rows": []}


def test_results_are_on_disk_before_the_next_part(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def looking(check: Check) -> Iterator[Row]:
        (path,) = tmp_path.glob("*.json")
        seen.append(list(json.loads(path.read_text())["parts"]))
        yield {}

    planted(monkeypatch, first=working, second=looking)
    run(check, tmp_path)
    assert seen == [["first"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_a_part_at_toy_size(name: str, whole: dict[str, Any]) -> None:
    record = whole["parts"][name]
    rows = record["rows"]
    if name == "self-tests":
        assert record["state"] == "skipped"
        assert [row["dtype"] for row in rows] == 2 * ["float32", "bfloat16", "float16"]
        return
    if name == "kernel tests":  # done where mamba-ssm is installed
        assert record["state"] == "done" or "mamba" in record["reason"], record
        return
    assert record["state"] == "done", record
    if name == "environment":
        named = {row["name"]: row["value"] for row in rows}
        assert named["torch"] == torch.__version__
        assert named["copy within memory"].endswith(" GB/s")
        assert "causal-conv1d" in named
    elif name in ("scan", "convolution"):
        done = {row["candidate"] for row in rows if "times" in row}
        assert done == {"scan": {"recurrent", "plain", "chunked"}, "convolution": {"shifts", "conv1d"}}[name]
        assert all(float(row["difference"]) < 1e-4 for row in rows if "times" in row)
        assert all(row["reason"] for row in rows if "times" not in row)
    elif name == "step":
        # Numbers of a step that was run, and the same step's cost.
        published = rows[0]
        assert float(published["median (ms)"].replace(",", "")) > 0
        assert published["lower bound (ms)"] > 0
        assert [row["candidate"] for row in rows[1:3]] == ["recurrent", "plain"]
        (pair,) = gpu_check.before_and_after({"step": record})
        assert (pair["before"], pair["after"]) == ("recurrent", "plain")
    elif name == "separation":
        assert [row["overlap"] for row in rows] == [0.0, 0.5]
    elif name == "train":  # killed, and taken up again
        (row,) = rows
        assert row["steps in all"] == 4 > row["killed with a state of step"] >= 2


def test_a_step_without_memory_is_recorded(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Any, batches: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(train.Trainer, "train_step", no_memory)
    rows = list(gpu_check.step(check))
    assert rows[0]["reason"].startswith("out of memory")
    assert not gpu_check.before_and_after({"step": {"rows": rows}})


def test_pairs_take_the_best_candidate_at_the_greatest_length_that_both_could_do() -> None:
    def row(candidate: str, seconds: float, *times: float, mode: str = "forward + backward") -> Row:
        case = {"candidate": candidate, "audio (s)": f"{seconds:g}", "type": "bfloat16", "pass": mode}
        return {**case, "times": list(times)}

    rows = [
        row("recurrent", 1.0, 2.0, 2.0, 2.0),
        row("recurrent", 4.0, 8.0, 8.0, 80.0),  # a run that something disturbed, and the one beside it
        row("recurrent", 8.0, 9.0, mode="forward"),
        {"candidate": "recurrent", "audio (s)": "8", "reason": "out of memory"},
        row("chunked", 4.0, 4.0, 4.0, 4.0),
        row("triton", 4.0, 1.0, 1.0, 10.0),
        row("triton", 8.0, 2.0, 2.0, 2.0),
    ]
    (line,) = gpu_check.before_and_after({"scan": {"rows": rows}})
    assert line["audio (s)"] == "4"
    assert (line["after"], line["times as fast"]) == ("triton", "8.00")


def test_tables_hold_what_markdown_could_not() -> None:
    rows = [{"a": "x | y\nz", "times": [1, 2], "b": None}, {"a": 1, "c": 0}]
    assert gpu_check._table(rows) == ["| a | c |", "| --- | --- |", "| x \\| y z |  |", "| 1 | 0 |"]
    assert gpu_check._table([]) == []


def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_in_a_copy_without_what_it_can_do_without(tmp_path: Path) -> None:
    program = f"import sys; sys.modules |= dict.fromkeys({MISSING}); "
    program += "from bsmamba2.experiments.benchmark import measuring; measuring.GEMM_SIZE['cpu'] = 128; "
    program += "from bsmamba2.experiments.gpu_check import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["--device", "cpu", "--tiny", "-o", str(tmp_path)]
    names = ["environment", "kernel tests", "convolution", "loading", "train"]
    command = [sys.executable, "-c", program, *arguments, "--parts", *names]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "put " in done.stdout.splitlines()[-1]
    (path,) = tmp_path.glob("*.json")
    states = {name: (one["state"], one["reason"]) for name, one in json.loads(path.read_text())["parts"].items()}
    assert states == {
        "environment": ("done", ""),
        "kernel tests": ("skipped", "pytest is not installed"),
        "convolution": ("done", ""),
        "loading": ("skipped", "soundfile is not installed"),
        "train": ("skipped", "soundfile is not installed"),
    }
