"""`bsmamba2 train --params FILE`: train a model, with a flag for every parameter of `JobConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

from tqdm import tqdm

from ..kernels import BackendError
from ..settings import read_parameters
from ..training.distributed import init_distributed
from ..training.job import JobConfig
from .console import log, print_line, reraise_oom

DESCRIPTION = """\
Train a model on synthesised songs, or on a folder of stems (--data); fine-tune a checkpoint with --init. The run is
stored in --output-dir: after Ctrl-C, a crash or a power cut, the same command resumes it."""
EPILOG = "Many GPUs: torchrun --standalone --nproc-per-node 2 -m bsmamba2 train ..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bsmamba2 train`: a flag for each field of `JobConfig`, absent from `args` unless given."""
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--params", type=Path, metavar="FILE", help="YAML or JSON with any of the names below")
    types = get_type_hints(JobConfig)
    for field in dataclasses.fields(JobConfig):
        flag, kind = f"--{field.name.replace('_', '-')}", types[field.name]
        text = f"{field.metadata['help']} ({field.default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind in (str, int, float):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
        else:  # tuple[kind, ...]
            parser.add_argument(flag, type=get_args(kind)[0], nargs="+", help=text)


def run(args: argparse.Namespace) -> int:
    """Train to the end; returns 0, 1 if the run failed after it began, 2 for wrong parameters, or 130 after Ctrl-C."""
    given = {name: value for name, value in vars(args).items() if name not in ("params", "command")}
    try:
        parameters = read_parameters(args.params) if "params" in args else {}
        job = JobConfig.from_mapping({**parameters, **given})
        with reraise_oom(), init_distributed(job.device) as device:
            windows = job.windows(partial(tqdm, desc="looking for activity", unit="file"))
            training, batches = job.start(*windows, device), job.batches(windows[0])
            bar = tqdm(
                training.steps(batches), "training", total=job.steps, initial=training.trainer.step, unit="step",
                disable=not training.writer,
            )  # fmt: skip
            for step in bar:
                best = "" if training.best is None else f"{training.best[0]:.2f} dB"
                bar.set_postfix(loss=f"{step.loss:.3f}", best=best)
    except KeyboardInterrupt as error:
        log(str(error) or "stopped at once")
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError, MemoryError) as error:
        worker_died = "DataLoader worker" in str(error)  # torch's wording
        if isinstance(error, RuntimeError) and not isinstance(error, BackendError) and not worker_died:
            raise
        notes = getattr(error, "__notes__", [])  # a run that had begun notes where it stopped
        log(*str(error or "too little memory").strip().split("\n"), *notes)
        if worker_died:
            log("too little memory? use fewer --workers")
        elif isinstance(error, MemoryError):
            log("use a smaller batch with gradient accumulation, or gradient checkpointing; see bsmamba2 cost")
        return 1 if notes or isinstance(error, MemoryError) else 2
    if training.writer:
        best = "" if training.best is None else f", best {training.best[0]:.2f} dB uSDR at step {training.best[1]}"
        print_line(f"{training.trainer.step} steps done{best}: {training.folder}")
    return 0
