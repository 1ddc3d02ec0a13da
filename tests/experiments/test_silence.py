"""One run of the experiment, and all runs in one file: equal where they must be, refused where they are not."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bsmamba2.experiments import silence
from bsmamba2.experiments.silence import Experiment
from bsmamba2.training.run_dir import RunError

ROOT = Path(__file__).parents[2]
SHORT = Experiment(
    steps=4,
    segment=0.5,
    batch=1,
    songs=2,
    seconds_per_song=2.0,
    test_songs=2,
    test_seconds=2.0,
    occupancies=(0.25, 1.0),
    segments=(1.0, 2.0),
    save_every=2,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share out: on a busy machine two threads take ten times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of(layer: str, seed: int = 0) -> Experiment:
    return dataclasses.replace(SHORT, layer=layer, seed=seed)


# --- equal where they must be ---------------------------------------------------------------------------------


def test_only_the_sequence_layers_differ_at_the_start() -> None:
    models = {name: silence.build(of(name)).state_dict() for name in silence.COMPARED}
    mamba2 = models["mamba2"]
    for name in ("lstm", "attention"):
        shared = models[name].keys() & mamba2.keys()
        assert {key for key in mamba2 if ".mixer." not in key} <= shared
        assert all(torch.equal(models[name][key], mamba2[key]) for key in shared if ".mixer." not in key)
        assert all(".mixer." in key for key in models[name].keys() ^ mamba2.keys())
    again, other = silence.build(of("lstm")).state_dict(), silence.build(of("lstm", 1)).state_dict()
    assert all(torch.equal(again[key], models["lstm"][key]) for key in again)
    assert not all(torch.equal(other[key], again[key]) for key in again)


def test_models_are_equal_within_one_percent() -> None:
    sizes = {}
    for name in silence.COMPARED:
        model = silence.build(of(name))
        mixers = [
            block.mixer
            for axis in (model.layers[0].time, model.layers[0].band)
            for block in (axis.forwards, axis.backwards)
        ]
        sizes[name] = {sum(part.numel() for part in mixer.parameters()) for mixer in mixers}
        assert len(sizes[name]) == 1  # all four of a model alike
    counts = [size for found in sizes.values() for size in found]
    assert max(counts) <= 1.01 * min(counts)


def test_batches_depend_on_the_seed_alone() -> None:
    def first(experiment: Experiment) -> torch.Tensor:
        batches = iter(silence.batches(experiment))
        return torch.stack([next(batches)[0] for _ in range(3)])

    reference = first(of("mamba2"))
    assert torch.equal(first(of("attention")), reference)
    assert not torch.equal(first(of("mamba2", 1)), reference)


def test_the_band_stays_when_fewer_sing() -> None:
    sparse, dense = silence.scored_song(0, 0.1, 4.0), silence.scored_song(0, 0.9, 4.0)
    assert sparse.occupancy == pytest.approx(0.1)
    assert dense.occupancy == pytest.approx(0.9)
    bands = [(song.mixture - song.vocals).flatten() for song in (sparse, dense)]
    cosine = torch.nn.functional.cosine_similarity(*bands, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-4)  # one band, but for its level


# --- measures -------------------------------------------------------------------------------------------------


def test_measures_of_estimates_whose_values_are_known() -> None:
    song = silence.scored_song(5, 0.5, 4.0)
    band = song.mixture - song.vocals
    found = silence.score(song, song.vocals / 2)
    half = 20 * math.log10(2)
    assert found["usdr"] == pytest.approx(half, abs=0.01)
    assert found["vocal_usdr"] == pytest.approx(half, abs=0.01)
    assert found["onset"] == pytest.approx(-half, abs=0.01)
    leaking = song.vocals.clone()
    heard = song.vocals.abs().amax(0) > 0
    leaking[:, ~heard] += 0.1 * band[:, ~heard]  # in silence alone
    found = silence.score(song, leaking)
    assert found["silence_leakage"] == pytest.approx(-20, abs=0.5)
    assert found["usdr"] is not None
    assert found["vocal_usdr"] is not None
    assert found["vocal_usdr"] > found["usdr"] + 3  # what sounds in silence is not in it
    everywhere = silence.scored_song(5, 1.0, 4.0)
    found = silence.score(everywhere, everywhere.vocals / 2)
    assert found["silence_leakage"] is None


def test_segments_are_what_the_model_is_given() -> None:
    class Lengths(torch.nn.Module):
        config = silence.MODEL

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

        def forward(self, mixture: torch.Tensor) -> torch.Tensor:
            self.seen.append(mixture.shape[-1])
            return mixture[:, None] / 2

    song, model = silence.scored_song(0, 0.5, 2.0), Lengths()
    rows = silence.score_segments(model, song, 7, 0.5, (0.5, 2.0))  # type: ignore[arg-type]
    assert set(model.seen) == {8_000, 32_000}
    assert [(row["song"], row["occupancy"], row["segment"]) for row in rows] == [(7, 0.5, 0.5), (7, 0.5, 2.0)]
    assert rows[0]["usdr"] == rows[1]["usdr"] == silence.score(song, song.mixture / 2)["usdr"]
    assert set(silence.to_columns(rows)) == set(rows[0])


# --- a run is taken up ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", silence.COMPARED)
def test_a_stopped_run_ends_with_the_same_bits(layer: str, tmp_path: Path) -> None:
    whole = silence.start(of(layer), tmp_path / "whole")
    assert len(list(whole.steps(silence.batches(of(layer))))) == 4
    stopped = silence.start(of(layer), tmp_path / "stopped")
    for step in stopped.steps(silence.batches(of(layer))):
        if step.step == 3:  # the state is that of step 2
            break
    again = silence.start(of(layer), tmp_path / "stopped")
    assert again.trainer.step == 2
    assert [step.step for step in again.steps(silence.batches(of(layer)))] == [3, 4]
    ended, reference = again.trainer.ema.state_dict(), whole.trainer.ema.state_dict()
    assert all(torch.equal(ended[key], reference[key]) for key in reference)
    assert not list(tmp_path.glob("*/*.safetensors"))
    other = next(name for name in silence.COMPARED if name != layer)
    with pytest.raises(RunError, match=f"layer='{layer}', now '{other}'"):
        silence.start(of(other), tmp_path / "stopped")


# --- parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": "rnn"}, "layer='rnn' must be mamba2 or lstm or attention"),
        ({"seed": -1}, r"seed=-1 must lie in \[0, inf\)"),
        ({"steps": 0}, r"steps=0 must lie in \[1, inf\)"),
        ({"songs": True}, "songs=True"),
        ({"lr": "4e-3"}, "write 1.0e-3"),
        ({"lr": math.nan}, "lr=nan"),
        ({"occupancies": [0.0, 0.5]}, "occupancies"),
        ({"occupancies": [0.5, 1.5]}, r"must lie in \(0, 1\]"),
        ({"segments": [1.0, 1.0]}, "names one twice"),
        ({"segments": []}, "not empty"),
        ({"segments": [1.0, 32.0]}, "must not be longer than test_seconds=16.0"),
        ({"stepz": 1}, "unknown parameters stepz; known: layer, seed"),
    ],
)
def test_bad_parameters_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experiment.from_mapping(values)


def test_parameters_go_through_json() -> None:
    there = json.loads(json.dumps({**SHORT.to_mapping(), "output_dir": "runs/one"}))
    assert Experiment.from_mapping(there) == SHORT


# --- all runs -------------------------------------------------------------------------------------------------


def sound() -> dict[str, Any]:
    """Runs of two seeds, as files hold them."""
    rows = [
        {
            "song": s,
            "occupancy": o,
            "segment": e,
            "usdr": s + o,
            "vocal_usdr": 1.0,
            "silence_leakage": None,
            "onset": -1.0,
            "mixture": 0.0,
        }
        for s in range(2)
        for o in SHORT.occupancies
        for e in SHORT.segments
    ]
    runs = [
        {
            "parameters": of(layer, seed).to_mapping(),
            "layer_parameters": 1000 + 5 * i,
            "source_hash": "0123",
            "rows": silence.to_columns(rows),
        }
        for i, layer in enumerate(silence.COMPARED)
        for seed in (0, 1)
    ]
    return json.loads(json.dumps({"runs": runs}))


def test_all_rows_of_sound_data_are_read() -> None:
    rows = silence.read_runs(sound())
    assert len(rows) == 3 * 2 * 2 * 2 * 2
    assert {(row["layer"], row["seed"]) for row in rows} == {
        (layer, seed) for layer in silence.COMPARED for seed in (0, 1)
    }
    means = silence.average(rows, "usdr", ["layer", "occupancy"])
    assert means["lstm", 0.25] == pytest.approx(0.75)
    assert len(means) == 6
    assert silence.average(rows, "silence_leakage", ["layer"]) == {}


def drop_row(run: dict[str, Any]) -> None:
    for column in run["rows"].values():
        column.pop()


def double_row(run: dict[str, Any]) -> None:
    for column in run["rows"].values():
        column[-1] = column[0]


FAULTS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "a run missing": (lambda runs: runs.pop(), "not one for each layer and seed"),
    "a run twice": (lambda runs: runs.append(copy.deepcopy(runs[0])), "not one for each layer and seed"),
    "longer training of one": (lambda runs: runs[2]["parameters"].update(steps=5), "with other parameters"),
    "another rate for one": (lambda runs: runs[4]["parameters"].update(lr=1e-3), "with other parameters"),
    "other code": (lambda runs: runs[1].update(source_hash="4567"), "with other code"),
    "a larger layer": (lambda runs: runs[3].update(layer_parameters=1011), "not equal within 1 %"),
    "a row missing": (lambda runs: drop_row(runs[0]), "7 rows, and not one for each of 8"),
    "a row twice": (lambda runs: double_row(runs[0]), "8 rows, and not one for each of 8"),
    "a column missing": (lambda runs: runs[0]["rows"].pop("vocal_usdr"), "columns must be"),
    "a short column": (lambda runs: runs[0]["rows"]["vocal_usdr"].pop(), "of one length"),
    "no code": (lambda runs: runs[0].pop("source_hash"), "a run lacks source_hash"),
    "an unknown parameter": (lambda runs: runs[0]["parameters"].update(depth=2), "unknown parameters depth"),
    "nothing": (lambda runs: runs.clear(), "hold no list of runs"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_data_that_must_not_be_compared_are_refused(fault: Callable[[list[dict[str, Any]]], Any], message: str) -> None:
    data = sound()
    fault(data["runs"])
    with pytest.raises(ValueError, match=message):
        silence.read_runs(data)


def test_the_committed_data_are_whole_small_and_of_no_machine() -> None:
    path = ROOT / "book" / "data" / "silence.json"
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 200_000
    assert "/tmp" not in text
    assert "/root" not in text
    rows = silence.read_runs(json.loads(text))
    planned = yaml.safe_load((ROOT / "notebooks" / "params" / "sweep_silence.yaml").read_text(encoding="utf-8"))["grid"]
    assert set(planned["layer"]) == set(silence.COMPARED)
    assert len(planned["seed"]) >= 3
    seeds = {row["seed"] for row in rows}
    assert seeds <= set(planned["seed"])  # the page prints which are missing
    assert len(seeds) >= 2  # or there is no spread
    assert {row["segment"] for row in rows} >= {1.0, 16.0}
    assert {row["occupancy"] for row in rows} >= {0.05, 1.0}
    means = silence.average(rows, "usdr", ["layer", "seed"])
    assert all(value > 1 for value in means.values())  # all learned more than silence, which has 0 dB,
    assert all(value > 3 for (layer, _), value in means.items() if layer == "mamba2")  # and this one clearly more
    assert all(row["silence_leakage"] is None for row in rows if row["occupancy"] == 1.0)


def test_the_code_has_a_name_and_a_change_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(silence.source_hash()) == 16
    assert silence.source_hash() == silence.source_hash()
    before = silence.source_hash()
    monkeypatch.setattr(silence, "SOURCES", silence.SOURCES[:-1])
    assert silence.source_hash() != before
