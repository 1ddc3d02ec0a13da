"""Checkpoints: a model to a file and back, in our layout and in both published ones.

    bsmamba2    safetensors: our names, the configuration and a format version in the metadata
    published   torch.save of {published name: tensor}, as `bs_mamba2_vocals.ckpt`
    lightning   torch.save of {"state_dict": {"model." + published name: tensor}, ...}, as the authors' file

Book: "The whole model". Sources: the authors' code (github.com/EuiYeonKim/BSMamba2, 42eb8c8) and,
for the EMA entry, the callback of the training code that it builds on (amanteur/BandSplitRNN-PyTorch,
src/utils/callbacks.py, from NVIDIA NeMo). Nothing that a file holds is ever executed.
Letters of the shapes below: d feature, h head, e inner width h·p, x = e + 2n, v convolution taps,
w = 2·bins·c of band k, m hidden width of the masks; a dash is a size that follows from the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import secrets
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import ssd
from .config import ModelConfig
from .model import BSMamba2

Layout = Literal["bsmamba2", "published", "lightning"]
Weights = Literal["auto", "ema", "raw"]
FORMAT_VERSION = 2

KNOWN_FILES = {  # sha256: bytes, where from
    "b1fcf93fdd6f7bc79e5410b1330b3d0fd5a6ca6ea23a94730c684629c71cd5ca": (
        770_628_060,
        "the authors' BSMamba2 vocals (Lightning checkpoint, README of EuiYeonKim/BSMamba2)",
    ),
    "fceb733b41742abb8df563092f4cb5bbc9243c6c03e7f34dc44c14e60732c72f": (
        192_610_602,
        "bs_mamba2_vocals.ckpt (ZFTurbo/Music-Source-Separation-Training, release v1.0.19)",
    ),
}

_OURS, _PUBLISHED = 0, 1
_SLOTS = {  # words that differ between our names and the published ones; the other slots hold numbers
    "axis": (("time", "band"), ("0", "1")),
    "way": (("forwards", "backwards"), ("forward", "backward")),
}


def _block(name: str, shape: str) -> tuple[str, str, str]:
    return "layers.{i}.{axis}.{way}." + name, "layers.{i}.{axis}.{way}_blocks.0." + name, shape


TENSORS = (  # every tensor of the model: our name, the published one, shape
    ("band_split.bands.{k}.norm.gain", "band_split.to_features.{k}.0.gamma", "w"),
    ("band_split.bands.{k}.linear.weight", "band_split.to_features.{k}.1.weight", "d w"),
    ("band_split.bands.{k}.linear.bias", "band_split.to_features.{k}.1.bias", "d"),
    _block("norm.weight", "d"),
    _block("mixer.dt_bias", "h"),
    _block("mixer.A_log", "h"),
    _block("mixer.D", "h"),
    _block("mixer.in_proj.weight", "- d"),
    _block("mixer.conv1d.weight", "x - v"),
    _block("mixer.conv1d.bias", "x"),
    _block("mixer.norm.weight", "e"),
    _block("mixer.out_proj.weight", "d e"),
    ("layers.{i}.{axis}.merge.weight", "layers.{i}.{axis}.linear.weight", "-"),  # (2d, d, 1) → (d, 2d)
    ("layers.{i}.{axis}.merge.bias", "layers.{i}.{axis}.linear.bias", "d"),
    ("final_norm.gain", "final_norm.gamma", "d"),
    ("mask_estimators.{s}.bands.{k}.expand.weight", "mask_estimators.{s}.to_freqs.{k}.0.0.weight", "m d"),
    ("mask_estimators.{s}.bands.{k}.expand.bias", "mask_estimators.{s}.to_freqs.{k}.0.0.bias", "m"),
    ("mask_estimators.{s}.bands.{k}.project.weight", "mask_estimators.{s}.to_freqs.{k}.0.2.weight", "2w m"),
    ("mask_estimators.{s}.bands.{k}.project.bias", "mask_estimators.{s}.to_freqs.{k}.0.2.bias", "2w"),
)


BUNDLED_CHECKPOINT = Path(__file__).parent / "weights" / "small.safetensors"
"""The checkpoint inside the package: what the commands take when none is named."""


class CheckpointError(ValueError):
    """A file that cannot be read as a BSMamba2; the message names the file, the fault and the mend."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: the configuration, and the weights in our names, float32, on the CPU.

    Attributes:
        path: the file.
        layout: which of the three layouts it has.
        weights: `ema` when they are the moving averages of a Lightning file, else `raw`: as stored.
        config: as stored, as given, or inferred (see `read_checkpoint`).
        state: name → tensor, exactly the names of `BSMamba2(config).state_dict()`.
        metadata: further entries that `save_checkpoint` was given.
    """

    path: Path
    layout: Layout
    weights: Literal["ema", "raw"]
    config: ModelConfig
    state: dict[str, Tensor]
    metadata: dict[str, str]

    def model(self, *, scan: ssd.Scan | str = "auto") -> BSMamba2:
        """The model, in evaluation mode, on the CPU; no random weights are drawn on the way.

        A checkpoint does not depend on the scan: `scan` is that of `BSMamba2`.
        """
        model = _blank(self.config, scan)
        model.load_state_dict(self.state, strict=True, assign=True)
        return model.eval()


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "auto",
    config: ModelConfig | None = None,
    scan: ssd.Scan | str = "auto",
) -> BSMamba2:
    """The model in a file of any layout, in evaluation mode, on the CPU, in float32.

    `read_checkpoint` has the same arguments and errors but for `scan`, which is that of `BSMamba2`, and also
    tells which weights were taken.
    """
    return read_checkpoint(path, weights=weights, config=config).model(scan=scan)


def read_checkpoint(
    path: str | os.PathLike[str], *, weights: Weights = "auto", config: ModelConfig | None = None
) -> Checkpoint:
    """Read a file of any layout; the layout is told from the content, never from the file's name.

    A published file carries no configuration. Widths, layers, bands and the number of stems then follow
    from the tensors. What tensors cannot tell is assumed: 44,100 Hz; hop 441 (n_fft / 4 where that is too
    long); two channels, or one if only then n_fft = 2·(bins - 1) is a power of two; the names of the stems,
    `vocals` if there is one, `stem_0`, `stem_1`, … if there are more.

    A Lightning file of the authors' code has the raw weights in `state_dict` and their moving averages, in
    the order of the parameters, under `optimizer_states` in a list `ema` (read from code, not seen in their
    file). Their training validates the averages; their `evaluate.py` and `inference.py` use the raw weights.

    Args:
        path: the file.
        weights: of a Lightning file, `ema` or `raw`; `auto` takes the averages when they are there.
        config: the architecture, when the file has none or the assumptions do not fit.

    Returns:
        The checkpoint. Weights of any floating type become float32, each in memory of its own.

    Raises:
        CheckpointError: when the file is no checkpoint, is cut short, lacks what `weights` asks for, or has
            tensors that are missing, unexpected, of another shape, not floating-point or not finite.
        FileNotFoundError: when there is no such file.
    """
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights={weights!r} must be 'auto', 'ema' or 'raw'")
    path = Path(path)
    tensors, averages, lightning, metadata = _read_tensors(path)
    version, stored = metadata.pop("bsmamba2.format", None), metadata.pop("bsmamba2.config", None)
    if version is not None and version != str(FORMAT_VERSION):
        raise CheckpointError(f"{path} has format {version!r}, this is format {FORMAT_VERSION}: update bsmamba2")
    published = stored is None and any(_match(name, _PUBLISHED) for name in tensors)
    layout: Layout = "lightning" if lightning else "published" if published else "bsmamba2"
    try:
        if config is None:
            config = (
                ModelConfig.from_mapping(json.loads(stored))
                if stored is not None
                else infer_config({_rename(name, _PUBLISHED): tuple(t.shape) for name, t in tensors.items()})
            )
        if config.depth + len(config.freqs_per_bands) * len(config.stems) > len(tensors):
            raise ValueError(f"{len(tensors)} tensors are too few for {config}")
        expected = _blank(config).state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: no usable configuration: {error}; load with config=ModelConfig(...)") from error
    wanted = to_published(expected) if published else expected
    _compare(path, tensors, wanted)
    used: Literal["ema", "raw"] = "raw" if weights == "raw" or (weights == "auto" and not averages) else "ema"
    if used == "ema":
        if len(averages) != len(tensors):
            raise CheckpointError(
                f"{path} holds {len(averages)} EMA weights for {len(tensors)} parameters: use weights='raw'"
            )
        tensors = dict(zip(tensors, averages, strict=True))
        _compare(path, tensors, wanted, "EMA ")
    state = from_published(tensors) if published else tensors
    state = {
        name: tensor.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    _refuse_nonfinite(str(path), state)
    metadata.pop("format", None)
    return Checkpoint(path, layout, used, config, state, metadata)


def save_checkpoint(
    model: BSMamba2,
    path: str | os.PathLike[str],
    *,
    layout: Layout = "bsmamba2",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a model to a file, whole or not at all: whatever fails, an older file at `path` stays as it was.

    Args:
        model: its weights are stored in the type that they have.
        path: replaced when it exists; its folder must exist.
        layout: `bsmamba2`, or `published` or `lightning`, which carry the weights alone (`lightning` only its
            `state_dict`, all that the authors' evaluation and inference read).
        metadata: further strings to keep in a `bsmamba2` file (`read_checkpoint(path).metadata`).

    Raises:
        CheckpointError: when a weight is not finite, or the model is not what its configuration describes
            (another `sequence_layer`).
        OSError: when the file cannot be written, a full disk for one; it names `path`.
        ValueError: for an unknown layout, or metadata that cannot be kept.
    """
    if layout not in ("bsmamba2", "published", "lightning"):
        raise ValueError(f"layout={layout!r} must be 'bsmamba2', 'published' or 'lightning'")
    entries = dict(metadata or {})
    if entries and layout != "bsmamba2":
        raise ValueError(f"layout {layout!r} has no place for metadata: leave it out, or use 'bsmamba2'")
    for key, value in entries.items():
        if key == "format" or key.startswith("bsmamba2.") or not isinstance(value, str):
            raise ValueError(f"metadata {key!r}: {value!r} must be a string under a name of your own")
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    _compare("the model to save", state, _blank(model.config).state_dict())
    _refuse_nonfinite("the model to save", state)
    if layout == "bsmamba2":
        entries |= {
            "format": "pt",
            "bsmamba2.format": str(FORMAT_VERSION),
            "bsmamba2.config": model.config.to_json(),
        }
        payload = safetensors.torch.save(state, entries)
    else:
        content: dict[str, Any] = to_published(state)
        if layout == "lightning":
            content = {"state_dict": {f"model.{name}": tensor for name, tensor in content.items()}}
        buffer = io.BytesIO()
        torch.save(content, buffer)
        payload = buffer.getvalue()
    write_whole(Path(path).resolve(), payload)  # of a link, what it points to


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names and shapes → the published ones; a name that is not ours stays, and so does the order."""
    return {
        _rename(name, _OURS): tensor.T.unsqueeze(-1).contiguous() if name.endswith(".merge.weight") else tensor
        for name, tensor in state.items()
    }


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names and shapes → ours; a name that is not published stays, and so does the order."""
    renamed = {_rename(name, _PUBLISHED): tensor for name, tensor in state.items()}
    return {
        name: tensor.squeeze(-1).T.contiguous() if name.endswith(".merge.weight") else tensor
        for name, tensor in renamed.items()
    }


def describe_known_file(path: str | os.PathLike[str]) -> str | None:
    """What a published file is, by its SHA-256, or None; hashed only when its size is that of a known one."""
    path = Path(path)
    for digest, (size, name) in KNOWN_FILES.items():
        if path.stat().st_size == size:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    return f"{name}; no licence is stated for the weights"
    return None


def bundled_checkpoint() -> Path:
    """The checkpoint that comes with the package.

    Raises:
        CheckpointError: when this copy of the package has none.
    """
    if not BUNDLED_CHECKPOINT.is_file():
        raise CheckpointError(
            f"no checkpoint comes with this copy of bsmamba2 ({BUNDLED_CHECKPOINT} is missing): name one with --checkpoint, "
            f"or run `make train` and name book/results/first_run/checkpoint.safetensors"
        )
    return BUNDLED_CHECKPOINT


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The configuration that tensors of these shapes have; `read_checkpoint` says what is assumed.

    Each tensor votes for the sizes that its shape shows, and an index counts when it has more than half as
    many tensors as the fullest one: a tensor that is missing, left over or misshapen is outvoted, so that
    it can be named instead of being believed.

    Args:
        shapes: our name → shape; other names are passed over.

    Raises:
        ValueError: when they do not make a configuration.
    """
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    indices: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for name, shape in shapes.items():
        matched = _match(name, _OURS)
        if matched is None:
            continue
        row, found = matched
        for slot in "iks":
            if slot in found:
                indices[slot][int(found[slot])] += 1
        letters = row[2].split()
        if len(letters) == len(shape):
            for letter, length in zip(letters, shape, strict=True):
                share = 2 if letter[0] == "2" else 1
                votes[letter[-1] + (found["k"] if letter[-1] == "w" else "")][length // share] += 1

    if not votes:
        raise ValueError(f"of {len(shapes)} tensors none is of BSMamba2: {', '.join(sorted(shapes)[:3])}, …")

    def size(letter: str) -> int:
        if not votes[letter]:
            raise ValueError(f"no tensor shows the size {letter!r}")
        return votes[letter].most_common(1)[0][0]

    def count(slot: str) -> int:
        fullest = max(indices[slot].values(), default=0)
        return 1 + max((index for index, n in indices[slot].items() if 2 * n > fullest), default=-1)

    d, e, x, h = size("d"), size("e"), size("x"), size("h")
    widths = [size(f"w{k}") for k in range(count("k"))]
    for channels in (2, 1):
        bins = [width // (2 * channels) for width in widths]
        n_fft = 2 * (sum(bins) - 1)
        if sum(bins) * 2 * channels == sum(widths) and n_fft > 0 and n_fft.bit_count() == 1:
            break
    else:
        raise ValueError(f"bands of {sum(widths)} features in all fit no n_fft that is a power of two")
    stems = ("vocals",) if count("s") == 1 else tuple(f"stem_{s}" for s in range(count("s")))
    hop_length = ModelConfig.hop_length if n_fft >= 2 * ModelConfig.hop_length else n_fft // 4
    return ModelConfig(
        dim=d, depth=count("i"), freqs_per_bands=tuple(bins), stems=stems, channels=channels, n_fft=n_fft, hop_length=hop_length,
        d_state=(x - e) // 2, headdim=e // max(h, 1), expand=e // max(d, 1), d_conv=size("v"),
        mask_expand=size("m") // max(d, 1),
    )  # fmt: skip


def _compile(row: tuple[str, str, str], side: int) -> re.Pattern[str]:
    pattern = row[side].replace(".", "[.]")
    for slot in "iks":
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>0|[1-9][0-9]*)")
    for slot, words in _SLOTS.items():
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{'|'.join(words[side])})")
    return re.compile(pattern)


_PATTERNS = [(row, (_compile(row, _OURS), _compile(row, _PUBLISHED))) for row in TENSORS]


def _match(name: str, side: int) -> tuple[tuple[str, str, str], dict[str, str]] | None:
    """The row of `TENSORS` that a name belongs to, and what its slots hold."""
    for row, patterns in _PATTERNS:
        if found := patterns[side].fullmatch(name):
            return row, found.groupdict()
    return None


def _rename(name: str, side: int) -> str:
    """The name on the other side; a name that is not of this side stays."""
    matched = _match(name, side)
    if matched is None:
        return name
    row, slots = matched
    for slot in slots.keys() & _SLOTS.keys():
        slots[slot] = _SLOTS[slot][1 - side][_SLOTS[slot][side].index(slots[slot])]
    return row[1 - side].format(**slots)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], list[Tensor], bool, dict[str, str]]:
    """Tensors by their name in the file, its EMA weights (or none), whether it is Lightning's, metadata."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is a folder or a device: name a checkpoint file")
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:
        try:
            with safe_open(path, framework="pt") as reader:
                tensors = {name: reader.get_tensor(name) for name in list(reader.keys())}
                return tensors, [], False, dict(reader.metadata() or {})
        except SafetensorError as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}): get the file again") from error
    if not head or (head[:2] == b"PK" and not zipfile.is_zipfile(path)):
        size = path.stat().st_size
        raise CheckpointError(f"{path} is truncated: it ends after {size:,} bytes: get the file again")
    if head[:2] != b"PK" and head[:1] != b"\x80":
        raise CheckpointError(f"{path} is no checkpoint: safetensors and torch.save do not begin with {head!r}")
    content = _read_pickle(path)
    averages: list[Tensor] = []
    lightning = isinstance(content, dict) and isinstance(content.get("state_dict"), dict)
    if lightning:
        averages = _find_averages(content.get("optimizer_states"))
        content = content["state_dict"]
        if any(str(name).startswith("model.") for name in content):  # beside it lie the featurisers' windows
            content = {name[6:]: value for name, value in content.items() if str(name).startswith("model.")}
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds no tensors but {content!r:.60}: save a state dict")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is no tensor but {type(value).__name__}: "
                f"save a state dict, alone or under 'state_dict'"
            )
    return dict(content), averages, lightning, {}


def _find_averages(states: object) -> list[Tensor]:
    for entry in states if isinstance(states, list) else []:
        averages = entry.get("ema") if isinstance(entry, dict) else None
        if isinstance(averages, list | tuple) and all(isinstance(value, Tensor) for value in averages):
            return list(averages)
    return []


class _NoDraws(TorchFunctionMode):
    """Within it nothing random is drawn: weights are untouched memory until a file's take their place.

    The paper's model then takes 0.05 s and no memory. (`torch.device("meta")` would import the compiler.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _blank(config: ModelConfig, scan: ssd.Scan | str = "auto") -> BSMamba2:
    with _NoDraws():
        return BSMamba2(config, scan=scan)


class _Inert:
    """Stands for a class that a file names, of its hyper-parameters say: called, it is an empty dict."""

    def __new__(cls, *_: object) -> OrderedDict[str, object]:  # type: ignore[misc]
        return OrderedDict()


def _read_pickle(path: Path) -> Any:
    """torch.load with weights_only; what it does not know is read as `_Inert`, never looked up or called."""
    try:
        with path.open("rb") as file:  # not by its name: torch.load goes by the extension .safetensors
            foreign = []
            if zipfile.is_zipfile(path):
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
                file.seek(0)
            split = [name.rpartition(".") for name in foreign]
            inert: list[Any] = [type(name, (_Inert,), {"__module__": where}) for where, _, name in split]
            with torch.serialization.safe_globals(inert):
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message proposes weights_only=False: not repeated
        refused = re.search(r"GLOBAL (\S+)", str(error))
        told = str(error).partition("WeightsUnpickler error:")[2].strip() or "bad pickle"
        reason = f"it calls for {refused[1]}" if refused else told.splitlines()[0]
        raise CheckpointError(
            f"{path} is damaged or not safe to read ({reason}); nothing in it was run: get the file again"
        ) from None
    except Exception as error:  # any other means bad bytes: torch raises a dozen kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is truncated or damaged ({reason}): get the file again") from error


def _compare(path: Path | str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str = "") -> None:
    """CheckpointError that names what is missing, unexpected, misshapen or not floating-point."""

    def some(names: list[str]) -> str:
        return "; ".join(names[:4]) + (f"; and {len(names) - 4} more" if len(names) > 4 else "")

    common = [name for name in expected if name in found]
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of the wrong shape": [
            f"{name}: {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in common
            if found[name].shape != expected[name].shape
        ],
        "not plain floating-point": [
            f"{name}: {tensor.dtype}, {tensor.layout}, {tensor.device}"
            for name, tensor in found.items()
            if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta
        ],
    }
    told = [f"{len(names)} {kind}tensors {fault}: {some(names)}" for fault, names in faults.items() if names]
    if told:
        raise CheckpointError(
            f"{path} does not fit a BSMamba2 with {len(expected)} tensors. {'. '.join(told)}. "
            f"Use a whole file of this model, or give the config= that it was made with"
        )


def _refuse_nonfinite(where: str, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: {name} has NaN or infinite values: take an earlier checkpoint")


def write_whole(path: Path, payload: bytes | memoryview) -> None:
    """Write beside, flush to the disk, then rename: the file at `path` is the old one or the new one."""
    beside = path.with_name(f".bsmamba2-{secrets.token_hex(8)}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"cannot save {len(payload):,} bytes, nothing was changed: {error.strerror or error}"
            raise OSError(error.errno, reason, str(path)) from error
        raise
