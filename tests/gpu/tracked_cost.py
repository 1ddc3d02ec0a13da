"""Memory and operations of a training step as PyTorch tracks them: the second way to the numbers of `bsmamba2 cost`.

    python tests/gpu/tracked_cost.py --write book/data/cost.json --minutes 60

A trainer runs forward and backward on fake CUDA tensors (`fake_cuda.py`), and PyTorch's `MemTracker` adds up the
tensors that are alive after each operation. With the backend `triton`, mamba-ssm's own Python code allocates what its
kernels would fill, and the launches are left out. With `chunked`, everything is PyTorch, so `FlopCounterMode` counts
all operations. Nothing is computed. Cells that the written file has already are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fake_cuda import CUDA, fake_cuda
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.atomic_write import write_atomically
from bsmamba2.experiments.cost import training_cost
from bsmamba2.kernels import accelerate
from bsmamba2.kernels import triton as adapter
from bsmamba2.train import TrainConfig, Trainer

BACKENDS, PRESETS, BATCHES, SECONDS = ("triton", "chunked"), ("paper", "compact", "small"), (5, 2, 1), (8, 4, 2)
DTYPES = ("bfloat16", "float32")
CELL = ("backend", "preset", "seconds", "batch", "dtype", "gradient_checkpointing")


class PeakTracker(MemTracker):
    """`MemTracker` without the peaks of single modules: it goes through all of them after every operation."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        modules, self.memory_tracking = self.memory_tracking, {}
        super()._update_peak_stats(peak_state)
        self.memory_tracking = modules


@contextmanager
def no_launches() -> Iterator[None]:
    """mamba-ssm allocates its results and launches no kernel; `accelerate` takes the scan without its self-test."""

    def first_config(self: Autotuner, *args: Any, **options: Any) -> None:
        self.best_config = self.configs[0]  # mamba-ssm reads its block sizes

    def nothing(self: JITFunction, *args: Any, **options: Any) -> None:  # a Mock would keep the tensors
        pass

    with (
        mock.patch.object(JITFunction, "run", nothing),
        mock.patch.object(Autotuner, "run", first_config),
        mock.patch.object(adapter, "self_test_error", return_value=None),
    ):
        yield


def tracked(
    config: ModelConfig,
    *,
    backend: str,
    seconds: float,
    batch: int,
    dtype: str,
    gradient_checkpointing: bool,
    observer: AbstractContextManager = nullcontext(),  # noqa: B008 - it has no state
) -> tuple[dict[str, int], int]:
    """Forward and backward of a batch: MemTracker's kind → bytes at the peak; operations, 0 with the fused scan.

    The kinds: `Total`, `PARAM`, `GRAD` (of weights), `ACT` (of the forward pass), `TEMP` (of the backward pass).
    """
    with fake_cuda(), no_launches():
        with torch.device(CUDA):
            model = BSMamba2(config)
            assert accelerate(model, backend, dtype=getattr(torch, dtype)).backend == backend
        settings = TrainConfig(steps=1, precision=dtype, gradient_checkpointing=gradient_checkpointing)
        trainer = Trainer(model, settings)
        signal = torch.empty(batch, config.channels, round(seconds * config.sample_rate), device=CUDA)
        tracker = PeakTracker()
        tracker.track_external(model)
        # The counter keeps each graph that is computed again, with all its tensors: its peak would be of no use.
        counter = FlopCounterMode(display=False) if backend == "chunked" else None
        with counter or nullcontext(), observer, tracker:
            trainer.backward([(signal, signal)])
        peak = tracker.get_tracker_snapshot("peak")[CUDA]
    return {str(kind).split(".")[-1]: size for kind, size in peak.items()}, counter.get_total_flops() if counter else 0


def tracked_by_depth(config: ModelConfig, depths: tuple[int, int] = (1, 2), **cell: Any) -> tuple[dict[str, int], int]:
    """`tracked`, from two shallower models: all layers are alike, so bytes and operations grow by the same with each.

    The trackers take a minute or more for a model of the published depth, whatever the batch, and much less for these.
    """
    if config.depth <= max(depths):
        return tracked(config, **cell)
    (few, few_flops), (more, more_flops) = (
        tracked(dataclasses.replace(config, depth=depth), **cell) for depth in depths
    )
    layers = (config.depth - depths[0]) // (depths[1] - depths[0])
    return {kind: few[kind] + layers * (more[kind] - few[kind]) for kind in few}, few_flops + layers * (
        more_flops - few_flops
    )


def compare(config: ModelConfig, **cell: Any) -> dict[str, float]:
    """Tracked and estimated: what a batch adds to the weights and their state, in bytes; for `chunked`, operations."""
    peak, flops = tracked_by_depth(config, **cell)
    backend = cell.pop("backend")
    cost = training_cost(config, **cell)
    if backend == "chunked":
        return {"tracked_flops": flops, "estimated_flops": cost.step}
    return {"tracked": peak["Total"] - peak["PARAM"] - peak["GRAD"], "estimated": cost.activations + cost.scratch}


def write_results(path: Path, minutes: float, only: str) -> None:
    """Add the cells that `path` lacks, the published batch first; none begins after so many minutes."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {tuple(row[name] for name in CELL) for row in rows}
    cells = itertools.product(BACKENDS, PRESETS, SECONDS, BATCHES, DTYPES, (True, False))
    left = [cell for cell in cells if cell not in done and all(word in map(str, cell) for word in only.split())]
    end = time.monotonic() + 60 * minutes
    for cell in left:
        if time.monotonic() > end:
            break
        named: dict[str, Any] = dict(zip(CELL, cell, strict=True))
        row = named | compare(ModelConfig.preset(named["preset"]), **{k: v for k, v in named.items() if k != "preset"})
        print(row, flush=True)
        rows.append(row)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "mamba-ssm")}
        head = json.dumps({"versions": versions, "date": f"{datetime.date.today()}"})
        lines = ",\n".join(json.dumps(row) for row in rows)
        write_atomically(path, f'{head[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="file of results; what it has is kept")
    parser.add_argument("--minutes", type=float, default=300.0, help="after which no cell begins")
    parser.add_argument("--only", default="", metavar="WORDS", help='cells with these words: "triton paper 8"')
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    write_results(args.write, args.minutes, args.only)
