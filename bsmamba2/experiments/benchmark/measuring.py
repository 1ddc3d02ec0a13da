"""Measuring: a trial of every case in a process of its own, then rounds in which the candidates take turns.

The trial finds the memory that a job takes, and skips cases that are too large or too slow. The others are timed in
rounds, one after the other, with a matrix product (`GemmPeak`) before and after each run. On a machine whose speed
varies, runs of one round are therefore comparable, and so are a run and the products around it.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ...config import ModelConfig
from ...kernels import is_out_of_memory
from .candidates import EXAMPLES, Job, flops, groups, prepare, spectrogram_frames, unsupported_reason
from .settings import DTYPES, Case, Measurement, Settings, Skipped

MIN_RUN = 0.05  # seconds of a timed run: a shorter job is repeated within the run
LONG = 120.0  # seconds of a separation from which on its trial is its only timing: it repeats the same work many times
IMPORT_LIMIT = 600.0  # seconds that a trial's process may take for imports, compiling, weights and inputs


# --- a trial in a process of its own ----------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Largest memory of a process before the job and at its end, in bytes, and the job's time in seconds."""

    memory_before: int
    memory: int
    seconds: float


def trial(case: Case, settings: Settings) -> Trial | str:
    """Do the job once in a new process: its memory and time, or the reason why it did not finish."""
    # A fork server that has imported torch starts such a process at once.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_trial, args=(case, settings, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        for seconds in (IMPORT_LIMIT, settings.limit):  # until the job is prepared, until it is done
            if not ours.poll(seconds):
                return f"more than {seconds:g} s"
            outcome = ours.recv()
            if outcome is not None:
                return outcome
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}: more memory than there is, most likely"
    finally:
        process.kill()
        process.join()
        ours.close()
    raise AssertionError("a trial reported twice that it was ready")


def _run_trial(case: Case, settings: Settings, threads: int, pipe: Connection) -> None:
    try:
        torch.set_num_threads(threads)
        job = prepare(case, settings)
        before = _peak_memory(settings.device)
        if settings.device == "cpu" and sys.platform == "linux":
            import resource

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + round(settings.memory * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send(None)
        seconds = time_job(job, torch.device(settings.device))
        pipe.send(Trial(before, _peak_memory(settings.device), seconds))
    except Exception as error:  # any failure is a result
        too_large = is_out_of_memory(error) and settings.device == "cpu"
        pipe.send(f"more than {settings.memory:g} GB" if too_large else failure(error))


def failure(error: BaseException) -> str:
    """One line for a case that failed; when memory ran out, it begins with those words."""
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return f"out of memory ({line})" if is_out_of_memory(error) else line


def _peak_memory(device: str) -> int:
    """Largest memory of this process so far, in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with that of the process that started this one
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- time -------------------------------------------------------------------------------------------------


def time_job(job: Job, device: torch.device, calls: int = 1) -> float:
    """Mean time of a call, in seconds; a GPU is waited for."""

    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        job()
    _wait(device)
    return (time.perf_counter() - started) / calls


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class GemmPeak:
    """Peak rate of a square matrix product (GEMM) at this moment, in FLOP/s: the best of three."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device = (1536 if device.type == "cpu" else 8192), device
        self.a, self.b = torch.randn(2, self.size, self.size, device=device).to(dtype)
        self()

    def __call__(self) -> float:
        def product() -> None:
            torch.mm(self.a, self.b)

        return 2 * self.size**3 / min(time_job(product, self.device) for _ in range(3))


def measure(cases: Sequence[Case], settings: Settings) -> Iterator[Measurement | Skipped]:
    """Try every case of a job, then time those that finished in rounds."""
    device = torch.device(settings.device)
    gc.collect()
    if trim := sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # the GNU C library returns freed memory to the system
    trials: dict[Case, Trial | None] = {}
    for case in cases:  # all trials first, before this process itself grows
        tried = settings.isolated and case.part != "loading"
        outcome = unsupported_reason(case, settings) or (trial(case, settings) if tried else None)
        if isinstance(outcome, str):
            yield Skipped(**vars(case), reason=outcome)
        else:
            trials[case] = outcome
    if not trials:
        return
    jobs: dict[Case, tuple[Job, int]] = {}  # and how often it is called in a run
    differences: dict[Case, float] = {}
    reference = None
    for case, outcome in list(trials.items()):
        if case.part == "separation" and outcome and outcome.seconds > LONG:
            continue  # its trial is its only timing
        try:
            job = prepare(case, settings)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            held, started = _peak_memory(settings.device), time.perf_counter()
            output = job()
            _wait(device)
            took = time.perf_counter() - started
        except Exception as error:  # any failure is a result
            if settings.isolated:  # its trial succeeded
                raise
            del trials[case]
            yield Skipped(**vars(case), reason=failure(error))
            continue
        if not settings.isolated and device.type == "cuda":
            trials[case] = Trial(held, _peak_memory(settings.device), took)
        if output is not None and case.part != "loss" and case.candidate != "bs_roformer":
            output = output.double()
            reference = output if reference is None else reference
            differences[case] = float((output - reference).norm() / reference.norm())
        took = took if took > 20 * MIN_RUN else time_job(job, device)
        jobs[case] = job, max(1, math.ceil(MIN_RUN / max(took, 1e-6)))
    gemm_peak = GemmPeak(device, DTYPES[cases[0].dtype])
    before = gemm_peak()
    times = {case: [outcome.seconds] if outcome and case not in jobs else [] for case, outcome in trials.items()}
    peaks = {case: [] if case in jobs else [before] for case in trials}
    for _ in range(settings.repeats):
        for case, (job, calls) in jobs.items():
            times[case].append(time_job(job, device, calls) / (EXAMPLES if case.part == "loading" else 1))
            after = gemm_peak()
            peaks[case].append((before + after) / 2)
            before = after
    config = ModelConfig.preset(settings.preset)
    for case, outcome in trials.items():
        yield Measurement(
            **vars(case), times=tuple(times[case]), gemm_peaks=tuple(peaks[case]), flops=flops(case, settings),
            units=1.0 if case.part == "loading" else float(spectrogram_frames(case.seconds, config)),
            memory=outcome.memory if outcome else None, memory_before=outcome.memory_before if outcome else None,
            difference=differences.get(case),
        )  # fmt: skip


def run(settings: Settings) -> Iterator[Measurement | Skipped]:
    """All cases; a candidate that is too slow or too large at one length is not tried at a greater one."""
    failed: dict[tuple[str, ...], Skipped] = {}
    for cases in groups(settings):
        for case in cases:
            if shorter := failed.get(case.series):
                at_length = "" if shorter.reason.startswith("at ") else f"at {shorter.seconds:g} s: "
                yield Skipped(**vars(case), reason=at_length + shorter.reason)
        for result in measure([case for case in cases if case.series not in failed], settings):
            if isinstance(result, Skipped):
                failed[result.series] = result
            yield result
