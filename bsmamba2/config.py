"""What a model is made of: one frozen, validated configuration (book: "The whole model").

Axis letters used throughout the module, and in `book/notation.md`:

    b  batch        c  audio channel      f  frequency bin     t  frame
    k  band         d  feature            h  head              p  head width
    n  state        s  stem
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .bands import generate_bands, published_bands


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a `BSMamba2`, and nothing else.

    The defaults are the published model (arXiv:2508.14556 and the authors' code). Every field is
    checked on creation: `ValueError` names the field, its value and what would be accepted.

    Attributes:
        dim: features per band and frame, `d`.
        depth: dual-path layers; each runs along time, then along bands.
        freqs_per_bands: bins in each band, low to high; their sum must be `n_fft // 2 + 1`.
        stems: names of the sources that the model gives, in order.
        channels: audio channels that are separated jointly, `c`.
        sample_rate: in hertz. The model itself never reads it; files are converted to it.
        n_fft: STFT window and transform length, in samples.
        hop_length: samples between frames.
        d_state: width of the state-space state, `n`.
        headdim: channels that share one decay, `p`.
        expand: inner width of a Mamba-2 mixer as a multiple of `dim`.
        d_conv: taps of the causal convolution.
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
    d_state: int = 128
    headdim: int = 64
    expand: int = 4
    d_conv: int = 4
    mask_expand: int = 4

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("freqs_per_bands", "stems"):
                if isinstance(value, str) or not hasattr(value, "__iter__"):
                    raise ValueError(f"{field.name}={value!r} must be a sequence")
                object.__setattr__(self, field.name, tuple(value))
            elif not is_positive_int(value):
                raise ValueError(f"{field.name}={value!r} must be a positive whole number")
        if not self.freqs_per_bands or not all(is_positive_int(width) for width in self.freqs_per_bands):
            raise ValueError(f"freqs_per_bands={self.freqs_per_bands!r} must be positive whole numbers of bins")
        if sum(self.freqs_per_bands) != self.bins:
            raise ValueError(
                f"freqs_per_bands cover {sum(self.freqs_per_bands)} bins, but n_fft={self.n_fft} gives {self.bins}: "
                f"make their sum n_fft // 2 + 1"
            )
        if not self.stems or not all(isinstance(stem, str) and stem for stem in self.stems):
            raise ValueError(f"stems={self.stems!r} must be names, at least one")
        if len(set(self.stems)) != len(self.stems):
            raise ValueError(f"stems={self.stems!r} names a stem twice")
        if self.n_fft % 2 or self.hop_length > self.n_fft // 2:
            raise ValueError(
                f"n_fft={self.n_fft} must be even and hop_length={self.hop_length} at most half of it, "
                f"or the inverse STFT cannot rebuild the signal"
            )
        if self.inner % self.headdim:
            raise ValueError(
                f"expand * dim = {self.inner} is not a multiple of headdim={self.headdim}: "
                f"heads must fill the inner width exactly"
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
        """A named size: `paper` (as published), `compact` (short GPUs) or `small` (two CPU cores).

        Args:
            name: the preset.
            changes: fields that replace the preset's own.

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
        """The configuration from a mapping (parsed JSON); unknown or bad fields raise ValueError."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"unknown configuration field {unknown[0]!r}; known: {', '.join(sorted(names))}")
        return cls(**values)


def is_positive_int(value: object) -> bool:
    """Whether a value is a whole number above 0; True and False are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "compact": {"dim": 192, "depth": 4, "freqs_per_bands": generate_bands(48)},
    # Chosen for a laptop: half the published frames and about half the bands, narrow mixers.
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
