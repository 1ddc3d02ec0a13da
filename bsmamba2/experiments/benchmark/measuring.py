"""Measuring: a trial of every case in its own process, then rounds with the candidates in turn.

The trial finds the memory that a job takes, and skips cases that are too large or too slow. The others are timed in
rounds, one after the other, with a matrix product (`GemmPeak`) before and after each run. Even if the machine's speed
varies, we can therefore compare runs of the same round, and each run with the products around it.
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
from torch import Tensor

from ...kernels import is_out_of_memory
from .candidates import Job, flops, groups, prepare, units, unsupported_reason
from .settings import DTYPES, Case, Measurement, Settings, Skipped

MIN_RUN = 0.05  # least seconds of a timed run; a shorter job is repeated within the run
LONG = 120.0  # seconds; a longer separation is timed only in its trial, because it repeats the same work many times
IMPORT_LIMIT = 600.0  # seconds that a trial's process may take for imports, compiling, weights and inputs
GEMM_SIZE = {"cpu": 1536}  # rows of the matrices in the product, by device; on others 8192


# --- a trial in its own process ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Peak memory before and after a job, in bytes, and the job's time in seconds."""

    memory_before: int | None = None
    memory: int | None = None
    seconds: float = 0.0


def trial(case: Case, settings: Settings) -> Trial | str:
    """Do the job once in a new process; returns its memory and time, or the reason why it did not finish."""
    context = multiprocessing.get_context("forkserver")  # a server that has imported torch starts processes quickly
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_trial, args=(case, settings, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    theirs.close()
    outcome: Any = None
    try:
        for seconds in (IMPORT_LIMIT, settings.limit):  # until the job is prepared (None), until it is done
            outcome = outcome or (ours.recv() if ours.poll(seconds) else f"more than {seconds:g} s")
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}: more memory than there is, most likely"
    finally:
        process.kill()
        process.join()
        ours.close()
    return outcome


def _run_trial(case: Case, settings: Settings, threads: int, pipe: Connection) -> None:
    device = torch.device(settings.device)
    try:
        torch.set_num_threads(threads)
        job = prepare(case, settings)
        if device.type == "cpu" and sys.platform == "linux":
            import resource  # not on Windows

            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + round(settings.memory * 1e9)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        pipe.send(None)
        pipe.send(observe(job, device))
    except Exception as error:  # any failure is a result
        too_large = is_out_of_memory(error) and device.type == "cpu"
        pipe.send(f"more than {settings.memory:g} GB" if too_large else failure(error))


def failure(error: BaseException) -> str:
    """One line for a case that failed; it begins with "out of memory" if that is the reason."""
    line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return f"out of memory ({line})" if is_out_of_memory(error) else line


# --- time and memory --------------------------------------------------------------------------------------


def time_job(job: Job, device: torch.device, calls: int = 1) -> float:
    """Mean time of a call, in seconds, including the time that the GPU needs to finish."""
    _wait(device)
    started = time.perf_counter()
    for _ in range(calls):
        job()
    _wait(device)
    return (time.perf_counter() - started) / calls


def observe(job: Job, device: torch.device) -> Trial:
    """Time and memory of one call: memory allocated on a GPU, or on a CPU the memory of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _peak_memory(device)
    seconds = time_job(job, device)
    return Trial(before, _peak_memory(device), seconds)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def free(device: torch.device) -> None:
    """Release the memory of finished jobs, including memory that PyTorch or the GNU C library keeps."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


class GemmPeak:
    """Peak rate of a square matrix product (GEMM) at this moment, in FLOP/s: the best of three runs."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device = GEMM_SIZE.get(device.type, 8192), device
        self.a, self.b = torch.randn(2, self.size, self.size, device=device).to(dtype)
        self()

    def __call__(self) -> float:
        return 2 * self.size**3 / min(time_job(lambda: torch.mm(self.a, self.b), self.device) for _ in range(3))


# --- rounds -----------------------------------------------------------------------------------------------


def measure(cases: Sequence[Case], settings: Settings) -> Iterator[Measurement | Skipped]:
    """Try every case of a job, then time the finished cases in rounds."""
    device = torch.device(settings.device)
    free(device)
    trials: dict[Case, Trial] = {}
    for case in cases:  # all trials first, before this process itself grows
        isolated = settings.isolated and case.part != "loading"
        outcome = unsupported_reason(case, settings) or (trial(case, settings) if isolated else Trial())
        if isinstance(outcome, str):
            yield Skipped(**vars(case), reason=outcome)
        else:
            trials[case] = outcome
    jobs: dict[Case, tuple[Job, int]] = {}  # each with its number of calls in a run
    differences: dict[Case, float] = {}
    reference = None
    for case in [case for case in trials if trials[case].seconds <= LONG or case.part != "separation"]:
        try:
            job = prepare(case, settings)
            started = time.perf_counter()
            output = job()
            _wait(device)
            took = time.perf_counter() - started
            if took < 20 * MIN_RUN or device.type == "cuda":  # the first run may compile, or choose block sizes
                seen = observe(job, device)
                took = seen.seconds
                if device.type == "cuda" and not settings.isolated:
                    trials[case] = seen
        except Exception as error:  # any failure is a result
            del trials[case]
            yield Skipped(**vars(case), reason=failure(error))
            continue
        if isinstance(output, Tensor) and case.part != "loss" and case.candidate != "bs_roformer":
            output = output.double()
            reference = output if reference is None else reference
            differences[case] = float((output - reference).norm() / reference.norm())
        jobs[case] = job, max(1, math.ceil(MIN_RUN / max(took, 1e-6)))
    if not trials:
        return
    gemm_peak = GemmPeak(device, DTYPES[cases[0].dtype])
    before = gemm_peak()
    times = {case: [] if case in jobs else [seen.seconds] for case, seen in trials.items()}
    peaks = {case: [] if case in jobs else [before] for case in trials}
    for _ in range(settings.repeats):
        for case, (job, calls) in jobs.items():
            times[case].append(time_job(job, device, calls))
            after = gemm_peak()
            peaks[case].append((before + after) / 2)
            before = after
    for case, seen in trials.items():
        yield Measurement(
            **vars(case), times=tuple(times[case]), gemm_peaks=tuple(peaks[case]), flops=flops(case, settings),
            units=units(case, settings), memory=seen.memory, memory_before=seen.memory_before,
            difference=differences.get(case),
        )  # fmt: skip


def run(settings: Settings) -> Iterator[Measurement | Skipped]:
    """Measure all cases; a candidate that is skipped at one length is not tried at a greater one."""
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
