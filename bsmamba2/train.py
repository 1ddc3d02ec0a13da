"""Training loop for one process and one or more stems.

batches → model → loss → gradients, accumulated and clipped → AdamW → moving average of the weights (EMA)

`bsmamba2.training` adds multi-process training (`ddp`), Muon (`muon`) and folders that let a run resume (`run_dir`).

Book: "Training". Source of the defaults: the published implementation of arXiv:2508.14556.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .losses import WINDOWS, bsmamba2_loss, snr_loss
from .model import BSMamba2
from .settings import COUNT, NOT_NEGATIVE, check_settings, setting

SCHEDULES, LOSSES = ("constant", "cosine", "wsd"), ("published", "snr")
PRECISIONS = ("float32", "bfloat16")
Batch = Sequence[Any]
"""(mixture, target) or (mixture, target, names).

Mixture (b, c, samples); target (b, stem, c, samples), or (b, c, samples) for one stem; b strings that name sources.
"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the training loop, with the published defaults. A `ValueError` names an invalid setting.

    Schedules: `wsd` rises over 100 steps, stays constant, and falls linearly to zero over the last `decay_ratio` of the
    steps; it can be continued with more steps (A. Hägele et al., arXiv:2405.18392). `cosine` rises over the first
    twentieth of the steps, then falls along half a cosine.
    """

    steps: int = setting(dataclasses.MISSING, "optimiser steps; 100 are a published epoch", within=COUNT)
    lr: float = setting(5e-4, "learning rate; published: 5e-4", within=NOT_NEGATIVE)
    schedule: str = setting("constant", "constant, as published; cosine, for short runs; wsd, for open ends", SCHEDULES)
    decay_ratio: float = setting(0.2, "share of the steps over which wsd falls to zero, at the end", within="(0, 1]")
    weight_decay: float = setting(0.01, "weight decay; A_log, D and dt_bias have none", within=NOT_NEGATIVE)
    max_grad_norm: float = setting(3.0, "largest norm of the gradient, which is clipped to it", within=NOT_NEGATIVE)
    ema_decay: float = setting(0.999, "of the moving average of the weights; published: 0.999", within="[0, 1)")
    loss: str = setting("published", "published; or snr, the error's energy in dB, similar to the scores", LOSSES)
    loss_hop: int = setting(147, "hop of the published loss, in samples; published: 147", within=COUNT)
    loss_windows: tuple[int, ...] = setting(WINDOWS, "of the published loss; cheaper: 2048 1024 512", within=COUNT)
    grad_accum_steps: int = setting(1, "batches in a step; published: 6, in each of 2 processes", within=COUNT)
    precision: str = setting("float32", "float32; or bfloat16 as published: matrix products under autocast", PRECISIONS)
    gradient_checkpointing: bool = setting(False, "compute layers twice to need less memory")
    compile: bool = setting(False, "torch.compile the layers (for GPUs)")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class Step:
    """Metrics of one optimiser step: step number, from 1; loss; gradient norm before clipping; learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


class Trainer:
    """Training loop: trains a model in place and keeps the moving average (EMA) of its weights.

    As in the published code, the average starts from the initial weights.

    Args:
        model: model to train, on the device of its weights.
        config: settings.
        optimisers: optimisers that step together, all at the scheduled learning rate; by default one AdamW for all
            parameters.

    Attributes:
        step: number of completed steps.
    """

    def __init__(self, model: BSMamba2, config: TrainConfig, *, optimisers: Sequence[Optimizer] = ()) -> None:
        self.model, self.config, self.step = model, config, 0
        self.network: nn.Module = model  # the module that is called; `DistributedTrainer` wraps it
        self.device = next(model.parameters()).device
        model.gradient_checkpointing = config.gradient_checkpointing
        self.optimisers = list(optimisers) or [adamw(model, config)]
        self.ema_model = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.ema_model.n_averaged += 1  # so that torch averages from the initial weights, not from those of step 1
        self.compile_pending = config.compile

    @property
    def ema(self) -> BSMamba2:
        """Model with the moving average of the weights, in evaluation mode, for validation and inference."""
        return cast(BSMamba2, self.ema_model.module).eval()

    def run(self, batches: Iterable[Batch]) -> Iterator[Step]:
        """Train until `steps` are completed; yields after every step, so that a caller can plot, print or stop.

        Args:
            batches: `grad_accum_steps` batches per step, starting with those of the first step. A resumed trainer skips
                the batches of completed steps, with `batches.skip(count)` if that method exists.

        Raises:
            FloatingPointError: if the loss or the gradient is not finite. The error names the step and the sources of
                the batch; the weights remain those of the previous step.
            ValueError: if the batches run out, or do not match the model's stems.
        """
        self.model.train()
        per_step = self.config.grad_accum_steps
        if hasattr(batches, "skip"):
            batches.skip(self.step * per_step)
        else:
            batches = islice(batches, self.step * per_step, None)
        supply = iter(batches)
        while self.step < self.config.steps:
            group = list(islice(supply, per_step))
            if len(group) < per_step:
                raise ValueError(f"the batches ran out after {self.step} of {self.config.steps} steps")
            yield self.train_step(group)

    def train_step(self, batches: Sequence[Batch]) -> Step:
        """Run one optimiser step on `grad_accum_steps` batches of equal size; raises the same errors as `run`."""
        losses = self.backward(batches)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        loss = self.reduce_loss(losses.mean())
        if not (loss.isfinite() and grad_norm.isfinite()):
            per_batch = zip(losses.isfinite().tolist(), batches, strict=True)
            names = self.gather([(finite, name) for finite, (_, _, *given) in per_batch for name in chain(*given)])
            bad = ", ".join([name for finite, name in names if not finite] or [name for _, name in names])
            norms = f"loss {loss.item()}, gradient norm {grad_norm.item()}"
            raise FloatingPointError(f"step {self.step + 1}: {norms}{bad and f'; in the batch: {bad}'}")
        lr = learning_rate(self.step + 1, self.config)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
        self.ema_model.update_parameters(self.model)
        self.step += 1
        return Step(self.step, loss.item(), grad_norm.item(), lr)

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Accumulate gradients of the mean loss over batches of equal size; returns the loss of each, (batches,)."""
        if self.compile_pending:
            self.compile_layers(batches[0][0])
        self.model.zero_grad()
        losses = []
        for i, (mixture, target, *_) in enumerate(batches, start=1):
            with self.no_sync() if i < len(batches) else nullcontext():
                loss = self.loss(mixture, target)
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def loss(self, mixture: Tensor, target: Tensor) -> Tensor:
        """Training loss, summed over the model's stems: scalar. Shapes as in `Batch`.

        Differs from the published model for several stems: the published loss is their mean. For one stem, both agree.

        Raises:
            ValueError: if the target and the model have different numbers of stems.
        """
        mixture, target = (part.to(self.device, non_blocking=True) for part in (mixture, target))
        targets = target.unbind(1) if target.dim() == 4 else (target,)
        if len(targets) != len(self.model.config.stems):
            given = ", ".join(self.model.config.stems)
            raise ValueError(f"the target has {len(targets)} stems, but the model gives {given}")
        pairs = zip(self.separate(mixture).unbind(1), targets, strict=True)
        if self.config.loss == "snr":
            losses = [snr_loss(estimate, target, mixture) for estimate, target in pairs]
        else:
            sizes: dict[str, Any] = {"windows": self.config.loss_windows, "hop_length": self.config.loss_hop}
            losses = [bsmamba2_loss(estimate, target, **sizes) for estimate, target in pairs]
        return torch.stack(losses).sum()

    def separate(self, mixture: Tensor) -> Tensor:
        """Separate a batch, (b, c, samples) → (b, stem, c, samples), under autocast if `precision` is bfloat16."""
        with self.autocast():
            estimates: Tensor = self.network(mixture.to(self.device, non_blocking=True))
            return estimates

    def autocast(self) -> AbstractContextManager[None]:
        """Autocast context for the `precision` of the settings, for training and validation."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")

    # For one process; `training.ddp.DistributedTrainer` overrides these three.

    def no_sync(self) -> AbstractContextManager[None]:
        """Context that skips the averaging of gradients over processes."""
        return nullcontext()

    def reduce_loss(self, loss: Tensor) -> Tensor:
        """Mean of the loss over processes."""
        return loss

    def gather(self, values: list[Any]) -> list[Any]:
        """Gather the values of all processes."""
        return values

    def compile_layers(self, mixture: Tensor) -> None:
        """Compile the layers with `torch.compile` and test them, forward and backward; on failure, warn and undo it."""
        self.compile_pending = False
        for layer in self.model.layers:
            layer.compile()
        try:
            with self.no_sync():
                self.separate(mixture).sum().backward()
        except Exception as error:  # a compiler has many ways to fail
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"torch.compile failed, training goes on without it ({reason})", stacklevel=2)
            for layer in self.model.layers:
                layer._compiled_call_impl = None  # set by Module.compile()

    def state(self) -> dict[str, Any]:
        """State that a run needs to resume bit for bit, except its settings; only tensors, numbers and strings."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema_model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Resume from the `state` of a trainer with the same model, settings and optimisers."""
        self.model.load_state_dict(state["model"])
        self.ema_model.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step = state["step"]


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning-rate schedule: the rate of a step; steps are counted from 1."""
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        left = (config.steps + 1 - step) / max(1, int(config.steps * config.decay_ratio))
        return config.lr * min(1.0, step / 100, left)
    warmup = max(1, config.steps // 20)
    if step <= warmup:
        return config.lr * step / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (config.steps + 1 - warmup)))


def adamw(model: BSMamba2, config: TrainConfig, *, without: Iterable[Tensor] = ()) -> AdamW:
    """AdamW for the parameters of a model, except those in `without`."""
    groups = parameter_groups(model, config.weight_decay, without=without)
    # Fused: one pass over all parameters instead of a dozen small operations for each.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return AdamW(groups, lr=config.lr, fused=fused)


def parameter_groups(model: nn.Module, weight_decay: float, *, without: Iterable[Tensor] = ()) -> list[dict]:
    """Two parameter groups: `A_log`, `D` and `dt_bias` without weight decay, all others with it.

    Differs from the published model: its code applies weight decay to these three as well.
    """
    exempt, others = ("A_log", "D", "dt_bias"), {id(parameter) for parameter in without}
    named = [(name.split(".")[-1], p) for name, p in model.named_parameters() if id(p) not in others]
    return [
        {"params": [p for name, p in named if name not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name in exempt], "weight_decay": 0.0},
    ]
