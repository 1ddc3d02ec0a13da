"""Audio files read: lengths, odd headers, and every format that FFmpeg reads."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from audio_files import cut, encode_tone, poke, wave, with_bytes

from bsmamba2.audio.files import BLOCK, AudioError, AudioReader, read

pytestmark = pytest.mark.filterwarnings("ignore:.* does not state its length")


def uncounted_mp3(path: Path, seconds: float, rate: int, channels: int, level: float) -> bytes:
    """Noise as an MP3 of one bit rate without the frame that tells how many follow."""
    noise = np.random.default_rng(round(99 * level)).normal(0, 0.2, (round(seconds * rate), channels))
    soundfile.write(path, noise, rate, format="MP3", compression_level=level, bitrate_mode="CONSTANT")
    data = path.read_bytes()
    told = data.find(b"Info", 0, 99)  # poor frames have no room for it
    return data if told < 0 else data[data.index(data[:2], told) :]


def frame_size(head: int) -> int:
    """Bytes of a Layer III frame by its header, without free format."""
    mpeg1 = head >> 19 & 3 == 3
    kbps = (
        (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
        if mpeg1
        else (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
    )[(head >> 12 & 15) - 1]
    rate = (44_100, 48_000, 32_000)[head >> 10 & 3] >> {3: 0, 2: 1, 0: 2}[head >> 19 & 3]
    return (144_000 if mpeg1 else 72_000) * kbps // rate + (head >> 9 & 1)


def side_info(head: int) -> int:
    """Bytes of side information behind a frame's header: half as many in MPEG 2 and 2.5, and in mono."""
    mpeg1, mono = head >> 19 & 3 == 3, head >> 6 & 3 == 3
    return {(True, False): 32, (True, True): 17, (False, False): 17, (False, True): 9}[mpeg1, mono]


def tag_frame(song: bytes, tag: bytes, at: int = 0) -> bytes:
    """A frame like the first of a song, silent, with a tag where encoders write one."""
    head = int.from_bytes(song[:4], "big")
    frame = bytearray(song[: frame_size(head)])
    frame[4:] = bytes(len(frame) - 4)
    at = at or 4 + side_info(head)
    frame[at : at + len(tag)] = tag
    return bytes(frame)


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (48_000, 1), (22_050, 2), (16_000, 1), (8_000, 2)])
def test_an_mp3_that_does_not_tell_its_length_is_read_to_its_end(tmp_path: Path, rate: int, channels: int) -> None:
    """Its size tells little: rich frames may come first, or last, and pictures beside them."""
    whole = tmp_path / "whole.mp3"
    poor = uncounted_mp3(whole, 6, rate, channels, 0.9)
    rich = uncounted_mp3(whole, 2, rate, channels, 0.0)
    expected, told = read(whole)[0], tmp_path / "untold.mp3"
    picture = b"ID3\x04\0\0" + bytes([0, 32, 0, 0]) + bytes(range(256)) * 2048
    for data, seconds in (
        (rich, 2),
        (rich + poor, 8),
        (poor + rich, 8),
        (picture + rich, 2),
        (picture + picture + rich + b"APETAGEX" + bytes(99) + b"TAG" + bytes(125), 2),
        (rich + bytes(500) + poor, 8),
        (rich + bytes(5000) + poor, 8),
        (rich + picture + poor, 8),
        (tag_frame(rich, b"VBRI", 36) + rich + poor, 8),
        (tag_frame(rich, b"Xing") + rich + poor, 8),
        (tag_frame(rich, b"Info" + bytes(3) + b"\x01" + bytes(4)) + rich + poor, 8),
    ):
        told.write_bytes(data)
        found, found_rate = read(told)
        assert found_rate == rate
        frame = 1152 if rate > 24_000 else 576
        assert seconds - 0.01 < found.shape[1] / rate < seconds + 0.1 + 5 * frame / rate  # encoders add some frames
        if data is rich:  # the encoder's delay is not cut off: nothing tells it
            late = [found[:, i : i + 8192] for i in range(4000)]
            assert min((one - expected[:, :8192]).abs().max().item() for one in late) < 1e-4
    for other in (tmp_path / "song.mpga", tmp_path / "song"):  # whatever it is called
        other.write_bytes(rich + poor)
        assert read(other)[0].shape[1] / rate > 7.9


def test_what_is_no_mp3_is_not_taken_for_one(tmp_path: Path) -> None:
    frames = b"\xff\xfb\x90" * 9000
    soundfile.write(tmp_path / "whole.wav", np.zeros((9000, 1)), 44_100, subtype="PCM_24")
    whole = (tmp_path / "whole.wav").read_bytes()
    path = with_bytes(tmp_path / "song.mp3", whole[: -len(frames)] + frames)
    assert read(path)[0].shape == (1, 9000)
    for junk in (b"\xff" * 300_000, (b"ID3\4" + bytes(6)) * 9000):
        with pytest.raises(AudioError, match="cannot be read as audio"):
            read(with_bytes(tmp_path / "junk.mp3", junk))


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_that_tells_its_length_is_left_to_its_decoder(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "song.mp3"
    soundfile.write(path, np.zeros((9000, 2)), 44_100, compression_level=0.3, bitrate_mode=mode)
    assert read(path)[0].shape == (2, 9000)


def test_a_sound_stream_without_a_size_is_no_cut_file(tmp_path: Path) -> None:
    """ffmpeg, writing into a pipe, leaves 2^32 − 1 as the size of the data."""
    song = wave(tmp_path / "song.wav", subtype="PCM_16")
    at = song.read_bytes().index(b"data") + 4
    poke(song, at, b"\xff\xff\xff\xff")
    assert read(song)[0].shape == (2, 900)


ENCODED = {
    "song.m4a": ("aac", 44_100, 2, False, 100_001),
    "mono.m4a": ("aac", 48_000, 1, False, 100_001),
    "lossless.m4a": ("alac", 44_100, 2, False, 100_001),
    "song.mp3": ("libmp3lame", 44_100, 2, False, 100_001),
    "song.opus": ("libopus", 48_000, 2, False, 100_001),
    "song.webm": ("libopus", 48_000, 2, False, 100_001),
    "film.mp4": ("aac", 44_100, 2, True, 100_001),
    "film.mkv": ("aac", 44_100, 2, True, 98 * 1024),  # its container states no end: the encoder's padding stays
    "song.aac": ("aac", 44_100, 2, False, 99 * 1024),  # nor the beginning
    "song.wma": ("wmav2", 44_100, 2, False, 48 * 2048),  # the encoder drops the last samples
}


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_blocks_begin_again_at_the_start(tmp_path: Path, suffix: str) -> None:
    soundfile.write(tmp_path / f"a.{suffix}", np.random.default_rng(0).normal(0, 0.1, (150_000, 2)), 44_100)
    with AudioReader(tmp_path / f"a.{suffix}") as file:
        block = next(file.blocks())  # a pass that is left early
        first, second = (torch.cat(list(file.blocks()), 1) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first[:, : block.shape[1]], block)
    assert first.shape == (2, file.frames)


@pytest.mark.parametrize("name", ENCODED)
def test_what_ffmpeg_reads_is_read_to_its_exact_length(tmp_path: Path, name: str) -> None:
    codec, rate, channels, video, samples = ENCODED[name]
    audio = torch.from_numpy(encode_tone(tmp_path / name, codec, rate, channels, video=video))
    with AudioReader(tmp_path / name) as file:
        assert (file.rate, file.channels, file.frames) == (rate, channels, samples)
        blocks = list(file.blocks())
    assert max(block.shape[1] for block in blocks) <= BLOCK
    found = torch.cat(blocks, 1)
    assert found.shape == (channels, samples)
    if codec == "alac":
        assert torch.equal(found, audio)
    elif samples == 100_001:  # no delay: the tone is where it was
        middle = slice(1000, 90_000)
        assert (found - audio)[:, middle].square().mean() < 0.2 * 0.02**2 * 6
    for suffix in (".mp3", ".wav"):  # whatever it is called
        assert torch.equal(read((tmp_path / name).rename(tmp_path / f"x{suffix}"))[0], found)
        (tmp_path / f"x{suffix}").rename(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["song.m4a", "lossless.m4a", "song.mp3", "song.opus", "song.webm", "film.mp4", "song.aac"]
)
@pytest.mark.parametrize("share", [0.6, 0.9])
def test_what_ffmpeg_reads_is_refused_when_it_is_cut(tmp_path: Path, name: str, share: float) -> None:
    codec, rate, channels, video, _ = ENCODED[name]
    for options in ({}, {"movflags": "faststart"}) if "m4a" in name else ({},):
        encode_tone(tmp_path / name, codec, rate, channels, video=video, **options)
        with pytest.raises(AudioError, match=r"cut short|cannot be read as audio") as error:
            read(cut(tmp_path / name, share))
        assert str(tmp_path / name) in str(error.value)
        assert ";" in str(error.value)


def test_a_film_without_sound_and_a_playlist_are_named(tmp_path: Path) -> None:
    with av.open(tmp_path / "mute.mp4", "w") as container:
        pictures = container.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p")
        container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), "uint8"), format="rgb24")))
        container.mux(pictures.encode(None))
    with pytest.raises(AudioError, match="no sound in it"):
        read(tmp_path / "mute.mp4")
    wave(tmp_path / "other.wav")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/other.wav\n#EXT-X-ENDLIST\n"
    with pytest.raises(AudioError, match="cannot be read as audio"):
        read(with_bytes(tmp_path / "list.m3u8", playlist.encode()))
