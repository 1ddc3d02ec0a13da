"""Run the parts of the GPU check within their time, and write their results as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...atomic_write import write_atomically
from ...kernels import is_out_of_memory
from ..benchmark import measuring, tables
from ..benchmark.settings import BACKWARD
from .parts import PARTS, Check, OutOfTime, Row, SkipPart, free

TOTAL = 480.0
"""Seconds that all parts may take."""
PAIRS = {  # name: part, before, and what replaces it, the best first
    "scan": ("scan", "recurrent", ("triton", "chunked")),
    "convolution": ("convolution", "conv1d", ("causal-conv1d", "shifts")),
    "loss": ("loss", "five windows, torch.stft", ("five windows",)),
    "reading an example": ("loading", "files, when asked", ("files, two processes ahead",)),
    "whole model": ("model", "recurrent", ("triton", "chunked")),
    "training step": ("step", "loop over frames", ("backend auto",)),
}
"""The parts of the table of before and after."""


# --- running them -----------------------------------------------------------------------------------------


def run(check: Check, folder: Path, names: Sequence[str] = tuple(PARTS), total: float = TOTAL) -> Path:
    """Run the parts, and write `NAME.json` and `NAME.md` into a folder after each of them.

    Returns:
        The JSON file.
    """
    end = time.monotonic() + total
    machine = check.results.setdefault("machine", tables.machine())
    gpu = machine["gpu"] if check.device.type == "cuda" else "cpu"
    name = "".join(c if c.isalnum() else "-" for c in f"{gpu} {machine['date']}".lower())
    check.results |= {"bsmamba2": __version__, "device": str(check.device), "tiny": check.tiny, "parts": {}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    for part in names:
        function, seconds = PARTS[part]
        left = end - time.monotonic()
        record = check.results["parts"][part] = {"state": "skipped", "reason": "no time was left", "rows": []}
        if left > 1:
            run_part(check, function, left if check.tiny else min(seconds, left), record)
        check.results["before and after"] = before_and_after(check.results["parts"])
        write_atomically(path, json.dumps(check.results, indent=1, ensure_ascii=False))
        write_atomically(path.with_suffix(".md"), report(check.results))
        reason = f": {record['reason']}" if record["reason"] else ""
        sys.stdout.write(f"{part}: {record['state']}, {len(record['rows'])} rows{reason}\n")
        sys.stdout.flush()
    return path


def run_part(check: Check, function: Callable[[Check], Iterator[Row]], seconds: float, record: Row) -> None:
    """Run a part for at most so many seconds, and note its rows, its state and the reason of a failure in a record."""
    started = time.monotonic()
    check.deadline = started + seconds
    record |= {"state": "done", "reason": ""}
    try:
        with _alarm(seconds):
            for row in function(check):
                record["rows"].append(row)
        reasons = [row.get("reason") for row in record["rows"]]
        if reasons and all(reasons):
            record |= {"state": "skipped", "reason": reasons[0]}
    except SkipPart as error:
        record |= {"state": "skipped", "reason": str(error)}
    except (OutOfTime, subprocess.TimeoutExpired):
        record |= {"state": "cut short", "reason": f"after {seconds:.0f} s"}
    except Exception as error:  # the parts after it run all the same
        record |= {"state": "out of memory" if is_out_of_memory(error) else "failed"}
        record["reason"] = measuring.failure(error)
    free(check.device)
    record["took (s)"] = round(time.monotonic() - started, 1)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so many seconds, where the system has alarms; Python raises it between two operations."""

    def ring(*_: object) -> None:
        raise OutOfTime

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # again where a callback swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- tables -----------------------------------------------------------------------------------------------


def before_and_after(parts: Mapping[str, Any]) -> list[Row]:
    """The speed-up of each pair of `PAIRS`, from runs that took turns, at the greatest length that both could do."""
    lines = []
    for name, (part, before, afters) in PAIRS.items():
        rows = [row for row in parts.get(part, {}).get("rows", []) if row.get("times")]
        pairs = [
            (old.get("mode") == BACKWARD, old["seconds"], -afters.index(new["candidate"]), old, new)
            for old in rows
            for new in rows
            if old["candidate"] == before and new["candidate"] in afters
            and all(old.get(key) == new.get(key) for key in ("seconds", "dtype", "mode", "batch"))
        ]  # fmt: skip
        if not pairs:
            continue
        *_, old, new = max(pairs, key=lambda pair: pair[:3])
        line = {"part": name, "audio (s)": f"{old['seconds']:g}", "type": old["dtype"], "pass": old.get("mode", "")}
        for word, row in (("before", old), ("after", new)):
            line |= {word: row["candidate"], f"{word} (ms)": f"{1e3 * statistics.median(row['times']):.4g}"}
        ratios = [slow / fast for slow, fast in zip(old["times"], new["times"], strict=True)]
        lines.append({**line, "times as fast": f"{statistics.median(ratios):.2f}"})
    return lines


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a heading, before and after, and a table for each part."""
    machine, toy = results["machine"], " at toy size, which says nothing about speed" if results["tiny"] else ""
    place = machine["gpu"] if results["device"].startswith("cuda") else f"a CPU ({machine['processor']})"
    versions = f"torch {machine['torch']}, bsmamba2 {results['bsmamba2']}"
    lines = [f"### {place}", "", f"Measured on {machine['date']}{toy}: {versions}.", ""]
    if pairs := results.get("before and after"):
        lines += ["**Before and after.** The two of a line took turns in one run.", "", *_table(pairs), ""]
    for name, record in results["parts"].items():
        reason = f": {record['reason']}" if record["reason"] else ""
        lines += [f"**{name}**: {record['state']}{reason}", "", *_table(record["rows"]), ""]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    """Rows as a Markdown table; lists are for the JSON file only."""
    texts = [{key: str(value) for key, value in row.items() if not isinstance(value, list)} for row in rows]
    texts = [{key: " ".join(t.replace("|", "\\|").split()) for key, t in row.items() if t != "None"} for row in texts]
    names = list(dict.fromkeys(key for row in texts for key, text in row.items() if text))
    cells = [[row.get(name, "") for name in names] for row in texts]
    return [f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells]] if names else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check from the command line; 1 when a part failed, 2 without the device."""
    parser = argparse.ArgumentParser(prog="python -m bsmamba2.experiments.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="to measure on (cuda)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: tests the check itself")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="to run (all)")
    parser.add_argument("--minutes", type=float, help="for all parts together (8; 60 with --tiny)")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_check"), help="folder to write to (gpu_check)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(f"torch {torch.__version__} sees no GPU; --device cpu --tiny tests the check itself\n")
        return 2
    total = 60 * args.minutes if args.minutes else 3600.0 if args.tiny else TOTAL
    path = run(Check(torch.device(args.device), args.tiny), args.output, args.parts, total)
    content = json.loads(path.read_text(encoding="utf-8"))
    sys.stdout.write(f"\n{report(content)}\nTo hand it in: put {path} into book/data/gpu/ and open a pull request.\n")
    return int(any(record["state"] == "failed" for record in content["parts"].values()))
