"""`accelerate`: what it chooses, puts in and takes out, and what it says of what is missing."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from test_triton import Plant, conv_code, gpu, plant, scan_calls, scan_code  # noqa: F401
from tiny_model import TINY, relative
from torch import Tensor, nn

from bsmamba2 import BSMamba2, load_checkpoint, save_checkpoint, ssd
from bsmamba2.cli.main import main
from bsmamba2.dual_path import BidirectionalBlock
from bsmamba2.kernels import BackendError, accelerate, backends, cpu, resolve_backend, resolver, restore, triton
from bsmamba2.kernels.blockwise import BlockwiseMamba2
from bsmamba2.kernels.cpu_layers import CpuMamba2
from bsmamba2.mamba2 import Mamba2
from bsmamba2.train import TrainConfig, Trainer

CPU = torch.device("cpu")
KERNEL_SIZED = dataclasses.replace(TINY, d_state=32, headdim=32)
built = pytest.mark.skipif(sys.platform != "linux", reason="built on Linux only")


def model(seed: int = 0, **options: object) -> BSMamba2:
    torch.manual_seed(seed)
    return BSMamba2(KERNEL_SIZED, **options).eval()


def classes(module: nn.Module) -> set[type]:
    return {type(part) for part in module.modules() if isinstance(part, Mamba2 | BidirectionalBlock)}


def test_a_scan_by_name() -> None:
    for name, scan in (("recurrent", ssd.recurrent), ("matrix", ssd.matrix), ("chunked", ssd.chunked)):
        assert ssd.resolve_scan(name) is scan
    own = lambda *parts, **options: ssd.matrix(*parts, **options)  # noqa: E731
    assert ssd.resolve_scan(own) is own
    with pytest.raises(ValueError, match="scan='fast' must be one of 'recurrent', 'matrix', 'chunked', or a function"):
        BSMamba2(TINY, scan="fast")


@built
@pytest.mark.parametrize("backend", ["auto", "chunked", "cpu"])
def test_the_same_outputs_states_and_gradients(backend: str) -> None:
    plain, fast = model(), model()
    accelerate(fast, backend)
    audio = torch.randn(2, 2, 3000)

    def results(one: BSMamba2) -> dict[str, Tensor]:
        y = one(audio)
        y.square().sum().backward()
        spectrogram = torch.randn(2, 2, 65, 90, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            masks, state = one.stream_masks(spectrogram[..., :60], None, 50)
            later, _ = one.stream_masks(spectrogram[..., 50:], state, 40)
        states = {f"state {i}": part for i, part in enumerate(itertools.chain(*state))}
        outputs = {"y": y.detach(), "masks": torch.view_as_real(masks), "later": torch.view_as_real(later), **states}
        return outputs | {name: part.grad for name, part in one.named_parameters()}

    expected, found = results(plain), results(fast)
    with torch.inference_mode():
        found["y"] = fast(audio)
    weights = dict(plain.named_parameters())
    largest = max(float(expected[name].abs().max()) for name in weights)
    for name, part in expected.items():
        if name in weights:  # sums that may cancel
            torch.testing.assert_close(found[name], part, rtol=1e-4, atol=1e-6 * largest, msg=name)
        else:
            assert relative(found[name], part) < 1e-5, name


@built
def test_it_can_be_taken_out_and_copied() -> None:
    one, audio = model(), torch.randn(1, 2, 900)
    weights = copy.deepcopy(one.state_dict())
    with torch.inference_mode():
        expected = one(audio)
        assert accelerate(one).backend == "cpu"
        again = accelerate(one)
        assert (again.backend, again.build_seconds) == ("cpu", None)
        fast = one(audio)
        assert torch.equal(copy.deepcopy(one)(audio), fast)
        assert CpuMamba2 in classes(one)
        accelerate(one, "chunked")
        assert BlockwiseMamba2 in classes(one)
        restore(one)
        assert classes(one) == {Mamba2, BidirectionalBlock}
        assert torch.equal(one(audio), expected)
    assert one.state_dict().keys() == weights.keys()
    assert all(torch.equal(part, weights[name]) for name, part in one.state_dict().items())


@built
def test_models_of_one_process_choose_for_themselves() -> None:
    plain, fast = model(), model()
    accelerate(fast)
    assert classes(plain) == {Mamba2, BidirectionalBlock}
    assert CpuMamba2 in classes(fast)
    trainer = Trainer(fast, TrainConfig(steps=1, loss_windows=(256,)))
    assert CpuMamba2 in classes(trainer.ema)
    assert accelerate(fast, "plain").backend == "plain"
    assert classes(fast) == {Mamba2, BidirectionalBlock}


def test_an_unknown_name_and_a_model_without_mixers() -> None:
    with pytest.raises(ValueError, match="backend='gpu' must be one of auto, plain, cpu, triton"):
        accelerate(model(), "gpu")
    other = model(sequence_layer=lambda: nn.Linear(16, 16))
    assert "no Mamba-2 mixer" in accelerate(other).reason
    with pytest.raises(BackendError, match="no Mamba-2 mixer"):
        accelerate(other, "cpu")


@built
@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_without_a_compiler_auto_goes_on_and_a_name_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "nothing"))
    cpu.self_test_error.cache_clear()
    monkeypatch.setattr(cpu, "load_extension", cpu.load_extension.__wrapped__)
    try:
        if name == "auto":
            chosen = accelerate(model(), name)
            assert chosen.backend == "chunked"
            assert "there is no C++ compiler" in chosen.reason
        else:
            with pytest.raises(BackendError, match=r"there is no C\+\+ compiler.*apt install g\+\+"):
                accelerate(model(), name)
    finally:
        cpu.self_test_error.cache_clear()


def test_a_named_backend_that_is_not_available_names_the_fix(
    plant: Plant,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(BackendError) as raised:
        accelerate(model(), "triton")
    assert "mamba-ssm is not installed" in str(raised.value)
    assert triton.INSTALL_MAMBA in raised.value.fix
    assert "a driver for CUDA 13.0" in raised.value.fix
    plant(scan=scan_code())
    with pytest.raises(BackendError, match=r"sees no GPU. To fix this: an NVIDIA GPU"):
        accelerate(model(), "triton")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendError, match=r"is built without CUDA. To fix this: a torch with CUDA"):
        accelerate(model(), "triton")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_takes_the_fused_kernels(plant: Plant) -> None:  # noqa: F811
    plant(scan=scan_code(), conv=conv_code())
    assert resolve_backend(model(), "auto")[0] == "triton"
    plant(scan=scan_code("y = 1 / 0"))
    assert resolve_backend(model(), "auto")[0] == "chunked"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("saved_under", ["plain", "chunked", "triton", pytest.param("cpu", marks=built)])
def test_a_checkpoint_gives_the_same_under_every_backend(
    plant: Plant,  # noqa: F811
    tmp_path: Path,
    saved_under: str,
) -> None:
    plant(scan=scan_code(), conv=conv_code())
    one = model()
    accelerate(one, saved_under)
    save_checkpoint(one, tmp_path / "model.safetensors")
    audio = torch.randn(1, 2, 700)
    with torch.no_grad():
        expected = one(audio)
        for name in ("auto", "plain", "chunked", "triton"):
            loaded = load_checkpoint(tmp_path / "model.safetensors")
            assert classes(loaded) == {Mamba2, BidirectionalBlock}
            accelerate(loaded, name)
            assert relative(loaded(audio), expected) < 1e-5, name
        for scan in (*ssd.SCANS, ssd.matrix):
            found = load_checkpoint(tmp_path / "model.safetensors", scan=scan)(audio)
            assert relative(found, expected) < 1e-5, scan
    assert scan_calls()  # "triton" and "auto" went through the planted kernel


# --- the table --------------------------------------------------------------------------------------------


def test_the_command_prints_every_backend(
    plant: Plant,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant(scan="import einops_that_is_absent", conv=conv_code())
    assert main(["backends"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["backend", "usable", "version", "reason"]
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names == ["auto", "plain", "chunked", "cpu", "triton", "causal-conv1d"]
    column = header.index("usable")
    usable = {line.split()[0]: line[column:].split()[0] for line in lines if not line.startswith(" ")}
    assert {usable[name] for name in ("auto", "plain", "chunked")} == {"yes"}
    fused = lines[[line.split()[0] for line in lines].index("triton") :]
    assert "mamba-ssm 9.9" in fused[0]
    if not torch.cuda.is_available():
        assert "einops_that_is_absent" in fused[0]
        assert fused[1].startswith("  to use it: ")
        assert triton.INSTALL_MAMBA in fused[1]
        assert "NVIDIA GPU" in fused[1]
        assert "causal-conv1d 9.9" in fused[2]
        assert "NVIDIA GPU" in fused[3]


def test_the_table_of_a_type_that_no_kernel_takes() -> None:
    rows = {row.name: row for row in backends(CPU, torch.float16)}
    assert not rows["cpu"].usable
    assert "does not take torch.float16" in rows["cpu"].reason
    assert rows["auto"].reason == "takes chunked on cpu"


def test_a_type_that_is_slow_on_the_processor_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert resolver.slowdown(CPU, torch.float32) == 0
    assert resolver.slowdown(torch.device("meta"), torch.bfloat16) == 0
    assert resolver.slowdown(CPU, torch.float64) > 0
    clock = itertools.count()
    # Every reading of the clock one later than the last, but a narrow product takes twelve more.
    monkeypatch.setattr(resolver.time, "perf_counter", lambda: next(clock))
    linear = resolver.functional.linear

    def slow(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        for _ in range(12 * (x.dtype == torch.bfloat16)):
            next(clock)
        return linear(x, weight)

    monkeypatch.setattr(resolver.functional, "linear", slow)
    assert resolver.slowdown(CPU, torch.bfloat16) == 13
    monkeypatch.undo()
    soundfile.write(tmp_path / "song.wav", torch.zeros(4410, 2).numpy(), 44_100)
    save_checkpoint(BSMamba2(TINY), tmp_path / "tiny.safetensors")
    for longer, expected in ((13.0, "13 times as long"), (0.5, "")):
        monkeypatch.setattr(resolver, "slowdown", lambda device, dtype, longer=longer: longer)
        command = ["separate", str(tmp_path / "song.wav"), "-o", str(tmp_path / f"{longer}"), "--dtype", "bfloat16"]
        command += ["--checkpoint", str(tmp_path / "tiny.safetensors")]
        assert main(command) == 0
        printed = capsys.readouterr().err
        assert expected in printed
        assert ("times as long" in printed) == bool(expected)


def test_no_compiler_is_imported_before_it_is_wanted() -> None:
    code = "import sys, bsmamba2; print([name for name in ('triton', 'bsmamba2.kernels') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
