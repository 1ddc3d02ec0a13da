"""Audio files written: channel masks, names that are taken, killed writers, sizes beyond 32 bits, full scale."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

from bsmamba2.audio.files import AudioError, read
from bsmamba2.audio.writer import StemWriter, sweep


def test_a_file_too_long_for_32_bits_is_written_with_64(tmp_path: Path) -> None:
    for frames, container in ((1 << 20, "WAV"), (1 << 29, "RF64")):  # of 8 bytes
        with StemWriter({"vocals": tmp_path / "long.wav"}, 8000, 2, frames=frames) as results:
            results.write({"vocals": torch.full((2, 100), 0.5)})
        assert soundfile.info(tmp_path / "long.wav").format == container
        assert torch.equal(read(tmp_path / "long.wav")[0], torch.full((2, 100), 0.5))


@pytest.mark.parametrize(("format", "bits"), [("wav16", 16), ("wav24", 24), ("flac", 24)])
def test_full_scale_itself_is_the_last_step_and_not_the_first(tmp_path: Path, format: str, bits: int) -> None:
    """+1 is one step beyond what an integer holds: rounded carelessly it would come back as -1."""
    step = 2.0 ** (1 - bits)
    values = torch.tensor([[1.0, 1 - step, step, 0.0, -step, -1.0]])
    with StemWriter({"audio": tmp_path / "x"}, 8000, 1, format, frames=6) as stems:
        stems.write({"audio": values})
    assert stems.gain == 1
    found = torch.from_numpy(soundfile.read(tmp_path / "x", dtype="float64", always_2d=True)[0].T)
    assert found.tolist() == [[1 - step, 1 - step, step, 0, -step, -1]]


LAYOUTS = {
    "2.1": "FL FR LFE",
    "3.0": "FL FR FC",
    "quad": "FL FR BL BR",
    "5.0": "FL FR FC BL BR",
    "5.1": "FL FR FC LFE BL BR",
    "5.1(side)": "FL FR FC LFE SL SR",
    "6.1": "FL FR FC LFE BC SL SR",
    "7.1": "FL FR FC LFE BL BR SL SR",
    "5.1.2": "FL FR FC LFE SL SR TFL TFR",
}


def tones(channels: int) -> torch.Tensor:
    """(channels, samples): a tone of 40 Hz in each, which an encoder keeps in an LFE too, each at its own level."""
    levels = 0.4 * 0.6 ** torch.arange(channels)
    return levels[:, None] * torch.sin(torch.arange(44_100) * (2 * torch.pi * 40 / 44_100))


def decoded(path: Path) -> dict[str, float]:
    """Speaker → level of its tone, by FFmpeg."""
    packed = av.AudioResampler(format="flt")  # to_ndarray crashes on planes of 8 channels
    with av.open(str(path)) as container:
        frames = [out for frame in container.decode(audio=0) for out in packed.resample(frame)]
    names = [channel.name for channel in frames[0].layout.channels]
    samples = np.concatenate([frame.to_ndarray().reshape(-1, len(names)) for frame in frames])
    return dict(zip(names, np.abs(samples[11_025:33_075]).max(0).tolist(), strict=True))


def write_tones(path: Path, layout: str, format: str, channels: int = 0) -> None:
    audio = tones(channels or len(layout.split()))
    with StemWriter({"audio": path}, 44_100, len(audio), format, frames=44_100, layout=layout.split()) as writer:
        writer.write({"audio": audio})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("format", ["wav", "wav16", "flac", "ogg"])
def test_each_channel_is_written_for_its_speaker(tmp_path: Path, layout: str, format: str) -> None:
    names, path = layout.split(), tmp_path / "x"
    if format in ("flac", "ogg") and layout in (LAYOUTS["2.1"], LAYOUTS["5.1.2"]):
        with pytest.raises(
            AudioError, match=f"for {layout} cannot be written as {format.upper()}; choose --format wav"
        ):
            write_tones(path, layout, format)
        assert list(tmp_path.iterdir()) == []
        return
    write_tones(path, layout, format)
    levels = decoded(path)
    if format in ("flac", "ogg") and len(names) < 7:  # where the sides are as good as the back
        levels = {name.replace("S", "B"): level for name, level in levels.items()}
        names = [name.replace("S", "B") for name in names]
    expected = dict(zip(names, tones(len(names)).amax(1).tolist(), strict=True))
    assert levels == pytest.approx(expected, rel=0.3 if format == "ogg" else 5e-3)


@pytest.mark.parametrize(
    ("channels", "layout", "mask"),
    [(2, "", None), (2, "FL FR", None), (1, "FC", None), (6, "", None), (6, LAYOUTS["5.1"], 0x3F), (2, "SL SR", 0x600)],
)
def test_only_a_layout_needs_a_channel_mask(tmp_path: Path, channels: int, layout: str, mask: int | None) -> None:
    write_tones(tmp_path / "x.wav", layout, "wav", channels)
    head = (tmp_path / "x.wav").read_bytes()[:64]
    assert soundfile.info(tmp_path / "x.wav").format == ("WAV" if mask is None else "WAVEX")
    if mask is not None:
        assert int.from_bytes(head[head.index(b"fmt ") + 28 :][:4], "little") == mask


@pytest.mark.parametrize(("channels", "format"), [(3, "mp3"), (9, "flac"), (256, "ogg")])
def test_too_many_channels_are_refused_by_name(tmp_path: Path, channels: int, format: str) -> None:
    with pytest.raises(
        AudioError,
        match=rf"x: {channels} channels, more than {channels - 1}, .* as {format.upper()}; choose --format wav",
    ):
        write_tones(tmp_path / "x", "", format, channels)
    assert list(tmp_path.iterdir()) == []


def stems(folder: Path, **options: object) -> StemWriter:
    paths = {name: folder / f"song.{name}.wav" for name in ("vocals", "instrumental")}
    return StemWriter(paths, 8000, 1, frames=100, **options)  # type: ignore[arg-type]


def put(folder: Path, value: float, meanwhile: Callable[[], object] = str, **options: object) -> None:
    """Write both stems, full of one value; `meanwhile` is called before they get their names."""
    with stems(folder, **options) as writer:
        writer.write({name: torch.full((1, 100), value) for name in writer.paths})
        meanwhile()


def values(folder: Path) -> dict[str, float]:
    """Name → value of every file in a folder, the hidden ones too."""
    return {path.name: float(read(path)[0][0, 0]) if path.suffix == ".wav" else 0 for path in folder.iterdir()}


BOTH = ("song.instrumental.wav", "song.vocals.wav")


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A file system with hard links, and one without."""

    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    if not request.param:
        monkeypatch.setattr(os, "link", link)
    return request.param


@pytest.mark.usefixtures("links")
def test_of_two_writers_with_the_same_names_the_first_wins_whole(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"song\.vocals\.wav: exists"):
        put(tmp_path, 1.0, overwrite=False, meanwhile=lambda: put(tmp_path, 0.5, overwrite=False))
    assert values(tmp_path) == dict.fromkeys(BOTH, 0.5)
    put(tmp_path, 0.25, overwrite=True)
    assert values(tmp_path) == dict.fromkeys(BOTH, 0.25)
    with pytest.raises(AudioError, match="exists"):
        put(tmp_path, 0.125, overwrite=False)
    assert values(tmp_path) == dict.fromkeys(BOTH, 0.25)


@pytest.mark.usefixtures("links")
def test_a_name_taken_meanwhile_leaves_nothing_of_the_others(tmp_path: Path) -> None:
    other = tmp_path / "song.instrumental.wav"
    with pytest.raises(AudioError, match=r"song\.instrumental\.wav: exists"):
        put(tmp_path, 1.0, overwrite=False, meanwhile=lambda: other.write_bytes(b"of somebody else"))
    assert list(tmp_path.iterdir()) == [other]
    assert other.read_bytes() == b"of somebody else"


def killed(folder: Path, calls: int, target: str, **options: object) -> None:
    """Write in a child process that dies, without any cleaning up, in the given call of a function of os."""
    child = os.fork()
    if not child:
        try:
            real, count = getattr(os, target), [0]

            def dying(*arguments: object, **named: object) -> object:
                count[0] += 1
                if count[0] == calls:
                    os._exit(7)
                return real(*arguments, **named)

            setattr(os, target, dying)
            put(folder, 1.0, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize(("target", "calls"), [("fsync", 1), ("fsync", 2), ("link", 1), ("link", 2)])
def test_a_killed_writer_leaves_nothing_to_the_next(tmp_path: Path, target: str, calls: int, old: bool) -> None:
    """Killed while it writes, and between the names of the two files: then the one that is there is taken back."""
    if old:
        put(tmp_path, 0.5)
    killed(tmp_path, calls, target, overwrite=old)
    assert len(list(tmp_path.glob(".bsmamba2-*.part"))) == 2
    if target == "link" or not old:
        sweep(tmp_path)
        assert values(tmp_path) == {}
        put(tmp_path, 0.25, overwrite=False)
    else:
        put(tmp_path, 0.25, overwrite=True)
    assert values(tmp_path) == dict.fromkeys(BOTH, 0.25)


def test_only_parts_of_dead_writers_are_removed_and_finished_results_stay(tmp_path: Path) -> None:
    killed(tmp_path, 1, "unlink", overwrite=False)
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / ".bsmamba2-link.part").symlink_to("song.vocals.wav")
    with stems(tmp_path, overwrite=True) as writer:
        alive = {file.temp_path for file in writer._files.values()}
        sweep(tmp_path)
        assert {*tmp_path.iterdir()} == alive | {tmp_path / name for name in (*BOTH, ".bsmamba2-link.part")}
        writer.write({name: torch.full((1, 100), 0.75) for name in writer.paths})
    (tmp_path / ".bsmamba2-link.part").unlink()
    assert values(tmp_path) == dict.fromkeys(BOTH, 0.75)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_flush_is_no_error(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    if code == errno.EIO:
        with pytest.raises(AudioError, match="cannot be written"):
            put(tmp_path, 0.5)
        assert values(tmp_path) == {}
    else:
        put(tmp_path, 0.5)
        assert values(tmp_path) == dict.fromkeys(BOTH, 0.5)


def test_what_a_writer_left_that_was_killed_at_once_is_removed(tmp_path: Path) -> None:
    old, young = tmp_path / ".bsmamba2-a-b.new", tmp_path / ".bsmamba2-c-d.new"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    sweep(tmp_path)
    assert not old.exists()
    assert young.exists()  # a writer that is alive may be about to rename it
