"""Interventions on the step Δ of a trained model: hold, rescale or exchange a head's Δ, and score the effect.

`python -m bsmamba2.experiments.dynamics FILE` scores all conditions on all songs with the bundled checkpoint, and
writes the scores to FILE. Book: "Inside the trained model". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import metrics
from ..checkpoints import bundled_checkpoint, load_checkpoint
from ..kernels import accelerate, restore
from ..mamba2 import Mamba2
from ..model import BSMamba2
from ..spectrogram import istft, stft
from ..synth import Song, synthesise
from .benchmark.tables import machine
from .silence import score

SEED, SONGS = 4_000_000, 20
"""Seed of the first test song, and the number of test songs; training used different seeds."""
HEAD, PARTNER = 1, 4
"""The head under test and the head of the control exchanges, counted from 0, in the last layer's forward time mixer."""

Change = Callable[[Tensor], Tensor]
"""Function that maps the mixer's own steps Δ, (b, t, h), to the steps that the scan gets, (b, t, h)."""


@contextmanager
def changed_steps(mixer: Mamba2, change: Change) -> Iterator[list[Tensor]]:
    """Run a mixer with the steps `change(Δ)`; yields a list to which each call appends the mixer's own Δ, (b, t, h).

    Inside the context the mixer has its plain form, because the fused kernels compute Δ themselves.
    """
    form, scan, steps = type(mixer), mixer.scan, []

    def with_change(x: Tensor, dt: Tensor, *args: Any, **options: Any) -> Any:
        steps.append(dt)
        return scan(x, change(dt), *args, **options)

    restore(mixer)
    mixer.scan = with_change
    try:
        yield steps
    finally:
        mixer.scan = scan
        mixer.__class__ = form


def hold(head: int, frames: Tensor) -> Change:
    """Replace one head's Δ in every frame by its mean over the `frames`, (t,) bool, of the same sequence."""
    return lambda dt: _replaced(dt, head, dt[:, frames, head].mean(1, keepdim=True))


def rescale(head: int, frames: Tensor, factor: float) -> Change:
    """Multiply one head's Δ by the factor in the `frames`, (t,) bool."""
    return lambda dt: _replaced(dt, head, torch.where(frames, factor * dt[..., head], dt[..., head]))


def exchange(first: int, second: int) -> Change:
    """Exchange the Δ of two heads."""
    return lambda dt: _replaced(_replaced(dt, first, dt[..., second]), second, dt[..., first])


def _replaced(dt: Tensor, head: int, values: Tensor) -> Tensor:
    changed = dt.clone()
    changed[..., head] = values
    return changed


def sung_frames(song: Song, frames: int, hop_length: int) -> Tensor:
    """Whether somebody sings in each frame, (t,) bool."""
    times = torch.arange(frames) * hop_length / song.sample_rate
    return torch.stack([(times >= start) & (times < end) for start, end in song.vocal_segments]).any(0)


def record_steps(model: BSMamba2, mixture: Tensor) -> dict[tuple[int, str], Tensor]:
    """Δ of all mixers along time: (layer from 0, "forwards" or "backwards") → (k, t, h), both in the song's order."""
    with ExitStack() as stack:
        steps = {
            (i, name): stack.enter_context(changed_steps(getattr(layer.time, name).mixer, lambda dt: dt))
            for i, layer in enumerate(model.layers)
            for name in ("forwards", "backwards")
        }
        residual_stream(model, mixture)
    return {key: dt.flip(1) if key[1] == "backwards" else dt for key, (dt,) in steps.items()}


def residual_stream(model: BSMamba2, mixture: Tensor) -> list[Tensor]:
    """Features (1, t, k, d) of a mixture (c, samples): after the band split, and after each layer."""
    config = model.config
    features = [model.band_split(stft(mixture[None], config.n_fft, config.hop_length, config.win_length))]
    for layer in model.layers:
        features.append(layer(features[-1]))
    return features


def decode(model: BSMamba2, features: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """Mask of the first stem, complex (c, f, t), and its estimate (c, samples), from features (1, t, k, d)."""
    lengths = model.config.n_fft, model.config.hop_length, model.config.win_length
    mask = model.mask_estimators[0](model.final_norm(features))
    return mask[0], istft(mask * stft(mixture[None], *lengths), mixture.shape[-1], *lengths)[0]


def conditions(dt: Tensor, sung: Tensor) -> dict[str, Change]:
    """The interventions on a mixer's Δ, (b, t, h), by name, with heads counted from 1; `sung` is (t,) bool.

    "sing h" holds the Δ of head h in all frames at its mean over the sung frames, and "rest h" at its mean over the
    other frames. "open h" multiplies the Δ of head h in the other frames by the ratio of these two means of the head
    under test. "exchange h g" exchanges the Δ of two heads. "no state" sets Δ = 0 for all heads; "own" changes nothing.
    """
    heads = range(dt.shape[-1])
    ratio = float(dt[:, sung, HEAD].mean() / dt[:, ~sung, HEAD].mean())
    changes: dict[str, Change] = {"own": lambda dt: dt, "no state": torch.zeros_like}
    for h in heads:
        changes |= {f"sing {h + 1}": hold(h, sung), f"rest {h + 1}": hold(h, ~sung)}
        changes[f"open {h + 1}"] = rescale(h, ~sung, ratio)
    pairs = [(h, g) for h in (HEAD, PARTNER) for g in heads if g not in (h, HEAD)]
    return changes | {f"exchange {h + 1} {g + 1}": exchange(h, g) for h, g in pairs}


@torch.inference_mode()
def run_song(model: BSMamba2, number: int, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Score test song `number`: a row of metrics in dB for each condition in `names`, by default for all."""
    song = synthesise(SEED + number, occupancy=0.5)
    mixer, rows = model.layers[-1].time.forwards.mixer, []  # type: ignore[union-attr]
    with changed_steps(mixer, lambda dt: dt) as steps:  # type: ignore[arg-type]
        before = residual_stream(model, song.mixture)[-2]
    changes = conditions(steps[0], sung_frames(song, before.shape[1], model.config.hop_length))
    for name in names or changes:
        with changed_steps(mixer, changes[name]):  # type: ignore[arg-type]
            _, estimate = decode(model, model.layers[-1](before), song.mixture)
        csdr = round(metrics.csdr(song.vocals, estimate), 3)
        rows.append({"song": number, "condition": name, **score(song, estimate), "csdr": csdr})
    return rows


if __name__ == "__main__":
    model = load_checkpoint(bundled_checkpoint())
    accelerate(model)
    found = [row for number in range(SONGS) for row in run_song(model, number)]
    about = {
        "command": "python -m bsmamba2.experiments.dynamics FILE",
        "commit": subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip(),
        "machine": machine(),
        "rows": {name: [row[name] for row in found] for name in found[0]},
    }
    Path(sys.argv[1]).write_text(json.dumps(about) + "\n", encoding="utf-8")
