"""Exercise checks: a right answer passes, and each likely mistake gets a message that points to it."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bsmamba2 import dual_path, ssd
from bsmamba2.mamba2 import Mamba2
from bsmamba2.separate import separate
from bsmamba2.spectrogram import istft, stft
from bsmamba2.teaching import exercises


def rejects(result: exercises.CheckResult, expected: str) -> None:
    assert not result
    assert repr(result).startswith("not yet: ")
    assert re.search(expected, result.message), result


def best_gain(voice: Tensor, mixture: Tensor) -> float:
    power = mixture.square().sum()
    return float((voice * mixture).sum() / power) if power else 0.0


GAIN: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda voice, mixture: None, "returns None"),
    "other way round": (lambda voice, mixture: (voice * mixture).sum() / voice.square().sum(), "error of"),
    "one over it": (lambda voice, mixture: mixture.square().sum() / (voice * mixture).sum(), "other way round"),
    "level to level": (lambda voice, mixture: voice.norm() / mixture.norm(), "error of"),
    "no less than nothing": (lambda voice, mixture: max(0.0, best_gain(voice, mixture)), "turned round"),
    "silence": (lambda voice, mixture: (voice * mixture).sum() / mixture.square().sum(), "it returns nan"),
    "zero by zero": (lambda voice, mixture: 1 / float(mixture.square().sum()), "error of"),
}


@pytest.mark.parametrize("name", GAIN)
def test_mistakes_with_the_gain(name: str) -> None:
    answer, expected = GAIN[name]
    rejects(exercises.check_best_gain(answer), expected)


def muffle(audio: Tensor, cutoff: float) -> Tensor:
    view = stft(audio)
    return istft(view * (torch.arange(1025) * 44_100 / 2048 <= cutoff)[:, None], audio.shape[-1])


def by_bins(audio: Tensor, cutoff: float) -> Tensor:
    view = stft(audio)
    return istft(view * (torch.arange(1025) <= cutoff)[:, None], audio.shape[-1])


def louder_in_place(audio: Tensor, cutoff: float) -> Tensor:
    return audio.mul_(2)


def by_slice(audio: Tensor, cutoff: float, axis: int = 1, extra: int = 0, keep_early: bool = True) -> Tensor:
    view = stft(audio)
    first = int(cutoff * 2048 / 44_100) + extra
    part = slice(first, None) if keep_early else slice(0, first)
    view[(slice(None),) * axis + (part,)] = 0
    return istft(view, audio.shape[-1])


def rolled_off(audio: Tensor, cutoff: float) -> Tensor:
    """Right, with a slope of some hundred hertz instead of an edge."""
    view, hertz = stft(audio), torch.arange(1025) * 44_100 / 2048
    return istft(view * (0.5 - (hertz - cutoff) / 400).clamp(0, 1)[:, None], audio.shape[-1])


def test_both_kinds_of_edge_are_right() -> None:
    for answer in (rolled_off, lambda audio, cutoff: by_slice(audio, cutoff, extra=1)):
        result = exercises.check_muffle(answer)
        assert result, result


MUFFLE: dict[str, tuple[Callable[..., Any], str]] = {
    "one bin too few": (by_slice, "drops bin 46"),
    "one bin too many": (lambda audio, cutoff: by_slice(audio, cutoff, extra=2), "keeps bin 47"),
    "along frames": (lambda audio, cutoff: by_slice(audio, cutoff, axis=2), "along the frames"),
    "along frames, late ones": (lambda *given: by_slice(*given, axis=2, keep_early=False), "along the frames"),
    "nothing": (lambda audio, cutoff: None, "returns None"),
    "no tensor": (lambda audio, cutoff: 3, "returns a int"),
    "one channel": (lambda audio, cutoff: muffle(audio, cutoff)[0], r"\(44100,\); \(c, samples\) is \(2, 44100\)"),
    "complex": (lambda audio, cutoff: torch.complex(audio, audio), "complex numbers"),
    "in place": (louder_in_place, "changed the audio"),
    "wrong way round": (lambda audio, cutoff: audio - muffle(audio, cutoff), "other way round"),
    "in bins": (by_bins, "compared with hertz or with bins"),
    "constant": (lambda audio, cutoff: muffle(audio, 1000), "does the result depend on `cutoff`"),
    "too low": (lambda audio, cutoff: muffle(audio, cutoff / 20), "all of it should be"),
    "mixed down": (lambda audio, cutoff: muffle(audio, cutoff).mean(0).expand(2, -1), "a tone of 3,000 Hz does not"),
    "error": (lambda audio, cutoff: audio / undefined, r"NameError: .*line \d+ of <lambda>"),  # type: ignore[name-defined]  # noqa: F821
}


@pytest.mark.parametrize("name", MUFFLE)
def test_mistakes_with_the_equaliser(name: str) -> None:
    answer, expected = MUFFLE[name]
    rejects(exercises.check_muffle(answer), expected)


def mel_bands(count: int, clamp: bool = True, top: float = 1.0, linear: bool = False) -> tuple[int, ...]:
    highest = 2595 * math.log10(1 + 1024 * 44_100 / 2048 / 700) * top
    edges = [0]
    for i in range(1, count):
        edge = round(700 * (10 ** (highest * i / count / 2595) - 1) * 2048 / 44_100)
        edge = round(1025 * i / count) if linear else edge
        edges.append(min(max(edge, edges[-1] + 2), 1025 - 2 * (count - i)) if clamp else edge)
    edges.append(1025)
    return tuple(high - low for low, high in itertools.pairwise(edges))


MEL: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda count: None, "returns None"),
    "no numbers": (lambda count: torch.tensor(mel_bands(count)), "tuple of whole numbers"),
    "too few": (lambda count: mel_bands(count)[1:], "returns 7 bands"),
    "one bin short": (lambda count: (*mel_bands(count)[:-1], mel_bands(count)[-1] - 1), "1,024 bins and not 1,025"),
    "too narrow": (lambda count: mel_bands(count, clamp=False), "leave room"),
    "equal in hertz": (lambda count: mel_bands(count, linear=True), "equally wide in hertz"),
    "another scale": (lambda count: mel_bands(count, top=1.1), "equal steps in mels are at"),
}


@pytest.mark.parametrize("name", MEL)
def test_mistakes_with_mel_bands(name: str) -> None:
    answer, expected = MEL[name]
    rejects(exercises.check_mel_bands(answer), expected)


def both_ways(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, own: float = 1, back: bool = True) -> Tensor:
    right = ssd.recurrent(x.flip(1), dt.flip(1), A, B.flip(1), C.flip(1))
    twice = torch.einsum("bin,bin,bih,bihp->bihp", C, B, dt, x)
    return ssd.recurrent(x, dt, A, B, C) + (right.flip(1) if back else right) - own * twice


BOTH: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda x, dt, A, B, C: None, "returns None"),
    "itself twice": (lambda *parts: both_ways(*parts, own=0), "counted twice"),
    "left alone": (lambda *parts: ssd.recurrent(*parts), "from the left alone"),
    "not turned back": (lambda *parts: both_ways(*parts, back=False), "not turned back"),
    "B and C not flipped": (
        lambda x, dt, A, B, C: ssd.recurrent(x, dt, A, B, C) + ssd.recurrent(x.flip(1), dt.flip(1), A, B, C).flip(1),
        "flip x, dt, B and C",
    ),
}


@pytest.mark.parametrize("name", BOTH)
def test_mistakes_with_the_scan_from_both_sides(name: str) -> None:
    answer, expected = BOTH[name]
    rejects(exercises.check_both_ways(answer), expected)


@pytest.fixture(scope="module")
def mixer() -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(16, d_state=8, headdim=16)


def streaming(mixer: Mamba2, *faults: str) -> Callable[..., Any]:
    def step(frame: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        ssm_state, conv_state = state
        if "forget" in faults:
            ssm_state = torch.zeros_like(ssm_state)
        z, xBC, dt = mixer.in_proj(frame).split(mixer.proj_sizes, dim=-1)
        conv_state = torch.cat([conv_state, xBC[:, None]], 1)
        taps = mixer.conv1d.weight[:, 0].T
        out = (conv_state * (taps.flip(0) if "taps" in faults else taps)).sum(1)
        x, B, C = functional.silu(out if "no bias" in faults else out + mixer.conv1d.bias).split(mixer.conv_sizes, -1)
        dt, A = functional.softplus(dt if "no dt_bias" in faults else dt + mixer.dt_bias), -mixer.A_log.exp()
        x = x.reshape(len(x), 1, -1, mixer.headdim)
        parts = x, dt[:, None], A, B[:, None], C[:, None]
        y, after = ssd.recurrent(*parts, mixer.D, initial_state=ssm_state, return_state=True)
        if "no D" in faults:
            y = ssd.recurrent(*parts, initial_state=ssm_state)
        if "read early" in faults:
            y = torch.einsum("bhpn,bn->bhp", ssm_state, C)[:, None] + mixer.D[:, None] * x
        y, gate = y.flatten(1), 1 if "no gate" in faults else functional.silu(z)
        y = mixer.out_proj(mixer.norm(y) * gate if "norm first" in faults else mixer.norm(y * gate))
        conv_state = functional.silu(conv_state) if "after SiLU" in faults else conv_state
        return y, (after, conv_state[:, 1:])

    return step


STEP = {
    "no D": "y lacks D",
    "no bias": "xBC lacks the bias",
    "taps": "taps of the convolution are in the wrong order",
    "read early": "read before the state is written",
    "norm first": "the norm comes before the gate",
    "no gate": "y lacks the gate",
    "no dt_bias": "Δ lacks its bias",
    "forget": "frame 1 is the first that differs",
    "after SiLU": "frame 1 is the first that differs",
}


@pytest.mark.parametrize("fault", STEP)
def test_the_tensor_that_differs_is_named(mixer: Mamba2, fault: str) -> None:
    rejects(exercises.check_step(streaming(mixer, fault), mixer), STEP[fault])


def test_two_faults_at_once_are_not_named_as_one(mixer: Mamba2) -> None:
    rejects(exercises.check_step(streaming(mixer, "no D", "no gate"), mixer), "very first frame")


def test_mistakes_with_the_streaming_mixer(mixer: Mamba2) -> None:
    rejects(exercises.check_step(lambda frame, state: None, mixer), "returns None")
    rejects(exercises.check_step(lambda frame, state: frame, mixer), "two things")
    rejects(exercises.check_step(lambda frame, state: (frame[0], state), mixer), r"\(16,\); \(b, d\) is \(2, 16\)")


class Live(nn.Module):
    """`LiveDualPath`, and ways to get it wrong."""

    def __init__(self, dim: int, layer: Callable[[], nn.Module], fault: str) -> None:
        super().__init__()
        one, two = dual_path.PreNormResidual(dim, layer()), dual_path.BidirectionalBlock(dim, layer)
        self.time = dual_path.BidirectionalBlock(dim, layer) if fault == "hears the future" else one
        self.band = dual_path.PreNormResidual(dim, layer()) if fault == "bands one way" else two
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        b, t, k, d = x.shape
        if self.fault == "no transpose":
            x = self.time(x.reshape(b * k, t, d)).reshape(b, t, k, d)
        elif self.fault != "forgets":
            x = self.time(x.transpose(1, 2).reshape(b * k, t, d)).reshape(b, k, t, d).transpose(1, 2)
        if self.fault == "songs meet":
            return self.band(x.flatten(0, 2)[None]).reshape(x.shape)
        if self.fault == "bands alone":
            return x
        return self.band(x.reshape(b * t, k, d)).reshape(x.shape)


LIVE = {
    "right": "",
    "hears the future": "changes a frame before it",
    "bands one way": "does not reach all bands",
    "bands alone": "does not reach all bands",
    "forgets": "nothing is remembered",
    "songs meet": "the second",
    "no transpose": "changes a frame before it|do not depend on frame 6|changes no later frame",
}


@pytest.mark.parametrize("fault", LIVE)
def test_mistakes_with_the_live_layer(fault: str) -> None:
    result = exercises.check_live_dual_path(lambda dim, layer: Live(dim, layer, fault))
    if fault == "right":
        assert result, result
    else:
        rejects(result, LIVE[fault])


def test_an_empty_class_is_reported() -> None:
    class Empty(nn.Module):
        def __init__(self, dim: int, layer: Callable[[], nn.Module]) -> None:
            super().__init__()

    rejects(exercises.check_live_dual_path(Empty), "no `forward`")


def sides(model: nn.Module, mixture: Tensor, before: bool = True, after: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    one = separate(model, mixture, segment=4.0)[0]  # type: ignore[arg-type]
    other = separate(model, mixture.flip(0) if before else mixture, segment=4.0)[0]  # type: ignore[arg-type]
    other = other.flip(0) if after else other
    return one, other, (one + other) / 2


SIDES: dict[str, tuple[Callable[..., Any], str]] = {
    "nothing": (lambda model, mixture: None, "returns None"),
    "two": (lambda model, mixture: sides(model, mixture)[:2], "three estimates"),
    "stem kept": (lambda model, mixture: [one[None] for one in sides(model, mixture)], "first estimate.*stem"),
    "not swapped back": (lambda *given: sides(*given, after=False), "swap it back"),
    "not swapped": (lambda *given: sides(*given, before=False, after=False), "not swapped before"),
    "only after": (lambda *given: sides(*given, before=False), "swap the channels"),
    "sum": (lambda *given: (*sides(*given)[:2], 2 * sides(*given)[2]), "mean of the first two"),
    "first is the mixture": (lambda model, mixture: (mixture, *sides(model, mixture)[1:]), "model's own"),
}


@pytest.mark.parametrize("name", SIDES)
def test_mistakes_with_both_sides(name: str) -> None:
    answer, expected = SIDES[name]
    rejects(exercises.check_both_sides(answer), expected)


def test_right_answers_pass(mixer: Mamba2) -> None:
    for result in (
        exercises.check_best_gain(best_gain),
        exercises.check_muffle(muffle),
        exercises.check_mel_bands(mel_bands),
        exercises.check_both_ways(both_ways),
        exercises.check_step(streaming(mixer), mixer),
        exercises.check_both_sides(sides),
    ):
        assert result, result
        assert repr(result).startswith("right: ")


# --- the test of a test -----------------------------------------------------------------------------------


def double(x: float) -> float:
    return 2 * x


def graded(detects: Callable[[Any], object]) -> exercises.CheckResult:
    return exercises.grade(
        detects,
        right={"product": double, "sum": lambda x: x + x + 1e-12},
        faulty={"square": lambda x: x * x},
        hint="Try another number than 2.",
    )


def by_assertion(candidate: Callable[[float], float]) -> None:
    assert abs(candidate(3) - 6) < 1e-6


def test_a_good_test_is_accepted_in_either_style() -> None:
    assert graded(by_assertion)
    result = graded(lambda candidate: abs(candidate(3) - 6) > 1e-6)
    assert repr(result) == "right: caught «square»; let pass 2 right"


def test_a_bad_test_is_reported() -> None:
    rejects(graded(lambda candidate: None), "lets a faulty version through: «square». Try another number than 2.")
    rejects(graded(lambda candidate: candidate(2) != 4), "lets a faulty version through")
    rejects(graded(lambda candidate: True), "calls a right version faulty: «product»")
    rejects(graded(lambda candidate: candidate(3) != 6), "calls a right version faulty: «sum»")
    rejects(graded(lambda candidate: candidate("3") > 6), r"your test itself stopped: TypeError.*line \d+ of <lambda>")


def once(old: Callable[[], Any], new: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    old()
    middle = clock()
    new()
    return (middle - start) / (clock() - middle)


def by_own_clock(speedup: Callable[..., float]) -> bool:
    now = [0.0]

    def taking(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    return abs(speedup(taking(6), taking(2), lambda: now[0]) - 3) > 1e-9


def by_ticks(speedup: Callable[..., float]) -> bool:
    """A clock that moves on by one at every reading: two functions take the same."""
    return speedup(lambda: None, lambda: None, itertools.count().__next__) != 1


@pytest.mark.parametrize("clock", [time.perf_counter, time.time, lambda: time.monotonic()])
def test_a_test_on_the_real_clock_is_refused(clock: Callable[[], float]) -> None:
    def by_real_clock(speedup: Callable[..., float]) -> bool:
        return not 1 < speedup(lambda: time.sleep(0.03), lambda: time.sleep(0.01), clock) < 7

    versions: dict[str, Any] = {
        "right": {"once": exercises.needs_own_clock(once)},
        "faulty": {"as expected": lambda old, new, clock: 7.5},
    }
    rejects(
        exercises.grade(by_real_clock, **versions), "«once» your test itself stopped: ValueError: the clock is a real"
    )
    for detects in (by_own_clock, by_ticks):
        assert exercises.grade(detects, **versions)
