"""The parts of the GPU check: each yields rows, name → value, or raises `SkipPart` with the reason.

A row of a candidate that failed has a `reason`. `times` are the seconds of each run; candidates took turns.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import __version__, ssd
from ...config import ModelConfig
from ...kernels import BackendError, accelerate, triton
from ...model import BSMamba2
from ...separate import separate
from ...train import TrainConfig, Trainer
from ..benchmark import measuring, tables
from ..benchmark.candidates import least_bytes
from ..benchmark.settings import DTYPES, Measurement, Settings
from ..cost import training_cost

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, Any]


class SkipPart(Exception):
    """A part that cannot run here; the message is the reason."""


class OutOfTime(BaseException):
    """The time of a part is over; raised by an alarm, anywhere, so that no part catches it as a failure of its own."""


@dataclass
class Check:
    """The state of a check.

    Attributes:
        device: to measure on.
        tiny: toy sizes, to test the check itself.
        results: all that is known so far, for JSON: `machine`, and `parts`, each with its state, reason and rows.
        deadline: of the part, on the monotonic clock in seconds.
    """

    device: torch.device
    tiny: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    deadline: float = 0.0

    @property
    def preset(self) -> str:
        """The size of the model."""
        return "small" if self.tiny else "paper"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The types to measure, the most important first."""
        return ("float32",) if self.tiny else ("bfloat16", "float32")

    @property
    def left(self) -> float:
        """Seconds until the part is cut short."""
        return max(1.0, self.deadline - time.monotonic())

    def measure(self, part: str, **changes: Any) -> Iterator[Row]:
        """A row for each case of a part of the benchmark."""
        settings = Settings(
            parts=(part,), lengths=(0.25,) if self.tiny else (1.0, 4.0, 8.0), dtypes=self.dtypes, baselines=(),
            backends=("recurrent", "plain", "chunked", "triton"), device=self.device.type, preset=self.preset,
            repeats=2 if self.tiny else 3, sequences=2 if self.tiny else 16, gradient_checkpointing=False,
            isolated=False, **changes,
        )  # fmt: skip
        for result in measuring.run(settings):
            row: Row = {name: getattr(result, name) for name in ("candidate", "axis", "seconds", "dtype", "mode")}
            if not isinstance(result, Measurement):
                yield {**row, "reason": result.reason}
                continue
            (line,) = tables.results_table([result], part)
            rate = "examples/s" if part == "loading" else "frames/s"
            moved, peak = least_bytes(result, settings), self.results.get("peaks", {}).get("bandwidth")
            yield {
                **row, "median (ms)": line["median (ms)"], rate: line[rate], "of the matmul peak": line["of the peak"],
                "of the bandwidth": f"{moved / result.median / peak:.0%}" if moved and peak else None,
                "memory (GB)": round((result.memory - (result.memory_before or 0)) / 1e9, 3) if result.memory else None,
                "difference": line["difference"], "times": list(result.times),
            }  # fmt: skip


# --- the parts --------------------------------------------------------------------------------------------


def environment(check: Check) -> Iterator[Row]:
    """Versions, the GPU, the two packages of kernels, and the measured peaks."""
    values = {**tables.machine(), "bsmamba2": __version__, "CUDA": torch.version.cuda}
    values["triton"] = getattr(sys.modules.get("triton"), "__version__", None) or _version("triton")
    if check.device.type == "cuda":
        properties = torch.cuda.get_device_properties(check.device)
        values |= {
            "memory (GB)": round(properties.total_memory / 1e9, 1),
            "processors": properties.multi_processor_count,
        }
        values["compute capability"] = f"{properties.major}.{properties.minor}"
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
            values["driver, power, clock"] = done.stdout.strip().splitlines()[0]
        except (OSError, IndexError, subprocess.TimeoutExpired) as error:
            values["driver, power, clock"] = f"unknown: {measuring.failure(error)}"
    for package, load in (("mamba-ssm", triton.scan_kernel), ("causal-conv1d", triton.conv_kernel)):
        try:
            load()
            values[package] = _version(package) or "imported"
        except BackendError as error:
            values[package] = str(error)
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
    """The fused scan and convolution against float64, outputs and gradients."""
    for name, test in (("fused scan", triton.self_test_error), ("fused convolution", triton.conv_self_test_error)):
        for dtype in triton.TYPES:
            started = time.perf_counter()
            error = test(check.device, dtype)
            row: Row = {"kernel": name, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"seconds": round(time.perf_counter() - started, 1), "limit": triton.TOLERANCE[dtype]}
            yield row | ({"reason": str(error)} if error else {"result": "agrees with float64"})


def kernel_tests(check: Check) -> Iterator[Row]:
    """`tests/interpreter`, on the GPU; on a CPU in the interpreter."""
    folder = ROOT / "tests" / "interpreter"
    if not folder.is_dir():
        raise SkipPart(f"the folder {folder} is not there: copy the whole project")
    _require("pytest", "hypothesis", "mamba_ssm")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    command += ["-k", "zeros"] if check.tiny else []
    environ = {**os.environ, "BSMAMBA2_KERNELS_ON": check.device.type}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=check.left, check=False
    )
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    yield {"tests": lines[-1], **({"reason": " | ".join(lines[-8:])} if done.returncode else {})}


def step(check: Check) -> Iterator[Row]:
    """Training steps: the published batch in several ways, and one that a loop over frames can do, before and after."""
    seconds, batch = (0.25, 1) if check.tiny else (8.0, 5)
    base: Row = {"seconds": seconds, "dtype": check.dtypes[0], "batches": 2, "recomputed": True, "compiled": False}
    published = {"candidate": "published batch", "batch": batch, **base}
    yield from _time_steps(check, published)
    for short, small in ((4.0, 2), (4.0, 1), (1.0, 1)) if not check.tiny else ((0.25, 1),):
        smaller = {**base, "batch": small, "seconds": short, "batches": 1}
        rows = _time_steps(check, *({"candidate": name, **smaller} for name in ("loop over frames", "backend auto")))
        yield from rows
        if not any("reason" in row for row in rows):
            break
    yield from _time_steps(check, {**published, "recomputed": False})
    compiled = {**published, "compiled": True}
    if check.device.type == "cuda":
        yield from _time_steps(check, compiled)
    else:
        yield {**compiled, "reason": "torch.compile is measured on GPUs only"}


def _time_steps(check: Check, *rows: Row) -> list[Row]:
    """Time the steps that rows describe, in turns, and add the measurements and the estimates of `cost` to the rows."""
    jobs: list[tuple[Row, Callable[[], Any]]] = []
    for row in rows:
        free(check.device)
        try:
            jobs.append((row, _prepare_step(check, row)))
        except Exception as error:  # any failure is a result
            row["reason"] = measuring.failure(error)
    for _ in range(1 if check.tiny else 3):
        for row, job in jobs:
            row.setdefault("times", []).append(measuring.time_job(job, check.device))
    peaks = check.results.get("peaks", {})
    for row, _ in jobs:
        cost = training_cost(
            ModelConfig.preset(check.preset), batch=row["batch"], seconds=row["seconds"], dtype=row["dtype"],
            gradient_checkpointing=row["recomputed"],
        )  # fmt: skip
        took = statistics.median(row["times"])
        row |= {"median (s)": round(took, 4), "examples/s": round(row["batch"] * row["batches"] / took, 2)}
        row["cost's memory (GB)"] = round(cost.memory / 1e9, 2)
        if row["dtype"] in peaks:
            row["of the matmul peak"] = f"{cost.step * row['batches'] / took / peaks[row['dtype']]:.0%}"
            bound = cost.lower_bound(peaks[row["dtype"]], peaks["bandwidth"])
            row["lower bound (s)"] = round(row["batches"] * bound, 4)
    return list(rows)


def _prepare_step(check: Check, row: Row) -> Callable[[], Any]:
    """A training step, made twice: the first call compiles and chooses block sizes, the second gives the memory."""
    torch.manual_seed(0)
    config, loop = ModelConfig.preset(check.preset), row["candidate"] == "loop over frames"
    model = BSMamba2(config, scan=ssd.recurrent if loop else ssd.chunked).to(check.device)
    accelerate(model, "plain" if loop or check.tiny else "auto", dtype=DTYPES[row["dtype"]])
    settings = TrainConfig(
        steps=10**6, grad_accum_steps=row["batches"], precision=row["dtype"], compile=row["compiled"],
        gradient_checkpointing=row["recomputed"],
    )  # fmt: skip
    trainer = Trainer(model, settings)
    samples = round(row["seconds"] * config.sample_rate)
    signals = 0.1 * torch.randn(2, row["batch"], config.channels, samples)
    step = partial(trainer.train_step, [(signals.sum(0), signals[0])] * row["batches"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    if caught:
        row["warning"] = str(caught[-1].message)
    peak_memory(check.device, reset=True)
    step()
    row["memory (GB)"] = peak_memory(check.device)
    return step


def loading(check: Check) -> Iterator[Row]:
    """Examples read per second, and those that a step of the published batch needs."""
    _require("soundfile", "av", "soxr")
    yield from check.measure("loading")
    steps = check.results.get("parts", {}).get("step", {}).get("rows", [])
    needed = [row["examples/s"] for row in steps if row["candidate"] == "published batch" and "examples/s" in row]
    if needed:
        yield {"candidate": "needed by the fastest step of the published batch", "examples/s": f"{max(needed):,.2f}"}


def separation(check: Check) -> Iterator[Row]:
    """Four minutes of noise, end to end and overlapping by half."""
    dtype = DTYPES[check.dtypes[0]]
    torch.manual_seed(0)
    model = BSMamba2(ModelConfig.preset(check.preset)).to(check.device).eval()
    chosen = accelerate(model, "plain" if check.tiny else "auto", dtype=dtype)
    seconds, segment = (2.0, 1.0) if check.tiny else (240.0, 8.0)
    song = 0.1 * torch.randn(model.config.channels, round(seconds * model.config.sample_rate))
    separate(model, song[:, : round(segment * model.config.sample_rate)], segment=segment, dtype=dtype)
    for overlap in (0.0, 0.5):
        peak_memory(check.device, reset=True)
        job = partial(separate, model, song, segment=segment, overlap=overlap, batch=4, dtype=dtype)
        took = measuring.time_job(job, check.device)
        row = {"song (s)": seconds, "overlap": overlap, "dtype": check.dtypes[0], "backend": chosen.backend}
        row |= {"seconds": round(took, 3), "times real time": round(seconds / took, 1)}
        yield row | {"memory (GB)": peak_memory(check.device)}


def train(check: Check) -> Iterator[Row]:
    """The command `train`, killed in the middle and started again: does it go on from its last state?"""
    _require("soundfile", "av", "soxr", "tqdm")
    flags: Row = {"steps": 10**6, "save-every": 10, "segment": 2, "batch": 8, "songs": 20, "backend": "auto"}
    if check.tiny:
        flags |= {"steps": 4, "save-every": 2, "segment": 0.5, "batch": 1, "songs": 2, "backend": "plain"}
        flags |= {"seconds-per-song": 2}
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "run", Path(place) / "out.txt"
        flags |= {"device": check.device.type, "validate-every": 10**6, "val-songs": 2, "output-dir": folder}
        command = [sys.executable, "-m", "bsmamba2", "train"]
        command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        log, ends = folder / "steps.jsonl", (check.left / 2 - 5, check.left - 5)
        started, kept = time.monotonic(), ""
        for end in ends:
            with out.open("ab") as file:
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
            try:
                while process.poll() is None and time.monotonic() - started < end:
                    if check.tiny and not kept and any(folder.glob("state-*.pt")):
                        break
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
            if end == ends[0]:
                saved = max((int(path.stem.removeprefix("state-")) for path in folder.glob("state-*.pt")), default=0)
                kept = "".join(log.read_text().splitlines(True)[:saved]) if saved else ""
        text = log.read_text() if log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        steps = [line["step"] for line in lines]
        if not kept or not text.startswith(kept) or steps != list(range(1, len(steps) + 1)) or len(steps) <= saved:
            tail = " | ".join(out.read_text(errors="replace").strip().splitlines()[-3:])
            raise RuntimeError(f"killed with a state of step {saved}, the log ends with step {steps[-1:]}: {tail}")
        rate = 1 / statistics.median(line["seconds"] for line in lines)
        losses = {f"{word} loss": round(line["loss"], 4) for word, line in (("first", lines[0]), ("last", lines[-1]))}
        yield {"killed with a state of step": saved, "steps in all": len(steps), "steps/s": round(rate, 2), **losses}


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
"""Name → function, and the seconds after which it is cut short."""


def _require(*modules: str) -> None:
    """Raise SkipPart for a module that is not installed."""
    for name in modules:
        if sys.modules.get(name, "") is None or (name not in sys.modules and importlib.util.find_spec(name) is None):
            raise SkipPart(f"{name} is not installed")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free(device: torch.device) -> None:
    """Give the memory of a part back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory(device: torch.device, *, reset: bool = False) -> float | None:
    """The most gigabytes that tensors took on a GPU since the last reset; none on a CPU."""
    if device.type != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
