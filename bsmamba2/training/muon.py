"""Muon: steps of a matrix that are as long in all its directions.

Book: "Training".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from .distributed import balance, rank, world_size

NS_COEFFS = (3.4445, -4.775, 2.0315)
"""Of one round of `newton_schulz`, the factors of X, X·Xᵀ·X and (X·Xᵀ)²·X: K. Jordan et al., "Muon", 2024."""


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are turned (`newton_schulz`) before they are a step, at a step size that suits AdamW's rates.

    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the step size after J. Liu
    et al., "Muon is scalable for LLM training", arXiv:2502.16982. As `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, and with its states, but for two things:

    - On a CPU it turns in float32. torch's turns in bfloat16 everywhere, and a CPU without such products imitates them:
      6.1 s against 0.3 s for the 136 matrices of the checkpoint that ships, on one core of an AMD EPYC with AVX2.
    - The matrices are shared out over the processes that train together. To turn them is nearly all of the work, so n
      processes do it in about 1/n of the time. The momenta cost little, and every process keeps all of them: whichever
      one writes the state has it whole, and any number of processes goes on from it.

    Args:
        params: matrices, or groups of them, whose gradients are the same in all processes.
        lr: step size, a factor of 0.2 times the root of a matrix's longer side.
        weight_decay: by which a step shrinks a matrix, times `lr`.
        momentum: share of the momentum that a step keeps; Nesterov's, so it is looked at once more.

    Raises:
        ValueError: for a parameter that is no matrix.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = [tuple(one.shape) for group in self.param_groups for one in group["params"] if one.ndim != 2]
        if shapes:
            raise ValueError(f"Muon takes matrices, not parameters of shape {shapes}: give those to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all matrices that have a gradient; what `closure` returns, which is called before it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        directions = []
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    state = self.state[one]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(one.grad)
                    momentum = state["momentum_buffer"].lerp_(one.grad, 1 - group["momentum"])
                    directions.append((group, one, momentum))
        parts = balance([_work(one.shape) for _, one, _ in directions], world_size())
        for i in parts[rank()]:
            group, one, momentum = directions[i]
            step = newton_schulz(one.grad.lerp(momentum, group["momentum"]))
            one.mul_(1 - group["lr"] * group["weight_decay"])
            one.add_(step, alpha=-0.2 * group["lr"] * max(one.shape) ** 0.5)
        if world_size() > 1:
            _spread([[directions[i][1] for i in part] for part in parts])
        return loss


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None, *, rounds: int = 5) -> Tensor:
    """A matrix with the singular vectors of the one given, and singular values from 0.68 to 1.21.

    So much of those that are above a 500th of the matrix's norm (the root of the sum of their squares); what is below
    grows 485-fold or less.

    Args:
        matrix: (m, n).
        dtype: of the products: float32 for a matrix on a CPU and bfloat16 elsewhere, if it is not given.
        rounds: of an iteration like Newton's and Schulz's, by an odd polynomial of the singular values.

    Returns:
        (m, n), in `dtype`.
    """
    if dtype is None:
        dtype = torch.float32 if matrix.device.type == "cpu" else torch.bfloat16
    a, b, c = NS_COEFFS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _work(shape: torch.Size) -> float:
    """Multiplications of one round of `newton_schulz`, and what it costs to begin with a matrix at all."""
    short, long = sorted(shape)
    return short * short * (2 * long + short) + 1e5


def _spread(parts: list[list[Tensor]]) -> None:
    """Give all processes the matrices of each, `parts` by rank."""
    for source, part in enumerate(parts):
        if part:  # there may be more processes than matrices
            flat = torch.cat([one.flatten() for one in part])
            distributed.broadcast(flat, source)
            if source != rank():
                for one, weights in zip(part, flat.split([one.numel() for one in part]), strict=True):
                    one.copy_(weights.view_as(one))
