"""The checkpoint in the package is what its card says: size, kind, and scores that can be had again."""

from __future__ import annotations

import json

import pytest

from bsmamba2 import ModelConfig
from bsmamba2.checkpoints import BUNDLED_CHECKPOINT, read_checkpoint
from bsmamba2.evaluation.evaluate import mean, score
from bsmamba2.synth.songs import excerpt, synthesise

CARD = json.loads(BUNDLED_CHECKPOINT.with_suffix(".json").read_text())


def test_it_fits_a_repository_and_says_what_it_is() -> None:
    assert BUNDLED_CHECKPOINT.stat().st_size < 10e6
    checkpoint = read_checkpoint(BUNDLED_CHECKPOINT)
    assert checkpoint.config == ModelConfig.preset("small", depth=4, dim=96, mask_expand=3)
    assert checkpoint.metadata["licence"].startswith("MIT")
    assert "synthesised" in checkpoint.metadata["title"]
    assert sum(part.numel() for part in checkpoint.state.values()) == CARD["weights"]


def test_the_score_on_the_real_excerpt_is_that_of_the_card() -> None:
    assert score(read_checkpoint(BUNDLED_CHECKPOINT).model(), excerpt()).model == pytest.approx(
        CARD["real"]["model"], abs=0.02
    )


@pytest.mark.slow
def test_the_scores_on_sparse_songs_are_those_of_the_card() -> None:
    model = read_checkpoint(BUNDLED_CHECKPOINT).model()
    row = next(row for row in CARD["by_occupancy"] if row["occupancy"] == 0.25)
    seed = CARD["seed_of_the_scored_songs"] + 1_000
    songs = [synthesise(seed + i, seconds=12.0, occupancy=0.25) for i in range(10)]
    assert mean([score(model, song) for song in songs], "model") == pytest.approx(row["model"], abs=0.02)
