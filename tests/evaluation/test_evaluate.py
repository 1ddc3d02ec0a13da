"""Rows of an evaluation: the metrics in them, and which are computed again."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from eval_tracks import QUICK, RATE, TWO, musdb, signals, track
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, metrics
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
    row = evaluate_track(tiny, track("first", 1), replace(QUICK, overlap=0.25))
    estimate = separate(tiny, mixture, segment=0.5, overlap=0.25)[0]
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
    def load() -> tuple[Tensor, Tensor, int]:
        mixture, vocals = signals(1)
        mixture[:, 3 * RATE :] = vocals[:, 3 * RATE :]  # no band in the last second
        return mixture, vocals, RATE

    one = EvalTrack("one", "", load)
    mixture, vocals, _ = load()
    estimate = separate(tiny, mixture, segment=0.5, overlap=0)[0]
    seconds = metrics.csdr_seconds(vocals, estimate, RATE)
    assert evaluate_track(tiny, one, QUICK).csdr == pytest.approx(float(seconds[[0, 2, 3]].median()))
    both = replace(QUICK, sources=("vocals", "instrumental"))
    assert evaluate_track(tiny, one, both).csdr == pytest.approx(float(seconds[[0, 2]].mean()))


def test_a_track_without_vocals_has_a_leak_and_no_ratio(tiny: BSMamba2) -> None:
    silent = EvalTrack("band", "", lambda: (signals(1)[0], torch.zeros(2, 4 * RATE), RATE))
    row = evaluate_track(tiny, silent, QUICK)
    assert row.occupancy == 0
    assert math.isfinite(row.silence_leakage)
    assert all(math.isnan(value) for value in (row.csdr, row.usdr, row.si_sdr, row.onset_delay, row.mixture_usdr))


def test_tracks_that_do_not_fit_are_named(tiny: BSMamba2) -> None:
    wrong_rate = EvalTrack("slow", "", lambda: (*signals(1), 44_100))
    with pytest.raises(ValueError, match="slow: is at 44100 Hz, the model at 8000 Hz"):
        evaluate_track(tiny, wrong_rate, QUICK)
    stems = BSMamba2(replace(TINY, stems=("drums",)))
    with pytest.raises(ValueError, match="no vocals"):
        evaluate_track(stems, track("first"), QUICK)


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

    def spy(model: BSMamba2, one: EvalTrack, *arguments: object, **options: object) -> EvalRow:
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
    silent = EvalSet("one", (EvalTrack("silent", "", lambda: (torch.zeros(2, RATE), torch.zeros(2, RATE), RATE)),))
    (first,), (again,) = (rows_of(Counter(), tmp_path, silent) for _ in range(2))
    assert math.isnan(first.csdr)
    assert first.silence_leakage_dbfs == -math.inf
    assert repr(again) == repr(first)


def test_a_damaged_row_is_done_again(tmp_path: Path) -> None:
    rows = rows_of(Counter(), tmp_path)
    first, second = sorted(tmp_path.rglob("*.json"))
    first.write_text(first.read_text()[:-40])
    second.write_text("[1, 2]")
    again = rows_of(Counter(), tmp_path)
    assert [replace(row, compute_seconds=0) for row in again] == [replace(row, compute_seconds=0) for row in rows]


def test_a_stopped_run_leaves_whole_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, os.strerror(28), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            rows_of(Counter(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_track_that_fails_is_told_and_the_others_are_done(tmp_path: Path) -> None:
    def broken() -> tuple[Tensor, Tensor, int]:
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
    mixture, vocals, rate = one.load()
    assert rate == RATE
    assert torch.equal(mixture, signals(0)[0])
    assert torch.equal(vocals, signals(0)[1])
    before = one.identity
    (root / "test" / "A - One" / "mixture.wav").unlink()
    (without,) = load_tracks(root / "test" / "A - One").tracks
    torch.testing.assert_close(without.load()[0], mixture)
    assert without.identity != before


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
