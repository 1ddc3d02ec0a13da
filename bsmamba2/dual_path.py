"""Two directions, two axes: the bidirectional block, run along time and then along bands.

(b t k d)  →  time: (b·k, t, d)  →  bands: (b·t, k, d)  →  (b t k d)

`forward` reads a whole sequence. `step` reads a piece of one, with what may be known of the future behind it, and goes
on where the piece before ended.

Book: "Two directions, two axes"; `step`: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .mamba2 import BLOCK, PIECE, Mamba2, Memory, RMSNorm, Room, block_by_block, matmul_dtype, rms_norm

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

    def each(self, x: Tensor) -> Tensor:
        """`forward` of a few sequences at a time, or `native_forward` where the native kernel takes x."""
        return self.native_forward(x) if self.kernel(x) else block_by_block(self, x)

    def kernel(self, x: Tensor) -> bool:
        """Whether both directions are mixers of one size that the native kernel runs for x (`Mamba2.kernel`).

        A layer of another class than the module's own has its own `forward`, and that is called.
        """
        ways = (self.forwards, self.backwards)
        own = (type(way) is Residual and type(way.norm) is RMSNorm and type(way.mixer) is Mamba2 for way in ways)
        if type(self.merge) is not nn.Linear or not all(own):
            return False
        one, other = (cast("Mamba2", way.mixer) for way in ways)
        return one.widths == other.widths and one.kernel(x) and other.kernel(x)

    def native_forward(self, x: Tensor) -> Tensor:
        """`forward` with the native kernel, in fewer passes: matrices that follow each other are multiplied beforehand.

            u = x / rms(x)      y_f = mix(W_f γ_f u),   y_b = mix(W_b γ_b u), from the last frame to the first
            out = M_f (x + O_f y_f) + M_b (x + O_b y_b) + m + x = (M_f + M_b) x + M_f O_f y_f + M_b O_b y_b + m + x

        W and O are the projections of a mixer, γ the gain of the norm before it, [M_f M_b] and m the merging Linear.
        Modules inside are not called: hooks on them hear nothing.
        """
        ways = [cast("Mamba2", way.mixer) for way in (self.forwards, self.backwards)]
        dtype = matmul_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            gains = [way.norm.weight for way in (self.forwards, self.backwards)]
            into = [(way.in_proj.weight.float() * gain).to(dtype) for way, gain in zip(ways, gains, strict=True)]
            halves = self.merge.weight.float().split(x.shape[-1], dim=1)
            out = [(half @ way.output().float()).to(dtype) for half, way in zip(halves, ways, strict=True)]
            across, bias = sum(halves).to(dtype), self.merge.bias.to(dtype)

            room = None if torch.is_grad_enabled() else Room(x, ways[0], dtype)

            def read(x: Tensor) -> Tensor:
                u = rms_norm(x).to(dtype)
                said = torch.addmm(bias, x.flatten(0, 1).to(dtype), across.mT)
                for number, way in enumerate(ways):
                    y = way.project_and_mix(u, into[number], room, backwards=number == 1)
                    said.addmm_(y.flatten(0, 1), out[number].mT)
                return x + said.view_as(x)

            return block_by_block(read, x, room.most if room else None)

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
        x = self.time.each(x.transpose(1, 2).flatten(0, 1))
        x = x.unflatten(0, (b, k)).transpose(1, 2)
        x = self.band.each(x.flatten(0, 1))
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
        x = self.band.each(x.flatten(0, 1))
        return x.unflatten(0, (b, t)), [memory for _, memory in steps]
