"""Songs: the mixture is the sum, and stems are found by name and by number."""

import pytest
import torch
from song_measures import default_songs


def test_mixture_is_the_sum_and_stems_have_names() -> None:
    song = default_songs()[0]
    total = song.stem("vocals") + song.stem("drums") + song.stem("bass") + song.stem("other")
    torch.testing.assert_close(song.mixture, total, atol=1e-6, rtol=0)
    assert torch.equal(song.vocals, song.stems[0])
    assert torch.equal(song.stem("bass"), song.stems[2])
    with pytest.raises(ValueError, match="guitar"):
        song.stem("guitar")


def test_stems_are_cropped_and_labelled_by_number() -> None:
    song = default_songs()[0]
    assert torch.equal(song.crop(2, 100, 50), song.stem("bass")[:, 100:150])
    assert song.label(3) == "synthetic-0/other"
    assert song.samples == song.stems.shape[-1]
