"""What a slider shows: for one setting, the numbers and the sound that the module's own parts give.

Each function is the inside of one control. The page "Explore" asks it for every setting beforehand and the labs in
`book/labs` ask while a slider moves, so that both show what the module does. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .. import metrics, ssd
from ..config import ModelConfig
from ..data import Remixer
from ..dual_path import BidirectionalBlock, SequenceLayer
from ..losses import WINDOWS, bsmamba2_loss
from ..model import BSMamba2
from ..separate import separate
from ..spectrogram import istft, stft
from ..synth.songs import Song, songs, synthesise
from ..train import TrainConfig, learning_rate, parameter_groups

# --- bands ------------------------------------------------------------------------------------------------


def band_edges(widths: Sequence[int], sample_rate: int = 44_100) -> list[float]:
    """Where bands begin and end on a hertz axis.

    Args:
        widths: bins in each band, low to high; of an STFT whose last bin lies at half the sample rate.
        sample_rate: in hertz.

    Returns:
        One more edge than there are bands, in hertz; band k reaches from edge k to edge k + 1.
    """
    spacing = sample_rate / 2 / (sum(widths) - 1)
    return [spacing * bins for bins in itertools.accumulate(widths, initial=0)]


def band_width_at(widths: Sequence[int], hertz: float, sample_rate: int = 44_100) -> float:
    """The width of the band that a frequency lies in, in hertz.

    Raises:
        ValueError: for a frequency that no band covers.
    """
    for low, high in itertools.pairwise(band_edges(widths, sample_rate)):
        if low <= hertz < high:
            return high - low
    raise ValueError(f"hertz={hertz!r} must lie in the bands, from 0 to half of sample_rate={sample_rate}")


def oracle_band_gain(song: Song, widths: Sequence[int], hop_length: int = 441) -> Tensor:
    """The vocals that the best gain for every band and frame gives: what is lost inside a band is heard.

    With m and s the mixture's and the vocals' bins of a band in one frame, both channels together, the gain that
    leaves the smallest error is g = Re⟨m, s⟩ / ⟨m, m⟩, here held in [0, 1]. The model is not bound to this: it gives
    every bin a mask of its own.

    Args:
        song: what to separate.
        widths: bins in each band, low to high.
        hop_length: samples between frames.

    Returns:
        (c, samples).
    """
    n_fft = 2 * (sum(widths) - 1)
    mixture, vocals = stft(song.mixture, n_fft, hop_length), stft(song.vocals, n_fft, hop_length)
    product, power = (mixture.conj() * vocals).real, mixture.abs().square()
    parts = []
    for m, over, under in zip(*(part.split(list(widths), dim=1) for part in (mixture, product, power)), strict=True):
        gain = over.sum((0, 1)) / under.sum((0, 1)).clamp(min=1e-12)  # (t,)
        parts.append(gain.clamp(0, 1) * m)
    return istft(torch.cat(parts, dim=1), song.samples, n_fft, hop_length)


# --- chunks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkRun:
    """What a chunked scan took with chunks of one length.

    Attributes:
        chunk: frames in a chunk.
        scores: floating-point operations of the products inside chunks.
        states: floating-point operations of the products that make and read the states between them.
        seconds: the shortest of some runs.
        memory: the most that its tensors took at one time, its output among them and its inputs not, in bytes.
    """

    chunk: int
    scores: int
    states: int
    seconds: float
    memory: int


def scan_inputs(
    sequences: int = 2, frames: int = 768, *, heads: int = 16, headdim: int = 64, state: int = 128, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random x, dt, A, B, C for a scan (see `bsmamba2.ssd`); the widths are the published model's."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    x = draw(sequences, frames, heads, headdim)
    dt = draw(sequences, frames, heads).sigmoid() * 0.1
    A = -torch.linspace(1, 16, heads)
    return x, dt, A, draw(sequences, frames, state), draw(sequences, frames, state)


def chunk_runs(chunks: Sequence[int], inputs: tuple[Tensor, ...] | None = None, *, rounds: int = 3) -> list[ChunkRun]:
    """Scan once with each chunk length, counted, and some more times by the clock.

    The lengths take turns, so that a busy moment of the machine spoils a round and not one of them.

    Args:
        chunks: frames in a chunk.
        inputs: x, dt, A, B, C of the scan; `scan_inputs()` when absent.
        rounds: runs by the clock, at least 1.

    Raises:
        ValueError: for a chunk or rounds below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds!r} must be at least 1")
    x, dt, A, B, C = inputs or scan_inputs()
    (b, t, h, p), n = x.shape, B.shape[-1]
    counted = []
    with torch.no_grad():
        for chunk in chunks:
            with largest_memory() as memory, FlopCounterMode(display=False) as counter:
                ssd.chunked(x, dt, A, B, C, chunk=chunk)
            q = -(-t // -(-t // chunk))
            lengths = [min(q, t - start) for start in range(0, t, q)]
            scores = b * sum(2 * length**2 * (n + h * p) for length in lengths)
            counted.append((chunk, scores, counter.get_total_flops() - scores, memory()))
        times = [
            [_seconds(partial(ssd.chunked, x, dt, A, B, C, chunk=chunk)) for chunk in chunks] for _ in range(rounds)
        ]
    return [
        ChunkRun(chunk, scores, states, min(own), memory)
        for (chunk, scores, states, memory), own in zip(counted, zip(*times, strict=True), strict=True)
    ]


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@contextmanager
def largest_memory() -> Iterator[Callable[[], int]]:
    """Count the bytes of the tensors made inside; the function it gives tells the most that lived at one time."""
    live: dict[int, int] = {}
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            given = {part.untyped_storage()._cdata for part in _tensors((args, kwargs))}
            result = func(*args, **(kwargs or {}))
            for part in _tensors(result):
                storage = part.untyped_storage()
                key = storage._cdata
                if key not in live and key not in given:
                    live[key] = storage.nbytes()
                    weakref.finalize(storage, live.pop, key, None)
            most = max(most, sum(live.values()))
            return result

    with Watch():
        yield lambda: most


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- Δ and the decay --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """A state of one number, over t frames.

    Attributes:
        state: after each frame, (t,).
        row: what each frame still counts for in the last one, a row of the decay matrix, (t,).
    """

    state: Tensor
    row: Tensor


def memory(written: Tensor, dt: Tensor, A: float) -> Memory:
    """Write into a state of one number and watch it fade: h_t = exp(dt_t · A) · h_{t−1} + written_t.

    Args:
        written: what each frame adds to the state, dt · x in the scan's letters, (t,).
        dt: step of each frame, positive, (t,).
        A: negative.

    Raises:
        ValueError: for shapes that differ, a step that is not positive or an A that is not negative.
    """
    if written.dim() != 1 or written.shape != dt.shape:
        raise ValueError(f"written {tuple(written.shape)} and dt {tuple(dt.shape)} must both be (t,)")
    if not bool((dt > 0).all()) or not A < 0:
        raise ValueError(f"dt must be positive (least: {float(dt.min())!r}) and A={A!r} negative")
    ones = torch.ones(1, len(dt), 1)
    rate = torch.tensor([A])
    x = (written / dt).float()[None, :, None, None]
    state = ssd.recurrent(x, dt.float()[None, :, None], rate, ones, ones)[0, :, 0, 0]
    row = ssd.decay_matrix((dt.double() * A).cumsum(0))[-1].float()
    return Memory(state, row)


def memory_over_a_rest(
    dt_sound: float, dt_rest: float, A: float, *, frames: int = 64, note: int = 4, rest: tuple[int, int] = (16, 48)
) -> Memory:
    """A note of one frame, sound, then a rest, then sound again; Δ has one value in sound and one in the rest.

    Args:
        dt_sound: step outside the rest.
        dt_rest: step in the rest.
        A: negative.
        frames: t.
        note: the frame that adds 1 to the state.
        rest: its first frame, and the first after it.
    """
    dt = torch.full((frames,), dt_sound)
    dt[slice(*rest)] = dt_rest
    written = torch.zeros(frames)
    written[note] = 1
    return memory(written, dt, A)


# --- occupancy --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Separated:
    """A song, what a model makes of it, and how good that is.

    Attributes:
        song: the song.
        estimate: the vocals, (c, samples).
        usdr: of the estimate, in dB; energy of the voice over energy of the error.
        untouched: uSDR of the mixture itself, in dB.
        leak: what is let through where nobody sings, in dB relative to the mixture there; NaN where nobody rests.
    """

    song: Song
    estimate: Tensor
    usdr: float
    untouched: float
    leak: float


def at_occupancy(model: BSMamba2, occupancy: float, *, seed: int = 7, seconds: float = 4.0) -> Separated:
    """Synthesise a song with that much singing and separate it.

    Args:
        model: its first stem is taken for the vocals.
        occupancy: share of the time that is sung, 0 to 1; the same seed keeps its band.
        seed: of the song.
        seconds: its length.

    Raises:
        ValueError: for an occupancy outside [0, 1] or fewer than 0.5 seconds.
    """
    song = synthesise(seed, seconds=seconds, occupancy=occupancy, sample_rate=model.config.sample_rate)
    estimate = separate(model, song.mixture, segment=seconds)[0]
    return Separated(
        song,
        estimate,
        metrics.usdr(song.vocals, estimate),
        metrics.usdr(song.vocals, song.mixture),
        metrics.leak(song.vocals, estimate, song.mixture, song.sample_rate).relative,
    )


# --- ablation ---------------------------------------------------------------------------------------------

SEQUENCE_LAYERS = ("Mamba-2", "LSTM")
DIRECTIONS = ("both", "forwards only")
LOSSES = ("whole", "without the waveform", "without the spectra")

TINY = ModelConfig(
    dim=32, depth=1, freqs_per_bands=(4,) * 16 + (8,) * 8 + (16, 16, 33, 64), n_fft=512, hop_length=256, sample_rate=16_000,
    d_state=16, headdim=16, expand=2,
)  # fmt: skip
"""Small enough to learn something within seconds: 16 kHz, 28 bands of 257 bins, 16 ms a frame."""


class LSTM(nn.LSTM):
    """An LSTM with the shape of a sequence layer: (b, length, d) → (b, length, d)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(b, length, d) → (b, length, d)."""
        return super().forward(x)[0]


def ablated_model(sequence_layer: str = "Mamba-2", directions: str = "both", config: ModelConfig = TINY) -> BSMamba2:
    """A model with its sequence layer exchanged, or without the layers that read backwards.

    Args:
        sequence_layer: one of `SEQUENCE_LAYERS`.
        directions: one of `DIRECTIONS`; without the backward layers, their half of each block hands on its input.
        config: of the model.

    Raises:
        ValueError: for a name that is not listed.
    """
    _listed("sequence_layer", sequence_layer, SEQUENCE_LAYERS)
    _listed("directions", directions, DIRECTIONS)
    layer: SequenceLayer | None = None
    if sequence_layer == "LSTM":
        layer = partial(LSTM, config.dim, config.dim, batch_first=True)
    model = BSMamba2(config, sequence_layer=layer)
    if directions == "forwards only":
        for block in model.modules():
            if isinstance(block, BidirectionalBlock):
                block.set_submodule("backwards", nn.Identity())
    return model


@dataclass(frozen=True)
class Ablation:
    """What an ablated model learned.

    Attributes:
        sequence_layer, directions, loss: what it was made of and taught by.
        parameters: numbers that it learned.
        steps: how often it was corrected.
        seconds: of training, the songs not counted.
        usdr: in dB, over unseen songs; silence has 0 dB.
    """

    sequence_layer: str
    directions: str
    loss: str
    parameters: int
    steps: int
    seconds: float
    usdr: float


def ablate(
    sequence_layer: str = "Mamba-2",
    directions: str = "both",
    loss: str = "whole",
    *,
    steps: int = 60,
    seed: int = 0,
    config: ModelConfig = TINY,
) -> Ablation:
    """Train a small model for some steps on synthesised songs, and score it on others; the same songs every time.

    Args:
        sequence_layer: one of `SEQUENCE_LAYERS`.
        directions: one of `DIRECTIONS`.
        loss: one of `LOSSES`: the published loss, or one of its two terms alone.
        steps: of the optimiser, at least 1.
        seed: of the weights and the order of the examples.
        config: of the model.

    Raises:
        ValueError: for a name that is not listed, or fewer than one step.
    """
    _listed("loss", loss, LOSSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ablated_model(sequence_layer, directions, config)
    train_on = songs(8, seed=1, seconds=3.0, sample_rate=config.sample_rate)
    unseen = [
        song for song in songs(6, seed=1_000_001, seconds=3.0, sample_rate=config.sample_rate) if song.vocal_segments
    ]
    schedule = TrainConfig(steps=steps, lr=4e-3, schedule="cosine")
    optimiser = torch.optim.AdamW(parameter_groups(model, schedule.weight_decay))
    batches = iter(Remixer(train_on, config.sample_rate, 4, seed=seed))
    model.train()
    started = time.perf_counter()
    for number in range(1, steps + 1):
        mixture, target, *_ = next(batches)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(number, schedule)
        optimiser.zero_grad()
        _loss(model(mixture)[:, 0], target, loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
        optimiser.step()
    model.eval()
    seconds = time.perf_counter() - started
    scores = [metrics.usdr(song.vocals, separate(model, song.mixture)[0]) for song in unseen]
    return Ablation(
        sequence_layer,
        directions,
        loss,
        sum(part.numel() for part in model.parameters()),
        steps,
        seconds,
        sum(scores) / len(scores),
    )


def _loss(estimate: Tensor, target: Tensor, terms: str) -> Tensor:
    """The published loss or one of its terms, with a third of its frames, which costs a third."""
    if terms == "without the spectra":
        return bsmamba2_loss(estimate, target, windows=())
    weight = 0.0 if terms == "without the waveform" else 10.0
    return bsmamba2_loss(estimate, target, windows=WINDOWS[1:], hop_length=441, time_weight=weight)


def _listed(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, choices))}")
