"""Checkpoints: load and save a model, in our layout and in both published ones.

    bsmamba2    safetensors: our names; the configuration, a format version and a hash in the metadata
    published   torch.save of {published name: tensor}, as in `bs_mamba2_vocals.ckpt`
    lightning   torch.save of {"state_dict": {"model." + published name: tensor}, ...}, as in the authors' file

Wrappers and prefixes of training programs are removed (`state_dict`). Nothing in a file is ever executed
(`safe_pickle`). Book: "The whole model". Sources: the authors' code (github.com/EuiYeonKim/BSMamba2, 42eb8c8) and,
for the EMA entry, the callback of the training code that it builds on (amanteur/BandSplitRNN-PyTorch,
src/utils/callbacks.py, from NVIDIA NeMo).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import ssd
from ..atomic_write import write_atomically
from ..config import ModelConfig
from ..model import BSMamba2
from ..settings import expand_user
from .published_layout import (
    choose_config,
    expected_shapes,
    from_published,
    is_published,
    to_published,
    unsupported_variant,
)
from .safe_pickle import load_pickle
from .state_dict import FoundWeights, find_weights, misfit, not_finite, own_copies, sha256_state

Layout = Literal["bsmamba2", "published", "lightning"]
Weights = Literal["auto", "ema", "raw"]
FORMAT_VERSION = 2
HASH_KEY = "bsmamba2.sha256"

BUNDLED_CHECKPOINT = Path(__file__).parents[1] / "weights" / "small.safetensors"
"""Checkpoint bundled with the package; the default of the commands."""


class CheckpointError(ValueError):
    """A file that cannot be read as a BSMamba2; the message names the file, the fault and the fix."""


@dataclass(frozen=True)
class Checkpoint:
    """Contents of a checkpoint file: the configuration, and the weights under our names, in float32 on the CPU.

    Attributes:
        path: the file.
        layout: one of the three layouts.
        weights: `ema` for moving averages, otherwise `raw`.
        config: the stored, given or inferred configuration (see `read_checkpoint`).
        state: name → tensor, with exactly the names of `BSMamba2(config).state_dict()`.
        metadata: further entries that were passed to `save_checkpoint`.
        notes: lines for the user: the weights that were loaded, and the settings that were assumed.
    """

    path: Path
    layout: Layout
    weights: Literal["ema", "raw"]
    config: ModelConfig
    state: dict[str, Tensor]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()

    def model(self, *, scan: ssd.Scan | str = ssd.chunked) -> BSMamba2:
        """Build the model, in evaluation mode, on the CPU; `scan` is a function or the name of one in `ssd`."""
        model = _empty_model(self.config, scan)
        model.load_state_dict(self.state, strict=True, assign=True)
        return model.eval()


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "auto",
    config: ModelConfig | str | os.PathLike[str] | None = None,
    scan: ssd.Scan | str = ssd.chunked,
) -> BSMamba2:
    """Load a model from a file of any layout; the model is in evaluation mode, in float32, on the CPU.

    Other arguments and errors are those of `read_checkpoint`. `scan` is a function such as `ssd.chunked`, or its name:
    "recurrent", "matrix" or "chunked".
    """
    return read_checkpoint(path, weights=weights, config=config).model(scan=scan)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "auto",
    config: ModelConfig | str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Read a checkpoint of any layout, which is recognised by the file's content, not its name.

    A published file has no configuration, so widths, depth, bands and the number of stems are inferred from the
    tensors. The rest comes from a YAML file of the training toolbox (`config.read_config`) in the same folder, if one
    fits, or is assumed: 44,100 Hz; hop 441 (n_fft / 4 if that is too long); a window of n_fft; two channels, or one if
    only then n_fft = 2·(bins - 1) is a power of two; stem `vocals`, or `stem_0`, `stem_1`, … for several.

    A Lightning file of the authors' code has the raw weights in `state_dict` and their moving averages, in the order
    of the parameters, under `optimizer_states` in a list `ema` (read from code, not seen in their file). Their training
    validates with the averages; their `evaluate.py` and `inference.py` use the raw weights.

    Args:
        path: the file.
        weights: `ema` or `raw`, for a file that has both; `auto` prefers the averages.
        config: the architecture, if the file has none or the assumptions do not fit; or a YAML or JSON file with some
            of its fields.

    Returns:
        The checkpoint. Weights of any floating type become float32 and share no memory.

    Raises:
        CheckpointError: when the file is not a checkpoint, is truncated or damaged, holds a different model, lacks the
            requested `weights`, or has tensors that are missing, unexpected, misshapen, not floating-point or not
            finite.
        FileNotFoundError: when the file does not exist.
    """
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights={weights!r} must be 'auto', 'ema' or 'raw'")
    path = expand_user(path)
    found, metadata = _read_file(path)
    tensors, averages = found.tensors, found.averages
    version, stored = metadata.pop("bsmamba2.format", None), metadata.pop("bsmamba2.config", None)
    if version not in (None, str(FORMAT_VERSION)):
        fix = "it is older than the first release, train it again" if version == "1" else "update bsmamba2"
        raise CheckpointError(f"{path} has format {version!r:.20}, this is format {FORMAT_VERSION}: {fix}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if variant := unsupported_variant(shapes):
        raise CheckpointError(f"{path} is {variant}, which bsmamba2 does not have: use a file of BSMamba2 itself")
    published = stored is None and is_published(tensors)
    layout: Layout = "lightning" if found.lightning else "published" if published else "bsmamba2"
    notes: list[str] = []
    try:
        if not isinstance(config, ModelConfig):
            config, notes = choose_config(path, shapes, stored, Path(config) if config else None)
        if config.depth + len(config.freqs_per_bands) * len(config.stems) > len(tensors):
            raise ValueError(f"{len(tensors)} tensors are too few for its layers, bands and stems")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        fix = "name its configuration with --config FILE or config="
        raise CheckpointError(f"{path}: no usable configuration: {error}; {fix}") from error
    expected = expected_shapes(config, published=published)
    if fault := misfit(tensors, expected):
        raise CheckpointError(f"{path} {fault}")
    if weights == "raw" and found.only_averages:
        raise CheckpointError(f"{path} holds EMA weights only: use weights='ema'")
    used: Literal["ema", "raw"] = "raw" if weights == "raw" or (weights == "auto" and not averages) else "ema"
    if used == "ema":
        if len(averages) != len(tensors):
            fault = f"{len(averages)} EMA weights for {len(tensors)} parameters"
            raise CheckpointError(f"{path} holds {fault}: use weights='raw'")
        tensors = dict(zip(tensors, averages, strict=True))
        if fault := misfit(tensors, expected, "EMA "):
            raise CheckpointError(f"{path} {fault}")
        choice = "the file has no others" if found.only_averages else "weights='raw' (--weights raw) loads the raw ones"
        theirs = ", which the authors' own evaluation uses" if found.lightning and not found.only_averages else ""
        notes.append(f"EMA weights (moving averages) are loaded; {choice}{theirs}")
    tensors = from_published(tensors) if published else tensors
    state = own_copies({name: tensor.to(torch.float32) for name, tensor in tensors.items()})
    if fault := not_finite(state):
        raise CheckpointError(f"{path}: {fault}")
    metadata.pop("format", None)
    return Checkpoint(path, layout, used, config, state, metadata, tuple(f"{path}: {note}" for note in notes))


def save_checkpoint(
    model: BSMamba2,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "bsmamba2",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a model atomically: if saving fails, an existing file at `path` is unchanged.

    Args:
        model: the model to save; its weights keep their data type.
        path: output file, replaced if it exists; its folder must exist.
        layout: `bsmamba2`; or `published` or `lightning`, which store only the weights (`lightning` only in
            `state_dict`, because the authors' evaluation and inference read nothing else).
        metadata: further strings for a `bsmamba2` file (returned in `read_checkpoint(path).metadata`).

    Raises:
        CheckpointError: when a weight is not finite, or the model does not match its configuration (a custom
            `sequence_layer`).
        OSError: when the file cannot be written, for example on a full disk; the message names `path`.
        ValueError: for an unknown layout, or metadata that cannot be stored.
    """
    if layout not in ("bsmamba2", "published", "lightning"):
        raise ValueError(f"layout={layout!r} must be 'bsmamba2', 'published' or 'lightning'")
    entries = dict(metadata or {})
    if entries and layout != "bsmamba2":
        raise ValueError(f"layout {layout!r} has no place for metadata: leave it out, or use 'bsmamba2'")
    for key, value in entries.items():
        if key == "format" or key.startswith("bsmamba2.") or not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: {value!r} must be a string under a name of your own")
    state = own_copies(model.state_dict())
    if fault := misfit(state, expected_shapes(model.config)) or not_finite(state):
        raise CheckpointError(f"the model to save: {fault}")
    if layout == "bsmamba2":
        ours = {"bsmamba2.format": str(FORMAT_VERSION), "bsmamba2.config": model.config.to_json()}
        payload = _serialize(state, {**entries, "format": "pt", **ours})
    else:
        content: dict[str, Any] = to_published(state)
        if layout == "lightning":
            content = {"state_dict": {f"model.{name}": tensor for name, tensor in content.items()}}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
    write_atomically(expand_user(path), payload)


def bundled_checkpoint() -> Path:
    """Path of the checkpoint bundled with the package; raises CheckpointError if this copy has none."""
    if not BUNDLED_CHECKPOINT.is_file():
        fix = "name one with --checkpoint, or run `make train` and name book/results/first_run/checkpoint.safetensors"
        raise CheckpointError(f"this copy of bsmamba2 has no checkpoint ({BUNDLED_CHECKPOINT} is missing): {fix}")
    return BUNDLED_CHECKPOINT


def _read_file(path: Path) -> tuple[FoundWeights, dict[str, str]]:
    """The weights in a file, and its metadata."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is a folder or a device: name a checkpoint file")
    with path.open("rb") as file:
        head = file.read(9)
    try:
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:
            with safe_open(path, framework="pt") as reader:
                tensors = {name: reader.get_tensor(name) for name in list(reader.keys())}
                metadata = dict(reader.metadata() or {})
            if (recorded := metadata.pop(HASH_KEY, None)) not in (None, sha256_state(tensors, metadata)):
                raise ValueError(f"is damaged: its content does not have the SHA-256 {recorded!r:.12}… that it records")
            return find_weights(tensors) if tensors else FoundWeights({}, []), metadata
        if not head or (head[:2] == b"PK" and not zipfile.is_zipfile(path)):
            raise ValueError(f"is truncated: it ends after {path.stat().st_size:,} bytes")
        if head[:2] != b"PK" and head[:1] != b"\x80":
            raise ValueError(f"is not a checkpoint: safetensors and torch.save do not begin with {head!r}")
        found = find_weights(load_pickle(path))
        if sum(tensor.nbytes for tensor in found.tensors.values()) > 8 * path.stat().st_size + (1 << 20):
            raise ValueError("has tensors that share their memory: save it again, with a clone of each tensor")
        return found, {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error!s:.200}): get the file again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} {error}") from error


def _serialize(state: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Bytes of a safetensors file with a hash; metadata are sorted, because the library's order is arbitrary."""
    content = safetensors.torch.save(state, {**metadata, HASH_KEY: sha256_state(state, metadata)})
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[start:]))


class _SkipInit(TorchFunctionMode):
    """Skip random initialisation: weights stay uninitialised until those of a checkpoint replace them.

    Building the paper's model then takes 0.05 s and no memory. (`torch.device("meta")` would import the compiler.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _empty_model(config: ModelConfig, scan: ssd.Scan | str = ssd.chunked) -> BSMamba2:
    with _SkipInit():
        return BSMamba2(config, scan=scan)
