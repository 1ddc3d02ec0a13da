"""Links and pictures of a built site, from its files alone: where each leads, and whether something is there."""

from __future__ import annotations

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

SITE = Path(__file__).parents[2] / "_build" / "html"
"""The built book."""


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in {"id", "name"} and value:
                self.targets.add(value)
            elif name in {"href", "src", "poster"} and value and tag != "base":
                self.addresses.append(value)


@cache
def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def pages(site: Path) -> list[str]:
    """Every page of a site, relative to it; without what lies in _static."""
    found = (path.relative_to(site) for path in sorted(site.rglob("*.html")))
    return [path.as_posix() for path in found if "_static" not in path.parts]


def addresses(path: Path) -> list[str]:
    """Every address in a page, as written."""
    return _read(path).addresses


def broken(site: Path, page: str) -> list[str]:
    """Addresses in a page that lead to no file of the site, or to no place in it, or out of it."""
    said = []
    for address in _read(site / page).addresses:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            continue
        if parts.path.startswith("/"):
            said.append(f"{address} begins at the root of the server: it breaks where the book lies in a folder")
            continue
        target = (site / page).parent / unquote(parts.path) if parts.path else site / page
        target = target / "index.html" if target.is_dir() else target
        if not target.is_file():
            said.append(f"{address}: no such file")
        elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in _read(target).targets:
            said.append(f"{address}: no such place")
    return said
