"""The configuration: checked fields, presets and the way to JSON and back."""

from __future__ import annotations

import json
import re

import pytest

from bsmamba2 import ModelConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 2.5}, "dim=2.5"),
        ({"depth": True}, "depth=True"),
        ({"freqs_per_bands": (1, 2)}, "freqs_per_bands cover 3 bins"),
        ({"freqs_per_bands": "all"}, "freqs_per_bands='all'"),
        ({"stems": ()}, "stems"),
        ({"stems": ("a", "a")}, "twice"),
        ({"hop_length": 1500}, "hop_length=1500"),
        ({"headdim": 60}, "headdim=60"),
    ],
)
def test_a_bad_configuration_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**changes)


def test_configuration_round_trip_and_unknown_names() -> None:
    for preset in ("paper", "compact", "small"):
        config = ModelConfig.preset(preset)
        assert ModelConfig.from_mapping(json.loads(config.to_json())) == config
    with pytest.raises(ValueError, match="'tiny' is not one of paper, compact, small"):
        ModelConfig.preset("tiny")
    with pytest.raises(ValueError, match="unknown configuration field 'layers'"):
        ModelConfig.from_mapping({"layers": 6})
