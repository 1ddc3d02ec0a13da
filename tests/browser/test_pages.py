"""Every page of the built book, as readers meet it; and a page with every fault, to see that each is seen."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from links import SITE, addresses, broken, pages
from playwright.sync_api import Page
from sight import look

# What the theme does and we cannot mend from outside: page → (rule of axe-core, selector) → why.
THEME = {
    "book/bibliography.html": {
        ("aria-required-children", ".citation-list"): "Sphinx's role=list has children with role=doc-biblioentry",
    }
}
# Lines on the console that are no fault of a page: pattern → why.
CONSOLE: dict[str, str] = {}


# The first page only leads to another.
PAGES = [page for page in pages(SITE) if page != "index.html"]


def written_players(path: Path) -> int:
    """Audio players that a page has before any script runs."""
    return path.read_text(encoding="utf-8").count("<audio")


def test_there_are_pages_to_look_at(site: Path) -> None:
    assert len(PAGES) > 15
    assert sum(written_players(site / name) for name in PAGES) > 30


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_as_readers_want_it(book: str, site: Path, reader: Page, name: str) -> None:
    sight = look(reader, f"{book}/{name}")
    assert [line for line in sight.console if not any(re.search(known, line) for known in CONSOLE)] == []
    assert sight.elsewhere == [], "asked for elsewhere"
    assert sight.missing == [], "asked for, and not there"
    assert sight.pictures == [], "did not load"
    assert len(sight.players) >= written_players(site / name)
    assert [player for player in sight.players if not player[0] or not player[1] > 0] == []
    assert sight.wider == [], "wider than a phone"
    assert sight.scrolls == [], "cut off, or to be scrolled sideways"
    assert sight.figures == [], "hard to read"
    excused = set(THEME.get(name, ()))
    assert [found for found in sight.violations if found not in excused] == []
    assert excused <= set(sight.violations), "the theme has been mended: shorten the list"


def test_no_link_or_picture_leads_nowhere(site: Path) -> None:
    assert {page: said for page in pages(site) if (said := broken(site, page))} == {}


def test_launch_buttons_lead_to_the_repository_or_are_not_there(site: Path) -> None:
    config = yaml.safe_load((site.parents[1] / "_config.yml").read_text(encoding="utf-8"))
    url = config.get("repository", {}).get("url", "")
    where = url.removeprefix("https://github.com/") or "nowhere"
    links = [
        (page, address)
        for page in pages(site)
        for address in addresses(site / page)
        if re.search(r"mybinder\.org|colab\.research", address)
    ]
    assert [link for link in links if where not in link[1]] == []


def test_pictures_have_numbers_and_links_to_them_say_which(site: Path) -> None:
    numbered = []
    for page in (site / "book").glob("[0-9]*.html"):
        text = page.read_text(encoding="utf-8")
        captions = dict(re.findall(r'<figure[^>]*id="(fig-[\w-]+)".*?caption-number">Figure ([\d.]+)', text, re.DOTALL))
        links = re.findall(r'href="#(fig-[\w-]+)"[^>]*>(?:<[^>]*>)*(Figure[^<]*)<', text)
        assert links == [(name, f"Figure {captions.get(name)}") for name, _ in links], page.name
        numbered += captions.values()
    assert len(numbered) == len(set(numbered)) > 50


def test_the_first_page_leads_to_the_book(book: str, reader: Page) -> None:
    reader.goto(f"{book}/index.html")
    reader.wait_for_url("**/book/index.html")


def test_search_finds_band_split(book: str, reader: Page) -> None:
    reader.goto(f"{book}/search.html?q=band+split")
    reader.wait_for_selector("#search-results li a")
    # Results come one after the other.
    reader.wait_for_function("/[1-9]\\d* page|found/.test(document.querySelector('#search-results').innerText)")
    addresses = reader.eval_on_selector_all("#search-results li a", "links => links.map(link => link.pathname)")
    assert any(address.endswith("03_bands.html") for address in addresses), addresses


def test_search_finds_no_nonsense(book: str, reader: Page) -> None:
    reader.goto(f"{book}/search.html?q=zyxwvut")
    reader.get_by_text("did not match any documents").wait_for()


def test_notebooks_can_be_downloaded(book: str, reader: Page) -> None:
    reader.goto(f"{book}/book/03_bands.html")
    with reader.expect_download() as download:
        reader.eval_on_selector("a.btn-download-source-button", "link => link.click()")
    text = Path(download.value.path()).read_text(encoding="utf-8")
    assert '"nbformat"' in text


# --- planted faults ---------------------------------------------------------------------------------------

FAULTY = """<!DOCTYPE html><html lang="en"><head><title>Faults</title></head><body>
<main><h1 id="here">Faults</h1>
<p style="color:#ccc;background:#fff">Too faint to read.</p>
<img src="absent.png" alt="not there">
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==">
<audio controls aria-label="no sound" src="data:audio/wav;base64,UklGRg=="></audio>
<audio controls aria-label="a second" src="second.wav"></audio>
<div style="width:900px">Wide</div>
<pre style="width:300px;overflow:auto">A line that needs sideways scrolling, because it is too long.</pre>
<a href="#here">good</a><a href="#nowhere">bad</a><a href="absent.html">bad</a><a href="/root.html">bad</a>
<a href="other.html#place">good</a><a href="other.html#none">bad</a><a href="https://example.org/">away</a>
<script src="https://cdn.example.org/x.js"></script><script>throw new Error("planted")</script></main></body></html>"""


@pytest.fixture(scope="session")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "index.html").write_text(FAULTY, encoding="utf-8")
    (folder / "other.html").write_text('<p id="place">Here</p>', encoding="utf-8")
    sound = bytes(16_000)
    head = (
        b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16_000, 2, 16) + b"data" + struct.pack("<I", len(sound))
    )
    (folder / "second.wav").write_bytes(b"RIFF" + struct.pack("<I", len(head) + len(sound)) + head + sound)
    return folder


def test_planted_faults_are_seen(faulty: Path, serve: Any, reader: Page) -> None:
    sight = look(reader, f"{serve(faulty)}/index.html")
    assert any("planted" in line for line in sight.console)
    assert sight.elsewhere == ["https://cdn.example.org/x.js"]
    assert [address.rpartition("/")[2] for address in sight.missing if "favicon" not in address] == ["absent.png"]
    assert [address.rpartition("/")[2] for address in sight.pictures] == ["absent.png"]
    assert sight.players == [("no sound", -1), ("a second", 1)]
    assert sight.wider[-1] == "908 pixels"
    assert [line.partition(" +")[0] for line in sight.scrolls] == ["1280: PRE", "390: PRE"]
    assert {rule for rule, _ in sight.violations} >= {"color-contrast"}
    assert "color-contrast (dark)" in {rule for rule, _ in sight.violations}
    assert "image-alt" in {rule for rule, _ in sight.violations}


def test_planted_links_are_told(faulty: Path) -> None:
    said = broken(faulty, "index.html")
    assert [line.partition(":")[0].partition(" ")[0] for line in said] == [
        "absent.png",
        "#nowhere",
        "absent.html",
        "/root.html",
        "other.html#none",
    ]
