"""Does Mamba meet silence? The same small model with three sequence layers, trained alike, on ever sparser singing.

layer, seed → model → training → songs of every occupancy, in segments of every length → rows → all runs in one file

What is equal in two runs of one seed: the songs, the batches and their order, the number of steps, the optimiser, the
initial weights of everything but the sequence layers, and, within 1 %, the number of parameters of these. The songs
that are scored are the same for all runs, and the band of one song is the same at every occupancy.

Book: "Does Mamba meet silence?". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import hashlib
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
from ..model import BSMamba2
from ..separate import separate
from ..synth.songs import Song, songs, synthesise
from ..train import TrainConfig, Trainer
from ..training.run_dir import Run
from . import sequence_layers

MODEL = ModelConfig(
    dim=48,
    depth=1,
    freqs_per_bands=generate_bands(16, 513),
    sample_rate=16_000,
    n_fft=1024,
    hop_length=320,
    d_state=16,
    headdim=32,
    expand=2,
    mask_expand=2,
)
"""Smaller than the preset `small`, and at 16 kHz, which keeps most of a voice: a run takes two minutes on two cores."""

TEST_SEED = 2_000_000
"""Of the first song that is scored; the songs to learn from have other seeds."""

MEASURES = ("usdr", "vocal_segments", "leak", "onset")
"""The measures of a row: see `measure`."""

COLUMNS = ("song", "occupancy", "segment", *MEASURES, "mixture")
"""All fields of a row."""

ENTERING = (
    "bands", "config", "data", "dual_path", "kernels", "layers", "losses", "mamba2", "masks", "metrics", "model",
    "runs", "separate", "silence", "songs", "spectrogram", "ssd", "train",
)  # fmt: skip
"""Files of the module on which a run's numbers may depend."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """The parameters of one run; checked on creation, `ValueError` names the one that is wrong.

    Attributes:
        layer: one of `layers.KINDS`.
        seed: of the initial weights, the songs to learn from and the batches.
        steps: of the optimiser.
        lr: the highest learning rate, after a warm-up and before a half cosine to zero.
        segment: length of a training example, in seconds.
        batch: examples in a batch.
        songs: to learn from.
        seconds_per_song: their length.
        test_songs: to score, each at every occupancy.
        test_seconds: their length.
        occupancies: shares of the time that is sung in the songs that are scored.
        segments: lengths into which they are cut, in seconds.
        save_every: steps between two states that a stopped run goes on from.
    """

    layer: str = "mamba2"
    seed: int = 0
    steps: int = 300
    lr: float = 4e-3
    segment: float = 4.0
    batch: int = 2
    songs: int = 96
    seconds_per_song: float = 8.0
    test_songs: int = 8
    test_seconds: float = 16.0
    occupancies: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    segments: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    save_every: int = 50

    def __post_init__(self) -> None:
        for name in ("occupancies", "segments"):
            values = getattr(self, name)
            if isinstance(values, list):  # as JSON and YAML have it
                object.__setattr__(self, name, values := tuple(values))
            if not isinstance(values, tuple) or not values or not all(map(_is_positive, values)):
                raise ValueError(f"{name}={values!r} must be positive numbers, at least one")
            if len(set(values)) < len(values):
                raise ValueError(f"{name}={values!r} names one twice")
        if self.layer not in sequence_layers.KINDS:
            raise ValueError(f"layer={self.layer!r} must be one of {', '.join(sequence_layers.KINDS)}")
        for name in ("steps", "batch", "songs", "test_songs", "save_every", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        for name in ("lr", "segment", "seconds_per_song", "test_seconds"):
            if not _is_positive(getattr(self, name)):
                hint = "; in YAML write 1.0e-3, not 1e-3" if isinstance(getattr(self, name), str) else ""
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number{hint}")
        if max(self.occupancies) > 1:
            raise ValueError(f"occupancies={self.occupancies!r} must be shares, at most 1")
        if max(self.segments) > self.test_seconds:
            raise ValueError(f"segments={self.segments!r} must not be longer than test_seconds={self.test_seconds!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Experiment:
        """An experiment from names and values; `output_dir`, where its run lies, is passed over.

        Raises:
            ValueError: for a name that is no parameter, or a value out of range.
        """
        names = [one.name for one in dataclasses.fields(cls)]
        given = {name: value for name, value in values.items() if name != "output_dir"}
        if unknown := sorted(set(given) - set(names)):
            raise ValueError(f"unknown parameters {', '.join(unknown)}; known: {', '.join(names)}")
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """Names and values as JSON holds them."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# --- one run ----------------------------------------------------------------------------------------------


def build(experiment: Experiment) -> BSMamba2:
    """The untrained model: for one seed, all but the sequence layers begin with the same weights whatever the layer.

    Raises:
        ValueError: when the layer cannot be brought to the Mamba-2 mixer's size.
    """
    torch.manual_seed(experiment.seed)
    model = BSMamba2(MODEL, sequence_layer=sequence_layers.choose(experiment.layer, MODEL))
    torch.manual_seed(experiment.seed)
    first = BSMamba2(MODEL)
    shared = {name: part for name, part in first.state_dict().items() if ".mixer." not in name}
    model.load_state_dict(shared, strict=False)
    return model


def batches(experiment: Experiment) -> Remixer:
    """The supply of training examples; the layer has no part in it."""
    tracks = songs(
        experiment.songs,
        seed=experiment.seed,
        seconds=experiment.seconds_per_song,
        sample_rate=MODEL.sample_rate,
    )
    samples = round(experiment.segment * MODEL.sample_rate)
    return Remixer(tracks, samples, experiment.batch, seed=experiment.seed)


def start(experiment: Experiment, folder: Path) -> Run:
    """The run in its folder, from the beginning or taken up where it was (`bsmamba2.training.run_dir`).

    Raises:
        RunError: when the folder's run has other parameters.
    """
    config = TrainConfig(
        steps=experiment.steps,
        lr=experiment.lr,
        schedule="cosine",
        ema_decay=0.98,
        loss_hop=320,
        loss_windows=(2048, 1024, 512),
    )
    settings = {name: value for name, value in experiment.to_mapping().items() if name in _OF_TRAINING}
    settings["code"] = code()
    trainer = Trainer(build(experiment), config)
    return Run(folder, trainer, settings=settings, save_every=experiment.save_every, checkpoints=False)


_OF_TRAINING = ("layer", "seed", "segment", "batch", "songs", "seconds_per_song")


def scored_song(number: int, occupancy: float, seconds: float) -> Song:
    """Song `number` of those that are scored: another occupancy has the same band."""
    return synthesise(TEST_SEED + number, seconds=seconds, occupancy=occupancy, sample_rate=MODEL.sample_rate)


def measure(song: Song, estimate: Tensor) -> dict[str, float | None]:
    """What an estimate of a song's vocals is worth, in dB; none where a measure has nothing to say.

    - `usdr`: over the whole song, `metrics.usdr`;
    - `vocal_segments`: the same over what is left of the song without its silent regions;
    - `leak`: what is let through in the silent regions, relative to the mixture, `metrics.leak`;
    - `onset`: error in the 0.2 s after silence, the median over the song's onsets, `metrics.onsets`.

    Args:
        song: at any rate; its vocals are the reference.
        estimate: (c, samples).
    """
    voice, rate = song.vocals, song.sample_rate
    heard = torch.ones(song.samples, dtype=torch.bool)
    for first, end in metrics.silent_regions(voice, rate):
        heard[first:end] = False
    onsets = [one.error for one in metrics.onsets(voice, estimate, rate)]
    found = {
        "usdr": metrics.usdr(voice, estimate),
        "vocal_segments": metrics.usdr(voice[:, heard], estimate[:, heard]) if heard.any() else math.nan,
        "leak": metrics.leak(voice, estimate, song.mixture, rate).relative,
        "onset": statistics.median(onsets or [math.nan]),
    }
    return {name: round(value, 3) if math.isfinite(value) else None for name, value in found.items()}


def rows(model: BSMamba2, song: Song, number: int, occupancy: float, segments: Sequence[float]) -> list[dict[str, Any]]:
    """A song through the model, once for each segment length: segments end to end, nothing overlaps.

    Args:
        model: of one stem.
        song: at the model's rate.
        number, occupancy: what the rows are told apart by.
        segments: in seconds.
    """
    made = []
    for segment in segments:
        with torch.inference_mode():
            estimate = separate(model, song.mixture, segment=segment, overlap=0.0, batch=max(1, round(8 / segment)))[0]
        mixture = round(metrics.usdr(song.vocals, song.mixture), 3)
        row = {"song": number, "occupancy": occupancy, "segment": segment, **measure(song, estimate)}
        made.append({**row, "mixture": mixture})
    return made


def code() -> str:
    """Which code this is: the first 16 digits of the SHA-256 of the files in `ENTERING`."""
    here = Path(__file__).parent
    found = hashlib.sha256()
    for name in ENTERING:
        found.update((here / f"{name}.py").read_bytes())
    return found.hexdigest()[:16]


# --- all runs ---------------------------------------------------------------------------------------------


def columns(table: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns, which is how a file holds them: a third of the size."""
    return {name: [row[name] for row in table] for name in COLUMNS}


def read(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All rows of all runs, each with its `layer` and `seed`, after checking that they may be compared.

    Args:
        data: `{"runs": [...]}`, each what `notebooks/silence.ipynb` leaves in its `summary.json`.

    Raises:
        ValueError: naming what is missing, doubled or unequal: parameters but for layer and seed, the code, the number
            of parameters within `layers.TOLERANCE`, one run for each layer and seed, one row for each song, occupancy
            and segment.
    """
    runs = data.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError("the data hold no list of runs")
    for run in runs:
        lacking = [name for name in ("parameters", "layer_parameters", "code", "rows") if name not in run]
        if lacking:
            raise ValueError(f"a run lacks {', '.join(lacking)}")
    made = [Experiment.from_mapping(run["parameters"]) for run in runs]
    base = made[0]
    for one, run in zip(made, runs, strict=True):
        if dataclasses.replace(one, layer=base.layer, seed=base.seed) != base:
            raise ValueError(f"{one.layer}, seed {one.seed}, was run with other parameters than the first run")
        if run["code"] != runs[0]["code"]:
            raise ValueError(f"{one.layer}, seed {one.seed}, was run with other code than the first run")
    found = sorted((one.layer, one.seed) for one in made)
    wanted = sorted((layer, seed) for layer in sequence_layers.KINDS for seed in {one.seed for one in made})
    if found != wanted:
        raise ValueError(f"runs of {found}, and not one for each layer and seed: {wanted}")
    sizes = [run["layer_parameters"] for run in runs]
    if max(sizes) - min(sizes) > sequence_layers.TOLERANCE * min(sizes):
        raise ValueError(f"layers of {min(sizes)} to {max(sizes)} parameters are not equal within 1 %")
    grid = {(s, o, e) for s in range(base.test_songs) for o in base.occupancies for e in base.segments}
    all_rows = []
    for one, run in zip(made, runs, strict=True):
        if sorted(run["rows"]) != sorted(COLUMNS) or len({len(part) for part in run["rows"].values()}) != 1:
            raise ValueError(f"{one.layer}, seed {one.seed}: columns must be {', '.join(COLUMNS)}, of one length")
        table = [
            {"layer": one.layer, "seed": one.seed, **dict(zip(run["rows"], row, strict=True))}
            for row in zip(*run["rows"].values(), strict=True)
        ]
        places = [(row["song"], row["occupancy"], row["segment"]) for row in table]
        if set(places) != grid or len(places) != len(grid):
            raise ValueError(f"{one.layer}, seed {one.seed}: {len(places)} rows, and not one for each of {len(grid)}")
        all_rows += table
    return all_rows


def average(table: Sequence[Mapping[str, Any]], measure: str, by: Sequence[str]) -> dict[tuple[Any, ...], float]:
    """The mean of a measure over all rows that agree in the fields `by`: (their values) → mean.

    Rows that have nothing to say of it are left out; a group of such rows is absent.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in table:
        if row[measure] is not None:
            groups.setdefault(tuple(row[name] for name in by), []).append(row[measure])
    return {key: statistics.fmean(values) for key, values in groups.items()}


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
