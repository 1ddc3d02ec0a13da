"""Safe unpickling: `torch.save` files are read without running anything that they contain.

Files of PyTorch Lightning name classes of their own (of hyper-parameters, say), which
`torch.load(weights_only=True)` rejects. Here an empty stub replaces each of them.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class _StubClass:
    """Stub of a class that a file names: calling it gives an empty dict."""

    def __new__(cls, *_: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


def load_pickle(path: Path) -> Any:
    """Unpickle a `torch.save` file safely: unknown classes become `_StubClass`, never looked up or called.

    Raises:
        ValueError: when the file is cut short, damaged or calls a function; the message says which.
    """
    try:
        with path.open("rb") as file:  # not by its name: torch.load goes by the extension .safetensors
            unknown = []
            if zipfile.is_zipfile(path):
                unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                file.seek(0)
            names = [name.rpartition(".") for name in unknown]
            stubs: list[Any] = [type(name, (_StubClass,), {"__module__": module}) for module, _, name in names]
            with torch.serialization.safe_globals(stubs):
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message proposes weights_only=False: not repeated
        rejected = re.search(r"GLOBAL (\S+)", str(error))
        detail = str(error).partition("WeightsUnpickler error:")[2].strip() or "bad pickle"
        reason = f"it calls for {rejected[1]}" if rejected else detail.splitlines()[0]
        raise ValueError(f"is damaged or not safe to read ({reason}); nothing in it was run: get it again") from None
    except Exception as error:  # any other means bad bytes: torch raises a dozen kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"is truncated or damaged ({reason}): get it again") from error


def load_state_dict(path: Path) -> tuple[dict[str, Tensor], list[Tensor], bool]:
    """Load a state dict, alone or inside a Lightning checkpoint, with `load_pickle`.

    Returns:
        Tensors by name (of a Lightning file, without its prefix `model.`), the EMA weights of a Lightning
        file (or none) in the order of its parameters, and whether the file is Lightning's.

    Raises:
        ValueError: as `load_pickle`, and when the file holds something else than tensors.
    """
    content = load_pickle(path)
    averages: list[Tensor] = []
    lightning = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
    if lightning:
        averages = _find_ema(content.get("optimizer_states"))
        content = content["state_dict"]
        if any(str(name).startswith("model.") for name in content):  # the others are windows of the featurisers
            content = {name[6:]: value for name, value in content.items() if str(name).startswith("model.")}
    if not isinstance(content, dict) or not content:
        raise ValueError(f"holds no tensors but {content!r:.60}: save a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            fault = f"entry {name!r} is no tensor but {type(value).__name__}"
            raise ValueError(f"is no state dict: {fault}: save a state dict, alone or under 'state_dict'")
    return dict(content), averages, lightning


def _find_ema(optimizer_states: object) -> list[Tensor]:
    for entry in optimizer_states if isinstance(optimizer_states, list) else []:
        averages = entry.get("ema") if isinstance(entry, dict) else None
        if isinstance(averages, list | tuple) and all(isinstance(value, Tensor) for value in averages):
            return list(averages)
    return []
