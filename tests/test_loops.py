"""Loops: the same numbers compiled and as written, and a compiler that fails costs time alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import relative
from torch import Tensor

from bsmamba2 import BSMamba2, ssd
from bsmamba2.cli.main import main
from bsmamba2.kernels import cpu, loops, triton


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A compiler that fails, and how often it was asked."""
    asked: list[int] = []

    def fails(function: object, **options: object) -> object:
        def quick(*args: object) -> None:
            asked.append(1)
            raise RuntimeError("no C++ compiler\nand a long trace")

        return quick

    monkeypatch.setattr(torch, "compile", fails)
    monkeypatch.setattr(loops, "_fault", None)
    return asked


def test_without_a_compiler_loops_run_as_written_and_say_so_once(broken: list[int]) -> None:
    double = loops.loop(lambda x: 2 * x)
    x = torch.ones(3)
    with torch.no_grad(), loops.compiled():
        with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler\).*apt install g\+\+"):
            assert torch.equal(double(x), 2 * x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(double(x), 2 * x)
    assert len(broken) == 1


def test_only_what_was_asked_for_is_compiled(broken: list[int]) -> None:
    double = loops.loop(lambda x: 2 * x)
    with torch.no_grad():
        double(torch.ones(3))  # not asked
        with loops.compiled(False):
            double(torch.ones(3))
        with loops.compiled():
            double(torch.ones(3, device="meta"))  # on no CPU
            with torch.enable_grad():
                double(torch.ones(3))  # gradients are recorded
    assert not broken


def test_a_loop_tells_its_own_faults(broken: list[int]) -> None:
    wrong = loops.loop(lambda x: x + torch.ones(7))
    with torch.no_grad(), loops.compiled(), pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="size"):
        wrong(torch.ones(3))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory: 8 bytes"),
    ],
)
def test_too_little_memory_is_not_the_compilers_fault(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def compiles(function: object, **options: object) -> object:
        def quick(*args: object) -> None:
            raise error

        return quick

    monkeypatch.setattr(torch, "compile", compiles)
    monkeypatch.setattr(loops, "_fault", None)
    double = loops.loop(lambda x: 2 * x)
    with torch.no_grad(), loops.compiled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(type(error)):
            double(torch.ones(3))
    assert loops._fault is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_loops_give_the_same_numbers(
    published_model: BSMamba2, published: dict[str, Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "scan_for", lambda device, dtype: ssd.chunked)  # the native kernel needs no loops
    monkeypatch.setattr(cpu, "normalises", lambda x: False)
    spectrogram = torch.view_as_complex(published["input.spectrogram"])
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = published_model.apply_to_spectrogram(spectrogram)
        with loops.compiled():
            quick = published_model.apply_to_spectrogram(spectrogram)
    assert loops._fault is None
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert relative(torch.view_as_real(quick), torch.view_as_real(plain)) < bound
    if dtype == torch.float32:
        assert relative(torch.view_as_real(quick), published["output.spectrogram"]) < 1e-5


def test_the_command_line_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["separate", "--help"])
    assert "--compile" in capsys.readouterr().out


def test_the_compiler_is_not_imported_before_it_is_wanted() -> None:
    told = (
        "import sys, bsmamba2; print([one for one in ('triton', 'torch._inductor.compile_fx') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
