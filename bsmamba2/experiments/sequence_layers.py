"""Other layers that read a sequence: an LSTM and self-attention in the place of a Mamba-2 mixer, at its size.

    LSTM        x → LSTM of width w → Linear                                   sees the past
    Attention   x → q, k, v of every head, turned by their place → softmax(q kᵀ / √p) v → Linear, then a
                feed-forward of width w                                        sees everything

Both are (b, length, d) → (b, length, d) without a residual, as `bsmamba2.mamba2.Mamba2` is, so that
`BSMamba2(config, sequence_layer=…)` takes any of them; norm and residual are those of the bidirectional block. The one
free width w of each is chosen so that it has as many parameters as the Mamba-2 mixer of the same configuration.

Book: "Does Mamba meet silence?". Sources: Hochreiter and Schmidhuber, Long Short-Term Memory (1997); Vaswani and
others, arXiv:1706.03762; Su and others, arXiv:2104.09864 (rotary positions). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from ..dual_path import SequenceLayer
from ..kernels import triton
from ..mamba2 import Mamba2, RMSNorm

TOLERANCE = 0.01
"""How far the parameters of two layers may lie apart, as a share, to be called equal."""
BASE = 10_000.0
"""Of the rotary positions: the slowest pair of features turns once in about 2π · BASE frames."""


class LSTM(nn.Module):
    """A long short-term memory that sees the past, and a Linear back to d.

    Args:
        dim: d.
        width: of its state.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, width, batch_first=True)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        return self.out_proj(self.lstm(x)[0])


class Attention(nn.Module):
    """Self-attention over the whole sequence with rotary positions, then a feed-forward: a Transformer's layer.

        a = out_proj(softmax(q kᵀ / √p) v),   y = a + W₂ gelu(W₁ rms(u + a))

    u is what comes in: the block around it has normed it already (pre-norm), and adds y to its own input. It looks both
    ways, so in a bidirectional block two of them read the same frames, the second one backwards.

    Args:
        dim: d.
        width: of the feed-forward between its two Linears.
        headdim: p; even, and a divisor of d.

    Raises:
        ValueError: for another head width.
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
        y = functional.scaled_dot_product_attention(rotate(q), rotate(k), v)
        attended = self.out_proj(y.transpose(1, 2).flatten(-2))
        return attended + self.feed_forward(self.norm(x + attended))


def rotate(x: Tensor, first: int = 0) -> Tensor:
    """Turn pairs of features by angles that grow with the place in the sequence.

        (x_i, x_{i + p/2}) at place j  ↦  the pair turned by j · BASE^(−2i/p),   i < p/2

    The product of a q turned at place j and a k turned at place m depends on j − m alone.

    Args:
        x: (..., length, p), p even.
        first: place of the first frame.
    """
    half = x.shape[-1] // 2
    speed = BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


# --- one budget -------------------------------------------------------------------------------------------


def parameters(layer: nn.Module) -> int:
    """How many numbers it learns."""
    return sum(one.numel() for one in layer.parameters())


def budget(config: ModelConfig) -> int:
    """Parameters of the Mamba-2 mixer of a configuration: what the other layers may have too."""
    with torch.device("meta"):
        return parameters(_mamba2(config)())


def choose(name: str, config: ModelConfig) -> SequenceLayer:
    """A maker of layers, for the `sequence_layer` of a `BSMamba2` of this configuration.

    Args:
        name: "mamba2", "lstm" or "attention".
        config: gives d, and the size of the Mamba-2 mixer that the others are held to.

    Raises:
        ValueError: for another name, or where no width brings the layer within `TOLERANCE` of the mixer's parameters.
    """
    if name not in KINDS:
        raise ValueError(f"layer {name!r} is not one of {', '.join(KINDS)}")
    return KINDS[name](config)


def _mamba2(config: ModelConfig) -> SequenceLayer:
    sizes = {name: getattr(config, name) for name in ("d_state", "headdim", "expand", "d_conv")}
    return partial(Mamba2, config.dim, **sizes, scan=triton.choose("auto"))


def _fitted(kind: Callable[[int, int], nn.Module], config: ModelConfig) -> SequenceLayer:
    """The layer with the width whose number of parameters is nearest to the budget."""
    wanted = budget(config)

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameters(kind(config.dim, width))

    high = 1
    while count(high) < wanted:
        high *= 2
    low = high // 2
    while high - low > 1:  # count(low) < wanted <= count(high), but for low = 0
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= wanted else (middle, high)
    width = min((one for one in (low, high) if one), key=lambda one: abs(count(one) - wanted))
    if abs(count(width) - wanted) > TOLERANCE * wanted:
        raise ValueError(
            f"no width brings this layer within {TOLERANCE:.0%} of {wanted} parameters (dim={config.dim}): nearest are "
            f"{count(width)}; change state or expand a little"
        )
    return partial(kind, config.dim, width)


KINDS: dict[str, Callable[[ModelConfig], SequenceLayer]] = {
    "mamba2": _mamba2,
    "lstm": partial(_fitted, LSTM),
    "attention": partial(_fitted, Attention),
}
"""Name → from a configuration, a maker of layers."""
