"""Checks of the book: each is a plain function from a notebook, or from pages, to a list of complaints."""

from __future__ import annotations

import ast
import inspect
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import bsmamba2
from notebooks import Notebook, calls, cells, dotted, headings, imports, parse, prose, section, tags, text

PACKAGE = Path(bsmamba2.__file__).parent
SECTIONS = (
    "Goal",
    "What you need",
    "Picture",
    "Build it",
    "Read it",
    "Check it",
    "What changes if …",
    "Summary",
    "Exercises",
    "Further reading",
)
EXERCISES = 3
WIDTH = 76
"""Characters of code in a line of a page at desk width."""
ANSWER = {
    "jupyter": {"source_hidden": True},
    "mystnb": {"code_prompt_show": "Answer", "code_prompt_hide": "Hide the answer"},
}
# What bsmamba2.teaching.plotting offers that is no figure, and so needs no alternative text.
NOT_FIGURES = {"source", "audio", "thumbnail", "sound", "progress", "decibels", "table"}


# --- table of contents and files --------------------------------------------------------------------------


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
    faults = [f"{entry} stands twice in the table of contents" for entry in set(entries) if entries.count(entry) > 1]
    faults += [f"two pages are called {stem}" for stem in set(stems) if stems.count(stem) > 1]
    # Results are made by `make train`, and not committed.
    faults += [
        f"{entry} is in the table of contents and does not exist"
        for entry in entries
        if entry not in stems and not entry.startswith("book/results/")
    ]
    faults += [
        f"{page} is not in the table of contents"
        for page, stem in zip(pages, stems, strict=True)
        if stem not in entries
    ]
    numbers = [match[1] for entry in entries if (match := CHAPTER.fullmatch(entry))]
    if numbers != [f"{i:02}" for i in range(1, len(numbers) + 1)]:
        faults.append(f"chapters are numbered {', '.join(numbers)}: number their files 01, 02, … as they are printed")
    for part in toc["parts"]:
        files = [chapter["file"] for chapter in part["chapters"]]
        wrong = ", ".join(file for file in files if bool(CHAPTER.fullmatch(file)) != bool(part.get("numbered")))
        if wrong:
            faults.append(f"{wrong}: chapters stand in numbered lists, and other pages in lists without a number")
    return faults


def check_named_tests(pages: dict[str, str], tests: dict[str, str]) -> list[str]:
    """A test that a page names exists."""
    return [
        f"{page} names {file}::{function}, and there is no such test"
        for page, words in pages.items()
        for file, function in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", words)
        if f"def {function}(" not in tests.get(file, "")
    ]


def check_ledger(ledger: str, sources: dict[str, str]) -> list[str]:
    """Each deviation that a docstring or comment admits has a row in the ledger, with the path of its file."""
    rows = [line for line in ledger.splitlines() if line.startswith("|")]
    faults = []
    for file, source in sources.items():
        admitted = source.count("Differs from the published model")
        named = sum(f"(`{file}`)" in row for row in rows)
        if admitted != named:
            faults.append(f"{file} admits {admitted} deviations, and the ledger has {named} rows with (`{file}`)")
    return faults


def covered(file: str, entries: set[str]) -> bool:
    """Whether a file, or a folder that it is in, is among the entries; all relative to the package."""
    return any(file == entry or file.startswith(f"{entry}/") for entry in entries)


def check_modules(chapters: dict[str, Notebook], files: set[str], no_chapter: set[str]) -> list[str]:
    """Each file of the module, or its folder, is named by a chapter or as one without a chapter; not as both."""
    named = {entry for notebook in chapters.values() for entry in module_entries(notebook)}
    faults = [f"{file} belongs to no chapter" for file in sorted(files) if not covered(file, named | no_chapter)]
    faults += [f"{entry} has a chapter: it stands among those without one" for entry in sorted(no_chapter & named)]
    gone = sorted(entry for entry in no_chapter if not any(covered(file, {entry}) for file in files))
    return faults + [f"{entry} stands among those without a chapter, and does not exist" for entry in gone]


def check_book_references(sources: dict[str, str], titles: set[str]) -> list[str]:
    """`Book: "Bands"` in a docstring names a page of the book by its title."""
    faults = []
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for name in re.findall(r'\b[Bb]ook:\s+"([^"]+)"', ast.get_docstring(node) or ""):
                    name = re.sub(r"\s+", " ", name)
                    if name not in titles:
                        faults.append(f'{file} refers to the chapter "{name}", and there is none of that title')
    return faults


# --- one chapter ----------------------------------------------------------------------------------------


# How an exercise begins: what kind it is, how long it takes, and how hard it is.
KIND = r"\*(Predict|Change|Extend|Catch), \d+ minutes, (easy|medium|hard)\.\*"


def check_sections(notebook: Notebook) -> list[str]:
    """One title, first of all, and the ten sections in their order."""
    found = headings(notebook)
    faults = []
    if [level for level, _, _ in found].count(1) != 1 or found[0][0] != 1 or found[0][2] != 0:
        faults.append("one level-1 heading, in the first cell, is the chapter's title")
    names = tuple(words for level, words, _ in found if level == 2)
    if names != SECTIONS:
        missing = [name for name in SECTIONS if name not in names]
        extra = [name for name in names if name not in SECTIONS]
        faults.append(
            f"level-2 headings are not the ten in order; missing: {missing}, others: {extra}, found: {list(names)}"
        )
    return faults


def check_exercises(notebook: Notebook) -> list[str]:
    """Exercise 1, 2, 3 …, each answered by a folded code cell that runs.

    One cell tagged `yours`, which the reader completes and which checks the result, may precede the answer.
    """
    faults, numbers = [], []
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
                    faults.append(
                        f"Exercise {number} lets the reader write, and nothing of bsmamba2.teaching.exercises checks it"
                    )
            answer = after[0] if after else None
            if len(found) > 1:
                faults.append(f"Exercise {number} shares its cell with another: its answer cannot follow it")
            elif answer is None or answer["cell_type"] != "code" or "hide-cell" not in tags(answer):
                faults.append(f"Exercise {number} is not followed by an answer: a code cell tagged hide-cell")
    if numbers != list(range(1, max(EXERCISES, len(numbers)) + 1)):
        faults.append(f"exercises are numbered {numbers}: at least {EXERCISES}, as ### Exercise 1, ### Exercise 2, …")
    return faults


def check_difficulty(notebook: Notebook) -> list[str]:
    """Each exercise says its kind, how long it takes, and how hard it is."""
    return [
        f"{found[1]} does not begin like *Predict, 5 minutes, easy.*"
        for cell in section(notebook, "Exercises")
        if (found := re.match(r"### (Exercise \d+)\b.*\n+", text(cell)))
        and not re.match(KIND, text(cell)[found.end() :])
    ]


def module_entries(notebook: Notebook) -> list[str]:
    """Files and folders of the package that a chapter is about, from its metadata."""
    return notebook["metadata"].get("bsmamba2", {}).get("module", [])


def source_file(name: str) -> str:
    """File of the package, relative to it, that defines a dotted name; the empty string for anything else."""
    try:
        file = inspect.getsourcefile(pkgutil.resolve_name(name))
    except (ImportError, AttributeError, TypeError):
        return ""
    return Path(file).relative_to(PACKAGE).as_posix() if file and PACKAGE in Path(file).parents else ""


def check_module(notebook: Notebook, files: set[str]) -> list[str]:
    """The files and folders that the chapter's metadata name exist, and "Read it" shows something from each."""
    entries = module_entries(notebook)
    if not entries:
        return ['the metadata name no file of the module: "bsmamba2": {"module": ["bands.py"]}']
    known = imports([parse(cell) for _, cell in cells(notebook, "code")])
    shown = set()
    for name, call in calls(notebook, section(notebook, "Read it")):
        if name == "bsmamba2.teaching.plotting.source":
            for argument in call.args:
                head, _, rest = dotted(argument).partition(".")
                full = f"{known.get(head, head)}.{rest}".rstrip(".")
                shown.add(source_file(full) if full.startswith("bsmamba2.") else "")
    faults = []
    for entry in entries:
        if not any(covered(file, {entry}) for file in files):
            faults.append(f"{entry} is no file of the module")
        if not any(covered(file, {entry}) for file in shown):
            faults.append(f"{entry} is not shown under Read it: plotting.source(…)")
    return faults


# --- any notebook ---------------------------------------------------------------------------------------


def check_pictures(notebook: Notebook) -> list[str]:
    """Every picture has alternative text that names what to notice in it."""
    faults = []
    for i, cell in cells(notebook, "code"):
        names = {name for name, _ in calls(notebook, [cell])}
        draws = any(
            name.startswith("matplotlib.pyplot.")
            or (name.startswith("bsmamba2.teaching.plotting.") and name.split(".")[3] not in NOT_FIGURES)
            for name in names
        )
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        if draws and len(alt.split()) < 3:
            faults.append(f"cell {i} draws and has no alternative text: metadata mystnb.image.alt, what to notice")
    for i, cell in cells(notebook, "markdown"):
        for alt in re.findall(r"!\[([^\]]*)\]\(", prose(cell)):
            if len(alt.split()) < 3:
                faults.append(f"cell {i} has an image without alternative text: {alt!r}")
        for tag in re.findall(r"<img\b[^>]*>", prose(cell)):
            if not re.search(r'alt="[^"]+"', tag):
                faults.append(f"cell {i} has an image without alternative text: {tag}")
    return faults


def check_figures(notebook: Notebook) -> list[str]:
    """A picture has a caption and a name, and so a number; the prose refers to it, unless it belongs to an answer."""
    faults, names = [], []
    for i, cell in cells(notebook, "code"):
        options = cell["metadata"].get("mystnb", {})
        if "image" not in options:
            continue
        name = options.get("figure", {}).get("name", "")
        if not (name.startswith("fig-") and options["figure"].get("caption", "").endswith(".")):
            faults.append(
                f"cell {i} draws, and its metadata mystnb.figure have no name fig-… and a caption, a sentence"
            )
        names.append((name, "hide-cell" in tags(cell)))
    words = "\n".join(prose(cell) for _, cell in cells(notebook, "markdown"))
    links = re.findall(r"\[Figure\]\(#([^)]*)\)", words)
    faults += [f"[Figure](#{link}) leads to no picture of this chapter" for link in links if link not in dict(names)]
    faults += [
        f"no [Figure](#{name}) in the prose" for name, answer in names if name and not answer and name not in links
    ]
    return faults


def check_markdown(notebook: Notebook) -> list[str]:
    """Markdown that JupyterLab shows as the book does: no roles, directives, targets or attributes."""
    patterns = {
        "a directive": r"^\s*(?:`{3,}|:{3,}|~{3,})\s*\{[^}]*\}",
        "a role": r"\{[A-Za-z][\w:.+-]*\}`[^`]+`",
        "a target": r"^\([\w:.-]+\)=\s*$",
        "an attribute": r"(?:^|[\])])\{[.#]?[A-Za-z][^}]*\}",
        "a comment": r"^%\s",
    }
    faults = []
    for i, cell in cells(notebook, "markdown"):
        words = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", "", prose(cell), flags=re.DOTALL)  # braces of formulas
        for name, pattern in patterns.items():
            if match := re.search(pattern, words, re.MULTILINE):
                faults.append(f"cell {i} has {name} that JupyterLab shows raw: {match[0].strip()!r}")
    return faults


def check_outputs(notebook: Notebook) -> list[str]:
    """Committed outputs are those that the tests compare, and no others."""
    faults = []
    for i, cell in cells(notebook, "code"):
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            faults.append(f"cell {i} has an error for an output")
        if cell["outputs"] and "check" not in tags(cell):
            faults.append(f"cell {i} has outputs and is not tagged check: nbstripout --keep-id --keep-count")
        # nbval compares, and nbstripout keeps, what carries their own tag.
        if cell["outputs"] and "check" in tags(cell) and not {"nbval-check-output", "keep_output"} <= set(tags(cell)):
            faults.append(f"cell {i} is tagged check, and also needs the tags nbval-check-output and keep_output")
    return faults


def check_portable(notebook: Notebook) -> list[str]:
    """Nothing of the machine it was written on."""
    faults = []
    if found := re.search(
        r"(?<![\w.:/-])/(?:home|root|Users|tmp|work|mnt|opt)/\w+|\b[A-Z]:\\\\\w+", json.dumps(notebook)
    ):
        faults.append(f"a path of one machine: {found[0]}")
    kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    if kernel != "python3":
        faults.append(f"the kernel is {kernel!r}: every Jupyter has one called python3, and maybe no other")
    return faults


def check_history(notebook: Notebook) -> list[str]:
    """nbval runs cells without a history, and IPython then shows what a semicolon at the end should hide."""
    return [
        f"cell {i} ends in a semicolon: write _ = …"
        for i, cell in cells(notebook, "code")
        if text(cell).rstrip().endswith(";")
    ]


def check_widths(notebook: Notebook) -> list[str]:
    """No line of code is cut off on the page."""
    return [
        f"cell {i} has a line of {len(line)} characters, of which a page shows {WIDTH}: {line.strip()[:40]} …"
        for i, cell in cells(notebook, "code")
        for line in text(cell).split("\n")
        if len(line) > WIDTH
    ]


def check_answers(notebook: Notebook) -> list[str]:
    """Answers are folded in JupyterLab too, and on the page the fold says so."""
    return [
        f"cell {i} is an answer: its metadata must have {ANSWER}"
        for i, cell in cells(notebook, "code")
        if "hide-cell" in tags(cell)
        and any(not wanted.items() <= cell["metadata"].get(name, {}).items() for name, wanted in ANSWER.items())
    ]


ANY_NOTEBOOK = (
    check_widths,
    check_answers,
    check_pictures,
    check_markdown,
    check_outputs,
    check_portable,
    check_history,
)
