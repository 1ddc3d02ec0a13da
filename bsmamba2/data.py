"""Training examples: stems of different songs, each with its own gain, sometimes none, summed.

songs → salient windows per stem → random windows → gain, silence → mixture and target

Book: "Training". Source: the published implementation of arXiv:2508.14556.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .songs import Song


def salient_windows(stem: Tensor, samples: int, *, floor: float = 1e-3, quantile: float = 0.15) -> list[int]:
    """Where a stem plays: starts of the windows in which it is active.

    Windows step by half their length; the partial last one is dropped. Each is cut into 10 chunks; a
    chunk is active when its RMS exceeds the larger of `floor` and the `quantile` of the window's own
    ten values (an exact zero counts 1e-5). The window is salient when in every channel more than half
    of its chunks are active.

    Args:
        stem: (c, samples of the song).
        samples: length of a window.
        floor: least RMS that counts as sound.
        quantile: of the ten values, linear.

    Returns:
        First sample of every salient window, in order; empty for a song shorter than a window.

    Raises:
        ValueError: for a window shorter than its ten chunks.
    """
    if samples < 10:
        raise ValueError(f"a window of {samples} samples cannot be cut into 10 chunks")
    if stem.shape[-1] < samples:
        return []
    windows = stem.unfold(-1, samples, samples // 2)  # (c, windows, samples)
    chunks = windows[..., : samples // 10 * 10].unflatten(-1, (10, -1))
    rms = chunks.double().square().mean(-1).sqrt()  # (c, windows, 10)
    rms = torch.where(rms == 0, 1e-5, rms)
    threshold = rms.quantile(quantile, dim=-1, keepdim=True).clamp(min=floor)
    salient = ((rms > threshold).sum(-1) > 5).all(0)
    return (salient.nonzero()[:, 0] * (samples // 2)).tolist()


class Remixer:
    """An endless, seeded supply of training batches from a list of songs.

    For every example and each stem independently: a window drawn uniformly from all salient windows of
    that stem in all songs, replaced by zeros with probability `silence`, times a gain uniform in
    `gains`. The mixture is the sum; the target is the first stem as it stands in that sum.

    Args:
        songs: what to draw from; stems (stem, c, samples), the target first.
        samples: length of an example.
        batch: examples in a batch.
        seed: the same seed gives the same batches.
        silence: probability that a stem is absent, the target included.
        gains: lowest and highest gain.

    Raises:
        ValueError: when a stem has no salient window in any song.
    """

    def __init__(
        self,
        songs: Sequence[Song],
        samples: int,
        batch: int,
        *,
        seed: int = 0,
        silence: float = 0.1,
        gains: tuple[float, float] = (0.5, 1.5),
    ) -> None:
        if not songs:
            raise ValueError("there is no song to draw from")
        self.songs, self.samples, self.batch, self.silence, self.gains = songs, samples, batch, silence, gains
        self.windows = [
            [(song, start) for song in songs for start in salient_windows(song.stems[stem], samples)]
            for stem in range(len(songs[0].stems))
        ]
        for stem, windows in enumerate(self.windows):
            if not windows:
                raise ValueError(f"stem {stem} is never heard for {samples} samples in {len(songs)} songs")
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (mixture, target), each (b, c, samples) float32, without end."""
        while True:
            examples = [self.example() for _ in range(self.batch)]
            mixtures, targets = zip(*examples, strict=True)
            yield torch.stack(mixtures), torch.stack(targets)

    def example(self) -> tuple[Tensor, Tensor]:
        """One mixture and its target, each (c, samples)."""
        low, high = self.gains
        parts = []
        for stem, windows in enumerate(self.windows):
            song, start = windows[int(torch.randint(len(windows), (), generator=self.generator))]
            absent, gain = torch.rand(2, generator=self.generator).tolist()
            part = song.stems[stem, :, start : start + self.samples]
            parts.append(part * (0.0 if absent < self.silence else low + (high - low) * gain))
        return torch.stack(parts).sum(0), parts[0]
