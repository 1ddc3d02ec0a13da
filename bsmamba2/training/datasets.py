"""Data sets in folders: stems in files, MUSDB18-HQ for one, read where needed and never whole.

    MUSDB18-HQ/train/<song>/{vocals,drums,bass,other}.wav      14 named songs validate, the others train
    folder/{train,valid}/<song>/{vocals,drums,bass,other}.wav  the same by folders
    folder/<song>/{vocals,drums,bass,other}.wav                every tenth song validates

WAV, FLAC or OGG. What is wrong with the files is found at the start and reported all at once.

Book: "Scaling up". Source of the validation songs: the `musdb` package.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from ..atomic_write import write_atomically
from ..audio.musdb import AUDIO_SUFFIXES, TrackFolder, list_tracks
from ..data import Window, Windows, salient_windows, spread
from ..synth import STEMS, Song

VALIDATION = {
    "ANiMAL - Rockshow", "Actions - One Minute Smile", "Alexander Ross - Goodbye Bolero",
    "Clara Berry And Wooldog - Waltz For My Victims", "Fergessen - Nos Palpitants", "James May - On The Line",
    "Johnny Lokke - Promises & Lies", "Leaf - Summerghost", "Meaxic - Take A Step",
    "Patrick Talbot - A Reason To Leave", "Skelpolu - Human Mistakes", "Traffic Experiment - Sirens",
    "Triviul - Angelsaint", "Young Griffo - Pennies",
}  # fmt: skip
"""The songs of MUSDB18's training part that are kept for validation."""

UNREADABLE = "cannot be read to its end"
FILES_BETWEEN = 20
"""How many files are searched before the cache is written."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Goes through a list and may show how far it is."""


class DataError(ValueError):
    """A folder that cannot be trained from as it is; the message has a line for every fault."""

    def __init__(self, folder: Path, faults: Sequence[str], advice: str) -> None:
        self.faults = list(faults)
        super().__init__("\n".join([f"{folder}: {len(faults)} faults", *(f"  {fault}" for fault in faults), advice]))


@dataclass(frozen=True)
class FileTrack:
    """One song's files, opened only while a piece is read.

    Attributes:
        name: of the song's folder.
        stems: a file for each stem, the target first.
        sample_rate: in hertz.
        samples: of the shortest stem.
    """

    name: str
    stems: tuple[Path, ...]
    sample_rate: int
    samples: int

    def crop(self, stem: int, start: int, samples: int) -> Tensor:
        """A piece of one stem, (c, samples) float32.

        Raises:
            OSError: when the file has gone, changed or broken since it was indexed.
        """
        path = self.stems[stem]
        try:
            frames, _ = soundfile.read(path, frames=samples, start=start, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise OSError(f"{path}: samples {start} to {start + samples} cannot be read ({error})") from error
        if len(frames) != samples:
            raise OSError(f"{path}: only {len(frames)} of {samples} samples from {start} on are there")
        return torch.from_numpy(np.ascontiguousarray(frames.T))

    def label(self, stem: int) -> str:
        """The file."""
        return str(self.stems[stem])


def index_dataset(
    folder: Path, samples: int, *, stems: Sequence[str] = STEMS, sample_rate: int = 44_100, channels: int = 2
) -> tuple[list[FileTrack], list[FileTrack], list[str], list[Path]]:
    """Index a data set: its songs, checked by the header of every file.

    Args:
        folder: in one of the three layouts above.
        samples: least length of a song.
        stems: names of the files without their extension, the target first.
        sample_rate: that they must have, in hertz.
        channels: that they must have.

    Returns:
        Songs to train with, songs to validate with, what is wrong with the others, a line for each file, and those
        of their files with which nothing is wrong so far.

    Raises:
        DataError: when there is no song at all.
    """
    if not folder.is_dir():
        raise DataError(folder, ["is no folder"], "give the folder that holds the songs' folders")
    splits = [split for split in ("train", "valid") if (folder / split).is_dir()] or ["."]
    training: list[FileTrack] = []
    validation: list[FileTrack] = []
    faults: list[str] = []
    others: list[Path] = []
    for split in splits:
        loose = sorted(path for path in (folder / split).iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
        faults += [f"{path}: lies beside the songs' folders" for path in loose if not path.name.startswith(".")]
        for number, song in enumerate(list_tracks(folder / split)):
            track, song_faults, readable = _index_song(song, samples, stems, sample_rate, channels)
            faults += song_faults
            if track is None:
                others += readable
            else:
                by_name = song.name in VALIDATION if split == "train" else number % 10 == 9
                is_validation = split == "valid" or (by_name and "valid" not in splits)
                (validation if is_validation else training).append(track)
    if not validation and len(training) > 1:  # few songs, none of them known by name
        validation.append(training.pop())
    if not training or not validation:
        needed = faults or ["holds no song"]
        raise DataError(folder, needed, f"at least two folders with {', '.join(stems)} (.wav, .flac, .ogg) are needed")
    return training, validation, faults, others


def find_active_windows(
    tracks: Sequence[FileTrack],
    samples: int,
    cache: Path,
    *,
    others: Sequence[Path] = (),
    progress: Progress = lambda files: files,
) -> tuple[Windows, list[str]]:
    """Source activity detection in files: the windows that `data.find_windows` finds, and what is wrong in the files.

    Every file is read once. The windows are kept in `cache` with the window's length and each file's size and time of
    change; files for which these are the same are not read again, but for those that could not be read.

    Args:
        tracks: as `index_dataset` gives them.
        samples: length of a window.
        cache: a file, which need not be there.
        others: files of no track that are to be read too, so that all faults are reported at once.
        progress: goes through the files.
    """
    known = _read_cache(cache, samples)
    paths = sorted({path for track in tracks for path in track.stems} | set(others))
    stamps = {path: _mtime_size(path) for path in paths}
    missing = [path for path in paths if known.get(str(path), {}).get("stamp") != stamps[path]]

    def write_cache() -> None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, json.dumps({"samples": samples, "files": known}))

    try:
        for number, path in enumerate(progress(missing) if missing else (), start=1):
            windows, fault = _windows_in(path, samples)
            stamp = None if fault.startswith(UNREADABLE) else stamps[path]  # a network may be back the next time
            known[str(path)] = {"stamp": stamp, "windows": windows, "fault": fault}
            if number % FILES_BETWEEN == 0:
                write_cache()
    finally:  # when interrupted, too
        if missing:
            write_cache()
    faults = [f"{path}: {known[str(path)]['fault']}" for path in paths if known[str(path)]["fault"]]
    sound = [track for track in tracks if not any(known[str(path)]["fault"] for path in track.stems)]
    by_stem = [
        [
            (track, start)
            for track in sound
            for start in known[str(track.stems[stem])]["windows"]
            if start + samples <= track.samples
        ]
        for stem in range(len(tracks[0].stems) if tracks else 0)
    ]
    return by_stem, faults


def cache_path(folder: Path, samples: int) -> Path:
    """Where the active windows of a folder are kept: in the user's cache, by the folder and the window's length."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(f"{folder.resolve()}\n{samples}".encode()).hexdigest()[:16]
    return base / "bsmamba2" / f"activity-{key}.json"


def excerpts(windows: Sequence[Window], samples: int, count: int) -> list[Song]:
    """Excerpts of tracks as songs: all stems at `count` of the target's windows, spread over all of them."""
    songs = []
    for track, start in spread(windows, count):
        stems = torch.stack([track.crop(stem, start, samples) for stem in range(len(track.stems))])
        place, rate = start / track.sample_rate, track.sample_rate
        everywhere = ((0.0, samples / rate),)
        name = f"{track.name} at {place:.1f} s"
        songs.append(Song(name, stems, rate, everywhere, "see the data set", track.label(0)))
    return songs


def musdb_sample(samples: int) -> tuple[list[Song], list[Song]]:
    """The 7-second excerpts of MUSDB18 that the `musdb` package fetches: songs to train and to validate with.

    The package needs ffmpeg, and the network for the first time. Not run here.

    Raises:
        ImportError: when the package is missing.
        DataError: when the excerpts are shorter than `samples`.
    """
    try:
        musdb = importlib.import_module("musdb")
    except ImportError as error:
        raise ImportError(f"data='musdb-sample' takes the musdb package: pip install musdb ({error})") from error
    database = musdb.DB(download=True, subsets="train")
    parts: tuple[list[Song], list[Song]] = ([], [])
    for track in database.tracks:
        stems = torch.stack([torch.from_numpy(track.sources[name].audio.T.astype(np.float32)) for name in STEMS])
        song = Song(track.name, stems, int(track.rate), (), "see MUSDB18", "MUSDB18, 7-second excerpt, by musdb")
        parts[track.name in VALIDATION].append(song)
    shortest = min(song.samples for part in parts for song in part)
    if shortest < samples:
        raise DataError(Path(database.root), [f"an excerpt has {shortest} samples"], f"{samples} are asked for")
    return parts


def _index_song(
    song: TrackFolder, samples: int, stems: Sequence[str], sample_rate: int, channels: int
) -> tuple[FileTrack | None, list[str], list[Path]]:
    """One song, or what is wrong with it; and its files whose headers are right."""
    lengths: dict[Path, int] = {}  # of those with the right rate
    readable, faults = [], []
    for name in stems:
        matching = song.files.get(name, ())
        if len(matching) != 1:
            files = matching or sorted(path for paths in song.files.values() for path in paths)
            listed = ", ".join(path.name for path in files) or "no audio"
            faults.append(f"{song.path / name}: one file .wav, .flac or .ogg is needed; there is {listed}")
            continue
        path = matching[0]
        try:
            header = soundfile.info(path)
        except soundfile.LibsndfileError as error:
            faults.append(f"{path}: is broken ({error})")
            continue
        wrong = []
        if header.channels != channels:
            wrong.append(f"has {header.channels} channels, not {channels}")
        if header.samplerate != sample_rate:
            wrong.append(f"is at {header.samplerate} Hz, not {sample_rate}")
        else:
            lengths[path] = header.frames
        if header.frames < samples:
            wrong.append(f"is short, {header.frames} samples of at least {samples}")
        faults += [f"{path}: {fault}" for fault in wrong]
        if not wrong:
            readable.append(path)
    if lengths and max(lengths.values()) - min(lengths.values()) > sample_rate // 10:
        shortest = min(lengths, key=lengths.__getitem__)
        if shortest in readable:
            seconds = (max(lengths.values()) - lengths[shortest]) / sample_rate
            faults.append(f"{shortest}: ends {seconds:.1f} s before another stem of its song; it may be truncated")
            readable.remove(shortest)
    if faults:
        return None, faults, readable
    return FileTrack(song.name, tuple(readable), sample_rate, min(lengths.values())), [], readable


def _windows_in(path: Path, samples: int) -> tuple[list[int], str]:
    """Starts of the salient windows of a file, and what is wrong with it."""
    try:
        promised = soundfile.info(path).frames
        frames, _ = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        return [], f"{UNREADABLE} ({error})"
    if len(frames) != promised:
        return [], f"holds {len(frames)} of the {promised} samples that its header promises; it may be truncated"
    if not np.isfinite(frames).all():
        return [], "holds NaN or infinite samples"
    return salient_windows(torch.from_numpy(frames.T), samples), ""


def _mtime_size(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _read_cache(path: Path, samples: int) -> dict[str, dict[str, Any]]:
    """The cached windows and faults by file; none when the cache is absent, damaged or of other parameters."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["files"]) if content["samples"] == samples else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
