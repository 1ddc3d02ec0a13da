"""Each explorable shows something else when it is moved by keyboard, and says so to those who cannot see it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page
from sight import DESK

SLIDERS = {
    "bands": ["Number of bands"],
    "chunk": ["Frames in a chunk"],
    "decay": ["Δ while there is sound", "Δ in the rest", "Decay rate of the head"],
    "occupancy": ["How much is sung"],
}


@pytest.fixture(scope="module")
def opened(book: str, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    page.goto(f"{book}/book/explore.html")
    drawn = "[...document.querySelectorAll('.explorable .drawing')].every(box => box.querySelector('svg, img'))"
    page.wait_for_function(drawn)
    yield page
    context.close()


@pytest.fixture
def explore(opened: Page) -> Page:
    """The page with its sliders where they were in the beginning."""
    opened.set_viewport_size(DESK)
    opened.eval_on_selector_all(
        ".explorable input",
        "all => all.forEach(one => { one.value = one.defaultValue; one.dispatchEvent(new Event('input')) })",
    )
    return opened


def test_all_are_known(explore: Page) -> None:
    found = explore.eval_on_selector_all(".explorable", "boxes => boxes.map(box => box.id)")
    assert found == list(SLIDERS)


@pytest.mark.parametrize(("name", "label"), [(name, label) for name, labels in SLIDERS.items() for label in labels])
def test_moving_changes_what_is_shown(explore: Page, name: str, label: str) -> None:
    box = explore.locator(f"#{name}")
    slider = box.get_by_label(label)
    values = json.loads(slider.get_attribute("data-values") or "[]")
    slider.focus()

    def shown() -> tuple[str, str, str]:
        return box.locator(".drawing").inner_html(), box.locator(".caption").inner_text(), slider.input_value()

    places = {}
    for key in ("ArrowRight", "ArrowLeft", "Home", "End"):
        before = shown()
        explore.keyboard.press(key)
        drawing, caption, place = shown()
        assert drawing != before[0], f"{key} leaves the drawing as it was"
        assert caption != before[1], f"{key} leaves the sentence as it was"
        value = values[int(place)]
        assert slider.get_attribute("aria-valuetext") == value
        assert box.locator(f"output[for={slider.get_attribute('id')}]").inner_text() == value
        places[key] = place
    assert (places["Home"], places["End"]) == ("0", str(len(values) - 1))
    assert box.locator(".caption").get_attribute("aria-live") == "polite"


def test_every_position_of_the_songs_plays_and_is_described(explore: Page) -> None:
    box = explore.locator("#occupancy")
    slider = box.get_by_label("How much is sung")
    slider.focus()
    explore.keyboard.press("Home")
    heard, described = set(), set()
    for _ in range(int(slider.get_attribute("max") or 0) + 1):
        for player in box.locator("audio").all():
            player.evaluate(
                "a => a.readyState || new Promise((y, n) => { a.onloadedmetadata = y; a.onerror = n; a.load() })"
            )
            assert player.evaluate("a => a.duration") == pytest.approx(4, abs=0.1)
            heard.add(player.get_attribute("src"))
        described |= {picture.get_attribute("alt") for picture in box.locator("img").all()}
        explore.keyboard.press("ArrowRight")
    assert len(heard) == len(described) == 18


def test_drawings_follow_the_width(explore: Page) -> None:
    drawing = explore.locator("#bands svg")
    wide = drawing.get_attribute("width")
    explore.set_viewport_size({"width": 390, "height": 844})
    explore.wait_for_function("wide => document.querySelector('#bands svg').getAttribute('width') !== wide", arg=wide)
    assert float(drawing.get_attribute("width") or 0) < 390


def test_tab_reaches_every_slider(explore: Page) -> None:
    explore.locator("#bands input").focus()
    reached = []
    for _ in range(40):
        reached.append(explore.evaluate("document.activeElement.id"))
        explore.keyboard.press("Tab")
    expected = [f"{name}-{i}" for name, labels in SLIDERS.items() for i in range(len(labels))]
    assert [name for name in reached if name in expected] == expected
