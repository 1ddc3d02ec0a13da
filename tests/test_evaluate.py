"""Scores under a protocol: what a row says, what is done again and what not, and what stands beside what."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import TINY
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, metrics, save_checkpoint
from bsmamba2.bands import generate_bands
from bsmamba2.cli.main import main
from bsmamba2.evaluation import evaluate
from bsmamba2.evaluation.evaluate import (
    Evaluation,
    Failure,
    Row,
    Track,
    Tracks,
    average,
    by_occupancy,
    evaluate_track,
    load_tracks,
    row_key,
    run,
    sha256_file,
    tracks_of,
)
from bsmamba2.evaluation.protocols import MUSDB, PROTOCOLS, Protocol, compare
from bsmamba2.separate import separate
from bsmamba2.synth.songs import synthesise

RATE = TINY.sample_rate
QUICK = Protocol(name="quick", segment=0.5)


def signals(seed: int, seconds: float = 4.0) -> tuple[Tensor, Tensor]:
    """Mixture and vocals, silent from 1 to 2 s: (2, samples)."""
    generator = torch.Generator().manual_seed(seed)
    vocals, band = 0.1 * torch.randn(2, 2, round(seconds * RATE), generator=generator)
    vocals[:, RATE : 2 * RATE] = 0
    return vocals + band, vocals


def track(name: str, seed: int = 0) -> Track:
    return Track(name, str(seed), lambda: (*signals(seed), RATE))


TWO = Tracks("two", (track("first", 1), track("second", 2)))


def musdb(folder: Path, names: tuple[str, ...] = ("A - One", "B – Zwei"), rate: int = RATE) -> Path:
    for seed, name in enumerate(names):
        mixture, vocals = signals(seed)
        rest = (mixture - vocals) / 3
        (folder / "test" / name).mkdir(parents=True)
        files = {"mixture": mixture, "vocals": vocals, "drums": rest, "bass": rest, "other": rest}
        for stem, signal in files.items():
            soundfile.write(folder / "test" / name / f"{stem}.wav", signal.T.numpy(), rate, subtype="FLOAT")
    return folder


@pytest.fixture
def checkpoint(tiny: BSMamba2, tmp_path: Path) -> Path:
    save_checkpoint(tiny, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


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
    assert row.leak_relative == metrics.leak(vocals, estimate, mixture, RATE).relative
    (onset,) = metrics.onsets(vocals, estimate, RATE)
    assert (row.onsets, row.onset_delay, row.onset_error) == (1, onset.delay, onset.error)


def test_a_second_source_drops_its_silent_seconds_too(tiny: BSMamba2) -> None:
    def load() -> tuple[Tensor, Tensor, int]:
        mixture, vocals = signals(1)
        mixture[:, 3 * RATE :] = vocals[:, 3 * RATE :]  # no band in the last second
        return mixture, vocals, RATE

    one = Track("one", "", load)
    mixture, vocals, _ = load()
    estimate = separate(tiny, mixture, segment=0.5, overlap=0)[0]
    seconds = metrics.csdr_seconds(vocals, estimate, RATE)
    assert evaluate_track(tiny, one, QUICK).csdr == pytest.approx(float(seconds[[0, 2, 3]].median()))
    both = replace(QUICK, sources=("vocals", "rest"))
    assert evaluate_track(tiny, one, both).csdr == pytest.approx(float(seconds[[0, 2]].mean()))


def test_a_track_without_vocals_has_a_leak_and_no_ratio(tiny: BSMamba2) -> None:
    silent = Track("band", "", lambda: (signals(1)[0], torch.zeros(2, 4 * RATE), RATE))
    row = evaluate_track(tiny, silent, QUICK)
    assert row.occupancy == 0
    assert math.isfinite(row.leak_relative)
    assert all(math.isnan(value) for value in (row.csdr, row.usdr, row.si_sdr, row.onset_delay, row.mixture_usdr))


def test_tracks_that_do_not_fit_are_named(tiny: BSMamba2) -> None:
    wrong_rate = Track("slow", "", lambda: (*signals(1), 44_100))
    with pytest.raises(ValueError, match="slow: is at 44100 Hz, the model at 8000 Hz"):
        evaluate_track(tiny, wrong_rate, QUICK)
    stems = BSMamba2(replace(TINY, stems=("drums",)))
    with pytest.raises(ValueError, match="no vocals"):
        evaluate_track(stems, track("first"), QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name"),
        ({"segment": 0}, "segment=0"),
        ({"segment": math.nan}, "segment=nan"),
        ({"overlap": 1}, "overlap=1"),
        ({"sources": ("drums",)}, "sources"),
        ({"over_tracks": "mode"}, "over_tracks='mode'"),
    ],
)
def test_a_card_is_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


# --- what is done again -----------------------------------------------------------------------------------


class Counter(torch.nn.Module):
    """A model that counts the songs that it is given; the first output channel is the input."""

    def __init__(self, config: ModelConfig = TINY) -> None:
        super().__init__()
        self.config, self.calls = config, 0

    def forward(self, mixture: Tensor) -> Tensor:
        self.calls += 1
        return mixture[:, None] * 0.5


def rows_of(model: Counter, output: Path, tracks: Tracks = TWO, card: Protocol = QUICK, **options: object) -> list[Row]:
    checkpoint = str(options.pop("checkpoint", "abc"))
    found = list(run(model, checkpoint, tracks, card, output, **options))  # type: ignore[arg-type]
    assert all(isinstance(row, Row) for row in found)
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
        ({"card": replace(QUICK, overlap=0.25)}, 2),
        ({"card": replace(QUICK, segment=1.0)}, 2),
        ({"card": replace(QUICK, sources=("vocals", "rest"))}, 2),
        ({"card": replace(QUICK, name="other", over_tracks="median")}, 0),
        ({"dtype": torch.bfloat16}, 2),
        ({"batch": 4}, 0),
        ({"tracks": Tracks("two", (TWO.tracks[0], track("second", 3)))}, 1),
    ],
)
def test_a_change_is_never_mixed_with_old_rows(
    changes: dict, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = rows_of(Counter(), tmp_path)
    done: list[str] = []
    real = evaluate.evaluate_track

    def spy(model: BSMamba2, one: Track, *arguments: object, **options: object) -> Row:
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
    silent = Tracks("one", (Track("silent", "", lambda: (torch.zeros(2, RATE), torch.zeros(2, RATE), RATE)),))
    (first,), (again,) = (rows_of(Counter(), tmp_path, silent) for _ in range(2))
    assert math.isnan(first.csdr)
    assert first.leak_absolute == -math.inf
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

    found = list(run(Counter(), "abc", Tracks("three", (Track("bad", "", broken), *TWO.tracks)), QUICK, tmp_path))  # type: ignore[arg-type]
    assert found[0] == Failure("bad", 0.5, "broken.wav: does not exist")
    assert [row.track for row in found[1:] if isinstance(row, Row)] == ["first", "second"]


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
    with pytest.raises(ValueError, match="is no folder"):
        load_tracks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no track"):
        load_tracks(tmp_path)
    song = synthesise(0, seconds=0.5, sample_rate=8000)
    with pytest.raises(ValueError, match="2 songs with 1 names"):
        tracks_of([song, song])


# --- together ---------------------------------------------------------------------------------------------


def row(name: str = "a", segment: float = 8.0, occupancy: float = 0.5, **values: float) -> Row:
    measures = {**dict.fromkeys(evaluate.MEASURES, math.nan), **values}
    return Row(
        track=name, segment=segment, seconds=4.0, occupancy=occupancy, onsets=0, onsets_missed=0, compute_seconds=1.0,
        **measures,
    )  # fmt: skip


def test_averages_leave_out_what_has_no_value() -> None:
    rows = [row(csdr=1.0), row(csdr=2.0), row(csdr=9.0), row()]
    found = average(rows, "csdr")
    assert (found.mean, found.median, found.tracks) == (4.0, 2.0, 3)
    assert math.isnan(average(rows, "usdr").median)
    leaks = [row(leak_relative=-math.inf), row(leak_relative=-20.0), row(leak_relative=-30.0)]
    assert (average(leaks, "leak_relative").mean, average(leaks, "leak_relative").median) == (-math.inf, -30.0)
    both = [row(csdr=math.inf), row(csdr=-math.inf), row(csdr=0.0)]
    assert math.isnan(average(both, "csdr").mean)
    assert average(both, "csdr").median == 0


def test_every_track_is_in_one_group_of_occupancy() -> None:
    rows = [row(occupancy=share) for share in (0.0, 0.01, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0)]
    groups = by_occupancy(rows)
    assert list(groups) == ["no vocals", "0% – 25%", "25% – 50%", "50% – 75%", "75% – 100%"]
    assert [len(group) for group in groups.values()] == [1, 2, 2, 1, 2]


def test_published_figures_are_comparable_under_the_same_card_only() -> None:
    same = compare(MUSDB, PROTOCOLS["paper"])
    assert [one.differs for one in same[:2]] == [(), ()]
    assert same[0].note == "mean or median over tracks: not said"
    assert same[0].published.csdr == 11.03
    assert any("segment: not stated there" in difference for difference in same[2].differs)
    for card, tracks, said in (
        (PROTOCOLS["overlapping"], MUSDB, "overlap: 0.0 there, 0.5 here"),
        (PROTOCOLS["two-sources"], MUSDB, "sources: vocals there, vocals + rest here"),
        (replace(PROTOCOLS["paper"], segment=4.0), MUSDB, "segment: 8 s there, 4 s here"),
        (PROTOCOLS["paper"], "two", "tracks: MUSDB18-HQ test there, two here"),
    ):
        assert compare(tracks, card)[0].differs == (said,)


def test_an_evaluation_in_json_and_csv(tmp_path: Path) -> None:
    rows = (
        row("a", usdr=3.0, csdr=math.inf, leak_relative=-math.inf),
        row('b, "quoted"', usdr=5.0, csdr=1.0),
        row("a", segment=1.0, usdr=1.0),
    )
    result = Evaluation(
        checkpoint="m.safetensors", checkpoint_sha256="abc", tracks=TWO, protocol=PROTOCOLS["paper"], dtype="float32",
        rows=rows, failures=(Failure("c", 8.0, "why"),),
    )  # fmt: skip
    paths = result.save(tmp_path)
    content = json.loads(paths[0].read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert content["averages"]["8 s"]["usdr"] == {"mean": 4.0, "median": 4.0, "tracks": 2}
    assert content["rows"][0]["csdr"] == "inf"
    assert content["rows"][0]["si_sdr"] is None
    assert content["failures"][0]["message"] == "why"
    assert content["checkpoint"] == {"file": "m.safetensors", "sha256": "abc"}
    with paths[1].open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["track"] for line in lines] == ["a", 'b, "quoted"', "a"]
    assert (lines[0]["leak_relative"], lines[0]["si_sdr"], lines[1]["usdr"]) == ("-inf", "", "5.0")
    assert [line[""] for line in result.segment_table()] == ["1 s", "8 s"]
    assert result.segment_table()[1]["usdr"] == 4.0
    table = result.comparison_table()
    assert table[0]["model"] == "m.safetensors, mean over 2 tracks"
    assert all(line["protocol"].startswith("not comparable: tracks:") for line in table[2:])
    assert all(line["csdr"] is line["usdr"] is None for line in table[2:])
    assert "11.03 dB cSDR and 10.70 dB uSDR reported" in table[2]["protocol"]
    same = replace(result, tracks=Tracks(MUSDB, TWO.tracks)).comparison_table()
    assert [(line["csdr"], line["usdr"]) for line in same[2:]] == [(11.03, 10.70), (10.47, 10.29), (None, None)]
    assert same[2]["protocol"] == "the same (mean or median over tracks: not said)"
    three = Tracks(MUSDB, (*TWO.tracks, replace(TWO.tracks[0], name="c")))
    assert replace(result, tracks=three).comparison_table()[2]["protocol"].startswith("not comparable: tracks:")


# --- the command ------------------------------------------------------------------------------------------


def test_command_on_a_folder(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, output = musdb(tmp_path / "musdb"), tmp_path / "out"
    arguments = ["evaluate", str(root), "--checkpoint", str(checkpoint), "-o", str(output), "--segments", "0.5,1"]
    assert main(arguments) == 0
    said = capfd.readouterr()
    assert said.err == ""
    content = json.loads((output / "evaluation.json").read_text())
    assert [(one["track"], one["segment"]) for one in content["rows"]] == [
        (name, segment) for segment in (8.0, 0.5, 1.0) for name in ("A - One", "B – Zwei")
    ]
    assert content["checkpoint"]["sha256"] == sha256_file(checkpoint)
    assert {path.name for path in output.iterdir()} == {
        "rows", "evaluation.json", "rows.csv", "by_segment.png", "by_occupancy.png",
    }  # fmt: skip
    assert "not comparable: tracks: MUSDB18-HQ test there, 2 tracks in test here" in said.out
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*.json") if path.parent != output}
    assert len(stamps) == 6
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (output / "evaluation.json").read_text() == json.dumps(content, indent=1) + "\n"


def test_command_names_a_bad_track_once_and_does_the_others(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = musdb(tmp_path / "musdb")
    (root / "test" / "A - One" / "vocals.wav").write_text("no sound")
    arguments = ["evaluate", str(root), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), "--segments", "1"]
    assert main(arguments) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "vocals.wav: cannot be read as audio" in line
    assert [one["track"] for one in json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]] == [
        "B – Zwei"
    ] * 2


def test_command_on_the_bundled_songs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ModelConfig.preset("small", dim=16, depth=1, freqs_per_bands=generate_bands(8), d_state=8, headdim=8)
    save_checkpoint(BSMamba2(config), tmp_path / "model.safetensors")
    arguments = ["--checkpoint", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "out")]
    assert main(["evaluate", *arguments, "--songs", "1", "--seconds", "1", "--segments", ""]) == 0
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["tracks"]["name"] == "2 bundled songs"
    assert [row["segment"] for row in content["rows"]] == [8, 8]
    assert content["rows"][1]["track"] == "falcon-69"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: is no folder"),
        (["--songs", "0"], "--songs 0"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt: does not exist"),
    ],
)
def test_command_with_wrong_arguments(
    arguments: list[str], message: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out"), *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_rows_measured_otherwise_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    key = row_key("abc", PROTOCOLS["paper"])
    assert key == row_key("abc", PROTOCOLS["paper-median"])
    monkeypatch.setattr(evaluate, "ROWS", evaluate.ROWS + 1)
    assert row_key("abc", PROTOCOLS["paper"]) != key
