"""mamba-ssm's own kernels, by Triton's interpreter or on a GPU, against ours in float64: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from interpreter import DEVICE, ON_GPU, on_device, ops, triton  # isort: skip  (sets its switches before triton is imported)

import pytest
import torch
from test_ssd import everything, problem
from tiny_model import TINY, relative
from torch import Tensor
from torch.nn import functional

from bsmamba2 import BSMamba2, load_checkpoint, save_checkpoint, ssd
from bsmamba2.kernels import backends, resolve_backend
from bsmamba2.mamba2 import Mamba2, RMSNorm

BOUND = triton.TOLERANCE[torch.float32] if ON_GPU else 1e-5  # a GPU multiplies float32 in TF32
scan = on_device(triton.scan)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float = BOUND) -> None:
    assert found.keys() == expected.keys()
    for name, part in found.items():
        assert part.isfinite().all(), name
        assert relative(part, expected[name]) < bound, f"{name} is off by {relative(part, expected[name]):.1e}"


def assert_same_scan(scan: Callable, inputs: list[Tensor]) -> None:
    assert_close(everything(scan, inputs, torch.float32), everything(ssd.recurrent, inputs, torch.float64))


# --- the scan ---------------------------------------------------------------------------------------------


def raw(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    initial_state: Tensor,
    return_state: bool,
    wrong: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`mamba_chunk_scan_combined` called without our adapter, with the bias and softplus of dt inside the kernel."""
    bias = torch.linspace(-4, -2, dt.shape[-1])
    before = dt + torch.log(-torch.expm1(-dt)) - bias
    B, C = B[:, :, None], C[:, :, None]
    return on_device(ops.mamba_chunk_scan_combined)(
        x,
        before,
        A,
        B,
        C,
        32,
        D=D,
        dt_bias=bias * wrong,
        dt_softplus=True,
        initial_states=initial_state,
        return_final_states=return_state,
    )


@pytest.mark.parametrize(
    ("t", "h", "b"),
    [(1, 1, 1), (62, 2, 2), (64, 1, 1), (100, 2, 1), (300, 1, 1)],
    ids=["one frame", "less than a chunk", "a chunk", "two chunks", "two long chunks"],
)
def test_the_adapter_is_the_scan(t: int, h: int, b: int) -> None:
    assert_same_scan(scan, problem(t, h, b=b, p=8, n=16))


@pytest.mark.parametrize("dt", [1e-5, 10.0])
@pytest.mark.parametrize("decay", [1e-3, 100.0])
def test_small_and_large_steps_and_decays(dt: float, decay: float) -> None:
    assert_same_scan(scan, problem(80, 1, b=1, dt=dt, decay=decay))


def test_a_large_batch_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "MAX_BLOCKS", 2)
    assert_same_scan(scan, problem(20, 1, b=5))


def test_views_of_a_packed_projection_with_the_frames_outermost() -> None:
    x, dt, A, B, C, D, start = problem(70, p=4, n=6)
    expected = ssd.recurrent(x, dt, A, B, C, D, initial_state=start)
    packed = torch.cat([x.flatten(2), B, C, dt], -1).float().transpose(0, 1).contiguous().transpose(0, 1)
    parts = packed.requires_grad_().split([8, 6, 6, 2], -1)
    assert not parts[0].is_contiguous()
    found = scan(parts[0].unflatten(-1, (2, 4)), parts[3], A, parts[1], parts[2], D, initial_state=start)
    assert relative(found.detach(), expected) < BOUND
    found.square().sum().backward()
    wide = packed.detach().double().requires_grad_()
    x, B, C, dt = wide.split([8, 6, 6, 2], -1)
    ssd.recurrent(x.unflatten(-1, (2, 4)), dt, A, B, C, D, initial_state=start).square().sum().backward()
    assert relative(packed.grad, wide.grad) < BOUND


def test_zeros_stay_zeros() -> None:
    inputs = [torch.zeros_like(part) if i in (0, 3, 4, 6) else part for i, part in enumerate(problem(20, b=1))]
    found = everything(scan, inputs, torch.float32)
    assert all(part.isfinite().all() for part in found.values())
    assert not found["y"].any()


def test_the_kernel_as_it_is() -> None:
    assert_same_scan(raw, problem(70, 1, b=1))


def test_a_bias_wrong_by_a_hundredth_is_noticed() -> None:
    with pytest.raises(AssertionError, match="is off by"):
        assert_same_scan(partial(raw, wrong=1.01), problem(70, 1, b=1))


def test_the_self_test_accepts_the_kernel() -> None:
    assert triton.self_test_error(DEVICE, torch.float32) is None
    rows = {row.name: row for row in backends(DEVICE)}
    assert rows["triton"].usable
    assert rows["triton"].version.startswith("mamba-ssm ")
    assert not rows["causal-conv1d"].usable
    mixer = Mamba2(32).to(DEVICE)
    assert (resolve_backend(mixer, "auto")[0] == "triton") == ON_GPU  # not on a CPU, even though it runs
    assert resolve_backend(mixer, "triton")[0] == "triton"


# --- the gated norm and the whole mixer -------------------------------------------------------------------


def test_gated_norm() -> None:
    g = torch.Generator().manual_seed(0)
    x, z, dy = (torch.randn(2, 9, 48, generator=g).double() for _ in range(3))
    weight = torch.rand(48, generator=g).double()

    def ours(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        norm = RMSNorm(48)
        del norm.weight
        norm.weight = weight
        return norm(x * functional.silu(z))

    def theirs(x: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return on_device(ops.rmsnorm_fn)(x, weight, None, z=z, eps=1e-5, norm_before_gate=False)

    def results(norm: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        parts = [part.to(dtype, copy=True).requires_grad_() for part in (x, z, weight)]
        y = norm(*parts)
        named = zip(("y", "dx", "dz", "dweight"), (y, *torch.autograd.grad(y, parts, dy.to(dtype))), strict=True)
        return {name: part.detach() for name, part in named}

    assert_close(results(theirs, torch.float32), results(ours, torch.float64))


@pytest.fixture
def mixer() -> Mamba2:
    torch.manual_seed(0)
    layer = Mamba2(16, d_state=8, headdim=16, expand=2)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.D.uniform_(-1, 1)
        layer.dt_bias.uniform_(-4, -1)
    return layer


def mixer_results(forward: Callable[[Tensor], Tensor], mixer: Mamba2, frames: int = 70) -> dict[str, Tensor]:
    """Output and gradients by the input and every parameter."""
    g = torch.Generator().manual_seed(1)
    dtype = mixer.D.dtype
    x, dy = (torch.randn(1, frames, 16, generator=g).to(dtype) for _ in range(2))
    y = forward(x.requires_grad_())
    parts = {"input": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad(y, list(parts.values()), dy)
    return {"y": y.detach(), **{f"d {name}": part for name, part in zip(parts, gradients, strict=True)}}


def fused_mixer(mixer: Mamba2, x: Tensor, *, wrong: float = 1.0) -> Tensor:
    """The mixer as one call of mamba-ssm, with our weights."""
    return on_device(ops.mamba_split_conv1d_scan_combined)(
        mixer.in_proj(x),
        mixer.conv1d.weight[:, 0],
        mixer.conv1d.bias,
        mixer.dt_bias * wrong,
        -mixer.A_log.exp(),
        mixer.D,
        64,
        rmsnorm_weight=mixer.norm.weight,
        rmsnorm_eps=1e-5,
        outproj_weight=mixer.out_proj.weight,
        headdim=16,
        norm_before_gate=False,
    )


def in_float64(mixer: Mamba2) -> dict[str, Tensor]:
    wide = Mamba2(16, d_state=8, headdim=16, expand=2, scan=ssd.recurrent).double()
    wide.load_state_dict(mixer.state_dict())
    return mixer_results(wide, wide)


def test_the_fused_mixer_is_our_mixer(mixer: Mamba2) -> None:
    assert_close(mixer_results(partial(fused_mixer, mixer), mixer), in_float64(mixer))


def test_our_mixer_with_the_fused_scan(mixer: Mamba2) -> None:
    mixer.scan = scan
    assert_close(mixer_results(mixer, mixer), in_float64(mixer))


def test_a_mixer_wrong_by_a_hundredth_is_noticed(mixer: Mamba2) -> None:
    with pytest.raises(AssertionError, match="is off by"):
        assert_close(mixer_results(partial(fused_mixer, mixer, wrong=1.01), mixer), in_float64(mixer))


def test_a_checkpoint_gives_the_same_under_the_fused_scan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = BSMamba2(TINY, scan="chunked").eval()
    save_checkpoint(saved, tmp_path / "model.safetensors")
    audio = torch.randn(1, 2, 100)
    with torch.no_grad():
        found = load_checkpoint(tmp_path / "model.safetensors", scan=scan)(audio)
        assert relative(found, saved(audio)) < BOUND
