"""Notebook parameters: unknown names and wrong types raise."""

from __future__ import annotations

import math
import re

import pytest

from bsmamba2.teaching.notebook_parameters import check

TYPES = {"count": int, "rate": float, "name": str, "fast": bool, "lengths": list[float]}
GOOD = {"count": 3, "rate": 1, "name": "x", "fast": True, "lengths": [1, 2.5], "something_else": object()}


def test_good_parameters_pass() -> None:
    check(["count = 1", "# Parameters\ncount = 3\nlengths = [1, 2.5]\n"], GOOD, TYPES)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 1.0),
        ("count", True),
        ("count", "3"),
        ("rate", "2e-3"),
        ("rate", math.nan),
        ("rate", False),
        ("name", 3),
        ("name", None),
        ("fast", 1),
        ("lengths", 8.0),
        ("lengths", [1, "2"]),
        ("lengths", (1.0, 2.0)),
    ],
)
def test_a_wrong_type_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be of type")):
        check([], {**GOOD, name: value}, TYPES)


@pytest.mark.parametrize("cell", ["segmnt = 4", "count = 1\nlr: float = 3", "a, b = 1, 2"])
def test_an_unknown_name_is_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=r"no parameter '(segmnt|lr|a)'; known: count, rate"):
        check(["count = 1", f"# Parameters\n{cell}\n"], GOOD, TYPES)


def test_a_missing_one_is_named() -> None:
    with pytest.raises(ValueError, match="'count' has no value"):
        check([], {}, TYPES)
