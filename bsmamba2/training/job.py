"""A training run from its parameters: what the command line and the training notebook have in common.

parameters → songs or files → model → trainer → run

Book: "Scaling up".
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
import typing
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import read_checkpoint
from ..config import PRESETS, ModelConfig
from ..data import Loader, Remixer, Validation, Windows, find_windows
from ..evaluation.evaluate import sha256_file
from ..kernels import triton
from ..losses import WINDOWS
from ..model import BSMamba2
from ..synth.songs import STEMS, Song, songs
from ..train import TrainConfig, Trainer
from .datasets import DataError, Progress, cache_of, index_dataset, musdb_sample, scan
from .distributed import all_gather_object, broadcast_object, local_rank_and_size, rank, world_size
from .growth import begin_with
from .run_dir import Run

HELD_OUT = 1_000_000
"""How far the seed of the synthesised songs for validation lies from that of the songs to learn from."""
_RECORDED = ("preset", "seed", "segment", "batch", "coherent_mix_prob", "augment_prob")
_AT_A_TIME = 16
"""Songs that a process holds while it writes them to a file; a heap may keep for good what it once had."""
LATER = ("coherent_mix_prob", "soundfont_share", "clean_share", "augment_prob")
"""Parameters that runs recorded as soon as there were any: where a run has none, it was started with the default."""


def _parameter(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Every parameter of a training run, with its type, default and meaning; checked on creation.

    Raises:
        ValueError: for a value of another type, or out of range; it names the parameter.
    """

    preset: str = _parameter("small", f"size of the model: {', '.join(PRESETS)}")
    depth: int = _parameter(0, "dual-path layers; 0 is as many as the preset has")
    dim: int = _parameter(0, "features per band and frame; 0 is as many as the preset has")
    mask_expand: int = _parameter(0, "hidden width of the masks as a multiple of dim; 0 is that of the preset")
    init: str = _parameter(
        "", "checkpoint to begin with, ours or published, of the same size or smaller; else random weights"
    )
    data: str = _parameter("songs", "`songs`: synthesised ones; `musdb-sample`; or a folder, MUSDB18-HQ for one")
    stems: tuple[str, ...] = _parameter(STEMS, "names of the files in a song's folder, the target first")
    on_bad_file: str = _parameter("stop", "files that cannot be used: stop, or skip their songs")
    songs: int = _parameter(160, "synthesised songs to learn from")
    seconds_per_song: float = _parameter(6.0, "length of each")
    val_songs: int = _parameter(12, "synthesised songs for validation, from other seeds")
    mix_variety: float = _parameter(
        0.0, "most of the synthesised mixes, 0 (clean, loud voice) to 1 (as recordings may be)"
    )
    soundfont: str = _parameter("", "file of a sound font, whose recorded instruments play in synthesised songs")
    soundfont_share: float = _parameter(1.0, "share of these songs in which it plays")
    clean_share: float = _parameter(0.0, "share of the synthesised songs with neither variety nor sound font")
    coherent_mix_prob: float = _parameter(
        0.0, "share of examples whose stems are of one song and place; published: none, each stem from any"
    )
    augment_prob: float = _parameter(
        0.0, "share of examples whose stems change in speed, spectrum, sides; published: none"
    )
    segment: float = _parameter(1.0, "length of a training example, in seconds; published: 8")
    batch: int = _parameter(4, "examples in a batch of one process; published: 5")
    grad_accum_steps: int = _parameter(1, "batches in an optimiser step; published: 6, in each of 2 processes")
    steps: int = _parameter(400, "optimiser steps; 100 are a published epoch")
    optimiser: str = _parameter("adamw", "adamw, as published; or muon, which may take fewer steps")
    lr: float = _parameter(2e-3, "learning rate; published: 5e-4")
    schedule: str = _parameter("cosine", "constant, as published; cosine, for short runs; trapezoid, for open ends")
    decay_ratio: float = _parameter(0.2, "share of a trapezoid's steps over which the rate falls to zero, at their end")
    weight_decay: float = _parameter(0.01, "how far weights are drawn to zero")
    max_grad_norm: float = _parameter(3.0, "largest norm of the gradient")
    ema_decay: float = _parameter(0.98, "of the moving average of the weights, per step; published: 0.999")
    loss: str = _parameter("published", "published; or snr, the error's energy in dB, whose fall the scores reward")
    loss_hop: int = _parameter(441, "samples between frames of the published loss; its own: 147, thrice the work")
    loss_windows: tuple[int, ...] = _parameter(WINDOWS, "of the published loss; cheaper: 2048 1024 512")
    precision: str = _parameter("float32", "float32, or bfloat16 as published, for what has such products")
    gradient_checkpointing: bool = _parameter(False, "compute layers twice to need less memory")
    compile: bool = _parameter(False, "try the native kernel on a CPU, torch.compile elsewhere")
    workers: int = _parameter(
        0, "processes that read ahead. With 0, examples come from one stream of random numbers; else by number"
    )
    seed: int = _parameter(0, "of the weights, the songs and the examples")
    save_every: int = _parameter(100, "steps between states")
    validate_every: int = _parameter(100, "steps between validations")
    validation_windows: int = _parameter(1200, "most stretches of song in a validation")
    tensorboard: bool = _parameter(False, "write curves for TensorBoard too")
    device: str = _parameter("auto", "auto, cpu, cuda or mps")
    output_dir: str = _parameter("runs/first", "folder of the run; a run that is there already is taken up again")

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind in (tuple[int, ...], tuple[str, ...]):
                if isinstance(value, list):  # as JSON and YAML have it
                    object.__setattr__(self, name, tuple(value))
                elif not isinstance(value, tuple):
                    raise ValueError(f"{name}={value!r} must be a list, as its default {list(_default(name))!r} is")
                continue  # the items are looked at below
            fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
            if not fits or (isinstance(value, bool) and kind is not bool):
                hint = "; in YAML write 1.0e-3, not 1e-3" if kind is float and isinstance(value, str) else ""
                raise ValueError(f"{name}={value!r} must be {_KINDS[kind]}, as its default {_default(name)!r} is{hint}")
        for name in ("songs", "val_songs", "batch", "save_every", "validate_every", "validation_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative")
        for name in ("seconds_per_song", "segment"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number of seconds")
        for name in ("mix_variety", "soundfont_share", "clean_share", "coherent_mix_prob", "augment_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must lie in [0, 1]")
        if self.on_bad_file not in ("stop", "skip"):
            raise ValueError(f"on_bad_file={self.on_bad_file!r} must be stop or skip")
        if len(self.stems) < 1 or not all(isinstance(stem, str) for stem in self.stems):
            raise ValueError(f"stems={self.stems!r} must be names")
        if self.data in ("songs", "musdb-sample") and self.stems != STEMS:
            raise ValueError(f"stems={self.stems!r} are those of a folder; data={self.data!r} has {STEMS!r}")
        self.model_config  # noqa: B018  # each checks its own
        self.train_config  # noqa: B018

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> JobConfig:
        """A recipe from names and values; ValueError for a name that is no parameter."""
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise ValueError(f"unknown parameters {', '.join(unknown)}; known: {', '.join(cls.names())}")
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        """The parameters' names."""
        return [one.name for one in dataclasses.fields(cls)]

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        asked = {name: getattr(self, name) for name in ("depth", "dim", "mask_expand")}
        asked = {name: value for name, value in asked.items() if value}
        return ModelConfig.preset(self.preset, **asked, stems=self.stems[:1])

    @property
    def train_config(self) -> TrainConfig:
        """The loop's part of the parameters."""
        return TrainConfig(**{one.name: getattr(self, one.name) for one in dataclasses.fields(TrainConfig)})

    @property
    def song_settings(self) -> dict[str, Any]:
        """How its songs are synthesised: what `songs.songs` takes besides their number and their seed.

        The seed is `seed` for those to learn from, and `seed + HELD_OUT` for the others.
        """
        names = ("mix_variety", "soundfont", "soundfont_share", "clean_share")
        rate = self.model_config.sample_rate
        return {"seconds": self.seconds_per_song, "sample_rate": rate} | {name: getattr(self, name) for name in names}

    @property
    def samples(self) -> int:
        """Length of a training example."""
        return round(self.segment * self.model_config.sample_rate)

    def windows(self, progress: Progress = lambda files: files) -> tuple[Windows, Windows]:
        """Where stems are heard, in what to learn from and in what to validate with; the first process looks.

        Raises:
            DataError: for faults in a folder, all at once, with `on_bad_file="stop"`; with `skip` it is a warning.
        """
        config = self.model_config
        if self.data == "songs":
            parts = [
                shared_songs(count, seed=seed, **self.song_settings)
                for count, seed in ((self.songs, self.seed), (self.val_songs, self.seed + HELD_OUT))
            ]
            return find_windows(parts[0], self.samples), find_windows(parts[1], self.samples)
        if self.data == "musdb-sample":
            first = local_rank_and_size()[0] == 0
            excerpts = musdb_sample(self.samples) if first else None  # fetches them; the others find them there
            all_gather_object(None)
            excerpts = excerpts or musdb_sample(self.samples)
            return find_windows(excerpts[0], self.samples), find_windows(excerpts[1], self.samples)
        folder = Path(self.data)
        found = None
        if rank() == 0:
            *kinds, faults, others = index_dataset(
                folder, self.samples, stems=self.stems, sample_rate=config.sample_rate, channels=config.channels
            )
            everything = [track for kind in kinds for track in kind]
            cache = cache_of(folder, self.samples)
            windows, inside = scan(everything, self.samples, cache, others=others, progress=progress)
            faults += inside
            if faults and self.on_bad_file == "stop":
                raise DataError(folder, faults, "mend or remove them, or leave these songs out: on_bad_file=skip")
            if faults:
                warnings.warn(str(DataError(folder, faults, "their songs are left out")), stacklevel=3)
            found = [[[one for one in stem if one[0] in kind] for stem in windows] for kind in map(set, kinds)]
        training, validation = broadcast_object(found)
        return training, validation

    def batches(self, training: Windows) -> Remixer | Loader:
        """The supply of examples: one stream of random numbers, or by number for workers and many processes."""
        remixer = Remixer(
            training,
            self.samples,
            self.batch,
            seed=self.seed,
            original=self.coherent_mix_prob,
            augment_prob=self.augment_prob,
        )
        return remixer if not self.workers and world_size() == 1 else Loader(remixer, workers=self.workers)

    def start(self, training: Windows, held_out: Windows, device: torch.device | None = None) -> Run:
        """A new model in a run of its own, in `output_dir`, or the run that is there, taken up where it was.

        Raises:
            ValueError: when `init` is no checkpoint, or of another size; `FileNotFoundError` when it is not there.
                A run that has begun goes on without it.

        Warns:
            RuntimeWarning: when `precision` is bfloat16 and the processor has no such products.
        """
        place = device or torch.device("cpu")
        narrow = self.precision == "bfloat16" and rank() == 0
        if narrow and (slow := triton.slow_dtype_warning(place, torch.bfloat16)):
            warnings.warn(f"bfloat16 {slow}: take precision: float32", RuntimeWarning, stacklevel=2)
        torch.manual_seed(self.seed)
        model = BSMamba2(self.model_config)
        validation = Validation(held_out[0], self.samples, count=self.validation_windows)
        settings = {
            **{name: getattr(self, name) for name in _RECORDED},
            "examples": "by number" if self.workers or world_size() > 1 else "in order",
            "windows": [len(found) for found in training],
            "validation": len(validation.windows),
        }
        if self.data == "songs":
            asked = ("songs", "seconds_per_song", "val_songs", "mix_variety", "clean_share")
            settings |= {name: getattr(self, name) for name in asked}
            settings["soundfont"] = Path(self.soundfont).name
            if self.soundfont:
                settings["soundfont_share"] = self.soundfont_share
        folder = Path(self.output_dir)
        if not self.init:
            settings["init"] = ""
        elif Path(self.init).exists() or not any(folder.glob("state-*.pt")):
            begin_with(model, read_checkpoint(self.init))
            settings["init"] = sha256_file(self.init)
        return Run(
            folder,
            Trainer(model.to(place), self.train_config),
            settings=settings,
            defaults={name: _default(name) for name in LATER},
            validate=validation,
            save_every=self.save_every,
            validate_every=self.validate_every,
            tensorboard=self.tensorboard,
        )


def shared_songs(count: int, **how: Any) -> list[Song]:
    """`songs.songs(count, **how)`, the same in all processes: those of one machine share the work and the memory.

    Each makes its part and writes it to a temporary file; all map all files, whose pages the machine keeps once.
    On Windows, where a mapped file cannot be removed, each process makes all of them.

    Raises:
        OSError: when the files cannot be written, a full disk for one; TMPDIR names their folder.
    """
    local, processes = local_rank_and_size()
    if os.name == "nt" or max(all_gather_object(processes)) == 1:
        return songs(count, **how)
    first = rank() - local  # of this machine's
    folder = Path(all_gather_object(tempfile.mkdtemp(prefix="bsmamba2-") if local == 0 else "")[first])
    told, parts = [], []
    try:
        for start in range(local, count, _AT_A_TIME * processes):
            made = songs(min(count, start + _AT_A_TIME * processes), first=start, every=processes, **how)
            with _room_needed(folder), (folder / str(local)).open("ab") as file:
                for song in made:
                    file.write(song.stems.numpy().data)
            told += [(song.stems.shape, dataclasses.replace(song, stems=torch.empty(0))) for song in made]
        for number, part in enumerate(all_gather_object(told)[first : first + processes]):
            sizes = [shape.numel() for shape, _ in part]
            with _room_needed(folder):
                memory = torch.from_file(str(folder / str(number)), size=sum(sizes)) if part else torch.empty(0)
            pieces = zip(memory.split(sizes), part, strict=True)
            parts.append([dataclasses.replace(song, stems=piece.view(shape)) for piece, (shape, song) in pieces])
        all_gather_object(None)  # all have mapped them
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a network's file system may keep what is mapped a while longer
    return [parts[number % processes][number // processes] for number in range(count)]


@contextmanager
def _room_needed(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.add_note(f"while songs were written to {folder}; TMPDIR names another place")
        raise


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _default(name: str) -> Any:
    return next(one.default for one in dataclasses.fields(JobConfig) if one.name == name)


def read_parameters(path: Path) -> dict[str, Any]:
    """Names and values from a JSON or YAML file.

    Raises:
        ValueError: when it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = _read_yaml(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, as `steps: 400`")
    return values


def _read_yaml(text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML takes PyYAML: pip install pyyaml, or write the same as JSON") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {error}") from error
