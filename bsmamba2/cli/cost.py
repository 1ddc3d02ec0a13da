"""`bsmamba2 cost --preset NAME`: estimate whether training fits in memory, and how long it takes."""

from __future__ import annotations

import argparse

from ..config import PRESETS, ModelConfig
from ..train import PRECISIONS
from .console import log, print_line

DESCRIPTION = """\
Count the operations and bytes of a batch, without running one; whether it fits on some GPUs, and the time that none of
them can beat: a lower bound from data sheets, not a measurement. For another device, give its peaks."""
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bsmamba2 cost`."""
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="size of the model (paper)")
    parser.add_argument("--batch", type=int, default=5, metavar="N", help="examples per batch and device (5)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of an example, in seconds (8)")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="type of matrix products")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers to save memory")
    parser.add_argument("--loss-hop", type=int, default=147, metavar="N", help="hop of the loss, in samples (147)")
    parser.add_argument("--peak-tflops", type=float, metavar="T", help="peak compute of the device, in 10^12 FLOP/s")
    parser.add_argument("--bandwidth", type=float, metavar="GB", help="peak bandwidth of its memory, in 10^9 bytes/s")
    parser.add_argument("--batches", type=int, default=1, metavar="N", help="number of batches of the run (1)")


def run(args: argparse.Namespace) -> int:
    """Print the cost, one line per number."""
    from ..experiments.cost import GPUS, training_cost  # here, because torch's counter imports Triton (0.5 s)

    try:
        cost = training_cost(
            ModelConfig.preset(args.preset), batch=args.batch, seconds=args.seconds, dtype=args.precision,
            gradient_checkpointing=args.gradient_checkpointing, loss_hop=args.loss_hop,
        )  # fmt: skip
    except ValueError as error:
        log(error)
        return 2
    total = sum(cost.forward.values())
    parts = ", ".join(f"{part} {flops / total:.0%}" for part, flops in cost.forward.items())
    lines = {
        "parameters": f"{cost.parameters:,}",
        "forward, per second of audio": f"{cost.flops_per_second / 1e9:,.1f} GFLOP ({parts})",
        "a batch, forward and backward": f"{cost.step / 1e12:,.3f} TFLOP",
        "memory, weights and optimiser": f"{cost.state / 1e9:,.2f} GB",
        "memory, activations": f"{cost.activations / 1e9:,.2f} GB",
        "memory, on top for a moment": f"{cost.scratch / 1e9:,.2f} GB",
        "memory, together": f"{cost.memory / 1e9:,.2f} GB",
    }
    if args.peak_tflops and args.bandwidth:
        seconds = cost.seconds(args.peak_tflops * 1e12, args.bandwidth * 1e9)
        lines["a batch, at the device's peaks"] = f"{seconds:,.3f} s"
        if args.batches > 1:
            lines[f"{args.batches:,} batches"] = f"{seconds * args.batches / 3600:,.1f} h"
    for name, gpu in GPUS.items():
        bound = cost.lower_bound(getattr(gpu, args.precision), gpu.bandwidth)
        lines[name] = f"fits: {cost.fits(gpu.memory)}; a batch takes more than {bound:,.3f} s (computed, not measured)"
    print_line(*(f"{name + ':':<34}{text}" for name, text in lines.items()))
    return 0
