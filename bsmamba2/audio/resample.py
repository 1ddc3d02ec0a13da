"""Another sample rate, for a whole signal or for one that arrives in pieces.

    y(n) = Σ_k x(k) · h(n·r/q − k)      h(t) = g·sinc(g·t) · kaiser(t / T)      g = ρ·min(1, q/r)

with r the old rate and q the new one, both divided by their greatest common divisor: the ideal low-pass filter, cut off
a little (ρ) below the lower of the two Nyquist frequencies and faded out by a Kaiser window over T samples on
either side. n·r/q has q different fractional parts, and so there are q different sets of weights.

Book: "Separating songs". Source: J. O. Smith, "Digital Audio Resampling"
(https://ccrma.stanford.edu/~jos/resample/). Axis letters: see `bsmamba2.config`; n here is an output sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

ROLLOFF = 0.9475937167399596
ZEROS = 64
BETA = 14.769656459379492
"""ρ, the zeros of sinc on either side, and β of the Kaiser window, as in torchaudio's and resampy's "kaiser best":
flat to 0.9 of the lower Nyquist frequency, what would fold back over 100 dB down."""

_BLOCK = 2048  # output samples computed at a time, counted from the first: pieces cannot change a sum
_TABLE = 1 << 23  # largest number of weights that are kept


def resample(audio: Tensor, rate: int, new_rate: int) -> Tensor:
    """(..., samples) at one rate → (..., ⌈samples · new_rate / rate⌉) at another.

    Raises:
        ValueError: for a rate that is not positive.
    """
    return torch.cat(list(resample_blocks([audio], rate, new_rate)), dim=-1)


def resample_blocks(blocks: Iterable[Tensor], rate: int, new_rate: int) -> Iterator[Tensor]:
    """The same for a signal in pieces: bit for bit what `resample` gives for the whole, however it is cut.

    Args:
        blocks: pieces (..., samples) in order, of any length, one at least.
        rate: theirs, in hertz.
        new_rate: the one wanted, in hertz.

    Yields:
        Pieces (..., samples); memory does not grow with the length of the signal.

    Raises:
        ValueError: for a rate that is not positive.
    """
    if rate < 1 or new_rate < 1:
        raise ValueError(f"rate={rate!r} and new_rate={new_rate!r} must be positive, in hertz")
    if rate == new_rate:
        yield from blocks
        return
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    reach = math.ceil(ZEROS / (ROLLOFF * min(1, new / old)))  # T: input samples used on either side
    table = _weights(torch.arange(new), old, new, reach) if new * 2 * reach <= _TABLE else None

    waiting, first = Tensor(), 0  # input not yet done with, and the place of its first sample in the signal
    received, done = 0, 0  # samples that came in and went out

    def produce(end: int) -> Iterator[Tensor]:
        """Outputs as far as `end`, a block at a time; what they need is in `waiting`."""
        nonlocal waiting, first, done
        while done < end:
            n = torch.arange(done, min(done + _BLOCK, end))
            place, phase = n * old // new, n * old % new
            weights = table[phase] if table is not None else _weights(phase, old, new, reach)
            start = place - reach + 1 - first
            taps = waiting.unfold(-1, 2 * reach, 1)[..., start, :]  # (..., n, 2T)
            yield (taps * weights.to(waiting)).sum(-1)
            done += len(n)
            keep = done * old // new - reach + 1
            waiting, first = waiting[..., keep - first :], keep

    for i, block in enumerate(blocks):
        if i == 0:
            waiting, first = block.new_zeros((*block.shape[:-1], reach)), -reach
        waiting = torch.cat([waiting, block], dim=-1)
        received += block.shape[-1]
        ready = max(0, (received - reach) * new // old)  # outputs with their last tap inside
        yield from produce(ready - ready % _BLOCK)
    waiting = torch.nn.functional.pad(waiting, (0, 2 * reach))
    yield from produce(-(-received * new // old))
    if not done:
        yield waiting[..., :0]


def _weights(phase: Tensor, old: int, new: int, reach: int) -> Tensor:
    """h for outputs that lie `phase / new` after an input sample, (n, 2T), float32; worked out in float64."""
    gain = ROLLOFF * min(1, new / old)
    t = phase.double()[:, None] / new + torch.arange(reach - 1, -reach - 1, -1, dtype=torch.float64)
    fade = torch.i0(BETA * (1 - (t * gain / ZEROS).square()).clamp(min=0).sqrt()) / torch.i0(
        torch.tensor(BETA, dtype=torch.float64)
    )
    inside = (t * gain).abs() <= ZEROS
    return (gain * torch.sinc(gain * t) * fade * inside).float()
