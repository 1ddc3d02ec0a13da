"""A program for `test_ddp.py`: train a tiny model and say what each process saw.

As a script, it runs in two processes that torchrun's launcher forks, so that torch is imported once.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_model import TINY
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from bsmamba2 import BSMamba2
from bsmamba2.data import Remixer, find_windows
from bsmamba2.synth import synthesise_songs, synthesiser
from bsmamba2.train import TrainConfig
from bsmamba2.training.datasets import shared_songs
from bsmamba2.training.ddp import DistributedTrainer, make_trainer
from bsmamba2.training.distributed import all_gather_object, init_distributed, rank, world_size
from bsmamba2.training.loader import DistributedValidation, Loader
from bsmamba2.training.muon import muon_and_adamw
from bsmamba2.training.run_dir import RunDir

SAMPLES = 4000


def main(folder: Path, batch: int) -> None:
    """A run of four steps, and another that is stopped after two and taken up again."""
    with init_distributed("cpu"):
        whole = train(folder / "whole", batch)
        train(folder / "halves", batch, stop_after=2)
        rest = train(folder / "halves", batch)
        shared = all_gather_object([song_hashes(count) for count in (5, 1)])
        trouble = all_gather_object(poisoned(batch))
        muon = train(folder / "muon", batch, muon=True)
        if rank() == 0:
            report = {"world_size": world_size(), "whole": whole, "rest": rest, "shared": shared, "trouble": trouble}
            (folder / "report.json").write_text(json.dumps({**report, "muon": muon}))


def song_hashes(count: int) -> dict[str, Any]:
    """Of the songs that a job gives to every process: name, sung, and a hash of the stems; and how many it made."""
    with patch.object(synthesiser, "synthesise", wraps=synthesiser.synthesise) as synthesise:
        made = shared_songs(count, seed=3, seconds=1.0, sample_rate=8000)
    rows = [[song.name, song.vocal_segments, hashlib.sha256(song.stems.numpy().tobytes()).hexdigest()] for song in made]
    return {"songs": rows, "made": synthesise.call_count}


def poisoned(batch: int) -> str:
    """What is said when the last process alone has a batch that is not finite."""
    pool = synthesise_songs(3, seed=5, seconds=2.0, sample_rate=8000)

    def batches() -> Iterator[Any]:
        for number, (mixture, target, names) in enumerate(Loader(Remixer(pool, SAMPLES, batch, seed=7))):
            bad = number == 1 and rank() == world_size() - 1
            named = [f"song heard by {'the last' if bad else 'another'}" for _ in names]
            yield (mixture * torch.nan if bad else mixture), target, named

    trainer = make_trainer(BSMamba2(TINY), TrainConfig(steps=1, grad_accum_steps=2, loss_windows=(256,), loss_hop=441))
    try:
        list(trainer.run(batches()))
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def train(folder: Path, batch: int, stop_after: int = 4, muon: bool = False) -> dict[str, Any]:
    """Losses and gradients of the steps, names in all the batches and sum of the weights by process, exchanges."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = synthesise_songs(3, seed=5, seconds=2.0, sample_rate=8000)
    loader = Loader(Remixer(pool, SAMPLES, batch, seed=7))
    torch.manual_seed(rank())  # the others get the first one's weights
    config = TrainConfig(steps=4, grad_accum_steps=2, lr=1e-2, loss_windows=(256,), loss_hop=441)
    model = BSMamba2(TINY)
    trainer = make_trainer(model, config, optimisers=muon_and_adamw(model, config) if muon else ())
    validation = DistributedValidation(find_windows(pool, SAMPLES), SAMPLES)
    run = RunDir(folder, trainer, validate=validation, save_every=2, validate_every=4)
    exchanged: list[int] = []
    if isinstance(trainer, DistributedTrainer):
        trainer.ddp_model.register_comm_hook(exchanged, count_exchanges)
    done = [[step.step, step.loss, step.grad_norm] for step in islice(run.steps(loader), stop_after)]
    names = all_gather_object(
        [name for batch in islice(Loader(Remixer(pool, SAMPLES, batch, seed=7)), 4) for name in batch[2]]
    )
    weights = all_gather_object([float(p.detach().double().sum()) for p in trainer.model.parameters()])
    if rank() == 0:
        torch.save({name: p.grad for name, p in trainer.model.named_parameters()}, folder / "gradients.pt")
    return {"steps": done, "names": names, "weights": weights, "exchanges": len(exchanged)}


def count_exchanges(exchanged, bucket):  # torch would refuse annotations that are strings
    """Average the gradients as DistributedDataParallel does by itself, and note that it was asked for."""
    exchanged.append(bucket.index())
    averaged = bucket.buffer().div_(world_size())
    future = torch.distributed.all_reduce(averaged, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    launch = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
    elastic_launch(launch, main)(Path(sys.argv[1]), int(sys.argv[2]))
