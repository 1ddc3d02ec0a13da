"""Initialise torch.distributed under torchrun, and clean up on exit; collectives that also work in one process.

`torchrun` starts the processes on one or more machines, and sets their ranks in environment variables.
Without it there is one process, and every collective is the identity.

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
"""How long a collective waits, for example while another process searches a folder. torchrun detects dead processes."""


@contextmanager
def init_distributed(device: str = "auto") -> Iterator[torch.device]:
    """Initialise the process group under `torchrun`, and destroy it at the end; without torchrun, only choose a device.

    Args:
        device: `cpu`, `cuda`, `mps`, or `auto`: a GPU if there is one. On a machine with several GPUs,
            each process takes its own.

    Yields:
        The device of this process.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        place = torch.device(device)
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
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield place
        return
    distributed.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield place
    finally:
        distributed.destroy_process_group()


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Rank of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def local_rank_and_size() -> tuple[int, int]:
    """Rank of this process on its machine, from 0, and number of processes there, as `torchrun` sets them."""
    size = os.environ.get("LOCAL_WORLD_SIZE")
    return (int(os.environ["LOCAL_RANK"]), int(size)) if size and world_size() > 1 else (0, 1)


def all_reduce(value: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(value)
    return value


def all_gather_object(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return the first process's value, in every process."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]
