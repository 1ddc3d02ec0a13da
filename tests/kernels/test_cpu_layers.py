"""Layers that run the C++ kernel: outputs, states and gradients of the plain ones, and a fault is noticed."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_model import TINY, relative
from torch import Tensor

from bsmamba2 import BSMamba2, ssd
from bsmamba2.dual_path import DualPath
from bsmamba2.kernels import accelerate, backends, cpu, cpu_layers, restore, self_test
from bsmamba2.kernels.blockwise import matmul_dtype
from bsmamba2.mamba2 import Mamba2, RMSNorm
from bsmamba2.train import TrainConfig, Trainer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")
AMX = Path("/proc/cpuinfo").is_file() and "amx_bf16" in Path("/proc/cpuinfo").read_text()
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not AMX, reason="this CPU has no AMX")),
]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def mixer(backend: str, d_conv: int = 4, scan: ssd.Scan = ssd.chunked) -> Mamba2:
    torch.manual_seed(0)
    made = Mamba2(32, d_state=32, headdim=32, d_conv=d_conv, scan=scan).eval()
    torch.nn.init.uniform_(made.norm.weight, 0.5, 1.5)
    accelerate(made, backend)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [1, 2, 90, 300])
def test_a_mixer_gives_the_same(t: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, t, 32)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = mixer("cpu")(x)
    expected = mixer("plain", scan=ssd.recurrent).double()(x.double())
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
        expected = found(mixer("plain", scan=ssd.recurrent).double(), x.double())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            mine = found(mixer("cpu"), x.clone())
    for name, right in expected.items():
        assert relative(mine[name], right) < {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype], name


@pytest.mark.parametrize("taps", [1, 2, 3, 7])
@pytest.mark.parametrize("t", [1, 5, 70])
def test_any_number_of_taps(taps: int, t: int) -> None:
    torch.manual_seed(t)
    x, weights, found = torch.randn(2, t, 32), torch.randn(2, t, 32), []
    with torch.enable_grad():
        for made in (mixer("plain", taps, ssd.recurrent), mixer("cpu", taps)):
            y = made(x.requires_grad_())
            found.append((y, *torch.autograd.grad((y * weights).sum(), [x, *made.parameters()])))
    for right, mine in zip(*found, strict=True):
        assert (mine - right).abs().max() < 1e-5 * max(right.abs().max(), 1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_dual_path_layer_gives_the_same(
    runs: list[torch.dtype], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, with_gradients: bool
) -> None:
    """With its matrices multiplied beforehand; a few sequences at a time, the last block smaller than the others."""
    torch.manual_seed(0)
    made = DualPath(32, partial(Mamba2, 32, d_state=32, headdim=32))
    for part in made.parameters():
        if part.dim() == 1:
            torch.nn.init.uniform_(part, 0.3, 1.0)
    expected, x, weights = copy.deepcopy(made).double(), torch.randn(2, 70, 5, 32), torch.randn(2, 70, 5, 32)
    monkeypatch.setattr(cpu_layers, "CPU_BLOCK", 3 * 70 * sum(made.time.forwards.mixer.proj_sizes))

    def found(layer: DualPath, x: Tensor) -> dict[str, Tensor]:
        y = layer(x.requires_grad_(with_gradients))
        if not with_gradients:
            return {"y": y}
        (y * weights).sum().backward()
        return {"y": y.detach(), "x": x.grad, **{name: part.grad for name, part in layer.named_parameters()}}

    with torch.set_grad_enabled(with_gradients):
        right = found(expected, x.double())
        assert not runs
        accelerate(made, "cpu")
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            mine = found(made, x.clone())
    assert set(runs) == {dtype}
    assert mine["y"].dtype == torch.float32
    for name, one in right.items():
        assert relative(mine[name], one) < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype], name


@pytest.mark.parametrize("wider", [0, 1])
def test_the_directions_of_a_layer_may_differ_in_size(runs: list[torch.dtype], wider: int) -> None:
    sizes = iter([4 if way % 2 == wider else 2 for way in range(4)])
    made = DualPath(32, lambda: Mamba2(32, d_state=32, headdim=32, expand=next(sizes)))
    x = torch.randn(2, 70, 5, 32)
    right = copy.deepcopy(made).double()(x.double())
    accelerate(made, "cpu")
    assert relative(made(x), right) < 1e-5
    assert len(runs) == 4


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_gradients_go_through_the_state(taps: int) -> None:
    x = torch.randn(3, 150, 32)
    with torch.enable_grad():
        pieces, whole = x.clone().requires_grad_(), x.clone().requires_grad_()
        made = mixer("cpu", taps)
        first, state = made.step(pieces[:, :70])
        second, _ = made.step(pieces[:, 70:], state)
        torch.cat((first, second), dim=1).square().sum().backward()
        mixer("plain", taps, ssd.recurrent)(whole).square().sum().backward()
    assert relative(pieces.grad, whole.grad) < 1e-5


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_a_mixer_continues_from_either_state(taps: int) -> None:
    x, plain, quick = torch.randn(3, 150, 32), mixer("plain", taps), mixer("cpu", taps)
    whole = plain(x)
    for first, second in ((quick, quick), (quick, plain), (plain, quick), (plain, plain)):
        for cut in (1, 2, 70):
            y, state = first.step(x[:, :cut])
            assert state.conv_state.shape[1] == taps - 1
            rest, _ = second.step(x[:, cut:], state)
            assert relative(torch.cat((y, rest), dim=1), whole) < 1e-5


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The type of what the kernel was run on, for each time but its trial."""
    seen: list[torch.dtype] = []
    conv_scan_gate = cpu.conv_scan_gate
    for dtype in cpu.TOLERANCE:
        cpu.self_test_error(dtype)

    def spied(projected: Tensor, *args: object, **options: object) -> object:
        seen.append(projected.dtype)
        return conv_scan_gate(projected, *args, **options)

    monkeypatch.setattr(cpu, "conv_scan_gate", spied)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_published_model_gives_its_reference(
    published_model: BSMamba2, published: dict[str, Tensor], runs: list[torch.dtype], dtype: torch.dtype
) -> None:
    spectrogram = torch.view_as_complex(published["input.spectrogram"])
    accelerate(published_model, "plain")
    published_model.layers[0].time.forwards.mixer.scan = ssd.recurrent  # one of the plain forms is replaced, too
    assert not published_model.config.headdim % 32
    accelerate(published_model, "cpu", dtype=dtype)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = published_model.apply_to_spectrogram(spectrogram)
    assert set(runs) == {dtype}
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert relative(torch.view_as_real(found), published["output.spectrogram"]) < bound


def test_what_it_does_not_take_runs_blockwise(runs: list[torch.dtype]) -> None:
    x, made = torch.randn(2, 5, 32), mixer("cpu")
    odd = Mamba2(32, d_state=32, headdim=16)
    assert accelerate(odd).backend == "chunked"
    odd(x)
    own = mixer("plain", scan=lambda *inputs, **options: ssd.recurrent(*inputs, **options))
    assert accelerate(own).backend == "chunked"
    own(x)
    made.double()(x.double())
    made.float()
    assert not runs
    made(x)
    with torch.enable_grad():
        made(x).sum().backward()
    restore(made)
    made(x)
    assert runs == [torch.float32] * 2


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_model_trains_with_it(runs: list[torch.dtype], gradient_checkpointing: bool) -> None:
    config = dataclasses.replace(TINY, dim=32, d_state=32, headdim=32)
    batch = (torch.randn(2, 2, 4000), torch.randn(2, 2, 4000))

    def trained(backend: str, **options: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = BSMamba2(config)
        accelerate(model, backend)
        with torch.enable_grad():
            Trainer(model, TrainConfig(steps=1, **options)).backward([batch])
        return {name: part.grad for name, part in model.named_parameters()}

    expected = trained("plain")
    assert not runs
    found = trained("cpu", gradient_checkpointing=gradient_checkpointing)
    assert len(runs) == 4 * (1 + gradient_checkpointing)  # mixers
    scale = max(part.abs().max() for part in expected.values())
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-6 * float(scale), msg=name)


def test_a_norm_gives_the_same() -> None:
    weight, x = torch.rand(64) + 0.5, torch.randn(3, 7, 64)
    x[1] *= 1e-4  # where the epsilon counts
    x[2] = 0
    norm = RMSNorm(64)
    norm.weight.copy_(weight)
    assert relative(cpu.rms_norm(x, weight, 1e-5), norm.double()(x.double())) < 1e-6


# --- where it does not run --------------------------------------------------------------------------------


class Loud(Mamba2):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Negative(torch.nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize(("place", "used"), [("mixer", 0), ("norm", 4), ("merge", 4)])
def test_a_layer_with_a_forward_of_its_own_is_called(runs: list[torch.dtype], place: str, used: int) -> None:
    kind = Loud if place == "mixer" else Mamba2
    made, x = DualPath(32, partial(kind, 32, d_state=32, headdim=32)), torch.randn(2, 70, 5, 32)
    if place == "norm":
        made.time.backwards.norm = made.band.forwards.norm = Halved(32)
    if place == "merge":
        made.time.merge, made.band.merge = Negative(64, 32), Negative(64, 32)
    expected = made(x)
    accelerate(made)
    torch.testing.assert_close(made(x), expected)
    assert len(runs) == used


def test_autocast_leaves_float64_alone(runs: list[torch.dtype]) -> None:
    made = DualPath(32, partial(Mamba2, 32, d_state=32, headdim=32)).double()
    x = torch.randn(1, 9, 3, 32, dtype=torch.float64)
    expected = made(x)
    accelerate(made)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(x), expected)
    assert not runs
    assert matmul_dtype(x.to("meta")) == torch.float64


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No trial has been made, before and after."""
    cpu.self_test_error.cache_clear()
    self_test._warned.clear()
    yield
    cpu.self_test_error.cache_clear()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_it_is_tried_in_any_mode(mode: type, runs: list[torch.dtype], forgotten: None) -> None:
    with mode():
        made = Mamba2(32, d_state=32, headdim=32)
        accelerate(made)
        made(torch.randn(2, 9, 32))
    assert len(runs) == 2 + 1, "either way in the trial, then in use"
    assert cpu.self_test_error.cache_info().currsize == 1
    assert cpu.self_test_error(torch.float32) is None


class Wrong:
    """The operators with a planted fault: one of the inputs is one per cent too large, or a switch is off."""

    def __init__(self, name: str, place: int) -> None:
        self.made, self.name, self.place = cpu.load_extension(), name, place

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
        *(
            ("scan", 1),
            ("scan", 5),
            ("conv_scan_gate", 2),
            ("conv_scan_gate", 5),
            ("conv_scan_gate", 11),
            ("rms_norm", 1),
        ),
        *(("scan_backward", i) for i in (0, 1, 3, 7)),
        *(("conv_scan_gate_backward", i) for i in (0, 2, 4, 7, 9, 13)),
    ],
)
def test_wrong_numbers_are_found_out_and_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, forgotten: None, name: str, place: int
) -> None:
    ready = mixer("cpu")  # before the fault
    cpu.self_test_error.cache_clear()
    wrong = Wrong(name, place)
    monkeypatch.setattr(cpu, "load_extension", lambda: wrong)
    x, made = torch.randn(2, 9, 32), mixer("plain")
    chosen = accelerate(made)
    assert chosen.backend == "chunked"
    assert "C++ kernel gives wrong numbers" in chosen.reason
    expected = made(x)
    with pytest.warns(RuntimeWarning, match=r"C\+\+ kernel gives wrong numbers"):
        assert torch.equal(ready(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(x)
    with pytest.raises(self_test.BackendError, match="wrong numbers"):
        mixer("cpu")
    assert "wrong numbers" in str(cpu.self_test_error(torch.float32))
    assert "wrong numbers" in next(row.reason for row in backends() if row.name == "cpu")
