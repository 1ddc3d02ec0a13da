"""Decode one recording of a file: libsndfile for PCM and Vorbis, FFmpeg (through PyAV) for all others.

Samples are float32 (integers are divided by their full scale); channels are in the order of a WAV file's channel mask.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Any, NoReturn

import av
import numpy as np
import soundfile
from av.stream import Discard

from .source import AGAIN, MOST_JUNK, DamagedError, FileBytes, Part, Splice

BLOCK = 1 << 16
"""Samples per channel in one block; fewer for files with more than two channels."""

SPEAKERS = (
    *("FL", "FR", "FC", "LFE", "BL", "BR", "FLC", "FRC", "BC", "SL", "SR"),
    *("TC", "TFL", "TFC", "TFR", "TBL", "TBC", "TBR"),
)
"""FFmpeg's names of the speakers, in the bit order of a WAV file's channel mask."""

VORBIS_SPEAKERS = {
    1: "FC",
    2: "FL FR",
    3: "FL FC FR",
    4: "FL FR BL BR",
    5: "FL FC FR BL BR",
    6: "FL FC FR BL BR LFE",
    7: "FL FC FR SL SR BC LFE",
    8: "FL FC FR SL SR BL BR LFE",
}
"""Number of channels → speakers, in the channel order of Vorbis and Opus (RFC 7845, 5.1.1.2)."""

_LOSSLESS = ("pcm", "adpcm", "flac", "alac", "tta", "wavpack")


def reason(error: Exception) -> str:
    """Return the message of an error without the file's name, because callers add the name themselves."""
    if isinstance(error, soundfile.LibsndfileError):
        return str(error.error_string).strip().rstrip(".")
    if isinstance(error, OSError | av.FFmpegError):
        return error.strerror or type(error).__name__
    return str(error) or type(error).__name__


def open_decoder(raw: io.FileIO, part: Part) -> LibsndfileDecoder | FFmpegDecoder:
    """Open a recording: with libsndfile if the container calls for it and libsndfile can read it, else with FFmpeg.

    Raises:
        DamagedError: when it is damaged or shorter than its container claims.
        LibsndfileError, FFmpegError, OSError: when it cannot be decoded.
    """
    if part.libsndfile:
        with suppress(soundfile.LibsndfileError):
            return LibsndfileDecoder(raw, part)
    return FFmpegDecoder(raw, part)


def junk_behind(raw: io.FileIO, place: range) -> int:
    """Count the junk bytes in a range after a recording, without leading tags and zeros.

    Raises:
        DamagedError: when the range holds another recording, or more than `MOST_JUNK` bytes that may be a damaged one.
    """
    place = range(FileBytes(raw).skip_tags(place.start), place.stop)
    if not place:
        return 0
    with suppress(av.FFmpegError, OSError), _open(Splice(raw, (place,)), None) as container:
        stream = container.streams.best("audio")
        if stream is not None and next(container.decode(stream), None) is not None:
            raise DamagedError(f"holds another recording from byte {place.start:,} on; split it")
    if len(place) > MOST_JUNK:
        raise DamagedError(f"holds {len(place):,} bytes after the sound, neither sound nor a tag; cut them off")
    return len(place)


class LibsndfileDecoder:
    """Decoder for the formats that libsndfile reads."""

    def __init__(self, raw: io.FileIO, part: Part) -> None:
        self._raw, self._part = raw, part
        file = soundfile.SoundFile(Splice(raw, part.pieces))
        self.rate: int = file.samplerate
        self.channels: int = file.channels
        self.frames: int = part.length(file.frames, self.channels)
        self.has_end, self.rest = part.has_end, range(0)
        _check_length(self.frames, self.rate, part.seconds)
        names = VORBIS_SPEAKERS.get(self.channels, "").split() if part.vorbis else _speakers(raw, part)
        self.layout, self._order = _wav_order(names)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all samples in blocks (c, up to `BLOCK`) float32."""
        samples = 0
        file = soundfile.SoundFile(Splice(self._raw, self._part.pieces))
        while samples < self.frames:
            try:
                block = file.read(_block_size(self.channels), dtype="float32", always_2d=True)
            except soundfile.LibsndfileError as error:
                raise _undecodable(samples, self.rate, reason(error)) from error
            if not len(block):
                _check_length(samples, self.rate, self.frames / self.rate)
            block = block[: self.frames - samples]
            samples += len(block)
            yield np.ascontiguousarray(block.T[self._order] if self._order else block.T)


class FFmpegDecoder:
    """Decoder for the formats that FFmpeg reads.

    On creation it decodes the recording once, to count its samples and to find damage early.

    Attributes:
        has_end: whether the file shows where its sound ends.
        rest: byte range after the last packet that FFmpeg found; it may hold another recording.
    """

    def __init__(self, raw: io.FileIO, part: Part) -> None:
        self._raw, self._part = raw, part
        self.rate = self.channels = self.frames = 0
        self.rest, start = range(0), 0.0  # start time of a recorded live stream, in seconds
        for frame in self._decode():
            if not self.frames:
                self.rate, self.channels = frame.rate, frame.layout.nb_channels
                self.layout, self._order = _wav_order(_names(frame.layout))
                start = float(frame.pts * (frame.time_base or 0)) if frame.pts and part.format == "ogg" else 0.0
            elif (frame.rate, frame.layout.nb_channels) != (self.rate, self.channels):
                raise DamagedError(
                    f"changes its rate or number of channels after {self.frames / self.rate:.1f} s; "
                    "split it there, or convert it"
                )
            self.frames += _length(frame)
        self.frames = part.length(self.frames, self.channels)
        _check_length(self.frames + self.rate * part.trimmed, self.rate, part.seconds - start)
        stated, unit = (0.0, Fraction(1)) if part.seconds else self._stated
        is_lossless = self._codec.startswith(_LOSSLESS)
        # Durations may be rounded to 1/600 s, include a delay (lossy formats), or count whole packets (AVI).
        is_exact = is_lossless and unit * self.rate == 1 and part.format != "mp4"
        tolerance = 0.0 if is_exact else max(2 * float(unit), 1 / 600 if is_lossless else 0.1)
        _check_length(self.frames + self.rate * tolerance, self.rate, stated)
        if is_exact and 0 < stated * self.rate < self.frames - 0.5 and not part.walked:
            raise DamagedError(f"holds more than the {stated:.1f} s of sound that its head counts; export it again")
        # The edit list of an MP4 file may end within the last one or two frames.
        if stated and part.format == "mp4" and self.rate / 600 < self.frames - stated * self.rate < 4096:
            self.frames = round(stated * self.rate)
        self.has_end = part.has_end or (stated > 0 and is_lossless)

    def _decode(self) -> Iterator[av.AudioFrame]:
        is_flac, samples, expected, end, last = self._part.format == "flac", 0, 0, 0, b""
        try:
            # Without the file's size FFmpeg does not guess a duration; for MP3 it needs the size to trim the padding.
            source = Splice(self._raw, self._part.pieces, endless=self._part.format != "mp3")
            with _open(source, self._part.format) as container:
                stream = container.streams.best("audio")
                if stream is None:
                    raise av.InvalidDataError(0, "no sound in it")
                self._codec, self._stated = stream.codec_context.name, _stated_duration(container, stream)
                for other in container.streams if self._part.walked else ():
                    other.discard = Discard.default if other is stream else Discard.all
                if is_flac:
                    stream.codec_context.options = {"err_detect": "crccheck+explode"}
                for packet in container.demux():
                    if packet.size and packet.pos is not None:
                        end = max(end, packet.pos + packet.size)
                    if packet.stream_index != stream.index:
                        continue
                    if packet.is_corrupt:
                        raise _undecodable(samples, stream.rate, "a packet is not whole")
                    last = bytes(packet) if is_flac and packet.size else last
                    for frame in packet.decode():
                        _keep(frame.layout)
                        start = round(frame.pts * frame.time_base * frame.rate) if frame.pts is not None else 0
                        if frame.is_corrupt or (is_flac and start > expected):  # FLAC frames are numbered
                            raise _undecodable(samples, stream.rate, "a frame is missing or not whole")
                        expected = start + frame.samples
                        samples += frame.samples
                        yield frame
        except av.FFmpegError as error:
            if samples:
                raise _undecodable(samples, stream.rate, reason(error)) from error
            if not isinstance(error, av.EOFError):
                raise
        if not samples:
            raise DamagedError(f"holds no samples; {AGAIN}, or give another song")
        if not self._part.walked:
            (piece,) = self._part.pieces
            assert isinstance(piece, range)
            self.rest = piece[end - (len(last) - _flac_size(last) if is_flac else 0) :]

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all samples in blocks (c, up to `BLOCK`) float32."""
        pending: list[np.ndarray] = []
        samples = pending_samples = 0
        size = _block_size(self.channels)
        for frame in self._decode():
            array = _float32(frame)[:, : min(_length(frame), self.frames - samples)]
            samples += array.shape[1]
            pending.append(array[self._order] if self._order else array)
            pending_samples += array.shape[1]
            if pending_samples >= size or samples == self.frames:
                yield from np.split(np.concatenate(pending, axis=1), range(size, pending_samples, size), axis=1)
                pending, pending_samples = [], 0
        _check_length(samples, self.rate, self.frames / self.rate)


def _open(source: io.RawIOBase, format: str | None) -> Any:
    # Without a parser, the packets of an MP4 file keep the durations of its index.
    options = {"fflags": "noparse"} if format == "mp4" else {}
    return av.open(source, format=format, options=options, io_open=_open_nothing, metadata_errors="ignore")


def _open_nothing(url: str, *_: object) -> NoReturn:
    """Refuse to open the files or addresses that a playlist names."""
    raise PermissionError(f"{url}: named by another file")


def _stated_duration(container: Any, stream: Any) -> tuple[float, Fraction]:
    """Return the duration that a container states, 0 if none, and its time unit, both in seconds."""
    if stream.duration and stream.duration < 1 << 62:
        return float(stream.duration * stream.time_base), stream.time_base
    seconds = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
    return seconds, Fraction(1, 1_000_000)


def _flac_size(packet: bytes) -> int:
    """Find the size of the FLAC frame that begins a packet, by its CRC-16; the last packet also holds later bytes."""
    crc = end = 0
    for i, byte in enumerate(packet[: 1 << 20], start=1):  # longer than any frame
        crc ^= byte << 8
        for _ in range(8):
            crc = crc << 1 ^ (0x18005 if crc & 0x8000 else 0)
        end = end or i * (crc == 0)
    return i if packet and crc == 0 else end


def _speakers(raw: io.FileIO, part: Part) -> list[str]:
    """Return the speakers of a file's channels, which FFmpeg reads from its header; [] if it cannot."""
    try:
        with _open(Splice(raw, part.pieces), part.format) as container:
            return _names(container.streams.audio[0].layout)
    except (av.FFmpegError, OSError, IndexError):
        return []


def _keep(layout: Any) -> None:
    """Keep a layout with a custom channel order alive, because PyAV 18 frees its memory twice and may crash."""
    if " channels (" in layout.name or "ambisonic" in layout.name:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(layout))


def _names(layout: Any) -> list[str]:
    _keep(layout)
    return [channel.name for channel in layout.channels]


def _wav_order(names: list[str]) -> tuple[tuple[str, ...], list[int] | None]:
    """Return the speakers in WAV order (() if unknown), and their channels in the file (None if in the same order)."""
    if not names or not set(names) <= set(SPEAKERS) or len(set(names)) < len(names):
        return (), None
    order = sorted(range(len(names)), key=lambda i: SPEAKERS.index(names[i]))
    return tuple(names[i] for i in order), None if order == sorted(order) else order


def _block_size(channels: int) -> int:
    return min(BLOCK, max(1, 2 * BLOCK // channels))


def _length(frame: av.AudioFrame) -> int:
    """Return how many samples of a decoded frame to keep: fewer if the container states a shorter duration."""
    base = frame.time_base
    exact = base is not None and base.denominator == frame.rate * base.numerator
    return min(frame.samples, frame.duration) if exact and frame.duration else frame.samples


def _float32(frame: av.AudioFrame) -> np.ndarray:
    """Return the samples of a decoded frame: (c, samples) float32, full scale 1."""
    channels = frame.layout.nb_channels
    if frame.format.is_planar and channels >= 8:  # PyAV looks for a ninth plane, and may crash
        (frame,) = av.AudioResampler(frame.format.packed).resample(frame)
    if frame.format.name in ("s64", "s64p"):  # PyAV does not know its NumPy type
        (frame,) = av.AudioResampler("dbl").resample(frame)
    array: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, channels).T
    if array.dtype == np.uint8:
        array = array.astype("int8") - np.int8(-128)
    scale = 1.0 if array.dtype.kind == "f" else 2.0 ** (1 - 8 * array.dtype.itemsize)
    return (array * scale).astype("float32")


def _undecodable(samples: float, rate: int, cause: str) -> DamagedError:
    return DamagedError(f"is damaged or cut short after {samples / rate:.1f} s ({cause}); {AGAIN}")


def _check_length(samples: float, rate: int, claimed: float) -> None:
    """Raise DamagedError when there are fewer samples than the claimed duration in seconds needs."""
    if samples + 0.5 < claimed * rate:
        raise DamagedError(f"is damaged or cut short: {samples / rate:.1f} of {claimed:.1f} s can be read; {AGAIN}")
