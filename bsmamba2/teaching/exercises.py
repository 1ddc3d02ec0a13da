"""What the exercises of the book ask for, checked: the reader's function goes in, a verdict comes out.

A check never knows how something was written, only what it should do. It asks the plainest question first, and the
verdict is the first answer that is wrong, in words that point to the place.

Book: "What a port must prove". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..mamba2 import Mamba2

P = ParamSpec("P")
RATE, N_FFT = 44_100, 2048


@dataclass(frozen=True)
class CheckResult:
    """What a check has to say; true when nothing was found wrong. A notebook shows the message, in lines."""

    passed: bool
    message: str

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return textwrap.fill(("right: " if self.passed else "not yet: ") + self.message, 88)


def grade(
    caught: Callable[[Any], object],
    *,
    right: Mapping[str, Any],
    faulty: Mapping[str, Any],
    hint: str = "",
) -> CheckResult:
    """Test a test: it must let every right version pass, and catch every faulty one.

    Args:
        caught: the reader's test, from a candidate to whether it is faulty. An `AssertionError` is a yes too, and None,
            which is what a test of assertions returns when all of them hold, a no.
        right: name → a version without the fault. Several, so that a test does not insist on more than it should.
        faulty: name → a version with it.
        hint: what to say when a faulty version was let through.
    """
    for name, candidate in {**faulty, **right}.items():
        try:
            said = bool(caught(candidate))
        except AssertionError:
            said = True
        except Exception as error:  # whatever the reader's code does, it is told, and where
            return CheckResult(False, f"on the version «{name}» your test itself stopped: {_told(error)}")
        if name in faulty and not said:
            return CheckResult(False, f"your test lets a faulty version through: «{name}». {hint}".rstrip())
        if name in right and said:
            return CheckResult(
                False,
                f"your test calls a right version faulty: «{name}». Does it ask for equality where only rounding "
                "differs, or for something that need not hold?",
            )
    return CheckResult(True, f"caught {', '.join(f'«{name}»' for name in faulty)}; let pass {len(right)} right")


def _check(complaints: Callable[P, Iterator[str]]) -> Callable[P, CheckResult]:
    """A check from a generator of complaints: the first one, or what the reader's code raised, is the verdict."""

    def check(*args: P.args, **kwargs: P.kwargs) -> CheckResult:
        try:
            told = next(complaints(*args, **kwargs), None)
        except Exception as error:  # as above
            told = f"it stopped with {_told(error)}"
        return CheckResult(told is None, told or "every question was answered as it should be")

    check.__name__, check.__doc__ = complaints.__name__, complaints.__doc__
    check.__annotations__ = complaints.__annotations__ | {"return": "CheckResult"}
    return check


def _told(error: Exception) -> str:
    """Kind, message, and the line of the innermost function that is not of this file or an installed package."""
    lines = []
    frame = error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        if code.co_filename != __file__ and "site-packages" not in code.co_filename:
            lines.append(f"line {frame.tb_lineno} of {code.co_name}")
        frame = frame.tb_next
    return f"{type(error).__name__}: {error}" + (f" ({lines[-1]})" if lines else "")


def _nothing(answer: object) -> Iterator[str]:
    if answer is None:
        yield "it gives None. Write its body, and end it with `return`"


def _of_shape(answer: object, shape: tuple[int, ...], axes: str) -> Iterator[str]:
    yield from _nothing(answer)
    if not isinstance(answer, Tensor):
        yield f"it gives a {type(answer).__name__}; asked for is a tensor {axes}"
    elif tuple(answer.shape) != shape:
        yield f"it gives the shape {tuple(answer.shape)}; {axes} is {shape} here"


def _near(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether the largest difference is a small part of the largest value."""
    return bool((one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-12))


# --- Sound and silence ------------------------------------------------------------------------------------


@_check
def check_best_gain(best_gain: Callable[[Tensor, Tensor], Any]) -> Iterator[str]:
    """`best_gain(voice, mixture)`: two of (c, samples) → the number g whose g · mixture comes nearest to the voice."""
    draw = torch.Generator().manual_seed(0)
    voice, band = torch.randn(2, 2, 1000, generator=draw)
    for mixture in (voice + 2 * band, 3 * voice, 0.5 * band - voice):
        answer = best_gain(voice.clone(), mixture.clone())
        yield from _nothing(answer)
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
        yield f"for a silent mixture it gives {g}: any number is as good there, but it must be a number"


# --- The spectrogram --------------------------------------------------------------------------------------


@_check
def check_muffle(muffle: Callable[[Tensor, float], Any]) -> Iterator[str]:
    """`muffle(audio, cutoff)`: (c, samples) → (c, samples) without what lies above `cutoff` hertz."""
    time = torch.arange(RATE) / RATE
    tones = {hertz: torch.sin(2 * torch.pi * hertz * time) for hertz in (200, 3000, 9000)}
    audio = torch.stack([sum(tones.values(), torch.zeros(RATE)), tones[200]])  # (2, samples)
    given = audio.clone()
    out = muffle(given, 1000)
    yield from _of_shape(out, tuple(audio.shape), "(c, samples)")
    if out.is_complex():
        yield "it gives complex numbers, a spectrogram. `istft` takes it back to audio"
    if not torch.equal(given, audio):
        yield "it changed the audio that it was given; work on a copy"
    left = {hertz: _amplitude(out[0], hertz) for hertz in tones}
    if left[9000] > 0.9 and left[200] < 0.1:
        yield "it keeps what lies above the cutoff and takes the rest away: the other way round"
    if left[9000] > 0.1 or left[3000] > 0.1:
        yield (
            f"after muffle(audio, 1000) a tone of 3,000 Hz has {left[3000]:.0%} of its height left, one of 9,000 Hz "
            f"{left[9000]:.0%}. Bin f stands for f · 44100 / 2048 Hz: is the cutoff compared with hertz or with bins?"
        )
    if left[200] < 0.9:
        yield f"after muffle(audio, 1000) only {left[200]:.0%} of a tone of 200 Hz is left, and all of it should be"
    if _amplitude(muffle(audio, 4000)[0], 3000) < 0.9:
        yield "a tone of 3,000 Hz does not survive muffle(audio, 4000): does the result depend on `cutoff`?"
    if _amplitude(out[1], 9000) > 0.01:
        yield "the second channel holds what was in the first: keep them apart"


def _amplitude(signal: Tensor, hertz: float) -> float:
    """Of one tone in a second of sound, both ends left out."""
    time = torch.arange(RATE // 10, RATE - RATE // 10) / RATE
    wave = torch.exp(-2j * torch.pi * hertz * time)
    return float((signal[RATE // 10 : RATE - RATE // 10] * wave).mean().abs() * 2)


# --- Bands ------------------------------------------------------------------------------------------------


@_check
def check_mel_bands(mel_bands: Callable[[int], Any]) -> Iterator[str]:
    """`mel_bands(count)`: bins in each of `count` bands of equal width on the mel scale, 1,025 in all, two at least."""
    for count in (8, 32, 48, 62, 512):
        bands = mel_bands(count)
        yield from _nothing(bands)
        if not isinstance(bands, Sequence) or not all(isinstance(width, int) for width in bands):
            yield f"mel_bands({count}) should give a tuple of whole numbers, the bins in each band"
        if len(bands) != count:
            yield f"mel_bands({count}) gives {len(bands)} bands. Edges are one more than bands"
        if sum(bands) != 1025:
            yield (
                f"the bands of mel_bands({count}) hold {sum(bands):,} bins and not 1,025. "
                "The first edge is 0, the last one 1,025: one past the last bin"
            )
        if min(bands) < 2:
            yield (
                f"mel_bands({count}) has a band of {min(bands)} bins. Where the scale asks for less than two, "
                "move the edge up, and leave room for the bands that follow"
            )
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


# --- The scan ---------------------------------------------------------------------------------------------


@_check
def check_both_ways(both_ways: Callable[..., Any]) -> Iterator[str]:
    """`both_ways(x, dt, A, B, C)`: a scan in which every frame hears the whole sequence, itself once."""
    generator = torch.Generator().manual_seed(0)
    b, t, h, p, n = 2, 12, 2, 3, 4

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, dt, A, B, C = random(b, t, h, p), random(b, t, h).abs(), -random(h).abs(), random(b, t, n), random(b, t, n)
    out = both_ways(x, dt, A, B, C)
    yield from _of_shape(out, (b, t, h, p), "(b, t, h, p)")
    decay = dt * A  # (b, t, h)
    left = torch.zeros(b, t, t, h, dtype=torch.float64)  # what reaches i from j, from the left
    right = torch.zeros_like(left)
    for i in range(t):
        for j in range(i + 1):
            left[:, i, j] = decay[:, j + 1 : i + 1].sum(1).exp()
            right[:, j, i] = decay[:, j:i].sum(1).exp()
    ahead, back = (torch.einsum("bijh,bin,bjn,bjh,bjhp->bihp", part, C, B, dt, x) for part in (left, right))
    own = torch.einsum("bin,bin,bih,bihp->bihp", C, B, dt, x)
    if _near(out, ahead + back - own):
        return
    known = {
        "the frame itself is counted twice, once from each side: take it away once": ahead + back,
        "this is the scan from the left alone: nothing is heard from the right": ahead,
        "the scan from the right is not turned back: flip its result too": ahead + back.flip(1) - own,
    }
    for told, wrong in known.items():
        if _near(out, wrong):
            yield told
    far = (out - ahead - back + own).abs().amax((0, 2, 3))
    yield (
        f"frame 0 is off by {float(far[0]):.1e}, the last frame by {float(far[-1]):.1e}. For the scan from the right, "
        "flip x, dt, B and C along the frames, and its result back"
    )


# --- The Mamba-2 block ------------------------------------------------------------------------------------


@_check
def check_step(step: Callable[..., Any], mixer: Mamba2) -> Iterator[str]:
    """`step(frame, memory)`: one frame (b, d) through the mixer; the memory is a state and three frames of xBC."""
    b, d = 2, mixer.in_proj.in_features
    heads, state = mixer.D.numel(), mixer.inner_widths[1]
    u = torch.randn(b, 8, d, generator=torch.Generator().manual_seed(0))
    memory: Any = torch.zeros(b, heads, mixer.headdim, state), torch.zeros(b, mixer.past, mixer.widths[1])
    with torch.no_grad():
        expected, kept = mixer.step(u, keep=True)
        frames = []
        for i in range(u.shape[1]):
            given = step(u[:, i], memory)
            yield from _nothing(given)
            if not isinstance(given, tuple) or len(given) != 2:
                yield "it should give two things: the output (b, d), and the memory after the frame"
            frame, memory = given
            yield from _of_shape(frame, (b, d), "(b, d)")
            frames.append(frame)
    near = [_near(frame, expected[:, i], 1e-3) for i, frame in enumerate(frames)]
    if not near[0]:
        yield "the very first frame differs. There the memory is zero: compare z, xBC, Δ, y step by step"
    if not all(near):
        yield (
            f"frame {near.index(False)} is the first that differs, so something of the past is not handed on: "
            "the scan's state, or the last three frames that went into the convolution (before SiLU)"
        )
    assert kept is not None
    if not _near(memory[0], kept[1], 1e-3):
        yield "the outputs are right; the first part of the memory should be the scan's state, (b, h, p, n)"
    if not _near(memory[1], kept[0].transpose(0, 1), 1e-3):
        yield "the outputs are right; the second part of the memory should be the last three frames of xBC, (b, 3, w)"


# --- Two directions, two axes -----------------------------------------------------------------------------


@_check
def check_live_dual_path(live: Callable[..., nn.Module]) -> Iterator[str]:
    """`LiveDualPath(dim, sequence_layer)`: (b, t, k, d) → (b, t, k, d), no frame hears a later one, bands hear all."""
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
        yield from _of_shape(out, (b, t, k, d), "(b, t, k, d)")
        moved = (layer(touched) - out).abs().amax(-1) > 0  # (b, t, k)
    if moved[1].any():
        yield "touching a cell of the first song changes the second: `b` went into the strips in the wrong order"
    if moved[0, :6].any():
        yield "touching frame 6 changes a frame before it: along time, one direction only, and the past"
    if not moved[0, 6].all():
        yield "touching one band of frame 6 does not reach all bands of frame 6: along bands, both directions"
    if not moved[0, 7:].any():
        yield "touching frame 6 changes no later frame: along time, nothing is remembered"
    if not moved[0, 6:].all():
        yield "some cells of later frames do not hear frame 6: first along time, then bands. Is a transpose missing?"


# --- The whole model --------------------------------------------------------------------------------------


class _Lopsided(nn.Module):
    """A model that treats the left channel otherwise than the right: (b, 2, samples) → (b, 1, 2, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig.preset("small")
        self.gain = nn.Parameter(torch.tensor([1.0, 0.5]))

    def forward(self, mixture: Tensor) -> Tensor:
        return (mixture * self.gain[:, None])[:, None]


@_check
def check_both_sides(both_sides: Callable[..., Any]) -> Iterator[str]:
    """`both_sides(model, mixture)`: the estimate (c, samples), the one by way of the mirror, and their mean."""
    mixture = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = both_sides(_Lopsided(), mixture)
    yield from _nothing(out)
    if not isinstance(out, tuple | list) or len(out) != 3:
        yield "it should give three estimates: as it is, by way of the mirror, and their mean"
    for name, estimate in zip(("first", "second", "third"), out, strict=True):
        for told in _of_shape(estimate, (2, RATE), "(c, samples)"):
            yield f"the {name} estimate: {told}. `separate` gives (stem, c, samples)"
    plain, mirrored, mean = (mixture * torch.tensor(gains)[:, None] for gains in ((1, 0.5), (0.5, 1), (0.75, 0.75)))
    if not _near(out[0], plain):
        yield "the first estimate should be the model's own, of the mixture as it is"
    if _near(out[1], mirrored.flip(0)):
        yield "the second estimate has left and right swapped: swap it back after the model"
    if _near(out[1], plain):
        yield "the second estimate is the first one: the mixture was not swapped before the model"
    if not _near(out[1], mirrored):
        yield "the second estimate should be: swap the channels (`flip(0)`), separate, swap back"
    if not _near(out[2], mean):
        yield "the third estimate should be the mean of the first two"
