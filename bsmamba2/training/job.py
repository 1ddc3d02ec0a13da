"""Training job: every parameter of a run, for the command line and the training notebook.

parameters → songs or files → model → trainer → run folder

Book: "Scaling up".
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import read_checkpoint
from ..config import PRESETS, ModelConfig
from ..data import Remixer, Windows, find_windows
from ..kernels import BACKENDS, accelerate, slow_dtype_warning
from ..model import BSMamba2
from ..published_layout import sha256_file
from ..settings import COUNT, SHARE, setting
from ..synth import STEMS
from ..train import TrainConfig
from .augmentation import AugmentedRemixer
from .datasets import DataError, Progress, cache_path, find_active_windows, index_dataset, musdb_sample
from .ddp import make_trainer
from .distributed import all_gather_object, broadcast_object, local_rank_and_size, rank, world_size
from .loader import DistributedValidation, Loader
from .muon import muon_and_adamw
from .run_dir import RunDir
from .shared_songs import shared_songs

HELD_OUT = 1_000_000
"""How far the seed of the synthesised songs for validation lies from that of the songs to learn from."""
_RECORDED = ("preset", "seed", "segment", "batch", "optimiser", "coherent_mix_prob", "augment_prob")
_RECORDED_OF_SONGS = ("songs", "seconds_per_song", "val_songs", "mix_variety", "soundfont_share", "clean_share")
_WHOLE, _SECONDS = "[0, inf)", "(0, inf)"


def _first_run(name: str, default: Any) -> Any:
    """A setting of `TrainConfig` with another default."""
    inherited = next(field for field in dataclasses.fields(TrainConfig) if field.name == name)
    return dataclasses.field(default=default, metadata=inherited.metadata)


@dataclass(frozen=True, kw_only=True)
class JobConfig(TrainConfig):
    """Every parameter of a training run: those of `TrainConfig`, and those of the model, the data and the run.

    The defaults are those of a first run on a CPU, not the published ones (`notebooks/params/train_paper.yaml`).

    Raises:
        ValueError: for a value of another type, or out of range; it names the parameter.
    """

    # A first run is short.
    steps: int = _first_run("steps", 400)
    lr: float = _first_run("lr", 2e-3)
    schedule: str = _first_run("schedule", "cosine")
    ema_decay: float = _first_run("ema_decay", 0.98)
    loss_hop: int = _first_run("loss_hop", 441)

    preset: str = setting("small", f"size of the model: {', '.join(PRESETS)}")
    depth: int = setting(0, "dual-path layers; 0 is as many as the preset has")
    dim: int = setting(0, "features per band and frame; 0 is as many as the preset has")
    mask_expand: int = setting(0, "hidden width of the masks as a multiple of dim; 0 is that of the preset")
    init: str = setting("", "checkpoint to begin with, ours or published, of the same size; else random weights")
    data: str = setting("songs", "`songs`: synthesised ones; `musdb-sample`; or a folder, MUSDB18-HQ for one")
    stems: tuple[str, ...] = setting(STEMS, "names of the files in a song's folder, the target first")
    on_bad_file: str = setting("stop", "files that cannot be used: stop, or skip their songs", ("stop", "skip"))
    songs: int = setting(160, "synthesised songs to learn from", within=COUNT)
    seconds_per_song: float = setting(6.0, "length of each", within=_SECONDS)
    val_songs: int = setting(12, "synthesised songs for validation, from other seeds", within=COUNT)
    mix_variety: float = setting(
        0.0, "most of the synthesised mixes, 0 (clean, loud voice) to 1 (as recordings may be)", within=SHARE
    )
    soundfont: str = setting("", "file of a sound font, whose recorded instruments play in synthesised songs")
    soundfont_share: float = setting(1.0, "share of these songs in which it plays", within=SHARE)
    clean_share: float = setting(0.0, "share of the synthesised songs with neither variety nor font", within=SHARE)
    coherent_mix_prob: float = setting(
        0.0, "share of examples whose stems are of one song and place; published: none, each from any", within=SHARE
    )
    augment_prob: float = setting(0.0, "share of examples that are augmented; published: none", within=SHARE)
    segment: float = setting(1.0, "length of a training example, in seconds; published: 8", within=_SECONDS)
    batch: int = setting(4, "examples in a batch of one process; published: 5", within=COUNT)
    optimiser: str = setting(
        "adamw", "adamw, as published; or muon for the matrices, which may take fewer steps", ("adamw", "muon")
    )
    backend: str = setting("auto", "kernels: auto, plain, cpu, triton", BACKENDS)
    workers: int = setting(
        0, "processes that read ahead. With 0, examples come from one stream of random numbers; else by number",
        within=_WHOLE,
    )  # fmt: skip
    seed: int = setting(0, "of the weights, the songs and the examples", within=_WHOLE)
    save_every: int = setting(100, "steps between states", within=COUNT)
    validate_every: int = setting(100, "steps between validations", within=COUNT)
    validation_windows: int = setting(1200, "most stretches of song in a validation", within=COUNT)
    tensorboard: bool = setting(False, "write curves for TensorBoard too")
    device: str = setting("auto", "auto, cpu, cuda or mps")
    output_dir: str = setting("runs/first", "folder of the run; a run that is there already is resumed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data in ("songs", "musdb-sample") and self.stems != STEMS:
            raise ValueError(f"stems={self.stems!r} are those of a folder; data={self.data!r} has {STEMS!r}")
        self.model_config  # noqa: B018  # checks its own

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> JobConfig:
        """A job from names and values; ValueError for a name that is no parameter."""
        unknown = sorted(set(values) - set(cls.names()))
        if unknown:
            raise ValueError(f"unknown parameters {', '.join(unknown)}; known: {', '.join(cls.names())}")
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        """The parameters' names."""
        return [field.name for field in dataclasses.fields(cls)]

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        sizes = {name: getattr(self, name) for name in ("depth", "dim", "mask_expand")}
        changed = {name: value for name, value in sizes.items() if value}
        return ModelConfig.preset(self.preset, **changed, stems=self.stems[:1])

    @property
    def train_config(self) -> TrainConfig:
        """The training loop's part of the parameters."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)})

    @property
    def song_settings(self) -> dict[str, Any]:
        """How its songs are synthesised: arguments of `synth.synthesise_songs` besides their number and seed.

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
        """The active windows to learn from, and those to validate with; the first process searches the files.

        Raises:
            DataError: for faults in a folder, all at once, with `on_bad_file="stop"`; with `skip` it is a warning.
        """
        if self.data not in ("songs", "musdb-sample"):
            training, validation = broadcast_object(self._search_folder(progress) if rank() == 0 else None)
            return training, validation
        if self.data == "songs":
            parts = [
                shared_songs(count, seed=seed, **self.song_settings)
                for count, seed in ((self.songs, self.seed), (self.val_songs, self.seed + HELD_OUT))
            ]
        else:
            first = local_rank_and_size()[0] == 0
            excerpts = musdb_sample(self.samples) if first else None  # downloads them; the others find them there
            all_gather_object(None)
            parts = list(excerpts or musdb_sample(self.samples))
        return find_windows(parts[0], self.samples), find_windows(parts[1], self.samples)

    def _search_folder(self, progress: Progress) -> list[Windows]:
        folder, config = Path(self.data), self.model_config
        *parts, faults, others = index_dataset(
            folder, self.samples, stems=self.stems, sample_rate=config.sample_rate, channels=config.channels
        )
        tracks, cache = [track for part in parts for track in part], cache_path(folder, self.samples)
        windows, more_faults = find_active_windows(tracks, self.samples, cache, others=others, progress=progress)
        faults += more_faults
        if faults and self.on_bad_file == "stop":
            raise DataError(folder, faults, "repair or remove them, or leave these songs out: on_bad_file=skip")
        if faults:
            warnings.warn(str(DataError(folder, faults, "their songs are left out")), stacklevel=4)
        return [[[window for window in stem if window[0] in part] for stem in windows] for part in map(set, parts)]

    def batches(self, training: Windows) -> Remixer | Loader:
        """The supply of examples: one stream of random numbers, or by number for workers and several processes."""
        remixer = AugmentedRemixer(
            training,
            self.samples,
            self.batch,
            seed=self.seed,
            coherent_mix_prob=self.coherent_mix_prob,
            augment_prob=self.augment_prob,
        )
        return remixer if not self.workers and world_size() == 1 else Loader(remixer, workers=self.workers)

    def start(self, training: Windows, held_out: Windows, device: torch.device | None = None) -> RunDir:
        """A new model in a run of its own, in `output_dir`; or the run that is there, resumed.

        The first process prints one line to standard error: which kernels the model runs with.

        Raises:
            ValueError: when `init` is no checkpoint, or of another size; `FileNotFoundError` when it is not there.
                A run that has begun goes on without it.
            BackendError: when `backend` cannot run here.

        Warns:
            RuntimeWarning: when `precision` is bfloat16 and the processor has no such products.
        """
        place, dtype = device or torch.device("cpu"), getattr(torch, self.precision)
        if rank() == 0 and (slow := slow_dtype_warning(place, dtype)):
            warnings.warn(f"{self.precision} {slow}: take precision: float32", RuntimeWarning, stacklevel=2)
        torch.manual_seed(self.seed)
        model = BSMamba2(self.model_config)
        validation = DistributedValidation(held_out[0], self.samples, count=self.validation_windows)
        recorded = (*_RECORDED, *(_RECORDED_OF_SONGS if self.data == "songs" else ()))
        settings = {
            **{name: getattr(self, name) for name in recorded},
            "examples": "by number" if self.workers or world_size() > 1 else "in order",
            "windows": [len(windows) for windows in training],
            "validation": len(validation.windows),
            "soundfont": Path(self.soundfont).name,
        }
        folder = Path(self.output_dir)
        if not self.init:
            settings["init"] = ""
        elif Path(self.init).exists() or not any(folder.glob("state-*.pt")):
            settings["init"] = _load_weights(model, Path(self.init))
        model.to(place)
        acceleration = accelerate(model, self.backend, dtype=dtype)
        if rank() == 0:
            sys.stderr.write(f"{acceleration}\n")
        optimisers = muon_and_adamw(model, self.train_config) if self.optimiser == "muon" else ()
        return RunDir(
            folder,
            make_trainer(model, self.train_config, optimisers=optimisers),
            settings=settings,
            validate=validation,
            save_every=self.save_every,
            validate_every=self.validate_every,
            tensorboard=self.tensorboard,
        )


def _load_weights(model: BSMamba2, path: Path) -> str:
    """Give a model the weights of a checkpoint of its size; returns the file's SHA-256."""
    checkpoint = read_checkpoint(path)
    own = dataclasses.replace(model.config, stems=checkpoint.config.stems)  # another target may be learned
    if checkpoint.config != own or len(own.stems) != len(model.config.stems):
        raise ValueError(f"init={str(path)!r} is {checkpoint.config}, and {model.config} is another size")
    model.load_state_dict(checkpoint.state)
    return sha256_file(path)


def read_parameters(path: Path) -> dict[str, Any]:
    """Names and values from a JSON or YAML file.

    Raises:
        ValueError: when it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            yaml = importlib.import_module("yaml")
            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(f"no YAML: {error}") from error
        else:
            values = json.loads(text)
    except ImportError as error:
        raise ValueError(f"{path}: YAML takes PyYAML: pip install pyyaml, or write the same as JSON") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, as `steps: 400`")
    return values
