"""Each explorable changes when it is moved by keyboard or touched, and says so to those who cannot see it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page
from sight import DESK, PHONE

sys.path.insert(0, str(Path(__file__).parents[2] / "book" / "_ext"))
from pipeline import EXPLORABLES

SLIDERS = {
    "bands": ["Number of bands"],
    "scan": ["Frame i, reads", "Frame j, wrote"],
    "decay": ["Δ while there is sound", "Δ in the pause", "Decay rate of the head"],
    "halflife": ["Head of the last layer", "Moment"],
    "reach": ["What has run", "Band you touch", "Frame you touch"],
    "chunk": ["Frames in a chunk"],
    "roofline": ["Machine", "Kernel", "Chunk"],
    "bits": ["Significand bits", "Loss per frame, Δ|A|"],
    "blind": [f"Sound {letter}" for letter in "ABCD"],
    "leak": ["How much is sung", "Leak louder by"],
    "occupancy": ["How much is sung"],
    "faults": [f"Sound {letter}" for letter in "ABCDEFG"],
}
BLIND = ("blind", "faults")
"""Those with a choice for each hidden sound instead of sliders."""


@pytest.fixture(scope="module")
def opened(book: str, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK, has_touch=True)
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
        "all => all.filter(one => one.value !== one.defaultValue)"
        ".forEach(one => { one.value = one.defaultValue; one.dispatchEvent(new Event('input')) })",
    )
    return opened


def setting(box: Locator) -> dict[str, Any]:
    """The embedded setting that belongs to the sliders' positions."""
    index = 0
    for slider in box.locator("input").all():
        index = index * (int(slider.get_attribute("max") or 0) + 1) + int(slider.input_value())
    return box.locator("script").evaluate("(one, i) => JSON.parse(one.textContent).settings[i]", index)


def test_all_are_known(explore: Page) -> None:
    found = explore.eval_on_selector_all(".explorable", "boxes => boxes.map(box => box.id)")
    assert found == [f"explore-{name}" for name in SLIDERS]


def test_each_is_in_its_chapter_from_one_source(site: Path) -> None:
    def parts(page: str, name: str) -> list[str]:
        text = (site / "book" / f"{page}.html").read_text(encoding="utf-8")
        element = re.findall(rf'<div class="explorable" id="explore-{name}".*?</details>', text, re.DOTALL)
        assert len(element) == 1, f"{name} in {page}"
        return re.findall(r'<p class="question">.*?</p>|<label.*?</label>|<details.*?</details>', element[0])

    for name, chapter in EXPLORABLES.items():
        assert len(parts("explore", name)) == 2 + len(SLIDERS[name])
        assert parts(chapter, name) == parts("explore", name)


@pytest.mark.parametrize(
    ("name", "label"), [(name, label) for name, labels in SLIDERS.items() if name not in BLIND for label in labels]
)
def test_moving_changes_what_is_shown(explore: Page, name: str, label: str) -> None:
    box = explore.locator(f"#explore-{name}")
    slider = box.get_by_role("slider", name=label, exact=True)
    values = json.loads(slider.get_attribute("data-values") or "[]")
    slider.focus()
    explore.keyboard.press("End")

    def shown() -> tuple[str, str, str]:
        return box.locator(".drawing").inner_html(), box.locator(".caption").inner_text(), slider.input_value()

    places = {}
    for key in ("Home", "ArrowRight", "ArrowLeft", "End"):
        before = shown()
        explore.keyboard.press(key)
        drawing, caption, place = shown()
        if key in ("Home", "End"):  # the next position may look the same, as with the last bits of a decay
            assert drawing != before[0], f"{key} leaves the drawing as it was"
        assert caption != before[1], f"{key} leaves the sentence as it was"
        assert caption.split() == setting(box)["caption"].split()
        value = values[int(place)]
        assert slider.get_attribute("aria-valuetext") == value
        assert box.locator(f"output[for={slider.get_attribute('id')}]").inner_text() == value
        places[key] = place
    assert (places["Home"], places["End"]) == ("0", str(len(values) - 1))
    assert box.locator(".caption").get_attribute("aria-live") == "polite"


@pytest.mark.parametrize("place", [(8, 0), (5, 5), (2, 7)])
def test_touching_a_cell_of_the_scan_moves_both_frames(explore: Page, place: tuple[int, int]) -> None:
    box = explore.locator("#explore-scan")
    i, j = place
    for panel in (3, 4):
        box.locator("svg").nth(panel).locator(".cell").nth(9 * i + j).tap()
        assert [slider.input_value() for slider in box.locator("input").all()] == [str(i), str(j)]
    # The numbers that are drawn are those that Python computed.
    values = setting(box)["values"]
    for panel in (0, 1, 2):
        drawn = box.locator("svg").nth(panel).locator(".value").all_text_contents()
        expected = [value for value in values[panel] if value is not None]
        assert [float(word.replace("−", "-")) for word in drawn] == pytest.approx(expected, abs=0.0051)
    assert box.locator("svg").first.locator(".path").count() == max(i - j, 0)


def test_touching_a_cell_of_the_grid_colours_those_it_reaches(explore: Page) -> None:
    box = explore.locator("#explore-reach")
    box.locator(".cell").nth(12 * 6 + 9).tap()
    assert [slider.input_value() for slider in box.locator("input").all()] == ["0", "6", "9"]
    strengths = box.locator(".cell").evaluate_all(
        "cells => cells.map(cell => Number(cell.getAttribute('fill-opacity')))"
    )
    assert [number for number, strength in enumerate(strengths) if strength > 0] == [12 * 6 + k for k in (9, 10, 11)]


def test_the_answer_is_folded_until_it_is_opened(explore: Page) -> None:
    details = explore.locator("#explore-scan details")
    assert not details.locator("p").is_visible()
    details.locator("summary").focus()
    explore.keyboard.press("Enter")
    assert details.locator("p").is_visible()


@pytest.mark.parametrize("name", BLIND)
def test_a_blind_test_names_its_sounds_only_with_the_answer(explore: Page, name: str) -> None:
    box, right = explore.locator(f"#explore-{name}"), []
    for i, select in enumerate(box.locator("select").all()):
        right.append(select.get_attribute("data-right") or "")
        choices = select.locator("option").all_inner_texts()
        assert choices[0] == "no guess"
        assert set(choices[1:]) == {s.get_attribute("data-right") for s in box.locator("select").all()}
        select.focus()
        explore.keyboard.type(right[i] if i else next(choice for choice in choices[1:] if choice != right[0]))
    marks, canvas = box.locator(".control span"), box.locator("canvas")
    box.locator(".stems.ready").scroll_into_view_if_needed()
    assert not canvas.is_visible()
    assert not any(marks.all_inner_texts())
    box.locator("summary").focus()
    explore.keyboard.press("Enter")
    box.get_by_text(f"Right guesses: {len(right) - 1} of {len(right)}.").wait_for()
    assert marks.all_inner_texts() == [f"it is {right[0]}", *["right"] * (len(right) - 1)]
    assert canvas.is_visible()
    box.locator("select").first.select_option(right[0])
    box.get_by_text(f"Right guesses: {len(right)} of {len(right)}.").wait_for()
    box.locator("summary").click()
    assert not any(marks.all_inner_texts())


@pytest.mark.parametrize(("name", "count", "seconds"), [("bands", 11, 3), ("leak", 6, 2)])
def test_every_position_of_a_slider_plays_something_else(explore: Page, name: str, count: int, seconds: float) -> None:
    box = explore.locator(f"#explore-{name}")
    box.locator("input").last.focus()
    explore.keyboard.press("Home")
    heard = {duration_and_source(box.locator("audio"))}
    for _ in range(count - 1):
        explore.keyboard.press("ArrowRight")
        heard.add(duration_and_source(box.locator("audio")))
    assert len(heard) == count
    assert [duration for duration, _ in heard] == pytest.approx([seconds] * count, abs=0.1)


def duration_and_source(player: Locator) -> tuple[float, str]:
    player.evaluate("a => a.readyState || new Promise((y, n) => { a.onloadedmetadata = y; a.onerror = n; a.load() })")
    return player.evaluate("a => a.duration"), player.get_attribute("src") or ""


def test_every_position_of_the_songs_plays_and_is_described(explore: Page) -> None:
    box = explore.locator("#explore-occupancy")
    slider = box.get_by_role("slider", name="How much is sung")
    slider.focus()
    explore.keyboard.press("Home")
    heard, described = set(), set()
    for _ in range(int(slider.get_attribute("max") or 0) + 1):
        for player in box.locator("audio").all():
            duration, source = duration_and_source(player)
            assert duration == pytest.approx(4, abs=0.1)
            heard.add(source)
        described |= {picture.get_attribute("alt") for picture in box.locator("img").all()}
        explore.keyboard.press("ArrowRight")
    assert len(heard) == len(described) == 18


@pytest.mark.parametrize("name", ["decay", "scan", "reach"])
def test_drawings_follow_the_width(explore: Page, name: str) -> None:
    drawing = f"#explore-{name} svg"
    wide = explore.locator(drawing).first.get_attribute("width")
    explore.set_viewport_size(PHONE)
    script = "([css, wide]) => document.querySelector(css).getAttribute('width') !== wide"
    if name != "scan":  # the toy's tables are as wide on a phone, below each other
        explore.wait_for_function(script, arg=[drawing, wide])
    box = explore.locator(f"#explore-{name}").bounding_box()
    for svg in explore.locator(drawing).all():
        inner = svg.bounding_box()
        assert box is not None
        assert inner is not None
        assert inner["x"] + inner["width"] <= box["x"] + box["width"] <= PHONE["width"]


def test_tab_reaches_every_slider(explore: Page) -> None:
    explore.locator("#explore-bands input").focus()
    expected = [f"explore-{name}-{i}" for name, labels in SLIDERS.items() for i in range(len(labels))]
    reached: list[str] = []
    while len(reached) < 200 and expected[-1] not in reached:
        reached.append(explore.evaluate("document.activeElement.id"))
        explore.keyboard.press("Tab")
    assert [name for name in reached if name in expected] == expected
