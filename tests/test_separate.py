"""Songs of any length, in and out of files."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import TINY
from torch import Tensor, nn

from bsmamba2 import BSMamba2, checkpoints, dual_path, save_checkpoint
from bsmamba2.audio import mp3
from bsmamba2.audio.files import AudioError, StemWriter, _Sink, read, write
from bsmamba2.audio.resample import resample
from bsmamba2.cli import main as command_line
from bsmamba2.cli.main import main
from bsmamba2.separate import join_channels, separate, separate_file, separate_stream, split_channels, stagger_step
from bsmamba2.spectrogram import istft, istft_blocks, stft, stft_blocks


class Identity(nn.Module):
    """Gives back what it gets, as one stem, and remembers the shapes of its batches."""

    config = TINY

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, mixture: Tensor) -> Tensor:
        self.shapes.append(tuple(mixture.shape))
        return mixture[:, None]

    def stream_masks(self, spectrogram: Tensor, memories: list | None, frames: int) -> tuple[Tensor, list]:
        """Masks of 1. It remembers how many frames came before."""
        self.shapes.append((*spectrogram.shape, frames))
        before = memories[0] if memories else 0
        return torch.ones_like(spectrogram[:, None, ..., :frames]), [before + frames]


class Counting(Identity):
    """Gives the number of the segment as every sample of it: an edge between segments is a step of 1."""

    def forward(self, mixture: Tensor) -> Tensor:
        super().forward(mixture)
        return torch.full_like(mixture, float(len(self.shapes)))[:, None]


# --- spectrogram ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_fft", "hop_length"), [(2048, 441), (2048, 882), (128, 32), (512, 256)])
@pytest.mark.parametrize("samples", [1500, 4097, 5000])
def test_round_trip(n_fft: int, hop_length: int, samples: int) -> None:
    audio = torch.randn(3, 2, samples, dtype=torch.float64)
    spectrogram = stft(audio, n_fft, hop_length)
    assert spectrogram.shape == (3, 2, n_fft // 2 + 1, samples // hop_length + 1)
    torch.testing.assert_close(istft(spectrogram, samples, n_fft, hop_length), audio, rtol=0, atol=1e-9)


def test_a_frame_is_the_windowed_transform() -> None:
    audio = torch.randn(1000, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * math.pi * torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.fft.rfft(audio[320 - 64 : 320 + 64] * window)
    torch.testing.assert_close(stft(audio, 128, 32)[:, 10], expected)


@pytest.mark.parametrize(
    ("n_fft", "hop_length", "size"),
    [(128, 32, 40), (128, 41, 1), (128, 41, 1000), (128, 64, 40), (128, 63, 1000), (64, 3, 40)],
)
def test_blocks_of_audio_have_the_frames_of_the_whole_and_come_back(n_fft: int, hop_length: int, size: int) -> None:
    """At every edge of a length: the shortest there is, whole hops, one more, one less."""
    torch.manual_seed(0)
    half = n_fft // 2
    for samples in {
        half + 1,
        half + 2,
        n_fft,
        8 * hop_length + n_fft,
        8 * hop_length + n_fft - 1,
        8 * hop_length + n_fft + 1,
    }:
        audio = torch.randn(2, 3, samples, dtype=torch.float64)
        spectra = list(stft_blocks(audio.split(size, -1), n_fft, hop_length))
        spectrogram = torch.cat(spectra, -1)
        torch.testing.assert_close(spectrogram, stft(audio, n_fft, hop_length), rtol=0, atol=1e-12)
        for cut in (1, 5, spectrogram.shape[-1]):
            back = torch.cat(list(istft_blocks(spectrogram.split(cut, -1), n_fft, hop_length)), -1)
            assert back.shape[-1] == spectrogram.shape[-1] * hop_length - 1 >= samples
            torch.testing.assert_close(back[..., :samples], audio, rtol=0, atol=1e-12)


def test_frames_come_as_soon_as_they_can() -> None:
    """A frame waits for its own samples and one more, a sample for the frames that reach it."""
    heard, frames, given = 0, 0, 0

    def blocks() -> Iterator[Tensor]:
        nonlocal heard
        for block in torch.randn(1500).split(1):
            heard += 1
            yield block

    def spectra() -> Iterator[Tensor]:
        nonlocal frames
        for spectrogram in stft_blocks(blocks(), 128, 32):
            frames += spectrogram.shape[-1]
            assert heard == 1500 or 0 <= heard - 1 - (32 * (frames - 1) + 64) < 32
            yield spectrogram

    for audio in istft_blocks(spectra(), 128, 32):
        given += audio.shape[-1]
        assert heard == 1500 or given == 32 * frames - 64


def test_too_few_samples_in_blocks_are_named_as_in_one() -> None:
    assert list(stft_blocks([])) == list(istft_blocks([])) == []
    with pytest.raises(ValueError, match="64 samples are too few for n_fft=128"):
        list(stft_blocks(torch.randn(64).split(10), 128, 32))


# --- whole songs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("samples", [1, 50, 799, 800, 801, 5000, 8123])
def test_an_identity_gives_its_input_back_bit_for_bit(overlap: float, samples: int) -> None:
    torch.manual_seed(samples)
    mixture = torch.randn(2, samples) * torch.logspace(-38, 3, samples)
    model = Identity()
    found = separate(model, mixture, segment=0.1, overlap=overlap)  # type: ignore[arg-type]
    assert found.shape == (1, 2, samples)
    assert torch.equal(found[0], mixture)
    assert set(model.shapes) == {(1, 2, 800)}


def test_no_segment_is_spent_on_nothing() -> None:
    for overlap, samples, expected in (
        (0, 800, 1), (0, 801, 2), (0, 1600, 2), (0, 4000, 5),
        (0.5, 400, 1), (0.5, 800, 1), (0.5, 801, 2), (0.5, 1200, 2), (0.5, 1201, 3),
    ):  # fmt: skip
        model = Identity()
        separate(model, torch.randn(2, samples), segment=0.1, overlap=overlap)  # type: ignore[arg-type]
        assert len(model.shapes) == expected


def test_each_segment_begins_a_step_after_the_one_before() -> None:
    """Against the definition: every segment cut out by hand, weighted, summed, divided."""
    torch.manual_seed(0)
    mixture, length, step = torch.randn(2, 3001), 800, 624  # three quarters of 800, and on to 19 hops and a half
    weight = torch.minimum(torch.arange(1.0, 801), torch.arange(800.0, 0, -1)).double()
    top, bottom = torch.zeros(2, 4000).double(), torch.zeros(4000).double()
    for number, start in enumerate(range(0, 2497, step), start=1):
        top[:, start : start + length] += number * weight
        bottom[start : start + length] += weight
    found = separate(Counting(), mixture, segment=0.1, overlap=0.25)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), (top / bottom)[:, :3001], rtol=1e-6, atol=0)


@pytest.mark.parametrize("hop_length", [32, 441, 882])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75, 0.9])
def test_segments_over_one_sample_have_their_frames_between_each_others(overlap: float, hop_length: int) -> None:
    length = 20 * hop_length + 7
    wanted = round(length * (1 - overlap))
    step = stagger_step(wanted, length, hop_length)
    assert wanted <= step < wanted + hop_length
    count = max(2, round(length / wanted))
    places = sorted({i * step % hop_length for i in range(count)})  # of the frames, within a hop
    assert len(places) == count
    gaps = [later - place for place, later in pairwise([*places, places[0] + hop_length])]
    assert max(gaps) - min(gaps) <= count  # a hop need not be a multiple
    assert stagger_step(length - 2, length, hop_length) == length - 2  # no room to move


def test_overlap_leaves_no_seam() -> None:
    """Segments that disagree by 1: a click at overlap 0, else a slope: 1/176 where 176 samples overlap, or 2/400."""
    mixture = torch.zeros(2, 8000)
    largest = {
        overlap: float(separate(Counting(), mixture, segment=0.1, overlap=overlap).diff().abs().max())  # type: ignore[arg-type]
        for overlap in (0.0, 0.25, 0.5)
    }
    assert largest[0.0] == 1
    assert largest[0.25] < 1 / 175
    assert largest[0.5] < 1 / 200


@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("size", [1, 7, 800, 1234, 4001])
def test_pieces_make_no_difference(tiny: BSMamba2, overlap: float, size: int) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 1601) if size == 1 else torch.randn(2, 4001)
    whole = separate(tiny, mixture, segment=0.1, overlap=overlap)
    blocks = [block[None] for block in mixture.split(size, -1)]
    pieces = list(separate_stream(tiny, blocks, segment=0.1, overlap=overlap))
    assert max(piece.shape[-1] for piece in pieces) <= 800
    assert torch.equal(torch.cat(pieces, -1)[0], whole)


@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_the_batch_changes_nothing_but_the_last_bits(tiny: BSMamba2, overlap: float) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 5000)
    one = separate(tiny, mixture, segment=0.1, overlap=overlap)
    model = Identity()
    for batch in (2, 3, 64):
        many = separate(tiny, mixture, segment=0.1, overlap=overlap, batch=batch)
        assert (many - one).abs().max() <= 2e-6 * one.abs().max()
        same = separate(model, mixture, segment=0.1, overlap=overlap, batch=batch)  # type: ignore[arg-type]
        assert torch.equal(same[0], mixture)
    assert {shape[0] for shape in model.shapes} > {2, 3}


def test_songs_side_by_side_are_separated_each_by_itself(tiny: BSMamba2) -> None:
    torch.manual_seed(0)
    songs = torch.randn(3, 2, 3000)
    together = torch.cat(list(separate_stream(tiny, songs.split(700, -1), segment=0.1, batch=4)), -1)
    for song, found in zip(songs, together, strict=True):
        torch.testing.assert_close(found, separate(tiny, song, segment=0.1), rtol=0, atol=1e-5)


def test_silence_gives_silence(tiny: BSMamba2) -> None:
    assert not separate(tiny, torch.zeros(2, 5000), segment=0.1).any()


def test_a_narrower_type_is_close(tiny: BSMamba2) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 2000)
    wide = separate(tiny, mixture, segment=0.1)
    narrow = separate(tiny, mixture, segment=0.1, dtype=torch.bfloat16)
    assert narrow.dtype == torch.float32
    assert 0 < float((narrow - wide).norm() / wide.norm()) < 0.05


def test_progress_counts_every_sample() -> None:
    told: list[tuple[int, int]] = []
    separate(Identity(), torch.zeros(2, 2345), segment=0.1, progress=lambda *done: told.append(done))  # type: ignore[arg-type]
    assert sum(done for done, _ in told) == 2345
    assert {whole for _, whole in told} == {2345}


class Broken(Identity):
    def forward(self, mixture: Tensor) -> Tensor:
        return super().forward(mixture) / 0

    def stream_masks(self, spectrogram: Tensor, memories: list | None, frames: int) -> tuple[Tensor, list]:
        masks, memories = super().stream_masks(spectrogram, memories, frames)
        return masks / 0, memories


@pytest.mark.parametrize(
    ("model", "mixture", "options", "message"),
    [
        (Identity(), torch.zeros(1, 100), {}, "c=2"),
        (Identity(), torch.zeros(2, 0), {}, "not empty"),
        (Identity(), torch.full((2, 100), math.nan), {}, "NaN"),
        (Identity(), torch.full((2, 100), math.inf), {}, "infinite"),
        (Identity(), torch.zeros(2, 100), {"overlap": 1.0}, "overlap=1.0"),
        (Identity(), torch.zeros(2, 100), {"overlap": math.nan}, "overlap=nan"),
        (Identity(), torch.zeros(2, 100), {"segment": 0.001}, "segment=0.001"),
        (Identity(), torch.zeros(2, 100), {"segment": math.inf}, "segment=inf"),
        (Identity(), torch.zeros(2, 100), {"batch": 0}, "batch=0"),
        (Identity(), torch.zeros(2, 100), {"look_ahead": -0.1}, "look_ahead=-0.1"),
        (Identity(), torch.zeros(2, 100), {"look_ahead": math.nan}, "look_ahead=nan"),
        (Identity(), torch.full((2, 100), math.nan), {"look_ahead": 1.0}, "NaN"),
        (Broken(), torch.ones(2, 100), {"look_ahead": 1.0}, "another checkpoint"),
        (Broken(), torch.ones(2, 100), {}, "another checkpoint"),
        (Broken(), torch.ones(2, 100), {"dtype": torch.bfloat16}, "float32"),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, mixture: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        separate(model, mixture, **options)  # type: ignore[arg-type]


def test_separation_leaves_no_gradient(tiny: BSMamba2) -> None:
    assert not separate(tiny, torch.randn(2, 1000), segment=0.1).requires_grad


# --- the state carried on ---------------------------------------------------------------------------------


@pytest.fixture
def deep() -> BSMamba2:
    """Three layers: from the second on, the forward memory depends on what the backward mixers below knew."""
    torch.manual_seed(0)
    return BSMamba2(replace(TINY, depth=3)).eval()


def deaf_to_the_future(model: BSMamba2) -> BSMamba2:
    """The same model, with nothing of what the backward mixers say in it."""
    for layer in model.layers:
        with torch.no_grad():
            layer.time.merge.weight[:, model.config.dim :] = 0
    return model


class Forgets:
    """A fault: each piece begins with an empty memory."""

    def stream_masks(self, spectrogram: Tensor, memories: list | None, frames: int) -> tuple[Tensor, list]:
        return BSMamba2.stream_masks(self, spectrogram, None, frames)  # type: ignore[arg-type]


class RunsAhead:
    """A fault: the memory is that at the end of the look-ahead."""

    def stream_masks(self, spectrogram: Tensor, memories: list | None, frames: int) -> tuple[Tensor, list]:
        masks, after = BSMamba2.stream_masks(self, spectrogram, memories, spectrogram.shape[-1])  # type: ignore[arg-type]
        return masks[..., :frames], after


def with_fault(model: BSMamba2, fault: type) -> BSMamba2:
    model.__class__ = type("Faulty", (fault, BSMamba2), {})
    return model


def whole(model: BSMamba2, mixture: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(mixture[None])[0]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("look_ahead", [0.0, 0.004, 0.05, 0.3, 100.0])
@pytest.mark.parametrize("samples", [1, 50, 64, 65, 799, 800, 801, 5000, 8123])
def test_an_identity_that_carries_its_state_gives_its_input_back_bit_for_bit(look_ahead: float, samples: int) -> None:
    torch.manual_seed(samples)
    mixture = torch.randn(2, samples) * torch.logspace(-30, 3, 8123)[:samples]  # some 10 dB within a window
    mixture[:, samples // 2 :: 97] *= 1e-6  # and single samples 120 dB lower
    model = Identity()
    found = separate(model, mixture, segment=0.1, look_ahead=look_ahead)  # type: ignore[arg-type]
    assert found.shape == (1, 2, samples)
    assert torch.equal(found[0], mixture)
    ahead = round(look_ahead * 250)
    assert all(t <= 25 + ahead and frames in (25, t) for *_, t, frames in model.shapes)
    assert sum(frames for *_, frames in model.shapes) == max(samples, 65) // 32 + 1


def test_a_song_of_one_piece_is_read_as_a_whole(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    for samples in (65, 801, 5000):
        mixture = torch.randn(2, samples)
        for segment, look_ahead in ((1.0, 0.0), (0.1, 1.0)):
            found = separate(deep, mixture, segment=segment, look_ahead=look_ahead)
            assert distance(found, whole(deep, mixture)) < 1e-6


@pytest.mark.parametrize("frames", [1, 7, 64, 65, 150])
def test_pieces_that_see_all_that_follows_are_the_whole(
    deep: BSMamba2, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many pieces, each of which reads to the end of the song: no layer's memory may be off. In float64."""
    torch.manual_seed(0)
    monkeypatch.setattr(dual_path, "BLOCK", 3 * dual_path.PIECE * TINY.dim)  # the 8 sequences in blocks of 3
    spectrogram = torch.randn(2, 2, 65, 40 if frames < 10 else 260, dtype=torch.complex128)
    deep.double()

    def in_pieces(model: BSMamba2) -> Tensor:
        found, memories = [], None
        for start in range(0, spectrogram.shape[-1], frames):
            rest = spectrogram[..., start:]
            masks, memories = model.stream_masks(rest, memories, min(frames, rest.shape[-1]))
            found.append(masks)
        return torch.cat(found, -1)

    with torch.inference_mode():
        expected = deep.masks(spectrogram)
        torch.testing.assert_close(in_pieces(deep), expected, rtol=0, atol=1e-12)
        for fault in (Forgets, RunsAhead):
            assert distance(in_pieces(with_fault(deep, fault)), expected) > 1e-3


@pytest.mark.parametrize(("segment", "look_ahead"), [(0.05, 0.0), (0.3, 0.0), (0.3, 0.1), (0.1, 0.5)])
def test_a_model_that_only_reads_forwards_needs_no_look_ahead(
    deep: BSMamba2, segment: float, look_ahead: float
) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 6001)
    deaf_to_the_future(deep)
    expected = whole(deep, mixture)
    assert distance(separate(deep, mixture, segment=segment, look_ahead=look_ahead), expected) < 1e-6
    for fault in (Forgets, RunsAhead) if look_ahead else (Forgets,):
        found = separate(with_fault(deep, fault), mixture, segment=segment, look_ahead=look_ahead)
        assert distance(found, expected) > 1e-3


def test_the_first_layers_memory_is_exact_and_the_others_remember_what_was_given_out(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    spectrogram = torch.randn(1, 2, 65, 100, dtype=torch.complex64)
    with torch.inference_mode():
        _, knowing = deep.stream_masks(spectrogram, None, 50)
        _, guessing = deep.stream_masks(spectrogram[..., :60], None, 50)
    for (tail, state), (other_tail, other_state) in zip(knowing[0], guessing[0], strict=True):
        torch.testing.assert_close(tail, other_tail, rtol=0, atol=1e-6)
        torch.testing.assert_close(state, other_state, rtol=0, atol=1e-6)
    for layer in (1, 2):
        assert distance(guessing[layer][0][1], knowing[layer][0][1]) > 1e-3


def test_with_more_look_ahead_the_result_comes_nearer(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 6001)
    expected = whole(deep, mixture)
    errors = [
        distance(separate(deep, mixture, segment=0.1, look_ahead=seconds), expected) for seconds in (0.0, 0.05, 0.3)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[0] < distance(separate(deep, mixture, segment=0.1, overlap=0), expected)


@pytest.mark.parametrize("size", [1, 7, 1234, 5001])
def test_blocks_make_no_difference_to_a_carried_state(deep: BSMamba2, size: int) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 1601 if size == 1 else 5001)
    options = {"segment": 0.1, "look_ahead": 0.03}
    expected = separate(deep, mixture, **options)  # type: ignore[arg-type]
    received, given, pieces = 0, 0, []

    def blocks() -> Iterator[Tensor]:
        nonlocal received
        for block in mixture.split(size, -1):
            received += block.shape[-1]
            yield block[None]

    for piece in separate_stream(deep, blocks(), **options):  # type: ignore[arg-type]
        pieces.append(piece)
        given += piece.shape[-1]
        # What is waiting: a piece, its look-ahead (8 frames), a window, and what the block has more.
        assert received - given <= (25 + 8 + 1) * 32 + 128 + max(size, 800)
        assert given <= received
    torch.testing.assert_close(torch.cat(pieces, -1)[0], expected, rtol=0, atol=1e-6)


def test_songs_side_by_side_carry_each_its_own_state(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    songs = torch.randn(3, 2, 3000)
    options = {"segment": 0.1, "look_ahead": 0.02}
    expected = torch.stack([separate(deep, song, **options) for song in songs])  # type: ignore[arg-type]
    for batch in (1, 2, 8):
        found = torch.cat(list(separate_stream(deep, songs.split(700, -1), batch=batch, **options)), -1)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_carried_state_is_no_exception(deep: BSMamba2) -> None:
    """Silence stays silence, a narrower type stays close, every sample is told of, no gradient is left."""
    torch.manual_seed(0)
    mixture, told = torch.randn(2, 2345), []
    options = {"segment": 0.1, "look_ahead": 0.05}
    assert not separate(deep, torch.zeros(2, 5000), **options).any()  # type: ignore[arg-type]
    wide = separate(deep, mixture, progress=lambda *done: told.append(done), **options)  # type: ignore[arg-type]
    assert sum(done for done, _ in told) == 2345
    assert len(told) > 2
    assert not wide.requires_grad
    narrow = separate(deep, mixture, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    assert narrow.dtype == torch.float32
    assert 0 < distance(narrow, wide) < 0.05


def test_a_layer_without_a_memory_is_named() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    with pytest.raises(ValueError, match="Sums has no `step`"):
        separate(BSMamba2(TINY, sequence_layer=Sums), torch.randn(2, 500), segment=0.1, look_ahead=0.1)


@pytest.mark.parametrize("frames", [0, -1, 6])
def test_frames_out_of_range_are_named(tiny: BSMamba2, frames: int) -> None:
    with pytest.raises(ValueError, match=f"frames={frames} must be from 1 to the 5"):
        tiny.stream_masks(torch.randn(1, 2, 65, 5, dtype=torch.complex64), None, frames)


# --- channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 64])
def test_channels_are_paired_in_order(count: int) -> None:
    signal = torch.randn(count, 10)
    songs = split_channels(signal, 2)
    assert songs.shape == ((count + 1) // 2, 2, 10)
    for channel in range(count):
        assert torch.equal(songs[channel // 2, channel % 2], signal[channel])
    if count % 2:
        assert torch.equal(songs[-1, 1], signal[-1])
    stems = torch.stack([songs, 2 * songs], dim=1)  # (b, stem, c, samples)
    assert torch.equal(join_channels(stems, count), torch.stack([signal, 2 * signal]))


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [{"overlap": 0.0}, {"overlap": 0.5}, {"look_ahead": 0.2}], ids=str)
@pytest.mark.parametrize(
    ("subtype", "format"), [("FLOAT", "wav"), ("PCM_24", "wav24"), ("PCM_16", "wav16"), ("PCM_24", "flac")]
)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_an_identity_writes_the_file_it_read(
    tmp_path: Path, way: dict, subtype: str, format: str, channels: int
) -> None:
    rng = np.random.default_rng(0)
    loud = 0.3 if subtype != "FLOAT" else 3.0
    frames = (
        np.clip(rng.normal(0, loud, (150_001, channels)), -1, 1)
        if loud < 1
        else rng.normal(0, loud, (150_001, channels))
    )
    song = tmp_path / ("song.flac" if format == "flac" else "song.wav")
    soundfile.write(song, frames, 8000, subtype=subtype)
    done = separate_file(Identity(), song, tmp_path / "out" / "song", segment=0.3, format=format, **way)  # type: ignore[arg-type]
    assert done.gain == 1
    found, rate = read(done.paths["vocals"])
    assert rate == 8000
    assert torch.equal(found, read(song)[0])
    assert soundfile.info(done.paths["vocals"]).subtype == subtype
    assert not read(done.paths["rest"])[0].any()


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000, 384_000, 7_919])
def test_another_rate_comes_back_as_it_was(tmp_path: Path, rate: int) -> None:
    """A tone that both rates hold survives two resamplings; length and rate stay, and vocals + rest are the song."""
    time = np.arange(rate // 2 + 37) / rate
    soundfile.write(tmp_path / "song.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT")
    done = separate_file(Identity(), tmp_path / "song.wav", tmp_path / "song")  # type: ignore[arg-type]
    song, vocals, rest = (read(path)[0] for path in (tmp_path / "song.wav", done.paths["vocals"], done.paths["rest"]))
    assert soundfile.info(done.paths["vocals"]).samplerate == rate
    assert vocals.shape == song.shape == (1, len(time))
    torch.testing.assert_close(vocals + rest, song, rtol=0, atol=1e-7)
    middle = slice(rate // 10, -rate // 10)
    torch.testing.assert_close(vocals[:, middle], song[:, middle], rtol=0, atol=1e-4)


def test_the_pieces_of_a_file_are_the_whole(tiny: BSMamba2, tmp_path: Path) -> None:
    """Reading, resampling, separating, resampling and writing in pieces: the same as each of them on the whole."""
    song = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0)) * 0.1
    soundfile.write(tmp_path / "song.wav", song.T.numpy(), 11_025, subtype="FLOAT")
    done = separate_file(tiny, tmp_path / "song.wav", tmp_path / "song", segment=0.5)
    there = resample(song, 11_025, TINY.sample_rate)
    expected = resample(separate(tiny, there, segment=0.5)[0], TINY.sample_rate, 11_025)[:, :200_000]
    assert torch.equal(read(done.paths["vocals"])[0], expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset through /proc")
@pytest.mark.parametrize(("long", "way"), [(120, {}), (30, {"look_ahead": 2.0})])
def test_two_hours_take_the_memory_of_two_minutes(tmp_path: Path, long: int, way: dict) -> None:
    peaks = {}
    for minutes in (2, long):
        song = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(song, "w", 8000, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(np.zeros(60 * 8000, dtype="int16"))
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        done = separate_file(Identity(), song, tmp_path / "out" / song.stem, **way)  # type: ignore[arg-type]
        peaks[minutes] = resident("VmHWM") - before
        assert soundfile.info(done.paths["vocals"]).frames == minutes * 60 * 8000
        for path in (*done.paths.values(), song):
            path.unlink()
    assert peaks[long] < peaks[2] + 30, peaks  # of two hours, 230 MB of samples in, twice as many out


def resident(field: str) -> float:
    """VmRSS, the memory in use, or VmHWM, its peak, in megabytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny: BSMamba2, tmp_path: Path) -> Path:
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("rate", "channels"), [(8000, 2), (8000, 1), (44_100, 2), (11_025, 1), (8000, 6)])
@pytest.mark.parametrize("format", ["wav", "ogg", "mp3"])
def test_command_keeps_rate_length_and_channels(
    checkpoint: Path, tmp_path: Path, rate: int, channels: int, format: str
) -> None:
    if format == "mp3" and channels > 2:
        pytest.skip("MP3 has one or two channels")
    song = tmp_path / "a song – Lied.wav"
    samples = np.random.default_rng(0).normal(0, 0.1, (rate + 37, channels)).astype("float32")
    soundfile.write(song, samples, rate, subtype="FLOAT")
    output = tmp_path / "out"
    arguments = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.5"]
    assert main([*arguments, "--format", format, "--batch", "3"]) == 0
    vocals, found_rate = soundfile.read(output / f"a song – Lied.vocals.{format}", always_2d=True)
    rest, _ = soundfile.read(output / f"a song – Lied.rest.{format}", always_2d=True)
    assert (vocals.shape, found_rate) == (samples.shape, rate)
    if format == "wav":
        np.testing.assert_allclose(vocals + rest, samples, atol=1e-6)
    assert len(list(output.iterdir())) == 2


def test_command_carries_the_state_on(
    checkpoint: Path, tiny: BSMamba2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song = wave(tmp_path / "song.wav", frames=5000, subtype="FLOAT")
    arguments = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path), "--segment", "0.1"]
    assert main([*arguments, "--look-ahead", "0.04"]) == 0
    expected = separate(tiny, read(song)[0], segment=0.1, look_ahead=0.04)[0]
    assert torch.equal(read(tmp_path / "song.vocals.wav")[0], expected)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--look-ahead", "0.04", "--overlap", "0.5"])
    assert stop.value.code == 2
    assert "--overlap: not allowed with argument --look-ahead" in capsys.readouterr().err


def test_what_passes_full_scale_is_said_and_never_clips(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3.0 in a float file: kept in a float file, scaled with its remainder in every other one."""
    song = tmp_path / "loud.wav"
    wave = 3 * np.sin(np.arange(12_000) / 7)[:, None] * [1, 0.5]
    soundfile.write(song, wave, 8000, subtype="FLOAT")
    for format in ("wav", "wav16", "wav24", "flac", "ogg", "mp3"):
        done = separate_file(Identity(), song, tmp_path / format / "loud", format=format)  # type: ignore[arg-type]
        found = soundfile.read(done.paths["vocals"])[0]
        if format == "wav":
            assert done.gain == 1
            np.testing.assert_array_equal(found, wave.astype("float32"))
        else:
            assert done.gain == pytest.approx(1 / np.abs(wave).max(), rel=1e-4)
            assert np.abs(found).max() < (1.0001 if format not in ("ogg", "mp3") else 1.1)
            error = np.abs(found / done.gain - wave)[1000:-1000].max()
            assert error < {"wav16": 1e-4, "wav24": 1e-6, "flac": 1e-6}.get(format, 0.5)
    arguments = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--format", "wav16"]) == 0
    assert re.search(r"loud\.wav: passes full scale, all results \d+\.\d dB quieter", capsys.readouterr().err)
    vocals, rest = (soundfile.read(tmp_path / "out" / f"loud.{name}.wav")[0] for name in ("vocals", "rest"))
    together = vocals + rest
    gain = (together * wave).sum() / (wave * wave).sum()
    np.testing.assert_allclose(together, gain * wave, atol=2 / 32768)
    assert max(np.abs(vocals).max(), np.abs(rest).max()) == pytest.approx(1, abs=1e-3)


def test_a_file_too_long_for_32_bits_is_written_with_64(tmp_path: Path) -> None:
    for frames, container in ((1 << 20, "WAV"), (1 << 29, "RF64")):  # of 8 bytes
        with StemWriter({"vocals": tmp_path / "long.wav"}, 8000, 2, frames=frames) as results:
            results.write({"vocals": torch.full((2, 100), 0.5)})
        assert soundfile.info(tmp_path / "long.wav").format == container
        assert torch.equal(read(tmp_path / "long.wav")[0], torch.full((2, 100), 0.5))


def test_stopped_by_hand_nothing_is_left(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    song, calls = wave(tmp_path / "song.wav", frames=20_000), [0]
    real = BSMamba2.forward

    def forward(self: BSMamba2, mixture: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(self, mixture)

    monkeypatch.setattr(BSMamba2, "forward", forward)
    arguments = ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--segment", "0.5"]
    assert main(["separate", str(song), *arguments]) == 130
    assert capfd.readouterr().err == "stopped\n"
    assert found_in(tmp_path / "out") == []


@pytest.mark.parametrize(("format", "bits"), [("wav16", 16), ("wav24", 24), ("flac", 24)])
def test_full_scale_itself_is_the_last_step_and_not_the_first(tmp_path: Path, format: str, bits: int) -> None:
    """+1 is one step beyond what an integer holds: rounded carelessly it would come back as -1."""
    step = 2.0 ** (1 - bits)
    values = torch.tensor([[1.0, 1 - step, step, 0.0, -step, -1.0]])
    assert write(tmp_path / "x", values, 8000, format) == 1
    found = torch.from_numpy(soundfile.read(tmp_path / "x", dtype="float64", always_2d=True)[0].T)
    assert found.tolist() == [[1 - step, 1 - step, step, 0, -step, -1]]


def test_folders_are_searched_and_laid_out_likewise(checkpoint: Path, tmp_path: Path) -> None:
    album = tmp_path / "album"
    for name in ("b.wav", "disc 2/a.FLAC", "disc 2/deeper/c.ogg", ".hidden/d.wav", "._b.wav", "cover.jpg"):
        (album / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("jpg"):
            (album / name).write_bytes(b"no sound")
        else:
            soundfile.write(album / name, np.zeros((900, 2)), 8000)
    output = album / "out"
    arguments = ["separate", str(album), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.1"]
    assert main(arguments) == 0
    assert found_in(output) == sorted(
        f"{base}.{stem}.wav" for base in ("b", "disc 2/a", "disc 2/deeper/c") for stem in ("rest", "vocals")
    )
    assert main([*arguments, "--overwrite"]) == 0  # and the results are no songs
    assert len(found_in(output)) == 6
    assert main([*arguments[:4], "-o", str(album)]) == 1  # there they would be
    assert len(found_in(album)) == 6 + 6


def found_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 23 GB")])
def test_too_little_memory_is_told_and_the_others_are_done(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def run(model: BSMamba2, song: Path, *args: Any, **options: Any) -> Any:
        if song.stem == "long":
            raise error
        return whole(model, song, *args, **options)

    whole = command_line.separate_file
    monkeypatch.setattr(command_line, "separate_file", run)
    songs = [str(wave(tmp_path / f"{name}.wav")) for name in ("long", "short")]
    assert main(["separate", *songs, "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]) == 1
    said = capfd.readouterr()
    assert f"{tmp_path / 'long.wav'}: too little memory; use a smaller --batch or --segment" in said.err
    assert len(said.out.splitlines()) == 2
    error.args = ("another bug",)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="another bug"):
            main(["separate", *songs, "--checkpoint", str(checkpoint), "-o", str(tmp_path / "again")])


def test_a_stem_may_not_be_called_as_what_is_left(tmp_path: Path) -> None:
    model = BSMamba2(replace(TINY, stems=("rest", "vocals")))
    with pytest.raises(ValueError, match="give the stem another name"):
        separate_file(model, wave(tmp_path / "song.wav"), tmp_path / "out")
    assert found_in(tmp_path) == ["song.wav"]


# --- bad input --------------------------------------------------------------------------------------------


def wave(path: Path, rate: int = 8000, channels: int = 2, frames: int = 900, **options: object) -> Path:
    soundfile.write(path, np.full((frames, channels), 0.25), rate, **options)  # type: ignore[arg-type]
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_samples(path: Path, *values: float) -> Path:
    frames = np.zeros((90_000, 2))  # the bad sample lies in the second piece that is read
    frames[80_000, 1] = values[0]
    soundfile.write(path, frames, 8000, subtype="FLOAT")
    return path


def poke(path: Path, offset: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    return with_bytes(path, bytes(data))


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def taken(path: Path) -> Path:
    (path.parent / "out").mkdir()
    with_bytes(path.parent / "out" / "bad.vocals.wav", b"of somebody else")
    return wave(path)


def in_the_way(path: Path) -> Path:
    folder(path.parent / "out")
    folder(path.parent / "out" / "bad.rest.wav")
    return wave(path)


def uncounted_mp3(path: Path, seconds: float, rate: int, channels: int, level: float) -> bytes:
    """Noise as an MP3 of one bit rate without the frame that tells how many follow."""
    noise = np.random.default_rng(round(99 * level)).normal(0, 0.2, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate, format="MP3", compression_level=level, bitrate_mode="CONSTANT")
    data = path.read_bytes()
    told = data.find(b"Info", 0, 99)  # poor frames have no room for it
    return data if told < 0 else data[data.index(data[:2], told) :]


def tag_frame(song: bytes, tag: bytes, at: int = 0) -> bytes:
    """A frame like the first of a song, silent, with a tag where encoders write one."""
    head = int.from_bytes(song[:4], "big")
    frame = bytearray(song[: mp3.frame_size(song)])
    frame[4:] = bytes(len(frame) - 4)
    at = at or 4 + mp3.side(head)
    frame[at : at + len(tag)] = tag
    return bytes(frame)


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 1), (22_050, 2), (16_000, 1), (8_000, 2)])
def test_an_mp3_that_does_not_tell_its_length_is_read_to_its_end(tmp_path: Path, rate: int, channels: int) -> None:
    """Its size tells little: rich frames may come first, or last, and pictures beside them."""
    whole = tmp_path / "whole.mp3"
    poor = uncounted_mp3(whole, 6, rate, channels, 0.9)
    rich = uncounted_mp3(whole, 2, rate, channels, 0.0)
    expected, told = read(whole)[0], tmp_path / "untold.mp3"
    picture = b"ID3\x04\0\0" + bytes([0, 32, 0, 0]) + bytes(range(256)) * 2048
    for data, seconds in (
        (rich, 2),
        (rich + poor, 8),
        (poor + rich, 8),
        (picture + rich, 2),
        (picture + picture + rich + b"APETAGEX" + bytes(99) + b"TAG" + bytes(125), 2),
        (rich + bytes(500) + poor, 8),
        (rich + picture + poor, 8),
        (tag_frame(rich, b"VBRI", 36) + rich + poor, 8),
        (tag_frame(rich, b"Xing") + rich + poor, 8),
        (tag_frame(rich, b"Info" + bytes(3) + b"\x01" + bytes(4)) + rich + poor, 8),
    ):
        told.write_bytes(data)
        found, found_rate = read(told)
        assert found_rate == rate
        assert seconds - 0.01 < found.shape[1] / rate < seconds + 0.3  # encoders add up to four frames
        if data is rich:  # the encoder's delay is not cut off: nothing tells it
            late = [found[:, i : i + rate] for i in range(4000)]
            assert min((one - expected[:, :rate]).abs().max().item() for one in late) < 1e-4
    told.write_bytes(rich + bytes(5000) + poor)
    with pytest.raises(AudioError, match="damaged or cut short"):
        read(told)
    for other in (tmp_path / "song.mpga", tmp_path / "song"):  # whatever it is called
        other.write_bytes(rich + poor)
        assert read(other)[0].shape[1] / rate > 7.9


def test_what_is_no_mp3_is_not_taken_for_one(tmp_path: Path) -> None:
    frames = b"\xff\xfb\x90" * 9000
    soundfile.write(tmp_path / "whole.wav", np.zeros((9000, 1)), 44_100, subtype="PCM_24")
    whole = (tmp_path / "whole.wav").read_bytes()
    path = with_bytes(tmp_path / "song.mp3", whole[: -len(frames)] + frames)
    assert read(path)[0].shape == (1, 9000)
    assert mp3.with_count(with_bytes(tmp_path / "junk.mp3", b"\xff" * 300_000)) is None
    assert mp3.with_count(with_bytes(tmp_path / "tags.mp3", (b"ID3\4" + bytes(6)) * 9000)) is None


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_that_tells_its_length_is_left_to_its_decoder(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "song.mp3"
    soundfile.write(path, np.zeros((9000, 2)), 44_100, compression_level=0.3, bitrate_mode=mode)
    assert mp3.with_count(path) is None
    assert read(path)[0].shape == (2, 9000)


# What is given: what one line must say. Channels stand at byte 22 of a WAV file, its rate at byte 24.
BAD = {
    "missing": (lambda p: p / "bad.wav", "does not exist"),
    "empty": (lambda p: with_bytes(p / "bad.wav", b""), "is empty"),
    "text": (lambda p: with_bytes(p / "bad.wav", b"this is no sound\n" * 40), "cannot be read as audio"),
    "cut WAV": (lambda p: cut(wave(p / "bad.wav")), "is cut short"),
    "cut WAV, within its head": (lambda p: cut(wave(p / "bad.wav"), 0.008), "cannot be read as audio"),
    "cut WAV, of 3 GB": (lambda p: poke(wave(p / "bad.wav"), 40, (3 << 30).to_bytes(4, "little")), "is cut short"),
    "FLAC out of a pipe": (
        lambda p: poke(wave(p / "bad.flac", frames=9_000), 21, b"\xf0\0\0\0\0"),
        "does not say how long it is",
    ),
    "cut AIFF": (lambda p: cut(wave(p / "bad.aiff")), "is cut short"),
    "cut FLAC": (lambda p: cut(wave(p / "bad.flac", frames=90_000)), "cut short"),
    "cut OGG": (lambda p: cut(wave(p / "bad.ogg", frames=50_000)), "cut short"),
    "cut MP3": (lambda p: cut(wave(p / "bad.mp3", frames=50_000)), "cut short"),
    "damaged FLAC": (lambda p: poke(wave(p / "bad.flac", frames=90_000), 300, b"\x55" * 100), "damaged"),
    "NaN": (lambda p: with_samples(p / "bad.wav", math.nan), "NaN or infinite"),
    "infinite": (lambda p: with_samples(p / "bad.wav", -math.inf), "NaN or infinite"),
    "zero length": (lambda p: wave(p / "bad.wav", frames=0), "holds no samples"),
    "1 Hz": (lambda p: wave(p / "bad.wav", rate=1), "1 Hz is no rate"),
    "2,000,000,000 Hz": (lambda p: poke(wave(p / "bad.wav"), 24, b"\0\x94\x35\x77"), "2,000,000,000 Hz"),
    "0 channels": (lambda p: poke(wave(p / "bad.wav"), 22, b"\0\0"), "cannot be read as audio"),
    "empty folder": (lambda p: folder(p / "bad"), "holds no WAV"),
    "pipe": (lambda p: pipe(p / "bad.wav"), "no regular file"),
    "output exists": (lambda p: taken(p / "bad.wav"), "exists; give another folder with -o, or --overwrite"),
    "a folder in the output's place": (lambda p: in_the_way(p / "bad.wav"), "exists; give another folder"),
    "a name too long for its results": (lambda p: wave(p / "b.wav").rename(p / f"bad{'x' * 247}.wav"), "too long"),
    "newline in the name": (lambda p: p / "bad\nname.wav", "bad\\nname.wav: does not exist"),
    "letters of no encoding": (lambda p: p / os.fsdecode(b"bad\xff.wav"), "bad\\udcff.wav: does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_the_others_are_done(
    case: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[case]
    good = wave(tmp_path / "good.wav")
    bad = make(tmp_path)
    before = found_in(tmp_path)
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.1"]
    code = main(["separate", str(bad), str(good), *arguments])
    said = capfd.readouterr()
    assert code == 1
    lines = said.err.splitlines()
    assert len(lines) == 1, lines
    assert "bad" in lines[0]
    assert message in lines[0]
    assert ";" in lines[0]  # behind it stands the mend
    assert said.out.splitlines() == [str(output / f"good.{stem}.wav") for stem in ("vocals", "rest")]
    assert set(found_in(tmp_path)) - set(before) == {"out/good.vocals.wav", "out/good.rest.wav"}
    if case == "output exists":
        assert (output / "bad.vocals.wav").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(
    ("rate", "channels", "frames", "name"),
    [
        (8000, 2, 1, "one sample.wav"),
        (8000, 2, 60, "shorter than one window.wav"),
        (384_000, 2, 5000, "384 kHz.wav"),
        (8000, 64, 900, "64 channels.wav"),
        (8000, 2, 900, "a name  with spaces.wav"),
        (8000, 2, 900, "a name\nin two lines.wav"),
        (8000, 2, 900, "песня 歌 🎵.wav"),
        pytest.param(
            8000,
            2,
            900,
            os.fsdecode(b"old encoding \xe9.wav"),
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="a name is UTF-8 there"),
        ),
        (8000, 2, 900, "-o.wav"),
        (8000, 2, 900, "x" * 230 + ".wav"),
    ],
)
def test_strange_but_good_input_is_separated(
    rate: int, channels: int, frames: int, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    song = wave(tmp_path / "plain.wav", rate, channels, frames, subtype="FLOAT").rename(tmp_path / name)
    output = tmp_path / "out"
    assert main(["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.1"]) == 0
    vocals, rest = (read(output / f"{song.stem}.{stem}.wav") for stem in ("vocals", "rest"))
    assert vocals[1] == rest[1] == rate
    assert vocals[0].shape == rest[0].shape == (channels, frames)
    torch.testing.assert_close(vocals[0] + rest[0], torch.full((channels, frames), 0.25), rtol=0, atol=1e-6)


def test_a_sound_stream_without_a_size_is_no_cut_file(tmp_path: Path) -> None:
    """ffmpeg, writing into a pipe, leaves 2^32 − 1 as the size of the data."""
    song = wave(tmp_path / "song.wav", subtype="PCM_16")
    at = song.read_bytes().index(b"data") + 4
    poke(song, at, b"\xff\xff\xff\xff")
    assert read(song)[0].shape == (2, 900)


@contextmanager
def another_user() -> Iterator[None]:
    """Within it we are nobody in particular: to root no folder is closed."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_may_not_be_read_is_one_line_each(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to other users
        place = Path(name)
        place.chmod(0o755)
        wave(folder(place / "album") / "good.wav")
        hidden = wave(folder(place / "album" / "locked") / "hidden.wav")
        secret = wave(place / "secret.wav")
        model = place / "model.safetensors"
        model.write_bytes(checkpoint.read_bytes())
        folder(place / "out").chmod(0o777)
        hidden.parent.chmod(0)
        secret.chmod(0)
        songs = [str(hidden), str(secret), str(place / "album")]
        with another_user():
            code = main(["separate", *songs, "--checkpoint", str(model), "-o", str(place / "out")])
            said = capfd.readouterr().err.splitlines()
            assert main(["separate", *songs, "--checkpoint", str(model), "-o", str(place / "album" / "out")]) == 2
        hidden.parent.chmod(0o755)
        assert code == 1
        assert said == [
            f"{place}/album/locked: the folder cannot be read (Permission denied); change its permissions",
            f"{hidden}: cannot be read (Permission denied); change that, or leave it out",
            f"{secret}: cannot be read (Permission denied); change that, or leave it out",
        ]
        assert found_in(place / "out") == ["good.rest.wav", "good.vocals.wav"]
        (line,) = capfd.readouterr().err.splitlines()
        assert line == f"{place}/album/out: cannot be made a folder (Permission denied); give another one with -o"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 64 kB: a real one, where the system lets us mount it."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        refusal = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        refusal = str(error)
    if refusal:
        pytest.skip(f"no small disk can be mounted here: {refusal}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("format", ["wav", "wav16", "flac", "ogg", "mp3"])
def test_a_full_disk_leaves_no_half_of_a_song(
    checkpoint: Path, tmp_path: Path, small_disk: Path, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    long = wave(tmp_path / "long.wav", frames=120_000)
    short = wave(tmp_path / "short.wav", frames=2000)
    arguments = ["--checkpoint", str(checkpoint), "-o", str(small_disk), "--format", format]
    code = main(["separate", str(long), str(short), *arguments])
    said = capfd.readouterr()
    assert code == 1
    assert len(said.err.splitlines()) == 1
    assert re.search(r"long\.\w+\.\w+: cannot be written \(No space left on device\); .* make room", said.err)
    assert found_in(small_disk) == sorted(Path(line).name for line in said.out.splitlines())
    assert all(line.startswith("short.") for line in found_in(small_disk))
    assert len(found_in(small_disk)) == 2


@pytest.mark.parametrize("format", ["wav", "wav16", "flac", "ogg", "mp3"])
def test_a_disk_that_fills_up_at_any_byte(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a real disk: the write that passes a limit fails, wherever in a file that is."""
    song = wave(tmp_path / "song.wav", frames=20_000)
    room = [0]
    whole = FileIO.write

    def write(self: FileIO, data: bytes) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return whole(self, data)

    monkeypatch.setattr(_Sink, "_store", write)
    failures = 0
    for room[0] in (0, 40, 100, 3000, 70_000, 200_000, 1 << 24):
        output = tmp_path / f"out {room[0]}"
        try:
            separate_file(Identity(), song, output / "song", format=format)  # type: ignore[arg-type]
        except AudioError as error:
            failures += 1
            assert "No space left on device" in str(error)  # noqa: PT017
            assert not list(output.iterdir())
        else:
            assert len(list(output.iterdir())) == 2
    assert 3 <= failures <= 6


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


def of_another_model(path: Path) -> Path:
    torch.save({"encoder.weight": torch.zeros(3, 3)}, path)
    return path


def that_runs_code(path: Path) -> Path:
    torch.save({"state_dict": Payload(path.with_name("executed"))}, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "does not exist; name a checkpoint file"),
        (lambda p: with_bytes(p, b""), "truncated"),
        (lambda p: with_bytes(p, b"no weights"), "is no checkpoint"),
        (folder, "is a folder"),
        (of_another_model, "none is of BSMamba2"),
        (that_runs_code, "nothing in it was run"),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    make: Callable[[Path], Path], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "bad.ckpt")
    assert main(["separate", "song.wav", "--checkpoint", str(path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "bad.ckpt" in line
    assert message in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "toaster"], "--device toaster"),
        (["-o", __file__], "cannot be made a folder (is a file); give another one with -o"),
        (["-o", f"{__file__}/out"], "cannot be made a folder (Not a directory); give another one with -o"),
        (["-o", "/" + 300 * "x"], "(File name too long); give another one with -o"),
        (["--segment", "0.001"], "segment=0.001"),
        (["--overlap", "1"], "overlap=1.0"),
        (["--batch", "0"], "batch=0"),
        (["--look-ahead", "-1"], "look_ahead=-1.0"),
        (["--format", "mp3"], "choose --format wav"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    song = wave(tmp_path / "song.wav", rate=96_000)
    base = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main([*base, *arguments]) in (1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists() or not found_in(tmp_path / "out")


def test_without_a_checkpoint_the_one_in_the_package_is_taken(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    song = wave(tmp_path / "song.wav")
    monkeypatch.setattr(checkpoints, "BUNDLED_CHECKPOINT", tmp_path / "absent.safetensors")
    assert main(["separate", str(song), "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--checkpoint" in line
    assert "make train" in line
    monkeypatch.setattr(checkpoints, "BUNDLED_CHECKPOINT", checkpoint)
    assert main(["separate", str(song), "-o", str(tmp_path / "out")]) == 0


def test_a_published_checkpoint_is_recognised_and_its_licence_said_to_be_missing(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = checkpoint.read_bytes()
    known = {hashlib.sha256(content).hexdigest(): (len(content), "the authors' own")}
    monkeypatch.setattr(checkpoints, "KNOWN_FILES", known)
    song = wave(tmp_path / "song.wav")
    assert main(["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == f"{checkpoint}: the authors' own; no licence is stated for the weights\n"


def test_two_songs_with_one_name_do_not_replace_each_other(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = wave(tmp_path / "song.wav"), wave(tmp_path / "song.flac", frames=800)
    arguments = ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--overwrite"]
    assert main(["separate", str(first), str(second), *arguments]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "song.flac: its results would replace those of" in line
    assert read(tmp_path / "out" / "song.vocals.wav")[0].shape[1] == 900


def test_silence_in_a_file_gives_silence(checkpoint: Path, tmp_path: Path) -> None:
    for rate in (8000, 44_100):
        soundfile.write(tmp_path / f"{rate}.wav", np.zeros((30_000, 2)), rate)
        arguments = ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--format", "wav16"]
        assert main(["separate", str(tmp_path / f"{rate}.wav"), *arguments]) == 0
        for stem in ("vocals", "rest"):
            assert not soundfile.read(tmp_path / "out" / f"{rate}.{stem}.wav")[0].any()


def test_help_says_what_happens_to_more_channels(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["separate", "--help"])
    assert stop.value.code == 0
    assert "Of more than two\nchannels each two after each other" in capsys.readouterr().out
