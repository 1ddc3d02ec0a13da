"""How figures are found, on a card: what may be compared with what.

A figure means something only together with its protocol: segment, overlap, which silent seconds are dropped, how
tracks are put together, and which tracks. `Protocol` is that card, `PROTOCOLS` the named ones, and `compare` names
every difference between ours and that of a published figure.

Book: "Measuring". Source of the figures: see `PUBLISHED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MUSDB = "MUSDB18-HQ test"
"""The 50 tracks of MUSDB18-HQ's test set."""

SOURCES = ("vocals", "rest")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How figures are found. Checked on creation: `ValueError` names the field.

    Attributes:
        name: of the card.
        segment: in seconds.
        overlap: share of a segment that the next one covers too; 0: end to end, no window.
        sources: what is evaluated together, the target first: `vocals`, and perhaps `rest`, the mixture less the
            vocals. A second in which one of them is silent is dropped from the cSDR.
        over_tracks: what the headline is, `mean` or `median`; both are always given.
    """

    name: str
    segment: float = 8.0
    overlap: float = 0.0
    sources: tuple[str, ...] = ("vocals",)
    over_tracks: str = "mean"

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name='' must say something")
        if not 0 < self.segment < math.inf:
            raise ValueError(f"segment={self.segment!r} must be a positive number of seconds")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap={self.overlap!r} must lie in [0, 1)")
        if self.sources not in (SOURCES[:1], SOURCES):
            raise ValueError(f"sources={self.sources!r} must be ('vocals',) or ('vocals', 'rest')")
        if self.over_tracks not in ("mean", "median"):
            raise ValueError(f"over_tracks={self.over_tracks!r} must be mean or median")


PROTOCOLS = {
    card.name: card
    for card in (
        Protocol(name="paper"),
        Protocol(name="paper-median", over_tracks="median"),
        Protocol(name="overlapping", overlap=0.5),
        Protocol(name="two-sources", sources=SOURCES),
    )
}
"""`paper` is what the authors' evaluation does; the others change one thing each."""

SEGMENTS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Segment lengths that the paper varies, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures from elsewhere, with as much of their protocol as is known; None: not said."""

    model: str
    source: str
    csdr: float | None
    usdr: float | None
    tracks: str | None
    segment: float | None
    overlap: float | None
    sources: tuple[str, ...] | None
    over_tracks: str | None


_README = "README of the authors' code (github.com/EuiYeonKim/BSMamba2)"
PUBLISHED = (
    Published(
        model="BSMamba2", source=_README, csdr=11.03, usdr=10.70,
        tracks=MUSDB, segment=8.0, overlap=0.0, sources=("vocals",), over_tracks=None,
    ),
    Published(
        model="BS-RoFormer, trained by the BSMamba2 authors", source=_README, csdr=10.47, usdr=10.29,
        tracks=MUSDB, segment=8.0, overlap=0.0, sources=("vocals",), over_tracks=None,
    ),
    Published(
        model="BS-RoFormer, 6 layers, MUSDB18-HQ only", source="arXiv:2309.02612", csdr=10.66, usdr=None,
        tracks=MUSDB, segment=None, overlap=None, sources=None, over_tracks=None,
    ),
)  # fmt: skip
"""Vocals, in dB."""


@dataclass(frozen=True)
class Comparison:
    """A published model beside ours.

    Attributes:
        published: its figures.
        differs: how its protocol differs from ours, or is not known; empty when they may be compared.
        note: what to keep in mind even then.
    """

    published: Published
    differs: tuple[str, ...]
    note: str


def compare(tracks: str, protocol: Protocol) -> list[Comparison]:
    """Each published model with the differences between its protocol and this one, on the tracks of this name.

    Where a figure does not say whether it is a mean or a median over tracks, that is a note and no difference: ours are
    given as both.
    """

    def text(field: str, value: object) -> str:
        return f"{value:g} s" if field == "segment" else " + ".join(value) if isinstance(value, tuple) else str(value)

    ours = {
        "tracks": tracks,
        **{f: getattr(protocol, f) for f in ("segment", "overlap", "sources", "over_tracks")},
    }
    found = []
    for published in PUBLISHED:
        differs, note = [], ""
        for field, here in ours.items():
            there = getattr(published, field)
            if there == here:
                continue
            if there is None and field == "over_tracks":
                note = "mean or median over tracks: not said"
            elif there is None:
                differs.append(f"{field}: not stated there, {text(field, here)} here")
            else:
                differs.append(f"{field}: {text(field, there)} there, {text(field, here)} here")
        found.append(Comparison(published, tuple(differs), note))
    return found
