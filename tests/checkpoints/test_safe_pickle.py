"""Safe unpickling: nothing in a file is run, foreign classes do not hinder, and other content is named."""

import argparse
import collections
import datetime
import functools
import io
import os
import pickle
import random
import re
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import assert_equal, lightning, published_weights
from torch import Tensor

from bsmamba2 import ModelConfig, load_checkpoint
from bsmamba2.checkpoints import CheckpointError, layouts
from bsmamba2.checkpoints.published_layout import to_published
from bsmamba2.checkpoints.safe_pickle import load_pickle
from bsmamba2.checkpoints.state_dict import find_weights


@pytest.fixture
def published() -> dict[str, Tensor]:
    return published_weights()


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
    assert_equal(to_published(load_checkpoint(tmp_path / "old").state_dict()), published)


HARMLESS = {
    "NumPy scalar": np.float64(9.1),
    "NumPy array": np.zeros(3),
    "NumPy type": np.dtype("f4"),
    "NumPy random state": np.random.RandomState(0).get_state(),
    "NumPy generator": np.random.default_rng(0),
    "random state": random.Random(0).getstate(),
    "torch random state": torch.get_rng_state(),
    "partial": functools.partial(max, 1),
    "path": Path("/data"),
    "time": datetime.datetime(2026, 1, 2),
    "namespace": argparse.Namespace(lr=0.1),
    "class with items": Config(dim=256),
    "containers": [
        {1, 2},
        frozenset({3}),
        collections.Counter("ab"),
        collections.deque([1]),
        (1, (2,)),
        bytearray(b"a"),
    ],
    "device and type": [torch.device("cpu"), torch.float16, torch.Size([1])],
    "expanded tensor": torch.zeros(1).expand(1000),
    "module": torch.nn.Linear(2, 2),
    "numbers": [2**70, -5, 1.5, None, True],
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_harmless_objects_are_skipped_and_tensors_are_exact(protocol, legacy, published, tmp_path):
    types = {str(dtype): torch.arange(6).to(dtype).reshape(2, 3).T for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64,
        torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )}  # fmt: skip
    types |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0), "parameter": torch.nn.Parameter(torch.ones(2))}
    types["with attributes"] = torch.nn.Parameter(torch.ones(2))
    types["with attributes"]._no_weight_decay = True  # as mamba-ssm marks its own
    content = {"types": types, "state_dict": published, "numbers": [2**70, -5, 1.5, None, True, "ä"], **HARMLESS}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": not legacy}
    torch.save(content, tmp_path / "m", **options)
    loaded = load_pickle(tmp_path / "m")
    assert loaded["numbers"] == [2**70, -5, 1.5, None, True]
    for name, tensor in types.items():
        found = loaded["types"][name]
        assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert found.tolist() == tensor.tolist()
    assert_equal(find_weights(loaded).tensors, published)


def archive(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)


def nested_through_the_memo(pair: bytes) -> bytes:
    """60 levels, each of which holds the one before twice."""
    levels = b"".join(pair.replace(b"?", bytes([i])) + b"q" + bytes([i + 1]) for i in range(60))
    return b"\x80\x02)q\x00" + levels


def of_one_element(config: ModelConfig, path: Path, **options: bool) -> None:
    state = to_published(layouts._empty_model(config).state_dict())
    torch.save({name: torch.zeros(1).expand(x.shape) for name, x in state.items()}, path, **options)


def legacy_file_of_a_huge_storage(path: Path) -> None:
    torch.save({"x": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"M\x2c\x01") == 2  # BININT2 300, of the storage and of the tensor's size
    path.write_bytes(content.replace(b"M\x2c\x01", b"\x8a\x06" + (10**13).to_bytes(6, "little")))


WIDE = ModelConfig(dim=1024, depth=1, freqs_per_bands=(500, 525))
SMALL = ModelConfig(dim=16, depth=1, freqs_per_bands=(500, 525), headdim=16)
NOTHING, SHORT = "holds no tensors", "truncated or damaged"
PICKLES = {  # of archives of less than 1 kB, but for the tuples
    "list through the memo": (nested_through_the_memo(b"](h?h?e") + b".", NOTHING),
    "tuple through the memo": (nested_through_the_memo(b"h?h?\x86") + b".", NOTHING),
    "such a tuple as a key": (b"\x80\x02}" + nested_through_the_memo(b"h?h?\x86")[2:] + b"K\x01s.", NOTHING),
    "nested tuples": (b"\x80\x02)" + b"\x85" * 100_000 + b".", NOTHING),
    "nested tuples as a key": (b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s.", NOTHING),
    "memo index": (b"\x80\x02Nr\xff\xff\xff\x7f.", "holds no tensors but a NoneType"),
    "bytes": (b"\x80\x05\x8e" + (2**40).to_bytes(8, "little") + b".", SHORT),
    "bytearray": (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", SHORT),
    "holds itself": (b"\x80\x02}q\x00(X\x05\0\0\0stateh\0X\x05\0\0\0modelh\0u.", NOTHING),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
}
BOMB = b"\x80\x02" + b"N0" * 5_000_000 + b"."
LARGER = "a tensor larger than its storage"
FILES = {
    "deflated": (lambda path: archive(path, BOMB, zipfile.ZIP_DEFLATED), "would unpack from"),
    "stride 0": (lambda path: of_one_element(WIDE, path), LARGER),
    "stride 0, legacy": (lambda path: of_one_element(SMALL, path, _use_new_zipfile_serialization=False), LARGER),
    "storage, legacy": (legacy_file_of_a_huge_storage, SHORT),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits the memory of a child process")
@pytest.mark.parametrize("kind", [*PICKLES, *FILES])
def test_small_files_take_bounded_time_and_memory(kind, tmp_path):
    import resource

    if kind in PICKLES:
        content, words = PICKLES[kind]
        archive(tmp_path / "m.pt", content)
    else:
        write, words = FILES[kind]
        write(tmp_path / "m.pt")
    child = os.fork()
    if child == 0:  # with 10 s of CPU time and, on Linux, a gigabyte more of address space
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 10, resource.RLIM_INFINITY))
        if sys.platform == "linux":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
        try:
            load_checkpoint(tmp_path / "m.pt")
        except CheckpointError as error:
            os._exit(0 if re.search(f"m.pt .*{words}", str(error)) and len(str(error)) < 400 else 3)
        finally:
            os._exit(4)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_other_archives_are_called_by_their_name(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name, words in (
        ("script.pt", "is a TorchScript archive"),
        ("arrays.npz", r"a zip archive without data\.pkl \(1 entries\)"),
        ("module.pt", r"holds no tensors but an object of torch\.nn\.modules\.linear\.Linear"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / name)


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no tensors"),
        ([1, 2], "holds no tensors but"),
        (torch.zeros(3), "holds no tensors but"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": {"model.a": 1}}, "entry 'a' is not a tensor but int"),
        ({"model": {"a": torch.zeros(1)}}, "none of 1 tensors belongs to BSMamba2: a"),
        ({3: torch.zeros(1)}, "entry 3 is not a tensor"),
        (
            {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
            "none of 2 tensors belongs to BSMamba2: conv1",
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


def test_an_entry_that_hides_its_size_takes_no_more_memory_than_it_states(tmp_path: Path) -> None:
    path = tmp_path / "long.pt"
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as whole:
        entries = {name: whole.read(name) for name in whole.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content + bytes(1 << 26) if name.endswith("data.pkl") else content)
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        entry.file_size, entry.CRC = len(entries[entry.filename]), zlib.crc32(entries[entry.filename])
    path.write_bytes(buffer.getvalue())
    tracemalloc.start()
    assert torch.equal(load_pickle(path)["a"], torch.zeros(3))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 23


def test_many_tensors_of_the_legacy_format_load_in_linear_time(tmp_path: Path) -> None:
    many = {str(number): torch.full((1,), float(number)) for number in range(4000)}
    torch.save(many, tmp_path / "many.pt", _use_new_zipfile_serialization=False)
    found = load_pickle(tmp_path / "many.pt")
    assert all(torch.equal(found[name], tensor) for name, tensor in many.items())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_conjugated_and_negated_views_keep_their_values(legacy: bool, tmp_path: Path) -> None:
    x = torch.randn(3, 4, dtype=torch.complex64)
    views = {
        "plain": x, "conj": x.conj(), "both": torch._neg_view(x.conj()), "part": x.conj()[1:, ::2],
        "parameter": torch.nn.Parameter(x.conj()), "neg": torch.randn(5, dtype=torch.complex64).conj().imag,
    }  # fmt: skip
    torch.save(views, tmp_path / "m", _use_new_zipfile_serialization=not legacy)
    loaded = load_pickle(tmp_path / "m")
    for name, view in views.items():
        assert torch.equal(loaded[name].resolve_conj().resolve_neg(), view.detach().resolve_conj().resolve_neg()), name
    assert not torch.equal(loaded["conj"], loaded["plain"])


def test_a_weight_that_is_a_negated_view_loads_with_its_values(published: dict[str, Tensor], tmp_path: Path) -> None:
    name = next(iter(published))
    negated = torch._neg_view(published[name])
    torch.save(published | {name: negated}, tmp_path / "m")
    assert_equal(to_published(load_checkpoint(tmp_path / "m").state_dict()), published | {name: -published[name]})
