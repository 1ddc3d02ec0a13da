"""Figures can be enlarged; and figures with every fault, to see that each is seen as on the pages of the book."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from links import SITE, pages
from playwright.sync_api import Page
from sight import DESK, PHONE, look

WITH_FIGURES = [name for name in pages(SITE) if 'class="diagram"' in (SITE / name).read_text(encoding="utf-8")]


def test_there_are_figures_to_look_at(site: Path) -> None:
    assert len(WITH_FIGURES) > 15
    # Figures of a notebook would be ordinary pictures, unless the extension has found them.
    for name in WITH_FIGURES:
        assert not re.search(r"<img[^>]*[.]svg", (site / name).read_text(encoding="utf-8")), name


def test_a_figure_is_enlarged_by_mouse_and_by_keyboard(book: str, reader: Page) -> None:
    reader.goto(f"{book}/book/02_spectrogram.html")
    figure = reader.locator("#fig-spectrograms")
    drawing, button = figure.locator("div[role=img]"), figure.get_by_role("button", name="Enlarge the figure")
    size_of = "one => [one.clientWidth, one.clientHeight]"
    for size, enlarge, close in itertools.product((DESK, PHONE), ("click", "Enter"), ("Escape", "Enter")):
        reader.set_viewport_size(size)
        before = drawing.evaluate(size_of)
        button.click() if enlarge == "click" else button.press(enlarge)
        dialog = reader.locator("dialog[open]")
        assert dialog.locator("svg").evaluate("svg => svg.clientWidth") > 1.5 * before[0]
        assert dialog.get_attribute("aria-label") == drawing.get_attribute("aria-label")
        reader.keyboard.press(close)
        assert dialog.count() == 0
        drawing.locator("svg:visible").wait_for()  # the drawing returns a moment after the dialog is gone
        assert drawing.evaluate(size_of) == before
        assert button.evaluate("button => button === document.activeElement")


FAULTY = """<!DOCTYPE html><html lang="en"><style>svg.narrow { display: none }</style>
<main><section style="width: 300px">
<figure id="one"><div role="img" aria-label="two words"><svg class="wide" width="400" height="100">
<text y="20" font-size="10">small</text><text y="50" fill="#ccc">pale</text><text y="80" x="390">beyond</text>
<text y="85" x="100">under</text><text y="80" x="110">over</text><image href="absent.png"/></svg>
<svg class="narrow"></svg></div></figure>
<figure id="two"><div role="img"><svg class="wide"></svg><svg></svg></div></figure>
<figure id="three"><div role="img"><svg class="wide" width="9"></svg></div></figure></section></main></html>"""


def test_planted_faults_are_seen(tmp_path: Path, serve: Any, reader: Page) -> None:
    (tmp_path / "index.html").write_text(FAULTY, encoding="utf-8")
    found = look(reader, f"{serve(tmp_path)}/index.html").figures
    seen = ("desk, light", "phone, light", "phone, dark", "desk, dark")
    assert [line.rpartition(" (")[2] for line in found] == [f"{where})" for where in seen for _ in range(8)]
    assert [line.rpartition(": ")[0].partition(".")[0] for line in found[:8]] == [
        "picture: one",
        "wide: one",
        "small: one: 10",
        "pale: one: 1",
        "cut off: one",
        "overlaid: one",
        "drawings: two",
        "alternative text: three",
    ]
