"""The parameters of a notebook, checked before anything long begins.

papermill writes the values that it is given into a cell of their own, behind the notebook's defaults, looks at no type,
and only warns of a name that the notebook does not have. So the next cell calls `check`.

Book: "Training".
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence

INJECTED = "# Parameters\n"
"""How the cell that papermill writes begins."""


def check(history: Sequence[str], values: Mapping[str, object], types: Mapping[str, object]) -> None:
    """Refuse parameters of an unknown name or a wrong type.

    A whole number will do for a float, a bool not for a number, and NaN or infinity for nothing. (YAML reads `2e-3`
    as a string: write `2.0e-3`.)

    Args:
        history: the cells that ran so far, `In` in a notebook.
        values: the notebook's names, `globals()`.
        types: name → int, float, str, bool, or list[…] of one of them.

    Raises:
        ValueError: naming the parameter, its value and what would be accepted.
    """
    for cell in history:
        if cell.startswith(INJECTED):
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in types:
                    raise ValueError(f"there is no parameter {node.id!r}; known: {', '.join(types)}")
    for name, kind in types.items():
        if name not in values:
            raise ValueError(f"the parameter {name!r} has no value")
        if not _fits(values[name], kind):
            wanted = kind.__name__ if isinstance(kind, type) and kind is not list else str(kind)
            raise ValueError(f"{name}={values[name]!r} must be of type {wanted}")


def _fits(value: object, kind: object) -> bool:
    inner = getattr(kind, "__args__", None)
    if inner:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(kind, type) and isinstance(value, kind)
