"""Songs in files: what is read, what is cached, what is reported."""

from __future__ import annotations

import hashlib
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_files import device, pipe

from bsmamba2.audio.files import AudioError, AudioReader
from bsmamba2.data import Remixer, find_windows, salient_windows
from bsmamba2.synth import STEMS, Song, synthesise_songs
from bsmamba2.training import datasets
from bsmamba2.training.datasets import (
    VALIDATION,
    DataError,
    FileTrack,
    cache_path,
    find_active_windows,
    fingerprints,
    index_dataset,
    search_dataset,
)
from bsmamba2.training.loader import Loader

RATE = 8000

WINDOW = 8000


def write(folder: Path, song: Song, stems: tuple[str, ...] = STEMS) -> None:
    folder.mkdir(parents=True)
    for name in stems:
        soundfile.write(folder / f"{name}.wav", song.stem(name).T.numpy(), song.sample_rate, subtype="FLOAT")


@pytest.fixture(scope="module")
def pool() -> list[Song]:
    return synthesise_songs(5, seed=5, seconds=3.0, sample_rate=RATE)


@pytest.fixture
def folder(pool: list[Song], tmp_path: Path) -> Path:
    """Like MUSDB18-HQ: four songs to train with, one to validate with, one to test with."""
    names = ["A - One", "B - Two", "C - Three", "Triviul - Angelsaint", "Z - Last"]
    for name, song in zip(names, pool, strict=True):
        write(tmp_path / "hq" / "train" / name, song)
        soundfile.write(tmp_path / "hq" / "train" / name / "mixture.wav", song.mixture.T.numpy(), RATE)
    write(tmp_path / "hq" / "test" / "T - Never seen", pool[0])
    return tmp_path / "hq"


def look(folder: Path, **options: Any) -> tuple[list[FileTrack], list[FileTrack], list[str]]:
    return index_dataset(folder, WINDOW, sample_rate=RATE, **options)[:3]


def test_the_validation_songs_are_musdbs_fourteen() -> None:
    assert len(VALIDATION) == 14
    assert {"Actions - One Minute Smile", "Traffic Experiment - Sirens"} < VALIDATION


def test_songs_are_split_by_name_and_the_test_part_is_left_alone(folder: Path) -> None:
    training, validation, faults = look(folder)
    assert [track.name for track in training] == ["A - One", "B - Two", "C - Three", "Z - Last"]
    assert [track.name for track in validation] == ["Triviul - Angelsaint"]
    assert faults == []


def test_a_folder_with_its_own_validation_or_none(pool: list[Song], tmp_path: Path) -> None:
    for i in range(12):
        write(tmp_path / "plain" / f"song {i:02d}", pool[i % 5], ("vocals", "other"))
    training, validation, _ = look(tmp_path / "plain", stems=("vocals", "other"))
    assert [track.name for track in validation] == ["song 09"]
    assert len(training) == 11
    write(tmp_path / "own" / "train" / "Triviul - Angelsaint", pool[0])
    write(tmp_path / "own" / "valid" / "x", pool[1])
    training, validation, _ = look(tmp_path / "own")
    assert ([track.name for track in training], [track.name for track in validation]) == (
        ["Triviul - Angelsaint"],
        ["x"],
    )
    with pytest.raises(DataError, match="is not a folder"):
        look(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="at least two folders"):
        look(tmp_path / "empty")


def test_pieces_are_what_stands_in_the_file(folder: Path, pool: list[Song]) -> None:
    track = look(folder)[0][1]
    assert torch.equal(track.crop(2, 5000, 300), pool[1].stems[2, :, 5000:5300])
    with pytest.raises(OSError, match=r"bass\.wav: only 1000 of 8000"):
        track.crop(2, pool[1].samples - 1000, 8000)
    track.stems[2].write_bytes(b"gone")
    with pytest.raises(OSError, match=r"bass\.wav: samples 0 to 8000 cannot be read"):
        track.crop(2, 0, 8000)


@pytest.mark.parametrize("replaced", [pipe, device], ids=["pipe", "device"])
def test_a_stem_that_became_a_pipe_or_a_device_is_named_at_once(folder: Path, tmp_path: Path, replaced: Any) -> None:
    """Whether it was replaced before it is searched for activity, or during the run."""
    tracks = look(folder)[0]
    bass = replaced(tracks[1].stems[2])
    with pytest.raises(OSError, match=r"bass\.wav: samples 0 to 100 cannot be read \(is not a regular file\)"):
        tracks[1].crop(2, 0, 100)
    faults = find_active_windows(tracks, WINDOW, tmp_path / "cache.json")[1]
    assert len(faults) == 1
    assert faults[0].startswith(f"{bass}: is not a regular file")
    assert look(folder)[2] == [f"{bass}: is not a regular file"]


def test_reading_a_piece_does_not_read_the_song(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = look(folder)[0][0]
    asked = []
    read = soundfile.SoundFile.read

    def note(self: Any, frames: int = -1, *args: Any, **kwargs: Any) -> Any:
        asked.append(frames)
        return read(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", note)
    track.crop(0, 1000, 500)
    assert asked == [500]


def test_windows_and_examples_of_files_are_those_of_the_songs(folder: Path, pool: list[Song], tmp_path: Path) -> None:
    training, _, _ = look(folder)
    found, faults = find_active_windows(training, WINDOW, tmp_path / "cache.json")
    assert faults == []
    in_memory = [pool[i] for i in (0, 1, 2, 4)]
    expected = find_windows(in_memory, WINDOW)
    assert [[start for _, start in stem] for stem in found] == [[start for _, start in stem] for stem in expected]
    pairs = zip(Loader(Remixer(found, WINDOW, 3)), Loader(Remixer(in_memory, WINDOW, 3)), strict=True)
    for one, two in islice(pairs, 4):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert str(folder) in one[2][0]


def test_activity_is_found_once_and_again_where_a_file_changes(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kept" / "cache.json"
    read: list[Path] = []

    def note(paths: Any) -> Any:
        for path in paths:
            read.append(path)
            yield path

    def again(window: int = WINDOW) -> tuple[int, Any]:
        read.clear()
        found, _ = find_active_windows(look(folder)[0], window, cache, progress=note)
        return len(read), [[start for _, start in stem] for stem in found]

    count, first = again()
    assert count == 4 * 4
    assert again() == (0, first)
    vocals = folder / "train" / "B - Two" / "vocals.wav"
    frames, rate = soundfile.read(vocals)
    soundfile.write(vocals, frames * 0, rate, subtype="FLOAT")  # the size stays, the time does not
    os.utime(vocals, ns=(1, 1))
    count, second = again()
    assert count == 1
    assert len(second[0]) < len(first[0])
    assert second[1:] == first[1:]
    assert again(WINDOW // 2)[0] == 16  # another window
    cache.write_text(cache.read_text()[:50])  # a damaged cache is no cache
    assert again(WINDOW // 2)[0] == 16
    assert set(json.loads(cache.read_text())) == {"samples", "files"}


def test_an_interrupted_search_keeps_what_it_found(folder: Path, tmp_path: Path) -> None:
    def interrupted(paths: Any) -> Any:
        yield from paths[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_active_windows(look(folder)[0], WINDOW, tmp_path / "cache.json", progress=interrupted)
    rest: list[Path] = []
    find_active_windows(
        look(folder)[0], WINDOW, tmp_path / "cache.json", progress=lambda paths: rest.extend(paths) or paths
    )
    assert len(rest) == 11


NAMES = ("broken", "short", "mono", "rate", "misnamed", "truncated", "nan", "flac", "siblings", "twice")


def plant_faults(folder: Path, pool: list[Song]) -> dict[str, str]:
    """A dozen faults, and a part of what should be said of each."""
    train = folder / "train"
    silence = np.zeros((3 * RATE, 2), np.float32)
    said = {}
    for number, name in enumerate(NAMES):
        song = train / f"fault {number} {name}"
        write(song, pool[number % 5])
        vocals, drums = song / "vocals.wav", song / "drums.wav"
        if name == "broken":
            vocals.write_bytes(b"RIFF no audio")
            said[str(vocals)] = "is broken"
        elif name == "short":
            for stem in STEMS:
                soundfile.write(song / f"{stem}.wav", silence[:100], RATE)
                said[str(song / f"{stem}.wav")] = "is short, 100 samples of at least 8000"
        elif name == "mono":
            soundfile.write(vocals, silence[:, 0], RATE)
            said[str(vocals)] = "has 1 channels, not 2"
        elif name == "rate":
            soundfile.write(drums, silence, 48_000)
            said[str(drums)] = "is at 48000 Hz, not 8000"
        elif name == "misnamed":
            vocals.rename(song / "Vocal.wav")
            said[str(song / "vocals")] = "there is Vocal.wav, bass.wav, drums.wav, other.wav"
        elif name == "truncated":
            drums.write_bytes(drums.read_bytes()[: drums.stat().st_size // 2])
            said[str(drums)] = "it may be truncated"
        elif name == "nan":
            soundfile.write(vocals, silence * np.nan, RATE, subtype="FLOAT")
            said[str(vocals)] = "NaN"
        elif name == "flac":  # its header tells the whole length all the same
            vocals.unlink()
            soundfile.write(song / "vocals.flac", pool[0].vocals.T.numpy(), RATE)
            whole = (song / "vocals.flac").read_bytes()
            (song / "vocals.flac").write_bytes(whole[: len(whole) // 2])
            said[str(song / "vocals.flac")] = "damaged or cut short"
        elif name == "siblings":  # one fault hides none of the others
            soundfile.write(vocals, silence[:, 0], RATE)
            said[str(vocals)] = "has 1 channels, not 2"
            soundfile.write(drums, silence * np.nan, RATE, subtype="FLOAT")
            said[str(drums)] = "NaN"
            soundfile.write(song / "bass.wav", silence[: 2 * RATE], RATE)
            said[str(song / "bass.wav")] = "it may be truncated"
        else:
            soundfile.write(song / "vocals.flac", silence, RATE)
            said[str(song / "vocals")] = "there is vocals.flac, vocals.wav"
    soundfile.write(train / "loose.wav", silence, RATE)
    said[str(train / "loose.wav")] = "is outside the songs' folders"
    return said


def test_every_fault_is_reported_at_once_with_its_path(folder: Path, pool: list[Song], tmp_path: Path) -> None:
    said = plant_faults(folder, pool)
    training, validation, faults, others = index_dataset(folder, WINDOW, sample_rate=RATE)
    windows, inside = find_active_windows(training + validation, WINDOW, tmp_path / "cache.json", others=others)
    told = dict(fault.split(": ", 1) for fault in faults + inside)
    assert told.keys() == said.keys()
    for path, part in said.items():
        assert part in told[path]
    assert {track.name for stem in windows for track, _ in stem} <= {path.name for path in (folder / "train").iterdir()}
    assert not any("fault" in track.name for stem in windows for track, _ in stem)
    again = find_active_windows(training + validation, WINDOW, tmp_path / "cache.json", others=others)[1]
    assert again == inside  # from the cache, too


def test_what_could_not_be_read_is_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unplugged(path: Path) -> AudioReader:
        if path.name == "drums.wav":
            raise AudioError(f"{path}: no network")
        return AudioReader(path)

    training = look(folder)[0]
    monkeypatch.setattr(datasets, "AudioReader", unplugged)
    faults = find_active_windows(training, WINDOW, tmp_path / "cache.json")[1]
    assert faults == [f"{track.stems[1]}: no network" for track in training]
    monkeypatch.undo()
    missing: list[Path] = []
    _, faults = find_active_windows(
        training, WINDOW, tmp_path / "cache.json", progress=lambda paths: missing.extend(paths) or paths
    )
    assert faults == []
    assert missing == sorted(track.stems[1] for track in training)


def test_what_was_found_is_written_down_on_the_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal that nobody handles leaves no time to write."""
    monkeypatch.setattr(datasets, "FILES_BETWEEN", 5)
    cache, kept = tmp_path / "cache.json", []

    def watched(paths: Any) -> Any:
        for path in paths:
            kept.append(len(json.loads(cache.read_text())["files"]) if cache.exists() else 0)
            yield path

    find_active_windows(look(folder)[0], WINDOW, cache, progress=watched)
    assert kept == [0] * 5 + [5] * 5 + [10] * 5 + [15]


def songs(folder: Path, pool: list[Song], count: int) -> Path:
    for i in range(count):
        write(folder / f"song {i}", pool[i])
    return folder


def search(folder: Path, **options: Any) -> tuple[set[str], set[str]]:
    """The names of the songs to train and to validate with."""
    parts = search_dataset(folder, WINDOW, sample_rate=RATE, **options)
    training, validation = ({track.name for stem in part for track, _ in stem} for part in parts)
    return training, validation


def flac(path: Path, length: int) -> None:
    """A FLAC in whose header the length, 36 bits of samples, is another one; 0 means unknown."""
    frames, rate = soundfile.read(path)
    path.unlink()
    path = path.with_suffix(".flac")
    soundfile.write(path, frames, rate)
    content = bytearray(path.read_bytes())
    content[21:26] = ((content[21] >> 4 << 36) + length).to_bytes(5, "big")
    path.write_bytes(content)


def with_nan(path: Path) -> None:
    frames, rate = soundfile.read(path)
    frames[-1] = np.nan
    soundfile.write(path, frames, rate, subtype="FLOAT")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (pipe, "bass.wav: is not a regular file"),
        (device, "bass.wav: is not a regular file"),
        (lambda path: flac(path, 0), "bass.flac: does not say how long it is"),
        (lambda path: flac(path, (1 << 36) - 1), "bass.flac: .*cut short"),
        (lambda path: flac(path, 3 * RATE + 500), "bass.flac: .*cut short"),
        (lambda path: path.write_bytes(b""), "bass.wav: is broken"),
        (with_nan, "bass.wav: holds NaN"),
    ],
)
@pytest.mark.parametrize("song", ["song 1", "song 3"])  # the last one would validate
def test_a_faulty_file_is_named_and_its_song_can_be_skipped(
    pool: list[Song], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str, song: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = songs(tmp_path / "data", pool, 4)
    damage(folder / song / "bass.wav")
    for _ in range(2):  # the second time with a cache
        with pytest.raises(DataError, match=f"{song}/{said}"):
            search(folder)
        with pytest.warns(UserWarning, match=f"{song}/{said}"):
            training, validation = search(folder, on_bad_file="skip")
        assert training | validation == {"song 0", "song 1", "song 2", "song 3"} - {song}
        assert validation == {"song 2" if song == "song 3" else "song 3"}


def test_two_songs_are_needed_and_stems_that_sound(
    pool: list[Song], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"(?s)one song that can be used; two are needed.*at least two folders"):
        search(songs(tmp_path / "one", pool, 1))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"1 fault\n  holds no song"):
        search(tmp_path / "none")
    two = songs(tmp_path / "two", pool, 2)
    assert search(two) == ({"song 0"}, {"song 1"})
    bass = two / "song 0" / "bass.wav"
    soundfile.write(bass, np.zeros((3 * RATE, 2)), RATE)
    with pytest.raises(DataError, match="no song to train with has bass that sound for 1 s"):
        search(two)
    for i in range(2):
        soundfile.write(two / f"song {i}" / "vocals.wav", np.zeros((3 * RATE, 2)), RATE)
    with pytest.raises(DataError, match="no song to validate with has vocals"):
        search(two)
    assert search(two, targets=(1,), stems=("other", "drums")) == ({"song 0"}, {"song 1"})


@pytest.mark.parametrize("place", ["file", "nowhere"])
def test_a_cache_that_cannot_be_written_is_a_warning(
    pool: list[Song], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = songs(tmp_path / "data", pool, 2)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    if place == "nowhere":  # a user who is not in the list of users, in a container for one
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
        assert cache_path(folder, WINDOW) is None
    with pytest.warns(UserWarning, match="cannot be kept, and the next run reads every file again.*XDG_CACHE_HOME"):
        assert search(folder) == ({"song 0"}, {"song 1"})


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"samples": 8000}', '{"samples": 8000, "files": {"x": 3}}', "\0"]
)
def test_a_damaged_cache_is_none(folder: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(content)
    assert find_active_windows(look(folder)[0][:1], WINDOW, cache)[1] == []
    assert len(json.loads(cache.read_text())["files"]) == 4


@pytest.mark.parametrize("window", [1000, 8001, 70_000])
def test_files_are_searched_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """The same windows as in the whole stem, and never more of it in memory than a window and two blocks."""
    g = torch.Generator().manual_seed(1)
    loudness = torch.rand(1, 200_003 // 500 + 1, generator=g).round().repeat_interleave(500, 1)[:, :200_003]
    stem = torch.rand(2, 200_003, generator=g) * 0.1 * loudness
    paths = tuple(tmp_path / f"{name}.wav" for name in STEMS)
    for path in paths:
        soundfile.write(path, stem.T.numpy(), RATE, subtype="FLOAT")
    longest = []

    def note(stem: torch.Tensor, samples: int) -> list[int]:
        longest.append(stem.shape[-1])
        return salient_windows(stem, samples)

    monkeypatch.setattr(datasets, "salient_windows", note)
    track = FileTrack("song", paths, RATE, 200_003)
    found, _ = find_active_windows([track], window, tmp_path / "cache.json")
    expected = salient_windows(stem, window)
    assert len(expected) > 1
    assert [[start for _, start in each] for each in found] == [expected] * 4
    assert max(longest) <= window + 2 * 65_536


def test_songs_are_known_by_the_content_of_their_files(folder: Path, tmp_path: Path) -> None:
    def known() -> dict[str, str]:
        return fingerprints(find_active_windows(look(folder)[0], WINDOW, tmp_path / "cache.json")[0])

    first = known()
    assert len(first) == 16
    vocals = folder / "train" / "A - One" / "vocals.wav"
    assert first["A - One/vocals.wav"] == hashlib.sha256(vocals.read_bytes()).hexdigest()
    content = bytearray(vocals.read_bytes())
    content[-1] ^= 1
    vocals.write_bytes(content)
    second = known()
    assert {name for name in first if first[name] != second[name]} == {"A - One/vocals.wav"}
    assert fingerprints([[(synthesise_songs(1, seconds=1.0)[0], 0)]]) == {}


def test_a_file_that_changes_during_the_run_is_named(folder: Path) -> None:
    track = look(folder)[0][0]
    for rate, channels in ((RATE, 1), (RATE // 2, 2)):
        soundfile.write(track.stems[0], np.zeros((3 * RATE, channels)), rate)
        with pytest.raises(OSError, match=rf"vocals\.wav: was changed.* {channels} channels at {rate} Hz"):
            track.crop(0, 0, 100)


def test_a_relative_path_finds_the_windows_of_an_absolute_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_active_windows(look(folder)[0], WINDOW, tmp_path / "cache.json")[0]
    monkeypatch.chdir(folder)
    read_again: list[Path] = []
    songs = look(Path())[0]
    found = find_active_windows(
        songs, WINDOW, tmp_path / "cache.json", progress=lambda paths: read_again.extend(paths) or paths
    )[0]
    assert not read_again
    assert [[start for _, start in stem] for stem in found] == [[start for _, start in stem] for stem in first]
