"""Does Mamba meet silence? One small model with each of three sequence layers, tested on ever sparser singing.

layer, seed → model → training → songs at every occupancy, in segments of every length → rows → all runs in one file

Two runs with the same seed share the songs, the batches and their order, the number of steps, the optimiser, and the
initial weights of everything but the sequence layers. Their sequence layers have equal numbers of parameters within
1 %. All runs are scored on the same songs, and a song has the same accompaniment at every occupancy.

Book: "Does Mamba meet silence?". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..bands import generate_bands
from ..config import ModelConfig
from ..data import Remixer
from ..kernels import accelerate
from ..model import BSMamba2
from ..separate import separate
from ..settings import COUNT, NOT_NEGATIVE, check_settings, setting
from ..synth import Song, synthesise, synthesise_songs
from ..train import TrainConfig, Trainer
from ..training.run_dir import RunDir
from . import sequence_layers

POSITIVE = "(0, inf)"
MODEL = ModelConfig(
    dim=48, depth=1, freqs_per_bands=generate_bands(16, 513), sample_rate=16_000, n_fft=1024, hop_length=320,
    d_state=16, headdim=32, expand=2, mask_expand=2,
)  # fmt: skip
"""Smaller than the preset `small`, and at 16 kHz, which keeps most of a voice; a run takes two minutes on two cores."""

TEST_SEED = 2_000_000
"""Seed of the first test song; the training songs have different seeds."""
METRICS = ("usdr", "vocal_usdr", "silence_leakage", "onset")
"""The metrics of a row; see `score`."""
COLUMNS = ("song", "occupancy", "segment", *METRICS, "mixture")
"""All fields of a row."""
COMPARED = ("mamba2", "lstm", "attention")
"""The sequence layers that the experiment compares, by their names in `sequence_layers.LAYERS`."""
SOURCES = (
    "bands.py", "config.py", "data.py", "dual_path.py", "losses.py", "mamba2.py", "masks.py", "metrics.py", "model.py",
    "separate.py", "settings.py", "spectrogram.py", "ssd.py", "train.py", "kernels", "synth", "training/run_dir.py",
    "experiments/sequence_layers.py", "experiments/silence.py",
)  # fmt: skip
"""Files and folders of the package that may affect the numbers of a run."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Parameters of one run, checked on creation; a `ValueError` names the wrong parameter."""

    layer: str = setting("mamba2", "the sequence layer", COMPARED)
    seed: int = setting(0, "of the initial weights, the training songs and the batches", within=NOT_NEGATIVE)
    steps: int = setting(300, "optimiser steps", within=COUNT)
    lr: float = setting(4e-3, "highest learning rate, between a warm-up and a half cosine to zero", within=POSITIVE)
    segment: float = setting(4.0, "length of a training example, in seconds", within=POSITIVE)
    batch: int = setting(2, "examples in a batch", within=COUNT)
    songs: int = setting(96, "training songs", within=COUNT)
    seconds_per_song: float = setting(8.0, "length of a training song", within=POSITIVE)
    test_songs: int = setting(8, "songs to score, each at every occupancy", within=COUNT)
    test_seconds: float = setting(16.0, "length of a test song", within=POSITIVE)
    occupancies: tuple[float, ...] = setting(
        (0.05, 0.1, 0.25, 0.5, 0.75, 1.0), "fractions of the test songs' duration that are sung", within="(0, 1]"
    )
    segments: tuple[float, ...] = setting(
        (1.0, 2.0, 4.0, 8.0, 16.0), "lengths into which the test songs are cut, in seconds", within=POSITIVE
    )
    save_every: int = setting(50, "steps between two saved states", within=COUNT)

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("occupancies", "segments"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} names one twice")
        if max(self.segments) > self.test_seconds:
            raise ValueError(f"segments={self.segments!r} must not be longer than test_seconds={self.test_seconds!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Experiment:
        """An experiment from names and values; `output_dir`, the folder of its run, is ignored.

        Raises:
            ValueError: for an unknown name, or a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: value for name, value in values.items() if name != "output_dir"}
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"unknown parameters {', '.join(unknown)}; known: {', '.join(names)}")
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """Names and values, which `from_mapping` accepts."""
        return dataclasses.asdict(self)


# --- one run ----------------------------------------------------------------------------------------------


def build(experiment: Experiment) -> BSMamba2:
    """The untrained model; with the same seed, its weights outside the sequence layers are equal for every layer.

    Raises:
        ValueError: if no width of the layer matches the Mamba-2 mixer's number of parameters.
    """
    torch.manual_seed(experiment.seed)
    model = BSMamba2(MODEL, sequence_layer=sequence_layers.make_layer(experiment.layer, MODEL))
    torch.manual_seed(experiment.seed)
    reference = BSMamba2(MODEL)
    shared = {name: weight for name, weight in reference.state_dict().items() if ".mixer." not in name}
    model.load_state_dict(shared, strict=False)
    return model


def batches(experiment: Experiment) -> Remixer:
    """The training batches, which do not depend on the layer."""
    tracks = synthesise_songs(
        experiment.songs, seed=experiment.seed, seconds=experiment.seconds_per_song, sample_rate=MODEL.sample_rate
    )
    return Remixer(tracks, round(experiment.segment * MODEL.sample_rate), experiment.batch, seed=experiment.seed)


def start(experiment: Experiment, folder: Path) -> RunDir:
    """Training run in its folder: new, or resumed from its last state (`bsmamba2.training.run_dir`).

    Raises:
        RunError: if the folder contains a run with different parameters.
    """
    config = TrainConfig(
        steps=experiment.steps, lr=experiment.lr, schedule="cosine", ema_decay=0.98,
        loss_hop=320, loss_windows=(2048, 1024, 512),
    )  # fmt: skip
    names = ("layer", "seed", "segment", "batch", "songs", "seconds_per_song")
    settings = {name: getattr(experiment, name) for name in names} | {"source_hash": source_hash()}
    model = build(experiment)
    accelerate(model)
    return RunDir(
        folder, Trainer(model, config), settings=settings, save_every=experiment.save_every, checkpoints=False
    )


def scored_song(number: int, occupancy: float, seconds: float) -> Song:
    """Test song `number`; its accompaniment is the same at every occupancy."""
    return synthesise(TEST_SEED + number, seconds=seconds, occupancy=occupancy, sample_rate=MODEL.sample_rate)


def score(song: Song, estimate: Tensor) -> dict[str, float | None]:
    """The metrics of an estimate of a song's vocals, in dB; None where a metric is not defined.

    `vocal_usdr` is the uSDR of the song without its silent regions. `onset` is the error in the first 0.2 s after a
    silence, as the median over the song's onsets. The song may have any sample rate; the estimate is (c, samples).
    """
    voice, rate = song.vocals, song.sample_rate
    sounding = torch.ones(song.samples, dtype=torch.bool)
    for first, end in metrics.silent_regions(voice, rate):
        sounding[first:end] = False
    onsets = [onset.error for onset in metrics.onsets(voice, estimate, rate)]
    values = {
        "usdr": metrics.usdr(voice, estimate),
        "vocal_usdr": metrics.usdr(voice[:, sounding], estimate[:, sounding]) if sounding.any() else math.nan,
        "silence_leakage": metrics.silence_leakage(voice, estimate, song.mixture, rate).relative,
        "onset": statistics.median(onsets or [math.nan]),
    }
    return {name: round(value, 3) if math.isfinite(value) else None for name, value in values.items()}


def score_segments(
    model: BSMamba2, song: Song, number: int, occupancy: float, segments: Sequence[float]
) -> list[dict[str, Any]]:
    """Separate and score a song once for each segment length, in seconds, without overlap: one row per length.

    The model must have one stem and the song's sample rate. Each row repeats the song's `number` and `occupancy`.
    """
    mixture = round(metrics.usdr(song.vocals, song.mixture), 3)
    rows = []
    for segment in segments:
        with torch.inference_mode():
            estimate = separate(model, song.mixture, segment=segment, overlap=0.0, batch=max(1, round(8 / segment)))[0]
        where = {"song": number, "occupancy": occupancy, "segment": segment}
        rows.append({**where, **score(song, estimate), "mixture": mixture})
    return rows


def source_hash() -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the files in `SOURCES`."""
    digest = hashlib.sha256()
    for path in (Path(__file__).parents[1] / name for name in SOURCES):
        sources = path.rglob("*") if path.is_dir() else [path]
        for source in sorted(source for source in sources if source.suffix in (".py", ".cpp", ".h")):
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


# --- all runs ---------------------------------------------------------------------------------------------


def to_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Convert rows to columns, which take a third of the space of rows in a JSON file."""
    return {name: [row[name] for row in rows] for name in COLUMNS}


def read_runs(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All rows of all runs, each with its `layer` and `seed`, after checking that the runs are comparable.

    `data` is `{"runs": [...]}`, each run as `notebooks/silence.ipynb` writes it into its `summary.json`.

    Raises:
        ValueError: if anything is missing, repeated or unequal. All runs must have the same source hash, and the same
            parameters other than layer and seed. The layers' numbers of parameters must be equal within
            `sequence_layers.BUDGET_TOLERANCE`. There must be one run for each layer and seed, with one row for each
            song, occupancy and segment.
    """
    runs = data.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError("the data hold no list of runs")
    for run in runs:
        lacking = [name for name in ("parameters", "layer_parameters", "source_hash", "rows") if name not in run]
        if lacking:
            raise ValueError(f"a run lacks {', '.join(lacking)}")
    experiments = [Experiment.from_mapping(run["parameters"]) for run in runs]
    base = experiments[0]
    grid = sorted(itertools.product(range(base.test_songs), base.occupancies, base.segments))
    all_rows = []
    for experiment, run in zip(experiments, runs, strict=True):
        label, columns = f"{experiment.layer}, seed {experiment.seed}", run["rows"]
        if dataclasses.replace(experiment, layer=base.layer, seed=base.seed) != base:
            raise ValueError(f"{label}, was run with other parameters than the first run")
        if run["source_hash"] != runs[0]["source_hash"]:
            raise ValueError(f"{label}, was run with other code than the first run")
        if sorted(columns) != sorted(COLUMNS) or len(set(map(len, columns.values()))) != 1:
            raise ValueError(f"{label}: columns must be {', '.join(COLUMNS)}, of one length")
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        if sorted((row["song"], row["occupancy"], row["segment"]) for row in rows) != grid:
            raise ValueError(f"{label}: {len(rows)} rows, and not one for each of {len(grid)}")
        all_rows += [{"layer": experiment.layer, "seed": experiment.seed, **row} for row in rows]
    present = sorted((experiment.layer, experiment.seed) for experiment in experiments)
    expected = sorted(itertools.product(COMPARED, {experiment.seed for experiment in experiments}))
    if present != expected:
        raise ValueError(f"runs of {present}, and not one for each layer and seed: {expected}")
    sizes = [run["layer_parameters"] for run in runs]
    if max(sizes) - min(sizes) > sequence_layers.BUDGET_TOLERANCE * min(sizes):
        raise ValueError(f"layers of {min(sizes)} to {max(sizes)} parameters are not equal within 1 %")
    return all_rows


def average(rows: Sequence[Mapping[str, Any]], metric: str, by: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """The mean of a metric over all rows with the same values of the fields `by`: (their values) → mean.

    Rows where the metric is None are left out; a group with no other rows is absent.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row[metric] is not None:
            groups.setdefault(tuple(row[name] for name in by), []).append(row[metric])
    return {key: statistics.fmean(values) for key, values in groups.items()}
