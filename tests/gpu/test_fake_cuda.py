"""No tensor on the wrong device: everything that a GPU owner runs, on fake CUDA tensors (`fake_cuda.py`).

Shapes, types and devices are checked by PyTorch at every operation, forward and backward. Numbers do not exist, so
files cannot be written or read here, and self-tests, which compare numbers, cannot pass: what is tested of both is
that tensors go to the CPU and come back.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from tiny_model import TINY
from torch import Tensor, nn

from bsmamba2 import BSMamba2, ModelConfig, losses, metrics, separate, ssd
from bsmamba2.audio import streaming
from bsmamba2.checkpoints.state_dict import not_finite, own_copies
from bsmamba2.data import Validation
from bsmamba2.kernels import accelerate
from bsmamba2.train import TrainConfig, Trainer
from bsmamba2.training.muon import muon_and_adamw

# `copy.deepcopy` of a model, for its moving average, asks for addresses.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")

SMALL = ModelConfig.preset("small", depth=1)  # the layers are alike
PAPER = ModelConfig.preset("paper", depth=1)
SECOND = TINY.sample_rate


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with fake_cuda():
        yield


def model_on_gpu(config: ModelConfig = TINY, backend: str = "chunked", **options: object) -> BSMamba2:
    """As `BSMamba2(config).to("cuda")`, which moves parameters and buffers and nothing else.

    `Module.to` cannot move fake tensors: it exchanges a parameter for its copy, and a fake one cannot be exchanged.
    """
    model = BSMamba2(config, **options)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.detach().to(CUDA))
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer.to(CUDA)
    accelerate(model, backend)
    return model


def audio(*shape: int, device: torch.device | str = CUDA) -> Tensor:
    return torch.empty(*shape, device=device)


def assert_on_gpu(*tensors: Tensor | None) -> None:
    assert all(tensor is not None and tensor.device == CUDA for tensor in tensors)


# --- the model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "backend", "dtype"),
    [
        (TINY, "chunked", torch.float16),
        (SMALL, "plain", torch.float32),
        (PAPER, "chunked", torch.bfloat16),
    ],
    ids=["tiny", "small", "paper"],
)
def test_forward_and_backward(config: ModelConfig, backend: str, dtype: torch.dtype) -> None:
    model, mixture = model_on_gpu(config, backend), audio(1, 2, 2 * SECOND)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        stems = model(mixture)
    assert stems.shape == (1, 1, 2, 2 * SECOND)
    assert stems.dtype == torch.float32
    stems.sum().backward()
    assert_on_gpu(stems, *(weight.grad for weight in model.parameters()))


@pytest.mark.parametrize("scan", ssd.SCANS)
def test_every_scan(scan: str) -> None:
    model = model_on_gpu(TINY, "plain", scan=scan)
    masks = model.masks(torch.empty(1, 2, TINY.bins, 5, dtype=torch.complex64, device=CUDA))
    masks.abs().sum().backward()
    assert_on_gpu(masks, *(weight.grad for weight in model.parameters()))


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_streaming_state(backend: str) -> None:
    model = model_on_gpu(TINY, backend)
    spectrogram = torch.empty(1, 2, TINY.bins, 150, dtype=torch.complex64, device=CUDA)
    with torch.inference_mode():
        masks, state = model.stream_masks(spectrogram, None, 130)
        assert_on_gpu(masks, *(part for layer in state for part in layer))
        masks, state = model.stream_masks(spectrogram, state, 130)
    assert_on_gpu(masks, *(part for layer in state for part in layer))


# --- a mistake is noticed -----------------------------------------------------------------------------------


def on_the_cpu(scan: Callable) -> Callable:
    return lambda *inputs, **options: scan(*(part.cpu() for part in inputs), **options)


def half_on_the_cpu(scan: Callable) -> Callable:
    return lambda x, *inputs, **options: scan(x.cpu(), *inputs, **options)


def with_a_constant(scan: Callable) -> Callable:
    return lambda x, *inputs, **options: scan(x * torch.ones(x.shape[-1]), *inputs, **options)


@pytest.mark.parametrize("mistake", [on_the_cpu, half_on_the_cpu, with_a_constant])
def test_a_planted_cpu_tensor_is_noticed(mistake: Callable) -> None:
    model = model_on_gpu(TINY, "plain", scan=mistake(ssd.chunked))
    with pytest.raises((RuntimeError, ValueError), match=r"device|on cpu"):
        model(audio(1, 2, SECOND))


def test_a_cpu_tensor_in_a_backward_pass_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = losses._MeanModulus.backward
    monkeypatch.setattr(losses._MeanModulus, "backward", lambda ctx, *g: (backward(ctx, *g)[0].cpu(), None, None))
    estimate = audio(1, 2, SECOND).requires_grad_()
    with pytest.raises(RuntimeError, match="device"):
        losses.bsmamba2_loss(estimate, audio(1, 2, SECOND)).backward()


# --- losses and metrics -------------------------------------------------------------------------------------


def test_losses() -> None:
    estimate = audio(2, 2, SECOND).requires_grad_()
    target, mixture = audio(2, 2, SECOND), audio(2, 2, SECOND)
    for loss in (losses.bsmamba2_loss(estimate, target), losses.snr_loss(estimate, target, mixture)):
        assert_on_gpu(loss, *torch.autograd.grad(loss, estimate))


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a voice is silent is a question of numbers, which is answered by one region here; `bleed` and `onsets`
    work on copies on the CPU throughout."""
    reference, estimate, mixture = (audio(2, 3 * SECOND) for _ in range(3))
    assert isinstance(metrics.usdr(reference, estimate), float)
    assert metrics.csdr_seconds(reference, estimate, SECOND, other_sources=[(mixture, mixture)]).shape == (3,)
    assert isinstance(metrics.si_sdr(reference, estimate), float)
    monkeypatch.setattr(metrics, "silent_regions", lambda *_: [(100, 20_000), (30_000, 50_000)])
    assert isinstance(metrics.silence_leakage(reference, estimate, mixture).relative, float)


# --- separation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_separate(place: str, dtype: torch.dtype) -> None:
    stems = separate.separate(model_on_gpu(), audio(2, 3 * SECOND, device=place), segment=2.0, batch=2, dtype=dtype)
    assert stems.shape == (1, 2, 3 * SECOND)
    assert stems.device.type == place


def test_separate_with_test_time_averaging() -> None:
    stems = separate.separate(model_on_gpu(), audio(2, SECOND, device="cpu"), segment=1.0, tta=True)
    assert stems.device.type == "cpu"


@pytest.mark.parametrize(("place", "look_ahead"), [("cpu", None), ("cuda", 0.5)])
def test_separate_stream(place: str, look_ahead: float | None) -> None:
    blocks = [audio(1, 2, SECOND, device=place) for _ in range(3)]
    options = {"segment": 1.0, "look_ahead": look_ahead, "dtype": torch.bfloat16}
    found = list(streaming.separate_stream(model_on_gpu(), blocks, **options))
    assert sum(block.shape[-1] for block in found) == 3 * SECOND
    assert all(block.device.type == "cpu" for block in found)


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "place"), [(SMALL, "cuda"), (PAPER, "cpu")], ids=["small", "paper"])
def test_a_training_step_as_published(config: ModelConfig, place: str) -> None:
    """Accumulation, autocast, recomputed layers, clipping, AdamW (fused), the moving average."""
    settings = TrainConfig(steps=2, grad_accum_steps=2, precision="bfloat16", gradient_checkpointing=True)
    trainer = Trainer(model_on_gpu(config), settings)
    assert trainer.optimisers[0].defaults["fused"]
    batch = (audio(1, 2, SECOND, device=place), audio(1, 2, SECOND, device=place), ["a song"])
    assert trainer.train_step([batch, batch]).step == 1
    assert_on_gpu(*trainer.ema.parameters(), *(weight.grad for weight in trainer.model.parameters()))
    moments = [entry for state in trainer.optimisers[0].state.values() for entry in state.values()]
    assert_on_gpu(*moments)


def test_training_in_float32_with_muon_and_the_snr_loss() -> None:
    settings = TrainConfig(steps=1, loss="snr")
    model = model_on_gpu(dataclasses.replace(TINY, stems=("vocals", "drums")), "plain")
    trainer = Trainer(model, settings, optimisers=muon_and_adamw(model, settings))
    trainer.train_step([(audio(2, 2, SECOND), audio(2, 2, 2, SECOND), ["a", "b"])])
    assert_on_gpu(
        *(entry for optimiser in trainer.optimisers for s in optimiser.state.values() for entry in s.values())
    )


def test_validation() -> None:
    class Song:
        name, sample_rate, samples, stems = "a song", SECOND, 3 * SECOND, ("vocals", "rest")

        def crop(self, stem: int, start: int, samples: int) -> Tensor:
            return audio(2, samples, device="cpu")

    windows = [[(Song(), 0), (Song(), SECOND)], []]
    assert Validation(windows, SECOND)(model_on_gpu())["usdr"] == 1.0


# --- checkpoints --------------------------------------------------------------------------------------------


def test_weights_go_to_the_cpu_and_come_back() -> None:
    """All of `save_checkpoint` and `load_checkpoint` but the bytes of the file."""
    model = model_on_gpu()
    state = own_copies(model.state_dict())
    assert all(tensor.device.type == "cpu" for tensor in state.values())
    assert not_finite(state) is None
    model.load_state_dict(state)
    assert_on_gpu(*model.parameters())


def test_a_training_state_goes_to_the_cpu_and_comes_back() -> None:
    """As a run that is resumed: the state was read onto the CPU, the model is on the GPU."""
    trainer = Trainer(model_on_gpu(), TrainConfig(steps=2))
    batch = (audio(1, 2, SECOND), audio(1, 2, SECOND), ["a song"])
    trainer.train_step([batch])
    state = torch.utils._pytree.tree_map_only(Tensor, lambda part: part.cpu(), copy.deepcopy(trainer.state()))
    resumed = Trainer(model_on_gpu(), TrainConfig(steps=2))
    resumed.load_state(state)
    assert_on_gpu(*(entry for moments in resumed.optimisers[0].state.values() for entry in moments.values()))
    assert resumed.train_step([batch]).step == 2
