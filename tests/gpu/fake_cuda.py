"""CUDA tensors without a GPU: PyTorch's fake tensors, which have a shape, a type and a device but no data.

An operation on a fake tensor computes the shape and the device of its result, and raises when its inputs are on two
devices. Forward passes need nothing else. The autograd engine and autocast also ask the CUDA driver for the current
device and stream; `cuda_stub.cpp` answers in its place, for the whole process, so these tests have a process of their
own. With a real GPU nothing is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)


class Answers(TorchDispatchMode):
    """Answers where a program asks for a number in a fake tensor: 1, or true for a condition; no two tensors are equal.

    The code asks whether numbers are finite, for the loss that it logs, and (in `torch.istft`) whether a sum of windows
    equals zero: with these answers it goes the way that it goes in a run without a fault. Copies to the CPU that come
    before such a question are operations like others, and are checked.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            return {True: 1.0, False: 1}[args[0].is_floating_point()] if args[0].dtype != torch.bool else True
        if func is torch.ops.aten.equal.default:
            if args[0].device != args[1].device:
                raise RuntimeError(f"torch.equal of tensors on {args[0].device} and {args[1].device}")
            return False
        if func is torch.ops.aten._to_copy.default:
            args[0].constant = None  # a number that a fake tensor knows would really be sent to the GPU
        return func(*args, **(kwargs or {}))


class OneMode(FakeTensorMode):
    """A mode that a copy of its tensors shares; `copy.deepcopy` of a model would copy the mode as well."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OneMode:
        return self


@functools.cache
def install_stub() -> None:
    """Build and load `cuda_stub.cpp`; skip the test where that cannot be."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if torch.version.cuda is None or compiler is None:
        pytest.skip("needs a torch built with CUDA (no GPU) and a C++ compiler")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "cuda_stub.so"
        options = ["-std=c++20", "-O0", "-shared", "-fPIC", "-w"]
        options += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", f"-I{root / 'include'}"]
        linked = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        source = Path(__file__).with_name("cuda_stub.cpp")
        subprocess.run([compiler, *options, "-o", library, source, *linked], check=True)
        ctypes.CDLL(str(library)).install()


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Every tensor made inside is fake; `device="cuda"` works, and mixing it with the CPU raises."""
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            install_stub()
            properties = types.SimpleNamespace(multi_processor_count=108)
            for name, answer in {
                "is_available": lambda: True,
                "is_bf16_supported": lambda *_: True,
                "is_current_stream_capturing": lambda: False,
                "current_device": lambda: 0,
                "synchronize": lambda *_: None,
                "get_device_capability": lambda *_: (9, 0),
                "get_device_properties": lambda *_: properties,
                "device": lambda *_: contextlib.nullcontext(),
            }.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        mode = stack.enter_context(OneMode(allow_non_fake_inputs=False))
        stack.enter_context(Answers())
        yield mode
