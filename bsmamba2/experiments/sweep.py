"""Grid of training runs: one notebook, run once for every point of a parameter grid, several runs at a time.

grid → points → one papermill process each, here or on a Dask cluster → each run's summary, or its error

A run that fails does not stop the others. A run that has finished is not repeated, and one that was interrupted
resumes, as its `bsmamba2.training.run_dir` does.

Book: "Scaling up".
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class GridPoint:
    """One run of the grid.

    Attributes:
        name: the parameters of the grid, as the folder is called: `lr=0.001,seed=0`.
        parameters: all parameters of the notebook.
        folder: of the run, with `run.ipynb`, `parameters.json`, `log.txt`, and what the notebook writes.
    """

    name: str
    parameters: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Result:
    """The result of a run: its `summary.json`, or the error.

    Attributes:
        point: of the grid.
        summary: as the notebook wrote it; None when it failed.
        error: the last lines of its output when it failed, otherwise empty.
        seconds: duration; 0 when the run had finished before.
    """

    point: GridPoint
    summary: dict[str, Any] | None
    error: str
    seconds: float


def expand_grid(grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any], folder: Path) -> list[GridPoint]:
    """All combinations of a parameter grid's values, each with its own folder inside `folder`.

    Args:
        grid: parameter → its values.
        fixed: parameters that all runs share.
        folder: of the grid.

    Raises:
        ValueError: for an empty grid, a parameter without a list of values, or two points with the same name.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid: {name}={values!r} must be a list of values, at least one")
        if name == "output_dir":
            raise ValueError("grid: output_dir is each run's own folder; give output_dir itself")
    if not grid:
        raise ValueError("grid={} is empty: give lists of values by name, as {'lr': [1.0e-3, 2.0e-3]}")
    points = []
    for values in itertools.product(*grid.values()):
        varied = dict(zip(grid, values, strict=True))
        name = ",".join(f"{key}={re.sub(r'[^A-Za-z0-9.+-]+', '_', str(value))}" for key, value in varied.items())
        path = folder.resolve() / name
        points.append(GridPoint(name, {**fixed, **varied, "output_dir": str(path)}, path))
    names = [point.name for point in points]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"grid: {', '.join(repeated)} stands there twice")
    return points


def run_grid(points: Sequence[GridPoint], notebook: Path, *, workers: int = 2, scheduler: str = "") -> Iterator[Result]:
    """Run a grid, `workers` runs at a time here, or on the Dask cluster with this scheduler's address.

    Yields each result as it arrives. The workers of a cluster need this package, and the folders at the same paths.

    Raises:
        ValueError: for less than one worker.
        ImportError: when a scheduler is given and the `distributed` package is missing.
        OSError: when the scheduler cannot be reached.
    """
    notebook = notebook.resolve()
    if scheduler:
        yield from _run_on_cluster(points, notebook, scheduler)
        return
    if workers < 1:
        raise ValueError(f"workers={workers!r} must be at least 1")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_point, point, notebook, threads) for point in points]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_point(point: GridPoint, notebook: Path, threads: int | None = None) -> Result:
    """Run one point of a grid in a process of its own, unless it has finished before.

    Args:
        point: of the grid.
        notebook: takes the parameters, and writes `summary.json` into `output_dir`.
        threads: of the process; PyTorch's default when absent.
    """
    try:
        return _run_point(point, notebook, threads)
    except OSError as error:  # a full disk, or a folder that cannot be written to
        return Result(point, None, str(error), 0.0)


def _run_point(point: GridPoint, notebook: Path, threads: int | None) -> Result:
    parameters, summary_path = point.folder / "parameters.json", point.folder / "summary.json"
    wanted = json.dumps(point.parameters, indent=1, sort_keys=True)
    same = parameters.exists() and parameters.read_text(encoding="utf-8") == wanted
    if same and (summary := _read_summary(summary_path)) is not None:
        return Result(point, summary, "", 0.0)
    point.folder.mkdir(parents=True, exist_ok=True)
    summary_path.unlink(missing_ok=True)
    parameters.write_text(wanted, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "papermill", str(notebook), str(point.folder / "run.ipynb"), "-f", str(parameters)]
    started = time.monotonic()
    process = subprocess.run(
        [*command, "--no-progress-bar", "--cwd", str(notebook.parent)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    seconds = time.monotonic() - started
    (point.folder / "log.txt").write_text(process.stdout, encoding="utf-8")
    summary = _read_summary(summary_path)
    if process.returncode or summary is None:
        lines = [line for line in process.stdout.splitlines() if line.strip()] if process.returncode else []
        return Result(point, None, "\n".join(lines[-3:]) or "it wrote no summary.json that can be read", seconds)
    return Result(point, summary, "", seconds)


def _read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run; None when the file is absent, or was cut off by a kill or a full disk."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def _run_on_cluster(points: Sequence[GridPoint], notebook: Path, scheduler: str) -> Iterator[Result]:
    try:
        import distributed
    except ImportError as error:
        raise ImportError(f"scheduler={scheduler!r} requires Dask: pip install distributed") from error
    with distributed.Client(scheduler, timeout="10s") as client:
        futures = [client.submit(run_point, point, notebook, pure=False, retries=0) for point in points]
        by_key = {future.key: point for future, point in zip(futures, points, strict=True)}
        for future in distributed.as_completed(futures):
            if future.status == "finished":
                yield future.result()
            else:  # the worker itself disappeared
                yield Result(by_key[future.key], None, f"{future.exception()!r}", 0.0)
