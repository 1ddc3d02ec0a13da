"""Which scan runs, and what is said when a kernel is absent, fails or lies.

No kernel runs here: packages are planted on the disk, in plain PyTorch, right or with a fault, and the CPU is declared
to be their GPU. The kernels themselves are tested in tests/interpreter, in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_ssd import everything, problem
from tiny_model import relative
from torch import Tensor
from torch.nn import functional

from bsmamba2 import ssd
from bsmamba2.kernels import BackendError, backends, self_test, triton
from bsmamba2.kernels.blockwise import causal_conv1d_silu as unfused
from bsmamba2.kernels.chunked import chunked

CPU = torch.device("cpu")
PACKAGES = ("mamba_ssm", "causal_conv1d")

SCAN = """
import torch
from torch.nn import functional
from bsmamba2 import ssd

calls = []

def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, initial_states=None, return_final_states=False):
    calls.append((tuple(x.shape), chunk_size, x.dtype))
    b, t, h, p = x.shape
    assert B.shape == C.shape == (b, t, 1, B.shape[-1])
    assert {part.dtype for part in (dt, A, D, initial_states) if part is not None} == {torch.float32}
    assert B.dtype == C.dtype == x.dtype
    FAULT
    states = {"initial_state": initial_states, "return_state": return_final_states}
    return ssd.matrix(x, dt, A, B[:, :, 0], C[:, :, 0], D, **states)
"""

CONV = """
import torch
from torch.nn import functional

calls = []

def causal_conv1d_fn(x, weight, bias=None, activation=None):
    calls.append(tuple(x.shape))
    assert x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == 0 and activation == "silu"
    assert weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    FAULT
    taps = weight.shape[1]
    y = functional.conv1d(x, weight[:, None], bias, padding=taps - 1, groups=len(weight))[..., : x.shape[-1]]
    return functional.silu(y)
"""

# A bias of dt that is wrong by a hundredth, seen from behind the softplus.
WRONG_BIAS = "bias = torch.tensor(-3.0); dt = functional.softplus(torch.log(torch.expm1(dt)) - bias + bias * 1.01)"
WRONG_GRADIENT = "C = C + (C - C.detach())"
NO_NUMBER = "x = x * float('nan')"
NO_IMAGE = "raise RuntimeError('CUDA error: no kernel image is available for execution on the device')"
NOT_COMPILED = "raise NotImplementedError('no such layout')"
BAD_BACKWARD = "x.register_hook(lambda gradient: 1 / 0)"
NO_MEMORY = "raise torch.OutOfMemoryError('tried to allocate 20.00 GiB')"
NO_MEMORY_IN_TRITON = "raise RuntimeError('Triton Error [CUDA]: out of memory')"
FAULTS = {
    "wrong bias": (WRONG_BIAS, "wrong numbers.* y by"),
    "wrong gradient": (WRONG_GRADIENT, "wrong numbers.* dC by 100"),
    "not a number": (NO_NUMBER, "wrong numbers.* y by nan"),
    "no image": (NO_IMAGE, "no kernel image"),
    "not compiled": (NOT_COMPILED, "NotImplementedError: no such layout"),
    "only long chunks": ("if chunk_size == 256: x = 1.02 * x", "wrong numbers.* y by [12]"),
    "bad backward": (BAD_BACKWARD, "ZeroDivisionError"),
}

Plant = Callable[..., None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Put packages in the place of what is installed: `plant(scan=code, conv=code)`; nothing is there before."""
    folder = tmp_path / "planted"
    folder.mkdir()
    real = importlib.util.find_spec
    hidden = importlib.metadata.version

    def find(name: str, package: str | None = None) -> object:
        return real(name, package) if name not in PACKAGES or (folder / name).exists() else None

    def version(name: str) -> str:
        if name.replace("-", "_") in PACKAGES and not (folder / name.replace("-", "_")).exists():
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9" if name.replace("-", "_") in PACKAGES else hidden(name)

    def forget() -> None:
        for cached in (triton.triton_ops, triton.self_test_error, triton.conv_self_test_error):
            cached.cache_clear()
        self_test._warned.clear()
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def put(*, scan: str | None = None, conv: str | None = None, init: str = "import selective_scan_cuda") -> None:
        forget()
        files = {}
        if scan is not None:
            files = {
                "mamba_ssm/__init__.py": init,
                "mamba_ssm/ops/__init__.py": "",
                "mamba_ssm/ops/triton/__init__.py": "",
                "mamba_ssm/ops/triton/ssd_combined.py": scan,
            }
        if conv is not None:
            files["causal_conv1d/__init__.py"] = conv
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content, encoding="utf-8")

    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    yield put
    forget()
    sys.modules.update(kept)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU counts as the device that the kernels are for."""
    monkeypatch.setattr(triton, "GPU", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def scan_code(fault: str = "") -> str:
    return SCAN.replace("FAULT", fault)


def conv_code(fault: str = "") -> str:
    return CONV.replace("FAULT", fault)


def inputs(t: int = 20, **sizes: int) -> list[Tensor]:
    return [part.float() for part in problem(t, **sizes)][:6]


def verified_scan(x: Tensor, *inputs: Tensor) -> Tensor:
    if (error := triton.self_test_error(x.device, x.dtype)) is not None:
        raise error
    return triton.scan(x, *inputs)


def scan_calls() -> list:
    return triton.triton_ops().calls


# --- the adapter ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("t", "chunk"), [(1, 64), (62, 64), (128, 64), (129, 256), (300, 256)])
def test_the_adapter_has_the_signature_and_the_results_of_the_scan(plant: Plant, t: int, chunk: int) -> None:
    plant(scan=scan_code())
    parts = problem(t)
    found, expected = (everything(scan, parts, dtype) for scan, dtype in SAME)
    for name, part in found.items():
        assert relative(part, expected[name]) < 1e-5, name
    assert scan_calls() == [((2, t, 2, 3), chunk, torch.float32)]


SAME = ((triton.scan, torch.float32), (ssd.recurrent, torch.float64))


@pytest.mark.usefixtures("gpu")
def test_types_are_those_of_the_scan(plant: Plant) -> None:
    plant(scan=scan_code())
    x, dt, A, B, C, D = inputs()
    x = x.bfloat16()
    y, state = triton.scan(x, dt.bfloat16(), A.double(), B, C, D.bfloat16(), return_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert not isinstance(triton.scan(x, dt, A, B, C), tuple)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("limit", "value"), [("MAX_BLOCKS", 8), ("MAX_ELEMENTS", 3 * 2 * 256**2), ("MAX_BLOCKS", 2)])
def test_a_large_batch_goes_in_pieces(plant: Plant, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    plant(scan=scan_code())
    monkeypatch.setattr(triton, limit, value)
    parts = problem(300, b=9)
    found, expected = (everything(scan, parts, dtype) for scan, dtype in SAME)
    for name, part in found.items():
        assert relative(part, expected[name]) < 1e-5, name
    sizes = [shape[0] for shape, *_ in scan_calls()]
    assert sum(sizes) == 9
    assert len(sizes) > 1
    assert max(sizes) == (value // 2 if limit == "MAX_BLOCKS" else 3)  # two chunks of 256 in 300 frames


@pytest.mark.usefixtures("gpu")
def test_what_32_bits_cannot_address_is_copied_or_refused(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = "seen = x.is_contiguous(); calls[-1] = seen"
    plant(scan=scan_code(seen))
    x, dt, A, B, C, D = inputs(40, b=1)
    wide = torch.zeros(1, 40, 2, 3000)
    wide[..., :3] = x
    monkeypatch.setattr(triton, "MAX_ELEMENTS", 200_000)
    assert relative(triton.scan(wide[..., :3], dt, A, B, C, D), ssd.recurrent(x, dt, A, B, C, D)) < 1e-5
    assert scan_calls() == [True]
    monkeypatch.setattr(triton, "MAX_ELEMENTS", 100)
    with pytest.raises(ValueError, match="t=40 frames are too many"):
        triton.scan(x, dt, A, B, C, D)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("position", range(6))
def test_a_wrong_shape_or_device_is_named(plant: Plant, position: int) -> None:
    plant(scan=scan_code())
    names = ("x", "dt", "A", "B", "C", "D")
    parts = inputs()
    parts[position] = parts[position][:, 0] if position == 0 else parts[position][..., :-1]
    with pytest.raises(ValueError, match=f"^{'C' if names[position] == 'B' else names[position]} "):
        triton.scan(*parts)
    if position:
        parts = inputs()
        parts[position] = parts[position].to("meta")
        with pytest.raises(ValueError, match=f"^{names[position]} is on meta and x on cpu"):
            triton.scan(*parts)
    with pytest.raises(ValueError, match=r"^initial_state "):
        triton.scan(*inputs(), initial_state=torch.zeros(1))


def test_where_the_tensor_is_decides(plant: Plant) -> None:
    plant(scan=scan_code(), conv=conv_code())
    parts = inputs()
    assert torch.equal(triton.auto_scan(*parts), chunked(*parts))
    assert not scan_calls()
    with pytest.raises(BackendError, match=r"on cpu, the kernel runs on CUDA. To fix this: .*backend='auto'"):
        triton.scan(*parts)
    with pytest.raises(BackendError, match="on cpu"):
        verified_scan(*parts)
    with pytest.raises(BackendError, match="on cpu"):
        triton.causal_conv1d_silu(torch.zeros(1, 4, 8), torch.zeros(8, 1, 4), None)


@pytest.mark.usefixtures("gpu")
def test_a_type_that_the_kernel_does_not_take(plant: Plant) -> None:
    plant(scan=scan_code())
    parts = [part.double() for part in inputs()]
    with pytest.raises(BackendError, match=r"float64.*To fix this: float32"):
        triton.scan(*parts)
    with pytest.warns(RuntimeWarning, match="float64"):
        assert triton.auto_scan(*parts).dtype == torch.float64


# --- the trial --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kernel_that_works_is_tried_once_and_used(plant: Plant, dtype: torch.dtype) -> None:
    plant(scan=scan_code())
    parts = inputs()
    parts[0] = parts[0].to(dtype)
    for _ in range(3):
        triton.auto_scan(*parts)
        verified_scan(*parts)
    tried, used = scan_calls()[:2], scan_calls()[2:]
    assert [call[1] for call in tried] == [64, 256]
    assert all(call[0] != tuple(parts[0].shape) for call in tried)
    assert len(used) == 6
    assert {call[2] for call in scan_calls()} == {dtype}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_trial_leaves_no_trace(plant: Plant, mode: Callable) -> None:
    plant(scan=scan_code())
    parts = inputs()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        triton.auto_scan(*parts)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS)
def test_a_kernel_that_fails_or_lies_is_not_used(plant: Plant, fault: str, said: str) -> None:
    plant(scan=scan_code(fault))
    parts = inputs()
    with pytest.warns(RuntimeWarning, match=said) as warned:
        found = triton.auto_scan(*parts)
    assert len(warned) == 1
    assert "the chunked form runs" in str(warned[0].message)
    assert torch.equal(found, chunked(*parts))
    assert torch.equal(triton.auto_scan(*parts), found)  # a second warning would be an error here
    assert len(scan_calls()) == (2 if "wrong numbers" in said else 1)
    with pytest.raises(BackendError, match=f"{said}(.|\n)*To fix this: "):
        verified_scan(*parts)
    row = {row.name: row for row in backends(CPU)}["triton"]
    assert not row.usable
    assert row.fix


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("fault", "said"), [(NO_MEMORY, "20.00 GiB"), (NO_MEMORY_IN_TRITON, "out of memory")], ids=["torch", "Triton"]
)
@pytest.mark.parametrize("scan", [triton.auto_scan, verified_scan])
def test_no_memory_is_no_missing_kernel(plant: Plant, scan: ssd.Scan, fault: str, said: str) -> None:
    parts = inputs()
    plant(scan=scan_code(f"if len(calls) == 1: {fault}"))  # in the trial: told, and tried again
    with pytest.raises(RuntimeError, match=said) as raised:
        scan(*parts)
    assert not isinstance(raised.value, BackendError)
    assert relative(scan(*parts), ssd.recurrent(*parts)) < 1e-5
    assert len(scan_calls()) == 1 + 2 + 1
    plant(scan=scan_code(f"if len(calls) == 3: {fault}"))  # in use
    with pytest.raises(RuntimeError, match=said):
        scan(*parts)
    assert len(scan_calls()) == 3
    plant(scan=scan_code(fault))
    with pytest.raises(RuntimeError, match=said):
        backends(CPU)


# --- packages ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("scan", [None, scan_code()], ids=["no mamba-ssm", "mamba-ssm"])
@pytest.mark.parametrize("conv", [None, conv_code()], ids=["no causal-conv1d", "causal-conv1d"])
def test_each_package_without_the_other(plant: Plant, scan: str | None, conv: str | None) -> None:
    plant(scan=scan, conv=conv)
    rows = {row.name: row for row in backends(CPU)}
    assert (rows["triton"].usable, rows["causal-conv1d"].usable) == (scan is not None, conv is not None)
    assert rows["triton"].version == ("–" if scan is None else "mamba-ssm 9.9")
    assert rows["causal-conv1d"].version == ("–" if conv is None else "causal-conv1d 9.9")
    for name, code, install in (("triton", scan, triton.INSTALL_MAMBA), ("causal-conv1d", conv, triton.INSTALL_CONV)):
        assert rows[name].fix == (install if code is None else "")
        assert ("is not installed" in rows[name].reason) == (code is None)
    assert rows["auto"].reason == f"takes {'chunked' if scan is None else 'triton'} on cpu"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = triton.auto_scan(*inputs())
        triton.auto_conv(torch.zeros(4, 1, 8), torch.zeros(8, 1, 4), None)
    assert len(warned) == (scan is None)  # slower than it could be: said once
    assert relative(result, ssd.recurrent(*inputs())) < 1e-5


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("code", "said", "mend"),
    [
        ("import einops_that_is_absent", "No module named 'einops_that_is_absent'", "the version that was tried"),
        ("raise ModuleNotFoundError('No module named einops', name='einops')", "einops", "^pip install einops$"),
        ("raise ModuleNotFoundError('no triton', name='triton.language')", "triton", "which brings Triton"),
        (
            "raise ImportError('x.so: undefined symbol: _ZN3c10')",
            "undefined symbol",
            "against this torch: pip uninstall",
        ),
        ("raise RuntimeError('0 active drivers')", "RuntimeError: 0 active drivers", "the version that was tried"),
    ],
)
def test_a_package_that_does_not_import_says_why(plant: Plant, code: str, said: str, mend: str) -> None:
    plant(scan=code, conv=code)
    for load in (triton.scan_kernel, triton.conv_kernel):
        with pytest.raises(BackendError, match=said) as raised:
            load()
        assert re.search(mend, raised.value.fix)
    unusable = {row.name for row in backends(CPU) if not row.usable}
    assert unusable - {"cpu"} == {"triton", "causal-conv1d"}


def test_the_package_is_entered_past_its_init(plant: Plant) -> None:
    plant(scan=scan_code())
    assert triton.scan_kernel().__module__ == "mamba_ssm.ops.triton.ssd_combined"
    assert "mamba_ssm" not in sys.modules
    with pytest.raises(ImportError, match="selective_scan_cuda"):  # as it would have been without us
        importlib.import_module("mamba_ssm")
    plant(scan=scan_code(), init="from mamba_ssm.ops.triton import ssd_combined")
    kernel = triton.scan_kernel()
    assert importlib.import_module("mamba_ssm").ssd_combined.mamba_chunk_scan_combined is kernel


def test_a_package_that_is_imported_already_is_taken(plant: Plant) -> None:
    plant(scan=scan_code(), init="")
    package = importlib.import_module("mamba_ssm")
    assert triton.scan_kernel()
    assert sys.modules["mamba_ssm"] is package


# --- the convolution --------------------------------------------------------------------------------------


def conv_inputs(width: int = 16, taps: int = 4) -> list[Tensor]:
    """x (t, b, w), weight, bias, and the frames before x."""
    g = torch.Generator().manual_seed(0)
    shapes = [(9, 2, width), (width, 1, taps), (width,), (taps - 1, 2, width)]
    return [torch.randn(*shape, generator=g) for shape in shapes]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """The definition: y_t = SiLU(bias + Σ_i weight_i · x_{t − taps + 1 + i})."""
    taps = weight.shape[-1]
    before = x.new_zeros(taps - 1, *x.shape[1:]) if before is None else before
    padded = torch.cat((before, x))
    y = sum(weight[:, 0, i] * padded[i : i + len(x)] for i in range(taps))
    return functional.silu(y if bias is None else y + bias)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "layout", ["plain", "odd width", "odd distance", "sequences first", "one frame", "no bias", "frames before"]
)
def test_the_convolution_is_what_it_is_by_definition(plant: Plant, layout: str) -> None:
    plant(conv=conv_code())
    x, weight, bias, before = conv_inputs()
    if layout == "odd width":
        x = torch.cat([x.repeat(1, 4, 1), torch.zeros(9, 8, 3)], -1)[..., :16]
    if layout == "odd distance":
        x = torch.cat([x.flatten(1), torch.zeros(9, 1)], 1)[:, :-1].unflatten(1, (2, 16))
    if layout == "sequences first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "one frame":
        x = x[:1]
    given = [x, weight, None if layout == "no bias" else bias, before if layout == "frames before" else None]
    parts = [part.requires_grad_() for part in given if part is not None]
    found = triton.auto_conv(*given)
    expected = plain(*given)
    assert relative(found.detach(), expected.detach()) < 1e-6
    dy = torch.randn(x.shape)
    for a, b in zip(torch.autograd.grad(found, parts, dy), torch.autograd.grad(expected, parts, dy), strict=True):
        assert relative(a, b) < 1e-6
    assert len(importlib.import_module("causal_conv1d").calls) == 2  # the trial, and this


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("width", "taps"), [(16, 5), (16, 1), (12, 4)])
def test_sizes_that_the_convolution_does_not_take(plant: Plant, width: int, taps: int) -> None:
    plant(conv=conv_code())
    parts = conv_inputs(width, taps)
    assert torch.equal(triton.auto_conv(*parts), unfused(*parts))
    with pytest.raises(BackendError, match=f"{taps} taps and width {width}"):
        triton.causal_conv1d_silu(*parts)


def test_the_convolution_goes_by_the_device(plant: Plant) -> None:
    plant(conv=conv_code())
    parts = conv_inputs()
    assert torch.equal(triton.auto_conv(*parts), unfused(*parts))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("fault", "said"), [("weight = weight * 1.01", "wrong numbers"), (NO_IMAGE, "no kernel image")]
)
def test_a_convolution_that_fails_or_lies_is_not_used(plant: Plant, fault: str, said: str) -> None:
    plant(conv=conv_code(fault))
    parts = conv_inputs()
    with pytest.warns(RuntimeWarning, match=said) as warned:
        found = triton.auto_conv(*parts)
    assert len(warned) == 1
    assert torch.equal(found, unfused(*parts))
    assert torch.equal(triton.auto_conv(*parts), found)


@pytest.mark.usefixtures("gpu")
def test_no_memory_is_no_missing_convolution(plant: Plant) -> None:
    plant(conv=conv_code(NO_MEMORY))
    with pytest.raises(torch.OutOfMemoryError):
        triton.auto_conv(*conv_inputs())
