"""A Sphinx extension: diagrams that follow a page's theme and width.

An SVG of the class "diagram" holds two drawings, of the classes "wide" and "narrow" (bsmamba2/teaching/plotting.py makes
them, and pipeline.svg is one). Both go into the page itself, where black is the colour of the text; figures.css
shows one of them, and figures.js enlarges it. Other pictures stay as they are.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes


class diagram(nodes.General, nodes.Element):
    """Two SVGs, with alternative text."""


def find_diagrams(app: Any, doctree: nodes.document, docname: str) -> None:
    """Replace images of diagrams, so that their files are not copied."""
    for image in list(doctree.findall(nodes.image)):
        path = Path(app.srcdir, image["uri"])
        if path.suffix == ".svg" and path.is_file():
            svg = path.read_text(encoding="utf-8")
            if 'class="diagram"' in svg:
                alt = image.get("alt", "")
                image.replace_self(diagram("", svg=svg, alt=alt))


def inline(svg: str, folder: Path, address: str) -> str:
    """The two SVGs for a page; pictures in them go to files in a folder."""

    def picture(found: re.Match[str]) -> str:
        data = base64.b64decode(found[1])
        name = hashlib.sha256(data).hexdigest()[:20] + ".png"
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        return f'href="{address}/{name}"'

    svg = svg[svg.index("<svg", 1) : svg.rindex("</svg>")]
    svg = re.sub(r'href="data:image/png;base64,([^"]*)"', picture, svg)
    # Names of parts are unique on a page, in each of the two drawings.
    mark = hashlib.sha256(svg.encode()).hexdigest()[:6]
    return "".join(
        re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}{i}-", part)
        for i, part in enumerate(re.split(r'(?=<svg class="narrow)', svg))
    )


def visit(writer: Any, node: diagram) -> None:
    builder = writer.builder
    svgs = inline(
        node["svg"],
        Path(builder.outdir, builder.imagedir),
        builder.imgpath,
    )
    alt = escape(node["alt"], quote=True)
    writer.body.append(
        f'<div class="diagram" role="img" aria-label="{alt}">{svgs}</div>'
    )


def setup(app: Any) -> dict[str, bool]:
    app.add_node(diagram, html=(visit, lambda writer, node: None))
    app.connect("doctree-resolved", find_diagrams)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
