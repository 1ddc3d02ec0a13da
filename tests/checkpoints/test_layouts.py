"""Checkpoints: round trips, which weights are read, and faults that are named."""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import random
import re
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from checkpoint_files import FIXTURE, LAYOUTS, TWO_STEMS, assert_equal, lightning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bsmamba2 import BSMamba2, ModelConfig, load_checkpoint, save_checkpoint, ssd
from bsmamba2.checkpoints import CheckpointError, layouts, read_checkpoint
from bsmamba2.checkpoints.published_layout import expected_shapes, to_published
from bsmamba2.checkpoints.state_dict import find_weights

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
        assert loaded.config == TWO_STEMS


def test_configuration_and_metadata_survive(tmp_path):
    model = BSMamba2(dataclasses.replace(TWO_STEMS, sample_rate=48_000, hop_length=7, stems=("voix", "声")))
    save_checkpoint(model, tmp_path / "model", metadata={"steps": "12", "trained on": "synthetic songs"})
    loaded = read_checkpoint(tmp_path / "model")
    assert loaded.config == model.config
    assert loaded.metadata == {"steps": "12", "trained on": "synthetic songs"}


def test_a_window_shorter_than_n_fft_is_stored_and_used(tmp_path):
    torch.manual_seed(0)
    model = BSMamba2(dataclasses.replace(TWO_STEMS, hop_length=4, win_length=16)).eval()
    save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.config.win_length == 16
    audio = torch.randn(1, 2, 200)
    with torch.no_grad():
        assert torch.equal(loaded(audio), model(audio))
        full = BSMamba2(dataclasses.replace(TWO_STEMS, hop_length=4))
        full.load_state_dict(model.state_dict())
        assert not torch.allclose(full(audio), model(audio), rtol=0.1)


def test_the_same_model_gives_the_same_bytes(model, tmp_path):
    metadata = {f"entry {i} ä\x7f": str(i) for i in range(20)}
    for name, entries in (("a", metadata), ("b", dict(reversed(metadata.items())))):
        save_checkpoint(model, tmp_path / name, metadata=entries)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safetensors.safe_open(tmp_path / "a", framework="pt") as reader:  # other programs read it
        assert metadata.items() <= reader.metadata().items()
        assert_equal({name: reader.get_tensor(name) for name in reader.keys()}, model.state_dict())  # noqa: SIM118
    assert read_checkpoint(tmp_path / "a").metadata == metadata


@pytest.mark.parametrize("layout", [*LAYOUTS, "legacy"])
def test_one_flipped_bit_is_noticed(layout, whole_files, tmp_path):
    whole, path, random_ = whole_files[layout], tmp_path / "m", random.Random(1)
    path.write_bytes(whole)
    before = read_checkpoint(path)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[random_.randrange(len(whole))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = read_checkpoint(path, config=before.config)
        except CheckpointError:
            continue
        if layout != "legacy":  # that format has no sums
            assert_equal(loaded.state, before.state)
            assert loaded.config == before.config


def test_a_file_without_a_hash_loads(model, tmp_path):
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m", {"bsmamba2.config": TWO_STEMS.to_json()})
    assert_equal(load_checkpoint(tmp_path / "m").state_dict(), model.state_dict())


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
    assert_equal(load_checkpoint(tmp_path / "ours", config=TWO_STEMS).state_dict(), model.state_dict())
    torch.save(published, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert_equal(to_published(load_checkpoint(tmp_path / "old").state_dict()), published)


def test_paper_size_loads_fast(tmp_path):
    model = layouts._empty_model(ModelConfig())
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
        notes = [note for note in loaded.notes if "EMA weights (moving averages) are loaded" in note]
        assert len(notes) == (used == "ema")
        assert all("raw ones, which the authors' own evaluation uses" in note for note in notes)
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
    torch.save({"ema_model": published}, path)
    assert read_checkpoint(path).weights == read_checkpoint(path, weights="ema").weights == "ema"
    with pytest.raises(CheckpointError, match="holds EMA weights only"):
        load_checkpoint(path, weights="raw")
    with pytest.raises(ValueError, match="weights='best' must be"):
        load_checkpoint(path, weights="best")


# Faults are named


def test_small_files_that_name_huge_indices_are_refused(tmp_path):
    for name in (
        "mask_estimators.{}.bands.0.expand.bias",
        "layers.{}.time.merge.bias",
        "band_split.bands.{}.linear.bias",
    ):
        for index in (999_999_999, 1_000_000_000, 10**50):
            safetensors.torch.save_file({name.format(index): torch.zeros(8)}, tmp_path / "m")
            with pytest.raises(CheckpointError, match="no usable configuration"):
                load_checkpoint(tmp_path / "m")


def test_every_fault_of_a_single_tensor_is_named():
    # The fewest bands that outvote one.
    config = dataclasses.replace(TWO_STEMS, depth=1, freqs_per_bands=(20, 45), stems=("vocals",))
    whole = to_published(BSMamba2(config).state_dict())
    check(whole)
    for name, tensor in whole.items():
        rest = {other: x for other, x in whole.items() if other != name}
        wrong = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 2))
        misshapen = f"1 tensors of the wrong shape: {name}: "
        for fault, words in (
            (rest, f"1 tensors missing: {name}."),
            (whole | {name: wrong}, f"{misshapen}{tuple(wrong.shape)}, expected {tuple(tensor.shape)}."),
            (whole | {name: tensor[None]}, f"{misshapen}(1, "),
            (rest | {f"{name}_x": tensor}, f"1 tensors missing: {name}. 1 tensors unexpected: {name}_x."),
            (whole | {f"x.{name}": tensor}, f"1 tensors unexpected: x.{name}."),
        ):
            with pytest.raises(CheckpointError) as raised:
                check(fault)
            assert words in str(raised.value)


def check(state: dict[str, Tensor]) -> None:
    """What reading a published file does after the bytes are read (the many cases above need no disk)."""
    original = layouts._read_file
    layouts._read_file = lambda path: (find_weights(state), {})
    try:
        load_checkpoint(FIXTURE.with_name("m"))  # a folder without YAML files
    finally:
        layouts._read_file = original


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
        metadata = {"bsmamba2.format": "2", "bsmamba2.config": TWO_STEMS.to_json()}
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
        words = rf"entry '{name}' is not a tensor but torch\._utils\._rebuild_(sparse|meta)_tensor"
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is truncated: it ends after 0 bytes"),
        (b"P", "is not a checkpoint"),
        (b"hello, these are not weights at all\n", "is not a checkpoint.*begin with b'hello"),
        (b'weights {"a": 1}', "is not a checkpoint"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "is not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is not a checkpoint"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00{}", "no usable configuration: none of 0 tensors"),
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


def stored(**changes: object) -> str:
    return json.dumps(dataclasses.asdict(TWO_STEMS) | changes)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"bsmamba2.format": "3"}, "has format '3', this is format 2: update"),
        ({"bsmamba2.format": "1"}, "has format '1', this is format 2: it is older than the first release"),
        ({"bsmamba2.config": "{"}, "no usable configuration"),
        ({"bsmamba2.config": "[]"}, "no usable configuration"),
        ({"bsmamba2.config": "3"}, "no usable configuration"),
        ({"bsmamba2.config": "[" * 100_000}, "no usable configuration"),
        ({"bsmamba2.config": stored(hop_length=1, sample_rate=10**7)}, "use a longer hop"),
        ({"bsmamba2.config": stored(stems=[str(i) for i in range(1000)])}, "are too few"),
        ({"bsmamba2.config": stored(stems=["a\nb", "c"])}, "printable"),
        ({"bsmamba2.config": stored(d_conv=10**15)}, "tensors of the wrong shape"),
        ({"bsmamba2.sha256": "0" * 64}, "is damaged: .*SHA-256 '0000"),
        ({"bsmamba2.config": '{"layers": 3}'}, "no usable configuration: unknown configuration field 'layers'"),
        ({"bsmamba2.config": '{"dim": -3}'}, "no usable configuration: dim=-3"),
        ({"bsmamba2.config": "{}"}, "does not fit a BSMamba2 with 675"),
        ({"bsmamba2.config": stored(depth=1_000_000_000)}, "are too few"),
        ({"bsmamba2.config": stored(dim=16_000_000_000)}, "no usable configuration"),
        ({"bsmamba2.config": stored(depth=3)}, "40 tensors missing: layers.2"),
        ({"bsmamba2.config": stored(depth=1)}, "40 tensors unexpected: layers.1"),
        ({"bsmamba2.config": stored(d_state=9)}, "24 tensors of the wrong shape"),
    ],
)
def test_bad_metadata(metadata, words, model, tmp_path):
    path = tmp_path / "m"
    safetensors.torch.save_file(model.state_dict(), path, {"bsmamba2.config": TWO_STEMS.to_json()} | metadata)
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
    for missing in range(1, 9):  # one byte left of a storage was repeated to fill it
        path.write_bytes(whole[:-missing])
        with pytest.raises(CheckpointError, match=r"truncated|damaged|not a checkpoint"):
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
        with pytest.raises(CheckpointError, match=r"truncated|damaged|not a checkpoint"):
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


def test_what_cannot_be_saved(model, tmp_path):
    path = tmp_path / "m"
    with pytest.raises(ValueError, match="layout='onnx' must be"):
        save_checkpoint(model, path, layout="onnx")
    with pytest.raises(ValueError, match="has no place for metadata"):
        save_checkpoint(model, path, layout="published", metadata={"a": "b"})
    for metadata in ({"format": "x"}, {"bsmamba2.config": "{}"}, {"steps": 3}):
        with pytest.raises(ValueError, match="under a name of your own"):
            save_checkpoint(model, path, metadata=metadata)
    lstm = BSMamba2(TWO_STEMS, sequence_layer=lambda: torch.nn.LSTM(16, 16, batch_first=True))
    with pytest.raises(CheckpointError, match=r"the model to save.*missing: layers\.0\.time\.forwards\.mixer"):
        save_checkpoint(lstm, path)
    with torch.no_grad():
        model.final_norm.gain[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"final_norm\.gain has NaN"):
        save_checkpoint(model, path)
    assert not path.exists()


def test_the_scan_is_an_argument(model, tmp_path):
    save_checkpoint(model, tmp_path / "m")
    assert load_checkpoint(tmp_path / "m").layers[0].time.forwards.mixer.scan is ssd.chunked
    for scan in ("matrix", ssd.matrix):
        assert load_checkpoint(tmp_path / "m", scan=scan).layers[0].time.forwards.mixer.scan is ssd.matrix


def test_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    shapes = expected_shapes(ModelConfig(), published=False)
    storage = torch.zeros(max(map(math.prod, shapes.values())))
    state = {name: storage[: math.prod(shape)].view(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "a.pt")  # 192 MB of weights in a few
    with pytest.raises(CheckpointError, match="share their memory"):
        load_checkpoint(tmp_path / "a.pt")


def test_float4_is_refused(tmp_path: Path) -> None:
    state = dict(BSMamba2(TWO_STEMS).state_dict())
    name = next(iter(state))
    state[name] = torch.zeros(state[name].shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not plain floating-point"):
        load_checkpoint(tmp_path / "a.pt")
