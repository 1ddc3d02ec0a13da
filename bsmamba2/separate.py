"""A whole song through a model that learned on segments, in memory that does not grow with the song.

file → pieces → model's rate → overlapping segments → model → weighted sum of the overlaps → file's rate → files

Three ways. With `overlap=0` the segments stand end to end, as in the paper's evaluation. Otherwise each is weighted by
a triangle w, and the sum divided by the sum of the weights, so that no edge is heard:

    ŝ(n) = Σ_i w(n − i·step) · ŝ_i(n − i·step) / Σ_i w(n − i·step)        w(n) = min(n + 1, length − n)

The weights are whole numbers and the sums have 53 bits: where all segments agree on a float32, the quotient is that
float32 (as long as no more than a thousand overlap). So a model that gives its input back does so bit for bit, either
way.

With a `look_ahead` the segments are frames of one spectrogram, that of the whole song, and the state is carried on:

    masks_i, memory_i = model.next_masks(segment i and the frames ahead of it, memory_{i−1})

In every layer the mixer that reads forwards goes on from the end of the segment before, and the one that reads
backwards begins at the end of the look-ahead. memory_i is that at the end of segment i: the frames ahead are read once
more with the next segment, which knows what follows them. So a look-ahead as long as the rest of the song gives what
reading it at once gives, in every layer. With a shorter one the first layer's forward state is still exact; that of the
layers above has read what those below made of the frames as they were given out.

Both transforms have 53 bits here: a model that gives its input back does so bit for bit, as long as no sample is more
than 140 dB below those around it.

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .audio import files
from .audio.files import AudioError
from .audio.resample import resample_blocks
from .model import BSMamba2, StreamingState
from .spectrogram import istft_blocks, stft_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the model may compute in. The STFT, the decay and the masks stay in float32 or wider."""

Progress = Callable[[int, int], None]
"""Called with the samples done since the last call, and with those of the whole song."""


def separate(
    model: BSMamba2,
    mixture: Tensor,
    *,
    segment: float = 8.0,
    overlap: float = 0.5,
    look_ahead: float | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Tensor:
    """Separate a song that fits in memory; see `separate_stream` for one that does not.

    Args:
        model: its configuration gives the sample rate and channels; it computes where its weights are.
        mixture: (c, samples) float32, at the model's sample rate.
        segment: length of a segment, in seconds.
        overlap: share of a segment that the next one covers too, from 0 to below 1; not used with a look-ahead.
        look_ahead: seconds of the future that each segment sees, its state carried on from the segment before.
        batch: segments that go through the model at once; with a look-ahead, only those of songs side by side.
        dtype: of the model's arithmetic, one of `DTYPES`.
        progress: told as samples are done.

    Returns:
        (stem, c, samples), on the mixture's device.

    Raises:
        ValueError: for other channels, no samples, NaN or infinite samples, a segment, overlap, look-ahead or batch
            out of range, a model that gives NaN or infinite samples, or one that has no state to carry.
    """
    config = model.config
    if mixture.dim() != 2 or mixture.shape[0] != config.channels or not mixture.shape[1]:
        raise ValueError(f"mixture {tuple(mixture.shape)} must be (c={config.channels}, samples), not empty")
    pieces = []
    for piece in separate_stream(
        model, [mixture[None]], segment=segment, overlap=overlap, look_ahead=look_ahead, batch=batch, dtype=dtype
    ):
        pieces.append(piece[0])
        if progress is not None:
            progress(piece.shape[-1], mixture.shape[-1])
    return torch.cat(pieces, dim=-1).to(mixture.device)


def separate_stream(
    model: BSMamba2,
    blocks: Iterable[Tensor],
    *,
    segment: float = 8.0,
    overlap: float = 0.5,
    look_ahead: float | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Separate songs that arrive in pieces, side by side, and are given back in pieces.

    The last segment is filled up with zeros and trimmed. How the songs are cut into pieces changes nothing, and which
    segments share a call of the model changes only what its own arithmetic makes of it: nothing, or the last bits.

    Args:
        model: its configuration gives the sample rate and channels; it computes where its weights are.
        blocks: (b, c, samples) float32, in order, of any length: b songs of one length.
        segment: length of a segment, in seconds.
        overlap: share of a segment that the next one covers too, from 0 to below 1; not used with a look-ahead.
        look_ahead: seconds of the future that each segment sees, its state carried on from the segment before.
        batch: segments that go through the model at once; with a look-ahead, only those of songs side by side.
        dtype: of the model's arithmetic, one of `DTYPES`.

    Yields:
        (b, stem, c, samples) float32 on the CPU, as many samples in all as came in.

    Raises:
        ValueError: as `separate`.
    """
    config = model.config
    if not 0 < segment <= 3600:
        raise ValueError(f"segment={segment!r} must be seconds, above 0 and at most 3600")
    length = round(segment * config.sample_rate)
    if length <= config.n_fft // 2:
        raise ValueError(f"segment={segment!r} s is {length} samples: make it longer than {config.n_fft // 2}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap!r} must lie in [0, 1)")
    if batch < 1:
        raise ValueError(f"batch={batch!r} must be at least 1")
    if look_ahead is not None:
        if not 0 <= look_ahead <= 3600:
            raise ValueError(f"look_ahead={look_ahead!r} must be seconds, at least 0 and at most 3600")
        ahead = round(look_ahead * config.sample_rate / config.hop_length)
        yield from _carried(model, blocks, round(length / config.hop_length), ahead, batch, dtype)
        return
    step = max(1, round(length * (1 - overlap)))
    weight = torch.ones(length, dtype=torch.float64)
    if overlap:
        step = stagger_step(step, length, config.hop_length)
        ramp = torch.arange(1, length + 1, dtype=torch.float64)
        weight = torch.minimum(ramp, ramp.flip(0))
    weighted, total = torch.zeros(0), torch.zeros(0)

    def add(estimate: Tensor) -> Tensor:
        """Add a segment (b, stem, c, length); returns the samples that no later one reaches."""
        nonlocal weighted, total
        if not len(total):
            weighted, total = torch.zeros_like(estimate, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
        weighted += estimate.double() * weight
        total += weight
        done = (weighted[..., :step] / total[:step]).float()
        weighted = torch.nn.functional.pad(weighted[..., step:], (0, step))
        total = torch.nn.functional.pad(total[step:], (0, step))
        return done

    received, given = 0, 0
    waiting = torch.zeros(0)  # from the start of the next segment on
    segments: list[Tensor] = []
    started = False
    for block in blocks:
        _check_mixture(block)
        waiting = torch.cat([waiting, block.cpu()], dim=-1) if received else block.cpu()
        received += block.shape[-1]
        while waiting.shape[-1] >= length:
            segments.append(waiting[..., :length])
            waiting = waiting[..., step:]
            started = True
            if len(segments) * len(waiting) >= batch:
                for estimate in _run(model, segments, batch, dtype):
                    yield (done := add(estimate))
                    given += done.shape[-1]
                segments = []
    if waiting.shape[-1] > (length - step if started else 0):  # something that the segment before does not cover
        segments.append(torch.nn.functional.pad(waiting, (0, length - waiting.shape[-1])))
    for estimate in _run(model, segments, batch, dtype):
        done = add(estimate)[..., : received - given]
        yield done
        given += done.shape[-1]
    if given < received:
        rest = received - given
        yield (weighted[..., :rest] / total[:rest]).float()


def stagger_step(step: int, length: int, hop_length: int) -> int:
    """The next larger step, if a segment has room for it, that puts frames of overlapping segments between each other.

    An estimate depends a little on where in the song its frames begin. Segments that start whole hops apart all make
    the same error; n segments over one sample that start whole hops and an n-th apart average it out.

    Args:
        step: samples from segment to segment.
        length: of a segment, in samples.
        hop_length: samples between frames.
    """
    apart = hop_length // max(2, round(length / step))
    later = step + (apart - step) % hop_length
    return later if later < length else step


def _run(model: BSMamba2, segments: list[Tensor], batch: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The model on segments (b, c, length) each, `batch` signals a call: (b, stem, c, length) each."""
    if not segments:
        return
    songs = len(segments[0])
    found = []
    with _computing(model, dtype) as device:
        for signals in torch.cat(segments).split(batch):
            found.append(model(signals.to(device)).float().cpu())
    stems = torch.cat(found)
    _check_stems(stems, dtype)
    yield from stems.split(songs)


def _carried(
    model: BSMamba2, blocks: Iterable[Tensor], frames: int, ahead: int, batch: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Pieces of `frames` frames, each with `ahead` more behind it: (b, c, samples) → (b, stem, c, samples) blocks."""
    n_fft, hop_length = model.config.n_fft, model.config.hop_length
    received = given = 0

    def samples() -> Iterator[Tensor]:
        """What comes in, in 53 bits and small parts; at least as much as has a spectrogram."""
        nonlocal received
        for block in blocks:
            _check_mixture(block)
            received += block.shape[-1]
            yield from block.cpu().double().split(frames * hop_length, dim=-1)
        if 0 < received <= n_fft // 2:
            yield torch.zeros(*block.shape[:-1], n_fft // 2 + 1 - received, dtype=torch.float64)

    def stems() -> Iterator[Tensor]:
        """Their spectra, masked: complex (b, stem, c, f, t)."""
        waiting: Tensor | None = None  # from the first frame of the next piece on
        memories: list[StreamingState] = []  # for each `batch` of songs
        for spectrogram in stft_blocks(samples(), n_fft, hop_length):
            waiting = spectrogram if waiting is None else torch.cat((waiting, spectrogram), dim=-1)
            while waiting.shape[-1] > frames + ahead:
                masks, memories = _masks(model, waiting[..., : frames + ahead], memories, frames, batch, dtype)
                yield masks * waiting[:, None, ..., :frames]
                waiting = waiting[..., frames:]
        if waiting is not None:  # the end of the song is in sight: the rest is one piece
            yield _masks(model, waiting, memories, waiting.shape[-1], batch, dtype)[0] * waiting[:, None]

    for block in istft_blocks(stems(), n_fft, hop_length):
        block = block[..., : received - given].float()  # the last may have zeros behind the song
        _check_stems(block, dtype)
        given += block.shape[-1]
        yield block


def _masks(
    model: BSMamba2, spectrogram: Tensor, memories: list[StreamingState], frames: int, batch: int, dtype: torch.dtype
) -> tuple[Tensor, list[StreamingState]]:
    """`model.stream_masks` for `batch` songs at a time, each batch with its own memories; none at the start."""
    songs = spectrogram.to(torch.complex64).split(batch)
    before: list[StreamingState | None] = [*memories] or [None] * len(songs)
    with _computing(model, dtype) as device:
        found = [
            model.stream_masks(some.to(device), memory, frames) for some, memory in zip(songs, before, strict=True)
        ]
        return torch.cat([masks.cpu() for masks, _ in found]), [after for _, after in found]


@contextmanager
def _computing(model: BSMamba2, dtype: torch.dtype) -> Iterator[torch.device]:
    """Without gradients, in a type of `DTYPES`, on the device of the model's weights, which is told."""
    weights = next(iter(model.parameters()), None)
    device = torch.device("cpu") if weights is None else weights.device
    narrow = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    with torch.inference_mode(), narrow:
        yield device


def _check_mixture(block: Tensor) -> None:
    if not block.isfinite().all():
        raise ValueError("the mixture holds samples that are NaN or infinite: repair the file first")


def _check_stems(stems: Tensor, dtype: torch.dtype) -> None:
    if not stems.isfinite().all():
        raise ValueError(
            "the model gives samples that are NaN or infinite: use --dtype float32, or another checkpoint"
            if dtype != torch.float32
            else "the model gives samples that are NaN or infinite: use another checkpoint"
        )


# --- files ------------------------------------------------------------------------------------------------


def split_channels(signal: Tensor, channels: int) -> Tensor:
    """(file's channels, samples) → (b, c, samples): c channels after each other make a song.

    Channels that are left over, the only one of a mono file among them, are songs of their own, copied to all c.
    """
    whole = signal.shape[0] // channels * channels
    songs = signal[:whole].unflatten(0, (-1, channels)) if whole else signal.new_empty(0, channels, signal.shape[-1])
    alone = signal[whole:, None].expand(-1, channels, -1)
    return torch.cat([songs, alone])


def join_channels(stems: Tensor, count: int) -> Tensor:
    """(b, stem, c, samples) → (stem, `count` channels, samples), the way back: the mean where one was copied."""
    together = count // stems.shape[2]
    songs = stems[:together].transpose(0, 1).flatten(1, 2)
    alone = stems[together:].mean(2).transpose(0, 1)
    return torch.cat([songs, alone], dim=1)


@dataclass(frozen=True)
class Separated:
    """What `separate_file` wrote: the files by stem, and the gain, below 1 when they were made quieter not to clip."""

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
) -> Separated:
    """Write `<base>.<stem>.<suffix>` for each stem and `<base>.rest.<suffix>`, the mixture less the stems.

    Rate, length and number of channels are the song's own. A mono song is copied to the model's channels, and the
    mean of the result written. Of more than two channels each two after each other are separated as one stereo song,
    an odd last one as a mono song. All are read, separated and written a few segments at a time.

    Args:
        model: as in `separate`.
        song: the file.
        base: folder and name of the results, without a suffix; missing folders are made.
        segment, overlap, look_ahead, batch, dtype: as in `separate`.
        format: a key of `audio.FORMATS`.
        overwrite: whether results that are there already may be replaced.
        progress: told of the file's samples as they are written.

    Raises:
        AudioError: for a song that cannot be read, results that exist, and results that cannot be written.
        ValueError: as `separate`, and for a model with a stem called `rest`.
    """
    config = model.config
    if "rest" in config.stems:
        raise ValueError(
            f"the model's stems are {config.stems}, and `rest` is what they leave: give the stem another name"
        )
    names = (*config.stems, "rest")
    base = Path(base)
    with files.AudioReader(song) as file:
        if format not in files.FORMATS:
            raise ValueError(f"format={format!r} is not one of {', '.join(files.FORMATS)}")
        suffix = files.FORMATS[format].suffix
        paths = {name: base.with_name(f"{base.name}.{name}{suffix}") for name in names}
        for path in paths.values():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                there_already = stat.S_IFMT(path.lstat().st_mode)
            except FileNotFoundError:
                continue
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise AudioError(
                    f"{path}: cannot be written ({reason}); give another folder, or rename the song"
                ) from error
            if not overwrite or there_already == stat.S_IFDIR:
                raise AudioError(f"{path}: exists; give another folder with -o, or --overwrite")
        mixture = _Memory(file.blocks())
        songs = (split_channels(block, config.channels) for block in mixture)
        there = resample_blocks(songs, file.rate, config.sample_rate)
        stems = separate_stream(
            model, there, segment=segment, overlap=overlap, look_ahead=look_ahead, batch=batch, dtype=dtype
        )
        back = resample_blocks(stems, config.sample_rate, file.rate)
        with files.StemWriter(paths, file.rate, file.channels, format, frames=file.frames) as results:
            for block in back:
                original = mixture.take(block.shape[-1])  # shorter at the end: a rate's rounding
                if not original.shape[-1]:
                    continue
                parts = join_channels(block[..., : original.shape[-1]], file.channels)
                results.write(dict(zip(names, (*parts, original - parts.sum(0)), strict=True)))
                if progress is not None:
                    progress(original.shape[-1], file.frames)
    return Separated(paths, results.gain)


class _Memory:
    """Hands on blocks (…, samples) and keeps them until they are taken again, in pieces of other lengths."""

    def __init__(self, blocks: Iterable[Tensor]) -> None:
        self.blocks = blocks
        self.kept: deque[Tensor] = deque()

    def __iter__(self) -> Iterator[Tensor]:
        for block in self.blocks:
            self.kept.append(block)
            yield block

    def take(self, samples: int) -> Tensor:
        """The next `samples` samples, or as many as there are."""
        taken: list[Tensor] = [self.kept[0][..., :0]] if self.kept else []
        while self.kept and samples:
            block = self.kept.popleft()
            taken.append(block[..., :samples])
            if block.shape[-1] > samples:
                self.kept.appendleft(block[..., samples:])
            samples -= taken[-1].shape[-1]
        return torch.cat(taken, dim=-1) if taken else torch.zeros(0)
