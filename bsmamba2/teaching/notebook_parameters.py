"""Notebook parameters: check the names and types that papermill injects, before any long computation starts.

papermill writes the given values into a cell after the notebook's defaults. It does not check types, and it only warns
about a name that the notebook does not define. The next cell of the notebook therefore calls `check`.

Book: "Training".
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ..settings import fits_type

INJECTED = "# Parameters\n"  # the first line of the cell that papermill writes


def check(history: Sequence[str], values: Mapping[str, object], types: Mapping[str, object]) -> None:
    """Validate the parameters of a notebook: unknown names and wrong types raise.

    An int is accepted as a float, but a bool is never accepted as a number; NaN and infinity are always rejected. (YAML
    reads `2e-3` as a string, so write `2.0e-3`.)

    Args:
        history: the cells run so far, `In` in a notebook.
        values: the notebook's variables, `globals()`.
        types: name → int, float, str, bool, or list[…] of one of them.

    Raises:
        ValueError: if a parameter is unknown, has no value or has the wrong type.
    """
    for cell in history:
        if cell.startswith(INJECTED):
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id not in types:
                    raise ValueError(f"there is no parameter {node.id!r}; known: {', '.join(types)}")
    for name, expected in types.items():
        if name not in values:
            raise ValueError(f"the parameter {name!r} has no value")
        if not _has_type(values[name], expected):
            wanted = str(expected) if get_args(expected) else getattr(expected, "__name__", expected)
            raise ValueError(f"{name}={values[name]!r} must be of type {wanted}")


def _has_type(value: object, expected: Any) -> bool:
    if item_types := get_args(expected):
        return isinstance(value, list) and all(_has_type(item, item_types[0]) for item in value)
    return fits_type(value, expected) and (not isinstance(value, float) or math.isfinite(value))
