"""Recordings in an audio file by its container, and whether the file holds all that its container claims.

A file is *cut* when a chunk, page, box or frame ends behind the end of the file, or when fewer samples are there than
it counts: that is an error. Where only a header is wrong and the sound is there, all of it is read. Files joined end
to end (`cat a.mp3 b.mp3`) give a `Part` for each.

Sources: RFC 9639 (FLAC), ISO 14496-12 (MP4), RFC 9559 (Matroska).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise

from .chunks import chunked_parts, is_chunked
from .mpeg_frames import first_frame, frame_parts
from .ogg import ogg_parts
from .source import CUT, DamagedError, FileBytes, Part

_EBML = b"\x1a\x45\xdf\xa3"
_ASF = b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"


MOST_PARTS = 1000
"""Recordings in one file: each is opened, so that a small file of very many would take long."""


def find_parts(raw: io.FileIO) -> list[Part]:
    """Recordings in a file, in order, by its contents and never by its name.

    Raises:
        DamagedError: for a file that is cut or damaged, or holds more than `MOST_PARTS` recordings.
    """
    parts = list(islice(_parts(FileBytes(raw)), MOST_PARTS + 1))
    if len(parts) > MOST_PARTS:
        raise DamagedError(f"holds more than {MOST_PARTS:,} recordings end to end; split it")
    return parts


def _parts(data: FileBytes) -> Iterable[Part]:
    start = data.skip_tags(0) if data.at(0, 3) in (b"ID3", b"APE") else 0
    head = data.at(start, 8)
    if is_chunked(data, start):
        return chunked_parts(data, start)
    if head.startswith(b"OggS"):
        return ogg_parts(data, start)
    if head.startswith(b"fLaC"):
        places = [start, *data.find(b"fLaC\0\0\0\x22", start + 4), data.size]
        return (_flac_part(data, *ends) for ends in pairwise(places))
    if head[4:] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
        return _mp4_parts(data, start)
    if head.startswith(_EBML):
        return _matroska_parts(data, start)
    if head.startswith(_ASF):
        return [_asf_part(data, start)]
    if head.startswith(b"RIFF") and data.size + 1 < start + 8 + data.unpack("<I", start + 4)[0] < 0xFFFFFFFF:
        raise DamagedError(CUT)  # an AVI
    if not head.startswith((b"RIFF", b"\0\0\1")):  # AVI and MPEG, whose frames lie in packets
        first = first_frame(data, data.skip_tags(start))
        if first is not None:
            return frame_parts(data, first)
    return [Part((range(data.size),))]


def _flac_part(data: FileBytes, start: int, end: int) -> Part:
    (fields,) = data.unpack(">Q", start + 18)  # rate, channels, bits, and samples: 0 where they are not known
    return Part((range(start, end),), "flac", (fields & (1 << 36) - 1) / max(1, fields >> 44))


def _mp4_parts(data: FileBytes, start: int) -> Iterator[Part]:
    """One part for each file of a chain; boxes must end within the file."""
    pos, has_index = start, False
    while pos + 8 <= data.size and data.skip_tags(pos) < data.size:
        size, kind = data.unpack(">I4s", pos)
        if size == 1:
            (size,) = data.unpack(">Q", pos + 8)
        if kind == b"ftyp" and has_index:  # another file follows, whose offsets begin there
            yield Part((range(start, pos),), "mp4")
            start, has_index = pos, False
        has_index = has_index or kind == b"moov"
        if size < 8 or not kind.isascii():  # to the end of the file, or no box
            break
        pos += size
        if pos > data.size:
            raise DamagedError(CUT)
    yield Part((range(start, data.size),), "mp4")


def _matroska_parts(data: FileBytes, start: int) -> Iterator[Part]:
    follows = True
    while follows:
        pos = start
        for _ in range(2):  # the head, and the segment
            width = 9 - (data.at(pos + 4, 1) or b"\1")[0].bit_length()
            unknown = (1 << 7 * width) - 1  # the size of a live stream
            size = int.from_bytes(data.at(pos + 4, width), "big") & unknown
            pos = data.size if size == unknown else pos + 4 + width + size
        if pos > data.size:
            raise DamagedError(CUT)
        follows = data.at(pos, 4) == _EBML
        yield Part((range(start, pos if follows else data.size),), "matroska")
        start = pos


def _asf_part(data: FileBytes, start: int) -> Part:
    pos = start
    while pos + 24 <= data.size and (size := data.unpack("<Q", pos + 16)[0]) >= 24:
        pos += size
    if pos > data.size:
        raise DamagedError(CUT)
    return Part((range(start, data.size),), "asf")
