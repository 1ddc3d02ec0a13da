"""Evaluate a model: on one song against trivial baselines, and on many tracks under a named protocol.

song → separate → uSDR; and the same for the mixture, for silence and for the best mask  (`score`)
checkpoint, tracks, protocol → a row for each track and stem                             (`run`)
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
from ..settings import check_settings, expand_user
from ..spectrogram import istft, stft
from ..synth import STEMS, Song
from .protocols import MUSDB, EvalProtocol


@dataclass(frozen=True)
class SongScore:
    """Scores of one song: uSDR in dB of the model and of its baselines, the model's cSDR and silence leakage."""

    song: str
    occupancy: float
    mixture: float
    silence: float
    model: float
    oracle: float
    model_csdr: float
    silence_leakage: float | None  #: dB, relative to the mixture (`metrics.silence_leakage`); None if no silence


def oracle_vocals(song: Song, n_fft: int = 2048, hop_length: int = 441) -> Tensor:
    """Oracle estimate: the mixture times the best real mask in [0, 1] (`masks.oracle_mask`), (c, samples)."""
    mixture = stft(song.mixture, n_fft, hop_length)
    mask = oracle_mask(stft(song.vocals, n_fft, hop_length), mixture)
    return istft(mask * mixture, song.mixture.shape[-1], n_fft, hop_length)


def score(model: BSMamba2, song: Song, *, segment: float = 8.0, overlap: float = 0.5) -> SongScore:
    """Score a model on one song: separate the mixture and compare the estimated vocals with the true ones.

    The oracle uses the model's own STFT. See `separate.separate` for `segment` and `overlap`.

    Raises:
        ValueError: when the song is not at the model's sample rate, or the model has no stem `vocals`.
    """
    config, vocals = model.config, song.vocals
    if song.sample_rate != config.sample_rate:
        raise ValueError(f"{song.name} is at {song.sample_rate} Hz, the model at {config.sample_rate} Hz")
    if "vocals" not in config.stems:
        raise ValueError(f"the model separates {', '.join(config.stems)}, but not the vocals")
    stems = separate(model, song.mixture, segment=segment, overlap=overlap)
    estimate = stems[config.stems.index("vocals")]
    leakage = metrics.silence_leakage(vocals, estimate, song.mixture, song.sample_rate).relative
    return SongScore(
        song=song.name, occupancy=song.occupancy,
        mixture=usdr(vocals, song.mixture), silence=usdr(vocals, torch.zeros_like(vocals)),
        model=usdr(vocals, estimate), oracle=usdr(vocals, oracle_vocals(song, config.n_fft, config.hop_length)),
        model_csdr=csdr(vocals, estimate, song.sample_rate),
        silence_leakage=None if math.isnan(leakage) else leakage,
    )  # fmt: skip


def mean(scores: Sequence[SongScore], field: str) -> float:
    """Mean of one field over songs, in its own unit."""
    return statistics.fmean(getattr(one, field) for one in scores)


@dataclass(frozen=True)
class EvalTrack:
    """A track to evaluate on."""

    name: str  #: unique in its set
    identity: str  #: text that changes when the audio changes
    load: Callable[[], tuple[Tensor, dict[str, Tensor], int]]
    """Reads the track: mixture (c, samples), the reference of each stem by name (c, samples), sample rate in hertz."""


@dataclass(frozen=True)
class EvalSet:
    """A named set of tracks to evaluate on."""

    name: str
    tracks: tuple[EvalTrack, ...]


INSTRUMENTAL = ("instrumental", "accompaniment")
"""Stem names that mean the mixture minus the vocals, if a track has no file of that name."""


def load_tracks(folder: str | os.PathLike[str], stems: Sequence[str] = ("vocals",)) -> EvalSet:
    """List the tracks of a folder in MUSDB18-HQ's layout: `test/<track>/{mixture,vocals,drums,bass,other}.wav`.

    The folder may also be `test` itself, any folder of such tracks, or one track. The files of a track are read only
    when it is evaluated: the stems, and the mixture or, if it has no file, the four stems that add up to it. The set is
    named `MUSDB18-HQ test` if a folder `test` has 50 complete tracks; the names of the tracks are not checked.

    Raises:
        ValueError: when the folder does not exist or has no track.
    """
    folder = Path(os.path.abspath(expand_user(folder)))  # noqa: PTH100  (links stay)
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; give one of tracks in MUSDB18-HQ's layout")
    parent = folder / "test" if (folder / "test").is_dir() else folder
    names = {"mixture", *STEMS}
    found = [track for track in (TrackFolder.of(parent), *list_tracks(parent)) if names & track.files.keys()]
    if not found:
        raise ValueError(f"{folder}: holds no track; expected <track>/mixture.wav and <track>/vocals.wav in it")
    musdb = parent.name == "test" and len(found) == 50 and all(names <= track.files.keys() for track in found)
    name = MUSDB if musdb else f"{len(found)} tracks in {_printable(parent.name)}"
    return EvalSet(name, tuple(_folder_track(track, stems) for track in found))


def _printable(name: str) -> str:
    """A file name whose bytes are not in the file system's encoding, with these bytes escaped."""
    return name.encode(errors="backslashreplace").decode()


def _folder_track(folder: TrackFolder, stems: Sequence[str]) -> EvalTrack:
    computed = set(INSTRUMENTAL) - folder.files.keys()
    mixed = ("mixture",) if "mixture" in folder.files else STEMS
    names = list(dict.fromkeys((*mixed, *("vocals" if stem in computed else stem for stem in stems))))
    paths = [path for name in names for path in folder.files.get(name, ())]

    def load() -> tuple[Tensor, dict[str, Tensor], int]:
        if [path.stem for path in paths] != names:
            raise ValueError(f"{folder.path}: must hold one file for each of {', '.join(names)}")
        signals, rates = zip(*(files.read(path) for path in paths), strict=True)
        if len({(*signal.shape, rate) for signal, rate in zip(signals, rates, strict=True)}) > 1:
            raise ValueError(f"{folder.path}: the files differ in rate, channels or length; export them again")
        by_name = dict(zip(names, signals, strict=True))
        mixture = torch.stack([by_name[name] for name in mixed]).sum(0)
        rest = dict.fromkeys(computed, mixture - by_name["vocals"]) if computed & {*stems} else {}
        return mixture, {stem: {**by_name, **rest}[stem] for stem in stems}, rates[0]

    stats = [path.stat() for path in paths]
    identity = " ".join(f"{path.name} {s.st_size} {s.st_mtime_ns}" for path, s in zip(paths, stats, strict=True))
    return EvalTrack(_printable(folder.name), identity, load)


def tracks_of(songs: Sequence[Song], name: str = "") -> EvalSet:
    """Evaluation set of songs in memory, for example synthesised ones, with all their stems.

    Raises:
        ValueError: when there are no songs, or two have the same name.
    """
    names = {song.name for song in songs}
    if not songs or len(names) != len(songs):
        raise ValueError(f"{len(songs)} songs with {len(names)} names: give at least one, with unique names")

    def track(song: Song) -> EvalTrack:
        def load() -> tuple[Tensor, dict[str, Tensor], int]:
            rest = dict.fromkeys(INSTRUMENTAL, song.mixture - song.vocals)
            return song.mixture, {**dict(zip(STEMS, song.stems, strict=True)), **rest}, song.sample_rate

        digest = hashlib.sha256(song.stems.numpy().tobytes()).hexdigest()
        return EvalTrack(song.name, f"{song.source}, {digest}", load)

    return EvalSet(name or f"{len(songs)} songs", tuple(map(track, songs)))


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """Metrics of one stem of one track under one protocol; NaN where a metric is not defined (see `metrics`).

    A stem that is silent throughout has no cSDR, uSDR or SI-SDR, because uSDR would divide by almost no energy. Read
    `silence_leakage` instead.
    """

    track: str
    stem: str = "vocals"
    segment: float  #: in seconds
    seconds: float  #: length of the track
    occupancy: float  #: fraction of the track outside the stem's silent regions, 0 to 1
    csdr: float  #: in dB, like `usdr` and `si_sdr`
    usdr: float
    si_sdr: float
    bleedless: float  #: 0 to 100, like `fullness`
    fullness: float
    silence_leakage: float  #: in dB, relative to the mixture
    silence_leakage_dbfs: float  #: the same in dBFS
    onset_delay: float  #: median over the track's onsets, in milliseconds
    onset_error: float  #: median over the track's onsets, in dB
    onsets: int  #: number of onsets
    onsets_missed: int  #: number of onsets missing from the estimate
    mixture_usdr: float  #: uSDR of the mixture as the estimate, in dB
    compute_seconds: float  #: time of the separation, for all stems together


METRICS = (
    "csdr", "usdr", "si_sdr", "bleedless", "fullness", "silence_leakage", "silence_leakage_dbfs", "onset_delay",
    "onset_error", "mixture_usdr",
)  # fmt: skip
"""The fields of a row that are averaged over tracks."""


@dataclass(frozen=True)
class Failure:
    """A track that could not be evaluated, and the reason."""

    track: str
    segment: float
    message: str


def evaluate_track(
    model: BSMamba2, track: EvalTrack, protocol: EvalProtocol, *, batch: int = 1, dtype: torch.dtype = torch.float32
) -> list[EvalRow]:
    """Evaluate one track: separate it and compute all metrics, for each stem of the model.

    Raises:
        ValueError: when the track cannot be read or does not fit the model: a different rate (nothing is resampled
            here), different channels, or a stem of the model that the track lacks.
    """
    config = model.config
    mixture, references, rate = track.load()
    if rate != config.sample_rate:
        fix = "convert the track first"
        raise ValueError(f"{track.name}: is at {rate} Hz, the model at {config.sample_rate} Hz; {fix}")
    if missing := [stem for stem in config.stems if stem not in references]:
        raise ValueError(f"{track.name}: lacks {', '.join(missing)}, which the model separates; add it to the track")
    if mixture.shape[0] == 1:
        mixture = mixture.expand(config.channels, -1)
    started = time.perf_counter()
    estimates = separate(model, mixture, segment=protocol.segment, overlap=protocol.overlap, batch=batch, dtype=dtype)
    compute_seconds = time.perf_counter() - started
    rows = []
    for stem, estimate in zip(config.stems, estimates, strict=True):
        reference = references[stem].expand_as(mixture)
        rest = [(mixture - reference, mixture - estimate)] if "instrumental" in protocol.sources else []
        bleed = metrics.bleed(reference, estimate, rate)
        leakage = metrics.silence_leakage(reference, estimate, mixture, rate)
        onsets = metrics.onsets(reference, estimate, rate)
        seconds = mixture.shape[-1] / rate
        sounds = leakage.seconds < seconds
        row = EvalRow(
            track=track.name, stem=stem, segment=protocol.segment, seconds=seconds,
            occupancy=1 - leakage.seconds / seconds,
            csdr=csdr(reference, estimate, rate, other_sources=rest),
            usdr=usdr(reference, estimate) if sounds else math.nan,
            si_sdr=metrics.si_sdr(reference, estimate),
            bleedless=bleed.bleedless, fullness=bleed.fullness,
            silence_leakage=leakage.relative, silence_leakage_dbfs=leakage.absolute,
            onset_delay=statistics.median([onset.delay for onset in onsets] or [math.nan]),
            onset_error=statistics.median([onset.error for onset in onsets] or [math.nan]),
            onsets=len(onsets), onsets_missed=sum(onset.delay == math.inf for onset in onsets),
            mixture_usdr=usdr(reference, mixture) if sounds else math.nan,
            compute_seconds=compute_seconds,
        )  # fmt: skip
        rows.append(row)
    return rows


def run(
    model: BSMamba2, checkpoint: str, tracks: EvalSet, protocol: EvalProtocol, output: str | os.PathLike[str], *,
    segments: Sequence[float] = (), batch: int = 1, dtype: torch.dtype = torch.float32,
    log: Callable[[str], object] = print,
) -> Iterator[EvalRow | Failure]:  # fmt: skip
    """Evaluate track by track. Stored rows are read, not computed again, so that an evaluation can be resumed.

    The rows of a track, one for each stem, form one file, `rows/<key>/<track>.json` in `output`, written atomically.
    The key is a hash of the checkpoint's identity, the protocol and the type, so every row is computed again after a
    change of any of these. A stored row is used only if the track's `identity` has not changed since then.

    Args:
        model, tracks, protocol: the model to evaluate, on these tracks and under this protocol.
        checkpoint: identity of the model: `sha256_file` of its file, and anything else that selects the model in it.
        output: folder, created if absent.
        segments: further segment lengths in seconds; the protocol's own comes first.
        batch, dtype: as in `separate.separate`.
        log: called with a line for each damaged stored file, whose rows are then computed again.

    Yields:
        The rows, or the failure, for each segment length and track.

    Raises:
        OSError: when a row cannot be written.
    """
    for segment in dict.fromkeys([protocol.segment, *segments]):
        varied = replace(protocol, segment=segment)
        folder = Path(output) / "rows" / row_key(checkpoint, varied, dtype)
        folder.mkdir(parents=True, exist_ok=True)
        for track in tracks.tracks:
            name = track.name.encode(errors="backslashreplace")
            path = folder / f"{quote(name, safe=' ')[:80]}-{hashlib.sha256(name).hexdigest()[:12]}.json"
            try:
                rows = _stored_rows(path, track, segment, model.config.stems)
            except _DAMAGED as error:
                if path.is_dir() and not path.is_symlink():
                    yield Failure(track.name, segment, f"{path}: is a folder, not a stored row; remove it")
                    continue
                log(f"{path}: is damaged ({type(error).__name__}: {str(error)[:80]}); computed again")
                path.unlink()  # so that a link is replaced, not followed
                rows = []
            if not rows:
                try:
                    rows = evaluate_track(model, track, varied, batch=batch, dtype=dtype)
                except ValueError as error:
                    yield Failure(track.name, segment, str(error))
                    continue
                content = {"identity": track.identity, "protocol": asdict(varied), "checkpoint": checkpoint}
                write_atomically(path, to_json({**content, "rows": [asdict(row) for row in rows]}))
            yield from rows


ROW_VERSION = 3
"""Increased when the computation of a metric changes, so that rows of older versions are not read."""


def row_key(checkpoint: str, protocol: EvalProtocol, dtype: torch.dtype = torch.float32) -> str:
    """Cache key of a row: hash of everything that it depends on except its track, as 16 hexadecimal digits."""
    fields = asdict(protocol)
    del fields["name"], fields["over_tracks"]  # mean or median does not change a row
    columns = [field.name for field in dataclasses.fields(EvalRow) if field.name != "stem"]
    text = json.dumps([ROW_VERSION, checkpoint, fields, str(dtype), columns], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


MAX_ROW_BYTES = 1 << 20
"""Largest file of stored rows that is read."""
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


def _stored_rows(path: Path, track: EvalTrack, segment: float, stems: Sequence[str]) -> list[EvalRow]:
    """Read a track's stored rows; empty if there are none for this sound and these stems. Raises `_DAMAGED`."""
    if not os.path.lexists(path):
        return []
    if path.is_symlink() or not path.is_file():  # reading a pipe could block forever
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        text = file.read(MAX_ROW_BYTES + 1)
    if len(text) > MAX_ROW_BYTES:
        raise ValueError(f"more than {MAX_ROW_BYTES:,} bytes")
    content = json.loads(text)
    if content["identity"] != track.identity:
        return []
    if "row" in content:  # older format: one stem; tracks under a second had no cSDR
        content["rows"] = [content["row"]] if content["row"]["seconds"] >= 1 else []
    undefined = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
    rows = []
    for values in content["rows"]:
        row = EvalRow(**{**values, **{name: undefined.get(values[name], values[name]) for name in METRICS}})
        check_settings(row)
        if not all(map(math.isfinite, (row.seconds, row.occupancy, row.compute_seconds))):
            raise ValueError("a length, a fraction or a time is not finite")
        if (row.track, row.segment) != (track.name, segment):
            raise ValueError("of a different track or segment length")
        rows.append(row)
    return rows if [row.stem for row in rows] == [*stems] else []


def to_json(value: Any) -> str:
    """Strict JSON, which every parser accepts: null for NaN, "inf" and "-inf" for the infinities."""

    def strict(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: strict(inner) for key, inner in part.items()}
        if isinstance(part, list | tuple):
            return [strict(inner) for inner in part]
        if isinstance(part, float) and not math.isfinite(part):
            return None if math.isnan(part) else str(part)
        return part

    return json.dumps(strict(value), indent=1, allow_nan=False) + "\n"
