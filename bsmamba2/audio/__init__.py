"""Audio: read and write files, resample, and separate songs block by block in bounded memory.

Needs soundfile (libsndfile), av (FFmpeg's decoders) and soxr, all base dependencies. Begin with `song_files`, which
combines the others: `files` reads, `resample` changes the sample rate, `streaming` separates blocks, and `writer`
writes stems. `files` uses `containers` (with `chunks`, `ogg` and `mpeg_frames`), which finds the sound in a file, and
`decoders`. `musdb` lists the tracks of a data set.
"""

from .files import AudioError, AudioReader, find_audio_files
from .song_files import SeparatedFiles, separate_file
from .streaming import separate_stream
from .writer import FORMATS, StemWriter

__all__ = [
    "FORMATS",
    "AudioError",
    "AudioReader",
    "SeparatedFiles",
    "StemWriter",
    "find_audio_files",
    "separate_file",
    "separate_stream",
]
