"""Byte access to an audio file for the modules that parse its container, and `Part`, a recording found in it."""

from __future__ import annotations

import io
import os
import re
import stat
import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

AGAIN = "get the whole file again"
CONVERT = "convert it to WAV or FLAC"
CUT = f"is cut short: its end is missing; {AGAIN}"

MOST_JUNK = 1 << 16
"""Maximum number of bytes at the end of a file that are left out with a warning; more may be damaged sound."""

FILE_START = re.compile(
    rb"RIF[FX]....(?:WAVE|AVI )|(?:RF|BW)64....WAVE|riff\x2e\x91\xcf\x11|FORM....(?:AIF[FC]|8SVX|16SV)|caff\0[\x01\x02]"
    rb"|\.snd\0\0|fLaC\0\0\0\x22|OggS\0\x02|\0\0\0[\x08-\x80]ftyp|\x1a\x45\xdf\xa3[\x01-\xa3]"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|TTA1[\x01-\x03]\0|FLV\x01|MAC [\x80-\xff][\x0c-\x0f]|#!AMR"
    rb"|Creative Voice File\x1a|wvpk....[\x02-\x10]\x04",
    re.DOTALL,
)
"""First bytes of the file types whose signature is long enough not to occur in sound by chance."""


class DamagedError(Exception):
    """A file that is cut, damaged or inconsistent; callers put the file's name before the message."""


@dataclass(frozen=True)
class Part:
    """One recording in a file; files joined end to end have several.

    Attributes:
        pieces: its bytes: ranges of the file, and bytes objects that replace other bytes.
        format: FFmpeg's name of the format.
        seconds: duration that its frames claim, or end time that its Ogg pages claim; 0 if they claim nothing.
        trimmed: seconds that decoders may omit as an encoder's delay and padding.
        samples: its length in samples, if the container states it; otherwise 0.
        block: samples per block, if the last block may be padded and writers may add one more; otherwise 0.
        libsndfile: whether to try libsndfile before FFmpeg.
        vorbis: whether it is Vorbis, which has its own channel order.
        has_end: whether the file states where the sound ends, by a size, a count or a flag.
        walked: whether the container was parsed to its end, so that the pieces hold nothing else.
    """

    pieces: tuple[bytes | range, ...]
    format: str
    seconds: float = 0.0
    trimmed: float = 0.0
    samples: int = 0
    block: int = 0
    libsndfile: bool = False
    vorbis: bool = False
    has_end: bool = True
    walked: bool = True

    def length(self, decoded: int, channels: int) -> int:
        """Return how many of the decoded samples to keep, without the padding of the last block."""
        is_count = self.samples != decoded // channels  # libsndfile counts IMA ADPCM this way
        return self.samples if is_count and decoded - 2 * self.block < self.samples < decoded else decoded


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file for unbuffered reading, without waiting if it has become a pipe that has no writer.

    Raises:
        DamagedError: when it is not a regular file.
        OSError: when it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedError("is not a regular file")
    return io.FileIO(descriptor)


class Splice(io.RawIOBase):
    """File object that reads the pieces of a `Part` in sequence; with `endless`, it does not report its size."""

    def __init__(self, raw: io.FileIO, pieces: Sequence[bytes | range], *, endless: bool = False) -> None:
        self._raw, self._pieces, self._endless, self._position = raw, pieces, endless, 0
        self._starts = list(accumulate(map(len, pieces), initial=0))

    def readable(self) -> bool:
        """Always True."""
        return True

    def seekable(self) -> bool:
        """Always True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position and return it; for the end of an endless file, return −1, which FFmpeg reads as failure."""
        if whence == os.SEEK_END and self._endless:
            return -1
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read as many bytes into a buffer as it holds or as are left, and return their number."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._position < self._starts[-1]:
            index = bisect_right(self._starts, self._position) - 1
            rest = self._pieces[index][self._position - self._starts[index] :][: len(view) - done]
            count = len(rest)
            if isinstance(rest, range):
                self._raw.seek(rest.start)
                count = self._raw.readinto(view[done : done + count])
            else:
                view[done : done + count] = rest
            if not count:  # the file has become shorter
                break
            done, self._position = done + count, self._position + count
        return done


class FileBytes:
    """Random access to the bytes of a file, read in blocks."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw, self._start, self._block = raw, 0, b""
        self.size = os.fstat(raw.fileno()).st_size

    def at(self, start: int, count: int) -> bytes:
        """Return `count` bytes from `start` on, or fewer at the end of the file."""
        count = min(count, self.size - start)
        if start < 0 or count <= 0:
            return b""
        offset = start - self._start
        if offset < 0 or offset + count > len(self._block):
            self._raw.seek(start)
            self._start, self._block, offset = start, self._raw.read(max(count, 1 << 16)) or b"", 0
        return self._block[offset : offset + count]

    def unpack(self, format: str, start: int) -> tuple[Any, ...]:
        """Unpack the fields at `start` with `struct`; bytes after the end of the file read as zeros."""
        size = struct.calcsize(format)
        return struct.unpack(format, self.at(start, size).ljust(size, b"\0"))

    def next_file(self, start: int) -> int:
        """Return the first position from `start` on where another file begins, or the end of this one."""
        for block in range(start, self.size, 1 << 20):
            if found := FILE_START.search(self.at(block, (1 << 20) + 63)):
                return block + found.start()
        return self.size

    def skip_tags(self, start: int) -> int:
        """Return the position after tags (ID3, APE, Lyrics3) and zeros at `start`; zeros that begin a file are kept."""
        first = start
        while start < self.size:
            head = self.at(start, 32).ljust(32, b"\0")
            if head.startswith(b"ID3"):
                size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
                start += 10 + size + 10 * (head[5] >> 4 & 1)
            elif head.startswith(b"APETAGEX"):
                size, flags = struct.unpack("<I4xI", head[12:24])
                start += 32 + size * (flags >> 29 & 1)
            elif head.startswith(b"TAG"):
                start += 227 if head.startswith(b"TAG+") else 128
            elif head.startswith(b"LYRICSBEGIN") and (end := re.search(rb"LYRICS(200|END)", self.at(start, 1 << 20))):
                start += end.end()
            elif head.startswith(b"\0"):
                block = self.at(start, 512)
                start += len(block) - len(block.lstrip(b"\0"))
            else:
                break
        for zeros, head in ((3, b"\0{3}[\x08-\x80]ftyp"), (2, b"\0\0\1[\xb9-\xff]")):  # MP4, MPEG program stream
            if start - zeros >= first and re.match(head, self.at(start - zeros, 8)):
                return start - zeros
        return min(start, self.size)

    def cut_off_tags(self) -> None:
        """Subtract the tags at the end of the file (APE, ID3v1, Lyrics3) from its size."""
        while True:
            footer, length = self.at(self.size - 32, 32), 0
            if footer.startswith(b"APETAGEX"):
                size, flags = struct.unpack("<I4xI", footer[12:24])
                length = size + 32 * (flags >> 31)
            elif self.at(self.size - 128, 3) == b"TAG":
                length = 355 if self.at(self.size - 355, 4) == b"TAG+" else 128
            elif footer.endswith((b"LYRICS200", b"LYRICSEND")):
                block = self.at(max(0, self.size - (1 << 20)), 1 << 20)
                begin = block.rfind(b"LYRICSBEGIN")
                length = len(block) - begin if begin >= 0 else 0
            if not 0 < length < self.size:
                break
            self.size -= length
