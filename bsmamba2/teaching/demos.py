"""Demos: compute the numbers and the sound for each slider of the page "Explore" and of the labs in `book/labs`.

The page calls each function for every setting in advance; the labs call it when a slider moves. Both therefore show
results of the library itself. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from timeit import timeit
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import metrics, ssd
from ..kernels.chunked import chunked
from ..model import BSMamba2
from ..separate import separate
from ..spectrogram import istft, stft
from ..synth import Song, synthesise

# --- bands ------------------------------------------------------------------------------------------------


def band_edges(widths: Sequence[int], sample_rate: int = 44_100) -> list[float]:
    """Band edges in hertz, one more than there are bands: band k reaches from edge k to edge k + 1.

    `widths` are the numbers of bins per band, from low to high; the last bin of the STFT is at half the sample rate.
    """
    spacing = sample_rate / 2 / (sum(widths) - 1)
    return [spacing * bins for bins in itertools.accumulate(widths, initial=0)]


def band_width_at(widths: Sequence[int], hertz: float, sample_rate: int = 44_100) -> float:
    """Width in hertz of the band that contains a frequency.

    Raises:
        ValueError: for a frequency outside all bands.
    """
    for low, high in itertools.pairwise(band_edges(widths, sample_rate)):
        if low <= hertz < high:
            return high - low
    raise ValueError(f"hertz={hertz!r} must lie in the bands, from 0 to half of sample_rate={sample_rate}")


def oracle_band_gain(song: Song, widths: Sequence[int], hop_length: int = 441) -> Tensor:
    """Oracle vocals with one gain per band and frame, (c, samples), to hear the detail lost inside the bands.

    Let m and s be the bins of the mixture and of the vocals in one band (`widths` in bins) and one frame, over both
    channels. The gain with the smallest error is g = Re⟨m, s⟩ / ⟨m, m⟩, clamped to [0, 1]. The model is not limited to
    one gain per band, because it estimates a separate mask value for every bin.
    """
    n_fft = 2 * (sum(widths) - 1)
    signals = song.mixture, song.vocals
    mixture, vocals = (stft(signal, n_fft, hop_length).split(list(widths), dim=1) for signal in signals)
    bands = []
    for m, s in zip(mixture, vocals, strict=True):
        gain = (m.conj() * s).real.sum((0, 1)) / m.abs().square().sum((0, 1)).clamp(min=1e-12)  # (t,)
        bands.append(gain.clamp(0, 1) * m)
    return istft(torch.cat(bands, dim=1), song.samples, n_fft, hop_length)


# --- chunks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkRun:
    """Cost of the chunked scan at one chunk length.

    Attributes:
        chunk: frames per chunk.
        scores, states: FLOPs of the products inside chunks, and of the products that write and read the states between
            chunks.
        levels: FLOPs of products that are repeated for heads whose decay within a chunk does not fit into one level.
        seconds: time of the fastest of several runs.
        memory: peak bytes of the tensors that the scan allocates, including its output but not its inputs.
    """

    chunk: int
    scores: int
    states: int
    levels: int
    seconds: float
    memory: int


def scan_inputs(
    sequences: int = 2, frames: int = 768, *, heads: int = 16, headdim: int = 64, d_state: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scan inputs x, dt, A, B, C, random except A (see `bsmamba2.ssd`); the default sizes are the published model's."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    x = draw(sequences, frames, heads, headdim)
    dt = draw(sequences, frames, heads).sigmoid() * 0.1
    A = -torch.linspace(1, 16, heads)
    return x, dt, A, draw(sequences, frames, d_state), draw(sequences, frames, d_state)


def chunk_runs(chunks: Sequence[int], inputs: tuple[Tensor, ...] | None = None, *, rounds: int = 3) -> list[ChunkRun]:
    """Measure `kernels.chunked` at several chunk lengths (frames): FLOPs and memory once, time in several rounds.

    Every round times all lengths in turn, so that a busy moment of the machine affects a whole round and not a single
    length. If `inputs` (x, dt, A, B, C) is None, `scan_inputs()` provides them.

    Raises:
        ValueError: for a chunk or rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1")
    x, dt, A, B, C = inputs or scan_inputs()
    (b, t, h, p), n = x.shape, B.shape[-1]
    scans = [partial(chunked, x, dt, A, B, C, chunk=chunk) for chunk in chunks]
    counted = []
    with torch.no_grad():
        for scan in scans:
            with peak_memory() as memory, FlopCounterMode(display=False) as counter:
                scan()
            counted.append((counter.get_total_flops(), memory()))
        times = [[timeit(scan, number=1) for scan in scans] for _ in range(rounds)]
    runs = []
    for chunk, (flops, bytes_), seconds in zip(chunks, counted, zip(*times, strict=True), strict=True):
        q = -(-t // -(-t // chunk))
        lengths = [min(q, t - start) for start in range(0, t, q)]
        scores = b * sum(2 * length**2 * (n + h * p) for length in lengths)
        states = b * 2 * n * h * p * (2 * t - lengths[0] - lengths[-1])  # first chunk reads none, last writes none
        runs.append(ChunkRun(chunk, scores, states, flops - scores - states, min(seconds), bytes_))
    return runs


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Measure the peak bytes of the tensors allocated inside the context; yields a function that returns the peak."""
    live: dict[int, int] = {}
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            given = {storage._cdata for storage in storages((args, kwargs))}
            result = func(*args, **(kwargs or {}))
            for storage in storages(result):
                if (key := storage._cdata) not in live and key not in given:
                    live[key] = storage.nbytes()
                    weakref.finalize(storage, live.pop, key, None)
            peak = max(peak, sum(live.values()))
            return result

    def storages(tree: Any) -> list[torch.UntypedStorage]:
        leaves = torch.utils._pytree.tree_leaves(tree)
        return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]

    with Watch():
        yield lambda: peak


# --- Δ and the decay --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateTrace:
    """Scalar state after each frame, and each frame's weight in the last state (a row of the decay matrix), (t,)."""

    state: Tensor
    weights: Tensor


def state_trace(written: Tensor, dt: Tensor, A: float) -> StateTrace:
    """Scan with a scalar state: h_t = exp(dt_t · A) · h_{t−1} + written_t.

    Each frame adds `written` (t,) to the state (dt · x in the scan's letters); `dt` (t,) is positive, A negative.

    Raises:
        ValueError: for shapes that differ, a step that is not positive or an A that is not negative.
    """
    if written.dim() != 1 or written.shape != dt.shape:
        raise ValueError(f"written {tuple(written.shape)} and dt {tuple(dt.shape)} must both be (t,)")
    if not bool((dt > 0).all()) or not A < 0:
        raise ValueError(f"dt must be positive (least: {float(dt.min())!r}) and A={A!r} negative")
    ones = torch.ones(1, len(dt), 1)
    x = (written / dt).float()[None, :, None, None]
    state = ssd.recurrent(x, dt.float()[None, :, None], torch.tensor([A]), ones, ones)[0, :, 0, 0]
    weights = ssd.decay_matrix((dt.double() * A).cumsum(0))[-1].float()
    return StateTrace(state, weights)


def note_and_pause(
    dt_sound: float, dt_pause: float, A: float, *, frames: int = 64, note: int = 4, pause: tuple[int, int] = (16, 48)
) -> StateTrace:
    """State trace of a one-frame note, which adds 1 in frame `note`, and a later pause (first frame, end) in the sound.

    Δ is `dt_pause` in the pause and `dt_sound` outside; A is negative.
    """
    dt = torch.full((frames,), dt_sound)
    dt[slice(*pause)] = dt_pause
    written = torch.zeros(frames)
    written[note] = 1
    return state_trace(written, dt, A)


# --- occupancy --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OccupancyRun:
    """A synthesised song, its separated vocals (c, samples) and their scores in dB.

    `usdr` is the score of the estimate, and `mixture_usdr` the score of the mixture itself. `leakage` is the relative
    level of `metrics.silence_leakage`; NaN if the song has no silent regions.
    """

    song: Song
    estimate: Tensor
    usdr: float
    mixture_usdr: float
    leakage: float


def at_occupancy(model: BSMamba2, occupancy: float, *, seed: int = 7, seconds: float = 4.0) -> OccupancyRun:
    """Synthesise a song with the given fraction of singing, and separate it; the model's first stem must be the vocals.

    With the same seed, the accompaniment is the same at every occupancy.

    Raises:
        ValueError: for an occupancy outside [0, 1] or fewer than 0.5 seconds.
    """
    song = synthesise(seed, seconds=seconds, occupancy=occupancy, sample_rate=model.config.sample_rate)
    estimate = separate(model, song.mixture, segment=seconds)[0]
    usdr, mixture_usdr = (metrics.usdr(song.vocals, signal) for signal in (estimate, song.mixture))
    leakage = metrics.silence_leakage(song.vocals, estimate, song.mixture, song.sample_rate)
    return OccupancyRun(song, estimate, usdr, mixture_usdr, leakage.relative)
