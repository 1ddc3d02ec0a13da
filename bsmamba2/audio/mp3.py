"""MP3 files that do not tell how long they are, made to tell it.

Of such a file libsndfile believes its size, tags and pictures included, over that of its first frame: a song that
begins with rich frames is cut, one that begins with a picture seems to be. A decoder trusts the count in a first frame
of Xing's kind, so one is put before the file's own.

Source: ISO/IEC 11172-3 and 13818-3, Layer III; and Xing's header as LAME writes it.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

OTHERS = (b"RIFF", b"RF64", b"riff", b"FORM", b"caff", b"fLaC", b"OggS")
"""How files begin that are no MP3, whatever they hold."""

KBPS = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),  # MPEG 2 and 2.5
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),  # MPEG 1
)
"""Kilobits a second by a header's four bits: 0 for free format, and for what is not allowed."""

KIND = 0xFFFE_0C00
"""The bits of a header that are the same in all frames of a song: version, layer and sample rate."""


def with_count(path: Path) -> io.RawIOBase | None:
    """An MP3 that does not tell how many frames it has, behind a frame that does; None for any other file.

    Closing it closes the file.

    Raises:
        OSError: when the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(4) in OTHERS:
            return None
        start = file.seek(0)
        while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:  # its size is four times seven bits
            size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
            start = file.seek(start + size + (20 if tag[5] & 0x10 else 10))
        start = next_frame(file, start, start + (1 << 16))
        if start < 0:
            return None
        file.seek(start)
        first = file.read(48)
        head = int.from_bytes(first[:4], "big")
        kind, has, count = (first[at : at + 4] for at in range(4 + side(head), 16 + side(head), 4))
        tells = kind in (b"Xing", b"Info")
        if tells and has[3:] and has[3] & 1 and any(count):
            return None
        if tells or first[36:40] == b"VBRI":  # no sound is in it
            start += frame_size(first)
        frames = count_frames(file, start, head)
    head = head & ~0xF200 | 0x1_E000  # the highest rate, no padding, no checksum
    frame = bytearray(frame_size(head.to_bytes(4, "big")))
    frame[:4] = head.to_bytes(4, "big")
    frame[4 + side(head) : 16 + side(head)] = b"Xing" + (1).to_bytes(4, "big") + frames.to_bytes(4, "big")
    return Behind(bytes(frame), path, start)


def side(head: int) -> int:
    """Bytes of side information behind a frame's header: half as many in MPEG 2 and 2.5, and in mono."""
    full, mono = head >> 19 & 3 == 3, head >> 6 & 3 == 3
    return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[full, mono]


def frame_size(header: bytes) -> int:
    """Bytes of the Layer III frame with a header of four bytes; 0 where that is none, or one of free format."""
    head = int.from_bytes(header[:4], "big")
    version, layer, kbps, rate = head >> 19 & 3, head >> 17 & 3, head >> 12 & 15, head >> 10 & 3
    if head >> 21 != 0x7FF or version == 1 or layer != 1 or kbps in (0, 15) or rate == 3:
        return 0
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144_000 if version == 3 else 72_000) * KBPS[version == 3][kbps] // hertz + (head >> 9 & 1)


def count_frames(file: BinaryIO, start: int, like: int) -> int:
    """How many frames of a header's kind there are from a place on, over all that lies between them."""
    count = 0
    while start >= 0:
        file.seek(start)
        size = frame_size(file.read(4))
        if size:
            count, start = count + 1, start + size
        else:
            start = next_frame(file, start, like=like)
    return count


def next_frame(file: BinaryIO, start: int, end: int | None = None, *, like: int = 0) -> int:
    """Where the next frame begins, before `end`, that another of its kind or the file's end follows; −1 for nowhere.

    With `like`, a header, both are of its kind.
    """
    size = os.fstat(file.fileno()).st_size
    end = size if end is None else min(end, size)
    while start < end:
        file.seek(start)
        block, at = file.read(min(1 << 16, end - start) + 3), -1
        while 0 <= (at := block.find(b"\xff", at + 1)) < len(block) - 3:
            header = block[at : at + 4]
            head, after = int.from_bytes(header, "big") & KIND, start + at + frame_size(header)
            if after > start + at and (not like or head == like & KIND):
                file.seek(after)
                if after == size or int.from_bytes(file.read(4), "big") & KIND == head:
                    return start + at
        start += max(1, len(block) - 3)
    return -1


class Behind(io.RawIOBase):
    """A few bytes, and behind them a file from a place on, as one file to read."""

    def __init__(self, head: bytes, path: Path, start: int) -> None:
        self._head, self._start, self._at = head, start, 0
        self._file = path.open("rb")
        self._size = len(head) + os.fstat(self._file.fileno()).st_size - start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill as much of `buffer` as there is."""
        view = memoryview(buffer).cast("B")
        part = self._head[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._file.seek(self._start + max(0, self._at - len(self._head)))
        done = len(part) + self._file.readinto(view[len(part) :])
        self._at += done
        return done

    def close(self) -> None:
        self._file.close()
        super().close()
