"""Read audio files block by block: libsndfile for the formats it reads correctly, FFmpeg (through PyAV) for all others.

libsndfile reads WAV, RF64, W64, AIFF, CAF, AU and Ogg Vorbis. FFmpeg reads FLAC, MP3, AAC, M4A, Opus, WMA, WavPack,
APE, TTA, and the sound of MP4, MOV, Matroska, WebM, AVI, WMV, FLV and MPEG videos. The format does not depend on the
file's name, and other formats are refused. Samples are float32; integers are divided by their full scale, so full scale
is 1. All sound in a file is read, or the file is refused: see `containers`.

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from torch import Tensor

from .containers import find_parts
from .decoders import BLOCK as BLOCK
from .decoders import FFmpegDecoder, LibsndfileDecoder, junk_behind, open_decoder, reason
from .source import FILE_START, DamagedError, open_regular

SUFFIXES = (
    *(".wav", ".wave", ".rf64", ".bw64", ".bwf", ".w64", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".flac"),
    *(".ogg", ".oga", ".ogv", ".spx", ".opus", ".mp3", ".mp2", ".mpga", ".m4a", ".m4b", ".aac", ".wma", ".wv", ".ape"),
    *(".tta", ".mka", ".weba", ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".mpg"),
    *(".mpeg", ".ts", ".mts", ".m2ts"),
)
"""Suffixes of the audio files to find in a folder, in upper or lower case."""

_SOUND = re.compile(rb"ID3|\xff[\xe2-\xe7\xf1-\xfd]")
"""First bytes of an audio file without a container: a tag or a frame."""

_PICTURES = (b"avif", b"heic", b"heix", b"mif1", b"crx ")
"""Kinds of MP4 files without sound."""

RATES = (1_000, 768_000)
"""Lowest and highest accepted sample rate, in hertz; outside this range, a file's header is taken to be wrong."""

_FORMATS = "give a WAV, FLAC, OGG, MP3 or M4A file"


class AudioError(ValueError):
    """A file that cannot be used; the message gives its name, the reason and the fix."""


class AudioWarning(UserWarning):
    """A file that is read although part of it is left out or may be missing; the message gives its name and fault."""


class UnstatedLengthWarning(AudioWarning):
    """A file that does not state where its sound ends, so a cut end would not be recognised."""


class AudioReader:
    """Audio file reader, as a context manager.

    Attributes:
        rate: sample rate, in hertz.
        channels: c.
        layout: speakers of the channels, by FFmpeg's names; () if the file does not declare them. Declared channels are
            returned in the order of a WAV file's channel mask, whatever their order in the file.
        states_length: whether the file states where its sound ends.
        frames: samples per channel, without the encoder's delay and padding that the container declares. To count
            them, FFmpeg's formats are decoded once.

    Args:
        path: the file.

    Warns:
        UnstatedLengthWarning: when the file does not state where its sound ends.
        AudioWarning: when bytes that are not sound are left out.

    Raises:
        AudioError: for a file that is missing, not a regular file, not audio, cut, damaged or empty, that has a rate
            outside `RATES`, or that changes its rate or channels.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._raw = open_regular(self.path)
        except DamagedError as error:
            raise AudioError(f"{self.path}: {error}; {_FORMATS}") from error
        except FileNotFoundError as error:
            raise AudioError(f"{self.path}: does not exist; {_FORMATS}") from error
        except OSError as error:
            raise AudioError(f"{self.path}: cannot be read ({reason(error)}); change that, or leave it out") from error
        try:
            self._open_decoders()
        except BaseException:
            self._raw.close()
            raise

    def _open_decoders(self) -> None:
        if not self._raw.read(1):
            raise AudioError(f"{self.path}: is empty, 0 bytes; {_FORMATS}")
        self._decoders: list[LibsndfileDecoder | FFmpegDecoder] = []
        try:
            parts, rest = find_parts(self._raw)
            junk = junk_behind(self._raw, rest)
            for part in parts:
                decoder = open_decoder(self._raw, part)
                self._decoders.append(decoder)
                self._check_header(decoder)
                junk += junk_behind(self._raw, decoder.rest)
        except DamagedError as error:
            raise AudioError(f"{self.path}: {error}") from error
        except (soundfile.LibsndfileError, av.FFmpegError, OSError) as error:
            raise AudioError(f"{self.path}: cannot be read as audio ({reason(error)}); {_FORMATS}") from error
        self.rate, self.channels, self.layout = _format(self._decoders[0])
        self.frames = sum(decoder.frames for decoder in self._decoders)
        self.states_length = all(decoder.has_end for decoder in self._decoders)
        if junk:
            message = f"{self.path}: {junk:,} bytes after the sound are neither sound nor a tag, and are left out"
            warnings.warn(message, AudioWarning, stacklevel=3)
        if not self.states_length:
            message = f"{self.path}: does not state its length; if its end was cut off, nothing shows it"
            warnings.warn(message, UnstatedLengthWarning, stacklevel=3)

    def _check_header(self, decoder: LibsndfileDecoder | FFmpegDecoder) -> None:
        low, high = RATES
        if not low <= decoder.rate <= high:
            raise AudioError(
                f"{self.path}: {decoder.rate:,} Hz is not a sample rate of music ({low:,} to {high:,} Hz); "
                f"write the right rate into its head, or resample it"
            )
        if not decoder.frames:
            raise AudioError(f"{self.path}: holds no samples; give a song")
        if _format(decoder) != _format(self._decoders[0]):
            seconds = sum(before.frames / before.rate for before in self._decoders[:-1])
            raise AudioError(
                f"{self.path}: changes its rate or channels after {seconds:.1f} s; split it there, or convert it"
            )

    def blocks(self) -> Iterator[Tensor]:
        """Yield all samples in blocks (c, up to `BLOCK`) float32.

        Raises:
            AudioError: when samples are NaN or infinite, or the data are damaged or have fewer than `frames` samples.
        """
        try:
            for decoder in self._decoders:
                for block in decoder.blocks():
                    if not np.isfinite(block).all():
                        raise AudioError(f"{self.path}: holds NaN or infinite samples; repair or export it again")
                    yield torch.from_numpy(block)
        except DamagedError as error:
            raise AudioError(f"{self.path}: {error}") from error

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def read(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """Read a whole audio file: (c, samples) float32, and its sample rate in hertz.

    Raises:
        AudioError: as in `AudioReader` and `AudioReader.blocks`.
    """
    with AudioReader(path) as file:
        return torch.cat(list(file.blocks()), dim=-1), file.rate


def _format(decoder: LibsndfileDecoder | FFmpegDecoder) -> tuple[int, int, tuple[str, ...]]:
    return decoder.rate, decoder.channels, decoder.layout


def find_audio_files(
    folder: str | os.PathLike[str], *, without: Iterable[Path] = ()
) -> tuple[list[Path], list[AudioError], list[Path]]:
    """Find audio files in a folder and the folders below it, sorted by name.

    A file counts as audio by its suffix or its first bytes. Hidden files and folders and the folders `without` are
    skipped; links to folders are not followed.

    Returns:
        The audio files; an error for each folder that cannot be read, or one error if no audio file was found; and the
        other files, which were left out.
    """
    folder = Path(folder)
    excluded = {os.path.realpath(path) for path in without}
    songs: list[Path] = []
    errors: list[AudioError] = []
    left_out: list[Path] = []

    def note(error: OSError) -> None:
        errors.append(
            AudioError(f"{error.filename}: the folder cannot be read ({reason(error)}); change its permissions")
        )

    for parent, folders, names in os.walk(folder, onerror=note):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(Path(parent, name)) not in excluded
        )
        for path in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
            (songs if path.suffix.lower() in SUFFIXES or _looks_like_audio(path) else left_out).append(path)
    if not songs and not errors:
        errors.append(AudioError(f"{folder}: the folder holds no WAV, FLAC, OGG, MP3 or M4A file; give one that does"))
    return songs, errors, left_out


def _looks_like_audio(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            head = file.read(64)
            return bool(FILE_START.match(head) or _SOUND.match(head)) and head[8:12] not in _PICTURES
    except (OSError, DamagedError):
        return False
