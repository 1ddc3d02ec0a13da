"""Read audio files block by block: libsndfile where it reads a format right, FFmpeg (through PyAV) for all others.

libsndfile reads WAV, FLAC, Ogg Vorbis, AIFF, CAF and AU; FFmpeg MP3, M4A (AAC, ALAC), Opus, WMA, WebM, and the sound of
video files. Samples come as float32, integers divided by their full scale, so that the file's full scale is 1.

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
import soundfile
import torch
from av.stream import Discard
from torch import Tensor

SUFFIXES = (
    *(".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".w64", ".rf64"),
    *(".caf", ".m4a", ".m4b", ".aac", ".wma", ".mka", ".mp4", ".mkv", ".mov", ".webm"),
)
"""Suffixes of the files that a folder is searched for, in any case."""

RATES = (1_000, 768_000)
"""Lowest and highest sample rate that is accepted, in hertz: beyond them the header of a file is wrong."""

BLOCK = 1 << 16
"""Samples read at a time in each channel."""

_LIBSNDFILE_MAGIC = (b"RIFF", b"RF64", b"riff", b"FORM", b"caff", b"fLaC", b"OggS", b".snd")
_FORMATS = "give a WAV, FLAC, OGG, MP3 or M4A file"
_AGAIN = "get the whole file again"


class AudioError(ValueError):
    """A file that cannot be used: the message names it, gives the reason, and the fix."""


class AudioReader:
    """Audio file reader, as a context manager.

    Attributes:
        rate: sample rate, in hertz.
        channels: c.
        frames: samples in each channel. FFmpeg's formats are decoded once to count them: what the container hides
            (an encoder's delay and padding) is left out.

    Args:
        path: the file.

    Raises:
        AudioError: for a file that is missing, not a regular file, not audio, truncated or empty, or has a rate
            outside `RATES`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            if self.path.exists() and not self.path.is_file():
                raise AudioError(f"{self.path}: is no regular file; {_FORMATS}")
            self._raw = self.path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise AudioError(f"{self.path}: does not exist; {_FORMATS}") from error
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read ({reason(error)}); change that, or leave it out") from error
        try:
            self._decoder = self._open()
            self.rate, self.channels, self.frames = self._decoder.rate, self._decoder.channels, self._decoder.frames
            self._check_header()
        except BaseException:
            self._raw.close()
            raise

    def _open(self) -> _LibsndfileDecoder | _FFmpegDecoder:
        head = self._raw.read(64)
        if not head:
            raise AudioError(f"{self.path}: is empty, 0 bytes; {_FORMATS}")
        refusal: Exception | None = None
        if head.startswith(_LIBSNDFILE_MAGIC) and b"OpusHead" not in head:
            try:
                return _LibsndfileDecoder(self._raw)
            except soundfile.LibsndfileError as error:
                refusal = error
        try:
            return _FFmpegDecoder(self._raw)
        except _Damaged as error:
            raise self._damaged(error) from error
        except (av.FFmpegError, OSError) as error:
            reasons = reason(refusal or error)
            raise AudioError(f"{self.path}: cannot be read as audio ({reasons}); {_FORMATS}") from error

    def _check_header(self) -> None:
        low, high = RATES
        if not low <= self.rate <= high:
            raise AudioError(
                f"{self.path}: {self.rate:,} Hz is no rate that music is recorded at ({low:,} to {high:,} Hz); "
                f"write the right rate into its head, or resample it"
            )
        if self._decoder.truncated or not _ogg_ends(self._raw):
            raise AudioError(f"{self.path}: is cut short: its end is missing; {_AGAIN}")
        if not self.frames:
            raise AudioError(f"{self.path}: holds no samples; give a song")
        if self.frames >= (1 << 63) - 1:  # a FLAC that was written into a pipe
            raise AudioError(f"{self.path}: does not say how long it is; convert it, to WAV for example")

    def blocks(self) -> Iterator[Tensor]:
        """The samples from the start: blocks (c, up to `BLOCK`) float32.

        Raises:
            AudioError: when samples are NaN or infinite, or the data are damaged or end before `frames`.
        """
        try:
            for block in self._decoder.blocks():
                if not np.isfinite(block).all():
                    raise AudioError(f"{self.path}: holds NaN or infinite samples; repair or export it again")
                yield torch.from_numpy(block)
        except _Damaged as error:
            raise self._damaged(error) from error

    def _damaged(self, error: _Damaged) -> AudioError:
        return AudioError(f"{self.path}: is damaged or cut short {error}; {_AGAIN}")

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def read(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """Read a whole audio file: (c, samples) float32, and its rate in hertz.

    Raises:
        AudioError: as `AudioReader` and its `blocks`.
    """
    with AudioReader(path) as file:
        return torch.cat(list(file.blocks()), dim=-1), file.rate


class _Damaged(Exception):
    """Data that cannot be decoded, or end too early: the message says where."""

    def __init__(self, samples: float, rate: int, of: float | None = None, cause: Exception | None = None) -> None:
        seconds = f"{samples / rate:.1f}"
        super().__init__(
            f"after {seconds} s ({reason(cause)})" if cause else f": {seconds} of {(of or 0) / rate:.1f} s can be read"
        )


class _LibsndfileDecoder:
    """Decoder of the formats that libsndfile reads."""

    def __init__(self, raw: io.FileIO) -> None:
        raw.seek(0)
        self._file = soundfile.SoundFile(raw.fileno(), closefd=False)  # without a name: its suffix decides nothing
        self.rate: int = self._file.samplerate
        self.channels: int = self._file.channels
        self.frames: int = self._file.frames
        # libsndfile takes a chunk that ends too early as it is, and says so in its log alone. Programs that write
        # into a pipe leave a size of 0 or just below or at 2^31 or 2^32 behind, which means nothing.
        sizes = re.findall(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", self._file.extra_info, re.MULTILINE)
        short = [int(claimed) for claimed, actual in sizes if int(actual) + 1 < int(claimed)]
        self.truncated = any((size + 0x10000) % (1 << 31) > 0x10000 for size in short)

    def blocks(self) -> Iterator[np.ndarray]:
        """(c, up to `BLOCK`) float32."""
        samples = 0
        while True:
            try:
                block = self._file.read(BLOCK, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise _Damaged(samples, self.rate, cause=error) from error
            if not len(block):
                break
            samples += len(block)
            yield block.T.copy()
        if samples < self.frames:
            raise _Damaged(samples, self.rate, of=self.frames)


class _FFmpegDecoder:
    """Decoder of all that FFmpeg reads; it decodes the file once to count its samples and to find damage early."""

    truncated = False

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._stated: float | None = None  # seconds, by the container
        self.rate = self.channels = self.frames = 0
        for frame in self._decode():
            if not self.frames:
                self.rate, self.channels = frame.rate, frame.layout.nb_channels
            elif (frame.rate, frame.layout.nb_channels) != (self.rate, self.channels):
                raise _Damaged(self.frames, self.rate, cause=ValueError("another rate or number of channels follows"))
            self.frames += _length(frame)
        stated = (self._stated or 0.0) * self.rate
        if self.frames < stated - self.rate / 10:  # some durations are rounded, or count an encoder's delay
            raise _Damaged(self.frames, self.rate, of=stated)
        # The edit list of an MP4 may end in the last frame or two. Its duration may be rounded, to 1/600 s at worst.
        if stated and self._is_mp4 and self.rate / 600 < self.frames - stated < 4096:
            self.frames = round(stated)

    def _decode(self) -> Iterator[av.AudioFrame]:
        self._raw.seek(0)
        container: Any = av.open(self._raw, io_open=_open_nothing, metadata_errors="ignore")
        with container:
            stream = container.streams.best("audio")
            if stream is None:
                raise av.InvalidDataError(0, "no sound in it")
            for other in container.streams:
                if other is not stream:
                    other.discard = Discard.all
            format = container.format.name
            self._is_mp4 = "mp4" in format
            samples = 0
            for packet in container.demux(stream):
                if self._stated is None:
                    self._stated = _stated_duration(container, stream, packet.pos, self._raw)
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    if format == "mp3":  # a tag between two frames, say: decoders of MP3 go on with the next frame
                        continue
                    if not samples:
                        raise
                    raise _Damaged(samples, stream.rate, cause=error) from error
                for frame in frames:
                    samples += frame.samples
                    yield frame
            if not samples:
                raise av.InvalidDataError(0, "no sound in it")

    def blocks(self) -> Iterator[np.ndarray]:
        """(c, up to `BLOCK`) float32."""
        pending: list[np.ndarray] = []
        samples = pending_samples = 0
        for frame in self._decode():
            array = _float32(frame)[:, : min(_length(frame), self.frames - samples)]
            samples += array.shape[1]
            pending.append(array)
            pending_samples += array.shape[1]
            if pending_samples >= BLOCK or samples == self.frames:
                yield from np.split(np.concatenate(pending, axis=1), range(BLOCK, pending_samples, BLOCK), axis=1)
                pending, pending_samples = [], 0


def _stated_duration(container: Any, stream: Any, first_packet: int | None, raw: io.FileIO) -> float:
    """Duration in seconds that a container states, 0 where FFmpeg only guesses it from the file's size."""
    format = container.format.name
    if format in ("aac", "ac3", "eac3", "dts", "mpegts"):
        return 0.0
    if format == "mp3":  # an encoder's first frame, which is no sound, may count the others
        start = max(0, (first_packet or 0) - 2048)
        tag = re.search(rb"(?:Xing|Info)...(.)(....)", _read_at(raw, start, (first_packet or 0) - start), re.DOTALL)
        if not tag or not tag[1][0] & 1 or not any(tag[2]):
            return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _length(frame: av.AudioFrame) -> int:
    """Samples of a decoded frame that count: fewer than it has where the container says that it lasts shorter."""
    exact = frame.time_base is not None and frame.time_base * frame.rate == 1 and frame.duration
    return min(frame.samples, frame.duration) if exact else frame.samples


def _float32(frame: av.AudioFrame) -> np.ndarray:
    """The samples of a decoded frame, (c, samples) float32, full scale 1."""
    array: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(frame.samples, -1).T
    if array.dtype == np.uint8:
        array = array.astype("int8") - np.int8(-128)
    scale = 1.0 if array.dtype.kind == "f" else 2.0 ** (1 - 8 * array.dtype.itemsize)
    return (array * scale).astype("float32")


def _open_nothing(url: str, *_: object) -> NoReturn:
    """A playlist may name other files, or addresses: none is opened."""
    raise PermissionError(f"{url}: named by another file")


def reason(error: Exception) -> str:
    """What an error says, without the file's name, which stands in front of it already."""
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string).strip().rstrip(".")
    if isinstance(error, OSError | av.FFmpegError):
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__


def _read_at(raw: io.FileIO, start: int, size: int) -> bytes:
    """Bytes of a file from a place on; its position stays, which decoders rely on."""
    position = raw.tell()
    raw.seek(start)
    data = raw.read(size)
    raw.seek(position)
    return data


def _ogg_ends(raw: io.FileIO) -> bool:
    """Whether the last page of an Ogg stream is marked as the last (RFC 3533); True for any other file."""
    if _read_at(raw, 0, 4) != b"OggS":
        return True
    longest_page = (1 << 16) + 282
    tail = _read_at(raw, max(0, os.fstat(raw.fileno()).st_size - longest_page), longest_page)
    last = tail.rfind(b"OggS")
    return last >= 0 and len(tail) > last + 5 and bool(tail[last + 5] & 4)


def find_audio_files(
    folder: str | os.PathLike[str], *, without: Iterable[Path] = ()
) -> tuple[list[Path], list[AudioError]]:
    """Find audio files in a folder and the folders below it, by suffix, sorted by name; and what went wrong.

    Hidden files and folders are left out, and so are the folders `without`; links to folders are not followed.
    A folder that cannot be read is an error in the second list, and so is one without any audio file.
    """
    folder = Path(folder)
    excluded = {path.resolve() for path in without}
    songs: list[Path] = []
    errors: list[AudioError] = []

    def note(error: OSError) -> None:
        errors.append(
            AudioError(f"{error.filename}: the folder cannot be read ({reason(error)}); change its permissions")
        )

    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (Path(parent) / name).resolve() not in excluded
        )
        songs += [
            Path(parent) / name
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not songs and not errors:
        errors.append(AudioError(f"{folder}: the folder holds no WAV, FLAC, OGG, MP3 or M4A file; give one that does"))
    return songs, errors
