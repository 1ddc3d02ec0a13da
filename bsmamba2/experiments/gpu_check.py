"""GPU check: test the book's claims about GPUs on one GPU in at most eight minutes.

    python -m bsmamba2.experiments.gpu_check                        on the GPU
    python -m bsmamba2.experiments.gpu_check --device cpu --tiny    tests the check itself, at toy size

environment → self-tests → kernels' tests → parts of the model → training step → loading → separation → training

A part yields rows, name → value, or raises `SkipPart` with the reason; `benchmark` measures most of the parts. Each
part has a time limit, and the results are written after each part. The check needs PyTorch, NumPy and safetensors;
mamba-ssm and Triton for the fused kernels; pytest and hypothesis for their tests; soundfile, av and soxr for loading
and training. It needs no network. **Not run on a GPU yet.**
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..atomic_write import write_atomically
from ..config import ModelConfig
from ..kernels import BackendError, accelerate, is_out_of_memory, triton
from ..model import BSMamba2
from ..separate import separate
from .benchmark import measuring, tables
from .benchmark.candidates import ACCUMULATED, least_bytes
from .benchmark.settings import BACKWARD, DTYPES, Measurement, Settings, Skipped
from .cost import training_cost

ROOT = Path(__file__).resolve().parents[2]
TOTAL = 480.0
"""Time limit of all parts together, in seconds."""
Row = dict[str, Any]
"""Name → value. The row of a candidate that failed has a `reason`; `times` holds the seconds of each run."""


class SkipPart(Exception):
    """A part cannot run here; the message gives the reason."""


class OutOfTime(BaseException):
    """A part has reached its time limit. An alarm raises it at any point; no part may catch it as its own failure."""


class Check:
    """State of a GPU check: its settings and its results.

    Attributes:
        device: device to measure on.
        tiny: whether to use toy sizes, which test the check itself.
        deadline: end of the part, in seconds on the monotonic clock.
        results: all results so far, for JSON.
        preset, backend: preset and backend of the model, for training and separation.
        dtypes: types to measure, the most important first.
    """

    def __init__(self, device: torch.device, *, tiny: bool = False, deadline: float = 0.0) -> None:
        self.device, self.tiny, self.deadline = device, tiny, deadline
        self.results: dict[str, Any] = {}
        self.preset, self.backend = ("small", "plain") if tiny else ("paper", "auto")
        self.dtypes = ("float32",) if tiny else ("bfloat16", "float32")

    def measure(self, part: str, **changes: Any) -> Iterator[Row]:
        """Measure a part of the benchmark: a row for each case; `changes` override its settings."""
        values: Row = {
            "parts": (part,), "lengths": (1.0, 4.0, 8.0), "dtypes": self.dtypes, "device": self.device.type,
            "backends": ("recurrent", "plain", "chunked", "triton"), "baselines": (), "repeats": 3,
            "preset": self.preset, "gradient_checkpointing": False, "isolated": False, **changes,
        }  # fmt: skip
        settings = Settings(**values | ({"lengths": (0.25,), "repeats": 2, "sequences": 2} if self.tiny else {}))
        peak, done = self.results.get("peaks", {}).get("bandwidth"), list[Measurement]()
        for result in measuring.run(settings):
            if isinstance(result, Skipped):
                yield {**tables.case_columns(result), "reason": result.reason}
                continue
            done.append(result)
            row, moved = tables.results_table(done, part)[-1], least_bytes(result, settings)
            if result.memory and result.memory_before and part != "step":  # a step also needs the model's weights
                row["memory (GB)"] = (result.memory - result.memory_before) / 1e9
            row["of the bandwidth"] = f"{moved / result.median / peak:.0%}" if moved and peak else None
            yield row | {"times": list(result.times)}


# --- the parts --------------------------------------------------------------------------------------------


def environment(check: Check) -> Iterator[Row]:
    """Versions, the GPU, the two kernel packages, and the measured peaks."""
    values = {**tables.machine(), "bsmamba2": __version__, "CUDA": torch.version.cuda}
    if check.device.type == "cuda":
        wanted = "driver_version,memory.total,compute_cap,power.limit,clocks.max.sm"
        command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
            values["driver, memory, compute capability, power, clock"] = done.stdout.splitlines()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired) as error:
            values["driver"] = f"unknown: {measuring.failure(error)}"
    for package, load in (("mamba-ssm", triton.scan_kernel), ("causal-conv1d", triton.conv_kernel)):
        try:
            load()
            values[package] = _version(package)
        except BackendError as error:
            values[package] = str(error)
    values["triton"] = _version("triton")
    yield from ({"name": name, "value": value} for name, value in values.items())
    peaks = check.results["peaks"] = {}
    for dtype in check.dtypes:
        peaks[dtype] = measuring.GemmPeak(check.device, DTYPES[dtype])()
        yield {"name": f"matrix product, {dtype}", "value": f"{peaks[dtype] / 1e12:.1f} TFLOP/s"}
    source = torch.zeros(2**20 if check.tiny else 2**28, device=check.device)  # 1 GiB
    target = torch.empty_like(source)
    fastest = min(measuring.time_job(lambda: target.copy_(source), check.device, 5) for _ in range(3))
    peaks["bandwidth"] = 2 * source.nbytes / fastest
    yield {"name": "copy within memory", "value": f"{peaks['bandwidth'] / 1e9:.0f} GB/s"}


def self_tests(check: Check) -> Iterator[Row]:
    """Compare the fused scan and convolution with float64: outputs and gradients."""
    for name, test in (("fused scan", triton.self_test_error), ("fused convolution", triton.conv_self_test_error)):
        for dtype in triton.TYPES:
            started = time.perf_counter()
            error = test(check.device, dtype)
            row: Row = {"kernel": name, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"seconds": round(time.perf_counter() - started, 1), "limit": triton.TOLERANCE[dtype]}
            yield row | ({"reason": str(error)} if error else {"result": "agrees with float64"})


def kernel_tests(check: Check) -> Iterator[Row]:
    """Run `tests/interpreter` on the GPU, or on a CPU in Triton's interpreter."""
    folder = ROOT / "tests" / "interpreter"
    if not folder.is_dir():
        raise SkipPart(f"the folder {folder} is not there: copy the whole project")
    _require("pytest", "hypothesis", "mamba_ssm")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(
        command + ["-k", "zeros"] * check.tiny, cwd=ROOT, env={**os.environ, "BSMAMBA2_KERNELS_ON": check.device.type},
        capture_output=True, text=True, timeout=max(1.0, check.deadline - time.monotonic()), check=False,
    )  # fmt: skip
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    yield {"tests": lines[-1], **({"reason": " | ".join(lines[-8:])} if done.returncode else {})}


def step(check: Check) -> Iterator[Row]:
    """Training steps: the published batch with several options, and a small batch that the loop can train too."""
    batch = 1 if check.tiny else 5
    published: Row = {"lengths": (8.0,), "batch": batch, "gradient_checkpointing": True, "compile": False}
    loop = {**published, "lengths": (1.0, 4.0), "batch": 1, "backends": ("recurrent", check.backend)}
    stored, compiled = {**published, "gradient_checkpointing": False}, {**published, "compile": True}
    for changes in (published, loop, stored, compiled) if check.device.type == "cuda" else (published, loop, stored):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rows = list(check.measure("step", **{"dtypes": check.dtypes[:1], "backends": (check.backend,), **changes}))
        for row in rows:
            row |= {"batch": changes["batch"], "recomputed": changes["gradient_checkpointing"]}
            row |= {"compiled": changes["compile"], "warning": str(caught[-1].message) if caught else None}
            if "times" in row and (peaks := check.results.get("peaks")):
                cost = training_cost(
                    ModelConfig.preset(check.preset), batch=row["batch"], seconds=float(row["audio (s)"]),
                    dtype=row["type"], gradient_checkpointing=row["recomputed"],
                )  # fmt: skip
                bound = ACCUMULATED * cost.lower_bound(peaks[row["type"]], peaks["bandwidth"])
                row |= {"cost's memory (GB)": cost.memory / 1e9, "lower bound (ms)": 1e3 * bound}
            yield row


def loading(check: Check) -> Iterator[Row]:
    """Examples read per second, and the rate that the fastest step of the published batch needs."""
    _require("soundfile", "av", "soxr")
    yield from check.measure("loading")
    steps = check.results.get("parts", {}).get("step", {}).get("rows", [])
    if published := [row for row in steps if "times" in row and row["audio (s)"] == steps[0]["audio (s)"]]:
        fastest = min(published, key=lambda row: statistics.median(row["times"]))
        yield {"candidate": "needed by the fastest step of that batch", "examples/s": fastest["examples/s"]}


def separation(check: Check) -> Iterator[Row]:
    """Separate four minutes of noise, in segments end to end and overlapping by half."""
    torch.manual_seed(0)
    dtype = DTYPES[check.dtypes[0]]
    model = BSMamba2(ModelConfig.preset(check.preset)).to(check.device).eval()
    chosen = accelerate(model, check.backend, dtype=dtype)
    seconds, segment = (2.0, 1.0) if check.tiny else (240.0, 8.0)
    song = 0.1 * torch.randn(model.config.channels, round(seconds * model.config.sample_rate))
    separate(model, song[:, : round(segment * model.config.sample_rate)], segment=segment, dtype=dtype)
    for overlap in (0.0, 0.5):
        job = partial(separate, model, song, segment=segment, overlap=overlap, batch=4, dtype=dtype)
        seen = measuring.observe(job, check.device)
        row: Row = {"song (s)": seconds, "overlap": overlap, "dtype": check.dtypes[0], "backend": chosen.backend}
        row |= {"seconds": seen.seconds, "times real time": seconds / seen.seconds}
        yield row | ({"memory (GB)": seen.memory / 1e9} if seen.memory and check.device.type == "cuda" else {})


def train(check: Check) -> Iterator[Row]:
    """Kill the command `train` in the middle and start it again: it must resume from its last state."""
    _require("soundfile", "av", "soxr", "tqdm")
    flags: Row = {"steps": 10**6, "save-every": 10, "segment": 2, "batch": 8, "songs": 20}
    if check.tiny:
        flags = {"steps": 4, "save-every": 2, "segment": 0.5, "batch": 1, "songs": 2, "seconds-per-song": 2}
        flags |= {"depth": 1, "dim": 16, "validation-windows": 1}
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "run", Path(place) / "out.txt"
        log, saved, kept = folder / "steps.jsonl", 0, ""
        flags |= {"validate-every": 10**6, "val-songs": 2, "output-dir": folder}
        flags |= {"device": check.device.type, "backend": check.backend}
        command = [sys.executable, "-m", "bsmamba2", "train"]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        half = (time.monotonic() + check.deadline) / 2
        for end in (half, check.deadline):
            with out.open("ab") as file:
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
            try:
                while process.poll() is None and time.monotonic() < end - 5:
                    if check.tiny and end == half and any(folder.glob("state-*.pt")):
                        break
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
            if end == half:
                saved = max((int(path.stem.removeprefix("state-")) for path in folder.glob("state-*.pt")), default=0)
                kept = "".join(log.read_text().splitlines(True)[:saved]) if saved else ""
        text = log.read_text() if log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        steps = [line["step"] for line in lines]
        if not kept or not text.startswith(kept) or steps != list(range(1, len(steps) + 1)) or len(steps) <= saved:
            tail = " | ".join(out.read_text(errors="replace").strip().splitlines()[-3:])
            raise RuntimeError(f"killed with a state of step {saved}, the log ends with step {steps[-1:]}: {tail}")
        row: Row = {"killed with a state of step": saved, "steps in all": len(steps)}
        row["steps/s"] = 1 / statistics.median(line["seconds"] for line in lines)
        yield row | {"first loss": round(lines[0]["loss"], 4), "last loss": round(lines[-1]["loss"], 4)}


PARTS: dict[str, tuple[Callable[[Check], Iterator[Row]], float]] = {
    "environment": (environment, 20),
    "self-tests": (self_tests, 60),
    "kernel tests": (kernel_tests, 60),
    "scan": (partial(Check.measure, part="scan"), 60),
    "convolution": (partial(Check.measure, part="convolution"), 15),
    "mixer": (partial(Check.measure, part="mixer"), 40),
    "model": (partial(Check.measure, part="model"), 50),
    "step": (step, 80),
    "loss": (partial(Check.measure, part="loss"), 10),
    "loading": (loading, 20),
    "separation": (separation, 20),
    "train": (train, 60),
}
"""Name of a part → its function, and its time limit in seconds."""


def _require(*modules: str) -> None:
    """Raise SkipPart for a module that is not installed."""
    for name in modules:
        if sys.modules.get(name, "") is None or (name not in sys.modules and importlib.util.find_spec(name) is None):
            raise SkipPart(f"{name} is not installed")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package.replace("-", "_")), "__version__", "unknown")


# --- running them -----------------------------------------------------------------------------------------


def run(check: Check, folder: Path, names: Sequence[str] = tuple(PARTS), total: float = TOTAL) -> Path:
    """Run the parts, and write `NAME.json` and `NAME.md` into a folder after each part.

    Returns the path of the JSON file.
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
        sys.stdout.write(f"{part}: {_outcome(record)} ({len(record['rows'])} rows)\n")
        sys.stdout.flush()
    return path


def run_part(check: Check, function: Callable[[Check], Iterator[Row]], seconds: float, record: Row) -> None:
    """Run a part for at most `seconds`, and store its rows, its state and the reason for a failure in a record."""
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
    except Exception as error:  # the following parts still run
        state = "out of memory" if is_out_of_memory(error) else "failed"
        record |= {"state": state, "reason": measuring.failure(error)}
    measuring.free(check.device)
    record["took (s)"] = round(time.monotonic() - started, 1)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after `seconds`, if the system has alarms; Python raises it between two operations."""

    def ring(*_: object) -> None:
        raise OutOfTime

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)  # repeated, in case a callback swallows the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- tables -----------------------------------------------------------------------------------------------


PAIRS = {  # name: part, old candidate, and its replacements, the best first
    "scan": ("scan", "recurrent", ("triton", "chunked")),
    "convolution": ("convolution", "conv1d", ("causal-conv1d", "shifts")),
    "loss": ("loss", "five windows, torch.stft", ("five windows",)),
    "reading an example": ("loading", "files, when asked", ("files, two processes ahead",)),
    "whole model": ("model", "recurrent", ("triton", "chunked")),
    "training step": ("step", "recurrent", ("auto", "plain")),
}
"""Rows of the table that compares each old candidate with its replacement."""


def before_and_after(parts: Mapping[str, Any]) -> list[Row]:
    """Speed-up of each pair in `PAIRS`, from alternating runs, at the greatest length that both completed."""
    lines = []
    for name, (part, before, afters) in PAIRS.items():
        rows = [row for row in parts.get(part, {}).get("rows", []) if row.get("times")]
        pairs = [
            (old["pass"] == BACKWARD, float(old["audio (s)"]), -afters.index(new["candidate"]), old, new)
            for old in rows
            for new in rows
            if old["candidate"] == before and new["candidate"] in afters
            and all(old.get(key) == new.get(key) for key in ("audio (s)", "type", "pass", "batch"))
        ]  # fmt: skip
        if not pairs:
            continue
        *_, old, new = max(pairs, key=lambda pair: pair[:3])
        line = {"part": name, **{key: old[key] for key in ("audio (s)", "type", "pass")}}
        for word, row in (("before", old), ("after", new)):
            line |= {word: row["candidate"], f"{word} (ms)": f"{1e3 * statistics.median(row['times']):.4g}"}
        ratios = [slow / fast for slow, fast in zip(old["times"], new["times"], strict=True)]
        lines.append({**line, "times as fast": f"{statistics.median(ratios):.2f}"})
    return lines


def report(results: Mapping[str, Any]) -> str:
    """The results as Markdown: a heading, the table of speed-ups, and a table for each part."""
    machine, toy = results["machine"], " at toy size, which says nothing about speed" if results["tiny"] else ""
    place = machine["gpu"] if results["device"].startswith("cuda") else f"a CPU ({machine['processor']})"
    versions = f"torch {machine['torch']}, bsmamba2 {results['bsmamba2']}"
    lines = [f"### {place}", "", f"Measured on {machine['date']}{toy}: {versions}.", ""]
    if pairs := results.get("before and after"):
        lines += ["**Before and after.** The two of a line took turns in one run.", "", *_table(pairs), ""]
    for name, record in results["parts"].items():
        lines += [f"**{name}**: {_outcome(record)}", "", *_table(record["rows"]), ""]
    return "\n".join(lines)


def _outcome(record: Row) -> str:
    return record["state"] + (f": {record['reason']}" if record["reason"] else "")


def _table(rows: Sequence[Row]) -> list[str]:
    """Rows as a Markdown table; lists appear only in the JSON file."""

    def text(value: Any) -> str:
        shown = tables.digits(value) if isinstance(value, float) else str(value)
        return " ".join(shown.replace("|", "\\|").split())

    texts = [{k: text(v) for k, v in row.items() if v is not None and not isinstance(v, list)} for row in rows]
    names = list(dict.fromkeys(key for row in texts for key, text in row.items() if text))
    cells = [[row.get(name, "") for name in names] for row in texts]
    return [f"| {' | '.join(line)} |" for line in [names, ["---"] * len(names), *cells]] if names else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check from the command line; returns 1 if a part failed, 2 if the GPU is missing."""
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
    check = Check(torch.device(args.device), tiny=args.tiny)
    total = 60 * args.minutes if args.minutes else 3600.0 if args.tiny else TOTAL
    path = run(check, args.output, args.parts, total)
    sys.stdout.write(
        f"\n{report(check.results)}\nTo hand it in: put {path} into book/data/gpu/ and open a pull request.\n"
    )
    return int(any(record["state"] == "failed" for record in check.results["parts"].values()))


if __name__ == "__main__":  # processes that PyTorch starts import this file again
    sys.exit(main())
