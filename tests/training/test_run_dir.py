"""A run in a folder: killed, truncated, interrupted, out of disk, it loses nothing."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import TINY
from torch import Tensor

from bsmamba2 import BSMamba2, load_checkpoint
from bsmamba2.checkpoints import read_checkpoint
from bsmamba2.train import TrainConfig, Trainer
from bsmamba2.training.run_dir import RunDir, RunError

ROOT = Path(__file__).parents[2]

PROGRAM = Path(__file__).with_name("killed_run.py")


def noise(seed: int = 0) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    g = torch.Generator().manual_seed(seed)
    for number in range(1000):
        target = torch.randn(1, 2, 2200, generator=g)
        yield target + torch.randn(1, 2, 2200, generator=g), target, [f"song-{number}"]


def begin(folder: Path, steps: int = 6, save_every: int = 2, **options: Any) -> RunDir:
    torch.manual_seed(0)
    config = TrainConfig(steps=steps, lr=1e-2, loss_windows=(256,), loss_hop=441)
    return RunDir(folder, Trainer(BSMamba2(TINY), config), save_every=save_every, validate_every=2, **options)


def weights(run: RunDir) -> list[Tensor]:
    return [p.detach().clone() for model in (run.trainer.model, run.trainer.ema) for p in model.parameters()]


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    alone, hunted = tmp_path / "alone", tmp_path / "hunted"
    command = [sys.executable, str(PROGRAM), str(alone), str(hunted), "12", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, resumed = map(int, done.stdout.split())
    assert kills >= resumed >= 5
    assert not (tmp_path / "alone-resumed.txt").exists()
    assert sorted(path.name for path in alone.iterdir()) == sorted(path.name for path in hunted.iterdir())
    for name in ("last.safetensors", "best.safetensors"):
        one, two = (read_checkpoint(folder / name) for folder in (alone, hunted))
        assert one.metadata == two.metadata
        assert same(one.state, two.state)
    states = [sorted(folder.glob("state-*.pt")) for folder in (alone, hunted)]
    for one, two in zip(*states, strict=True):
        assert same(*(torch.load(path, weights_only=True) for path in (one, two)))
    logs = [[json.loads(line) for line in (f / "steps.jsonl").read_text().splitlines()] for f in (alone, hunted)]
    for line in logs[0] + logs[1]:
        assert line.pop("seconds") > 0
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(1, 25))
    assert sum("usdr" in line for line in logs[0]) == 8


def test_two_states_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    scores = iter([1.0, 3.0, 2.0])
    run = begin(tmp_path, validate=lambda model: next(scores))
    seen = {step.step: weights(run) for step in run.steps(noise())}
    assert [path.name for path in run.states()] == ["state-00000006.pt", "state-00000004.pt"]
    assert run.best == (3.0, 4)
    kept = {name: load_checkpoint(tmp_path / f"{name}.safetensors") for name in ("best", "last")}
    half = len(seen[6]) // 2
    assert same(list(kept["last"].parameters()), seen[6][half:])
    assert same(list(kept["best"].parameters()), seen[4][half:])
    assert [line.get("usdr") for line in run.history()] == [None, 1.0, None, 3.0, None, 2.0]
    again = begin(tmp_path)
    assert again.best == (3.0, 4)
    assert list(again.steps(noise())) == []
    assert len(again.history()) == 6


def test_a_truncated_state_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole")
    list(whole.steps(noise()))
    run = begin(tmp_path / "cut")
    list(islice(run.steps(noise()), 5))
    newest = run.states()[0]
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"state-00000004\.pt cannot be read .*the previous state"):
        run = begin(tmp_path / "cut")
    assert [step.step for step in run.steps(noise())] == [3, 4, 5, 6]
    assert same(weights(run), weights(whole))
    assert [path.name for path in run.states()] == ["state-00000006.pt", "state-00000004.pt"]
    for path in run.states():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(RunError, match=r"no state can be read: move state-00000004\.pt"),
    ):
        begin(tmp_path / "cut")


def test_nothing_in_a_state_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"step": 1, "evil": Evil()}, tmp_path / "state-00000001.pt")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(RunError):
        begin(tmp_path)
    assert not (tmp_path / "executed").exists()


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_ctrl_c_finishes_the_step_saves_and_leaves(tmp_path: Path, number: int) -> None:
    handlers = [signal.getsignal(one) for one in SIGNALS]

    def interrupting() -> Iterator[Any]:
        for count, batch in enumerate(noise()):
            if count == 2:
                os.kill(os.getpid(), number)  # in the middle of step 3
            yield batch

    run = begin(tmp_path, save_every=100)
    with pytest.raises(KeyboardInterrupt, match="after step 3, saved"):
        list(run.steps(interrupting()))
    assert [signal.getsignal(one) for one in SIGNALS] == handlers
    assert [path.name for path in run.states()] == ["state-00000003.pt"]
    again = begin(tmp_path, save_every=100)
    assert [step.step for step in again.steps(noise())] == [4, 5, 6]
    whole = begin(tmp_path / "whole")
    list(whole.steps(noise()))
    assert same(weights(again), weights(whole))


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    def interrupting() -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGHUP)
        yield from noise()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert len(list(begin(tmp_path, steps=2).steps(interrupting()))) == 2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


SMALL = "--dim 16 --depth 1 --val-songs 2 --seconds-per-song 2 --segment 0.5 --batch 1 --workers 2 --device cpu"
SMALL += " --validation-windows 1 --backend plain --save-every 1"


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_too(tmp_path: Path) -> None:
    """As a terminal and torchrun send them: the processes that read ahead get it as well."""
    arguments = ["train", "--songs", "2", *SMALL.split(), "--save-every", "100", "--output-dir"]
    program = f"""\
import sys
from bsmamba2.cli.main import main
sys.exit(min(main({arguments!r} + [folder]) for folder in sys.argv[1:]))
"""
    folders = [tmp_path / signal.Signals(number).name for number in SIGNALS]
    command = [sys.executable, "-c", program, *map(str, folders)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for number, folder in zip(SIGNALS, folders, strict=True):
        log = folder / "steps.jsonl"
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 2):
            time.sleep(0.05)
        os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert said.count("run the command again to resume") == 3
    for folder in folders:
        last = json.loads((folder / "steps.jsonl").read_text().splitlines()[-1])["step"]
        assert [path.name for path in folder.glob("state-*.pt")] == [f"state-{last:08d}.pt"]


@pytest.mark.slow
def test_a_run_that_fails_ends_though_processes_read_ahead(tmp_path: Path) -> None:
    """Whoever holds on to the error holds on to them: they must end when their parent does."""
    errors = {
        "MemoryError": 'raise MemoryError("planted")',
        "torch.OutOfMemoryError": 'raise torch.OutOfMemoryError("planted")',
        "allocator": "torch.empty(1 << 55)",
        "RuntimeError": 'raise RuntimeError("planted")',
    }
    program = f"""\
import sys, torch
from bsmamba2.cli.main import main
from bsmamba2.train import Trainer

def train_step(trainer, batches):
    if trainer.step == 1:
        exec(error)
    return whole(trainer, batches)

whole, Trainer.train_step = Trainer.train_step, train_step
for name, error in {errors!r}.items():
    print("run:", name, file=sys.stderr)
    code = main({["train", "--songs", "2", *SMALL.split(), "--output-dir"]!r} + [{str(tmp_path)!r} + "/" + name])
    assert code == 1
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    runs = dict(run.split("\n", 1) for run in done.stderr.split("run: ")[1:])
    assert runs.keys() == errors.keys()
    for error, said in runs.items():
        assert ("planted" if error != "allocator" else "allocate memory") in said
        assert "last good state: " + str(tmp_path / error / "state-00000001.pt") in said
        assert ("Traceback" in said) == (error == "RuntimeError")
        assert ("a smaller batch" in said) == (error != "RuntimeError")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_run_that_another_process_has_is_refused(tmp_path: Path) -> None:
    early = begin(tmp_path)
    list(islice(begin(tmp_path, save_every=1).steps(noise()), 2))
    late = begin(tmp_path)
    fork = multiprocessing.get_context("fork")
    locked = fork.Event()
    process = fork.Process(target=hold, args=(late, locked), daemon=True)
    process.start()
    try:
        assert locked.wait(60)
        with pytest.raises(RunError, match="another process trains in it"):
            next(late.steps(noise()))
    finally:
        process.kill()
        process.join()
    with pytest.raises(RunError, match="resumed at step 0, and another process has gone on to step 2"):
        next(early.steps(noise()))
    assert [step.step for step in late.steps(noise())] == [3, 4, 5, 6]  # the lock went with the process


def hold(run: RunDir, locked: Any) -> None:
    """Lock the run's folder until this process is killed."""
    with run._exclusive():
        locked.set()
        time.sleep(60)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file that is always full here")
def test_a_disk_that_is_full_for_the_log_is_told(tmp_path: Path) -> None:
    run = begin(tmp_path)
    list(islice(run.steps(noise()), 2))
    again = begin(tmp_path)
    steps = again.steps(noise())
    opened = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return opened(Path("/dev/full") if mode == "ab" else path, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            list(steps)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "steps.jsonl")
    assert "state-00000002.pt" in caught.value.__notes__[0]


def test_a_loss_that_is_not_finite_names_step_batch_and_last_good_state(tmp_path: Path) -> None:
    def poisoned() -> Iterator[Any]:
        for number, (mixture, target, names) in enumerate(noise()):
            yield (mixture * math.nan if number == 4 else mixture), target, names

    run = begin(tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 5: loss nan.*song-4") as caught:
        list(run.steps(poisoned()))
    assert re.search(r"after step 4; last good state: .*state-00000004\.pt", caught.value.__notes__[0])


def test_a_full_disk_is_told_and_the_older_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begin(tmp_path)
    sync, calls = os.fsync, []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 3:  # the log, then last.safetensors and the state of step 2
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        list(run.steps(noise()))
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert "state-00000002.pt" in caught.value.__notes__[0]
    monkeypatch.undo()
    assert [path.name for path in run.states()] == ["state-00000002.pt"]
    assert not list(tmp_path.glob(".*"))
    assert [step.step for step in begin(tmp_path).steps(noise())] == [3, 4, 5, 6]


def test_another_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    list(begin(tmp_path, settings={"seed": 1, "songs": [1, 2]}).steps(noise()))
    with pytest.raises(RunError, match="seed=1, now 2"):
        begin(tmp_path, settings={"seed": 2, "songs": [1, 2]})
    with pytest.raises(RunError, match=r"lr=0\.01, now 0\.1"):
        RunDir(tmp_path, Trainer(BSMamba2(TINY), TrainConfig(steps=6, lr=0.1)), settings={"seed": 1, "songs": [1, 2]})
    longer = begin(tmp_path, steps=8, settings={"seed": 1, "songs": (1, 2)})  # a constant rate: more steps are the same
    assert [step.step for step in longer.steps(noise())] == [7, 8]
    with pytest.raises(RunError, match=r"mix_variety=None, now 0\.5"):
        begin(tmp_path, steps=8, settings={"seed": 1, "songs": [1, 2], "mix_variety": 0.5})
    with pytest.raises(RunError, match="save_every=0"):
        begin(tmp_path, save_every=0)


def test_what_a_killed_save_left_behind_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".bsmamba2-00.tmp").write_bytes(b"half")
    (tmp_path / "steps.jsonl").write_bytes(
        b'{"step": 1, "loss": 1.0}\n[1]\n{"step": "x"}\n\xff\n' + b"[" * 9999 + b'\n{"st'
    )
    run = begin(tmp_path, steps=1)
    list(run.steps(noise()))
    assert not list(tmp_path.glob(".*"))
    assert [line["step"] for line in run.history()] == [1]


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="pip install tensorboard"):
        begin(tmp_path, tensorboard=True)
    seen = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            seen.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, number: int) -> None:
            seen.append((name, number))

    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    with warnings.catch_warnings():
        list(begin(tmp_path, steps=2, tensorboard=True).steps(noise()))
    assert seen[0] == (str(tmp_path / "tensorboard"), 1)
    assert ("loss", 2) in seen


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_validation_computes_in_the_precision_of_the_run(tmp_path: Path, precision: str) -> None:
    """In float32, that of the published run would take a GPU nearly as long as an epoch of training."""
    found = []

    def validate(model: BSMamba2) -> float:
        found.append(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype)
        return 0.0

    config = TrainConfig(steps=1, loss_windows=(256,), loss_hop=441, precision=precision)
    list(RunDir(tmp_path, Trainer(BSMamba2(TINY), config), validate=validate).steps(noise()))
    assert found == [getattr(torch, precision)]
