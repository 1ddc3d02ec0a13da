"""Training examples: stems of different songs, each with its own gain, sometimes none, summed.

songs → salient windows per stem → random windows → gain, or silence → mixture and target

Songs lie in memory (`bsmamba2.synth.Song`) or in files (`bsmamba2.training.datasets`). `bsmamba2.training` adds workers
and processes (`loader`), and examples of one place and changed stems (`augmentation`).

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
"""Mixture and target, each (c, samples) float32, and where they are from."""
Batch = tuple[Tensor, Tensor, list[str]]
"""The same of b examples: (b, c, samples) twice, and b strings."""


class Track(Protocol):
    """A song whose stems can be read in pieces: a `synth.Song`, or files (`training.datasets.FileTrack`)."""

    @property
    def name(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def stems(self) -> Sized: ...

    def crop(self, stem: int, start: int, samples: int) -> Tensor:
        """A piece of one stem, (c, samples) float32."""

    def label(self, stem: int) -> str:
        """Name of a stem in a message."""


Window = tuple[Track, int]
"""A track and the first sample of a window in it."""
Windows = Sequence[Sequence[Window]]
"""Per stem, the target first: every salient window."""
Source = tuple[Track, int, float]
"""Where one stem of an example is from, track and first sample, and its gain, zero for silence."""


def salient_windows(stem: Tensor, samples: int, *, floor: float = 1e-3, quantile: float = 0.15) -> list[int]:
    """Source activity detection: starts of the windows in which a stem is active.

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


def find_windows(tracks: Iterable[Track], samples: int) -> Windows:
    """The salient windows of all tracks, stem by stem; reads every stem once from end to end."""
    windows: list[list[Window]] = []
    for track in tracks:
        windows += [[] for _ in range(len(track.stems) - len(windows))]
        for stem, active in enumerate(windows):
            active += [(track, start) for start in salient_windows(track.crop(stem, 0, track.samples), samples)]
    return windows


class Remixer:
    """Random remixing: an endless, seeded supply of training batches from a list of songs.

    For every example and each stem independently: a window drawn uniformly from all salient windows of that stem in all
    songs, replaced by zeros with probability `stem_dropout`, times a gain uniform in `gains`. The mixture is the sum;
    the target is the first stem as it is in that sum.

    Args:
        songs: to draw from, the target being their first stem; or their windows, from `find_windows`.
        samples: length of an example.
        batch: examples in a batch.
        seed: the same seed gives the same batches.
        stem_dropout: probability that a stem is absent, the target included.
        gains: lowest and highest gain.

    Raises:
        ValueError: when a stem has no salient window in any song.
    """

    def __init__(
        self,
        songs: Sequence[Track] | Windows,
        samples: int,
        batch: int,
        *,
        seed: int = 0,
        stem_dropout: float = 0.1,
        gains: tuple[float, float] = (0.5, 1.5),
    ) -> None:
        if not songs:
            raise ValueError("there is no song to draw from")
        self.samples, self.batch, self.seed, self.stem_dropout, self.gains = samples, batch, seed, stem_dropout, gains
        are_windows = isinstance(songs[0], Sequence)
        self.windows = cast(Windows, songs) if are_windows else find_windows(cast(Sequence[Track], songs), samples)
        for stem, windows in enumerate(self.windows):
            if not windows:
                raise ValueError(f"stem {stem} is never heard for {samples} samples in any song")
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, one process, one after the other (`training.loader.Loader` has more of both)."""
        while True:
            yield collate([self.example(self.generator) for _ in range(self.batch)])

    def skip(self, count: int) -> None:
        """Draw `count` batches and read none."""
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
        """One mixture, its target, and where its stems are from."""
        return self.read(self.draw(generator))

    def read(self, sources: Sequence[Source]) -> Example:
        """The example of these sources."""
        return mix([track.crop(i, start, self.samples) for i, (track, start, _) in enumerate(sources)], sources)


def mix(stems: Sequence[Tensor], sources: Sequence[Source]) -> Example:
    """Stems, (c, samples) each, times their gains → mixture, target, and where the stems are from."""
    scaled = [stem * gain for stem, (*_, gain) in zip(stems, sources, strict=True)]
    names = [
        f"{track.label(stem)} at {start / track.sample_rate:.2f} s"
        for stem, (track, start, gain) in enumerate(sources)
        if gain
    ]
    return torch.stack(scaled).sum(0), scaled[0], " + ".join(names) or "silence"


def collate(examples: Sequence[Example]) -> Batch:
    """Examples → batch."""
    mixtures, targets, names = zip(*examples, strict=True)
    return torch.stack(mixtures), torch.stack(targets), list(names)


def spread(windows: Sequence[Window], count: int) -> list[Window]:
    """At most `count` windows, evenly spread over all of them."""
    places = np.linspace(0, len(windows), min(count, len(windows)), endpoint=False).astype(int)
    return [windows[place] for place in places]


class Validation:
    """Validation score of a model: mean uSDR in dB of the target, over windows of songs as they were recorded.

    The windows are salient ones of the target, at most `count` of them, spread over all there are.

    Args:
        windows: of the target, as `find_windows` gives them first.
        samples: length of a window.
        count: most windows to score; the published number is 1,200.

    Raises:
        ValueError: when there is no window.
    """

    def __init__(self, windows: Sequence[Window], samples: int, *, count: int = 1200) -> None:
        if not windows:
            raise ValueError("no song for validation has a window in which the target is heard")
        self.samples = samples
        self.windows = spread(windows, count)

    def __call__(self, model: BSMamba2) -> float:
        """Mean uSDR in dB of the model's first stem."""
        return sum(self.scores(model, self.windows)) / len(self.windows)

    def scores(self, model: BSMamba2, windows: Sequence[Window]) -> list[float]:
        """The uSDR of every window, in dB."""
        device, scores = next(model.parameters()).device, []
        with torch.inference_mode():
            for track, start in windows:
                stems = torch.stack([track.crop(stem, start, self.samples) for stem in range(len(track.stems))])
                estimate = model(stems.sum(0, keepdim=True).to(device))[0, 0].cpu()
                scores.append(usdr(stems[0], estimate))
        return scores
