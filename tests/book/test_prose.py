"""The list of words to avoid finds them, and only in prose."""

from __future__ import annotations

import json
from pathlib import Path

from prose import complaints


def test_a_word_of_the_list_is_reported_with_its_sentence(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("We begin anew. It runs at 100 frames a second,\nbeside the rest. All is well.", encoding="utf-8")
    found = complaints(page)
    assert [line.split("\n    ")[1].split(":")[0] for line in found] == ["'anew'", "'beside'", "'frames a second'"]
    assert found[0].startswith(f"{page}: We begin anew.")


def test_code_formulas_and_addresses_are_no_prose(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("A `beside` here, [there](beside.md), $$beside$$.\n\n```\nanew\n```\n", encoding="utf-8")
    assert complaints(page) == []
    notebook = tmp_path / "page.ipynb"
    cells = [{"cell_type": "code", "source": ["beside = 1"]}, {"cell_type": "markdown", "source": ["Seldom, ", "anew"]}]
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert [line.split("\n    ")[1].split(":")[0] for line in complaints(notebook)] == ["'anew'", "'Seldom'"]


def test_docstrings_are_prose_and_comments_are_not(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Done thrice."""\n\n\ndef f():\n    # seldom\n    return "anew"\n', encoding="utf-8")
    assert [line.split("\n    ")[1] for line in complaints(module)] == ["'thrice': write three times"]
