"""Many processes that train one model: who I am, and what the others have.

`torchrun` starts the processes, of one machine or of many, and tells each its rank through the environment.
Without it there is one process, and everything here is the identity.

Book: "Scaling up".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

TIMEOUT = timedelta(hours=6)
"""How long the others wait for one that looks through a folder. One that died is torchrun's to see."""


@contextmanager
def together(device: str = "auto") -> Iterator[torch.device]:
    """Join the processes that `torchrun` has started, if it has, and leave them at the end.

    Args:
        device: `cpu`, `cuda`, `mps`, or `auto`: a GPU where there is one. On a machine with several GPUs each
            process takes its own.

    Yields:
        The device of this process.

    Raises:
        ValueError: for a device that is not there.
    """
    name = _best() if device == "auto" else device
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} must be auto, cpu, cuda or mps ({error})") from error
    local = int(os.environ.get("LOCAL_RANK", 0))
    if place.type == "cuda":
        number = local if place.index is None else place.index
        if not torch.cuda.is_available() or number >= torch.cuda.device_count():
            raise ValueError(
                f"device={device!r}: this process needs CUDA GPU {number}, but {torch.cuda.device_count()} can be used"
            )
        place = torch.device("cuda", number)
        torch.cuda.set_device(place)
    elif place.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps': no Apple GPU can be used here")
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many:
        distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield place
    finally:
        if many:
            distributed.destroy_process_group()


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_rank_and_size() -> tuple[int, int]:
    """Which of this machine's processes this is, from 0, and how many there are, as `torchrun` tells them."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return (int(os.environ["LOCAL_RANK"]), int(told)) if told and world_size() > 1 else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum of a value over processes, in each of them."""
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def all_gather_object(value: Any) -> list[Any]:
    """The value of every process, in order, in each of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """The first process's value, in each of them."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def balance(costs: list[float], hands: int) -> list[list[int]]:
    """Which of the jobs each hand takes, to end at about the same time: the dearest first, to whoever has least."""
    parts: list[list[int]] = [[] for _ in range(hands)]
    loads = [0.0] * hands
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += costs[i]
    return parts


def _best() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
