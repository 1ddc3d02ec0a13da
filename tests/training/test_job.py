"""A training job: its parameters, its model and its data, on the command line and in a notebook."""

from __future__ import annotations

import ast
import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from checkpoint_files import published_weights

import bsmamba2.kernels.resolver
from bsmamba2 import BSMamba2, ModelConfig, load_checkpoint, save_checkpoint
from bsmamba2.cli.main import main
from bsmamba2.settings import read_parameters
from bsmamba2.synth import STEMS, Song, synthesise_songs
from bsmamba2.train import TrainConfig
from bsmamba2.training.job import JobConfig
from bsmamba2.training.run_dir import RunError

ROOT = Path(__file__).parents[2]
SHORT = {
    "dim": 16, "depth": 1, "songs": 2, "val_songs": 2, "seconds_per_song": 3.0, "segment": 1.0, "batch": 1, "steps": 2
}  # fmt: skip


def write(folder: Path, song: Song, stems: tuple[str, ...] = STEMS) -> None:
    folder.mkdir(parents=True)
    for name in stems:
        soundfile.write(folder / f"{name}.wav", song.stem(name).T.numpy(), song.sample_rate, subtype="FLOAT")


SMALL = ["--backend", "plain", "--segment", "0.5", "--batch", "1", "--steps", "1", "--validation-windows", "1"]
SMALL += ["--device", "cpu"]


def test_a_run_stops_at_faulty_files_or_goes_on_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    for i, song in enumerate(synthesise_songs(4, seed=5, seconds=1.5)):
        write(data / f"song {i}", song)
    (data / "song 1" / "drums.wav").write_bytes(b"")
    arguments = ["train", "--data", str(data), "--output-dir", str(tmp_path / "run"), *SMALL]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert f"{data / 'song 1' / 'drums.wav'}: is broken" in told
    assert "on_bad_file=skip" in told
    assert not (tmp_path / "run").exists()
    with pytest.warns(UserWarning, match=r"drums\.wav: is broken"):
        assert main([*arguments, "--on-bad-file", "skip"]) == 0
    assert (tmp_path / "run" / "last.safetensors").exists()
    assert len(list((tmp_path / "cache" / "bsmamba2").iterdir())) == 1


def test_the_checkpoint_names_its_own_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was trained to find drums says so, though it began with a model of the voice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for i, song in enumerate(synthesise_songs(2, seed=5, seconds=1.5)):
        write(tmp_path / "data" / f"song {i}", song)
    options = ["--preset", "small", "--dim", "16", "--depth", "1", *SMALL]
    stems = ["--data", str(tmp_path / "data"), "--stems", "drums", "--sources", "drums", "vocals"]
    for name, extra in (("voice", ["--songs", "2", "--val-songs", "2"]), ("drums", stems)):
        begun = ["--init", str(tmp_path / "voice" / "last.safetensors")] if name == "drums" else []
        assert main(["train", *options, *extra, *begun, "--output-dir", str(tmp_path / name)]) == 0
    found = {name: load_checkpoint(tmp_path / name / "last.safetensors").config.stems for name in ("voice", "drums")}
    assert found == {"voice": ("vocals",), "drums": ("drums",)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "unknown parameters stepz"),
        ({"lr": "2e-3"}, "lr='2e-3' must be a number.*1.0e-3"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"batch": True}, "batch=True"),
        ({"compile": 1}, "compile=1 must be true or false"),
        ({"preset": "huge"}, "preset 'huge'"),
        ({"segment": 0}, "segment=0"),
        ({"on_bad_file": "ignore"}, "on_bad_file='ignore'"),
        ({"loss_windows": ["a"]}, "loss_windows"),
        ({"seed": -1}, "seed=-1"),
        ({"optimiser": "sgd"}, "optimiser='sgd' must be adamw or muon"),
        ({"backend": "native"}, "backend='native' must be auto or plain or cpu or triton"),
        ({"augment_prob": -0.5}, "augment_prob=-0.5 must lie in"),
        ({"coherent_mix_prob": 1.5}, "coherent_mix_prob=1.5 must lie in"),
        ({"soundfont_share": -0.5}, "soundfont_share=-0.5 must lie in"),
        ({"clean_share": 1.1}, "clean_share=1.1 must lie in"),
        ({"stems": "vocals"}, "stems='vocals' must be a list"),
        ({"sources": ["drums", "vocals"]}, "are those of a folder"),
        ({"stems": ["vocals", "guitar"]}, "no 'guitar'; `sources` has vocals, drums, bass, other"),
        ({"stems": ["vocals", "vocals"]}, "names a stem twice"),
        ({"data": "any", "sources": ["vocals", "vocals"]}, "names a file twice"),
        (
            {"data": "any", "sources": ["vocals", "piano"], "stems": ["drums"]},
            "no 'drums'; `sources` has vocals, piano",
        ),
        ({"preset": "init"}, "name it, init=FILE"),
        ({"config": "c.yaml"}, "config='c.yaml' describes a checkpoint: name it, init=FILE"),
        ({"x" * 3000: 1}, "unknown parameters x{100};"),
        ({"steps": 10**400}, r"steps=10+\.\.\.0+ must be a whole number; this one is too large"),
        ({"lr": 10**400}, "lr=10+.* must be a number; this one is too large"),
        ({"seed": 16**9000}, "seed=int of very many digits must be"),
        ({"preset": "x" * 10**6}, "preset='xx.*must be text; this one is too large"),
        ({1: 2, "a": 3, "x\n" * 500: 1}, r"unknown parameters 1, a, 'x\\nx"),
    ],
)
def test_parameters_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobConfig.from_mapping(values)


def bomb() -> Any:
    """A list that has 9⁶⁰ numbers, in 60 lists."""
    value: Any = 1
    for _ in range(60):
        value = [value] * 9
    return value


@pytest.mark.parametrize("name", ["lr", "steps", "stems", "preset", "compile", "unknown"])
def test_a_nested_value_is_refused_in_one_short_line(name: str) -> None:
    with pytest.raises(ValueError, match=name) as refused:
        JobConfig.from_mapping({name: bomb()})
    message = str(refused.value)
    assert len(message.replace(", ".join(JobConfig.names()), "")) < 300
    assert "\n" not in message


ALIASES = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 40))
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("a.yaml", ALIASES, r"no YAML: .*an alias.* line 2"),
        ("a.yaml", MERGES, r"no YAML: .*an alias.* line 3"),
        ("a.yml", "steps: " + "[" * 5000, "nested too deep"),
        ("a.yaml", "".join(f"{' ' * i}a:\n" for i in range(900)), "nested too deep"),
        ("a.json", "[" * 5000 + "]" * 5000, "nested too deep"),
        ("a.json", '{"a":' * 5000 + "1" + "}" * 5000, "nested too deep"),
        ("a.json", f'{{"steps": 1{"0" * 5000}}}', "digits"),
        ("a.yaml", f"steps: 1{'0' * 5000}", "digits"),
        ("a.yaml", "a: !!int ''", "no YAML"),
        ("a.yaml", "a: !!bool x", "no YAML"),
        ("a.yaml", "a: !!timestamp x", "no YAML"),
        ("a.yaml", "a: !!python/object/apply:os.system ['true']", "no YAML: .*line 1"),
        ("a.yaml", "a: b: c", "no YAML: .*line 1"),
        ("a.yaml", "1: 2", "must hold names and values"),
        ("a.yaml", "- 1", "must hold names and values"),
        ("a.yaml", "a: " + "x" * 1_000_001, "at most 1,000,000 characters"),
        ("a.JSON", b"\xff\xfe", "can't decode"),
    ],
)
def test_a_parameter_file_is_read_or_refused_in_one_line(
    tmp_path: Path, file: str, content: str | bytes, reason: str
) -> None:
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=reason) as refused:
        read_parameters(tmp_path / file)
    assert str(refused.value).startswith(str(tmp_path / file))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < len(str(tmp_path)) + 400


def test_extensions_in_capitals_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "data: ~/songs\noutput_dir: ~/run\ninit: ~/a.safetensors\nsoundfont: ~/b.sf2\n"
    for name in ("a.YAML", "b.Yml", "c.yaml"):
        (tmp_path / name).write_text(text)
        job = JobConfig.from_mapping(read_parameters(tmp_path / name))
        paths = (job.data, job.output_dir, job.init, job.soundfont)
        assert paths == tuple(str(tmp_path / end) for end in ("songs", "run", "a.safetensors", "b.sf2"))
    assert JobConfig(output_dir="a~b").output_dir == "a~b"
    assert JobConfig(output_dir="~no-such-user-here/b").output_dir == "~no-such-user-here/b"


def test_a_run_of_four_stems_scores_and_saves_each(tmp_path: Path) -> None:
    stems = ["drums", "vocals", "other", "bass"]
    arguments = ["--stems", *stems, "--dim", "16", "--depth", "1", "--songs", "2", "--val-songs", "2", *SMALL]
    assert main(["train", *arguments, "--seconds-per-song", "2", "--output-dir", str(tmp_path)]) == 0
    assert load_checkpoint(tmp_path / "last.safetensors").config.stems == tuple(stems)
    line = json.loads((tmp_path / "steps.jsonl").read_text())
    by_stem = [line[f"usdr_{stem}"] for stem in stems]
    assert line["usdr"] == pytest.approx(sum(by_stem) / 4)
    assert len(set(by_stem)) == 4
    job = JobConfig(
        stems=tuple(sorted(stems)), dim=16, depth=1, songs=2, val_songs=2, seconds_per_song=2.0, segment=0.5, batch=1,
        steps=1, validation_windows=1, output_dir=str(tmp_path),
    )  # fmt: skip
    assert job.targets == (2, 1, 3, 0)
    windows = job.windows()
    mixture, target, _ = next(iter(job.batches(windows[0])))
    assert target.shape == (1, 4, *mixture.shape[1:])
    torch.testing.assert_close(target.sum(1), mixture)
    with pytest.raises(RunError, match="stems="):
        job.start(*windows)


def test_a_published_file_is_fine_tuned_on_a_folder_and_saved_in_its_own_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes of the weights are those that the published code itself wrote into the test's file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    published = published_weights()
    torch.save(published, tmp_path / "published.ckpt")
    for i, song in enumerate(synthesise_songs(2, seed=5, seconds=1.0)):
        write(tmp_path / "data" / f"song {i}", song)
    arguments = ["--preset", "init", "--init", str(tmp_path / "published.ckpt"), "--stems", "vocals", "bass"]
    arguments += ["--data", str(tmp_path / "data"), "--loss-windows", "256", *SMALL, "--segment", "0.06"]
    assert main(["train", *arguments, "--output-dir", str(tmp_path / "run")]) == 0
    tuned = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert tuned.config.stems == ("vocals", "bass")
    save_checkpoint(tuned, tmp_path / "tuned.ckpt", layout="published")
    saved = torch.load(tmp_path / "tuned.ckpt", weights_only=True)
    assert {name: weight.shape for name, weight in saved.items()} == {
        name: weight.shape for name, weight in published.items()
    }
    apart = [float((saved[name] - published[name]).norm() / published[name].norm()) for name in published]
    assert max(apart) > 0
    assert sorted(apart)[len(apart) // 2] < 0.1  # it began with the published weights
    again = load_checkpoint(tmp_path / "tuned.ckpt")
    mixture = torch.randn(1, 2, 2000)
    with torch.inference_mode():
        assert torch.equal(again(mixture), tuned(mixture))
    more = ["--stems", "vocals", "bass", "drums", "--output-dir", str(tmp_path / "other")]
    assert main(["train", *arguments, *more]) == 2


def test_hop_and_window_of_a_checkpoint_to_fine_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They come from the file that `config` names, else from a YAML file next to the checkpoint, else are assumed."""
    tiny = ModelConfig(
        dim=16, depth=1, freqs_per_bands=(20, 45), n_fft=128, hop_length=16, win_length=64, headdim=16, d_state=8
    )
    save_checkpoint(BSMamba2(tiny), tmp_path / "m.ckpt", layout="published")
    job = {"preset": "init", "init": str(tmp_path / "m.ckpt")}
    assert JobConfig.from_mapping(job).model_config == dataclasses.replace(tiny, hop_length=32, win_length=None)
    sections = "model: {module_type: mamba2, stft_n_fft: 128, stft_hop_length: 16, stft_win_length: 64}"
    (tmp_path / "of the toolbox.yaml").write_text(sections)
    assert JobConfig.from_mapping(job).model_config == tiny
    other = tmp_path / "elsewhere" / "other.json"
    other.parent.mkdir()
    other.write_text('{"hop_length": 24, "win_length": 48}')
    arguments = ["--preset", "init", "--init", job["init"], "--config", str(other), "--loss-windows", "256", *SMALL]
    arguments += ["--songs", "2", "--val-songs", "2", "--seconds-per-song", "2"]
    assert main(["train", *arguments, "--segment", "0.06", "--output-dir", str(tmp_path / "run")]) == 0
    assert f"init: {tmp_path / 'm.ckpt'}: hop_length, win_length from {other}" in capsys.readouterr().err.splitlines()
    tuned = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert tuned.config == dataclasses.replace(tiny, hop_length=24, win_length=48)
    other.write_text('{"hop": 24}')
    assert main(["train", *arguments, "--output-dir", str(tmp_path / "new")]) == 2
    assert "other.json: 'hop' is no field of a ModelConfig" in capsys.readouterr().err


def test_the_committed_parameters_are_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (ROOT / "notebooks" / "params").glob("train_*.yaml"):
        assert JobConfig.from_mapping(read_parameters(path)).steps > 0
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bad.yaml").write_text("a: [")
    for name, part in (("list.json", "names and values"), ("bad.yaml", "no YAML"), ("none.json", "No such file")):
        assert main(["train", "--params", str(tmp_path / name)]) == 2
        assert part in capsys.readouterr().err


@pytest.mark.parametrize(("longer", "warns"), [(13.0, True), (0.5, False)])
def test_a_precision_that_the_processor_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, longer: float, warns: bool
) -> None:
    monkeypatch.setattr(
        bsmamba2.kernels.resolver, "slowdown", lambda device, dtype: longer if dtype == torch.bfloat16 else 0.0
    )
    windows = JobConfig.from_mapping(SHORT).windows()
    for precision in ("float32", "bfloat16"):
        job = JobConfig.from_mapping({**SHORT, "precision": precision, "output_dir": str(tmp_path / precision)})
        told = pytest.warns(RuntimeWarning, match="13 times as long .* take precision: float32")
        with told if warns and precision == "bfloat16" else nullcontext():
            job.start(*windows)


def test_a_run_may_begin_with_the_weights_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # its import takes seconds
    model = BSMamba2(ModelConfig.preset("small", dim=16, depth=1))
    save_checkpoint(model, tmp_path / "begin.safetensors")
    job = JobConfig(
        init=str(tmp_path / "begin.safetensors"), dim=16, depth=1, songs=2, val_songs=2, seconds_per_song=3.0, batch=1,
        steps=1, validation_windows=1, output_dir=str(tmp_path / "run"), lr=0.0, backend="plain",
    )  # fmt: skip
    windows = job.windows()
    run = job.start(*windows)
    assert all(map(torch.equal, run.trainer.model.parameters(), model.parameters()))
    list(run.steps(job.batches(windows[0])))
    with pytest.raises(RunError, match="init="):
        dataclasses.replace(job, init="").start(*windows)
    mixed = dataclasses.replace(job, coherent_mix_prob=1.0, augment_prob=0.5)
    supply = mixed.batches(windows[0])
    assert (supply.coherent_mix_prob, supply.augment_prob) == (1.0, 0.5)
    for changes, message in (
        ({"coherent_mix_prob": 0.5}, r"coherent_mix_prob=0\.0, now 0\.5"),
        ({"augment_prob": 0.5}, r"augment_prob=0\.0, now 0\.5"),
        ({"clean_share": 0.5}, r"clean_share=0\.0, now 0\.5"),
        ({"soundfont": "any.sf2", "soundfont_share": 0.5}, r"soundfont_share=1\.0, now 0\.5"),
        ({"mix_variety": 1.0}, r"mix_variety=0\.0, now 1\.0"),
        ({"optimiser": "muon"}, "optimiser='adamw', now 'muon'"),
        ({"loss": "snr"}, "loss='published', now 'snr'"),
    ):
        with pytest.raises(RunError, match=message):
            dataclasses.replace(job, **changes).start(*windows)
    assert dataclasses.replace(job, backend="auto", compile=True).start(*windows).trainer.step == 1
    with pytest.raises(ValueError, match="a different size"):
        dataclasses.replace(job, preset="compact", output_dir=str(tmp_path / "other")).start(*windows)
    with pytest.raises(ValueError, match="a different size"):
        dataclasses.replace(job, depth=3, output_dir=str(tmp_path / "other")).start(*windows)
    with pytest.raises(FileNotFoundError):
        dataclasses.replace(job, init="absent.safetensors", output_dir=str(tmp_path / "other")).start(*windows)


def test_the_defaults_are_the_published_ones_but_for_those_of_a_first_run() -> None:
    different = {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.name != "steps" and getattr(JobConfig(), field.name) != field.default
    }
    assert different == {"lr", "schedule", "ema_decay", "loss_hop"}
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(JobConfig)}
    assert all(helps[field.name] == field.metadata["help"] for field in dataclasses.fields(TrainConfig))
    assert all(helps.values())


def test_the_notebook_has_the_same_parameters_and_defaults() -> None:
    notebook = json.loads((ROOT / "notebooks" / "train.ipynb").read_text())
    (cell,) = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    found = {line.target.id: ast.literal_eval(line.value) for line in ast.parse("".join(cell["source"])).body}  # type: ignore[attr-defined]
    of_the_notebook = {"output_dir": "book/results/first_run", "validation_windows": 24}
    defaults = {name: getattr(JobConfig(), name) for name in JobConfig.names()}
    expected = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    assert found == {**expected, **of_the_notebook}
    assert list(found) == JobConfig.names()
    assert read_parameters(ROOT / "notebooks" / "params" / "train_small.yaml") == of_the_notebook
