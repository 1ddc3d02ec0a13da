"""A Sphinx extension: a link with the word "Figure" to a picture shows the picture's number, as "Figure 5.2".

Chapters are plain Markdown, which JupyterLab shows as well: `[Figure](#fig-decay-matrix)`. There the word alone is read.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes

WORD = "Figure"


def number_links(app: Any, doctree: nodes.document, docname: str) -> None:
    """Put the numbers of pictures into the links that lead to them."""
    numbers = {
        name: number
        for page in app.env.toc_fignumbers.values()
        for name, number in page.get("figure", {}).items()
    }
    for link in doctree.findall(nodes.reference):
        target = (
            link.get("refid") or link.get("refuri", "").rpartition("#")[2]
        )
        if link.astext() == WORD and target in numbers:
            number = ".".join(map(str, numbers[target]))
            link.clear()
            link += nodes.inline("", f"{WORD} {number}")


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-resolved", number_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
