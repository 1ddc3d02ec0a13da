"""Separate a song file: decode → model's rate → overlap-add → file's rate → one file per stem.

Every step works block by block, so memory use does not grow with the song. Book: "Separating songs". Axis letters: see
`bsmamba2.config`.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from ..model import BSMamba2
from ..separate import Progress, tta_views
from .files import AudioReader
from .resample import resample_blocks
from .streaming import separate_stream
from .writer import FORMATS, StemWriter

_SONGS_AT_ONCE = 8
"""Songs (channel groups times test-time views) per pass over a file; their segments are in memory together."""


def channel_groups(count: int, channels: int = 2, layout: Sequence[str] = ()) -> list[tuple[int, ...]]:
    """Group the channels of a file into songs of `channels` channels; returns the channel indices of each song.

    In a declared layout, a left and a right speaker (FL and FR, BL and BR, ...) form a stereo song, and each other
    speaker (FC, LFE, BC, ...) is a mono song. Without a layout, or for a model that is not stereo, consecutive channels
    form a song, and each remaining channel is a mono song.
    """
    if not layout or channels != 2:
        grouped = count // channels * channels
        pairs = [tuple(range(i, i + channels)) for i in range(0, grouped, channels)]
        return [*pairs, *((i,) for i in range(grouped, count))]
    partner = {name: name.replace("L", "R") for name in layout if name.replace("L", "R") in layout and "L" in name}
    return [
        (i, layout.index(partner[name])) if name in partner else (i,)
        for i, name in enumerate(layout)
        if name not in partner.values()
    ]


def split_channels(signal: Tensor, groups: Sequence[tuple[int, ...]], channels: int = 2) -> Tensor:
    """Split a file into songs: (file's channels, samples) → (b, c, samples); a mono song is copied to c channels."""
    return torch.stack([signal[list(group)].expand(channels, -1) for group in groups])


def join_channels(stems: Tensor, groups: Sequence[tuple[int, ...]]) -> Tensor:
    """Inverse of `split_channels`: (b, stem, c, samples) → (stem, the groups' channels in file order, samples).

    A copied channel becomes the mean of its copies.
    """
    order = torch.tensor([i for group in groups for i in group]).argsort()
    songs = [
        song if song.shape[1] == len(group) else song.mean(1, keepdim=True)
        for song, group in zip(stems, groups, strict=True)
    ]
    return torch.cat(songs, dim=1)[:, order]


@dataclass(frozen=True)
class SeparatedFiles:
    """Files that `separate_file` wrote.

    Attributes:
        paths: stem → file.
        gain: factor applied to all files; below 1 if they would have clipped.
        states_length: `AudioReader.states_length` of the song.
    """

    paths: Mapping[str, Path]
    gain: float
    states_length: bool


def result_paths(config: ModelConfig, base: str | os.PathLike[str], format: str) -> dict[str, Path]:
    """Return the files that `separate_file` writes: stem → path.

    Raises:
        ValueError: for an unknown format, or a model with a stem called `instrumental`.
    """
    if "instrumental" in map(str.casefold, config.stems):
        raise ValueError(
            f"the model's stems are {config.stems}, and `instrumental` is the mixture less the stems: "
            "give the stem another name"
        )
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    names = (*config.stems, "instrumental")
    return {name: Path(f"{os.fspath(base)}.{name}{FORMATS[format].suffix}") for name in names}


def separate_file(
    model: BSMamba2,
    song: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    segment: float = 8.0,
    overlap: float = 0.5,
    look_ahead: float | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    shifts: int = 1,
    tta: bool = False,
    format: str = "wav",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SeparatedFiles:
    """Separate a file into `<base>.<stem>.<suffix>` and `<base>.instrumental.<suffix>`, the mixture minus the stems.

    The results have the song's sample rate, length, number of channels and layout. The channels are separated in the
    groups of `channel_groups`; a mono group is copied to the model's channels, and the mean of the outputs is written.

    Args:
        model: as in `separate`.
        song: the file.
        base: folder and name of the results, without a suffix; missing folders are created.
        segment, overlap, look_ahead, batch, dtype, shifts, tta: as in `separate_stream`.
        format: a key of `FORMATS`.
        overwrite: whether existing results may be replaced.
        progress: called with the number of samples done since the last call, and the total.

    Raises:
        AudioError: for a song that cannot be read, or results that exist or cannot be written.
        ValueError: as in `separate_stream` and `result_paths`.
    """
    config, paths = model.config, result_paths(model.config, base, format)
    with AudioReader(song) as file:
        layout = file.layout
        groups = channel_groups(file.channels, config.channels, layout)
        at_once = max(1, _SONGS_AT_ONCE // len(tta_views(config, shifts, tta)))
        passes = [groups[i : i + at_once] for i in range(0, len(groups), at_once)]

        def separate_pass(file: AudioReader, groups: Sequence[tuple[int, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
            """Yield the mixture and the stems of some channels: (channels, samples) and (stem, channels, samples)."""
            picked = sorted(i for group in groups for i in group)
            mixture = _ReplayBuffer(block[picked] for block in file.blocks())
            places = [tuple(picked.index(i) for i in group) for group in groups]
            songs = (split_channels(block, places, config.channels) for block in mixture)
            stems = separate_stream(
                model, resample_blocks(songs, file.rate, config.sample_rate), segment=segment, overlap=overlap,
                look_ahead=look_ahead, batch=batch, dtype=dtype, shifts=shifts, tta=tta,
            )  # fmt: skip
            for block in resample_blocks(stems, config.sample_rate, file.rate):
                original = mixture.take(block.shape[-1])  # shorter at the end, because resampling rounds the length
                if not original.shape[-1]:
                    continue
                yield original, join_channels(block[..., : original.shape[-1]], places)
                if progress is not None:
                    progress(original.shape[-1], file.frames * len(passes))

        with StemWriter(
            paths, file.rate, file.channels, format, frames=file.frames, layout=layout, overwrite=overwrite
        ) as writer:  # fmt: skip
            several = len(passes) > 1
            folder = paths["instrumental"].parent
            blocks = _join_passes(song, passes, separate_pass, folder) if several else separate_pass(file, groups)
            for original, estimates in blocks:
                writer.write(dict(zip(paths, (*estimates, original - estimates.sum(0)), strict=True)))
    return SeparatedFiles(paths, writer.gain, file.states_length)


def _join_passes(
    song: str | os.PathLike[str],
    passes: Sequence[Sequence[tuple[int, ...]]],
    separate_pass: Callable[..., Any],
    folder: Path,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run `separate_pass` for all channels of a file, in several passes; temporary files hold the stems in between."""
    order = np.argsort([i for groups in passes for i in sorted(sum(groups, ()))])
    with ExitStack() as stack:
        spools = []
        for groups in passes:
            spool = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            with AudioReader(song) as file:
                for _, stems in separate_pass(file, groups):
                    spool.write(stems.permute(2, 0, 1).contiguous().numpy().data)
            spool.seek(0)
            spools.append((spool, stems.shape[:2]))
        with AudioReader(song) as file:
            for block in file.blocks():
                parts = [
                    np.frombuffer(spool.read(4 * block.shape[1] * count * width), "float32").reshape(-1, count, width)
                    for spool, (count, width) in spools
                ]
                yield block, torch.from_numpy(np.concatenate(parts, axis=2)[..., order].transpose(1, 2, 0))


class _ReplayBuffer:
    """Iterator over blocks (…, samples) that also stores them, until `take` returns them in different lengths."""

    def __init__(self, blocks: Iterable[Tensor]) -> None:
        self.blocks = blocks
        self.buffered: deque[Tensor] = deque()

    def __iter__(self) -> Iterator[Tensor]:
        for block in self.blocks:
            self.buffered.append(block)
            yield block

    def take(self, samples: int) -> Tensor:
        """Return the next `samples` stored samples, or fewer if fewer are stored."""
        taken: list[Tensor] = [self.buffered[0][..., :0]] if self.buffered else []
        while self.buffered and samples:
            block = self.buffered.popleft()
            taken.append(block[..., :samples])
            if block.shape[-1] > samples:
                self.buffered.appendleft(block[..., samples:])
            samples -= taken[-1].shape[-1]
        return torch.cat(taken, dim=-1) if taken else torch.zeros(0)
