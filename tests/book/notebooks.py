"""Reading notebooks: cells, headings, sections, and the functions that their code calls."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

Notebook = dict[str, Any]


def cells(notebook: Notebook, kind: str) -> list[tuple[int, dict[str, Any]]]:
    """Number and cell of each markdown or code cell."""
    return [(i, cell) for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == kind]


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def prose(cell: dict[str, Any]) -> str:
    """Markdown without its plain code blocks, whose lines are not Markdown."""
    return re.sub(r"^(```+|~~~+)(?!\{)[^\n]*\n.*?^\1\s*$", "", text(cell), flags=re.MULTILINE | re.DOTALL)


def headings(notebook: Notebook) -> list[tuple[int, str, int]]:
    """Level, text and cell number of each heading."""
    return [
        (len(marks), words.strip(), i)
        for i, cell in cells(notebook, "markdown")
        for marks, words in re.findall(r"^(#{1,6})\s+(.+?)\s*#*$", prose(cell), flags=re.MULTILINE)
    ]


def title(notebook: Notebook) -> str:
    return next((words for level, words, _ in headings(notebook) if level == 1), "")


def section(notebook: Notebook, name: str) -> list[dict[str, Any]]:
    """The cells from one level-2 heading to the next."""
    starts = [(i, words) for level, words, i in headings(notebook) if level == 2]
    for (start, words), (end, _) in zip(starts, [*starts[1:], (len(notebook["cells"]), "")], strict=True):
        if words == name:
            return notebook["cells"][start:end]
    return []


def parse(cell: dict[str, Any]) -> ast.Module:
    """A code cell as Python, IPython's own lines left out."""
    return ast.parse(re.sub(r"^\s*[%!].*$", "pass", text(cell), flags=re.MULTILINE))


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute of an attribute of a name, or the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def imports(trees: list[ast.Module]) -> dict[str, str]:
    """What each imported name stands for, as a full dotted name."""
    names = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    # `import a.b` binds a, `import a.b as c` binds a.b
                    names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def calls(notebook: Notebook, where: list[dict[str, Any]]) -> Iterator[tuple[str, ast.Call]]:
    """Every call in some code cells, with the full dotted name of what is called."""
    known = imports([parse(cell) for _, cell in cells(notebook, "code")])
    for cell in where:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.Call) and (name := dotted(node.func)):
                head, _, rest = name.partition(".")
                yield f"{known.get(head, head)}.{rest}".rstrip("."), node
