"""Chains of elementwise operations: run one after the other as they are written, or compiled into one loop.

On a CPU a matrix product is quick, and what stands between two of them is not: every operation reads its operands from
memory and writes its result back. `torch.compile` makes one pass of a whole chain. What is compiled are small functions
marked with `@loop`, never the model: nothing else has to be understood by a compiler, and the code that runs without
one is the same.

    with loops.compiled():
        stems = model(mixture)

Within it a mixer asks for its own kernel first, `bsmamba2.kernels.cpu`; the loops are for what that kernel does not take,
and for machines where it cannot be built.

Book: "The fused kernel".
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

from .self_test import out_of_memory

P = ParamSpec("P")
R = TypeVar("R")

_wanted = False
_fault: str | None = None
"""Why compiling failed in this process; it is not tried again."""


@contextmanager
def compiled(wanted: bool = True) -> Iterator[None]:
    """A context in which loops without gradients on a CPU are compiled, each when it is first called.

    That takes a C++ compiler, and about half a minute once (the results are kept on disk by torch). Where it fails, one
    RuntimeWarning says why, and the loops run as they are written. Too little memory is no such failure, and is raised.
    """
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def asked() -> bool:
    """Whether this is within `compiled`."""
    return _wanted


def wanted() -> bool:
    """Whether loops should be compiled here and now: within `compiled`, and without gradients."""
    return _wanted and not torch.is_grad_enabled()


def loop(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a function of tensors, elementwise but for the shapes, that `compiled` may compile."""

    @functools.cache
    def quick() -> Any:  # not before it is wanted: the compiler takes seconds to import, and imports Triton
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not wanted() or _fault is not None or not _on_cpu(args):
            return function(*args, **kwargs)
        try:
            return quick()(*args, **kwargs)
        except Exception as error:  # a compiler has many ways to fail
            if out_of_memory(error):
                raise
            _give_up(error)
            return function(*args, **kwargs)

    return run


def _on_cpu(args: tuple[object, ...]) -> bool:
    return all(one.device.type == "cpu" for one in args if isinstance(one, torch.Tensor))


def _give_up(error: Exception) -> None:
    global _fault
    _fault = f"{type(error).__name__}: {error}".splitlines()[0]
    warnings.warn(
        f"torch.compile failed, loops run as they are written ({_fault}). It needs a C++ compiler: apt install g++, "
        "xcode-select --install, or Visual Studio Build Tools",
        RuntimeWarning,
        stacklevel=3,
    )
