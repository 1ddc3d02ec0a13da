"""Automatic grading of the book's exercises: a check takes the reader's function and returns a `CheckResult`.

A check tests the function's results, not how it is written. It tests the simplest property first, and reports the
first failure with a hint at its cause.

Book: "What a port must prove". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import math
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import sleep
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from .. import ssd
from ..config import ModelConfig
from ..mamba2 import Mamba2

P = ParamSpec("P")
RATE, N_FFT = 44_100, 2048


@dataclass(frozen=True)
class CheckResult:
    """Result of a check: true if the answer passed, with a message that a notebook prints."""

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return textwrap.fill(("right: " if self.passed else "not yet: ") + self.message, 88)


def grade(
    detects: Callable[[Any], object], *, right: Mapping[str, Any], faulty: Mapping[str, Any], hint: str = ""
) -> CheckResult:
    """Mutation testing of a reader's test: it must pass every right version and detect every faulty one.

    Args:
        detects: the reader's test, which returns whether a candidate is faulty. An `AssertionError` counts as yes. None
            counts as no, because a test made of assertions returns it when all of them hold.
        right, faulty: name → a version without a fault, or with one. Several right versions catch a test that
            demands too much.
        hint: printed when a faulty version passes.
    """
    for name, candidate in {**faulty, **right}.items():
        try:
            detected = bool(detects(candidate))
        except AssertionError:
            detected = True
        except Exception as error:  # the reader's code may raise anything
            return CheckResult(False, f"on the version «{name}» your test itself stopped: {_describe(error)}")
        if name in faulty and not detected:
            return CheckResult(False, f"your test lets a faulty version through: «{name}». {hint}".rstrip())
        if name in right and detected:
            why = "Does it ask for equality where only rounding differs, or for something that need not hold?"
            return CheckResult(False, f"your test calls a right version faulty: «{name}». {why}")
    return CheckResult(True, f"caught {', '.join(f'«{name}»' for name in faulty)}; let pass {len(right)} right")


def needs_own_clock(speedup: Callable[..., float]) -> Callable[..., float]:
    """Wrap a benchmark (old, new, clock) → number so that it raises ValueError for a clock that runs by itself."""

    def checked(old: Callable[[], Any], new: Callable[[], Any], clock: Callable[[], float]) -> float:
        start, at_once = clock(), clock()
        sleep(0.05)
        if (clock() - at_once) - (at_once - start) > 0.02:  # the reader's own clock may tick at every call
            raise ValueError("the clock is a real one, whose times differ in every run. Build your own")
        return speedup(old, new, clock)

    return checked


def _check(complaints: Callable[P, Iterator[str]]) -> Callable[P, CheckResult]:
    """Decorator: a generator of complaints becomes a check that reports the first one, or the exception raised."""

    def check(*args: P.args, **kwargs: P.kwargs) -> CheckResult:
        try:
            complaint = next(complaints(*args, **kwargs), None)
        except Exception as error:  # the reader's code may raise anything
            complaint = f"it stopped with {_describe(error)}"
        return CheckResult(complaint is None, complaint or "every question was answered as it should be")

    check.__name__, check.__doc__ = complaints.__name__, complaints.__doc__
    check.__annotations__ = complaints.__annotations__ | {"return": "CheckResult"}
    return check


def _describe(error: Exception) -> str:
    """Type, message and line of an exception; the line is the innermost one outside this file and libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one for one in frames if one.filename != __file__ and "site-packages" not in one.filename][-1:]
    return f"{type(error).__name__}: {error}" + "".join(f" (line {one.lineno} of {one.name})" for one in own)


def _require_answer(answer: object) -> Iterator[str]:
    if answer is None:
        yield "it returns None. Write its body, and end it with `return`"


def _require_shape(answer: object, shape: tuple[int, ...], axes: str) -> Iterator[str]:
    yield from _require_answer(answer)
    if not isinstance(answer, Tensor):
        yield f"it returns a {type(answer).__name__}; it should be a tensor {axes}"
    elif tuple(answer.shape) != shape:
        yield f"it returns the shape {tuple(answer.shape)}; {axes} is {shape} here"


def _close(x: Tensor, y: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is a small fraction of the largest value."""
    return bool((x - y).abs().max() <= tolerance * y.abs().max().clamp(min=1e-12))


@_check
def check_best_gain(best_gain: Callable[[Tensor, Tensor], Any]) -> Iterator[str]:
    """`best_gain(voice, mixture)`: two (c, samples) → the gain g that brings g · mixture closest to the voice."""
    draw = torch.Generator().manual_seed(0)
    voice, backing = torch.randn(2, 2, 1000, generator=draw)
    for mixture in (voice + 2 * backing, 3 * voice, 0.5 * backing - voice):
        answer = best_gain(voice.clone(), mixture.clone())
        yield from _require_answer(answer)
        g, (s, m) = float(answer), (voice.double(), mixture.double())
        best = float((s * m).sum() / m.square().sum())
        if abs(g * best - 1) < 1e-3 < abs(g - best):
            yield "that is the gain from the voice to the mixture; it is wanted the other way round"
        if best < 0 <= g:
            yield f"g = {g:.3g}, but this mixture holds the voice turned round (times −1): the best gain is negative"
        if abs(g - best) > 1e-3:
            errors = [float((s - gain * m).square().sum()) for gain in (g, best)]
            yield f"g = {g:.3g} leaves an error of {errors[0]:.5g}, and another number one of {errors[1]:.5g}"
    g = float(best_gain(voice.clone(), torch.zeros_like(voice)))
    if not math.isfinite(g):
        yield f"for a silent mixture it returns {g}: any number will do there, but it must be a number"


@_check
def check_muffle(muffle: Callable[[Tensor, float], Any]) -> Iterator[str]:
    """`muffle(audio, cutoff)`: (c, samples) → (c, samples) without frequencies above `cutoff` hertz."""
    time = torch.arange(RATE) / RATE
    tones = {hertz: torch.sin(2 * torch.pi * hertz * time) for hertz in (200, 991, 1012, 3000, 9000)}
    audio = torch.stack([tones[200] + tones[3000] + tones[9000], tones[200]])  # (2, samples)
    passed = audio.clone()
    out = muffle(passed, 1000)
    yield from _require_shape(out, tuple(audio.shape), "(c, samples)")
    if out.is_complex():
        yield "it returns complex numbers, a spectrogram. Use `istft` to get audio"
    if not torch.equal(passed, audio):
        yield "it changed the audio that it was given; work on a copy"
    left = {hertz: _amplitude(out[0], hertz) for hertz in (200, 3000, 9000)}
    if left[9000] > 0.9 and left[200] < 0.1:
        yield "it keeps what lies above the cutoff and takes the rest away: the other way round"
    powers = [float(part.square().mean()) for part in (out[1, 4096:12_288], out[1, -12_288:-4096])]  # 0.5 each
    if max(powers) > 0.1 and min(powers) < 0.1 * max(powers):
        yield "a steady tone is cut off in time: the mask lies along the frames, the last axis; bins come before them"
    if left[9000] > 0.1 or left[3000] > 0.1:
        yield (
            f"after muffle(audio, 1000) a tone of 3,000 Hz has {left[3000]:.0%} of its height left, one of 9,000 Hz "
            f"{left[9000]:.0%}. Bin f stands for f · 44100 / 2048 Hz: is the cutoff compared with hertz or with bins?"
        )
    if left[200] < 0.9:
        yield f"after muffle(audio, 1000) only {left[200]:.0%} of a tone of 200 Hz is left, and all of it should be"
    edge = {hertz: _amplitude(muffle(tones[hertz].repeat(2, 1), 1000)[0], hertz) for hertz in (991, 1012)}
    if edge[991] < 0.4:  # 0.75 of a tone is left if its bin is the last one kept, 0.25 if the bin below is
        fix = "int() rounds down, and a slice ends one before its end"
        yield f"muffle(audio, 1000) drops bin 46, at 991 Hz; 47, at 1,012 Hz, is the first to drop: {fix}"
    if edge[1012] > 0.6:
        yield "muffle(audio, 1000) keeps bin 47, at 1,012 Hz; 46, at 991 Hz, is the last below the cutoff"
    if _amplitude(muffle(audio, 4000)[0], 3000) < 0.9:
        yield "a tone of 3,000 Hz does not survive muffle(audio, 4000): does the result depend on `cutoff`?"
    if _amplitude(out[1], 9000) > 0.01:
        yield "the second channel holds what was in the first: keep them apart"


def _amplitude(signal: Tensor, hertz: float) -> float:
    """Amplitude of one tone in one second of sound, without the first and the last tenth of a second."""
    time = torch.arange(RATE // 10, RATE - RATE // 10) / RATE
    wave = torch.exp(-2j * torch.pi * hertz * time)
    return float((signal[RATE // 10 : RATE - RATE // 10] * wave).mean().abs() * 2)


@_check
def check_mel_bands(mel_bands: Callable[[int], Any]) -> Iterator[str]:
    """`mel_bands(count)`: bins in each of `count` bands of equal mel width; 1,025 in all, at least two per band."""
    for count in (8, 32, 48, 62, 512):
        bands = mel_bands(count)
        yield from _require_answer(bands)
        if not isinstance(bands, Sequence) or not all(isinstance(width, int) for width in bands):
            yield f"mel_bands({count}) should give a tuple of whole numbers, the bins in each band"
        if len(bands) != count:
            yield f"mel_bands({count}) returns {len(bands)} bands. There is one more edge than bands"
        if sum(bands) != 1025:
            ends = "The first edge is 0, the last one 1,025: one past the last bin"
            yield f"the bands of mel_bands({count}) hold {sum(bands):,} bins and not 1,025. {ends}"
        if min(bands) < 2:
            fix = "Where the scale asks for less than two, move the edge up, and leave room for the bands that follow"
            yield f"mel_bands({count}) has a band of {min(bands)} bins. {fix}"
    if max(mel_bands(8)) - min(mel_bands(8)) < 10:
        yield "the bands of mel_bands(8) are equally wide in hertz; they should be so in mels"
    top = 2595 * math.log10(1 + 1024 * RATE / N_FFT / 700)
    expected = [700 * (10 ** (top * i / 8 / 2595) - 1) * N_FFT / RATE for i in range(1, 8)]
    edges = list(itertools.accumulate(mel_bands(8)))[:7]
    if any(abs(edge - wanted) > 1 for edge, wanted in zip(edges, expected, strict=True)):
        yield (
            f"the inner edges of mel_bands(8) are at the bins {edges}; equal steps in mels are at "
            f"{[round(wanted) for wanted in expected]}. From mels back to hertz: 700 · (10^(m / 2595) − 1)"
        )


@_check
def check_both_ways(both_ways: Callable[..., Any]) -> Iterator[str]:
    """`both_ways(x, dt, A, B, C)`: a scan in both directions, in which every frame counts itself only once."""
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b, t, h, p, n = 2, 12, 2, 3, 4
    x, dt, A, B, C = random(b, t, h, p), random(b, t, h).abs(), -random(h).abs(), random(b, t, n), random(b, t, n)
    out = both_ways(x, dt, A, B, C)
    yield from _require_shape(out, (b, t, h, p), "(b, t, h, p)")
    ahead, back = ssd.recurrent(x, dt, A, B, C), ssd.recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1)).flip(1)
    own = torch.einsum("bin,bin,bih,bihp->bihp", C, B, dt, x)
    if _close(out, ahead + back - own):
        return
    known = {
        "the frame itself is counted twice, once from each side: take it away once": ahead + back,
        "this is the scan from the left alone: nothing comes from the right": ahead,
        "the scan from the right is not turned back: flip its result too": ahead + back.flip(1) - own,
    }
    for complaint, wrong in known.items():
        if _close(out, wrong):
            yield complaint
    far = (out - ahead - back + own).abs().amax((0, 2, 3))
    yield (
        f"frame 0 is off by {float(far[0]):.1e}, the last frame by {float(far[-1]):.1e}. For the scan from the right, "
        "flip x, dt, B and C along the frames, and its result back"
    )


@_check
def check_step(step: Callable[..., Any], mixer: Mamba2) -> Iterator[str]:
    """`step(frame, state)`: one frame (b, d) → (b, d) and the new state (scan state, last three frames of xBC)."""
    b, d = 2, mixer.in_proj.in_features
    u = torch.randn(b, 8, d, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, final = mixer.step(u)
        state: Any = torch.zeros_like(final.ssm_state), torch.zeros_like(final.conv_state)
        frames = []
        for i in range(u.shape[1]):
            answer = step(u[:, i], state)
            yield from _require_answer(answer)
            if not isinstance(answer, tuple) or len(answer) != 2:
                yield "it should give two things: the output (b, d), and the state after the frame"
            frame, state = answer
            yield from _require_shape(frame, (b, d), "(b, d)")
            frames.append(frame)
        faulty = {complaint: _faulty_outputs(mixer, u, complaint) for complaint in STEP_FAULTS}
    equal = [_close(frame, expected[:, i], 1e-3) for i, frame in enumerate(frames)]
    for complaint, outputs in faulty.items():
        if not all(equal) and _close(torch.stack(frames, 1), outputs, 1e-3):
            yield complaint
    if not equal[0]:
        yield "the very first frame differs. There the state is zero: compare z, xBC, Δ, y step by step"
    if not all(equal):
        yield (
            f"frame {equal.index(False)} is the first that differs, so something of the past is not passed on: "
            "the scan's state, or the last three frames that went into the convolution (before SiLU)"
        )
    if not _close(state[0], final.ssm_state, 1e-3):
        yield "the outputs are right; the first part of the state should be the scan's state, (b, h, p, n)"
    if not _close(state[1], final.conv_state, 1e-3):
        yield "the outputs are right; the second part of the state should be the last three frames of xBC, (b, 3, w)"


STEP_FAULTS = (
    "y lacks D · x: a head's input also goes past the state, times D",
    "xBC lacks the bias of the convolution: add it before SiLU",
    "the taps of the convolution are in the wrong order: the last one weighs the new frame",
    "y is read before the state is written: the new frame goes into the state first, then C reads it",
    "the norm comes before the gate: multiply y by SiLU(z) first, then normalise",
    "y lacks the gate: multiply it by SiLU(z) before the norm",
    "Δ lacks its bias: add `dt_bias` before softplus",
)


def _faulty_outputs(mixer: Mamba2, u: Tensor, fault: str) -> Tensor:
    """The mixer's outputs (b, t, d) for u (b, t, d), frame by frame, with one of the `STEP_FAULTS`."""
    no_skip, no_bias, order, early, late_gate, no_gate, no_dt_bias = (fault == known for known in STEP_FAULTS)
    z, xBC, dt = mixer.in_proj(u).split(mixer.proj_sizes, dim=-1)
    taps = mixer.conv1d.weight[:, 0].flip(1) if order else mixer.conv1d.weight[:, 0]  # (w, 4)
    windows = nn.functional.pad(xBC, (0, 0, taps.shape[1] - 1, 0)).unfold(1, taps.shape[1], 1)  # (b, t, w, 4)
    xBC = nn.functional.silu((windows * taps).sum(-1) + (0 if no_bias else mixer.get_parameter("conv1d.bias")))
    x, B, C = xBC.split(mixer.conv_sizes, dim=-1)
    x = x.unflatten(-1, (-1, mixer.headdim))  # (b, t, h, p)
    dt = nn.functional.softplus(dt if no_dt_bias else dt + mixer.dt_bias)  # (b, t, h)
    A, gate = -mixer.A_log.exp(), nn.functional.silu(z)
    if early:  # C of a frame reads the state of the previous frame
        y = ssd.recurrent(x[:, :-1], dt[:, :-1], A, B[:, :-1], C[:, 1:])
        y = nn.functional.pad(y, (0, 0, 0, 0, 1, 0))
    else:
        y = ssd.recurrent(x, dt, A, B, C)
    y = (y if no_skip else y + mixer.D[:, None] * x).flatten(2)
    return mixer.out_proj(mixer.norm(y) * gate if late_gate else mixer.norm(y if no_gate else y * gate))


@_check
def check_live_dual_path(live: Callable[..., nn.Module]) -> Iterator[str]:
    """`LiveDualPath(dim, sequence_layer)`: (b, t, k, d) → (b, t, k, d), causal in time, bidirectional along bands."""
    if isinstance(live, type) and "forward" not in vars(live):
        yield "it has no `forward` yet"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = live(16, partial(Mamba2, 16, d_state=16, headdim=16)).double()
    b, t, k, d = 2, 12, 6, 16
    x = torch.randn(b, t, k, d, generator=torch.Generator().manual_seed(0)).double()
    touched = x.clone()
    touched[0, 6, 2] += 1
    with torch.no_grad():
        out = layer(x)
        yield from _require_shape(out, (b, t, k, d), "(b, t, k, d)")
        moved = (layer(touched) - out).abs().amax(-1) > 0  # (b, t, k)
    if moved[1].any():
        yield "touching a cell of the first song changes the second: `b` went into the sequences in the wrong order"
    if moved[0, :6].any():
        yield "touching frame 6 changes a frame before it: along time, one direction only, and the past"
    if not moved[0, 6].all():
        yield "touching one band of frame 6 does not reach all bands of frame 6: along bands, both directions"
    if not moved[0, 7:].any():
        yield "touching frame 6 changes no later frame: along time, nothing is remembered"
    if not moved[0, 6:].all():
        yield "some later cells do not depend on frame 6: first along time, then bands. Is a transpose missing?"


class _Lopsided(nn.Module):
    """A model that treats left and right differently: (b, 2, samples) → (b, 1, 2, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig.preset("small")
        self.gain = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, mixture: Tensor) -> Tensor:
        return (mixture * self.gain[:, None])[:, None]


@_check
def check_both_sides(both_sides: Callable[..., Any]) -> Iterator[str]:
    """`both_sides(model, mixture)`: the estimate (c, samples), the estimate from swapped channels, and their mean."""
    mixture = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = both_sides(_Lopsided(), mixture)
    yield from _require_answer(out)
    if not isinstance(out, tuple | list) or len(out) != 3:
        yield "it should give three estimates: as it is, by way of the mirror, and their mean"
    for name, estimate in zip(("first", "second", "third"), out, strict=True):
        for complaint in _require_shape(estimate, (2, RATE), "(c, samples)"):
            yield f"the {name} estimate: {complaint}. `separate` returns (stem, c, samples)"
    plain, mirrored, mean = (mixture * torch.tensor(gains)[:, None] for gains in ((1, 0.5), (0.5, 1), (0.75, 0.75)))
    if not _close(out[0], plain):
        yield "the first estimate should be the model's own, of the mixture as it is"
    if _close(out[1], mirrored.flip(0)):
        yield "the second estimate has left and right swapped: swap it back after the model"
    if _close(out[1], plain):
        yield "the second estimate is the first one: the mixture was not swapped before the model"
    if not _close(out[1], mirrored):
        yield "the second estimate should be: swap the channels (`flip(0)`), separate, swap back"
    if not _close(out[2], mean):
        yield "the third estimate should be the mean of the first two"
