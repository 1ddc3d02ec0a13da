"""The training loop, plain: batches in, a better model out.

batch → model → loss → gradients, clipped → AdamW → moving average of the weights

Book: "Training". Source: the published implementation of arXiv:2508.14556 for the defaults.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .losses import bsmamba2_loss
from .model import BSMamba2


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; checked on creation, `ValueError` names the field.

    Attributes:
        steps: optimiser steps.
        lr: learning rate of AdamW; the published one is 5e-4.
        schedule: `constant` as published, or `cosine`: a warm-up over the first twentieth of the steps,
            then a half cosine to zero, for short runs.
        weight_decay: of AdamW, not applied to `A_log`, `D` and `dt_bias`.
            Differs from the published model: its code decays these three as well.
        clip: largest norm of the gradient.
        ema_decay: of the moving average of the weights, per step.
        loss_hop: samples between the frames of the loss; the published 147 costs three times what 441 does.
    """

    steps: int
    lr: float = 5e-4
    schedule: str = "constant"
    weight_decay: float = 0.01
    clip: float = 3.0
    ema_decay: float = 0.999
    loss_hop: int = 147

    def __post_init__(self) -> None:
        for name in ("steps", "loss_hop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule={self.schedule!r} must be constant or cosine")
        for name in ("lr", "weight_decay", "clip", "ema_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number, not negative")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r} must lie in [0, 1)")


@dataclass(frozen=True)
class Step:
    """What one optimiser step said: its number (from 1), the loss, the gradient's norm before clipping, the rate."""

    number: int
    loss: float
    gradient: float
    lr: float


class Trainer:
    """Trains a model in place and keeps the moving average of its weights.

    Args:
        model: one stem; trained where its weights are.
        config: how.

    Raises:
        ValueError: for a model of several stems.
    """

    def __init__(self, model: BSMamba2, config: TrainConfig) -> None:
        if len(model.config.stems) != 1:
            raise ValueError(f"the training target is one stem, but the model gives {model.config.stems}")
        self.model, self.config = model, config
        self.optimiser = torch.optim.AdamW(parameter_groups(model, config.weight_decay), lr=config.lr)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))

    @property
    def averaged(self) -> BSMamba2:
        """The model with the moving average of the weights, for validation and for use."""
        module = self.average.module
        assert isinstance(module, BSMamba2)
        return module.eval()

    def run(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Step]:
        """Train; yields after every step, so that a caller can draw, print or stop.

        Args:
            batches: pairs (mixture, target), each (b, c, samples), at least `steps` of them.

        Raises:
            FloatingPointError: when the loss or the gradient is not finite; the weights are still those
                of the step before.
            ValueError: when the batches run out.
        """
        self.model.train()
        number = 0
        for number, (mixture, target) in enumerate(islice(batches, self.config.steps), start=1):
            lr = learning_rate(number, self.config)
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            loss = bsmamba2_loss(self.model(mixture)[:, 0], target, hop=self.config.loss_hop)
            self.optimiser.zero_grad()
            loss.backward()
            gradient = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
            if not (loss.isfinite() and gradient.isfinite()):
                raise FloatingPointError(f"step {number}: loss {loss.item()}, gradient norm {gradient.item()}")
            self.optimiser.step()
            self.average.update_parameters(self.model)
            yield Step(number, loss.item(), gradient.item(), lr)
        if number < self.config.steps:
            raise ValueError(f"the batches ran out after {number} of {self.config.steps} steps")


def learning_rate(number: int, config: TrainConfig) -> float:
    """The rate of step `number`, from 1."""
    if config.schedule == "constant":
        return config.lr
    warm = max(1, config.steps // 20)
    if number <= warm:
        return config.lr * number / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (number - warm) / (config.steps + 1 - warm)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: what is decayed, and `A_log`, `D` and `dt_bias`, which are not."""
    exempt = ("A_log", "D", "dt_bias")
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name.split(".")[-1] not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name.split(".")[-1] in exempt], "weight_decay": 0.0},
    ]
