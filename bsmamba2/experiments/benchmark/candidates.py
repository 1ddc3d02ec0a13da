"""Candidates of a benchmark: their names, whether each can run here, and the job that it does.

Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ... import ssd
from ...config import ModelConfig
from ...data import Remixer
from ...kernels import BackendError, accelerate, blockwise, cpu, resolve_backend, triton
from ...kernels.chunked import chunked
from ...kernels.self_test import raise_unsupported
from ...losses import WINDOWS, bsmamba2_loss
from ...mamba2 import Mamba2, causal_conv1d_silu
from ...model import BSMamba2
from ...spectrogram import stft
from ...synth import STEMS, Song
from ...train import TrainConfig, Trainer
from .. import cost
from .settings import BACKWARD, BASELINE_CHUNKS, BASELINES, DTYPES, FORWARD, STREAM_MODES, Case, Settings

EXAMPLES = 64
"""Examples that a run of the loading part reads; up to four of them have been prefetched."""
ACCUMULATED = 2
"""Batches that a training step accumulates."""


def groups(settings: Settings) -> Iterator[list[Case]]:
    """All cases, grouped by job; the cases of a group are timed against each other. Some may be unsupported here."""
    for part, dtype, mode, seconds in itertools.product(
        settings.parts, settings.dtypes, settings.modes, settings.lengths
    ):
        # Loading and separation have no backward pass, a step always has one; the loss is always computed in float32.
        other_mode = mode != (BACKWARD if part == "step" else settings.modes[0])
        again = part in ("loading", "separation", "step") and other_mode
        again |= part in ("loading", "loss") and dtype != settings.dtypes[0]
        for axis in () if again else ("time", "band") if part == "mixer" else ("",):
            yield [Case(part, axis, seconds, dtype, mode, name) for name in candidates(settings, part)]


def candidates(settings: Settings, part: str) -> list[str]:
    """Names of a part's candidates; the first is the reference for the others."""
    mixers = [f"transformers, chunk {chunk}" for chunk in BASELINE_CHUNKS if "transformers" in settings.baselines]
    roformer = [name for name in settings.baselines if name == "bs_roformer"]
    return {
        "scan": [name for name in settings.backends if name in SCANS],
        "convolution": [*CONVOLUTIONS],
        "mixer": [*settings.backends, *mixers],
        "model": [*settings.backends, *roformer],
        "step": [*settings.backends],
        "separation": [*STREAM_MODES, *roformer],
        "loss": ["five windows", "three windows", "five windows, torch.stft"],
        "loading": ["files, when asked", "files, two processes ahead", "memory"],
    }[part]


def unsupported_reason(case: Case, settings: Settings) -> str:
    """The reason why a candidate cannot run here, and the fix; empty if it can run."""
    package = case.candidate.partition(",")[0]
    if package in BASELINES and importlib.util.find_spec(package) is None:
        return f"not installed: {BASELINES[package][0]}"
    try:
        if case.candidate in ("cpu", "triton"):
            resolve_backend(_mixer(replace(case, candidate="plain"), settings), case.candidate, DTYPES[case.dtype])
        elif case.candidate == "causal-conv1d":
            raise_unsupported(triton.missing_requirements(triton.conv_kernel))
    except BackendError as error:
        return str(error)
    return ""


def spectrogram_frames(seconds: float, config: ModelConfig) -> int:
    """Number of frames in the spectrogram of `seconds` of audio."""
    return round(seconds * config.sample_rate) // config.hop_length + 1


def units(case: Case, settings: Settings) -> float:
    """Size of a job: spectrogram frames, or examples for loading and for a training step."""
    examples = {"loading": EXAMPLES, "step": settings.batch * ACCUMULATED}
    return float(examples.get(case.part) or spectrogram_frames(case.seconds, ModelConfig.preset(settings.preset)))


def flops(case: Case, settings: Settings) -> float | None:
    """Floating-point operations of a scan, a mixer, a model or a training step, counted by `bsmamba2.experiments.cost`.

    All candidates of a job get the count of the candidate "chunked", so a candidate that needs more operations reaches
    a lower fraction of the machine's peak. Returns None for all other parts and for BS-RoFormer.
    """
    if case.part not in ("scan", "mixer", "model", "step") or case.candidate == "bs_roformer":
        return None
    config, gradients = ModelConfig.preset(settings.preset), case.mode == BACKWARD
    frames, bands = spectrogram_frames(case.seconds, config), len(config.freqs_per_bands)
    if case.part in ("model", "step"):
        example = sum(cost.forward_flops(config, frames, gradients=gradients).values())
        if gradients:
            checkpointing = settings.gradient_checkpointing
            example += cost.backward_flops(config, frames, gradient_checkpointing=checkpointing)
        return example * (settings.batch * ACCUMULATED if case.part == "step" else 1)
    if case.part == "scan":
        return settings.sequences * sum(cost.scan_flops(config, frames, gradients=gradients))
    sequences, length = (bands, frames) if case.axis == "time" else (frames, bands)
    return sequences * sum(cost.mixer_flops(config, length, gradients=gradients))


def least_bytes(case: Case, settings: Settings) -> float | None:
    """Fewest bytes that a forward scan or convolution can move: each input is read and the output written once."""
    config = ModelConfig.preset(settings.preset)
    values = {"scan": 2 * config.inner + 2 * config.d_state, "convolution": 2 * (config.inner + 2 * config.d_state)}
    if case.part not in values or case.mode == BACKWARD:
        return None
    positions = settings.sequences * spectrogram_frames(case.seconds, config)
    return values[case.part] * positions * DTYPES[case.dtype].itemsize


# --- jobs -------------------------------------------------------------------------------------------------

Job = Callable[[], Any]
"""Function that does the work once; if it returns a tensor, this output is compared."""


def prepare(case: Case, settings: Settings) -> Job:
    """Prepare the job of a case, with the same weights and inputs for every candidate."""
    torch.manual_seed(0)
    config = ModelConfig.preset(settings.preset)
    device = torch.device(settings.device)
    samples, frames = round(case.seconds * config.sample_rate), spectrogram_frames(case.seconds, config)
    if case.part == "loading":
        return _loading(case, config)
    if case.part == "separation":
        return _separation(case, settings, config)
    if case.part == "loss":
        loss = LOSSES[case.candidate]
        signals = torch.randn(2, 1, config.channels, samples, device=device)
        return _job(lambda x: loss(x, signals[1]), signals[0], [], case, device)
    if case.part == "model":
        mixture = torch.randn(1, config.channels, samples, device=device)
        model = _model(case, settings)
        return _job(model, mixture, list(model.parameters()), case, device)
    if case.part == "step":
        recompute, compiled = settings.gradient_checkpointing, settings.compile
        trainer = Trainer(_model(case, settings), TrainConfig(
            steps=10**6, grad_accum_steps=ACCUMULATED, precision=case.dtype, gradient_checkpointing=recompute,
            compile=compiled,
        ))  # fmt: skip
        signals = 0.1 * torch.randn(2, settings.batch, config.channels, samples)
        batches = [(signals.sum(0), signals[0])] * ACCUMULATED
        return lambda: trainer.train_step(batches)
    if case.part == "mixer":
        bands = len(config.freqs_per_bands)
        shape = (bands, frames, config.dim) if case.axis == "time" else (frames, bands, config.dim)
        x = torch.randn(shape, device=device)
        mixer = _mixer(case, settings)
        # In a model, the block around a mixer passes it a few sequences at a time.
        blocks = partial(blockwise.block_by_block, mixer) if case.candidate in ("chunked", "cpu") else mixer
        return _job(blocks, x, list(mixer.parameters()), case, device)
    # As in the accelerated mixer, frames are the first axis in memory for the inputs of scan and convolution.
    dtype = DTYPES[case.dtype]
    h, p, n = config.heads, config.headdim, config.d_state
    xBC = torch.randn(frames, settings.sequences, h * p + 2 * n, device=device).to(dtype)
    if case.part == "convolution":
        conv = nn.Conv1d(xBC.shape[2], xBC.shape[2], config.d_conv, groups=xBC.shape[2]).to(device, dtype)
        convolve = CONVOLUTIONS[case.candidate]
        return _job(lambda x: convolve(x, conv.weight, conv.bias), xBC, list(conv.parameters()), case, device)
    dt = functional.softplus(torch.randn(frames, settings.sequences, h, device=device) - 3).transpose(0, 1)
    A, D = -torch.rand(h, device=device) * 15 - 1, torch.ones(h, device=device)

    def scan(xBC: Tensor) -> Tensor:
        x, B, C = (part.transpose(0, 1) for part in xBC.split((h * p, n, n), dim=-1))
        return SCANS[case.candidate](x.unflatten(-1, (h, p)), dt, A, B, C, D)

    return _job(scan, xBC, [dt, A, D], case, device)


SCANS: dict[str, ssd.Scan] = {
    **ssd.SCANS, "plain": ssd.chunked, "chunked": chunked, "cpu": cpu.scan, "triton": triton.scan
}  # fmt: skip
CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {  # (t, b, w) → (t, b, w)
    "shifts": blockwise.causal_conv1d_silu,
    "causal-conv1d": triton.causal_conv1d_silu,
    "conv1d": lambda x, weight, bias: causal_conv1d_silu(x.transpose(0, 1), weight, bias).transpose(0, 1),
}


def _torch_stft_loss(estimate: Tensor, target: Tensor) -> Tensor:
    """The published loss in PyTorch's own operations: it transforms both signals, and autograd takes the gradient."""
    spectral = sum(
        (stft(estimate, max(w, 2048), 147, w) - stft(target, max(w, 2048), 147, w)).abs().mean() for w in WINDOWS
    )
    return 10 * (estimate - target).abs().mean() + spectral


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "five windows": bsmamba2_loss,
    "three windows": partial(bsmamba2_loss, windows=(2048, 1024, 512)),
    "five windows, torch.stft": _torch_stft_loss,
}


def _accelerated(module: nn.Module, case: Case) -> nn.Module:
    """The module with the backend that the candidate names; "matrix" and "recurrent" leave it unchanged."""
    if case.candidate not in ("matrix", "recurrent"):
        accelerate(module, case.candidate, dtype=DTYPES[case.dtype])
    return module


def _job(run: Callable[[Tensor], Tensor], x: Tensor, others: Sequence[Tensor], case: Case, device: torch.device) -> Job:
    # Scan and convolution get tensors of the case's type; mixer and model run under autocast.
    narrow = case.dtype == "bfloat16" and case.part in ("mixer", "model")
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=narrow)

    def forward() -> Tensor:
        with torch.inference_mode(), precision():
            return run(x)

    def backward() -> Tensor:
        with precision():
            y = run(x)
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        return y.detach()

    if case.mode == FORWARD:
        return forward
    leaves = [tensor.requires_grad_() for tensor in (x, *others)]
    return backward


def _mixer(case: Case, settings: Settings) -> nn.Module:
    config, candidate = ModelConfig.preset(settings.preset), case.candidate
    sizes = {name: getattr(config, name) for name in ("d_state", "headdim", "expand", "d_conv")}
    mixer = Mamba2(config.dim, **sizes, scan=ssd.SCANS.get(candidate, ssd.chunked))
    if not candidate.startswith("transformers"):
        return _accelerated(mixer.to(settings.device), case)
    baseline_config = importlib.import_module("transformers").Mamba2Config(
        hidden_size=config.dim, num_heads=config.heads, head_dim=config.headdim, expand=config.expand,
        state_size=config.d_state, conv_kernel=config.d_conv, n_groups=1, chunk_size=int(candidate.split()[-1]),
        num_hidden_layers=1,
    )  # fmt: skip
    modeling = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    baseline = modeling.Mamba2Mixer(baseline_config, layer_idx=0)
    baseline.load_state_dict(mixer.state_dict())
    return baseline.to(settings.device)


def _model(case: Case, settings: Settings) -> Any:
    config = ModelConfig.preset(settings.preset)
    if case.candidate == "bs_roformer":
        roformer = importlib.import_module("bs_roformer").BSRoformer(
            dim=config.dim, depth=config.depth, stereo=config.channels == 2, num_stems=len(config.stems),
            time_transformer_depth=1, freq_transformer_depth=1, num_residual_streams=1,
            freqs_per_bands=config.freqs_per_bands, stft_hop_length=config.hop_length,
        )  # fmt: skip
        return roformer.to(settings.device)
    model = BSMamba2(config, scan=ssd.SCANS.get(case.candidate, ssd.chunked))
    model.gradient_checkpointing = settings.gradient_checkpointing
    return _accelerated(model.to(settings.device), case)


def _separation(case: Case, settings: Settings, config: ModelConfig) -> Job:
    """Separate noise that arrives in blocks of ten seconds, in segments of eight seconds; discard the results."""
    from ...audio import separate_stream  # needs libraries for audio files, as `_loading` does

    baseline = case.candidate in BASELINES
    model: Any = _model(case if baseline else replace(case, candidate="auto"), settings).eval()
    model = _OneStem(model, config) if baseline else model
    mode = STREAM_MODES.get(case.candidate, STREAM_MODES["end to end"])
    samples, block = round(case.seconds * config.sample_rate), 10 * config.sample_rate
    noise = torch.randn(1, config.channels, block)

    def separate_noise() -> None:
        blocks = (noise[..., : min(block, samples - i)] for i in range(0, samples, block))
        stream = separate_stream(model, blocks, dtype=DTYPES[case.dtype], **mode)
        assert sum(stems.shape[-1] for stems in stream) == samples

    return separate_noise


class _OneStem(nn.Module):
    """A baseline with the interface that `separate_stream` expects; shorter outputs are padded."""

    def __init__(self, model: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, mixture: Tensor) -> Tensor:
        """(b, c, samples) → (b, 1, c, samples)."""
        y = self.model(mixture).view(len(mixture), 1, mixture.shape[1], -1)
        return functional.pad(y, (0, mixture.shape[-1] - y.shape[-1]))


def _loading(case: Case, config: ModelConfig) -> Job:
    """Draw examples of four stems each from two songs of noise, stored in 16-bit files or in memory."""
    import soundfile

    from ...training.datasets import FileTrack
    from ...training.loader import Loader

    samples, rate = round(case.seconds * config.sample_rate), config.sample_rate
    folder, noise = tempfile.TemporaryDirectory(), np.random.default_rng(0)
    starts = range(0, 20 * rate, rate)
    windows: list[list[tuple[Any, int]]] = [[] for _ in STEMS]
    for song in range(2):
        paths = tuple(Path(folder.name) / f"{song}-{stem}.wav" for stem in STEMS)
        shape = (samples + starts[-1], config.channels)
        for path in paths:
            soundfile.write(path, noise.integers(-3000, 3000, shape, dtype=np.int16), rate)
        track: Any = FileTrack(f"song {song}", paths, rate, shape[0])
        if case.candidate == "memory":
            stems = torch.stack([track.crop(stem, 0, shape[0]) for stem in range(len(STEMS))])
            track = Song(track.name, stems, rate, (), licence="", source="noise")
        for stem_windows in windows:
            stem_windows += [(track, start) for start in starts]
    batches = iter(Loader(Remixer(windows, samples, 1), workers=2 if "ahead" in case.candidate else 0))

    def draw() -> None:
        assert Path(folder.name).is_dir()  # the folder exists as long as this function refers to it
        for _ in range(EXAMPLES):
            next(batches)

    return draw
