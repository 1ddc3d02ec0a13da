"""A Sphinx extension: the module's docstrings, which are plain text, as the markup that Sphinx reads.

A docstring of this project has paragraphs, code in single backticks, lists, indented blocks (formulas and diagrams), tables
in Markdown, and the sections Args, Returns, Raises, … that sphinx.ext.napoleon knows. Signs that Sphinx would take for markup, as the bars of
a modulus or the star of a product, mean themselves.
"""

from __future__ import annotations

import re
from typing import Any

SECTION = re.compile(
    r"(Args|Attributes|Returns|Yields|Raises|Example|Examples):$"
)


def convert(lines: list[str]) -> list[str]:
    """A docstring's lines, without common indentation, as reStructuredText."""
    done: list[str] = []
    section = False  # inside Args: and the like, where indentation belongs to napoleon
    i = 0
    while i < len(lines):
        line = lines[i]
        if line and not line[0].isspace():
            section = bool(SECTION.match(line))
        fresh = i == 0 or not lines[i - 1].strip()
        if line.startswith("|") or (
            line.startswith("    ") and fresh and not section
        ):
            block = []
            while i < len(lines) and (
                not lines[i].strip()
                or lines[i].startswith("|" if line[0] == "|" else " ")
            ):
                block.append(lines[i])
                i += 1
            done += ["", "::", ""]
            done += [f"    {part}" if part else "" for part in block] + [""]
            continue
        done.append(
            line if section and SECTION.match(line) else inline(line)
        )
        i += 1
    return done


def inline(line: str) -> str:
    """`code` becomes ``code``; outside of it, nothing but *a word* is markup."""
    parts = re.split(r"(`[^`]+`)", line)
    for i, part in enumerate(parts):
        if i % 2:
            before = "\\ " if i and parts[i - 1][-1:].isalnum() else ""
            after = "\\ " if parts[i + 1][:1].isalnum() else ""
            parts[i] = f"{before}`{part}`{after}"
        else:
            words = re.split(r"(?<!\w)(\*[A-Za-z][\w -]*\*)(?!\w)", part)
            words[::2] = [
                re.sub(r"([\\*|`]|_(?!\w))", r"\\\1", word)
                for word in words[::2]
            ]
            parts[i] = "".join(words)
    # `dim: d.` is no list whose first item is d.
    return re.sub(r"^(\s*(?:\w+: )?\w)\.(?=\s|$)", r"\1\\.", "".join(parts))


def process(
    app: Any,
    what: str,
    name: str,
    thing: Any,
    options: Any,
    lines: list[str],
) -> None:
    """Sphinx calls this with every docstring, before napoleon does its part."""
    lines[:] = convert(lines)


def skip(
    app: Any, what: str, name: str, thing: Any, skipped: bool, options: Any
) -> bool | None:
    """Constructors are left out: what they take, the docstring of their class says."""
    return True if name == "__init__" else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=400)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
