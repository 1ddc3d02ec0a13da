"""Protocols are checked, and published figures are compared under the same one only."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from eval_tracks import QUICK

from bsmamba2.evaluation.protocols import MUSDB, PROTOCOLS, compare


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name"),
        ({"segment": 0}, "segment=0"),
        ({"segment": math.nan}, "segment=nan"),
        ({"overlap": 1}, "overlap=1"),
        ({"sources": ("drums",)}, "sources"),
        ({"over_tracks": "mode"}, "over_tracks='mode'"),
    ],
)
def test_a_protocol_is_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


def test_published_figures_are_comparable_under_the_same_protocol_only() -> None:
    same = compare(MUSDB, PROTOCOLS["paper"])
    assert [one.differs for one in same[:2]] == [(), ()]
    assert same[0].note == "mean or median over tracks: not stated"
    assert same[0].published.csdr == 11.03
    assert any("segment: not stated there" in difference for difference in same[2].differs)
    for protocol, tracks, said in (
        (PROTOCOLS["overlapping"], MUSDB, "overlap: 0.0 there, 0.5 here"),
        (PROTOCOLS["two-sources"], MUSDB, "sources: vocals there, vocals + instrumental here"),
        (replace(PROTOCOLS["paper"], segment=4.0), MUSDB, "segment: 8 s there, 4 s here"),
        (PROTOCOLS["paper"], "two", "tracks: MUSDB18-HQ test there, two here"),
    ):
        assert compare(tracks, protocol)[0].differs == (said,)
