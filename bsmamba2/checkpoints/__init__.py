"""Checkpoints: load models of this and other training programs, and save them; nothing in a file is ever executed.

Begin with `layouts`, which loads and saves. `published_layout` lists the tensor names, shapes and known files of the
authors' model, `state_dict` finds weights under the wrappers and prefixes of other training programs, and
`safe_pickle` reads pickles without running them. The package needs safetensors and PyYAML.
"""

from .layouts import (
    BUNDLED_CHECKPOINT,
    Checkpoint,
    CheckpointError,
    bundled_checkpoint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from .published_layout import describe_known_file, from_published, infer_config, sha256_file, to_published

__all__ = [
    "BUNDLED_CHECKPOINT",
    "Checkpoint",
    "CheckpointError",
    "bundled_checkpoint",
    "describe_known_file",
    "from_published",
    "infer_config",
    "load_checkpoint",
    "read_checkpoint",
    "save_checkpoint",
    "sha256_file",
    "to_published",
]
