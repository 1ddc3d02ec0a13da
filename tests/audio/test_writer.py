"""Audio files written: sizes beyond 32 bits, and full scale as an integer."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch

from bsmamba2.audio.files import read
from bsmamba2.audio.writer import StemWriter, write


def test_a_file_too_long_for_32_bits_is_written_with_64(tmp_path: Path) -> None:
    for frames, container in ((1 << 20, "WAV"), (1 << 29, "RF64")):  # of 8 bytes
        with StemWriter({"vocals": tmp_path / "long.wav"}, 8000, 2, frames=frames) as results:
            results.write({"vocals": torch.full((2, 100), 0.5)})
        assert soundfile.info(tmp_path / "long.wav").format == container
        assert torch.equal(read(tmp_path / "long.wav")[0], torch.full((2, 100), 0.5))


@pytest.mark.parametrize(("format", "bits"), [("wav16", 16), ("wav24", 24), ("flac", 24)])
def test_full_scale_itself_is_the_last_step_and_not_the_first(tmp_path: Path, format: str, bits: int) -> None:
    """+1 is one step beyond what an integer holds: rounded carelessly it would come back as -1."""
    step = 2.0 ** (1 - bits)
    values = torch.tensor([[1.0, 1 - step, step, 0.0, -step, -1.0]])
    assert write(tmp_path / "x", values, 8000, format) == 1
    found = torch.from_numpy(soundfile.read(tmp_path / "x", dtype="float64", always_2d=True)[0].T)
    assert found.tolist() == [[1 - step, 1 - step, step, 0, -step, -1]]
