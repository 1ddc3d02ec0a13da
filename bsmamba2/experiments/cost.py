"""Cost of training: parameters, floating-point operations, memory, and the time of a step on a given device.

We count operations (with torch's `FlopCounterMode`, on one sequence along each axis) and the tensors that autograd
saves. Both use fake tensors, which have shapes but no data. The mixers use the backend "chunked", which needs no
compiler; the compiled kernels compute the same matrix products in chunks of different lengths, and save no more
tensors. `tests/gpu/tracked_cost.py` compares the memory with PyTorch's own tracker. Only matrix products count as
operations, two for each multiply-add; transforms and element-wise work enter the time only as memory traffic.

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
from ..kernels.blockwise import BlockwiseMamba2
from ..kernels.chunked import chunked
from ..kernels.triton import FULL_CHUNK, SHORT_CHUNK
from ..losses import WINDOWS
from ..mamba2 import Mamba2
from ..model import BSMamba2

BYTES = {"float32": 4, "bfloat16": 2}
TRAINING_STATE = 20
"""Bytes that training keeps for each weight, in float32: weight, gradient, two moments, moving average."""


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU from its data sheet: matrix products in FLOP/s by type, bandwidth in bytes/s, memory in bytes.

    bfloat16 products are dense, with float32 accumulation; float32 products run without TF32 (PyTorch's default).
    A driver reports 5 to 7 % more bytes, because a GPU sold as 80 GB has nearly 80 GiB.
    """

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float


GPUS = {
    "RTX 3090": Gpu(71e12, 35.6e12, 936e9, 24e9),
    "RTX 4090": Gpu(165.2e12, 82.6e12, 1008e9, 24e9),
    "A100 40 GB": Gpu(312e12, 19.5e12, 1555e9, 40e9),
    "A100 80 GB": Gpu(312e12, 19.5e12, 2039e9, 80e9),
    "H100 80 GB": Gpu(989.4e12, 67e12, 3350e9, 80e9),
}
"""NVIDIA's figures: white papers "Ampere GA102 GPU architecture" and "Ada GPU architecture", data sheets "A100 Tensor
Core GPU" and "H100 Tensor Core GPU" (both SXM). We checked them on pages that quote them (see chapter "Scaling up")."""


@dataclass(frozen=True)
class Cost:
    """Operations and memory of a training step on one batch on one device, without accumulation.

    Operations are floating-point operations; memory is in bytes.
    """

    parameters: int  #: weights of the model
    flops_per_second: float  #: operations to separate one second of audio
    forward: dict[str, float]  #: operations of the forward pass, by part
    step: float  #: operations of a step: forward, backward, and the recomputation by gradient checkpointing
    state: int  #: memory for weights, gradients, moments and moving average
    activations: float  #: peak memory for the tensors that the backward pass needs
    scratch: float  #: more temporary memory on a GPU, for the loss or a mixer's backward pass with mamba-ssm's scan
    traffic: float  #: estimate of the bytes that a step moves through memory

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Estimated time of a step on a device with these peaks, in FLOP/s and in bytes/s.

        We assume that all matrix products run at the first peak, then all memory traffic at the second; real devices
        reach neither.
        """
        return self.step / flops + self.traffic / bandwidth

    @property
    def memory(self) -> float:
        """Memory of a step on a GPU with mamba-ssm's scan: state, activations and scratch, in bytes."""
        return self.state + self.activations + self.scratch

    def lower_bound(self, flops: float, bandwidth: float) -> float:
        """Lower bound of a step's time on a device with these peaks, calculated and not measured.

        It is the time for all products, or for writing and reading the activations once, whichever is longer; we assume
        that everything else takes no time.
        """
        return max(self.step / flops, 2 * self.activations / bandwidth)

    def fits(self, memory: float) -> str:
        """Whether a step fits into `memory` bytes: yes, no, or perhaps (within the margin of 10 % and 1 GB)."""
        least, most = 0.9 * self.memory, 1.1 * self.memory + 1e9  # PyTorch's context takes most of a gigabyte
        return "yes" if most < memory else "no" if least > memory else "perhaps"


def training_cost(
    config: ModelConfig, *, batch: int, seconds: float, dtype: str = "float32",
    gradient_checkpointing: bool = False, loss_hop: int = 147,
) -> Cost:  # fmt: skip
    """Cost of a training step on one batch, computed without running it.

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
    backward = batch * backward_flops(config, frames, gradient_checkpointing=gradient_checkpointing)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in BSMamba2(config).parameters())
    saved = activation_bytes(config, batch, samples, dtype)
    everything = sum(saved.values()) + (config.depth - 1) * saved["layer"]
    kept = everything - saved["masks"]
    if gradient_checkpointing:
        inputs = batch * frames * len(config.freqs_per_bands) * config.dim * BYTES[dtype]  # inputs of one layer
        kept = config.depth * inputs + saved["band split"]
    # The loss follows the forward pass; then the masks are freed, and the backward pass of the last layer runs.
    at_loss, in_mixer = kept + saved["masks"], kept + saved["layer"] * gradient_checkpointing
    # STFT of the longest window: frames, spectrum, two copies of the inverse transform, and moduli, half as large.
    loss = 4 * 4.5 * max(WINDOWS) * batch * config.channels * (samples // loss_hop + 1)
    activations = max(at_loss, in_mixer)
    return Cost(
        parameters=parameters,
        flops_per_second=sum(forward.values()) / batch / seconds,
        forward=forward,
        step=sum(forward.values()) + backward,
        state=TRAINING_STATE * parameters,
        activations=activations,
        scratch=max(at_loss + loss, in_mixer + batch * _mixer_scratch(config, frames)) - activations,
        # Saved tensors are written once and read twice, and so are their gradients; recomputed tensors count again.
        traffic=(6 + 3 * gradient_checkpointing) * everything + 2 * TRAINING_STATE * parameters,
    )


# --- operations -------------------------------------------------------------------------------------------


def forward_flops(config: ModelConfig, frames: int, *, gradients: bool = True) -> dict[str, float]:
    """Floating-point operations of the forward pass for one example, by part.

    Args:
        frames: number of spectrogram frames.
        gradients: whether a backward pass follows. Without one, the scan uses longer chunks.
    """
    return {part: forward for part, (forward, _) in _model_flops(config, frames, gradients).items()}


def backward_flops(config: ModelConfig, frames: int, *, gradient_checkpointing: bool = False) -> float:
    """Floating-point operations of the backward pass for one example, including the recomputation by checkpointing.

    PyTorch does not repeat a layer's last product, the merge of the band block, because no gradient needs its output.
    """
    parts = _model_flops(config, frames, True)
    merges = config.depth * frames * len(config.freqs_per_bands) * 4 * config.dim**2
    recomputed = parts["time"][0] + parts["band"][0] - merges if gradient_checkpointing else 0.0
    return sum(backward for _, backward in parts.values()) + recomputed


@functools.cache
def mixer_flops(config: ModelConfig, length: int, *, gradients: bool = True) -> tuple[float, float]:
    """Floating-point operations of a mixer's forward and backward pass for one sequence."""
    with FakeTensorMode():
        mixer = cast(DualPath, _one_layer(config).layers[0]).time.forwards.mixer
        x = torch.empty(1, length, config.dim, requires_grad=gradients)
        return _count(lambda: mixer(x), 1, gradients)


@functools.cache
def scan_flops(config: ModelConfig, length: int, *, gradients: bool = True) -> tuple[float, float]:
    """Floating-point operations of the scan's forward and backward pass for one sequence."""
    h, p, n = config.heads, config.headdim, config.d_state
    shapes = ((1, length, h, p), (1, length, h), (h,), (1, length, n), (1, length, n))  # x, dt, A, B, C
    with FakeTensorMode():
        inputs = [torch.empty(shape, requires_grad=gradients) for shape in shapes]
        return _count(lambda: chunked(*inputs), 1, gradients)


@functools.cache
def _model_flops(config: ModelConfig, frames: int, gradients: bool) -> dict[str, tuple[float, float]]:
    """Part → operations of its forward and its backward pass, counted on one sequence along each axis."""
    bands = len(config.freqs_per_bands)
    with FakeTensorMode():
        model = _one_layer(config)
        layer = cast(DualPath, model.layers[0])
        frame = torch.empty(1, config.channels, config.bins, 1, dtype=torch.complex64)
        features = torch.empty(1, 1, bands, config.dim, requires_grad=gradients)
        sequence = torch.empty(1, frames, config.dim, requires_grad=gradients)
        return {
            "band split": _count(lambda: model.band_split(frame), frames, gradients),
            "time": _count(lambda: layer.time(sequence), bands * config.depth, gradients),
            "band": _count(lambda: layer.band(features[0]), frames * config.depth, gradients),
            "masks": _count(lambda: torch.stack([f(features) for f in model.mask_estimators]), frames, gradients),
        }


def _count(run: Callable[[], Tensor], times: int, gradients: bool) -> tuple[float, float]:
    """Operations of a forward and a backward pass, multiplied by `times`."""
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as forward:
        output = run()
    with FlopCounterMode(display=False) as backward:
        if gradients:
            output.abs().sum().backward()
    return float(times * forward.get_total_flops()), float(times * backward.get_total_flops())


def _one_layer(config: ModelConfig) -> BSMamba2:
    """A model with one dual-path layer, since all layers cost the same; it takes all sequences at once, as on a GPU."""
    model = BSMamba2(dataclasses.replace(config, depth=1))
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.__class__ = BlockwiseMamba2
    return model


# --- memory -----------------------------------------------------------------------------------------------


def _mixer_scratch(config: ModelConfig, frames: int) -> float:
    """Temporary bytes of a mixer's backward pass for one example, along the axis that needs more.

    For each chunk, mamba-ssm's scan stores the state and its gradient in float32, and both again in the type of x (one
    copy fewer if that is float32). For each sequence, it also stores the last state. PyTorch's convolution stores five
    copies of its input.
    """
    bands = len(config.freqs_per_bands)

    def state_bytes(sequences: int, length: int) -> int:
        chunks = -(-length // (SHORT_CHUNK if length <= 2 * SHORT_CHUNK else FULL_CHUNK))
        return sequences * (12 * chunks + 4) * config.inner * config.d_state

    convolution = 20 * frames * bands * (config.inner + 2 * config.d_state)
    return max(state_bytes(bands, frames), state_bytes(frames, bands), convolution)


@functools.cache
def activation_bytes(config: ModelConfig, batch: int, samples: int, dtype: str = "float32") -> dict[str, int]:
    """Bytes of the tensors that autograd saves in the forward pass.

    Returns:
        Bytes of the `band split`, of one dual-path `layer`, and of the `masks` up to their product with the mixture.
    """
    frames, bands, kind = samples // config.hop_length + 1, len(config.freqs_per_bands), getattr(torch, dtype)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model = _one_layer(config)
        mixture = torch.empty(batch, config.channels, config.bins, frames, dtype=torch.complex64)
        features = torch.empty(batch, frames, bands, config.dim, dtype=kind, requires_grad=True)

        def masked() -> Tensor:
            normed = model.final_norm(features)
            return torch.stack([estimator(normed) for estimator in model.mask_estimators], dim=1) * mixture[:, None]

        return {
            "band split": _saved_bytes(lambda: model.band_split(mixture)),
            "layer": _saved_bytes(lambda: model.layers[0](features)),
            "masks": _saved_bytes(masked),
        }


def _saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd saves; each counts once, and weights are left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def save(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())
