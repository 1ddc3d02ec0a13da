"""How fast, how large: every part of the model timed beside the alternatives to it, and beside the machine's own peak.

settings → groups of cases → a trial of each in a process of its own → rounds → rows

A case is one contestant at one job. Its trial measures memory, and keeps what is too large or too slow away from the
rest. Those that pass are timed in rounds, one after the other, with a plain matrix product before and after each run:
on a machine that is now faster and now slower, runs of one round compare, and so do a run and the products beside it.

Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import ssd
from ...config import PRESETS, ModelConfig
from ...data import Loader, Remixer
from ...experiments import cost
from ...kernels import loops, triton
from ...kernels.self_test import out_of_memory
from ...losses import WINDOWS, bsmamba2_loss
from ...mamba2 import Mamba2, block_by_block, causal_conv_silu
from ...model import BSMamba2
from ...separate import separate_stream
from ...training.datasets import FileTrack

PARTS = ("scan", "convolution", "mixer", "model", "separation", "loss", "loading")
FORWARD, BACKWARD = "forward", "forward + backward"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = ("chunked", "matrix", "recurrent", "native", "fused")
BASELINES = {  # module: how to install it, and what it is
    "transformers": ("pip install transformers", "Hugging Face's Mamba2Mixer, with our weights"),
    "bs_roformer": ("pip install BS-RoFormer", "BS-RoFormer, one attention layer along each axis, hop 441"),
}
PEER_CHUNKS = (32, 64)  # of 32, 64, 128 and 256 the quickest of Hugging Face's on the CPUs that were tried
COMPILED = ", compiled"
STREAM_MODES: dict[str, dict[str, Any]] = {  # of separating a song: what `separate_stream` is told
    "end to end": {"overlap": 0.0},
    "overlapping by half": {"overlap": 0.5},
    "carried, 2 s ahead": {"look_ahead": 2.0},
}
LEAST = 0.05  # seconds of a timed run: a shorter job is done several times
LONG = 120.0  # seconds of a separation that is timed once, as it is tried: it computes the same piece over and over
COMPILING = 600.0  # seconds that torch.compile is given, and imports are
EXAMPLES = 64  # that a run of the loading part reads; up to four of them have been read ahead

CLAIM = (
    ("selective scan", 40.0, 5.0),
    ("causal convolution", 3.0, 1.0),
    ("STFT loss", 15.0, 5.0),
    ("data processing", 3.0, 1.5),
    ("data loading", 2.0, 0.5),
    ("one step", 63.0, 13.0),
)
"""Part, seconds before and after: the table of a report on an earlier port (October 2025). It names no device, command
or spread; the port's scan is another function than Mamba-2's, its model has 22 million parameters."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure; checked on creation, `ValueError` names the field.

    Attributes:
        lengths: of the audio, in seconds.
        parts: of `PARTS`.
        backends: scans by name; those that are not usable are listed as not run.
        dtypes: of `DTYPES`; bfloat16 is autocast for whole modules, as in training and separation.
        modes: `forward` (no gradients), `forward + backward`.
        device: cpu, cuda or mps.
        repeats: rounds, after a warm-up.
        preset: size of the model.
        sequences: that the scan and the convolution read at once; 16 are what the published model hands them.
        peers: of `BASELINES`; those that cannot be imported are listed as not run.
        compile: also the chunked form with the loops between matrix products compiled; without gradients only.
        gradient_checkpointing: compute the model's layers again in its backward pass.
        limit: seconds that one run may take; a longer one is listed as not run.
        memory: gigabytes that one run may take beyond its inputs, on a CPU under Linux.
    """

    lengths: tuple[float, ...] = (1.0, 4.0, 8.0, 16.0, 32.0)
    parts: tuple[str, ...] = PARTS
    backends: tuple[str, ...] = BACKENDS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = (FORWARD, BACKWARD)
    device: str = "cpu"
    repeats: int = 5
    preset: str = "paper"
    sequences: int = 16
    peers: tuple[str, ...] = tuple(BASELINES)
    compile: bool = False
    gradient_checkpointing: bool = True
    limit: float = 60.0
    memory: float = 12.0

    def __post_init__(self) -> None:
        for name, known in (
            ("parts", PARTS),
            ("backends", BACKENDS),
            ("dtypes", DTYPES),
            ("modes", (FORWARD, BACKWARD)),
            ("peers", BASELINES),
        ):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            if wrong := [value for value in values if value not in known]:
                raise ValueError(f"{name}: {wrong[0]!r} is not one of {', '.join(known)}")
            if not values and name not in ("peers", "backends"):
                raise ValueError(f"{name} is empty: name at least one of {', '.join(known)}")
        object.__setattr__(self, "lengths", tuple(sorted({float(length) for length in self.lengths})))
        if not self.lengths or not all(0.1 <= length <= 7200 for length in self.lengths):
            raise ValueError(f"lengths={self.lengths!r} must be seconds from 0.1 to 7200, at least one")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is not one of {', '.join(PRESETS)}")
        if self.device not in ("cpu", "cuda", "mps"):
            raise ValueError(f"device={self.device!r} must be cpu, cuda or mps")
        if not {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[self.device]:
            raise ValueError(f"device={self.device!r}: there is no such device here; device='cpu' runs everywhere")
        for name in ("repeats", "sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be at least 1")
        for name in ("limit", "memory"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive number")


@dataclass(frozen=True)
class Case:
    """One contestant at one job. `axis` is time or band for the mixer, and else empty."""

    part: str
    axis: str
    seconds: float
    dtype: str
    mode: str
    candidate: str


@dataclass(frozen=True)
class Row(Case):
    """What was measured.

    Attributes:
        times: seconds of a job, for each round.
        peaks: operations a second of the matrix products beside it, for each round.
        flops: operations of the job, by `bsmamba2.experiments.cost`; none for what is no matrix product, or no model of ours.
        units: frames of a spectrogram; examples for the loading part.
        memory: largest resident memory of a process that did nothing else, in bytes (on a GPU, of PyTorch's tensors).
        before: the same before the job, with all that was imported, weights and inputs.
        difference: from the group's first contestant, relative, in the Euclidean norm; none where that is no measure.
    """

    times: tuple[float, ...]
    peaks: tuple[float, ...]
    flops: float | None
    units: float
    memory: int | None
    before: int | None
    difference: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Of the times; the one time twice where there was one round."""
        if len(self.times) == 1:
            return self.times[0], self.times[0]
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return low, high

    @property
    def rate(self) -> float:
        """Frames, or examples, a second."""
        return self.units / self.median

    @property
    def fraction(self) -> float | None:
        """Of the matrix-product peak beside each run, the median."""
        if self.flops is None:
            return None
        pairs = zip(self.times, self.peaks, strict=True)
        return statistics.median(self.flops / seconds / peak for seconds, peak in pairs)

    def against(self, other: Row) -> float:
        """How many times as long as another row of the same rounds, the median over the rounds."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.times, other.times, strict=True))


@dataclass(frozen=True)
class Skipped(Case):
    """What was not measured, and why."""

    why: str


# --- what there is to measure -----------------------------------------------------------------------------


def groups(settings: Settings) -> Iterator[list[Case]]:
    """Cases that are timed against each other; all that could be asked for, usable or not."""
    for part, dtype, mode, seconds in itertools.product(
        settings.parts, settings.dtypes, settings.modes, settings.lengths
    ):
        # Reading and separating have no gradient, and the loss is float32 whatever the model computes in.
        if (part in ("loading", "separation") and mode != settings.modes[0]) or (
            part in ("loss", "loading") and dtype != settings.dtypes[0]
        ):
            continue
        for axis in ("time", "band") if part == "mixer" else ("",):
            names = contestants(settings, part)
            if mode == BACKWARD:  # loops are compiled without gradients only
                names = [name for name in names if not name.endswith(COMPILED)]
            yield [Case(part, axis, seconds, dtype, mode, name) for name in names]


def contestants(settings: Settings, part: str) -> list[str]:
    """Who takes part; the first is what the others are compared with."""
    compiled = ["chunked" + COMPILED] if settings.compile and "chunked" in settings.backends else []
    mixers = [f"transformers, chunk {chunk}" for chunk in PEER_CHUNKS] if "transformers" in settings.peers else []
    roformer = ["bs_roformer"] if "bs_roformer" in settings.peers else []
    return {
        "scan": [*settings.backends, *compiled],
        "convolution": ["shifts", "conv1d", "causal-conv1d"],
        "mixer": [*settings.backends, *compiled, *mixers],
        "model": [*settings.backends, *compiled, *roformer],
        "separation": [*STREAM_MODES, *roformer],
        "loss": ["five windows", "three windows"],
        "loading": ["files, when asked", "files, two processes ahead", "memory"],
    }[part]


def _compiled(candidate: str) -> bool:
    return candidate.endswith(COMPILED) or candidate == "native"


def obstacle(case: Case, settings: Settings) -> str:
    """Why a contestant cannot take part here at all; empty when it can."""
    peer = case.candidate.partition(",")[0]
    if peer in BASELINES and importlib.util.find_spec(peer) is None:
        return f"not installed: {BASELINES[peer][0]}"
    name = {"native": "native", "fused": "fused", "causal-conv1d": "conv"}.get(case.candidate)
    if name:
        found = {row.name: row for row in triton.backends(torch.device(settings.device), DTYPES[case.dtype])}[name]
        return "" if found.usable else f"{found.why}. To mend this: {found.mend}"
    return ""


def operations(case: Case, settings: Settings) -> float | None:
    """Of a job, counted as `bsmamba2.experiments.cost` does, for every contestant as if it were the chunked form."""
    config = ModelConfig.preset(settings.preset)
    frames, bands, d = _frames(case, config), len(config.freqs_per_bands), config.dim
    chunk = ssd.CHUNK if case.mode == BACKWARD else ssd.LONG_CHUNK
    if case.part == "model" and case.candidate not in BASELINES:
        forward = cost.forward_flops(config, frames, chunk)
        again = forward["time"] + forward["band"] if settings.gradient_checkpointing else 0.0
        return sum(forward.values()) + (case.mode == BACKWARD) * (cost.backward_flops(config, frames) + again)
    if case.part not in ("scan", "mixer"):
        return None
    sequences, length = settings.sequences, frames
    if case.part == "mixer":
        sequences, length = (bands, frames) if case.axis == "time" else (frames, bands)
    scan, scan_backward = cost.scan_flops(config, length, chunk), cost.scan_backward_flops(config, length)
    projections = 0.0 if case.part == "scan" else (cost.block_flops(config, length, chunk) - 4 * d * d) / 2 - scan
    return sequences * length * (projections + scan + (case.mode == BACKWARD) * (2 * projections + scan_backward))


def _frames(case: Case, config: ModelConfig) -> int:
    return round(case.seconds * config.sample_rate) // config.hop_length + 1


# --- jobs -------------------------------------------------------------------------------------------------

Job = Callable[[], Tensor | None]
"""Does the work once; what came out, for a comparison, or none."""


def prepare(case: Case, settings: Settings) -> Job:
    """Make weights and inputs; the same for every contestant of a group."""
    torch.manual_seed(0)
    config = ModelConfig.preset(settings.preset)
    device = torch.device(settings.device)
    if case.part == "loading":
        return _loading(case, config)
    if case.part == "loss":
        windows = WINDOWS if case.candidate == "five windows" else (2048, 1024, 512)
        signals = torch.randn(2, 1, config.channels, round(case.seconds * config.sample_rate), device=device)
        return _job(lambda x: bsmamba2_loss(x, signals[1], windows=windows), signals[0], [], case, device)
    if case.part == "model":
        mixture = torch.randn(1, config.channels, round(case.seconds * config.sample_rate), device=device)
        model = _model(case.candidate, config, settings.gradient_checkpointing).to(device)
        return _job(model, mixture, list(model.parameters()), case, device)
    if case.part == "separation":
        return _separation(case, config, device)
    if case.part == "mixer":
        frames, bands = _frames(case, config), len(config.freqs_per_bands)
        shape = (bands, frames, config.dim) if case.axis == "time" else (frames, bands, config.dim)
        x = torch.randn(shape, device=device)
        mixer = _mixer(case.candidate, config).to(device)
        whole = case.candidate.startswith("transformers")
        return _job(
            mixer if whole else functools.partial(block_by_block, mixer), x, list(mixer.parameters()), case, device
        )
    # Frames first in memory, as the mixer has them.
    narrow = DTYPES[case.dtype]
    h, p, n = config.heads, config.headdim, config.d_state
    xBC = torch.randn(_frames(case, config), settings.sequences, h * p + 2 * n, device=device).to(narrow)
    if case.part == "convolution":
        conv = nn.Conv1d(xBC.shape[2], xBC.shape[2], config.d_conv, groups=xBC.shape[2]).to(device, narrow)
        convolve = {"shifts": causal_conv_silu, "conv1d": _padded_conv1d, "causal-conv1d": triton.conv_silu}
        run = convolve[case.candidate]
        assert conv.bias is not None
        return _job(lambda x: run(x, conv.weight, conv.bias), xBC, list(conv.parameters()), case, device)
    dt = functional.softplus(torch.randn(xBC.shape[0], settings.sequences, h, device=device) - 3).transpose(0, 1)
    A, D = -torch.rand(h, device=device) * 15 - 1, torch.ones(h, device=device)
    scan = triton.choose(case.candidate.removesuffix(COMPILED))

    def scanned(xBC: Tensor) -> Tensor:
        x, B, C = (part.transpose(0, 1) for part in xBC.split((h * p, n, n), dim=-1))
        return scan(x.unflatten(-1, (h, p)), dt, A, B, C, D)

    return _job(scanned, xBC, [dt, A, D], case, device)


def _separation(case: Case, config: ModelConfig, device: torch.device) -> Job:
    """Separate a song of noise that comes in pieces of ten seconds and goes nowhere, in segments of eight."""
    peer = case.candidate in BASELINES
    model = _model(case.candidate if peer else "auto", config, gradient_checkpointing=False).to(device).eval()
    separator: Any = _Separator(model, config) if peer else model
    samples, piece = round(case.seconds * config.sample_rate), 10 * config.sample_rate
    noise = torch.randn(1, config.channels, piece)

    def separated() -> None:
        blocks = (noise[..., : min(piece, samples - i)] for i in range(0, samples, piece))
        way = STREAM_MODES.get(case.candidate, STREAM_MODES["end to end"])
        given = sum(done.shape[-1] for done in separate_stream(separator, blocks, dtype=DTYPES[case.dtype], **way))
        assert given == samples

    return separated


class _Separator(nn.Module):
    """Another model of one stem behind the interface that `separate_stream` knows."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, mixture: Tensor) -> Tensor:
        """(b, c, samples) → (b, 1, c, samples); zeros where it gives fewer."""
        y = self.model(mixture).view(len(mixture), 1, mixture.shape[1], -1)
        return functional.pad(y, (0, mixture.shape[-1] - y.shape[-1]))


def _job(run: Callable[[Tensor], Tensor], x: Tensor, others: Sequence[Tensor], case: Case, device: torch.device) -> Job:
    # Scan and convolution are given narrow tensors; whole modules narrow them themselves.
    narrow = case.dtype == "bfloat16" and case.part in ("mixer", "model")

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext()

    def forward() -> Tensor:
        with torch.inference_mode(), precision(), loops.compiled(_compiled(case.candidate)):
            return run(x)

    def backward() -> Tensor:
        with precision():
            y = run(x)
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        return y.detach()

    if case.mode == FORWARD:
        return forward
    leaves = [tensor.requires_grad_() for tensor in (x, *others)]
    return backward


def _mixer(candidate: str, config: ModelConfig) -> nn.Module:
    backend = candidate.removesuffix(COMPILED)
    peer = backend.startswith("transformers")
    mixer = Mamba2(
        config.dim,
        d_state=config.d_state,
        headdim=config.headdim,
        expand=config.expand,
        d_conv=config.d_conv,
        scan=triton.choose("chunked" if peer else backend),
    )
    if not peer:
        return mixer
    settings = importlib.import_module("transformers").Mamba2Config(
        hidden_size=config.dim,
        num_heads=config.heads,
        head_dim=config.headdim,
        expand=config.expand,
        state_size=config.d_state,
        conv_kernel=config.d_conv,
        n_groups=1,
        chunk_size=int(candidate.split()[-1]),
        num_hidden_layers=1,
    )
    peers = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    other = peers.Mamba2Mixer(settings, layer_idx=0)
    other.load_state_dict(mixer.state_dict())
    return other


def _model(candidate: str, config: ModelConfig, gradient_checkpointing: bool) -> nn.Module:
    if candidate == "bs_roformer":
        return importlib.import_module("bs_roformer").BSRoformer(
            dim=config.dim,
            depth=config.depth,
            stereo=config.channels == 2,
            num_stems=len(config.stems),
            time_transformer_depth=1,
            freq_transformer_depth=1,
            num_residual_streams=1,
            freqs_per_bands=config.freqs_per_bands,
            stft_hop_length=config.hop_length,
        )
    model = BSMamba2(config, scan=candidate.removesuffix(COMPILED))
    model.gradient_checkpointing = gradient_checkpointing
    return model


def _padded_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`causal_conv_silu` by PyTorch's own convolution, which wants the channels first."""
    width, _, taps = weight.shape
    channels_first = functional.pad(x.permute(1, 2, 0), (taps - 1, 0))
    return functional.silu(functional.conv1d(channels_first, weight, bias, groups=width)).permute(2, 0, 1)


def _loading(case: Case, config: ModelConfig) -> Job:
    """Draw examples of four stems each from two songs of noise, in 16-bit files or in memory."""
    samples = round(case.seconds * config.sample_rate)
    folder = tempfile.TemporaryDirectory()
    noise = np.random.default_rng(0)
    starts = range(0, 20 * config.sample_rate, config.sample_rate)
    windows: list[list[tuple[Any, int]]] = [[] for _ in range(4)]
    for song in range(2):
        paths = tuple(Path(folder.name) / f"{song}-{stem}.wav" for stem in range(4))
        shape = (samples + starts[-1], config.channels)
        for path in paths:
            soundfile.write(path, noise.integers(-3000, 3000, shape, dtype=np.int16), config.sample_rate)
        track: Any = FileTrack(f"song {song}", paths, config.sample_rate, shape[0])
        if case.candidate == "memory":
            track = _Held(track)
        for found in windows:
            found += [(track, start) for start in starts]
    workers = 2 if "ahead" in case.candidate else 0
    supply = iter(Loader(Remixer(windows, samples, 1), workers=workers))

    def draw() -> None:
        # The folder is there for as long as this function is.
        assert Path(folder.name).is_dir()
        for _ in range(EXAMPLES):
            next(supply)

    return draw


class _Held:
    """A track that was read before."""

    def __init__(self, track: FileTrack) -> None:
        self.name, self.sample_rate, self.samples, self.label = (
            track.name,
            track.sample_rate,
            track.samples,
            track.label,
        )
        self.stems = [track.read(stem, 0, track.samples) for stem in range(len(track.stems))]

    def read(self, stem: int, start: int, samples: int) -> Tensor:
        return self.stems[stem][:, start : start + samples]


# --- a trial in a process of its own ----------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """Largest memory of a process before the job, and at its end, in bytes; and how long the job took, in seconds."""

    before: int
    memory: int
    seconds: float


def trial(case: Case, settings: Settings) -> Trial | str:
    """Do the job once in a new process; its memory, or why it did not come to its end."""
    # A server that has imported torch and done nothing else makes such a process at once, where there is one.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_try, args=(case, settings, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        for seconds in (COMPILING, settings.limit):  # until it is ready, until it is done
            if not ours.poll(seconds):
                return f"more than {seconds:g} s"
            said = ours.recv()
            if said is not None:
                return said
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}: more memory than there is, most likely"
    finally:
        process.kill()
        process.join()
        ours.close()
    raise AssertionError("a trial says twice how it went")


def _try(case: Case, settings: Settings, threads: int, pipe: Connection) -> None:
    try:
        torch.set_num_threads(threads)
        job = prepare(case, settings)
        if case.candidate.endswith(COMPILED):
            job()
        before = _largest_memory(settings.device)
        if settings.device == "cpu" and sys.platform == "linux":
            _bound_memory(round(settings.memory * 1e9))
        pipe.send(None)
        seconds = seconds_of(job, torch.device(settings.device))
        pipe.send(Trial(before, _largest_memory(settings.device), seconds))
    except Exception as error:  # whatever it is, it is the answer
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        short = out_of_memory(error) and settings.device == "cpu"
        pipe.send(f"more than {settings.memory:g} GB" if short else told)


def _bound_memory(more: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def _largest_memory(device: str) -> int:
    """Of this process so far, in bytes."""
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


def _settle(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _give_back() -> None:
    """Let the system have what an allocator that keeps memory has kept, where it is the GNU C library's."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def seconds_of(job: Job, device: torch.device, calls: int = 1) -> float:
    """Mean time of a call."""
    _settle(device)
    started = time.perf_counter()
    for _ in range(calls):
        job()
    _settle(device)
    return (time.perf_counter() - started) / calls


class GemmPeak:
    """Operations a second of a square matrix product: the best of three, now."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device = (1536 if device.type == "cpu" else 8192), device
        self.a, self.b = torch.randn(2, self.size, self.size, device=device).to(dtype)
        self()

    def __call__(self) -> float:
        def product() -> None:
            torch.mm(self.a, self.b)

        return 2 * self.size**3 / min(seconds_of(product, self.device) for _ in range(3))


def measure(cases: Sequence[Case], settings: Settings) -> Iterator[Row | Skipped]:
    """Try every case of a group, then time those that passed in rounds."""
    device = torch.device(settings.device)
    _give_back()
    tried: list[tuple[Case, Trial | None]] = []
    for case in cases:  # all of them before this process itself grows
        why = obstacle(case, settings)
        found = why or (None if case.part == "loading" else trial(case, settings))
        if isinstance(found, str):
            yield Skipped(**dataclasses.asdict(case), why=found)
        else:
            tried.append((case, found))
    jobs: list[tuple[Case, Job | None, int, Trial | None, float | None]] = []
    first: Tensor | None = None
    for case, found in tried:
        if found and found.seconds > LONG and case.part == "separation":
            jobs.append((case, None, 1, found, None))
            continue
        job = prepare(case, settings)
        started = time.perf_counter()
        result = job()  # a warm-up, and what came out
        took = time.perf_counter() - started
        difference = None
        if result is not None and not (case.part == "loss" or case.candidate == "bs_roformer"):
            if first is None:
                first = result.double()
            difference = float((result.double() - first).norm() / first.norm())
        took = took if took > 20 * LEAST else seconds_of(job, device)
        calls = max(1, math.ceil(LEAST / max(took, 1e-6)))
        jobs.append((case, job, calls, found, difference))
        del result
    if not jobs:
        return
    peak = GemmPeak(device, DTYPES[cases[0].dtype])
    times: list[list[float]] = [[] for _ in jobs]
    peaks: list[list[float]] = [[] for _ in jobs]
    before = peak()
    for number in range(settings.repeats):
        for i, (_, again, calls, once, _) in enumerate(jobs):
            if again is None:
                if number == 0 and once:
                    times[i].append(once.seconds)
                    peaks[i].append(before)
                continue
            times[i].append(seconds_of(again, device, calls))
            after = peak()
            peaks[i].append((before + after) / 2)
            before = after
    config = ModelConfig.preset(settings.preset)
    for (case, _, _, memory, difference), run_times, run_peaks in zip(jobs, times, peaks, strict=True):
        loading = case.part == "loading"
        yield Row(
            **dataclasses.asdict(case),
            times=tuple(seconds / (EXAMPLES if loading else 1) for seconds in run_times),
            peaks=tuple(run_peaks),
            flops=operations(case, settings),
            units=1.0 if loading else float(_frames(case, config)),
            memory=memory.memory if memory else None,
            before=memory.before if memory else None,
            difference=difference,
        )


def run(settings: Settings) -> Iterator[Row | Skipped]:
    """All cases of all groups; what was too long or too large at one length is not tried at a greater one."""
    beyond: dict[tuple[str, ...], Skipped] = {}
    for group in groups(settings):
        tried = []
        for case in group:
            known = beyond.get(_without_length(case))
            if known is None:
                tried.append(case)
            else:
                why = known.why if known.why.startswith("at ") else f"at {known.seconds:g} s: {known.why}"
                yield Skipped(**dataclasses.asdict(case), why=why)
        for found in measure(tried, settings):
            if isinstance(found, Skipped):
                beyond[_without_length(found)] = found
            yield found


def _without_length(case: Case) -> tuple[str, ...]:
    return case.part, case.axis, case.dtype, case.mode, case.candidate


def load(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """What the benchmark notebook wrote: the rows, and the machine and day they are of.

    Raises:
        ValueError: when the file is not one of its own.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {field.name for field in dataclasses.fields(Row)}
        kept = [{name: value for name, value in row.items() if name in names} for row in content["rows"]]
        rows = [Row(**{**row, "times": tuple(row["times"]), "peaks": tuple(row["peaks"])}) for row in kept]
        return rows, content["machine"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by notebooks/benchmark.ipynb: {error!r}") from error


# --- tables -----------------------------------------------------------------------------------------------


def results_table(rows: Sequence[Row], part: str) -> list[dict[str, Any]]:
    """A line for each row of a part, each group's first contestant first."""
    unit = "examples/s" if part == "loading" else "frames/s"
    lines = []
    for row in rows:
        if row.part != part:
            continue
        low, high = row.quartiles
        first = next(one for one in rows if _job_of(one) == _job_of(row))
        lines.append(
            {
                "audio (s)": f"{row.seconds:g}",
                **({"axis": row.axis} if row.axis else {}),
                "type": row.dtype,
                "pass": row.mode,
                "candidate": row.candidate,
                "median (ms)": _milliseconds(row.median),
                "quartiles (ms)": f"{_milliseconds(low)} to {_milliseconds(high)}",
                "times the first": row.against(first),
                unit: f"{row.rate:,.0f}",
                "of the peak": None if row.fraction is None else f"{row.fraction:.0%}",
                "memory (GB)": None if row.memory is None else row.memory / 1e9,
                "difference": None if row.difference is None else f"{row.difference:.0e}",
            }
        )
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 1 else f"{1e3 * seconds:.3g}"


def _job_of(case: Case) -> tuple[Any, ...]:
    return case.part, case.axis, case.seconds, case.dtype, case.mode


def growth_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Time and memory at a length against those at a quarter of it (32 s against 8), where both were run.

    Memory is what the job took beyond that of before it; what is compiled has run once by then, so has none to tell.
    """
    lines = []
    for long in rows:
        for short in rows:
            if _without_length(short) == _without_length(long) and long.seconds == 4 * short.seconds:
                hidden = long.candidate.endswith(COMPILED)
                sizes = [None if hidden or one.memory is None or one.before is None else one.memory - one.before
                         for one in (long, short)]  # fmt: skip
                lines.append(
                    {
                        "part": " ".join(filter(None, (long.part, long.axis))),
                        "type": long.dtype,
                        "pass": long.mode,
                        "candidate": long.candidate,
                        "lengths": f"{long.seconds:g} s against {short.seconds:g} s",
                        "time": long.median / short.median,
                        "memory": sizes[0] / sizes[1] if sizes[0] and sizes[1] else None,
                    }
                )
    return lines


def loading_table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Examples a second that reading gives, beside those that a training step of one example takes."""
    lines = []
    for row in rows:
        if row.part != "loading":
            continue
        steps = [
            one.rate / one.units
            for one in rows
            if (one.part, one.seconds, one.mode) == ("model", row.seconds, BACKWARD)
            and one.candidate in ("chunked", "fused", "chunked" + COMPILED)
        ]
        fastest = max(steps, default=None)
        lines.append(
            {
                "example (s)": f"{row.seconds:g}",
                "read from": row.candidate,
                "read a second": row.rate,
                "taken a second": fastest if fastest is None else f"{fastest:.3f}",
                "keeps up": None if fastest is None else f"{row.rate / fastest:,.0f} times over",
            }
        )
    return lines


def claim_table(rows: Sequence[Row], dtype: str = "float32") -> list[dict[str, Any]]:
    """The earlier report's claim beside the nearest pair of rows: forward and backward, at the greatest length."""
    pairs = {
        "selective scan": ("scan", "recurrent", "chunked"),
        "causal convolution": ("convolution", "conv1d", "shifts"),
        "STFT loss": ("loss", "five windows", "three windows"),
        "data loading": ("loading", "files, when asked", "memory"),
        "one step": ("model", "recurrent", "chunked"),
    }
    lines = []
    for name, before, after in CLAIM:
        part, slow, fast = pairs.get(name, ("", "", ""))
        found: Mapping[float, tuple[Row, Row]] = {
            a.seconds: (a, b)
            for a, b in itertools.product(rows, rows)
            if _job_of(a) == _job_of(b) and (a.part, a.candidate, b.candidate) == (part, slow, fast)
            and a.dtype == dtype and (a.mode == BACKWARD or part == "loading")
        }  # fmt: skip
        a, b = found[max(found)] if found else (None, None)
        lines.append(
            {
                "part": name,
                "claimed, before (s)": before,
                "claimed, after (s)": after,
                "claimed factor": before / after,
                "measured here": None if a is None else f"{slow} → {fast}, {a.seconds:g} s",
                "before (s)": None if a is None else f"{a.median:.3g}",
                "after (s)": None if b is None else f"{b.median:.3g}",
                "factor": None if a is None or b is None else a.against(b),
            }
        )
    return lines


def machine() -> dict[str, Any]:
    """What the numbers were found on."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "allocator": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MALLOC_")},
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
