"""Training examples: sums of stems from different songs, each stem with a random gain or silenced.

songs → salient windows per stem → random windows → gain, or silence → mixture and target

Songs are in memory (`bsmamba2.synth.Song`) or in files (`bsmamba2.training.datasets`). `bsmamba2.training` adds workers
and processes (`loader`), augmented stems, and examples with all stems from one excerpt (`augmentation`).

Book: "Training". Source: the published implementation of arXiv:2508.14556.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from .metrics import usdr
from .model import BSMamba2

Example = tuple[Tensor, Tensor, str]
"""Mixture (c, samples); target (c, samples), or (stem, c, samples) for several stems; and the origin of the stems."""
Batch = tuple[Tensor, Tensor, list[str]]
"""The same for b examples: both tensors with b as first axis, and b strings."""


class Track(Protocol):
    """A song whose stems can be read in excerpts: a `synth.Song`, or files (`training.datasets.FileTrack`)."""

    @property
    def name(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def stems(self) -> Sized: ...

    def crop(self, stem: int, start: int, samples: int) -> Tensor:
        """Excerpt of one stem, (c, samples) float32."""

    def label(self, stem: int) -> str:
        """Name of a stem, for messages."""


Window = tuple[Track, int]
"""A track and the first sample of a window in it."""
Windows = Sequence[Sequence[Window]]
"""For each stem, all of its salient windows."""
Source = tuple[Track, int, float]
"""Origin of one stem of an example: track, first sample and gain (zero for silence)."""


def salient_windows(stem: Tensor, samples: int, *, floor: float = 1e-3, quantile: float = 0.15) -> list[int]:
    """Source activity detection: find the salient windows of a stem.

    Windows overlap by half; a partial last window is dropped. Each window is cut into 10 chunks. A chunk is active
    if its RMS exceeds the larger of `floor` and the `quantile` of the window's ten RMS values (an exact zero counts as
    1e-5). A window is salient if more than half of its chunks are active in every channel.

    Args:
        stem: (c, samples of the song).
        samples: length of a window, in samples.
        floor: lowest RMS that counts as sound.
        quantile: quantile of the ten values, with linear interpolation.

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


def find_windows(tracks: Iterable[Track], samples: int) -> Windows:
    """Find the salient windows of all tracks, for each stem; reads every stem once in full."""
    windows: list[list[Window]] = []
    for track in tracks:
        windows += [[] for _ in range(len(track.stems) - len(windows))]
        for stem, active in enumerate(windows):
            active += [(track, start) for start in salient_windows(track.crop(stem, 0, track.samples), samples)]
    return windows


class Remixer:
    """Random remixing: endless, seeded training batches from a list of songs.

    For each stem of each example independently, a window is drawn uniformly from all salient windows of that stem in
    all songs. It is replaced by zeros with probability `stem_dropout`, and otherwise multiplied by a gain uniform in
    `gains`. The mixture is the sum of all stems; the target holds the stems in `targets`, with the same gains.

    Args:
        songs: songs to draw from, or their windows from `find_windows`.
        samples: length of an example, in samples.
        batch: number of examples in a batch.
        targets: indices of the stems to separate, in the model's order.
        seed: the same seed gives the same batches.
        stem_dropout: probability that a stem is absent, targets included.
        gains: lowest and highest gain.

    Raises:
        ValueError: if there are no songs, or a stem has no salient window in any song.
    """

    def __init__(
        self, songs: Sequence[Track] | Windows, samples: int, batch: int, *, targets: Sequence[int] = (0,),
        seed: int = 0, stem_dropout: float = 0.1, gains: tuple[float, float] = (0.5, 1.5),
    ) -> None:  # fmt: skip
        if not songs:
            raise ValueError("there is no song to draw from")
        self.samples, self.batch, self.targets, self.seed = samples, batch, targets, seed
        self.stem_dropout, self.gains = stem_dropout, gains
        are_windows = isinstance(songs[0], Sequence)
        self.windows = cast(Windows, songs) if are_windows else find_windows(cast(Sequence[Track], songs), samples)
        for stem, windows in enumerate(self.windows):
            if not windows:
                raise ValueError(f"stem {stem} is never heard for {samples} samples in any song")
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        """Endless batches, read one at a time in this process (`training.loader.Loader` adds workers and processes)."""
        while True:
            yield collate([self.example(self.generator) for _ in range(self.batch)])

    def skip(self, count: int) -> None:
        """Skip `count` batches: draw their random numbers without reading audio."""
        for _ in range(count * self.batch):
            self.draw(self.generator)

    def draw(self, generator: torch.Generator) -> list[Source]:
        """Draw the sources of one example, one for each stem."""
        low, high = self.gains
        sources = []
        for windows in self.windows:
            track, start = windows[int(torch.randint(len(windows), (), generator=generator))]
            absent, gain = torch.rand(2, generator=generator).tolist()
            sources.append((track, start, 0.0 if absent < self.stem_dropout else low + (high - low) * gain))
        return sources

    def example(self, generator: torch.Generator) -> Example:
        """Draw and read one example."""
        return self.read(self.draw(generator))

    def read(self, sources: Sequence[Source]) -> Example:
        """Read the example with the given sources."""
        return self.mix([track.crop(i, start, self.samples) for i, (track, start, _) in enumerate(sources)], sources)

    def mix(self, stems: Sequence[Tensor], sources: Sequence[Source]) -> Example:
        """Scale stems, (c, samples) each, by their gains and sum them → mixture, target, and origin of the stems."""
        scaled = [stem * gain for stem, (*_, gain) in zip(stems, sources, strict=True)]
        targets = [scaled[stem] for stem in self.targets]
        sounding = [
            (stem, track, start / track.sample_rate) for stem, (track, start, gain) in enumerate(sources) if gain
        ]
        names = " + ".join(f"{track.label(stem)} at {seconds:.2f} s" for stem, track, seconds in sounding)
        target = targets[0] if len(targets) == 1 else torch.stack(targets)
        return torch.stack(scaled).sum(0), target, names or "silence"


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples into a batch."""
    mixtures, targets, names = zip(*examples, strict=True)
    return torch.stack(mixtures), torch.stack(targets), list(names)


def spread(windows: Sequence[Window], count: int) -> list[Window]:
    """Select at most `count` windows, evenly spread over all of them."""
    places = np.linspace(0, len(windows), min(count, len(windows)), endpoint=False).astype(int)
    return [windows[place] for place in places]


class Validation:
    """Validation score of a model: mean uSDR in dB, over windows of songs mixed with their original gains.

    Each target is scored in its own salient windows, at most `count` of them, evenly spread over all.

    Differs from the published model, whose code draws 1,200 windows at random, each for a randomly chosen target.

    Args:
        windows: windows of every stem, from `find_windows`.
        samples: length of a window, in samples.
        targets: indices of the stems that the model returns, in its order.
        count: largest number of windows to score per target.

    Raises:
        ValueError: if a target has no windows.
    """

    def __init__(self, windows: Windows, samples: int, *, targets: Sequence[int] = (0,), count: int = 1200) -> None:
        self.samples, self.targets = samples, targets
        heard: dict[tuple[int, int], tuple[Window, list[int]]] = {}  # a window is read once for all of its targets
        for number, stem in enumerate(targets):
            if not windows or not windows[stem]:
                raise ValueError(f"no song for validation has a window in which stem {stem} is heard")
            for track, start in spread(windows[stem], count):
                heard.setdefault((id(track), start), ((track, start), []))[1].append(number)
        self.windows = [window for window, _ in heard.values()]
        self.heard = [numbers for _, numbers in heard.values()]

    def __call__(self, model: BSMamba2) -> dict[str, float]:
        """Return `usdr`, the mean over the targets in dB; for several targets also `usdr_NAME` for each."""
        return self.means(model, self.totals(model))

    def totals(self, model: BSMamba2, first: int = 0, every: int = 1) -> list[float]:
        """Sum of uSDR in dB for each target, over windows `first`, `first + every`, …"""
        device = next(model.parameters()).device
        scores: list[list[float]] = [[] for _ in self.targets]
        with torch.inference_mode():
            for (track, start), numbers in zip(self.windows[first::every], self.heard[first::every], strict=True):
                stems = torch.stack([track.crop(stem, start, self.samples) for stem in range(len(track.stems))])
                estimates = model(stems.sum(0, keepdim=True).to(device))[0].cpu()
                for number in numbers:
                    scores[number].append(usdr(stems[self.targets[number]], estimates[number]))
        return [sum(found) for found in scores]

    def means(self, model: BSMamba2, totals: Sequence[float]) -> dict[str, float]:
        """Convert sums of uSDR over all windows to the means that a call returns."""
        counts = [sum(number in numbers for numbers in self.heard) for number in range(len(self.targets))]
        means = [total / count for total, count in zip(totals, counts, strict=True)]
        by_stem = {f"usdr_{stem}": mean for stem, mean in zip(model.config.stems, means, strict=True)}
        return {"usdr": sum(means) / len(means)} | (by_stem if len(means) > 1 else {})
