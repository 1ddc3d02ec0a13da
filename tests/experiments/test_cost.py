"""The cost of a model against PyTorch's own counters, and against memory as it is used.

`tests/gpu/test_tracked_cost.py` compares it with PyTorch's tracker, with the fused scan on fake CUDA tensors.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.experiments.cost import GPUS, activation_bytes, backward_flops, forward_flops, training_cost
from bsmamba2.kernels import accelerate
from bsmamba2.kernels.blockwise import BlockwiseMamba2
from bsmamba2.losses import bsmamba2_loss

# Several chunks along time, wide enough that products and features are what counts, as in the presets.
CONFIG = ModelConfig(
    dim=64,
    depth=3,
    freqs_per_bands=(8,) * 12 + (33,),
    n_fft=256,
    hop_length=64,
    sample_rate=8000,
    d_state=32,
    headdim=16,
    expand=2,
)
SAMPLES = 12_000


class Shapes(FakeTensorMode):
    """Tensors without numbers. `torch.istft` asks whether its windows add up to zero anywhere: they do not."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return False if func is torch.ops.aten.equal.default else super().dispatch(func, types, args, kwargs)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, stems=("a", "b"), depth=1, mask_expand=2, channels=1),
        dataclasses.replace(CONFIG, depth=1, expand=4, d_state=16),
        ModelConfig.preset("small", depth=1),
    ],
)
def test_operations_are_those_that_torch_counts(config: ModelConfig) -> None:
    frames = SAMPLES // config.hop_length + 1
    with Shapes():
        model = BSMamba2(config)
        accelerate(model, "chunked")
        with FlopCounterMode(display=False) as forward:
            estimate = model(torch.randn(1, config.channels, SAMPLES))
        with FlopCounterMode(display=False) as backward:
            estimate.sum().backward()
    assert sum(forward_flops(config, frames).values()) == pytest.approx(forward.get_total_flops(), rel=0.03)
    assert backward_flops(config, frames) == pytest.approx(backward.get_total_flops(), rel=0.05)


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive, after every operation, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.now += size
            self.most = max(self.most, self.now)
            self.alive[key] = weakref.ref(storage, lambda _: self.free(key, size))

    def free(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]


class FusedScan(torch.autograd.Function):
    """The tensors of a fused scan, none of its numbers: mamba-ssm's keeps its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y = torch.zeros_like(inputs[0])
        ctx.save_for_backward(*inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(part) for part in ctx.saved_tensors[:-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["stored", "recomputed"])
def test_memory_is_what_training_uses(
    dtype: str, gradient_checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bsmamba2.kernels.blockwise.BLOCK", 2**60)  # all sequences at once, as on a GPU
    monkeypatch.setattr(BlockwiseMamba2, "run_scan", lambda self, *inputs, **_: FusedScan.apply(*inputs))
    batch = 2
    estimated = training_cost(
        CONFIG,
        batch=batch,
        seconds=SAMPLES / 8000,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        loss_hop=441,
    )
    with Shapes():
        model = BSMamba2(CONFIG)
        accelerate(model, "chunked")
        model.gradient_checkpointing = gradient_checkpointing
        mixture = torch.randn(batch, 2, SAMPLES)
        with Memory() as memory:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                estimate = model(mixture)[:, 0]
            bsmamba2_loss(estimate, mixture, hop_length=441).backward()
    # Without a scan, what a layer's backward pass takes on top is the convolution: five copies in float32.
    tokens = batch * (SAMPLES // CONFIG.hop_length + 1) * len(CONFIG.freqs_per_bands)
    convolution = gradient_checkpointing * 20 * tokens * (CONFIG.inner + 2 * CONFIG.d_state)
    assert estimated.activations + convolution == pytest.approx(memory.most, rel=0.10)


def test_parameters_and_presets() -> None:
    paper = training_cost(
        ModelConfig.preset("paper"), batch=5, seconds=8, dtype="bfloat16", gradient_checkpointing=True
    )
    assert paper.parameters == 48_098_188
    assert paper.state == 20 * paper.parameters
    whole = training_cost(ModelConfig.preset("paper"), batch=5, seconds=8, dtype="bfloat16")
    assert paper.activations < whole.activations / 4
    assert whole.step < paper.step < 1.5 * whole.step
    # Two devices: the one counts nothing but operations, the other nothing but memory.
    assert paper.seconds(1e14, 1e30) == pytest.approx(paper.step / 1e14)
    assert paper.seconds(1e30, 1e12) == pytest.approx(paper.traffic / 1e12)


@pytest.mark.parametrize("batch", [1, 2])
def test_lower_bound_and_fit(batch: int) -> None:
    cost = training_cost(CONFIG, batch=batch, seconds=1)
    assert cost.memory == cost.state + cost.activations + cost.scratch
    saved = activation_bytes(CONFIG, batch, CONFIG.sample_rate)
    kept = saved["band split"] + CONFIG.depth * saved["layer"]
    # At the loss: 55 frames of each channel. In the scan: 126 sequences of one chunk along bands, more than the 13 of
    # two chunks along time.
    at_loss = kept + saved["masks"] + 18 * 4096 * batch * CONFIG.channels * 55
    in_scan = kept + 16 * batch * 126 * CONFIG.inner * CONFIG.d_state
    assert cost.activations == kept + saved["masks"]
    assert cost.activations + cost.scratch == max(at_loss, in_scan)
    # Two devices: on the one only products take time, on the other only memory; and both at once take no longer.
    assert cost.lower_bound(1e12, 1e30) == pytest.approx(cost.step / 1e12)
    assert cost.lower_bound(1e30, 1e9) == pytest.approx(2 * cost.activations / 1e9)
    assert cost.lower_bound(1e12, 1e9) < cost.seconds(1e12, 1e9)
    room = cost.memory
    assert [cost.fits(size) for size in (0.8 * room, room + 5e8, 1.2 * room + 1e9)] == ["no", "perhaps", "yes"]


def test_peaks_are_those_of_torch_where_it_has_them() -> None:
    info = pytest.importorskip("torch._inductor.analysis.device_info")
    for name, known in (("A100 80 GB", "NVIDIA A100"), ("H100 80 GB", "NVIDIA H100")):
        theirs, gpu = info.lookup_device_info(known), GPUS[name]
        dense = theirs.tops[torch.bfloat16] / getattr(theirs, "tops_sparsity_factor", 1)
        assert gpu.bfloat16 == pytest.approx(1e12 * dense, rel=0.01)
        assert gpu.float32 == pytest.approx(1e12 * theirs.tops[torch.float32], rel=0.01)
        assert (gpu.bandwidth, gpu.memory) == (1e9 * theirs.dram_bw_gbs, 1e9 * theirs.dram_gb)


def test_bad_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="batch=0"):
        training_cost(CONFIG, batch=0, seconds=1)
    with pytest.raises(ValueError, match="dtype='fp8'"):
        training_cost(CONFIG, batch=1, seconds=1, dtype="fp8")
    with pytest.raises(ValueError, match=r"seconds=0\.1"):
        training_cost(CONFIG, batch=1, seconds=0.1)
