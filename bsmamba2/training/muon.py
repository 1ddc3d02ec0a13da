"""Muon: momentum SGD with orthogonalised updates.

Book: "Beyond the published recipe".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import BSMamba2
from ..train import TrainConfig, adamw

NS_COEFFS = (3.4445, -4.775, 2.0315)
"""Factors of X, X·Xᵀ·X and (X·Xᵀ)²·X in an iteration of `newton_schulz`. Source: K. Jordan et al., "Muon", 2024."""


class Muon(torch.optim.Optimizer):
    """Muon: momentum SGD with orthogonalised updates (`newton_schulz`), and step sizes that fit AdamW's learning rates.

    K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; the step size follows
    J. Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982. This class equals `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, states included, except that on a CPU it orthogonalises in float32, because
    bfloat16 takes 20 times as long on a CPU without bfloat16 arithmetic.

    Args:
        params: matrices, or groups of them.
        lr: step size, multiplied by 0.2 times the square root of a matrix's longer side.
        weight_decay: each step shrinks a matrix by the fraction `lr · weight_decay`.
        momentum: fraction of the momentum that each step keeps (Nesterov momentum).

    Raises:
        ValueError: for a parameter that is not a matrix.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = [tuple(weight.shape) for group in self.param_groups for weight in group["params"] if weight.ndim != 2]
        if shapes:
            raise ValueError(f"Muon takes matrices, not parameters of shape {shapes}: give those to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all matrices that have a gradient; if `closure` is given, call it first and return its result."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(weight.grad)
                    momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                    update = newton_schulz(weight.grad.lerp(momentum, group["momentum"]))
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-0.2 * group["lr"] * max(weight.shape) ** 0.5)
        return loss


def newton_schulz(matrix: Tensor, dtype: torch.dtype | None = None, *, iterations: int = 5) -> Tensor:
    """Newton–Schulz orthogonalisation: the same singular vectors, with singular values in 0.68–1.21.

    This range holds for singular values above 1/500 of the matrix's Frobenius norm; smaller ones grow at most 485-fold.

    Args:
        matrix: (m, n).
        dtype: data type of the products; by default float32 for a matrix on a CPU, and bfloat16 elsewhere.
        iterations: number of times that an odd polynomial is applied to the singular values.

    Returns:
        (m, n), in `dtype`.
    """
    if dtype is None:
        dtype = torch.float32 if matrix.device.type == "cpu" else torch.bfloat16
    a, b, c = NS_COEFFS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_and_adamw(model: BSMamba2, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the weights of all Linear layers, including the first and last, and AdamW for all other parameters."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    muon = Muon(matrices, lr=config.lr, weight_decay=config.weight_decay)
    return [adamw(model, config, without=matrices), muon]
