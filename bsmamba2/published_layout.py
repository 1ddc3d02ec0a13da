"""Published layout: tensor names and shapes of the authors' checkpoints, and the configuration they imply.

Book: "The whole model". Source: the authors' code (github.com/EuiYeonKim/BSMamba2, 42eb8c8).
Letters of the shapes below: d feature, h head, e inner width h·p, x = e + 2n, v convolution taps,
w = 2·bins·c of band k, m hidden width of the masks; a dash is a size that follows from the others.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from .config import ModelConfig

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
_INDICES = "iks"  # slots that hold a number: layer, band, stem
_WORDS = {  # slots whose words differ between our names and the published ones
    "axis": (("time", "band"), ("0", "1")),
    "direction": (("forwards", "backwards"), ("forward", "backward")),
}


def _block(name: str, shape: str) -> tuple[str, str, str]:
    return "layers.{i}.{axis}.{direction}." + name, "layers.{i}.{axis}.{direction}_blocks.0." + name, shape


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
    """Identify a published file by its SHA-256, or None; hashed only when its size is that of a known one."""
    path = Path(path)
    for digest, (size, name) in KNOWN_FILES.items():
        if path.stat().st_size == size:
            return f"{name}; no licence is stated for the weights" if sha256_file(path) == digest else None
    return None


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_published(names: Iterable[str]) -> bool:
    """Whether any of the names is one of the published layout."""
    return any(_match(name, _PUBLISHED) for name in names)


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """Infer the configuration from tensor shapes; `read_checkpoint` lists the assumptions.

    Each tensor votes for the sizes that its shape shows, and an index counts when it has more than half as
    many tensors as the fullest one: a tensor that is missing, left over or misshapen is outvoted, so that
    it can be named instead of being believed.

    Args:
        shapes: name → shape; names of either layout count, others are passed over.

    Raises:
        ValueError: when they do not make a configuration.
    """
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    indices: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for name, shape in shapes.items():
        matched = _match(name, _OURS) or _match(name, _PUBLISHED)
        if matched is None:
            continue
        row, slots = matched
        for slot in slots.keys() & set(_INDICES):
            indices[slot][int(slots[slot])] += 1
        letters = row[2].split()
        if len(letters) == len(shape):
            for letter, length in zip(letters, shape, strict=True):
                share = 2 if letter[0] == "2" else 1
                votes[letter[-1] + (slots["k"] if letter[-1] == "w" else "")][length // share] += 1

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
        dim=d, depth=count("i"), freqs_per_bands=tuple(bins), stems=stems, channels=channels, n_fft=n_fft,
        hop_length=hop_length, d_state=(x - e) // 2, headdim=e // max(h, 1), expand=e // max(d, 1), d_conv=size("v"),
        mask_expand=size("m") // max(d, 1),
    )  # fmt: skip


def _compile(row: tuple[str, str, str], side: int) -> re.Pattern[str]:
    pattern = row[side].replace(".", "[.]")
    for slot in _INDICES:
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>0|[1-9][0-9]*)")
    for slot, words in _WORDS.items():
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{'|'.join(words[side])})")
    return re.compile(pattern)


_PATTERNS = [(row, (_compile(row, _OURS), _compile(row, _PUBLISHED))) for row in TENSORS]


def _match(name: str, side: int) -> tuple[tuple[str, str, str], dict[str, str]] | None:
    """The row of `TENSORS` that a name belongs to, and the values of its slots."""
    for row, patterns in _PATTERNS:
        if match := patterns[side].fullmatch(name):
            return row, match.groupdict()
    return None


def _rename(name: str, side: int) -> str:
    """The name on the other side; a name that is not of this side stays."""
    matched = _match(name, side)
    if matched is None:
        return name
    row, slots = matched
    for slot in slots.keys() & _WORDS.keys():
        slots[slot] = _WORDS[slot][1 - side][_WORDS[slot][side].index(slots[slot])]
    return row[1 - side].format(**slots)
