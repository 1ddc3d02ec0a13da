"""Data loading with worker processes and ranks: examples by number, and a validation shared by processes.

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
"""Where torch keeps the batches of workers, on Linux. In a container it often has only 64 MB."""


class Loader:
    """Data loader: a remixer's examples by number, in batches, for any number of workers and processes.

    Example i is drawn from its own generator, seeded with (seed, i), in every process. A run is therefore reproducible
    with any number of workers, no two workers draw the same example, and n processes with batch b together see the
    same examples as one process with batch n·b.

    Args:
        remixer: draws the examples; its batch is that of one process.
        workers: processes that read ahead; with 0, examples are read when needed.
    """

    def __init__(self, remixer: Remixer, *, workers: int = 0) -> None:
        self.remixer, self.workers, self.skipped = remixer, workers, 0

    def skip(self, count: int) -> None:
        """Skip `count` more batches of every process."""
        self.skipped += count

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches, beginning after the skipped ones.

        Raises:
            OSError: when a file can no longer be read; it names the file. Before the first batch, when the batches that
                the workers read ahead do not fit into shared memory.
        """
        if self.workers:
            _check_shared_memory(self.remixer, self.workers)
        loader = DataLoader(
            _IndexedDataset(self.remixer),
            batch_size=None,  # a batch is read as a whole
            sampler=_rank_batch_sampler(self.remixer.batch, self.skipped),
            num_workers=self.workers,
            worker_init_fn=_detach_process_group,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or every start would draw from the global one
        )
        for batch in loader:
            if isinstance(batch, OSError):
                raise batch
            yield batch


class DistributedValidation(Validation):
    """`Validation` with its windows shared by the processes of a process group; one process scores all."""

    def __call__(self, model: BSMamba2) -> dict[str, float]:
        """As in `Validation`, with the same result in every process."""
        parts = all_gather_object(self.totals(model, rank(), world_size()))
        return self.means(model, [sum(totals) for totals in zip(*parts, strict=True)])


def _check_shared_memory(remixer: Remixer, workers: int) -> None:
    """Raise OSError if the workers' batches do not fit, because torch would then wait for a batch without end."""
    batches = (2 * workers + 2) * local_rank_and_size()[1]  # two wait in each worker; one is copied, one in use
    needed = batches * remixer.batch * (1 + len(remixer.targets)) * 2 * remixer.samples * 4  # float32, stereo
    if SHARED_MEMORY.exists() and (free := shutil.disk_usage(SHARED_MEMORY).free) < needed:
        sizes = f"the workers need {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
        raise OSError(f"{SHARED_MEMORY}: {sizes}: use fewer workers, or make it larger (Docker: --shm-size=2g)")


def _detach_process_group(worker: int) -> None:
    """Give a worker its own process group, because signals from a terminal and from torchrun go to whole groups.

    The worker then continues while its parent finishes a step. When the parent ends, it stops the worker, or the worker
    notices.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:
        signal.signal(number, signal.SIG_IGN)


class _IndexedDataset(Dataset):
    """Batches of a remixer's examples by their numbers, independent of all earlier draws."""

    def __init__(self, remixer: Remixer) -> None:
        self.remixer = remixer

    def __getitem__(self, numbers: list[int]) -> Batch | OSError:
        try:
            return collate([self._example(number) for number in numbers])
        except OSError as error:  # raised in a worker, torch would wrap it in the text of a traceback
            return error

    def _example(self, number: int) -> Example:
        seed = np.random.SeedSequence([self.remixer.seed, number]).generate_state(1, np.uint64)
        return self.remixer.example(torch.Generator().manual_seed(int(seed[0])))


def _rank_batch_sampler(batch: int, first: int) -> Iterator[list[int]]:
    """The numbers of the examples in this process's batches, from its batch number `first` on, without end."""
    for number in itertools.count(first):
        start = (number * world_size() + rank()) * batch
        yield list(range(start, start + batch))
