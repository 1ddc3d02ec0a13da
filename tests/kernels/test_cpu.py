"""The C++ kernel: the numbers of the recurrence in float64 where it runs; elsewhere the reason and the fix."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import relative
from torch import Tensor

from bsmamba2 import ModelConfig, ssd
from bsmamba2.kernels import BackendError, accelerate, cpu
from bsmamba2.mamba2 import Mamba2

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


@pytest.mark.parametrize("t", [1, 3, 64, 130])
def test_backwards_is_what_is_turned_round(t: int) -> None:
    """With frames before the first, a state and the gradients of all; and it is put where it is asked for."""
    torch.manual_seed(t)
    made = Mamba2(32, d_state=32, headdim=32)
    accelerate(made, "cpu")
    w, h = made.proj_sizes[1], made.proj_sizes[2]
    inputs = [torch.randn(2, t, sum(made.proj_sizes)), torch.randn(2, 3, w), torch.randn(2, h, 32, 32)]
    weights, found = torch.randn(2, t, made.proj_sizes[0]), []
    for backwards in (False, True):
        leaves = [part.clone().requires_grad_() for part in inputs]
        options = {"conv_state": leaves[1], "initial_state": leaves[2], "return_state": True, "backwards": backwards}
        with torch.enable_grad():
            projected = leaves[0] if backwards else leaves[0].flip(1)
            y, state = made.conv_scan_gate(projected, **options)
            y = y if backwards else y.flip(1)
            total = (y * weights).sum() + state.square().sum()
            found.append([y, state, *torch.autograd.grad(total, [*leaves, *(made.dt_bias, made.A_log, made.D)])])
        wide = torch.zeros(2, t, 3 * made.proj_sizes[0])
        place = wide.split(made.proj_sizes[0], dim=-1)[1]
        made.conv_scan_gate(projected.detach(), **options, out=place)
        assert torch.equal(place if backwards else place.flip(1), y)
        assert not wide[..., : made.proj_sizes[0]].any()
        assert not wide[..., 2 * made.proj_sizes[0] :].any()
    for one, other in zip(*found, strict=True):  # nearly: softplus rounds by the place of a number in memory
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


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
    with torch.enable_grad(), pytest.raises(BackendError, match=said):
        cpu.scan(*parts[:6], initial_state=parts[6])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv_state": torch.zeros(1, 3, 192)}, "conv_state (1, 3, 192) must be (2, 3, 192)"),
        ({"conv_state": torch.zeros(2, 2, 192)}, "conv_state (2, 2, 192) must be"),
        ({"initial_state": torch.zeros(1, 4, 32, 32)}, "initial_state (1, 4, 32, 32) must be"),
        ({"out": torch.zeros(2, 8, 128)}, "out (2, 8, 128) must be (2, 9, 128)"),
        ({"out": torch.zeros(2, 128, 9).mT}, "contiguous"),
        ({"out": torch.zeros(2, 9, 128, dtype=torch.bfloat16)}, "out must be torch.float32"),
    ],
)
def test_what_does_not_fit_what_was_projected_is_said(change: dict, said: str) -> None:
    made = Mamba2(32, d_state=32, headdim=32)
    accelerate(made, "cpu")
    with pytest.raises(ValueError, match=re.escape(said)):
        made.conv_scan_gate(torch.randn(2, 9, sum(made.proj_sizes)), **change)


# --- the operators as they are called ---------------------------------------------------------------------


def operator_inputs(dtype: torch.dtype) -> dict[str, list]:
    """Valid arguments of every operator, by its name."""
    b, t, h, p, n, taps = 2, 5, 2, 32, 64, 4
    inner, w = h * p, h * p + 2 * n
    x, dt, A, D = torch.zeros(b, t, inner, dtype=dtype), torch.ones(b, t, h), -torch.ones(h), torch.ones(h)
    B, C, state = x.new_zeros(b, t, n), x.new_zeros(b, t, n), torch.zeros(b, n, inner)
    mixer = [
        x,
        x.new_zeros(b, t, w),
        dt,
        A,
        D,
        torch.zeros(taps, w),
        torch.zeros(w),
        x.new_zeros(b, taps - 1, w),
        state,
    ]
    return {
        "scan": [x, dt, A, B, C, D, state, 64, True],
        "scan_backward": [x, state, x, dt, A, B, C, D, state, 64],
        "conv_scan_gate": [*mixer, 1e-5, 64, False, True, x.clone()],
        "conv_scan_gate_backward": [x, state, *mixer, 1e-5, 64, False, x.clone(), mixer[1].clone()],
        "rms_norm": [x, torch.ones(inner), 1e-5],
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", operator_inputs(torch.float32))
def test_an_operator_checks_every_tensor(name: str, dtype: torch.dtype) -> None:
    operator = getattr(cpu.load_extension(), name)
    inputs = operator_inputs(dtype)[name]
    operator(*inputs)
    faults = (
        lambda part: part[..., :-1],
        lambda part: part[..., :-1].contiguous(),
        lambda part: part[:1].contiguous() if len(part) > 1 else part[:0],
        lambda part: part[..., None],
        lambda part: torch.cat((part, part), dim=-1),
        lambda part: torch.stack((part, part), dim=-1)[..., 0],  # every other number
        lambda part: part.double(),
        lambda part: part.half(),
        lambda part: part.bfloat16() if part.dtype == torch.float32 else part.float(),
        lambda part: part.flatten()[0],
    )
    norm_of_fewer_rows = (name == "rms_norm", 0)
    for place, right in enumerate(inputs):
        if not isinstance(right, Tensor):
            continue
        for number, fault in enumerate(faults):
            if norm_of_fewer_rows == (True, place) and number in (2, 8):
                continue  # any number of rows, of either type, is right
            wrong = [fault(part) if i == place else part for i, part in enumerate(inputs)]
            with pytest.raises(RuntimeError, match="bsmamba2: "):
                operator(*wrong)


@pytest.mark.parametrize("width", [0, 1, 16, 31, 33, 48])
def test_a_norm_of_any_other_width_is_an_error(width: int) -> None:
    with pytest.raises(RuntimeError, match=f"width of a norm is {width}, and must be a multiple of 32"):
        cpu.rms_norm(torch.ones(3, width), None, 1e-5)


@pytest.mark.parametrize(("place", "value"), [(7, 0), (7, -1), (7, 10**9)])
def test_a_chunk_that_no_buffer_holds_is_an_error(place: int, value: int) -> None:
    inputs = operator_inputs(torch.float32)["scan"]
    inputs[place] = value
    with pytest.raises(RuntimeError, match="a chunk of 1 to 1,024"):
        cpu.load_extension().scan(*inputs)


@pytest.mark.parametrize(("p", "n", "frames"), [(16, 32, 3), (32, 16, 3), (32, 0, 3), (32, 32, 0)])
def test_sizes_that_no_register_holds_are_an_error(p: int, n: int, frames: int) -> None:
    x, dt, B = torch.zeros(1, frames, 2 * p), torch.zeros(1, frames, 2), torch.zeros(1, frames, n)
    with pytest.raises(RuntimeError, match="bsmamba2: "):
        cpu.load_extension().scan(x, dt, -torch.ones(2), B, B, torch.ones(2), None, 64, True)


def test_the_small_presets_sizes_fit() -> None:
    for name in ("small", "compact", "paper"):
        config = ModelConfig.preset(name)
        assert not cpu.unsupported_reasons(torch.device("cpu"), torch.float32, config.headdim, config.d_state)
