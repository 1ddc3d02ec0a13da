"""Separate a whole song: overlapping segments → model → weighted overlap-add.

A model is trained on segments of a few seconds, but songs are longer. With `overlap=0`, the segments are placed end to
end, as in the paper's evaluation. Otherwise, each is weighted by a triangle w, and the sum is divided by the sum of the
weights, so that no edge is audible:

    ŝ(n) = Σ_i w(n − i·step) · ŝ_i(n − i·step) / Σ_i w(n − i·step)        w(n) = min(n + 1, length − n)

The weights are whole numbers and the sums are float64. If all segments agree on a float32 value, the quotient is that
exact value (as long as at most a thousand segments overlap). So if a model returns its input, the result equals the
mixture bit for bit.

`bsmamba2.audio` does the same for songs that do not fit in memory, and for files. Book: "Separating songs". Axis
letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import ModelConfig
from .model import BSMamba2

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types for the model's arithmetic. The STFT, the decay and the masks stay in float32 or wider."""

Progress = Callable[[int, int], None]
"""Called with the number of samples finished since the last call, and the total number of samples."""


def separate(
    model: BSMamba2,
    mixture: Tensor,
    *,
    segment: float = 8.0,
    overlap: float = 0.5,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    shifts: int = 1,
    tta: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Separate a song that fits in memory, by overlap-add; for longer songs, see `audio.separate_stream`.

    The last segment is zero-padded, and its estimate is trimmed.

    Args:
        model: separator; its configuration sets the sample rate and channels. It runs on the device of its weights.
        mixture: (c, samples) float32, at the model's sample rate.
        segment: length of a segment, in seconds.
        overlap: fraction of a segment that the next one also covers, from 0 to below 1.
        batch: number of segments that the model processes at once.
        dtype: type of the model's arithmetic, one of `DTYPES`.
        shifts, tta: test-time averaging, see `tta_views`.
        progress: called as samples are finished.

    Returns:
        (stem, c, samples) float32, on the mixture's device.

    Raises:
        ValueError: if the mixture has a wrong number of channels, no samples, or NaN or infinite samples; if segment,
            overlap, batch or shifts are out of range; or if the model returns NaN or infinite samples.
    """
    config = model.config
    if mixture.dim() != 2 or mixture.shape[0] != config.channels or not mixture.shape[1]:
        raise ValueError(f"mixture {tuple(mixture.shape)} must be (c={config.channels}, samples), not empty")
    length, step, weight = overlap_add_window(config, segment, overlap, batch)
    check_mixture(mixture)
    samples = mixture.shape[1]
    views = tta_views(config, shifts, tta)
    if len(views) > 1:

        def separate_view(view: View) -> Tensor:
            padded = torch.nn.functional.pad(view.transform(mixture), (view.delay, views[-1].delay - view.delay))
            report = None if progress is None else lambda done, total: progress(done, total * len(views))
            stems = separate(
                model, padded, segment=segment, overlap=overlap, batch=batch, dtype=dtype, progress=report
            )  # fmt: skip
            return stems[..., view.delay : view.delay + samples]

        return average(views, map(separate_view, views))

    starts = range(0, max(0, samples - length) + step, step)
    padded = torch.nn.functional.pad(mixture.cpu(), (0, starts[-1] + length - samples))
    weighted_sum = torch.zeros(len(config.stems), *padded.shape, dtype=torch.float64)
    weight_sum = torch.zeros(padded.shape[1], dtype=torch.float64)
    finished = 0
    for first in range(0, len(starts), batch):
        batch_starts = starts[first : first + batch]
        segments = torch.stack([padded[:, start : start + length] for start in batch_starts])
        for start, estimate in zip(batch_starts, _forward_batches(model, segments, batch, dtype), strict=True):
            weighted_sum[..., start : start + length] += estimate.double() * weight
            weight_sum[start : start + length] += weight
        if progress is not None:
            end = min(batch_starts[-1] + step, samples) if first + batch < len(starts) else samples
            progress(end - finished, samples)
            finished = end
    return (weighted_sum / weight_sum)[..., :samples].float().to(mixture.device)


def overlap_add_window(config: ModelConfig, segment: float, overlap: float, batch: int) -> tuple[int, int, Tensor]:
    """Segment length and hop of the overlap-add, in samples, and the weights, (length,) float64; checks the arguments.

    Raises:
        ValueError: as for `separate`.
    """
    if not 0 < segment <= 3600:
        raise ValueError(f"segment={segment!r} must be seconds, above 0 and at most 3600")
    length = round(segment * config.sample_rate)
    if length <= config.n_fft // 2:
        raise ValueError(f"segment={segment!r} s is {length} samples: make it longer than {config.n_fft // 2}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap!r} must lie in [0, 1)")
    if batch < 1:
        raise ValueError(f"batch={batch!r} must be at least 1")
    if not overlap:
        return length, length, torch.ones(length, dtype=torch.float64)
    step = stagger_step(max(1, round(length * (1 - overlap))), length, config.hop_length)
    ramp = torch.arange(1, length + 1, dtype=torch.float64)
    return length, step, torch.minimum(ramp, ramp.flip(0))


def stagger_step(step: int, length: int, hop_length: int) -> int:
    """Increase the segment step so that the STFT frames of overlapping segments are staggered, if the length allows it.

    An estimate depends slightly on the positions of its STFT frames. Segments whose starts differ by whole hops all
    make the same error. If n segments overlap at a sample, steps of a whole number of hops plus 1/n hop average this
    error out.

    Args:
        step: samples from the start of one segment to the start of the next.
        length: length of a segment, in samples.
        hop_length: samples between frames.
    """
    offset = hop_length // max(2, round(length / step))
    staggered = step + (offset - step) % hop_length
    return staggered if staggered < length else step


@dataclass(frozen=True)
class View:
    """Transformed copy of a mixture for test-time averaging: delayed, channels swapped, or polarity inverted."""

    delay: int
    swapped: bool = False
    sign: int = 1

    def transform(self, audio: Tensor) -> Tensor:
        """Apply the channel swap and polarity to audio (..., c, samples); the operation is its own inverse."""
        return (audio.flip(-2) if self.swapped else audio) * self.sign


def tta_views(config: ModelConfig, shifts: int, tta: bool) -> list[View]:
    """Views of the mixture for test-time averaging of their estimates; each view costs one pass of the model.

    Args:
        config: sets the sample rate and hop length.
        shifts: number of evenly spaced delays within half a second. With each delay, segments and frames begin at
            different samples, as with Demucs's random shifts. 1: no delay.
        tta: whether to separate each delayed copy also with swapped channels and with inverted polarity (3 passes).

    Raises:
        ValueError: if the number of shifts is out of range.
    """
    if not 1 <= shifts <= 100:
        raise ValueError(f"shifts={shifts!r} must be from 1 to 100")
    half_second = config.sample_rate // 2
    step = stagger_step(half_second // shifts, half_second + config.hop_length, config.hop_length)
    transforms = ((False, 1), (True, 1), (False, -1)) if tta else ((False, 1),)
    return [View(i * step, swapped, sign) for i in range(shifts) for swapped, sign in transforms]


def average(views: Sequence[View], estimates: Iterable[Tensor]) -> Tensor:
    """Mean of the estimates (..., c, samples) of all views, transformed back; float32, summed in float64."""
    pairs = zip(views, estimates, strict=True)
    return (sum(view.transform(stems).double() for view, stems in pairs) / len(views)).float()  # type: ignore[union-attr]


def _forward_batches(model: BSMamba2, segments: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Run the model on segments (b, c, length), `batch` at a time → (b, stem, c, length) float32 on the CPU."""
    with _inference_context(model, dtype) as device:
        stems = torch.cat([model(signals.to(device)).float().cpu() for signals in segments.split(batch)])
    check_stems(stems, dtype)
    return stems


@contextmanager
def _inference_context(model: BSMamba2, dtype: torch.dtype) -> Iterator[torch.device]:
    """Inference mode and autocast to one of `DTYPES`; yields the device of the model's weights."""
    weights = next(iter(model.parameters()), None)
    device = torch.device("cpu") if weights is None else weights.device
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with torch.inference_mode(), autocast:
        yield device


def check_mixture(block: Tensor) -> None:
    """Raise ValueError if a mixture contains NaN or infinite samples."""
    if not block.isfinite().all():
        raise ValueError("the mixture holds samples that are NaN or infinite: repair the file first")


def check_stems(stems: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if a model returned NaN or infinite samples."""
    if not stems.isfinite().all():
        fix = "use another checkpoint" if dtype == torch.float32 else "use --dtype float32, or another checkpoint"
        raise ValueError(f"the model gives samples that are NaN or infinite: {fix}")
