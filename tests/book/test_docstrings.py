"""The module's docstrings reach the API page: what is plain text there does not turn into markup by accident."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from docutils.core import publish_doctree
from docutils.nodes import literal_block
from docutils.utils import Reporter
from sphinx.ext.napoleon import Config, GoogleDocstring

import bsmamba2

BOOK = Path(__file__).parents[2] / "book"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docstrings = load(BOOK / "_ext" / "docstrings.py")
MODULES = sorted(
    module.name.removeprefix("bsmamba2.")
    for module in pkgutil.walk_packages(bsmamba2.__path__, "bsmamba2.")
    if not module.name.endswith(".__main__")
)


def documented(name: str) -> Iterator[tuple[str, str]]:
    """Dotted name and docstring of a file, and of what is public in it."""
    module = importlib.import_module(f"bsmamba2.{name}")
    yield name, inspect.getdoc(module) or ""
    for key, thing in vars(module).items():
        if key[0] != "_" and getattr(thing, "__module__", "") == module.__name__ and callable(thing):
            yield f"{name}.{key}", inspect.getdoc(thing) or ""
            for inner, method in vars(thing).items() if inspect.isclass(thing) else ():
                if inner[0] != "_" and inspect.getdoc(method):
                    yield f"{name}.{key}.{inner}", inspect.getdoc(method) or ""


def faults(text: str) -> list[str]:
    """Warnings of docutils for a docstring, after conversion and napoleon."""
    lines = docstrings.convert(text.expandtabs().splitlines())
    markup = str(GoogleDocstring(lines, Config(napoleon_use_ivar=True)))
    stream = io.StringIO()
    publish_doctree(markup, settings_overrides={"warning_stream": stream, "report_level": Reporter.INFO_LEVEL})
    return [line for line in stream.getvalue().splitlines() if "<string>" in line]


@pytest.mark.parametrize("name", MODULES)
def test_every_docstring_is_markup_without_faults(name: str) -> None:
    complaints = {
        key: found
        for key, text in documented(name)
        if key != "teaching.picture.Picture.set" and (found := faults(text))
    }
    assert complaints == {}


def test_signs_of_formulas_are_kept() -> None:
    for text in ("mean|a·b| of x_ and *two* * 2", "the `scan`s of `x*y`", "a|b|c`d`e", r"a \ b", "`_private_`"):
        assert faults(text) == []
        plain = publish_doctree("\n".join(docstrings.convert([text]))).astext()
        assert plain == re.sub(r"`|\*(?=two)|(?<=two)\*", "", text)


def test_formulas_and_tables_are_literal() -> None:
    formula = "One line.\n\n    y_t = C_t h_t\n      + |D| x_t\n\nAfter it:\n| a | b |\n|---|---|\nThe end."
    tree = publish_doctree("\n".join(docstrings.convert(formula.splitlines())))
    blocks = [node.astext() for node in tree.findall(literal_block)]
    assert blocks == ["y_t = C_t h_t\n  + |D| x_t", "| a | b |\n|---|---|"]
    assert tree.astext().endswith("The end.")


def test_sections_are_left_to_napoleon() -> None:
    text = (
        "One.\n\nArgs:\n    x: |ŝ|, (b, t),\n        of `float32`.\n    dim: d.\n\nRaises:\n    ValueError: when not.\n"
    )
    markup = str(GoogleDocstring(docstrings.convert(text.splitlines()), Config(napoleon_use_ivar=True)))
    assert ":param x: \\|ŝ\\|, (b, t)," in markup
    assert ":param dim: d\\.\n" in markup
    assert publish_doctree(markup).astext().count("d.") == 1
    assert ":raises ValueError: when not." in markup


def test_every_file_is_on_the_api_page() -> None:
    listed = re.findall(r"automodule:: bsmamba2\.([\w.]+)", (BOOK / "api.md").read_text(encoding="utf-8"))
    assert sorted(listed) == MODULES


def test_names_that_a_package_re_exports_are_listed_once() -> None:
    page = (BOOK / "api.md").read_text(encoding="utf-8")
    for name in MODULES:
        package = hasattr(importlib.import_module(f"bsmamba2.{name}"), "__path__")
        block = page.partition(f"automodule:: bsmamba2.{name}\n")[2].partition("```")[0]
        assert (":members:" in block) != package
