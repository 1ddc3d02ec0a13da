"""Streaming separation: STFT in blocks, overlap-add in blocks, and the state carried from segment to segment."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from stand_in_models import Broken, Identity
from tiny_model import TINY
from torch import Tensor, nn

from bsmamba2 import BSMamba2
from bsmamba2.audio.streaming import istft_blocks, separate_stream, stft_blocks
from bsmamba2.separate import separate
from bsmamba2.spectrogram import stft


def separate_at_once(model: nn.Module, mixture: Tensor, **options: Any) -> Tensor:
    """`separate_stream` of one song (c, samples) in one block: (stem, c, samples)."""
    return torch.cat(list(separate_stream(model, [mixture[None]], **options)), dim=-1)[0]  # type: ignore[arg-type]


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


def test_songs_side_by_side_are_separated_each_by_itself(tiny: BSMamba2) -> None:
    torch.manual_seed(0)
    songs = torch.randn(3, 2, 3000)
    together = torch.cat(list(separate_stream(tiny, songs.split(700, -1), segment=0.1, batch=4)), -1)
    for song, found in zip(songs, together, strict=True):
        torch.testing.assert_close(found, separate(tiny, song, segment=0.1), rtol=0, atol=1e-5)


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

    def stream_masks(self, spectrogram: Tensor, state: list | None, frames: int) -> tuple[Tensor, list]:
        return BSMamba2.stream_masks(self, spectrogram, None, frames)  # type: ignore[arg-type]


class RunsAhead:
    """A fault: the memory is that at the end of the look-ahead."""

    def stream_masks(self, spectrogram: Tensor, state: list | None, frames: int) -> tuple[Tensor, list]:
        masks, after = BSMamba2.stream_masks(self, spectrogram, state, spectrogram.shape[-1])  # type: ignore[arg-type]
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
    found = separate_at_once(model, mixture, segment=0.1, look_ahead=look_ahead)
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
            found = separate_at_once(deep, mixture, segment=segment, look_ahead=look_ahead)
            assert distance(found, whole(deep, mixture)) < 1e-6


@pytest.mark.parametrize("frames", [1, 7, 64, 65, 150])
def test_pieces_that_see_all_that_follows_are_the_whole(deep: BSMamba2, frames: int) -> None:
    """Many pieces, each of which reads to the end of the song: no layer's memory may be off. In float64."""
    torch.manual_seed(0)
    spectrogram = torch.randn(2, 2, 65, 15 if frames < 10 else 160, dtype=torch.complex128)
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
    assert distance(separate_at_once(deep, mixture, segment=segment, look_ahead=look_ahead), expected) < 1e-6
    for fault in (Forgets, RunsAhead) if look_ahead else (Forgets,):
        found = separate_at_once(with_fault(deep, fault), mixture, segment=segment, look_ahead=look_ahead)
        assert distance(found, expected) > 1e-3


def test_the_first_layers_memory_is_exact_and_the_others_remember_what_was_given_out(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    spectrogram = torch.randn(1, 2, 65, 100, dtype=torch.complex64)
    with torch.inference_mode():
        _, knowing = deep.stream_masks(spectrogram, None, 50)
        _, guessing = deep.stream_masks(spectrogram[..., :60], None, 50)
    for own, other in zip(knowing[0], guessing[0], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
    for layer in (1, 2):
        assert distance(guessing[layer].ssm_state, knowing[layer].ssm_state) > 1e-3


def test_with_more_look_ahead_the_result_comes_nearer(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 6001)
    expected = whole(deep, mixture)
    errors = [
        distance(separate_at_once(deep, mixture, segment=0.1, look_ahead=seconds), expected)
        for seconds in (0.0, 0.05, 0.3)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0
    assert errors[0] < distance(separate(deep, mixture, segment=0.1, overlap=0), expected)


@pytest.mark.parametrize("size", [1, 7, 1234, 5001])
def test_blocks_make_no_difference_to_a_carried_state(deep: BSMamba2, size: int) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 1601 if size == 1 else 5001)
    options = {"segment": 0.1, "look_ahead": 0.03}
    expected = separate_at_once(deep, mixture, **options)  # type: ignore[arg-type]
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
    expected = torch.stack([separate_at_once(deep, song, **options) for song in songs])  # type: ignore[arg-type]
    for batch in (1, 2, 8):
        found = torch.cat(list(separate_stream(deep, songs.split(700, -1), batch=batch, **options)), -1)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_carried_state_is_no_exception(deep: BSMamba2) -> None:
    """Silence stays silence, a narrower type stays close, every sample comes, in pieces, no gradient is left."""
    torch.manual_seed(0)
    mixture = torch.randn(2, 2345)
    options = {"segment": 0.1, "look_ahead": 0.05}
    assert not separate_at_once(deep, torch.zeros(2, 5000), **options).any()  # type: ignore[arg-type]
    pieces = list(separate_stream(deep, [mixture[None]], **options))  # type: ignore[arg-type]
    wide = torch.cat(pieces, dim=-1)[0]
    assert wide.shape[-1] == 2345
    assert len(pieces) > 2
    assert not wide.requires_grad
    narrow = separate_at_once(deep, mixture, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]
    assert narrow.dtype == torch.float32
    assert 0 < distance(narrow, wide) < 0.05


def test_a_layer_without_a_memory_is_named() -> None:
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    with pytest.raises(ValueError, match="Sums has no `step`"):
        separate_at_once(BSMamba2(TINY, sequence_layer=Sums), torch.randn(2, 500), segment=0.1, look_ahead=0.1)


@pytest.mark.parametrize("frames", [0, -1, 6])
def test_frames_out_of_range_are_named(tiny: BSMamba2, frames: int) -> None:
    with pytest.raises(ValueError, match=f"frames={frames} must be from 1 to the 5"):
        tiny.stream_masks(torch.randn(1, 2, 65, 5, dtype=torch.complex64), None, frames)


@pytest.mark.parametrize(
    ("model", "mixture", "options", "message"),
    [
        (Identity(), torch.zeros(2, 100), {"look_ahead": -0.1}, "look_ahead=-0.1"),
        (Identity(), torch.zeros(2, 100), {"look_ahead": math.nan}, "look_ahead=nan"),
        (Identity(), torch.full((2, 100), math.nan), {"look_ahead": 1.0}, "NaN"),
        (Broken(), torch.ones(2, 100), {"look_ahead": 1.0}, "another checkpoint"),
        (Identity(), torch.full((2, 100), math.nan), {}, "NaN"),
        (Broken(), torch.ones(2, 100), {}, "another checkpoint"),
        (Broken(), torch.ones(2, 100), {"dtype": torch.bfloat16}, "float32"),
        (Identity(), torch.zeros(2, 100), {"overlap": 1.0}, "overlap=1.0"),
        (Identity(), torch.zeros(2, 100), {"batch": 0}, "batch=0"),
    ],
)
def test_wrong_arguments_of_a_stream_are_named(model: nn.Module, mixture: Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        separate_at_once(model, mixture, **options)


@pytest.mark.parametrize("options", [{"shifts": 3}, {"tta": True}, {"shifts": 2, "tta": True}], ids=str)
@pytest.mark.parametrize("size", [1234, 5001])
def test_averaging_in_blocks_is_averaging_at_once(tiny: BSMamba2, options: dict, size: int) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 5001) * torch.tensor([[1.0], [0.3]])
    expected = separate(tiny, mixture, segment=0.1, **options)
    received = given = 0
    pieces = []

    def blocks() -> Iterator[Tensor]:
        nonlocal received
        for block in mixture.split(size, -1):
            received += block.shape[-1]
            yield block[None]

    for piece in separate_stream(tiny, blocks(), segment=0.1, **options):
        pieces.append(piece)
        given += piece.shape[-1]
        assert received - given <= 4000 + 1600 + size  # half a second, two segments, a block
    assert torch.equal(torch.cat(pieces, -1)[0], expected)
    assert list(separate_stream(tiny, [], segment=0.1, **options)) == []


@pytest.mark.parametrize("look_ahead", [None, 0.05])
def test_an_averaged_identity_gives_its_input_back_bit_for_bit(look_ahead: float | None) -> None:
    torch.manual_seed(0)
    songs = torch.randn(3, 2, 8123)
    options = {"segment": 0.1, "look_ahead": look_ahead, "shifts": 3, "tta": True}
    found = torch.cat(list(separate_stream(Identity(), songs.split(1000, -1), **options)), -1)  # type: ignore[arg-type]
    assert torch.equal(found[:, 0], songs)


def test_an_averaged_state_is_that_of_each_view(deep: BSMamba2) -> None:
    torch.manual_seed(0)
    mixture = torch.randn(2, 5001) * torch.tensor([[1.0], [0.3]])
    options = {"segment": 0.1, "look_ahead": 0.05}
    plain = separate_at_once(deep, mixture, **options)  # type: ignore[arg-type]
    swapped = separate_at_once(deep, mixture.flip(0), **options).flip(1)  # type: ignore[arg-type]
    inverted = -separate_at_once(deep, -mixture, **options)  # type: ignore[arg-type]
    found = separate_at_once(deep, mixture, tta=True, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found, (plain + swapped + inverted) / 3, rtol=0, atol=1e-5)


@pytest.mark.parametrize("win_length", [100, 64])
def test_a_short_window_is_used_in_blocks_as_at_once(win_length: int) -> None:
    torch.manual_seed(0)
    audio = torch.randn(2, 1501, dtype=torch.float64)
    spectrogram = torch.cat(list(stft_blocks(audio.split(70, -1), 128, 32, win_length)), -1)
    torch.testing.assert_close(spectrogram, stft(audio, 128, 32, win_length), rtol=0, atol=1e-12)
    back = torch.cat(list(istft_blocks(spectrogram.split(3, -1), 128, 32, win_length)), -1)
    torch.testing.assert_close(back[..., :1501], audio, rtol=0, atol=1e-12)
    model = BSMamba2(replace(TINY, win_length=win_length)).eval()
    mixture = torch.randn(2, 801)
    found = separate_at_once(model, mixture, segment=1.0, look_ahead=0.0)
    assert distance(found, whole(model, mixture)) < 1e-6
    assert distance(found, whole(BSMamba2(TINY).eval(), mixture)) > 1e-3
