"""Evaluation protocols, and the published scores that are comparable under each.

A score has a meaning only together with its protocol: segment, overlap, dropped silent seconds, tracks, and mean or
median over tracks. `EvalProtocol` describes a protocol, `PROTOCOLS` has the named ones, and `compare` lists the
differences from the protocol of each published figure.

Book: "Measuring". Source of the figures: see `PUBLISHED`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import check_settings, setting

MUSDB = "MUSDB18-HQ test"
"""The 50 tracks of MUSDB18-HQ's test set."""

SOURCES = ("vocals", "instrumental")


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """Evaluation protocol. Checked on creation: `ValueError` names the field."""

    name: str
    segment: float = setting(8.0, "in seconds", within="(0, inf)")
    overlap: float = setting(0.0, "fraction of a segment that the next one also covers; 0: no window", within="[0, 1)")
    sources: tuple[str, ...] = ("vocals",)
    """Sources evaluated together, the target first: `vocals` (or the stem in question), and optionally `instrumental`,
    the mixture minus the target. Seconds with a silent source are dropped from the cSDR."""
    over_tracks: str = setting("mean", "average in the headline; both are always reported", ("mean", "median"))

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.name:
            raise ValueError("name='' must not be empty")
        if self.sources not in (SOURCES[:1], SOURCES):
            raise ValueError(f"sources={self.sources!r} must be {SOURCES[:1]} or {SOURCES}")


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        EvalProtocol(name="paper"),
        EvalProtocol(name="paper-median", over_tracks="median"),
        EvalProtocol(name="overlapping", overlap=0.5),
        EvalProtocol(name="two-sources", sources=SOURCES),
    )
}
"""`paper` is the authors' evaluation; every other protocol changes one setting."""

SEGMENTS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Segment lengths that the paper compares, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Published figures for vocals, in dB, with the stated parts of their protocol; None: not stated."""

    model: str
    source: str
    csdr: float | None
    usdr: float | None
    tracks: str = MUSDB
    segment: float | None = None
    overlap: float | None = None
    sources: tuple[str, ...] | None = None
    over_tracks: str | None = None


_README = "README of the authors' code (github.com/EuiYeonKim/BSMamba2)"
PUBLISHED = (
    Published(
        model="BSMamba2", source=_README, csdr=11.03, usdr=10.70, segment=8.0, overlap=0.0, sources=("vocals",)
    ),
    Published(
        model="BS-RoFormer, trained by the BSMamba2 authors", source=_README, csdr=10.47, usdr=10.29,
        segment=8.0, overlap=0.0, sources=("vocals",),
    ),
    Published(model="BS-RoFormer, 6 layers, MUSDB18-HQ only", source="arXiv:2309.02612", csdr=10.66, usdr=None),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Published figures and how their protocol differs; if it does not, they are comparable. A `note` is optional."""

    published: Published
    differs: tuple[str, ...]
    note: str


def compare(tracks: str, protocol: EvalProtocol) -> list[Comparison]:
    """Compare a protocol, on the track set named `tracks`, with the protocol of each published figure.

    An unstated choice of mean or median over tracks is a note, not a difference, because we report both.
    """

    def text(field: str, value: object) -> str:
        return f"{value:g} s" if field == "segment" else " + ".join(value) if isinstance(value, tuple) else str(value)

    ours = {"tracks": tracks} | {
        field: getattr(protocol, field) for field in ("segment", "overlap", "sources", "over_tracks")
    }
    comparisons = []
    for published in PUBLISHED:
        differs, note = [], ""
        for field, value in ours.items():
            theirs = getattr(published, field)
            if theirs is None and field == "over_tracks":
                note = "mean or median over tracks: not stated"
            elif theirs is None:
                differs.append(f"{field}: not stated there, {text(field, value)} here")
            elif theirs != value:
                differs.append(f"{field}: {text(field, theirs)} there, {text(field, value)} here")
        comparisons.append(Comparison(published, tuple(differs), note))
    return comparisons
