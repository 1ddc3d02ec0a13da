"""Streaming separation: songs arrive block by block, and memory use does not grow with the song.

There are two modes. Without a look-ahead, `separate_stream` equals the overlap-add of `bsmamba2.separate` bit for bit,
and keeps only unfinished segments in memory.

With a `look_ahead`, each segment is a range of frames in the spectrogram of the whole song, and the state is carried
over:

    masks_i, state_i = model.stream_masks(segment i and the frames ahead of it, state_{i−1}, frames of segment i)

In every layer the forward mixer continues from the end of the previous segment, and the backward mixer begins at the
end of the look-ahead. state_i is the state at the end of segment i, because the look-ahead frames are processed again
with the next segment, which sees further ahead. With a look-ahead to the end of the song, every layer therefore
computes the same as for the whole song at once. With a shorter look-ahead, the forward state of the first layer is
still exact, but the later layers depend on outputs that the earlier layers computed with a limited look-ahead. The STFT
and its inverse are float64 here, so a model that returns its input does so bit for bit, as long as no sample is more
than 140 dB below its neighbours.

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
    """Streaming separation: takes blocks of parallel songs of equal length, and yields blocks of their stems.

    The block lengths do not change the result; the batch size changes at most the last bits, because the model may
    round differently.

    Args:
        model: its configuration sets the sample rate and channels; it runs on the device of its weights.
        blocks: (b, c, samples) float32, in order, of any length: b songs of equal length.
        segment: length of a segment, in seconds.
        overlap: fraction of a segment that the next one also covers, from 0 to below 1; not used with a look-ahead.
        look_ahead: seconds that each segment sees beyond its end, its state carried over from the previous segment.
        batch: segments per model call; with a look-ahead, only segments of parallel songs.
        dtype: type of the model's arithmetic, one of `separate.DTYPES`.
        shifts, tta: test-time averaging, see `separate.tta_views`; the views are separated as parallel songs.

    Yields:
        (b, stem, c, samples) float32 on the CPU, with as many samples in total as the input.

    Raises:
        ValueError: as in `separate.separate`; for a look-ahead out of range, or a model without a state to carry over.
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
        """Yield blocks (view, b, c, samples), then zeros until the most delayed view has ended."""
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
    """Delay lines: delay each view of the blocks (view, ..., samples) by its own number of samples, initially zeros."""
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

    pending = torch.zeros(0)  # samples from the start of the next segment on
    segments: list[Tensor] = []
    covered = 0  # samples at the start of `pending` that a segment already covers
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
    """Segments of `frames` frames with `ahead` look-ahead frames: (b, c, samples) → (b, stem, c, samples) blocks."""
    n_fft, hop_length, win_length = model.config.n_fft, model.config.hop_length, model.config.win_length
    received = emitted = 0

    def checked_blocks() -> Iterator[Tensor]:
        """Yield the blocks as short float64 parts, padded with zeros if they are too short for a spectrogram."""
        nonlocal received
        for block in blocks:
            check_mixture(block)
            received += block.shape[-1]
            yield from block.cpu().double().split(frames * hop_length, dim=-1)
        if 0 < received <= n_fft // 2:
            yield torch.zeros(*block.shape[:-1], n_fft // 2 + 1 - received, dtype=torch.float64)

    def stem_spectrograms() -> Iterator[Tensor]:
        """Yield masked spectrograms: complex (b, stem, c, f, t)."""
        pending: Tensor | None = None  # frames from the start of the next segment on
        states: list[StreamingState] = []  # one for each `batch` of songs
        for spectrogram in stft_blocks(checked_blocks(), n_fft, hop_length, win_length):
            pending = spectrogram if pending is None else torch.cat((pending, spectrogram), dim=-1)
            while pending.shape[-1] > frames + ahead:
                masks, states = _stream_masks(model, pending[..., : frames + ahead], states, frames, batch, dtype)
                yield masks * pending[:, None, ..., :frames]
                pending = pending[..., frames:]
        if pending is not None:  # the look-ahead reaches the end of the song, so the rest is one segment
            yield _stream_masks(model, pending, states, pending.shape[-1], batch, dtype)[0] * pending[:, None]

    for block in istft_blocks(stem_spectrograms(), n_fft, hop_length, win_length):
        block = block[..., : received - emitted].float()  # the last block may have zeros after the song
        check_stems(block, dtype)
        emitted += block.shape[-1]
        yield block


def _stream_masks(
    model: BSMamba2, spectrogram: Tensor, states: list[StreamingState], frames: int, batch: int, dtype: torch.dtype
) -> tuple[Tensor, list[StreamingState]]:
    """Call `model.stream_masks` for `batch` songs at a time, each batch with its own state; [] at the start."""
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
    """Streaming STFT: yields the frames of `spectrogram.stft` as soon as their samples have arrived.

    Args:
        blocks: (..., samples), real, in order, of any length.
        n_fft, hop_length, win_length: as in `spectrogram.stft`.

    Yields:
        Complex (..., f, t).

    Raises:
        ValueError: as in `spectrogram.stft`.
    """
    half = n_fft // 2
    pending: Tensor | None = None  # samples from the start of the next frame on
    reflected = False

    def transform(frames: int) -> Tensor:
        """Return the first `frames` frames of `pending`."""
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
        frames = (pending.shape[-1] - n_fft - 1) // hop_length + 1  # one more sample stays, to reflect the end
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
    """Streaming inverse STFT: yields the samples of `spectrogram.istft` as soon as all their frames have arrived.

    Args:
        spectrograms: complex (..., f, t), in order, of any length.
        n_fft, hop_length, win_length: as in `spectrogram.istft`.

    Yields:
        Real (..., samples), in total frames · hop_length − 1 samples, the longest audio with that number of frames.
    """
    shared = -(-n_fft // hop_length) - 1  # frames that overlap samples not yet complete
    pending: Tensor | None = None
    first = emitted = 0  # index of the first frame in `pending`; samples yielded

    def samples_to(end: int) -> Tensor:
        """Return the samples from `emitted` to `end`."""
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
