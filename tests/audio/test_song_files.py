"""Separation from file to files: channels, rates, formats, levels, memory."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_files import found_in, wave
from stand_in_models import Identity
from tiny_model import TINY
from torch import Tensor

from bsmamba2 import BSMamba2
from bsmamba2.audio import song_files
from bsmamba2.audio.files import AudioError, AudioReader, read
from bsmamba2.audio.resample import resample
from bsmamba2.audio.song_files import channel_groups, join_channels, separate_file, split_channels
from bsmamba2.audio.writer import _ErrorCapturingFile
from bsmamba2.separate import separate


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 64])
def test_channels_are_paired_in_order(count: int) -> None:
    signal = torch.randn(count, 10)
    groups = channel_groups(count)
    songs = split_channels(signal, groups)
    assert songs.shape == ((count + 1) // 2, 2, 10)
    for channel in range(count):
        assert torch.equal(songs[channel // 2, channel % 2], signal[channel])
    if count % 2:
        assert torch.equal(songs[-1, 1], signal[-1])
    stems = torch.stack([songs, 2 * songs], dim=1)  # (b, stem, c, samples)
    assert torch.equal(join_channels(stems, groups), torch.stack([signal, 2 * signal]))


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        ("FC", [["FC"]]),
        ("FL FR LFE", [["FL", "FR"], ["LFE"]]),
        ("FL FR FC LFE BL BR", [["FL", "FR"], ["FC"], ["LFE"], ["BL", "BR"]]),
        ("FL FR FC LFE BC SL SR", [["FL", "FR"], ["FC"], ["LFE"], ["BC"], ["SL", "SR"]]),
        ("FL FC LFE BR", [["FL"], ["FC"], ["LFE"], ["BR"]]),
        (
            "FL FR FC BL BR FLC FRC SL SR TFL TFC TFR TBL TBR",
            [["FL", "FR"], ["FC"], ["BL", "BR"], ["FLC", "FRC"], ["SL", "SR"], ["TFL", "TFR"], ["TFC"], ["TBL", "TBR"]],
        ),
    ],
)
def test_speakers_are_paired_by_their_names(layout: str, groups: list[list[str]]) -> None:
    names = layout.split()
    found = channel_groups(len(names), 2, names)
    assert [[names[i] for i in group] for group in found] == groups
    signal = torch.randn(len(names), 10)
    songs = split_channels(signal, found)
    assert torch.equal(join_channels(torch.stack([songs, 2 * songs], dim=1), found), torch.stack([signal, 2 * signal]))
    assert channel_groups(len(names), 1, names) == [(i,) for i in range(len(names))]


def surround(path: Path, channels: int = 6, rate: int = 8000, frames: int = 9001) -> Path:
    """A WAV file with a channel mask where libsndfile has a usual one (5.1)."""
    samples = np.random.default_rng(0).normal(0, 0.1, (frames, channels)).clip(-1, 1)
    soundfile.write(path, samples, rate, format="WAVEX", subtype="PCM_16")
    return path


@pytest.mark.parametrize("format", ["wav", "wav16", "wav24", "flac"])
def test_a_surround_file_keeps_its_channels_and_its_layout(tmp_path: Path, format: str) -> None:
    song = surround(tmp_path / "song.wav")
    model = Identity()
    done = separate_file(model, song, tmp_path / "out" / "song", segment=0.5, format=format)  # type: ignore[arg-type]
    assert {shape[0] for shape in model.shapes} == {1}
    with AudioReader(song) as before, AudioReader(done.paths["vocals"]) as after:
        assert before.layout == ("FL", "FR", "FC", "LFE", "BL", "BR")
        assert after.layout in (before.layout, ("FL", "FR", "FC", "LFE", "SL", "SR")[: 6 if format == "flac" else 0])
        found, expected = (torch.cat(list(file.blocks()), dim=-1) for file in (after, before))
    assert torch.equal(found, expected)


class Panned(Identity):
    """Its stem is the mean of both channels, so that pairs show: in each of a pair, and a single one as it was."""

    def forward(self, mixture: Tensor) -> Tensor:
        return super().forward(mixture).mean(2, keepdim=True).expand(-1, -1, 2, -1)


def test_pairs_are_of_the_speakers_and_not_of_neighbours(tmp_path: Path) -> None:
    song = surround(tmp_path / "song.wav")
    done = separate_file(Panned(), song, tmp_path / "song", segment=0.5)  # type: ignore[arg-type]
    before, found = read(song)[0], read(done.paths["vocals"])[0]
    for channel, others in enumerate([(0, 1), (0, 1), (2,), (3,), (4, 5), (4, 5)]):
        torch.testing.assert_close(found[channel], before[list(others)].mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"look_ahead": 0.1}, {"tta": True, "shifts": 2}], ids=str)
@pytest.mark.parametrize("rate", [8000, 11_025])
def test_many_channels_in_several_passes_are_those_of_one(
    tiny: BSMamba2, tmp_path: Path, options: dict, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    song, told = surround(tmp_path / "song.wav", 5, rate), []
    found = []
    for at_once in (1000, 1):
        monkeypatch.setattr(song_files, "_SONGS_AT_ONCE", at_once)
        base = tmp_path / str(at_once)
        told.clear()
        done = separate_file(tiny, song, base, segment=0.5, progress=lambda *x: told.append(x), **options)
        found.append([read(path)[0] for path in done.paths.values()])
        assert sum(samples for samples, _ in told) == told[0][1]
    for one, several in zip(*found, strict=True):
        assert torch.equal(one, several)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset through /proc")
def test_many_channels_take_little_memory(tmp_path: Path) -> None:
    """Nine seconds at the model's rate of 44,100 Hz: at once, 255 channels of segments would take gigabytes."""
    model = Identity()
    model.config = replace(TINY, sample_rate=44_100)
    song = surround(tmp_path / "song.wav", 255, 44_100, 50)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    done = separate_file(model, song, tmp_path / "out", segment=2.0)  # type: ignore[arg-type]
    assert resident("VmHWM") - before < 300
    assert torch.equal(read(done.paths["vocals"])[0], read(song)[0])


@pytest.mark.parametrize("way", [{"overlap": 0.0}, {"overlap": 0.5}, {"look_ahead": 0.2}], ids=str)
@pytest.mark.parametrize(
    ("subtype", "format"), [("FLOAT", "wav"), ("PCM_24", "wav24"), ("PCM_16", "wav16"), ("PCM_24", "flac")]
)
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_an_identity_writes_the_file_it_read(
    tmp_path: Path, way: dict, subtype: str, format: str, channels: int
) -> None:
    rng = np.random.default_rng(0)
    loud = 0.3 if subtype != "FLOAT" else 3.0
    frames = (
        np.clip(rng.normal(0, loud, (70_001, channels)), -1, 1) if loud < 1 else rng.normal(0, loud, (70_001, channels))
    )
    song = tmp_path / ("song.flac" if format == "flac" else "song.wav")
    soundfile.write(song, frames, 8000, subtype=subtype)
    done = separate_file(Identity(), song, tmp_path / "out" / "song", segment=0.3, format=format, **way)  # type: ignore[arg-type]
    assert done.gain == 1
    found, rate = read(done.paths["vocals"])
    assert rate == 8000
    assert torch.equal(found, read(song)[0])
    assert soundfile.info(done.paths["vocals"]).subtype == subtype
    assert not read(done.paths["instrumental"])[0].any()


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 96_000, 384_000, 7_919])
def test_another_rate_comes_back_as_it_was(tmp_path: Path, rate: int) -> None:
    """A tone that both rates hold survives two resamplings; length and rate stay, and the results add up."""
    time = np.arange(rate // 2 + 37) / rate
    soundfile.write(tmp_path / "song.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="FLOAT")
    done = separate_file(Identity(), tmp_path / "song.wav", tmp_path / "song")  # type: ignore[arg-type]
    song, vocals, instrumental = (
        read(path)[0] for path in (tmp_path / "song.wav", done.paths["vocals"], done.paths["instrumental"])
    )
    assert soundfile.info(done.paths["vocals"]).samplerate == rate
    assert vocals.shape == song.shape == (1, len(time))
    torch.testing.assert_close(vocals + instrumental, song, rtol=0, atol=1e-7)
    middle = slice(rate // 10, -rate // 10)
    torch.testing.assert_close(vocals[:, middle], song[:, middle], rtol=0, atol=1e-4)


def test_the_pieces_of_a_file_are_the_whole(tiny: BSMamba2, tmp_path: Path) -> None:
    """Reading, resampling, separating, resampling and writing in pieces: the same as each of them on the whole."""
    song = torch.randn(2, 70_000, generator=torch.Generator().manual_seed(0)) * 0.1
    soundfile.write(tmp_path / "song.wav", song.T.numpy(), 11_025, subtype="FLOAT")
    done = separate_file(tiny, tmp_path / "song.wav", tmp_path / "song", segment=0.5)
    there = resample(song, 11_025, TINY.sample_rate)
    expected = resample(separate(tiny, there, segment=0.5)[0], TINY.sample_rate, 11_025)[:, :70_000]
    assert torch.equal(read(done.paths["vocals"])[0], expected)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is reset through /proc")
@pytest.mark.parametrize(("long", "way"), [(120, {}), (30, {"look_ahead": 2.0})])
def test_two_hours_take_the_memory_of_two_minutes(tmp_path: Path, long: int, way: dict) -> None:
    peaks = {}
    for minutes in (2, long):
        song = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(song, "w", 8000, 1, "PCM_16") as file:
            for _ in range(minutes):
                file.write(np.zeros(60 * 8000, dtype="int16"))
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        done = separate_file(Identity(), song, tmp_path / "out" / song.stem, **way)  # type: ignore[arg-type]
        peaks[minutes] = resident("VmHWM") - before
        assert soundfile.info(done.paths["vocals"]).frames == minutes * 60 * 8000
        for path in (*done.paths.values(), song):
            path.unlink()
    assert peaks[long] < peaks[2] + 30, peaks  # of two hours, 230 MB of samples in, twice as many out


def resident(field: str) -> float:
    """VmRSS, the memory in use, or VmHWM, its peak, in megabytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1000


@pytest.mark.parametrize("name", ["instrumental", "Instrumental"])
def test_a_stem_may_not_be_called_as_what_is_left(name: str, tmp_path: Path) -> None:
    model = BSMamba2(replace(TINY, stems=(name, "vocals")))
    with pytest.raises(ValueError, match="give the stem another name"):
        separate_file(model, wave(tmp_path / "song.wav"), tmp_path / "out")
    assert found_in(tmp_path) == ["song.wav"]


@pytest.mark.parametrize("format", ["wav", "wav16", "flac", "ogg", "mp3"])
def test_a_disk_that_fills_up_at_any_byte(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a real disk: the write that passes a limit fails, wherever in a file that is."""
    song = wave(tmp_path / "song.wav", frames=20_000)
    room = [0]
    whole = FileIO.write

    def write(self: FileIO, data: bytes) -> int:
        if len(data) > room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return whole(self, data)

    monkeypatch.setattr(_ErrorCapturingFile, "_store", write)
    failures = 0
    for room[0] in (0, 40, 100, 3000, 70_000, 200_000, 1 << 24):
        output = tmp_path / f"out {room[0]}"
        try:
            separate_file(Identity(), song, output / "song", format=format)  # type: ignore[arg-type]
        except AudioError as error:
            failures += 1
            assert "No space left on device" in str(error)  # noqa: PT017
            assert not list(output.iterdir())
        else:
            assert len(list(output.iterdir())) == 2
    assert 3 <= failures <= 6
