"""State dicts: the weights are found under wrappers and prefixes of other training programs, and nothing else is."""

import re

import pytest
import torch
from checkpoint_files import assert_equal, lightning, published_weights
from torch import Tensor

from bsmamba2.checkpoints.safe_pickle import Skipped
from bsmamba2.checkpoints.state_dict import find_weights


@pytest.fixture
def published() -> dict[str, Tensor]:
    return published_weights()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in state.items()}


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "model._orig_mod.", "module._orig_mod.model."]
)
@pytest.mark.parametrize(
    "wrappers", [(), ("state_dict",), ("state",), ("model_state_dict",), ("model",), ("model", "state_dict")]
)
def test_wrappers_and_prefixes_are_taken_off(wrappers, prefix, published):
    content: dict = under(prefix, published)
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, "best_metric": Skipped("numpy.core.multiarray.scalar"), wrapper: content, "lr": [0.1]}
    found = find_weights(content)
    assert_equal(found.tensors, published)
    assert found.averages == []
    assert not found.only_averages
    assert found.lightning == (wrappers == ("state_dict",))


def test_a_file_of_the_toolboxs_save_weights(published):
    content = {
        "epoch": 12,
        "optimizer_name": "Adam",
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []},
        "scheduler_state_dict": None,
        "best_metric": Skipped("numpy.float64"),
        "all_metrics": {"sdr": []},
        "all_losses": {},
        "model_state_dict": under("module.", published),
    }
    assert_equal(find_weights(content).tensors, published)


def test_averages_are_told_from_the_raw_weights(published):
    ema = {name: x + 1 for name, x in reversed(published.items())}  # in another order
    for content in (
        {"model": published, "ema_model": ema},
        {"model_state_dict": under("module.", published), "ema_model": {"state_dict": ema}},
        under("online_model.", published) | under("ema_model.module.", ema) | {"initted": torch.ones(1)},
        lightning(published, [ema[name] for name in published]),
    ):
        found = find_weights(content)
        assert_equal(found.tensors, published)
        assert_equal(dict(zip(published, found.averages, strict=True)), {name: ema[name] for name in published})
        assert not found.only_averages
    for content in (
        {"ema_model": under("module.", ema), "step": 3},
        under("ema_model.", ema) | {"step": torch.ones(1)},
    ):
        found = find_weights(content)
        assert_equal(found.tensors, ema)
        assert found.only_averages
        assert len(found.averages) == len(ema)


def test_an_entry_of_the_model_that_is_not_a_tensor_is_named(published):
    for value, kind in ((3, "int"), (Skipped("a tensor larger than its storage"), "a tensor larger than its storage")):
        with pytest.raises(ValueError, match=re.escape(f"entry 'final_norm.gamma' is not a tensor but {kind}")):
            find_weights({"model": published | {"final_norm.gamma": value}})


def test_a_training_state_names_the_file_to_load(published):
    with pytest.raises(ValueError, match=r"training run: load best\.safetensors or last\.safetensors"):
        find_weights({"step": 3, "model": published, "ema": published, "settings": "{}", "random": [], "best": None})


def test_a_dict_that_holds_itself_ends():
    content: dict = {"name": torch.zeros(1)}
    content |= {"state": content, "model": {"model": content, "state": {}}}
    assert list(find_weights(content).tensors) == ["name"]
