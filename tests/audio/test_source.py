"""Tags and junk in front of and behind the sound, files joined to files of other kinds, and pipes in place of files."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode_tone, pipe, wave, with_bytes

from bsmamba2.audio.files import AudioError, AudioReader, AudioWarning, find_audio_files, read
from bsmamba2.audio.source import FILE_START, FileBytes

pytestmark = pytest.mark.filterwarnings("ignore:.* does not state its length")

ID3 = b"ID3\4\0\0\0\0\0\x0a" + bytes(10)
ITEM = struct.pack("<II", 5, 0) + b"Title\0hello"
APE_FOOTER = b"APETAGEX" + struct.pack("<IIII", 2000, len(ITEM) + 32, 1, 0) + bytes(8)
APE_HEADER = b"APETAGEX" + struct.pack("<IIII", 2000, len(ITEM) + 32, 1, 0xA0000000) + bytes(8)
APE_BOTH = APE_HEADER + ITEM + APE_FOOTER[:20] + struct.pack("<I", 0x80000000) + bytes(8)
ID3V1 = b"TAG" + b"x" * 125
TAGS = {
    "APEv1, a footer only": ITEM + APE_FOOTER,
    "APEv2": APE_BOTH,
    "enhanced ID3v1": b"TAG+" + b"y" * 223 + ID3V1,
    "Lyrics3, APE and ID3v1": b"LYRICSBEGINla la000020LYRICS200" + ITEM + APE_FOOTER + ID3V1,
}
KINDS = {
    "a.mp3": "libmp3lame", "a.m4a": "aac", "a.aac": "aac", "a.flac": "flac", "a.tta": "tta", "a.wv": "wavpack",
    "a.opus": "libopus", "a.flv": "aac", "a.avi": "pcm_s16le", "a.mka": "aac",
}  # fmt: skip
PACKETS = {"a.ac3": "ac3", "a.wma": "wmav2", "a.ts": "aac", "a.mpg": "libmp3lame"}


def encode(folder: Path, name: str) -> bytes:
    """A file of one of the kinds."""
    codec = (KINDS | PACKETS)[name]
    if codec in ("tta", "wavpack", "ac3"):  # whose encoders take other formats of samples
        import av

        planar = {"tta": "s16", "wavpack": "s16p", "ac3": "fltp"}[codec]
        noise = np.random.default_rng(0).normal(0, 3000, (1, 2 * 30_001)).astype("int16")
        frame = av.AudioFrame.from_ndarray(noise, format="s16", layout="stereo")
        frame.rate = 48_000
        with av.open(folder / name, "w") as container:
            stream = container.add_stream(codec, rate=48_000, layout="stereo", format=planar)
            fifo = av.AudioFifo()
            for converted in av.AudioResampler(planar, "stereo", 48_000).resample(frame):
                fifo.write(converted)
            while (block := fifo.read(stream.codec_context.frame_size or 4096)) is not None:
                container.mux(stream.encode(block))
            container.mux(stream.encode(fifo.read(0, partial=True)))
            container.mux(stream.encode(None))
    else:
        encode_tone(folder / name, codec, 48_000)
    return (folder / name).read_bytes()


@pytest.mark.parametrize("name", KINDS)
def test_tags_in_front_and_behind_change_nothing(tmp_path: Path, name: str) -> None:
    content = encode(tmp_path, name)
    expected, path = read(tmp_path / name)[0], tmp_path / "song"
    for tag in TAGS.values():
        assert torch.equal(read(with_bytes(path, content + tag))[0], expected)
    if name not in ("a.avi", "a.flv"):
        assert torch.equal(read(with_bytes(path, ID3 + content + TAGS["enhanced ID3v1"]))[0], expected)


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.aac", "a.mka"])
def test_junk_behind_the_sound_is_left_out_with_a_message(tmp_path: Path, name: str) -> None:
    content = encode(tmp_path, name)
    expected, path = read(tmp_path / name)[0], tmp_path / "song"
    with pytest.warns(AudioWarning, match=r"song: 500 bytes after the sound are neither sound nor a tag"):
        assert torch.equal(read(with_bytes(path, content + b"junk " * 100))[0], expected)
    with pytest.raises(AudioError, match="neither a frame nor a tag follows; "):
        read(with_bytes(path, content + b"junk " * 20_000))


def small(format: str, subtype: str | None = None, channels: int = 2) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).normal(0, 0.1, (5001, channels))
    soundfile.write(file, noise, 48_000, format=format, subtype=subtype)
    return file.getvalue()


SECONDS = {"wav": ("WAV", "PCM_16"), "aiff": ("AIFF", "PCM_16"), "caf": ("CAF", "PCM_16"), "flac": ("FLAC", "PCM_16"),
           "w64": ("W64", "PCM_16"), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "mp3": ("MP3", None),
           "8 bits": ("WAV", "PCM_U8")}  # fmt: skip
FIRSTS = [*KINDS, *SECONDS, "a.wma", "a.ts", "a.mpg"]


@pytest.mark.filterwarnings("always::bsmamba2.audio.files.AudioWarning")
@pytest.mark.parametrize("first", FIRSTS)
def test_a_file_of_another_kind_behind_the_first_is_never_lost_in_silence(tmp_path: Path, first: str) -> None:
    head = encode(tmp_path, first) if "." in first else small(*SECONDS[first])
    frames, path = read(with_bytes(tmp_path / "first", head))[0].shape[1], tmp_path / "song"
    tails = {kind: small(*SECONDS[kind]) for kind in ("wav", "flac", "mp3", "opus", "caf")}
    others = {kind: small(kind, "PCM_16") for kind in ("W64", "VOC", "NIST")} | {"a.ac3": encode(tmp_path, "a.ac3")}
    others |= {name: encode(tmp_path, name) for name in ("a.mpg", "a.ts")}
    for kind, tail in (tails | others).items():
        try:
            with warnings.catch_warnings(record=True) as messages:
                found = read(with_bytes(path, head + tail))[0].shape[1]
        except AudioError as error:
            assert ";" in str(error)  # noqa: PT017
        else:
            assert found >= frames + 5001, (kind, messages)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path) -> None:
    """Even where it was a file a moment before, when the folder was searched."""
    path = wave(tmp_path / "song.wav")
    assert find_audio_files(tmp_path)[0] == [path]
    pipe(path)
    with pytest.raises(AudioError, match="is not a regular file; "):
        AudioReader(path)
    pipe(tmp_path / "no suffix")
    assert find_audio_files(tmp_path)[2] == [tmp_path / "no suffix"]
    with pytest.raises(AudioError, match="is not a regular file; "):
        AudioReader(tmp_path)


def test_bytes_behind_the_end_are_none(tmp_path: Path) -> None:
    with with_bytes(tmp_path / "a", b"abc").open("rb", buffering=0) as raw:
        data = FileBytes(raw)
        assert [data.at(start, 2) for start in (-1, 1, 2, 3, 1 << 80)] == [b"", b"bc", b"c", b"", b""]


def test_first_bytes_of_files_are_not_found_in_noise(tmp_path: Path) -> None:
    for name in ("a.m4a", "a.flac", "a.tta", "a.wv", "a.opus", "a.flv", "a.avi", "a.mka"):
        assert FILE_START.match(encode(tmp_path, name)), name
    for kind in set(SECONDS) - {"mp3"}:
        assert FILE_START.match(small(*SECONDS[kind])), kind
    noise = np.random.default_rng(0).integers(256, size=1 << 22, dtype="uint8").tobytes()
    assert FILE_START.search(noise) is None
    where = with_bytes(tmp_path / "x", noise + small("WAV") + noise)
    with where.open("rb", buffering=0) as raw:
        assert FileBytes(raw).next_file(5) == len(noise)


def test_flac_in_avi_is_whole(tmp_path: Path) -> None:
    tone = torch.from_numpy(encode_tone(tmp_path / "a.avi", "flac", 48_000))
    assert torch.equal(read(tmp_path / "a.avi")[0], tone)


def test_a_second_moov_and_a_second_stream_are_refused(tmp_path: Path) -> None:
    encode_tone(tmp_path / "a.mov", "pcm_s16le", 48_000)
    film = (tmp_path / "a.mov").read_bytes()
    with pytest.raises(AudioError, match="holds a second recording"):
        read(with_bytes(tmp_path / "song", film + film[:4] + b"free" + film[8:]))
    encode_tone(tmp_path / "a.vob", "ac3", 48_000, 1)
    with pytest.raises(AudioError, match="end to end, as streams of their own"):
        read(with_bytes(tmp_path / "song", encode(tmp_path, "a.mpg") + (tmp_path / "a.vob").read_bytes()))
