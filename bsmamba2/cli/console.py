"""Console output of the commands: results, messages on standard error, progress bars and errors; signal handling."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from ..audio.decoders import reason
from ..audio.files import AudioError
from ..kernels import is_out_of_memory
from ..separate import Progress

_output_lost = 0


def log(*messages: object) -> None:
    """Print each message on its own line on standard error, unless it is closed."""
    for message in messages:
        with suppress(OSError, ValueError):
            print(escape(message), file=sys.stderr)


def print_line(*results: object) -> int:
    """Print each result on its own line and flush; when standard output cannot be written, the command continues.

    Returns:
        1 if a line was lost since `main` started, for example on a full disk; 0 otherwise, also for a closed pipe.
    """
    global _output_lost
    try:
        for result in results:
            print(escape(result))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the buffered output goes there too
        if not isinstance(error, BrokenPipeError):
            log(f"standard output: {reason(error)}")
            _output_lost = 1
    return _output_lost


def escape(message: object) -> str:
    """Escape a message into one line: a newline or another unprintable character becomes its escape sequence."""
    letters = os.fspath(message) if isinstance(message, Path) else str(message)
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in letters)


def describe_error(error: Exception, subject: Path) -> str:
    """Error message that starts with its subject; an `AudioError` already names its file."""
    if isinstance(error, AudioError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{subject}: too little memory; use a smaller --batch or --segment"
    is_empty = not str(error) or (isinstance(error, OSError) and error.errno and not error.strerror)
    return f"{subject}: {type(error).__name__ if is_empty else error}"


@contextmanager
def reraise_oom() -> Iterator[None]:
    """Re-raise out-of-memory errors as MemoryError, with their notes."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        memory_error = MemoryError(str(error))
        for note in getattr(error, "__notes__", []):
            memory_error.add_note(note)
        raise memory_error from error


@contextmanager
def signals_as_interrupts(restore: bool) -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, unless they are ignored (nohup).

    A second signal within three seconds is ignored, so that the clean-up after the first can finish.
    """
    last = -3.0

    def interrupt(signum: int, frame: object) -> None:
        nonlocal last
        if time.monotonic() - last > 3:
            last = time.monotonic()
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # Python handles signals only there
        for number in {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")}:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items() if restore else ():
            signal.signal(number, handler)


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """Progress bar on a terminal only: yields a function of the samples done now and the total."""
    with tqdm(desc=escape(label), unit="sample", unit_scale=True, disable=None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield update


def make_output(folder: Path) -> None:
    """Create the output folder if it does not exist; raises ValueError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = "is a file" if isinstance(error, FileExistsError) else reason(error)
        raise ValueError(f"{folder}: cannot be made a folder ({cause}); give another one with -o") from error
