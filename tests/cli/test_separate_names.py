"""Names of songs and results in the command `separate`: the same twice, alike, hidden, left out, with wildcards."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from audio_files import found_in, poke, wave, with_bytes

from bsmamba2 import BSMamba2, save_checkpoint
from bsmamba2.audio.files import read
from bsmamba2.cli import main as command_line
from bsmamba2.cli.separate import expand_wildcards, find_songs


@pytest.fixture
def checkpoint(tiny: BSMamba2, tmp_path: Path) -> Path:
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def separate(checkpoint: Path, *arguments: str | Path, code: int = 0) -> None:
    """Run the command, with results in `out` next to the checkpoint."""
    options = ["--checkpoint", str(checkpoint), "-o", str(checkpoint.parent / "out"), "--backend", "plain"]
    assert command_line.main(["separate", *map(str, arguments), *options, "--segment", "0.1"]) == code


def results(*bases: str) -> list[str]:
    return sorted(f"{base}.{stem}.wav" for base in bases for stem in ("instrumental", "vocals"))


def make(path: Path, frames: int = 900) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return wave(path, frames=frames)


def test_a_file_that_is_named_twice_is_done_once(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    song = make(tmp_path / "album" / "song.wav")
    (tmp_path / "link").symlink_to("album")
    other_names = [tmp_path / "album" / ".." / "album" / "song.wav", tmp_path / "link" / "song.wav", song.parent]
    separate(checkpoint, song, song, *other_names)
    said = capfd.readouterr()
    assert said.err == ""
    assert len(said.out.splitlines()) == 2
    assert found_in(tmp_path / "out") == results("song")


def test_of_several_folders_each_keeps_its_own(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("CD1/01.wav", "CD2/01.wav", "CD2/more/02.wav"):
        make(tmp_path / name)
    separate(checkpoint, tmp_path / "CD1", tmp_path / "CD2", tmp_path / "CD1")
    assert found_in(tmp_path / "out") == results("CD1/01", "CD2/01", "CD2/more/02")


def test_folders_of_one_name_are_told_apart_by_advice(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/CD/01.wav", "b/CD/01.wav"):
        make(tmp_path / name)
    separate(checkpoint, tmp_path / "a" / "CD", tmp_path / "b" / "CD", code=1)
    first, second = (tmp_path / name / "CD" / "01.wav" for name in "ab")
    line = f"{second}: its results would replace those of {first}; give it another folder with -o\n"
    assert capfd.readouterr().err == line


ALIKE = [
    ("Song", "song"),
    (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
    ("STRASSE", "straße"),
]


@pytest.mark.parametrize(("first", "second"), ALIKE)
def test_names_that_differ_by_case_or_unicode_form_never_replace_each_other(
    first: str, second: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "1" / f"{first}.wav", 700)
    make(tmp_path / "2" / f"{second}.wav", 800)
    songs = [tmp_path / "1" / f"{first}.wav", tmp_path / "2" / f"{second}.wav"]
    separate(checkpoint, *songs)
    assert found_in(tmp_path / "out") == results(first, second)
    assert [read(tmp_path / "out" / f"{name}.vocals.wav")[0].shape[1] for name in (first, second)] == [700, 800]
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    for stem in ("vocals", "instrumental"):  # as on a file system where the two are one name
        (tmp_path / "out" / f"{second}.{stem}.wav").symlink_to(f"{first}.{stem}.wav")
    capfd.readouterr()
    separate(checkpoint, *songs, "--overwrite", code=1)
    (line,) = capfd.readouterr().err.splitlines()
    assert "its results would replace those of" in line
    assert read(tmp_path / "out" / f"{first}.vocals.wav")[0].shape[1] == 700


@pytest.mark.parametrize("name", [".wav", "..wav", "...wav", "....wav", ".hidden.wav", "..x.wav"])
def test_results_lie_in_the_output_folder_and_can_be_seen(name: str, checkpoint: Path, tmp_path: Path) -> None:
    song = make(tmp_path / "songs" / "plain.wav").rename(tmp_path / "songs" / name)
    before = found_in(tmp_path)
    separate(checkpoint, song)
    new = set(found_in(tmp_path)) - set(before)
    assert len(new) == 2
    assert all(Path(path).parent == Path("out") and not Path(path).name.startswith(".") for path in new)


def test_a_folder_says_what_it_left_out(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    album = make(tmp_path / "album" / "a.wav").parent
    separate(checkpoint, album)
    assert capfd.readouterr().err == ""
    for name in ("cover.jpg", "b.cue", "more/c.txt", ".hidden", ".git/config", "song"):
        (album / name).parent.mkdir(exist_ok=True)
        with_bytes(album / name, b"no sound")
    separate(checkpoint, album, "--overwrite")
    line = f"{album}: left out, no audio files: 4 (b.cue, cover.jpg, song, ...)\n"
    assert capfd.readouterr().err == line
    (album / "out").mkdir()
    with_bytes(album / "out" / "notes.txt", b"no song")
    jobs, failed = find_songs([album], album / "out")
    assert (jobs, failed) == ({album / "a.wav": album / "out" / "a"}, 0)
    assert capfd.readouterr().err == line


def test_files_that_state_no_length_are_counted_in_one_line(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    songs = [poke(wave(tmp_path / f"{number}.au"), 8, b"\xff" * 4) for number in range(3)]
    end = "length; if an end was cut off, nothing shows it\n"
    separate(checkpoint, songs[1])
    assert capfd.readouterr().err == f"{songs[1]}: does not state its {end}"
    separate(checkpoint, *songs, wave(tmp_path / "stated.wav"), "--overwrite")
    assert capfd.readouterr().err == f"{songs[0]} and 2 more: these files do not state their {end}"


def test_wildcards_are_expanded_where_the_shell_leaves_them(tmp_path: Path) -> None:
    for name in ("b.wav", "a.wav", "c.mp3", "[1].wav"):
        (tmp_path / name).touch()
    given = [tmp_path / "*.wav", tmp_path / "?.mp3", tmp_path / "[1].wav", tmp_path / "*.flac", tmp_path / "x.wav"]
    expected = ["[1].wav", "a.wav", "b.wav", "c.mp3", "[1].wav", "*.flac", "x.wav"]
    assert expand_wildcards(given) == [tmp_path / name for name in expected]
    assert os.name == "nt" or find_songs([tmp_path / "*.wav"], tmp_path)[0] == {tmp_path / "*.wav": tmp_path / "*"}
