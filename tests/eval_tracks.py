"""Tracks for the tests of evaluation: noise with a silent second, in memory and in MUSDB18-HQ's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import soundfile
import torch
from tiny_model import TINY
from torch import Tensor

from bsmamba2.evaluation import EvalProtocol, EvalSet, EvalTrack

RATE = TINY.sample_rate
QUICK = EvalProtocol(name="quick", segment=0.5)


def signals(seed: int, seconds: float = 4.0) -> tuple[Tensor, Tensor]:
    """Mixture and vocals, silent from 1 to 2 s: (2, samples)."""
    generator = torch.Generator().manual_seed(seed)
    vocals, accompaniment = 0.1 * torch.randn(2, 2, round(seconds * RATE), generator=generator)
    vocals[:, RATE : 2 * RATE] = 0
    return vocals + accompaniment, vocals


def vocals_only(mixture: Tensor, vocals: Tensor, rate: int = RATE) -> Callable[[], tuple[Tensor, dict, int]]:
    """What an `EvalTrack` loads: a mixture and one stem."""
    return lambda: (mixture, {"vocals": vocals}, rate)


def track(name: str, seed: int = 0) -> EvalTrack:
    return EvalTrack(name, str(seed), vocals_only(*signals(seed)))


TWO = EvalSet("two", (track("first", 1), track("second", 2)))


def musdb(folder: Path, names: tuple[str, ...] = ("A - One", "B – Zwei"), rate: int = RATE) -> Path:
    for seed, name in enumerate(names):
        mixture, vocals = signals(seed)
        third = (mixture - vocals) / 3
        (folder / "test" / name).mkdir(parents=True)
        files = {"mixture": mixture, "vocals": vocals, "drums": third, "bass": third, "other": third}
        for stem, signal in files.items():
            soundfile.write(folder / "test" / name / f"{stem}.wav", signal.T.numpy(), rate, subtype="FLOAT")
    return folder
