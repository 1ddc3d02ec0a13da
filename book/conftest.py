"""What nbval has run is kept for the book, so that no chapter is executed twice.

With a folder named in JUPYTERCACHE, a notebook whose cells all passed goes into that cache, where Jupyter Book
finds its outputs: `make book` sets it. Without, nbval only tests.
"""

from __future__ import annotations

import copy
import os
from collections import defaultdict
from collections.abc import Generator
from typing import Any

import pytest
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from nbval.plugin import IPyNbCell, IPyNbFile

PASSED = pytest.StashKey[
    dict[IPyNbFile, dict[int, tuple[list[Any], float]]]
]()
"""By notebook and number of the code cell: the outputs, and the seconds that it took."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if (
        isinstance(item, IPyNbCell)
        and call.when == "call"
        and report.passed
        and "JUPYTERCACHE" in os.environ
    ):
        passed = item.config.stash.setdefault(PASSED, defaultdict(dict))[
            item.parent
        ]
        passed[item.cell_num] = item.test_outputs, report.duration
        cells = [
            cell
            for cell in item.parent.nb.cells
            if cell.cell_type == "code"
        ]
        if len(passed) == len(cells):
            keep(item.parent, passed)
    return report


def keep(
    file: IPyNbFile, passed: dict[int, tuple[list[Any], float]]
) -> None:
    """Put a notebook with what its cells gave into the cache."""
    notebook = copy.deepcopy(file.nb)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells):
        cell.outputs, cell.execution_count = passed[number][0], number + 1
    seconds = sum(duration for _, duration in passed.values())
    bundle = CacheBundleIn(
        notebook, str(file.path), data={"execution_seconds": seconds}
    )
    get_cache(os.environ["JUPYTERCACHE"]).cache_notebook_bundle(
        bundle, check_validity=False, overwrite=True
    )
