"""Recorded instruments (optional): FluidSynth plays a sound font.

A sound font (`.sf2`) holds recorded notes of many instruments. FluidSynth is a system library, and
`pyfluidsynth` is its Python binding.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from .score import Note
from .song import Array

DRUMS = 128
"""Bank of drum kits in a sound font; the pitch of a note selects the drum."""
BLOCK = 64  # samples per block of FluidSynth; notes begin and end between blocks
GAIN = 1.5  # most instruments then use the range of 16 bits; few chords clip, in about 1 % of their samples
RECORDED_PROB = 0.7
"""Probability that the sound font plays a part of the accompaniment."""
PROGRAMS = {  # by family of `instruments`: General MIDI from 0, without choirs and other voice-like sounds
    "plucked": (24, 25, 26, 27, 28, 45, 46, 15, 105, 107), "piano": (0, 1, 2, 3, 6), "epiano": (4, 5, 7),
    "bell": (8, 9, 10, 11, 12, 13), "organ": (16, 17, 18, 19, 20, 21), "pad": (48, 49, 50, 51, 88, 89, 90, 95),
    "saw": (62, 63, 80, 81, 84, 90), "guitar": (29, 29, 30, 30, 27), "solo guitar": (25, 26, 27, 29, 30),
    "brass": (56, 57, 59, 60, 61, 64, 65, 66), "strings": (40, 41, 42, 44, 48, 49, 110),
    "flute": (68, 69, 71, 72, 73, 74, 75, 22), "bass": (32, 33, 33, 34, 34, 35, 36, 37, 38, 39),
}  # fmt: skip
KITS = (0, 0, 8, 8, 16, 16, 24, 25, 32, 40)
KIT_KEYS = {
    "kick": (35, 36), "snare": (38, 38, 40, 37, 39), "closed": (42, 42, 44, 51, 59, 46), "opened": (46, 46, 51, 53),
    "shaker": (54, 69, 70, 82), "tom": (41, 43, 45, 47, 48, 50), "crash": (49, 57, 55, 52),
}  # fmt: skip
"""Pitches from which each drum of a kit is drawn."""


class SoundFont:
    """General MIDI sound font, an `.sf2` file; `presets` maps bank (0 or `DRUMS`) and program (from 0) to a name.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when FluidSynth cannot read the file, or it lacks the drum kit or the piano of General MIDI.
        ImportError: without pyfluidsynth or FluidSynth.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no sound font at {self.path}")
        with self._synth(44_100) as (synth, font):
            names = {(bank, n): synth.sfpreset_name(font, bank, n) for bank in (0, DRUMS) for n in range(128)}
        self.presets = {preset: name for preset, name in names.items() if name}
        for bank in (0, DRUMS):
            if (bank, 0) not in self.presets:
                raise ValueError(f"{self.path} has no preset 0 in bank {bank}: take a General MIDI font")

    @contextmanager
    def _synth(self, rate: int) -> Iterator[tuple[Any, int]]:
        """Yield a new FluidSynth synthesiser, whose output does not depend on earlier notes, and the font's number."""
        try:
            import fluidsynth
        except ImportError as error:
            raise ImportError(
                "a sound font needs FluidSynth and its binding: pip install 'bsmamba2[soundfont]', and the library "
                "(Debian: apt install libfluidsynth3; conda and Homebrew: fluidsynth)"
            ) from error
        dry = {"synth.reverb.active": 0, "synth.chorus.active": 0, "synth.dynamic-sample-loading": 1}
        synth = fluidsynth.Synth(gain=GAIN, samplerate=float(rate), channels=16, **dry)
        try:
            font = synth.sfload(str(self.path))
            actual_rate = synth.get_setting("synth.sample-rate")
            if font < 0:
                raise ValueError(f"{self.path} is not a sound font that FluidSynth can read")
            if actual_rate != rate:
                raise ValueError(f"FluidSynth plays at {actual_rate:g} Hz when asked for {rate}: ask for 8000 to 96000")
            yield synth, font
        finally:
            synth.delete()

    def play(self, notes: Iterable[Note], program: int, samples: int, rate: int, *, bank: int = 0) -> Array:
        """Render notes with one instrument, (c=2, t=samples) float32; the same notes give the same bits.

        Notes begin and end at multiples of 64 samples; a key that is struck while it sounds is stopped and
        restarted. Notes that begin before 0 or after `samples`, or whose pitch is not from 0 to 127, are left out.
        FluidSynth renders 16 bits with dither, so silence may be ± 2⁻¹⁵.

        Raises:
            ValueError: for a program that the font does not have, `samples` below 1, or a rate that FluidSynth refuses.
        """
        if (bank, program) not in self.presets:
            raise ValueError(f"{self.path} has no preset {program} in bank {bank}")
        if samples < 1:
            raise ValueError(f"samples={samples!r} must be at least 1")
        with self._synth(rate) as (synth, font):
            synth.program_select(0, font, bank, program)
            pieces, position = [], 0
            for block, is_on, key, velocity in _events(notes, -(-samples // BLOCK), rate):
                if block > position:
                    pieces.append(synth.get_samples((block - position) * BLOCK))
                    position = block
                if is_on:
                    synth.noteon(0, key, velocity)
                else:
                    synth.noteoff(0, key)
        sound = np.concatenate(pieces).reshape(-1, 2)[:samples].T
        return np.ascontiguousarray(sound, dtype=np.float32) / np.float32(32_768)


def _events(notes: Iterable[Note], blocks: int, rate: int) -> list[tuple[int, int, int, int]]:
    """MIDI events in order: block, 0 for note off or 1 for note on, key, velocity; the last is at block `blocks`."""
    spans: dict[tuple[int, int], tuple[int, int]] = {}  # (key, first block): last block, velocity
    for note in notes:
        start, end = (round(time * rate / BLOCK) for time in (note.start, note.start + note.seconds))
        key = round(note.pitch)
        if 0 <= start < blocks and 0 <= key < 128:
            spans[key, start] = (max(end, start + 1), min(127, max(1, round(127 * note.velocity))))
    events = [(blocks, 0, 0, 0)]
    for (key, start), (next_key, next_start) in pairwise([*sorted(spans), (-1, 0)]):
        end, velocity = spans[key, start]
        if next_key == key:  # FluidSynth's note off ends all notes of a key
            end = min(end, next_start)
        events += [(start, 1, key, velocity), (min(end, blocks), 0, key, 0)]
    return sorted(events)


class Recorded:
    """Random choice of the parts of a song that a sound font plays, and of the instruments for them."""

    probability = RECORDED_PROB

    def __init__(self, rng: Generator, font: SoundFont, rate: int) -> None:
        self.rng, self.font, self.rate = rng, font, rate

    def _draw_program(self, programs: tuple[int, ...], bank: int = 0) -> int | None:
        """Draw one of the programs that the font has; None if the part is left to the synthesiser."""
        known = [n for n in programs if (bank, n) in self.font.presets]
        return None if self.rng.random() > self.probability or not known else int(self.rng.choice(known))

    def play(self, family: str, notes: list[Note], samples: int) -> Array | None:
        """Play notes on a recorded instrument of a family, (c, t); None if the part is left to the wavetables."""
        program = self._draw_program(PROGRAMS[family])
        if program is None:
            return None
        if family == "guitar":  # power chords, like the wavetables of this family
            notes = [Note(n.start, n.seconds, n.pitch + shift, n.velocity) for n in notes for shift in (-12, -5, 0)]
        sound = self.font.play(notes, program, samples, self.rate)
        return sound if np.abs(sound).max() > 1e-3 else None  # a font may lack some notes

    def kit(self) -> dict[str, Array]:
        """One-shots of a drum kit, each (t,) with peak 1; empty if the drums are left to the synthesiser.

        Drums that the font's kit lacks are left out.
        """
        program = self._draw_program(KITS, DRUMS)
        if program is None:
            return {}
        seconds = 1.6
        hits = [
            Note(2 * i * seconds, seconds, int(self.rng.choice(keys)), self.rng.uniform(0.6, 1.0))
            for i, keys in enumerate(KIT_KEYS.values())
        ]
        length = round(seconds * self.rate)
        fade = np.linspace(1, 0, length // 10, dtype=np.float32)
        sound = self.font.play(hits, program, 2 * len(hits) * length, self.rate, bank=DRUMS).mean(0)
        shots = {}
        for i, name in enumerate(KIT_KEYS):
            shot = sound[2 * i * length :][:length]
            shot[-len(fade) :] *= fade
            positions = np.arange(0, length - 1, self.rng.uniform(0.85, 1.2))  # retuned by up to three semitones
            shot = np.interp(positions, np.arange(length), shot).astype(np.float32)
            peak = np.abs(shot).max()
            if peak > 1e-3:
                shots[name] = shot / peak
        return shots
