"""Write audio files block by block: complete or not at all, and scaled down if their format would clip them.

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from ..atomic_write import fsync
from .decoders import SPEAKERS, VORBIS_SPEAKERS, reason
from .files import AudioError, AudioReader

try:
    import fcntl
except ImportError:  # Windows, which cannot delete an open file
    fcntl = None  # type: ignore[assignment]

_WRITE_CHUNK = 1 << 16
"""Maximum frames per write call, because minutes of Vorbis in one call crash libsndfile."""

_EXISTS = "{}: exists; give another folder with -o, or --overwrite"


@dataclass(frozen=True)
class Format:
    """Output format: suffix, soundfile's container and encoding, bits per sample (0: lossy), channel limit."""

    suffix: str
    container: str
    subtype: str
    bits: int
    channels: int


FORMATS = {
    "wav": Format(".wav", "WAV", "FLOAT", 32, 1024),
    "wav24": Format(".wav", "WAV", "PCM_24", 24, 1024),
    "wav16": Format(".wav", "WAV", "PCM_16", 16, 1024),
    "flac": Format(".flac", "FLAC", "PCM_24", 24, 8),
    "ogg": Format(".ogg", "OGG", "VORBIS", 0, 255),
    "mp3": Format(".mp3", "MP3", "MPEG_LAYER_III", 0, 2),
}


class StemWriter:
    """Writer for a set of audio files of equal rate, length and number of channels: either all appear, or none.

    The files have hidden names in their folders until the `with` block ends without an error, and then get their final
    names. After an error, all of them are removed. The next writer to the folder removes the files of a killed process.

    32-bit float (`wav`) stores every level. The other formats are limited to ±1, so their samples are stored as 32-bit
    float until the highest peak of all the files is known. If it exceeds 1, all are scaled by the same `gain`, so that
    they still add up. Integer samples are rounded to nearest, without dither, so unchanged 16-bit samples are written
    back as the same 16 bits.

    Args:
        paths: name → file; missing folders are created.
        rate: in hertz.
        channels: c.
        format: a key of `FORMATS`.
        frames: approximate number of samples per channel; it decides whether a WAV file needs 64-bit sizes.
        layout: speakers of the channels, as in `AudioReader.layout`; it sets the channel mask of a WAV file.
        overwrite: whether existing files may be replaced.

    Raises:
        AudioError: for a rate, number of channels or layout that the format does not support, a folder that cannot be
            written, a file that exists, or a full disk.
        ValueError: for an unknown format.
    """

    def __init__(
        self, paths: Mapping[str, Path], rate: int, channels: int, format: str = "wav", *, frames: int,
        layout: Sequence[str] = (), overwrite: bool = True,
    ) -> None:  # fmt: skip
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
        self.paths, self.rate, self.channels, self.frames = dict(paths), rate, channels, frames
        self.format, self.overwrite = FORMATS[format], overwrite
        self.gain = 1.0
        self.peak = 0.0
        self._files: dict[str, _TempAudioFile] = {}
        self._token = secrets.token_hex(8)
        fault = f"cannot be written as {format.upper()}; choose --format wav"
        subject = f"{next(iter(self.paths.values()))}: {channels} channels"
        self._order = _channel_order(self.format, channels, layout)
        if channels > self.format.channels:
            raise AudioError(f"{subject}, more than {self.format.channels}, {fault}")
        if self._order is None:
            raise AudioError(f"{subject} for {' '.join(layout)} {fault}")
        mask = sum(1 << SPEAKERS.index(name) for name in layout)
        self._mask = 0 if mask in (0b11, 0b100) else mask  # stereo and mono need no mask
        try:  # an early error if the encoder does not support this rate
            with soundfile.SoundFile(
                io.BytesIO(), "w", rate, channels, self.format.subtype, format=self.format.container
            ) as trial:
                trial.write(np.zeros((1, channels), dtype="float32"))
        except (soundfile.LibsndfileError, ValueError, AssertionError) as error:
            raise AudioError(f"{subject} of {rate:,} Hz {fault}") from error

    def __enter__(self) -> StemWriter:
        try:
            _prepare(self.paths.values(), self.overwrite)
            for name, path in self.paths.items():
                self._files[name] = self._new_file(path, FORMATS["wav"])
        except BaseException:
            self._discard()
            raise
        return self

    def _new_file(self, path: Path, format: Format) -> _TempAudioFile:
        return _TempAudioFile(path, self._token, self.rate, self.channels, format, self.frames, self._mask)

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
        if self.format.bits != 32:
            top = 1 - 2.0 ** (1 - self.format.bits) if self.format.bits else 1.0
            self.gain = top / self.peak if self.peak > 1 else 1.0
            for name, float_file in list(self._files.items()):
                encoded = self._files[name] = self._new_file(float_file.path, self.format)
                try:
                    with AudioReader(float_file.temp_path) as samples:
                        for block in samples.blocks():
                            frames = block.T.numpy()[:, self._order] * np.float32(self.gain)
                            encoded.write(_quantise(frames, self.format.bits))
                    encoded.close()
                finally:
                    _remove([float_file.temp_path])
                    float_file.release()
        for file in self._files.values() if self.overwrite else ():
            file.delete_old()
        files = list(self._files.values())
        for number, file in enumerate(files):
            try:
                file.commit()
            except BaseException:
                for committed in files[:number]:
                    committed.path.unlink(missing_ok=True)
                raise

    def _discard(self) -> None:
        for file in self._files.values():
            file.release()
        _remove([file.temp_path for file in self._files.values()], self.paths.values())


def _channel_order(format: Format, channels: int, layout: Sequence[str]) -> list[int] | None:
    """Return the order of the channels in a format; None if it does not support one of the speakers."""
    identity = list(range(channels))
    speakers = VORBIS_SPEAKERS.get(channels, "").split()  # FLAC has the same speakers, in the order of `SPEAKERS`
    if format.container not in ("FLAC", "OGG") or channels < 3 or not (speakers or layout):
        return identity
    names = list(layout) or sorted(speakers, key=SPEAKERS.index)
    if "SL" not in speakers:  # here, side and back speakers are the same
        names = [{"SL": "BL", "SR": "BR"}.get(name, name) for name in names]
    if sorted(names) != sorted(speakers):
        return None
    return [names.index(name) for name in speakers] if format.container == "OGG" else identity


def _quantise(frames: np.ndarray, bits: int) -> np.ndarray:
    """Round float32 in ±1 to `bits`-bit integers, in the upper bits of soundfile's integer type; 0 bits: unchanged."""
    if not bits:
        return np.ascontiguousarray(frames)
    scale = 2 ** (bits - 1)
    rounded = np.clip(np.rint(frames.astype("float64") * scale), -scale, scale - 1)
    return rounded.astype("int16") if bits == 16 else rounded.astype("int32") << (32 - bits)


class _TempAudioFile:
    """Audio file under a hidden name in its folder, locked while it is open; `commit` gives it its final name."""

    _raw: _ErrorCapturingFile | None = None
    _file: Any = None

    def __init__(
        self, path: Path, token: str, rate: int, channels: int, format: Format, frames: int, mask: int
    ) -> None:
        self.path, self._mask = path, mask
        self.temp_path = path.with_name(f".bsmamba2-{token}-{secrets.token_hex(4)}.part")
        container = format.container
        if container == "WAV":  # its sizes have 32 bits; RF64 is the same format with 64-bit sizes and the same suffix
            size = frames * channels * format.bits // 8
            container = "RF64" if size > 0xFFFF0000 else "WAVEX" if mask else "WAV"
        self._has_mask = container in ("RF64", "WAVEX")
        try:
            with self._errors():
                self._raw = _ErrorCapturingFile(self.temp_path)
                self._file = soundfile.SoundFile(self._raw, "w", rate, channels, format.subtype, format=container)
        except BaseException:
            self.release()
            _remove([self.temp_path])
            raise

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Re-raise system and libsndfile errors, and soundfile's AssertionError for a short write, as AudioError."""
        try:
            yield
            if self._raw and self._raw.error:
                raise self._raw.error
        except FileExistsError as error:
            raise AudioError(_EXISTS.format(self.path)) from error
        except (OSError, soundfile.LibsndfileError, AssertionError) as error:
            cause = (self._raw and self._raw.error) or error
            fix = "give another folder with -o, or make room"
            raise AudioError(f"{self.path}: cannot be written ({reason(cause)}); {fix}") from error

    def write(self, frames: np.ndarray) -> None:
        """Write frames (samples, c)."""
        for start in range(0, len(frames), _WRITE_CHUNK):
            with self._errors():
                self._file.write(frames[start : start + _WRITE_CHUNK])

    def close(self) -> None:
        """Finish the file and flush it to the disk."""
        assert self._raw is not None
        with self._errors():
            self._file.close()
            if self._has_mask:  # soundfile cannot set the mask
                self._raw.seek(0)
                self._raw.seek(self._raw.read(128).index(b"fmt ") + 28)
                self._raw.write(self._mask.to_bytes(4, "little"))
            fsync(self._raw)
            if fcntl is None:
                self._raw.close()

    def delete_old(self) -> None:
        """Delete the file to be replaced, if it exists."""
        with self._errors():
            self.path.unlink(missing_ok=True)

    def commit(self) -> None:
        """Give the file its final name, which must be free. With hard links, the file keeps its hidden name too."""
        with self._errors():
            try:
                os.link(self.temp_path, self.path)
            except FileExistsError:
                raise
            except OSError:  # a file system without hard links
                self.path.touch(exist_ok=False)
                self.temp_path.replace(self.path)

    def release(self) -> None:
        """Close the file, whatever its state."""
        with contextlib.suppress(soundfile.LibsndfileError, AssertionError):  # the file may be incomplete
            if self._file:
                self._file.close()
        if self._raw:
            self._raw.close()


class _ErrorCapturingFile(io.FileIO):
    """New file for libsndfile to write; it stores the first error, because libsndfile's callbacks must not raise."""

    def __init__(self, path: Path) -> None:
        super().__init__(path if fcntl is None else path.with_suffix(".new"), "xb+")
        self.error: OSError | None = None
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks, where `sweep` removes nothing
                fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.with_suffix(".new").replace(path)

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


def _prepare(paths: Iterable[Path], overwrite: bool) -> None:
    """Create the folders of files, `sweep` them, and check that the files may be written."""
    swept: set[Path] = set()
    for path in paths:
        try:
            if path.parent not in swept:
                path.parent.mkdir(parents=True, exist_ok=True)
                sweep(path.parent)
                swept.add(path.parent)
            kind = stat.S_IFMT(path.lstat().st_mode)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise AudioError(
                f"{path}: cannot be written ({reason(error)}); give another folder, or rename the song"
            ) from error
        if not overwrite or kind == stat.S_IFDIR:
            raise AudioError(_EXISTS.format(path))


def sweep(folder: Path) -> None:
    """Remove the hidden files of killed writers, and a song's results if some of them are missing."""
    for path in folder.glob(".bsmamba2-*.new"):  # a writer locks it and renames it to .part within microseconds
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > 60 and not path.is_symlink():
                path.unlink()
    songs: dict[str, list[Path]] = {}
    for path in folder.glob(".bsmamba2-*.part"):
        if path.is_file() and not path.is_symlink():
            songs.setdefault(path.name.split("-")[1], []).append(path)
    for parts in songs.values():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):  # locked by a running writer, or not ours
            for part in parts if fcntl is not None else ():
                fcntl.flock(stack.enter_context(part.open("rb+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(parts, folder.iterdir())


def _remove(parts: Sequence[Path], named: Iterable[Path] = ()) -> None:
    """Remove hidden files, and also their final names among `named`, unless every file has one."""
    lexists = os.path.lexists  # False for a name that is too long
    inodes = {path.lstat().st_ino for path in parts if lexists(path)}
    names = [path for path in named if path not in parts and lexists(path) and path.lstat().st_ino in inodes]
    for path in (*(names if len(names) < len(inodes) else ()), *parts):
        path.unlink(missing_ok=True)
