"""Training examples: stems of different songs, each with its own gain, sometimes none, summed.

songs → salient windows per stem → random windows → (changes) → gain, silence → mixture and target

Songs lie in memory (`bsmamba2.synth.songs`) or in files (`bsmamba2.training.datasets`).

Book: "Training". Source: the published implementation of arXiv:2508.14556.
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .metrics import usdr
from .model import BSMamba2
from .synth.songs import Song
from .training.augmentation import Augmentation
from .training.distributed import all_gather_object, rank, world_size

Example = tuple[Tensor, Tensor, str]
"""Mixture and target, each (c, samples) float32, and where they are from."""
Batch = tuple[Tensor, Tensor, list[str]]
"""The same of b examples: (b, c, samples) twice, and b strings."""


class Track(Protocol):
    """A song whose stems can be read piece by piece: a `songs.Song`, or files (`tracks.FileTrack`)."""

    @property
    def name(self) -> str: ...
    @property
    def sample_rate(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def stems(self) -> Sized: ...

    def read(self, stem: int, start: int, samples: int) -> Tensor:
        """A piece of one stem, (c, samples) float32."""

    def label(self, stem: int) -> str:
        """What to call a stem in a message."""


Windows = Sequence[Sequence[tuple[Track, int]]]
"""Per stem, the target first: track and first sample of every salient window."""


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


def find_windows(tracks: Iterable[Track], samples: int) -> Windows:
    """The salient windows of all tracks, stem by stem; reads every stem once from end to end."""
    windows: list[list[tuple[Track, int]]] = []
    for track in tracks:
        windows += [[] for _ in range(len(track.stems) - len(windows))]
        for stem, found in enumerate(windows):
            found += [(track, start) for start in salient_windows(track.read(stem, 0, track.samples), samples)]
    return windows


class Remixer:
    """An endless, seeded supply of training batches from a list of songs.

    For every example and each stem independently (but for `original` and `augment_prob`): a window drawn uniformly from all
    salient windows of that stem in all songs, replaced by zeros with probability `silence`, times a gain uniform in
    `gains`. The mixture is the sum; the target is the first stem as it stands in that sum.

    Args:
        songs: what to draw from, the target being their first stem; or their windows, from `find_windows`.
        samples: length of an example.
        batch: examples in a batch.
        seed: the same seed gives the same batches.
        silence: probability that a stem is absent, the target included.
        gains: lowest and highest gain.
        original: probability that an example's stems are all of the song and place that were drawn for the target,
            so in one key and time; silence and gains stay each stem's own. Differs from the published model, which
            has none of these: 0.
        augment_prob: probability that an example's stems are changed in speed, spectrum, sides and more (`augment_prob.Augmentation`)
            before their gain. Differs from the published model, which changes none: 0.

    Raises:
        ValueError: when a stem has no salient window in any song, or `original` or `augment_prob` is no probability.
    """

    def __init__(
        self,
        songs: Sequence[Track] | Windows,
        samples: int,
        batch: int,
        *,
        seed: int = 0,
        silence: float = 0.1,
        gains: tuple[float, float] = (0.5, 1.5),
        original: float = 0.0,
        augment_prob: float = 0.0,
    ) -> None:
        if not songs:
            raise ValueError("there is no song to draw from")
        for name, share in (("original", original), ("augment_prob", augment_prob)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share!r} must lie in [0, 1]")
        self.original, self.augment_prob = original, augment_prob
        self.samples, self.batch, self.seed, self.silence, self.gains = samples, batch, seed, silence, gains
        known = isinstance(songs[0], Sequence)
        self.windows = cast(Windows, songs) if known else find_windows(cast(Sequence[Track], songs), samples)
        for stem, found in enumerate(self.windows):
            if not found:
                raise ValueError(f"stem {stem} is never heard for {samples} samples in any song")
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, one process, one after the other (`Loader` has more of both)."""
        while True:
            yield collate([self.example(self.generator) for _ in range(self.batch)])

    def skip(self, count: int) -> None:
        """Draw `count` batches and read none."""
        for _ in range(count * self.batch):
            self.draw(self.generator)

    def draw(self, generator: torch.Generator) -> tuple[list[tuple[Track, int, float]], Augmentation | None]:
        """What one example is made of: for every stem a track, a first sample, and a gain, zero for silence.

        And how its stems are changed, if they are.
        """
        low, high = self.gains
        drawn = []
        for windows in self.windows:
            track, start = windows[int(torch.randint(len(windows), (), generator=generator))]
            absent, gain = torch.rand(2, generator=generator).tolist()
            drawn.append((track, start, 0.0 if absent < self.silence else low + (high - low) * gain))
        original = bool(self.original) and float(torch.rand((), generator=generator)) < self.original
        if original:
            track, start, _ = drawn[0]
            drawn = [(track, start, gain) for *_, gain in drawn]
        if not self.augment_prob or float(torch.rand((), generator=generator)) >= self.augment_prob:
            return drawn, None
        seed = int(torch.randint(2**62, (), generator=generator))
        return drawn, Augmentation(seed, len(drawn), together=original)

    def example(self, generator: torch.Generator) -> Example:
        """One mixture, its target, and where its stems are from."""
        drawn, change = self.draw(generator)
        lengths = [self.samples] * len(drawn) if change is None else change.lengths(self.samples)
        places = []  # where a track ends in what is to be sped up, it is read from earlier on, or is read whole
        for (track, start, _), length in zip(drawn, lengths, strict=True):
            length = min(length, track.samples)
            places.append((track, min(start, track.samples - length), length))
        parts = [track.read(stem, start, length) for stem, (track, start, length) in enumerate(places)]
        if change is not None:
            parts = change(parts, self.samples, drawn[0][0].sample_rate)
        gains = [gain for *_, gain in drawn]
        parts = [part * gain for part, gain in zip(parts, gains, strict=True)]
        heard = [
            f"{track.label(stem)} at {start / track.sample_rate:.2f} s"
            for stem, (track, start, _) in enumerate(places)
            if gains[stem]
        ]
        named = " + ".join(heard) or "silence"
        return torch.stack(parts).sum(0), parts[0], named if change is None else f"{named}, changed"


class Loader:
    """A remixer's examples by number, in batches, for any number of workers and processes.

    Example i is drawn from a generator of its own, seeded with (seed, i), whoever draws it. So a run
    repeats with any number of workers, no two of them draw the same, and n processes with batch b see
    together what one process with batch n·b sees.

    Args:
        remixer: draws; its batch is that of one process.
        workers: processes that read ahead; 0 reads when asked.
    """

    def __init__(self, remixer: Remixer, *, workers: int = 0) -> None:
        self.remixer, self.workers, self.done = remixer, workers, 0

    def skip(self, count: int) -> None:
        """Go on after `count` more batches of every process."""
        self.done += count

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, from the one after those that were skipped."""
        return iter(
            DataLoader(
                _Numbered(self.remixer),
                batch_sampler=_Shares(self.remixer.batch, self.done),
                num_workers=self.workers,
                collate_fn=collate,
                worker_init_fn=_stand_apart,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # or every start would draw from the global one
            )
        )


def _stand_apart(worker: int) -> None:
    """Ctrl-C in a terminal and torchrun's signals go to whole groups of processes: a worker has one of its own.

    So it works on while its parent finishes a step. When the parent ends, it ends the worker, or the worker sees it.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Numbered(Dataset):
    """Example i of a remixer, whatever was drawn before."""

    def __init__(self, remixer: Remixer) -> None:
        self.remixer = remixer

    def __getitem__(self, number: int) -> Example:
        seed = np.random.SeedSequence([self.remixer.seed, number]).generate_state(1, np.uint64)
        return self.remixer.example(torch.Generator().manual_seed(int(seed[0])))


class _Shares:
    """The numbers of this process's batches, from its batch number `first` on, without end."""

    def __init__(self, batch: int, first: int) -> None:
        self.batch, self.first = batch, first

    def __iter__(self) -> Iterator[list[int]]:
        for number in itertools.count(self.first):
            start = (number * world_size() + rank()) * self.batch
            yield list(range(start, start + self.batch))


def pick(windows: Sequence[tuple[Track, int]], count: int) -> list[tuple[Track, int]]:
    """At most `count` windows, spread over all of them."""
    places = np.linspace(0, len(windows), min(count, len(windows)), endpoint=False).astype(int)
    return [windows[place] for place in places]


def whole_windows(windows: Sequence[tuple[Track, int]], samples: int, count: int) -> list[Song]:
    """Stretches of tracks as songs: all stems at `count` of the target's windows."""
    found = []
    for track, start in pick(windows, count):
        stems = torch.stack([track.read(stem, start, samples) for stem in range(len(track.stems))])
        place, rate = start / track.sample_rate, track.sample_rate
        vocal_segments = ((0.0, samples / rate),)
        found.append(
            Song(f"{track.name} at {place:.1f} s", stems, rate, vocal_segments, "see the data set", track.label(0))
        )
    return found


class Validation:
    """Scores a model on stretches of whole songs: mean uSDR in dB of the target, all stems as they were recorded.

    The stretches are salient windows of the target, at most `count` of them, spread over all there are. Under
    `torchrun` the processes share them out.

    Args:
        windows: of the target, as `find_windows` gives them first.
        samples: length of a window.
        count: most windows to score; the published number is 1,200.

    Raises:
        ValueError: when there is no window.
    """

    def __init__(self, windows: Sequence[tuple[Track, int]], samples: int, *, count: int = 1200) -> None:
        if not windows:
            raise ValueError("no song for validation has a window in which the target is heard")
        self.samples = samples
        self.windows = pick(windows, count)

    def __call__(self, model: BSMamba2) -> float:
        """Mean uSDR in dB of the model's first stem."""
        device = next(model.parameters()).device
        found = 0.0
        with torch.inference_mode():
            for track, start in self.windows[rank() :: world_size()]:
                stems = torch.stack([track.read(stem, start, self.samples) for stem in range(len(track.stems))])
                estimate = model(stems.sum(0, keepdim=True).to(device))[0, 0].cpu()
                found += usdr(stems[0], estimate)
        return sum(all_gather_object(found)) / len(self.windows)


def collate(examples: Sequence[Example]) -> Batch:
    """Examples → batch."""
    mixtures, targets, names = zip(*examples, strict=True)
    return torch.stack(mixtures), torch.stack(targets), list(names)
