"""WAV files of blocks whose last one is filled up, and chunks that are not padded."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode_tone, with_bytes

from bsmamba2.audio.files import AudioError, read

LIST = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"recorder 1.0.0"


@pytest.mark.parametrize("subtype", ["MS_ADPCM", "GSM610", "IMA_ADPCM"])
@pytest.mark.parametrize("samples", [5001, 8009, 12_345])
def test_a_last_block_that_is_filled_up_ends_where_the_file_says(tmp_path: Path, subtype: str, samples: int) -> None:
    tone = np.sin(np.arange(samples) / 20) * 0.5
    path = tmp_path / "a.wav"
    soundfile.write(path, tone, 8000, subtype=subtype)
    content = path.read_bytes()
    at = content.index(b"fact") + 8
    found = read(with_bytes(path, content[:at] + struct.pack("<I", samples) + content[at + 4 :]))[0]
    assert found.shape == (1, samples)
    assert np.abs(found[0].numpy() - tone).mean() < 0.05
    whole = read(with_bytes(path, content[:at] + struct.pack("<I", 0) + content[at + 4 :]))[0]
    assert whole.shape[1] > samples
    assert torch.equal(whole[:, :samples], found)
    for wrong in (1, samples - 2000, 1 << 31):  # further off than a block
        assert read(with_bytes(path, content[:at] + struct.pack("<I", wrong) + content[at + 4 :]))[0].equal(whole)


def test_a_count_of_samples_changes_nothing_in_pcm(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    encode_tone(path, "pcm_s16le", 44_100)
    content = path.read_bytes()
    at = content.index(b"data")
    expected = read(path)[0]
    counted = content[:at] + b"fact" + struct.pack("<II", 4, 99_000) + content[at:]
    assert read(with_bytes(path, counted))[0].equal(expected)


def test_an_odd_chunk_without_its_padding(tmp_path: Path) -> None:
    sound = np.random.default_rng(0).integers(256, size=5001, dtype="uint8")
    head = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8) + b"data" + struct.pack("<I", 5001)
    expected = torch.from_numpy((sound.astype("float32") - 128) / 128)[None]

    def song(end: bytes) -> bytes:
        content = head + sound.tobytes() + end
        return b"RIFF" + struct.pack("<I", len(content)) + content

    path = tmp_path / "a.wav"
    for end in (b"", b"\0", LIST, b"\0" + LIST, LIST + b"id3 \2\0\0\0xx"):
        assert torch.equal(read(with_bytes(path, song(end)))[0], expected)
        assert torch.equal(read(with_bytes(path, song(end) + song(end)))[0], expected.repeat(1, 2))
    with pytest.raises(AudioError, match="bytes after the sound"):
        read(with_bytes(path, song(b"\1\2\3" * 100)))


def test_a_count_of_samples_that_was_divided_by_the_channels(tmp_path: Path) -> None:
    """libsndfile writes such a count for IMA ADPCM of two channels."""
    tone = np.sin(np.arange(5001) / 20)[:, None] * [0.5, 0.3]
    soundfile.write(tmp_path / "a.wav", tone, 44_100, subtype="IMA_ADPCM")
    found = read(tmp_path / "a.wav")[0]
    assert found.shape[1] >= 5001
    assert np.abs(found[:, :5001].numpy().T - tone).mean() < 0.05
