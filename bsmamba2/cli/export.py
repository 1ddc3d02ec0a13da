"""`bsmamba2 export -o FILE.onnx`: write a model as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.onnx_export import export_onnx
from .console import log, print_line
from .model_arguments import add_checkpoint_arguments, read_checkpoint

DESCRIPTION = """\
Write a checkpoint as an ONNX file, which programs in many languages run without PyTorch, and check it against the
model with ONNX Runtime. Both packages come with pip install 'bsmamba2[export]'."""

EPILOG = """\
The file maps a spectrogram to masks, both in real numbers, for any number of frames t; stems, channels c, bins f:

    input   spectrogram  (c, f, t, 2)        real and imaginary part, float32
    output  masks        (stem, c, f, t, 2)  real and imaginary part, float32

The program that runs it computes the STFT, multiplies it by each mask (complex numbers), and inverts it. The file's
metadata hold the sizes: "config" is a JSON object with sample_rate, channels, n_fft, hop_length, stems, ... The page
"Use it" of the book has such a program, in NumPy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bsmamba2 export`."""
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the file to write, *.onnx")
    add_checkpoint_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Export the checkpoint; an existing file is replaced."""
    try:
        if args.output.suffix != ".onnx":  # so that no other file is replaced by mistake
            raise ValueError(f"{args.output}: must end in .onnx")
        error = export_onnx(read_checkpoint(args).model(), args.output)
    except (ImportError, ValueError, OSError) as fault:
        log(fault)
        return 2
    print_line(args.output)
    log(f"its masks agree with the model's to {error:.0e} of the largest")
    return 0
