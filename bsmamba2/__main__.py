"""The command line.

python -m bsmamba2 separate SONG... --checkpoint FILE -o DIR    songs in, vocals and the rest out
python -m bsmamba2 backends                                     which forms of the scan run here, and why not
python -m bsmamba2 train --params FILE                          a model from songs, or a stopped run taken up again
python -m bsmamba2 cost --preset NAME                           what training takes, before it is started
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from tqdm import tqdm

from . import audio, kernels
from .checkpoints import load_checkpoint
from .config import PRESETS, ModelConfig
from .cost import training_cost
from .model import BSMamba2
from .processes import together
from .recipe import Recipe, read_parameters
from .separate import separate

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when every song was separated, 1 when one was not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m bsmamba2")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("separate", help="take the vocals out of songs")
    command.add_argument("songs", nargs="+", type=Path, metavar="SONG", help="WAV, FLAC, OGG or MP3")
    command.add_argument("--checkpoint", type=Path, required=True, help="ours, or in a published layout")
    command.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    command.add_argument("--segment", type=float, default=8.0, help="seconds in a segment (8)")
    command.add_argument("--overlap", type=float, default=0.5, help="share that segments overlap (0.5)")
    commands.add_parser("backends", help="which forms of the scan run here, and what would make the others run")
    add_train(commands)
    add_cost(commands)
    chosen = parser.parse_args(arguments)
    if chosen.command == "backends":
        return print_backends()
    if hasattr(chosen, "run"):
        return chosen.run(chosen)
    try:
        model = load_checkpoint(chosen.checkpoint)
        chosen.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for song in chosen.songs:
        try:
            written = separate_file(model, song, chosen.output, segment=chosen.segment, overlap=chosen.overlap)
        except ValueError as error:
            message = str(error)
            print(message if str(song) in message else f"{song}: {message}", file=sys.stderr)
            failed += 1
        else:
            print(*written, sep="\n")
    return 1 if failed else 0


def print_backends() -> int:
    """Print `kernels.backends` as a table, with a line below each backend that is not usable; return 0."""
    rows = kernels.backends()
    header = ("backend", "usable", "version", "why")
    cells = [header, *((row.name, "yes" if row.usable else "no", row.version, row.why) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    mends = ["", *(row.mend for row in rows)]
    for line, mend in zip(cells, mends, strict=True):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]))
        if mend:
            print(f"  to use it: {mend}")
    return 0


def separate_file(model: BSMamba2, song: Path, output: Path, *, segment: float, overlap: float) -> list[Path]:
    """Write `<song>.<stem>.wav` for each stem and `<song>.rest.wav`, the mixture less the stems.

    Rate, length and channels are the song's own.

    Raises:
        AudioError: for a song that cannot be read or a result that cannot be written.
    """
    original, rate = audio.read(song)
    config = model.config
    mixture = audio.convert(original, rate, config.sample_rate, config.channels)

    def progress(starts: range) -> Iterable[int]:
        return tqdm(starts, desc=song.name, unit="segment")

    stems = separate(model, mixture, segment=segment, overlap=overlap, progress=progress)
    channels, samples = original.shape
    results = {}
    for name, stem in zip(config.stems, stems, strict=True):
        back = audio.convert(stem, config.sample_rate, rate, config.channels)[:, :samples]
        back = torch.nn.functional.pad(back, (0, samples - back.shape[1]))
        results[name] = back if channels == config.channels else back.mean(0, keepdim=True)
    results["rest"] = original - torch.stack(list(results.values())).sum(0)
    paths = []
    for name, signal in results.items():
        paths.append(output / f"{song.stem}.{name}.wav")
        audio.write(paths[-1], signal, rate)
    return paths


# --- train ------------------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    """`train --params FILE`, and a flag for every parameter."""
    parser = commands.add_parser(
        "train",
        help="train a model, or go on with a run that was stopped",
        argument_default=argparse.SUPPRESS,
        description="""\
Train a model on synthesised songs, or on a folder of stems (--data). The run lives in --output-dir: after Ctrl-C, a
crash or a power cut, the same command goes on where it was.""",
        epilog="Many GPUs: torchrun --standalone --nproc-per-node 2 -m bsmamba2 train ...",
    )
    parser.add_argument("--params", type=Path, metavar="FILE", help="YAML or JSON with any of the names below")
    types = get_type_hints(Recipe)
    for one in dataclasses.fields(Recipe):
        flag, kind = f"--{one.name.replace('_', '-')}", types[one.name]
        text = f"{one.metadata['help']} ({one.default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind in (str, int, float):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
        else:  # tuple[kind, ...]
            parser.add_argument(flag, type=get_args(kind)[0], nargs="+", help=text)
    parser.set_defaults(run=run_train)


def run_train(chosen: argparse.Namespace) -> int:
    """Train to the end; 0 when it is reached, 1 when the run stopped before, 2 for wrong parameters."""
    values = {name: value for name, value in vars(chosen).items() if name not in ("params", "command", "run")}
    try:
        given = read_parameters(chosen.params) if "params" in chosen else {}
        recipe = Recipe.from_mapping({**given, **values})
        with together(recipe.device) as device:
            windows = recipe.windows(partial(tqdm, desc="looking for activity", unit="file"))
            run, batches = recipe.start(*windows, device), recipe.batches(windows[0])
            done = run.trainer.number
            bar = tqdm(
                run.steps(batches), "training", total=recipe.steps, initial=done, unit="step", disable=not run.writer
            )
            for step in bar:
                bar.set_postfix(loss=f"{step.loss:.3f}", best="" if run.best is None else f"{run.best[0]:.2f} dB")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        notes = getattr(error, "__notes__", [])  # a run that had begun says where it stopped
        print(error, *notes, sep="\n", file=sys.stderr)
        return 1 if notes else 2
    except KeyboardInterrupt as error:
        print(error or "stopped at once", file=sys.stderr)
        return 130
    if run.writer:
        best = "" if run.best is None else f", best {run.best[0]:.2f} dB uSDR at step {run.best[1]}"
        print(f"{run.trainer.number} steps done{best}: {run.folder}")
    return 0


# --- cost -------------------------------------------------------------------------------------------------


def add_cost(commands: Any) -> None:
    """`cost --preset NAME`: will it fit, and how long will it take."""
    parser = commands.add_parser(
        "cost",
        help="what training takes: operations, memory, time",
        description="Count what a batch takes, without running one. For the time, give the peaks of your device.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="size of the model (paper)")
    parser.add_argument("--batch", type=int, default=5, metavar="N", help="examples in a batch of one device (5)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of an example (8)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of matrix products (fp32)")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers twice to keep less")
    parser.add_argument(
        "--loss-hop", type=int, default=147, metavar="N", help="samples between frames of the loss (147)"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="T", help="the device's peak, in 10^12 operations a second"
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB", help="its memory's peak, in 10^9 bytes a second")
    parser.add_argument(
        "--batches", type=int, default=1, metavar="N", help="batches of the whole run, for its time (1)"
    )
    parser.set_defaults(run=run_cost)


def run_cost(chosen: argparse.Namespace) -> int:
    """Print the cost, a line for each number."""
    try:
        cost = training_cost(
            ModelConfig.preset(chosen.preset), batch=chosen.batch, seconds=chosen.seconds, dtype=DTYPES[chosen.dtype],
            checkpointing=chosen.checkpointing, loss_hop=chosen.loss_hop,
        )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    total = sum(cost.forward.values())
    parts = ", ".join(f"{part} {flops / total:.0%}" for part, flops in cost.forward.items())
    lines = {
        "parameters": f"{cost.parameters:,}",
        "forward, a second of audio": f"{cost.flops_per_second / 1e9:,.1f} GFLOP ({parts})",
        "a batch, forward and backward": f"{cost.step / 1e12:,.3f} TFLOP",
        "memory, weights and optimiser": f"{cost.state / 1e9:,.2f} GB",
        "memory, activations": f"{cost.activations / 1e9:,.2f} GB",
        "memory, together": f"{(cost.state + cost.activations) / 1e9:,.2f} GB",
    }
    if chosen.peak_tflops and chosen.bandwidth:
        seconds = cost.seconds(chosen.peak_tflops * 1e12, chosen.bandwidth * 1e9)
        lines["a batch, at the device's peaks"] = f"{seconds:,.3f} s"
        if chosen.batches > 1:
            lines[f"{chosen.batches:,} batches"] = f"{seconds * chosen.batches / 3600:,.1f} h"
    for name, text in lines.items():
        print(f"{name + ':':<34}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
