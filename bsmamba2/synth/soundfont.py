"""Recorded instruments: notes played through a sound font by FluidSynth.

notes → note on, note off → FluidSynth → (c, t)

A sound font (`.sf2`) holds recordings of instruments, note by note. `bsmamba2.synth.songs` can give parts of its songs to
one; nothing else needs it. FluidSynth is a library of the system, `pyfluidsynth` its Python binding.

Axes: c channel (2), t sample. Times in seconds, pitches in MIDI numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

DRUMS = 128
"""The bank of a sound font that holds drum kits, where a pitch is a drum."""
BLOCK = 64
"""FluidSynth hears of notes between blocks of so many samples."""
GAIN = 1.5
"""As loud as 16 bits allow most instruments to be; a loud chord of a few clips in one sample of a hundred."""


class Note(Protocol):
    """What is played: `start` and `seconds` in seconds, `pitch` a MIDI number, `velocity` from 0 to 1."""

    @property
    def start(self) -> float: ...
    @property
    def seconds(self) -> float: ...
    @property
    def pitch(self) -> float: ...
    @property
    def velocity(self) -> float: ...


class SoundFont:
    """A file of recorded instruments.

    Args:
        path: of the sound font, `.sf2`.

    Attributes:
        presets: names by bank, 0 for instruments or `DRUMS`, and program, as General MIDI numbers them from 0.

    Raises:
        FileNotFoundError: when it is not there; ValueError when FluidSynth cannot read it, or it has no drum kit or
            no piano, which every General MIDI font has.
        ImportError: without pyfluidsynth or FluidSynth.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no sound font at {self.path}")
        synth, font = self._start(44_100)
        try:
            names = {(bank, n): synth.sfpreset_name(font, bank, n) for bank in (0, DRUMS) for n in range(128)}
        finally:
            synth.delete()
        self.presets: dict[tuple[int, int], str] = {place: name for place, name in names.items() if name}
        for place in ((0, 0), (DRUMS, 0)):
            if place not in self.presets:
                raise ValueError(f"{self.path} has no preset {place[1]} in bank {place[0]}: take a General MIDI font")

    @staticmethod
    def _binding() -> Any:
        try:
            import fluidsynth
        except ImportError as error:
            told = "a sound font takes FluidSynth and its binding: pip install 'bsmamba2[soundfont]', and the library"
            raise ImportError(f"{told} (Debian: apt install libfluidsynth3; conda and Homebrew: fluidsynth)") from error
        return fluidsynth

    def _start(self, rate: int) -> tuple[Any, int]:
        """A synthesiser of its own, so that nothing that was played before is heard, not in the last bit."""
        dry = {"synth.reverb.active": 0, "synth.chorus.active": 0, "synth.dynamic-sample-loading": 1}
        synth = self._binding().Synth(gain=GAIN, samplerate=float(rate), channels=16, **dry)
        font = synth.sfload(str(self.path))
        given = synth.get_setting("synth.sample-rate")
        fault = ""
        if font < 0:
            fault = f"{self.path} is no sound font that FluidSynth can read"
        elif given != rate:
            fault = f"FluidSynth plays at {given:g} Hz when asked for {rate}: ask for 8000 to 96000"
        if fault:
            synth.delete()
            raise ValueError(fault)
        return synth, font

    def play(self, notes: Iterable[Note], program: int, samples: int, rate: int, *, bank: int = 0) -> NDArray[Any]:
        """Notes by one instrument, (c=2, t=samples) float32; the same notes give the same bits.

        Notes begin and end with blocks of 64 samples; a key that is struck while it sounds ends there and begins anew.
        What begins before 0 or after `samples`, or has no pitch from 0 to 127, is left out. FluidSynth gives 16 bits,
        dithered: what is silent may have ± 2⁻¹⁵.

        Raises:
            ValueError: for a program that the font does not have, no samples, or a rate that FluidSynth refuses.
        """
        if (bank, program) not in self.presets:
            raise ValueError(f"{self.path} has no preset {program} in bank {bank}")
        if samples < 1:
            raise ValueError(f"samples={samples!r} must be at least 1")
        blocks = -(-samples // BLOCK)
        spans: dict[tuple[int, int], tuple[int, int]] = {}  # (key, first block): last block, velocity
        for note in notes:
            start, end = (round(time * rate / BLOCK) for time in (note.start, note.start + note.seconds))
            key = round(note.pitch)
            if 0 <= start < blocks and 0 <= key < 128:
                spans[key, start] = (max(end, start + 1), min(127, max(1, round(127 * note.velocity))))
        events: list[tuple[int, int, int, int]] = [(blocks, 0, 0, 0)]  # block, 0 off or 1 on, key, velocity
        for (key, start), (after, again) in pairwise([*sorted(spans), (-1, 0)]):
            end, velocity = spans[key, start]
            # FluidSynth's note off ends all that sounds on a key.
            end = min(end, again) if after == key else end
            events += [(start, 1, key, velocity), (min(end, blocks), 0, key, 0)]
        synth, font = self._start(rate)
        try:
            synth.program_select(0, font, bank, program)
            pieces, now = [], 0
            for block, on, key, velocity in sorted(events):
                if block > now:
                    pieces.append(synth.get_samples((block - now) * BLOCK))
                    now = block
                if on:
                    synth.noteon(0, key, velocity)
                else:
                    synth.noteoff(0, key)
        finally:
            synth.delete()
        sound = np.concatenate(pieces).reshape(-1, 2)[:samples].T
        return np.ascontiguousarray(sound, dtype=np.float32) / np.float32(32_768)
