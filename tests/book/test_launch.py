"""Buttons for Colab and Binder: none without an address, and one address everywhere."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HERE, THERE = "https://github.com/someone/bsmamba2", "https://github.com/other/fork"


@pytest.fixture
def launch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch", ROOT / "book" / "launch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The configuration and two chapters."""
    (tmp_path / "book").mkdir()
    for name in ("_config.yml", "book/02_spectrogram.ipynb", "book/05_scan.ipynb"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def first(root: Path) -> dict:
    return json.loads((root / "book" / "05_scan.ipynb").read_text())["cells"][0]


def test_chapters_and_configuration_agree(launch: ModuleType) -> None:
    assert launch.disagreements(ROOT) == []


def test_no_button_without_an_address() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert ("repository" in config) == ("colab_url" in config["launch_buttons"])
    assert ("repository" in config) == ("binderhub_url" in config["launch_buttons"])


def test_an_address_makes_buttons_and_cells_and_another_takes_its_place(launch: ModuleType, copy: Path) -> None:
    for address, branch in ((HERE, "main"), (THERE, "dev")):
        launch.set_address(copy, address, branch)
        config = yaml.safe_load((copy / "_config.yml").read_text())
        assert config["repository"] == {"url": address, "branch": branch}
        assert config["launch_buttons"]["colab_url"] == "https://colab.research.google.com"
        assert config["title"] == yaml.safe_load((ROOT / "_config.yml").read_text())["title"]
        assert address in "".join(first(copy)["source"])
        assert launch.disagreements(copy) == []
    assert HERE not in (copy / "_config.yml").read_text() + (copy / "book" / "05_scan.ipynb").read_text()
    text = (copy / "_config.yml").read_text()
    (copy / "_config.yml").write_text(text.replace(THERE, HERE))
    assert len(launch.disagreements(copy)) == 2


@pytest.mark.parametrize("address", ["", "github.com/a/b", "https://example.org/a/b", 'https://github.com/a/b"; evil'])
def test_another_address_is_refused_and_nothing_is_written(launch: ModuleType, copy: Path, address: str) -> None:
    before = (copy / "_config.yml").read_text()
    with pytest.raises(ValueError, match="OWNER/NAME"):
        launch.set_address(copy, address, "main")
    assert (copy / "_config.yml").read_text() == before


def test_the_cell_fetches_in_colab_and_does_nothing_elsewhere(
    launch: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch.set_address(copy, HERE, "main")
    source = compile("".join(first(copy)["source"]), "cell", "exec")
    ran, places = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(os, "chdir", places.append)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(source, {})
    assert ran == places == []
    monkeypatch.setitem(sys.modules, "google.colab", ModuleType("google.colab"))
    exec(source, {})
    assert [command[0] for command in ran] == ["git", sys.executable]
    assert HERE in ran[0]
    assert "/content/bsmamba2" in ran[1]
    assert places == [Path("/content/bsmamba2/book")]


@pytest.mark.slow
def test_the_cell_is_in_the_committed_style(launch: ModuleType, copy: Path) -> None:
    for name in ("pyproject.toml", "book/ruff.toml"):
        shutil.copy(ROOT / name, copy / name)
    launch.set_address(copy, HERE, "main")
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "book"], cwd=copy, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout
