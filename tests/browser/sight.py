"""What is seen on one page: by a reader at a desk, in the dark, on a phone, and by axe-core."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import BrowserContext
from playwright.sync_api import TimeoutError as NotReached

DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

REACHABLE = "() => [...document.querySelectorAll('pre')].every(e => e.scrollWidth <= e.clientWidth || e.tabIndex === 0)"
# axe-core walks through every element there is. Where many are made alike, three stay and stand for the rest: modules,
# members of a module and of a class, entries of the index and of the contents to both sides of the text, and colours of
# code. Formulas are MathJax's, some elements for every letter, and go.
THREE = """
    for (const many of ["dl.py", "section:has(> dl.py)", ".genindextable li", ".bd-sidebar-primary li",
                        ".bd-sidebar-secondary li"])
        document.querySelectorAll(`${many}:nth-of-type(n+4)`).forEach(one => one.remove());
    document.querySelectorAll("mjx-container").forEach(one => one.replaceChildren());
    const met = {};
    document.querySelectorAll("div.highlight pre span").forEach(one => {
        met[one.className] = (met[one.className] || 0) + 1;
        if (met[one.className] > 3) one.replaceWith(...one.childNodes);
    })"""

# Whether text stands out is a matter of its colour, size and weight, and of what lies behind it. Of the texts that are
# alike in these, three are marked, and stand for the rest: axe-core takes a millisecond or two for each.
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
    axe.configure({ rules: [{ id: "color-contrast", selector: "[data-contrast]" }] });
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
        violations: of axe-core, serious and critical ones: rule, and the element's selector; with "(dark)" in the dark.
    """

    console: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    players: list[tuple[str, float]] = field(default_factory=list)
    wider: list[str] = field(default_factory=list)
    scrolls: list[str] = field(default_factory=list)
    violations: list[tuple[str, str]] = field(default_factory=list)


def look(readers: BrowserContext, address: str) -> Sight:
    """Open a page and look at it, as a reader would.

    Args:
        readers: a browser's context of a desk's size; its pages share what they have loaded, as a reader's do.
        address: of the page.
    """
    sight = Sight()
    page = readers.new_page()
    page.on("console", lambda message: sight.console.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: sight.console.append(str(error)))
    page.on("response", lambda reply: sight.missing.append(reply.url) if reply.status >= 400 else None)

    def requested(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in {"data", "blob", "about"} and parts.hostname not in {"127.0.0.1", "localhost"}:
            sight.elsewhere.append(request.url)

    page.on("request", requested)
    page.goto(address, wait_until="load")
    # The theme draws its version of these after the page has loaded.
    page.evaluate("document.fonts.ready")
    page.evaluate(DECODED)
    sight.pictures = page.evaluate(BROKEN)
    sight.players = [tuple(player) for player in page.evaluate(DURATIONS)]
    page.evaluate("window.MathJax?.startup?.promise")
    sight.scrolls = page.evaluate(SCROLLS)
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(100)
    sight.wider = page.evaluate(WIDER)
    sight.scrolls += page.evaluate(SCROLLS)
    page.set_viewport_size(DESK)
    # A moment after a change of width, the theme lets the keyboard reach the code that scrolls at this width. Where
    # that never comes, axe-core names the code.
    with suppress(NotReached):
        page.wait_for_function(REACHABLE, timeout=2_000)
    page.evaluate(f"() => {{ {THREE} }}")
    page.evaluate(AXE_SCRIPT)
    sight.violations += _violations(page, "", {})
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_timeout(50)
    sight.violations += _violations(page, " (dark)", {"runOnly": ["color-contrast"]})
    page.close()
    return sight


def _violations(page: Any, where: str, options: dict[str, Any]) -> list[tuple[str, str]]:
    page.evaluate(CONTRAST)
    # Style sheets are not fetched anew, a request of axe's own.
    found = page.evaluate("axe.run.bind(axe)", {"resultTypes": ["violations"], "preload": False, **options})
    return [
        (violation["id"] + where, " ".join(map(str, node["target"])))
        for violation in found["violations"]
        if violation["impact"] in {"serious", "critical"}
        for node in violation["nodes"]
    ]
