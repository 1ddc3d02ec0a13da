"""Labs: ablations that a lab trains, changes to the trained model, and the view that all labs share.

Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import metrics
from ..bands import UnitNorm, generate_bands
from ..config import ModelConfig
from ..data import Remixer
from ..dual_path import BidirectionalBlock, SequenceLayer
from ..experiments.dynamics import changed_steps, sung_frames
from ..experiments.sequence_layers import count_parameters, make_layer, parameter_budget
from ..kernels import accelerate
from ..kernels.chunked import chunked
from ..losses import WINDOWS
from ..mamba2 import Mamba2, RMSNorm
from ..model import BSMamba2
from ..separate import separate
from ..synth import Song, synthesise_songs
from ..train import LOSSES, Step, TrainConfig, Trainer

# --- ablation ---------------------------------------------------------------------------------------------

RATE, BINS = 8_000, 129


class GRU(nn.Module):
    """A gated recurrent unit (causal) with a state of `width`, and a Linear back to d = `dim`."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(dim, width, batch_first=True)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        return self.out_proj(self.gru(x)[0])


def make_gru(config: ModelConfig) -> SequenceLayer:
    """A constructor of GRU layers whose number of parameters is closest to the Mamba-2 mixer's."""
    dim, budget = config.dim, parameter_budget(config)
    width = min(range(1, budget), key=lambda w: abs(3 * w * (dim + w + 2) + w * dim - budget))
    return partial(GRU, dim, width)


OPTIONS: dict[str, dict[Any, Any]] = {
    "sequence_layer": {
        "Mamba-2": partial(make_layer, "mamba2"),
        "attention": partial(make_layer, "attention"),
        "LSTM": partial(make_layer, "lstm"),
        "GRU": make_gru,
    },
    "directions": {"both": 2, "forwards only": 1},
    "norm": {"unit norm": UnitNorm, "RMS norm": RMSNorm},
    "mask": {
        "complex": lambda mask: mask,
        "real": lambda mask: mask.real,
        "within ±1": lambda mask: torch.complex(mask.real.tanh(), mask.imag.tanh()),
    },
    "bands": {count: generate_bands(count, BINS) for count in (16, 4, 8, 32)},
    "layers": {1: 1, 2: 2},
    "state": {32: 32, 2: 2, 128: 128},
    "loss": {name: name for name in LOSSES},
}
"""Options of the ablation lab: option → choice (as the lab shows it) → value. The first choice is the default."""


def ablated_model(**choices: Any) -> BSMamba2:
    """A tiny model at 8 kHz with 16 ms per frame, with a choice for any of the `OPTIONS`.

    All kinds of sequence layer have about the same number of parameters. With "forwards only", an identity replaces the
    backward layer of each block.

    Raises:
        ValueError: for an option or a choice that is not listed.
    """
    value = _chosen(choices)
    config = ModelConfig(
        dim=32, depth=value["layers"], freqs_per_bands=value["bands"], n_fft=2 * (BINS - 1), hop_length=BINS - 1,
        sample_rate=RATE, d_state=value["state"], headdim=32, expand=2,
    )  # fmt: skip
    model = BSMamba2(config, sequence_layer=value["sequence_layer"](config))
    model.mask_estimators[0].register_forward_hook(lambda module, features, mask: value["mask"](mask))
    for name, module in list(model.named_modules()):
        if isinstance(module, UnitNorm):
            model.set_submodule(name, value["norm"](len(module.gain)))
        elif isinstance(module, BidirectionalBlock) and value["directions"] == 1:
            module.set_submodule("backwards", nn.Identity())
    return model


def _chosen(choices: Mapping[str, Any]) -> dict[str, Any]:
    """The value of every option: the chosen one, or the default."""
    value = {name: next(iter(options.values())) for name, options in OPTIONS.items()}
    for name, choice in choices.items():
        if name not in OPTIONS:
            raise ValueError(f"option {name!r} must be {' or '.join(map(repr, OPTIONS))}")
        if choice not in OPTIONS[name]:
            raise ValueError(f"{name}={choice!r} must be {' or '.join(map(repr, OPTIONS[name]))}")
        value[name] = OPTIONS[name][choice]
    return value


@dataclass(frozen=True)
class Ablation:
    """Result of training an ablated model.

    Attributes:
        parameters: number of parameters.
        seconds: training time.
        losses: loss of each step.
        usdr: mean uSDR in dB over the unseen songs with vocals; a silent estimate has 0 dB.
        song, estimate: one of these songs, and its separated vocals (c, samples).
    """

    parameters: int
    seconds: float
    losses: list[float]
    usdr: float
    song: Song
    estimate: Tensor


def ablate(
    *, steps: int = 80, seed: int = 0, on_step: Callable[[Step], Any] = lambda step: None, **choices: Any
) -> Ablation:
    """Train a tiny model on synthesised songs, the same in every call, and score it on unseen ones, with one thread.

    Args:
        steps: training steps, each on two examples of one second.
        seed: for the weights and the order of the examples.
        on_step: called after every step.
        choices: as for `ablated_model`. To save time, the published loss uses three of its windows and fewer frames.

    Raises:
        ValueError: for an option or a choice that is not listed, or fewer than one step.
    """
    training = TrainConfig(
        steps=steps, lr=4e-3, schedule="cosine", loss=_chosen(choices)["loss"], loss_hop=256, loss_windows=WINDOWS[2:]
    )
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = ablated_model(**choices)
        accelerate(model)
        seen, unseen = _songs(8, seed=1), _songs(4, seed=1_000_001)
        started, losses = time.perf_counter(), []
        for step in Trainer(model.train(), training).run(Remixer(seen, RATE, 2, seed=seed)):
            losses.append(step.loss)
            on_step(step)
        seconds = time.perf_counter() - started
        sung = [song for song in unseen if song.vocal_segments]
        estimates = [separate(model.eval(), song.mixture, segment=4.0)[0] for song in sung]
    scores = [metrics.usdr(song.vocals, estimate) for song, estimate in zip(sung, estimates, strict=True)]
    return Ablation(count_parameters(model), seconds, losses, sum(scores) / len(scores), sung[0], estimates[0])


_songs = cache(partial(synthesise_songs, seconds=4.0, sample_rate=RATE))


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one PyTorch thread inside the context, because small tensors gain nothing from more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# --- changes to a trained model ---------------------------------------------------------------------------

REMOVED = {
    "no layers along time": "time",
    "no layers along bands": "band",
    "no backward layers along time": "time.backwards",
    "no forward layers along time": "time.forwards",
}
"""Change → the submodule that an identity replaces in every dual-path layer."""
SHUFFLED = {
    "layers along time: frames shuffled": ("time", 1),
    "layers along bands: bands shuffled": ("band", 1),
    "layers along time: bands shuffled": ("time", 0),
}
"""Change → the block in every dual-path layer, and the axis of its input (sequences, length, d) to shuffle."""
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Δ held at its mean": lambda sung, dt: dt.mean(1, keepdim=True).expand_as(dt),
    "Δ = 0 in silence": lambda sung, dt: dt * sung[:, None],
}
"""Change → a function for all mixers along time: (sung frames (t,), own Δ (b, t, h)) → changed Δ (b, t, h)."""
DECAY_BITS = {f"decay in {bits} bits": bits for bits in (8, 6, 4)}
"""Change → significand bits of the decay exp(Δ·A) in all mixers along time; bfloat16 has 8."""
CHANGES = ("none", *REMOVED, *SHUFFLED, *STEPS, *DECAY_BITS)


@contextmanager
def changed_model(model: BSMamba2, change: str, sung: Tensor) -> Iterator[None]:
    """Make one of the `CHANGES` to a trained model, inside the context; `sung`, (t,) bool, marks the sung frames.

    Raises:
        ValueError: for a change that is not listed.
    """
    if change not in CHANGES:
        raise ValueError(f"change={change!r} must be {' or '.join(map(repr, CHANGES))}")
    with ExitStack() as stack:
        for layer in model.layers:
            if change in REMOVED:
                stack.callback(layer.set_submodule, REMOVED[change], layer.get_submodule(REMOVED[change]))
                layer.set_submodule(REMOVED[change], nn.Identity())
                continue
            if change in SHUFFLED:
                block, axis = SHUFFLED[change]
                stack.enter_context(shuffled(layer.get_submodule(block), axis))
                continue
            for name, frames in (("forwards", sung), ("backwards", sung.flip(0))):
                mixer = cast(Mamba2, layer.get_submodule(f"time.{name}.mixer"))
                if change in STEPS:
                    stack.enter_context(changed_steps(mixer, partial(STEPS[change], frames)))
                elif change in DECAY_BITS:
                    stack.callback(setattr, mixer, "scan", mixer.scan)
                    mixer.scan = partial(scan_with_rounded_decay, bits=DECAY_BITS[change])
                    stack.enter_context(changed_steps(mixer, lambda dt: dt))  # use the plain form, which calls the scan
        yield


@contextmanager
def shuffled(block: nn.Module, axis: int) -> Iterator[None]:
    """Shuffle a block's input along an axis, and restore the original order in its output, inside the context."""

    def order(x: Tensor) -> Tensor:
        return torch.randperm(x.shape[axis], generator=torch.Generator().manual_seed(0))

    with (
        block.register_forward_pre_hook(lambda _, inputs: inputs[0].index_select(axis, order(inputs[0]))),
        block.register_forward_hook(lambda _, __, y: y.index_select(axis, order(y).argsort())),
    ):
        yield


def scan_with_rounded_decay(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, bits: int
) -> Tensor:
    """Chunked scan (`bsmamba2.ssd`) whose decay per frame, exp(Δ·A), is rounded to `bits` significand bits."""
    fraction, exponent = torch.frexp((dt * A).exp())
    rounded = torch.ldexp((fraction * 2**bits).round(), exponent - bits)
    # The step that gives the rounded decay replaces Δ, and the input is scaled to keep Δ · x.
    step = (rounded.clamp(min=1e-30).log() / A).clamp(min=1e-6 * dt)
    y: Tensor = chunked(x * (dt / step)[..., None], step, A, B, C)
    return y if D is None else y + D[:, None] * x


@dataclass(frozen=True)
class ChangedRun:
    """Result of a changed model: estimated vocals (c, samples), their uSDR, and their level in silence, both in dB.

    The level is relative to the mixture's in the samples outside `Song.vocal_segments`; NaN if there are none.
    """

    estimate: Tensor
    usdr: float
    level_in_silence: float


@torch.inference_mode()
def with_change(model: BSMamba2, song: Song, change: str) -> ChangedRun:
    """Separate a song with vocals, as one segment, with one of the `CHANGES` made to the model.

    The model's first stem must be the vocals.

    Raises:
        ValueError: for a change that is not listed.
    """
    hop_length = model.config.hop_length
    with changed_model(model, change, sung_frames(song, song.samples // hop_length + 1, hop_length)):
        estimate = model(song.mixture[None])[0, 0]
    silent = ~sung_frames(song, song.samples, 1)
    power = [signal[:, silent].square().mean() for signal in (estimate, song.mixture)]
    return ChangedRun(estimate, metrics.usdr(song.vocals, estimate), 10 * float(torch.log10(power[0] / power[1])))


# --- view of a lab ----------------------------------------------------------------------------------------


def lab(show: Callable[..., Any], controls: Mapping[str, Any], *, button: str = "") -> Any:
    """View of a lab: controls (ipywidgets), a status line, and the output of `show`, called with the controls' values.

    Without a `button` (its label), `show` runs immediately and after every change; with one, when the button is
    pressed. While it runs, the status line shows "computing …", the last output is grey, and the button is disabled.
    """
    from ipywidgets import HTML, Box, Button, Layout, Output, VBox  # type: ignore[import-untyped]

    status, output, pressed = HTML("ready"), Output(), Button(description=button)

    def update(_: Any = None) -> None:
        status.value = '<style>.stale {opacity: 0.4}</style><b role="status" aria-live="polite">computing …</b>'
        output.add_class("stale")
        pressed.disabled = True
        try:
            with output:
                output.clear_output(wait=True)
                show(**{name: control.value for name, control in controls.items()})
        finally:
            status.value, pressed.disabled = "ready", False
            output.remove_class("stale")

    for control in controls.values():
        control.layout, control.style.description_width = Layout(width="26rem"), "14rem"
        if hasattr(control, "continuous_update"):
            control.continuous_update = False
        if not button:
            control.observe(update, "value")
    pressed.on_click(update)
    if not button:
        update()
    rows = Box([*controls.values()], layout=Layout(flex_flow="row wrap"))
    return VBox([rows, *[pressed] * bool(button), status, output])
