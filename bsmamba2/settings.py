"""Settings: dataclass fields, each with a default, a help text and a range, checked when an instance is created.

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        lr: float = setting(5e-4, "learning rate", within="[0, inf)")
        __post_init__ = check_settings

The command line creates its flags from the same fields; `read_parameters` reads their values from a file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import typing
from pathlib import Path
from typing import Any

KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
ITEMS = {str: "names", int: "whole numbers", float: "numbers"}
LONGEST = 1_000_000  # maximum number of characters in a parameter file
COUNT, NOT_NEGATIVE, SHARE = "[1, inf)", "[0, inf)", "[0, 1]"


def setting(default: Any, help: str, choices: tuple[str, ...] = (), *, within: str = "") -> Any:
    """Dataclass field with a help text and its allowed values.

    Args:
        default: default value; `dataclasses.MISSING` if a value must be given.
        help: one line for `--help` and the notebooks.
        choices: the allowed words.
        within: the allowed interval of numbers, for example `[1, inf)` or `(0, 1]`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "within": within})


def expand_user(path: str | os.PathLike[str]) -> Path:
    """Replace `~` in a path by the home folder, as in a shell; the path is unchanged if that folder is unknown."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  # Path.expanduser raises for an unknown user


def read_parameters(path: Path) -> dict[str, Any]:
    """Read names and values from a JSON or YAML file.

    Raises:
        ValueError: if the file cannot be read or has other content; the message names the file.
    """
    path = expand_user(path)
    kind = "YAML" if path.suffix.lower() in (".yaml", ".yml") else "JSON"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("is a folder or a device, not a file")
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise ValueError(f"must have at most {LONGEST:,} characters")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        values = _parse_yaml(text) if kind == "YAML" else json.loads(text)
    except Exception as error:  # parsers raise a dozen types of exceptions
        reason = "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: no {kind}: {type(error).__name__}: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} must hold names and values, as `steps: 400`")
    return values


def _parse_yaml(text: str) -> Any:
    """Parse YAML, but reject aliases (a few can expand to billions of values) and deep nesting; tuples become lists."""
    import yaml  # imported here so that a GPU machine without it can run the GPU check

    class Loader(yaml.SafeLoader):
        def fetch_alias(self) -> None:
            raise yaml.MarkedYAMLError(problem="an alias: write its value instead", problem_mark=self.get_mark())

        def fetch_flow_collection_start(self, token: Any) -> None:
            if self.flow_level > 50:  # PyYAML's time grows with the square of the depth
                raise RecursionError
            super().fetch_flow_collection_start(token)

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", Loader.construct_yaml_seq)
    return yaml.load(text, Loader)


def check_settings(config: Any) -> None:
    """Check the type of every field of a frozen dataclass, and the limits set by `setting`. Lists become tuples.

    Raises:
        ValueError: for the first invalid value; the message names the field.
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
        if not items or not all(fits_type(item, kind) for item in items):
            hint = "; in YAML write 1.0e-3, not 1e-3" if kind is float and isinstance(value, str) else ""
            hint = "; this one is too large" if any(map(_too_large, items)) else hint
            raise ValueError(f"{field.name}={short_repr(value)} must be {expected}{hint}")
        choices, within = field.metadata.get("choices"), field.metadata.get("within")
        if choices and value not in choices:
            raise ValueError(f"{field.name}={short_repr(value)} must be {' or '.join(choices)}")
        if within and not all(_inside(item, within) for item in items):
            raise ValueError(f"{field.name}={short_repr(value)} must lie in {within}")


def short_repr(value: object) -> str:
    """`repr` of any value in one line of at most 200 characters, in bounded time."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxlist, brief.maxtuple = 2, 8, 8
    brief.maxstring = brief.maxlong = brief.maxother = 80
    try:
        text = brief.repr(value)
    except ValueError:  # Python refuses to print whole numbers of more than 4,300 digits
        text = f"{type(value).__name__} of very many digits"
    return text if len(text) <= 200 else f"{text[:197]}..."


def fits_type(value: object, kind: type) -> bool:
    """Whether a value has a type; an int also passes as a float, a bool never as a number."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float if kind is float else kind) and not _too_large(value)


def _too_large(value: object) -> bool:
    return abs(value) >= 2**63 if isinstance(value, int) else isinstance(value, str) and len(value) > 4096


def _inside(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)
