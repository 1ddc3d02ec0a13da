"""The memory of a step with mamba-ssm's scan: its own Python code makes fake tensors here, and launches no kernel."""

from __future__ import annotations

import contextlib
import sys
import types
from typing import Any

import pytest
import torch
from test_cost import Memory, NoTwoAreEqual
from torch._subclasses.fake_tensor import FakeTensorMode

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.experiments.cost import training_cost
from bsmamba2.kernels import BackendError, accelerate, blockwise, triton
from bsmamba2.train import TrainConfig, Trainer

# The published widths, fewer bands, so that the test is quick.
CONFIG = ModelConfig.preset("paper", depth=2, freqs_per_bands=(85,) * 11 + (90,))


class NoKernel:
    """In the place of a Triton kernel: takes any launch, and has chosen a block size."""

    best_config = types.SimpleNamespace(kwargs=dict.fromkeys(("BLOCK_SIZE", "BLOCK_SIZE_M", "BLOCK_SIZE_H"), 64))

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        triton.triton_ops()
    except BackendError as error:
        pytest.skip(str(error))
    for name, module in list(sys.modules.items()):
        if name.startswith("mamba_ssm.ops.triton"):
            for key, value in vars(module).items():
                if key.endswith("_kernel") and not isinstance(value, types.FunctionType):
                    monkeypatch.setattr(module, key, NoKernel())
    monkeypatch.setattr(triton, "_unsupported_reasons", lambda *args: [])
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    gpu = types.SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(blockwise, "BLOCK", 2**60)  # a GPU takes all sequences at once
    monkeypatch.setattr(blockwise.BlockwiseMamba2, "run_scan", staticmethod(triton.scan))


@pytest.mark.parametrize(
    ("dtype", "gradient_checkpointing"), [("bfloat16", True), ("bfloat16", False), ("float32", True)]
)
@pytest.mark.usefixtures("no_kernels")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_memory_with_the_fused_scan(dtype: str, gradient_checkpointing: bool) -> None:
    batch, seconds = 2, 4.0
    with FakeTensorMode():
        model = BSMamba2(CONFIG)
        accelerate(model, "chunked")
        settings = TrainConfig(steps=1, precision=dtype, gradient_checkpointing=gradient_checkpointing)
        trainer = Trainer(model, settings)
        signal = torch.empty(batch, 2, round(seconds * CONFIG.sample_rate))
        with Memory() as memory, NoTwoAreEqual():
            trainer.backward([(signal, signal)])
    cost = training_cost(
        CONFIG, batch=batch, seconds=seconds, dtype=dtype, gradient_checkpointing=gradient_checkpointing
    )
    gradients = 4 * cost.parameters
    assert cost.activations + cost.scratch == pytest.approx(memory.most - gradients, rel=0.10)
