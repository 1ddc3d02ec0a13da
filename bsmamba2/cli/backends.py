"""`bsmamba2 backends`: list the implementations of the scan, and the choice of `--backend auto`."""

from __future__ import annotations

import argparse

from ..kernels import backends
from .console import print_line

DESCRIPTION = "List the backends, whether each is usable here, and how to install the missing ones."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `bsmamba2 backends` takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print `kernels.backends` as a table, with the fix below each backend that is not usable."""
    rows = backends()
    header = ("backend", "usable", "version", "reason")
    cells = [header, *((row.name, "yes" if row.usable else "no", row.version, row.reason) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(3)] + [0]
    for line, fix in zip(cells, ["", *(row.fix for row in rows)], strict=True):
        print_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
        if fix:
            print_line(f"  to use it: {fix}")
    return 0
