"""Tables of a benchmark's results, and the file that contains them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .settings import BACKWARD, Case, Measurement


def load(path: Path) -> tuple[list[Measurement], dict[str, Any]]:
    """Load the measurements that the benchmark notebook wrote, with their machine and date.

    Raises:
        ValueError: if the notebook did not write the file.
    """
    names = [field.name for field in dataclasses.fields(Measurement)]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [{name: row[name] for name in names} for row in content["rows"]]
        lists = [{name: tuple(row[name]) for name in ("times", "gemm_peaks")} for row in rows]
        return [Measurement(**row | some) for row, some in zip(rows, lists, strict=True)], content["machine"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by notebooks/benchmark.ipynb: {error!r}") from error


def results_table(rows: Sequence[Measurement], part: str) -> list[dict[str, Any]]:
    """One line for each measurement of a part; "times the first" compares it with its job's first candidate."""
    lines = []
    for row in [row for row in rows if row.part == part]:
        first = next(other for other in rows if other.job == row.job)
        line = {
            **case_columns(row),
            "median (ms)": digits(1e3 * row.median),
            "quartiles (ms)": " to ".join(digits(1e3 * seconds) for seconds in row.quartiles),
            "times the first": row.ratio_to(first),
            "examples/s" if part in ("step", "loading") else "frames/s": digits(row.rate),
            "of the peak": None if row.fraction is None else f"{row.fraction:.0%}",
            "memory (GB)": None if row.memory is None else row.memory / 1e9,
            "difference": None if row.difference is None else f"{row.difference:.0e}",
        }
        lines.append(line)
    return lines


def case_columns(case: Case) -> dict[str, Any]:
    """The columns of a table that identify a case."""
    axis = {"axis": case.axis} if case.axis else {}
    return {
        "audio (s)": f"{case.seconds:g}",
        **axis,
        "type": case.dtype,
        "pass": case.mode,
        "candidate": case.candidate,
    }


def digits(value: float) -> str:
    """A number for a table, with three significant digits; from 1,000 on, as a whole number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def growth_table(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Ratios of time and memory between a length and a quarter of it (32 s and 8 s), where both were measured.

    Memory is the increase over its level before the job.
    """
    lines = []
    for long, short in itertools.permutations(rows, 2):
        if short.series == long.series and long.seconds == 4 * short.seconds:
            sizes = [row.memory - row.memory_before for row in (long, short) if row.memory and row.memory_before]
            line = {
                "part": " ".join(filter(None, (long.part, long.axis))),
                "type": long.dtype,
                "pass": long.mode,
                "candidate": long.candidate,
                "lengths": f"{long.seconds:g} s against {short.seconds:g} s",
                "time": long.median / short.median,
                "memory": sizes[0] / sizes[1] if len(sizes) == 2 and all(sizes) else None,
            }
            lines.append(line)
    return lines


def loading_table(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Examples per second: how many loading delivers, and how many training steps of one example consume."""
    lines = []
    for row in [row for row in rows if row.part == "loading"]:
        job = ("model", row.seconds, BACKWARD)
        ours = [step for step in rows if step.candidate in ("plain", "chunked", "cpu", "triton")]
        steps = [step.rate / step.units for step in ours if (step.part, step.seconds, step.mode) == job]
        line = {
            "example (s)": f"{row.seconds:g}",
            "read from": row.candidate,
            "read per second": row.rate,
            "used per second": f"{max(steps):.3f}" if steps else None,
            "keeps up": f"{row.rate / max(steps):,.0f} times over" if steps else None,
        }
        lines.append(line)
    return lines


def machine() -> dict[str, Any]:
    """The machine, the versions and the date of a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")},
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
