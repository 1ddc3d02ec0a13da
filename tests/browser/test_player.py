"""The stem player on a page of its own, opened from `file://`: playhead, gains, keyboard, touch, both themes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pydata_sphinx_theme
import pytest
import torch
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import Browser, Page
from sight import DESK, PHONE, WIDER

from bsmamba2.teaching import plotting

STATIC = Path(__file__).parents[2] / "book" / "_static"
THEME = Path(pydata_sphinx_theme.__file__).parent / "theme" / "pydata_sphinx_theme" / "static" / "styles"
SECONDS = 20.0
PITCHES = {
    "Low": 344.53125,
    "Middle": 1033.59375,
    "High": 3100.78125,
}  # in the middle of the analyser's bins 16, 48 and 144
TIME = torch.arange(int(SECONDS * 44_100)) / 44_100
TONES = {
    label: amplitude * torch.sin(2 * torch.pi * pitch * TIME)
    for (label, pitch), amplitude in zip(PITCHES.items(), (0.9, 0.6, 0.45), strict=True)
}
# Every sound goes through an analyser on its way out; what each source was asked to play is written down.
PROBE = """
    window.starts = [];
    const connect = AudioNode.prototype.connect, start = AudioBufferSourceNode.prototype.start;
    AudioNode.prototype.connect = function (to, ...rest) {
        if (to !== this.context.destination || this instanceof AnalyserNode) return connect.call(this, to, ...rest);
        if (!this.context.probe) {
            this.context.probe = new AnalyserNode(this.context, {fftSize: 2048, smoothingTimeConstant: 0});
            window.probe = this.context.probe;
            connect.call(window.probe, to);
        }
        return connect.call(this, this.context.probe);
    };
    AudioBufferSourceNode.prototype.start = function (...when) { starts.push(when); start.call(this, ...when); };"""
# Amplitudes of the three pitches in what sounds now; an analyser's window is Blackman's, whose mean is 0.42.
HEARD = """() => {
    const bins = new Float32Array(probe.frequencyBinCount);
    probe.getFloatFrequencyData(bins);
    return [16, 48, 144].map(bin => 2 / 0.42 * 10 ** (bins[bin] / 20));
}"""


def html(signals: dict[str, torch.Tensor]) -> str:
    styles = [THEME / "pydata-sphinx-theme.css", STATIC / "custom.css", STATIC / "player.css"]
    links = "".join(f'<link rel="stylesheet" href="{path.as_uri()}">' for path in styles)
    return (
        '<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8"><title>Players</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{links}'
        f'<script defer src="{(STATIC / "player.js").as_uri()}"></script></head><body>'
        f'<main class="bd-content"><article class="bd-article"><h1>Players</h1><div class="cell_output">'
        f'<div class="text_html">{plotting.audio(signals).data}</div></div></article></main></body></html>'
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with one player of three tones."""
    path = tmp_path_factory.mktemp("player") / "index.html"
    path.write_text(html({label: tone.expand(2, -1) for label, tone in TONES.items()}), encoding="utf-8")
    return path


def new_tab(browser: Browser, **options: Any) -> Page:
    page = browser.new_context(**{"viewport": DESK, **options}).new_page()
    page.set_default_timeout(20_000)
    page.errors = []
    page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.add_init_script(PROBE)
    return page


def open_page(page: Page, path: Path) -> None:
    page.errors.clear()
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelector('.clock')?.textContent.includes('of 20.0')")


@pytest.fixture(scope="module")
def desk(browser: Browser) -> Iterator[Page]:
    """One tab for all tests at a desk."""
    page = new_tab(browser)
    yield page
    page.context.close()


@pytest.fixture
def player(desk: Page, written: Path) -> Iterator[Page]:
    desk.emulate_media(media="screen", reduced_motion="no-preference")
    open_page(desk, written)
    yield desk
    assert desk.errors == []


def time(page: Page) -> float:
    return float(page.get_by_label("Position").input_value())


def play(page: Page) -> None:
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").wait_for()
    page.wait_for_function("window.starts.length >= 3")


def sounds(page: Page, *amplitudes: float) -> None:
    """The three tones sound with these amplitudes, after a change of gain and the analyser's window have passed."""
    expected = pytest.approx(amplitudes, rel=0.06, abs=0.01)
    deadline = monotonic() + 30
    while (heard := page.evaluate(HEARD)) != expected and monotonic() < deadline:
        page.wait_for_timeout(50)
    assert heard == expected


def test_it_takes_the_place_of_the_players_and_starts_silent(player: Page) -> None:
    assert player.locator("audio").count() == 3
    assert not player.locator("audio").first.is_visible()
    assert player.get_by_role("radio", name="Low").is_checked()
    assert time(player) == 0
    assert player.evaluate("starts.length") == 0


def test_switching_changes_the_signal_and_neither_the_time_nor_the_sources(player: Page) -> None:
    play(player)
    sounds(player, 0.9, 0, 0)
    before = time(player)
    player.get_by_role("radio", name="Middle").check()
    sounds(player, 0, 0.6, 0)
    player.keyboard.press("3")
    sounds(player, 0, 0, 0.45)
    assert 0 < before < time(player)
    begun, offset = player.evaluate("starts[0]")
    assert player.evaluate("starts") == [[begun, offset]] * 3, "all begin at once, and only once"


def test_a_mix_adds_the_signals_at_their_levels(player: Page) -> None:
    play(player)
    player.get_by_label("Mix").check()
    sounds(player, 0.9, 0, 0)
    player.get_by_label("Level of Low").fill("0")
    player.get_by_label("Level of Middle").fill("0.5")
    player.keyboard.press("3")
    assert [player.get_by_label(f"Level of {label}").input_value() for label in PITCHES] == ["0", "0.5", "1"]
    sounds(player, 0, 0.3, 0.45)
    player.get_by_label("Level of Low").fill("1")
    peak = float((TONES["Low"] + TONES["Middle"] / 2 + TONES["High"]).abs().max())
    assert peak > 1.2, "without a common factor, the mix would clip"
    sounds(player, *(amplitude / peak for amplitude in (0.9, 0.3, 0.45)))
    player.get_by_label("Mix").uncheck()
    sounds(player, 0.9, 0, 0)


def test_a_click_on_the_spectrogram_moves_the_playhead(player: Page) -> None:
    box = player.get_by_label("Position").bounding_box()
    assert box == player.locator("canvas").bounding_box(), "the slider covers the spectrogram"
    player.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 20)
    assert time(player) == pytest.approx(0.75 * SECONDS, abs=0.1)
    assert player.locator(".clock").inner_text() == "15.0 of 20.0 s"
    play(player)
    assert player.evaluate("starts[0][1]") == pytest.approx(0.75 * SECONDS, abs=0.1)
    player.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 20)
    player.wait_for_function("starts.length === 6")
    assert player.evaluate("starts[5][1]") == pytest.approx(0.25 * SECONDS, abs=0.1)
    sounds(player, 0.9, 0, 0)


def test_it_stops_at_the_end_and_returns_to_the_beginning(player: Page) -> None:
    player.get_by_label("Position").focus()
    player.keyboard.press("End")
    player.keyboard.press("ArrowLeft")
    assert time(player) == pytest.approx(SECONDS - 1, abs=0.01)
    play(player)
    player.get_by_role("button", name="Play").wait_for()
    assert time(player) == 0


def test_the_keyboard_does_everything(player: Page) -> None:
    reached = []
    for _ in range(4):
        player.keyboard.press("Tab")
        name = "e => e.getAttribute('aria-label') || (e.labels?.[0] || e).innerText.trim()"
        reached.append(player.locator(":focus").evaluate(name))
        style = player.locator(":focus").evaluate(
            "e => [getComputedStyle(e).outlineStyle, getComputedStyle(e).outlineWidth]"
        )
        assert style == ["solid", "3px"], "the focus can be seen"
    assert reached == ["Position", "Play", "Mix", "1 · Low"]
    player.keyboard.press("ArrowDown")
    assert player.get_by_role("radio", name="Middle").is_checked()
    player.keyboard.press("Space")
    player.wait_for_function("starts.length === 3")
    sounds(player, 0, 0.6, 0)
    player.keyboard.press("Space")
    player.get_by_role("button", name="Play").wait_for()
    player.get_by_label("Position").focus()
    player.keyboard.press("Home")
    for _ in range(3):
        player.keyboard.press("ArrowRight")
    player.keyboard.press("ArrowLeft")
    assert time(player) == pytest.approx(2, abs=0.01)
    assert player.get_by_label("Position").get_attribute("aria-valuetext") == "2 of 20 seconds"


def test_the_spectrogram_shows_the_chosen_signal(player: Page) -> None:
    brightest = """() => {
        const canvas = document.querySelector("canvas"), {width, height} = canvas;
        const {data} = canvas.getContext("2d").getImageData(width / 2, 0, 1, height);
        const light = Array.from({length: height}, (_, i) => data[4 * i] + data[4 * i + 1] + data[4 * i + 2]);
        return (height - 1 - light.indexOf(Math.max(...light))) * 44100 / 2048;
    }"""
    for label, pitch in PITCHES.items():
        player.get_by_role("radio", name=label).check()
        assert player.evaluate(brightest) == pytest.approx(pitch, abs=11), label
        assert player.locator(".title").inner_text() == f"Spectrogram, 0 to 10 kHz: {label}"
    player.get_by_label("Mix").check()
    player.get_by_label("Position").focus()
    player.keyboard.press("1")
    player.keyboard.press("3")
    assert player.evaluate(brightest) == pytest.approx(PITCHES["Low"], abs=11)


def test_axe_finds_nothing_in_either_theme(player: Page) -> None:
    player.evaluate(AXE_SCRIPT)
    for theme, mix in itertools.product(("light", "dark"), (False, True)):
        player.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        player.get_by_label("Mix").set_checked(mix)
        found = player.evaluate("axe.run(document, {resultTypes: ['violations'], preload: false})")
        assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found["violations"]] == [], theme
        assert any(one["id"] == "color-contrast" for one in found["passes"])


def test_a_phone_shows_it_whole_and_a_tap_moves_the_playhead(browser: Browser, written: Path) -> None:
    page = new_tab(browser, viewport=PHONE, has_touch=True, is_mobile=True)
    open_page(page, written)
    for _ in range(2):
        assert page.evaluate(WIDER) == []
        for control in page.locator(".controls :is(input, button)").all():
            if control.is_visible():
                box = control.bounding_box()
                assert 0 <= box["x"] <= PHONE["width"] - box["width"]
        page.get_by_label("Mix").check()
    box = page.get_by_label("Position").bounding_box()
    page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 20)
    assert time(page) == pytest.approx(SECONDS / 2, abs=0.1)
    assert page.errors == []
    page.context.close()


def test_with_reduced_motion_the_cursor_moves_once_a_second(desk: Page, written: Path) -> None:
    desk.emulate_media(reduced_motion="reduce")
    open_page(desk, written)
    play(desk)
    places = [0.0]
    while max(places) < 2:
        desk.wait_for_timeout(50)
        places.append(time(desk))
    assert all(place.is_integer() for place in places), places


def test_without_scripts_the_players_stay(browser: Browser, written: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written.as_uri())
    assert [audio.is_visible() for audio in page.locator("audio").all()] == [True] * 3
    context.close()


def test_on_paper_the_players_stay(player: Page) -> None:
    player.emulate_media(media="print")
    assert [caption.is_visible() for caption in player.locator("figcaption").all()] == [True] * 3
    assert not player.locator(".controls").is_visible()


def test_a_signal_that_cannot_be_decoded_leaves_the_players(browser: Browser, tmp_path: Path, written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    begin = text.rindex("base64,") + 7
    path = tmp_path / "index.html"
    path.write_text(text[:begin] + "AAAA" + text[text.index('"', begin) :], encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector(".stems:not(.ready) .controls", state="hidden")
    page.wait_for_selector("audio >> nth=0")
    assert page.locator("audio").first.is_visible()
    page.close()


def test_signals_of_different_lengths_and_a_single_one_keep_their_players() -> None:
    one, two = torch.zeros(2, 4410), torch.zeros(2, 8820)
    assert 'class="stems"' in plotting.audio({"a": one, "b": one}).data
    for signals in ({"a": one}, {"a": one, "b": two}):
        written = plotting.audio(signals).data
        assert 'class="stems"' not in written
        assert written.count("<audio") == len(signals)
