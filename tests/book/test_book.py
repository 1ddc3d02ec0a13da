"""The book as it is: table of contents, files, headings, module and notebooks agree."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml
from book_checks import (
    ANY_NOTEBOOK,
    NOT_FIGURES,
    check_book_references,
    check_difficulty,
    check_exercises,
    check_figures,
    check_ledger,
    check_module,
    check_modules,
    check_named_tests,
    check_sections,
    check_toc,
)

from notebooks import Notebook, dotted, title

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bsmamba2"


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
# Notebooks without a number, between the chapters, that show files of the module.
PAGES = [path for path in sorted((ROOT / "book").glob("[a-z]*.ipynb")) if "bsmamba2" in read(path)["metadata"]]
NOTEBOOKS = [path for folder in ("book", "book/labs", "notebooks") for path in sorted((ROOT / folder).glob("*.ipynb"))]
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
FILES = {file for file in SOURCES if not file.endswith("__init__.py")}
# Files and folders of the module that no chapter or page shows.
NO_CHAPTER = {
    "__main__.py",
    "atomic_write.py",
    "cli",
    "experiments/benchmark",
    "experiments/gpu_check.py",
    "checkpoints/onnx_export.py",
    "checkpoints/safe_pickle.py",
    "checkpoints/state_dict.py",
    "teaching/demos.py",
    "teaching/labs.py",
    "teaching/explorables.py",
    "teaching/listening.py",
    "teaching/notebook_parameters.py",
    "teaching/picture.py",
    "teaching/plotting.py",
}


def test_toc_names_every_page() -> None:
    pages = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "book").iterdir() if path.suffix in {".md", ".ipynb"}
    ]
    assert check_toc(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")), sorted(pages)) == []


def test_tests_that_pages_name_exist() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "book").iterdir() if path.is_file()}
    tests = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py")}
    assert check_named_tests(pages, tests) == []
    assert sum("`tests/" in words for words in pages.values()) >= 2


def test_the_ledger_has_every_admitted_deviation() -> None:
    assert check_ledger((ROOT / "book" / "17_ledger.md").read_text(encoding="utf-8"), SOURCES) == []


def test_every_module_file_has_a_chapter() -> None:
    assert check_modules({path.name: read(path) for path in CHAPTERS + PAGES}, FILES, NO_CHAPTER) == []


def test_plotting_functions_that_draw_nothing_are_listed() -> None:
    tree = ast.parse(SOURCES["teaching/plotting.py"])
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    no_figure = {node.name for node in functions if node.returns is None or dotted(node.returns) != "Figure"}
    assert no_figure == NOT_FIGURES


def test_docstrings_name_chapters_by_title() -> None:
    titles = {title(read(path)) for path in CHAPTERS + PAGES}
    titles |= {
        path.read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0] for path in (ROOT / "book").glob("*.md")
    }
    assert check_book_references(SOURCES, titles) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_the_shape(path: Path) -> None:
    notebook = read(path)
    complaints = check_sections(notebook) + check_exercises(notebook) + check_module(notebook, FILES)
    complaints += check_difficulty(notebook) + check_figures(notebook)
    assert complaints == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_shows_its_files_and_names_its_figures(path: Path) -> None:
    notebook = read(path)
    assert check_module(notebook, FILES) + check_figures(notebook) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fit_to_commit(path: Path) -> None:
    notebook = read(path)
    assert [complaint for check in ANY_NOTEBOOK for complaint in check(notebook)] == []
