"""Models that stand in for a separator: one gives its input back, one numbers its segments, one gives NaN."""

from __future__ import annotations

import torch
from tiny_model import TINY
from torch import Tensor, nn


class Identity(nn.Module):
    """Gives back what it gets, as one stem, and remembers the shapes of its batches."""

    config = TINY

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, mixture: Tensor) -> Tensor:
        self.shapes.append(tuple(mixture.shape))
        return mixture[:, None]

    def stream_masks(self, spectrogram: Tensor, state: list | None, frames: int) -> tuple[Tensor, list]:
        """Masks of 1. It remembers how many frames came before."""
        self.shapes.append((*spectrogram.shape, frames))
        before = state[0] if state else 0
        return torch.ones_like(spectrogram[:, None, ..., :frames]), [before + frames]


class Counting(Identity):
    """Gives the number of the segment as every sample of it: an edge between segments is a step of 1."""

    def forward(self, mixture: Tensor) -> Tensor:
        super().forward(mixture)
        return torch.full_like(mixture, float(len(self.shapes)))[:, None]


class Broken(Identity):
    def forward(self, mixture: Tensor) -> Tensor:
        return super().forward(mixture) / 0

    def stream_masks(self, spectrogram: Tensor, state: list | None, frames: int) -> tuple[Tensor, list]:
        masks, state = super().stream_masks(spectrogram, state, frames)
        return masks / 0, state
