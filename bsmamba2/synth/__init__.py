"""Song synthesiser: seeded songs with known stems, and one real excerpt.

Begin with `synthesiser`: seed → `score` → `voice`, `drums`, `bass` and `accompaniment` → `mixing` → `song.Song`.
The package needs NumPy and torch; `real_excerpt` also needs the stempeg package.
Optional and off by default: `mix_variety` (random production) and `soundfont` (recorded instruments, by FluidSynth).
Axes: s stem, c channel (2), t sample; in `voice` also k STFT frame, f STFT bin. Audio arrays are float32.
Times are in seconds, frequencies in Hz, pitches in MIDI numbers (69 = 440 Hz), levels in dB.
"""

from .real_excerpt import excerpt
from .song import SAMPLE_RATE, STEMS, Song
from .synthesiser import synthesise, synthesise_songs

__all__ = ["SAMPLE_RATE", "STEMS", "Song", "excerpt", "synthesise", "synthesise_songs"]
