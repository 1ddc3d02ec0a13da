"""The bundled checkpoint is as its card describes it: size, kind, and scores that can be measured again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bsmamba2 import ModelConfig
from bsmamba2.checkpoints import BUNDLED_CHECKPOINT, Checkpoint, CheckpointError, read_checkpoint
from bsmamba2.evaluation import mean, score
from bsmamba2.kernels import accelerate
from bsmamba2.synth import excerpt, synthesise
from bsmamba2.training.job import JobConfig

CARD = json.loads(BUNDLED_CHECKPOINT.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return read_checkpoint(BUNDLED_CHECKPOINT)


def test_it_fits_a_repository_and_says_what_it_is(checkpoint: Checkpoint) -> None:
    assert BUNDLED_CHECKPOINT.stat().st_size < 10e6
    assert checkpoint.config == ModelConfig.preset("small", depth=4, dim=96, mask_expand=3)
    assert checkpoint.metadata["licence"].startswith("MIT")
    assert "synthesised" in checkpoint.metadata["title"]
    assert sum(part.numel() for part in checkpoint.state.values()) == CARD["weights"]


@pytest.mark.parametrize("place", [9, 30_000, 1_000_000, -1])
def test_a_flipped_bit_in_it_is_noticed(place: int, tmp_path: Path) -> None:
    content = bytearray(BUNDLED_CHECKPOINT.read_bytes())
    content[place] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"flipped\.safetensors"):
        read_checkpoint(tmp_path / "flipped.safetensors")


def test_the_card_is_short_and_names_parameters_that_exist() -> None:
    assert BUNDLED_CHECKPOINT.with_suffix(".json").stat().st_size < 4_096
    assert CARD["parameters"].keys() <= {field.name for field in dataclasses.fields(JobConfig)}
    page = Path(__file__).parents[2] / CARD["page_data"]
    assert page.stat().st_size < 40_000
    assert all(len(points) <= 400 for points in json.loads(page.read_text())["loss"].values())


def test_the_score_on_the_real_excerpt_is_that_of_the_card(checkpoint: Checkpoint) -> None:
    assert score(checkpoint.model(), excerpt()).model == pytest.approx(CARD["real"]["model"], abs=0.02)


@pytest.mark.slow
def test_the_scores_on_sparse_songs_are_those_of_the_card(checkpoint: Checkpoint) -> None:
    model = checkpoint.model()
    accelerate(model)
    row = next(row for row in CARD["by_occupancy"] if row["occupancy"] == 0.25)
    seed = CARD["seed_of_the_scored_songs"] + 1_000
    songs = [synthesise(seed + i, seconds=12.0, occupancy=0.25) for i in range(10)]
    assert mean([score(model, song) for song in songs], "model") == pytest.approx(row["model"], abs=0.02)
