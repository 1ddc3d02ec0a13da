"""Channels come in the order of a WAV file's channel mask, whatever their order in the file; blocks stay small."""

from __future__ import annotations

import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from audio_files import encode_tone, wave, with_bytes

from bsmamba2.audio.decoders import SPEAKERS, VORBIS_SPEAKERS
from bsmamba2.audio.files import BLOCK, AudioError, AudioReader, AudioWarning, find_audio_files

RATE = 48_000
LAYOUTS = {3: "3.0", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
NAMES = {
    3: "FL FR FC", 4: "FL FR BL BR", 5: "FL FR FC BL BR", 6: "FL FR FC LFE BL BR", 7: "FL FR FC LFE BC SL SR",
    8: "FL FR FC LFE BL BR SL SR",
}  # fmt: skip


def tones(channels: int) -> np.ndarray:
    """(c, samples): channel i sounds at 200 (i + 1) Hz, but the LFE, which codecs filter, at 50 Hz."""
    pitches = [50 if name == "LFE" else 200 * (i + 1) for i, name in enumerate(NAMES[channels].split())]
    return np.stack([0.2 * np.sin(2 * np.pi * pitch * np.arange(RATE) / RATE) for pitch in pitches])


def order_of(found: torch.Tensor) -> list[int]:
    """For each channel the index of the tone in it; −1 for another pitch."""
    spectrum = torch.fft.rfft(found[:, 4000:44_000] * torch.hann_window(40_000)).abs()
    pitches = (spectrum.argmax(-1) * RATE / 40_000).round().int().tolist()
    lfe = NAMES[len(found)].split().index("LFE") if len(found) > 5 else -1
    return [lfe if pitch == 50 else pitch // 200 - 1 for pitch in pitches]


def read_all(path: Path) -> tuple[tuple[str, ...], torch.Tensor]:
    with AudioReader(path) as file:
        return file.layout, torch.cat(list(file.blocks()), dim=1)


@pytest.mark.parametrize("channels", LAYOUTS)
@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_vorbis_and_opus_have_an_order_of_their_own(tmp_path: Path, subtype: str, channels: int) -> None:
    """libsndfile writes the channels as they are given, so that they are given in Vorbis's order."""
    expected = NAMES[channels].split()
    order = [expected.index(name) for name in VORBIS_SPEAKERS[channels].split()]
    soundfile.write(tmp_path / "a.ogg", tones(channels)[order].T, RATE, format="OGG", subtype=subtype)
    layout, found = read_all(tmp_path / "a.ogg")
    assert layout == tuple(expected)
    assert order_of(found) == list(range(channels))
    with av.open(tmp_path / "a.ogg") as container:  # FFmpeg agrees
        assert container.streams.audio[0].layout.name == LAYOUTS[channels]
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)] if channels < 8 else []
    if frames:
        assert order_of(torch.from_numpy(np.concatenate(frames, axis=1))) == list(range(channels))


@pytest.mark.parametrize(
    ("name", "codec", "channels"),
    [
        *(("a.flac", "flac", channels) for channels in LAYOUTS),
        *(("a.wav", "pcm_s16le", channels) for channels in LAYOUTS),
        *(("a.w64", "pcm_s16le", channels) for channels in (4, 6, 8)),
        *(("a.caf", "pcm_s16be", channels) for channels in (3, 7)),
        *(("a.mov", "pcm_s16le", channels) for channels in (3, 6, 7)),
        *(("a.m4a", "alac", channels) for channels in (3, 5, 6)),
        *(("a.m4a", "aac", channels) for channels in (3, 4, 5, 6)),
        *(("a.opus", "libopus", channels) for channels in (3, 4, 6, 8)),
        *(("a.mka", "libopus", channels) for channels in (6, 8)),
        ("a.oga", "flac", 7),
    ],
)
def test_layouts_that_ffmpeg_writes(tmp_path: Path, name: str, codec: str, channels: int) -> None:
    audio = tones(channels)
    encode_tone(tmp_path / name, codec, RATE, channels, audio=audio, layout=LAYOUTS[channels])
    layout, found = read_all(tmp_path / name)
    assert layout == tuple(NAMES[channels].split())
    assert order_of(found) == list(range(channels))
    if codec in ("flac", "alac", "pcm_s16le", "pcm_s16be"):
        expected = torch.from_numpy(np.rint(audio * 32768) / 32768).float()
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("tag", "order"), [(121, "FL FR FC LFE SL SR"), (123, "FL FC FR SL SR LFE")])
@pytest.mark.parametrize("suffix", ["caf", "mov"])
def test_files_with_an_order_of_their_own(tmp_path: Path, suffix: str, tag: int, order: str) -> None:
    """Apple's layouts MPEG 5.1 A and C, in MOV and CAF."""
    names = [name.replace("B", "S") for name in NAMES[6].split()]
    audio = tones(6)[[names.index(name) for name in order.split()]]
    encode_tone(tmp_path / f"a.{suffix}", "pcm_s16le", RATE, 6, audio=audio, layout="5.1")
    data = bytearray((tmp_path / f"a.{suffix}").read_bytes())
    at = data.index(b"chan") + {"caf": 12, "mov": 8}[suffix]
    data[at : at + 4] = (tag << 16 | 6).to_bytes(4, "big")
    layout, found = read_all(with_bytes(tmp_path / "b", bytes(data)))
    assert layout == tuple(names)
    assert order_of(found) == list(range(6))


def test_files_that_declare_no_layout(tmp_path: Path) -> None:
    for channels in (1, 2, 3, 6, 9):
        assert read_all(wave(tmp_path / "a.wav", channels=channels))[0] == ()
        assert read_all(wave(tmp_path / "a.caf", channels=channels))[0] == ()
    assert [name for name in SPEAKERS if name in NAMES[8].split()] == NAMES[8].split()


@pytest.mark.parametrize("format", ["WAV", "CAF", "OGG"])
def test_many_channels_come_in_small_blocks(tmp_path: Path, format: str) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, (3000, 255)).astype("float32")
    soundfile.write(tmp_path / "a", audio, 8000, format=format, subtype="VORBIS" if format == "OGG" else "FLOAT")
    with AudioReader(tmp_path / "a") as file:
        blocks = list(file.blocks())
    assert max(block.numel() for block in blocks) <= 2 * BLOCK
    found = torch.cat(blocks, dim=1)
    assert found.shape == (255, 3000)
    if format != "OGG":
        assert torch.equal(found, torch.from_numpy(audio.T))


def test_folders_take_every_kind_by_name_or_content(tmp_path: Path) -> None:
    names = ["a.wav", "b.aifc", "c.WAVE", "d.au", "sub/e.flac", "sub/f", "sub/g.sound"]
    (tmp_path / "sub").mkdir()
    for name, format in zip(names, ("WAV", "AIFF", "WAV", "AU", "FLAC", "OGG", "MP3"), strict=True):
        soundfile.write(tmp_path / name, np.zeros((900, 1)), 8000, format=format)
    encode_tone(tmp_path / "h", "aac", 44_100, format="ipod")
    others = ["cover.jpg", "notes.txt", "sub/empty"]
    for name, content in zip(others, (b"\xff\xd8\xff\xe0 a picture", b"some words", b""), strict=True):
        with_bytes(tmp_path / name, content)
    wave(tmp_path / ".hidden.wav")
    songs, errors, left_out = find_audio_files(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in songs] == [*names[:4], "h", *names[4:]]
    assert [str(path.relative_to(tmp_path)) for path in left_out] == others
    assert errors == []
    for song in songs:
        assert read_all(song)[1].shape[1] > 800


def test_a_file_that_is_renamed_while_nothing_is_in_it(tmp_path: Path) -> None:
    """Neither suffix nor magic make a song."""
    for magic in (
        b"RIFF",
        b"OggS",
        b"fLaC",
        b"\x1a\x45\xdf\xa3",
        b"FORM\0\0\0\0AIFF",
        b".snd",
        b"ID3",
        b"caff\0\1\0\0",
    ):
        for size in (0, 30, 3000):
            path = with_bytes(tmp_path / "song.mp3", magic + bytes(size))
            with pytest.raises(AudioError, match=r"song\.mp3: .*;"):
                read_all(path)


@pytest.mark.parametrize("codec", ["libmp3lame", "aac", "libopus", "flac", "alac"])
def test_the_end_of_an_mp4_is_exact_whatever_is_in_it(tmp_path: Path, codec: str) -> None:
    """Its edit list is rounded to 1 ms, its index is not."""
    rate = 48_000 if codec == "libopus" else 44_100
    audio = torch.from_numpy(encode_tone(tmp_path / "a.mp4", codec, rate, format="mp4"))
    _, found = read_all(tmp_path / "a.mp4")
    assert found.shape == audio.shape
    assert (found - audio)[:, 1000:90_000].square().mean() < 5e-4  # the noise in the tone, of 4e-4, is not kept


@pytest.mark.parametrize("kind", ["VOC", "IRCAM", "AVR", "PVF", "SVX", "PAF", "NIST", "MAT4", "a.spdif", "a.nut"])
def test_formats_that_are_not_supported_are_named_as_such(tmp_path: Path, kind: str) -> None:
    """FFmpeg reads most of them, but nothing shows where they end."""
    path = tmp_path / f"a.{kind.rpartition('.')[2]}"
    if kind.isupper():
        soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, (9001, 1)), 8000, format=kind, subtype="PCM_16")
    else:
        encode_tone(path, "libmp3lame", 48_000)
    with pytest.raises(AudioError, match=r"cannot be read as audio: its format is not supported; convert it to WAV"):
        read_all(path)


@pytest.mark.parametrize(("suffix", "codec"), [("mpg", "libmp3lame"), ("ts", "libmp3lame"), ("webm", "libopus")])
def test_a_cut_file_is_refused_or_a_message_says_that_it_cannot_be_known(
    tmp_path: Path, suffix: str, codec: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    encode_tone(path, codec, 48_000, **({"live": "1"} if suffix == "webm" else {}))
    message = "does not state its length; if its end was cut off, nothing shows it"
    with pytest.warns(AudioWarning, match=message):
        whole = read_all(path)[1].shape[1]
    content = path.read_bytes()
    for share in (0.3, 0.6, 0.95):
        with_bytes(path, content[: int(len(content) * share)])
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            try:
                assert 0 < read_all(path)[1].shape[1] < whole
            except AudioError as error:
                assert ";" in str(error)  # noqa: PT017
            else:
                assert [message in str(found.message) for found in messages] == [True]


@pytest.mark.filterwarnings("ignore:.* does not state its length")
def test_joined_live_streams_are_read_to_the_end(tmp_path: Path) -> None:
    encode_tone(tmp_path / "a.webm", "libopus", 48_000, live="1")
    encode_tone(tmp_path / "b.webm", "libopus", 48_000)
    live, file = (tmp_path / "a.webm").read_bytes(), (tmp_path / "b.webm").read_bytes()
    parts = {content: read_all(with_bytes(tmp_path / "song", content))[1] for content in (live, file)}
    for contents in ((live, live), (live, file), (file, live)):
        found = read_all(with_bytes(tmp_path / "song", b"".join(contents)))[1]
        assert torch.equal(found, torch.cat([parts[content] for content in contents], dim=1))
    with pytest.raises(AudioError, match="cut short"):
        read_all(with_bytes(tmp_path / "song", live[:-1]))


def test_files_of_no_samples_say_so(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros((900, 2)), 48_000)
    head = bytearray((tmp_path / "a.flac").read_bytes()[:42])
    head[4] |= 0x80  # the last block of metadata
    head[21:26] = bytes([head[21] & 0xF0, 0, 0, 0, 0])
    soundfile.write(tmp_path / "a.opus", np.zeros((0, 2)), 48_000, format="OGG", subtype="OPUS")
    for path in (with_bytes(tmp_path / "a.flac", bytes(head)), tmp_path / "a.opus"):
        with pytest.raises(AudioError, match=r"holds no samples; get the whole file again, or give another song"):
            read_all(path)


def test_a_cut_wavpack_file_is_named_as_cut(tmp_path: Path) -> None:
    with av.open(tmp_path / "a.wv", "w") as container:
        stream = container.add_stream("wavpack", rate=8000, layout="mono", format="s16p")
        for _ in range(4):
            noise = np.random.default_rng(0).integers(-3000, 3000, (1, 4000)).astype("int16")
            frame = av.AudioFrame.from_ndarray(noise, format="s16p", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = (tmp_path / "a.wv").read_bytes()
    assert read_all(tmp_path / "a.wv")[1].shape == (1, 16_000)
    for share in (0.4, 0.7, 0.95):
        with_bytes(tmp_path / "a.wv", content[: int(len(content) * share)])
        with pytest.raises(AudioError, match=r"is damaged or cut short after \d\.\d s|holds no samples; get the whole"):
            read_all(tmp_path / "a.wv")


CUTS = (1, 2, 3, 4, 8, 16, 23, 64, 128, 300, 4000)
WRITTEN = {
    "WAV": "ALAW", "RF64": "PCM_24", "W64": "FLOAT", "AIFF": "PCM_S8", "CAF": "ALAC_16", "AU": "PCM_16",
    "FLAC": "PCM_16", "flv": "aac", "mka": "flac", "avi": "pcm_s16le",
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", WRITTEN)
def test_no_cut_goes_unnoticed(tmp_path: Path, kind: str, channels: int) -> None:
    """Bytes cut from the end change nothing, or are named in a warning or an error."""
    path = tmp_path / f"a.{kind.lower()}"
    if kind.isupper():
        noise = np.random.default_rng(0).normal(0, 0.1, (5001, channels))
        soundfile.write(path, noise, 44_100, format=kind, subtype=WRITTEN[kind])
    else:
        encode_tone(path, WRITTEN[kind], 44_100, channels)
    content = path.read_bytes()
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        whole = read_all(path)[1]
        for cut in (*CUTS, len(content) // 2):
            messages.clear()
            try:
                found = read_all(with_bytes(path, content[:-cut]))[1]
            except AudioError as error:
                assert ";" in str(error)  # noqa: PT017
            else:
                assert messages or torch.equal(found, whole), cut


def test_mp3_in_a_wav_file(tmp_path: Path) -> None:
    tone = torch.from_numpy(encode_tone(tmp_path / "a.wav", "libmp3lame", 44_100))
    _, found = read_all(tmp_path / "a.wav")
    delay = 1105  # of the encoder, which the file does not state
    assert (found[:, delay:][:, 1000:90_000] - tone[:, 1000:90_000]).square().mean() < 5e-4
