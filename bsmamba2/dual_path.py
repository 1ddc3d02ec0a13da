"""Two directions, two axes: the bidirectional block, run along time and then along bands.

(b t k d)  →  time: (b·k, t, d)  →  bands: (b·t, k, d)  →  (b t k d)

Book: "Two directions, two axes". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .mamba2 import RMSNorm, block_by_block

SequenceLayer = Callable[[], nn.Module]
"""Makes a layer (b, length, d) → (b, length, d); one that sees only the past, for a bidirectional block."""


class Residual(nn.Module):
    """x + mixer(rms(x)): (b, length, d) → (b, length, d)."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


class BidirectionalBlock(nn.Module):
    """One layer reads the sequence forwards, another backwards; a Linear merges what they say.

        f = forwards(x),   g = flip(backwards(flip(x))),   out = Linear(concat(f, g)) + x

    Args:
        dim: d.
        sequence_layer: makes the layer of each direction; each has its own weights.
    """

    def __init__(self, dim: int, sequence_layer: SequenceLayer) -> None:
        super().__init__()
        self.forwards = Residual(dim, sequence_layer())
        self.backwards = Residual(dim, sequence_layer())
        self.merge = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        f = self.forwards(x)
        g = self.backwards(x.flip(1)).flip(1)
        return self.merge(torch.cat((f, g), dim=-1)) + x


class DualPath(nn.Module):
    """A bidirectional block along time, then one along bands.

    Args:
        dim: d.
        sequence_layer: makes the layer of each direction and axis.
    """

    def __init__(self, dim: int, sequence_layer: SequenceLayer) -> None:
        super().__init__()
        self.time = BidirectionalBlock(dim, sequence_layer)
        self.band = BidirectionalBlock(dim, sequence_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, k, d) → (b, t, k, d)."""
        b, t, k, _ = x.shape
        x = block_by_block(self.time, x.transpose(1, 2).flatten(0, 1))
        x = x.unflatten(0, (b, k)).transpose(1, 2)
        x = block_by_block(self.band, x.flatten(0, 1))
        return x.unflatten(0, (b, t))
