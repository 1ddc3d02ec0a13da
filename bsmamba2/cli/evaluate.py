"""`bsmamba2 evaluate [FOLDER] -o DIR`: score a checkpoint on tracks with known stems."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from .. import checkpoints
from ..atomic_write import write_atomically
from ..checkpoints import sha256_file
from ..evaluation import PROTOCOLS, EvalRow, EvalSet, Evaluation, Failure, load_tracks, tracks_of
from ..evaluation import evaluate as evaluation
from ..evaluation.protocols import SEGMENTS
from ..kernels import BackendError
from ..separate import DTYPES
from ..synth import excerpt, synthesise_songs
from .console import describe_error, escape, log, make_output, print_line, reraise_oom
from .model_arguments import add_model_arguments, load_model

DESCRIPTION = """\
Separate every track, compare each stem with the track's own, and write evaluation.json, rows.csv, by_segment.png and
by_occupancy.png. The same command resumes a stopped run; finished tracks are repeated only when the checkpoint, the
protocol or the track has changed."""

EPILOG = "protocols:\n" + "\n".join(
    f"  {protocol.name}: {protocol.segment:g} s segments, overlap {protocol.overlap:g}, "
    f"{' + '.join(protocol.sources)}, {protocol.over_tracks} over tracks"
    for protocol in PROTOCOLS.values()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bsmamba2 evaluate`."""
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER",
        help="tracks laid out as in MUSDB18-HQ: test/<track>/{mixture,vocals,drums,bass,other}.wav; "
        "default: synthesised songs and the real excerpt",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper", help="evaluation protocol (paper)")
    parser.add_argument(
        "--segments", type=parse_segments, default=SEGMENTS, metavar="S,S,...",
        help="segment lengths in seconds, in addition to the protocol's (1,2,4,8,16); none: ''",
    )  # fmt: skip
    parser.add_argument("--songs", type=int, default=12, metavar="N", help="number of synthesised songs (12)")
    parser.add_argument("--seconds", type=float, default=16.0, metavar="S", help="length of such a song (16)")
    parser.add_argument("--seed", type=int, default=2_000_000, help="seed of the synthesised songs (2000000)")
    add_model_arguments(parser)


def parse_segments(text: str) -> tuple[float, ...]:
    """Parse segment lengths: `1,2.5` → (1.0, 2.5)."""
    values = tuple(float(part) for part in text.split(",") if part.strip())
    if not all(0 < value <= 3600 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds above 0, separated by commas")
    return values


def run(args: argparse.Namespace) -> int:
    """Evaluate every track at every segment length, then write and print the tables."""
    protocol, output = PROTOCOLS[args.protocol], args.output
    path = args.checkpoint or checkpoints.bundled_checkpoint()
    try:
        model, sha256 = load_model(args), sha256_file(path)
        tracks = load_tracks(args.folder, model.config.stems) if args.folder else default_tracks(args)
        make_output(output)
    except (ValueError, OSError, BackendError) as error:
        log(error)
        return 2
    rows: list[EvalRow] = []
    failures: list[Failure] = []
    total = len({protocol.segment, *args.segments}) * len(tracks.tracks) * len(model.config.stems)
    try:
        # The same file gives different models with different --config or --weights.
        identity = f"{sha256} {args.weights} {model.config.to_json()}" if args.checkpoint else sha256
        results = evaluation.run(
            model, identity, tracks, protocol, output,
            segments=args.segments, batch=args.batch, dtype=DTYPES[args.dtype], log=log,
        )  # fmt: skip
        label = f"tracks on {args.device}"
        with reraise_oom(), tqdm(desc=label, total=total, unit="row", disable=None, leave=False) as bar:
            for result in results:
                bar.update()
                if isinstance(result, EvalRow):
                    rows.append(result)
                    continue
                if result.track not in {failure.track for failure in failures}:
                    log(result.message if result.track in result.message else f"{result.track}: {result.message}")
                failures.append(result)
        report = Evaluation(
            checkpoint=path.name, checkpoint_sha256=sha256, tracks=tracks, protocol=protocol, dtype=args.dtype,
            rows=tuple(rows), failures=tuple(failures),
        )  # fmt: skip
        paths = report.save(output) + save_plots(report, output)
    except (OSError, MemoryError) as error:
        log(describe_error(error, output))
        return 1
    for title, lines in (
        ("segment length", report.segment_table()),
        ("occupancy", report.occupancy_table()),
        ("published figures (dB)", report.comparison_table()),
    ):
        cells = [[f"{key} {format_value(value)}".strip() for key, value in line.items()] for line in lines]
        print_line(title, *("  " + "  ".join(line) for line in cells))
    print_line(*paths)
    return 1 if failures else 0


def default_tracks(args: argparse.Namespace) -> EvalSet:
    """Default evaluation set: synthesised songs that the book's training runs do not use, and the real excerpt."""
    if args.songs < 1:
        raise ValueError(f"--songs {args.songs}: must be at least 1")
    songs = synthesise_songs(args.songs, seed=args.seed, seconds=args.seconds)
    try:
        songs.append(excerpt())
    except ImportError as error:
        log(error)
    return tracks_of(songs, f"{len(songs)} bundled songs")


def save_plots(report: Evaluation, output: Path) -> list[Path]:
    """Save two plots per stem, if matplotlib is installed; returns their paths."""
    try:
        from ..teaching import plotting
    except ImportError as error:
        log(f"no plots: {error}; pip install 'bsmamba2[book]'")
        return []
    metrics = {"usdr": "uSDR (dB)", "csdr": "cSDR (dB)", "silence_leakage": "leakage into silence (dB)"}
    paths = []
    for stem in report.stems:
        suffix = "" if report.stems == ["vocals"] else f"-{quote(stem, safe=' ')}"
        rows = [row for row in report.rows if row.stem == stem]
        own = report.at(report.protocol.segment, stem)
        for name, figure in (
            ("segment", plotting.scores(rows, "segment", "segment length (s)", metrics, ticks=report.segments)),
            ("occupancy", plotting.scores(own, "occupancy", f"share of the track with {stem}", metrics)),
        ):
            paths.append(output / f"by_{name}{suffix}.png")
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
            write_atomically(paths[-1], picture.getvalue())
    return paths


def format_value(value: object) -> str:
    """Format a cell: numbers with two decimals, a dash for NaN and None, text unchanged."""
    if value is None or value != value:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else escape(value)
