"""Cost of training: parameters, floating-point operations, memory, and the time of a step on a given device.

Torch counts the operations (`FlopCounterMode`), on one sequence of each axis, and autograd's saved tensors, on tensors
that have shapes and no data. The model is accelerated with the backend "chunked", which runs on a CPU without a
compiler: the compiled kernels compute the same matrix products in chunks of other lengths, and save as much or less.
Only matrix products count as operations, two for each multiplication and addition; transforms and element-wise work
appear in the time, as memory traffic.

Book: "Scaling up". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig
from ..dual_path import DualPath
from ..kernels import accelerate
from ..kernels.chunked import chunked
from ..losses import bsmamba2_loss
from ..model import BSMamba2

BYTES = {"float32": 4, "bfloat16": 2}
TRAINING_STATE = 20
"""Bytes that training keeps for each weight, in float32: weight, gradient, two moments, moving average."""


@dataclass(frozen=True)
class Cost:
    """Operations and memory of a training step on one batch on one device, without accumulation.

    Operations are floating-point ones, memory is in bytes.
    """

    parameters: int  #: weights of the model
    flops_per_second: float  #: operations to separate one second of audio
    forward: dict[str, float]  #: operations of the forward pass, by part
    step: float  #: operations of a step: forward, backward, and the recomputation by gradient checkpointing
    state: int  #: memory for weights, gradients, moments and moving average
    activations: float  #: memory for the tensors that the backward pass needs, at its highest
    traffic: float  #: bytes that a step moves through memory, an estimate

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Estimated time of a step on a device with this peak in FLOP/s and this one in bytes/s.

        Matrix products at their peak, then everything else at the memory's peak: real devices reach neither.
        """
        return self.step / flops + self.traffic / bandwidth


def training_cost(
    config: ModelConfig, *, batch: int, seconds: float, dtype: str = "float32",
    gradient_checkpointing: bool = False, loss_hop: int = 147,
) -> Cost:  # fmt: skip
    """The cost of a training step on a batch, without running it.

    Raises:
        ValueError: for a batch below 1, an unknown type, or less audio than the loss needs.
    """
    if batch < 1 or dtype not in BYTES:
        raise ValueError(f"batch={batch!r} must be at least 1 and dtype={dtype!r} one of {', '.join(BYTES)}")
    samples = round(seconds * config.sample_rate)
    if samples <= 2048:
        raise ValueError(f"seconds={seconds!r}: the loss needs more than 2048 samples, and these are {samples}")
    frames = samples // config.hop_length + 1
    forward = {part: batch * flops for part, flops in forward_flops(config, frames).items()}
    recomputed = forward["time"] + forward["band"] if gradient_checkpointing else 0
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in BSMamba2(config).parameters())
    saved = activation_bytes(config, samples, dtype, loss_hop)
    everything = activations = batch * (saved["ends"] + saved["loss"] + config.depth * saved["layer"])
    if gradient_checkpointing:
        inputs = config.depth * frames * len(config.freqs_per_bands) * config.dim * BYTES[dtype]
        activations = batch * (inputs + max(saved["layer"], saved["loss"]) + saved["ends"])
    return Cost(
        parameters=parameters,
        flops_per_second=sum(forward.values()) / batch / seconds,
        forward=forward,
        step=sum(forward.values()) + batch * backward_flops(config, frames) + recomputed,
        state=TRAINING_STATE * parameters,
        activations=activations,
        # Saved tensors are written once and read twice, so are their gradients; recomputed ones once more.
        traffic=(6 + 3 * gradient_checkpointing) * everything + 2 * TRAINING_STATE * parameters,
    )


# --- operations -------------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, frames: int, *, gradients: bool = True) -> dict[str, float]:
    """Floating-point operations of the forward pass for one example, by part.

    Args:
        frames: of the spectrogram.
        gradients: whether a backward pass follows. Without one, the scan's chunks are longer.
    """
    return {part: forward for part, (forward, _) in _model_flops(config, frames, gradients).items()}


def backward_flops(config: ModelConfig, frames: int) -> float:
    """Floating-point operations of the backward pass for one example."""
    return sum(backward for _, backward in _model_flops(config, frames, True).values())


@functools.cache
def mixer_flops(config: ModelConfig, length: int, *, gradients: bool = True) -> tuple[float, float]:
    """Floating-point operations of a mixer's forward and backward pass for one sequence."""
    mixer = cast(DualPath, _zero_model(config).layers[0]).time.forwards.mixer
    x = torch.zeros(1, length, config.dim, requires_grad=gradients)
    return _count(lambda: mixer(x), 1, gradients)


@functools.cache
def scan_flops(config: ModelConfig, length: int, *, gradients: bool = True) -> tuple[float, float]:
    """Floating-point operations of the scan's forward and backward pass for one sequence."""
    h, p, n = config.heads, config.headdim, config.d_state
    shapes = ((1, length, h, p), (1, length, h), (h,), (1, length, n), (1, length, n))  # x, dt, A, B, C
    inputs = [torch.zeros(shape, requires_grad=gradients) for shape in shapes]
    return _count(lambda: chunked(*inputs), 1, gradients)


@functools.cache
def _model_flops(config: ModelConfig, frames: int, gradients: bool) -> dict[str, tuple[float, float]]:
    """Part → operations of its forward and its backward pass, counted on one sequence of zeros along each axis."""
    bands, model = len(config.freqs_per_bands), _zero_model(config)
    layer = cast(DualPath, model.layers[0])
    frame = torch.zeros(1, config.channels, config.bins, 1, dtype=torch.complex64)
    features = torch.zeros(1, 1, bands, config.dim, requires_grad=gradients)
    sequence = torch.zeros(1, frames, config.dim, requires_grad=gradients)
    return {
        "band split": _count(lambda: model.band_split(frame), frames, gradients),
        "time": _count(lambda: layer.time(sequence), bands * config.depth, gradients),
        "band": _count(lambda: layer.band(features[0]), frames * config.depth, gradients),
        "masks": _count(lambda: torch.stack([f(features) for f in model.mask_estimators]), frames, gradients),
    }


def _count(run: Callable[[], Tensor], times: int, gradients: bool) -> tuple[float, float]:
    """Operations of a forward and a backward pass that occur so many times."""
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as forward:
        output = run()
    with FlopCounterMode(display=False) as backward:
        if gradients:
            output.abs().sum().backward()
    return float(times * forward.get_total_flops()), float(times * backward.get_total_flops())


def _zero_model(config: ModelConfig) -> BSMamba2:
    """`_one_layer` with all weights zero; random ones would take longer, and change the state of the generator."""
    with torch.device("meta"):
        model = _one_layer(config).to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.zeros_(weight)
    return model


def _one_layer(config: ModelConfig) -> BSMamba2:
    """A model with one dual-path layer, since all layers cost the same."""
    model = BSMamba2(dataclasses.replace(config, depth=1))
    accelerate(model, "chunked")
    return model


# --- memory -----------------------------------------------------------------------------------------------


@functools.cache
def activation_bytes(
    config: ModelConfig, samples: int, dtype: str = "float32", loss_hop: int = 147
) -> dict[str, float]:
    """Bytes of the tensors that autograd saves in the forward pass of one example, counted on at most a second of it.

    Returns: those of one dual-path `layer`, of the `loss`, and of the `ends`, everything else.
    """
    short = min(samples, max(config.sample_rate, 2 * 2048))
    short_frames = short // config.hop_length + 1
    scale = (samples // config.hop_length + 1) / short_frames
    with FakeTensorMode():
        model = _one_layer(config)
        mixture = torch.empty(1, config.channels, config.bins, short_frames, dtype=torch.complex64)
        features = torch.empty(1, short_frames, len(config.freqs_per_bands), config.dim, requires_grad=True)
        estimate = torch.empty(1, config.channels, short, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            whole = scale * _saved_bytes(lambda: model.apply_to_spectrogram(mixture))
            layer = scale * _saved_bytes(lambda: model.layers[0](features))
        loss = scale * _saved_bytes(lambda: bsmamba2_loss(estimate, torch.empty_like(estimate), hop_length=loss_hop))
    return {"layer": layer, "loss": loss, "ends": whole - layer}


def _saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves, each once, weights left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())
