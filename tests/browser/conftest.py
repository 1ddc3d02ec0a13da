"""A browser for the built book: the system's Chromium, driven by Playwright, and a server on this machine alone.

Run by `make browser`, after `make book`. Without a book, or without Chromium, these tests are skipped and say so.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from links import SITE
from playwright.sync_api import Browser, Page, sync_playwright
from sight import DESK

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# Nothing but this machine has a name: whatever a page asks for elsewhere fails, and is told.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line on the terminal for each."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="session")
def serve() -> Iterator[Any]:
    """A function that serves a folder and gives its address."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built book."""
    if not (SITE / "index.html").is_file():
        pytest.skip("the book is not built: make book")
    return SITE


@pytest.fixture(scope="session")
def book(site: Path, serve: Any) -> str:
    """The address of the built book."""
    return serve(site)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine ({', '.join(NAMES)}); on Debian: apt install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def tab(browser: Browser) -> Iterator[Page]:
    """The tab that pages are opened in, one after the other: opening a new one costs as much as the page itself."""
    context = browser.new_context(color_scheme="light", reduced_motion="reduce")
    context.set_default_timeout(30_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def reader(tab: Page) -> Page:
    """The tab at a desk, in the light, without motion."""
    tab.set_viewport_size(DESK)
    return tab
