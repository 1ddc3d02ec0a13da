"""Published layout: tensor names and shapes of the authors' checkpoints, and the configuration they imply.

Book: "The whole model". Source: the authors' code (github.com/EuiYeonKim/BSMamba2, 42eb8c8).
Letters of the shapes below: d feature, h head, e inner width h·p, x = e + 2n, z = e + x + h, v convolution taps,
w = 2·bins·c of band k, m hidden width of the masks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ModelConfig, is_positive_int, read_config

KNOWN_FILES = {  # SHA-256: size in bytes, origin
    "b1fcf93fdd6f7bc79e5410b1330b3d0fd5a6ca6ea23a94730c684629c71cd5ca": (
        770_628_060,
        "the authors' BSMamba2 vocals (Lightning checkpoint, README of EuiYeonKim/BSMamba2)",
    ),
    "fceb733b41742abb8df563092f4cb5bbc9243c6c03e7f34dc44c14e60732c72f": (
        192_610_602,
        "bs_mamba2_vocals.ckpt (ZFTurbo/Music-Source-Separation-Training, release v1.0.19)",
    ),
}

ROFORMER = "a Mel-Band RoFormer or another attention model"
_VARIANTS = (  # a pattern of tensor names that no BSMamba2 has, and the model that has them
    (r"lora_[AB]", "a LoRA adapter without its model: merge it first"),
    (r"to_qkv|to_q\.|rotary_embed|self_attn", ROFORMER),
    (r"mixer\.(x_proj|dt_proj)\.", "a Mamba-1 variant (module_type: mamba)"),
    (r"_blocks\.\d+\.(mlp|norm2)\.", "the gMLP variant (mamba_gmlp)"),
    (r"_blocks\.[1-9]\d*\.", "a variant with several Mamba blocks in each direction"),
    (r"weight_ih_l\d|\.(lstm|gru|rnn)\.", "a recurrent model (LSTM or GRU), as BandSplitRNN"),
    (r"to_freqs\.\d+\.0\.4\.", "a model whose masks have three or more linear layers, not two (mask_estimator_depth)"),
)

_OURS, _PUBLISHED = 0, 1
_INDICES = "iks"  # slots that hold a number: layer, band, stem
_WORDS = {  # slots whose words differ between our names and the published ones
    "axis": (("time", "band"), ("0", "1")),
    "direction": (("forwards", "backwards"), ("forward", "backward")),
}


def _block(name: str, shape: str) -> tuple[str, str, str]:
    return "layers.{i}.{axis}.{direction}." + name, "layers.{i}.{axis}.{direction}_blocks.0." + name, shape


TENSORS = (  # every tensor of the model: our name, published name, shape
    ("band_split.bands.{k}.norm.gain", "band_split.to_features.{k}.0.gamma", "w"),
    ("band_split.bands.{k}.linear.weight", "band_split.to_features.{k}.1.weight", "d w"),
    ("band_split.bands.{k}.linear.bias", "band_split.to_features.{k}.1.bias", "d"),
    _block("norm.weight", "d"),
    _block("mixer.dt_bias", "h"),
    _block("mixer.A_log", "h"),
    _block("mixer.D", "h"),
    _block("mixer.in_proj.weight", "z d"),
    _block("mixer.conv1d.weight", "x 1 v"),
    _block("mixer.conv1d.bias", "x"),
    _block("mixer.norm.weight", "e"),
    _block("mixer.out_proj.weight", "d e"),
    ("layers.{i}.{axis}.merge.weight", "layers.{i}.{axis}.linear.weight", "d 2d"),  # published: (2d, d, 1)
    ("layers.{i}.{axis}.merge.bias", "layers.{i}.{axis}.linear.bias", "d"),
    ("final_norm.gain", "final_norm.gamma", "d"),
    ("mask_estimators.{s}.bands.{k}.expand.weight", "mask_estimators.{s}.to_freqs.{k}.0.0.weight", "m d"),
    ("mask_estimators.{s}.bands.{k}.expand.bias", "mask_estimators.{s}.to_freqs.{k}.0.0.bias", "m"),
    ("mask_estimators.{s}.bands.{k}.project.weight", "mask_estimators.{s}.to_freqs.{k}.0.2.weight", "2w m"),
    ("mask_estimators.{s}.bands.{k}.project.bias", "mask_estimators.{s}.to_freqs.{k}.0.2.bias", "2w"),
)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape tensors: our layout → the published one; their order and unknown names stay unchanged."""
    return {
        _rename(name, _OURS): tensor.T.unsqueeze(-1).contiguous() if name.endswith(".merge.weight") else tensor
        for name, tensor in state.items()
    }


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape tensors: the published layout → ours; their order and unknown names stay unchanged."""
    renamed = {_rename(name, _PUBLISHED): tensor for name, tensor in state.items()}
    return {
        name: tensor.squeeze(-1).T.contiguous() if name.endswith(".merge.weight") else tensor
        for name, tensor in renamed.items()
    }


def describe_known_file(path: str | os.PathLike[str]) -> str | None:
    """Identify a published file by its SHA-256, else None; a file is hashed only if its size matches."""
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
    """Whether any of the names belongs to the published layout."""
    return any(_match(name, _PUBLISHED) for name in names)


def is_model_name(name: str) -> bool:
    """Whether a name belongs to a tensor of the model, in our layout or the published one."""
    return bool(_match(name, _OURS) or _match(name, _PUBLISHED))


def unsupported_variant(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Name of the related, unsupported model that the tensors belong to; None if there is none."""
    names = "\n".join(shapes)
    variant = next((variant for pattern, variant in _VARIANTS if re.search(pattern, names)), None)
    if variant == ROFORMER:
        if "mixer." in names:
            return "a hybrid of Mamba-2 and attention (module_type: mamba2-roformer)"
        bins = sum(shape[0] for name, shape in shapes.items() if name.endswith(".0.gamma") and len(shape) == 1) // 4
        return "a BS-RoFormer (attention)" if bins > 1 and (bins - 1).bit_count() == 1 else ROFORMER
    if "to_freqs." in names and not re.search(r"to_freqs\.\d+\.0\.2\.", names) and ".0.0." in names:
        return variant or "a model whose masks have one linear layer, not two (mask_estimator_depth)"
    return variant


def expected_shapes(config: ModelConfig, *, published: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model, by our names or the published ones; allocates no tensors."""
    d, e, h = config.dim, config.inner, config.heads
    x = e + 2 * config.d_state
    sizes = {"1": 1, "d": d, "2d": 2 * d, "e": e, "h": h, "x": x, "z": e + x + h, "v": config.d_conv}
    sizes["m"] = config.mask_expand * d
    widths = [2 * config.channels * bins for bins in config.freqs_per_bands]
    choices: dict[str, Iterable[Any]] = {
        "i": range(config.depth), "k": range(len(widths)), "s": range(len(config.stems)),
        **{slot: words[published] for slot, words in _WORDS.items()},
    }  # fmt: skip
    shapes = {}
    for row in TENSORS:
        slots = [slot for slot in choices if f"{{{slot}}}" in row[0]]
        for values in itertools.product(*(choices[slot] for slot in slots)):
            chosen = dict(zip(slots, values, strict=True))
            w = widths[chosen.get("k", 0)]
            shape = tuple({**sizes, "w": w, "2w": 2 * w}[letter] for letter in row[2].split())
            if published and row[0].endswith("merge.weight"):
                shape = (2 * d, d, 1)
            shapes[row[published].format(**chosen)] = shape
    return shapes


def infer_config(shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any] | None = None) -> ModelConfig:
    """Infer the configuration from tensor shapes; `read_checkpoint` lists the assumptions.

    Each tensor votes for the sizes in its shape, and an index counts if it has more than half as many tensors as the
    most frequent index. Missing, additional or misshapen tensors are thus outvoted, so that the caller can report them.

    Args:
        shapes: name → shape; names of either layout count, others are ignored.
        fields: known fields of the configuration, for example from `config.read_config`.

    Raises:
        ValueError: when no configuration fits the shapes.
    """
    given = dict(fields or {})
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
        names = ", ".join(f"{name:.60}" for name in sorted(shapes)[:3])
        raise ValueError(f"none of {len(shapes)} tensors belongs to BSMamba2: {names}, …")

    def size(letter: str) -> int:
        if not votes[letter]:
            raise ValueError(f"no tensor shows the size {letter!r}")
        return votes[letter].most_common(1)[0][0]

    def count(slot: str) -> int:
        fullest = max(indices[slot].values(), default=0)
        last = max((index for index, n in indices[slot].items() if 2 * n > fullest), default=-1)
        if last >= len(shapes):  # checked before anything of that size is allocated
            raise ValueError(f"{len(shapes)} tensors are too few for index {last:,} of a layer, band or stem")
        return 1 + last

    d, e, x, h = size("d"), size("e"), size("x"), size("h")
    widths = [size(f"w{k}") for k in range(count("k"))]
    for channels in (given["channels"],) if is_positive_int(given.get("channels")) else (2, 1):
        bins = [width // (2 * channels) for width in widths]
        n_fft = 2 * (sum(bins) - 1)
        known = n_fft == given["n_fft"] if "n_fft" in given else n_fft > 0 and n_fft.bit_count() == 1
        if sum(bins) * 2 * channels == sum(widths) and known:
            break
    else:
        fits = f"do not fit n_fft={given['n_fft']}" if "n_fft" in given else "fit no n_fft that is a power of two"
        raise ValueError(f"bands of {sum(widths)} features in all {fits}")
    stems = ("vocals",) if count("s") == 1 else tuple(f"stem_{s}" for s in range(count("s")))
    inferred = {
        "dim": d, "depth": count("i"), "freqs_per_bands": tuple(bins), "stems": stems, "channels": channels,
        "n_fft": n_fft, "hop_length": ModelConfig.hop_length if n_fft >= 2 * ModelConfig.hop_length else n_fft // 4,
        "d_state": (x - e) // 2, "headdim": e // max(h, 1), "expand": e // max(d, 1), "d_conv": size("v"),
        "mask_expand": size("m") // max(d, 1),
    }  # fmt: skip
    return ModelConfig.from_mapping({**inferred, **given})


def choose_config(
    path: Path, shapes: Mapping[str, tuple[int, ...]], stored: str | None, given: Path | None
) -> tuple[ModelConfig, list[str]]:
    """Choose the configuration of a checkpoint: stored, otherwise inferred, with fields from a YAML file.

    Args:
        path: path of the checkpoint, in whose folder YAML files are tried.
        shapes: name → shape of its tensors.
        stored: its stored configuration as JSON, or None.
        given: a configuration file whose fields take precedence, or None.

    Returns:
        The configuration, and notes on its origin.
    """
    fields = read_config(given) if given else {}
    if stored is not None:
        return replace(ModelConfig.from_mapping(json.loads(stored)), **fields), []
    config = None
    files = [file for file in sorted(path.parent.iterdir()) if file.suffix.lower() in (".yaml", ".yml")]
    for file in [] if given else [file for file in files if file.stem == path.stem] or files[:100]:
        try:
            fitting = read_config(file)
            candidate = infer_config(shapes, fitting)
        except (ValueError, TypeError):
            continue
        if config not in (None, candidate):
            config, fields, given = None, {}, None
            break
        config, fields, given = candidate, fitting, file
    config = config or infer_config(shapes, fields)
    notes = [f"{', '.join(fields)} from {given}"] if fields else []
    assumed: dict[str, object] = {"hop_length": config.hop_length, "win_length": config.win_length or config.n_fft}
    assumed |= {"sample_rate": config.sample_rate, "stems": ",".join(config.stems)}
    texts = [f"{name}={value!s:.100}" for name, value in assumed.items() if name not in fields]
    if texts:
        notes.append(f"{', '.join(texts)} assumed, because the tensors do not show it; --config FILE sets others")
    return config, notes


def _compile(row: tuple[str, str, str], side: int) -> re.Pattern[str]:
    pattern = row[side].replace(".", "[.]")
    for slot in _INDICES:
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>0|[1-9][0-9]{{0,8}})")
    for slot, words in _WORDS.items():
        pattern = pattern.replace(f"{{{slot}}}", f"(?P<{slot}>{'|'.join(words[side])})")
    return re.compile(pattern)


_PATTERNS = [(row, (_compile(row, _OURS), _compile(row, _PUBLISHED))) for row in TENSORS]


@functools.lru_cache(maxsize=10_000)
def _match(name: str, side: int) -> tuple[tuple[str, str, str], dict[str, str]] | None:
    """The row of `TENSORS` that a name belongs to, and the values of its slots."""
    for row, patterns in _PATTERNS:
        if match := patterns[side].fullmatch(name):
            return row, match.groupdict()
    return None


def _rename(name: str, side: int) -> str:
    """Translate a name into the opposite layout; a name that is not in this layout stays unchanged."""
    matched = _match(name, side)
    if matched is None:
        return name
    row, slots = matched[0], dict(matched[1])
    for slot in slots.keys() & _WORDS.keys():
        slots[slot] = _WORDS[slot][1 - side][_WORDS[slot][side].index(slots[slot])]
    return row[1 - side].format(**slots)
