"""Self-tests: a kernel is used only if its outputs and gradients match the reference on this machine.

A successful import is not enough. Book: "Choosing a backend, and trusting it".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class BackendError(RuntimeError):
    """Error raised if a kernel cannot run here.

    Attributes:
        reason: the fault.
        fix: the change that would make the kernel usable.
    """

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason, self.fix = reason, fix

    def __str__(self) -> str:
        return f"{self.reason}. To fix this: {self.fix}"


def raise_unsupported(reasons: list[BackendError]) -> None:
    """Raise all reasons as one BackendError; do nothing if the list is empty."""
    if len(reasons) == 1:
        raise reasons[0]
    if reasons:
        raise BackendError("; ".join(error.reason for error in reasons), "; then ".join(error.fix for error in reasons))


def self_test(
    name: str,
    errors: Callable[[], dict[str, float]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    tolerance: float,
    fixes: tuple[str, str],
) -> BackendError | None:
    """Run a kernel's self-test and return the fault, or None if every error is within the tolerance.

    Args:
        name: name of the kernel.
        errors: function that runs the kernel and returns the relative error of each output and gradient by name.
        device, dtype: device and type of the test.
        tolerance: largest allowed error.
        fixes: suggested fixes for a kernel that fails, and for one that returns wrong numbers.

    Raises:
        Exception: the kernel's own error if memory runs out, because this does not mean that the kernel is faulty.
    """
    try:
        with (
            torch.inference_mode(False),
            torch.autocast(device.type, enabled=False),
        ):  # the first one also enables gradients
            found = errors()
    except BackendError as fault:
        return fault
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = f"{type(error).__name__}: {error}".strip()
        return BackendError(f"{name} fails on {device} in {dtype} ({text})", fixes[0])
    wrong = {part: error for part, error in found.items() if not error <= tolerance}
    if not wrong:
        return None
    listed = ", ".join(f"{part} by {error:.1%}" for part, error in wrong.items())
    return BackendError(f"{name} gives wrong numbers on {device} in {dtype}: off the reference {listed}", fixes[1])


def relative_errors(
    names: tuple[str, ...],
    run: Callable[[list[Tensor]], tuple[Tensor, ...]],
    reference: Callable[[list[Tensor]], tuple[Tensor, ...]],
    inputs: list[Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Error of each output and gradient on a device, relative to the reference in float64 on the CPU.

    Args:
        names: names of the outputs, then of the gradients.
        run, reference: functions from the inputs to the outputs.
        inputs: inputs of `run`, on the CPU; `reference` gets them in float64.
        device: device on which `run` computes.
    """

    def everything(function: Callable[[list[Tensor]], tuple[Tensor, ...]], parts: list[Tensor]) -> list[Tensor]:
        parts = [part.requires_grad_() for part in parts]
        outputs = function(parts)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(part.shape, generator=g).to(part.device, part.dtype) for part in outputs]
        gradients = torch.autograd.grad(list(outputs), parts, weights)
        return [part.detach().to("cpu", torch.float64) for part in (*outputs, *gradients)]

    found = everything(run, [part.to(device, copy=True) for part in inputs])
    expected = everything(reference, [part.double() for part in inputs])
    pairs = zip(names, found, expected, strict=True)
    return {name: float((mine - right).norm() / right.norm()) for name, mine, right in pairs}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory; Triton, drivers and the CPU's allocator each word it differently."""
    text = str(error).lower()
    worded = "out of memory" in text or "allocate memory" in text
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or worded


def warn_once(message: str) -> None:
    """Issue a RuntimeWarning, but each message only once per process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


_warned: set[str] = set()
