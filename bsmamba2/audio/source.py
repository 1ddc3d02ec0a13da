"""Bytes of an audio file, as the modules that walk its container see them, and the recordings that they find in it."""

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
"""Bytes at the end of a file that are left out with a message; more may be a damaged part of the sound."""

FILE_START = re.compile(
    rb"RIF[FX]....(?:WAVE|AVI )|(?:RF|BW)64....WAVE|riff\x2e\x91\xcf\x11|FORM....(?:AIF[FC]|8SVX|16SV)|caff\0[\x01\x02]"
    rb"|\.snd\0\0|fLaC\0\0\0\x22|OggS\0\x02|\0\0\0[\x08-\x80]ftyp|\x1a\x45\xdf\xa3[\x01-\xa3]"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|TTA1[\x01-\x03]\0|FLV\x01|MAC [\x80-\xff][\x0c-\x0f]|#!AMR"
    rb"|Creative Voice File\x1a|wvpk....[\x02-\x10]\x04",
    re.DOTALL,
)
"""First bytes of files, those kinds that begin with enough of them not to be found in sound by chance."""


class DamagedError(Exception):
    """A file that is cut, damaged or contradicts itself: the message is what follows the file's name."""


@dataclass(frozen=True)
class Part:
    """One recording in a file; files joined end to end have several.

    Attributes:
        pieces: its bytes: ranges of the file, and bytes that stand in for others.
        format: FFmpeg's name of the format.
        seconds: sound that its frames claim, or where its Ogg pages claim that it ends; 0 where they claim nothing.
        trimmed: how much of it decoders may leave out, in seconds: an encoder's delay and padding.
        samples: its length in samples, where its container counts them; 0 where it does not.
        block: samples in a block, where the last block may be filled up, and writers may add one more.
        libsndfile: whether libsndfile decodes it, where it can.
        vorbis: whether it is Vorbis, whose channels have an order of their own.
        has_end: whether the file shows where the sound ends: by a size, a count, or a mark.
        walked: whether the container was followed to its end, so that nothing else is among the pieces.
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
        """Samples that count of those decoded, which may fill up the last block."""
        is_count = self.samples != decoded // channels  # as libsndfile counts IMA ADPCM
        return self.samples if is_count and decoded - 2 * self.block < self.samples < decoded else decoded


def open_regular(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a file to read, unbuffered; at once, even if it became a pipe that nobody writes to.

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
    """File object that reads the pieces of a `Part` one after the other; with `endless`, it does not tell its size."""

    def __init__(self, raw: io.FileIO, pieces: Sequence[bytes | range], *, endless: bool = False) -> None:
        self._raw, self._pieces, self._endless, self._position = raw, pieces, endless, 0
        self._starts = list(accumulate(map(len, pieces), initial=0))

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, and return it; −1, FFmpeg's sign of failure, for the end of an endless file."""
        if whence == os.SEEK_END and self._endless:
            return -1
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes, and return their number."""
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
        """`count` bytes from `start` on, or as many as there are."""
        count = min(count, self.size - start)
        if start < 0 or count <= 0:
            return b""
        offset = start - self._start
        if offset < 0 or offset + count > len(self._block):
            self._raw.seek(start)
            self._start, self._block, offset = start, self._raw.read(max(count, 1 << 16)) or b"", 0
        return self._block[offset : offset + count]

    def unpack(self, format: str, start: int) -> tuple[Any, ...]:
        """Fields at `start`, by `struct`; zeros behind the end of the file."""
        size = struct.calcsize(format)
        return struct.unpack(format, self.at(start, size).ljust(size, b"\0"))

    def next_file(self, start: int) -> int:
        """Place from `start` on where another file begins, or the end of this one."""
        for block in range(start, self.size, 1 << 20):
            if found := FILE_START.search(self.at(block, (1 << 20) + 63)):
                return block + found.start()
        return self.size

    def skip_tags(self, start: int) -> int:
        """First place from `start` on with neither a tag (ID3, APE, Lyrics3) nor zeros, but those that begin a file."""
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
        """Take the tags at the end of the file (APE, ID3v1, Lyrics3) off its size, whether or not a head names them."""
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
