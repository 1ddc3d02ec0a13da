"""What a model costs: parameters, floating-point operations, memory for training, time of a step on a given device.

Multiplications and additions are counted in matrix products alone, two for each pair; transforms and element-by-element
work are left out there, and come in with the time, where they are limited by memory's speed.

Letters: q frames of a chunk of the scan, e = h·p the inner width of a mixer; the others as in `bsmamba2.config`.

Book: "Scaling up". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from ..config import ModelConfig
from ..losses import bsmamba2_loss
from ..model import BSMamba2
from ..ssd import CHUNK

BYTES = {"float32": 4, "bfloat16": 2}
TRAINING_STATE = 20
"""Bytes that training keeps for each weight, in float32: weight, gradient, two moments, moving average."""


@dataclass(frozen=True)
class Cost:
    """What a step of training on one batch costs one device, nothing accumulated.

    Operations are floating-point ones, memory is in bytes.

    Attributes:
        parameters: weights of the model.
        flops_per_second: operations to separate one second of audio.
        forward: operations of the forward pass, by part.
        step: operations of a training step: forward, backward, and what checkpointing computes again.
        state: memory for weights, gradients, moments and moving average.
        activations: memory for what the backward pass needs, at its highest.
        traffic: bytes that a step moves through memory, an estimate.
    """

    parameters: int
    flops_per_second: float
    forward: dict[str, float]
    step: float
    state: int
    activations: float
    traffic: float

    def seconds(self, flops: float, bandwidth: float) -> float:
        """Estimated time of a step, for a device with this peak in operations and this one in bytes a second.

        Products at their peak, then everything else at memory's peak: no real device reaches either.
        """
        return self.step / flops + self.traffic / bandwidth


def training_cost(
    config: ModelConfig,
    *,
    batch: int,
    seconds: float,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
    loss_hop: int = 147,
) -> Cost:
    """The cost of a training step on a batch; no weights are made and nothing is computed.

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
    backward = batch * backward_flops(config, frames)
    again = forward["time"] + forward["band"] if gradient_checkpointing else 0
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in BSMamba2(config).parameters())
    kept = activation_bytes(config, samples, dtype, loss_hop)
    everything = batch * (kept.ends + config.depth * kept.layer)
    activations = (
        batch * (config.depth * kept.layer_input + max(kept.layer, kept.loss) + kept.ends - kept.loss)
        if gradient_checkpointing
        else everything
    )
    return Cost(
        parameters=parameters,
        flops_per_second=sum(forward_flops(config, frames).values()) / seconds,
        forward=forward,
        step=sum(forward.values()) + backward + again,
        state=TRAINING_STATE * parameters,
        activations=activations,
        # What is kept is written once and read twice, its gradient likewise; what is computed again once more.
        traffic=(6 + 3 * gradient_checkpointing) * everything + 2 * TRAINING_STATE * parameters,
    )


def forward_flops(config: ModelConfig, frames: int, chunk: int = CHUNK) -> dict[str, float]:
    """Operations of the forward pass for one example, by part; in chunks of `CHUNK` frames where gradients are kept."""
    d, k = config.dim, len(config.freqs_per_bands)
    numbers = 2 * config.channels * config.bins  # a frame's real numbers
    hidden = config.mask_expand * d
    masks = k * 2 * d * hidden + 2 * hidden * 2 * numbers
    return {
        "band split": frames * 2.0 * numbers * d,
        "time": config.depth * frames * k * block_flops(config, frames, chunk),
        "band": config.depth * frames * k * block_flops(config, k, chunk),
        "masks": float(len(config.stems) * frames * masks),
    }


def backward_flops(config: ModelConfig, frames: int) -> float:
    """Operations of the backward pass for one example: two products for each of the forward pass, and the scan's."""
    k = len(config.freqs_per_bands)
    once = sum(forward_flops(config, frames).values())
    mixers = 2 * config.depth * frames * k  # of each axis, for every frame and band
    scans = sum(
        mixers * (scan_backward_flops(config, length) - 2 * scan_flops(config, length)) for length in (frames, k)
    )
    return 2 * once + scans


def block_flops(config: ModelConfig, length: int, chunk: int = CHUNK) -> float:
    """A bidirectional block, for one position: two mixers, and the Linear that merges them."""
    d, e, n, h = config.dim, config.inner, config.d_state, config.heads
    projections = 2.0 * d * (2 * e + 2 * n + h) + 2 * e * d
    return 2 * (projections + scan_flops(config, length, chunk)) + 2 * 2 * d * d


def scan_flops(config: ModelConfig, length: int, chunk: int = CHUNK) -> float:
    """`ssd.chunked`, for one position: G and what it mixes inside a chunk; into and out of the state between chunks.

    A little more where a head's decays span several levels.
    """
    q, between = _chunks(length, chunk)
    return 2.0 * q * (config.d_state + config.inner) + between * 4 * config.d_state * config.inner


def scan_backward_flops(config: ModelConfig, length: int) -> float:
    """Its backward pass: G again, dB, dC; dG, dx, y inside a chunk again. The states again, and five more products."""
    q, between = _chunks(length, CHUNK)
    n, e = config.d_state, config.inner
    return 6.0 * q * n + 6 * q * e + between * 12 * n * e


def _chunks(length: int, chunk: int) -> tuple[int, float]:
    """Frames of a chunk, and the share of chunks that have one before them."""
    chunks = -(-length // chunk)
    return -(-length // chunks), 1 - 1 / chunks


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward pass of one example keeps for the backward pass.

    Attributes:
        layer: in one dual-path layer.
        layer_input: what goes into it.
        loss: in the loss.
        ends: everywhere but in the layers, the loss included.
    """

    layer: float
    layer_input: float
    loss: float
    ends: float


@functools.cache
def activation_bytes(config: ModelConfig, samples: int, dtype: str = "float32", loss_hop: int = 147) -> Kept:
    """Run the forward pass on tensors that have shapes and no content, and add up what autograd would keep.

    All layers are alike, so a model of one and that layer by itself will do. What is kept grows with the number of
    frames, so a second of audio is enough.
    """
    short = min(samples, max(config.sample_rate, 2 * 2048))
    frames, short_frames = samples // config.hop_length + 1, short // config.hop_length + 1
    scale = frames / short_frames
    with FakeTensorMode():
        model = BSMamba2(dataclasses.replace(config, depth=1), scan="chunked")
        mixture = torch.empty(1, config.channels, config.bins, short_frames, dtype=torch.complex64)
        features = torch.empty(1, short_frames, len(config.freqs_per_bands), config.dim, requires_grad=True)
        estimate = torch.empty(1, config.channels, short, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            whole = scale * _kept(lambda: model.apply_to_spectrogram(mixture))
            layer = scale * _kept(lambda: model.layers[0](features))
        loss = scale * _kept(lambda: bsmamba2_loss(estimate, torch.empty_like(estimate), hop_length=loss_hop))
    return Kept(
        layer=layer,
        layer_input=float(frames * len(config.freqs_per_bands) * config.dim * BYTES[dtype]),
        loss=loss,
        ends=whole - layer + loss,
    )


def _kept(run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of what is run."""
    saved = _Saved()
    with saved:
        run()
    return saved.bytes


class _Saved(saved_tensors_hooks):
    """Adds up the memory of the tensors that autograd keeps, each once, weights left out."""

    def __init__(self) -> None:
        super().__init__(self.add, lambda tensor: tensor)
        self.seen: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self.seen[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.seen.values())
