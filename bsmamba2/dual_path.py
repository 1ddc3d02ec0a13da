"""Dual-path layers: a bidirectional block along time, then one along bands.

(b t k d)  →  time: (b·k, t, d)  →  bands: (b·t, k, d)  →  (b t k d)

`forward` reads a whole sequence. `step` reads one segment of it and the segment's look-ahead, and continues from the
end of the previous segment. `bsmamba2.kernels.accelerate` replaces the blocks by faster ones.
Book: "Two directions, two axes"; `step`: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .mamba2 import MixerState, RMSNorm

SequenceLayer = Callable[[], nn.Module]
"""Creates a layer (b, length, d) → (b, length, d); for a bidirectional block, the layer is causal."""


class PreNormResidual(nn.Module):
    """Pre-norm residual, x + mixer(rms_norm(x)): (b, length, d) → (b, length, d)."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        return x + self.mixer(self.norm(x))

    def step(self, x: Tensor, state: MixerState | None, frames: int) -> tuple[Tensor, MixerState]:
        """`forward` of a segment, continuing from a state.

        Args:
            x: (b, length, d).
            state: state after the previous segment; None at the start.
            frames: number of frames in the segment, from 1 to length; the other frames are its look-ahead.

        Returns:
            (b, length, d), and the state after the first `frames` frames.

        Raises:
            ValueError: if the layer cannot carry over a state.
        """
        step = getattr(self.mixer, "step", None)
        if step is None:
            raise ValueError(f"{type(self.mixer).__name__} has no `step` as `Mamba2` has: it cannot carry its state on")
        y, after = step(self.norm(x[:, :frames]), state)
        if frames < x.shape[1]:
            y = torch.cat((y, step(self.norm(x[:, frames:]), after)[0]), dim=1)
        return x + y, after


class BidirectionalBlock(nn.Module):
    """Bidirectional block: one layer reads the sequence forwards, one backwards; a Linear merges their outputs.

        f = forwards(x),   g = flip(backwards(flip(x))),   out = Linear(concat(f, g)) + x

    Args:
        dim: d.
        sequence_layer: creates the layer of each direction; each layer has its own weights.
    """

    def __init__(self, dim: int, sequence_layer: SequenceLayer) -> None:
        super().__init__()
        self.forwards = PreNormResidual(dim, sequence_layer())
        self.backwards = PreNormResidual(dim, sequence_layer())
        self.merge = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        f = self.forwards(x)
        g = self.backwards(x.flip(1)).flip(1)
        return self.merge(torch.cat((f, g), dim=-1)) + x

    def step(self, x: Tensor, state: MixerState | None, frames: int) -> tuple[Tensor, MixerState]:
        """`forward` of a segment: forwards from a given state, backwards from the last frame of the look-ahead.

        Args and Returns: as for `PreNormResidual.step`.
        """
        f, state = self.forwards.step(x, state, frames)
        g = self.backwards(x.flip(1)).flip(1)
        return self.merge(torch.cat((f, g), dim=-1)) + x, state


class DualPath(nn.Module):
    """Dual-path layer: a bidirectional block along time, then one along bands.

    Args:
        dim: d.
        sequence_layer: creates the layer of each direction and axis.
    """

    def __init__(self, dim: int, sequence_layer: SequenceLayer) -> None:
        super().__init__()
        self.time = BidirectionalBlock(dim, sequence_layer)
        self.band = BidirectionalBlock(dim, sequence_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, k, d) → (b, t, k, d)."""
        b, t, k, _ = x.shape
        x = self.time(x.transpose(1, 2).flatten(0, 1))  # (b·k, t, d)
        x = x.unflatten(0, (b, k)).transpose(1, 2)
        x = self.band(x.flatten(0, 1))  # (b·t, k, d)
        return x.unflatten(0, (b, t))

    def step(self, x: Tensor, state: MixerState | None, frames: int) -> tuple[Tensor, MixerState]:
        """`forward` of a segment and its look-ahead, (b, t, k, d); only the block along time carries over a state.

        Args and Returns: as for `PreNormResidual.step`; the state covers b·k sequences.
        """
        b, t, k, _ = x.shape
        x, state = self.time.step(x.transpose(1, 2).flatten(0, 1), state, frames)
        x = x.unflatten(0, (b, k)).transpose(1, 2)
        x = self.band(x.flatten(0, 1))
        return x.unflatten(0, (b, t)), state
