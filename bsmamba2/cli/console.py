"""Console output of the commands: messages on standard error, progress bars, errors in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..audio.files import AudioError
from ..kernels import is_out_of_memory
from ..separate import Progress


def log(*messages: object) -> None:
    """Print each message on a line of its own, on standard error."""
    for message in messages:
        print(escape(message), file=sys.stderr)


def escape(message: object) -> str:
    """Escape a message into one line: a newline or another unprintable character becomes its escape sequence."""
    letters = os.fspath(message) if isinstance(message, Path) else str(message)
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in letters)


def describe_error(error: Exception, subject: Path) -> str:
    """Error message with its subject in front, unless it names a file already."""
    if isinstance(error, AudioError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{subject}: too little memory; use a smaller --batch or --segment"
    return f"{subject}: {error}"


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
def progress_bar(label: str) -> Iterator[Progress]:
    """Progress bar on a terminal, none elsewhere: yields a function of the samples done and those of the whole."""
    with tqdm(desc=escape(label), unit="sample", unit_scale=True, disable=None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done)

        yield update


def make_output(folder: Path) -> None:
    """Make the output folder, unless it exists.

    Raises:
        ValueError: when that is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "is a file" if isinstance(error, FileExistsError) else error.strerror
        raise ValueError(f"{folder}: cannot be made a folder ({reason}); give another one with -o") from error
