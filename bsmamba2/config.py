"""Configuration of a model, frozen and validated (book: "The whole model").

Axis letters used throughout the package and in `book/notation.md`:

    b  batch             c  audio channel    f  frequency bin    t  frame
    k  band              d  feature          h  head             p  channel of a head
    n  state column      q  frame of a chunk l  chunk            stem (written out)
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bands import generate_bands, published_bands
from .settings import read_parameters, short_repr

MOST_VALUES_PER_SECOND = 1 << 26
"""Limit of mixer values per second of audio (268 MB in float32): 4.7 times the number in the published model."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a `BSMamba2`, without training settings.

    The defaults are those of the published model (arXiv:2508.14556 and the authors' code). Every field is
    checked on creation; a `ValueError` names the field, its value and the accepted values.

    Attributes:
        dim: number of features per band and frame, `d`.
        depth: number of dual-path layers; each runs along time, then along bands.
        freqs_per_bands: number of bins in each band, low to high; their sum must be `n_fft // 2 + 1`.
        stems: names of the sources that the model returns, in order.
        channels: number of audio channels, separated jointly, `c`.
        sample_rate: in hertz. The model itself does not use it; audio files are resampled to it.
        n_fft: STFT transform length, in samples.
        hop_length: samples between frames.
        win_length: window length, in samples, at most n_fft; None: n_fft.
        d_state: width of the state-space state, `n`.
        headdim: number of channels that share one decay, `p`.
        expand: inner width of a Mamba-2 mixer as a multiple of `dim`.
        d_conv: number of taps of the causal convolution.
        mask_expand: hidden width of a mask estimator as a multiple of `dim`.
    """

    dim: int = 256
    depth: int = 6
    freqs_per_bands: tuple[int, ...] = published_bands()
    stems: tuple[str, ...] = ("vocals",)
    channels: int = 2
    sample_rate: int = 44_100
    n_fft: int = 2048
    hop_length: int = 441
    win_length: int | None = None
    d_state: int = 128
    headdim: int = 64
    expand: int = 4
    d_conv: int = 4
    mask_expand: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("freqs_per_bands", "stems"):
                if not isinstance(value, list | tuple) or not value:
                    raise ValueError(f"{field.name}={short_repr(value)} must be a list, not empty")
                object.__setattr__(self, field.name, tuple(value))
            elif not is_positive_int(value) and not (field.name == "win_length" and value is None):
                raise ValueError(f"{field.name}={short_repr(value)} must be a positive whole number")
        if not all(map(is_positive_int, self.freqs_per_bands)):
            raise ValueError(f"freqs_per_bands={short_repr(self.freqs_per_bands)} must be positive numbers of bins")
        if (covered := sum(self.freqs_per_bands)) != self.bins:
            fault = f"freqs_per_bands cover {covered} bins, but n_fft={self.n_fft} gives {self.bins}"
            raise ValueError(f"{fault}: make their sum n_fft // 2 + 1")
        shown = short_repr(self.stems)
        for stem in self.stems:  # they become file names
            if not isinstance(stem, str) or not re.fullmatch(r"[^/\\]{1,100}", stem) or not stem.isprintable():
                raise ValueError(f"stems={shown} must be names of 1 to 100 printable characters, without / and \\")
        if len({stem.casefold() for stem in self.stems}) != len(self.stems):
            raise ValueError(f"stems={shown} names a stem twice")
        if self.win_length == self.n_fft:
            object.__setattr__(self, "win_length", None)  # so that equal configurations compare equal
        window = self.win_length or self.n_fft
        if self.n_fft % 2 or window > self.n_fft or self.hop_length > window // 2:
            raise ValueError(
                f"n_fft={self.n_fft} must be even, the window (win_length={window}) at most n_fft, and "
                f"hop_length={self.hop_length} at most half the window, or the inverse STFT cannot rebuild the signal"
            )
        if self.inner % self.headdim:
            raise ValueError(f"expand * dim = {self.inner} is not a multiple of headdim={self.headdim}")
        values = self.sample_rate * len(self.freqs_per_bands) * (2 * self.inner + 2 * self.d_state + self.heads)
        if values > MOST_VALUES_PER_SECOND * self.hop_length:
            raise ValueError(
                f"sample_rate={self.sample_rate}, hop_length={self.hop_length} and {len(self.freqs_per_bands)} bands "
                f"take {4e-9 * values / self.hop_length:,.1f} GB for each layer and second of audio, "
                f"more than {4e-9 * MOST_VALUES_PER_SECOND:.1f}: use a longer hop or a smaller model"
            )

    @property
    def bins(self) -> int:
        """Frequency bins of the STFT, `f`."""
        return self.n_fft // 2 + 1

    @property
    def inner(self) -> int:
        """Inner width of a mixer, `h · p`."""
        return self.expand * self.dim

    @property
    def heads(self) -> int:
        """Heads of a mixer, `h`."""
        return self.inner // self.headdim

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """Preset configuration: `paper` (as published), `compact` (GPUs with little memory) or `small` (two CPU cores).

        Args:
            name: name of the preset.
            changes: fields that override those of the preset.

        Raises:
            ValueError: for an unknown preset; `TypeError` for an unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def to_json(self) -> str:
        """The configuration as a JSON object, one key per field."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Create a configuration from a mapping (parsed JSON); unknown or invalid fields raise ValueError."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"unknown configuration field {short_repr(unknown[0])}; known: {', '.join(sorted(names))}")
        return cls(**values)


def read_config(path: Path) -> dict[str, Any]:
    """Read fields of a `ModelConfig` from YAML or JSON, for checkpoints without one; absent fields stay absent.

    The file uses the field names of `ModelConfig`, or the sections `audio`, `model` and `training` of ZFTurbo's
    Music-Source-Separation-Training. For these sections, the default hop is 512 and the default window and transform
    length are 2,048.

    Raises:
        ValueError: for a file that cannot be read, describes a different model or has other content; it names the file.
    """
    values = read_parameters(path)
    model, audio, training = (values.get(section) or {} for section in ("model", "audio", "training"))
    if not values.keys() & {"model", "audio"}:
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(ModelConfig)})
        if unknown:
            raise ValueError(f"{path}: {short_repr(unknown[0])} is no field of a ModelConfig (hop_length, stems, ...)")
        return values
    if not all(isinstance(section, dict) for section in (model, audio, training)):
        raise ValueError(f"{path}: the sections audio, model and training must hold names and values")
    ours = "dim|depth|stereo|num_stems|freqs_per_bands|stft_(n_fft|hop_length|win_length)"
    if not model or (model.get("module_type") != "mamba2" and not all(re.fullmatch(ours, str(x)) for x in model)):
        raise ValueError(f"{path}: its section model is not of BSMamba2: module_type must be mamba2")
    defaults = {"n_fft": 2048, "hop_length": 512, "win_length": 2048}
    fields = {name: model.get(f"stft_{name}", default) for name, default in defaults.items()}
    for name, value in (("freqs_per_bands", model.get("freqs_per_bands")), ("sample_rate", audio.get("sample_rate"))):
        if value is not None:
            fields[name] = value
    if "stereo" in model:
        fields["channels"] = 2 if model["stereo"] is True else 1
    target, instruments = training.get("target_instrument"), training.get("instruments")
    stems = [target] if target else instruments
    if isinstance(stems, list) and len(stems) == model.get("num_stems", 1):
        fields["stems"] = stems
    return fields


def is_positive_int(value: object) -> bool:
    """Whether a value is a whole number from 1 to 2^63 - 1; True and False do not count as numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 63


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "compact": {"dim": 192, "depth": 4, "freqs_per_bands": generate_bands(48)},
    # Chosen for a laptop: half the published frame rate, about half the bands, and narrow mixers.
    "small": {
        "dim": 64,
        "depth": 2,
        "freqs_per_bands": generate_bands(32),
        "hop_length": 882,
        "d_state": 32,
        "expand": 2,
        "headdim": 32,
    },
}
