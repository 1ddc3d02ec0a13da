"""Audio files for tests, whole, cut and damaged, and the files in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile


def wave(path: Path, rate: int = 8000, channels: int = 2, frames: int = 900, **options: object) -> Path:
    soundfile.write(path, np.full((frames, channels), 0.25), rate, **options)  # type: ignore[arg-type]
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_samples(path: Path, *values: float) -> Path:
    frames = np.zeros((90_000, 2))  # the bad sample lies in the second piece that is read
    frames[80_000, 1] = values[0]
    soundfile.write(path, frames, 8000, subtype="FLOAT")
    return path


def poke(path: Path, offset: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    return with_bytes(path, bytes(data))


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def found_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
