"""Every figure of the built book can be read: at a desk and on a phone, in the light and in the dark, and enlarged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from links import SITE, pages
from playwright.sync_api import BrowserContext, Page
from sight import DESK, PHONE

# What is wrong with the diagrams, as lines that begin with the kind of fault. Each shows one of its two drawings, no
# wider than its column; its lettering has 11 pixels or more, a contrast of 4.5 to 1, stays inside, and is not overlaid.
FAULTS = """async () => {
    document.querySelectorAll("details").forEach(one => one.open = true);
    await document.fonts.ready;
    const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = colour => numbers(colour).slice(0, 3).map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const background = one => {
        for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if ((numbers(colour)[3] ?? 1) > 0) return luminance(colour);
        }
        return 1;
    };
    const faults = [];
    for (const diagram of document.querySelectorAll("main [role=img]:has(> svg.wide)")) {
        const tell = (kind, what) => faults.push(`${kind}: ${diagram.closest("figure")?.id || "drawing"}: ${what}`);
        const shown = [...diagram.querySelectorAll(":scope > svg")].filter(svg => svg.getBoundingClientRect().width);
        if (shown.length !== 1) { tell("drawings", shown.length); continue; }
        const [svg] = shown, box = svg.getBoundingClientRect();
        const column = diagram.closest("section").getBoundingClientRect();
        if (box.width > column.width + 1) tell("wide", box.width);
        if (!(diagram.getAttribute("aria-label") || "").includes(" ")) tell("alternative text", "none");
        for (const image of svg.querySelectorAll("image"))
            if (!(await fetch(image.href.baseVal)).ok) tell("picture", image.href.baseVal);
        const under = background(svg), met = [];
        for (const text of svg.querySelectorAll("text")) {
            if (!text.textContent.trim()) continue;
            const { a, b } = text.getScreenCTM(), place = text.getBoundingClientRect();
            for (const part of [text, ...text.querySelectorAll("tspan")]) {
                const size = parseFloat(getComputedStyle(part).fontSize) * Math.hypot(a, b);
                if (size < 11) tell("small", `${size.toFixed(1)} pixels: ${part.textContent}`);
            }
            const light = [luminance(getComputedStyle(text).fill), under].sort((one, two) => two - one);
            const contrast = (light[0] + 0.05) / (light[1] + 0.05);
            if (contrast < 4.5) tell("pale", `${contrast.toFixed(1)}: ${text.textContent}`);
            if (place.left < box.left - 2 || place.right > box.right + 2 || place.top < box.top - 2
                || place.bottom > box.bottom + 2) tell("cut off", text.textContent);
            for (const [other, words] of met)
                if (Math.min(place.right, other.right) - Math.max(place.left, other.left) > 2
                    && Math.min(place.bottom, other.bottom) - Math.max(place.top, other.top) > 3)
                    tell("overlaid", `${words} / ${text.textContent}`);
            met.push([place, text.textContent]);
        }
    }
    return faults;
}"""
WITH_FIGURES = [name for name in pages(SITE) if 'class="diagram"' in (SITE / name).read_text(encoding="utf-8")]


def faults(page: Page) -> list[str]:
    """Faults of all figures of a page, for both widths and themes."""
    found = []
    sizes: dict[str, Any] = {"desk": DESK, "phone": PHONE}
    for width, size in sizes.items():
        page.set_viewport_size(size)
        for theme in ("light", "dark"):
            page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
            page.wait_for_timeout(50)
            found += [f"{fault} ({width}, {theme})" for fault in page.evaluate(FAULTS)]
    return found


def test_there_are_figures_to_look_at(site: Path) -> None:
    assert len(WITH_FIGURES) > 15
    # Figures of a notebook would be ordinary pictures, unless the extension has found them.
    for name in WITH_FIGURES:
        assert not re.search(r"<img[^>]*[.]svg", (site / name).read_text(encoding="utf-8")), name


@pytest.mark.parametrize("name", WITH_FIGURES)
def test_figures_can_be_read(book: str, readers: BrowserContext, name: str) -> None:
    page = readers.new_page()
    page.goto(f"{book}/{name}", wait_until="load")
    try:
        assert faults(page) == []
    finally:
        page.close()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_figure_is_enlarged_by_mouse_and_by_keyboard(book: str, page: Page, size: Any) -> None:
    page.set_viewport_size(size)
    page.goto(f"{book}/book/02_spectrogram.html")
    figure = page.locator("#fig-spectrograms")
    drawing, button = figure.locator("div[role=img]"), figure.get_by_role("button", name="Enlarge the figure")
    size_of = "one => [one.clientWidth, one.clientHeight]"
    before = drawing.evaluate(size_of)
    for enlarge, close in (("click", "Escape"), ("Enter", "Enter")):
        button.click() if enlarge == "click" else button.press(enlarge)
        dialog = page.locator("dialog[open]")
        assert dialog.locator("svg").evaluate("svg => svg.clientWidth") > 1.5 * before[0]
        assert dialog.get_attribute("aria-label") == drawing.get_attribute("aria-label")
        page.keyboard.press(close)
        assert dialog.count() == 0
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


def test_planted_faults_are_seen(tmp_path: Path, serve: Any, page: Page) -> None:
    (tmp_path / "index.html").write_text(FAULTY, encoding="utf-8")
    page.goto(f"{serve(tmp_path)}/index.html")
    found = page.evaluate(FAULTS)
    assert [line.rpartition(": ")[0].partition(".")[0] for line in found] == [
        "wide: one",
        "picture: one",
        "small: one: 10",
        "pale: one: 1",
        "cut off: one",
        "overlaid: one",
        "drawings: two",
        "alternative text: three",
    ]
