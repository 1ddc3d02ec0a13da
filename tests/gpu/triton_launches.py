"""Find the Triton kernels that a model launches on a GPU, and compile them for GPUs that are not here.

    python tests/gpu/triton_launches.py --write book/data/gpu_kernels.json --minutes 60

A model with the backend `triton` runs forward and backward on fake CUDA tensors (`fake_cuda.py`). Triton's own launch
code gets as far as compiling: a hook takes the kernel, its signature, constants and options there, for every
configuration that the autotuner would try. Each is then compiled for an architecture by Triton and by the ptxas that
comes with it, and cuobjdump reports registers, stack and shared memory. Nothing is run. Compilations that
the written file has already are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton as compiler
from fake_cuda import CUDA, fake_cuda
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from bsmamba2 import BSMamba2, ModelConfig
from bsmamba2.atomic_write import write_atomically
from bsmamba2.kernels import accelerate
from bsmamba2.kernels import triton as adapter

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Compute capability → most shared memory that a block may have, in KiB (CUDA C++ Programming Guide, table
"Technical Specifications per Compute Capability")."""
REGISTERS_PER_BLOCK, REGISTERS_PER_THREAD = 65_536, 255
TENSOR_MEMORY = 512  # columns, on the GPUs that have it
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as Triton would compile it.

    Attributes:
        kernel: its name.
        config: block sizes, warps and stages, as the autotuner names them.
        source, options: for `triton.compile`.
        size: product of the block sizes and stages: the smallest takes the least shared memory, most likely.
        chunks: of the launches that would share this binary, in frames: 256 along time, 64 along bands.
    """

    kernel: str
    config: str
    source: ASTSource
    options: dict[str, Any]
    size: int
    chunks: set[int] = dataclasses.field(default_factory=set)

    @property
    def key(self) -> str:
        """A hash of everything that the compiler sees, the same on every machine."""
        constants = sorted((str(path), str(value)) for path, value in self.source.constants.items())
        attributes = sorted((str(path), str(value)) for path, value in self.source.attrs.items())
        seen = (self.source.fn.cache_key, self.source.signature, constants, attributes, self.options)
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:20]


class NoDriver:
    """Triton's driver without a GPU: an answer for a launch, and a benchmark that runs each configuration once."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        return lambda call, quantiles: [call() or 1.0] * 3


@contextmanager
def recorded_launches() -> Iterator[dict[str, Launch]]:
    """Key → launch, of all launches in the `with` block; raises for a kernel that is given a tensor of the CPU."""
    found: dict[str, Launch] = {}
    run, chunk = JITFunction.run, 0

    def launch(self: JITFunction, *args: Any, **options: Any) -> Any:
        """`JITFunction.run` with each fake tensor's type and alignment; it asks for the address, which fakes lack."""
        for value in args:
            if isinstance(value, Tensor) and value.device != CUDA:
                raise AssertionError(f"{self.__name__} is given a tensor on {value.device}")
        nonlocal chunk
        chunk = dict(zip(self.arg_names, args, strict=False))["chunk_size"] or chunk  # 0: the kernel does not use it
        return run(self, *(mock_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args), **options)

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        source = ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        named = {function.arg_names[path[0]]: value for path, value in source.constants.items()}
        blocks = {name: value for name, value in named.items() if name.startswith("BLOCK_SIZE") and value is not None}
        config = ", ".join(f"{name.removeprefix('BLOCK_SIZE_')} {value}" for name, value in blocks.items())
        config += f"; {options['num_warps']} warps, {options['num_stages']} stages"
        size = math.prod(blocks.values()) * options["num_stages"]
        launch = Launch(function.__name__, config, source, options, size)
        found.setdefault(launch.key, launch).chunks.add(chunk)
        return True  # no need to compile

    before = driver._active
    driver.set_active(NoDriver())
    try:
        with mock.patch.object(JITFunction, "run", launch), mock.patch.object(knobs.runtime, "jit_cache_hook", hook):
            yield found
    finally:
        driver.set_active(before)


def mock_tensor(tensor: Tensor) -> MockTensor:
    """In the place of a tensor: its type, and an address of the same alignment (CUDA allocates by 512 bytes)."""
    stand_in = MockTensor(tensor.dtype)
    stand_in.data_ptr = lambda: tensor.storage_offset() * tensor.element_size()  # type: ignore[method-assign]
    return stand_in


@contextmanager
def trusted_kernels() -> Iterator[None]:
    """`accelerate` takes the fused scan without its self-test, which needs numbers."""
    with mock.patch.object(adapter, "self_test_error", return_value=None):
        yield


def model_launches(config: ModelConfig, dtype: torch.dtype, songs: int = 1, seconds: float = 8.0) -> dict[str, Launch]:
    """Key → launch, of all kernels that a layer launches when it trains, separates and streams, on both axes.

    Args:
        config: its layers launch all the same, and nothing else in the model launches any: one layer is enough.
        dtype: of its input; under autocast, if it is not float32.
        songs, seconds: of a batch.
    """
    with fake_cuda(), recorded_launches() as launches, trusted_kernels(), torch.device(CUDA):
        model = BSMamba2(dataclasses.replace(config, depth=1))
        assert accelerate(model, dtype=dtype).backend == "triton"
        (layer,) = model.layers
        frames = round(seconds * config.sample_rate) // config.hop_length + 1
        features = torch.empty(songs, frames, len(config.freqs_per_bands), config.dim, dtype=dtype)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            layer(features).sum().backward()
            with torch.inference_mode():
                layer(features)
                _, state = layer.step(features, None, frames - 100)
                layer.step(features, state, frames - 100)
    return launches


# --- compiling --------------------------------------------------------------------------------------------


def compile_launch(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile for an architecture: bytes of shared memory, registers and bytes spilled per thread, whether it fits."""
    started = time.perf_counter()
    made = compiler.compile(launch.source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    found = {"shared": made.metadata.shared, "warps": made.metadata.num_warps, "tensor": made.metadata.tmem_size or 0}
    found |= resources(made.asm["cubin"])
    return {**found, "fits": fits(found, arch), "seconds": round(time.perf_counter() - started, 1)}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and the bytes of its stack, to which it spills those that it lacks."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(named["REG"]), "spilled": int(named["STACK"]) + int(named["LOCAL"])}


def fits(found: dict[str, int], arch: int) -> bool:
    """Whether a block of a compiled kernel can start on a GPU of the architecture."""
    registers = -(-found["registers"] // 8) * 8 * 32 * found["warps"]  # a thread is given a multiple of eight
    return (
        found["shared"] <= 1024 * SHARED_MEMORY[arch]
        and found["registers"] <= REGISTERS_PER_THREAD
        and registers <= REGISTERS_PER_BLOCK
        and found["tensor"] <= TENSOR_MEMORY
    )


# --- the file of results ----------------------------------------------------------------------------------


def write_results(path: Path, launches: dict[str, dict[str, Launch]], minutes: float, jobs: int) -> None:
    """Compile the launches that `path` lacks, written after every fortieth; none begins after so many minutes.

    Args:
        path: JSON, see `read_results`.
        launches: name of a type → its launches.
        minutes, jobs: at most, and processes.
    """
    rows, wanted = read_results(path), {key: launch for found in launches.values() for key, launch in found.items()}
    rows = {key: rows.get(key, {"types": []}) for key in wanted}
    for dtype, found in launches.items():
        for key, launch in found.items():
            rows[key] |= {"kernel": launch.kernel, "config": launch.config, "chunks": sorted(launch.chunks)}
            rows[key]["types"] = sorted({*rows[key]["types"], dtype})
    sizes: dict[str, set[int]] = {}
    for launch in wanted.values():
        sizes.setdefault(launch.kernel, set()).add(launch.size)
    smallest_first = sorted(wanted, key=lambda key: sorted(sizes[wanted[key].kernel]).index(wanted[key].size))
    left = [(key, arch) for key in smallest_first for arch in SHARED_MEMORY if str(arch) not in rows[key]]
    print(f"{len(wanted)} binaries for {len(SHARED_MEMORY)} architectures, {len(left)} not compiled", flush=True)
    end = time.monotonic() + 60 * minutes

    def result(task: tuple[str, int]) -> dict[str, Any] | None:
        return compile_launch(wanted[task[0]], task[1]) if time.monotonic() < end else None

    for done, (task, made) in enumerate(zip(left, forked_map(result, left, jobs), strict=True), start=1):
        if made is not None:
            rows[task[0]][str(task[1])] = made
        if done % 40 == 0 or done == len(left):
            made_by = {"versions": versions(), "date": f"{datetime.date.today()}", "shared_memory_kib": SHARED_MEMORY}
            lines = ",\n".join(json.dumps({"key": key, **row}) for key, row in rows.items())
            write_atomically(path, f'{json.dumps(made_by)[:-1]}, "rows": [\n{lines}\n]}}\n'.encode())
            print(f"{done} of {len(left)}", flush=True)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Key → row of an earlier run by the same versions; a row has the launch, and its result for each architecture."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return {row.pop("key"): row for row in content["rows"]} if content.get("versions") == versions() else {}


def misfits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Each kernel, type and architecture for which every configuration is compiled, and not one fits."""
    cases: dict[tuple[str, str, int], list[bool | None]] = {}
    for row in rows:
        for kind, arch in itertools.product(row["types"], SHARED_MEMORY):
            cases.setdefault((row["kernel"], kind, arch), []).append(row.get(str(arch), {}).get("fits"))
    return [f"{kernel} in {kind} on sm_{arch}" for (kernel, kind, arch), fit in cases.items() if set(fit) == {False}]


def versions() -> dict[str, str]:
    """Package or tool → version, of all that a binary depends on."""
    ptxas = re.findall(r"V[\d.]+", subprocess.check_output([knobs.nvidia.ptxas.path, "--version"], text=True))[0]
    return {"ptxas": ptxas, **{name: importlib.metadata.version(name) for name in ("triton", "mamba-ssm", "torch")}}


def forked_map(function: Callable[[Any], Any], tasks: Sequence[Any], jobs: int) -> Iterator[Any]:
    """`map` in so many processes that are copies of this one, so that neither function nor tasks are pickled."""
    _forked[:] = function, tasks
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_call_forked, range(len(tasks)))


_forked: list[Any] = []


def _call_forked(number: int) -> Any:
    function, tasks = _forked
    return function(tasks[number])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True, help="file of results; what it has is kept")
    parser.add_argument("--minutes", type=float, default=300.0, help="after which no compilation begins")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    paper = ModelConfig.preset("paper")
    write_results(args.write, {name: model_launches(paper, DTYPES[name]) for name in DTYPES}, args.minutes, args.jobs)
    if without := misfits(list(read_results(args.write).values())):
        raise SystemExit("no configuration fits: " + "; ".join(without))
