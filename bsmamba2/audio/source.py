"""Bytes of an audio file, as the modules that walk its container see them, and the recordings that they find in it."""

from __future__ import annotations

import io
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

AGAIN = "get the whole file again"
CUT = f"is cut short: its end is missing; {AGAIN}"


class DamagedError(Exception):
    """A file that is cut, damaged or contradicts itself: the message is what follows the file's name."""


@dataclass(frozen=True)
class Part:
    """One recording in a file; files joined end to end have several.

    Attributes:
        pieces: its bytes: ranges of the file, and bytes that stand in for others.
        decoder: `libsndfile`, or FFmpeg's name of the format, or "" where FFmpeg finds the format itself.
        seconds: sound that its pages or frames claim, 0 where they claim nothing.
        vorbis: whether it is Vorbis, whose channels have an order of their own.
    """

    pieces: tuple[bytes | range, ...]
    decoder: str = ""
    seconds: float = 0.0
    vorbis: bool = False


class Splice(io.RawIOBase):
    """File object that reads the pieces of a `Part` one after the other."""

    def __init__(self, raw: io.FileIO, pieces: Sequence[bytes | range]) -> None:
        self._raw, self._pieces, self._position = raw, pieces, 0
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
        """Set the position, and return it."""
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
        offset = start - self._start
        if offset < 0 or offset + count > len(self._block):
            self._raw.seek(start)
            self._start, self._block, offset = start, self._raw.read(max(count, 1 << 16)) or b"", 0
        return self._block[offset : offset + count]

    def unpack(self, format: str, start: int) -> tuple[Any, ...]:
        """Fields at `start`, by `struct`; zeros behind the end of the file."""
        size = struct.calcsize(format)
        return struct.unpack(format, self.at(start, size).ljust(size, b"\0"))

    def find(self, pattern: bytes, start: int) -> Iterator[int]:
        """Places of some bytes from `start` on."""
        for block in range(start, self.size, 1 << 20):
            found = self.at(block, (1 << 20) + len(pattern) - 1)
            yield from (block + match.start() for match in re.finditer(re.escape(pattern), found))

    def skip_tags(self, start: int) -> int:
        """First place from `start` on with neither a tag (ID3, APE, Lyrics3) nor zeros."""
        while start < self.size:
            head = self.at(start, 32).ljust(32, b"\0")
            if head.startswith(b"ID3"):
                size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
                start += 10 + size + 10 * (head[5] >> 4 & 1)
            elif head.startswith(b"APETAGEX"):
                size, flags = struct.unpack("<I4xI", head[12:24])
                start += 32 + size * (flags >> 29 & 1)
            elif head.startswith(b"TAG"):
                start += 128
            elif head.startswith(b"LYRICSBEGIN") and (end := re.search(rb"LYRICS(200|END)", self.at(start, 1 << 20))):
                start += end.end()
            elif head.startswith(b"\0"):
                block = self.at(start, 512)
                start += len(block) - len(block.lstrip(b"\0"))
            else:
                break
        return min(start, self.size)
