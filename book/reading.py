"""How long the chapters of a part take, counted from the chapters themselves.

The pages that open the parts show it, so that no number there has to be kept up by hand.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from pydoc import locate
from typing import Any

from IPython.display import Markdown

WORDS = 150  # of prose that one stops to think about, in a minute
LINES = 20  # of code, in a minute, the module's source that a chapter shows included


def chapters(*names: str) -> Markdown:
    """A table of chapters by their file names, without suffix: title, minutes to read, the same with the exercises."""
    lines = [
        "| chapter | to read (min) | with exercises (min) |",
        "|:--|--:|--:|",
    ]
    total = [0, 0]
    for name in names:
        path = Path(f"{name}.ipynb")
        notebook = json.loads(path.read_text(encoding="utf-8"))
        reading, exercises = minutes(notebook)
        lines.append(
            f"| [{title(notebook)}]({path}) | {reading} | {reading + exercises} |"
        )
        total = [total[0] + reading, total[1] + reading + exercises]
    if len(names) > 1:
        lines.append(f"| together | {total[0]} | {total[1]} |")
    return Markdown("\n".join(lines))


def title(notebook: dict[str, Any]) -> str:
    """The heading of the first cell."""
    return (
        "".join(notebook["cells"][0]["source"])
        .partition("# ")[2]
        .partition("\n")[0]
    )


def minutes(notebook: dict[str, Any]) -> tuple[int, int]:
    """Minutes to read all but the folded answers, and the minutes that the exercises state."""
    words = exercises = 0
    lines = sum(_lines(inspect.getsource(item)) for item in shown(notebook))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(source.split())
            exercises += sum(
                int(found)
                for found in re.findall(r"^\*\w+, (\d+) min", source, re.M)
            )
        elif not folded(cell):
            lines += _lines(source)
    return round(words / WORDS + lines / LINES), exercises


def folded(cell: dict[str, Any]) -> bool:
    """Whether a code cell's source or output is hidden until the reader opens it."""
    return not {"hide-cell", "hide-output"}.isdisjoint(
        cell["metadata"].get("tags", [])
    )


def shown(notebook: dict[str, Any]) -> list[Any]:
    """The functions and classes whose source `plotting.source` prints, but for folded ones."""
    cells = [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and not folded(cell)
    ]
    names: dict[
        str, str
    ] = {}  # name in the notebook → where it is imported from
    found = []
    for node in ast.walk(
        ast.parse("\n".join("".join(cell["source"]) for cell in cells))
    ):
        if isinstance(node, ast.ImportFrom):
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}"
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name: alias.name
                for alias in node.names
            }
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "plotting.source"
        ):
            for item in map(ast.unparse, node.args):
                root, dot, rest = item.partition(".")
                found.append(locate(names[root] + dot + rest))
    return found


def _lines(source: str) -> int:
    return len([line for line in source.splitlines() if line.strip()])
