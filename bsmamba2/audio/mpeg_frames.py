"""Frames of MP1, MP2 and MP3 files, and the frame before them in which encoders count them (Xing, Info).

A file that ends within a frame, or holds fewer frames than it counts, is cut. More frames than it counts are read all.
Bytes between frames that are neither a tag nor zeros are damage.

Sources: ISO 11172-3 and 13818-3; the Xing and LAME tags as LAME writes them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .source import AGAIN, CUT, DamagedError, FileBytes, Part

_KBPS = {  # by MPEG 1 (or 2 and 2.5) and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


MOST_TAGS = 1000
"""Tags between the frames of one recording; a file with more is not an MP3 file."""


@dataclass(frozen=True)
class _Frame:
    """A frame by its header: bytes, samples, place of the tag, and what must be the same in the whole file."""

    size: int
    samples: int
    tag: int
    kind: tuple[int, int, int, bool]  # version, layer, rate, mono

    @property
    def rate(self) -> int:
        return self.kind[2]


@lru_cache(1 << 12)
def _frame(head: bytes) -> _Frame | None:
    """The frame that begins with these four bytes, if one does."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE0:
        return None
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    bit_rate, rate_index, padding = head[2] >> 4, head[2] >> 2 & 3, head[2] >> 1 & 1
    if version == 1 or layer == 4 or bit_rate in (0, 15) or rate_index == 3:
        return None
    mpeg1, mono = version == 3, head[3] >> 6 == 3
    rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    bits = 1000 * _KBPS[mpeg1, layer][bit_rate - 1]
    samples = 384 if layer == 1 else 1152 if mpeg1 or layer == 2 else 576
    size = (12 * bits // rate + padding) * 4 if layer == 1 else samples // 8 * bits // rate + padding
    side_info = 17 if mpeg1 == mono else 32 if mpeg1 else 9
    return _Frame(size, samples, 4 + side_info, (version, layer, rate, mono))


def first_frame(data: FileBytes, start: int) -> int | None:
    """Place of the first frame, with two more of its kind behind it, in the first 4 KB; None when there is none."""
    for match in re.finditer(rb"\xff[\xe0-\xff]", data.at(start, 4096)):
        pos = start + match.start()
        first = frame = _frame(data.at(pos, 4))
        for _ in range(2):
            if frame is not None and pos < data.size:
                pos = data.skip_tags(pos + frame.size)
                frame = _frame(data.at(pos, 4)) if pos < data.size else first
                frame = frame if frame and first and frame.kind == first.kind else None
        if frame is not None:
            return start + match.start()
    return None


def frame_parts(data: FileBytes, pos: int) -> Iterator[Part]:
    """Recordings in a file whose first frame is at `pos`: each frame that counts others begins one.

    Raises:
        DamagedError: when frames are missing or cut, or something other than tags is between them.
    """
    first = _frame(data.at(pos, 4))
    assert first is not None
    tag, ranges = b"", list[range]()
    frames = before = 0
    while pos < data.size:
        frame = _frame(data.at(pos, 4))
        seconds = (before + frames) * first.samples / first.rate
        if frame is None:
            after = data.skip_tags(pos)
            is_junk = after == pos or (after < data.size and _frame(data.at(after, 4)) is None)
            if is_junk or len(ranges) > MOST_TAGS:
                raise DamagedError(
                    f"is damaged or cut short after {seconds:.1f} s: neither a frame nor a tag follows; {AGAIN}"
                )
            pos = after
            continue
        if frame.kind != first.kind:
            raise DamagedError(f"changes its rate or channels after {seconds:.1f} s; split it there, or convert it")
        end = pos + frame.size
        if end > data.size:
            raise DamagedError(CUT)
        if data.at(pos + frame.tag, 4) in (b"Xing", b"Info") or data.at(pos + 36, 4) == b"VBRI":
            if frames:
                yield _part(ranges, tag, frames, first)
            tag, ranges, before, frames = data.at(pos, frame.size), [], before + frames, 0
        else:
            if ranges and ranges[-1].stop == pos:
                ranges[-1] = range(ranges[-1].start, end)
            else:
                ranges.append(range(pos, end))
            frames += 1
        pos = end
    yield _part(ranges, tag, frames, first)


def _part(ranges: list[range], tag: bytes, frames: int, first: _Frame) -> Part:
    """One recording: its tag is kept where it counts the frames right, so that delay and padding are trimmed."""
    samples = frames * first.samples
    if tag[36:40] == b"VBRI":  # a count of Fraunhofer's encoder, which decoders leave out
        if frames < int.from_bytes(tag[50:54], "big") - 1:
            raise DamagedError(CUT)
        tag = b""
    if tag:
        flags, counted, size = struct.unpack(">3xBII", tag[first.tag + 4 : first.tag + 16].ljust(12, b"\0"))
        counted, there = counted * (flags & 1), len(tag) + sum(map(len, ranges))
        if frames < counted - 1 or (frames == counted - 1 and flags & 2 and size > there):  # some count the tag, too
            raise DamagedError(CUT)
        if frames == counted:
            if flags & 2:
                tag = tag[: first.tag + 12] + struct.pack(">I", there) + tag[first.tag + 16 :]
            trimmed = 2 * 4095 + first.samples
            return Part((tag, *ranges), "mp3", max(0, samples - trimmed) / first.rate)
    return Part(tuple(ranges), "mp3", samples / first.rate)
