"""Run folder: states, log and checkpoints of a training run, from which it resumes bit for bit.

    state-00000200.pt     everything that is needed to resume: weights, average, optimiser, random numbers
    state-00000100.pt     the previous state, in case the newest cannot be read
    last.safetensors      the averaged weights, for `load_checkpoint`
    best.safetensors      the averaged weights with the best validation score so far
    steps.jsonl           one line per step
    lock                  locked by the process that trains in this folder

States and checkpoints are written atomically. A run that is restarted after it was killed loads the newest state with
correct checksums, drops later lines of the log, and continues with the same batches. On a CPU, its result is
bit-identical to that of an uninterrupted run. Under `torchrun` only the first process writes. Files with other names
are left unchanged.

Book: "Scaling up".
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic_write import write_atomically
from ..checkpoints import save_checkpoint
from ..checkpoints.safe_pickle import load_pickle
from ..config import is_positive_int
from ..model import BSMamba2
from ..settings import short_repr
from ..train import Batch, Step, Trainer
from .distributed import all_gather_object, broadcast_object, rank, world_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STATES_KEPT = 2
_STATE = re.compile(r"state-(\d{8}|[1-9]\d{8,17})\.pt")


class RunError(ValueError):
    """A run that cannot start or resume; the message gives the reason and the fix."""


class RunDir:
    """Training run in a folder: a trainer with states, a log and checkpoints; resumes from the newest state.

    Args:
        folder: folder of this run only; created if missing.
        trainer: a new trainer. To resume a run, it must have that run's model and configuration, but `compile` may
            change, and so may `steps` unless the schedule is cosine.
        settings: further settings that must not change, as a mapping that JSON can store.
        validate: function that scores the averaged model, in dB for example (higher is better). If it returns a mapping
            of scores, `usdr` selects the best model.
        save_every: steps between two states.
        validate_every: steps between two validations.
        tensorboard: also write curves to `tensorboard/` in the folder.
        checkpoints: write `last.safetensors` and `best.safetensors`; these cannot store a custom `sequence_layer`.

    Attributes:
        best: the best score so far and its step, or None.
        writer: whether this process writes files.

    Raises:
        RunError: when the folder's run was started with different settings, none of its states can be read, or
            `tensorboard` is requested but not installed.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        *,
        settings: Mapping[str, Any] | None = None,
        validate: Callable[[BSMamba2], float | Mapping[str, float]] | None = None,
        save_every: int = 100,
        validate_every: int = 100,
        tensorboard: bool = False,
        checkpoints: bool = True,
    ) -> None:
        for name, value in (("save_every", save_every), ("validate_every", validate_every)):
            if not is_positive_int(value):
                raise RunError(f"{name}={value!r} must be a positive whole number of steps")
        self.folder, self.trainer, self.validate = folder, trainer, validate
        self.save_every, self.validate_every, self.checkpoints = save_every, validate_every, checkpoints
        own = {**asdict(trainer.model.config), **asdict(trainer.config)}
        self.settings = json.loads(json.dumps({**own, **(settings or {}), "processes": world_size()}))
        self.best: tuple[float, int] | None = None
        self.damaged: list[Path] = []
        self.writer = rank() == 0
        if self.writer:
            folder.mkdir(parents=True, exist_ok=True)
        self._resume()
        self.curves = _tensorboard(folder / "tensorboard", trainer.step) if tensorboard and self.writer else None

    @property
    def log(self) -> Path:
        """Path of the log. Each line is a JSON object: step, loss, grad_norm, lr, seconds; usdr after a validation."""
        return self.folder / "steps.jsonl"

    def history(self) -> list[dict[str, Any]]:
        """Lines of the log so far, including those of earlier starts, without unfinished or damaged lines."""
        lines: list[dict[str, Any]] = []
        if self.log.exists():
            for text in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, RecursionError):
                    line = json.loads(text)
                    if isinstance(line, dict) and isinstance(line.get("step"), int):
                        lines.append(line)
        return lines

    def states(self) -> list[Path]:
        """Paths of the states on disk, newest first."""
        paths = (path for path in self.folder.glob("state-*.pt") if _STATE.fullmatch(path.name))
        return sorted(paths, key=_step_of, reverse=True)

    def steps(self, batches: Iterable[Batch]) -> Iterator[Step]:
        """Train to the end with `Trainer.run`; log every step, and save and validate at the given intervals.

        Raises:
            RunError: when another process trains in the folder, or has trained there since this object was made.
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once the step is finished and a state is saved. A second
                Ctrl-C stops at once.
            FloatingPointError, OSError, RuntimeError, MemoryError: from `Trainer.run`, the file system or the device,
                with a note that names the last good state.
        """
        started = time.monotonic()
        with self._exclusive(), _graceful_interrupt() as stop, self._log_to_append() as write:
            try:
                for step in self.trainer.run(batches):
                    last = step.step == self.trainer.config.steps
                    usdr = self._validate() if last or step.step % self.validate_every == 0 else {}
                    write({**asdict(step), "seconds": round(time.monotonic() - started, 4), **usdr})
                    stopping = any(all_gather_object(stop.is_set()))
                    if last or stopping or step.step % self.save_every == 0:
                        self.save()
                    started = time.monotonic()
                    yield step
                    if stopping and not last:
                        saved = f"stopped after step {step.step}, saved in {self.folder}"
                        raise KeyboardInterrupt(f"{saved}: run the command again to resume")
            except (FloatingPointError, OSError, RuntimeError, MemoryError) as error:
                good = next(iter(self.states()), "none: the run did not get that far")
                error.add_note(f"stopped after step {self.trainer.step}; last good state: {good}")
                raise

    def save(self) -> Path:
        """Write a state and `last.safetensors`, then remove all but the newest two states.

        Raises:
            OSError: when they cannot be written, for example on a full disk; the older states are kept.
        """
        path = self.folder / f"state-{self.trainer.step:08d}.pt"
        random_numbers = all_gather_object(_random_state(self.trainer.device))
        if self.writer:
            state = {**self.trainer.state(), "settings": json.dumps(self.settings), "best": self.best}
            buffer = io.BytesIO()
            torch.save({**state, "random": random_numbers}, buffer)
            self._save_checkpoint("last")
            write_atomically(path, buffer.getbuffer())
            for damaged in self.damaged:  # otherwise they would be kept in place of good ones
                if damaged != path:
                    damaged.unlink(missing_ok=True)
            self.damaged.clear()
            for old in self.states()[STATES_KEPT:]:
                old.unlink()
        return path

    def _validate(self) -> dict[str, float]:
        """Score the averaged model; save a checkpoint when it is the best so far."""
        if self.validate is None:
            return {}
        with self.trainer.autocast():
            score = self.validate(self.trainer.ema)
        scores = dict(score) if isinstance(score, Mapping) else {"usdr": score}
        if self.best is None or scores["usdr"] > self.best[0]:
            self.best = (float(scores["usdr"]), self.trainer.step)
            if self.writer:
                self._save_checkpoint("best", **{name: f"{value:.4f}" for name, value in scores.items()})
        return scores

    def _save_checkpoint(self, name: str, **metadata: str) -> None:
        if self.checkpoints:
            path = self.folder / f"{name}.safetensors"
            save_checkpoint(self.trainer.ema, path, metadata={"step": str(self.trainer.step), **metadata})

    def _resume(self) -> None:
        """Load the newest readable state, in every process."""
        state = broadcast_object(self._latest_state() if self.writer else None)
        if state is None:
            return
        before, free = state["settings"], {"compile"}
        if self.trainer.config.schedule != "cosine":
            free.add("steps")
        changed = _differences(before, {name: value for name, value in self.settings.items() if name not in free})
        if changed:
            more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
            started = f"the run was started with {'; '.join(changed[:4])}{more}"
            raise RunError(f"{self.folder}: {started}: use the same values, or a different folder")
        self.settings = {**before, **self.settings}
        try:
            _check_optimisers(state["optimisers"], self.trainer)
            self.trainer.load_state(state)
            _set_random_state(state["random"][rank()], self.trainer.device)
        except Exception as error:  # wrong contents raise many kinds
            path = self.folder / f"state-{state['step']:08d}.pt"
            raise RunError(f"{path}: is not a state of this run ({_first_line(error)}): move it away") from error
        self.best = state["best"]

    def _latest_state(self) -> dict[str, Any] | None:
        """Read the newest readable state; None in a new folder."""
        self._check_files()
        states = self.states()
        for path in states:
            try:
                return _load(path)
            except Exception as error:  # wrong contents raise a dozen kinds
                advice = "the previous state is used; the next save removes this one"
                warnings.warn(f"{path} cannot be read ({_first_line(error)}): {advice}", stacklevel=4)
                self.damaged.append(path)
        if states:
            names = " and ".join(path.name for path in reversed(states))
            raise RunError(f"{self.folder}: no state can be read: move {names} away to start from the beginning")
        return None

    def _check_files(self) -> None:
        """Raise RunError for a file of the run that is a link, a pipe or a device, before it is read or written."""
        names = ("lock", self.log.name, "last.safetensors", "best.safetensors")
        for path in [*(self.folder / name for name in names), *self.states()]:
            if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
                raise RunError(f"{path}: is a link or not a regular file: move it away, or use a different folder")

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lock the folder, and remove files that a killed process left half written."""
        if not self.writer:
            yield
            return
        self._check_files()
        with (self.folder / "lock").open("ab") as file:  # unlocked when it is closed
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # other errors come from file systems without locks
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    advice = "stop it, or use a different folder"
                    raise RunError(f"{self.folder}: another process trains in it: {advice}") from error
            newest = max((_step_of(path) for path in self.states() if path not in self.damaged), default=0)
            if newest > self.trainer.step:
                progress = f"was resumed at step {self.trainer.step}, and another process has gone on to step {newest}"
                raise RunError(f"{self.folder}: {progress}: start again")
            for left_over in self.folder.glob(".bsmamba2-*.tmp"):
                left_over.unlink()
            yield

    @contextmanager
    def _log_to_append(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Drop log lines that are later than the loaded state, then yield a function that appends a line."""
        if not self.writer:
            yield lambda line: None
            return
        lines = [line for line in self.history() if line["step"] <= self.trainer.step]
        write_atomically(self.log, "".join(json.dumps(line) + "\n" for line in lines))
        with self.log.open("ab", buffering=0) as file:  # with a buffer, closing would fail again after a failed write

            def write(line: dict[str, Any]) -> None:
                left = (json.dumps(line) + "\n").encode()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.log)) from error
                if self.curves is not None:
                    for name, value in line.items():
                        self.curves.add_scalar(name, value, line["step"])

            yield write


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("state-"))


def _load(path: Path) -> dict[str, Any]:
    """Load a state without executing anything; wrong contents raise exceptions of any kind."""
    state = load_pickle(path)
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}")
    step, settings, best = state["step"], json.loads(state["settings"]), state["best"]
    if type(step) is not int or step != _step_of(path):
        raise ValueError(f"is a state of step {short_repr(step)}")
    if not isinstance(settings, dict) or not (best is None or (float(best[0]), int(best[1])) == best):
        raise ValueError("is not a state")
    return {**state, "settings": settings}


def _check_optimisers(states: list[dict[str, Any]], trainer: Trainer) -> None:
    """Raise ValueError for tensors of the wrong shape; replace the stored settings with the trainer's."""
    for state, optimiser in zip(states, trainer.optimisers, strict=True):
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for number, entry in state["state"].items():
            for name, value in entry.items():
                shape = () if name == "step" else parameters[number].shape
                if number < 0 or not isinstance(value, Tensor) or value.shape != shape or value.layout != torch.strided:
                    raise ValueError(f"{name} of parameter {number} has a different shape")
                entry[name] = value.contiguous()  # fused optimisers read memory in order
        state["param_groups"] = optimiser.state_dict()["param_groups"]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name=old, now new` for every setting that differs, also in nested mappings."""
    lines = []
    for name, new in now.items():
        old = before.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences({**dict.fromkeys(new), **old}, {**dict.fromkeys(old), **new})
        elif old != new:
            lines.append(f"{name:.100}={short_repr(old)}, now {short_repr(new)}")
    return lines


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _random_state(device: torch.device) -> dict[str, Tensor]:
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _graceful_interrupt() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, SIGTERM and SIGHUP set without stopping; a second Ctrl-C raises KeyboardInterrupt."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield asked
        return

    def ask(signum: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("tensorboard=True requires the tensorboard package: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
