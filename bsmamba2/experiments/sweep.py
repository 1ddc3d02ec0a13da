"""Grid of training runs: run a notebook once for every point of a parameter grid, several runs at a time.

grid → points → one papermill process each, on this machine or on a Dask cluster → each run's summary, or its error

A failed run does not stop the others. A finished run is not repeated, and an interrupted run resumes (see
`bsmamba2.training.run_dir`). papermill writes the names of parameters into the notebook as code, so only names that the
notebook defines are passed to it.

Book: "Scaling up".
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class GridPoint:
    """One run of the grid."""

    name: str  #: values of the grid's parameters, also the folder's name, for example `lr=0.001,seed=0`
    parameters: dict[str, Any]  #: all parameters of the notebook
    folder: Path  #: contains `run.ipynb`, `parameters.yaml`, `log.txt`, and the notebook's own results


@dataclass(frozen=True)
class Result:
    """The result of a run: its `summary.json`, or the error."""

    point: GridPoint
    summary: dict[str, Any] | None  #: as the notebook wrote it; None if the run failed
    error: str  #: the last lines of output if the run failed, otherwise empty
    seconds: float  #: duration; 0 if the run had already finished


def expand_grid(grid: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any], folder: Path) -> list[GridPoint]:
    """All combinations of a parameter grid's values, each with its own folder inside `folder`.

    Args:
        grid: parameter → its values.
        fixed: parameters that all runs share.
        folder: the grid's folder.

    Raises:
        ValueError: for an empty grid, a name that is not an identifier, a value that is not of a plain YAML type, a
            parameter without a list of values, or two points with the same name.
    """
    _check_plain({**grid, **fixed})
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
    for name, repeated in Counter(point.name for point in points).items():
        if repeated > 1:
            raise ValueError(f"grid: {name} occurs twice")
    return points


def _check_plain(value: object) -> None:
    """Check that a value consists of YAML's plain types, and that names are identifiers. Raises ValueError."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"{name!r:.60} must be the name of a parameter: letters, digits and _")
            _check_plain(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{value!r:.60} must be a number, text, true, false, or a list or mapping of these")


def check_parameters(parameters: Mapping[str, Any], notebook: Path) -> None:
    """Check that a notebook defines every parameter, in its cell tagged `parameters`, and that values are plain.

    Raises:
        ValueError: if a parameter fails the check, or if the notebook cannot be read.
    """
    _check_plain(parameters)
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
        nodes = [node for cell in tagged for node in ast.walk(ast.parse("".join(cell["source"])))]
    except (OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{notebook}: cannot be read as a notebook with a cell of parameters ({error!r})") from error
    known = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    if unknown := sorted(parameters.keys() - {*known}):
        raise ValueError(f"{notebook.name} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")


def run_grid(points: Sequence[GridPoint], notebook: Path, *, workers: int = 2, scheduler: str = "") -> Iterator[Result]:
    """Run a grid: `workers` runs at a time on this machine, or on the Dask cluster at a scheduler's address.

    Yields each result as it arrives. The workers of a cluster need this package, and the same paths to the folders.
    Dask over `tcp://` has no authentication: anyone who reaches the port of a scheduler or a worker can run code there.
    `--host 127.0.0.1` binds both to this machine; across machines use `tls://` with certificates.

    Raises:
        ValueError: for fewer than one worker, or a parameter that the notebook does not have (`check_parameters`).
        ImportError: if a scheduler is given and the `distributed` package is missing.
        OSError: if the scheduler cannot be reached.
    """
    notebook = notebook.resolve()
    for point in points:
        check_parameters(point.parameters, notebook)
    pool: Any
    finished: Any
    if scheduler:
        try:
            import distributed
        except ImportError as error:
            raise ImportError(f"scheduler={scheduler!r} requires Dask: pip install distributed") from error
        pool, finished = distributed.Client(scheduler, timeout="10s"), distributed.as_completed
        futures = {pool.submit(run_point, point, notebook, pure=False, retries=0): point for point in points}
    elif workers < 1:
        raise ValueError(f"workers={workers!r} must be at least 1")
    else:
        pool, finished = ThreadPoolExecutor(workers), as_completed
        threads = max(1, (os.cpu_count() or 1) // workers)
        futures = {pool.submit(run_point, point, notebook, threads): point for point in points}
    with pool:
        try:
            for future in finished(futures):
                lost = future.exception()  # on a cluster, if the worker itself disappeared
                yield future.result() if lost is None else Result(futures[future], None, repr(lost), 0.0)
        finally:
            for future in futures:
                future.cancel()


def run_point(point: GridPoint, notebook: Path, threads: int | None = None) -> Result:
    """Run one point of a grid in its own process, unless it has already finished.

    The notebook gets the parameters, and writes `summary.json` into `output_dir`. The process uses `threads` threads.
    """
    check_parameters(point.parameters, notebook)
    parameters, summary_path = point.folder / "parameters.yaml", point.folder / "summary.json"
    wanted = yaml.safe_dump(json.loads(json.dumps(point.parameters)))  # papermill would read JSON's 1e-05 as text
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    command = [sys.executable, "-m", "papermill", str(notebook), str(point.folder / "run.ipynb"), "-f", str(parameters)]
    command += ["--no-progress-bar", "--cwd", str(notebook.parent)]
    started = time.monotonic()
    try:
        same = parameters.exists() and parameters.read_text(encoding="utf-8") == wanted
        if same and (summary := _read_summary(summary_path)) is not None:
            return Result(point, summary, "", 0.0)
        point.folder.mkdir(parents=True, exist_ok=True)
        summary_path.unlink(missing_ok=True)
        parameters.write_text(wanted, encoding="utf-8")
        with (point.folder / "log.txt").open("w+", encoding="utf-8", errors="replace") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
            log.seek(0)
            lines = [line.rstrip() for line in log if line.strip()]
        summary = None if code else _read_summary(summary_path)
        fault = "it wrote no summary.json that can be read"
        if code:
            fault = "\n".join(lines[-3:]) or f"it ended with code {code}"
    except OSError as error:  # a full disk, or a folder that cannot be written to
        return Result(point, None, str(error), 0.0)
    return Result(point, summary, fault if summary is None else "", time.monotonic() - started)


def _read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run; None if the file is absent, or cut off by a kill or a full disk."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None
