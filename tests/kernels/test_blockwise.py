"""Layers block by block: the numbers of the plain ones, however frames and sequences are cut."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_model import relative
from torch import Tensor

from bsmamba2.dual_path import BidirectionalBlock, DualPath
from bsmamba2.kernels import accelerate, blockwise
from bsmamba2.mamba2 import Mamba2, RMSNorm, causal_conv1d_silu


def layer() -> DualPath:
    torch.manual_seed(0)
    made = DualPath(16, partial(Mamba2, 16, d_state=8, headdim=8)).double()
    for weight in made.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.3, 1.0)
    return made


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen frames and three sequences at a time."""
    monkeypatch.setattr(blockwise, "FRAMES_PER_CHUNK", 16)
    monkeypatch.setattr(blockwise, "BLOCK", 3 * 16 * 16)


def in_segments(model: DualPath, x: Tensor, frames: int, ahead: int) -> Tensor:
    outputs, state = [], None
    for start in range(0, x.shape[1], frames):
        part = x[:, start : start + frames + ahead]
        y, state = model.step(part, state, min(frames, part.shape[1]))
        outputs.append(y[:, :frames])
    return torch.cat(outputs, dim=1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_layer_gives_the_same(with_gradients: bool) -> None:
    plain, fast = layer(), layer()
    accelerate(fast, "chunked")
    x, weights = torch.randn(2, 50, 4, 16).double(), torch.randn(2, 50, 4, 16)

    def results(model: DualPath) -> dict[str, Tensor]:
        inputs = x.clone().requires_grad_(with_gradients)
        y = model(inputs)
        if not with_gradients:
            return {"y": y}
        model.zero_grad()
        (y * weights).sum().backward()
        return {"y": y.detach(), "x": inputs.grad, **{name: part.grad for name, part in model.named_parameters()}}

    with torch.set_grad_enabled(with_gradients):
        expected, found = results(plain), results(fast)
    for name, part in expected.items():
        assert relative(found[name], part) < 1e-11, name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("frames", "ahead"), [(20, 0), (20, 7), (33, 40), (50, 0)])
def test_segments_give_the_same(frames: int, ahead: int) -> None:
    """Eight sequences in blocks of three, each with its own state."""
    plain, fast, x = layer(), layer(), torch.randn(2, 50, 4, 16).double()
    accelerate(fast, "chunked")
    with torch.no_grad():
        assert relative(in_segments(fast, x, frames, ahead), in_segments(plain, x, frames, ahead)) < 1e-11


def test_a_state_of_the_wrong_sequences_is_noticed(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast, x = layer(), layer(), torch.randn(2, 50, 4, 16).double()
    accelerate(fast, "chunked")
    step = BidirectionalBlock.step

    def exchanged(self: BidirectionalBlock, x: Tensor, state: object, frames: int) -> object:
        turned = None if state is None else type(state)(*(part.flip(0) for part in state))
        return step(self, x, turned, frames)

    with torch.no_grad():
        expected = in_segments(plain, x, 20, 7)
        monkeypatch.setattr(BidirectionalBlock, "step", exchanged)
        assert relative(in_segments(fast, x, 20, 7), expected) > 1e-3


@pytest.mark.parametrize("sizes", [(1, 5, 16), (7, 300, 64)])
def test_sequences_may_be_read_a_few_at_a_time(sizes: tuple[int, ...]) -> None:
    seen: list[int] = []

    def double(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x

    x = torch.randn(sizes)
    assert torch.equal(blockwise.block_by_block(double, x, 2), 2 * x)
    assert sum(seen) == len(x)
    assert max(seen) <= 2


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("frames", [1, 3, 20])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_convolution_is_the_plain_one(taps: int, frames: int, past: bool, with_gradients: bool) -> None:
    shapes = [(2, frames, 5), (5, 1, taps), (5,), (2, taps - 1, 5)][: 3 + past]
    parts = [torch.randn(shape).double().requires_grad_(with_gradients) for shape in shapes]
    dy = torch.randn(2, frames, 5).double()
    with torch.set_grad_enabled(with_gradients):
        expected = causal_conv1d_silu(*parts)
        first = [part.transpose(0, 1) if i in (0, 3) else part for i, part in enumerate(parts)]
        found = blockwise.causal_conv1d_silu(*first).transpose(0, 1)
    assert relative(found.detach(), expected.detach()) < 1e-12
    if with_gradients:
        pairs = zip(torch.autograd.grad(found, parts, dy), torch.autograd.grad(expected, parts, dy), strict=True)
        assert all(torch.allclose(mine, right, rtol=1e-10, atol=1e-12) for mine, right in pairs)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_gate_norm_and_projection_are_the_plain_ones(with_gradients: bool) -> None:
    norm, linear = RMSNorm(12).double(), torch.nn.Linear(12, 5, bias=False).double()
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, z = torch.randn(7, 2, 12).double(), torch.randn(7, 2, 12).double()
    with torch.set_grad_enabled(with_gradients):
        found = blockwise.gate_norm_linear(x, z, norm, linear)
    assert relative(found.detach(), linear(norm(x * torch.nn.functional.silu(z))).detach()) < 1e-12
