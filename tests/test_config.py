"""The configuration: checked fields, presets and the way to JSON and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bsmamba2 import ModelConfig
from bsmamba2.config import read_config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 2.5}, "dim=2.5"),
        ({"depth": True}, "depth=True"),
        ({"freqs_per_bands": (1, 2)}, "freqs_per_bands cover 3 bins"),
        ({"freqs_per_bands": "all"}, "freqs_per_bands='all'"),
        ({"stems": ()}, "stems"),
        ({"stems": ("a", "a")}, "twice"),
        ({"hop_length": 1500}, "hop_length=1500"),
        ({"headdim": 60}, "headdim=60"),
        ({"win_length": 4096}, "win_length=4096"),
        ({"win_length": 512}, "hop_length=441 at most half the window"),
        ({"win_length": "2048"}, "win_length='2048' must be a positive whole number"),
        ({"stems": ("Vocals", "vocals")}, "twice"),
        ({"stems": ("a\nb",)}, "stems=('a\\nb',) must be names of 1 to 100 printable characters"),
        ({"stems": ("../a",)}, "without / and"),
        ({"stems": ("a" * 101,)}, "1 to 100"),
        ({"hop_length": 1}, "hop_length=1 and 62 bands take 25.4 GB for each layer and second of audio"),
        ({"sample_rate": 10**9}, "use a longer hop"),
        ({"dim": 10**400}, "must be a positive whole number"),
        ({"freqs_per_bands": [[[[[1]]]]]}, "freqs_per_bands=([[...]],)"),
    ],
)
def test_a_bad_configuration_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig(**changes)


def test_configuration_round_trip_and_unknown_names() -> None:
    for preset in ("paper", "compact", "small"):
        config = ModelConfig.preset(preset)
        assert ModelConfig.from_mapping(json.loads(config.to_json())) == config
    assert ModelConfig(win_length=2048) == ModelConfig()
    short = ModelConfig(win_length=1024)
    assert ModelConfig.from_mapping(json.loads(short.to_json())) == short != ModelConfig()
    with pytest.raises(ValueError, match="'tiny' is not one of paper, compact, small"):
        ModelConfig.preset("tiny")
    with pytest.raises(ValueError, match="unknown configuration field 'layers'"):
        ModelConfig.from_mapping({"layers": 6})


TOOLBOX = """
audio: {chunk_size: 352800, hop_length: 441, num_channels: 2, sample_rate: 48000}
model:
  dim: 256
  stereo: true
  num_stems: 2
  freqs_per_bands: !!python/tuple
  - 2
  - 3
  stft_n_fft: 4096
  stft_hop_length: 512
  stft_win_length: 2048
training:
  instruments: [drums, bass]
  target_instrument: null
"""


def test_the_toolboxs_file_and_our_own_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.YAML"
    path.write_text(TOOLBOX)
    expected = {"n_fft": 4096, "hop_length": 512, "win_length": 2048, "freqs_per_bands": [2, 3], "sample_rate": 48_000}
    assert read_config(path) == expected | {"channels": 2, "stems": ["drums", "bass"]}
    path.write_text("model: {dim: 64}\ntraining: {instruments: [vocals, other], target_instrument: vocals}")
    defaults = {"n_fft": 2048, "hop_length": 512, "win_length": 2048}  # of the toolbox's class
    assert read_config(path) == defaults | {"stems": ["vocals"]}
    path.write_text("model: {num_stems: 4}\ntraining: {instruments: [vocals, other]}")  # which four is not known
    assert read_config(path) == defaults
    (tmp_path / "own.json").write_text('{"hop_length": 512, "stems": ["voice"]}')
    assert read_config(tmp_path / "own.json") == {"hop_length": 512, "stems": ["voice"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 3", "'steps' is no field of a ModelConfig"),
        ("model: 3", "the sections audio, model and training must hold names and values"),
        ("- 3", "must hold names and values"),
        ("model: !!python/object/apply:os.system [ls]", "no YAML: .*could not determine a constructor"),
        ("model: &a [1]\naudio: *a", "an alias"),
        ("model: {dim: 64, stft_n_fft: 64, module_type: transformer, heads: 8}", "module_type must be mamba2"),
        ("model: {sr: 44100, win: 20, feature_dim: 256, layer: 6}", "section model is not of BSMamba2"),
        ("audio: {sample_rate: 48000}\nkwargs: {n_sqm_modules: 8}", "section model is not of BSMamba2"),
        (f"{'x' * 900}: 3", "'x{30,40}[.]{3}x{30,40}' is no field"),
        ("[" * 100_000, "too deep|no YAML"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"c.yaml.*({words})") as raised:
        read_config(tmp_path / "c.yaml")
    assert "\n" not in str(raised.value)
