"""`python -m bsmamba2 COMMAND`: what the module does, from a command line.

Each command is two functions: `add_<command>` says its arguments, and what it sets as `run` does it and returns the
exit code: 0 when all went well, 1 when something given could not be done (the rest was), 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from tqdm import tqdm

from .. import checkpoints
from ..audio import files
from ..config import PRESETS, ModelConfig
from ..evaluation import evaluate
from ..evaluation.protocols import PROTOCOLS, SEGMENTS
from ..experiments.cost import training_cost
from ..kernels import loops, triton
from ..kernels.self_test import out_of_memory
from ..model import BSMamba2
from ..separate import DTYPES, Progress, separate_file
from ..synth import songs
from ..training.distributed import together
from ..training.job import JobConfig, read_parameters

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m bsmamba2", description="BSMamba2, a separator of voices.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_separate(commands)
    add_evaluate(commands)
    add_train(commands)
    add_cost(commands)
    add_backends(commands)
    chosen = parser.parse_args(arguments)
    try:
        return chosen.run(chosen)
    except KeyboardInterrupt:
        say("stopped")
        return 130


# --- separate ---------------------------------------------------------------------------------------------


def add_separate(commands: Any) -> None:
    """`separate SONG... -o DIR`."""
    parser = commands.add_parser(
        "separate",
        help="take the vocals out of songs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Write NAME.vocals and NAME.rest (the mixture less the vocals) for every song, at the song's own rate, length and
number of channels. Songs of any length take the same memory; any rate from 1,000 to 768,000 Hz will do.

Channels: a mono song is copied to the model's two channels, and the mean of the result written. Of more than two
channels each two after each other (1 and 2, 3 and 4, ...) are separated as one stereo song, an odd last one as
a mono song; nothing is mixed down.""",
        epilog="""\
Levels: what the model makes of loud music may pass full scale. The format wav holds it (32-bit float). With any other
format both results of such a song are made quieter by the same factor, which is said: integers never clip, and ogg and
mp3 only by what their encoders add.

Folders are searched for audio files, and the folders below them too; the results are laid out likewise. A song that
cannot be separated is named in one line, with what to do; the others are still done, and the exit code is 1.""",
    )
    parser.add_argument("songs", nargs="+", type=Path, metavar="SONG", help="WAV, FLAC, OGG or MP3, or a folder")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--segment", type=float, default=8.0, metavar="SECONDS", help="length of a segment (8)")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--overlap", type=float, default=0.5, metavar="SHARE",
        help="share that segments overlap, 0 to below 1 (0.5); 0 puts them end to end, as in the paper",
    )  # fmt: skip
    way.add_argument(
        "--look-ahead", type=float, metavar="SECONDS",
        help="instead of overlapping, carry the state on from segment to segment, each of which sees this much ahead",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=files.FORMATS, default="wav",
        help="wav: 32-bit float (default); wav24, wav16, flac (24 bits): integers; ogg, mp3: lossy",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace results that are there already")
    add_model_arguments(parser)
    parser.set_defaults(run=run_separate)


def run_separate(chosen: argparse.Namespace) -> int:
    """Separate every song that was named or found."""
    try:
        model = load_model(chosen)
        make_output(chosen.output)
    except (ValueError, OSError) as error:
        say(error)
        return 2
    failed = 0
    jobs: list[tuple[Path, Path]] = []  # song, base of its results
    for given in chosen.songs:
        if os.path.isdir(given):  # noqa: PTH112  (Path's raises in a closed folder)
            if given.resolve() == chosen.output.resolve():
                say(f"{given}: its songs and their results would lie side by side; give another folder with -o")
                failed += 1
                continue
            found, errors = files.find_audio_files(given, without=[chosen.output])
            jobs += [(song, chosen.output / song.relative_to(given).with_suffix("")) for song in found]
            failed += len(errors)
            say(*errors)
        else:
            jobs.append((given, chosen.output / given.stem))
    taken: dict[Path, Path] = {}
    for song, base in jobs:
        try:
            if base in taken:
                raise files.AudioError(f"{song}: its results would replace those of {taken[base]}; rename one of them")
            with reraise_oom(), progress(f"{song.name} on {chosen.device}") as told, loops.compiled(chosen.compile):
                done = separate_file(
                    model, song, base, segment=chosen.segment, overlap=chosen.overlap, look_ahead=chosen.look_ahead,
                    batch=chosen.batch, dtype=DTYPES[chosen.dtype], format=chosen.format, overwrite=chosen.overwrite,
                    progress=told,
                )  # fmt: skip
        except (ValueError, OSError, MemoryError) as error:
            say(name(error, song))
            failed += 1
            continue
        taken[base] = song
        if done.gain < 1:
            quieter = -20 * torch.tensor(done.gain).log10().item()
            say(f"{song}: passes full scale, all results {quieter:.1f} dB quieter; --format wav keeps the level")
        for path in done.paths.values():
            print(printable(path))
    return 1 if failed else 0


# --- evaluate ---------------------------------------------------------------------------------------------


def add_evaluate(commands: Any) -> None:
    """`evaluate [FOLDER] -o DIR`."""
    parser = commands.add_parser(
        "evaluate",
        help="score a checkpoint on tracks whose vocals are known",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Separate every track, compare with its vocals, and write evaluation.json, rows.csv, by_segment.png and
by_occupancy.png. A run that was stopped goes on where it was: tracks that are done are not done again, unless the
checkpoint, the protocol or the track has changed.""",
        epilog="protocols:\n"
        + "\n".join(
            f"  {card.name}: {card.segment:g} s segments, overlap {card.overlap:g}, {' + '.join(card.sources)}, "
            f"{card.over_tracks} over tracks"
            for card in PROTOCOLS.values()
        ),
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER",
        help="tracks as in MUSDB18-HQ: test/<track>/{mixture,vocals,drums,bass,other}.wav; "
        "synthesised songs and the real excerpt when left out",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper", help="named card (paper)")
    parser.add_argument(
        "--segments", type=lengths, default=SEGMENTS, metavar="S,S,...",
        help="segment lengths in seconds, besides the protocol's own (1,2,4,8,16); none: ''",
    )  # fmt: skip
    parser.add_argument("--songs", type=int, default=12, metavar="N", help="synthesised songs (12)")
    parser.add_argument("--seconds", type=float, default=16.0, metavar="S", help="length of each (16)")
    parser.add_argument("--seed", type=int, default=2_000_000, help="of the synthesised songs (2000000)")
    add_model_arguments(parser)
    parser.set_defaults(run=run_evaluate)


def lengths(text: str) -> tuple[float, ...]:
    """`1,2.5` → (1.0, 2.5)."""
    values = tuple(float(part) for part in text.split(",") if part.strip())
    if not all(0 < value <= 3600 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds above 0, with commas between")
    return values


def run_evaluate(chosen: argparse.Namespace) -> int:
    """Evaluate every track at every segment length, then write and print the tables."""
    protocol = PROTOCOLS[chosen.protocol]
    path = chosen.checkpoint or checkpoints.bundled_checkpoint()
    try:
        model, sha256 = load_model(chosen), evaluate.sha256_file(path)
        tracks = evaluate.load_tracks(chosen.folder) if chosen.folder else bundled(chosen)
        make_output(chosen.output)
    except (ValueError, OSError) as error:
        say(error)
        return 2
    rows: list[evaluate.Row] = []
    failures: list[evaluate.Failure] = []
    total = len({protocol.segment, *chosen.segments}) * len(tracks.tracks)
    try:
        found = evaluate.run(
            model, sha256, tracks, protocol, chosen.output,
            segments=chosen.segments, batch=chosen.batch, dtype=DTYPES[chosen.dtype],
        )  # fmt: skip
        bar = tqdm(found, desc=f"tracks on {chosen.device}", total=total, unit="track", disable=None, leave=False)
        with reraise_oom(), loops.compiled(chosen.compile):
            for one in bar:
                if isinstance(one, evaluate.Failure):
                    failures.append(one)
                    if one.track not in {before.track for before in failures[:-1]}:
                        say(one.message if one.track in one.message else f"{one.track}: {one.message}")
                else:
                    rows.append(one)
        result = evaluate.Evaluation(
            checkpoint=path.name, checkpoint_sha256=sha256, tracks=tracks, protocol=protocol, dtype=chosen.dtype,
            rows=tuple(rows), failures=tuple(failures),
        )  # fmt: skip
        paths = result.save(chosen.output) + draw(result, chosen.output)
    except (OSError, MemoryError) as error:
        say(name(error, chosen.output))
        return 1
    for title, lines in (
        ("segment length", result.segment_table()),
        ("vocal occupancy", result.occupancy_table()),
        ("published figures (dB)", result.comparison_table()),
    ):
        print(title)
        for line in lines:
            print("  " + "  ".join(f"{key} {figure(value)}".strip() for key, value in line.items()))
    for path in paths:
        print(printable(path))
    return 1 if failures else 0


def bundled(chosen: argparse.Namespace) -> evaluate.Tracks:
    """Synthesised songs that no training run of the book has heard, and the real excerpt where it is installed."""
    if chosen.songs < 1:
        raise ValueError(f"--songs {chosen.songs}: must be at least 1")
    made = songs.songs(chosen.songs, seed=chosen.seed, seconds=chosen.seconds)
    try:
        made.append(songs.excerpt())
    except ImportError as error:
        say(error)
    return evaluate.tracks_of(made, f"{len(made)} bundled songs")


def draw(result: evaluate.Evaluation, output: Path) -> list[Path]:
    """The two plots, where matplotlib is installed."""
    try:
        from ..teaching import plotting
    except ImportError as error:
        say(f"no plots: {error}; pip install 'bsmamba2[book]'")
        return []
    measures = {"usdr": "uSDR (dB)", "csdr": "cSDR (dB)", "leak_relative": "leak into silence (dB)"}
    pictures = {
        "by_segment.png": plotting.scores(
            result.rows, "segment", "segment length (s)", measures, ticks=result.segments
        ),
        "by_occupancy.png": plotting.scores(result.own, "occupancy", "share of the track with vocals", measures),
    }
    for file, picture in pictures.items():
        picture.savefig(output / file)
    return [output / file for file in pictures]


def figure(value: object) -> str:
    """A number with two decimals, a dash for NaN and None, words as they are."""
    if value is None or value != value:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else printable(value)


# --- backends ---------------------------------------------------------------------------------------------


def add_backends(commands: Any) -> None:
    """`backends`."""
    parser = commands.add_parser(
        "backends", help="which forms of the scan run here, and what would make the others run"
    )
    parser.set_defaults(run=run_backends)


def run_backends(chosen: argparse.Namespace) -> int:
    """Print `kernels.backends` as a table, with a line below each backend that is not usable."""
    rows = triton.backends()
    header = ("backend", "usable", "version", "why")
    cells = [header, *((row.name, "yes" if row.usable else "no", row.version, row.why) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    mends = ["", *(row.mend for row in rows)]
    for line, mend in zip(cells, mends, strict=True):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]))
        if mend:
            print(f"  to use it: {mend}")
    return 0


# --- train ------------------------------------------------------------------------------------------------


def add_train(commands: Any) -> None:
    """`train --params FILE`, and a flag for every parameter."""
    parser = commands.add_parser(
        "train",
        help="train a model, or go on with a run that was stopped",
        argument_default=argparse.SUPPRESS,
        description="""\
Train a model on synthesised songs, or on a folder of stems (--data). The run lives in --output-dir: after Ctrl-C, a
crash or a power cut, the same command goes on where it was.""",
        epilog="Many GPUs: torchrun --standalone --nproc-per-node 2 -m bsmamba2 train ...",
    )
    parser.add_argument("--params", type=Path, metavar="FILE", help="YAML or JSON with any of the names below")
    types = get_type_hints(JobConfig)
    for one in dataclasses.fields(JobConfig):
        flag, kind = f"--{one.name.replace('_', '-')}", types[one.name]
        text = f"{one.metadata['help']} ({one.default})".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        elif kind in (str, int, float):
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)
        else:  # tuple[kind, ...]
            parser.add_argument(flag, type=get_args(kind)[0], nargs="+", help=text)
    parser.set_defaults(run=run_train)


def run_train(chosen: argparse.Namespace) -> int:
    """Train to the end; 0 when it is reached, 1 when the run stopped before, 2 for wrong parameters."""
    values = {name: value for name, value in vars(chosen).items() if name not in ("params", "command", "run")}
    try:
        given = read_parameters(chosen.params) if "params" in chosen else {}
        recipe = JobConfig.from_mapping({**given, **values})
        with reraise_oom(), together(recipe.device) as device:
            windows = recipe.windows(partial(tqdm, desc="looking for activity", unit="file"))
            run, batches = recipe.start(*windows, device), recipe.batches(windows[0])
            done = run.trainer.number
            bar = tqdm(
                run.steps(batches), "training", total=recipe.steps, initial=done, unit="step", disable=not run.writer
            )
            for step in bar:
                bar.set_postfix(loss=f"{step.loss:.3f}", best="" if run.best is None else f"{run.best[0]:.2f} dB")
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        notes = getattr(error, "__notes__", [])  # a run that had begun says where it stopped
        if isinstance(error, MemoryError):
            notes = [
                *notes,
                "take a smaller batch and accumulate more of them, or checkpointing; bsmamba2 cost counts it",
            ]
        print(str(error) or "too little memory", *notes, sep="\n", file=sys.stderr)
        return 1 if notes else 2
    except KeyboardInterrupt as error:
        print(error or "stopped at once", file=sys.stderr)
        return 130
    if run.writer:
        best = "" if run.best is None else f", best {run.best[0]:.2f} dB uSDR at step {run.best[1]}"
        print(f"{run.trainer.number} steps done{best}: {run.folder}")
    return 0


# --- cost -------------------------------------------------------------------------------------------------


def add_cost(commands: Any) -> None:
    """`cost --preset NAME`: will it fit, and how long will it take."""
    parser = commands.add_parser(
        "cost",
        help="what training takes: operations, memory, time",
        description="Count what a batch takes, without running one. For the time, give the peaks of your device.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="size of the model (paper)")
    parser.add_argument("--batch", type=int, default=5, metavar="N", help="examples in a batch of one device (5)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of an example (8)")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp32", help="of matrix products (fp32)")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers twice to keep less")
    parser.add_argument(
        "--loss-hop", type=int, default=147, metavar="N", help="samples between frames of the loss (147)"
    )
    parser.add_argument(
        "--peak-tflops", type=float, metavar="T", help="the device's peak, in 10^12 operations a second"
    )
    parser.add_argument("--bandwidth", type=float, metavar="GB", help="its memory's peak, in 10^9 bytes a second")
    parser.add_argument(
        "--batches", type=int, default=1, metavar="N", help="batches of the whole run, for its time (1)"
    )
    parser.set_defaults(run=run_cost)


def run_cost(chosen: argparse.Namespace) -> int:
    """Print the cost, a line for each number."""
    try:
        cost = training_cost(
            ModelConfig.preset(chosen.preset),
            batch=chosen.batch,
            seconds=chosen.seconds,
            dtype=PRECISIONS[chosen.dtype],
            gradient_checkpointing=chosen.gradient_checkpointing,
            loss_hop=chosen.loss_hop,
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    total = sum(cost.forward.values())
    parts = ", ".join(f"{part} {flops / total:.0%}" for part, flops in cost.forward.items())
    lines = {
        "parameters": f"{cost.parameters:,}",
        "forward, a second of audio": f"{cost.flops_per_second / 1e9:,.1f} GFLOP ({parts})",
        "a batch, forward and backward": f"{cost.step / 1e12:,.3f} TFLOP",
        "memory, weights and optimiser": f"{cost.state / 1e9:,.2f} GB",
        "memory, activations": f"{cost.activations / 1e9:,.2f} GB",
        "memory, together": f"{(cost.state + cost.activations) / 1e9:,.2f} GB",
    }
    if chosen.peak_tflops and chosen.bandwidth:
        seconds = cost.seconds(chosen.peak_tflops * 1e12, chosen.bandwidth * 1e9)
        lines["a batch, at the device's peaks"] = f"{seconds:,.3f} s"
        if chosen.batches > 1:
            lines[f"{chosen.batches:,} batches"] = f"{seconds * chosen.batches / 3600:,.1f} h"
    for name, text in lines.items():
        print(f"{name + ':':<34}{text}")
    return 0


# --- what commands share ----------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how it computes."""
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="ours, or in a published layout; the one that comes with the package when left out",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto (default) takes cuda when it is there"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="what the model computes in (float32); its spectrograms and masks stay in float32",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="segments computed at once (1)")
    parser.add_argument(
        "--compile", action="store_true",
        help="on a CPU: build the mixer's own kernel, ten seconds once, for long songs and large models",
    )  # fmt: skip


def load_model(chosen: argparse.Namespace) -> BSMamba2:
    """The model that was asked for, on its device; the device that `auto` means is put in its place.

    Devices other than the CPU: not run on a GPU.

    Raises:
        ValueError: for a checkpoint or device that cannot be used.
        OSError: for a checkpoint that is not there.
    """
    if chosen.device == "auto":
        chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(chosen.device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # torch has a kind of its own for each way in which a device can be missing
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device {chosen.device}: {reason}; use --device cpu") from error
    path = chosen.checkpoint or checkpoints.bundled_checkpoint()
    if chosen.checkpoint is None:
        say("the checkpoint of the package: small, learned from synthesised songs alone; --checkpoint names another")
    if not path.exists():
        raise FileNotFoundError(f"{path}: does not exist; name a checkpoint file")
    if path.is_file() and (known := checkpoints.describe_known_file(path)):
        say(f"{path}: {known}")
    if slow := triton.slow_dtype_warning(device, DTYPES[chosen.dtype]):
        say(f"--dtype {chosen.dtype}: {slow}")
    return checkpoints.load_checkpoint(path).to(device)


def make_output(folder: Path) -> None:
    """Make the folder for the results, unless it is there.

    Raises:
        ValueError: when that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"{folder}: cannot be made a folder ({reason}); give another one with -o") from error


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A bar on the terminal, none elsewhere: a function to call with the samples done and those of the whole."""
    with tqdm(desc=printable(label), unit="sample", unit_scale=True, disable=None, leave=False) as bar:

        def told(done: int, whole: int) -> None:
            bar.total = whole
            bar.update(done)

        yield told


def name(error: Exception, subject: Path) -> str:
    """An error's message with its subject in front, unless it names a file already."""
    if isinstance(error, files.AudioError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{subject}: too little memory; use a smaller --batch or --segment"
    return f"{subject}: {error}"


@contextmanager
def reraise_oom() -> Iterator[None]:
    """Too little memory, in whatever words torch has it, becomes Python's own, its notes kept."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            short = MemoryError(str(error))
            for note in getattr(error, "__notes__", []):
                short.add_note(note)
            raise short from error
        raise


def say(*messages: object) -> None:
    """Each message on a line of its own, on standard error."""
    for message in messages:
        print(printable(message), file=sys.stderr)


def printable(message: object) -> str:
    """A message in one line: a newline or another character that cannot be shown is written as its escape."""
    text = os.fspath(message) if isinstance(message, Path) else str(message)
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


if __name__ == "__main__":
    sys.exit(main())
