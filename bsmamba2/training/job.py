"""Training job: every parameter of a run, for the command line and the training notebook.

parameters → songs or files → model → trainer → run folder

Book: "Scaling up".
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import read_checkpoint, sha256_file
from ..config import PRESETS, ModelConfig
from ..data import Remixer, Windows, find_windows
from ..kernels import BACKENDS, accelerate, slow_dtype_warning
from ..model import BSMamba2
from ..settings import COUNT, SHARE, setting, short_repr
from ..settings import read_parameters as read_parameters
from ..synth import STEMS
from ..train import TrainConfig
from .augmentation import AugmentedRemixer
from .datasets import Progress, fingerprints, search_dataset, shared_songs
from .ddp import make_trainer
from .distributed import broadcast_object, rank, world_size
from .loader import DistributedValidation, Loader
from .muon import muon_and_adamw
from .run_dir import RunDir

HELD_OUT = 1_000_000
"""Offset added to `seed` for the synthesised validation songs."""
_RECORDED = ("preset", "seed", "segment", "batch", "optimiser", "coherent_mix_prob", "augment_prob")
_RECORDED_OF_SONGS = ("songs", "seconds_per_song", "val_songs", "mix_variety", "soundfont_share", "clean_share")
_WHOLE, _SECONDS = "[0, inf)", "(0, inf)"


def _first_run(name: str, default: Any) -> Any:
    """A setting of `TrainConfig` with a different default."""
    inherited = next(field for field in dataclasses.fields(TrainConfig) if field.name == name)
    return dataclasses.field(default=default, metadata=inherited.metadata)


@dataclass(frozen=True, kw_only=True)
class JobConfig(TrainConfig):
    """Every parameter of a training run: those of `TrainConfig`, the model, the data and the run.

    The defaults are for a first run on a CPU; the published values are in `notebooks/params/train_paper.yaml`.

    Raises:
        ValueError: for a value of the wrong type or out of range; the message names the parameter.
    """

    steps: int = _first_run("steps", 400)
    lr: float = _first_run("lr", 2e-3)
    schedule: str = _first_run("schedule", "cosine")
    ema_decay: float = _first_run("ema_decay", 0.98)
    loss_hop: int = _first_run("loss_hop", 441)

    preset: str = setting("small", f"size of the model: {', '.join(PRESETS)}; init: size of the `init` checkpoint")
    depth: int = setting(0, "number of dual-path layers; 0: preset default")
    dim: int = setting(0, "features per band and frame; 0: preset default")
    mask_expand: int = setting(0, "hidden width of the mask estimators as a multiple of dim; 0: preset default")
    init: str = setting("", "checkpoint to fine-tune, ours or published, of the same size; empty: random weights")
    config: str = setting("", "YAML or JSON file with the hop, window or bands that the `init` file does not store")
    data: str = setting("songs", "songs: synthesised songs; or a folder of songs, such as MUSDB18-HQ")
    stems: tuple[str, ...] = setting(("vocals",), "stems to separate; published: vocals")
    sources: tuple[str, ...] = setting(STEMS, "names of the files in a song's folder; their sum is the mixture")
    on_bad_file: str = setting("stop", "for files that cannot be used: stop, or skip their songs", ("stop", "skip"))
    songs: int = setting(160, "number of synthesised songs for training", within=COUNT)
    seconds_per_song: float = setting(6.0, "length of a synthesised song, in seconds", within=_SECONDS)
    val_songs: int = setting(12, "number of synthesised songs for validation, from different seeds", within=COUNT)
    mix_variety: float = setting(0.0, "variety of the synthesised mixes, from 0 (clean) to 1", within=SHARE)
    soundfont: str = setting("", "SoundFont file, whose recorded instruments play in synthesised songs")
    soundfont_share: float = setting(1.0, "fraction of synthesised songs with SoundFont instruments", within=SHARE)
    clean_share: float = setting(0.0, "fraction of synthesised songs without variety or SoundFont", within=SHARE)
    coherent_mix_prob: float = setting(0.0, "fraction of examples from one excerpt of one song", within=SHARE)
    augment_prob: float = setting(0.0, "fraction of examples that are augmented; published: 0", within=SHARE)
    segment: float = setting(1.0, "length of a training example, in seconds; published: 8", within=_SECONDS)
    batch: int = setting(4, "examples per batch and process; published: 5", within=COUNT)
    optimiser: str = setting("adamw", "adamw, as published; or muon for the matrices", ("adamw", "muon"))
    backend: str = setting("auto", "kernels: auto, plain, cpu, triton", BACKENDS)
    workers: int = setting(0, "processes that load data; examples for 0 differ from those for 1 or more", within=_WHOLE)
    seed: int = setting(0, "seed of the weights, the songs and the examples", within=_WHOLE)
    save_every: int = setting(100, "steps between states", within=COUNT)
    validate_every: int = setting(100, "steps between validations", within=COUNT)
    validation_windows: int = setting(1200, "maximum number of excerpts in a validation", within=COUNT)
    tensorboard: bool = setting(False, "also write curves for TensorBoard")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    output_dir: str = setting("runs/first", "folder of the run; an existing run is resumed")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init", "config", "data", "soundfont", "output_dir"):
            path = os.path.expanduser(getattr(self, name))  # noqa: PTH111  # Path's fails for an unknown user
            object.__setattr__(self, name, path)
        if self.config and not self.init:
            raise ValueError(f"config={self.config!r:.100} describes a checkpoint: name it, init=FILE")
        if self.data == "songs" and self.sources != STEMS:
            raise ValueError(f"sources={short_repr(self.sources)} are those of a folder; data='songs' has {STEMS}")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources={short_repr(self.sources)} names a file twice")
        if unknown := [stem for stem in self.stems if stem not in self.sources]:
            known = f"{', '.join(self.sources):.200}"
            raise ValueError(f"stems={short_repr(self.stems)}: no {short_repr(unknown[0])}; `sources` has {known}")
        self.model_config  # noqa: B018  # raises ValueError for an invalid architecture

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> JobConfig:
        """Make a job from names and values; raises ValueError for an unknown name."""
        unknown = [name for name in values if name not in cls.names()]
        if unknown:
            listed = ", ".join(f"{name:.100}" if str(name).isidentifier() else short_repr(name) for name in unknown[:4])
            raise ValueError(f"unknown parameters {listed}; known: {', '.join(cls.names())}")
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        """Names of all parameters."""
        return [field.name for field in dataclasses.fields(cls)]

    @cached_property
    def model_config(self) -> ModelConfig:
        """Architecture of the model."""
        sizes = {name: getattr(self, name) for name in ("depth", "dim", "mask_expand")}
        changed = {name: value for name, value in sizes.items() if value}
        if self.preset != "init":
            return ModelConfig.preset(self.preset, **changed, stems=self.stems)
        if not self.init:
            raise ValueError("preset='init' is the size of a checkpoint: name it, init=FILE")
        stored = read_checkpoint(self.init, config=self.config or None).config
        return dataclasses.replace(stored, **changed, stems=self.stems)

    @property
    def song_settings(self) -> dict[str, Any]:
        """Arguments of `synth.synthesise_songs`, except `count` and `seed` (for validation songs `seed + HELD_OUT`)."""
        names = ("mix_variety", "soundfont", "soundfont_share", "clean_share")
        rate = self.model_config.sample_rate
        return {"seconds": self.seconds_per_song, "sample_rate": rate} | {name: getattr(self, name) for name in names}

    @property
    def targets(self) -> tuple[int, ...]:
        """Indices of the `stems` in `sources`."""
        return tuple(map(self.sources.index, self.stems))

    @property
    def samples(self) -> int:
        """Length of a training example, in samples."""
        return round(self.segment * self.model_config.sample_rate)

    def windows(self, progress: Progress = lambda files: files) -> tuple[Windows, Windows]:
        """Find the active windows for training and validation; only the first process searches files.

        Raises:
            DataError: for all faults in a folder together, with `on_bad_file="stop"`; `skip` makes them a warning.
        """
        if self.data == "songs":
            training = shared_songs(self.songs, seed=self.seed, **self.song_settings)
            validation = shared_songs(self.val_songs, seed=self.seed + HELD_OUT, **self.song_settings)
            return find_windows(training, self.samples), find_windows(validation, self.samples)
        config, found = self.model_config, None
        if rank() == 0:
            found = search_dataset(
                Path(self.data), self.samples, stems=self.sources, targets=self.targets, channels=config.channels,
                sample_rate=config.sample_rate, on_bad_file=self.on_bad_file, progress=progress,
            )  # fmt: skip
        return broadcast_object(found)

    def batches(self, training: Windows) -> Remixer | Loader:
        """Make the data loader: examples from one random stream, or by index with workers or several processes."""
        remixer = AugmentedRemixer(
            training, self.samples, self.batch, targets=self.targets, seed=self.seed,
            coherent_mix_prob=self.coherent_mix_prob, augment_prob=self.augment_prob,
        )  # fmt: skip
        return remixer if not self.workers and world_size() == 1 else Loader(remixer, workers=self.workers)

    def start(self, training: Windows, held_out: Windows, device: torch.device | None = None) -> RunDir:
        """Start a run in `output_dir`, or resume the run there; the first process logs its kernels on standard error.

        Raises:
            ValueError: when `init` is not a checkpoint or has a different size; `FileNotFoundError` when it is missing.
                An existing run resumes without it, except with `preset: init`.
            BackendError: when `backend` cannot run here.

        Warns:
            RuntimeWarning: when `precision` takes more than twice as long as float32 on this processor.
        """
        place, dtype = device or torch.device("cpu"), getattr(torch, self.precision)
        if rank() == 0 and (slow := slow_dtype_warning(place, dtype)):
            warnings.warn(f"{self.precision} {slow}: take precision: float32", RuntimeWarning, stacklevel=2)
        torch.manual_seed(self.seed)
        model = BSMamba2(self.model_config)
        validation = DistributedValidation(held_out, self.samples, targets=self.targets, count=self.validation_windows)
        recorded = (*_RECORDED, *(_RECORDED_OF_SONGS if self.data == "songs" else ("sources",)))
        settings = {
            **{name: getattr(self, name) for name in recorded},
            "examples": "by number" if self.workers or world_size() > 1 else "in order",
            "windows": [len(windows) for windows in training],
            "validation": len(validation.windows),
            "soundfont": Path(self.soundfont).name,
            "files": fingerprints(training),
            "validation_files": fingerprints(held_out),
        }
        folder = Path(self.output_dir)
        if not self.init:
            settings["init"] = ""
        elif Path(self.init).exists() or not any(folder.glob("state-*.pt")):
            settings["init"] = _load_weights(model, Path(self.init), self.config)
        model.to(place)
        acceleration = accelerate(model, self.backend, dtype=dtype)
        if rank() == 0:
            sys.stderr.write(f"{acceleration}\n")
        config = TrainConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)})
        optimisers = muon_and_adamw(model, config) if self.optimiser == "muon" else ()
        trainer = make_trainer(model, config, optimisers=optimisers)
        return RunDir(
            folder, trainer, settings=settings, validate=validation, save_every=self.save_every,
            validate_every=self.validate_every, tensorboard=self.tensorboard,
        )  # fmt: skip


def _load_weights(model: BSMamba2, path: Path, config: str) -> str:
    """Load the weights of a checkpoint of the same size, and return the file's SHA-256."""
    checkpoint = read_checkpoint(path, config=config or None)
    theirs, ours = dataclasses.asdict(checkpoint.config), dataclasses.asdict(model.config)
    if len(theirs["stems"]) == len(ours["stems"]):
        theirs["stems"] = ours["stems"]  # the stems may have different names
    if theirs != ours:
        changed = [name for name in ours if theirs[name] != ours[name]]
        differ = "; ".join(f"{name} {short_repr(theirs[name])}, not {short_repr(ours[name])}" for name in changed)
        raise ValueError(f"init={str(path)!r} has a different size: {differ}. Use preset=init and as many stems")
    model.load_state_dict(checkpoint.state)
    if rank() == 0:
        sys.stderr.writelines(f"init: {note}\n" for note in checkpoint.notes)
    return sha256_file(path)
