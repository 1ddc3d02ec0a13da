"""Every file is read whole or refused: cut and damaged files, wrong counts in headers, files joined end to end."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode_tone, with_bytes

from bsmamba2.audio.files import AudioError, AudioWarning, read
from bsmamba2.audio.ogg import ogg_crc
from bsmamba2.audio.source import Splice

pytestmark = pytest.mark.filterwarnings("ignore:.* does not state its length")

RATE = 44_100
SAMPLES = 44_100


def noise(samples: int = SAMPLES, rate: int = RATE, channels: int = 2, **options: object) -> bytes:
    """A file of noise by libsndfile."""
    file = io.BytesIO()
    audio = np.random.default_rng(samples).normal(0, 0.1, (samples, channels))
    soundfile.write(file, audio, rate, **options)  # type: ignore[arg-type]
    return file.getvalue()


def ogg(samples: int = SAMPLES, rate: int = RATE, channels: int = 2, subtype: str = "VORBIS") -> bytes:
    return noise(samples, rate, channels, format="OGG", subtype=subtype)


def mp3(samples: int = SAMPLES, rate: int = RATE, channels: int = 2) -> bytes:
    return noise(samples, rate, channels, format="MP3", bitrate_mode="VARIABLE", compression_level=0.3)


def flac(samples: int = SAMPLES, rate: int = RATE, channels: int = 2, count: int | None = None) -> bytes:
    """FLAC that claims `count` samples."""
    data = bytearray(noise(samples, rate, channels, format="FLAC"))
    if count is not None:
        fields = int.from_bytes(data[18:26], "big")
        data[18:26] = (fields >> 36 << 36 | count).to_bytes(8, "big")
    return bytes(data)


def set_field(data: bytes, place: int, format: str, value: int) -> bytes:
    return data[:place] + struct.pack(format, value) + data[place + struct.calcsize(format) :]


def same_sound(path: Path, data: bytes, *parts: bytes) -> None:
    """Check that a file gives the samples of other files, end to end."""
    expected = torch.cat([read(with_bytes(path, part))[0] for part in parts], dim=1)
    assert torch.equal(read(with_bytes(path, data))[0], expected)


def refused(path: Path, data: bytes, match: str = "cut short|damaged") -> None:
    with pytest.raises(AudioError, match=match) as error:
        read(with_bytes(path, data))
    assert str(path) in str(error.value)
    assert ";" in str(error.value)


def flip(data: bytes, place: float) -> bytes:
    at = int(len(data) * place)
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


JOINED: dict[str, Callable[..., bytes]] = {
    "mp3": mp3,
    "vorbis": ogg,
    "opus": lambda samples=SAMPLES, rate=48_000, channels=2: ogg(samples, rate, channels, "OPUS"),
    "flac": flac,
    "wav": lambda *args: noise(*args, format="WAV"),
    "rf64": lambda *args: noise(*args, format="RF64"),
    "w64": lambda *args: noise(*args, format="W64"),
    "aiff": lambda *args: noise(*args, format="AIFF"),
    "caf": lambda *args: noise(*args, format="CAF"),
}


@pytest.mark.parametrize("kind", JOINED)
def test_joined_files_are_read_to_the_end(tmp_path: Path, kind: str) -> None:
    make, path = JOINED[kind], tmp_path / "song"
    first, second = make(SAMPLES), make(5000)
    same_sound(path, first + second, first, second)
    same_sound(path, first + second + first, first, second, first)
    with pytest.raises(AudioError, match=r"changes its rate or (number of )?channels after (1\.0|0\.9) s"):
        read(with_bytes(path, first + make(5000, 48_000 if kind == "opus" else RATE, 1)))
    if kind != "opus":  # which is always at 48 kHz
        refused(path, first + make(5000, 48_000), "changes its rate")
    refused(path, first[: len(first) // 2] + second)
    refused(path, first + second[: len(second) * 3 // 4], "cut short|damaged|cannot be read")


@pytest.mark.parametrize("suffix", ["m4a", "mka", "webm"])
def test_joined_containers_of_ffmpeg_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    codec, rate = ("libopus", 48_000) if suffix == "webm" else ("aac", 44_100)
    encode_tone(tmp_path / f"a.{suffix}", codec, rate)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    same_sound(tmp_path / "song", data + data, data, data)


def test_an_mp3_and_the_count_of_its_frames(tmp_path: Path) -> None:
    """A count that is too low is the header's error, a count that is too high means that frames are missing."""
    path, song = tmp_path / "song", mp3()
    place = song.index(b"Xing") + 8
    count = int.from_bytes(song[place : place + 4], "big")
    assert read(with_bytes(path, song))[0].shape == (2, SAMPLES)
    for stale in (0, 1, count // 2, count - 1):
        samples = read(with_bytes(path, set_field(song, place, ">I", stale)))[0].shape[1]
        assert samples == count * 1152  # with the encoder's delay and padding: where they end is not known
    for missing in (2, 20, 99_999):
        refused(path, set_field(song, place, ">I", count + missing))
    frames = [at for at in range(len(song)) if song[at : at + 2] == song[:2] and song[at + 3] == song[3]]
    for lost in (1, 2, 11):  # whole frames: 0.026 to 0.3 s
        refused(path, song[: frames[-lost]])
    refused(path, song[:-1])


def test_bytes_between_frames_of_an_mp3(tmp_path: Path) -> None:
    path, song = tmp_path / "song", mp3()
    tags = b"TAG" + bytes(125), b"ID3\4\0\0\0\0\0\x0a" + bytes(10), b"APETAGEX" + bytes(24), bytes(777)
    for tag in (*tags, b"LYRICSBEGINla la la000020LYRICS200", b"".join(tags)):
        same_sound(path, song + tag + song + tag, song, song)
    refused(path, song + b"junk" + song, r"after 1\.0 s: neither a frame nor a tag")
    with pytest.warns(AudioWarning, match=r"song: 4 bytes after the sound are neither sound nor a tag"):
        same_sound(path, song + b"junk", song)
    refused(path, song + bytes(range(1, 251)) * 300, "neither a frame nor a tag")
    junk = np.random.default_rng(0).integers(1, 255, 1500, dtype="uint8").tobytes()
    refused(path, song[:9000] + junk + song[10_500:], "neither a frame nor a tag")


def test_an_mp3_frame_that_cannot_be_decoded_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Packet:
        """A packet that fails, as those that a decoder rejects."""

        size, pos, stream_index, is_corrupt = 0, None, 0, False

        def decode(self) -> list[av.AudioFrame]:
            raise av.InvalidDataError(0, "Header missing")

    class Container:
        """A container whose fifth packet fails."""

        def __init__(self, container: object) -> None:
            self.container = container
            self.streams = container.streams  # type: ignore[attr-defined]
            self.format = container.format  # type: ignore[attr-defined]

        def __enter__(self) -> Container:
            return self

        def __exit__(self, *_: object) -> None:
            self.container.close()  # type: ignore[attr-defined]

        def demux(self) -> list[object]:
            packets = list(self.container.demux())  # type: ignore[attr-defined]
            return [*packets[:5], Packet(), *packets[6:]]

    whole = av.open
    monkeypatch.setattr("bsmamba2.audio.decoders.av.open", lambda *args, **options: Container(whole(*args, **options)))
    refused(tmp_path / "song", mp3(), r"after 0\.\d s \(Header missing\)")


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", 44_100), ("OPUS", 48_000)])
def test_ogg_pages(tmp_path: Path, subtype: str, rate: int) -> None:
    path, song = tmp_path / "song", ogg(2 * rate, rate, 2, subtype)
    pages = [at for at in range(len(song)) if song[at : at + 4] == b"OggS"]
    page = bytearray(song[pages[-1] :])
    page[5] &= ~4  # no end of the stream, as live streams and some recorders leave it
    page[22:26] = bytes(4)
    page[22:26] = struct.pack("<I", ogg_crc(bytes(page)))
    live = song[: pages[-1]] + bytes(page)
    same_sound(path, live, song)
    same_sound(path, live + song, song, song)
    assert read(with_bytes(path, song[: pages[-1]]))[0].shape[1] > rate  # whole pages: what a live stream gives
    same_sound(path, song + b"TAG" + bytes(125), song)
    for place in (0.3, 0.6, 0.999):
        refused(path, flip(song, place), "fails its checksum|no page begins")
    refused(path, song[:-1])
    refused(path, song[: pages[-1] + 20])
    hole = len(pages) // 2
    refused(path, song[: pages[hole]] + song[pages[hole + 1] :], "pages are missing")
    refused(path, song + b"junk", "no page begins")


def repaged(song: bytes, hole: float, later: int = 0) -> bytes:
    """Ogg without the page at some share of it, and with granule positions that are so many samples later."""
    pages = [at for at in range(len(song)) if song[at : at + 4] == b"OggS"]
    data, number = b"", 0
    for index, (start, end) in enumerate(zip(pages, [*pages[1:], len(song)], strict=True)):
        if index != int(len(pages) * hole):
            page = bytearray(song[start:end])
            (granule,) = struct.unpack("<q", page[6:14])
            page[6:14] = struct.pack("<q", granule + later * (granule > 0))
            page[18:26] = struct.pack("<II", number, 0)
            page[22:26] = struct.pack("<I", ogg_crc(bytes(page)))
            data, number = data + page, number + 1
    return data


@pytest.mark.parametrize("later", [0, 480_000])
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS", "FLAC"])
def test_granules_of_a_file_with_a_hole_that_its_numbers_hide(tmp_path: Path, subtype: str, later: int) -> None:
    """Also in the recording of a live stream, whose granule positions begin late."""
    if subtype == "FLAC":
        audio = np.random.default_rng(0).normal(0, 0.1, (2, 48_000 * 6))
        encode_tone(tmp_path / "a.oga", "flac", 48_000, audio=audio)
        song = (tmp_path / "a.oga").read_bytes()
    else:
        song = ogg(48_000 * 6, 48_000, 2, subtype)
    same_sound(tmp_path / "song", repaged(song, 2, later), song)
    for place in (0.3, 0.6, 0.9) if subtype != "FLAC" else ():
        refused(tmp_path / "song", repaged(song, place, later), r"of (6\.0|5\.\d) s can be read")


def test_ogg_crc() -> None:
    """The polynomial division of RFC 3533, bit by bit."""
    page = bytes(range(99))
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 * (crc >> 31)) & 0xFFFFFFFF
    assert ogg_crc(page) == crc


def test_flac_and_the_count_of_its_samples(tmp_path: Path) -> None:
    path, song = tmp_path / "song", flac()
    for count in (0, 1, SAMPLES // 2):  # 0: written into a pipe
        same_sound(path, flac(count=count), song)
        refused(path, flac(count=count)[:-5])
        refused(path, flip(flac(count=count), 0.5))
    for count in (SAMPLES + 1, 2**36 - 1):
        refused(path, flac(count=count), r"of .* s can be read")
    same_sound(path, b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + song + b"TAG" + bytes(125), song)


PCM = np.rint(np.random.default_rng(0).normal(0, 0.1, (SAMPLES, 2)) * 32767).astype("<i2").tobytes()


def wav(size: int = len(PCM), form: int | None = None, before: bytes = b"", after: bytes = b"") -> bytes:
    """A WAV file whose head claims some size of the data and of the file."""
    format = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 2, RATE, 4 * RATE, 4, 16)
    chunks = b"WAVE" + format + before + b"data" + struct.pack("<I", size) + PCM + after
    return b"RIFF" + struct.pack("<I", len(chunks) if form is None else form) + chunks


INFO = b"INFOISFT" + struct.pack("<I", 14) + b"recorder 1.0.0"
WHOLE = {
    **{f"head counted, {over} bytes": wav(len(PCM) + over) for over in (1, 2, 8, 16, 28, 36, 44)},
    **{f"head counted twice, {over} bytes": wav(len(PCM) + over, len(PCM) + over + 36) for over in (8, 36, 44)},
    **{f"size {size:#x}, form {form:#x}": wav(size, form)
       for size in (0, 0xFFFFFFFF, 0x7FFFF000, 0x80000000) for form in (0, 36, 0xFFFFFFFF)},
    "size 0, padded to 4 KB": wav(0, 4088, b"JUNK" + struct.pack("<I", 4004) + bytes(4004)),
    "list padded to four bytes inside": wav(before=b"LIST" + struct.pack("<I", 28) + INFO + b"\0\0"),
    "list padded to four bytes": wav(before=b"LIST" + struct.pack("<I", 26) + INFO + b"\0\0"),
    "list behind": wav(after=b"LIST" + struct.pack("<I", 26) + INFO),
    "list behind, cut": wav(after=b"LIST" + struct.pack("<I", 26) + INFO[:9]),
    "tag behind": wav(after=b"TAG" + bytes(125)),
    "zeros behind": wav(after=bytes(4095)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_wav_headers_that_are_wrong_about_sound_that_is_there(tmp_path: Path, kind: str) -> None:
    found, rate = read(with_bytes(tmp_path / "song", WHOLE[kind]))
    expected = np.frombuffer(PCM, "<i2").reshape(-1, 2).T / np.float32(32768)
    assert rate == RATE
    assert torch.equal(found, torch.from_numpy(expected))


def test_wav_files_that_lack_sound_or_hold_more(tmp_path: Path) -> None:
    path = tmp_path / "song"
    for cut in (1, 4, 12, 40, 1000, len(PCM) // 2):
        refused(path, wav()[:-cut], "cut short")
    refused(path, wav(len(PCM) + 46), "cut short")
    refused(path, wav(len(PCM) // 2), "bytes after the sound that its head counts")
    refused(path, wav()[:44][:40] + bytes(4), "holds no samples")
    refused(path, wav()[:40] + bytes(4) + b"LIST\4\0\0\0INFO", "holds no samples")


UNKNOWN = {  # where the size stands, how, and what programs leave there that write into a pipe
    "AIFF": (b"SSND", 4, ">I", (0, 0xFFFFFFFF, 0x7F000008, 0x7FFFFFFF)),
    "W64": (b"data\xf3", 16, "<Q", (0, 24, 2**63 - 1, 2**64 - 1)),
    "RF64": (b"ds64", 16, "<Q", (0, 2**64 - 1)),
    "CAF": (b"data", 4, ">q", (-1, 0)),
    "AU": (b".snd", 8, ">I", (0, 0xFFFFFFFF)),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_sizes_that_were_never_written_and_files_that_are_cut(tmp_path: Path, kind: str) -> None:
    key, offset, format, values = UNKNOWN[kind]
    path, song = tmp_path / "song", noise(format=kind, subtype="PCM_16")
    for value in values:
        same_sound(path, set_field(song, song.index(key) + offset, format, value), song)
    same_sound(path, song + b"TAG" + bytes(125), song)
    for share in (0.5, 0.9):
        refused(path, song[: int(len(song) * share)], "cut short")
    refused(path, song[:-4], "cut short")
    if kind == "RF64":
        same_sound(path, b"BW64" + song[4:], song)


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.m4a", "aac"), ("a.mka", "aac"), ("a.webm", "libopus"), ("a.aac", "aac"), ("a.wma", "wmav2")],
)
def test_the_last_bytes_of_a_container_count(tmp_path: Path, name: str, codec: str) -> None:
    encode_tone(tmp_path / name, codec, 48_000)
    data = (tmp_path / name).read_bytes()
    for lost in (1, 100):
        refused(tmp_path / name, data[:-lost])


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "aac"), ("m2ts", "aac"), ("mpg", "libmp3lame"), ("vob", "ac3")])
def test_frames_in_packets_are_one_recording(tmp_path: Path, suffix: str, codec: str) -> None:
    """The last packets hold frames that could be taken for another recording behind the first."""
    path = tmp_path / f"a.{suffix}"
    encode_tone(path, codec, 48_000, 1, format={"m2ts": "mpegts"}.get(suffix))
    data, samples = path.read_bytes(), read(path)[0].shape[1]
    assert 100_001 <= samples < 104_000
    for behind in (bytes(99), bytes(5000)):
        assert read(with_bytes(path, data + behind))[0].shape[1] == samples
    song = mp3(5000, 48_000, 1)
    assert read(with_bytes(path, data + song))[0].shape[1] == samples + 5000
    if suffix in ("ts", "mpg"):  # one stream that goes on: the decoder's overlap differs
        assert abs(read(with_bytes(path, data + data))[0].shape[1] - 2 * samples) <= 2 * 1152


def test_an_edit_list_ends_a_song(tmp_path: Path) -> None:
    """An MP4 may hold more sound than its edit list plays: encoders end it there within a frame."""
    for timescale, samples in ((44_100, 99_777), (1000, 99_000), (600, 99_000)):
        path = tmp_path / "song.m4a"
        encode_tone(path, "aac", 44_100, movie_timescale=str(timescale))
        whole, data = read(path)[0], bytearray(path.read_bytes())
        duration = samples * timescale // 44_100
        at = data.index(b"elst") + 12
        data[at : at + 4] = struct.pack(">I", duration)
        end = round(Fraction(duration, timescale) * 44_100)
        found = read(with_bytes(path, bytes(data)))[0]
        assert abs(found.shape[1] - end) <= 1
        assert torch.equal(found, whole[:, : found.shape[1]])


def test_junk_and_small_files_take_little_time(tmp_path: Path) -> None:
    path = tmp_path / "song"
    for unit in (b"\xff\xfb\x90\0", b"\xff\xfb\x90", b"\xff\xfb\x90\x64" + b"\xff" * 413, b"\xff\xf3\x10\x64"):
        refused(path, (unit * (1 << 20))[: 1 << 20], "cannot be read|cut short|damaged")


def test_pieces_of_a_file(tmp_path: Path) -> None:
    data = bytes(range(200))
    with with_bytes(tmp_path / "a", data).open("rb", buffering=0) as raw:
        file = Splice(raw, (range(10, 20), b"abc", range(50, 50), range(100, 200)))
        expected = data[10:20] + b"abc" + data[100:]
        assert file.read() == expected
        for start in range(len(expected) + 2):
            assert file.seek(start) == file.tell() == start
            assert file.read(7) == expected[start : start + 7]
        assert file.seek(-3, 2) == len(expected) - 3
        assert file.seek(1, 1) == len(expected) - 2


def test_very_many_recordings_in_a_small_file(tmp_path: Path) -> None:
    song = noise(10, format="WAV")
    assert read(with_bytes(tmp_path / "song", song * 100))[0].shape == (2, 1000)
    refused(tmp_path / "song", song * 1001, "more than 1,000 recordings end to end")
    frame = b"\xff\xf3\x10\x64" + bytes(47)  # of 26 bytes, the others are padding
    refused(tmp_path / "song", frame * 20_000, "neither a frame nor a tag")


def test_big_endian_wav(tmp_path: Path) -> None:
    sound = (np.sin(np.arange(4410) / 20) * 9000).astype(">i2")
    head = b"WAVEfmt " + struct.pack(">IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    data = head + b"data" + struct.pack(">I", sound.nbytes) + sound.tobytes()
    path = with_bytes(tmp_path / "a.wav", b"RIFX" + struct.pack(">I", len(data)) + data)
    assert torch.equal(read(path)[0][0], torch.from_numpy(sound.astype("float32") / 32768))
    refused(path, path.read_bytes()[:-3000])


def test_a_second_chunk_of_sound_and_a_cut_avi_are_refused(tmp_path: Path) -> None:
    content = wav()
    refused(tmp_path / "a.wav", content + content[content.index(b"data") :], "second chunk of sound")
    avi = tmp_path / "a.avi"
    encode_tone(avi, "pcm_s16le", 44_100)
    read(avi)
    refused(avi, avi.read_bytes()[:-4000])


def test_the_frame_count_of_fraunhofers_encoder_is_no_sound(tmp_path: Path) -> None:
    content = mp3(rate=44_100)
    size = content.index(content[:2], 40)  # the first frame counts the others, for LAME's decoder
    frames = content[size:]
    plain = read(with_bytes(tmp_path / "plain.mp3", frames))[0]
    path, head = tmp_path / "vbri.mp3", content[:4].ljust(36, b"\0") + b"VBRI"
    for count in (3, 100_000):
        tag = (head + struct.pack(">HHHII", 1, 0, 75, len(frames), count)).ljust(size, b"\0")
        if count == 3:
            assert torch.equal(read(with_bytes(path, tag + frames))[0], plain)
        else:
            refused(path, tag + frames)
