"""Imports run one way, core ← packages ← cli, teaching and experiments; and no source file is too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bsmamba2"
CORE = "core"  # the files beside the packages, and `checkpoints`
TOP = {"cli", "teaching", "experiments"}
# Package → the packages that it may import besides itself.
ALLOWED = {
    CORE: set(),
    "kernels": {CORE},
    "audio": {CORE},
    "synth": {CORE},
    "training": {CORE, "kernels", "audio", "synth"},
    "evaluation": {CORE, "audio", "synth", "kernels"},
} | {package: {CORE, "kernels", "audio", "synth", "training", "evaluation"} | TOP for package in TOP}
MAX_LINES, MAX_CORE_LINES = 500, 300


def package_of(parts: tuple[str, ...]) -> str:
    """Package of a module, given by the parts of its name behind `bsmamba2`."""
    return parts[0] if parts and parts[0] in ALLOWED else CORE


def only_for_types(node: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without the bodies of `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and only_for_types(child):
            continue
        yield child
        yield from statements(child)


def imported(source: str, module: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Modules of bsmamba2 that a source imports anywhere, each as the parts of its name behind `bsmamba2`.

    Args:
        source: Python.
        module: of the source, `("kernels", "cpu")`; of a package, `("kernels", "__init__")`.
    """
    found = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ("bsmamba2", *module)[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found |= {name[1:] for name in names if name[0] == "bsmamba2"}
    return found


def wrong_imports(source: str, module: tuple[str, ...]) -> list[str]:
    """Imports of a source that run against the direction."""
    package = package_of(module)
    targets = sorted(imported(source, module))
    return [".".join(name) for name in targets if package_of(name) not in ALLOWED[package] | {package}]


def module_name(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    if module_name(path) == ("__main__",):  # the command's entry point, part of cli
        return
    assert wrong_imports(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_is_too_long(path: Path) -> None:
    most = MAX_CORE_LINES if path.parent == PACKAGE else MAX_LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most


def test_every_package_has_its_rule() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == ALLOWED.keys() - {CORE} | {"checkpoints"}


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert [path for path in FILES if path.stem in {"utils", "util", "helpers", "common", "misc", "v2"}] == []


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from . import ssd\nfrom .bands import BandSplit", ("model",), []),
        ("from .kernels import accelerate", ("model",), ["kernels.accelerate"]),
        ("def f():\n    from . import kernels", ("separate",), ["kernels"]),
        ("import bsmamba2.audio.files", ("data",), ["audio.files"]),
        ("from bsmamba2 import training", ("train",), ["training"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .synth import Song", ("data",), []),
        ("from . import cpu\nfrom .. import ssd\nfrom ..config import ModelConfig", ("kernels", "__init__"), []),
        ("from ..audio import files", ("kernels", "cpu"), ["audio.files"]),
        ("from ..teaching import plotting", ("evaluation", "report"), ["teaching.plotting"]),
        ("from ...evaluation import score", ("experiments", "benchmark", "cases"), []),
        ("from ...cli import main", ("experiments", "benchmark", "cases"), []),
        ("from ..cli import main", ("training", "job"), ["cli.main"]),
    ],
)
def test_a_wrong_import_is_found(source: str, module: tuple[str, ...], expected: list[str]) -> None:
    assert wrong_imports(source, module) == expected
