"""A program for `test_run_dir.py`: train a tiny model in two folders, in one of them killed again and again.

    python killed_run.py ALONE HUNTED KILLS SEED

Every attempt is a forked process. In HUNTED it is sent SIGKILL after a random time, at most a quarter of what the whole
run took in ALONE, until KILLS have died; the last one is left alone. It prints how many were killed, and how many went
on from a state. One thread: what is compared afterwards are bits.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_model import TINY
from torch import Tensor
from torch.nn import functional

from bsmamba2 import BSMamba2
from bsmamba2.metrics import usdr
from bsmamba2.train import TrainConfig, Trainer
from bsmamba2.training.run_dir import RunDir

STEPS = 24


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    while True:
        target = torch.randn(1, 2, 2200, generator=g)
        yield target + torch.randn(1, 2, 2200, generator=g), target


def validate(model: BSMamba2) -> float:
    mixture, target = next(batches())
    with torch.inference_mode():
        return usdr(target[0], model(mixture)[0, 0])


def train(folder: Path) -> None:
    torch.manual_seed(0)
    config = TrainConfig(steps=STEPS, grad_accum_steps=2, lr=1e-2, ema_decay=0.5, loss_windows=(256,), loss_hop=441)
    model = BSMamba2(TINY)
    # Something that draws random numbers in every step: it must go on with the same ones.
    model.band_split.register_forward_hook(lambda part, _, x: functional.dropout(x, 0.1, part.training))
    run = RunDir(folder, Trainer(model, config), validate=validate, save_every=2, validate_every=3)
    if run.trainer.step:
        with (folder.parent / f"{folder.name}-resumed.txt").open("a") as file:
            file.write("once more\n")
    for _ in run.steps(batches()):
        pass


def attempt(folder: Path, seconds: float | None = None) -> bool:
    """Train in a forked process, which is killed after so many seconds; whether it finished."""
    child = os.fork()
    if not child:
        try:
            train(folder)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("an attempt failed by itself")
    return not os.WIFSIGNALED(status)


def main(alone: Path, hunted: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    Trainer(BSMamba2(TINY), TrainConfig(steps=1))  # imports what would take each attempt longer than its life
    started = time.monotonic()
    assert attempt(alone)
    seconds, chance, killed = (time.monotonic() - started) / 4, random.Random(seed), 0
    while not attempt(hunted, chance.uniform(0.0, seconds) if killed < kills else None):
        killed += 1
    resumed = hunted.parent / f"{hunted.name}-resumed.txt"
    print(killed, len(resumed.read_text().splitlines()) if resumed.exists() else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
