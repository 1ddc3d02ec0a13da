"""A model's scores: on one song beside what costs nothing, and on many tracks under a named protocol.

song → separate → uSDR; and the same for the mixture, for silence and for the best mask             (`score`)
checkpoint, tracks, protocol → a row for each track → means, medians, tables, files    (`run`, `Evaluation`)

Book: "Measuring". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from .. import metrics
from ..audio import files
from ..masks import oracle_mask
from ..metrics import csdr, usdr
from ..model import BSMamba2
from ..separate import separate
from ..spectrogram import istft, stft
from ..synth.songs import STEMS, Song
from .protocols import MUSDB, Protocol, compare

# --- one song ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One song's uSDR in dB, for the model and its baselines, the model's cSDR, and what it leaks into silence.

    The leak is the level of what comes through where nobody sings, in dB beside the mixture's there (`metrics.leak`);
    none where somebody always sings.
    """

    song: str
    occupancy: float
    mixture: float
    silence: float
    model: float
    oracle: float
    model_csdr: float
    leak: float | None


def oracle(song: Song, n_fft: int = 2048, hop_length: int = 441) -> Tensor:
    """The vocals that the best real mask in [0, 1] gives (`masks.oracle_mask`): (c, samples)."""
    mixture = stft(song.mixture, n_fft, hop_length)
    mask = oracle_mask(stft(song.vocals, n_fft, hop_length), mixture)
    return istft(mask * mixture, song.mixture.shape[-1], n_fft, hop_length)


def score(model: BSMamba2, song: Song, *, segment: float = 8.0, overlap: float = 0.5) -> Score:
    """Separate a song's mixture and compare the first stem with its vocals.

    The oracle has the model's own STFT. See `separate.separate` for segment and overlap.

    Raises:
        ValueError: when the song is not at the model's sample rate.
    """
    if song.sample_rate != model.config.sample_rate:
        raise ValueError(f"{song.name} is at {song.sample_rate} Hz, the model at {model.config.sample_rate} Hz")
    estimate = separate(model, song.mixture, segment=segment, overlap=overlap)[0]
    leak = metrics.leak(song.vocals, estimate, song.mixture, song.sample_rate).relative
    return Score(
        song=song.name,
        occupancy=song.occupancy,
        mixture=usdr(song.vocals, song.mixture),
        silence=usdr(song.vocals, torch.zeros_like(song.vocals)),
        model=usdr(song.vocals, estimate),
        oracle=usdr(song.vocals, oracle(song, model.config.n_fft, model.config.hop_length)),
        model_csdr=csdr(song.vocals, estimate, song.sample_rate),
        leak=None if math.isnan(leak) else leak,
    )


def mean(scores: Sequence[Score], field: str) -> float:
    """The mean of one field over songs, in its own unit."""
    return sum(getattr(one, field) for one in scores) / len(scores)


# --- tracks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """Something to evaluate on.

    Attributes:
        name: of the track, one of its kind in a set.
        identity: a text that changes when the sound does.
        load: reads it: mixture (c, samples), vocals (c, samples), sample rate in hertz.
    """

    name: str
    identity: str
    load: Callable[[], tuple[Tensor, Tensor, int]]


@dataclass(frozen=True)
class Tracks:
    """A named set of tracks."""

    name: str
    tracks: tuple[Track, ...]


def load_tracks(folder: str | os.PathLike[str]) -> Tracks:
    """The tracks of a folder in MUSDB18-HQ's layout: `test/<track>/{mixture,vocals,drums,bass,other}.wav`.

    The folder may also be `test` itself, any other folder of such tracks, or one track. What is read are
    `mixture.wav` and `vocals.wav`; where there is no mixture it is the sum of the four stems. The set is called
    MUSDB18-HQ's test set when there are 50 whole tracks in a folder `test`: which songs they are is taken on trust.

    Raises:
        ValueError: when there is no track, or no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is no folder; give one of tracks in MUSDB18-HQ's layout")
    place = folder / "test" if (folder / "test").is_dir() else folder
    files = ("mixture.wav", *(f"{stem}.wav" for stem in STEMS))
    found = [path for path in (place, *sorted(place.iterdir())) if any((path / file).is_file() for file in files)]
    if not found:
        raise ValueError(f"{folder}: holds no track; expected <track>/mixture.wav and <track>/vocals.wav in it")
    whole = all((path / file).is_file() for path in found for file in files)
    musdb = place.name == "test" and len(found) == 50 and whole
    return Tracks(MUSDB if musdb else f"{len(found)} tracks in {place.name}", tuple(map(_folder_track, found)))


def _folder_track(path: Path) -> Track:
    stems = [path / f"{stem}.wav" for stem in STEMS]
    mixture = path / "mixture.wav"
    used = [mixture, stems[0]] if mixture.is_file() else stems

    def load() -> tuple[Tensor, Tensor, int]:
        signals, rates = zip(*(files.read(file) for file in used), strict=True)
        if len({(*signal.shape, rate) for signal, rate in zip(signals, rates, strict=True)}) > 1:
            raise ValueError(f"{path}: the files differ in rate, channels or length; export them again")
        vocals = signals[1] if mixture.is_file() else signals[0]
        return (signals[0] if mixture.is_file() else torch.stack(signals).sum(0)), vocals, rates[0]

    stats = [file.stat() if file.exists() else None for file in used]
    identity = " ".join(f"{file.name} {s.st_size} {s.st_mtime_ns}" for file, s in zip(used, stats, strict=True) if s)
    return Track(path.name, identity, load)


def tracks_of(songs: Sequence[Song], name: str = "") -> Tracks:
    """The same for songs in memory, synthesised ones for instance.

    Raises:
        ValueError: when there are none, or two have one name.
    """
    if not songs or len({song.name for song in songs}) != len(songs):
        raise ValueError(
            f"{len(songs)} songs with {len({song.name for song in songs})} names: give at least one, apart"
        )

    def track(song: Song) -> Track:
        sound = hashlib.sha256(song.stems.numpy().tobytes()).hexdigest()
        return Track(song.name, f"{song.source}, {sound}", lambda: (song.mixture, song.vocals, song.sample_rate))

    return Tracks(name or f"{len(songs)} songs", tuple(map(track, songs)))


# --- rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """One track under one protocol; NaN where a metric has nothing to say (see `metrics`).

    Attributes:
        track: its name.
        segment: in seconds.
        seconds: length of the track.
        occupancy: share of the track that lies in no silent region of the vocals, 0 to 1.
        csdr, usdr, si_sdr: in dB; of a track without any vocals NaN, uSDR too: there it would be an energy over almost
            nothing, and `leak_relative` says what there is to say.
        bleedless, fullness: 0 to 100.
        leak_relative, leak_absolute: in dB and dBFS.
        onset_delay, onset_error: medians over the track's onsets, in milliseconds and dB.
        onsets: how many there are.
        onsets_missed: how many of them the estimate does not have.
        mixture_usdr: of the mixture handed back as it is, in dB.
        compute_seconds: what the separation took.
    """

    track: str
    segment: float
    seconds: float
    occupancy: float
    csdr: float
    usdr: float
    si_sdr: float
    bleedless: float
    fullness: float
    leak_relative: float
    leak_absolute: float
    onset_delay: float
    onset_error: float
    onsets: int
    onsets_missed: int
    mixture_usdr: float
    compute_seconds: float


MEASURES = (
    "csdr", "usdr", "si_sdr", "bleedless", "fullness", "leak_relative", "leak_absolute", "onset_delay", "onset_error",
    "mixture_usdr",
)  # fmt: skip
"""The fields of a row that are put together over tracks."""


@dataclass(frozen=True)
class Failure:
    """A track that could not be evaluated, and why."""

    track: str
    segment: float
    message: str


def evaluate_track(
    model: BSMamba2, track: Track, protocol: Protocol, *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Row:
    """Separate one track and measure everything.

    Raises:
        ValueError: when it cannot be read, or does not fit the model: another rate (nothing is resampled here),
            other channels, no stem `vocals`.
    """
    config = model.config
    if "vocals" not in config.stems:
        raise ValueError(f"the model gives the stems {', '.join(config.stems)}, and no vocals")
    mixture, vocals, rate = track.load()
    if rate != config.sample_rate:
        raise ValueError(
            f"{track.name}: is at {rate} Hz, the model at {config.sample_rate} Hz; convert the track first"
        )
    if mixture.shape[0] == 1:
        mixture, vocals = mixture.expand(config.channels, -1), vocals.expand(config.channels, -1)
    started = time.perf_counter()
    stems = separate(model, mixture, segment=protocol.segment, overlap=protocol.overlap, batch=batch, dtype=dtype)
    compute_seconds = time.perf_counter() - started
    estimate = stems[config.stems.index("vocals")]
    beside = [(mixture - vocals, mixture - estimate)] if "rest" in protocol.sources else []
    bleed = metrics.bleed(vocals, estimate, rate)
    leak = metrics.leak(vocals, estimate, mixture, rate)
    onsets = metrics.onsets(vocals, estimate, rate)
    seconds = mixture.shape[-1] / rate
    vocal_segments = leak.seconds < seconds
    return Row(
        track=track.name,
        segment=protocol.segment,
        seconds=seconds,
        occupancy=1 - leak.seconds / seconds,
        csdr=csdr(vocals, estimate, rate, beside=beside),
        usdr=usdr(vocals, estimate) if vocal_segments else math.nan,
        si_sdr=metrics.si_sdr(vocals, estimate),
        bleedless=bleed.bleedless,
        fullness=bleed.fullness,
        leak_relative=leak.relative,
        leak_absolute=leak.absolute,
        onset_delay=statistics.median([one.delay for one in onsets] or [math.nan]),
        onset_error=statistics.median([one.error for one in onsets] or [math.nan]),
        onsets=len(onsets),
        onsets_missed=sum(one.delay == math.inf for one in onsets),
        mixture_usdr=usdr(vocals, mixture) if vocal_segments else math.nan,
        compute_seconds=compute_seconds,
    )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(
    model: BSMamba2,
    checkpoint: str,
    tracks: Tracks,
    protocol: Protocol,
    output: str | os.PathLike[str],
    *,
    segments: Sequence[float] = (),
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Row | Failure]:
    """Evaluate track by track; what was done before is read, not done again.

    Each row is a file of its own, `rows/<key>/<track>.json` under `output`, that appears whole or not at all. The key
    is a hash of the checkpoint's, the card and the type: after a change of any of these nothing old is found. A
    row counts as done while the track's `identity` is the one that it was made from.

    Args:
        model: to evaluate.
        checkpoint: its `sha256_file`.
        tracks: what on.
        protocol: how.
        output: folder, made if absent.
        segments: further segment lengths in seconds, all else as in the protocol, whose own comes first.
        batch: segments computed at once.
        dtype: of the model's arithmetic.

    Yields:
        A row, or the failure, for each segment length and track.

    Raises:
        OSError: when a row cannot be written.
    """
    for segment in dict.fromkeys([protocol.segment, *segments]):
        card = replace(protocol, segment=segment)
        folder = Path(output) / "rows" / row_key(checkpoint, card, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        for track in tracks.tracks:
            digest = hashlib.sha256(track.name.encode(errors="surrogateescape")).hexdigest()[:12]
            path = folder / f"{quote(track.name.encode(errors='surrogateescape'), safe=' ')[:80]}-{digest}.json"
            row = _stored(path, track)
            if row is None:
                try:
                    row = evaluate_track(model, track, card, batch=batch, dtype=dtype)
                except ValueError as error:
                    yield Failure(track.name, segment, str(error))
                    continue
                content = {"identity": track.identity, "protocol": asdict(card), "checkpoint": checkpoint}
                write_whole(path, to_json({**content, "row": asdict(row)}))
            yield row


ROWS = 2
"""Raised when what a row holds is measured otherwise: rows of another number are not read."""


def row_key(checkpoint: str, protocol: Protocol, dtype: torch.dtype = torch.float32) -> str:
    """What a row depends on besides its track, as 16 hexadecimal digits; mean or median is no part of it."""
    card = asdict(protocol)
    del card["name"], card["over_tracks"]
    fields = [field.name for field in dataclasses.fields(Row)]
    text = json.dumps([ROWS, checkpoint, card, str(dtype), fields], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stored(path: Path, track: Track) -> Row | None:
    """The row in a file, when it is one, of this track as it is now."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != track.identity:
            return None
        values = content["row"]
        kinds = {field.name: field.type for field in dataclasses.fields(Row)}
        fields: dict[str, Any] = {n: _number(value) if kinds[n] == "float" else value for n, value in values.items()}
        return Row(**fields)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None


# --- together ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Average:
    """One measure over tracks, those without a value (NaN) left out; NaN when none is left."""

    mean: float
    median: float
    tracks: int


def average(rows: Sequence[Row], measure: str) -> Average:
    """The mean and the median of one of the `MEASURES` over rows."""
    values = [value for row in rows if not math.isnan(value := getattr(row, measure))]
    if not values:
        return Average(math.nan, math.nan, 0)
    return Average(
        math.fsum(values) / len(values) if _summable(values) else math.nan, statistics.median(values), len(values)
    )


def _summable(values: Sequence[float]) -> bool:
    """Whether the sum is a number: not when both infinities are in it."""
    return not (math.inf in values and -math.inf in values)


OCCUPANCIES = ((-1.0, 0.0), (0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
"""Groups of tracks by occupancy: above the lower bound, to the upper one."""


def by_occupancy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each group of `OCCUPANCIES`, `25% – 50%` for instance; groups may be empty."""
    return {
        "no vocals" if high == 0 else f"{low:.0%} – {high:.0%}": [row for row in rows if low < row.occupancy <= high]
        for low, high in OCCUPANCIES
    }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that an evaluation found.

    Attributes:
        checkpoint: the file's name.
        checkpoint_sha256: its `sha256_file`.
        tracks: what was evaluated on.
        protocol: how.
        dtype: of the model's arithmetic.
        rows: of all segment lengths.
        failures: tracks without a row.
    """

    checkpoint: str
    checkpoint_sha256: str
    tracks: Tracks
    protocol: Protocol
    dtype: str
    rows: tuple[Row, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def own(self) -> list[Row]:
        """The rows at the protocol's own segment length."""
        return [row for row in self.rows if row.segment == self.protocol.segment]

    @property
    def segments(self) -> list[float]:
        """The segment lengths, in seconds, ascending."""
        return sorted({row.segment for row in self.rows})

    def at(self, segment: float) -> list[Row]:
        """The rows at one segment length."""
        return [row for row in self.rows if row.segment == segment]

    def table(self, groups: dict[str, list[Row]]) -> list[dict[str, Any]]:
        """A line for each group of rows that has any: the headline over tracks, as the protocol has it."""
        return [
            {"": name, "tracks": len(rows)}
            | {measure: getattr(average(rows, measure), self.protocol.over_tracks) for measure in MEASURES}
            for name, rows in groups.items()
            if rows
        ]

    def segment_table(self) -> list[dict[str, Any]]:
        """A line for each segment length."""
        return self.table({f"{segment:g} s": self.at(segment) for segment in self.segments})

    def occupancy_table(self) -> list[dict[str, Any]]:
        """A line for each group of occupancy, at the protocol's segment length."""
        return self.table(by_occupancy(self.own))

    def comparison_table(self) -> list[dict[str, Any]]:
        """Ours, then each published model: its figures under ours when the protocol is the same, else in words only."""
        missing = len(self.tracks.tracks) - len(self.own)
        name = f"{self.tracks.name} but {missing} that failed" if missing else self.tracks.name
        lines: list[dict[str, Any]] = [
            {
                "model": f"{self.checkpoint}, {kind} over {len(self.own)} tracks",
                "csdr": getattr(average(self.own, "csdr"), kind),
                "usdr": getattr(average(self.own, "usdr"), kind),
                "protocol": f"{self.protocol.name}: {name}",
            }
            for kind in ("mean", "median")
        ]
        for one in compare(name, self.protocol):
            figures = {"csdr": one.published.csdr, "usdr": one.published.usdr}
            words = "the same"
            if one.differs:
                reported = " and ".join(
                    f"{value:.2f} dB {name[0]}{name[1:].upper()}"
                    for name, value in figures.items()
                    if value is not None
                )
                words = f"not comparable: {'; '.join(one.differs)}; {reported} reported"
                figures = dict.fromkeys(figures)
            note = f" ({one.note})" if one.note else ""
            lines.append({"model": one.published.model, **figures, "protocol": words + note})
        return lines

    def to_json(self) -> str:
        """All of it, as strict JSON: null for NaN, "inf" and "-inf" for the infinities."""
        return to_json(
            {
                "checkpoint": {"file": self.checkpoint, "sha256": self.checkpoint_sha256},
                "tracks": {"name": self.tracks.name, "names": [track.name for track in self.tracks.tracks]},
                "protocol": asdict(self.protocol),
                "dtype": self.dtype,
                "averages": {
                    f"{segment:g} s": {measure: asdict(average(self.at(segment), measure)) for measure in MEASURES}
                    for segment in self.segments
                },
                "by_occupancy": self.occupancy_table(),
                "comparison": self.comparison_table(),
                "failures": [asdict(failure) for failure in self.failures],
                "rows": [asdict(row) for row in self.rows],
            }
        )

    def to_csv(self) -> str:
        """The rows: one line each, an empty cell for NaN."""
        file = io.StringIO()
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({key: "" if value != value else value for key, value in asdict(row).items()})
        return file.getvalue()

    def save(self, output: str | os.PathLike[str]) -> list[Path]:
        """Write `evaluation.json` and `rows.csv` into a folder that exists."""
        paths = [Path(output) / "evaluation.json", Path(output) / "rows.csv"]
        write_whole(paths[0], self.to_json())
        write_whole(paths[1], self.to_csv())
        return paths


# --- files ------------------------------------------------------------------------------------------------


def to_json(value: Any) -> str:
    """JSON that every reader takes: null for NaN, "inf" and "-inf" for the infinities."""

    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [plain(inner) for inner in part]
        if isinstance(part, float) and not math.isfinite(part):
            return None if math.isnan(part) else str(part)
        return part

    return json.dumps(plain(value), indent=1, allow_nan=False) + "\n"


def _number(value: Any) -> float:
    """The way back, for a field that holds a float."""
    return math.nan if value is None else float(value)


def write_whole(path: Path, text: str) -> None:
    """Write beside, then rename: the file at `path` is the old one or the new one."""
    beside = path.with_name(f".bsmamba2-{secrets.token_hex(8)}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
