"""Folders of tracks: which files belong to which stem."""

from __future__ import annotations

from pathlib import Path

import pytest

from bsmamba2.audio.musdb import list_tracks


def test_tracks_are_listed_with_their_files_by_stem(tmp_path: Path) -> None:
    for name in ("b/vocals.wav", "b/vocals.flac", "b/drums.OGG", "b/notes.txt", "a/mixture.wav", ".hidden/vocals.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "loose.wav").touch()
    first, second = list_tracks(tmp_path)
    assert (first.name, first.files) == ("a", {"mixture": (tmp_path / "a" / "mixture.wav",)})
    assert {stem: [path.name for path in paths] for stem, paths in second.files.items()} == {
        "drums": ["drums.OGG"],
        "vocals": ["vocals.flac", "vocals.wav"],
    }
    with pytest.raises(FileNotFoundError):
        list_tracks(tmp_path / "nowhere")
