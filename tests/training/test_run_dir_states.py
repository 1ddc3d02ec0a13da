"""States and other files in a run's folder that are damaged, copied, or something else: told in a line."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run_dir import begin, noise, same

from bsmamba2.training import run_dir
from bsmamba2.training.run_dir import RunError


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with the states of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    list(begin(folder).steps(noise()))
    return folder


@pytest.fixture
def states(finished: Path, tmp_path: Path) -> list[Path]:
    """The states of a copy of that run, the newest first."""
    shutil.copytree(finished, tmp_path / "run")
    return [tmp_path / "run" / f"state-{step:08d}.pt" for step in (6, 4)]


def test_a_flipped_bit_is_noticed_wherever_it_is(states: list[Path]) -> None:
    whole = run_dir._load(states[0])
    content, chance = bytearray(states[0].read_bytes()), random.Random(0)
    noticed = 0
    for _ in range(16):
        position, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        content[position] ^= bit
        states[0].write_bytes(content)
        content[position] ^= bit
        try:
            assert same(run_dir._load(states[0]), whole)  # it was between the archive's members
        except ValueError:
            noticed += 1
    assert noticed > 8
    content[content.index(b"data/7") + 300] ^= 1  # in a tensor
    states[0].write_bytes(content)
    with pytest.warns(UserWarning, match=r"state-00000006\.pt cannot be read .*the previous state") as caught:
        assert begin(states[0].parent).trainer.step == 4
    assert len(caught) == 1


class Call:
    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return bytearray, (1 << 40,)


def nested(depth: int) -> list[Any]:
    """A list of two references to a list of two references …: small in memory, 2^depth values to walk through."""
    values: list[Any] = []
    for _ in range(depth):
        values = [values, values]
    return values


ANYTHING: list[Any] = [
    None,
    1,
    1.5,
    "x",
    b"x",
    (),
    [],
    {},
    [1, 2],
    {"a": 1},
    torch.zeros(3),
    Call(),
    nested(60),
    "\ud800",
]


@pytest.mark.parametrize("number", range(len(ANYTHING)))
def test_a_state_of_something_else_is_told_in_a_line(states: list[Path], number: int) -> None:
    torch.save(ANYTHING[number], states[0])
    with pytest.warns(UserWarning, match=r"state-00000006\.pt cannot be read") as caught:
        assert begin(states[0].parent).trainer.step == 4
    assert [len(str(warning.message).splitlines()) for warning in caught] == [1]


@pytest.mark.parametrize("key", ["step", "model", "ema", "optimisers", "settings", "best", "random"])
def test_a_state_in_which_one_thing_is_another_is_told_in_a_line(states: list[Path], key: str) -> None:
    whole = torch.load(states[0], weights_only=True)
    kinds = [1, "{}", [], {"a": 1}, nested(60), "[" * 9999, [{"state": {0: {"exp_avg": torch.zeros(3)}}}], 1 << 70]
    others = [{**whole, key: value} for value in kinds] + [{name: whole[name] for name in whole if name != key}]
    for other in others:
        torch.save(other, states[0])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                assert begin(states[0].parent).trainer.step == 4
                (told,) = [str(warning.message) for warning in caught]
            except RunError as error:
                told = str(error)
        assert len(told.splitlines()) == 1
        assert len(told) < 1000
        assert "state-00000006.pt" in told or key == "settings"


def test_optimiser_states_of_other_shapes_are_refused(states: list[Path]) -> None:
    whole = torch.load(states[0], weights_only=True)
    entry = whole["optimisers"][0]["state"][0]
    for value in (torch.zeros(7), entry["exp_avg"].flatten()[:1].expand(10**6), nested(60)):
        torch.save(
            {**whole, "optimisers": [{"state": {0: {**entry, "exp_avg": value}}, "param_groups": []}]}, states[0]
        )
        with pytest.raises(RunError, match=r"state-00000006\.pt: is not a state of this run .*exp_avg of parameter 0"):
            begin(states[0].parent)


@pytest.mark.parametrize(
    "name", ["lock", "steps.jsonl", "last.safetensors", "best.safetensors", "state-00000006.pt", "state-00000008.pt"]
)
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device", "folder"])
def test_links_pipes_and_devices_are_neither_read_nor_written(states: list[Path], name: str, kind: str) -> None:
    folder = states[0].parent
    path, precious = folder / name, folder.parent / "precious"
    precious.write_bytes(b"precious")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": precious, "dangling": folder / "nothing", "device": Path("/dev/zero")}[kind])
    with pytest.raises(RunError, match=rf"{name}: is a link or not a regular file"):
        begin(folder)
    assert precious.read_bytes() == b"precious"
    assert not (folder / "nothing").exists()


def test_a_hard_link_is_replaced_and_its_other_name_stays(states: list[Path], tmp_path: Path) -> None:
    folder = states[0].parent
    begun = begin(folder, steps=8, validate=lambda model: 9.0)
    names = ["lock", "steps.jsonl", "last.safetensors", "best.safetensors", "state-00000006.pt"]
    for name in names:
        (folder / name).touch()
        os.link(folder / name, tmp_path / name)
    (folder / "lock").write_bytes(b"precious")
    kept = [(tmp_path / name).read_bytes() for name in names]
    assert [step.step for step in begun.steps(noise())] == [7, 8]
    assert [(tmp_path / name).read_bytes() for name in names] == kept


def test_copies_of_states_under_other_names_are_left_alone(states: list[Path]) -> None:
    folder = states[0].parent
    names = [
        "state-backup.pt",
        "state-00000006 (copy).pt",
        "state-6.pt",
        "state-000000000006.pt",
        "state-00000009.pt.bak",
    ]
    for name in names:
        shutil.copy(states[0], folder / name)
    run = begin(folder, steps=8)
    assert run.states() == states
    assert [step.step for step in run.steps(noise())] == [7, 8]
    assert all((folder / name).exists() for name in names)
    shutil.copy(states[0], folder / "state-00000009.pt")  # a state of another step than its name says
    with pytest.warns(UserWarning, match=r"state-00000009\.pt cannot be read \(.*state of step 6"):
        assert begin(folder, steps=8).trainer.step == 8


def test_files_that_changed_are_named(tmp_path: Path) -> None:
    files = {f"song {i}/vocals.wav": "ab12" for i in range(9)}
    list(begin(tmp_path, steps=2, settings={"files": files}).steps(noise()))
    for now, message in (
        ({**files, "song 3/vocals.wav": "cd34"}, r"with song 3/vocals\.wav='ab12', now 'cd34': use the same"),
        ({**files, "new/vocals.wav": "cd34"}, r"with new/vocals\.wav=None, now 'cd34': use the same"),
        ({"song 8/vocals.wav": "ab12"}, r"song 3/vocals\.wav='ab12', now None; and 4 more: use the same"),
    ):
        with pytest.raises(RunError, match=message):
            begin(tmp_path, steps=2, settings={"files": now})
    assert begin(tmp_path, steps=2, settings={"files": dict(reversed(files.items()))}).trainer.step == 2
