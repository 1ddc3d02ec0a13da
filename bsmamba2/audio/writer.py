"""Write audio files block by block: whole or not at all, and never clipped without a message.

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from .files import AudioError, AudioReader, reason

_WRITE_CHUNK = 1 << 16
"""Frames written in one call: minutes of Vorbis in one call crash libsndfile."""


@dataclass(frozen=True)
class Format:
    """Output format.

    Attributes:
        suffix: of the file's name.
        container: soundfile's name of the format.
        subtype: soundfile's name of the encoding.
        bits: of a sample, 0 for a lossy encoding.
        bounded: whether samples beyond ±1 would clip.
    """

    suffix: str
    container: str
    subtype: str
    bits: int
    bounded: bool = True


FORMATS = {
    "wav": Format(".wav", "WAV", "FLOAT", 32, bounded=False),
    "wav24": Format(".wav", "WAV", "PCM_24", 24),
    "wav16": Format(".wav", "WAV", "PCM_16", 16),
    "flac": Format(".flac", "FLAC", "PCM_24", 24),
    "ogg": Format(".ogg", "OGG", "VORBIS", 0),
    "mp3": Format(".mp3", "MP3", "MPEG_LAYER_III", 0),
}


def write(path: str | os.PathLike[str], audio: Tensor, sample_rate: int, format: str = "wav") -> float:
    """Write one audio file, (c, samples); returns the gain, as `StemWriter` has it.

    Raises:
        AudioError: as `StemWriter`.
    """
    with StemWriter({"audio": Path(path)}, sample_rate, audio.shape[0], format, frames=audio.shape[1]) as stems:
        stems.write({"audio": audio})
    return stems.gain


class StemWriter:
    """Writer of audio files that belong together, of one rate, length and number of channels.

    Until the block ends without an error, they have names that begin with a dot, in the folders where they are to
    stand; then each takes its own name. After an error nothing of them is left.

    32-bit float (`wav`) holds every level. The other formats end at ±1: there the samples wait in 32-bit float until
    the highest peak of all the files is known, and when it passes 1 all are made quieter by the same `gain`, so
    that they still add up. Integer samples are rounded to the nearest, without dither: what was read from
    16 bits, and not changed, is written back as the same 16 bits.

    Args:
        paths: name → file.
        rate: in hertz.
        channels: c.
        format: a key of `FORMATS`.
        frames: samples to come in each channel, about: it decides whether a WAV file needs 64-bit sizes.

    Raises:
        AudioError: for a rate or number of channels that the format does not have, a folder that cannot be written,
            a full disk.
        ValueError: for an unknown format.
    """

    def __init__(
        self, paths: Mapping[str, Path], rate: int, channels: int, format: str = "wav", *, frames: int
    ) -> None:
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
        self.paths, self.rate, self.channels, self.frames = dict(paths), rate, channels, frames
        self.format = FORMATS[format]
        self.gain = 1.0
        self.peak = 0.0
        self._files: dict[str, _TempAudioFile] = {}
        try:  # does the encoder take this rate and these channels? before anything long begins
            with soundfile.SoundFile(
                io.BytesIO(), "w", rate, channels, self.format.subtype, format=self.format.container
            ) as trial:
                trial.write(np.zeros((1, channels), dtype="float32"))
        except (soundfile.LibsndfileError, ValueError, AssertionError) as error:
            raise AudioError(
                f"{next(iter(self.paths.values()))}: {rate:,} Hz with {channels} channels cannot be written "
                f"as {self.format.container} {self.format.subtype}; choose --format wav"
            ) from error

    def __enter__(self) -> StemWriter:
        try:
            for name in self.paths:
                self._files[name] = self._new_file(name, FORMATS["wav"])
        except BaseException:
            self._discard()
            raise
        return self

    def _new_file(self, name: str, format: Format) -> _TempAudioFile:
        return _TempAudioFile(self.paths[name], self.rate, self.channels, format, self.frames)

    def write(self, audio: Mapping[str, Tensor]) -> None:
        """Write the next samples of each file: name → (c, samples).

        Raises:
            AudioError: when they cannot be written.
        """
        for name, file in self._files.items():
            if audio[name].numel():
                self.peak = max(self.peak, float(audio[name].abs().max()))
                file.write(audio[name].T.contiguous().numpy())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        for file in self._files.values():
            file.close()
        if self.format.bounded:
            top = 1 - 2.0 ** (1 - self.format.bits) if self.format.bits else 1.0
            self.gain = top / self.peak if self.peak > 1 else 1.0
            for name, float_file in list(self._files.items()):
                encoded = self._files[name] = self._new_file(name, self.format)
                try:
                    with AudioReader(float_file.temp_path) as samples:
                        for block in samples.blocks():
                            encoded.write(_quantise(block.T.numpy() * np.float32(self.gain), self.format.bits))
                    encoded.close()
                finally:
                    float_file.discard()
        for file in self._files.values():
            file.commit()

    def _discard(self) -> None:
        for file in self._files.values():
            file.discard()


def _quantise(frames: np.ndarray, bits: int) -> np.ndarray:
    """±1 float32 → integers of so many bits, in the upper bits of what soundfile takes; 0 bits: as they are."""
    if not bits:
        return np.ascontiguousarray(frames)
    scale = 2 ** (bits - 1)
    rounded = np.clip(np.rint(frames.astype("float64") * scale), -scale, scale - 1)
    return rounded.astype("int16") if bits == 16 else rounded.astype("int32") << (32 - bits)


@dataclass
class _TempAudioFile:
    """Audio file under a temporary name in its folder; `commit` gives it its own."""

    path: Path
    rate: int
    channels: int
    format: Format
    frames: int
    temp_path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.temp_path = self.path.with_name(f".bsmamba2-{secrets.token_hex(8)}.part")
        # Sizes in a WAV file have 32 bits; RF64 is the same file with 64-bit sizes, and keeps the suffix.
        size = self.frames * self.channels * max(self.format.bits, 8) // 8
        container = "RF64" if self.format.container == "WAV" and size > 0xFFFF0000 else self.format.container
        try:
            self._raw = _ErrorCapturingFile(self.temp_path)
        except OSError as error:
            raise self._error(error) from error
        try:
            self._file = soundfile.SoundFile(
                self._raw, "w", self.rate, self.channels, self.format.subtype, format=container
            )
        except soundfile.LibsndfileError as error:
            self._raw.close()
            self.temp_path.unlink(missing_ok=True)
            raise self._error(self._raw.error or error) from error

    def write(self, frames: np.ndarray) -> None:
        """Write (samples, c)."""
        for start in range(0, len(frames), _WRITE_CHUNK):
            self._call(self._file.write, frames[start : start + _WRITE_CHUNK])

    def close(self) -> None:
        """Finish the file and flush it to the disk."""
        self._call(self._file.close)
        try:
            os.fsync(self._raw.fileno())
            self._raw.close()
        except OSError as error:
            raise self._error(error) from error

    def commit(self) -> None:
        """Rename the file to its own name."""
        try:
            self.temp_path.replace(self.path)
        except OSError as error:
            raise self._error(error) from error

    def discard(self) -> None:
        """Close and delete the file, unless it was committed."""
        with contextlib.suppress(soundfile.LibsndfileError, AssertionError):  # of a file that is thrown away
            self._file.close()
        self._raw.close()
        self.temp_path.unlink(missing_ok=True)

    def _call(self, function: Any, *arguments: object) -> None:
        try:
            function(*arguments)
        except (soundfile.LibsndfileError, AssertionError) as error:  # soundfile asserts that all was written
            raise self._error(self._raw.error or error) from error
        if self._raw.error is not None:
            raise self._error(self._raw.error)

    def _error(self, error: Exception) -> AudioError:
        fix = "give another folder with -o, or make room"
        return AudioError(f"{self.path}: cannot be written ({reason(error)}); {fix}")


class _ErrorCapturingFile(io.FileIO):
    """File for libsndfile to write: its callbacks may not raise, so the first error is kept here."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "xb+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view, written = memoryview(data), 0
        try:
            while written < len(view):
                written += self._store(view[written:])
        except OSError as error:
            self.error = self.error or error
        return written

    def _store(self, data: memoryview) -> int:
        return super().write(data)
