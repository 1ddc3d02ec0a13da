"""The published layout: names and values both ways, and the configuration from the tensors alone."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch
from checkpoint_files import FIXTURE, TWO_STEMS, assert_equal, lightning
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, load_checkpoint, save_checkpoint
from bsmamba2.bands import generate_bands
from bsmamba2.checkpoints import CheckpointError, published_layout, read_checkpoint
from bsmamba2.checkpoints.layouts import _empty_model
from bsmamba2.checkpoints.published_layout import (
    describe_known_file,
    expected_shapes,
    from_published,
    infer_config,
    to_published,
)


@pytest.fixture
def fixture() -> dict[str, Tensor]:
    return safetensors.torch.load_file(FIXTURE)


@pytest.mark.parametrize("layout", ["published", "lightning", "safetensors"])
def test_published_file_computes_what_the_published_model_does(layout, fixture, published, tmp_path):
    path = tmp_path / "misleading.safetensors"  # the content says what it is, not the name
    if layout == "safetensors":
        path = tmp_path / "misleading.ckpt"
        safetensors.torch.save_file(published, path)
    else:
        torch.save(published if layout == "published" else lightning(published), path)
    loaded = read_checkpoint(path)
    assert loaded.layout == ("published" if layout == "safetensors" else layout)
    assert loaded.weights == "raw"
    assert loaded.config == ModelConfig(
        dim=32, depth=2, freqs_per_bands=(2, 2, 4, 12, 13), stems=("stem_0", "stem_1"), n_fft=64, hop_length=16
    )
    model = load_checkpoint(path)
    assert not model.training
    with torch.no_grad():
        output = model.apply_to_spectrogram(torch.view_as_complex(fixture["input.spectrogram"]))
    reference = fixture["output.spectrogram"]  # (b, stem, c, f, t, 2)
    difference = (torch.view_as_real(output) - reference).abs().amax((0, 1, 2, 3, 5))  # (t,)
    scale = reference.abs().amax((0, 1, 2, 3, 5))
    assert (scale == 0).nonzero().flatten().tolist() == [20, 21, 22, 23]
    assert (difference[scale == 0] == 0).all()
    assert (difference <= 1e-5 * scale).all()


def test_names_both_ways_on_the_fixture(published):
    ours = from_published(published)
    config = infer_config({name: tuple(x.shape) for name, x in ours.items()})
    assert {name: x.shape for name, x in ours.items()} == {
        name: x.shape for name, x in BSMamba2(config).state_dict().items()
    }
    assert_equal(to_published(ours), published)
    assert list(to_published(ours)) == list(published)
    transposed = published["layers.1.0.linear.weight"][:, :, 0].T
    assert torch.equal(ours["layers.1.time.merge.weight"], transposed)
    assert torch.equal(
        ours["layers.0.band.backwards.norm.weight"], published["layers.0.1.backward_blocks.0.norm.weight"]
    )
    assert to_published({"other": transposed}) == {"other": transposed} == from_published({"other": transposed})


def test_names_of_the_paper_preset():
    state = _empty_model(ModelConfig()).state_dict()
    names = to_published(state)
    assert len(names) == 675
    assert sum(x.numel() for x in names.values()) == 48_098_188
    block = [f"layers.{i}.{j}.{way}_blocks.0." for i in range(6) for j in (0, 1) for way in ("forward", "backward")]
    parts = ["norm.weight"] + [
        f"mixer.{part}"
        for part in (
            "dt_bias",
            "A_log",
            "D",
            "in_proj.weight",
            "conv1d.weight",
            "conv1d.bias",
            "norm.weight",
            "out_proj.weight",
        )
    ]
    assert names.keys() == (
        {f"band_split.to_features.{k}.{end}" for k in range(62) for end in ("0.gamma", "1.weight", "1.bias")}
        | {head + part for head in block for part in parts}
        | {f"layers.{i}.{j}.linear.{part}" for i in range(6) for j in (0, 1) for part in ("weight", "bias")}
        | {"final_norm.gamma"}
        | {
            f"mask_estimators.0.to_freqs.{k}.0.{n}.{part}"
            for k in range(62) for n in (0, 2) for part in ("weight", "bias")
        }
    )  # fmt: skip
    assert names["layers.5.1.linear.weight"].shape == (512, 256, 1)
    assert from_published(names).keys() == state.keys()
    assert infer_config({name: tuple(x.shape) for name, x in state.items()}) == ModelConfig()


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": 1},
        {"stems": ("vocals",)},
        {"depth": 1, "d_state": 4, "expand": 4, "d_conv": 3, "headdim": 8, "mask_expand": 3},
        {"freqs_per_bands": (65, 400, 560), "n_fft": 2048, "hop_length": 441, "channels": 1},
    ],
)
def test_configuration_from_the_tensors(changes, tmp_path):
    config = dataclasses.replace(TWO_STEMS, **changes)
    save_checkpoint(BSMamba2(config), tmp_path / "model.ckpt", layout="published")
    inferred = load_checkpoint(tmp_path / "model.ckpt").config
    stems = config.stems if len(config.stems) == 1 else ("stem_0", "stem_1")
    assert json.loads(inferred.to_json()) == json.loads(config.to_json()) | {"stems": list(stems)}


FOUR = ("drums", "bass", "other", "vocals")


@pytest.mark.parametrize(
    "config",
    [
        TWO_STEMS,
        ModelConfig(),
        ModelConfig.preset("small", stems=FOUR, channels=1, d_conv=3, mask_expand=2),
        ModelConfig.preset("compact", win_length=1024),
    ],
)
def test_expected_shapes_are_those_of_the_model(config):
    state = _empty_model(config).state_dict()
    assert expected_shapes(config) == {name: tuple(x.shape) for name, x in state.items()}
    published = {name: tuple(x.shape) for name, x in to_published(state).items()}
    assert expected_shapes(config, published=True) == published


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(dim=16, depth=1, headdim=16, freqs_per_bands=generate_bands(57), stems=FOUR),
        ModelConfig(dim=16, depth=1, headdim=16, freqs_per_bands=generate_bands(57)),
        ModelConfig(dim=16, depth=1, headdim=16, freqs_per_bands=generate_bands(60, 2049), n_fft=4096),
    ],
)
def test_the_other_published_sizes_load(config, tmp_path):
    save_checkpoint(BSMamba2(config), tmp_path / "m.ckpt", layout="published")
    loaded = read_checkpoint(tmp_path / "m.ckpt")
    names = ("vocals",) if len(config.stems) == 1 else ("stem_0", "stem_1", "stem_2", "stem_3")
    assert loaded.config == dataclasses.replace(config, stems=names)
    (note,) = loaded.notes
    assert f"hop_length=441, win_length={config.n_fft}, sample_rate=44100, stems={','.join(names)} assumed" in note


def relative(published: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The names that a relative of the model has, as its code gives them."""
    ends = [name for name in published if not name.startswith("layers.")]
    frame = {name: published[name] for name in ends}
    attention = {f"layers.0.{j}.layers.0.0.to_qkv.weight": torch.zeros(3, 3) for j in (0, 1)}
    block = "layers.0.0.forward_blocks.0."
    return {
        "bs-roformer": frame | attention,
        "mel-band roformer": frame | attention | {"band_split.to_features.9.0.gamma": torch.ones(12)},
        "hybrid": published | attention,
        "mamba-1": published | {f"{block}mixer.x_proj.weight": torch.zeros(3, 3)},
        "gmlp": published | {f"{block}norm2.weight": torch.ones(3), f"{block}mlp.fc1.weight": torch.zeros(3, 3)},
        "deeper": published | {"layers.0.0.forward_blocks.1.norm.weight": torch.ones(3)},
        "lstm": {"separator.0.band_rnn.rnn.weight_ih_l0": torch.zeros(3, 3)},
        "one mask layer": {name: x for name, x in published.items() if ".0.2." not in name},
        "three mask layers": published | {"mask_estimators.0.to_freqs.0.0.4.weight": torch.zeros(3, 3)},
        "lora": {"layers.0.0.lora_A": torch.zeros(3, 3)},
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bs-roformer", r"is a BS-RoFormer \(attention\), which bsmamba2 does not have"),
        ("mel-band roformer", "is a Mel-Band RoFormer"),
        ("hybrid", "is a hybrid of Mamba-2 and attention"),
        ("mamba-1", "is a Mamba-1 variant"),
        ("gmlp", "is the gMLP variant"),
        ("deeper", "is a variant with several Mamba blocks"),
        ("lstm", "is a recurrent model"),
        ("one mask layer", "is a model whose masks have one linear layer"),
        ("three mask layers", "is a model whose masks have three or more linear layers"),
        ("lora", "is a LoRA adapter"),
    ],
)
def test_a_relative_of_the_model_is_called_by_its_name(kind, words, published, tmp_path):
    torch.save({"model_state_dict": relative(published, kind)}, tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match=f"m\\.ckpt {words}"):
        load_checkpoint(tmp_path / "m.ckpt")


def test_the_toolboxs_yaml_next_to_the_file_gives_hop_window_and_stems(model, tmp_path):
    odd = dataclasses.replace(TWO_STEMS, hop_length=4, win_length=16, sample_rate=48_000, stems=("drums", "bass"))
    torch.save({"model_state_dict": to_published(BSMamba2(odd).state_dict())}, tmp_path / "m.ckpt")
    text = (
        "audio: {sample_rate: 48000}\nmodel: {stft_n_fft: 128, stft_hop_length: 4, stft_win_length: 16, num_stems: 2}\n"
    )
    (tmp_path / "of_another_model.yaml").write_text("model: {stft_n_fft: 4096}")
    (tmp_path / "unrelated.yml").write_text("steps: 3")
    (tmp_path / "a.yaml").write_text("audio: {sample_rate: 48000}\nmodel: {sr: 44100, win: 20, feature_dim: 256}")
    (tmp_path / "b.yaml").write_text("model: {dim: 16, stft_n_fft: 128, stft_hop_length: 2, num_bands: 60}")
    assert read_checkpoint(tmp_path / "m.ckpt").config.hop_length == 32
    (tmp_path / "Config.YML").write_text(text + "training: {instruments: [drums, bass]}")
    loaded = read_checkpoint(tmp_path / "m.ckpt")
    assert loaded.config == odd
    (note,) = loaded.notes
    assert note.endswith(f"n_fft, hop_length, win_length, sample_rate, stems from {tmp_path / 'Config.YML'}")
    (tmp_path / "z.yaml").write_text(text.replace("stft_hop_length: 4", "stft_hop_length: 8"))  # which is not known
    (note,) = read_checkpoint(tmp_path / "m.ckpt").notes
    assert "hop_length=32, win_length=128, sample_rate=44100, stems=stem_0,stem_1 assumed" in note
    (tmp_path / "m.yaml").write_text("hop_length: 5")  # its own name: this one alone counts
    loaded = read_checkpoint(tmp_path / "m.ckpt")
    assert loaded.config.hop_length == 5
    assert "win_length=128" in loaded.notes[1]
    assert read_checkpoint(tmp_path / "m.ckpt", config=tmp_path / "Config.YML").config == odd
    with pytest.raises(CheckpointError, match=r"m\.ckpt: no usable configuration: .*do not fit n_fft=4096"):
        read_checkpoint(tmp_path / "m.ckpt", config=tmp_path / "of_another_model.yaml")


def test_given_configuration_wins_and_an_odd_size_needs_it(model, tmp_path):
    save_checkpoint(model, tmp_path / "a.ckpt", layout="published")
    assert load_checkpoint(tmp_path / "a.ckpt", config=TWO_STEMS).config == TWO_STEMS
    odd = BSMamba2(ModelConfig(dim=16, depth=1, freqs_per_bands=(20, 29), n_fft=96, hop_length=24, headdim=16))
    save_checkpoint(odd, tmp_path / "b.ckpt", layout="published")
    with pytest.raises(CheckpointError, match=r"b\.ckpt.*power of two.*config="):
        load_checkpoint(tmp_path / "b.ckpt")
    assert_equal(load_checkpoint(tmp_path / "b.ckpt", config=odd.config).state_dict(), odd.state_dict())


def test_a_known_file_is_described(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(b"abc")
    assert describe_known_file(path) is None
    assert sorted(size for size, _ in published_layout.KNOWN_FILES.values()) == [192_610_602, 770_628_060]
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(published_layout, "KNOWN_FILES", {digest: (3, "three letters")})
    assert describe_known_file(path) == "three letters; no licence is stated for the weights"
    path.write_bytes(b"abd")
    assert describe_known_file(path) is None
    monkeypatch.setattr(published_layout.hashlib, "file_digest", None)  # another size: not even hashed
    path.write_bytes(b"abcd")
    assert describe_known_file(path) is None
