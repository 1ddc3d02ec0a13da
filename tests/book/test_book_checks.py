"""The checks of the book report every planted fault, and nothing in a sound chapter."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from book_checks import (
    ANSWER,
    ANY_NOTEBOOK,
    CHAPTER,
    EXERCISES,
    SECTIONS,
    check_answers,
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
    check_widths,
)
from test_docstrings import load

from notebooks import Notebook, text

ROOT = Path(__file__).parents[2]


def markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source: str, *names: str, **metadata: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "metadata": {"tags": list(names), **metadata},
        "source": source,
        "outputs": [],
    }


IMPORTS = "import matplotlib.pyplot as plt\nfrom bsmamba2 import bands\nfrom bsmamba2.teaching import plotting"


def sound_chapter() -> Notebook:
    """A chapter without faults."""
    parts: dict[str, list[dict[str, Any]]] = {name: [markdown(f"## {name}\n\nSome words.")] for name in SECTIONS}
    parts["What you need"] += [code(IMPORTS)]
    parts["Picture"] += [
        code(
            "plotting.spectrograms(1)",
            mystnb={
                "image": {"alt": "Two lines that cross"},
                "figure": {"name": "fig-lines", "caption": "Two lines."},
            },
        ),
        markdown("As [Figure](#fig-lines) shows."),
        markdown(
            "![Boxes from left to right](_static/boxes.svg)\n\n```python\n# no heading\n```\n\n$\\hat{x}`$ [a](b)"
        ),
    ]
    parts["Read it"] += [code("%matplotlib inline\nplotting.source(bands.BandSplit)")]
    parts["Check it"] += [code("print('equal')", "check", "nbval-check-output", "keep_output")]
    parts["Check it"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "equal\n"}]
    for i in range(1, EXERCISES + 1):
        parts["Exercises"] += [
            markdown(f"### Exercise {i}\n\n*Extend, 5 minutes, easy.* Why?"),
            code("1 + 1", "hide-cell", **ANSWER),
        ]
    own = "from bsmamba2.teaching import exercises\nexercises.check_step(None, None)"
    parts["Exercises"].insert(2, code(own, "yours"))
    return {
        "cells": [markdown("# Bands"), *(cell for part in parts.values() for cell in part)],
        "metadata": {"bsmamba2": {"module": ["bands.py"]}, "kernelspec": {"name": "python3"}},
    }


def complaints(notebook: Notebook) -> list[str]:
    return [
        *check_sections(notebook),
        *check_exercises(notebook),
        *check_difficulty(notebook),
        *check_figures(notebook),
        *check_module(notebook, {"bands.py", "masks.py"}),
        *(complaint for check in ANY_NOTEBOOK for complaint in check(notebook)),
    ]


def test_a_line_that_is_cut_off_is_reported() -> None:
    line = "x = 1  # " + "wide " * 13
    assert check_widths({"cells": [code(line + "12")]}) == []
    assert "a line of 77 characters" in check_widths({"cells": [code("y = 2\n" + line + "123")]})[0]


def test_an_open_answer_is_reported() -> None:
    assert check_answers({"cells": [code("1", "hide-cell", **ANSWER), code("2", "hide-input")]}) == []
    for name in ANSWER:
        rest = {other: value for other, value in ANSWER.items() if other != name}
        assert "is an answer" in check_answers({"cells": [code("1", "hide-cell", **rest)]})[0]


def test_a_picture_without_a_number_or_a_reader_is_reported() -> None:
    def complained(figure: dict[str, str], words: str, *tagged: str) -> list[str]:
        picture = code("plotting.lines(1)", *tagged, mystnb={"image": {"alt": "a b c"}, "figure": figure})
        return check_figures({"cells": [markdown(words), picture], "metadata": {}})

    good = {"name": "fig-a", "caption": "A line."}
    assert complained(good, "See [Figure](#fig-a).") == []
    assert complained(good, "Nothing.", "hide-cell") == []
    assert "no [Figure](#fig-a)" in complained(good, "See the figure.")[0]
    assert "leads to no picture" in complained(good, "[Figure](#fig-a) and [Figure](#fig-b)")[0]
    assert "no name fig-" in complained({"caption": "A line."}, "Words.")[0]
    assert "no name fig-" in complained({"name": "fig-a"}, "[Figure](#fig-a)")[0]


def test_a_sound_chapter_has_no_complaints() -> None:
    assert complaints(sound_chapter()) == []


def cell_with(notebook: Notebook, words: str) -> dict[str, Any]:
    return next(cell for cell in notebook["cells"] if words in text(cell))


def replace(old: str, new: str) -> Callable[[Notebook], None]:
    def fault(notebook: Notebook) -> None:
        cell = cell_with(notebook, old)
        cell["source"] = text(cell).replace(old, new)

    return fault


def retag(words: str, *names: str) -> Callable[[Notebook], None]:
    return lambda notebook: cell_with(notebook, words)["metadata"].update(tags=list(names))


def append(cell: dict[str, Any]) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"].append(copy.deepcopy(cell))


FAULTS: dict[str, tuple[Callable[[Notebook], None], str]] = {
    "no title": (replace("# Bands", "Bands"), "chapter's title"),
    "two titles": (append(markdown("# Again")), "chapter's title"),
    "section missing": (replace("## Check it", "### Check it"), "missing: ['Check it']"),
    "section misspelt": (
        replace("## What changes if …", "## What changes if ..."),
        "missing: ['What changes if …']",
    ),
    "section added": (append(markdown("## Outlook")), "others: ['Outlook']"),
    "sections swapped": (lambda n: n["cells"].insert(1, n["cells"].pop()), "not the ten in order"),
    "exercise missing": (replace("### Exercise 3", "### Another"), "numbered [1, 2]"),
    "exercises misnumbered": (replace("### Exercise 2", "### Exercise 4"), "numbered [1, 4, 3]"),
    "answer shown": (
        lambda n: n["cells"][-2]["metadata"].update(tags=[]),
        "Exercise 3 is not followed by an answer",
    ),
    "answer absent": (lambda n: n["cells"].pop(-2), "Exercise 3 is not followed by an answer"),
    "exercises in one cell": (
        replace("### Exercise 2", "### Exercise 2\n\n### Exercise 3"),
        "shares its cell",
    ),
    "no difficulty": (replace(", easy", ""), "Exercise 1 does not begin like"),
    "unknown kind": (replace("*Extend", "*Think"), "Exercise 1 does not begin like"),
    "own answer unchecked": (replace("exercises.check_step(None, None)", "print()"), "checks it"),
    "own cell and no answer": (lambda n: n["cells"].remove(cell_with(n, "1 + 1")), "Exercise 1 is not followed by"),
    "no module named": (lambda n: n["metadata"].pop("bsmamba2"), "name no file"),
    "module that is not there": (
        lambda n: n["metadata"]["bsmamba2"]["module"].append("x.py"),
        "x.py is no file",
    ),
    "module not shown": (
        replace("plotting.source(bands.BandSplit)", "plotting.source(print)"),
        "bands.py is not shown",
    ),
    "module shown elsewhere": (
        lambda n: n["metadata"].update(bsmamba2={"module": ["masks.py"]}),
        "masks.py is not shown",
    ),
    "figure without alt text": (
        lambda n: cell_with(n, "spectrogram")["metadata"].pop("mystnb"),
        "draws and has no",
    ),
    "pyplot without alt text": (append(code("plt.plot([1])")), "draws and has no"),
    "image without alt text": (
        replace("![Boxes from left to right]", "![]"),
        "image without alternative text",
    ),
    "tag without alt text": (append(markdown('<img src="a.svg">')), "image without alternative text"),
    "directive": (append(markdown("```{note}\nLook.\n```")), "a directive"),
    "directive of colons": (append(markdown(":::{note}\nLook.\n:::")), "a directive"),
    "role": (append(markdown("See {doc}`here`.")), "a role"),
    "target": (append(markdown("(here)=\n")), "a target"),
    "attribute": (append(markdown("![Boxes in a row](a.svg){width=50%}")), "an attribute"),
    "semicolon": (append(code("1 + 1;")), "ends in a semicolon"),
    "output not compared": (retag("print('equal')"), "is not tagged check"),
    "output that nbval passes over": (retag("print('equal')", "check", "keep_output"), "also needs the tags"),
    "error": (
        lambda n: cell_with(n, "print('equal')")["outputs"].append({"output_type": "error", "ename": "E"}),
        "an error for an output",
    ),
    "path of one machine": (append(code("open('/home/me/song.wav')")), "/home/me"),
    "own kernel": (lambda n: n["metadata"].update(kernelspec={"name": "my-env"}), "my-env"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_reported(name: str) -> None:
    plant, expected = FAULTS[name]
    notebook = sound_chapter()
    plant(notebook)
    assert expected in "\n".join(complaints(notebook))


@pytest.mark.parametrize(
    ("source", "entry"),
    [
        ("import bsmamba2\nfrom bsmamba2.teaching import plotting\nplotting.source(bsmamba2.bands)", "bands.py"),
        (
            "import bsmamba2.bands as parts\nfrom bsmamba2.teaching import plotting\nplotting.source(parts.BandSplit)",
            "bands.py",
        ),
        (
            "from bsmamba2.bands import BandSplit\nfrom bsmamba2.teaching import plotting\n"
            "plotting.source(BandSplit.forward)",
            "bands.py",
        ),
        ("from bsmamba2 import BSMamba2\nfrom bsmamba2.teaching.plotting import source\nsource(BSMamba2)", "model.py"),
        (
            "from bsmamba2.evaluation import compare\nfrom bsmamba2.teaching.plotting import source\nsource(compare)",
            "evaluation/protocols.py",
        ),
        (
            "from bsmamba2.evaluation import protocols\nfrom bsmamba2.teaching.plotting import source\n"
            "source(protocols.compare)",
            "evaluation",
        ),
    ],
)
def test_the_file_shown_is_found_through_any_import(source: str, entry: str) -> None:
    notebook = sound_chapter()
    cell_with(notebook, "from bsmamba2 import")["source"] = ""
    cell_with(notebook, "plotting.source")["source"] = source
    notebook["metadata"]["bsmamba2"]["module"] = [entry]
    assert check_module(notebook, {"bands.py", "model.py", "evaluation/protocols.py"}) == []


@pytest.mark.parametrize(
    ("entries", "pages", "expected"),
    [
        (["book/01_a"], ["book/index.md", "book/01_a.ipynb"], ""),
        (["book/01_a", "book/results/run"], ["book/index.md", "book/01_a.ipynb"], ""),
        (["book/01_a"], ["book/index.md"], "book/01_a is in the table of contents and does not exist"),
        ([], ["book/index.md", "book/01_a.ipynb"], "book/01_a.ipynb is not in the table of contents"),
        (["book/01_a", "book/01_a"], ["book/index.md", "book/01_a.ipynb"], "stands twice"),
        (["book/01_a"], ["book/index.md", "book/01_a.ipynb", "book/01_a.md"], "two pages"),
        (
            ["book/02_a", "book/01_b"],
            ["book/index.md", "book/01_b.ipynb", "book/02_a.ipynb"],
            "numbered 02, 01",
        ),
        (
            ["book/01_a", "book/03_b"],
            ["book/index.md", "book/01_a.ipynb", "book/03_b.ipynb"],
            "numbered 01, 03",
        ),
    ],
)
def test_faults_of_the_toc_are_reported(entries: list[str], pages: list[str], expected: str) -> None:
    chapters = [{"file": entry} for entry in entries if CHAPTER.fullmatch(entry)]
    others = [{"file": entry} for entry in entries if not CHAPTER.fullmatch(entry)]
    parts = [{"caption": "All", "chapters": others}, {"numbered": 1, "chapters": chapters}]
    complained = check_toc({"root": "book/index", "parts": parts}, pages)
    assert expected in "\n".join(complained)
    assert bool(complained) == bool(expected)


def test_file_numbers_are_those_printed() -> None:
    def complained(*parts: list[str], numbered: int = 1) -> list[str]:
        lists = [{"numbered": numbered, "chapters": [{"file": f"book/{name}"} for name in part]} for part in parts]
        pages = ["book/index.md", *(f"book/{name}.ipynb" for part in parts for name in part)]
        return check_toc({"root": "book/index", "parts": lists}, pages)

    assert complained(["01_a", "02_b"], ["03_c"]) == []
    assert "numbered 01, 03, 02" in complained(["01_a", "03_c"], ["02_b"])[0]
    assert "numbered lists" in complained(["01_a"], numbered=0)[0]
    assert "numbered lists" in complained(["01_a", "opener"])[0]


def test_a_test_that_does_not_exist_is_reported() -> None:
    tests = {"tests/test_a.py": "def test_it() -> None: ..."}
    assert check_named_tests({"p.md": "`tests/test_a.py::test_it`"}, tests) == []
    assert check_named_tests({"p.md": "`tests/test_a.py::test_i`"}, tests) != []
    assert check_named_tests({"p.md": "`tests/test_b.py::test_it`"}, tests) != []


def test_a_deviation_that_the_ledger_lacks_is_reported() -> None:
    sources = {"a.py": "# Differs from the published model: in this.", "b.py": ""}
    assert check_ledger("| decay | – | yes | no (`a.py`) |", sources) == []
    assert check_ledger("| decay | – | yes | no |", sources) != []
    assert check_ledger("| decay | – | yes | no (`a.py`) |\n| x | (`b.py`) |", sources) != []


def test_minutes_are_counted() -> None:
    reading = load(ROOT / "book" / "reading.py")
    cells = [markdown("# Two words\n\n" + "word " * 450), code("a = 1\n\n" * 40), code("b\n" * 99, "hide-cell")]
    cells += [markdown("### Exercise 1\n\n*Predict, 5 minutes, easy.* Why?")]
    assert reading.minutes({"cells": cells}) == (5, 5)
    assert reading.title({"cells": cells}) == "Two words"


def test_shown_source_counts_as_lines_to_read() -> None:
    reading = load(ROOT / "book" / "reading.py")
    cells = [
        code("from bsmamba2 import metrics as scores\nfrom bsmamba2.teaching import plotting"),
        code("plotting.source(scores.usdr, plotting.Picture)"),
    ]
    shown = reading.shown({"cells": cells})
    assert [item.__qualname__ for item in shown] == ["usdr", "Picture"]
    lines = 3 + sum(bool(line.strip()) for item in shown for line in inspect.getsource(item).splitlines())
    assert reading.minutes({"cells": cells}) == (round(lines / 20), 0)


def test_a_module_file_without_a_chapter_is_reported() -> None:
    chapters = {"03_bands": sound_chapter()}
    chapters["03_bands"]["metadata"]["bsmamba2"]["module"].append("synth")
    files = {"bands.py", "cli/main.py", "synth/song.py"}
    assert check_modules(chapters, files, {"cli"}) == []
    assert check_modules(chapters, files, {"cli/main.py"}) == []
    assert check_modules(chapters, files | {"masks.py"}, {"cli"}) == ["masks.py belongs to no chapter"]
    assert check_modules(chapters, files | {"synthetic.py"}, {"cli"}) == ["synthetic.py belongs to no chapter"]
    assert "has a chapter" in check_modules(chapters, files, {"cli", "bands.py"})[0]
    assert "does not exist" in check_modules(chapters, files, {"cli", "gone.py"})[0]


def test_a_docstring_that_names_no_chapter_is_reported() -> None:
    source = '"""Bands (book: "Bands").\n\nBook: "The\nscan".\n"""\n'
    assert check_book_references({"a.py": source}, {"Bands", "The scan"}) == []
    assert check_book_references({"a.py": source}, {"Bands"}) != []
