"""Sequence layers that replace a Mamba-2 mixer of equal size: an LSTM and self-attention.

    LSTM        x → LSTM of width w → Linear                                         causal
    Attention   x → q, k, v of every head, with rotary positions → softmax(q kᵀ / √p) v → Linear,
                then a feed-forward of width w                                       sees the whole sequence

Both map (b, length, d) → (b, length, d) without a residual, as `bsmamba2.mamba2.Mamba2` does; the bidirectional block
adds the norm and the residual. The width w is chosen so that the layer has as many parameters as the Mamba-2 mixer of
the same configuration. To add a layer: write a module with the signature `(dim, width)`, and add it to `LAYERS`.

Book: "Does Mamba meet silence?". Sources: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); Vaswani and
others, arXiv:1706.03762; Su and others, arXiv:2104.09864 (rotary positions). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from ..dual_path import SequenceLayer
from ..mamba2 import Mamba2, RMSNorm

BUDGET_TOLERANCE = 0.01
"""Two layers count as equal in size if their numbers of parameters differ by at most this fraction."""
ROPE_BASE = 10_000.0
"""Base of the rotary positions: the slowest pair of features makes one turn in about 2π · ROPE_BASE frames."""


class LSTM(nn.Module):
    """A long short-term memory (causal) with a state of `width`, and a Linear back to d = `dim`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, width, batch_first=True)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        return self.out_proj(self.lstm(x)[0])


class Attention(nn.Module):
    """Transformer layer: self-attention over the whole sequence with rotary positions, then a feed-forward network.

        a = out_proj(softmax(q kᵀ / √p) v),   y = a + W₂ gelu(W₁ rms(u + a))

    u is the input, already normalised by the surrounding block (pre-norm), which adds y to its own input. Attention is
    not causal, so both layers of a bidirectional block depend on all frames; one of them reads the frames backwards.
    `width` is the hidden width of the feed-forward network; `headdim` is p, which must be even and divide d = `dim`.

    Raises:
        ValueError: for a headdim that is odd or does not divide d.
    """

    def __init__(self, dim: int, width: int, *, headdim: int = 16) -> None:
        super().__init__()
        if headdim < 2 or headdim % 2 or dim % headdim:
            raise ValueError(f"headdim={headdim!r} must be even and divide dim={dim}")
        self.headdim = headdim
        self.in_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.norm = RMSNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, -1, self.headdim)).permute(2, 0, 3, 1, 4)  # (b, h, length, p)
        y = functional.scaled_dot_product_attention(apply_rotary(q), apply_rotary(k), v)
        attended = self.out_proj(y.transpose(1, 2).flatten(-2))
        return attended + self.feed_forward(self.norm(x + attended))


def apply_rotary(x: Tensor, offset: int = 0) -> Tensor:
    """Rotary position embedding: rotate pairs of features by angles that grow with the frame number.

        (x_i, x_{i + p/2}) in frame j  ↦  the pair rotated by j · ROPE_BASE^(−2i/p),   i < p/2

    The product of q rotated for frame j and k rotated for frame m depends on the frames only through j − m. x is
    (..., length, p) with an even p; `offset` is the number of its first frame. Returns (..., length, p).
    """
    half = x.shape[-1] // 2
    speed = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(offset, offset + x.shape[-2], device=x.device)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# --- equal numbers of parameters --------------------------------------------------------------------------


def make_layer(name: str, config: ModelConfig) -> SequenceLayer:
    """Constructor of sequence layers, to pass as `sequence_layer` to a `BSMamba2` of this configuration.

    Args:
        name: one of `LAYERS`: "mamba2", "lstm" or "attention".
        config: determines d, and the size of the Mamba-2 mixer that the other layers must match.

    Raises:
        ValueError: for an unknown name, or if no width brings the layer within `BUDGET_TOLERANCE` of the mixer's
            number of parameters.
    """
    if name not in LAYERS:
        raise ValueError(f"layer {name!r} is not one of {', '.join(LAYERS)}")
    return LAYERS[name](config)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(weight.numel() for weight in module.parameters())


def _mamba2(config: ModelConfig) -> SequenceLayer:
    sizes = {name: getattr(config, name) for name in ("d_state", "headdim", "expand", "d_conv")}
    return partial(Mamba2, config.dim, **sizes)


def parameter_budget(config: ModelConfig) -> int:
    """Number of parameters of the Mamba-2 mixer of a configuration, which the other layers must match."""
    with torch.device("meta"):
        return count_parameters(_mamba2(config)())


def _fitted(layer: Callable[[int, int], nn.Module], config: ModelConfig) -> SequenceLayer:
    """Constructor of the layer with the width whose number of parameters is closest to the budget."""
    budget = parameter_budget(config)

    def count(width: int) -> int:
        with torch.device("meta"):
            return count_parameters(layer(config.dim, width))

    larger = 1 + bisect_left(range(1, 1 << 16), budget, key=count)  # the first width that reaches the budget
    width = min((max(1, larger - 1), larger), key=lambda width: abs(count(width) - budget))
    if abs(count(width) - budget) > BUDGET_TOLERANCE * budget:
        raise ValueError(
            f"no width brings this layer within {BUDGET_TOLERANCE:.0%} of {budget} parameters (dim={config.dim}): the "
            f"nearest has {count(width)}; change d_state or expand a little"
        )
    return partial(layer, config.dim, width)


LAYERS: dict[str, Callable[[ModelConfig], SequenceLayer]] = {
    "mamba2": _mamba2,
    "lstm": partial(_fitted, LSTM),
    "attention": partial(_fitted, Attention),
}
"""Name → function that takes a configuration and returns a constructor of layers."""
