"""The Triton kernels that a model launches are found, and compile for a GPU that is not here: a quick part of what
`make gpu-kernels` compiles, and the file that it has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_cuda import CUDA, fake_cuda
from triton_launches import SHARED_MEMORY, Launch, compile_launch, fits, misfits, model_launches, recorded_launches

from bsmamba2 import ModelConfig
from bsmamba2.kernels import BackendError, triton

FORWARD = ["_chunk_cumsum_fwd", "_chunk_state_fwd", "_state_passing_fwd", "_bmm_chunk_fwd", "_chunk_scan_fwd"]
RESULTS = Path(__file__).parents[2] / "book/data/gpu_kernels.json"


@pytest.fixture(scope="module")
def launches() -> dict[str, Launch]:
    """As the paper's model trains, under autocast."""
    return model_launches(ModelConfig.preset("paper"), torch.bfloat16)


def test_the_kernels_of_both_directions_and_axes_are_found(launches: dict[str, Launch]) -> None:
    names = {launch.kernel for launch in launches.values()}
    assert names >= {f"{name}_kernel" for name in FORWARD}
    assert len(names - {f"{name}_kernel" for name in FORWARD}) >= 8  # of the backward pass
    for name in names:
        chunks = {chunk for launch in launches.values() if launch.kernel == name for chunk in launch.chunks}
        assert chunks == {triton.SHORT_CHUNK, triton.FULL_CHUNK}, name


def test_every_kernel_compiles_for_the_gpu_with_the_least_shared_memory_and_fits(launches: dict[str, Launch]) -> None:
    smallest: dict[str, Launch] = {}
    for launch in launches.values():
        smallest[launch.kernel] = min(launch, smallest.get(launch.kernel, launch), key=lambda launch: launch.size)
    found = {name: compile_launch(launch, 86) for name, launch in smallest.items()}
    assert [name for name, result in found.items() if not result["fits"]] == []
    assert all(0 < result["registers"] <= 255 for result in found.values())


def test_a_block_that_needs_too_much_does_not_fit() -> None:
    small = {"shared": 99 * 1024, "registers": 128, "warps": 16, "tensor": 0}
    assert all(fits(small, arch) for arch in SHARED_MEMORY)
    more = {**small, "shared": 99 * 1024 + 1}
    assert [arch for arch in SHARED_MEMORY if fits(more, arch)] == [80, 90, 100]
    assert not fits({**small, "registers": 129}, 90)  # 16 warps of 136 registers are 69,632
    assert fits({**small, "registers": 255, "warps": 8}, 90)
    assert not fits({**small, "tensor": 513}, 100)


def test_a_kernel_without_a_fitting_configuration_is_named() -> None:
    rows = [{"kernel": "a", "types": ["float32"], **{str(arch): {"fits": arch != 86} for arch in SHARED_MEMORY}}]
    assert misfits(rows) == ["a in float32 on sm_86"]
    assert misfits([*rows, {"kernel": "a", "types": ["float32"], "86": {"fits": True}}]) == []
    assert misfits([*rows, {"kernel": "a", "types": ["float32"]}]) == []  # not all are compiled yet


def test_a_tensor_of_the_cpu_in_a_kernel_is_noticed() -> None:
    with fake_cuda(), recorded_launches():
        x, dt, A = (torch.empty(*shape, device=CUDA) for shape in [(1, 70, 2, 64), (1, 70, 2), (2,)])
        B = torch.empty(1, 70, 128, device=CUDA)
        triton.scan(x, dt, A, B, B)
        with pytest.raises(ValueError, match="C is on cpu"):
            triton.scan(x, dt, A, B, B.cpu())
        kernel = triton.scan_kernel()
        with pytest.raises(AssertionError, match="given a tensor on cpu"):
            kernel(x, dt, A, B[:, :, None], B.cpu()[:, :, None], 64)


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        x, dt, A, B = (torch.empty(*shape, device=CUDA) for shape in [(1, 70, 2, 64), (1, 70, 2), (2,), (1, 70, 128)])
        with pytest.raises(BackendError, match=r"compute capability 7\.5, the fused scan needs 8\.0"):
            triton.scan(x, dt, A, B, B)
        triton.self_test_error.cache_clear()
        assert "7.5" in triton.self_test_error(CUDA, torch.float32).reason  # before anything is compiled
        triton.self_test_error.cache_clear()


def test_the_results_in_the_book() -> None:
    """No kernel, in no type, is without a configuration that fits, on no architecture."""
    rows = json.loads(RESULTS.read_text())["rows"]
    assert {kind for row in rows for kind in row["types"]} == {"float32", "bfloat16", "float16"}
    assert {chunk for row in rows for chunk in row["chunks"]} == {triton.SHORT_CHUNK, triton.FULL_CHUNK}
    assert misfits(rows) == []
    compiled = [(row[str(arch)], arch) for row in rows for arch in SHARED_MEMORY if str(arch) in row]
    assert all(result["fits"] == fits(result, arch) for result, arch in compiled)
