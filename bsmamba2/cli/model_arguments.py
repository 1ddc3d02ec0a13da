"""Model arguments of `separate` and `evaluate`: checkpoint, device, backend."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .. import checkpoints
from ..checkpoints import describe_known_file
from ..kernels import BACKENDS, accelerate, slow_dtype_warning
from ..model import BSMamba2
from ..separate import DTYPES
from .console import log


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the checkpoint."""
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="checkpoint in this project's or a published layout; default: the bundled one",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="YAML or JSON file with the hop, window, stems or bands of a checkpoint that does not store them: fields "
        "of ModelConfig, or the training toolbox's own file; default: a YAML file next to the checkpoint, if one fits",
    )  # fmt: skip
    parser.add_argument(
        "--weights", choices=("auto", "ema", "raw"), default="auto",
        help="weights of a checkpoint that has both: raw, or ema, the moving averages (auto: ema if present)",
    )  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the checkpoint, its device and its backend."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; default: cuda, else cpu")
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto",
        help="kernels; auto (default): the fastest that runs here; plain: the book's code; see bsmamba2 backends",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="type of the model's activations (float32); spectrograms and masks stay in float32",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="segments per batch (1)")


def read_checkpoint(args: argparse.Namespace) -> checkpoints.Checkpoint:
    """Read the checkpoint that the options choose, and log notes for the user.

    Raises:
        ValueError: for a checkpoint that cannot be used.
        OSError: for a checkpoint that does not exist.
    """
    path = args.checkpoint or checkpoints.bundled_checkpoint()
    if args.checkpoint is None:
        log("bundled checkpoint: small, trained on synthesised songs only; --checkpoint names another")
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; name a checkpoint file")
    if path.is_file() and (known := describe_known_file(path)):
        log(f"{path}: {known}")
    checkpoint = checkpoints.read_checkpoint(path, weights=args.weights, config=args.config)
    log(*checkpoint.notes)
    return checkpoint


def load_model(args: argparse.Namespace) -> BSMamba2:
    """Load the model onto its device and install the kernels; replaces "auto" in `args.device`. Not run on a GPU.

    Raises:
        ValueError: for a checkpoint or device that cannot be used.
        OSError: for a checkpoint that does not exist.
        BackendError: for a named backend that cannot run here.
    """
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch raises a different type for each kind of missing device
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {args.device}: {reason}; use --device cpu") from error
    dtype = DTYPES[args.dtype]
    if slow := slow_dtype_warning(device, dtype):
        log(f"--dtype {args.dtype}: {slow}")
    model = read_checkpoint(args).model().to(device)
    acceleration = accelerate(model, args.backend, dtype=dtype)
    if acceleration.build_seconds is not None:
        kept = f"; it is kept in {acceleration.kept_in}" if acceleration.kept_in else ""
        log(f"built the C++ kernel in {acceleration.build_seconds:.0f} s{kept}")
    if args.backend == "auto" and acceleration.backend not in ("cpu", "triton"):
        log(acceleration)
    return model
