"""Data sets: stem files such as MUSDB18-HQ, read in excerpts; and synthesised songs, shared between processes.

    MUSDB18-HQ/train/<song>/{vocals,drums,bass,other}.wav      14 named songs for validation, the others for training
    folder/{train,valid}/<song>/{vocals,drums,bass,other}.wav  training and validation songs by folder
    folder/<song>/{vocals,drums,bass,other}.wav                every tenth song for validation; of fewer, the last

Files are WAV, FLAC or OGG. Each is read once before a run starts, block by block; all faults are reported together.

Book: "Scaling up". Source of the validation songs: the `musdb` package.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from ..atomic_write import write_atomically
from ..audio.decoders import reason
from ..audio.files import AudioError, AudioReader
from ..audio.musdb import AUDIO_SUFFIXES, TrackFolder, list_tracks
from ..audio.source import DamagedError, open_regular
from ..data import Window, Windows, salient_windows, spread
from ..settings import expand_user
from ..synth import STEMS, Song, synthesise_songs
from .distributed import all_gather_object, local_rank_and_size, rank

VALIDATION = {
    "ANiMAL - Rockshow", "Actions - One Minute Smile", "Alexander Ross - Goodbye Bolero",
    "Clara Berry And Wooldog - Waltz For My Victims", "Fergessen - Nos Palpitants", "James May - On The Line",
    "Johnny Lokke - Promises & Lies", "Leaf - Summerghost", "Meaxic - Take A Step",
    "Patrick Talbot - A Reason To Leave", "Skelpolu - Human Mistakes", "Traffic Experiment - Sirens",
    "Triviul - Angelsaint", "Young Griffo - Pennies",
}  # fmt: skip
"""Songs of MUSDB18's training set that are held out for validation."""

FILES_BETWEEN = 20
"""Number of files that are searched between two writes of the cache."""
_UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's value for a FLAC file that was written to a pipe

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Function that iterates over a list and may display the progress."""


class DataError(ValueError):
    """A folder that cannot be used for training; the message has one line per fault."""

    def __init__(self, folder: Path, faults: Sequence[str], advice: str) -> None:
        self.faults = list(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{folder}: {count}", *(f"  {fault}" for fault in faults), advice]))


@dataclass(frozen=True)
class FileTrack:
    """A song in files, which are opened only while an excerpt is read.

    Attributes:
        name: name of the song's folder.
        stems: one file per stem.
        sample_rate: in hertz.
        samples: length of the shortest stem.
        channels: number of channels, c.
        sha256: SHA-256 of each file; empty until the files have been searched for activity.
    """

    name: str
    stems: tuple[Path, ...]
    sample_rate: int
    samples: int
    channels: int = 2
    sha256: tuple[str, ...] = field(default=(), compare=False)

    def crop(self, stem: int, start: int, samples: int) -> Tensor:
        """Read an excerpt of one stem, (c, samples) float32.

        Raises:
            OSError: when the file was removed, changed or damaged after it was indexed.
        """
        path = self.stems[stem]
        try:
            with open_regular(path) as raw, soundfile.SoundFile(raw) as file:
                rate, channels = file.samplerate, file.channels
                file.seek(start)
                frames = file.read(samples, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, DamagedError) as error:
            cause = reason(error)
            raise OSError(f"{path}: samples {start} to {start + samples} cannot be read ({cause})") from error
        if (rate, channels) != (self.sample_rate, self.channels):
            raise OSError(f"{path}: was changed during the run, to {channels} channels at {rate} Hz")
        if len(frames) != samples:
            raise OSError(f"{path}: only {len(frames)} of {samples} samples from {start} on are there")
        return torch.from_numpy(np.ascontiguousarray(frames.T))

    def label(self, stem: int) -> str:
        """Path of a stem's file, for messages."""
        return str(self.stems[stem])


def search_dataset(
    folder: Path,
    samples: int,
    *,
    stems: Sequence[str] = STEMS,
    targets: Sequence[int] = (0,),
    sample_rate: int = 44_100,
    channels: int = 2,
    on_bad_file: str = "stop",
    progress: Progress = lambda files: files,
) -> tuple[Windows, Windows]:
    """Find the active windows of a data set, for training and for validation.

    Args:
        folder, stems, sample_rate, channels: as for `index_dataset`.
        samples: length of a window.
        targets: indices of the stems to separate.
        on_bad_file: `stop`; or `skip` to leave out songs with a faulty file, with a warning.
        progress: function that iterates over the files that are read.

    Raises:
        DataError: for all faults in the folder together; for too few songs; or for a stem that is silent in all.
    """
    training, validation, faults, others = index_dataset(
        folder, samples, stems=stems, sample_rate=sample_rate, channels=channels
    )
    windows, more_faults = find_active_windows(
        training + validation, samples, cache_path(folder, samples), others=others, progress=progress
    )
    faults += more_faults
    if faults and on_bad_file == "stop":
        raise DataError(folder, faults, "repair or remove them, or leave these songs out: on_bad_file=skip")
    heard = {track for stem in targets for track, _ in windows[stem]}
    held_out = heard.intersection(validation) or set([track for track in training if track in heard][-1:])
    to_train, to_validate = (
        [[window for window in stem if window[0] in part] for stem in windows]
        for part in (set(training) - held_out, held_out)
    )
    silent = [
        f"no song to {use} with has {stems[stem]} that sound for {samples / sample_rate:g} s"
        for use, part, needed in (("train", to_train, range(len(stems))), ("validate", to_validate, targets))
        for stem in needed
        if not part[stem]
    ]
    if silent:
        raise DataError(folder, faults + silent, "two songs or more are needed, one of them to validate with: add some")
    if faults:
        warnings.warn(str(DataError(folder, faults, "their songs are left out")), stacklevel=2)
    return to_train, to_validate


def index_dataset(
    folder: Path, samples: int, *, stems: Sequence[str] = STEMS, sample_rate: int = 44_100, channels: int = 2
) -> tuple[list[FileTrack], list[FileTrack], list[str], list[Path]]:
    """Index a data set: list its songs, and check the header of every file.

    Args:
        folder: a folder in one of the three layouts above.
        samples: minimum length of a song.
        stems: names of the files without their extension.
        sample_rate, channels: required sample rate in hertz, and required number of channels.

    Returns:
        Training songs; validation songs, chosen by folder, name or position; one line for each fault; and the faultless
        files of the songs that are left out.

    Raises:
        DataError: when fewer than two songs can be used.
    """
    if not folder.is_dir():
        raise DataError(folder, ["is not a folder"], "give the folder that holds the songs' folders")
    splits = [split for split in ("train", "valid") if (folder / split).is_dir()] or ["."]
    parts: tuple[list[FileTrack], list[FileTrack]] = ([], [])
    faults, others = [], []
    for split in splits:
        loose = sorted(path for path in (folder / split).iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
        faults += [f"{path}: is outside the songs' folders" for path in loose if not path.name.startswith(".")]
        for number, song in enumerate(list_tracks(folder / split)):
            track, song_faults, readable = _index_song(song, samples, stems, sample_rate, channels)
            faults += song_faults
            if track is None:
                others += readable
            else:
                by_name = song.name in VALIDATION if split == "train" else number % 10 == 9
                is_validation = split == "valid" or (by_name and "valid" not in splits)
                parts[is_validation].append(track)
    found = sum(map(len, parts))
    if found < 2:
        holds = f"holds {'one song' if found else 'no song'} that can be used; two are needed, one to validate with"
        advice = f"at least two folders with {', '.join(stems)} (.wav, .flac, .ogg) are needed"
        raise DataError(folder, [*faults, holds], advice)
    return *parts, faults, others


def find_active_windows(
    tracks: Sequence[FileTrack],
    samples: int,
    cache: Path | None,
    *,
    others: Sequence[Path] = (),
    progress: Progress = lambda files: files,
) -> tuple[Windows, list[str]]:
    """Source activity detection in files: the windows, as `data.find_windows` finds them, and the files' faults.

    A faultless file is read again only after it has changed, because the file `cache` stores its windows of `samples`
    with its size and modification times. A warning is issued if the cache cannot be written. `others` are files that
    belong to no track and are read only to find faults. The returned tracks have the SHA-256 of their files.
    """
    known = _read_cache(cache, samples)
    paths = sorted({path for track in tracks for path in track.stems} | set(others))
    missing = [path for path in paths if known.get(os.path.realpath(path), {}).get("stamp") != _stamp(path)]
    faults = []
    try:
        for number, path in enumerate(progress(missing) if missing else (), start=1):
            known.pop(os.path.realpath(path), None)
            try:
                known[os.path.realpath(path)] = _search_file(path, samples)
            except (AudioError, OSError) as error:
                faults.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
            if number % FILES_BETWEEN == 0:
                _write_cache(cache, samples, known)
    finally:  # also when interrupted
        if missing:
            _write_cache(cache, samples, known)
    windows: list[list[Window]] = [[] for _ in (tracks[0].stems if tracks else ())]
    for track in tracks:
        entries = [known[key] for key in map(os.path.realpath, track.stems) if key in known]
        if len(entries) == len(track.stems):
            searched = replace(track, sha256=tuple(entry["sha256"] for entry in entries))
            for stem, entry in zip(windows, entries, strict=True):
                stem += [(searched, start) for start in entry["windows"] if start + samples <= track.samples]
    return windows, faults


def fingerprints(windows: Windows) -> dict[str, str]:
    """SHA-256 of every file of the songs in `windows`, by song and file name; songs in memory have none."""
    tracks = {track for stem in windows for track, _ in stem if isinstance(track, FileTrack)}
    return {
        f"{track.name}/{path.name}": sha256
        for track in sorted(tracks, key=lambda track: track.stems)
        for path, sha256 in zip(track.stems, track.sha256, strict=True)
    }


def cache_path(folder: Path, samples: int) -> Path | None:
    """Path of the file in the user's cache that stores a folder's active windows; None without a home folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or expand_user("~/.cache"))
    key = hashlib.sha256(os.fsencode(os.path.realpath(folder)) + f"\n{samples}".encode()).hexdigest()[:16]
    return base / "bsmamba2" / f"activity-{key}.json" if base.is_absolute() else None


def excerpts(windows: Sequence[Window], samples: int, count: int) -> list[Song]:
    """Excerpts of tracks as songs: all stems, in at most `count` evenly spread windows of the target."""
    songs = []
    for track, start in spread(windows, count):
        stems = torch.stack([track.crop(stem, start, samples) for stem in range(len(track.stems))])
        rate, name = track.sample_rate, f"{track.name} at {start / track.sample_rate:.1f} s"
        songs.append(Song(name, stems, rate, ((0.0, samples / rate),), "see the data set", track.label(0)))
    return songs


def shared_songs(count: int, **options: Any) -> list[Song]:
    """Synthesise songs once per machine, as `synthesise_songs(count, **options)`; its processes share work and memory.

    Each process writes its part to one file, and all map the file into memory. The file is unlinked before anything is
    written, so killed processes leave nothing behind. On Windows, where an open file cannot be removed, each process
    makes all songs.

    Raises:
        OSError: when the file cannot be written, for example on a full disk; TMPDIR sets its folder.
    """
    local, processes = local_rank_and_size()
    if os.name == "nt" or max(all_gather_object(processes)) == 1:
        return synthesise_songs(count, **options)
    first = rank() - local  # lowest rank on this machine
    with tempfile.NamedTemporaryFile(prefix="bsmamba2-") if local == 0 else nullcontext() as named:
        file = Path(all_gather_object(named.name if named else "")[first]).open("r+b")  # noqa: SIM115
        all_gather_object(None)  # wait until all have opened it
    songs: dict[int, Song] = {}  # by number, without their stems
    with file:
        try:
            for number in range(local, count, processes):
                (song,) = synthesise_songs(number + 1, first=number, **options)
                file.seek(number * song.stems.nbytes)
                file.write(song.stems.numpy().data)
                songs[number] = replace(song, stems=torch.empty(0))
            file.flush()
        except OSError as error:
            error.add_note(f"while songs were written to {tempfile.gettempdir()}; TMPDIR names another folder")
            raise
        for part in all_gather_object(songs)[first : first + processes]:
            songs |= part
        stems = torch.from_numpy(np.memmap(file, np.float32, "c")).view(count, len(STEMS), 2, -1)
    return [replace(songs[number], stems=stems[number]) for number in range(count)]


def _index_song(
    song: TrackFolder, samples: int, stems: Sequence[str], sample_rate: int, channels: int
) -> tuple[FileTrack | None, list[str], list[Path]]:
    """The song (None if it has faults), its faults, and its files whose headers are correct."""
    lengths: dict[Path, int] = {}  # of the files with the right sample rate
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
            with open_regular(path) as raw, soundfile.SoundFile(raw) as header:
                frames, rate, count = header.frames, header.samplerate, header.channels
        except DamagedError as error:
            faults.append(f"{path}: {error}")
            continue
        except (soundfile.LibsndfileError, OSError) as error:
            faults.append(f"{path}: is broken ({reason(error)})")
            continue
        wrong = []
        if count != channels:
            wrong.append(f"has {count} channels, not {channels}")
        if rate != sample_rate:
            wrong.append(f"is at {rate} Hz, not {sample_rate}")
        elif frames == _UNKNOWN_LENGTH:
            wrong.append("does not say how long it is: convert it to WAV, or to FLAC again")
        else:
            lengths[path] = frames
        if frames < samples:
            wrong.append(f"is short, {frames} samples of at least {samples}")
        faults += [f"{path}: {fault}" for fault in wrong]
        if not wrong:
            readable.append(path)
    if lengths and max(lengths.values()) - min(lengths.values()) > sample_rate // 10:
        shortest, longest = (extreme(lengths, key=lengths.__getitem__) for extreme in (min, max))
        if shortest in readable:
            seconds = (lengths[longest] - lengths[shortest]) / sample_rate
            cause = f"it may be truncated, or {longest.name} claim too much"
            faults.append(f"{shortest}: ends {seconds:.1f} s before another stem of its song; {cause}")
            readable.remove(shortest)
    if faults:
        return None, faults, readable
    return FileTrack(song.name, tuple(readable), sample_rate, min(lengths.values()), channels), [], readable


def _search_file(path: Path, samples: int) -> dict[str, Any]:
    """Cache entry of a file: its size and modification times, the starts of its active windows, and its SHA-256."""
    stamp, step = _stamp(path), samples // 2
    starts: list[int] = []
    first, pending = 0, torch.empty(0)
    with AudioReader(path) as file, open_regular(path) as raw:
        frames = soundfile.SoundFile(raw).frames
        if file.frames != frames:  # for example when streams are chained
            raise AudioError(f"{path}: libsndfile finds {frames} of its {file.frames} samples: convert it to WAV")
        raw.seek(0)
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
        for block in file.blocks():
            pending = torch.cat((pending, block), dim=-1) if len(pending) else block
            starts += [first + start for start in salient_windows(pending, samples)]
            searched = max(0, (pending.shape[-1] - samples) // step + 1) * step
            first, pending = first + searched, pending[:, searched:]
    return {"stamp": stamp, "windows": starts, "sha256": sha256}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _read_cache(path: Path | None, samples: int) -> dict[str, dict[str, Any]]:
    """The cache's entries by file; empty if it is missing, damaged, or made with a different window length."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {"samples": None}
        entries = content["files"] if content["samples"] == samples else {}
        return {name: entry for name, entry in entries.items() if entry.keys() == {"stamp", "windows", "sha256"}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_cache(path: Path | None, samples: int, entries: dict[str, dict[str, Any]]) -> None:
    try:
        if path is None:
            raise OSError("there is no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"samples": samples, "files": entries}))
    except OSError as error:
        kept = "active windows cannot be kept, and the next run reads every file again"
        warnings.warn(f"{kept} ({error}): name a folder in XDG_CACHE_HOME", stacklevel=3)
