"""Model arguments of `separate` and `evaluate`: which checkpoint, on which device, with which backend."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import checkpoints
from ..kernels import BACKENDS, accelerate, slow_dtype_warning
from ..model import BSMamba2
from ..published_layout import describe_known_file
from ..separate import DTYPES
from .console import log


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the model and how it computes."""
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="in this project's or a published layout; the bundled one when left out",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="YAML or JSON file with the hop, window, stems or bands of a checkpoint that does not store them: fields "
        "of ModelConfig, or the training toolbox's own file (default: one next to the checkpoint, if it fits)",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto",
        help="of a checkpoint that has both: ema, the moving averages (auto takes them when they are there), or raw",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto (default): cuda, else cpu")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto",
        help="kernels: auto (default): the fastest that runs here; plain: the book's own code; see bsmamba2 backends",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="what the model computes in (float32); its spectrograms and masks stay in float32",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="segments computed at once (1)")


def load_model(args: argparse.Namespace) -> BSMamba2:
    """Load the model onto its device and install the kernels; `args.device` becomes the device that auto stands for.

    Devices other than the CPU: not run on a GPU.

    Raises:
        ValueError: for a checkpoint or device that cannot be used.
        OSError: for a checkpoint that does not exist.
        BackendError: for a backend asked for by name that cannot run here.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch has an error type of its own for each way in which a device can be missing
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {args.device}: {reason}; use --device cpu") from error
    path = args.checkpoint or checkpoints.bundled_checkpoint()
    if args.checkpoint is None:
        log("bundled checkpoint: small, trained on synthesised songs only; --checkpoint names another")
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; name a checkpoint file")
    if path.is_file() and (known := describe_known_file(path)):
        log(f"{path}: {known}")
    dtype = DTYPES[args.dtype]
    if slow := slow_dtype_warning(device, dtype):
        log(f"--dtype {args.dtype}: {slow}")
    checkpoint = checkpoints.read_checkpoint(path, weights=args.weights, config=args.config)
    for note in checkpoint.notes:
        log(note)
    model = checkpoint.model().to(device)
    acceleration = accelerate(model, args.backend, dtype=dtype)
    if acceleration.build_seconds is not None:
        kept = f"; it is kept in {acceleration.kept_in}" if acceleration.kept_in else ""
        log(f"built the C++ kernel in {acceleration.build_seconds:.0f} s{kept}")
    if args.backend == "auto" and acceleration.backend not in ("cpu", "triton"):
        log(acceleration)
    return model
