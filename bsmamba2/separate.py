"""A whole song through a model that learned on segments.

song → overlapping segments → model → weighted sum of the overlaps → stems

Book: "The whole model". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .model import BSMamba2


@torch.inference_mode()
def separate(
    model: BSMamba2,
    mixture: Tensor,
    *,
    segment: float = 8.0,
    overlap: float = 0.5,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Tensor:
    """Separate a song of any length.

    With `overlap=0` the segments stand end to end, as in the paper's evaluation; otherwise each is
    weighted by a triangle and the sum divided by the sum of the weights, so that no edge is heard. The
    last segment is filled up with zeros and trimmed.

    Args:
        model: its configuration gives the sample rate and channels.
        mixture: (c, samples), at the model's sample rate.
        segment: length of a segment, in seconds.
        overlap: share of a segment that the next one covers too, from 0 to below 1.
        progress: wraps the range of segment starts, `tqdm` for instance.

    Returns:
        (stem, c, samples).

    Raises:
        ValueError: for other channels, no samples, NaN or infinite samples, or a segment or overlap
            out of range.
    """
    config = model.config
    if mixture.dim() != 2 or mixture.shape[0] != config.channels or not mixture.shape[1]:
        raise ValueError(f"mixture {tuple(mixture.shape)} must be (c={config.channels}, samples), not empty")
    if not mixture.isfinite().all():
        raise ValueError("the mixture holds samples that are NaN or infinite: repair the file first")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap!r} must lie in [0, 1)")
    samples = mixture.shape[1]
    length = round(segment * config.sample_rate)
    if length <= config.n_fft // 2:
        raise ValueError(f"segment={segment!r} s is {length} samples: make it longer than {config.n_fft // 2}")
    step = max(1, round(length * (1 - overlap)))
    weight = mixture.new_ones(length)
    if overlap:
        ramp = torch.arange(1, length + 1, dtype=mixture.dtype, device=mixture.device)
        weight = torch.minimum(ramp, ramp.flip(0)) / (length / 2)

    stems = mixture.new_zeros((len(config.stems), config.channels, samples))
    total = mixture.new_zeros(samples)
    last = max(samples - length, 0)
    for start in progress(range(0, last + step, step)):
        part = mixture[:, start : start + length]
        if not (size := part.shape[1]):
            break
        padded = torch.nn.functional.pad(part, (0, length - size))
        stems[..., start : start + size] += (model(padded[None])[0] * weight)[..., :size]
        total[start : start + size] += weight[:size]
    return stems / total
