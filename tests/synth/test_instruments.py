"""Instruments: every family draws and plays at the pitch that is asked."""

import numpy as np
import pytest

from bsmamba2.synth.instruments import FAMILIES, draw_instrument, play_notes
from bsmamba2.synth.score import Note

RATE = 16_000


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_plays_a_note_where_and_as_high_as_it_stands(family: str) -> None:
    rng = np.random.default_rng(0)
    instrument = draw_instrument(rng, family)
    sound = play_notes(rng, [Note(0.5, 1.0, 57)], instrument, RATE, 3 * RATE)
    assert (sound.shape, sound.dtype) == ((2, 3 * RATE), np.float32)
    assert not sound[:, : RATE // 2].any()
    assert not sound[:, round((1.5 + instrument.release) * RATE) + 1 :].any()
    window = sound[0, round(0.7 * RATE) : round(1.3 * RATE)]
    correlation = np.fft.irfft(np.abs(np.fft.rfft(window, 1 << 15)) ** 2)
    period = 60 + int(correlation[60:90].argmax())  # 220 Hz: 73 samples
    assert period == pytest.approx(RATE / 220, abs=2)


def test_no_notes_are_silence() -> None:
    assert not play_notes(np.random.default_rng(0), [], draw_instrument(np.random.default_rng(0), "pad"), RATE, 9).any()
