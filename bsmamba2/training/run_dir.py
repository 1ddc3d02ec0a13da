"""Run folder: states, log and checkpoints of a training run, from which it resumes bit for bit.

    state-00000200.pt     everything that the run needs to resume: weights, average, optimiser, random numbers
    state-00000100.pt     the one before, in case that one cannot be read
    last.safetensors      the averaged weights, for `load_checkpoint`
    best.safetensors      the averaged weights with the best validation score so far
    steps.jsonl           a line for every step
    lock                  held by the process that trains here

Every file is written atomically: it is the old one or the new one. A run that is killed and started again loads its
newest state, drops the log's lines after it, and goes on with the same batches: on a CPU it ends with the same bits as
one that was not interrupted. Under `torchrun` the first process alone writes.

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

from ..atomic_write import write_atomically
from ..checkpoints import save_checkpoint
from ..config import is_positive_int
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


class RunDir:
    """Training run in a folder: a trainer with states, a log and checkpoints; resumes from the newest state at once.

    Args:
        folder: of this run and no other; made if absent.
        trainer: just made. To resume, its model and configuration must be those of the run; `compile` may change, and
            `steps` too, where the schedule is no cosine.
        settings: whatever else must not change, the data's parameters for example: names, and values for JSON.
        validate: scores the averaged model, uSDR in dB or anything else that grows when it gets better.
        save_every: steps between two states.
        validate_every: steps between two validations.
        tensorboard: write curves to `tensorboard/` in the folder as well.
        checkpoints: write `last.safetensors` and `best.safetensors`. A model with another `sequence_layer` cannot have
            them: no checkpoint says what that is.

    Attributes:
        best: the best score so far and its step, or none.
        writer: whether this process writes.

    Raises:
        RunError: when the folder's run was started with other settings, or none of its states can be read, or
            `tensorboard` is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        *,
        settings: Mapping[str, Any] | None = None,
        validate: Callable[[BSMamba2], float] | None = None,
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
        """One JSON object a line: step, loss, grad_norm, lr, seconds, and usdr where it was validated."""
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
                can be resumed. A second Ctrl-C stops at once.
            FloatingPointError, OSError, RuntimeError, MemoryError: as `Trainer.run`, the file system and a device
                short of memory raise them, with a note that names the last good state.
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
                        raise KeyboardInterrupt(f"{saved}: start it again to go on")
            except (FloatingPointError, OSError, RuntimeError, MemoryError) as error:
                good = next(iter(self.states()), "none: the run did not get that far")
                error.add_note(f"stopped after step {self.trainer.step}; last good state: {good}")
                raise

    def save(self) -> Path:
        """Write a state and `last.safetensors` now; drop all but the newest two states.

        Raises:
            OSError: when they cannot be written, a full disk for one; the older ones are still there.
        """
        path = self.folder / f"state-{self.trainer.step:08d}.pt"
        random_numbers = all_gather_object(_random_state(self.trainer.device))
        if self.writer:
            state = {**self.trainer.state(), "settings": json.dumps(self.settings), "best": self.best}
            buffer = io.BytesIO()
            torch.save({**state, "random": random_numbers}, buffer)
            self._save_checkpoint("last")
            write_atomically(path, buffer.getbuffer())
            for damaged in self.damaged:  # they would take the place of good ones
                if damaged != path:
                    damaged.unlink(missing_ok=True)
            self.damaged = []
            for old in self.states()[STATES_KEPT:]:
                old.unlink()
        return path

    def _validate(self) -> dict[str, float]:
        """Score the averaged model; save a checkpoint when it is the best so far."""
        if self.validate is None:
            return {}
        usdr = self.validate(self.trainer.ema)
        if self.best is None or usdr > self.best[0]:
            self.best = (usdr, self.trainer.step)
            if self.writer:
                self._save_checkpoint("best", usdr=f"{usdr:.4f}")
        return {"usdr": usdr}

    def _save_checkpoint(self, name: str, **metadata: str) -> None:
        if self.checkpoints:
            path = self.folder / f"{name}.safetensors"
            save_checkpoint(self.trainer.ema, path, metadata={"step": str(self.trainer.step), **metadata})

    def _resume(self) -> None:
        """Load the newest state that can be read, in every process."""
        payload = broadcast_object(self._latest_payload() if self.writer else None)
        if payload is None:
            return
        state = _load(payload)
        before, free = json.loads(state["settings"]), {"compile"}
        if self.trainer.config.schedule != "cosine":
            free.add("steps")
        changed = [
            f"{name}={before.get(name)!r}, now {value!r}"
            for name, value in self.settings.items()
            if name not in free and before.get(name) != value
        ]
        if changed:
            started = f"the run was started with {'; '.join(changed)}"
            raise RunError(f"{self.folder}: {started}: ask for the same, or another folder")
        self.settings = {**before, **self.settings}
        self.trainer.load_state(state)
        self.best = state["best"]
        _set_random_state(state["random"][rank()], self.trainer.device)

    def _latest_payload(self) -> bytes | None:
        """The bytes of the newest state that can be read; none in a new folder."""
        states = self.states()
        for path in states:
            try:
                payload = path.read_bytes()
                _load(payload)
            except Exception as error:  # of the dozen kinds that damaged bytes raise in torch.load
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"{path} cannot be read ({reason}): looking for the one before", stacklevel=4)
                self.damaged.append(path)
            else:
                return payload
        if states:
            advice = f"move {states[-1].name} away to start from the beginning"
            raise RunError(f"{self.folder}: no state can be read: {advice}")
        return None

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lock the folder, and remove files that a killed process left half written."""
        if not self.writer:
            yield
            return
        with (self.folder / "lock").open("wb") as file:  # unlocked when it is closed
            try:
                if fcntl is not None:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # others come from file systems without locks
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    advice = "stop that one, or take another folder"
                    raise RunError(f"{self.folder}: another process trains in it: {advice}") from error
            newest = max((int(path.stem[6:]) for path in self.states() if path not in self.damaged), default=0)
            if newest > self.trainer.step:
                progress = f"was resumed at step {self.trainer.step}, and another process has gone on to step {newest}"
                raise RunError(f"{self.folder}: {progress}: start again")
            for left_over in self.folder.glob(".bsmamba2-*.tmp"):
                left_over.unlink()
            yield

    @contextmanager
    def _log_to_append(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yields the function that writes a line of the log; drops lines after the state that was loaded first."""
        if not self.writer:
            yield lambda line: None
            return
        lines = [line for line in _read_log(self.log) if line["step"] <= self.trainer.step]
        write_atomically(self.log, "".join(json.dumps(line) + "\n" for line in lines))
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
                        self.curves.add_scalar(name, value, line["step"])

            yield write


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a killed process left unfinished is the end."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines


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
def _graceful_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of an exception; the second Ctrl-C is an ordinary one."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        yield asked
        return

    def ask(signum: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {signum: signal.signal(signum, ask) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RunError("tensorboard=True takes the tensorboard package: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
