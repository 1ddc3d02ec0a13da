"""The labs in a JupyterLab that runs: each starts with Run All, and moving its slider changes what it shows."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

ROOT = Path(__file__).parents[2]
LABS = sorted((ROOT / "book" / "labs").glob("*.ipynb"))
RUN = ROOT / "book" / "results" / "first_run"
# The label of the slider that is moved.
MOVED = {
    "bands": "Number of bands",
    "chunk": "Frames in a chunk",
    "decay": "A",
    "occupancy": "Percent of the time sung",
}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, tab: Page) -> Iterator[str]:
    """The address of a JupyterLab with the labs, its token in it; in a folder of its own, which it may write to."""
    if not RUN.is_dir():
        pytest.skip("there is no training run for the labs to play: make train")
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "book" / "labs", home / "book" / "labs", ignore=shutil.ignore_patterns(".*"))
    (home / "book" / "results").mkdir()
    (home / "book" / "results" / "first_run").symlink_to(RUN)
    news = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    environment = {**os.environ, **{name: str(home / folder) for name, folder in folders.items()}}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--ServerApp.allow_root=True", f"--ServerApp.root_dir={home / 'book'}"),
        *(f"--IdentityProvider.token={token}", "--LabApp.extension_manager=readonly", "--LabApp.news_url=None"),
    ]
    log = home / "log.txt"
    with log.open("wb") as file:
        server = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=home)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{address}/api?token={token}", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert server.poll() is None, log.read_text()
                    time.sleep(0.25)
            else:
                pytest.fail(f"JupyterLab did not start within a minute: {log.read_text()}")
            tab.on("dialog", lambda dialog: dialog.accept())  # leave a changed notebook
            yield f"{address}|{token}"
        finally:
            server.terminate()
            server.wait(20)


def run_all(page: Page, lab: str, name: str) -> Any:
    """Open a lab and run it from the menu; the output area of its last cell that has one."""
    address, token = lab.split("|")
    expect.set_options(timeout=30_000)
    page.goto(f"{address}/lab/tree/labs/{name}.ipynb?token={token}&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("| Idle").wait_for()  # in the status bar; before it, Run All is lost
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    shown = page.locator(".jp-Notebook .jp-OutputArea-output .widget-vbox").first
    shown.wait_for()
    return shown


def assert_no_error(page: Page) -> None:
    assert page.locator(".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts() == []


def slider(shown: Any, label: str) -> Any:
    """The handle of a slider, by the words beside it."""
    box = shown.locator(".widget-slider", has=shown.page.get_by_text(label, exact=True))
    return box.get_by_role("slider").first


@pytest.fixture(autouse=True)
def ended(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each kernel ends with its test: five models at once are more than a small machine holds."""
    yield
    if "lab" in request.fixturenames:
        address, token = request.getfixturevalue("lab").split("|")
        with urllib.request.urlopen(f"{address}/api/sessions?token={token}", timeout=20) as reply:
            sessions = json.load(reply)
        for session in sessions:
            url = f"{address}/api/sessions/{session['id']}?token={token}"
            urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=20).close()


def test_every_lab_is_tried() -> None:
    assert [path.stem for path in LABS] == sorted([*MOVED, "ablation"])


@pytest.mark.parametrize("path", LABS, ids=lambda path: path.stem)
def test_controls_and_result_are_in_one_view(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["metadata"].get("jupyter", {}).get("source_hidden") for cell in code)
    assert ["**Try:**" in "".join(cells[0]["source"]), "**Notice:**" in "".join(cells[0]["source"])] == [True, True]
    assert "".join(cells[-1]["source"]).startswith("You should have noticed:")


@pytest.mark.parametrize("name", MOVED)
def test_lab_runs_and_follows_its_slider(lab: str, reader: Page, name: str) -> None:
    shown = run_all(reader, lab, name)
    labels = shown.locator(".widget-slider .widget-label").all_inner_texts()
    assert len(labels) == shown.locator(".widget-slider").count()
    assert all(label.strip() for label in labels)

    output = shown.locator(".widget-output")
    expect(output).to_have_text(re.compile(r"\S"))
    reader.wait_for_timeout(200)
    expect(reader.get_by_text("| Idle")).to_be_visible()
    before = output.inner_text()
    assert before.strip()
    handle = slider(shown, MOVED[name])
    handle.focus()
    reader.keyboard.press("ArrowLeft")
    expect(output).not_to_have_text(before, use_inner_text=True)
    expect(reader.get_by_text("| Idle")).to_be_visible()
    expect(output).to_have_text(re.compile(r"\S"))
    assert "Error" not in output.inner_text()
    assert_no_error(reader)


def test_ablation_trains_what_was_chosen(lab: str, reader: Page) -> None:
    shown = run_all(reader, lab, "ablation")
    steps = slider(shown, "Steps")
    steps.focus()
    reader.keyboard.press("Home")
    rows = shown.locator("table tbody tr")
    for count, layer in enumerate(("Mamba-2", "LSTM"), start=1):
        shown.get_by_label("Sequence layer").select_option(layer)
        shown.get_by_role("button", name="Train").click()
        if count == 1:
            expect(shown.get_by_role("status")).to_have_text("computing …")
            expect(shown.locator(".widget-hprogress")).to_be_visible()
        expect(rows).to_have_count(count, timeout=180_000)  # some seconds, but for what else the machine does
        expect(rows.first).to_contain_text(layer)
        expect(shown.get_by_role("button", name="Train", exact=True)).to_be_enabled()
    scores = [row.locator("td").last.inner_text() for row in rows.all()]
    assert scores[0] != scores[1]
    expect(shown.locator(".stale")).to_have_count(0)
    expect(shown.locator("audio")).to_have_count(3)
    expect(reader.locator(".jp-CodeCell .jp-InputArea-editor:visible")).to_have_count(0)
    trained = reader.locator(
        ".jp-Notebook .jp-OutputArea-output .widget-vbox", has=reader.get_by_text("Change", exact=True)
    )
    trained.get_by_label("Change").select_option("Δ = 0 in silence")
    expect(trained.locator("table tbody tr")).to_have_count(2, timeout=180_000)
    expect(trained.locator("table tbody tr").first).to_contain_text("Δ = 0 in silence")
    assert_no_error(reader)
