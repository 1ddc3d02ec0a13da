"""The tables behind "you are here" agree with the book: every word, lab and explorable has its page, and leads back."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

BOOK = Path(__file__).parents[2] / "book"
sys.path.insert(0, str(BOOK / "_ext"))
import pipeline  # noqa: E402

GLOSSARY = (BOOK / "glossary.md").read_text(encoding="utf-8")
WORDS = [word for words in pipeline.WORDS.values() for word in words.split("; ")]
PAGES = {path.stem for path in BOOK.iterdir() if path.suffix in {".md", ".ipynb"}}


def text(path: Path) -> str:
    return "".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


def test_every_word_of_the_glossary_has_one_page() -> None:
    assert sorted(WORDS) == sorted(re.findall(r"(?m)^(\S.*)\n  ", GLOSSARY))
    assert {*pipeline.WORDS, *pipeline.HERE, *pipeline.LABS.values(), *pipeline.EXPLORABLES.values()} <= PAGES
    assert set(pipeline.HERE) <= set(pipeline.WORDS), "every chapter has its line"


def test_every_lab_has_a_chapter_and_links_to_it() -> None:
    labs = {path.stem: text(path) for path in (BOOK / "labs").glob("*.ipynb")}
    assert pipeline.LABS.keys() == labs.keys()
    assert [name for name, chapter in pipeline.LABS.items() if f"(../{chapter}.ipynb)" not in labs[name]] == []


def test_every_explorable_has_a_chapter_that_its_page_links_to() -> None:
    explore = text(BOOK / "explore.ipynb")
    shown = re.findall(r"\b(?:explorables|listening)\.(\w+)\(", explore)
    assert sorted(pipeline.EXPLORABLES) == sorted(set(shown))
    assert {chapter for chapter in pipeline.EXPLORABLES.values() if f"({chapter}.ipynb)" not in explore} == set()


def test_the_line_of_a_page() -> None:
    anchors = {word: f"term-{word.replace(' ', '-')}" for word in WORDS}
    line = pipeline.companions("03_bands", anchors)
    assert re.findall(r'href="([^"]+)"', line) == [
        "explore.html#explore-bands",
        "explore.html#labs",
        "glossary.html#term-band",
        "glossary.html#term-band-split",
        "glossary.html#term-unit-norm",
    ]
    assert "<strong>Play" not in pipeline.companions("13_separating", anchors)


def test_an_entry_of_the_glossary_leads_to_its_page() -> None:
    linked = pipeline.with_pages(GLOSSARY)
    for page, words in pipeline.WORDS.items():
        for word in words.split("; "):
            assert re.search(rf"(?m)^{re.escape(word)}\n  .* See {{doc}}`{page}`\.$", linked), word
    assert re.sub(r" See {doc}`\w+`\.", "", linked) == GLOSSARY


@pytest.mark.parametrize("source", ["unknown\n  A word without a page.\n", "mask\n\n  A paragraph of its own.\n"])
def test_other_text_of_the_glossary_stays(source: str) -> None:
    assert pipeline.with_pages(source) == source
