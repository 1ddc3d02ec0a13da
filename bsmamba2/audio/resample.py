"""Sample-rate conversion with the SoX resampler (soxr, very high quality), whole or block by block.

Book: "Separating songs", which builds a windowed-sinc resampler and compares. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import soxr
import torch
from torch import Tensor


def resample(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """Resample (..., samples) float32 to a different rate: (..., ⌈samples · new_rate / rate⌉).

    Raises:
        ValueError: for a rate that is not positive.
    """
    return torch.cat(list(resample_blocks([audio], rate, new_rate)), dim=-1)


def resample_blocks(blocks: Iterable[Tensor], rate: int, new_rate: int) -> Iterator[Tensor]:
    """Streaming resampler: equals `resample` of the whole signal bit for bit, for any block lengths.

    Args:
        blocks: (..., samples) float32, in order, of any length, at least one block.
        rate: their sample rate, in hertz.
        new_rate: the output rate, in hertz; if it is the same, the blocks pass through unchanged.

    Yields:
        (..., samples) blocks; memory use does not grow with the length of the signal.

    Raises:
        ValueError: for a rate that is not positive.
    """
    if rate < 1 or new_rate < 1:
        raise ValueError(f"rate={rate!r} and new_rate={new_rate!r} must be positive, in hertz")
    if rate == new_rate:
        yield from blocks
        return
    stream: soxr.ResampleStream | None = None
    received = emitted = 0
    for block in blocks:
        if stream is None:
            shape, channels = block.shape[:-1], math.prod(block.shape[:-1])
            stream = soxr.ResampleStream(rate, new_rate, channels, dtype="float32", quality="VHQ")
        received += block.shape[-1]
        resampled = stream.resample_chunk(block.reshape(channels, -1).T.contiguous().numpy())
        resampled = resampled[: -(-received * new_rate // rate) - emitted]
        emitted += len(resampled)
        yield _unflatten(resampled, shape)
    if stream is not None:
        # soxr rounds the length. Extra zeros, which it assumes after the end anyway, make it long enough to trim.
        zeros = np.zeros((2 * -(-rate // new_rate), channels), dtype="float32")
        resampled = stream.resample_chunk(zeros, last=True)[: -(-received * new_rate // rate) - emitted]
        yield _unflatten(resampled, shape)


def _unflatten(frames: np.ndarray, shape: torch.Size) -> Tensor:
    """(samples, channels) → (..., samples)."""
    return torch.from_numpy(np.ascontiguousarray(frames.T)).reshape(*shape, len(frames))
