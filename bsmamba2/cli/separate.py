"""`bsmamba2 separate SONG... -o DIR`: take the vocals out of songs."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from ..audio import FORMATS, AudioError, find_audio_files, separate_file
from ..kernels import BackendError
from ..separate import DTYPES
from .console import describe_error, escape, log, make_output, progress_bar, reraise_oom
from .model_arguments import add_model_arguments, load_model

DESCRIPTION = """\
Write NAME.vocals and NAME.instrumental (the mixture less the vocals) for every song, at its own rate, length and
number of channels. Memory use does not grow with the length of a song; rates from 1,000 to 768,000 Hz are accepted.

Channels: a mono song is copied to the model's two channels, and the mean of the result written. Of more than two
channels each two after each other (1 and 2, 3 and 4, ...) are separated as one stereo song, an odd last one as
a mono song; nothing is mixed down."""

EPILOG = """\
Levels: the stems of loud music may exceed full scale. The format wav holds them (32-bit float). With any other
format all results of such a song are made quieter by the same factor, and a message gives it: integers never clip, and
ogg and mp3 only by what their encoders add.

Folders are searched for audio files, with the folders below them; the results are laid out in the same way. A song that
cannot be separated gets one line with the reason and the fix; the others are still done, and the exit code is 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bsmamba2 separate`."""
    parser.add_argument("songs", nargs="+", type=Path, metavar="SONG", help="audio or video file, or a folder of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--segment", type=float, default=8.0, metavar="SECONDS", help="length of a segment (8)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--overlap", type=float, default=0.5, metavar="SHARE",
        help="share that segments overlap, 0 to below 1 (0.5); 0 puts them end to end, as in the paper",
    )  # fmt: skip
    mode.add_argument(
        "--look-ahead", type=float, metavar="SECONDS",
        help="instead of overlapping, carry the state on from segment to segment, each of which sees this much ahead",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="wav",
        help="wav: 32-bit float (default); wav24, wav16, flac (24 bits): integers; ogg, mp3: lossy",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Separate every song that was named or found."""
    try:
        model = load_model(args)
        make_output(args.output)
    except (ValueError, OSError, BackendError) as error:
        log(error)
        return 2
    jobs, failed = find_songs(args.songs, args.output)
    taken: dict[Path, Path] = {}
    for song, base in jobs:
        try:
            if base in taken:
                raise AudioError(f"{song}: its results would replace those of {taken[base]}; rename one of them")
            with reraise_oom(), progress_bar(f"{song.name} on {args.device}") as progress:
                separated = separate_file(
                    model, song, base, segment=args.segment, overlap=args.overlap, look_ahead=args.look_ahead,
                    batch=args.batch, dtype=DTYPES[args.dtype], format=args.format, overwrite=args.overwrite,
                    progress=progress,
                )  # fmt: skip
        except (ValueError, OSError, MemoryError) as error:
            log(describe_error(error, song))
            failed += 1
            continue
        taken[base] = song
        if separated.gain < 1:
            quieter = -20 * math.log10(separated.gain)
            log(f"{song}: passes full scale, all results {quieter:.1f} dB quieter; --format wav keeps the level")
        for path in separated.paths.values():
            print(escape(path))
    return 1 if failed else 0


def find_songs(given: list[Path], output: Path) -> tuple[list[tuple[Path, Path]], int]:
    """Songs to separate, folders searched, each with the base name of its results; and how many could not be listed."""
    jobs, failed = [], 0
    for path in given:
        if not os.path.isdir(path):  # noqa: PTH112  (Path's raises in a closed folder)
            jobs.append((path, output / path.stem))
        elif path.resolve() == output.resolve():
            log(f"{path}: its songs and their results would lie side by side; give another folder with -o")
            failed += 1
        else:
            songs, errors = find_audio_files(path, without=[output])
            jobs += [(song, output / song.relative_to(path).with_suffix("")) for song in songs]
            failed += len(errors)
            log(*errors)
    return jobs, failed
