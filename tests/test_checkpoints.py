"""Checkpoints: names and values both ways, faults named, nothing of a file run, saves whole or not at all."""

import collections
import contextlib
import dataclasses
import datetime
import errno
import json
import os
import pickle
import random
import re
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, load_checkpoint, save_checkpoint
from bsmamba2 import checkpoints as module
from bsmamba2.checkpoints import (
    CheckpointError,
    describe_known_file,
    from_published,
    infer_config,
    read_checkpoint,
    to_published,
)

FIXTURE = Path(__file__).parent / "data" / "published_model_small.safetensors"
LAYOUTS = ("bsmamba2", "published", "lightning")
TINY = ModelConfig(
    dim=16, depth=2, freqs_per_bands=(2, 3, 4, 8), stems=("vocals", "rest"), n_fft=32, hop_length=8,
    d_state=8, headdim=16, expand=2, mask_expand=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def fixture() -> dict[str, Tensor]:
    return safetensors.torch.load_file(FIXTURE)


@pytest.fixture(scope="module")
def published(fixture) -> dict[str, Tensor]:
    """The fixture's weights under their published names."""
    return {name.removeprefix("weights."): x for name, x in fixture.items() if name.startswith("weights.")}


@pytest.fixture
def model() -> BSMamba2:
    torch.manual_seed(0)
    return BSMamba2(TINY)


def lightning(state: dict[str, Tensor], ema: object = None, **entries: object) -> dict[str, object]:
    """A checkpoint as Lightning and the EMA callback of the authors' training code write it."""
    moments = {i: {"step": torch.ones(()), "exp_avg": x, "exp_avg_sq": x} for i, x in enumerate(state.values())}
    optimiser: dict[str, object] = {"state": moments, "param_groups": [{"lr": 5e-4, "params": list(moments)}]}
    if ema is not None:
        optimiser = {"opt": optimiser, "ema": ema, "current_step": 7, "decay": 0.999, "every_n_steps": 1}
    windows = {name: torch.hann_window(8) for name in ("featurizer.window", "multi_featurizer.0.window")}
    return {
        "epoch": 1,
        "global_step": 7,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": windows | {f"model.{name}": x for name, x in state.items()},
        "optimizer_states": [optimiser],
        "lr_schedulers": [],
    } | entries


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# The published layout


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
    state = module._blank(ModelConfig()).state_dict()
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
        {"layers": 1, "state": 4, "expand": 4, "d_conv": 3, "headdim": 8, "mask_expand": 3},
        {"bands": (65, 400, 560), "n_fft": 2048, "hop_length": 441, "channels": 1},
    ],
)
def test_configuration_from_the_tensors(changes, tmp_path):
    config = dataclasses.replace(TINY, **changes)
    save_checkpoint(BSMamba2(config), tmp_path / "model.ckpt", layout="published")
    inferred = load_checkpoint(tmp_path / "model.ckpt").config
    stems = config.stems if len(config.stems) == 1 else ("stem_0", "stem_1")
    assert json.loads(inferred.to_json()) == json.loads(config.to_json()) | {"stems": list(stems)}


def test_given_configuration_wins_and_an_odd_size_needs_it(model, tmp_path):
    save_checkpoint(model, tmp_path / "a.ckpt", layout="published")
    assert load_checkpoint(tmp_path / "a.ckpt", config=TINY).config == TINY
    odd = BSMamba2(ModelConfig(dim=16, depth=1, freqs_per_bands=(20, 29), n_fft=96, hop_length=24, headdim=16))
    save_checkpoint(odd, tmp_path / "b.ckpt", layout="published")
    with pytest.raises(CheckpointError, match=r"b\.ckpt.*power of two.*config="):
        load_checkpoint(tmp_path / "b.ckpt")
    assert_equal(load_checkpoint(tmp_path / "b.ckpt", config=odd.config).state_dict(), odd.state_dict())


# Round trips


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_exact(layout, model, tmp_path):
    path = tmp_path / "model"
    save_checkpoint(model, path, layout=layout)
    state = torch.get_rng_state()
    loaded = load_checkpoint(path)
    assert torch.equal(state, torch.get_rng_state())
    assert_equal(loaded.state_dict(), model.state_dict())
    assert_equal(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert all(p.requires_grad and p.device.type == "cpu" and p.is_contiguous() for p in loaded.parameters())
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert len({p.untyped_storage().data_ptr() for p in loaded.parameters()}) == len(list(loaded.parameters()))
    assert read_checkpoint(path).layout == layout
    if layout == "bsmamba2":
        assert loaded.config == TINY


def test_configuration_and_metadata_survive(tmp_path):
    model = BSMamba2(dataclasses.replace(TINY, sample_rate=48_000, hop_length=7, stems=("voix", "声")))
    save_checkpoint(model, tmp_path / "model", metadata={"steps": "12", "trained on": "synthetic songs"})
    loaded = read_checkpoint(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.metadata == {"steps": "12", "trained on": "synthetic songs"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_types_become_float32(dtype, layout, model, tmp_path):
    save_checkpoint(model.to(dtype), tmp_path / "model", layout=layout)
    loaded = load_checkpoint(tmp_path / "model")
    assert_equal(loaded.state_dict(), {name: x.float() for name, x in model.state_dict().items()})
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_tensors_that_share_memory_are_parted(published, tmp_path):
    bias = published["layers.0.0.linear.bias"]
    torch.save(published | {"layers.0.1.linear.bias": bias, "layers.1.0.linear.bias": bias}, tmp_path / "m")
    a, b = (load_checkpoint(tmp_path / "m").layers[0].time, load_checkpoint(tmp_path / "m").layers[0].band)
    assert a.merge.bias.data_ptr() != b.merge.bias.data_ptr()
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.layers[0].time.merge.bias.data_ptr() != loaded.layers[0].band.merge.bias.data_ptr()


def test_plain_state_dict_of_ours_and_old_torch_format(model, published, tmp_path):
    torch.save(model.state_dict(), tmp_path / "ours")
    assert_equal(load_checkpoint(tmp_path / "ours", config=TINY).state_dict(), model.state_dict())
    torch.save(published, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_equal(to_published(load_checkpoint(tmp_path / "old").state_dict()), published)


def test_paper_size_loads_fast(tmp_path):
    model = module._blank(ModelConfig())
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    torch.save(to_published(model.state_dict()), tmp_path / "paper.ckpt")
    start = time.process_time()
    loaded = load_checkpoint(tmp_path / "paper.ckpt")
    assert time.process_time() - start < 10
    assert sum(p.numel() for p in loaded.parameters()) == 48_098_188


# Lightning: which weights


def test_ema_or_raw(published, tmp_path):
    ema = tuple(x + 1 for x in published.values())
    torch.save(lightning(published, ema), tmp_path / "m")
    averaged = dict(zip(published, ema, strict=True))
    for weights, used, expected in (
        ("auto", "ema", averaged),
        ("ema", "ema", averaged),
        ("raw", "raw", published),
    ):
        loaded = read_checkpoint(tmp_path / "m", weights=weights)
        assert loaded.weights == used
        assert_equal(to_published(loaded.state), expected)


def test_ema_that_is_not_there_or_does_not_fit(published, tmp_path):
    path = tmp_path / "m"
    torch.save(lightning(published), path)
    assert read_checkpoint(path).weights == "raw"
    for content in (lightning(published), published):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"holds 0 EMA weights.*raw"):
            load_checkpoint(path, weights="ema")
    torch.save(lightning(published, tuple(published.values())[1:]), path)
    with pytest.raises(CheckpointError, match=f"holds {len(published) - 1} EMA weights for {len(published)}.*raw"):
        load_checkpoint(path)
    torch.save(lightning(published, tuple(reversed(published.values()))), path)
    with pytest.raises(CheckpointError, match="EMA tensors of the wrong shape"):
        load_checkpoint(path)
    assert_equal(to_published(load_checkpoint(path, weights="raw").state_dict()), published)
    with pytest.raises(ValueError, match="weights='best' must be"):
        load_checkpoint(path, weights="best")


class Config(dict):  # a foreign class with items and a state of its own, as OmegaConf and Lightning write
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.flags = {"readonly": True}


def test_foreign_classes_do_not_hinder(published, tmp_path):
    foreign = {
        "hyper_parameters": Config(dim=256, when=datetime.timedelta(1), where=Path("/data")),
        "hparams_type": Config,
        "callbacks": {"x": collections.defaultdict(list, a=1)},
    }
    torch.save(lightning(published, **foreign), tmp_path / "m")
    allowed = set(torch.serialization.get_safe_globals())
    assert_equal(to_published(load_checkpoint(tmp_path / "m").state_dict()), published)
    assert set(torch.serialization.get_safe_globals()) == allowed
    torch.save(lightning(published, **foreign), tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"old .*it calls for \S*Config"):
        load_checkpoint(tmp_path / "old")


# Nothing in a file is executed


class Malicious:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "tensor", "whole", "nested"])
@pytest.mark.parametrize("kind", ["system", "eval", "popen", "getattr", "bare"])
def test_malicious_pickle_never_runs(kind, place, legacy, published, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.ckpt"
    code = f"open({str(marker)!r}, 'w').close()"
    evil = {
        "system": Malicious(os.system, f"touch {marker}"),
        "eval": Malicious(eval, code),
        "popen": Malicious(subprocess.check_call, ["touch", str(marker)]),
        "getattr": Malicious(getattr, Malicious(eval, code), "__class__"),
        "bare": Malicious(os.mkdir, str(marker)),
    }[kind]
    content = {
        "beside": lightning(published, hyper_parameters=evil),
        "nested": lightning(published, [*published.values(), evil]),
        "tensor": published | {"final_norm.gamma": evil},
        "whole": evil,
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    try:
        loaded = load_checkpoint(path)
        refusal = None
    except CheckpointError as error:
        refusal = str(error)
    if refusal:
        assert str(path) in refusal
        assert "weights_only=False" not in refusal  # torch proposes it
    else:  # read, with the call left inert
        assert place in ("beside", "nested")
        assert not legacy
        assert_equal(to_published(loaded.state_dict()), published)
    assert not marker.exists()
    with path.open("rb") as file:  # the file is not a dud: it does run where it is let
        torch.load(file, weights_only=False)
    assert marker.exists()


def test_bare_pickle_never_runs(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "m.ckpt"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Malicious(os.system, f"touch {marker}"), protocol))
        with pytest.raises(CheckpointError, match=r"m\.ckpt"):
            load_checkpoint(path)
        assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()


# Faults are named


def test_every_fault_of_a_single_tensor_is_named():
    config = dataclasses.replace(TINY, depth=1, freqs_per_bands=(5, 12), stems=("vocals",))  # the fewest to outvote one
    whole = to_published(BSMamba2(config).state_dict())
    check(whole)
    for name, tensor in whole.items():
        rest = {other: x for other, x in whole.items() if other != name}
        wrong = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 2))
        misshapen = f"1 tensors of the wrong shape: {name}: "
        for on_bad_file, words in (
            (rest, f"1 tensors missing: {name}."),
            (whole | {name: wrong}, f"{misshapen}{tuple(wrong.shape)}, expected {tuple(tensor.shape)}."),
            (whole | {name: tensor[None]}, f"{misshapen}(1, "),
            (rest | {f"{name}_x": tensor}, f"1 tensors missing: {name}. 1 tensors unexpected: {name}_x."),
            (whole | {f"x.{name}": tensor}, f"1 tensors unexpected: x.{name}."),
        ):
            with pytest.raises(CheckpointError) as raised:
                check(on_bad_file)
            assert words in str(raised.value)


def check(state: dict[str, Tensor]) -> None:
    """What reading a published file does after the bytes are read (the many cases above need no disk)."""
    original = module._read_tensors
    module._read_tensors = lambda path: (dict(state), [], False, {})
    try:
        load_checkpoint("m")
    finally:
        module._read_tensors = original


def test_many_faults_are_counted(published, tmp_path):
    torch.save({name: x for name, x in published.items() if "mixer.D" not in name}, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"8 tensors missing: (layers\.\S+mixer\.D; ){4}and 4 more"):
        load_checkpoint(tmp_path / "m")
    strays = (
        "layers.2.0.linear.bias",
        "layers.1000000000.0.linear.bias",
        "mask_estimators.2.to_freqs.0.0.0.bias",
    )
    for extra in strays:
        torch.save(published | {extra: torch.zeros(32)}, tmp_path / "m")
        with pytest.raises(CheckpointError, match=f"1 tensors unexpected: {extra}"):
            load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "bands.1.linear.bias has NaN or infinite"),
        (lambda x: x.index_fill(0, torch.tensor([3]), -torch.inf), "bands.1.linear.bias has NaN or infinite"),
        (lambda x: x.double().fill_(1e300), "bands.1.linear.bias has NaN or infinite"),
        (lambda x: x.long(), "not plain floating-point: .*.1(.linear)?.bias: torch.int64"),
        (lambda x: x.to(torch.complex64), "not plain floating-point: .*.1(.linear)?.bias: torch.complex64"),
    ],
)
def test_bad_values_are_named(layout, fault, words, model, tmp_path):
    path = tmp_path / "m"
    state = model.state_dict()
    state["band_split.bands.1.linear.bias"] = fault(state["band_split.bands.1.linear.bias"])
    if layout == "bsmamba2":
        metadata = {"bsmamba2.format": "1", "bsmamba2.config": TINY.to_json()}
        safetensors.torch.save_file(state, path, metadata)
    else:
        torch.save(to_published(state) if layout == "published" else lightning(to_published(state)), path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}.*{words}"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_and_empty_tensors_are_refused(published, tmp_path):
    name = "layers.0.0.linear.bias"
    for odd in (published[name].to_sparse(), torch.empty(32, device="meta")):
        torch.save(published | {name: odd}, tmp_path / "m")
        with pytest.raises(CheckpointError, match=f"{name}: torch.float32, torch.(sparse_coo|strided), (cpu|meta)"):
            load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is truncated: it ends after 0 bytes"),
        (b"P", "is no checkpoint"),
        (b"hello, these are not weights at all\n", "is no checkpoint.*begin with b'hello"),
        (b'weights {"a": 1}', "is no checkpoint"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "is no checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is no checkpoint"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no usable configuration: of 0 tensors"),
        (b"\x09\x00\x00\x00\x00\x00\x00\x00{", "is truncated or damaged"),
        (b"PK\x03\x04" + bytes(50), "is truncated"),
        (b"PK\x05\x06" + bytes(18), "is truncated or damaged"),
        (pickle.dumps({"a": 1}, 2), "is truncated or damaged"),
        (pickle.dumps({"a": 1}, 4), "is (truncated or damaged|damaged or not safe)"),
        (b"\x80\x02", "is truncated or damaged"),
    ],
)
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt"])
def test_files_that_are_no_checkpoints(name, content, words, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}.*{words}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no tensors"),
        ([1, 2], "holds no tensors but"),
        (torch.zeros(3), "holds no tensors but"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": {"model.a": 1}}, "entry 'a' is no tensor but int"),
        ({"model": {"a": torch.zeros(1)}}, "entry 'model' is no tensor but dict"),
        ({3: torch.zeros(1)}, "entry 3 is no tensor"),
        (
            {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
            "of 2 tensors none is of BSMamba2: conv1",
        ),
        ({"final_norm.gamma": torch.zeros(8)}, "no usable configuration: no tensor shows"),
        ({"layers.1000000000.0.linear.bias": torch.zeros(8)}, "no usable configuration"),
    ],
)
def test_torch_files_of_something_else(content, words, tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}.*{words}"):
        load_checkpoint(path)


def stored(**changes: object) -> str:
    return dataclasses.replace(TINY, **changes).to_json()


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"bsmamba2.format": "2"}, "has format '2', this is format 1: update"),
        ({"bsmamba2.config": "{"}, "no usable configuration"),
        ({"bsmamba2.config": "[]"}, "no usable configuration"),
        ({"bsmamba2.config": "3"}, "no usable configuration"),
        ({"bsmamba2.config": '{"depth": 3}'}, "no usable configuration: unknown configuration field 'depth'"),
        ({"bsmamba2.config": '{"dim": -3}'}, "no usable configuration: dim=-3"),
        ({"bsmamba2.config": "{}"}, "does not fit a BSMamba2 with 675"),
        ({"bsmamba2.config": stored(layers=1_000_000_000)}, "are too few"),
        ({"bsmamba2.config": stored(dim=16_000_000_000)}, "no usable configuration"),
        ({"bsmamba2.config": stored(layers=3)}, "40 tensors missing: layers.2"),
        ({"bsmamba2.config": stored(layers=1)}, "40 tensors unexpected: layers.1"),
        ({"bsmamba2.config": stored(state=9)}, "24 tensors of the wrong shape"),
    ],
)
def test_bad_metadata(metadata, words, model, tmp_path):
    path = tmp_path / "m"
    safetensors.torch.save_file(model.state_dict(), path, {"bsmamba2.config": TINY.to_json()} | metadata)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}.*{words}"):
        load_checkpoint(path)


def test_folders_missing_files_and_pipes(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing here"):
        load_checkpoint(tmp_path / "nothing here")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="or a device"):
            load_checkpoint(tmp_path / "pipe")


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    config = ModelConfig(dim=8, depth=1, freqs_per_bands=(2, 3), n_fft=8, hop_length=2, d_state=2, headdim=8, expand=1)
    for layout in LAYOUTS:
        save_checkpoint(BSMamba2(config), folder / layout, layout=layout)
    torch.save(to_published(BSMamba2(config).state_dict()), folder / "legacy", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", [*LAYOUTS, "legacy"])
def test_truncation_anywhere_is_a_checkpoint_error(layout, whole_files, tmp_path):
    whole, path = whole_files[layout], tmp_path / "m"
    path.write_bytes(whole)
    load_checkpoint(path)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(
        st.one_of(
            st.integers(0, len(whole) - 1),
            st.integers(0, 200),
            st.integers(1, 200).map(lambda n: len(whole) - n),
        )
    )
    def cut(length: int) -> None:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|no checkpoint"):
            load_checkpoint(path)

    cut()


@pytest.mark.parametrize("layout", [*LAYOUTS, "legacy"])
def test_damage_anywhere_is_a_checkpoint_error_or_none(layout, whole_files, tmp_path):
    whole, path, random_ = whole_files[layout], tmp_path / "m", random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        start = random_.randrange(min(len(whole), random_.choice((64, 4096, len(whole)))))
        damaged[start : start + random_.randint(1, 8)] = random_.randbytes(random_.randint(1, 8))
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)


# Saving: whole or not at all


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("os.fsync", OSError(errno.EIO, "input/output error")),
        ("os.fsync", OSError(errno.ENOSPC, "no space left on device")),
        ("pathlib.Path.replace", PermissionError(errno.EACCES, "denied")),
        ("pathlib.Path.replace", KeyboardInterrupt()),
    ],
)
def test_a_save_that_fails_leaves_the_old_file(layout, target, error, model, tmp_path, monkeypatch):
    path = tmp_path / "m"
    save_checkpoint(model, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(target, fail)
    with pytest.raises(type(error)) as raised:
        save_checkpoint(BSMamba2(TINY), path, layout=layout)
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert str(path) in str(raised.value)
        assert "nothing was changed" in str(raised.value)
        assert raised.value.errno == error.errno
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def full_disk(tmp_path):
    folder = tmp_path / "small disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk(layout, model, full_disk):
    path = full_disk / "m"
    save_checkpoint(model, path)
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"cannot save .*No space left") as raised:
        save_checkpoint(BSMamba2(dataclasses.replace(TINY, dim=64)), path, layout=layout)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in full_disk.iterdir()] == ["m"]


def test_saving_replaces_and_keeps_links_and_rights(model, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "m")
    save_checkpoint(BSMamba2(TINY), tmp_path / "link")
    save_checkpoint(model, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert_equal(load_checkpoint(tmp_path / "real" / "m").state_dict(), model.state_dict())
    (tmp_path / "plain").touch()
    assert (tmp_path / "real" / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(FileNotFoundError, match="no folder"):
        save_checkpoint(model, tmp_path / "no folder" / "m")


def test_what_cannot_be_saved(model, tmp_path):
    path = tmp_path / "m"
    with pytest.raises(ValueError, match="layout='onnx' must be"):
        save_checkpoint(model, path, layout="onnx")
    with pytest.raises(ValueError, match="has no place for metadata"):
        save_checkpoint(model, path, layout="published", metadata={"a": "b"})
    for metadata in ({"format": "x"}, {"bsmamba2.config": "{}"}, {"steps": 3}):
        with pytest.raises(ValueError, match="under a name of your own"):
            save_checkpoint(model, path, metadata=metadata)
    lstm = BSMamba2(TINY, sequence_layer=lambda: torch.nn.LSTM(16, 16, batch_first=True))
    with pytest.raises(CheckpointError, match=r"the model to save.*missing: layers\.0\.time\.forwards\.mixer"):
        save_checkpoint(lstm, path)
    with torch.no_grad():
        model.final_norm.gain[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"final_norm\.gain has NaN"):
        save_checkpoint(model, path)
    assert not path.exists()


def test_identify(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(b"abc")
    assert describe_known_file(path) is None
    assert sorted(size for size, _ in module.KNOWN_FILES.values()) == [192_610_602, 770_628_060]
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(module, "KNOWN_FILES", {digest: (3, "three letters")})
    assert describe_known_file(path) == "three letters; no licence is stated for the weights"
    path.write_bytes(b"abd")
    assert describe_known_file(path) is None
    monkeypatch.setattr(module.hashlib, "file_digest", None)  # another size: not even hashed
    path.write_bytes(b"abcd")
    assert describe_known_file(path) is None
