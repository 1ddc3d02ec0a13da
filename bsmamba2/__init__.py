"""BSMamba2, step by step: a band-split Mamba-2 vocal separator to read, run and change."""

from .checkpoints import load_checkpoint, save_checkpoint
from .config import ModelConfig
from .model import BSMamba2

__all__ = ["BSMamba2", "ModelConfig", "load_checkpoint", "save_checkpoint"]
__version__ = "0.1.0"
