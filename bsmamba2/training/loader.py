"""Data loading with worker processes and ranks: examples by index, and validation divided among processes.

Book: "Scaling up".
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data import Batch, Example, Remixer, Validation, collate
from ..model import BSMamba2
from .distributed import all_gather_object, local_rank_and_size, rank, world_size

SHARED_MEMORY = Path("/dev/shm")
"""Folder where torch keeps the workers' batches on Linux. In a container it often has only 64 MB."""


class Loader:
    """Data loader: batches of a remixer's examples, drawn by index, for any number of workers and processes.

    Example i is drawn from its own generator, seeded with (seed, i), in every process. A run is therefore reproducible
    with any number of workers, no two workers draw the same example, and n processes with batch b together see the
    same examples as one process with batch n·b.

    Args:
        remixer: draws the examples; its `batch` is the batch size per process.
        workers: number of processes that read ahead; with 0, examples are read when needed.
    """

    def __init__(self, remixer: Remixer, *, workers: int = 0) -> None:
        self.remixer, self.workers, self.skipped = remixer, workers, 0

    def skip(self, count: int) -> None:
        """Skip `count` more batches in every process."""
        self.skipped += count

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches without end, starting after the skipped ones.

        Raises:
            OSError: when a file can no longer be read (the message names it); or, before the first batch, when the
                batches that the workers read ahead do not fit into shared memory.
        """
        if self.workers:
            _check_shared_memory(self.remixer, self.workers)
        loader = DataLoader(
            _IndexedDataset(self.remixer),
            batch_size=None,  # the data set returns whole batches
            sampler=_rank_batch_sampler(self.remixer.batch, self.skipped),
            num_workers=self.workers,
            worker_init_fn=_detach_process_group,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # otherwise every start would draw from the global one
        )
        for batch in loader:
            if isinstance(batch, OSError):
                raise batch
            yield batch


class DistributedValidation(Validation):
    """`Validation` with its windows divided among the processes of a process group; a single process scores all."""

    def __call__(self, model: BSMamba2) -> dict[str, float]:
        """Score a model as `Validation` does, with the same result in every process."""
        parts = all_gather_object(self.totals(model, rank(), world_size()))
        return self.means(model, [sum(totals) for totals in zip(*parts, strict=True)])


def _check_shared_memory(remixer: Remixer, workers: int) -> None:
    """Raise OSError if the workers' batches do not fit, because torch would then wait forever for a batch."""
    batches = (2 * workers + 2) * local_rank_and_size()[1]  # two wait in each worker; one is copied, one in use
    needed = batches * remixer.batch * (1 + len(remixer.targets)) * 2 * remixer.samples * 4  # float32, stereo
    if SHARED_MEMORY.exists() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        sizes = f"the workers need {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        raise OSError(f"{SHARED_MEMORY}: {sizes}: use fewer workers, or make it larger (Docker: --shm-size=2g)")


def _detach_process_group(worker: int) -> None:
    """Give a worker its own process group, because signals from a terminal and from torchrun go to whole groups.

    The worker then continues while its parent finishes a step. When the parent ends, it stops the worker; otherwise the
    worker detects that its parent is gone.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
        signal.signal(number, signal.SIG_IGN)


class _IndexedDataset(Dataset):
    """Batches of a remixer's examples by index, independent of all earlier draws."""

    def __init__(self, remixer: Remixer) -> None:
        self.remixer = remixer

    def __getitem__(self, numbers: list[int]) -> Batch | OSError:
        try:
            return collate([self._example(number) for number in numbers])
        except OSError as error:  # if a worker raised it, torch would wrap it in the text of a traceback
            return error

    def _example(self, number: int) -> Example:
        seed = np.random.SeedSequence([self.remixer.seed, number]).generate_state(1, np.uint64)
        return self.remixer.example(torch.Generator().manual_seed(int(seed[0])))


def _rank_batch_sampler(batch: int, first: int) -> Iterator[list[int]]:
    """Yield the example indices of this process's batches without end, starting with its batch number `first`."""
    for number in itertools.count(first):
        start = (number * world_size() + rank()) * batch
        yield list(range(start, start + batch))
