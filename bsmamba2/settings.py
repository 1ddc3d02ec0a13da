"""Settings: dataclass fields with one default, one help text and one range each, checked when they are made.

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        lr: float = setting(5e-4, "learning rate", within="[0, inf)")
        __post_init__ = check_settings

The command line makes its flags from the same fields.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
ITEMS = {str: "names", int: "whole numbers", float: "numbers"}
COUNT, NOT_NEGATIVE, SHARE = "[1, inf)", "[0, inf)", "[0, 1]"


def setting(default: Any, help: str, choices: tuple[str, ...] = (), *, within: str = "") -> Any:
    """A dataclass field with its help text and the values that it allows.

    Args:
        default: the default; `dataclasses.MISSING` where a value must be given.
        help: one line for `--help` and the notebooks.
        choices: the allowed words.
        within: the allowed interval of numbers, `[1, inf)` or `(0, 1]` for instance.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "within": within})


def check_settings(config: Any) -> None:
    """Check every field of a frozen dataclass: its type, and what `setting` allows. Lists become tuples.

    Raises:
        ValueError: for the first value that does not fit; it names the field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), hints[field.name]
        items, expected = (value,), KINDS.get(kind, "")
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            expected = f"a list of {ITEMS[kind]}, not empty"
            items = tuple(value) if isinstance(value, list | tuple) else ()  # JSON and YAML have lists
            if items:
                object.__setattr__(config, field.name, items)
        if not items or not all(_fits(item, kind) for item in items):
            hint = "; in YAML write 1.0e-3, not 1e-3" if kind is float and isinstance(value, str) else ""
            raise ValueError(f"{field.name}={value!r} must be {expected}{hint}")
        choices, within = field.metadata.get("choices"), field.metadata.get("within")
        if choices and value not in choices:
            raise ValueError(f"{field.name}={value!r} must be {' or '.join(choices)}")
        if within and not all(_inside(item, within) for item in items):
            raise ValueError(f"{field.name}={value!r} must lie in {within}")


def _fits(value: object, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
