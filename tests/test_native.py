"""The native kernel: the numbers of the loop in float64 where it runs; elsewhere a word, and the chunked form."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, mamba2, ssd
from bsmamba2.dual_path import DualPath
from bsmamba2.kernels import cpu, loops, self_test, triton
from bsmamba2.mamba2 import Mamba2, RMSNorm
from bsmamba2.train import TrainConfig, Trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
AMX = Path("/proc/cpuinfo").is_file() and "amx_bf16" in Path("/proc/cpuinfo").read_text()
BOUND = cpu.TOLERANCE
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not AMX, reason="this CPU has no AMX")),
]


PROBLEMS = {
    "t": st.integers(1, 140),
    "h": st.integers(1, 5),
    "p": st.sampled_from([32, 64, 96]),
    "n": st.sampled_from([32, 64]),
    "decay": st.floats(-3, 2),
    "start": st.booleans(),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def problem(t: int, h: int = 2, *, b: int = 2, p: int = 32, n: int = 32, dt: float = 0.1, decay: float = 8.0) -> list:
    """x, dt, A, B, C, D and a first state; x, B and C are numbers of bfloat16."""
    g = torch.Generator().manual_seed(t)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).bfloat16().float()

    rates = -torch.rand(h, generator=g) * decay - 1e-3
    steps, B, C = torch.rand(b, t, h, generator=g) * dt, normal(b, t, n), normal(b, t, n)
    return [normal(b, t, h, p), steps, rates, B, C, normal(h), normal(b, h, p, n)]


def assert_same(parts: list, dtype: torch.dtype, *, start: bool = True) -> None:
    first = parts[6] if start else None
    wide = [part.double() for part in parts[:6]]
    y, state = ssd.recurrent(*wide, initial_state=None if first is None else first.double(), return_state=True)
    narrow = [part.to(dtype) if i in (0, 3, 4) else part for i, part in enumerate(parts[:6])]
    found, last = cpu.scan(*narrow, initial_state=first, return_state=True)
    assert found.dtype == dtype
    assert relative(found.double(), y) < BOUND[dtype]
    assert relative(last.double(), state) < BOUND[dtype]
    assert torch.equal(cpu.scan(*narrow, initial_state=first), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 2, 31, 64, 65, 130, 200])
@pytest.mark.parametrize("start", [True, False])
def test_agrees_with_the_loop(t: int, start: bool, dtype: torch.dtype) -> None:
    assert_same(problem(t), dtype, start=start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("step", "decay"), [(1e-7, 8.0), (0.05, 0.0), (0.2, 30.0), (3.0, 100.0), (60.0, 100.0)])
def test_from_no_decay_to_all_forgotten(step: float, decay: float, dtype: torch.dtype) -> None:
    """The third and fourth have heads of both kinds: that share a product with G, and that need one of their own."""
    assert_same(problem(150, 16, dt=step, decay=decay), dtype)


@settings(max_examples=40, deadline=None)
@given(**PROBLEMS, step=st.floats(-6, 1.5))
def test_any_size_and_decay(t: int, h: int, p: int, n: int, step: float, decay: float, start: bool) -> None:
    assert_same(problem(t, h, p=p, n=n, dt=10**step, decay=10**decay), torch.float32, start=start)


GRADIENTS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def gradients(scan: ssd.Scan, parts: list, *, start: bool, last: bool) -> list[Tensor]:
    """Of a sum with random weights of y, and of the last state if it is to count, by x, dt, A, B, C, D and state."""
    leaves = [part.clone().requires_grad_() for part in (parts if start else parts[:6])]
    with torch.enable_grad():
        y, state = scan(*leaves[:6], initial_state=leaves[6] if start else None, return_state=True)
        g = torch.Generator().manual_seed(1)
        total = (y.double() * torch.randn(y.shape, generator=g)).sum()
        if last:
            total = total + (state.double() * torch.randn(state.shape, generator=g)).sum()
        return list(torch.autograd.grad(total, leaves))


def assert_same_gradients(parts: list, dtype: torch.dtype, *, start: bool = True, last: bool = True) -> None:
    expected = gradients(ssd.recurrent, [part.double() for part in parts], start=start, last=last)
    narrow = [part.to(dtype) if i in (0, 3, 4) else part for i, part in enumerate(parts)]
    found = gradients(cpu.scan, narrow, start=start, last=last)
    for name, mine, right in zip(("x", "dt", "A", "B", "C", "D", "S"), found, expected, strict=False):
        assert mine.isfinite().all(), name
        if name == "A":  # a sum over frames that may cancel, and does in the first one: measured by what is summed
            whole = (expected[1] / parts[2] * parts[1]).abs().sum((0, 1)).max()
            assert (mine - right).abs().max() < GRADIENTS[dtype] * max(whole, right.abs().max())
        else:
            assert relative(mine, right) < GRADIENTS[dtype], name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 2, 31, 64, 65, 130, 200])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_gradients_agree_with_the_loop(t: int, start: bool, last: bool, dtype: torch.dtype) -> None:
    assert_same_gradients(problem(t, 4), dtype, start=start, last=last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("step", "decay"), [(1e-7, 8.0), (0.05, 0.0), (0.2, 30.0), (3.0, 100.0), (60.0, 100.0)])
def test_gradients_from_no_decay_to_all_forgotten(step: float, decay: float, dtype: torch.dtype) -> None:
    assert_same_gradients(problem(150, 16, dt=step, decay=decay), dtype)


@settings(max_examples=40, deadline=None)
@given(**PROBLEMS, step=st.floats(-6, 0.5), last=st.booleans())
def test_gradients_of_any_size_and_decay(
    t: int, h: int, p: int, n: int, step: float, decay: float, start: bool, last: bool
) -> None:
    parts = problem(t, h, p=p, n=n, dt=10**step, decay=10**decay)
    assert_same_gradients(parts, torch.float32, start=start, last=last)


def test_one_long_step_among_short_ones() -> None:
    """What crosses it has all but decayed, and is not to be the difference of what does not."""
    parts = problem(100, 4, dt=1e-2, decay=1.0)
    parts[1][:, 50] = torch.tensor([1.0, 10.0, 30.0, 90.0]) / -parts[2]
    assert_same_gradients(parts, torch.float32)


def test_a_step_of_no_length_has_a_gradient() -> None:
    parts = problem(70)
    parts[1][:, ::3] = 0
    assert_same_gradients(parts, torch.float32)


def test_gradients_do_not_depend_on_threads_or_on_other_sequences() -> None:
    parts = problem(150, 4, b=5)
    every = gradients(cpu.scan, parts, start=True, last=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(cpu.scan, parts, start=True, last=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(every, alone, strict=True))
    parts[0][2, 20] = torch.nan
    broken = gradients(cpu.scan, parts, start=True, last=False)
    clean = gradients(cpu.scan, problem(150, 4, b=5), start=True, last=False)
    for i in (1, 3, 4):
        assert broken[i][2].isnan().any()
        assert torch.equal(broken[i][[0, 1, 3, 4]], clean[i][[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_silence_stays_silence(dtype: torch.dtype) -> None:
    parts = problem(70)
    parts[0], parts[6] = torch.zeros_like(parts[0]).to(dtype), torch.zeros_like(parts[6])
    parts[3:5] = (part.to(dtype) for part in parts[3:5])
    y, state = cpu.scan(*parts[:6], initial_state=parts[6], return_state=True)
    assert not y.any()
    assert not state.any()


def test_frames_may_lie_outermost() -> None:
    parts = problem(70, b=3)
    turned = [
        part.transpose(0, 1).contiguous().transpose(0, 1) if i in (0, 1, 3, 4) else part for i, part in enumerate(parts)
    ]
    turned[2] = parts[2].repeat_interleave(2)[::2]
    assert torch.equal(cpu.scan(*turned[:6]), cpu.scan(*parts[:6]))


def test_what_is_no_number_stays_in_its_sequence_and_after_its_frame() -> None:
    parts = problem(100, b=3)
    clean = cpu.scan(*parts[:6])
    for i in (0, 1, 3):
        broken = [part.clone() for part in parts]
        broken[i][1, 80] = torch.nan
        y = cpu.scan(*broken[:6])
        assert torch.equal(y[[0, 2]], clean[[0, 2]])
        assert y[1, 80:].isnan().any()
        torch.testing.assert_close(y[1, :50], clean[1, :50])  # the chunk before


# --- in a mixer -------------------------------------------------------------------------------------------


def mixer(scan: ssd.Scan, d_conv: int = 4) -> Mamba2:
    torch.manual_seed(0)
    made = Mamba2(32, d_state=32, headdim=32, d_conv=d_conv, scan=scan).eval()
    torch.nn.init.uniform_(made.norm.weight, 0.5, 1.5)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 2, 90, 300])
def test_a_mixer_gives_the_same(t: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, t, 32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = mixer(cpu.checked)(x)
    expected = mixer(ssd.recurrent).double()(x.double())
    assert relative(found.double(), expected) < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 2, 90, 300])
def test_a_mixer_has_the_same_gradients(t: int, dtype: torch.dtype) -> None:
    torch.manual_seed(t)
    x, weights = torch.randn(3, t, 32), torch.randn(3, t, 32)

    def found(made: Mamba2, x: Tensor) -> dict[str, Tensor]:
        (made(x.requires_grad_()) * weights).sum().backward()
        return {"x": x.grad, **{name: part.grad for name, part in made.named_parameters()}}

    with torch.enable_grad():
        expected = found(mixer(ssd.recurrent).double(), x.double())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            mine = found(mixer(cpu.checked), x.clone())
    for name, right in expected.items():
        assert relative(mine[name], right) < {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype], name


@pytest.mark.parametrize("taps", [1, 2, 3, 7])
@pytest.mark.parametrize("t", [1, 5, 70])
def test_any_number_of_taps(taps: int, t: int) -> None:
    torch.manual_seed(t)
    x, weights, found = torch.randn(2, t, 32), torch.randn(2, t, 32), []
    with torch.enable_grad():
        for scan in (ssd.recurrent, cpu.checked):
            made = mixer(scan, taps)
            y = made(x.requires_grad_())
            found.append((y, *torch.autograd.grad((y * weights).sum(), [x, *made.parameters()])))
    for right, mine in zip(*found, strict=True):
        assert (mine - right).abs().max() < 1e-5 * max(right.abs().max(), 1e-3)


@pytest.mark.parametrize("t", [1, 3, 64, 130])
def test_backwards_is_what_is_turned_round(t: int) -> None:
    """With frames before the first, a state and the gradients of all; and it is put where it is asked for."""
    torch.manual_seed(t)
    made = mixer(cpu.checked)
    w, h = made.widths[1], made.widths[2]
    inputs = [torch.randn(2, t, sum(made.widths)), torch.randn(2, 3, w), torch.randn(2, h, 32, 32)]
    weights, found = torch.randn(2, t, made.widths[0]), []
    for backwards in (False, True):
        leaves = [part.clone().requires_grad_() for part in inputs]
        options = {"before": leaves[1], "initial_state": leaves[2], "return_state": True, "backwards": backwards}
        with torch.enable_grad():
            projected = leaves[0] if backwards else leaves[0].flip(1)
            y, state = made.mix(projected, **options)
            y = y if backwards else y.flip(1)
            total = (y * weights).sum() + state.square().sum()
            found.append([y, state, *torch.autograd.grad(total, [*leaves, *(made.dt_bias, made.A_log, made.D)])])
        wide = torch.zeros(2, t, 3 * made.widths[0])
        place = wide.split(made.widths[0], dim=-1)[1]
        made.mix(projected.detach(), **options, out=place)
        assert torch.equal(place if backwards else place.flip(1), y)
        assert not wide[..., : made.widths[0]].any()
        assert not wide[..., 2 * made.widths[0] :].any()
    for one, other in zip(*found, strict=True):  # nearly: softplus rounds by the place of a number in memory
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_dual_path_layer_gives_the_same(
    runs: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_gradients: bool
) -> None:
    """With its matrices multiplied beforehand; a few sequences at a time, the last block smaller than the others."""
    torch.manual_seed(0)
    made = DualPath(32, partial(Mamba2, 32, state=32, headdim=32, scan=triton.auto))
    for part in made.parameters():
        if part.dim() == 1:
            torch.nn.init.uniform_(part, 0.3, 1.0)
    expected, x, weights = copy.deepcopy(made).double(), torch.randn(2, 70, 5, 32), torch.randn(2, 70, 5, 32)
    monkeypatch.setattr(mamba2, "NATIVE_BLOCK", 3 * 70 * sum(made.time.forwards.mixer.widths))

    def found(layer: DualPath, x: Tensor) -> dict[str, Tensor]:
        y = layer(x.requires_grad_(with_gradients))
        if not with_gradients:
            return {"y": y}
        (y * weights).sum().backward()
        return {"y": y.detach(), "x": x.grad, **{name: part.grad for name, part in layer.named_parameters()}}

    with torch.set_grad_enabled(with_gradients):
        right = found(expected, x.double())
        assert not runs
        with loops.compiled(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            mine = found(made, x.clone())
    assert set(runs) == {dtype}
    assert mine["y"].dtype == torch.float32
    for name, one in right.items():
        assert relative(mine[name], one) < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype], name


@pytest.mark.parametrize("wider", [0, 1])
def test_the_directions_of_a_layer_may_differ_in_size(runs: list[torch.dtype], wider: int) -> None:
    sizes = iter([4 if way % 2 == wider else 2 for way in range(4)])
    made = DualPath(32, lambda: Mamba2(32, d_state=32, headdim=32, expand=next(sizes), scan=triton.auto))
    x = torch.randn(2, 70, 5, 32)
    right = copy.deepcopy(made).double()(x.double())
    with loops.compiled():
        assert relative(made(x), right) < 1e-5
    assert len(runs) == 4


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_gradients_go_through_the_memory(taps: int) -> None:
    x = torch.randn(3, 150, 32)
    with torch.enable_grad():
        pieces, whole = x.clone().requires_grad_(), x.clone().requires_grad_()
        made = mixer(cpu.checked, taps)
        first, memory = made.step(pieces[:, :70], keep=True)
        second, _ = made.step(pieces[:, 70:], memory)
        torch.cat((first, second), dim=1).square().sum().backward()
        mixer(ssd.recurrent, taps)(whole).square().sum().backward()
    assert relative(pieces.grad, whole.grad) < 1e-5


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_a_mixer_goes_on_from_either_memory(taps: int) -> None:
    x, plain, quick = torch.randn(3, 150, 32), mixer(ssd.chunked, taps), mixer(cpu.checked, taps)
    whole = plain(x)
    for first, second in ((quick, quick), (quick, plain), (plain, quick), (plain, plain)):
        for cut in (1, 2, 70):
            y, memory = first.step(x[:, :cut], keep=True)
            assert len(memory[0]) == taps - 1
            rest, _ = second.step(x[:, cut:], memory)
            assert relative(torch.cat((y, rest), dim=1), whole) < 1e-5


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The type of what the kernel was run on, for each time but its trial."""
    seen: list[torch.dtype] = []
    mix = cpu.mix
    for dtype in cpu.TOLERANCE:
        cpu.fault(dtype)

    def spied(projected: Tensor, *args: object, **options: object) -> object:
        seen.append(projected.dtype)
        return mix(projected, *args, **options)

    monkeypatch.setattr(cpu, "mix", spied)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_published_model_gives_its_reference(
    published_model: BSMamba2, published: dict[str, Tensor], runs: list[torch.dtype], dtype: torch.dtype
) -> None:
    spectrogram = torch.view_as_complex(published["input.spectrogram"])
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), loops.compiled():
        found = published_model.apply_to_spectrogram(spectrogram)
    assert set(runs) == {dtype}
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative(torch.view_as_real(found), published["output.spectrogram"]) < bound


def test_auto_takes_it_only_where_it_was_asked_for_and_fits(
    runs: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "_fault", "not here")  # what it does not take runs as it is written
    x, made = torch.randn(2, 5, 32), mixer(triton.auto)
    made(x)
    with loops.compiled(False):
        made(x)
    odd = Mamba2(32, d_state=32, headdim=16, scan=triton.auto)
    with loops.compiled():
        odd.double()(x.double())
        odd.float()(x)
        assert not runs
        made(x)
        with torch.enable_grad():
            made(x).sum().backward()
    assert runs == [torch.float32] * 2


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_model_trains_with_it(runs: list[torch.dtype], gradient_checkpointing: bool) -> None:
    config = dataclasses.replace(TINY, dim=32, d_state=32, headdim=32)
    batch = (torch.randn(2, 2, 4000), torch.randn(2, 2, 4000))

    def trained(**options: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = BSMamba2(config)
        with torch.enable_grad():
            Trainer(model, TrainConfig(steps=1, **options)).backward([batch])
        return {name: part.grad for name, part in model.named_parameters()}

    expected = trained()
    assert not runs
    found = trained(compile=True, gradient_checkpointing=gradient_checkpointing)
    assert len(runs) == 4 * (1 + gradient_checkpointing)  # mixers
    scale = max(part.abs().max() for part in expected.values())
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-6 * float(scale), msg=name)


def test_a_norm_gives_the_same() -> None:
    norm, x = RMSNorm(64), torch.randn(3, 7, 64)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x[1] *= 1e-4  # where the epsilon counts
    x[2] = 0
    with loops.compiled():
        assert relative(norm(x), norm.double()(x.double())) < 1e-6


# --- where it does not run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: lambda x: x.double()}, "does not take torch.float64"),
        ({0: lambda x: x[..., :16], 6: lambda x: x[:, :, :16]}, "headdim=16"),
        ({i: lambda x: x.to("meta") for i in range(7)}, "runs on a CPU"),
    ],
)
def test_what_it_does_not_take_is_said(change: dict, said: str) -> None:
    parts = problem(5)
    for i, changed in change.items():
        parts[i] = changed(parts[i])
    with torch.enable_grad(), pytest.raises(self_test.BackendError, match=said):
        cpu.scan(*parts[:6], initial_state=parts[6])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"before": torch.zeros(1, 3, 192)}, "before (1, 3, 192) must be (2, 3, 192)"),
        ({"before": torch.zeros(2, 2, 192)}, "before (2, 2, 192) must be"),
        ({"initial_state": torch.zeros(1, 4, 32, 32)}, "initial_state (1, 4, 32, 32) must be"),
        ({"out": torch.zeros(2, 8, 128)}, "out (2, 8, 128) must be (2, 9, 128)"),
        ({"out": torch.zeros(2, 128, 9).mT}, "side by side"),
        ({"out": torch.zeros(2, 9, 128, dtype=torch.bfloat16)}, "out must be torch.float32"),
    ],
)
def test_what_does_not_fit_what_was_projected_is_said(change: dict, said: str) -> None:
    made = mixer(cpu.checked)
    with pytest.raises(ValueError, match=re.escape(said)):
        made.mix(torch.randn(2, 9, sum(made.widths)), **change)


class Loud(Mamba2):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Negative(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize("place", ["mixer", "norm", "merge"])
def test_a_layer_with_a_forward_of_its_own_is_called(runs: list[torch.dtype], place: str) -> None:
    kind = Loud if place == "mixer" else Mamba2
    made, x = DualPath(32, partial(kind, 32, state=32, headdim=32)), torch.randn(2, 70, 5, 32)
    if place == "norm":
        made.time.backwards.norm = made.band.forwards.norm = Halved(32)
    if place == "merge":
        made.time.merge, made.band.merge = Negative(64, 32), Negative(64, 32)
    expected = made(x)
    for part in made.modules():
        if isinstance(part, Mamba2):
            part.scan = triton.auto
    with loops.compiled():
        torch.testing.assert_close(made(x), expected)
    assert len(runs) == 4


def test_autocast_leaves_float64_alone(runs: list[torch.dtype]) -> None:
    made = DualPath(32, partial(Mamba2, 32, state=32, headdim=32, scan=triton.auto)).double()
    x = torch.randn(1, 9, 3, 32, dtype=torch.float64)
    expected = made(x)
    with loops.compiled(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(x), expected)
    assert not runs
    assert mamba2.matmul_dtype(x.to("meta")) == torch.float64


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No trial has been made, before and after."""
    cpu.fault.cache_clear()
    self_test._said.clear()
    yield
    cpu.fault.cache_clear()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_is_tried_in_any_mode(mode: type, runs: list[torch.dtype], forgotten: None) -> None:
    with mode(), loops.compiled():
        mixer(triton.auto)(torch.randn(2, 9, 32))
    assert len(runs) == 2 + 1, "either way in the trial, then in use"
    assert cpu.fault.cache_info().currsize == 1
    assert cpu.fault(torch.float32) is None


class Wrong:
    """The operators with a planted fault: one of the inputs is one per cent too large, or a switch is off."""

    def __init__(self, name: str, place: int) -> None:
        self.made, self.name, self.place = cpu.operators(), name, place

    def __getattr__(self, name: str) -> object:
        real = getattr(self.made, name)

        def wrong(*args: object) -> object:
            right = args[self.place]
            spoilt = False if isinstance(right, bool) else right * 1.01
            return real(*(spoilt if i == self.place else arg for i, arg in enumerate(args)))

        return wrong if name == self.name else real


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("scan", 1), ("scan", 5), ("mix", 2), ("mix", 5), ("mix", 11), ("rms_norm", 1)),
        *(("scan_backward", i) for i in (0, 1, 3, 7)),
        *(("mix_backward", i) for i in (0, 2, 4, 7, 9, 13)),
    ],
)
def test_wrong_numbers_are_found_out_and_told_once(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, name: str, place: int
) -> None:
    wrong = Wrong(name, place)
    monkeypatch.setattr(cpu, "operators", lambda: wrong)
    x, made = torch.randn(2, 9, 32), mixer(triton.auto)
    expected = made(x)
    monkeypatch.setattr(loops, "_fault", "not here")  # the loops are not compiled either
    with loops.compiled():
        with pytest.warns(RuntimeWarning, match="native kernel gives wrong numbers"):
            assert torch.equal(made(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            made(x)
    with pytest.raises(self_test.BackendError, match="wrong numbers"):
        mixer(cpu.checked)(x)
    assert "wrong numbers" in next(row.why for row in triton.backends() if row.name == "native")


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("script", "why", "mend"),
    [
        (None, "there is no C\\+\\+ compiler", "apt install g\\+\\+"),
        ("echo 'x.cpp: error: no such thing' >&2; exit 1", "fails to build it .*error: no such thing", "g\\+\\+ 11"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "cannot be loaded", "remove the file"),
    ],
)
def test_a_compiler_that_is_not_there_or_fails(
    monkeypatch: pytest.MonkeyPatch, nothing_built: Path, script: str | None, why: str, mend: str
) -> None:
    compiler = nothing_built / "compiler"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(self_test.BackendError, match=f"{why}.*To mend this: .*{mend}"):
        cpu.operators.__wrapped__()
    assert {path.suffix for path in nothing_built.iterdir()} <= {"", ".so"}, "what was half made is gone"


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, nothing_built: Path) -> None:
    (nothing_built / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(nothing_built / "file" / "below"))
    with pytest.raises(self_test.BackendError, match=r"cannot be written.*TORCH_EXTENSIONS_DIR"):
        cpu.operators.__wrapped__()


def test_on_another_system_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(self_test.BackendError, match="Linux only so far, not on darwin"):
        cpu.operators.__wrapped__()


def test_the_small_presets_sizes_fit() -> None:
    for name in ("small", "compact", "paper"):
        config = ModelConfig.preset(name)
        assert not cpu.misfits(torch.device("cpu"), torch.float32, config.headdim, config.d_state)
