"""Ogg files: find chained recordings, check the checksums of their pages, and read how much sound they claim.

A file that ends within a page or a packet is cut, and a file with a missing page or a wrong checksum is damaged. A
missing end-of-stream flag is not a fault, because recorders and live streams omit it.

Sources: RFC 3533 (Ogg), RFC 7845 (Opus in Ogg).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from .source import AGAIN, CUT, FILE_START, DamagedError, FileBytes, Part

_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_crc(page: bytes) -> int:
    """Compute the CRC-32 of an Ogg page whose CRC field is zero, by zlib's CRC-32 in reversed bit order."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


@dataclass
class _Stream:
    """A logical stream: first bytes, next page number, first and last granule position, last page and its flags."""

    head: bytes
    number: int
    first: int = -1
    last: int = -1
    page: range = range(0)
    flags: int = 0
    is_open: bool = False  # a packet continues on the next page

    @property
    def is_opus(self) -> bool:
        return self.head.startswith(b"OpusHead")

    @property
    def rate(self) -> int:
        """Granule positions per second; 0 for codecs that this module does not know."""
        if self.is_opus:
            return 48_000
        if self.head.startswith(b"\x01vorbis"):
            return int.from_bytes(self.head[12:16], "little")
        return int.from_bytes(self.head[27:30], "big") >> 4 if self.head.startswith(b"\x7fFLAC") else 0

    @property
    def is_sound(self) -> bool:
        return self.rate > 0 or self.head.startswith((b"Speex   ", b"fLaC", b"PCM     "))


def ogg_part(data: FileBytes, pos: int) -> tuple[Part, int]:
    """Return the recording at `pos`, one link of a chain, and the position of its end.

    Raises:
        DamagedError: when it is cut, a page is missing, or a checksum is wrong.
    """
    link, streams, begun = pos, dict[int, _Stream](), False
    while pos < data.size:
        head = data.at(pos, 27)
        if not head.startswith(b"OggS"[: len(head)]):
            if data.skip_tags(pos) == data.size or FILE_START.match(data.at(pos, 64)):
                break
            raise DamagedError(f"is damaged: no page begins at byte {pos:,}; {AGAIN}")
        lacing = data.at(pos + 27, head[26]) if len(head) == 27 else b""
        body = 27 + len(lacing)
        size = body + sum(lacing)
        if len(head) < 27 or len(lacing) < head[26] or pos + size > data.size:
            raise DamagedError(CUT)
        page = data.at(pos, size)
        flags, granule, serial, number, crc = struct.unpack("<BqIII", page[5:26])
        if ogg_crc(page[:22] + bytes(4) + page[26:]) != crc:
            raise DamagedError(f"is damaged: the page at byte {pos:,} fails its checksum; {AGAIN}")
        if flags & 2:  # begins a stream
            if begun:
                break
            streams[serial] = _Stream(page[body : body + 64], number)
        else:
            begun = True
        stream = streams.get(serial)
        # A recorded live stream lacks the pages between its header and its first sound.
        if stream is None or (number != stream.number and stream.last >= 0):
            raise DamagedError(f"is damaged: pages are missing before byte {pos:,}; {AGAIN}")
        if granule > 0:
            stream.first, stream.last = stream.first if stream.first >= 0 else granule, granule
        stream.number = (number + 1) & 0xFFFFFFFF
        stream.page, stream.flags, stream.is_open = range(pos, pos + size), flags, lacing[-1:] == b"\xff"
        pos += size
    return _part(data, link, pos, streams), pos


def _part(data: FileBytes, start: int, end: int, streams: dict[int, _Stream]) -> Part:
    """Build one link of a chain; its last page is flagged as the end, since decoders trim the last packet only then."""
    sound = [stream for stream in streams.values() if stream.is_sound]
    if any(stream.is_open for stream in sound):
        raise DamagedError(CUT)
    if len(sound) != 1:
        return Part((range(start, end),), "ogg")
    (stream,) = sound
    pieces: tuple[bytes | range, ...] = (range(start, end),)
    if not stream.flags & 4:
        page = bytearray(data.at(stream.page.start, len(stream.page)))
        page[5] |= 4
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", ogg_crc(bytes(page)))
        pieces = (range(start, stream.page.start), bytes(page), range(stream.page.stop, end))
    has_end = bool(stream.flags & 4)
    if len(streams) == 1 and stream.head.startswith(b"\x01vorbis"):  # next to a picture, FFmpeg decodes it
        return Part(pieces, "ogg", libsndfile=True, vorbis=True, has_end=has_end)
    # FFmpeg knows the start position of a recorded live stream, except in FLAC: there the first page is not counted.
    start = int.from_bytes(stream.head[10:12], "little") if stream.is_opus else 0  # samples that Opus skips
    start = stream.first if stream.head.startswith(b"\x7fFLAC") else start
    seconds = (stream.last - start) / stream.rate if stream.rate else 0.0
    return Part(pieces, "ogg", seconds, has_end=has_end)
