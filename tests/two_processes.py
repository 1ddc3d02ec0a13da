"""A program for `test_processes.py`, started by torchrun: train a tiny model and say what each process saw."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import TINY

import bsmamba2.synth.songs
import bsmamba2.training.job
import bsmamba2.training.muon
from bsmamba2 import BSMamba2
from bsmamba2.data import Loader, Remixer, Validation, find_windows
from bsmamba2.synth.songs import songs
from bsmamba2.train import TrainConfig, Trainer, optimisers
from bsmamba2.training.distributed import all_gather_object, rank, together, world_size
from bsmamba2.training.job import shared_songs
from bsmamba2.training.run_dir import Run

SAMPLES = 4000


def main(folder: Path, batch: int) -> None:
    """A run of four steps, and another that is stopped after two and taken up again."""
    with together("cpu"):
        whole = train(folder / "whole", batch)
        train(folder / "halves", batch, stop_after=2)
        rest = train(folder / "halves", batch)
        shared = all_gather_object([sha256_file(count) for count in (5, 1)])
        trouble = all_gather_object(poisoned(batch))
        muon = all_gather_object(turned())
        if rank() == 0:
            (folder / "report.json").write_text(
                json.dumps(
                    {
                        "world_size": world_size(),
                        "whole": whole,
                        "rest": rest,
                        "shared": shared,
                        "trouble": trouble,
                        "muon": muon,
                    }
                )
            )


def sha256_file(count: int) -> dict[str, Any]:
    """Of the songs that a recipe gives to every process: name, sung, and a hash of the stems; and how many it made."""
    two_at_a_time = patch.object(bsmamba2.training.job, "_AT_A_TIME", 2)
    with (
        patch.object(bsmamba2.synth.songs, "synthesise", wraps=bsmamba2.synth.songs.synthesise) as synthesise,
        two_at_a_time,
    ):
        made = shared_songs(count, seed=3, seconds=1.0, sample_rate=8000)
    told = [[song.name, song.vocal_segments, hashlib.sha256(song.stems.numpy().tobytes()).hexdigest()] for song in made]
    return {"songs": told, "made": synthesise.call_count}


def turned() -> dict[str, Any]:
    """Three steps of Muon shared out, and by one process: how many matrices each process took, and what came of it."""
    torch.manual_seed(1)
    alone = BSMamba2(TINY)
    shared = copy.deepcopy(alone)
    whole, ours = (optimisers(model, TrainConfig(steps=3, optimiser="muon", lr=1e-2))[1] for model in (alone, shared))
    mine: list[int] = []
    parameters = list(zip(alone.parameters(), shared.parameters(), strict=True))
    matrices = whole.param_groups[0]["params"]
    for _ in range(3):
        for one, other in parameters:
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        matrices[3].grad = ours.param_groups[0]["params"][3].grad = None  # to be passed over
        with (
            patch.object(bsmamba2.training.muon, "world_size", return_value=1),
            patch.object(bsmamba2.training.muon, "rank", return_value=0),
        ):
            whole.step()
        with patch.object(
            bsmamba2.training.muon, "newton_schulz", wraps=bsmamba2.training.muon.newton_schulz
        ) as newton_schulz:
            ours.step()
        mine.append(newton_schulz.call_count)
    momenta, other_momenta = (
        {number: state["momentum_buffer"] for number, state in muon.state_dict()["state"].items()}
        for muon in (whole, ours)
    )
    return {
        "matrices": len(matrices) - 1,
        "mine": mine,
        "gradients": all(
            other.grad is None if one.grad is None else torch.equal(other.grad, one.grad) for one, other in parameters
        ),
        "same": all(torch.equal(one, other) for one, other in parameters),
        "same momenta": momenta.keys() == other_momenta.keys()
        and all(torch.equal(one, other_momenta[number]) for number, one in momenta.items()),
        "weights": [float(p.detach().double().sum()) for p in shared.parameters()],
    }


def poisoned(batch: int) -> str:
    """What is said when the last process alone has a batch that is not finite."""
    pool = songs(3, seed=5, seconds=2.0, sample_rate=8000)

    def batches() -> Iterator[Any]:
        for number, (mixture, target, names) in enumerate(Loader(Remixer(pool, SAMPLES, batch, seed=7))):
            bad = number == 1 and rank() == world_size() - 1
            named = [f"song heard by {'the last' if bad else 'another'}" for _ in names]
            yield (mixture * torch.nan if bad else mixture), target, named

    trainer = Trainer(BSMamba2(TINY), TrainConfig(steps=1, grad_accum_steps=2, loss_windows=(256,), loss_hop=441))
    try:
        list(trainer.run(batches()))
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def train(folder: Path, batch: int, stop_after: int = 4) -> dict[str, Any]:
    """Losses and gradients of the steps, names in all the batches and sum of the weights by process, exchanges."""
    folder.mkdir(parents=True, exist_ok=True)
    pool = songs(3, seed=5, seconds=2.0, sample_rate=8000)
    loader = Loader(Remixer(pool, SAMPLES, batch, seed=7))
    torch.manual_seed(rank())  # the others get the first one's weights
    config = TrainConfig(steps=4, grad_accum_steps=2, lr=1e-2, loss_windows=(256,), loss_hop=441)
    trainer = Trainer(BSMamba2(TINY), config)
    validation = Validation(find_windows(pool, SAMPLES)[0], SAMPLES)
    run = Run(folder, trainer, validate=validation, save_every=2, validate_every=4)
    exchanged: list[int] = []
    if trainer.together is not None:
        trainer.together.register_comm_hook(exchanged, count_exchanges)
    done = [[step.number, step.loss, step.gradient] for step in islice(run.steps(loader), stop_after)]
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
    main(Path(sys.argv[1]), int(sys.argv[2]))
