"""A larger model that begins as a smaller one: more layers, more features, wider masks.

What the smaller one has keeps its place. Of what is new, each path has one end that is zero, so that nothing comes out
of it at first, and one that is random, so that a gradient reaches the zero:

    a new feature     between blocks: zero rows of the band split and of the merging Linears into it, random columns out
                      of it; inside a block: random rows of `out_proj` into it, zero columns of the merging Linear out
    a new head        its gate z is zero, so SiLU(z) = 0; what it reads and what it would write are random
    a new hidden unit of a mask    random rows into it, zero columns out of it
    a new layer       its merging Linears are zero, and what is left of a bidirectional block is its residual

A norm over d features of D, the others zero, divides by a root mean square that is sqrt(d / D) times as large: its
gains are made smaller by as much.

Book: "Scaling up". The idea: T. Chen, I. Goodfellow and J. Shlens, "Net2Net", arXiv:1511.05641; with zeros instead of
copies. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ..checkpoints import Checkpoint
from ..config import ModelConfig
from ..model import BSMamba2

GROWING = ("layers", "dim", "mask_expand")
"""The sizes in which a model may be larger than what it begins as."""


def begin_with(model: BSMamba2, checkpoint: Checkpoint) -> None:
    """Give a model the weights of a checkpoint, which may be smaller; then it computes what the checkpoint's does.

    With more layers alone it does so bit for bit; with more features up to rounding, and to the epsilon of the norms.

    Raises:
        ValueError: for a checkpoint that differs in another size, or is larger; the model is left as it was.
    """
    there, here = checkpoint.config, model.config
    same = dataclasses.replace(there, **{name: getattr(here, name) for name in (*GROWING, "stems")}) == here
    same = same and len(there.stems) == len(here.stems)  # another voice may be learned, not another number of them
    hidden = there.mask_expand * there.dim <= here.mask_expand * here.dim
    if not same or there.layers > here.layers or there.dim > here.dim or not hidden:
        raise ValueError(
            f"init={str(checkpoint.path)!r} is {there}, and {here} is another size: "
            f"only layers, dim and mask_expand · dim may be larger"
        )
    added = tuple(f"layers.{number}." for number in range(there.layers, here.layers))
    state = {}
    for name, fresh in model.state_dict().items():
        if name.startswith(added):
            state[name] = torch.zeros_like(fresh) if ".merge." in name else fresh
        else:
            state[name] = _grown(name, checkpoint.state[name], fresh, there, here)
    model.load_state_dict(state)


def _grown(name: str, old: Tensor, fresh: Tensor, there: ModelConfig, here: ModelConfig) -> Tensor:
    """The old weights in their places, with zeros and fresh weights around them."""
    if old.shape == fresh.shape:
        return old
    n, start = here.state, torch.arange
    features, inner, heads = start(there.dim), start(there.inner), start(there.heads)
    hidden = start(there.mask_expand * there.dim)
    mixed = torch.cat((inner, here.inner + start(2 * n)))  # x, B, C
    projected = torch.cat((inner, here.inner + mixed, 2 * here.inner + 2 * n + heads))  # z, x, B, C, dt
    merged = torch.cat((features, here.dim + features))  # forwards, backwards
    whole = start(fresh.shape[0])
    table = {  # by the first ending that fits: rows, columns, and how much of the fresh weights stays around them
        "linear.weight": (features, None, 0.0),
        "linear.bias": (features, None, 0.0),
        "in_proj.weight": (projected, features, 1.0),
        "conv1d.weight": (mixed, None, 1.0),
        "conv1d.bias": (mixed, None, 1.0),
        "dt_bias": (heads, None, 1.0),
        "A_log": (heads, None, 1.0),
        "D": (heads, None, 1.0),
        "mixer.norm.weight": (inner, None, 1.0),
        "out_proj.weight": (features, inner, 1.0),
        "norm.weight": (features, None, 1.0),
        "final_norm.gain": (features, None, 1.0),
        "merge.weight": (features, merged, 0.0),
        "merge.bias": (features, None, 0.0),
        "expand.weight": (hidden, features, 1.0),
        "expand.bias": (hidden, None, 1.0),
        "project.weight": (whole, hidden, 0.0),
    }
    rows, columns, rest = next(row for kind, row in table.items() if name.endswith(kind))
    new = rest * fresh
    if name.endswith("in_proj.weight"):
        new[there.inner : here.inner] = 0  # the gates z of new heads
    if "norm." in name:
        old = old * math.sqrt(len(old) / len(fresh))
    new[rows if columns is None else (rows[:, None], columns)] = old
    return new
