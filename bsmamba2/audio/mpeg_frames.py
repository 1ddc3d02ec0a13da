"""MP1, MP2, MP3 and AAC files: parse the frames, and the tag of MP3 encoders with the number of frames (Xing, Info).

A file that ends within a frame, or has fewer frames than its tag states, is cut. If it has more frames, all are read.

Sources: ISO 11172-3 and 13818-3; ISO 14496-3 (ADTS); the Xing and LAME tags as LAME writes them.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache

from .source import AGAIN, CUT, FILE_START, MOST_JUNK, DamagedError, FileBytes, Part

_KBPS = {  # keys: MPEG 1 (False: 2 or 2.5), layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_AAC_RATES = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000, 7_350)
_AAC = 4
"""Layer number that stands for AAC: in ADTS the two layer bits are 0."""

MOST_TAGS = 1000
"""Maximum number of gaps (tags or zeros) between the frames of one recording; a file with more is refused."""


@dataclass(frozen=True)
class _Frame:
    """A frame's header: size in bytes, samples, offset of the tag, and the properties shared by all frames."""

    size: int
    samples: int
    tag: int
    kind: tuple[int, int, int, int]  # version, layer, rate, mono (AAC: channels)

    @property
    def rate(self) -> int:
        return self.kind[2]


def _frame(head: bytes) -> _Frame | None:
    """Parse a frame's header from seven bytes; None if they hold none."""
    if len(head) < 7 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    if head[1] & 0xF6 != 0xF0:
        return _layer_frame(head[:4])
    rate_index, size = head[2] >> 2 & 15, int.from_bytes(head[3:6], "big") >> 5 & 0x1FFF
    if rate_index >= len(_AAC_RATES) or size < 9:
        return None
    channels = (head[2] & 1) << 2 | head[3] >> 6
    return _Frame(size, 1024 * (1 + (head[6] & 3)), size, (head[1] >> 3 & 1, _AAC, _AAC_RATES[rate_index], channels))


@lru_cache(1 << 12)
def _layer_frame(head: bytes) -> _Frame | None:
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate_index, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == _AAC or bit_rate in (0, 15) or rate_index == 3:
        return None
    mpeg1, mono = version == 3, head[3] >> 6 == 3
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _KBPS[mpeg1, layer][bit_rate - 1]
    samples = 384 if layer == 1 else 1152 if mpeg1 or layer == 2 else 576
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    side_info = 17 if mpeg1 == mono else 32 if mpeg1 else 9
    return _Frame(size, samples, 4 + side_info, (version, layer, rate, mono))


def first_frame(data: FileBytes, start: int, within: int = 4096) -> int | None:
    """Find the first frame in `within` bytes, followed by two more of its kind or the file's end; None if absent."""
    for match in re.finditer(rb"\xff[\xe0-\xff]", data.at(start, within)):
        place = pos = start + match.start()
        first = _frame(data.at(pos, 7))
        for _ in range(3):
            frame = _frame(data.at(pos, 7)) if pos < data.size else first
            if frame is None or first is None or frame.kind != first.kind or pos + frame.size > data.size > pos:
                break
            pos = data.skip_tags(pos + frame.size)
        else:
            return place
    return None


def check_junk(data: FileBytes, pos: int, seconds: float) -> None:
    """Check that the bytes from `pos` to the end, after `seconds` of sound, may be left out.

    Raises:
        DamagedError: when they may be damaged sound, because they exceed `MOST_JUNK` bytes or a frame begins in them.
    """
    if data.size - pos > MOST_JUNK or first_frame(data, pos, MOST_JUNK) is not None:
        where = f"after {seconds:.1f} s" if seconds else f"at byte {pos:,}"
        raise DamagedError(f"is damaged or cut short {where}: neither a frame nor a tag follows; {AGAIN}")


def frame_part(data: FileBytes, pos: int) -> tuple[Part, int]:
    """Return the recording whose first frame is at `pos`, and the position of its end; a later tag begins the next one.

    Raises:
        DamagedError: when frames are missing or cut.
    """
    frame = first = _frame(data.at(pos, 7))
    assert first is not None
    tag, ranges, frames, tags = b"", list[range](), 0, 0
    while pos < data.size:
        frame = _frame(data.at(pos, 7))
        after = pos if frame else data.skip_tags(pos)
        if after > pos and (after == data.size or _frame(data.at(after, 7))):
            pos, tags = after, tags + 1
            if tags > MOST_TAGS:
                raise DamagedError(f"holds more than {MOST_TAGS:,} gaps with neither a frame nor a tag; {AGAIN}")
            continue
        if frame is None or frame.kind != first.kind:
            break
        end = pos + frame.size
        if end > data.size:
            raise DamagedError(CUT)
        if data.at(pos + frame.tag, 4) in (b"Xing", b"Info") or data.at(pos + 36, 4) == b"VBRI":
            if tag or frames:
                break
            tag = data.at(pos, frame.size)
        else:
            if ranges and ranges[-1].stop == pos:
                ranges[-1] = range(ranges[-1].start, end)
            else:
                ranges.append(range(pos, end))
            frames += 1
        pos = end
    if frame is None and pos < data.size and not FILE_START.match(data.at(pos, 64)):
        check_junk(data, pos, frames * first.samples / first.rate)
    return _part(ranges, tag, frames, first), pos


def _part(ranges: list[range], tag: bytes, frames: int, first: _Frame) -> Part:
    """Build one recording; its tag is kept if its frame count is right, so that the decoder trims delay and padding."""
    seconds, has_end = frames * first.samples / first.rate, False
    if first.kind[1] == _AAC:  # its decoder may omit the first frames
        return Part(tuple(ranges), "aac", seconds, 2 * first.samples / first.rate, has_end=False)
    if tag[36:40] == b"VBRI":  # a tag of Fraunhofer's encoder, which decoders omit
        has_end = True
        if frames < int.from_bytes(tag[50:54], "big") - 1:
            raise DamagedError(CUT)
    elif tag:
        flags, counted, size = struct.unpack(">3xBII", tag[first.tag + 4 : first.tag + 16].ljust(12, b"\0"))
        counted, there = counted * (flags & 1), len(tag) + sum(map(len, ranges))
        if frames < counted - 1 or (frames == counted - 1 and flags & 2 and size > there):  # some count the tag too
            raise DamagedError(CUT)
        has_end = counted > 0
        if frames == counted:
            if flags & 2:
                tag = tag[: first.tag + 12] + struct.pack(">I", there) + tag[first.tag + 16 :]
            return Part((tag, *ranges), "mp3", seconds, (2 * 4095 + first.samples) / first.rate)
    return Part(tuple(ranges), "mp3", seconds, has_end=has_end)
