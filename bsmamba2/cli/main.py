"""Entry point of the command line: `bsmamba2 COMMAND`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ..settings import expand_user
from . import backends, console, cost, evaluate, export, separate, train
from .console import escape, log, print_line, signals_as_interrupts

COMMANDS = {
    "separate": (separate, "take the vocals out of songs"),
    "evaluate": (evaluate, "score a checkpoint on tracks whose vocals are known"),
    "train": (train, "train a model, or resume a run that was stopped"),
    "cost": (cost, "estimate the operations, memory and time of training"),
    "export": (export, "write a checkpoint as an ONNX file, for programs without PyTorch"),
    "backends": (backends, "list the implementations of the scan, and how to install the missing ones"),
}


class _Parser(argparse.ArgumentParser):
    """Argument parser whose `--help` exits with code 1 if its output is lost."""

    def print_help(self, file: Any = None) -> None:
        if print_line(*self.format_help().splitlines()):
            self.exit(1)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    console._output_lost = 0
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed, or no console; the next file opened must not get its descriptor
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show
    warnings.formatwarning = lambda message, *_, **__: f"{escape(message)}\n"
    parser = _Parser(prog="bsmamba2", description="BSMamba2, a vocal separator.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=module.DESCRIPTION, epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
    args = parser.parse_args(arguments)
    for name, value in vars(args).items():
        setattr(args, name, [*map(_expand, value)] if isinstance(value, list) else _expand(value))
    with signals_as_interrupts(restore=arguments is not None):
        try:
            code = COMMANDS[args.command][0].run(args)
            lost = print_line()  # writes the rest of the buffer too
            return code or lost
        except KeyboardInterrupt:
            log("stopped")
            return 130
        except BrokenPipeError:
            print_line()
            return 141


def _expand(value: Any) -> Any:
    """Expand the `~` of a path argument, because shells do not expand it within an argument such as --output=~/x."""
    return expand_user(value) if isinstance(value, Path) else value
