"""Two directions, two axes: the bidirectional block, run along time and then along bands.

(b t k d)  →  time: (b·k, t, d)  →  bands: (b·t, k, d)  →  (b t k d)

`forward` reads a whole sequence. `step` reads a piece of one, with what may be known of the future behind it, and goes
on where the piece before ended.

Book: "Two directions, two axes"; `step`: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .mamba2 import BLOCK, PIECE, Memory, RMSNorm, block_by_block

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

    def step(self, x: Tensor, memory: Memory | None, frames: int) -> tuple[Tensor, Memory]:
        """The same, going on from a memory.

        Args:
            x: (b, length, d).
            memory: of what came before; none at the start.
            frames: after how many the memory is wanted, from 1 to length.

        Returns:
            (b, length, d), and the memory after the first `frames`.

        Raises:
            ValueError: for a layer without a memory to carry.
        """
        step = getattr(self.mixer, "step", None)
        if step is None:
            raise ValueError(f"{type(self.mixer).__name__} has no `step` as `Mamba2` has: it cannot carry its state on")

        def read(x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
            size = PIECE if x.device.type == "cpu" else x.shape[1]
            y = []
            for part in x.split(size, dim=1):
                said, memory = step(self.norm(part), memory, keep=True)
                y.append(part + said)
            assert memory is not None
            return torch.cat(y, dim=1), memory

        y, after = read(x[:, :frames], memory)
        if frames < x.shape[1]:
            y = torch.cat((y, read(x[:, frames:], after)[0]), dim=1)
        return y, after


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

    def step(self, x: Tensor, memory: Memory | None, frames: int) -> tuple[Tensor, Memory]:
        """The same of a piece and its look-ahead: forwards from a memory, backwards from the end of the look-ahead.

        Args and Returns: as those of `Residual.step`.
        """
        f, memory = self.forwards.step(x, memory, frames)
        g = self.backwards(x.flip(1)).flip(1)
        return self.merge(torch.cat((f, g), dim=-1)) + x, memory


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

    def step(self, x: Tensor, memories: list[Memory] | None, frames: int) -> tuple[Tensor, list[Memory]]:
        """The same of a piece and its look-ahead.

        Args:
            x: (b, t, k, d).
            memories: what the piece before returned; none at the start.
            frames: of the piece; those behind them are its look-ahead.

        Returns:
            (b, t, k, d), and the memories after `frames`, one for each block of sequences.
        """
        b, t, k, d = x.shape
        most = max(1, BLOCK // (PIECE * d)) if x.device.type == "cpu" else b * k  # the same for a piece of any length
        blocks = x.transpose(1, 2).flatten(0, 1).split(most)
        before = memories if memories else [None] * len(blocks)
        steps = [self.time.step(block, memory, frames) for block, memory in zip(blocks, before, strict=True)]
        x = torch.cat([y for y, _ in steps]).unflatten(0, (b, k)).transpose(1, 2)
        x = block_by_block(self.band, x.flatten(0, 1))
        return x.unflatten(0, (b, t)), [memory for _, memory in steps]
