"""Data loading: the same examples for any number of workers and processes."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bsmamba2 import BSMamba2
from bsmamba2.data import Remixer, Validation, find_windows
from bsmamba2.synth import Song, synthesise_songs
from bsmamba2.training import loader
from bsmamba2.training.loader import DistributedValidation, Loader


@pytest.fixture(scope="module")
def pool() -> list[Song]:
    return synthesise_songs(3, seed=5, seconds=2.0, sample_rate=8000)


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")  # of Python 3.12 on; the workers are torch's own
def test_the_batches_of_a_loader_do_not_depend_on_its_workers(pool: list[Song]) -> None:
    before = torch.get_rng_state()
    plain = list(islice(Loader(Remixer(pool, 8000, 2, seed=4)), 6))
    working = list(islice(Loader(Remixer(pool, 8000, 2, seed=4), workers=2), 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(equal, plain, working))
    assert not any(equal(one, two) for one, two in pairwise(plain))
    later = Loader(Remixer(pool, 8000, 2, seed=4))
    later.skip(4)
    assert equal(next(iter(later)), plain[4])
    other = Loader(Remixer(pool, 8000, 2, seed=5))
    assert not equal(next(iter(other)), plain[0])


def test_processes_share_the_examples_of_one_large_batch(pool: list[Song], monkeypatch: pytest.MonkeyPatch) -> None:
    large = list(islice(Loader(Remixer(pool, 8000, 4, seed=4)), 3))
    monkeypatch.setattr(loader, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
        shares.append(list(islice(Loader(Remixer(pool, 8000, 2, seed=4)), 3)))
    for whole, first, second in zip(large, *shares, strict=True):
        joined = torch.cat((first[0], second[0])), torch.cat((first[1], second[1])), first[2] + second[2]
        assert equal(whole, joined)


def test_validation_is_shared_by_processes(tiny: BSMamba2, pool: list[Song], monkeypatch: pytest.MonkeyPatch) -> None:
    windows = find_windows(pool, 8000)
    whole = Validation(windows, 8000)(tiny)
    assert DistributedValidation(windows, 8000)(tiny) == whole
    monkeypatch.setattr(loader, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(loader, "rank", lambda rank=rank: rank)
        shares.append(DistributedValidation(windows, 8000)(tiny)["usdr"])
    assert sum(shares) == pytest.approx(whole["usdr"])


def test_too_little_shared_memory_is_an_error_and_not_an_endless_wait(
    pool: list[Song], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    batch = 3 * (8000 * 2 * 4) * 2  # examples × bytes of 8,000 stereo samples × (mixture, target)
    free = SimpleNamespace(free=4 * batch - 1)
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: free)
    remixer = Remixer(pool, 8000, 3)
    with pytest.raises(OSError, match=r"need 2 MB, and 2 MB are free: use fewer workers.*--shm-size"):
        next(iter(Loader(remixer, workers=1)))
    next(iter(Loader(remixer)))  # no workers, no shared memory
    free.free += 1
    loader._check_shared_memory(remixer, 1)
    monkeypatch.setattr(loader, "local_rank_and_size", lambda: (0, 2))
    with pytest.raises(OSError, match="need 3 MB"):
        loader._check_shared_memory(remixer, 1)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_named_whoever_reads_it(
    pool: list[Song], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def crop(song: Song, *_: int) -> Any:
        raise OSError(f"{song.name}/drums.wav: is gone")

    supply = Loader(Remixer(pool, 8000, 2, seed=4), workers=workers)
    monkeypatch.setattr(Song, "crop", crop)
    with pytest.raises(OSError, match=r"^synthetic-\d+/drums\.wav: is gone$"):
        next(iter(supply))
