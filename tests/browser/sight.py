"""What is seen on one page: by a reader at a desk, in the dark, on a phone, and by axe-core."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as NotReached

DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

REACHABLE = "() => [...document.querySelectorAll('pre')].every(e => e.scrollWidth <= e.clientWidth || e.tabIndex === 0)"
# axe-core walks through every element there is. Where many are made alike, three stay and stand for the rest: modules,
# members of a module and of a class, entries of the index and of the contents to both sides of the text, shapes of a
# drawing, and colours of code. Formulas are MathJax's, some elements for every letter, and go.
THREE = """
    for (const many of ["dl.py", "section:has(> dl.py)", ".genindextable li", ".bd-sidebar-primary li",
                        ".bd-sidebar-secondary li", "svg *"])
        document.querySelectorAll(`${many}:nth-of-type(n+4)`).forEach(one => one.remove());
    document.querySelectorAll("mjx-container").forEach(one => one.replaceChildren());
    const met = {};
    document.querySelectorAll("div.highlight pre span").forEach(one => {
        met[one.className] = (met[one.className] || 0) + 1;
        if (met[one.className] > 3) one.replaceWith(...one.childNodes);
    })"""

# Whether text stands out is a matter of its colour, size and weight, and of what lies behind it. Of the texts that are
# alike in these, three are marked, and stand for the rest: axe-core takes a millisecond or two for each. Its rule
# "region" is slow too, and what it finds is moderate, which is not reported here.
CONTRAST = """() => {
    const met = {};
    for (const one of document.querySelectorAll("body *")) {
        one.removeAttribute("data-contrast");
        if (![...one.childNodes].some(part => part.nodeType === Node.TEXT_NODE && part.data.trim())) continue;
        if (!one.getClientRects().length || !one.checkVisibility({visibilityProperty: true})) continue;
        const style = getComputedStyle(one), kind = [style.color, style.fontSize, style.fontWeight];
        for (let under = one; under; under = under.parentElement) {
            const { backgroundColor, backgroundImage, opacity } = getComputedStyle(under);
            kind.push(backgroundColor, backgroundImage, opacity);
        }
        const name = kind.filter(part => !["rgba(0, 0, 0, 0)", "none", "1"].includes(part)).join();
        met[name] = (met[name] || 0) + 1;
        if (met[name] <= 3) one.setAttribute("data-contrast", "");
    }
    axe.configure({ rules: [{ id: "color-contrast", selector: "[data-contrast]" }, { id: "region", enabled: false }] });
}"""

# Pictures that are not there; players with their durations, once they know them.
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src.slice(0, 100))"
DECODED = "Promise.all([...document.images].map(i => { i.loading = 'eager'; return i.decode().catch(() => 0) }))"
DURATIONS = """Promise.all([...document.querySelectorAll("audio")].map(audio => new Promise(done => {
    const duration = () => Number.isFinite(audio.duration) ? audio.duration : -1;
    const tell = () => done([audio.getAttribute("aria-label") || "", duration()]);
    if (audio.readyState > 0 || audio.error) return tell();
    audio.addEventListener("loadedmetadata", tell);
    audio.addEventListener("error", tell);
    audio.load();
    setTimeout(tell, 5000);
})))"""
# What sticks out to the right of the window, deepest elements first named.
WIDER = """document.documentElement.scrollWidth <= innerWidth ? [] : [...document.body.querySelectorAll("*")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.querySelector("*"))
    .slice(0, 3).map(e => `${e.tagName} .${e.className}`).concat(`${document.documentElement.scrollWidth} pixels`)"""

# Code, formulas and tables that need sideways scrolling, or are cut: how many pixels, and how they begin. The library's
# own source, in the output of a cell, may scroll at a desk.
SCROLLS = """[...document.querySelectorAll("main pre, main mjx-container[display='true'], main table")]
    .filter(e => e.getClientRects().length && !(innerWidth > 576 && e.matches(".cell_output .highlight pre")))
    .map(e => {
        let box = e;
        while (box.tagName !== "MAIN" && getComputedStyle(box).overflowX === "visible") box = box.parentElement;
        const beyond = Math.max(e.scrollWidth - e.clientWidth, box.scrollWidth - box.clientWidth);
        return [beyond, `${innerWidth}: ${e.tagName} +${beyond}: ${e.textContent.trim().slice(0, 60)}`];
    }).filter(([beyond]) => beyond > 1).map(([, text]) => text)"""

# What is wrong with the diagrams, as lines that begin with the kind of fault. Each shows one of its two drawings, no
# wider than its column; its lettering has 11 pixels or more, a contrast of 4.5 to 1, stays inside, and is not overlaid.
FIGURES = """async () => {
    const folded = document.querySelectorAll("details:not([open])");
    folded.forEach(one => one.open = true);
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
        const [svg] = shown;
        for (const image of svg.querySelectorAll("image"))
            if (!(await fetch(image.href.baseVal)).ok) tell("picture", image.href.baseVal);
        const box = svg.getBoundingClientRect();  // from here on nothing waits, so that nothing moves
        const column = diagram.closest("section").getBoundingClientRect();
        if (box.width > column.width + 1) tell("wide", box.width);
        if (!(diagram.getAttribute("aria-label") || "").includes(" ")) tell("alternative text", "none");
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
    folded.forEach(one => one.open = false);
    return faults;
}"""


@dataclass
class Sight:
    """What was seen on a page.

    Attributes:
        console: errors of its scripts.
        elsewhere: addresses outside this machine that it asked for.
        missing: addresses of this machine that were not there.
        pictures: that did not load.
        players: label and duration in seconds of each, −1 when it has none.
        wider: what is wider than a phone, and by how much; empty when nothing is.
        scrolls: code, formulas and tables that are cut or scroll sideways, at a desk and on a phone.
        figures: what is wrong with them, at a desk and on a phone, in the light and in the dark.
        violations: of axe-core, serious and critical ones: rule, and the element's selector; with "(dark)" in the dark.
    """

    console: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    players: list[tuple[str, float]] = field(default_factory=list)
    wider: list[str] = field(default_factory=list)
    scrolls: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    violations: list[tuple[str, str]] = field(default_factory=list)


def look(page: Page, address: str) -> Sight:
    """Open a page and look at it, as a reader would.

    Args:
        page: a tab of a desk's size; its pages share what they have loaded, as a reader's do.
        address: of the page.
    """
    sight = Sight()

    def requested(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob", "about"} and parts.hostname not in {"127.0.0.1", "localhost"}:
            sight.elsewhere.append(request.url)

    listeners: dict[Any, Any] = {
        "console": lambda message: sight.console.append(message.text) if message.type == "error" else None,
        "pageerror": lambda error: sight.console.append(str(error)),
        "response": lambda reply: sight.missing.append(reply.url) if reply.status >= 400 else None,
        "request": requested,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        page.goto(address, wait_until="load")
        _look(page, sight)
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
    return sight


def _look(page: Page, sight: Sight) -> None:
    def figures(where: str) -> None:
        sight.figures += [f"{fault} ({where})" for fault in page.evaluate(FIGURES)]

    # The theme draws its version of these after the page has loaded.
    page.evaluate("document.fonts.ready")
    page.evaluate(DECODED)
    sight.pictures = page.evaluate(BROKEN)
    sight.players = [tuple(player) for player in page.evaluate(DURATIONS)]
    page.evaluate("window.MathJax?.startup?.promise")
    sight.scrolls = page.evaluate(SCROLLS)
    figures("desk, light")
    _show(page, PHONE, "light")
    sight.wider = page.evaluate(WIDER)
    sight.scrolls += page.evaluate(SCROLLS)
    figures("phone, light")
    _show(page, PHONE, "dark")
    figures("phone, dark")
    _show(page, DESK, "dark")
    figures("desk, dark")
    # A moment after a change of width, the theme lets the keyboard reach the code that scrolls at this width. Where
    # that never comes, axe-core names the code.
    with suppress(NotReached):
        page.wait_for_function(REACHABLE, timeout=2_000)
    page.evaluate(f"() => {{ {THREE} }}")
    page.evaluate(AXE_SCRIPT)
    sight.violations += _violations(page, " (dark)", {"runOnly": ["color-contrast"]})
    _show(page, DESK, "light")
    sight.violations += _violations(page, "", {})


def _show(page: Page, size: Any, theme: str) -> None:
    page.set_viewport_size(size)
    page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
    page.wait_for_timeout(100)


def _violations(page: Page, where: str, options: dict[str, Any]) -> list[tuple[str, str]]:
    page.evaluate(CONTRAST)
    # Style sheets are not fetched anew, a request of axe's own.
    found = page.evaluate("axe.run.bind(axe)", {"resultTypes": ["violations"], "preload": False, **options})
    return [
        (violation["id"] + where, " ".join(map(str, node["target"])))
        for violation in found["violations"]
        if violation["impact"] in {"serious", "critical"}
        for node in violation["nodes"]
    ]
