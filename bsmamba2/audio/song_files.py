"""Separate a song file: decode → model's rate → overlap-add → file's rate → one file for each stem.

All of it block by block: memory does not grow with the song. Book: "Separating songs". Axis letters: see
`bsmamba2.config`.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..model import BSMamba2
from ..separate import Progress
from .files import AudioError, AudioReader, reason
from .resample import resample_blocks
from .streaming import separate_stream
from .writer import FORMATS, StemWriter


def split_channels(signal: Tensor, channels: int) -> Tensor:
    """Group the channels of a file into songs: (file's channels, samples) → (b, c, samples), in order.

    Channels that are left over, the only one of a mono file among them, are songs of their own, copied to all c.
    """
    grouped = signal.shape[0] // channels * channels
    songs = signal[:grouped].unflatten(0, (-1, channels)) if grouped else signal[:0, None].expand(-1, channels, -1)
    single = signal[grouped:, None].expand(-1, channels, -1)
    return torch.cat([songs, single])


def join_channels(stems: Tensor, count: int) -> Tensor:
    """Inverse of `split_channels`: (b, stem, c, samples) → (stem, `count` channels, samples).

    A channel that was copied is the mean of its copies.
    """
    songs = count // stems.shape[2]
    grouped = stems[:songs].transpose(0, 1).flatten(1, 2)
    single = stems[songs:].mean(2).transpose(0, 1)
    return torch.cat([grouped, single], dim=1)


@dataclass(frozen=True)
class SeparatedFiles:
    """Files that `separate_file` wrote, by stem, and their gain: below 1 when they were made quieter not to clip."""

    paths: Mapping[str, Path]
    gain: float


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
    format: str = "wav",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SeparatedFiles:
    """Separate a file into `<base>.<stem>.<suffix>` and `<base>.instrumental.<suffix>`, the mixture less the stems.

    Rate, length and number of channels are the song's own. A mono song is copied to the model's channels, and the
    mean of the result written. Of more than two channels each two after each other are separated as one stereo song,
    an odd last one as a mono song.

    Args:
        model: as in `separate`.
        song: the file.
        base: folder and name of the results, without a suffix; missing folders are made.
        segment, overlap, look_ahead, batch, dtype: as in `separate_stream`.
        format: a key of `FORMATS`.
        overwrite: whether results that exist may be replaced.
        progress: called with the file's samples as they are written.

    Raises:
        AudioError: for a song that cannot be read, results that exist, and results that cannot be written.
        ValueError: as `separate_stream`, and for a model with a stem called `instrumental`.
    """
    config = model.config
    if "instrumental" in config.stems:
        raise ValueError(
            f"the model's stems are {config.stems}, and `instrumental` is the mixture less the stems: "
            "give the stem another name"
        )
    names = (*config.stems, "instrumental")
    with AudioReader(song) as file:
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
        paths = {name: Path(f"{os.fspath(base)}.{name}{FORMATS[format].suffix}") for name in names}
        for path in paths.values():
            _make_room(path, overwrite)
        mixture = _ReplayBuffer(file.blocks())
        songs = (split_channels(block, config.channels) for block in mixture)
        stems = separate_stream(
            model, resample_blocks(songs, file.rate, config.sample_rate),
            segment=segment, overlap=overlap, look_ahead=look_ahead, batch=batch, dtype=dtype,
        )  # fmt: skip
        with StemWriter(paths, file.rate, file.channels, format, frames=file.frames) as writer:
            for block in resample_blocks(stems, config.sample_rate, file.rate):
                original = mixture.take(block.shape[-1])  # shorter at the end: a rate's rounding
                if not original.shape[-1]:
                    continue
                estimates = join_channels(block[..., : original.shape[-1]], file.channels)
                writer.write(dict(zip(names, (*estimates, original - estimates.sum(0)), strict=True)))
                if progress is not None:
                    progress(original.shape[-1], file.frames)
    return SeparatedFiles(paths, writer.gain)


def _make_room(path: Path, overwrite: bool) -> None:
    """Make the folder of a result; raise AudioError when it cannot be made, or the result exists."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise AudioError(
            f"{path}: cannot be written ({reason(error)}); give another folder, or rename the song"
        ) from error
    if not overwrite or kind == stat.S_IFDIR:
        raise AudioError(f"{path}: exists; give another folder with -o, or --overwrite")


class _ReplayBuffer:
    """Passes blocks (…, samples) on and keeps them until they are taken again, in other lengths."""

    def __init__(self, blocks: Iterable[Tensor]) -> None:
        self.blocks = blocks
        self.buffered: deque[Tensor] = deque()

    def __iter__(self) -> Iterator[Tensor]:
        for block in self.blocks:
            self.buffered.append(block)
            yield block

    def take(self, samples: int) -> Tensor:
        """The next `samples` samples, or as many as there are."""
        taken: list[Tensor] = [self.buffered[0][..., :0]] if self.buffered else []
        while self.buffered and samples:
            block = self.buffered.popleft()
            taken.append(block[..., :samples])
            if block.shape[-1] > samples:
                self.buffered.appendleft(block[..., samples:])
            samples -= taken[-1].shape[-1]
        return torch.cat(taken, dim=-1) if taken else torch.zeros(0)
