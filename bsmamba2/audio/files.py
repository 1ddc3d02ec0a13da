"""Audio files in and out, in pieces: WAV, FLAC, OGG and MP3, through soundfile.

A file is read as float32, integers divided by their full scale, so that what the file calls full is 1. What is written
appears whole or not at all, and never clips unsaid (`StemWriter`).

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from . import mp3

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".rf64", ".caf")
"""Names of files that a folder is searched for, in any case."""

RATES = (1_000, 768_000)
"""Lowest and highest sample rate that is believed, in hertz: below there is no voice, above there is no recorder."""

BLOCK = 1 << 16
"""Frames read at a time. (Minutes of Vorbis written in one call crash libsndfile: so pieces there, too.)"""


@dataclass(frozen=True)
class Format:
    """How a result is stored.

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


class AudioError(ValueError):
    """A file that cannot be used: the message names it, says why, and what to do."""


class AudioReader:
    """A file open for reading, as a context manager.

    Attributes:
        rate: sample rate, in hertz.
        channels: c.
        frames: samples in each channel, as the file's head has it; of an MP3 without a count, as its frames are found.

    Args:
        path: the file.

    Raises:
        AudioError: for a file that is missing, no regular file, no audio, cut short or empty, or has a rate outside
            `RATES`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        mend = "give a WAV, FLAC, OGG or MP3 file"
        try:
            if self.path.exists() and not self.path.is_file():
                raise AudioError(f"{self.path}: is no regular file; {mend}")
            with self.path.open("rb") as raw:
                if not raw.read(1):
                    raise AudioError(f"{self.path}: is empty, 0 bytes; {mend}")
            counted = mp3.with_count(self.path)
        except FileNotFoundError as error:
            raise AudioError(f"{self.path}: does not exist; {mend}") from error
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read ({_reason(error)}); change that, or leave it out") from error
        with contextlib.ExitStack() as opened:
            if counted is not None:
                opened.callback(counted.close)
            try:
                with self._quiet():
                    self._file = opened.enter_context(soundfile.SoundFile(counted or _openable(self.path)))
            except soundfile.LibsndfileError as error:
                raise AudioError(f"{self.path}: cannot be read as audio ({_reason(error)}); {mend}") from error
            self.rate: int = self._file.samplerate
            self.channels: int = self._file.channels
            self.frames: int = self._file.frames
            self._check_head()
            self._close = opened.pop_all().close

    def _check_head(self) -> None:
        low, high = RATES
        if not low <= self.rate <= high:
            raise AudioError(
                f"{self.path}: {self.rate:,} Hz is no rate that music is recorded at ({low:,} to {high:,} Hz); "
                f"write the right rate into its head, or resample it"
            )
        # libsndfile takes a chunk that ends too early as it is, and says so in its log alone. Programs that write
        # into a pipe leave a size of 0 or just below or at 2^31 or 2^32 behind, which means nothing.
        sizes = re.findall(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", self._file.extra_info, re.MULTILINE)
        short = [int(claimed) for claimed, there in sizes if int(there) + 1 < int(claimed)]
        if any((size + 0x10000) % (1 << 31) > 0x10000 for size in short) or not _ogg_ends(self.path):
            raise AudioError(f"{self.path}: is cut short: its end is missing; get the whole file again")
        if not self.frames:
            raise AudioError(f"{self.path}: holds no samples; give a song")
        if self.frames >= (1 << 63) - 1:  # a FLAC that was written into a pipe
            raise AudioError(f"{self.path}: does not say how long it is; write it anew, as WAV for example")

    def blocks(self) -> Iterator[Tensor]:
        """The samples from the start: pieces (c, up to `BLOCK`) float32.

        Raises:
            AudioError: when samples are NaN or infinite, or the data are damaged or end before `frames`.
        """
        found = 0
        while True:
            try:
                with self._quiet():
                    block = self._file.read(BLOCK, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise AudioError(
                    f"{self.path}: is damaged or cut short after {found / self.rate:.1f} s ({_reason(error)}); "
                    f"get the whole file again"
                ) from error
            if not len(block):
                break
            if not np.isfinite(block).all():
                raise AudioError(f"{self.path}: holds NaN or infinite samples; repair or export it again")
            found += len(block)
            yield torch.from_numpy(block.T.copy())
        # Decoders of MP3 begin late or leave out a frame or two where one says less than it should.
        if found < self.frames - (self.rate if self._file.format == "MP3" else 0):
            raise AudioError(
                f"{self.path}: is damaged or cut short: {found / self.rate:.1f} of {self.frames / self.rate:.1f} s "
                f"can be read; get the whole file again"
            )

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """libmpg123 writes its own remarks on a damaged MP3 to standard error, past Python: here they go nowhere."""
        if self.path.suffix.lower() != ".mp3":
            yield
            return
        kept = os.dup(2)
        try:
            with Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def read(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """A whole file: (c, samples) float32, and its rate in hertz.

    Raises:
        AudioError: as `AudioReader` and its `blocks`.
    """
    with AudioReader(path) as file:
        return torch.cat(list(file.blocks()), dim=-1), file.rate


def write(path: str | os.PathLike[str], audio: Tensor, sample_rate: int, format: str = "wav") -> float:
    """Write one file, (c, samples); returns the gain, as `StemWriter` has it.

    Raises:
        AudioError: as `StemWriter`.
    """
    with StemWriter({"audio": Path(path)}, sample_rate, audio.shape[0], format, frames=audio.shape[1]) as results:
        for block in audio.split(BLOCK, dim=-1):
            results.write({"audio": block})
    return results.gain


class StemWriter:
    """Files that belong together, of one rate, length and number of channels, written piece by piece.

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
        self._open: dict[str, _Part] = {}
        self._check()

    def _check(self) -> None:
        """Whether the encoder takes this rate and these channels, before anything long begins."""
        try:
            with soundfile.SoundFile(
                io.BytesIO(), "w", self.rate, self.channels, self.format.subtype, format=self.format.container
            ) as trial:
                trial.write(np.zeros((1, self.channels), dtype="float32"))
        except (soundfile.LibsndfileError, ValueError, AssertionError) as error:
            raise AudioError(
                f"{next(iter(self.paths.values()))}: {self.rate:,} Hz with {self.channels} channels cannot be written "
                f"as {self.format.container} {self.format.subtype}; choose --format wav"
            ) from error

    def __enter__(self) -> StemWriter:
        try:
            for name, path in self.paths.items():
                self._open[name] = _Part(path, self.rate, self.channels, FORMATS["wav"], self.frames)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, audio: Mapping[str, Tensor]) -> None:
        """The next samples of each file: name → (c, samples).

        Raises:
            AudioError: when they cannot be written.
        """
        for name, part in self._open.items():
            if not audio[name].numel():
                continue
            self.peak = max(self.peak, float(audio[name].abs().max()))
            part.write(audio[name].T.contiguous().numpy())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._discard()

    def _finish(self) -> None:
        for part in self._open.values():
            part.close()
        if self.format.bounded:
            top = 1 - 2.0 ** (1 - self.format.bits) if self.format.bits else 1.0
            self.gain = top / self.peak if self.peak > 1 else 1.0
            for name in self.paths:
                waiting = self._open[name]
                encoded = _Part(self.paths[name], self.rate, self.channels, self.format, self.frames)
                self._open[name] = encoded
                try:
                    with AudioReader(waiting.beside) as file:
                        for block in file.blocks():
                            encoded.write(_quantise(block.T.numpy() * np.float32(self.gain), self.format.bits))
                    encoded.close()
                finally:
                    waiting.discard()
        for part in self._open.values():
            part.appear()

    def _discard(self) -> None:
        for part in self._open.values():
            part.discard()


def _quantise(frames: np.ndarray, bits: int) -> np.ndarray:
    """±1 float32 → integers of so many bits, in the upper bits of what soundfile takes; 0 bits: as they are."""
    if not bits:
        return np.ascontiguousarray(frames)
    scale = 2 ** (bits - 1)
    whole = np.clip(np.rint(frames.astype("float64") * scale), -scale, scale - 1)
    return whole.astype("int16") if bits == 16 else whole.astype("int32") << (32 - bits)


@dataclass
class _Part:
    """One file on its way: written beside its place, renamed when whole."""

    path: Path
    rate: int
    channels: int
    format: Format
    frames: int
    beside: Path = field(init=False)

    def __post_init__(self) -> None:
        self.beside = self.path.with_name(f".bsmamba2-{secrets.token_hex(8)}.part")
        # Sizes in a WAV file have 32 bits; RF64 is the same file with 64-bit sizes, and keeps the suffix.
        size = self.frames * self.channels * max(self.format.bits, 8) // 8
        container = "RF64" if self.format.container == "WAV" and size > 0xFFFF0000 else self.format.container
        try:
            self._sink = _Sink(self.beside)
        except OSError as error:
            raise self._error(error) from error
        try:
            self._file = soundfile.SoundFile(
                self._sink, "w", self.rate, self.channels, self.format.subtype, format=container
            )
        except soundfile.LibsndfileError as error:
            self._sink.close()
            self.beside.unlink(missing_ok=True)
            raise self._error(self._sink.error or error) from error

    def write(self, frames: np.ndarray) -> None:
        for start in range(0, len(frames), BLOCK):
            self._call(self._file.write, frames[start : start + BLOCK])

    def close(self) -> None:
        self._call(self._file.close)
        try:
            os.fsync(self._sink.fileno())
            self._sink.close()
        except OSError as error:
            raise self._error(error) from error

    def appear(self) -> None:
        try:
            self.beside.replace(self.path)
        except OSError as error:
            raise self._error(error) from error

    def discard(self) -> None:
        """Close and delete, unless the file has appeared."""
        with contextlib.suppress(soundfile.LibsndfileError, AssertionError):  # of a file that is thrown away
            self._file.close()
        self._sink.close()
        self.beside.unlink(missing_ok=True)

    def _call(self, function: Any, *arguments: object) -> None:
        try:
            function(*arguments)
        except (soundfile.LibsndfileError, AssertionError) as error:  # soundfile asserts that all was written
            raise self._error(self._sink.error or error) from error
        if self._sink.error is not None:
            raise self._error(self._sink.error)

    def _error(self, error: Exception) -> AudioError:
        mend = "give another folder with -o, or make room"
        return AudioError(f"{self.path}: cannot be written ({_reason(error)}); {mend}")


class _Sink(io.FileIO):
    """A file for libsndfile to write: its callbacks may not raise, so the first error is kept here."""

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


def _openable(path: Path) -> str | bytes:
    """A name as soundfile takes it: bytes where it is no text (a name in an old encoding, on Linux)."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return name


def _reason(error: Exception) -> str:
    """What an error says, without the file's name, which stands in front of it already."""
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string).strip().rstrip(".")
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__


def _ogg_ends(path: Path) -> bool:
    """Whether the last page of an Ogg stream is marked as the last (RFC 3533); True for any other file."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return True
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16) - 282))  # longer than the longest page
        tail = file.read()
    last = tail.rfind(b"OggS")
    return last >= 0 and len(tail) > last + 5 and bool(tail[last + 5] & 4)


def find_audio_files(
    folder: str | os.PathLike[str], *, without: Iterable[Path] = ()
) -> tuple[list[Path], list[AudioError]]:
    """The audio files in a folder and the folders below it, by suffix, in order of their names; and what went wrong.

    Hidden files and folders are left out, and so are the folders `without`; links to folders are not followed.
    A folder that cannot be read is an error in the second list, and so is one without any audio file.
    """
    folder = Path(folder)
    left_out = {path.resolve() for path in without}
    found: list[Path] = []
    errors: list[AudioError] = []

    def note(error: OSError) -> None:
        errors.append(
            AudioError(f"{error.filename}: the folder cannot be read ({_reason(error)}); change its permissions")
        )

    for place, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(place) / name).resolve() not in left_out
        )
        found += [
            Path(place) / name
            for name in sorted(files)
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not found and not errors:
        errors.append(AudioError(f"{folder}: the folder holds no WAV, FLAC, OGG or MP3 file; give one that does"))
    return found, errors
