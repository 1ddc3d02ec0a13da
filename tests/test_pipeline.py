"""From songs to a voice, in one go: the training notebook under papermill, its checkpoint, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import soundfile
import torch
from notebook_cells import run_cells

from bsmamba2 import BSMamba2, ModelConfig, load_checkpoint, save_checkpoint
from bsmamba2.bands import generate_bands
from bsmamba2.checkpoints import BUNDLED_CHECKPOINT
from bsmamba2.cli.main import main
from bsmamba2.evaluation.evaluate import mean, score
from bsmamba2.synth import STEMS, excerpt, synthesise_songs
from bsmamba2.training.job import HELD_OUT, JobConfig

ROOT = Path(__file__).parents[1]
SHORT = {
    "songs": 3, "val_songs": 3, "seconds_per_song": 3.0, "segment": 1.0, "batch": 1, "steps": 2, "backend": "plain",
    "dim": 16, "depth": 1,
}  # fmt: skip


def papermill(folder: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "papermill", "notebooks/train.ipynb", str(folder / "run.ipynb")]
    content = {**SHORT, "output_dir": str(folder / "run"), **parameters}
    (folder / "parameters.json").write_text(json.dumps(content))
    command += ["-f", str(folder / "parameters.json"), "--no-progress-bar"]
    fonts = {"MPLCONFIGDIR": matplotlib.get_cachedir()}  # a list of them takes seconds to make
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **fonts}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_run_on_files_that_was_stopped_goes_on_and_leaves_a_model_that_separates(tmp_path: Path) -> None:
    for number, song in enumerate(synthesise_songs(3, seed=5, seconds=2.5)):
        (tmp_path / "data" / f"song {number}").mkdir(parents=True)
        for name, stem in zip(STEMS, song.stems, strict=True):
            path = tmp_path / "data" / f"song {number}" / f"{name}.flac"
            soundfile.write(path, stem.T.numpy(), song.sample_rate, subtype="PCM_24")
    parameters = {"data": str(tmp_path / "data"), "schedule": "constant", "val_songs": 1, "validation_windows": 1}
    stopped = JobConfig.from_mapping({**SHORT, **parameters, "steps": 1, "output_dir": str(tmp_path / "run")})
    windows = stopped.windows()
    (first,) = stopped.start(*windows).steps(stopped.batches(windows[0]))
    run = tmp_path / "run"
    before = (run / "steps.jsonl").read_text().splitlines()
    done = papermill(tmp_path, **parameters)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    lines = (run / "steps.jsonl").read_text().splitlines()
    assert lines[:1] == before  # with the seconds that it took: it was not run again
    steps = [json.loads(line) for line in lines]
    assert [step["step"] for step in steps] == [first.step, 2] == [1, 2]
    assert steps[0]["loss"] == summary["loss_first"] == first.loss > 0
    assert summary["usdr"]["silence"] == pytest.approx(0)
    assert summary["usdr"]["oracle"] > summary["usdr"]["mixture"]
    assert summary["real"]["oracle"] > summary["real"]["mixture"]
    model = load_checkpoint(run / "checkpoint.safetensors")
    assert sum(p.numel() for p in model.parameters()) == summary["model_parameters"]

    song = synthesise_songs(1, seed=3, seconds=2.0)[0]
    soundfile.write(tmp_path / "song.wav", song.mixture.T.numpy(), song.sample_rate, subtype="FLOAT")
    arguments = [str(tmp_path / "song.wav"), "--checkpoint", str(run / "checkpoint.safetensors")]
    assert main(["separate", *arguments, "-o", str(tmp_path / "out")]) == 0
    vocals, rate = soundfile.read(tmp_path / "out" / "song.vocals.wav", dtype="float32")
    assert rate == 44_100
    with torch.inference_mode():
        padded = torch.nn.functional.pad(song.mixture, (0, 8 * 44_100 - song.mixture.shape[1]))
        expected = model(padded[None])[0, 0, :, : song.mixture.shape[1]]
    torch.testing.assert_close(torch.from_numpy(vocals.T.copy()), expected, rtol=1e-4, atol=1e-6)


CHECKED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "train": [
        ({"lr": "3e-3"}, "lr='3e-3'"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"preset": "huge"}, "preset 'huge'"),
        ({"stepz": 3}, "stepz"),
    ],
    "evaluate": [
        ({"segmnts": [1.0]}, "no parameter 'segmnts'"),
        ({"segments": 1.0}, r"segments=1\.0 must be of type list\[float\]"),
        ({"protocol": "papers"}, "protocol='papers' is not one of paper"),
        ({"songs": 0}, "songs=0"),
    ],
    "benchmark": [
        ({"lenghts": [1.0]}, "no parameter 'lenghts'"),
        ({"repeats": 0}, "repeats=0"),
        ({"dtypes": ["fp8"]}, "'fp8'"),
    ],
    "sweep": [
        ({"grids": {}}, "unknown parameters grids"),
        ({"workers": "2"}, "workers='2' must be of type int"),
        ({"grid": {"learning_rate": [1.0]}}, "has no parameter learning_rate; it has steps"),
        ({"grid": {"lr": ["1e-3"]}}, "lr='1e-3' must be a number"),
        ({"notebook": "notebooks/evaluate.ipynb"}, "must be one of train.ipynb, silence.ipynb"),
        ({"notebook": "notebooks/silence.ipynb", "base": "", "grid": {"lair": [1]}}, "has no parameter lair; it has"),
    ],
}


@pytest.mark.parametrize(
    ("notebook", "parameters", "message"),
    [(notebook, *case) for notebook, cases in CHECKED.items() for case in cases],
)
def test_the_cell_after_the_parameters_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: str, parameters: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((ValueError, TypeError), match=message):
        run_cells(notebook, {"output_dir": str(tmp_path / "run"), **parameters}, cells=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("notebook", CHECKED)
def test_the_cell_after_the_parameters_accepts_good_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebook: str
) -> None:
    monkeypatch.chdir(ROOT)
    run_cells(notebook, {"output_dir": str(tmp_path / "run")}, cells=3)


# --- evaluation -------------------------------------------------------------------------------------------

BRIEF = {"songs": 2, "seconds_per_song": 2.0, "seed": 5, "segments": [1.0], "protocol": "overlapping"}


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ModelConfig.preset("small", dim=16, depth=1, freqs_per_bands=generate_bands(8), d_state=8, headdim=8)
    save_checkpoint(BSMamba2(config), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_evaluation_notebook_scores_a_checkpoint(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shown = run_cells("evaluate", {**BRIEF, "checkpoint": str(small_model), "output_dir": str(tmp_path / "run")})
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert content["protocol"]["name"] == "overlapping"
    assert sorted(content["averages"]) == ["1 s", "8 s"]
    assert [row["track"] for row in content["rows"]].count("falcon-69") == 2
    assert content["failures"] == []
    assert len(content["rows"]) == len((tmp_path / "run" / "rows.csv").read_text().splitlines()) - 1 == 6
    assert shown.count("image/svg+xml") == 2
    assert "not comparable" in shown


# --- benchmark --------------------------------------------------------------------------------------------

INSTANT = {
    "lengths": [0.25, 1.0],
    "parts": ["scan"],
    "backends": ["chunked", "recurrent", "triton"],
    "dtypes": ["float32"],
    "modes": ["forward"],
    "repeats": 1,
    "preset": "small",
    "sequences": 1,
    "baselines": [],
}


@pytest.mark.slow
def test_the_benchmark_notebook_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shown = run_cells("benchmark", {**INSTANT, "output_dir": str(tmp_path / "run")})
    content = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    scans = [row for row in content["rows"] if row["part"] == "scan"]
    assert {(row["seconds"], row["candidate"]) for row in scans} >= {(0.25, "chunked"), (1.0, "recurrent")}
    for row in scans:
        assert row["median"] > 0
        assert 0 < row["fraction"] < 1
        assert row["memory"] > row["memory_before"] > 0
        assert row["difference"] < 1e-5
    missing = {one["candidate"] for one in content["skipped"]}
    if not torch.cuda.is_available():
        assert missing == {"triton"}
        assert "nothing below was run on a GPU" in capsys.readouterr().out
    assert shown.count("image/svg+xml") == 1
    assert "1 s against 0.25 s" in shown


@pytest.mark.slow
def test_what_ships_is_made_from_a_run_and_the_card_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tiny = {**SHORT, "loss": "snr", "validate_every": 1, "validation_windows": 1}
    recipe = JobConfig.from_mapping({**tiny, "output_dir": str(tmp_path / "trained")})
    windows = recipe.windows()
    steps = list(recipe.start(*windows).steps(recipe.batches(windows[0])))
    (tmp_path / "recipe.json").write_text(json.dumps(tiny))
    parameters: dict[str, Any] = {
        "run": str(tmp_path / "trained"),
        "params": str(tmp_path / "recipe.json"),
        "page_data": str(tmp_path / "run" / "page.json"),
    }
    old = json.loads(BUNDLED_CHECKPOINT.with_suffix(".json").read_text())
    (tmp_path / "before.json").write_text(json.dumps(old))
    began = BSMamba2(recipe.model_config)
    save_checkpoint(began, tmp_path / "before.safetensors")
    parameters |= {"songs": 4, "songs_by_occupancy": 1, "output_dir": str(tmp_path / "run")}
    run_cells("ship", {**parameters, "before": str(tmp_path / "before.json")})
    made, card = tmp_path / "run" / "small.safetensors", json.loads((tmp_path / "run" / "small.json").read_text())
    page = json.loads((tmp_path / "run" / "page.json").read_text())
    trained = load_checkpoint(tmp_path / "trained" / "last.safetensors")
    for whole, half in zip(trained.parameters(), load_checkpoint(made).parameters(), strict=True):
        torch.testing.assert_close(half, whole.half().float(), atol=0.0, rtol=0.0)
    old_page = json.loads((ROOT / old["page_data"]).read_text())
    assert card["steps"] == old["steps"] + 2
    assert [row["steps"] for row in page["earlier"]] == [row["steps"] for row in old_page["earlier"]] + [old["steps"]]
    assert page["earlier"][-1]["clean"] == old["usdr"]["0"]["model"]
    assert page["loss"]["published"] == old_page["loss"]["published"]
    assert all(len(points) <= 400 for points in (*page["loss"].values(), page["validation"]))
    assert page["validation"][: len(old_page["validation"])] == old_page["validation"]
    assert [number for number, _ in page["validation"][-2:]] == [old["steps"] + step.step for step in steps]
    assert card["parameters"] == tiny
    assert card["weights"] == sum(p.numel() for p in trained.parameters())
    assert card["real"]["model"] == pytest.approx(score(load_checkpoint(made), excerpt()).model, abs=0.01)
    assert [row["occupancy"] for row in card["by_occupancy"]] == [0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    learned, alike = page["by_heart"]
    assert (learned["kind"], alike["kind"]) == ("learned from", "drawn alike")
    heard = [song for song in synthesise_songs(3, seed=recipe.seed, **recipe.song_settings) if song.vocal_segments]
    assert learned["songs"] == len(heard)
    assert {song.name for song, _ in windows[0][0]} == {song.name for song in heard}
    assert alike["songs"] == len(
        [
            song
            for song in synthesise_songs(4, seed=recipe.seed + HELD_OUT, **recipe.song_settings)
            if song.vocal_segments
        ]
    )
    for name, model in (("model", load_checkpoint(made)), ("began with", began)):
        assert learned[name] == pytest.approx(mean([score(model, song) for song in heard], "model"), abs=0.01)
    assert abs(learned["began with"] - learned["model"]) > 0.1  # so that two of one would be found out
    plain, *changed = page["by_change"]
    found = [
        score(load_checkpoint(made), song)
        for song in synthesise_songs(2, seed=card["seed_of_the_scored_songs"] + 4_000, mix_variety=0.5)
        if song.vocal_segments
    ]
    assert (plain["change"], plain["songs"]) == ("none", len(found))
    for name in ("model", "oracle"):
        assert plain[name] == pytest.approx(sum(getattr(one, name) for one in found) / len(found), abs=0.01)
    assert len({row["change"] for row in changed}) == 7
    moved = {row["change"]: abs(row["began with"] - plain["began with"]) for row in changed}
    learned_to_ignore = {"nothing above 16 kHz", "every stem an MP3"}
    assert learned_to_ignore < moved.keys()
    assert min(moved.values()) > 0, moved  # each does something,
    assert all(far > 0.002 for change, far in moved.items() if change not in learned_to_ignore), moved  # and most much
    far = {row["change"]: row["far"] for row in page["by_change"]}  # whatever the model ignores
    assert far.pop("none") == 0
    assert all(0.01 < ratio < 2 for ratio in far.values()), far
    assert list(far.values()) == sorted(far.values()), far
    kept = made.read_bytes()
    lonely = tmp_path / "lonely.json"  # a card without its weights
    lonely.write_text(json.dumps(old))
    for before, told in ((tmp_path / "run" / "small.json", "counts"), (lonely, "lonely.safetensors: the weights")):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            run_cells("ship", {**parameters, "before": str(before)})
    assert made.read_bytes() == kept
    assert json.loads((tmp_path / "run" / "small.json").read_text()) == card
    assert json.loads((tmp_path / "run" / "page.json").read_text()) == page
