"""Settings: a value of another type or out of range is named, with what would do."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from bsmamba2.settings import check_settings, setting, short_repr


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    count: int = setting(1, "how many", within="[1, inf)")
    share: float = setting(0.5, "how much", within="(0, 1]")
    name: str = setting("a", "which", ("a", "b"))
    fast: bool = setting(False, "whether")
    widths: tuple[int, ...] = setting((1, 2), "how wide", within="[1, inf)")

    def __post_init__(self) -> None:
        check_settings(self)


def test_good_values_pass_and_lists_become_tuples() -> None:
    assert Example(share=1, name="b", fast=True, widths=[3]).widths == (3,)  # type: ignore[arg-type]
    assert [field.metadata["help"] for field in dataclasses.fields(Example)][:2] == ["how many", "how much"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count=0 must lie in [1, inf)"),
        ({"count": 1.0}, "count=1.0 must be a whole number"),
        ({"count": True}, "count=True must be a whole number"),
        ({"share": 0.0}, "share=0.0 must lie in (0, 1]"),
        ({"share": math.nan}, "share=nan must lie in (0, 1]"),
        ({"share": "1e-3"}, "share='1e-3' must be a number; in YAML write 1.0e-3, not 1e-3"),
        ({"name": "c"}, "name='c' must be a or b"),
        ({"fast": 1}, "fast=1 must be true or false"),
        ({"widths": ()}, "widths=() must be a list of whole numbers, not empty"),
        ({"widths": 3}, "widths=3 must be a list of whole numbers"),
        ({"widths": (1, "2")}, "widths=(1, '2') must be a list of whole numbers"),
        ({"widths": (1, 0)}, "widths=(1, 0) must lie in [1, inf)"),
        ({"count": 2**63}, "count=9223372036854775808 must be a whole number; this one is too large"),
        ({"share": 10**400}, "must be a number; this one is too large"),
        ({"widths": [1, 10**5000]}, "widths=list of very many digits must be"),
        ({"name": "a" * 5000}, "must be text; this one is too large"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Example(**values)


def test_any_value_is_printed_in_one_short_line() -> None:
    assert Example(share=1.0, name="b", fast=True, count=2**63 - 1).count == 2**63 - 1
    nested: Any = 1
    for _ in range(60):
        nested = [nested] * 9
    for value in (nested, 10**5000, [10**5000], "a\n" * 10**6, b"\n" * 10**6, {1: nested}, float, {"a" * 999}):
        assert 0 < len(short_repr(value)) <= 200
        assert "\n" not in short_repr(value)
    assert [short_repr(value) for value in (1e-3, "a", ("a", 1), [True])] == ["0.001", "'a'", "('a', 1)", "[True]"]
