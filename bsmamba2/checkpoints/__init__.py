"""Checkpoints: load a model that any program trained, and save one; nothing in a file is ever executed.

`layouts` loads and saves; begin there. `published_layout` has the names, shapes and known files of the authors' model,
`state_dict` finds the weights under the wrappers and prefixes of other training programs, and `safe_pickle` reads
their pickles without running them. The package needs safetensors and PyYAML.
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
