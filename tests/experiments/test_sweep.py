"""A grid of runs: side by side, each by itself, none twice; here and on a cluster."""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

from bsmamba2.experiments.sweep import GridPoint, Result, check_parameters, expand_grid, run_grid, run_point

ROOT = Path(__file__).parents[2]

CELLS = (
    "x = 0\nwait = 0\noutput_dir = ''",
    """\
import json, os, time
from pathlib import Path
folder = Path(output_dir)
with (folder / "ran.txt").open("a") as file:
    file.write("once more ")
if x == 2:
    raise RuntimeError("two is too many")
(folder / "summary.json").write_text(json.dumps({"square": x * x, "threads": os.environ.get("OMP_NUM_THREADS")}))
""",
)


PAPERMILL = """\
import json, sys
from pathlib import Path
import yaml
source, output, _, parameters, *_ = sys.argv[1:]
cells = ["".join(cell["source"]) for cell in json.loads(Path(source).read_text())["cells"]]
names = {}
exec(cells[0], names)
names |= yaml.safe_load(Path(parameters).read_text())
for cell in cells[1:]:
    exec(cell, names)
Path(output).write_text("{}")
"""


@pytest.fixture
def papermill_without_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A papermill that runs the cells in its own process, as a kernel takes seconds to start.

    The real one runs a training notebook in the last test of this file.
    """
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "papermill.py").write_text(PAPERMILL)
    monkeypatch.syspath_prepend(tmp_path / "modules")


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    """A notebook that fails for x = 2."""
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    )
    book.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    book.cells[0].metadata["tags"] = ["parameters"]
    (tmp_path / "books").mkdir()
    nbformat.write(book, tmp_path / "books" / "square.ipynb")
    return tmp_path / "books" / "square.ipynb"


def check(outcomes: list[Result]) -> None:
    """All but x = 2 have found their square; that one says why not."""
    by_x = {outcome.point.parameters["x"]: outcome for outcome in outcomes}
    assert by_x.keys() == {1, 2, 3}
    for x in (1, 3):
        assert by_x[x].error == ""
        assert by_x[x].summary is not None
        assert by_x[x].summary["square"] == x * x
        assert (by_x[x].point.folder / "run.ipynb").exists()
    assert by_x[2].summary is None
    assert "two is too many" in by_x[2].error
    assert "two is too many" in (by_x[2].point.folder / "log.txt").read_text()


@pytest.mark.usefixtures("papermill_without_kernel")
def test_a_cell_fails_alone_and_finished_ones_are_not_run_again(notebook: Path, tmp_path: Path) -> None:
    made = expand_grid({"x": [1, 2, 3]}, {}, tmp_path / "grid")
    first = list(run_grid(made, notebook))
    check(first)
    check(list(run_grid(made, notebook)))
    ran = {point.parameters["x"]: (point.folder / "ran.txt").read_text().count("once") for point in made}
    assert ran == {1: 1, 2: 2, 3: 1}  # only the failed one was tried again
    threads = str(max(1, (os.cpu_count() or 1) // 2))  # the two that run at once share the machine
    assert {outcome.summary["threads"] for outcome in first if outcome.summary is not None} == {threads}
    (made[0].folder / "summary.json").write_text("")  # as a kill or a full disk may leave it
    check(list(run_grid(made, notebook)))
    assert (made[0].folder / "ran.txt").read_text().count("once") == 2
    other = expand_grid({"x": [1]}, {"wait": 1}, tmp_path / "grid")  # the same folder, other parameters
    assert next(iter(run_grid(other, notebook))).seconds > 0


@pytest.mark.usefixtures("papermill_without_kernel")
@pytest.mark.filterwarnings("default")  # a cluster's own threads and sockets
def test_two_workers_of_a_cluster_do_the_same(notebook: Path, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    made = expand_grid({"x": [1, 2, 3]}, {}, tmp_path / "grid")
    workers = {"n_workers": 2, "threads_per_worker": 1, "processes": False, "protocol": "tcp://"}
    with distributed.LocalCluster(**workers, host="127.0.0.1", dashboard_address=None) as cluster:
        outcomes = list(run_grid(made, notebook, scheduler=cluster.scheduler_address))
    check(outcomes)


def test_a_folder_that_cannot_be_written_to_fails_alone(notebook: Path, tmp_path: Path) -> None:
    made = expand_grid({"x": [1, 3]}, {}, tmp_path / "grid")
    for point in made:
        point.folder.parent.mkdir(exist_ok=True)
        point.folder.write_text("a file where a folder is needed")
    outcomes = list(run_grid(made, notebook))
    assert len(outcomes) == 2
    assert all(str(outcome.point.folder) in outcome.error for outcome in outcomes)


def test_a_grid_is_every_combination() -> None:
    made = expand_grid({"lr": [1e-3, 2e-3], "seed": [0, 1]}, {"steps": 5, "lr": 1.0}, Path("runs"))
    assert [point.name for point in made] == [
        "lr=0.001,seed=0",
        "lr=0.001,seed=1",
        "lr=0.002,seed=0",
        "lr=0.002,seed=1",
    ]
    assert made[2].parameters == {"steps": 5, "lr": 2e-3, "seed": 0, "output_dir": str(made[2].folder)}
    assert made[2].folder == Path("runs").resolve() / "lr=0.002,seed=0"
    assert expand_grid({"data": ["a/b c"]}, {}, Path())[0].name == "data=a_b_c"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({}, "empty"),
        ({"lr": 1.0e-3}, r"lr=0\.001 must be a list"),
        ({"schedule": "cosine"}, "schedule='cosine' must be a list"),
        ({"lr": []}, r"lr=\[\]"),
        ({"lr": [1, 1]}, "lr=1 occurs twice"),
        ({"output_dir": ["a"]}, "output_dir"),
    ],
)
def test_a_bad_grid_is_refused(grid: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_grid(grid, {}, Path())


CODE = "x = 1\nopen('ran_code', 'w').close()\ny"
NAMES = [
    CODE,
    "../../x",
    "/tmp/x",
    "..",
    "",
    "x y",
    "x;y",
    "x=1",
    "x[0]",
    "x.y",
    "f()",
    "1x",
    "x\u2028y",
    3,
    None,
    True,
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_that_is_code_or_a_path_is_refused(
    name: Any, notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    grid = tmp_path / "grid" / "deep"
    for attempt in (
        lambda: expand_grid({name: [1]}, {}, grid),
        lambda: expand_grid({"x": [1]}, {name: 1}, grid),
        lambda: expand_grid({"x": [{"y": [{name: 1}]}]}, {}, grid),
        lambda: list(run_grid([GridPoint("x", {"x": 1, name: 1}, grid)], notebook)),
        lambda: run_point(GridPoint("x", {"x": 1, name: 1}, grid), notebook),
    ):
        with pytest.raises(ValueError, match="must be the name of a parameter"):
            attempt()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), b"x", {1, 2}, 1j, object(), [[Path()]], {"y": print}])
def test_a_value_that_is_not_plain_yaml_is_refused(value: Any, tmp_path: Path) -> None:
    for grid, fixed in (({"x": [value]}, {}), ({"x": [1]}, {"y": value})):
        with pytest.raises(ValueError, match="must be a number, text, true, false, or a list or mapping of these"):
            expand_grid(grid, fixed, tmp_path)


def test_plain_values_pass(notebook: Path) -> None:
    values = [None, True, 3, 0.5, "a\nb", [1, [2.0]], {"y": {"z": ["text"]}}]
    for point in expand_grid({"x": values}, {"wait": 0}, Path("grid")):
        check_parameters(point.parameters, notebook)


def test_only_parameters_of_the_notebook_are_passed_on(notebook: Path, tmp_path: Path) -> None:
    made = expand_grid({"x": [1]}, {"folder": "a name of the notebook's, but not a parameter", "os": 1}, tmp_path / "g")
    for run in (lambda: list(run_grid(made, notebook)), lambda: run_point(made[0], notebook)):
        with pytest.raises(ValueError, match=r"square\.ipynb has no parameter folder, os; it has x, wait, output_dir"):
            run()
    assert not (tmp_path / "g").exists()
    for text in (
        "",
        "[]",
        "{}",
        '{"cells": [{}]}',
        '{"cells": [{"metadata": {"tags": ["parameters"]}, "source": "("}]}',
    ):
        notebook.write_text(text)
        with pytest.raises(ValueError, match="cannot be read as a notebook"):
            run_point(made[0], notebook)
    with pytest.raises(ValueError, match=r"missing\.ipynb: cannot be read"):
        run_point(made[0], tmp_path / "missing.ipynb")


@pytest.mark.parametrize(("base", "notebook"), [("train_small.yaml", "train.ipynb"), ("", "silence.ipynb")])
def test_the_notebooks_have_the_parameters_of_the_committed_files(base: str, notebook: str) -> None:
    fixed = yaml.safe_load((ROOT / "notebooks" / "params" / base).read_text()) if base else {"steps": 3}
    for point in expand_grid({"seed": [0, 1], "lr": [1.0e-3]}, fixed, Path("grid")):
        check_parameters(point.parameters, ROOT / "notebooks" / notebook)


def test_a_cluster_that_cannot_be_used_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match="pip install distributed"):
        list(run_grid([], Path(), scheduler="tcp://127.0.0.1:1"))
    with pytest.raises(ValueError, match="workers=0"):
        list(run_grid([], Path(), workers=0))


def run_sweep_notebook(parameters: dict[str, Any]) -> None:
    """Run `sweep.ipynb` in this process, with papermill's cell of parameters."""
    notebook = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / "sweep.ipynb")), parameters)
    shell = InteractiveShell(config=Config({"HistoryManager": {"hist_file": ":memory:"}}))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source, store_history=True).raise_error()


@pytest.mark.slow
def test_the_notebook_trains_a_grid_and_sums_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    short = {"songs": 2, "val_songs": 2, "seconds_per_song": 3.0, "batch": 1, "steps": 1, "validation_windows": 1}
    grid = {"segment": [1.0, 60.0]}
    # The first run has finished before. With 60 s in an example no song is long enough: that cell fails, after the
    # others' parameters were found good.
    base = yaml.safe_load((ROOT / "notebooks" / "params" / "train_small.yaml").read_text())
    finished = expand_grid(grid, {**base, **short}, tmp_path / "sweep")[0]
    finished.folder.mkdir(parents=True)
    (finished.folder / "parameters.yaml").write_text(yaml.safe_dump(finished.parameters))
    summary: dict[str, Any] = {"usdr": {"model": 1.5}, "loss_last": 0.5, "training_seconds": 3.0}
    (finished.folder / "summary.json").write_text(json.dumps(summary))
    (finished.folder / "steps.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    run_sweep_notebook({"grid": grid, "fixed": short, "output_dir": str(tmp_path / "sweep")})
    summary = json.loads((tmp_path / "sweep" / "summary.json").read_text())
    assert [row["segment"] for row in summary["runs"]] == [1.0]
    assert summary["runs"][0]["usdr.model"] == 1.5
    assert summary["failed"] == ["segment=60.0"]
    assert "never heard for" in capsys.readouterr().out
    assert (tmp_path / "sweep" / "segment=60.0" / "run.ipynb").exists()
