"""Songs in memory: four stems and the sung regions."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

STEMS = ("vocals", "drums", "bass", "other")
SAMPLE_RATE = 44_100

Array = NDArray[Any]
Intervals = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Song:
    """Four stems of a song; their sum is the mixture.

    `stems` is (s=4, c=2, t) float32 in the order of `STEMS`. `vocal_segments` holds the sung regions as (start, end) in
    seconds, in order and without overlaps. `licence` and `source` state the terms of use and the origin of the audio.
    """

    name: str
    stems: torch.Tensor
    sample_rate: int
    vocal_segments: Intervals
    licence: str
    source: str

    @property
    def mixture(self) -> torch.Tensor:
        """Sum of the stems, (c=2, t)."""
        return self.stems.sum(dim=0)

    @property
    def vocals(self) -> torch.Tensor:
        """Vocals, (c=2, t)."""
        return self.stem("vocals")

    def stem(self, name: str) -> torch.Tensor:
        """One stem by name, (c=2, t). Raises ValueError for a name that is not in `STEMS`."""
        if name not in STEMS:
            raise ValueError(f"no stem is called {name!r}; the stems are {', '.join(STEMS)}")
        return self.stems[STEMS.index(name)]

    def crop(self, stem: int, start: int, samples: int) -> torch.Tensor:
        """Excerpt of one stem, given by its index in `STEMS`, (c=2, samples)."""
        return self.stems[stem, :, start : start + samples]

    def label(self, stem: int) -> str:
        """Name of a stem in messages, given by its index in `STEMS`."""
        return f"{self.name}/{STEMS[stem]}"

    @property
    def samples(self) -> int:
        """Duration in samples."""
        return self.stems.shape[-1]

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.samples / self.sample_rate

    @property
    def occupancy(self) -> float:
        """Fraction of the song's duration in `vocal_segments`, 0 to 1; reverberation after them is not counted."""
        return sum(end - start for start, end in self.vocal_segments) / self.seconds
