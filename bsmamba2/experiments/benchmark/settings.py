"""Settings of a benchmark, its cases, and their results.

Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ...config import PRESETS

PARTS = ("scan", "convolution", "mixer", "model", "step", "separation", "loss", "loading")
FORWARD, BACKWARD = "forward", "forward + backward"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("plain", "chunked", "cpu", "triton", "matrix", "recurrent", "auto")
"""The backends of `kernels.accelerate`, and the plain model with `ssd.matrix` or `ssd.recurrent` as its scan."""
BASELINES = {  # module: how to install it, and what it is
    "transformers": ("pip install transformers", "Hugging Face's Mamba2Mixer, with our weights"),
    "bs_roformer": ("pip install BS-RoFormer", "BS-RoFormer, one attention layer along each axis, hop 441"),
}
BASELINE_CHUNKS = (32, 64)  # the fastest of 32, 64, 128 and 256 for Hugging Face's mixer on the CPUs that we tried
STREAM_MODES: dict[str, dict[str, Any]] = {  # mode of separating a song: arguments of `separate_stream`
    "end to end": {"overlap": 0.0},
    "overlapping by half": {"overlap": 0.5},
    "stateful, 2 s look-ahead": {"look_ahead": 2.0},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Choice of measurements, checked on creation; a `ValueError` names the wrong field.

    Candidates that cannot run here are listed as skipped. For whole modules, bfloat16 means autocast, as in training.
    """

    lengths: tuple[float, ...] = (1.0, 4.0, 8.0, 16.0, 32.0)  #: lengths of the audio, in seconds
    parts: tuple[str, ...] = PARTS
    backends: tuple[str, ...] = BACKENDS[:-1]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = (FORWARD, BACKWARD)
    device: str = "cpu"  #: cpu, cuda or mps
    repeats: int = 5  #: rounds, after a warm-up
    preset: str = "paper"  #: size of the model
    sequences: int = 16  #: batch of the scan and the convolution
    baselines: tuple[str, ...] = tuple(BASELINES)
    batch: int = 1  #: examples in a batch; a training step accumulates two batches
    gradient_checkpointing: bool = True  #: recompute the model's layers in its backward pass
    compile: bool = False  #: `torch.compile` the layers of a training step
    limit: float = 60.0  #: seconds that one run may take
    memory: float = 12.0  #: gigabytes that one run may take beyond its inputs, on a CPU under Linux
    isolated: bool = True  #: first try each case in its own process; if False, `limit` and `memory` are not enforced

    def __post_init__(self) -> None:
        names = {"parts": PARTS, "backends": BACKENDS, "dtypes": DTYPES, "modes": (FORWARD, BACKWARD)}
        words = {"preset": PRESETS, "device": ("cpu", "cuda", "mps")}
        for name, known in {**names, "baselines": BASELINES, **words}.items():
            values = (getattr(self, name),) if name in words else tuple(getattr(self, name))
            if wrong := [one for one in values if one not in known]:
                raise ValueError(f"{name}={getattr(self, name)!r}: {wrong[0]!r} is not one of {', '.join(known)}")
            if not values and name not in ("baselines", "backends"):
                raise ValueError(f"{name} is empty: name at least one of {', '.join(known)}")
            if name not in words:
                object.__setattr__(self, name, values)
        object.__setattr__(self, "lengths", tuple(sorted({float(length) for length in self.lengths})))
        if not self.lengths or not all(0.1 <= length <= 7200 for length in self.lengths):
            raise ValueError(f"lengths={self.lengths!r} must be seconds from 0.1 to 7200, at least one")
        for name in ("repeats", "sequences", "batch", "limit", "memory"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number")
        if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[self.device]:
            raise ValueError(f"device={self.device!r}: there is no such device here; device='cpu' runs everywhere")


@dataclass(frozen=True)
class Case:
    """One candidate doing one job."""

    part: str
    axis: str  #: time or band for the mixer, otherwise empty
    seconds: float
    dtype: str
    mode: str
    candidate: str

    @property
    def job(self) -> tuple[Any, ...]:
        """All fields but the candidate; cases of one job are timed against each other."""
        return self.part, self.axis, self.seconds, self.dtype, self.mode

    @property
    def series(self) -> tuple[str, ...]:
        """All fields but the length."""
        return self.part, self.axis, self.dtype, self.mode, self.candidate


@dataclass(frozen=True)
class Measurement(Case):
    """The measured times and memory of a case."""

    times: tuple[float, ...]  #: seconds of a job, for each round
    gemm_peaks: tuple[float, ...]  #: mean FLOP/s of the matrix products before and after the job, for each round
    flops: float | None  #: floating-point operations of the job (`candidates.flops`); None where they are not counted
    units: float  #: frames of a spectrogram; examples for loading and training steps
    memory: int | None  #: peak resident memory, in bytes, of a process that does only this job (GPU: of its tensors)
    memory_before: int | None  #: peak memory before the job, including imports, weights and inputs
    difference: float | None  #: relative difference from the output of the job's first candidate, in the Euclidean norm

    @property
    def median(self) -> float:
        """Median time of a job, in seconds."""
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the times, in seconds; for a single round, its time twice."""
        low, _, high = statistics.quantiles(self.times * (3 if len(self.times) == 1 else 1), n=4, method="inclusive")
        return low, high

    @property
    def rate(self) -> float:
        """Frames, or examples, per second."""
        return self.units / self.median

    @property
    def fraction(self) -> float | None:
        """Fraction of the matrix-product peak measured around each run, as the median over the rounds."""
        if self.flops is None:
            return None
        pairs = zip(self.times, self.gemm_peaks, strict=True)
        return statistics.median(self.flops / seconds / peak for seconds, peak in pairs)

    def ratio_to(self, other: Measurement) -> float:
        """Time of this case divided by that of a second case in the same rounds, as the median over the rounds."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.times, other.times, strict=True))


@dataclass(frozen=True)
class Skipped(Case):
    """A case that was not measured, and the reason."""

    reason: str
