"""Find the recordings in an audio file from its container, and check that the file is complete.

A file is *cut* when a chunk, page, box or frame extends past the end of the file, or when it has fewer samples than it
states; this is an error. If only a header is wrong and the sound is complete, all of it is read. Files joined end to
end (`cat a.mp3 b.mp3`) yield one `Part` each.

Sources: RFC 9639 (FLAC), ISO 14496-12 (MP4), RFC 9559 (Matroska), ISO 13818-1 (MPEG streams).
"""

from __future__ import annotations

import io
import struct

from .chunks import chunked_part, is_chunked
from .mpeg_frames import check_junk, first_frame, frame_part
from .ogg import ogg_part
from .source import CONVERT, CUT, FILE_START, DamagedError, FileBytes, Part

MOST_PARTS = 1000
"""Maximum number of recordings in one file: each is opened, so a small file with very many would take long."""

_FORMATS = {
    b"fLaC": "flac", b"wvpk": "wv", b"TTA1": "tta", b"MAC ": "ape", b"FLV\1": "flv", b"AVI ": "avi",
    b"\x1a\x45\xdf\xa3": "matroska", b"\x30\x26\xb2\x75": "asf",
}  # fmt: skip
"""First bytes of a file → FFmpeg's name of its format."""

_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp", b"moof", b"mfra", b"sidx", b"uuid")

_HEAD, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
_ELEMENTS = (
    *(_HEAD, _SEGMENT, _CLUSTER, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1941A469, 0x1043A770, 0x1254C367),
    *(0xEC, 0xBF, 0xE7, 0x5854, 0xA7, 0xAB, 0xA3, 0xA0, 0xAF),
)
"""IDs of the Matroska elements that may follow each other in a file, in a segment and in a cluster."""


def find_parts(raw: io.FileIO) -> tuple[list[Part], range]:
    """Return the recordings in a file, in order, and the range of junk after them; the file's name does not matter.

    Raises:
        DamagedError: for a file that is cut or damaged, has an unsupported format, or has more than `MOST_PARTS`
            recordings.
    """
    data, parts = FileBytes(raw), list[Part]()
    start = data.skip_tags(0) if data.at(0, 3) in (b"ID3", b"APE") else 0
    if not is_chunked(data, start):
        data.cut_off_tags()
    while start < data.size or not parts:
        found = _find_part(data, start, 2 if parts else 4096)
        if found is None:
            if not parts or FILE_START.match(data.at(start, 64)):
                raise DamagedError(f"cannot be read as audio: its format is not supported; {CONVERT}")
            check_junk(data, start, sum(part.seconds for part in parts))
            return parts, range(start, data.size)
        if len(parts) == MOST_PARTS:
            raise DamagedError(f"holds more than {MOST_PARTS:,} recordings end to end; split it")
        parts.append(found[0])
        start = data.skip_tags(found[1])
    return parts, range(0)


def _find_part(data: FileBytes, start: int, within: int) -> tuple[Part, int] | None:
    """Return the recording at `start` and the position of its end; None for an unsupported format.

    MP3 and AAC frames may begin up to `within` bytes later.
    """
    if is_chunked(data, start):
        return chunked_part(data, start)
    head = data.at(start, 12)
    if head.startswith(b"OggS"):
        return ogg_part(data, start)
    if head[4:8] in _MP4_BOXES:
        end = _mp4_end(data, start)
        return Part((range(start, end),), "mp4"), end
    format, end, has_end = _FORMATS.get(head[8:] if head.startswith(b"RIFF") else head[:4], ""), 0, False
    if format == "matroska":
        end, has_end = _matroska_end(data, start)
    elif format in ("asf", "avi"):
        end = _boxes_end(data, start)
        has_end = end > 0
    elif format == "flv":
        end = _flv_end(data, start)
    elif not format and (end := _packets_end(data, start)):
        format = "mpeg" if head.startswith(b"\0\0\1") else "mpegts"
    if end:
        return Part((range(start, end),), format, has_end=has_end), end
    if not format:
        first = first_frame(data, data.skip_tags(start), within)
        return None if first is None else frame_part(data, first)
    # The end of these formats is known only after decoding. Each block of WavPack begins like a file.
    end = data.size if format == "wv" else data.next_file(start + 4)
    seconds = 0.0
    if format == "flac":
        (fields,) = data.unpack(">Q", start + 18)  # rate, channels, bits, and samples (0 if not known)
        seconds = (fields & (1 << 36) - 1) / max(1, fields >> 44)
    return Part((range(start, end),), format, seconds, has_end=seconds > 0, walked=False), end


def _mp4_end(data: FileBytes, start: int) -> int:
    """Return the end of the boxes: the end of the file, the start of another file, or of bytes that are not a box."""
    pos, kinds = start, set[bytes]()
    while pos + 8 <= data.size:
        size, kind = data.unpack(">I4s", pos)
        if size == 1:
            (size,) = data.unpack(">Q", pos + 8)
        if kind == b"ftyp" and b"moov" in kinds:  # another file; its offsets count from here
            break
        if kind == b"moov" and kind in kinds:  # of a second file without an ftyp box
            raise DamagedError("holds a second recording, of which players play the first; split it")
        if size == 0 and kind in _MP4_BOXES:  # the box extends to the end of the file
            return data.size
        is_cut = pos + size > data.size
        if size < 8 or not kind.isalnum() or (is_cut and kind not in _MP4_BOXES and {b"moov", b"mdat"} <= kinds):
            break
        if is_cut:
            raise DamagedError(CUT)
        kinds.add(kind)
        pos += size
    return pos


def _matroska_end(data: FileBytes, start: int) -> tuple[int, bool]:
    """Return the end of the segment, and whether all sizes are known; a live stream's segment has no size."""
    pos, has_end, seen = start, True, set[int]()
    while pos < data.size:
        width = 9 - data.at(pos, 1)[0].bit_length()
        id, size_at = int.from_bytes(data.at(pos, width), "big"), pos + width
        if id not in _ELEMENTS or (id in (_HEAD, _SEGMENT) and id in seen):
            break
        seen.add(id)
        width = 9 - (data.at(size_at, 1) or b"\1")[0].bit_length()
        size = int.from_bytes(data.at(size_at, width), "big") & (unknown := (1 << 7 * width) - 1)
        pos = size_at + width
        if id in (_SEGMENT, _CLUSTER) and size == unknown:
            has_end = False
            continue
        pos += size
        if id == _SEGMENT:
            break
    if pos > data.size:
        raise DamagedError(CUT)
    return pos, has_end


def _flv_end(data: FileBytes, start: int) -> int:
    """Return the end of the tags of an FLV file, each followed by its size; 0 for other files."""
    if data.at(start, 4) != b"FLV\1":
        return 0
    pos = start + 13
    while data.at(pos, 1) in (b"\x08", b"\x09", b"\x12"):
        pos += 15 + int.from_bytes(data.at(pos + 1, 3), "big")
    if pos > data.size:
        raise DamagedError(CUT)
    return pos


def _packets_end(data: FileBytes, start: int) -> int:
    """Return the end of the packets of an MPEG transport or program stream; 0 if it is neither.

    Raises:
        DamagedError: when one audio stream ends before another begins, because FFmpeg reads only one.
    """
    places: dict[int, range] = {}  # positions of each audio stream
    for place, size in ((0, 188), (4, 192)):  # .ts; .m2ts has a timestamp before each packet
        pos = start
        while (packet := data.at(pos + place, 188)).startswith(b"G"):
            stream, flags, more = struct.unpack(">HBB", packet[1:5].ljust(4, b"\0"))
            head = packet[5 + more if flags & 0x20 else 4 :][:4]
            if stream & 0x4000 and b"\0\0\1\xbd" <= head < b"\0\0\1\xe0":
                places[stream] = range(places.get(stream, range(pos, pos)).start, pos)
            pos += size
        if pos > start + 3 * size:
            _check_places(places)
            return min(pos, data.size)
    pos = start
    while data.at(pos, 4) >= b"\0\0\1\xb9" and data.at(pos, 3) == b"\0\0\1":
        kind, size, flags, offset, stuffing = data.unpack(">3xBHBxB4xB", pos)
        is_private = kind == 0xBD and flags >> 6 == 2  # AC-3, DTS and PCM share this number in MPEG-2
        stream = data.unpack(">B", pos + 9 + offset)[0] if is_private else kind
        if stream in range(0x80, 0xA8) or kind in range(0xC0, 0xE0):
            places[stream] = range(places.get(stream, range(pos, pos)).start, pos)
        is_mpeg2 = size >> 14 == 1
        pos += {0xB9: 4, 0xBA: 14 + stuffing % 8 if is_mpeg2 else 12}.get(kind, 6 + size)
        pos = data.skip_tags(pos)
    _check_places(places)
    return min(pos, data.size) if pos > start else 0


def _check_places(places: dict[int, range]) -> None:
    longest = max(places.values(), key=len, default=range(0))
    if any(place.start > longest.stop or place.stop < longest.start for place in places.values()):
        raise DamagedError("holds recordings end to end, as streams of their own; split it, or convert it to WAV")


def _boxes_end(data: FileBytes, start: int) -> int:
    """Return the end of the lists of an AVI file or the objects of a WMA file; 0 if no size was written."""
    pos, head = start, data.at(start, 4)
    id_size, format, counted = (4, "<I", 0) if head == b"RIFF" else (16, "<Q", 24)
    while pos + 24 <= data.size and (counted or data.at(pos, 4) + data.at(pos + 8, 3) == b"RIFFAVI"):
        (size,) = data.unpack(format, pos + id_size)
        if size <= counted or size == 0xFFFFFFFF or (pos > start and FILE_START.match(data.at(pos, 64))):
            break
        pos += size if counted else 8 + size + size % 2
    if pos > data.size + (not counted):
        raise DamagedError(CUT)
    return min(pos, data.size) if pos > start else 0
