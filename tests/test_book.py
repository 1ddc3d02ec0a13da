"""The book holds together: table of contents, files, headings, module and notebooks say the same.

Each check is a plain function, from a notebook (as parsed JSON) to a list of complaints, so that the
second half of this file can plant every fault and see it reported.
"""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docstrings import load

ROOT = Path(__file__).parents[1]
Notebook = dict[str, Any]

SECTIONS = (
    "Goal",
    "What you need",
    "Picture",
    "Build it",
    "Read it",
    "Check it",
    "What changes if …",
    "Exercises",
    "Further reading",
)
EXERCISES = 3

# Files of the module that no chapter builds.
NO_CHAPTER = {
    "__init__.py",
    "__main__.py",
    "audio.py",
    "explore.py",
    "mp3.py",
    "parameters.py",
    "show.py",
    "soundfont.py",
}
# Files whose chapter is still to be written; a file that has its chapter must leave it.
LATER: set[str] = {"benchmark.py"}

# What bsmamba2.teaching.plotting offers that is no picture, and so needs no alternative text.
NOT_PICTURES = {"source", "audio", "explorable", "thumbnail", "sound", "progress", "decibels", "table"}


# --- reading ----------------------------------------------------------------------------------------------


def cells(notebook: Notebook, kind: str) -> list[tuple[int, dict[str, Any]]]:
    """Number and cell of each markdown or code cell."""
    return [(i, cell) for i, cell in enumerate(notebook["cells"]) if cell["cell_type"] == kind]


def text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def tags(cell: dict[str, Any]) -> list[str]:
    return cell["metadata"].get("tags", [])


def prose(cell: dict[str, Any]) -> str:
    """Markdown without its plain code blocks, whose lines are not Markdown."""
    return re.sub(r"^(```+|~~~+)(?!\{)[^\n]*\n.*?^\1\s*$", "", text(cell), flags=re.MULTILINE | re.DOTALL)


def headings(notebook: Notebook) -> list[tuple[int, str, int]]:
    """Level, text and cell number of each heading."""
    return [
        (len(marks), words.strip(), i)
        for i, cell in cells(notebook, "markdown")
        for marks, words in re.findall(r"^(#{1,6})\s+(.+?)\s*#*$", prose(cell), flags=re.MULTILINE)
    ]


def title(notebook: Notebook) -> str:
    return next((words for level, words, _ in headings(notebook) if level == 1), "")


def section(notebook: Notebook, name: str) -> list[dict[str, Any]]:
    """The cells from one level-2 heading to the next."""
    starts = [(i, words) for level, words, i in headings(notebook) if level == 2]
    for (start, words), (end, _) in zip(starts, [*starts[1:], (len(notebook["cells"]), "")], strict=True):
        if words == name:
            return notebook["cells"][start:end]
    return []


def parse(cell: dict[str, Any]) -> ast.Module:
    """A code cell as Python, IPython's own lines left out."""
    return ast.parse(re.sub(r"^\s*[%!].*$", "pass", text(cell), flags=re.MULTILINE))


def dotted(node: ast.expr) -> str:
    """`a.b.c` for an attribute of an attribute of a name, or the empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def imports(trees: list[ast.Module]) -> dict[str, str]:
    """What each imported name stands for, as a full dotted name."""
    names = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    # `import a.b` binds a, `import a.b as c` binds a.b
                    names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def calls(notebook: Notebook, where: list[dict[str, Any]]) -> Iterator[tuple[str, ast.Call]]:
    """Every call in some code cells, with the full dotted name of what is called."""
    known = imports([parse(cell) for _, cell in cells(notebook, "code")])
    for cell in where:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.Call) and (name := dotted(node.func)):
                head, _, rest = name.partition(".")
                yield f"{known.get(head, head)}.{rest}".rstrip("."), node


# --- checks: table of contents and files ------------------------------------------------------------------


# A chapter's page, by its path without suffix.
CHAPTER = re.compile(r"book/(\d\d)_\w+")


def toc_entries(toc: dict[str, Any]) -> list[str]:
    """Every file that the table of contents names, in order, without suffix."""
    found = [toc["root"]]

    def walk(item: Any) -> None:
        if isinstance(item, dict):
            if "file" in item:
                found.append(item["file"].removesuffix(".ipynb").removesuffix(".md"))
            for value in item.values():
                walk(value)
        elif isinstance(item, list):
            for value in item:
                walk(value)

    walk({name: value for name, value in toc.items() if name != "root"})
    return found


def check_toc(toc: dict[str, Any], pages: list[str]) -> list[str]:
    """The table of contents names each page of book/ once, and none that is not there."""
    entries = toc_entries(toc)
    stems = [page.rsplit(".", 1)[0] for page in pages]
    said = [f"{entry} stands twice in the table of contents" for entry in set(entries) if entries.count(entry) > 1]
    said += [f"two pages are called {stem}" for stem in set(stems) if stems.count(stem) > 1]
    # Results are made by `make train`, and not committed.
    said += [
        f"{entry} is in the table of contents and does not exist"
        for entry in entries
        if entry not in stems and not entry.startswith("book/results/")
    ]
    said += [
        f"{page} is not in the table of contents"
        for page, stem in zip(pages, stems, strict=True)
        if stem not in entries
    ]
    numbers = [match[1] for entry in entries if (match := CHAPTER.fullmatch(entry))]
    if numbers != [f"{i:02}" for i in range(1, len(numbers) + 1)]:
        said.append(f"chapters are numbered {', '.join(numbers)}: number their files 01, 02, … as they are printed")
    for part in toc["parts"]:
        files = [chapter["file"] for chapter in part["chapters"]]
        told = ", ".join(file for file in files if bool(CHAPTER.fullmatch(file)) != bool(part.get("numbered")))
        if told:
            said.append(f"{told}: chapters stand in numbered lists, and other pages in lists without a number")
    return said


def check_named_tests(pages: dict[str, str], tests: dict[str, str]) -> list[str]:
    """A page that says which test will speak up names one that exists."""
    return [
        f"{page} names {file}::{function}, and there is no such test"
        for page, words in pages.items()
        for file, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", words)
        if f"def {function}(" not in tests.get(file, "")
    ]


def check_ledger(ledger: str, sources: dict[str, str]) -> list[str]:
    """Each deviation that a docstring or comment admits stands in the ledger, under its file's name."""
    rows = [line for line in ledger.splitlines() if line.startswith("|")]
    said = []
    for file, source in sources.items():
        admitted = source.count("Differs from the published model")
        named = sum(f"(`{file}`)" in row for row in rows)
        if admitted != named:
            said.append(f"{file} admits {admitted} deviations, and the ledger has {named} rows with (`{file}`)")
    return said


def check_modules(chapters: dict[str, Notebook], files: set[str], no_chapter: set[str], later: set[str]) -> list[str]:
    """Each file of the module has a chapter, or is named as one that has none, or none yet."""
    built = {
        file for notebook in chapters.values() for file in notebook["metadata"].get("bsmamba2", {}).get("module", [])
    }
    said = [f"{file} belongs to no chapter" for file in sorted(files - built - no_chapter - later)]
    said += [f"{file} has its chapter now: take it out of LATER" for file in sorted(later & built)]
    said += [f"{file} is in LATER and does not exist" for file in sorted(later - files)]
    return said


def check_book_references(sources: dict[str, str], titles: set[str]) -> list[str]:
    """`Book: "Bands"` in a docstring names a page of the book by its title."""
    said = []
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for name in re.findall(r'\b[Bb]ook:\s+"([^"]+)"', ast.get_docstring(node) or ""):
                    name = re.sub(r"\s+", " ", name)
                    if name not in titles:
                        said.append(f'{file} refers to the chapter "{name}", and there is none of that title')
    return said


# --- checks: one chapter ----------------------------------------------------------------------------------


# How an exercise begins: what kind it is, how long it takes, and how hard it is.
KIND = r"\*(Predict|Change|Extend|Catch), \d+ minutes, (easy|medium|hard)\.\*"


def check_sections(notebook: Notebook) -> list[str]:
    """One title, first of all, and the nine sections in their order."""
    found = headings(notebook)
    said = []
    if [level for level, _, _ in found].count(1) != 1 or found[0][0] != 1 or found[0][2] != 0:
        said.append("one level-1 heading, in the first cell, is the chapter's title")
    names = tuple(words for level, words, _ in found if level == 2)
    if names != SECTIONS:
        missing = [name for name in SECTIONS if name not in names]
        extra = [name for name in names if name not in SECTIONS]
        said.append(
            f"level-2 headings are not the nine in order; missing: {missing}, others: {extra}, found: {list(names)}"
        )
    return said


def check_exercises(notebook: Notebook) -> list[str]:
    """Exercise 1, 2, 3 …, each answered by a folded code cell that runs.

    Before the answer may stand one cell tagged `yours`, into which the reader writes, and which checks it.
    """
    said, numbers = [], []
    part = section(notebook, "Exercises")
    for i, cell in enumerate(part):
        found = (
            re.findall(r"^###\s+Exercise\s+(\d+)\b", prose(cell), re.MULTILINE)
            if cell["cell_type"] == "markdown"
            else []
        )
        numbers += [int(number) for number in found]
        for number in found:
            after = part[i + 1 : i + 3]
            if after and "yours" in tags(after[0]):
                own, *after = after
                if not any(name.startswith("bsmamba2.teaching.exercises.") for name, _ in calls(notebook, [own])):
                    said.append(
                        f"Exercise {number} lets the reader write, and nothing of bsmamba2.teaching.exercises checks it"
                    )
            answer = after[0] if after else None
            if len(found) > 1:
                said.append(f"Exercise {number} shares its cell with another: its answer cannot follow it")
            elif answer is None or answer["cell_type"] != "code" or "hide-cell" not in tags(answer):
                said.append(f"Exercise {number} is not followed by an answer: a code cell tagged hide-cell")
    if numbers != list(range(1, max(EXERCISES, len(numbers)) + 1)):
        said.append(f"exercises are numbered {numbers}: at least {EXERCISES}, as ### Exercise 1, ### Exercise 2, …")
    return said


def check_difficulty(notebook: Notebook) -> list[str]:
    """Each exercise says its kind, how long it takes, and how hard it is."""
    return [
        f"{found[1]} does not begin like *Predict, 5 minutes, easy.*"
        for cell in section(notebook, "Exercises")
        if (found := re.match(r"### (Exercise \d+)\b.*\n+", text(cell)))
        and not re.match(KIND, text(cell)[found.end() :])
    ]


def check_module(notebook: Notebook, files: set[str], exports: dict[str, str]) -> list[str]:
    """The files that the chapter's metadata names exist, and "Read it" shows something of each."""
    named = notebook["metadata"].get("bsmamba2", {}).get("module", [])
    if not named:
        return ['the metadata name no file of the module: "bsmamba2": {"module": ["bands.py"]}']
    known = imports([parse(cell) for _, cell in cells(notebook, "code")])
    shown = set()
    for name, call in calls(notebook, section(notebook, "Read it")):
        if name != "bsmamba2.teaching.plotting.source":
            continue
        for argument in call.args:
            head, _, rest = dotted(argument).partition(".")
            parts = f"{known.get(head, head)}.{rest}".rstrip(".").split(".")
            if len(parts) > 1 and parts[0] == "bsmamba2":
                shown.add(exports.get(parts[1], parts[1]) + ".py")
    said = [f"{file} is no file of the module" for file in named if file not in files]
    said += [f"{file} is not shown under Read it: show.source(…)" for file in named if file not in shown]
    return said


# --- checks: any notebook ---------------------------------------------------------------------------------


def check_pictures(notebook: Notebook) -> list[str]:
    """Whoever cannot see a picture is told what to notice in it."""
    said = []
    for i, cell in cells(notebook, "code"):
        names = {name for name, _ in calls(notebook, [cell])}
        draws = any(
            name.startswith("matplotlib.pyplot.")
            or (name.startswith("bsmamba2.teaching.plotting.") and name.split(".")[2] not in NOT_PICTURES)
            for name in names
        )
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if draws and len(alt.split()) < 3:
            said.append(f"cell {i} draws and has no alternative text: metadata mystnb.image.alt, what to notice")
    for i, cell in cells(notebook, "markdown"):
        for alt in re.findall(r"!\[([^\]]*)\]\(", prose(cell)):
            if len(alt.split()) < 3:
                said.append(f"cell {i} has an image without alternative text: {alt!r}")
        for tag in re.findall(r"<img\b[^>]*>", prose(cell)):
            if not re.search(r'alt="[^"]+"', tag):
                said.append(f"cell {i} has an image without alternative text: {tag}")
    return said


def check_figures(notebook: Notebook) -> list[str]:
    """A picture has a caption and a name, so a number; the prose sends the reader to it, but for those in an answer."""
    said, names = [], []
    for i, cell in cells(notebook, "code"):
        options = cell["metadata"].get("mystnb", {})
        if "image" not in options:
            continue
        name = options.get("figure", {}).get("name", "")
        if not (name.startswith("fig-") and options["figure"].get("caption", "").endswith(".")):
            said.append(f"cell {i} draws, and its metadata mystnb.figure have no name fig-… and a caption, a sentence")
        names.append((name, "hide-cell" in tags(cell)))
    words = "\n".join(prose(cell) for _, cell in cells(notebook, "markdown"))
    links = re.findall(r"\[Figure\]\(#([^)]*)\)", words)
    said += [f"[Figure](#{link}) leads to no picture of this chapter" for link in links if link not in dict(names)]
    said += [
        f"no [Figure](#{name}) in the prose" for name, answer in names if name and not answer and name not in links
    ]
    return said


def check_markdown(notebook: Notebook) -> list[str]:
    """Markdown that JupyterLab shows as the book does: no roles, directives, targets or attributes."""
    patterns = {
        "a directive": r"^\s*(?:`{3,}|:{3,}|~{3,})\s*\{[^}]*\}",
        "a role": r"\{[A-Za-z][\w:.+-]*\}`[^`]+`",
        "a target": r"^\([\w:.-]+\)=\s*$",
        "an attribute": r"(?:^|[\])])\{[.#]?[A-Za-z][^}]*\}",
        "a comment": r"^%\s",
    }
    said = []
    for i, cell in cells(notebook, "markdown"):
        words = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", prose(cell), flags=re.DOTALL)  # braces of formulas
        for name, pattern in patterns.items():
            if match := re.search(pattern, words, re.MULTILINE):
                said.append(f"cell {i} has {name} that JupyterLab shows raw: {match[0].strip()!r}")
    return said


def check_outputs(notebook: Notebook) -> list[str]:
    """Committed outputs are those that the tests compare, and no others."""
    said = []
    for i, cell in cells(notebook, "code"):
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            said.append(f"cell {i} has an error for an output")
        if cell["outputs"] and "check" not in tags(cell):
            said.append(f"cell {i} has outputs and is not tagged check: nbstripout --keep-id --keep-count")
        # nbval compares, and nbstripout keeps, what carries their own tag.
        if cell["outputs"] and "check" in tags(cell) and not {"nbval-check-output", "keep_output"} <= set(tags(cell)):
            said.append(f"cell {i} is tagged check, and also needs the tags nbval-check-output and keep_output")
    return said


def check_portable(notebook: Notebook) -> list[str]:
    """Nothing of the machine it was written on."""
    said = []
    if found := re.search(
        r"(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+|\b[A-Z]:\\\\\w+", json.dumps(notebook)
    ):
        said.append(f"a path of one machine: {found[0]}")
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        said.append(f"the kernel is {kernel!r}: every Jupyter has one called python3, and maybe no other")
    return said


def check_history(notebook: Notebook) -> list[str]:
    """nbval runs cells without a history, and IPython then shows what a semicolon at the end should hide."""
    return [
        f"cell {i} ends in a semicolon: write _ = …"
        for i, cell in cells(notebook, "code")
        if text(cell).rstrip().endswith(";")
    ]


ANY_NOTEBOOK = (check_pictures, check_markdown, check_outputs, check_portable, check_history)


# --- the book as it is ------------------------------------------------------------------------------------

CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = [path for folder in ("book", "book/labs", "notebooks") for path in sorted((ROOT / folder).glob("*.ipynb"))]
FILES = {path.name for path in (ROOT / "bsmamba2").glob("*.py")}


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def exports() -> dict[str, str]:
    """The file behind each name that `bsmamba2` itself offers."""
    tree = ast.parse((ROOT / "bsmamba2" / "__init__.py").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
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
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "bsmamba2").glob("*.py")}
    assert check_ledger((ROOT / "book" / "17_ledger.md").read_text(encoding="utf-8"), sources) == []


def test_every_module_file_has_a_chapter() -> None:
    assert check_modules({path.name: read(path) for path in CHAPTERS}, FILES, NO_CHAPTER, LATER) == []


def test_pictures_of_show_are_told_from_the_rest() -> None:
    tree = ast.parse((ROOT / "bsmamba2" / "show.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
    no_figure = {node.name for node in functions if node.returns is None or dotted(node.returns) != "Figure"}
    assert no_figure == NOT_PICTURES


def test_docstrings_name_chapters_by_title() -> None:
    titles = {title(read(path)) for path in CHAPTERS}
    titles |= {
        path.read_text(encoding="utf-8").partition("# ")[2].partition("\n")[0] for path in (ROOT / "book").glob("*.md")
    }
    written = (ROOT / "bsmamba2").glob("*.py")
    sources = {path.name: path.read_text(encoding="utf-8") for path in written}
    assert check_book_references(sources, titles) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_has_the_shape(path: Path) -> None:
    notebook = read(path)
    said = check_sections(notebook) + check_exercises(notebook) + check_module(notebook, FILES, exports())
    said += check_difficulty(notebook) + check_figures(notebook)
    assert said == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fit_to_commit(path: Path) -> None:
    notebook = read(path)
    assert [complaint for check in ANY_NOTEBOOK for complaint in check(notebook)] == []


# --- planted faults ---------------------------------------------------------------------------------------


def markdown(source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source: str, *names: str, **metadata: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "metadata": {"tags": list(names), **metadata},
        "source": source,
        "outputs": [],
    }


def sound_chapter() -> Notebook:
    """A chapter without faults."""
    parts: dict[str, list[dict[str, Any]]] = {name: [markdown(f"## {name}\n\nSome words.")] for name in SECTIONS}
    parts["What you need"] += [code("import matplotlib.pyplot as plt\nfrom bsmamba2 import bands, show")]
    parts["Picture"] += [
        code(
            "show.spectrogram(1)",
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
    parts["Read it"] += [code("%matplotlib inline\nshow.source(bands.BandSplit)")]
    parts["Check it"] += [code("print('equal')", "check", "nbval-check-output", "keep_output")]
    parts["Check it"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "equal\n"}]
    for i in range(1, EXERCISES + 1):
        parts["Exercises"] += [
            markdown(f"### Exercise {i}\n\n*Extend, 5 minutes, easy.* Why?"),
            code("1 + 1", "hide-cell"),
        ]
    own = "from bsmamba2 import exercises\nexercises.check_step(None, None)"
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
        *check_module(notebook, {"bands.py", "masks.py"}, {}),
        *(complaint for check in ANY_NOTEBOOK for complaint in check(notebook)),
    ]


def test_a_picture_without_a_number_or_a_reader_is_reported() -> None:
    def said(figure: dict[str, str], words: str, *tagged: str) -> list[str]:
        picture = code("show.lines(1)", *tagged, mystnb={"image": {"alt": "a b c"}, "figure": figure})
        return check_figures({"cells": [markdown(words), picture], "metadata": {}})

    good = {"name": "fig-a", "caption": "A line."}
    assert said(good, "See [Figure](#fig-a).") == []
    assert said(good, "Nothing.", "hide-cell") == []
    assert "no [Figure](#fig-a)" in said(good, "See the figure.")[0]
    assert "leads to no picture" in said(good, "[Figure](#fig-a) and [Figure](#fig-b)")[0]
    assert "no name fig-" in said({"caption": "A line."}, "Words.")[0]
    assert "no name fig-" in said({"name": "fig-a"}, "[Figure](#fig-a)")[0]


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
    "section added": (append(markdown("## Summary")), "others: ['Summary']"),
    "sections swapped": (lambda n: n["cells"].insert(1, n["cells"].pop()), "not the nine in order"),
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
        replace("show.source(bands.BandSplit)", "show.source(print)"),
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
    "source",
    [
        "import bsmamba2\nfrom bsmamba2 import show\nshow.source(bsmamba2.bands)",
        "import bsmamba2.bands as parts\nfrom bsmamba2 import show\nshow.source(parts.BandSplit)",
        "from bsmamba2.bands import BandSplit\nfrom bsmamba2 import show\nshow.source(BandSplit.forward)",
        "from bsmamba2 import BandSplit, show\nshow.source(BandSplit)",
        "from bsmamba2.bands import BandSplit\nfrom bsmamba2.teaching.plotting import source\nsource(BandSplit)",
    ],
)
def test_the_file_shown_is_found_through_any_import(source: str) -> None:
    notebook = sound_chapter()
    cell_with(notebook, "from bsmamba2 import")["source"] = ""
    cell_with(notebook, "show.source")["source"] = source
    assert check_module(notebook, {"bands.py"}, {"BandSplit": "bands"}) == []


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
    said = check_toc({"root": "book/index", "parts": parts}, pages)
    assert expected in "\n".join(said)
    assert bool(said) == bool(expected)


def test_file_numbers_are_those_printed() -> None:
    def said(*parts: list[str], numbered: int = 1) -> list[str]:
        lists = [{"numbered": numbered, "chapters": [{"file": f"book/{name}"} for name in part]} for part in parts]
        pages = ["book/index.md", *(f"book/{name}.ipynb" for part in parts for name in part)]
        return check_toc({"root": "book/index", "parts": lists}, pages)

    assert said(["01_a", "02_b"], ["03_c"]) == []
    assert "numbered 01, 03, 02" in said(["01_a", "03_c"], ["02_b"])[0]
    assert "numbered lists" in said(["01_a"], numbered=0)[0]
    assert "numbered lists" in said(["01_a", "opener"])[0]


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


def test_a_module_file_without_a_chapter_is_reported() -> None:
    chapters = {"03_bands": sound_chapter()}
    assert check_modules(chapters, {"bands.py", "show.py", "data.py"}, {"show.py"}, {"data.py"}) == []
    assert check_modules(chapters, {"bands.py", "masks.py"}, set(), set()) == ["masks.py belongs to no chapter"]
    assert "take it out of LATER" in check_modules(chapters, {"bands.py"}, set(), {"bands.py"})[0]
    assert "does not exist" in check_modules(chapters, {"bands.py"}, set(), {"gone.py"})[0]


def test_a_docstring_that_names_no_chapter_is_reported() -> None:
    source = '"""Bands (book: "Bands").\n\nBook: "The\nscan".\n"""\n'
    assert check_book_references({"a.py": source}, {"Bands", "The scan"}) == []
    assert check_book_references({"a.py": source}, {"Bands"}) != []
