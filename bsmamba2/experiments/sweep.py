"""A grid of training runs, side by side: every cell of the grid is a run of one notebook with its own parameters.

grid → cells → one papermill process each, here or on a Dask cluster → what each one found, or why it failed

A cell that fails leaves the others alone. A cell that has finished is not run again; one that was interrupted goes
on where it was, as its run does (`bsmamba2.training.run_dir`).

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
        name: the parameters that differ from cell to cell, as a folder is called: `lr=0.001,seed=0`.
        parameters: all that the notebook is given.
        folder: with `run.ipynb`, `parameters.json`, `log.txt`, and what the notebook itself leaves.
    """

    name: str
    parameters: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Result:
    """What became of a cell: its `summary.json`, or the error.

    Attributes:
        cell: which.
        summary: what the notebook wrote; none when it failed.
        error: the last lines of the failure; empty when it did not.
        seconds: what it took now; 0 when it was finished before.
    """

    cell: GridPoint
    summary: dict[str, Any] | None
    error: str
    seconds: float


def cells(grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any], folder: Path) -> list[GridPoint]:
    """Every combination of the grid's values, each with its folder in `folder`.

    Raises:
        ValueError: for an empty grid, a value list that is none, or two cells of one name.
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"grid: {name}={values!r} must be a list of values, at least one")
        if name == "output_dir":
            raise ValueError("grid: output_dir is each cell's own folder; give output_dir itself")
    if not grid:
        raise ValueError("grid={} is empty: give lists of values by name, as {'lr': [1.0e-3, 2.0e-3]}")
    made = []
    for chosen in itertools.product(*grid.values()):
        differing = dict(zip(grid, chosen, strict=True))
        name = ",".join(f"{key}={re.sub(r'[^A-Za-z0-9.+-]+', '_', str(value))}" for key, value in differing.items())
        parameters = {**fixed, **differing, "output_dir": str(folder.resolve() / name)}
        made.append(GridPoint(name, parameters, folder.resolve() / name))
    names = [cell.name for cell in made]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"grid: {', '.join(twice)} stands there twice")
    return made


def run_grid(made: Sequence[GridPoint], notebook: Path, *, workers: int = 2, scheduler: str = "") -> Iterator[Result]:
    """Run the cells, `workers` at a time here, or on the Dask cluster whose scheduler has this address.

    Yields each outcome as it comes. A cluster's workers need this package, and the folders at the same paths.

    Raises:
        ValueError: for less than one worker.
        ImportError: when a scheduler is given and the `distributed` package is missing.
        OSError: when the scheduler cannot be reached.
    """
    notebook = notebook.resolve()
    if scheduler:
        yield from _on_cluster(made, notebook, scheduler)
        return
    if workers < 1:
        raise ValueError(f"workers={workers!r} must be at least 1")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(run_cell, cell, notebook, threads) for cell in made]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_cell(cell: GridPoint, notebook: Path, threads: int | None = None) -> Result:
    """Run one cell in a process of its own, unless it has finished before.

    Args:
        cell: which.
        notebook: takes the parameters and writes `summary.json` into `output_dir`.
        threads: of the process; PyTorch's own choice when absent.
    """
    try:
        return _run_cell(cell, notebook, threads)
    except OSError as error:  # a full disk, a folder that cannot be written to
        return Result(cell, None, str(error), 0.0)


def _run_cell(cell: GridPoint, notebook: Path, threads: int | None) -> Result:
    told = cell.folder / "parameters.json"
    summary = cell.folder / "summary.json"
    wanted = json.dumps(cell.parameters, indent=1, sort_keys=True)
    if told.exists() and told.read_text(encoding="utf-8") == wanted and (found := _read(summary)) is not None:
        return Result(cell, found, "", 0.0)
    cell.folder.mkdir(parents=True, exist_ok=True)
    summary.unlink(missing_ok=True)
    told.write_text(wanted, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "papermill", str(notebook), str(cell.folder / "run.ipynb"), "-f", str(told)]
    started = time.monotonic()
    done = subprocess.run(
        [*command, "--no-progress-bar", "--cwd", str(notebook.parent)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    seconds = time.monotonic() - started
    (cell.folder / "log.txt").write_text(done.stdout, encoding="utf-8")
    found = _read(summary)
    if done.returncode or found is None:
        lines = [line for line in done.stdout.splitlines() if line.strip()] if done.returncode else []
        return Result(cell, None, "\n".join(lines[-3:]) or "it wrote no summary.json that can be read", seconds)
    return Result(cell, found, "", seconds)


def _read(summary: Path) -> dict[str, Any] | None:
    """What a notebook found; none when the file is absent, or was cut off by a kill or a full disk."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _on_cluster(made: Sequence[GridPoint], notebook: Path, scheduler: str) -> Iterator[Result]:
    try:
        import distributed
    except ImportError as error:
        raise ImportError(f"scheduler={scheduler!r} takes Dask: pip install distributed") from error
    with distributed.Client(scheduler, timeout="10s") as client:
        waiting = [client.submit(run_cell, cell, notebook, pure=False, retries=0) for cell in made]
        by_key = {future.key: cell for future, cell in zip(waiting, made, strict=True)}
        for future in distributed.as_completed(waiting):
            if future.status == "finished":
                yield future.result()
            else:  # the worker itself went away
                yield Result(by_key[future.key], None, f"{future.exception()!r}", 0.0)
