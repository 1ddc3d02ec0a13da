"""Trial runs: a kernel is used where it was seen to give the right numbers, and nowhere because an import succeeded.

Book: "The fused kernel".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch


class BackendError(RuntimeError):
    """A kernel that cannot run here.

    Attributes:
        why: what is wrong.
        mend: what would make it usable.
    """

    def __init__(self, why: str, mend: str) -> None:
        super().__init__(why, mend)
        self.why, self.mend = why, mend

    def __str__(self) -> str:
        return f"{self.why}. To mend this: {self.mend}"


@dataclass(frozen=True)
class Backend:
    """One line of `backends`.

    Attributes:
        name: of the scan, or `conv` for the convolution.
        usable: on the device that was asked about.
        version: package and version, or a dash.
        why: it is usable, or not.
        mend: what would make it usable; empty when it is.
    """

    name: str
    usable: bool
    version: str
    why: str
    mend: str = ""


def refuse(obstacles: list[BackendError]) -> None:
    """Raise what stands in the way, all of it at once; nothing when the list is empty."""
    if len(obstacles) == 1:
        raise obstacles[0]
    if obstacles:
        raise BackendError("; ".join(each.why for each in obstacles), "; then ".join(each.mend for each in obstacles))


def trial(
    name: str,
    errors: Callable[[], dict[str, float]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tolerance: float,
    mends: tuple[str, str],
) -> BackendError | None:
    """The fault that a trial run shows; none when it runs and every error is within the tolerance.

    Args:
        name: of the kernel.
        errors: runs it; what came out → relative error.
        device, dtype: that it runs on, and in.
        tolerance: largest error.
        mends: of a kernel that fails, and of one that gives wrong numbers.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
        ):  # the first enables gradients, too
            found = errors()
    except BackendError as fault:
        return fault
    except Exception as error:
        if out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}".strip()
        return BackendError(f"{name} fails on {device} in {dtype} ({said})", mends[0])
    wrong = {part: error for part, error in found.items() if not error <= tolerance}
    if not wrong:
        return None
    listed = ", ".join(f"{part} by {error:.1%}" for part, error in wrong.items())
    return BackendError(
        f"{name} gives wrong numbers on {device} in {dtype}: off the reference {listed}",
        mends[1],
    )


def out_of_memory(error: Exception) -> bool:
    """Whether there was too little memory; Triton, drivers and the CPU's allocator say so in words of their own."""
    told = str(error).lower()
    by_words = "out of memory" in told or "allocate memory" in told
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or by_words


def warn_once(message: str) -> None:
    """A RuntimeWarning, the first time in this process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


_said: set[str] = set()
