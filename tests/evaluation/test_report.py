"""Averages, groups and tables over rows, and the files that hold them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from eval_tracks import TWO

from bsmamba2.evaluation.evaluate import METRICS, EvalRow, EvalSet, Failure
from bsmamba2.evaluation.protocols import MUSDB, PROTOCOLS
from bsmamba2.evaluation.report import Evaluation, average, by_occupancy


def row(
    name: str = "a", segment: float = 8.0, occupancy: float = 0.5, stem: str = "vocals", **values: float
) -> EvalRow:
    values_by_metric = {**dict.fromkeys(METRICS, math.nan), **values}
    return EvalRow(
        track=name, stem=stem, segment=segment, seconds=4.0, occupancy=occupancy, onsets=0, onsets_missed=0,
        compute_seconds=1.0, **values_by_metric,
    )  # fmt: skip


def test_averages_leave_out_what_has_no_value() -> None:
    rows = [row(csdr=1.0), row(csdr=2.0), row(csdr=9.0), row()]
    found = average(rows, "csdr")
    assert (found.mean, found.median, found.tracks) == (4.0, 2.0, 3)
    assert math.isnan(average(rows, "usdr").median)
    leaks = [row(silence_leakage=-math.inf), row(silence_leakage=-20.0), row(silence_leakage=-30.0)]
    assert (average(leaks, "silence_leakage").mean, average(leaks, "silence_leakage").median) == (-math.inf, -30.0)
    both = [row(csdr=math.inf), row(csdr=-math.inf), row(csdr=0.0)]
    assert math.isnan(average(both, "csdr").mean)
    assert average(both, "csdr").median == 0


def test_every_track_is_in_one_group_of_occupancy() -> None:
    rows = [row(occupancy=share) for share in (0.0, 0.01, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0)]
    groups = by_occupancy(rows)
    assert list(groups) == ["no vocals", "0% – 25%", "25% – 50%", "50% – 75%", "75% – 100%"]
    assert [len(group) for group in groups.values()] == [1, 2, 2, 1, 2]


def test_an_evaluation_in_json_and_csv(tmp_path: Path) -> None:
    rows = (
        row("a", usdr=3.0, csdr=math.inf, silence_leakage=-math.inf),
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
    assert (lines[0]["silence_leakage"], lines[0]["si_sdr"], lines[1]["usdr"]) == ("-inf", "", "5.0")
    assert [line[""] for line in result.segment_table()] == ["1 s", "8 s"]
    assert result.segment_table()[1]["usdr"] == 4.0
    table = result.comparison_table()
    assert table[0]["model"] == "m.safetensors, mean over 2 tracks"
    assert all(line["protocol"].startswith("not comparable: tracks:") for line in table[2:])
    assert all(line["csdr"] is line["usdr"] is None for line in table[2:])
    assert "11.03 dB cSDR and 10.70 dB uSDR reported" in table[2]["protocol"]
    same = replace(result, tracks=EvalSet(MUSDB, TWO.tracks)).comparison_table()
    assert [(line["csdr"], line["usdr"]) for line in same[2:]] == [(11.03, 10.70), (10.47, 10.29), (None, None)]
    assert same[2]["protocol"] == "the same (mean or median over tracks: not stated)"
    three = EvalSet(MUSDB, (*TWO.tracks, replace(TWO.tracks[0], name="c")))
    assert replace(result, tracks=three).comparison_table()[2]["protocol"].startswith("not comparable: tracks:")


def test_averages_are_per_stem(tmp_path: Path) -> None:
    rows = (
        row("a", stem="drums", usdr=1.0), row("a", usdr=10.0),
        row("b", stem="drums", usdr=3.0, occupancy=0), row("b", usdr=20.0, csdr=7.0),
        row("a", segment=1.0, stem="drums", usdr=5.0), row("a", segment=1.0, usdr=6.0),
    )  # fmt: skip
    result = Evaluation(
        checkpoint="m.ckpt",
        checkpoint_sha256="abc",
        tracks=TWO,
        protocol=PROTOCOLS["paper"],
        dtype="float32",
        rows=rows,
    )
    assert result.stems == ["drums", "vocals"]
    table = {line[""]: (line["tracks"], line["usdr"]) for line in result.segment_table()}
    assert table == {"drums, 1 s": (1, 5), "drums, 8 s": (2, 2), "vocals, 1 s": (1, 6), "vocals, 8 s": (2, 15)}
    groups = {line[""]: (line["tracks"], line["usdr"]) for line in result.occupancy_table()}
    assert groups == {"drums, no drums": (1, 3), "drums, 25% – 50%": (1, 1), "vocals, 25% – 50%": (2, 15)}
    comparison = result.comparison_table()
    assert [comparison[0][key] for key in ("model", "csdr", "usdr")] == ["m.ckpt, mean over 2 tracks", 7.0, 15.0]
    paths = result.save(tmp_path)
    content = json.loads(paths[0].read_text())
    assert content["averages"]["drums, 8 s"]["usdr"] == {"mean": 2.0, "median": 2.0, "tracks": 2}
    assert [one["stem"] for one in content["rows"]] == ["drums", "vocals"] * 3
    with paths[1].open(newline="") as file:
        assert [line["stem"] for line in csv.DictReader(file)] == ["drums", "vocals"] * 3
    drums = replace(result, rows=rows[::2])
    assert drums.comparison_table() == []  # the published figures are those of vocals
    assert [line[""] for line in drums.segment_table()] == ["drums, 1 s", "drums, 8 s"]


def test_a_name_in_another_encoding_is_in_every_file(tmp_path: Path) -> None:
    result = Evaluation(
        checkpoint="caf\udce9.ckpt", checkpoint_sha256="abc", tracks=TWO, protocol=PROTOCOLS["paper"], dtype="float32",
        rows=(row("caf\udce9", usdr=1.0),), failures=(Failure("b", 8.0, "caf\udce9/mixture.wav: is damaged"),),
    )  # fmt: skip
    as_json, as_csv = result.save(tmp_path)
    assert json.loads(as_json.read_text(encoding="utf-8"))["rows"][0]["track"] == "caf\udce9"
    with as_csv.open(newline="", encoding="utf-8") as file:
        assert next(csv.DictReader(file))["track"] == r"caf\udce9"
