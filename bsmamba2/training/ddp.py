"""Data-parallel training: a `Trainer` in each process, with gradients averaged by DistributedDataParallel.

Book: "Scaling up".
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..model import BSMamba2
from ..train import TrainConfig, Trainer
from .distributed import all_gather_object, all_reduce, world_size


class DistributedTrainer(Trainer):
    """Data-parallel `Trainer`, one in each process of a process group; all step together, each with its own batches.

    All start with the weights of the first process. Gradients are exchanged once per step, with the last accumulated
    batch. Arguments and errors are the same as for `Trainer`.
    """

    def __init__(self, model: BSMamba2, config: TrainConfig, *, optimisers: Sequence[Optimizer] = ()) -> None:
        self.ddp_model = DistributedDataParallel(model)  # broadcasts the weights before the moving average copies them
        super().__init__(model, config, optimisers=optimisers)
        self.network = self.ddp_model

    def no_sync(self) -> AbstractContextManager[None]:
        """Context in which gradients are not averaged over processes."""
        return self.ddp_model.no_sync()

    def reduce_loss(self, loss: Tensor) -> Tensor:
        """Mean of the loss over processes."""
        return all_reduce(loss) / world_size()

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        return [value for part in all_gather_object(values) for value in part]


def make_trainer(model: BSMamba2, config: TrainConfig, *, optimisers: Sequence[Optimizer] = ()) -> Trainer:
    """A `DistributedTrainer` if there is a process group, otherwise a plain `Trainer`."""
    kind = DistributedTrainer if world_size() > 1 else Trainer
    return kind(model, config, optimisers=optimisers)
