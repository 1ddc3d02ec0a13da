"""Evaluate a model: on one song against trivial baselines, and on many tracks under a named protocol.

song → separate → uSDR; and the same for the mixture, for silence and for the best mask  (`score`)
checkpoint, tracks, protocol → a row for each track                                      (`run`)
rows → means, medians, tables, files                                                     (`bsmamba2.evaluation.report`)

Book: "Measuring". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
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
from ..atomic_write import write_atomically
from ..audio import files
from ..audio.musdb import TrackFolder, list_tracks
from ..masks import oracle_mask
from ..metrics import csdr, usdr
from ..model import BSMamba2
from ..separate import separate
from ..spectrogram import istft, stft
from ..synth import STEMS, Song
from .protocols import MUSDB, EvalProtocol


@dataclass(frozen=True)
class SongScore:
    """Scores of one song: uSDR in dB of the model and of its baselines, the model's cSDR and silence leakage.

    The leakage is relative to the mixture, in dB (`metrics.silence_leakage`); None where somebody always sings.
    """

    song: str
    occupancy: float
    mixture: float
    silence: float
    model: float
    oracle: float
    model_csdr: float
    silence_leakage: float | None


def oracle_vocals(song: Song, n_fft: int = 2048, hop_length: int = 441) -> Tensor:
    """Oracle estimate: the vocals that the best real mask in [0, 1] gives (`masks.oracle_mask`), (c, samples)."""
    mixture = stft(song.mixture, n_fft, hop_length)
    mask = oracle_mask(stft(song.vocals, n_fft, hop_length), mixture)
    return istft(mask * mixture, song.mixture.shape[-1], n_fft, hop_length)


def score(model: BSMamba2, song: Song, *, segment: float = 8.0, overlap: float = 0.5) -> SongScore:
    """Score a model on one song: separate the mixture and compare the first stem with the vocals.

    The oracle has the model's own STFT. See `separate.separate` for segment and overlap.

    Raises:
        ValueError: when the song is not at the model's sample rate.
    """
    config = model.config
    if song.sample_rate != config.sample_rate:
        raise ValueError(f"{song.name} is at {song.sample_rate} Hz, the model at {config.sample_rate} Hz")
    estimate = separate(model, song.mixture, segment=segment, overlap=overlap)[0]
    leakage = metrics.silence_leakage(song.vocals, estimate, song.mixture, song.sample_rate).relative
    return SongScore(
        song=song.name, occupancy=song.occupancy,
        mixture=usdr(song.vocals, song.mixture), silence=usdr(song.vocals, torch.zeros_like(song.vocals)),
        model=usdr(song.vocals, estimate),
        oracle=usdr(song.vocals, oracle_vocals(song, config.n_fft, config.hop_length)),
        model_csdr=csdr(song.vocals, estimate, song.sample_rate),
        silence_leakage=None if math.isnan(leakage) else leakage,
    )  # fmt: skip


def mean(scores: Sequence[SongScore], field: str) -> float:
    """Mean of one field over songs, in its own unit."""
    return sum(getattr(one, field) for one in scores) / len(scores)


@dataclass(frozen=True)
class EvalTrack:
    """A track to evaluate on.

    Attributes:
        name: unique in its set.
        identity: a text that changes when the sound does.
        load: reads it: mixture (c, samples), vocals (c, samples), sample rate in hertz.
    """

    name: str
    identity: str
    load: Callable[[], tuple[Tensor, Tensor, int]]


@dataclass(frozen=True)
class EvalSet:
    """A named set of tracks to evaluate on."""

    name: str
    tracks: tuple[EvalTrack, ...]


def load_tracks(folder: str | os.PathLike[str]) -> EvalSet:
    """List the tracks of a folder in MUSDB18-HQ's layout: `test/<track>/{mixture,vocals,drums,bass,other}.wav`.

    The folder may also be `test` itself, any other folder of such tracks, or one track. Each is read when it is
    evaluated: mixture and vocals; without a mixture, the sum of the four stems. The set is called MUSDB18-HQ's test set
    when there are 50 complete tracks in a folder `test`; their names are not checked.

    Raises:
        ValueError: when there is no track, or no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; give one of tracks in MUSDB18-HQ's layout")
    place = folder / "test" if (folder / "test").is_dir() else folder
    names = {"mixture", *STEMS}
    found = [track for track in (TrackFolder.of(place), *list_tracks(place)) if names & track.files.keys()]
    if not found:
        raise ValueError(f"{folder}: holds no track; expected <track>/mixture.wav and <track>/vocals.wav in it")
    musdb = place.name == "test" and len(found) == 50 and all(names <= track.files.keys() for track in found)
    return EvalSet(MUSDB if musdb else f"{len(found)} tracks in {place.name}", tuple(map(_folder_track, found)))


def _folder_track(folder: TrackFolder) -> EvalTrack:
    stems = ("mixture", "vocals") if "mixture" in folder.files else STEMS
    paths = [path for stem in stems for path in folder.files.get(stem, ())]

    def load() -> tuple[Tensor, Tensor, int]:
        if [path.stem for path in paths] != [*stems]:
            raise ValueError(f"{folder.path}: must hold one file for each of {', '.join(stems)}")
        signals, rates = zip(*(files.read(path) for path in paths), strict=True)
        if len({(*signal.shape, rate) for signal, rate in zip(signals, rates, strict=True)}) > 1:
            raise ValueError(f"{folder.path}: the files differ in rate, channels or length; export them again")
        mixture = signals[0] if "mixture" in stems else torch.stack(signals).sum(0)
        return mixture, signals[stems.index("vocals")], rates[0]

    stats = [path.stat() for path in paths]
    identity = " ".join(f"{path.name} {s.st_size} {s.st_mtime_ns}" for path, s in zip(paths, stats, strict=True))
    return EvalTrack(folder.name, identity, load)


def tracks_of(songs: Sequence[Song], name: str = "") -> EvalSet:
    """Evaluation set of songs in memory, synthesised ones for instance.

    Raises:
        ValueError: when there are none, or two have the same name.
    """
    if not songs or len({song.name for song in songs}) != len(songs):
        raise ValueError(
            f"{len(songs)} songs with {len({song.name for song in songs})} names: give at least one, with unique names"
        )

    def track(song: Song) -> EvalTrack:
        digest = hashlib.sha256(song.stems.numpy().tobytes()).hexdigest()
        return EvalTrack(song.name, f"{song.source}, {digest}", lambda: (song.mixture, song.vocals, song.sample_rate))

    return EvalSet(name or f"{len(songs)} songs", tuple(map(track, songs)))


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """Metrics of one track under one protocol; NaN where a metric is not defined (see `metrics`).

    Attributes:
        track: its name.
        segment: in seconds.
        seconds: length of the track.
        occupancy: share of the track that lies in no silent region of the vocals, 0 to 1.
        csdr, usdr, si_sdr: in dB; NaN for a track without any vocals, uSDR too: there it would compare with almost
            no energy, and `silence_leakage` is the metric to read.
        bleedless, fullness: 0 to 100.
        silence_leakage: in dB, relative to the mixture.
        silence_leakage_dbfs: the same in dBFS.
        onset_delay, onset_error: medians over the track's onsets, in milliseconds and dB.
        onsets: how many there are.
        onsets_missed: how many of them the estimate does not have.
        mixture_usdr: of the mixture taken as the estimate, in dB.
        compute_seconds: time of the separation.
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
    silence_leakage: float
    silence_leakage_dbfs: float
    onset_delay: float
    onset_error: float
    onsets: int
    onsets_missed: int
    mixture_usdr: float
    compute_seconds: float


METRICS = (
    "csdr", "usdr", "si_sdr", "bleedless", "fullness", "silence_leakage", "silence_leakage_dbfs", "onset_delay",
    "onset_error", "mixture_usdr",
)  # fmt: skip
"""The fields of a row that are averaged over tracks."""


@dataclass(frozen=True)
class Failure:
    """A track that could not be evaluated, and why."""

    track: str
    segment: float
    message: str


def evaluate_track(
    model: BSMamba2, track: EvalTrack, protocol: EvalProtocol, *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> EvalRow:
    """Evaluate one track: separate it and compute all metrics.

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
    instrumental = [(mixture - vocals, mixture - estimate)] if "instrumental" in protocol.sources else []
    bleed = metrics.bleed(vocals, estimate, rate)
    leakage = metrics.silence_leakage(vocals, estimate, mixture, rate)
    onsets = metrics.onsets(vocals, estimate, rate)
    seconds = mixture.shape[-1] / rate
    has_vocals = leakage.seconds < seconds
    return EvalRow(
        track=track.name, segment=protocol.segment, seconds=seconds, occupancy=1 - leakage.seconds / seconds,
        csdr=csdr(vocals, estimate, rate, other_sources=instrumental),
        usdr=usdr(vocals, estimate) if has_vocals else math.nan,
        si_sdr=metrics.si_sdr(vocals, estimate),
        bleedless=bleed.bleedless, fullness=bleed.fullness,
        silence_leakage=leakage.relative, silence_leakage_dbfs=leakage.absolute,
        onset_delay=statistics.median([onset.delay for onset in onsets] or [math.nan]),
        onset_error=statistics.median([onset.error for onset in onsets] or [math.nan]),
        onsets=len(onsets), onsets_missed=sum(onset.delay == math.inf for onset in onsets),
        mixture_usdr=usdr(vocals, mixture) if has_vocals else math.nan,
        compute_seconds=compute_seconds,
    )  # fmt: skip


def run(
    model: BSMamba2, checkpoint: str, tracks: EvalSet, protocol: EvalProtocol, output: str | os.PathLike[str], *,
    segments: Sequence[float] = (), batch: int = 1, dtype: torch.dtype = torch.float32,
) -> Iterator[EvalRow | Failure]:  # fmt: skip
    """Evaluate track by track, resumable: rows that are stored already are read, not computed again.

    Each row is a file of its own, `rows/<key>/<track>.json` under `output`, written atomically. The key is a hash of
    the checkpoint's, the protocol and the type: after a change of any of these, every row is computed. A stored row is
    used while the track's `identity` is the one that it was computed from.

    Args:
        model, tracks, protocol: what is evaluated, and how.
        checkpoint: `sha256_file` of the model's file.
        output: folder, made if absent.
        segments: further segment lengths in seconds, all else as in the protocol, whose own comes first.
        batch, dtype: as in `separate.separate`.

    Yields:
        A row, or the failure, for each segment length and track.

    Raises:
        OSError: when a row cannot be written.
    """
    for segment in dict.fromkeys([protocol.segment, *segments]):
        varied = replace(protocol, segment=segment)
        folder = Path(output) / "rows" / row_key(checkpoint, varied, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        for track in tracks.tracks:
            name = track.name.encode(errors="surrogateescape")
            path = folder / f"{quote(name, safe=' ')[:80]}-{hashlib.sha256(name).hexdigest()[:12]}.json"
            row = _stored_row(path, track)
            if row is None:
                try:
                    row = evaluate_track(model, track, varied, batch=batch, dtype=dtype)
                except ValueError as error:
                    yield Failure(track.name, segment, str(error))
                    continue
                content = {"identity": track.identity, "protocol": asdict(varied), "checkpoint": checkpoint}
                write_atomically(path, to_json({**content, "row": asdict(row)}))
            yield row


ROW_VERSION = 3
"""Raised when a metric of a row is computed differently: rows of other versions are not read."""


def row_key(checkpoint: str, protocol: EvalProtocol, dtype: torch.dtype = torch.float32) -> str:
    """Cache key of a row: everything it depends on besides its track, as 16 hexadecimal digits."""
    fields = asdict(protocol)
    del fields["name"], fields["over_tracks"]  # mean or median does not change a row
    columns = [field.name for field in dataclasses.fields(EvalRow)]
    text = json.dumps([ROW_VERSION, checkpoint, fields, str(dtype), columns], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stored_row(path: Path, track: EvalTrack) -> EvalRow | None:
    """Read a stored row; None when the file is absent, damaged, or made from another sound."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] != track.identity:
            return None
        types = {field.name: field.type for field in dataclasses.fields(EvalRow)}
        values: dict[str, Any] = {
            name: float("nan" if value is None else value) if types[name] == "float" else value
            for name, value in content["row"].items()
        }
        return EvalRow(**values)
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None


def to_json(value: Any) -> str:
    """Strict JSON, which every reader takes: null for NaN, "inf" and "-inf" for the infinities."""

    def strict(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strict(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [strict(inner) for inner in part]
        if isinstance(part, float) and not math.isfinite(part):
            return None if math.isnan(part) else str(part)
        return part

    return json.dumps(strict(value), indent=1, allow_nan=False) + "\n"
