"""The command `separate`: songs and folders, levels, bad input in one line each."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from audio_files import cut, folder, found_in, pipe, poke, wave, with_bytes, with_samples
from stand_in_models import Identity
from torch import Tensor

from bsmamba2 import BSMamba2, save_checkpoint
from bsmamba2.audio.files import read
from bsmamba2.audio.song_files import separate_file
from bsmamba2.audio.streaming import separate_stream
from bsmamba2.checkpoints import layouts, published_layout
from bsmamba2.cli import main as command_line
from bsmamba2.cli import separate as command


def main(arguments: list[str]) -> int:
    """Without kernels: the tiny model is too narrow for them, and `auto` logs that."""
    return command_line.main([*arguments, "--backend", "plain"])


@pytest.fixture
def checkpoint(tiny: BSMamba2, tmp_path: Path) -> Path:
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("rate", "channels"), [(8000, 2), (8000, 1), (44_100, 2), (11_025, 1), (8000, 6)])
@pytest.mark.parametrize("format", ["wav", "ogg", "mp3"])
def test_command_keeps_rate_length_and_channels(
    checkpoint: Path, tmp_path: Path, rate: int, channels: int, format: str
) -> None:
    if format == "mp3" and channels > 2:
        pytest.skip("MP3 has one or two channels")
    song = tmp_path / "a song – Lied.wav"
    samples = np.random.default_rng(0).normal(0, 0.1, (rate + 37, channels)).astype("float32")
    soundfile.write(song, samples, rate, subtype="FLOAT")
    output = tmp_path / "out"
    arguments = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.5"]
    assert main([*arguments, "--format", format, "--batch", "3"]) == 0
    vocals, found_rate = soundfile.read(output / f"a song – Lied.vocals.{format}", always_2d=True)
    instrumental, _ = soundfile.read(output / f"a song – Lied.instrumental.{format}", always_2d=True)
    assert (vocals.shape, found_rate) == (samples.shape, rate)
    if format == "wav":
        np.testing.assert_allclose(vocals + instrumental, samples, atol=1e-6)
    assert len(list(output.iterdir())) == 2


def test_command_carries_the_state_on(
    checkpoint: Path, tiny: BSMamba2, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    song = wave(tmp_path / "song.wav", frames=5000, subtype="FLOAT")
    arguments = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path), "--segment", "0.1"]
    assert main([*arguments, "--look-ahead", "0.04"]) == 0
    blocks = separate_stream(tiny, [read(song)[0][None]], segment=0.1, look_ahead=0.04)
    expected = torch.cat(list(blocks), dim=-1)[0, 0]
    assert torch.equal(read(tmp_path / "song.vocals.wav")[0], expected)
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--look-ahead", "0.04", "--overlap", "0.5"])
    assert stop.value.code == 2
    assert "--overlap: not allowed with argument --look-ahead" in capsys.readouterr().err


def test_what_passes_full_scale_is_said_and_never_clips(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3.0 in a float file: kept in a float file, scaled with its remainder in every other one."""
    song = tmp_path / "loud.wav"
    wave = 3 * np.sin(np.arange(12_000) / 7)[:, None] * [1, 0.5]
    soundfile.write(song, wave, 8000, subtype="FLOAT")
    for format in ("wav", "wav16", "wav24", "flac", "ogg", "mp3"):
        done = separate_file(Identity(), song, tmp_path / format / "loud", format=format)  # type: ignore[arg-type]
        found = soundfile.read(done.paths["vocals"])[0]
        if format == "wav":
            assert done.gain == 1
            np.testing.assert_array_equal(found, wave.astype("float32"))
        else:
            assert done.gain == pytest.approx(1 / np.abs(wave).max(), rel=1e-4)
            assert np.abs(found).max() < (1.0001 if format not in ("ogg", "mp3") else 1.1)
            error = np.abs(found / done.gain - wave)[1000:-1000].max()
            assert error < {"wav16": 1e-4, "wav24": 1e-6, "flac": 1e-6}.get(format, 0.5)
    arguments = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main([*arguments, "--format", "wav16"]) == 0
    assert re.search(r"loud\.wav: passes full scale, all results \d+\.\d dB quieter", capsys.readouterr().err)
    vocals, instrumental = (
        soundfile.read(tmp_path / "out" / f"loud.{name}.wav")[0] for name in ("vocals", "instrumental")
    )
    together = vocals + instrumental
    gain = (together * wave).sum() / (wave * wave).sum()
    np.testing.assert_allclose(together, gain * wave, atol=2 / 32768)
    assert max(np.abs(vocals).max(), np.abs(instrumental).max()) == pytest.approx(1, abs=1e-3)


def test_stopped_by_hand_nothing_is_left(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    song, calls = wave(tmp_path / "song.wav", frames=20_000), [0]
    real = BSMamba2.forward

    def forward(self: BSMamba2, mixture: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return real(self, mixture)

    monkeypatch.setattr(BSMamba2, "forward", forward)
    arguments = ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--segment", "0.5"]
    assert main(["separate", str(song), *arguments]) == 130
    assert capfd.readouterr().err == "stopped\n"
    assert found_in(tmp_path / "out") == []


def test_folders_are_searched_and_laid_out_likewise(checkpoint: Path, tmp_path: Path) -> None:
    album = tmp_path / "album"
    for name in ("b.wav", "disc 2/a.FLAC", "disc 2/deeper/c.ogg", ".hidden/d.wav", "._b.wav", "cover.jpg"):
        (album / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("jpg"):
            (album / name).write_bytes(b"no sound")
        else:
            soundfile.write(album / name, np.zeros((900, 2)), 8000)
    output = album / "out"
    arguments = ["separate", str(album), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.1"]
    assert main(arguments) == 0
    assert found_in(output) == sorted(
        f"{base}.{stem}.wav" for base in ("b", "disc 2/a", "disc 2/deeper/c") for stem in ("instrumental", "vocals")
    )
    assert main([*arguments, "--overwrite"]) == 0  # and the results are no songs
    assert len(found_in(output)) == 6
    assert main([*arguments[:4], "-o", str(album)]) == 1  # there they would be
    assert len(found_in(album)) == 6 + 6


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 23 GB")])
def test_too_little_memory_is_told_and_the_others_are_done(
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def run(model: BSMamba2, song: Path, *args: Any, **options: Any) -> Any:
        if song.stem == "long":
            raise error
        return whole(model, song, *args, **options)

    whole = command.separate_file
    monkeypatch.setattr(command, "separate_file", run)
    songs = [str(wave(tmp_path / f"{name}.wav")) for name in ("long", "short")]
    assert main(["separate", *songs, "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]) == 1
    said = capfd.readouterr()
    assert f"{tmp_path / 'long.wav'}: too little memory; use a smaller --batch or --segment" in said.err
    assert len(said.out.splitlines()) == 2
    error.args = ("another bug",)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="another bug"):
            main(["separate", *songs, "--checkpoint", str(checkpoint), "-o", str(tmp_path / "again")])


def taken(path: Path) -> Path:
    (path.parent / "out").mkdir()
    with_bytes(path.parent / "out" / "bad.vocals.wav", b"of somebody else")
    return wave(path)


def in_the_way(path: Path) -> Path:
    folder(path.parent / "out")
    folder(path.parent / "out" / "bad.instrumental.wav")
    return wave(path)


# What is given: what one line must say. Channels stand at byte 22 of a WAV file, its rate at byte 24.
BAD = {
    "missing": (lambda p: p / "bad.wav", "does not exist"),
    "empty": (lambda p: with_bytes(p / "bad.wav", b""), "is empty"),
    "text": (lambda p: with_bytes(p / "bad.wav", b"this is no sound\n" * 40), "cannot be read as audio"),
    "cut WAV": (lambda p: cut(wave(p / "bad.wav")), "is cut short"),
    "cut WAV, within its head": (lambda p: cut(wave(p / "bad.wav"), 0.008), "cannot be read as audio"),
    "cut WAV, of 3 GB": (lambda p: poke(wave(p / "bad.wav"), 40, (3 << 30).to_bytes(4, "little")), "is cut short"),
    "cut AIFF": (lambda p: cut(wave(p / "bad.aiff")), "is cut short"),
    "cut FLAC": (lambda p: cut(wave(p / "bad.flac", frames=90_000)), "cut short"),
    "cut OGG": (lambda p: cut(wave(p / "bad.ogg", frames=50_000)), "cut short"),
    "cut MP3": (lambda p: cut(wave(p / "bad.mp3", frames=50_000)), "cut short"),
    "damaged FLAC": (lambda p: poke(wave(p / "bad.flac", frames=90_000), 300, b"\x55" * 100), "damaged"),
    "NaN": (lambda p: with_samples(p / "bad.wav", math.nan), "NaN or infinite"),
    "infinite": (lambda p: with_samples(p / "bad.wav", -math.inf), "NaN or infinite"),
    "zero length": (lambda p: wave(p / "bad.wav", frames=0), "holds no samples"),
    "1 Hz": (lambda p: wave(p / "bad.wav", rate=1), "1 Hz is not a sample rate"),
    "2,000,000,000 Hz": (lambda p: poke(wave(p / "bad.wav"), 24, b"\0\x94\x35\x77"), "2,000,000,000 Hz"),
    "0 channels": (lambda p: poke(wave(p / "bad.wav"), 22, b"\0\0"), "cannot be read as audio"),
    "empty folder": (lambda p: folder(p / "bad"), "holds no WAV"),
    "pipe": (lambda p: pipe(p / "bad.wav"), "not a regular file"),
    "output exists": (lambda p: taken(p / "bad.wav"), "exists; give another folder with -o, or --overwrite"),
    "a folder in the output's place": (lambda p: in_the_way(p / "bad.wav"), "exists; give another folder"),
    "a name too long for its results": (lambda p: wave(p / "b.wav").rename(p / f"bad{'x' * 247}.wav"), "too long"),
    "newline in the name": (lambda p: p / "bad\nname.wav", "bad\\nname.wav: does not exist"),
    "letters of no encoding": (lambda p: p / os.fsdecode(b"bad\xff.wav"), "bad\\udcff.wav: does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_the_others_are_done(
    case: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[case]
    good = wave(tmp_path / "good.wav")
    bad = make(tmp_path)
    before = found_in(tmp_path)
    output = tmp_path / "out"
    arguments = ["--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.1", "--batch", "16"]
    code = main(["separate", str(bad), str(good), *arguments])
    said = capfd.readouterr()
    assert code == 1
    lines = said.err.splitlines()
    assert len(lines) == 1, lines
    assert "bad" in lines[0]
    assert message in lines[0]
    assert ";" in lines[0]  # behind it stands the mend
    assert said.out.splitlines() == [str(output / f"good.{stem}.wav") for stem in ("vocals", "instrumental")]
    assert set(found_in(tmp_path)) - set(before) == {"out/good.vocals.wav", "out/good.instrumental.wav"}
    if case == "output exists":
        assert (output / "bad.vocals.wav").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(
    ("rate", "channels", "frames", "name"),
    [
        (8000, 2, 1, "one sample.wav"),
        (8000, 2, 60, "shorter than one window.wav"),
        (384_000, 2, 5000, "384 kHz.wav"),
        (8000, 64, 900, "64 channels.wav"),
        (8000, 2, 900, "a name  with spaces.wav"),
        (8000, 2, 900, "a name\nin two lines.wav"),
        (8000, 2, 900, "песня 歌 🎵.wav"),
        pytest.param(
            8000,
            2,
            900,
            os.fsdecode(b"old encoding \xe9.wav"),
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="a name is UTF-8 there"),
        ),
        (8000, 2, 900, "-o.wav"),
        (8000, 2, 900, "x" * 230 + ".wav"),
    ],
)
def test_strange_but_good_input_is_separated(
    rate: int, channels: int, frames: int, name: str, checkpoint: Path, tmp_path: Path
) -> None:
    song = wave(tmp_path / "plain.wav", rate, channels, frames, subtype="FLOAT").rename(tmp_path / name)
    output = tmp_path / "out"
    assert main(["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(output), "--segment", "0.1"]) == 0
    vocals, instrumental = (read(output / f"{song.stem}.{stem}.wav") for stem in ("vocals", "instrumental"))
    assert vocals[1] == instrumental[1] == rate
    assert vocals[0].shape == instrumental[0].shape == (channels, frames)
    torch.testing.assert_close(vocals[0] + instrumental[0], torch.full((channels, frames), 0.25), rtol=0, atol=1e-6)


@contextmanager
def another_user() -> Iterator[None]:
    """Within it we are nobody in particular: to root no folder is closed."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_may_not_be_read_is_one_line_each(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folders are closed to other users
        place = Path(name)
        place.chmod(0o755)
        wave(folder(place / "album") / "good.wav")
        hidden = wave(folder(place / "album" / "locked") / "hidden.wav")
        secret = wave(place / "secret.wav")
        model = place / "model.safetensors"
        model.write_bytes(checkpoint.read_bytes())
        folder(place / "out").chmod(0o777)
        hidden.parent.chmod(0)
        secret.chmod(0)
        songs = [str(hidden), str(secret), str(place / "album")]
        with another_user():
            code = main(["separate", *songs, "--checkpoint", str(model), "-o", str(place / "out")])
            said = capfd.readouterr().err.splitlines()
            assert main(["separate", *songs, "--checkpoint", str(model), "-o", str(place / "album" / "out")]) == 2
        hidden.parent.chmod(0o755)
        assert code == 1
        assert said == [
            f"{place}/album/locked: the folder cannot be read (Permission denied); change its permissions",
            f"{hidden}: cannot be read (Permission denied); change that, or leave it out",
            f"{secret}: cannot be read (Permission denied); change that, or leave it out",
        ]
        assert found_in(place / "out") == ["good.instrumental.wav", "good.vocals.wav"]
        (line,) = capfd.readouterr().err.splitlines()
        assert line == f"{place}/album/out: cannot be made a folder (Permission denied); give another one with -o"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 64 kB: a real one, where the system lets us mount it."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        refusal = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        refusal = str(error)
    if refusal:
        pytest.skip(f"no small disk can be mounted here: {refusal}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("format", ["wav", "wav16", "flac", "ogg", "mp3"])
def test_a_full_disk_leaves_no_half_of_a_song(
    checkpoint: Path, tmp_path: Path, small_disk: Path, format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    long = wave(tmp_path / "long.wav", frames=120_000)
    short = wave(tmp_path / "short.wav", frames=2000)
    arguments = ["--checkpoint", str(checkpoint), "-o", str(small_disk), "--format", format]
    code = main(["separate", str(long), str(short), *arguments])
    said = capfd.readouterr()
    assert code == 1
    assert len(said.err.splitlines()) == 1
    assert re.search(r"long\.\w+\.\w+: cannot be written \(No space left on device\); .* make room", said.err)
    assert found_in(small_disk) == sorted(Path(line).name for line in said.out.splitlines())
    assert all(line.startswith("short.") for line in found_in(small_disk))
    assert len(found_in(small_disk)) == 2


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


def of_another_model(path: Path) -> Path:
    torch.save({"encoder.weight": torch.zeros(3, 3)}, path)
    return path


def that_runs_code(path: Path) -> Path:
    torch.save({"state_dict": Payload(path.with_name("executed"))}, path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p, "does not exist; name a checkpoint file"),
        (lambda p: with_bytes(p, b""), "truncated"),
        (lambda p: with_bytes(p, b"no weights"), "is not a checkpoint"),
        (folder, "is a folder"),
        (of_another_model, "belongs to BSMamba2"),
        (that_runs_code, "nothing in it was run"),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    make: Callable[[Path], Path], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "bad.ckpt")
    assert main(["separate", "song.wav", "--checkpoint", str(path), "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "bad.ckpt" in line
    assert message in line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "toaster"], "--device toaster"),
        (["-o", __file__], "cannot be made a folder (is a file); give another one with -o"),
        (["-o", f"{__file__}/out"], "cannot be made a folder (Not a directory); give another one with -o"),
        (["-o", "/" + 300 * "x"], "(File name too long); give another one with -o"),
        (["--segment", "0.001"], "segment=0.001"),
        (["--overlap", "1"], "overlap=1.0"),
        (["--batch", "0"], "batch=0"),
        (["--look-ahead", "-1"], "look_ahead=-1.0"),
        (["--format", "mp3"], "choose --format wav"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    song = wave(tmp_path / "song.wav", rate=96_000)
    base = ["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main([*base, *arguments]) in (1, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists() or not found_in(tmp_path / "out")


def test_without_a_checkpoint_the_one_in_the_package_is_taken(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    song = wave(tmp_path / "song.wav")
    monkeypatch.setattr(layouts, "BUNDLED_CHECKPOINT", tmp_path / "absent.safetensors")
    assert main(["separate", str(song), "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--checkpoint" in line
    assert "make train" in line
    monkeypatch.setattr(layouts, "BUNDLED_CHECKPOINT", checkpoint)
    assert main(["separate", str(song), "-o", str(tmp_path / "out")]) == 0


def test_a_published_checkpoint_is_recognised_and_its_licence_said_to_be_missing(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = checkpoint.read_bytes()
    known = {hashlib.sha256(content).hexdigest(): (len(content), "the authors' own")}
    monkeypatch.setattr(published_layout, "KNOWN_FILES", known)
    song = wave(tmp_path / "song.wav")
    assert main(["separate", str(song), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == f"{checkpoint}: the authors' own; no licence is stated for the weights\n"


def test_two_songs_with_one_name_do_not_replace_each_other(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = wave(tmp_path / "song.wav"), wave(tmp_path / "song.flac", frames=800)
    arguments = ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--overwrite"]
    assert main(["separate", str(first), str(second), *arguments]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "song.flac: its results would replace those of" in line
    assert read(tmp_path / "out" / "song.vocals.wav")[0].shape[1] == 900


def test_silence_in_a_file_gives_silence(checkpoint: Path, tmp_path: Path) -> None:
    for rate in (8000, 44_100):
        soundfile.write(tmp_path / f"{rate}.wav", np.zeros((30_000, 2)), rate)
        arguments = ["--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--format", "wav16"]
        assert main(["separate", str(tmp_path / f"{rate}.wav"), *arguments]) == 0
        for stem in ("vocals", "instrumental"):
            assert not soundfile.read(tmp_path / "out" / f"{rate}.{stem}.wav")[0].any()


def test_help_says_what_happens_to_more_channels(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["separate", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Of more than two\nchannels, a left and a right one" in text
    assert "does not name its speakers, each two after each other" in text
