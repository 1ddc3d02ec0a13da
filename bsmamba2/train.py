"""The training loop, plain: batches in, a better model out.

batches → model → loss → gradients, summed and clipped → AdamW, or Muon and AdamW → moving average of the weights

The same loop runs in one process and, under `torchrun`, in many: each then takes its own batches, and
DistributedDataParallel averages the gradients. What keeps a run on disk is in `bsmamba2.training.run_dir`.

Book: "Training". Source: the published implementation of arXiv:2508.14556 for the defaults.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import ModelConfig
from .kernels import loops
from .losses import WINDOWS, bsmamba2_loss, snr_loss
from .model import BSMamba2
from .training.distributed import all_gather_object, total, world_size
from .training.muon import Muon

SCHEDULES = ("constant", "cosine", "wsd")
OPTIMISERS = ("adamw", "muon")
LOSSES = ("published", "snr")
Batch = Sequence[Any]
"""(mixture, target) or (mixture, target, names): two tensors (b, c, samples), and b strings that say where from."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; checked on creation, `ValueError` names the field.

    Attributes:
        steps: optimiser steps.
        optimiser: `adamw`, as published; or `muon`, which may need fewer steps: the weights of Linears go by K.
            Jordan's Muon (2024; `muon.py`), the first and last Linears too, the rest by AdamW.
        lr: learning rate; the published one is 5e-4. Muon's steps are scaled to the size of AdamW's, as by
            J. Liu et al. (arXiv:2502.16982).
        schedule: `constant` as published. For short runs `cosine`: a warm-up over the first twentieth of the
            steps, then a half cosine to zero. For runs whose end is not known yet `trapezoid`: a warm-up over
            100 steps, constant, and a straight line to zero over the last steps; such a run goes on with another
            number of steps.
        decay_ratio: of a trapezoid, the share of the steps over which the rate falls. A. Hägele et al. (arXiv:2405.18392)
            found such a fall to do at least as well as a cosine made for that length.
        weight_decay: not applied to `A_log`, `D` and `dt_bias`.
            Differs from the published model: its code decays these three as well.
        max_grad_norm: largest norm of the gradient. 3 seldom touches that of the published loss. That of `snr` is longer: nearly
            every step is scaled down to it.
        ema_decay: of the moving average of the weights, per step.
        loss: `published`; or `snr`, the error's energy in dB (`losses.snr_loss`), whose fall the scores reward.
        loss_hop: samples between the frames of the published loss; its own 147 costs three times what 441 does.
        loss_windows: of the published loss, in samples; (2048, 1024, 512) is the earlier, cheaper form.
        grad_accum_steps: batches whose gradients are averaged into one step; the published run has 6.
        precision: `float32`, or `bfloat16`: matrix products under autocast, as published; weights, STFT
            and loss stay float32, and masks are widened to it.
        gradient_checkpointing: keep only what goes into each layer and compute the layer again in the backward
            pass: a third more time, memory of one layer instead of all.
        compile: on a CPU, mixers run in the native kernel (`bsmamba2.kernels.cpu`), elsewhere the layers go through
            `torch.compile`; where that fails, one warning and go on without.
    """

    steps: int
    optimiser: str = "adamw"
    lr: float = 5e-4
    schedule: str = "constant"
    decay_ratio: float = 0.2
    weight_decay: float = 0.01
    max_grad_norm: float = 3.0
    ema_decay: float = 0.999
    loss: str = "published"
    loss_hop: int = 147
    loss_windows: tuple[int, ...] = WINDOWS
    grad_accum_steps: int = 1
    precision: str = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.loss_windows, list):  # as JSON and YAML have it
            object.__setattr__(self, "loss_windows", tuple(self.loss_windows))
        for name in ("steps", "loss_hop", "grad_accum_steps"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive whole number")
        windows = self.loss_windows
        if not isinstance(windows, tuple) or not windows or not all(map(_is_count, windows)):
            raise ValueError(f"loss_windows={windows!r} must be positive whole numbers of samples, at least one")
        known = {
            "optimiser": OPTIMISERS,
            "schedule": SCHEDULES,
            "loss": LOSSES,
            "precision": ("float32", "bfloat16"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {' or '.join(choices)}")
        for name in ("lr", "decay_ratio", "weight_decay", "max_grad_norm", "ema_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number, not negative")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay!r} must lie in [0, 1)")
        if not 0 < self.decay_ratio <= 1:
            raise ValueError(f"decay_ratio={self.decay_ratio!r} must lie in (0, 1]")
        for name in ("gradient_checkpointing", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false")


@dataclass(frozen=True)
class Step:
    """What one optimiser step said: its number (from 1), the loss, the gradient's norm before clipping, the rate."""

    number: int
    loss: float
    gradient: float
    lr: float


class Trainer:
    """Trains a model in place and keeps the moving average of its weights.

    Where `torch.distributed` has a process group, every process makes a trainer of the same model, and
    they step together.

    Args:
        model: one stem; trained where its weights are.
        config: how.

    Attributes:
        number: steps done so far.

    Raises:
        ValueError: for a model of several stems.
    """

    def __init__(self, model: BSMamba2, config: TrainConfig) -> None:
        if len(model.config.stems) != 1:
            raise ValueError(f"the training target is one stem, but the model gives {model.config.stems}")
        self.model, self.config, self.number = model, config, 0
        self.device = next(model.parameters()).device
        model.gradient_checkpointing = config.gradient_checkpointing
        self.together = (
            DistributedDataParallel(model) if world_size() > 1 else None
        )  # all have the first one's weights now
        self.optimisers = optimisers(model, config)
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.untried = config.compile and self.device.type != "cpu"

    @property
    def averaged(self) -> BSMamba2:
        """The model with the moving average of the weights, for validation and for use."""
        module = self.average.module
        assert isinstance(module, BSMamba2)
        return module.eval()

    def run(self, batches: Iterable[Batch]) -> Iterator[Step]:
        """Train until `steps` are done; yields after every step, so that a caller can draw, print or stop.

        Args:
            batches: `grad_accum_steps` of them for every step, from the first step on: where some steps are done
                already, their batches are passed over, by `batches.skip(count)` if there is one.

        Raises:
            FloatingPointError: when the loss or the gradient is not finite; it tells the step and what was
                in the batch, and the weights are still those of the step before.
            ValueError: when the batches run out.
        """
        self.model.train()
        supply = _after(batches, self.number * self.config.grad_accum_steps)
        while self.number < self.config.steps:
            group = list(islice(supply, self.config.grad_accum_steps))
            if len(group) < self.config.grad_accum_steps:
                raise ValueError(f"the batches ran out after {self.number} of {self.config.steps} steps")
            yield self.step(group)

    def step(self, batches: Sequence[Batch]) -> Step:
        """One optimiser step from `grad_accum_steps` batches of one size; raises as `run` does."""
        number = self.number + 1
        lr = learning_rate(number, self.config)
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = lr
        losses = self.backward(batches)
        gradient = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        loss = total(losses.mean()) / world_size()
        if not (loss.isfinite() and gradient.isfinite()):
            here = [
                (one.isfinite().item(), list(batch[2]) if len(batch) > 2 else [])
                for batch, one in zip(batches, losses, strict=True)
            ]
            everywhere = [batch for process in all_gather_object(here) for batch in process]
            bad = [batch for batch in everywhere if not batch[0]] or everywhere
            names = [name for _, inside in bad for name in inside]
            told = f"; in the batch: {', '.join(names)}" if names else ""
            raise FloatingPointError(f"step {number}: loss {loss.item()}, gradient norm {gradient.item()}{told}")
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update_parameters(self.model)
        self.number = number
        return Step(number, loss.item(), gradient.item(), lr)

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Fill the gradients with those of the mean loss over batches of one size; the loss of each, (batches,)."""
        if self.untried:
            self.try_compiled(batches[0][0])
        self.model.zero_grad()
        losses = []
        for i, (mixture, target, *_) in enumerate(batches, start=1):
            # Many processes exchange their gradients once a step, with the last batch.
            with self.alone() if i < len(batches) else nullcontext():
                loss = self.loss(mixture, target)
                (loss / len(batches)).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def loss(self, mixture: Tensor, target: Tensor) -> Tensor:
        """How far the model's estimate is from the target, both (b, c, samples), in the loss asked for."""
        estimate = self.separate(mixture)
        target = target.to(self.device, non_blocking=True)
        if self.config.loss == "snr":
            return snr_loss(estimate, target, mixture.to(self.device, non_blocking=True))
        return bsmamba2_loss(estimate, target, windows=self.config.loss_windows, hop_length=self.config.loss_hop)

    def alone(self) -> AbstractContextManager[None]:
        """A context in which processes keep their gradients to themselves."""
        return nullcontext() if self.together is None else self.together.no_sync()

    def separate(self, mixture: Tensor) -> Tensor:
        """The one stem of a batch, (b, c, samples) → (b, c, samples), in the precision asked for."""
        model = self.together or self.model
        mixture = mixture.to(self.device, non_blocking=True)
        narrow = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
        with narrow, loops.compiled(self.config.compile and self.device.type == "cpu"):
            return model(mixture)[:, 0]

    def try_compiled(self, mixture: Tensor) -> None:
        """Compile the layers and try them, forwards and backwards; where that fails, warn and take them as they are."""
        self.untried = False
        for layer in self.model.layers:
            layer.compile()
        try:
            with self.alone():
                self.separate(mixture).sum().backward()
        except Exception as error:  # a compiler has many ways to fail
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            warnings.warn(f"torch.compile failed, training goes on without it ({told})", stacklevel=2)
            for layer in self.model.layers:
                layer._compiled_call_impl = None  # what Module.compile() had set
        self.model.zero_grad()

    def state(self) -> dict[str, Any]:
        """All that a run needs to go on as if it had never stopped: tensors, numbers and strings alone."""
        return {
            "number": self.number,
            "model_config": self.model.config.to_json(),
            "train_config": json.dumps(dataclasses.asdict(self.config)),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go back to where `state` was taken.

        Raises:
            ValueError: when the state is of another model or another training configuration. More `steps`
                are no other configuration where the schedule is constant or a trapezoid, and to `compile` or
                not is none: the machine may be another.
        """
        for kind, config, default in (
            ("model_config", self.model.config, ModelConfig()),
            ("train_config", self.config, TrainConfig(steps=1)),
        ):
            # A parameter has as its default what was done before it had a name.
            here, before = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (config, default))
            there = before | json.loads(state[kind])
            free = {"compile"} if self.config.schedule == "cosine" else {"compile", "steps"}
            told = [f"{k}={there.get(k)!r}, now {v!r}" for k, v in here.items() if k not in free and there.get(k) != v]
            if told:
                raise ValueError(f"the run was started with {'; '.join(told)}: start another run, or ask for the same")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        states = state.get("optimisers") or [state["optimiser"]]
        for optimiser, then in zip(self.optimisers, states, strict=True):
            optimiser.load_state_dict(then)
        self.number = state["number"]


def learning_rate(number: int, config: TrainConfig) -> float:
    """The rate of step `number`, from 1."""
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        left = (config.steps + 1 - number) / max(1, int(config.steps * config.decay_ratio))
        return config.lr * min(1.0, number / 100, left)
    warm = max(1, config.steps // 20)
    if number <= warm:
        return config.lr * number / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (number - warm) / (config.steps + 1 - warm)))


def optimisers(model: BSMamba2, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters; or Muon for the weights of all Linears, which are matrices, and AdamW for the rest."""
    matrices: list[Tensor] = []
    if config.optimiser == "muon":
        matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    groups = parameter_groups(model, config.weight_decay, without=matrices)
    # Fused: one pass over all parameters, and not a dozen small operations for each of some hundreds.
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    chosen: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr, fused=fused)]
    if matrices:
        chosen.append(Muon(matrices, lr=config.lr, weight_decay=config.weight_decay))
    return chosen


def parameter_groups(model: nn.Module, weight_decay: float, *, without: Iterable[Tensor] = ()) -> list[dict]:
    """Two groups for AdamW: what is decayed, and `A_log`, `D` and `dt_bias`, which are not."""
    exempt = ("A_log", "D", "dt_bias")
    others = {id(parameter) for parameter in without}
    named = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in others]
    return [
        {"params": [p for name, p in named if name.split(".")[-1] not in exempt], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name.split(".")[-1] in exempt], "weight_decay": 0.0},
    ]


def _after(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The batches that follow the first `count`."""
    if count and hasattr(batches, "skip"):
        batches.skip(count)
        return iter(batches)
    return islice(batches, count, None)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
