"""Rows of an evaluation: the metrics in them, and which are computed again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from audio_files import device, pipe
from eval_tracks import QUICK, RATE, TWO, musdb, signals, track, vocals_only
from tiny_model import TINY
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, metrics
from bsmamba2.audio import files
from bsmamba2.evaluation import evaluate
from bsmamba2.evaluation.evaluate import (
    EvalRow,
    EvalSet,
    EvalTrack,
    Failure,
    evaluate_track,
    load_tracks,
    row_key,
    run,
    tracks_of,
)
from bsmamba2.evaluation.protocols import MUSDB, PROTOCOLS, EvalProtocol
from bsmamba2.separate import separate
from bsmamba2.synth import Song, synthesise, synthesise_songs

# --- a row ------------------------------------------------------------------------------------------------


def test_a_row_is_what_the_metrics_say(tiny: BSMamba2) -> None:
    mixture, vocals = signals(1)
    (row,) = evaluate_track(tiny, track("first", 1), replace(QUICK, overlap=0.25))
    estimate = separate(tiny, mixture, segment=0.5, overlap=0.25)[0]
    assert row.stem == "vocals"
    assert (row.track, row.segment, row.seconds, row.occupancy) == ("first", 0.5, 4.0, 0.75)
    assert row.csdr == metrics.csdr(vocals, estimate, RATE)
    assert row.usdr == metrics.usdr(vocals, estimate)
    assert row.mixture_usdr == metrics.usdr(vocals, mixture)
    assert row.si_sdr == metrics.si_sdr(vocals, estimate)
    assert row.bleedless == metrics.bleed(vocals, estimate, RATE).bleedless
    assert row.silence_leakage == metrics.silence_leakage(vocals, estimate, mixture, RATE).relative
    (onset,) = metrics.onsets(vocals, estimate, RATE)
    assert (row.onsets, row.onset_delay, row.onset_error) == (1, onset.delay, onset.error)


def test_a_second_source_drops_its_silent_seconds_too(tiny: BSMamba2) -> None:
    mixture, vocals = signals(1)
    mixture[:, 3 * RATE :] = vocals[:, 3 * RATE :]  # no band in the last second
    one = EvalTrack("one", "", vocals_only(mixture, vocals))
    estimate = separate(tiny, mixture, segment=0.5, overlap=0)[0]
    seconds = metrics.csdr_seconds(vocals, estimate, RATE)
    assert evaluate_track(tiny, one, QUICK)[0].csdr == pytest.approx(float(seconds[[0, 2, 3]].median()))
    both = replace(QUICK, sources=("vocals", "instrumental"))
    assert evaluate_track(tiny, one, both)[0].csdr == pytest.approx(float(seconds[[0, 2]].mean()))


def test_a_track_without_vocals_has_a_leak_and_no_ratio(tiny: BSMamba2) -> None:
    silent = EvalTrack("band", "", vocals_only(signals(1)[0], torch.zeros(2, 4 * RATE)))
    (row,) = evaluate_track(tiny, silent, QUICK)
    assert row.occupancy == 0
    assert math.isfinite(row.silence_leakage)
    assert all(math.isnan(value) for value in (row.csdr, row.usdr, row.si_sdr, row.onset_delay, row.mixture_usdr))


def test_tracks_that_do_not_fit_are_named(tiny: BSMamba2) -> None:
    wrong_rate = EvalTrack("slow", "", vocals_only(*signals(1), rate=44_100))
    with pytest.raises(ValueError, match="slow: is at 44100 Hz, the model at 8000 Hz"):
        evaluate_track(tiny, wrong_rate, QUICK)
    stems = BSMamba2(replace(TINY, stems=("drums",)))
    with pytest.raises(ValueError, match="first: lacks drums, which the model separates"):
        evaluate_track(stems, track("first"), QUICK)
    with pytest.raises(ValueError, match="separates drums, but not the vocals"):
        evaluate.score(stems, synthesise(0, seconds=0.5, sample_rate=8000))


# --- what is done again -----------------------------------------------------------------------------------


class Counter(torch.nn.Module):
    """A model that counts the songs that it is given; the first output channel is the input."""

    def __init__(self, config: ModelConfig = TINY) -> None:
        super().__init__()
        self.config, self.calls = config, 0

    def forward(self, mixture: Tensor) -> Tensor:
        self.calls += 1
        return mixture[:, None] * 0.5


def rows_of(
    model: Counter, output: Path, tracks: EvalSet = TWO, protocol: EvalProtocol = QUICK, **options: object
) -> list[EvalRow]:
    checkpoint = str(options.pop("checkpoint", "abc"))
    found = list(run(model, checkpoint, tracks, protocol, output, **options))  # type: ignore[arg-type]
    assert all(isinstance(row, EvalRow) for row in found)
    return found  # type: ignore[return-value]


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    model = Counter()
    first = next(iter(run(model, "abc", TWO, QUICK, tmp_path)))  # type: ignore[arg-type]
    half = model.calls
    everything = rows_of(model, tmp_path)
    assert everything[0] == first
    assert model.calls == 2 * half
    assert rows_of(model, tmp_path) == everything
    assert model.calls == 2 * half
    assert [row.track for row in everything] == ["first", "second"]
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, 0),
        ({"checkpoint": "abd"}, 2),
        ({"protocol": replace(QUICK, overlap=0.25)}, 2),
        ({"protocol": replace(QUICK, segment=1.0)}, 2),
        ({"protocol": replace(QUICK, sources=("vocals", "instrumental"))}, 2),
        ({"protocol": replace(QUICK, name="other", over_tracks="median")}, 0),
        ({"dtype": torch.bfloat16}, 2),
        ({"batch": 4}, 0),
        ({"tracks": EvalSet("two", (TWO.tracks[0], track("second", 3)))}, 1),
    ],
)
def test_a_change_is_never_mixed_with_old_rows(
    changes: dict, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rows_of(Counter(), tmp_path)
    done: list[str] = []
    real = evaluate.evaluate_track

    def spy(model: BSMamba2, one: EvalTrack, *arguments: object, **options: object) -> list[EvalRow]:
        done.append(one.name)
        return real(model, one, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "evaluate_track", spy)
    new = rows_of(Counter(), tmp_path, **changes)
    assert len(done) == again
    assert len(new) == 2
    done.clear()
    timeless = [[replace(row, compute_seconds=0) for row in rows] for rows in (rows_of(Counter(), tmp_path), old)]
    assert timeless[0] == timeless[1]  # the old ones are still there
    assert len(done) == (1 if "tracks" in changes else 0)  # of a changed track one row is kept


def test_a_stored_row_keeps_what_has_no_number(tmp_path: Path) -> None:
    silent = EvalSet("one", (EvalTrack("silent", "", vocals_only(*torch.zeros(2, 2, RATE))),))
    (first,), (again,) = (rows_of(Counter(), tmp_path, silent) for _ in range(2))
    assert math.isnan(first.csdr)
    assert first.silence_leakage_dbfs == -math.inf
    assert repr(again) == repr(first)


def test_a_damaged_row_is_done_again(tmp_path: Path) -> None:
    rows = rows_of(Counter(), tmp_path)
    first, second = sorted(tmp_path.rglob("*.json"))
    first.write_text(first.read_text()[:-40])
    second.write_text("[1, 2]")
    said: list[str] = []
    again = rows_of(Counter(), tmp_path, log=said.append)
    assert [replace(row, compute_seconds=0) for row in again] == [replace(row, compute_seconds=0) for row in rows]
    assert [line.partition(": is damaged")[0] for line in said] == [str(first), str(second)]
    assert all(len(line.splitlines()) == 1 for line in said)


def edited(**changes: object) -> Callable[[Path], object]:
    """A fault: a stored row with other values."""

    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        content["rows"][0] |= changes
        path.write_text(json.dumps(content))

    return edit


def linked(path: Path) -> None:
    target = path.parents[2] / "precious.txt"
    target.write_text("keep me")
    path.unlink()
    path.symlink_to(target)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "not UTF-8": lambda path: path.write_bytes(b'{"identity": "\xff"}'),
    "another kind of JSON": lambda path: path.write_text("3"),
    "rows of another kind": lambda path: path.write_text('{"identity": "1", "rows": [3]}'),
    "row of another kind": lambda path: path.write_text('{"identity": "1", "row": [1, 2]}'),
    "deep": lambda path: path.write_text("[" * 200_000),
    "deep objects": lambda path: path.write_text('{"identity":' * 100_000),
    "a number of 10,000 digits": lambda path: path.write_text('{"identity": ' + "9" * 10_000 + "}"),
    "a number beyond every float": edited(seconds=10**400),
    "NaN for a length": edited(seconds=math.nan),
    "an infinite occupancy": edited(occupancy=math.inf),
    "a list for a number": edited(csdr=[1.0]),
    "a word for a number": edited(csdr="good"),
    "true for a number": edited(onsets=True),
    "a fraction of an onset": edited(onsets=1.5),
    "a number for a name": edited(stem=3),
    "null for a length": edited(seconds=None),
    "an unknown field": edited(score=1.0),
    "another track": edited(track="second"),
    "another segment": edited(segment=4.0),
    "too large": lambda path: path.write_text(" " * (evaluate.MAX_ROW_BYTES + 1)),
    "a pipe": pipe,
    "a link": linked,
    "an endless device": device,
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGE.values(), ids=DAMAGE)
def test_every_kind_of_damage_is_one_line_and_computed_again(fault: Callable[[Path], object], tmp_path: Path) -> None:
    one = EvalSet("one", TWO.tracks[:1])
    (before,) = rows_of(Counter(), tmp_path, one)
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_text()
    fault(path)
    said: list[str] = []
    (after,) = rows_of(Counter(), tmp_path, one, log=said.append)
    assert replace(after, compute_seconds=0) == replace(before, compute_seconds=0)
    (line,) = said
    assert line.startswith(f"{path}: is damaged")
    assert len(line) < len(str(path)) + 150
    assert len(line.splitlines()) == 1
    assert path.is_file()
    assert not path.is_symlink()
    assert json.loads(path.read_text()).keys() == json.loads(whole).keys()
    if (tmp_path / "precious.txt").exists():
        assert (tmp_path / "precious.txt").read_text() == "keep me"


def test_a_folder_in_the_place_of_a_row_fails_alone(tmp_path: Path) -> None:
    rows_of(Counter(), tmp_path)
    path = sorted(tmp_path.rglob("*.json"))[0]
    path.unlink()
    (path / "inside").mkdir(parents=True)
    found = list(run(Counter(), "abc", TWO, QUICK, tmp_path))  # type: ignore[arg-type]
    assert found[0] == Failure("first", 0.5, f"{path}: is a folder, not a stored row; remove it")
    assert [row.track for row in found[1:]] == ["second"]


def test_rows_of_the_time_of_one_stem_are_read(tmp_path: Path) -> None:
    short = EvalTrack("short", "", vocals_only(*signals(3, seconds=0.75)))
    tracks, model = EvalSet("two", (TWO.tracks[0], short)), Counter()
    rows = rows_of(model, tmp_path, tracks)
    calls = model.calls
    for path in tmp_path.rglob("*.json"):
        content = json.loads(path.read_text())
        (row,) = content.pop("rows")
        del row["stem"]
        row["csdr"] = row["csdr"] if row["seconds"] >= 1 else None  # it was not defined under a second
        path.write_text(json.dumps({**content, "row": row}))
    again = rows_of(model, tmp_path, tracks)
    assert [row.stem for row in again] == ["vocals", "vocals"]
    assert row_key("abc", PROTOCOLS["paper"]) == "753674200cb4c58a"  # where they are looked for
    assert again[0] == rows[0]
    assert math.isfinite(again[1].csdr)
    assert model.calls == calls + 2  # 0.75 s are two segments: only the short track was computed again


# --- several stems ----------------------------------------------------------------------------------------

STEMS = ("vocals", "drums", "bass", "other")


class Scaler(Counter):
    """A model of several stems: each is the mixture times a gain of its own."""

    def __init__(self, stems: tuple[str, ...]) -> None:
        super().__init__(replace(TINY, stems=stems))

    def forward(self, mixture: Tensor) -> Tensor:
        gains = torch.arange(1, 1 + len(self.config.stems)) / 10
        return mixture[:, None] * gains[:, None, None]


def test_a_row_for_each_stem_of_a_folder(tmp_path: Path) -> None:
    root = musdb(tmp_path / "musdb", names=("one",))
    folder = root / "test" / "one"
    signals_of = {stem: files.read(folder / f"{stem}.wav")[0] for stem in ("mixture", *STEMS)}
    signals_of["drums"] = signals_of["drums"].clone()
    signals_of["drums"][:, 2 * RATE :] = 0
    soundfile.write(folder / "drums.wav", signals_of["drums"].T.numpy(), RATE, subtype="FLOAT")
    model = Scaler(("drums", "vocals", "other"))
    tracks = load_tracks(root, model.config.stems)
    rows = rows_of(model, tmp_path / "out", tracks)
    assert [(row.track, row.stem) for row in rows] == [("one", "drums"), ("one", "vocals"), ("one", "other")]
    assert [row.occupancy for row in rows] == [0.5, 0.75, 1.0]
    for gain, row in zip((0.1, 0.2, 0.3), rows, strict=True):
        mixture, reference = signals_of["mixture"], signals_of[row.stem]
        assert row.usdr == pytest.approx(metrics.usdr(reference, gain * mixture), abs=1e-4)
        assert row.csdr == pytest.approx(metrics.csdr(reference, gain * mixture, RATE), abs=1e-4)
        assert row.mixture_usdr == pytest.approx(metrics.usdr(reference, mixture), abs=1e-4)
    calls = model.calls
    assert repr(rows_of(model, tmp_path / "out", tracks)) == repr(rows)  # NaN is not equal to itself
    assert model.calls == calls
    (path,) = (tmp_path / "out").rglob("*.json")  # one separation, one file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "rows": content["rows"][:2]}))
    assert [row.stem for row in rows_of(model, tmp_path / "out", tracks)] == ["drums", "vocals", "other"]
    assert model.calls == 2 * calls
    one_stem, folder_tracks = load_tracks(root).tracks[0], tracks.tracks[0]
    (folder / "other.wav").touch()
    assert load_tracks(root).tracks[0].identity == one_stem.identity
    assert load_tracks(root, model.config.stems).tracks[0].identity != folder_tracks.identity


@pytest.mark.parametrize("name", ["instrumental", "accompaniment"])
def test_the_mixture_less_the_vocals_is_a_stem(name: str, tmp_path: Path) -> None:
    root = musdb(tmp_path / "musdb", names=("one",))
    song = synthesise(3, seconds=1.0, sample_rate=RATE)
    mixture, vocals = signals(0)
    for tracks, expected in (
        (load_tracks(root, ("vocals", name)), mixture - vocals),
        (load_tracks(root, (name,)), mixture - vocals),
        (tracks_of([song]), song.mixture - song.vocals),
    ):
        references = tracks.tracks[0].load()[1]
        torch.testing.assert_close(references[name], expected, rtol=0, atol=1e-6)
    (row,) = evaluate_track(Scaler((name,)), tracks_of([song]).tracks[0], QUICK)  # type: ignore[arg-type]
    assert row.stem == name
    soundfile.write(root / "test" / "one" / f"{name}.wav", vocals.T.numpy(), RATE, subtype="FLOAT")
    assert torch.equal(load_tracks(root, (name,)).tracks[0].load()[1][name], vocals)  # a file of that name wins


def test_songs_in_memory_have_all_stems() -> None:
    song = synthesise(3, seconds=1.0, sample_rate=RATE)
    rows = evaluate_track(Scaler(STEMS), tracks_of([song]).tracks[0], QUICK)  # type: ignore[arg-type]
    assert [row.stem for row in rows] == [*STEMS]
    for gain, row in zip((0.1, 0.2, 0.3, 0.4), rows, strict=True):
        expected = metrics.silence_leakage(song.stem(row.stem), gain * song.mixture, song.mixture, RATE)
        assert row.silence_leakage == pytest.approx(expected.relative, abs=1e-3, nan_ok=True)


def test_a_stem_without_a_file_is_named(tmp_path: Path) -> None:
    root = musdb(tmp_path / "musdb", names=("one",))
    tracks = load_tracks(root, ("vocals", "guitar"))
    (failure,) = run(Scaler(("vocals", "guitar")), "abc", tracks, QUICK, tmp_path)  # type: ignore[arg-type]
    assert isinstance(failure, Failure)
    assert "one: must hold one file for each of mixture, vocals, guitar" in failure.message


def test_a_stopped_run_leaves_whole_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, os.strerror(28), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            rows_of(Counter(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_track_that_fails_is_told_and_the_others_are_done(tmp_path: Path) -> None:
    def broken() -> tuple[Tensor, dict[str, Tensor], int]:
        raise ValueError("broken.wav: does not exist")

    found = list(run(Counter(), "abc", EvalSet("three", (EvalTrack("bad", "", broken), *TWO.tracks)), QUICK, tmp_path))  # type: ignore[arg-type]
    assert found[0] == Failure("bad", 0.5, "broken.wav: does not exist")
    assert [row.track for row in found[1:] if isinstance(row, EvalRow)] == ["first", "second"]


# --- folders ----------------------------------------------------------------------------------------------


def test_a_folder_of_tracks_in_three_ways(tmp_path: Path) -> None:
    root = musdb(tmp_path / "musdb")
    for place in (root, root / "test"):
        tracks = load_tracks(place)
        assert [one.name for one in tracks.tracks] == ["A - One", "B – Zwei"]
        assert tracks.name == "2 tracks in test"
    (one,) = load_tracks(root / "test" / "A - One").tracks
    mixture, references, rate = one.load()
    assert rate == RATE
    assert torch.equal(mixture, signals(0)[0])
    assert references.keys() == {"vocals"}
    assert torch.equal(references["vocals"], signals(0)[1])
    before = one.identity
    (root / "test" / "A - One" / "mixture.wav").unlink()
    (without,) = load_tracks(root / "test" / "A - One").tracks
    torch.testing.assert_close(without.load()[0], mixture)
    assert without.identity != before


def test_a_folder_may_be_a_dot_or_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = musdb(tmp_path / "musdb")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [one.name for one in load_tracks("~/musdb").tracks] == ["A - One", "B – Zwei"]
    monkeypatch.chdir(root / "test")
    assert load_tracks(".").name == "2 tracks in test"
    monkeypatch.chdir(root / "test" / "A - One")
    assert [one.name for one in load_tracks(Path()).tracks] == ["A - One"]
    assert load_tracks("..").name == "2 tracks in test"
    assert load_tracks("../..").name == "2 tracks in test"


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_in_another_encoding_becomes_printable(tmp_path: Path) -> None:
    root = musdb(tmp_path / "musdb", names=("one",))
    (root / "test" / "one").rename(root / "test" / os.fsdecode(b"caf\xe9"))
    tracks = load_tracks(root)
    assert tracks.tracks[0].name == r"caf\udce9"
    (row,) = rows_of(Counter(), tmp_path, tracks)
    assert row.track == r"caf\udce9"
    assert rows_of(Counter(), tmp_path, tracks) == [row]


def test_only_fifty_whole_tracks_in_a_folder_called_test_are_musdb(tmp_path: Path) -> None:
    root = musdb(tmp_path / "musdb", names=("first",))
    for i in range(49):
        (root / "test" / f"{i}").mkdir()
        for stem in ("mixture", "vocals", "drums", "bass", "other"):
            (root / "test" / f"{i}" / f"{stem}.wav").touch()
    assert load_tracks(root).name == MUSDB
    (root / "test" / "7" / "bass.wav").unlink()
    assert load_tracks(root).name == "50 tracks in test"


def test_folders_without_tracks_and_songs_with_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_tracks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no track"):
        load_tracks(tmp_path)
    song = synthesise(0, seconds=0.5, sample_rate=8000)
    with pytest.raises(ValueError, match="2 songs with 1 names"):
        tracks_of([song, song])


def test_rows_measured_otherwise_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    key = row_key("abc", PROTOCOLS["paper"])
    assert key == row_key("abc", PROTOCOLS["paper-median"])
    monkeypatch.setattr(evaluate, "ROW_VERSION", evaluate.ROW_VERSION + 1)
    assert row_key("abc", PROTOCOLS["paper"]) != key


# --- scores of a model beside their baselines ---------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> list[Song]:
    return synthesise_songs(3, seed=5, seconds=2.0, sample_rate=8000)


def test_oracle_beats_every_constant_and_silence_stays_silent(pool: list[Song]) -> None:
    song = next(song for song in pool if song.occupancy > 0.2)
    best = metrics.usdr(song.vocals, evaluate.oracle_vocals(song, 256, 64))
    assert best > max(metrics.usdr(song.vocals, gain * song.mixture) for gain in (0, 0.25, 0.5, 1))
    mute = dataclasses.replace(song, stems=song.stems * torch.tensor([0.0, 1, 1, 1])[:, None, None])
    assert not evaluate.oracle_vocals(mute, 256, 64).any()


def test_scores_stand_beside_their_baselines(tiny: BSMamba2, pool: list[Song]) -> None:
    song = next(song for song in pool if song.occupancy > 0.2)
    found = evaluate.score(tiny, song, segment=1.0)
    assert found.silence == pytest.approx(0)
    assert found.mixture == metrics.usdr(song.vocals, song.mixture)
    assert found.oracle > max(found.mixture, 0)
    quiet = song.stems.clone()
    quiet[0, :, : song.samples // 2] = 0
    estimate = separate(tiny, quiet.sum(0), segment=1.0)[0][:, : song.samples // 2]
    wanted = 10 * torch.log10(estimate.square().sum() / quiet.sum(0)[:, : song.samples // 2].square().sum())
    leakage = evaluate.score(tiny, dataclasses.replace(song, stems=quiet), segment=1.0).silence_leakage
    assert leakage == pytest.approx(wanted.item(), abs=0.5)  # silence has a margin, and the voice may have more of it
    loud = quiet.clone()
    loud[0] += 0.1
    assert evaluate.score(tiny, dataclasses.replace(song, stems=loud), segment=1.0).silence_leakage is None
    with pytest.raises(ValueError, match="8000 Hz"):
        evaluate.score(tiny, dataclasses.replace(song, sample_rate=44_100))
