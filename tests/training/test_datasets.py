"""Songs in files: what is read, what is cached, what is reported."""

from __future__ import annotations

import json
import os
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from bsmamba2.data import Remixer, find_windows
from bsmamba2.synth import STEMS, Song, synthesise_songs
from bsmamba2.training import datasets
from bsmamba2.training.datasets import VALIDATION, DataError, FileTrack, find_active_windows, index_dataset
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
    with pytest.raises(DataError, match="is no folder"):
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
            said[str(song / "vocals.flac")] = "cannot be read to its end"
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
    said[str(train / "loose.wav")] = "lies beside"
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
    def unplugged(file: Any, *args: Any, **options: Any) -> Any:
        if Path(file).name == "drums.wav":
            raise soundfile.LibsndfileError(0, "no network: ")
        return read(file, *args, **options)

    read = soundfile.read
    training = look(folder)[0]
    monkeypatch.setattr(soundfile, "read", unplugged)
    assert [fault.split(": ")[0] for fault in find_active_windows(training, WINDOW, tmp_path / "cache.json")[1]] == [
        str(track.stems[1]) for track in training
    ]
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


def test_the_musdb_sample_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "musdb", None)
    with pytest.raises(ImportError, match="pip install musdb"):
        datasets.musdb_sample(100)

    def track(name: str) -> Any:
        sources = {stem: types.SimpleNamespace(audio=np.full((500, 2), i / 10)) for i, stem in enumerate(STEMS)}
        return types.SimpleNamespace(name=name, rate=RATE, sources=sources)

    stand_in = types.ModuleType("musdb")
    database = types.SimpleNamespace(root="x", tracks=[track("A - One"), track("Leaf - Summerghost")])
    stand_in.DB = lambda download, subsets: database  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "musdb", stand_in)
    training, validation = datasets.musdb_sample(100)
    assert [song.name for song in training] == ["A - One"]
    assert [song.name for song in validation] == ["Leaf - Summerghost"]
    assert training[0].stems.shape == (4, 2, 500)
    assert training[0].stems[2].unique().tolist() == pytest.approx([0.2])
    with pytest.raises(DataError, match="500 samples"):
        datasets.musdb_sample(1000)
