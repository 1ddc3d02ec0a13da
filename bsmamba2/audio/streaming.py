"""Separate songs that arrive block by block, in memory that does not grow with the song.

Two ways. `separate_stream` without a look-ahead is the overlap-add of `bsmamba2.separate`, bit for bit, which keeps
only the segments that are not finished.

With a `look_ahead` the segments are frames of one spectrogram, that of the whole song, and the state is carried on:

    masks_i, state_i = model.stream_masks(segment i and the frames ahead of it, state_{i−1}, frames of segment i)

In every layer the forward mixer goes on from the end of the segment before, and the backward mixer begins at the end
of the look-ahead. state_i is that at the end of segment i: the frames ahead are read once more with the next segment,
which knows their future. So a look-ahead to the end of the song gives what reading it at once gives, in every
layer. With a shorter one the forward state of the first layer is still exact; the layers above it have read what those
below made of the frames with the future they knew. Both transforms are float64 here: a model that returns its input
does so bit for bit, as long as no sample is more than 140 dB below those around it.

Book: "Separating songs". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..model import BSMamba2, StreamingState
from ..separate import (
    View,
    _forward_batches,
    _inference_context,
    average,
    check_mixture,
    check_stems,
    overlap_add_window,
    tta_views,
)
from ..spectrogram import analysis_window, check_length, istft


def separate_stream(
    model: BSMamba2,
    blocks: Iterable[Tensor],
    *,
    segment: float = 8.0,
    overlap: float = 0.5,
    look_ahead: float | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    shifts: int = 1,
    tta: bool = False,
) -> Iterator[Tensor]:
    """Streaming separation: songs of one length come in blocks, in parallel, and go out in blocks.

    How the songs are cut into blocks changes nothing, and which segments share a call of the model changes only what
    its own arithmetic makes of it: nothing, or the last bits.

    Args:
        model: its configuration gives the sample rate and channels; it computes where its weights are.
        blocks: (b, c, samples) float32, in order, of any length: b songs of one length.
        segment: length of a segment, in seconds.
        overlap: share of a segment that the next one covers too, from 0 to below 1; not used with a look-ahead.
        look_ahead: seconds of the future that each segment sees, its state carried on from the segment before.
        batch: segments that go through the model at once; with a look-ahead, only those of parallel songs.
        dtype: of the model's arithmetic, one of `separate.DTYPES`.
        shifts, tta: test-time averaging, see `separate.tta_views`; the views are parallel songs.

    Yields:
        (b, stem, c, samples) float32 on the CPU, as many samples in all as came in.

    Raises:
        ValueError: as `separate.separate`, for a look-ahead out of range, or a model that has no state to carry.
    """
    config = model.config
    length, step, weight = overlap_add_window(config, segment, overlap, batch)
    if look_ahead is not None and not 0 <= look_ahead <= 3600:
        raise ValueError(f"look_ahead={look_ahead!r} must be seconds, at least 0 and at most 3600")

    def stream(songs: Iterable[Tensor]) -> Iterator[Tensor]:
        if look_ahead is None:
            return _stream_overlap_add(model, songs, step, weight, batch, dtype)
        frames, ahead = (round(samples / config.hop_length) for samples in (length, look_ahead * config.sample_rate))
        return _stream_stateful(model, songs, frames, ahead, batch, dtype)

    views = tta_views(config, shifts, tta)
    yield from stream(blocks) if len(views) == 1 else _stream_average(stream, blocks, views)


def _stream_average(
    stream: Callable[[Iterable[Tensor]], Iterator[Tensor]], blocks: Iterable[Tensor], views: Sequence[View]
) -> Iterator[Tensor]:
    """Average over views of the mixture, which `stream` separates as parallel songs."""
    longest = views[-1].delay

    def view_blocks() -> Iterator[Tensor]:
        """(view, b, c, samples), and zeros until the most delayed view has come to its end."""
        transformed = None
        for block in blocks:
            yield (transformed := torch.stack([view.transform(block) for view in views]))
        if transformed is not None:
            yield transformed.new_zeros(*transformed.shape[:-1], longest)

    delayed = _delay(view_blocks(), [view.delay for view in views])
    estimates = (stems.unflatten(0, (len(views), -1)) for stems in stream(block.flatten(0, 1) for block in delayed))
    skip = longest
    for aligned in _delay(estimates, [longest - view.delay for view in views]):
        mean = average(views, aligned)[..., skip:]
        skip = max(0, skip - aligned.shape[-1])
        yield mean


def _delay(blocks: Iterable[Tensor], delays: Sequence[int]) -> Iterator[Tensor]:
    """Delay lines: blocks (view, ..., samples), each view later by its own number of samples; zeros come first."""
    history = torch.zeros(0)
    for block in blocks:
        history = torch.cat((history if len(history) else torch.zeros(*block.shape[:-1], max(delays)), block), dim=-1)
        ends = [history.shape[-1] - delay for delay in delays]
        yield torch.stack([line[..., end - block.shape[-1] : end] for line, end in zip(history, ends, strict=True)])
        history = history[..., block.shape[-1] :]


def _stream_overlap_add(
    model: BSMamba2, blocks: Iterable[Tensor], step: int, weight: Tensor, batch: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Overlap-add of segments weighted by `weight` (length,): (b, c, samples) → (b, stem, c, samples) blocks."""
    length = len(weight)
    weighted_sum, weight_sum = torch.zeros(0), torch.zeros(0)
    received = emitted = 0

    def overlap_add(segments: list[Tensor]) -> Iterator[Tensor]:
        """Add the estimates of segments (b, c, length); yields the samples that no later segment reaches."""
        nonlocal weighted_sum, weight_sum, emitted
        if not segments:
            return
        for estimate in _forward_batches(model, torch.cat(segments), batch, dtype).split(len(segments[0])):
            if not len(weight_sum):
                weighted_sum, weight_sum = torch.zeros_like(estimate, dtype=torch.float64), torch.zeros_like(weight)
            weighted_sum += estimate.double() * weight
            weight_sum += weight
            finished = (weighted_sum[..., :step] / weight_sum[:step]).float()[..., : received - emitted]
            weighted_sum = torch.nn.functional.pad(weighted_sum[..., step:], (0, step))
            weight_sum = torch.nn.functional.pad(weight_sum[step:], (0, step))
            emitted += finished.shape[-1]
            yield finished

    pending = torch.zeros(0)  # from the start of the next segment on
    segments: list[Tensor] = []
    covered = 0  # samples at the start of `pending` that a segment covers already
    for block in blocks:
        check_mixture(block)
        pending = torch.cat([pending, block.cpu()], dim=-1) if received else block.cpu()
        received += block.shape[-1]
        while pending.shape[-1] >= length:
            segments.append(pending[..., :length])
            pending, covered = pending[..., step:], length - step
            if len(segments) * len(pending) >= batch:
                yield from overlap_add(segments)
                segments = []
    if pending.shape[-1] > covered:
        segments.append(torch.nn.functional.pad(pending, (0, length - pending.shape[-1])))
    yield from overlap_add(segments)
    if emitted < received:
        yield (weighted_sum / weight_sum)[..., : received - emitted].float()


def _stream_stateful(
    model: BSMamba2, blocks: Iterable[Tensor], frames: int, ahead: int, batch: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Segments of `frames` frames, each with `ahead` more behind it: (b, c, samples) → (b, stem, c, samples) blocks."""
    n_fft, hop_length, win_length = model.config.n_fft, model.config.hop_length, model.config.win_length
    received = emitted = 0

    def checked_blocks() -> Iterator[Tensor]:
        """The blocks in float64 and short parts; at least as many samples as have a spectrogram."""
        nonlocal received
        for block in blocks:
            check_mixture(block)
            received += block.shape[-1]
            yield from block.cpu().double().split(frames * hop_length, dim=-1)
        if 0 < received <= n_fft // 2:
            yield torch.zeros(*block.shape[:-1], n_fft // 2 + 1 - received, dtype=torch.float64)

    def stem_spectrograms() -> Iterator[Tensor]:
        """Masked spectrograms: complex (b, stem, c, f, t)."""
        pending: Tensor | None = None  # from the first frame of the next segment on
        states: list[StreamingState] = []  # for each `batch` of songs
        for spectrogram in stft_blocks(checked_blocks(), n_fft, hop_length, win_length):
            pending = spectrogram if pending is None else torch.cat((pending, spectrogram), dim=-1)
            while pending.shape[-1] > frames + ahead:
                masks, states = _stream_masks(model, pending[..., : frames + ahead], states, frames, batch, dtype)
                yield masks * pending[:, None, ..., :frames]
                pending = pending[..., frames:]
        if pending is not None:  # the look-ahead reaches the end of the song: all that is left is one segment
            yield _stream_masks(model, pending, states, pending.shape[-1], batch, dtype)[0] * pending[:, None]

    for block in istft_blocks(stem_spectrograms(), n_fft, hop_length, win_length):
        block = block[..., : received - emitted].float()  # the last may have zeros behind the song
        check_stems(block, dtype)
        emitted += block.shape[-1]
        yield block


def _stream_masks(
    model: BSMamba2, spectrogram: Tensor, states: list[StreamingState], frames: int, batch: int, dtype: torch.dtype
) -> tuple[Tensor, list[StreamingState]]:
    """`model.stream_masks` for `batch` songs at a time, each batch with its own state; no states at the start."""
    songs = spectrogram.to(torch.complex64).split(batch)
    previous: list[StreamingState | None] = [*states] or [None] * len(songs)
    with _inference_context(model, dtype) as device:
        pairs = [
            model.stream_masks(song.to(device), state, frames) for song, state in zip(songs, previous, strict=True)
        ]
        return torch.cat([masks.cpu() for masks, _ in pairs]), [state for _, state in pairs]


def stft_blocks(
    blocks: Iterable[Tensor], n_fft: int = 2048, hop_length: int = 441, win_length: int | None = None
) -> Iterator[Tensor]:
    """Streaming STFT: the frames of `spectrogram.stft`, each as soon as its samples have arrived.

    Args:
        blocks: (..., samples), real, in order, of any length.
        n_fft, hop_length, win_length: as in `spectrogram.stft`.

    Yields:
        Complex (..., f, t).

    Raises:
        ValueError: as `spectrogram.stft`.
    """
    half = n_fft // 2
    pending: Tensor | None = None  # from the first sample of the next frame on
    reflected = False

    def transform(frames: int) -> Tensor:
        """The first `frames` frames of `pending`."""
        assert pending is not None
        audio = pending[..., : (frames - 1) * hop_length + n_fft]
        window = analysis_window(n_fft, win_length, audio.dtype, audio.device)
        flat = audio.reshape(-1, audio.shape[-1])
        spectrogram = torch.stft(flat, n_fft, hop_length, window=window, center=False, return_complex=True)
        return spectrogram.reshape(*audio.shape[:-1], *spectrogram.shape[1:])

    for block in blocks:
        pending = block if pending is None else torch.cat((pending, block), dim=-1)
        if not reflected and pending.shape[-1] > half:
            pending = torch.cat((pending[..., 1 : half + 1].flip(-1), pending), dim=-1)
            reflected = True
        frames = (pending.shape[-1] - n_fft - 1) // hop_length + 1  # one sample more stays, to reflect the end
        if reflected and frames > 0:
            yield transform(frames)
            pending = pending[..., frames * hop_length :]
    if pending is None:
        return
    if not reflected:
        check_length(pending.shape[-1], n_fft)
    pending = torch.cat((pending, pending[..., -half - 1 : -1].flip(-1)), dim=-1)
    yield transform((pending.shape[-1] - n_fft) // hop_length + 1)


def istft_blocks(
    spectrograms: Iterable[Tensor], n_fft: int = 2048, hop_length: int = 441, win_length: int | None = None
) -> Iterator[Tensor]:
    """Streaming inverse STFT: the samples of `spectrogram.istft`, each as soon as all its frames have arrived.

    Args:
        spectrograms: complex (..., f, t), in order, of any length.
        n_fft, hop_length, win_length: as in `spectrogram.istft`.

    Yields:
        Real (..., samples): in all one less than hop for each frame, the most that audio of so many frames has.
    """
    shared = -(-n_fft // hop_length) - 1  # frames that reach a sample which is not complete yet
    pending: Tensor | None = None
    first = emitted = 0  # number of the first frame in `pending`; samples yielded

    def samples_to(end: int) -> Tensor:
        """The samples from `emitted` to `end`."""
        assert pending is not None
        start = first * hop_length
        return istft(pending, end - start, n_fft, hop_length, win_length)[..., emitted - start :]

    for block in spectrograms:
        pending = block if pending is None else torch.cat((pending, block), dim=-1)
        end = (first + pending.shape[-1]) * hop_length - n_fft // 2  # where the next frame begins
        if end > emitted:
            yield samples_to(end)
            emitted = end
            drop = max(0, pending.shape[-1] - shared)
            pending, first = pending[..., drop:], first + drop
    if pending is not None:
        yield samples_to((first + pending.shape[-1]) * hop_length - 1)
