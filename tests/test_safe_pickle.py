"""Safe unpickling: nothing in a file is run, foreign classes do not hinder, and other content is named."""

import collections
import datetime
import os
import pickle
import re
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_equal, lightning, published_weights
from torch import Tensor

from bsmamba2 import load_checkpoint
from bsmamba2.checkpoints import CheckpointError
from bsmamba2.published_layout import to_published


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
    with pytest.raises(CheckpointError, match=r"old .*it calls for \S*Config"):
        load_checkpoint(tmp_path / "old")


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
