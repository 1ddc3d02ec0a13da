"""A training run in a folder: whatever happens to the process, the work is not lost.

    state-00000200.pt     everything that the run needs to go on: weights, average, optimiser, random numbers
    state-00000100.pt     the one before, in case that one cannot be read
    last.safetensors      the averaged weights, for `load_checkpoint`
    best.safetensors      the averaged weights with the best validation score so far
    steps.jsonl           a line for every step
    lock                  held by the process that trains here

Every file is written beside its place and then renamed, so that it is the old one or the new one. A run that is
killed and started again takes up its newest state, drops the log's lines after it, and goes on with the same batches:
on a CPU it ends with the same bits as one that was left alone. Under `torchrun` the first process alone writes.

Book: "Scaling up".
"""

from __future__ import annotations

import errno
import io
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import save_checkpoint, write_whole
from ..model import BSMamba2
from ..train import Batch, Step, Trainer
from .distributed import all_gather_object, broadcast_object, rank, world_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STATES_KEPT = 2


class RunError(ValueError):
    """A run that cannot begin or go on; the message says why, and what to do."""


class Run:
    """A trainer with a folder; takes up the folder's newest state at once.

    Args:
        folder: of this run and no other; made if absent.
        trainer: just made. Its model and configuration must be those that the run was started with.
        settings: whatever else must not change when the run is taken up again, the data's parameters and
            seed for example: names and values that JSON can hold.
        defaults: of settings that some runs were too old to have: what all of these did.
        validate: scores the averaged model, uSDR in dB or anything else that grows when it gets better.
        save_every: steps between two states.
        validate_every: steps between two validations.
        tensorboard: write curves to `tensorboard/` in the folder as well.
        checkpoints: write `last.safetensors` and `best.safetensors`. Without them a run is its states and its log, all
            there can be for a model with another `sequence_layer`: no checkpoint says what that is.

    Attributes:
        best: the best score so far and its step, or none.

    Raises:
        RunError: when the folder's run was started otherwise, or none of its states can be read, or
            `tensorboard` is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        *,
        settings: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        validate: Callable[[BSMamba2], float] | None = None,
        save_every: int = 100,
        validate_every: int = 100,
        tensorboard: bool = False,
        checkpoints: bool = True,
    ) -> None:
        for name, value in (("save_every", save_every), ("validate_every", validate_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RunError(f"{name}={value!r} must be a positive whole number of steps")
        self.folder, self.trainer, self.validate = folder, trainer, validate
        self.save_every, self.validate_every, self.checkpoints = save_every, validate_every, checkpoints
        self.settings = json.loads(json.dumps({**(settings or {}), "processes": world_size()}))
        self.defaults = json.loads(json.dumps(dict(defaults or {})))
        self.best: tuple[float, int] | None = None
        self.damaged: list[Path] = []
        self.writer = rank() == 0
        if self.writer:
            folder.mkdir(parents=True, exist_ok=True)
        self._take_up()
        self.curves = _tensorboard(folder / "tensorboard", trainer.number) if tensorboard and self.writer else None

    @property
    def log(self) -> Path:
        """One JSON object a line: number, loss, gradient, lr, seconds, and usdr where it was validated."""
        return self.folder / "steps.jsonl"

    def history(self) -> list[dict[str, Any]]:
        """The log's lines so far, those of earlier processes included."""
        return _read_log(self.log)

    def states(self) -> list[Path]:
        """The states on disk, the newest first."""
        return sorted(self.folder.glob("state-*.pt"), reverse=True)

    def steps(self, batches: Iterable[Batch]) -> Iterator[Step]:
        """Train to the end as `Trainer.run` does, keep the log, save and validate when it is time.

        Raises:
            RunError: when another process trains in the folder, or has trained there since this run was made.
            KeyboardInterrupt: after Ctrl-C or SIGTERM: the step is finished, a state saved, and the run
                can be taken up again. A second Ctrl-C stops at once.
            FloatingPointError, OSError, RuntimeError, MemoryError: as `Trainer.run`, the file system and a device
                short of memory raise them, with a note that names the last good state.
        """
        started = time.monotonic()
        with self._alone(), _asked_to_stop() as stop, self._log_to_append() as write:
            try:
                for step in self.trainer.run(batches):
                    last = step.number == self.trainer.config.steps
                    usdr = self._validated() if last or step.number % self.validate_every == 0 else {}
                    line = {**asdict(step), "seconds": round(time.monotonic() - started, 4), **usdr}
                    write(line)
                    leave = any(all_gather_object(stop.is_set()))
                    if last or leave or step.number % self.save_every == 0:
                        self.save()
                    started = time.monotonic()
                    yield step
                    if leave and not last:
                        told = f"stopped after step {step.number}, saved in {self.folder}: start it again to go on"
                        raise KeyboardInterrupt(told)
            except (FloatingPointError, OSError, RuntimeError, MemoryError) as error:
                good = next(iter(self.states()), "none: the run did not get that far")
                error.add_note(f"stopped after step {self.trainer.number}; last good state: {good}")
                raise

    def save(self) -> Path:
        """Write a state and `last.safetensors` now; drop all but the newest two states.

        Raises:
            OSError: when they cannot be written, a full disk for one; the older ones are still there.
        """
        path = self.folder / f"state-{self.trainer.number:08d}.pt"
        random_numbers = all_gather_object(_random_state(self.trainer.device))
        if self.writer:
            state = {**self.trainer.state(), "settings": json.dumps(self.settings), "best": self.best}
            buffer = io.BytesIO()
            torch.save({**state, "random": random_numbers}, buffer)
            self._keep(self.folder / "last.safetensors")
            write_whole(path, buffer.getbuffer())
            for one in self.damaged:  # they would take the place of good ones
                if one != path:
                    one.unlink(missing_ok=True)
            self.damaged = []
            for old in self.states()[STATES_KEPT:]:
                old.unlink()
        return path

    def _validated(self) -> dict[str, float]:
        """Score the averaged model; keep it when it is the best so far."""
        if self.validate is None:
            return {}
        usdr = self.validate(self.trainer.averaged)
        if self.best is None or usdr > self.best[0]:
            self.best = (usdr, self.trainer.number)
            if self.writer:
                self._keep(self.folder / "best.safetensors", usdr=f"{usdr:.4f}")
        return {"usdr": usdr}

    def _keep(self, path: Path, **metadata: str) -> None:
        if self.checkpoints:
            save_checkpoint(self.trainer.averaged, path, metadata={"step": str(self.trainer.number), **metadata})

    def _take_up(self) -> None:
        """Load the newest state that can be read, in every process."""
        payload = broadcast_object(self._newest() if self.writer else None)
        if payload is None:
            return
        state = _load(payload)
        there = json.loads(state["settings"])  # an older run may know fewer
        known = self.defaults | there
        told = [
            f"{name}={known[name]!r}, now {self.settings[name]!r}"
            for name in sorted(known.keys() & self.settings.keys())
            if known[name] != self.settings[name]
        ]
        if told:
            raise RunError(
                f"{self.folder}: the run was started with {'; '.join(told)}: ask for the same, or another folder"
            )
        try:
            self.trainer.load_state(state)
        except ValueError as error:
            raise RunError(f"{self.folder}: {error}") from error
        self.settings = {**there, **self.settings}
        self.best = state["best"]
        _set_random_state(state["random"][rank()], self.trainer.device)

    def _newest(self) -> bytes | None:
        """The bytes of the newest state that can be read; none in a new folder."""
        found = self.states()
        for path in found:
            try:
                payload = path.read_bytes()
                _load(payload)
            except Exception as error:  # of the dozen kinds that damaged bytes raise in torch.load
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"{path} cannot be read ({reason}): looking for the one before", stacklevel=4)
                self.damaged.append(path)
            else:
                return payload
        if found:
            raise RunError(
                f"{self.folder}: no state can be read: move {found[-1].name} away to start from the beginning"
            )
        return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes into the folder; what a killed process left half written goes."""
        if not self.writer:
            yield
            return
        with _locked(self.folder):
            newest = max((int(path.stem[6:]) for path in self.states() if path not in self.damaged), default=0)
            if newest > self.trainer.number:
                raise RunError(
                    f"{self.folder}: was taken up at step {self.trainer.number}, and another process has gone on to "
                    f"step {newest}: make the run anew"
                )
            for left_over in self.folder.glob(".bsmamba2-*.tmp"):
                left_over.unlink()
            yield

    @contextmanager
    def _log_to_append(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Gives the function that writes a line; lines after the state that was taken up are dropped first."""
        if not self.writer:
            yield lambda line: None
            return
        kept = [line for line in _read_log(self.log) if line["number"] <= self.trainer.number]
        write_whole(self.log, "".join(json.dumps(line) + "\n" for line in kept).encode())
        with self.log.open("ab", buffering=0) as file:  # with a buffer, closing it would fail once more

            def write(line: dict[str, Any]) -> None:
                left = (json.dumps(line) + "\n").encode()
                try:
                    while left:
                        left = left[file.write(left) :]
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.log)) from error
                if self.curves is not None:
                    for name, value in line.items():
                        self.curves.add_scalar(name, value, line["number"])

            yield write


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A file that one process at a time holds; where the file system has no locks, nothing.

    Raises:
        RunError: when another process holds it.
    """
    with (folder / "lock").open("wb") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                told = f"{folder}: another process trains in it: stop that one, or take another folder"
                raise RunError(told) from error
        yield


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a killed process left unfinished is the end."""
    found: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return found


def _load(payload: bytes) -> dict[str, Any]:
    """A state from its bytes; nothing in it is executed."""
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return state


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the second Ctrl-C is an ordinary one."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tensorboard(folder: Path, number: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("tensorboard=True takes the tensorboard package: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=number + 1)
