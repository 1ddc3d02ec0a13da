"""Checkpoint files that several tests write: a tiny model, the published weights, a Lightning checkpoint."""

import dataclasses
import functools
from pathlib import Path

import safetensors.torch
import torch
from tiny_model import TINY
from torch import Tensor

FIXTURE = Path(__file__).parent / "data" / "published_model_small.safetensors"
LAYOUTS = ("bsmamba2", "published", "lightning")
TWO_STEMS = dataclasses.replace(TINY, depth=2, stems=("vocals", "rest"), sample_rate=44_100)
"""At the sample rate that is assumed of a file that does not store one."""


@functools.cache
def published_weights() -> dict[str, Tensor]:
    """The fixture's weights under their published names."""
    fixture = safetensors.torch.load_file(FIXTURE)
    return {name.removeprefix("weights."): x for name, x in fixture.items() if name.startswith("weights.")}


def lightning(state: dict[str, Tensor], ema: object = None, **entries: object) -> dict[str, object]:
    """A checkpoint as Lightning and the EMA callback of the authors' training code write it."""
    moments = {i: {"step": torch.ones(()), "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(state.values())}
    optimiser: dict[str, object] = {"state": moments, "param_groups": [{"lr": 5e-4, "params": list(moments)}]}
    if ema is not None:
        optimiser = {"opt": optimiser, "ema": ema, "current_step": 7, "decay": 0.999, "every_n_steps": 1}
    windows = {name: torch.hann_window(8) for name in ("featurizer.window", "multi_featurizer.0.window")}
    return {
        "epoch": 1,
        "global_step": 7,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": windows | {f"model.{name}": x for name, x in state.items()},
        "optimizer_states": [optimiser],
        "lr_schedulers": [],
    } | entries


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
