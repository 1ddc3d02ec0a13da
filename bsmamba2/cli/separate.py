"""`bsmamba2 separate SONG... -o DIR`: separate the vocals of songs."""

from __future__ import annotations

import argparse
import glob
import math
import os
import unicodedata
import warnings
from pathlib import Path

from ..audio import FORMATS, AudioError, find_audio_files, separate_file
from ..audio.files import UnstatedLengthWarning
from ..audio.song_files import result_paths
from ..kernels import BackendError
from ..separate import DTYPES
from .console import describe_error, log, make_output, print_line, progress_bar, reraise_oom
from .model_arguments import add_model_arguments, load_model

DESCRIPTION = """\
Write NAME.vocals and NAME.instrumental (the mixture minus the vocals) for every song, at its own rate, length and
number of channels. Memory use does not grow with the length of a song; rates from 1,000 to 768,000 Hz are accepted.

Channels: a mono song is copied to both channels of the model, and the mean of the outputs is written. Of more than two
channels, a left and a right one (front, back, side, ...) are separated as one stereo song, each other (centre, LFE,
...) as a mono song. In a file that does not name its speakers, each two after each other (1 and 2, 3 and 4, ...) are
one stereo song, and an odd last channel is a mono song. Nothing is mixed down; the results have the same speakers."""

EPILOG = """\
Levels: the stems of loud music may exceed full scale. The format wav (32-bit float) stores them as they are. In any
other format all results of such a song are scaled down by the same factor, which a message gives, so that integers
never clip, and ogg and mp3 only by what their encoders add.

Folders are searched recursively for audio files, and the results keep their layout; with several folders, each has a
folder of its own name. A song that cannot be separated gets one line with the reason and the fix; the others are still
separated, and the exit code is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bsmamba2 separate`."""
    parser.add_argument("songs", nargs="+", type=Path, metavar="SONG", help="audio or video file, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--segment", type=float, default=8.0, metavar="SECONDS", help="length of a segment (8)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--overlap", type=float, default=0.5, metavar="SHARE",
        help="fraction by which segments overlap, from 0 to below 1 (0.5); 0: end to end, as in the paper",
    )  # fmt: skip
    mode.add_argument(
        "--look-ahead", type=float, metavar="SECONDS",
        help="carry over the state from segment to segment instead of overlapping; each sees this much ahead",
    )  # fmt: skip
    parser.add_argument(
        "--shifts", type=int, default=1, metavar="N",
        help="average N passes that start at different samples (1), as Demucs does; takes N times as long. With 2, the "
        "bundled checkpoint gains 0.16 dB uSDR",
    )  # fmt: skip
    parser.add_argument(
        "--tta", action="store_true",
        help="also average over swapped channels and inverted polarity; takes three times as long. The bundled "
        "checkpoint loses 0.27 dB uSDR",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="wav",
        help="wav: 32-bit float (default); wav24, wav16, flac (24 bits): integers; ogg, mp3: lossy",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Separate every song that was named, or found in a folder."""
    try:
        model = load_model(args)
        make_output(args.output)
    except (ValueError, OSError, BackendError) as error:
        log(error)
        return 2
    songs = expand_wildcards(args.songs) if os.name == "nt" else args.songs  # cmd.exe does not expand them
    jobs, failed = find_songs(songs, args.output)
    unstated: list[Path] = []
    written: dict[str, tuple[Path, Path]] = {}  # name without case → a result and its song
    for song, base in jobs.items():
        try:
            for path in result_paths(model.config, base, args.format).values():
                result, other = written.get(_fold(path), (path, song))
                if other != song and path.exists() and path.samefile(result):
                    fault = f"its results would replace those of {other}; give it another folder with -o"
                    raise AudioError(f"{song}: {fault}")
            with (
                reraise_oom(), warnings.catch_warnings(), progress_bar(f"{song.name} on {args.device}") as progress
            ):  # fmt: skip
                warnings.simplefilter("ignore", UnstatedLengthWarning)  # one line for all of them is enough
                separated = separate_file(
                    model, song, base, segment=args.segment, overlap=args.overlap, look_ahead=args.look_ahead,
                    batch=args.batch, dtype=DTYPES[args.dtype], shifts=args.shifts, tta=args.tta, format=args.format,
                    overwrite=args.overwrite, progress=progress,
                )  # fmt: skip
        except (ValueError, OSError, MemoryError) as error:
            log(describe_error(error, song))
            failed += 1
            continue
        unstated += [song] * (not separated.states_length)
        written |= {_fold(path): (path, song) for path in separated.paths.values()}
        if separated.gain < 1:
            quieter = -20 * math.log10(separated.gain)
            log(f"{song}: passes full scale, all results {quieter:.1f} dB quieter; --format wav keeps the level")
        print_line(*separated.paths.values())
    if unstated:
        more = len(unstated) - 1
        subject = f" and {more} more: these files do not state their" if more else ": does not state its"
        log(f"{unstated[0]}{subject} length; if an end was cut off, nothing shows it")
    return 1 if failed else 0


def _fold(path: Path) -> str:
    """Normalise case and Unicode form, which some file systems ignore."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", str(path)).casefold())


def expand_wildcards(given: list[Path]) -> list[Path]:
    """Expand `*`, `?` and `[...]` in names that do not exist; a pattern without a match is kept."""
    songs = []
    for path in given:
        found = [] if path.exists() else sorted(glob.glob(str(path)))  # noqa: PTH207  (of any folder)
        songs += [Path(name) for name in found] or [path]
    return songs


def find_songs(given: list[Path], output: Path) -> tuple[dict[Path, Path], int]:
    """Return the songs to separate, each with the base name of its results, and the number of folders that failed.

    Folders are searched. A song that is named or found more than once is separated once. Results are inside the output
    folder, and are not hidden.
    """
    jobs: dict[Path, tuple[Path, Path]] = {}  # key: absolute path
    failed = 0
    # Path's own methods raise an error for an unreadable folder, and for a link to itself.
    folders = {os.path.realpath(path) for path in given if os.path.isdir(path)}  # noqa: PTH112
    for path in given:
        songs, base = [path], output
        if os.path.realpath(path) in folders:
            if os.path.realpath(path) == os.path.realpath(output):
                log(f"{path}: its songs and their results would lie side by side; give another folder with -o")
                failed += 1
                continue
            songs, errors, left_out = find_audio_files(path, without=[output])
            failed += len(errors)
            log(*errors)
            if left_out:
                names = [str(other.relative_to(path)) for other in left_out[:3]] + ["..."] * (len(left_out) > 3)
                log(f"{path}: left out, no audio files: {len(left_out)} ({', '.join(names)})")
            if len(folders) > 1:
                base = output / _visible(Path(os.path.realpath(path)).name)
        for song in songs:
            parent = song.relative_to(path).parent if song != path else Path()
            jobs.setdefault(Path(os.path.realpath(song.parent), song.name), (song, base / parent / _visible(song.stem)))
    return dict(jobs.values()), failed


def _visible(name: str) -> str:
    """Replace leading dots in the name of a song or folder, because they would hide its results or leave the folder."""
    shown = name.lstrip(".")
    return "_" * (len(name) - len(shown)) + shown
