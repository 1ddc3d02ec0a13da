"""Layers that run the C++ kernel: the mixer, and the bidirectional block with adjacent matrices multiplied in advance.

Each class computes the same function as its plain base class and has the same parameters. For types, sizes and devices
that the kernel does not support, the blockwise form runs instead. Book: "Appendix: the CPU kernel".
Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..dual_path import PreNormResidual
from ..mamba2 import EPS, MixerState, RMSNorm, at_least_fp32
from . import cpu
from .blockwise import BlockwiseBlock, BlockwiseMamba2, block_by_block, matmul_dtype
from .self_test import warn_once

CPU_BLOCK = 15 * 2**20
"""Number of values of the first projection that the C++ kernel processes at once, without gradients."""


class Workspace:
    """Preallocated buffers for the CPU kernel, for one block of sequences.

    Without them, the C library would return large buffers to the system after each use, and the system would clear them
    at the next allocation; this takes a quarter of a model's run time. With gradients, each block has its own buffers,
    because the backward pass needs the projections.

    Args:
        x: all sequences, (b, length, d).
        mixer: mixer that processes them.
        dtype: type of the matrix products.

    Attributes:
        max_sequences: largest number of sequences in a block.
    """

    def __init__(self, x: Tensor, mixer: CpuMamba2, dtype: torch.dtype) -> None:
        width = sum(mixer.proj_sizes)
        self.max_sequences = max(1, CPU_BLOCK // (x.shape[1] * width))
        frames = min(self.max_sequences, len(x)) * x.shape[1]
        self.projected = x.new_empty(frames, width, dtype=dtype)
        self.gated = x.new_empty(frames, mixer.proj_sizes[0], dtype=dtype)


class CpuMamba2(BlockwiseMamba2):
    """`Mamba2` with everything between its projections in the C++ kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) → (b, t, d)."""
        if not self.takes(x):
            return super().forward(x)
        dtype = matmul_dtype(x)
        if torch.is_grad_enabled():
            y, _ = self.conv_scan_gate(self.in_proj(x))
            return functional.linear(y, self.output_matrix())
        with torch.autocast(x.device.type, enabled=False):
            into, out = self.in_proj.weight.to(dtype), self.output_matrix().to(dtype)
            workspace = Workspace(x, self, dtype)

            def run(part: Tensor) -> Tensor:
                return functional.linear(self.project_and_run(part.to(dtype), into, workspace), out)

            return block_by_block(run, x, workspace.max_sequences)

    def step(self, x: Tensor, state: MixerState | None = None) -> tuple[Tensor, MixerState]:
        """Same as `Mamba2.step`."""
        if not self.takes(x):
            return super().step(x, state)
        conv_state, ssm_state = state or (None, None)
        projected = self.in_proj(x)
        y, after = self.conv_scan_gate(projected, conv_state=conv_state, initial_state=ssm_state, return_state=True)
        assert after is not None
        xBC = projected.split(self.proj_sizes, dim=-1)[1].transpose(0, 1)
        frames = self.last_frames(None if conv_state is None else conv_state.transpose(0, 1), xBC)
        return functional.linear(y, self.output_matrix()), MixerState(frames.transpose(0, 1), after)

    def takes(self, x: Tensor) -> bool:
        """Whether the C++ kernel runs for x; warns once if it supports x but fails its self-test."""
        dtype = matmul_dtype(x)
        if cpu.unsupported_reasons(x.device, dtype, self.headdim, self.conv_sizes[1]):
            return False
        error = cpu.self_test_error(dtype)
        if error is not None:
            warn_once(f"the chunked form runs instead of the C++ kernel: {error}")
        return error is None

    def output_matrix(self) -> Tensor:
        """Matrix applied after the kernel, (d, h·p): the gain of the norm and the output projection combined."""
        return self.out_proj.weight * self.norm.weight

    def conv_scan_gate(self, projected: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Run `cpu.conv_scan_gate` on the projected input with the parameters of this mixer, and the same options."""
        A, conv = -at_least_fp32(self.A_log).exp(), self.conv1d
        return cpu.conv_scan_gate(projected, self.dt_bias, A, self.D, conv.weight, conv.bias, **options)

    def project_and_run(
        self, x: Tensor, matrix: Tensor, workspace: Workspace | None, *, backwards: bool = False
    ) -> Tensor:
        """`conv_scan_gate` of x projected by `matrix`, in the workspace if given: (b, t, d), (·, d) → (b, t, h·p)."""
        if workspace is None:
            return self.conv_scan_gate(functional.linear(x, matrix), backwards=backwards)[0]
        frames = x.shape[0] * x.shape[1]
        torch.mm(x.flatten(0, 1), matrix.mT, out=workspace.projected[:frames])
        buffers = (workspace.projected, workspace.gated)
        projected, y = (buffer[:frames].unflatten(0, x.shape[:2]) for buffer in buffers)
        self.conv_scan_gate(projected, backwards=backwards, out=y)
        return y


class CpuBlock(BlockwiseBlock):
    """`BidirectionalBlock` with the C++ kernel, in fewer passes because adjacent matrices are combined.

        u = x / rms(x)      y_f = kernel(W_f γ_f u),   y_b = kernel(W_b γ_b u), from the last frame to the first
        out = M_f (x + O_f y_f) + M_b (x + O_b y_b) + m + x = (M_f + M_b) x + M_f O_f y_f + M_b O_b y_b + m + x

    W and O are the input and output projections of a mixer, γ the gain of the norm before it, [M_f M_b] and m the
    weight and bias of the merging Linear. The inner modules are not called, so their hooks do not run. If one of them
    has a different class, the modules are called as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, d) → (b, length, d)."""
        return self.fused_forward(x) if self.fuses(x) else super().forward(x)

    def fuses(self, x: Tensor) -> bool:
        """Whether both directions have mixers of the same size and the C++ kernel runs for x."""
        directions = (self.forwards, self.backwards)
        if type(self.merge) is not nn.Linear or any(
            type(way) is not PreNormResidual or type(way.norm) is not RMSNorm or type(way.mixer) is not CpuMamba2
            for way in directions
        ):
            return False
        f, g = (cast("CpuMamba2", way.mixer) for way in directions)
        return f.proj_sizes == g.proj_sizes and f.takes(x) and g.takes(x)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Compute `forward` by the equations in the docstring of the class."""
        directions = (self.forwards, self.backwards)
        mixers = [cast("CpuMamba2", way.mixer) for way in directions]
        dtype = matmul_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            gains = [way.norm.weight for way in directions]
            into = [(mixer.in_proj.weight.float() * gain).to(dtype) for mixer, gain in zip(mixers, gains, strict=True)]
            halves = self.merge.weight.float().split(x.shape[-1], dim=1)
            out = [(half @ mixer.output_matrix().float()).to(dtype) for half, mixer in zip(halves, mixers, strict=True)]
            across, bias = sum(halves).to(dtype), self.merge.bias.to(dtype)
            workspace = None if torch.is_grad_enabled() else Workspace(x, mixers[0], dtype)

            def run(x: Tensor) -> Tensor:
                u = self.normalise(x).to(dtype)
                merged = torch.addmm(bias, x.flatten(0, 1).to(dtype), across.mT)
                for i, mixer in enumerate(mixers):
                    y = mixer.project_and_run(u, into[i], workspace, backwards=i == 1)
                    merged.addmm_(y.flatten(0, 1), out[i].mT)
                return x + merged.view_as(x)

            return block_by_block(run, x, workspace.max_sequences if workspace else None)

    @staticmethod
    def normalise(x: Tensor) -> Tensor:
        """x / rms(x), without a gain."""
        takes = x.shape[-1] % cpu.WIDTH_MULTIPLE == 0 and x.dtype in cpu.TOLERANCE
        if torch.is_grad_enabled() or not takes or cpu.self_test_error(x.dtype) is not None:
            return functional.rms_norm(at_least_fp32(x), (x.shape[-1],), None, EPS).to(x.dtype)
        return cpu.rms_norm(x, None, EPS)
