"""Recorded instruments: a sound font of one sample, written here, and songs in which a font plays."""

from __future__ import annotations

import ctypes.util
import importlib.util
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bsmamba2.synth import Song, synthesise, synthesise_songs, synthesiser
from bsmamba2.synth.accompaniment import play_accompaniment
from bsmamba2.synth.instruments import FAMILIES
from bsmamba2.synth.score import Note, draw_score
from bsmamba2.synth.soundfont import BLOCK, DRUMS, KIT_KEYS, PROGRAMS, Recorded, SoundFont

RATE, DITHER = 44_100, 1e-4
installed = ctypes.util.find_library("fluidsynth") and importlib.util.find_spec("fluidsynth")
needs_fluidsynth = pytest.mark.skipif(not installed, reason="FluidSynth or its binding is not installed")


def write_font(path: Path, presets: Iterable[tuple[int, int]] = ((0, 0), (DRUMS, 0))) -> Path:
    """A sound font whose presets (bank, program) all play one sine of 441 Hz, looped, which it calls pitch 69."""
    wave = (8_000 * np.sin(2 * np.pi * np.arange(RATE) / 100)).astype("<i2").tobytes() + bytes(92)

    def chunk(name: str, body: bytes) -> bytes:
        return name.encode() + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)

    def text(name: str) -> bytes:
        return name.encode().ljust(20, b"\0")

    places = list(presets)
    headers = [text(f"{b}-{p}") + struct.pack("<HHHIII", p, b, i, 0, 0, 0) for i, (b, p) in enumerate(places)]
    end = text("EOP") + struct.pack("<HHHIII", 0, 0, len(places), 0, 0, 0)
    tables = {
        "phdr": b"".join(headers) + end,
        "pbag": b"".join(struct.pack("<HH", i, 0) for i in range(len(places) + 1)),
        "pmod": bytes(10),
        "pgen": struct.pack("<HH", 41, 0) * len(places) + bytes(4),  # 41: the instrument
        "inst": text("sine") + struct.pack("<H", 0) + text("EOI") + struct.pack("<H", 1),
        "ibag": struct.pack("<HHHH", 0, 0, 2, 0),
        "imod": bytes(10),
        "igen": struct.pack("<HHHHHH", 54, 1, 53, 0, 0, 0),  # 54: looped; 53: the sample
        "shdr": text("sine")
        + struct.pack("<IIIIIBbHH", 0, RATE, 100, 44_000, RATE, 69, 0, 0, 1)
        + text("EOS")
        + bytes(26),
    }
    about = chunk("ifil", struct.pack("<HH", 2, 1)) + chunk("isng", b"EMU8000\0") + chunk("INAM", b"test\0\0")
    parts = {"INFO": about, "sdta": chunk("smpl", wave), "pdta": b"".join(chunk(*table) for table in tables.items())}
    body = b"sfbk" + b"".join(chunk("LIST", name.encode() + part) for name, part in parts.items())
    path.write_bytes(chunk("RIFF", body))
    return path


@pytest.fixture
def font(tmp_path: Path) -> SoundFont:
    return SoundFont(write_font(tmp_path / "sine.sf2"))


@needs_fluidsynth
def test_a_note_is_heard_when_it_is_played_at_its_pitch(font: SoundFont) -> None:
    assert font.presets == {(0, 0): "0-0", (DRUMS, 0): "128-0"}
    sound = font.play([Note(0.5, 0.5, 81)], 0, 2 * RATE, RATE)
    assert (sound.shape, sound.dtype) == ((2, 2 * RATE), np.float32)
    start = round(0.5 * RATE / BLOCK) * BLOCK
    assert np.abs(sound[:, : start - BLOCK]).max() < DITHER
    assert np.abs(sound[:, start : start + 2 * BLOCK]).max() > 0.01
    assert np.abs(sound[:, round(1.2 * RATE) :]).max() < 1e-3  # let go after half a second
    for rate in (8_000, RATE, 96_000):
        middle = font.play([Note(0.5, 0.5, 81)], 0, 2 * rate, rate)[0, round(0.6 * rate) : round(0.9 * rate)]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 18))
        assert spectrum.argmax() * rate / (1 << 18) == pytest.approx(882, abs=1)  # an octave above what was recorded


@needs_fluidsynth
def test_what_was_played_before_changes_no_bit(font: SoundFont) -> None:
    notes = [Note(0.1 * i, 0.3, 60 + i, 0.3 + 0.1 * i) for i in range(6)]
    first = font.play(notes, 0, RATE, RATE)
    font.play([Note(0, 1, 40)], 0, 999, RATE, bank=DRUMS)
    assert np.array_equal(font.play(notes, 0, RATE, RATE), first)
    assert np.array_equal(font.play(notes[::-1], 0, RATE, RATE), first)
    # A longer piece begins with the shorter one.
    assert np.array_equal(font.play(notes, 0, 2 * RATE, RATE)[:, : RATE - BLOCK], first[:, : RATE - BLOCK])


@needs_fluidsynth
def test_a_key_that_is_struck_again_sounds_to_the_end_of_its_second_note(font: SoundFont) -> None:
    sound = font.play([Note(0.0, 1.0, 60), Note(0.7, 1.0, 60)], 0, 2 * RATE, RATE)
    for start, end in ((0.1, 0.6), (0.8, 1.6)):  # the first note's end would have fallen into the second
        blocks = sound[0, round(start * RATE) : round(end * RATE)]
        assert np.abs(blocks[: len(blocks) // 441 * 441].reshape(-1, 441)).max(1).min() > 0.01
    assert np.abs(sound[0, round(1.9 * RATE) :]).max() < 1e-3


@needs_fluidsynth
def test_what_cannot_be_played_is_left_out_and_what_is_not_there_is_named(font: SoundFont, tmp_path: Path) -> None:
    for notes in ([], [Note(5.0, 1.0, 69), Note(0.0, 1.0, 300), Note(-1.0, 0.5, 69)]):
        assert np.abs(font.play(notes, 0, RATE, RATE)).max() < DITHER
    with pytest.raises(ValueError, match="no preset 7 in bank 0"):
        font.play([], 7, 1_000, RATE)
    with pytest.raises(ValueError, match="samples=0 must be"):
        font.play([], 0, 0, RATE)
    with pytest.raises(ValueError, match="when asked for 192000: ask for 8000 to 96000"):
        font.play([], 0, 1_000, 192_000)
    with pytest.raises(FileNotFoundError, match=r"no sound font at .*nowhere\.sf2"):
        SoundFont(tmp_path / "nowhere.sf2")
    (tmp_path / "noise.sf2").write_bytes(b"no font at all")
    with pytest.raises(ValueError, match=r"noise\.sf2 is not a sound font"):
        SoundFont(tmp_path / "noise.sf2")
    with pytest.raises(ValueError, match="no preset 0 in bank 128: take a General MIDI font"):
        SoundFont(write_font(tmp_path / "melodic.sf2", [(0, 0)]))


def test_without_the_library_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fluidsynth", None)
    with pytest.raises(ImportError, match=r"bsmamba2\[soundfont\].*libfluidsynth3"):
        SoundFont(write_font(tmp_path / "sine.sf2"))


class Recorder:
    """Stands for FluidSynth's binding: writes down what it is told, and gives ones while a note is held."""

    told: list[tuple[Any, ...]]

    def __init__(self, samplerate: float, **settings: Any) -> None:
        Recorder.told, self.rate = [], samplerate
        self.held: set[int] = set()

    def get_setting(self, name: str) -> float:
        return self.rate

    def sfload(self, path: str) -> int:
        return 1

    def sfpreset_name(self, font: int, bank: int, program: int) -> str:
        return f"{bank}-{program}"

    def program_select(self, channel: int, font: int, bank: int, program: int) -> None:
        self.told.append(("program", bank, program))

    def noteon(self, channel: int, key: int, velocity: int) -> None:
        self.told.append(("on", key, velocity))
        self.held.add(key)

    def noteoff(self, channel: int, key: int) -> None:
        self.told.append(("off", key))
        self.held.discard(key)

    def get_samples(self, count: int) -> Any:
        self.told.append(("samples", count))
        return np.full(2 * count, min(32_767, 16_384 * len(self.held)), np.int16)

    def delete(self) -> None:
        pass


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of a font that any program can be asked of, where FluidSynth need not be installed."""
    monkeypatch.setitem(sys.modules, "fluidsynth", SimpleNamespace(Synth=Recorder))
    synthesiser._open_soundfont.cache_clear()
    yield write_font(tmp_path / "any.sf2")
    synthesiser._open_soundfont.cache_clear()


def test_notes_become_events_between_whole_blocks(played: Path) -> None:
    font = SoundFont(played)
    rate = 64 * 100  # a block is a hundredth of a second
    sound = font.play([Note(0.02, 0.03, 60, 0.5), Note(0.05, 0.001, 60)], 3, 600, rate)
    wanted = [("program", 0, 3), ("samples", 128), ("on", 60, 64), ("samples", 192), ("off", 60), ("on", 60, 127)]
    # A note of no length lasts a block. What comes after the last event is rendered too, to the end of a block.
    assert Recorder.told == [*wanted, ("samples", 64), ("off", 60), ("samples", 256), ("off", 0)]
    assert sound.shape == (2, 600)
    assert sound[0].tolist() == [0.0] * 128 + [0.5] * 256 + [0.0] * 216


def test_a_font_plays_in_the_accompaniment_and_never_sings(played: Path) -> None:
    seeds = range(6)
    plain = [synthesise(seed, seconds=2.0, mix_variety=0.0, sample_rate=8_000) for seed in seeds]
    with_font = [synthesise(seed, seconds=2.0, mix_variety=0.0, sample_rate=8_000, soundfont=played) for seed in seeds]
    changed = np.zeros(4, int)
    for one, other in zip(plain, with_font, strict=True):
        assert one.vocal_segments == other.vocal_segments
        assert "any.sf2" in other.source
        assert "any.sf2" not in one.source
        for stem in range(4):
            a, b = (song.stems[stem] / song.stems[stem].abs().max().clamp(min=1e-9) for song in (one, other))
            changed[stem] += not torch.allclose(a, b, atol=1e-4)
    assert changed[0] == 0  # the voice is another's only in level
    assert all(count > 0 for count in changed[1:])


def test_a_font_plays_in_as_many_songs_as_asked(played: Path) -> None:
    def made(share: float) -> list[Song]:
        how = {"seconds": 0.5, "sample_rate": 8_000}
        return synthesise_songs(40, seed=3, soundfont=played, soundfont_share=share, **how)

    some, everywhere, nowhere = made(0.3), made(1.0), made(0.0)
    plays = ["soundfont" in song.source for song in some]
    assert 6 < sum(plays) < 20
    assert all("soundfont" in song.source for song in everywhere)
    for song, kind, other, none in zip(some, plays, everywhere, nowhere, strict=True):
        assert torch.equal(song.stems, (other if kind else none).stems)
    with pytest.raises(ValueError, match="soundfont_share is -1"):
        synthesise_songs(1, soundfont_share=-1)


def test_clean_songs_are_those_without_variety_and_font(played: Path) -> None:
    def made(share: float, **how: Any) -> list[Song]:
        return synthesise_songs(40, seed=3, seconds=0.5, sample_rate=8_000, clean_share=share, **how)

    rich = {"mix_variety": 1.0, "soundfont": played}
    some, none, plain = made(0.3, **rich), made(0.0, **rich), made(0.0)
    clean = ["mix_variety=0.0," in song.source for song in some]
    assert 6 < sum(clean) < 20
    for song, kind, other, simple in zip(some, clean, none, plain, strict=True):
        assert torch.equal(song.stems, (simple if kind else other).stems)
        assert ("soundfont" in song.source) is not kind
    with pytest.raises(ValueError, match="clean_share is 2"):
        synthesise_songs(1, clean_share=2)


def test_programs_are_general_midis_and_none_is_a_voice() -> None:
    programs = {program for family in PROGRAMS.values() for program in family}
    assert all(0 <= program < 128 for program in programs)
    assert not programs & {52, 53, 54, 85, 91}  # choirs, "oohs", synthesised voices


def test_a_font_that_lacks_drums_leaves_them_to_the_synthesiser(played: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(np.random.default_rng(0), SoundFont(played), 8_000)
    recorded.probability = 1.0  # always
    assert set(recorded.kit()) == set(KIT_KEYS)
    assert all(np.abs(shot).max() == pytest.approx(1) and abs(shot[-1]) < 0.01 for shot in recorded.kit().values())
    monkeypatch.setattr(Recorder, "noteon", lambda self, channel, key, velocity: None)
    assert recorded.kit() == {}
    assert recorded.play("organ", [Note(0.0, 1.0, 60)], 8_000) is None


def test_every_family_of_the_accompaniment_has_programs(played: Path) -> None:
    """Whatever a song may ask of the font, it has an answer: hundreds of parts, and none is a KeyError."""
    for seed in range(60):
        score = draw_score(np.random.default_rng(seed), 1.0)
        recorded = Recorded(np.random.default_rng(seed), SoundFont(played), 8_000)
        recorded.probability = 1.0
        assert play_accompaniment(np.random.default_rng(seed), score, 8_000, 8_000, recorded).any()
    assert set(FAMILIES) <= set(PROGRAMS) | {"sub", "fingered", "synth bass", "swept bass"}
