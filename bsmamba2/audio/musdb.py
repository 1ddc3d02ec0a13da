"""Folders in MUSDB18-HQ's layout: one folder per track, one file per stem.

    musdb18hq/{train,valid,test}/<track>/{mixture,vocals,drums,bass,other}.wav

Training (`bsmamba2.training.datasets`) and evaluation (`bsmamba2.evaluation`) both list their tracks with this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg")
"""Suffixes of formats that `soundfile` reads from any position without decoding the audio before it."""


@dataclass(frozen=True)
class TrackFolder:
    """One track: its folder, and the audio files in it by stem name.

    Attributes:
        path: the folder; its name is the track's name.
        files: file name without suffix → files, sorted; more than one if a stem exists in several formats.
    """

    path: Path
    files: dict[str, tuple[Path, ...]]

    @property
    def name(self) -> str:
        """The track's name."""
        return self.path.name

    @classmethod
    def of(cls, path: Path) -> TrackFolder:
        """List the audio files in a folder without opening them."""
        files: dict[str, tuple[Path, ...]] = {}
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in AUDIO_SUFFIXES:
                files[file.stem] = (*files.get(file.stem, ()), file)
        return cls(path, files)


def list_tracks(folder: Path) -> list[TrackFolder]:
    """List the tracks of a folder, sorted by name: every folder in it whose name does not begin with a dot.

    Raises:
        NotADirectoryError, FileNotFoundError: when `folder` is not a folder.
    """
    inside = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [TrackFolder.of(path) for path in inside]
