"""WAV, RF64, BW64, W64, AIFF, CAF and AU files: find the sound, and check that all of it is there.

A sound chunk that extends past the end of the file is cut. A size field that includes the file's header, or that was
never written, is corrected for libsndfile, and all sound up to the end of the file is read. Sound after the sound
chunk is an error, because no size field shows where it ends.

Sources: EBU Tech 3306 (RF64), ITU-R BS.2088 (BW64).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from .source import CUT, FILE_START, DamagedError, FileBytes, Part


@dataclass(frozen=True)
class _Family:
    """Chunk layout of a file format: FFmpeg's name, offsets of the file's type and of the first chunk, `struct` codes
    of a chunk's id and size, alignment, and the id of the sound chunk."""

    format: str
    kind: int
    first: int
    id: str
    size: str
    align: int
    sound: bytes

    @property
    def head(self) -> int:
        """Size of a chunk's header, in bytes."""
        return struct.calcsize(self.id + self.size[1])


_WAV = _Family("wav", 8, 12, "<4s", "<I", 2, b"data")
_RIFX = _Family("wav", 8, 12, ">4s", ">I", 2, b"data")  # a WAV file with big-endian numbers
_AIFF = _Family("aiff", 8, 12, ">4s", ">I", 2, b"SSND")
_CAF = _Family("caf", 4, 8, ">4s", ">q", 1, b"data")
_W64 = _Family("w64", 24, 40, "<16s", "<Q", 8, b"data")  # its sizes include the chunk's header
_FAMILIES = {
    b"RIFF": _WAV, b"RF64": _WAV, b"BW64": _WAV, b"RIFX": _RIFX, b"FORM": _AIFF, b"caff": _CAF, b"riff": _W64
}  # fmt: skip
_ADPCM = (2, 0x11, 0x31)
"""WAV format tags (MS and IMA ADPCM, GSM 6.10) with blocks of equal length; the last block may be padded."""

_MP3 = 0x55

_KINDS = (b"WAVE", b"AIFF", b"AIFC", b"wave", b"\0\1\0\0")
_CHUNK_ID = re.compile(rb"[A-Za-z\xa9_][ -~]{3}")


def is_chunked(data: FileBytes, start: int) -> bool:
    """Whether one of these containers begins at `start`."""
    magic = data.at(start, 4)
    family = _FAMILIES.get(magic)
    return magic == b".snd" or (family is not None and data.at(start + family.kind, 4) in _KINDS)


def chunked_part(data: FileBytes, start: int) -> tuple[Part, int]:
    """Return the recording at `start` and the position of its end.

    Raises:
        DamagedError: when sound is missing, is in two chunks, or follows outside a chunk.
    """
    magic = data.at(start, 4)
    if magic == b".snd":
        return _au_part(data, start)
    family = _FAMILIES[magic]
    patches = {start: b"RF64"} if magic == b"BW64" else {}
    has_sound, has_size, wide, format_tag, block, samples, pos = False, True, 0, 0, 0, 0, start + family.first
    stop = data.size  # end of the bytes that libsndfile reads
    while pos + family.head <= data.size:
        id, size = _chunk(data, pos, family)
        if has_sound and FILE_START.match(data.at(pos, 64)):  # another file follows
            break
        if not _CHUNK_ID.match(id):
            if has_sound:
                _check_rest(data, pos)
            break
        body = pos + family.head
        if has_sound and id != b"LIST" and body + size > data.size:  # a cut chunk, or not a chunk
            break
        size_at, format = body - struct.calcsize(family.size), family.size
        if id == b"ds64":  # 64-bit sizes of the file and of the sound
            wide = body + 8
        elif id == b"LIST":  # libsndfile fails if its contents are padded to four bytes
            patches[pos] = b"JUNK"
        elif id == b"fmt ":
            format_tag, block = data.unpack(family.size[0] + "H16xH", body)
            block *= size >= 20 and format_tag in _ADPCM
        elif id == b"fact":
            (samples,) = data.unpack(family.size, body)
        elif id == family.sound:
            if has_sound:
                raise DamagedError("holds a second chunk of sound, of which players play the first; export it again")
            has_sound = True
            if wide and size == 0xFFFFFFFF:
                size_at, format = wide, "<Q"
                (size,) = data.unpack(format, wide)
            form = start + 8 + data.unpack(family.size, start + 4)[0] if family.first == 12 else 0
            kept, has_size = _sound_bytes(data, body, size, family, form)
            if kept != size:
                stored = kept + family.head * (family is _W64)
                patches[size_at] = struct.pack(format, min(stored, (1 << 8 * struct.calcsize(format)) - 1))
            if body + kept == data.size:
                pos = data.size
                break
            size = kept
        size = max(0, size)
        pos = _next(body, size, family)
        if has_sound and FILE_START.match(data.at(body + size, 64)):
            pos = body + size
            continue
        # Some writers pad to four bytes, others not at all.
        other = next((place for place in (body + size + -size % 4, body + size) if _is_chunk(data, place)), pos)
        if family.align == 2 and other != pos and not _is_chunk(data, pos):
            if other == body + size:
                stop = other if has_sound else stop
            elif not has_sound:
                patches[size_at] = struct.pack(format, other - body)
            pos = other
    end = min(pos, data.size) if has_sound else data.size
    pieces = _patched(start, min(end, stop), patches)
    with_libsndfile = format_tag != _MP3  # libsndfile claims more MP3 samples than it decodes
    return Part(pieces, family.format, 0.0, 0.0, samples, block, with_libsndfile, has_end=has_size), end


def _is_chunk(data: FileBytes, pos: int) -> bool:
    return bool(_CHUNK_ID.match(data.at(pos, 4)))


def _chunk(data: FileBytes, pos: int, family: _Family) -> tuple[bytes, int]:
    """Return a chunk's id, as four bytes, and the size of its contents."""
    id, size = data.unpack(family.id + family.size[1], pos)
    return id[:4], max(0, size - family.head) if family is _W64 else size


def _next(body: int, size: int, family: _Family) -> int:
    end = body + size
    return end + (-size if family is _W64 else -end) % family.align


def _sound_bytes(data: FileBytes, body: int, claimed: int, family: _Family, form: int) -> tuple[int, bool]:
    """Return the number of sound bytes from `body` on, and whether the size fields show where the sound ends.

    `claimed` is the size in the chunk's header, `form` the end of the file according to the file's header. Programs
    that write into a pipe leave a size of 0, or one at or just below 2^31, 2^32 or 2^64 (SoX: 0x7f000000).
    """
    there = data.size - body
    if claimed == 0:
        pos = body
        while pos + family.head <= data.size and _CHUNK_ID.match(data.at(pos, 4)):
            pos = _next(pos + family.head, max(0, _chunk(data, pos, family)[1]), family)
        return (0 if pos >= data.size else there), False  # only chunks follow, so there is no sound
    if 0 < claimed <= there:
        wrapped = family.align == 2 and there >= 1 << 32 and (there - claimed) % (1 << 32) == 0
        return there if wrapped else claimed, True  # a 32-bit size that overflowed
    over = claimed - there
    unwritten = (claimed + 0x10000) % (1 << 31) <= 0x10000 or abs(claimed - 0x7F000000) <= 64
    # The size may include the header. If the size of the whole file is right, nothing is missing.
    is_whole = over <= max(44, body) and 0 < form <= data.size
    if is_whole or unwritten or over in (8, body - 8, body):
        return there, is_whole and not unwritten
    raise DamagedError(CUT)


def _check_rest(data: FileBytes, end: int) -> None:
    """Raise DamagedError when bytes other than tags and zeros follow `end`."""
    if data.skip_tags(end) < data.size:
        raise DamagedError(f"holds {data.size - end:,} bytes after the sound that its head counts; export it again")


def _patched(start: int, end: int, patches: dict[int, bytes]) -> tuple[bytes | range, ...]:
    """Return the bytes from `start` to `end` as pieces, some replaced by `patches` (position → bytes)."""
    pieces: list[bytes | range] = []
    for place in sorted(place for place in patches if place < end):
        pieces += [range(start, place), patches[place]]
        start = place + len(patches[place])
    return *pieces, range(start, end)


def _au_part(data: FileBytes, start: int) -> tuple[Part, int]:
    body, size = data.unpack(">II", start + 4)
    kept, has_size = _sound_bytes(data, start + body, size or 0xFFFFFFFF, _AIFF, 0)
    end = start + body + kept
    if not FILE_START.match(data.at(end, 64)):
        _check_rest(data, end)
    pieces = _patched(start, end, {start + 8: struct.pack(">I", min(kept, 0xFFFFFFFF))})
    return Part(pieces, "au", libsndfile=True, has_end=has_size), end
