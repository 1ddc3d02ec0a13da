"""The first cells of a notebook as papermill writes them, run in this process: a kernel of its own takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

ROOT = Path(__file__).parents[1]


def check_parameters(notebook: str, parameters: dict[str, Any]) -> None:
    """Run the defaults, papermill's parameters and the next cell, which is to check them; raise what they raise."""
    made = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{notebook}.ipynb")), parameters)
    cells = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags", []) for cell in cells[:2]] == [["parameters"], ["injected-parameters"]]
    shell = InteractiveShell(config=Config({"HistoryManager": {"hist_file": ":memory:"}}))
    for cell in cells[:3]:
        result = shell.run_cell(cell.source, store_history=True)
        if error := result.error_before_exec or result.error_in_exec:
            raise error
