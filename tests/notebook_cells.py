"""The first cells of a notebook as papermill writes them, run in this process: a kernel of its own takes seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from traitlets.config import Config

ROOT = Path(__file__).parents[1]


def run_cells(notebook: str, parameters: dict[str, Any], cells: int | None = None) -> str:
    """Run the defaults, papermill's parameters and the next cells, as many as asked or all; raise what they raise.

    Returns what the cells displayed, as JSON; what they print goes to standard output.
    """
    made = parameterize_notebook(load_notebook_node(str(ROOT / "notebooks" / f"{notebook}.ipynb")), parameters)
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert [cell.metadata.get("tags", []) for cell in code[:2]] == [["parameters"], ["injected-parameters"]]
    config = Config({"HistoryManager": {"hist_file": ":memory:"}})
    shell = InteractiveShell.instance(config=config, display_pub_class=CapturingDisplayPublisher)
    shown: list[dict[str, Any]] = []
    try:
        for cell in code[:cells]:
            result = shell.run_cell(cell.source, store_history=True)
            if error := result.error_before_exec or result.error_in_exec:
                raise error
            shown.append(shell.display_formatter.format(result.result)[0])
    finally:
        InteractiveShell.clear_instance()
        shell.restore_sys_module_state()
        shell.user_ns.clear()  # it lives as long as the process
    return json.dumps(shown + [one["data"] for one in shell.display_pub.outputs])
