"""State dicts: find a model's weights in the file of a training program, under wrappers and prefixes, and check them.

    {"epoch": 7, "model_state_dict": {"module." + name: tensor}, "optimizer": …}   →   {name: tensor}

Sources: `save_weights` and `load_start_checkpoint` of ZFTurbo's Music-Source-Separation-Training, PyTorch's
DistributedDataParallel and compile, PyTorch Lightning, ema_pytorch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..settings import short_repr
from .published_layout import is_model_name
from .safe_pickle import Skipped

WRAPPERS = ("state_dict", "state", "model_state_dict", "model", "ema_model", "ema")
PREFIX = re.compile(r"(?:(?:module|_orig_mod|model|ema_model|online_model|ema)[.])*")


@dataclass(frozen=True)
class FoundWeights:
    """The weights in a file.

    Attributes:
        tensors: name → tensor, without prefixes.
        averages: EMA weights in the order of `tensors`; empty if there are none.
        lightning: whether `tensors` were under `state_dict`, as PyTorch Lightning writes them.
        only_averages: whether `tensors` are the EMA weights themselves, because the file has no others.
    """

    tensors: dict[str, Tensor]
    averages: list[Tensor]
    lightning: bool = False
    only_averages: bool = False


def find_weights(content: Any) -> FoundWeights:
    """Find the weights in the content of a file; anything else in it is ignored.

    Args:
        content: the result of `safe_pickle.load_pickle`, or a dict of name → tensor.

    Raises:
        ValueError: when there are no tensors, or an entry of the model is not a tensor.
    """
    if not isinstance(content, dict) or not content:
        name = f"an object of {content.name}" if isinstance(content, Skipped) else f"a {type(content).__name__}"
        raise ValueError(f"holds no tensors but {name}: save a state dict")
    if content.keys() >= {"settings", "random", "ema"}:
        raise ValueError("is a state of a training run: load best.safetensors or last.safetensors of its folder")
    raw: dict[str, Tensor] = {}
    ema: dict[str, Tensor] = {}
    for averaged, entries in _dicts(content, False, set()):
        for prefix, group in _groups(entries).items():
            best = ema if averaged or "ema" in prefix else raw
            if len(group) > len(best) and any(map(is_model_name, group)):
                best.clear()
                best.update(group)
    lightning = isinstance(content.get("state_dict"), dict)
    if raw:
        averages = [ema[name] for name in raw if name in ema] or _lightning_ema(content.get("optimizer_states"))
        return FoundWeights(raw, averages, lightning)
    if ema:
        return FoundWeights(ema, list(ema.values()), lightning, only_averages=True)
    for _, entries in _dicts(content, False, set()):  # of a different model; the caller reports which
        if tensors := {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, Tensor)}:
            return FoundWeights(tensors, [], lightning)
    name, value = next(iter(entries.items()), ("", None))
    name = PREFIX.sub("", name, count=1) if isinstance(name, str) else name
    fault = f"entry {short_repr(name)} is not a tensor but {_kind(value)}"
    raise ValueError(f"holds no tensors: {fault}: save a state dict")


def _dicts(content: dict[Any, Any], averaged: bool, seen: set[int]) -> Iterator[tuple[bool, dict[Any, Any]]]:
    """Yield a dict and the dicts wrapped in it, each with a flag that is true if its weights are averages."""
    seen.add(id(content))
    yield averaged, content
    for key in WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, dict) and id(inner) not in seen and len(seen) < 20:
            yield from _dicts(inner, averaged or key.startswith("ema"), seen)


def _groups(entries: dict[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by prefix: prefix → name without prefix → tensor."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in entries.items():
        if not isinstance(name, str):
            continue
        rest = PREFIX.sub("", name, count=1)
        if isinstance(value, Tensor):
            groups.setdefault(name.removesuffix(rest), {})[rest] = value
        elif is_model_name(rest):
            raise ValueError(f"is not a state dict: entry {rest!r} is not a tensor but {_kind(value)}")
    return groups


def _kind(value: object) -> str:
    return f"{value.name} (nothing in it was run)" if isinstance(value, Skipped) else type(value).__name__


def _lightning_ema(optimizer_states: object) -> list[Tensor]:
    """EMA weights that NeMo's callback stores in a Lightning file, in the order of the parameters."""
    for entry in optimizer_states if isinstance(optimizer_states, list) else []:
        averages = entry.get("ema") if isinstance(entry, dict) else None
        if isinstance(averages, list | tuple) and all(isinstance(value, Tensor) for value in averages):
            return list(averages)
    return []


def misfit(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], kind: str = "") -> str | None:
    """Message about missing, unexpected, misshapen or non-floating-point tensors; None if all tensors fit."""
    faults = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [f"{name:.100}" for name in state if name not in expected],
        "of the wrong shape": [
            f"{name}: {short_repr(tuple(state[name].shape))}, expected {shape}"
            for name, shape in expected.items()
            if name in state and state[name].shape != shape
        ],
        "not plain floating-point": [
            f"{name:.100}: {tensor.dtype}, {tensor.layout}, {tensor.device}"
            for name, tensor in state.items()
            if not tensor.is_floating_point() or "float4" in str(tensor.dtype)
            or tensor.layout != torch.strided or tensor.is_meta
        ],
    }  # fmt: skip
    reasons = [
        f"{len(n)} {kind}tensors {fault}: {'; '.join(n[:4] + [f'and {len(n) - 4} more'] * (len(n) > 4))}"
        for fault, n in faults.items() if n
    ]  # fmt: skip
    advice = "Use a whole file of this model, or give the config= that it was made with"
    return f"does not fit a BSMamba2 with {len(expected)} tensors. {'. '.join(reasons)}. {advice}" if reasons else None


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Message about the first tensor with NaN or infinite values; None if all values are finite."""
    bad = next((name for name, tensor in state.items() if not torch.isfinite(tensor).all()), None)
    return None if bad is None else f"{bad} has NaN or infinite values: use an earlier checkpoint"


def own_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of the tensors on the CPU, each with its own memory."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def sha256_state(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all names, types, shapes and values, and of the metadata, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
