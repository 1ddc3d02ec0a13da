"""Song synthesiser: seeded songs whose stems are known, and one real excerpt.

Begin with `synthesiser`: seed → `score` → `voice`, `drums`, `bass` and `accompaniment` → `mixing` → `song.Song`.
Needs NumPy and torch; `real_excerpt` needs the stempeg package as well.
Optional and off by default: `mix_variety` (random production) and `soundfont` (recorded instruments, by FluidSynth).
Axes: s stem, c channel (2), t sample; in the voice k STFT frame, f STFT bin. Arrays of sound are float32.
Times are in seconds, frequencies in Hz, pitches in MIDI numbers (69 = 440 Hz), levels in dB.
"""

from .real_excerpt import excerpt
from .song import SAMPLE_RATE, STEMS, Song
from .synthesiser import synthesise, synthesise_songs

__all__ = ["SAMPLE_RATE", "STEMS", "Song", "excerpt", "synthesise", "synthesise_songs"]
