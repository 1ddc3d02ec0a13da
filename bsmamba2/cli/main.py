"""Entry point of the command line: `bsmamba2 COMMAND`."""

from __future__ import annotations

import argparse
import io
import sys

from . import backends, cost, evaluate, separate, train
from .console import log

COMMANDS = {
    "separate": (separate, "take the vocals out of songs"),
    "evaluate": (evaluate, "score a checkpoint on tracks whose vocals are known"),
    "train": (train, "train a model, or resume a run that was stopped"),
    "cost": (cost, "estimate the operations, memory and time of training"),
    "backends": (backends, "list the implementations of the scan, and how to install the missing ones"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not stop a command
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="bsmamba2", description="BSMamba2, a vocal separator.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=module.DESCRIPTION, epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
    args = parser.parse_args(arguments)
    try:
        return COMMANDS[args.command][0].run(args)
    except KeyboardInterrupt:
        log("stopped")
        return 130
