"""`bsmamba2 evaluate`: a folder, the bundled songs, bad tracks and wrong arguments."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_tracks import musdb
from tiny_model import TINY

from bsmamba2 import BSMamba2, ModelConfig, save_checkpoint
from bsmamba2.bands import generate_bands
from bsmamba2.checkpoints.published_layout import sha256_file
from bsmamba2.cli import main as command_line


def main(arguments: list[str]) -> int:
    """Without kernels: the tiny model is too narrow for them, and `auto` logs that."""
    return command_line.main([*arguments, "--backend", "plain"])


@pytest.fixture
def checkpoint(tiny: BSMamba2, tmp_path: Path) -> Path:
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_command_on_a_folder(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, output = musdb(tmp_path / "musdb"), tmp_path / "out"
    arguments = ["evaluate", str(root), "--checkpoint", str(checkpoint), "-o", str(output), "--segments", "0.5,1"]
    assert main(arguments) == 0
    said = capfd.readouterr()
    assert said.err == ""
    content = json.loads((output / "evaluation.json").read_text())
    assert [(one["track"], one["segment"]) for one in content["rows"]] == [
        (name, segment) for segment in (8.0, 0.5, 1.0) for name in ("A - One", "B – Zwei")
    ]
    assert content["checkpoint"]["sha256"] == sha256_file(checkpoint)
    assert {path.name for path in output.iterdir()} == {
        "rows", "evaluation.json", "rows.csv", "by_segment.png", "by_occupancy.png",
    }  # fmt: skip
    assert "not comparable: tracks: MUSDB18-HQ test there, 2 tracks in test here" in said.out
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*.json") if path.parent != output}
    assert len(stamps) == 6
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (output / "evaluation.json").read_text() == json.dumps(content, indent=1) + "\n"


def test_command_names_a_bad_track_once_and_does_the_others(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = musdb(tmp_path / "musdb")
    (root / "test" / "A - One" / "vocals.wav").write_text("no sound")
    arguments = ["evaluate", str(root), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--segments", "1"]
    assert main(arguments) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "vocals.wav: cannot be read as audio" in line
    assert [one["track"] for one in json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]] == [
        "B – Zwei"
    ] * 2


def test_command_on_a_model_of_several_stems(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_checkpoint(BSMamba2(replace(TINY, stems=("drums", "vocals"))), tmp_path / "model.safetensors")
    root, output = musdb(tmp_path / "musdb"), tmp_path / "out"
    arguments = ["evaluate", str(root), "--checkpoint", str(tmp_path / "model.safetensors"), "-o", str(output)]
    assert main([*arguments, "--segments", ""]) == 0
    said = capfd.readouterr()
    assert said.err == ""
    content = json.loads((output / "evaluation.json").read_text())
    assert [(one["track"], one["stem"]) for one in content["rows"]] == [
        (name, stem) for name in ("A - One", "B – Zwei") for stem in ("drums", "vocals")
    ]
    assert list(content["averages"]) == ["drums, 8 s", "vocals, 8 s"]
    assert {path.name for path in output.iterdir()} == {
        "rows", "evaluation.json", "rows.csv", "by_segment-drums.png", "by_segment-vocals.png",
        "by_occupancy-drums.png", "by_occupancy-vocals.png",
    }  # fmt: skip
    assert "drums, 8 s" in said.out


def test_command_reports_a_damaged_row_in_one_line(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, output = musdb(tmp_path / "musdb"), tmp_path / "out"
    arguments = ["evaluate", str(root), "--checkpoint", str(checkpoint), "-o", str(output), "--segments", ""]
    assert main(arguments) == 0
    path = sorted(output.rglob("rows/*/*.json"))[0]
    path.write_text('{"identity": ' + "[" * 100_000)
    capfd.readouterr()
    assert main(arguments) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"{path}: is damaged (")
    assert len(json.loads((output / "evaluation.json").read_text())["rows"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="names are text there, and a home is not $HOME")
def test_command_on_names_in_another_encoding_at_home(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = musdb(tmp_path / "musdb", names=("one",))
    (root / "test" / "one").rename(root / "test" / os.fsdecode(b"caf\xe9"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(root / "test")
    arguments = ["evaluate", ".", "--checkpoint", str(checkpoint), "-o", "~/out", "--segments", ""]
    assert main(arguments) == 0
    assert capfd.readouterr().err == ""
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["tracks"] == {"name": "1 tracks in test", "names": [r"caf\udce9"]}
    assert r"caf\udce9" in (tmp_path / "out" / "rows.csv").read_text(encoding="utf-8")
    (next((root / "test").iterdir()) / "vocals.wav").write_text("no sound")
    assert main(arguments) == 1
    assert r"caf\udce9" in capfd.readouterr().err


def test_command_without_standard_error(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that is started with it closed: the next file that is opened gets its number."""
    root, output = musdb(tmp_path / "musdb"), tmp_path / "out"
    kept = os.dup(2)
    monkeypatch.setattr(sys, "stderr", None)
    os.close(2)
    try:
        code = main(["evaluate", str(root), "--checkpoint", str(checkpoint), "-o", str(output), "--segments", ""])
    finally:
        if sys.stderr is not None:
            sys.stderr.close()
        os.dup2(kept, 2)
        os.close(kept)
    assert code == 0
    assert (output / "rows.csv").exists()


def test_command_on_the_bundled_songs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset("small", dim=16, depth=1, freqs_per_bands=generate_bands(8), d_state=8, headdim=8)
    save_checkpoint(BSMamba2(config), tmp_path / "model.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--songs", "1", "--seconds", "1", "--segments", ""]) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["tracks"]["name"] == "2 bundled songs"
    assert [row["segment"] for row in content["rows"]] == [8, 8]
    assert content["rows"][1]["track"] == "falcon-69"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is not a folder"),
        (["--songs", "0"], "--songs 0"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: does not exist"),
    ],
)
def test_command_with_wrong_arguments(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
