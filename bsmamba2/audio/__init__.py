"""Audio files in and out, resampling, and separation block by block, in bounded memory.

Needs soundfile (libsndfile), av (FFmpeg's decoders) and soxr, all base dependencies. Begin with `song_files`, which
joins the others: `files` reads, `resample` changes the rate, `streaming` separates blocks, `writer` writes stems.
`files` rests on `containers` (with `chunks`, `ogg`, `mpeg_frames`), which finds the sound in a file, and `decoders`.
`musdb` lists the tracks of a data set.
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
