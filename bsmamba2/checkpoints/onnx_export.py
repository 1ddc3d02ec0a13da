"""Export a model to ONNX, a file format that programs in many languages can run without PyTorch.

The file holds the part of the model from spectrogram to masks, in real numbers, because ONNX lacks complex numbers:

    spectrogram (c, f, t, 2)  →  bands → (time, band) × L → norm → mask estimators  →  masks (stem, c, f, t, 2)

The last axis holds the real and imaginary parts; t may be any number of frames. The program that runs the file must
compute the STFT, multiply it by the masks and invert it. The metadata entry `config` holds the `ModelConfig` as JSON.
The page "Use it" of the book has an example.

PyTorch's exporter rejects complex numbers and takes minutes for the thousands of operations that it traces, so we
write the nodes of the core's forward methods ourselves. One thing differs: the scan also computes the recurrence
between chunks as a matrix product, so that the graph has no loop. The export needs the packages onnx and onnxruntime
(the extra `export`). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..atomic_write import write_atomically
from ..mamba2 import EPS, Mamba2
from ..model import BSMamba2
from ..ssd import CHUNK

OPSET = 18
"""Version of the ONNX operator set."""
TOLERANCE = 1e-4
"""Largest allowed error of the exported masks, relative to the largest mask value."""


def export_onnx(model: BSMamba2, path: Path) -> float:
    """Write a model as an ONNX file, after checking its masks with ONNX Runtime on random input.

    Args:
        model: a float32 model with Mamba-2 layers.
        path: output file, replaced if it exists.

    Returns:
        The largest error of the masks, relative to the largest mask value.

    Raises:
        ImportError: without the packages onnx and onnxruntime.
        ValueError: for layers other than Mamba-2, or when the error is above `TOLERANCE`.
        OSError: when the file cannot be written.
    """
    try:
        import onnxruntime

        content = onnx_bytes(model)
    except ImportError as missing:
        fix = "pip install 'bsmamba2[export]'"
        raise ImportError(f"the export needs onnx and onnxruntime ({missing}): {fix}") from missing
    shape = model.config.channels, model.config.bins, 2 * CHUNK + 1, 2
    spectrogram = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.view_as_real(model.masks(torch.view_as_complex(spectrogram)[None]))[0]
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"spectrogram": spectrogram.numpy()})[0])
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise ValueError(f"{path}: not written, the exported masks differ from the model's by {error:.1e}")
    write_atomically(path, content)
    return error


class _Graph:
    """Nodes of an ONNX graph: `g.MatMul(x, weight)` appends a node and returns the name of its output.

    An input is the name of an output, or a constant: a tensor, a number, or a list of whole numbers.
    """

    def __init__(self) -> None:
        import onnx

        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        return partial(self.append, operator)

    def append(self, operator: str, *inputs: Any, outputs: int | None = None, **attributes: Any) -> Any:
        """Append a node; returns the name of its output, or, with `outputs`, a list of that many names."""
        names = [value if isinstance(value, str) else self.constant(torch.as_tensor(value)) for value in inputs]
        results = [f"{operator}_{len(self.nodes)}_{i}" for i in range(outputs or 1)]
        self.nodes.append(self.onnx.helper.make_node(operator, names, results, **attributes))
        return results if outputs else results[0]

    def constant(self, value: Tensor) -> str:
        """Add a constant; returns its name. A matrix that float16 represents exactly is stored as float16."""
        value = value.detach().cpu().contiguous()
        narrow = value.dtype == torch.float32 and value.dim() > 1 and torch.equal(value.half().float(), value)
        name = f"constant_{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array((value.half() if narrow else value).numpy(), name))
        return self.Cast(name, to=self.onnx.TensorProto.FLOAT) if narrow else name


def onnx_bytes(model: BSMamba2) -> bytes:
    """Content of the ONNX file; arguments and errors as for `export_onnx`, but the masks are not checked."""
    g, config, bands = _Graph(), model.config, list(model.band_split.bands)
    x = g.Reshape(g.Transpose("spectrogram", perm=[2, 1, 0, 3]), [0, -1])  # (t, f·c·2)
    parts = g.Split(x, model.band_split.widths, axis=1, outputs=len(bands))
    parts = [_linear(g, _unit_norm(g, part, band.norm), band.linear) for part, band in zip(parts, bands, strict=True)]
    x = g.Reshape(g.Concat(*parts, axis=1), [0, len(bands), -1])  # (t, k, d)
    for layer in model.layers:
        x = _bidirectional(g, g.Transpose(x, perm=[1, 0, 2]), layer.time, CHUNK)  # (k, t, d)
        x = _bidirectional(g, g.Transpose(x, perm=[1, 0, 2]), layer.band, None)  # (t, k, d)
    x = g.Reshape(_unit_norm(g, x, model.final_norm), [0, -1])
    parts = g.Split(x, [config.dim] * len(bands), axis=1, outputs=len(bands))  # (t, d) each
    masks = []
    for estimator in model.mask_estimators:
        of_bands = [_mask(g, part, band) for part, band in zip(parts, cast(Any, estimator).bands, strict=True)]
        mask = g.Reshape(g.Concat(*of_bands, axis=1), [0, config.bins, config.channels, 2])  # (t, f, c, 2)
        masks.append(g.Unsqueeze(g.Transpose(mask, perm=[2, 1, 0, 3]), [0]))  # (1, c, f, t, 2)
    g.nodes.append(g.onnx.helper.make_node("Concat", masks, ["masks"], axis=0))

    helper, shape = g.onnx.helper, [config.channels, config.bins, "t", 2]
    tensor = partial(helper.make_tensor_value_info, elem_type=g.onnx.TensorProto.FLOAT)
    ends = [tensor("spectrogram", shape=shape)], [tensor("masks", shape=[len(masks), *shape])]
    graph = helper.make_graph(g.nodes, "BSMamba2", *ends, g.constants)
    file = helper.make_model_gen_version(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    helper.set_model_props(file, {"config": config.to_json()})
    g.onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString()


def _linear(g: _Graph, x: str, layer: Any) -> str:
    y = g.MatMul(x, layer.weight.T)
    return y if layer.bias is None else g.Add(y, layer.bias)


def _unit_norm(g: _Graph, x: str, norm: Any) -> str:
    return g.Mul(g.Div(x, g.Max(g.ReduceL2(x, [-1]), 1e-12)), norm.gain * len(norm.gain) ** 0.5)


def _rms_norm(g: _Graph, x: str, norm: Any) -> str:
    return g.Mul(g.Div(x, g.Sqrt(g.Add(g.ReduceMean(g.Pow(x, 2.0), [-1]), EPS))), norm.weight)


def _silu(g: _Graph, x: str) -> str:
    return g.Mul(x, g.Sigmoid(x))


def _mask(g: _Graph, x: str, band: Any) -> str:
    """Linear, tanh, Linear, GLU; without ONNX Runtime's Sigmoid, which is inexact near 0, where most gates are."""
    y = _linear(g, g.Tanh(_linear(g, x, band.expand)), band.project)
    value, gate = g.Split(y, axis=-1, num_outputs=2, outputs=2)
    return g.Div(value, g.Add(g.Exp(g.Neg(gate)), 1.0))


def _bidirectional(g: _Graph, x: str, block: Any, chunk: int | None) -> str:
    """Bidirectional block, (b, t, d) → (b, t, d)."""

    def flip(x: str) -> str:
        return g.Slice(x, [-1], [-(2**62)], [1], [-1])

    def read(x: str, layer: Any) -> str:
        return g.Add(x, _mixer(g, _rms_norm(g, x, layer.norm), layer.mixer, chunk))

    both = g.Concat(read(x, block.forwards), flip(read(flip(x), block.backwards)), axis=-1)
    return g.Add(_linear(g, both, block.merge), x)


def _mixer(g: _Graph, x: str, mixer: Any, chunk: int | None) -> str:
    """Mamba-2 mixer, (b, t, d) → (b, t, d); the scan has chunks of `chunk` frames, or only one if `chunk` is None."""
    if not isinstance(mixer, Mamba2):
        raise ValueError(f"only a model with Mamba-2 layers can be exported, not with {type(mixer).__name__}")
    frames = g.Shape(x, start=1, end=2)
    if chunk:  # zeros fill the last chunk; no output depends on a later frame
        x = g.Pad(x, g.Concat([0, 0, 0, 0], g.Mod(g.Neg(frames), [chunk]), [0], axis=0))
    z, xBC, dt = g.Split(_linear(g, x, mixer.in_proj), list(mixer.proj_sizes), axis=-1, outputs=3)
    conv = mixer.conv1d
    xBC = g.Transpose(xBC, perm=[0, 2, 1])
    xBC = g.Conv(xBC, conv.weight, conv.bias, group=conv.groups, pads=[conv.kernel_size[0] - 1, 0])
    xBC = g.Transpose(_silu(g, xBC), perm=[0, 2, 1])
    y = _scan(g, xBC, g.Softplus(g.Add(dt, mixer.dt_bias)), mixer, chunk)
    y = _linear(g, _rms_norm(g, g.Mul(y, _silu(g, z)), mixer.norm), mixer.out_proj)
    return g.Slice(y, [0], frames, [1]) if chunk else y


def _scan(g: _Graph, xBC: str, dt: str, mixer: Mamba2, chunk: int | None) -> str:
    """`ssd.chunked`: xBC (b, t, w) after the convolution, dt (b, t, h) → (b, t, h·p)."""
    (inner, n, _), h, p = mixer.conv_sizes, len(mixer.D), mixer.headdim
    double, chunks = g.onnx.TensorProto.DOUBLE, [0, -1, chunk] if chunk else [0, 1, -1]  # b, l, q

    def exp(x: str) -> str:
        return g.Exp(g.Cast(x, to=g.onnx.TensorProto.FLOAT))

    def decay(rows: str, columns: str, diagonal: int) -> str:
        """exp(rows_i − columns_j) on and below a diagonal, zero above."""
        return g.Trilu(exp(g.Sub(g.Unsqueeze(rows, [-1]), g.Unsqueeze(columns, [-2]))), diagonal, upper=0)

    parts = g.Split(xBC, list(mixer.conv_sizes), axis=-1, outputs=3)
    sizes = [h, p], [1, n], [1, n]
    x, B, C = (  # (b, h, l, q, p), (b, 1, l, q, n), (b, 1, l, q, n)
        g.Transpose(g.Reshape(part, chunks + size), perm=[0, 3, 1, 2, 4])
        for part, size in zip(parts, sizes, strict=True)
    )
    dt = g.Transpose(g.Reshape(dt, [*chunks, h]), perm=[0, 3, 1, 2])  # (b, h, l, q)
    A = -mixer.A_log.double().exp()[:, None, None]
    cumsum_dtA = g.CumSum(g.Mul(g.Cast(dt, to=double), A), 3)
    inputs = g.Mul(x, g.Unsqueeze(dt, [-1]))
    scores = g.MatMul(C, g.Transpose(B, perm=[0, 1, 2, 4, 3]))
    y = g.MatMul(g.Mul(scores, decay(cumsum_dtA, cumsum_dtA, 0)), inputs)  # (b, h, l, q, p)
    if chunk:
        total = g.Slice(cumsum_dtA, [-1], [2**62], [3])  # (b, h, l, 1)
        to_end = g.Unsqueeze(exp(g.Sub(total, cumsum_dtA)), [-1])
        added = g.MatMul(g.Transpose(g.Mul(inputs, to_end), perm=[0, 1, 2, 4, 3]), B)  # (b, h, l, p, n)
        total = g.Squeeze(total, [3])
        across = decay(g.CumSum(total, 2, exclusive=1), g.CumSum(total, 2), -1)  # (b, h, l, l)
        before = g.Reshape(g.MatMul(across, g.Reshape(added, [0, 0, 0, p * n])), [0, 0, 0, p, n])
        found = g.MatMul(C, g.Transpose(before, perm=[0, 1, 2, 4, 3]))
        y = g.Add(y, g.Mul(found, g.Unsqueeze(exp(cumsum_dtA), [-1])))
    y = g.Add(y, g.Mul(x, mixer.D[:, None, None, None]))
    return g.Reshape(g.Transpose(y, perm=[0, 2, 3, 1, 4]), [0, -1, inner])
